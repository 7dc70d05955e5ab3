"""The study directory as its driver writes it; `results` reads it."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from trainables.checkpoints import replacing, when_there_is_room, write_json
from trainables.diagnosis import auc_low, diagnose, trial_verdict
from trainables.objective import OBJECTIVES, BestEpoch, objective_value
from tune_app.study.files import STUDY_FORMAT, KeptBy, StudyFiles, append_line, kept_by
from tune_app.study.policy import Decision
from tune_app.study.rows import StudyDamageError, read_record, read_rows
from tune_app.study.spec import StudySpec

RECORDED = {"trial", "overrides", "failures", "objective", "reason"}
DECIDED = {"trial", "epoch", "action", "reason", "summary"}
"""Keys that a trial's record and a decision must have for a study to resume."""
DIAGNOSED = ("verdict", "verdict_epoch", "verdict_summary", "advice", "healed_epochs")
"""In the record of a trial that has ended; None for one without rows."""
NOT_ENDED = {"state": "running", "ended": None, "reason": None, "error": None}
"""In the record of a trial that runs, or is to resume."""


class Recorder:
    """The study directory as the driver writes it: rows, decisions, and one record a trial.

    `clock` gives the times at which trials start and end, in seconds since 1970. Raises StudyDamageError when files of
    earlier drivers have been damaged.
    """

    def __init__(
        self, spec: StudySpec, files: StudyFiles, clock: Callable[[], float] = time.time
    ) -> None:
        self.spec, self.files, self._clock = spec, files, clock
        self.kept: KeptBy = kept_by(spec.objective, STUDY_FORMAT)
        self.rows: dict[str, list[dict[str, Any]]] = {}
        """Of trials that have not ended: a row takes some 6 kB, and a long study has many."""
        for row in read_rows(files.epochs):
            self.rows.setdefault(row["trial"], []).append(row)
        self.records = {
            path.parent.name: read_record(path)
            for path in sorted(files.trials.glob("*/trial.json"))
        }
        decisions = read_rows(files.decisions)
        if problems := [*self._damage(decisions)]:
            raise StudyDamageError(problems)
        self.logged = {(row["trial"], row["epoch"]) for row in decisions}
        self._writer = ThreadPoolExecutor(1, "records")
        self._writing: dict[str, Future[None]] = {}

    def _damage(self, decisions: list[dict[str, Any]]) -> Iterator[str]:
        """Problems of files that no driver has written so and none can resume from, though they may be read."""
        for trial, record in self.records.items():
            path = self.files.trial(trial).record
            if missing := sorted(RECORDED - record.keys()):
                yield f"{path}: has no {', '.join(missing)}"
            if not trial.isdecimal():
                yield f"{path}: trial {trial!r} has no number for a name"
        for trial in self.rows.keys() - self.records.keys():
            yield f"{self.files.epochs}: has rows of trial {trial}, but {self.files.trial(trial).record} is not there: put it back"
        for line, row in enumerate(decisions, start=1):
            if missing := sorted(DECIDED - row.keys()):
                yield f"{self.files.decisions}:{line}: has no {', '.join(missing)}"

    def row(self, row: Mapping[str, Any]) -> None:
        """Keep a new row of a trial; called before anything is decided on it."""
        self.written(row["trial"])  # rows of a trial without a record could not be read
        self.rows.setdefault(row["trial"], []).append(dict(row))
        when_there_is_room(lambda: append_line(self.files.epochs, row), self.files.epochs)

    def decision(self, decision: Decision) -> None:
        row = decision.as_row()
        if (row["trial"], row["epoch"]) not in self.logged:
            self.logged.add((row["trial"], row["epoch"]))
            when_there_is_room(lambda: append_line(self.files.decisions, row), self.files.decisions)

    def drop_decisions_ahead(self) -> None:
        """Remove decisions on epochs that have no row: they are taken again. Before any trial's rows are let go."""
        there = {(trial, row["epoch"]) for trial, rows in self.rows.items() for row in rows}
        if self.logged <= there:
            return
        kept = [
            row for row in read_rows(self.files.decisions) if (row["trial"], row["epoch"]) in there
        ]
        with replacing(self.files.decisions, self.files.root) as temporary:
            temporary.write_bytes(b"")
            for row in kept:
                append_line(temporary, row)
        self.logged &= there

    def began(
        self, trial: str, overrides: Mapping[str, Any], variant: str | None, **where: Any
    ) -> None:
        record = self.records.get(trial) or {
            "trial": trial,
            "number": int(trial),
            "variant": variant,
            "overrides": dict(overrides),
            "started": self._clock(),
            "failures": 0,
            "objective": None,
        }
        self._write(record | where | NOT_ENDED)

    def failed(self) -> list[str]:
        """Trials that have failed for good."""
        return [trial for trial, record in self.records.items() if record["state"] == "failed"]

    def reopened(self, trial: str) -> None:
        """A trial that has failed is to resume: its record is that of one left by a killed driver."""
        self._write(self.records[trial] | NOT_ENDED | {"objective": None})
        self.written(trial)

    def failed_once(self, trial: str) -> None:
        self._write(self.records[trial] | {"failures": self.records[trial]["failures"] + 1})
        self.written(trial)

    def ended(
        self, trial: str, state: str, reason: str, *, error: str | None = None
    ) -> dict[str, Any]:
        rows = self.rows.get(trial, [])
        end = {
            "state": state,
            "reason": reason or None,
            "error": error,
            "ended": self._clock(),
            "objective": objective_value(rows, self.spec.objective),
        }
        self._write(self.records[trial] | end | self._diagnosis(trial, state, rows))
        if state == "failed":
            self.written(trial)  # its reason is nowhere else; other ends follow from rows
        self.rows.pop(trial, None)
        return self.records[trial]

    def _diagnosis(
        self, trial: str, state: str, rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        if not rows:
            return dict.fromkeys(DIAGNOSED)
        found = diagnose(rows, self.spec.config_of(self.records[trial]["overrides"]))
        best = BestEpoch(self.kept.objective, window_end=self.kept.window_end)
        for row in rows:
            best.update(row)
        kept = next((row for row in rows if row["epoch"] == best.epoch), {})
        low = auc_low(kept, OBJECTIVES[self.kept.objective].weights)
        verdict = trial_verdict(found.verdict, state, low)
        values = (verdict, found.epoch, found.summary, found.advice, found.healed_epochs)
        return dict(zip(DIAGNOSED, values, strict=True))

    def written(self, trial: str) -> None:
        """Wait until the record of the trial is on disk."""
        if (writing := self._writing.pop(trial, None)) is not None:
            writing.result()

    def flush(self) -> None:
        """Wait until all records are on disk."""
        for trial in list(self._writing):
            self.written(trial)

    def close(self) -> None:
        """Wait until all records are on disk, and end the thread that writes them."""
        self.flush()
        self._writer.shutdown()

    def states(self) -> dict[str, int]:
        return dict(Counter(record["state"] for record in self.records.values()))

    def _write(self, record: dict[str, Any]) -> None:
        """Have the record written. In a thread: waiting for the disk would hold up all other trials."""
        trial = record["trial"]
        self.written(trial)
        self.records[trial] = record
        path = self.files.trial(trial).record
        self._writing[trial] = self._writer.submit(
            when_there_is_room, lambda: write_json(path, record, self.files.root), path
        )
