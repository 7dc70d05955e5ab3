"""A study from its spec to its directory: Ray Tune is the executor, the directory is the truth.

Every row a trial reports is written to epochs.jsonl before anything is decided on it, and everything decided is a pure
function of those rows in their order. A killed study is therefore rebuilt by reading the rows again: the policy
remakes its rungs, trials that had ended are settled, the others resume from their own checkpoints. Nothing is read back
from Ray's experiment state, which is saved seconds too late and forgets the scheduler's rungs.
"""

import gc
import platform
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from shlex import quote
from typing import Any

import ray
from filelock import Timeout

from trainables import installed_version
from trainables.checkpoints import TrialFiles, sweep_temporaries
from trainables.config import FineTuneConfig
from trainables.data.storage import absolute, url_of
from trainables.machine.safe_path import safe_search
from trainables.own_folder import remove_own
from trainables.ray_trainable import TrialSetting, run_trial
from tune_app.driver.cohorts import (
    Prepared,
    prepare_study,
    refuse_preprocessing,
)
from tune_app.driver.disk import plan_budget
from tune_app.driver.display import Display, print_lines
from tune_app.driver.forecast import forecast_on_cpus, forecast_on_gpus
from tune_app.driver.local_ray import ray_to_file, ray_to_work_with, would_start_ray
from tune_app.driver.loggers import Loggers, study_loggers
from tune_app.driver.notify import Notifier
from tune_app.driver.optuna_database import own_study_name, shared_study_name
from tune_app.driver.packing import Packing, packing_for
from tune_app.driver.place import WITHOUT_DATABASE, StudyMovedError
from tune_app.driver.recorder import Recorder
from tune_app.driver.resources import Plan, await_resources, plan_lines
from tune_app.driver.session import RAY_FILES, StudySession, log
from tune_app.driver.sharing import GpuSharing
from tune_app.driver.stopping import INTERRUPTED, stopping_on_request
from tune_app.driver.warm_up import WarmUp
from tune_app.study.duration import expected_epochs
from tune_app.study.errors import SpecError
from tune_app.study.files import (
    OPTUNA_STUDY,
    StudyFiles,
    default_cache,
    job_name,
    mend_last_line,
    refuse_other_bytes,
    resumed_spec,
)
from tune_app.study.heaviest import heaviest
from tune_app.study.mirror import drop_unrecorded, mirrored
from tune_app.study.rows import ENDED, driver_lock
from tune_app.study.spec import StudySpec, paths_in, refuse_what_cannot_run

DONE, FAILED_TRIALS = 0, 3
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


class LoggedNotes:
    """Notes that are printed and kept in study.log: a study is read later, and by others than those at its terminal."""

    def __init__(self, console: Any) -> None:
        self._console = console

    @property
    def is_terminal(self) -> bool:
        return bool(self._console.is_terminal)

    def print(self, text: object, **options: Any) -> None:
        log.info("%s", text)
        self._console.print(text, **options)


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
    on_epoch: Callable[[str, Mapping[str, Any]], None] | None = None,
    notify: str | None = None,
) -> Outcome:
    """Run `spec` in the directory `root` until every trial has ended; continue where an earlier session left off.

    `root` may be object storage (s3://...): the work is then mirrored there. `go_on`: resume where there is a study.
    `retry_failed`: trials that have failed for good resume, too, from their checkpoints. `on_epoch` is called with a trial's
    name and row after each of its epochs. `notify`: command or http(s) address for messages (`driver.notify`).

    `console` shows progress, `notes` prints all other messages. `address`: a running Ray cluster; None starts a local
    Ray and stops it at the end. Ctrl-C leaves a study that `resume` completes.

    Raises SpecError when the directory holds another study or the resources can never hold a trial, StudyBusyError
    when another driver runs it, ManifestError and VolumeError for the data.
    """
    url = url_of(root)
    refuse_other_bytes([url or absolute(root), *(path for _, path in paths_in(spec.model_dump()))])
    notifier = Notifier(notify, url or str(root))
    try:
        with (
            _reported(notifier),
            mirrored(url) if url is not None else nullcontext(StudyFiles(root)) as files,
            _only_driver(files, notes),
            _warming_up(spec, address),
        ):
            if go_on and files.spec.exists():
                spec, resume = resumed_spec(files, spec), True
            outcome = _run_locked(
                spec,
                files,
                url,
                console=console,
                notes=LoggedNotes(notes),
                address=address,
                resume=resume,
                retry_failed=retry_failed,
                on_epoch=on_epoch,
                notifier=notifier,
            )
            _report_end(notifier, outcome)
            return outcome
    finally:
        gc.collect()  # Tune's trials, callbacks and actors hold each other, and Python may leave them for hours


