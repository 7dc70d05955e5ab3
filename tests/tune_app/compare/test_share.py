"""The confirmation that a share of a search's budget pays for."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from search_spaces.fixes import all_fixes
from tune_app.compare.share import (
    confirmation_for_share,
    confirmation_to_run,
    is_under_way,
    whole_runs,
)
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


def test_the_best_trial_may_have_the_default_settings(
    a_search: Callable[[float, int], Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`medtune confirm` runs the defaults anyway; here nothing else would run them."""
    search = a_search(0.5, 24)
    best = str(search.ranked["trial"].iloc[0])
    record = Study.record

    def recorded(study: Study, trial: str) -> dict[str, Any]:
        found = record(study, trial)
        return found | {"overrides": all_fixes(6)} if trial == best else found

    monkeypatch.setattr(Study, "record", recorded)
    spec, _ = confirmation_for_share(search)
    assert spec is not None
    assert {trial.variant for trial in spec.planned} == {"documented", f"trial-{best}"}


def test_a_confirmation_that_has_started_keeps_its_plan(write_study: WriteStudy) -> None:
    root = write_study("search", trials=4, epochs=3)
    shared = load_study(root).spec.model_copy(update={"confirm_share": 0.5})
    assert not is_under_way(shared, root)
    variants = {"documented": {}, "trial-00001": {"s": 12.0}}
    options = {"kind": "confirmation", "variants": variants, "seeds": 1, "folds": 2, "epochs": 3}
    there = write_study("confirmation", **options)
    shutil.move(there, root / "confirmation")
    spec, notes = confirmation_to_run(root)
    assert spec is not None
    assert ({trial.variant for trial in spec.planned}, notes) == (set(variants), [])
    assert not is_under_way(shared, root), "every run has ended"
    trials = sorted((root / "confirmation" / "trials").iterdir())
    shutil.rmtree(trials[-1])
    rows = (root / "confirmation" / "epochs.jsonl").read_text().splitlines(keepends=True)
    kept = [row for row in rows if json.loads(row)["trial"] != trials[-1].name]
    (root / "confirmation" / "epochs.jsonl").write_text("".join(kept))
    assert is_under_way(shared, root)


def test_a_search_in_object_storage_is_not_confirmed_and_says_how() -> None:
    spec, notes = confirmation_to_run(Path("s3://bucket/studies/first"))
    assert spec is None
    assert "`medtune confirm s3://bucket/studies/first` does it" in notes[0]
