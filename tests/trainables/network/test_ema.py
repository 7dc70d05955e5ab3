import copy
import io
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainables.network.ema import AveragedWeights, averaging_weight


def small_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv3d(1, 4, 3),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4 * 8, 2),
    )


def train_step(network: nn.Module, step: int) -> None:
    """Move weights and BatchNorm statistics of the network, as an optimiser step would."""
    generator = torch.Generator().manual_seed(step)
    network.train()
    network(torch.randn(3, 1, 4, 4, 4, generator=generator) + step)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def assert_equal_bits(network: nn.Module, expected: dict[str, Tensor]) -> None:
    state = network.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


# The decay


@pytest.mark.parametrize(
    ("update", "decay"),
    [
        (0, 1 / 10),
        (1, 2 / 11),
        (8, 9 / 18),
        (90, 91 / 100),
        (1789, 1790 / 1799),
        (1790, 0.995),
        (10**6, 0.995),
    ],
)
def test_the_decay_warms_up_to_its_final_value(update: int, decay: float) -> None:
    weight = averaging_weight(torch.tensor(update), decay=0.995, warmup=True)
    assert 1 - weight.item() == pytest.approx(decay, abs=1e-12)


def test_without_warmup_the_decay_is_constant() -> None:
    assert averaging_weight(torch.tensor(0), decay=0.995, warmup=False).item() == pytest.approx(
        0.005, abs=1e-15
    )


def test_the_average_with_warmup_is_the_hand_computed_sequence() -> None:
    network = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(network.weight, 7.0)
    average = AveragedWeights(network, decay=0.9, warmup=True)
    expected = 7.0
    for update in range(200):
        value = (update * 37 % 11) / 3 - 1
        nn.init.constant_(network.weight, value)
        average.update(network)
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
        assert average.network.get_parameter("weight").item() == pytest.approx(expected, abs=1e-12)
    assert average.updates == 200


@pytest.mark.parametrize(("decay", "share"), [(0.999, 0.43), (0.995, 0.015)])
def test_without_warmup_the_initial_weights_keep_their_known_share_after_sixty_epochs_of_14_updates(
    decay: float, share: float
) -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.ones_(network.weight)
    average = AveragedWeights(network, decay=decay, warmup=False)
    nn.init.zeros_(network.weight)
    for _ in range(60 * 14):
        average.update(network)
    assert average.network.get_parameter("weight").item() == pytest.approx(share, abs=0.002)


@pytest.mark.parametrize("decay", [0.9, 0.995])
def test_without_warmup_the_average_is_that_of_torch(decay: float) -> None:
    network = small_network()
    average = AveragedWeights(network, decay=decay, warmup=False)
    oracle = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    oracle.update_parameters(network)  # its first call only copies; ours starts as a copy
    for step in range(30):
        train_step(network, step)
        average.update(network)
        oracle.update_parameters(network)
    for name, value in average.network.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(
                value, oracle.module.state_dict()[name], rtol=1e-6, atol=1e-7
            )


# Buffers


def test_batchnorm_statistics_are_averaged_like_weights_and_counts_are_copied() -> None:
    network = small_network()
    before = tensors(network)
    average = AveragedWeights(network, decay=0.5, warmup=False, buffers="averaged")
    train_step(network, 1)
    average.update(network)
    state = average.network.state_dict()
    for name in ("1.running_mean", "1.running_var", "1.weight", "0.weight"):
        torch.testing.assert_close(state[name], (before[name] + network.state_dict()[name]) / 2)
    assert state["1.num_batches_tracked"] == 1


def test_copied_buffers_are_those_of_the_network_while_weights_are_averaged() -> None:
    network = small_network()
    average = AveragedWeights(network, decay=0.999, warmup=False, buffers="copied")
    train_step(network, 1)
    average.update(network)
    state = average.network.state_dict()
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(state[name], network.state_dict()[name])
    assert not torch.allclose(state["0.weight"], network.state_dict()["0.weight"])


# The averaged network


def test_the_average_is_an_own_network_in_eval_mode_without_gradients() -> None:
    network = small_network()
    network[0].weight.requires_grad_(False)  # a frozen stage is averaged all the same
    before = tensors(network)
    average = AveragedWeights(network, decay=0.9)
    train_step(network, 1)
    assert_equal_bits(average.network, before)
    average.update(network)
    assert network.training
    assert not any(module.training for module in average.network.modules())
    assert not any(parameter.requires_grad for parameter in average.network.parameters())
    assert network.get_parameter("5.weight").requires_grad
    assert not torch.equal(average.network.get_parameter("0.weight"), before["0.weight"])


