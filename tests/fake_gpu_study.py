"""`medtune` on a machine that seems to have one GPU: trials share it under the programs of `fake_gpu`, and train on the CPU.

    python fake_gpu_study.py tune_app.cli run study.yaml ...

FAKE_FAULT names a folder: a trial that finds a file of its name there meets a fault of the GPU in its second epoch, once.
"""

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class FaultError(RuntimeError):
    """What CUDA would raise."""


def trial_on_fake_gpu(trial: dict[str, Any], setting: Any) -> None:
    """Run a trial that was given a share of the GPU."""
    from trainables import ray_trainable, saved_run

    patched: Any = ray_trainable

    whole = getattr(saved_run.saved_run, "whole", saved_run.saved_run)

    @functools.wraps(whole)
    def with_fault(*arguments: Any, **options: Any) -> Iterator[dict[str, Any]]:
        for row in whole(*arguments, **options):
            yield row
            mark = Path(os.environ.get("FAKE_FAULT", "/nowhere")) / trial["trial"]
            if row["epoch"] == 2 and mark.exists():
                mark.unlink()
                raise FaultError("CUDA error: an illegal memory access was encountered")

    with_fault.whole = whole  # type: ignore[attr-defined]
    saved_run.SAVING_PAUSE = 0  # a checkpoint each epoch
    saved_run.saved_run = with_fault
    patched.device_of = lambda setting: "cpu"
    patched.wait_for_device_memory = lambda share: None
    patched.gpu_is_lost = lambda: isinstance(sys.exc_info()[1], FaultError)
    ray_trainable.run_trial(trial, setting)


def main() -> None:
    """Run medtune's command line with a Ray that counts one GPU."""
    import ray

    from tune_app.cli import main as command_line
    from tune_app.driver import run

    ray.init = functools.partial(ray.init, num_gpus=1)
    vars(run)["run_trial"] = trial_on_fake_gpu
    command_line()


if __name__ == "__main__":
    del sys.argv[1]  # the module that this one replaces, by whose name a driver is recognised
    import fake_gpu_study  # trials are sent by the module's name

    fake_gpu_study.main()
