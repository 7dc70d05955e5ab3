import pickle
from dataclasses import fields
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from search_spaces.fixes import FIXES, all_fixes, baseline, documented_after, with_fixes
from search_spaces.space import (
    DERIVED,
    NOT_SEARCHED,
    READ_ONLY_WHEN,
    Parameter,
    Space,
    SpaceError,
    is_read,
)
from search_spaces.spaces import SPACES, warm_start_points
from search_spaces.written import space_from
from trainables.config import PREPROCESSING, FineTuneConfig, build_config
from trainables.data.scans import Recipe


def values_of(distribution: Any) -> st.SearchStrategy[Any]:
    """Everything the distribution can produce, its ends often."""
    if isinstance(distribution, CategoricalDistribution):
        return st.sampled_from(distribution.choices)
    if isinstance(distribution, IntDistribution) or distribution.step:
        steps = round((distribution.high - distribution.low) / distribution.step)
        return st.integers(0, steps).map(lambda k: distribution.low + k * distribution.step)
    return st.floats(distribution.low, distribution.high)


def samples_of(space: Space) -> st.SearchStrategy[dict[str, Any]]:
    """A value for every parameter, read or not."""
    return st.fixed_dictionaries(
        {name: values_of(p.distribution) for name, p in space.parameters.items()}
    )


@pytest.mark.parametrize("name", SPACES)
@given(data=st.data(), epochs=st.integers(1, 200))
def test_every_sample_of_every_space_builds_a_valid_config(
    name: str, data: st.DataObject, epochs: int
) -> None:
    space = SPACES[name]
    drawn = data.draw(samples_of(space))
    sample = space.sample(lambda parameter: drawn[parameter.name], epochs)
    overrides = space.sample_to_overrides(sample, epochs)
    config = build_config(overrides)
    assert config.epochs == epochs
    assert {key: getattr(config, key) for key in space.fixed} == dict(space.fixed)
    values = config.model_dump()
    assert set(sample) == {
        p.name for p in space.parameters.values() if is_read(p.hyperparameter, values)
    }


@pytest.mark.parametrize("name", SPACES)
@given(data=st.data(), epochs=st.integers(1, 200))
def test_overrides_lead_back_to_a_sample_that_gives_them(
    name: str, data: st.DataObject, epochs: int
) -> None:
    space = SPACES[name]
    drawn = data.draw(samples_of(space))
    overrides = space.sample_to_overrides(drawn, epochs)
    sample, reasons = space.overrides_to_sample(overrides, epochs)
    if sample is not None:
        assert space.sample_to_overrides(sample, epochs) == overrides
    else:
        # Whole epochs are no exact share of the run, so a share near an end of its range can leave it.
        assert all("_share" in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    ("space", "before", "after"),
    [
        ("documented", True, True),
        ("wide", True, True),
        ("collapse", True, True),
        ("narrow", False, True),
    ],
)
def test_the_documented_settings_are_points_of_the_spaces_around_them(
    space: str, before: bool, after: bool
) -> None:
    points, left_out = warm_start_points(SPACES[space], 60)
    assert ("before" in points, "after" in points) == (before, after)
    if before:
        overrides = SPACES[space].sample_to_overrides(points["before"], 60)
        assert all(
            overrides[name] == value
            for name, value in baseline().items()
            if name in overrides and name not in SPACES[space].fixed
        )
    else:
        assert "max_m=0.3 is not in 0.15 to 0.25" in left_out["before"]


def test_the_collapse_space_holds_the_documents_settings_exactly() -> None:
    space = SPACES["collapse"]
    points, left_out = warm_start_points(space, 60)
    for name, settings in (("before", baseline()), ("after", documented_after())):
        assert build_config(space.sample_to_overrides(points[name], 60)) == build_config(settings)
        assert space.overrides_to_sample(settings, 60) == (points[name], [])
    assert left_out == {"defaults": ["the same point as 'after' in this space"]}


def test_warm_starts_keep_their_share_of_a_shorter_run() -> None:
    space = SPACES["documented"]
    points = warm_start_points(space, 8).points
    assert points == warm_start_points(space, 60).points
    assert (
        space.sample_to_overrides(points["before"], 8)["drw_start_epoch"]
        == with_fixes((), 8)["drw_start_epoch"]
    )
    assert (
        space.sample_to_overrides(points["after"], 8)["drw_start_epoch"]
        == all_fixes(8)["drw_start_epoch"]
    )
    whole = space_from({"search": {"drw_start_epoch": {"low": 1, "high": 8}}}, {"epochs": 8})
    assert warm_start_points(whole, 8).points == {
        "before": {"drw_start_epoch": 3},
        "after": {"drw_start_epoch": 4},
    }


