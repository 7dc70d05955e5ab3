"""Small studies under a killer: `make chaos ROUNDS=50`, and one round in the test suite.

A round is one study of real trials in a separate process. At random, seeded moments the killer takes one of its
processes: the driver, a trial's actor, a rank, a raylet, with SIGKILL, or with SIGSTOP and for good, or for seconds. It
preempts the driver (SIGTERM). In some rounds the study is in object storage, which stops answering for a minute; in some
its trials run on a Ray cluster whose head is killed. A driver that ends is started again until the study is done. Then
what must hold is checked:

* every trial ended by completion or a logged stop, Optuna's storage agrees, and each epoch from 1 to the last is there once;
* no fault cost more than one epoch of work;
* the decisions are those of the stopping policy replayed over the rows;
* no process, shared memory or temporary file is left behind, and the study is within its disk budget.
"""

import argparse
import logging
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import optuna
import psutil
import yaml
from cluster_runs import make_cluster
from object_storage import BUCKET, s3_server
from study_runs import LEADER, RANK

from trainables.checkpoints import load_state
from tune_app.results.loading import load_study
from tune_app.study.copies import fetch_study
from tune_app.study.files import StudyFiles, job_name
from tune_app.study.policy import Policy
from tune_app.study.rows import read_rows
from tune_app.synthetic import write_cohort

TAG = "MEDTUNE_CHAOS"
"""Environment variable that marks all processes of a round, also those whose parent has changed."""

TINY: dict[str, Any] = {
    "depth": 10,
    "width": 0.125,
    "volume_shape": 16,
    "epochs": 6,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_folds": 2,
    "backbone_lr": 1e-3,
    "train_auc_volumes": 0,
}

BUDGET_GIB = 0.032
"""Holds two running trials and the best one, and not what all trials leave."""
DEADLINE_S = 20.0
"""Seconds without a step after which a trial of a round counts as hanging."""
ROUND_S = 900.0
"""Seconds after which a study that has not come to its end hangs."""
CLEAR_S = 60.0
"""Seconds that processes may take to end after their driver: a frozen one is given up by Ray after some 30."""

VICTIMS: dict[str, Callable[[list[str]], bool]] = {
    "driver": lambda words: "tune_app.cli" in words,
    "actor": lambda words: bool(re.search("ImplicitFunc|" + LEADER, words[0])),
    "rank": lambda words: bool(re.search(RANK, words[0])),
    "raylet": lambda words: words[0].endswith("/raylet"),
}
"""Kind of process to kill -> whether a command line belongs to such a process."""

HOW = ("kill", "freeze", "pause", "preempt", "outage")
"""kill: SIGKILL; freeze: SIGSTOP for good; pause: SIGSTOP, and SIGCONT seconds later; preempt: SIGTERM; outage: no answer."""
OUTAGE_S = 60.0
"""Seconds for which object storage does not answer."""


@dataclass
class Fault:
    """One fault injected into a study, and its cost."""

    who: str
    how: str
    after_s: float
    """Seconds after the session's first process, or the last fault."""
    done: bool = False
    lost: int = 0
    """Whole epochs, reported already, that had to be trained again; the largest of any trial."""
    left_s: float | None = None
    """Seconds from a preemption to the driver's end."""

    @property
    def name(self) -> str:
        return f"{self.how} {self.who}"


@dataclass
class Round:
    """The outcome of one study."""

    seed: int
    ranks: int
    faults: list[Fault]
    place: str = "here"
    """here: in a folder, with a separate local Ray; storage: in object storage; cluster: in a folder, on a Ray cluster."""
    starts: int = 0
    seconds: float = 0.0
    trials: Counter[str] = field(default_factory=Counter)
    epochs: int = 0
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        told = (
            ", ".join(fault.name + ("" if fault.done else " (too late)") for fault in self.faults)
            or "no fault"
        )
        states = ", ".join(f"{count} {state}" for state, count in sorted(self.trials.items()))
        end = "; ".join(self.problems) or "all holds"
        return f"seed {self.seed}, {self.place}, {self.ranks} rank(s): {told}; {self.starts} starts, {states}, {self.seconds:.0f} s: {end}"


