"""JSON of ours, read back, whatever has replaced the file: a pipe, a device or a hundred thousand brackets."""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 2**28
"""Of one file: a cohort's record takes some 300 bytes per volume, and a million volumes are the most there may be."""


def regular_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes. Raises OSError, also for pipes and devices.

    A pipe is not waited for, and the checked file is the one that is read.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(
                errno.EINVAL, "a pipe, device or folder, a regular file is needed", str(path)
            )
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than the {limit:,} bytes that are read", str(path))
    return content


def parse_json(content: bytes | str, constant: Callable[[str], Any] | None = None) -> Any:
    """Return the value of a JSON text; `constant` takes NaN and infinities. Raises ValueError, also for too many brackets."""
    try:
        return json.loads(content, parse_constant=constant)
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None


def read_json(path: Path, constant: Callable[[str], Any] | None = None) -> Any:
    """Return the value of a JSON file. Raises OSError and ValueError, and nothing else."""
    return parse_json(regular_bytes(path, MAX_JSON_BYTES), constant)
