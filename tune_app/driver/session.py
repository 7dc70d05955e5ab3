"""One run of a study's driver: Ray, searcher and scheduler put together."""

import logging
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import ray
from ray import tune

from trainables.data.storage import Remote, absolute, kept_since_asked
from trainables.objective import OBJECTIVES, objective_value
from trainables.own_folder import is_own, mark_own
from trainables.ray_trainable import FATAL, shown_name
from tune_app.driver.disk import Budget, make_room
from tune_app.driver.display import Display
from tune_app.driver.loggers import Loggers
from tune_app.driver.notify import Notifier
from tune_app.driver.optuna_database import STUDY_NAME
from tune_app.driver.place import StudyPlace
from tune_app.driver.planned import PlannedSearcher
from tune_app.driver.ray_scheduler import StudyScheduler, trial_name
from tune_app.driver.recorder import Recorder
from tune_app.driver.resources import Plan
from tune_app.driver.searcher import OptunaSearcher
from tune_app.driver.searcher import trial_name as trial_id
from tune_app.driver.stopping import (
    INTERRUPTED,
    PREEMPTED,
    STOP_SIGNAL,
    TAKEN_AWAY,
    Preempted,
    saving_s,
)
from tune_app.driver.time_budget import TimeBudget
from tune_app.driver.tune_repairs import lost_processes_told_once, processes_named
from tune_app.driver.watchdog import own_ray_watched, watch_tune
from tune_app.study.files import OPTUNA_STUDY, StudyFiles, kept_by
from tune_app.study.policy import Policy, stop_reason
from tune_app.study.policy_spec import watching_only
from tune_app.study.requests import TrialRequests, answered_requests
from tune_app.study.rows import ENDED, read_rows
from tune_app.study.spec import StudySpec

log = logging.getLogger("medtune.study")

LOOK_S = 1.0
"""Seconds between two looks for checkpoints in object storage."""
RAY_FILES = "what Ray Tune writes of one session of a study"
"""Mark of the folders that hold it."""


