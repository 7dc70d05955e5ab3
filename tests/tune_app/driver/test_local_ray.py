"""A local Ray lets only its own study in."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from cluster_runs import make_cluster, wait_for
from ray._private.worker import print_to_stdstream
from rich.console import Console
from study_runs import TINY, check_whole, finished, medtune

from trainables.own_folder import mark_own
from tune_app.driver.local_ray import (
    IN_USE,
    MARK,
    PREFIX,
    YOUNG_S,
    keep_strangers_out,
    ray_to_file,
    remove_abandoned,
)
from tune_app.synthetic import write_cohort

STUDY = """
import os, subprocess, sys
import ray
from tune_app.driver.local_ray import ray_to_work_with

with open(sys.argv[1], "w") as answer, ray_to_work_with(None):
    address = ray.get_runtime_context().gcs_address
    for stranger in (False, True):
        env = os.environ | ({"RAY_AUTH_TOKEN": "a guess"} if stranger else {})
        code = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print(ray.get(ray.put('in')))"
        done = subprocess.run([sys.executable, "-c", code, address], env=env, capture_output=True, text=True)
        who = "stranger" if stranger else "friend"
        print(who, done.returncode, "in" in done.stdout.split(), "oken" in done.stderr, file=answer)
"""


def answers(code: str, folder: Path, env: Mapping[str, str] | None = None) -> list[str]:
    """The lines that a process writes into the file it is given: Ray's threads print between the words of a `print`."""
    told = folder / "answers"
    command = [sys.executable, "-c", code, str(told)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return told.read_text().splitlines()


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder whose path is short enough for the sockets of a Ray below it; pytest's own is not."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


def contents(folder: Path) -> set[str]:
    """Names of the files and folders below, except those that a running Ray makes and removes."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return {name for name in found if not name.startswith(("logs/", "runtime_resources/"))}


@pytest.mark.ray
@pytest.mark.slow
def test_a_study_leaves_a_ray_of_this_machine_alone(tmp_path: Path, temporary: Path) -> None:
    """It once joined it, removed its session's folder in the end, and its job server with it."""
    folder = temporary / "c"
    folder.mkdir()
    table = write_cohort(tmp_path / "cohort", subjects=10, side=(14, 18))
    cluster = make_cluster(folder, table)
    try:
        cluster.start_head()
        (session,) = (folder / "r").glob("session_2*")
        before = contents(session)
        free = {n: v for n, v in cluster.env.items() if not n.startswith("RAY_")}
        study = medtune(
            *("run", "--data", table, "--out", tmp_path / "study", "--trials", 1, "--epochs", 1),
            *(*TINY, "--set", "batch_size=4", "--cache", tmp_path / "cache"),
            env=free | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        )
        finished(study)
        check_whole(tmp_path / "study", trials=1, epochs=1)
        assert before <= contents(session)
        assert not list(temporary.glob("medtune-*")), "its own Ray's folder is gone"
        assert len(cluster.living()) == 1
        job = {"entrypoint": "echo still here", "submission_id": "afterwards"}
        cluster.get("/api/jobs/", json.dumps(job).encode())
        wait_for(lambda: cluster.get("/api/jobs/afterwards")["status"] == "SUCCEEDED", "the job")
        assert "still here" in cluster.get("/api/jobs/afterwards/logs")["logs"]
    finally:
        for node in cluster.nodes:
            node.kill()


OWN = """
import sys
import psutil
from tune_app.driver.local_ray import own_ray

with open(sys.argv[1], "w") as answer:
    for keep in (False, True):
        with own_ray(log_to_driver=False) as local:
            (raylet,) = (p for p in psutil.Process().children() if p.name() == "raylet")
            print(any("--listen-port=0" in word for word in raylet.cmdline()), file=answer)
            (local.folder / "thesis.docx").touch()
            local.keep = keep
        print(local.folder.exists(), file=answer)
    with own_ray(log_to_driver=False) as local:
        local.mark = "another process"
    print(local.folder.exists(), file=answer)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_local_ray_removes_its_own_folder_only_and_holds_no_fixed_port(
    tmp_path: Path, temporary: Path
) -> None:
    """A head that is started in addition has its agent on 52365, and could run no jobs without it."""
    env = os.environ | {"TMPDIR": str(temporary)}
    assert answers(OWN, tmp_path, env) == ["True", "False", "True", "True", "True"]
    assert len(list(temporary.glob("medtune-*"))) == 2


HOLDS = """
import sys
from pathlib import Path
from trainables.machine.file_locks import acquire_lock

with acquire_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_folder_of_a_killed_process_is_removed_by_the_next_and_no_other(tmp_path: Path) -> None:
    """Slurm kills a job 30 s after SIGTERM, at its end or not."""
    long_ago = time.time() - 2 * YOUNG_S

    def made(name: str, mark: str = f"{MARK}1, session a", lock: bool = True) -> Path:
        folder = mark_own(tmp_path / f"{PREFIX}{name}", mark)
        (folder / "session").mkdir()
        (folder / "session" / "raylet.log").touch()
        if lock:
            (folder / IN_USE).touch(mode=0o600)
            os.utime(folder / IN_USE, (long_ago, long_ago))
        return folder

    killed, held, young = made("killed"), made("held"), made("young")
    kept, other = made("kept", lock=False), made("other", mark="another purpose")
    os.utime(young / IN_USE)
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "away", target_is_directory=True)
    command = [sys.executable, "-c", HOLDS, str(held / IN_USE)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        os.utime(held / IN_USE, (long_ago, long_ago))
        remove_abandoned(tmp_path)
        assert not killed.exists()
        assert all((one / "session" / "raylet.log").exists() for one in (held, young, kept, other))
        holder.kill()
        holder.wait(30)
        remove_abandoned(tmp_path)
    assert not held.exists()
    assert sorted(path.name for path in tmp_path.glob(f"{PREFIX}*/session")) == ["session"] * 3


@pytest.mark.ray
@pytest.mark.slow
def test_who_has_no_token_is_kept_out(tmp_path: Path) -> None:
    env = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")
    } | {"HOME": str(tmp_path)}
    friend, stranger = answers(STUDY, tmp_path, env)
    assert friend.startswith("friend 0 True")
    assert stranger == "stranger 1 False True"
    assert not (tmp_path / ".ray").exists(), "the token is saved nowhere"


