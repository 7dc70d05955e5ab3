"""The commands around a cohort and a checkpoint: `medtune data`, `medtune weights`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from trainables.config import build_config, class_numbers
from tune_app.cli.common import (
    CacheOption,
    DataOption,
    SetOption,
    cache_folder,
    err,
    out,
    parse_settings,
    progress_bar,
    to_stderr,
    to_stdout,
)

data_app = typer.Typer(
    help="Tables of volumes: make, check, prepare, import.", no_args_is_help=True
)
weights_app = typer.Typer(
    help="MedicalNet checkpoints: check, fetch, make one.", no_args_is_help=True
)

# Data ------------------------------------------------------------------------------------------------------------------


@data_app.command("check")
def data_check(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet table.")],
    setting: SetOption = None,
) -> None:
    """Report every problem of every row at once; reads each volume."""
    from trainables.data.manifest_check import check_manifest
    from trainables.data.table_file import ManifestError

    checked = build_config(parse_settings(setting))
    with progress_bar("checking") as progress:
        report = check_manifest(
            table, num_classes=checked.num_classes, config=checked, progress=progress
        )
    if report.problems:
        raise ManifestError(report.problems)
    for line in report.lines():
        out.print(line, markup=False)


@data_app.command("table")
def data_table(
    scans: Annotated[
        Path, typer.Argument(help="Folder of scans: plain, BIDS, or nnU-Net's imagesTr.")
    ],
    labels: Annotated[Path, typer.Argument(help="Label sheet: CSV, TSV, XLSX or JSON.")],
    table: Annotated[Path, typer.Argument(help="Table to write (CSV).")],
    id_column: Annotated[
        str | None, typer.Option("--id", help="Column that names the scans; default: guessed.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option("--label", help="Column of the label; default: guessed.")
    ] = None,
    subject: Annotated[
        str | None,
        typer.Option("--subject", help="Column of the subject, or a pattern with one group."),
    ] = None,
    one_subject_per_scan: Annotated[
        bool, typer.Option("--one-subject-per-scan", help="Every scan is of another person.")
    ] = False,
    positive: Annotated[
        str | None, typer.Option("--positive", help="Label of class 1; all others are class 0.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option("--classes", metavar="LABEL=N,...", help="Class number of each label."),
    ] = None,
    pattern: Annotated[
        str, typer.Option("--scans", metavar="GLOB", help="Which files are scans: *_T1w.nii.gz")
    ] = "*",
    dicom: Annotated[
        bool, typer.Option("--dicom", help="SCANS is a DICOM folder: convert it with dcm2niix.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing table.")] = False,
) -> None:
    """Join a folder of scans with a label sheet; guesses and mismatches are shown.

    Example: medtune data table scans/ labels.xlsx table.csv --positive malignant --subject patient
    """
    from trainables.data.table_making import JoinOptions, convert_dicom, join_table, write_table

    if dicom:
        converted = table.parent / f"{table.stem}-nifti"
        for line in convert_dicom(scans, converted):
            to_stdout(line)
        scans = converted
    options = JoinOptions(
        id_column, label_column, subject, one_subject_per_scan, positive, _classes(classes), pattern
    )
    joined = join_table(scans, labels, options)
    write_table(joined, table, force=force)
    for line in joined.lines:
        to_stdout(line)
    to_stdout(f"{table}: {len(joined.rows)} rows; next: medtune data check {table}")


def _classes(text: str | None) -> dict[str, int]:
    """`benign=0,malignant=1` as a mapping."""
    try:
        return class_numbers(text or "")
    except ValueError as error:
        raise typer.BadParameter(f"--classes {error}") from None


@data_app.command("view")
def data_view(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet table.")],
    out_file: Annotated[
        Path | None, typer.Option("--out", help="HTML file; default: TABLE's name with .html.")
    ] = None,
    per_class: Annotated[
        int, typer.Option("--per-class", min=1, help="Volumes shown of each class.")
    ] = 12,
    setting: SetOption = None,
) -> None:
    """Write a page of the prepared volumes, the odd ones first, with recommended preprocessing and reasons."""
    from trainables.data.manifest import read_manifest
    from tune_app.report.cohort_view import write_cohort_view

    checked = build_config(parse_settings(setting))
    manifest = read_manifest(table, num_classes=checked.num_classes, classes=checked.classes)
    path = out_file or table.with_suffix(".html")
    with progress_bar("reading") as progress:
        advice = write_cohort_view(
            manifest,
            checked,
            path,
            per_class=per_class,
            class_names=checked.class_names or manifest.class_names,
            progress=progress,
        )
    for one in advice:
        to_stdout(f"recommended {one.line}")
    to_stdout(f"page written: {path}")


@data_app.command("prepare")
def data_prepare(
    table: Annotated[Path, typer.Argument(help="CSV or Parquet table.")],
    setting: SetOption = None,
    cache: CacheOption = None,
) -> None:
    """Read every volume once into one array on disk; every trial maps it. Again is instant."""
    from trainables.data.manifest import read_manifest
    from trainables.data.scans import Recipe
    from trainables.data.spacing import with_common_spacing
    from trainables.data.volumes import open_cohort, prepare_cohort

    checked = build_config(parse_settings(setting))
    manifest = read_manifest(table, num_classes=checked.num_classes, classes=checked.classes)
    checked, spacing = with_common_spacing(checked, manifest)
    for line in spacing.lines() if spacing else []:
        to_stderr(line)
    with progress_bar("preparing") as progress:
        folder = prepare_cohort(
            manifest, Recipe.from_config(checked), cache_folder(cache), progress=progress
        )
    volumes = open_cohort(folder).volumes
    out.print(
        f"{len(volumes)} volumes of {'x'.join(map(str, volumes.shape[2:]))} voxels, {volumes.nbytes / 2**20:.0f} MiB"
    )
    to_stdout(str(folder))


@data_app.command("import")
def data_import(
    file: Annotated[Path, typer.Argument(help="MedMNIST 3D archive (.npz).")],
    folder: Annotated[Path, typer.Argument(help="Where the volumes and table.csv go.")],
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Volumes of each split, the first ones.")
    ] = None,
) -> None:
    """Write a MedMNIST archive as NIfTI files and a table with its official split."""
    from trainables.data.medmnist import import_medmnist

    table = import_medmnist(file, folder, limit=limit)
    to_stdout(str(table))


@data_app.command("sample")
def data_sample(
    folder: Annotated[Path, typer.Argument(help="New folder for the cohort and a study file.")],
) -> None:
    """Write a synthetic cohort to try things on, with a study file; print the commands that come next."""
    to_stderr("writing a cohort and pretraining a small network on other shapes")
    from tune_app.demo import SUBJECTS, next_commands, write_sample

    write_sample(folder)
    to_stdout(f"{folder}: a cohort of {SUBJECTS} subjects in two classes, and study.yaml; next:")
    for command in next_commands(folder):
        to_stdout(f"  {command}")


# Weights ---------------------------------------------------------------------------------------------------------------


@weights_app.command("check")
def weights_check(
    file: Annotated[Path, typer.Argument(help="Checkpoint file.")],
    setting: SetOption = None,
) -> None:
    """Show the content of a checkpoint, and whether it fills a network: its own, or with --set the one that is set."""
    from trainables.network.weights import inspect_weights, load_pretrained

    if setting:
        from trainables.network.model import configured_network

        report = load_pretrained(configured_network(build_config(parse_settings(setting))), file)
    else:
        report = inspect_weights(file)
    for line in report.lines():
        out.print(line, markup=False)


@weights_app.command("fetch")
def weights_fetch(
    name: Annotated[str, typer.Argument(help="resnet10 ... resnet200.")],
    folder: Annotated[Path, typer.Option("--to", help="Where to put it.")] = Path("pretrained"),
) -> None:
    """Download an official MedicalNet checkpoint and verify it."""
    from trainables.network.weights import fetch

    to_stderr(f"fetching {name}; without a network this ends after half a minute of retries")
    to_stdout(str(fetch(name, folder)))


@weights_app.command("pretrain")
def weights_pretrain(
    data: DataOption,
    folder: Annotated[Path, typer.Option("--out", help="Where weights and table go.")],
    pretext: Annotated[
        Literal["rotation", "size"],
        typer.Option("--pretext", help="rotation: how was it turned? size: how much does it fill?"),
    ] = "rotation",
    share: Annotated[
        float, typer.Option("--share", help="Of the training subjects, in tenths.")
    ] = 0.5,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Passes over the pretext's volumes.")
    ] = None,
    gpu: Annotated[
        bool, typer.Option("--gpu/--no-gpu", help="Use a GPU; without one the CPU, and a note.")
    ] = True,
    setting: SetOption = None,
    cache: CacheOption = None,
) -> None:
    """Pretrain on a share of your own training subjects, without labels; write a MedicalNet file and the other rows."""
    settings = parse_settings(setting) | ({} if epochs is None else {"epochs": epochs})
    from tune_app.models.pretrain import pretrain

    pretrain(
        data,
        folder,
        cache_folder(cache),
        pretext=pretext,
        share=share,
        settings=settings,
        gpu=gpu,
        console=out,
        notes=err,
    )
