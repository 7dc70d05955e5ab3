import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.losses import class_weights, drw_active, ldam_margins, logit_scale, sample_losses

LOSSES = ("ldam", "cross_entropy", "focal")


def float64_losses(
    logits: np.ndarray,
    labels: Any,
    *,
    loss: str,
    margins: Any = None,
    s: float,
    focal_gamma: float = 2.0,
) -> np.ndarray:
    """The published formulas, sample by sample."""
    losses = []
    for z, y in zip(np.asarray(logits, np.float64), labels, strict=True):
        z = z.copy()
        if loss == "ldam":
            z[y] -= margins[y]
        z = s * z
        log_p = z[y] - z.max() - math.log(np.exp(z - z.max()).sum())
        losses.append(-log_p * (1 - math.exp(log_p)) ** focal_gamma if loss == "focal" else -log_p)
    return np.array(losses)


# Margins and weights


@pytest.mark.parametrize("counts", [[180, 20], [20, 180], [7, 7], [1, 1000], [300, 40, 5]])
@pytest.mark.parametrize("max_m", [0.2, 0.3, 0.5])
def test_margins_are_the_fourth_root_law_with_the_largest_margin_at_the_rarest_class(
    counts: list[int], max_m: float
) -> None:
    powers = [n**-0.25 for n in counts]
    expected = [max_m * power / max(powers) for power in powers]
    margins = ldam_margins(counts, max_m)
    assert margins.dtype == torch.float32
    np.testing.assert_allclose(margins, expected, rtol=1e-6)
    assert margins.max() == pytest.approx(max_m)
    assert margins[int(np.argmin(counts))] == margins.max()


def test_a_worked_margin() -> None:
    # 9 times as many samples: a margin smaller by the fourth root of 9, which is the root of 3
    np.testing.assert_allclose(ldam_margins([180, 20], 0.3), [0.3 / math.sqrt(3), 0.3], rtol=1e-6)


@pytest.mark.parametrize(
    ("counts", "beta", "expected"),
    [
        ([180, 20], 0.9999, [0.201, 1.799]),
        ([180, 20], 0.99, [0.358, 1.642]),
        ([180, 20], 0.0, [1.0, 1.0]),
        ([50, 50], 0.9999, [1.0, 1.0]),
    ],
)
def test_class_weights_have_their_worked_values(
    counts: list[int], beta: float, expected: list[float]
) -> None:
    """As published they sum to the number of classes."""
    published = class_weights(counts, beta, mean_over="classes")
    np.testing.assert_allclose(published, expected, atol=6e-4)
    np.testing.assert_allclose(
        class_weights(counts, beta),
        np.array(expected) / np.average(expected, weights=counts),
        rtol=6e-3,
    )


@pytest.mark.parametrize("counts", [[180, 20], [3, 900, 41], [1, 1, 1, 5]])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.9999, 1 - 1e-12])
def test_class_weights_follow_the_effective_number_and_have_mean_1_over_the_samples(
    counts: list[int], beta: float
) -> None:
    weights, published = (
        class_weights(counts, beta),
        class_weights(counts, beta, mean_over="classes"),
    )
    effective = [
        sum(beta**k for k in range(n)) for n in counts
    ]  # (1 - beta^n) / (1 - beta), as the series it is
    expected = np.array([1 / n for n in effective])
    np.testing.assert_allclose(published, expected * len(counts) / expected.sum(), rtol=1e-6)
    np.testing.assert_allclose(weights, expected / np.average(expected, weights=counts), rtol=1e-6)
    assert np.dot(weights.numpy(), counts) == pytest.approx(sum(counts))
    assert published.sum() == pytest.approx(len(counts))
    assert weights.dtype == torch.float32


@pytest.mark.parametrize(
    "make", [lambda n: ldam_margins(n, 0.2), lambda n: class_weights(n, 0.9999)]
)
def test_a_class_without_a_training_sample_is_an_error(make: Callable[[list[int]], object]) -> None:
    with pytest.raises(ValueError, match=r"\[12, 0, 3\]: class 1 has no training sample"):
        make([12, 0, 3])


