"""Commands that run studies."""

import os
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from trainables.config import build_config
from trainables.data.storage import absolute, is_url, url_of
from tune_app.cli.common import (
    AddressOption,
    CacheOption,
    ConcurrentOption,
    DataOption,
    GpusOption,
    MpsOption,
    OutOption,
    RetryOption,
    SetOption,
    WaitOption,
    WeightsOption,
    elsewhere,
    err,
    gpus_option,
    out,
    parse_settings,
    progress_bar,
    stated,
    to_stderr,
    to_stdout,
)

app = typer.Typer()

PresetOption = Annotated[
    Literal["laptop", "gpu", "cluster"] | None,
    typer.Option("--preset", help="Size of trials and search; other options go before it."),
]


StudyFileOption = Annotated[
    Path | None,
    typer.Argument(help="Study file in YAML, - for stdin; options go before its fields."),
]
SpaceOption = Annotated[
    str | None, typer.Option("--space", help="Search space; `medtune spaces` lists them.")
]
HoursOption = Annotated[
    float | None, typer.Option("--hours", help="Hours the search may take; as many trials as fit.")
]
GpuHoursOption = Annotated[
    float | None, typer.Option("--gpu-hours", help="The same, divided by the GPUs in use.")
]
SamplerOption = Annotated[
    str | None, typer.Option("--sampler", help="model, tpe, random, qmc or gp.")
]
RanksOption = Annotated[
    int | None, typer.Option("--ranks", help="Processes a trial is spread over.")
]
CpusPerRankOption = Annotated[
    int | None, typer.Option("--cpus-per-rank", help="CPU threads of each process.")
]
ConfirmShareOption = Annotated[
    float | None,
    typer.Option(
        "--confirm-share", help="Share of the budget for running the best again; 0 to below 1."
    ),
]
DiskBudgetOption = Annotated[
    float | None,
    typer.Option(
        "--disk-budget", help="GiB the study may take; the worst trials' weights go first."
    ),
]
WarmStartFromOption = Annotated[
    list[Path] | None,
    typer.Option("--warm-start-from", help="Earlier study to learn from; may be repeated."),
]
LogOption = Annotated[
    str | None,
    typer.Option("--log", help="tensorboard, mlflow or wandb; several with commas between."),
]
NotifyOption = Annotated[
    str | None,
    typer.Option(
        "--notify",
        metavar="COMMAND|URL",
        help="To notify of the end, the first collapse and the first failure; default: $MEDTUNE_NOTIFY.",
    ),
]
GoOnOption = Annotated[
    bool, typer.Option("--resume", help="Resume where --out holds this very study.")
]


@dataclass(frozen=True)
class Start:
    """How a study is to start, as `run_study` takes it."""

    address: str | None = None
    resume: bool = False
    go_on: bool = False
    retry_failed: bool = False
    notify: str | None = None


