"""The deep check of a table: every volume is read and what preparation does to it is reported."""

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainables.config import FineTuneConfig
from trainables.data.folds import split_of, thin_folds
from trainables.data.intensity import Intensity, intensity_lines, intensity_of
from trainables.data.manifest import (
    SPLITS,
    Manifest,
    Row,
    checked_rows,
    manifest_of,
    real_path,
    shown_cell,
    told_together,
)
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
from trainables.data.table_file import ManifestError, read_records
from trainables.data.threads import Progress, in_threads
from trainables.data.visible import visible


@dataclass(frozen=True, eq=False)
class CheckReport:
    """The result of a deep check: `manifest` is None, and `problems` not empty, or the other way round."""

    manifest: Manifest | None
    problems: list[str]
    notices: list[str]
    """Facts worth knowing that stop nothing."""
    class_names: tuple[str, ...] = ()
    """By number, where they have names."""

    def lines(self) -> list[str]:
        """Return the table in a few sentences: rows, subjects, classes, splits, sizes, and the notices."""
        if self.manifest is None:
            return self.notices
        rows = self.manifest.rows
        names = {number: f" ({visible(name)})" for number, name in enumerate(self.class_names)}
        classes = ", ".join(
            f"class {label}{names.get(label, '')}: {count}"
            for label, count in sorted(Counter(rows["label"]).items())
        )
        lines = [f"{len(rows)} volumes of {rows['subject'].nunique()} subjects; {classes}"]
        split, folds = Counter(rows["split"].dropna()), Counter(rows["fold"].dropna())
        parts = {
            "split": [f"{word} {split[word]}" for word in SPLITS if word in split],
            "folds": [f"{fold}: {count}" for fold, count in sorted(folds.items())],
        }
        lines += [f"{name}: {', '.join(each)}" for name, each in parts.items() if each]
        return lines + self.notices


def check_manifest(
    table: Path, num_classes: int, config: FineTuneConfig, progress: Progress | None = None
) -> CheckReport:
    """Return `read_manifest`'s findings and those of reading every volume once, as `config` would have it prepared.

    Beyond the rows: unreadable, cut or damaged files, more dimensions than `in_channels`, voxels that are not finite,
    spacings not above 0, the same voxels twice (under two subjects that is a leak), volumes that `intensity` leaves
    constant, and folds that cannot be made. A table that is no table raises ManifestError.
    """
    table = Path(table)
    rows, problems = checked_rows(table, num_classes, config.classes)
    readable = [row for row in rows if row.file is not None]
    recipe = Recipe.from_config(config)
    found: list[_Finding] = in_threads(
        lambda row: _read_volume(str(row.file), recipe), readable, progress=progress
    )
    unreadable = told_together(
        (row, finding.problem)
        for row, finding in zip(readable, found, strict=True)
        if finding.problem
    )
    problems = problems + unreadable + _same_voxels(readable, found)
    if problems:
        return CheckReport(None, problems, _notices(readable, found, config))
    manifest = manifest_of(table, rows, num_classes)
    problems = _fold_problems(manifest, config)
    notices = [*_notices(readable, found, config), *_unread_columns(table), *_one_person(rows)]
    if problems:
        return CheckReport(None, problems, notices)
    notices += thin_folds(manifest, config, all_folds=True)
    return CheckReport(manifest, [], notices, config.class_names or manifest.class_names)


@dataclass(frozen=True)
class _Finding:
    """What reading one volume gave."""

    problem: str | None
    digest: str | None = None
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    oriented: bool = True
    intensity: Intensity | None = None


def _read_volume(path: str, recipe: Recipe) -> _Finding:
    try:
        header = read_header(path)
        scan = read_scan(path, recipe.in_channels)
        prepare_scan(scan, recipe, path)
    except VolumeError as error:
        return _Finding(error.reason)
    digest = hashlib.sha256(repr(scan.voxels.shape).encode())
    digest.update(scan.voxels.data)
    return _Finding(
        None,
        digest.hexdigest(),
        header.shape,
        header.spacing_mm,
        header.oriented,
        intensity_of(scan.voxels, recipe),
    )


def _same_voxels(rows: list[Row], found: list[_Finding]) -> list[str]:
    first: dict[str, Row] = {}
    files: set[str] = set()
    problems = []
    for row, finding in zip(rows, found, strict=True):
        assert row.file is not None
        file = real_path(row.file)
        if finding.digest is None or file in files:  # the same file twice is reported already
            continue
        files.add(file)
        known = first.setdefault(finding.digest, row)
        if known is row:
            continue
        if known.subject is not None and row.subject is not None and known.subject != row.subject:
            subjects = f"{shown_cell(row.subject)!r} and {shown_cell(known.subject)!r}"
            problems.append(
                f"{row.name}: the same voxels as {known.name}, but the subjects are {subjects}: "
                "one would leak into the other's fold; keep one, or give both one subject and keep one"
            )
        else:
            problems.append(f"{row.name}: the same voxels as {known.name}: keep one of the rows")
    return problems


