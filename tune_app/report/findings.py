"""A study's dataframes -> words and small tables: question and finding, noise, stopped trials and why.

Pure, and without a page: the report prints these, and so can a terminal. Differences between trials are held against
the noise of the best one's AUC, taken from its interval. Two trials are scored on the same volumes, so their errors go
together: their difference is taken to have the noise of one of them (a correlation of 1/2), as in the diagnosis.
"""

import math
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd

from search_spaces.fixes import baseline, documented_after
from search_spaces.space import NOT_SEARCHED
from trainables.config import FineTuneConfig, as_scalar, build_config
from trainables.data.json_files import read_json
from trainables.diagnosis import class_sizes, expected_error
from trainables.objective import OBJECTIVES
from tune_app.compare.ablation import comparisons
from tune_app.compare.confirm import judge, judged_lines
from tune_app.compare.test_record import score_lines
from tune_app.results.loading import load_study
from tune_app.results.study import Study
from tune_app.results.text import format_value, printable
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.rows import ENDED, STATES

Found = TypeVar("Found")


def once_per_study(find: Callable[[Study], Found]) -> Callable[[Study], Found]:
    """Have `find` computed once for each study: page, report and other findings ask for the same ones."""
    known: WeakKeyDictionary[Study, Found] = WeakKeyDictionary()

    @wraps(find)
    def found(study: Study) -> Found:
        if study not in known:
            known[study] = find(study)
        return known[study]

    return found


# In two sentences ------------------------------------------------------------------------------------------------------


def summary(study: Study) -> tuple[str, str]:
    """Return the question and the finding of the study, one sentence each."""
    return _asked(study), found(study)


def _asked(study: Study) -> str:
    spec, trials = study.spec, study.trials_full
    network = (
        f"a 3D ResNet-{trials['depth'].iloc[0]}"
        if trials["depth"].nunique() == 1
        else "a 3D ResNet"
    )
    where = (
        f"on {spec.data.rsplit('/', 1)[-1]}{_validation(study)}, in {spec.epochs} epochs a trial"
    )
    if (space := study.space) is not None:
        return (
            f"Which of {spec.trials} settings of the space {space.name} ({len(space.parameters)} hyperparameters) gives "
            f"{network} the highest {OBJECTIVES[spec.objective].title} {where}?"
        )
    variants = list(dict.fromkeys(trials["variant"].dropna()))
    folds, seeds = (trials[name].nunique() for name in ("fold", "seed"))
    runs = f"{folds} fold{'s' if folds != 1 else ''} and {seeds} seed{'s' if seeds != 1 else ''}"
    if spec.kind == "ablation":
        return (
            f"What does each of {len(variants)} variants change for {network} {where}, over {runs}?"
        )
    return f"Which of {len(variants)} configurations of {network} holds up {where}, over {runs}?"


def _validation(study: Study) -> str:
    last = study.epochs.drop_duplicates("trial", keep="last")
    counts = last[["val_positive", "val_negative"]].dropna().drop_duplicates()
    if len(counts) != 1:
        return ""
    positive, negative = counts.iloc[0]
    of_subjects = _subjects_behind(last)
    names = build_config(study.spec.shared).class_names
    of = [f" ({name})" for name in names[::-1]] if len(names) == 2 else ["", ""]
    return f" ({positive} positive{of[0]} and {negative} negative{of[1]} validation volumes{of_subjects})"


def _subjects_behind(last: pd.DataFrame) -> str:
    """How many subjects have the validation volumes of each class, where these are fewer than the volumes."""
    columns = [f"val_{sign}{end}" for end in ("", "_subjects") for sign in ("positive", "negative")]
    counts = last[columns].dropna().drop_duplicates()
    if len(counts) != 1:
        return ""
    positive, negative, *subjects = counts.iloc[0]
    return (
        "" if [positive, negative] == subjects else f" of {subjects[0]} and {subjects[1]} subjects"
    )


def sizes(trial: Mapping[Any, Any] | pd.Series) -> tuple[int | None, int | None, str]:
    """`class_sizes` of a trial's best epoch."""
    names = [f"val_{sign}{end}" for sign in ("positive", "negative") for end in ("", "_subjects")]
    row = {name: trial[f"best_{name}"] for name in names}
    return class_sizes({name: None if pd.isna(value) else value for name, value in row.items()})


