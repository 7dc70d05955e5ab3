import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from scipy.stats import t, ttest_rel

from trainables.config import FineTuneConfig, build_config
from trainables.diagnosis import diagnose
from trainables.metrics import SCORE_METRICS
from trainables.objective import best_epoch, objective_value
from tune_app.results import loading
from tune_app.results.effects import holm
from tune_app.results.loading import load_studies, load_study
from tune_app.results.trials import column_meanings
from tune_app.study.columns import EPOCH_COLUMNS, METRICS, TRIAL_COLUMNS, WEIGHTS
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles, append_line
from tune_app.study.policy import Policy
from tune_app.study.rows import StudyDamageError, driver_lock, read_record, read_rows

WriteStudy = Callable[..., Path]

# Columns ---------------------------------------------------------------------------------------------------------------


def test_every_column_of_both_tables_is_documented_and_has_the_documented_type(
    a_search: Path,
) -> None:
    study = load_study(a_search)
    meanings = column_meanings(study)
    for name, table in (("trials", study.trials_full), ("epochs", study.epochs)):
        documented = meanings[meanings["table"] == name]
        assert list(documented["column"]) == list(table.columns)
        assert list(documented["dtype"]) == [str(dtype) for dtype in table.dtypes]
        assert (documented["meaning"].str.len() > 2).all()


def test_the_table_of_trials_is_narrow_and_every_column_is_one_word_away(a_search: Path) -> None:
    study = load_study(a_search)
    assert list(study.trials.columns)[:3] == ["trial", "variant", "state"]
    assert set(study.searched) <= set(study.trials.columns)
    assert len(study.trials.columns) < 14 + len(study.searched)
    assert len(study.trials_full.columns) > 100
    pd.testing.assert_frame_equal(study.trials, study.trials_full[list(study.trials.columns)])
    assert list(study.leaderboard(3, columns="trial,last_val_auc").columns) == [
        "rank",
        "trial",
        "last_val_auc",
    ]
    study.trials["state"] = "changed"
    assert (study.trials["state"] != "changed").all(), "a copy, the study stays as it is"


def test_columns_are_the_same_for_a_study_without_any_trial(
    write_study: WriteStudy, a_search: Path
) -> None:
    root = write_study(trials=1, epochs=20)
    for path in (root / "trials" / "00000").iterdir():
        path.unlink()
    StudyFiles(root).epochs.unlink()
    StudyFiles(root).decisions.unlink()
    empty, full = load_study(root), load_study(a_search)
    assert len(empty.trials_full) == len(empty.epochs) == len(empty.decisions) == 0
    for left, right in (
        (empty.trials_full, full.trials_full),
        (empty.epochs, full.epochs),
        (empty.decisions, full.decisions),
    ):
        pd.testing.assert_series_equal(left.dtypes, right.dtypes)
    assert "none yet" in repr(empty)


def test_hyperparameters_metrics_and_facts_share_no_name() -> None:
    names = [*TRIAL_COLUMNS, *FineTuneConfig.model_fields, *METRICS, "arrival", "time", "epoch"]
    assert len(names) == len(set(names))


def test_the_scores_are_those_the_run_computes() -> None:
    expected = {
        f"val_{score.removesuffix(end)}_{weights}{end}"
        for weights in WEIGHTS
        for score in SCORE_METRICS
        for end in ([e for e in ("_low", "_high") if score.endswith(e)] or [""])
    }
    ours = {
        name
        for name in METRICS
        if any(f"_{w}" in name for w in WEIGHTS) and name.startswith("val_")
    }
    assert ours == expected


# Content of a row ------------------------------------------------------------------------------------------------------


def test_the_best_epoch_is_the_one_that_stands_for_the_objective(a_search: Path) -> None:
    study = load_study(a_search)
    seen = 0
    for trial, rows in study.epochs.groupby("trial"):
        records: list[Any] = rows.to_dict("records")
        expected = best_epoch(records)
        row = study.trials_full.set_index("trial").loc[trial]
        assert row["best_epoch"] == expected
        assert row["best_val_auc"] == row["objective"]
        seen += 1
    assert seen == 20


def test_the_best_epoch_follows_the_objective_of_the_study(write_study: WriteStudy) -> None:
    root = write_study(trials=3, epochs=8, spec={"objective": "last_raw"})
    study = load_study(root)
    ended = study.trials_full[study.trials_full["state"] == "completed"]
    assert len(ended)
    assert (ended["best_epoch"] == ended["epochs_run"]).all()
    assert (ended["best_val_auc_raw"] == ended["objective"]).all()


