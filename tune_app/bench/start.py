"""`medtune bench start`: the cost of a trial before its epochs have their usual length.

Three runs, one after the other, in a process that has just been started, and in `at_once` such processes at the same
time, as many trials share a GPU:

    new process   loads torch and MONAI, chooses convolution algorithms, compiles kernels, captures its graphs
    same thread   the next trial, where `trainables.training_thread` puts it; a GPU has the cohort already
    new thread    the same trial in a separate thread, where Ray Tune would put it

The cohort is a file, as a study's is: `trainables.data.resident` keeps no other on a GPU. `volumes` whose last step is not full cost more: its micro-batches have sizes that no other step has. Random volumes;
scores mean nothing.
"""

import dataclasses
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch.multiprocessing.spawn import spawn

from trainables.config import FineTuneConfig
from trainables.data.folds import Split
from trainables.data.volumes import Cohort
from trainables.finetune import Run
from trainables.training_thread import in_training_thread
from tune_app.bench.train import BenchError, bench_config, machine_facts, made_cohort

RUNS = ("new process", "same thread", "new thread")
LATER = 3
"""Epochs after the first, whose median is the usual length."""


def bench_start(
    *,
    volumes: Iterable[int],
    size: int = 64,
    batch: tuple[int, int] = (6, 2),
    device: str,
    at_once: int = 1,
    geometry: str = "strided",
    depth: int = 50,
    width: float = 1.0,
    say: Callable[[str], None] = lambda text: None,
    record: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Return {"machine", "size", "batch", "at_once", "rows"}: a row for each of `volumes` and of `RUNS`.

    A row has, in seconds and as medians over the processes: load_s (from the start of the process until torch and MONAI
    are loaded; 0 for later runs), set_up_s (network, cohort on the device, average, optimiser), first_epoch_s,
    later_epoch_s, and cost_s, all that goes before or beyond one usual epoch. Raises BenchError for no process or volume.
    """
    volumes = list(volumes)
    if at_once < 1 or not volumes or min(volumes) < 1:
        raise BenchError(f"{at_once} processes, {volumes} volumes: 1 or more of each")
    place = torch.device(device)
    machine = machine_facts(place)
    if place.type == "cuda":
        torch.cuda.empty_cache()  # the memory it measured with
    rows: list[dict[str, Any]] = []
    result = {
        "machine": machine,
        "size": size,
        "batch": f"{batch[0]}x{batch[1]}",
        "at_once": at_once,
        "rows": rows,
    }
    config = bench_config(size, *batch, depth=depth, width=width, geometry=geometry)
    for count in volumes:
        by_process = _measured(config, count, at_once, place.type)
        for run in RUNS:
            seen = [measured[run] for measured in by_process]
            row: dict[str, Any] = {"volumes": count, "run": run}
            row |= {name: statistics.median(one[name] for one in seen) for name in seen[0]}
            row["cost_s"] = (
                row["load_s"] + row["set_up_s"] + row["first_epoch_s"] - row["later_epoch_s"]
            )
            rows.append(row)
            say(
                f"{count} volumes, {run}: first epoch {row['first_epoch_s']:.1f} s, then {row['later_epoch_s']:.2f} s"
            )
        record(result)
    return result


def _measured(
    config: FineTuneConfig, volumes: int, at_once: int, kind: str
) -> list[dict[str, dict[str, float]]]:
    answers: SimpleQueue[dict[str, dict[str, float]]] = get_context("spawn").SimpleQueue()
    cohort, split = made_cohort(config, volumes)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "volumes.npy"
        np.save(file, cohort.volumes)
        # What travels to the processes
        without = dataclasses.replace(cohort, volumes=cohort.volumes[:0])  # type: ignore[arg-type]
        spawn(  # type: ignore[no-untyped-call]
            _process, (config, without, split, file, kind, time.time(), answers), nprocs=at_once
        )
    return [answers.get() for _ in range(at_once)]


def _process(
    _: int,
    config: FineTuneConfig,
    without: Cohort,
    split: Split,
    file: Path,
    kind: str,
    began: float,
    answers: "SimpleQueue[dict[str, dict[str, float]]]",
) -> None:
    load_s = time.time() - began  # the clock of the machine: another process has looked at it first
    torch.set_num_threads(1)
    cohort = dataclasses.replace(without, volumes=np.load(file, mmap_mode="r"))

    def run() -> dict[str, float]:
        return _run(config, cohort, split, torch.device(kind))

    found = {"new process": {"load_s": load_s, **in_training_thread(run)}}
    found["same thread"] = {"load_s": 0.0, **in_training_thread(run)}

    def apart() -> None:
        found["new thread"] = {"load_s": 0.0, **run()}

    thread = threading.Thread(target=apart)
    thread.start()
    thread.join()
    answers.put(found)


def _run(
    config: FineTuneConfig, cohort: Cohort, split: Split, device: torch.device
) -> dict[str, float]:
    started = time.perf_counter()
    run = Run(config, cohort, split, device)
    set_up_s = time.perf_counter() - started
    first, *later = (run.train_one_epoch(None)["epoch_s"] for _ in range(1 + LATER))
    run.put_away()
    return {"set_up_s": set_up_s, "first_epoch_s": first, "later_epoch_s": statistics.median(later)}


def start_table(result: dict[str, Any]) -> Table:
    """Return the rows as a Rich table."""
    at_once = result["at_once"]
    table = Table(
        title=f"{result['machine']['name']}, torch {result['machine']['torch']}, {result['size']} voxels, "
        f"batch {result['batch']}, {at_once} process{'es at once' if at_once > 1 else ''}",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for name in (
        "volumes",
        "run",
        "load\ns",
        "set-up\ns",
        "first\nepoch s",
        "later\nepochs s",
        "cost\ns",
    ):
        table.add_column(name, justify="left" if name == "run" else "right")
    for row in result["rows"]:
        seconds = [
            row[name] for name in ("load_s", "set_up_s", "first_epoch_s", "later_epoch_s", "cost_s")
        ]
        table.add_row(str(row["volumes"]), row["run"], *(f"{value:.2f}" for value in seconds))
    return table
