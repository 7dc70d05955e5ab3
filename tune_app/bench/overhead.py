"""`medtune bench overhead`: the cost of a trial in addition to its training, here and in Ray Tune with `OptunaSearch`
as shipped.

Both sides run trials that train nothing and report the same rows, on the same Ray, as many at a time, from the same
distributions, and take turns: a machine that is busy with something else slows both. A side continues its own search
in each of its turns, so that the last turn meets as many earlier trials as a search of that size does.

Bare Ray keeps its study in memory, as `OptunaSearch` does, and stops nothing; only that it reuses actors is not as it
comes, since a process a trial would hide all else. `stripped` is bare Ray without what medtune switches off in it (its
loggers for CSV, JSON and TensorBoard, and saving the experiment every few seconds): against it, the ratio is of
medtune's additions alone. Ours is all that a study does but the training: rows and decisions on disk, a record a trial, the Optuna study in SQLite, the diagnosis. Work that a search does once
and a turn does again is not counted, of either side: taking up the study, starting Tune and the processes of the trials,
and ending them. A turn counts from the end of its first trial to the end of its last.

Wall time is a user's waiting time, and on a machine with other work mostly due to that work. The driver's own CPU time
is reported next to it: nothing else on the machine adds to it.
"""

import logging
import math
import os
import statistics
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from rich.console import Console
from rich.table import Table

from search_spaces.written import space_from
from tune_app.bench.search import machine, plain_searcher
from tune_app.driver.display import Display
from tune_app.driver.local_ray import own_ray, ray_to_file
from tune_app.driver.recorder import Recorder
from tune_app.driver.resources import Plan
from tune_app.driver.session import Lifecycle, StudySession
from tune_app.results.tables import plain_table
from tune_app.study.files import StudyFiles
from tune_app.study.spec import build_spec

