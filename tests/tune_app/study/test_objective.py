import math
import random

import pytest

from tune_app.study.objective import OBJECTIVES, RunningValue, best_epoch, objective_value


def rows(*values, column="val_auc"):
    return [{"epoch": epoch, column: value} for epoch, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("objective", "worth", "epoch"),
    [("best_median3", 0.8, 4), ("best", 0.95, 2), ("last", 0.7, 6), ("smoothed", 0.75, 5)],
)
def test_each_objective_reduces_the_same_run_in_its_own_way(objective, worth, epoch):
    run = rows(0.6, 0.95, 0.7, 0.8, 0.8, 0.7)
    run[4]["val_auc"] = 0.75
    if objective == "best_median3":
        run[4]["val_auc"] = 0.85  # medians of three: .7 .8 .8 .8
    assert objective_value(run, objective) == worth
    assert best_epoch(run, objective) == epoch


def test_one_lucky_epoch_does_not_win_wherever_it_is():
    for lucky in range(8):
        run = [0.7] * 8
        run[lucky] = 0.99
        assert objective_value(rows(*run)) == 0.7


def test_a_lucky_first_epoch_is_forgotten_when_three_epochs_are_there():
    running = RunningValue("best_median3")
    assert [running.update(value) for value in (0.9, 0.6, 0.7, 0.65)] == [0.9, 0.6, 0.7, 0.7]


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf, "0.9"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_not_a_finite_number_is_never_a_score(objective, missing):
    column = OBJECTIVES[objective].column
    assert math.isnan(
        objective_value(rows(missing, missing, missing, missing, column=column), objective)
    )
    assert best_epoch(rows(missing, missing, column=column), objective) is None
    value = objective_value(rows(0.5, 0.6, missing, 0.7, 0.7, 0.7, column=column), objective)
    assert value == 0.7


def test_a_last_epoch_that_is_not_finite_leaves_the_run_without_a_last_value():
    assert math.isnan(objective_value(rows(0.9, None), "last"))
    assert objective_value(rows(0.9, None), "best") == 0.9


def test_rows_need_no_order_and_a_run_needs_no_rows():
    run = rows(0.5, 0.6, 0.9, 0.8, 0.7)
    assert objective_value(run[::-1]) == objective_value(run) == 0.8
    assert best_epoch(run[::-1]) == best_epoch(run) == 4
    assert math.isnan(objective_value([]))


def test_a_column_that_is_not_there_gives_no_value_and_an_unknown_name_lists_the_known_ones():
    assert math.isnan(objective_value(rows(0.8, 0.9), "best_raw"))
    with pytest.raises(KeyError, match="best_median3"):
        objective_value(rows(0.8), "best_median")


def test_the_best_epoch_always_has_the_objectives_own_value():
    rng = random.Random(0)
    for _ in range(300):
        run = rows(*(rng.choice([None, round(rng.random(), 1)]) for _ in range(rng.randint(1, 12))))
        for objective in ("best_median3", "best", "last", "smoothed"):
            epoch = best_epoch(run, objective)
            value = objective_value(run, objective)
            assert (epoch is None) == math.isnan(value)
            if epoch is not None:
                assert run[epoch - 1]["val_auc"] == value
