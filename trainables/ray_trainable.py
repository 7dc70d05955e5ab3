"""One Tune trial: runs `finetune()` in its own folder and reports each epoch's row.

The trial's folder is the truth, not Ray's checkpoint store: a trial finds its checkpoint by its own name, so it continues
the same way after a failed worker, a killed driver or a lost cluster.

torch and MONAI are loaded in the trial's process: a driver, which trains nothing, starts seconds earlier without them.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ray import tune

from trainables import mps
from trainables.checkpoints import HURRY, LogFile, TrialFiles
from trainables.config import RULES, ConfigError, FineTuneConfig, build_config
from trainables.data.storage import TrialStore, patient
from trainables.data.visible import visible
from trainables.kernel_cache import keep_kernels
from trainables.machine.this_machine import settle_user
from trainables.objective import DEFAULT_OBJECTIVE
from trainables.training_thread import in_training_thread

if TYPE_CHECKING:
    from trainables.data.volumes import VolumesRefused

log = logging.getLogger("medtune.trial")
disk_log = logging.getLogger("medtune.disk")

MEMORY_SLACK = 0.8
"""Of a trial's share of GPU memory that must be free at its start: CUDA contexts take some of the rest."""

ENDING_S = 10**6
"""Seconds that a stopped trial may take to end, its last file written, before the next one starts in its process. Ray's
own 2 are less than a slow disk takes for a network's weights, and a search whose trial does not end by then waits for ever."""

FATAL = "fatal"
"""Key of a report that ends a trial for good: trying again would fail the same way."""


@dataclass(frozen=True)
class TrialSetting:
    """What all trials of a study share; plain values, so that it travels to any node."""

    study: str
    """Folder of the study."""
    table: str
    """The manifest."""
    cohort: str
    """Folder of the cohort that `base` prepares; a trial that prepares volumes differently has another one next to it."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """Overrides of every trial; the trial's own go first."""
    checkpoint_epochs: int = 1
    """Epochs between checkpoints."""
    ranks: int = 1
    """Ranks of a trial, each in a bundle of the trial's placement group."""
    gpus_per_rank: float = 0.0
    """GPUs of a rank: 1, a fraction of one shared with other trials, or 0."""
    threads: int = 1
    """CPU threads of a rank: without a limit every trial takes all cores and they slow each other down."""
    deadline_s: float = 1800.0
    """Seconds without a finished step after which a gang of ranks counts as hanging."""
    mps: Literal["auto", "on", "off"] = "off"
    """Whether trials that share a GPU do so under CUDA MPS."""
    storage: str | None = None
    """URL of the study in object storage; `study` is then a folder of each node's own."""
    objective: str = DEFAULT_OBJECTIVE
    """Whose epoch's weights a trial keeps in best.pt."""
    rules: int = RULES
    """Those the study began with: see `trainables.config.RULES`."""


def shown_name(trial: str, study: str) -> str:
    """Return the name of a trial's tasks and processes in Ray's dashboard, `top` and `nvidia-smi`: `00003 of first`."""
    return f"{trial} of {visible(study.rstrip('/').rpartition('/')[2])}"


