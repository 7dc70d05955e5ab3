"""A study's dataframes -> Plotly figures as plain dicts, for the report and any page that has plotly.js.

No trace needs WebGL: it is missing on remote desktops and in many browsers' private modes, and does not print. Whatever a
colour shows, a dash, a marker or a word shows too. Colours are those of PALETTE on white; a page in dark mode replaces
them one by one. Text of a study is escaped, because Plotly reads markup in labels.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from trainables.diagnosis import HEALTHY, NO_FAULT, WITHOUT_FAULT
from trainables.objective import OBJECTIVES
from tune_app.report.findings import documented_settings, leading
from tune_app.results.importance import Axis
from tune_app.results.study import Study
from tune_app.results.text import format_value

Figure = dict[str, Any]
"""{"data": [...], "layout": {...}}, as Plotly.newPlot takes it."""

MOST_CURVES = 150
"""Trials drawn as curves: the best ones, and others evenly; more would only blacken the figure."""

INK, FAINT, GRID, PAPER, VEIL = "#1b2430", "#5b6675", "#dfe3e8", "#ffffff", "rgba(255,255,255,0.93)"

PALETTE = {
    INK: "#e8ecf1",
    FAINT: "#a3adb9",
    GRID: "#343d48",
    PAPER: "#161b22",
    VEIL: "rgba(22,27,34,0.93)",
    "#00609c": "#62b8f0",
    "#2f6f8f": "#8cc7dd",
    "rgba(0,96,156,0.15)": "rgba(98,184,240,0.2)",
    "rgba(199,83,0,0.15)": "rgba(255,161,79,0.2)",
    "#8b939e": "#7b8593",
    "#6f7884": "#97a1ad",
    "#c75300": "#ffa14f",
    "#b0123b": "#ff7f95",
    "#7b0f63": "#ef8fd8",
    "#5a3db4": "#b9a6ff",
    "#303030": "#f2f2f2",
    "#7a5b10": "#dcb85f",
    "#0b7a5e": "#5fd8b2",
    "#947200": "#ecd05a",
    "#536273": "#b3bdc9",
}
"""Colour on white -> colour on the dark page."""


class Group(NamedTuple):
    """Trials that are drawn alike."""

    key: str
    title: str
    colour: str
    dash: str
    symbol: str
    glyph: str
    """The symbol as a character, for legends in text."""
    meaning: str = ""
    """What a verdict's name stands for."""


def _of_verdict(
    verdict: str, colour: str, dash: str, symbol: str, glyph: str, meaning: str
) -> Group:
    """A group has its verdict's own name, as every table and file has."""
    return Group(verdict, verdict, colour, dash, symbol, glyph, meaning)


GROUPS: dict[str, Group] = {
    group.key: group
    for group in (
        _of_verdict(
            "healthy", "#00609c", "solid", "circle", "●", "no fault, completed, AUC above chance"
        ),
        _of_verdict(
            "no_fault",
            "#2f6f8f",
            "solid",
            "circle-dot",
            "◉",
            "no fault, but it runs or failed, or its AUC is not above chance",
        ),
        Group("halved", "stopped at a rung", "#6f7884", "solid", "circle-open", "○"),
        Group("requested", "stopped on request", "#536273", "solid", "square-open", "□"),
        _of_verdict("ema_lag", "#c75300", "dash", "x", "✖", "averaged weights lag"),
        _of_verdict(
            "collapsed_after_drw",
            "#b0123b",
            "dashdot",
            "triangle-down",
            "▼",
            "collapsed after the class weights began",
        ),
        _of_verdict("collapsed", "#7b0f63", "longdash", "diamond", "◆", "collapsed"),
        _of_verdict("saturated", "#5a3db4", "longdashdot", "square", "■", "scores saturated"),
        _of_verdict("non_finite", "#303030", "dot", "cross", "✚", "scores or loss not finite"),
        _of_verdict("never_learned", "#7a5b10", "dot", "hexagon", "⬢", "not above chance"),
        _of_verdict(
            "train_validation_gap",
            "#0b7a5e",
            "dash",
            "star",
            "★",
            "training AUC far above validation AUC",
        ),
        _of_verdict("loss_spike", "#947200", "dashdot", "triangle-up", "▲", "training loss jumped"),
        _of_verdict("too_noisy", "#536273", "dot", "pentagon", "⬟", "too noisy to judge"),
        Group("failed", "failed", "#303030", "solid", "x-open", "✕"),
    )
}
"""How trials are drawn: by verdict, and those without one by how they ended."""


