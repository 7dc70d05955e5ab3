"""How many trials share a GPU, and waiting for its memory."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from trainables.config import build_config
from trainables.data.manifest import read_manifest
from trainables.data.volumes import Recipe, prepare_cohort
from trainables.ray_trainable import wait_for_device_memory
from tune_app.driver.packing import Window, measure_together, pick_packing, total_throughput
from tune_app.synthetic import write_cohort

GIB = 2**30


@pytest.mark.parametrize(
    ("totals", "chosen"),
    [
        (
            {1: 240.0, 2: 484.0, 4: 618.0, 8: 720.0},
            8,
        ),  # facts, section 5: an eager GPU idles two thirds of the time
        ({1: 690.0, 2: 700.0}, 1),  # within 5 %: not worth slower trials
        ({1: 100.0, 2: 90.0}, 1),
        ({1: 100.0, 2: 103.0, 4: 110.0}, 4),
        ({1: 5.0}, 1),
    ],
)
def test_the_smallest_packing_that_none_clearly_beats(
    totals: dict[int, float], chosen: int
) -> None:
    assert pick_packing(totals) == chosen


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="no packing"):
        pick_packing({})


@pytest.fixture
def ray_cpus() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def window(began: float, ended: float) -> Window:
    return Window(began, ended, volumes=100, memory_gib=1.0, total_gib=80.0)


def test_probes_that_ran_one_after_another_are_no_faster_than_one() -> None:
    assert total_throughput([window(0, 2), window(2, 4)]) == total_throughput([window(0, 2)]) == 50
    assert total_throughput([window(0, 2), window(0, 2)]) == 100


@pytest.mark.ray
def test_no_probe_is_timed_before_all_have_warmed_up(tmp_path: Path, ray_cpus: None) -> None:
    table = write_cohort(tmp_path / "cohort", subjects=12, side=(14, 18))
    config = build_config(
        {
            "depth": 10,
            "width": 0.125,
            "volume_shape": 16,
            "batch_size": 4,
            "num_folds": 2,
            "train_auc_volumes": 0,
        }
    )
    cohort = prepare_cohort(
        read_manifest(table, num_classes=2), Recipe.from_config(config), tmp_path / "cache"
    )
    windows = measure_together(2, config, str(table), str(cohort), device="cpu")
    assert len(windows) == 2
    assert max(one.began for one in windows) < min(one.ended for one in windows)
    assert total_throughput(windows) > 0


def test_a_trial_waits_for_memory_that_is_about_to_be_freed() -> None:
    readings = iter([(10 * GIB, 140 * GIB), (20 * GIB, 140 * GIB), (60 * GIB, 140 * GIB)])
    wait_for_device_memory(0.5, timeout_s=0.5, memory=lambda: next(readings))
    assert next(readings, None) is None


def test_a_trial_gives_up_waiting_with_both_figures() -> None:
    with pytest.raises(
        MemoryError,
        match=re.escape("10.0 of 140.0 GiB of GPU memory are free, this trial's share is 0.5"),
    ):
        wait_for_device_memory(0.5, timeout_s=0.1, memory=lambda: (10 * GIB, 140 * GIB))


@pytest.mark.parametrize("held", [0, 70])
def test_what_the_last_trial_of_the_same_process_left_there_is_free(
    monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    """torch keeps the memory it was given, and the cohort stays on the GPU: nothing to wait for, and nobody else's."""
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: held * GIB)
    with (
        contextlib.nullcontext()
        if held
        else pytest.raises(MemoryError, match=re.escape("5.0 of 80.0 GiB"))
    ):
        wait_for_device_memory(1.0, timeout_s=0.1)
