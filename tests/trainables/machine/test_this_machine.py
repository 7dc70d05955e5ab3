"""CPUs, home folder and temporary folder of machines as they are."""

import errno
import fcntl
import math
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock, SoftFileLock, Timeout

from trainables.machine import this_machine
from trainables.machine.file_locks import NO_FLOCK, acquire_lock, soft_lock_is_held
from trainables.machine.safe_path import SOURCE
from trainables.machine.this_machine import (
    cpu_quota,
    peak_resident_gib,
    place_of_sessions,
    settle_user,
    usable_cpus,
)

UNNAMED = ["unshare", "--user", "--map-user=12345"]
"""Runs a command as a user without a name on this machine."""


def can_be_unnamed() -> bool:
    if shutil.which(UNNAMED[0]) is None:
        return False
    return subprocess.run([*UNNAMED, "true"], capture_output=True, check=False).returncode == 0


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(this_machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(this_machine, "OWN_CGROUP", tmp_path / "self")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/job/step\n", {"job/cpu.max": "400000 100000", "job/step/cpu.max": "max 100000"}, 4),
        ("0::/job/step\n", {"job/cpu.max": "200000 100000", "job/step/cpu.max": "8 1"}, 2),
        (
            "4:cpu,cpuacct:/docker/1\n3:memory:/docker/1\n",
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
                "memory/cpu.max": "1 1",
            },
            3,
        ),
        (
            "4:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            math.inf,
        ),
        ("0::/../../elsewhere\n", {"cpu.max": "damaged"}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_a_quota_of_the_cgroup_counts(
    cgroups: Path, own: str, files: dict[str, str], cpus: float
) -> None:
    write(cgroups / "self", own)
    for name, text in files.items():
        write(cgroups / "cgroup" / name, text)
    assert cpu_quota() == (2.0**31 if cpus == math.inf else cpus)
    assert usable_cpus() == max(1, min(len(os.sched_getaffinity(0)), int(min(cpus, 1024))))


def test_an_affinity_counts() -> None:
    """As `taskset -c 0` sets it; in a separate process, as this one keeps its CPUs."""
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from trainables.machine.this_machine import usable_cpus; print(usable_cpus(), os.cpu_count())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SOURCE
    )
    assert done.stdout.split()[0] == "1"


def nameless(uid: int) -> pwd.struct_passwd:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


def test_who_has_no_name_and_no_home_gets_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = dict(os.environ)
    assert settle_user() is None
    assert dict(os.environ) == before, "a user of the machine keeps the environment"
    monkeypatch.setattr(pwd, "getpwuid", nameless)
    for name in ("LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USER", "")
    monkeypatch.setenv("HOME", "/home/mine")
    assert settle_user() is None
    assert os.environ["HOME"] == "/home/mine"
    assert os.environ["USER"] == f"uid-{os.getuid()}"
    monkeypatch.setenv("HOME", "")
    said = settle_user()
    place = tmp_path / f"medtune-home-{os.getuid()}"
    assert said is not None
    assert str(place) in said
    assert "MEDTUNE_CACHE" in said
    assert os.environ["HOME"] == str(place)
    assert place.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", "")
    place.chmod(0o755)  # another user's, by its permissions
    settle_user()
    assert os.environ["HOME"] != str(place)
    assert Path(os.environ["HOME"]).stat().st_mode & 0o777 == 0o700


def test_a_user_without_a_name_can_check_and_load_what_trains(tmp_path: Path) -> None:
    """MONAI asks for the user's name as it is imported, and Ray for the home folder."""
    if not can_be_unnamed():
        pytest.skip("no user namespaces here: unshare --user --map-user")
    code = (
        "from trainables.machine.this_machine import settle_user; print(settle_user() is not None); "
        "import ray.tune, monai.data; print('loaded')"
    )
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(SOURCE),
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        [*UNNAMED, sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["True", "loaded"], done.stderr
    command = [*UNNAMED, sys.executable, "-P", "-m", "tune_app.cli", "data", "check", "none.csv"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has no home folder on this machine" in done.stderr
    assert "none.csv: no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_temporary_folder_whose_path_is_too_long_for_sockets_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    assert place_of_sessions() == "/var/tmp"
    monkeypatch.setenv("RAY_TMPDIR", "/" + 60 * "x")
    assert place_of_sessions() == "/tmp"


# File systems without flock ----------------------------------------------------------------------------------------------


@pytest.fixture(params=NO_FLOCK, ids=lambda number: errno.errorcode[number])
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process on a file system without flock."""

    def flock(file: object, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_flock")
def test_a_lock_is_held_without_flock_too(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    assert not soft_lock_is_held(path)
    path.touch()
    assert not soft_lock_is_held(path), "left by a flock"
    path.unlink()
    with acquire_lock(path):
        assert soft_lock_is_held(path)
        with pytest.raises(Timeout):
            acquire_lock(path)
    assert not soft_lock_is_held(path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    with SoftFileLock(path):
        text = path.read_text()
    path.write_text(text.replace(str(os.getpid()), str(ended.pid), 1))
    assert not soft_lock_is_held(path), "its process has ended"
    path.write_text("1\nanother-machine\n")
    assert soft_lock_is_held(path)


def test_a_lock_with_flock_is_the_kernels(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with acquire_lock(path):
        assert not soft_lock_is_held(path)
        with pytest.raises(Timeout):
            FileLock(path, timeout=0).acquire()
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_peak_of_memory_is_this_process_own_and_not_that_of_the_one_that_started_it() -> None:
    """getrusage carries the peak over to a new process."""
    held = np.ones(2**26)  # 0.5 GiB
    code = "from trainables.machine.this_machine import peak_resident_gib as peak; print(peak())"
    found = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    )
    assert 0 < float(found.stdout) < 0.25 < held.nbytes / 2**30 <= peak_resident_gib()
