"""`medtune bench search`: the same search by medtune, and by plain Ray Tune (`OptunaSearch`, ASHA) over the plain loop.

Both sides sample the same space with the same sampler, train whole runs of the same configurations on the same rows, and
stop by the same rungs (medtune's policy with its additions switched off, which then decides as Ray's ASHA does). The
plain side does the same as a careful script: `tune_app.bench.plain_loop`, MONAI's CacheDataset decoding the scans
once per trial, MONAI's random transforms in loader workers, one trial per GPU, Ray Tune otherwise as shipped. All waiting time of
a user is counted: the start of Ray, of processes and of CUDA, reading the scans, checkpoints where a side writes them.
"""

import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from search_spaces.space import Space
from search_spaces.written import space_from
from trainables import installed_version
from trainables.checkpoints import without_nonfinite
from trainables.config import build_config
from trainables.data.storage import absolute
from tune_app.results.loading import load_study
from tune_app.results.tables import plain_table
from tune_app.study.errors import SpecError
from tune_app.study.spec import build_spec

SPACE = "documented"
SIDES = ("plain", "medtune")
LOADER_WORKERS = 8


def bench_search(
    table: Path,
    folder: Path,
    *,
    trials: int = 16,
    epochs: int = 27,
    grace_epochs: int = 3,
    reduction_factor: float = 3.0,
    config: Mapping[str, Any],
    gpu: bool = True,
    gpus_per_trial: float | str | None = None,
    mps: str = "auto",
    cache: Path | None = None,
    sides: Iterable[str] = SIDES,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    record: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Return {"machine", "trials", ..., "plain": side, "medtune": side, "ratio"}; sides that were not asked for are None.

    A side: seconds, ended (trials), trials_per_hour, epochs (trained in all), s_per_epoch, first_rung_auc (mean over all
    trials of the validation AUC at the first rung, where nothing has been stopped yet), best_auc, gpu_busy (share of the
    time with a kernel running, mean over the visible GPUs as nvidia-smi reports it each second; None without one); of
    medtune also start_s (until the first epoch began) and the values from `slots` about its trials. `ratio` is of trials an hour.
    `gpus_per_trial`, `mps` and `cache` (None: an empty one) are medtune's; the plain side has a GPU a trial. `record` is given the result so far
    whenever a trial of the plain side has ended. Writes below `folder`.
    """
    sides = set(sides)
    if unknown := sorted(sides - set(SIDES)):
        raise SpecError(f"sides {', '.join(unknown)}: there are {', '.join(SIDES)}")
    settings = {**config, "epochs": epochs}
    how: dict[str, Any] = {"gpus_per_trial": gpus_per_trial, "mps": mps}
    search = {
        "trials": trials, "epochs": epochs,
        "grace_epochs": grace_epochs, "reduction_factor": reduction_factor,
    }  # fmt: skip
    result: dict[str, Any] = {
        "machine": machine("torch", "ray", "optuna", "monai"),
        **search,
        "space": SPACE,
        "config": dict(settings),
        "seed": seed,
        "plain": None,
        "medtune": None,
        "ratio": None,
    }
    # Plain first: a study sets variables for Ray.
    for side in [side for side in SIDES if side in sides]:
        started = time.perf_counter()

        def keep(
            runs: list[list[float]],
            side: str = side,
            started: float = started,
            more: Mapping[str, Any] = {},
        ) -> None:
            result[side] = _side(runs, grace_epochs, time.perf_counter() - started) | dict(more)
            if result["plain"] and result["medtune"]:
                result["ratio"] = (
                    result["medtune"]["trials_per_hour"] / result["plain"]["trials_per_hour"]
                )
            record(result)

        place = folder / side
        more: Mapping[str, Any] = {}
        with gpus_watched() as busy:
            if side == "plain":
                runs = _plain(table, place, settings, search, gpu=gpu, seed=seed, ended=keep)
            else:
                how["cache"] = str(cache or place / "cache")
                runs, more = _medtune(table, place, settings, search, how=how, seed=seed)
        keep(runs, more={"gpu_busy": statistics.fmean(busy) if busy else None, **more})
        measured = result[side]
        say(
            f"{side}: {len(runs)} trials in {measured['seconds']:.0f} s, {measured['trials_per_hour']:.0f} an hour, "
            f"{measured['epochs']} epochs"
        )
    return result


def machine(*packages: str) -> dict[str, Any]:
    """Return the machine of a measurement: the processor's name, and the versions of Python and of `packages`."""
    return {
        "name": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **{name: installed_version(name) for name in packages},
    }


@contextmanager
def gpus_watched() -> Iterator[list[float]]:
    """Give a list that holds, when the block has ended, a share of 0 to 1 for each GPU and second; empty without GPUs.

    GPUs that CUDA_VISIBLE_DEVICES hides belong to others.
    """
    shares: list[float] = []
    program = shutil.which("nvidia-smi")
    if program is None:
        yield shares
        return
    command = [
        program,
        "--query-gpu=utilization.gpu",
        "--format=csv,noheader,nounits",
        "--loop-ms=1000",
    ]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible}")
    watching = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield shares
    finally:
        watching.terminate()
        said, _ = watching.communicate()
        shares += [float(line) / 100 for line in said.splitlines() if line.strip().isdigit()]


