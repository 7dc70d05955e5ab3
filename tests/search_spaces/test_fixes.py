from typing import Any

import pytest

from search_spaces.fixes import (
    DOCUMENT_EPOCHS,
    FIXES,
    all_fixes,
    baseline,
    documented_after,
    fix_rows,
    fixes_markdown,
    shown,
    with_fixes,
)
from trainables.config import FineTuneConfig, build_config

# The document's own table of changes, typed from it; the right-hand side is what its recommended command sets.
DOCUMENT = {
    "backbone_lr": (2e-4, 1e-4),
    "classifier_lr": (2e-4, 1e-3),
    "max_m": (0.3, 0.2),
    "s": (20, 15),
    "drw_start_epoch": (15, 25),
    "grad_clip": (0.5, 1.0),
    "ema_decay": (0.999, 0.995),
}


def test_the_fixes_say_what_the_document_says() -> None:
    documented = [fix for fix in FIXES if fix.documented]
    assert len(documented) == 6
    before = {name: value for fix in documented for name, value in fix.before.items()}
    after = {name: value for fix in documented for name, value in fix.after.items()}
    for name, values in DOCUMENT.items():
        assert (before[name], after[name]) == values
    assert set(before) - set(DOCUMENT) == {"freeze_backbone_epochs", "unfreeze_stage_epochs"}
    assert [fix.key for fix in FIXES if fix.optional] == ["gradual-unfreezing"]
    assert [fix.key for fix in FIXES if not fix.documented] == ["ema-warmup", "cosine-head"]


def test_after_is_the_default_unless_the_fix_is_optional() -> None:
    for fix in FIXES:
        for name, value in fix.after.items():
            default = FineTuneConfig.model_fields[name].default
            assert (value == default) is not fix.optional, f"{fix.key}: {name}"
            assert (fix.before[name] == default) is fix.optional, f"{fix.key}: {name}"
            assert type(fix.before[name]) is type(default), f"{fix.key}: {name}"


def test_no_two_fixes_touch_the_same_hyperparameter() -> None:
    touched = [name for fix in FIXES for name in fix.before]
    assert len(touched) == len(set(touched))
    assert len({fix.key for fix in FIXES}) == len(FIXES) == 8


def test_the_named_settings_build_the_configs_they_name() -> None:
    assert build_config(all_fixes()) == build_config(), "all fixes are the defaults"
    original = build_config(baseline())
    for name, (before, _) in DOCUMENT.items():
        assert getattr(original, name) == before
    assert (original.head, original.ema_buffers, original.ema_warmup) == ("linear", "copied", False)
    recommended = build_config(documented_after())
    for name, (_, after) in DOCUMENT.items():
        assert getattr(recommended, name) == after
    assert (recommended.head, recommended.ema_buffers, recommended.ema_warmup) == (
        "linear",
        "copied",
        False,
    )
    assert recommended.freeze_backbone_epochs == 0


def test_a_single_fix_changes_only_what_it_names() -> None:
    for fix in FIXES:
        changed = with_fixes([fix.key])
        assert {name for name, value in changed.items() if value != baseline()[name]} == set(
            fix.before
        )


def test_epochs_keep_their_share_of_a_shorter_run() -> None:
    assert with_fixes((), 60) == baseline()
    assert (with_fixes((), 120)["drw_start_epoch"], all_fixes(120)["drw_start_epoch"]) == (29, 49)
    assert (with_fixes((), 8)["drw_start_epoch"], all_fixes(8)["drw_start_epoch"]) == (3, 4)
    assert with_fixes(["gradual-unfreezing"], 8)["freeze_backbone_epochs"] == 1
    for epochs in range(4, 200):
        before: Any = baseline(epochs)["drw_start_epoch"]
        after: Any = all_fixes(epochs)["drw_start_epoch"]
        assert before < after <= epochs, "the fix would change nothing"
        for settings in (
            baseline(epochs),
            documented_after(epochs),
            all_fixes(epochs),
            with_fixes(["gradual-unfreezing"], epochs),
        ):
            build_config({**settings, "epochs": epochs})


def test_an_unknown_fix_is_named_with_those_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"unknown fixes 'cosine', 'ema': there are differential-lr, .*cosine-head"
    ):
        with_fixes(["ema", "cosine", "looser-clip"])


def test_the_share_of_initial_weights_that_the_reason_quotes_is_right() -> None:
    updates = 60 * 14
    why = next(fix.why for fix in FIXES if fix.key == "faster-ema")
    assert f"{0.999**updates:.0%}".replace("%", " %") in why
    assert f"{0.995**updates:.1%}".replace("%", " %") in why
    assert DOCUMENT_EPOCHS == 60


def test_the_table_has_a_line_a_fix_with_its_values() -> None:
    rows, lines = fix_rows(), fixes_markdown().splitlines()
    assert [row.key for row in rows] == [fix.key for fix in FIXES]
    assert lines[:2] == ["| Fix | Before | After | Why | Source |", "|---|---|---|---|---|"]
    assert len(lines) == 2 + len(FIXES)
    for row, line in zip(rows, lines[2:], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == f"{row.title} (`{row.key}`)"
        assert cells[1:3] == ["<br>".join(row.before), "<br>".join(row.after)]
        assert all(cells)
        assert len(cells) == 5
    assert rows[0].before == ("backbone_lr 2e-4", "classifier_lr 2e-4")
    assert "(optional)" in rows[5].title


@pytest.mark.parametrize(
    ("value", "text"),
    [(2e-4, "2e-4"), (1.5e-4, "1.5e-4"), (0.001, "0.001"), (20.0, "20"), (0, "0"), (0.0, "0"), (True, "yes"),
     (None, "none"), ("cosine", "cosine"), (2e6, "2e6"), (-1e-5, "-1e-5"), ((96, 96, 64), "(96, 96, 64)")],
)  # fmt: skip
def test_values_are_shown_as_people_write_them(value: Any, text: str) -> None:
    assert shown(value) == text
