"""`medtune bench`: speed, measured on this machine (`serve` is in `tune_app.cli.serve`)."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tune_app.cli.common import (
    CacheOption,
    ConcurrentOption,
    DataOption,
    DeviceOption,
    MpsOption,
    SetOption,
    cache_folder,
    out,
    parse_settings,
    to_stderr,
    to_stdout,
)

DepthOption = Annotated[int, typer.Option("--depth")]
WidthOption = Annotated[float, typer.Option("--width", help="Factor on all channels.")]
StepsOption = Annotated[int, typer.Option("--steps", min=2, help="Optimiser steps an epoch.")]
SizesOption = Annotated[str, typer.Option("--sizes", help="Voxels a side, separated by commas.")]
BatchOption = Annotated[str, typer.Option("--batch", help="Batch size x accumulation steps.")]
ProcessesOption = Annotated[
    int, typer.Option("--at-once", min=1, help="Processes at a time on the device.")
]
EpochsOption = Annotated[int, typer.Option("--epochs", min=1, help="Epochs of a full trial.")]
TableOption = Annotated[Path, typer.Option("--data", help="Table of volumes.")]
ResultOption = Annotated[
    Path | None, typer.Option("--out", help="JSON file of everything measured.")
]
BenchSpaceOption = Annotated[
    str,
    typer.Option("--space", help="Search space: a name, or a study file whose `space` is used."),
]

bench_app = typer.Typer(help="Speed, measured on this machine.", no_args_is_help=True)


@bench_app.command("train")
def bench_train_command(
    sizes: SizesOption = "64,96,128",
    geometries: Annotated[
        str, typer.Option("--geometries", help="strided, dilated or both.")
    ] = "strided,dilated",
    batches: Annotated[
        str, typer.Option("--batches", help="Batch size x accumulation steps.")
    ] = "6x2,24x1",
    depth: DepthOption = 50,
    width: WidthOption = 1.0,
    steps: StepsOption = 24,
    variants: Annotated[
        str,
        typer.Option(
            "--variants",
            help="plain, plain_augmented, unaugmented, eager (no CUDA graphs), deterministic, ours.",
        ),
    ] = "plain,ours",
    device: DeviceOption = "auto",
    out_file: ResultOption = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as Markdown.")
    ] = False,
) -> None:
    """Time whole training steps: a plain loop against medtune's own, side by side."""
    from tune_app.bench.train import bench_train, markdown_table, parse_batches, result_table
    from tune_app.models.model import choose_device

    result = bench_train(
        sizes=_whole_numbers(sizes, "--sizes"),
        geometries=geometries.split(","),
        batches=parse_batches(batches),
        device=str(choose_device(device)),
        depth=depth,
        width=width,
        steps=steps,
        variants=variants.split(","),
        say=to_stderr,
        record=_recorder(out_file),
    )
    if markdown:
        print(markdown_table(result))
    else:
        out.print(result_table(result))


def _given_space(named: str) -> str | dict[str, Any]:
    """Return the name of a space, or the space of a study file."""
    from tune_app.study.spec import read_study_file

    if not named.endswith((".yaml", ".yml")):
        return named
    space: str | dict[str, Any] = read_study_file(Path(named)).get("space", "documented")
    return space


def _whole_numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} {text!r}: whole numbers separated by commas") from None


@bench_app.command("ranks")
def bench_ranks_command(
    sizes: SizesOption = "96,128",
    ranks: Annotated[
        str, typer.Option("--ranks", help="GPUs of a run, separated by commas.")
    ] = "1,2",
    batch: Annotated[
        str, typer.Option("--batch", help="Batch size of a GPU x accumulation steps.")
    ] = "6x2",
    depth: DepthOption = 50,
    width: WidthOption = 1.0,
    steps: StepsOption = 24,
    device: DeviceOption = "auto",
    out_file: ResultOption = None,
) -> None:
    """Time whole training steps of one run over several GPUs."""
    from tune_app.bench.ranks import bench_ranks, ranks_table
    from tune_app.models.model import choose_device

    result = bench_ranks(
        sizes=_whole_numbers(sizes, "--sizes"),
        worlds=_whole_numbers(ranks, "--ranks"),
        batch=_one_batch(batch),
        device=str(choose_device(device)),
        depth=depth,
        width=width,
        steps=steps,
        say=to_stderr,
        record=_recorder(out_file),
    )
    out.print(ranks_table(result))