def test_warm_starts_are_asked_for_by_name() -> None:
    assert list(warm_start_points(SPACES["wide"], 60, ["defaults"]).points) == ["defaults"]
    assert (
        build_config(
            SPACES["wide"].sample_to_overrides(
                warm_start_points(SPACES["wide"], 60).points["defaults"], 60
            )
        )
        == build_config()
    )
    with pytest.raises(
        SpaceError, match=r"unknown warm start best: there are before, after, defaults"
    ):
        warm_start_points(SPACES["wide"], 60, ["best"])


def test_a_setting_outside_the_space_is_refused_with_every_reason() -> None:
    sample, reasons = SPACES["documented"].overrides_to_sample(
        {**baseline(), "max_m": 0.9, "depth": 10, "seed": 7}, 60
    )
    assert sample is None
    assert reasons == [
        "ema_warmup=no, the space holds yes",
        "ema_buffers=copied, the space holds averaged",
        "head=linear, the space holds cosine",
        "depth=10, the space holds 50",
        "max_m=0.9 is not in 0.05 to 0.5",
    ]
    assert SPACES["documented"].overrides_to_sample({"epochs": 20, "drw_start_epoch": 9}, 60)[
        1
    ] == ["epochs=20, the space holds 60"]
    assert SPACES["documented"].overrides_to_sample({"dropout": 2}, 60)[1] == [
        "dropout=2: input should be less than 1"
    ]


def test_what_nothing_reads_is_not_sampled() -> None:
    space, asked = SPACES["wide"], []
    settings = {"loss": "focal", "head": "linear", "freeze_backbone_share": 0.0}

    def suggest(parameter: Parameter) -> Any:
        asked.append(parameter.name)
        return settings.get(parameter.name, parameter.ends[0])

    sample = space.sample(suggest, 60)
    assert asked == list(sample)
    assert not {"max_m", "s", "unfreeze_stage_epochs"} & set(sample)
    assert "focal_gamma" in sample
    settings.update(head="cosine", freeze_backbone_share=0.1)
    assert {"s", "unfreeze_stage_epochs"} < set(space.sample(suggest, 60))
    assert "max_m" not in space.sample(suggest, 60), (
        "the cosine head reads s, only LDAM reads the margin"
    )


def test_spaces_say_which_parameters_every_sample_has() -> None:
    assert not SPACES["documented"].conditional
    assert set(SPACES["wide"].parameters) - set(SPACES["wide"].unconditional) == {
        "max_m",
        "s",
        "focal_gamma",
        "unfreeze_stage_epochs",
    }


def test_a_sample_with_missing_or_unknown_parameters_is_a_mistake() -> None:
    space = SPACES["narrow"]
    sample = warm_start_points(space, 60).points["after"]
    with pytest.raises(ValueError, match=r"has no parameter lr: it has max_m"):
        space.sample_to_overrides({**sample, "lr": 1}, 60)
    del sample["s"]
    with pytest.raises(ValueError, match=r"needs a value for s; got max_m"):
        space.sample_to_overrides(sample, 60)


def test_what_the_user_sets_is_no_longer_searched() -> None:
    space = space_from(
        "wide", {"loss": "focal", "head": "linear", "backbone_lr": 3e-4, "epochs": 8}
    )
    assert not {"loss", "head", "backbone_lr", "max_m", "s"} & set(space.parameters)
    assert space.fixed["backbone_lr"] == 3e-4
    assert "max_m is not searched: it is read only when loss=ldam" in space.notes
    assert "backbone_lr is not searched: backbone_lr is set to 3e-4" in space.notes
    sample = space.sample(lambda parameter: parameter.ends[0], 8)
    assert build_config(space.sample_to_overrides(sample, 8)).loss == "focal"
    with pytest.raises(SpaceError, match="unknown hyperparameter 'los'"):
        space_from("wide", {"los": "focal"})
    with pytest.raises(SpaceError, match="nothing left to search"):
        space_from(
            "narrow",
            {
                p.hyperparameter: getattr(build_config(), p.hyperparameter)
                for p in SPACES["narrow"].parameters.values()
            },
        )


