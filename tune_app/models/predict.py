"""Files -> scores with an exported model: reads the study's kinds of files, refuses inputs that the model was not made for.

Nothing is unpickled: weights are safetensors, everything else is JSON, volumes are NIfTI. A file that cannot be scored
costs its own row and nothing else. Scores repeat the study's: volumes are rounded to half precision as in the prepared
cohort, and networks run in float32, on a GPU without TF32.
"""

import csv
import os
import stat
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np

from trainables.checkpoints import naming_a_full_disk
from trainables.data.formats import foreign_format, has_scan_name, head_of, is_nifti, scans_below
from trainables.data.intensity import intensity_of
from trainables.data.manifest import cell_text, place_of, shown_cell, whole_number
from trainables.data.scans import (
    Recipe,
    ScanHeader,
    VolumeError,
    prepare_scan,
    read_header,
    read_scan,
)
from trainables.data.storage import StorageError, absolute, bucket_of, is_url, url_of
from trainables.data.table_file import ManifestError, Record, read_records
from trainables.data.visible import visible
from trainables.machine.this_machine import usable_cpus
from trainables.subject_auc import have_several, subject_interval
from tune_app.models.folder import Decides, ModelError, ModelFiles, ModelInfo
from tune_app.models.model import Model, Prediction, Scored, Source, choose_device, load_model
from tune_app.models.subjects import (
    Pool,
    SubjectScore,
    pool_subjects,
    subject_lines,
    write_subjects,
)
from tune_app.results.calibration import Array

RULES: dict[Decides, str] = {
    "threshold": "class 1 where score_1 reaches the model's threshold, the one with the best balanced accuracy on validation",
    "likeliest": "the class with the largest calibrated probability",
    "largest score": "the class with the largest score before calibration, which need not be the likeliest one: export again "
    "for a decision by calibrated probability",
    "nothing": "none: no threshold and no calibration belong to these weights; the scores rank",
}
"""How a model decides -> the line for its users."""


# The files -------------------------------------------------------------------------------------------------------------


def find_scans(
    paths: Sequence[Path],
    num_classes: int,
    say: Callable[[str], None] = lambda line: None,
    names: Mapping[str, int] | None = None,
) -> list[Source]:
    """Return the files that `paths` name, each once, in order: files themselves, all scans below a folder, or a table.

    A scan has a scan's name (.nii, .nii.gz) or content; any other file is read as a table, by the reader of all tables:
    a column `path`, relative to the table's own folder, and perhaps `label` and `subject`. An entry that cannot be found or
    read becomes a source with its problem, so that it has its row. Other files of a folder are reported through `say`. Label and
    subject of a scan are those of the first table that has them, also where a folder names the scan before. `names`: words
    that are labels, with their class numbers.
    """
    known = _Labels(num_classes, names or {})
    sources: dict[str, Source] = {}
    for path in paths:
        for source in _sources_of(path, known, say):
            place = absolute(source.path)
            first = sources.setdefault(place, source)
            if None not in (first.label, source.label) and first.label != source.label:
                say(
                    f"note: {first.path}: label {first.label} first, then {source.label}: the first counts"
                )
            sources[place] = replace(
                first,
                label=source.label if first.label is None else first.label,
                subject=first.subject or source.subject,
            )
    return list(sources.values())


@dataclass(frozen=True)
class _Labels:
    """The labels that a table may have: class numbers, and words that name classes."""

    num_classes: int
    names: Mapping[str, int]

    def number(self, text: str) -> int | None:
        number = self.names.get(text, whole_number(text))
        return number if number is not None and number < self.num_classes else None

    def __str__(self) -> str:
        words = f", or {', '.join(map(shown_cell, self.names))}" if self.names else ""
        return f"0 to {self.num_classes - 1}{words}"