_GROUPED_BY = ("state", "verdict", "stopped_by")


def group_of(trial: Mapping[Any, Any]) -> str:
    """Return the key of the trial's group."""
    if trial["state"] == "failed":
        return "failed"
    verdict = trial["verdict"]
    if not pd.isna(verdict) and verdict not in WITHOUT_FAULT and verdict in GROUPS:
        return str(verdict)
    if trial["state"] != "stopped" or trial["stopped_by"] == "diagnosis":
        return HEALTHY if not pd.isna(verdict) and verdict == HEALTHY else NO_FAULT.verdict
    return "requested" if trial["stopped_by"] == "requested" else "halved"


def groups_of(study: Study) -> dict[str, int]:
    """Return the groups of the study's trials with their numbers, in the order of GROUPS."""
    found = [group_of(trial) for trial in study.trials_full[list(_GROUPED_BY)].to_dict("records")]
    return {key: found.count(key) for key in GROUPS if key in found}


# Curves ----------------------------------------------------------------------------------------------------------------


def curves(study: Study, metric: str) -> Figure:
    """Return `metric` by epoch, a line a trial, one trace a group; the best trial on top, rungs, DRW starts, stops.

    Traces carry `meta.group`, and points their trial's id as customdata, so that a page can pick out either.
    """
    drawn, best = _drawn_trials(study)
    rows = study.epochs[study.epochs["trial"].isin(drawn["trial"])]
    lines = {
        trial: (own["epoch"].tolist(), _rounded(own[metric]))
        for trial, own in rows.groupby("trial", observed=True)
    }
    starts = drw_starts(rows)
    by_group = dict(_by_group(drawn[drawn["trial"].isin(list(lines))]))
    data: list[dict[str, Any]] = []
    marks: list[dict[str, Any]] = []
    for key in (*(key for key in GROUPS if key not in WITHOUT_FAULT), *WITHOUT_FAULT):
        if key in by_group:
            group, trials = GROUPS[key], by_group[key]
            data.append(_many_lines(group, [(trial, *lines[trial]) for trial in trials["trial"]]))
            marks += _marks_on_lines(group, trials, lines, starts)
    shapes = [_vertical(rung, GRID, "dot") for rung in study.rungs]
    notes = [
        _note(rung, f"rung {rung}" if i == 0 else str(rung)) for i, rung in enumerate(study.rungs)
    ]
    shapes.append(_horizontal(0.5))
    if best is not None and best in lines:
        line = {"color": INK, "width": 3}
        data.append(_line_of(best, f"best: {best}", *lines[best], line) | {"meta": {"best": True}})
        if best in starts:
            shapes.append(_vertical(starts[best], INK, "dash"))
            notes.append(_note(starts[best], "DRW begins (best)", low=True))
    data += [*(mark for mark in marks if mark["x"]), _picked_line(width=4)]
    low = min(
        (value for _, values in lines.values() for value in values if value is not None),
        default=0.45,
    )
    axis = _whole_numbers(max((epochs[-1] for epochs, _ in lines.values()), default=0))
    reach = {"range": [max(0.0, min(0.45, low) - 0.03), 1.02]}
    layout = _layout(360, "epoch", "validation AUC", xaxis=axis, yaxis=reach)
    return {"data": data, "layout": layout | {"shapes": shapes, "annotations": notes}}


def drw_starts(rows: pd.DataFrame) -> dict[str, int]:
    """Return the first epoch with class weights of each trial of `rows` that has reached it."""
    active = rows[rows["drw_active"].fillna(False).astype(bool)]
    return {
        str(trial): int(epoch)
        for trial, epoch in active.groupby("trial", observed=True)["epoch"].min().items()
    }


