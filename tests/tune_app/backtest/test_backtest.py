import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from tune_app.backtest.curves import Curve, CurveError, Kind, Truth
from tune_app.backtest.replay import POLICIES, RAY, RayAsha, backtest, backtest_studies, replay
from tune_app.backtest.synthetic import generate_curves
from tune_app.cli.app import app
from tune_app.study.policy import Policy
from tune_app.study.policy_spec import RAY_ASHA, PolicySpec


def curve(trial: str, values: Sequence[float | None], **columns: Sequence[Any]) -> Curve:
    rows = [{"epoch": epoch, "val_auc": value} for epoch, value in enumerate(values, start=1)]
    for name, column in columns.items():
        for row, value in zip(rows, column, strict=True):
            row[name] = value
    return Curve(trial, rows, {"epochs": len(values), "drw_start_epoch": 1000})


def rise(top: float, epochs: int = 12) -> list[float]:
    return [top - 0.3 * 0.6**epoch for epoch in range(epochs)]


def test_epochs_arrive_as_workers_finish_them() -> None:
    curves = [
        curve("slow", [0.5] * 2, epoch_s=[3.0, 3.0]),
        curve("fast", [0.5] * 3, epoch_s=[1.0, 1.0, 1.0]),
        curve("next", [0.5] * 2, epoch_s=[0.5, 4.0]),
    ]
    arrivals = []

    def note(curve: Curve, row: Mapping[str, Any]) -> bool:
        arrivals.append((curve.trial, row["epoch"]))
        return False

    outcome = replay(curves, note, workers=2)
    # at 1, 2, 3 (slow began earlier), 3, then next from 3 on: 3.5, 6 (slow), 7.5
    assert arrivals == [
        ("fast", 1),
        ("fast", 2),
        ("slow", 1),
        ("fast", 3),
        ("next", 1),
        ("slow", 2),
        ("next", 2),
    ]
    assert (outcome.epochs, outcome.stopped, outcome.makespan) == ([2, 3, 2], [False] * 3, 7.5)


def test_a_worker_whose_trial_is_stopped_takes_the_next_one() -> None:
    curves = [curve(name, [0.5] * 4) for name in "abc"]
    arrivals = []

    def stop_at_two(curve: Curve, row: Mapping[str, Any]) -> bool:
        arrivals.append((curve.trial, row["epoch"]))
        return row["epoch"] == 2 and curve.trial != "c"

    outcome = replay(curves, stop_at_two, workers=1)
    assert arrivals == [
        ("a", 1),
        ("a", 2),
        ("b", 1),
        ("b", 2),
        ("c", 1),
        ("c", 2),
        ("c", 3),
        ("c", 4),
    ]
    assert (outcome.epochs, outcome.stopped, outcome.makespan) == (
        [2, 2, 4],
        [True, True, False],
        8.0,
    )


def test_more_workers_than_trials_and_trials_without_rows_are_fine() -> None:
    outcome = replay(
        [curve("a", [0.5]), curve("none", []), curve("b", [0.5] * 2)],
        lambda c, row: False,
        workers=9,
    )
    assert (outcome.epochs, outcome.makespan) == ([1, 0, 2], 2.0)
    with pytest.raises(ValueError, match="at least one"):
        replay([], lambda c, row: False, workers=0)


def test_what_was_spent_found_and_lost_is_worked_out_from_the_curves() -> None:
    # best is a late one that halving ends; it finds good instead
    best = curve("best", [0.5] * 6 + [0.9] * 6, epoch_s=[3600.0] * 12)
    good = curve("good", [0.8] * 12, epoch_s=[3600.0] * 12)
    poor = curve("poor", [0.6] * 12, epoch_s=[3600.0] * 12)
    policy = PolicySpec(
        grace_epochs=3, reduction_factor=3, judge_from=0, actions={"collapsed": "ignore"}
    )
    table = backtest([good, best, poor], {"all": None, "halving": policy}, workers=1).set_index(
        "policy"
    )
    assert list(
        table.loc["all", ["epochs", "epochs_share", "winner", "winner_rank", "auc_lost"]]
    ) == [
        36,
        1,
        "best",
        1,
        0,
    ]
    halved = table.loc["halving"]
    assert (halved.epochs, halved.epochs_all, halved.stopped_by_halving, halved.winner) == (
        18,
        36,
        2,
        "good",
    )
    assert (halved.winner_rank, halved.best_auc, halved.found_auc) == (2, 0.9, 0.8)
    assert halved.auc_lost == pytest.approx(0.1)
    assert (halved.gpu_hours, halved.gpu_hours_saved, halved.makespan_hours) == (18, 18, 18)
    assert halved.top_stopped == 1  # poor had nothing to gain
    assert np.isnan(halved.true_auc_lost)


