"""The `medtune` command: parses, calls one function, returns an exit code.

Exit codes: 0 done; 1 something the user can fix, told in a line; 2 usage; 3 the study ended with failed trials.
Results go to stdout, everything else to stderr, so that pipes work. Nothing heavy is imported before a command needs it.
"""

import itertools
import json
import logging
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trainables.checkpoints import is_disk_full
from trainables.config import FineTuneConfig, build_config
from tune_app.cli import cluster as cli_cluster
from tune_app.cli import models as cli_models
from tune_app.cli import serve as cli_serve
from tune_app.cli.bench import bench_app
from tune_app.cli.common import (
    AddressOption,
    CacheOption,
    ConcurrentOption,
    DataOption,
    GpusOption,
    OutOption,
    RetryOption,
    SetOption,
    WeightsOption,
    cache_folder,
    elsewhere,
    err,
    gpus_option,
    out,
    parse_settings,
)
from tune_app.cli.data import data_app, weights_app
from tune_app.study.objective import DEFAULT_OBJECTIVE, OBJECTIVES

OURS = {"tune_app", "search_spaces", "trainables"}

app = typer.Typer(
    name="medtune",
    help="Search the hyperparameters of fine-tuning a MedicalNet 3D ResNet on imbalanced medical volumes.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point: errors of our own packages become one line each; anything else is a bug and keeps its traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if "--debug" in sys.argv or not _is_ours(error):
            raise
        for line in getattr(error, "problems", None) or _told(error).splitlines():
            err.print(f"error: {line}", style="red", markup=False, soft_wrap=True)
        sys.exit(1)


def _is_ours(error: Exception) -> bool:
    """Whether the user can do something about it: our own errors, and files that are not what they should be."""
    of_a_file = isinstance(error, OSError) and (error.filename is not None or is_disk_full(error))
    return of_a_file or type(error).__module__.split(".")[0] in OURS


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _print_version(asked: bool) -> None:
    if asked:
        out.print(metadata.version("medtune"))
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


@app.command()
def train(
    data: DataOption,
    fold: Annotated[int | None, typer.Option("--fold", help="Fold that validates.")] = None,
    pretrained_path: WeightsOption = None,
    lr: Annotated[
        float | None, typer.Option("--lr", "--backbone-lr", help="Peak rate of the backbone.")
    ] = None,
    classifier_lr: Annotated[
        float | None,
        typer.Option(
            "--classifier-lr", help="Peak rate of the head; 10 x --lr when only that is given."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch_size", "--batch-size", help="Volumes a micro-batch.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs")] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", help="adam, adamw or sgd.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option("--loss", help="LDAM, cross_entropy or focal.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", help="cosine or constant.")
    ] = None,
    max_m: Annotated[
        float | None, typer.Option("--max-m", help="Margin of the rarest class.")
    ] = None,
    s: Annotated[float | None, typer.Option("--s", help="Scale of the logits.")] = None,
    drw_start_epoch: Annotated[
        int | None, typer.Option("--drw-start-epoch", help="First epoch with class weights.")
    ] = None,
    grad_clip: Annotated[
        float | None, typer.Option("--grad-clip", help="Largest gradient norm; 0 for none.")
    ] = None,
    ema_decay: Annotated[
        float | None, typer.Option("--ema-decay", help="Decay of the averaged weights.")
    ] = None,
    dropout: Annotated[float | None, typer.Option("--dropout", help="Before the head.")] = None,
    gradient_accumulation_steps: Annotated[
        int | None,
        typer.Option(
            "--gradient_accumulation_steps",
            "--gradient-accumulation-steps",
            help="Micro-batches an update.",
        ),
    ] = None,
    freeze_backbone_epochs: Annotated[
        int | None,
        typer.Option("--freeze-backbone-epochs", help="Epochs in which only the head trains."),
    ] = None,
    multi_gpu: Annotated[
        bool, typer.Option("--multi_gpu", "--multi-gpu", help="All GPUs of this machine.")
    ] = False,
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu/--no-gpu", help="Use a GPU; without one the run says so and uses the CPU."
        ),
    ] = True,
    amp: Annotated[
        bool | None, typer.Option("--amp/--no-amp", help="Half precision on the GPU.")
    ] = None,
    setting: SetOption = None,
    out_folder: OutOption = None,
    cache: CacheOption = None,
) -> None:
    """Fine-tune once, a line an epoch. The same command again goes on from the last checkpoint in --out."""
    given: dict[str, Any] = {
        "fold": fold,
        "pretrained_path": pretrained_path and str(pretrained_path),
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
        "amp": None if amp is None else ("fp16" if amp else "off"),
    }
    config = build_config(
        {k: v for k, v in given.items() if v is not None} | parse_settings(setting)
    )
    from tune_app.driver.single_run import train_once

    folder = out_folder or Path("studies") / time.strftime("train-%Y%m%d-%H%M%S")
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
        table.add_row(name, _plain(getattr(checked, name)), field.description or "")
    out.print(table)


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(f"{part:g}" for part in value)
    return "-" if value is None else (repr(value) if value == "" else str(value))