class StudySession:
    """One driver at work on a study: rebuilds what earlier ones left, then runs the rest."""

    def __init__(
        self,
        spec: StudySpec,
        cohort: str,
        recorder: Recorder,
        display: Display,
        budget: Budget | None = None,
        notifier: Notifier | None = None,
        loggers: Loggers | None = None,
        storage: str | None = None,
    ) -> None:
        """`storage`: URL of a study in object storage, which trials send their checkpoints to."""
        self.remote = None if storage is None else Remote(storage)
        self.looked: float | None = None
        """When object storage was last asked for checkpoints, on the monotonic clock."""
        self.spec, self.cohort, self.files = spec, cohort, recorder.files
        self.recorder, self.display, self.budget = recorder, display, budget
        self.loggers = loggers or Loggers(())
        self.notifier = notifier or Notifier(None, str(self.files.root))
        self.epochs = spec.epochs
        self.ranks = 1
        self.fatal: dict[str, str] = {}
        self.time: TimeBudget | None = None
        self.interrupt = Interrupt(self.files, lambda: self.time is not None and self.time.over)
        self.lifecycle = Lifecycle(self)
        self.requests = TrialRequests(self.files)
        self.place = StudyPlace(self.files.root)
        self.rules: int = self.files.read()["format"]
        recorder.kept = kept_by(spec.objective, self.rules)
        self.objective = recorder.kept.objective
        self.policy = Policy(
            spec.policy if spec.kind == "search" else watching_only(spec.policy),
            self.epochs,
            objective=self.objective,
        )
        self.variants = {
            f"{number:05d}": trial.variant for number, trial in enumerate(spec.planned)
        }

    def run(
        self, trainable: Callable[[dict[str, Any]], None], plan: Plan, *, local: bool = True
    ) -> int:
        """Run `trainable` as each trial until every one has ended; INTERRUPTED or PREEMPTED before that, else 0.

        After `begin`.

        `local`: this Ray is the study's own, and no node is ever added to it.
        """
        self.keep_to_budget()
        self.ranks = plan.ranks
        gpus = plan.gpus_per_rank * plan.ranks * plan.concurrent
        self.time = TimeBudget(self.spec, self.policy, plan.concurrent, gpus)
        if (planned := self.time.plan) is not None:
            self.display.note(planned)
        self.look = watch_tune(
            self.files.trial,
            lambda trial: len(self.recorder.rows.get(trial, ())),
            plan.bundles,
            say=log.warning,
            local=local,
            # A gang ends itself first, and can name the rank that hangs.
            deadline_s=self.spec.rank_deadline_s * (1 if plan.ranks == 1 else 2),
        )
        searcher, study = self.searcher, self.notifier.study
        name = time.strftime("%Y%m%d-%H%M%S")
        if not is_own(self.files.ray / name, RAY_FILES):
            mark_own(self.files.ray / name, RAY_FILES)
        tuner = tune.Tuner(
            tune.with_resources(
                trainable, tune.PlacementGroupFactory(plan.bundles, strategy="PACK")
            ),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=self.scheduler(),
                num_samples=-1,
                max_concurrent_trials=plan.concurrent,
                trial_name_creator=trial_name,  # in Ray's own messages
                trial_dirname_creator=trial_name,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=absolute(self.files.ray),
                failure_config=tune.FailureConfig(max_failures=self.spec.max_failures),
                callbacks=[self.lifecycle],
                verbose=0,
            ),
        )
        with self.place.blamed():
            try:
                with (
                    self.interrupt,
                    lost_processes_told_once(),
                    processes_named(lambda trial: shown_name(trial_name(trial), study)),
                    own_ray_watched(study),
                ):
                    tuner.fit()
            except Preempted:
                return PREEMPTED
            except KeyboardInterrupt:
                return INTERRUPTED
            finally:
                searcher.close()
                self.recorder.close()
                self.loggers.close()
        self.place.check(self._own_database())
        return 0

    def saved(self) -> bool:
        """Whether every running trial has written a checkpoint since it was asked to, and sent it where the study is."""
        try:
            asked = self.files.hurry.stat().st_mtime_ns
        except FileNotFoundError:
            return True
        records = self.recorder.records.items()
        running = [trial for trial, record in records if record["state"] not in ENDED]
        if self.remote is not None:
            now = time.monotonic()
            if self.looked is not None and now - self.looked < LOOK_S:
                return False
            self.looked = now
            return kept_since_asked(self.remote, running)
        for trial in running:
            try:
                if self.files.trial(trial).checkpoint.stat().st_mtime_ns < asked:
                    return False
            except FileNotFoundError:
                return False
        return True

    def scheduler(self) -> StudyScheduler:
        """Return the stopping policy as Tune asks it, joined to the study's records. After `begin`."""
        return StudyScheduler(
            self.policy,
            self.recorder.row,
            self.recorder.decision,
            self.spec.config,
            requested=self.requests.of,
            begun=self.lifecycle.begun,
            failed=self.lifecycle.failed,
            stopped=lambda trial, reason: self.searcher.note(int(trial), reason),
            fatal=self.fatal,
            spent=self._spent,
        )

    def _spent(self, trial: str) -> bool:
        """Whether no other trial must use the process: it has lost its ranks, or it shared its GPU without MPS after a fault."""
        lost_ranks = self.ranks > 1 and trial in self.fatal
        return lost_ranks or self.files.trial(trial).apart.exists()

    def _own_database(self) -> Path | None:
        """The database in the study's folder, where it has one."""
        if self.spec.kind != "search" or self.spec.storage is not None:
            return None
        return self.files.database

    def keep_to_budget(self) -> None:
        """Remove what does not fit the disk budget any more, where there is one."""
        if self.budget is not None:
            for path in make_room(self.files, self.budget, self.recorder.records.values()):
                log.info("disk budget: removed %s", path)

    def begin(self, *, retry_failed: bool = False) -> None:
        """Take up what earlier sessions left: searcher and policy are then where a search never killed would be."""
        retried = self.recorder.failed() if retry_failed else []
        self._replay()
        beyond = self._beyond_rows()
        self.searcher = self._searcher(retried, beyond)
        with ExitStack() as unless_begun:
            unless_begun.callback(self.searcher.close)
            for trial in (
                retried
            ):  # after the Optuna study: one that is running only there is settled as failed again
                self.recorder.reopened(trial)
            notes = [*self.searcher.notes]
            for trial in beyond:
                self.recorder.reopened(trial)
            self.recorder.drop_decisions_ahead()
            if reopened := sorted({*beyond, *map(trial_id, self.searcher.reopened)}):
                notes.append(
                    f"trials {', '.join(reopened)} are reopened: they are recorded as finished and their rows are not, "
                    "as in a copy that was made while the study ran"
                )
            if retried:
                notes.append(
                    f"failed before, to continue from their checkpoints: {', '.join(retried)}"
                )
            elif retry_failed:
                notes.append("no trial has failed: none is tried again")
            for note in notes:
                self.display.note(note)
            self._settle(self.searcher)
            ended = self.recorder.states()
            if sum(ended.get(state, 0) for state in ENDED) >= self.spec.num_trials:
                self.display.note(
                    f"nothing left to do: all {self.spec.num_trials} trials have ended"
                )
            unless_begun.pop_all()

    def _beyond_rows(self) -> list[str]:
        """Trials that are recorded as finished after an epoch that their rows, which are the truth, do not have."""
        decided: dict[str, int] = {}
        for trial, epoch in self.recorder.logged:
            decided[trial] = max(epoch, decided.get(trial, 0))
        found = []
        for trial, record in self.recorder.records.items():
            rows = self.recorder.rows.get(trial, ())
            ends = {"completed": self.epochs, "stopped": decided.get(trial, 0)}
            if (rows[-1]["epoch"] if rows else 0) < ends.get(record["state"], 0):
                found.append(trial)
        return found

    def _searcher(self, retried: Sequence[str], beyond: Sequence[str] = ()) -> Any:
        if self.spec.kind != "search":
            return PlannedSearcher(self.spec)
        return OptunaSearcher(
            self.spec.resolved_space(),
            epochs=self.epochs,
            num_trials=self.spec.trials,
            objective=partial(objective_value, objective=self.spec.objective),
            metric=OBJECTIVES[self.spec.objective].column,
            storage=self.spec.storage or self.files.database,
            sampler=self.spec.sampler,
            prior=self.spec.used_prior,
            seed=self.spec.seed,
            warm_start=self.spec.warm_start,
            warm_start_from=self.spec.warm_start_from,
            rows={int(trial): rows for trial, rows in self.recorder.rows.items()},
            identity={"cohort": self.cohort, "objective": self.spec.objective},
            failure=FATAL,
            retry=[int(trial) for trial in retried],
            ended={
                int(trial)
                for trial, record in self.recorder.records.items()
                if trial not in beyond
                and (record["state"] in ENDED or trial in self.policy.stopped())
            },
            study_name=self._study_name(),
        )

    def _study_name(self) -> str:
        """The study's name in its storage, as it was chosen when the study began."""
        if not self.files.spec.is_file():
            return STUDY_NAME
        return str(self.files.read().get(OPTUNA_STUDY) or STUDY_NAME)

    def _replay(self) -> None:
        """Have the policy decide again on all rows of earlier sessions, in their order."""
        requested = answered_requests(read_rows(self.files.decisions))
        for row in read_rows(self.files.epochs):
            words = requested.get((row["trial"], row["epoch"]))
            self.recorder.decision(
                self.policy.decide(row["trial"], self.config_of(row["trial"]), row, words)
            )

    def _settle(self, searcher: Any) -> None:
        """Settle trials that had ended before their driver could record it."""
        decided, failed = self.policy.stopped(), searcher.failed()
        for trial, record in list(self.recorder.records.items()):
            rows = self.recorder.rows.get(trial, [])
            # Tune calls the searcher first
            if record["state"] not in ENDED and int(trial) in failed:
                record = self.recorder.ended(
                    trial, "failed", failed[int(trial)], error=failed[int(trial)]
                )
            elif record["state"] not in ENDED and trial in decided:
                state = "stopped" if decided[trial].stops else "completed"
                record = self.recorder.ended(trial, state, stop_reason(decided[trial]))
            if record["state"] in ENDED:
                self.requests.answered(trial)
                searcher.settle(
                    int(trial), record["state"], record["objective"], rows, reason=record["reason"]
                )
                self.recorder.rows.pop(trial, None)
            self.display.known(record, rows[-1]["epoch"] if rows else 0)

    def config_of(self, trial: str) -> dict[str, Any]:
        """The complete configuration of a trial, as plain values."""
        overrides = self.recorder.records[trial]["overrides"]
        return self.spec.config_of(overrides).model_dump(mode="json")


