"""A table of volumes -> checked rows, and folds that never share a subject.

The table is CSV or Parquet, told apart by content, with a row a volume and the columns

    path      a .nii or .nii.gz file, or its URL (s3://...); relative paths start at the table's folder
    label     class, a whole number from 0
    subject   whom the volume is of; all volumes of a subject stay on one side of every split
    split     optional: train, val or test
    fold      optional: a whole number from 0, the fold in which the row validates

and any others, which are not read. The table may be an object in object storage itself. In messages row 1 is the first
below the header. Nothing here loads torch.
"""

import csv
import difflib
import functools
import hashlib
import io
import math
import os
import posixpath
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from trainables.config import FineTuneConfig
from trainables.data.scans import (
    Recipe,
    VolumeError,
    prepare_scan,
    read_header,
    read_scan,
    target_spacing,
)
from trainables.data.storage import StorageError, absolute, bucket_of, is_url, url_of
from trainables.data.volumes import Progress, in_threads

SPLITS = ("train", "val", "test")

COLUMNS = {
    "path": "the NIfTI file of each row",
    "label": "the class of each row, a whole number from 0",
    "subject": (
        "whom each volume is of. Volumes of one subject on both sides of a split make scores worthless, so it is not "
        "guessed; where every volume is of another subject, give each row another value"
    ),
}
"""The columns a table must have, and what they are for."""

TOLD_APART = 3
"""Rows with the very same problem that are told one by one."""

MAX_FOLDS = 50
MAX_ROWS = 1_000_000
MAX_TABLE_BYTES = 2**28

FOLD_SEED = 0
"""Folds depend on the table alone, never on a run's seed: or scores of two seeds would be of different volumes."""


class ManifestError(ValueError):
    """A table that cannot be used. `problems` holds one line a problem, all of them, rows first."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))

    def __reduce__(self) -> tuple[type["ManifestError"], tuple[list[str]]]:
        return type(self), (
            self.problems,
        )  # the default would pass the joined text, and Ray pickles errors


@dataclass(frozen=True, eq=False)
class Manifest:
    """A table whose every row can be used."""

    table: str
    """Absolute path, or URL."""
    rows: pd.DataFrame
    """Columns path (absolute or a URL, text), label (int64), subject (text), split (text or None), fold (Int64, NA where there
    is none), in the table's order; the index is 0 .. N-1."""
    num_classes: int
    numbers: tuple[int, ...] = ()
    """The rows' numbers in the table, as messages give them; none: 1 to N."""


@dataclass(frozen=True, eq=False)
class Split:
    """Positions in `Manifest.rows` (and in its cohort), int64, ascending; no subject is in two of them."""

    train: npt.NDArray[np.int64]
    val: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CheckReport:
    """What a deep check found: `manifest` is None, and `problems` not empty, or the other way round."""

    manifest: Manifest | None
    problems: list[str]
    notices: list[str]
    """What is worth knowing but stops nothing."""

    def lines(self) -> list[str]:
        """Return the table in a few sentences: rows, subjects, classes, splits, sizes, and the notices."""
        if self.manifest is None:
            return self.notices
        rows = self.manifest.rows
        classes = ", ".join(
            f"class {label}: {count}" for label, count in sorted(Counter(rows["label"]).items())
        )
        lines = [f"{len(rows)} volumes of {rows['subject'].nunique()} subjects; {classes}"]
        given = Counter(word for word in rows["split"] if word is not None)
        if given:
            lines.append(
                "split: " + ", ".join(f"{word} {given[word]}" for word in SPLITS if given[word])
            )
        folds = Counter(int(fold) for fold in rows["fold"].dropna())
        if folds:
            lines.append(
                "folds: " + ", ".join(f"{fold}: {count}" for fold, count in sorted(folds.items()))
            )
        return lines + self.notices


def read_manifest(table: Path, num_classes: int = 2) -> Manifest:
    """Return the rows of a CSV or Parquet table, checked without opening the volumes; URLs are not looked up.

    Raises ManifestError with every problem of every row: missing columns, cells and files, labels outside the classes,
    a path twice, words that are no split, a subject on both sides of a split or fold, a class absent from one.
    """
    rows, problems = _checked_rows(Path(table), num_classes)
    if problems:
        raise ManifestError(problems)
    return _manifest(Path(table), rows, num_classes)


