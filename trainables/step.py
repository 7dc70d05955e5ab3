"""One optimiser update of a run: batch, augmentation, passes, sum over ranks, clip, optimiser, average, loss scale.

See `trainables.finetune` for why it is built so, and what each part is worth.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainables.augment import augment_batch
from trainables.config import FineTuneConfig
from trainables.data.resident import Volumes
from trainables.gradient_sum import GradientSum
from trainables.losses import class_weights, ldam_margins, logit_scale, sample_losses
from trainables.network.batchnorm import SharedStatistics, set_groups
from trainables.network.ema import AveragedWeights
from trainables.network.model import Classifier, convolution_outputs, set_trainable
from trainables.schedule import Schedule, build_optimizer, rank_micro_batches

ACTIVATION_SHARE = 0.2  # of all device memory, for the micro-batches that run together: several trials may share a GPU
WARM_STEPS = 3  # eager steps before a capture: they choose convolution algorithms and make the optimiser's state


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks of a run."""

    rank: int
    world: int

    @classmethod
    def here(cls) -> "Ranks":
        """Return it as torch.distributed has it; alone where that is not initialised."""
        if not dist.is_initialized():
            return cls(0, 1)
        return cls(dist.get_rank(), dist.get_world_size())


@dataclass(frozen=True)
class Precision:
    """The precision of the forward pass, and the reason for it."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "float32"}[self.dtype]

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context in which a forward pass computes in it."""
        half = self.dtype is not torch.float32
        return torch.autocast(device.type, dtype=self.dtype if half else None, enabled=half)


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


@dataclass
class Pass:
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


