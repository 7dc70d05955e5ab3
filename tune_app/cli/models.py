"""The commands from a trained study to a model and its predictions: `medtune export`, `retrain`, `predict`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tune_app.cli.common import CacheOption, DeviceOption, to_stderr, to_stdout

app = typer.Typer()

TrialOption = Annotated[str | None, typer.Option("--trial", help="Trial by its id.")]
BestOption = Annotated[
    bool, typer.Option("--best", help="The best trial; so it is without another choice.")
]
ConfirmedOption = Annotated[
    bool, typer.Option("--confirmed", help="The choice of the study's confirmation.")
]
ModelOption = Annotated[Path, typer.Option("--out", help="Folder of the model.")]
MovedOption = Annotated[
    Path | None, typer.Option("--data", help="Table of volumes, where it has moved.")
]
OnnxOption = Annotated[
    bool, typer.Option("--onnx", help="Write model.onnx too, checked against torch.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace a model that is there.")]


@app.command()
def export(
    study: Annotated[
        Path, typer.Argument(help="Folder of the study, or of a run of medtune train.")
    ],
    out_folder: ModelOption,
    trial: TrialOption = None,
    along: Annotated[
        list[str] | None,
        typer.Option(
            "--with", metavar="TRIAL", help="With --trial: another one of an ensemble; repeatable."
        ),
    ] = None,
    best: BestOption = False,
    confirmed: ConfirmedOption = False,
    ensemble: Annotated[
        int | None, typer.Option("--ensemble", metavar="K", help="The K best together.")
    ] = None,
    data: MovedOption = None,
    cache: CacheOption = None,
    device: DeviceOption = "auto",
    onnx: OnnxOption = False,
    force: ForceOption = False,
) -> None:
    """Write a trial as a model: weights, threshold, calibration, model card and checksums in one folder."""
    from tune_app.models.export import export_model, outcome_lines
    from tune_app.models.model import choose_device

    _refuse_two_choices(trial, along, best, confirmed, ensemble)
    info = export_model(
        study,
        out_folder,
        trial=trial,
        along=along or (),
        confirmed=confirmed,
        ensemble=ensemble,
        data=data,
        cache=cache,
        device=choose_device(device),
        onnx=onnx,
        force=force,
        say=to_stderr,
    )
    for line in outcome_lines(info, out_folder):
        to_stdout(line)


def _refuse_two_choices(
    trial: str | None, along: list[str] | None, best: bool, confirmed: bool, ensemble: int | None
) -> None:
    if trial is not None and (best or confirmed or ensemble):
        raise typer.BadParameter(
            "--trial already is a choice: leave out --best, --confirmed and --ensemble"
        )
    if along and trial is None:
        raise typer.BadParameter("--with goes with --trial, which names the first trial")
    if best and confirmed:
        raise typer.BadParameter("--best or --confirmed, not both")


@app.command()
def retrain(
    study: Annotated[Path, typer.Argument(help="Folder of the study.")],
    out_folder: ModelOption,
    trial: TrialOption = None,
    best: BestOption = False,
    confirmed: ConfirmedOption = False,
    data: MovedOption = None,
    cache: CacheOption = None,
    device: DeviceOption = "auto",
    onnx: OnnxOption = False,
    force: ForceOption = False,
) -> None:
    """Train the chosen configuration on training and validation volumes together; write it as a model."""
    from tune_app.models.export import outcome_lines
    from tune_app.models.model import choose_device
    from tune_app.models.retrain import retrain_model

    if (trial is not None) + best + confirmed > 1:
        raise typer.BadParameter("one of --trial, --best and --confirmed")
    info = retrain_model(
        study,
        out_folder,
        trial=trial,
        confirmed=confirmed,
        data=data,
        cache=cache,
        device=choose_device(device),
        onnx=onnx,
        force=force,
        say=to_stderr,
    )
    for line in outcome_lines(info, out_folder):
        to_stdout(line)


@app.command()
def predict(
    model: Annotated[
        Path, typer.Argument(help="Folder of an exported model, or of a run of medtune train.")
    ],
    paths: Annotated[
        list[Path],
        typer.Argument(help="NIfTI files, folders of them, or tables with a column path."),
    ],
    out_file: Annotated[
        Path | None, typer.Option("--out", help="CSV file; default: standard output.")
    ] = None,
    device: DeviceOption = "auto",
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Volumes scored at a time.")
    ] = 8,
    explain: Annotated[
        Path | None,
        typer.Option("--explain", metavar="FOLDER", help="Write a Grad-CAM of each volume."),
    ] = None,
    explain_layer: Annotated[
        Literal["layer4", "layer3", "layer2", "layer1"],
        typer.Option(
            "--explain-layer",
            metavar="LAYER",
            help="layer4 to layer1: lower ones locate better, mean less.",
        ),
    ] = "layer4",
    by_subject: Annotated[
        Path | None,
        typer.Option("--by-subject", metavar="FILE", help="Second CSV: one row per subject."),
    ] = None,
    pool: Annotated[
        Literal["mean", "max"],
        typer.Option("--pool", help="Score of a subject: mean or max over its volumes."),
    ] = "mean",
) -> None:
    """Score volumes with an exported model: CSV with decision, calibrated probabilities and scores."""
    from tune_app.models.predict import run_predict

    raise typer.Exit(
        run_predict(
            model,
            paths,
            out_file,
            device=device,
            batch_size=batch_size,
            explain=explain,
            explain_layer=explain_layer,
            say=to_stderr,
            by_subject=by_subject,
            pool=pool,
        )
    )
