"""`medtune bench efficiency`: the results of random search, plain Ray Tune and medtune in the same time.

All sides train the very same runs of ours on the same cohort, as many at a time, so that a minute buys the same work
(`medtune bench search` measures the gain of the training itself); they differ in the runs chosen and their length:

    random     configurations at random, each trained to its end; the best 3-epoch median wins
    plain      Ray's OptunaSearch and ASHAScheduler as they come, on the epoch's AUC; Ray's own best result wins
    medtune    as it comes: its model with the prior, its policy and diagnosis, its objective

Each side's clock runs from the start of its process to the budget's end, start-up included. A search measures
its winner on the same rows that it chose by; so all winners, and the documented settings, are run again together
with new seeds and on other folds, and compared by that.

Searches run one after the other on all GPUs, or, of `at_once` repetitions at a time, all together: each repetition on one
GPU, which its sides share, so that none has it better than the others. Repetitions of an earlier result are kept: a
comparison can be made in several sittings.
"""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from rich.console import Console
from rich.table import Table

from search_spaces.fixes import documented_after
from search_spaces.written import space_from
from trainables.checkpoints import without_nonfinite
from trainables.config import FineTuneConfig, Scalar, build_config
from trainables.data.manifest import read_manifest
from trainables.data.scans import Recipe
from trainables.data.storage import absolute
from trainables.data.volumes import prepare_cohort
from trainables.diagnosis import VERDICTS
from trainables.machine.safe_path import python
from tune_app.bench.search import machine, plain_searcher
from tune_app.compare.ablation import DECIDED, ablation_spec
from tune_app.driver.disk import GIB, Budget, file_sizes
from tune_app.results.effects import COLLAPSES
from tune_app.results.loading import load_study
from tune_app.results.study import Study
from tune_app.results.tables import plain_table
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.prior import Prior, prior_text

SIDES = ("random", "plain", "medtune")
MANY = 10_000
"""Trials a search may ask for: time ends it."""
LEAVING_S = 120.0
"""Seconds a search may take to end when its time is over."""
CONFIRMING_SEED = 1_000
"""First seed of the confirmation; the searches run with seeds of their own below it."""