def plan_round(seed: int) -> Round:
    """Return the plan of the round of this seed."""
    rng = random.Random(seed)
    if seed % 5 == 4:
        faults = [Fault("storage", "outage", rng.uniform(0.5, 20.0))]
        if rng.random() < 0.5:
            faults.append(Fault("driver", rng.choice(("kill", "preempt")), rng.uniform(0.5, 8.0)))
        return Round(seed, 1, faults, "storage")
    if seed % 7 == 6:
        faults = [Fault("head", "kill", rng.uniform(0.5, 20.0))]
        return Round(seed, 1, faults, "cluster")
    ranks = 2 if seed % 3 == 2 else 1
    whom = ["driver", "actor", "raylet"] + (["rank", "rank"] if ranks > 1 else [])
    faults = []
    for _ in range(rng.randint(1, 3)):
        who = rng.choice(whom)
        # For good only where something is there to notice: no process watches over a frozen driver, only its user can.
        how = rng.choice(
            ("kill", "preempt", "pause") if who == "driver" else ("kill", "kill", "freeze", "pause")
        )
        faults.append(Fault(who, how, rng.uniform(0.5, 12.0)))
    return Round(seed, ranks, faults)


def run_round(result: Round, table: Path, folder: Path) -> Round:
    """Run a round in `folder`, which it leaves there; returns it with its outcome."""
    began = time.monotonic()
    write_study_file(folder / "study.yaml", table, folder / "cache", result)
    tag = f"{os.getpid()}-{result.seed}"
    faults = iter(result.faults)
    fault = next(faults, None)
    finished = False
    with PLACES[result.place](folder, table) as place:
        try:
            while not finished:
                if time.monotonic() - began > ROUND_S or result.starts > 12:
                    result.problems.append(
                        f"did not come to its end in {ROUND_S:.0f} s and {result.starts} starts"
                    )
                    break
                place.ready()
                words = ["run", folder / "study.yaml", "--resume", *place.words]
                driver = start(words, tag, folder / f"driver-{result.starts}.log", place.env)
                result.starts += 1
                since = time.monotonic()
                preempted: tuple[Fault, float] | None = None
                while driver.poll() is None and time.monotonic() - began < ROUND_S:
                    if (
                        fault is not None
                        and time.monotonic() - since > fault.after_s
                        and (place.inflict(fault) or inflict(fault, tag, place.study))
                    ):
                        fault.lost = epochs_lost(place.study)
                        if fault.how == "preempt":
                            preempted = fault, time.monotonic()
                        fault, since = next(faults, None), time.monotonic()
                    time.sleep(0.05)
                if driver.poll() is None:
                    driver.kill()
                driver.wait()
                if preempted is not None:
                    preempted[0].left_s = time.monotonic() - preempted[1]
                finished = driver.returncode == 0
                left = wait_for_none(tag)
                if left:
                    result.problems.append(
                        f"left running after start {result.starts}: {', '.join(left)}"
                    )
                    end_all(tag)
            result.seconds = time.monotonic() - began
            if finished:
                result.problems += check(place.whole(), result)
        finally:
            end_all(tag)
    result.problems += leftovers(folder, folder / "study")
    return result


class Here:
    """A study in a folder, with a separate local Ray."""

    def __init__(self, folder: Path, table: Path) -> None:
        self.study = folder / "study"
        self.words: list[Any] = ["--out", self.study]
        self.env: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ready(self) -> None:
        """Restart the processes that a fault has ended, before a driver starts."""

    def inflict(self, fault: Fault) -> bool:
        """Do it, if it is a fault of the place and not of a process."""
        return False

    def whole(self) -> Path:
        """The study's folder, once it is done."""
        return self.study