def check_manifest(
    table: Path, num_classes: int, config: FineTuneConfig, progress: Progress | None = None
) -> CheckReport:
    """Return `read_manifest`'s findings and those of reading every volume once, as `config` would have it prepared.

    Beyond the rows: unreadable, cut or damaged files, more dimensions than `in_channels`, voxels that are not finite,
    spacings not above 0, the same voxels twice (under two subjects that is a leak), volumes that `intensity` leaves
    constant, and folds that cannot be made. A table that is no table raises ManifestError.
    """
    table = Path(table)
    rows, problems = _checked_rows(table, num_classes)
    readable = [row for row in rows if row.file is not None]
    recipe = Recipe.from_config(config)
    found: list[_Finding] = in_threads(
        lambda row: _read_volume(str(row.file), recipe), readable, progress=progress
    )
    unreadable = [
        f"{row.name}: {finding.problem}"
        for row, finding in zip(readable, found, strict=True)
        if finding.problem
    ]
    problems = problems + unreadable + _same_voxels(readable, found)
    if problems:
        return CheckReport(None, problems, _notices(found, recipe))
    manifest = _manifest(table, rows, num_classes)
    problems = _fold_problems(manifest, config)
    return CheckReport(None if problems else manifest, problems, _notices(found, recipe))


def split_rows(manifest: Manifest, *, fold: int, num_folds: int, cross_validate: bool) -> Split:
    """Return which rows train, validate and test; always the same for the same table, whatever its row order.

    1. Rows whose split is `test` are the test rows, and never in the other two.
    2. Where the table has `val` rows, its own split decides and `fold` is not used, unless `cross_validate`.
    3. Else, where the table has a `fold` column, the rows of `fold` validate and the others train.
    4. Else scikit-learn's StratifiedGroupKFold makes `num_folds` folds: subjects stay whole, classes are spread evenly.

    Raises ManifestError: no such fold, or a fold whose training or validation part would lack a class.
    """
    rows = manifest.rows
    words = rows["split"].to_numpy(dtype=object)
    test = np.flatnonzero(words == "test")
    pool = np.flatnonzero(words != "test")
    folds = rows["fold"].to_numpy(dtype=float, na_value=np.nan)[pool]
    if (words == "val").any() and not cross_validate:
        validates = words[pool] == "val"
    elif len(pool) and not np.isnan(folds).any():
        given = sorted({int(number) for number in folds})
        if fold not in given:
            raise ManifestError(
                [
                    f"fold={fold}: the table's fold column has {', '.join(map(str, given))}; choose one of them"
                ]
            )
        validates = folds == fold
    else:
        if not 0 <= fold < num_folds:
            raise ManifestError(
                [
                    f"fold={fold}: there are folds 0 to {num_folds - 1}; raise num_folds or lower fold"
                ]
            )
        labels = rows["label"].to_numpy(dtype=np.int64)[pool]
        subjects = rows["subject"].to_numpy(dtype=object)[pool]
        validates = _made_folds(labels, subjects, num_folds, manifest.num_classes) == fold
    return Split(train=pool[~validates], val=pool[validates], test=test)


# Rows ------------------------------------------------------------------------------------------------------------------


@dataclass
class _Row:
    """One row as far as it could be read; what could not is None and has its line in `problems`."""

    number: int
    shown: str
    file: Path | str | None = None
    """Absolute path, or URL."""
    label: int | None = None
    stated_label: int | None = None
    """The label as written, where it is a whole number, allowed or not."""
    subject: str | None = None
    split: str | None = None
    fold: int | None = None
    problems: dict[str, str] = field(default_factory=dict)
    """Column -> what is wrong with the row's cell."""

    @property
    def name(self) -> str:
        return f"row {self.number} (scan {self.shown})" if self.shown else f"row {self.number}"


