"""A study from its spec to its directory: Ray Tune is the executor, the directory is the truth.

Every row a trial reports is written to epochs.jsonl before anything is decided on it, and everything decided is a pure
function of those rows in their order. A killed study is therefore rebuilt by reading the rows again: the policy
remakes its rungs, trials that had ended are settled, the others go on from their own checkpoints. Nothing is read back
from Ray's experiment state, which is saved seconds too late and forgets the scheduler's rungs.
"""

import gc
import importlib.util
import logging
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import ray
from filelock import FileLock, Timeout
from ray import tune
from ray.autoscaler.sdk import request_resources
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from trainables import installed_version
from trainables.checkpoints import TrialFiles, sweep_temporaries
from trainables.config import FineTuneConfig, build_config
from trainables.data.manifest import read_manifest
from trainables.data.scans import Recipe
from trainables.data.storage import url_of
from trainables.data.volumes import prepare_cohort
from trainables.ray_trainable import FATAL, TrialSetting, run_trial
from tune_app.driver.disk import Budget, make_room, plan_budget
from tune_app.driver.display import Display
from tune_app.driver.local_ray import ray_to_file, ray_to_work_with, would_start_ray
from tune_app.driver.packing import measure_packing, pick_packing
from tune_app.driver.ray_scheduler import PolicyScheduler
from tune_app.driver.recorder import Recorder
from tune_app.driver.searcher import OptunaSearcher
from tune_app.driver.tune_repairs import lost_processes_told_once
from tune_app.driver.watchdog import watch_tune
from tune_app.results.study import ENDED, read_rows
from tune_app.study.mirror import drop_unrecorded, mirrored
from tune_app.study.objective import OBJECTIVES, objective_value
from tune_app.study.policy import Decision, Policy, PolicySpec
from tune_app.study.requests import (
    STOP_SIGNAL,
    TrialRequests,
    answered_requests,
    stopping_on_request,
)
from tune_app.study.spec import (
    SpecError,
    StudyFiles,
    StudySpec,
    default_cache,
    mend_last_line,
    resumed_spec,
)

log = logging.getLogger("medtune.study")

DONE, FAILED_TRIALS, INTERRUPTED = 0, 3, 130
ACCELERATOR = "accelerator_type:"
"""How Ray names the resource that a node has for its kind of GPU."""
ANSWER_S = 10.0
"""Seconds a trial's process may take to say where it runs, before its record is written without that."""
VERSIONS = (
    "medtune",
    "torch",
    "ray",
    "optuna",
    "monai",
    "pandas",
    "nibabel",
    "numpy",
    "scikit-learn",
)


class StudyBusyError(RuntimeError):
    """Another driver is at work on the study."""


@dataclass(frozen=True)
class Outcome:
    """How a session of a study ended."""

    exit_code: int
    states: dict[str, int]
    """Number of trials by state."""


def run_study(
    spec: StudySpec,
    root: Path,
    *,
    console: Any,
    notes: Any,
    address: str | None = None,
    resume: bool = False,
    go_on: bool = False,
    retry_failed: bool = False,
) -> Outcome:
    """Run `spec` in the directory `root` until every trial has ended; go on where an earlier session left off.

    `root` may be object storage (s3://...): the work is then mirrored there. `go_on`: resume where there is a study.
    `retry_failed`: trials that have failed for good go on, too, from their checkpoints.

    `console` shows progress, `notes` says what is worth knowing. `address`: a running Ray cluster; None starts a local
    Ray and stops it at the end. Ctrl-C leaves a study that `resume` completes.

    Raises SpecError when the directory holds another study or the resources can never hold a trial, StudyBusyError
    when another driver runs it, ManifestError and VolumeError for the data.
    """
    url = url_of(root)
    try:
        with (
            mirrored(url) if url is not None else nullcontext(StudyFiles(root)) as files,
            _only_driver(files, notes),
        ):
            if go_on and files.spec.exists():
                spec, resume = resumed_spec(files, spec), True
            return _run_locked(
                spec,
                files,
                url,
                console=console,
                notes=notes,
                address=address,
                resume=resume,
                retry_failed=retry_failed,
            )
    finally:
        gc.collect()  # Tune's trials, callbacks and actors hold each other, and Python may leave them for hours