@pytest.mark.parametrize("name", SPACES)
def test_a_space_written_out_reads_back_as_itself(name: str) -> None:
    space = SPACES[name]
    assert space_from(yaml.safe_load(yaml.safe_dump(space.to_mapping(), sort_keys=False))) == space
    held = space.within({"dropout": 0.1, "volume_shape": "32,32,16"})
    assert space_from(held.to_mapping()) == held
    assert pickle.loads(pickle.dumps(space.to_mapping())) == space.to_mapping()


def test_the_description_tells_searched_retuned_and_fixed() -> None:
    rows = {row.name: row for row in SPACES["documented"].describe()}
    assert rows["one_minus_ema_decay"][:5] == (
        "searched",
        "one_minus_ema_decay",
        "5e-4 to 0.02, log",
        "0.001",
        "0.005",
    )
    assert rows["backbone_lr"][:5] == (
        "retuned",
        "backbone_lr",
        "2e-5 to 5e-4, log",
        "2e-4",
        "1e-4",
    )
    assert rows["head"][:5] == ("fixed", "head", "cosine", "linear", "cosine")
    assert rows["backbone_lr"].why
    assert [row.role for row in SPACES["documented"].describe()] == ["searched"] * 5 + [
        "retuned"
    ] * 2 + ["fixed"] * 5
    for space in SPACES.values():
        described = {row.name for row in space.describe()}
        assert described > set(space.parameters)
        decided = {p.hyperparameter for p in space.parameters.values()}
        assert {name for fix in FIXES for name in fix.before} <= described | decided


def test_rates_and_one_minus_decay_are_searched_on_a_log_scale() -> None:
    for space in SPACES.values():
        for name in ("backbone_lr", "classifier_lr", "one_minus_ema_decay"):
            if name in space.parameters or space.name != "preprocessing":
                assert space.parameters[name].distribution.log, f"{space.name}: {name}"


OWN = """
name: mine
base: documented
search:
  head: [cosine, linear]
  s: {low: 5, high: 40, log: true, why: the scale of the cosines}
  ema_decay: {low: 0.9, high: 0.999}
  batch_size: {low: 2, high: 8, step: 2}
  amp: [off, fp16]
  volume_shape: ["96,96,64", 64]
retune:
  backbone_lr: {low: 1e-5, high: 1e-3, log: true}
fixed:
  dropout: 0.5
  weight_decay: 1e-5
notes: [a note]
"""


def test_a_space_of_ones_own_is_read_from_a_study_file() -> None:
    space = space_from(yaml.safe_load(OWN))
    distributions = {name: p.distribution for name, p in space.parameters.items()}
    assert distributions["head"] == CategoricalDistribution(("cosine", "linear"))
    assert distributions["backbone_lr"] == FloatDistribution(1e-5, 1e-3, log=True), (
        "YAML reads 1e-5 as text"
    )
    assert distributions["amp"] == CategoricalDistribution(("off", "fp16")), (
        "YAML reads off as false"
    )
    assert distributions["batch_size"] == IntDistribution(2, 8, step=2)
    assert space.parameters["backbone_lr"].role == "retuned"
    assert space.parameters["s"].why == "the scale of the cosines"
    assert "one_minus_ema_decay" not in distributions, "ema_decay takes its place"
    assert "max_m" in distributions, "the base's"
    assert space.fixed["dropout"] == 0.5
    assert "head" not in space.fixed, "searched now, though the base fixes it"
    config = build_config(
        space.sample_to_overrides(space.sample(lambda parameter: parameter.ends[-1], 20), 20)
    )
    assert config.weight_decay == 1e-5
    assert config.volume_shape == (64, 64, 64)
    assert space.notes[-1] == "a note"