@app.command()
def run(
    study_file: StudyFileOption = None,
    data: Annotated[Path | None, typer.Option("--data", help="Table of volumes.")] = None,
    preset: PresetOption = None,
    space: SpaceOption = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Trials to sample.")] = None,
    hours: HoursOption = None,
    gpu_hours: GpuHoursOption = None,
    confirm_share: ConfirmShareOption = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Epochs of a full trial.")] = None,
    sampler: SamplerOption = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the sampler.")] = None,
    pretrained_path: WeightsOption = None,
    gpus_per_trial: GpusOption = None,
    mps: MpsOption = None,
    ranks: RanksOption = None,
    cpus_per_rank: CpusPerRankOption = None,
    max_concurrent: ConcurrentOption = None,
    disk_budget: DiskBudgetOption = None,
    warm_start_from: WarmStartFromOption = None,
    log: LogOption = None,
    notify: NotifyOption = None,
    wait_for_resources_s: WaitOption = None,
    setting: SetOption = None,
    out_folder: OutOption = None,
    cache: CacheOption = None,
    address: AddressOption = None,
    go_on: GoOnOption = False,
    retry_failed: RetryOption = False,
) -> None:
    """Search: sample, train, stop what collapses, write the study to --out. Ctrl-C leaves it resumable."""
    from tune_app.study.asked import KIND
    from tune_app.study.spec import build_spec

    fields = _from_file(study_file)
    given: dict[str, Any] = {
        "data": data and absolute(data),
        "space": space,
        "trials": trials,
        "hours": hours,
        "gpu_hours": gpu_hours,
        "confirm_share": confirm_share,
        "sampler": sampler,
        "seed": seed,
        "gpus_per_trial": gpus_option(gpus_per_trial),
        "mps": mps,
        "ranks": ranks,
        "cpus_per_rank": cpus_per_rank,
        "max_concurrent": max_concurrent,
        "disk_budget_gib": disk_budget,
        "log": tuple(log.split(",")) if log else None,
        "wait_for_resources_s": wait_for_resources_s,
        "warm_start_from": tuple(map(absolute, warm_start_from or ())) or None,
        "cache": cache and absolute(cache),
    }
    settings = _settings(setting, epochs, pretrained_path)
    if KIND in fields:
        others = {**stated(given), **settings, **stated({"preset": preset})}
        start = Start(address=address, retry_failed=retry_failed, notify=notify)
        _run_asked(fields, out_folder, others, start)
    fields |= stated(given)
    fields["config"] = {**(fields.get("config") or {}), **settings}
    spec = build_spec(_with_table(_on_preset(preset, fields)))
    root = out_folder or Path("studies") / time.strftime(f"{spec.kind}-%Y%m%d-%H%M%S")
    if retry_failed and not go_on and elsewhere.get() is None:
        raise typer.BadParameter(
            "--retry-failed goes with --resume: only a study that is there has failed trials"
        )
    start = Start(address=address, go_on=go_on, retry_failed=retry_failed, notify=notify)
    _run_and_tell(spec, root, start)


def _from_file(path: Path | None) -> dict[str, Any]:
    from tune_app.study.spec import read_study_file

    return read_study_file(path) if path else {}


def _with_table(fields: dict[str, Any]) -> dict[str, Any]:
    if "data" not in fields:
        raise typer.BadParameter(
            "name the table of volumes: --data TABLE, or data: in the study file"
        )
    return fields


def _settings(
    setting: list[str] | None, epochs: int | None, pretrained_path: Path | None
) -> dict[str, Any]:
    """Return the hyperparameters that the command line sets."""
    weights = pretrained_path and absolute(pretrained_path)
    return parse_settings(setting) | stated({"epochs": epochs, "pretrained_path": weights})


