"""Ablations: the plan, the conclusions from its runs, and a real one that is killed and continues."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from search_spaces.ablations import variants
from trainables.data.manifest import read_manifest
from trainables.data.table_file import ManifestError
from tune_app.cli.app import app
from tune_app.compare.ablation import (
    ablation_spec,
    choose_folds,
    comparisons,
    effect_lines,
    only,
    print_ablation,
    read_variants,
    run_lines,
)
from tune_app.results.effects import interval_over_folds
from tune_app.results.loading import load_study
from tune_app.results.study import Study
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.rows import read_rows
from tune_app.study.spec import build_spec
from tune_app.synthetic import write_cohort

WriteStudy = Callable[..., Path]
WriteTable = Callable[..., Path]


@pytest.fixture
def write_table(tmp_path: Path) -> WriteTable:
    """Write a table of empty volumes, a subject each, every third positive; columns by name, a value a row."""

    def write(rows: int = 30, **columns: Any) -> Path:
        table = pd.DataFrame(
            {"path": [f"{i}.nii" for i in range(rows)], "label": [i % 3 == 0 for i in range(rows)]}
        )
        table["label"] = table["label"].astype(int)
        table["subject"] = [f"s{i}" for i in range(rows)]
        for name, value in columns.items():
            table[name] = [value(i) for i in range(rows)]
        for name in table["path"]:
            (tmp_path / name).touch()
        table.to_csv(tmp_path / "table.csv", index=False)
        return tmp_path / "table.csv"

    return write


def with_objective(study: Study, value: Callable[[Any], float]) -> Study:
    """The study with another objective in every trial: `value` of its row."""
    trials = study.trials_full.copy()
    trials["objective"] = [value(row) for row in trials.itertuples()]
    trials["last_val_auc"] = trials["objective"]
    return replace(study, trials_full=trials)


def printed(study: Study) -> str:
    text = io.StringIO()
    print_ablation(study, Console(file=text, width=80))
    return text.getvalue()


# The plan --------------------------------------------------------------------------------------------------------------


def test_a_plan_is_every_variant_on_every_fold_with_every_seed_and_paired_from_the_start(
    write_table: WriteTable,
) -> None:
    chosen = variants("documented", 8)
    spec = ablation_spec(
        write_table(), chosen, seeds=2, folds="0,2", config={"epochs": 8, "num_folds": 3}
    )
    runs = [
        (trial.overrides["seed"], trial.overrides["fold"], trial.variant) for trial in spec.planned
    ]
    assert runs == [(seed, fold, name) for seed in (0, 1) for fold in (0, 2) for name in chosen]
    assert spec.kind == "ablation"
    assert spec.num_trials == 20
    assert all(trial.overrides["cross_validate"] is False for trial in spec.planned)
    assert build_spec(spec.model_dump(mode="json")) == spec
    for trial in spec.planned:
        assert {name: trial.overrides[name] for name in chosen[trial.variant]} == chosen[
            trial.variant
        ]


def test_a_plan_with_later_seeds_adds_to_an_earlier_one(write_table: WriteTable) -> None:
    table = write_table()
    given: Any = {"folds": "1", "config": {"epochs": 8, "num_folds": 3}}
    both = ablation_spec(table, variants("documented", 8), seeds=3, **given).planned
    first = ablation_spec(table, variants("documented", 8), seeds=2, **given).planned
    later = ablation_spec(table, variants("documented", 8), seeds=1, first_seed=2, **given).planned
    assert both == first + later
    with pytest.raises(SpecError) as refused:
        ablation_spec(table, variants("documented"), seeds=0, first_seed=-1, config={})
    assert refused.value.problems == ["seeds=0: 1 or more", "first_seed=-1: 0 or more"]


def test_folds_are_those_of_the_table_or_made_ones_over_its_train_and_val_rows(
    write_table: WriteTable,
) -> None:
    plain = read_manifest(write_table())
    assert choose_folds(plain, "all", 4).numbers == (0, 1, 2, 3)
    assert choose_folds(plain, "all", 4).overrides(1) == {
        "fold": 1,
        "cross_validate": False,
        "num_folds": 4,
    }
    named = read_manifest(write_table(fold=lambda i: i // 3 % 2))
    assert choose_folds(named, "all", 5).numbers == (0, 1)
    assert choose_folds(named, "1", 5).overrides(1)["num_folds"] == 2
    split = read_manifest(write_table(split=lambda i: ("train", "val", "test")[(i // 3) % 3]))
    assert choose_folds(split, "all", 3).overrides(2) == {
        "fold": 2,
        "cross_validate": True,
        "num_folds": 3,
    }
    own = choose_folds(split, "own", 3)
    assert own.numbers == (0,)
    assert own.overrides(0)["cross_validate"] is False


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("own", "folds=own needs rows with split=val, and there are none: use all"),
        ("0,4", r"no fold 4: there are 0, 1, 2 \(or all, or own\)"),
        ("0,0", "each fold once"),
        ("first", "folds='first': all, own, or numbers such as 0,1,2"),
    ],
)
def test_folds_that_are_not_there_are_refused(
    write_table: WriteTable, asked: str, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        choose_folds(read_manifest(write_table()), asked, 3)


def test_a_fold_without_a_class_is_told_before_anything_runs(write_table: WriteTable) -> None:
    with pytest.raises(ManifestError, match="class"):
        choose_folds(read_manifest(write_table(rows=6)), "all", 3)


def test_settings_that_would_be_without_effect_are_refused_all_at_once(
    write_table: WriteTable,
) -> None:
    with pytest.raises(SpecError) as refused:
        ablation_spec(
            write_table(),
            variants("documented"),
            seeds=1,
            config={"max_m": 0.4, "fold": 1, "dropout": 0.2},
        )
    assert refused.value.problems == [
        "max_m is decided by the variants: leave it out",
        "fold is decided by folds: leave it out",
    ]


def test_variants_may_be_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("reference:\nwider: {max_m: 0.5}\n")
    assert read_variants(str(path), 60) == {"reference": {}, "wider": {"max_m": 0.5}}
    assert read_variants("add-one", 30) == variants("add-one", 30)


def test_a_variants_checkpoint_starts_at_the_file_that_names_it(tmp_path: Path) -> None:
    """Trials stand elsewhere; and where the user stands does not matter either."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "scratch: {pretrained_path: null}\npretrained: {pretrained_path: weights/resnet_50.pth}\n"
    )
    found = read_variants(str(path), 60)
    assert found["scratch"]["pretrained_path"] is None
    assert found["pretrained"]["pretrained_path"] == str(tmp_path / "weights" / "resnet_50.pth")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one: {}\n", "two or more variants by name, the reference first"),
        ("a: 3\nb: {}\n", "a: a variant is a mapping of hyperparameters to values"),
        ("a: [\n", "not YAML"),
        (None, "cannot be read as text"),
    ],
)
def test_variants_that_cannot_be_read_are_told(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpecError, match=message):
        read_variants(str(path), 60)


