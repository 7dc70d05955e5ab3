"""The sum of gradients over ranks, once per optimiser step, sent while the backward pass is still running.

Backward reaches the last layers first, and in a ResNet these hold most of the weights: their gradients travel while the
earlier layers, which hold most of the arithmetic, are still being computed. NCCL's collectives run on a stream of their
own, so a CUDA graph captures them together with the pass they overlap.

On two H200s (ResNet-50, batch 6x2, 185 MB of gradients) a step of 10.9 ms at 96 voxels becomes 11.9 with buckets packed,
sent and copied back in float32, 11.8 when gradients become views of the sent buffers, and 11.4 when convolutions' gradients
travel in fp16, as the pass computed them; at 128 voxels 20.1, 21.3, 21.5 and 20.8, at 64 voxels 5.9, 6.8,
6.7 and 6.4. Of the last at 96 voxels, packing and unpacking take 0.2 ms, and sending slows the pass by 0.3. Buckets
of 16 MiB or 64 MiB differ by 0.1 ms at most; fewer channels for NCCL cost more than the multiprocessors that they leave free
bring (2, 4, 8 and 16 of them: 12.0, 11.7, 11.6, 11.5).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 32 * 2**20
"""Gradients that travel together: large enough for the links' full rate, small enough that the last one is soon done."""


class GradientSum:
    """Sums the gradients of those `parameters` that are trainable now; make another when that changes.

    Every rank must make it from the same parameters and run the same backward passes. `convolutions_as`: the dtype in which
    gradients of convolutions' weights travel and are added up; None: their own. fp16 under autocast costs little compared
    with the rounding of the additions: a single pass has computed those gradients in fp16. A sum too large for it is
    infinite on every rank alike, as any gradient is that the loss scale has made too large.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        bucket_bytes: int = BUCKET_BYTES,
        *,
        convolutions_as: torch.dtype | None = None,
    ) -> None:
        self._buckets: list[_Bucket] = []
        filling: dict[tuple[torch.dtype, torch.dtype], _Bucket] = {}
        for place, parameter in enumerate(reversed([p for p in parameters if p.requires_grad])):
            dtype = parameter.dtype
            if convolutions_as is not None and parameter.dim() == 5:
                dtype = convolutions_as
            kind = dtype, parameter.dtype
            if kind not in filling or filling[kind].nbytes >= bucket_bytes:
                filling[kind] = _Bucket(dtype)
                self._buckets.append(filling[kind])
            filling[kind].add(parameter, place)
        self._buckets.sort(key=lambda bucket: bucket.last)
        for bucket in self._buckets:
            # Odd sizes at the end: nothing behind them begins where a GPU reads 16 bytes at a time
            bucket.parameters.sort(key=lambda parameter: parameter.numel() % 8 > 0)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, bucket))  # type: ignore[no-untyped-call]
            for bucket in self._buckets
            for parameter in bucket.parameters
        ]
        self._active = False
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def over(self, last: bool) -> Iterator[None]:
        """Around the backward pass of a micro-batch; after that of a step's `last`, each `.grad` is the sum over all ranks.

        Raises RuntimeError when a trainable parameter got no gradient: the other ranks would wait for it.
        """
        if not last:
            yield
            return
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        self._sent = []
        self._active = True
        try:
            yield
        finally:
            self._active = False
        if len(self._sent) < len(self._buckets):
            missing = sum(bucket.missing for bucket in self._buckets)
            raise RuntimeError(
                f"{missing} trainable parameters got no gradient in the backward pass"
            )
        for bucket, (work, flat) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            bucket.hand_out(flat)
        self._sent = []

    def _arrived(self, bucket: "_Bucket", _: Tensor) -> None:
        if not self._active:
            return
        bucket.missing -= 1
        # In the buckets' order on every rank: collectives are matched by the order they are issued in.
        while len(self._sent) < len(self._buckets) and not self._buckets[len(self._sent)].missing:
            flat = self._buckets[len(self._sent)].collected()
            work = dist.all_reduce(flat, async_op=True)
            assert work is not None
            self._sent.append((work, flat))


@dataclass
class _Bucket:
    """Parameters of one dtype whose gradients travel together."""

    dtype: torch.dtype
    """The dtype in which they travel."""
    parameters: list[Tensor] = field(default_factory=list)
    nbytes: int = 0
    last: int = 0
    """When its last gradient arrives: place among all of them."""
    missing: int = 0
    """Gradients that have not arrived yet."""

    def add(self, parameter: Tensor, place: int) -> None:
        self.nbytes += parameter.numel() * self.dtype.itemsize
        self.last = place
        self.parameters.append(parameter)

    def collected(self) -> Tensor:
        """Return all gradients in one row; the parameters have none until `hand_out`."""
        grads = [_as_stored(parameter) for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        if grads[0].dtype == self.dtype:
            return torch.cat(grads)
        flat = grads[0].new_empty(sum(grad.numel() for grad in grads), dtype=self.dtype)
        torch._foreach_copy_(self._pieces(flat), grads)
        return flat

    def hand_out(self, flat: Tensor) -> None:
        """Give each parameter its piece of `flat` as gradient, in the order of the parameter's memory."""
        for parameter, piece in zip(
            self.parameters, self._pieces(flat.to(self.parameters[0].dtype)), strict=True
        ):
            parameter.grad = piece.as_strided(
                parameter.shape, parameter.stride(), piece.storage_offset()
            )

    def _pieces(self, flat: Tensor) -> list[Tensor]:
        return list(torch.split(flat, [parameter.numel() for parameter in self.parameters]))


def _as_stored(parameter: Tensor) -> Tensor:
    """The gradient as one row in the order of the parameter's memory, which is the same on every rank."""
    grad = parameter.grad
    assert grad is not None
    if _order(grad) != _order(parameter):
        grad = torch.empty_like(parameter).copy_(grad)
    return grad.as_strided((grad.numel(),), (1,))


def _order(tensor: Tensor) -> list[int]:
    """Strides of the dimensions that have more than one place: those of the others mean nothing."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