@contextmanager
def _only_driver(files: StudyFiles, notes: Any) -> Iterator[None]:
    """Hold the study's folder, with its log. Raises StudyBusyError when another driver does."""
    files.root.mkdir(parents=True, exist_ok=True)
    try:
        # A second, not none: a reader asking whether a driver is at work holds the lock for microseconds.
        held = FileLock(files.lock).acquire(timeout=1)
    except Timeout:
        raise StudyBusyError(
            f"{files.root}: another driver is running this study; wait for it, or stop it first"
        ) from None
    with held, ray_to_file(files.log, notes), stopping_on_request(files):
        yield


def _run_locked(
    spec: StudySpec,
    files: StudyFiles,
    url: str | None,
    *,
    console: Any,
    notes: Any,
    address: str | None,
    resume: bool,
    retry_failed: bool,
) -> Outcome:
    if files.spec.exists() and not resume:
        place = url or files.root
        raise SpecError(
            [f"{place}: holds a study already; `medtune resume {place}` goes on with it"]
        )
    if not files.spec.exists():
        _refuse_other_folders(files.root, spec)
    made = [path for path in (files.spec, files.database) if not path.exists()]
    log_callbacks(spec, files)  # what is missing must be told before the study has begun
    sweep_temporaries(files.root)
    for record in files.trials.glob("*/"):
        sweep_temporaries(record, TrialFiles(record).record)
    _sweep_ray(spec, files)
    base = build_config(spec.config)
    if would_start_ray(
        address
    ):  # the path is of the nodes: elsewhere it need not lead anywhere from here
        _check_weights(spec)
    manifest = read_manifest(Path(spec.data), num_classes=base.num_classes)
    cohort = prepare_cohort(manifest, Recipe.from_config(base), Path(spec.cache or default_cache()))
    if resume and (recorded := files.read().get("cohort")) != cohort.name:
        raise SpecError(
            [
                f"{spec.data}: the data changed since the study began (cohort {recorded}, now {cohort.name}): start a new one"
            ]
        )
    for path in (files.epochs, files.decisions):
        if cut := mend_last_line(path):
            log.warning("%s: dropped an unfinished last line of %d characters", path, len(cut))
    if url is not None and (ahead := drop_unrecorded(files)):
        log.warning(
            "trials %s report their epochs again: their records had not been mirrored",
            ", ".join(ahead),
        )
    with ray_to_work_with(address) as own_session:
        if spec.gpus_per_trial == "auto":
            spec = _with_measured_packing(spec, base, cohort, notes)
        plan, resources = _await_resources(spec, notes)
        budget = plan_budget(spec, plan.concurrent)
        if not resume:
            files.write(
                {
                    "spec": spec.model_dump(mode="json"),
                    "cohort": cohort.name,
                    "created": time.time(),
                    "versions": {name: installed_version(name) for name in VERSIONS}
                    | {"python": platform.python_version()},
                    "hardware": {"host": socket.gethostname(), "resources": dict(resources)},
                }
            )
        recorder = Recorder(spec, files)
        display = Display(console, num_trials=spec.num_trials, epochs=base.epochs)
        with display:
            session = _Session(spec, cohort.name, recorder, display, budget)
            setting = TrialSetting(
                study=str(files.root.resolve()),
                table=_told(spec.data),
                cohort=str(cohort),
                base=spec.config,
                checkpoint_epochs=spec.checkpoint_epochs,
                ranks=plan.ranks,
                gpus_per_rank=plan.gpus_per_rank,
                threads=spec.cpus_per_rank,
                deadline_s=spec.rank_deadline_s,
                storage=url,
            )
            notes.print(plan.text, soft_wrap=True)
            try:
                session.begin(retry_failed=retry_failed)
            except Exception:
                if not resume:  # the corrected command would be told that the folder holds a study
                    for path in made:
                        path.unlink(missing_ok=True)
                raise
            interrupted = session.run(
                partial(run_trial, setting=setting), plan, local=own_session is not None
            )
    states = recorder.states()
    if own_session is not None and not states.get("failed"):
        shutil.rmtree(
            own_session, ignore_errors=True
        )  # Ray's logs: it keeps those of every session for ever
    if interrupted:
        return Outcome(INTERRUPTED, states)
    return Outcome(FAILED_TRIALS if states.get("failed") else DONE, states)


