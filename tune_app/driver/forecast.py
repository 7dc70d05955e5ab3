"""How long a study on CPUs will take, and how much memory a trial: measured on a few volumes before it starts.

On GPUs the packing measures it on the real cohort, and everywhere the first epochs do (`time_budget`). A CPU may need
hours for the first epoch of the default settings, so here a single pass gives an estimate in seconds.

`python -m tune_app.driver.forecast SECONDS` measures an epoch before a study is queued: it is the process that `medtune
serve` starts for its form. It reads the fields of a study as JSON from stdin, writes the measurement as one JSON object
to stdout, and ends after SECONDS, also when no one waits for it any longer. On a GPU kernels are compiled and whole steps
captured, which single passes lack, so real epochs over random volumes are timed there.
"""

import json
import math
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainables import mps
from trainables.config import FineTuneConfig
from trainables.data.folds import Split, split_of
from trainables.data.manifest import read_manifest
from trainables.data.table_file import ManifestError
from trainables.kernel_cache import keep_kernels
from trainables.machine.safe_path import safe_search
from trainables.machine.this_machine import peak_resident_gib, settle_user, usable_cpus
from tune_app.driver.warm_up import cohort_in_memory
from tune_app.study.duration import span, study_s
from tune_app.study.errors import SpecError
from tune_app.study.files import default_cache
from tune_app.study.heaviest import heaviest
from tune_app.study.presets import preset_line
from tune_app.study.spec import StudySpec, build_spec

WORTH_MEASURING = 2e8
"""Voxels that all trials together pass through a network, from which on a pass is measured: less takes minutes."""

TOO_LONG_S = 3600.0
"""Seconds of a search on CPUs from which on smaller settings are recommended."""

PROBE_VOLUMES = 2
"""Volumes of a measured pass: BatchNorm needs more than one."""

PASSES = 3
"""The fastest pass counts: the first warms up, and any may wait for a CPU. No other follows one that takes SLOW_S."""

SLOW_S = 10.0

VALIDATED = 2
"""Raw and averaged weights are validated in each epoch."""


STEPS = 20
"""Optimiser steps of a measured epoch at most."""

EPOCHS = 3
"""Epochs that run on a GPU; the fastest counts, as the first compiles kernels and captures the step."""

VALIDATION = 64
"""Volumes that a measured epoch validates at most."""


class Pass(NamedTuple):
    """One measured pass, per volume."""

    train_s: float
    score_s: float
    fixed_gib: float
    """Memory of the process with the network and its optimiser."""
    volume_gib: float
    """Memory of a volume between forward and backward."""

    def trial_gib(self, config: FineTuneConfig) -> float:
        """Return the memory of a trial."""
        return self.fixed_gib + config.batch_size * self.volume_gib


@dataclass(frozen=True)
class Forecast:
    """Approximate time and memory of a study on CPUs."""

    epoch_s: float
    trial_gib: float | None
    """Memory of a trial; None where it was not measured."""
    study_s: float
    """All trials, with the epochs that the stopping policy is expected to run."""
    trials: int
    on_cpus: bool

    def lines(self) -> list[str]:
        """Return the plan in words, with smaller settings where it takes long."""
        end = time.localtime(time.time() + self.study_s)
        day = "%H:%M" if self.study_s < 20 * 3600 else "%Y-%m-%d %H:%M"
        memory = "" if self.trial_gib is None else f", {self.trial_gib:.1f} GiB of memory per trial"
        lines = [
            f"forecast: about {span(self.epoch_s)} per epoch{memory}; {self.trials} trials end about "
            f"{time.strftime(day, end)} ({span(self.study_s)} from now)"
        ]
        if self.on_cpus and self.study_s > TOO_LONG_S:
            lines.append(
                "warning: no GPU is used, and this takes long on CPUs. Smaller settings fit a laptop "
                f"(--preset laptop): {preset_line('laptop').partition(': ')[2]}"
            )
        return lines