@pytest.mark.parametrize(
    ("written", "problems"),
    [
        ("{search: {backbon_lr: {low: 1, high: 2}}}", ["unknown hyperparameter 'backbon_lr'; did you mean 'backbone_lr'?"]),
        ("{search: {lr: [1, 2]}}", ["unknown hyperparameter 'lr'; did you mean 'backbone_lr'?"]),
        ("{search: {drw_share: [0, 1]}}", ["unknown hyperparameter 'drw_share'; did you mean 'drw_start_share'?"]),
        ("{search: {dropout: {low: 0.5, high: 0.1}}}", ["dropout: low=0.5 is above high=0.1"]),
        ("{search: {dropout: {low: 0.5, high: 0.5}}}", ["dropout: low and high are both 0.5; one value goes under `fixed`"]),
        ("{search: {s: {low: 0, high: 3, log: true}}}", ["s: low=0 on a log scale, it must be > 0"]),
        ("{search: {s: {low: 1, high: 3, log: true, step: 1}}}", ["s: step does not go with log"]),
        ("{search: {s: {low: 1, high: 2, step: 0.3}}}", ["s: steps of 0.3 from 1 never reach high=2, but 1.9"]),
        ("{search: {s: {low: 1, high: 2, step: -1}}}", ["s: step=-1, it must be > 0"]),
        ("{search: {s: {low: 1, high: 2, log: maybe}}}", ["s: log='maybe' is neither true nor false"]),
        ("{search: {s: {low: 1}}}", ["s: high is missing"]),
        ("{search: {s: {low: .nan, high: many}}}", ["s: low=nan is no number", "s: high='many' is no number"]),
        ("{search: {batch_size: {low: 1.5, high: 4}}}", ["batch_size: low=1.5 is no whole number"]),
        ("{search: {s: {lo: 1, high: 2}}}", ["s: unknown field 'lo'; did you mean 'low'?"]),
        ("{search: {s: 3}}", ["s: 3 is no range: write {low: .., high: ..} or a list of choices; one value goes under `fixed`"]),
        ("{search: {head: []}}", ["head: 0 choices, at least two are needed; one value goes under `fixed`"]),
        ("{search: {head: {choices: cosine}}}", ["head: choices must be a list, not 'cosine'"]),
        ("{search: {head: [cosine, cosine]}}", ["head: 'cosine' is listed twice"]),
        ("{search: {head: [cosine, square]}}", ["head='square': input should be 'cosine' or 'linear'"]),
        ("{search: {head: {low: 0, high: 1}}}", ["head has no range, it takes choices: write head: [cosine, linear]"]),
        ("{search: {volume_shape: [[96, 96, a], 64]}}", ["volume_shape: [96, 96, 'a'] is no single value; write a shape as '96x96x64'"]),
        ("{search: {sync_batchnorm: [true, 2]}}", ["sync_batchnorm: 2 is neither true nor false"]),
        ("{search: {dropout: {low: 0, high: 1.5}}}", ["dropout=1.5: input should be less than 1"]),
        ("{search: {one_minus_ema_decay: {low: 0.1, high: 2}}}",
         ["one_minus_ema_decay=2: it lies between 1e-9 and 1 (1 - ema_decay, the weight of each update in the average)"]),
        ("{search: {epochs: [10, 20]}}",
         ["epochs is not searched: trials of unequal length cannot be compared epoch by epoch; it may stand under `fixed`"]),
        ("{search: {ema_decay: [0.9, 0.99], one_minus_ema_decay: {low: 1e-3, high: 1e-2}}}",
         ["ema_decay and one_minus_ema_decay both decide ema_decay: keep one"]),
        ("{search: {s: [1, 2]}, fixed: {s: 3}}", ["s is both fixed and decided by s: keep one"]),
        ("{search: {s: [1, 2]}, fixed: {dropot: 3}}", ["fixed: unknown hyperparameter 'dropot'; did you mean 'dropout'?"]),
        ("{search: [s]}", ["search: a mapping of names to ranges, not ['s']", "nothing to search: name parameters under `search`, or a `base`"][:1]),
        ("{serch: {s: [1, 2]}, search: {s: [1, 2]}}",
         ["unknown field 'serch'; did you mean 'search'?: a space has name, title, base, search, retune, fixed, notes"]),
        ("{base: documentd}", ["unknown space 'documentd': one of documented, narrow, wide, preprocessing, collapse; did you mean 'documented'?"]),
        ("{}", ["nothing to search: name parameters under `search`, or a `base`"]),
        ("{search: {s: [1, 2]}, notes: x}", ["notes='x': a list of sentences"]),
        ("{search: {loss: [focal, cross_entropy], max_m: [0.1, 0.2]}}",
         ["max_m is read only when loss=ldam, which is never so in this space"]),
        ("{search: {window_low: {low: -900, high: 500}, window_high: {low: 400, high: 600}}, fixed: {intensity: window}}",
         ["window_low=500.0 must be below window_high=400.0"]),
        ("{search: {freeze_backbone_epochs: {low: 0, high: 90}}}", ["freeze_backbone_epochs=90 must be at most epochs=60"]),
    ],
)  # fmt: skip
def test_a_space_that_cannot_be_searched_says_what_is_wrong(
    written: str, problems: list[str]
) -> None:
    with pytest.raises(SpaceError) as error:
        space_from(yaml.safe_load(written))
    assert error.value.problems == problems