def test_an_unknown_set_of_variants_gets_a_suggestion() -> None:
    with pytest.raises(SpecError, match=r"did you mean 'add-one'.*or a YAML file of your own"):
        read_variants("addone", 60)


def test_variants_with_an_impossible_value_are_told_by_name(write_table: WriteTable) -> None:
    with pytest.raises(SpecError, match=r"variant odd: .*max_m=-1") as caught:
        ablation_spec(write_table(), {"a": {}, "odd": {"max_m": -1}}, seeds=2, config={})
    assert len(caught.value.problems) == 1, "once, not for every fold and seed"


# Conclusions from the runs ---------------------------------------------------------------------------------------------


def test_what_is_left_out_is_read_against_all_fixes_and_the_rest_against_the_baseline(
    write_study: WriteStudy,
) -> None:
    chosen = {
        name: overrides for name, overrides in variants("all", 5).items() if "looser" not in name
    }
    study = load_study(write_study(variants=chosen, epochs=5))
    first, second = comparisons(study)
    assert first.attrs["baseline"] == "baseline"
    assert not any(name.startswith("without-") for name in first["variant"])
    assert second.attrs["baseline"] == "all-fixes"
    assert all(name.startswith(("all-fixes", "without-")) for name in second["variant"])
    assert set(first["variant"]) | set(second["variant"]) == set(chosen)
    assert [
        table.attrs["baseline"]
        for table in comparisons(only(study, ["all-fixes", "without-ema-warmup"]))
    ] == ["all-fixes"]
    assert comparisons(only(study, ["baseline"])) == []


