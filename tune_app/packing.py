"""How many trials share a GPU: measured on the study's own cohort and configuration, not guessed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import ray

from trainables.config import FineTuneConfig
from trainables.manifest import Split
from trainables.ray_trainable import wait_for_device_memory

CANDIDATES = (1, 2, 4, 8)
"""Trials on one GPU that are tried, in this order, until more of them bring nothing."""

WORTH = 1.05
"""Factor in total throughput that a denser packing must bring: each trial gets slower by it, and ASHA waits longer."""

MEMORY_SHARE = 0.9
"""Of the device memory that all trials together may take."""

PROBE_STEPS = 60
"""Optimiser steps of the measured epoch; the one before it warms up and is not counted."""


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
    config: FineTuneConfig, table: str, cohort: str, *, candidates: tuple[int, ...] = CANDIDATES, device: str = "cuda"
) -> dict[int, float]:
    """Return the total throughput, volumes a second, of 1, 2, 4 ... short runs at once on one GPU of this Ray.

    Stops early when memory would not hold the next packing, or it brought less than the one before. On `device="cpu"`
    the runs share CPUs instead, for tests.
    """
    totals: dict[int, float] = {}
    for number in candidates:
        share = {"num_gpus": 1 / number} if device == "cuda" else {"num_cpus": 1}
        probes = [ray.remote(_Probe).options(**share).remote() for _ in range(number)]
        try:
            measured = ray.get([probe.run.remote(config, table, cohort, device) for probe in probes], timeout=600)
        except ray.exceptions.RayTaskError as error:
            if "out of memory" not in str(error).lower() or not totals:
                raise
            break
        finally:
            for probe in probes:
                ray.kill(probe)
        totals[number] = sum(one["volumes_per_s"] for one in measured)
        if len(totals) > 1 and totals[number] < list(totals.values())[-2]:
            break
        if (
            device == "cuda"
            and 2 * sum(one["memory_gib"] for one in measured) > MEMORY_SHARE * measured[0]["total_gib"]
        ):
            break
    return totals


class _Probe:
    """One short run: two epochs over a part of the training fold, of which the second is timed."""

    def run(self, config: FineTuneConfig, table: str, cohort: str, device: str) -> dict[str, Any]:
        import torch

        from trainables.finetune import finetune
        from trainables.saved_run import open_inputs

        if device == "cuda":
            wait_for_device_memory(0.0)
        data, split = open_inputs(config, table, cohort)
        step = config.batch_size * config.gradient_accumulation_steps
        wanted = min(len(split.train), step * (PROBE_STEPS if device == "cuda" else 2))
        # Every class must stay: volumes are taken from each class in turn.
        labels = data.labels[split.train]
        turn = np.empty(len(labels), dtype=np.int64)
        for label in np.unique(labels):
            turn[labels == label] = np.arange((labels == label).sum())
        part = Split(np.sort(split.train[np.argsort(turn, kind="stable")[:wanted]]), split.val[:2], split.test)
        short = config.model_copy(update={"epochs": 2, "warmup_epochs": 0.0, "train_auc_volumes": 0})
        *_, last = finetune(short, data, part, device=device)
        free_and_total = torch.cuda.mem_get_info() if device == "cuda" else (0, 0)
        reserved = torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else 0.0
        return {
            "volumes_per_s": last.metrics["volumes_per_s"],
            "memory_gib": reserved,
            "total_gib": free_and_total[1] / 2**30,
        }
