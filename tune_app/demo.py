"""The demo: a synthetic cohort and a search whose settings matter.

Everything runs through the code that runs at full size; only depth, width, volumes and epochs are small. The classes
overlap, and from random weights most of the learning rates are too low: most trials are stopped, and the winner is
confirmed.
"""

import shlex
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from tune_app.study.errors import SpecError
from tune_app.study.spec import build_spec, read_study_file
from tune_app.synthetic import write_cohort

SUBJECTS = 60
NOISE = 1.0
"""Standard deviation of the noise over the contrast: a single voxel carries no information, and settings matter."""

TRIALS, EPOCHS = 10, 10

SMALL: dict[str, Any] = {
    "depth": 10,
    "width": 0.5,
    "volume_shape": 20,
    "gradient_accumulation_steps": 1,
    "augmentation_strength": 0.5,
    "train_auc_volumes": 0,
}
"""What makes a run small: everything else is the default."""

CONFIRMED_ON = (1, 2, 3, 4, 5)
"""Folds of the confirmation: all but the one that the search chose by."""

SPACE: dict[str, Any] = {
    "search": {
        "backbone_lr": {"low": 1e-5, "high": 2e-3, "log": True},
        "head": ["linear", "cosine"],
        "ema_buffers": ["copied", "averaged"],
        "ema_warmup": [False, True],
    },
    "fixed": {"classifier_lr": 2e-3, "drw_start_epoch": 8, "ema_decay": 0.999},
}
"""The rate that decides, the head, and the averaging of the document next to the one that works: a small network on
small volumes learns in a dozen epochs at ten times the documented rate, and at a tenth of it not at all."""

HEADER = """\
# The study of `medtune demo`, on synthetic volumes: round balls (class 0) and flattened ones (class 1) in noise.
# `medtune init` writes a file with every field and its meaning.
"""


def write_sample(folder: Path, *, trials: int = TRIALS, epochs: int = EPOCHS) -> Path:
    """Write a cohort of NIfTI files and a study file; returns the file.

    Raises SpecError when `folder` holds something already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise SpecError(f"{folder}: not empty; name a new folder, or remove it")
    write_cohort(folder / "cohort", subjects=SUBJECTS, noise=NOISE)
    fields = {
        "data": "cohort/table.csv",
        "space": SPACE,
        "trials": trials,
        "gpus_per_trial": 0,
        "cache": "cache",
        "config": SMALL | {"num_folds": len(CONFIRMED_ON) + 1, "epochs": epochs},
    }
    path = folder / "study.yaml"
    path.write_text(HEADER + yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return path


def next_commands(folder: Path) -> list[str]:
    """Return the commands that search, confirm and report what `write_sample` wrote to `folder`."""
    place = shlex.quote(str(folder))
    folds = ",".join(map(str, CONFIRMED_ON))
    return [
        f"medtune run {place}/study.yaml --out {place}/study",
        f"medtune confirm {place}/study --top 1 --seeds 1 --folds {folds}",
        f"medtune report {place}/study",
    ]


def run_demo(folder: Path, *, trials: int, epochs: int, console: Console, results: Console) -> int:
    """Search, confirm and report in `folder`, and print what came of it; returns the exit code.

    Progress goes to `console`. Raises SpecError when `folder` holds something already.
    """
    from tune_app.compare.confirm import confirmation_spec
    from tune_app.compare.validation_scores import score_validation
    from tune_app.driver.run import DONE, run_study
    from tune_app.report import page
    from tune_app.report.summary import print_summary
    from tune_app.results.loading import load_study
    from tune_app.study.files import StudyFiles

    started = time.monotonic()
    file = write_sample(folder, trials=trials, epochs=epochs)
    commands = next_commands(folder)
    root = folder / "study"
    _step(commands[0], console)
    spec = build_spec(read_study_file(file))
    outcome = run_study(spec, root, console=console, notes=console)
    print_summary(root, results)
    if outcome.exit_code != DONE:
        return outcome.exit_code
    _step(commands[1], console)
    again, _ = confirmation_spec(
        load_study(root), top=1, seeds=1, folds=",".join(map(str, CONFIRMED_ON))
    )
    confirmation = StudyFiles(root).confirmation
    outcome = run_study(again, confirmation, console=console, notes=console)
    score_validation(confirmation, notes=lambda text: console.print(f"note: {text}", markup=False))
    print_summary(confirmation, results)
    _step(commands[2], console)
    report = page.write_report(load_study(root), root / "report.html")
    results.print(f"report written: {report}", soft_wrap=True, markup=False)
    console.print(f"the demo took {time.monotonic() - started:.0f} s")
    return outcome.exit_code


def _step(command: str, console: Console) -> None:
    console.print(f"\n$ {command}", soft_wrap=True, markup=False)
