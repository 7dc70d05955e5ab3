"""How many trials share a GPU: measured on the study's own cohort and configuration, and remembered in the cache.

Processes as trials are start at the same time and load what trials load. The first one trains alone, which gives the
memory that a trial takes, and with it the most trials that a GPU can hold. Then that number of processes warm up
together, and 1, 2, 4 ... of them train at the same time, under CUDA MPS where trials will. The result is kept for the
same kind of GPU, configuration, size of the cohort and versions; another study of these does not measure again.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray

from trainables import installed_version, mps
from trainables.checkpoints import write_json
from trainables.config import FineTuneConfig
from trainables.data.folds import Split
from trainables.data.json_files import read_json
from trainables.kernel_cache import keep_kernels, step_digest
from trainables.ray_trainable import wait_for_device_memory
from tune_app.driver.resources import ACCELERATOR
from tune_app.study.heaviest import heaviest
from tune_app.study.spec import StudySpec

MOST = 8
"""Trials on one GPU that are tried at most: 1, 2, 4 and 8."""

WORTH = 1.05
"""Factor in total throughput that a denser packing must bring: each trial gets slower by it, and ASHA waits longer."""

MEMORY_SHARE = 0.9
"""Of the free device memory that all trials together may take."""

CONTEXT_GIB = 0.6
"""What CUDA takes of a GPU for each process, besides what torch reserves."""

PROBE_STEPS = 60
"""Optimiser steps of an epoch of a probe."""

PROBE_EPOCHS = 2
"""Epochs that are measured; the one before them warms up."""

PROBE_S = 600.0
"""Seconds that a probe may take to load and to warm up, and to be measured."""


class Window(NamedTuple):
    """What one probe trained while all did."""

    began: float
    """Seconds of the machine's clock, as `ended`."""
    ended: float
    volumes: int


class Memory(NamedTuple):
    """Memory that a probe measured when it was alone, in GiB."""

    taken: float
    """By a trial: network, activations, the cohort on the device, CUDA itself."""
    free: float
    """Of the device, while the probe runs."""


@dataclass(frozen=True)
class Packing:
    """How many trials a GPU holds, and why."""

    number: int
    totals: dict[int, float]
    """Volumes/s of all together, by number of trials."""
    origin: str
    """Where this is from, in words."""

    @property
    def text(self) -> str:
        if not self.totals:
            return f"packing: {self.number} trial per GPU ({self.origin})"
        told = ", ".join(f"{count} at once {total:.0f}" for count, total in self.totals.items())
        return f"packing: {self.number} per GPU ({told} volumes/s; {self.origin})"


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


def most_that_fit(memory: Memory, most: int) -> int:
    """Return how many trials, `most` at most, a GPU's memory holds: the one that was measured, and others next to it."""
    return max(1, min(most, 1 + int(MEMORY_SHARE * memory.free / memory.taken)))


