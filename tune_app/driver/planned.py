"""A searcher that hands out a fixed list of trials."""

from typing import Any

from ray.tune.search import Searcher

from tune_app.study.spec import StudySpec


class PlannedSearcher(Searcher):  # type: ignore[misc]  # Ray is not typed
    """Hands out the planned trials of an ablation or a confirmation, in order, those that have ended left out."""

    def __init__(self, spec: StudySpec) -> None:
        super().__init__(metric=None, mode="max")
        self.planned = {f"{number:05d}": trial for number, trial in enumerate(spec.planned)}

    def settle(
        self, number: int, state: str, value: float | None, rows: Any, *, reason: str | None
    ) -> None:
        """Leave out a trial that has ended."""
        self.planned.pop(f"{number:05d}", None)

    notes: tuple[str, ...] = ()
    """Nothing that the user would not know."""

    reopened: tuple[int, ...] = ()
    """There is no database that could know more than the records."""

    def failed(self) -> dict[int, str]:
        """None that the records do not know."""
        return {}

    def note(self, number: int, reason: str) -> None:
        """Nothing to keep: the trial's record has the reason."""

    def close(self) -> None:
        """Nothing to release."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return the next planned trial, or FINISHED."""
        if not self.planned:
            return str(Searcher.FINISHED)
        name = next(iter(self.planned))
        return {"trial": name, "overrides": dict(self.planned.pop(name).overrides)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing to learn from."""