class TrainingStep:
    """What one optimiser update reads and writes, and the update itself: captured as a CUDA graph, or kernel by kernel.

    `network` is changed in place, `average` with it. `labels` are those of all the cohort's rows, `class_counts` of the
    training fold's. `rules`: see `trainables.config.RULES`.
    """

    def __init__(
        self,
        config: FineTuneConfig,
        network: Classifier,
        *,
        volumes: Volumes,
        labels: np.ndarray,
        class_counts: np.ndarray,
        schedule: Schedule,
        device: torch.device,
        ranks: Ranks,
        graphs: bool,
        rules: int,
    ) -> None:
        self.config, self.device, self.schedule = config, device, schedule
        self.rank, self.world = ranks.rank, ranks.world
        self.volumes, self.labels = volumes, labels
        self.precision = choose_precision(config.amp, device)
        self.network = network
        self.shared_statistics: SharedStatistics | None = None
        if self.world > 1 and not config.sync_batchnorm and rules > 1:
            self.shared_statistics = SharedStatistics(network, self.rank, self.world)
        self.statistics = _in_one_piece(network)
        self.statistics_before = self.statistics.clone()
        self.average = AveragedWeights(
            network,
            decay=config.ema_decay,
            warmup=config.ema_warmup,
            buffers=config.ema_buffers,
        )
        self.optimizer, self.peak_lrs = build_optimizer(config, network, self.world, device)

        scaled = self.precision.dtype is torch.float16
        self.spacing = config.spacing_mm if config.spacing_mm and rules > 1 else (1.0, 1.0, 1.0)
        self.loss_scale = torch.tensor(65536.0 if scaled else 1.0, device=device)
        self.growth_tracker = torch.zeros((), dtype=torch.int32, device=device)
        margins = ldam_margins(class_counts, config.max_m) if config.loss == "ldam" else None
        self.margins = None if margins is None else margins.to(device)
        self.scale = logit_scale(config.loss, config.head, config.s)
        weights = class_weights(
            class_counts, config.drw_beta, mean_over="samples" if rules > 1 else "classes"
        ).to(device)
        self.weights = {True: weights, False: torch.ones_like(weights)}

        # A captured step reads and writes these tensors, which keep their place for the whole run.
        self.weights_C = torch.ones_like(weights)
        # Places in the resident cohort
        self.order = torch.zeros(schedule.step_ends[-1], dtype=torch.int64, device=device)
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
        self.passes: dict[int, list[Pass]] = {}
        self.gradient_sum: GradientSum | None = None
        self.stream = _side_stream(device) if device.type == "cuda" else None
        # Capturing a deterministic run would be sound, but its purpose is comparison with an eager one.
        self.graphs = graphs and not config.deterministic and self._can_be_captured()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm_steps = 0
        self.order_rows = np.empty(0, dtype=np.int64)

    def _can_be_captured(self) -> bool:
        """Whether a graph can hold a step: of a resident cohort, with NCCL's collectives, but not SyncBatchNorm's waits.

        All ranks must return the same, or some would wait for a step that the others are still capturing: every rank asks
        the others, also one whose cohort did not fit.
        """
        resident = self.volumes.resident is not None
        if self.world == 1:
            return resident
        on_all = torch.tensor(float(resident), device=self.device)
        dist.all_reduce(on_all, dist.ReduceOp.MIN)
        return bool(on_all) and dist.get_backend() == "nccl" and not self.config.sync_batchnorm

    def put_away(self) -> None:
        """Drop references that would keep the run on its device: graphs, and hooks, which form cycles with their modules."""
        self.forget_graph()

    def forget_graph(self) -> None:
        """Drop what holds for one set of trainable stages: the captured step, and the hooks of the gradient sum."""
        self.graph, self.warm_steps = None, 0
        if self.gradient_sum is not None:
            self.gradient_sum.remove()
            self.gradient_sum = None

    def _micro_batches_that_fit(self) -> int:
        """How many micro-batches may go through the network together."""
        config = self.config
        each = config.batch_size * activation_bytes(config, self.network)
        fit = int(
            ACTIVATION_SHARE * torch.cuda.get_device_properties(self.device).total_memory / each
        )
        most = config.gradient_accumulation_steps
        return max(n for n in range(1, most + 1) if most % n == 0 and n <= max(1, fit))

    def begin_epoch(self, epoch: int, order: np.ndarray) -> None:
        """Make ready for the steps of `epoch`, over the rows `order`: trainable stages, class weights, place of the rows."""
        if set_trainable(self.network, self.schedule.stages(epoch)):
            self.forget_graph()
        if self.world > 1 and self.gradient_sum is None:
            # bf16 is too coarse to add up in
            half = torch.float16 if self.precision.dtype is torch.float16 else None
            self.gradient_sum = GradientSum(self.network.parameters(), convolutions_as=half)
        self.order_rows = order
        with self.on_own_stream():
            self.weights_C.copy_(self.weights[self.schedule.drw_active(epoch)])
            if self.volumes.resident is not None:
                self.order.copy_(torch.from_numpy(self.volumes.position[order]))

    def take(self, epoch: int, step: int) -> None:
        """Take `step` of `epoch`. Leaves the sums of losses and the gradient norm in their tensors; within `on_own_stream`."""
        factor = self.schedule.rate_factor(epoch, step)
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"].fill_(peak * factor)
        begin = self.schedule.begins(step)
        self._take(begin, self.schedule.step_ends[step] - begin)

    @contextmanager
    def on_own_stream(self) -> Iterator[None]:
        """A capture must be warmed up on a side stream, and its eager neighbours stay there to keep their order."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _take(self, begin: int, count: int) -> None:
        """One optimiser update from `count` volumes of all ranks, captured or not."""
        self.begin.fill_(begin)
        if not self.graphs or count != self.schedule.full_step:
            self._optimise(begin, count)
        elif self.graph is not None:
            self.graph.replay()
        elif self.warm_steps < WARM_STEPS:
            self._optimise(begin, count)
            self.warm_steps += 1
        else:
            self.optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            # thread_local: other threads of the process (Ray's, a heartbeat's) may keep calling CUDA
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self._optimise(begin, count)
            self.graph = graph
            graph.replay()

    def _optimise(self, begin: int, count: int) -> None:
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
            volumes, labels = self._batch(begin, part)
            volumes = augment_batch(
                volumes,
                strength=config.augmentation_strength,
                flip_axes=config.flip_axes,
                generator=self.generator,
                spacing=self.spacing,
            )
            set_groups(self.network, part.groups)
            with self.precision.autocast(self.device):
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

    def _passes(self, count: int) -> list[Pass]:
        """This rank's passes through the network in a step of `count` volumes; made once, as a capture uploads nothing."""
        if count not in self.passes:
            made: list[Pass] = []
            rounds = [
                rank_micro_batches(np.arange(count), self.config.batch_size, rank, self.world)
                for rank in range(self.world)
            ]
            for number, chunk in enumerate(rounds[self.rank]):
                ranks = sum(len(chunks[number]) > 0 for chunks in rounds)
                last = made[-1] if made else None
                if not len(chunk):  # a rank left without work still joins, with weight zero
                    made.append(Pass(np.arange(2), 1, counts=False, ranks=ranks))
                elif (
                    last is not None
                    and last.groups < self.at_once
                    and len(last.offsets) == last.groups * len(chunk)
                    and last.ranks == ranks
                ):
                    both = np.concatenate([last.offsets, chunk])
                    made[-1] = Pass(both, last.groups + 1, ranks=ranks)
                else:
                    made.append(Pass(chunk, 1, ranks=ranks))
            for part in made:
                part.on_device = torch.from_numpy(part.offsets).to(self.device)
            self.passes[count] = made
        return self.passes[count]

    def _batch(self, begin: int, part: Pass) -> tuple[Tensor, Tensor]:
        if self.volumes.resident is not None:
            return self.volumes.resident_batch(self.order[part.on_device + self.begin])
        rows = self.order_rows[begin + part.offsets]
        return self.volumes.batch(rows), torch.as_tensor(self.labels[rows], device=self.device)

    def agree_on_buffers(self) -> None:
        """Give all ranks the same BatchNorm statistics, raw and averaged, so that all validate one network."""
        if self.world == 1:
            return
        if self.shared_statistics is not None:
            averages = [one for one in self.average.network.buffers() if one.is_floating_point()]
            self.shared_statistics.combine([self.statistics, *averages])
        else:
            for buffer in [self.statistics, *self.average.network.buffers()]:
                dist.broadcast(buffer, src=0)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict` to continue bit for bit: tensors, shared with this object as in torch."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss_scale": self.loss_scale,
            "growth_tracker": self.growth_tracker,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state made by `state_dict`."""
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            # torch keeps the loaded value, which may be on another device
            group["lr"] = torch.as_tensor(group["lr"]).to(self.device)
            if "capturable" in group:
                group["capturable"] = self.device.type == "cuda"
        self.graph, self.warm_steps = None, 0
        self.loss_scale.copy_(state["loss_scale"])
        self.growth_tracker.copy_(state["growth_tracker"])


def activation_bytes(config: FineTuneConfig, network: Classifier) -> int:
    """Return about how much a volume takes between forward and backward: what each convolution and each norm puts out."""
    outputs = convolution_outputs(network, config.volume_shape)
    return 2 * outputs * (4 if config.amp == "off" else 2)


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
