"""Compile kernels and load modules for the first trials while the driver prepares: a process trains a few random volumes.

On a machine where nothing was trained before, the first process takes half a minute for this, and a driver needs the GPU
for nothing until its trials start. The process reads the same files and compiles the same kernels as a trial, into the
same cache. It runs once for each kind of GPU, configuration and versions: a mark in the cache shows that it has.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from trainables import installed_version, mps
from trainables.config import FineTuneConfig, build_config
from trainables.data.folds import Split
from trainables.data.scans import Recipe
from trainables.data.volumes import Cohort
from trainables.kernel_cache import keep_kernels, kernel_folder, step_digest
from trainables.machine.safe_path import python, search_variables

END_S = 5.0
"""Seconds that the process may take to end when its study does."""


class WarmUp:
    """Runs next to the driver while the block runs, where this machine has a GPU and nothing has warmed it up before."""

    def __init__(self, config: FineTuneConfig, cache: Path, mode: mps.Mode) -> None:
        self.config, self.cache, self.mode = config, cache, mode
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        gpus = mps.visible_gpus()
        if gpus and gpus[0].compute_mode == "Default":  # else it would keep the trials out
            mark = warm_mark(self.config, self.cache, gpus[0].name)
            if not mark.exists():
                work = {
                    "config": self.config.model_dump(mode="json"),
                    "cache": str(self.cache),
                    "mode": self.mode,
                    "mark": str(mark),
                }
                self._process = subprocess.Popen(
                    python("-m", "tune_app.driver.warm_up", json.dumps(work)),
                    env=os.environ | search_variables(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
            self._process.kill()
            self._process.wait()


def warm_mark(config: FineTuneConfig, cache: Path, gpu: str) -> Path:
    """Return the file that marks the kernels of a trial of `config` as compiled on this kind of GPU."""
    versions = [installed_version(name) for name in ("medtune", "torch", "triton")]
    digest = step_digest(config, versions=versions, gpu=gpu)
    return kernel_folder(cache) / f"warm-{digest}"


def warm_up(config: FineTuneConfig, *, device: str = "cuda") -> None:
    """Train and validate one epoch of random volumes: whole steps, and a captured one."""
    from trainables.finetune import finetune

    short = config.model_copy(update={"epochs": 1, "pretrained_path": None})
    train = 5 * config.batch_size * config.gradient_accumulation_steps
    count = train + config.validation_batch_size
    rng = np.random.default_rng(0)
    shape = (count, config.in_channels, *config.volume_shape)
    volumes = rng.standard_normal(shape, dtype=np.float32).astype(np.float16)
    cohort, split = cohort_in_memory(volumes, np.arange(count) % config.num_classes, config, train)
    for _ in finetune(short, cohort, split, device=device):
        pass


def cohort_in_memory(
    volumes: np.ndarray, labels: np.ndarray, config: FineTuneConfig, train: int
) -> tuple[Cohort, Split]:
    """Return `volumes` (N, C, D, H, W), which are of no file, as a cohort of N subjects; the first `train` rows train, the others validate."""
    rows = np.arange(len(volumes))
    names = rows.astype(str)
    cohort = Cohort(
        folder=Path(),
        volumes=volumes,  # type: ignore[arg-type]
        labels=labels,
        subjects=names,
        paths=tuple(names.tolist()),
        spacings_mm=np.ones((len(rows), 3)),
        recipe=Recipe.from_config(config),
    )
    return cohort, Split(rows[:train], rows[train:], rows[:0])


def main(text: str) -> None:
    """Entry of the process: `text` is its task as JSON."""
    work: dict[str, Any] = json.loads(text)
    keep_kernels(Path(work["cache"]))
    mps.join("off" if work["mode"] == "off" else "auto")
    warm_up(build_config(work["config"]))
    mark = Path(work["mark"])
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


if __name__ == "__main__":
    main(sys.argv[1])
