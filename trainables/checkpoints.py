"""The files of one trial's folder, and how they are written: whole, to a temporary name, then renamed."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrialFiles:
    """Names every file of a trial's folder `trials/<id>`; loads neither torch nor Ray."""

    folder: Path

    @property
    def record(self) -> Path:
        """trial.json: parameters, state, verdict, times, node; written by the driver."""
        return self.folder / "trial.json"

    @property
    def config(self) -> Path:
        """config.json: the complete FineTuneConfig the trial ran with; written by the trial."""
        return self.folder / "config.json"

    @property
    def checkpoint(self) -> Path:
        """checkpoint.pt: everything needed to go on after the last saved epoch, and its rows."""
        return self.folder / "checkpoint.pt"

    @property
    def best(self) -> Path:
        """best.pt: averaged weights of the epoch with the best 3-epoch median of val_auc so far."""
        return self.folder / "best.pt"

    @property
    def log(self) -> Path:
        """trial.log: what the trial's process said."""
        return self.folder / "trial.log"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary sibling to write to; it replaces `path` when the block ends well, and is removed otherwise.

    A reader sees the old file or the new one, never part of one, whatever is killed in between.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinities become null: JSON has no word for them."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(without_nonfinite(value), indent=1) + "\n", encoding="utf-8")


def without_nonfinite(value: Any) -> Any:
    """Return `value` with every NaN and infinite float replaced by None, at any depth."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, Mapping):
        return {key: without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nonfinite(item) for item in value]
    return value


def sweep_temporaries(folder: Path) -> int:
    """Remove what a killed writer left behind in `folder`; returns how many files. Call it before the writers start."""
    leftovers = list(folder.glob(".*.tmp")) if folder.is_dir() else []
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return len(leftovers)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values to `path`, atomically. Readable with `weights_only=True`, which `load_state` uses."""
    import torch

    with replacing(path) as temporary:
        torch.save(dict(state), temporary)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, onto the CPU; nothing but tensors and plain values is unpickled."""
    import torch

    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