def test_a_planted_effect_comes_out_and_one_that_is_not_there_does_not(
    write_study: WriteStudy,
) -> None:
    study = load_study(
        write_study(variants={"base": {}, "real": {}, "none": {}}, seeds=3, folds=5, epochs=3)
    )
    noise = np.random.default_rng(1)

    def value(trial: Any) -> float:
        level = 0.7 + 0.02 * trial.fold + 0.04 * (trial.variant == "real")
        return float(level + noise.normal(0, 0.01))

    [effects] = comparisons(with_objective(study, value))
    calls = effects.set_index("variant")["call"]
    assert calls["real"] == "better"
    assert calls["none"] == "cannot tell"
    lines = effect_lines(effects)
    assert any(line.startswith("real is better than base: +0.0") for line in lines)
    assert any(line.startswith("The data do not distinguish none from base") for line in lines)


def test_an_effect_that_may_be_the_luck_of_several_comparisons_says_so(
    write_study: WriteStudy,
) -> None:
    names = ["base", *"abcdef"]
    study = load_study(write_study(variants={name: {} for name in names}, folds=4, epochs=3))
    wiggle = {"a": (1.5, 2.0, 1.6, 2.6), **dict.fromkeys("bcdef", (1.0, -1.0, 0.5, -0.5))}

    def value(trial: Any) -> float:
        return 0.7 + 0.01 * wiggle.get(trial.variant, (0.0,) * 4)[trial.fold]

    [effects] = comparisons(with_objective(study, value))
    row = effects.set_index("variant").loc["a"]
    assert row["call"] == "better"
    assert row["p_holm"] > 0.05 > row["p"]
    assert any(
        "less sure as one of 6 comparisons (Holm p" in line for line in effect_lines(effects)
    )


def test_runs_too_few_for_an_interval_and_runs_that_are_the_same_are_said_in_words(
    write_study: WriteStudy,
) -> None:
    study = load_study(write_study(variants={"base": {}, "other": {}}, epochs=3))
    [effects] = comparisons(
        with_objective(study, lambda trial: 0.7 + 0.1 * (trial.variant == "other"))
    )
    assert effect_lines(effects)[0] == (
        "The data do not distinguish other from base: one pair has no interval. Give more seeds or folds."
    )
    study = load_study(write_study("same", variants={"base": {}, "other": {}}, seeds=3, epochs=3))
    [effects] = comparisons(with_objective(study, lambda trial: 0.7 + 0.1 * trial.seed))
    assert (
        effect_lines(effects)[0]
        == "other and base score the same in every pair: no run reads what is changed."
    )


def test_two_folds_that_happen_to_differ_alike_are_not_taken_for_certainty(
    write_study: WriteStudy,
) -> None:
    """It named a winner with p 0.000: 1 - 303/390 on one fold and 384/390 - 297/390 on the other are the same."""
    study = load_study(write_study(variants={"base": {}, "other": {}}, folds=2, epochs=3))
    steps = {("base", 0): 303, ("other", 0): 390, ("base", 1): 297, ("other", 1): 384}
    [effects] = comparisons(
        with_objective(study, lambda trial: steps[trial.variant, trial.fold] / 390)
    )
    row = effects.set_index("variant").loc["other"]
    assert row["mean"] == pytest.approx(87 / 390)
    assert row["call"] == "cannot tell"
    assert row[["low", "high", "p", "p_holm"]].isna().all()
    assert effect_lines(effects)[0].startswith(
        "The data do not distinguish other from base: the difference is the same in"
    )


