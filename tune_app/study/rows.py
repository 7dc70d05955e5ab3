"""Rows of a study directory, read and checked line by line."""

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy

from trainables.data.json_files import parse_json, read_json
from trainables.errors import ProblemsError, one_line
from trainables.machine.file_locks import NO_FLOCK, acquire_lock, soft_lock_is_held
from tune_app.study.columns import ANY_FLOAT32, EPOCH_BOUNDS, EPOCH_COLUMNS
from tune_app.study.errors import SpecError


class StudyDamageError(ProblemsError):
    """Files of a study without the content that they must have. `problems` names file and line, one each."""


STATES = ("completed", "stopped", "running", "interrupted", "failed")


ENDED = ("completed", "stopped", "failed")


def is_held(lock: Path) -> bool:
    """Return whether a driver holds `lock` (a filelock); asks without keeping it, writes nothing.

    Only the driver's user may open the file, because flock needs no more than read access; other users find the lock in
    the system's table of locks. Where there is no flock, the file holds the process that has the lock.
    """
    if not lock.is_file():
        return False
    try:
        import fcntl
    except ImportError:
        return True
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back when the file closes
    except BlockingIOError:
        return True
    except PermissionError:
        return _is_listed(lock)
    except OSError as error:
        return error.errno in NO_FLOCK and soft_lock_is_held(lock)
    return soft_lock_is_held(lock)  # taken on a machine of the same file system that has no flock


def driver_lock(lock: Path, timeout: float = 0.0) -> "AcquireReturnProxy[Any]":
    """Return the lock a driver holds, taken within `timeout` seconds, for a `with`. Raises filelock's Timeout.

    Only the driver's user may open the file: any other reader could take the lock and so keep the study from running.
    """
    held = acquire_lock(lock, timeout)
    lock.chmod(0o600)  # versions before left it readable
    return held


SYSTEM_LOCKS = Path("/proc/locks")


def _is_listed(lock: Path) -> bool:
    """Whether Linux lists a lock of the file: `1: FLOCK ADVISORY WRITE <pid> <major>:<minor>:<inode> 0 EOF`."""
    try:
        found = lock.stat()
        listed = SYSTEM_LOCKS.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    name = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    return any(name in line.split() for line in listed.splitlines() if "->" not in line)


def record_problem(folder: str, record: Mapping[str, Any]) -> str | None:
    if record.get("trial", folder) != folder:
        return f"names trial {record['trial']!r}: a folder was renamed or copied"
    if record.get("state") not in ("running", *ENDED):
        return f"state {record.get('state')!r}: one of running, completed, stopped, failed"
    if not isinstance(record.get("overrides", {}), dict):
        return f"overrides are a {type(record['overrides']).__name__}, must be an object"
    for name in ("number", "started", "ended", "gpus", "failures", "objective", "verdict_epoch"):
        value = record.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"{name} is {value!r}, must be a number or null"
    for name in ("variant", "reason", "verdict", "advice", "error", "node"):
        if not isinstance(record.get(name), str | None):
            return f"{name} is {record[name]!r}, must be text or null"
    return None


def read_object(path: Path, damage: list[str]) -> dict[str, Any] | None:
    try:
        value = read_json(path, constant=_constant)
    except (OSError, ValueError) as error:
        damage.append(f"{path}: not JSON: {one_line(error)}")
        return None
    if not isinstance(value, dict):
        damage.append(f"{path}: a {type(value).__name__}, must be an object")
        return None
    return value


def _constant(word: str) -> float:
    """NaN is read as the null it should have been; an infinity would win every comparison."""
    if word == "NaN":
        return math.nan
    raise ValueError(f"{word} is no score")


MAX_ROWS_BYTES = 2**30
"""Of one JSONL file: more than a million rows."""


def whole_lines(path: Path, notes: list[str]) -> bytes:
    """Content of `path` up to its last line end; the rest is a line being written, or one cut by a kill.

    Raises SpecError for a file larger than MAX_ROWS_BYTES: without disk space a file can have any size.
    """
    if not path.is_file():
        return b""
    if (size := path.stat().st_size) > MAX_ROWS_BYTES:
        raise SpecError(f"{path}: damaged: {size:,} bytes, at most {MAX_ROWS_BYTES:,} are read")
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        notes.append(f"{path.name}: last line unfinished ({len(content) - end} bytes), left out")
    return content[:end]


