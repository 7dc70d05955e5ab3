"""How long a study will take, reported before its first epoch."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Self

import pytest

from trainables.config import build_config
from tune_app.driver import forecast
from tune_app.driver.forecast import Forecast, forecast_on_cpus, measure_pass
from tune_app.driver.time_budget import TimeBudget
from tune_app.study.duration import span, study_s
from tune_app.study.policy import Policy
from tune_app.study.policy_spec import POLICIES
from tune_app.study.spec import build_spec
from tune_app.synthetic import write_cohort


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort") / "c", subjects=10, side=(10, 12))


def test_the_epoch_counts_what_is_trained_and_what_is_scored(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 s per volume in training, .5 s in scoring; raw and averaged weights are validated, 3 training volumes scored."""

    class Process:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, *_: object) -> Self:
            return self

        def result(self) -> forecast.Pass:
            return forecast.Pass(train_s=2.0, score_s=0.5, fixed_gib=1.0, volume_gib=0.25)

    monkeypatch.setattr(forecast, "ProcessPoolExecutor", Process)
    monkeypatch.setattr(forecast, "WORTH_MEASURING", 0)
    config = {
        "volume_shape": 8,
        "epochs": 6,
        "train_auc_volumes": 3,
        "batch_size": 4,
        "num_folds": 2,
    }
    spec = build_spec({"data": str(table), "trials": 5, "config": config})
    split = forecast.split_in(spec, build_config(spec.shared))
    found = forecast_on_cpus(spec, concurrent=2, epochs=3.0)
    assert found is not None
    assert found.epoch_s == 2 * len(split.train) + 0.5 * (2 * len(split.val) + 3)
    assert found.trial_gib == 2.0
    assert found.study_s == 3 * 3.0 * found.epoch_s, "three rounds of two trials"


def test_a_small_study_is_not_measured(table: Path) -> None:
    config = {"volume_shape": 8, "epochs": 2, "num_folds": 2}
    spec = build_spec({"data": str(table), "trials": 2, "config": config})
    assert forecast_on_cpus(spec, concurrent=2, epochs=2.0) is None


def measured_alone(side: int) -> forecast.Pass:
    config = build_config({"depth": 10, "width": 0.25, "volume_shape": side})
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_pass, config, 1).result()


def test_a_pass_is_measured_and_larger_volumes_take_longer_and_more_memory() -> None:
    """Each in a new process, as in a study: the peak of this one's memory lies behind it."""
    small, large = map(measured_alone, (8, 64))
    assert 0 < small.train_s < large.train_s
    assert small.score_s < large.score_s
    assert large.volume_gib > 0


@pytest.mark.parametrize(
    ("hours", "on_cpus", "warned"), [(0.5, True, False), (5, True, True), (5, False, False)]
)
def test_a_long_search_on_cpus_names_settings_that_fit_a_laptop(
    hours: float, on_cpus: bool, warned: bool
) -> None:
    lines = Forecast(90.0, 1.5, hours * 3600, 12, on_cpus).lines()
    assert lines[0].startswith(
        "forecast: about 90 s per epoch, 1.5 GiB of memory per trial; 12 trials end about "
    )
    assert any("--preset laptop" in line and "volume_shape=32" in line for line in lines) == warned


def test_rounds_and_spans() -> None:
    assert study_s(trials=5, epochs=4, epoch_s=10, concurrent=2) == 120
    assert [span(seconds) for seconds in (42, 300, 7200, 400_000)] == [
        "42 s",
        "5 min",
        "2 h",
        "4.63 days",
    ]


def test_the_first_epochs_say_how_long_a_search_without_a_time_takes() -> None:
    """8 trials, 4 at a time, 6 s per epoch. Three run 30 epochs before a rung judges, five 10 + 20 / 3: 173 in all."""
    spec = build_spec({"data": "/t.csv", "config": {"epochs": 30}, "trials": 8})
    plan = TimeBudget(spec, Policy(POLICIES["medtune"], 30), 4, 0)
    told = [plan.measured({"epoch": epoch, "epoch_s": 6.0}) for epoch in (1, 2, 3, 4, 5)]
    assert [text is not None for text in told] == [False, False, False, True, False]
    assert told[3] == (
        "an epoch takes 6 s: 8 trials take about 4.3 min in all, of which 173 of 240 epochs are expected to run"
    )
