"""A search space by its name, or as a study file writes it out."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from search_spaces.fixes import shown
from search_spaces.space import DERIVED, NOT_SEARCHED, Parameter, Role, Space, SpaceError, tidy
from search_spaces.spaces import SPACES
from trainables.config import (
    ConfigError,
    FineTuneConfig,
    Scalar,
    as_scalar,
    build_config,
    unknown_hyperparameter,
)
from trainables.errors import did_you_mean

_SPACE_FIELDS = ("name", "title", "base", "search", "retune", "fixed", "notes")
_RANGE_FIELDS = ("low", "high", "log", "step", "choices", "why")


def space_from(value: str | Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Space:
    """Return the named space, or the one written out in a study file; with `config`, held to it by `Space.within`.

    Raises SpaceError with every violation at once. Written out, a space is a mapping:

        base: documented            # optional: a named space to start from
        search:                     # the study's question
          s: {low: 5, high: 40, log: true}
          one_minus_ema_decay: {low: 0.001, high: 0.02, log: true}
          head: [cosine, linear]
        retune:                     # varied only to be fair
          backbone_lr: {low: 1e-5, high: 1e-3, log: true}
        fixed:
          dropout: 0.5
    """
    if not isinstance(value, str):
        space = _written_space(value)
    elif value in SPACES:
        space = SPACES[value]
    else:
        hint = did_you_mean(value, SPACES)
        raise SpaceError(f"unknown space {value!r}: one of {', '.join(SPACES)}{hint}")
    try:
        space = space.within(config or {})
    except ConfigError as error:
        raise SpaceError(error.problems) from None
    if problems := space.problems() + space.never_read():
        raise SpaceError(problems)
    return space


def _written_space(written: Mapping[str, Any]) -> Space:
    problems = [
        f"unknown field {name!r}{did_you_mean(name, _SPACE_FIELDS)}: a space has {', '.join(_SPACE_FIELDS)}"
        for name in written
        if name not in _SPACE_FIELDS
    ]
    base = _base(written, problems)
    own = _own_parameters(written, problems)
    fixed = _fixed_values(written, problems)
    problems += [
        f"{parameter.hyperparameter} is both fixed and decided by {parameter.name}: keep one"
        for parameter in own.values()
        if parameter.hyperparameter in fixed
    ]
    notes = _notes(written, problems)
    space = Space(
        str(written.get("name") or "custom"),
        str(written.get("title") or "the user's own space"),
        own,
        fixed,
        notes,
    )
    if base is not None:
        space = _on_top(base.within(fixed), space, own)
    if not space.parameters and not problems:
        problems.append("nothing to search: name parameters under `search`, or a `base`")
    if problems:
        raise SpaceError(problems + (space.problems() if space.parameters else []))
    return space


def _base(written: Mapping[str, Any], problems: list[str]) -> Space | None:
    if written.get("base") is None:
        return None
    try:
        return space_from(str(written["base"]))
    except SpaceError as error:
        problems += error.problems
        return None


def _notes(written: Mapping[str, Any], problems: list[str]) -> tuple[str, ...]:
    notes = written.get("notes") or ()
    if isinstance(notes, str) or not isinstance(notes, Sequence):
        problems.append(f"notes={notes!r}: a list of sentences")
        return ()
    return tuple(map(str, notes))


def _fixed_values(written: Mapping[str, Any], problems: list[str]) -> dict[str, Scalar]:
    """Values that are written under `fixed`; where one of them is wrong, none, and their errors go to `problems`."""
    fixed: dict[str, Scalar] = {
        name: _off(name, value) if name in FineTuneConfig.model_fields else value
        for name, value in _mapping(written, "fixed", problems).items()
    }
    try:
        build_config(fixed)
    except ConfigError as error:
        problems += [f"fixed: {problem}" for problem in error.problems]
        return {}
    return fixed


def _on_top(base: Space, space: Space, own: Mapping[str, Parameter]) -> Space:
    """Return the base with the parameters `own` of `space`, and the notes of both."""
    decided = {parameter.hyperparameter for parameter in own.values()}
    kept = {name: p for name, p in base.parameters.items() if p.hyperparameter not in decided}
    return replace(
        space,
        parameters={**kept, **own},
        fixed={name: value for name, value in base.fixed.items() if name not in decided},
        notes=(*base.notes, *space.notes),
    )


def _own_parameters(written: Mapping[str, Any], problems: list[str]) -> dict[str, Parameter]:
    """Parameters that are written under `search` and `retune`; their errors go to `problems`."""
    own: dict[str, Parameter] = {}
    roles: tuple[tuple[str, Role], ...] = (("search", "searched"), ("retune", "retuned"))
    for group, role in roles:
        entries = _mapping(written, group, problems)
        for name, entry in entries.items():
            try:
                own_parameter = _parameter(name, entry, role)
            except SpaceError as error:
                problems += error.problems
                continue
            twin = next(
                (p for p in own.values() if p.hyperparameter == own_parameter.hyperparameter), None
            )
            if twin is not None:
                problems.append(
                    f"{twin.name} and {name} both decide {own_parameter.hyperparameter}: keep one"
                )
            own[name] = own_parameter
    return own


def _mapping(written: Mapping[str, Any], group: str, problems: list[str]) -> dict[str, Any]:
    entries = written.get(group)
    if entries is None:
        return {}
    if not isinstance(entries, Mapping):
        problems.append(
            f"{group}: a mapping of names to {'values' if group == 'fixed' else 'ranges'}, not {entries!r}"
        )
        return {}
    return {str(name): entry for name, entry in entries.items()}


def _parameter(name: str, entry: Any, role: Role) -> Parameter:
    hyperparameter = DERIVED[name].hyperparameter if name in DERIVED else name
    if hyperparameter not in FineTuneConfig.model_fields:
        raise SpaceError(unknown_hyperparameter(name, DERIVED))
    if hyperparameter in NOT_SEARCHED:
        raise SpaceError(
            f"{name} is not searched: {NOT_SEARCHED[hyperparameter]}; it may stand under `fixed`"
        )
    if isinstance(entry, list | tuple):
        entry = {"choices": entry}
    if not isinstance(entry, Mapping):
        raise SpaceError(
            f"{name}: {entry!r} is no range: write {{low: .., high: ..}} or a list of choices; one value goes under `fixed`"
        )
    if unknown := [
        f"{name}: unknown field {key!r}{did_you_mean(key, _RANGE_FIELDS)}"
        for key in entry
        if key not in _RANGE_FIELDS
    ]:
        raise SpaceError(unknown)
    distribution = _choices(name, entry) if "choices" in entry else _range(name, entry)
    return Parameter(name, distribution, role, str(entry.get("why") or ""))


def _choices(name: str, entry: Mapping[str, Any]) -> BaseDistribution:
    problems = [
        f"{name}: {key} does not go with choices"
        for key in ("low", "high", "log", "step")
        if key in entry
    ]
    choices = entry["choices"]
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise SpaceError([*problems, f"{name}: choices must be a list, not {choices!r}"])
    if len(choices) < 2:
        few = (
            f"{name}: {len(choices)} choices, at least two are needed; one value goes under `fixed`"
        )
        raise SpaceError([*problems, few])
    values: list[Scalar] = []
    for choice in choices:
        value, problem = _choice(name, choice)
        if problem is not None:
            problems.append(problem)
            continue
        # 0 and 1 equal False and True
        if any(
            value == other and isinstance(value, bool) == isinstance(other, bool)
            for other in values
        ):
            problems.append(f"{name}: {choice!r} is listed twice")
        values.append(value)
    problems += _outside(name, [value for value in values if isinstance(value, float)])
    if problems:
        raise SpaceError(problems)
    return CategoricalDistribution(values)


def _choice(name: str, choice: Any) -> tuple[Scalar, str | None]:
    """Return a choice as the hyperparameter's value, or the problem with it."""
    wanted = _kind(name)
    if wanted in (int, float):
        number, problem = _number_of(name, choice, wanted)
        return (int(number) if wanted is int else number), problem
    value = as_scalar(name, _off(name, choice))
    if wanted is bool and not isinstance(value, bool):
        return None, f"{name}: {choice!r} is neither true nor false"
    if not isinstance(value, str | int | float | bool | None):
        return None, f"{name}: {choice!r} is no single value; write a shape as '96x96x64'"
    return value, None


