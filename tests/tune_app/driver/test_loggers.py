"""What other tools get of a study: run names, metrics, hyperparameters, and how each trial ended."""

import json
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browsing import wait_for

from tune_app.driver.loggers import (
    COMPARED,
    Loggers,
    MLflow,
    TensorBoard,
    WeightsAndBiases,
    metrics_of,
    study_mark,
)
from tune_app.study.columns import EPOCH_COLUMNS
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles

SETTINGS = {"backbone_lr": 1e-4, "head": "cosine", "ema_warmup": True}
OF_DATA = {"classes": "normal=0,tumour=1"}
ROWS = [
    {"trial": "00000", "time": 1.0, "epoch": 1, "val_auc": 0.7, "train_loss": 2.0, "drw_active": False},
    {"trial": "00000", "time": 2.0, "epoch": 2, "val_auc": None, "train_loss": 1.5, "drw_active": True},
]  # fmt: skip
RECORD = {"trial": "00000", "state": "stopped", "verdict": "ema_lag", "objective": 0.7,
          "verdict_summary": "never caught up", "reason": "diagnosis", "variant": None}  # fmt: skip


def ran(logger: Any) -> None:
    loggers = Loggers([logger])
    loggers.began("00000", SETTINGS | OF_DATA)
    for row in ROWS:
        loggers.reported("00000", row)
    loggers.ended(RECORD)
    loggers.close()