def _refuse_other_folders(root: Path, spec: StudySpec) -> None:
    """Raise SpecError where a new study would lie among files of something else."""
    others = {"model.json": "a model", TrialFiles(root).checkpoint.name: "a run of `medtune train`"}
    held = next((what for name, what in others.items() if (root / name).exists()), None)
    if Path(spec.data).parent == root.resolve():
        held = "the data"
    if held is not None:
        raise SpecError(
            [f"{root}: holds {held}; a study has a folder of its own: name another with --out"]
        )


def _check_weights(spec: StudySpec) -> None:
    """Raise SpecError where a checkpoint that trials start from is not there, or does not fill their network.

    Else every trial of the search would find that out by itself. In a process of its own: a driver does without torch.
    """
    configs = [
        build_config({**spec.config, **overrides})
        for overrides in [{}, *(one.overrides for one in spec.planned)]
    ]
    networks = {
        (
            one.pretrained_path,
            *(f"{name}={getattr(one, name)}" for name in ("depth", "width", "in_channels")),
        )
        for one in configs
        if one.pretrained_path is not None
    }
    for path, *settings in sorted(networks):
        asked = [str(path), *(word for setting in settings for word in ("--set", setting))]
        checked = subprocess.run(
            [sys.executable, "-m", "tune_app.cli", "weights", "check", *asked],
            capture_output=True,
            text=True,
            check=False,
        )
        if checked.returncode:
            raise SpecError(
                [line.removeprefix("error: ") for line in checked.stderr.strip().splitlines()]
            )


def _with_measured_packing(
    spec: StudySpec, base: FineTuneConfig, cohort: Path, notes: Any
) -> StudySpec:
    """Return `spec` with the number of trials a GPU that gives the highest total throughput."""
    if not ray.cluster_resources().get("GPU"):
        raise SpecError(
            ["gpus_per_trial=auto: Ray has no GPU to measure; leave it out to use CPUs"]
        )
    totals = measure_packing(base, _told(spec.data), str(cohort))
    number = pick_packing(totals)
    told = ", ".join(f"{count} at once {total:.0f}" for count, total in totals.items())
    notes.print(f"packing: {number} trials a GPU (volumes a second in all: {told})", soft_wrap=True)
    return spec.model_copy(update={"gpus_per_trial": 1 / number})


def _told(table: str) -> str:
    """The table as trials anywhere are told it."""
    return url_of(table) or str(Path(table).resolve())


def _await_resources(spec: StudySpec, notes: Any) -> tuple["Plan", dict[str, float]]:
    """Return the plan, and what Ray has. On a cluster that scales itself up, ask for a trial's bundles and wait."""
    deadline = time.monotonic() + spec.wait_for_resources_s
    asked = False
    while True:
        resources = dict(ray.cluster_resources())
        try:
            return plan_resources(spec, resources), resources
        except SpecError as error:
            if time.monotonic() >= deadline:
                raise
            if not asked:
                request_resources(bundles=trial_bundle(spec, has_gpu=True))
                notes.print(
                    f"waiting up to {spec.wait_for_resources_s:.0f} s for resources: {error}",
                    soft_wrap=True,
                )
                asked = True
            time.sleep(min(5.0, spec.wait_for_resources_s / 10))


