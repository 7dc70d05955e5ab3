"""A study's dataframes -> words and small tables: question and finding, reasons for doubt, stopped trials and why.

Pure, and without a page: the report prints these, and so can a terminal. Differences between trials are held against
the noise of the best one's AUC, taken from its interval. Two trials are scored on the same volumes, so their errors go
together: their difference is taken to have the noise of one of them (a correlation of 1/2), as in the diagnosis.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from shlex import quote
from statistics import NormalDist
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd

from search_spaces.fixes import baseline, documented_after
from search_spaces.space import NOT_SEARCHED
from trainables.config import FineTuneConfig, as_scalar, build_config
from trainables.data.folds import few_of_a_class, few_of_the_rarest
from trainables.data.json_files import read_json
from trainables.diagnosis import GAP, LOSS_SPIKE_FACTOR, WITHOUT_FAULT, class_sizes, expected_error
from trainables.objective import OBJECTIVES
from tune_app.compare.ablation import ADJUSTED_LEVEL, comparisons
from tune_app.compare.confirm import judge, judged_lines
from tune_app.compare.test_record import score_lines
from tune_app.results.effects import COLLAPSES
from tune_app.results.loading import load_study
from tune_app.results.study import Study
from tune_app.results.tables import came_back
from tune_app.results.text import format_value, printable
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.rows import ENDED, STATES

Found = TypeVar("Found")

EDGE = 0.04
"""Share of an axis at either end that counts as its edge."""

DOCUMENTED_AUC = 0.70
"""The document's own line: an AUC that does not get beyond it is a warning sign."""


def once_per_study(find: Callable[[Study], Found]) -> Callable[[Study], Found]:
    """Have `find` computed once for each study: page, report and other findings ask for the same ones."""
    known: WeakKeyDictionary[Study, Found] = WeakKeyDictionary()

    @wraps(find)
    def found(study: Study) -> Found:
        if study not in known:
            known[study] = find(study)
        return known[study]

    return found


@dataclass(frozen=True)
class Caution:
    """Something about a study that its numbers alone do not show."""

    title: str
    text: str
    remedy: str


@dataclass(frozen=True)
class Check:
    """One of the document's success indicators or warning signs, looked for in a trial."""

    kind: Literal["success", "warning"]
    text: str
    """As the document words it."""
    present: bool | None
    """None: the data are not enough to decide."""
    evidence: str
    among: str
    """In how many of all trials it is present."""

    @property
    def good(self) -> bool | None:
        return None if self.present is None else self.present == (self.kind == "success")


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


def _sizes(trial: Mapping[Any, Any] | pd.Series) -> tuple[int | None, int | None, str]:
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
    return sentence + (f"; for {_and(unclear)} the data do not decide" if unclear and told else "")


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


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# Noise, the documented settings, stops ----------------------------------------------------------------------------------


def standard_error(trial: Mapping[Any, Any] | pd.Series) -> float:
    """Return the standard error of a trial's best AUC; NaN when no interval and no class counts are there."""
    low, high, auc = trial["best_val_auc_low"], trial["best_val_auc_high"], trial["best_val_auc"]
    if math.isfinite(low) and math.isfinite(high) and high > low:
        return float(high - low) / 3.92
    positive, negative, _ = _sizes(trial)
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


# What to distrust ------------------------------------------------------------------------------------------------------


@once_per_study
def cautions(study: Study) -> list[Caution]:
    """Return the reasons for caution before trusting the study, gravest first."""
    if not study.scored:
        return list(_about_the_files(study))
    return [
        *_about_the_files(study),
        *_about_the_best(study),
        *_about_what_healed(study),
        *_about_the_search(study),
        *_about_the_variants(study),
    ]