def named_trainable(setting: TrialSetting, place: str) -> Callable[[dict[str, Any]], None]:
    """Return the function that runs a trial, named after the study: Ray's dashboard shows that name for its actors."""
    trainable = partial(run_trial, setting=setting)
    trainable.__dict__["__name__"] = job_name(place)
    return trainable


@contextmanager
def _reported(notifier: Notifier) -> Iterator[None]:
    """Send a message where the block fails, and wait a little for all messages."""
    try:
        yield
    except Exception as error:
        notifier.send("error", f"the study ended with an error: {type(error).__name__}")
        raise
    finally:
        notifier.close()


def _report_end(notifier: Notifier, outcome: Outcome) -> None:
    counts = ", ".join(f"{count} {state}" for state, count in sorted(outcome.states.items()))
    ended = outcome.exit_code in (DONE, FAILED_TRIALS)
    text = f"the study {'has ended' if ended else 'was interrupted'}: trials {counts or 'none'}"
    notifier.send(
        "end" if ended else "interrupted", text, states=outcome.states, exit_code=outcome.exit_code
    )


def _warming_up(spec: StudySpec, address: str | None) -> AbstractContextManager[object]:
    """Let a process next to this one compile the kernels that trials on this machine's GPU need."""
    if spec.gpus_per_trial == 0 or not would_start_ray(address):
        return nullcontext()
    return WarmUp(heaviest(spec), Path(spec.cache or default_cache()), spec.mps)


@contextmanager
def _only_driver(files: StudyFiles, notes: Any) -> Iterator[None]:
    """Hold the study's folder, with its log. Raises StudyBusyError when another driver does."""
    files.root.mkdir(parents=True, exist_ok=True)
    try:
        # A second, not none: a reader asking whether a driver is at work holds the lock for microseconds.
        files.require_own()
        held = driver_lock(files.lock, timeout=1)
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
    on_epoch: Callable[[str, Mapping[str, Any]], None] | None,
    notifier: Notifier,
) -> Outcome:
    made = [path for path in (files.spec, files.database) if not path.exists()]
    loggers = _tidy_up(spec, files, url, resume=resume)
    if not resume:  # one of an earlier version may resume: its other trials can run
        refuse_what_cannot_run(spec)
    refuse_preprocessing(spec, files.read() if resume else None)
    if would_start_ray(address):  # elsewhere the path is of the nodes
        _check_weights(spec)
    ready = prepare_study(spec, files, resume=resume, notes=notes)
    spec, base, cohort = ready.spec, ready.base, ready.cohort
    _take_up(files, url, notes)
    with (
        GpuSharing(spec.mps, local=would_start_ray(address)) as sharing,
        ray_to_work_with(address) as own_ray,
    ):
        spec, packing = _packed(spec, cohort, sharing, notes)
        plan, resources = await_resources(spec, notes)
        budget = plan_budget(spec, plan.concurrent, ready.further_bytes)
        if not resume:
            refuse_what_cannot_run(spec, ranks=plan.ranks, gpu=plan.gpus_per_rank > 0)
        _record(spec, files, url, ready, resources, resume=resume)
        recorder = Recorder(spec, files)
        with Display(
            console, num_trials=spec.num_trials, epochs=base.epochs, on_epoch=on_epoch
        ) as display:
            session = StudySession(
                spec, ready.identity, recorder, display, budget, notifier, loggers, storage=url
            )
            setting = TrialSetting(
                study=absolute(files.root),
                table=absolute(spec.data),
                cohort=str(cohort),
                base=spec.shared,
                checkpoint_epochs=spec.checkpoint_epochs,
                ranks=plan.ranks,
                gpus_per_rank=plan.gpus_per_rank,
                threads=spec.cpus_per_rank,
                deadline_s=spec.rank_deadline_s,
                mps=spec.mps,
                storage=url,
                objective=session.objective,
                rules=session.rules,
            )
            standing = sharing.standing(plan.gpus_per_rank)
            shared = f", {standing.text}" if standing is not None else ""
            notes.print("\n".join(plan_lines(plan, shared)), soft_wrap=not notes.is_terminal)
            if not resume:
                _print_forecast(
                    spec, session, plan, packing, local=own_ray is not None, notes=notes
                )
            with _nothing_left_of(() if resume else made):
                session.begin(retry_failed=retry_failed)
            trainable = named_trainable(setting, url or str(files.root))
            ended_early = session.run(trainable, plan, local=own_ray is not None)
        states = recorder.states()
        if own_ray is not None:
            own_ray.keep = bool(states.get("failed"))
    if ended_early == INTERRUPTED and not session.interrupt.asked:
        _print_time_is_over(states, url or files.root, notes)
        ended_early = 0
    if ended_early:
        _print_without_epochs(files, notes)
    return Outcome(ended_early or (FAILED_TRIALS if states.get("failed") else DONE), states)


