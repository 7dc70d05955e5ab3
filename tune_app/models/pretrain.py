"""A backbone pretrained on some of the user's own subjects, without their labels, written as a MedicalNet file.

Released weights cannot always be had, and they were made of other organs. This trains the same network with the same
recipe on labels that the volumes give themselves (`trainables.network.pretext`), on a share of the training subjects, and writes
next to the weights a table of all the other rows: a search on that table has seen none of its volumes before.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from trainables import installed_version
from trainables.checkpoints import TrialFiles, load_state, replacing, write_json
from trainables.config import ConfigError, FineTuneConfig, Scalar, build_config
from trainables.data.json_files import read_json
from trainables.data.manifest import Manifest, read_manifest
from trainables.data.scans import Recipe
from trainables.data.volumes import open_cohort, prepare_cohort
from trainables.finetune import finetune
from trainables.network.model import configured_network
from trainables.network.pretext import (
    TENTHS,
    Pretext,
    PretextError,
    classes_of,
    held_out_split,
    part_of_subjects,
    pretext_cohort,
)
from trainables.network.weights import inspect_weights, save_medicalnet
from trainables.own_folder import fresh_own, remove_own
from trainables.saved_run import saved_run
from trainables.step import choose_precision
from tune_app.study.epoch_text import HEADER, epoch_line

PRETEXT_DEFAULTS: dict[str, Scalar] = {
    "backbone_lr": 1e-3,
    "classifier_lr": 1e-3,
    "dropout": 0.0,
}
"""Where pretraining differs from the defaults of fine-tuning, unless set: all weights are new, so they share one rate."""

DECIDED = (
    "loss",
    "head",
    "pretrained_path",
    "drw_start_epoch",
    "fold",
    "num_folds",
    "cross_validate",
)
"""Hyperparameters that the pretext decides or that have no meaning in it."""

PRETEXT = "volumes of a pretraining"
"""Mark of the folder that holds them while it runs."""
RECORD = "pretraining.json"


def pretext_config(pretext: Pretext, settings: Mapping[str, Any]) -> FineTuneConfig:
    """Return the config of a pretraining run: cross-entropy on the pretext's classes with a linear head.

    Rotation flips nothing: a mirrored quarter turn is another class's quarter turn. Size scales and shifts nothing.
    `num_classes` in `settings` is the table's. Raises ConfigError, also for settings that the pretext decides.
    """
    if clash := [name for name in DECIDED if name in settings]:
        raise ConfigError([f"{name} is decided by the pretext: leave it out" for name in clash])
    own: dict[str, Any] = (
        {"flip_axes": ""} if pretext == "rotation" else {"augmentation_strength": 0.0}
    )
    if clash := [name for name in own if name in settings]:
        raise ConfigError(
            [
                f"{name} would change the labels of the pretext {pretext}: leave it out"
                for name in clash
            ]
        )
    fixed = {"num_classes": classes_of(pretext), "loss": "cross_entropy", "head": "linear"}
    return build_config({**PRETEXT_DEFAULTS, **own, **settings, **fixed})


def pretrain(
    table: Path,
    folder: Path,
    cache: Path,
    *,
    pretext: Pretext,
    share: float,
    settings: Mapping[str, Any],
    gpu: bool,
    console: Console,
    notes: Console,
) -> Path:
    """Pretrain on `share` of the training subjects into `folder`, from a checkpoint there if one exists; return the weights.

    `share` is a number of tenths. Rows whose split is val or test are never trained on. Written: `resnet_<depth>.pth`
    (averaged weights of the last epoch), `finetune.csv` (all rows whose subjects were not used; not with a share of 1),
    `pretraining.json`. Raises PretextError, ConfigError, and what reading the table and its volumes raises.
    """
    tenths = _tenths(share)
    config = pretext_config(pretext, settings)
    of_table = build_config(settings)
    manifest = read_manifest(table, num_classes=of_table.num_classes, classes=of_table.classes)
    used = pretraining_rows(manifest, tenths)
    cohort_folder = prepare_cohort(manifest, Recipe.from_config(config), cache)
    cohort = open_cohort(cohort_folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = TrialFiles(folder / "run")
    record = _record(pretext, manifest, cohort_folder.name, tenths, used, config)
    if files.checkpoint.exists():
        _check_same(folder, record)
        notes.print(f"continuing from the checkpoint in {files.folder}", soft_wrap=True)
    write_json(folder / RECORD, record)
    made = folder / "pretext"
    fresh_own(made, PRETEXT)
    try:
        volumes = pretext_cohort(cohort, used, pretext, made / "volumes.npy")
        split = held_out_split(volumes)
        device = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
        if gpu and device.type == "cpu":
            notes.print("no GPU found: this run is on the CPU, in float32")
        subjects = len(np.unique(volumes.subjects))
        precision = choose_precision(config.amp, device)
        notes.print(
            f"{pretext} of {len(used)} volumes of {subjects} subjects: train {len(split.train)}, held out "
            f"{len(split.val)}, {config.num_classes} classes; {precision.name}: {precision.reason}",
            soft_wrap=True,
        )
        rows: list[Mapping[str, Any]] = []
        console.print(HEADER)
        for row in saved_run(
            config,
            files,
            lambda resume: finetune(config, volumes, split, device=device, resume=resume),
        ):
            rows.append(row)
            console.print(epoch_line(row, config.epochs))
    finally:
        remove_own(made, PRETEXT)
    accuracy = float(rows[-1]["val_accuracy_ema"])
    reached = {"accuracy": accuracy, "chance": 1 / config.num_classes, "held_out": len(split.val)}
    weights = _write_weights(config, files, folder)
    described = {"file": weights.name, "sha256": inspect_weights(weights).sha256}
    write_json(folder / RECORD, {**record, **reached, "weights": described})
    console.print(
        f"\n{accuracy_text(accuracy, config.num_classes, len(split.val))}", soft_wrap=True
    )
    console.print(f"weights: {weights}", soft_wrap=True, markup=False)
    if tenths < TENTHS:
        others = write_others(manifest, used, folder / "finetune.csv")
        console.print(
            f"table of the {others} volumes whose subjects were not used: {folder / 'finetune.csv'}",
            soft_wrap=True,
        )
    return weights


def _record(
    pretext: Pretext,
    manifest: Manifest,
    cohort: str,
    tenths: int,
    used: npt.NDArray[np.int64],
    config: FineTuneConfig,
) -> dict[str, Any]:
    """Content of pretraining.json before the run begins."""
    return {
        "pretext": pretext,
        "table": manifest.table,
        "cohort": cohort,
        "share": tenths / TENTHS,
        "subjects": sorted(set(manifest.rows["subject"].iloc[used])),
        "config": config.model_dump(mode="json"),
        "versions": {name: installed_version(name) for name in ("medtune", "torch", "monai")},
    }


def _tenths(share: float) -> int:
    tenths = round(share * TENTHS)
    if not math.isclose(tenths, share * TENTHS) or not 1 <= tenths <= TENTHS:
        raise PretextError(
            f"a share of {share:g}: 0.1 to 1 of the training subjects, in steps of 0.1"
        )
    return tenths


def _write_weights(config: FineTuneConfig, files: TrialFiles, folder: Path) -> Path:
    """Write the averaged weights of the last epoch as MedicalNet's files are."""
    weights = folder / f"resnet_{config.depth}.pth"
    network = configured_network(config)
    network.load_state_dict(load_state(files.checkpoint)["average"]["network"])
    save_medicalnet(network.backbone, weights)
    return weights