def _sources_of(path: Path, labels: _Labels, say: Callable[[str], None]) -> list[Source]:
    try:
        if (url := url_of(path)) is not None:
            return _of_url(url, labels, say)
        mode = path.stat().st_mode
    except StorageError as error:
        return [Source(str(url), problem=str(error))]
    except (OSError, ValueError):
        return [Source(str(path))]  # reading it gives the reason
    if stat.S_ISDIR(mode):
        found, notes = scans_below(path)
        for note in notes:
            say(f"note: {note}")
        new = [Source(str(one.path), problem=one.problem) for one in found]
        return new or [Source(str(path), problem="no .nii or .nii.gz file in this folder")]
    if has_scan_name(path.name) or not stat.S_ISREG(mode):
        return [Source(str(path))]
    head = head_of(path)
    if is_nifti(head) or foreign_format(head):
        return [Source(str(path))]
    return _of_table(path, labels, say)


def _of_url(url: str, labels: _Labels, say: Callable[[str], None]) -> list[Source]:
    """The sources of an object, or of all scans below a prefix."""
    if has_scan_name(url):
        return [Source(url)]
    bucket, name = bucket_of(url)
    if bucket.stamp(name) is not None:
        return _of_table(Path(url), labels, say)
    below = [f"{bucket.url}/{one.name}" for one in bucket.listing(name) if has_scan_name(one.name)]
    return [Source(one) for one in below] or [
        Source(url, problem="no such object, and no scan below")
    ]


def _of_table(table: Path, labels: _Labels, say: Callable[[str], None]) -> list[Source]:
    named = url_of(table) or str(table)
    try:
        columns, records = read_records(table)
    except ManifestError as error:
        reason = "; ".join(error.problems).removeprefix(f"table {named}: ")
        return [Source(named, problem=f"not a table that can be read: {reason}")]
    if "path" not in columns or not records:
        shown = ", ".join(map(shown_cell, columns[:12]))
        what = "no rows" if "path" in columns else f"no column 'path'; its columns are {shown}"
        return [Source(named, problem=f"a table with {what}")]
    folder = named.rpartition("/")[0] if is_url(table) else str(table.parent)
    sources = [_of_record(record, len(columns), folder, named, labels) for record in records]
    _note_unknown_labels(records, len(columns), named, labels, say)
    return sources


def _note_unknown_labels(
    records: Sequence[Record], width: int, table: str, labels: _Labels, say: Callable[[str], None]
) -> None:
    texts = [cell_text(record.cells.get("label")) for record in records if record.width == width]
    unknown = [text for text in texts if text and labels.number(text) is None]
    if unknown:
        say(
            f"note: {table}: {len(unknown)} labels are not evaluated, the first is {shown_cell(unknown[0])!r}: "
            f"classes are {labels}"
        )


def _of_record(record: Record, width: int, folder: str, table: str, labels: _Labels) -> Source:
    """The source that a table's row names."""
    where = f"{table} row {record.number}"
    if record.width != width:
        return Source(where, problem=f"{record.width} cells, the header has {width}")
    cells = {name: cell_text(cell) for name, cell in record.cells.items()}
    path = cells.get("path", "")
    place, problem = place_of(path, folder)
    named = path if is_url(path) else os.path.join(folder, path)  # noqa: PTH118
    label = labels.number(cells.get("label", ""))
    shown = str(place or named) if path else where
    return Source(shown, label, problem, cells.get("subject") or None)


@dataclass(frozen=True)
class _Read:
    volume_CDHW: Array | None
    problem: str | None
    notes: tuple[str, ...] = ()


def _read(source: Source, info: ModelInfo, recipe: Recipe) -> _Read:
    if source.problem is not None:
        return _Read(None, source.problem)
    try:
        header = read_header(source.path)
        problems = _refusals(header, info, recipe)
        if problems:
            return _Read(None, "; ".join(problems))
        scan = read_scan(source.path, recipe.in_channels)
        volume = prepare_scan(scan, recipe, source.path)
    except VolumeError as error:
        return _Read(None, error.reason)
    extent_mm = tuple(side * mm for side, mm in zip(header.shape, header.spacing_mm, strict=True))
    notes = info.training.notes_on(header.spacing_mm, extent_mm)  # type: ignore[arg-type]
    if (known := info.training.intensity) is not None:
        kind = intensity_of(scan.voxels, recipe).kind
        if problems := known.problems_of(kind):
            return _Read(None, "; ".join(problems))
        notes += known.kind_notes(kind) or known.notes_on(volume)
    return _Read(volume.astype(np.float16), None, tuple(notes))  # as the prepared cohort holds them


