"""A whole search, its driver killed by the system over and over: searcher, policy and records on real files.

Tune's events come from here instead of from Ray, in Tune's own order, so that the rows arrive in the same order in the
killed search and in the one that is left alone; only then can their decisions be compared one by one. Killed searches
under a real Ray are in test_study.py.
"""

import hashlib
import io
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from rich.console import Console

import trainables
import tune_app
from trainables.checkpoints import sweep_temporaries
from trainables.ray_trainable import FATAL
from tune_app.driver.display import Display
from tune_app.driver.optuna_database import sqlite_url
from tune_app.driver.recorder import Recorder
from tune_app.driver.session import StudySession
from tune_app.study.files import StudyFiles, mend_last_line
from tune_app.study.rows import read_record, read_rows
from tune_app.study.spec import build_spec

ROOT = Path(__file__).parents[3]
OURS = tuple(str(Path(str(package.__file__)).parent) for package in (trainables, tune_app))
EPOCHS, CONCURRENT, KILLS = 12, 3, 20
FIELDS: dict[str, Any] = {
    "data": "none",
    "space": {
        "search": {"dropout": {"low": 0.0, "high": 0.8}, "s": {"low": 1, "high": 30, "log": True}}
    },
    "trials": 21,
    "config": {"epochs": EPOCHS, "drw_start_epoch": 6},
    "policy": {
        "first_rung_share": 0.1,  # rungs at 3 and 6 epochs, the second within the guard
        "reduction_factor": 2,
        "judge_from": 2,
        "grace_epochs": 3,
        "finalists": 1,
        "drw_guard_epochs": 2,
    },
}


class TuneTrial:
    """What our parts see of a trial of Tune."""

    def __init__(self, suggestion: dict[str, Any], folder: Path) -> None:
        self.config = suggestion
        self.name = str(suggestion["trial"])
        self.trial_id = f"tune-{self.name}"
        self.told = 0
        self.status = Trial.RUNNING
        self.error_file = folder / f"error-{self.name}.txt"
        self.error_file.write_text("Failure # 1 (occurred at noon)\nA traceback\nlost its node\n")

    @property
    def temporary_state(self) -> SimpleNamespace:
        return SimpleNamespace(ray_actor=None)  # no process to ask where it runs


def row_of(trial: TuneTrial, epoch: int) -> dict[str, Any]:
    """An epoch that follows from the trial's overrides: another draw would show in the rows."""
    drawn = trial.config["overrides"]
    digest = hashlib.sha256(repr(sorted(drawn.items())).encode()).digest()
    level = 0.9 - drawn["dropout"] / 3 - abs(math.log(drawn["s"] / 10)) / 20
    auc = 0.5 + (level - 0.5) * (1 - 0.4**epoch) + digest[epoch] / 20_000
    if digest[0] % 4 == 0 and epoch > 5:
        auc = 0.5  # collapses
    if digest[0] % 5 == 1:
        auc = math.nan
    return {
        "epoch": epoch, "val_auc": auc, "val_auc_raw": auc, "val_auc_ema": auc, "train_loss": 1 / epoch,
        "drw_active": epoch >= 6, "epoch_s": 0.0, "val_positive": 50, "val_negative": 200,
    }  # fmt: skip


def drive(root: Path, begun: Callable[[], object]) -> None:
    """One session of a driver, from the earlier ones' state to the search's end; `begun` is called once that is loaded."""
    files, spec = StudyFiles(root), build_spec(FIELDS)
    sweep_temporaries(root)
    for path in (files.epochs, files.decisions):
        mend_last_line(path)
    if not files.spec.exists():
        files.write({"spec": spec.model_dump(mode="json")})
    recorder = Recorder(spec, files)
    display = Display(Console(file=io.StringIO()), num_trials=spec.num_trials, epochs=EPOCHS)
    session = StudySession(spec, "none", recorder, display)
    session.begin()
    begun()
    scheduler, lifecycle, searcher = session.scheduler(), session.lifecycle, session.searcher
    running: list[TuneTrial] = []
    finished = False

    def end(trial: TuneTrial, result: dict[str, Any] | None, *, error: bool = False) -> None:
        """As TuneController does it: the scheduler hears of a failure first; the callbacks come last."""
        if error:
            scheduler.on_trial_error(None, trial)
        searcher.on_trial_complete(trial.trial_id, result=result, error=error)
        (lifecycle.on_trial_error if error else lifecycle.on_trial_complete)(0, [], trial)
        running.remove(trial)

    while running or not finished:
        while len(running) < CONCURRENT and not finished:
            suggestion = searcher.suggest(f"tune-{len(recorder.records):05d}")
            finished = suggestion == Searcher.FINISHED
            if not finished:
                trial = TuneTrial(suggestion, root)
                searcher._numbers[trial.trial_id] = int(trial.name)
                lifecycle.on_trial_start(0, [], trial)
                running.append(trial)
        if not running:
            break
        trial = min(running, key=lambda trial: (len(recorder.rows.get(trial.name, [])), trial.name))
        known = len(recorder.rows.get(trial.name, []))
        if int(trial.name) % 7 == 5 and known == 1:
            end(trial, None, error=True)
            continue
        if int(trial.name) % 7 == 6 and known == 2:
            result: dict[str, Any] = {"epoch": 0, FATAL: "out of memory"}
        elif known == EPOCHS:
            end(
                trial, row_of(trial, EPOCHS)
            )  # killed after its last row: it has nothing left to do
            continue
        else:  # taken up again, a trial reports from its checkpoint on, which may lie behind
            trial.told = trial.told + 1 if trial.told else max(1, known)
            result = row_of(trial, trial.told)
        decision = scheduler.on_trial_result(None, trial, result)
        if decision != TrialScheduler.STOP:
            searcher.on_trial_result(trial.trial_id, result)
        lifecycle.on_trial_result(0, [], trial, result)
        if decision == TrialScheduler.STOP or result["epoch"] == EPOCHS:
            end(trial, result)
    searcher.close()
    recorder.flush()


