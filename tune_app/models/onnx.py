"""A model as ONNX, compared with the original."""

import logging
import warnings
from importlib import util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from trainables.config import FineTuneConfig
from trainables.network.model import Classifier
from tune_app.models.evaluation import ExportError
from tune_app.models.model import network_of

ONNX_TOLERANCE = 1e-3
"""Largest difference of a logit between ONNX Runtime and torch, as a share of the largest logit."""


ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """Raise ExportError unless the packages that write and check ONNX are installed."""
    missing = [name for name in ONNX_PACKAGES if util.find_spec(name) is None]
    if missing:
        raise ExportError(f"--onnx needs {', '.join(missing)}: pip install 'medtune[onnx]'")


class _Scaled(nn.Module):
    """A network whose softmax is its probability, as written to ONNX."""

    def __init__(self, network: Classifier, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, volumes: Tensor) -> Tensor:
        logits: Tensor = self.scale * self.network(volumes)
        return logits


def write_onnx(
    path: Path, config: FineTuneConfig, weights: dict[str, Tensor], scale: float, volumes: Tensor
) -> float:
    """Write the network as ONNX and run it on `volumes` in ONNX Runtime; returns the largest difference from torch.

    Input `volumes` (batch, C, D, H, W) float32, prepared; output `logits` (batch, classes), scaled: their softmax is
    the uncalibrated probability. Raises ExportError when the two differ by more than ONNX_TOLERANCE of the logits.
    """
    require_onnx()
    import onnxruntime

    cpu = torch.device("cpu")
    scaled = _Scaled(network_of(config, weights, cpu), scale).eval()
    # A batch of one would be taken for fixed
    sample = torch.cat([volumes, volumes])[: max(2, len(volumes))]
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                scaled,
                (sample,),
                str(path),
                input_names=["volumes"],
                output_names=["logits"],
                dynamic_shapes={"volumes": {0: torch.export.Dim("batch")}},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    difference = largest = 0.0
    with torch.no_grad():
        for batch in (volumes, volumes[:1]):
            expected = scaled(batch).numpy()
            found = session.run(["logits"], {"volumes": batch.numpy()})[0]
            difference = max(difference, float(np.abs(found - expected).max()))
            largest = max(largest, float(np.abs(expected).max()))
    if not difference <= ONNX_TOLERANCE * max(1.0, largest):
        raise ExportError(
            f"ONNX: its logits differ from torch's by {difference:.2g}; export without --onnx"
        )
    return difference
