"""The studies of a folder, read when they change."""

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainables.data.visible import visible
from tune_app.results.loading import load_study
from tune_app.results.study import Study
from tune_app.results.text import printable
from tune_app.serve.replica import Replica
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.rows import is_held

DEPTH = 3
"""Folders deep that studies are looked for: a confirmation is stored in its search, a search may be in a group's folder."""


ID_LENGTH = 400
"""Characters of a study's id."""


REST = 4
"""A study that took t seconds to read is not read again for REST * t seconds: the page must not slow the search down."""


class UnknownError(LookupError):
    """No such study, trial or figure."""


class UnreadableError(ValueError):
    """A study that cannot be read, with the reason."""


@dataclass
class Reading:
    """A study as it was read, and the values computed from it."""

    study: Study
    size: int
    """Bytes of epochs.jsonl before it was read; all of their rows are in."""
    stamp: tuple[Any, ...]
    took_s: float
    at: float
    memo: dict[Any, Any] = field(default_factory=dict)
    locks: dict[Any, threading.Lock] = field(default_factory=dict)
    guard: threading.Lock = field(default_factory=threading.Lock)


class StudyFolder:
    """The studies below `root`, each read once for all viewers. Safe to use from several threads.

    With a `replica` that is its folder, a copy of the studies in object storage.
    """

    def __init__(self, root: Path, replica: Replica | None = None) -> None:
        self.root, self.replica = root.resolve(), replica
        self._guard = threading.Lock()
        self._readings: dict[Path, Reading] = {}
        self._errors: dict[Path, tuple[tuple[Any, ...], str]] = {}
        self._locks: dict[Path, threading.Lock] = {}
        self._walking = threading.Lock()
        self._begun = self._walked = -math.inf
        self._found: dict[str, Path] = {}

    # Which there are ---------------------------------------------------------------------------------------------------

    def paths(self, since: float | None = None) -> dict[str, Path]:
        """Return the folders of the studies by id, looked up again after a second, or if last before `since` (monotonic)."""
        with self._walking:  # callers that come meanwhile share the result
            if time.monotonic() - self._walked > 1.0 or (since is not None and self._begun < since):
                self._begun, found = time.monotonic(), dict[str, Path]()
                for path in self._walk(self.root, 0):
                    name = self.name(path)
                    found[name if name not in found else _distinct(name, path)] = path
                self._found, self._walked = found, time.monotonic()
            return self._found

    def name(self, path: Path) -> str:
        """Return the id of the study in the folder `path`."""
        name = path.relative_to(self.root).as_posix().replace("/", "~")
        shown = visible(self.root.name if name == "." else name)
        return shown if len(shown) <= ID_LENGTH else _distinct(shown, path)

    def place(self, path: Path) -> str:
        """Return the argument by which a command names the study in the folder `path`."""
        return str(path) if self.replica is None else self.replica.place(path)

    def path(self, study: str) -> Path:
        """Return the folder of the study with that id, however new it is. Raises UnknownError."""
        asked = time.monotonic()
        found = self.paths().get(study) or self.paths(since=asked).get(study)
        if found is None:
            raise UnknownError(
                f"no study {printable(study)[:100]!r} here; the list shows all of them"
            )
        return found

    def _walk(self, folder: Path, depth: int) -> list[Path]:
        files = StudyFiles(folder)
        found = [folder] if files.spec.is_file() or files.asked.is_file() else []
        if depth == DEPTH:
            return found
        try:
            children = sorted(folder.iterdir())
        except OSError:
            return found
        skipped = {files.trials, files.ray, files.requests} if found else set()
        for child in children:
            if (
                child not in skipped
                and not child.name.startswith(".")
                and child.is_dir()
                and not child.is_symlink()
            ):
                found += self._walk(child, depth + 1)
        return found

    # Reading -----------------------------------------------------------------------------------------------------------

    def reading(self, study: str, *, wait: bool = True) -> Reading | None:
        """Return the study as last read; reads it again when its files changed and the last time is long enough ago.

        Without `wait`, None when it has never been read. Raises UnknownError and UnreadableError.
        """
        path = self.path(study)
        if self.replica is not None:
            self.replica.look()
        with self._guard:
            lock = self._locks.setdefault(path, threading.Lock())
            reading, error = self._readings.get(path), self._errors.get(path)
        if not wait and reading is None:
            if error is not None:
                raise UnreadableError(error[1])
            return None
        if reading is not None and time.monotonic() < reading.at + REST * reading.took_s:
            return reading
        if not lock.acquire(blocking=reading is None):
            return reading  # another thread reads it
        try:
            return self._read_again(path)
        finally:
            lock.release()

    def _read_again(self, path: Path) -> Reading:
        with self._guard:
            reading, error = self._readings.get(path), self._errors.get(path)
        stamp = self.stamp(path)
        if reading is not None and reading.stamp == stamp:
            return reading
        if error is not None and error[0] == stamp:
            raise UnreadableError(error[1])
        started = time.monotonic()
        files = StudyFiles(path)
        size = files.epochs.stat().st_size if files.epochs.exists() else 0
        try:
            files.require_own()
            loaded = load_study(path, on_damage="skip")
        except SpecError as problem:
            with self._guard:
                self._errors[path] = (stamp, str(problem))
            raise UnreadableError(str(problem)) from None
        if self.replica is not None:
            loaded = replace(loaded, url=self.replica.place(path))
        now = time.monotonic()
        reading = Reading(loaded, size, stamp, now - started, now)
        with self._guard:
            self._readings[path] = reading
            self._errors.pop(path, None)
        return reading

    def stamp(self, path: Path) -> tuple[Any, ...]:
        """Return what changes when the study does."""
        files = StudyFiles(path)
        watched = [files.spec, files.epochs, files.decisions, files.trials, files.test]
        records = files.trials.glob("*/trial.json") if files.trials.is_dir() else ()
        return (
            is_held(files.lock),
            *map(_mark, watched),
            max((_mark(record)[0] for record in records), default=0),
        )

    def memo(self, reading: Reading, key: Any, make: Callable[[Study], Any]) -> Any:
        """Return `make(study)`, computed once a reading, however many ask at the same time."""
        with reading.guard:
            lock = reading.locks.setdefault(key, threading.Lock())
        with lock:
            if key not in reading.memo:
                reading.memo[key] = make(reading.study)
            return reading.memo[key]


def _distinct(name: str, path: Path) -> str:
    """An id of at most ID_LENGTH characters for a folder whose own name is too long, or another one's when written out."""
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    return f"{name[: ID_LENGTH - 9]}~{digest}"


def _mark(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)
