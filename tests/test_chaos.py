"""One short round of `make chaos` in the suite, and the killer's own checks: they must notice what they are for."""

import json
from pathlib import Path

import pytest
from chaos import Fault, Round, check, plan_round, run_round

from tune_app.spec import StudyFiles
from tune_app.synthetic import write_cohort


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_study_survives_the_death_of_a_trial_and_of_its_driver(tmp_path: Path) -> None:
    table = write_cohort(tmp_path / "cohort", subjects=14, side=(14, 18))
    faults = [Fault("actor", "kill", 1.0), Fault("driver", "kill", 1.0)]
    result = run_round(Round(seed=0, ranks=1, faults=faults), table, tmp_path)
    assert not result.problems
    assert all(fault.done for fault in result.faults), "the study was over too soon"
    assert result.starts == 2

    # A checker that finds nothing in anything would pass as well.
    files = StudyFiles(tmp_path / "study")
    rows = files.epochs.read_text().splitlines()
    last = max((json.loads(row) for row in rows), key=lambda row: (row["epoch"], row["trial"]))
    files.epochs.write_text("".join(f"{row}\n" for row in rows if json.loads(row) != last))
    found = " ".join(check(files.root, result))
    assert "decisions logged" in found
    assert "a completed trial lacks epochs" in found


def test_rounds_are_the_same_for_the_same_seed_and_differ_otherwise() -> None:
    plans = [plan_round(seed) for seed in range(50)]
    assert plans == [plan_round(seed) for seed in range(50)]
    names = {fault.name for plan in plans for fault in plan.faults}
    assert names >= {
        "kill driver",
        "kill actor",
        "kill rank",
        "kill raylet",
        "freeze actor",
        "freeze rank",
        "pause driver",
    }
