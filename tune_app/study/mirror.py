"""A study in object storage: the driver works in a folder of its machine and mirrors it, trials keep theirs there too.

Object storage has no appending, no locks and no SQLite, so the study is not worked on there. The mirror follows in
seconds; whatever it had not got yet when its driver died is in the trials' own checkpoints, which are in the storage
before an epoch is reported. The storage is the truth: a driver that resumes starts from it alone.
"""

import json
import logging
import os
import socket
import sqlite3
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path

from trainables.checkpoints import HURRY, replacing, write_json
from trainables.data.json_files import parse_json
from trainables.data.storage import Listed, Remote, StorageError, patient
from trainables.own_folder import MARKER, fresh_own
from tune_app.study.copies import LEASE, REQUEST, copy_objects
from tune_app.study.files import StudyFiles, default_cache, job_name

log = logging.getLogger("medtune.storage")

BEAT_S = 5.0
"""Seconds between two writings of it."""
SILENT_S = 3 * BEAT_S
"""Seconds without one after which its driver counts as gone; no clock of another machine is asked."""
PAUSE = 3
"""Times as long as sending took until the next sending: large studies are mirrored less often."""


class BusyError(RuntimeError):
    """Another driver is at work on the study in the storage."""


@contextmanager
def mirrored(url: str) -> Iterator[StudyFiles]:
    """Give a folder of this machine to work in, with all that the storage has of the study; mirror it while the block runs.

    Raises BusyError when another driver is at work, StorageError when the storage does not answer at the start, or has
    not got everything at the end: the folder is then left and named.
    """
    remote = Remote(url)
    folder = default_cache() / "studies" / job_name(url)
    mirror = Mirror(remote, StudyFiles(folder))
    mirror.take()
    try:
        if aside := fresh_own(folder, url):  # the storage is the truth
            log.warning(
                "%s: not from the storage, or not all of it sent; moved to %s", folder, aside
            )
        listed = [
            one for one in remote.listing() if not one.name.endswith(".pt") and one.name != LEASE
        ]
        mirror.has_brought(listed)
        copy_objects(remote, [one.name for one in listed if one.name != HURRY], folder)
        with mirror:
            yield mirror.files
    finally:
        mirror.release()