def _on_preset(preset: str | None, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields on top of the preset's, and show its settings."""
    if preset is None:
        return fields
    from tune_app.study.presets import preset_line, with_preset

    to_stderr(preset_line(preset))
    return with_preset(preset, fields)


@app.command()
def resume(
    study: Annotated[Path, typer.Argument(help="Folder of the study.")],
    hours: Annotated[
        float | None,
        typer.Option("--hours", help="Hours it may take from now on; default: as before."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Table of the study's data where they have moved; checked to be the same.",
        ),
    ] = None,
    address: AddressOption = None,
    retry_failed: RetryOption = False,
    notify: NotifyOption = None,
) -> None:
    """Resume a study that was killed or interrupted: every trial from its own checkpoint, every decision kept."""
    from tune_app.study.asked import AskedResumption

    asked = AskedResumption(hours=hours, fields=stated({"data": data and absolute(data)}))
    start = Start(address=address, retry_failed=retry_failed, notify=notify)
    if elsewhere.get() is not None:
        _send_asked(asked, study, start)
    _resume(asked, study, start)


def _resume(asked: Any, study: Path, start: Start) -> None:
    from tune_app.study.spec import build_spec

    spec = _study_there(study)
    if asked.fields:
        spec = build_spec(spec.model_dump(mode="json") | asked.fields)
    if asked.hours is not None:
        spec = spec.model_copy(update={"hours": asked.hours, "gpu_hours": None})
    _run_and_tell(spec, study, replace(start, resume=True), extend=asked.hours is not None)


def _study_there(study: Path) -> Any:
    """Return the spec of the study in a folder or at a URL. Raises SpecError where there is none."""
    from tune_app.study.copies import opened
    from tune_app.study.files import StudyFiles

    files = StudyFiles(opened(study)[0])
    files.require()
    return files.read_spec()


# Studies that are sent elsewhere ---------------------------------------------------------------------------------------


def _send(what: Any, root: Path, start: Start) -> NoReturn:
    """Hand a study, or what was asked for, to `medtune submit`, and end with its exit code."""
    send = elsewhere.get()
    assert send is not None
    if start.notify is not None:
        raise typer.BadParameter(
            "--notify is not sent along: set MEDTUNE_NOTIFY where the study runs"
        )
    raise typer.Exit(send(what, root, start.retry_failed))


def _send_asked(asked: Any, root: Path, start: Start) -> NoReturn:
    """Send what was asked for, after the checks that the files on this machine allow; the job makes all of them."""
    from tune_app.study.asked import AskedAblation, AskedConfirmation

    if isinstance(asked, AskedAblation):
        _check_ablation(asked)
    elif isinstance(asked, AskedConfirmation):
        _check_confirmation(asked, root)
    elif _is_readable(root / "study.json"):
        _study_there(root)
    else:
        _print_not_here(root)
    _send(asked, root, start)


def _check_ablation(asked: Any) -> None:
    from tune_app.compare.ablation import check_without_table
    from tune_app.study.spec import refuse_what_cannot_run

    refuse_what_cannot_run(check_without_table(asked))
    if _is_readable(asked.data):
        _ablation(asked)
    else:
        _print_not_here(asked.data)


def _check_confirmation(asked: Any, root: Path) -> None:
    from tune_app.compare.confirm import candidates_to_run
    from tune_app.results.loading import load_study

    if not _is_readable(Path(asked.search) / "study.json"):
        _print_not_here(asked.search)
        return
    search = load_study(asked.search)
    candidates_to_run(search, asked.top, asked.seeds)
    if _is_readable(search.spec.data):
        _confirmation(asked, root)
    else:
        _print_not_here(search.spec.data)


def _is_readable(place: str | Path) -> bool:
    """Whether this machine can read the file or object."""
    if not is_url(place):
        return os.access(place, os.R_OK)
    from trainables.data.table_file import ManifestError, table_bytes

    try:
        return bool(table_bytes(Path(place)))
    except ManifestError:
        return False


def _print_not_here(place: str | Path) -> None:
    to_stderr(
        f"note: {url_of(place) or place} cannot be read on this machine: the job checks it when it starts"
    )


def _run_asked(
    fields: dict[str, Any], root: Path | None, others: dict[str, Any], start: Start
) -> NoReturn:
    """Run here what was asked for on another machine; a study that is there already continues.

    `others`: settings of the command line, of which a job gives none.
    """
    from tune_app.study.asked import AskedAblation, AskedConfirmation, read_asked

    if others or root is None or elsewhere.get() is not None:
        raise typer.BadParameter(
            "a file that `medtune submit` wrote for its job takes --out, which it needs, --resume, --address, "
            "--retry-failed and --notify, and nothing else"
        )
    asked = read_asked(fields)
    if isinstance(asked, AskedAblation):
        _run_and_tell(_ablation(asked), root, replace(start, go_on=True))
    elif isinstance(asked, AskedConfirmation):
        _confirm(asked, root, start)
    else:
        _resume(asked, root, start)
    raise typer.Exit


def _run_and_tell(spec: Any, root: Path, start: Start, *, extend: bool = False) -> NoReturn:
    """Run or continue a study here, or send it elsewhere, and end with its exit code.

    A search whose confirmation is under way has had its budget: only `extend` and `retry_failed` continue it.
    """
    if elsewhere.get() is not None:
        from tune_app.study.spec import refuse_what_cannot_run

        refuse_what_cannot_run(spec)
        _send(spec, root, start)
    from tune_app.compare.share import is_under_way, keeps_share

    code = 0
    if extend or start.retry_failed or not is_under_way(spec, root):
        code = _run_here(spec, root, start)
    if keeps_share(spec) and not _interrupted(code):
        code = max(code, _confirm_within_share(root, start))
    raise typer.Exit(code)


def _interrupted(code: int) -> bool:
    from tune_app.driver.stopping import INTERRUPTED, PREEMPTED

    return code in (INTERRUPTED, PREEMPTED)


def _confirm_within_share(root: Path, start: Start) -> int:
    """Run the confirmation that a search's `confirm_share` pays for, or continue it; returns its exit code."""
    from tune_app.compare.share import confirmation_to_run
    from tune_app.study.files import StudyFiles

    spec, notes = confirmation_to_run(root)
    for note in notes:
        to_stderr(f"note: {note}")
    if spec is None:
        return 0
    folder = StudyFiles(root).confirmation
    return _run_here(spec, folder, replace(start, resume=False, go_on=True, retry_failed=False))


def _run_here(spec: Any, root: Path, start: Start) -> int:
    """Run or continue a study on this machine and print its summary; returns the exit code."""
    place = url_of(root) or root
    # Before Ray is loaded, which takes seconds: a command that prints nothing looks as if it hung.
    to_stderr(f"study: {place}")
    from tune_app.api import add_report
    from tune_app.driver.run import DONE, FAILED_TRIALS, run_study
    from tune_app.driver.stopping import INTERRUPTED
    from tune_app.report.summary import print_summary
    from tune_app.study.files import StudyFiles

    try:
        outcome = run_study(spec, root, console=err, notes=err, **vars(start))
    except KeyboardInterrupt:
        if not StudyFiles(root).epochs.exists() and url_of(root) is None:
            to_stderr(
                "interrupted before the first trial: nothing has been trained; prepared data is kept, and the "
                "same command starts again"
            )
        raise
    if spec.kind == "confirmation" and outcome.exit_code != INTERRUPTED and url_of(root) is None:
        _score_validation(root)
    if outcome.exit_code in (DONE, FAILED_TRIALS) and url_of(root) is None:
        add_report(spec, root)
    print_summary(root, out)
    _print_next(outcome.exit_code, place)
    return int(outcome.exit_code)


def _print_next(code: int, place: str | Path) -> None:
    """Print the command that continues a study which has not ended well."""
    from tune_app.driver.run import FAILED_TRIALS

    if _interrupted(code):
        to_stderr(f"interrupted; resume with: medtune resume {shlex.quote(str(place))}")
    elif code == FAILED_TRIALS:
        to_stderr(
            f"try failed trials again with: medtune resume {shlex.quote(str(place))} --retry-failed"
        )


def _score_validation(root: Path) -> None:
    from tune_app.compare.validation_scores import score_validation

    score_validation(root, notes=lambda text: err.print(f"note: {text}", markup=False))


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
        str | None, typer.Option("--objective", help="Objective that gives a run's value.")
    ] = None,
    pretrained_path: WeightsOption = None,
    gpus_per_trial: GpusOption = None,
    mps: MpsOption = None,
    max_concurrent: ConcurrentOption = None,
    wait_for_resources_s: WaitOption = None,
    setting: SetOption = None,
    out_folder: OutOption = None,
    cache: CacheOption = None,
    address: AddressOption = None,
) -> None:
    """Run variants of the fixes over seeds and folds, nothing stopped early: which fix matters, and is it certain?"""
    from tune_app.compare.ablation import read_variants
    from tune_app.study.asked import AskedAblation

    config = _settings(setting, epochs, pretrained_path)
    given = {
        "objective": objective,
        "gpus_per_trial": gpus_option(gpus_per_trial),
        "mps": mps,
        "max_concurrent": max_concurrent,
        "wait_for_resources_s": wait_for_resources_s,
        "cache": cache and absolute(cache),
    }
    asked = AskedAblation(
        data=absolute(data),
        variants=read_variants(variants, build_config(config).epochs),
        seeds=seeds,
        first_seed=first_seed,
        folds=folds,
        config=config,
        fields=stated(given),
    )
    root = out_folder or Path("studies") / time.strftime("ablation-%Y%m%d-%H%M%S")
    if elsewhere.get() is not None:
        _send_asked(asked, root, Start())
    _run_and_tell(_ablation(asked), root, Start(address=address))


