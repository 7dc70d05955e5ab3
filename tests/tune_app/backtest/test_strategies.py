"""Whole searches replayed: against exact values, Ray's own scheduler, and the rule that nothing hidden is seen."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import comb
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from trainables.objective import best_epoch, objective_value
from tune_app.backtest.curves import CurveError
from tune_app.backtest.replay import RayAsha, replay
from tune_app.backtest.strategies import (
    ENTRIES,
    NO_STOPS,
    MedtuneSearch,
    RandomSearch,
    RayAshaSearch,
    Seen,
    Strategy,
    StrategyError,
    TopK,
    compare,
    diagnosed,
    entries_named,
    medtune,
    prior_for,
    simulate,
    strategies_text,
)
from tune_app.backtest.tables import Table, learn_prior, read_table
from tune_app.cli.app import app
from tune_app.study.policy import Policy
from tune_app.study.policy_spec import PolicySpec
from tune_app.study.prior import prior_of_file, shipped_prior
from tune_app.study.tied import nearly_tied

EPOCHS = 9


def write(path: Path, trials: int = 24, seed: int = 0, best: float = 2e-4, **columns: Any) -> Path:
    """A table in which the rate decides: the held-out AUC is the validation AUC without its noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(trials):
        rate = float(np.exp(rng.uniform(np.log(2e-5), np.log(5e-4))))
        level = 0.85 - 0.06 * abs(math.log(rate / best))
        for epoch in range(1, EPOCHS + 1):
            truth = 0.5 + (level - 0.5) * (1 - math.exp(-epoch / 3))
            rows.append(
                {
                    "trial": f"{number:05d}",
                    "origin": "random" if number else "after",
                    "epoch": epoch,
                    "val_auc": truth + rng.normal(0, 0.01),
                    "hold_auc": truth,
                    "epoch_s": 1.0 + 0.1 * (number % 3),
                    "config.epochs": EPOCHS,
                    "sample.backbone_lr": rate,
                    "sample.s": float(rng.uniform(5, 40)),
                    **columns,
                }
            )
    pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return read_table(write(tmp_path_factory.mktemp("tables") / "one_table.parquet"))


def test_a_table_is_what_the_objective_makes_of_its_rows(table: Table) -> None:
    assert (table.cohort, table.size, table.epochs) == ("one", 24, EPOCHS)
    for trial in range(0, 24, 5):
        for epochs in range(1, EPOCHS + 1):
            rows = table.rows[trial][:epochs]
            assert table.value[trial, epochs - 1] == objective_value(rows)
            deployed = best_epoch(rows)
            assert deployed is not None
            rate = table.samples[trial]["backbone_lr"]
            level = 0.85 - 0.06 * abs(math.log(rate / 2e-4))
            truth = 0.5 + (level - 0.5) * (1 - math.exp(-deployed / 3))  # known in closed form
            assert table.truth[trial, epochs - 1] == pytest.approx(truth)


def test_no_strategy_is_shown_what_it_is_judged_by(table: Table) -> None:
    seen = Seen(table, np.random.default_rng(0))
    seen.done[:] = 4
    curve = seen.curve(3)
    assert [row["epoch"] for row in curve.rows] == [1, 2, 3, 4]
    assert not {name for row in curve.rows for name in row} & {
        "hold_auc",
        "hold_scores",
        "val_scores",
    }


def test_random_search_finds_what_the_table_says_exactly(table: Table) -> None:
    """The expected held-out AUC of the best of k by validation, over all subsets of k: exact by order statistics."""
    order = np.argsort(table.value[:, -1])
    truth = table.truth[order, -1]
    k, n = 5, table.size
    chance = np.array(
        [comb(rank, k - 1) / comb(n, k) for rank in range(n)]
    )  # that rank is the best of k
    exact = float(chance @ truth)
    found = [simulate(table, RandomSearch, [k], seed, workers=1)[0] for seed in range(600)]
    assert np.mean(found) == pytest.approx(exact, abs=4 * np.std(found) / 600**0.5)
    assert chance.sum() == pytest.approx(1)