def test_a_study_of_format_1_keeps_the_epochs_that_its_weights_are_of(
    write_study: WriteStudy,
) -> None:
    """Its best.pt hold the third epoch of a window, whatever the objective was."""
    root = write_study(trials=1, epochs=5, spec={"objective": "best_raw"})
    files = StudyFiles(root)
    files.write({**files.read(), "format": 1})
    files.epochs.unlink()
    for epoch, value in enumerate([0.9, 0.5, 0.6, 0.55, 0.5], start=1):
        row = {"trial": "00000", "time": 1.0, "epoch": epoch, "val_auc": value}
        append_line(files.epochs, row | {"val_auc_raw": 1 - value})
    assert load_study(root).trials_full.iloc[0]["best_epoch"] == 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.6], 1),
        ([0.9, 0.5], 2),  # the lower of two is used
        ([0.9, 0.5, 0.6], 3),  # the lucky first epoch is forgotten once there is a median
        ([0.5, 0.6, 0.7, 0.65, 0.72], 3),  # medians .6, .65, .7
        ([0.9, 0.9, 0.9, 0.8, 0.7], 1),
        ([0.8, 0.82, 0.5], 1),
        ([0.8, 0.82, None], 1),
        ([None, None, None, 0.7, 0.8], 4),
        ([None, None], None),
        ([None, None, None, None], None),
    ],
)
def test_the_best_epoch_of_short_and_broken_runs(
    write_study: WriteStudy, values: list[float | None], expected: int | None
) -> None:
    root = write_study(trials=1, epochs=5)
    files = StudyFiles(root)
    files.epochs.unlink()
    for epoch, value in enumerate(values, start=1):
        append_line(files.epochs, {"trial": "00000", "time": 1.0, "epoch": epoch, "val_auc": value})
    trial = load_study(root).trials_full.iloc[0]
    assert (None if pd.isna(trial["best_epoch"]) else trial["best_epoch"]) == expected
    if expected is not None:
        assert trial["best_val_auc"] == values[expected - 1]


def test_last_best_peak_and_rung_values_are_those_of_their_epochs(a_search: Path) -> None:
    study = load_study(a_search)
    epochs = study.epochs.set_index(["trial", "epoch"])
    assert study.rungs == tuple(int(rung) for rung in Policy(study.spec.policy, 20).rungs)
    for trial in study.trials_full.to_dict("records"):
        rows = epochs.loc[trial["trial"]]
        assert trial["last_train_loss"] == rows["train_loss"].iloc[-1]
        assert trial["best_val_auc_raw"] == rows["val_auc_raw"][trial["best_epoch"]]
        assert (
            trial["peak_val_auc"] == rows["val_auc"].max() == rows["val_auc"][trial["peak_epoch"]]
        )
        assert trial["epochs_run"] == len(rows)
        assert trial["work_s"] == pytest.approx(rows["epoch_s"].sum())
        assert trial["gpu_s"] == pytest.approx(trial["gpus"] * trial["work_s"])
        for rung in study.rungs:
            value = trial[f"val_auc_at_{rung}"]
            assert value == rows["val_auc"][rung] if rung in rows.index else np.isnan(value)


def test_a_trial_says_what_stopped_it_and_why(a_search: Path) -> None:
    trials = load_study(a_search).trials_full
    stopped = trials[trials["state"] == "stopped"]
    assert set(stopped["stopped_by"]) == {"halving", "diagnosis"}
    assert stopped["reason"].str.len().min() > 10
    sick = stopped[stopped["stopped_by"] == "diagnosis"]
    assert sick["verdict"].isin(["ema_lag", "collapsed_after_drw", "collapsed"]).all()
    assert (sick["since_epoch"] <= sick["epochs_run"]).all()
    assert trials["stopped_by"].isna().sum() == len(trials) - len(stopped)
    failed = trials[trials["state"] == "failed"].iloc[0]
    assert "device-side assert" in failed["error"]


def test_the_verdict_is_the_word_of_the_record_and_healthy_needs_a_whole_trial_above_chance(
    a_search: Path,
) -> None:
    study = load_study(a_search)
    recorded = {
        trial: study.record(trial)["verdict"]
        for trial in study.trials_full["trial"]
        if study.record(trial)["ended"] is not None
    }
    assert len(recorded) == 20
    assert study.trials_full.set_index("trial")["verdict"].to_dict() == recorded
    healthy = study.trials_full[study.trials_full["verdict"] == "healthy"]
    assert len(healthy)
    assert (healthy["state"] == "completed").all()
    assert (healthy["best_val_auc_low"] > 0.5).all()
    cut = study.trials_full[study.trials_full["stopped_by"] == "halving"]
    assert "no_fault" in set(cut["verdict"])


