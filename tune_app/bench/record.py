"""`medtune bench record`: whole learning curves of random configurations, in one table.

Search strategies are compared on such tables (`medtune bench strategies`), and a prior is learned
from them. Nothing is stopped early: each configuration trains to its end, on each fold and with
each seed asked for. One fold is held out: no run trains or validates on it, and after each epoch
the averaged weights are scored on it. So the table knows how good each run is on volumes that no search
may see.

The runs need no Ray: `at_once` processes train one run after the other on one device. Each finished
run is one file in `OUT.parts`, so that a recording that was stopped continues where it was; the
table is their concatenation.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from search_spaces.space import Space
from search_spaces.spaces import warm_start_points
from trainables.checkpoints import write_json
from trainables.config import FineTuneConfig, Scalar, build_config
from trainables.data.folds import Split, split_rows
from trainables.data.json_files import read_json
from trainables.data.manifest import Manifest, read_manifest
from trainables.data.scans import Recipe
from trainables.data.volumes import open_cohort, prepare_cohort
from tune_app.study.surrogate import draw


class RecordError(ValueError):
    """A recording that cannot be made as asked; the message states the change to make."""


@dataclass(frozen=True)
class Recording:
    """The settings of a recording: equal recordings give the same runs, whatever was recorded before."""

    space: dict[str, Any]
    """The search space, written out."""
    config: dict[str, Any]
    """Hyperparameters that all runs share, `epochs` among them."""
    trials: int
    """Configurations drawn at random."""
    settings: tuple[str, ...]
    """Known settings that are recorded first: names of `search_spaces.spaces.WARM_STARTS`."""
    folds: tuple[int, ...]
    seeds: int
    hold_fold: int
    seed: int
    """Of the draws."""
    cohort: str
    """Name of the prepared cohort, which is its content."""


@dataclass(frozen=True)
class Run:
    """One run of a recording."""

    trial: str
    configuration: int
    origin: str
    """`random`, or the name of a known setting."""
    sample: dict[str, Scalar]
    overrides: dict[str, Any]
    """The complete difference to the defaults, fold and seed included."""


def planned_runs(recording: Recording, space: Space) -> list[Run]:
    """Return the runs in order: all configurations on the first fold with the first seed, then on
    the next.

    A configuration depends on `recording.seed` and its own number alone: more trials later add to
    those there are.
    """
    epochs = int(recording.config["epochs"])
    drawn: list[tuple[str, dict[str, Scalar]]] = list(
        warm_start_points(space, epochs, recording.settings).points.items()
    )
    for number in range(recording.trials):
        suggest = partial(draw, rng=np.random.default_rng([recording.seed, number]))
        drawn.append(("random", space.sample(suggest, epochs)))
    runs = []
    for seed in range(recording.seeds):
        for fold in recording.folds:
            first = seed == 0 and fold == recording.folds[0]
            for number, (origin, sample) in enumerate(drawn):
                overrides = {
                    **recording.config,
                    **space.sample_to_overrides(sample, epochs),
                    "fold": fold,
                    "seed": seed,
                }
                name = f"{number:05d}" if first else f"{number:05d}-fold{fold}-seed{seed}"
                runs.append(Run(name, number, origin, sample, overrides))
    return runs


def record_curves(
    table: Path,
    out: Path,
    *,
    space: Space,
    config: dict[str, Any],
    trials: int,
    settings: Sequence[str] = (),
    folds: Sequence[int] = (0,),
    seeds: int = 1,
    hold_fold: int = 1,
    seed: int = 0,
    device: str = "cpu",
    at_once: int = 1,
    seconds: float = math.inf,
    cache: Path,
    say: Callable[[str], None] = lambda text: None,
) -> pd.DataFrame:
    """Record the curves that `out` (a Parquet file) lacks, write it, and return the table.

    `config` holds what all runs share; `space` is searched for the rest. `seconds`: no run begins
    later than this, and the table holds the runs recorded by then; the same call continues. Raises
    RecordError for folds that do not exist or hold each other's rows, and when `out` was recorded
    with other settings.
    """
    base = build_config({**space.fixed, **config, "cross_validate": True})
    _check(base, folds, seeds, hold_fold, trials, at_once)
    if out.suffix != ".parquet":
        raise RecordError(
            f"--out {out}: the table is a Parquet file; name it {out.with_suffix('.parquet')}"
        )
    manifest = read_manifest(table, num_classes=base.num_classes, classes=base.classes)
    folder = prepare_cohort(manifest, Recipe.from_config(base), cache)
    shared = {**config, "epochs": base.epochs, "cross_validate": True}
    recording = Recording(
        space.to_mapping(),
        shared,
        trials,
        tuple(settings),
        tuple(folds),
        seeds,
        hold_fold,
        seed,
        folder.name,
    )
    parts = _claimed(out, recording)
    runs = planned_runs(recording, space)
    missing = [run for run in runs if not _part(parts, run).exists()]
    say(f"{len(runs)} runs of {base.epochs} epochs, {len(runs) - len(missing)} recorded before")
    if missing:
        job = _Job(
            str(folder), str(table.resolve()), str(parts), hold_fold, device, time.time() + seconds
        )
        _in_processes(job, missing, at_once, say)
    whole = _concatenated(parts, runs)
    if len(whole):
        whole.attrs["labels"] = _labels(manifest, base, {*folds, hold_fold})
        temporary = out.with_name(out.name + ".tmp")
        whole.to_parquet(temporary, index=False)
        temporary.replace(out)
    return whole


def read_scores(cell: bytes) -> npt.NDArray[np.float16]:
    """Return the scores of one epoch by the averaged weights, one a volume, in the order of the run's rows.

    `cell`: of the column `val_scores` or `hold_scores`, little-endian float16. The labels of those volumes, in the same
    order, are in the table's `attrs["labels"]`, by the number of the fold.
    """
    return np.frombuffer(cell, dtype="<f2")


def _check(
    base: FineTuneConfig, folds: Sequence[int], seeds: int, hold: int, trials: int, at_once: int
) -> None:
    wrong = sorted({fold for fold in (*folds, hold) if not 0 <= fold < base.num_folds})
    if wrong:
        raise RecordError(
            f"folds {', '.join(map(str, wrong))}: there are 0 to {base.num_folds - 1}"
        )
    if base.num_folds < 3:
        raise RecordError(
            f"num_folds={base.num_folds}: one validates and one is held out; --set num_folds=3"
        )
    if not folds or len(set(folds)) < len(folds) or hold in folds:
        raise RecordError(
            f"--folds {','.join(map(str, folds))}, --hold-fold {hold}: "
            f"each fold once, without the held-out one"
        )
    if min(seeds, trials, at_once) < 1:
        raise RecordError(f"{seeds} seeds, {trials} trials, {at_once} at once: 1 or more of each")


def _claimed(out: Path, recording: Recording) -> Path:
    """Return the folder of the parts; the number of runs may grow, what decides a run may not."""
    parts = out.with_name(out.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    asked = json.loads(json.dumps(asdict(recording)))
    record = parts / "recording.json"
    if record.exists():
        found = read_json(record)
        differ = [
            name
            for name in ("space", "config", "hold_fold", "seed", "cohort", "settings")
            if found[name] != asked[name]
        ]
        if found["folds"][0] != asked["folds"][0]:
            differ.append("first fold")
        if differ:
            raise RecordError(
                f"{out}: recorded with another {', '.join(differ)}; name another table with --out"
            )
    write_json(record, asked)
    return parts


def _part(parts: Path, run: Run) -> Path:
    return parts / f"{run.trial}.parquet"


def _concatenated(parts: Path, runs: Sequence[Run]) -> pd.DataFrame:
    there = [pd.read_parquet(_part(parts, run)) for run in runs if _part(parts, run).exists()]
    return pd.concat(there, ignore_index=True) if there else pd.DataFrame()


def _labels(manifest: Manifest, base: FineTuneConfig, folds: set[int]) -> dict[str, list[int]]:
    labels = manifest.rows["label"].to_numpy(dtype=np.int64)
    return {str(fold): labels[_fold(manifest, base, fold).val].tolist() for fold in sorted(folds)}


def _fold(manifest: Manifest, config: FineTuneConfig, fold: int) -> Split:
    return split_rows(manifest, fold=fold, num_folds=config.num_folds, cross_validate=True)


# Processes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What each process has to know."""

    cohort: str
    table: str
    parts: str
    hold_fold: int
    device: str
    until: float
    """On the clock of the machine; no run begins later."""