def bench_efficiency(
    table: Path,
    folder: Path,
    *,
    seconds: float,
    repetitions: int = 3,
    at_once: int | None = None,
    epochs: int = 30,
    space: str | Mapping[str, Any] = "documented",
    config: Mapping[str, Any],
    gpus_per_trial: float | None = None,
    max_concurrent: int | None = None,
    folds: str = "all",
    seeds: int = 1,
    sides: Iterable[str] = SIDES,
    prior: Prior | None = None,
    earlier: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
    record: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Return {"machine", "seconds", ..., "searches": [...], "documented": [AUC of each confirming run], "paired": [...]}.

    A search: side, repetition, seconds, trials, epochs (trained in all), claimed (its winner's own value), overrides, and
    after the confirmation `confirmed`, the best 3-epoch median of validation AUC of each run of its winner. `record` is given
    the result so far after each search. `paired`: medtune's gain over each other side, by repetition. `prior`: of medtune's
    model in place of the shipped one, which a cohort that it was learned from must not be compared with. `earlier`: a result
    of the same comparison, whose repetitions are not searched again. Empty `folds` confirm nothing yet; a later call confirms
    all that is not.

    Writes below `folder`; raises SpecError for unknown sides, for an `earlier` result of another comparison, and for a budget
    in which a side has not come to a single score.
    """
    asked = list(dict.fromkeys(sides))
    if unknown := sorted(set(asked) - set(SIDES)):
        raise SpecError(f"sides {', '.join(unknown)}: there are {', '.join(SIDES)}")
    folder.mkdir(parents=True, exist_ok=True)
    shared = build_config({**config, "epochs": epochs})
    manifest = read_manifest(table, num_classes=shared.num_classes, classes=shared.classes)
    # Before any clock, for all sides
    prepared = prepare_cohort(manifest, Recipe.from_config(shared), folder / "cache")
    common: dict[str, Any] = {
        "data": absolute(table),
        "space": space,
        "config": {**config, "epochs": epochs},
        "gpus_per_trial": gpus_per_trial,
        "max_concurrent": max_concurrent,
        "cache": absolute(folder / "cache"),
        "disk_budget_gib": _disk_gib(shared, max_concurrent),
        "keep_best": 1,
    }
    result: dict[str, Any] = {
        "machine": machine("torch", "ray", "optuna", "monai"),
        **common,
        "seconds": seconds,
        "at_once": at_once,
        "folds": folds,
        "seeds": seeds,
        "prior": True if prior is None else prior.provenance,
        "searches": [],
        "documented": [],
    }
    there = _go_on(result, earlier, asked)
    place = Path(tempfile.mkdtemp(prefix="sitting-", dir=folder))
    searched = _Searches(result, common, prior, str(prepared), place, asked, seconds, say, record)
    missing = [number for number in range(repetitions) if number not in there]
    _in_waves(searched.search, asked, missing, at_once)
    if folds:
        _confirm(result, table, place, common)
    result["paired"] = paired_gains(result["searches"])
    finite: dict[str, Any] = without_nonfinite(result)
    record(finite)
    return finite


OF_A_SITTING = ("machine", "cache", "at_once", "folds", "paired", "searches", "documented")
"""Entries of a result that may differ between sittings of one comparison, or that they add to."""


def _go_on(result: dict[str, Any], earlier: Mapping[str, Any] | None, sides: list[str]) -> set[int]:
    """Put the whole repetitions of `earlier` into `result`; returns their numbers."""
    if earlier is None:
        return set()
    _refuse_another(result, earlier)
    sides_of: dict[int, set[str]] = {}
    for search in earlier["searches"]:
        sides_of.setdefault(search["repetition"], set()).add(search["side"])
    there = {number for number, found in sides_of.items() if found >= set(sides)}
    result["searches"] = [s for s in earlier["searches"] if s["repetition"] in there]
    result["documented"] = list(earlier["documented"])
    return there


def _refuse_another(result: dict[str, Any], earlier: Mapping[str, Any]) -> None:
    """Raise SpecError for an `earlier` result of another comparison; confirm `result` on the folds of an earlier one."""
    asked = json.loads(json.dumps(result))
    differ = [
        f"{name} {earlier.get(name)!r}, here {value!r}"
        for name, value in asked.items()
        if name not in OF_A_SITTING and earlier.get(name) != value
    ]
    if any(search["confirmed"] for search in earlier["searches"]):
        result["folds"] = result["folds"] or earlier["folds"]
        if result["folds"] != earlier["folds"]:
            differ.append(f"folds {earlier['folds']!r}, here {result['folds']!r}")
    if differ:
        raise SpecError(["the earlier result is of another comparison:", *differ])


def paired_gains(searches: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return medtune's mean gain over each other side, with Student's 95 % interval over repetitions: {"over", "pairs",
    "won", "mean", "low", "high"}; the sides of a repetition share its seed and its time. A single pair has no interval.
    """
    from scipy.stats import ttest_1samp

    reached = {
        (search["side"], search["repetition"]): float(np.mean(search["confirmed"]))
        for search in searches
        if search["confirmed"]
    }
    gains = []
    for other in SIDES[:-1]:
        differences = [
            value - reached[other, repetition]
            for (side, repetition), value in sorted(reached.items())
            if side == "medtune" and (other, repetition) in reached
        ]
        if not differences:
            continue
        low = high = math.nan
        if len(differences) > 1:
            low, high = map(float, ttest_1samp(differences, 0.0).confidence_interval())
        won = float(np.mean([(gain > 0) + 0.5 * (gain == 0) for gain in differences]))
        gain = {"over": other, "pairs": len(differences), "won": won}
        gains.append(gain | {"mean": float(np.mean(differences)), "low": low, "high": high})
    return gains


@dataclass
class _Searches:
    """The searches of all sides, each kept in `result` as soon as it has ended."""

    result: dict[str, Any]
    common: dict[str, Any]
    prior: Prior | None
    cohort: str
    folder: Path
    sides: list[str]
    seconds: float
    say: Callable[[str], None]
    record: Callable[[dict[str, Any]], object]
    keeping: threading.Lock = field(default_factory=threading.Lock)

    def search(self, side: str, repetition: int, environment: Mapping[str, str] | None) -> None:
        place = self.folder / f"{side}-{repetition}"
        if side == "plain":
            found = _plain(
                {**self.common, "cohort": self.cohort}, place, self.seconds, repetition, environment
            )
        else:
            found = _study(
                side, self.common, place, self.seconds, repetition, environment, self.prior
            )
        with self.keeping:
            self.result["searches"].append(
                {"side": side, "repetition": repetition, **found, "confirmed": []}
            )
            self.result["searches"].sort(
                key=lambda search: (search["repetition"], self.sides.index(search["side"]))
            )
            self.say(
                f"{side} {repetition}: {found['trials']} trials, {found['epochs']} epochs in {found['seconds']:.0f} s, "
                f"its best run claims {found['claimed']:.3f}"
            )
            self.record(without_nonfinite(self.result))


def _in_waves(
    search: Callable[[str, int, Mapping[str, str] | None], None],
    sides: list[str],
    repetitions: list[int],
    at_once: int | None,
) -> None:
    """Search with every side, `at_once` repetitions of all sides at a time on GPUs of their own, or one after the other.

    A search that fails leaves the others alone: its error is raised at the end.
    """
    failed: list[BaseException] = []
    gpus = _visible_gpus() if at_once else []
    together = at_once or 1
    for first in range(0, len(repetitions), together):
        wave = repetitions[first : first + together]
        with ThreadPoolExecutor(len(wave) * len(sides) if at_once else 1) as pool:
            begun = [
                pool.submit(search, side, number, _sharing(gpus, number))
                for number, side in itertools.product(wave, sides)
            ]
        failed += [error for one in begun if (error := one.exception()) is not None]
    if failed:
        raise failed[0]


def _disk_gib(config: FineTuneConfig, at_a_time: int | None) -> float | None:
    """Twice the GiB on disk that a running search needs; its weights are not read. None for an unknown `at_a_time`."""
    if at_a_time is None:
        return None
    checkpoint, best = file_sizes(config)
    return (
        2
        * Budget(total=0, checkpoint=checkpoint, best=best, concurrent=at_a_time, keep_best=1).least
        / GIB
    )


def _visible_gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES calls the GPUs that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        [str(index) for index in range(torch.cuda.device_count())]
        if named is None
        else named.split(",")
    )


def _sharing(gpus: list[str], repetition: int) -> dict[str, str] | None:
    """Return the environment of searches that share a machine, on one of `gpus`; None, which is ours, without any."""
    if not gpus:
        return None
    # Every Ray would start a worker a core before it trains anything
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": gpus[repetition % len(gpus)],
        "RAY_prestart_worker_first_driver": "0",
    }


