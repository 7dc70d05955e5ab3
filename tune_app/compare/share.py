"""The confirmation that a share of a search's budget pays for: `confirm_share` of a study."""

from shlex import quote

from tune_app.compare.confirm import confirmation_spec
from tune_app.results.study import Study
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