def test_collapsed_runs_their_diagnoses_and_what_is_in_no_pair_are_told(
    write_study: WriteStudy,
) -> None:
    lagging = {"ema_warmup": False, "ema_decay": 0.999, "ema_buffers": "copied"}
    study = load_study(
        write_study(variants={"base": {}, "lags": lagging}, seeds=3, epochs=15, failed=(0,))
    )
    trials = study.trials_full.copy()
    trials.loc[trials["trial"] == "00002", "objective"] = np.nan
    lines = run_lines(replace(study, trials_full=trials))
    assert any(
        line.startswith("  lags: 3 of 3 runs collapsed for good; 3 ema lag (since epoch ")
        for line in lines
    )
    trials.loc[trials["variant"] == "base", "healed_epochs"] = [16, 30, 0]
    assert (
        "  base: 0 of 3 runs collapsed for good; 2 for 16 to 30 epochs, and came back"
        in run_lines(replace(study, trials_full=trials))
    )
    assert "failed, and in no pair: 00000 (base)" in lines
    assert (
        "without a finite score, and in no pair: 00002 (base); their variant is not called better"
        in lines
    )


def test_one_fold_calls_nothing_however_close_its_seeds_are(write_study: WriteStudy) -> None:
    """All runs share the fold's volumes, and a test over seeds takes their luck for a property of the variant."""
    study = load_study(write_study(variants={"base": {}, "other": {}}, seeds=5, epochs=3))
    study = with_objective(
        study, lambda trial: 0.7 + 0.05 * (trial.variant == "other") + 0.001 * trial.seed**2
    )
    trials = study.trials_full.assign(
        objective=study.trials_full["objective"]
        + np.where(study.trials_full["variant"] == "other", 0.0004 * study.trials_full["seed"], 0.0)
    )
    study = replace(study, trials_full=trials)
    row = study.effects(baseline="base").set_index("variant").loc["other"]
    assert row["low"] > 0
    assert np.isnan(row["p"])
    assert np.isnan(row["p_holm"])
    assert row["call"] == "cannot tell"
    assert "That is no test: all runs share its volumes. Give more folds." in " ".join(
        printed(study).split()
    )


@pytest.mark.parametrize("loser", ["base", "other"])
def test_the_survivors_of_a_variant_do_not_win(write_study: WriteStudy, loser: str) -> None:
    """5 of 12 runs without a finite score: the other 7 are better, and neither variant is called better."""
    study = load_study(write_study(variants={"base": {}, "other": {}}, seeds=3, folds=4, epochs=3))
    sign = 1 if loser == "other" else -1

    def score(trial: Any) -> float:
        gain = sign * 0.05 + 0.003 * trial.fold
        level = 0.7 + gain * (trial.variant == "other")
        return float(level + 0.002 * trial.fold * trial.seed)

    whole = with_objective(study, score)
    effects = whole.effects(baseline="base").set_index("variant")
    assert effects.loc["other", "call"] == ("better" if loser == "other" else "worse")
    assert effects["unscored"].tolist() == [0, 0]
    trials = whole.trials_full.copy()
    lost = trials.index[trials["variant"] == loser][:5]
    trials.loc[lost, "objective"] = np.nan
    effects = replace(whole, trials_full=trials).effects(baseline="base").set_index("variant")
    assert effects.loc["other", "call"] == "cannot tell"
    assert effects.loc["other", "pairs"] == 7
    assert effects.loc[loser, "unscored"] == 5
    text = " ".join(printed(replace(whole, trials_full=trials)).split())
    assert f"but runs of {loser} ended without a score" in text


def test_a_late_collapse_that_the_best_epochs_hide_is_told(write_study: WriteStudy) -> None:
    study = load_study(write_study(variants={"base": {}, "late": {}}, seeds=2, folds=3, epochs=3))
    trials = study.trials_full.copy()
    late, wiggle = trials["variant"] == "late", 0.003 * trials["fold"].astype(int)
    trials["objective"] = np.where(late, 0.8 - wiggle, 0.8 + wiggle)
    trials["last_val_auc"] = np.where(late, 0.5 - wiggle, 0.79 + wiggle)
    text = " ".join(printed(replace(study, trials_full=trials)).split())
    assert "In the last epoch instead of the best, it reads otherwise for: late -0.29" in text


def test_the_printed_ablation_fits_80_columns_with_the_longest_names(
    write_study: WriteStudy,
) -> None:
    study = load_study(write_study(variants=variants("all", 6), seeds=2, folds=2, epochs=6))
    text = printed(study)
    assert max(map(len, text.splitlines())) <= 80
    for name in variants("all"):
        assert name in text, "names are not cut"
    assert "…" not in text


