"""The configuration of a study that takes the most time and memory."""

from typing import Any

from trainables.config import FineTuneConfig, build_config
from tune_app.study.spec import StudySpec

HEAVIER = ("batch_size", "gradient_accumulation_steps", "depth", "width")
"""Hyperparameters of which the largest value of a study counts: no trial may run out of memory."""


def heaviest(spec: StudySpec) -> FineTuneConfig:
    """Return the study's configuration with the largest values that a trial may have of what takes time and memory."""
    given: dict[str, list[Any]] = {name: [] for name in HEAVIER}
    if spec.kind == "search":
        for parameter in spec.resolved_space().parameters.values():
            if parameter.name in given:
                choice = parameter.distribution
                given[parameter.name] += getattr(choice, "choices", None) or [choice.high]
    for trial in spec.planned:
        for name in given.keys() & trial.overrides.keys():
            given[name].append(trial.overrides[name])
    return build_config(
        {**spec.shared, **{name: max(values) for name, values in given.items() if values}}
    )