class Mirror:
    """Sends the driver's files: never a record of a trial before the rows it rests on."""

    def __init__(self, remote: Remote, files: StudyFiles) -> None:
        self.remote, self.files = remote, files
        self.identity = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex[:8]}"
        self._sent: dict[str, bytes] = {}
        self._brought: dict[str, datetime] = {}
        """Requests that are in the folder too, or were until they were answered."""
        self._hurried = False
        """Whether HURRY is in the storage."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self._beats = 0

    def take(self) -> None:
        """Become the study's driver. Raises BusyError when another one shows signs of life."""
        if there := self.remote.read(LEASE):
            deadline = time.monotonic() + SILENT_S
            while time.monotonic() < deadline:
                time.sleep(1.0)
                now = self.remote.read(LEASE)
                if now is None:
                    break
                if now != there:
                    who = parse_json(now).get("driver", "another machine")
                    raise BusyError(
                        f"{self.remote.url}: {who} is driving this study; wait for it, or stop it first"
                    )
        self._beat()
        time.sleep(1.0)
        if self._driver() != self.identity:
            raise BusyError(f"{self.remote.url}: another driver started at the same moment")

    def release(self) -> None:
        """Remove the lease: no driver runs the study any more."""
        if self._driver() == self.identity:
            self.remote.delete(LEASE)

    def __enter__(self) -> "Mirror":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        try:
            with patient():
                self.send()
                self.requests()
                self.hurry()
        except StorageError as error:
            (self.files.root / MARKER).unlink(missing_ok=True)  # the next driver must not remove it
            raise StorageError(f"{error}; everything is in {self.files.root}") from None

    def send(self) -> None:
        """Send the changes since the last time."""
        # Read in the order of trust: records first, the rows they rest on last; sent the other way round.
        records = {
            f"trials/{path.parent.name}/trial.json": path
            for path in self.files.trials.glob("*/trial.json")
        }
        found = {
            name: content
            for name, path in records.items()
            if (content := _content(path)) is not None
        }
        if self.files.database.is_file():
            found[self.files.database.name] = _database(self.files.database)
        for path in (self.files.log, self.files.decisions, self.files.epochs, self.files.spec):
            if (content := _content(path)) is not None:
                found[path.name] = content
        for name, content in reversed(found.items()):
            if self._sent.get(name) != content:
                self.remote.write(name, content)
                self._sent[name] = content

    def has_brought(self, listed: list[Listed]) -> None:
        """Note the objects that were there, and have been copied to the folder, before the driver started."""
        self._brought = {one.name: one.written for one in listed if REQUEST.fullmatch(one.name)}
        self._hurried = any(one.name == HURRY for one in listed)

    def hurry(self) -> None:
        """Let trials of other nodes, which look into the storage, know that the driver's machine is about to be taken away."""
        asked = self.files.hurry.exists()
        if asked == self._hurried:
            return
        if asked:
            self.remote.write(HURRY, b"{}")
        else:
            self.remote.delete(HURRY)
        self._hurried = asked

    def requests(self) -> None:
        """Bring new requests to the driver (`tune_app.study.requests`); remove there all that have been answered here."""
        for name, written, _ in self.remote.listing("requests"):
            if not REQUEST.fullmatch(name):
                continue
            if self._brought.get(name) != written:
                write_json(self.files.root / name, {"asked": written.timestamp()})
                self._brought[name] = written
            elif not (self.files.root / name).exists():
                self.remote.delete(name)
                del self._brought[name]

    def _work(self) -> None:
        beaten, due = time.monotonic(), 0.0
        while not self._ended.wait(1.0):
            began = time.monotonic()
            try:
                self.hurry()
                if began - beaten >= BEAT_S:
                    self._beat()
                    beaten = began
                    self.requests()
                if began >= due:
                    self.send()
                    due = time.monotonic() + PAUSE * (time.monotonic() - began)
            except StorageError as error:
                log.warning("%s; tried again", error)

    def _beat(self) -> None:
        self._beats += 1
        self.remote.write(
            LEASE, json.dumps({"driver": self.identity, "beat": self._beats}).encode()
        )

    def _driver(self) -> str | None:
        there = self.remote.read(LEASE)
        return None if there is None else str(parse_json(there).get("driver"))


def drop_unrecorded(files: StudyFiles) -> list[str]:
    """Take out the rows of trials that have no record, and return these trials, after `mend_last_line`.

    A mirror whose driver died between two sendings may have the first rows of a trial that had just started, and not its
    record yet. The trial starts again from its checkpoint, and reports them again.
    """
    recorded = {path.parent.name for path in files.trials.glob("*/trial.json")}
    dropped: set[str] = set()
    for path in (files.decisions, files.epochs):
        lines = (_content(path) or b"").splitlines(keepends=True)
        trials = [_trial_of(line) for line in lines]
        ahead = {trial for trial in trials if trial is not None} - recorded
        if ahead:
            kept = [line for line, trial in zip(lines, trials, strict=True) if trial not in ahead]
            with replacing(path) as temporary:
                temporary.write_bytes(b"".join(kept))
        dropped |= ahead
    return sorted(dropped)


def _trial_of(line: bytes) -> str | None:
    """The trial that a row is of; None for a damaged one, which readers of rows report."""
    try:
        return str(parse_json(line)["trial"])
    except (ValueError, RecursionError, LookupError, TypeError):
        return None


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _database(path: Path) -> bytes:
    """A copy of the database as of one moment, while Optuna writes to it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        return copy.read_bytes()