def _about_the_files(study: Study) -> Iterator[Caution]:
    states = study.trials_full["state"].value_counts()
    if study.running:
        yield Caution(
            "The study is still running",
            f"{states.get('running', 0)} trials run at this moment; everything below is as of the last row.",
            "Write the report again later, or let `medtune report --watch` do it.",
        )
    if states.get("interrupted", 0):
        yield Caution(
            "The study was interrupted",
            f"{states['interrupted']} trials have not ended, and no driver is at work on them.",
            f"`medtune resume {quote(study.place)}` continues where they stopped.",
        )
    if states.get("failed", 0):
        failed = study.trials_full[study.trials_full["state"] == "failed"]
        said = next((str(text) for text in failed["error"].dropna()), "no error recorded")
        yield Caution(
            f"{len(failed)} of {len(study.trials_full)} trials failed",
            f"{_and(failed['trial'].tolist()[:5])}: {printable(said)[:300]}",
            f"Each trial's trial.log has the traceback; `medtune resume {quote(study.place)} --retry-failed` continues them.",
        )
    if study.damage:
        yield Caution(
            "The study's files are damaged",
            "; ".join(study.damage[:5]),
            "Damaged parts were left out.",
        )


def _about_the_best(study: Study) -> Iterator[Caution]:
    best = leading(study)
    if not pd.isna(best["verdict"]) and best["verdict"] not in WITHOUT_FAULT:
        advice = "" if pd.isna(best["advice"]) else str(best["advice"])
        yield Caution(
            f"The best trial itself ({best['trial']}) is diagnosed {best['verdict']}",
            sentence(str(best["verdict_summary"])),
            sentence(advice),
        )
    if (few := _few(best)) is not None:
        yield Caution("The validation fold is very small", sentence(few), "")
    raw, averaged = best["best_val_auc_raw"], best["best_val_auc_ema"]
    half = 1.96 * standard_error(best)
    if (
        math.isfinite(half)
        and math.isfinite(raw)
        and math.isfinite(averaged)
        and raw - averaged > half
    ):
        yield Caution(
            "The weights that would be deployed are worse than the raw ones",
            f"In epoch {best['best_epoch']} of trial {best['trial']} the raw weights reach {raw:.3f}, the averaged ones "
            f"{averaged:.3f}.",
            "Lower ema_decay, or see that ema_warmup is on and ema_buffers is averaged.",
        )


def _few(best: pd.Series) -> str | None:
    positive, negative, unit = _sizes(best)
    if best["num_classes"] == 2 and positive is not None and negative is not None:
        return few_of_a_class([negative, positive], unit)
    rarest = best["best_val_rarest_subjects"]
    return None if pd.isna(rarest) else few_of_the_rarest(int(rarest))


def _about_what_healed(study: Study) -> Iterator[Caution]:
    healed = study.trials_full[came_back(study.trials_full)]
    if healed.empty:
        return
    worst = healed.sort_values("healed_epochs").iloc[-1]
    among = ", the best among them" if leading(study)["trial"] in set(healed["trial"]) else ""
    yield Caution(
        f"{len(healed)} of {len(study.trials_full)} trials collapsed for a time and came back{among}",
        f"Trial {worst['trial']} for {worst['healed_epochs']} epochs: {worst['verdict_summary']}. The best epochs, by which "
        "trials are compared, do not show it.",
        "" if pd.isna(worst["advice"]) else sentence(str(worst["advice"])),
    )