# Resources -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What one trial takes, and how many run at a time."""

    ranks: int
    cpus_per_rank: int
    gpus_per_rank: float
    concurrent: int
    bundles: list[dict[str, float]]
    """What each rank takes, by Ray's names."""

    @property
    def text(self) -> str:
        what = [f"{self.cpus_per_rank * self.ranks} CPU"]
        if self.gpus_per_rank:
            what.append(f"{self.gpus_per_rank * self.ranks:g} GPU")
        over = f" over {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{self.concurrent} trials at a time, each with {' and '.join(what)}{over}"


def trial_bundle(spec: StudySpec, *, has_gpu: bool) -> list[dict[str, float]]:
    """Return what each rank of a trial takes, one entry a rank; a pure function.

    Raises SpecError when GPUs and ranks do not go together.
    """
    wanted = spec.gpus_per_trial
    assert wanted != "auto", "measured before planning"
    if wanted is None:
        wanted = 1.0 if has_gpu else 0.0
    ranks = spec.ranks or max(1, int(wanted))
    if wanted > 1 and int(wanted) != ranks:
        raise SpecError(
            [
                f"gpus_per_trial={wanted:g} over {ranks} ranks: each rank has one GPU, so give as many of both"
            ]
        )
    if 0 < wanted <= 1 and ranks > 1:
        raise SpecError(
            [f"ranks={ranks} with gpus_per_trial={wanted:g}: a rank needs a GPU of its own"]
        )
    gpus = 1.0 if wanted > 1 else float(wanted)
    bundle = {"CPU": float(spec.cpus_per_rank), **({"GPU": gpus} if gpus else {})}
    if spec.accelerator_type is not None:
        bundle[ACCELERATOR + spec.accelerator_type] = (
            0.001  # as Ray does it: a node has 1 of its kind
        )
    return [bundle] * ranks