def most_of_use(spec: StudySpec, resources: Mapping[str, float]) -> int:
    """Return the most trials that a GPU can get: by CPUs, and by the number that the study allows and needs."""
    gpus = max(1, int(resources.get("GPU", 0)))
    limits = [resources.get("CPU", 1.0) // spec.cpus_per_rank, spec.num_trials]
    limits += [spec.max_concurrent] if spec.max_concurrent else []
    return max(1, min(MOST, *(-(-int(limit) // gpus) for limit in limits)))


def packing_for(
    spec: StudySpec, table: str, cohort: Path, resources: Mapping[str, float], cache: Path
) -> Packing:
    """Return how many trials each GPU of this Ray should hold: remembered in the folder `cache`, or measured now."""
    most = most_of_use(spec, resources)
    if most == 1:
        return Packing(1, {}, "there is room or need for no more")
    config = heaviest(spec)
    key = _key(spec, config, cohort, resources, most)
    file = cache / "packing.json"
    known = _read(file)
    if (entry := known.get(key)) is not None:
        totals = {int(number): float(total) for number, total in entry["totals"].items()}
        return Packing(pick_packing(totals), totals, f"remembered from {entry['date']}")
    began = time.monotonic()
    totals = measure_packing(
        config, table, str(cohort), most=most, mode=spec.mps, cpus=spec.cpus_per_rank
    )
    cache.mkdir(parents=True, exist_ok=True)
    write_json(
        file,
        {**_read(file), key: {"totals": totals, "date": time.strftime("%Y-%m-%d")}},
    )
    return Packing(pick_packing(totals), totals, f"measured in {time.monotonic() - began:.0f} s")


def _read(file: Path) -> dict[str, Any]:
    """The remembered results; empty where the file is damaged: they are measured again."""
    try:
        known = read_json(file)
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _key(
    spec: StudySpec,
    config: FineTuneConfig,
    cohort: Path,
    resources: Mapping[str, float],
    most: int,
) -> str:
    kinds = sorted(name for name in resources if name.startswith(ACCELERATOR))
    return step_digest(
        config,
        gpus=[gpu.name for gpu in mps.visible_gpus()[:1]] or kinds,
        asked=spec.accelerator_type,
        mps=spec.mps,
        cpus=spec.cpus_per_rank,
        most=most,
        cohort=cohort.name,
        versions=[installed_version(name) for name in ("medtune", "torch")],
    )


def measure_packing(
    config: FineTuneConfig,
    table: str,
    cohort: str,
    *,
    most: int = MOST,
    mode: mps.Mode = "auto",
    cpus: int = 1,
    device: str = "cuda",
) -> dict[int, float]:
    """Return the total throughput, volumes/s, of 1, 2, 4 ... up to `most` short runs at once on one GPU of this Ray.

    No more are tried than the GPU's memory holds, and no more once a number was slower than the one before. On
    `device="cpu"` the runs share CPUs instead, for tests.
    """
    share = {"num_gpus": 1 / most, "num_cpus": cpus} if device == "cuda" else {"num_cpus": 1}
    probes = [
        ray.remote(_Probe).options(**share).remote(config, table, cohort, device, mode)
        for _ in range(most)
    ]
    totals: dict[int, float] = {}
    try:
        loading = [probe.load.remote() for probe in probes]
        memory: Memory = ray.get(probes[0].warm_up.remote(), timeout=PROBE_S)
        fit = most_that_fit(memory, most) if device == "cuda" else most
        ray.get(loading[:fit], timeout=PROBE_S)
        ray.get([probe.warm_up.remote() for probe in probes[1:fit]], timeout=PROBE_S)
        for power in range(fit.bit_length()):
            number = 2**power
            windows = ray.get(
                [probe.measure.remote() for probe in probes[:number]], timeout=PROBE_S
            )
            totals[number] = total_throughput(windows)
            if totals[number] < totals.get(number // 2, 0.0):
                break
    finally:
        for probe in probes:
            ray.kill(probe)
    return totals


class _Probe:
    """One short run over a part of the training fold: its first epoch warms up, the others are timed."""

    def __init__(
        self, config: FineTuneConfig, table: str, cohort: str, device: str, mode: mps.Mode
    ) -> None:
        self.config, self.table, self.cohort, self.device = config, table, cohort, device
        self.mode = mode
        self.epochs: Iterator[Any] = iter(())
        self.volumes = 0

    def load(self) -> None:
        """Settle how the GPU is shared, and load the same modules as a trial."""
        if self.device == "cuda":
            mps.join(self.mode)
            keep_kernels(Path(self.cohort).parent)
        import trainables.finetune
        import trainables.saved_run  # noqa: F401

    def warm_up(self) -> Memory:
        import torch

        from trainables.data.resident import RESIDENT_SHARE
        from trainables.finetune import finetune
        from trainables.saved_run import open_inputs

        cuda = self.device == "cuda"
        if cuda:
            wait_for_device_memory(0.0)
        data, split = open_inputs(self.config, self.table, self.cohort)
        step = self.config.batch_size * self.config.gradient_accumulation_steps
        wanted = min(len(split.train), step * (PROBE_STEPS if cuda else 2))
        part = Split(_of_each_class(split.train, data.labels, wanted), split.val[:2], split.test)
        endless = self.config.model_copy(
            update={"epochs": 10_000, "warmup_epochs": 0.0, "train_auc_volumes": 0}
        )
        self.epochs, self.volumes = finetune(endless, data, part, device=self.device), wanted
        next(self.epochs)
        if not cuda:
            return Memory(0.0, 0.0)
        free, total = torch.cuda.mem_get_info()
        each = data.volumes[0].nbytes
        whole = each * (len(split.train) + len(split.val))
        missing = whole - each * (wanted + len(part.val)) if whole < RESIDENT_SHARE * total else 0
        taken = torch.cuda.max_memory_reserved() + missing
        return Memory(taken / 2**30 + CONTEXT_GIB, (free - missing) / 2**30)

    def measure(self) -> Window:
        began = time.time()
        for _ in range(PROBE_EPOCHS):
            next(self.epochs)
        return Window(began=began, ended=time.time(), volumes=PROBE_EPOCHS * self.volumes)


def _of_each_class(rows: np.ndarray, labels: np.ndarray, wanted: int) -> np.ndarray:
    """`wanted` of the rows, taken from each class in turn: every class must stay."""
    of_rows = np.asarray(labels)[rows]
    turn = np.empty(len(rows), dtype=np.int64)
    for label in np.unique(of_rows):
        turn[of_rows == label] = np.arange((of_rows == label).sum())
    return np.asarray(np.sort(rows[np.argsort(turn, kind="stable")[:wanted]]))
