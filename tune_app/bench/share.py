"""`medtune bench share`: what trials that share one GPU train together, in turns and side by side under CUDA MPS.

Runs of `finetune` in processes of their own, as trials are: each has the cohort on the device, trains whole epochs and
validates raw and averaged weights. For each mode the processes start once; for each size all of them train one epoch, in
which they choose algorithms and compile; then 1, 4, 8 ... of them train at the same time, the others wait. A rate counts
the training volumes of all from the first one's beginning to the last one's end, so validation is included.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from trainables import mps
from trainables.config import FineTuneConfig
from trainables.data.folds import Split
from trainables.data.volumes import Cohort
from tune_app.bench.search import machine
from tune_app.bench.train import BenchError, bench_config, made_cohort
from tune_app.results.tables import plain_table

MODES: dict[str, mps.Mode] = {"turns": "off", "mps": "on"}
"""How processes share the GPU -> their argument to `mps.join`."""

VALIDATION = 257
"""Validation volumes: a fifth of AdrenalMNIST3D's training and validation volumes."""


class _Work(NamedTuple):
    """The training of a process: the cohort's volumes are in a file."""

    config: FineTuneConfig
    cohort: Cohort
    split: Split
    file: Path
    device: str


def bench_share(
    *,
    sizes: Iterable[int] = (28, 64, 96),
    at_once: Iterable[int] = (1, 4, 8),
    modes: Iterable[str] = tuple(MODES),
    volumes: int = 1029,
    batch: tuple[int, int] = (6, 2),
    epochs: int = 2,
    device: str = "cuda",
    depth: int = 50,
    width: float = 1.0,
    say: Callable[[str], None] = lambda text: None,
    record: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Return {"machine", "volumes", "batch", "rows"}: a row for each mode, size and number of processes.

    A row has mode, standing (how the processes shared, in words), size, at_once, volumes_per_s (of all together),
    epoch_s (mean of one epoch of one process), warm_up_s (the first epoch of all processes at once, longest) and
    memory_gib (of one process, by torch's allocator; 0 on a CPU). Raises BenchError for unknown modes, for MPS where it is
    not possible, and when a process ends with an error.
    """
    numbers, wanted = sorted(set(at_once)), list(modes)
    if unknown := sorted(set(wanted) - set(MODES)):
        raise BenchError(f"modes {', '.join(unknown)}: there are {', '.join(MODES)}")
    if not numbers or numbers[0] < 1:
        raise BenchError(f"processes {numbers}: numbers from 1")
    rows: list[dict[str, Any]] = []
    result = {
        "machine": machine("torch", "monai"),
        "volumes": volumes,
        "batch": f"{batch[0]}x{batch[1]}",
        "rows": rows,
    }
    with tempfile.TemporaryDirectory() as folder:
        works = {}
        for size in sizes:
            config = bench_config(size, *batch, depth=depth, width=width)
            works[size] = _work(config, volumes, Path(folder) / f"{size}.npy", device)
        for mode in wanted:
            for row in _measured(mode, works, numbers, epochs):
                rows.append(row)
                say(
                    f"{row['size']} voxels, {row['at_once']} at once, {mode}: "
                    f"{row['volumes_per_s']:.0f} volumes/s"
                )
                record(result)
    return result


def _work(config: FineTuneConfig, volumes: int, file: Path, device: str) -> _Work:
    cohort, split = made_cohort(config, volumes + VALIDATION)
    rows = np.concatenate([split.train, split.val])
    np.save(file, cohort.volumes)
    without = dataclasses.replace(cohort, volumes=cohort.volumes[:0])  # type: ignore[arg-type]
    parts = Split(rows[:volumes], rows[volumes : volumes + VALIDATION], rows[:0])
    return _Work(config, without, parts, file, device)


def _measured(
    mode: str, works: dict[int, _Work], numbers: list[int], epochs: int
) -> Iterator[dict[str, Any]]:
    """Rows of one mode; its processes end with the iterator."""
    begun = [started(_train, MODES[mode]) for _ in range(numbers[-1])]
    ends = [end for _, end in begun]
    try:
        standing, *_ = map(_answer, ends)
        for size, work in works.items():
            warm_up_s, memory_gib = map(max, zip(*_all_answer(ends, work), strict=True))
            for number in numbers:
                begins, stops = zip(*_all_answer(ends[:number], epochs), strict=True)
                seconds = max(stops) - min(begins)
                yield {
                    "mode": mode,
                    "standing": standing,
                    "size": size,
                    "at_once": number,
                    "volumes_per_s": number * epochs * len(work.split.train) / seconds,
                    "epoch_s": (sum(stops) - sum(begins)) / number / epochs,
                    "warm_up_s": warm_up_s,
                    "memory_gib": memory_gib,
                }
    finally:
        for end in ends:
            end.close()
        for process, _ in begun:
            process.join(10)
            process.kill()


def started(work: Callable[..., None], *arguments: Any) -> tuple[SpawnProcess, Connection]:
    """Start a process of its own that does `work`, given the `arguments` and its end of a pipe; returns it and our end."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _all_answer(ends: list[Connection], question: Any) -> list[Any]:
    for end in ends:
        end.send(question)
    return [_answer(end) for end in ends]


def _answer(end: Connection) -> Any:
    try:
        return end.recv()
    except EOFError:
        raise BenchError("a process ended with an error: see above") from None


def _train(mode: mps.Mode, asked: Connection) -> None:
    """One process: a `_Work` starts a run and answers (seconds, GiB); a number trains that many epochs, (begin, end)."""
    asked.send(mps.join(mode).text)
    import torch

    from trainables.finetune import finetune

    torch.set_num_threads(1)
    run: Any = None
    while True:
        try:
            question = asked.recv()
        except EOFError:
            return
        began = time.time()
        if isinstance(question, _Work):
            if run is not None:
                run.close()
            cohort = dataclasses.replace(
                question.cohort, volumes=np.load(question.file, mmap_mode="r")
            )
            run = finetune(question.config, cohort, question.split, device=question.device)
            next(run)
            cuda = question.device == "cuda"
            gib = torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0
            asked.send((time.time() - began, gib))
        else:
            for _ in range(question):
                next(run)
            asked.send((began, time.time()))


def share_table(result: dict[str, Any]) -> Table:
    """Return the rates as a Rich table: a row for each size and number of processes, a column for each mode."""
    modes = list(dict.fromkeys(row["mode"] for row in result["rows"]))
    compared = modes == list(MODES)
    table = plain_table("voxels", "processes", *modes, *["x turns"] * compared)
    table.title = f"volumes/s of all processes together, {result['volumes']} training volumes, batch {result['batch']}"
    rates: dict[tuple[int, int], dict[str, float]] = {}
    for row in result["rows"]:
        rates.setdefault((row["size"], row["at_once"]), {})[row["mode"]] = row["volumes_per_s"]
    for (size, number), found in rates.items():
        of_modes = [found.get(mode) for mode in modes]
        cells = ["" if cell is None else f"{cell:.0f}" for cell in (size, number, *of_modes)]
        if compared and None not in of_modes:
            cells.append(f"{of_modes[1] / of_modes[0]:.2f}")  # type: ignore[operator]
        table.add_row(*cells)
    table.caption = "\n".join(dict.fromkeys(row["standing"] for row in result["rows"]))
    return table
