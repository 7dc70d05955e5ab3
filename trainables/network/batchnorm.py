"""BatchNorm with what follows it (sum with a shortcut, ReLU), by groups of a batch; and the stem's max-pool.

A group is a micro-batch. Normalised by groups, several micro-batches run through the network at once and come out as if
one had followed the other, running statistics included: the launches of one, and matrices large enough for the chip.

On a GPU with Triton, in channels-last memory, this is two passes over memory forward (moments; result) and two backward
(sums; gradient), where separate BatchNorm, sum and ReLU take up to seven and five. Elsewhere torch's own operations.
"""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# Measured on an H200
TILE = 2048  # elements that a program handles at a time
WARPS = 4  # of a reduction
STAGES = 3  # of a reduction's loop: loads run ahead
PROGRAMS = 528  # of a reduction: four for each of the 132 multiprocessors
FINISH = 512  # partial sums that a program adds at a time


@functools.cache
def _kernels() -> Any:
    """The module of kernels, or None without Triton or on a GPU that it does not know."""
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability() < (7, 0):
        return None
    from trainables.network import kernels

    return kernels


def fused_on(x: Tensor) -> bool:
    """Whether tensors like `x` take the Triton kernels: on a GPU, unless algorithms must be torch's deterministic ones."""
    return (
        x.is_cuda
        and x.dim() == 5
        and not torch.are_deterministic_algorithms_enabled()
        and _kernels() is not None
    )


class BatchNorm(nn.BatchNorm3d):
    """`nn.BatchNorm3d`, same entries and arithmetic, that can also add a residual and apply ReLU, group by group.

    `groups` (1 unless `set_groups` changes it): the batch is that many equal micro-batches, one after the other.
    """

    groups = 1

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:  # noqa: A002
        """Return relu(norm(input) + residual), shape and dtype of `input` (B, C, D, H, W)."""
        if (
            self.affine
            and self.track_running_stats
            and self.momentum is not None
            and fused_on(input)
        ):
            if self.training:
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(self.groups)
                return _Grouped.apply(
                    input, self.weight, self.bias, residual, self.running_mean, self.running_var,
                    self.momentum, self.eps, self.groups, relu,
                )  # fmt: skip
            if not torch.is_grad_enabled():
                return _evaluate(self, input, residual, relu)
        if self.training and self.groups > 1:
            normed = torch.cat(
                [super(BatchNorm, self).forward(part) for part in input.chunk(self.groups)]
            )
        else:
            normed = super().forward(input)
        if residual is not None:
            normed += residual
        return F.relu(normed, inplace=True) if relu else normed


def norm_act(
    norm: nn.Module, x: Tensor, residual: Tensor | None = None, *, relu: bool = True
) -> Tensor:
    """Return relu(norm(x) + residual), fused where `norm` is a BatchNorm of this module (SyncBatchNorm is not)."""
    if isinstance(norm, BatchNorm):
        return norm(x, residual, relu)
    out = norm(x)
    if residual is not None:
        out = out + residual
    return F.relu(out) if relu else out


def set_groups(network: nn.Module, groups: int) -> None:
    """Set for every BatchNorm of `network` how many micro-batches the next batches in training mode hold."""
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.groups = groups


