"""One run without a search: what `medtune train` does, and the line an epoch that it prints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from rich.console import Console

from trainables.checkpoints import TrialFiles, write_json
from trainables.config import ConfigError, FineTuneConfig, build_config, cannot_run
from trainables.course import NO_FAULT
from trainables.data.folds import split_of, thin_folds
from trainables.data.json_files import read_json
from trainables.data.manifest import Manifest, read_manifest
from trainables.data.scans import Recipe
from trainables.data.spacing import with_common_spacing
from trainables.data.storage import absolute
from trainables.data.volumes import open_cohort, prepare_cohort
from trainables.diagnosis import diagnose
from trainables.finetune import finetune
from trainables.objective import best_epoch, objective_value
from trainables.ranks import RankWork, local_gang_rows
from trainables.saved_run import saved_run
from trainables.step import choose_precision
from tune_app.driver.display import print_lines
from tune_app.driver.local_ray import keep_strangers_out
from tune_app.study.epoch_text import HEADER, epoch_line


def train_once(
    config: FineTuneConfig,
    table: Path,
    folder: Path,
    cache: Path,
    *,
    gpu: bool,
    multi_gpu: bool,
    console: Console,
    notes: Console,
) -> int:
    """Run `config` on `table` into `folder`, from a checkpoint there if one exists; returns the exit code.

    A line an epoch goes to `console`, everything else to `notes`.
    """
    if problems := cannot_run(config, ranks=None if multi_gpu else 1):
        raise ConfigError(problems)
    files = TrialFiles(folder)
    manifest = read_manifest(table, num_classes=config.num_classes, classes=config.classes)
    config = with_what_the_table_gives(config, manifest, files, notes)
    split = split_of(manifest, config)
    cohort_folder = prepare_cohort(manifest, Recipe.from_config(config), cache)
    cohort = open_cohort(cohort_folder)
    gpus = torch.cuda.device_count() if gpu else 0
    device = torch.device("cuda" if gpus else "cpu")
    if gpu and not gpus:
        notes.print("no GPU found: this run is on the CPU, in float32")
    if multi_gpu and gpus < 2:
        notes.print(f"--multi_gpu: {gpus} GPUs here, so the run has one rank")
    precision = choose_precision(config.amp, device)
    sizes = f"train {len(split.train)}, validation {len(split.val)}"
    notes.print(f"volumes: {sizes}; {precision.name}: {precision.reason}")
    print_lines(notes, thin_folds(manifest, config))
    if config.drw_start_epoch > config.epochs and config.loss != "cross_entropy":
        notes.print(
            f"DRW would start in epoch {config.drw_start_epoch}: not within these {config.epochs}"
        )

    if files.checkpoint.exists():
        notes.print(f"continuing from the checkpoint in {folder}", soft_wrap=True)
    write_json(files.run, {"data": absolute(table), "cache": absolute(cache)})
    rows: list[Mapping[str, Any]] = []
    if multi_gpu and gpus > 1:
        keep_strangers_out()
        run = local_gang_rows(
            RankWork(config, str(table), str(cohort_folder), gpu=True), gpus, files
        )
    else:
        run = saved_run(
            config,
            files,
            lambda resume: finetune(config, cohort, split, device=device, resume=resume),
        )
    for row in run:
        if not rows:  # not before: a run may be refused
            console.print(HEADER)
        rows.append(row)
        console.print(epoch_line(row, config.epochs))
    print_lines(console, ["", *_end_lines(rows, config)])
    notes.print(f"checkpoint, averaged weights and config: {folder}", soft_wrap=True)
    notes.print(f"next: medtune export {quote(str(folder))} --out MODEL", soft_wrap=True)
    return 0


def _end_lines(rows: Sequence[Mapping[str, Any]], config: FineTuneConfig) -> list[str]:
    verdict = diagnose(rows, config)
    summary = sound_end(rows) if verdict == NO_FAULT else verdict.summary
    return [summary, verdict.advice] if verdict.advice else [summary]


def sound_end(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the result of a run without a fault: of the epoch whose weights are kept, and not of a lucky one."""
    kept = best_epoch(rows)
    if kept is None:
        return "no fault found, and no validation AUC"
    value = objective_value(rows)
    return (
        f"no fault found; validation AUC {value:.3f}, the best median of 3 epochs; the weights of epoch {kept} of "
        f"{len(rows)} are kept"
    )


def with_what_the_table_gives(
    config: FineTuneConfig, manifest: Manifest, files: TrialFiles, notes: Console
) -> FineTuneConfig:
    """Return the config with spacing and class names that a run in this folder began with, or for a new run those of the table."""
    began = build_config(read_json(files.config)) if files.config.is_file() else None
    if "classes" not in config.model_fields_set:
        named = manifest.classes if began is None else began.classes
        config = config.model_copy(update={"classes": named})
    if "spacing_mm" not in config.model_fields_set and began is not None:
        return config.model_copy(update={"spacing_mm": began.spacing_mm})
    config, found = with_common_spacing(config, manifest)
    print_lines(notes, found.lines() if found else [])
    return config
