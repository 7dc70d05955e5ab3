"""Pools of configurations whose curves come from a surrogate: against scikit-learn's own trees, and exact residuals."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata
from sklearn.ensemble import ExtraTreesRegressor
from typer.testing import CliRunner

from tune_app.backtest.strategies import (
    ENTRIES,
    NO_STOPS,
    RandomSearch,
    Seen,
    Strategy,
    compare,
    medtune,
    simulate,
    strategies_text,
)
from tune_app.backtest.surrogate_curves import CurveSurrogate, covered_space, encoded
from tune_app.backtest.tables import (
    Table,
    learn_prior,
    objective_by_epoch,
    read_table,
    supports_claims,
)
from tune_app.cli.app import app
from tune_app.study.surrogate import CANDIDATES, logit

EPOCHS = 6


def write(path: Path, trials: int = 60, noise: float = 0.005, seed: int = 0) -> Path:
    """A table in which the rate decides, and a cross-entropy loss costs .03."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(trials):
        rate = float(np.exp(rng.uniform(np.log(2e-5), np.log(5e-4))))
        loss = "ldam" if rng.random() < 0.7 else "cross_entropy"
        margin = {"sample.max_m": float(rng.uniform(0.1, 0.5))} if loss == "ldam" else {}
        level = 0.9 - 0.08 * abs(math.log(rate / 2e-4)) - 0.03 * (loss != "ldam")
        luck = rng.normal(0, noise)
        for epoch in range(1, EPOCHS + 1):
            truth = 0.5 + (level - 0.5) * (1 - math.exp(-epoch)) + luck
            rows.append(
                {
                    "trial": f"{number:05d}",
                    "origin": "random" if number else "after",
                    "epoch": epoch,
                    "val_auc": truth + rng.normal(0, noise),
                    "val_auc_raw": truth,
                    "hold_auc": truth,
                    "epoch_s": 1.0 + 0.1 * (number % 3),
                    "config.epochs": EPOCHS,
                    "config.head": "cosine",
                    "sample.backbone_lr": rate,
                    "sample.loss": loss,
                    **margin,
                }
            )
    pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return read_table(write(tmp_path_factory.mktemp("tables") / "one_table.parquet"))


@pytest.fixture(scope="module")
def surrogate(table: Table) -> CurveSurrogate:
    return CurveSurrogate(table, trees=100)


@pytest.fixture(scope="module")
def pool(surrogate: CurveSurrogate) -> Table:
    return surrogate.pool(300)


def test_the_fit_is_that_of_trees_that_have_not_seen_the_run(
    table: Table, surrogate: CurveSurrogate
) -> None:
    forest = ExtraTreesRegressor(100, bootstrap=True, random_state=0)
    points = encoded(table.axes, table.samples)
    forest.fit(points, logit(np.concatenate([table.auc, table.hold], axis=1)))
    expected = np.empty_like(surrogate.out_of_bag)
    for run in range(table.size):
        unseen = [
            tree.predict(points[[run]])[0]
            for tree, drawn in zip(forest.estimators_, forest.estimators_samples_, strict=True)
            if run not in drawn
        ]
        assert 10 < len(unseen) < 70
        expected[run] = np.mean(unseen, axis=0)
    np.testing.assert_allclose(surrogate.out_of_bag, expected, atol=1e-9)
    value, deployed = objective_by_epoch(expected[:, :EPOCHS])
    truth = expected[np.arange(table.size), EPOCHS + deployed[:, -1]]
    for found, predicted, recorded in (
        (surrogate.fit.truth, truth, table.truth[:, -1]),
        (surrogate.fit.value, value[:, -1], table.value[:, -1]),
    ):
        ranks = np.corrcoef(rankdata(predicted), rankdata(recorded))
        assert found == pytest.approx(ranks[0, 1])
    assert supports_claims(surrogate.fit.truth, surrogate.fit.value)


def test_a_pool_has_the_ranges_of_its_table_and_nothing_that_is_not_read(
    table: Table, pool: Table
) -> None:
    assert (pool.size, pool.epochs, pool.cohort) == (301, EPOCHS, "one")
    assert pool.samples[0] == table.samples[0]
    assert pool.origins == ("after", *["random"] * 300)
    rates = [sample["backbone_lr"] for sample in pool.samples]
    recorded = [sample["backbone_lr"] for sample in table.samples[1:]]
    assert min(recorded) <= min(rates[1:]) <= max(rates[1:]) <= max(recorded)
    middle = math.sqrt(min(recorded) * max(recorded))
    assert 0.4 < np.mean(np.array(rates) < middle) < 0.6  # on a logarithmic scale
    for sample, config in zip(pool.samples, pool.configs, strict=True):
        assert ("max_m" in sample) == (sample["loss"] == "ldam")
        assert config["head"] == "cosine"
    assert pool.configs[1] | pool.samples[1] == pool.configs[1]
    assert covered_space(table).fixed == {"head": "cosine", "epochs": EPOCHS}


