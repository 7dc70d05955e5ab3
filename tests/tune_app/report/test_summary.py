"""The summary on the console at the end of a search: the runs that tie with the best are named as an ensemble."""

import shlex
from collections.abc import Callable
from pathlib import Path

from tune_app.models.export import choose
from tune_app.report.summary import best_lines, next_lines, place_lines, tied_runs
from tune_app.results import load_study
from tune_app.study.files import StudyFiles
from tune_app.study.tied import TIED_AUC, TIED_RUNS


def test_the_tied_runs_with_weights_are_named_and_are_those_that_the_export_takes(
    write_study: Callable[..., Path],
) -> None:
    root = write_study("many", trials=24, epochs=20, seed=1)
    assert tied_runs(load_study(root)) == []  # no weights were kept
    files = StudyFiles(root)
    ranked = load_study(root).ranked
    leading = [str(trial) for trial in ranked["trial"]]
    for trial in [*leading[:2], *leading[3:]]:  # the third has lost its weights
        files.trial(trial).best.write_bytes(b"")
    study = load_study(root)
    values = study.ranked.set_index("trial")["objective"]
    near = [
        trial
        for trial in leading
        if trial != leading[2] and values[trial] >= values[leading[0]] - TIED_AUC
    ][:TIED_RUNS]
    assert len(near) > 1, "the study has no tie to show"
    assert tied_runs(study) == near
    assert list(choose(study, ensemble=len(near)).trials["trial"]) == near
    text = "\n".join(best_lines(study))
    assert f"tied: trials {', '.join(near)} within 0.02 of the best" in text
    assert f"medtune export {root} --ensemble {len(near)} --out model" in text


def test_a_study_of_variants_has_no_ties(write_study: Callable[..., Path]) -> None:
    root = write_study("ablation", {"a": {}, "b": {"s": 20.0}}, seeds=2, epochs=6)
    for folder in StudyFiles(root).trials.iterdir():
        (folder / "best.pt").write_bytes(b"")
    assert len(load_study(root).exportable) == 4
    assert tied_runs(load_study(root)) == []


def test_an_objective_that_is_no_auc_has_no_ties(write_study: Callable[..., Path]) -> None:
    root = write_study(trials=6, epochs=6, spec={"objective": "best_median3_balanced_accuracy"})
    for folder in StudyFiles(root).trials.iterdir():
        (folder / "best.pt").write_bytes(b"")
    assert tied_runs(load_study(root)) == []


def test_the_next_commands_can_be_copied_whatever_the_folder_is_called() -> None:
    root = Path("/studies/our first/it's one")
    commands = [line.partition(" medtune ")[2] for line in place_lines(root) + next_lines(root)]
    asked = [shlex.split(command.partition("   ")[0]) for command in commands if command]
    assert asked == [
        ["results", str(root)],
        ["report", str(root)],
        ["confirm", str(root)],
        ["serve", str(root.parent)],
    ]