def _drawn_trials(study: Study) -> tuple[pd.DataFrame, str | None]:
    trials = study.trials_full
    best = None
    if study.scored:
        best = str(leading(study)["trial"])
    if len(trials) <= MOST_CURVES:
        return trials, best
    ranked = trials.sort_values("objective", ascending=False, na_position="last")
    half = MOST_CURVES // 2
    rest = ranked.iloc[half:]
    evenly = rest.iloc[np.linspace(0, len(rest) - 1, MOST_CURVES - half).astype(int)]
    return pd.concat([ranked.iloc[:half], evenly]), best


def _many_lines(
    group: Group, lines: Sequence[tuple[str, list[int], list[float | None]]]
) -> dict[str, Any]:
    style = {
        "color": group.colour,
        "width": 1.3 if group.key not in WITHOUT_FAULT else 1.6,
        "dash": group.dash,
    }
    few = 0.9 if len(lines) < 15 else 0.55
    return _line(group.title, *_gapped(lines), style) | {
        "meta": {"group": group.key},
        "opacity": few,
    }


def _gapped(
    lines: Iterable[tuple[str, Sequence[Any], Sequence[Any]]],
) -> tuple[list[str | None], list[Any], list[Any]]:
    """Ids, x and y of the lines of all trials with gaps between them: a trace a trial would take seconds to draw."""
    ids: list[str | None] = []
    x: list[Any] = []
    y: list[Any] = []
    for trial, across, up in lines:
        ids += [*([trial] * len(across)), None]
        x += [*across, None]
        y += [*up, None]
    return ids, x, y


def _line_of(
    trial: str, name: str, x: Sequence[Any], y: Sequence[Any], style: dict[str, Any]
) -> dict[str, Any]:
    return _line(name, [trial] * len(x), x, y, style)


def _picked_line(width: int) -> dict[str, Any]:
    """An empty line, for the trial that a viewer picks."""
    return _line("picked", [], [], [], {"color": "#c75300", "width": width}) | {
        "meta": {"picked": True}
    }


def _line(
    name: str, ids: Sequence[Any], x: Sequence[Any], y: Sequence[Any], style: dict[str, Any]
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": escape(name),
        "x": list(x),
        "y": list(y),
        "customdata": list(ids),
        "line": style,
        "connectgaps": False,
        "hovertemplate": "%{customdata}, epoch %{x}: %{y:.3f}<extra>" + escape(name) + "</extra>",
    }


def _marks_on_lines(
    group: Group,
    trials: pd.DataFrame,
    lines: Mapping[Any, tuple[list[int], list[float | None]]],
    starts: Mapping[str, int],
) -> list[dict[str, Any]]:
    """Where lines of a group end early, and where class weights begin on them."""
    early = trials.loc[trials["state"].isin(["stopped", "failed"]), "trial"]
    ends = [(trial, lines[trial][0][-1]) for trial in early]
    begun = [(trial, starts[trial]) for trial in trials["trial"] if trial in starts]
    traces = []
    for what, symbol, size, meta, points in (
        ("ended", group.symbol, 9, {}, ends),
        ("DRW begins", "triangle-right-open", 7, {"drw": True}, begun),
    ):
        traces.append(
            _marks(
                f"{group.title}: {what}",
                [epoch for _, epoch in points],
                [lines[trial][1][lines[trial][0].index(epoch)] for trial, epoch in points],
                symbol,
                group.colour,
                size=size,
                customdata=[trial for trial, _ in points],
                meta={"group": group.key, **meta},
                hovertemplate=f"%{{customdata}} {what}, epoch %{{x}}: %{{y:.3f}}<extra></extra>",
            )
        )
    return traces


def _marks(
    name: str,
    x: Sequence[Any],
    y: Sequence[Any],
    symbol: str,
    colour: str,
    *,
    size: int = 8,
    width: float = 1.5,
    **more: Any,
) -> dict[str, Any]:
    outline = {"width": width, "color": colour}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": x,
        "y": y,
        "marker": {"symbol": symbol, "color": colour, "size": size, "line": outline},
        **more,
    }


def _marks_of(
    group: Group, trials: pd.DataFrame, x: Sequence[Any], hover: str = "", **more: Any
) -> dict[str, Any]:
    """The objectives of a group's trials over `x`; `hover` is shown between a trial's id and its objective."""
    return _marks(
        group.title,
        x,
        _rounded(trials["objective"]),
        group.symbol,
        group.colour,
        customdata=trials["trial"].tolist(),
        meta={"group": group.key},
        hovertemplate=f"%{{customdata}}: {hover}%{{y:.3f}}<extra>{group.title}</extra>",
        **more,
    )


