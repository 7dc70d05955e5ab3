"""The benchmark: it runs on a CPU, prints its measurements, and its arithmetic is right."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_rel
from torch import Tensor

from trainables import step as step_module
from trainables.augment import augment_batch
from trainables.config import build_config
from tune_app.bench import efficiency as bench_efficiency_module
from tune_app.bench.efficiency import bench_efficiency, efficiency_table, gain_lines
from tune_app.bench.overhead import bench_overhead, overhead_table
from tune_app.bench.ranks import bench_ranks, ranks_table
from tune_app.bench.results import bench_results, results_line, results_table_of
from tune_app.bench.search import bench_search, gpus_watched, search_table, slots
from tune_app.bench.start import RUNS, bench_start, start_table
from tune_app.bench.storage import bench_storage, storage_table
from tune_app.bench.train import (
    BenchError,
    bench_data,
    bench_train,
    data_table,
    forward_flop,
    markdown_table,
    parse_batches,
    result_table,
)
from tune_app.results.loading import load_study
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.rows import read_record, read_rows
from tune_app.synthetic import write_cohort


def test_plain_and_ours_are_measured_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[bool] = []
    augments: dict[str, bool] = {}

    def watched(volumes: Tensor, **how: Any) -> Tensor:
        augmented = augment_batch(volumes, **how)
        changed.append(not torch.equal(augmented, volumes))
        return augmented

    def look(result: dict[str, Any]) -> None:
        augments[result["rows"][-1]["variant"]] = any(changed)
        changed.clear()

    monkeypatch.setattr(step_module, "augment_batch", watched)
    result = bench_train(
        sizes=[16], geometries=["strided"], batches=[(2, 2)], device="cpu", depth=10, width=0.125, steps=2,
        variants=("plain", "plain_augmented", "unaugmented", "ours"), record=look,
    )  # fmt: skip
    plain, augmented, unaugmented, ours = result["rows"]
    assert [row["variant"] for row in result["rows"]] == [
        "plain",
        "plain_augmented",
        "unaugmented",
        "ours",
    ]
    assert augments == {
        "plain": False,
        "plain_augmented": False,
        "unaugmented": False,
        "ours": True,
    }
    assert unaugmented["speedup"] > 0
    assert augmented["volumes_per_s"] > 0
    assert plain["speedup"] == 1.0
    assert ours["speedup"] == pytest.approx(ours["volumes_per_s"] / plain["volumes_per_s"])
    assert ours["ms_per_step"] == pytest.approx(4000 / ours["volumes_per_s"])
    json.dumps(result, allow_nan=False)
    assert markdown_table(result).count("\n") == 5
    assert result_table(result).row_count == 4


def test_ways_of_reading_a_cohort_are_measured(tmp_path: Path) -> None:
    result = bench_data(size=12, subjects=3, folder=tmp_path)
    ways = [row["way"] for row in result["rows"]]
    assert ways == ["decode", "persistent_first", "persistent_again", "prepare", "prepared"]
    assert all(row["volumes_per_s"] > 0 for row in result["rows"])
    assert data_table(result).row_count == 5


def test_one_run_over_more_ranks_is_measured() -> None:
    result = bench_ranks(
        sizes=[16], worlds=[1, 2], batch=(2, 1), device="cpu", depth=10, width=0.125, steps=2
    )
    one, two = result["rows"]
    assert (one["ranks"], two["ranks"], one["efficiency"]) == (1, 2, 1.0)
    assert two["efficiency"] == pytest.approx(two["volumes_per_s"] / one["volumes_per_s"] / 2)
    assert two["ms_per_step"] == pytest.approx(4000 / two["volumes_per_s"])
    json.dumps(result, allow_nan=False)
    assert ranks_table(result).row_count == 2


def test_slots_tell_what_lies_between_trials() -> None:
    """Two slots: a trains from 0 to 10 and b from 1 to 5; c follows b after 2 s, d follows a after 3 s, in epochs of 2 s."""
    spans = {"a": (0, 10), "b": (1, 5), "c": (7, 11), "d": (13, 15)}
    rows = [
        {"trial": trial, "time": float(end), "epoch_s": 2.0}
        for trial, (begin, last) in spans.items()
        for end in range(begin + 2, last + 1, 2)
    ]
    found = slots(pd.DataFrame(rows).sort_values("time"))
    assert found == {"at_once": 2, "training_share": pytest.approx(20 / 30), "between_s": 2.5}
    assert slots(pd.DataFrame(rows[:5])) == {"at_once": 1, "training_share": 1.0, "between_s": None}


def test_gpus_are_watched_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with gpus_watched() as none:
        pass
    assert none == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 100; echo '[N/A]'; echo 50; exec /bin/sleep 60\n")
    program.chmod(0o755)
    with gpus_watched() as shares:
        time.sleep(0.5)
    assert shares == [1.0, 0.5]
    program.write_text(
        '#!/bin/sh\ncase "$*" in *--id=1) echo 25;; *) echo 100; echo 25;; esac; exec /bin/sleep 60\n'
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with gpus_watched() as own:
        time.sleep(0.5)
    assert own == [0.25], "the other GPU is not this search's"


def test_the_start_of_a_trial_is_measured_in_a_new_process_and_in_one_that_has_trained() -> None:
    result = bench_start(
        volumes=[3, 4], size=16, batch=(2, 1), device="cpu", at_once=2, depth=10, width=0.125
    )
    rows = result["rows"]
    assert [(row["volumes"], row["run"]) for row in rows] == [
        (n, run) for n in (3, 4) for run in RUNS
    ]
    for row in rows:
        assert (row["load_s"] > 0) == (row["run"] == "new process")
        assert row["cost_s"] == pytest.approx(
            row["load_s"] + row["set_up_s"] + row["first_epoch_s"] - row["later_epoch_s"]
        )
    json.dumps(result, allow_nan=False)
    assert start_table(result).row_count == 6
    with pytest.raises(BenchError, match="1 or more of each"):
        bench_start(volumes=[], device="cpu")


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_is_measured_on_both_sides(tmp_path: Path) -> None:
    """Two epochs, a rung after the first: at least one trial of each side sees both, none sees more."""
    table = write_cohort(tmp_path / "c", subjects=12, side=(14, 18))
    settings = {
        "depth": 10,
        "width": 0.125,
        "volume_shape": 16,
        "num_folds": 2,
        "train_auc_volumes": 0,
    }
    kept: list[int] = []
    result = bench_search(
        table, tmp_path / "work", trials=3, epochs=2, grace_epochs=1, reduction_factor=2, config=settings, gpu=False,
        record=lambda so_far: kept.append(len((so_far["plain"] or {"runs": ()})["runs"])),
    )  # fmt: skip
    for side in ("plain", "medtune"):
        assert (result[side]["ended"], len(result[side]["runs"])) == (3, 3)
        assert {len(run) for run in result[side]["runs"]} <= {1, 2}
        assert max(len(run) for run in result[side]["runs"]) == 2
        assert result[side]["trials_per_hour"] == pytest.approx(3 * 3600 / result[side]["seconds"])
    assert result["medtune"]["at_once"] >= 1
    assert 0 < result["medtune"]["training_share"] <= 1
    assert 0 < result["medtune"]["start_s"] < result["medtune"]["seconds"]
    assert result["ratio"] == pytest.approx(
        result["plain"]["seconds"] / result["medtune"]["seconds"]
    )
    assert kept[:3] == [1, 2, 3], "a result after each trial of the slower side"
    json.dumps(result, allow_nan=False)
    assert search_table(result).row_count == 2


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)  # three searches and a confirmation
def test_what_the_same_time_buys_is_judged_by_runs_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bench_efficiency_module, "MANY", 2
    )  # the studies end by that, long before their time is over
    table = write_cohort(tmp_path / "c", subjects=12, side=(14, 18))
    settings = {
        "depth": 10, "width": 0.125, "volume_shape": 16, "num_folds": 2, "train_auc_volumes": 0, "cross_validate": True,
    }  # fmt: skip
    kept: list[int] = []
    result = bench_efficiency(
        table, tmp_path / "work", seconds=200, repetitions=1, at_once=1, epochs=1, config=settings, max_concurrent=1,
        record=lambda so_far: kept.append(len(so_far["searches"])),
    )  # fmt: skip
    assert [search["side"] for search in result["searches"]] == ["random", "plain", "medtune"]
    assert kept == [1, 2, 3, 3], "a result after each search, and the whole"
    for search in result["searches"]:
        assert (search["trials"], search["epochs"], len(search["confirmed"])) == (2, 2, 2)
        assert search["seconds"] < 200
        assert 0 <= search["claimed"] <= 1
        assert {"max_m", "s", "ema_decay"} <= set(search["overrides"])
    assert len(result["documented"]) == 2, "one run on each fold"
    confirming = load_study(next((tmp_path / "work").glob("sitting-*/confirm")))
    assert set(confirming.trials_full["seed"]) == {1000}
    assert set(confirming.trials_full["variant"]) == {
        "documented",
        "random-0",
        "plain-0",
        "medtune-0",
    }
    json.dumps(result, allow_nan=False)
    assert efficiency_table(result).row_count == 4


def test_a_search_is_stopped_when_its_time_is_over(tmp_path: Path) -> None:
    log = tmp_path / "log"
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert 1 <= bench_efficiency_module._until(1.0, sleeping, log) < 30
    with pytest.raises(SpecError, match="the search ended with 3 before its time was over: see"):
        bench_efficiency_module._until(60.0, [sys.executable, "-c", "raise SystemExit(3)"], log)


def test_repetitions_are_shared_out_over_the_visible_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sides of a repetition see the same one GPU; those of repetitions after the others' begin when these have ended."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    seen: list[tuple[str, int, str]] = []

    def found(environment: dict[str, str], side: str, repetition: int) -> dict[str, Any]:
        seen.append((side, repetition, environment["CUDA_VISIBLE_DEVICES"]))
        return {"seconds": 1.0, "trials": 1, "epochs": 1, "claimed": 0.5, "overrides": {}}

    module = bench_efficiency_module
    monkeypatch.setattr(
        module,
        "_study",
        lambda side, c, p, s, number, environment, prior: found(environment, side, number),
    )
    monkeypatch.setattr(
        module, "_plain", lambda c, p, s, number, environment: found(environment, "plain", number)
    )
    monkeypatch.setattr(module, "_confirm", lambda *_: None)
    table = write_cohort(tmp_path / "c", subjects=12, side=(14, 18))
    settings = {"volume_shape": 16, "num_folds": 2}
    result = bench_efficiency(
        table,
        tmp_path / "work",
        seconds=1,
        repetitions=4,
        at_once=3,
        config=settings,
        sides=["plain", "medtune"],
    )
    assert sorted(seen[:6]) == [
        ("medtune", 0, "4"), ("medtune", 1, "6"), ("medtune", 2, "4"),
        ("plain", 0, "4"), ("plain", 1, "6"), ("plain", 2, "4"),
    ]  # fmt: skip
    assert sorted(seen[6:]) == [("medtune", 3, "6"), ("plain", 3, "6")]
    order = [(search["repetition"], search["side"]) for search in result["searches"]]
    assert order == [(number, side) for number in range(4) for side in ("plain", "medtune")]


def test_a_comparison_goes_on_where_an_earlier_sitting_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that failed is made again, one that was not confirmed is confirmed, and no other is."""
    searched: list[tuple[str, int]] = []
    confirmed: list[str] = []

    def found(side: str, number: int) -> dict[str, Any]:
        searched.append((side, number))
        if (side, number) == ("plain", 1) and searched.count(("plain", 1)) == 1:
            raise SpecError("plain Ray Tune ended with 1")
        return {"seconds": 1.0, "trials": 1, "epochs": 1, "claimed": 0.5, "overrides": {}}

    def confirm(result: dict[str, Any], *_: Any) -> None:
        for search in result["searches"]:
            if not search["confirmed"]:
                confirmed.append(f"{search['side']}-{search['repetition']}")
                better = 0.02 if search["side"] == "medtune" else 0.0
                search["confirmed"] = [0.8 + better + 0.01 * search["repetition"] * (better > 0)]

    module = bench_efficiency_module
    monkeypatch.setattr(module, "_study", lambda side, c, p, s, number, *_: found(side, number))
    monkeypatch.setattr(module, "_plain", lambda c, p, s, number, e: found("plain", number))
    monkeypatch.setattr(module, "_confirm", confirm)
    table = write_cohort(tmp_path / "c", subjects=12, side=(14, 18))
    kept: list[dict[str, Any]] = []

    def sitting(**changed: Any) -> dict[str, Any]:
        asked: dict[str, Any] = {
            "seconds": 1, "repetitions": 2, "sides": ["plain", "medtune"],
            "config": {"volume_shape": 16, "num_folds": 2},
        }  # fmt: skip
        earlier = json.loads(json.dumps(kept[-1])) if kept else None
        return bench_efficiency(
            table, tmp_path / "work", earlier=earlier, record=kept.append, **asked | changed
        )

    with pytest.raises(SpecError, match="plain Ray Tune ended with 1"):
        sitting(folds="")
    assert searched == [("plain", 0), ("medtune", 0), ("plain", 1), ("medtune", 1)]
    result = sitting(folds="")
    assert searched[4:] == [("plain", 1), ("medtune", 1)]
    assert (result["paired"], confirmed) == ([], [])
    result = sitting(repetitions=3)
    assert searched[6:] == [("plain", 2), ("medtune", 2)]
    assert sorted(confirmed) == [f"{s}-{n}" for s in ("medtune", "plain") for n in range(3)]
    (gain,) = result["paired"]
    wanted = ttest_rel([0.82, 0.83, 0.84], [0.8, 0.8, 0.8]).confidence_interval()
    assert (gain["over"], gain["pairs"], gain["won"]) == ("plain", 3, 1.0)
    assert (gain["mean"], gain["low"], gain["high"]) == pytest.approx((0.03, *wanted))
    assert gain_lines(result) == [
        "medtune over plain: +30 thousandths [+5, +55] in 3 pairs, 100% won"
    ]
    with pytest.raises(SpecError, match=r"of another comparison:[\s\S]*seconds 1, here 2"):
        sitting(seconds=2)