def found(study: Study) -> str:
    """Return the finding of the study in a sentence: the best trial, how many tie with it, and what stops spared."""
    if not study.scored:
        return f"Nothing yet: {len(study.trials_full)} trials have started and none has a score."
    if study.spec.kind != "search":
        told = _found_between_variants(study)
        if told:
            return told
    best = study.best()
    ended = _ended(study) == study.spec.num_trials
    parts = [
        f"Trial {best['trial']} is best{'' if ended else ' so far'} with {best['objective']:.3f}{_interval(best)}"
        f"{_against_documented(study, best)}"
    ]
    rivals, half = rivals_within_noise(study)
    if math.isfinite(half):
        parts.append(
            f"{rivals} other{' trial lies' if rivals == 1 else ' trials lie'} within the noise of {half:.3f}"
            if rivals
            else f"no other trial comes within the noise of {half:.3f}"
        )
    stopped = int(_stopped_early(study.trials_full).sum())
    if stopped:
        saved = epochs_saved(study)
        parts.append(
            f"{stopped} of {started(study)} {'was' if stopped == 1 else 'were'} stopped early, which spared "
            f"{100 * saved:.0f} % of the epochs"
        )
    return "; ".join(parts) + "."


def started(study: Study) -> str:
    """Return the number of trials that have started, in words that name them where others are still to come."""
    count = len(study.trials_full)
    return f"{count} trials" + (" that have started" if count < study.spec.num_trials else "")


def _interval(trial: pd.Series) -> str:
    if pd.isna(trial["best_val_auc"]):
        return ""
    return (
        f" (AUC {trial['best_val_auc']:.3f}, 95 % interval {trial['best_val_auc_low']:.2f} to "
        f"{trial['best_val_auc_high']:.2f}, in epoch {trial['best_epoch']})"
    )


def _against_documented(study: Study, best: pd.Series) -> str:
    told = []
    for words, settings in documented_settings(study).items():
        row = trial_with(study, settings)
        if row is not None and row["trial"] != best["trial"] and not pd.isna(row["objective"]):
            told.append(
                f"{row['objective']:.3f} for the {words} settings that this project started from"
            )
    return f", against {' and '.join(told)}" if told else ""


def _found_between_variants(study: Study) -> str | None:
    if study.spec.kind == "confirmation":
        lines = confirmation_lines(study)
        return lines[0] if lines else None
    told = [_effects_sentence(table) for table in effects_tables(study)]
    return f"{'; '.join(told)}." if told else None


def _effects_sentence(table: pd.DataFrame) -> str:
    reference = table.attrs["baseline"]
    told = []
    for call in ("better", "worse"):
        rows = table[table["call"] == call].sort_values("mean", ascending=False)
        for row in rows.to_dict("records"):
            told.append(
                f"{row['variant']} is {call} by {abs(row['mean']):.3f} ({_range(row)}, {row['pairs']} pairs)"
            )
    unclear = table.loc[table["call"] == "cannot tell", "variant"].tolist()
    sentence = f"Against {reference}, " + (
        "; ".join(told) if told else "no difference stands out from chance"
    )
    return sentence + (
        f"; for {listed(unclear)} the data do not decide" if unclear and told else ""
    )


@once_per_study
def effects_tables(study: Study) -> list[pd.DataFrame]:
    """Return the effects an ablation or a confirmation is read by, a table for each reference; none before there are two
    variants."""
    if study.spec.kind == "confirmation":
        try:
            return [judge(study).effects]
        except SpecError:
            return []
    return comparisons(study) if study.spec.kind == "ablation" else []


@once_per_study
def confirmation_within(study: Study) -> Study | None:
    """Return the confirmation of a search that is stored in its folder; None where there is none that can be read."""
    root = StudyFiles(study.path).confirmation
    if study.spec.kind != "search" or not StudyFiles(root).spec.is_file():
        return None
    try:
        return load_study(root, on_damage="skip")
    except SpecError:
        return None


@once_per_study
def confirmation_lines(study: Study) -> list[str]:
    """Return a confirmation's result in words, first the winner or that there is none; no words before it has started."""
    try:
        return judged_lines(study, judge(study))
    except SpecError:
        return []


def test_lines(study: Study) -> list[str]:
    """Return the result on the test rows, as test.json records it; nothing where they were not looked at."""
    searches = [Path(study.spec.confirms)] if study.spec.confirms else []
    for root in (*searches, study.path):
        path = StudyFiles(root).test
        if path.is_file():
            try:
                return score_lines(read_json(path)["scored"][-1])
            except (OSError, ValueError, KeyError, TypeError, IndexError):
                return [f"{path}: the record of the test scores is damaged"]
    return []


def _range(row: Mapping[Any, Any]) -> str:
    return f"95 % interval {row['low']:+.3f} to {row['high']:+.3f}"


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# Noise, the documented settings, stops ----------------------------------------------------------------------------------


def standard_error(trial: Mapping[Any, Any] | pd.Series) -> float:
    """Return the standard error of a trial's best AUC; NaN when no interval and no class counts are there."""
    low, high, auc = trial["best_val_auc_low"], trial["best_val_auc_high"], trial["best_val_auc"]
    if math.isfinite(low) and math.isfinite(high) and high > low:
        return float(high - low) / 3.92
    positive, negative, _ = sizes(trial)
    if math.isfinite(auc) and positive and negative:
        return expected_error(float(auc), positive, negative)
    return math.nan