def slots(epochs: pd.DataFrame) -> dict[str, float | int | None]:
    """Return how trials shared their machine, by the rows of a study's `epochs`.

    at_once: the most trials at a time. training_share: share of the slots' time, from the first epoch's begin to the last
    one's end, that was spent in epochs. between_s: median seconds from a trial's last row to the begin of the first
    epoch of the one that followed in its slot; None where none followed.
    """
    by_trial = epochs.assign(begin=epochs["time"] - epochs["epoch_s"]).groupby("trial")
    begins, ends = sorted(by_trial["begin"].min()), sorted(by_trial["time"].max())
    at_once = max(sum(begin < end for begin in begins) - number for number, end in enumerate(ends))
    # A trial takes the slot that has been free the longest
    between = [begin - end for begin, end in zip(begins[at_once:], ends, strict=False)]
    return {
        "at_once": at_once,
        "training_share": float(epochs["epoch_s"].sum()) / (at_once * (ends[-1] - begins[0])),
        "between_s": statistics.median(between) if between else None,
    }


def _side(runs: list[list[float]], grace_epochs: int, seconds: float) -> dict[str, Any]:
    """`runs`: the validation AUC of each epoch of each ended trial."""
    at_rung = [run[grace_epochs - 1] for run in runs if len(run) >= grace_epochs]
    known = [value for run in runs for value in run if math.isfinite(value)]
    epochs = sum(len(run) for run in runs)
    side = {
        "seconds": seconds,
        "ended": len(runs),
        "trials_per_hour": 3600 * len(runs) / seconds,
        "epochs": epochs,
        "s_per_epoch": seconds / max(1, epochs),
        "first_rung_auc": statistics.fmean(at_rung) if at_rung else math.nan,
        "first_rung_auc_sd": statistics.stdev(at_rung) if len(at_rung) > 1 else math.nan,
        "best_auc": max(known, default=math.nan),
        "runs": runs,
    }
    finite: dict[str, Any] = without_nonfinite(side)
    return finite


def search_table(result: Mapping[str, Any]) -> Table:
    """Return the results of the sides as a Rich table."""
    numbers = "trials, seconds, trials/hour, epochs, s an epoch, AUC at first rung, best AUC"
    table = plain_table("side", *numbers.split(", "), text=["side"])
    for side in SIDES:
        if (row := result[side]) is not None:
            table.add_row(
                side,
                str(row["ended"]),
                f"{row['seconds']:.0f}",
                f"{row['trials_per_hour']:.0f}",
                str(row["epochs"]),
                f"{row['s_per_epoch']:.2f}",
                f"{_auc(row['first_rung_auc'])} +- {_auc(row['first_rung_auc_sd'])}",
                _auc(row["best_auc"]),
            )
    told = []
    if result["ratio"] is not None:
        told.append(f"medtune: {result['ratio']:.1f} times the trials an hour")
    if (ours := result["medtune"]) is not None:
        between = (
            "" if ours["between_s"] is None else f", {ours['between_s']:.1f} s between two trials"
        )
        told.append(
            f"{ours['at_once']} trials at a time, {ours['training_share']:.0%} of their time in epochs{between}"
        )
        told.append(f"the first epoch began after {ours['start_s']:.0f} s")
    told += [
        f"GPUs of {side} busy {row['gpu_busy']:.0%}"
        for side in SIDES
        if (row := result[side]) is not None and row.get("gpu_busy") is not None
    ]
    table.caption = "\n".join(told)
    return table