def _print_time_is_over(states: Mapping[str, int], place: str | Path, notes: Any) -> None:
    ended = sum(states.get(state, 0) for state in ENDED)
    notes.print(
        f"the time is over: {ended} trials have ended; `medtune resume {quote(str(place))}` gives the search as much again",
        soft_wrap=True,
    )


def _print_without_epochs(files: StudyFiles, notes: Any) -> None:
    """Print a note where a session that was interrupted leaves a study without a single epoch."""
    if not (files.epochs.exists() and files.epochs.stat().st_size):
        notes.print(
            "interrupted before the first epoch had ended: no trial has a score yet, and all that was prepared is kept",
            soft_wrap=not notes.is_terminal,
        )


def _tidy_up(spec: StudySpec, files: StudyFiles, url: str | None, *, resume: bool) -> Loggers:
    """Remove remains of a killed driver from the study's folder; return the study's loggers.

    Raises SpecError where the folder is not the study's, or a logger lacks something.
    """
    there = files.spec.exists()
    if not there:
        _refuse_other_folders(files.root, spec)
    elif not resume:
        place = url or files.root
        raise SpecError(
            f"{place}: holds a study already; `medtune resume {quote(str(place))}` continues it"
        )
    own = url is None and spec.kind == "search" and spec.storage is None
    if own and not files.database.exists() and any(files.trials.glob("*/trial.json")):
        raise StudyMovedError(f"{files.database}: is not there: {WITHOUT_DATABASE}")
    # A logger that lacks something must fail before the study has started
    loggers = Loggers(study_loggers(spec, files))
    if there:  # else the folder is not known to be ours
        sweep_temporaries(files.root)
    for record in files.trials.glob("*/"):
        sweep_temporaries(record, TrialFiles(record).record)
    _sweep_ray(files)
    return loggers


def _take_up(files: StudyFiles, url: str | None, notes: Any) -> None:
    """Cut lines that a killed driver left unfinished, and rows whose trials have no record in the storage.

    Other versions than those that the study began with are named.
    """
    for path in (files.epochs, files.decisions):
        if cut := mend_last_line(path):
            log.warning("%s: dropped an unfinished last line of %d characters", path, len(cut))
    if url is not None and (ahead := drop_unrecorded(files)):
        log.warning(
            "trials %s report their epochs again: their records had not been mirrored",
            ", ".join(ahead),
        )
    began_with = files.read().get("versions") if files.spec.exists() else None
    if (other := other_versions(began_with or {})) is not None:
        notes.print(other, soft_wrap=True, markup=False)


def _record(
    spec: StudySpec,
    files: StudyFiles,
    url: str | None,
    ready: Prepared,
    resources: Mapping[str, float],
    *,
    resume: bool,
) -> None:
    """Write study.json: of a new study, or of one whose data have moved."""
    if resume:
        if ready.recorded:
            files.write({**files.read(), **ready.recorded})
        return
    named = shared_study_name if spec.storage else own_study_name
    files.write(
        {
            "spec": spec.model_dump(mode="json"),
            "cohort": ready.cohort.name,
            "created": time.time(),
            "versions": own_versions(),
            "hardware": {"host": socket.gethostname(), "resources": dict(resources)},
            **ready.recorded,
            OPTUNA_STUDY: named(url or absolute(files.root)),
        }
    )


def own_versions() -> dict[str, str | None]:
    """Return the versions of the packages that decide a result, and of Python, as study.json keeps them."""
    return {name: installed_version(name) for name in VERSIONS} | {
        "python": platform.python_version()
    }