def test_all_problems_of_a_space_are_told_together() -> None:
    written = "{search: {dropout: {low: 0, high: 1.5}, s: {low: 3, high: 1}, lr: [1, 2]}, fixed: {depth: 51}}"
    with pytest.raises(SpaceError) as error:
        space_from(yaml.safe_load(written))
    assert error.value.problems == [
        "s: low=3 is above high=1",
        "unknown hyperparameter 'lr'; did you mean 'backbone_lr'?",
        "fixed: depth=51: MedicalNet has 10, 18, 34, 50, 101, 152, 200",
        "dropout=1.5: input should be less than 1",
    ]
    assert pickle.loads(pickle.dumps(error.value)).problems == error.value.problems


def test_a_length_can_be_too_short_for_a_space() -> None:
    space = space_from({"search": {"freeze_backbone_epochs": {"low": 0, "high": 20}}})
    assert space.problems(20) == []
    assert space.problems(10) == ["freeze_backbone_epochs=20 must be at most epochs=10"]
    with pytest.raises(SpaceError, match="must be at most epochs=10"):
        space_from({"search": {"freeze_backbone_epochs": {"low": 0, "high": 20}}}, {"epochs": 10})


def test_the_tables_name_real_hyperparameters() -> None:
    fields = set(FineTuneConfig.model_fields)
    assert (
        set(READ_ONLY_WHEN) | set(NOT_SEARCHED) | {d.hyperparameter for d in DERIVED.values()}
        <= fields
    )
    assert not set(DERIVED) & fields
    for condition in READ_ONLY_WHEN.values():
        assert set(condition.reads) <= fields
        assert not set(condition.reads) & set(READ_ONLY_WHEN), (
            "a chain of conditions would need more than one pass"
        )


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.995, 0.999, 0.9999, 0.0])
def test_decays_come_back_as_they_were_written(decay: float) -> None:
    derived = DERIVED["one_minus_ema_decay"]
    assert derived.decode(derived.encode({"ema_decay": decay}), {}) == decay


@pytest.mark.parametrize("epochs", [1, 7, 60, 200])
def test_the_share_before_reweighting_covers_every_start(epochs: int) -> None:
    derived = DERIVED["drw_start_share"]
    for start in range(1, epochs + 2):
        share = derived.encode({"drw_start_epoch": start, "epochs": epochs})
        assert derived.decode(share, {"epochs": epochs}) == start
    assert derived.decode(0.0, {"epochs": epochs}) == 1
    assert derived.decode(1.0, {"epochs": epochs}) == epochs + 1, "never"


def test_the_classifier_rate_can_be_searched_as_a_ratio() -> None:
    space = space_from(
        {
            "search": {
                "classifier_lr_ratio": {"low": 1, "high": 30, "log": True},
                "backbone_lr": {"low": 1e-5, "high": 1e-3},
            }
        }
    )
    assert (
        space.sample_to_overrides({"classifier_lr_ratio": 10.0, "backbone_lr": 2e-4}, 60)[
            "classifier_lr"
        ]
        == 2e-3
    )
    assert space.overrides_to_sample({}, 60) == (
        {"backbone_lr": 1e-4, "classifier_lr_ratio": 10.0},
        [],
    )


@pytest.mark.parametrize(
    ("distribution", "inside", "outside"),
    [
        (FloatDistribution(0.1, 0.5), [0.1, 0.3, 0.5], [0.09, 0.51, "0.3", True, None]),
        (FloatDistribution(0.0, 0.3, step=0.1), [0, 0.1, 0.3], [0.05, 0.4]),
        (IntDistribution(0, 6, step=2), [0, 2, 6], [1, 7, -2]),
        (CategoricalDistribution((True, False)), [True, False], [1, 0, "true"]),
        (CategoricalDistribution(("a", None)), ["a", None], ["b", 0]),
    ],
)
def test_a_parameter_knows_what_it_can_produce(
    distribution: Any, inside: list[float | bool | str | None], outside: list[Any]
) -> None:
    parameter = Parameter("x", distribution)
    assert [parameter.holds(value) for value in inside] == [True] * len(inside)
    assert [parameter.holds(value) for value in outside] == [False] * len(outside)


def test_the_fields_that_preprocessing_has_are_those_of_a_recipe() -> None:
    assert tuple(field.name for field in fields(Recipe)) == PREPROCESSING
