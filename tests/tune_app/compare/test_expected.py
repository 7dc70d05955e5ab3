"""What is expected of a confirmation's variants, and the cross-validated AUC of its candidates together."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from sklearn.calibration import _SigmoidCalibration
from sklearn.metrics import roc_auc_score

from search_spaces.fixes import all_fixes, documented_after
from trainables.checkpoints import write_json
from tune_app.compare.confirm import print_confirmation
from tune_app.compare.expected import candidates_together, expected_means, shrunken_means
from tune_app.compare.seen_rows import read_scores, scores_file
from tune_app.compare.validation_scores import scores_are_needed
from tune_app.results.loading import load_study
from tune_app.results.study import Study

WriteStudy = Callable[..., Path]

ROWS, FOLDS = 60, 4
VARIANTS = {
    "documented": documented_after(3),
    "defaults": all_fixes(3),
    "trial-00007": {"max_m": 0.3, "s": 10.0},
    "trial-00002": {"max_m": 0.2, "s": 15.0},
}


@pytest.fixture
def confirmation(write_study: WriteStudy) -> Study:
    """Four folds of two seeds, of which fold 0 chose the candidates."""
    small = {"epochs": 3, "depth": 10, "width": 0.125, "volume_shape": 16, "num_folds": FOLDS}
    study = load_study(
        write_study(
            "confirmation",
            kind="confirmation",
            variants=VARIANTS,
            seeds=2,
            folds=FOLDS,
            epochs=3,
            spec={"seen_folds": (0,), "config": small, "confirms": "studies/first"},
        )
    )
    return study


def write_scores(study: Study, rng: np.random.Generator, signal: float) -> None:
    """Scores of each candidate's runs: `signal` for positives, noise of its own, on a scale of its own."""
    labels = np.arange(ROWS * FOLDS) % 3 == 0
    scale = {"trial-00007": 1.0, "trial-00002": 40.0}
    runs = {}
    for trial in study.trials_full.to_dict("records"):
        if trial["variant"] in scale:
            own = np.arange(trial["fold"] * ROWS, (trial["fold"] + 1) * ROWS)
            scores = scale[trial["variant"]] * (signal * labels[own] + rng.normal(0, 1, ROWS))
            runs[str(trial["trial"])] = {"rows": own.tolist(), "scores": scores.tolist()}
    written = {"format": 1, "labels": labels.astype(int).tolist(), "runs": runs}
    write_json(scores_file(study.path), written | {"subjects": [f"s{i}" for i in range(240)]})


def test_shrunken_means_are_closer_to_the_truth_and_the_best_of_them_is_not_too_good() -> None:
    rng = np.random.default_rng(0)
    raw_error, error, raw_bias, bias = [], [], [], []
    for _ in range(400):
        truth = rng.normal(0.8, 0.01, 6)
        folds = rng.normal(0, 0.05, 4)[:, None] + rng.normal(
            0, 0.02, (4, 6)
        )  # hard folds are hard for all
        values = pd.DataFrame(truth + folds, columns=list("abcdef"))
        level = folds.mean()  # luck that all variants share
        means = shrunken_means(values, 10**9)
        raw = values.mean()
        raw_error.append(((raw - level - truth) ** 2).mean())
        error.append(((means - level - truth) ** 2).mean())
        best = int(np.argmax(raw))
        raw_bias.append(raw.iloc[best] - level - truth[best])
        bias.append(means.iloc[best] - level - truth[best])
        assert (
            list(means.sort_values().index) == list(raw.sort_values().index) or means.nunique() == 1
        )
    assert np.mean(error) < 0.75 * np.mean(raw_error)
    assert abs(np.mean(bias)) < 0.35 * np.mean(raw_bias)


def test_shrunken_means_by_hand() -> None:
    values = pd.DataFrame({"a": [0.80, 0.70], "b": [0.90, 0.84], "c": [0.70, 0.65]})
    means, grand = np.array([0.75, 0.87, 0.675]), 0.765
    rest = values.to_numpy() - values.to_numpy().mean(axis=1, keepdims=True) - (means - grand)
    noise = (rest**2).sum() / 2 * (1 / 2 + 1 / 4)
    kept = 1 - noise / means.var(ddof=1)
    assert 0 < kept < 1
    assert shrunken_means(values, 5).to_numpy() == pytest.approx(grand + kept * (means - grand))
    alike = pd.DataFrame({"a": [0.8, 0.7], "b": [0.7, 0.8], "c": [0.75, 0.76]})
    assert shrunken_means(alike, 5).nunique() == 1, (
        "no more than noise: all are expected to be the same"
    )
    assert shrunken_means(values.iloc[:1], 5).isna().all()


