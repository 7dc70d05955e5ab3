"""Short studies one after another in one driver process, for hours: `make soak MINUTES=120`.

These are measured after each study, since a leak would fill them: the driver's memory, open files and threads, the trials'
largest memory, Ray's processes that are left, shared memory, and temporary files. It fails when the driver's memory, files
or threads still rise in the second half by more than Ray's and Optuna's own do, or when anything is left behind.
`ray.shutdown` leaves a connection open, and Optuna loads its migrations again for each database: their own share is measured
separately, in a process that runs Tune with `OptunaSearch` and `ASHAScheduler` again and again.

The target sets MALLOC_ARENA_MAX=2, and so should any process that runs many studies: glibc gives each of Ray's threads a
separate heap and keeps the freed memory, three times as much as is lost for good.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from chaos import TINY
from rich.console import Console

from tune_app.driver.run import run_study
from tune_app.results.loading import load_study
from tune_app.study.spec import build_spec
from tune_app.synthetic import write_cohort

ROOM_MIB = 24.0
"""By how much the driver's memory may differ between the halves: studies are not all alike."""

LEAST_ALONE = 6
"""Searches of Ray and Optuna alone that are enough to measure how much one of them adds."""

ALONE = """
import gc, logging, os, shutil, sys, optuna, psutil, ray, tempfile
from optuna.storages import RDBStorage
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from tune_app.driver.local_ray import keep_strangers_out

def trial(config):
    for epoch in range(4):
        tune.report({"epoch": epoch, "value": config["x"] * epoch})

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0", "RAY_enable_open_telemetry": "0"}
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
optuna.logging.set_verbosity(optuna.logging.ERROR)
keep_strangers_out()
me = psutil.Process()
goal = {"metric": "value", "mode": "max"}
for _ in range(int(sys.argv[1])):
    ray.init('local', include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    session = ray._private.worker._global_node.get_session_dir_path()
    with tempfile.TemporaryDirectory() as name:
        storage = RDBStorage(f"sqlite:///{name}/study.db")
        space = {"x": optuna.distributions.FloatDistribution(0, 1)}
        tune.Tuner(
            trial,
            tune_config=tune.TuneConfig(
                num_samples=3,
                reuse_actors=True,
                search_alg=OptunaSearch(space, storage=storage, study_name="soak", **goal),
                scheduler=ASHAScheduler(time_attr="epoch", max_t=4, grace_period=1),
                **goal,
            ),
            run_config=tune.RunConfig(storage_path=name, verbose=0),
        ).fit()
        storage.engine.dispose()
    ray.shutdown()
    shutil.rmtree(session, ignore_errors=True)
    gc.collect()
    print("look", me.memory_info().rss / 2**20, me.num_fds(), me.num_threads())
"""
"""Searches of nothing but Ray and Optuna in sessions one after another, looked at after each."""


@dataclass(frozen=True)
class Look:
    """Measurements after a study."""

    seconds: float
    driver_mib: float
    actor_mib: float
    """Largest of the study's trials."""
    files: int
    threads: int
    processes: int
    """Children of the driver."""
    shared: int
    """Files in /dev/shm."""
    sessions_mib: float
    """What Ray keeps of all its sessions."""


def one_study(root: Path, table: Path, cache: Path, number: int) -> Look:
    config: dict[str, Any] = TINY | {"epochs": 4}
    spec = build_spec(
        {
            "data": str(table),
            "trials": 3,
            "seed": number,
            "config": config,
            "cache": str(cache),
            "gpus_per_trial": 0,
        }
    )
    quiet = Console(file=(root.parent / "console.txt").open("w"))
    began = time.monotonic()
    outcome = run_study(spec, root, console=quiet, notes=quiet)
    quiet.file.close()
    assert outcome.exit_code == 0, outcome
    seconds = time.monotonic() - began
    study = load_study(root)
    me = psutil.Process()
    return Look(
        seconds=seconds,
        driver_mib=me.memory_info().rss / 2**20,
        actor_mib=1024 * float(study.epochs["peak_memory_gib"].max()),
        files=me.num_fds(),
        threads=me.num_threads(),
        processes=len(
            [
                child
                for child in me.children(recursive=True)
                if child.status() != psutil.STATUS_ZOMBIE
            ]
        ),
        shared=len(list(Path("/dev/shm").glob("*"))),
        sessions_mib=sessions_mib(),
    )