def _in_processes(job: _Job, runs: Sequence[Run], at_once: int, say: Callable[[str], None]) -> None:
    """Make `runs`, `at_once` at a time. Raises RecordError when a process ends without a reason."""
    spawned = get_context("spawn")
    jobs: SimpleQueue[Run | None] = spawned.SimpleQueue()
    answers: SimpleQueue[tuple[str, str | float]] = spawned.SimpleQueue()
    count = min(at_once, len(runs))
    processes = [
        spawned.Process(target=_work, args=(job, jobs, answers), daemon=True) for _ in range(count)
    ]
    for process in processes:
        process.start()
    waiting = iter(runs)
    try:
        for _ in processes:
            jobs.put(next(waiting))
        _hand_out(job, waiting, jobs, answers, processes, len(runs), say)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _hand_out(
    job: _Job,
    waiting: Iterator[Run],
    jobs: "SimpleQueue[Run | None]",
    answers: "SimpleQueue[tuple[str, str | float]]",
    processes: Sequence[Any],
    total: int,
    say: Callable[[str], None],
) -> None:
    began, done, running = time.monotonic(), 0, len(processes)
    while running:
        while answers.empty():
            if not all(process.is_alive() for process in processes) and answers.empty():
                raise RecordError("a recording process was killed; its last lines are above")
            time.sleep(0.02)
        name, answer = answers.get()
        if isinstance(answer, str):
            raise RecordError(f"run {name}: {answer}")
        done += 1
        spent = time.monotonic() - began
        say(
            f"{done}/{total} {name}: held-out AUC {answer:.3f}; {spent / done:.2f} s per run so far"
        )
        following = next(waiting, None) if time.time() < job.until else None
        if following is None:
            running -= 1
        else:
            jobs.put(following)


