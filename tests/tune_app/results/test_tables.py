import contextlib
import io
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tune_app.results.loading import load_studies, load_study
from tune_app.results.query import QueryError, column_of, select, smaller_is_better
from tune_app.results.study import Study
from tune_app.results.tables import matching, meanings_table, render_table, results_table
from tune_app.results.text import compact, duration, format_value, formatted, printable
from tune_app.results.trials import column_meanings


@pytest.fixture(scope="module")
def study(a_search: Path) -> Study:
    return load_study(a_search)


@pytest.fixture
def trials() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "trial": pd.Series(["00000", "00001", "00002", "00003"], dtype="string"),
            "number": pd.Series([0, 1, 2, 3], dtype="Int64"),
            "state": pd.Series(["completed", "stopped", "failed", "stopped"], dtype="string"),
            "verdict": pd.Series(
                ["healthy", "ema_lag", None, "collapsed_after_drw"], dtype="string"
            ),
            "since_epoch": pd.Series([None, 4, None, 15], dtype="Int64"),
            "best_val_auc": [0.9, 0.6, float("nan"), 0.72],
            "best_val_auc_raw": [0.88, 0.85, float("nan"), 0.73],
            "max_m": [0.2, 0.3, 0.1, 0.3],
            "ema_warmup": pd.Series([True, False, True, True], dtype="boolean"),
            "head": pd.Series(["cosine", "linear", "linear", "my own"], dtype="string"),
            "started": pd.to_datetime(
                [1.78e9, 1.78e9 + 3600, 1.78e9 + 7200, 1.78e9 + 86400], unit="s", utc=True
            ),
        }
    )


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("", [0, 1, 2, 3]),
        ("best_val_auc > 0.7", [0, 3]),
        ("val_auc > 0.7", [0, 3]),  # a bare metric is its best_ column
        ("0.7 < val_auc", [0, 3]),
        ("0.65 < val_auc < 0.8", [3]),
        ("val_auc_raw > val_auc", [1, 3]),
        ("state == stopped", [1, 3]),
        ("state = stopped", [1, 3]),
        ("state != stopped", [0, 2]),
        ("verdict ~ COLLAPSED", [3]),
        ("verdict != healthy", [1, 3]),  # a missing value passes no comparison
        ("verdict == none", [2]),
        ("verdict != missing", [0, 1, 3]),
        ("since_epoch <= 4", [1]),
        ("trial == 00003", [3]),
        ("number == 00003", [3]),
        ("number >= 1e0", [1, 2, 3]),
        ("head == 'my own'", [3]),
        ('head == "my own" or max_m < 0.2', [2, 3]),
        ("state == stopped and not (head == linear)", [3]),
        ("not state == stopped and head == linear", [2]),
        ("state == stopped, head == linear", [1]),
        ("state == failed or state == stopped and max_m == 0.3", [1, 2, 3]),
        ("(state == failed or state == stopped) and max_m == 0.3", [1, 3]),
        ("not not state == failed", [2]),
        ("ema_warmup", [0, 2, 3]),
        ("not ema_warmup", [1]),
        ("ema_warmup == no", [1]),
        ("ema_warmup == True", [0, 2, 3]),
        ("started > 2026-05-28T22:00", [2, 3]),
        ("max_m == .3", [1, 3]),
        ("val_auc == nan", []),
    ],
)
def test_conditions_let_through_what_they_say(
    trials: pd.DataFrame, condition: str, expected: list[int]
) -> None:
    assert select(trials, condition)["number"].tolist() == expected


def test_several_conditions_must_all_hold(trials: pd.DataFrame) -> None:
    assert select(trials, ["state == stopped", "val_auc > 0.7"])["number"].tolist() == [3]


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ("val_auk > 0.8", "unknown column 'val_auk'; did you mean 'val_auc'"),
        ("0.8 < val_auk", "unknown column"),
        ("val_auc", "one of < <= > >= == = != ~ expected, found 'its end'"),
        ("val_auc >", "a column or a value expected, found 'its end'"),
        ("val_auc > high", "best_val_auc is compared with 'high', must be a number"),
        ("ema_warmup == maybe", "must be true or false"),
        ("started > yesterday-ish", "must be a time like"),
        ("val_auc > 0.8 state == stopped", "and, or, or the end expected, found 'state'"),
        ("(val_auc > 0.8", ") expected"),
        ("val_auc > 0.8)", "and, or, or the end expected"),
        ("and val_auc > 1", "a column or a value expected, found 'and'"),
        ("val_auc ! 0.8", "cannot be read"),
        ("state == 'stopped", "cannot be read"),
        ("max_m > state", "do not compare"),
        ("(" * 60 + "max_m > 1", "more than 50 parentheses"),
        ("max_m > 1 and " * 200, "at most 2000"),
        ("__import__('os').system('true')", "expected"),
        ("trials.index > 0", "unknown column"),
    ],
)
def test_a_condition_that_cannot_be_understood_says_where(
    trials: pd.DataFrame, condition: str, says: str
) -> None:
    with pytest.raises(QueryError) as told:
        select(trials, condition)
    assert says in str(told.value)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text("()<>=!~ ,'\"notadrmx_.013", max_size=40))
