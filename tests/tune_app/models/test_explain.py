"""Maps are MONAI's Grad-CAM, and lie where the network looked, in the space of the file."""

import gzip
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.visualize import GradCAM
from PIL import Image
from torch import Tensor, nn

from trainables.config import build_config
from trainables.data.scans import Recipe, prepare_scan, read_header, read_scan
from trainables.network.model import Classifier, build_network
from tune_app.models.explain import (
    Explainer,
    cells,
    explain,
    grad_cam,
    to_scan_grid,
    write_map,
    write_slices,
)
from tune_app.models.model import Source, load_model
from tune_app.models.predict import find_scans, predict, run_predict


class LogOdds(nn.Module):
    """What `grad_cam` explains, as a network whose outputs are the log-odds of each class."""

    def __init__(self, network: Classifier, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, volumes: Tensor) -> Tensor:
        z = self.scale * self.network(volumes)
        others = [
            torch.cat([z[:, :c], z[:, c + 1 :]], dim=1).logsumexp(dim=1) for c in range(z.shape[1])
        ]
        margins: torch.Tensor = z - torch.stack(others, dim=1)
        return margins


@pytest.mark.parametrize("layer", ["layer4", "layer2"])
@pytest.mark.parametrize(
    ("head", "classes", "target"), [("cosine", 2, 1), ("linear", 2, 0), ("linear", 3, 2)]
)
def test_the_map_is_monais_grad_cam_of_the_log_odds(
    head: str, classes: int, target: int, layer: str
) -> None:
    torch.manual_seed(0)
    network = build_network(
        depth=10,
        width=0.125,
        geometry="dilated",
        head=head,
        num_classes=classes,
        in_channels=1,
        dropout=0.3,
    ).eval()
    volume = torch.randn(1, 24, 20, 28)
    oracle = GradCAM(
        nn_module=LogOdds(deepcopy(network), 4.0),
        target_layers=f"network.backbone.{layer}",
        postprocessing=lambda x: x,
    )
    expected = oracle(volume[None], class_idx=target)[0, 0].detach()
    found = grad_cam(network, volume, target, layer=layer, scale=4.0)
    assert float(expected.max()) > 0
    torch.testing.assert_close(found, expected)


def test_explaining_leaves_the_network_as_it_was() -> None:
    network = build_network(
        depth=10,
        width=0.125,
        geometry="strided",
        head="cosine",
        num_classes=2,
        in_channels=1,
        dropout=0.0,
    )
    network.eval().requires_grad_(False)
    volume = torch.randn(1, 16, 16, 16)
    before = network(volume[None])
    grad_cam(network, volume, 1)
    torch.testing.assert_close(network(volume[None]), before)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network.backbone.layer4._forward_hooks


@pytest.mark.parametrize("geometry", ["strided", "dilated"])
@pytest.mark.parametrize("layer", ["layer4", "layer3", "layer2", "layer1"])
def test_cells_are_those_the_layer_has(geometry: str, layer: str) -> None:
    network = build_network(
        depth=10,
        width=0.125,
        geometry=geometry,
        head="cosine",
        num_classes=2,
        in_channels=1,
        dropout=0.0,
    )
    seen: list[Tensor] = []
    getattr(network.backbone, layer).register_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    shape = (33, 48, 20)
    network.eval()(torch.zeros(1, 1, *shape))
    assert cells(network, shape, layer) == seen[0].shape[2:]