def _refusals(header: ScanHeader, info: ModelInfo, recipe: Recipe) -> list[str]:
    problems = info.training.problems_of(header.spacing_mm, header.oriented)
    if header.channels != recipe.in_channels:
        problems.insert(
            0,
            f"{header.channels} channel(s), the model takes {recipe.in_channels}: give the file it was made for",
        )
    return problems


def _read_ahead(
    sources: Sequence[Source], info: ModelInfo, recipe: Recipe, ahead: int, workers: int
) -> Iterator[tuple[Source, _Read]]:
    """Each source with its content, in order; `ahead` files are read while the networks work, and no more are held."""
    pool = ThreadPoolExecutor(workers)
    waiting: deque[tuple[Source, Future[_Read]]] = deque()
    rest = iter(sources)
    try:
        while True:
            for source in rest:
                waiting.append((source, pool.submit(_read, source, info, recipe)))
                if len(waiting) >= ahead:
                    break
            if not waiting:
                return
            source, future = waiting.popleft()
            yield source, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def predict(
    model: Model, sources: Sequence[Source], *, batch_size: int = 8
) -> Iterator[Prediction]:
    """Yield a prediction for each source, in order, as batches get done. A bad file is a prediction with a problem."""
    recipe = model.recipe
    batch: list[tuple[Source, _Read]] = []
    with closing(
        _read_ahead(sources, model.info, recipe, 2 * batch_size, min(8, usable_cpus()))  # type: ignore[type-var]
    ) as reads:
        for source, read in reads:
            batch.append((source, read))
            if sum(one.volume_CDHW is not None for _, one in batch) == batch_size:
                yield from _scored(model, batch)
                batch = []
    yield from _scored(model, batch)


def _scored(model: Model, batch: list[tuple[Source, _Read]]) -> Iterator[Prediction]:
    volumes = [read.volume_CDHW for _, read in batch if read.volume_CDHW is not None]
    scored: Iterator[Scored | None] = iter(())
    if volumes:
        logits_MBC = model.logits(np.stack(volumes))
        finite_B: Array = np.asarray(np.isfinite(logits_MBC).all(axis=(0, 2)))
        said = model.predict(np.nan_to_num(logits_MBC))
        scored = (
            Scored(
                said.log_odds_BC[place],
                said.probabilities_BC[place],
                int(said.decisions_B[place]),
                said.members_MBC[:, place],
                volume,
            )
            if finite_B[place]
            else None
            for place, volume in enumerate(volumes)
        )
    for source, read in batch:
        if read.volume_CDHW is None:
            yield Prediction(source, problem=read.problem)
            continue
        one = next(scored)
        problem = None if one else "the network's scores are not finite on it: look at the volume"
        yield Prediction(source, one, problem, read.notes)


# The result ------------------------------------------------------------------------------------------------------------


def columns(
    info: ModelInfo, *, labelled: bool, explained: bool, subjects: bool = False
) -> list[str]:
    """Return the columns of the result.

    path; decision; class, its name where the model knows names; probability_c, calibrated; score_c, log-odds before calibration (the threshold is one of score_1);
    decision and probability are empty for a model that decides nothing, such as a retrained one;
    for an ensemble members_sd, members_low, members_high: spread of its members' calibrated probabilities of class 1
    (of the class decided for, where there are more than two); subject and label where a table gave one; explanation; note; problem.
    """
    classes = range(info.num_classes)
    names = [
        "path",
        "decision",
        *(["class"] if info.class_names else []),
        *[f"probability_{c}" for c in classes],
        *[f"score_{c}" for c in classes],
    ]
    names += ["members_sd", "members_low", "members_high"] if len(info.members) > 1 else []
    names += ["subject"] if subjects else []
    names += ["label"] if labelled else []
    return [*names, *(["explanation"] if explained else []), "note", "problem"]