@once_per_study
def rivals_within_noise(study: Study) -> tuple[int, float]:
    """Return how many other trials' objectives lie within noise of the best one's, and that noise (1.96 errors).

    NaN noise when the objective is no AUC, or no interval is known.
    """
    if not OBJECTIVES[study.spec.objective].column.startswith("val_auc"):
        return 0, math.nan
    best = study.best()
    half = 1.96 * standard_error(best)
    trials = study.trials_full[
        (study.trials_full["state"] != "failed") & (study.trials_full["trial"] != best["trial"])
    ]
    return int((trials["objective"] > best["objective"] - half).sum()), half


def first_tile(study: Study) -> tuple[str, str]:
    """Return a search's best objective with the interval of its AUC, and in words its meaning and how many trials tie."""
    best = study.best()
    low, high = best["best_val_auc_low"], best["best_val_auc_high"]
    known = not (pd.isna(low) or pd.isna(high))
    interval = f" [{low:.2f}, {high:.2f}]" if known else ""
    text = f"{OBJECTIVES[study.spec.objective].title}, trial {best['trial']}"
    if known:
        text += ", with the interval of its AUC"
    rivals, noise = rivals_within_noise(study)
    if math.isfinite(noise):
        text += f"; {rivals or 'no'} other{'' if rivals == 1 else 's'} within its noise"
    return f"{best['objective']:.3f}{interval}", text


def trials_tile(study: Study) -> tuple[str, str]:
    """Return how many of the study's trials have ended, such as `2 of 6`, and in words their states."""
    states = study.trials_full["state"].value_counts()
    ended, others = (
        ", ".join(
            f"{states[state]} {state}"
            for state in STATES
            if state in states and (state in ENDED) == have
        )
        for have in (True, False)
    )
    text = f"trials ended{f': {ended}' if ended else ''}{f'; {others}' if others else ''}"
    return f"{_ended(study)} of {study.spec.num_trials}", text


def _ended(study: Study) -> int:
    return int(study.trials_full["state"].isin(ENDED).sum())


LEAST_FOR_IMPORTANCE = 20
"""Ended trials below which importance is not shown: a tree over fewer finds an order in noise."""


def enough_for_importance(study: Study) -> bool:
    """Return whether enough trials have ended with a value for their importance to mean something."""
    ended = study.trials_full["state"].isin(["completed", "stopped"])
    return int(ended.sum()) >= LEAST_FOR_IMPORTANCE


def luck(errors: float, trials: int) -> float:
    """Return by how much the best of equal `trials` looks better than it is, on one validation fold.

    The expected largest of `trials` normal deviates (Blom 1958), times the part of the error that trials do not share.
    """
    if trials < 2 or not math.isfinite(errors):
        return 0.0
    return errors * math.sqrt(0.5) * NormalDist().inv_cdf((trials - 0.375) / (trials + 0.25))


@once_per_study
def documented_settings(study: Study) -> dict[str, dict[str, Any]]:
    """Return the document's settings before and after its fixes, epochs scaled to the study's."""
    epochs = study.spec.epochs
    return {"original": baseline(epochs), "recommended": documented_after(epochs)}


def trial_with(study: Study, settings: dict[str, Any]) -> pd.Series | None:
    """Return the best trial that ran with exactly these settings, of those the fixes touch; None without one."""
    rows = study.trials_full
    for name, value in settings.items():
        column = rows[name]
        same = (
            np.isclose(column.astype("float64"), value)
            if isinstance(value, float)
            else (column == as_scalar(name, value)).fillna(False)
        )
        rows = rows[np.asarray(same, dtype=bool)]
    rows = rows[rows["objective"].notna()]
    return None if rows.empty else rows.iloc[int(rows["objective"].to_numpy().argmax())]


def column_order(values: pd.Series) -> tuple[bool, Literal["ascending", "descending"]]:
    """Return whether a column of the results is numeric, and the order in which a first click sorts it."""
    numeric = pd.api.types.is_numeric_dtype(values.dtype) and values.dtype != "boolean"
    falling = numeric and ("auc" in str(values.name) or values.name == "objective")
    return numeric, "descending" if falling else "ascending"


def auc_with_interval(row: Mapping[Any, Any]) -> str:
    """Return the best AUC of a row of the results with its interval as text."""
    low, high = row["best_val_auc_low"], row["best_val_auc_high"]
    return f"{row['best_val_auc']:.3f} [{low:.2f}, {high:.2f}]"


