"""Studies that are sent to a cluster as they were asked for, because only the cluster may see what decides their trials.

The folds of the table decide which runs an ablation has, the search and its table those of a confirmation, the folder
how a study resumes. A job gets one of these in the place of a study file, and makes the plan when it starts.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trainables.config import Scalar, problem_lines
from tune_app.study.errors import SpecError

KIND = "asked"
"""Key that a file of these has, and a study file has not."""


class _Asked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    fields: dict[str, Any] = Field(default_factory=dict)
    """Fields of the study's spec that were given, such as `max_concurrent`."""


class AskedAblation(_Asked):
    """`medtune ablate`."""

    asked: Literal["ablation"] = "ablation"
    data: str
    """Table of volumes."""
    variants: dict[str, dict[str, Scalar]]
    """Overrides by variant, the reference first."""
    seeds: int
    first_seed: int = 0
    folds: str = "all"
    config: dict[str, Any] = Field(default_factory=dict)
    """Hyperparameters that all runs share."""


class AskedConfirmation(_Asked):
    """`medtune confirm`."""

    asked: Literal["confirmation"] = "confirmation"
    search: str
    """Folder or URL of the search."""
    top: int
    seeds: int
    folds: str = "all"


class AskedResumption(_Asked):
    """`medtune resume`."""

    asked: Literal["resumption"] = "resumption"
    hours: float | None = None
    """Hours that it may take from now on; None: as before."""


Asked = AskedAblation | AskedConfirmation | AskedResumption
_ADAPTER: TypeAdapter[Asked] = TypeAdapter(Annotated[Asked, Field(discriminator=KIND)])


def read_asked(fields: Mapping[str, Any]) -> Asked:
    """Return what the fields of a file ask for. Raises SpecError with every violation."""
    try:
        return _ADAPTER.validate_python(dict(fields))
    except ValidationError as error:
        raise SpecError(problem_lines(error.errors(include_url=False))) from None


def asked_text(asked: Asked) -> str:
    """Return the file that `read_asked` reads, as JSON, which is YAML."""
    return json.dumps(asked.model_dump(mode="json"), indent=1) + "\n"