def person_of(subject: str) -> str:
    """Return the subject without what people write differently of one person: case, accents' form, zeros, separators."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", subject).casefold())
    parts = re.findall(r"[0-9]+|[^\W0-9_]+", plain)
    return (
        " ".join(part.lstrip("0") or "0" if part.isdecimal() else part for part in parts) or plain
    )


MOST_PAIRS = 10


def _one_person(rows: list[Row]) -> list[str]:
    """A notice of subjects whose names differ as names of one person do: folds would hold that person on both sides."""
    names: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row.subject is not None:
            names[person_of(row.subject)].setdefault(row.subject, row)
    alike = [spellings for spellings in names.values() if len(spellings) > 1]
    if not alike:
        return []
    shown = [
        " and ".join(f"{_told_apart(name)} (row {row.number})" for name, row in spellings.items())
        for spellings in alike[:MOST_PAIRS]
    ]
    more = f"; and {len(alike) - MOST_PAIRS} more" if len(alike) > MOST_PAIRS else ""
    return [
        f"{len(alike)} subjects may be one person under several names, which folds would have on both sides: "
        f"{'; '.join(shown)}{more}. Write one person's subject the same way in all rows; nothing to do if they are different"
    ]


def _told_apart(name: str) -> str:
    """The name in quotes; its letters by number where another form of Unicode would look the same."""
    return repr(shown_cell(name)) if name.isascii() else f"{shown_cell(name)!r} = {name!a}"


def _fold_problems(manifest: Manifest, config: FineTuneConfig) -> list[str]:
    try:
        split_of(manifest, config)
    except ManifestError as error:
        return error.problems
    return []


def _notices(rows: list[Row], found: list[_Finding], config: FineTuneConfig) -> list[str]:
    good = [finding for finding in found if finding.problem is None]
    if not good:
        return []
    shapes, spacings = np.array([f.shape for f in good]), np.array([f.spacing_mm for f in good])
    recipe, chosen = Recipe.from_config(config), None
    if "spacing_mm" not in config.model_fields_set:  # as a new study chooses it
        chosen = common_spacing(shapes, spacings, config.volume_shape)
        recipe = replace(recipe, spacing_mm=(chosen.every_mm,) * 3)
    names = [row.name for row, finding in zip(rows, found, strict=True) if finding.problem is None]
    notices = [
        f"voxels {_span(shapes, 'd')}, spacing {_span(spacings, '.3g')} mm (x, y, z: left-right, back-front, feet-head)",
        _prepared(shapes, spacings, recipe),
        *(chosen.lines() if chosen else []),
        *intensity_lines([f.intensity for f in good if f.intensity], names, recipe),
    ]
    blind = sum(not finding.oriented for finding in good)
    if blind:
        notices.append(
            f"{blind} of {len(good)} files state no orientation: LAS is assumed, as the format defines"
        )
    return notices


MASK_COLUMNS = ("mask", "seg", "segmentation", "roi", "label_map", "labelmap")


def _unread_columns(table: Path) -> list[str]:
    """Columns that name a mask, which nothing here reads."""
    columns, _ = read_records(table)
    named = [column for column in columns if column.strip().lower() in MASK_COLUMNS]
    return [
        f"column {shown_cell(column)!r} is not read: scans are prepared whole; crop or mask them before, if that is wanted"
        for column in named
    ]


def _prepared(shapes: npt.NDArray[Any], spacings: npt.NDArray[Any], recipe: Recipe) -> str:
    """The prepared scans in words: their new spacing, and how much of them is cut off."""
    targets = np.array(
        [target_spacing(*scan, recipe) for scan in zip(shapes, spacings, strict=True)]
    )
    kept = kept_shares(shapes, spacings, targets, recipe.volume_shape)
    cropped = int((kept < 1).any(axis=1).sum())
    told = "none is cropped"
    if cropped:
        least, axis = kept.min(), "xyz"[int(kept.min(axis=0).argmin())]
        told = (
            f"{cropped} of {len(kept)} are cropped, one to {least:.0%} of its extent along {axis}"
        )
    voxels = " x ".join(map(str, recipe.volume_shape))
    return f"prepared: {voxels} voxels of {_span(targets, '.3g')} mm; {told}"


def _span(values: npt.NDArray[Any], form: str) -> str:
    low, high = (
        " x ".join(format(value, form) for value in side)
        for side in (values.min(axis=0), values.max(axis=0))
    )
    return low if low == high else f"{low} to {high}"