def test_every_hyperparameter_is_a_plain_column_that_builds_the_same_config(a_search: Path) -> None:
    study = load_study(a_search)
    assert list(
        study.trials_full.columns[len(TRIAL_COLUMNS) :][: len(FineTuneConfig.model_fields)]
    ) == list(FineTuneConfig.model_fields)
    for trial in study.trials_full.to_dict("records"):
        given = {
            name: trial[name] for name in FineTuneConfig.model_fields if not pd.isna(trial[name])
        }
        written = json.loads((a_search / "trials" / trial["trial"] / "config.json").read_text())
        assert build_config(given).model_dump(mode="json") == written
    assert set(study.searched) >= {"max_m", "s", "backbone_lr", "head"}
    assert not {"epochs", "fold", "seed"} & set(study.searched)


def test_rows_arrive_in_their_own_order_and_are_listed_by_trial(a_search: Path) -> None:
    epochs = load_study(a_search).epochs
    assert epochs[["trial", "epoch"]].equals(
        epochs[["trial", "epoch"]].sort_values(["trial", "epoch"])
    )
    lines = [json.loads(line) for line in StudyFiles(a_search).epochs.read_text().splitlines()]
    by_arrival = epochs.sort_values("arrival")
    assert list(zip(by_arrival["trial"], by_arrival["epoch"], strict=True)) == [
        (r["trial"], r["epoch"]) for r in lines
    ]


# While it runs, and after a kill ----------------------------------------------------------------------------------------


def test_trials_of_a_held_study_run_and_of_a_left_one_are_interrupted(
    write_study: WriteStudy,
) -> None:
    root = write_study(trials=6, epochs=10, unfinished=3, policy=False)
    left = load_study(root)
    assert not left.running
    assert left.trials_full["state"].tolist() == ["completed"] * 3 + ["interrupted"] * 3
    with FileLock(StudyFiles(root).lock):
        held = load_study(root)
    assert held.running
    assert held.trials_full["state"].tolist() == ["completed"] * 3 + ["running"] * 3
    assert "running" in repr(held)


def test_asking_whether_a_study_is_held_leaves_the_lock_free(write_study: WriteStudy) -> None:
    root = write_study(trials=1, epochs=3)
    before = set(root.iterdir())
    load_study(root)
    assert set(root.iterdir()) == before
    with FileLock(StudyFiles(root).lock, timeout=0):
        pass
    load_study(root)
    with FileLock(StudyFiles(root).lock, timeout=0):
        pass