def _study(
    side: str,
    common: Mapping[str, Any],
    place: Path,
    seconds: float,
    repetition: int,
    environment: Mapping[str, str] | None,
    prior: Prior | None,
) -> dict[str, Any]:
    """Run a study of ours until its time is over."""
    fields: dict[str, Any] = {**common, "trials": MANY, "seed": repetition}
    fields["config"] = {**common["config"], "seed": repetition}
    if side == "random":
        ignored = dict.fromkeys(VERDICTS, "ignore")
        fields |= {
            "sampler": "random",
            "warm_start": [],
            "policy": {"halving": False, "actions": ignored},
        }
    place.mkdir(parents=True)
    if side == "medtune" and prior is not None:
        (place / "prior.json").write_text(prior_text(prior))
        fields["prior"] = "prior.json"
    (place / "study.yaml").write_text(
        yaml.safe_dump({k: v for k, v in fields.items() if v is not None})
    )
    study_yaml, out = str(place / "study.yaml"), str(place / "study")
    command = python("-m", "tune_app.cli", "run", study_yaml, "--out", out)
    spent = _until(seconds, command, place / "console.log", environment)
    study = load_study(place / "study")
    winner = _winner(study)
    _drop_weights(study)
    return {
        "seconds": spent,
        "trials": len(study.trials_full),
        "epochs": len(study.epochs),
        "claimed": float(study.trials_full.set_index("trial")["objective"][winner]),
        "overrides": _without(["seed"], study.record(winner)["overrides"]),
    }


