"""Modules in the folder in which a command is started are not executed and hide no module of ours."""

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from study_runs import TINY, check_whole, finished, medtune

from trainables.machine.ray_workers import OwnSearchPath
from trainables.machine.safe_path import SOURCE, installed, python, safe_search, search_variables
from tune_app.cluster.slurm import Allocation, slurm_script
from tune_app.cluster.submit import build_submission, build_task
from tune_app.study.spec import build_spec
from tune_app.synthetic import write_cohort

TRAPS: tuple[str, ...] = (
    "copy.py",
    "random.py",
    "torch.py",
    "numpy.py",
    "pandas.py",
    "monai/__init__.py",
    "ray.py",
)
TRAPS += ("tempfile.py", "json.py", "trainables/__init__.py", "tune_app/__init__.py")
TRAP = """
import os, sys
with open({told!r}, "a") as told:
    print(__name__, " ".join(sys.argv), file=told)
raise RuntimeError("a module of the user's folder was executed")
"""


@pytest.fixture
def trapped(tmp_path: Path) -> Path:
    """A folder with modules that have the names of the real ones, and leave a file when they are executed."""
    folder = tmp_path / "mine"
    for name in TRAPS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TRAP.format(told=str(tmp_path / "executed")))
    return folder


def outside(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a user whose PYTHONPATH holds our source alone, and nothing of these tests."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return env | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", **(variables or {})}


def test_the_traps_spring_for_a_plain_python(trapped: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import random"],
        cwd=trapped,
        env=outside(),
        check=False,
        stderr=subprocess.DEVNULL,
    )
    assert done.returncode == 1
    assert (tmp_path / "executed").read_text().startswith("random")


@pytest.mark.parametrize("command", [["--version"], ["spaces"], ["config"]])
def test_a_command_does_not_look_into_its_folder(
    trapped: Path, tmp_path: Path, command: list[str]
) -> None:
    for start in ([sys.executable, "-m", "tune_app.cli"], python("-m", "tune_app.cli")):
        env = outside()
        if start[1] == "-m":  # the package itself must be found before it can do anything about it
            (trapped / "tune_app" / "__init__.py").unlink()
            (trapped / "tune_app").rmdir()
        done = subprocess.run(
            [*start, *command], cwd=trapped, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "executed").exists()


SPAWNS = """
from multiprocessing import get_context
from concurrent.futures import ProcessPoolExecutor
from trainables.machine.safe_path import safe_search
import os
if __name__ == "__main__":
    with safe_search(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        print(process.submit(os.getpid).result() != os.getpid())
"""


def test_processes_of_multiprocessing_do_not_either(trapped: Path, tmp_path: Path) -> None:
    (tmp_path / "spawns.py").write_text(SPAWNS)
    done = subprocess.run(
        [sys.executable, "-P", str(tmp_path / "spawns.py")],
        cwd=trapped,
        env=outside(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "True\n", done.stderr
    assert not (tmp_path / "executed").exists()


def test_the_environment_is_as_before_after_a_safe_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "/a", ""]))
    with safe_search():
        assert os.environ["PYTHONSAFEPATH"] == "1"
        parts = os.environ["PYTHONPATH"].split(os.pathsep)
        assert parts[0] == "/a"
        assert "" not in parts, "an empty part is the current folder"
        assert installed() or str(SOURCE) in parts
    assert "PYTHONSAFEPATH" not in os.environ
    assert os.environ["PYTHONPATH"] == ":/a:"
    monkeypatch.delenv("PYTHONPATH")
    assert search_variables().get("PYTHONPATH", "-") != ""


def test_safe_searches_of_several_threads_may_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    first, second = ExitStack(), ExitStack()
    first.enter_context(safe_search())
    second.enter_context(safe_search())
    first.close()
    assert os.environ["PYTHONSAFEPATH"] == "1", "the second block is still open"
    second.close()
    assert "PYTHONSAFEPATH" not in os.environ, "the second block began when it was set by the first"


def test_every_process_that_we_start_is_safe() -> None:
    """Every `sys.executable` of the packages is in the one function that adds -P, or has -P next to it."""
    found = []
    for package in ("search_spaces", "trainables", "tune_app"):
        for path in sorted((SOURCE / package).rglob("*.py")):
            for line in path.read_text(encoding="utf-8").splitlines():
                if "sys.executable" in line and '"executable": ' not in line:
                    found.append((path.name, "-P" in line))
    assert ("safe_path.py", True) in found
    assert all(safe for _, safe in found), found


def test_what_is_sent_to_a_cluster_is_safe(tmp_path: Path) -> None:
    spec = build_spec({"data": str(tmp_path / "table.csv")})
    assert build_submission(spec, "/shared/s", pip=False).entrypoint.startswith("python -P -m ")
    assert build_task(["doctor"]).entrypoint.startswith("python -P -m ")
    for nodes in (1, 2):
        script = slurm_script(spec, "/shared/s", Allocation(nodes=nodes))
        assert script.index("export PYTHONSAFEPATH=1") < script.index("medtune run")
        calls = [line for line in script.splitlines() if "python3" in line]
        assert all("python3 -P " in line for line in calls), calls
        assert len(calls) == (2 if nodes == 2 else 0)


def test_ray_is_asked_to_leave_the_drivers_folders_out() -> None:
    config = OwnSearchPath()
    assert config._runtime_env_has_working_dir()
    paths = list(config._get_proto_job_config().py_driver_sys_path)
    assert paths == ([] if installed() else [str(SOURCE)])


@pytest.mark.ray
@pytest.mark.slow
def test_a_study_in_such_a_folder_runs_to_its_end(trapped: Path, tmp_path: Path) -> None:
    table = write_cohort(tmp_path / "cohort", subjects=8, side=(14, 18))
    (trapped / "tune_app" / "__init__.py").unlink()  # `python -m` finds the package there
    (trapped / "tune_app").rmdir()
    study = medtune(
        *("run", "--data", table, "--out", "study", "--trials", 1, "--epochs", 1, *TINY),
        *("--set", "batch_size=4", "--cache", "cache"),
        cwd=trapped,
        env=outside(),
    )
    finished(study)
    assert not (tmp_path / "executed").exists()
    check_whole(trapped / "study", trials=1, epochs=1)


def test_the_first_folder_of_the_users_own_search_path_stays_first(tmp_path: Path) -> None:
    """Under -P, as our own processes run, no current folder stands before it."""
    (tmp_path / "typer.py").write_text("print('the first folder'); raise SystemExit")
    for command in (python("-m", "tune_app.cli"), [sys.executable, "-m", "tune_app.cli"]):
        path = os.pathsep.join([str(tmp_path), str(SOURCE)])
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == "the first folder\n", done.stderr
