"""When a run's files are written: never at the cost of the training, never in an order that a crash could turn against it."""

import errno
import itertools
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from trainables import checkpoints
from trainables import saved_run as module
from trainables.checkpoints import TrialFiles, load_state, write_json
from trainables.config import build_config
from trainables.finetune import EpochResult
from trainables.objective import BestEpoch, objective_value
from trainables.saved_run import SAVING_PAUSE, kept_weights, saved_run

EPOCHS = 60


class Clock:
    """A clock that advances only for the durations that a test sets: epochs, writing, waiting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.written: list[tuple[str, float]] = []
        self.seconds = {"best.pt": 0.5, "checkpoint.pt": 2.0}
        real = checkpoints.save_state

        def save_state(path: Path, state: Mapping[str, Any], within: Path | None = None) -> None:
            self.now += self.seconds[path.name]
            self.written.append((path.name, self.now))
            real(path, state, within)

        self.save_state = save_state
        monkeypatch.setattr(module, "save_state", save_state)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def epochs(self, epoch_s: float, *, improving: bool = True) -> module.Epochs:
        def run(resume: Mapping[str, Any] | None) -> Iterator[EpochResult]:
            rows: list[dict[str, Any]] = list(resume["rows"]) if resume else []
            for epoch in range(len(rows) + 1, EPOCHS + 1):
                self.now += epoch_s
                rows.append({"epoch": epoch, "val_auc": 0.5 + epoch / 1000 if improving else 0.5})
                state = {
                    "format": 2,
                    "config": {},
                    "config_hash": build_config(config).hash(),
                    "epoch": epoch,
                }
                state |= {"rows": list(rows), "average": {}, "train_rows": [], "val_rows": []}
                yield EpochResult(epoch, rows[-1], partial(dict, state))

        return run

    def times(self, name: str) -> list[float]:
        return [when - 1000.0 for file, when in self.written if file == name]


config = {"epochs": EPOCHS, "drw_start_epoch": 2}


def test_checkpoints_take_a_twentieth_of_the_time_from_the_first_one_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs of 1 s: saved after the first one, a trial that is stopped at its third would spend most of its time on it."""
    clock = Clock(monkeypatch)
    rows = list(
        saved_run(build_config(config), TrialFiles(tmp_path), clock.epochs(1.0, improving=False))
    )
    assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
    at = clock.times("checkpoint.pt")
    pause = SAVING_PAUSE * 2.0
    assert at[0] >= pause, "a checkpoint takes four times as long as best.pt"
    assert all(later - earlier >= pause for earlier, later in itertools.pairwise(at[:-1]))
    assert at[-1] == clock.now - 1000.0, "the last epoch is always saved"
    assert load_state(TrialFiles(tmp_path).checkpoint)["epoch"] == EPOCHS


def test_long_epochs_are_all_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    list(saved_run(build_config(config), TrialFiles(tmp_path), clock.epochs(60.0)))
    assert len(clock.times("checkpoint.pt")) == EPOCHS


def test_what_is_kept_elsewhere_is_there_after_the_first_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only `keep` brings a trial's files to object storage: one that is stopped at its third epoch has weights there."""
    clock = Clock(monkeypatch)
    kept: list[float] = []
    run = saved_run(
        build_config(config),
        TrialFiles(tmp_path),
        clock.epochs(1.0),
        keep=lambda: kept.append(clock.now),
    )
    next(run)
    assert len(kept) == 1
    run.close()  # type: ignore[attr-defined]


def test_time_spent_waiting_for_room_does_not_put_off_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    full = [True]

    def sometimes_full(path: Path, state: Mapping[str, Any], within: Path | None = None) -> None:
        if path.name == "checkpoint.pt" and full:
            full.pop()
            raise OSError(errno.ENOSPC, "no room")
        clock.save_state(path, state, within)

    def sleep(_: float) -> None:
        clock.now += 3600.0

    monkeypatch.setattr(module, "save_state", sometimes_full)
    monkeypatch.setattr(time, "sleep", sleep)
    list(saved_run(build_config(config), TrialFiles(tmp_path), clock.epochs(60.0)))
    assert len(clock.times("checkpoint.pt")) == EPOCHS