class Interrupt:
    """Ctrl-C, a request to stop, or a machine that is taken away: taken between two steps of Tune's loop, a second one at once.

    Raised wherever it happens to arrive, a KeyboardInterrupt may land in a destructor or a callback of C code, where it
    is printed and forgotten. A signal of TAKEN_AWAY leaves trials the time that `saving_s` gives to finish their epochs and
    write them. Use as a context; outside the main thread, where no signal arrives, it does nothing.
    """

    def __init__(self, files: StudyFiles, time_is_over: Callable[[], bool] = lambda: False) -> None:
        self.files = files
        self.asked = False
        self.time_is_over = time_is_over
        self.deadline: float | None = None
        """Until when trials save their work, on the monotonic clock, once the machine is to be taken away."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, STOP_SIGNAL, *TAKEN_AWAY):
                self._before[number] = signal.getsignal(number)
            self._listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self.files.hurry.unlink(missing_ok=True)

    def _listen(self) -> None:
        for number in self._before:
            signal.signal(number, self._preempt if number in TAKEN_AWAY else self._ask)

    def take(self, saved: Callable[[], bool] = lambda: True) -> None:
        """Raise KeyboardInterrupt if one was asked for or the time is over; Preempted once `saved` returns True, or there is no time left."""
        if self._before and signal.getsignal(signal.SIGUSR1) != self._preempt:
            self._listen()  # Tune takes SIGUSR1 for itself as it begins
        if self.asked or self.time_is_over():
            raise KeyboardInterrupt
        if self.deadline is None:
            return
        if not self.files.hurry.exists():
            log.warning(
                "this machine is to be taken away: trials have %.0f s to finish their epochs",
                max(0.0, self.deadline - time.monotonic()),
            )
            self.files.hurry.touch()
        if time.monotonic() >= self.deadline or saved():
            raise Preempted

    def leave_if_preempted(self) -> None:
        """Raise Preempted if the machine is being taken away: what fails now does so because of that."""
        if self.deadline is not None:
            raise Preempted

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def _preempt(self, number: int, frame: object) -> None:
        if self.asked:
            raise Preempted
        deadline = time.monotonic() + saving_s(number)
        self.deadline = deadline if self.deadline is None else min(self.deadline, deadline)


ANSWER_S = 10.0
"""Seconds a trial's process may take to report where it runs, before its record is written without that."""