@bench_app.command("start")
def bench_start_command(
    size: Annotated[int, typer.Option("--size", help="Voxels a side.")] = 64,
    volumes: Annotated[
        str,
        typer.Option(
            "--volumes",
            help="Training volumes, separated by commas: with and without a full last step.",
        ),
    ] = "1029,1032",
    batch: BatchOption = "6x2",
    at_once: ProcessesOption = 1,
    geometry: Annotated[str, typer.Option("--geometry", help="strided or dilated.")] = "strided",
    depth: DepthOption = 50,
    width: WidthOption = 1.0,
    device: DeviceOption = "auto",
    out_file: ResultOption = None,
) -> None:
    """Time the start of a trial, in a new process and in one that has trained before."""
    from tune_app.bench.start import bench_start, start_table
    from tune_app.models.model import choose_device

    result = bench_start(
        volumes=_whole_numbers(volumes, "--volumes"),
        size=size,
        batch=_one_batch(batch),
        device=str(choose_device(device)),
        at_once=at_once,
        geometry=geometry,
        depth=depth,
        width=width,
        say=to_stderr,
        record=_recorder(out_file),
    )
    out.print(start_table(result))


def _one_batch(text: str) -> tuple[int, int]:
    from tune_app.bench.train import parse_batches

    (pair,) = parse_batches(text) if "," not in text else [(0, 0)]
    if not all(pair):
        raise typer.BadParameter(
            f"--batch {text!r}: one batch size, or BATCHxACCUMULATION such as 6x2"
        )
    return pair


@bench_app.command("share")
def bench_share_command(
    sizes: SizesOption = "28,64,96",
    at_once: Annotated[
        str, typer.Option("--at-once", help="Processes on the GPU, separated by commas.")
    ] = "1,4,8",
    modes: Annotated[str, typer.Option("--modes", help="turns, mps or both.")] = "turns,mps",
    volumes: Annotated[int, typer.Option("--volumes", min=12, help="Training volumes.")] = 1029,
    batch: BatchOption = "6x2",
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Epochs that are timed.")] = 2,
    depth: DepthOption = 50,
    width: WidthOption = 1.0,
    device: DeviceOption = "auto",
    out_file: ResultOption = None,
) -> None:
    """Time processes that share one GPU: in turns, and side by side under CUDA MPS."""
    from tune_app.bench.share import bench_share, share_table

    result = bench_share(
        sizes=_whole_numbers(sizes, "--sizes"),
        at_once=_whole_numbers(at_once, "--at-once"),
        modes=modes.split(","),
        volumes=volumes,
        batch=_one_batch(batch),
        epochs=epochs,
        device=_device_apart(device),
        depth=depth,
        width=width,
        say=to_stderr,
        record=_recorder(out_file),
    )
    out.print(share_table(result))


@bench_app.command("faults")
def bench_faults_command(
    faults: Annotated[
        str | None,
        typer.Option("--faults", help="Some of them, separated by commas; default: all."),
    ] = None,
    neighbours: Annotated[
        int, typer.Option("--neighbours", min=1, help="Processes next to the one with the fault.")
    ] = 2,
    out_file: ResultOption = None,
) -> None:
    """Show the effect of a fault in one process on others that share its GPU under CUDA MPS."""
    from tune_app.bench.faults import FAULTS, bench_faults, faults_table

    result = bench_faults(
        faults=faults.split(",") if faults else FAULTS,
        neighbours=neighbours,
        say=to_stderr,
        record=_recorder(out_file),
    )
    out.print(faults_table(result))


def _device_apart(device: str) -> str:
    """The device asked for. `auto` is answered without CUDA, which under MPS only the measured processes may start."""
    if device != "auto":
        return device
    from trainables.mps import visible_gpus

    return "cuda" if visible_gpus() else "cpu"