def test_a_side_is_known_or_the_search_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="sides fast: there are plain, medtune"):
        bench_search(tmp_path / "t.csv", tmp_path, config={}, sides=["fast"])
    with pytest.raises(SpecError, match="sides fast: there are random, plain, medtune"):
        bench_efficiency(tmp_path / "t.csv", tmp_path, seconds=1, config={}, sides=["fast"])


@pytest.mark.ray
@pytest.mark.slow
def test_what_a_trial_costs_is_measured_on_both_sides_of_one_ray(tmp_path: Path) -> None:
    told: list[str] = []
    result = bench_overhead(
        trials=4, epochs=2, turns=2, folder=tmp_path, concurrent=1, say=told.append
    )
    assert (result["trials"], result["epochs"], result["concurrent"], len(result["turns"])) == (
        4,
        2,
        1,
        2,
    )
    for turn in result["turns"]:
        assert all(
            0 < turn[side]["cpu_s"] < turn[side]["wall_s"]
            for side in ("medtune", "bare", "stripped")
        )
    shipped, stripped = (
        {p.suffix for p in (tmp_path / side).rglob("*") if p.is_file()}
        for side in ("bare", "stripped")
    )
    assert ".csv" in shipped - stripped, (
        "Ray's loggers are on where it runs as it comes, and nowhere else"
    )
    assert result["stripped_ratio"] == pytest.approx(
        result["medtune"]["wall_s"] / result["stripped"]["wall_s"]
    )
    assert result["ratio"] == pytest.approx(result["medtune"]["wall_s"] / result["bare"]["wall_s"])
    assert len(told) == 3
    json.dumps(result, allow_nan=False)
    assert overhead_table(result).row_count == 4
    files = StudyFiles(tmp_path / "study")
    records = [read_record(path) for path in sorted(files.trials.glob("*/trial.json"))]
    assert [record["state"] for record in records] == ["completed"] * 5, (
        "one to warm up, two a turn"
    )
    assert len(read_rows(files.epochs)) == 10