def _checked_rows(table: Path, num_classes: int) -> tuple[list[_Row], list[str]]:
    """All rows, and all problems: of the columns, of each row, and between rows."""
    columns, records = _records(table)
    problems = _column_problems(columns)
    if not records:
        raise ManifestError(
            [*problems, f"table {url_of(table) or table}: no rows; a row a volume is needed"]
        )
    folder = absolute(table).rpartition("/")[0]
    rows = [_row(record, len(columns), folder, num_classes) for record in records]
    problems += _row_problems(rows)
    problems += _same_files(rows)
    problems += _split_problems(rows, columns, num_classes)
    return rows, problems


def _row_problems(rows: list[_Row]) -> list[str]:
    """Each row's problems, in a line for each; what is the same in many rows, such as a coding from 1, in one line."""
    alike: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        for problem in row.problems.values():
            alike[problem].append(row)
    many = {problem: those for problem, those in alike.items() if len(those) > TOLD_APART}
    told = [
        f"rows {_ranges([row.number for row in those])} ({len(those)}): {problem}"
        for problem, those in many.items()
    ]
    told += [
        f"{row.name}: {one}" for row in rows for one in row.problems.values() if one not in many
    ]
    labels = {row.stated_label for row in rows if row.stated_label is not None}
    if (
        labels
        and 0 not in labels
        and min(labels) == 1
        and any("label" in row.problems for row in rows)
    ):
        told.insert(
            0,
            f"labels begin at 1, up to {max(labels)}; classes are counted from 0: subtract 1 from every label",
        )
    return told


def _ranges(numbers: Sequence[int]) -> str:
    """`1-3, 7` for 1, 2, 3 and 7: each of the numbers, which ascend."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _column_problems(columns: list[str]) -> list[str]:
    problems = []
    for name, meaning in COLUMNS.items():
        if name in columns:
            continue
        folded = {column.strip().lower(): column for column in columns}
        near = folded.get(name) or next(iter(difflib.get_close_matches(name, columns, n=1)), None)
        hint = f" (is it {_shown(near)!r}? rename that)" if near else ""
        found = ", ".join(_shown(column) for column in columns[:12]) + (
            ", ..." if len(columns) > 12 else ""
        )
        problems.append(f"no column {name!r}{hint}; the columns are {found}. It is {meaning}")
        if len(columns) == 1 and re.search(r"[;\t|]", columns[0]):
            problems[-1] += ". Columns must be separated by commas"
    twice = [
        column
        for column, count in Counter(columns).items()
        if count > 1 and column in (*COLUMNS, "split", "fold")
    ]
    return problems + [f"column {column!r} is there twice: remove one" for column in twice]


def _row(record: "_Record", width: int, folder: str, num_classes: int) -> _Row:
    values = {name: _text(cell) for name, cell in record.cells.items()}
    row = _Row(record.number, _shown(values.get("path", "")))
    if record.width != width:
        row.problems["cells"] = (
            f"{record.width} cells, the header has {width}: quote a cell that contains a comma"
        )
        return row
    if "path" in values:
        row.file, problem = _file(values["path"], folder)
        if problem:
            row.problems["path"] = problem
    if "label" in values:
        row.label = _whole_number(values["label"])
        row.stated_label = row.label
        if row.label is None or row.label >= num_classes:
            row.problems["label"] = (
                f"label {_quoted(values['label'])}: a whole number from 0 to {num_classes - 1} is needed "
                f"(num_classes={num_classes})"
            )
            row.label = None
    if "subject" in values:
        row.subject = values["subject"] or None
        if row.subject is None:
            row.problems["subject"] = (
                "no subject: name whom the volume is of, as in all its other volumes"
            )
    if values.get("split"):
        row.split = values["split"] if values["split"] in SPLITS else None
        if row.split is None:
            near = difflib.get_close_matches(
                values["split"].lower(), [*SPLITS, "valid", "training"], n=1
            )
            word = {"valid": "val", "training": "train"}.get(near[0], near[0]) if near else None
            hint = f"; did you mean {word!r}?" if word else ""
            row.problems["split"] = (
                f"split {_quoted(values['split'])}: train, val or test is needed{hint}"
            )
    if values.get("fold"):
        row.fold = _whole_number(values["fold"])
        if row.fold is None or row.fold >= MAX_FOLDS:
            row.problems["fold"] = (
                f"fold {_quoted(values['fold'])}: a whole number from 0 to {MAX_FOLDS - 1} is needed"
            )
            row.fold = None
    return row


def _text(cell: Any) -> str:
    """A cell as text: Parquet brings numbers, and whole columns of them as floats as soon as one is missing."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 2**53:
        return str(int(cell))
    return str(cell).strip()


