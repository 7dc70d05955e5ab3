import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from trainables.diagnosis import expected_error
from tune_app.backtest.curves import COLLAPSING, KINDS, Curve, CurveError, Kind, Truth, read_curves
from tune_app.backtest.synthetic import MIX, auc_and_error, generate_curves


def write_study(
    folder: Path, rows: Sequence[Mapping[str, Any]], configs: Mapping[str, Mapping[str, Any]]
) -> Path:
    folder.mkdir()
    (folder / "epochs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for trial, config in configs.items():
        (folder / "trials" / trial).mkdir(parents=True)
        (folder / "trials" / trial / "config.json").write_text(json.dumps(config))
    return folder


def truth_of(curve: Curve) -> Truth:
    assert curve.truth is not None
    return curve.truth


def drw_start(curve: Curve) -> int:
    assert curve.config is not None
    return int(curve.config["drw_start_epoch"])


def test_auc_and_its_error_are_scikit_learns_and_delongs() -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((20, 100))
    scores[:, :30] += 1.0
    labels = np.arange(100) < 30
    aucs, errors = auc_and_error(scores, 30)
    for row, auc, error in zip(scores, aucs, errors, strict=True):
        assert auc == pytest.approx(roc_auc_score(labels, row), abs=1e-12)
        wins = row[:30, None] > row[None, 30:]  # DeLong et al. 1988, from its definition
        variance = wins.mean(1).var(ddof=1) / 30 + wins.mean(0).var(ddof=1) / 70
        assert error == pytest.approx(math.sqrt(variance), abs=1e-12)


def test_the_same_seed_gives_the_same_curves_and_another_one_others() -> None:
    first, again, other = (generate_curves(30, seed=seed) for seed in (1, 1, 2))
    assert repr(first) == repr(again)  # truth holds NaN, which equals nothing
    assert [curve.rows for curve in first] != [curve.rows for curve in other]


def test_rows_have_the_columns_and_types_of_a_run() -> None:
    for curve in generate_curves(40, epochs=30, seed=3):
        assert [row["epoch"] for row in curve.rows] == list(range(1, 31))
        for row in curve.rows:
            json.dumps(row, allow_nan=False)
            assert row["val_auc"] == row["val_auc_ema"]
            assert (
                row["val_auc"] is None
                or row["val_auc_low"] <= row["val_auc"] <= row["val_auc_high"]
            )
            assert row["drw_active"] == (row["epoch"] >= drw_start(curve))
        assert len(truth_of(curve).auc) == 30


def test_every_kind_is_drawn_in_about_its_share() -> None:
    kinds = [
        truth_of(curve).kind
        for curve in generate_curves(400, epochs=24, seed=0, positives=5, negatives=10)
    ]
    assert set(MIX) == set(KINDS) == set(kinds)
    assert sum(MIX.values()) == pytest.approx(1)
    for kind, share in MIX.items():
        assert kinds.count(kind) / 400 == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("kind", sorted(COLLAPSING))
def test_collapsing_runs_lose_at_least_a_fifth_from_their_onset_on(kind: Kind) -> None:
    for curve in generate_curves(60, seed=5, mix={kind: 1}):
        truth = truth_of(curve)
        auc, onset = np.array(truth.auc), truth.onset
        assert truth.collapsing
        assert onset is not None
        peak = np.nanmax(auc[: onset - 1])
        if kind == "diverging":
            assert np.isnan(auc[onset - 1 :]).all()
            continue
        after = np.where(np.isnan(auc), 0.5, auc)[onset - 1 :]
        assert peak - after.min() >= 0.19
        assert auc[onset - 2] > peak - 0.11 * (peak - after.min()) - 1e-9
        raw = np.array([row["val_auc_raw"] for row in curve.rows])
        if kind == "collapsing_average":
            assert raw[onset + 4 : onset + 15].mean() > 0.58  # the raw network is sound
        if kind == "collapsing_after_drw":
            assert 0 <= onset - drw_start(curve) <= 6


@pytest.mark.parametrize("kind", ["healthy", "dipping", "late_bloomer", "saturating", "noisy"])
def test_the_others_end_near_the_best_they_had(kind: Kind) -> None:
    for curve in generate_curves(40, seed=6, mix={kind: 1}):
        truth = truth_of(curve)
        assert truth.onset is None
        assert max(truth.auc) - np.median(truth.auc[-5:]) < (0.16 if kind == "noisy" else 0.08)


def test_kinds_have_what_they_are_named_for() -> None:
    def auc(kind: Kind, column: str = "val_auc") -> np.ndarray:
        return np.array(
            [
                [row[column] for row in curve.rows]
                for curve in generate_curves(40, seed=8, mix={kind: 1})
            ]
        )

    assert (auc("late_bloomer")[:, 4] < 0.7).all()
    assert (
        auc("saturating")[:, -1].mean() - auc("saturating", "val_auc_probability_ema")[:, -1].mean()
        > 0.08
    )
    assert abs(auc("never_learning").mean() - 0.53) < 0.05
    assert (auc("lagging", "val_auc_raw")[:, 4] - auc("lagging")[:, 4]).mean() > 0.1
    healthy, noisy = (
        np.abs(np.diff(curves[:, 20:])).mean()
        for curves in (auc("healthy", "val_auc_raw"), auc("noisy", "val_auc_raw"))
    )
    assert noisy > 1.5 * healthy


@pytest.mark.parametrize(("positives", "negatives"), [(10, 30), (50, 200)])
def test_noise_has_the_size_that_class_counts_give_it(positives: int, negatives: int) -> None:
    """Over studies (other volumes), an AUC scatters about the truth as Hanley and McNeil's formula predicts."""
    errors, expected = [], []
    for seed in range(150):
        curve = generate_curves(
            1, epochs=24, seed=seed, positives=positives, negatives=negatives, mix={"healthy": 1}
        )[0]
        truth = truth_of(curve).auc[20]
        errors.append(curve.rows[20]["val_auc"] - truth)
        expected.append(expected_error(truth, positives, negatives))
    assert abs(np.mean(errors)) < 3 * np.mean(expected) / math.sqrt(150)
    assert np.std(errors) == pytest.approx(np.mean(expected), rel=0.25)


def test_epochs_of_a_run_scatter_as_real_ones_do() -> None:
    """The module's docstring: at 23 and 75 volumes, raw AUCs five epochs apart differ by some .05, averaged by .02."""
    differences: dict[str, list[float]] = {"raw": [], "ema": []}
    for seed in range(8):
        for curve in generate_curves(20, seed=seed, positives=23, negatives=75, mix={"healthy": 1}):
            for weights, values in differences.items():
                auc = [row[f"val_auc_{weights}"] for row in curve.rows[20:]]
                values += [auc[i + 5] - auc[i] for i in range(0, 35, 5)]
    assert np.std(differences["raw"]) == pytest.approx(0.05, abs=0.015)
    assert np.std(differences["ema"]) == pytest.approx(0.02, abs=0.008)


def test_too_short_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 24"):
        generate_curves(1, epochs=10)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_curve_file_of_each_format_gives_the_rows_back(tmp_path: Path, suffix: str) -> None:
    curves = generate_curves(4, epochs=24, seed=11)
    table = pd.DataFrame(
        [
            {"trial": curve.trial, **row, "config.drw_start_epoch": drw_start(curve)}
            for curve in curves
            for row in curve.rows
        ]
    )
    path = tmp_path / f"some curves{suffix}"
    if suffix == ".csv":
        table.to_csv(path, index=False)
        assert "00000" in path.read_text()
    elif suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, orient="records", lines=True, double_precision=15)
    other = path.rename(tmp_path / "named.txt")
    assert len(read_curves(other)) == len(curves), "recognised by content"
    found = read_curves(other.rename(path))
    assert [curve.config for curve in found] == [{"drw_start_epoch": drw_start(c)} for c in curves]
    for curve, expected in zip(found, curves, strict=True):
        assert curve.trial == expected.trial
        for row, known in zip(curve.rows, expected.rows, strict=True):
            assert {name: row[name] for name in known} == pytest.approx(known)
        assert curve.truth is None