def _about_the_search(study: Study) -> Iterator[Caution]:
    if study.spec.kind != "search":
        return
    best = study.best()
    rivals, half = rivals_within_noise(study)
    counts = ""
    positive, negative, unit = _sizes(best)
    if positive is not None:
        counts = f" on {positive} positive and {negative} negative {unit}"
    if rivals:
        yield Caution(
            "Noise is larger than the differences",
            f"{rivals} other trials lie within {half:.3f} of the best one, which is what chance alone explains{counts}: "
            "which of them leads is luck.",
            "Go by the confirmation, not by this order."
            if StudyFiles(StudyFiles(study.path).confirmation).spec.is_file()
            else f"`medtune confirm {quote(study.place)} --top {min(rivals + 1, 5)}` runs them over all folds and several "
            "seeds.",
        )
    scored = int(
        (study.trials_full["objective"].notna() & (study.trials_full["state"] != "failed")).sum()
    )
    optimism = luck(half / 1.96, scored)
    if optimism > 0.01 and scored >= 10:
        yield Caution(
            "The validation fold was used often",
            f"The best of {scored} equal trials would look up to {optimism:.3f} better than it is, because one fold "
            f"chose among all of them; so read {best['objective']:.3f} as an upper bound.",
            "Confirm on other folds, and keep the test split for the very end (`medtune confirm --test`).",
        )
    for name in study.searched:
        yield from _about_an_edge(study, best, name)
    came_to_nothing = study.trials_full["verdict"].isin(COLLAPSES)
    if came_to_nothing.mean() > 0.5:
        yield Caution(
            f"{came_to_nothing.sum()} of {len(study.trials_full)} trials came to nothing",
            ", ".join(
                f"{verdict} {n}"
                for verdict, n in study.trials_full.loc[came_to_nothing, "verdict"]
                .value_counts()
                .items()
            ),
            "Training fails in most of the space: move it, or hold what the diagnoses blame.",
        )


def _about_an_edge(study: Study, best: pd.Series, name: str) -> Iterator[Caution]:
    axis = study.axis(name)
    place = axis.places(best.to_frame().T)[0]
    if axis.kind == "choice" or not axis.ranged or not math.isfinite(place):
        return
    share = axis.share(float(place))
    if EDGE < share < 1 - EDGE:
        return
    top = study.trials_full[study.trials_full["state"] != "failed"].nlargest(5, "objective")
    near = [axis.share(float(other)) for other in axis.places(top)]
    together = sum(other < 0.2 if share <= EDGE else other > 0.8 for other in near)
    ahead = (top["objective"] == best["objective"]).sum() == 1
    if (
        together < 2 and not ahead
    ):  # one of several that are equally good, and the others lie elsewhere
        return
    end = "lower" if share <= EDGE else "upper"
    if _is_natural_bound(name, best[name], end):
        return
    yield Caution(
        f"The best {name} is at the edge of its range",
        f"{format_value(name, best[name])} in {axis.text(axis.low)} to {axis.text(axis.high)}, at the {end} end, as do "
        f"{together} of the 5 best trials: the optimum may lie outside.",
        f"Search again with a wider range of {name}.",
    )


def _is_natural_bound(name: str, value: Any, end: str) -> bool:
    """Whether no configuration may go beyond the value: a wider range of the hyperparameter does not exist."""
    bounds = [
        getattr(rule, kind)
        for rule in FineTuneConfig.model_fields[name].metadata
        for kind in (("ge", "gt") if end == "lower" else ("le", "lt"))
        if hasattr(rule, kind)
    ]
    return any(math.isclose(float(value), float(bound), abs_tol=1e-12) for bound in bounds)


def _about_the_variants(study: Study) -> Iterator[Caution]:
    tables = effects_tables(study)
    if not tables:
        return
    others = pd.concat([table[table["variant"] != table.attrs["baseline"]] for table in tables])
    wanted = others["runs"].max()
    short = others.loc[others["pairs"] < wanted, "variant"].tolist()
    if short and study.spec.kind == "ablation":
        yield Caution(
            "Not every run has a partner",
            f"{_and(short)}: fewer pairs than runs, for runs that failed or have not ended.",
            f"`medtune resume {quote(study.place)}` completes them.",
        )
    if tables[0].attrs["folds"] < 2:
        yield Caution(
            "All runs share one fold",
            "The intervals show how much seeds matter on this fold, and nothing about other subjects.",
            "Run over several folds.",
        )
    unsure = others.loc[
        others["call"].isin(["better", "worse"]) & (others["p_holm"] >= ADJUSTED_LEVEL), "variant"
    ].tolist()
    if unsure:
        yield Caution(
            "Several comparisons, and some were bound to stand out",
            f"{_and(unsure)}: beyond chance when looked at alone, not as one of {len(others)} (Holm).",
            "Treat them as a reason to run more seeds and folds, not as a result.",
        )
    if not others["call"].isin(["better", "worse"]).any():
        yield Caution(
            "The data do not distinguish the variants",
            f"Every interval holds zero, at {others['pairs'].max()} pairs.",
            "More seeds and folds narrow the intervals; a difference that stays within them does not matter here.",
        )


