"""When a run's files are written: never at the cost of the training, never in an order that a crash could turn against it."""

import errno
import itertools
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from trainables import checkpoints
from trainables import saved_run as module
from trainables.checkpoints import TrialFiles, load_state
from trainables.config import build_config
from trainables.finetune import EpochResult
from trainables.saved_run import SAVING_PAUSE, saved_run

EPOCHS = 60


class Clock:
    """A clock on which only what a test says takes time: epochs, writing, waiting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.written: list[tuple[str, float]] = []
        self.seconds = {"best.pt": 0.5, "checkpoint.pt": 2.0}
        real = checkpoints.save_state

        def save_state(path: Path, state: Mapping[str, Any], *, flush: bool = True) -> None:
            self.now += self.seconds[path.name]
            self.written.append((path.name, self.now))
            real(path, state, flush=flush)

        monkeypatch.setattr(module, "save_state", save_state)
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)

    def epochs(self, epoch_s: float, *, improving: bool = True) -> module.Epochs:
        def run(resume: Mapping[str, Any] | None) -> Iterator[EpochResult]:
            rows: list[dict[str, Any]] = list(resume["rows"]) if resume else []
            for epoch in range(len(rows) + 1, EPOCHS + 1):
                self.now += epoch_s
                rows.append({"epoch": epoch, "val_auc": 0.5 + epoch / 1000 if improving else 0.5})
                state = {"format": 1, "config": {}, "config_hash": build_config(config).hash(), "epoch": epoch}
                state |= {"rows": list(rows), "average": {}, "train_rows": [], "val_rows": []}
                yield EpochResult(epoch, rows[-1], lambda state=state: dict(state))  # type: ignore[misc]

        return run

    def times(self, name: str) -> list[float]:
        return [when - 1000.0 for file, when in self.written if file == name]


config = {"epochs": EPOCHS, "drw_start_epoch": 2}


def test_checkpoints_take_a_tenth_of_the_time_from_the_first_one_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs of 1 s: saved after the first one, a trial that is stopped at its third would spend most of its time on it."""
    clock = Clock(monkeypatch)
    rows = list(saved_run(build_config(config), TrialFiles(tmp_path), clock.epochs(1.0, improving=False)))
    assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
    at = clock.times("checkpoint.pt")
    pause = SAVING_PAUSE * 2.0
    assert at[0] >= pause, "four times what best.pt took is what a checkpoint takes"
    assert all(later - earlier >= pause for earlier, later in itertools.pairwise(at[:-1]))
    assert at[-1] == clock.now - 1000.0, "the last epoch is always saved"
    assert load_state(TrialFiles(tmp_path).checkpoint)["epoch"] == EPOCHS


def test_long_epochs_are_all_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    list(saved_run(build_config(config), TrialFiles(tmp_path), clock.epochs(60.0)))
    assert len(clock.times("checkpoint.pt")) == EPOCHS


def test_what_is_kept_elsewhere_is_there_after_the_first_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only `keep` brings a trial's files to object storage: one that is stopped at its third epoch has weights there."""
    clock = Clock(monkeypatch)
    kept: list[float] = []
    run = saved_run(build_config(config), TrialFiles(tmp_path), clock.epochs(1.0), keep=lambda: kept.append(clock.now))
    next(run)
    assert len(kept) == 1
    run.close()  # type: ignore[attr-defined]


def test_time_spent_waiting_for_room_does_not_put_off_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    fast, full = module.save_state, [True]

    def sometimes_full(path: Path, state: Mapping[str, Any], *, flush: bool = True) -> None:
        if path.name == "checkpoint.pt" and full:
            full.pop()
            raise OSError(errno.ENOSPC, "no room")
        fast(path, state, flush=flush)

    def sleep(_: float) -> None:
        clock.now += 3600.0

    monkeypatch.setattr(module, "save_state", sometimes_full)
    monkeypatch.setattr(module.time, "sleep", sleep)
    list(saved_run(build_config(config), TrialFiles(tmp_path), clock.epochs(60.0)))
    assert len(clock.times("checkpoint.pt")) == EPOCHS


def test_training_goes_on_while_the_best_weights_go_to_the_disk_and_a_checkpoint_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    slow, flushed = threading.Event(), list[str]()

    def flush(path: Path) -> None:
        assert slow.wait(30)
        flushed.append(path.name)
        clock.written.append(("flushed", clock.now))

    monkeypatch.setattr(module, "onto_disk", flush)
    files = TrialFiles(tmp_path)
    run = saved_run(build_config(config), files, clock.epochs(1.0, improving=False))
    assert next(run)["epoch"] == 1
    assert load_state(files.best)["epoch"] == 1, "readable for everybody at once"
    assert next(run)["epoch"] == 2
    assert not flushed
    slow.set()
    for _ in run:
        pass
    names = [name for name, _ in clock.written]
    assert names.index("flushed") < names.index("checkpoint.pt")
    assert names.count("flushed") == names.count("best.pt")


def test_a_disk_that_does_not_take_the_best_weights_ends_the_run_before_a_checkpoint_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    def broken(path: Path) -> None:
        raise OSError(errno.EIO, "input/output error", str(path))

    monkeypatch.setattr(module, "onto_disk", broken)
    files = TrialFiles(tmp_path)
    with pytest.raises(OSError, match=r"best\.pt"):
        list(saved_run(build_config(config), files, clock.epochs(60.0)))
    assert not files.checkpoint.exists()


def test_best_weights_that_a_disk_budget_removed_meanwhile_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    real = module.onto_disk

    def removed(path: Path) -> None:
        path.unlink()
        real(path)

    monkeypatch.setattr(module, "onto_disk", removed)
    rows = saved_run(build_config(config), TrialFiles(tmp_path), clock.epochs(60.0))
    assert len(list(rows)) == EPOCHS
