"""A run that keeps its place in a folder: goes on from the checkpoint there, saves as it goes, gives a row an epoch.

An epoch of a small cohort takes a GPU a second, and so does saving a ResNet-50: in a search at 64 voxels, four trials at a
time on an H200, a fifth of the time went into files (best.pt 0.4 s an improvement, and over a second for the checkpoint of
each trial's first epoch). So checkpoints keep to a share of the time from the first one on, and a best.pt is written
while training goes on, from a copy in memory; before the next one, a checkpoint or the run's end, it is there. Before that,
with fewer checkpoints and fsync alone in the background, 2.0 s lay between two trials of a slot where 4.7 s had; on two CPU
cores an improvement now costs 0.04 to 0.08 s where it cost 0.24 to 0.41 s.
"""

import logging
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Self

from trainables.checkpoints import (
    TrialFiles,
    load_state,
    save_state,
    sweep_temporaries,
    when_there_is_room,
    write_json,
)
from trainables.config import FineTuneConfig
from trainables.data.folds import Split, split_rows
from trainables.data.manifest import read_manifest
from trainables.data.scans import Recipe
from trainables.data.table_file import ManifestError
from trainables.data.volumes import Cohort, CohortError, open_cohort, prepare_cohort
from trainables.finetune import EpochResult, check_checkpoint

SAVING_PAUSE = 20
"""Times as long as writing the last checkpoint took until the next: with Adam and the average, a ResNet-50's has 740 MB."""
CHECKPOINT_TO_BEST = 4
"""Sizes of best.pt in a checkpoint: network, average and Adam's two moments."""

log = logging.getLogger("medtune.disk")

Epochs = Callable[[Mapping[str, Any] | None], Iterator[EpochResult]]
"""Starts the run anew (None) or from a state, and gives its epochs: `finetune`, or a gang of ranks."""


def open_inputs(
    config: FineTuneConfig, table: str | Path, cohort: str | Path
) -> tuple[Cohort, Split]:
    """Return the prepared cohort and which of its rows train and validate.

    On a node that has not got the cohort it is prepared first, once for all trials there. Raises CohortError that names
    the node where table or volumes are missing, or are others than those the study began with.
    """
    folder = Path(cohort)
    try:
        manifest = read_manifest(Path(table), num_classes=config.num_classes)
        if not folder.exists():
            made = prepare_cohort(manifest, Recipe.from_config(config), folder.parent)
            if made.name != folder.name:
                raise CohortError(
                    f"{table}: not the data of the study (cohort {folder.name}, here {made.name})"
                )
    except (ManifestError, CohortError) as error:
        here = f"node {socket.gethostname()}"
        raise CohortError([f"{here}: {problem}" for problem in error.problems]) from error
    split = split_rows(
        manifest, fold=config.fold, num_folds=config.num_folds, cross_validate=config.cross_validate
    )
    return open_cohort(folder), split


def saved_run(
    config: FineTuneConfig,
    files: TrialFiles,
    epochs: Epochs,
    *,
    checkpoint_epochs: int = 1,
    waits: Callable[[], None] | None = None,
    keep: Callable[[], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the row of every epoch of the run kept in `files`, those of earlier processes first.

    Checkpoints are written every `checkpoint_epochs` epochs and after the last one, before the row is yielded; where
    epochs are shorter than writing takes, as few more are skipped as keep it under a twentieth of the time, the first ones
    included. A run killed at any moment repeats the epochs since the last checkpoint, or all, on a CPU to the same numbers.
    best.pt is written while the next epoch runs, and complete before a checkpoint of the same epoch or a later one, before
    the next best.pt, and when the run ends or is closed: a process that is killed in between leaves the one before. On a
    full disk the run waits for room, and calls `waits` meanwhile, from another thread for best.pt. `keep` is called after
    each checkpoint, to copy `files` to where they outlive this machine; with it, the first epoch is always saved.
    """
    files.folder.mkdir(parents=True, exist_ok=True)
    sweep_temporaries(files.folder, files.config, files.checkpoint, files.best)
    resume = load_state(files.checkpoint) if files.checkpoint.exists() else None
    if resume is not None:
        check_checkpoint(
            resume, config
        )  # before config.json is replaced, and before another run's rows are told
    when_there_is_room(
        lambda: write_json(files.config, config.model_dump(mode="json")), files.config, waits=waits
    )
    best = BestEpoch()
    for row in resume["rows"] if resume else []:
        best.improved_by(row)
        yield row
    saved, cost_s = time.monotonic(), 0.0 if keep is not None else None
    with _WrittenBehind(files.best, waits) as weights, closing(epochs(resume)) as results:  # type: ignore[type-var]
        for result in results:
            if best.improved_by(result.metrics):
                weights.write(best_state(result))
                if cost_s is None:
                    cost_s = CHECKPOINT_TO_BEST * weights.wait()
            worth_it = time.monotonic() - saved >= SAVING_PAUSE * (cost_s or 0.0)
            if (
                worth_it and result.epoch % checkpoint_epochs == 0
            ) or result.epoch == config.epochs:
                weights.wait()
                cost_s = _save(files.checkpoint, result.state(), waits)
                if keep is not None:
                    began = time.monotonic()
                    keep()
                    cost_s += time.monotonic() - began
                saved = time.monotonic()
            yield result.metrics


class _WrittenBehind:
    """A file that a thread writes while the run goes on, one state after the other; complete when the block has ended."""

    def __init__(self, path: Path, waits: Callable[[], None] | None) -> None:
        self.path, self.waits = path, waits
        self._thread = ThreadPoolExecutor(1, "medtune-disk")
        self._writing: Future[float] | None = None

    def write(self, state: Mapping[str, Any]) -> None:
        """Begin to write `state` as it is now, once the one before is written."""
        self.wait()
        self._writing = self._thread.submit(_save, self.path, in_memory(state), self.waits)

    def wait(self) -> float:
        """Return the seconds that the last writing took, 0 before the first; raises what went wrong with it."""
        return self._writing.result() if self._writing is not None else 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        # Nobody is left to raise it to
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
        save_state(path, state)
        return time.monotonic() - began

    return when_there_is_room(write, path, waits=waits)


def in_memory(state: Any) -> Any:
    """Return `state` with every tensor replaced by a copy of its own in the CPU's memory, at any depth of mappings."""
    import torch

    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    return (
        {key: in_memory(value) for key, value in state.items()}
        if isinstance(state, Mapping)
        else state
    )


class BestEpoch:
    """The best 3-epoch median of val_auc so far: one lucky epoch does not become the network that is exported."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.best = float("-inf")

    def improved_by(self, row: Mapping[str, Any]) -> bool:
        """Take the next epoch's row; True when the median of the last three epochs is the best yet.

        Before there are three the lowest stands in, and is forgotten then; a score that is no number counts lowest.
        """
        value = row["val_auc"]
        self.values.append(float("-inf") if value is None or value != value else value)
        median = statistics.median_low(self.values[-3:])
        if median <= self.best and len(self.values) != 3:
            return False
        self.best = median
        return True


def best_state(result: EpochResult) -> dict[str, Any]:
    """The part of a run's state that prediction needs: averaged weights, config, its rows and the epoch's metrics."""
    state = result.state()
    kept = ("format", "config", "epoch", "average", "train_rows", "val_rows")
    return {key: state[key] for key in kept} | {"row": state["rows"][-1]}