# The document's checklist ----------------------------------------------------------------------------------------------


@once_per_study
def checklist(study: Study) -> list[Check]:
    """Return the document's five success indicators and four warning signs, looked for in the leading trial.

    `among` counts the trials that show it, of those where it can be decided.
    """
    best = leading(study)
    places = study.epochs.groupby("trial", observed=True).indices
    columns = {
        name: study.epochs[name].to_numpy("float64", na_value=math.nan) for name in _CHECKED_COLUMNS
    }
    shown: dict[str, list[bool]] = {text: [] for _, text, _ in _CHECKS}
    evidence: dict[str, tuple[bool | None, str]] = dict.fromkeys(
        shown, (None, "its epochs are missing")
    )
    for trial in study.trials_full.to_dict("records"):
        if trial["trial"] not in places:
            continue
        own = places[trial["trial"]]
        curves = _Curves(trial, {name: values[own] for name, values in columns.items()})
        for _, text, look in _CHECKS:
            present, told = look(curves)
            if present is not None:
                shown[text].append(present)
            if trial["trial"] == best["trial"]:
                evidence[text] = present, told
    return [
        Check(
            kind,
            text,
            *evidence[text],
            f"{sum(shown[text])} of {len(shown[text])} trials" if shown[text] else "no trial",
        )
        for kind, text, _ in _CHECKS
    ]


class _Curves:
    """One trial's columns as arrays over its epochs, and what several checks need of them."""

    def __init__(self, trial: Mapping[Any, Any], columns: Mapping[str, np.ndarray]) -> None:
        self.trial = trial
        self.columns = columns
        self.epoch = columns["epoch"].astype("int64")
        self.loss = columns["train_loss"]
        self.active = columns["drw_active"] == 1
        started = np.flatnonzero(self.active)
        self.drw_epoch = int(self.epoch[started[0]]) if len(started) else None
        self.median = _median3(columns["val_auc"])
        half = 1.96 * standard_error(trial)
        self.slack = half if math.isfinite(half) else 0.05
        self.worst_jump = self._worst_jump()

    def phases(self) -> list[np.ndarray]:
        """Places before and from the start of DRW on: the loss is on another scale in each."""
        return [
            places
            for places in (np.flatnonzero(~self.active), np.flatnonzero(self.active))
            if len(places)
        ]

    def _worst_jump(self) -> tuple[float, int]:
        """The largest loss against the median of up to five epochs before, and its epoch."""
        worst = (0.0, 0)
        for places in self.phases():
            losses = self.loss[places].tolist()
            for i in range(3, len(losses)):
                usual = statistics.median(losses[max(0, i - 5) : i])
                if usual > 0 and losses[i] > worst[0] * usual:
                    worst = (losses[i] / usual, int(self.epoch[places[i]]))
        return worst


def _median3(values: np.ndarray) -> np.ndarray:
    """Medians of three epochs in a row, one for each epoch from the third on."""
    if len(values) < 3:
        return np.full(0, math.nan)
    return np.asarray(np.median(np.stack([values[:-2], values[1:-1], values[2:]]), axis=0))


