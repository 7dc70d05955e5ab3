"""The recipe: a config, a prepared cohort and a split -> an iterator of one EpochResult an epoch.

`finetune` needs no callback, logger or Ray: a test is `list(finetune(config, cohort, split, device="cpu"))`. It reads
rank and world size from `torch.distributed` where that is initialised, and never initialises it.

`trainables.schedule` plans each epoch and step, `trainables.step` executes it, `trainables.validation` scores the
networks after an epoch; here is the run that they make up.

How the parts of a step fit together, and why nothing in an epoch waits for the GPU:

* A step's volumes are cut into micro-batches; micro-batch `a * world + r` goes to rank r. W ranks with A accumulation
  steps therefore see the very micro-batches of one rank with A * W, and differ from it in rounding only.
* Losses are weighted a sample and divided by the sample count of the whole step over all ranks: a mean of means
  would weigh a partial micro-batch too much, and a weighted mean over one class would cancel the weight.
* Gradients are summed over the ranks once a step (`trainables.gradient_sum`), during the last backward pass, instead of
  by DistributedDataParallel: there is no wrapper to renew when stages thaw, and no sync to suppress in between. In an
  fp16 run those of convolutions, computed in fp16, are added up in it.
* BatchNorm's running statistics are combined over the ranks once an epoch, so that they are those of one rank with all
  micro-batches (`trainables.network.batchnorm.SharedStatistics`): validation scores are those of one rank, too.
* Unscaling and clipping are one multiplication by a factor computed on the device. A step whose gradient norm is not
  finite is skipped on the device, in the optimiser and in the average alike (fp16, bf16 and float32), and counted.
* Random numbers are seeded afresh from (seed, epoch, rank) each epoch, so a resumed run needs no random state.
* On GPUs with the cohort resident, a whole step (batch, augmentation, passes, sum over the ranks, clip, optimiser,
  average, loss scale) is one CUDA graph: launched one by one its kernels leave an H200 idle two thirds of the time.
  Values that change between steps are in tensors that keep their place: where the step begins in the epoch's order, rates,
  class weights, random seeds. So only another set of trainable stages needs another capture; a partial last step runs
  eagerly, on the same stream.
* State that the next trial of a process can use again stays: the cohort on the device (`trainables.data.resident`), and
  torch's measurements of convolutions, as all trials train in one thread (`trainables.training_thread`).
* On a GPU the micro-batches of a step go through the network together where their activations fit, BatchNorm taking each
  separately (`trainables.network.batchnorm`): the numbers are those of one after the other, up to rounding.

What each lever is worth, on an H200 with ResNet-50, 96 voxels, strided, 2 micro-batches of 6, whole steps in ms (`medtune
bench train`, and the same run with one lever taken back): all of it 12.1, and 10.9 with the last two of
this list; without the fused BatchNorm and with the micro-batches one after the other 16.0; only the latter 15.2; with the stem
as cuDNN runs it 13.8; with torch's max-pool 12.6; with 1x1x1 convolutions by cuDNN 12.3; without augmentation 11.6.
The forward stem as a convolution of 16 channels and two outputs at once instead of 8 and one: 1.7 to 0.7 ms. BatchNorm's
reductions with loads running ahead and half the programs: a fifth faster.

On a CPU a step costs as much as the plain loop's, and augmentation a sixth of it more (mostly `grid_sample`; `medtune
bench train --variants plain,unaugmented,ours`). Channels-last memory there is 1.2 to 1.6 times as fast for ResNet-10 at
quarter width and 48 or 64 voxels, but takes 1.3 to 1.5 times as long for ResNet-50: not used.

No gain: bf16 instead of fp16 (12.1 either way). Remaining cost: the GPU is busy 96 % of the step with some
thousand kernels. BatchNorm takes 3.0 ms, its passes over memory near the card's 4.3 TB/s, its sums at half of it;
convolutions of layers 3 and 4 are too small at 96 voxels to fill the chip (batch 24: 1,346 volumes/s against 1,103);
arithmetic alone would take 1.6 ms. Not tried: gradients of the two paths into a block added inside BatchNorm's backward
(0.3 ms), weights kept in half precision (0.2 to 0.4), BatchNorm's second small kernels folded away (0.4).
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from trainables.config import RULES, ConfigError, FineTuneConfig, cannot_run
from trainables.data.folds import Split
from trainables.data.resident import Volumes
from trainables.data.volumes import Cohort
from trainables.machine.this_machine import peak_resident_gib
from trainables.network.model import STAGES, Classifier, configured_network
from trainables.network.weights import load_pretrained
from trainables.schedule import Schedule, seed_of
from trainables.step import Ranks, TrainingStep
from trainables.validation import Validation


class ResumeError(RuntimeError):
    """A checkpoint that does not belong to this run."""


@dataclass(frozen=True)
class EpochResult:
    """What one epoch came to; equal on all ranks, wall times apart."""

    epoch: int
    """1-based."""
    metrics: dict[str, Any]
    """One flat row: numbers, booleans and short texts, NaN where a score does not exist."""
    state: Callable[[], dict[str, Any]]
    """Everything needed to continue from here, as tensors and plain values; call it before asking for the next epoch."""


def finetune(
    config: FineTuneConfig,
    cohort: Cohort,
    split: Split,
    *,
    device: torch.device | str = "cpu",
    resume: Mapping[str, Any] | None = None,
    heartbeat: Callable[[int, int], None] | None = None,
    graphs: bool = True,
    rules: int = RULES,
) -> Iterator[EpochResult]:
    """Fine-tune on `split.train`, validate on `split.val`; yield an EpochResult after each epoch.

    `resume` is an earlier result's `state()`: the run continues after its epoch, bit for bit on a CPU.
    `heartbeat` is called with (epoch, step) whenever a step has been issued: it is how a hanging rank is noticed.
    `graphs=False` issues every kernel separately on a GPU too; the numbers are the same.
    `rules` are those of the study the run belongs to; a checkpoint's own go before them.

    Raises WeightsError when the pretrained file does not fill the backbone, ResumeError when the checkpoint is of
    another run, ValueError when a class has no training volume.
    """
    if resume is not None:
        check_checkpoint(resume, config)
        rules = int(resume["format"])
    run = Run(config, cohort, split, torch.device(device), graphs=graphs, rules=rules)
    if resume is not None:
        run.restore(resume)
    try:
        while run.epoch < config.epochs:
            metrics = run.train_one_epoch(heartbeat)
            yield EpochResult(run.epoch, metrics, run.snapshot)
    finally:
        run.put_away()  # a result may outlive the ranks, and NCCL waits for graphs that hold its collectives


class Run:
    """State of one run between epochs: `finetune` drives it, benchmarks measure it. Its steps, schedule and validation."""

    def __init__(
        self,
        config: FineTuneConfig,
        cohort: Cohort,
        split: Split,
        device: torch.device,
        *,
        graphs: bool = True,
        rules: int = RULES,
    ) -> None:
        self.config, self.device, self.rules = config, device, rules
        if device.type == "cuda":
            # Memory of the process's last run is still in its graphs' pools: this run and other processes could not use it.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        self.ranks = Ranks.here()
        if problems := cannot_run(config, ranks=self.ranks.world, gpu=device.type == "cuda"):
            raise ConfigError(problems)
        self.epoch = 0
        self.rows: list[dict[str, Any]] = []
        # cuBLAS's own condition for a deterministic run, which reads it once: a process may have run others before.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Unset too: the process may have run another trial before. Trilinear resampling has no deterministic kernel. Only
        # where it changes something, as torch loads its compiler here, which keeps in a circle the frames of this run.
        if config.deterministic or torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = device.type == "cuda" and not config.deterministic

        self.split = split
        self.labels = np.asarray(cohort.labels)
        self.class_counts = np.bincount(self.labels[split.train], minlength=config.num_classes)
        self.volumes = Volumes(cohort, np.concatenate([split.train, split.val]), device)

        torch.manual_seed(config.seed)
        # Drawn on the GPU: a ResNet-50's weights take a CPU half a second, between any two trials.
        with device if device.type == "cuda" else nullcontext():
            network = configured_network(config)
        if config.pretrained_path is not None:
            load_pretrained(network, config.pretrained_path)
        self.network: Classifier = _place(network, device)
        if config.sync_batchnorm and self.ranks.world > 1:
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.schedule = Schedule(config, volumes=len(split.train), world=self.ranks.world)
        self.step = TrainingStep(
            config,
            self.network,
            volumes=self.volumes,
            labels=self.labels,
            class_counts=self.class_counts,
            schedule=self.schedule,
            device=device,
            ranks=self.ranks,
            graphs=graphs,
            rules=rules,
        )
        self.average = self.step.average
        self.validation = Validation(self.step, split, np.asarray(cohort.subjects))

    def put_away(self) -> None:
        """Drop references that would keep the run on its device: graphs, and hooks, which form cycles with their modules."""
        self.step.put_away()
        self.validation.put_away()

    def train_one_epoch(self, heartbeat: Callable[[int, int], None] | None) -> dict[str, Any]:
        """Train and validate the next epoch; returns its row."""
        started = time.perf_counter()
        self.epoch += 1
        sums = self.train_part(heartbeat)
        trained = time.perf_counter()

        metrics = self._epoch_metrics(sums)
        metrics |= {
            "drw_active": self.schedule.drw_active(self.epoch),
            "frozen_stages": len(STAGES) - len(self.schedule.stages(self.epoch)),
        }
        metrics |= self.validation.metrics()
        ended = time.perf_counter()
        metrics |= {
            "precision": self.step.precision.name,
            "epoch_s": ended - started,
            "train_s": trained - started,
            "validation_s": ended - trained,
            "volumes_per_s": len(self.split.train) / (trained - started),
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        self.rows.append(metrics)
        return metrics

    def train_part(self, heartbeat: Callable[[int, int], None] | None = None) -> "StepSums":
        """The optimiser steps of the current epoch."""
        seed, rank = self.config.seed, self.ranks.rank
        step, steps = self.step, self.schedule.steps_per_epoch
        step.begin_epoch(self.epoch, self.schedule.order(self.epoch, self.split.train))
        self.network.train()
        torch.manual_seed(seed_of(seed, self.epoch, rank))
        step.generator.manual_seed(seed_of(seed, self.epoch, rank, 1))
        sums = torch.zeros(2, steps, device=self.device)
        norms = torch.zeros(1, steps, device=self.device)
        with step.on_own_stream():
            for number in range(steps):
                step.take(self.epoch, number)
                sums[0, number] = step.loss_sum
                sums[1, number] = step.plain_sum
                norms[0, number] = step.norm
                if heartbeat is not None:
                    heartbeat(self.epoch, number + 1)
        step.agree_on_buffers()
        if self.ranks.world > 1:
            dist.all_reduce(sums)
        # The one wait of the training part
        return StepSums(*torch.cat([sums, norms]).double().cpu().numpy())

    def _epoch_metrics(self, sums: "StepSums") -> dict[str, Any]:
        taken = np.isfinite(sums.norms_S)
        finite = sums.norms_S[taken]
        sizes_S = self.schedule.step_sizes
        clip = self.config.grad_clip
        by_name = {group["name"]: float(group["lr"]) for group in self.step.optimizer.param_groups}
        return {
            "epoch": self.epoch,
            "updates": int(self.average.updates),
            "skipped_updates": int(len(taken) - len(finite)),
            "train_loss": _ratio(sums.losses_S[taken].sum(), sizes_S[taken].sum()),
            "drw_loss_factor": _ratio(sums.losses_S[taken].sum(), sums.plain_losses_S[taken].sum()),
            "lr_backbone": by_name["backbone"],
            "lr_classifier": by_name["classifier"],
            "grad_norm": float(np.median(finite)) if len(finite) else math.nan,
            "grad_norm_max": float(finite.max()) if len(finite) else math.nan,
            "clipped_share": float((finite > clip).mean()) if clip > 0 and len(finite) else 0.0,
        }

    def snapshot(self) -> dict[str, Any]:
        """Return everything needed to continue after the current epoch."""
        return {
            "format": self.rules,
            "config": self.config.model_dump(mode="json"),
            "config_hash": self.config.hash(),
            "epoch": self.epoch,
            "rows": [dict(row) for row in self.rows],
            "train_rows": torch.from_numpy(self.split.train),
            "val_rows": torch.from_numpy(self.split.val),
            **self.step.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        check_checkpoint(state, self.config)
        same_rows = [
            np.array_equal(state[key].numpy(), rows)
            for key, rows in (("train_rows", self.split.train), ("val_rows", self.split.val))
        ]
        if not all(same_rows):
            raise ResumeError(
                "the checkpoint was trained on other rows: the table or its folds changed; start again in another folder"
            )
        self.epoch = state["epoch"]
        self.rows = [dict(row) for row in state["rows"]]
        self.step.load_state_dict(state)


@dataclass(frozen=True)
class StepSums:
    """What each optimiser step of an epoch came to, over all ranks; shape (steps,)."""

    losses_S: np.ndarray
    """Sum of the samples' losses, weighted."""
    plain_losses_S: np.ndarray
    """The same without class weights."""
    norms_S: np.ndarray
    """Gradient norm before clipping; not finite where the step was skipped."""


def check_checkpoint(state: Mapping[str, Any], config: FineTuneConfig) -> None:
    """Raise ResumeError unless `state` is of this version and of a run of `config`."""
    if state.get("format") not in range(1, RULES + 1):
        raise ResumeError(
            f"checkpoint format {state.get('format')!r}, this version reads 1 to {RULES}: start again in another folder"
        )
    if state["config_hash"] != config.hash():
        ours, theirs = config.model_dump(mode="json"), state["config"]
        differing = [
            f"{k}: {theirs.get(k)!r} -> {ours[k]!r}" for k in ours if theirs.get(k) != ours[k]
        ]
        raise ResumeError(
            f"the checkpoint is of another configuration ({', '.join(differing)}): start again in another folder"
        )


def _ratio(value: float, base: float) -> float:
    return float(value / base) if base else math.nan


def _place(network: Classifier, device: torch.device) -> Classifier:
    if device.type == "cuda":
        return network.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return network.to(device)


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident_gib()