def _work(
    job: _Job, jobs: "SimpleQueue[Run | None]", answers: "SimpleQueue[tuple[str, str | float]]"
) -> None:
    """Make runs until the parent ends this process."""
    import torch

    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    while (run := jobs.get()) is not None:
        try:
            answers.put((run.trial, _record(job, run)))
        except Exception as error:
            answers.put((run.trial, f"{type(error).__name__}: {error}"))
            raise


def _record(job: _Job, run: Run) -> float:
    """Train one run to its end and write its part; returns its last AUC on the held-out fold."""
    import torch

    from trainables.finetune import finetune
    from trainables.metrics import auc_interval
    from trainables.network.model import configured_network

    config = build_config(run.overrides)
    cohort = open_cohort(Path(job.cohort))
    split, hold = held_out_split(Path(job.table), config, job.hold_fold)
    device = torch.device(job.device)
    network = configured_network(config).to(device).eval().requires_grad_(False)
    labels = np.asarray(cohort.labels)
    seen = np.concatenate([split.val, hold])
    score = _scorer(network, config, cohort, seen, device)
    rows = []
    for result in finetune(config, cohort, split, device=device):
        network.load_state_dict(result.state()["average"]["network"])
        scores = score()
        held = scores[len(split.val) :]
        auc = auc_interval(held, labels[hold]).auc if np.isfinite(held).all() else math.nan
        row = {**result.metrics, "hold_auc": float(auc)}
        row |= {"val_scores": _bytes(scores[: len(split.val)]), "hold_scores": _bytes(held)}
        rows.append(row)
    frame = pd.DataFrame(rows)
    first = {"trial": run.trial, "configuration": run.configuration, "origin": run.origin}
    first |= {"fold": config.fold, "seed": config.seed, "hold_fold": job.hold_fold}
    last = {
        f"config.{name}": value
        for name, value in run.overrides.items()
        if not isinstance(value, list | tuple)
    }
    last |= {f"sample.{name}": value for name, value in run.sample.items()}
    known = pd.DataFrame([first] * len(frame)), pd.DataFrame([last] * len(frame))
    part = Path(job.parts) / f"{run.trial}.parquet"
    temporary = part.with_name(part.name + ".tmp")
    pd.concat([known[0], frame, known[1]], axis=1).to_parquet(temporary, index=False)
    temporary.replace(part)
    return float(frame["hold_auc"].iloc[-1])


def held_out_split(
    table: Path, config: FineTuneConfig, hold_fold: int
) -> tuple[Split, npt.NDArray[np.int64]]:
    """Return the split of a run that never sees the held-out fold, and the rows of that fold."""
    manifest = read_manifest(table, num_classes=config.num_classes, classes=config.classes)
    own, hold = _fold(manifest, config, config.fold), _fold(manifest, config, hold_fold).val
    return Split(train=np.setdiff1d(own.train, hold), val=own.val, test=own.test), hold


def _bytes(scores: npt.NDArray[np.float64]) -> bytes:
    return scores.astype("<f2").tobytes()


def _scorer(
    network: Any, config: FineTuneConfig, cohort: Any, rows: npt.NDArray[np.int64], device: Any
) -> Callable[[], npt.NDArray[np.float64]]:
    """Return what scores `rows` with `network`, in the precision the run validates in."""
    import torch

    from trainables.data.resident import Volumes
    from trainables.losses import logit_scale
    from trainables.metrics import ranking_scores
    from trainables.step import choose_precision

    precision = choose_precision(config.amp, device)
    half = precision.dtype is not torch.float32
    scale = logit_scale(config.loss, config.head, config.s)
    volumes = Volumes(
        cohort, rows, torch.device("cpu")
    )  # the run's own rows stay on the device, which keeps one set
    size = 4 * config.validation_batch_size
    batches = [volumes.batch(rows[begin : begin + size]) for begin in range(0, len(rows), size)]
    if device.type == "cuda":
        batches = [b.to(device).contiguous(memory_format=torch.channels_last_3d) for b in batches]
        network.to(memory_format=torch.channels_last_3d)

    @torch.no_grad()
    def scores() -> npt.NDArray[np.float64]:
        with torch.autocast(device.type, dtype=precision.dtype if half else None, enabled=half):
            logits = torch.cat([network(batch).float() for batch in batches])
        return np.asarray(ranking_scores(logits.cpu(), scale=scale), dtype=np.float64)

    return scores
