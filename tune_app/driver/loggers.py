"""What other tools show of a study: TensorBoard, MLflow and Weights & Biases. Trials keep their own names there.

Each logger gets a trial's settings when it starts, the row of every epoch, and its record at the end. Values have the
names that they have in the study.
"""

import hashlib
import importlib.util
import inspect
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from trainables.config import OF_THE_DATA
from trainables.data.storage import absolute
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.requests import log
from tune_app.study.spec import StudySpec

NOT_METRICS = ("trial", "time", "epoch")
"""Entries of a row that identify the row."""

TAGS = ("state", "verdict", "verdict_summary", "reason", "variant")
"""Entries of a trial's record that other tools get as tags."""

COMPARED = (
    "val_auc", "val_auc_raw", "val_auc_ema", "val_auprc_ema", "val_brier_ema", "train_auc", "train_loss",
    "lr_backbone", "grad_norm",
)  # fmt: skip
"""Metrics that TensorBoard shows first."""


class TrialLogger(Protocol):
    """Shows the trials of one session elsewhere."""

    def began(self, trial: str, settings: Mapping[str, Any]) -> None:
        """A trial starts, or continues."""

    def reported(self, trial: str, row: Mapping[str, Any]) -> None:
        """An epoch of a trial has ended."""

    def ended(self, record: Mapping[str, Any]) -> None:
        """A trial has ended; `record` is its trial.json."""

    def close(self) -> None:
        """The session is over."""

    def add_report(self, page: Path, figures: Mapping[str, str]) -> None:
        """The study has ended: its report is in the file `page`, and its figures are pages of their own, by name."""


def study_loggers(spec: StudySpec, files: StudyFiles) -> list[TrialLogger]:
    """Return the loggers of `spec.log`. Raises SpecError where a package or a server is missing."""
    makers: dict[str, Callable[[Path], TrialLogger]] = {
        "tensorboard": TensorBoard,
        "mlflow": MLflow,
        "wandb": WeightsAndBiases,
    }
    return [makers[name](files.root) for name in dict.fromkeys(spec.log)]


class Loggers:
    """All loggers of a session. One that raises is left out from then on: the study does not depend on it."""

    def __init__(self, loggers: Sequence[TrialLogger]) -> None:
        self._working = list(loggers)

    def began(self, trial: str, settings: Mapping[str, Any]) -> None:
        self._each(lambda logger: logger.began(trial, settings))

    def reported(self, trial: str, row: Mapping[str, Any]) -> None:
        self._each(lambda logger: logger.reported(trial, row))

    def ended(self, record: Mapping[str, Any]) -> None:
        self._each(lambda logger: logger.ended(record))

    def close(self) -> None:
        self._each(lambda logger: logger.close())

    def add_report(self, page: Path, figures: Mapping[str, str]) -> None:
        self._each(lambda logger: logger.add_report(page, figures))

    def _each(self, send: Callable[[TrialLogger], None]) -> None:
        for logger in list(self._working):
            try:
                send(logger)
            except Exception as error:  # noqa: BLE001  exceptions of a server or another program are not known here
                self._working.remove(logger)
                log.warning(
                    "%s gets no more rows of this session: %s",
                    type(logger).__name__,
                    type(error).__name__,
                )


def metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of an epoch's row by name."""
    return {
        name: float(value)
        for name, value in row.items()
        if name not in NOT_METRICS and isinstance(value, int | float) and math.isfinite(value)
    }


def tags_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the entries TAGS of a trial's record, as text."""
    return {name: str(record[name]) for name in TAGS if record.get(name) is not None}


def study_mark(root: Path) -> str:
    """Return eight hex digits that tell the study in the folder `root` from others of its name, also after it was moved."""
    files = StudyFiles(root)
    known = files.read() if files.spec.is_file() else {}
    made = (known.get("hardware", {}).get("host"), known.get("created", absolute(root)))
    return hashlib.sha256(repr(made).encode()).hexdigest()[:8]


def tensorboard_tag(metric: str) -> str:
    """Return a metric's tag: TensorBoard shows a section for what is before the slash, in alphabetical order."""
    return f"{'compare' if metric in COMPARED else 'more'}/{metric}"