# Studies ---------------------------------------------------------------------------------------------------------------


@app.command()
def run(
    study_file: Annotated[
        Path | None, typer.Argument(help="Study file in YAML; options go before its fields.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Table of volumes.")] = None,
    space: Annotated[
        str | None, typer.Option("--space", help="Search space; `medtune spaces` lists them.")
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Trials to sample.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Epochs of a full trial.")] = None,
    sampler: Annotated[
        str | None, typer.Option("--sampler", help="tpe, random, qmc or gp.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the sampler.")] = None,
    pretrained_path: WeightsOption = None,
    gpus_per_trial: GpusOption = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", help="Processes a trial is spread over.")
    ] = None,
    cpus_per_rank: Annotated[
        int | None, typer.Option("--cpus-per-rank", help="CPU threads of each process.")
    ] = None,
    max_concurrent: ConcurrentOption = None,
    disk_budget: Annotated[
        float | None,
        typer.Option(
            "--disk-budget", help="GiB the study may take; the worst trials' weights go first."
        ),
    ] = None,
    warm_start_from: Annotated[
        list[Path] | None,
        typer.Option("--warm-start-from", help="Earlier study to learn from; may be repeated."),
    ] = None,
    log: Annotated[
        str | None, typer.Option("--log", help="tensorboard, mlflow or both: tensorboard,mlflow.")
    ] = None,
    wait_for_resources_s: Annotated[
        float | None,
        typer.Option(
            "--wait-for-resources", help="Seconds to wait for a cluster that scales itself up."
        ),
    ] = None,
    setting: SetOption = None,
    out_folder: OutOption = None,
    cache: CacheOption = None,
    address: AddressOption = None,
    go_on: Annotated[
        bool, typer.Option("--resume", help="Go on where --out holds this very study.")
    ] = False,
    retry_failed: RetryOption = False,
) -> None:
    """Search: sample, train, stop what collapses, write the study to --out. Ctrl-C leaves it resumable."""
    from trainables.data.storage import url_of
    from tune_app.study.spec import build_spec, read_study_file

    fields: dict[str, Any] = read_study_file(study_file) if study_file else {}
    given: dict[str, Any] = {
        "data": data and (url_of(data) or str(data.resolve())),
        "space": space,
        "trials": trials,
        "sampler": sampler,
        "seed": seed,
        "gpus_per_trial": gpus_option(gpus_per_trial),
        "ranks": ranks,
        "cpus_per_rank": cpus_per_rank,
        "max_concurrent": max_concurrent,
        "disk_budget_gib": disk_budget,
        "log": tuple(log.split(",")) if log else None,
        "wait_for_resources_s": wait_for_resources_s,
        "warm_start_from": tuple(str(path.resolve()) for path in warm_start_from)
        if warm_start_from
        else None,
        "cache": cache and str(cache.resolve()),
    }
    fields |= {name: value for name, value in given.items() if value is not None}
    settings = parse_settings(setting)
    settings |= {"epochs": epochs} if epochs is not None else {}
    settings |= {"pretrained_path": str(pretrained_path)} if pretrained_path is not None else {}
    fields["config"] = {**(fields.get("config") or {}), **settings}
    if "data" not in fields:
        raise typer.BadParameter(
            "name the table of volumes: --data TABLE, or data: in the study file"
        )
    spec = build_spec(fields)
    root = out_folder or Path("studies") / time.strftime(f"{spec.kind}-%Y%m%d-%H%M%S")
    if retry_failed and not go_on and elsewhere.get() is None:
        raise typer.BadParameter(
            "--retry-failed goes with --resume: only a study that is there has failed trials"
        )
    _run_and_tell(spec, root, address=address, resume=False, go_on=go_on, retry_failed=retry_failed)


