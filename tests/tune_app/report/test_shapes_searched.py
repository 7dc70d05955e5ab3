"""A search over shapes and spacings: every page, table and text that shows or compares a hyperparameter holds them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from search_spaces.space import SpaceError
from search_spaces.spaces import warm_start_points
from search_spaces.written import space_from
from trainables.config import TRIPLES, FineTuneConfig, as_scalar, build_config
from tune_app.cli.app import app
from tune_app.report.figures import parallel
from tune_app.report.findings import configuration, trial_with
from tune_app.report.page import write_report
from tune_app.results import load_study
from tune_app.results.text import format_value
from tune_app.serve import views

SPACE = {
    "search": {
        "volume_shape": [16, "20x20x24", [24, 24, 24]],
        "spacing_mm": [None, "1x1x1.5"],
        "backbone_lr": {"low": 1e-4, "high": 1e-3, "log": True},
    }
}


def test_the_names_are_those_of_all_fields_with_three_values() -> None:
    annotations = {name: str(one.annotation) for name, one in FineTuneConfig.model_fields.items()}
    assert tuple(name for name, text in annotations.items() if "tuple[" in text) == TRIPLES


@pytest.mark.parametrize("written", [96, "96", "96,96,96", "96x96x96", (96, 96, 96), [96.0] * 3])
def test_a_shape_is_one_text_however_it_is_written(written: object) -> None:
    assert as_scalar("volume_shape", written) == "96x96x96"
    assert build_config({"volume_shape": written}).volume_shape == (96, 96, 96)


def test_a_spacing_keeps_its_digits() -> None:
    spacing = (0.703125123, 1.0, 2.5)
    assert build_config({"spacing_mm": as_scalar("spacing_mm", spacing)}).spacing_mm == spacing
    assert as_scalar("spacing_mm", None) is None
    assert as_scalar("s", (1, 2)) == (1, 2)
    assert as_scalar("volume_shape", "large") == "large"


def test_a_choice_is_known_in_whatever_form_a_setting_gives_it() -> None:
    space = space_from(SPACE, {"epochs": 5})
    assert space.parameters["volume_shape"].choices == ("16x16x16", "20x20x24", "24x24x24")
    given = {"volume_shape": (20, 20, 24), "spacing_mm": [1, 1, 1.5], "backbone_lr": 2e-4}
    sample, reasons = space.overrides_to_sample(given, 5)
    assert reasons == []
    assert sample == {"volume_shape": "20x20x24", "spacing_mm": "1x1x1.5", "backbone_lr": 2e-4}
    overrides = space.sample_to_overrides(sample, 5)
    assert build_config(overrides).volume_shape == (20, 20, 24)
    outside = warm_start_points(space, 5).left_out
    assert "volume_shape=96x96x96 is not in 16x16x16, 20x20x24, 24x24x24" in outside["defaults"]
    with pytest.raises(SpaceError, match="is listed twice"):
        space_from({"search": {"volume_shape": [16, "16x16x16"]}}, {})


@pytest.mark.parametrize("trials", [1, 8])
def test_reports_pages_and_tables_show_shapes(
    write_study: Callable[..., Path], tmp_path: Path, trials: int
) -> None:
    """Also while the first trial runs, which has not ended and may have no rows yet."""
    path = write_study(
        trials=trials,
        epochs=6,
        unfinished=1,
        spec={"space": SPACE, "config": {"epochs": 6, "depth": 10}},
    )
    write_report(load_study(path), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "volume_shape" in page
    study = load_study(path)
    # The first trials are at the documented settings, outside the space.
    assert set(study.trials_full["volume_shape"]) <= {
        "16x16x16",
        "20x20x24",
        "24x24x24",
        "96x96x96",
    }
    for trial in study.trials_full["trial"]:
        shown = {one["name"]: one for one in views.trial_page(study, trial)["settings"]}
        assert shown["volume_shape"]["documented"] == "96x96x96"
        assert shown["volume_shape"]["differs"] == (shown["volume_shape"]["value"] != "96x96x96")
    axis = study.axis("volume_shape")
    assert axis.choices == ("16x16x16", "20x20x24", "24x24x24", "96x96x96")
    assert not any(place != place for place in axis.places(study.trials_full))
    assert axis.place((20, 20, 24)) == 1.0
    rows = configuration(study).set_index("name")
    best = study.best()["volume_shape"]
    assert ("volume_shape" in rows.index) == (trials > 1 or best != "96x96x96")
    if "volume_shape" in rows.index:
        assert rows.loc["volume_shape", "before"] == "96x96x96"
        assert bool(rows.loc["volume_shape", "differs"]) == (best != "96x96x96")
    first = study.trials_full.iloc[0]["volume_shape"]
    assert trial_with(study, {"volume_shape": tuple(map(int, first.split("x")))}) is not None
    for command in (
        ["results", str(path)],
        ["results", str(path), "--where", f"volume_shape={first}"],
        ["results", str(path), "--columns", "trial,volume_shape,spacing_mm"],
        ["report", str(path), "--out", str(tmp_path / "again.html")],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
    if trials > 1:
        json.dumps(parallel(study))
        json.dumps(views.comparison(study, "00000", "00001"))


def test_every_default_is_formatted() -> None:
    for name, info in FineTuneConfig.model_fields.items():
        assert isinstance(format_value(name, info.default), str)
    assert format_value("volume_shape", (96, 96, 64)) == "96x96x64"
    assert format_value("anything", (1, 2.5)) == "1, 2.5"
