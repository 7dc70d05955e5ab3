"""The synthetic cohorts: untidy as real ones, and learnable."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

from trainables.config import build_config
from trainables.data.folds import split_rows
from trainables.data.manifest import read_manifest
from trainables.data.manifest_check import check_manifest
from trainables.data.scans import Recipe
from trainables.data.volumes import Cohort, CohortError, open_cohort, prepare_cohort
from tune_app.synthetic import write_cohort


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("synthetic") / "cohort")


@pytest.fixture(scope="module")
def cohort(table: Path) -> Cohort:
    recipe = Recipe.from_config(build_config({"volume_shape": 20}))
    return open_cohort(prepare_cohort(read_manifest(table), recipe, table.parents[1] / "cache"))


def flatness(volume: np.ndarray) -> float:
    """Second moment of the bright blob from feet to head over the other two: the feature that a network has to find."""
    smooth = gaussian_filter(volume.astype(np.float64), 1.5)
    bright = np.clip(smooth - np.quantile(smooth, 0.9), 0, None)
    points = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"))
    centre = (points * bright).sum(axis=(1, 2, 3)) / bright.sum()
    moments = ((points - centre[:, None, None, None]) ** 2 * bright).sum(axis=(1, 2, 3))
    return float(2 * moments[2] / (moments[0] + moments[1]))


def test_the_cohort_passes_the_deep_check_and_is_imbalanced(table: Path) -> None:
    report = check_manifest(table, 2, build_config({"volume_shape": 20, "num_folds": 3}))
    assert report.problems == []
    assert report.manifest is not None
    rows = report.manifest.rows
    of_subject = rows.groupby("subject")["label"]
    assert of_subject.nunique().max() == 1
    assert of_subject.first().value_counts().to_dict() == {0: 28, 1: 12}
    assert sorted(rows["subject"].value_counts().unique()) == [1, 2, 3]
    for fold in range(3):
        split_rows(report.manifest, fold=fold, num_folds=3, cross_validate=False)


def test_files_differ_in_shape_spacing_and_orientation_as_real_ones_do(table: Path) -> None:
    images = [nib.load(path) for path in read_manifest(table).rows["path"]]
    shapes = {image.shape for image in images}
    assert len(shapes) > 40
    assert {side for shape in shapes for side in shape} == set(range(20, 29))
    spacings = np.array([image.header.get_zooms() for image in images])
    assert spacings.min() < 0.85
    assert spacings.max() > 1.2
    assert {"".join(nib.aff2axcodes(image.affine)) for image in images} == {
        "RAS",
        "LAS",
        "LPS",
        "PIR",
    }
    assert {image.get_data_dtype() for image in images} == {np.dtype(np.int16)}
    assert all(image.dataobj.slope != 1 for image in images)


def test_the_shape_tells_the_classes_apart_and_the_amount_of_bright_voxels_does_not(
    cohort: Cohort,
) -> None:
    flat = [-flatness(volume[0]) for volume in cohort.volumes]
    assert roc_auc_score(cohort.labels, flat) > 0.93
    amount = [
        float((gaussian_filter(volume[0].astype(float), 1.5) > 1).sum())
        for volume in cohort.volumes
    ]
    assert 0.2 < roc_auc_score(cohort.labels, amount) < 0.8


def test_a_reader_that_ignores_the_orientation_loses_the_classes(cohort: Cohort) -> None:
    """So that the cohort would notice if the reader did."""
    blind = [-flatness(np.asarray(nib.load(path).dataobj)) for path in cohort.paths]
    flat = [-flatness(volume[0]) for volume in cohort.volumes]
    assert roc_auc_score(cohort.labels, blind) < roc_auc_score(cohort.labels, flat) - 0.05


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    tables = [
        write_cohort(tmp_path / name, subjects=4, seed=seed)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    contents = [
        {file.name: file.read_bytes() for file in table.parent.rglob("*.*")} for table in tables
    ]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_the_share_of_positives_and_the_sides_are_as_asked(tmp_path: Path) -> None:
    rows = read_manifest(
        write_cohort(tmp_path / "cohort", subjects=10, positive_share=0.5, side=(8, 9), noise=0.1)
    ).rows
    assert rows.groupby("subject")["label"].first().sum() == 5
    assert {side for path in rows["path"] for side in nib.load(path).shape} == {8, 9}


def test_a_folder_with_something_in_it_is_left_alone(table: Path) -> None:
    with pytest.raises(CohortError, match="exists and is not an empty folder"):
        write_cohort(table.parent)
    assert table.exists()
