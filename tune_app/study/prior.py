"""What a search knows of `backbone_lr` before anything has run: its effect in recorded runs of other cohorts.

`medtune bench prior` learns one from tables of `medtune bench record`; `prior.json` is the shipped one.
"""

import math
from collections.abc import Mapping
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from trainables.config import problem_lines

Floats = npt.NDArray[np.float64]


class PriorError(ValueError):
    """A file that holds no prior."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Prior:
    """The effect of the backbone's learning rate on other cohorts."""

    log_rate: tuple[float, ...]
    """Natural logarithms of rates, ascending."""
    lift: tuple[float, ...]
    """Logits of AUC above the mean of all rates; constant beyond both ends."""
    provenance: dict[str, Any]
    """Which recorded curves it was learned from, and how."""

    @model_validator(mode="after")
    def _is_a_curve(self) -> Self:
        if not self.log_rate or len(self.log_rate) != len(self.lift):
            raise ValueError(
                f"{len(self.log_rate)} rates and {len(self.lift)} lifts: as many of each, and some"
            )
        if not all(map(math.isfinite, (*self.log_rate, *self.lift))):
            raise ValueError("rates and lifts are finite numbers")
        if any(later <= earlier for earlier, later in pairwise(self.log_rate)):
            raise ValueError("the rates are not in ascending order")
        return self

    def __call__(self, log_rates: Floats) -> Floats:
        """Return the expected lift (n,) at natural logarithms of rates (n,)."""
        return np.interp(log_rates, self.log_rate, self.lift)


_WRITTEN = TypeAdapter(Prior)


def prior_text(prior: Prior) -> str:
    """Return what `read_prior` reads."""
    return _WRITTEN.dump_json(prior, indent=1).decode() + "\n"


def read_prior(text: str) -> Prior:
    """Return the prior that is written as JSON in `text`. Raises ValueError with every problem."""
    try:
        return _WRITTEN.validate_json(text)
    except ValidationError as error:
        raise ValueError("; ".join(problem_lines(error.errors(include_url=False)))) from None


def prior_of_fields(fields: Mapping[str, Any]) -> Prior:
    """Return the prior of what its file holds. Raises pydantic's ValidationError, a ValueError."""
    return _WRITTEN.validate_python(fields)


def prior_of_file(path: str | Path) -> Prior:
    """Return the prior in a file. Raises PriorError, which says how to make one."""
    made = "`medtune bench prior TABLE... --out FILE` writes one"
    try:
        return read_prior(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise PriorError(f"{path} cannot be read ({error.strerror}); {made}") from None
    except ValueError as error:  # not text, not JSON, not a prior
        raise PriorError(f"{path} holds no prior ({error}); {made}") from None


def shipped_prior() -> Prior:
    """Return the prior in `prior.json`. It holds for runs from random weights with Adam."""
    return read_prior(
        resources.files(__package__).joinpath("prior.json").read_text(encoding="utf-8")
    )