def test_epoch_and_auc_are_enough_and_a_file_without_trials_is_one_run(tmp_path: Path) -> None:
    (tmp_path / "second.csv").write_text("epoch,val_auc\n2,0.8\n1,0.7\n3,\n")
    (tmp_path / "first.csv").write_text("epoch,val_auc,trial\n1,0.5,x\n1,0.6,y\n")
    curves = read_curves(tmp_path)
    assert [(curve.trial, curve.config) for curve in curves] == [
        ("first/x", None),
        ("first/y", None),
        ("second", None),
    ]
    assert [(row["epoch"], row["val_auc"]) for row in curves[-1].rows] == [
        (1, 0.7),
        (2, 0.8),
        (3, None),
    ]
    assert [curve.trial for curve in read_curves(tmp_path / "first.csv")] == ["x", "y"]


def test_every_problem_of_every_curve_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("epoch,auc\n1,0.5\n")
    (tmp_path / "b.csv").write_text("epoch,val_auc\n0,0.5\n2,high\n3,1.5\n")
    (tmp_path / "c.csv").write_text("trial,epoch,val_auc,config.s\nt,1,0.5,15\nt,1,0.6,20\n")
    (tmp_path / "d.jsonl").write_text('{"epoch": 1, "val_auc": 0.5}\nnonsense\n')
    with pytest.raises(CurveError) as caught:
        read_curves(tmp_path)
    problems = "\n".join(caught.value.problems)
    for part in (
        "a.csv: column 'val_auc' is missing",
        "b.csv row 1: epoch",
        "b.csv row 2: val_auc 'high'",
        "b.csv row 3: val_auc",
        "c.csv: trial t has epoch 1 twice",
        "c.csv: trial t has 2 values of config.s",
        "d.jsonl:2: not a JSON row",
    ):
        assert part in problems
    with pytest.raises(CurveError, match="no curves here"):
        read_curves(tmp_path / "nowhere")


def test_a_studys_folder_gives_its_trials_with_their_configs(tmp_path: Path) -> None:
    rows = [
        {"trial": t, "epoch": e, "val_auc": 0.5 + e / 10}
        for e in (1, 2)
        for t in ("00001", "00000")
    ]
    folder = write_study(
        tmp_path / "a study", [*rows, {**rows[0], "val_auc": 0.0}], {"00000": {"epochs": 2}}
    )
    with (folder / "epochs.jsonl").open("a") as file:
        file.write('{"trial": "00000", "epo')  # an incomplete line, as a killed writer leaves it
    curves = read_curves(folder)
    assert [(curve.trial, curve.config) for curve in curves] == [
        ("00000", {"epochs": 2}),
        ("00001", None),
    ]
    assert [row["val_auc"] for row in curves[1].rows] == [
        0.6,
        0.7,
    ]  # the first report of an epoch counts
    with (folder / "epochs.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(CurveError, match="jsonl:6: not a JSON row"):
        read_curves(folder)
