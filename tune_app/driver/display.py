"""The one live table of a running study; a plain line an epoch where the output is no terminal."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

SHOWN_ENDED = 8
"""Ended trials kept in view, the latest ones: the table must not outgrow the terminal."""

log = logging.getLogger("medtune.driver")

STYLES = {"running": "cyan", "completed": "green", "stopped": "yellow", "failed": "red"}


def print_lines(notes: Any, lines: Iterable[str]) -> None:
    """Print each line as it is, broken by a terminal only."""
    for line in lines:
        notes.print(line, soft_wrap=not notes.is_terminal, markup=False)


class Display:
    """Shows trials as they go. Use as a context; every method is one event of the study."""

    def __init__(
        self,
        console: Console,
        *,
        num_trials: int,
        epochs: int,
        on_epoch: Callable[[str, Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.console = console
        self.on_epoch = on_epoch
        self.num_trials = num_trials
        self.epochs = epochs
        self.started = time.monotonic()
        self.trials: dict[str, dict[str, Any]] = {}
        self.live = (
            Live(console=console, refresh_per_second=4, transient=True)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def known(self, record: Mapping[str, Any], epochs_run: int) -> None:
        """A trial of an earlier session."""
        self.trials[record["trial"]] = {**record, "epoch": epochs_run}
        self._refresh()

    def note(self, text: str) -> None:
        """Print a note above the table; a terminal shows whole words, a file whole lines."""
        soft_wrap = not self.console.is_terminal
        self.console.print(f"note: {text}", markup=False, soft_wrap=soft_wrap)

    def began(self, trial: str, variant: str | None) -> None:
        self.trials.setdefault(trial, {"trial": trial, "objective": None})
        self.trials[trial] |= {"state": "running", "variant": variant, "reason": ""}
        text = f"{trial} started" + (f": {variant}" if variant else "")
        log.info("%s", text)
        self._line(text)

    def reported(self, trial: str, row: Mapping[str, Any], objective: float) -> None:
        self.trials[trial] |= {"epoch": row["epoch"], "row": row, "objective": objective}
        self._line(
            f"{trial} epoch {row['epoch']}/{self.epochs}"
            f" val_auc {_score(row['val_auc'])} raw {_score(row['val_auc_raw'])} loss {row['train_loss']:.3f}"
            f"{' DRW' if row['drw_active'] else ''} {row['epoch_s']:.1f} s"
        )
        if self.on_epoch is not None:
            self.on_epoch(trial, row)

    def ended(self, trial: str, state: str, reason: str) -> None:
        shown = self.trials.setdefault(trial, {"trial": trial, "objective": None})
        shown |= {"state": state, "reason": reason}
        shown["order"] = len(self.trials) + time.monotonic()
        text = f"{trial} {state}{': ' + reason if reason else ''}"
        log.info("%s", text)
        self._line(text)

    def _line(self, text: str) -> None:
        if self.live is None:
            self.console.out(text, highlight=False)
        else:
            self._refresh()

    def _refresh(self) -> None:
        if self.live is not None:
            self.live.update(self.render())

    def render(self) -> Group:
        """Return the present content of the terminal."""
        by_state = Counter(trial["state"] for trial in self.trials.values())
        counts = ", ".join(f"{number} {state}" for state, number in sorted(by_state.items()))
        table = Table(box=None, pad_edge=False, header_style="bold", expand=False)
        for name in ("trial", "epoch", "AUC raw", "AUC EMA", "best"):
            table.add_column(name, justify="left" if name == "trial" else "right", no_wrap=True)
        table.add_column("state", no_wrap=True, overflow="ellipsis", ratio=1)
        running = [trial for trial in self.trials.values() if trial["state"] == "running"]
        ended = sorted(
            (t for t in self.trials.values() if t["state"] != "running"),
            key=lambda t: t.get("order", 0.0),
        )
        for trial in [*ended[-SHOWN_ENDED:], *running]:
            row = trial.get("row", {})
            said = trial["state"] + (f": {trial['reason']}" if trial.get("reason") else "")
            table.add_row(
                trial["trial"],
                f"{trial.get('epoch', 0)}/{self.epochs}",
                _score(row.get("val_auc_raw")),
                _score(row.get("val_auc")),
                _score(trial["objective"]),
                Text(said, style=STYLES.get(trial["state"], "")),
            )
        elapsed = time.monotonic() - self.started
        title = f"{len(ended)} of {self.num_trials} trials ended ({counts}) after {elapsed / 60:.1f} min"
        return Group(Text(title), table)


def _score(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"