@app.command()
def resume(
    study: Annotated[Path, typer.Argument(help="Folder of the study.")],
    address: AddressOption = None,
    retry_failed: RetryOption = False,
) -> None:
    """Go on with a study that was killed or interrupted: every trial from its own checkpoint, every decision kept."""
    from tune_app.study.mirror import opened
    from tune_app.study.spec import StudyFiles

    files = StudyFiles(opened(study)[0])
    files.require()
    _run_and_tell(files.read_spec(), study, address=address, resume=True, retry_failed=retry_failed)


def _run_and_tell(
    spec: Any,
    root: Path,
    *,
    address: str | None,
    resume: bool,
    go_on: bool = False,
    retry_failed: bool = False,
) -> None:
    if (send := elsewhere.get()) is not None:
        raise typer.Exit(send(spec, root, retry_failed))
    from trainables.data.storage import url_of
    from tune_app.driver.run import FAILED_TRIALS, INTERRUPTED, run_study
    from tune_app.report.summary import print_summary

    place = url_of(root) or root
    err.print(f"study: {place}", soft_wrap=True, markup=False)
    outcome = run_study(
        spec,
        root,
        console=err,
        notes=err,
        address=address,
        resume=resume,
        go_on=go_on,
        retry_failed=retry_failed,
    )
    print_summary(root, out)
    if outcome.exit_code == INTERRUPTED:
        err.print(f"interrupted; go on with: medtune resume {place}", soft_wrap=True, markup=False)
    elif outcome.exit_code == FAILED_TRIALS:
        err.print(
            f"try failed trials again with: medtune resume {place} --retry-failed",
            soft_wrap=True,
            markup=False,
        )
    raise typer.Exit(outcome.exit_code)


