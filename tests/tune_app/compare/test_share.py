"""The confirmation that a share of a search's budget pays for."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from tune_app.compare.share import confirmation_for_share, whole_runs
from tune_app.results.loading import load_study
from tune_app.results.study import Study

WriteStudy = Callable[..., Path]


@pytest.fixture
def a_search(write_study: WriteStudy, tmp_path: Path) -> Callable[[float, int], Study]:
    """A search of 6 epochs a run, with `share` kept for its confirmation, that has trained `epochs` in all."""
    table = pd.DataFrame(
        {"path": [f"{i}.nii" for i in range(40)], "label": [int(i % 3 == 0) for i in range(40)]}
    )
    table["subject"] = [f"s{i}" for i in range(40)]
    for name in table["path"]:
        (tmp_path / name).touch()
    table.to_csv(tmp_path / "table.csv", index=False)
    root = write_study(trials=8, epochs=6, spec={"data": str(tmp_path / "table.csv"), "hours": 2})

    def made(share: float, epochs: int) -> Study:
        study = load_study(root)
        trials = study.trials_full.copy()
        trials["epochs_run"] = 0
        trials.loc[0, "epochs_run"] = epochs
        spec = study.spec.model_copy(update={"confirm_share": share})
        return replace(study, spec=spec, trials_full=trials)

    return made


@pytest.mark.parametrize(
    ("share", "epochs", "runs"), [(0.5, 60, 10), (0.25, 60, 3), (0.25, 72, 4), (0.2, 96, 4)]
)
def test_a_share_is_of_all_epochs_that_search_and_confirmation_train(
    a_search: Callable[[float, int], Study], share: float, epochs: int, runs: int
) -> None:
    assert whole_runs(a_search(share, epochs)) == runs
    assert runs * 6 <= share * (epochs + runs * 6) + 1e-9


@pytest.mark.parametrize(
    ("epochs", "candidates", "folds", "seeds"),
    [(24, 1, 2, 1), (30, 1, 2, 1), (36, 2, 2, 1), (48, 3, 2, 1), (72, 3, 3, 1), (6 * 33, 3, 4, 2)],
)
def test_a_share_goes_into_candidates_then_folds_then_seeds(
    a_search: Callable[[float, int], Study], epochs: int, candidates: int, folds: int, seeds: int
) -> None:
    spec, notes = confirmation_for_share(a_search(0.5, epochs))
    assert spec is not None
    variants = {trial.variant for trial in spec.planned}
    assert "documented" in variants
    assert "defaults" not in variants
    assert len(variants) == candidates + 1
    ran = {trial.overrides["fold"] for trial in spec.planned}
    assert len(ran) == folds
    assert 0 not in ran, "fold 0 chose the candidates"
    assert len({trial.overrides["seed"] for trial in spec.planned}) == seeds
    assert spec.num_trials <= epochs // 6
    assert (spec.hours, spec.confirm_share) == (None, 0.0)
    assert f"{spec.num_trials} runs of 6 epochs, a share of 0.5" in notes[0]


def test_a_share_that_is_too_small_says_what_it_is_worth(
    a_search: Callable[[float, int], Study],
) -> None:
    spec, notes = confirmation_for_share(a_search(0.1, 96))
    assert spec is None
    assert (
        "a share of 0.1 is worth 1 whole runs, and 4 are the fewest; `medtune confirm" in notes[0]
    )
