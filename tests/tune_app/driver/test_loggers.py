"""What other tools get of a study: run names, metrics, hyperparameters, and how each trial ended."""

import logging
import struct
from pathlib import Path

import pytest

from tune_app.driver.loggers import Loggers, MLflow, TensorBoard, metrics_of

SETTINGS = {"backbone_lr": 1e-4, "head": "cosine", "ema_warmup": True}
ROWS = [
    {"trial": "00000", "time": 1.0, "epoch": 1, "val_auc": 0.7, "train_loss": 2.0, "drw_active": False},
    {"trial": "00000", "time": 2.0, "epoch": 2, "val_auc": None, "train_loss": 1.5, "drw_active": True},
]  # fmt: skip
RECORD = {"trial": "00000", "state": "stopped", "verdict": "ema_lag", "objective": 0.7,
          "verdict_summary": "never caught up", "reason": "diagnosis", "variant": None}  # fmt: skip


def ran(logger):
    loggers = Loggers([logger])
    loggers.began("00000", SETTINGS)
    for row in ROWS:
        loggers.reported("00000", row)
    loggers.ended(RECORD)
    loggers.close()


def summaries(folder: Path):
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


def test_tensorboard_has_a_run_of_study_and_trial_with_metrics_and_hyperparameters(tmp_path):
    root = tmp_path / "first"
    ran(TensorBoard(root))
    found = summaries(root / "tensorboard" / "first" / "00000")
    scalars = {
        (tag, step): value.simple_value for tag, step, value in found if "_hparams_" not in tag
    }
    assert scalars[("val_auc", 1)] == pytest.approx(0.7)
    assert ("val_auc", 2) not in scalars, "a missing value is left out"
    assert scalars[("train_loss", 2)] == 1.5
    assert scalars[("drw_active", 2)] == 1.0
    assert scalars[("objective", 0)] == pytest.approx(0.7)
    hparams = b"".join(
        value.metadata.plugin_data.content for tag, _, value in found if "session_start" in tag
    )
    for name in (*SETTINGS, "verdict", "ema_lag"):
        assert name.encode() in hparams


def test_a_logger_that_raises_is_left_out_and_the_others_go_on(tmp_path, caplog):
    class Broken:
        calls = 0

        def __getattr__(self, name):
            def fail(*_):
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


def test_only_finite_numbers_are_metrics():
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
    tmp_path, monkeypatch
):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "first"
    root.mkdir()
    ran(MLflow(root))
    (root / "report.html").write_text("<!doctype html>")
    (root / "trials.csv").write_text("trial\n00000\n")
    MLflow(root).add_report(root / "report.html")
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name("first")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"00000", "first"}
    trial = runs["00000"]
    assert trial.data.params == {name: str(value) for name, value in SETTINGS.items()}
    assert trial.data.metrics["train_loss"] == 1.5
    assert trial.data.metrics["objective"] == 0.7
    assert trial.data.tags["verdict"] == "ema_lag"
    assert trial.info.status == "KILLED"
    paths = [item.path for item in client.list_artifacts(runs["first"].info.run_id)]
    assert paths == ["report.html", "tables"]


def test_a_session_that_continues_writes_to_the_same_mlflow_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "first"
    root.mkdir()
    for _ in range(2):
        logger = MLflow(root)
        logger.began("00000", SETTINGS)
        logger.close()
    assert len(logger.client.search_runs([logger.experiment])) == 1