def _number_of(name: str, given: object, wanted: type, shown: str = "") -> tuple[float, str | None]:
    """Return the number, and the problem where it is none; `shown`: the given value with its field."""
    number = _number(given)
    if number is None or (wanted is int and not number.is_integer()):
        whole = "whole " if wanted is int else ""
        return 0.0, f"{name}: {shown or repr(given)} is no {whole}number"
    return number, None


def _range(name: str, entry: Mapping[str, Any]) -> BaseDistribution:
    wanted = _kind(name)
    if wanted not in (int, float):
        raise SpaceError(
            f"{name} has no range, it takes choices: write {name}: [{', '.join(_possible(name))}]"
        )
    problems = [f"{name}: {key} is missing" for key in ("low", "high") if key not in entry]
    numbers: dict[str, float] = {}
    for key in ("low", "high", "step"):
        if entry.get(key) is None:
            continue
        number, problem = _number_of(name, entry[key], wanted, f"{key}={entry[key]!r}")
        if problem is None:
            numbers[key] = number
        else:
            problems.append(problem)
    log = entry.get("log") or False
    if not isinstance(log, bool):
        problems.append(f"{name}: log={log!r} is neither true nor false")
    if problems:
        raise SpaceError(problems)
    low, high, step = numbers["low"], numbers["high"], numbers.get("step")
    problems = [*_wrong_ends(name, low, high, step, log=log), *_outside(name, [low, high])]
    if problems:
        raise SpaceError(problems)
    if wanted is int:
        return IntDistribution(int(low), int(high), log=log, step=1 if step is None else int(step))
    return FloatDistribution(low, high, log=log, step=step)


