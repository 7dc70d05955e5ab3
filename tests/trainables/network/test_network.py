import copy
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import resnet as monai_resnet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trainables.config import DEPTHS
from trainables.network.model import (
    DILATIONS,
    STAGES,
    Classifier,
    CosineHead,
    LinearHead,
    PaddedShortcut,
    StemPool,
    build_network,
    convolution_outputs,
    convolve,
    maximum_by_axis,
    parameter_groups,
    set_trainable,
    stage_modules,
    stem_convolution,
    trainable_stages,
)

RUNNABLE = (10, 18, 34, 50, 101)  # 152 and 200 are looked at without running them

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(depth: int = 10, **changes: Any) -> Classifier:
    settings = {
        **{"width": 0.125, "geometry": "strided", "head": "cosine", "num_classes": 2},
        **{"in_channels": 1, "dropout": 0.0},
    }
    return build_network(depth=depth, **{**settings, **changes})


def on_meta(depth: int, **changes: Any) -> Classifier:
    with torch.device("meta"):
        return small(depth, **{"width": 1.0, **changes})


Network = TypeVar("Network", bound=nn.Module)


def with_lively_batchnorm(module: Network) -> Network:
    """Fresh statistics are 0 and 1: a BatchNorm that was left out or doubled would not show."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm3d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.1)
    return module


def monai_network(depth: int) -> nn.Module:
    return getattr(monai_resnet, f"resnet{depth}")(
        spatial_dims=3,
        n_input_channels=1,
        feed_forward=False,
        conv1_t_stride=2,
        bias_downsample=False,
        shortcut_type="A" if depth in (18, 34) else "B",
        widen_factor=0.125,
    )


# Geometry


@pytest.mark.parametrize("depth", RUNNABLE)
@pytest.mark.parametrize("training", [False, True])
def test_the_strided_network_gives_what_monais_gives(depth: int, training: bool) -> None:
    reference = with_lively_batchnorm(monai_network(depth)).train(training)
    backbone = small(depth).backbone.train(training)
    backbone.load_state_dict(reference.state_dict())
    volumes = torch.randn(2, 1, 20, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(backbone(volumes), reference(volumes), rtol=0, atol=0)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], tensor), name


@pytest.mark.parametrize("depth", DEPTHS)
def test_both_geometries_have_the_entries_of_monais_network_at_every_depth(depth: int) -> None:
    def shapes(network: nn.Module) -> list[tuple[str, torch.Size]]:
        return [(name, tensor.shape) for name, tensor in network.state_dict().items()]

    with torch.device("meta"):
        reference = shapes(monai_network(depth))
    for geometry in ("strided", "dilated"):
        assert shapes(on_meta(depth, width=0.125, geometry=geometry).backbone) == reference


def medicalnet_features(weights: dict[str, torch.Tensor], volumes: torch.Tensor) -> torch.Tensor:
    """MedicalNet's published forward pass up to its segmentation head, written from its definition: functions on a
    state dict, no modules. Evaluation mode. Strides 2, 2 (pool), 1, 2, 1, 1; dilations 1, 1, 2, 4 in layers 1 to 4."""

    def convolve(x: Tensor, name: str, stride: int = 1, dilation: int = 1) -> Tensor:
        kernel = weights[f"{name}.weight"]
        return F.conv3d(x, kernel, None, stride, dilation * (kernel.shape[-1] // 2), dilation)

    def normalise(x: Tensor, name: str) -> Tensor:
        mean, variance, scale, shift = (
            weights[f"{name}.{part}"].view(1, -1, 1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(variance + 1e-5) * scale + shift

    x = F.relu(normalise(convolve(volumes, "conv1", stride=2), "bn1"))
    x = F.max_pool3d(x, 3, 2, 1)
    for layer, stride, dilation in (
        ("layer1", 1, 1),
        ("layer2", 2, 1),
        ("layer3", 1, 2),
        ("layer4", 1, 4),
    ):
        number = 0
        while f"{layer}.{number}.conv1.weight" in weights:
            block = f"{layer}.{number}"
            step = stride if number == 0 else 1
            if f"{block}.conv3.weight" in weights:
                y = F.relu(normalise(convolve(x, f"{block}.conv1"), f"{block}.bn1"))
                y = F.relu(normalise(convolve(y, f"{block}.conv2", step, dilation), f"{block}.bn2"))
                y = normalise(convolve(y, f"{block}.conv3"), f"{block}.bn3")
            else:
                y = F.relu(normalise(convolve(x, f"{block}.conv1", step, dilation), f"{block}.bn1"))
                y = normalise(convolve(y, f"{block}.conv2", 1, dilation), f"{block}.bn2")
            if f"{block}.downsample.0.weight" in weights:
                x = normalise(convolve(x, f"{block}.downsample.0", step), f"{block}.downsample.1")
            elif y.shape != x.shape:
                thinned = F.avg_pool3d(x, 1, step)
                zeros = torch.zeros(
                    len(x), y.shape[1] - x.shape[1], *thinned.shape[2:], dtype=x.dtype
                )
                x = torch.cat([thinned, zeros], dim=1)
            x = F.relu(x + y)
            number += 1
    return x


@pytest.mark.parametrize("depth", RUNNABLE)
def test_the_dilated_network_gives_what_medicalnets_definition_gives(depth: int) -> None:
    backbone = with_lively_batchnorm(small(depth, geometry="dilated").backbone).double().eval()
    maps = []
    backbone.get_submodule("layer4").register_forward_hook(
        lambda module, inputs, output: maps.append(output)
    )
    volumes = torch.randn(1, 1, 24, 16, 32, dtype=torch.float64)
    with torch.no_grad():
        features = backbone(volumes)
        reference = medicalnet_features(backbone.state_dict(), volumes)
    assert maps[0].shape[2:] == (3, 2, 4)  # output stride 8
    torch.testing.assert_close(maps[0], reference)
    torch.testing.assert_close(features, reference.mean((2, 3, 4)))


def test_the_strided_network_has_output_stride_32() -> None:
    backbone = small(18).backbone.eval()
    maps = []
    backbone.get_submodule("layer4").register_forward_hook(
        lambda module, inputs, output: maps.append(output)
    )
    backbone(torch.zeros(1, 1, 64, 32, 96))
    assert maps[0].shape[2:] == (2, 1, 3)


@pytest.mark.parametrize("depth", DEPTHS)
def test_only_layers_3_and_4_are_dilated_and_only_in_their_3x3x3_convolutions(depth: int) -> None:
    backbone = on_meta(depth, geometry="dilated").backbone
    seen = 0
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv3d):
            dilation = (
                DILATIONS.get(name.split(".")[0], 1) if module.kernel_size == (3, 3, 3) else 1
            )
            assert module.dilation == (dilation,) * 3, name
            if module.kernel_size == (3, 3, 3):
                assert module.padding == module.dilation, name
            if name.startswith(("layer3", "layer4")):
                assert module.stride == (1, 1, 1), name
                seen += 1
    assert seen >= 4


@pytest.mark.parametrize("geometry", ["strided", "dilated"])
def test_every_depth_takes_volumes_that_are_no_cubes_and_several_channels(geometry: str) -> None:
    network = small(10, geometry=geometry, in_channels=3, num_classes=4)
    logits = network(torch.randn(2, 3, 17, 22, 9))
    assert logits.shape == (2, 4)
    assert logits.dtype == torch.float32


def test_a_depth_or_width_that_cannot_be_built_says_what_can() -> None:
    with pytest.raises(ValueError, match=r"depth=26: MedicalNet has 10, 18, 34, 50, 101, 152, 200"):
        small(26)
    with pytest.raises(
        ValueError, match=r"width=0\.01 leaves the stem no channel: it must be at least 1/64"
    ):
        small(10, width=0.01)


# Shortcuts


def test_the_padded_shortcut_gives_what_monais_gives() -> None:
    volumes = torch.randn(2, 4, 5, 6, 7)
    block: Any = monai_network(18)
    reference = block._downsample_basic_block(volumes, planes=10, stride=2)
    assert torch.equal(PaddedShortcut(extra_channels=6, stride=2)(volumes), reference)


def test_the_gradient_of_the_padded_shortcut_is_exact() -> None:
    volumes = torch.randn(1, 2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PaddedShortcut(extra_channels=3, stride=2), volumes)


@pytest.mark.parametrize("depth", DEPTHS)
def test_no_shortcut_of_any_depth_cuts_the_gradient(depth: int) -> None:
    backbone = on_meta(depth).backbone
    shortcuts = [
        module.downsample
        for module in backbone.modules()
        if getattr(module, "downsample", None) is not None
    ]
    assert len(shortcuts) == (3 if depth in (10, 18, 34) else 4)
    assert {type(shortcut) for shortcut in shortcuts} == {
        PaddedShortcut if depth in (18, 34) else nn.Sequential
    }


@pytest.mark.parametrize("geometry", ["strided", "dilated"])
def test_the_stem_learns_through_the_shortcuts_alone_where_monais_does_not(geometry: str) -> None:
    def stem_gradient(backbone: nn.Module) -> Tensor:
        for module in backbone.modules():
            if isinstance(module, monai_resnet.ResNetBlock):
                nn.init.zeros_(module.bn2.weight)  # closes the path through the convolutions
        backbone(torch.randn(2, 1, 16, 16, 16)).square().sum().backward()
        gradient = backbone.get_parameter("conv1.weight").grad
        assert gradient is not None
        return gradient

    assert stem_gradient(small(18, geometry=geometry).backbone).abs().max() > 0
    assert not stem_gradient(monai_network(18)).any()


@pytest.mark.parametrize("depth", [10, 18])
def test_networks_survive_copying_and_pickling(depth: int) -> None:
    network = with_lively_batchnorm(small(depth, geometry="dilated")).eval()
    set_trainable(network, ["head"])
    volumes = torch.randn(1, 1, 16, 16, 16)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert twin.frozen == network.frozen
        assert torch.equal(twin(volumes), network(volumes))
        with torch.no_grad():  # the copy computes with its own tensors
            twin.backbone.get_parameter("conv1.weight").zero_()
        assert not torch.equal(twin(volumes), network(volumes))


# Max-pool


@pytest.mark.parametrize("shape", [(8, 8, 8), (7, 9, 1), (5, 4, 6)])
def test_the_deterministic_max_pool_equals_the_usual_one_forward_and_backward(
    shape: tuple[int, int, int],
) -> None:
    volumes = torch.randn(2, 3, *shape, dtype=torch.float64, requires_grad=True)
    usual = nn.MaxPool3d(3, 2, 1)(volumes)
    own = maximum_by_axis(volumes)
    assert torch.equal(own, usual)
    weights = torch.randn_like(usual)
    (expected,) = torch.autograd.grad((usual * weights).sum(), volumes)
    (actual,) = torch.autograd.grad((own * weights).sum(), volumes)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(StemPool()(volumes), usual)


# Heads


def test_the_cosine_head_gives_cosines_and_starts_with_unit_columns() -> None:
    head = CosineHead(features=64, num_classes=3)
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    torch.testing.assert_close(head.weight.norm(dim=0), torch.ones(3))
    assert head.weight.abs().max() < 0.5  # all 64 share the length: uniform, not one-hot
    nn.init.normal_(head.weight, 0, 7)
    features = torch.randn(5, 64) * 100
    expected = F.cosine_similarity(features[:, :, None].double(), head.weight[None].double(), dim=1)
    torch.testing.assert_close(head(features), expected.float())
    torch.testing.assert_close(head(features * 1000), head(features))


def test_features_that_are_all_zero_give_a_cosine_of_zero_and_a_finite_gradient() -> None:
    head = CosineHead(features=8, num_classes=2)
    features = torch.zeros(3, 8, requires_grad=True)
    cosines = head(features)
    cosines.sum().backward()
    assert not cosines.any()
    assert head.weight.grad is not None
    assert features.grad is not None
    assert head.weight.grad.isfinite().all()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("head_type", [CosineHead, LinearHead])
def test_heads_work_in_float32_under_autocast_and_on_half_precision_features(
    head_type: type[CosineHead | LinearHead],
) -> None:
    head = head_type(32, 2)
    features = torch.randn(4, 32)
    exact = head(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(features), exact)
        assert (
            nn.functional.linear(features, torch.ones(2, 32)).dtype == torch.bfloat16
        )  # autocast was on
    for dtype in (torch.float16, torch.bfloat16):
        logits = head(features.to(dtype))
        assert logits.dtype == torch.float32
        assert torch.equal(logits, head(features.to(dtype).float()))


def test_dropout_works_on_the_features_before_the_head_in_training_only() -> None:
    network = small(10, dropout=0.5)
    seen = []
    network.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network.backbone.forward = lambda volumes: torch.ones(len(volumes), 64)
    network.train()(torch.zeros(8, 1, 8, 8, 8))
    network.eval()(torch.zeros(8, 1, 8, 8, 8))
    assert set(seen[0].unique().tolist()) == {0.0, 2.0}
    assert 0.3 < seen[0].eq(0).float().mean() < 0.7
    assert torch.equal(seen[1], torch.ones(8, 64))


# Parameters


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("head", ["cosine", "linear"])
def test_groups_and_stages_partition_the_parameters_of_every_depth(depth: int, head: str) -> None:
    network = on_meta(depth, head=head)
    everything = sorted(id(parameter) for parameter in network.parameters())
    groups = parameter_groups(network)
    assert list(groups) == ["backbone", "classifier"]
    assert sorted(id(parameter) for group in groups.values() for parameter in group) == everything
    assert [id(parameter) for parameter in groups["classifier"]] == [
        id(p) for p in network.head.parameters()
    ]
    staged = [
        p
        for stage in STAGES
        for module in stage_modules(network, stage)
        for p in module.parameters()
    ]
    assert sorted(map(id, staged)) == everything


def test_a_parameter_outside_both_groups_is_noticed() -> None:
    network = small(10)
    network.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match="in no group"):
        parameter_groups(network)
    del network.extra
    network.head.shared = network.backbone.conv1.weight
    with pytest.raises(AssertionError, match="in two groups"):
        parameter_groups(network)


@pytest.mark.parametrize(("head", "in_head"), [("cosine", 4_096), ("linear", 4_098)])
@pytest.mark.parametrize("geometry", ["strided", "dilated"])
def test_resnet_50_has_the_documented_numbers_of_parameters(
    head: str, in_head: int, geometry: str
) -> None:
    groups = parameter_groups(on_meta(50, head=head, geometry=geometry))
    counts = {name: sum(parameter.numel() for parameter in group) for name, group in groups.items()}
    assert counts == {"backbone": 46_155_072, "classifier": in_head}


@pytest.mark.parametrize(("geometry", "gflop"), [("strided", 34.2), ("dilated", 175.4)])
def test_resnet_50_costs_the_documented_arithmetic_on_a_cube_of_96_voxels(
    geometry: str, gflop: float
) -> None:
    network = on_meta(50, geometry=geometry).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 1, 96, 96, 96, device="meta"))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, abs=0.05)


# Freezing


def test_stages_thaw_from_the_head_down_every_k_epochs() -> None:
    by_epoch = [trainable_stages(epoch, 2, 3) for epoch in range(1, 20)]
    counts = [len(stages) for stages in by_epoch]
    assert counts == [1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6]
    assert by_epoch[0] == ("head",)
    assert by_epoch[2] == ("layer4", "head")
    assert by_epoch[5] == ("layer3", "layer4", "head")
    assert by_epoch[14] == STAGES
    assert all(stages == STAGES[-len(stages) :] for stages in by_epoch)


def test_all_stages_thaw_at_once_without_a_stage_length_and_none_is_frozen_without_freezing() -> (
    None
):
    assert [trainable_stages(epoch, 2, 0) for epoch in (1, 2, 3)] == [("head",), ("head",), STAGES]
    assert trainable_stages(1, 0, 0) == trainable_stages(1, 0, 3) == STAGES


def statistics(network: Classifier, stage: str) -> list[Tensor]:
    """Copies of everything in a stage that training could change: parameters and buffers."""
    return [
        tensor.clone()
        for module in stage_modules(network, stage)
        for tensor in module.state_dict().values()
    ]


@pytest.mark.parametrize("trained", [STAGES[first:] for first in range(len(STAGES))])
def test_frozen_stages_stay_bit_identical_through_training_and_the_others_do_not(
    trained: list[str],
) -> None:
    network = with_lively_batchnorm(small(18, dropout=0.4))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2, weight_decay=1e-2)
    network.train()
    network(torch.randn(4, 1, 16, 16, 16)).square().sum().backward()
    optimiser.step()  # momenta everywhere, as after an epoch in which all stages trained

    set_trainable(network, trained)
    before = {stage: statistics(network, stage) for stage in STAGES}
    for _ in range(2):
        network.train()
        network(torch.randn(4, 1, 16, 16, 16)).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    for stage in STAGES:
        same = [
            torch.equal(*pair)
            for pair in zip(before[stage], statistics(network, stage), strict=True)
        ]
        assert not any(same) if stage in trained else all(same), stage
    assert network.get_submodule("dropout").training


@pytest.mark.parametrize("trained", [STAGES[first:] for first in range(len(STAGES))])
def test_every_trainable_parameter_gets_a_gradient_and_no_frozen_one(trained: list[str]) -> None:
    network = small(34)
    set_trainable(network, trained)
    network.train()
    network(torch.randn(2, 1, 16, 16, 16)).square().sum().backward()
    for stage in STAGES:
        for module in stage_modules(network, stage):
            for name, parameter in module.named_parameters():
                assert (parameter.grad is not None) == (stage in trained), (stage, name)


def test_the_backbone_keeps_no_activations_while_all_of_it_is_frozen() -> None:
    network = small(10).train()
    features = []
    network.head.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    volumes = torch.randn(2, 1, 16, 16, 16, requires_grad=True)
    set_trainable(network, ["head"])
    frozen = [network.backbone_frozen]
    assert network(volumes).requires_grad
    set_trainable(network, ["layer4", "head"])
    frozen.append(network.backbone_frozen)
    network(volumes)
    assert frozen == [True, False]
    assert [tensor.requires_grad for tensor in features] == [False, True]


def test_any_call_of_train_leaves_frozen_batchnorm_alone_through_a_wrapper_too() -> None:
    network = small(10)
    set_trainable(network, ["layer4", "head"])
    wrapper = nn.Sequential(
        network
    )  # as DistributedDataParallel and torch.compile do, it owns the network
    for put in (network.train, wrapper.train):
        network.eval()
        put()
        modes = {
            name: layer.training
            for name, layer in network.named_modules()
            if isinstance(layer, nn.BatchNorm3d)
        }
        assert modes == {name: name.startswith("backbone.layer4") for name in modes}
        assert len(modes) == 12
    network.eval()
    assert not any(module.training for module in network.modules())


def test_a_change_of_stages_is_told_and_takes_effect_at_once() -> None:
    network = small(10).train()
    assert not set_trainable(network, STAGES)
    assert set_trainable(network, STAGES[-1:])
    assert not network.backbone.bn1.training
    assert not set_trainable(network, ["head"])
    assert set_trainable(network, STAGES)
    assert network.backbone.bn1.training
    assert network.frozen == ()
    network.eval()
    set_trainable(network, ["head"])
    assert not network.training
    with pytest.raises(AssertionError, match=r"unknown stages \['fc'\]"):
        set_trainable(network, ["fc"])


def test_synchronised_batchnorm_is_frozen_like_any_other() -> None:
    network = nn.SyncBatchNorm.convert_sync_batchnorm(small(10))
    set_trainable(network, ["layer4", "head"])
    network.train()
    modes = [layer.training for layer in network.modules() if isinstance(layer, nn.SyncBatchNorm)]
    assert len(modes) == 12
    assert sum(modes) == 3


# What speed needs


@pytest.mark.parametrize("depth", [18, 50])
def test_channels_last_gives_the_same_logits(depth: int) -> None:
    network = with_lively_batchnorm(small(depth)).eval()
    volumes = torch.randn(2, 1, 32, 32, 32)
    expected = network(volumes)
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    actual = network(volumes.to(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "module", [PaddedShortcut(4, 2), PaddedShortcut(4, 1), StemPool(), maximum_by_axis]
)
def test_own_layers_keep_the_channels_last_layout(module: Callable[[Tensor], Tensor]) -> None:
    volumes = torch.randn(2, 4, 8, 8, 8).to(memory_format=torch.channels_last_3d)
    assert module(volumes).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("trained", [STAGES, STAGES[-2:], STAGES[-1:]])
def test_the_whole_network_is_one_graph_without_python_that_looks_at_values(
    trained: list[str],
) -> None:
    network = small(18, dropout=0.4)
    set_trainable(network, trained)
    network.train()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    volumes = torch.randn(2, 1, 16, 16, 16)
    torch.manual_seed(1)
    expected = network(volumes)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(volumes), expected)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("depth", [18, 50])
def test_training_steps_captured_in_a_cuda_graph_equal_eager_ones(depth: int) -> None:
    def steps(captured: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        network = small(depth, geometry="dilated").cuda().train()
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        volumes = torch.randn(4, 1, 32, 32, 32, device="cuda").to(
            memory_format=torch.channels_last_3d
        )

        def step() -> None:
            network.zero_grad(set_to_none=False)
            with torch.autocast("cuda", dtype=torch.float16):
                logits = network(volumes)
            logits.square().sum().backward()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            graph.replay()
        else:
            step()
        torch.cuda.synchronize()
        return {
            name: parameter.grad.clone()
            for name, parameter in network.named_parameters()
            if parameter.grad is not None
        }

    eager, captured = steps(False), steps(True)
    assert eager.keys() == dict(small(depth).named_parameters()).keys()
    for name, gradient in eager.items():
        torch.testing.assert_close(captured[name], gradient, rtol=2e-2, atol=2e-2, msg=name)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("depth", "geometry"), [(18, "strided"), (50, "dilated")])
def test_deterministic_algorithms_run_and_repeat_themselves_on_a_gpu(
    depth: int, geometry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        gradients = []
        for _ in range(2):
            torch.manual_seed(0)
            network = small(depth, geometry=geometry).cuda().train()
            network(torch.randn(4, 1, 32, 32, 32, device="cuda")).square().sum().backward()
            gradients.append([parameter.grad for parameter in network.parameters()])
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("geometry", ["strided", "dilated"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_convolution_outputs_are_what_a_pass_puts_out(depth: int, geometry: str) -> None:
    with torch.device("meta"):
        network = small(depth, geometry=geometry).eval()
        outputs = []
        for module in network.modules():
            if isinstance(module, nn.Conv3d):
                module.register_forward_hook(lambda _, __, out: outputs.append(out[0].numel()))
        with torch.no_grad():
            network(torch.empty(1, 1, 40, 33, 27))
    assert convolution_outputs(network, (40, 33, 27)) == sum(outputs) > 0


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 1, 32, 32, 32), (1, 2, 10, 14, 20)])
def test_the_rearranged_stem_equals_its_convolution_forward_and_backward(
    shape: tuple[int, int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    convolution = nn.Conv3d(shape[1], 64, 7, stride=2, padding=3, bias=False).cuda()
    _same_function(convolution, stem_convolution, torch.randn(shape, device="cuda"))


@needs_gpu
@pytest.mark.gpu
def test_a_pointwise_convolution_as_a_matrix_product_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    convolution = nn.Conv3d(24, 40, 1, bias=False).cuda()
    volumes = torch.randn(3, 24, 5, 6, 7, device="cuda").to(memory_format=torch.channels_last_3d)
    _same_function(convolution, convolve, volumes)


def _same_function(
    convolution: nn.Conv3d, ours: Callable[[nn.Conv3d, Tensor], Tensor], volumes: Tensor
) -> None:
    expected = convolution(volumes)
    dy = torch.randn_like(expected)
    (dw,) = torch.autograd.grad(expected, convolution.weight, dy)
    out = ours(convolution, volumes)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(out, convolution.weight, dy)[0], dw, rtol=1e-3, atol=1e-2
    )
