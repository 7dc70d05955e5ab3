"""Recording whole curves: the drawn configurations, the held-out rows, and that a stopped recording continues."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from search_spaces.spaces import SPACES
from search_spaces.written import space_from
from trainables.config import build_config
from trainables.data.folds import split_rows
from trainables.data.manifest import read_manifest
from tune_app.bench.record import (
    RecordError,
    Recording,
    held_out_split,
    planned_runs,
    read_scores,
    record_curves,
)
from tune_app.cli.app import app
from tune_app.synthetic import write_cohort

TINY: dict[str, Any] = {
    "depth": 10,
    "width": 0.125,
    "volume_shape": 12,
    "epochs": 2,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_folds": 3,
    "amp": "off",
    "train_auc_volumes": 0,
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(
        tmp_path_factory.mktemp("record") / "cohort", subjects=18, side=(12, 14), noise=0.3
    )


def record(cohort: Path, out: Path, **more: Any) -> pd.DataFrame:
    asked: dict[str, Any] = {"trials": 2, "folds": (0, 2), "hold_fold": 1, **more}
    return record_curves(
        cohort,
        out,
        space=space_from("documented", TINY),
        config=TINY,
        cache=out.parent / "cache",
        **asked,
    )


def test_a_stopped_recording_continues_and_ends_with_the_same_table(
    cohort: Path, tmp_path: Path
) -> None:
    whole = record(cohort, tmp_path / "whole.parquet")
    first = record(
        cohort, tmp_path / "parts.parquet", seconds=0.0
    )  # one run begins: no run begins later
    assert first["trial"].nunique() == 1
    rest = record(cohort, tmp_path / "parts.parquet", at_once=2)
    assert list(rest["trial"].unique()) == [
        "00000",
        "00001",
        "00000-fold2-seed0",
        "00001-fold2-seed0",
    ]
    timed = ["epoch_s", "train_s", "validation_s", "volumes_per_s", "peak_memory_gib"]
    pd.testing.assert_frame_equal(whole.drop(columns=timed), rest.drop(columns=timed))
    again = pd.read_parquet(tmp_path / "parts.parquet")
    assert len(again) == 8
    assert again.attrs["labels"].keys() == {"0", "1", "2"}
    row: Any  # the scores that are kept are those that the AUCs were computed from
    for row in again.itertuples():
        assert row.hold_auc == pytest.approx(
            roc_auc_score(again.attrs["labels"]["1"], read_scores(row.hold_scores))
        )
        assert row.val_auc == pytest.approx(
            roc_auc_score(again.attrs["labels"][str(row.fold)], read_scores(row.val_scores)),
            abs=0.01,
        )


def test_the_space_of_a_study_file_is_drawn_from(cohort: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("space: {search: {backbone_lr: {low: 2.0e-4, high: 3.0e-4, log: true}}}")
    out = tmp_path / "curves.parquet"
    words = ["--data", str(cohort), "--out", str(out), "--trials", "3", "--device", "cpu"]
    sets = [f"{name}={value}" for name, value in {**TINY, "epochs": 1}.items()]
    words += [word for setting in sets for word in ("--set", setting)]
    words += ["--cache", str(tmp_path / "cache"), "--space"]
    done = CliRunner().invoke(app, ["bench", "record", *words, str(study)])
    assert done.exit_code == 0, done.output
    table = pd.read_parquet(out)
    assert table["sample.backbone_lr"].nunique() == 3
    assert table["sample.backbone_lr"].between(2e-4, 3e-4).all()
    assert [str(name) for name in table if str(name).startswith("sample.")] == [
        "sample.backbone_lr"
    ]
    missing = CliRunner().invoke(app, ["bench", "record", *words, str(tmp_path / "no.yaml")])
    assert "no such study file" in str(missing.exception)


def test_the_held_out_fold_is_in_no_other_part(cohort: Path) -> None:
    manifest = read_manifest(cohort)
    for fold in (0, 2):
        split, hold = held_out_split(cohort, build_config({**TINY, "fold": fold}), 1)
        own = split_rows(manifest, fold=fold, num_folds=3, cross_validate=True)
        assert set(split.val) == set(own.val)
        assert set(split.train) == set(own.train) - set(hold)
        assert len(hold)
        assert not set(hold) & (set(split.train) | set(split.val))


def test_more_trials_leave_the_first_ones_as_they_were() -> None:
    space = SPACES["documented"]
    few, more = (
        planned_runs(
            Recording(space.to_mapping(), {"epochs": 30}, count, ("after",), (0,), 1, 1, 7, ""),
            space,
        )
        for count in (3, 9)
    )
    assert [run.overrides for run in more[:4]] == [run.overrides for run in few]
    assert [run.origin for run in few] == ["after", "random", "random", "random"]
    for run in more:
        build_config(run.overrides)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"folds": (1,)}, "held-out"),
        ({"folds": (0, 3)}, "folds 3"),
        ({"folds": (0, 0)}, "each fold once"),
        ({"trials": 0}, "1 or more"),
    ],
)
def test_folds_that_cannot_be_recorded_are_named(
    cohort: Path, tmp_path: Path, asked: dict[str, Any], named: str
) -> None:
    with pytest.raises(RecordError, match=named):
        record(cohort, tmp_path / "curves.parquet", **asked)


def test_a_table_of_other_settings_is_not_added_to(cohort: Path, tmp_path: Path) -> None:
    record(cohort, tmp_path / "curves.parquet", trials=1, folds=(0,))
    with pytest.raises(RecordError, match="another seed"):
        record(cohort, tmp_path / "curves.parquet", trials=1, folds=(0,), seed=5)
