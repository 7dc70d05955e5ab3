"""Several studies in one view: the results of each budget, their best trials, and the settings that differ."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from trainables.config import FineTuneConfig
from trainables.data.visible import visible
from trainables.objective import OBJECTIVES
from tune_app.report import figures, findings
from tune_app.results.study import Study
from tune_app.results.text import format_value, plain, printable
from tune_app.serve.views import glance
from tune_app.study.spec import StudySpec

NOT_COMPARED = {"planned", "cache", "space", "config", "kind"}
"""Fields of a study file that are not part of a study's question, or that are compared by their parts."""


def across(studies: Sequence[tuple[str, Study]]) -> dict[str, Any]:
    """Return the common points and the differences of two or more studies, given with their ids.

    `budget` holds, for each study, epochs spent and the best objective by then; `best` the validation AUC of the best trial
    by epoch, with its interval; `asked` and `settings` the fields and hyperparameters that are not equal in all.
    """
    return {
        "studies": [_about(name, study) for name, study in studies],
        "budget": [_budget(study) for _, study in studies],
        "best": [_best_curve(study) for _, study in studies],
        "asked": _differing(
            [(name, name) for name in StudySpec.model_fields if name not in NOT_COMPARED],
            [{"space": _space(study)} | study.spec.model_dump(mode="json") for _, study in studies],
            more=("space",),
        ),
        "settings": _differing(
            [(name, info.description or "") for name, info in FineTuneConfig.model_fields.items()],
            [_best_settings(study) for _, study in studies],
        ),
        "cautions": _doubts([study for _, study in studies]),
    }


def _about(name: str, study: Study) -> dict[str, Any]:
    about = glance(study)
    kept = ("best", "best_trial", "best_interval", "rivals", "noise", "epochs", "states", "ended")
    return {
        "id": name,
        "name": visible(study.name),
        **{key: about[key] for key in (*kept, "trials", "objective", "data")},
        "found": findings.summary(study)[1],
    }


def _budget(study: Study) -> dict[str, Any]:
    spent, best = figures.budget_curve(study)
    return {"spent": spent, "best": best}


def _best_curve(study: Study) -> dict[str, Any] | None:
    if not study.scored:
        return None
    rows = study.epochs[study.epochs["trial"] == findings.leading(study)["trial"]]
    names = ("val_auc", "val_auc_low", "val_auc_high")
    return {"epoch": rows["epoch"].tolist(), **{name: plain(rows[name].tolist()) for name in names}}


def _best_settings(study: Study) -> dict[Any, Any]:
    return findings.leading(study).to_dict() if study.scored else {}


def _space(study: Study) -> str:
    return study.space.name if study.space is not None else "-"


def _differing(
    fields: Sequence[tuple[str, str]], studies: Sequence[dict[Any, Any]], more: Sequence[str] = ()
) -> list[dict[str, Any]]:
    rows = []
    for name, meaning in [*((name, "") for name in more), *fields]:
        texts = [_text(name, study.get(name)) for study in studies]
        if len(set(texts)) > 1:
            told = "" if meaning == name else meaning.split(". ")[0]
            rows.append({"name": name, "values": texts, "meaning": told})
    return rows


def _text(name: str, value: Any) -> str:
    if isinstance(value, list | tuple | dict):
        return printable(str(value))[:300]
    return "-" if value is None or pd.isna(value) else printable(format_value(name, value))


def _doubts(studies: Sequence[Study]) -> list[str]:
    told = []
    if len({study.spec.objective for study in studies}) > 1:
        titles = {OBJECTIVES[study.spec.objective].title for study in studies}
        told.append(f"The objectives differ ({', '.join(sorted(titles))}): values do not compare.")
    if len({study.info.get("cohort") for study in studies}) > 1:
        told.append("The cohorts differ: a higher value may mean an easier cohort.")
    folds = {frozenset(study.trials_full["fold"].dropna()) for study in studies}
    if len(folds) > 1:
        told.append("The validation folds differ: some folds are easier than others.")
    return told