def test_decay_zero_gives_the_raw_network_bit_for_bit() -> None:
    network = small_network()
    average = AveragedWeights(network, decay=0.0)
    for step in range(3):
        train_step(network, step)
        average.update(network)
        assert_equal_bits(average.network, tensors(network))


@pytest.mark.parametrize("buffers", ["averaged", "copied"])
def test_a_skipped_step_leaves_average_and_count_alone(
    buffers: Literal["averaged", "copied"],
) -> None:
    network = small_network()
    average = AveragedWeights(network, decay=0.9, buffers=buffers)
    train_step(network, 0)
    average.update(network, skip=torch.tensor(0.0))
    before = tensors(average.network)
    train_step(network, 1)
    with torch.no_grad():
        network.get_parameter("0.weight")[0] = torch.nan  # not even NaN comes through
    average.update(network, skip=torch.tensor([1.0]))
    assert average.updates == 1
    state = average.network.state_dict()
    assert all(torch.equal(state[name], before[name]) for name, _ in network.named_parameters())
    if buffers == "averaged":
        assert torch.equal(state["1.running_mean"], before["1.running_mean"])
    else:
        assert torch.equal(state["1.running_mean"], network.get_buffer("1.running_mean"))


def test_a_step_not_skipped_on_the_device_is_a_plain_step() -> None:
    network = small_network()
    one, other = AveragedWeights(network, decay=0.9), AveragedWeights(network, decay=0.9)
    for step in range(4):
        train_step(network, step)
        one.update(network)
        other.update(network, skip=torch.tensor(False))
    assert_equal_bits(one.network, tensors(other.network))
    assert one.updates == other.updates == 4


def test_a_restored_average_goes_on_bit_for_bit() -> None:
    network = small_network()
    average = AveragedWeights(network, decay=0.995)
    for step in range(5):
        train_step(network, step)
        average.update(network)
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    restored = AveragedWeights(small_network(seed=1), decay=0.995)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.updates == 5
    for step in range(5, 10):
        train_step(network, step)
        average.update(network)
        restored.update(network)
    assert_equal_bits(restored.network, tensors(average.network))


def test_a_state_of_another_network_is_refused() -> None:
    average = AveragedWeights(small_network(), decay=0.9)
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        average.load_state_dict(AveragedWeights(nn.Linear(2, 2), decay=0.9).state_dict())


def test_a_wrapped_network_is_refused_instead_of_averaging_by_position() -> None:
    network = small_network()
    average = AveragedWeights(network, decay=0.9)
    with pytest.raises(ValueError, match=r"DataParallel does not have the tensors.*bare module"):
        average.update(nn.DataParallel(network))


def test_half_precision_weights_are_refused_because_their_average_would_stand_still() -> None:
    one = torch.ones((), dtype=torch.bfloat16)
    assert torch.lerp(one, one + 0.1, 0.001) == one  # the trap: 30 ulps away, and no step
    with pytest.raises(ValueError, match=r"0\.weight is torch\.bfloat16: only float32"):
        AveragedWeights(small_network().bfloat16(), decay=0.999)


@pytest.mark.parametrize(
    "options", [{"decay": 1.0}, {"decay": -0.1}, {"decay": 0.9, "buffers": "kept"}]
)
def test_options_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        AveragedWeights(small_network(), **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: captures a CUDA graph")
@pytest.mark.parametrize("buffers", ["averaged", "copied"])
def test_a_captured_update_equals_the_one_on_the_cpu(
    buffers: Literal["averaged", "copied"],
) -> None:
    network = small_network()
    oracle = AveragedWeights(network, decay=0.9, buffers=buffers)
    mirror = copy.deepcopy(network).cuda()
    average = AveragedWeights(mirror, decay=0.9, buffers=buffers)
    skip = torch.zeros((), device="cuda")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        average.update(mirror, skip=skip)
    for step in range(40):
        train_step(network, step)
        mirror.load_state_dict(network.state_dict())
        if step % 5 == 0:
            mirror.get_buffer("1.running_mean").fill_(
                torch.nan
            )  # of a skipped step: must not come through
        skip.fill_(step % 5 == 0)
        oracle.update(network, skip=torch.tensor(float(step % 5 == 0)))
        graph.replay()
    assert average.updates.item() == oracle.updates.item() == 32
    for name, value in average.network.state_dict().items():
        torch.testing.assert_close(
            value.cpu(), oracle.network.state_dict()[name], rtol=1e-5, atol=1e-6
        )
