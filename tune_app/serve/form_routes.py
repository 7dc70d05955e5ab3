"""The route that describes the form for a new study."""

import json
from functools import cache
from typing import Any

from fastapi import APIRouter, Response

from search_spaces.ablations import VARIANT_SETS
from search_spaces.fixes import shown
from search_spaces.space import NOT_SEARCHED, Space
from search_spaces.spaces import SPACES
from trainables.config import FineTuneConfig
from trainables.objective import OBJECTIVES
from tune_app.report import figures
from tune_app.serve.views import to_json
from tune_app.study.presets import PRESETS
from tune_app.study.spec import StudySpec

router = APIRouter(prefix="/api")

FIELDS = (
    "data",
    "space",
    "trials",
    "objective",
    "sampler",
    "seed",
    "gpus_per_trial",
    "max_concurrent",
)
"""Fields of a study file that the form has."""


@router.get("/form")
def form() -> Response:
    """Return the spaces with their ranges, the fields of a study, and the hyperparameters with their meaning."""
    return Response(_form(), media_type="application/json")


@cache
def _form() -> bytes:
    objectives = [{"name": each.name, "title": each.title} for each in OBJECTIVES.values()]
    hyperparameters = [
        {
            "name": name,
            "default": written(info.default),
            "meaning": info.description or "",
        }
        for name, info in FineTuneConfig.model_fields.items()
    ]
    return to_json(
        {
            "spaces": [_space(space) for space in SPACES.values()],
            "hyperparameters": hyperparameters,
            "fields": {name: StudySpec.model_fields[name].description for name in FIELDS},
            "objectives": objectives,
            "samplers": ["model", "tpe", "random", "qmc", "gp"],
            "not_searched": NOT_SEARCHED,
            "presets": PRESETS,
            "variant_sets": list(VARIANT_SETS),
            "palette": figures.PALETTE,
        }
    )


def written(value: Any) -> str:
    """Return a value as a study file has it."""
    if isinstance(value, float):
        return shown(value)
    return json.dumps(value)


def _space(space: Space) -> dict[str, Any]:
    written = space.to_mapping()
    rows = {row.name: row for row in space.describe()}
    parameters = [
        {
            "name": name,
            "sets": space.parameters[name].hyperparameter,
            "role": role,
            **ranges,
            "before": rows[name].before,
            "default": rows[name].default,
        }
        for role in ("search", "retune")
        for name, ranges in written[role].items()
    ]
    return {
        "name": space.name,
        "title": space.title,
        "parameters": parameters,
        "fixed": written["fixed"],
    }