def is_trial_id(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9A-Za-z_-]{1,64}", value) is not None


def read_epochs_by_line(path: Path, content: bytes, damage: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    seen: dict[tuple[str, int], int] = {}
    latest: dict[str, int] = {}
    for line, row in json_lines(path, content, damage):
        problem = _row_problem(row)
        if problem is None:
            key = (row["trial"], int(row["epoch"]))
            first = seen.setdefault(key, line)
            if first != line:
                problem = f"trial {key[0]} epoch {key[1]} again, first in line {first}"
            elif key[1] < (last := latest.get(key[0], 0)):
                problem = (
                    f"trial {key[0]} epoch {key[1]} after its epoch {last} in line "
                    f"{seen[key[0], last]}: out of order"
                )
            elif "val_auc" not in row:
                problem = "has no val_auc (null where the score does not exist)"
            else:
                latest[key[0]] = key[1]
        if problem is None:
            rows.append({**row, "epoch": int(row["epoch"])})
        else:
            damage.append(f"{path}:{line}: {problem}")
    return rows


def _row_problem(row: Mapping[str, Any]) -> str | None:
    if not is_trial_id(row.get("trial")):
        return f"trial {row.get('trial')!r}: must be the id of a trial"
    epoch = row.get("epoch")
    if (
        isinstance(epoch, bool)
        or not isinstance(epoch, int | float)
        or epoch % 1
        or not 1 <= epoch < LARGEST_WHOLE
    ):
        return f"epoch {epoch!r}: must be a whole number from 1"
    return next(filter(None, itertools.starmap(_cell_problem, row.items())), None)


def _cell_problem(name: str, value: Any) -> str | None:
    dtype = EPOCH_COLUMNS.get(name, ("", ""))[0]
    if isinstance(value, dict | list) or name == "arrival":
        return f"{name} is a {type(value).__name__}, must be one value"
    wrong = {
        "float64": isinstance(value, bool | str) or value in (math.inf, -math.inf),
        "Int64": isinstance(value, bool | str)
        or (isinstance(value, float) and not value.is_integer())
        or (isinstance(value, int | float) and abs(value) >= LARGEST_WHOLE),
        "boolean": not isinstance(value, bool),
        "string": not isinstance(value, str),
    }
    if value is not None and wrong.get(dtype, False):
        return f"{name} is {value!r}, must be {_DTYPE_WORDS[dtype]}"
    low, high = EPOCH_BOUNDS.get(name, ANY_FLOAT32)
    if isinstance(value, int | float) and (value < low or value > high):  # not NaN
        least, most = (round(end, 3) + 0.0 for end in (low, high))
        return f"{name} is {value!r:.100}, must be between {least:g} and {most:g}"
    return None


LARGEST_WHOLE = 2**53
"""No count in a study comes near; from here on a float is not the number that was written."""


_DTYPE_WORDS = {
    "float64": "a number",
    "Int64": "a whole number",
    "boolean": "true or false",
    "string": "text",
}


def json_lines(
    path: Path, content: bytes, damage: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers and objects of the whole lines of `content`; any other line goes to `damage`, with file and line."""
    for line, text in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            row = parse_json(text, _constant)
        except ValueError as error:
            damage.append(f"{path}:{line}: not a JSON row: {one_line(error)}")
            continue
        if isinstance(row, dict):
            yield line, row
        else:
            damage.append(f"{path}:{line}: a {type(row).__name__}, must be an object")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file of a study in the order of the file; none when it does not exist.

    For callers that replay rows. An unfinished last line is left out; NaN is None. Raises StudyDamageError naming each
    line that is not a row, and in epochs.jsonl each that is not one of a trial's epoch, or is there twice.
    """
    damage: list[str] = []
    content = whole_lines(path, [])
    rows = (
        read_epochs_by_line(path, content, damage)
        if path.name == "epochs.jsonl"
        else [row for _, row in json_lines(path, content, damage)]
    )
    if damage:
        raise StudyDamageError(damage)
    return rows


def read_record(path: Path) -> dict[str, Any]:
    """Return a trial's trial.json. Raises StudyDamageError when it is unreadable or invalid."""
    damage: list[str] = []
    record = read_object(path, damage)
    problem = record_problem(path.parent.name, record) if record is not None else None
    if record is None or problem:
        raise StudyDamageError(damage or [f"{path}: {problem}"])
    return record
