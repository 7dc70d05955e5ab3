"""A table of volumes -> one HTML page of the network's input: slices by class, the odd volumes first."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from trainables.checkpoints import replacing
from trainables.config import FineTuneConfig
from trainables.data.manifest import Manifest
from trainables.data.recommend import Recommendation, Values, recommend, values_of
from trainables.data.scans import (
    Recipe,
    VolumeError,
    kept_shares,
    prepare_scan,
    read_header,
    read_scan,
    target_spacing,
)
from trainables.data.spacing import common_spacing
from trainables.data.storage import url_of
from trainables.data.table_file import ManifestError
from trainables.data.threads import Progress, in_threads
from tune_app.report.parts import written_at
from tune_app.report.rendering import asset, environment

BINS = 64
"""Of the histogram whose flatness is compared."""

PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))

PER_KIND = 2
"""Volumes of the whole cohort that are shown for each way to be odd."""


@dataclass(frozen=True)
class Seen:
    """One prepared volume, and what preparation did to it."""

    number: int
    """Row of the table, from 1."""
    name: str
    subject: str
    label: int
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    values: Values
    new_mm: tuple[float, float, float]
    kept: float
    """Share of its extent that is left along the axis that is cropped most; 1 where none is."""
    prepared: tuple[float, float]
    """Smallest and largest prepared value."""
    flatness: float
    """Entropy of its histogram between the 1st and 99th percentile over that of a flat one, 0 to 1."""
    pictures: tuple[str, ...]
    """A slice through the middle along each of PLANES, as a data URL."""

    @property
    def size_mm3(self) -> float:
        return float(np.prod(np.multiply(self.shape, self.spacing_mm)))


def write_cohort_view(
    manifest: Manifest,
    config: FineTuneConfig,
    path: Path,
    *,
    per_class: int = 12,
    class_names: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[Recommendation]:
    """Write the page of a table's volumes as `config` prepares them; returns the recommendations.

    Every volume is read. Without a spacing in `config` it is the one that a new study takes. `per_class`: volumes that are
    shown of each class, the odd ones first. Raises ManifestError with every file that cannot be prepared.
    """
    recipe = Recipe.from_config(config)
    paths = [url_of(file) or file for file in manifest.rows["path"]]
    headers = in_threads(read_header, paths)
    shapes, spacings = [h.shape for h in headers], [h.spacing_mm for h in headers]
    if "spacing_mm" not in config.model_fields_set:
        every = common_spacing(shapes, spacings, config.volume_shape).every_mm
        recipe = Recipe.from_config(config.model_copy(update={"spacing_mm": (every,) * 3}))
    seen: list[Seen | VolumeError] = in_threads(
        lambda row: _see(manifest, paths[row], row, recipe), range(len(paths)), progress=progress
    )
    problems = [str(one) for one in seen if isinstance(one, VolumeError)]
    if problems:
        raise ManifestError(problems)
    volumes = [one for one in seen if isinstance(one, Seen)]
    advice = recommend(shapes, spacings, [one.values for one in volumes])
    text = render(manifest, recipe, volumes, advice, per_class, class_names)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return advice


def render(
    manifest: Manifest,
    recipe: Recipe,
    volumes: Sequence[Seen],
    advice: Sequence[Recommendation],
    per_class: int,
    class_names: Sequence[str] = (),
) -> str:
    """Return the page as HTML that needs no network and holds no script."""
    odd = odd_volumes(volumes)
    classes = []
    for label in range(manifest.num_classes):
        of_class = [one for one in volumes if one.label == label]
        name = f"{label}: {class_names[label]}" if label < len(class_names) else str(label)
        classes.append((name, len(of_class), _chosen(of_class, odd, per_class)))
    text: str = (
        environment()
        .get_template("cohort.html")
        .render(
            css=Markup(asset("report.css")),
            table=manifest.table,
            volumes=len(volumes),
            subjects=manifest.rows["subject"].nunique(),
            recipe=_recipe_lines(recipe),
            advice=advice,
            classes=[
                (
                    name,
                    count,
                    [(one, odd.get(one.number, ()), _facts(one, recipe)) for one in shown],
                )
                for name, count, shown in classes
            ],
            planes=[name for name, _ in PLANES],
            written=written_at(),
        )
    )
    return text


def odd_volumes(volumes: Sequence[Seen]) -> dict[int, tuple[str, ...]]:
    """Return why volumes are odd, by row number: smallest, largest, flattest histogram, most cropped."""
    found: dict[int, list[str]] = {}
    sizes = sorted(volumes, key=lambda one: one.size_mm3)
    kinds = [("flattest histogram", sorted(volumes, key=lambda one: -one.flatness)[:PER_KIND])]
    if len(sizes) > 1 and sizes[0].size_mm3 < sizes[-1].size_mm3:
        kinds += [("smallest", sizes[:PER_KIND]), ("largest", sizes[: -PER_KIND - 1 : -1])]
    cropped = sorted((one for one in volumes if one.kept < 1), key=lambda one: one.kept)
    kinds.append(("most cropped", cropped[:PER_KIND]))
    for why, those in kinds:
        for one in those:
            found.setdefault(one.number, []).append(why)
    return {number: tuple(why) for number, why in found.items()}


def _chosen(of_class: Sequence[Seen], odd: dict[int, tuple[str, ...]], most: int) -> list[Seen]:
    """The odd volumes of a class, then others evenly over the table."""
    first = [one for one in of_class if one.number in odd][:most]
    rest = [one for one in of_class if one.number not in odd]
    left = min(most - len(first), len(rest))
    places: list[int] = np.linspace(0, len(rest) - 1, left).astype(int).tolist() if left else []
    return first + [rest[at] for at in places]


def _see(manifest: Manifest, path: Any, row: int, recipe: Recipe) -> Seen | VolumeError:
    try:
        scan = read_scan(path, recipe.in_channels)
        volume = prepare_scan(scan, recipe, path)
    except VolumeError as error:
        return error
    about = manifest.rows.iloc[row]
    depth, height, width = scan.voxels.shape[1:]
    shape = (depth, height, width)
    new_mm = target_spacing(shape, scan.spacing_mm, recipe)
    return Seen(
        number=manifest.numbers[row] if manifest.numbers else row + 1,
        name=Path(str(path)).name,
        subject=str(about["subject"]),
        label=int(about["label"]),
        shape=shape,
        spacing_mm=scan.spacing_mm,
        values=values_of(scan.voxels),
        new_mm=new_mm,
        kept=float(kept_shares(shape, scan.spacing_mm, new_mm, recipe.volume_shape).min()),
        prepared=(float(volume.min()), float(volume.max())),
        flatness=flatness(scan.voxels),
        pictures=tuple(_picture(volume[0], axis) for _, axis in PLANES),
    )


def flatness(volume: npt.NDArray[Any]) -> float:
    """Return the entropy of the histogram between the 1st and 99th percentile, over that of a flat histogram."""
    low, high = np.percentile(volume, (1, 99))
    if not high > low:
        return 0.0
    counts, _ = np.histogram(volume, bins=BINS, range=(float(low), float(high)))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(BINS))


def _picture(volume: npt.NDArray[Any], axis: int) -> str:
    """The middle slice as a PNG in a data URL; the patient's right is on the left, up is anterior or superior."""
    plane = np.flip(volume.take(volume.shape[axis] // 2, axis=axis).T, axis=(0, 1))
    low, high = np.percentile(volume, (0.5, 99.5))
    grey = ((plane - low) / max(float(high - low), 1e-12)).clip(0, 1) * 255
    stream = io.BytesIO()
    Image.fromarray(grey.astype(np.uint8)).save(stream, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _recipe_lines(recipe: Recipe) -> list[tuple[str, str]]:
    spacing = _by(recipe.spacing_mm) if recipe.spacing_mm else "each scan separately"
    window = f" ({recipe.window_low:g} to {recipe.window_high:g})"
    return [
        ("volume_shape", _by(recipe.volume_shape)),
        ("spacing_mm", spacing),
        ("intensity", recipe.intensity + (window if recipe.intensity == "window" else "")),
    ]


def _facts(one: Seen, recipe: Recipe) -> list[tuple[str, str]]:
    found = one.values.intensity
    cropped = "whole" if one.kept == 1 else f"cropped to {one.kept:.0%} along one axis"
    return [
        ("shape", f"{_by(one.shape)} → {_by(recipe.volume_shape)}, {cropped}"),
        ("spacing", f"{_by(one.spacing_mm)} → {_by(one.new_mm)} mm"),
        (
            "intensity",
            f"{found.low:.4g} to {found.high:.4g} ({found.kind}) → {one.prepared[0]:.3g} to {one.prepared[1]:.3g}",
        ),
        ("histogram", f"{one.flatness:.2f} of a flat one"),
    ]


def _by(numbers: Sequence[float]) -> str:
    texts = [f"{number:.3g}" for number in numbers]
    return texts[0] if len(set(texts)) == 1 and "." in texts[0] else " x ".join(texts)
