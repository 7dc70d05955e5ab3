"""The recipe: a config, a prepared cohort and a split -> an iterator of one EpochResult an epoch.

`finetune` needs no callback, logger or Ray: a test is `list(finetune(config, cohort, split, device="cpu"))`. It reads
rank and world size from `torch.distributed` where that is initialised, and never initialises it.

How the parts of a step fit together, and why nothing in an epoch waits for the GPU:

* A step's volumes are cut into micro-batches; micro-batch `a * world + r` goes to rank r. W ranks with A accumulation
  steps therefore see the very micro-batches of one rank with A * W, and differ from it in rounding only.
* Losses are weighted a sample and divided by the sample count of the whole step over all ranks: a mean of means
  would weigh a partial micro-batch too much, and a weighted mean over one class would cancel the weight.
* Gradients are summed over the ranks once a step (`trainables.gradient_sum`), during the last backward pass, instead of
  by DistributedDataParallel: there is no wrapper to renew when stages thaw, and no sync to suppress in between. In an
  fp16 run those of convolutions, computed in fp16, are added up in it.
* Unscaling and clipping are one multiplication by a factor computed on the device. A step whose gradient norm is not
  finite is skipped on the device, in the optimiser and in the average alike (fp16, bf16 and float32), and counted.
* Random numbers are seeded afresh from (seed, epoch, rank) each epoch, so a resumed run needs no random state.
* On GPUs with the cohort resident, a whole step (batch, augmentation, passes, sum over the ranks, clip, optimiser,
  average, loss scale) is one CUDA graph: launched one by one its kernels leave an H200 idle two thirds of the time.
  What changes between steps lies in tensors that keep their place: where the step begins in the epoch's order, rates,
  class weights, random seeds. So only another set of trainable stages needs another capture; a partial last step runs
  eagerly, on the same stream.
* What the next trial of a process can use again stays: the cohort on the device (`trainables.data.resident`), and what torch
  knows about convolutions, as all trials train in one thread (`trainables.training_thread`).
* On a GPU the micro-batches of a step go through the network together where their activations fit, BatchNorm taking
  each by itself (`trainables.network.batchnorm`): the numbers are those of one after the other, up to rounding.

What each lever is worth, on an H200 with ResNet-50, 96 voxels, strided, 2 micro-batches of 6, whole steps in ms (`medtune
bench train`, and the same run with one lever taken back): all of it 12.1, and 10.9 with the last two of
this list; without the fused BatchNorm and with the micro-batches one after the other 16.0; only the latter 15.2; with the stem
as cuDNN runs it 13.8; with torch's max-pool 12.6; with 1x1x1 convolutions by cuDNN 12.3; without augmentation 11.6.
The forward stem as a convolution of 16 channels and two outputs at once instead of 8 and one: 1.7 to 0.7 ms. BatchNorm's
reductions with loads running ahead and half the programs: a fifth faster.

On a CPU a step costs what the plain loop's does, and augmentation a sixth of it more (mostly `grid_sample`; `medtune
bench train --variants plain,unaugmented,ours`). Channels-last memory there is 1.2 to 1.6 times as fast for ResNet-10 at
quarter width and 48 or 64 voxels, but takes 1.3 to 1.5 times as long for ResNet-50: not used.

What did not help: bf16 instead of fp16 (12.1 either way). What remains: the GPU is busy 96 % of the step with some
thousand kernels. BatchNorm takes 3.0 ms, its passes over memory near the card's 4.3 TB/s, its sums at half of it;
convolutions of layers 3 and 4 are too small at 96 voxels to fill the chip (batch 24: 1,346 volumes/s against 1,103);
arithmetic alone would take 1.6 ms. Not tried: gradients of the two paths into a block added inside BatchNorm's backward
(0.3 ms), weights kept in half precision (0.2 to 0.4), BatchNorm's second small kernels folded away (0.4).
"""

