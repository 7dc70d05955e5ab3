"""The classifier of a run: MONAI's 3D ResNet in one of two geometries, dropout, and a head that works in float32.

The parts that a run trains are set by stage (`STAGES`); a frozen stage keeps its weights and its BatchNorm statistics.
No function here depends on the values of a tensor, so that all of it can be captured in a CUDA graph or compiled.
Shape suffixes: B volumes, C channels or classes, D H W voxels, F features.
"""

import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainables.config import DEPTHS, FineTuneConfig
from trainables.network.batchnorm import BatchNorm, fused_on, max_pool, norm_act
from trainables.network.monai_resnet import ResNet, ResNetBlock, ResNetBottleneck

BLOCKS: dict[int, tuple[Literal["basic", "bottleneck"], tuple[int, int, int, int]]] = {
    10: ("basic", (1, 1, 1, 1)),
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
    200: ("bottleneck", (3, 24, 36, 3)),
}
"""Kind of block and blocks in layers 1 to 4, by depth."""

SHORTCUT_A_DEPTHS = (18, 34)
"""Depths MedicalNet released with the parameter-free shortcut A; the others have a 1x1x1 convolution (B), without bias."""

PLANES = (64, 128, 256, 512)
"""Channels inside the blocks of layers 1 to 4, at width 1; a bottleneck puts out four times as many."""

DILATIONS = {"layer3": 2, "layer4": 4}
"""MedicalNet's own geometry: these layers keep their resolution and dilate their 3x3x3 convolutions instead."""

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")
"""Parts of a network that are frozen and thawed together, from the volume to the logits."""


class Classifier(nn.Module):
    """A backbone, dropout, and a head: volumes (B, C, D, H, W) to logits (B, classes) in float32.

    `frozen` names the stages that do not train; `set_trainable` sets it. Whatever calls `train()`, on this network
    or on a wrapper around it, the BatchNorm layers of frozen stages stay in eval mode.
    """

    def __init__(
        self, backbone: ResNet, dropout: float, head: nn.Module, *, depth: int, geometry: str
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.head = head
        self.depth = depth
        self.geometry = geometry
        self.frozen: tuple[str, ...] = ()

    @property
    def backbone_frozen(self) -> bool:
        """Whether only the head trains."""
        return self.frozen == STAGES[:-1] or self.frozen == STAGES

    def forward(self, volumes_BCDHW: Tensor) -> Tensor:
        """Return logits (B, classes), float32; with the cosine head these are the cosines, not yet scaled by s."""
        if self.backbone_frozen:
            with torch.no_grad():  # nothing below the head learns: keep no activations
                features_BF = self.backbone(volumes_BCDHW)
        else:
            features_BF = self.backbone(volumes_BCDHW)
        return self.head(self.dropout(features_BF))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for stage in self.frozen:
            for module in stage_modules(self, stage):
                module.eval()
        return self


class CosineHead(nn.Module):
    """Cosines of each feature vector (B, F) with each class's weight column: (B, classes), float32, in [-1, 1].

    LDAM's normalised classifier (Cao et al. 2019, NormedLinear): no bias, columns drawn from uniform(-1, 1) and then
    scaled to unit length. Without that scaling the first steps of Adam are far too small compared with the weights.
    """

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -1, 1)
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight, dim=0))

    def forward(self, features_BF: Tensor) -> Tensor:
        with _full_precision(features_BF):
            return F.normalize(features_BF.float(), dim=1) @ F.normalize(self.weight.float(), dim=0)

    def extra_repr(self) -> str:
        return f"features={self.weight.shape[0]}, num_classes={self.weight.shape[1]}"


class LinearHead(nn.Linear):
    """Weights and bias: features (B, F) to logits (B, classes), computed in float32 under autocast too."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name is torch's
        with _full_precision(input):
            return super().forward(input.float())


class PaddedShortcut(nn.Module):
    """Shortcut A: every `stride`-th voxel, and zeros for the channels that the block adds. No parameters.

    MONAI and MedicalNet read `out.data` here, which cuts the gradient: nothing below the block would learn through
    its shortcut. This one passes it on; the output is the same. A module, unlike MONAI's partial of a bound
    method, is copied and pickled with its network.
    """

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        step = self.stride
        return F.pad(x[:, :, ::step, ::step, ::step], (0, 0, 0, 0, 0, 0, 0, self.extra_channels))

    def extra_repr(self) -> str:
        return f"extra_channels={self.extra_channels}, stride={self.stride}"


class Bottleneck(ResNetBottleneck):
    """MONAI's block; BatchNorm, the sum with the shortcut, and ReLU are one operation where `norm_act` can."""

    def forward(self, x: Tensor) -> Tensor:
        out = norm_act(self.bn1, convolve(self.conv1, x))
        out = norm_act(self.bn2, self.conv2(out))
        out = convolve(self.conv3, out)
        return norm_act(self.bn3, out, x if self.downsample is None else self.downsample(x))


