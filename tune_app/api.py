"""The commands as Python functions: two calls from a table to a result.

    from tune_app import search
    study = search("table.csv", "studies/first", trials=20)
    study.trials

Nothing heavy is loaded before a function that needs it is called: `load_study` loads no torch and no Ray. Every
function raises the errors of the command of its name, as exceptions with one line per problem.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from tune_app.models.folder import ModelInfo
    from tune_app.results.study import Study
    from tune_app.study.spec import StudySpec

OnEpoch = Callable[[str, Mapping[str, Any]], None]
"""Called with a trial's name and the row of the epoch that it has just ended; columns as in `study.epochs`."""


def load_study(path: str | Path) -> "Study":
    """Return a study as dataframes, while it runs and afterwards. Raises SpecError and StudyDamageError."""
    from tune_app.results.loading import load_study as load

    return load(Path(path))


def search(
    data: str | Path,
    out: str | Path,
    *,
    space: str | Mapping[str, Any] = "documented",
    trials: int = 20,
    config: Mapping[str, Any] | None = None,
    on_epoch: OnEpoch | None = None,
    quiet: bool = False,
    resume: bool = False,
    address: str | None = None,
    notify: str | None = None,
    **fields: Any,
) -> "Study":
    """Run a search over the table `data`, a file or a URL, in the folder `out`, and return it.

    space: name of a search space, or one written out as in a study file. config: hyperparameters that are not searched
    (`epochs`, `volume_shape`, ...). fields: any other field of a study file (`gpus_per_trial`, `seed`, `policy`, ...).
    `confirm_share=.25` runs the best again afterwards (`confirm`), in `confirmation/` of `out`.
    resume: continue where `out` holds this very study. quiet: print nothing. notify: command or http(s) address that is
    sent a message at the end, the first collapse and the first failure. Ctrl-C leaves a study that `resume`
    continues, and returns it. `on_epoch` is called in this process; an exception that it raises ends the search, which can be
    resumed. Raises SpecError, ManifestError, VolumeError, StudyBusyError.
    """
    from trainables.data.storage import absolute
    from tune_app.study.spec import build_spec

    given = {"data": absolute(data), "space": space, "trials": trials}
    spec = build_spec({**fields, **given, "config": dict(config or {})})
    return _run(spec, Path(out), on_epoch, quiet, address, go_on=resume, notify=notify)


def resume(
    study: "str | Path | Study",
    *,
    data: str | Path | None = None,
    retry_failed: bool = False,
    on_epoch: OnEpoch | None = None,
    quiet: bool = False,
    address: str | None = None,
) -> "Study":
    """Continue a study that was interrupted or killed, and return it. Arguments as of `search`.

    data: table of the study's data where they have moved. Raises SpecError where its volumes, labels, subjects, splits or
    folds are not those that the study began with, or their order differs; study.json names it otherwise.
    """
    from trainables.data.storage import absolute
    from tune_app.study.files import StudyFiles
    from tune_app.study.spec import build_spec

    folder = _folder(study)
    files = StudyFiles(folder)
    files.require()
    spec = files.read_spec()
    if data is not None:
        spec = build_spec({**spec.model_dump(mode="json"), "data": absolute(data)})
    return _run(spec, folder, on_epoch, quiet, address, resume=True, retry_failed=retry_failed)


def confirm(
    study: "str | Path | Study",
    *,
    top: int = 3,
    folds: str = "all",
    seeds: int = 3,
    out: str | Path | None = None,
    on_epoch: OnEpoch | None = None,
    quiet: bool = False,
    address: str | None = None,
    **fields: Any,
) -> "Study":
    """Run the best `top` configurations of a search again on `folds` with new seeds; return that study.

    Its `effects()` are the paired differences to the documented settings, with intervals. A confirmation that was
    interrupted continues. Raises SpecError when there is nothing to confirm.
    """
    from tune_app.compare.confirm import confirmation_spec, same_plan
    from tune_app.study.files import StudyFiles

    folder = _folder(study)
    files = StudyFiles(Path(out) if out is not None else StudyFiles(folder).confirmation)
    spec, _ = confirmation_spec(load_study(folder), top=top, folds=folds, seeds=seeds, **fields)
    started = files.spec.exists()
    if started:
        same_plan(files, spec)
        spec = files.read_spec()
    return _run(spec, files.root, on_epoch, quiet, address, resume=started)