def sessions_mib() -> float:
    """MiB of the sessions that this process started."""
    total = 0
    for session in Path(tempfile.gettempdir()).glob(f"medtune-*/session_*_{os.getpid()}"):
        total += sum(path.lstat().st_size for path in session.rglob("*") if path.is_file())
    return total / 2**20


def stack_alone(sessions: int) -> dict[str, float]:
    """Return how much a search of Ray and Optuna adds permanently to its process, for each measure of a `Look`."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(sessions)], capture_output=True, text=True, check=False
    )
    looks = np.array(
        [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("look")],
        dtype=float,
    )
    if (
        done.returncode
    ):  # a busy machine does not start Ray in its 30 s: the measurements until then count
        print(
            f"Ray and Optuna alone ended after {len(looks)} of {sessions}: {done.stderr.strip().splitlines()[-1:]}"
        )
    if len(looks) < LEAST_ALONE:
        raise SystemExit(
            f"{len(looks)} searches of Ray and Optuna alone are too few to compare with: run it again"
        )
    counted = looks[len(looks) // 3 :]
    slopes = np.polyfit(np.arange(len(counted)), counted, 1)[0]
    return {
        name: max(0.0, float(slope))
        for name, slope in zip(("driver_mib", "files", "threads"), slopes, strict=True)
    }


def verdict(looks: list[Look], alone: dict[str, float]) -> list[str]:
    """Return what rose or was left behind; the first studies are not counted: caches and imports fill in them.

    `alone`: how much a search of Ray and Optuna adds without medtune.
    """
    problems = []
    counted = looks[min(3, len(looks) // 3) :]
    first, second = counted[: len(counted) // 2], counted[len(counted) // 2 :]
    for name, room in (
        ("driver_mib", ROOM_MIB),
        ("actor_mib", ROOM_MIB),
        ("files", 3.0),
        ("threads", 3.0),
    ):
        before, after = (
            float(np.median([getattr(look, name) for look in half])) for half in (first, second)
        )
        stack = alone.get(name, 0.0) * len(counted) / 2
        if after > before + stack + room:
            problems.append(
                f"{name} rose from {before:.0f} to {after:.0f} between the halves, {stack:.0f} of it Ray's and Optuna's own"
            )
    if looks[-1].processes:
        problems.append(f"{looks[-1].processes} processes left")
    if looks[-1].sessions_mib > 2 * max(look.sessions_mib for look in looks[:3]) + 1:
        problems.append(f"Ray's sessions take {looks[-1].sessions_mib:.0f} MiB")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument(
        "--alone",
        type=int,
        default=24,
        metavar="SESSIONS",
        help="of Ray and Optuna alone, to compare with",
    )
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    looks: list[Look] = []
    print("study seconds driver_MiB actor_MiB files threads processes shared sessions_MiB")
    with tempfile.TemporaryDirectory(prefix="medtune-soak-") as name:
        table = write_cohort(Path(name) / "cohort", subjects=14, side=(14, 18))
        while time.monotonic() < end or len(looks) < 4:
            root = Path(name) / f"study-{len(looks)}"
            look = one_study(root, table, Path(name) / "cache", len(looks))
            looks.append(look)
            shutil.rmtree(root)
            print(
                f"{len(looks):>5} {look.seconds:>7.1f} {look.driver_mib:>10.0f} {look.actor_mib:>9.0f} {look.files:>5} "
                f"{look.threads:>7} {look.processes:>9} {look.shared:>6} {look.sessions_mib:>12.1f}",
                flush=True,
            )
    alone = stack_alone(options.alone)
    print(
        "Ray and Optuna alone add in a search: "
        + ", ".join(f"{name} {value:.2f}" for name, value in alone.items())
    )
    problems = verdict(looks, alone)
    print(f"{len(looks)} studies: " + ("; ".join(problems) or "nothing rose, nothing was left"))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
