"""Confirmation: the runs to repeat, when there is a winner, and the single evaluation of the test rows."""

import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from rich.console import Console
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from search_spaces.fixes import all_fixes, baseline, documented_after
from trainables.checkpoints import save_state, write_json
from trainables.config import build_config
from trainables.data.folds import split_rows
from trainables.data.manifest import read_manifest
from trainables.data.scans import Recipe
from trainables.data.volumes import open_cohort, prepare_cohort
from trainables.losses import logit_scale
from trainables.network.ema import AveragedWeights
from trainables.network.model import build_network
from trainables.subject_auc import subject_interval
from tune_app.cli.app import app
from tune_app.compare.confirm import (
    choose_candidates,
    confirmation_spec,
    judge,
    print_confirmation,
    same_plan,
    unfinished,
)
from tune_app.compare.seen_rows import scores_file
from tune_app.compare.test_rows import confirmed_on_test, score_test
from tune_app.results.loading import load_study
from tune_app.results.study import Study
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.synthetic import write_cohort

WriteStudy = Callable[..., Path]

CANDIDATES = {
    "documented": documented_after(3),
    "defaults": all_fixes(3),
    "trial-00007": {"max_m": 0.3, "s": 10.0},
}
SMALL = {"epochs": 3, "depth": 10, "width": 0.125, "volume_shape": 16, "num_folds": 4}