# The search ------------------------------------------------------------------------------------------------------------


def progress(study: Study) -> Figure:
    """Return objectives in the order trials began, and the best so far."""
    trials = _scored_trials(study)
    data = [
        _marks_of(GROUPS[key], rows, rows["number"].tolist()) for key, rows in _by_group(trials)
    ]
    best = _rounded(trials["objective"].cummax())
    line = {"color": INK, "width": 2, "shape": "hv"}
    data.append(
        _line("best so far", trials["trial"].tolist(), trials["number"].tolist(), best, line)
    )
    last = int(trials["number"].max())
    axis = _whole_numbers(last) | {"range": [-0.5, max(last, 1) + 0.5]}
    worth = _of_scores(trials["objective"])
    title = "trial, in the order they began"
    return {"data": data, "layout": _layout(280, title, "objective", xaxis=axis, yaxis=worth)}


def stopped(table: pd.DataFrame) -> Figure:
    """Return epochs run and spared by reason, from `findings.stops`."""
    titles = [_title_of(str(reason)) for reason in table["reason"]]
    bars = [
        ("epochs run", "epochs_run", "#00609c", "", PAPER),
        ("epochs spared", "epochs_spared", "#8b939e", "/", INK),
    ]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": titles,
            "x": table[column].tolist(),
            "text": [f"{value} {name.split()[1]}" for value in table[column]],
            "textposition": "inside",
            "textangle": 0,
            "insidetextanchor": "middle",
            "constraintext": "inside",
            "insidetextfont": {"color": ink},
            "marker": {
                "color": colour,
                "pattern": {"shape": shape, "fillmode": "overlay", "fgcolor": PAPER, "size": 7},
            },
            "hovertemplate": "%{y}: %{x} " + name + "<extra></extra>",
        }
        for name, column, colour, shape, ink in bars
    ]
    layout = _layout(90 + 42 * len(table), "epochs", None, barmode="stack", bargap=0.35)
    layout |= {"uniformtext": {"mode": "hide", "minsize": 10}}
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    return {"data": data, "layout": layout}


def _title_of(reason: str) -> str:
    if reason == "halving":
        return "halving"
    return GROUPS[reason].title if reason in GROUPS else escape(reason)


def parallel(study: Study) -> Figure:
    """Return parallel coordinates: a line a trial over all searched hyperparameters to the objective.

    One trace for each of three tiers of the objective (best tenth, upper half, the rest), with gaps between trials.
    Axis i is drawn at x = i, scaled to 0..1; `layout.meta.axes` names them.
    """
    trials = _scored_trials(study).sort_values("objective", ascending=False).head(400)
    axes = [study.axis(name) for name in study.searched]
    low, high = float(trials["objective"].min()), float(trials["objective"].max())
    worth = Axis("objective", "even", low, high)
    columns = [[_clip(axis.share(float(place))) for place in axis.places(trials)] for axis in axes]
    columns.append([_clip(worth.share(float(value))) for value in trials["objective"]])
    ids, axes_at = trials["trial"].tolist(), range(len(columns))
    tenth, half = max(1, math.ceil(len(ids) / 10)), math.ceil(len(ids) / 2)
    tiers = (
        (
            "rest",
            "lower half",
            range(half, len(ids)),
            {"color": "#8b939e", "width": 1, "dash": "dot"},
            0.6,
        ),
        (
            "upper",
            "upper half",
            range(tenth, half),
            {"color": "#00609c", "width": 1.3, "dash": "solid"},
            0.7,
        ),
        ("top", "best tenth", range(tenth), {"color": INK, "width": 2.6, "dash": "solid"}, 1.0),
    )
    data = []
    for key, title, places, style, opacity in tiers:
        lines = [(ids[rank], axes_at, [column[rank] for column in columns]) for rank in places]
        data.append(
            _line(title, *_gapped(lines), style)
            | {
                "meta": {"tier": key},
                "opacity": opacity,
                "mode": "lines+markers",
                "marker": {"size": 4, "color": style["color"]},
                "hovertemplate": "%{customdata}<extra></extra>",
            }
        )
    data.append(_picked_line(width=3))
    notes = []
    for i, axis in enumerate([*axes, worth]):
        for place, text in axis.ticks():
            if -0.01 <= axis.share(place) <= 1.01:
                notes.append(_text(i, axis.share(place), text, xshift=5, xanchor="left", size=10))
        head = _text(i, 1.1, _pieces(axis.name), xanchor="center", size=11, bold=True)
        notes.append(head | {"name": f"head-{i}"})
    layout = _layout(380, None, None, margin={"l": 24, "r": 44, "t": 8, "b": 16})
    layout["xaxis"] |= {"visible": False, "range": [-0.3, len(axes) + 0.5]}
    layout["yaxis"] |= {"visible": False, "range": [-0.05, 1.22]}
    uprights = [_vertical(i, FAINT, "solid") | {"yref": "y"} for i in range(len(axes) + 1)]
    layout |= {
        "shapes": uprights,
        "annotations": notes,
        "meta": {"axes": [*study.searched, "objective"]},
    }
    return {"data": data, "layout": layout}