def write_report(study: "str | Path | Study", path: str | Path | None = None) -> Path:
    """Write the study's page, one self-contained HTML file, and return its path; default: report.html in the study."""
    from tune_app.report import page

    folder = _folder(study)
    return page.write_report(load_study(folder), path or folder / "report.html")


def export(
    study: "str | Path | Study",
    out: str | Path,
    *,
    trial: str | None = None,
    along: Sequence[str] = (),
    confirmed: bool = False,
    ensemble: int | None = None,
    device: str = "auto",
    force: bool = False,
) -> "ModelInfo":
    """Write a trial (default: the best), the confirmed settings, or the `ensemble` best trials as a model folder.

    `along`: other trials that make an ensemble with `trial`. Returns the content of its model.json. Raises ExportError and ModelError.
    """
    from tune_app.models.export import export_model
    from tune_app.models.model import choose_device

    return export_model(
        _folder(study),
        Path(out),
        trial=trial,
        along=along,
        confirmed=confirmed,
        ensemble=ensemble,
        device=choose_device(device),
        force=force,
        say=_silent,
    )


def predict(
    model: str | Path,
    paths: str | Path | Sequence[str | Path],
    *,
    device: str = "auto",
    batch_size: int = 8,
) -> "pd.DataFrame":
    """Score NIfTI files, folders or tables with a model folder; one row per volume, columns as `medtune predict`.

    A file that cannot be scored has its reason in the column `problem`.
    """
    import tempfile

    import pandas as pd

    from tune_app.models.predict import run_predict

    asked = [paths] if isinstance(paths, str | Path) else list(paths)
    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.csv"
        run_predict(
            Path(model),
            [Path(path) for path in asked],
            scores,
            device=device,
            batch_size=batch_size,
            explain=None,
            explain_layer="layer4",
            say=_silent,
        )
        return pd.read_csv(scores)


def _run(
    spec: Any, folder: Path, on_epoch: OnEpoch | None, quiet: bool, address: str | None, **how: Any
) -> "Study":
    import sys

    from rich.console import Console

    from trainables.machine.this_machine import settle_user

    settle_user()  # before Ray is loaded
    from tune_app.compare.share import is_under_way, keeps_share

    if not how.get("retry_failed") and is_under_way(spec, folder):
        _confirm_within_share(folder, on_epoch, quiet, address)  # the search has had its budget
        return load_study(folder)
    from tune_app.driver.run import DONE, FAILED_TRIALS, run_study

    console = Console(file=sys.stderr, highlight=False, quiet=quiet)
    outcome = run_study(
        spec, folder, console=console, notes=console, address=address, on_epoch=on_epoch, **how
    )
    ended = outcome.exit_code in (DONE, FAILED_TRIALS)
    if ended:
        add_report(spec, folder)
    if ended and keeps_share(spec):
        _confirm_within_share(folder, on_epoch, quiet, address)
    return load_study(folder)


def _confirm_within_share(
    folder: Path, on_epoch: OnEpoch | None, quiet: bool, address: str | None
) -> None:
    """Run the confirmation that the search's `confirm_share` pays for, into its folder."""
    from tune_app.compare.share import confirmation_to_run
    from tune_app.study.files import StudyFiles

    spec, notes = confirmation_to_run(folder)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    if spec is not None:
        _run(spec, StudyFiles(folder).confirmation, on_epoch, quiet, address, go_on=True)


def add_report(spec: "StudySpec", folder: Path) -> None:
    """Give the report and the tables of a study that has ended to the tools of `spec.log` that keep files."""
    if not {"mlflow", "wandb"} & set(spec.log):
        return
    from tune_app.driver.loggers import Loggers, study_loggers
    from tune_app.report.page import figure_pages
    from tune_app.study.files import StudyFiles

    path, study = write_report(folder), load_study(folder)
    study.to_csv(folder)
    figures = figure_pages(study) if "mlflow" in spec.log else {}
    Loggers(study_loggers(spec, StudyFiles(folder))).add_report(path, figures)


def _folder(study: "str | Path | Study") -> Path:
    return Path(study) if isinstance(study, str | Path) else study.path


def _silent(text: str) -> None:
    pass