@app.command()
def results(
    studies: Annotated[list[Path], typer.Argument(help="Folders of studies.")],
    columns: Annotated[
        list[str] | None, typer.Option("--columns", help="Names or patterns, or all.")
    ] = None,
    sort: Annotated[
        list[str] | None, typer.Option("--sort", help="Column; a leading minus: largest first.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option("--where", help="Such as 'val_auc > 0.8'; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Rows at most.")] = None,
    output: Annotated[
        Literal["table", "csv", "json"], typer.Option("--format", help="table, csv or json.")
    ] = "table",
    csv: Annotated[
        Path | None,
        typer.Option("--csv", help="Write trials, epochs and decisions as CSV to this folder."),
    ] = None,
    parquet: Annotated[Path | None, typer.Option("--parquet", help="The same as Parquet.")] = None,
    skip_damage: Annotated[
        bool, typer.Option("--skip-damage", help="Leave damaged lines out and say which.")
    ] = False,
    meanings: Annotated[
        bool,
        typer.Option(
            "--meanings", help="List what columns there are, with type and meaning, instead."
        ),
    ] = False,
) -> None:
    """Show trials, best first; works while the study runs and after its driver was killed."""
    from tune_app.results.study import column_meanings, load_studies, load_study
    from tune_app.results.tables import matching, meanings_table, render_table, results_table

    on_damage: Literal["error", "skip"] = "skip" if skip_damage else "error"
    loaded = [load_study(path, on_damage=on_damage) for path in studies]
    for one in loaded:
        for note in one.notes:
            err.print(f"note: {note}", markup=False, soft_wrap=True)
        for write, folder in ((one.to_csv, csv), (one.to_parquet, parquet)):
            if folder is not None:
                target = folder if len(loaded) == 1 else folder / one.name
                for path in write(target):
                    err.print(str(path), markup=False, soft_wrap=True)
    subject = loaded[0] if len(loaded) == 1 else load_studies(studies, on_damage=on_damage)
    if meanings:
        table = matching(column_meanings(loaded[0] if len(loaded) == 1 else None), columns)
    else:
        table = results_table(
            subject,
            columns=columns,
            sort=sort or ("-objective", "number"),
            where=where or (),
            limit=limit,
        )
    if output == "csv":
        print(table.to_csv(index=False), end="")
    elif output == "json":
        print(table.to_json(orient="records", indent=1))
    elif meanings:
        out.print(meanings_table(table))
    elif table.empty:
        out.print("no trial has begun" if subject.trials.empty else "no trial fits --where")
    else:
        out.print(render_table(table, out.width if out.is_terminal else 80))


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="Folder of the study.")],
    compare: Annotated[
        Path | None, typer.Option("--compare", help="Another study to set beside it.")
    ] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="HTML file; default: report.html in the study.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write it again whenever the study has news.")
    ] = False,
) -> None:
    """Write the study as one self-contained HTML page."""
    from trainables.data.storage import url_of
    from tune_app.report.page import watch_report, write_comparison, write_report
    from tune_app.results.study import load_study

    if compare is not None and watch:
        raise typer.BadParameter(
            "--watch writes the page of one study: leave out --compare, or --watch"
        )
    if compare is not None:
        path = out_file or study / f"comparison-{compare.name}.html"
        write_comparison(load_study(study), load_study(compare), path)
    else:
        path = out_file or (Path("report.html") if url_of(study) else study / "report.html")
        write_report(load_study(study), path)
    out.print(str(path), soft_wrap=True, markup=False)
    if watch:
        watch_report(study, path, say=lambda text: err.print(text, markup=False))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for everything.")] = Path(
        "medtune-demo"
    ),
    trials: Annotated[int, typer.Option("--trials", min=2)] = 8,
    epochs: Annotated[int, typer.Option("--epochs", min=3)] = 12,
) -> None:
    """A search from volumes to report in minutes on two CPU cores: synthetic scans, runs that collapse among them."""
    from tune_app.demo import run_demo

    raise typer.Exit(run_demo(folder, trials=trials, epochs=epochs, console=err, results=out))


@app.command()
def backtest(
    studies: Annotated[
        list[Path] | None, typer.Argument(help="Finished studies, or files of curves.")
    ] = None,
    policy: Annotated[
        list[Path] | None,
        typer.Option("--policy", help="YAML file with fields of `policy:`; may be repeated."),
    ] = None,
    generate: Annotated[
        int | None, typer.Option("--generate", min=3, help="Made curves of known truth instead.")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=24, help="Of made curves.")] = 60,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of made curves.")] = 0,
    positives: Annotated[
        int, typer.Option("--positives", min=2, help="Validation volumes of made curves.")
    ] = 50,
    negatives: Annotated[
        int, typer.Option("--negatives", min=2, help="Validation volumes of made curves.")
    ] = 200,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Trials at a time in the replay.")
    ] = 8,
    objective: Annotated[
        str, typer.Option("--objective", help="What a trial is worth.")
    ] = DEFAULT_OBJECTIVE,
    output: Annotated[
        Literal["table", "csv", "json"], typer.Option("--format", help="table, csv or json.")
    ] = "table",
) -> None:
    """Replay recorded curves through stopping policies, side by side: what each spends, saves, finds and loses.

    A file of curves is a table (.csv, .parquet, .jsonl), a row a trial and epoch. Needed: epoch, from 1 on, and val_auc,
    empty where it is not finite. trial names the run; without it a file is one run. config.NAME is a hyperparameter of
    the run. Any other column of a study's epochs.jsonl is used where it is there: val_auc_low and val_auc_high,
    val_auc_raw, val_positive and val_negative, drw_active, train_auc, train_loss, epoch_s.
    """
    from tune_app.backtest.curves import generate_curves
    from tune_app.backtest.replay import POLICIES, backtest_studies
    from tune_app.backtest.replay import backtest as run_backtest
    from tune_app.study.policy import read_policy

    policies = dict(POLICIES) | {path.stem: read_policy(path) for path in policy or []}
    if bool(studies) == (generate is not None):
        raise typer.BadParameter("name studies or files of curves, or give --generate N")
    if objective not in OBJECTIVES:
        raise typer.BadParameter(f"--objective {objective!r}: one of {', '.join(OBJECTIVES)}")
    if generate is not None:
        err.print(
            f"{generate} made curves of {epochs} epochs, {positives} + {negatives} validation volumes, seed {seed}"
        )
        curves = generate_curves(
            generate, epochs=epochs, seed=seed, positives=positives, negatives=negatives
        )
        compared = run_backtest(curves, policies, workers=workers, objective=objective)
    else:
        compared = backtest_studies(studies or [], policies, workers=workers, objective=objective)
    if output == "csv":
        print(compared.to_csv(index=False), end="")
    elif output == "json":
        print(compared.to_json(orient="records", indent=1))
    else:
        out.print(_backtest_table(compared))