@bench_app.command("search")
def bench_search_command(
    data: TableOption,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Trials on each side.")] = 16,
    epochs: EpochsOption = 27,
    grace: Annotated[int, typer.Option("--grace", min=1, help="Epoch of the first rung.")] = 3,
    factor: Annotated[
        float, typer.Option("--factor", help="The best 1/FACTOR of the trials pass a rung.")
    ] = 3.0,
    sides: Annotated[
        str, typer.Option("--sides", help="plain, medtune or both.")
    ] = "plain,medtune",
    gpus_per_trial: Annotated[
        str | None, typer.Option("--gpus-per-trial", help="Of medtune's side.")
    ] = None,
    mps: MpsOption = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache", help="Of medtune's side: cohort and kernels; default: an empty one."
        ),
    ] = None,
    settings: SetOption = None,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Of both samplers.")] = 0,
    out_file: ResultOption = None,
) -> None:
    """Time one search: medtune's, and plain Ray Tune with OptunaSearch and ASHA over a plain loop with MONAI."""
    import tempfile

    from tune_app.bench.search import bench_search, search_table
    from tune_app.models.model import choose_device

    with tempfile.TemporaryDirectory() as folder:
        result = bench_search(
            data,
            Path(folder),
            trials=trials,
            epochs=epochs,
            grace_epochs=grace,
            reduction_factor=factor,
            config=parse_settings(settings),
            gpu=choose_device(device).type == "cuda",
            gpus_per_trial=gpus_per_trial,
            mps=mps or "auto",
            cache=cache and cache.resolve(),
            sides=sides.split(","),
            seed=seed,
            say=to_stderr,
            record=_recorder(out_file),
        )
    out.print(search_table(result))


@bench_app.command("efficiency")
def bench_efficiency_command(
    data: TableOption,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Of each search.")] = 120,
    repetitions: Annotated[
        int, typer.Option("--repetitions", min=1, help="Searches of each side.")
    ] = 3,
    at_once: Annotated[
        int | None,
        typer.Option(
            "--at-once", min=1, help="Repetitions at a time, each on one GPU that its sides share."
        ),
    ] = None,
    epochs: EpochsOption = 30,
    space: BenchSpaceOption = "documented",
    sides: Annotated[
        str, typer.Option("--sides", help="Some of random, plain, medtune.")
    ] = "random,plain,medtune",
    folds: Annotated[
        str,
        typer.Option("--folds", help="Of the confirmation: all, numbers, or own; empty: none yet."),
    ] = "all",
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Of the confirmation, on each fold.")
    ] = 1,
    gpus_per_trial: Annotated[
        float | None, typer.Option("--gpus-per-trial", help="On all sides.")
    ] = None,
    max_concurrent: ConcurrentOption = None,
    prior: Annotated[
        str | None,
        typer.Option(
            "--prior",
            help="File that `bench prior` wrote, for medtune's side: the shipped prior has seen AdrenalMNIST3D.",
        ),
    ] = None,
    settings: SetOption = None,
    folder: Annotated[
        Path | None, typer.Option("--work", help="Folder to keep all studies in.")
    ] = None,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", help="JSON file of everything measured; it continues where it is."),
    ] = None,
) -> None:
    """Compare random search, plain Ray Tune and medtune in the same time: their winners are run again."""
    import tempfile

    from trainables.data.json_files import read_json
    from tune_app.bench.efficiency import bench_efficiency, efficiency_table, gain_lines
    from tune_app.study.prior import prior_of_file

    with tempfile.TemporaryDirectory() as temporary:
        result = bench_efficiency(
            data,
            folder or Path(temporary),
            seconds=seconds,
            repetitions=repetitions,
            at_once=at_once,
            epochs=epochs,
            space=_given_space(space),
            config=parse_settings(settings),
            gpus_per_trial=gpus_per_trial,
            max_concurrent=max_concurrent,
            folds=folds,
            seeds=seeds,
            sides=sides.split(","),
            prior=prior_of_file(prior) if prior else None,
            earlier=read_json(out_file) if out_file and out_file.exists() else None,
            say=to_stderr,
            record=_recorder(out_file),
        )
    out.print(efficiency_table(result))
    for line in gain_lines(result):
        out.print(line)


def _recorder(file: Path | None) -> Callable[[dict[str, Any]], object]:
    return lambda result: file.write_text(json.dumps(result, indent=1) + "\n") if file else None