def _clip(share: float) -> float | None:
    return round(min(max(share, -0.04), 1.04), 4) if math.isfinite(share) else None


def _pieces(name: str) -> list[str]:
    """A hyperparameter's name in lines of about ten characters, broken after underscores."""
    lines = [""]
    for part in name.replace("_", "_ ").split():
        if lines[-1] and len(lines[-1]) + len(part) > 10:
            lines.append("")
        lines[-1] += part
    return lines


def importance(table: pd.DataFrame) -> Figure:
    """Return bars with extremes, from `Study.importance`."""
    rows = table.iloc[::-1]
    shares = rows["importance"].to_numpy()
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "y": rows["parameter"].tolist(),
            "x": np.round(shares, 4).tolist(),
            "marker": {"color": "#00609c"},
            "error_x": _interval(rows, shares, color=INK, thickness=1.2),
            "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
        }
    ]
    layout = _layout(90 + 28 * len(rows), "share of the variation", None)
    layout["yaxis"] |= {"showgrid": False}
    layout["xaxis"] |= {"rangemode": "tozero"}
    return {"data": data, "layout": layout}


def slice_of(study: Study, name: str) -> Figure:
    """Return the objective over one hyperparameter, with the document's values before (dashed) and after (solid)."""
    axis = study.axis(name)
    trials = _scored_trials(study)
    trials = trials.assign(place=axis.places(trials))
    trials = trials[trials["place"].notna()]
    if axis.kind == "choice":  # side by side, or trials of one choice hide each other
        trials = trials.assign(
            place=trials["place"] + 0.36 * (np.arange(len(trials)) * 0.618034 % 1 - 0.5)
        )
    shapes, notes, places = _document_marks(axis, documented_settings(study))
    margin = 0.06 * (max(places) - min(places) or 1.0) + (0.25 if axis.kind == "choice" else 0)
    ticks = [
        (place, text)
        for place, text in axis.ticks()
        if min(places) - margin <= place <= max(places) + margin
    ]
    layout = _layout(230, name, None, margin={"l": 44, "r": 38, "t": 18, "b": 40})
    layout["xaxis"] |= {
        "tickvals": [place for place, _ in ticks],
        "ticktext": [escape(text) for _, text in ticks],
        "range": [min(places) - margin, max(places) + margin],
    }
    layout["yaxis"] |= _of_scores(trials["objective"])
    layout |= {"shapes": shapes, "annotations": notes}
    return {"data": _slice_points(trials, name), "layout": layout}


def _slice_points(trials: pd.DataFrame, name: str) -> list[dict[str, Any]]:
    """One trace per group of trials, and one for the trials that a viewer picks."""
    data = []
    for key, rows in _by_group(trials):
        texts = [escape(format_value(name, value)) for value in rows[name]]
        x = _rounded(rows["place"])
        data.append(_marks_of(GROUPS[key], rows, x, f"{name} %{{text}}, ", text=texts))
    ring = _marks("picked", [], [], "circle-open", "#c75300", size=16, width=3)
    data.append(ring | {"meta": {"picked": True}, "hoverinfo": "skip"})
    return data