def test_rays_asha_stops_what_it_stops_in_the_replay_of_curves(table: Table) -> None:
    seen = []

    class Spied(RayAshaSearch):
        def __init__(self, view: Seen, budget: float) -> None:
            super().__init__(view, budget)
            self.order = list(reversed(self._order))
            seen.append((view, self.order))

    simulate(table, Spied, [1000], 5, workers=3)
    view, order = seen[0]
    whole = Seen(table, np.random.default_rng(0))
    whole.done[:] = EPOCHS
    curves = [whole.curve(int(trial)) for trial in order]
    asha = RayAsha(EPOCHS)
    expected = replay(curves, asha, workers=3)
    assert [int(view.done[trial]) for trial in order] == expected.epochs
    assert any(expected.stopped)


def test_top_k_trains_each_a_little_and_the_best_to_their_end(table: Table) -> None:
    seen = []

    def factory(view: Seen, budget: float) -> Strategy:
        seen.append(view)
        return TopK(view, budget, first=2, kept=3)

    simulate(table, factory, [6], 0)
    done = np.sort(seen[0].done)[::-1]
    assert list(done[:3]) == [EPOCHS] * 3
    begun = int((done > 0).sum())
    assert begun == (6 * EPOCHS - 3 * (EPOCHS - 2)) // 2 or begun == table.size
    assert set(done[3:begun]) == {2}
    best = np.argsort(-table.value[:, 1])
    begun_set = set(np.flatnonzero(seen[0].done > 0))
    assert {t for t in range(table.size) if seen[0].done[t] == EPOCHS} == set(
        [t for t in best if t in begun_set][:3]
    )


def test_a_budget_is_spent_and_no_more(table: Table) -> None:
    seen = []

    def factory(view: Seen, budget: float) -> Strategy:
        seen.append(view)
        return RandomSearch(view)

    simulate(table, factory, [2, 5], 0)
    assert seen[0].done.sum() == 5 * EPOCHS


def test_a_budget_in_seconds_buys_fewer_runs_where_starting_costs(table: Table) -> None:
    spent = []
    for start in (0.0, 9.0):
        views: list[Seen] = []

        def factory(view: Seen, budget: float, views: list[Seen] = views) -> Strategy:
            views.append(view)
            return RandomSearch(view)

        simulate(table, factory, [6], 0, start_s=start, unit="seconds")
        spent.append(views[0].done.sum())
    assert spent[0] == pytest.approx(6 * EPOCHS, rel=0.15)
    assert 0.3 < spent[1] / spent[0] < 9.9 / 18.9  # and what runs when time is over is lost


def test_the_model_beats_random_where_the_rate_decides(table: Table, tmp_path: Path) -> None:
    other = read_table(write(tmp_path / "other_table.parquet", seed=9, best=2.5e-4))
    prior = prior_for(table, [table, other])
    assert prior == learn_prior([other])
    gain = []
    factory = medtune(NO_STOPS)(table, prior)
    for seed in range(40):
        gain.append(
            simulate(table, factory, [3], seed)[0] - simulate(table, RandomSearch, [3], seed)[0]
        )
    assert np.mean(gain) > 2 * np.std(gain) / 40**0.5


def test_without_another_cohort_the_shipped_prior_is_used(table: Table) -> None:
    assert prior_for(table, [table]) == shipped_prior()


def test_a_prior_finds_where_the_rate_is_best(tmp_path: Path) -> None:
    for best in (5e-5, 2e-4):
        table = read_table(write(tmp_path / "a_table.parquet", trials=60, best=best))
        prior = learn_prior([table])
        rates = np.log(np.geomspace(2e-5, 5e-4, 200))
        found = float(np.exp(rates[np.argmax(prior(rates))]))
        assert found == pytest.approx(best, rel=0.35)


