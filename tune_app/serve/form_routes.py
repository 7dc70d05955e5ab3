"""The routes of the form for a new study: its description, and measurements of this machine."""

import json
from functools import cache
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request, Response
from fastapi import Path as InPath
from pydantic import BaseModel

from search_spaces.ablations import VARIANT_SETS
from search_spaces.fixes import shown
from search_spaces.space import NOT_SEARCHED, Space
from search_spaces.spaces import SPACES
from trainables.config import FineTuneConfig
from trainables.objective import OBJECTIVES
from tune_app.report import figures
from tune_app.serve.access import Refused
from tune_app.serve.change_routes import with_paths
from tune_app.serve.queue import QueueError
from tune_app.serve.service import TheService
from tune_app.serve.views import to_json
from tune_app.study.presets import PRESETS
from tune_app.study.spec import StudySpec, build_spec

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


class Measurement(BaseModel):
    """A measurement of the time of an epoch on this machine."""

    key: str
    """Names it in GET /api/measure/{key}."""
    state: Literal["measuring", "measured", "failed", "unknown"]
    problems: list[str]
    """Why it failed, one line per reason."""


@router.post("/measure")
def measure(fields: Annotated[dict[str, Any], Body()], service: TheService) -> Measurement:
    """Start to measure how long an epoch of a study takes on this machine; a result that is known is not measured again.

    GET returns when it has ended, `/check` then contains the time of the study. No study may run meanwhile.
    """
    spec = build_spec(with_paths(fields, service))
    if service.on_cluster:
        raise QueueError(
            "studies from this page run on a Ray cluster: a measurement of this machine shows nothing about it"
        )
    key = service.measurements.begin(spec)
    return Measurement(key=key, **service.measurements.state(key))


@router.get("/measure/{key}")
def measurement(
    key: Annotated[str, InPath(pattern="^[0-9a-f]{16}$")], service: TheService, request: Request
) -> Measurement:
    """Return what became of a measurement. It takes the token, as its problems name files."""
    if not request.scope["trusted"]:
        raise Refused(401, "measurements take the token: log in on the page, or send it")
    return Measurement(key=key, **service.measurements.state(key))


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
