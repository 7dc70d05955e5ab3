import math
import random
from collections.abc import Iterator
from typing import Any

import pytest

from trainables.objective import OBJECTIVES, BestEpoch, RunningValue, best_epoch, objective_value


def rows(*values: Any, column: str = "val_auc") -> list[dict[str, Any]]:
    return [{"epoch": epoch, column: value} for epoch, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("objective", "worth", "epoch"),
    [("best_median3", 0.8, 4), ("best", 0.95, 2), ("last", 0.7, 6), ("smoothed", 0.75, 5)],
)
def test_each_objective_reduces_the_same_run_in_its_own_way(
    objective: str, worth: float, epoch: int
) -> None:
    run = rows(0.6, 0.95, 0.7, 0.8, 0.8, 0.7)
    run[4]["val_auc"] = 0.75
    if objective == "best_median3":
        run[4]["val_auc"] = 0.85  # medians of three: .7 .8 .8 .8
    assert objective_value(run, objective) == worth
    assert best_epoch(run, objective) == epoch


def test_one_lucky_epoch_does_not_win_wherever_it_is() -> None:
    for lucky in range(8):
        run = [0.7] * 8
        run[lucky] = 0.99
        assert objective_value(rows(*run)) == 0.7


def test_a_lucky_first_epoch_is_forgotten_when_three_epochs_are_there() -> None:
    running = RunningValue("best_median3")
    assert [running.update(value) for value in (0.9, 0.6, 0.7, 0.65)] == [0.9, 0.6, 0.7, 0.7]


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf, "0.9"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_not_a_finite_number_is_never_a_score(
    objective: str, missing: float | str | None
) -> None:
    column = OBJECTIVES[objective].column
    assert math.isnan(
        objective_value(rows(missing, missing, missing, missing, column=column), objective)
    )
    assert best_epoch(rows(missing, missing, column=column), objective) is None
    value = objective_value(rows(0.5, 0.6, missing, 0.7, 0.7, 0.7, column=column), objective)
    assert value == 0.7


def test_a_last_epoch_that_is_not_finite_leaves_the_run_without_a_last_value() -> None:
    assert math.isnan(objective_value(rows(0.9, None), "last"))
    assert objective_value(rows(0.9, None), "best") == 0.9


def test_rows_need_no_order_and_a_run_needs_no_rows() -> None:
    run = rows(0.5, 0.6, 0.9, 0.8, 0.7)
    assert objective_value(run[::-1]) == objective_value(run) == 0.8
    assert best_epoch(run[::-1]) == best_epoch(run) == 4
    assert math.isnan(objective_value([]))


def test_a_column_that_is_not_there_gives_no_value_and_an_unknown_name_lists_the_known_ones() -> (
    None
):
    assert math.isnan(objective_value(rows(0.8, 0.9), "best_raw"))
    with pytest.raises(KeyError, match="best_median3"):
        objective_value(rows(0.8), "best_median")


def test_the_best_epoch_always_has_the_objectives_own_value() -> None:
    rng = random.Random(0)
    for _ in range(300):
        run = rows(*(rng.choice([None, round(rng.random(), 1)]) for _ in range(rng.randint(1, 12))))
        for objective in ("best_median3", "best", "last", "smoothed"):
            epoch = best_epoch(run, objective)
            value = objective_value(run, objective)
            assert (epoch is None) == math.isnan(value)
            if epoch is not None:
                assert run[epoch - 1]["val_auc"] == value


REDUCED = ("best_median3", "best", "last", "smoothed")


def random_runs(count: int, seed: int = 1) -> Iterator[list[dict[str, Any]]]:
    rng = random.Random(seed)
    for _ in range(count):
        yield rows(*(rng.choice([None, round(rng.random(), 1)]) for _ in range(rng.randint(1, 12))))


def epoch_by_search(run: list[dict[str, Any]], objective: str) -> int | None:
    """All windows of the whole run, as the objective's own description has it."""
    values = [-math.inf if row["val_auc"] is None else row["val_auc"] for row in run]
    worth = objective_value(run, objective)
    if math.isnan(worth):
        return None
    if objective == "last":
        return len(run)
    if objective == "best":
        return values.index(worth) + 1
    windows = [values[i : i + 3] for i in range(max(1, len(values) - 2))]
    if objective == "smoothed":
        windows = windows[-1:]
    start = max(1, len(values) - 2) - len(windows)
    for shift, window in enumerate(windows):
        if sorted(window)[(len(window) - 1) // 2] == worth:
            return start + shift + window.index(worth) + 1
    raise AssertionError(run)


@pytest.mark.parametrize("objective", REDUCED)
def test_the_best_epoch_found_row_by_row_is_that_of_the_whole_run(objective: str) -> None:
    for run in random_runs(300):
        best = BestEpoch(objective)
        for seen, row in enumerate(run, start=1):
            before = best.epoch
            changed = best.update(row)
            assert best.epoch == epoch_by_search(run[:seen], objective)
            assert changed == (best.epoch is not None and best.epoch != before)


@pytest.mark.parametrize("objective", REDUCED)
def test_weights_held_for_pending_epochs_are_all_that_the_best_epoch_needs(objective: str) -> None:
    held_without_need = 0
    for run in random_runs(300):
        best = BestEpoch(objective)
        held: set[int] = set()
        for row in run:
            if best.update(row):
                assert best.epoch in held | {row["epoch"]}
            assert len(best.pending) <= 2
            assert set(best.pending) <= held | {row["epoch"]}
            held = set(best.pending)
            held_without_need += len(held)
    assert (held_without_need == 0) == (objective in ("best", "last"))


def test_an_epoch_below_the_best_median_is_not_held() -> None:
    best = BestEpoch()
    for row in rows(0.8, 0.8, 0.8, 0.7, 0.9):
        best.update(row)
    assert best.epoch == 1
    assert best.pending == (5,)


def test_the_window_s_end_is_the_rule_of_earlier_versions() -> None:
    best = BestEpoch(window_end=True)
    kept = []
    for row in rows(0.9, 0.5, 0.6, 0.7, 0.65, 0.72):
        best.update(row)
        kept.append(best.epoch)
    assert kept == [1, 1, 3, 3, 5, 6]
    assert best.pending == ()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_of_the_raw_network_keeps_raw_weights(name: str) -> None:
    assert OBJECTIVES[name].weights == ("raw" if name.endswith("_raw") else "ema")
