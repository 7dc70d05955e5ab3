"""The files of one trial's folder, and how they are written: whole, to a temporary name, then renamed."""

import contextlib
import errno
import json
import logging
import math
import os
import pickle
import re
import sys
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

HURRY = ".hurry"
"""Name of the file in a study's folder that asks its trials for a checkpoint after the epoch they are in."""
ROOM_S = 86_400.0
"""How long a run waits for room on a full disk: enough for the user to notice it after a night."""

DAMAGED = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)
"""What torch.load was seen to raise on truncated and on altered files, and its kin: it promises nothing."""

Result = TypeVar("Result")

log = logging.getLogger("medtune.disk")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file and what to do."""


class DiskFullError(RuntimeError):
    """A disk that stayed full until the timeout."""


@dataclass(frozen=True)
class FileIn:
    """An attribute of a class that names files: the path of the file `name` in the folder that is its attribute `folder`."""

    folder: str
    name: str

    def __get__(self, files: Any, owner: type) -> Path:
        return Path(getattr(files, self.folder), self.name)


@dataclass(frozen=True)
class TrialFiles:
    """Names every file of a trial's folder `trials/<id>`; does not load torch or Ray."""

    folder: Path

    record = FileIn("folder", "trial.json")
    """trial.json: parameters, state, verdict, times, node; written by the driver."""
    config = FileIn("folder", "config.json")
    """config.json: the complete FineTuneConfig the trial ran with; written by the trial."""
    run = FileIn("folder", "run.json")
    """run.json: table and cache of a run of `medtune train`, which belongs to no study."""
    checkpoint = FileIn("folder", "checkpoint.pt")
    """checkpoint.pt: everything needed to continue after the last saved epoch, and its rows."""
    best = FileIn("folder", "best.pt")
    """best.pt: weights of the epoch that stands for the objective so far, of the network that the objective is of."""
    alive = FileIn("folder", "alive")
    """alive: touched as steps are done; a time of access of 0 means that the run waits for room on its disk."""
    apart = FileIn("folder", "apart")
    """apart: there after a fault of the GPU under MPS; the trial's next attempts share no server with others."""
    log = FileIn("folder", "trial.log")
    """trial.log: the output of the trial's process."""


@contextlib.contextmanager
def replacing(path: Path, within: Path | None = None) -> Iterator[Path]:
    """Give a temporary sibling to write to; it replaces `path` when the block ends well, and is removed otherwise.

    A reader sees the old file or the new one, never part of one, whatever is killed or loses its power in between.
    Missing folders are made, but not `within`: raises FileNotFoundError where it has been moved or removed.
    """
    if within is not None and not within.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder was moved or removed", str(within))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    try:
        with naming_a_full_disk(path):
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is not None and str(error.filename) == str(temporary):
            error.filename = str(path)  # a message names the requested file
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def naming_a_full_disk(path: Path) -> Iterator[None]:
    """Have the error of a write for which the disk has no room name `path`: that of an open file names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and is_disk_full(error):
            error.filename = str(path)
        raise


def write_json(path: Path, value: Mapping[str, Any], within: Path | None = None) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinities become null: JSON has no word for them.

    `within`: as in `replacing`.
    """
    with replacing(path, within) as temporary:
        temporary.write_text(
            json.dumps(without_nonfinite(value), indent=1) + "\n", encoding="utf-8"
        )


def without_nonfinite(value: Any) -> Any:
    """Return `value` as JSON has it, at any depth: None for NaN and infinities, Python's own scalars for NumPy's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nonfinite(item) for item in value]
    return value


def when_there_is_room(
    write: Callable[[], Result],
    path: Path,
    *,
    waits: Callable[[], None] | None = None,
    errors: tuple[type[Exception], ...] = (OSError, RuntimeError),
    timeout_s: float = ROOM_S,
) -> Result:
    """Return what `write` returns; while the disk that holds `path` is full, wait and try again.

    `write` must leave nothing half-written when it fails. `waits` is called with each try, as a sign of life for the
    process that supervises this one. `errors`: the exceptions that a full disk may cause (torch raises RuntimeError). Raises
    DiskFullError after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    waited = 0.0
    while True:
        try:
            return write()
        except errors as error:
            if not is_disk_full(error):
                raise
            if time.monotonic() >= deadline:
                raise DiskFullError(
                    f"{path}: no room on its disk for {timeout_s:.0f} s; make room, then resume"
                ) from None
            if not waited:
                log.warning(
                    "the disk is full: waiting to write %s; make room, and the run continues",
                    path,
                )
        if waits is not None:
            waits()
        pause_s = min(5.0, 0.2 + waited / 4)
        time.sleep(pause_s)
        waited += pause_s


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or one of its causes, is a disk without room or a spent quota (SQLite has its own error for it)."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, OSError) and current.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if getattr(current, "sqlite_errorname", None) == "SQLITE_FULL":
            return True
        current = current.__cause__ or current.__context__
    return False


class LogFile(logging.FileHandler):
    """A log that loses lines while the disk is full: logging itself would print a traceback for each of them."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Pass over a line for which there is no room; any other error is printed as logging does it."""
        error = sys.exc_info()[1]
        if error is None or not is_disk_full(error):
            super().handleError(record)

    def close(self) -> None:
        """Close the file. What could not be written before cannot be written now."""
        try:
            super().close()
        except OSError as error:
            if not is_disk_full(error):
                raise


def sweep_temporaries(folder: Path, *written: Path) -> int:
    """Remove temporary files of killed writers from `folder`, those of the files `written` or all; returns how many.

    Call it before their writers start. Driver and trial both write into a trial's folder, at the same time: each removes
    only the temporaries of the files that it writes.
    """
    names = "|".join(re.escape(path.name) for path in written) or ".+"
    ours = re.compile(rf"\.({names})\.[0-9]+\.tmp")  # as `replacing` names them
    leftovers = (
        [found for found in folder.iterdir() if ours.fullmatch(found.name) and found.is_file()]
        if folder.is_dir()
        else []
    )
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return len(leftovers)


def save_state(path: Path, state: Mapping[str, Any], within: Path | None = None) -> None:
    """Write tensors and plain values to `path`, atomically; readable with `weights_only=True`, which `load_state` uses.

    `within`: as in `replacing`.
    """
    import torch

    # Given a path, torch does not report why it failed
    with replacing(path, within) as temporary, temporary.open("wb") as file:
        torch.save(dict(state), file)


def damaged_member(path: Path) -> str | None:
    """Return the name of a part of a zip archive, as torch writes them, whose bytes differ from its checksum; None: none.

    torch itself does not compare checksums: flipped bits would load as weights. Raises zipfile.BadZipFile where even the
    archive's directory is damaged, and for files that are no archives.
    """
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, onto the CPU; nothing but tensors and plain values is unpickled.

    Raises CheckpointError when the file is damaged, by its own checksums, or something else.
    """
    import torch

    try:
        if (member := damaged_member(path)) is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {member}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own remarks on pickles it refuses
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise CheckpointError(
            f"{path}: damaged, or no checkpoint ({reason}): remove it to start again"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: holds a {type(state).__name__}, not a checkpoint: remove it to start again"
        )
    return state