def _document_marks(
    axis: Axis, documented: Mapping[str, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[float]]:
    """Lines at the document's values before and after, their labels, and all places that an axis has to show."""
    marks = [
        (words, place)
        for words, settings in documented.items()
        if axis.name in settings and math.isfinite(place := axis.place(settings[axis.name]))
    ]
    places = [axis.low, axis.high, *(place for _, place in marks)]
    if len(marks) == 2 and marks[0][1] == marks[1][1]:
        place = marks[1][1]
        return [_vertical(place, INK, "solid")], [_note(place, "before, after")], places
    shapes, notes = [], []
    for words, place in marks:
        after = words == "recommended"
        leftmost = place == min(other for _, other in marks)
        shapes.append(_vertical(place, INK, "solid" if after else "dash"))
        side = {"xanchor": "right", "xshift": -2} if leftmost else {"xanchor": "left", "xshift": 2}
        notes.append(_note(place, "after" if after else "before") | side)
    return shapes, notes, places


def effects(table: pd.DataFrame) -> Figure:
    """Return the forest plot of `Study.effects`: filled where the data decide, hollow where they do not."""
    rows = table[table["variant"] != table.attrs["baseline"]]
    rows = rows[rows["mean"].notna()].iloc[::-1]
    marks = {
        "better": ("circle", "#00609c"),
        "worse": ("diamond", "#b0123b"),
        "cannot tell": ("circle-open", "#536273"),
    }
    data = []
    for call, (symbol, colour) in marks.items():
        own = rows[rows["call"] == call]
        if own.empty:
            continue
        mean = own["mean"].to_numpy()
        data.append(
            _marks(
                call,
                np.round(mean, 5).tolist(),
                [escape(name) for name in own["variant"]],
                symbol,
                colour,
                size=11,
                width=2,
                error_x=_interval(own, mean, color=colour, thickness=2, width=6),
                hovertemplate=f"%{{y}}: %{{x:+.3f}}<extra>{call}</extra>",
            )
        )
    layout = _layout(
        110 + 38 * len(rows),
        f"difference from {escape(table.attrs['baseline'])}",
        None,
        showlegend=True,
    )
    layout["yaxis"] |= {
        "categoryorder": "array",
        "categoryarray": [escape(name) for name in rows["variant"]],
    }
    layout["xaxis"] |= {"zeroline": True, "zerolinecolor": INK, "zerolinewidth": 1.5}
    return {"data": data, "layout": layout}


def runs_by_variant(study: Study) -> Figure:
    """Return every run of each variant as a mark (one symbol a fold), and the variant's mean as a line."""
    trials = study.trials_full[
        study.trials_full["variant"].notna() & study.trials_full["objective"].notna()
    ]
    variants = list(dict.fromkeys(trials["variant"]))[::-1]
    symbols = (
        "circle",
        "square",
        "diamond",
        "triangle-up",
        "x",
        "star",
        "cross",
        "pentagon",
        "hexagon",
        "triangle-down",
    )
    folds = sorted(trials["fold"].dropna().unique())
    data: list[dict[str, Any]] = []
    for i, fold in enumerate(folds):
        rows = trials[trials["fold"] == fold]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"fold {fold}",
                "x": _rounded(rows["objective"]),
                "y": [
                    variants.index(name) + 0.12 * (i - (len(folds) - 1) / 2)
                    for name in rows["variant"]
                ],
                "customdata": [
                    f"{trial}, seed {seed}"
                    for trial, seed in zip(rows["trial"], rows["seed"], strict=True)
                ],
                "marker": {
                    "symbol": symbols[i % len(symbols)],
                    "size": 8,
                    "color": "#00609c",
                    "opacity": 0.7,
                },
                "hovertemplate": f"%{{customdata}}, fold {fold}: %{{x:.3f}}<extra></extra>",
            }
        )
    means = trials.groupby("variant")["objective"].mean()
    for row, name in enumerate(variants):
        ends = [row - 0.32, row + 0.32]
        data.append(
            _line(
                "mean",
                ["mean"] * 2,
                [round(float(means[name]), 4)] * 2,
                ends,
                {"color": INK, "width": 3},
            )
            | {
                "showlegend": False,
                "hovertemplate": "mean %{x:.3f}<extra>" + escape(name) + "</extra>",
            }
        )
    title = "<br>".join(wrap(OBJECTIVES[study.spec.objective].title, 24))
    layout = _layout(120 + 44 * len(variants), title, None, showlegend=True)
    layout["xaxis"] |= _of_scores(trials["objective"])
    layout["yaxis"] |= {
        "tickvals": list(range(len(variants))),
        "ticktext": [escape(name) for name in variants],
        "showgrid": False,
    }
    return {"data": data, "layout": layout}


