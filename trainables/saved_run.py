"""A run that keeps its place in a folder: resumes from the checkpoint there, saves as it runs, gives one row per epoch.

An epoch of a small cohort takes a GPU a second, and so does saving a ResNet-50: in a search at 64 voxels, four trials at a
time on an H200, a fifth of the time went into files (best.pt 0.4 s an improvement, and over a second for the checkpoint of
each trial's first epoch). So checkpoints keep to a share of the time from the first one on, and a best.pt is written while
training continues, from a copy in memory; before the next one, a checkpoint or the run's end, it is there. Before that,
with fewer checkpoints and fsync alone in the background, 2.0 s lay between two trials of a slot where 4.7 s had; on two CPU
cores an improvement now costs 0.04 to 0.08 s where it cost 0.24 to 0.41 s.
"""

import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Self

from trainables.checkpoints import (
    TrialFiles,
    load_state,
    save_state,
    sweep_temporaries,
    when_there_is_room,
    write_json,
)
from trainables.config import FineTuneConfig
from trainables.data.folds import Split, split_of
from trainables.data.manifest import read_manifest
from trainables.data.scans import Recipe
from trainables.data.table_file import ManifestError
from trainables.data.threads import Progress
from trainables.data.volumes import (
    Cohort,
    CohortError,
    cohort_like,
    open_cohort,
    prepare_cohort,
    same_volumes,
)
from trainables.finetune import EpochResult, check_checkpoint
from trainables.objective import DEFAULT_OBJECTIVE, OBJECTIVES, BestEpoch

SAVING_PAUSE = 20
"""Times as long as writing the last checkpoint took until the next: with Adam and the average, a ResNet-50's has 740 MB."""
CHECKPOINT_TO_BEST = 4
"""Sizes of best.pt in a checkpoint: network, average and Adam's two moments."""
HELD = "held"
"""Key of a checkpoint: weights of the epoch before that may become the best, by epoch."""

log = logging.getLogger("medtune.disk")

Epochs = Callable[[Mapping[str, Any] | None], Iterator[EpochResult]]
"""Starts the run from the beginning (None) or from a state, and gives its epochs: `finetune`, or a gang of ranks."""


def open_inputs(
    config: FineTuneConfig, table: str | Path, cohort: str | Path
) -> tuple[Cohort, Split]:
    """Return the prepared cohort and which of its rows train and validate.

    On a node that has not got the cohort it is prepared first, once for all trials there. Raises CohortError that names
    the node where table or volumes are missing, or are others than those the study began with.
    """
    folder = Path(cohort)
    try:
        manifest = read_manifest(
            Path(table), num_classes=config.num_classes, classes=config.classes
        )
        if not folder.exists():
            made = prepare_cohort(manifest, Recipe.from_config(config), folder.parent)
            if made.name != folder.name:
                raise CohortError(
                    f"{table}: not the data of the study (cohort {folder.name}, here {made.name})"
                )
    except (ManifestError, CohortError) as error:
        here = f"node {socket.gethostname()}"
        raise CohortError([f"{here}: {problem}" for problem in error.problems]) from error
    split = split_of(manifest, config)
    return open_cohort(folder), split