def _whole_number(text: str) -> int | None:
    """The number in `7` or `7.0`; None for anything else, negative ones too. int() would take `1_0` and other scripts' digits."""
    found = re.fullmatch(r"([0-9]{1,9})(\.0*)?", text)
    return int(found[1]) if found else None


def _file(path: str, folder: str) -> tuple[Path | str | None, str | None]:
    if not path:
        return None, "no path"
    if is_url(path):
        return _object(path)
    if is_url(folder) and not Path(path).is_absolute():
        root, _, below = folder.partition("://")
        return _object(f"{root}://{posixpath.normpath(f'{below}/{path}')}")
    file = Path(folder or "/") / path
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        below = "" if Path(path).is_absolute() else f" below {folder}"
        return None, f"no such file{below}"
    except (OSError, ValueError) as error:  # a loop of links, a name too long, a NUL
        return None, f"no file that can be read: {getattr(error, 'strerror', None) or error}"
    if not stat.S_ISREG(mode):
        return (
            None,
            f"a {'folder' if stat.S_ISDIR(mode) else 'pipe or device'}, a .nii or .nii.gz file is needed",
        )
    if not os.access(file, os.R_OK):
        return None, "this user may not read it: change its permissions"
    return file.absolute(), None


def _object(url: str) -> tuple[str | None, str | None]:
    try:
        bucket_of(url)
    except StorageError as error:
        return None, str(error)
    return url_of(url), None


def _shown(text: str) -> str:
    """Text from a table that is safe in a terminal and in a line: names may hold anything."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 120 else f"{text[:60]}...{text[-57:]}"


def _quoted(text: str) -> str:
    return repr(_shown(text)) if text else "is missing"


def _manifest(table: Path, rows: list[_Row], num_classes: int) -> Manifest:
    columns = {
        "path": pd.Series([str(row.file) for row in rows], dtype=object),
        "label": pd.Series([row.label for row in rows], dtype=np.int64),
        "subject": pd.Series([row.subject for row in rows], dtype=object),
        "split": pd.Series([row.split for row in rows], dtype=object),
        "fold": pd.Series([row.fold for row in rows], dtype="Int64"),
    }
    return Manifest(
        absolute(table), pd.DataFrame(columns), num_classes, tuple(row.number for row in rows)
    )


# Between rows ----------------------------------------------------------------------------------------------------------


def _same_files(rows: list[_Row]) -> list[str]:
    first: dict[str, _Row] = {}
    problems = []
    for row in rows:
        if row.file is not None:
            known = first.setdefault(_real(row.file), row)
            if known is not row:
                problems.append(f"{row.name}: the same file as {known.name}: keep one of the rows")
    return problems


def _real(file: Path | str) -> str:
    return file if isinstance(file, str) else os.path.realpath(file)


def _split_problems(rows: list[_Row], columns: list[str], num_classes: int) -> list[str]:
    """Problems of the table's own split and folds; classes are counted only where every label and split is known."""
    known = all("split" not in row.problems for row in rows)
    rows = [row for row in rows if "split" not in row.problems]
    words = {row.split for row in rows} - {None}
    sides = [(row, row.split or "no split") for row in rows]
    problems = []
    if words & {"train", "val"}:  # `test` alone leaves the others to be folded
        problems += [
            f"{row.name}: no split, other rows have one: train, val or test"
            for row in rows
            if row.split is None
        ]
        sides = [(row, row.split) for row in rows if row.split is not None]
    problems += _leaks(sides)

    pool = [row for row in rows if row.split != "test"]
    counted = known and "label" in columns and all(row.label is not None for row in rows)
    if counted and "val" in words:
        for word in ("train", "val"):
            problems += _absent(
                [row for row in rows if row.split == word], f"split {word!r}", num_classes
            )
    elif counted:
        problems += _absent(
            pool, "the table, less its test rows," if "test" in words else "the table", num_classes
        )
    return problems + _given_fold_problems(
        [row for row in pool if "fold" not in row.problems], counted, num_classes
    )