class BasicBlock(ResNetBlock):
    """MONAI's block, fused likewise."""

    def forward(self, x: Tensor) -> Tensor:
        out = norm_act(self.bn1, self.conv1(x))
        out = self.conv2(out)
        return norm_act(self.bn2, out, x if self.downsample is None else self.downsample(x))


class Backbone(ResNet):
    """MONAI's network: volumes (B, C, D, H, W) to pooled features (B, F)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(norm_act(self.bn1, stem_convolution(self.conv1, x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(x).flatten(1)


def stem_convolution(convolution: nn.Conv3d, x_BCDHW: Tensor) -> Tensor:
    """Return `convolution(x)`; on a GPU and for suitable sides, the stem's as a 4x4x3 convolution of stride 1.

    Each block of 2x2x4 voxels becomes 16 channels, the kernel is padded and cut alike, and two neighbours along the last
    axis are computed at once, which channels-last memory holds as the channels of one: the same sums. With one input
    channel cuDNN has no fast kernel, and pads the channel to 8 anyway.
    """
    d, h, w = x_BCDHW.shape[2:]
    suits = (
        d % 2 == h % 2 == w % 4 == 0
        and convolution.kernel_size == (7, 7, 7)
        and convolution.stride == (2, 2, 2)
    )
    if not (suits and fused_on(x_BCDHW)):
        return convolution(x_BCDHW)
    # Outputs 2o and 2o + 1 see voxels 4o - 3 .. 4o + 5 of the last axis: blocks o - 1 .. o + 1; along the others, output o
    # sees voxels 2o - 3 .. 2o + 3: blocks o - 2 .. o + 1
    both = torch.cat(
        [F.pad(convolution.weight, (1 + 2 * j, 4 - 2 * j, 1, 0, 1, 0)) for j in range(2)]
    )
    if torch.is_autocast_enabled("cuda"):
        x_BCDHW = x_BCDHW.to(torch.get_autocast_dtype("cuda"))  # half the bytes to rearrange
    out = F.conv3d(
        _blocks_to_channels(F.pad(x_BCDHW, (4, 4, 4, 2, 4, 2))), _blocks_to_channels(both)
    )
    return (
        out.permute(0, 2, 3, 4, 1)
        .reshape(len(out), d // 2, h // 2, w // 2, -1)
        .permute(0, 4, 1, 2, 3)
    )


def _blocks_to_channels(x: Tensor) -> Tensor:
    b, c, d, h, w = x.shape
    x = x.reshape(b, c, d // 2, 2, h // 2, 2, w // 4, 4).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.reshape(b, d // 2, h // 2, w // 4, 16 * c).permute(0, 4, 1, 2, 3)


def convolve(convolution: nn.Conv3d, x_BCDHW: Tensor) -> Tensor:
    """Return `convolution(x)`; a 1x1x1 one of channels-last volumes on a GPU as a matrix product."""
    pointwise = convolution.kernel_size == (1, 1, 1) and convolution.stride == (1, 1, 1)
    if not (pointwise and fused_on(x_BCDHW) and convolution.bias is None):
        return convolution(x_BCDHW)
    return F.linear(x_BCDHW.permute(0, 2, 3, 4, 1), convolution.weight.flatten(1)).permute(
        0, 4, 1, 2, 3
    )


class StemPool(nn.MaxPool3d):
    """The stem's 3x3x3 max-pool of stride 2, which can also run with deterministic algorithms on a GPU.

    CUDA has no deterministic backward of a 3D max-pool and refuses it in that mode. There the window's maximum is
    taken one axis after the other: the same values, for more memory traffic. Equal maxima share their gradient.
    """

    def __init__(self) -> None:
        super().__init__(kernel_size=3, stride=2, padding=1)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  the name is torch's
        if input.is_cuda and torch.are_deterministic_algorithms_enabled():
            return maximum_by_axis(input)
        if fused_on(input):
            return max_pool(input)
        return super().forward(input)


def maximum_by_axis(x_BCDHW: Tensor) -> Tensor:
    """Return the 3x3x3 max-pool of stride 2 and padding 1, by element-wise maxima of strided views."""
    x = F.pad(x_BCDHW, (1, 1, 1, 1, 1, 1), value=float("-inf"))
    for axis, size in zip((2, 3, 4), x_BCDHW.shape[2:], strict=True):
        out = (size + 1) // 2
        before = (slice(None),) * axis
        first, middle, last = (
            x[(*before, slice(start, start + 2 * out - 1, 2))] for start in range(3)
        )
        x = torch.maximum(torch.maximum(first, middle), last)
    return x


def configured_network(config: FineTuneConfig) -> Classifier:
    """Return the network that `config` asks for, with fresh weights, on the CPU."""
    return build_network(
        depth=config.depth,
        width=config.width,
        geometry=config.geometry,
        head=config.head,
        num_classes=config.num_classes,
        in_channels=config.in_channels,
        dropout=config.dropout,
    )


def build_network(
    *,
    depth: int,
    width: float,
    geometry: str,
    head: str,
    num_classes: int,
    in_channels: int,
    dropout: float,
) -> Classifier:
    """Return a classifier with fresh weights (Kaiming normal, fan out, as MONAI's and MedicalNet's).

    `geometry` strided: MONAI's network with a stride-2 stem, output stride 32. dilated: MedicalNet's own, layers 3
    and 4 with stride 1 and their 3x3x3 convolutions dilated by 2 and 4, output stride 8. Both have the same
    parameters under the same names, so that one checkpoint fits both. `width` is a factor on all channels.

    Under `torch.device("meta")` the network has shapes only, which is enough to count or to name its parameters.
    Raises ValueError for a depth that MedicalNet does not have, or a width that leaves no channel.
    """
    if depth not in BLOCKS:
        raise ValueError(f"depth={depth}: MedicalNet has {', '.join(map(str, DEPTHS))}")
    if int(PLANES[0] * width) < 1:
        raise ValueError(
            f"width={width:g} leaves the stem no channel: it must be at least 1/{PLANES[0]}"
        )
    assert geometry in ("strided", "dilated"), geometry
    assert head in ("cosine", "linear"), head

    block, blocks = BLOCKS[depth]
    backbone = Backbone(
        block=Bottleneck if block == "bottleneck" else BasicBlock,
        layers=list(blocks),
        block_inplanes=list(PLANES),
        spatial_dims=3,
        n_input_channels=in_channels,
        conv1_t_stride=2,  # MONAI's default of 1 loads the same weights and costs 8 times the arithmetic
        shortcut_type="A" if depth in SHORTCUT_A_DEPTHS else "B",
        widen_factor=width,
        feed_forward=False,
        bias_downsample=False,
    )
    backbone.maxpool = StemPool()
    _replace_norms(backbone)
    if depth in SHORTCUT_A_DEPTHS:
        _let_gradients_through(backbone)
    if geometry == "dilated":
        dilate(backbone)

    features = backbone.in_planes  # MONAI leaves the channels of the last layer here
    new_head = (
        CosineHead(features, num_classes) if head == "cosine" else LinearHead(features, num_classes)
    )
    return Classifier(backbone, dropout, new_head, depth=depth, geometry=geometry)


def convolution_outputs(network: Classifier, shape: Sequence[int]) -> int:
    """Return the number of values that all convolutions put out for one volume of `shape` (D, H, W).

    By their geometry. A pass on the device "meta" would give the same number, and loads torch's compiler for it.
    """
    backbone = network.backbone
    values = 0

    def after(convolution: nn.Conv3d, sides: Sequence[int]) -> list[int]:
        nonlocal values
        out = _sides_after(convolution, sides)
        values += convolution.out_channels * math.prod(out)
        return out

    sides = _sides_after(backbone.maxpool, after(backbone.conv1, shape))
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        for block in stage:
            out = sides
            for convolution in (block.conv1, block.conv2, getattr(block, "conv3", None)):
                out = out if convolution is None else after(convolution, out)
            for module in block.downsample.modules() if block.downsample is not None else ():
                if isinstance(module, nn.Conv3d):
                    after(module, sides)
            sides = out
    return values


def _sides_after(module: nn.Conv3d | nn.MaxPool3d, sides: Sequence[int]) -> list[int]:
    def triple(value: Any) -> tuple[int, ...]:
        return (value,) * 3 if isinstance(value, int) else tuple(value)

    settings = (module.kernel_size, module.stride, module.padding, module.dilation)
    return [
        (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for side, kernel, stride, padding, dilation in zip(
            sides, *map(triple, settings), strict=True
        )
    ]


def parameter_groups(network: Classifier) -> dict[str, list[nn.Parameter]]:
    """Return all parameters in two groups: `backbone`, the pretrained part, and `classifier`, the new head.

    By the module that owns them, not by name: 'fc' may occur in any name. Every parameter is in exactly one group,
    frozen ones too: a group that is complete from the start needs no change to the optimiser when a stage thaws.
    """
    groups = {
        "backbone": list(network.backbone.parameters()),
        "classifier": list(network.head.parameters()),
    }
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert len(grouped) == len(set(grouped)), "a parameter is in two groups"
    assert set(grouped) == {id(parameter) for parameter in network.parameters()}, (
        "a parameter is in no group"
    )
    return groups


def stage_modules(network: Classifier, stage: str) -> tuple[nn.Module, ...]:
    """Return the modules of one stage. Over all of `STAGES` they own every parameter exactly once."""
    if stage == "stem":
        return (network.backbone.conv1, network.backbone.bn1)
    if stage == "head":
        return (network.head,)
    return (getattr(network.backbone, stage),)


def trainable_stages(
    epoch: int, freeze_backbone_epochs: int, unfreeze_stage_epochs: int
) -> tuple[str, ...]:
    """Return the stages that train in `epoch` (1-based), in the order of `STAGES`.

    The head alone for `freeze_backbone_epochs` epochs; then layer 4, and `unfreeze_stage_epochs` epochs after each
    the next one down: layer 3, 2, 1, the stem. With `unfreeze_stage_epochs=0` all thaw at once.
    """
    assert epoch >= 1, epoch
    if epoch <= freeze_backbone_epochs:
        return STAGES[-1:]
    if not freeze_backbone_epochs or not unfreeze_stage_epochs:
        return STAGES
    thawed = 1 + (epoch - freeze_backbone_epochs - 1) // unfreeze_stage_epochs
    return STAGES[max(0, len(STAGES) - 1 - thawed) :]


def set_trainable(network: Classifier, stages: Collection[str]) -> bool:
    """Let `stages` train and freeze the others; return whether that changed anything.

    After a change a DistributedDataParallel around the network has to be made again, and a CUDA graph captured again:
    DDP leaves gradients of parameters thawed under it unsynchronised, without an error. A newly frozen parameter
    loses its gradient, or the optimiser would continue to step along the last one.
    """
    unknown = set(stages) - set(STAGES)
    assert not unknown, f"unknown stages {sorted(unknown)}; there are {', '.join(STAGES)}"
    frozen = tuple(stage for stage in STAGES if stage not in stages)
    changed = False
    for stage in STAGES:
        for module in stage_modules(network, stage):
            for parameter in module.parameters():
                changed |= parameter.requires_grad == (stage in frozen)
                parameter.requires_grad_(stage not in frozen)
                if stage in frozen:
                    parameter.grad = None
    network.frozen = frozen
    network.train(network.training)
    return changed


def _full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast would put a float32 product back into half precision. There is none for shapes without values."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def _let_gradients_through(backbone: ResNet) -> None:
    channels = backbone.conv1.out_channels
    for layer in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        out_channels = layer[-1].conv2.out_channels  # only basic blocks have shortcut A
        if layer[0].downsample is not None:
            layer[0].downsample = PaddedShortcut(out_channels - channels, layer[0].stride)
        channels = out_channels


def _replace_norms(backbone: ResNet) -> None:
    """Same entries and start values as MONAI's."""
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm3d:
                setattr(
                    module,
                    name,
                    BatchNorm(child.num_features, eps=child.eps, momentum=child.momentum),
                )


def dilate(backbone: ResNet) -> None:
    """Give `backbone` MedicalNet's own geometry. As in MedicalNet's models/resnet.py: every 3x3x3 convolution of the layer, the first block's included."""
    for name, dilation in DILATIONS.items():
        for block in getattr(backbone, name):
            assert isinstance(block, (ResNetBlock, ResNetBottleneck))
            for convolution in (block.conv1, block.conv2):
                convolution.stride = (1, 1, 1)
                if convolution.kernel_size == (3, 3, 3):
                    convolution.dilation = convolution.padding = (dilation,) * 3
            block.stride = 1
            if isinstance(block.downsample, PaddedShortcut):
                block.downsample.stride = 1
            elif block.downsample is not None:
                block.downsample[0].stride = (1, 1, 1)