def test_expected_means_use_folds_on_which_every_variant_has_a_score(confirmation: Study) -> None:
    trials = confirmation.trials_full.copy()
    trials["objective"] = 0.7 + 0.02 * trials["fold"].astype(float)
    trials.loc[trials["variant"] == "defaults", "objective"] += 0.04
    lost = (trials["variant"] == "documented") & (trials["fold"] == 3)
    trials.loc[lost, "objective"] = np.nan
    means = expected_means(replace(confirmation, trials_full=trials), [1, 2, 3])
    assert means["defaults"] == pytest.approx(0.73 + 0.04), "no noise, hence nothing is shrunken"
    assert means["documented"] == pytest.approx(0.73)


def test_candidates_together_are_the_mean_of_calibrated_log_odds_on_each_unseen_fold(
    confirmation: Study,
) -> None:
    write_scores(confirmation, np.random.default_rng(1), signal=1.0)
    scores = read_scores(confirmation.path)
    assert scores is not None
    found = candidates_together(confirmation, scores)
    assert found is not None
    assert (found.members, found.folds) == (("trial-00007", "trial-00002"), (1, 2, 3))
    together, first = [], []
    trials = confirmation.trials_full
    for fold in (1, 2, 3):
        for seed in sorted(trials["seed"].unique()):
            log_odds = []
            for member in found.members:
                own = trials[(trials["variant"] == member) & (trials["seed"] == seed)]
                by_fold = {int(row.fold): scores.runs[str(row.trial)] for row in own.itertuples()}
                others = [by_fold[other] for other in (1, 2, 3) if other != fold]
                platt: Any = _SigmoidCalibration().fit(
                    np.concatenate([run.scores for run in others]),
                    scores.labels[np.concatenate([run.rows for run in others])],
                )
                log_odds.append(-(platt.a_ * by_fold[fold].scores + platt.b_))
            labels = scores.labels[by_fold[fold].rows]
            together.append(roc_auc_score(labels, np.mean(log_odds, axis=0)))
            alone = trials[
                (trials["variant"] == "trial-00007")
                & (trials["seed"] == seed)
                & (trials["fold"] == fold)
            ]
            first.append(roc_auc_score(labels, scores.runs[str(alone["trial"].iloc[0])].scores))
    assert found.auc["mean"] == pytest.approx(np.mean(together), abs=1e-3)
    assert found.gain["mean"] == pytest.approx(np.mean(together) - np.mean(first), abs=1e-3)
    assert found.gain["mean"] > 0.02, "independent noise averages out"


def test_scores_without_signal_give_an_ensemble_of_one_half(confirmation: Study) -> None:
    """Calibrated on the volumes that it is judged on, it would be above."""
    rng = np.random.default_rng(2)
    found = []
    for _ in range(40):
        write_scores(confirmation, rng, signal=0.0)
        scores = read_scores(confirmation.path)
        assert scores is not None
        together = candidates_together(confirmation, scores)
        assert together is not None
        found.append(together.auc["mean"])
    assert np.mean(found) == pytest.approx(
        0.5, abs=3 * np.std(found, ddof=1) / len(found) ** 0.5 + 1e-3
    )


def test_one_candidate_or_one_unseen_fold_has_no_ensemble(confirmation: Study) -> None:
    write_scores(confirmation, np.random.default_rng(1), signal=1.0)
    scores = read_scores(confirmation.path)
    assert scores is not None
    one_fold = confirmation.spec.model_copy(update={"seen_folds": (0, 1, 2)})
    assert candidates_together(replace(confirmation, spec=one_fold), scores) is None
    trials = confirmation.trials_full
    alone = replace(confirmation, trials_full=trials[trials["variant"] != "trial-00002"])
    assert candidates_together(alone, scores) is None


def test_candidates_are_scored_for_their_ensemble_and_one_alone_is_not(
    confirmation: Study,
) -> None:
    assert scores_are_needed(confirmation)
    trials = confirmation.trials_full
    alone = replace(confirmation, trials_full=trials[trials["variant"] != "trial-00002"])
    assert not scores_are_needed(alone)
    write_scores(confirmation, np.random.default_rng(1), signal=1.0)
    assert not scores_are_needed(confirmation), "once"


def test_a_confirmation_prints_its_best_guess_and_the_ensemble_with_its_command(
    confirmation: Study,
) -> None:
    write_scores(confirmation, np.random.default_rng(1), signal=1.0)
    rng = np.random.default_rng(3)
    trials = confirmation.trials_full.copy()
    gain = np.where(trials["variant"] == "trial-00007", 0.05, 0.0)
    trials["objective"] = 0.75 + gain + rng.normal(0, 0.01, len(trials))
    text = io.StringIO()
    print_confirmation(replace(confirmation, trials_full=trials), Console(file=text, width=80))
    told = " ".join(text.getvalue().split())
    assert "Best guess: trial-00007, expected 0.80" in told
    assert "Together, trial-00007, trial-00002: cross-validated AUC 0." in told
    assert "on 3 folds, +0." in told
    assert "medtune export studies/first --trial 7 --with 2 --out model" in told
    assert max(map(len, text.getvalue().splitlines())) <= 80