def _ablation(asked: Any) -> Any:
    """Return the spec of an ablation that was asked for, its plan printed."""
    from tune_app.compare.ablation import ablation_spec

    spec = ablation_spec(
        Path(asked.data),
        asked.variants,
        seeds=asked.seeds,
        first_seed=asked.first_seed,
        folds=asked.folds,
        config=asked.config,
        **asked.fields,
    )
    from_seed = f" from {asked.first_seed}" if asked.first_seed else ""
    err.print(
        f"{spec.num_trials} runs of {spec.epochs} epochs: "
        f"{len(asked.variants)} variants, seeds {asked.seeds}{from_seed}, folds {asked.folds}"
    )
    return spec


@app.command()
def confirm(
    study: Annotated[Path, typer.Argument(help="Folder of a search.")],
    top: Annotated[int, typer.Option("--top", min=1, help="Best configurations to run again.")] = 3,
    seeds: SeedsOption = 3,
    folds: FoldsOption = "all",
    test: Annotated[
        bool,
        typer.Option("--test", help="Afterwards, once: score the choice on the test rows."),
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="With --test: score a second time; it is recorded.")
    ] = False,
    gpus_per_trial: GpusOption = None,
    mps: MpsOption = None,
    max_concurrent: ConcurrentOption = None,
    wait_for_resources_s: WaitOption = None,
    out_folder: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder of the confirmation; default: confirmation/ in the search."
        ),
    ] = None,
    cache: CacheOption = None,
    address: AddressOption = None,
) -> None:
    """Run a search's best again, and the documented settings, on all folds with new seeds: is there a winner?"""
    from tune_app.study.asked import AskedConfirmation
    from tune_app.study.files import StudyFiles

    if again and not test:
        raise typer.BadParameter("--again goes with --test")
    root = out_folder or StudyFiles(study).confirmation
    if test:
        _score_test_rows(study, root, cache=cache, again=again)
        return
    given = {
        "gpus_per_trial": gpus_option(gpus_per_trial),
        "mps": mps,
        "max_concurrent": max_concurrent,
        "wait_for_resources_s": wait_for_resources_s,
        "cache": cache and absolute(cache),
    }
    asked = AskedConfirmation(
        search=absolute(study), top=top, seeds=seeds, folds=folds, fields=stated(given)
    )
    if elsewhere.get() is not None:
        _send_asked(asked, root, Start())
    _confirm(asked, root, Start(address=address))


