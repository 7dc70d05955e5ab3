"""Where in a volume a network found its evidence: 3D Grad-CAM, written in the space of the file it explains.

Meaning and limits: the map shows which cells of one layer moved the log-odds of a class up, upsampled to voxels. Its
resolution is that of the layer: layer 4 has one cell for 32 voxels a side (8 in the dilated geometry), so at small
volume shapes it cannot locate the evidence. It does not outline anything, and it does not show that the network is
right.
"""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from nibabel.orientations import apply_orientation, ornt_transform
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from trainables.checkpoints import replacing
from trainables.data.scans import (
    Recipe,
    ScanHeader,
    raw_header,
    read_header,
    read_scan,
    target_spacing,
)
from trainables.network.model import Classifier
from tune_app.models.folder import times
from tune_app.models.model import Model, Prediction

Array = npt.NDArray[Any]

LAYERS = ("layer4", "layer3", "layer2", "layer1")
RAS = np.array([[0, 1], [1, 1], [2, 1]])

PANEL = 300
"""Pixels of the longest side of a slice."""

PLANES = (("axial", 2), ("coronal", 1), ("sagittal", 0))
"""The slices shown, and the RAS axis each is cut across."""


def grad_cam(
    network: Classifier,
    volume_CDHW: Tensor,
    target: int,
    *,
    layer: str = "layer4",
    scale: float = 1.0,
) -> Tensor:
    """Return the Grad-CAM (D, H, W) of the log-odds of class `target` on the cells of `layer`, upsampled, >= 0.

    Cell values are the positive part of the channels' sum, each weighted by the mean gradient of the log-odds over the
    layer's cells; upsampling is trilinear. `scale` is the factor of the logits. The network must be in eval mode.
    Source: Selvaraju et al. 2017, Grad-CAM, eq. 1 and 2; for the log-odds instead of the logit, since a logit may rise
    while the other class's rises more.
    """
    seen: list[Tensor] = []

    def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        # A fresh leaf: nothing below the layer is differentiated
        seen.append(output.detach().requires_grad_())
        return seen[0]

    handle = getattr(network.backbone, layer).register_forward_hook(cut)
    try:
        with (
            torch.enable_grad(),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        ):
            logits_C = scale * network(volume_CDHW[None])[0]
            others = torch.cat([logits_C[:target], logits_C[target + 1 :]])
            (gradient,) = torch.autograd.grad(logits_C[target] - others.logsumexp(dim=0), seen[0])
    finally:
        handle.remove()
    weights = gradient.mean(dim=(2, 3, 4), keepdim=True)
    cells = F.relu((weights * seen[0].detach()).sum(dim=1, keepdim=True))
    size = volume_CDHW.shape[1:]
    return F.interpolate(cells, size=size, mode="trilinear", align_corners=False)[0, 0]


