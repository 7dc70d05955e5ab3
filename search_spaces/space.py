"""Search spaces: their sampled parameters, and how a sample becomes values of `FineTuneConfig`.

Optuna sees a sample: parameters on the scale they are best searched on, such as 1 - ema_decay on a log scale. A run sees
overrides. A parameter that nothing would read, such as the LDAM margin when the loss is focal, is not sampled at all: which
ones these are is a property of the hyperparameter, so it holds in every space alike.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from search_spaces.fixes import DOCUMENT_EPOCHS, baseline, drw_start_at, shown
from trainables.config import (
    TOGETHER,
    ConfigError,
    FineTuneConfig,
    Scalar,
    as_scalar,
    build_config,
    cannot_run,
)
from trainables.errors import ProblemsError

Sample = dict[str, Scalar]
"""Values by parameter name; parameters that nothing would read are absent."""

Role = Literal["searched", "retuned"]
"""searched: the study's question; retuned: varied only so that each searched value is judged at its own best."""


class SpaceError(ProblemsError):
    """A space that cannot be searched. `problems` holds one line a violation, all of them."""


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


def tidy(value: float) -> float:
    """Twelve digits: 1 - 0.995 is 0.005 and not 0.0050000000000000044, in a table and at the end of a range."""
    return float(f"{value:.12g}")