def _given_fold_problems(pool: list[_Row], counted: bool, num_classes: int) -> list[str]:
    numbers = sorted({row.fold for row in pool if row.fold is not None})
    if not numbers:
        return []
    bare = [row for row in pool if row.fold is None]
    problems = [
        f"{row.name}: no fold, other rows have one: number it, or make it split=test"
        for row in bare
    ]
    problems += _leaks([(row, f"fold {row.fold}") for row in pool if row.fold is not None])
    gaps = [str(number) for number in range(numbers[-1]) if number not in numbers]
    if gaps:
        problems.append(
            f"no row is in fold {', '.join(gaps)}: folds are numbered from 0 without gaps"
        )
    elif len(numbers) == 1:
        problems.append("every row is in fold 0: two folds or more are needed")
    elif counted and not bare:
        for number in numbers:
            inside = [row for row in pool if row.fold == number]
            outside = [row for row in pool if row.fold != number]
            problems += _absent(inside, f"the validation part of fold {number}", num_classes)
            problems += _absent(outside, f"the training part of fold {number}", num_classes)
    return problems


def _leaks(sides: list[tuple[_Row, str]]) -> list[str]:
    """A line for each subject that is on more than one side."""
    found: dict[str, dict[str, _Row]] = defaultdict(dict)
    for row, side in sides:
        if row.subject is not None:
            found[row.subject].setdefault(side, row)
    return [
        f"subject {_shown(subject)!r} is in {' and in '.join(f'{side} (row {row.number})' for side, row in firsts.items())}: "
        "all volumes of a subject belong on one side"
        for subject, firsts in found.items()
        if len(firsts) > 1
    ]


def _absent(part: list[_Row], where: str, num_classes: int) -> list[str]:
    counts = Counter(row.label for row in part)
    missing = [str(label) for label in range(num_classes) if not counts[label]]
    if not missing:
        return []
    found = (
        ", ".join(f"{count} of class {label}" for label, count in sorted(counts.items(), key=str))
        or "none"
    )
    few = f"{', '.join(missing[:20])}{', ...' if len(missing) > 20 else ''}"
    fewer = ", or lower num_classes" if num_classes > 2 else ""
    return [
        f"{where} has no row of class {few} (rows: {found}; num_classes={num_classes}): move or add rows{fewer}"
    ]


def _made_folds(
    labels: npt.NDArray[np.int64],
    subjects: npt.NDArray[np.object_],
    num_folds: int,
    num_classes: int,
) -> npt.NDArray[np.int64]:
    """The fold in which each row validates. Rows are sorted first, so that their order in the table does not matter."""
    problems = []
    for label in range(num_classes):
        count = len(set(subjects[labels == label]))
        if count < num_folds:
            problems.append(
                f"num_folds={num_folds}: class {label} has {count} subject(s) to spread over the folds; "
                f"lower num_folds{f' to {count}' if count > 1 else ''}, or add volumes of other subjects"
            )
    if problems:
        raise ManifestError(problems)
    folds = grouped_folds(labels, subjects, num_folds)
    inside = np.zeros((num_folds, num_classes), dtype=np.int64)
    np.add.at(inside, (folds, labels), 1)
    outside = inside.sum(axis=0) - inside
    for fold, label in np.argwhere((inside == 0) | (outside == 0)):
        part = "training" if inside[fold, label] else "validation"
        problems.append(
            f"num_folds={num_folds}: the {part} part of fold {fold} would have no row of class {label}: "
            "lower num_folds, or give the table a fold column"
        )
    if problems:
        raise ManifestError(problems)
    return folds


def grouped_folds(
    labels: npt.NDArray[np.int64], subjects: npt.NDArray[Any], num_folds: int
) -> npt.NDArray[np.int64]:
    """Return the fold of each row: subjects whole, labels spread evenly, the same folds for the same rows in any order."""
    order = np.lexsort((labels, subjects.astype(str)))
    folds = np.empty(len(labels), dtype=np.int64)
    folds[order] = _folds_of_sorted(
        tuple(labels[order].tolist()), tuple(map(str, subjects[order])), num_folds
    )
    return folds


