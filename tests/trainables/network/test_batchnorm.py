"""BatchNorm by groups against torch's own, one micro-batch after the other; the max-pool against torch's."""

import pytest
import torch
from torch import nn

from trainables.network.batchnorm import BatchNorm, max_pool, norm_act, set_groups

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with Triton")


def reference(
    norm: nn.BatchNorm3d, x: torch.Tensor, residual: torch.Tensor | None, groups: int, relu: bool
) -> torch.Tensor:
    """Micro-batches one after the other, by separate operations."""
    out = torch.cat([norm(part) for part in x.chunk(groups)])
    if residual is not None:
        out = out + residual
    return out.relu() if relu else out


def compare(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    groups: int,
    residual: bool,
    relu: bool,
    error: float,
) -> None:
    """Forward, all gradients and running statistics, in the norm of the difference over the norm of the reference."""
    torch.manual_seed(0)
    ours, theirs = BatchNorm(shape[1]), nn.BatchNorm3d(shape[1])
    with torch.no_grad():
        ours.weight.uniform_(0.5, 1.5)
        ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.to(device).train(), theirs.to(device).double().train()
    ours.groups = groups
    x = (
        (3 + 2 * torch.randn(shape))
        .to(device, dtype)
        .contiguous(memory_format=torch.channels_last_3d)
        .requires_grad_()
    )
    r = (
        torch.randn(shape)
        .to(device, dtype)
        .contiguous(memory_format=torch.channels_last_3d)
        .requires_grad_()
    )
    dy = torch.randn(shape).to(device, dtype)
    x64, r64 = x.detach().double().requires_grad_(), r.detach().double().requires_grad_()
    out = norm_act(ours, x, r if residual else None, relu=relu)
    expected = reference(theirs, x64, r64 if residual else None, groups, relu)
    out.backward(dy)
    expected.backward(dy.double())
    pairs = [(out, expected), (x.grad, x64.grad)]
    pairs += [(ours.weight.grad, theirs.weight.grad), (ours.bias.grad, theirs.bias.grad)]
    pairs += [(ours.running_mean, theirs.running_mean), (ours.running_var, theirs.running_var)]
    if residual:
        pairs.append((r.grad, r64.grad))
    for mine, right in pairs:
        assert mine is not None
        assert right is not None
        assert (mine.double() - right).norm() <= error * right.norm()
    assert out.dtype == dtype
    assert ours.num_batches_tracked is not None
    assert int(ours.num_batches_tracked) == groups


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(("residual", "relu"), [(False, False), (False, True), (True, True)])
def test_groups_are_micro_batches_one_after_the_other(
    groups: int, residual: bool, relu: bool
) -> None:
    compare("cpu", torch.float32, (6, 5, 3, 4, 5), groups, residual, relu, 1e-5)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(("residual", "relu"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
    ids=str,
)
@pytest.mark.parametrize(
    "shape", [(6, 64, 17, 16, 9), (12, 8, 5, 7, 3), (6, 2048, 3, 3, 3), (30, 1000, 1, 1, 1)]
)
def test_the_fused_kernels_equal_torchs_norm_sum_and_relu(
    shape: tuple[int, ...],
    groups: int,
    residual: bool,
    relu: bool,
    dtype: torch.dtype,
    error: float,
) -> None:
    compare("cuda", dtype, shape, groups, residual, relu, error)


@pytest.mark.gpu
@needs_gpu
def test_fused_evaluation_equals_torchs() -> None:
    torch.manual_seed(0)
    norm = BatchNorm(48).cuda()
    norm.running_mean.normal_()  # type: ignore[union-attr]
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    norm.eval()
    x, residual = torch.randn(2, 3, 48, 7, 8, 9, device="cuda")
    with torch.no_grad():
        ours = norm_act(norm, x, residual)
    torch.testing.assert_close(
        ours, nn.BatchNorm3d.forward(norm, x).add(residual).relu().detach(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.gpu
@needs_gpu
def test_not_a_number_stays_one_through_norm_and_pool() -> None:
    x = torch.randn(2, 16, 6, 6, 6, device="cuda")
    x[0, 3, 2, 2, 2] = torch.nan
    norm = BatchNorm(16).cuda()
    assert norm_act(norm, x).isnan()[:, 3].all()
    assert max_pool(x).isnan()[0, 3].any()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 64, 12, 12, 12), (3, 8, 7, 5, 9), (1, 24, 2, 3, 1)])
def test_the_max_pool_equals_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (
        torch.randn(shape, device="cuda")
        .to(dtype)
        .contiguous(memory_format=torch.channels_last_3d)
        .requires_grad_()
    )
    x64 = x.detach().double().requires_grad_()
    ours, theirs = max_pool(x), nn.functional.max_pool3d(x64, 3, 2, 1)
    assert torch.equal(ours.double(), theirs)
    dy = torch.randn_like(ours)
    ours.backward(dy)
    theirs.backward(dy.double())
    assert x.grad is not None
    torch.testing.assert_close(
        x.grad.double(), x64.grad, rtol=1e-3, atol=1e-2 if dtype is torch.float16 else 1e-6
    )


def test_groups_are_set_in_the_whole_network() -> None:
    network = nn.Sequential(BatchNorm(2), nn.Sequential(BatchNorm(2)), nn.BatchNorm3d(2))
    set_groups(network, 3)
    assert [module.groups for module in network.modules() if isinstance(module, BatchNorm)] == [
        3,
        3,
    ]
