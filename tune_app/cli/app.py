"""The `medtune` command: parses, calls one function, returns an exit code.

Exit codes: 0 done; 1 something the user can fix, reported in a line; 2 usage; 3 the study ended with failed trials.
Results go to stdout, everything else to stderr, so that pipes work. Nothing heavy is imported before a command needs it.
"""

import itertools
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from trainables import medtune_version
from trainables.checkpoints import is_disk_full
from trainables.config import FineTuneConfig, as_scalar, build_config
from trainables.data.storage import absolute
from trainables.machine.safe_path import search_variables
from trainables.machine.this_machine import settle_user
from tune_app.cli import cluster as cli_cluster
from tune_app.cli import models as cli_models
from tune_app.cli import results as cli_results
from tune_app.cli import serve as cli_serve
from tune_app.cli import studies as cli_studies
from tune_app.cli.bench import bench_app
from tune_app.cli.common import (
    CacheOption,
    DataOption,
    OutOption,
    SetOption,
    WeightsOption,
    cache_folder,
    err,
    out,
    parse_settings,
    stated,
    to_stderr,
    write_any_name,
)
from tune_app.cli.data import data_app, weights_app
from tune_app.driver.stopping import exit_code_at_start

OURS = {"tune_app", "search_spaces", "trainables"}

PANELS = {
    "Start": ("demo", "init"),
    "Data": ("data",),
    "Train": ("train", "config", "weights"),
    "Search": ("run", "resume", "spaces", "fixes"),
    "Look": ("results", "report", "serve", "fetch"),
    "Compare": ("ablate", "confirm", "backtest"),
    "Models": ("export", "retrain", "predict"),
    "Clusters": ("submit", "jobs", "doctor"),
    "Tools": ("bench",),
}
"""The commands by task, in the order in which the help lists them."""