class SlowDisk:
    """A disk on which a best.pt after the first waits until the test lets it through; `error`: its failure, if any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: OSError | None = None) -> None:
        self.through = threading.Event()
        self.first = True
        fast = vars(module)["save_state"]  # a clock's, where one is set

        def save_state(path: Path, state: Mapping[str, Any], within: Path | None = None) -> None:
            if path.name == "best.pt" and not self.first:
                assert self.through.wait(30)
                if error is not None:
                    raise error
            self.first = False
            fast(path, state, within)

        monkeypatch.setattr(module, "save_state", save_state)


def test_training_goes_on_while_the_best_weights_are_written_and_a_checkpoint_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    disk = SlowDisk(monkeypatch)
    files = TrialFiles(tmp_path)
    run = saved_run(build_config(config), files, clock.epochs(1.0))
    assert next(run)["epoch"] == 1
    assert load_state(files.best)["epoch"] == 1, "the cost of a checkpoint is not known before"
    assert [next(run)["epoch"] for _ in range(2)] == [2, 3]
    assert load_state(files.best)["epoch"] == 1, (
        "the row of epoch 3 is yielded before its weights are written"
    )
    threading.Timer(0.2, disk.through.set).start()
    assert next(run)["epoch"] == 4, "which is better still, and waits for them"
    assert load_state(files.best)["epoch"] >= 2
    for _ in run:
        best = load_state(files.best)["epoch"]
        if files.checkpoint.exists():
            saved = load_state(files.checkpoint)
            due = BestEpoch()
            for row in saved["rows"]:
                due.update(row)
            assert due.epoch is not None
            assert best >= due.epoch
    assert files.checkpoint.exists()


def test_a_run_that_is_closed_leaves_the_best_weights_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a search does that stops a trial at a rung."""
    clock = Clock(monkeypatch)
    disk = SlowDisk(monkeypatch)
    files = TrialFiles(tmp_path)
    run = saved_run(build_config(config), files, clock.epochs(1.0))
    assert [next(run)["epoch"] for _ in range(3)] == [1, 2, 3]
    threading.Timer(0.2, disk.through.set).start()
    run.close()  # type: ignore[attr-defined]
    assert load_state(files.best)["epoch"] == 2, "the median of three rising values"


def test_what_is_written_is_the_epoch_s_own_state_though_the_tensors_go_on_changing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    files, weights = TrialFiles(tmp_path), torch.zeros(3)

    def epochs(resume: Mapping[str, Any] | None) -> Iterator[EpochResult]:
        for epoch in range(1, 5):
            weights.fill_(epoch)
            row = {"epoch": epoch, "val_auc": 0.5 + epoch / 10}
            state = {
                "format": 2,
                "config": {},
                "epoch": epoch,
                "rows": [row],
                "train_rows": [],
                "val_rows": [],
            }
            whole = state | {"average": {"network": {"w": weights}}}
            yield EpochResult(epoch, row, partial(dict, whole))

    run = saved_run(build_config(config), files, epochs)
    assert [next(run)["epoch"] for _ in range(3)] == [1, 2, 3]
    weights.fill_(-1.0)
    disk.through.set()
    run.close()  # type: ignore[attr-defined]
    assert load_state(files.best)["average"]["network"]["w"].tolist() == [2.0, 2.0, 2.0]


def test_a_disk_that_does_not_take_the_best_weights_ends_the_run_before_a_checkpoint_counts_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(monkeypatch)
    files = TrialFiles(tmp_path)
    disk = SlowDisk(monkeypatch, OSError(errno.EIO, "input/output error", str(files.best)))
    disk.through.set()
    run = saved_run(build_config(config), files, clock.epochs(1.0))
    assert [next(run)["epoch"] for _ in range(3)] == [1, 2, 3]
    with pytest.raises(OSError, match=r"best\.pt"):
        next(run)
    assert not files.checkpoint.exists()
    disk.first = True
    again = saved_run(build_config(config), files, clock.epochs(1.0))
    assert [next(again)["epoch"] for _ in range(3)] == [1, 2, 3]
    again.close()  # type: ignore[attr-defined]
    assert re.search(
        r"best\.pt was not written, and the run has ended: .*input/output error", caplog.text
    )


def test_a_file_that_cannot_be_written_is_told_by_its_own_name(tmp_path: Path) -> None:
    """And not by that of its temporary sibling, which is too long here."""
    path = tmp_path / ("a" * 250)
    with pytest.raises(OSError, match="File name too long") as told:
        write_json(path, {})
    assert told.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


# Which weights are kept ------------------------------------------------------------------------------------------------


def scored(
    values: Sequence[float | None], raw: Sequence[float | None] | None = None
) -> module.Epochs:
    """A run whose weights are the number of their epoch, the raw network's plus 100; and its validation AUCs."""

    def run(resume: Mapping[str, Any] | None) -> Iterator[EpochResult]:
        assert resume is None or "held" not in resume
        rows: list[dict[str, Any]] = list(resume["rows"]) if resume else []
        for epoch in range(len(rows) + 1, len(values) + 1):
            row = {"epoch": epoch, "val_auc": values[epoch - 1]}
            rows.append(row | {"val_auc_raw": (raw or values)[epoch - 1]})
            state = {
                "format": 2,
                "config": {},
                "config_hash": build_config({"epochs": len(values)}).hash(),
                "epoch": epoch,
                "network": {"w": torch.tensor(100.0 + epoch)},
                "average": {"network": {"w": torch.tensor(float(epoch))}, "updates": epoch},
                "rows": list(rows),
                "train_rows": [],
                "val_rows": [],
            }
            yield EpochResult(epoch, rows[-1], partial(dict, state))

    return run


