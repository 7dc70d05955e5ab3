"""Named search spaces: what is sampled, and how a sample becomes values of `FineTuneConfig`.

A sample is what Optuna sees: parameters on the scale they are best searched on, such as 1 - ema_decay on a log scale.
Overrides are what a run sees. A parameter that nothing would read, such as the LDAM margin when the loss is focal, is
not sampled at all: which ones these are is a property of the hyperparameter, so it holds in every space alike.
"""

import difflib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args, get_origin

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from search_spaces.fixes import DOCUMENT_EPOCHS, all_fixes, baseline, default_of, documented_after, drw_start_at, shown
from trainables.config import FORMER_NAMES, ConfigError, FineTuneConfig, Scalar, build_config

Sample = dict[str, Scalar]
"""Values by parameter name; parameters that nothing would read are absent."""

Role = Literal["searched", "retuned"]
"""searched: what the study asks about; retuned: varied only so that each searched value is judged at its own best."""


class SpaceError(ValueError):
    """A space that cannot be searched. `problems` holds one line a violation, all of them."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type["SpaceError"], tuple[list[str]]]:
        return type(self), (self.problems,)


@dataclass(frozen=True)
class Derived:
    """A parameter that is searched on another scale than its hyperparameter has."""

    hyperparameter: str
    title: str
    low: float
    high: float
    """Largest range that makes sense; `low` is allowed, and so is `high`."""
    decode: Callable[[float, Mapping[str, Any]], Scalar]
    """(parameter, values of all hyperparameters decided so far) -> value of the hyperparameter."""
    encode: Callable[[Mapping[str, Any]], float]
    """Values of all hyperparameters -> the parameter that gives them."""
    reads: tuple[str, ...] = ()
    """Hyperparameters that must be decided before."""


def _tidy(value: float) -> float:
    """Twelve digits: 1 - 0.995 is 0.005 and not 0.0050000000000000044, in a table and at the end of a range."""
    return float(f"{value:.12g}")


DERIVED: dict[str, Derived] = {
    "one_minus_ema_decay": Derived(
        "ema_decay",
        "1 - ema_decay, the weight of each update in the average",
        low=1e-9,
        high=1.0,
        decode=lambda value, values: _tidy(1 - value),
        encode=lambda values: _tidy(1 - values["ema_decay"]),
    ),
    "drw_start_share": Derived(
        "drw_start_epoch",
        "share of the epochs before re-weighting begins; 1 is never",
        low=0.0,
        high=1.0,
        decode=lambda value, values: drw_start_at(value, values["epochs"]),
        encode=lambda values: min(1.0, (values["drw_start_epoch"] - 1) / values["epochs"]),
    ),
    "freeze_backbone_share": Derived(
        "freeze_backbone_epochs",
        "share of the epochs in which only the head trains",
        low=0.0,
        high=1.0,
        decode=lambda value, values: round(value * values["epochs"]),
        encode=lambda values: values["freeze_backbone_epochs"] / values["epochs"],
    ),
    "classifier_lr_ratio": Derived(
        "classifier_lr",
        "classifier_lr / backbone_lr",
        low=1e-6,
        high=1e6,
        decode=lambda value, values: _tidy(value * values["backbone_lr"]),
        encode=lambda values: _tidy(values["classifier_lr"] / values["backbone_lr"]),
        reads=("backbone_lr",),
    ),
}
"""Parameters that are no hyperparameters themselves, by name."""


class Condition(NamedTuple):
    """When a hyperparameter is read at all."""

    text: str
    reads: tuple[str, ...]
    holds: Callable[[Mapping[str, Any]], bool]


READ_ONLY_WHEN: dict[str, Condition] = {
    "max_m": Condition("loss=ldam", ("loss",), lambda v: v["loss"] == "ldam"),
    "s": Condition(
        "loss=ldam or head=cosine", ("loss", "head"), lambda v: v["loss"] == "ldam" or v["head"] == "cosine"
    ),
    "focal_gamma": Condition("loss=focal", ("loss",), lambda v: v["loss"] == "focal"),
    "unfreeze_stage_epochs": Condition(
        "the backbone is frozen at first", ("freeze_backbone_epochs",), lambda v: v["freeze_backbone_epochs"] > 0
    ),
    "window_low": Condition("intensity=window", ("intensity",), lambda v: v["intensity"] == "window"),
    "window_high": Condition("intensity=window", ("intensity",), lambda v: v["intensity"] == "window"),
    "ema_warmup": Condition("ema_decay > 0", ("ema_decay",), lambda v: v["ema_decay"] > 0),
    "ema_buffers": Condition("ema_decay > 0", ("ema_decay",), lambda v: v["ema_decay"] > 0),
    "drw_beta": Condition(
        "re-weighting begins within the run",
        ("drw_start_epoch", "epochs"),
        lambda v: v["drw_start_epoch"] <= v["epochs"],
    ),
}
"""Hyperparameters that some settings leave unread. A value nothing reads would only mislead the sampler."""

NOT_SEARCHED: dict[str, str] = {
    "epochs": "trials of unequal length cannot be compared epoch by epoch",
    "fold": "`medtune confirm` runs the best configurations on all folds",
    "num_folds": "it changes the data, not the recipe",
    "cross_validate": "it changes the data, not the recipe",
    "seed": "`medtune confirm` runs the best configurations with several seeds: a lucky seed is no hyperparameter",
    "deterministic": "it changes the speed, not the recipe",
    "num_classes": "it belongs to the data",
    "in_channels": "it belongs to the data",
    "validation_batch_size": "it changes the speed, not the recipe",
    "train_auc_volumes": "it changes what is measured, not the recipe",
}
"""Hyperparameters a space may hold but not vary, with the reason."""

NOT_COMPARED = ("seed", "fold", "deterministic", "validation_batch_size", "train_auc_volumes")
"""What may differ between two runs of the same setting."""


@dataclass(frozen=True)
class Parameter:
    """One sampled quantity."""

    name: str
    """A hyperparameter, or a name of DERIVED."""
    distribution: BaseDistribution
    role: Role = "searched"
    why: str = ""

    @property
    def hyperparameter(self) -> str:
        """The hyperparameter it decides."""
        return DERIVED[self.name].hyperparameter if self.name in DERIVED else self.name

    @property
    def reads(self) -> frozenset[str]:
        """The hyperparameters that decide whether it is sampled, or what it means."""
        derived = DERIVED[self.name].reads if self.name in DERIVED else ()
        condition = READ_ONLY_WHEN.get(self.hyperparameter)
        return frozenset((*derived, *(condition.reads if condition else ())))

    def decode(self, value: Scalar, values: Mapping[str, Any]) -> Scalar:
        """Return the hyperparameter's value."""
        if self.name not in DERIVED:
            return value
        assert isinstance(value, int | float), f"{self.name}={value!r}"
        return DERIVED[self.name].decode(value, values)

    def encode(self, values: Mapping[str, Any]) -> Scalar:
        """Return the sample's value that decodes to what `values` holds."""
        if self.name in DERIVED:
            return DERIVED[self.name].encode(values)
        value: Scalar = values[self.name]
        return value

    def holds(self, value: Scalar) -> bool:
        """Whether the distribution can produce `value`."""
        if isinstance(self.distribution, CategoricalDistribution):
            return any(
                value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in self.choices
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high, step = self.distribution.low, self.distribution.high, self.distribution.step
        steps = (value - low) / step if step else 0.0
        return bool(low <= value <= high and abs(steps - round(steps)) < 1e-8)

    @property
    def choices(self) -> tuple[Scalar, ...]:
        """The choices of a categorical distribution."""
        return tuple(self.distribution.choices)

    @property
    def ends(self) -> tuple[Scalar, ...]:
        """Its extreme values: the choices, or the lowest and the highest."""
        if isinstance(self.distribution, CategoricalDistribution):
            return self.choices
        return (self.distribution.low, self.distribution.high)

    def range_text(self) -> str:
        """The range as people read it: `2e-5 to 5e-4, log`."""
        if isinstance(self.distribution, CategoricalDistribution):
            return ", ".join(shown(choice) for choice in self.choices)
        text = f"{shown(self.distribution.low)} to {shown(self.distribution.high)}"
        if self.distribution.log:
            return f"{text}, log"
        step = self.distribution.step
        return f"{text}, step {shown(step)}" if step and (step != 1 or isinstance(step, float)) else text


class SpaceRow(NamedTuple):
    """A line of `medtune spaces NAME`."""

    role: str
    """searched, retuned or fixed."""
    name: str
    values: str
    """The range; for what is fixed, the value."""
    before: str
    """The document's original setting on the same scale; empty where it has none."""
    default: str
    when: str
    """When it is read; empty for always."""
    why: str


@dataclass(frozen=True)
class Space:
    """What one search varies and what it holds."""

    name: str
    title: str
    parameters: Mapping[str, Parameter]
    fixed: Mapping[str, Scalar] = field(default_factory=dict)
    """Hyperparameters the space holds at another value than the default, or on purpose at the default."""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        decided = {parameter.hyperparameter for parameter in self.parameters.values()}
        late = [p for p in self.parameters.values() if p.reads & decided]
        early = [p for p in self.parameters.values() if not p.reads & decided]
        object.__setattr__(self, "parameters", {p.name: p for p in (*early, *late)})  # what decides goes first

    @property
    def conditional(self) -> bool:
        """Whether some samples lack some parameters."""
        return len(self.unconditional) < len(self.parameters)

    @property
    def unconditional(self) -> dict[str, BaseDistribution]:
        """Distributions of the parameters that every sample has."""
        decided = {p.hyperparameter for p in self.parameters.values()}
        return {
            p.name: p.distribution
            for p in self.parameters.values()
            if not (decided & set(READ_ONLY_WHEN[p.hyperparameter].reads if p.hyperparameter in READ_ONLY_WHEN else ()))
        }

    def sample(self, suggest: Callable[[Parameter], Scalar], epochs: int) -> Sample:
        """Return a sample: each parameter that will be read gets its value from `suggest`, in order."""
        values = self._start(epochs)
        sample: Sample = {}
        for parameter in self.parameters.values():
            if is_read(parameter.hyperparameter, values):
                sample[parameter.name] = suggest(parameter)
                values[parameter.hyperparameter] = parameter.decode(sample[parameter.name], values)
        return sample

    def sample_to_overrides(self, sample: Mapping[str, Scalar], epochs: int) -> dict[str, Scalar]:
        """Return the overrides of a run of `epochs` epochs: the decoded sample, what the space fixes, and `epochs`.

        Values of parameters that nothing would read are ignored. Raises ValueError naming parameters that are missing,
        or that the space does not have.
        """
        if unknown := [name for name in sample if name not in self.parameters]:
            raise ValueError(
                f"space {self.name} has no parameter {_listed(unknown)}: it has {_listed(self.parameters)}"
            )
        values = self._start(epochs)
        overrides: dict[str, Scalar] = {**self.fixed, "epochs": epochs}
        for parameter in self.parameters.values():
            if not is_read(parameter.hyperparameter, values):
                continue
            if parameter.name not in sample:
                raise ValueError(f"space {self.name} needs a value for {parameter.name}; got {_listed(sample)}")
            values[parameter.hyperparameter] = parameter.decode(sample[parameter.name], values)
            overrides[parameter.hyperparameter] = values[parameter.hyperparameter]
        return overrides

    def overrides_to_sample(self, overrides: Mapping[str, Any], epochs: int) -> tuple[Sample | None, list[str]]:
        """Return the sample that gives `overrides` in a run of `epochs` epochs, or None and every reason there is none.

        Nothing is clipped: a setting outside a range, or another one than the space holds, lies outside the space.
        Hyperparameters that `overrides` leaves out are taken at their defaults where they are searched, and at what the
        space holds elsewhere. What no run reads, and seed and fold, may differ.
        """
        try:
            given = _values(build_config({**self.fixed, "epochs": epochs, **overrides}))
            held = _values(build_config({**self.fixed, "epochs": epochs}))
        except ConfigError as error:
            return None, error.problems
        searched = {parameter.hyperparameter for parameter in self.parameters.values()}
        reasons = [
            f"{name}={shown(given[name])}, the space holds {shown(held[name])}"
            for name in overrides
            if name not in searched and name not in NOT_COMPARED and is_read(name, given) and given[name] != held[name]
        ]
        sample: Sample = {}
        for parameter in self.parameters.values():
            if is_read(parameter.hyperparameter, given):
                sample[parameter.name] = self._place(parameter, given, reasons)
        return (None, reasons) if reasons else (sample, [])

    def within(self, config: Mapping[str, Any]) -> "Space":
        """Return the space with the user's own settings held: what `config` names is no longer searched.

        So `--set loss=focal` leaves the margin out of the search as well. Notes say what was dropped.
        """
        fixed = {**self.fixed, **config}
        values = _values(build_config(fixed))
        searched = {p.hyperparameter for p in self.parameters.values()} - set(config)
        kept: dict[str, Parameter] = {}
        notes = list(self.notes)
        for parameter in self.parameters.values():
            name, condition = parameter.hyperparameter, READ_ONLY_WHEN.get(parameter.hyperparameter)
            if name in config:
                notes.append(f"{parameter.name} is not searched: {name} is set to {shown(config[name])}")
            elif condition and not set(condition.reads) & searched and not condition.holds(values):
                notes.append(f"{parameter.name} is not searched: it is read only when {condition.text}")
            else:
                kept[parameter.name] = parameter
        return replace(self, parameters=kept, fixed=fixed, notes=tuple(notes))

    def problems(self, epochs: int | None = None) -> list[str]:
        """Return what makes some sample of the space no valid config in runs of `epochs` epochs; empty if nothing does.

        Every end of every range is tried with every end of every other: the checks of a config are bounds and orders,
        so what holds at all ends holds between them.
        """
        if not self.parameters:
            return [f"space {self.name} has nothing left to search"]
        epochs = self._epochs(epochs)
        found: dict[str, None] = {}
        for corner in self._corners():
            try:
                build_config(self.sample_to_overrides(corner, epochs))
            except ConfigError as error:
                found.update(dict.fromkeys(error.problems))
        return list(found)

    def never_read(self) -> list[str]:
        """Return one line for each parameter that no sample of the space would read."""
        epochs = max(self._epochs(None), DOCUMENT_EPOCHS)  # in a run of one epoch, no share of it is a whole epoch
        seen: set[str] = set()
        for corner in self._corners():
            seen.update(self.sample(_lookup(corner), epochs))
        return [
            f"{p.name} is read only when {READ_ONLY_WHEN[p.hyperparameter].text}, which is never so in this space"
            for p in self.parameters.values()
            if p.name not in seen
        ]

    def describe(self) -> list[SpaceRow]:
        """Return one row a parameter, and one for each hyperparameter of a fix, or held on purpose, that stays fixed."""
        before = {**dict.fromkeys(self.fixed), **baseline()}
        original, usual = _values(build_config(baseline())), _values(build_config({}))
        rows = [
            SpaceRow(
                parameter.role,
                parameter.name,
                parameter.range_text(),
                shown(parameter.encode(original)) if parameter.hyperparameter in baseline() else "",
                shown(parameter.encode(usual)),
                READ_ONLY_WHEN[parameter.hyperparameter].text if parameter.hyperparameter in READ_ONLY_WHEN else "",
                parameter.why,
            )
            for role in get_args(Role)
            for parameter in self.parameters.values()
            if parameter.role == role
        ]
        searched = {parameter.hyperparameter for parameter in self.parameters.values()}
        for name in before:
            if name not in searched:
                value = self.fixed.get(name, usual[name])
                old = shown(original[name]) if name in baseline() else ""
                rows.append(SpaceRow("fixed", name, shown(value), old, shown(usual[name]), "", ""))
        return rows

    def to_mapping(self) -> dict[str, Any]:
        """Return the space written out as a study file has it; `space_from` gives the same space back."""
        groups = {"searched": "search", "retuned": "retune"}
        written: dict[str, Any] = {"name": self.name, "title": self.title, "search": {}, "retune": {}}
        for parameter in self.parameters.values():
            written[groups[parameter.role]][parameter.name] = _written(parameter)
        return written | {"fixed": dict(self.fixed), "notes": list(self.notes)}

    def _epochs(self, epochs: int | None) -> int:
        return epochs if epochs is not None else int(self.fixed.get("epochs") or DOCUMENT_EPOCHS)

    def _start(self, epochs: int) -> dict[str, Any]:
        """Values of all hyperparameters before anything is sampled. Unchecked: `problems` is the check."""
        defaults = {name: info.default for name, info in FineTuneConfig.model_fields.items()}
        return {**defaults, **self.fixed, "epochs": epochs}

    def _place(self, parameter: Parameter, values: Mapping[str, Any], reasons: list[str]) -> Scalar:
        value = parameter.encode(values)
        if not parameter.holds(value):
            reasons.append(f"{parameter.name}={shown(value)} is not in {parameter.range_text()}")
        if isinstance(parameter.distribution, FloatDistribution) and isinstance(value, int):
            return float(value)
        return value

    def _corners(self) -> Iterator[Sample]:
        first = {name: parameter.ends[0] for name, parameter in self.parameters.items()}
        yield first
        for one, two in itertools.combinations_with_replacement(self.parameters.values(), 2):
            for a, b in itertools.product(one.ends, two.ends):
                yield {**first, one.name: a, two.name: b}


def _lookup(sample: Mapping[str, Scalar]) -> Callable[[Parameter], Scalar]:
    return lambda parameter: sample[parameter.name]


def is_read(hyperparameter: str, values: Mapping[str, Any]) -> bool:
    """Whether a run with these values reads the hyperparameter at all."""
    condition = READ_ONLY_WHEN.get(hyperparameter)
    return condition is None or condition.holds(values)


class WarmStart(NamedTuple):
    """Settings to try first."""

    points: dict[str, Sample]
    left_out: dict[str, list[str]]
    """Settings that are no point of the space, each with the reasons."""


WARM_STARTS: dict[str, Callable[[int], dict[str, Scalar]]] = {
    "before": baseline,
    "after": documented_after,
    "defaults": all_fixes,
}
"""The document's original and recommended settings, and the defaults; by the names a study file uses."""


def warm_start_points(space: Space, epochs: int, names: Iterable[str] | None = None) -> WarmStart:
    """Return the named settings as samples of the space; all of WARM_STARTS when `names` is None.

    Only what the space searches is taken from a setting, the rest stays as the space holds it: `before` in a space
    that fixes the cosine head is the document's margins, rates and epochs under a cosine head, not its baseline.
    Epochs keep their share of the run. A setting outside a range is left out, not clipped, and so is one that gives
    the same sample as another. Raises SpaceError for unknown names.
    """
    wanted = list(WARM_STARTS) if names is None else list(names)
    if unknown := [name for name in wanted if name not in WARM_STARTS]:
        raise SpaceError([f"unknown warm start {_listed(unknown)}: there are {_listed(WARM_STARTS)}"])
    searched = {parameter.hyperparameter for parameter in space.parameters.values()}
    points: dict[str, Sample] = {}
    left_out: dict[str, list[str]] = {}
    for name in wanted:
        # A share of the run is exact at the document's own length; epochs themselves are those of this run.
        lengths = {length: _searched_values(space, name, length, searched) for length in (epochs, DOCUMENT_EPOCHS)}
        reasons: list[str] = []
        sample: Sample = {}
        for parameter in space.parameters.values():
            if is_read(parameter.hyperparameter, lengths[epochs]):
                values = lengths[DOCUMENT_EPOCHS if parameter.name in DERIVED else epochs]
                sample[parameter.name] = space._place(parameter, values, reasons)
        same = next((other for other, point in points.items() if point == sample), None)
        if same is not None:
            reasons.append(f"the same point as {same!r} in this space")
        if reasons:
            left_out[name] = reasons
        else:
            points[name] = sample
    return WarmStart(points, left_out)


def space_from(value: str | Mapping[str, Any], config: Mapping[str, Any] | None = None) -> Space:
    """Return the named space, or the one written out in a study file; with `config`, held to it by `Space.within`.

    Raises SpaceError with every violation at once. Written out, a space is a mapping:

        base: documented            # optional: a named space to start from
        search:                     # what the study asks about
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
        guess = difflib.get_close_matches(value, SPACES, n=1)
        hint = f"; did you mean {guess[0]!r}?" if guess else ""
        raise SpaceError([f"unknown space {value!r}: one of {', '.join(SPACES)}{hint}"])
    try:
        space = space.within(config or {})
    except ConfigError as error:
        raise SpaceError(error.problems) from None
    if problems := space.problems() + space.never_read():
        raise SpaceError(problems)
    return space


def _searched_values(space: Space, name: str, epochs: int, searched: set[str]) -> dict[str, Any]:
    setting = {key: value for key, value in WARM_STARTS[name](epochs).items() if key in searched}
    return {**space._start(epochs), **{key: default_of(key) for key in searched}, **setting}


def _values(config: FineTuneConfig) -> dict[str, Any]:
    return config.model_dump()


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names)) or "nothing"


def _written(parameter: Parameter) -> dict[str, Any]:
    distribution = parameter.distribution
    if isinstance(distribution, CategoricalDistribution):
        written: dict[str, Any] = {"choices": list(parameter.choices)}
    else:
        written = {"low": distribution.low, "high": distribution.high}
        if distribution.log:
            written["log"] = True
        elif distribution.step and not (isinstance(distribution, IntDistribution) and distribution.step == 1):
            written["step"] = distribution.step
    return written | ({"why": parameter.why} if parameter.why else {})


# ---- a space written out in a study file ----

_SPACE_FIELDS = ("name", "title", "base", "search", "retune", "fixed", "notes")
_RANGE_FIELDS = ("low", "high", "log", "step", "choices", "why")


def _written_space(written: Mapping[str, Any]) -> Space:
    problems = [
        f"unknown field {name!r}{_guess(name, _SPACE_FIELDS)}: a space has {', '.join(_SPACE_FIELDS)}"
        for name in written
        if name not in _SPACE_FIELDS
    ]
    base: Space | None = None
    if (base_name := written.get("base")) is not None:
        try:
            base = space_from(str(base_name))
        except SpaceError as error:
            problems += error.problems

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
            twin = next((p for p in own.values() if p.hyperparameter == own_parameter.hyperparameter), None)
            if twin is not None:
                problems.append(f"{twin.name} and {name} both decide {own_parameter.hyperparameter}: keep one")
            own[name] = own_parameter

    fixed: dict[str, Scalar] = {
        name: _off(name, value) if name in FineTuneConfig.model_fields else value
        for name, value in _mapping(written, "fixed", problems).items()
    }
    try:
        build_config(fixed)
    except ConfigError as error:
        problems += [f"fixed: {problem}" for problem in error.problems]
        fixed = {}
    for parameter in own.values():
        if parameter.hyperparameter in fixed:
            problems.append(f"{parameter.hyperparameter} is both fixed and decided by {parameter.name}: keep one")

    notes = written.get("notes") or ()
    if isinstance(notes, str) or not isinstance(notes, Sequence):
        problems.append(f"notes={notes!r}: a list of sentences")
        notes = ()
    parameters = own
    inherited_notes: tuple[str, ...] = ()
    if base is not None:
        base = base.within(fixed)
        decided = {parameter.hyperparameter for parameter in own.values()}
        parameters = {name: p for name, p in base.parameters.items() if p.hyperparameter not in decided} | own
        fixed = {name: value for name, value in base.fixed.items() if name not in decided}
        inherited_notes = base.notes
    if not parameters and not problems:
        problems.append("nothing to search: name parameters under `search`, or a `base`")
    space = Space(
        str(written.get("name") or "custom"),
        str(written.get("title") or "the user's own space"),
        parameters,
        fixed,
        (*inherited_notes, *map(str, notes)),
    )
    if problems:
        raise SpaceError(problems + (space.problems() if parameters else []))
    return space


def _mapping(written: Mapping[str, Any], group: str, problems: list[str]) -> dict[str, Any]:
    entries = written.get(group)
    if entries is None:
        return {}
    if not isinstance(entries, Mapping):
        problems.append(f"{group}: a mapping of names to {'values' if group == 'fixed' else 'ranges'}, not {entries!r}")
        return {}
    return {str(name): entry for name, entry in entries.items()}


def _parameter(name: str, entry: Any, role: Role) -> Parameter:
    hyperparameter = DERIVED[name].hyperparameter if name in DERIVED else name
    if hyperparameter not in FineTuneConfig.model_fields:
        raise SpaceError([_unknown(name)])
    if hyperparameter in NOT_SEARCHED:
        raise SpaceError([f"{name} is not searched: {NOT_SEARCHED[hyperparameter]}; it may stand under `fixed`"])
    if isinstance(entry, list | tuple):
        entry = {"choices": entry}
    if not isinstance(entry, Mapping):
        raise SpaceError(
            [
                f"{name}: {entry!r} is no range: write {{low: .., high: ..}} or a list of choices; one value goes under `fixed`"
            ]
        )
    if unknown := [
        f"{name}: unknown field {key!r}{_guess(key, _RANGE_FIELDS)}" for key in entry if key not in _RANGE_FIELDS
    ]:
        raise SpaceError(unknown)
    distribution = _choices(name, entry) if "choices" in entry else _range(name, entry)
    return Parameter(name, distribution, role, str(entry.get("why") or ""))


def _choices(name: str, entry: Mapping[str, Any]) -> BaseDistribution:
    problems = [f"{name}: {key} does not go with choices" for key in ("low", "high", "log", "step") if key in entry]
    choices = entry["choices"]
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        raise SpaceError([*problems, f"{name}: choices must be a list, not {choices!r}"])
    if len(choices) < 2:
        raise SpaceError(
            [*problems, f"{name}: {len(choices)} choices, at least two are needed; one value goes under `fixed`"]
        )
    wanted = _kind(name)
    values: list[Scalar] = []
    for choice in choices:
        value = _off(name, choice) if name not in DERIVED else choice
        if wanted in (int, float):
            number = _number(value)
            if number is None or (wanted is int and not number.is_integer()):
                problems.append(f"{name}: {choice!r} is no {'whole ' if wanted is int else ''}number")
                continue
            value = int(number) if wanted is int else number
        elif wanted is bool and not isinstance(value, bool):
            problems.append(f"{name}: {choice!r} is neither true nor false")
            continue
        elif not isinstance(value, str | int | float | bool | None):
            problems.append(f"{name}: {choice!r} is no single value; write a shape as '96x96x64'")
            continue
        if value in values and not any(isinstance(v, bool) != isinstance(value, bool) for v in values if v == value):
            problems.append(f"{name}: {choice!r} stands there twice")
        values.append(value)
    if name in DERIVED:
        problems += _outside(name, [value for value in values if isinstance(value, float)])
    if problems:
        raise SpaceError(problems)
    return CategoricalDistribution(values)


def _range(name: str, entry: Mapping[str, Any]) -> BaseDistribution:
    wanted = _kind(name)
    if wanted not in (int, float):
        raise SpaceError([f"{name} has no range, it takes choices: write {name}: [{', '.join(_possible(name))}]"])
    problems = [f"{name}: {key} is missing" for key in ("low", "high") if key not in entry]
    numbers: dict[str, float] = {}
    for key in ("low", "high", "step"):
        if entry.get(key) is None:
            continue
        number = _number(entry[key])
        if number is None or (wanted is int and not number.is_integer()):
            problems.append(f"{name}: {key}={entry[key]!r} is no {'whole ' if wanted is int else ''}number")
        else:
            numbers[key] = number
    log = entry.get("log") or False
    if not isinstance(log, bool):
        problems.append(f"{name}: log={log!r} is neither true nor false")
    if problems:
        raise SpaceError(problems)
    low, high, step = numbers["low"], numbers["high"], numbers.get("step")
    if low > high:
        problems.append(f"{name}: low={shown(low)} is above high={shown(high)}")
    if low == high:
        problems.append(f"{name}: low and high are both {shown(low)}; one value goes under `fixed`")
    if log and low <= 0:
        problems.append(f"{name}: low={shown(low)} on a log scale, it must be > 0")
    if step is not None and log:
        problems.append(f"{name}: step does not go with log")
    if step is not None and step <= 0:
        problems.append(f"{name}: step={shown(step)}, it must be > 0")
    if step is not None and step > 0 and low < high and abs((steps := (high - low) / step) - round(steps)) > 1e-8:
        nearest = _tidy(low + math.floor(steps) * step)
        problems.append(
            f"{name}: steps of {shown(step)} from {shown(low)} never reach high={shown(high)}, but {shown(nearest)}"
        )
    problems += _outside(name, [low, high])
    if problems:
        raise SpaceError(problems)
    if wanted is int:
        return IntDistribution(int(low), int(high), log=log, step=1 if step is None else int(step))
    return FloatDistribution(low, high, log=log, step=step)


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
    """YAML reads a bare off as false; where `off` is a choice, that is what was meant."""
    return "off" if value is False and "off" in _possible(name) else value


def _unknown(name: str) -> str:
    guesses = difflib.get_close_matches(name, [*DERIVED, *FineTuneConfig.model_fields], n=1)
    guess = FORMER_NAMES.get(name.lower().lstrip("-").replace("-", "_")) or (guesses[0] if guesses else None)
    hint = f"did you mean {guess!r}?" if guess else "`medtune config` lists them all"
    return f"unknown hyperparameter {name!r}; {hint}"


def _guess(name: object, known: Iterable[str]) -> str:
    guesses = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {guesses[0]!r}?" if guesses else ""


# ---- the named spaces ----


def _log(name: str, low: float, high: float, role: Role = "searched", why: str = "") -> Parameter:
    return Parameter(name, FloatDistribution(low, high, log=True), role, why)


def _even(
    name: str, low: float, high: float, role: Role = "searched", why: str = "", step: float | None = None
) -> Parameter:
    return Parameter(name, FloatDistribution(low, high, step=step), role, why)


def _one_of(name: str, *choices: Scalar, why: str = "") -> Parameter:
    return Parameter(name, CategoricalDistribution(choices), "searched", why)


def _space(name: str, title: str, *parameters: Parameter, fixed: Mapping[str, Scalar], notes: tuple[str, ...]) -> Space:
    return Space(name, title, {parameter.name: parameter for parameter in parameters}, fixed, notes)


_RETUNED = "each loss, margin and decay has its own best rate; at one rate for all, the one it suits would win"
_OURS: dict[str, Scalar] = {"head": "cosine", "ema_warmup": True, "ema_buffers": "averaged"}

SPACES: dict[str, Space] = {
    space.name: space
    for space in (
        _space(
            "documented",
            "the document's knobs, around its original and its recommended values",
            _even("max_m", 0.05, 0.5),
            _log("s", 5.0, 40.0),
            _even("drw_start_share", 0.1, 0.9, why="25 of 60 epochs is 0.4; LDAM as published is 0.8"),
            _log("grad_clip", 0.25, 4.0),
            _log(
                "one_minus_ema_decay", 5e-4, 2e-2, why="it has to be read in updates: 1 / this is the average's memory"
            ),
            _log("backbone_lr", 2e-5, 5e-4, "retuned", _RETUNED),
            _log("classifier_lr", 1e-4, 5e-3, "retuned", _RETUNED),
            fixed=_OURS,
            notes=(
                "Head and averaging are held at what was found here: without them the search looks for settings that "
                "happen to survive the collapse.",
            ),
        ),
        _space(
            "narrow",
            "close around the recommended values: for a second search, or a small budget",
            _even("max_m", 0.15, 0.25),
            _log("s", 12.0, 20.0),
            _even("drw_start_share", 0.3, 0.6),
            _log("grad_clip", 0.5, 2.0),
            _log("one_minus_ema_decay", 2e-3, 1e-2),
            _log("backbone_lr", 5e-5, 2e-4, "retuned", _RETUNED),
            _log("classifier_lr", 5e-4, 2e-3, "retuned", _RETUNED),
            fixed=_OURS,
            notes=("The document's original settings lie outside.",),
        ),
        _space(
            "wide",
            "everything that is plausible: head, geometry, loss, freezing and regularisation too",
            _one_of("loss", "ldam", "cross_entropy", "focal"),
            _one_of("head", "cosine", "linear"),
            _one_of(
                "geometry", "strided", "dilated", why="dilated is MedicalNet's own, at about 5 times the arithmetic"
            ),
            _even("max_m", 0.05, 0.5),
            _log("s", 4.0, 60.0),
            _even("focal_gamma", 0.5, 5.0),
            _even("drw_start_share", 0.0, 1.0, why="0 is from the first epoch on, 1 is never"),
            _log("grad_clip", 0.1, 10.0),
            _log("one_minus_ema_decay", 1e-4, 5e-2),
            _even("freeze_backbone_share", 0.0, 0.3, step=0.1, why="0 does not freeze"),
            Parameter("unfreeze_stage_epochs", IntDistribution(0, 3), why="0 thaws all stages at once"),
            _even("dropout", 0.0, 0.6),
            _even("augmentation_strength", 0.0, 2.0),
            _log("backbone_lr", 5e-6, 1e-3, "retuned", _RETUNED),
            _log("classifier_lr", 5e-5, 1e-2, "retuned", _RETUNED),
            _log("weight_decay", 1e-6, 1e-2, "retuned", "its best value moves with the rates"),
            fixed={"ema_warmup": True, "ema_buffers": "averaged"},
            notes=("Needs some hundred trials; `documented` is the better use of fifty.",),
        ),
        _space(
            "collapse",
            "meant to reproduce the collapse: averaged weights as the document had them, around its original values",
            _even("max_m", 0.2, 0.5),
            _log("s", 15.0, 40.0),
            _even("drw_start_share", 0.05, 0.4),
            _log("grad_clip", 0.25, 1.0),
            _log("one_minus_ema_decay", 2e-4, 5e-3),
            _log("backbone_lr", 1e-4, 1e-3, "retuned", _RETUNED),
            _log("classifier_lr", 1e-4, 1e-3, "retuned", _RETUNED),
            fixed={"head": "linear", "ema_warmup": False, "ema_buffers": "copied"},
            notes=(
                "Compare val_auc_raw with val_auc_ema: the raw network mostly does not collapse.",
                "Contains the document's original and its recommended settings exactly.",
            ),
        ),
    )
}
"""The spaces by name."""
