"""The commands around a cohort, a checkpoint and this machine: `medtune data`, `medtune weights`, `medtune bench`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from trainables.config import build_config
from tune_app.cli_common import (
    CacheOption,
    DeviceOption,
    SetOption,
    cache_folder,
    out,
    parse_settings,
    progress_bar,
    to_stderr,
)

data_app = typer.Typer(help="Tables of volumes: check, prepare, import.", no_args_is_help=True)
weights_app = typer.Typer(help="MedicalNet checkpoints: check, fetch.", no_args_is_help=True)
bench_app = typer.Typer(help="Speed, measured on this machine.", no_args_is_help=True)

# Data ------------------------------------------------------------------------------------------------------------------


@data_app.command("check")
def data_check(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet table.")],
    setting: SetOption = None,
) -> None:
    """Tell every problem of every row at once; reads each volume."""
    from trainables.manifest import ManifestError, check_manifest

    checked = build_config(parse_settings(setting))
    with progress_bar("checking") as progress:
        report = check_manifest(table, num_classes=checked.num_classes, config=checked, progress=progress)
    if report.problems:
        raise ManifestError(report.problems)
    for line in report.lines():
        out.print(line, markup=False)


@data_app.command("prepare")
def data_prepare(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet table.")],
    setting: SetOption = None,
    cache: CacheOption = None,
) -> None:
    """Read every volume once into one array on disk; every trial maps it. Again is instant."""
    from trainables.manifest import read_manifest
    from trainables.volumes import Recipe, open_cohort, prepare_cohort

    checked = build_config(parse_settings(setting))
    manifest = read_manifest(table, num_classes=checked.num_classes)
    with progress_bar("preparing") as progress:
        folder = prepare_cohort(manifest, Recipe.from_config(checked), cache_folder(cache), progress=progress)
    volumes = open_cohort(folder).volumes
    out.print(
        f"{len(volumes)} volumes of {'x'.join(map(str, volumes.shape[2:]))} voxels, {volumes.nbytes / 2**20:.0f} MiB"
    )
    out.print(str(folder), soft_wrap=True)


@data_app.command("import")
def data_import(
    file: Annotated[Path, typer.Argument(help="MedMNIST 3D archive (.npz).")],
    folder: Annotated[Path, typer.Argument(help="Where the volumes and table.csv go.")],
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Volumes of each split, the first ones.")] = None,
) -> None:
    """Write a MedMNIST archive as NIfTI files and a table with its official split."""
    from trainables.volumes import import_medmnist

    table = import_medmnist(file, folder, limit=limit)
    out.print(str(table), soft_wrap=True)


# Weights ---------------------------------------------------------------------------------------------------------------


@weights_app.command("check")
def weights_check(file: Annotated[Path, typer.Argument(help="Checkpoint file.")]) -> None:
    """Say what a checkpoint holds, and whether it fills the network."""
    from trainables.weights import inspect_weights

    for line in inspect_weights(file).lines():
        out.print(line, markup=False)


@weights_app.command("fetch")
def weights_fetch(
    name: Annotated[str, typer.Argument(help="resnet10 ... resnet200.")],
    folder: Annotated[Path, typer.Option("--to", help="Where to put it.")] = Path("pretrained"),
) -> None:
    """Download an official MedicalNet checkpoint and verify it."""
    from trainables.weights import fetch

    out.print(str(fetch(name, folder)), soft_wrap=True)


# Speed -----------------------------------------------------------------------------------------------------------------


@bench_app.command("train")
def bench_train_command(
    sizes: Annotated[str, typer.Option("--sizes", help="Voxels a side, separated by commas.")] = "64,96,128",
    geometries: Annotated[str, typer.Option("--geometries", help="strided, dilated or both.")] = "strided,dilated",
    batches: Annotated[str, typer.Option("--batches", help="Batch size x accumulation steps.")] = "6x2,24x1",
    depth: Annotated[int, typer.Option("--depth")] = 50,
    width: Annotated[float, typer.Option("--width", help="Factor on all channels.")] = 1.0,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Optimiser steps an epoch.")] = 24,
    variants: Annotated[
        str, typer.Option("--variants", help="plain, plain_augmented, eager (no CUDA graphs), ours.")
    ] = "plain,ours",
    device: DeviceOption = "auto",
    out_file: Annotated[Path | None, typer.Option("--out", help="JSON file of everything measured.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """Time whole training steps: a plain loop against medtune's own, side by side."""
    from tune_app.bench import bench_train, markdown_table, parse_batches, result_table
    from tune_app.predict import choose_device

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
        record=lambda so_far: out_file.write_text(json.dumps(so_far, indent=1) + "\n") if out_file else None,
    )
    if markdown:
        print(markdown_table(result))
    else:
        out.print(result_table(result))


def _whole_numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} {text!r}: whole numbers separated by commas") from None


@bench_app.command("data")
def bench_data_command(
    size: Annotated[int, typer.Option("--size", min=8, help="Voxels a side.")] = 96,
    subjects: Annotated[int, typer.Option("--subjects", min=2, help="Subjects, of one to three volumes each.")] = 24,
    out_file: Annotated[Path | None, typer.Option("--out", help="JSON file of everything measured.")] = None,
) -> None:
    """Time reading a cohort: decoded each time, through MONAI's PersistentDataset, and prepared."""
    import tempfile

    from tune_app.bench import bench_data, data_table

    with tempfile.TemporaryDirectory() as folder:
        result = bench_data(size=size, subjects=subjects, folder=Path(folder), say=to_stderr)
    if out_file is not None:
        out_file.write_text(json.dumps(result, indent=1) + "\n")
    out.print(data_table(result))


@bench_app.command("results")
def bench_results_command(
    trials: Annotated[int, typer.Option("--trials", min=4, help="Trials of the study.")] = 1000,
    epochs: Annotated[int, typer.Option("--epochs", min=24, help="Epochs of each.")] = 60,
    out_file: Annotated[Path | None, typer.Option("--out", help="JSON file of everything measured.")] = None,
) -> None:
    """Time loading a study, its leaderboard, importance and report, and tell the memory they take."""
    import tempfile

    from tune_app.bench_results import bench_results, results_line, results_table_of

    with tempfile.TemporaryDirectory() as folder:
        result = bench_results(trials=trials, epochs=epochs, folder=Path(folder), say=to_stderr)
    if out_file is not None:
        out_file.write_text(json.dumps(result, indent=1) + "\n")
    out.print(results_line(result), soft_wrap=True)
    out.print(results_table_of(result))


@bench_app.command("overhead")
def bench_overhead_command(
    trials: Annotated[int, typer.Option("--trials", min=2, help="Trials on each side.")] = 1000,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Rows a trial reports.")] = 1,
    turns: Annotated[int, typer.Option("--turns", min=1, help="Turns the sides take, each of equal size.")] = 10,
    concurrent: Annotated[
        int | None, typer.Option("--max-concurrent", min=1, help="Trials at a time; default: one a CPU.")
    ] = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="JSON file of everything measured.")] = None,
) -> None:
    """Time trials that train nothing: a study of ours against bare Ray Tune with OptunaSearch, in turns."""
    import tempfile

    from tune_app.bench_overhead import bench_overhead, overhead_table

    with tempfile.TemporaryDirectory() as folder:
        result = bench_overhead(
            trials=trials,
            epochs=epochs,
            turns=min(turns, trials),
            concurrent=concurrent,
            folder=Path(folder),
            say=to_stderr,
            record=lambda so_far: out_file.write_text(json.dumps(so_far, indent=1) + "\n") if out_file else None,
        )
    out.print(overhead_table(result))