def test_the_arithmetic_of_resnet_50_is_the_documented_one() -> None:
    flop = forward_flop(build_config({"volume_shape": 96}))
    assert flop / 1e9 == pytest.approx(34.2, abs=0.05)


def test_batches_are_read_from_text_and_nonsense_is_told() -> None:
    assert parse_batches("6x2, 24") == [(6, 2), (24, 1)]
    with pytest.raises(BenchError, match=r"batch 'six'"):
        parse_batches("six")


def test_reading_a_study_is_measured(tmp_path: Path) -> None:
    result = bench_results(trials=6, epochs=24, folder=tmp_path)
    assert (result["trials"], result["epochs"]) == (6, 144)
    assert [row["step"] for row in result["rows"]] == [
        "import",
        "load",
        "leaderboard",
        "importance",
        "report",
    ]
    assert all(row["peak_mib"] > 10 and row["seconds"] >= 0 for row in result["rows"])
    assert results_table_of(result).row_count == 5
    assert "6 trials, 144 epochs" in results_line(result)


def test_storages_are_timed_on_the_same_trials(tmp_path: Path) -> None:
    result = bench_storage(trials=2, epochs=3, turns=2, folder=tmp_path, say=lambda text: None)
    assert {side: len(result[side]) for side in ("medtune", "rdb", "journal")} == dict.fromkeys(
        ("medtune", "rdb", "journal"), 2
    )
    assert storage_table(result).row_count == 3
    ours = optuna.load_study(study_name="medtune", storage=f"sqlite:///{tmp_path / 'medtune-0'}")
    theirs = optuna.load_study(study_name="bench", storage=f"sqlite:///{tmp_path / 'rdb-1'}")
    for one, other in zip(ours.trials, theirs.trials, strict=True):
        assert (one.params, one.intermediate_values, one.value, one.state, one.user_attrs) == (
            other.params, other.intermediate_values, other.value, other.state, other.user_attrs
        )  # fmt: skip