def test_a_curve_is_a_prediction_and_one_runs_whole_residual(
    table: Table, surrogate: CurveSurrogate, pool: Table
) -> None:
    predicted = surrogate.forest.predict(encoded(table.axes, pool.samples))
    residuals = surrogate.curves - surrogate.out_of_bag
    added = logit(np.concatenate([pool.auc, pool.hold], axis=1)) - predicted
    np.testing.assert_allclose(pool.auc[0], table.auc[0])  # a known setting keeps its curves
    np.testing.assert_allclose(pool.hold[0], table.hold[0])
    donors = []
    for number in range(1, pool.size):
        distance = np.abs(residuals - added[number]).max(axis=1)
        assert distance.min() < 1e-9
        donor = int(np.argmin(distance))
        donors.append(donor)
        assert [row["val_auc"] for row in pool.rows[number]] == list(pool.auc[number])
        assert pool.rows[number][2]["val_auc_raw"] == table.rows[donor][2]["val_auc_raw"]
        assert list(pool.seconds[number]) == list(table.seconds[donor])
    assert len(set(donors)) > 40
    rates = np.log([float(sample["backbone_lr"]) for sample in pool.samples[1:]])
    near = rates - np.log([table.samples[donor]["backbone_lr"] for donor in donors])
    assert np.abs(near).mean() < 0.5 * np.std(rates)  # of runs close by
    np.testing.assert_array_equal(objective_by_epoch(pool.auc)[0], pool.value)


def test_the_same_seed_gives_the_same_pool(table: Table, pool: Table) -> None:
    again = CurveSurrogate(table, trees=100).pool(300)
    other = CurveSurrogate(table, trees=100).pool(300, seed=1)
    np.testing.assert_array_equal(again.truth, pool.truth)
    assert again.samples == pool.samples
    assert again.rows == pool.rows
    assert not {s["backbone_lr"] for s in other.samples[1:]} & {
        s["backbone_lr"] for s in pool.samples[1:]
    }


def test_no_strategy_changes_when_the_truth_does(table: Table, pool: Table) -> None:
    prior = learn_prior([table])
    rng = np.random.default_rng(0)
    hidden = dataclasses.replace(
        pool, truth=rng.permutation(pool.truth), hold=rng.permutation(pool.hold)
    )
    for entry in ENTRIES:
        if entry.together:
            continue
        done = []
        for one in (pool, hidden):
            views: list[Seen] = []
            factory = entry.make(one, prior)

            def spied(view: Seen, budget: float, views: list[Seen] = views) -> Strategy:
                views.append(view)
                return factory(view, budget)  # noqa: B023

            simulate(one, spied, [6], 3)
            done.append(views[0].done)
        assert done[0].sum() > 5 * EPOCHS
        np.testing.assert_array_equal(done[0], done[1])
        assert not {name for row in pool.rows[7] for name in row} & {"hold_auc", "hold_scores"}


def test_a_model_that_chooses_among_a_few_beats_random_on_the_pool(
    table: Table, pool: Table
) -> None:
    offered = []
    factory = medtune(NO_STOPS)(pool, learn_prior([table]))
    search = factory(Seen(pool, np.random.default_rng(0)), 100.0)
    choose = search._surrogate.choose  # type: ignore[attr-defined]

    def spied(seen: Any, auc: Any, share: Any, running: Any, free: Any, rng: Any) -> int:
        offered.append(len(free))
        return int(choose(seen, auc, share, running, free, rng))

    search._surrogate.choose = spied  # type: ignore[attr-defined]
    gain = [
        simulate(pool, factory, [4], seed)[0] - simulate(pool, RandomSearch, [4], seed)[0]
        for seed in range(30)
    ]
    assert np.mean(gain) > 2 * np.std(gain) / 30**0.5
    assert set(offered) == {CANDIDATES}


def test_what_a_weak_surrogate_shows_is_no_claim(table: Table, pool: Table) -> None:
    assert pool.fit is not None
    weak = dataclasses.replace(
        pool, name="weak", fit=dataclasses.replace(pool.fit, value=0.79), cohort="two"
    )
    result = compare([pool, weak], ENTRIES[:1], replays=2, resamples=0, taught_by=[table])
    strong_text, weak_text = strategies_text(result).split("| weak")
    assert "no claim" not in strong_text
    assert f"correlation {pool.fit.truth:.3f} with the held-out AUC" in strong_text
    assert weak_text.startswith(" (no claim) |")
    assert "0.790 with the objective. Below 0.8: nothing is claimed from this table." in weak_text
    recorded = compare([table], ENTRIES[:1], replays=2, resamples=0)
    assert recorded[["fit_truth", "fit_value"]].isna().all(axis=None)
    assert "urrogate" not in strategies_text(recorded)


def test_the_command_replays_on_a_pool(tmp_path: Path) -> None:
    path, out = write(tmp_path / "one_table.parquet", trials=30), tmp_path / "result.csv"
    command = f"bench strategies {path} --surrogate 100 --replays 2 --only medtune --out {out}"
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    assert "Surrogate of one_table: out-of-bag rank correlation" in done.output
    frame = pd.read_csv(out)
    assert set(frame["strategy"]) == {"random", "medtune"}
    assert set(frame["budget"]) == {3, 6, 12, 24, 48}  # more runs than the table has