@bench_app.command("data")
def bench_data_command(
    size: Annotated[int, typer.Option("--size", min=8, help="Voxels a side.")] = 96,
    subjects: Annotated[
        int, typer.Option("--subjects", min=2, help="Subjects, of one to three volumes each.")
    ] = 24,
    out_file: ResultOption = None,
) -> None:
    """Time reading a cohort: decoded each time, through MONAI's PersistentDataset, and prepared."""
    import tempfile

    from tune_app.bench.train import bench_data, data_table

    with tempfile.TemporaryDirectory() as folder:
        result = bench_data(size=size, subjects=subjects, folder=Path(folder), say=to_stderr)
    _recorder(out_file)(result)
    out.print(data_table(result))


@bench_app.command("results")
def bench_results_command(
    trials: Annotated[int, typer.Option("--trials", min=4, help="Trials of the study.")] = 1000,
    epochs: Annotated[int, typer.Option("--epochs", min=24, help="Epochs of each.")] = 60,
    out_file: ResultOption = None,
) -> None:
    """Time loading a study, its leaderboard, importance and report, and show the memory they take."""
    import tempfile

    from tune_app.bench.results import bench_results, results_line, results_table_of

    with tempfile.TemporaryDirectory() as folder:
        result = bench_results(trials=trials, epochs=epochs, folder=Path(folder), say=to_stderr)
    _recorder(out_file)(result)
    to_stdout(results_line(result))
    out.print(results_table_of(result))


@bench_app.command("overhead")
def bench_overhead_command(
    trials: Annotated[int, typer.Option("--trials", min=2, help="Trials on each side.")] = 1000,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Rows a trial reports.")] = 1,
    turns: Annotated[
        int, typer.Option("--turns", min=1, help="Turns the sides take, each of equal size.")
    ] = 10,
    concurrent: Annotated[
        int | None,
        typer.Option("--max-concurrent", min=1, help="Trials at a time; default: one a CPU."),
    ] = None,
    out_file: ResultOption = None,
) -> None:
    """Time trials that train nothing: a study of ours against bare Ray Tune with OptunaSearch, in turns."""
    import tempfile

    from tune_app.bench.overhead import bench_overhead, overhead_table

    with tempfile.TemporaryDirectory() as folder:
        result = bench_overhead(
            trials=trials,
            epochs=epochs,
            turns=min(turns, trials),
            concurrent=concurrent,
            folder=Path(folder),
            say=to_stderr,
            record=_recorder(out_file),
        )
    out.print(overhead_table(result))


@bench_app.command("storage")
def bench_storage_command(
    trials: Annotated[int, typer.Option("--trials", min=1, help="Trials a turn.")] = 200,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Values a trial reports.")] = 30,
    turns: Annotated[int, typer.Option("--turns", min=1, help="Turns of each storage.")] = 2,
    out_file: ResultOption = None,
) -> None:
    """Time writing trials to a study's Optuna database, and to Optuna's own storages, in turns."""
    import tempfile

    from tune_app.bench.storage import bench_storage, storage_table

    with tempfile.TemporaryDirectory() as folder:
        result = bench_storage(
            trials=trials, epochs=epochs, turns=turns, folder=Path(folder), say=to_stderr
        )
    _recorder(out_file)(result)
    out.print(storage_table(result))


