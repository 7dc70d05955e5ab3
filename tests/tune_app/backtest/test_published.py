"""Searches of other packages on a pool: their own code where it is installed, and what they are given everywhere."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from typer.testing import CliRunner

from search_spaces.space import Parameter, Space
from search_spaces.spaces import SPACES, warm_start_points
from tune_app.backtest import published
from tune_app.backtest.published import (
    PUBLISHED,
    Nearest,
    PriorBand,
    default_sample,
    entries_to_replay,
    seeded,
)
from tune_app.backtest.strategies import (
    ENTRIES,
    Entry,
    Seen,
    Strategy,
    compare,
    simulate,
)
from tune_app.backtest.tables import Fit, Table, objective_by_epoch
from tune_app.cli.app import app

EPOCHS = 9
NOT_INSTALLED = "its package is not installed: see tune_app.backtest.published.INSTALL"


@pytest.fixture(scope="module")
def pool() -> Table:
    """200 configurations: the AUC falls with the distance of `max_m` from .3, `dropout` does nothing."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 1, (2, 200))
    growth = 1 - np.exp(-np.arange(1, EPOCHS + 1) / 2)
    truth = 0.5 + (0.4 - 0.4 * np.abs(x - 0.3))[:, None] * growth
    auc = truth + rng.normal(0, 0.005, truth.shape)
    value, deployed = objective_by_epoch(auc)
    samples = tuple({"max_m": float(a), "dropout": float(b)} for a, b in zip(x, y, strict=True))
    rows: list[list[dict[str, Any]]] = [
        [{"epoch": epoch, "val_auc": float(one)} for epoch, one in enumerate(curve, 1)]
        for curve in auc
    ]
    return Table(
        name="made",
        cohort="made",
        trials=tuple(map(str, range(200))),
        origins=("random",) * 200,
        samples=samples,
        configs=tuple(dict(sample) for sample in samples),
        rows=tuple(rows),
        auc=auc,
        value=value,
        hold=truth,
        truth=np.take_along_axis(truth, deployed, axis=1),
        seconds=np.ones_like(auc),
        deployed=deployed,
        fit=Fit(truth=0.9, value=0.9, importance=(1.0, 0.0)),
    )


def test_a_proposal_is_run_at_the_free_configuration_that_is_nearest_in_what_matters(
    pool: Table,
) -> None:
    seen, nearest = Seen(pool, np.random.default_rng(0)), Nearest(pool)
    x = np.array([sample["max_m"] for sample in pool.samples])
    order = np.argsort(np.abs(x - 0.6))
    for expected in order[:3]:
        found = nearest({"max_m": 0.6, "dropout": 0.9}, seen)
        assert found == expected
        seen.state[found] = "running"
    seen.state[:] = "stopped"
    assert nearest({"max_m": 0.6, "dropout": 0.9}, seen) is None


@pytest.mark.parametrize("name", ["documented", "wide"])
def test_the_prior_lies_at_the_defaults(name: str) -> None:
    found = default_sample(SPACES[name])
    assert found == warm_start_points(SPACES[name], 60, ["defaults"]).points["defaults"]


def test_a_default_out_of_range_lies_at_its_end() -> None:
    rates = Parameter("backbone_lr", FloatDistribution(2e-4, 5e-4, log=True))
    loss = Parameter("loss", CategoricalDistribution(("focal", "cross_entropy")))
    space = Space("own", "", {"backbone_lr": rates, "loss": loss})
    assert default_sample(space) == {"backbone_lr": 2e-4}  # and no prior over losses


def test_the_generators_of_the_process_are_left_as_they_were() -> None:
    import torch

    before = np.random.get_state(legacy=False), torch.random.get_rng_state().clone()
    drawn = []
    for _ in range(2):
        with seeded(np.random.default_rng(4)):
            drawn.append((np.random.rand(), float(torch.rand(1))))
    assert drawn[0] == drawn[1]
    after = np.random.get_state(legacy=False), torch.random.get_rng_state()
    np.testing.assert_equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_a_strategy_whose_package_is_missing_is_left_out_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = dataclasses.replace(PUBLISHED[1], package="no_such_package")
    monkeypatch.setattr(published, "PUBLISHED", (absent,))
    said: list[str] = []
    found = entries_to_replay(["PriorBand", "medtune"], on_pools=True, say=said.append)
    assert [entry.name for entry in found] == ["random", "medtune"]
    assert len(said) == 1
    assert said[0].startswith("PriorBand left out (No module named 'no_such_package'): pip install")


