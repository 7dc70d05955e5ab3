"""Seconds per epoch measured for the form of a new study: a separate process, one at a time, and its results remembered.

The process loads torch, which the service does without. It holds the machine's lock (`tune_app.serve.queue`), so that no
study starts meanwhile and both would be slower than they are alone.
"""

import json
import logging
import math
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from trainables import installed_version
from trainables.checkpoints import write_json
from trainables.config import ConfigError
from trainables.data.json_files import read_json
from trainables.data.storage import StorageError, bucket_of, is_url
from trainables.kernel_cache import step_digest
from trainables.machine.safe_path import python, search_variables
from trainables.machine.this_machine import usable_cpus
from tune_app.results.text import printable
from tune_app.serve.queue import QueueError
from tune_app.study.duration import expected_epochs, study_s
from tune_app.study.heaviest import heaviest
from tune_app.study.policy import Policy
from tune_app.study.policy_spec import watching_only
from tune_app.study.spec import StudySpec

log = logging.getLogger("medtune.serve")

DEADLINE_S = 300
"""Seconds that a measurement may take, loading torch included."""

REMEMBERED = 200
"""Measurements that are kept, the latest ones."""


class Forecast(NamedTuple):
    """How long a study will take on this machine."""

    likely_s: float
    """With the epochs that the stopping policy is expected to run."""
    latest_s: float
    """Where every trial runs to its last epoch."""
    epoch_s: float
    """Seconds of one epoch of one trial."""
    at_once: int
    """Trials at a time."""
    host: str
    device: str
    """CPU, or the name of the GPU."""
    threads: int
    """CPU threads of a trial."""
    trial_gib: float | None
    """Memory of a trial; None where it was not measured."""
    train: int
    val: int
    """Volumes that an epoch trains on and validates."""
    measured: float
    """Unix seconds of the measurement."""


