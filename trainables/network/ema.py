"""Averaged weights of a network, and the recalibration of BatchNorm statistics.

What went wrong elsewhere, and is avoided here: an average that still carries much of the initial weights, run with the
current network's BatchNorm statistics, lets activations grow layer by layer until logits saturate or overflow. The
raw network is fine all along. So the decay warms up, and BatchNorm statistics are averaged like the weights;
`buffers="copied"` keeps the faulty way, for the record and for the ablation.
"""

from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn


def averaging_weight(updates: Tensor, *, decay: float, warmup: bool) -> Tensor:
    """Return the new weights' share in the next average, 1 - min(decay, (1 + updates) / (10 + updates)), as float64.

    `updates` (any integer tensor) counts the averages already taken: 0 before the first, which with warm-up takes 90 %
    of the new weights. Without warm-up the share is 1 - decay throughout.
    """
    share = 9.0 / (10.0 + updates.double())
    return share.clamp(min=1.0 - decay) if warmup else torch.full_like(share, 1.0 - decay)


class AveragedWeights:
    """Exponential moving average of a network's weights, updated once an optimiser step.

    `network` is a copy of the given one that starts as its equal, in eval mode, without gradients. `updates` is the number
    of updates so far, a tensor on the weights' device. Float buffers (BatchNorm statistics) are "averaged" like the weights
    or "copied"; integer buffers are always copied. Raises ValueError for half-precision weights: a step of 1 - decay is
    below their resolution, and the average would stand still without an error.

    On a GPU nothing is read on the host, and all state is changed in place: an update can be part of a CUDA graph.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        decay: float,
        warmup: bool = True,
        buffers: Literal["averaged", "copied"] = "averaged",
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"decay={decay!r}: must be in [0, 1); 0 makes the average the raw weights"
            )
        if buffers not in ("averaged", "copied"):
            raise ValueError(f"buffers={buffers!r}: must be 'averaged' or 'copied'")
        for name, weight in network.named_parameters():
            if weight.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{name} is {weight.dtype}: only float32 and float64 weights can be averaged; "
                    "keep the weights in float32 and use autocast"
                )
        self.network = deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup
        self.buffers = buffers
        self.updates = torch.zeros((), dtype=torch.int64, device=next(network.parameters()).device)

    @torch.no_grad()
    def update(self, network: nn.Module, *, skip: Tensor | None = None) -> None:
        """Take the weights of `network` into the average. Call it once after each optimiser step.

        `network` is the module this was made from, not its DistributedDataParallel or compiled wrapper. `skip`, a tensor
        of one number on the weights' device, is 1 if the step was skipped: then the average and `updates` stay unchanged,
        and only copied buffers follow the network. Raises ValueError if the network's tensors are not the averaged ones.
        """
        averages, values, copies, originals = self._pairs(network)
        weight = averaging_weight(self.updates, decay=self.decay, warmup=self.warmup)
        skipped = (
            torch.zeros_like(weight, dtype=torch.float32) if skip is None else skip.float().view(())
        )
        if weight.is_cpu:
            if not skipped:
                torch._foreach_lerp_(averages, values, weight.item())
        else:
            # No lerp takes one weight from the device for all tensors at once, but a step of fused SGD does: with decay 1
            # and the sign turned, average -= weight * (average - value). One kernel, a third of the time of sub, mul, add.
            torch._fused_sgd_(
                averages,
                values,
                [],
                weight_decay=1.0,
                momentum=0.0,
                lr=weight.float(),
                dampening=0.0,
                nesterov=False,
                maximize=True,
                is_first_step=False,
                found_inf=skipped,
            )
        self.updates += 1 - skipped.long()
        if copies:
            torch._foreach_copy_(copies, originals)

    def _pairs(
        self, network: nn.Module
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """The averaged tensors and their new values, and the copied tensors and their originals."""
        averages, values, copies, originals = [], [], [], []
        mine = [*self.network.named_parameters(), *self.network.named_buffers()]
        new = [*network.named_parameters(), *network.named_buffers()]
        if [name for name, _ in mine] != [name for name, _ in new]:
            differ = sorted({name for name, _ in mine} ^ {name for name, _ in new})
            raise ValueError(
                f"{type(network).__name__} does not have the tensors of the averaged {type(self.network).__name__} "
                f"({', '.join(differ[:3])}, ...): pass the bare module, not its DDP or compiled wrapper"
            )
        for (_, average), (_, value) in zip(mine, new, strict=True):
            if average.is_floating_point() and (
                isinstance(average, nn.Parameter) or self.buffers == "averaged"
            ):
                averages.append(average)
                values.append(value.detach())
            else:
                copies.append(average)
                originals.append(value)
        return averages, values, copies, originals

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict` to continue bit for bit: tensors, shared with this object as in torch."""
        return {"network": self.network.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state made by `state_dict`. Raises RuntimeError, as torch does, if the network's tensors differ."""
        self.network.load_state_dict(state["network"], strict=True)
        self.updates.copy_(torch.as_tensor(state["updates"]))