def test_a_killed_driver_no_longer_holds_its_study(write_study: WriteStudy) -> None:
    root = write_study(trials=2, epochs=10, unfinished=1)
    code = (
        f"import time, filelock\nlock = filelock.FileLock({str(StudyFiles(root).lock)!r})\n"
        "with lock: print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"held\n"
        assert load_study(root).running
        driver.kill()
    assert not load_study(root).running


def test_unfinished_trials_have_objective_and_verdict_so_far(write_study: WriteStudy) -> None:
    study = load_study(write_study(trials=4, epochs=20, unfinished=4, policy=False))
    for trial in study.trials_full.to_dict("records"):
        rows = study.epochs[study.epochs["trial"] == trial["trial"]].to_dict("records")
        assert trial["objective"] == pytest.approx(objective_value(rows))
        assert trial["verdict"] == diagnose(rows).verdict
        assert pd.isna(trial["ended"])
        assert trial["wall_s"] > 0


def test_a_trial_without_a_record_is_listed_with_what_its_rows_say(write_study: WriteStudy) -> None:
    root = write_study(trials=2, epochs=6)
    (root / "trials" / "00001" / "trial.json").unlink()
    trial = load_study(root).trials_full.iloc[1]
    assert (trial["trial"], trial["number"], trial["state"], trial["epochs_run"]) == (
        "00001",
        1,
        "interrupted",
        6,
    )
    assert trial["objective"] > 0.4


def test_a_line_being_written_is_left_out_and_noted(write_study: WriteStudy) -> None:
    root = write_study(trials=2, epochs=5)
    files = StudyFiles(root)
    whole = load_study(root)
    with files.epochs.open("ab") as file:
        file.write(b'{"trial":"00001","epoch":6,"val_a')
    cut = load_study(root)
    pd.testing.assert_frame_equal(cut.epochs, whole.epochs)
    assert whole.notes == ()
    assert cut.notes == ("epochs.jsonl: last line unfinished (33 bytes), left out",)


def test_a_study_loads_at_any_moment_of_its_writing(write_study: WriteStudy) -> None:
    root = write_study(trials=4, epochs=6, policy=False)
    files = StudyFiles(root)
    lines = files.epochs.read_bytes().splitlines(keepends=True)
    files.epochs.write_bytes(b"")
    code = (
        "import pathlib, sys, time\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "with path.open('ab', buffering=0) as file:\n"
        "    for line in sys.stdin.buffer:\n"
        "        file.write(line[:40]); time.sleep(0.005); file.write(line[40:])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(files.epochs)], stdin=subprocess.PIPE
    ) as writer:
        assert writer.stdin is not None
        writer.stdin.write(b"".join(lines))
        writer.stdin.close()
        seen = [0]
        deadline = time.monotonic() + 60
        while seen[-1] < len(lines) and time.monotonic() < deadline:
            seen.append(len(load_study(root).epochs))
    assert seen[-1] == len(lines)
    assert seen == sorted(seen)


# Damage ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"trial":"00000","epoch":', "not a JSON row"),
        ("[1, 2]", "a list, must be an object"),
        ('{"epoch":9}', "trial None: must be the id of a trial"),
        ('{"trial":"../../etc","epoch":9}', "must be the id of a trial"),
        ('{"trial":"00000","epoch":1.5}', "epoch 1.5: must be a whole number from 1"),
        ('{"trial":"00000","epoch":0}', "epoch 0: must be a whole number from 1"),
        ('{"trial":"00000"}', "epoch None: must be a whole number from 1"),
        ('{"trial":"00000","epoch":3,"val_auc":null}', "trial 00000 epoch 3 again, first in line"),
        ('{"trial":"00000","epoch":9,"val_auc":"high"}', "val_auc is 'high', must be a number"),
        ('{"trial":"00000","epoch":9,"val_auc":true}', "val_auc is True, must be a number"),
        ('{"trial":"00000","epoch":9,"updates":2.5}', "updates is 2.5, must be a whole number"),
        ('{"trial":"00000","epoch":9,"drw_active":1}', "drw_active is 1, must be true or false"),
        ('{"trial":"00000","epoch":9,"precision":16}', "precision is 16, must be text"),
        ('{"trial":"00000","epoch":9,"val_auc":Infinity}', "Infinity is no score"),
        ('{"trial":"00000","epoch":9,"val_auc":1e999}', "val_auc is inf, must be a number"),
        ('{"trial":"00000","epoch":9,"extra":{"deep":1}}', "extra is a dict, must be one value"),
        (
            '{"trial":"00000","epoch":9,"val_auc":1e308}',
            "val_auc is 1e+308, must be between 0 and 1",
        ),
        ('{"trial":"00000","epoch":9,"val_auc":-0.2}', "val_auc is -0.2, must be between 0 and 1"),
        (
            '{"trial":"00000","epoch":9,"val_auc_raw":2}',
            "val_auc_raw is 2, must be between 0 and 1",
        ),
        (
            '{"trial":"00000","epoch":9,"epoch_s":-1.0}',
            "epoch_s is -1.0, must be between 0 and 1e+40",
        ),
        ('{"trial":"00000","epoch":9,"train_loss":1e300}', "train_loss is 1e+300, must be between"),
        ('{"trial":"00000","epoch":9,"time":1e300}', "time is 1e+300, must be between 0 and 1e+11"),
        ('{"trial":"00000","epoch":9}', "has no val_auc"),
        ('{"trial":"00000","epoch":9}{"trial":"00000","epoch":10}', "not a JSON row"),
        ("\x00\x00\x00", "not a JSON row"),
        ("[" * 100_000, "not a JSON row"),
        ('{"trial":"00000","epoch":1' + "0" * 5000 + "}", "not a JSON row"),
        ("", "not a JSON row"),
        ("\udcff\udcfe", "not a JSON row"),
    ],
)
def test_a_damaged_line_is_named_and_skipped_only_on_request(
    write_study: WriteStudy, line: str, says: str
) -> None:
    root = write_study(trials=2, epochs=4)
    files = StudyFiles(root)
    whole = load_study(root)
    lines = files.epochs.read_bytes().splitlines(keepends=True)
    lines.insert(5, line.encode(errors="surrogateescape") + b"\n")
    files.epochs.write_bytes(b"".join(lines))
    with pytest.raises(StudyDamageError) as told:
        load_study(root)
    assert len(told.value.problems) == 1
    assert told.value.problems[0].startswith(f"{files.epochs}:6: ") or "again" in says
    assert says in told.value.problems[0]
    skipped = load_study(root, on_damage="skip")
    assert len(skipped.epochs) == len(whole.epochs)
    assert "skipped as damaged" in skipped.notes[0]
    with pytest.raises(StudyDamageError):
        read_rows(files.epochs)