def _auc(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# medtune ---------------------------------------------------------------------------------------------------------------


def _medtune(
    table: Path,
    folder: Path,
    settings: Mapping[str, Any],
    search: Mapping[str, Any],
    *,
    how: Mapping[str, Any],
    seed: int,
) -> tuple[list[list[float]], dict[str, float | int | None]]:
    """Run the study; returns the validation AUC of each epoch of each trial, and the values from `slots` about them."""
    from trainables.diagnosis import VERDICTS
    from tune_app.driver.run import run_study

    spec = build_spec(
        {
            "data": str(table),
            "space": SPACE,
            "trials": search["trials"],
            "config": dict(settings),
            "seed": seed,
            "warm_start": (),
            **how,
            "policy": {
                "grace_epochs": search["grace_epochs"],
                "reduction_factor": search["reduction_factor"],
                "judge_from": 0,
                "compared": "current",
                "drw_guard_epochs": 0,
                "finalists": 0,
                "actions": dict.fromkeys(VERDICTS, "ignore"),
            },
        }
    )
    folder.mkdir(parents=True)
    started = time.time()
    with (folder / "console.log").open("w") as log:
        console = Console(file=log, width=80)
        outcome = run_study(spec, folder / "study", console=console, notes=console)
    assert not outcome.exit_code, f"the study ended with {outcome.states}: see {folder}"
    epochs = load_study(folder / "study").epochs
    start_s = float((epochs["time"] - epochs["epoch_s"]).min()) - started
    runs = [list(map(float, rows["val_auc"])) for _, rows in epochs.groupby("trial")]
    return runs, {"start_s": start_s, **slots(epochs)}


# Plain -----------------------------------------------------------------------------------------------------------------


def _plain(
    table: Path,
    folder: Path,
    settings: Mapping[str, Any],
    search: Mapping[str, Any],
    *,
    gpu: bool,
    seed: int,
    ended: Callable[[list[list[float]]], None],
) -> list[list[float]]:
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    from tune_app.driver.local_ray import own_ray

    runs: list[list[float]] = []
    going: dict[str, list[float]] = {}

    class Watch(tune.Callback):  # type: ignore[misc]
        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: Any, **_: Any
        ) -> None:
            going.setdefault(trial.trial_id, []).append(float(result["val_auc"]))

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **_: Any
        ) -> None:
            runs.append(going[trial.trial_id])
            ended(runs)

    with own_ray(log_to_driver=False, logging_level="ERROR"):
        given = {"table": absolute(table), "settings": dict(settings), "gpu": gpu}
        trainable = tune.with_parameters(_plain_trial, given=given)
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"CPU": 1, "GPU": 1 if gpu else 0}),
            tune_config=tune.TuneConfig(
                search_alg=plain_searcher(space_from(SPACE, settings), seed),
                scheduler=ASHAScheduler(
                    time_attr="epoch",
                    metric="val_auc",
                    mode="max",
                    max_t=search["epochs"],
                    grace_period=search["grace_epochs"],
                    reduction_factor=search["reduction_factor"],
                ),
                num_samples=search["trials"],
                max_concurrent_trials=max(
                    1, int(ray.cluster_resources().get("GPU" if gpu else "CPU", 1))
                ),
            ),
            run_config=tune.RunConfig(
                storage_path=absolute(folder), callbacks=[Watch()], verbose=0
            ),
        )
        results = tuner.fit()
        assert not results.errors, results.errors
    return runs


def plain_searcher(space: Space, seed: int, **how: Any) -> Any:
    """Return Ray Tune's `OptunaSearch` as shipped, over the distributions of `space`; `how` are more of its arguments."""
    from ray.tune.search.optuna import OptunaSearch

    distributions = {one.name: one.distribution for one in space.parameters.values()}
    return OptunaSearch(distributions, metric="val_auc", mode="max", seed=seed, **how)


def _plain_trial(drawn: dict[str, Any], given: Mapping[str, Any]) -> None:
    """One run of the plain loop with the whole of MONAI around it."""
    import numpy as np
    import torch
    from monai.data import CacheDataset, DataLoader, Dataset
    from monai.transforms import Compose
    from ray import tune
    from sklearn.metrics import roc_auc_score

    from trainables.data.folds import split_of
    from trainables.data.manifest import read_manifest
    from tune_app.bench.plain_loop import PlainRun, monai_augmentation, monai_preparation

    overrides = space_from(SPACE, given["settings"]).sample_to_overrides(
        drawn, given["settings"]["epochs"]
    )
    config = build_config({**given["settings"], **overrides})
    manifest = read_manifest(Path(given["table"]))
    split = split_of(manifest, config)
    usual = Compose(monai_preparation(config.volume_shape))
    paths, labels = (
        manifest.rows["path"].to_numpy(),
        manifest.rows["label"].to_numpy(dtype=np.int64),
    )

    def cached(rows: Any) -> Any:
        items = [{"image": paths[row], "label": int(labels[row])} for row in rows]
        return CacheDataset(items, usual, num_workers=LOADER_WORKERS, progress=False)

    augment = monai_augmentation(config.flip_axes)
    train = Dataset(cached(split.train), lambda item: (augment(item["image"]), item["label"]))
    val = Dataset(cached(split.val), lambda item: (item["image"], item["label"]))
    workers = LOADER_WORKERS if given["gpu"] else 0
    train_loader = DataLoader(
        train, batch_size=config.batch_size, shuffle=True, drop_last=True, num_workers=workers,
        pin_memory=given["gpu"], persistent_workers=workers > 0,
    )  # fmt: skip
    val_loader = DataLoader(val, batch_size=config.batch_size, pin_memory=given["gpu"])
    updates = config.epochs * (len(train_loader) // config.gradient_accumulation_steps)
    device = torch.device("cuda" if given["gpu"] else "cpu")
    run = PlainRun(config, np.bincount(labels[split.train]), device, updates)
    for epoch in range(1, config.epochs + 1):
        run.train_epoch(train_loader, epoch)
        scores, truth = run.scores(val_loader)
        auc = roc_auc_score(truth, scores) if np.isfinite(scores).all() else math.nan
        tune.report({"epoch": epoch, "val_auc": float(auc)})