def test_any_text_is_a_condition_or_an_error_in_words(text: str) -> None:
    table = pd.DataFrame(
        {"max_m": [0.1, 0.2], "state": pd.Series(["a", None], dtype="string"), "n": [1, 2]}
    )
    with contextlib.suppress(QueryError):
        assert len(select(table, text)) <= 2


def test_a_bare_metric_means_its_best_column_and_a_typo_is_answered(trials: pd.DataFrame) -> None:
    assert column_of(trials, "val_auc_raw") == "best_val_auc_raw"
    assert column_of(trials, " max_m ") == "max_m"
    with pytest.raises(QueryError, match="did you mean 'max_m'"):
        column_of(trials, "maxm")


@pytest.mark.parametrize(
    ("column", "smaller"),
    [
        ("objective", False),
        ("best_val_auc", False),
        ("val_brier_ema", True),
        ("best_train_loss", True),
        ("work_s", True),
        ("last_val_ece_raw", True),
        ("max_m", False),
        ("s", False),
        ("val_sensitivity_at_90_specificity_ema", False),
    ],
)
def test_losses_errors_and_times_are_best_small(column: str, smaller: bool) -> None:
    assert smaller_is_better(column) is smaller


def test_the_table_shows_the_best_first_and_only_what_tells_trials_apart(study: Study) -> None:
    table = results_table(study.trials_full, study.searched)
    assert table["objective"].dropna().is_monotonic_decreasing
    assert {"trial", "state", "objective", "best_val_auc", *study.searched} <= set(table.columns)
    assert "variant" not in table.columns
    loaded = load_studies([study])
    assert "study" in results_table(loaded.trials_full, loaded.searched).columns


def test_collapses_that_healed_have_a_column_where_there_are_any(study: Study) -> None:
    assert "healed_epochs" not in results_table(study.trials_full, study.searched).columns
    trials = study.trials_full.copy()
    trials.loc[trials.index[0], "healed_epochs"] = 20
    assert results_table(trials, study.searched)["healed_epochs"].max() == 20


def test_columns_are_chosen_by_name_metric_pattern_or_all(study: Study) -> None:
    assert list(results_table(study.trials_full, study.searched, columns="trial,val_auc")) == [
        "trial",
        "best_val_auc",
    ]
    wanted = ["trial", "last_val_auc_raw", "last_val_auc_raw_low", "last_val_auc_raw_high"]
    assert (
        list(
            results_table(study.trials_full, study.searched, columns=["trial", "last_val_auc_raw*"])
        )
        == wanted
    )
    assert list(results_table(study.trials_full, study.searched, columns="all")) == list(
        study.trials_full.columns
    )
    with pytest.raises(QueryError, match=r"no column matches 'nope\*'"):
        results_table(study.trials_full, study.searched, columns="nope*")