def forecast_on_cpus(spec: StudySpec, *, concurrent: int, epochs: float) -> Forecast | None:
    """Return the forecast for this machine's CPUs, measured now; None where the study takes only minutes in any case.

    `epochs`: epochs that a trial is expected to run, early stops included. Raises ManifestError.
    """
    config = heaviest(spec)
    split = split_in(spec, config)
    volumes = len(split.train) + len(split.val)
    voxels = volumes * math.prod(config.volume_shape) * config.epochs * spec.num_trials
    if voxels < WORTH_MEASURING:
        return None
    with safe_search(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        measured = process.submit(measure_pass, config, spec.cpus_per_rank).result()
    epoch_s = epoch_seconds(config, split, measured)
    return Forecast(
        epoch_s,
        measured.trial_gib(config),
        study_s(spec.num_trials, epochs, epoch_s, concurrent),
        spec.num_trials,
        True,
    )


def epoch_seconds(config: FineTuneConfig, split: Split, measured: Pass) -> float:
    """Return the seconds of an epoch: each training volume once, and the volumes that are scored after it."""
    scored = VALIDATED * len(split.val) + min(config.train_auc_volumes, len(split.train))
    return len(split.train) * measured.train_s + scored * measured.score_s


def forecast_on_gpus(
    spec: StudySpec, volumes_per_s: float, *, concurrent: int, epochs: float
) -> Forecast:
    """Return the forecast where each of the concurrent trials trains `volumes_per_s` volumes per second."""
    epoch_s = len(split_in(spec, heaviest(spec)).train) / volumes_per_s
    return Forecast(
        epoch_s, None, study_s(spec.num_trials, epochs, epoch_s, concurrent), spec.num_trials, False
    )


def split_in(spec: StudySpec, config: FineTuneConfig) -> Split:
    """Return the split of the study's table that a trial with `config` trains on. Raises ManifestError."""
    manifest = read_manifest(
        Path(spec.data), num_classes=config.num_classes, classes=config.classes
    )
    return split_of(manifest, config)


def measure_pass(config: FineTuneConfig, threads: int) -> Pass:
    """Return seconds and GiB that a volume takes in training and in scoring on CPUs. Runs in a separate process."""
    import torch

    from trainables.network.model import configured_network

    torch.set_num_threads(threads)
    network = configured_network(config)
    optimiser = torch.optim.Adam(network.parameters())
    volumes = torch.randn(PROBE_VOLUMES, config.in_channels, *config.volume_shape)
    network.eval()
    with torch.no_grad():
        network(volumes[:1])
    fixed = peak_resident_gib()
    trained, scored = [], []
    for _ in range(PASSES):
        began = time.perf_counter()
        network.eval()
        with torch.no_grad():
            network(volumes)
        scored.append(time.perf_counter() - began)
        began = time.perf_counter()
        network.train()
        network(volumes).float().square().mean().backward()
        optimiser.step()
        trained.append(time.perf_counter() - began)
        if trained[-1] > SLOW_S:
            break
    train_s, score_s = min(trained) / PROBE_VOLUMES, min(scored) / PROBE_VOLUMES
    share = max(0.0, peak_resident_gib() - fixed) / PROBE_VOLUMES
    return Pass(train_s, score_s, fixed, share)


# Before a study is queued ---------------------------------------------------------------------------------------------


def measure(spec: StudySpec) -> dict[str, Any]:
    """Return the seconds per epoch of the study's heaviest trial on this machine, and how many trials it holds at once.

    Raises ManifestError for the table, and SpecError for trials of several processes.
    """
    config = heaviest(spec)
    if (spec.ranks or 1) > 1 or (
        isinstance(spec.gpus_per_trial, float) and spec.gpus_per_trial > 1
    ):
        raise SpecError("only trials of one process can be measured: set ranks=1 and gpus_per_trial=1 or less")  # fmt: skip
    split = split_in(spec, config)
    gpus = mps.visible_gpus() if spec.gpus_per_trial != 0 else []
    if spec.gpus_per_trial not in (None, 0) and not gpus:
        raise SpecError(
            f"gpus_per_trial={spec.gpus_per_trial}: this machine has no GPU; leave it out, or set 0"
        )
    if gpus:
        keep_kernels(Path(spec.cache or default_cache()))
        measured = measure_epochs(config, split, "cuda")
        at_once, device, trial_gib = len(gpus), gpus[0].name, None
    else:
        measured = measure_pass(config, spec.cpus_per_rank)
        at_once, device = max(1, usable_cpus() // spec.cpus_per_rank), "CPU"
        trial_gib = measured.trial_gib(config)
    return {
        "epoch_s": epoch_seconds(config, split, measured),
        "train": len(split.train),
        "val": len(split.val),
        "at_once": at_once,
        "device": device,
        "threads": spec.cpus_per_rank,
        "trial_gib": trial_gib,
    }


def measure_epochs(config: FineTuneConfig, split: Split, device: str) -> Pass:
    """Return seconds per volume in training and in scoring, of the fastest of a few short epochs over random volumes.

    Memory is not measured.
    """
    from trainables.finetune import finetune

    step = config.batch_size * config.gradient_accumulation_steps
    train = max(config.num_classes, min(len(split.train), STEPS * step))
    val = max(config.num_classes, min(len(split.val), VALIDATION))
    one = np.random.default_rng(0).standard_normal((config.in_channels, *config.volume_shape))
    volumes = np.broadcast_to(one.astype(np.float16), (train + val, *one.shape))
    labels = np.arange(train + val) % config.num_classes
    cohort, part = cohort_in_memory(volumes, labels, config, train)
    changed = {
        "epochs": EPOCHS,
        "pretrained_path": None,
        "train_auc_volumes": 0,
        "warmup_epochs": 0.0,
        "freeze_backbone_epochs": 0,
        "unfreeze_stage_epochs": 0,
    }
    short = config.model_copy(update=changed)
    found = [result.metrics for result in finetune(short, cohort, part, device=device)]
    return Pass(
        min(row["train_s"] for row in found) / train,
        min(row["validation_s"] for row in found) / (VALIDATED * val),
        0.0,
        0.0,
    )


def main(seconds: int) -> int:
    """Measure the study on stdin; returns the exit code, 1 where the user can mend the problem."""
    signal.alarm(seconds)
    settle_user()
    try:
        found = measure(build_spec(json.loads(sys.stdin.read())))
    except (ManifestError, SpecError) as error:
        print(json.dumps({"problems": error.problems}))
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