@pytest.mark.parametrize("beta", [1.0, -0.1, math.nan])
def test_a_beta_outside_its_range_is_an_error(beta: float) -> None:
    with pytest.raises(ValueError, match="0 <= beta < 1"):
        class_weights([3, 4], beta)


@pytest.mark.parametrize(
    ("epoch", "start", "active"),
    [(1, 1, True), (24, 25, False), (25, 25, True), (60, 25, True), (60, 61, False)],
)
def test_deferred_weights_begin_in_the_named_epoch_counted_from_one(
    epoch: int, start: int, active: bool
) -> None:
    assert drw_active(epoch, start) is active


@pytest.mark.parametrize(
    ("loss", "head", "scale"),
    [
        ("ldam", "cosine", 15.0),
        ("ldam", "linear", 15.0),
        ("cross_entropy", "cosine", 15.0),
        ("focal", "cosine", 15.0),
        ("cross_entropy", "linear", 1.0),
        ("focal", "linear", 1.0),
    ],
)
def test_logits_are_scaled_under_ldam_and_under_cosines(loss: str, head: str, scale: float) -> None:
    assert logit_scale(loss, head, 15.0) == scale


# Losses


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("s", [1.0, 20.0])
def test_losses_equal_the_float64_formula(loss: str, num_classes: int, s: float) -> None:
    random = np.random.default_rng(0)
    logits = random.uniform(-1, 1, (64, num_classes)).astype(np.float32)
    labels = random.integers(0, num_classes, 64)
    margins = ldam_margins(random.integers(1, 300, num_classes), 0.3)
    options: dict[str, Any] = {"loss": loss, "s": s, "focal_gamma": 2.0}
    ours = sample_losses(
        torch.from_numpy(logits), torch.from_numpy(labels), margins=margins, **options
    )
    assert ours.shape == (64,)
    np.testing.assert_allclose(
        ours,
        float64_losses(logits, labels, margins=margins.numpy(), **options),
        rtol=2e-5,
        atol=2e-6,
    )


def test_a_worked_ldam_loss() -> None:
    # cosines .5 and .1, label 0, margin .2, s 15: log(1 + exp(15 * (.1 - (.5 - .2))))
    loss = sample_losses(
        torch.tensor([[0.5, 0.1]]),
        torch.tensor([0]),
        loss="ldam",
        margins=torch.tensor([0.2, 0.1]),
        s=15.0,
    )
    assert loss.item() == pytest.approx(math.log1p(math.exp(-3.0)), rel=1e-5)


def test_focal_loss_with_gamma_zero_is_cross_entropy() -> None:
    logits, labels = torch.randn(32, 3), torch.randint(3, (32,))
    focal = sample_losses(logits, labels, loss="focal", s=2.0, focal_gamma=0.0)
    torch.testing.assert_close(focal, F.cross_entropy(2 * logits, labels, reduction="none"))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("gap", [0.0, 8.0, 20.0, 1e4])
def test_focal_loss_and_gradient_stay_finite_when_the_probability_rounds_to_one(
    gamma: float, gap: float
) -> None:
    logits = torch.tensor([[gap, 0.0], [-gap, 0.0]], requires_grad=True)
    losses = sample_losses(logits, torch.tensor([0, 0]), loss="focal", s=1.0, focal_gamma=gamma)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_all_arithmetic_is_float32_whatever_arrives_and_whatever_autocast_says(loss: str) -> None:
    logits, labels = torch.randn(16, 2).bfloat16(), torch.randint(2, (16,))
    options: dict[str, Any] = {"loss": loss, "margins": ldam_margins([9, 1], 0.3), "s": 15.0}
    expected = sample_losses(logits.float(), labels, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = sample_losses(logits, labels, **options)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_makes_only_its_own_loss_not_finite(
    loss: str, bad: float
) -> None:
    logits = torch.zeros(3, 2)
    logits[1, 0] = bad
    losses = sample_losses(
        logits, torch.zeros(3, dtype=torch.long), loss=loss, margins=torch.ones(2), s=1.0
    )
    assert torch.isfinite(losses).tolist() == [True, False, True]


def test_an_unknown_loss_and_ldam_without_margins_say_what_to_do() -> None:
    logits, labels = torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"'hinge'.*'ldam', 'cross_entropy' or 'focal'"):
        sample_losses(logits, labels, loss="hinge", s=1.0)
    with pytest.raises(ValueError, match="pass ldam_margins"):
        sample_losses(logits, labels, loss="ldam", s=1.0)