def test_rows_are_sorted_by_several_keys_with_missing_values_last(study: Study) -> None:
    table = results_table(
        study.trials_full,
        study.searched,
        columns="state,since_epoch,number",
        sort="state,-since_epoch",
    )
    for _, rows in table.groupby("state"):
        values = rows["since_epoch"].dropna().tolist()
        assert values == sorted(values, reverse=True)
        assert rows["since_epoch"].isna().tolist() == sorted(rows["since_epoch"].isna())
    assert table["state"].is_monotonic_increasing
    assert len(results_table(study.trials_full, study.searched, limit=3)) == 3


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("backbone_lr", 1e-4, "1e-4"),
        ("backbone_lr", 0.00023456, "2.3e-4"),
        ("lr_classifier", 0.0, "0"),
        ("classifier_lr", 0.05, "0.05"),
        ("best_val_auc", 0.87654, "0.877"),
        ("objective", 1.0, "1.000"),
        ("best_epoch", 12, "12"),
        ("epochs_run", 60.0, "60"),
        ("work_s", 42.3, "42 s"),
        ("work_s", 3.21, "3.2 s"),
        ("gpu_s", 2 * 3600.0, "2.0 h"),
        ("wall_s", 400.0, "6.7 min"),
        ("wall_s", 1e6, "11.6 d"),
        ("ema_decay", 0.995, "0.995"),
        ("max_m", 0.2, "0.2"),
        ("s", 15.0, "15"),
        ("verdict", pd.NA, "-"),
        ("best_val_auc", float("nan"), "-"),
        ("started", pd.Timestamp("2026-01-02 03:04:05", tz="UTC"), "2026-01-02 03:04"),
        ("started", pd.NaT, "-"),
        ("ema_warmup", True, "yes"),
        ("error", "two\nlines\x1b[31m red\x07", "two lines red"),
    ],
)
def test_values_are_written_as_people_write_them(column: str, value: object, text: str) -> None:
    assert format_value(column, value) == text


def test_small_helpers_of_text() -> None:
    assert compact(123456) == "1.2e5"
    assert compact(-0.0002) == "-2e-4"
    assert duration(float("inf")) == "-"
    assert printable("a\tb‮c") == "a bc"


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_the_rendered_table_keeps_to_its_width_and_names_what_it_left_out(
    study: Study, width: int
) -> None:
    text = _rendered(study, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert len([line for line in lines if line.lstrip().startswith("000")]) == 20
    assert "…" not in text
    if width < 200:
        assert "not shown:" in text
    for column in study.searched:
        assert column in text.replace("\n", "") or column.split("_")[-1] in text


def test_eighty_columns_hold_state_verdict_objective_and_interval(study: Study) -> None:
    lines = _rendered(study, 80).splitlines()
    best = study.best()
    row = next(line for line in lines if line.startswith(best["trial"]))
    assert f"{best['objective']:.3f}" in row
    assert (
        f"{best['best_val_auc']:.3f} [{best['best_val_auc_low']:.3f}, {best['best_val_auc_high']:.3f}]"
        in row
    )


def test_nothing_in_a_cell_is_taken_as_markup_or_obeyed_by_the_terminal() -> None:
    table = pd.DataFrame({"trial": ["00000"], "error": ["[red]boom[/red] \x1b[2J"]})
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    console.print(render_table(table))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]boom[/red]" in shown
    assert "\x1b[2J" not in shown


def test_columns_without_room_are_told_by_their_names_and_counted_where_they_are_many(
    study: Study,
) -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(
        render_table(
            results_table(
                study.trials_full,
                study.searched,
                columns="trial,state,reason,best_val_auc*,best_epoch,epochs_run",
            ),
            30,
        )
    )
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "best_val_auc, best_val_auc_low, best_val_auc_high" in text
    assert "best_epoch, epochs_run" in text
    console = Console(file=io.StringIO(), width=80)
    console.print(render_table(results_table(study.trials_full, study.searched, columns="all"), 80))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "more (`--meanings` names them)" in " ".join(text.split())
    assert len(text.splitlines()) < len(study.trials_full) + 15


def test_the_scale_of_the_logits_does_not_read_as_seconds() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(render_table(pd.DataFrame({"trial": ["00000"], "s": [15.0]})))
    assert console.file.getvalue().split()[:3] == ["scale", "trial", "s"]  # type: ignore[attr-defined]


def test_an_empty_table_renders(study: Study) -> None:
    table = results_table(study.trials_full, study.searched, where="val_auc > 2")
    assert formatted(table).empty
    Console(file=io.StringIO(), width=80).print(render_table(table))


def _rendered(study: Study, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render_table(results_table(study.trials_full, study.searched), width))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_meanings_are_found_by_name_and_pattern(study: Study) -> None:
    meanings = column_meanings(study)
    assert len(matching(meanings, None)) == len(meanings)
    assert set(matching(meanings, "best_val_auc*, s")["column"]) >= {
        "best_val_auc",
        "best_val_auc_low",
        "s",
    }
    with pytest.raises(QueryError, match="did you mean"):
        matching(meanings, "bst_epoch")
    assert meanings_table(meanings).row_count == len(meanings) + 2