def test_an_interval_covers_where_folds_differ_more_than_seeds() -> None:
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([range(5), range(3)], names=["fold", "seed"])
    covered = 0
    for _ in range(300):
        shared, folds = rng.normal(0, np.sqrt(0.2)), rng.normal(0, np.sqrt(0.8), 5)
        values = pd.Series(shared + np.repeat(folds, 3) + rng.normal(0, 0.1, 15), index)
        found = interval_over_folds(values, 5)
        covered += found["low"] < 0 < found["high"]
    assert covered / 300 == pytest.approx(
        0.95, abs=0.04
    )  # 0.83 if the 15 runs were taken for independent


# A real one ------------------------------------------------------------------------------------------------------------

PLANTED = {
    "reference": {},
    "stale-average": {"ema_decay": 0.9999, "ema_warmup": False, "ema_buffers": "copied"},
    "unread-beta": {"drw_beta": 0.5},
}
"""An average that stays at the initial weights must matter; the weights of classes that are never re-weighted cannot."""

EPOCHS, FOLDS = 6, 4
SETTINGS = {
    "depth": 10,
    "width": 0.125,
    "volume_shape": 16,
    "backbone_lr": 1e-3,
    "classifier_lr": 3e-3,
    "gradient_accumulation_steps": 1,
    "augmentation_strength": 0,
    "dropout": 0,
    "train_auc_volumes": 0,
    "drw_start_epoch": 100,
    "num_folds": FOLDS,
}


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_ablation_goes_on_and_tells_what_matters_from_what_does_not(
    tmp_path: Path,
) -> None:
    table = write_cohort(tmp_path / "cohort", subjects=36, side=(16, 18), noise=0.3)
    (tmp_path / "planted.yaml").write_text(json.dumps(PLANTED))
    root = tmp_path / "study"
    options = [
        "--data",
        table,
        "--variants",
        tmp_path / "planted.yaml",
        "--seeds",
        1,
        "--folds",
        "all",
    ]
    options += ["--epochs", EPOCHS, "--out", root, "--cache", tmp_path / "cache"]
    options += [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "tune_app.cli", "ablate", *map(str, options)]
    log = tmp_path / "driver.log"
    with log.open("wb") as out:
        driver = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_for_rows(driver, root, 4, log)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    before = read_rows(StudyFiles(root).epochs)
    planned = len(PLANTED) * FOLDS
    assert 4 <= len(before) < planned * EPOCHS

    resumed = CliRunner().invoke(app, ["resume", str(root)], env={"COLUMNS": "80"})
    assert resumed.exit_code == 0, resumed.output
    after = read_rows(StudyFiles(root).epochs)
    assert after[: len(before)] == before, "known rows are kept"
    seen = Counter((row["trial"], row["epoch"]) for row in after)
    assert seen == {
        (f"{number:05d}", epoch): 1 for number in range(planned) for epoch in range(1, EPOCHS + 1)
    }
    study = load_study(root)
    assert study.trials_full["state"].tolist() == ["completed"] * planned
    assert study.trials_full["variant"].tolist() == list(PLANTED) * FOLDS
    [effects] = comparisons(study)
    by_name = effects.set_index("variant")
    assert by_name.loc["stale-average", "call"] == "worse", by_name
    assert by_name.loc["unread-beta", "call"] == "cannot tell"
    assert by_name.loc["unread-beta", "mean"] == 0, "the same seed on the same fold is the same run"
    assert "stale-average is worse than reference" in resumed.stdout
    assert "unread-beta and reference score the same in every pair" in " ".join(
        resumed.stdout.split()
    )


def wait_for_rows(
    driver: subprocess.Popen[bytes], root: Path, count: int, log: Path, deadline_s: float = 180
) -> None:
    """Wait until the study has `count` rows; fail when its driver ends before, or the deadline passes."""
    end = time.monotonic() + deadline_s
    while len(read_rows(StudyFiles(root).epochs)) < count:
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < end, (
            f"no {count} rows within {deadline_s:.0f} s: {log.read_text()}"
        )
        time.sleep(0.05)