class Moments:
    """Counts the calls and returns of our own code, system calls from it included, and kills the process at one of them.

    A moment is then the same on a fast and on a slow machine, and the window between two writes as likely to be hit as
    the seconds of a sampler.
    """

    def __init__(self) -> None:
        self.count = 0
        self.fatal = math.inf

    def restart(self, fatal: float = math.inf) -> int:
        """Count from 0 again, to `fatal`; returns the count so far."""
        counted, self.count, self.fatal = self.count, 0, fatal
        return counted

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_filename.startswith(OURS):
            self.count += 1
            if self.count >= self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)


def kill_and_resume(root: Path, whole: Path, seed: int) -> None:
    """Drive a search to its end in `whole`, and one in `root` that is killed `KILLS` times on its way."""
    moments, rng = Moments(), random.Random(seed)
    sys.setprofile(moments)  # which the children inherit
    drive(whole, begun=moments.restart)
    whole_work = moments.restart()
    # Together the shares leave some of the work undone, so that no kill comes after the end.
    shares = [rng.random() for _ in range(KILLS)]
    begin = RawValue(
        "q", 0
    )  # operations that a session needs to load the state, from the session before
    for kill, share in enumerate([*shares, math.inf]):
        at_begin = int(rng.random() * begin.value) if kill % 4 == 3 else math.inf
        at_work = 0.8 * whole_work * share / sum(shares)

        def begun(at_work: float = at_work) -> None:
            begin.value = moments.restart(at_work)

        pid = os.fork()
        if not pid:
            moments.restart(at_begin)
            drive(root, begun=begun)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        expected = signal.SIGKILL if kill < KILLS else 0
        assert status == expected, f"session {kill} ended with {status}, not {expected}"
    sys.setprofile(None)


def main(folder: str, seed: str) -> None:
    """The test runs this in a separate process, which has no other thread when it forks."""
    kill_and_resume(Path(folder) / "killed", Path(folder) / "whole", int(seed))


def told(root: Path) -> dict[str, Any]:
    """All that a study holds but the time of day."""
    files = StudyFiles(root)
    rows = [
        {key: value for key, value in row.items() if key != "time"}
        for row in read_rows(files.epochs)
    ]
    records = [read_record(path) for path in sorted(files.trials.glob("*/trial.json"))]
    for record in records:
        assert record.pop("started") <= record.pop("ended")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trials = optuna.load_study(study_name=None, storage=sqlite_url(files.database)).trials
    names = ("number", "state", "values", "params", "intermediate_values", "user_attrs")
    study = [{name: getattr(trial, name) for name in names} for trial in trials]
    return {
        "rows": rows,
        "decisions": read_rows(files.decisions),
        "records": records,
        "study": study,
    }


@pytest.mark.timeout(300)  # seconds on a quiet machine, but it starts a driver 22 times
def test_a_search_killed_at_20_random_moments_decides_as_one_never_killed(tmp_path: Path) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_killed_search as tests; tests.main(*sys.argv[2:])"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path), "13"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr
    whole, killed = told(tmp_path / "whole"), told(tmp_path / "killed")
    for part, expected in whole.items():
        assert killed[part] == expected, part

    reasons = {decision["reason"] for decision in whole["decisions"]}
    assert reasons >= {"rung", "halving", "diagnosis", "completed", "drw_guard"}, (
        "the search has all there is to decide"
    )
    assert {record["state"] for record in whole["records"]} == {"completed", "stopped", "failed"}
    assert (
        len({record["reason"] for record in whole["records"] if record["state"] == "failed"}) == 2
    )
    states = [trial["state"] for trial in killed["study"]]
    assert len(states) == FIELDS["trials"], "none twice"
    assert TrialState.RUNNING not in states