def plan_resources(spec: StudySpec, resources: Mapping[str, float]) -> Plan:
    """Return what trials take of a cluster with `resources` (Ray's names); a pure function.

    Raises SpecError when not even one trial fits: Ray would wait for ever without a word.
    """
    kinds = sorted(
        name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR)
    )
    if spec.accelerator_type is not None and spec.accelerator_type not in kinds:
        there = ", ".join(kinds) or "none that Ray has a name for"
        raise SpecError(
            [
                f"accelerator_type={spec.accelerator_type!r}: Ray has {there}: choose one, or leave it out"
            ]
        )
    gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    bundles = trial_bundle(spec, has_gpu=gpus > 0)
    ranks, per_rank = len(bundles), bundles[0].get("GPU", 0.0)
    fits = [cpus // (spec.cpus_per_rank * ranks)]
    if per_rank:
        # Shares of one GPU do not add up over several: each GPU holds floor(1 / share) trials.
        fits.append(gpus // ranks if per_rank == 1 else int(gpus) * (1 // per_rank))
    if min(fits) < 1:
        need = f"{spec.cpus_per_rank * ranks} CPU" + (
            f" and {per_rank * ranks:g} GPU" if per_rank else ""
        )
        raise SpecError(
            [
                f"a trial takes {need}, all of Ray has {cpus:g} CPU and {gpus:g} GPU: ask for less, or add a node"
            ]
        )
    most = int(min(fits))
    concurrent = min(most, spec.max_concurrent or most, spec.num_trials)
    return Plan(ranks, spec.cpus_per_rank, per_rank, concurrent, bundles)


# A session -------------------------------------------------------------------------------------------------------------


class _Session:
    """One driver at work on a study: rebuilds what earlier ones left, then runs the rest."""

    def __init__(
        self,
        spec: StudySpec,
        cohort: str,
        recorder: Recorder,
        display: Display,
        budget: Budget | None = None,
    ) -> None:
        self.spec, self.cohort, self.files = spec, cohort, recorder.files
        self.recorder, self.display, self.budget = recorder, display, budget
        self.epochs = spec.epochs
        self.ranks = 1
        self.fatal: dict[str, str] = {}
        self.interrupt = Interrupt()
        self.lifecycle = Lifecycle(self)
        self.requests = TrialRequests(self.files)
        self.policy = Policy(
            spec.policy if spec.kind == "search" else watching_only(spec.policy), self.epochs
        )
        self.variants = {
            f"{number:05d}": trial.variant for number, trial in enumerate(spec.planned)
        }

    def run(
        self, trainable: Callable[[dict[str, Any]], None], plan: Plan, *, local: bool = True
    ) -> bool:
        """Run `trainable` as each trial until every one has ended; True when interrupted. After `begin`.

        `local`: this Ray is the study's own, and nobody adds a node to it.
        """
        self.keep_to_budget()
        self.ranks = plan.ranks
        self.look = watch_tune(
            self.files.trial,
            lambda trial: len(self.recorder.rows.get(trial, ())),
            plan.bundles,
            say=log.warning,
            local=local,
            # A gang ends itself first, and can say which rank hangs.
            deadline_s=self.spec.rank_deadline_s * (1 if plan.ranks == 1 else 2),
        )
        searcher = self.searcher
        tuner = tune.Tuner(
            tune.with_resources(
                trainable, tune.PlacementGroupFactory(plan.bundles, strategy="PACK")
            ),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=StudyScheduler(self),
                num_samples=-1,
                max_concurrent_trials=plan.concurrent,
                trial_name_creator=trial_name,  # what TensorBoard and MLflow show
                trial_dirname_creator=trial_name,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=time.strftime("%Y%m%d-%H%M%S"),
                storage_path=str(self.files.ray.resolve()),
                failure_config=tune.FailureConfig(max_failures=self.spec.max_failures),
                callbacks=[self.lifecycle, *log_callbacks(self.spec, self.files)],
                verbose=0,
            ),
        )
        try:
            with self.interrupt, lost_processes_told_once():
                tuner.fit()
        except KeyboardInterrupt:
            return True
        finally:
            searcher.close()
            self.recorder.close()
        return False

    def keep_to_budget(self) -> None:
        """Remove what does not fit the disk budget any more, where there is one."""
        if self.budget is not None:
            for path in make_room(self.files, self.budget, self.recorder.records.values()):
                log.info("disk budget: removed %s", path)

    def begin(self, *, retry_failed: bool = False) -> None:
        """Take up what earlier sessions left: searcher and policy are then where a search never killed would be."""
        retried = self.recorder.failed() if retry_failed else []
        self.searcher = self._searcher(retried)
        with ExitStack() as unless_begun:
            unless_begun.callback(self.searcher.close)
            for trial in (
                retried
            ):  # after the Optuna study: one that is running only there is settled as failed again
                self.recorder.reopened(trial)
            notes = [*self.searcher.notes]
            if retried:
                notes.append(
                    f"failed before, to go on from their checkpoints: {', '.join(retried)}"
                )
            elif retry_failed:
                notes.append("no trial has failed: none is tried again")
            for note in notes:
                self.display.note(note)
            self._rebuild(self.searcher)
            ended = self.recorder.states()
            if sum(ended.get(state, 0) for state in ENDED) >= self.spec.num_trials:
                self.display.note(
                    f"nothing left to do: all {self.spec.num_trials} trials have ended"
                )
            unless_begun.pop_all()

    def _searcher(self, retried: Sequence[str]) -> Any:
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
            seed=self.spec.seed,
            warm_start=self.spec.warm_start,
            warm_start_from=self.spec.warm_start_from,
            rows={int(trial): rows for trial, rows in self.recorder.rows.items()},
            identity={"cohort": self.cohort, "objective": self.spec.objective},
            failure=FATAL,
            retry=[int(trial) for trial in retried],
        )

    def _rebuild(self, searcher: Any) -> None:
        """Replay the rows of earlier sessions; settle trials that had ended before their driver could say so."""
        requested = answered_requests(read_rows(self.files.decisions))
        for row in read_rows(self.files.epochs):
            words = requested.get((row["trial"], row["epoch"]))
            self.recorder.decision(
                self.policy.decide(row["trial"], self.config_of(row["trial"]), row, words)
            )
        decided, failed = self.policy.stopped(), searcher.failed()
        for trial, record in list(self.recorder.records.items()):
            rows = self.recorder.rows.get(trial, [])
            if (
                record["state"] not in ENDED and int(trial) in failed
            ):  # Tune tells the searcher first
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
        return build_config({**self.spec.config, **overrides}).model_dump(mode="json")


