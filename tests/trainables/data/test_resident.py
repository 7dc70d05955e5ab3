"""Tests for the cohort that stays on a device from one trial of a process to the next."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainables.config import build_config
from trainables.data import resident
from trainables.data.manifest import read_manifest
from trainables.data.resident import Volumes, rows_on_device
from trainables.data.scans import Recipe
from trainables.data.volumes import Cohort, open_cohort, prepare_cohort
from tune_app.synthetic import write_cohort

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    resident._kept.clear()
    yield
    resident._kept.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cohort")
    manifest = read_manifest(write_cohort(place / "scans", subjects=6, side=(10, 12)))
    return prepare_cohort(
        manifest, Recipe.from_config(build_config({"volume_shape": 8})), place / "prepared"
    )


def test_the_next_trial_finds_the_rows_on_the_device(folder: Path) -> None:
    rows = np.array([0, 2, 3])
    first = rows_on_device(open_cohort(folder), rows, CPU)
    assert first is not None
    cohort = open_cohort(folder)
    np.testing.assert_array_equal(first.volumes.numpy(), cohort.volumes[rows])
    np.testing.assert_array_equal(first.labels.numpy(), cohort.labels[rows])
    assert rows_on_device(cohort, rows, CPU) is first


def test_other_rows_labels_or_devices_are_put_there_anew_and_the_old_ones_go(folder: Path) -> None:
    cohort = open_cohort(folder)
    rows = np.array([0, 1])
    first = rows_on_device(cohort, rows, CPU)
    other = rows_on_device(cohort, np.array([1, 2]), CPU)
    assert other is not first
    assert len(resident._kept) == 1
    assert rows_on_device(cohort, rows, CPU) is not first
    relabelled = dataclasses.replace(cohort, labels=1 - np.asarray(cohort.labels))
    changed = rows_on_device(relabelled, rows, CPU)
    assert changed is not None
    np.testing.assert_array_equal(changed.labels.numpy(), relabelled.labels[rows])
    meta = rows_on_device(cohort, rows, torch.device("meta"))
    assert meta is not None
    assert meta.volumes.device.type == "meta"


def test_a_cohort_that_was_written_again_is_read_again(folder: Path) -> None:
    rows = np.array([0, 1])
    first = rows_on_device(open_cohort(folder), rows, CPU)
    file = folder / "volumes.npy"
    content = np.load(file) + np.float16(1)
    kept = file.stat()
    np.save(folder / "new.npy", content)
    (folder / "new.npy").replace(file)
    os.utime(file, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # the same size and time
    again = rows_on_device(open_cohort(folder), rows, CPU)
    assert again is not first
    assert again is not None
    np.testing.assert_array_equal(again.volumes.numpy(), content[rows])


def test_volumes_in_memory_are_never_taken_for_others() -> None:
    def cohort(value: float) -> Cohort:
        volumes: Any = np.full((3, 1, 8, 8, 8), value, dtype=np.float16)
        recipe = Recipe.from_config(build_config({"volume_shape": 8}))
        return Cohort(
            Path(),
            volumes,
            np.zeros(3, np.int64),
            np.array(list("abc")),
            tuple("abc"),
            np.ones((3, 3)),
            recipe,
        )

    for value in (1.0, 2.0):
        found = rows_on_device(cohort(value), np.array([0, 2]), CPU)
        assert found is not None
        assert (found.volumes == value).all()
    assert not resident._kept


def test_batches_are_the_cohorts_rows_in_the_order_asked_for(folder: Path) -> None:
    cohort = open_cohort(folder)
    volumes = Volumes(cohort, np.arange(4), CPU)
    assert volumes.resident is None  # a CPU has them in the page cache
    asked = np.array([3, 0, 2])
    np.testing.assert_array_equal(
        volumes.batch(asked).numpy(), cohort.volumes[asked].astype(np.float32)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: a CPU keeps nothing")
def test_two_trials_on_a_gpu_share_one_copy(folder: Path) -> None:
    device = torch.device("cuda")
    cohort = open_cohort(folder)
    first = Volumes(cohort, np.array([3, 0, 2]), device)
    second = Volumes(open_cohort(folder), np.array([0, 2, 3]), device)
    assert first.resident is second.resident is not None
    asked = np.array([3, 0])
    np.testing.assert_array_equal(
        second.batch(asked).cpu().numpy(), cohort.volumes[asked].astype(np.float32)
    )