class SharedStatistics:
    """BatchNorm statistics of several ranks that come out as those of one rank which took all micro-batches in turn.

    In a round every rank passes one micro-batch, rank 0's being the first. One rank would follow them with momentum m,
    s <- (1 - m) s + m x: after a round of W, (1 - m)^W of the old statistics is left, and x_r has m (1 - m)^(W - 1 - r). A
    rank that sees only its own micro-batch gets the same decay from momentum 1 - (1 - m)^W, and the mean over ranks
    weighted by m (1 - m)^(W - 1 - r) / (1 - (1 - m)^W), which add up to 1, gives each x_r its weight. All of it is linear,
    so one mean an epoch does, for averages of the statistics as well.
    """

    def __init__(self, network: nn.Module, rank: int, world: int) -> None:
        layers = [module for module in network.modules() if isinstance(module, BatchNorm)]
        (momentum,) = {layer.momentum for layer in layers}
        assert momentum is not None
        self.left, self.world = 1 - momentum, world
        for layer in layers:
            layer.momentum = 1 - self.left**world
        self.weight = momentum * self.left ** (world - 1 - rank) / (1 - self.left**world)

    def short_round(self, statistics: Tensor, ranks: int, before: Tensor | None) -> None:
        """Correct `statistics`, in place, after a round in which only the first `ranks` ranks had a micro-batch.

        `before`: the statistics before the round, on a rank that had none; None on the others. Until `combine` they are
        intermediate values: only the weighted mean over the ranks is right.
        """
        if before is None:
            statistics.mul_(self.left ** (ranks - self.world))
        else:
            torch.mul(before, self.left**ranks, out=statistics)

    def combine(self, tensors: Sequence[Tensor]) -> None:
        """Replace each of `tensors`, statistics or averages of them, by the weighted mean over the ranks, in place."""
        whole = torch.cat([tensor.flatten() for tensor in tensors]) * self.weight
        dist.all_reduce(whole)
        for tensor, part in zip(
            tensors, whole.split([one.numel() for one in tensors]), strict=True
        ):
            tensor.copy_(part.view(tensor.shape))


def max_pool(x_BCDHW: Tensor) -> Tensor:
    """Return the 3x3x3 max-pool of stride 2 and padding 1 by the Triton kernels; ask `fused_on` first.

    Its backward gathers, where torch's adds atomically in any order and at a tenth of the speed.
    """
    return _MaxPool.apply(x_BCDHW)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def _tile(channels: int) -> tuple[int, int]:
    """Rows and channels of a tile: rows of memory read whole where they are short."""
    columns = min(128, max(16, 1 << (channels - 1).bit_length()))
    return TILE // columns, columns