def test_gpu_time_is_not_told_where_epochs_have_no_duration() -> None:
    table = backtest(
        [curve("a", rise(0.8)), curve("b", rise(0.7), epoch_s=[1.0] * 12)], {"all": None}
    )
    assert table[["gpu_hours", "gpu_hours_saved", "makespan_hours"]].isna().all(axis=None)


def test_a_stop_by_diagnosis_is_wrong_if_the_recorded_run_recovered() -> None:
    long_dip = rise(0.85) + [0.5] * 4 + [0.93] * 8
    lost = rise(0.85) + [0.5] * 12
    table = backtest(
        [curve("recovers", long_dip), curve("collapses", lost)], {"d": PolicySpec(halving=False)}
    )
    row = table.iloc[0]
    assert (row.stopped_by_diagnosis, row.wrongly_stopped, row.wrong_share) == (2, 1, 0.5)
    assert row.collapsed == 0  # onsets are not known
    assert math.isnan(row.caught_share)


def test_a_collapse_counts_as_caught_from_its_true_onset_on() -> None:
    late = Curve(
        "late",
        curve("", rise(0.85) + [0.5] * 12).rows,
        {},
        Truth("collapsing", 13, tuple([0.8] * 24)),
    )
    missed = Curve(
        "missed", curve("", rise(0.85, 24)).rows, {}, Truth("collapsing", 3, tuple([0.8] * 24))
    )
    fine = Curve(
        "fine", curve("", rise(0.85, 24)).rows, {}, Truth("healthy", None, tuple([0.8] * 24))
    )
    row = backtest([late, missed, fine], {"d": PolicySpec(halving=False)}).iloc[0]
    assert (row.collapsed, row.caught_share, row.delay_median, row.delay_max) == (2, 0.5, 2, 2)
    assert (row.wrongly_stopped, row.wrong_share, row.healthy_stopped_share) == (0, 0, 0)


def test_a_sound_run_that_a_diagnosis_stops_counts_among_sound_runs_alone() -> None:
    fallen = curve("", rise(0.85) + [0.5] * 12).rows
    kinds: dict[Kind, list[dict[str, Any]]] = {
        "dipping": fallen,
        "healthy": curve("", rise(0.85, 24)).rows,
        "noisy": fallen,
    }
    curves = [
        Curve(kind, rows, {}, Truth(kind, None, tuple([0.8] * 24))) for kind, rows in kinds.items()
    ]
    row = backtest(curves, {"d": PolicySpec(halving=False)}).iloc[0]
    assert (row.wrongly_stopped, row.wrong_share, row.healthy_stopped_share) == (
        2,
        pytest.approx(2 / 3),
        0.5,
    )


def test_rays_own_scheduler_and_our_policy_without_additions_agree_in_a_replay() -> None:
    curves = [
        c
        for c in generate_curves(60, epochs=30, seed=4)
        if all(row["val_auc"] is not None for row in c.rows)
    ]
    assert len(curves) > 50
    ours = Policy(RAY_ASHA, 30)
    one = replay(curves, RayAsha(30), workers=4)
    two = replay(curves, lambda c, row: ours.decide(c.trial, c.config, row), workers=4)
    assert (one.epochs, one.stopped) == (two.epochs, two.stopped)
    table = backtest(curves, {"ray": RAY, "policy": RAY_ASHA}, workers=4).drop(columns="policy")
    assert table.iloc[0].equals(table.iloc[1])


