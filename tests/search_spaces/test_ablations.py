from collections.abc import Mapping
from typing import Any

import pytest

from search_spaces.ablations import VARIANT_SETS, reference, variants
from search_spaces.fixes import FIXES, all_fixes, baseline, documented_after
from trainables.config import build_config


def changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    return {name for name in one if one[name] != other[name]}


def test_documented_are_the_five_of_the_document() -> None:
    five = variants("documented")
    assert list(five) == [
        "baseline",
        "only-differential-lr",
        "only-reduced-ldam",
        "only-delayed-drw",
        "combined",
    ]
    assert five["baseline"] == baseline()
    assert changed(five["only-differential-lr"], baseline()) == {"backbone_lr", "classifier_lr"}
    assert changed(five["only-reduced-ldam"], baseline()) == {"max_m", "s"}
    assert changed(five["only-delayed-drw"], baseline()) == {"drw_start_epoch"}
    assert five["combined"] == documented_after()


def test_add_one_adds_each_fix_to_the_baseline() -> None:
    added = variants("add-one")
    assert list(added) == ["baseline", *(f"only-{fix.key}" for fix in FIXES)]
    for fix in FIXES:
        assert changed(added[f"only-{fix.key}"], added["baseline"]) == set(fix.before)


def test_leave_one_out_leaves_each_fix_of_the_defaults_out() -> None:
    left = variants("leave-one-out")
    default = [fix for fix in FIXES if not fix.optional]
    assert list(left) == ["all-fixes", *(f"without-{fix.key}" for fix in default)]
    assert build_config(left["all-fixes"]) == build_config()
    for fix in default:
        assert changed(left[f"without-{fix.key}"], left["all-fixes"]) == set(fix.before)


def test_all_holds_every_variant_once() -> None:
    everything = variants("all")
    for name in VARIANT_SETS:
        assert variants(name).items() <= everything.items()
    settings = [tuple(sorted(overrides.items(), key=str)) for overrides in everything.values()]
    assert len(settings) == len(set(settings)) == 1 + 8 + 1 + 1 + 7


@pytest.mark.parametrize("name", VARIANT_SETS)
@pytest.mark.parametrize("epochs", [1, 6, 60, 200])
def test_every_variant_is_a_config_of_its_length_and_names_all_hyperparameters(
    name: str, epochs: int
) -> None:
    for overrides in variants(name, epochs).values():
        assert overrides.keys() == all_fixes().keys()
        assert build_config({**overrides, "epochs": epochs}).epochs == epochs


def test_each_set_is_read_against_its_first_variant() -> None:
    assert {name: reference(name) for name in VARIANT_SETS} == {
        "documented": "baseline", "add-one": "baseline", "leave-one-out": "all-fixes", "all": "baseline",
    }  # fmt: skip


def test_an_unknown_set_is_named_with_the_nearest() -> None:
    with pytest.raises(
        ValueError,
        match=r"unknown set of variants 'leave_one_out': one of documented, .* did you mean 'leave-one-out'",
    ):
        variants("leave_one_out")