class InStorage(Here):
    """A study in object storage: `study` is the driver's copy."""

    def __init__(self, folder: Path, table: Path) -> None:
        super().__init__(folder, table)
        self.url = f"s3://{BUCKET}/{folder.name}"
        self.study = folder / "home" / "studies" / job_name(self.url)
        self.copy = folder / "study"
        self.words = ["--out", self.url]
        self.server = ExitStack()

    def __enter__(self) -> Self:
        self.env = self.server.enter_context(s3_server())
        self.env["MEDTUNE_CACHE"] = str(self.study.parents[1])
        os.environ.update(self.env)  # for the copy that is checked
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        for name in self.env:
            os.environ.pop(name, None)

    def inflict(self, fault: Fault) -> bool:
        if fault.who != "storage" or not rows_by_trial(StudyFiles(self.study)):
            return False  # a driver on its way up ends at once: the place may be misspelt
        port = int(self.env["AWS_ENDPOINT_URL"].rpartition(":")[2])
        self.server.close()
        time.sleep(OUTAGE_S)
        self.server.enter_context(s3_server(port))
        fault.done = True
        return True

    def whole(self) -> Path:
        fetch_study(self.url, self.copy)
        return self.copy


class OnCluster(Here):
    """A study on a Ray cluster of one node, which is started again when it has been killed."""

    def __init__(self, folder: Path, table: Path) -> None:
        super().__init__(folder, table)
        self.short = Path(tempfile.mkdtemp(prefix="mt", dir="/tmp"))  # sockets are created below it
        self.cluster = make_cluster(self.short, table)
        self.env = self.cluster.env
        self.words += ["--address", f"127.0.0.1:{self.cluster.port}"]

    def __exit__(self, *_: object) -> None:
        for node in self.cluster.nodes:
            node.kill()
        shutil.rmtree(self.short, ignore_errors=True)

    def ready(self) -> None:
        if not self.cluster.nodes or self.cluster.nodes[-1].process.poll() is not None:
            shutil.rmtree(self.short / "r", ignore_errors=True)
            self.cluster.start_head(cpus=2)

    def inflict(self, fault: Fault) -> bool:
        if fault.who != "head" or not rows_by_trial(StudyFiles(self.study)):
            return False
        self.cluster.nodes[-1].kill()
        fault.done = True
        return True


PLACES = {"here": Here, "storage": InStorage, "cluster": OnCluster}


def write_study_file(path: Path, table: Path, cache: Path, plan: Round) -> None:
    fields: dict[str, Any] = {
        "data": str(table),
        "trials": 3,
        "seed": plan.seed,
        "config": TINY,
        "max_failures": 20,
        "rank_deadline_s": DEADLINE_S,
        "cache": str(cache),
        "disk_budget_gib": BUDGET_GIB,
        "keep_best": 1,
        "policy": {"grace_epochs": 1, "judge_from": 0, "finalists": 1},
    }
    if plan.ranks > 1:
        fields["ranks"] = plan.ranks
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")


# Processes -------------------------------------------------------------------------------------------------------------


def start(
    words: list[Any], tag: str, log: Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "tune_app.cli", *map(str, words)],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | dict(env or {}) | {TAG: tag, "OMP_NUM_THREADS": "1"},
        )