def stop_reason(decision: Decision) -> str:
    """Return why the trial was stopped, in a line; nothing for one that reached its end."""
    return f"{decision.reason}: {decision.summary}" if decision.stops else ""


def watching_only(policy: PolicySpec) -> PolicySpec:
    """Return the policy that diagnoses and warns but stops nothing: variants are compared on whole runs."""
    return policy.model_copy(
        update={
            "halving": False,
            "actions": {
                verdict: "warn" if action == "stop" else action
                for verdict, action in policy.actions.items()
            },
        }
    )


class StudyScheduler(PolicyScheduler):
    """The stopping policy, with every row recorded first; a trial that says its failure is final ends at once."""

    def __init__(self, session: _Session) -> None:
        super().__init__(
            session.policy,
            session.recorder.row,
            session.recorder.decision,
            base=session.spec.config,
            requested=session.requests.of,
        )
        self.session = session

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its arguments, for a restore that is never asked for

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self.session.lifecycle.begun(trial)
        if FATAL in result:
            self.session.fatal[trial_name(trial)] = str(result[FATAL])
            return str(TrialScheduler.STOP)
        action = super().on_trial_result(tune_controller, trial, result)
        ended = self.policy.stopped().get(trial_name(trial))
        if ended is not None and ended.stops:
            self.session.searcher.note(int(trial.config["trial"]), stop_reason(ended))
        return action

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Have Tune end the process of a trial that failed for good with several ranks: it has lost them.

        Tune asks this just before it keeps the process for the next trial, and keeps only those that it has seen start.
        """
        super().on_trial_complete(tune_controller, trial, result)
        if self.session.ranks > 1 and trial_name(trial) in self.session.fatal:
            tune_controller._started_actors.discard(tune_controller._trial_to_actor.get(trial))

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Record a failure for good while nobody else knows it: a killed driver would find it settled, and not why."""
        # ERROR is set before this, not after, where the trial is going to be tried again.
        if trial.status != Trial.ERROR:
            self.session.lifecycle.failed(trial)


class Interrupt:
    """Ctrl-C, SIGTERM from a cluster, or a request to stop: taken between two steps of Tune's loop, a second one at once.

    Raised wherever it happens to arrive, a KeyboardInterrupt may land in a destructor or a callback of C code, where it
    is printed and forgotten. Use as a context; outside the main thread, where no signal arrives, it does nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGINT, signal.SIGTERM, STOP_SIGNAL)
            self._before = {number: signal.signal(number, self._ask) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> None:
        """Raise KeyboardInterrupt if one was asked for."""
        if self.asked:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: object) -> None:
        self.take()
        self.asked = True


class Lifecycle(tune.Callback):  # type: ignore[misc]  # Ray is not typed
    """Tune's events -> the trial's record and the display."""

    def __init__(self, session: _Session) -> None:
        self.session = session
        self._starting: dict[str, _Starting] = {}
        self._nodes: dict[Any, str] = {}
        """Where processes run that have said so, by Ray's id of each."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as above

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.session.interrupt.take()

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
        self.session.keep_to_budget()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        name = trial_name(trial)
        rows = self.session.recorder.rows.get(name)
        if rows and rows[-1]["epoch"] == result["epoch"]:
            self.session.display.reported(
                name, rows[-1], objective_value(rows, self.session.spec.objective)
            )

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
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
        reason = text.splitlines()[-1].strip().removeprefix("trainables.ranks.RankError: ")
        if reason.startswith("The actor is dead"):
            reason = reason.partition(". ")[0]  # the rest is a page of what may be the cause
        if text.startswith("The actor died") and (
            node := re.search(r"^\s*ip: (\S+)$", text, re.MULTILINE)
        ):
            who = "rank 0" if self.session.ranks > 1 else "its process"
            reason = f"{who} on node {node[1]} died: {reason}"
        return reason, text

    def _end(self, name: str, state: str, reason: str, *, error: str | None = None) -> None:
        self.session.recorder.ended(name, state, reason, error=error)
        self.session.requests.answered(name)
        self.session.display.ended(name, state, reason)
        self.session.keep_to_budget()