def _smooth_loss(curves: _Curves) -> tuple[bool | None, str]:
    if len(curves.loss) < 4 or not np.isfinite(curves.loss).all():
        return (
            (None, "fewer than 4 epochs")
            if np.isfinite(curves.loss).all()
            else (False, "the loss is not finite")
        )
    falls, told = True, []
    for places, when in zip(
        curves.phases(), ("before the class weights", "with them"), strict=False
    ):
        if len(places) >= 4:
            loss = curves.loss[places]
            falls &= bool(np.median(loss[-3:]) <= np.median(loss[:3]) * 1.02)
            told.append(
                f"{loss[0]:.3g} to {loss[-1]:.3g} {when if len(curves.phases()) > 1 else 'in all'}"
            )
    jump, epoch = curves.worst_jump
    told.append(f"largest step {jump:.2f} times the epochs before, in epoch {epoch}")
    return falls and jump < 1.5, "loss " + "; ".join(told)


def _auc_rises(curves: _Curves) -> tuple[bool | None, str]:
    median = curves.median[np.isfinite(curves.median)]
    if len(median) < 4:
        return None, "fewer than 6 epochs with an AUC"
    first, best, last = float(median[0]), float(median.max()), float(median[-1])
    told = f"3-epoch median {first:.3f} at first, {best:.3f} at best, {last:.3f} at the end"
    if best - last > curves.slack:
        return False, told
    if last - first > curves.slack:
        return True, told
    return None, f"{told}: {_no_change(curves)}"


def _no_change(curves: _Curves) -> str:
    return f"no change beyond noise (± {curves.slack:.3f})"


def _no_collapse(curves: _Curves) -> tuple[bool | None, str]:
    verdict = curves.trial["verdict"]
    if pd.isna(verdict):
        return None, "not diagnosed"
    healed = curves.trial["healed_epochs"]
    if verdict in COLLAPSES or (not pd.isna(healed) and healed > 0):
        return False, str(curves.trial["verdict_summary"])
    if len(curves.median) < 2:
        return None, "fewer than 4 epochs"
    falls = np.maximum.accumulate(curves.median) - curves.median
    if not np.isfinite(falls).any():
        return None, "no AUC"
    at = int(np.nanargmax(falls))
    return (
        True,
        f"largest fall of the 3-epoch median {falls[at]:.3f}, by epoch {curves.epoch[at + 2]}",
    )


def _rates_differ(curves: _Curves) -> tuple[bool | None, str]:
    backbone, head = curves.columns["lr_backbone"], curves.columns["lr_classifier"]
    both = (backbone > 0) & (head > 0)
    if not both.any():
        return None, "no learning rates recorded"
    holds = bool((backbone[both] < head[both]).all())
    ratio = float(np.median(head[both] / backbone[both]))
    return holds, (
        f"{format_value('backbone_lr', curves.trial['backbone_lr'])} and "
        f"{format_value('classifier_lr', curves.trial['classifier_lr'])} at their peak; ratio {ratio:.3g} over "
        f"all {int(both.sum())} epochs"
    )


def _drw_starts(curves: _Curves) -> tuple[bool | None, str]:
    asked = int(curves.trial["drw_start_epoch"])
    document = documented_after(int(curves.trial["epochs"]))["drw_start_epoch"]
    scaled = f"; the recommended 25 of 60 is {document} here" if document != 25 else ""
    if curves.drw_epoch is None:
        ran = int(curves.epoch[-1])
        if asked > ran:
            return None, f"due in epoch {asked}, the run ended after {ran}{scaled}"
        return False, f"due in epoch {asked}, never active in {ran} epochs{scaled}"
    return (
        curves.drw_epoch == asked,
        f"active from epoch {curves.drw_epoch}, asked for {asked}{scaled}",
    )