@bench_app.command("record")
def bench_record_command(
    data: DataOption,
    out_file: Annotated[
        Path, typer.Option("--out", help="Parquet file of the curves; it continues where it is.")
    ],
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="Configurations drawn at random.")
    ] = 100,
    space: BenchSpaceOption = "documented",
    known: Annotated[
        str, typer.Option("--settings", help="Known settings, recorded first; empty for none.")
    ] = "",
    folds: Annotated[
        str, typer.Option("--folds", help="Validation folds, separated by commas.")
    ] = "0",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds on each fold.")] = 1,
    hold_fold: Annotated[
        int, typer.Option("--hold-fold", help="Fold that no run trains or validates on.")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    at_once: ProcessesOption = 1,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="No run begins later than this.")
    ] = None,
    settings: SetOption = None,
    cache: CacheOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Record whole learning curves of random configurations, for `bench strategies` and for priors."""
    from search_spaces.written import space_from
    from tune_app.bench.record import record_curves
    from tune_app.models.model import choose_device

    config = parse_settings(settings)
    table = record_curves(
        data,
        out_file,
        space=space_from(_given_space(space), config),
        config=config,
        trials=trials,
        settings=[name for name in known.split(",") if name],
        folds=_whole_numbers(folds, "--folds"),
        seeds=seeds,
        hold_fold=hold_fold,
        seed=seed,
        device=str(choose_device(device)),
        at_once=at_once,
        seconds=math.inf if minutes is None else 60 * minutes,
        cache=cache_folder(cache),
        say=to_stderr,
    )
    runs = table["trial"].nunique() if len(table) else 0
    to_stdout(f"{out_file}: {runs} runs, {len(table)} epochs")


@bench_app.command("prior")
def bench_prior_command(
    tables: Annotated[
        list[Path],
        typer.Argument(help="Parquet tables of whole curves, as `bench record` writes them."),
    ],
    out_file: Annotated[Path, typer.Option("--out", help="JSON file for `prior:` in study files.")],
) -> None:
    """Learn the effect of `backbone_lr` from recorded cohorts, for searches on another."""
    from tune_app.backtest.tables import learn_prior, read_table
    from tune_app.study.prior import prior_text

    prior = learn_prior([read_table(path) for path in tables])
    out_file.write_text(prior_text(prior), encoding="utf-8")
    best = prior.log_rate[max(range(len(prior.lift)), key=prior.lift.__getitem__)]
    to_stdout(
        f"{out_file}: from {'; '.join(prior.provenance['learned_from'])}; best at a rate of {math.exp(best):.2g}"
    )


@bench_app.command("strategies")
def bench_strategies_command(
    tables: Annotated[
        list[Path],
        typer.Argument(help="Parquet tables of whole curves, as `bench record` writes them."),
    ],
    replays: Annotated[
        int, typer.Option("--replays", min=1, help="Of each strategy on each table.")
    ] = 400,
    resamples: Annotated[
        int,
        typer.Option(
            "--resamples", min=0, help="Tables drawn with replacement, for the second interval."
        ),
    ] = 40,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Trials at a time.")] = 4,
    start: Annotated[
        float,
        typer.Option("--start-seconds", min=0, help="Seconds that each start of a trial costs."),
    ] = 0.0,
    unit: Annotated[
        str, typer.Option("--unit", help="Unit of a budget: epochs or seconds.")
    ] = "epochs",
    only: Annotated[
        str,
        typer.Option(
            "--only", help="Strategies besides random, separated by commas; default: all."
        ),
    ] = "",
    policies: Annotated[
        list[Path] | None,
        typer.Option(
            "--policy", help="YAML file of a policy to try in medtune's place; may be repeated."
        ),
    ] = None,
    surrogate: Annotated[
        int,
        typer.Option(
            "--surrogate",
            min=0,
            max=5000,
            help="Replay on as many random configurations, their curves from a surrogate of each table; 0: on the tables.",
        ),
    ] = 0,
    most: Annotated[
        int, typer.Option("--most", min=3, help="Largest budget, in whole runs; 48 at most.")
    ] = 48,
    out_file: Annotated[Path | None, typer.Option("--out", help="CSV file of all columns.")] = None,
) -> None:
    """Replay whole searches over recorded tables: held-out AUC of what each strategy chooses, by budget."""
    from tune_app.backtest.published import entries_to_replay
    from tune_app.backtest.strategies import Entry, compare, medtune, strategies_text
    from tune_app.backtest.surrogate_curves import CurveSurrogate
    from tune_app.backtest.tables import read_table
    from tune_app.study.policy_spec import read_policy

    if unit not in ("epochs", "seconds"):
        raise typer.BadParameter(f"--unit {unit!r}: epochs or seconds")
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    named = entries_to_replay(wanted, on_pools=surrogate > 0, say=to_stderr)
    recorded = [read_table(path) for path in tables]
    result = compare(
        [CurveSurrogate(table).pool(surrogate) for table in recorded] if surrogate else recorded,
        [*named, *(Entry(path.stem, medtune(read_policy(path))) for path in policies or ())],
        replays=replays,
        resamples=0 if surrogate else resamples,
        most=most,
        taught_by=recorded,
        workers=workers,
        start_s=start,
        unit="epochs" if unit == "epochs" else "seconds",
        say=to_stderr,
    )
    if out_file is not None:
        result.to_csv(out_file, index=False)
    print(strategies_text(result))
