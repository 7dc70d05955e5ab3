"""The disk budget of a study: which files are kept, which go first, and whether the budget can be kept at all.

Without a budget everything stays. With one, files go when they would no longer fit, in this order: checkpoints of
trials that have ended, from which no trial resumes; then best.pt of ended trials, the worst first, until `keep_best` are
left. Files that a running trial needs are never touched, and room for it is kept free: the budget holds at every moment.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.config import FineTuneConfig
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.spec import StudySpec

GIB = 2**30
LOGS = 8 * 2**20
"""Bytes kept free for logs, rows and the database between two looks."""


@dataclass(frozen=True)
class Budget:
    """A budget and what counts against it, in bytes."""

    total: int
    checkpoint: int
    """Of the largest trial."""
    best: int
    concurrent: int
    keep_best: int
    cohorts: int = 0
    """Prepared cohorts besides the study's own: of trials that prepare volumes otherwise."""

    @property
    def running(self) -> int:
        """Space that running trials may take: each its two files, and the one that is being written next to them."""
        return self.concurrent * (2 * self.checkpoint + self.best)

    @property
    def least(self) -> int:
        return self.running + self.keep_best * self.best + self.cohorts + LOGS


def plan_budget(spec: StudySpec, concurrent: int, cohorts: int = 0) -> Budget | None:
    """Return the budget of a study with `concurrent` trials at a time; None without one.

    `cohorts`: bytes of the prepared cohorts that its trials need besides the study's own. Raises SpecError when it cannot
    hold these and what `concurrent` running trials and the best ones need.
    """
    if spec.disk_budget_gib is None:
        return None
    sizes = [file_sizes(config) for config in _largest(spec)]
    budget = Budget(
        total=int(spec.disk_budget_gib * GIB),
        checkpoint=max(checkpoint for checkpoint, _ in sizes),
        best=max(best for _, best in sizes),
        concurrent=concurrent,
        keep_best=spec.keep_best,
        cohorts=cohorts,
    )
    if budget.least > budget.total:
        prepared = f", cohorts of other preprocessing {_gib(cohorts)}" if cohorts else ""
        raise SpecError(
            f"disk_budget_gib={spec.disk_budget_gib:g}: {concurrent} trials at a time need "
            f"{_gib(budget.running)} (a checkpoint has {_gib(budget.checkpoint)}), the {spec.keep_best} best "
            f"{_gib(spec.keep_best * budget.best)}{prepared}, logs and tables {_gib(LOGS)}: give "
            f"{_gib(math.ceil(budget.least * 1.05))}, or lower "
            "max_concurrent or keep_best"
        )
    return budget


def file_sizes(config: FineTuneConfig) -> tuple[int, int]:
    """Return about how many bytes checkpoint.pt and best.pt of a run have, a little too many; allocates nothing."""
    import torch

    from trainables.network.model import configured_network

    with torch.device("meta"):
        network = configured_network(config)
    parameters = sum(tensor.numel() for tensor in network.parameters())
    buffers = sum(tensor.numel() for tensor in network.buffers())
    tensors = len(network.state_dict())
    moments = 1 if config.optimizer == "sgd" else 2
    rows = 4096 * config.epochs
    best = 4 * (parameters + buffers) + 512 * tensors + 2**16
    checkpoint = 4 * (parameters * (2 + moments) + 2 * buffers) + 4 * 512 * tensors + rows + 2**16
    # While it runs it may hold the weights of the epoch before as well, which may become the best
    return checkpoint + best, best


def make_room(
    files: StudyFiles, budget: Budget, records: Iterable[Mapping[str, Any]]
) -> list[Path]:
    """Remove the files that must go for the study to fit its budget with the running trials at their largest; return them.

    `records` are all trials' trial.json. Of the ended trials the `keep_best` best by objective keep their best.pt.
    """
    over = _size(files.root) + budget.running + budget.cohorts + LOGS - budget.total
    ended = []
    for record in records:
        if record["state"] == "running":
            over -= _size(files.trial(record["trial"]).folder)
        else:
            ended.append(record)
    ended.sort(
        key=lambda record: -math.inf if record.get("objective") is None else record["objective"]
    )
    candidates = [files.trial(record["trial"]).checkpoint for record in ended]
    candidates += [
        files.trial(record["trial"]).best
        for record in ended[: max(0, len(ended) - budget.keep_best)]
    ]
    gone = []
    for path in candidates:
        if over <= 0:
            break
        if path.exists():
            over -= path.stat().st_size
            path.unlink()
            gone.append(path)
    return gone


def _largest(spec: StudySpec) -> list[FineTuneConfig]:
    """The configurations whose files may be the largest: of every planned trial, or of the widest and deepest sampled."""
    from trainables.config import build_config

    if spec.kind != "search":
        return [spec.config_of(trial.overrides) for trial in spec.planned]
    space = spec.resolved_space()
    largest = {
        name: max(float(str(end)) for end in space.parameters[name].ends)
        for name in ("depth", "width")
        if name in space.parameters
    }
    return [build_config({**spec.shared, **largest})]


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if not path.is_dir() else 0
        except FileNotFoundError:  # a temporary file that was there a moment ago
            continue
    return total


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 20 else f"{count / 2**20:.0f} MiB"