# The weighted loss of an optimiser step


def step_gradient(
    network: nn.Module, inputs: Tensor, labels: Tensor, sizes: list[int], loss: str
) -> tuple[Tensor, Tensor]:
    """Loss and gradients of one optimiser step, done in micro-batches of the given sizes."""
    counts = torch.bincount(labels, minlength=2).numpy()
    margins, weights = ldam_margins(counts, 0.3), class_weights(counts, 0.9999)
    network.zero_grad()
    total = torch.zeros(())
    for x, y in zip(inputs.split(sizes), labels.split(sizes), strict=True):
        losses = sample_losses(network(x), y, loss=loss, margins=margins, s=15.0)
        part = (weights[y] * losses).sum() / len(labels)
        part.backward()
        total += part.detach()
    gradients = [p.grad for p in network.parameters()]
    return total, torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", [[6, 6], [1] * 12, [11, 1], [1, 2, 3, 6], [5, 5, 2], [10, 2]])
def test_the_weighted_loss_of_a_step_is_the_same_however_it_is_split_into_micro_batches(
    loss: str, sizes: list[int]
) -> None:
    torch.manual_seed(0)
    inputs, labels = (
        torch.randn(12, 8),
        torch.tensor([0] * 10 + [1] * 2),
    )  # most splits have parts of one class only
    network = nn.Linear(8, 2)
    whole_loss, whole_gradient = step_gradient(network, inputs, labels, [12], loss)
    split_loss, split_gradient = step_gradient(network, inputs, labels, sizes, loss)
    assert split_loss.item() == pytest.approx(whole_loss.item(), abs=1e-6, rel=1e-6)
    torch.testing.assert_close(split_gradient, whole_gradient, atol=1e-6, rtol=1e-6)


def test_a_micro_batch_of_one_class_keeps_its_weight_where_a_weighted_mean_loses_it() -> None:
    logits, labels = torch.randn(6, 2), torch.ones(6, dtype=torch.long)
    weights = class_weights([180, 20], 0.9999)
    plain = F.cross_entropy(logits, labels)
    assert F.cross_entropy(logits, labels, weight=weights).item() == pytest.approx(
        plain.item(), rel=1e-5
    )  # the trap
    ours = (weights[labels] * sample_losses(logits, labels, loss="cross_entropy", s=1.0)).sum() / 6
    assert ours.item() == pytest.approx(weights[1].item() * plain.item(), rel=1e-6)
    assert weights[1].item() == pytest.approx(1.799 / 0.36, rel=4e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_read_nothing_back_to_the_host(loss: str) -> None:
    # tensors of the meta device have no values: whatever looks at one raises
    logits = torch.zeros(6, 2, device="meta", requires_grad=True)
    labels = torch.zeros(6, dtype=torch.long, device="meta")
    margins, weights = torch.zeros(2, device="meta"), torch.ones(2, device="meta")
    losses = sample_losses(logits, labels, loss=loss, margins=margins, s=15.0)
    (weights[labels] * losses).sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == (6, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: captures a CUDA graph")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_captured_loss_follows_class_weights_overwritten_in_place(loss: str) -> None:
    logits = torch.randn(12, 2, device="cuda", dtype=torch.float16, requires_grad=True)
    labels = torch.randint(2, (12,), device="cuda")
    margins, weights = ldam_margins([9, 3], 0.2).cuda(), torch.ones(2, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        losses = sample_losses(logits, labels, loss=loss, margins=margins, s=15.0)
        total = (weights[labels] * losses).sum() / 12
        return total.detach(), torch.autograd.grad(total, logits)[0]

    with torch.cuda.stream(stream := torch.cuda.Stream()):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for new in (torch.ones(2), class_weights([9, 3], 0.9999)):
        weights.copy_(new)
        graph.replay()
        torch.testing.assert_close(captured, step())