# Two studies -----------------------------------------------------------------------------------------------------------


def progress_of_two(studies: Sequence[tuple[str, Study]]) -> Figure:
    """Return the best objective so far over the epochs spent, one line per study: the result of the same budget."""
    data = []
    for (name, study), (colour, dash, _) in zip(studies, _OF_TWO, strict=True):
        spent, best = budget_curve(study)
        line = {"color": colour, "width": 2.5, "dash": dash, "shape": "hv"}
        data.append(
            _line(name, [escape(name)] * len(spent), spent, best, line)
            | {"hovertemplate": "%{x} epochs: %{y:.3f}<extra>" + escape(name) + "</extra>"}
        )
    axis = {"rangemode": "tozero"}
    layout = _layout(320, "epochs spent by all trials", "best so far", showlegend=True, xaxis=axis)
    return {"data": data, "layout": layout}


def budget_curve(study: Study) -> tuple[list[int], list[float | None]]:
    """Return epochs spent by all trials, and the best objective reached by then, as the rows arrived."""
    from trainables.objective import RunningValue

    objective = OBJECTIVES[study.spec.objective]
    rows = study.epochs.sort_values("arrival")
    running: dict[str, RunningValue] = {}
    best = -math.inf
    spent: list[int] = []
    reached: list[float | None] = []
    for number, (trial, value) in enumerate(
        zip(rows["trial"], rows[objective.column], strict=True), start=1
    ):
        worth = running.setdefault(trial, RunningValue(objective.reduction)).update(value)
        if worth > best:
            best = worth
            spent.append(number)
            reached.append(round(best, 4))
    if spent and spent[-1] < len(rows):
        spent.append(len(rows))
        reached.append(reached[-1])
    return spent, reached


def best_of_two(studies: Sequence[tuple[str, Study]]) -> Figure:
    """Return the validation AUC of each study's best trial with its interval as a band, by epoch."""
    data = []
    for (name, study), (colour, dash, veil) in zip(studies, _OF_TWO, strict=True):
        best = str(study.best()["trial"])
        rows = study.epochs[study.epochs["trial"] == best]
        x = rows["epoch"].tolist()
        band = {"line": {"width": 0, "color": colour}, "hoverinfo": "skip", "showlegend": False}
        data.append(_line_of(best, "high", x, _rounded(rows["val_auc_high"]), {}) | band)
        low = _line_of(best, "low", x, _rounded(rows["val_auc_low"]), {})
        data.append(low | band | {"fill": "tonexty", "fillcolor": veil})
        line = {"color": colour, "width": 2.5, "dash": dash}
        data.append(_line_of(best, f"{name}: {best}", x, _rounded(rows["val_auc"]), line))
    longest = max((trace["x"][-1] for trace in data if trace["x"]), default=0)
    layout = _layout(320, "epoch", "validation AUC", xaxis=_whole_numbers(longest), showlegend=True)
    return {"data": data, "layout": layout}


_OF_TWO = (("#00609c", "solid", "rgba(0,96,156,0.15)"), ("#c75300", "dash", "rgba(199,83,0,0.15)"))
"""Colour, dash, and colour of the interval of the first and the second study."""


# Parts -----------------------------------------------------------------------------------------------------------------


def _scored_trials(study: Study) -> pd.DataFrame:
    trials = study.trials_full
    return trials[trials["objective"].notna() & (trials["state"] != "failed")]


def _interval(rows: pd.DataFrame, centre: "np.ndarray", **style: Any) -> dict[str, Any]:
    """Bars from `low` to `high` of the rows around `centre`."""
    return {
        "type": "data",
        "symmetric": False,
        "array": _rounded(rows["high"] - centre),
        "arrayminus": _rounded(centre - rows["low"]),
        **style,
    }