import functools
import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainables import without_compiler
from trainables.augment import augment_batch
from trainables.config import RULES, FineTuneConfig
from trainables.data.folds import Split
from trainables.data.resident import Volumes
from trainables.data.volumes import Cohort
from trainables.gradient_sum import GradientSum
from trainables.losses import class_weights, drw_active, ldam_margins, logit_scale, sample_losses
from trainables.metrics import score_metrics
from trainables.network.batchnorm import SharedStatistics, set_groups
from trainables.network.ema import AveragedWeights
from trainables.network.model import (
    STAGES,
    Classifier,
    configured_network,
    parameter_groups,
    set_trainable,
    train_mode,
    trainable_stages,
)
from trainables.network.weights import LoadReport, load_pretrained

ACTIVATION_SHARE = 0.2  # of all device memory, for the micro-batches that run together: several trials may share a GPU
WARM_STEPS = 3  # eager steps before a capture: they choose convolution algorithms and make the optimiser's state


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
    """Everything needed to go on from here, as tensors and plain values; call it before asking for the next epoch."""


@dataclass(frozen=True)
class Precision:
    """What the forward pass computes in, and why."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "float32"}[self.dtype]


def choose_precision(amp: str, device: torch.device) -> Precision:
    """Return the one compute dtype of a run. Half precision is for GPUs: on a CPU its convolutions are slower than float32."""
    if amp == "off":
        return Precision(torch.float32, "amp is off")
    if device.type != "cuda":
        return Precision(
            torch.float32, f"amp={amp} is for GPUs, and this run is on the {device.type}"
        )
    if amp == "bf16":
        return Precision(torch.bfloat16, "amp=bf16")
    return Precision(torch.float16, "amp=fp16, with a loss scale")


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

    `resume` is an earlier result's `state()`: the run goes on after its epoch, bit for bit on a CPU.
    `heartbeat` is told (epoch, step) whenever a step has been issued: it is how a hanging rank is noticed.
    `graphs=False` issues every kernel by itself on a GPU too; the numbers are the same.
    `rules` are those of the study the run belongs to; a checkpoint's own go before them.

    Raises WeightsError when the pretrained file does not fill the backbone, ResumeError when the checkpoint is of
    another run, ValueError when a class has no training volume.
    """
    if resume is not None:
        check_checkpoint(resume, config)
        rules = int(resume["format"])
    run = _Run(config, cohort, split, torch.device(device), graphs=graphs, rules=rules)
    if resume is not None:
        run.restore(resume)
    try:
        while run.epoch < config.epochs:
            metrics = run.train_one_epoch(heartbeat)
            yield EpochResult(run.epoch, metrics, run.snapshot)
    finally:
        run.put_away()  # a result may outlive the ranks, and NCCL waits for graphs that hold its collectives