def summaries(folder: Path) -> list[tuple[str, int, Any]]:
    """All summary values of the event files: TensorFlow's records are length, checksum, data, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + size])
            found += [(value.tag, event.step, value) for value in event.summary.value]
            at += 16 + size
    return found


def test_tensorboard_has_a_run_of_study_and_trial_with_metrics_and_hyperparameters(
    tmp_path: Path,
) -> None:
    root = tmp_path / "first"
    ran(TensorBoard(root))
    found = summaries(root / "tensorboard" / "first" / "00000")
    scalars = {
        (tag, step): value.simple_value for tag, step, value in found if "_hparams_" not in tag
    }
    assert scalars[("compare/val_auc", 1)] == pytest.approx(0.7)
    assert ("compare/val_auc", 2) not in scalars, "a missing value is left out"
    assert scalars[("compare/train_loss", 2)] == 1.5
    assert scalars[("more/drw_active", 2)] == 1.0
    assert scalars[("objective", 0)] == pytest.approx(0.7)
    hparams = b"".join(
        value.metadata.plugin_data.content for tag, _, value in found if "session_start" in tag
    )
    for name in (*SETTINGS, "verdict", "ema_lag"):
        assert name.encode() in hparams
    assert b"classes" not in hparams


def test_tensorboards_own_reader_finds_the_runs_and_their_hyperparameters(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

    root = tmp_path / "first"
    ran(TensorBoard(root))
    found = EventMultiplexer().AddRunsFromDirectory(str(root / "tensorboard")).Reload()
    assert set(found.Runs()) == {"first/00000"}
    (event,) = found.Scalars("first/00000", "compare/val_auc")
    assert event.step == 1
    content = found.SummaryMetadata("first/00000", "_hparams_/session_start_info")
    started = parse_session_start_info_plugin_data(content.plugin_data.content)
    assert set(started.hparams) == {*SETTINGS, "state", "verdict", "verdict_summary", "reason"}
    assert started.hparams["verdict"].string_value == "ema_lag"


def test_the_metrics_that_are_compared_are_columns_of_a_study() -> None:
    assert set(COMPARED) <= set(EPOCH_COLUMNS)


def test_a_logger_that_raises_is_left_out_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        calls = 0

        def __getattr__(self, name: str) -> Callable[..., None]:
            def fail(*_: object) -> None:
                type(self).calls += 1
                raise ConnectionError("token=1234")

            return fail

    with caplog.at_level(logging.WARNING):
        loggers = Loggers([Broken(), TensorBoard(tmp_path / "first")])
        loggers.began("00000", SETTINGS)
        loggers.reported("00000", ROWS[0])
        loggers.close()
    assert Broken.calls == 1
    assert "Broken gets no more rows of this session: ConnectionError" in caplog.text
    assert "1234" not in caplog.text
    assert summaries(tmp_path / "first" / "tensorboard" / "first" / "00000")


def test_only_finite_numbers_are_metrics() -> None:
    row = {
        "trial": "00000",
        "epoch": 3,
        "time": 1.0,
        "a": 1,
        "b": None,
        "c": float("nan"),
        "d": "x",
    }
    assert metrics_of(row) == {"a": 1.0}


def test_mlflow_has_a_run_per_trial_with_the_verdict_as_tag_and_the_report_as_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "first"
    root.mkdir()
    ran(MLflow(root))
    (root / "report.html").write_text("<!doctype html>")
    (root / "trials.csv").write_text("trial\n00000\n")
    MLflow(root).add_report(root / "report.html", {"progress": "<!doctype html><p>drawn"})
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name("first")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"00000", "first"}
    trial = runs["00000"]
    given = SETTINGS | OF_DATA
    assert trial.data.params == {name: str(value) for name, value in given.items()}
    assert trial.data.metrics["train_loss"] == 1.5
    assert trial.data.metrics["objective"] == 0.7
    assert trial.data.tags["verdict"] == "ema_lag"
    assert trial.info.status == "KILLED"
    paths = [item.path for item in client.list_artifacts(runs["first"].info.run_id)]
    assert paths == ["figures", "report.html", "tables"]
    drawn = root / "mlflow-artifacts" / runs["first"].info.run_id / "artifacts" / "figures"
    assert (drawn / "progress.html").read_text() == "<!doctype html><p>drawn"
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_session_that_continues_writes_to_the_same_mlflow_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "first"
    root.mkdir()
    for _ in range(2):
        logger = MLflow(root)
        logger.began("00000", SETTINGS)
        logger.close()
    assert len(logger.client.search_runs([logger.experiment])) == 1


def test_studies_of_one_name_have_runs_of_their_own_on_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/server.db")
    monkeypatch.setenv("MLFLOW_ARTIFACT_ROOT", str(tmp_path / "artifacts"))
    for folder in ("a", "b", "a"):
        root = tmp_path / folder / "it's first"
        root.mkdir(parents=True, exist_ok=True)
        logger = MLflow(root)
        logger.began("00000", SETTINGS)
        logger.close()
    assert len(logger.client.search_runs([logger.experiment])) == 2


def test_a_studys_mark_is_its_own_and_stays_when_it_is_moved(tmp_path: Path) -> None:
    for name, created in (("a", 1.5), ("b", 2.5)):
        (tmp_path / name).mkdir()
        StudyFiles(tmp_path / name).write(
            {"spec": {}, "created": created, "hardware": {"host": "here"}}
        )
    marks = {name: study_mark(tmp_path / name) for name in ("a", "b")}
    assert marks["a"] != marks["b"]
    (tmp_path / "a").rename(tmp_path / "c")
    assert study_mark(tmp_path / "c") == marks["a"]


def test_weights_and_biases_has_a_run_of_study_and_trial_that_its_own_reader_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    root = tmp_path / "our first"
    root.mkdir()
    ran(WeightsAndBiases(root))
    (root / "report.html").write_text("<!doctype html>")
    WeightsAndBiases(root).add_report(root / "report.html", {})
    assert "wandb:" not in "".join(capfd.readouterr()), "the console is the study's"
    runs = {run.display_name: (run, rows) for run, rows in map(wandb_run, root.rglob("*.wandb"))}
    assert set(runs) == {"our first/00000", "our first/study"}
    run, rows = runs["our first/00000"]
    assert run.run_group == "our first"
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config.items() >= (SETTINGS | OF_DATA).items()
    assert [row.get("train_loss") for row in rows] == [2.0, 1.5]


def test_weights_and_biases_without_a_key_is_refused_before_the_study_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(SpecError, match="not logged in: `wandb login`, or WANDB_MODE=offline"):
        WeightsAndBiases(tmp_path)
    assert "wandb" not in "".join(capfd.readouterr()), "the console is the study's"


def wandb_run(path: Path) -> tuple[Any, list[dict[str, Any]]]:
    """The run and the rows of an offline file, which another process may still be writing."""
    records = wait_for(lambda: ended_records(path), f"the end of {path}")
    (run,) = [record.run for record in records if record.HasField("run")]
    rows = [
        {
            item.key or item.nested_key[0]: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records
        if record.HasField("history")
    ]
    return run, rows


def ended_records(path: Path) -> list[Any] | None:
    """The records of LevelDB's log, each checksum, length and kind before its bytes; None before the last one is there."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, records = path.read_bytes(), 7, []
    assert len(content) < 32768, "one block"
    while at + 7 <= len(content):
        _, size, _ = struct.unpack_from("<IHB", content, at)
        if at + 7 + size > len(content):
            return None
        records.append(Record.FromString(content[at + 7 : at + 7 + size]))
        at += 7 + size
    return records if any(record.HasField("exit") for record in records) else None