def trial_cohort(
    config: FineTuneConfig,
    table: str | Path,
    cohort: str | Path,
    base: FineTuneConfig,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of the cohort that `config` asks for, prepared now if it is the first run here that needs it.

    `cohort` is the folder of the study's own cohort, which `base` prepared: runs that ask for the same volumes use it.
    Raises CohortError where table or files are not the study's, VolumesRefused where `config` cannot prepare a volume.
    """
    own, first = Recipe.from_config(config), Recipe.from_config(base)
    if same_volumes(own, first):
        return Path(cohort)  # `open_inputs` prepares it on a node that lacks it
    manifest = read_manifest(Path(table), num_classes=config.num_classes, classes=config.classes)
    return cohort_like(manifest, own, Path(cohort), first, progress)


def saved_run(
    config: FineTuneConfig,
    files: TrialFiles,
    epochs: Epochs,
    *,
    checkpoint_epochs: int = 1,
    waits: Callable[[], None] | None = None,
    keep: Callable[[], None] | None = None,
    objective: str = DEFAULT_OBJECTIVE,
    window_end: bool = False,
    until: int | None = None,
    hurry: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """Yield the row of every epoch of the run kept in `files`, those of earlier processes first.

    Checkpoints are written every `checkpoint_epochs` epochs, after the last one and epoch `until`, before the row is
    yielded; where epochs are shorter than writing takes, as few more are skipped as keep it under a twentieth of the time,
    the first ones included. A run killed at any moment repeats the epochs since the last checkpoint, or all, on a CPU to the
    same numbers. best.pt is written while the next epoch runs, and complete before a checkpoint of the same epoch or a later
    one, before the next best.pt, and when the run ends or is closed: a process that is killed in between leaves the one
    before. On a full disk the run waits for room, and calls `waits` meanwhile, from another thread for best.pt. `keep` is
    called after each checkpoint, to copy `files` to where they outlive this machine; with it, the first epoch is always
    saved. Where `hurry` returns that the run is going to be killed, each epoch is saved.

    best.pt holds the weights of the epoch that stands for `objective` (`BestEpoch`, which explains `window_end`): the raw
    network's where the objective is of the raw network, else the averaged ones. A run of rules 1 keeps
    the window's end.
    """
    files.folder.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(files.folder, files.config, files.checkpoint, files.best)
    resume = load_state(files.checkpoint) if files.checkpoint.exists() else None
    if resume is not None:
        # Before config.json is replaced, and before another run's rows are reported
        check_checkpoint(resume, config)
    when_there_is_room(
        lambda: write_json(files.config, config.model_dump(mode="json")), files.config, waits=waits
    )
    window_end = window_end or (resume is not None and resume["format"] == 1)
    saved, cost_s = time.monotonic(), 0.0 if keep is not None else None
    with _WrittenBehind(files.best, waits) as file:
        weights = _Weights(file, objective, window_end=window_end)
        for row in resume["rows"] if resume else []:
            weights.known(row)
            yield row
        if resume is not None:
            held = resume.pop(HELD, {})  # no business of the run's, which may be on other nodes
            weights.resume({**resume, HELD: held})
        with closing(epochs(resume)) as results:  # type: ignore[type-var]
            for result in results:
                if weights.update(result) and cost_s is None:
                    cost_s = CHECKPOINT_TO_BEST * file.wait()
                worth_it = time.monotonic() - saved >= SAVING_PAUSE * (cost_s or 0.0)
                due = worth_it and result.epoch % checkpoint_epochs == 0
                if due or result.epoch in (config.epochs, until) or hurry():
                    file.wait()
                    held = {} if result.epoch == config.epochs else weights.held(result.epoch)
                    state = result.state() | {HELD: held}
                    cost_s = _save(files.checkpoint, state, waits)
                    if keep is not None:
                        began = time.monotonic()
                        keep()
                        cost_s += time.monotonic() - began
                    saved = time.monotonic()
                yield result.metrics


class _WrittenBehind:
    """A file that a thread writes while the run continues, one state after the other; complete when the block has ended."""

    def __init__(self, path: Path, waits: Callable[[], None] | None) -> None:
        self.path, self.waits = path, waits
        self._thread = ThreadPoolExecutor(1, "medtune-disk")
        self._writing: Future[float] | None = None

    def write(self, state: Mapping[str, Any]) -> None:
        """Begin to write `state`, which must not change any more, once the one before is written."""
        self.wait()
        self._writing = self._thread.submit(_save, self.path, state, self.waits)

    def wait(self) -> float:
        """Return the seconds that the last writing took, 0 before the first; raises what went wrong with it."""
        return self._writing.result() if self._writing is not None else 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        # No caller is left to raise it to
        if (
            kind is GeneratorExit
            and self._writing is not None
            and (error := self._writing.exception()) is not None
        ):
            log.error("%s was not written, and the run has ended: %s", self.path, error)


def _save(path: Path, state: Mapping[str, Any], waits: Callable[[], None] | None) -> float:
    """Write `state`; returns the seconds that took, without those spent waiting for room."""

    def write() -> float:
        began = time.monotonic()
        save_state(path, state, path.parent)
        return time.monotonic() - began

    return when_there_is_room(write, path, waits=waits)


def in_memory(state: Any) -> Any:
    """Return `state` with every tensor replaced by a separate copy in the CPU's memory, at any depth of mappings."""
    import torch

    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    return (
        {key: in_memory(value) for key, value in state.items()}
        if isinstance(state, Mapping)
        else state
    )


class _Weights:
    """The weights of the epoch that stands for the run's objective, kept in best.pt; those that may follow, in memory.

    A median of three is known an epoch or two after the epoch whose value it is: copies of the last two epochs' weights
    are held as long as their values may become the best.
    """

    def __init__(self, file: "_WrittenBehind", objective: str, *, window_end: bool) -> None:
        self._file = file
        self._best = BestEpoch(objective, window_end=window_end)
        self._key = {"raw": "network", "ema": "average"}[OBJECTIVES[objective].weights]
        self._held: dict[int, dict[str, Any]] = {}

    def known(self, row: Mapping[str, Any]) -> None:
        """Take a row of an epoch whose weights have been dealt with by an earlier process."""
        self._best.update(row)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take up what `held` left in a checkpoint, and the checkpoint's own weights; after its rows."""
        own = {state["epoch"]: in_memory(self._part(state))}
        self._held = self._only_pending({**state[HELD], **own})

    def update(self, result: EpochResult) -> bool:
        """Take an epoch's result; True when weights are being written because of it."""
        changed = self._best.update(result.metrics)
        if changed or result.epoch in self._best.pending:
            self._held[result.epoch] = in_memory(self._part(result.state()))
        if changed:
            assert self._best.epoch is not None
            self._file.write(self._held[self._best.epoch])
        self._held = self._only_pending(self._held)
        return changed

    def held(self, epoch: int) -> dict[int, dict[str, Any]]:
        """Return the further weights that a checkpoint of `epoch` has to hold: those of the epoch before, if any."""
        return {held: state for held, state in self._held.items() if held != epoch}

    def _only_pending(self, states: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        return {epoch: states[epoch] for epoch in self._best.pending if epoch in states}

    def _part(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a run's state that prediction needs: one network's weights, config, rows and the epoch's metrics."""
        kept = ("format", "config", "epoch", self._key, "train_rows", "val_rows")
        return {key: state[key] for key in kept} | {"row": state["rows"][-1]}


def kept_weights(state: Mapping[str, Any]) -> tuple[Literal["raw", "ema"], dict[str, Any]]:
    """Return which weights the state of a best.pt holds, raw or averaged, and the network's tensors by name."""
    if "average" in state:
        return "ema", state["average"]["network"]
    return "raw", state["network"]