def _spikes_or_nan(curves: _Curves) -> tuple[bool | None, str]:
    nans = int((~np.isfinite(curves.loss)).sum())
    skipped = float(np.nansum(curves.columns["skipped_updates"]))
    nonfinite = int(
        (
            np.nan_to_num(
                np.fmax(curves.columns["val_nonfinite_raw"], curves.columns["val_nonfinite_ema"])
            )
            > 0
        ).sum()
    )
    jump, epoch = curves.worst_jump
    told = "losses and scores finite in every epoch"
    if nans or nonfinite:
        told = f"epochs whose loss is not finite: {nans}, whose scores: {nonfinite}"
    told += f"; {skipped:g} updates skipped"
    if jump:
        told += (
            f", largest jump {jump:.2f} times in epoch {epoch} (a spike is {LOSS_SPIKE_FACTOR:g})"
        )
    return nans > 0 or nonfinite > 0 or jump >= LOSS_SPIKE_FACTOR, told


def _falls_after_drw(curves: _Curves) -> tuple[bool | None, str]:
    if curves.drw_epoch is None:
        return None, "no class weights in this run"
    before = (curves.epoch < curves.drw_epoch) & (curves.epoch >= curves.drw_epoch - 3)
    after = (curves.epoch >= curves.drw_epoch + 2) & (curves.epoch < curves.drw_epoch + 10)
    if before.sum() < 2 or after.sum() < 3:
        return None, f"too few epochs around their start in epoch {curves.drw_epoch}"
    told, fell, declined = [], False, False
    for name, words in (("val_auc", "AUC"), ("val_balanced_accuracy_ema", "balanced accuracy")):
        values = curves.columns[name]
        with np.errstate(invalid="ignore"):
            first, then = float(np.median(values[before])), float(np.median(values[after]))
        if math.isfinite(first) and math.isfinite(then):
            fell |= first - then > curves.slack
            declined |= first > then
            told.append(f"{words} {first:.3f} before, {then:.3f} after")
    if not told:
        return None, "no scores around their start"
    if declined and not fell:
        return None, f"{'; '.join(told)}: {_no_change(curves)}"
    return fell, "; ".join(told)


def _stays_low(curves: _Curves) -> tuple[bool | None, str]:
    finite = curves.median[np.isfinite(curves.median)]
    if not len(finite):
        return None, "fewer than 3 epochs with an AUC"
    return bool(finite.max() <= DOCUMENTED_AUC), f"best 3-epoch median {finite.max():.3f}"


def _wide_gap(curves: _Curves) -> tuple[bool | None, str]:
    if pd.isna(curves.trial["best_epoch"]):
        return None, "no best epoch"
    at = curves.epoch == curves.trial["best_epoch"]
    train, validation = (
        float(curves.columns["train_auc"][at][0]),
        float(curves.columns["val_auc_raw"][at][0]),
    )
    if not math.isfinite(train) or not math.isfinite(validation):
        return None, "no training AUC was measured"
    told = f"training {train:.3f}, validation {validation:.3f} (raw weights, epoch {curves.trial['best_epoch']})"
    return train - validation > GAP, told


_CHECKED_COLUMNS = (
    "epoch",
    "train_loss",
    "drw_active",
    "val_auc",
    "lr_backbone",
    "lr_classifier",
    "skipped_updates",
    "val_nonfinite_raw",
    "val_nonfinite_ema",
    "val_balanced_accuracy_ema",
    "val_auc_raw",
    "train_auc",
)

_CHECKS: tuple[tuple[Literal["success", "warning"], str, Any], ...] = (
    ("success", "Loss decreases smoothly (no spikes)", _smooth_loss),
    ("success", "Validation AUC increases steadily", _auc_rises),
    ("success", "No sudden metric collapses", _no_collapse),
    ("success", "Backbone LR < classifier LR", _rates_differ),
    ("success", "DRW activates at its epoch", _drw_starts),
    ("warning", "Loss spikes or NaN values", _spikes_or_nan),
    ("warning", "Validation metrics decreasing after DRW activation", _falls_after_drw),
    ("warning", "AUC not improving beyond 0.70", _stays_low),
    ("warning", "Large gap between train and validation metrics", _wide_gap),
)
"""Kind, the document's words, and how it is looked for."""
