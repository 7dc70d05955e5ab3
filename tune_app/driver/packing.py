"""How many trials share a GPU: measured on the study's own cohort and configuration, not guessed."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray

from trainables.config import FineTuneConfig
from trainables.data.folds import Split
from trainables.ray_trainable import wait_for_device_memory

CANDIDATES = (1, 2, 4, 8)
"""Trials on one GPU that are tried, in this order, until more of them bring nothing."""

WORTH = 1.05
"""Factor in total throughput that a denser packing must bring: each trial gets slower by it, and ASHA waits longer."""

MEMORY_SHARE = 0.9
"""Of the device memory that all trials together may take."""

PROBE_STEPS = 60
"""Optimiser steps of an epoch of a probe."""

PROBE_EPOCHS = 3
"""Epochs that are measured; the one before them warms up."""


class Window(NamedTuple):
    """What one probe trained while all did."""

    began: float
    """Seconds of the machine's clock, as `ended`."""
    ended: float
    volumes: int
    memory_gib: float
    total_gib: float
    """Of the device."""


def total_throughput(windows: Sequence[Window]) -> float:
    """Return the volumes a second of all probes together, from the first one's beginning to the last one's end.

    The sum of each probe's own rate would count what ran alone as if it had shared the GPU.
    """
    began, ended = min(window.began for window in windows), max(window.ended for window in windows)
    return sum(window.volumes for window in windows) / (ended - began)


def pick_packing(volumes_per_s: Mapping[int, float]) -> int:
    """Return how many trials a GPU should hold, given the total throughput with each number of them.

    The smallest number that no larger one beats by more than 5 %. Raises ValueError for no measurement.
    """
    if not volumes_per_s:
        raise ValueError("no packing could be measured")
    chosen = min(volumes_per_s)
    for number in sorted(volumes_per_s):
        if volumes_per_s[number] > WORTH * volumes_per_s[chosen]:
            chosen = number
    return chosen


def measure_packing(
    config: FineTuneConfig,
    table: str,
    cohort: str,
    *,
    candidates: tuple[int, ...] = CANDIDATES,
    device: str = "cuda",
) -> dict[int, float]:
    """Return the total throughput, volumes a second, of 1, 2, 4 ... short runs at once on one GPU of this Ray.

    Stops early when memory would not hold the next packing, or it brought less than the one before. On `device="cpu"`
    the runs share CPUs instead, for tests.
    """
    totals: dict[int, float] = {}
    for number in candidates:
        try:
            windows = measure_together(number, config, table, cohort, device=device)
        except ray.exceptions.RayTaskError as error:
            if "out of memory" not in str(error).lower() or not totals:
                raise
            break
        totals[number] = total_throughput(windows)
        if len(totals) > 1 and totals[number] < list(totals.values())[-2]:
            break
        if (
            device == "cuda"
            and 2 * sum(one.memory_gib for one in windows) > MEMORY_SHARE * windows[0].total_gib
        ):
            break
    return totals


def measure_together(
    number: int, config: FineTuneConfig, table: str, cohort: str, *, device: str
) -> list[Window]:
    """Return what each of `number` short runs did while all ran: none is timed before the last one has warmed up."""
    share = {"num_gpus": 1 / number} if device == "cuda" else {"num_cpus": 1}
    probes = [
        ray.remote(_Probe).options(**share).remote(config, table, cohort, device)
        for _ in range(number)
    ]
    try:
        ray.get([probe.warm_up.remote() for probe in probes], timeout=600)
        windows: list[Window] = ray.get([probe.measure.remote() for probe in probes], timeout=600)
    finally:
        for probe in probes:
            ray.kill(probe)
    return windows


class _Probe:
    """One short run over a part of the training fold: its first epoch warms up, the others are timed."""

    def __init__(self, config: FineTuneConfig, table: str, cohort: str, device: str) -> None:
        self.config, self.table, self.cohort, self.device = config, table, cohort, device
        self.epochs: Iterator[Any] = iter(())
        self.volumes = 0

    def warm_up(self) -> None:
        from trainables.finetune import finetune
        from trainables.saved_run import open_inputs

        if self.device == "cuda":
            wait_for_device_memory(0.0)
        data, split = open_inputs(self.config, self.table, self.cohort)
        step = self.config.batch_size * self.config.gradient_accumulation_steps
        wanted = min(len(split.train), step * (PROBE_STEPS if self.device == "cuda" else 2))
        # Every class must stay: volumes are taken from each class in turn.
        labels = data.labels[split.train]
        turn = np.empty(len(labels), dtype=np.int64)
        for label in np.unique(labels):
            turn[labels == label] = np.arange((labels == label).sum())
        part = Split(
            np.sort(split.train[np.argsort(turn, kind="stable")[:wanted]]),
            split.val[:2],
            split.test,
        )
        short = self.config.model_copy(
            update={"epochs": 1 + PROBE_EPOCHS, "warmup_epochs": 0.0, "train_auc_volumes": 0}
        )
        self.epochs, self.volumes = (
            finetune(short, data, part, device=self.device),
            PROBE_EPOCHS * wanted,
        )
        next(self.epochs)

    def measure(self) -> Window:
        import torch

        began = time.time()
        for _ in self.epochs:
            pass
        ended = time.time()
        cuda = self.device == "cuda"
        return Window(
            began=began,
            ended=ended,
            volumes=self.volumes,
            memory_gib=torch.cuda.max_memory_reserved() / 2**30 if cuda else 0.0,
            total_gib=torch.cuda.mem_get_info()[1] / 2**30 if cuda else 0.0,
        )