@pytest.fixture
def write_table(tmp_path: Path) -> Callable[..., Path]:
    """Write a table of empty volumes, a subject each, every third positive; with splits where asked."""

    def write(split: Callable[[int], str] | None = None, rows: int = 40) -> Path:
        table = pd.DataFrame(
            {
                "path": [f"{i}.nii" for i in range(rows)],
                "label": [int(i % 3 == 0) for i in range(rows)],
            }
        )
        table["subject"] = [f"s{i}" for i in range(rows)]
        if split is not None:
            table["split"] = [split(i // 3) for i in range(rows)]
        for name in table["path"]:
            (tmp_path / name).touch()
        table.to_csv(tmp_path / "table.csv", index=False)
        return tmp_path / "table.csv"

    return write


@pytest.fixture
def a_confirmation(write_study: WriteStudy) -> Study:
    """Four folds of two seeds, of which fold 0 chose the candidate."""
    options: dict[str, Any] = {
        "kind": "confirmation",
        "variants": CANDIDATES,
        "seeds": 2,
        "folds": 4,
        "epochs": 3,
    }
    return load_study(
        write_study("confirmation", **options, spec={"seen_folds": (0,), "config": SMALL})
    )


def with_objective(study: Study, gain: dict[str, float], noise: float = 0.004) -> Study:
    """The study with variants that differ by `gain`, and runs that differ by `noise` in addition to fold and seed."""
    rng = np.random.default_rng(3)
    trials = study.trials_full.copy()
    rows: Any = trials.itertuples()
    trials["objective"] = [
        0.75 + 0.02 * row.fold + gain.get(str(row.variant), 0.0) + rng.normal(0, noise)
        for row in rows
    ]
    return replace(study, trials_full=trials)


def printed(study: Study) -> str:
    text = io.StringIO()
    print_confirmation(study, Console(file=text, width=80))
    return text.getvalue()


# The plan --------------------------------------------------------------------------------------------------------------


def test_candidates_are_whole_sound_runs_each_setting_once_and_none_that_runs_anyway(
    write_study: WriteStudy,
) -> None:
    overrides: list[dict[str, Any]] = [
        {"max_m": 0.3},
        {"max_m": 0.3, "seed": 4},  # the same setting as before
        documented_after(6),
        {"s": 20.0},
        {"s": 25.0},
        {"s": 30.0},
        {"s": 12.0},
    ]
    planned = [{"variant": "a", "overrides": each} for each in overrides]
    study = load_study(write_study(kind="ablation", planned=planned, epochs=6))
    trials = study.trials_full.copy()
    trials["objective"] = [0.9, 0.95, 0.99, 0.97, 0.96, 0.98, 0.7]
    trials.loc[3, "state"] = "stopped"
    trials.loc[5, "verdict"] = "collapsed"
    study = replace(study, trials_full=trials)
    found = choose_candidates(study, 3)
    assert list(found.overrides) == ["trial-00004", "trial-00001", "trial-00006"]
    assert found.overrides["trial-00001"]["max_m"] == 0.3
    assert "seed" not in found.overrides["trial-00001"]
    assert "trial 00002 is the documented settings: run as such" in found.notes
    few = choose_candidates(study, 9)
    assert len(few.overrides) == 3
    assert "trial 00000 is the same as trial 00001: run as such" in few.notes
    assert "the search has 3 configurations to confirm, not 9" in few.notes


def test_a_confirmation_runs_new_seeds_on_all_folds_beside_the_documented_settings(
    write_study: WriteStudy, write_table: Callable[..., Path]
) -> None:
    root = write_study(trials=8, epochs=6, spec={"data": str(write_table())})
    search = load_study(root)
    spec, _ = confirmation_spec(search, top=2, seeds=2)
    names = list(dict.fromkeys(trial.variant for trial in spec.planned))
    assert names[:2] == ["documented", "defaults"]
    assert len(names) == 4
    assert spec.num_trials == 4 * 5 * 2
    assert {trial.overrides["seed"] for trial in spec.planned} == {1, 2}, "the search ran seed 0"
    assert spec.seen_folds == (0,)
    assert spec.confirms == str(search.path)
    assert spec.kind == "confirmation"
    first = spec.planned[0]
    assert {name: first.overrides[name] for name in documented_after(6)} == documented_after(6)
    for trial in spec.planned[2:4]:
        chosen = search.record(trial.variant.removeprefix("trial-"))["overrides"]
        assert {name: trial.overrides[name] for name in chosen} == chosen


def test_where_the_search_chose_by_the_tables_own_split_no_fold_is_unseen(
    write_study: WriteStudy, write_table: Callable[..., Path]
) -> None:
    table = write_table(split=lambda i: ("train", "val", "test")[i % 3])
    config = {"epochs": 6, "num_folds": 3}
    search = load_study(
        write_study(trials=6, epochs=6, spec={"data": str(table), "config": config})
    )
    spec, notes = confirmation_spec(search, top=1, seeds=1)
    assert spec.seen_folds == (0, 1, 2), "each holds some of the val rows"
    val = [i for i in range(40) if i // 3 % 3 == 1]
    assert list(spec.seen_rows or ()) == val
    assert all(trial.overrides["cross_validate"] for trial in spec.planned)
    assert any(f"the search chose by {len(val)} rows" in note for note in notes)
    own, notes = confirmation_spec(search, top=1, seeds=1, folds="own")
    assert own.seen_folds == (0,), "the very rows that chose"
    assert list(own.seen_rows or ()) == val


def test_rows_are_known_where_the_confirmation_cuts_the_table_otherwise_than_the_search(
    write_study: WriteStudy, write_table: Callable[..., Path]
) -> None:
    """After a search with cross_validate, the table's own val rows overlap the fold that chose."""
    table = write_table(split=lambda i: ("train", "val")[i % 4 == 0])
    config = {"epochs": 6, "num_folds": 3, "cross_validate": True, "fold": 1}
    search = load_study(
        write_study(trials=6, epochs=6, spec={"data": str(table), "config": config})
    )
    manifest = read_manifest(table)
    chose = split_rows(manifest, fold=1, num_folds=3, cross_validate=True).val.tolist()
    own, _ = confirmation_spec(search, top=1, seeds=1, folds="own")
    assert list(own.seen_rows or ()) == chose
    val = split_rows(manifest, fold=0, num_folds=3, cross_validate=False).val
    assert set(val.tolist()) & set(chose)
    assert own.seen_folds == (0,)
    everywhere, _ = confirmation_spec(search, top=1, seeds=1)
    assert everywhere.seen_folds == (1,), "the same folds: one has all of them, the others none"


def test_a_confirmation_that_has_hardly_begun_says_so_instead_of_failing(
    write_study: WriteStudy,
) -> None:
    planned = [{"variant": name, "overrides": {}} for name in CANDIDATES]
    study = load_study(write_study(kind="confirmation", planned=planned, epochs=3))
    begun = replace(
        study, trials_full=study.trials_full[study.trials_full["variant"] == "documented"]
    )
    assert "the confirmation has not started" in printed(begun)


def test_what_cannot_be_confirmed_is_refused(
    write_study: WriteStudy, an_ablation: Path, a_search: Path
) -> None:
    with pytest.raises(SpecError, match="kind ablation: name the search"):
        confirmation_spec(load_study(an_ablation))
    with pytest.raises(SpecError, match="top=0: 1 or more"):
        confirmation_spec(load_study(a_search), top=0)
    root = write_study(trials=6, epochs=6)
    with FileLock(StudyFiles(root).lock), pytest.raises(SpecError, match="still running"):
        confirmation_spec(load_study(root))
    study = load_study(root)
    trials = study.trials_full.assign(state="stopped")
    with pytest.raises(SpecError, match="no trial to confirm: 6 trials, 0 completed with a score"):
        choose_candidates(replace(study, trials_full=trials), 3)


def test_a_folder_that_holds_another_confirmation_is_not_gone_on_with(
    a_confirmation: Study, write_study: WriteStudy, write_table: Callable[..., Path]
) -> None:
    files = StudyFiles(a_confirmation.path)
    same_plan(files, a_confirmation.spec)
    search = load_study(write_study(trials=8, epochs=6, spec={"data": str(write_table())}))
    other, _ = confirmation_spec(search, top=1, seeds=1)
    with pytest.raises(
        SpecError, match=r"other candidates, folds or seeds .*trial-00007; 4 folds x 2 seeds"
    ):
        same_plan(files, other)


# When there is a winner ------------------------------------------------------------------------------------------------


def test_a_winner_is_named_when_the_data_do(a_confirmation: Study) -> None:
    found = judge(with_objective(a_confirmation, {"trial-00007": 0.08, "defaults": 0.01}))
    assert found.winner == "trial-00007"
    assert found.choice == "trial-00007"
    assert found.not_told_apart == ()
    assert found.folds == (1, 2, 3)
    assert found.unseen
    text = " ".join(printed(with_objective(a_confirmation, {"trial-00007": 0.08})).split())
    assert "Winner: trial-00007, better than the documented settings by +0.0" in text
    assert "after correction for 2 comparisons" in text
    assert "Judged on folds 1, 2, 3; fold 0 chose the candidates and is not counted." in text
    assert "max_m 0.3, s 10" in text


def test_without_a_difference_there_is_no_winner_and_the_documented_settings_stay(
    a_confirmation: Study,
) -> None:
    study = with_objective(a_confirmation, {}, noise=0.02)
    found = judge(study)
    assert found.winner is None
    assert found.choice == "documented"
    assert "No winner: the data distinguish none of them from the documented settings" in " ".join(
        printed(study).split()
    )


def test_a_difference_on_the_fold_that_chose_the_candidate_does_not_count(
    a_confirmation: Study,
) -> None:
    study = with_objective(a_confirmation, {})
    lucky = (study.trials_full["variant"] == "trial-00007") & (study.trials_full["fold"] == 0)
    trials = study.trials_full.assign(
        objective=study.trials_full["objective"] + 0.3 * lucky.to_numpy(float)
    )
    effects = judge(replace(study, trials_full=trials)).effects.set_index("variant")
    assert abs(effects["mean"]["trial-00007"]) < 0.02
    assert effects.loc["trial-00007", "pairs"] == 6


def write_scores(
    study: Study,
    rng: np.random.Generator,
    gain: Mapping[str, float],
    *,
    rows: int = 60,
    subjects_sd: float = 0.5,
) -> None:
    """Validation scores of every run: a signal of 1 plus the variant's gain, noise of the subjects, of variant and run."""
    labels = np.arange(rows * 4) % 3 == 0
    habits = {name: rng.normal(0, subjects_sd, rows * 4) for name in CANDIDATES}
    common = rng.normal(0, subjects_sd, rows * 4)
    runs = {}
    for trial in study.trials_full.to_dict("records"):
        own = np.arange(trial["fold"] * rows, (trial["fold"] + 1) * rows)
        signal = 1 + gain.get(trial["variant"], 0.0) + rng.normal(0, 0.15)
        noise = rng.normal(0, 0.6, rows)
        scores = signal * labels[own] + common[own] + habits[trial["variant"]][own] + noise
        runs[str(trial["trial"])] = {"rows": own.tolist(), "scores": scores.tolist()}
    written = {"format": 1, "labels": labels.astype(int).tolist(), "runs": runs}
    written["subjects"] = [f"s{row}" for row in range(rows * 4)]
    write_json(scores_file(study.path), written)


def seen(study: Study, folds: tuple[int, ...], rows: Iterable[int] | None = None) -> Study:
    update: dict[str, Any] = {"seen_folds": folds}
    update["seen_rows"] = None if rows is None else tuple(rows)
    return replace(study, spec=study.spec.model_copy(update=update))


def test_with_one_unseen_fold_there_is_an_interval_over_its_subjects_and_no_winner(
    a_confirmation: Study,
) -> None:
    study = seen(with_objective(a_confirmation, {"trial-00007": 0.08}), (0, 1, 2))
    bare = judge(study)
    assert (bare.basis, bare.folds, bare.winner) == ("subjects", (3,), None)
    assert bare.effects["low"].isna().all(), "the seeds of one split give no interval"
    assert "scores the validation rows one by one" in " ".join(printed(study).split())
    write_scores(study, np.random.default_rng(1), {"trial-00007": 2.0})
    found = judge(study)
    assert (found.basis, found.folds, found.unseen, found.rows) == ("subjects", (3,), True, 60)
    assert found.winner is None
    assert found.choice == "documented"
    assert found.ahead == "trial-00007"
    row = found.effects.set_index("variant").loc["trial-00007"]
    assert 0 < row["low"] < row["mean"] < row["high"]
    assert np.isnan(row["p"])
    assert row["call"] == "cannot tell"
    assert found.effects["own_low"].isna().all()
    text = " ".join(printed(study).split())
    assert "No winner: fewer than two folds are unseen" in text
    assert "trial-00007 is ahead of the documented settings by +0." in text
    assert "medtune confirm SEARCH --folds all --out NEW" in text
    assert max(map(len, printed(study).splitlines())) <= 80


def test_rows_that_chose_speak_for_nobody_and_say_so(a_confirmation: Study) -> None:
    study = seen(a_confirmation, (0, 1, 2, 3))
    write_scores(study, np.random.default_rng(1), {"trial-00007": 2.0})
    found = judge(study)
    assert (found.unseen, found.winner, found.ahead) == (False, None, "trial-00007")
    assert "but the search chose it by these volumes." in " ".join(printed(study).split())


def test_folds_count_by_their_rows_that_the_search_did_not_choose_by(
    a_confirmation: Study,
) -> None:
    """The search chose by a third of each fold, as where a table's own val rows did."""
    study = seen(a_confirmation, (0, 1, 2, 3), [row for row in range(240) if row % 60 < 20])
    write_scores(study, np.random.default_rng(4), {"trial-00007": 2.5})
    found = judge(study)
    assert (found.basis, found.folds, found.rows, found.unseen) == ("rows", (0, 1, 2, 3), 160, True)
    assert found.winner == "trial-00007"
    assert "Judged on the 160 validation rows of folds 0, 1, 2, 3 that the search" in " ".join(
        printed(study).split()
    )
    written = json.loads(scores_file(study.path).read_text())
    labels = np.array(written["labels"])
    values: dict[str, list[float]] = {"trial-00007": [], "documented": []}
    for trial in study.trials_full.to_dict("records"):
        if trial["variant"] in values:
            rows = np.array(written["runs"][trial["trial"]]["rows"])
            kept = rows % 60 >= 20
            scores = np.array(written["runs"][trial["trial"]]["scores"])[kept]
            values[trial["variant"]].append(roc_auc_score(labels[rows[kept]], scores))
    row = found.effects.set_index("variant").loc["trial-00007"]
    expected = np.mean(values["trial-00007"]) - np.mean(values["documented"])
    assert row["mean"] == pytest.approx(expected, abs=1e-12)


def test_under_a_simulated_null_no_winner_comes_from_one_split_and_the_interval_holds(
    a_confirmation: Study,
) -> None:
    """A t-test with seeds as its units named one in 26 to 74 % of the cases, with intervals that covered 31 to 63 %."""
    study, rng = seen(a_confirmation, (0, 1, 2)), np.random.default_rng(0)
    covered = []
    for _ in range(20):
        write_scores(study, rng, {})
        found = judge(study)
        assert found.winner is None
        others = found.effects[found.effects["variant"] != "documented"]
        covered += ((others["low"] <= 0) & (others["high"] >= 0)).tolist()
    assert len(covered) == 40
    assert np.mean(covered) >= 0.85


def test_the_best_of_several_has_to_hold_against_their_number(a_confirmation: Study) -> None:
    study = with_objective(a_confirmation, {})
    trials = study.trials_full.copy()
    level = {
        "documented": (0.0, 0.0, 0.0),
        "defaults": (0.01, -0.01, 0.004),
        "trial-00007": (0.015, 0.025, 0.02),
    }
    rows: Any = trials.itertuples()
    trials["objective"] = [
        0.8 + (level[str(row.variant)][int(row.fold) - 1] if row.fold else 0.0) for row in rows
    ]
    study = replace(study, trials_full=trials)
    found = judge(study)
    row = found.effects.set_index("variant").loc["trial-00007"]
    assert row["call"] == "better"
    assert row["p"] < 0.05 < row["p_holm"]
    assert found.winner is None
    text = " ".join(printed(study).split())
    assert "trial-00007 would be better if it were the only one compared" in text


def test_a_variant_that_lost_runs_is_no_winner(a_confirmation: Study) -> None:
    study = with_objective(a_confirmation, {"trial-00007": 0.08})
    assert judge(study).winner == "trial-00007"
    trials = study.trials_full.copy()
    own = trials.index[(trials["variant"] == "trial-00007") & (trials["fold"] == 2)]
    trials.loc[own[:1], "objective"] = np.nan
    found = judge(replace(study, trials_full=trials))
    assert found.winner is None
    assert found.effects.set_index("variant").loc["trial-00007", "unscored"] == 1
    text = " ".join(printed(replace(study, trials_full=trials)).split())
    assert "trial-00007 cannot win: 1 of its runs ended without a score" in text


def test_what_is_not_told_apart_from_the_winner_is_named(a_confirmation: Study) -> None:
    found = judge(with_objective(a_confirmation, {"trial-00007": 0.08, "defaults": 0.079}))
    assert {found.winner, *found.not_told_apart} == {"trial-00007", "defaults"}


def test_no_winner_is_named_before_the_end(write_study: WriteStudy) -> None:
    options: dict[str, Any] = {
        "kind": "confirmation",
        "variants": CANDIDATES,
        "seeds": 2,
        "folds": 3,
        "epochs": 3,
    }
    study = load_study(write_study(**options, unfinished=2))
    assert unfinished(study) == 2
    study = with_objective(study, {"trial-00007": 0.2})
    assert judge(study).winner is None
    assert "Not finished: 2 of 18 runs have not ended, and no winner is named before." in " ".join(
        printed(study).split()
    )


def test_the_printed_confirmation_fits_80_columns(a_confirmation: Study) -> None:
    for gain in ({}, {"trial-00007": 0.1}):
        assert max(map(len, printed(with_objective(a_confirmation, gain)).splitlines())) <= 80


def test_the_interval_of_a_mean_is_shown_within_what_an_auc_can_be(a_confirmation: Study) -> None:
    table = printed(with_objective(a_confirmation, {"trial-00007": -0.2}, noise=0.5))
    shown = re.findall(r"\d \[(-?\d\.\d+), (-?\d\.\d+)\]", table)
    assert any(low == "0.000" or high == "1.000" for low, high in shown)
    assert all(0 <= float(low) < float(high) <= 1 for low, high in shown)


def test_a_study_that_is_no_confirmation_is_not_judged(an_ablation: Path) -> None:
    with pytest.raises(SpecError, match="kind ablation, not a confirmation"):
        judge(load_study(an_ablation))


# The test rows ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cohort_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort of real files in which every fourth subject is for the test."""
    table = write_cohort(
        tmp_path_factory.mktemp("confirm") / "cohort", subjects=24, side=(16, 18), noise=0.3
    )
    rows = pd.read_csv(table)
    number = rows["subject"].str[-4:].astype(int)
    rows["split"] = np.where(number % 3 == 0, "test", "train")
    rows.to_csv(table, index=False)
    return table


@pytest.fixture
def finished(write_study: WriteStudy, cohort_table: Path) -> Callable[..., Path]:
    """Write a finished confirmation with a winner by 0.3, and averaged weights of every run."""

    def write(name: str = "search", table: Path = cohort_table, gain: float = 0.3) -> Path:
        search = write_study(name, trials=4, epochs=3)
        spec = {"config": SMALL, "data": str(table), "confirms": str(search), "seen_folds": (0,)}
        root = write_study(
            f"{name}/confirmation",
            kind="confirmation",
            variants=CANDIDATES,
            seeds=1,
            folds=4,
            epochs=3,
            effect={"trial-00007": gain, "documented": -gain},
            spec=spec,
        )
        files = StudyFiles(root)
        manifest = read_manifest(table)
        cohort = prepare_cohort(
            manifest, Recipe.from_config(build_config(SMALL)), table.parents[2] / "cache"
        )
        files.write({**files.read(), "cohort": cohort.name})
        train = np.flatnonzero(manifest.rows["split"] != "test")
        for number, trial in enumerate(files.read_spec().planned):
            config = build_config(SMALL | trial.overrides)
            torch.manual_seed(number)
            network = small_network(config)
            average = AveragedWeights(network, decay=0.9)
            state = {
                "format": 1,
                "config": config.model_dump(mode="json"),
                "epoch": 2,
                "average": average.state_dict(),
            }
            rows = {
                "train_rows": torch.as_tensor(train[4:]),
                "val_rows": torch.as_tensor(train[:4]),
            }
            save_state(files.trial(f"{number:05d}").best, state | rows | {"row": {}})
        return root

    return write


def small_network(config: Any) -> Any:
    return build_network(
        depth=10,
        width=0.125,
        geometry="strided",
        head=config.head,
        num_classes=2,
        in_channels=1,
        dropout=config.dropout,
    ).eval()


def test_the_test_rows_are_scored_once_with_the_winner_and_on_record(
    finished: Callable[..., Path], cohort_table: Path
) -> None:
    root = finished()
    cache = cohort_table.parents[1] / "cache"
    record = score_test(root, cache=cache)
    files = StudyFiles(root.parent)
    assert json.loads(files.test.read_text())["scored"] == [record]
    assert record["variant"] == "trial-00007"
    assert record["winner"] is True
    assert record["times"] == 1
    assert record["study_hash"] == load_study(root).spec.hash()

    # The ensemble by hand, from the same files
    manifest = read_manifest(cohort_table)
    rows = np.flatnonzero(manifest.rows["split"] == "test")
    labels = manifest.rows["label"].to_numpy()[rows]
    cohort = open_cohort(prepare_cohort(manifest, Recipe.from_config(build_config(SMALL)), cache))
    volumes = torch.from_numpy(cohort.volumes[rows].astype(np.float32))
    odds = []
    for number, trial in enumerate(load_study(root).spec.planned):
        if trial.variant != "trial-00007":
            continue
        config = build_config(SMALL | trial.overrides)
        network = small_network(config)
        state = torch.load(StudyFiles(root).trial(f"{number:05d}").best, weights_only=True)
        network.load_state_dict(state["average"]["network"])
        with torch.no_grad():
            logits = network(volumes).double().numpy()
        odds.append(logit_scale(config.loss, config.head, config.s) * (logits[:, 1] - logits[:, 0]))
    assert len(odds) == 4
    ensemble = np.mean(odds, axis=0)
    assert record["auc"] == pytest.approx(roc_auc_score(labels, ensemble), abs=1e-9)
    of_subjects = subject_interval(ensemble, labels, cohort.subjects[rows])
    assert record["auc_low"] == pytest.approx(of_subjects.low, abs=1e-9)
    assert record["auc_high"] == pytest.approx(of_subjects.high, abs=1e-9)
    assert record["mean_auc"] == pytest.approx(
        np.mean([roc_auc_score(labels, each) for each in odds]), abs=1e-9
    )
    assert [run["auc"] for run in record["runs"]] == pytest.approx(
        [roc_auc_score(labels, each) for each in odds]
    )
    assert record["documented"]["difference"] == pytest.approx(
        record["auc"] - record["documented"]["auc"]
    )
    assert record["positive"] == labels.sum()

    text = " ".join(printed(load_study(root)).split())
    assert f"ensemble of 4 runs: AUC {record['auc']:.3f} [95 % CI" in text
    assert f"config {record['config_hash']}" in text


def test_a_second_look_shows_the_record_and_scores_only_when_asked_which_counts(
    finished: Callable[..., Path], cohort_table: Path
) -> None:
    root = finished()
    cache = cohort_table.parents[1] / "cache"
    first = score_test(root, cache=cache)
    weights = {path: path.read_bytes() for path in root.glob("trials/*/best.pt")}
    for path in weights:
        path.unlink()
    assert score_test(root, cache=cache) == first, (
        "nothing is scored: the weights are not even there"
    )
    said = io.StringIO()
    confirmed_on_test(
        root.parent, root, cache=cache, again=False, notes=Console(file=said, width=200)
    )
    assert "The test rows were scored before" in said.getvalue()
    with pytest.raises(SpecError, match="the weights of trial 00002 are gone"):
        score_test(root, cache=cache, again=True)
    for path, content in weights.items():
        path.write_bytes(content)
    second = score_test(root, cache=cache, again=True)
    assert second["times"] == 2
    recorded = json.loads(StudyFiles(root.parent).test.read_text())["scored"]
    assert recorded == [first, second]
    assert "look number 2 at the test rows: the first one is the honest one" in " ".join(
        printed(load_study(root)).split()
    )


def test_without_a_winner_the_documented_settings_are_scored(
    finished: Callable[..., Path], cohort_table: Path
) -> None:
    record = score_test(finished(gain=0.0), cache=cohort_table.parents[1] / "cache")
    assert record["variant"] == "documented"
    assert record["winner"] is False
    assert "documented" not in record


def test_what_must_not_be_scored_is_refused(
    finished: Callable[..., Path], cohort_table: Path, write_study: WriteStudy, tmp_path: Path
) -> None:
    cache = cohort_table.parents[1] / "cache"
    with pytest.raises(SpecError, match="no confirmation here: `medtune confirm"):
        confirmed_on_test(
            tmp_path, tmp_path / "confirmation", cache=cache, again=False, notes=Console()
        )

    options: dict[str, Any] = {
        "kind": "confirmation",
        "variants": CANDIDATES,
        "seeds": 2,
        "folds": 3,
        "epochs": 3,
    }
    unended = write_study("unended", **options, unfinished=2)
    with pytest.raises(SpecError, match=r"2 of 18 runs have not ended.*scored at the very end"):
        score_test(unended, cache=cache)

    root = finished("overlap")
    path = StudyFiles(root).trial("00002").best
    state = torch.load(path, weights_only=True)
    save_state(path, state | {"train_rows": torch.arange(100)})
    with pytest.raises(SpecError, match="trial 00002 was trained on test rows"):
        score_test(root, cache=cache)

    files = StudyFiles(finished("changed"))
    files.write({**files.read(), "cohort": "another"})
    with pytest.raises(SpecError, match="the data changed since the confirmation"):
        score_test(files.root, cache=cache)

    rows = pd.read_csv(cohort_table).drop(columns="split")
    plain = cohort_table.with_name("plain.csv")
    rows.to_csv(plain, index=False)
    root = finished("plain")
    files = StudyFiles(root)
    info = files.read()
    files.write({**info, "spec": {**info["spec"], "data": str(plain)}})
    with pytest.raises(SpecError, match="no test rows: name them in a column `split`"):
        score_test(root, cache=cache)
    assert not StudyFiles(root.parent).test.exists(), "a refused scoring does not count as a look"


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_is_confirmed_and_tested_from_the_command_line(
    write_study: WriteStudy, cohort_table: Path
) -> None:
    config = SMALL | {
        "epochs": 2,
        "num_folds": 3,
        "train_auc_volumes": 0,
        "augmentation_strength": 0,
    }
    config |= {"gradient_accumulation_steps": 1}
    space = {
        "search": {"max_m": {"low": 0.05, "high": 0.5}, "s": {"low": 4, "high": 40, "log": True}}
    }
    planned = {
        "data": str(cohort_table),
        "config": config,
        "space": space,
        "policy": {"halving": False},
    }
    planned |= {"cache": str(cohort_table.parents[1] / "cache")}
    root = write_study(
        "searched",
        kind="ablation",
        planned=[{"variant": "a", "overrides": {"max_m": 0.4}}],
        spec=planned,
    )
    files = StudyFiles(root)
    info = files.read()
    files.write({**info, "spec": {**info["spec"], "kind": "search", "planned": []}})

    def medtune(*words: str) -> Any:
        return CliRunner().invoke(app, ["confirm", str(root), *words], env={"COLUMNS": "80"})

    assert "no confirmation here" in str(medtune("--test").exception)
    ran = medtune("--top", "1", "--folds", "1,2", "--seeds", "1")
    assert ran.exit_code == 0, ran.output
    study = load_study(files.confirmation)
    assert study.trials_full["state"].tolist() == ["completed"] * 6
    assert list(dict.fromkeys(study.trials_full["variant"])) == [
        "documented",
        "defaults",
        "trial-00000",
    ]
    assert "Judged on folds 1, 2; none of their rows chose the candidates." in ran.stdout
    once_more = medtune("--top", "1", "--folds", "1,2", "--seeds", "1")
    assert once_more.exit_code == 0, "a finished confirmation is shown, and nothing runs"
    assert "Judged on folds 1, 2" in once_more.stdout
    assert "--out starts another" in str(
        medtune("--top", "1", "--folds", "1,2", "--seeds", "2").exception
    )
    tested = medtune("--test")
    assert tested.exit_code == 0, tested.output
    assert "single runs: mean AUC" in tested.stdout
    record = files.test.read_bytes()
    again = medtune("--test")
    assert "scored before" in again.stderr
    assert again.stdout == tested.stdout
    assert files.test.read_bytes() == record
    assert medtune("--again").exit_code == 2


def test_the_documented_settings_are_the_reference_and_not_the_original_ones() -> None:
    assert CANDIDATES["documented"] != baseline(3)
