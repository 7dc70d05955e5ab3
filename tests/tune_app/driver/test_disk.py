"""Disks that fill up, and studies with a budget: on a real, small file system."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from search_spaces.written import space_from
from trainables.checkpoints import (
    DiskFullError,
    TrialFiles,
    is_disk_full,
    load_state,
    naming_a_full_disk,
    replacing,
    save_state,
    when_there_is_room,
    write_json,
)
from trainables.config import build_config
from trainables.data.manifest import read_manifest
from trainables.data.scans import Recipe
from trainables.data.volumes import new_folder, prepare_cohort
from trainables.finetune import EpochResult, finetune
from trainables.saved_run import open_inputs, saved_run
from tune_app.driver.disk import file_sizes, make_room, plan_budget
from tune_app.driver.recorder import Recorder
from tune_app.driver.searcher import OptunaSearcher
from tune_app.results.loading import load_study
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles, append_line
from tune_app.study.rows import read_rows
from tune_app.study.spec import build_spec
from tune_app.synthetic import write_cohort

TINY: dict[str, Any] = {
    "depth": 10,
    "width": 0.125,
    "volume_shape": 16,
    "epochs": 2,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_folds": 2,
    "train_auc_volumes": 0,
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a small file system is missing: only root on Linux can mount a tmpfs")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system is missing: mount says {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    """Leave no room on the disk; returns the file that takes it all."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    return path


def wait_for(condition: Callable[[], object], what: str, *, deadline_s: float = 60) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.02)


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


# A full disk -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_write_knows_a_full_disk_and_leaves_what_was_there(small_disk: Path) -> None:
    import torch

    save_state(small_disk / "a.pt", {"x": torch.zeros(1000)})
    write_json(small_disk / "a.json", {"x": 1})
    append_line(small_disk / "a.jsonl", {"x": 1})
    fill(small_disk)
    writes: dict[str, Callable[[Path], object]] = {
        "a.pt": lambda path: save_state(path, {"x": torch.zeros(1_000_000)}),
        "a.json": lambda path: write_json(path, {"x": "x" * 100_000}),
        "a.jsonl": lambda path: append_line(path, {"x": "x" * 100_000}),
    }
    for name, write in writes.items():
        before = (small_disk / name).read_bytes()
        with pytest.raises((OSError, RuntimeError)) as caught:
            write(small_disk / name)
        assert is_disk_full(caught.value), name
        assert (small_disk / name).read_bytes() == before
    assert sorted(path.name for path in small_disk.iterdir()) == [
        "a.json",
        "a.jsonl",
        "a.pt",
        "filler",
    ]