class ByTask(TyperGroup):
    """Lists the commands by `PANELS`."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order of the panels."""
        return [name for names in PANELS.values() for name in names]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command with the panel it is listed in, None for an unknown name."""
        command: Any = super().get_command(ctx, cmd_name)
        if command is not None:
            command.rich_help_panel = next(
                panel for panel, names in PANELS.items() if cmd_name in names
            )
        return command


app = typer.Typer(
    name="medtune",
    cls=ByTask,
    help="Search the hyperparameters of fine-tuning a MedicalNet 3D ResNet on imbalanced medical volumes.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


MOST_PROBLEMS = 40
"""Problems that are printed one by one."""


def main() -> None:
    """Entry point: errors of our own packages become one line each; anything else is a bug and keeps its traceback."""
    write_any_name()
    os.environ.update(search_variables())
    if (homeless := settle_user()) is not None:
        to_stderr(f"note: {homeless}")
    try:
        app()
    except KeyboardInterrupt as error:
        sys.exit(exit_code_at_start(error))
    except Exception as error:
        if "--debug" in sys.argv or not _is_ours(error):
            raise
        lines = getattr(error, "problems", None) or _told(error).splitlines()
        for line in lines[:MOST_PROBLEMS]:
            to_stderr(f"error: {line}")
        if len(lines) > MOST_PROBLEMS:
            to_stderr(f"error: ... and {len(lines) - MOST_PROBLEMS} more problems")
        sys.exit(1)


def _is_ours(error: Exception) -> bool:
    """Whether the user can do something about it: our own errors, and files of wrong content."""
    of_a_file = isinstance(error, OSError) and (error.filename is not None or is_disk_full(error))
    return of_a_file or type(error).__module__.split(".")[0] in OURS


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        told = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return f"{told}: make room, or name another place" if is_disk_full(error) else told
    return str(error)


def _print_version(asked: bool) -> None:
    if asked:
        out.print(medtune_version())
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr
    )


# One run ---------------------------------------------------------------------------------------------------------------


LrOption = Annotated[
    float | None, typer.Option("--lr", "--backbone-lr", help="Peak rate of the backbone.")
]
ClassifierLrOption = Annotated[
    float | None,
    typer.Option(
        "--classifier-lr", help="Peak rate of the head; 10 x --lr when only that is given."
    ),
]
BatchSizeOption = Annotated[
    int | None, typer.Option("--batch_size", "--batch-size", help="Volumes a micro-batch.")
]
OptimizerOption = Annotated[str | None, typer.Option("--optimizer", help="adam, adamw or sgd.")]
LossOption = Annotated[str | None, typer.Option("--loss", help="LDAM, cross_entropy or focal.")]
SchedulerOption = Annotated[str | None, typer.Option("--scheduler", help="cosine or constant.")]
MaxMOption = Annotated[float | None, typer.Option("--max-m", help="Margin of the rarest class.")]
DrwStartEpochOption = Annotated[
    int | None, typer.Option("--drw-start-epoch", help="First epoch with class weights.")
]
GradClipOption = Annotated[
    float | None, typer.Option("--grad-clip", help="Largest gradient norm; 0 for none.")
]
EmaDecayOption = Annotated[
    float | None, typer.Option("--ema-decay", help="Decay of the averaged weights.")
]
GradientAccumulationStepsOption = Annotated[
    int | None,
    typer.Option(
        "--gradient_accumulation_steps",
        "--gradient-accumulation-steps",
        help="Micro-batches an update.",
    ),
]
FreezeBackboneEpochsOption = Annotated[
    int | None,
    typer.Option("--freeze-backbone-epochs", help="Epochs in which only the head trains."),
]
MultiGpuOption = Annotated[
    bool, typer.Option("--multi_gpu", "--multi-gpu", help="All GPUs of this machine.")
]
GpuOption = Annotated[
    bool,
    typer.Option("--gpu/--no-gpu", help="Use a GPU; without one, use the CPU and print a note."),
]
AmpOption = Annotated[
    bool | None, typer.Option("--amp/--no-amp", help="Half precision on the GPU.")
]


@app.command()
def train(
    data: DataOption,
    fold: Annotated[int | None, typer.Option("--fold", help="Fold that validates.")] = None,
    pretrained_path: WeightsOption = None,
    lr: LrOption = None,
    classifier_lr: ClassifierLrOption = None,
    batch_size: BatchSizeOption = None,
    epochs: Annotated[int | None, typer.Option("--epochs")] = None,
    optimizer: OptimizerOption = None,
    loss: LossOption = None,
    scheduler: SchedulerOption = None,
    max_m: MaxMOption = None,
    s: Annotated[float | None, typer.Option("--s", help="Scale of the logits.")] = None,
    drw_start_epoch: DrwStartEpochOption = None,
    grad_clip: GradClipOption = None,
    ema_decay: EmaDecayOption = None,
    dropout: Annotated[float | None, typer.Option("--dropout", help="Before the head.")] = None,
    gradient_accumulation_steps: GradientAccumulationStepsOption = None,
    freeze_backbone_epochs: FreezeBackboneEpochsOption = None,
    multi_gpu: MultiGpuOption = False,
    gpu: GpuOption = True,
    amp: AmpOption = None,
    setting: SetOption = None,
    out_folder: OutOption = None,
    cache: CacheOption = None,
) -> None:
    """Fine-tune once, a line an epoch. The same command again continues from the last checkpoint in --out."""
    given: dict[str, Any] = {
        "fold": fold,
        "pretrained_path": pretrained_path and absolute(pretrained_path),
        "backbone_lr": lr,
        "classifier_lr": classifier_lr if classifier_lr is not None or lr is None else 10 * lr,
        "batch_size": batch_size,
        "epochs": epochs,
        "optimizer": optimizer and optimizer.lower(),
        "loss": loss and loss.lower(),
        "scheduler": scheduler and scheduler.lower(),
        "max_m": max_m,
        "s": s,
        "drw_start_epoch": drw_start_epoch,
        "grad_clip": grad_clip,
        "ema_decay": ema_decay,
        "dropout": dropout,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "freeze_backbone_epochs": freeze_backbone_epochs,
        "amp": {None: None, True: "fp16", False: "off"}[amp],
    }
    config = build_config(stated(given) | parse_settings(setting))
    folder = out_folder or Path("studies") / time.strftime("train-%Y%m%d-%H%M%S")
    to_stderr(f"run: {folder}")  # before torch is loaded
    from tune_app.driver.single_run import train_once

    raise typer.Exit(
        train_once(
            config,
            data,
            folder,
            cache_folder(cache),
            gpu=gpu,
            multi_gpu=multi_gpu,
            console=out,
            notes=err,
        )
    )


@app.command()
def config(
    setting: SetOption = None,
    output: Annotated[
        Literal["table", "json"], typer.Option("--format", help="table or json.")
    ] = "table",
) -> None:
    """List every hyperparameter: value, effect and unit."""
    checked = build_config(parse_settings(setting))
    if output == "json":
        print(json.dumps(checked.model_dump(mode="json"), indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", no_wrap=True)
    table.add_column("value", no_wrap=True)
    table.add_column("effect")
    for name, field in FineTuneConfig.model_fields.items():
        table.add_row(
            name, _plain(as_scalar(name, getattr(checked, name))), field.description or ""
        )
    out.print(table)


def _plain(value: object) -> str:
    if value is None:
        return "-"
    return str(value) if value != "" else repr(value)


# Studies ---------------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for everything.")] = Path(
        "medtune-demo"
    ),
    trials: Annotated[int, typer.Option("--trials", min=2, help="Trials of the search.")] = 10,
    epochs: Annotated[int, typer.Option("--epochs", min=3, help="Epochs of a full trial.")] = 10,
) -> None:
    """Search, confirm and report on synthetic scans: minutes on two CPU cores, runs that collapse among them."""
    err.print(
        "demo: writing a synthetic cohort and pretraining a small network"
    )  # before torch is loaded
    from tune_app.demo import run_demo

    raise typer.Exit(run_demo(folder, trials=trials, epochs=epochs, console=err, results=out))


# What there is to search -----------------------------------------------------------------------------------------------


@app.command()
def fixes(
    output: Annotated[
        Literal["table", "markdown"],
        typer.Option("--format", help="table, or the README's own Markdown."),
    ] = "table",
) -> None:
    """Show the documented fixes: values before and after, reason and source."""
    from search_spaces.fixes import fix_rows, fixes_markdown

    if output == "markdown":
        print(fixes_markdown(), end="")
        return
    for row in fix_rows():
        out.print(f"[bold]{row.title}[/bold] ({row.key})")
        for before, after in zip(row.before, row.after, strict=True):
            out.print(f"  {before} -> {after.rpartition(' ')[2]}", markup=False)
        out.print(Padding(Text(f"{row.why} [{row.source}]"), (0, 0, 1, 2), expand=False))


@app.command()
def spaces(name: Annotated[str | None, typer.Argument(help="One space in full.")] = None) -> None:
    """List the search spaces, or show one: its searched, its retuned (to be fair) and its fixed parameters."""
    from search_spaces.spaces import SPACES
    from search_spaces.written import space_from

    if name is not None:
        _show_space(space_from(name))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("space", no_wrap=True)
    table.add_column("varied parameters")
    table.add_column("sampled", justify="right")
    for space in SPACES.values():
        table.add_row(space.name, space.title, str(len(space.parameters)))
    out.print(table)
    out.print(
        "\n`medtune spaces NAME` shows one; a study file may hold one of your own", markup=False
    )


def _show_space(space: Any) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    out.print(f"[bold]{space.name}[/bold]: {space.title}\n")
    for heading in ("parameter", "range or value", "before", "default"):
        names = heading in ("parameter", "range or value")
        table.add_column(
            heading, no_wrap=heading != "range or value", justify="left" if names else "right"
        )
    titles = {"searched": "searched:", "retuned": "retuned, to be fair:", "fixed": "fixed:"}
    told: dict[str, list[str]] = {}
    for role, rows in itertools.groupby(space.describe(), key=lambda row: row.role):
        table.add_row(titles[role])
        for row in rows:
            table.add_row(f"  {row.name}", row.values, row.before or "-", row.default)
            said = "; ".join(
                filter(None, [row.why, f"read only when {row.when}" if row.when else ""])
            )
            told.setdefault(said, []).append(row.name)
    out.print(table)
    out.print()
    notes = [f"{', '.join(names)}: {said}" for said, names in told.items() if said]
    for note in [*notes, *space.notes]:
        out.print(note, markup=False)


# Ablation, confirmation, study file ------------------------------------------------------------------------------------


app.add_typer(cli_studies.app)
app.add_typer(cli_results.app)
app.add_typer(data_app, name="data")
app.add_typer(weights_app, name="weights")
app.add_typer(bench_app, name="bench")
app.add_typer(cli_models.app)
app.add_typer(cli_cluster.app)
app.add_typer(cli_cluster.jobs_app, name="jobs")
app.add_typer(cli_serve.app)

if __name__ == "__main__":
    main()