def _score_test_rows(study: Path, root: Path, *, cache: Path | None, again: bool) -> None:
    from tune_app.compare.confirm import print_confirmation
    from tune_app.compare.test_rows import confirmed_on_test
    from tune_app.results.loading import load_study

    if elsewhere.get() is not None:
        raise typer.BadParameter(
            "--test is not sent: it needs no cluster, but a machine that sees the data, the search and its confirmation"
        )
    confirmed_on_test(study, root, cache=cache, again=again, notes=err)
    print_confirmation(load_study(root), out)


def _confirmation(asked: Any, root: Path) -> tuple[Any, bool]:
    """Return the spec of a confirmation that was asked for, and whether it has begun in the folder `root`.

    Raises SpecError where another one has.
    """
    from tune_app.compare.confirm import confirmation_spec, same_plan
    from tune_app.results.loading import load_study
    from tune_app.study.files import StudyFiles

    search = load_study(asked.search)
    spec, notes = confirmation_spec(
        search, top=asked.top, folds=asked.folds, seeds=asked.seeds, **asked.fields
    )
    for note in notes:
        err.print(f"note: {note}", markup=False)
    files = StudyFiles(root)
    begun = files.spec.exists()
    if begun:
        same_plan(files, spec)
    return files.read_spec() if begun else spec, begun


