"""The demo: a synthetic cohort, a small pretrained checkpoint, and a search that contains runs that collapse.

Everything runs through the code that runs at full size; only depth, width, volumes and epochs are small.
"""

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from trainables.config import build_config
from trainables.data.manifest import read_manifest
from trainables.data.scans import Recipe
from trainables.data.storage import absolute
from trainables.data.volumes import prepare_cohort
from trainables.finetune import finetune
from trainables.network.model import configured_network
from trainables.network.weights import save_medicalnet
from trainables.saved_run import open_inputs
from tune_app.study.errors import SpecError
from tune_app.study.policy_spec import FORMER_DEFAULTS
from tune_app.study.spec import StudySpec, build_spec
from tune_app.synthetic import write_cohort, write_pretext_cohort

SMALL: dict[str, Any] = {
    "depth": 10,
    "width": 0.5,
    "volume_shape": 20,
    "gradient_accumulation_steps": 1,
    "augmentation_strength": 0.5,
    "num_folds": 3,
}
"""What makes a run small: everything else is the default."""


SPACE: dict[str, Any] = {
    "base": "collapse",
    "search": {
        "head": ["linear", "cosine"],
        "ema_buffers": ["copied", "averaged"],
        "ema_warmup": [False, True],
        "max_m": {"low": 0.05, "high": 0.5},
        "one_minus_ema_decay": {"low": 5e-4, "high": 2e-2, "log": True},
    },
    "fixed": {"backbone_lr": 1e-3, "classifier_lr": 2e-3},
}
"""The document's knobs, with the averaging and the head it had and those that work: some runs must collapse. A small
network on small volumes learns in a dozen epochs at ten times the documented rates, which are therefore not searched."""


def demo_spec(
    table: Path, weights: Path | None, *, trials: int, epochs: int, cache: Path
) -> StudySpec:
    """Return the demo's study: a small space with the document's before-settings and the defaults tried first."""
    config = SMALL | {"epochs": epochs}
    if weights is not None:
        config["pretrained_path"] = absolute(weights)
    return build_spec(
        {
            "data": absolute(table),
            "space": SPACE,
            "trials": trials,
            "config": config,
            # It has to show collapses and what stops them, which the default search avoids and ends early
            "sampler": "tpe",
            "warm_start": None,
            "policy": dict(FORMER_DEFAULTS),
            "gpus_per_trial": 0,
            "cache": absolute(cache),
        }
    )


def pretrain(folder: Path, cache: Path, *, epochs: int, seed: int = 0) -> Path:
    """Train a small network to tell the shapes of a second cohort apart; write its backbone in MedicalNet's format."""
    table = write_pretext_cohort(folder / "pretext", seed=seed)
    config = build_config(
        SMALL
        | {
            "epochs": epochs,
            "num_classes": 3,
            "loss": "cross_entropy",
            "head": "linear",
            "backbone_lr": 1e-3,
            "classifier_lr": 1e-3,
            "dropout": 0.0,
            "train_auc_volumes": 0,
        }
    )
    manifest = read_manifest(table, num_classes=config.num_classes)
    cohort, split = open_inputs(
        config, table, prepare_cohort(manifest, Recipe.from_config(config), cache)
    )
    *_, last = finetune(config, cohort, split)
    network = configured_network(config)
    network.load_state_dict(last.state()["network"])
    path = folder / "pretrained" / "demo_resnet_10.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_medicalnet(network.backbone, path)
    return path


def run_demo(folder: Path, *, trials: int, epochs: int, console: Console, results: Console) -> int:
    """Run the demo in `folder` and say what came of it; returns the exit code. Progress goes to `console`."""
    from tune_app.driver.run import run_study
    from tune_app.report.summary import print_summary

    started = time.monotonic()
    if folder.exists() and any(folder.iterdir()):
        raise SpecError(f"{folder}: not empty; remove it, or name another folder with --out")
    cache = folder / "cache"
    table = write_cohort(folder / "cohort", subjects=60, noise=0.8)
    console.print(f"cohort: real NIfTI files and their table {table}", soft_wrap=True)
    weights = pretrain(folder, cache, epochs=4)
    console.print(f"pretrained checkpoint in MedicalNet's format: {weights}", soft_wrap=True)
    study = folder / "study"
    spec = demo_spec(table, weights, trials=trials, epochs=epochs, cache=cache)
    outcome = run_study(spec, study, console=console, notes=console)
    print_summary(study, results)
    console.print(f"the demo took {time.monotonic() - started:.0f} s")
    return outcome.exit_code
