"""What this process may use of its machine: CPUs, and a home folder, which containers with a user of their own lack."""

import math
import os
import pwd
import resource
import stat
import sys
import tempfile
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
OWN_STATUS = Path("/proc/self/status")


def usable_cpus() -> int:
    """Return how many CPUs this process may use: by its affinity (taskset, Slurm) and its cgroup's quota (containers).

    At least 1; a quota of 2.5 CPUs counts as 2.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, min(count, math.floor(cpu_quota())))


def cpu_quota() -> float:
    """Return the CPUs that the cgroups of this process allow, infinite without a limit (`cpu.max`, `cpu.cfs_quota_us`)."""
    limits = [2.0**31]
    for folder in _own_cgroups():
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        words = _text(folder / "cpu.max").split() or [quota, period]
        if len(words) == 2 and all(word.isdecimal() and int(word) > 0 for word in words):
            limits.append(int(words[0]) / int(words[1]))
    return min(limits)


def peak_resident_gib() -> float:
    """Return the most memory that this process has held so far, in GiB.

    Linux's own count of the process, where there is one: `getrusage` begins with the peak of the process that started it.
    """
    for line in _text(OWN_STATUS).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _own_cgroups() -> list[Path]:
    """Folders of this process's cgroup and of all above it; within a container the topmost is its own."""
    found = []
    for line in _text(OWN_CGROUP).splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUPS / controllers if controllers else CGROUPS
        here = root / place.lstrip("/")
        found += [here, *(folder for folder in here.parents if folder.is_relative_to(root))]
    return [folder for folder in found if ".." not in folder.parts]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


SOCKET_PATH = 107
"""Characters that the path of a socket may have (Linux, unix(7))."""
WITHIN_PLACE = len(
    "/medtune-12345678/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
)


def place_of_sessions() -> str:
    """Return the folder that Ray's files go below: the temporary one, or /tmp where that path is too long for sockets."""
    place = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return place if len(str(Path(place).absolute())) + WITHIN_PLACE <= SOCKET_PATH else "/tmp"


def settle_user() -> str | None:
    """Give a process whose user id has no name, as in containers, the name and home folder that libraries ask for.

    Ray cannot be loaded without a home folder, MONAI not without a name. Returns a line for the user where a home folder
    had to be chosen. Processes that this one starts have both from it.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        named = any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME"))
        if not named:
            os.environ["USER"] = f"uid-{os.getuid()}"
        if not os.environ.get("HOME"):
            home = _temporary_home()
            os.environ["HOME"] = str(home)
            return (
                f"user {os.getuid()} has no home folder on this machine: {home} is used, which may be emptied; set HOME, "
                "or MEDTUNE_CACHE for prepared volumes alone, to keep them"
            )
    return None


def _temporary_home() -> Path:
    """A folder of this user's alone: the same one each time, unless another user has made it."""
    place = Path(tempfile.gettempdir()) / f"medtune-home-{os.getuid()}"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
    except OSError:
        return Path(tempfile.mkdtemp(prefix="medtune-home-"))
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
        return place
    return Path(tempfile.mkdtemp(prefix="medtune-home-"))