def _confirm(asked: Any, root: Path, start: Start) -> None:
    from tune_app.compare.confirm import print_confirmation, unfinished
    from tune_app.results.loading import load_study

    spec, begun = _confirmation(asked, root)
    if begun and not unfinished(load_study(root)):
        _score_validation(root)
        print_confirmation(load_study(root), out)
        return
    # One in object storage is not seen from here
    _run_and_tell(spec, root, replace(start, resume=begun, go_on=not begun))


WORDS_REASON = "change the numbers where another label is the positive one, class 1 of two"


def _advice_for(table: Path, preset: str | None, space: str) -> dict[str, tuple[Any, str]]:
    """Return the preprocessing that suits the volumes of `table`, with reasons; print it, or why there is none.

    What `space` searches is left out: a value that is set is not searched.
    """
    from search_spaces.written import space_from
    from trainables.config import build_config
    from trainables.data.manifest import numbered_words, read_manifest
    from trainables.data.recommend import recommend_for_table
    from trainables.data.scans import VolumeError
    from trainables.data.table_file import ManifestError
    from trainables.data.visible import visible
    from tune_app.study.presets import PRESETS

    given = build_config(PRESETS[preset]["config"] if preset is not None else {})
    shape = given.volume_shape if "volume_shape" in given.model_fields_set else None
    words: dict[str, int] = {}
    try:
        words = numbered_words(table)
        named = build_config({"classes": words} if words else {})
        manifest = read_manifest(table, named.num_classes, named.classes)
        with progress_bar("reading") as progress:
            advice = recommend_for_table(manifest, volume_shape=shape, progress=progress)
    except (ManifestError, VolumeError) as error:
        reason = str(error).splitlines()[0]
        to_stderr(f"note: nothing recommended yet: {reason}")
        advice = []
    searched = {one.hyperparameter for one in space_from(space).parameters.values()}
    advice = [one for one in advice if one.name not in searched]
    for one in advice:
        to_stderr(f"recommended {one.line}")
    found = {one.name: (one.value, one.reason) for one in advice}
    if words:
        shown = ", ".join(f"{number} = {visible(word)}" for word, number in words.items())
        to_stderr(f"classes: {shown}; {WORDS_REASON}")
        found["classes"] = (words, f"the labels are words; {WORDS_REASON}")
    return found


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("study.yaml"),
    data: Annotated[
        str, typer.Option("--data", help="Table of volumes, as written into the file.")
    ] = "table.csv",
    space: Annotated[str, typer.Option("--space", help="Search space.")] = "documented",
    preset: PresetOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write over a file that is there.")
    ] = False,
) -> None:
    """Write a study file: every field with its meaning and default, to be edited and given to `medtune run`.

    Where the table exists, shape, spacing and intensity that suit its volumes are set, each with the reason.
    """
    from tune_app.study.template import write_study_file

    table = path.parent / data
    may_write = force or not path.exists()
    advice = _advice_for(table, preset, space) if may_write and table.is_file() else {}
    write_study_file(path, data=data, space=space, preset=preset, advice=advice, force=force)
    to_stdout(f"{path}: now `medtune run {shlex.quote(str(path))}`")