class Measurements:
    """The measurements of this machine, kept in `file`. Safe to use from threads.

    `machine` returns an open file that holds the machine, or raises QueueError. `environment` adds variables to the
    process's.
    """

    def __init__(
        self,
        file: Path,
        machine: Callable[[], int],
        environment: Mapping[str, str],
        *,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._file, self._machine, self._environment = file, machine, dict(environment)
        self._deadline_s = deadline_s
        self._guard = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._key: str | None = None
        self._problems: dict[str, list[str]] = {}
        """Why the last measurement of a key failed, one line per problem."""

    def key(self, spec: StudySpec) -> str:
        """Return the key of all that decides the seconds of an epoch: network, volumes, batch, table, and this machine."""
        config = heaviest(spec)
        return step_digest(
            config,
            split=[config.fold, config.num_folds, config.cross_validate],
            table=[spec.data, _stamp(spec.data)],
            machine=[socket.gethostname(), usable_cpus(), os.environ.get("CUDA_VISIBLE_DEVICES")],
            trial=[spec.cpus_per_rank, spec.gpus_per_trial != 0, spec.ranks],
            versions=[installed_version(name) for name in ("medtune", "torch")],
        )

    def forecast(self, spec: StudySpec) -> Forecast | None:
        """Return how long the study will take here; None where that has not been measured."""
        known = self._read()
        try:
            entry = known.get(self.key(spec)) if known else None
        except ConfigError:  # the heaviest values do not go together: no trial may have all of them
            entry = None
        if entry is None:
            return None
        policy = spec.policy if spec.kind == "search" else watching_only(spec.policy)
        trials, epoch_s = spec.num_trials, float(entry["epoch_s"])
        at_once = min(int(entry["at_once"]), spec.max_concurrent or trials, trials)
        expected = expected_epochs(Policy(policy, spec.epochs), trials)
        likely, latest = (
            study_s(trials, epochs, epoch_s, at_once) for epochs in (expected, spec.epochs)
        )
        rest = {name: entry[name] for name in Forecast._fields if name in entry}
        return Forecast(**rest | {"likely_s": likely, "latest_s": latest, "at_once": at_once})

    def begin(self, spec: StudySpec) -> str:
        """Start to measure an epoch of the study, unless it is remembered; returns its key.

        Raises QueueError while another measurement runs, or a study.
        """
        key = self.key(spec)
        with self._guard:
            if self._process is not None:
                if self._key == key:
                    return key
                raise QueueError("another measurement runs on this machine: wait for it")
            if key in self._read():
                return key
            lock = self._machine()
            try:
                self._process = subprocess.Popen(
                    python("-m", "tune_app.driver.forecast", str(math.ceil(self._deadline_s))),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="backslashreplace",
                    pass_fds=(lock,),
                    env=os.environ | search_variables() | self._environment,
                )
            finally:
                os.close(lock)  # the process has its own copy
            self._key = key
            self._problems.pop(key, None)
            fields = json.dumps(spec.model_dump(mode="json"))
            threading.Thread(
                target=self._finish, args=(self._process, key, fields), daemon=True
            ).start()
        return key

    def state(self, key: str) -> dict[str, Any]:
        """Return what became of a measurement: measuring, measured, failed or unknown, and its problems."""
        with self._guard:
            if self._key == key and self._process is not None:
                return {"state": "measuring", "problems": []}
            if key in self._problems:
                return {"state": "failed", "problems": self._problems[key]}
        return {"state": "measured" if key in self._read() else "unknown", "problems": []}

    def close(self) -> None:
        """End a measurement that runs."""
        process = self._process
        if process is not None:
            process.kill()

    def _finish(self, process: "subprocess.Popen[str]", key: str, fields: str) -> None:
        """Wait for the process, and keep its result or why there is none."""
        try:
            out, errors = process.communicate(fields, timeout=self._deadline_s)
            found, problems = _outcome(process.returncode, out, errors)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            found, problems = (
                {},
                [
                    f"not measured within {self._deadline_s:g} s: this machine is too slow for the network and volumes, or "
                    "too busy; choose a smaller depth, width or volume_shape, or use a GPU"
                ],
            )
        with self._guard:
            if found:
                problems = self._remember(key, found)
            self._problems = {key: problems} if problems else {}
            self._process = self._key = None

    def _remember(self, key: str, found: dict[str, Any]) -> list[str]:
        """Keep a result; returns why it could not be kept."""
        entry = {**found, "host": socket.gethostname(), "measured": time.time()}
        known = {name: each for name, each in self._read().items() if name != key}
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, dict([*known.items(), (key, entry)][-REMEMBERED:]))
        except OSError as error:
            return [f"{self._file}: {error.strerror}: the result is lost"]
        return []

    def _read(self) -> dict[str, Any]:
        """The remembered results; empty where the file is damaged: they are measured again."""
        try:
            known = read_json(self._file)
        except (OSError, ValueError):
            return {}
        if not isinstance(known, dict):
            return {}
        wanted = set(Forecast._fields) - {"likely_s", "latest_s"}
        return {
            name: entry
            for name, entry in known.items()
            if isinstance(entry, dict) and wanted <= set(entry)
        }


def _outcome(code: int, out: str, errors: str) -> tuple[dict[str, Any], list[str]]:
    """Return what a process measured, or its problems."""
    found: Any = None
    with suppress(ValueError):
        found = json.loads(out)
    if isinstance(found, dict) and found.get("problems"):
        return {}, [printable(str(line)) for line in found["problems"]]
    if code == 0 and isinstance(found, dict):
        return found, []
    log.warning("the measurement ended with exit code %d: %s", code, errors)
    if code < 0:
        name = signal.Signals(-code).name
        return {}, [
            f"the measurement was ended by {name}: where memory is short, choose a smaller depth, width, volume_shape or "
            "batch_size"
        ]
    last = (errors.strip().splitlines() or ["no message"])[-1]
    return {}, [f"the measurement failed: {printable(last)[:500]}"]


def _stamp(data: str) -> Any:
    """What changes when the table does; None where it cannot be read, which the measurement reports."""
    if is_url(data):
        bucket, name = bucket_of(data)
        with suppress(StorageError):
            return bucket.stamp(name)
        return None
    try:
        found = Path(data).stat()
    except OSError:
        return None
    return [found.st_mtime_ns, found.st_size]