def row(prediction: Prediction, info: ModelInfo, explanation: str | None = None) -> dict[str, str]:
    """Return the cells of one prediction, by column; numbers with nine digits, enough to give a float32 back exactly."""
    source, scored = prediction.source, prediction.scored
    path, notes = visible(source.path), list(prediction.notes)
    if path != source.path:
        notes.append("the file's name has bytes that cannot be shown: they are written out in path")
    cells = {
        "path": path,
        "note": "; ".join(notes),
        "problem": visible(prediction.problem or ""),
        "subject": source.subject or "",
        "label": "" if source.label is None else str(source.label),
        "explanation": explanation or "",
    }
    if scored is None:
        return cells
    told = {"score": scored.log_odds_C}
    if info.decides != "nothing":
        cells["decision"] = str(scored.decision)
        if info.class_names:
            cells["class"] = visible(info.class_name(scored.decision))
        told["probability"] = scored.probabilities_C
    for name, values in told.items():
        cells |= {f"{name}_{c}": f"{value:.9g}" for c, value in enumerate(values)}
    shown = scored.members_MC[:, 1 if info.num_classes == 2 else scored.decision]
    if len(shown) > 1:
        spread = {"sd": shown.std(ddof=1), "low": shown.min(), "high": shown.max()}
        cells |= {f"members_{name}": f"{value:.9g}" for name, value in spread.items()}
    return cells


@dataclass
class Tally:
    """What came of a run of predictions, counted as they pass."""

    scored: int = 0
    refused: int = 0
    labels: list[int | None] = field(default_factory=list)
    log_odds: list[Array] = field(default_factory=list)
    decisions: list[int] = field(default_factory=list)
    subjects: list[str] = field(default_factory=list)
    """Of scored volumes; a volume without one counts as a separate subject."""

    def add(self, source: Source, scored: Scored) -> None:
        """Take in a scored volume."""
        self.labels.append(source.label)
        self.log_odds.append(scored.log_odds_C)
        self.decisions.append(scored.decision)
        self.subjects.append(source.subject or f"volume {len(self.subjects)}: {source.path}")

    def by_subject(self, pool: Pool) -> list[SubjectScore]:
        """Return the scored subjects."""
        if not self.log_odds:
            return []
        return pool_subjects(self.subjects, np.stack(self.log_odds), self.labels, pool)

    def lines(self, info: ModelInfo, pool: Pool = "mean") -> list[str]:
        """Return the counts in a sentence, and how well labelled volumes, and subjects, were separated by class."""
        lines = [f"{self.scored} scored, {self.refused} not"]
        known = [place for place, label in enumerate(self.labels) if label is not None]
        if len({self.labels[place] for place in known}) == info.num_classes:
            labels = np.array([self.labels[place] for place in known])
            scores = np.stack([self.log_odds[place] for place in known])
            subjects = np.array([self.subjects[place] for place in known])
            if have_several(subjects):
                lines += subject_lines(self.by_subject(pool), info.num_classes, pool)
            auc = subject_interval(
                scores[:, 1] if info.num_classes == 2 else scores, labels, subjects
            )
            decided = ""
            if info.decides != "nothing":
                right = np.array([self.decisions[place] for place in known]) == labels
                recalls = [f"{right[labels == c].mean():.3f}" for c in range(info.num_classes)]
                decided = f", recall by class: {', '.join(recalls)}"
            lines.append(
                f"{len(labels)} volumes with a label: AUC {auc.auc:.3f} [{auc.low:.3f}, {auc.high:.3f}]{decided} (volumes that the "
                "model was made with count too, if there are any)"
            )
        return lines