class Lifecycle(tune.Callback):  # type: ignore[misc]  # Ray is not typed
    """Tune's events -> the trial's record and the display."""

    def __init__(self, session: StudySession) -> None:
        self.session = session
        self._starting: dict[str, _Starting] = {}
        self._nodes: dict[Any, str] = {}
        """Nodes of the processes that have reported theirs, by Ray's id of each."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its arguments, for a restore that is never asked for

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.session.place.check()
        self.session.interrupt.take(self.session.saved)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial_name(trial)
        self.session.display.began(name, self.session.variants.get(name))
        actor = trial.temporary_state.ray_actor
        if actor is None or actor._actor_id in self._nodes:  # a process that has run other trials
            self._begin(trial, None if actor is None else self._nodes[actor._actor_id])
        else:  # waiting for the answer would hold up all other trials, and Tune's own question waits for ever
            where = actor.get_current_ip_pid.remote()
            self._starting[name] = _Starting(
                trial, actor._actor_id, where, time.monotonic() + ANSWER_S
            )

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        for start in list(self._starting.values()):
            if ray.wait([start.where], timeout=0)[0] or time.monotonic() >= start.deadline:
                self.begun(start.trial)
        self.session.look(trials)

    def begun(self, trial: Any) -> str:
        """Return the trial's name. Its record is there from now on, which has to come before any row.

        A process that dies on its way up has failed before Tune calls the trial started.
        """
        name = trial_name(trial)
        if name not in self._starting and name not in self.session.recorder.records:
            self.on_trial_start(0, [], trial)
        if (start := self._starting.pop(name, None)) is not None:
            node = _node_of(start.where)
            if node is not None:
                self._nodes[start.actor] = node
            self._begin(trial, node)
        return name

    def _begin(self, trial: Any, node: str | None) -> None:
        name = trial_name(trial)
        self.session.recorder.began(
            name, trial.config["overrides"], self.session.variants.get(name), node=node
        )
        self.session.loggers.began(name, trial.config["overrides"])
        self.session.keep_to_budget()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        name = trial_name(trial)
        rows = self.session.recorder.rows.get(name)
        if rows and rows[-1]["epoch"] == result["epoch"]:
            known = self.session.time.measured(rows[-1]) if self.session.time is not None else None
            if known is not None:
                self.session.display.note(known)
            self.session.loggers.reported(name, rows[-1])
            self.session.display.reported(
                name, rows[-1], objective_value(rows, self.session.spec.objective)
            )

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.session.interrupt.leave_if_preempted()
        name = self.begun(trial)
        self.session.recorder.failed_once(name)
        self.session.display.note(
            f"trial {name}: {self._failure_of(trial)[0]}; it starts again from its checkpoint"
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = self.begun(trial)
        decision = self.session.policy.stopped().get(name)
        if name in self.session.fatal:
            self._end(name, "failed", self.session.fatal[name], error=self.session.fatal[name])
        elif decision is not None and decision.stops:
            self._end(name, "stopped", stop_reason(decision))
        else:
            self._end(name, "completed", "")

    def failed(self, trial: Any) -> None:
        """Record that the trial has failed for good. Not Tune's own `on_trial_error`, which comes after the searcher's end."""
        self.session.interrupt.leave_if_preempted()
        name = self.begun(trial)
        reason, text = self._failure_of(trial)
        self._end(name, "failed", reason, error=text)
        self.session.searcher.note(int(name), reason)

    def _failure_of(self, trial: Any) -> tuple[str, str]:
        """Why the trial failed last: in a line, and in full.

        Read where Tune writes it, on this machine: `get_pickled_error` looks in the storage, where it comes much later.
        """
        told = (
            Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
            if trial.error_file
            else ""
        )
        text = told.rpartition("Failure # ")[2].partition("\n")[2].strip()
        if not text:
            return ("the trial's process ended without a word",) * 2
        record = self.session.recorder.records.get(trial_name(trial), {})
        return failure_line(text, ranks=self.session.ranks, node=record.get("node")), text

    def _end(self, name: str, state: str, reason: str, *, error: str | None = None) -> None:
        record = self.session.recorder.ended(name, state, reason, error=error)
        self.session.notifier.trial_ended(record)
        self.session.loggers.ended(record)
        self.session.requests.answered(name)
        self.session.display.ended(name, state, reason)
        self.session.keep_to_budget()


def failure_line(text: str, *, ranks: int, node: str | None) -> str:
    """Return in a line why a trial failed, from Ray's text; of a lost process, which rank it was and on which node.

    `node`: the node in the trial's record, where it started.
    """
    reason = text.splitlines()[-1].strip().removeprefix("trainables.ranks.RankError: ")
    if reason.startswith("The actor is dead"):
        reason = reason.partition(". ")[0]  # the rest is a page of what may be the cause
    who = "rank 0" if ranks > 1 else "its process"
    found = re.search(r"^\s*ip: (\S+)$", text, re.MULTILINE)
    node = found[1] if found else node
    if text.startswith("The actor died") and node is not None:
        return f"{who} on node {node} died: {reason}"
    if re.match(
        r"(\S+: )?The actor \S+ is unavailable", reason
    ):  # a raylet that died takes its actors along
        return f"{who} on node {node or 'unknown'} does not answer: it or its node was lost"
    return reason


@dataclass(frozen=True)
class _Starting:
    """A trial whose record is still to be written."""

    trial: Any
    actor: Any
    where: Any
    """What will be the address of its process, and the process's id."""
    deadline: float


def _node_of(where: Any) -> str | None:
    """Where the trial runs; None when its process has not reported it."""
    try:
        return str(ray.get(where, timeout=0)[0])
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
        return None
