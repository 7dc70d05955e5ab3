"""The sum of gradients over ranks, once an optimiser step, sent while the backward pass still goes on.

Backward reaches the last layers first, and in a ResNet these hold most of the weights: their gradients travel while the
earlier layers, which hold most of the arithmetic, are still being computed. NCCL's collectives run on a stream of their
own, so a CUDA graph captures them together with the pass they overlap.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 32 * 2**20
"""Gradients that travel together: large enough for the links' full rate, small enough that the last one is soon done."""


class GradientSum:
    """Sums the gradients of those `parameters` that are trainable now; make another when that changes.

    Every rank must make it from the same parameters and run the same backward passes.
    """

    def __init__(self, parameters: Iterable[Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
        self._buckets: list[list[Tensor]] = []
        size = bucket_bytes
        for parameter in reversed([p for p in parameters if p.requires_grad]):
            if size >= bucket_bytes:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            size += parameter.nbytes
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))  # type: ignore[no-untyped-call]
            for number, bucket in enumerate(self._buckets)
            for parameter in bucket
        ]
        self._active = False
        self._missing: list[int] = []
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
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent = []
        self._active = True
        try:
            yield
        finally:
            self._active = False
        if len(self._sent) < len(self._buckets):
            raise RuntimeError(f"{sum(self._missing)} trainable parameters got no gradient in the backward pass")
        for bucket, (work, flat) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            pieces = torch.split(flat, [parameter.numel() for parameter in bucket])
            torch._foreach_copy_([_as_stored(parameter) for parameter in bucket], list(pieces))
        self._sent = []

    def _arrived(self, number: int, _: Tensor) -> None:
        if not self._active:
            return
        self._missing[number] -= 1
        # In the buckets' order on every rank: collectives are matched by the order they are issued in.
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            flat = torch.cat([_as_stored(parameter) for parameter in self._buckets[len(self._sent)]])
            work = dist.all_reduce(flat, async_op=True)
            assert work is not None
            self._sent.append((work, flat))


def _as_stored(parameter: Tensor) -> Tensor:
    """The gradient as one row in the order of its memory, which is the parameter's on every rank."""
    grad = parameter.grad
    assert grad is not None
    if not (grad.is_contiguous() or (grad.dim() == 5 and grad.is_contiguous(memory_format=torch.channels_last_3d))):
        raise RuntimeError(f"a gradient of shape {tuple(grad.shape)} has strides {grad.stride()}: not in one piece")
    return grad.as_strided((grad.numel(),), (1,))