def pretraining_rows(manifest: Manifest, tenths: int) -> npt.NDArray[np.int64]:
    """Return the positions of the rows to pretrain on: `tenths` tenths of the subjects that are not of val or test.

    Raises PretextError when they are too few to hold a tenth of them out.
    """
    words = manifest.rows["split"].to_numpy(dtype=object)
    pool = np.flatnonzero((words != "val") & (words != "test"))
    labels = manifest.rows["label"].to_numpy(dtype=np.int64)[pool]
    subjects = manifest.rows["subject"].to_numpy(dtype=str)[pool]
    used = part_of_subjects(labels, subjects, tenths)
    found, all_of_them = len(np.unique(subjects[used])), len(np.unique(subjects))
    if found < TENTHS:
        raise PretextError(
            f"a share of {tenths / TENTHS:g} is {found} of {all_of_them} training subjects, and {TENTHS} are needed: "
            "raise the share, or add subjects"
        )
    return pool[used]


def write_others(manifest: Manifest, used: npt.NDArray[np.int64], path: Path) -> int:
    """Write the table without the rows `used`, with absolute paths; return how many rows that are."""
    others = manifest.rows.drop(index=list(used))
    kept = [name for name in others.columns if others[name].notna().any()]
    with replacing(path) as temporary:
        others[kept].to_csv(temporary, index=False, errors="backslashreplace")
    return len(others)


def accuracy_text(accuracy: float, num_classes: int, held_out: int) -> str:
    """Return a sentence on the weights from the pretext's accuracy."""
    chance = 1 / num_classes
    text = f"pretext accuracy {accuracy:.3f} on {held_out} volumes of subjects held out; chance is {chance:.3f}"
    if accuracy > chance + 2 * math.sqrt(chance * (1 - chance) / held_out):
        return text
    return f"{text}: not above chance, so these weights know no more than random ones. More epochs, or another pretext"


def _check_same(folder: Path, record: Mapping[str, Any]) -> None:
    try:
        before = read_json(folder / RECORD)
    except (OSError, ValueError):
        before = {}
    names = ("pretext", "cohort", "share")
    if other := [
        f"{name} {before.get(name)}" for name in names if before.get(name) != record[name]
    ]:
        raise PretextError(f"{folder}: holds a run of {', '.join(other)}: choose another folder")