@functools.lru_cache(maxsize=4)
def _folds_of_sorted(
    labels: tuple[int, ...], subjects: tuple[str, ...], num_folds: int
) -> tuple[int, ...]:
    """The folds of rows in their order. Remembered: a thousand rows take half a second, and every trial asks for them."""
    from sklearn.model_selection import (
        StratifiedGroupKFold,
    )  # a second to import, and only needed here

    folds = [0] * len(labels)
    folder = StratifiedGroupKFold(num_folds, shuffle=True, random_state=FOLD_SEED)
    for number, (_, validates) in enumerate(folder.split(labels, labels, subjects)):
        for row in validates:
            folds[row] = number
    return tuple(folds)


# The table's file ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """A row as it stands in the file: text from CSV, any value from Parquet."""

    number: int
    cells: dict[str, Any]
    width: int


def table_bytes(table: Path) -> bytes:
    """Return the table's content, of a file or a URL. Raises ManifestError."""
    try:
        if (url := url_of(table)) is not None:
            bucket, name = bucket_of(url)
            with bucket.opened(name) as (stream, size):
                return stream.read() if size <= MAX_TABLE_BYTES else _too_large(url, size)
        found = table.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ManifestError(
                [f"table {table}: a CSV or Parquet file is needed, this is a folder or device"]
            )
        return (
            table.read_bytes()
            if found.st_size <= MAX_TABLE_BYTES
            else _too_large(str(table), found.st_size)
        )
    except FileNotFoundError:
        what = "file" if url_of(table) is None else "object"
        raise ManifestError([f"table {url_of(table) or table}: no such {what}"]) from None
    except StorageError as error:
        raise ManifestError([f"table {url_of(table)}: {error}"]) from None
    except (OSError, ValueError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(
            [f"table {table}: cannot be read: {getattr(error, 'strerror', None) or error}"]
        ) from None


def _too_large(table: str, size: int) -> bytes:
    most = MAX_TABLE_BYTES // 2**20
    raise ManifestError(
        [f"table {table}: {size / 2**20:.0f} MiB, at most {most} are read: is it the table?"]
    )


def _records(table: Path) -> tuple[list[str], list[_Record]]:
    """All column names, and the rows."""
    content, named = table_bytes(table), url_of(table) or str(table)
    if content.startswith(b"PAR1"):
        return _parquet(named, content)
    return _csv(named, content)


def _csv(table: str, content: bytes) -> tuple[list[str], list[_Record]]:
    kind = None
    if content.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        kind = "looks like a spreadsheet: export it as CSV"
    elif content.startswith((b"\xff\xfe", b"\xfe\xff")):
        kind = "is UTF-16 text: save it as UTF-8"
    elif b"\0" in content:
        kind = "is a binary file: CSV or Parquet is needed"
    if kind:
        raise ManifestError([f"table {table}: {kind}"])
    try:
        lines = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ManifestError(
            [f"table {table}: line {line} is not UTF-8 text: save it as UTF-8"]
        ) from None
    except csv.Error as error:
        raise ManifestError([f"table {table}: not a CSV table: {error}"]) from None
    if len(lines) > MAX_ROWS:
        raise ManifestError([f"table {table}: {len(lines)} rows, at most {MAX_ROWS} are read"])
    header = next((number for number, cells in enumerate(lines) if _filled(cells)), None)
    if header is None:
        raise ManifestError(
            [
                f"table {table}: empty: a header with path, label, subject and a row a volume are needed"
            ]
        )
    columns = [name.strip() for name in lines[header]]
    rows = enumerate(lines[header + 1 :], 1)
    return columns, [
        _Record(n, dict(zip(columns, cells, strict=False)), len(cells))
        for n, cells in rows
        if _filled(cells)
    ]


def _filled(cells: list[str]) -> bool:
    return any(cell.strip() for cell in cells)


def _parquet(table: str, content: bytes) -> tuple[list[str], list[_Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        columns = [str(name) for name in file.schema_arrow.names]
        count = file.metadata.num_rows
        wanted = [name for name in (*COLUMNS, "split", "fold") if columns.count(name) == 1]
        values = file.read(columns=wanted).to_pydict() if wanted and count <= MAX_ROWS else {}
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ManifestError([f"table {table}: not a Parquet table: {reason}"]) from None
    if count > MAX_ROWS:
        raise ManifestError([f"table {table}: {count} rows, at most {MAX_ROWS} are read"])
    return columns, [
        _Record(n + 1, {name: values[name][n] for name in values}, len(columns))
        for n in range(count)
    ]


# Volumes ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Finding:
    """What reading one volume gave."""

    problem: str | None
    digest: str | None = None
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    oriented: bool = True


def _read_volume(path: str, recipe: Recipe) -> _Finding:
    try:
        header = read_header(path)
        scan = read_scan(path, recipe.in_channels)
        prepare_scan(scan, recipe, path)
    except VolumeError as error:
        return _Finding(error.reason)
    digest = hashlib.sha256(repr(scan.voxels.shape).encode())
    digest.update(scan.voxels.data)
    return _Finding(None, digest.hexdigest(), header.shape, header.spacing_mm, header.oriented)


def _same_voxels(rows: list[_Row], found: list[_Finding]) -> list[str]:
    first: dict[str, _Row] = {}
    files: set[str] = set()
    problems = []
    for row, finding in zip(rows, found, strict=True):
        assert row.file is not None
        file = _real(row.file)
        if finding.digest is None or file in files:  # the same file twice is told already
            continue
        files.add(file)
        known = first.setdefault(finding.digest, row)
        if known is row:
            continue
        if known.subject is not None and row.subject is not None and known.subject != row.subject:
            subjects = f"{_shown(row.subject)!r} and {_shown(known.subject)!r}"
            problems.append(
                f"{row.name}: the same voxels as {known.name}, but the subjects are {subjects}: "
                "one would leak into the other's fold; keep one, or give both one subject and keep one"
            )
        else:
            problems.append(f"{row.name}: the same voxels as {known.name}: keep one of the rows")
    return problems


def _fold_problems(manifest: Manifest, config: FineTuneConfig) -> list[str]:
    try:
        split_rows(
            manifest,
            fold=config.fold,
            num_folds=config.num_folds,
            cross_validate=config.cross_validate,
        )
    except ManifestError as error:
        return error.problems
    return []


def _notices(found: Iterable[_Finding], recipe: Recipe) -> list[str]:
    good = [finding for finding in found if finding.problem is None]
    if not good:
        return []
    shapes, spacings = np.array([f.shape for f in good]), np.array([f.spacing_mm for f in good])
    notices = [
        f"voxels {_span(shapes, 'd')}, spacing {_span(spacings, '.3g')} mm (x, y, z: left-right, back-front, feet-head)",
        _prepared(shapes, spacings, recipe),
    ]
    blind = sum(not finding.oriented for finding in good)
    if blind:
        notices.append(
            f"{blind} of {len(good)} files state no orientation: LAS is assumed, as the format says"
        )
    return notices


def _prepared(shapes: npt.NDArray[Any], spacings: npt.NDArray[Any], recipe: Recipe) -> str:
    """What the recipe makes of the scans, in words: their new spacing, and how much of them is cut off."""
    targets = np.array(
        [target_spacing(*scan, recipe) for scan in zip(shapes, spacings, strict=True)]
    )
    kept = np.minimum(recipe.volume_shape / np.maximum(np.round(shapes * spacings / targets), 1), 1)
    cropped = int((kept < 1).any(axis=1).sum())
    told = "none is cropped"
    if cropped:
        least, axis = kept.min(), "xyz"[int(kept.min(axis=0).argmin())]
        told = (
            f"{cropped} of {len(kept)} are cropped, one to {least:.0%} of its extent along {axis}"
        )
    voxels = " x ".join(map(str, recipe.volume_shape))
    return f"prepared: {voxels} voxels of {_span(targets, '.3g')} mm; {told}"


def _span(values: npt.NDArray[Any], form: str) -> str:
    low, high = (
        " x ".join(format(value, form) for value in side)
        for side in (values.min(axis=0), values.max(axis=0))
    )
    return low if low == high else f"{low} to {high}"
