"""Commands that show results."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from trainables.data.visible import visible
from trainables.objective import DEFAULT_OBJECTIVE, OBJECTIVES
from tune_app.cli.common import err, out, to_stderr, to_stdout

app = typer.Typer()


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
        bool, typer.Option("--skip-damage", help="Leave damaged lines out and name them.")
    ] = False,
    meanings: Annotated[
        bool,
        typer.Option(
            "--meanings", help="List what columns there are, with type and meaning, instead."
        ),
    ] = False,
) -> None:
    """Show trials, best first; works while the study runs and after its driver was killed."""
    from tune_app.report.summary import study_lines
    from tune_app.results.loading import load_studies, load_study
    from tune_app.results.tables import matching, meanings_table, render_table, results_table
    from tune_app.results.trials import column_meanings

    on_damage: Literal["error", "skip"] = "skip" if skip_damage else "error"
    loaded = [load_study(path, on_damage=on_damage) for path in studies]
    for one in loaded:
        for note in one.notes:
            to_stderr(f"note: {note}")
        for write, folder in ((one.to_csv, csv), (one.to_parquet, parquet)):
            if folder is not None:
                for path in write(folder if len(loaded) == 1 else folder / one.name):
                    to_stderr(str(path))
    single = loaded[0] if len(loaded) == 1 else None
    subject = single or load_studies(studies, on_damage=on_damage)
    if meanings:
        table = matching(column_meanings(single), columns)
    else:
        table = results_table(
            single.ranked if single and not sort else subject.trials_full,
            subject.searched,
            columns=columns,
            sort=sort or (() if single else ("-objective", "number")),
            where=where or (),
            limit=limit,
        )
    if _printed_as_data(table, output):
        return
    if meanings:
        out.print(meanings_table(table))
    elif table.empty:
        out.print("no trial has started" if subject.trials_full.empty else "no trial fits --where")
    else:
        out.print(render_table(table, out.width if out.is_terminal else 80))
        for line in study_lines(single) if single else ():
            to_stdout(line)


@app.command()
def report(
    study: Annotated[Path, typer.Argument(help="Folder of the study.")],
    compare: Annotated[
        Path | None, typer.Option("--compare", help="Another study to compare with.")
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
    from tune_app.results.loading import load_study

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
    to_stdout(str(path))
    if watch:
        watch_report(study, path, say=lambda text: err.print(text, markup=False))


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
        int | None, typer.Option("--generate", min=3, help="Synthetic curves of known truth.")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=24, help="Of synthetic curves.")] = 60,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of synthetic curves.")] = 0,
    positives: Annotated[
        int, typer.Option("--positives", min=2, help="Validation volumes of synthetic curves.")
    ] = 50,
    negatives: Annotated[
        int, typer.Option("--negatives", min=2, help="Validation volumes of synthetic curves.")
    ] = 200,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Trials at a time in the replay.")
    ] = 8,
    objective: Annotated[
        str, typer.Option("--objective", help="Objective that gives a trial's value.")
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
    from tune_app.backtest.replay import POLICIES, backtest_studies
    from tune_app.backtest.replay import backtest as run_backtest
    from tune_app.backtest.synthetic import generate_curves
    from tune_app.study.policy_spec import read_policy

    policies = dict(POLICIES) | {path.stem: read_policy(path) for path in policy or []}
    if bool(studies) == (generate is not None):
        raise typer.BadParameter("name studies or files of curves, or give --generate N")
    if objective not in OBJECTIVES:
        raise typer.BadParameter(f"--objective {objective!r}: one of {', '.join(OBJECTIVES)}")
    if generate is not None:
        err.print(
            f"{generate} synthetic curves of {epochs} epochs, {positives} + {negatives} validation volumes, seed {seed}"
        )
        curves = generate_curves(
            generate, epochs=epochs, seed=seed, positives=positives, negatives=negatives
        )
        compared = run_backtest(curves, policies, workers=workers, objective=objective)
    else:
        compared = backtest_studies(studies or [], policies, workers=workers, objective=objective)
    if not _printed_as_data(compared, output):
        out.print(_backtest_table(compared))


def _printed_as_data(table: Any, output: str) -> bool:
    """Print the table where it is asked for as CSV or JSON; returns whether it was."""
    if output == "csv":
        print(visible(table.to_csv(index=False), keep="\n\t"), end="")
    elif output == "json":
        print(table.to_json(orient="records", indent=1))
    return output != "table"


def _backtest_table(compared: Any) -> Table:
    """Policies as columns: there are few of them, and many figures of each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for name in compared["policy"]:
        table.add_column(str(name), justify="right")
    for column in compared.columns:
        values = compared[column]
        if column != "policy" and not values.isna().all():
            table.add_row(str(column).replace("_", " "), *map(_cell, values))
    return table


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3g}"
    return str(value)