def other_versions(began_with: Mapping[str, str | None]) -> str | None:
    """Return a note where the study began with other versions than it resumes with; None where it did not."""
    here = own_versions()
    differ = [
        f"{name} {began_with[name]}, here {version}"
        for name, version in here.items()
        if name in began_with and began_with[name] != version
    ]
    if not differ:
        return None
    return (
        f"versions differ from those the study began with: {'; '.join(differ)}. Trials from now on may train differently "
        "from those before"
    )


@contextmanager
def _nothing_left_of(made: Iterable[Path]) -> Iterator[None]:
    """Remove `made` where the block fails: the corrected command would fail because the folder holds a study."""
    try:
        yield
    except Exception:
        for path in made:
            path.unlink(missing_ok=True)
        raise


def _refuse_other_folders(root: Path, spec: StudySpec) -> None:
    """Raise SpecError where a new study would lie among files of something else."""
    others = {"model.json": "a model", TrialFiles(root).checkpoint.name: "a run of `medtune train`"}
    held = next((what for name, what in others.items() if (root / name).exists()), None)
    if Path(spec.data).parent.resolve() == root.resolve():
        held = "the data"
    if held is not None:
        raise SpecError(
            f"{root}: holds {held}; a study needs a separate folder: name another with --out"
        )


def _check_weights(spec: StudySpec) -> None:
    """Raise SpecError where a checkpoint that trials start from is not there, or does not fill their network.

    Else each trial of the search would fail with the same error. Runs in a separate process: a driver does without torch.
    """
    planned = ({}, *(trial.overrides for trial in spec.planned))
    configs = [spec.config_of(overrides) for overrides in planned]
    if all(config.pretrained_path is None for config in configs):
        return
    with safe_search(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        problems = process.submit(_pretrained_problems, configs).result()
    if problems:
        raise SpecError(problems)


def _pretrained_problems(configs: Sequence[FineTuneConfig]) -> list[str]:
    from trainables.network.weights import pretrained_problems

    return pretrained_problems(configs)


def _packed(
    spec: StudySpec, cohort: Path, sharing: GpuSharing, notes: Any
) -> tuple[StudySpec, Packing | None]:
    """Return `spec` with the number of trials per GPU settled, where the user left that open and there are GPUs."""
    resources = dict(ray.cluster_resources())
    if not resources.get("GPU"):
        if spec.gpus_per_trial == "auto":
            raise SpecError(
                "gpus_per_trial=auto: Ray has no GPU to measure; leave it out to use CPUs"
            )
        return spec, None
    if spec.gpus_per_trial not in (None, "auto") or (spec.ranks or 1) > 1:
        return spec, None
    sharing.standing(0.5)  # probes join what trials will
    cache = Path(spec.cache or default_cache())
    try:
        packing = packing_for(spec, absolute(spec.data), cohort, resources, cache)
    except ray.exceptions.RayError as error:
        if spec.gpus_per_trial == "auto":
            raise
        told = str(error).strip().splitlines()[-1]
        log.warning("one trial per GPU: how many fit could not be measured: %s", told)
        return spec.model_copy(update={"gpus_per_trial": 1.0}), None
    notes.print(packing.text, soft_wrap=not notes.is_terminal)
    return spec.model_copy(update={"gpus_per_trial": 1 / packing.number}), packing


def _print_forecast(
    spec: StudySpec,
    session: StudySession,
    plan: Plan,
    packing: Packing | None,
    *,
    local: bool,
    notes: Any,
) -> None:
    """Print how long the study will take, where that can be known before its first epoch."""
    concurrent, epochs = plan.concurrent, expected_epochs(session.policy, spec.num_trials)
    told = None
    if packing is not None and packing.totals:
        each = packing.totals[packing.number] / packing.number
        told = forecast_on_gpus(spec, each, concurrent=concurrent, epochs=epochs)
    elif local and not plan.gpus_per_rank and spec.hours is None:
        told = forecast_on_cpus(spec, concurrent=concurrent, epochs=epochs)
    if told is not None:
        print_lines(notes, told.lines())


# A session -------------------------------------------------------------------------------------------------------------


def _sweep_ray(files: StudyFiles) -> None:
    """Remove what Tune wrote in earlier sessions; TensorBoard's files of earlier versions, which are there too, stay."""
    if files.ray.is_dir():
        for session in files.ray.iterdir():
            if not any(session.rglob("events.out.tfevents.*")):
                remove_own(session, RAY_FILES)
