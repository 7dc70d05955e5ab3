"""Locks in files, on any file system.

Most have flock, which the kernel gives back whatever becomes of its holder. Some network and user-space file systems
have none: there the file itself is the lock, and holds the process and the machine that made it (filelock's soft lock).
"""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock, SoftFileLock

NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What flock answers where a file system has none."""


SOFT_S = 1.0
"""Seconds for which a soft lock is tried at least: a holder that was killed is noticed at a second look."""


def acquire_lock(path: Path, timeout: float = 0.0) -> "AcquireReturnProxy[Any]":
    """Return the lock in the file `path`, of mode 600, taken within `timeout` seconds, for a `with`.

    Raises filelock's Timeout where another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if has_flock(path.parent):
        return FileLock(path, mode=0o600).acquire(timeout=timeout)
    return SoftFileLock(path, mode=0o600).acquire(timeout=max(timeout, SOFT_S))


def has_flock(folder: Path) -> bool:
    """Whether the file system of this folder has flock: asked by a shared one on the folder itself, given back at once."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in NO_FLOCK
    finally:
        os.close(handle)
    return True


def soft_lock_is_held(path: Path) -> bool:
    """Whether the file holds the process of a soft lock that is at work, as far as this machine can know.

    A process of another machine counts as being at work, and so does one in a file that this user must not read.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return False
    except (OSError, UnicodeDecodeError):
        return True
    if len(lines) < 2 or not lines[0].isdecimal():
        return False  # left by a flock
    if lines[1].partition("?")[0] != socket.gethostname():
        return True
    return is_alive(int(lines[0]))


def is_alive(process: int) -> bool:
    """Return whether there is a process of this number, whoever's it is."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