SPACE = "documented"
SIDES = ("medtune", "bare", "stripped")
SWITCHED_OFF = ("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "TUNE_GLOBAL_CHECKPOINT_S")
"""What medtune sets for Ray Tune, and a bare Ray goes without."""


def bench_overhead(
    *,
    trials: int,
    epochs: int,
    turns: int,
    folder: Path,
    concurrent: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    record: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Return {"machine", "trials", "epochs", "concurrent", "turns", "medtune", "bare", "stripped", "ratio", ...}.

    `trials` on each side, in `turns` of equal size, two at least; each trial reports `epochs` rows. The sides hold `wall_s`
    and `cpu_s`, seconds a trial over all turns, of the clock and of the driver's processor; `ratio` is medtune's wall time
    over bare Ray's, `cpu_ratio` that of the processor, `stripped_ratio` the wall time over stripped Ray's. `turns` has one entry a turn, with `wall_s` and `cpu_s` of each side. `concurrent` trials run
    at a time; None: one a CPU. Writes below `folder`; `record` is given the result after each turn. Starts a Ray, and stops
    it.
    """
    size = max(2, math.ceil(trials / turns))
    done: list[dict[str, dict[str, float]]] = []
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with (
        ray_to_file(folder / "ray.log", Console(quiet=True)),
        own_ray(log_to_driver=False, logging_level=logging.ERROR),
    ):
        at_a_time = concurrent or int(ray.cluster_resources()["CPU"])
        sides: dict[str, _Ours | _Bare] = {
            "medtune": _Ours(folder / "study", epochs, at_a_time),
            "bare": _Bare(folder / "bare", epochs, at_a_time),
            "stripped": _Bare(folder / "stripped", epochs, at_a_time, stripped=True),
        }
        for side in SIDES:  # processes start, modules load, files are there: not measured
            sides[side].begin(at_a_time)()
        say(
            f"{trials} trials of {epochs} epochs on each side, {at_a_time} at a time, {turns} turns of {size}"
        )
        for number in range(turns):
            order = SIDES[number % 3 :] + SIDES[: number % 3]
            turn = {side: sides[side].begin(size)().seconds_a_trial() for side in order}
            done.append(turn)
            told = ", ".join(f"{side} {turn[side]['wall_s']:.3f} s a trial" for side in SIDES)
            say(
                f"turn {number + 1}: {told}, ratio {turn['medtune']['wall_s'] / turn['bare']['wall_s']:.2f}"
            )
            record(_result(done, size, epochs, at_a_time))
    return _result(done, size, epochs, at_a_time)


class _Ends(tune.Callback):  # type: ignore[misc]  # Ray is not typed
    """When each trial ended, on the clock and in CPU time of this process."""

    def __init__(self) -> None:
        self.at: list[tuple[float, float]] = []

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.at.append((time.perf_counter(), time.process_time()))

    def seconds_a_trial(self) -> dict[str, float]:
        first, last = self.at[0], self.at[-1]
        wall_s, cpu_s = (
            (end - begin) / (len(self.at) - 1) for begin, end in zip(first, last, strict=True)
        )
        return {"wall_s": wall_s, "cpu_s": cpu_s}


class _OurEnds(Lifecycle):
    def __init__(self, session: StudySession) -> None:
        super().__init__(session)
        self.ends = _Ends()

    def on_trial_complete(self, *arguments: Any, **info: Any) -> None:
        super().on_trial_complete(*arguments, **info)
        self.ends.on_trial_complete(*arguments, **info)


def _result(
    done: list[dict[str, dict[str, float]]], size: int, epochs: int, at_a_time: int
) -> dict[str, Any]:
    means = {
        side: {
            key: statistics.fmean(turn[side][key] for turn in done) for key in ("wall_s", "cpu_s")
        }
        for side in SIDES
    }
    return {
        "machine": machine("ray", "optuna"),
        "trials": size * len(done),
        "epochs": epochs,
        "concurrent": at_a_time,
        "turns": done,
        **means,
        "ratio": means["medtune"]["wall_s"] / means["bare"]["wall_s"],
        "cpu_ratio": means["medtune"]["cpu_s"] / means["bare"]["cpu_s"],
        "stripped_ratio": means["medtune"]["wall_s"] / means["stripped"]["wall_s"],
    }


def overhead_table(result: dict[str, Any]) -> Table:
    """Return the result of `bench_overhead` as a Rich table: seconds a trial, and of these the driver's CPU time."""
    table = plain_table(
        "trials", "medtune", "Ray Tune", "ratio", "stripped", "ratio", text=["trials"]
    )
    size = result["trials"] // len(result["turns"])
    for number, turn in enumerate(result["turns"]):
        table.add_row(
            f"{number * size + 1} to {(number + 1) * size}, s a trial", *_cells(turn, "wall_s")
        )
    table.add_row(f"all {result['trials']}, s a trial", *_cells(result, "wall_s"), style="bold")
    table.add_row("  of these CPU of the driver", *_cells(result, "cpu_s"))
    return table


def _cells(row: dict[str, dict[str, float]], key: str) -> list[str]:
    ours = row["medtune"][key]
    cells = [f"{ours:.3f}"]
    for side in ("bare", "stripped"):
        cells += [f"{row[side][key]:.3f}", f"{ours / row[side][key]:.2f}"]
    return cells


def _trivial_trial(epochs: int) -> Callable[[dict[str, Any]], None]:
    """Return a trial that trains nothing and reports rows like a run's.

    A function made here travels to the trial's process by value: by name, that process would import this module, and
    with it torch.
    """

    def trial(config: dict[str, Any]) -> None:
        import math

        from ray import tune

        drawn = config.get("overrides", config)
        level = (
            0.85
            - 0.1 * (math.log10(drawn["backbone_lr"]) + 4) ** 2
            - 0.2 * (drawn["max_m"] - 0.2) ** 2
        )
        for epoch in range(1, epochs + 1):
            auc = 0.5 + (level - 0.5) * (1 - 0.5**epoch)
            weights = {
                f"val_{name}_{kind}": auc
                for name in ("auc", "auprc", "tied")
                for kind in ("raw", "ema")
            }
            bounds = {"val_auc": auc, "val_auc_low": auc - 0.1, "val_auc_high": auc + 0.1}
            counts = {
                "val_positive": 20,
                "val_negative": 80,
                "updates": 30 * epoch,
                "skipped_updates": 0,
            }
            rest = {
                "train_loss": 1 / epoch,
                "train_auc": auc,
                "drw_active": False,
                "epoch_s": 0.0,
                "grad_norm": 1.0,
            }
            tune.report({"epoch": epoch, **bounds, **weights, **counts, **rest})

    return trial


class _Ours:
    """A study that grows by each turn's trials, run as `medtune resume` runs it."""

    def __init__(self, root: Path, epochs: int, concurrent: int) -> None:
        self.files = StudyFiles(root)
        self.epochs, self.concurrent = epochs, concurrent
        self.trials = 0
        root.mkdir(parents=True)

    def begin(self, count: int) -> Callable[[], _Ends]:
        """Take up the study; returns a function that runs `count` more trials and returns when they ended."""
        self.trials += count
        fields = {"data": "none", "space": SPACE, "trials": self.trials, "warm_start": ()}
        spec = build_spec({**fields, "config": {"epochs": self.epochs}})
        self.files.write({"spec": spec.model_dump(mode="json")})
        console = Console(file=(self.files.root / "console.log").open("a"), width=80)
        recorder = Recorder(spec, self.files)
        session = StudySession(
            spec, "none", recorder, Display(console, num_trials=self.trials, epochs=self.epochs)
        )
        session.begin()
        session.lifecycle = lifecycle = _OurEnds(session)

        def run() -> _Ends:
            session.run(
                _trivial_trial(self.epochs), Plan(1, 1, 0.0, self.concurrent, [{"CPU": 1.0}])
            )
            ended = recorder.states()
            assert sum(ended.get(state, 0) for state in ("completed", "stopped")) == self.trials, (
                ended
            )
            return lifecycle.ends

        return run


class _Bare:
    """Ray Tune with `OptunaSearch`, continued in the same study in memory."""

    def __init__(
        self, folder: Path, epochs: int, concurrent: int, *, stripped: bool = False
    ) -> None:
        self.folder, self.epochs, self.concurrent, self.stripped = (
            folder,
            epochs,
            concurrent,
            stripped,
        )
        self.storage = optuna.storages.InMemoryStorage()
        self.space = space_from(SPACE, {"epochs": epochs})

    def begin(self, count: int) -> Callable[[], _Ends]:
        """Open the study; returns a function that runs `count` more trials and returns when they ended."""
        searcher = plain_searcher(self.space, 0, storage=self.storage, study_name="bare")
        ends = _Ends()
        tuner = tune.Tuner(
            tune.with_resources(
                _trivial_trial(self.epochs), tune.PlacementGroupFactory([{"CPU": 1.0}])
            ),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                num_samples=count,
                max_concurrent_trials=self.concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=uuid.uuid4().hex, storage_path=str(self.folder), callbacks=[ends], verbose=0
            ),
        )

        def run() -> _Ends:
            off = {} if self.stripped else {name: os.environ.pop(name) for name in SWITCHED_OFF}
            try:
                results = tuner.fit()
            finally:
                os.environ.update(off)
            assert len(results) == count, f"{len(results)} of {count} trials"
            assert not results.errors, results.errors
            return ends

        return run