RECIPES: dict[str, dict[str, Any]] = {
    "whole, isotropic": {"volume_shape": 20},
    "finer, cropped": {"volume_shape": 16, "spacing_mm": 0.7},
    "coarser, padded": {"volume_shape": "24,20,16", "spacing_mm": 1.9},
    "as stored": {"volume_shape": "11,30,20", "spacing_mm": "1.5,0.8,1.0"},
}


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "ASL"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_volume_sent_through_and_back_lies_where_it_was(
    write_scan: Callable[..., Path], recipe: str, axes: str
) -> None:
    """Ramps along each axis come back as themselves: a shift of a fifth of a voxel would show."""
    fields = RECIPES[recipe] | {"intensity": "window", "window_low": -1.0, "window_high": 40.0}
    made = Recipe.from_config(build_config(fields))
    in_RAS = {"x": 1.5, "y": 0.8, "z": 1.0}
    order = ["xyz"["LRPAIS".index(letter) // 2] for letter in axes]
    sides = {"x": 18, "y": 27, "z": 22}
    for ramp in "xyz":
        scan = write_scan(
            f"{recipe}-{axes}-{ramp}.nii.gz",
            np.zeros([sides[name] for name in order]) + _ramp(order.index(ramp), sides[ramp]),
            spacing=tuple(in_RAS[name] for name in order),
            axes=axes,
            dtype=np.float32,
        )
        header = read_header(scan)
        assert header.shape == (18, 27, 22)
        back = to_scan_grid(
            (prepare_scan(read_scan(scan), made, scan)[0] + 1) / 2 * 41 - 1, header, made
        )
        truth = read_scan(scan).voxels[0]
        spacing = (
            made.spacing_mm
            or (max(np.multiply(header.shape, header.spacing_mm) / made.volume_shape),) * 3
        )
        # Two new voxels from each border, uncropped ones only: there a widened triangle bends a ramp by less than a tenth of a voxel.
        kept = [
            min(int(made.volume_shape[a] * spacing[a] / mm), side)
            for a, (mm, side) in enumerate(zip(header.spacing_mm, header.shape, strict=True))
        ]
        margins = [
            (side - keep) // 2 + int(np.ceil(2 * spacing[a] / header.spacing_mm[a])) + 1
            for a, (side, keep) in enumerate(zip(header.shape, kept, strict=True))
        ]
        inner = tuple(
            slice(margin, side - margin) for margin, side in zip(margins, header.shape, strict=True)
        )
        assert back[inner].size > 0
        np.testing.assert_allclose(back[inner], truth[inner], atol=0.1)


def _ramp(axis: int, side: int) -> np.ndarray:
    shape = [1, 1, 1]
    shape[axis] = side
    return np.arange(side, dtype=np.float64).reshape(shape)


def test_what_was_cropped_away_has_no_evidence(write_scan: Callable[..., Path]) -> None:
    scan = write_scan(voxels=(30, 20, 20))
    recipe = Recipe.from_config(build_config({"volume_shape": 20, "spacing_mm": 1.0}))
    back = to_scan_grid(np.ones((20, 20, 20)), read_header(scan), recipe)
    assert back.shape == (30, 20, 20)
    assert back[5:25].min() == 1
    assert back[:5].max() == back[25:].max() == 0


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR"])
def test_the_map_file_has_the_grid_of_its_scan(
    write_scan: Callable[..., Path], tmp_path: Path, axes: str, kind: Any
) -> None:
    scan = write_scan(voxels=(9, 12, 10), spacing=(1.5, 0.8, 1.1), axes=axes, kind=kind)
    image = nib.load(scan)
    affine = image.affine @ np.diag([1, 1, 1, 1.0])
    affine[:3, 3] = (-40.0, 17.5, 3.25)
    image.set_sform(affine, 1)
    image.set_qform(affine, 4)
    image.header["descrip"] = b"Doe^Jane 1970-01-01"
    image.header["aux_file"] = b"/home/doe"
    nib.save(image, scan)
    header = read_header(scan)
    map_RAS = np.zeros(header.shape, dtype=np.float32)
    map_RAS[2, 3, 1] = 1.0
    out = tmp_path / "map.nii.gz"
    write_map(out, map_RAS, header, scan, "Grad-CAM layer4 class 1")
    written, original = nib.load(out), nib.load(scan)
    assert written.shape == original.shape
    assert type(written) is type(original)
    np.testing.assert_array_equal(written.affine, original.affine)
    for name in ("sform_code", "qform_code", "xyzt_units"):
        assert written.header[name] == original.header[name]
    np.testing.assert_array_equal(written.get_qform(), original.get_qform())
    canonical = nib.as_closest_canonical(written).get_fdata()
    assert np.unravel_index(canonical.argmax(), canonical.shape) == (2, 3, 1)
    assert canonical.max() == pytest.approx(1, abs=1e-6)
    assert b"Doe" not in gzip.decompress(out.read_bytes())
    assert b"/home" not in gzip.decompress(out.read_bytes())


def test_the_picture_shows_the_patients_right_on_the_left(tmp_path: Path) -> None:
    voxels = np.zeros((20, 20, 20))
    voxels[14:18, 12:16, 2:5] = 1.0  # right, anterior, feet
    spot = np.zeros((20, 20, 20), dtype=np.float32)
    spot[16, 14, 3] = 1.0
    write_slices(tmp_path / "slices.png", voxels, spot, (1.0, 1.0, 1.0), "evidence for class 1")
    pixels = np.asarray(Image.open(tmp_path / "slices.png").convert("RGB")).astype(int)
    assert pixels.shape == (344, 940, 3)
    redness = pixels[10:310, :, 0] - pixels[10:310, :, 2]
    axial, coronal, sagittal = (redness[:, left : left + 300] for left in (10, 320, 630))
    for panel, (row, column) in ((axial, (75, 45)), (coronal, (245, 45)), (sagittal, (245, 75))):
        found = np.unravel_index(panel.argmax(), panel.shape)
        assert np.hypot(found[0] - row, found[1] - column) < 25


def test_anisotropic_voxels_are_drawn_in_proportion(tmp_path: Path) -> None:
    empty = np.zeros((40, 40, 10), dtype=np.float32)
    write_slices(tmp_path / "a.png", empty, empty, (1.0, 1.0, 2.0), "nothing")
    width, height = Image.open(tmp_path / "a.png").size
    assert (width, height) == (3 * 300 + 40, 300 + 44), (
        "20 mm high slices are half as high, and are centred"
    )


def test_an_ensembles_map_is_the_mean_of_its_members(
    exported_ensemble: Path, trained_study: Path
) -> None:
    model = load_model(exported_ensemble)
    (found,) = predict(model, find_scans([trained_study.parent / "cohort"], 2)[:1])
    assert found.scored is not None
    volume = found.scored.volume_CDHW
    maps = []
    for network, member in zip(model.networks, model.info.members, strict=True):
        one = grad_cam(
            network, torch.from_numpy(volume).float(), 1, layer="layer1", scale=member.scale
        ).numpy()
        maps.append(one / max(one.max(), 1e-30))
    mean = np.mean(maps, axis=0)
    np.testing.assert_allclose(
        explain(model, volume, 1, layer="layer1"), mean / mean.max(), atol=1e-5
    )


def test_explanations_are_written_for_every_scored_file(
    exported_model: Path, trained_study: Path, write_scan: Callable[..., Path], tmp_path: Path
) -> None:
    first = write_scan("one/scan.nii.gz", voxels=(16, 17, 18), axes="LPS", seed=1)
    second = write_scan("two/scan.nii.gz", voxels=(15, 17, 16), seed=2)
    bad = write_scan("two/thick.nii.gz", voxels=(9, 9, 9), spacing=(1.0, 1.0, 9.0))
    said: list[str] = []
    out, maps = tmp_path / "scores.csv", tmp_path / "maps"
    code = run_predict(
        exported_model,
        [first, second, bad],
        out,
        device="cpu",
        batch_size=2,
        explain=maps,
        explain_layer="layer4",
        say=said.append,
    )
    assert code == 1
    assert any("layer4 has a single cell" in line and "layer2 is used" in line for line in said)
    assert any(
        "layer2 has 2x2x2 cells" in line and "; --explain-layer layer1 has 4x4x4" in line
        for line in said
    )
    assert {path.name for path in maps.iterdir()} == {
        "scan_cam.nii.gz",
        "scan_cam.png",
        "scan-2_cam.nii.gz",
        "scan-2_cam.png",
    }
    rows = pd.read_csv(out)
    assert rows["explanation"].notna().tolist() == [True, True, False]
    for scan, path in ((first, rows["explanation"][0]), (second, rows["explanation"][1])):
        np.testing.assert_allclose(nib.load(path).affine, nib.load(scan).affine)
        assert nib.load(path).shape == nib.load(scan).shape


def test_a_map_that_cannot_be_written_costs_no_score(
    exported_model: Path, trained_study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tune_app.models.explain.write_map", full)
    scan = find_scans([trained_study.parent / "cohort"], 2)[0]
    out = tmp_path / "scores.csv"
    code = run_predict(
        exported_model,
        [Path(scan.path)],
        out,
        device="cpu",
        batch_size=2,
        explain=tmp_path / "maps",
        explain_layer="layer1",
        say=lambda text: None,
    )
    rows = pd.read_csv(out)
    assert code == 1
    assert rows["score_1"].notna().all()
    assert "scored, but not explained" in rows["problem"][0]


def test_names_are_never_taken_twice(exported_model: Path, tmp_path: Path) -> None:
    explainer = Explainer(load_model(exported_model), tmp_path / "maps")
    sources = [Source(f"{folder}/scan.nii{end}") for folder in "abc" for end in ("", ".gz")]
    names = [explainer._free_name(Path(source.path)) for source in sources]
    assert len(set(names)) == 6
