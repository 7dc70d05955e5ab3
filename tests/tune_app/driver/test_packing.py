"""How many trials share a GPU, and waiting for its memory."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from trainables.config import build_config
from trainables.data.manifest import read_manifest
from trainables.data.scans import Recipe
from trainables.data.volumes import prepare_cohort
from trainables.ray_trainable import wait_for_device_memory
from tune_app.driver import packing
from tune_app.driver.packing import (
    Memory,
    Packing,
    Window,
    measure_packing,
    most_of_use,
    most_that_fit,
    packing_for,
    pick_packing,
    total_throughput,
)
from tune_app.study.heaviest import heaviest
from tune_app.study.spec import build_spec
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
    return Window(began, ended, volumes=100)


def test_probes_that_ran_one_after_another_are_no_faster_than_one() -> None:
    assert total_throughput([window(0, 2), window(2, 4)]) == total_throughput([window(0, 2)]) == 50
    assert total_throughput([window(0, 2), window(0, 2)]) == 100


@pytest.mark.parametrize(
    ("taken", "free", "fit"),
    [
        (2.0, 138.0, 8),  # an H200
        (10.0, 14.0, 2),  # 24 GiB: a second one takes 10 of 12.6 GiB
        (10.0, 11.0, 1),  # 9.9 GiB are not enough for another
        (70.0, 0.0, 1),
    ],
)
def test_no_more_trials_are_tried_than_memory_holds(taken: float, free: float, fit: int) -> None:
    assert most_that_fit(Memory(taken, free), 8) == fit


@pytest.mark.parametrize(
    ("fields", "resources", "most"),
    [
        ({"trials": 40}, {"CPU": 16, "GPU": 1}, 8),
        ({"trials": 40}, {"CPU": 16, "GPU": 4}, 4),  # 16 CPUs for four GPUs
        ({"trials": 40, "cpus_per_rank": 4}, {"CPU": 16, "GPU": 1}, 4),
        ({"trials": 3}, {"CPU": 16, "GPU": 2}, 2),
        ({"trials": 40, "max_concurrent": 1}, {"CPU": 16, "GPU": 1}, 1),
        ({"trials": 1}, {"CPU": 16, "GPU": 1}, 1),
    ],
)
def test_no_more_trials_are_tried_than_the_study_can_have(
    fields: dict[str, Any], resources: dict[str, float], most: int
) -> None:
    assert most_of_use(build_spec({"data": "t.csv", **fields}), resources) == most


def test_the_largest_batch_of_a_study_is_what_is_measured() -> None:
    searched = {"search": {"batch_size": {"low": 4, "high": 24}, "depth": [18, 50, 34]}}
    spec = build_spec({"data": "t.csv", "space": searched, "config": {"volume_shape": 64}})
    found = heaviest(spec)
    assert (found.batch_size, found.depth, found.volume_shape) == (24, 50, (64, 64, 64))
    fixed = {"base": "documented", "fixed": {"depth": 10}}
    assert heaviest(build_spec({"data": "t.csv", "space": fixed})).depth == 10
    planned = [{"variant": "a", "overrides": {"batch_size": 12}}]
    spec = build_spec({"data": "t.csv", "kind": "ablation", "planned": planned})
    assert heaviest(spec).batch_size == 12


def test_what_was_measured_is_remembered_for_the_same_kind_of_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def measured(config: Any, table: str, cohort: str, **how: Any) -> dict[int, float]:
        calls.append(config.batch_size)
        return {1: 100.0, 2: 190.0, 4: 192.0}

    monkeypatch.setattr(packing, "measure_packing", measured)
    resources = {"CPU": 16.0, "GPU": 1.0, "accelerator_type:H200": 1.0}

    def asked(**fields: Any) -> Packing:
        spec = build_spec({"data": "t.csv", "trials": 40, **fields})
        return packing_for(spec, "t.csv", Path("cohort-1"), resources, tmp_path / "cache")

    first = asked()
    assert first.number == 2
    assert "2 at once 190" in first.text
    assert "measured in" in first.text
    again = asked(config={"backbone_lr": 1e-3, "seed": 5})
    assert (again.number, again.totals) == (2, first.totals)
    assert "remembered from" in again.text
    assert len(calls) == 1
    asked(config={"batch_size": 7})
    asked(mps="off")
    assert calls == [6, 7, 6]
    (tmp_path / "cache" / "packing.json").write_text("{")
    assert asked().number == 2
    assert len(calls) == 4


@pytest.mark.ray
def test_probes_train_together(tmp_path: Path, ray_cpus: None) -> None:
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
    totals = measure_packing(config, str(table), str(cohort), most=2, device="cpu")
    assert set(totals) == {1, 2}
    assert min(totals.values()) > 0


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
    """torch keeps the memory it was given, and the cohort stays on the GPU: nothing to wait for, none of it is foreign."""
    import torch

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: held * GIB)
    with (
        contextlib.nullcontext()
        if held
        else pytest.raises(MemoryError, match=re.escape("5.0 of 80.0 GiB"))
    ):
        wait_for_device_memory(1.0, timeout_s=0.1)