def run_trial(trial: Mapping[str, Any], setting: TrialSetting) -> None:
    """Run the trial `{"trial": id, "overrides": {...}}` to its end; Tune calls this in the trial's process.

    Epochs in the checkpoint are reported again: the driver may have been killed before it read them, and it drops
    those it knows. An error goes to the trial's log with its traceback, then to Tune, which starts the trial again;
    running out of memory is reported as the trial's end instead, since it would only happen again.
    """
    # Read in this process, at its next trial
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", str(ENDING_S))
    settle_user()
    files = TrialFiles(Path(setting.study) / "trials" / trial["trial"])
    files.folder.mkdir(parents=True, exist_ok=True)
    handler = LogFile(files.log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    disk_log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    alive = SignOfLife(files.alive)
    try:
        with patient(waits=alive):
            in_training_thread(_run, trial, setting, files, alive)
    except Exception as error:
        from trainables.data.volumes import VolumesRefused
        from trainables.ranks import RankError, is_out_of_memory

        log.exception("trial %s failed", trial["trial"])
        if isinstance(error, ConfigError):
            tune.report({FATAL: "; ".join(error.problems), "epoch": 0})
            return
        if isinstance(error, VolumesRefused):
            tune.report({FATAL: refused_text(error), "epoch": 0})
            return
        if not is_out_of_memory(error):
            _raise_for_lost_gpu(error, files)
            raise
        advice = "lower batch_size (and raise gradient_accumulation_steps), or give the trial more of a GPU"
        first = str(error) if isinstance(error, RankError) else str(error).splitlines()[0]
        tune.report({FATAL: f"out of memory: {first}; {advice}", "epoch": 0})
    finally:
        if setting.ranks > 1:
            from trainables.ranks import leave_if_stuck

            leave_if_stuck()
        log.removeHandler(handler)
        disk_log.removeHandler(handler)
        handler.close()


def refused_text(error: "VolumesRefused") -> str:
    """Return in a line why a trial's preprocessing cannot be had; the trial's log has all volumes."""
    count = len(error.problems)
    return f"its preprocessing leaves {count} volume{'s' if count > 1 else ''} unusable, the first: {error.problems[0]}"


class GpuFaultError(RuntimeError):
    """The GPU took this process's context away: the process can compute no more."""


def _raise_for_lost_gpu(error: Exception, files: TrialFiles) -> None:
    """Raise GpuFaultError where `error` cost this process its GPU under MPS, and let the next attempt run without MPS.

    CUDA does not report which of the processes that share a server caused the fault; all of them see it. Each continues
    from its checkpoint in a new process without MPS, so that the one that faults again faults alone.
    """
    standing = mps.joined()
    if standing is None or standing.kind == "turns" or not gpu_is_lost():
        return
    files.apart.touch()
    lost = GpuFaultError(
        "the GPU failed under CUDA MPS, where a fault of one process ends all that share the GPU: "
        f"{str(error).splitlines()[0]}"
    )
    log.error("%s; the next attempt runs without MPS", lost)
    raise lost from error


def gpu_is_lost() -> bool:
    """Whether CUDA refuses this process any work from now on."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def device_of(setting: TrialSetting) -> str:
    """Where a trial of one rank trains."""
    return "cuda" if setting.gpus_per_rank else "cpu"


def _share_gpu(setting: TrialSetting, files: TrialFiles) -> None:
    """Settle how this process shares its GPU and where it keeps kernels, before CUDA is initialised."""
    if setting.gpus_per_rank:
        keep_kernels(Path(setting.cohort).parent)
    if not 0 < setting.gpus_per_rank < 1:
        return
    standing = mps.keep_apart() if files.apart.exists() else mps.join(setting.mps)
    log.info("GPU shared: %s", standing.text)


class SignOfLife:
    """Touches a file, at most once a second: its time shows the driver when the run last made progress."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = 0.0
        self()

    def __call__(self) -> None:
        """Touch the file now, whatever became of it: a sign of life must not end the run."""
        if time.monotonic() - self.last >= 1.0:
            self.last = time.monotonic()
            with contextlib.suppress(OSError):
                if self.path.exists():
                    os.utime(self.path)
                else:
                    self.path.touch()

    def step(self, epoch: int, step: int) -> None:
        """A step has been issued."""
        self()

    def waits_for_room(self) -> None:
        """Show that the run waits for room on its disk, without taking any: by the file's time of access, 0."""
        with contextlib.suppress(OSError):
            os.utime(self.path, (0, time.time()))


def wait_for_device_memory(
    share: float,
    *,
    timeout_s: float = 120.0,
    memory: Callable[[], tuple[int, int]] | None = None,
) -> None:
    """Wait until the trial's share of the GPU's memory is free: a trial stopped just now may still hold it.

    `share` is the fraction of the GPU the trial was given; `memory` returns bytes free and in all (None: CUDA's answer for
    this process's GPU, where memory that earlier trials have left in the process itself is free). Raises MemoryError after
    `timeout_s` with both figures: another process is using the GPU.
    """
    memory = memory or _device_memory
    deadline = time.monotonic() + timeout_s
    while True:
        free, total = memory()
        wanted = MEMORY_SLACK * share * total
        if free >= wanted:
            return
        if time.monotonic() > deadline:
            gib = 2**30
            raise MemoryError(
                f"{free / gib:.1f} of {total / gib:.1f} GiB of GPU memory are free, this trial's share is "
                f"{share:g} of it; waited {timeout_s:.0f} s: end the other program, or lower gpus_per_trial"
            )
        log.info("waiting for GPU memory: %.1f of %.1f GiB free", free / 2**30, total / 2**30)
        time.sleep(min(2.0, timeout_s / 10))


def _device_memory() -> tuple[int, int]:
    import torch

    free, total = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved(), total


def _fetched(setting: TrialSetting, trial: str, files: TrialFiles) -> TrialStore | None:
    """Return where the trial is kept in object storage, after fetching the files that an earlier attempt kept."""
    if setting.storage is None:
        return None
    store = TrialStore(setting.storage, trial, files)
    store.fetch()
    return store


def _hurries(setting: TrialSetting, store: TrialStore | None) -> Callable[[], bool]:
    """Return a function that returns whether the trial has to save its work, on whichever node it is."""
    here = Path(setting.study) / HURRY  # of the driver's node, or of a folder that all nodes see
    return lambda: here.exists() or (store is not None and store.hurries())


def _cohort_of(config: FineTuneConfig, setting: TrialSetting, alive: SignOfLife) -> str:
    """The folder of the trial's own cohort. Before the GPU is waited for: preparing takes minutes.

    Ranks on other nodes find it by its name.
    """
    from trainables.saved_run import trial_cohort

    base = build_config(setting.base)
    folder = trial_cohort(
        config, setting.table, setting.cohort, base, progress=lambda done, total: alive()
    )
    return str(folder)


def _run(
    trial: Mapping[str, Any], setting: TrialSetting, files: TrialFiles, alive: SignOfLife
) -> None:
    from trainables.rank_actors import rank_processes

    began = time.monotonic()
    _share_gpu(setting, files)
    # Ranks load what follows meanwhile
    processes = rank_processes(setting.ranks) if setting.ranks > 1 else None

    import torch

    from trainables.finetune import finetune
    from trainables.ranks import RankWork, gang
    from trainables.saved_run import Epochs, open_inputs, saved_run

    # 0 in a process that has trained before
    log.info("torch and MONAI loaded in %.1f s", time.monotonic() - began)
    config = build_config({**setting.base, **trial["overrides"]})
    torch.set_num_threads(setting.threads)
    epochs: Epochs
    cohort_folder = _cohort_of(config, setting, alive)
    if setting.gpus_per_rank:
        wait_for_device_memory(setting.gpus_per_rank)
    if setting.ranks > 1:
        work = RankWork(
            config,
            setting.table,
            cohort_folder,
            gpu=setting.gpus_per_rank > 0,
            threads=setting.threads,
            rules=setting.rules,
            name=shown_name(trial["trial"], setting.storage or setting.study),
        )
        epochs = lambda resume: gang(  # noqa: E731
            work,
            setting.ranks,
            processes=processes,
            resume=resume,
            deadline_s=setting.deadline_s,
            heartbeat=alive.step,
        )
    else:
        cohort, split = open_inputs(config, setting.table, cohort_folder)
        log.info("cohort open %.1f s after the start", time.monotonic() - began)
        device = torch.device(device_of(setting))
        epochs = lambda resume: finetune(  # noqa: E731
            config,
            cohort,
            split,
            device=device,
            resume=resume,
            heartbeat=alive.step,
            rules=setting.rules,
        )
    store = _fetched(setting, trial["trial"], files)
    for row in saved_run(
        config,
        files,
        epochs,
        checkpoint_epochs=setting.checkpoint_epochs,
        waits=alive.waits_for_room,
        keep=store.keep if store else None,
        objective=setting.objective,
        window_end=setting.rules == 1,
        hurry=_hurries(setting, store),
    ):
        alive()
        log.info(
            "epoch %d of %d: val_auc %.4f, %.1f s",
            row["epoch"],
            config.epochs,
            row["val_auc"],
            row["epoch_s"],
        )
        tune.report(row)
