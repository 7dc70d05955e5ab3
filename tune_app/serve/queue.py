"""The queue of `medtune serve`: studies wait for the machine, and at most one of them has it.

Drivers are separate processes in separate sessions, and keep running when the service ends; a service that
starts again finds the queue in its file and the driver by the locks it holds. Two locks show whether the machine is free:

- the study's own, which every driver holds, however it was started;
- the machine's, one a user and cluster address. It is taken here and inherited by the driver that is started, so that it
  is held exactly as long as that driver lives, whatever becomes of the service, and by services of other folders alike.
"""

import fcntl
import hashlib
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from filelock import Timeout

from trainables.checkpoints import write_json
from trainables.data.json_files import read_json
from trainables.data.storage import DATA_ROOTS
from trainables.machine.file_locks import NO_FLOCK
from trainables.machine.safe_path import python, search_variables
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles, default_cache
from tune_app.study.requests import ask_to_stop_study
from tune_app.study.rows import driver_lock, is_held

log = logging.getLogger("medtune.serve")

EVERY_S = 0.5
"""Seconds between two looks at whether the next study can start."""

Action = Literal["run", "resume", "retry"]
"""retry: resume, and let failed trials continue."""


class QueueError(ValueError):
    """Something that cannot be done with a study as things stand."""


@dataclass(frozen=True)
class Entry:
    """One study that waits, or that has been started last."""

    path: str
    """The study's folder."""
    action: Action
    asked: float
    """Unix seconds."""
    started: float | None = None
    """Unix seconds at which its driver was started."""
    begun: bool = False
    """Whether its driver has been seen to hold the study."""
    stopping: bool = False
    """Whether it was asked to stop."""
    exit_code: int | None = None
    """How its driver ended, where this service saw it end."""

    def as_row(self) -> dict[str, Any]:
        return dict(vars(self))