def test_rows_out_of_order_are_damage_with_both_lines(write_study: WriteStudy) -> None:
    root = write_study(trials=2, epochs=4)
    files = StudyFiles(root)
    lines = files.epochs.read_bytes().splitlines(keepends=True)
    of_one = [n for n, line in enumerate(lines) if json.loads(line)["trial"] == "00000"]
    first, second = of_one[1:3]
    lines[first], lines[second] = lines[second], lines[first]
    files.epochs.write_bytes(b"".join(lines))
    with pytest.raises(StudyDamageError) as told:
        load_study(root)
    assert told.value.problems == [
        f"{files.epochs}:{second + 1}: trial 00000 epoch 2 after its epoch 3 in line {first + 1}: out of order"
    ]
    assert len(load_study(root, on_damage="skip").epochs) == len(lines) - 1


def test_all_damage_is_told_together(write_study: WriteStudy) -> None:
    root = write_study(trials=3, epochs=4)
    files = StudyFiles(root)
    with files.epochs.open("a") as file:
        file.write("nonsense\n{}\n")
    with files.decisions.open("a") as file:
        file.write("more of it\n")
    files.trial("00001").record.write_text("{")
    files.trial("00002").record.write_text('{"trial": "00002", "state": "lost"}')
    files.trial("00000").config.write_text("[]")
    with pytest.raises(StudyDamageError) as told:
        load_study(root)
    text = str(told.value)
    for place in (
        f"{files.epochs}:13:",
        f"{files.epochs}:14:",
        f"{files.decisions}:",
        "00001/trial.json",
        "00000/config.json",
    ):
        assert place in text
    assert "state 'lost': one of running, completed, stopped, failed" in text
    skipped = load_study(root, on_damage="skip")
    assert len(skipped.notes) == 6
    assert len(skipped.trials_full) == 3


def test_the_first_of_two_rows_of_an_epoch_counts_when_damage_is_skipped(
    write_study: WriteStudy,
) -> None:
    root = write_study(trials=1, epochs=3)
    whole = load_study(root)
    append_line(StudyFiles(root).epochs, {"trial": "00000", "epoch": 2, "val_auc": 0.999})
    skipped = load_study(root, on_damage="skip")
    pd.testing.assert_frame_equal(skipped.epochs, whole.epochs)


