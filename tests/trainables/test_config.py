"""The configuration: the document's values, and all violations reported together, each with a remedy."""

import json
import math
import pickle
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trainables.config import FORMER_NAMES, ConfigError, FineTuneConfig, build_config

DOCUMENTED: dict[str, Any] = {
    "fold": 0,
    "backbone_lr": 1e-4,
    "classifier_lr": 1e-3,
    "batch_size": 6,
    "epochs": 60,
    "optimizer": "adam",
    "loss": "ldam",
    "scheduler": "cosine",
    "max_m": 0.2,
    "s": 15.0,
    "drw_start_epoch": 25,
    "grad_clip": 1.0,
    "ema_decay": 0.995,
    "dropout": 0.4,
    "gradient_accumulation_steps": 2,
    "freeze_backbone_epochs": 0,
    "amp": "fp16",
    "depth": 50,
}
"""The source document's recommended command line, read by hand."""


def problems_of(**overrides: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build_config(overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_the_defaults_are_the_documents_recommended_settings() -> None:
    config = build_config()
    assert {name: getattr(config, name) for name in DOCUMENTED} == DOCUMENTED


def test_every_hyperparameter_says_what_it_does() -> None:
    for name, field in FineTuneConfig.model_fields.items():
        assert field.description, name
        assert not field.is_required(), f"{name} has no default"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"backbon_lr": 1e-4}, "unknown hyperparameter 'backbon_lr'; did you mean 'backbone_lr'?"),
        ({"lr": 1e-4}, "unknown hyperparameter 'lr'; did you mean 'backbone_lr'?"),
        (
            {"--max-grad-norm": 1},
            "unknown hyperparameter '--max-grad-norm'; did you mean 'grad_clip'?",
        ),
        ({"qqq": 1}, "unknown hyperparameter 'qqq'; `medtune config` lists them all"),
        ({7: 1}, "unknown hyperparameter '7'; `medtune config` lists them all"),
        ({"epochs": 0}, "epochs=0: input should be greater than or equal to 1"),
        ({"epochs": 2.5}, "epochs=2.5: input should be a valid integer"),
        ({"backbone_lr": 0}, "backbone_lr=0: input should be greater than 0"),
        ({"backbone_lr": "fast"}, "backbone_lr='fast': input should be a valid number"),
        ({"backbone_lr": math.nan}, "backbone_lr=nan: input should be a finite number"),
        ({"ema_decay": 1}, "ema_decay=1: input should be less than 1"),
        ({"drw_beta": 1.0}, "drw_beta=1.0: input should be less than 1"),
        ({"optimizer": "lion"}, "optimizer='lion': input should be 'adam', 'adamw' or 'sgd'"),
        ({"loss": "LDAM"}, "loss='LDAM': input should be 'ldam', 'cross_entropy' or 'focal'"),
        ({"amp": "fp8"}, "amp='fp8': input should be 'off', 'fp16' or 'bf16'"),
        ({"depth": 42}, "depth=42: MedicalNet has 10, 18, 34, 50, 101, 152, 200"),
        ({"volume_shape": 4}, "every side must be at least 8 voxels"),
        ({"spacing_mm": [1, 0, 1]}, "every value must be > 0"),
        (
            {"window_low": 400, "window_high": -1000},
            "window_low=400.0 must be below window_high=-1000.0",
        ),
        ({"flip_axes": "xq"}, "letters of x, y, z"),
        ({"flip_axes": "xx"}, "each at most once"),
        ({"warmup_epochs": 60}, "warmup_epochs=60 must be below epochs=60"),
        ({"freeze_backbone_epochs": 61}, "must be at most epochs=60"),
        ({"unfreeze_stage_epochs": 2}, "needs freeze_backbone_epochs >= 1: nothing is frozen"),
        ({"fold": 5}, "fold=5: there are folds 0 to 4; raise num_folds or lower fold"),
    ],
)
def test_an_impossible_value_is_told_with_what_is_allowed(
    overrides: dict[Any, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(overrides)
    (told,) = caught.value.problems
    assert message in told


def test_all_violations_are_told_together() -> None:
    """Unknown names, values that are invalid alone, and values that do not go together."""
    told = problems_of(
        backbon_lr=1, epochs=0, optimizer="lion", depth=42, window_low=5, window_high=1
    )
    assert len(told) == 5
    for part in ("backbon_lr", "epochs=0", "optimizer='lion'", "depth=42", "window_low"):
        assert any(part in line for line in told), part


def test_what_a_wrong_value_would_have_decided_is_not_told() -> None:
    """Whether a warm-up of 70 epochs is too long hangs on how many epochs "many" are."""
    (told,) = problems_of(epochs="many", warmup_epochs=70)
    assert told.startswith("epochs='many'")


@pytest.mark.parametrize("former", FORMER_NAMES)
def test_names_used_elsewhere_lead_to_ours(former: str) -> None:
    assert FORMER_NAMES[former] in FineTuneConfig.model_fields
    assert former not in FineTuneConfig.model_fields
    assert f"did you mean {FORMER_NAMES[former]!r}?" in problems_of(**{former: 1})[0]


@pytest.mark.parametrize(
    "written", [64, "64", [64, 64, 64], "64,64,64", "64x64x64", (64.0, 64.0, 64.0)]
)
def test_a_cube_may_be_written_as_one_number(written: object) -> None:
    assert build_config({"volume_shape": written}).volume_shape == (64, 64, 64)


@pytest.mark.parametrize("written", [True, "big", [64, 64], "1,2", None, {"d": 1}])
def test_a_shape_that_is_none_is_refused(written: object) -> None:
    assert problems_of(volume_shape=written)[0].startswith("volume_shape")


def test_yaml_reads_off_as_false_and_it_still_means_off() -> None:
    assert build_config(yaml.safe_load("amp: off")).amp == "off"


def test_equal_settings_have_equal_hashes_however_they_are_written() -> None:
    assert (
        build_config({"volume_shape": 64}).hash()
        == build_config({"volume_shape": "64,64,64"}).hash()
    )
    assert build_config().hash() == build_config({"max_m": 0.2}).hash()
    assert build_config().hash() != build_config({"max_m": 0.21}).hash()
    changed = {
        build_config(overrides).hash()
        for overrides in ({"seed": 1}, {"fold": 1}, {"head": "linear"}, {})
    }
    assert len(changed) == 4


def test_a_config_cannot_be_changed_and_survives_json_and_pickle() -> None:
    config = build_config({"volume_shape": 48, "spacing_mm": 1.5})
    with pytest.raises(ValueError, match="frozen"):
        config.max_m = 0.3  # type: ignore[misc]
    assert build_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    error = pickle.loads(pickle.dumps(ConfigError(["one", "two"])))
    assert error.problems == ["one", "two"]


@given(
    st.dictionaries(
        st.sampled_from(sorted(FineTuneConfig.model_fields)) | st.text(max_size=8),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=6)
        | st.lists(st.integers(), max_size=4),
        max_size=6,
    )
)
def test_whatever_arrives_is_a_config_or_a_config_error(overrides: dict[str, Any]) -> None:
    problems: list[str] | None = None
    config = None
    try:
        config = build_config(overrides)
    except ConfigError as error:
        problems = error.problems
    if config is None:
        assert problems
        assert all(problems)
    else:
        assert build_config(config.model_dump(mode="json")) == config
