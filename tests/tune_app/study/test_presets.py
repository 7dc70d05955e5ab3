"""Presets: given values win, each preset gives a study that can be built, and the study file of a preset agrees with it."""

import pytest
import yaml

from tune_app.study.presets import PRESETS, preset_line, with_preset
from tune_app.study.spec import build_spec
from tune_app.study.template import study_file


@pytest.mark.parametrize("name", PRESETS)
def test_the_study_file_of_a_preset_gives_the_same_study_as_the_option(name: str) -> None:
    fields = {"data": "/t.csv", "space": "documented"}
    by_option = build_spec(with_preset(name, fields))
    by_file = build_spec(yaml.safe_load(study_file(data="/t.csv", preset=name)))
    assert by_option == by_file
    assert by_option.epochs == PRESETS[name]["config"]["epochs"]


def test_what_is_given_wins_field_by_field() -> None:
    fields = with_preset("laptop", {"trials": 3, "config": {"epochs": 5}})
    assert fields["trials"] == 3
    assert fields["config"]["epochs"] == 5
    assert fields["config"]["depth"] == 10
    assert PRESETS["laptop"]["config"]["epochs"] == 12


def test_the_line_names_every_field() -> None:
    line = preset_line("laptop")
    for name in ("trials=12", "gpus_per_trial=0", "depth=10", "volume_shape=32", "epochs=12"):
        assert name in line