def test_studies_and_folders_of_curves_come_out_side_by_side(tmp_path: Path) -> None:
    study = tmp_path / "a study"
    study.mkdir()
    rows = [
        {"trial": f"0000{n}", **row}
        for n, top in enumerate((0.7, 0.8))
        for row in curve("", rise(top)).rows
    ]
    (study / "epochs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "other.csv").write_text("epoch,val_auc\n1,0.5\n2,0.6\n")
    table = backtest_studies(
        [study, tmp_path / "other.csv"], {"all": None, "diagnosis": PolicySpec(halving=False)}
    )
    assert list(table.columns[:3]) == ["study", "policy", "trials"]
    assert table[["study", "policy", "trials", "epochs_all"]].values.tolist() == [
        ["a study", "all", 2, 24],
        ["a study", "diagnosis", 2, 24],
        ["other.csv", "all", 1, 2],
        ["other.csv", "diagnosis", 1, 2],
    ]
    with pytest.raises(CurveError):
        backtest_studies([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="no studies named"):
        backtest_studies([])


def test_curves_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="no curves"):
        backtest([])
    with pytest.raises(ValueError, match="trial a is there more than once"):
        backtest([curve("a", [0.5]), curve("a", [0.6])])
    with pytest.raises(KeyError, match="unknown objective"):
        backtest([curve("a", [0.5])], objective="auc")


# Requirements on the stopping policy -----------------------------------------------------------------------------------

STUDIES = 3


@pytest.fixture(scope="module")
def compared() -> pd.DataFrame:
    """500 runs of 60 epochs, 50 positive and 200 negative validation volumes, three studies; seeds the rules never saw."""
    tables = []
    for seed in range(900, 900 + STUDIES):
        tables.append(
            backtest(generate_curves(500, seed=seed, positives=50, negatives=200), POLICIES).assign(
                seed=seed
            )
        )
    return pd.concat(tables).set_index(["policy", "seed"])


@pytest.mark.slow
def test_collapsing_runs_are_stopped_in_time_and_healthy_ones_are_not(
    compared: pd.DataFrame,
) -> None:
    only = compared.loc["diagnosis only"]
    assert np.average(only.caught_share, weights=only.collapsed) >= 0.98
    assert only.collapsed.sum() > 250
    assert (
        np.average(only.wrong_share, weights=only.trials - only.collapsed) <= 0.02
    )  # of all kinds that do not collapse


@pytest.mark.slow
def test_at_most_one_in_a_hundred_healthy_or_dipping_runs_is_stopped_by_the_collapse_rule() -> None:
    stopped = total = 0
    for seed in range(950, 952):
        curves = generate_curves(
            500, seed=seed, positives=50, negatives=200, mix={"healthy": 0.7, "dipping": 0.3}
        )
        row = backtest(curves, {"diagnosis": PolicySpec(halving=False)}).iloc[0]
        stopped, total = stopped + row.wrongly_stopped, total + row.trials
    assert total == 1000
    assert stopped / total <= 0.01


@pytest.mark.slow
def test_the_default_policy_spends_about_half_and_finds_what_rays_asha_misses(
    compared: pd.DataFrame,
) -> None:
    ours, rays = compared.loc["medtune default"], compared.loc["Ray ASHA as shipped"]
    assert (ours.epochs_share <= 0.6).all()
    assert ours.auc_lost.mean() <= 0.005
    assert ours.auc_lost.mean() <= rays.auc_lost.mean()
    assert ours.top_stopped.sum() < rays.top_stopped.sum()


DOCUMENT = Path(__file__).parents[3] / "docs" / "stopping.md"
SHOWN = {
    "epochs spent": ("epochs_share", "{:.1%}"),
    "AUC lost": ("auc_lost", "{:.4f}"),
    "of the best five, stopped with more to gain": ("top_stopped", "{:.0f}"),
    "collapsing runs stopped within 5 epochs, of those it let collapse": ("caught_share", "{:.1%}"),
    "healthy or dipping runs stopped by diagnosis": ("healthy_stopped_share", "{:.1%}"),
}


@pytest.mark.slow
def test_the_command_that_the_document_quotes_gives_its_figures_and_they_hold_what_they_promise() -> (
    None
):
    done = CliRunner().invoke(app, ["backtest", "--generate", "500", "--format", "json"])
    assert done.exit_code == 0, done.output
    found = pd.DataFrame(json.loads(done.stdout)).set_index("policy")
    only, ours, rays = (
        found.loc[name] for name in ("diagnosis only", "medtune default", "Ray ASHA as shipped")
    )
    assert (found.trials == 500).all()
    assert (found.epochs_all == 500 * 60).all()
    assert only.collapsed > 80
    assert only.caught_share >= 0.98
    assert only.healthy_stopped_share <= 0.01
    assert ours.epochs_share <= 0.6
    assert ours.auc_lost <= 0.005 < rays.auc_lost

    text = DOCUMENT.read_text(encoding="utf-8")
    (table,) = re.findall(
        r"<!-- backtest:begin -->\n(.*?)<!-- backtest:end -->", text, flags=re.DOTALL
    )
    head, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    assert head[1:] == list(found.index)
    assert [line[0] for line in lines] == list(SHOWN)
    for name, *cells in lines:
        column, form = SHOWN[name]
        assert cells == [
            form.format(value).replace("%", " %") for value in found[column].fillna(0)
        ], name


def test_what_cannot_be_compared_is_told_in_a_line_on_the_command_line(tmp_path: Path) -> None:
    def backtest_command(*words: object) -> Result:
        return CliRunner().invoke(app, ["backtest", *map(str, words)], env={"COLUMNS": "100"})

    assert backtest_command().exit_code == 2
    assert "--generate N" in backtest_command().stderr
    unknown = backtest_command("--generate", 5, "--objective", "auc")
    assert unknown.exit_code == 2
    assert "one of best_median3" in " ".join(unknown.stderr.split())
    (tmp_path / "epochs.jsonl").write_text("")
    assert isinstance(backtest_command(tmp_path).exception, CurveError)
    shown = backtest_command("--generate", 5, "--positives", 10, "--negatives", 30)
    assert "5 synthetic curves of 60 epochs, 10 + 30 validation volumes, seed 0" in shown.stderr
    assert (
        max(
            map(
                len,
                CliRunner()
                .invoke(app, ["backtest", "--generate", "5"], env={"COLUMNS": "80"})
                .stdout.splitlines(),
            )
        )
        <= 80
    )