def kept(folder: Path, epochs: module.Epochs, count: int, **how: Any) -> tuple[int, str, float]:
    files = TrialFiles(folder)
    list(saved_run(build_config({"epochs": count}), files, epochs, **how))
    state = load_state(files.best)
    name, weights = kept_weights(state)
    assert state["row"]["epoch"] == state["epoch"]
    return state["epoch"], name, float(weights["w"])


@pytest.mark.parametrize(
    ("values", "epoch"),
    [
        ([0.80, 0.82, 0.50], 1),
        ([0.80, 0.82, None], 1),
        ([0.80, 0.82, float("nan")], 1),
        ([0.6, 0.5, 0.9, 0.7, 0.8, 0.4], 5),
        ([0.6, 0.5, 0.9, 0.8, 0.7, 0.4], 4),
        ([0.5, None, None, 0.6, 0.7, None], 4),
    ],
)
def test_the_weights_are_of_the_epoch_whose_value_is_the_objective(
    tmp_path: Path, values: list[float | None], epoch: int
) -> None:
    assert kept(tmp_path, scored(values), len(values)) == (epoch, "ema", float(epoch))
    rows = [{"epoch": number, "val_auc": value} for number, value in enumerate(values, start=1)]
    assert objective_value(rows) == values[epoch - 1]


@pytest.mark.parametrize(
    ("objective", "epoch"),
    [("best_median3_raw", 4), ("best_raw", 2), ("last_raw", 6)],
)
def test_an_objective_of_the_raw_network_keeps_the_raw_weights_of_its_epoch(
    tmp_path: Path, objective: str, epoch: int
) -> None:
    raw = [0.5, 0.9, 0.6, 0.7, 0.8, 0.6]
    epochs = scored([0.9, 0.9, 0.9, 0.5, 0.5, 0.5], raw)
    assert kept(tmp_path, epochs, 6, objective=objective) == (epoch, "raw", 100.0 + epoch)


def test_a_run_that_is_killed_after_any_epoch_keeps_what_an_undisturbed_one_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of a window's first epoch outlive a kill before its last one in the checkpoint."""
    monkeypatch.setattr(module, "SAVING_PAUSE", 0)
    rng = random.Random(0)
    for run in range(4):
        values = [rng.choice([None, round(rng.random(), 1)]) for _ in range(8)]
        values[0] = 0.1
        whole = kept(tmp_path / f"{run}", scored(values), 8)
        for killed in range(1, 8):
            files = TrialFiles(tmp_path / f"{run}, {killed}")
            begun = saved_run(build_config({"epochs": 8}), files, scored(values), keep=lambda: None)
            for _ in range(killed):
                next(begun)
            begun.close()  # type: ignore[attr-defined]
            assert load_state(files.checkpoint)["epoch"] == killed
            assert kept(files.folder, scored(values), 8) == whole


def test_a_run_of_an_earlier_version_keeps_to_its_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint does not have the weights of the epoch before, which may be the median."""
    monkeypatch.setattr(module, "SAVING_PAUSE", 0)
    epochs = scored([0.6, 0.5, 0.55, 0.8, 0.9, 0.4])
    assert kept(tmp_path / "new", epochs, 6)[0] == 4
    files = TrialFiles(tmp_path / "earlier")
    begun = saved_run(build_config({"epochs": 6}), files, epochs, keep=lambda: None)
    assert [next(begun)["epoch"] for _ in range(4)] == [1, 2, 3, 4]
    begun.close()  # type: ignore[attr-defined]
    state = load_state(files.checkpoint)
    del state["held"]
    state["format"] = 1
    checkpoints.save_state(files.checkpoint, state)
    assert kept(files.folder, epochs, 6) == (5, "ema", 5.0)


def test_a_run_that_is_ended_early_on_purpose_is_saved_there(tmp_path: Path) -> None:
    """However short its epochs are: retraining stops after the epoch that was best."""
    files = TrialFiles(tmp_path)
    run = saved_run(build_config({"epochs": 6}), files, scored([0.6] * 6), until=2)
    assert [next(run)["epoch"] for _ in range(2)] == [1, 2]
    run.close()  # type: ignore[attr-defined]
    assert load_state(files.checkpoint)["epoch"] == 2