class StudyQueue:
    """Studies that wait for this machine, and the driver that was started last. Safe to use from several threads.

    `file` keeps it; `studies` names the folders whose drivers count as holding the machine; `address` is the Ray cluster
    the drivers use, None for a local Ray each. `place` gives the name of a study's folder that a driver gets. `data_roots`: where there are
    any, the drivers read tables and volumes below them alone.
    """

    def __init__(
        self,
        file: Path,
        studies: Callable[[], list[Path]],
        *,
        address: str | None = None,
        place: Callable[[Path], str] = str,
        data_roots: Sequence[str] = (),
    ) -> None:
        self._file, self._studies, self._address, self._place = file, studies, address, place
        self.environment = {DATA_ROOTS: "\n".join(data_roots)} if data_roots else {}
        """Variables of every process that reads tables and volumes for the page."""
        name = hashlib.sha256((address or "this machine").encode()).hexdigest()[:12]
        self.machine_lock = default_cache() / f"machine-{name}.lock"
        self._guard = threading.RLock()
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self.waiting: list[Entry] = []
        self.last: Entry | None = None
        """The driver started last; it may have ended."""
        self._read()

    # Requests of the page ----------------------------------------------------------------------------------------------

    def add(self, root: Path, *, retry_failed: bool = False) -> None:
        """Let the study wait for its turn, its failed trials too where asked.

        Raises QueueError when it waits, starts or runs already.
        """
        files = StudyFiles(root)
        with self._guard:
            if self.is_active(root):
                raise QueueError(f"{root.name} waits or runs already")
            action: Action = "run"
            if files.spec.is_file():
                action = "retry" if retry_failed else "resume"
            if action == "run" and not files.asked.is_file():
                raise QueueError(f"{root.name} holds no study and no study file")
            try:
                files.require_own()
            except SpecError as error:
                raise QueueError(str(error)) from None
            self.waiting.append(Entry(str(root), action, time.time()))
            self._write()

    def stop(self, root: Path) -> str:
        """Take the study from the queue, or ask its driver to stop; returns which: removed or asked.

        Raises QueueError when it does not wait and does not run.
        """
        with self._guard:
            kept = [entry for entry in self.waiting if entry.path != str(root)]
            if len(kept) < len(self.waiting):
                self.waiting = kept
                self._write()
                return "removed"
            if self.is_starting(root):
                # Its driver takes a request only once it holds the lock, and voids those that were there before.
                self._change_last(stopping=True)
                return "asked"
            if is_held(StudyFiles(root).lock):
                if self.last is not None and self.last.path == str(root):
                    self._change_last(stopping=True)
                ask_to_stop_study(StudyFiles(root))
                return "asked"
        raise QueueError(f"{root.name} is not waiting and not running")

    @contextmanager
    def hold_still(self, root: Path, inside: Iterable[Path] = ()) -> Iterator[None]:
        """Keep the study in `root`, and those in `inside`, from being queued or started in the meantime.

        Drivers that are started by hand find their locks taken. Raises QueueError when one waits, starts or runs.
        """
        with self._guard, ExitStack() as locks:
            for each in (root, *inside):
                if not each.is_dir():  # the lock's file would make it again
                    raise QueueError(f"{each.name} is no longer there")
                busy = self.is_active(each)
                try:
                    if not busy:
                        locks.enter_context(driver_lock(StudyFiles(each).lock))
                except Timeout:
                    busy = True
                except (
                    OSError
                ):  # another user's, or no lock at all: whether it is held has been asked
                    log.info("%s: changed without its lock", each)
                if busy:
                    raise QueueError(f"{each.name} waits or runs: stop it first")
            yield

    def place(self, root: Path) -> int | None:
        """Return the study's place in the queue, 1 for the next; None when it does not wait."""
        with self._guard:
            paths = [entry.path for entry in self.waiting]
        return paths.index(str(root)) + 1 if str(root) in paths else None

    def is_starting(self, root: Path) -> bool:
        """Whether its driver was started and does not hold the study yet."""
        with self._guard:
            ours = (
                self.last is not None
                and self.last.path == str(root)
                and self.last.exit_code is None
            )
            begun = self.last is not None and self.last.begun
            return (
                ours
                and not begun
                and not is_held(StudyFiles(root).lock)
                and (is_held(self.machine_lock) or self._is_alive())
            )

    def _is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def is_active(self, root: Path) -> bool:
        """Whether the study waits, starts or runs."""
        return (
            self.place(root) is not None or self.is_starting(root) or is_held(StudyFiles(root).lock)
        )

    # The machine's turns -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Start the next study whenever the machine is free, until `close`; runs in a separate thread."""
        while not self._ended.wait(EVERY_S):
            try:
                self.advance()
            except OSError:  # a full or vanished disk: log it, and look again
                log.exception("the queue cannot continue")

    def close(self) -> None:
        """End `run`. Drivers keep running."""
        self._ended.set()

    def advance(self) -> bool:
        """Look once; returns whether a study was started."""
        with self._guard:
            self._follow_last()
            if not self.waiting:
                return False
            if self._is_studying():
                return False
            lock = self._take_machine()
            if lock is None:
                return False
            try:
                entry = self.waiting.pop(0)
                self._process = self._start(entry, lock)
                self.last = Entry(entry.path, entry.action, entry.asked, started=time.time())
                self._write()
            finally:
                os.close(lock)  # the driver has its own copy
            return True

    def hold_machine(self) -> int:
        """Return an open file that keeps studies from starting for as long as a process has it. Raises QueueError."""
        with self._guard:
            if not self._is_studying() and (lock := self._take_machine()) is not None:
                return lock
        raise QueueError("a study or a measurement runs on this machine: wait until it has ended")

    def _is_studying(self) -> bool:
        return any(is_held(StudyFiles(path).lock) for path in self._studies())

    def _follow_last(self) -> None:
        """Note how the driver ended; ask it to stop as long as it was meant to and has not."""
        if self.last is None or self.last.exit_code is not None:
            return
        code = self._process.poll() if self._process is not None else None
        if code is not None:
            self._process = None
            self._change_last(exit_code=code, stopping=False)
        elif is_held((files := StudyFiles(Path(self.last.path))).lock):
            if not self.last.begun:
                self._change_last(begun=True)
            if self.last.stopping:
                ask_to_stop_study(files)

    def _change_last(self, **fields: Any) -> None:
        assert self.last is not None
        self.last = replace(self.last, **fields)
        self._write()

    def _start(self, entry: Entry, lock: int) -> "subprocess.Popen[bytes]":
        files = StudyFiles(Path(entry.path))
        place = self._place(files.root)
        command = python("-m", "tune_app.cli")
        if entry.action == "run":
            command += ["run", str(files.asked), "--out", place]
        else:
            command += ["resume", place, *["--retry-failed"] * (entry.action == "retry")]
        command += ["--address", self._address] if self._address else []
        with open(files.console, "ab", opener=_no_link) as console:
            console.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {entry.action}\n".encode())
            console.flush()
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C here and the end of this terminal do not reach it
                pass_fds=(lock,),
                env=os.environ | search_variables() | {"COLUMNS": "100"} | self.environment,
            )

    def _take_machine(self) -> int | None:
        """Return an open file that holds the machine's lock, or None while a driver holds it."""
        self.machine_lock.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.machine_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError as error:
            if error.errno not in NO_FLOCK:
                os.close(lock)
                raise
            log.warning(
                "%s: its file system has no locks: another service on this machine is not noticed; set MEDTUNE_CACHE to a "
                "folder on a local disk",
                self.machine_lock,
            )
        return lock

    # Its file ----------------------------------------------------------------------------------------------------------

    def _write(self) -> None:
        value: Mapping[str, Any] = {
            "waiting": [entry.as_row() for entry in self.waiting],
            "last": self.last.as_row() if self.last else None,
        }
        write_json(self._file, value)

    def _read(self) -> None:
        if not self._file.is_file():
            return
        try:
            value = read_json(self._file)
            self.waiting = [Entry(**row) for row in value["waiting"]]
            self.last = Entry(**value["last"]) if value["last"] else None
        except (ValueError, KeyError, TypeError) as error:
            raise QueueError(
                f"{self._file}: damaged, remove it and queue the studies again: {error}"
            ) from None


def _no_link(path: str, flags: int) -> int:
    """Open a file, but no link and no pipe without a reader: either may be in a folder that others write to."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
