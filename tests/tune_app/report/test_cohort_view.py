"""The page of prepared volumes: odd ones first, every name escaped, nothing from a network."""

import base64
import io
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from trainables.config import build_config
from trainables.data.manifest import read_manifest
from tune_app.cli.app import app
from tune_app.report.cohort_view import flatness, write_cohort_view
from tune_app.study.spec import build_spec, read_study_file


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Eight scans of 16 voxels; row 3 is small, row 6 large, row 5 (class 0) has a flat histogram."""
    rng = np.random.default_rng(0)
    lines = ["path,label,subject,class"]
    for row in range(1, 9):
        side = {3: 10, 6: 24}.get(row, 16)
        shape = (side, side, side)
        voxels = rng.uniform(100, 200, size=shape) if row == 5 else rng.exponential(20, size=shape)
        name = "<b>five</b>.nii" if row == 5 else f"scan{row}.nii"
        nib.save(
            nib.Nifti1Image(voxels.astype(np.float32), np.diag([1.0, 1.0, 1.0, 1.0])),
            tmp_path / name.replace("/", "_"),
        )
        label = (row + 1) % 2
        lines.append(f"{name.replace('/', '_')},{label},s{row},{['round & well', 'flat'][label]}")
    path = tmp_path / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def articles(text: str) -> list[tuple[int, list[str]]]:
    found = re.findall(r"<article.*?</article>", text, flags=re.DOTALL)
    return [
        (int(re.findall(r"row (\d+)", one)[0]), re.findall(r'class="why">(.*?)<', one))
        for one in found
    ]


def test_odd_volumes_come_first_in_their_class_with_the_reason(table: Path, tmp_path: Path) -> None:
    config = build_config({"volume_shape": 20, "spacing_mm": 1.0})
    path = tmp_path / "view.html"
    write_cohort_view(read_manifest(table), config, path, per_class=3, class_names=("a & b", "c"))
    text = path.read_text()
    shown = articles(text)
    assert len(shown) == 6, "three of each class"
    why = dict(shown)
    assert why[5]
    assert "flattest histogram" in why[5][0]
    assert "smallest" in why[3][0]
    assert "largest" in why[6][0]
    assert "most cropped" in why[6][0]
    assert "cropped to 83%" in text
    for of_class in (shown[:3], shown[3:]):
        odd = [bool(reason) for _, reason in of_class]
        assert odd == sorted(odd, reverse=True)


def test_names_are_escaped_and_the_page_needs_no_network(table: Path, tmp_path: Path) -> None:
    path = tmp_path / "view.html"
    write_cohort_view(
        read_manifest(table), build_config({"volume_shape": 16}), path, class_names=("a & b", "<i>")
    )
    text = path.read_text()
    assert "<b>five" not in text
    assert "&lt;b&gt;five" in text
    assert "0: a &amp; b" in text
    assert "<i>" not in text
    assert "http:" not in text
    assert "https:" not in text
    assert "<script" not in text


def test_the_pictures_are_the_middle_of_the_prepared_volume(table: Path, tmp_path: Path) -> None:
    """A bright corner plane at the patient's left, back and feet: on the right and at the bottom of every picture."""
    voxels = np.random.default_rng(0).normal(0, 1, size=(16, 16, 16)).astype(np.float32)
    voxels[0], voxels[:, 0], voxels[:, :, 0] = 50, 50, 50
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), table.parent / "scan1.nii")
    path = tmp_path / "view.html"
    write_cohort_view(
        read_manifest(table), build_config({"volume_shape": 16, "spacing_mm": 1.0}), path
    )
    first = next(
        one
        for one in re.findall(r"<article.*?</article>", path.read_text(), flags=re.DOTALL)
        if "row 1," in one
    )
    pictures = re.findall(r"base64,([^\"]+)", first)
    assert len(pictures) == 3
    for data in pictures:
        grey = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert grey.shape == (16, 16)
        assert grey[-1].min() == grey[:, -1].min() == 255
        assert grey[:-1, :-1].mean() < 60


def test_a_uniform_histogram_is_flatter_than_a_peaked_one() -> None:
    rng = np.random.default_rng(0)
    flat, peaked = (
        flatness(rng.uniform(size=(20, 20, 20))),
        flatness(rng.exponential(size=(20, 20, 20))),
    )
    assert peaked < flat <= 1
    assert flat > 0.99
    assert flatness(np.ones((4, 4, 4))) == 0


def test_the_command_writes_the_page_and_names_each_setting(table: Path) -> None:
    done = CliRunner().invoke(app, ["data", "view", str(table)])
    assert done.exit_code == 0, done.output
    assert table.with_suffix(".html").is_file()
    for name in ("volume_shape", "spacing_mm", "intensity"):
        assert f"recommended {name}: " in done.stdout


def test_init_writes_what_suits_the_table_and_the_file_is_a_study(
    table: Path, tmp_path: Path
) -> None:
    path = tmp_path / "study.yaml"
    done = CliRunner().invoke(app, ["init", str(path), "--data", "table.csv"])
    assert done.exit_code == 0, done.output
    spec = build_spec(read_study_file(path))
    assert spec.config["volume_shape"] == [24, 24, 24]
    assert spec.config["spacing_mm"] == 1.0
    assert "# Recommended: " in path.read_text()


@pytest.mark.parametrize(
    ("options", "kept"),
    [(["--preset", "laptop"], {"spacing_mm", "intensity"}), (["--space", "preprocessing"], set())],
)
def test_a_preset_and_a_space_go_before_what_is_recommended(
    table: Path, tmp_path: Path, options: list[str], kept: set[str]
) -> None:
    path = tmp_path / "study.yaml"
    done = CliRunner().invoke(app, ["init", str(path), "--data", "table.csv", *options])
    assert done.exit_code == 0, done.output
    advised = {
        one
        for one in ("volume_shape", "spacing_mm", "intensity")
        if f"recommended {one}:" in done.stderr
    }
    assert advised == kept
