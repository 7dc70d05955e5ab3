"""`medtune bench ranks`: whole training steps of one run over 1, 2, ... GPUs, each with a separate share.

The batch of a GPU stays the same, so the batch of a step grows with the GPUs, and an epoch here has as many steps each
time: perfect scaling is N times the volumes per second. The ranks are processes of this machine, without Ray: the
measurement is of `finetune` over `torch.distributed`. Random volumes; scores mean nothing.
"""

import math
import socket
import statistics
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch.multiprocessing.spawn import spawn

from trainables.config import FineTuneConfig
from trainables.finetune import Run
from tune_app.bench.train import BenchError, bench_config, machine_facts, made_cohort

MEASURED_EPOCHS = 5


def bench_ranks(
    *,
    sizes: Iterable[int],
    worlds: Iterable[int],
    batch: tuple[int, int],
    device: str,
    depth: int = 50,
    width: float = 1.0,
    steps: int = 24,
    say: Callable[[str], None] = lambda text: None,
    record: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Return {"machine", "steps_per_epoch", "batch", "rows"}; a row has size, ranks, volumes_per_s, ms_per_step, efficiency.

    `batch`: batch size of a GPU and accumulation steps. `efficiency` is the throughput over ranks times that of the
    first of `worlds` a rank. volumes_per_s is the median over epochs after the first. Raises BenchError when there are
    fewer GPUs than ranks; on the CPU ranks share its cores.
    """
    place = torch.device(device)
    worlds = list(worlds)
    if place.type == "cuda" and max(worlds) > torch.cuda.device_count():
        raise BenchError(f"{max(worlds)} ranks: there are {torch.cuda.device_count()} GPUs here")
    batch_size, accumulation = batch
    rows: list[dict[str, Any]] = []
    result = {
        "machine": machine_facts(place),
        "steps_per_epoch": steps,
        "batch": f"{batch_size}x{accumulation}",
    }
    result |= {"depth": depth, "width": width, "rows": rows}
    for size in sizes:
        config = bench_config(size, batch_size, accumulation, depth=depth, width=width)
        first: float | None = None
        for world in worlds:
            measured = _measured(config, world, steps, place.type)
            rate = measured["volumes_per_s"]
            first = rate / world if first is None else first
            rows.append(
                {"size": size, "ranks": world, **measured, "efficiency": rate / (world * first)}
            )
            say(
                f"{size} voxels, {world} ranks: {rate:.0f} volumes/s, {measured['ms_per_step']:.1f} ms a step"
            )
            record(result)
    return result


def _measured(config: FineTuneConfig, world: int, steps: int, kind: str) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers: SimpleQueue[dict[str, Any]] = get_context("spawn").SimpleQueue()
    spawn(_rank, (world, port, config, steps, kind, answers), nprocs=world)  # type: ignore[no-untyped-call]
    return answers.get()


def _rank(
    rank: int,
    world: int,
    port: int,
    config: FineTuneConfig,
    steps: int,
    kind: str,
    answers: "SimpleQueue[dict[str, Any]]",
) -> None:
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world,
            device_id=device if kind == "cuda" else None,
        )
    step_size = config.batch_size * config.gradient_accumulation_steps * world
    cohort, split = made_cohort(config, steps * step_size)
    run = Run(config, cohort, split, device)
    first = run.train_one_epoch(None)["epoch_s"]
    rates = [run.train_one_epoch(None)["volumes_per_s"] for _ in range(MEASURED_EPOCHS)]
    rate = statistics.median(rates)
    if rank == 0:
        row = {
            "volumes_per_s": rate,
            "ms_per_step": 1e3 * step_size / rate,
            "captured": run.step.graph is not None,
            "first_epoch_s": first,
        }
        answers.put(row | {"slowest": min(rates), "fastest": max(rates)})
    run.put_away()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def ranks_table(result: dict[str, Any]) -> Table:
    """Return the rows as a Rich table."""
    table = Table(
        title=f"{result['machine']['name']}, torch {result['machine']['torch']}, batch {result['batch']} a rank"
    )
    for name in ("voxels", "ranks", "volumes/s", "ms/step", "times one", "efficiency"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        rate, times = row["volumes_per_s"], row["efficiency"] * row["ranks"]
        digits = 0 if rate >= 100 else 3 - math.ceil(math.log10(max(rate, 0.01)))
        table.add_row(
            str(row["size"]), str(row["ranks"]), f"{rate:.{digits}f}", f"{row['ms_per_step']:.1f}", f"{times:.2f}",
            f"{row['efficiency']:.0%}",
        )  # fmt: skip
    return table
