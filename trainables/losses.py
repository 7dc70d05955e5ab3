"""Per-sample losses, and the deferred class weights as a pure function of epoch and class counts.

The contract with the training loop: a class-weighted mean is taken over the whole optimiser step and nowhere else,

    loss of a micro-batch = (weights_C[labels_B] * sample_losses(...)).sum() / samples in the optimiser step

so that gradients added up over micro-batches are those of the whole batch, however it was split. (PyTorch's weighted
`cross_entropy(reduction="mean")` divides by the sum of the weights it met: a micro-batch of one class then ignores its
weight altogether, and a mean of means is not the mean.) Over ranks, the samples of all of them count, and gradients are
summed; where a wrapper averages gradients instead, multiply by the number of ranks.

Nothing here waits for the device: margins and weights are tensors made once, moved to the device by the caller and,
under a CUDA graph, overwritten in place when the class weights begin.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def ldam_margins(class_counts: Sequence[int] | np.ndarray, max_m: float) -> Tensor:
    """Return LDAM's margin of each class, float32 of shape (C,), on the CPU: max_m * (n_j / n_min)^(-1/4).

    The rarest class gets `max_m`. `class_counts` are the samples of each class in the training fold.
    Raises ValueError for a class without a sample: its margin would be infinite.
    Source: Cao et al. 2019, Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, sec. 3.2, with the
    constant chosen as in the authors' code, so that the largest margin is `max_m`.
    """
    counts = _checked(class_counts)
    return torch.from_numpy(max_m * (counts / counts.min()) ** -0.25).float()


def class_weights(
    class_counts: Sequence[int] | np.ndarray,
    beta: float,
    *,
    mean_over: Literal["samples", "classes"] = "samples",
) -> Tensor:
    """Return the weight of each class, float32 of shape (C,), on the CPU: (1 - beta) / (1 - beta^n_j), scaled to mean 1.

    The mean is over the fold's samples, sum_j n_j w_j / N = 1, as a loss is divided by samples: then its scale, and an
    update's size with it, stays the same when the weights begin. `mean_over="classes"` is the paper's scaling, in which the
    weights sum to C: at 180 and 20 samples it takes the loss to .36 of itself. `beta` 0 weights all classes alike; towards 1
    it becomes inverse frequency, which .9999 already is below some thousand samples.
    Raises ValueError for a class without a sample, or `beta` outside [0, 1).
    Source: Cui et al. 2019, Class-Balanced Loss Based on Effective Number of Samples; scaled otherwise.
    """
    if not 0 <= beta < 1:
        raise ValueError(
            f"beta={beta!r}: the weight (1 - beta) / (1 - beta^n) is defined for 0 <= beta < 1"
        )
    counts = _checked(class_counts)
    # 1 - beta^n by expm1: the plain difference loses digits as beta nears 1
    weights = 1 / (-np.expm1(counts * np.log(beta)) if beta > 0 else np.ones_like(counts))
    shares = (
        counts / counts.sum() if mean_over == "samples" else np.full_like(counts, 1 / len(counts))
    )
    return torch.from_numpy(weights / np.sum(shares * weights)).float()


def drw_active(epoch: int, start: int) -> bool:
    """Return whether class weights apply in `epoch`; both are 1-based, and `start` is the first epoch with weights.

    Deferred re-weighting: Cao et al. 2019, algorithm 1. Before `start` all weights are one.
    """
    return epoch >= start


def logit_scale(loss: str, head: str, s: float) -> float:
    """Return the factor on the network's logits: softmax(factor * logits) is the predicted probability.

    `s` where the loss is LDAM or the head yields cosines (which a softmax could hardly separate unscaled), else 1.
    """
    return s if loss == "ldam" or head == "cosine" else 1.0


def sample_losses(
    logits_BC: Tensor,
    labels_B: Tensor,
    *,
    loss: str,
    margins: Tensor | None = None,
    s: float,
    focal_gamma: float = 2.0,
) -> Tensor:
    """Return each sample's loss, float32 of shape (B,), not weighted and not reduced.

    ldam:          CE(s * (z - m_y onehot(y)), y), `margins` of shape (C,) on the logits' device; Cao et al. 2019, sec. 3.2
    cross_entropy: CE(s * z, y)
    focal:         (1 - p_y)^focal_gamma * CE(s * z, y), p = softmax(s * z); Lin et al. 2017, eq. 4

    `s` is what `logit_scale` returns, for all three. Logits may be half precision; all arithmetic is float32, whatever
    autocast is set to. Labels are int64 of shape (B,). Losses at different `s` and margins do not compare.
    Raises ValueError for an unknown loss, or LDAM without margins.
    """
    z_BC = logits_BC.float()
    if loss == "ldam":
        if margins is None:
            raise ValueError("loss='ldam' needs margins: pass ldam_margins(class_counts, max_m)")
        z_BC = z_BC - margins.float() * _onehot(labels_B, z_BC)
        return F.cross_entropy(s * z_BC, labels_B, reduction="none")
    if loss == "cross_entropy":
        return F.cross_entropy(s * z_BC, labels_B, reduction="none")
    if loss == "focal":
        # log(1 - p_y) as a sum over the other classes: once p_y rounds to 1, the slope of (1 - p_y)^gamma is infinite
        # for gamma < 1, and the textbook form has NaN for a gradient
        log_p_BC = F.log_softmax(s * z_BC, dim=1)
        log_rest_B = log_p_BC.masked_fill(_onehot(labels_B, z_BC), -torch.inf).logsumexp(dim=1)
        return -torch.exp(focal_gamma * log_rest_B) * log_p_BC.gather(1, labels_B[:, None]).squeeze(
            1
        )
    raise ValueError(f"loss={loss!r}: must be 'ldam', 'cross_entropy' or 'focal'")


def _onehot(labels_B: Tensor, like_BC: Tensor) -> Tensor:
    """Boolean (B, C); made by comparison, since `F.one_hot` may look at the values and so wait for the device."""
    return labels_B[:, None] == torch.arange(like_BC.shape[1], device=like_BC.device)


def _checked(class_counts: Sequence[int] | np.ndarray) -> np.ndarray:
    counts = np.asarray(class_counts, dtype=np.float64)
    missing = [j for j, count in enumerate(counts) if not count >= 1]
    if missing or len(counts) < 2:
        which = (
            f"class {', '.join(map(str, missing))} has no training sample"
            if missing
            else "fewer than two classes"
        )
        raise ValueError(
            f"training samples of each class {[int(n) for n in counts]}: {which}; every class needs at least one: "
            "choose another fold, or lower num_classes"
        )
    return counts