class TensorBoard:
    """Event files in `tensorboard/<study>/<trial>` of the study: `tensorboard --logdir studies/first/tensorboard`."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "tensorboard" / root.absolute().name
        self._writers: dict[str, Any] = {}
        self._settings: dict[str, dict[str, Any]] = {}

    def began(self, trial: str, settings: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        self._settings[trial] = dict(settings)
        self._writers[trial] = SummaryWriter(logdir=str(self.folder / trial))

    def reported(self, trial: str, row: Mapping[str, Any]) -> None:
        for name, value in metrics_of(row).items():
            self._writers[trial].add_scalar(tensorboard_tag(name), value, row["epoch"])
        self._writers[trial].flush()

    def ended(self, record: Mapping[str, Any]) -> None:
        from tensorboardX.summary import hparams

        writer = self._writers.pop(record["trial"], None)
        if writer is None:
            return
        given = {
            name: value if isinstance(value, int | float | str | bool) else str(value)
            for name, value in self._settings.pop(record["trial"]).items()
            if name not in OF_THE_DATA
        }
        found = {} if record["objective"] is None else {"objective": float(record["objective"])}
        for name, value in found.items():
            writer.add_scalar(name, value)
        for summary in hparams(hparam_dict=given | tags_of(record), metric_dict=found):
            writer.file_writer.add_summary(summary)
        writer.close()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def add_report(self, page: Path, figures: Mapping[str, str]) -> None:
        pass


OWN_RUN = "medtune.run"
"""MLflow's tag of a run: the study's mark and the trial. Studies of one name share an experiment on a server."""

KIND_OF_EXPERIMENT = ("mlflow.experimentKind", "custom_model_development")
"""Tag of an experiment: a page of MLflow that reads it shows runs, not traces of language models."""


class MLflow:
    """A run for each trial in an experiment of the study's name, and one of the study's own with its report.

    On the server that MLFLOW_TRACKING_URI names, or in `mlflow.db` in the study.
    """

    def __init__(self, root: Path) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise SpecError(
                "log=mlflow: mlflow is not installed; `pip install mlflow`, or leave it out"
            )
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it logs every table it makes
        self.name, self.root = root.absolute().name, root
        asked = os.environ.get("MLFLOW_TRACKING_URI")
        # MLflow takes no folder any more
        uri = asked or f"sqlite:///{absolute(root)}/mlflow.db"
        place = None if asked else f"file://{absolute(root)}/mlflow-artifacts"
        try:
            self.client = MlflowClient(tracking_uri=uri)
            known = self.client.get_experiment_by_name(self.name)
            self.experiment = (
                known.experiment_id
                if known is not None
                else self.client.create_experiment(
                    self.name, artifact_location=place, tags=dict([KIND_OF_EXPERIMENT])
                )
            )
        except MlflowException as error:
            # a URI may hold a password
            where = "MLFLOW_TRACKING_URI" if asked else "mlflow.db in the study"
            raise SpecError(f"log=mlflow: {where}: {str(error).splitlines()[0]}") from None
        self._runs: dict[str, str] = {}

    def began(self, trial: str, settings: Mapping[str, Any]) -> None:
        run = self._runs[trial] = self._run(trial, trial)
        from mlflow.entities import Param

        params = [Param(name, str(value)) for name, value in settings.items()]
        self.client.log_batch(run, params=params)

    def reported(self, trial: str, row: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * row.get("time", time.time()))
        metrics = [
            Metric(name, value, now, row["epoch"]) for name, value in metrics_of(row).items()
        ]
        self.client.log_batch(self._runs[trial], metrics=metrics)

    def ended(self, record: Mapping[str, Any]) -> None:
        if (run := self._runs.pop(record["trial"], None)) is None:
            return
        if record["objective"] is not None:
            self.client.log_metric(run, "objective", float(record["objective"]))
        for name, value in tags_of(record).items():
            self.client.set_tag(run, name, value)
        status = {"failed": "FAILED", "stopped": "KILLED"}.get(record["state"], "FINISHED")
        self.client.set_terminated(run, status)

    def close(self) -> None:
        for run in self._runs.values():
            self.client.set_terminated(run, "KILLED")

    def add_report(self, page: Path, figures: Mapping[str, str]) -> None:
        run = self._run(self.name, "study")
        self.client.log_artifact(run, str(page))
        for name, text in figures.items():
            self.client.log_text(run, text, f"figures/{name}.html")
        for table in sorted(page.parent.glob("*.csv")):
            self.client.log_artifact(run, str(table), "tables")
        self.client.set_terminated(run)

    def _run(self, name: str, what: str) -> str:
        """The run of a trial or of the study: the one of an earlier session, or a new one with this name."""
        own = f"{study_mark(self.root)}/{what}"
        found = self.client.search_runs(
            [self.experiment], f"tags.`{OWN_RUN}` = '{own}'", max_results=1
        )
        if found:
            self.client.update_run(found[0].info.run_id, status="RUNNING")
            return str(found[0].info.run_id)
        made = self.client.create_run(self.experiment, run_name=name, tags={OWN_RUN: own})
        return str(made.info.run_id)


class WeightsAndBiases:
    """A run for each trial in the project `medtune`, grouped by study, where `wandb` is installed and logged in."""

    def __init__(self, root: Path) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise SpecError(
                "log=wandb: wandb is not installed; `pip install wandb`, or leave it out"
            )
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # the console is the study's
        offline = os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")
        if not offline and not _is_logged_in(wandb):
            raise SpecError("log=wandb: not logged in: `wandb login`, or WANDB_MODE=offline")
        self.name, self.root = root.absolute().name, root
        self._wandb: Any = wandb
        self._runs: dict[str, Any] = {}

    def began(self, trial: str, settings: Mapping[str, Any]) -> None:
        self._runs[trial] = self._run(trial, settings)

    def reported(self, trial: str, row: Mapping[str, Any]) -> None:
        self._runs[trial].log(metrics_of(row), step=row["epoch"])

    def ended(self, record: Mapping[str, Any]) -> None:
        if (run := self._runs.pop(record["trial"], None)) is None:
            return
        run.summary.update({"objective": record["objective"], **tags_of(record)})
        run.finish(exit_code=1 if record["state"] == "failed" else 0)

    def close(self) -> None:
        for run in self._runs.values():
            run.finish(exit_code=1)

    def add_report(self, page: Path, figures: Mapping[str, str]) -> None:
        run = self._run("study", {})
        artifact = self._wandb.Artifact(
            f"{re.sub(r'[^A-Za-z0-9_.-]', '-', self.name)}-report", type="report"
        )
        artifact.add_file(str(page))
        run.log_artifact(artifact)
        run.finish()

    def _run(self, name: str, settings: Mapping[str, Any]) -> Any:
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "medtune"),
            group=self.name,
            name=f"{self.name}/{name}",
            id=f"{study_mark(self.root)}-{name}",
            resume="allow",
            reinit="create_new",
            config=dict(settings),
            dir=str(self.root),
            settings=self._wandb.Settings(silent=True, console="off"),
        )


def _is_logged_in(wandb: Any) -> bool:
    """Whether W&B has a key, without asking for one; its server is not asked."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)  # of versions whose `login` always asks
