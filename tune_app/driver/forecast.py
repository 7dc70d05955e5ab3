"""How long a study on CPUs will take, and how much memory a trial: measured on a few volumes before it starts.

On GPUs the packing measures it on the real cohort, and everywhere the first epochs do (`time_budget`). A CPU may need
hours for the first epoch of the default settings, so here a single pass gives an estimate in seconds.
"""

import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from trainables.config import FineTuneConfig
from trainables.data.folds import Split, split_of
from trainables.data.manifest import read_manifest
from trainables.machine.safe_path import safe_search
from trainables.machine.this_machine import peak_resident_gib
from tune_app.driver.packing import heaviest
from tune_app.study.presets import preset_line
from tune_app.study.spec import StudySpec

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


class Pass(NamedTuple):
    """One measured pass, per volume."""

    train_s: float
    score_s: float
    fixed_gib: float
    """Memory of the process with the network and its optimiser."""
    volume_gib: float
    """Memory of a volume between forward and backward."""


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


def span(seconds: float) -> str:
    """Return seconds in the unit that people would use."""
    for limit, unit, size in ((100.0, "s", 1.0), (6000.0, "min", 60.0), (2 * 86400.0, "h", 3600.0)):
        if seconds < limit:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 86400:.3g} days"


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
    scored = VALIDATED * len(split.val) + min(config.train_auc_volumes, len(split.train))
    epoch_s = len(split.train) * measured.train_s + scored * measured.score_s
    memory = measured.fixed_gib + config.batch_size * measured.volume_gib
    return Forecast(
        epoch_s,
        memory,
        study_s(spec.num_trials, epochs, epoch_s, concurrent),
        spec.num_trials,
        True,
    )


def forecast_on_gpus(
    spec: StudySpec, volumes_per_s: float, *, concurrent: int, epochs: float
) -> Forecast:
    """Return the forecast where each of the concurrent trials trains `volumes_per_s` volumes per second."""
    epoch_s = len(split_in(spec, heaviest(spec)).train) / volumes_per_s
    return Forecast(
        epoch_s, None, study_s(spec.num_trials, epochs, epoch_s, concurrent), spec.num_trials, False
    )


def study_s(trials: int, epochs: float, epoch_s: float, concurrent: int) -> float:
    """Return the seconds of `trials`, `concurrent` at a time; the last ones leave places empty."""
    return math.ceil(trials / concurrent) * epochs * epoch_s


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