def _until(
    seconds: float, command: list[str], log: Path, environment: Mapping[str, str] | None = None
) -> float:
    """Run a command until it ends or its time is over, when it gets Ctrl-C; returns the seconds until then."""
    began = time.perf_counter()
    with log.open("w") as told:
        process = subprocess.Popen(
            command, stdout=told, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            if process.wait(seconds):
                raise SpecError(
                    f"the search ended with {process.returncode} before its time was over: see {log}"
                )
            return time.perf_counter() - began
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            spent = time.perf_counter() - began
        try:
            process.wait(LEAVING_S)
        finally:
            if process.poll() is None:
                process.kill()
    return spent


def _drop_weights(study: Study) -> None:
    """Remove the weights of a study that has ended: nine searches of ResNet-50 fill a disk."""
    for trial in study.trials_full["trial"]:
        files = StudyFiles(study.path).trial(trial)
        for weights in (files.checkpoint, files.best):
            weights.unlink(missing_ok=True)


def _winner(study: Study) -> str:
    """The trial that a user would take: best of the whole and sound ones, else of all that have a value."""
    valued = study.trials_full[study.trials_full["objective"].notna()]
    sound = valued[(valued["state"] == "completed") & ~valued["verdict"].isin(COLLAPSES)]
    if valued.empty:
        raise SpecError(f"{study.path}: no trial has a value yet: give the searches more seconds")
    best = (sound if len(sound) else valued).sort_values(
        ["objective", "number"], ascending=[False, True]
    )
    return str(best["trial"].iloc[0])


# Plain -----------------------------------------------------------------------------------------------------------------


def _plain(
    common: Mapping[str, Any],
    place: Path,
    seconds: float,
    repetition: int,
    environment: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Run plain Ray Tune in a separate process, which exits when its time is over."""
    place.mkdir(parents=True)
    given = {**common, "trials": MANY, "seed": repetition, "place": absolute(place)}
    (place / "given.json").write_text(json.dumps(given))
    began = time.perf_counter()
    with (place / "console.log").open("w") as told:
        until = time.monotonic() + seconds  # of the machine, not of the process
        given_json = str(place / "given.json")
        command = python("-m", "tune_app.bench.efficiency", given_json, str(until))
        done = subprocess.run(
            command,
            stdout=told,
            stderr=subprocess.STDOUT,
            timeout=seconds + 300,
            check=False,
            env=environment,
        )
    if done.returncode:
        last = (place / "console.log").read_text().strip().rpartition("\n")[2]
        raise SpecError(
            f"plain Ray Tune ended with {done.returncode} ({last}): see {place / 'console.log'}"
        )
    found: dict[str, Any] = json.loads((place / "found.json").read_text())
    return {"seconds": min(seconds, time.perf_counter() - began), **found}


def _run_plain(given: Mapping[str, Any], until: float) -> None:
    """Search until `until` (on the monotonic clock); write the winner to found.json."""
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import ConcurrencyLimiter

    from tune_app.driver.local_ray import own_ray

    settings = given["config"]
    space = space_from(given["space"], settings)
    place = Path(given["place"])
    with own_ray(log_to_driver=False, logging_level="ERROR"):  # tries again, as a study does
        resources = ray.cluster_resources()
        gpus = (given["gpus_per_trial"] or 1.0) if resources.get("GPU") else 0.0
        at_once = int(resources["GPU"] / gpus if gpus else resources["CPU"])
        at_once = min(at_once, given["max_concurrent"] or at_once)
        reported: list[str] = []

        class Watch(tune.Callback):  # type: ignore[misc]
            def on_trial_result(
                self, iteration: int, trials: list[Any], trial: Any, result: Any, **_: Any
            ) -> None:
                reported.append(trial.trial_id)

        searcher = plain_searcher(space, given["seed"])
        results = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_plain_trial, given=dict(given)), {"CPU": 1, "GPU": gpus}
            ),
            tune_config=tune.TuneConfig(
                search_alg=ConcurrencyLimiter(searcher, max_concurrent=at_once),
                scheduler=ASHAScheduler(
                    time_attr="epoch", metric="val_auc", mode="max", max_t=settings["epochs"]
                ),
                num_samples=given["trials"],
                reuse_actors=True,
                time_budget_s=max(1.0, until - time.monotonic()),
            ),
            run_config=tune.RunConfig(
                storage_path=str(place), name="plain", callbacks=[Watch()], verbose=0
            ),
        ).fit()
        if not reported:
            sys.exit("no trial has a value yet: give the searches more seconds")
        best = results.get_best_result("val_auc", "max")
        found = {
            "trials": len(results),
            "epochs": len(reported),
            "claimed": float(best.metrics["val_auc"]),
            "overrides": space.sample_to_overrides(best.config, settings["epochs"]),
        }
    (place / "found.json").write_text(json.dumps(found))


def _plain_trial(drawn: dict[str, Any], given: Mapping[str, Any]) -> None:
    """One run of ours as a careful script would drive it, in the thread that ours have."""
    from trainables.training_thread import in_training_thread

    in_training_thread(_report_epochs, drawn, given)


def _report_epochs(drawn: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Report each epoch's AUC, nothing else."""
    import torch
    from ray import tune

    from trainables.finetune import finetune
    from trainables.saved_run import open_inputs

    settings = given["config"]
    overrides = space_from(given["space"], settings).sample_to_overrides(drawn, settings["epochs"])
    config = build_config({**settings, **overrides, "seed": given["seed"]})
    torch.set_num_threads(1)
    cohort, split = open_inputs(config, given["data"], given["cohort"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for result in finetune(config, cohort, split, device=device):
        auc = result.metrics["val_auc"]
        tune.report({"epoch": result.epoch, "val_auc": auc if math.isfinite(auc) else 0.0})


# Confirmation ----------------------------------------------------------------------------------------------------------


def _confirm(
    result: dict[str, Any],
    table: Path,
    folder: Path,
    common: Mapping[str, Any],
) -> None:
    """Run all winners that were not with the same new seeds on the same folds; fill in the values they reach.

    The documented settings are one of them.

    `max_concurrent` is of the searches: here nothing is timed.
    """
    from tune_app.driver.run import run_study

    config = _without(DECIDED, common["config"])
    new = {
        f"{search['side']}-{search['repetition']}": search
        for search in result["searches"]
        if not search["confirmed"]
    }
    chosen: dict[str, dict[str, Scalar]] = {}
    if not result["documented"]:
        chosen["documented"] = documented_after(config["epochs"])
    chosen |= {name: search["overrides"] for name, search in new.items()}
    decided = {*config, *DECIDED}
    spec = ablation_spec(
        table,
        {name: _without(decided, overrides) for name, overrides in chosen.items()},
        seeds=result["seeds"],
        first_seed=CONFIRMING_SEED,
        folds=result["folds"],
        config=config,
        gpus_per_trial=common["gpus_per_trial"],
        cache=common["cache"],
    )
    with (folder / "confirm.log").open("w") as log:
        console = Console(file=log, width=80)
        run_study(spec, folder / "confirm", console=console, notes=console)
    confirmed = load_study(folder / "confirm")
    _drop_weights(confirmed)
    if "documented" in chosen:
        result["documented"] = _values(confirmed, "documented")
    for name, search in new.items():
        search["confirmed"] = _values(confirmed, name)


def _without(names: Collection[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _values(confirmed: Study, variant: str) -> list[float]:
    runs = confirmed.trials_full[confirmed.trials_full["variant"] == variant]
    if not (runs["state"] == "completed").all():
        return []  # a part of its folds is no mean to compare; a later call confirms it
    return [float(value) for value in runs["objective"].dropna()]


def efficiency_table(result: Mapping[str, Any]) -> Table:
    """Return what each side's time bought: a row a side, means over its repetitions with the smallest and largest."""
    numbers = ("searches", "s each", "trials", "epochs", "claimed", "confirmed")
    table = plain_table("side", *numbers, text=["side"])
    for side in SIDES:
        rows = [row for row in result["searches"] if row["side"] == side]
        if rows:
            means = pd.DataFrame(rows)[["seconds", "trials", "epochs"]].mean()
            table.add_row(
                side,
                str(len(rows)),
                *(f"{mean:.0f}" for mean in means),
                _range([row["claimed"] for row in rows]),
                _range([float(np.mean(row["confirmed"])) for row in rows if row["confirmed"]]),
            )
    if result["documented"]:
        table.add_row(
            "documented", "-", "-", "-", "-", "-", _range([float(np.mean(result["documented"]))])
        )
    return table


def gain_lines(result: Mapping[str, Any]) -> list[str]:
    """Return a line for each side that medtune is compared with, in thousandths of AUC."""
    return [
        f"medtune over {gain['over']}: {1000 * gain['mean']:+.0f} thousandths "
        + (
            ""
            if gain["low"] is None
            else f"[{1000 * gain['low']:+.0f}, {1000 * gain['high']:+.0f}] "
        )
        + f"in {gain['pairs']} pairs, {gain['won']:.0%} won"
        for gain in result["paired"]
    ]


def _range(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    _run_plain(json.loads(Path(sys.argv[1]).read_text()), float(sys.argv[2]))