def write_predictions(
    model: Model,
    predictions: Iterable[Prediction],
    stream: IO[str],
    *,
    labelled: bool,
    explain: Callable[[Prediction], str] | None,
    subjects: bool = False,
    say: Callable[[str], None],
) -> Tally:
    """Write predictions as CSV, a row as soon as it is there; report each problem through `say`. Returns the counts.

    `explain` writes the explanation of a prediction and returns its place; a file it cannot be written for is reported
    like any other problem, and its scores stay.
    """
    names = columns(model.info, labelled=labelled, explained=explain is not None, subjects=subjects)
    writer = csv.DictWriter(stream, names, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    tally = Tally()
    for prediction in predictions:
        explanation, problem = None, prediction.problem
        scored = prediction.scored
        if scored is not None and explain is not None:
            try:
                explanation = explain(prediction)
            except (OSError, VolumeError) as error:
                problem = f"scored, but not explained: {error}"
        cells = row(prediction, model.info, explanation)
        writer.writerow(cells | {"problem": visible(problem or "")})
        stream.flush()
        if problem is not None:
            tally.refused += 1
            say(f"error: scan {prediction.source.path}: {problem}")
        else:
            tally.scored += 1
        for note in prediction.notes:
            say(f"note: scan {prediction.source.path}: {note}")
        if scored is not None:
            tally.add(prediction.source, scored)
    return tally


def run_predict(
    folder: Path,
    paths: Sequence[Path],
    out: Path | None,
    *,
    device: str,
    batch_size: int,
    explain: Path | None,
    explain_layer: str,
    say: Callable[[str], None],
    by_subject: Path | None = None,
    pool: Pool = "mean",
) -> int:
    """Score `paths` with the model in `folder`; CSV to `out` or standard output, everything else to `say`.

    `by_subject`: a second CSV with one row per subject, whose volumes' scores are put together by `pool`.

    Returns 1 when any path could not be scored or explained, else 0. When it is interrupted, the rows scored by then
    stay: in `<out>.partial`, or on standard output.
    """
    if pool == "max" and by_subject is None:
        say("note: --pool max is the score of subjects; --by-subject FILE writes them")
    folder = _model_of(folder, device, say)
    model = load_model(folder, choose_device(device))
    if pool == "max" and model.info.num_classes > 2:
        raise ModelError("--pool max: the largest score is that of class 1 of two; use mean")
    say(f"model: {folder}, id {model.id}, {model.info.kind}, on {model.device.type}")
    say(f"decision: {RULES[model.info.decides]}")
    if named := model.info.named_classes:
        say(f"classes: {named}")
    sources = find_scans(paths, model.info.num_classes, say, model.info.class_numbers)
    explainer = None
    if explain is not None:
        from tune_app.models.explain import Explainer

        explainer = Explainer(model, explain, layer=explain_layer)
        for note in explainer.notes():
            say(f"note: {note}")
    predictions = predict(model, sources, batch_size=batch_size)
    with closing(predictions), _result_file(out, say) as stream:  # type: ignore[type-var]
        tally = write_predictions(
            model,
            predictions,
            stream,
            labelled=any(source.label is not None for source in sources),
            explain=explainer,
            subjects=any(source.subject is not None for source in sources),
            say=say,
        )
    if by_subject is not None:
        write_subjects(by_subject, tally.by_subject(pool), model.info.num_classes)
    for line in tally.lines(model.info, pool):
        say(line)
    return 1 if tally.refused else 0


def _model_of(folder: Path, device: str, say: Callable[[str], None]) -> Path:
    """The folder of the model: that of a run of `medtune train` has it inside, exported when it is first asked for."""
    if ModelFiles(folder).info.is_file():
        return folder
    from tune_app.models.export import export_model, is_single_run

    if not is_single_run(folder):
        return folder
    inside = folder / "model"
    if not ModelFiles(inside).info.is_file():
        say(f"{folder} is a run of `medtune train`: exported to {inside} first")
        export_model(folder, inside, device=choose_device(device), say=say)
    return inside


@contextmanager
def _result_file(out: Path | None, say: Callable[[str], None]) -> Iterator[IO[str]]:
    if out is None:
        yield sys.stdout
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    with (
        naming_a_full_disk(out),
        partial.open("w", encoding="utf-8", newline="", errors="backslashreplace") as stream,
    ):
        try:
            yield stream
        except BaseException:
            say(f"interrupted: the rows scored by then are in {partial}")
            raise
    partial.replace(out)