def test_reading_at_once_and_line_by_line_give_the_same_table(
    a_search: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = load_study(a_search)
    monkeypatch.setattr(loading, "_read_epochs_fast", lambda content: None)
    by_line = load_study(a_search)
    pd.testing.assert_frame_equal(at_once.epochs, by_line.epochs)
    pd.testing.assert_frame_equal(at_once.trials_full, by_line.trials_full)


def test_metrics_of_another_version_are_kept_after_the_known_ones(write_study: WriteStudy) -> None:
    root = write_study(trials=1, epochs=2, policy=False)
    append_line(
        StudyFiles(root).epochs,
        {
            "trial": "00000",
            "epoch": 3,
            "val_auc": 0.7,
            "zeta": 1.5,
            "alpha": "text",
            "nothing": None,
        },
    )
    epochs = load_study(root).epochs
    assert list(epochs.columns) == [*EPOCH_COLUMNS, "alpha", "nothing", "zeta"]
    assert epochs["zeta"].tolist()[-1] == 1.5
    assert epochs["alpha"].tolist()[-1] == "text"


def test_a_missing_epoch_is_noted(write_study: WriteStudy) -> None:
    root = write_study(trials=1, epochs=4, policy=False)
    files = StudyFiles(root)
    lines = files.epochs.read_text().splitlines(keepends=True)
    files.epochs.write_text("".join(lines[:1] + lines[2:]))
    assert load_study(root).notes == ("epochs.jsonl: trial 00000 has 3 of its epochs 1 to 4",)


def test_no_study_and_a_study_of_another_version_are_refused(
    tmp_path: Path, write_study: WriteStudy
) -> None:
    with pytest.raises(SpecError, match="no study here"):
        load_study(tmp_path)
    root = write_study(trials=1, epochs=2)
    StudyFiles(root).spec.write_text('{"format": 99}')
    with pytest.raises(SpecError, match="format 99"):
        load_study(root)


def test_rows_and_records_are_read_for_replay(a_search: Path, tmp_path: Path) -> None:
    rows = read_rows(StudyFiles(a_search).epochs)
    assert rows == [
        json.loads(line) for line in StudyFiles(a_search).epochs.read_text().splitlines()
    ]
    assert len(read_rows(StudyFiles(a_search).decisions)) == len(load_study(a_search).decisions)
    assert read_rows(tmp_path / "epochs.jsonl") == []
    record = read_record(StudyFiles(a_search).trial("00003").record)
    assert record == load_study(a_search).record("00003")
    with pytest.raises(StudyDamageError, match=r"trial\.json"):
        read_record(tmp_path / "trial.json")


# Several studies, files, notebooks --------------------------------------------------------------------------------------


def test_studies_are_stacked_below_a_column_that_tells_them_apart(
    a_search: Path, an_ablation: Path
) -> None:
    both = load_studies([a_search, load_study(an_ablation)])
    assert list(both.trials_full.columns[:2]) == ["study", "trial"]
    assert both.trials_full["study"].value_counts().to_dict() == {"a search": 20, "an ablation": 24}
    assert len(both.epochs) == sum(len(study.epochs) for study in both.studies)
    assert set(both.searched) == set(both.studies[0].searched) | set(both.studies[1].searched)


def test_studies_of_one_name_are_told_apart_by_their_folders(write_study: WriteStudy) -> None:
    paths = [write_study(f"{place}/study", trials=1, epochs=2) for place in ("a", "b")]
    assert load_studies(paths).trials_full["study"].tolist() == ["a/study", "b/study"]
    with pytest.raises(ValueError, match="the same study twice"):
        load_studies([paths[0], paths[0]])
    with pytest.raises(ValueError, match="no study"):
        load_studies([])


def test_parquet_keeps_every_value_and_type(a_search: Path, tmp_path: Path) -> None:
    study = load_study(a_search)
    paths = study.to_parquet(tmp_path / "out")
    assert [path.name for path in paths] == [
        "trials.parquet",
        "epochs.parquet",
        "decisions.parquet",
    ]
    for path, table in zip(paths, (study.trials_full, study.epochs, study.decisions), strict=True):
        pd.testing.assert_frame_equal(pd.read_parquet(path), table)


def test_csv_holds_every_row_and_column(a_search: Path, tmp_path: Path) -> None:
    study = load_study(a_search)
    paths = study.to_csv(tmp_path)
    for path, table in zip(paths, (study.trials_full, study.epochs, study.decisions), strict=True):
        read = pd.read_csv(path, dtype={"trial": "string"})
        assert list(read.columns) == list(table.columns)
        assert read["trial"].tolist() == table["trial"].tolist()
    trials = pd.read_csv(paths[0])
    np.testing.assert_allclose(
        trials["objective"], study.trials_full["objective"].to_numpy(), rtol=1e-12
    )


def test_a_notebook_shows_the_study_and_executes_nothing_of_it(write_study: WriteStudy) -> None:
    names = ["<script>alert(1)</script>", "b"]
    study = load_study(write_study("<b>name</b>", variants={name: {} for name in names}, epochs=3))
    html = study._repr_html_()
    assert "<script>" not in html
    assert "<b>name" not in html
    assert "&lt;script&gt;" in html
    assert "trials 2 completed" in repr(study)


# Questions -------------------------------------------------------------------------------------------------------------


def test_a_notebook_shows_several_studies_without_all_their_fields(
    a_search: Path, an_ablation: Path
) -> None:
    both = load_studies([a_search, an_ablation])
    assert repr(both).startswith("<Studies: 44 trials")
    assert len(repr(both)) < 400
    assert both._repr_html_().count("<tr") == 11


def test_the_best_trial_by_any_metric_among_those_asked_for(a_search: Path) -> None:
    study = load_study(a_search)
    ended = study.trials_full[study.trials_full["state"] != "failed"]
    assert study.best()["objective"] == ended["objective"].max()
    assert study.best("val_brier_ema")["best_val_brier_ema"] == ended["best_val_brier_ema"].min()
    assert study.best("work_s")["work_s"] == ended["work_s"].min()
    linear = study.best(where="head == linear")
    assert linear["head"] == "linear"
    assert linear["objective"] == ended.loc[ended["head"] == "linear", "objective"].max()
    with pytest.raises(
        ValueError, match="no trial has a value of objective yet that passes the filter"
    ):
        study.best(where="val_auc > 1")


def test_the_leaderboard_ranks_by_objective(a_search: Path) -> None:
    study = load_study(a_search)
    board = study.leaderboard(5)
    assert board["rank"].tolist() == [1, 2, 3, 4, 5]
    assert board["objective"].is_monotonic_decreasing
    assert {"best_val_auc_low", "best_val_auc_high", "verdict", "epochs_run", "max_m"} <= set(
        board.columns
    )


def test_curves_come_in_long_form(a_search: Path) -> None:
    study = load_study(a_search)
    curves = study.curves(where="state == completed")
    assert list(curves.columns) == [
        "trial",
        "variant",
        "state",
        "verdict",
        "epoch",
        "metric",
        "value",
    ]
    completed = study.trials_full[study.trials_full["state"] == "completed"]
    assert len(curves) == 2 * 20 * len(completed)
    first = curves[
        (curves["trial"] == completed["trial"].iloc[0]) & (curves["metric"] == "val_auc_raw")
    ]
    rows = study.epochs[study.epochs["trial"] == completed["trial"].iloc[0]]
    np.testing.assert_array_equal(first["value"], rows["val_auc_raw"])
    with pytest.raises(ValueError, match="did you mean 'val_auc_raw'"):
        study.curves("val_auc_rw")


def test_importance_counts_stopped_trials_and_says_how(write_study: WriteStudy) -> None:
    study = load_study(write_study(trials=40, epochs=10, failed=(7,), seed=3))
    stopped = int((study.trials_full["state"] == "stopped").sum())
    table = study.importance(repeats=2)
    assert set(table["parameter"]) == set(study.searched)
    assert table["importance"].sum() == pytest.approx(1, abs=0.01)
    assert table["importance"].is_monotonic_decreasing
    assert (table["low"] <= table["importance"]).all()
    assert (table["importance"] <= table["high"]).all()
    assert f"over 39 trials, {stopped} of them stopped early" in table.attrs["how"]
    pd.testing.assert_frame_equal(table, study.importance(repeats=2))


def test_importance_finds_what_matters(write_study: WriteStudy) -> None:
    root = write_study(trials=60, epochs=3, policy=False)
    files = StudyFiles(root)
    for path in files.trials.glob("*/trial.json"):
        record = json.loads(path.read_text())
        record["objective"] = 0.9 - abs(np.log10(record["overrides"]["backbone_lr"] / 1e-4))
        path.write_text(json.dumps(record))
    for evaluator in ("fanova", "mdi", "ped-anova"):
        table = load_study(root).importance(evaluator=evaluator, repeats=1)
        assert table["parameter"][0] == "backbone_lr"
        assert table["importance"][0] > 0.4


def test_importance_of_too_little_is_refused_with_a_reason(write_study: WriteStudy) -> None:
    study = load_study(write_study(trials=3, epochs=3))
    with pytest.raises(
        ValueError, match="needs four ended trials that differ in something; here are 3"
    ):
        study.importance()
    with pytest.raises(
        ValueError, match="unknown evaluator 'magic': one of fanova, mdi, ped-anova"
    ):
        load_study(write_study("b", trials=5, epochs=3)).importance(evaluator="magic")  # type: ignore[arg-type]


def test_effects_on_one_fold_are_those_of_the_paired_t_test(write_study: WriteStudy) -> None:
    root = write_study(variants={"baseline": {}, "other": {"max_m": 0.3}}, seeds=5, epochs=4)
    study = load_study(root)
    table = study.effects().set_index("variant")
    pairs = study.trials_full.pivot(index="seed", columns="variant", values="objective")
    oracle = ttest_rel(pairs["other"], pairs["baseline"])
    interval = oracle.confidence_interval(0.95)
    assert table.loc["other", "pairs"] == 5
    assert table.loc["other", "mean"] == pytest.approx((pairs["other"] - pairs["baseline"]).mean())
    assert table.loc["other", "low"] == pytest.approx(interval.low)
    assert table.loc["other", "high"] == pytest.approx(interval.high)
    assert table.loc["baseline", "value"] == pytest.approx(pairs["baseline"].mean())
    assert pd.isna(table["mean"]["baseline"])


def test_a_planted_effect_is_found_and_one_that_is_not_there_is_not_claimed(
    an_ablation: Path,
) -> None:
    table = load_study(an_ablation).effects()
    calls = dict(zip(table["variant"], table["call"], strict=True))
    assert calls["combined"] == "better"
    assert calls["only-delayed-drw"] == "cannot tell"
    assert table.attrs["baseline"] == "baseline"
    assert "paired over fold and seed (3 folds)" in table.attrs["how"]
    assert table.set_index("variant")["runs"].tolist() == [6, 6, 6, 6]
    turned = load_study(an_ablation).effects(baseline="combined").set_index("variant")
    assert turned["call"]["baseline"] == "worse"
    assert turned["mean"]["baseline"] == pytest.approx(
        -table.set_index("variant")["mean"]["combined"]
    )


def test_over_folds_the_unit_is_the_fold_and_overlapping_training_parts_widen_the_interval(
    an_ablation: Path,
) -> None:
    study = load_study(an_ablation)
    row = study.effects().set_index("variant").loc["combined"]
    pairs = (
        study.trials_full.pivot(index=["fold", "seed"], columns="variant", values="objective")
        .groupby("fold")
        .mean()
    )
    oracle = ttest_rel(pairs["combined"], pairs["baseline"])
    naive = oracle.confidence_interval(0.95)
    wider = np.sqrt((1 / 3 + 1 / 4) / (1 / 3))  # 3 of the 5 folds that the table was cut into
    assert row["mean"] == pytest.approx((pairs["combined"] - pairs["baseline"]).mean())
    assert row["pairs"] == 6
    assert (row["high"] - row["low"]) / (naive.high - naive.low) == pytest.approx(wider)
    assert row["p"] == pytest.approx(2 * t.sf(oracle.statistic / wider, 2))


def test_p_values_are_adjusted_for_their_number_as_the_outside_package_does() -> None:
    values = [0.01, 0.04, 0.03, 0.005, math.nan]
    assert holm(values)[:4] == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust(p, "holm")
    assert math.isnan(holm(values)[4])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_effects_count_collapsed_and_failed_runs_and_say_when_there_are_no_pairs(
    write_study: WriteStudy,
) -> None:
    lagging = {"ema_warmup": False, "ema_decay": 0.999, "ema_buffers": "copied"}
    study = load_study(
        write_study(variants={"baseline": {}, "lags": lagging}, epochs=15, failed=(0,))
    )
    table = study.effects().set_index("variant")
    assert table.loc["baseline", "failed"] == 1
    assert table.loc["lags", "collapsed"] == 1
    assert table.loc["lags", "verdicts"] == "ema_lag 1"
    assert table.loc["lags", "pairs"] == 0
    assert table.loc["lags", "call"] == "cannot tell"
    assert pd.isna(table["mean"]["lags"])
    assert list(table["healed"]) == [0, 0]
    trials = study.trials_full.copy()
    trials.loc[trials["variant"] == "baseline", "healed_epochs"] = 25
    assert list(replace(study, trials_full=trials).effects()["healed"]) == [1, 0], (
        "no verdict shows it"
    )


def test_effects_without_variants_or_with_an_unknown_baseline_are_refused(
    a_search: Path, an_ablation: Path
) -> None:
    with pytest.raises(ValueError, match="effects compare variants, and these trials have 0"):
        load_study(a_search).effects()
    with pytest.raises(ValueError, match="no variant 'nothing': one of baseline"):
        load_study(an_ablation).effects(baseline="nothing")


def test_losses_are_better_when_smaller_in_effects_too(an_ablation: Path) -> None:
    table = load_study(an_ablation).effects("val_brier_ema").set_index("variant")
    assert table["mean"]["combined"] < 0
    assert table["call"]["combined"] == "better"


@pytest.mark.parametrize("name", ["backbone_lr", "ema_decay", "drw_start_epoch", "max_m", "head"])
def test_an_axis_has_the_range_of_the_space_and_reads_its_own_labels(
    a_search: Path, name: str
) -> None:
    study = load_study(a_search)
    axis = study.axis(name)
    assert axis.ranged
    places = axis.places(study.trials_full)
    assert np.isfinite(places).all()
    assert ((places >= axis.low - 1e-9) & (places <= axis.high + 1e-9)).all()
    for value, place in zip(study.trials_full[name], places, strict=True):
        assert axis.place(value) == pytest.approx(place)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 9
    for place, text in ticks:
        assert axis.place(text if axis.kind == "choice" else float(text)) == pytest.approx(
            place, abs=0.02
        )


def test_results_load_neither_torch_nor_ray(a_search: Path) -> None:
    code = (
        "import sys\nfrom tune_app.results import load_study\n"
        f"study = load_study({str(a_search)!r})\nrepr(study), study._repr_html_()\n"
        "print(sorted({'torch', 'ray', 'plotly', 'monai'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert run.stderr == ""


def test_ids_are_kept_as_text_by_the_filters(a_search: Path) -> None:
    study = load_study(a_search)
    row: Any = study.best(where="trial == 00003")
    assert row["trial"] == "00003"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")
def test_another_user_cannot_block_a_study_and_still_sees_that_it_runs(tmp_path: Path) -> None:
    lock = tmp_path / ".driver.lock"
    lock.touch(mode=0o644)  # as versions before left it
    for folder in (tmp_path, *tmp_path.parents):
        folder.chmod(folder.stat().st_mode | 0o755)
    code = (
        "import fcntl, os, sys; from pathlib import Path; from tune_app.study.rows import is_held\n"
        "lock = Path(sys.argv[1]); os.setuid(65534)\n"
        "try: fcntl.flock(lock.open('rb'), fcntl.LOCK_EX | fcntl.LOCK_NB); print('taken')\n"
        "except PermissionError: print('refused', is_held(lock))"
    )

    def as_another_user() -> str:
        command = [sys.executable, "-c", code, str(lock)]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()

    assert as_another_user() == "taken"
    with driver_lock(lock):
        assert as_another_user() == "refused True"
        assert lock.stat().st_mode & 0o777 == 0o600
    assert as_another_user() == "refused False"
