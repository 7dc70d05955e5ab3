"""A trained model and its predictions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from trainables.config import FineTuneConfig
from trainables.data.scans import Recipe
from trainables.errors import one_line
from trainables.metrics import ranking_scores
from trainables.network.model import Classifier, configured_network
from tune_app.models.folder import (
    Member,
    ModelError,
    ModelFiles,
    ModelInfo,
    parse_info,
    weights_of,
)
from tune_app.results.calibration import Array


@dataclass(frozen=True)
class Model:
    """An exported model on a device, its files checked against their sums. Make it with `load_model`."""

    folder: Path
    id: str
    """First digits of the sum over all its files' sums: equal for equal models."""
    info: ModelInfo
    networks: tuple[Classifier, ...] = field(repr=False)
    device: torch.device

    @property
    def recipe(self) -> Recipe:
        return self.info.recipe

    def __repr__(self) -> str:
        value = self.info.validation.metrics["auc"].value
        trials = ", ".join(member.trial for member in self.info.members)
        auc = "" if value is None else f", validation AUC {value:.3f}"
        return f"<Model {self.folder.name} {self.id}: {self.info.kind} of trial {trials}{auc}, on {self.device}>"

    def logits(self, volumes_BCDHW: Array) -> Array:
        """Return the members' unscaled logits (M, B, C), float64, of prepared volumes."""
        volumes = torch.from_numpy(np.ascontiguousarray(volumes_BCDHW)).float()
        return np.stack(
            [network_logits(network, volumes, self.device) for network in self.networks]
        )

    def predict(self, logits_MBC: Array) -> "Scores":
        """Return scores, calibrated probabilities and decisions from the members' logits."""
        z_BC, scale = pooled(self.info.members, logits_MBC)
        scores = class_scores(z_BC, scale=scale)
        probabilities = self.info.calibration.probabilities(scale * z_BC)
        calibrated = probabilities if self.info.decides == "likeliest" else None
        decisions = decide(scores, self.info.threshold, calibrated)
        members = np.stack(
            [
                member.calibration.probabilities(member.scale * z)
                for member, z in zip(self.info.members, logits_MBC, strict=True)
            ]
        )
        return Scores(scores, probabilities, decisions, members)


@dataclass(frozen=True)
class Scores:
    """A model's predictions for a batch of B volumes."""

    log_odds_BC: Array
    """Log-odds of each class against the others, by the network's own probabilities: to rank and to decide by."""
    probabilities_BC: Array
    """Calibrated."""
    decisions_B: Array
    members_MBC: Array
    """Calibrated probabilities of each member alone."""


@dataclass(frozen=True)
class Source:
    """One file to score, and its class where a table names it; or why there is none."""

    path: str
    label: int | None = None
    problem: str | None = None
    subject: str | None = None
    """Whose volume it is, where a table names it."""


@dataclass(frozen=True)
class Scored:
    """A model's prediction for one volume."""

    log_odds_C: Array
    probabilities_C: Array
    decision: int
    members_MC: Array
    volume_CDHW: Array = field(repr=False)
    """As the networks saw it; for the explanation."""


@dataclass(frozen=True)
class Prediction:
    """What came of one source: scores, or the problem that kept it from having any."""

    source: Source
    scored: Scored | None = None
    problem: str | None = None
    notes: tuple[str, ...] = ()


def load_model(folder: Path | str, device: torch.device | str = "cpu") -> Model:
    """Return the model in `folder` on `device`, ready to score. Raises ModelError when a file is not as exported."""
    folder, device = Path(folder), torch.device(device)
    contents, short_id = ModelFiles(folder).read_all()
    info, configs = parse_info(folder, contents)
    networks = []
    for member, config in zip(info.members, configs, strict=True):
        network = configured_network(config)
        try:
            network.load_state_dict(load_tensors(weights_of(member, contents, folder)), strict=True)
        except (SafetensorError, RuntimeError) as error:
            raise ModelError(
                f"{ModelFiles(folder).weights(member.folder)}: not this network's weights: {one_line(error)}"
            ) from None
        networks.append(on_device(network, device))
    return Model(folder, short_id, info, tuple(networks), device)


def on_device(network: Classifier, device: torch.device) -> Classifier:
    """Return the network in eval mode, without gradients, where and as it runs fastest."""
    network.eval().requires_grad_(False)
    if device.type == "cuda":
        return network.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload, no-any-return]
    return network.to(device)


def choose_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` means here. Raises ModelError when there is no GPU to be had."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: torch finds no GPU here; use --device cpu")
    return torch.device(name)


@torch.no_grad()
def network_logits(network: Classifier, volumes_BCDHW: Tensor, device: torch.device) -> Array:
    """Return logits (B, C), float64, in float32 arithmetic. A batch that the GPU has no room for is cut in two."""
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            volumes = volumes_BCDHW.to(device)
            if device.type == "cuda":
                volumes = volumes.contiguous(memory_format=torch.channels_last_3d)
            return np.asarray(network(volumes).double().cpu().numpy())
    except torch.OutOfMemoryError:
        if len(volumes_BCDHW) == 1:
            raise
    torch.cuda.empty_cache()
    middle = len(volumes_BCDHW) // 2
    halves = (volumes_BCDHW[:middle], volumes_BCDHW[middle:])
    return np.concatenate([network_logits(network, half, device) for half in halves])


def pooled(members: Sequence[Member], logits_MNC: Array) -> tuple[Array, float]:
    """Return the model's logits (N, C) and their scale: softmax(scale * logits) is its own, uncalibrated probability.

    A single network's are its own. An ensemble's are the mean of its members' calibrated logits: calibration puts
    members on one scale, or the one with the largest logits, often a saturated one, would speak for all. A member that
    was not asked about a volume (NaN) does not count for it.
    """
    if len(members) == 1:
        return logits_MNC[0], members[0].scale
    calibrated = [
        member.calibration.logits(member.scale * z)
        for member, z in zip(members, logits_MNC, strict=True)
    ]
    return np.nanmean(calibrated, axis=0), 1.0


def class_scores(z_NC: Array, *, scale: float) -> Array:
    """Return log-odds (N, C) of each class against the others; with two classes the first is minus the second."""
    scores = ranking_scores(z_NC, scale=scale)
    return np.stack([-scores, scores], axis=1) if scores.ndim == 1 else scores


def decide(
    log_odds_NC: Array, threshold: float | None, calibrated_NC: Array | None = None
) -> Array:
    """Return the classes (N,) decided for: class 1 from `threshold` on, or else the likeliest class by calibration.

    `calibrated_NC`: calibrated logits or probabilities; None: the largest score decides, as in models of earlier versions,
    whose decision need not be the class with the largest calibrated probability.
    """
    if threshold is not None:
        return (log_odds_NC[:, 1] >= threshold).astype(np.int64)
    return np.asarray((log_odds_NC if calibrated_NC is None else calibrated_NC).argmax(axis=1))


def network_of(
    config: FineTuneConfig, weights: dict[str, Tensor], device: torch.device
) -> Classifier:
    network = configured_network(config)
    network.load_state_dict(weights, strict=True)
    return on_device(network, device)
