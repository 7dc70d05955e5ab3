"""The confirmation that a share of a search's budget pays for: `confirm_share` of a study."""

from pathlib import Path
from shlex import quote

from trainables.data.storage import url_of
from tune_app.compare.confirm import confirmation_spec, unfinished
from tune_app.results.loading import load_study
from tune_app.results.study import Study
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.spec import StudySpec

FEWEST_RUNS = 4
"""Two folds of the documented settings and of the search's best: less can name no winner."""

MOST_CANDIDATES = 3


def whole_runs(search: Study) -> int:
    """Return how many whole runs the share pays for, where the search has spent the rest of the budget.

    In epochs: of all epochs that search and confirmation train, `confirm_share` belong to the confirmation. On a time
    budget the search has used the rest of the time, and an epoch of the confirmation takes as long as one of its own.
    """
    share, spec = search.spec.confirm_share, search.spec
    spent = float(search.trials_full["epochs_run"].sum())
    return int(share / (1 - share) * spent / spec.epochs + 1e-9)


def keeps_share(spec: StudySpec) -> bool:
    """Whether a part of the study's budget is for its confirmation."""
    return spec.kind == "search" and spec.confirm_share > 0


def is_under_way(spec: StudySpec, root: Path) -> bool:
    """Whether a confirmation within the share of the search in `root` has started and not ended.

    The search then has had its budget.
    """
    if not keeps_share(spec):
        return False
    files = StudyFiles(StudyFiles(root).confirmation)
    return url_of(root) is None and files.spec.is_file() and unfinished(load_study(files.root)) > 0


def confirmation_to_run(root: Path) -> tuple[StudySpec | None, list[str]]:
    """Return the confirmation of the search in `root` to run or to continue, None where there is none, and notes.

    One that has started keeps its plan.
    """
    if (url := url_of(root)) is not None:
        return None, [f"not confirmed: {url} is in object storage; `medtune confirm {url}` does it"]
    files = StudyFiles(StudyFiles(root).confirmation)
    if files.spec.is_file():
        return files.read_spec(), []
    try:
        return confirmation_for_share(load_study(root))
    except SpecError as error:
        return None, [f"not confirmed: {error}"]


def confirmation_for_share(search: Study) -> tuple[StudySpec | None, list[str]]:
    """Return the confirmation within the share, None where the share is too small, and notes for the user.

    Up to MOST_CANDIDATES of the best and the documented settings, on two folds or more that did not choose them as far as
    there are such; what is left of the share goes into more folds, then seeds. Raises the errors of `confirmation_spec`.
    """
    runs = whole_runs(search)
    if runs < FEWEST_RUNS:
        return None, [
            f"not confirmed: a share of {search.spec.confirm_share:g} is worth {runs} whole runs, and {FEWEST_RUNS} are the "
            f"fewest; `medtune confirm {quote(str(search.path))}` runs it anyway"
        ]
    candidates = min(MOST_CANDIDATES, runs // 2 - 1)
    everything, _ = confirmation_spec(search, top=candidates, seeds=1, defaults=False)
    variants = len({trial.variant for trial in everything.planned})
    folds = sorted({int(str(trial.overrides["fold"])) for trial in everything.planned})
    unseen = [fold for fold in folds if fold not in everything.seen_folds]
    usable = unseen if len(unseen) > 1 else folds
    chosen = usable[: max(1, runs // variants)]
    seeds = max(1, runs // (variants * len(chosen)))
    spec, notes = confirmation_spec(
        search,
        top=candidates,
        folds=",".join(map(str, chosen)),
        seeds=seeds,
        defaults=False,
    )
    return spec, [
        f"confirmation: {spec.num_trials} runs of {spec.epochs} epochs, a share of {search.spec.confirm_share:g}",
        *notes,
    ]