def reasons_of_ends(study: Study) -> dict[str, str]:
    """Return why each trial ended, empty for one without a reason; an error goes before the policy's reason."""
    trials = study.trials_full
    whys = trials["error"].combine_first(trials["reason"])
    return {
        str(trial): "" if pd.isna(why) else printable(str(why))[:300]
        for trial, why in zip(trials["trial"], whys, strict=True)
    }


def setting_text(name: str, value: Any) -> str:
    """Return a hyperparameter's value as text, `none` for an empty one."""
    return format_value(name, value) or "none"


@once_per_study
def leading(study: Study) -> pd.Series:
    """Return the trial a study is shown by: the best one of a search, else the best run of the leading variant.

    The leading variant is the one with the highest mean: the best single run of many is the one with the best luck.
    """
    if study.spec.kind == "search" or study.trials_full["variant"].isna().all():
        return study.best()
    trials = study.trials_full[
        (study.trials_full["state"] != "failed") & study.trials_full["objective"].notna()
    ]
    means = trials.groupby("variant", observed=True)["objective"].mean()
    ahead = str(means.index[int(means.to_numpy().argmax())])
    own: pd.DataFrame = trials[trials["variant"] == ahead]
    return own.iloc[int(own["objective"].to_numpy().argmax())]


def configuration(study: Study) -> pd.DataFrame:
    """Return the leading trial's settings next to the document's: name, before, after, best, differs (from after).

    One row a hyperparameter that a fix touches or that was searched, or in which that trial leaves the defaults.
    """
    best = leading(study)
    settings = documented_settings(study)
    before, after = settings["original"], settings["recommended"]
    rows = []
    for name, field in FineTuneConfig.model_fields.items():
        default = as_scalar(name, field.default)
        plain = default is not None
        own = best[name]
        moved = plain and name not in NOT_SEARCHED and pd.notna(own) and own != default
        if name not in before and name not in study.searched and not moved:
            continue
        documented = [values.get(name, default) for values in (before, after)]
        texts = [setting_text(name, value) for value in (*documented, best[name])]
        rows.append((name, *texts, texts[1] != texts[2]))
    return pd.DataFrame(rows, columns=["name", "before", "after", "best", "differs"])


def sentence(text: str) -> str:
    """Return the text with a capital letter."""
    return text[:1].upper() + text[1:]


def epochs_saved(study: Study) -> float:
    """Return the share of the asked-for epochs that stopping early spared, of all trials that have started.

    Trials that a user stopped are left out of both numbers.
    """
    started = study.trials_full[study.trials_full["stopped_by"].fillna("") != "requested"]
    asked = float(started["epochs"].sum())
    stopped = started[_stopped_early(started)]
    return float((stopped["epochs"] - stopped["epochs_run"]).sum()) / asked if asked else 0.0


def _stopped_early(trials: pd.DataFrame) -> "pd.Series[bool]":
    """Which trials the policy stopped: not those that a user stopped."""
    return (trials["state"] == "stopped") & (trials["stopped_by"].fillna("") != "requested")


@once_per_study
def stops(study: Study) -> pd.DataFrame:
    """Return why trials ended early: reason, trials, epochs_run, epochs_spared, time_spared_s, gpu_s_spared, example.

    One row for halving, one for requests and one for each verdict that stopped a trial, most spared first. Time is the
    duration of the trial's own epochs, times the epochs it did not run. A request of a user spares nothing.
    """
    stopped = study.trials_full[study.trials_full["state"] == "stopped"].copy()
    names = [
        "reason",
        "trials",
        "epochs_run",
        "epochs_spared",
        "time_spared_s",
        "gpu_s_spared",
        "example",
    ]
    if stopped.empty:
        return pd.DataFrame(columns=names)
    by_diagnosis = stopped["stopped_by"] == "diagnosis"
    otherwise = stopped["stopped_by"].where(stopped["stopped_by"] == "requested", "halving")
    stopped["ended_by"] = stopped["verdict"].where(by_diagnosis, otherwise).fillna("diagnosis")
    stopped["told"] = stopped["verdict_summary"].where(by_diagnosis, stopped["reason"]).fillna("")
    left = (stopped["epochs"] - stopped["epochs_run"]).astype("float64")
    stopped["spared"] = left.where(_stopped_early(stopped), 0.0)
    stopped["time"] = (
        stopped["spared"] * stopped["work_s"] / stopped["epochs_run"].astype("float64")
    )
    rows = [
        (
            str(reason),
            len(group),
            int(group["epochs_run"].sum()),
            int(group["spared"].sum()),
            float(group["time"].sum()),
            float((group["time"] * group["gpus"]).sum()),
            f"{group['trial'].iloc[0]}: {group['told'].iloc[0]}",
        )
        for reason, group in stopped.groupby("ended_by")
    ]
    return pd.DataFrame(rows, columns=names).sort_values(
        "epochs_spared", ascending=False, ignore_index=True
    )