@dataclass(frozen=True)
class _Starting:
    """A trial whose record is still to be written."""

    trial: Any
    actor: Any
    where: Any
    """What will be the address of its process, and the process's id."""
    deadline: float


def _node_of(where: Any) -> str | None:
    """Where the trial runs; None when its process has not said so."""
    try:
        return str(ray.get(where, timeout=0)[0])
    except (ray.exceptions.GetTimeoutError, ray.exceptions.RayActorError):
        return None


def trial_name(trial: Any) -> str:
    """Return the study's own name of a trial of Tune's: 00003."""
    return str(trial.config["trial"])


def log_callbacks(spec: StudySpec, files: StudyFiles) -> list[tune.Callback]:
    """Return Ray's callbacks for `spec.log`. Raises SpecError when what they need is not installed or does not answer."""
    callbacks: list[tune.Callback] = []
    if "tensorboard" in spec.log:
        from ray.tune.logger import TBXLoggerCallback

        callbacks.append(TBXLoggerCallback())
    if "mlflow" in spec.log:
        if importlib.util.find_spec("mlflow") is None:
            raise SpecError(
                ["log=mlflow: mlflow is not installed; `pip install mlflow`, or leave it out"]
            )
        from mlflow.exceptions import MlflowException
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table it makes
        asked = os.environ.get("MLFLOW_TRACKING_URI")
        uri = (
            asked or f"sqlite:///{files.root.resolve() / 'mlflow.db'}"
        )  # MLflow takes no folder any more
        callback = MLflowLoggerCallback(tracking_uri=uri, experiment_name=files.root.name)
        try:
            callback.setup()  # as Tune will, but while the user can still mend it
        except MlflowException as error:
            where = (
                "MLFLOW_TRACKING_URI" if asked else "mlflow.db in the study"
            )  # a URI may hold a password
            raise SpecError([f"log=mlflow: {where}: {str(error).splitlines()[0]}"]) from None
        callbacks.append(callback)
    return callbacks


class PlannedSearcher(Searcher):  # type: ignore[misc]  # Ray is not typed
    """Hands out the planned trials of an ablation or a confirmation, in order, those that have ended left out."""

    def __init__(self, spec: StudySpec) -> None:
        super().__init__(metric=None, mode="max")
        self.planned = {f"{number:05d}": trial for number, trial in enumerate(spec.planned)}

    def settle(
        self, number: int, state: str, value: float | None, rows: Any, *, reason: str | None
    ) -> None:
        """Leave out a trial that has ended."""
        self.planned.pop(f"{number:05d}", None)

    notes: tuple[str, ...] = ()
    """Nothing that the user would not know."""

    def failed(self) -> dict[int, str]:
        """None that the records do not know."""
        return {}

    def note(self, number: int, reason: str) -> None:
        """Nothing to keep: the trial's record has the reason."""

    def close(self) -> None:
        """Nothing to release."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return the next planned trial, or FINISHED."""
        if not self.planned:
            return str(Searcher.FINISHED)
        name = next(iter(self.planned))
        return {"trial": name, "overrides": dict(self.planned.pop(name).overrides)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing to learn from."""


def _sweep_ray(spec: StudySpec, files: StudyFiles) -> None:
    """Remove what Tune wrote in earlier sessions, unless a logger keeps its files there."""
    if "tensorboard" not in spec.log:
        shutil.rmtree(files.ray, ignore_errors=True)