DERIVED: dict[str, Derived] = {
    "one_minus_ema_decay": Derived(
        "ema_decay",
        "1 - ema_decay, the weight of each update in the average",
        low=1e-9,
        high=1.0,
        decode=lambda value, values: tidy(1 - value),
        encode=lambda values: tidy(1 - values["ema_decay"]),
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
        decode=lambda value, values: tidy(value * values["backbone_lr"]),
        encode=lambda values: tidy(values["classifier_lr"] / values["backbone_lr"]),
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
        "loss=ldam or head=cosine",
        ("loss", "head"),
        lambda v: v["loss"] == "ldam" or v["head"] == "cosine",
    ),
    "focal_gamma": Condition("loss=focal", ("loss",), lambda v: v["loss"] == "focal"),
    "unfreeze_stage_epochs": Condition(
        "the backbone is frozen at first",
        ("freeze_backbone_epochs",),
        lambda v: v["freeze_backbone_epochs"] > 0,
    ),
    "window_low": Condition(
        "intensity=window", ("intensity",), lambda v: v["intensity"] == "window"
    ),
    "window_high": Condition(
        "intensity=window", ("intensity",), lambda v: v["intensity"] == "window"
    ),
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
    "train_auc_volumes": "it changes the measurement, not the recipe",
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
    def condition(self) -> Condition | None:
        """When the hyperparameter is read; None for always."""
        return READ_ONLY_WHEN.get(self.hyperparameter)

    @property
    def reads(self) -> frozenset[str]:
        """The hyperparameters that decide whether it is sampled, or its meaning."""
        derived = DERIVED[self.name].reads if self.name in DERIVED else ()
        return frozenset((*derived, *(self.condition.reads if self.condition else ())))

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
        value: Scalar = as_scalar(self.name, values[self.name])
        return value

    def holds(self, value: Scalar) -> bool:
        """Whether the distribution can produce `value`."""
        if isinstance(self.distribution, CategoricalDistribution):
            return any(
                value == choice and isinstance(value, bool) == isinstance(choice, bool)
                for choice in self.choices
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
        return (
            f"{text}, step {shown(step)}"
            if step and (step != 1 or isinstance(step, float))
            else text
        )


class SpaceRow(NamedTuple):
    """A line of `medtune spaces NAME`."""

    role: str
    """searched, retuned or fixed."""
    name: str
    values: str
    """The range; for a fixed one, the value."""
    before: str
    """The document's original setting on the same scale; empty where it has none."""
    default: str
    when: str
    """When it is read; empty for always."""
    why: str


@dataclass(frozen=True)
class Space:
    """The parameters that one search varies, and those that it fixes."""

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
        # What decides goes first
        object.__setattr__(self, "parameters", {p.name: p for p in (*early, *late)})

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
            if not (p.condition and decided & set(p.condition.reads))
        }

    def sample(self, suggest: Callable[[Parameter], Scalar], epochs: int) -> Sample:
        """Return a sample: each parameter that will be read gets its value from `suggest`, in order."""
        values = self.start(epochs)
        sample: Sample = {}
        for parameter in self.parameters.values():
            if is_read(parameter.hyperparameter, values):
                sample[parameter.name] = suggest(parameter)
                values[parameter.hyperparameter] = parameter.decode(sample[parameter.name], values)
        return sample

    def sample_to_overrides(self, sample: Mapping[str, Scalar], epochs: int) -> dict[str, Scalar]:
        """Return the overrides of a run of `epochs` epochs: the decoded sample, the space's fixed values, and `epochs`.

        Values of parameters that nothing would read are ignored. Raises ValueError naming parameters that are missing,
        or that the space does not have.
        """
        if unknown := [name for name in sample if name not in self.parameters]:
            raise ValueError(
                f"space {self.name} has no parameter {_listed(unknown)}: it has {_listed(self.parameters)}"
            )
        values = self.start(epochs)
        overrides: dict[str, Scalar] = {**self.fixed, "epochs": epochs}
        for parameter in self.parameters.values():
            if not is_read(parameter.hyperparameter, values):
                continue
            if parameter.name not in sample:
                raise ValueError(
                    f"space {self.name} needs a value for {parameter.name}; got {_listed(sample)}"
                )
            values[parameter.hyperparameter] = parameter.decode(sample[parameter.name], values)
            overrides[parameter.hyperparameter] = values[parameter.hyperparameter]
        return overrides

    def overrides_to_sample(
        self, overrides: Mapping[str, Any], epochs: int
    ) -> tuple[Sample | None, list[str]]:
        """Return the sample that gives `overrides` in a run of `epochs` epochs, or None and every reason there is none.

        Nothing is clipped: a setting outside a range, or another value than the space fixes, is outside the space.
        Hyperparameters that `overrides` leaves out are taken at their defaults where they are searched, and at the space's
        fixed values elsewhere. Values that no run reads, and seed and fold, may differ.
        """
        try:
            given = build_config({**self.fixed, "epochs": epochs, **overrides}).model_dump()
            held = build_config({**self.fixed, "epochs": epochs}).model_dump()
        except ConfigError as error:
            return None, error.problems
        searched = {parameter.hyperparameter for parameter in self.parameters.values()}
        reasons = [
            f"{name}={shown(given[name])}, the space holds {shown(held[name])}"
            for name in overrides
            if name not in searched
            and name not in NOT_COMPARED
            and is_read(name, given)
            and given[name] != held[name]
        ]
        sample: Sample = {}
        for parameter in self.parameters.values():
            if is_read(parameter.hyperparameter, given):
                sample[parameter.name] = self.place(parameter, given, reasons)
        return (None, reasons) if reasons else (sample, [])

    def within(self, config: Mapping[str, Any]) -> "Space":
        """Return the space with the user's own settings held: what `config` names is no longer searched.

        So `--set loss=focal` leaves the margin out of the search as well. Notes name the dropped parameters.
        """
        fixed = {**self.fixed, **config}
        values = build_config(fixed).model_dump()
        searched = {p.hyperparameter for p in self.parameters.values()} - set(config)
        kept: dict[str, Parameter] = {}
        notes = list(self.notes)
        for parameter in self.parameters.values():
            name, condition = parameter.hyperparameter, parameter.condition
            if name in config:
                notes.append(
                    f"{parameter.name} is not searched: {name} is set to {shown(config[name])}"
                )
            elif condition and not set(condition.reads) & searched and not condition.holds(values):
                notes.append(
                    f"{parameter.name} is not searched: it is read only when {condition.text}"
                )
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

    def cannot_run(self, *, ranks: int | None = None, gpu: bool = True) -> list[str]:
        """Return why some sample of the space would end in its first step (`trainables.config.cannot_run`)."""
        found: dict[str, None] = {}
        for corner in self._corners():
            config = build_config(self.sample_to_overrides(corner, self._epochs(None)))
            found.update(dict.fromkeys(cannot_run(config, ranks=ranks, gpu=gpu)))
        return list(found)

    def never_read(self) -> list[str]:
        """Return one line for each parameter that no sample of the space would read."""
        # In a run of one epoch, no share of it is a whole epoch
        epochs = max(self._epochs(None), DOCUMENT_EPOCHS)
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
        original = build_config(baseline()).model_dump()
        usual = build_config({}).model_dump()
        rows = [
            SpaceRow(
                parameter.role,
                parameter.name,
                parameter.range_text(),
                shown(parameter.encode(original)) if parameter.hyperparameter in baseline() else "",
                shown(parameter.encode(usual)),
                parameter.condition.text if parameter.condition else "",
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
        written: dict[str, Any] = {
            "name": self.name,
            "title": self.title,
            "search": {},
            "retune": {},
        }
        for parameter in self.parameters.values():
            written[groups[parameter.role]][parameter.name] = _written(parameter)
        return written | {"fixed": dict(self.fixed), "notes": list(self.notes)}

    def _epochs(self, epochs: int | None) -> int:
        return epochs if epochs is not None else int(self.fixed.get("epochs") or DOCUMENT_EPOCHS)

    def start(self, epochs: int) -> dict[str, Any]:
        """Values of all hyperparameters before anything is sampled. Unchecked: `problems` is the check."""
        defaults = {name: info.default for name, info in FineTuneConfig.model_fields.items()}
        return {**defaults, **self.fixed, "epochs": epochs}

    def place(self, parameter: Parameter, values: Mapping[str, Any], reasons: list[str]) -> Scalar:
        """Return the parameter's place in a sample that gives `values`; where it is out of range, `reasons` gets a line."""
        value = parameter.encode(values)
        if not parameter.holds(value):
            reasons.append(f"{parameter.name}={shown(value)} is not in {parameter.range_text()}")
        if isinstance(parameter.distribution, FloatDistribution) and isinstance(value, int):
            return float(value)
        return value

    def _corners(self) -> Iterator[Sample]:
        first = {name: parameter.ends[0] for name, parameter in self.parameters.items()}
        yield first
        together = [one for one in self.parameters.values() if one.hyperparameter in TOGETHER]
        for values in itertools.product(*(one.ends for one in together)):
            yield {**first, **{one.name: end for one, end in zip(together, values, strict=True)}}
        for one, two in itertools.combinations_with_replacement(self.parameters.values(), 2):
            for a, b in itertools.product(one.ends, two.ends):
                yield {**first, one.name: a, two.name: b}


def _lookup(sample: Mapping[str, Scalar]) -> Callable[[Parameter], Scalar]:
    return lambda parameter: sample[parameter.name]


def is_read(hyperparameter: str, values: Mapping[str, Any]) -> bool:
    """Whether a run with these values reads the hyperparameter at all."""
    condition = READ_ONLY_WHEN.get(hyperparameter)
    return condition is None or condition.holds(values)


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
        elif distribution.step and not (
            isinstance(distribution, IntDistribution) and distribution.step == 1
        ):
            written["step"] = distribution.step
    return written | ({"why": parameter.why} if parameter.why else {})