def _backtest_table(compared: Any) -> Table:
    """Policies as columns: there are few of them, and many figures of each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for name in compared["policy"]:
        table.add_column(str(name), justify="right")
    for column in compared.columns:
        values = compared[column]
        if column != "policy" and not values.isna().all():
            told = [
                "-"
                if value != value
                else (f"{value:.3g}" if isinstance(value, float) else str(value))
                for value in values
            ]
            table.add_row(str(column).replace("_", " "), *told)
    return table


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
    """List the search spaces, or show one: what is searched, what is only retuned to be fair, what is fixed."""
    from search_spaces.spaces import SPACES
    from search_spaces.written import space_from

    table = Table(box=None, pad_edge=False, header_style="bold")
    if name is None:
        for heading in ("space", "what it varies", "sampled"):
            table.add_column(
                heading,
                no_wrap=heading == "space",
                justify="right" if heading == "sampled" else "left",
            )
        for space in SPACES.values():
            table.add_row(space.name, space.title, str(len(space.parameters)))
        out.print(table)
        out.print(
            "\n`medtune spaces NAME` shows one; a study file may hold one of your own", markup=False
        )
        return
    space = space_from(name)
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


SeedsOption = Annotated[
    int, typer.Option("--seeds", min=1, help="Runs of each variant on each fold.")
]
FoldsOption = Annotated[
    str,
    typer.Option(
        "--folds", help="all, numbers such as 0,1, or own: the table's own train and val rows."
    ),
]


@app.command()
def ablate(
    data: DataOption,
    variants: Annotated[
        str,
        typer.Option(
            "--variants",
            help="documented, add-one, leave-one-out, all, or a YAML file: name to settings.",
        ),
    ] = "documented",
    seeds: SeedsOption = 3,
    first_seed: Annotated[
        int,
        typer.Option(
            "--first-seed", min=0, help="Seeds count from here: to add runs to an earlier ablation."
        ),
    ] = 0,
    folds: FoldsOption = "all",
    epochs: Annotated[int | None, typer.Option("--epochs", help="Epochs of a run.")] = None,
    objective: Annotated[
        str | None, typer.Option("--objective", help="What a run is worth.")
    ] = None,
    pretrained_path: WeightsOption = None,
    gpus_per_trial: GpusOption = None,
    max_concurrent: ConcurrentOption = None,
    setting: SetOption = None,
    out_folder: OutOption = None,
    cache: CacheOption = None,
    address: AddressOption = None,
) -> None:
    """Run variants of the fixes over seeds and folds, nothing stopped early: which fix matters, and is it certain?"""
    from tune_app.compare.ablation import ablation_spec, read_variants

    config = parse_settings(setting) | ({"epochs": epochs} if epochs is not None else {})
    config |= {"pretrained_path": str(pretrained_path)} if pretrained_path is not None else {}
    chosen = read_variants(variants, build_config(config).epochs)
    given = {
        "objective": objective,
        "gpus_per_trial": gpus_option(gpus_per_trial),
        "max_concurrent": max_concurrent,
        "cache": cache and str(cache.resolve()),
    }
    fields = {name: value for name, value in given.items() if value is not None}
    spec = ablation_spec(
        data, chosen, seeds=seeds, first_seed=first_seed, folds=folds, config=config, **fields
    )
    from_seed = f" from {first_seed}" if first_seed else ""
    err.print(
        f"{spec.num_trials} runs of {spec.epochs} epochs: "
        f"{len(chosen)} variants, seeds {seeds}{from_seed}, folds {folds}"
    )
    root = out_folder or Path("studies") / time.strftime("ablation-%Y%m%d-%H%M%S")
    _run_and_tell(spec, root, address=address, resume=False)


@app.command()
def confirm(
    study: Annotated[Path, typer.Argument(help="Folder of a search.")],
    top: Annotated[int, typer.Option("--top", min=1, help="Best configurations to run again.")] = 3,
    seeds: SeedsOption = 3,
    folds: FoldsOption = "all",
    test: Annotated[
        bool,
        typer.Option("--test", help="Afterwards, once: score what was confirmed on the test rows."),
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="With --test: score a second time; it is recorded.")
    ] = False,
    gpus_per_trial: GpusOption = None,
    max_concurrent: ConcurrentOption = None,
    out_folder: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder of the confirmation; default: confirmation/ in the search."
        ),
    ] = None,
    cache: CacheOption = None,
    address: AddressOption = None,
) -> None:
    """Run a search's best again, beside the documented settings, on all folds with new seeds: is there a winner?"""
    from tune_app.compare.confirm import (
        confirmation_spec,
        confirmed_on_test,
        print_confirmation,
        same_plan,
        unfinished,
    )
    from tune_app.results.study import load_study
    from tune_app.study.spec import StudyFiles

    if again and not test:
        raise typer.BadParameter("--again goes with --test")
    files = StudyFiles(out_folder or StudyFiles(study).confirmation)
    if test:
        confirmed_on_test(study, files.root, cache=cache, again=again, notes=err)
        print_confirmation(load_study(files.root), out)
        return
    given = {
        "gpus_per_trial": gpus_option(gpus_per_trial),
        "max_concurrent": max_concurrent,
        "cache": cache and str(cache.resolve()),
    }
    fields = {name: value for name, value in given.items() if value is not None}
    spec, notes = confirmation_spec(load_study(study), top=top, folds=folds, seeds=seeds, **fields)
    for note in notes:
        err.print(f"note: {note}", markup=False)
    begun = files.spec.exists()
    if begun:
        same_plan(files, spec)
        if not unfinished(load_study(files.root)):
            print_confirmation(load_study(files.root), out)
            return
    _run_and_tell(files.read_spec() if begun else spec, files.root, address=address, resume=begun)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("study.yaml"),
    data: Annotated[
        str, typer.Option("--data", help="Table of volumes, as it is to stand in the file.")
    ] = "table.csv",
    space: Annotated[str, typer.Option("--space", help="Search space.")] = "documented",
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is there.")
    ] = False,
) -> None:
    """Write a study file: every field with its meaning and default, to be edited and given to `medtune run`."""
    from tune_app.study.template import write_study_file

    write_study_file(path, data=data, space=space, force=force)
    out.print(f"{path}: now `medtune run {shlex.quote(str(path))}`", soft_wrap=True, markup=False)


app.add_typer(data_app, name="data")
app.add_typer(weights_app, name="weights")
app.add_typer(bench_app, name="bench")
app.add_typer(cli_models.app)
app.add_typer(cli_cluster.app)
app.add_typer(cli_cluster.jobs_app, name="jobs")
app.add_typer(cli_serve.app)

if __name__ == "__main__":
    main()
