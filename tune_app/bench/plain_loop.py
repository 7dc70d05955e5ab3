"""The plain loop of the usual fine-tuning script, to measure ours against.

Contiguous tensors, fp16 autocast with GradScaler on a GPU, gradient clipping, PyTorch's default Adam, an average updated
a parameter at a time, a cosine schedule, MONAI's network and transforms. Nothing of it is used for a user's runs.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from monai.networks.nets.resnet import ResNet
from monai.transforms import (
    Compose,
    EnsureType,
    EnsureTyped,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandAffine,
    RandFlip,
    RandGaussianNoise,
    RandScaleIntensity,
    RandShiftIntensity,
    Resized,
)
from torch import Tensor, nn

from trainables.augment import INTENSITY_SCALE, INTENSITY_SHIFT, NOISE, ROTATION_DEG, SCALE
from trainables.config import FineTuneConfig
from trainables.losses import class_weights, drw_active, ldam_margins, sample_losses
from trainables.network.model import BLOCKS, PLANES, CosineHead, dilate


def monai_preparation(shape: tuple[int, int, int]) -> list[Callable[..., Any]]:
    """MONAI's transforms of {"image": path} that read, turn, resize and normalise a scan."""
    return [
        LoadImaged("image", ensure_channel_first=True),
        Orientationd("image", axcodes="RAS", labels=None),
        Resized("image", shape, mode="trilinear"),
        NormalizeIntensityd("image"),
        EnsureTyped("image", track_meta=False),
    ]


def monai_augmentation(flip_axes: str = "x") -> Callable[[Tensor], Tensor]:
    """The kinds and ranges of `trainables.augment` as MONAI's transforms, each applied to every volume."""
    turn = math.radians(ROTATION_DEG)
    flips = [RandFlip(prob=0.5, spatial_axis="xyz".index(axis)) for axis in flip_axes]
    transforms: Callable[[Tensor], Tensor] = Compose(
        [
            *flips,
            RandAffine(
                prob=1.0,
                rotate_range=(turn,) * 3,
                scale_range=(SCALE,) * 3,
                mode="bilinear",
                padding_mode="border",
            ),
            RandScaleIntensity(factors=INTENSITY_SCALE, prob=1.0),
            RandShiftIntensity(offsets=INTENSITY_SHIFT, prob=1.0),
            RandGaussianNoise(prob=1.0, std=NOISE),
            EnsureType(track_meta=False),
        ]
    )
    return transforms


class PlainNetwork(nn.Module):
    """MONAI's own network and a cosine head."""

    def __init__(self, config: FineTuneConfig) -> None:
        super().__init__()
        block, blocks = BLOCKS[config.depth]
        self.backbone = ResNet(
            block, list(blocks), list(PLANES), n_input_channels=config.in_channels, conv1_t_stride=2,
            widen_factor=config.width, feed_forward=False, bias_downsample=False,
        )  # fmt: skip
        if config.geometry == "dilated":
            dilate(self.backbone)
        self.dropout = nn.Dropout(config.dropout)
        self.head = CosineHead(self.backbone.in_planes, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.backbone(x)))
        return logits


class PlainRun:
    """A network, its average and its optimiser; `class_counts` are those of the training rows."""

    def __init__(
        self,
        config: FineTuneConfig,
        class_counts: np.ndarray,
        device: torch.device,
        total_updates: int,
    ) -> None:
        torch.backends.cudnn.benchmark = False
        torch.manual_seed(config.seed)
        self.config, self.device = config, device
        self.network = PlainNetwork(config).to(device)
        self.average = {
            name: value.detach().clone() for name, value in self.network.state_dict().items()
        }
        self.optimizer = torch.optim.Adam(
            [
                {"params": self.network.backbone.parameters(), "lr": config.backbone_lr},
                {"params": self.network.head.parameters(), "lr": config.classifier_lr},
            ],
            weight_decay=config.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, T_max=total_updates
        )
        self.half = device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half)
        self.margins = ldam_margins(class_counts, config.max_m).to(device)
        self.weights = class_weights(class_counts, config.drw_beta).to(device)
        self.updates = 0

    def train_epoch(self, batches: Iterable[Any], epoch: int) -> None:
        """One pass over `batches` of (volumes, labels); `epoch` is 1-based."""
        config = self.config
        weights = (
            self.weights
            if drw_active(epoch, config.drw_start_epoch)
            else torch.ones_like(self.weights)
        )
        self.network.train()
        self.optimizer.zero_grad()
        for index, (volumes, labels) in enumerate(batches):
            volumes, labels = (
                volumes.to(self.device, non_blocking=True),
                labels.to(self.device, non_blocking=True),
            )
            with self._autocast():
                logits = self.network(volumes)
                losses = sample_losses(
                    logits, labels, loss="ldam", margins=self.margins, s=config.s
                )
                loss = (weights[labels] * losses).mean()
            self.scaler.scale(loss / config.gradient_accumulation_steps).backward()  # type: ignore[no-untyped-call]
            if (index + 1) % config.gradient_accumulation_steps:
                continue
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.grad_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.schedule.step()
            self._update_average()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def _update_average(self) -> None:
        """Exponential moving average with the warm-up of `ema_warmup`, so that both sides rank the same weights."""
        self.updates += 1
        decay = self.config.ema_decay
        if self.config.ema_warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        for name, value in self.network.state_dict().items():
            if value.is_floating_point():
                self.average[name].mul_(decay).add_(value, alpha=1 - decay)
            else:
                self.average[name].copy_(value)

    @torch.no_grad()
    def scores(self, batches: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Logit differences (N,) of class 1 over class 0 by the averaged weights, and labels (N,)."""
        trained = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.network.load_state_dict(self.average)
        self.network.eval()
        logits, labels = [], []
        for volumes, label in batches:
            with self._autocast():
                logits.append(self.network(volumes.to(self.device)).float().cpu())
            labels.append(label)
        self.network.load_state_dict(trained)
        both = torch.cat(logits).numpy()
        return both[:, 1] - both[:, 0], torch.cat(labels).numpy()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.float16 if self.half else None, enabled=self.half
        )