def test_a_prior_is_written_for_study_files(tmp_path: Path) -> None:
    table, out = write(tmp_path / "a_table.parquet", trials=30, best=5e-5), tmp_path / "own.json"
    done = CliRunner().invoke(app, ["bench", "prior", str(table), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert prior_of_file(out) == learn_prior([read_table(table)])
    assert "from a_table: 30 runs" in done.output
    assert "best at a rate of" in done.output


def test_all_strategies_replay_alike_and_say_so_in_a_table(table: Table) -> None:
    result = compare([table], replays=4, resamples=3)
    again = compare([table], replays=4, resamples=3)
    pd.testing.assert_frame_equal(result, again)
    shown = {entry.name for entry in ENTRIES if not entry.together}  # the table has no scores
    assert set(result["strategy"]) == shown
    assert set(result["budget"]) == {3, 6, 12, 24}
    assert (result[result["strategy"] == "random"]["gain"] == 0).all()
    assert (result[result["strategy"] == "random"]["won"] == 0.5).all()
    text = strategies_text(result)
    assert text.count("\n") == len(shown) + 1
    assert "| random | 0." in text


def test_unknown_strategies_are_named() -> None:
    assert [entry.name for entry in entries_named(["medtune"])] == ["random", "medtune"]
    with pytest.raises(StrategyError, match="no strategy asha: there are random"):
        entries_named(["asha"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda frame: frame.drop(columns="hold_auc"), "column 'hold_auc' is missing"),
        (lambda frame: frame[(frame["trial"] != "00003") | (frame["epoch"] < 5)], "trial 00003"),
    ],
)
def test_a_table_that_cannot_be_replayed_is_refused(
    tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], named: str
) -> None:
    path = write(tmp_path / "a_table.parquet")
    change(pd.read_parquet(path)).to_parquet(path)
    with pytest.raises(CurveError, match=named):
        read_table(path)


def test_of_several_folds_the_first_run_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a_table.parquet", trials=4)
    frame = pd.read_parquet(path).assign(configuration=lambda f: f["trial"].astype(int), fold=0)
    second = frame.assign(fold=2, trial=frame["trial"] + "-fold2-seed0", val_auc=0.1)
    pd.concat([frame, second]).to_parquet(path)
    table = read_table(path)
    assert table.size == 4
    assert table.auc.min() > 0.2


CURVES = Path(__file__).parents[4] / "shared" / "data" / "curves"


@pytest.mark.skipif(
    not CURVES.is_dir(), reason=f"{CURVES} is missing: recorded curves of real runs"
)
def test_on_real_curves_the_shipped_prior_is_what_they_teach() -> None:
    tables = [read_table(path) for path in sorted(CURVES.glob("*.parquet"))]
    assert len(tables) >= 4
    known = [t for t in tables if t.name in "".join(shipped_prior().provenance["learned_from"])]
    assert learn_prior(known) == shipped_prior()


def test_a_replay_stops_what_the_policy_itself_stops(table: Table) -> None:
    """The diagnosis is found once for a table: the outcome is that of the policy asked row by row."""
    rows = [[dict(row) for row in rows] for rows in table.rows]
    for trial in range(0, table.size, 3):  # every third is not finite any more
        for row in rows[trial][3:]:
            row |= {"val_auc": None, "val_auc_raw": None, "val_auc_ema": None}
    auc = np.array([[row["val_auc"] for row in one] for one in rows], dtype=float)
    ill = dataclasses.replace(table, rows=tuple(rows), auc=auc)
    policy = PolicySpec(grace_epochs=3, reduction_factor=2, judge_from=2)
    assert diagnosed(ill, policy)
    views, searches = [], []

    class Spied(MedtuneSearch):
        def __init__(self, view: Seen, budget: float) -> None:
            super().__init__(view, budget, policy=policy, ill=diagnosed(ill, policy))
            self.order = list(reversed(self._order))
            views.append(view)
            searches.append(self)

    simulate(ill, Spied, [1000], 3, workers=3)
    curves = []
    for trial in searches[0].order:
        views[0].done[trial], done = EPOCHS, views[0].done[trial]
        curves.append((views[0].curve(int(trial)), done))
    whole = Policy(policy, EPOCHS)
    expected = replay(
        [curve for curve, _ in curves],
        lambda curve, row: whole.decide(curve.trial, curve.config, row),
        workers=3,
    )
    assert [done for _, done in curves] == expected.epochs