def test_a_run_waits_for_room_and_goes_on_with_nothing_lost(
    small_disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = write_cohort(tmp_path / "cohort", subjects=10, side=(14, 18))
    config = build_config(TINY)
    cohort, split = open_inputs(
        config, table, prepare_cohort(read_manifest(table), Recipe.from_config(config), tmp_path)
    )
    files = TrialFiles(small_disk / "trial")
    rows: list[Any] = []
    signs: list[float] = []

    def work() -> None:
        epochs = lambda resume: finetune(config, cohort, split, resume=resume)  # noqa: E731
        rows.extend(saved_run(config, files, epochs, waits=lambda: signs.append(time.monotonic())))

    filler = fill(small_disk)
    thread = in_thread(work)
    wait_for(lambda: "the disk is full: waiting to write" in caplog.text, "the message")
    wait_for(lambda: len(signs) > 1, "that it waits")
    assert thread.is_alive()
    assert not files.checkpoint.exists()
    filler.unlink()
    thread.join(120)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert load_state(files.checkpoint)["epoch"] == 2
    assert not list(files.folder.glob(".*"))


def test_a_driver_waits_for_room_and_each_row_is_there_once(small_disk: Path) -> None:
    spec = build_spec({"data": "t.csv", "config": {"epochs": 9}})
    files = StudyFiles(small_disk)
    recorder = Recorder(spec, files)
    recorder.began("00000", {}, None, node=None)
    filler = fill(small_disk)
    rows = [
        {"trial": "00000", "time": 1.0, "epoch": epoch, "val_auc": 0.5} for epoch in range(1, 101)
    ]

    def work() -> None:
        for row in rows:
            recorder.row(row)

    thread = in_thread(work)
    wait_for(lambda: files.epochs.exists() and thread.is_alive(), "the first rows")
    filler.unlink()
    thread.join(60)
    assert read_rows(files.epochs) == rows


def test_a_searcher_waits_for_room(small_disk: Path) -> None:
    searcher = OptunaSearcher(
        space_from("documented", {}),
        epochs=9,
        num_trials=500,
        objective=lambda rows: 0.5,
        storage=small_disk / "study.db",
        sampler="random",
    )
    filler = fill(small_disk)
    asked: list[Any] = []
    thread = in_thread(lambda: asked.extend(searcher.suggest(f"t{i}") for i in range(400)))
    wait_for(lambda: os.statvfs(small_disk).f_bavail == 0 and thread.is_alive(), "a full disk")
    time.sleep(0.5)
    filler.unlink()
    thread.join(120)
    searcher.close()
    assert [trial["trial"] for trial in asked] == [f"{number:05d}" for number in range(400)]


def test_a_disk_on_which_nobody_makes_room_is_told_after_the_deadline(tmp_path: Path) -> None:
    def write() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskFullError, match="no room on its disk for 0 s; make room, then resume"):
        when_there_is_room(write, tmp_path / "x", timeout_s=0.3)
    with pytest.raises(PermissionError):
        when_there_is_room(lambda: (_ for _ in ()).throw(PermissionError(13, "no")), tmp_path / "x")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_study_on_a_full_disk_says_so_and_goes_on_when_there_is_room(
    small_disk: Path, tmp_path: Path
) -> None:
    table = write_cohort(tmp_path / "cohort", subjects=14, side=(14, 18))
    settings = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]
    root = small_disk / "study"
    places: list[str | Path] = ["--data", table, "--out", root, "--cache", tmp_path / "cache"]
    said = tmp_path / "said.txt"
    with said.open("w") as output:
        study = subprocess.Popen(
            [sys.executable, "-m", "tune_app.cli", "run", *places, "--trials", "1", *settings],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(lambda: (root / "trials" / "00000").exists(), "the trial", deadline_s=300)
        filler = fill(small_disk)
        wait_for(lambda: "the disk is full" in said.read_text(), "the message", deadline_s=300)
        assert study.poll() is None
        filler.unlink()
        assert study.wait(300) == 0, said.read_text()
    finally:
        study.kill()
    assert "Traceback" not in said.read_text()
    assert list(load_study(root).epochs["epoch"]) == [1, 2]
    assert not list(root.rglob(".*.tmp"))


# A budget --------------------------------------------------------------------------------------------------------------


def test_file_sizes_are_those_of_the_files_and_a_little_more(trained_study: Path) -> None:
    for trial in StudyFiles(trained_study).trials.iterdir():
        files = TrialFiles(trial)
        checkpoint, best = file_sizes(build_config(json.loads(files.config.read_text())))
        ended = checkpoint - best  # which holds no other epoch's weights
        assert 0.8 * ended < files.checkpoint.stat().st_size <= ended
        assert 0.8 * best < files.best.stat().st_size <= best


def test_a_budget_that_cannot_hold_what_runs_is_refused_with_what_it_takes() -> None:
    spec = build_spec({"data": "t.csv", "disk_budget_gib": 1.0})
    with pytest.raises(
        SpecError,
        match=r"4 trials at a time need 7\..* GiB \(a checkpoint has 0.86 GiB\), .*give 8",
    ):
        plan_budget(spec, 4)
    assert plan_budget(build_spec({"data": "t.csv"}), 4) is None
    deeper = {"base": "documented", "search": {"depth": [10, 200]}}
    with pytest.raises(SpecError, match=r"a checkpoint has 2\.36 GiB"):
        plan_budget(build_spec({"data": "t.csv", "disk_budget_gib": 1.0, "space": deeper}), 4)


def test_what_nothing_goes_on_from_goes_first_and_the_best_and_the_running_stay(
    tmp_path: Path,
) -> None:
    files = StudyFiles(tmp_path)
    mib = 2**20
    records: list[dict[str, Any]] = [
        {"trial": f"{i:05d}", "state": "running" if i == 5 else "completed", "objective": value}
        for i, value in enumerate([0.5, 0.9, None, 0.7, 0.8, 0.6])
    ]
    for record in records:
        trial = files.trial(record["trial"])
        trial.folder.mkdir(parents=True)
        trial.checkpoint.write_bytes(bytes(4 * mib))
        trial.best.write_bytes(bytes(mib))
    fields = {"data": "t.csv", "config": TINY, "keep_best": 2}

    def left(gib: float) -> tuple[list[int], list[int]]:
        budget = plan_budget(build_spec(fields | {"disk_budget_gib": gib}), 1)
        assert budget is not None
        make_room(files, budget, records)
        sizes = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        assert sizes <= budget.total
        trials = [files.trial(record["trial"]) for record in records]
        return [i for i, t in enumerate(trials) if t.checkpoint.exists()], [
            i for i, t in enumerate(trials) if t.best.exists()
        ]

    assert left(1.0) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])
    assert left(0.0364) == ([1, 3, 4, 5], [0, 1, 2, 3, 4, 5])
    assert left(0.0203) == ([5], [1, 4, 5])


def test_a_trial_sweeps_what_trials_write_and_leaves_alone_what_its_driver_is_writing(
    tmp_path: Path,
) -> None:
    files = TrialFiles(tmp_path)
    driver, trial = tmp_path / ".trial.json.7.tmp", tmp_path / ".checkpoint.pt.7.tmp"
    driver.touch()
    trial.touch()

    def no_epochs(resume: Any) -> Iterator[EpochResult]:
        yield from ()

    assert list(saved_run(build_config({}), files, no_epochs)) == []
    assert (driver.exists(), trial.exists()) == (True, False)


def test_what_does_not_fit_on_a_full_disk_is_named(small_disk: Path) -> None:
    much = bytes(20 * 2**20)
    with pytest.raises(OSError) as told, replacing(small_disk / "report.html") as temporary:
        temporary.write_bytes(much)
    assert told.value.filename == str(small_disk / "report.html")
    with pytest.raises(OSError) as told, new_folder(small_disk / "model") as folder:
        (folder / "network.safetensors").write_bytes(much)
    assert told.value.filename == str(small_disk / "model")
    with pytest.raises(OSError) as told, naming_a_full_disk(small_disk / "scores.csv"):
        (small_disk / "scores.csv.partial").write_bytes(much)
    assert told.value.filename == str(small_disk / "scores.csv")
    with pytest.raises(FileNotFoundError) as other, naming_a_full_disk(small_disk):
        (small_disk / "missing").read_bytes()
    assert other.value.filename == str(small_disk / "missing")