def test_what_the_user_has_said_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    keep_strangers_out()
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # so that it is gone again afterwards
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    keep_strangers_out()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


FROZEN = """
import os, signal, sys
import psutil
import ray
from tune_app.driver.local_ray import ray_to_work_with

with ray_to_work_with(None):
    pid = ray.get(ray.remote(lambda: os.getpid()).remote())
    (raylet,) = (p for p in psutil.Process().children() if p.name() == "raylet")
    raylet.kill()
    raylet.wait()  # a process that is frozen before gets SIGHUP and SIGCONT from the kernel when its parent dies
    os.kill(pid, signal.SIGSTOP)
    with open(sys.argv[1], "w") as answer:
        print(pid, file=answer)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_frozen_worker_that_lost_its_raylet_does_not_stay(tmp_path: Path) -> None:
    """No other process would end it: a worker watches its raylet, and this one cannot."""
    (pid,) = answers(FROZEN, tmp_path)
    with suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE, (
            "without init no process reaps it"
        )


FORGOTTEN = """
import gc, sys, tempfile
from functools import partial
from ray import tune
from tune_app.driver.local_ray import ray_to_work_with

def trial(config, setting):
    tune.report({"value": 1})

for session in range(2):
    with tempfile.TemporaryDirectory() as folder, ray_to_work_with(None):
        run = tune.RunConfig(storage_path=folder, verbose=0)
        tune.Tuner(partial(trial, setting=977), run_config=run).fit()
gc.collect()
left = sum(isinstance(thing, partial) and "setting" in thing.keywords for thing in gc.get_objects())
with open(sys.argv[1], "w") as answer:
    print(left, file=answer)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_session_that_is_over_leaves_no_trainable_behind(tmp_path: Path) -> None:
    """Ray keeps the last thousand classes of actors in a cache, each with the function it was made for and its arguments."""
    assert answers(FORGOTTEN, tmp_path) == ["0"]


def test_what_ray_says_of_its_raylets_goes_to_the_log_and_nothing_else_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray prints it to standard output, where a study's results are expected, without asking `log_to_driver`."""
    died = {
        "lines": ["A worker died.\nSome common causes include: ..."],
        "pid": "raylet",
        "is_err": False,
    }
    with ray_to_file(tmp_path / "log", Console(quiet=True)):
        print_to_stdstream(died, ignore_prefix=False)
        print("one\n\ntwo", end="\n")
        print()
        Console(width=40).print("three")
        print_to_stdstream(
            {"lines": ["from elsewhere"], "pid": "raylet", "ip": "10.0.0.2", "is_err": False}, False
        )
        print("(raylets are Ray's)")
    print("(raylet) afterwards")
    assert (
        capsys.readouterr().out == "one\n\ntwo\n\nthree\n(raylets are Ray's)\n(raylet) afterwards\n"
    )
    log = (tmp_path / "log").read_text()
    assert "ERROR ray.raylet A worker died.\nSome common causes include: ..." in log
    assert "from elsewhere" in log
