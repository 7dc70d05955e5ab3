"""The plan of an epoch and of each of its steps: which volumes, at which rates, with which stages and weights."""

import math
from typing import Any

import numpy as np
import torch

from trainables import without_compiler
from trainables.config import FineTuneConfig
from trainables.losses import drw_active
from trainables.network.model import Classifier, parameter_groups, trainable_stages


class Schedule:
    """The plan of a run of `volumes` training volumes over `world` ranks. Epochs count from 1, steps from 0."""

    def __init__(self, config: FineTuneConfig, *, volumes: int, world: int) -> None:
        self.config = config
        step_size = config.batch_size * config.gradient_accumulation_steps * world
        self.full_step = step_size
        """Volumes of a step that is not an epoch's last one."""
        self.step_ends = step_ends(volumes, step_size, config.batch_size)
        """Where each step ends in the epoch's order."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return len(self.step_ends)

    @property
    def step_sizes(self) -> np.ndarray:
        """Volumes of each step of an epoch."""
        return np.diff(self.step_ends, prepend=0)

    def begins(self, step: int) -> int:
        """Return where `step` begins in the epoch's order."""
        return self.step_ends[step - 1] if step else 0

    def order(self, epoch: int, rows: np.ndarray) -> np.ndarray:
        """Return the training rows in the order of `epoch`: the same for all ranks, and after a resume."""
        shuffled: np.ndarray = rows[
            np.random.default_rng((self.config.seed, epoch)).permutation(len(rows))
        ]
        return shuffled

    def stages(self, epoch: int) -> tuple[str, ...]:
        """Return the stages of the backbone that train in `epoch`."""
        config = self.config
        return tuple(
            trainable_stages(epoch, config.freeze_backbone_epochs, config.unfreeze_stage_epochs)
        )

    def drw_active(self, epoch: int) -> bool:
        """Return whether class weights apply in `epoch`."""
        return drw_active(epoch, self.config.drw_start_epoch)

    def rate_factor(self, epoch: int, step: int) -> float:
        """Return the factor on all peak learning rates in `step` of `epoch`."""
        steps = self.steps_per_epoch
        return learning_rate_factor(
            (epoch - 1) * steps + step,
            total=self.config.epochs * steps,
            warmup=round(self.config.warmup_epochs * steps),
            scheduler=self.config.scheduler,
        )


def learning_rate_factor(step: int, *, total: int, warmup: int, scheduler: str) -> float:
    """Factor on all peak learning rates at 0-based `step` of `total`, so that their ratio never changes.

    Linear from 1 / warmup over `warmup` steps, then constant, or half a cosine that reaches zero one step past the end.
    """
    if step < warmup:
        return (step + 1) / warmup
    if scheduler == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def build_optimizer(
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
        # torch leaves them unwritten when the first step is skipped
        for parameter in network.parameters():
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


def seed_of(*parts: int) -> int:
    """One 63-bit seed from several numbers; neighbouring inputs give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