def _splits(rows: int, tiles: int, groups: int, height: int) -> tuple[int, int]:
    """How many parts the rows of a group are reduced in, and how many rows each has."""
    splits = max(1, min(-(-rows // height), PROGRAMS // (tiles * groups)))
    per_split = -(-rows // splits)
    per_split = -(-per_split // height) * height
    return -(-rows // per_split), per_split


def _layout(x: Tensor, groups: int) -> tuple[int, int, int, int, int, int, int]:
    """Rows of a group, channels, tile rows, tile channels, tiles across, splits, rows of a split."""
    channels = x.shape[1]
    rows = x.numel() // channels // groups
    height, width = _tile(channels)
    tiles = -(-channels // width)
    return rows, channels, height, width, tiles, *_splits(rows, tiles, groups, height)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, running_mean: Tensor,
        running_var: Tensor, momentum: float, eps: float, groups: int, relu: bool,
    ) -> Tensor:  # fmt: skip
        assert len(x) % groups == 0, f"{len(x)} volumes are not {groups} equal micro-batches"
        kernels = _kernels()
        x = _channels_last(x)
        rows, channels, height, width, tiles, splits, per_split = _layout(x, groups)
        if rows <= 1:
            raise ValueError(
                f"BatchNorm needs more than one value a channel, got {tuple(x.shape)} in {groups} groups"
            )
        partial = torch.empty(groups, splits, 2, channels, device=x.device)
        mean, rstd = torch.empty(2, groups, channels, device=x.device)
        kernels.moments[(tiles, splits, groups)](
            x,
            partial,
            rows,
            channels,
            per_split,
            splits,
            BM=height,
            BC=width,
            STAGES=STAGES,
            num_warps=WARPS,
        )
        kernels.finish_moments[(-(-channels // 16),)](
            x, partial, mean, rstd, running_mean, running_var, rows, channels, splits, groups, momentum, eps,
            BS=FINISH, BC=16,
        )  # fmt: skip
        y = torch.empty_like(x)
        if residual is not None:
            residual = _channels_last(residual)
        _normalise(x, residual, y, mean, rstd, weight, bias, groups, relu)
        ctx.save_for_backward(
            x, y if residual is not None and relu else None, mean, rstd, weight, bias
        )
        ctx.groups, ctx.relu, ctx.has_residual = groups, relu, residual is not None
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kernels = _kernels()
        x, y, mean, rstd, weight, bias = ctx.saved_tensors
        groups = ctx.groups
        dy = _channels_last(dy)
        rows, channels, height, width, tiles, splits, per_split = _layout(x, groups)
        partial = torch.empty(groups, splits, 2, channels, device=x.device)
        sums = torch.empty(groups, 2, channels, device=x.device)
        dweight, dbias = torch.empty(2, channels, device=x.device)
        dz = torch.empty_like(x, dtype=ctx.residual_dtype) if ctx.has_residual else dy
        kernels.backward_sums[(tiles, splits, groups)](
            dy, x, y if y is not None else x, dz, partial, mean, rstd, weight, bias, rows, channels, per_split, splits,
            HAS_RESIDUAL=ctx.has_residual, RELU=ctx.relu, BM=height, BC=width, STAGES=STAGES, num_warps=WARPS,
        )  # fmt: skip
        kernels.finish_backward[(-(-channels // 16),)](
            partial, sums, dweight, dbias, channels, splits, groups, BS=FINISH, BC=16
        )
        dx = torch.empty_like(x)
        kernels.backward_apply[(-(-rows // height), tiles, groups)](
            dz, x, dx, sums, mean, rstd, weight, bias, rows, channels,
            RELU=ctx.relu and not ctx.has_residual, BM=height, BC=width,
        )  # fmt: skip
        return (
            dx,
            dweight,
            dbias,
            dz if ctx.has_residual else None,
            None,
            None,
            None,
            None,
            None,
            None,
        )


def _normalise(
    x: Tensor, residual: Tensor | None, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
    groups: int, relu: bool,
) -> None:  # fmt: skip
    rows, channels, height, width, tiles, _, _ = _layout(x, groups)
    _kernels().normalise[(-(-rows // height), tiles, groups)](
        x, x if residual is None else residual, y, mean, rstd, weight, bias, rows, channels,
        HAS_RESIDUAL=residual is not None, RELU=relu, BM=height, BC=width,
    )  # fmt: skip


def _evaluate(norm: BatchNorm, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """By the running statistics, in one pass."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    x = _channels_last(x)
    y = torch.empty_like(x)
    if residual is not None:
        residual = _channels_last(residual)
    _normalise(
        x,
        residual,
        y,
        norm.running_mean,
        torch.rsqrt(norm.running_var + norm.eps),
        norm.weight,
        norm.bias,
        1,
        relu,
    )
    return y


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = _channels_last(x)
        sides = [(side + 1) // 2 for side in x.shape[2:]]
        y = torch.empty(
            (*x.shape[:2], *sides),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last_3d,
        )
        taken = torch.empty_like(y, dtype=torch.uint8)
        count, channels = y.numel() // y.shape[1], y.shape[1]
        width = _tile(channels)[1]
        height = 1024 // width
        _kernels().max_pool[(-(-count // height), -(-channels // width))](
            x, y, taken, count, *x.shape[2:], *sides, channels, BM=height, BC=width
        )
        ctx.save_for_backward(taken)
        ctx.like = (x.shape, x.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (taken,) = ctx.saved_tensors
        shape, dtype = ctx.like
        dy = _channels_last(dy)
        dx = torch.empty(shape, dtype=dtype, device=dy.device, memory_format=torch.channels_last_3d)
        count, channels = dx.numel() // dx.shape[1], dx.shape[1]
        width = _tile(channels)[1]
        height = 1024 // width
        _kernels().max_pool_backward[(-(-count // height), -(-channels // width))](
            dy, taken, dx, count, *shape[2:], *dy.shape[2:], channels, BM=height, BC=width
        )
        return dx
