"""What volumes are asked of themselves: turns, sizes, and which subjects are asked."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from trainables.data.scans import Recipe
from trainables.data.volumes import Cohort
from trainables.network.pretext import (
    SIZES,
    TENTHS,
    TURNS,
    PretextError,
    above_mean,
    held_out_split,
    part_of_subjects,
    pretext_cohort,
)

RECIPE = Recipe((6, 6, 6), None, "zscore", -1000.0, 400.0, 1)


def cohort_of(volumes: np.ndarray, subjects: list[str] | None = None) -> Cohort:
    count = len(volumes)
    names = subjects or [f"s{row:03d}" for row in range(count)]
    return Cohort(
        folder=Path(),
        volumes=volumes.astype(np.float16),  # type: ignore[arg-type]  # in memory is as good
        labels=np.arange(count) % 2,
        subjects=np.array(names),
        paths=tuple(f"{name}.nii" for name in names),
        spacings_mm=np.ones((count, 3)),
        recipe=RECIPE,
    )


def test_the_ten_turns_are_rotations_of_which_no_two_are_alike(tmp_path: Path) -> None:
    """Against SciPy's rotations of the voxels' coordinates: quarter turns, no mirror image among them."""
    rng = np.random.default_rng(0)
    made = pretext_cohort(
        cohort_of(rng.normal(size=(2, 1, 5, 5, 5))), np.array([1]), "rotation", tmp_path / "v.npy"
    )
    assert made.volumes.shape == (10, 1, 5, 5, 5)
    assert made.labels.tolist() == list(range(10))
    assert set(made.subjects) == {"s001"}
    coordinates = np.stack(np.meshgrid(*[np.arange(5) - 2] * 3, indexing="ij"), axis=-1).reshape(
        -1, 3
    )
    original = np.asarray(made.volumes[0, 0])
    wanted = {tuple(np.zeros(3, dtype=int))} | {
        tuple(angle * (np.arange(3) == axis)) for axis in range(3) for angle in (90, 180, 270)
    }
    found = set()
    for volume in np.asarray(made.volumes[:, 0]):
        for turn in wanted:
            moved = (
                np.rint(Rotation.from_euler("xyz", turn, degrees=True).apply(coordinates)).astype(
                    int
                )
                + 2
            )
            turned = np.empty_like(original)
            turned[tuple(moved.T)] = original.reshape(-1)
            if np.array_equal(turned, volume):
                found.add(turn)
    assert found == wanted
    assert len({volume.tobytes() for volume in np.asarray(made.volumes)}) == 10


def test_channels_turn_together(tmp_path: Path) -> None:
    volumes = np.random.default_rng(0).normal(size=(1, 2, 4, 4, 4))
    made = pretext_cohort(cohort_of(volumes), np.array([0]), "rotation", tmp_path / "v.npy")
    for volume, (axes, quarters) in zip(np.asarray(made.volumes), TURNS, strict=True):
        by_torch = torch.rot90(torch.from_numpy(volumes.astype(np.float16)[0]), quarters, axes)
        assert np.array_equal(volume, by_torch.numpy())


def test_sizes_are_groups_of_one_size_in_order(tmp_path: Path) -> None:
    filled = np.random.default_rng(0).permutation(np.arange(10, 10 + 3 * SIZES))
    volumes = np.zeros((len(filled), 1, 6, 6, 6))
    for row, count in enumerate(filled):
        volumes[row].reshape(-1)[:count] = 1
    rows = np.arange(len(filled))
    made = pretext_cohort(cohort_of(volumes), rows, "size", tmp_path / "v.npy")
    assert np.array_equal(np.asarray(made.volumes), volumes)
    assert np.bincount(made.labels).tolist() == [3] * SIZES
    assert np.array_equal(made.labels[filled.argsort()], np.repeat(np.arange(SIZES), 3))
    assert above_mean(volumes[0]) == filled[0] / 216


@pytest.mark.parametrize("tenths", [1, 5, 9])
def test_a_part_of_the_subjects_is_whole_subjects_of_all_classes(tenths: int) -> None:
    rng = np.random.default_rng(0)
    names = np.array([f"s{number:03d}" for number in range(100)])
    classes = (np.arange(100) % 4 == 0).astype(np.int64)
    places = np.repeat(np.arange(100), rng.integers(1, 4, size=100))
    labels, subjects = classes[places], names[places]
    chosen = part_of_subjects(labels, subjects, tenths)
    assert not set(subjects[chosen]) & set(subjects[~chosen])
    assert abs(len(set(subjects[chosen])) - 10 * tenths) <= 5
    assert labels[chosen].mean() == pytest.approx(labels.mean(), abs=0.1)
    order = rng.permutation(len(labels))
    assert np.array_equal(part_of_subjects(labels[order], subjects[order], tenths), chosen[order])


def test_all_of_the_subjects_may_be_one_and_parts_need_ten() -> None:
    one = np.array(["a", "a"])
    assert part_of_subjects(np.array([0, 1]), one, TENTHS).all()
    with pytest.raises(PretextError, match="1 training subjects: at least 10"):
        part_of_subjects(np.array([0, 1]), one, 5)
    with pytest.raises(PretextError, match="11 tenths"):
        part_of_subjects(np.array([0, 1]), one, 11)


@pytest.mark.filterwarnings("error")
def test_a_class_of_few_subjects_is_no_obstacle() -> None:
    labels = np.array([1] * 3 + [0] * 17)
    subjects = np.array([f"s{number}" for number in range(20)])
    assert part_of_subjects(labels, subjects, 5).sum() == 10


def test_the_subjects_held_out_are_not_trained_on(tmp_path: Path) -> None:
    volumes = np.random.default_rng(0).normal(size=(40, 1, 4, 4, 4))
    subjects = [f"s{row // 2:02d}" for row in range(40)]
    made = pretext_cohort(
        cohort_of(volumes, subjects), np.arange(40), "rotation", tmp_path / "v.npy"
    )
    split = held_out_split(made)
    assert not set(made.subjects[split.train]) & set(made.subjects[split.val])
    assert len(split.train) + len(split.val) == 400
    assert set(made.labels[split.val]) == set(range(10))
    assert len(set(made.subjects[split.val])) == 2


def test_volumes_that_do_not_do(tmp_path: Path) -> None:
    flat = cohort_of(np.random.default_rng(0).normal(size=(3, 1, 6, 6, 5)))
    with pytest.raises(
        PretextError, match=r"6 x 6 x 5 voxels: rotation needs cubes; set volume_shape"
    ):
        pretext_cohort(flat, np.arange(3), "rotation", tmp_path / "v.npy")
    with pytest.raises(PretextError, match=r"3 volumes: size needs 16"):
        pretext_cohort(flat, np.arange(3), "size", tmp_path / "v.npy")