def _wrong_ends(
    name: str, low: float, high: float, step: float | None, *, log: bool
) -> Iterator[str]:
    if low > high:
        yield f"{name}: low={shown(low)} is above high={shown(high)}"
    if low == high:
        yield f"{name}: low and high are both {shown(low)}; one value goes under `fixed`"
    if log and low <= 0:
        yield f"{name}: low={shown(low)} on a log scale, it must be > 0"
    if step is None:
        return
    if log:
        yield f"{name}: step does not go with log"
    if step <= 0:
        yield f"{name}: step={shown(step)}, it must be > 0"
    elif low < high and abs((steps := (high - low) / step) - round(steps)) > 1e-8:
        nearest = tidy(low + math.floor(steps) * step)
        yield (
            f"{name}: steps of {shown(step)} from {shown(low)} never reach high={shown(high)}, but {shown(nearest)}"
        )


def _outside(name: str, values: Sequence[float]) -> list[str]:
    """Bounds of derived parameters; those of hyperparameters are the config's own, found by `Space.problems`."""
    if name not in DERIVED:
        return []
    bounds = DERIVED[name]
    return [
        f"{name}={shown(value)}: it lies between {shown(bounds.low)} and {shown(bounds.high)} ({bounds.title})"
        for value in values
        if not bounds.low <= value <= bounds.high
    ]


def _kind(name: str) -> type | None:
    """int, float or bool for a hyperparameter that is one of these, None for all others."""
    if name in DERIVED:
        return float
    annotation: object = FineTuneConfig.model_fields[name].annotation
    for kind in (int, float, bool):
        if annotation is kind:
            return kind
    return None


def _possible(name: str) -> list[str]:
    annotation = FineTuneConfig.model_fields[name].annotation
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return ["true", "false"] if annotation is bool else ["..", ".."]


def _number(value: object) -> float | None:
    """A finite number; also as text, because YAML reads 1e-5, without a dot, as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _off(name: str, value: Any) -> Any:
    """YAML reads a bare off as false; where `off` is a choice, it was meant."""
    return "off" if value is False and "off" in _possible(name) else value