class _Run:
    """State of one run between epochs. Only `finetune` makes one."""

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
            # What the process's last run held lies in pools of its graphs: neither this run nor another process could use it.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.epoch = 0
        self.rows: list[dict[str, Any]] = []
        self.precision = choose_precision(config.amp, device)
        # cuBLAS's own condition for a deterministic run, which reads it once: a process may have run others before.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Set either way: the process may have run another trial before. Trilinear resampling has no deterministic kernel.
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = device.type == "cuda" and not config.deterministic

        self.split = split
        self.labels = np.asarray(cohort.labels)
        self.class_counts = np.bincount(self.labels[split.train], minlength=config.num_classes)
        self.volumes = Volumes(cohort, np.concatenate([split.train, split.val]), device)

        torch.manual_seed(config.seed)
        network = configured_network(config)
        self.load_report: LoadReport | None = None
        if config.pretrained_path is not None:
            self.load_report = load_pretrained(network, config.pretrained_path)
        self.network: Classifier = _place(network, device)
        if config.sync_batchnorm and self.world > 1:
            if device.type != "cuda":
                raise ValueError(
                    "sync_batchnorm=True needs GPUs: torch has no SyncBatchNorm on the CPU"
                )
            self.network = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        self.shared_statistics: SharedStatistics | None = None
        if self.world > 1 and not config.sync_batchnorm and rules > 1:
            self.shared_statistics = SharedStatistics(self.network, self.rank, self.world)
        self.statistics = _in_one_piece(self.network)
        self.statistics_before = self.statistics.clone()
        self.average = AveragedWeights(
            self.network,
            decay=config.ema_decay,
            warmup=config.ema_warmup,
            buffers=config.ema_buffers,
        )
        self.optimizer, self.peak_lrs = _build_optimizer(config, self.network, self.world, device)
        step_size = config.batch_size * config.gradient_accumulation_steps * self.world
        self.step_ends = step_ends(len(split.train), step_size, config.batch_size)
        self.steps_per_epoch = len(self.step_ends)

        scaled = self.precision.dtype is torch.float16
        self.spacing = config.spacing_mm if config.spacing_mm and rules > 1 else (1.0, 1.0, 1.0)
        self.loss_scale = torch.tensor(65536.0 if scaled else 1.0, device=device)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)
        margins = ldam_margins(self.class_counts, config.max_m) if config.loss == "ldam" else None
        self.margins = None if margins is None else margins.to(device)
        self.scale = logit_scale(config.loss, config.head, config.s)
        weights = class_weights(
            self.class_counts, config.drw_beta, mean_over="samples" if rules > 1 else "classes"
        ).to(device)
        self.weights = {True: weights, False: torch.ones_like(weights)}

        # What a captured step reads and writes: these tensors keep their place for the whole run.
        self.weights_C = torch.ones_like(weights)
        self.order = torch.zeros(
            len(split.train), dtype=torch.int64, device=device
        )  # places in the resident cohort
        self.begin = torch.zeros((), dtype=torch.int64, device=device)  # of the step, in the order
        self.loss_sum = torch.zeros((), device=device)
        self.plain_sum = torch.zeros((), device=device)  # of losses without class weights
        self.norm = torch.zeros((), device=device)
        self.generator = torch.Generator(device)
        # SyncBatchNorm knows no groups: it would take the statistics of all micro-batches together
        apart = (
            device.type != "cuda"
            or config.deterministic
            or (config.sync_batchnorm and self.world > 1)
        )
        self.at_once = 1 if apart else self._micro_batches_that_fit()
        self.passes: dict[int, list[_Pass]] = {}
        self.gradient_sum: GradientSum | None = None
        self.stream = _side_stream(device) if device.type == "cuda" else None
        # Capturing a deterministic run would be sound, but what it is for is comparing with an eager one.
        self.graphs = graphs and not config.deterministic and self._can_be_captured()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm_steps = 0
        self.validation_index = torch.zeros(
            config.validation_batch_size, dtype=torch.int64, device=device
        )
        self.validation_graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def _can_be_captured(self) -> bool:
        """Whether a graph can hold a step: of a resident cohort, with NCCL's collectives, but not SyncBatchNorm's waits.

        All ranks must say the same, or some would wait for a step that the others are still capturing: every rank asks
        the others, also one whose cohort did not fit.
        """
        resident = self.volumes.resident is not None
        if self.world == 1:
            return resident
        on_all = torch.tensor(float(resident), device=self.device)
        dist.all_reduce(on_all, dist.ReduceOp.MIN)
        return bool(on_all) and dist.get_backend() == "nccl" and not self.config.sync_batchnorm

    def put_away(self) -> None:
        """Drop what would keep the run on its device: graphs, and hooks, which hold in a circle what they hang on."""
        self._forget_step()
        self.validation_graphs.clear()

    def _forget_step(self) -> None:
        """Drop what holds for one set of trainable stages: the captured step, and the hooks of the gradient sum."""
        self.graph, self.warm_steps = None, 0
        if self.gradient_sum is not None:
            self.gradient_sum.remove()
            self.gradient_sum = None

    def _micro_batches_that_fit(self) -> int:
        """How many micro-batches may go through the network together."""
        config = self.config
        each = config.batch_size * activation_bytes(config)
        fit = int(
            ACTIVATION_SHARE * torch.cuda.get_device_properties(self.device).total_memory / each
        )
        most = config.gradient_accumulation_steps
        return max(n for n in range(1, most + 1) if most % n == 0 and n <= max(1, fit))

    # One epoch ------------------------------------------------------------------------------------------------------

    def train_one_epoch(self, heartbeat: Callable[[int, int], None] | None) -> dict[str, Any]:
        config = self.config
        started = time.perf_counter()
        self.epoch += 1
        active = drw_active(self.epoch, config.drw_start_epoch)
        stages = trainable_stages(
            self.epoch, config.freeze_backbone_epochs, config.unfreeze_stage_epochs
        )
        sums = self.train_part(heartbeat)
        trained = time.perf_counter()

        metrics = self._epoch_metrics(sums)
        metrics |= {"drw_active": active, "frozen_stages": len(STAGES) - len(stages)}
        metrics |= self._validate()
        ended = time.perf_counter()
        metrics |= {
            "precision": self.precision.name,
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
        config = self.config
        active = drw_active(self.epoch, config.drw_start_epoch)
        stages = trainable_stages(
            self.epoch, config.freeze_backbone_epochs, config.unfreeze_stage_epochs
        )
        if set_trainable(self.network, stages):
            self._forget_step()
        if self.world > 1 and self.gradient_sum is None:
            half = (
                torch.float16 if self.precision.dtype is torch.float16 else None
            )  # bf16 is too coarse to add up in
            self.gradient_sum = GradientSum(self.network.parameters(), convolutions_as=half)
        train_mode(self.network)
        torch.manual_seed(_seed(config.seed, self.epoch, self.rank))
        self.generator.manual_seed(_seed(config.seed, self.epoch, self.rank, 1))

        order = self.split.train[
            np.random.default_rng((config.seed, self.epoch)).permutation(len(self.split.train))
        ]
        sums = torch.zeros(2, self.steps_per_epoch, device=self.device)
        norms = torch.zeros(1, self.steps_per_epoch, device=self.device)
        with self._on_own_stream():
            self.weights_C.copy_(self.weights[active])
            if self.volumes.resident is not None:
                self.order.copy_(torch.from_numpy(self.volumes.position[order]))
            for step in range(self.steps_per_epoch):
                begin = self.step_ends[step - 1] if step else 0
                self._set_learning_rates(step)
                self._take_step(order, begin, self.step_ends[step] - begin)
                sums[0, step] = self.loss_sum
                sums[1, step] = self.plain_sum
                norms[0, step] = self.norm
                if heartbeat is not None:
                    heartbeat(self.epoch, step + 1)
        self._agree_on_buffers()
        if self.world > 1:
            dist.all_reduce(sums)
        # The one wait of the training part
        return StepSums(*torch.cat([sums, norms]).double().cpu().numpy())

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        """A capture must be warmed up on a side stream, and its eager neighbours stay there to keep their order."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _take_step(self, order: np.ndarray, begin: int, count: int) -> None:
        """One optimiser update from `order[begin : begin + count]` of all ranks, captured or not."""
        self.begin.fill_(begin)
        full = self.config.batch_size * self.config.gradient_accumulation_steps * self.world
        if not self.graphs or count != full:
            self._optimise(order, begin, count)
        elif self.graph is not None:
            self.graph.replay()
        elif self.warm_steps < WARM_STEPS:
            self._optimise(order, begin, count)
            self.warm_steps += 1
        else:
            self.optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            # thread_local: other threads of the process (Ray's, a heartbeat's) may go on calling CUDA
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self._optimise(order, begin, count)
            self.graph = graph
            graph.replay()

    def _optimise(self, order: np.ndarray, begin: int, count: int) -> None:
        """One optimiser update. Leaves the sum of losses and the gradient norm before clipping in their tensors.

        Reads nothing back, and on a resident cohort depends on the host through `count` alone: so it can be captured.
        """
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        self.statistics_before.copy_(self.statistics)
        self.loss_sum.zero_()
        self.plain_sum.zero_()
        passes = self._passes(count)
        for part in passes:
            short = self.shared_statistics is not None and part.ranks < self.world
            before = self.statistics.clone() if short and not part.counts else None
            volumes, labels = self._batch(order, begin, part)
            volumes = augment_batch(
                volumes,
                strength=config.augmentation_strength,
                flip_axes=config.flip_axes,
                generator=self.generator,
                spacing=self.spacing,
            )
            set_groups(self.network, part.groups)
            with self._autocast():
                logits_BC = self.network(volumes)
            losses_B = sample_losses(
                logits_BC,
                labels,
                loss=config.loss,
                margins=self.margins,
                s=self.scale,
                focal_gamma=config.focal_gamma,
            )
            loss = (self.weights_C[labels] * losses_B).sum() / count
            if not part.counts:
                loss, losses_B = loss * 0.0, losses_B * 0.0
            self.loss_sum += loss.detach() * count
            self.plain_sum += losses_B.detach().sum()
            with (
                nullcontext()
                if self.gradient_sum is None
                else self.gradient_sum.over(part is passes[-1])
            ):
                (loss * self.loss_scale).backward()
            if short:  # not before: the backward pass refuses buffers that were changed
                assert self.shared_statistics is not None
                self.shared_statistics.short_round(self.statistics, part.ranks, before)

        grads = [p.grad for p in self.network.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) / self.loss_scale
        self.norm.copy_(norm)
        found_inf = (~torch.isfinite(norm)).float()
        # Unscale before clip, or the threshold is in scaled units: Adam's step would shrink to a fifth, without an error.
        factor = 1.0 / self.loss_scale
        if config.grad_clip > 0:
            factor = factor * torch.clamp(config.grad_clip / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(grads, factor)
        self.optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # fused optimisers skip on the device
        self.optimizer.step()
        # A forward pass that overflowed has spoilt the running statistics too, and they would never recover.
        torch.where(found_inf > 0, self.statistics_before, self.statistics, out=self.statistics)
        self.average.update(self.network, skip=found_inf)
        if self.precision.dtype is torch.float16:
            torch._amp_update_scale_(
                self.loss_scale, self.growth_tracker, found_inf, 2.0, 0.5, 2000
            )

    def _passes(self, count: int) -> list["_Pass"]:
        """This rank's passes through the network in a step of `count` volumes; made once, as a capture uploads nothing."""
        if count not in self.passes:
            made: list[_Pass] = []
            rounds = [
                rank_micro_batches(np.arange(count), self.config.batch_size, rank, self.world)
                for rank in range(self.world)
            ]
            for number, chunk in enumerate(rounds[self.rank]):
                ranks = sum(len(chunks[number]) > 0 for chunks in rounds)
                last = made[-1] if made else None
                if not len(chunk):  # a rank left without work still joins, with weight zero
                    made.append(_Pass(np.arange(2), 1, counts=False, ranks=ranks))
                elif (
                    last is not None
                    and last.groups < self.at_once
                    and len(last.offsets) == last.groups * len(chunk)
                    and last.ranks == ranks
                ):
                    both = np.concatenate([last.offsets, chunk])
                    made[-1] = _Pass(both, last.groups + 1, ranks=ranks)
                else:
                    made.append(_Pass(chunk, 1, ranks=ranks))
            for part in made:
                part.on_device = torch.from_numpy(part.offsets).to(self.device)
            self.passes[count] = made
        return self.passes[count]

    def _batch(self, order: np.ndarray, begin: int, part: "_Pass") -> tuple[Tensor, Tensor]:
        if self.volumes.resident is not None:
            return self.volumes.resident_batch(self.order[part.on_device + self.begin])
        rows = order[begin + part.offsets]
        return self.volumes.batch(rows), torch.as_tensor(self.labels[rows], device=self.device)

    def _set_learning_rates(self, step: int) -> None:
        factor = learning_rate_factor(
            (self.epoch - 1) * self.steps_per_epoch + step,
            total=self.config.epochs * self.steps_per_epoch,
            warmup=round(self.config.warmup_epochs * self.steps_per_epoch),
            scheduler=self.config.scheduler,
        )
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"].fill_(peak * factor)

    def _autocast(self) -> torch.autocast:
        half = self.precision.dtype is not torch.float32
        return torch.autocast(
            self.device.type, dtype=self.precision.dtype if half else None, enabled=half
        )

    def _agree_on_buffers(self) -> None:
        """Give all ranks the same BatchNorm statistics, raw and averaged, so that all validate one network."""
        if self.world == 1:
            return
        if self.shared_statistics is not None:
            averages = [one for one in self.average.network.buffers() if one.is_floating_point()]
            self.shared_statistics.combine([self.statistics, *averages])
        else:
            for buffer in [self.statistics, *self.average.network.buffers()]:
                dist.broadcast(buffer, src=0)

    # What an epoch came to --------------------------------------------------------------------------------------------

    def _epoch_metrics(self, sums: "StepSums") -> dict[str, Any]:
        taken = np.isfinite(sums.norms_S)
        finite = sums.norms_S[taken]
        sizes_S = np.diff(self.step_ends, prepend=0)
        clip = self.config.grad_clip
        by_name = {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}
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

    def _validate(self) -> dict[str, Any]:
        labels = self.labels[self.split.val]
        metrics: dict[str, Any] = {}
        for name, network in (("raw", self.network), ("ema", self.average.network)):
            scores = score_metrics(self._scores(network, self.split.val), labels, scale=self.scale)
            metrics |= {_column(key, name): value for key, value in scores.items()}
        metrics |= {f"val_auc{end}": metrics[f"val_auc_ema{end}"] for end in ("", "_low", "_high")}
        subset = _fixed_subset(self.split.train, self.labels, self.config.train_auc_volumes)
        metrics["train_auc"] = math.nan
        if len(subset):
            scores = score_metrics(
                self._scores(self.network, subset), self.labels[subset], scale=self.scale
            )
            metrics["train_auc"] = scores["auc"]
        metrics["val_positive"] = int((labels > 0).sum())
        metrics["val_negative"] = int((labels == 0).sum())
        return metrics

    @torch.no_grad()
    def _scores(self, network: nn.Module, rows: np.ndarray) -> Tensor:
        """Logits (N, C) float32 of `rows` in their order, on the CPU and on all ranks."""
        network.eval()
        set_groups(network, 1)
        per_rank = math.ceil(len(rows) / self.world)
        padded = np.resize(
            rows, per_rank * self.world
        )  # the sampler's duplicates; dropped again below
        mine = padded[self.rank :: self.world]
        size = self.config.validation_batch_size
        if self.graphs and len(mine) >= size:
            logits = self._captured_scores(network, mine)
        else:
            parts = []
            for start in range(0, len(mine), size):
                with self._autocast():
                    parts.append(network(self.volumes.batch(mine[start : start + size])).float())
            logits = torch.cat(parts)
        if self.world > 1:
            gathered = [torch.empty_like(logits) for _ in range(self.world)]
            dist.all_gather(gathered, logits)
            logits = torch.stack(gathered, dim=1).flatten(
                0, 1
            )  # row i of rank r is padded[i * world + r]
        return logits[: len(rows)].cpu()

    def _captured_scores(self, network: nn.Module, rows: np.ndarray) -> Tensor:
        """Logits of `rows`, each batch one CUDA graph, captured once for a network: its weights are changed in place."""
        assert self.stream is not None
        size = self.config.validation_batch_size
        batches = np.resize(
            rows, (math.ceil(len(rows) / size), size)
        )  # the last is filled up from the first
        with self._on_own_stream():
            places = torch.from_numpy(self.volumes.position[batches]).to(self.device)
            self.validation_index.copy_(places[0])
            if id(network) not in self.validation_graphs:
                self._score_batch(network)  # chooses the convolution algorithms
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                    logits = self._score_batch(network)
                self.validation_graphs[id(network)] = graph, logits
            graph, logits = self.validation_graphs[id(network)]
            parts = []
            for place in places:
                self.validation_index.copy_(place)
                graph.replay()
                parts.append(logits.clone())
        return torch.cat(parts)[: len(rows)]

    def _score_batch(self, network: nn.Module) -> Tensor:
        with self._autocast():
            return network(self.volumes.resident_batch(self.validation_index)[0]).float()

    # Going on later ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        return {
            "format": self.rules,
            "config": self.config.model_dump(mode="json"),
            "config_hash": self.config.hash(),
            "epoch": self.epoch,
            "rows": [dict(row) for row in self.rows],
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_scale": self.loss_scale,
            "growth_tracker": self.growth_tracker,
            "train_rows": torch.as_tensor(self.split.train),
            "val_rows": torch.as_tensor(self.split.val),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        check_checkpoint(state, self.config)
        same_rows = [
            np.array_equal(state[key].numpy(), rows)
            for key, rows in (("train_rows", self.split.train), ("val_rows", self.split.val))
        ]
        if not all(same_rows):
            raise ResumeError(
                "the checkpoint was trained on other rows: the table or its folds changed; start anew"
            )
        self.epoch = state["epoch"]
        self.rows = [dict(row) for row in state["rows"]]
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in (
            self.optimizer.param_groups
        ):  # torch keeps the loaded value, which may be on another device
            group["lr"] = torch.as_tensor(group["lr"]).to(self.device)
            if "capturable" in group:
                group["capturable"] = self.device.type == "cuda"
        self.graph, self.warm_steps = None, 0
        self.loss_scale.copy_(state["loss_scale"])
        self.growth_tracker.copy_(state["growth_tracker"])


@dataclass(frozen=True)
class StepSums:
    """What each optimiser step of an epoch came to, over all ranks; shape (steps,)."""

    losses_S: np.ndarray
    """Sum of the samples' losses, weighted."""
    plain_losses_S: np.ndarray
    """The same without class weights."""
    norms_S: np.ndarray
    """Gradient norm before clipping; not finite where the step was skipped."""


@dataclass
class _Pass:
    """What goes through the network at once: some micro-batches of a step."""

    offsets: np.ndarray
    """Places of its volumes in the step."""
    groups: int
    """Micro-batches it holds, all of one size."""
    counts: bool = True
    """False on a rank that only joins in."""
    ranks: int = 1
    """Ranks that have a micro-batch of this round: fewer than there are only in an epoch's last step."""
    on_device: Tensor = dataclass_field(init=False)


def check_checkpoint(state: Mapping[str, Any], config: FineTuneConfig) -> None:
    """Raise ResumeError unless `state` is of this version and of a run of `config`."""
    if state.get("format") not in range(1, RULES + 1):
        raise ResumeError(
            f"checkpoint format {state.get('format')!r}, this version reads 1 to {RULES}: start anew elsewhere"
        )
    if state["config_hash"] != config.hash():
        ours, theirs = config.model_dump(mode="json"), state["config"]
        differing = [
            f"{k}: {theirs.get(k)!r} -> {ours[k]!r}" for k in ours if theirs.get(k) != ours[k]
        ]
        raise ResumeError(
            f"the checkpoint is of another configuration ({', '.join(differing)}): start anew in another folder"
        )


def activation_bytes(config: FineTuneConfig) -> int:
    """Return about how much a volume takes between forward and backward: what each convolution and each norm puts out."""
    with torch.device("meta"):
        network = configured_network(config)
        outputs = 0

        def count(_: nn.Module, __: object, output: Tensor) -> None:
            nonlocal outputs
            outputs += output[0].numel()

        for module in network.modules():
            if isinstance(module, nn.Conv3d):
                module.register_forward_hook(count)
        with torch.no_grad():
            network.eval()(torch.empty(1, config.in_channels, *config.volume_shape))
    return 2 * outputs * (4 if config.amp == "off" else 2)


def learning_rate_factor(step: int, *, total: int, warmup: int, scheduler: str) -> float:
    """Factor on all peak learning rates at 0-based `step` of `total`, so that their ratio never changes.

    Linear from 1 / warmup over `warmup` steps, then constant, or half a cosine that reaches zero one step past the end.
    """
    if step < warmup:
        return (step + 1) / warmup
    if scheduler == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _ratio(value: float, base: float) -> float:
    return float(value / base) if base else math.nan


def _column(key: str, weights: str) -> str:
    """`auc` of the `raw` weights is column `val_auc_raw`; the ends of its interval keep their place at the end."""
    for end in ("_low", "_high"):
        if key.endswith(end):
            return f"val_{key.removesuffix(end)}_{weights}{end}"
    return f"val_{key}_{weights}"


def _build_optimizer(
    config: FineTuneConfig, network: Classifier, world: int, device: torch.device
) -> tuple[torch.optim.Optimizer, list[float]]:
    """Fused, because only fused optimisers skip a step on the device; rates are tensors, filled in place each step."""
    factor = world if config.scale_lr_with_batch else 1
    rates = {"backbone": config.backbone_lr * factor, "classifier": config.classifier_lr * factor}
    groups = [
        {"name": name, "params": params, "lr": torch.tensor(rates[name], device=device)}
        for name, params in parameter_groups(network).items()
    ]
    common: dict[str, Any] = {"weight_decay": config.weight_decay, "fused": True}
    capturable = device.type == "cuda"
    if config.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = without_compiler.SGD(
            groups, momentum=0.9, nesterov=True, **common
        )
        for (
            parameter
        ) in network.parameters():  # torch leaves them unwritten when the first step is skipped
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    elif config.optimizer == "adamw":
        optimizer = without_compiler.AdamW(groups, capturable=capturable, **common)
    else:
        optimizer = without_compiler.Adam(groups, capturable=capturable, **common)
    return optimizer, [rates[str(group["name"])] for group in groups]


def step_ends(count: int, step_size: int, batch_size: int) -> list[int]:
    """Return where each optimiser step of an epoch over `count` volumes ends.

    The last step is smaller when it must be, but never a single volume (unless micro-batches are): BatchNorm has no
    statistics of one value, which is what layer 4 is left with at up to 32 voxels a side. It joins the step before.
    """
    ends = [*range(step_size, count, step_size), count]
    if len(ends) > 1 and ends[-1] - ends[-2] == 1 and batch_size > 1:
        del ends[-2]
    return ends


def rank_micro_batches(
    rows: np.ndarray, batch_size: int, rank: int, world: int
) -> list[np.ndarray]:
    """Return this rank's micro-batches of a step; as many on every rank, the last ones possibly empty.

    A last micro-batch of one volume joins the one before it: see `step_ends`.
    """
    starts = list(range(0, len(rows), batch_size))
    if len(starts) > 1 and len(rows) - starts[-1] == 1 and batch_size > 1:
        del starts[-1]
    chunks = np.split(rows, starts[1:])
    rounds = math.ceil(len(chunks) / world)
    chunks += [rows[:0]] * (rounds * world - len(chunks))
    return chunks[rank::world]


def _fixed_subset(rows: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
    """The first `size` rows by class in turn, so that even a small subset holds every class."""
    by_class = [rows[labels[rows] == label] for label in np.unique(labels[rows])]
    turns = max((len(part) for part in by_class), default=0)
    mixed = [part[i] for i in range(turns) for part in by_class if i < len(part)]
    return np.asarray(mixed[:size], dtype=np.int64)


def _seed(*parts: int) -> int:
    """One 63-bit seed from several numbers; neighbouring inputs give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _in_one_piece(network: nn.Module) -> Tensor:
    """Move all float buffers (BatchNorm statistics) into one tensor, of which they become views; returns that tensor.

    Keeping, restoring and broadcasting them is then one operation instead of a hundred.
    """
    owners = [
        (module, name, buffer)
        for module in network.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]
    whole = torch.cat([buffer.flatten() for _, _, buffer in owners])
    start = 0
    for module, name, buffer in owners:
        module._buffers[name] = whole[start : start + buffer.numel()].view(buffer.shape)
        start += buffer.numel()
    return whole


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where a run captures and replays: one for all runs of the process, as cuBLAS keeps a workspace for each it has met."""
    return torch.cuda.Stream(device)


def _place(network: Classifier, device: torch.device) -> Classifier:
    if device.type == "cuda":
        return network.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return network.to(device)


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