def _by_group(trials: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame]]:
    found = [group_of(trial) for trial in trials[list(_GROUPED_BY)].to_dict("records")]
    keys = pd.Series(found, index=trials.index, dtype="object")
    for key in GROUPS:
        if (keys == key).any():
            yield key, trials[keys == key]


def _rounded(values: "pd.Series | np.ndarray") -> list[float | None]:
    """Four decimals, and null where the value is no number: JSON has no NaN, and a page need not weigh more than it shows."""
    return [
        round(float(value), 4) if math.isfinite(value) else None
        for value in np.asarray(values, dtype="float64")
    ]


def _layout(height: int, x: str | None, y: str | None, **more: Any) -> dict[str, Any]:
    axis = {
        "gridcolor": GRID,
        "linecolor": FAINT,
        "zeroline": False,
        "automargin": True,
        "fixedrange": False,
    }
    layout: dict[str, Any] = {
        "height": height,
        "margin": {"l": 52, "r": 14, "t": 22, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {
            "family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
            "size": 12,
            "color": INK,
        },
        "hoverlabel": {"bgcolor": PAPER, "bordercolor": FAINT, "font": {"color": INK}},
        "hovermode": "closest",
        "showlegend": False,
        "uirevision": "keep",
        "xaxis": {**axis, **({"title": {"text": x}} if x else {})},
        "yaxis": {**axis, **({"title": {"text": y}} if y else {})},
    }
    for key in ("xaxis", "yaxis"):
        layout[key] |= more.pop(key, {})
    if more.get("showlegend"):
        layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    return layout | more


def _of_scores(values: pd.Series) -> dict[str, Any]:
    """An axis of scores from 0 to 1, with some room, that begins and ends where scores can be."""
    finite = values.to_numpy("float64", na_value=math.nan)
    finite = finite[np.isfinite(finite)]
    if not len(finite) or finite.min() < 0 or finite.max() > 1:
        return {}
    low, high = float(finite.min()), float(finite.max())
    room = 0.08 * (high - low) or 0.02
    return {"range": [round(max(0.0, low - room), 4), round(min(1.0 + room / 4, high + room), 4)]}


def _whole_numbers(largest: float) -> dict[str, Any]:
    """An axis of epochs or trials without ticks between them; Plotly sets none there on longer ones."""
    return {"dtick": 1} if largest <= 10 else {}


def _vertical(x: float, colour: str, dash: str) -> dict[str, Any]:
    line = {"color": colour, "width": 1.5, "dash": dash}
    return {
        "type": "line",
        "xref": "x",
        "yref": "paper",
        "x0": x,
        "x1": x,
        "y0": 0,
        "y1": 1,
        "line": line,
        "layer": "below",
    }


def _horizontal(y: float) -> dict[str, Any]:
    line = {"color": FAINT, "width": 1, "dash": "dash"}
    return {
        "type": "line",
        "xref": "paper",
        "yref": "y",
        "x0": 0,
        "x1": 1,
        "y0": y,
        "y1": y,
        "line": line,
        "layer": "below",
    }


def _note(x: float, text: str, *, low: bool = False) -> dict[str, Any]:
    place = {"y": 0.01, "yanchor": "bottom"} if low else {"y": 1.0, "yanchor": "bottom"}
    side = {"xanchor": "left", "xshift": 4} if low else {"xanchor": "center"}
    font = {"size": 10, "color": FAINT}
    return {
        "x": x,
        "xref": "x",
        "yref": "paper",
        "text": text,
        "showarrow": False,
        "font": font,
        **place,
        **side,
    }


def _text(
    x: float,
    y: float,
    text: str | list[str],
    *,
    xanchor: str,
    size: int,
    xshift: int = 0,
    bold: bool = False,
) -> dict[str, Any]:
    shown = "<br>".join(escape(line) for line in ([text] if isinstance(text, str) else text))
    return {
        "x": x,
        "y": y,
        "xref": "x",
        "yref": "y",
        "text": f"<b>{shown}</b>" if bold else shown,
        "showarrow": False,
        "xanchor": xanchor,
        "xshift": xshift,
        "yanchor": "middle",
        "font": {"size": size, "color": INK if bold else FAINT},
        "bgcolor": VEIL,
        "borderpad": 0,
    }