def cells(network: Classifier, shape: Sequence[int], layer: str) -> tuple[int, ...]:
    """Return how many cells (D, H, W) `layer` has for volumes of this shape."""
    stride = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}[layer]
    stride = min(stride, 8) if network.geometry == "dilated" else stride
    return tuple(-(-side // stride) for side in shape)


def finer_layer(model: Model, layer: str) -> str:
    """Return `layer`, or the next lower one whose maps have more than one cell: one of a single cell shows no place."""
    shape = model.recipe.volume_shape
    for one in LAYERS[LAYERS.index(layer) :]:
        if all(max(cells(network, shape, one)) > 1 for network in model.networks):
            return one
    return LAYERS[-1]


def explain(model: Model, volume_CDHW: Array, target: int, *, layer: str = "layer4") -> Array:
    """Return the model's map (D, H, W) for class `target` of a prepared volume: 0 to 1, or all 0 without evidence.

    An ensemble's is the mean of its members' maps, each with its own maximum at 1.
    """
    volume = torch.from_numpy(np.ascontiguousarray(volume_CDHW)).float().to(model.device)
    maps = [
        _unit(
            grad_cam(network, volume, target, layer=layer, scale=member.scale)
            .double()
            .cpu()
            .numpy()
        )
        for network, member in zip(model.networks, model.info.members, strict=True)
    ]
    return _unit(np.mean(maps, axis=0))


def _unit(values: Array) -> Array:
    top = float(values.max())
    return values / top if top > 0 else values


class Explainer:
    """Writes `<name>_cam.nii.gz` and `<name>_cam.png` for predictions, into one folder."""

    def __init__(self, model: Model, folder: Path, *, layer: str = "layer4") -> None:
        self.model, self.folder = model, folder
        self.asked, self.layer = layer, finer_layer(model, layer)
        self.taken: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def notes(self) -> list[str]:
        """Return the notes on all the maps: when the layer is too coarse to locate anything."""
        notes = []
        if self.layer != self.asked:
            notes.append(
                f"{self.asked} has a single cell, and its map would be the same everywhere: {self.layer} is used"
            )
        coarse = self._coarsest(self.layer)
        if min(coarse) >= 3:
            return notes
        lower = ((one, self._coarsest(one)) for one in LAYERS[LAYERS.index(self.layer) + 1 :])
        finer = next(((one, found) for one, found in lower if min(found) > min(coarse)), None)
        advice = f"; --explain-layer {finer[0]} has {times(finer[1])}" if finer else ""
        return [
            *notes,
            f"{self.layer} has {times(coarse)} cells: its map can hardly locate anything{advice}",
        ]

    def _coarsest(self, layer: str) -> tuple[int, ...]:
        """The fewest cells that a map of this layer has in any of the model's networks."""
        shape = self.model.recipe.volume_shape
        return min((cells(network, shape, layer) for network in self.model.networks), key=min)

    def __call__(self, prediction: Prediction) -> str:
        """Write map and picture of a scored prediction; returns the map's path.

        The map is of the evidence for class 1; with more than two classes, for the class decided.
        """
        scored = prediction.scored
        assert scored is not None
        target = 1 if self.model.info.num_classes == 2 else scored.decision
        source = Path(prediction.source.path)
        header = read_header(source)
        seen = explain(self.model, scored.volume_CDHW, target, layer=self.layer)
        map_RAS = to_scan_grid(seen, header, self.model.recipe)
        name = self._free_name(source)
        path = self.folder / f"{name}_cam.nii.gz"
        write_map(path, map_RAS, header, source, f"Grad-CAM {self.layer} class {target}")
        said = f"evidence for class {target} ({self.layer}), probability {scored.probabilities_C[target]:.3f}"
        scan = read_scan(source, self.model.recipe.in_channels)
        write_slices(
            self.folder / f"{name}_cam.png", scan.voxels[0], map_RAS, scan.spacing_mm, said
        )
        return str(path)

    def _free_name(self, source: Path) -> str:
        stem = source.name.removesuffix(".gz").removesuffix(".nii")
        name, number = stem, 1
        while name in self.taken:  # two folders may hold files of one name
            number += 1
            name = f"{stem}-{number}"
        self.taken.add(name)
        return name


# Back into the file's space --------------------------------------------------------------------------------------------


def to_scan_grid(map_DHW: Array, header: ScanHeader, recipe: Recipe) -> Array:
    """Return a map on prepared voxels as one on the scan's own voxels in RAS+ order, float32.

    The way back of `trainables.data.scans.resample` and its padding, axis by axis and linear. Voxels that were cropped
    away are 0: the network never saw them.
    """
    spacing_mm = target_spacing(header.shape, header.spacing_mm, recipe)
    result = map_DHW
    for axis, (old, old_mm, new_mm) in enumerate(
        zip(header.shape, header.spacing_mm, spacing_mm, strict=True)
    ):
        side = recipe.volume_shape[axis]
        places = scan_positions(old, side, new_mm / old_mm)
        result = _sampled(result, axis, places, side)
    return result.astype(np.float32)


def scan_positions(old: int, wanted: int, ratio: float) -> Array:
    """Return where each of the scan's `old` voxels along an axis lies among the `wanted` prepared ones, in their units.

    As `resample` has it: both grids share their centre, the middle is cropped, missing voxels are padded evenly.
    """
    if abs(ratio - 1) < 1e-4:
        ratio = 1.0
    whole = max(1, round(old / ratio))
    start = max(0, whole // 2 - wanted // 2)
    padding = (wanted - min(wanted, whole)) // 2
    return np.asarray((np.arange(old) - (old - 1) / 2) / ratio + (whole - 1) / 2 - start + padding)


def _sampled(values: Array, axis: int, places: Array, side: int) -> Array:
    inside = (places > -0.5) & (places < side - 0.5)
    at = places.clip(0, side - 1)
    low = np.minimum(np.floor(at).astype(np.int64), max(side - 2, 0))
    high = np.minimum(low + 1, side - 1)
    shape = [1, 1, 1]
    shape[axis] = len(places)
    share = (at - low).reshape(shape)
    mixed = values.take(low, axis=axis) * (1 - share) + values.take(high, axis=axis) * share
    return np.asarray(mixed * inside.reshape(shape))


def write_map(
    path: Path, map_RAS: Array, header: ScanHeader, source: Path, description: str
) -> None:
    """Write a map as .nii.gz with the grid of `source`: its shape, axes, affine, orientation codes and units.

    Values are stored as bytes with a scale: 0 to 1 in 255 steps. Texts of the source's header are left behind, they
    may name a person.
    """
    turned = apply_orientation(map_RAS, ornt_transform(RAS, header.orientation))
    fields = raw_header(source)
    kept = type(fields)()
    kept.set_data_shape(turned.shape)
    orientation = [f"quatern_{name}" for name in "bcd"] + [f"qoffset_{name}" for name in "xyz"]
    rows = [f"srow_{name}" for name in "xyz"]
    for name in ("qform_code", "sform_code", *orientation, *rows):
        kept[name] = fields[name]
    kept["pixdim"][:4] = fields["pixdim"][:4]
    kept["xyzt_units"] = int(fields["xyzt_units"]) & 7
    kept["descrip"] = description[:79].encode()
    kept.set_data_dtype(np.uint8)
    image_type = nib.Nifti2Image if isinstance(kept, nib.Nifti2Header) else nib.Nifti1Image
    image = image_type(turned, None, header=kept)
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


# The picture -----------------------------------------------------------------------------------------------------------


def write_slices(
    path: Path, voxels_RAS: Array, map_RAS: Array, spacing_mm: Sequence[float], caption: str
) -> None:
    """Write a PNG of three slices through the strongest voxel of the map, the map laid over the scan.

    Radiological view: the patient's right is on the left of axial and coronal slices; letters at the edges show this.
    Brightness of the overlay follows the map, so that it reads in greyscale too.
    """
    found = bool(map_RAS.max() > 0)
    point = (
        np.unravel_index(int(map_RAS.argmax()), map_RAS.shape)
        if found
        else [side // 2 for side in map_RAS.shape]
    )
    low, high = np.percentile(voxels_RAS, (1, 99))
    grey = ((voxels_RAS - low) / max(float(high - low), 1e-12)).clip(0, 1)
    panels = [
        _panel(grey, map_RAS, spacing_mm, name, axis, int(point[axis])) for name, axis in PLANES
    ]

    font = ImageFont.load_default(14)
    height = max(panel.height for panel in panels)
    picture = Image.new(
        "RGB", (sum(panel.width for panel in panels) + 10 * 4, height + 44), "black"
    )
    draw = ImageDraw.Draw(picture)
    left = 10
    for panel in panels:
        picture.paste(panel, (left, 10 + (height - panel.height) // 2))
        left += panel.width + 10
    text = caption if found else f"{caption}: nothing in this layer speaks for it"
    draw.text((10, height + 18), text, fill="white", font=font)
    draw.text(
        (picture.width - 10, height + 18),
        "not for diagnosis",
        fill="#999999",
        font=font,
        anchor="ra",
    )
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def _panel(
    grey: Array, map_RAS: Array, spacing_mm: Sequence[float], name: str, axis: int, index: int
) -> Image.Image:
    """One slice as a picture: up is anterior (axial) or superior, left is the patient's right, or anterior (sagittal)."""
    across, up = [other for other in range(3) if other != axis]
    slices = [np.flip(values.take(index, axis=axis).T, axis=(0, 1)) for values in (grey, map_RAS)]
    size_mm = (grey.shape[across] * spacing_mm[across], grey.shape[up] * spacing_mm[up])
    pixels = [max(1, round(PANEL * side / max(size_mm))) for side in size_mm]
    scan, seen = (
        np.asarray(
            Image.fromarray(part.astype(np.float32)).resize(
                (pixels[0], pixels[1]), Image.Resampling.BILINEAR
            )
        )
        for part in slices
    )
    # Black, red, yellow, white
    heat = np.stack([np.clip(3 * seen - part, 0, 1) for part in range(3)], axis=-1)
    mixed = (1 - 0.6 * seen[..., None]) * scan[..., None] + 0.6 * seen[..., None] * heat
    panel = Image.fromarray((255 * mixed.clip(0, 1)).astype(np.uint8), "RGB")
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default(14)
    edges = {0: ("A", "P", "S", "I"), 1: ("R", "L", "S", "I"), 2: ("R", "L", "A", "P")}[axis]
    middle, centre = panel.height / 2, panel.width / 2
    spots = (
        (3, middle, "lm"),
        (panel.width - 3, middle, "rm"),
        (centre, 2, "ma"),
        (centre, panel.height - 3, "md"),
    )
    for letter, (x, y, anchor) in zip(edges, spots, strict=True):
        draw.text(
            (x, y),
            letter,
            fill="white",
            font=font,
            anchor=anchor,
            stroke_width=1,
            stroke_fill="black",
        )
    draw.text((3, 2), name, fill="white", font=font, stroke_width=1, stroke_fill="black")
    return panel