def processes(tag: str) -> Iterator[psutil.Process]:
    """All living processes of a round."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(TAG) == tag and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def inflict(fault: Fault, tag: str, study: Path) -> bool:
    """Do it to the youngest process that fits; False while there is none.

    A process is frozen only when a step has been finished since its start: during start-up, processes are given minutes
    before they count as hanging.
    """
    begun = max((path.stat().st_mtime for path in study.glob("trials/*/alive")), default=0.0)
    fits = []
    for process in processes(tag):
        with suppress(psutil.Error):
            words = process.cmdline()
            if (
                words
                and fault.who in VICTIMS
                and VICTIMS[fault.who](words)
                and (fault.how != "freeze" or process.create_time() + 3.0 < begun)
            ):
                fits.append(process)
    if not fits:
        return False
    victim = max(fits, key=lambda process: process.create_time())
    with suppress(psutil.Error):
        if fault.how == "kill":
            victim.kill()
        elif fault.how == "preempt":
            victim.terminate()
        else:
            victim.suspend()
            if fault.how == "pause":
                time.sleep(4.0)
                victim.resume()
        fault.done = True
    return fault.done


def wait_for_none(tag: str) -> list[str]:
    """Wait until no process of the round is left; returns those that stay."""
    deadline = time.monotonic() + CLEAR_S
    while (left := list(processes(tag))) and time.monotonic() < deadline:
        time.sleep(0.2)
    told = []
    for process in left:
        with suppress(psutil.Error):
            told.append(f"{' '.join(process.cmdline())[:60]} ({process.status()})")
    return told


def end_all(tag: str) -> None:
    for process in processes(tag):
        with suppress(psutil.Error):
            process.kill()


# What must hold --------------------------------------------------------------------------------------------------------


def epochs_lost(study: Path) -> int:
    """Epochs that are in epochs.jsonl and in no checkpoint: the most that a restarted trial repeats.

    The study may be at work: ended trials are read last, because the disk budget removes the checkpoint of an ended trial.
    """
    files = StudyFiles(study)
    reported = rows_by_trial(files)
    saved: dict[str, int] = {}
    for trial in reported:
        try:
            saved[trial] = load_state(files.trial(trial).checkpoint)["epoch"]
        except FileNotFoundError:
            saved[trial] = 0
    ended = {trial for trial, count in rows_by_trial(files).items() if count >= TINY["epochs"]}
    ended |= {row["trial"] for row in read_rows(files.decisions) if row["action"] == "stop"}
    return max(
        [0, *(count - saved[trial] for trial, count in reported.items() if trial not in ended)]
    )


def rows_by_trial(files: StudyFiles) -> Counter[str]:
    return Counter(row["trial"] for row in read_rows(files.epochs))


def check(root: Path, result: Round) -> list[str]:
    """Return what does not hold of a study that has come to its end; empty when all does."""
    problems = []
    files = StudyFiles(root)
    study = load_study(root)
    spec = study.spec
    result.trials = Counter(study.trials_full["state"])
    result.epochs = len(study.epochs)
    if len(study.trials_full) != spec.trials:
        problems.append(f"{len(study.trials_full)} trials of {spec.trials}")
    if wrong := set(study.trials_full["state"]) - {"completed", "stopped"}:
        problems.append(f"trials ended {', '.join(sorted(wrong))}")
    problems += study.notes
    for trial, rows in study.epochs.groupby("trial"):
        if list(rows["epoch"]) != list(range(1, len(rows) + 1)):
            problems.append(f"trial {trial} has epochs {list(rows['epoch'])}")
    completed = study.trials_full[study.trials_full["state"] == "completed"]
    if not (completed["epochs_run"] == spec.epochs).all():
        problems.append("a completed trial lacks epochs")

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    record = optuna.load_study(study_name=None, storage=f"sqlite:///{files.database}")
    states = {f"{trial.number:05d}": trial.state.name for trial in record.trials}
    names = {"completed": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL"}
    if states != (told := study.trials_full.set_index("trial")["state"].map(names).to_dict()):
        problems.append(f"Optuna says {states}, the records {told}")

    policy = Policy(spec.policy, spec.epochs)
    overrides = {trial: study.record(trial)["overrides"] for trial in study.trials_full["trial"]}
    configs = {
        trial: spec.config_of(given).model_dump(mode="json") for trial, given in overrides.items()
    }
    replayed = [decision.as_row() for decision in policy.replay(read_rows(files.epochs), configs)]
    logged = {(row["trial"], row["epoch"]): row for row in read_rows(files.decisions)}
    if len(logged) != len(replayed):
        problems.append(f"{len(logged)} decisions logged, {len(replayed)} replayed")
    problems += [
        f"trial {row['trial']} epoch {row['epoch']}: another decision when replayed"
        for row in replayed
        if logged.get((row["trial"], row["epoch"])) != row
    ]
    stopped = {trial for trial, decision in policy.stopped().items() if decision.stops}
    if stopped != set(study.trials_full.loc[study.trials_full["state"] == "stopped", "trial"]):
        problems.append(f"the policy stopped {sorted(stopped)}, the records say otherwise")

    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    # The storage keeps the weights of trials that the budget has removed from the driver's machine.
    if size > BUDGET_GIB * 2**30 and result.place != "storage":
        problems.append(f"{size / 2**20:.1f} MiB on disk, the budget is {BUDGET_GIB * 1024:.1f}")
    problems += [
        f"{fault.name}: {fault.lost} epochs lost" for fault in result.faults if fault.lost > 1
    ]
    return problems


def leftovers(folder: Path, study: Path) -> list[str]:
    """Temporary files, half-built cohorts and shared memory that no process uses any more."""
    problems = [f"left behind: {path.relative_to(folder)}" for path in folder.rglob(".*.tmp")]
    problems += [f"left behind: {path.relative_to(folder)}" for path in folder.rglob(".building-*")]
    used = {name for process in psutil.process_iter() for name in mapped(process)}
    problems += [
        f"shared memory {path}"
        for path in Path("/dev/shm").glob("plasma*")
        if str(path) not in used
    ]
    return problems


def mapped(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return [
            region.path for region in process.memory_maps() if region.path.startswith("/dev/shm/")
        ]
    return []


# All rounds ------------------------------------------------------------------------------------------------------------


def summary(rounds: list[Round]) -> str:
    """Return the figures of all rounds in a few lines."""
    faults = [fault for result in rounds for fault in result.faults if fault.done]
    kinds = Counter(fault.name for fault in faults)
    lost = Counter(fault.lost for fault in faults)
    left = [fault.left_s for fault in faults if fault.left_s is not None]
    good = sum(not result.problems for result in rounds)
    return "\n".join(
        [
            f"{good} of {len(rounds)} rounds hold, {sum(r.epochs for r in rounds)} epochs, "
            f"{sum(r.starts for r in rounds)} driver starts, {sum(r.seconds for r in rounds) / 60:.0f} min",
            f"{len(faults)} faults: "
            + ", ".join(f"{name} {count}" for name, count in sorted(kinds.items())),
            "whole epochs lost by a fault: "
            + ", ".join(f"{n} by {count}" for n, count in sorted(lost.items())),
            f"preempted drivers ended within {max(left, default=math.nan):.1f} s",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first round; the others count on from it"
    )
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder for the studies of rounds in which something does not hold",
    )
    options = parser.parse_args()
    rounds = []
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request to the storage
    with tempfile.TemporaryDirectory(prefix="medtune-chaos-") as name:
        table = write_cohort(Path(name) / "cohort", subjects=40, side=(14, 18))
        for seed in range(options.seed, options.seed + options.rounds):
            folder = Path(name) / f"{seed:04d}"
            folder.mkdir()
            result = plan_round(seed)
            rounds.append(result)
            try:
                run_round(result, table, folder)
            except Exception:  # noqa: BLE001 - reported and counted: the other rounds are run all the same
                result.problems.append(traceback.format_exc())
            print(result.line(), flush=True)
            if result.problems and options.keep:
                shutil.copytree(
                    folder,
                    options.keep / folder.name,
                    dirs_exist_ok=True,
                    ignore_dangling_symlinks=True,
                )
            shutil.rmtree(folder, ignore_errors=True)
    print(summary(rounds))
    return int(any(result.problems for result in rounds))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the round ends its processes
    sys.exit(main())
