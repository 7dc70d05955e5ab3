"""Where compiled kernels are kept: in medtune's cache, next to the prepared cohorts, for all processes and studies.

A process compiles a Triton kernel that it does not find there, and the driver of a GPU does so with code for another GPU;
both name their files by everything that these depend on, the GPU among it. A home folder may be missing, read-only or new
for each container, where the cache that a study names is there for the next one. cuDNN's choice of the fastest algorithm
for a shape cannot be kept: torch holds it in the process (`trainables.training_thread`).
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from trainables import installed_version
from trainables.config import FineTuneConfig

FOLDERS = {"TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "driver"}
"""Variables that set where Triton and the GPU's driver keep compiled kernels -> a folder's name."""


SAME_STEP = {
    *("epochs", "fold", "num_folds", "cross_validate", "seed", "dropout", "pretrained_path"),
    *("backbone_lr", "classifier_lr", "weight_decay", "scheduler", "warmup_epochs", "grad_clip"),
    *("max_m", "s", "focal_gamma", "drw_start_epoch", "drw_beta", "ema_decay", "ema_warmup"),
    *("spacing_mm", "intensity", "window_low", "window_high", "scale_lr_with_batch"),
    *("freeze_backbone_epochs", "unfreeze_stage_epochs"),
}
"""Hyperparameters that do not change the time or memory of a step, or only for some epochs."""


def step_digest(config: FineTuneConfig, **parts: Any) -> str:
    """Return a key of all that decides the kernels, time and memory of a step: of `config` what counts, and `parts`."""
    settings = config.model_dump(mode="json")
    counting = {name: value for name, value in settings.items() if name not in SAME_STEP}
    text = json.dumps({"config": counting, **parts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def kernel_folder(cache: Path) -> Path:
    """Return the folder for compiled kernels of this version of torch in medtune's cache."""
    return cache / "kernels" / f"torch-{installed_version('torch') or 'unknown'}"


def keep_kernels(cache: Path) -> None:
    """Let this process keep compiled kernels in `cache`, before it compiles any; the user's own settings stay."""
    for variable, name in FOLDERS.items():
        os.environ.setdefault(variable, str(kernel_folder(cache) / name))
