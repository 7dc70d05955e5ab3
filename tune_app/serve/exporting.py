"""Models exported from the page: `medtune export` as a separate process, one at a time, into `.medtune/models`."""

import fcntl
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from trainables.checkpoints import write_json
from trainables.data.json_files import read_json
from trainables.machine.safe_path import python, search_variables
from tune_app.results.text import printable
from tune_app.serve.queue import QueueError
from tune_app.study.rows import is_held

MODEL = "model.json"


class Exports:
    """The models in `folder`: one folder each, its log and its origin next to it. Safe to use from threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._guard = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self, name: str, study: str, root: Path, options: list[str]) -> None:
        """Start the export of a trial of the study in `root`. Raises QueueError where one runs, or the name is taken."""
        with self._guard:
            if self._process is not None and self._process.poll() is None:
                raise QueueError("another model is being exported: wait for it")
            target = self.folder / name
            if target.exists():
                raise QueueError(f"{name}: there is a model of this name; choose another name")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._about(name), {"study": study, "asked": time.time()})
            command = python("-m", "tune_app.cli", "export", str(root))
            command += ["--out", str(target), "--device", "cpu", *options]
            # The process holds its log locked for as long as it lives, whatever becomes of the service.
            log = os.open(self._log(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=os.environ | search_variables() | {"COLUMNS": "100"},
                )
            finally:
                os.close(log)

    def of(self, study: str) -> list[dict[str, Any]]:
        """Return the models of a study, latest first: name, folder, state (writing, written, failed) and the log's end."""
        found = []
        for path in self.folder.glob(".*.about"):
            name = path.name.removeprefix(".").removesuffix(".about")
            try:
                about = read_json(path)
            except (OSError, ValueError):
                continue
            if not isinstance(about, dict) or about.get("study") != study:
                continue
            found.append({"name": name, "asked": about.get("asked"), **self._standing(name)})
        return sorted(found, key=lambda each: each["asked"] or 0.0, reverse=True)

    def _standing(self, name: str) -> dict[str, Any]:
        target, log = self.folder / name, self._log(name)
        if is_held(log):
            state = "writing"
        else:
            state = "written" if (target / MODEL).is_file() else "failed"
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        return {
            "state": state,
            "place": str(target),
            "lines": [printable(line) for line in lines[-5:]],
        }

    def archive(self, study: str, name: str) -> Path:
        """Return a new temporary zip file of a model of the study. Raises QueueError where it is not there whole."""
        model = next((each for each in self.of(study) if each["name"] == name), None)
        if model is None or model["state"] != "written":
            raise QueueError(f"{printable(name)[:100]}: no model of this name has been exported")
        with tempfile.NamedTemporaryFile(suffix=".zip", delete=False) as file:
            path = Path(file.name)
        made = shutil.make_archive(str(path.with_suffix("")), "zip", self.folder, name)
        return Path(made)

    def _about(self, name: str) -> Path:
        return self.folder / f".{name}.about"  # no model's name begins with a dot

    def _log(self, name: str) -> Path:
        return self.folder / f".{name}.log"