def test_on_recorded_tables_they_are_left_out(pool: Table) -> None:
    recorded = dataclasses.replace(pool, fit=None)
    entries = [ENTRIES[0], *PUBLISHED]
    result = compare([recorded], entries, replays=1, resamples=0, most=3)
    assert set(result["strategy"]) == {"random"}
    assert set(result["budget"]) == {3}


def test_the_command_states_that_they_need_a_surrogate(tmp_path: Path) -> None:
    command = f"bench strategies {tmp_path / 'none.parquet'} --only PriorBand"
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code != 0
    assert "PriorBand left out: no recorded table has the points it proposes" in done.output
    assert "add --surrogate 2000" in done.output


@pytest.fixture(params=PUBLISHED, ids=lambda entry: entry.name)
def installed(request: pytest.FixtureRequest) -> Entry:
    entry = request.param
    assert isinstance(entry, Entry)
    pytest.importorskip(entry.package, reason=NOT_INSTALLED, exc_type=ImportError)
    return entry


def test_it_is_reproducible_and_blind_to_the_truth(installed: Entry, pool: Table) -> None:
    hidden = dataclasses.replace(pool, truth=pool.truth[::-1], hold=pool.hold[::-1])
    done = []
    for table in (pool, pool, hidden):
        factory, views = installed.make(table, None), []

        def spied(view: Seen, budget: float) -> Strategy:
            views.append(view)  # noqa: B023
            return factory(view, budget)  # noqa: B023

        simulate(table, spied, [3], 5)
        done.append(views[0].done)
    assert done[0].sum() == 3 * EPOCHS
    np.testing.assert_array_equal(done[0], done[1])
    np.testing.assert_array_equal(done[0], done[2])


def test_it_learns_which_parameter_decides(installed: Entry, pool: Table) -> None:
    """The configurations that it starts in the second half of a search lie closer to the best value than random ones."""
    apart = np.array([abs(float(sample["max_m"]) - 0.3) for sample in pool.samples])
    late: list[float] = []
    for seed in range(2):
        started: list[int] = []
        factory = installed.make(pool, None)

        def spied(view: Seen, budget: float, started: list[int] = started) -> Strategy:
            search = factory(view, budget)  # noqa: B023
            following = search.following

            def noted() -> int | None:
                trial = following()
                if trial is not None and view.done[trial] == 0:
                    started.append(trial)
                return trial

            search.following = noted  # type: ignore[method-assign]
            return search

        simulate(pool, spied, [8], seed)
        late += [apart[trial] for trial in started[len(started) // 2 :]]
    assert len(late) > 15
    assert np.mean(late) < 0.8 * apart.mean()


def test_priorband_resumes_the_run_that_it_promotes(pool: Table) -> None:
    entry = next(entry for entry in PUBLISHED if entry.name == "PriorBand")
    pytest.importorskip(entry.package, reason=NOT_INSTALLED, exc_type=ImportError)
    searches: list[PriorBand] = []

    def spied(view: Seen, budget: float) -> Strategy:
        search = entry.make(pool, None)(view, budget)
        assert isinstance(search, PriorBand)
        searches.append(search)
        return search

    simulate(pool, spied, [12], 1, workers=2)
    search = searches[0]
    rungs = {1, 3, EPOCHS}
    assert set(search.seen.done[search.seen.among("paused", "completed")]) <= rungs
    promoted = [t for t in search._neps.trials.values() if t.metadata.previous_trial_id]
    assert len(promoted) > 3
    for trial in promoted:
        assert search._trials[trial.id] == search._trials[trial.metadata.previous_trial_id]
    told = [trial for trial in search._neps.trials.values() if trial.report]
    for trial in told:
        run, epochs = search._trials[trial.id], trial.config["epochs"]
        assert trial.report.objective_to_minimize == pytest.approx(1 - pool.value[run, epochs - 1])