def with_scores(path: Path, trials: int = 6) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """A table with scores of 40 validation and 60 held-out volumes; the runs' errors are independent."""
    rng = np.random.default_rng(5)
    labels = {"0": np.arange(40) % 4 == 0, "1": np.arange(60) % 4 == 0}
    frame = pd.read_parquet(write(path, trials=trials))
    scores = {
        fold: [
            (rng.normal(0, 1, len(y)) + 1.5 * y) * (1 + n % 3) + n % 5
            for n, y in enumerate([label] * len(frame))
        ]
        for fold, label in labels.items()
    }
    for name, fold in (("val", "0"), ("hold", "1")):
        cells = [each.astype("<f2") for each in scores[fold]]
        frame[f"{name}_auc"] = [roc_auc_score(labels[fold], cell.astype(float)) for cell in cells]
        frame[f"{name}_scores"] = [cell.tobytes() for cell in cells]
    frame = frame.assign(fold=0, hold_fold=1)
    frame.attrs["labels"] = {fold: y.astype(int).tolist() for fold, y in labels.items()}
    frame.to_parquet(path)
    return frame, labels


def test_runs_together_are_worth_the_mean_of_their_calibrated_log_odds(tmp_path: Path) -> None:
    frame, labels = with_scores(tmp_path / "one_table.parquet")
    table = read_table(tmp_path / "one_table.parquet")
    assert table.scored is not None
    runs = [(1, 3), (4, 0), (5, 5)]
    log_odds = []
    for trial, epoch in runs:
        row = frame[(frame["trial"] == f"{trial:05d}") & (frame["epoch"] == epoch + 1)].iloc[0]
        val, hold = (
            np.frombuffer(row[name], dtype="<f2").astype(float)
            for name in ("val_scores", "hold_scores")
        )
        scale = val.std()
        fitted = LogisticRegression(C=100, tol=1e-8).fit((val / scale)[:, None], labels["0"])
        log_odds.append(fitted.decision_function((hold / scale)[:, None]))
    expected = roc_auc_score(labels["1"], np.mean(log_odds, axis=0))
    assert table.scored.auc(runs) == pytest.approx(expected, abs=0.003)
    for trial in range(table.size):
        for epochs in range(1, EPOCHS + 1):
            deployed = int(table.deployed[trial, epochs - 1])
            assert table.scored.auc([(trial, deployed)]) == pytest.approx(
                table.truth[trial, epochs - 1], abs=1e-9
            )
    part = table.part(np.array([4, 1]))
    assert part.scored is not None
    assert part.scored.auc([(0, 0), (1, 3)]) == table.scored.auc([(4, 0), (1, 3)])


def test_tied_runs_are_deployed_together_where_the_table_has_scores(
    tmp_path: Path, table: Table
) -> None:
    with_scores(tmp_path / "one_table.parquet")
    scored = read_table(tmp_path / "one_table.parquet")
    worth = {
        together: [
            simulate(scored, RandomSearch, [6], seed, together=together)[0] for seed in range(3)
        ]
        for together in (False, True)
    }
    values = scored.value[:, -1]
    near = nearly_tied(values)
    assert scored.scored is not None
    whole = scored.scored.auc((int(i), int(scored.deployed[i, -1])) for i in near)
    assert worth[True] == [whole] * 3
    assert worth[False] == [scored.truth[np.argmax(values), -1]] * 3

    named = entries_named(["medtune", "medtune tied runs together"])
    listed = [
        set(compare([one], named, replays=1, resamples=1)["strategy"]) for one in (scored, table)
    ]
    assert listed[0] - listed[1] == {"medtune tied runs together"}
