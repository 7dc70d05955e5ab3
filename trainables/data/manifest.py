"""A table of volumes -> checked rows, and folds that never share a subject.

The table is CSV or Parquet, recognised by content, with one row per volume and the columns

    path      a .nii or .nii.gz file, or its URL (s3://...); relative paths start at the table's folder
    label     class, a whole number from 0
    subject   the person scanned; all volumes of a subject stay on one side of every split
    split     optional: train, val or test
    fold      optional: a whole number from 0, the fold in which the row validates
    class     optional: name of the class, as `medtune data table` writes it

and any others, which are not read. The table may be an object in object storage itself. In messages row 1 is the first
below the header. Nothing here loads torch.
"""

import difflib
import math
import os
import posixpath
import re
import shlex
import stat
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from trainables.config import class_numbers
from trainables.data.formats import NO_CONTENT
from trainables.data.storage import (
    StorageError,
    absolute,
    bucket_of,
    data_roots,
    is_below,
    is_url,
    url_of,
)
from trainables.data.table_file import COLUMNS, ManifestError, Record, read_records
from trainables.data.visible import visible

SPLITS = ("train", "val", "test")


TOLD_APART = 3
"""Largest number of rows with the very same problem that are listed one by one."""

MOST_RANGES = 8
"""Ranges of row numbers that a line names: the reason has to come soon."""

MOST_CLASSES = 20
"""More different labels than this are a measurement, not classes."""

NEGATIVES = ("no", "negative", "benign", "normal", "healthy", "control", "false", "absent")
"""Words that are taken for class 0 where nothing else is asked for."""

MAX_FOLDS = 50


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
    class_names: tuple[str, ...] = ()
    """Names of the classes by number, from the column `class`; empty unless it has one name for each class."""

    @property
    def classes(self) -> str | None:
        """Return the names of the column `class` as `FineTuneConfig.classes`; None where it gives none."""
        named = ",".join(f"{name}={number}" for number, name in enumerate(self.class_names))
        return named or None


def read_manifest(table: Path, num_classes: int = 2, classes: str | None = None) -> Manifest:
    """Return the rows of a CSV or Parquet table, checked without opening the volumes; URLs are not looked up.

    `classes`: labels with their class numbers, as in `FineTuneConfig.classes`; without it labels are numbers.

    Raises ManifestError with every problem of every row: missing columns, cells and files, labels outside the classes,
    a path twice, words that are no split, a subject on both sides of a split or fold, a class absent from one.
    """
    rows, problems = checked_rows(Path(table), num_classes, classes)
    if problems:
        raise ManifestError(problems)
    return manifest_of(Path(table), rows, num_classes)


def listed_volumes(table: Path) -> list[str]:
    """Return the file or URL of every row, whatever its label and subject are.

    Raises ManifestError where the table cannot be read, or the cell or the file of a row is missing.
    """
    rows, _ = checked_rows(Path(table), 2)
    problems = told_together(
        (row, problem)
        for row in rows
        for cell, problem in row.problems.items()
        if cell in ("path", "cells")
    )
    unread = [f"{row.name}: no path" for row in rows if row.file is None and not row.problems]
    if problems or unread:
        raise ManifestError([*problems, *unread])
    return [str(row.file) for row in rows]


# Rows ------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One row as far as it could be read; what could not is None and has its line in `problems`."""

    number: int
    shown: str
    file: Path | str | None = None
    """Absolute path, or URL."""
    label: int | None = None
    stated_label: int | None = None
    """The label as written, where it is a whole number, allowed or not."""
    label_text: str = ""
    """The label's cell."""
    class_name: str = ""
    """The cell of the column `class`."""
    subject: str | None = None
    split: str | None = None
    fold: int | None = None
    problems: dict[str, str] = field(default_factory=dict)
    """Column -> the problem of the row's cell."""

    @property
    def name(self) -> str:
        return f"row {self.number} (scan {self.shown})" if self.shown else f"row {self.number}"


def checked_rows(
    table: Path, num_classes: int, classes: str | None = None
) -> tuple[list[Row], list[str]]:
    """All rows, and all problems: of the columns, of each row, and between rows."""
    if problem := _outside(table):
        raise ManifestError(f"table {url_of(table) or table}: {problem}")
    columns, records = read_records(table)
    problems = _column_problems(columns)
    if not records:
        raise ManifestError(
            [*problems, f"table {url_of(table) or table}: no rows; a row a volume is needed"]
        )
    folder = absolute(table).rpartition("/")[0]
    known = class_numbers(classes) if classes else {}
    rows = [_row(record, len(columns), folder, num_classes, known) for record in records]
    problems += _row_problems(rows)
    if any("path" in row.problems for row in rows) and (link := _link_of(table)):
        problems.append(link)
    problems += _same_files(rows)
    problems += _split_problems(rows, num_classes)
    return rows, problems


def _link_of(table: Path) -> str | None:
    """A line on where a table's relative paths start, where the table is a link: there are two folders to think of."""
    if is_url(table) or not table.is_symlink():
        return None
    return (
        f"table {table}: a link to {os.path.realpath(table)}; relative paths start at the folder of the link, "
        f"{Path(absolute(table)).parent}"
    )


def _row_problems(rows: list[Row]) -> list[str]:
    """Each row's problems, in a line for each; a problem that many rows share, such as a coding from 1, in one line.

    Measurements as labels, nearly every row's another, are one problem of the table and not one of each row.
    """
    of_labels = _what_labels_are(rows)
    values = {row.label_text for row in rows if "label" in row.problems}
    measured = bool(of_labels) and len(values) > MOST_CLASSES
    told = of_labels + told_together(
        (row, problem)
        for row in rows
        for column, problem in row.problems.items()
        if not (measured and column == "label" and row.label_text)
    )
    return _coded_from_one(rows) + told


def _coded_from_one(rows: list[Row]) -> list[str]:
    """A line on labels that are class numbers but for their beginning at 1."""
    labels = {row.stated_label for row in rows if row.stated_label is not None}
    if not labels or min(labels) != 1 or not any("label" in row.problems for row in rows):
        return []
    return [
        f"labels begin at 1, up to {max(labels)}; classes are counted from 0: subtract 1 from every label"
    ]


def told_together(found: Iterable[tuple[Row, str]]) -> list[str]:
    """Return one line for each row and its problem; a problem that more than TOLD_APART rows share is one line for all."""
    pairs = list(found)
    alike: dict[str, list[Row]] = defaultdict(list)
    for row, problem in pairs:
        alike[problem].append(row)
    many = {problem: those for problem, those in alike.items() if len(those) > TOLD_APART}
    told = [
        f"rows {_ranges([row.number for row in those])} ({len(those)}{_first_scan(those)}): {problem}"
        for problem, those in many.items()
    ]
    return told + [f"{row.name}: {one}" for row, one in pairs if one not in many]


def _what_labels_are(rows: list[Row]) -> list[str]:
    """A line on labels that are words, or measurements, in enough rows to be meant as such."""
    wrong = [row for row in rows if "label" in row.problems and row.label_text]
    if len(wrong) <= TOLD_APART or 2 * len(wrong) < len(rows):
        return []
    counts = Counter(row.label_text for row in wrong)
    if _are_words(counts):
        listed = ", ".join(f"{_quoted(text)} {count}" for text, count in counts.most_common())
        return [
            f"labels are words ({listed} rows): give each class a whole number from 0, the positive one of two classes 1, "
            f"in the table{_class_options(counts)}"
        ]
    numbers = [number for text in counts if (number := _as_number(text)) is not None]
    if len(counts) > MOST_CLASSES and len(numbers) == len(counts):
        return [
            f"labels are measurements ({len(counts)} different values from {min(numbers):g} to {max(numbers):g}): classes "
            "are whole numbers from 0; cut the values into classes first"
        ]
    return []


def _are_words(labels: Collection[str]) -> bool:
    named = len(labels) <= MOST_CLASSES and "" not in labels
    return named and all(_as_number(text) is None for text in labels)


def _class_options(counts: Mapping[str, int]) -> str:
    """How `classes` numbers these words in a study file, and on a command line."""
    if any(set(",=") & set(word) for word in counts):
        return ""
    shown = {shown_cell(word): number for number, word in enumerate(words_in_order(counts))}
    in_file = ", ".join(f"{word}: {number}" for word, number in shown.items())
    option = shlex.quote("classes=" + ",".join(f"{word}={n}" for word, n in shown.items()))
    return f", in the study file (`classes: {{{in_file}}}`), or with `--set {option}`"


def words_in_order(words: Iterable[str]) -> list[str]:
    """Return labels that are words in the order of their class numbers: NEGATIVES first, then by name."""
    return sorted(words, key=lambda word: (word.casefold() not in NEGATIVES, word))


def numbered_words(table: Path) -> dict[str, int]:
    """Return a class number for each word that a table has as labels; empty where its labels are no words.

    Raises ManifestError where the table cannot be read.
    """
    _, records = read_records(table)
    words = words_in_order({cell_text(record.cells.get("label")) for record in records})
    if len(words) < 2 or not _are_words(words) or any(set(",=") & set(word) for word in words):
        return {}
    return {word: number for number, word in enumerate(words)}


def _as_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _first_scan(rows: list[Row]) -> str:
    shown = next((row.shown for row in rows if row.shown), None)
    return f", first scan {shown}" if shown else ""


def _ranges(numbers: Sequence[int]) -> str:
    """`1-3, 7` for 1, 2, 3 and 7, which ascend; of more than MOST_RANGES parts the first ones and the last."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    shown = ["-".join(map(str, part)) for part in parts]
    if len(shown) > MOST_RANGES + 1:
        shown[MOST_RANGES:-1] = ["..."]
    return ", ".join(shown)


def _column_problems(columns: list[str]) -> list[str]:
    words = {word.strip().lower() for word in re.split(r"[;\t|]", "|".join(columns))}
    if not any(difflib.get_close_matches(name, words, n=1) for name in COLUMNS):
        # It may be any file, named by mistake or by another user: its content belongs in no message.
        return [
            "the header names none of path, label and subject: is this the table of volumes? Its content is not shown. "
            "Of these columns: " + "; ".join(f"{name} is {what}" for name, what in COLUMNS.items())
        ]
    missing = [_missing_column(name, columns) for name in COLUMNS if name not in columns]
    return missing + [
        f"column {column!r} is there twice: remove one"
        for column, count in Counter(columns).items()
        if count > 1 and column in (*COLUMNS, "split", "fold")
    ]


def _missing_column(name: str, columns: list[str]) -> str:
    folded = {column.strip().lower(): column for column in columns}
    near = folded.get(name) or next(iter(difflib.get_close_matches(name, columns, n=1)), None)
    hint = f" (is it {shown_cell(near)!r}? rename that)" if near else ""
    found = ", ".join(map(shown_cell, columns[:12])) + (", ..." if len(columns) > 12 else "")
    problem = f"no column {name!r}{hint}; the columns are {found}. It is {COLUMNS[name]}"
    if len(columns) == 1 and re.search(r"[;\t|]", columns[0]):
        problem += ". Columns must be separated by commas"
    return problem


def _row(
    record: "Record", width: int, folder: str, num_classes: int, known: Mapping[str, int]
) -> Row:
    values = {name: cell_text(cell) for name, cell in record.cells.items()}
    row = Row(record.number, shown_cell(values.get("path", "")))
    if record.width != width:
        row.problems["cells"] = (
            f"{record.width} cells, the header has {width}: quote a cell that contains a comma"
        )
        return row
    if "path" in values:
        row.file, problem = place_of(values["path"], folder)
        if problem:
            row.problems["path"] = problem
    if "label" in values:
        _read_label(row, values["label"], num_classes, known)
    row.class_name = values.get("class", "")
    if "subject" in values:
        row.subject = values["subject"] or None
        if row.subject is None:
            row.problems["subject"] = (
                "no subject: name the person that the volume shows, as in all of that person's volumes"
            )
    _read_side(row, values.get("split"), values.get("fold"))
    return row


def _read_label(row: Row, text: str, num_classes: int, known: Mapping[str, int]) -> None:
    row.label_text = text
    row.label = row.stated_label = known.get(text, whole_number(text))
    if row.label is None or row.label >= num_classes:
        row.problems["label"] = _label_problem(text, num_classes, known)
        row.label = None


def _read_side(row: Row, split: str | None, fold: str | None) -> None:
    """Take in the cells that place a row in the table's own split or folds."""
    if split in SPLITS:
        row.split = split
    elif split:
        near = difflib.get_close_matches(split.lower(), [*SPLITS, "valid", "training"], n=1)
        words = [{"valid": "val", "training": "train"}.get(word, word) for word in near]
        hint = f"; did you mean {words[0]!r}?" if words else ""
        row.problems["split"] = f"split {_quoted(split)}: train, val or test is needed{hint}"
    if fold:
        row.fold = whole_number(fold)
        if row.fold is None or row.fold >= MAX_FOLDS:
            row.problems["fold"] = (
                f"fold {_quoted(fold)}: a whole number from 0 to {MAX_FOLDS - 1} is needed"
            )
            row.fold = None


def _label_problem(text: str, num_classes: int, known: Mapping[str, int]) -> str:
    words = f", or one of {', '.join(map(shown_cell, known))}," if known else ""
    return (
        f"label {_quoted(text)}: a whole number from 0 to {num_classes - 1}{words} is needed "
        f"(num_classes={num_classes})"
    )


def cell_text(cell: Any) -> str:
    """A cell as text: Parquet brings numbers, and whole columns of them as floats as soon as one is missing."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 2**53:
        return str(int(cell))
    return str(cell).strip()


def whole_number(text: str) -> int | None:
    """The number in `7` or `7.0`; None for anything else, negative ones too. int() would take `1_0` and other scripts' digits."""
    found = re.fullmatch(r"([0-9]{1,9})(\.0*)?", text)
    return int(found[1]) if found else None


def place_of(path: str, folder: str) -> tuple[Path | str | None, str | None]:
    """Return the file or URL that a cell `path` of a table in `folder` names, or its problem."""
    if not path:
        return None, "no path"
    if problem := _outside(
        path if is_url(path) or Path(path).is_absolute() else f"{folder}/{path}"
    ):
        return None, problem
    if is_url(path):
        return _object(path)
    if is_url(folder) and not Path(path).is_absolute():
        root, _, below = folder.partition("://")
        return _object(f"{root}://{posixpath.normpath(f'{below}/{path}')}")
    return _local_file(path, folder)


def _local_file(path: str, folder: str) -> tuple[Path | None, str | None]:
    file = Path(folder or "/") / path
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        if file.is_symlink():
            return None, NO_CONTENT
        below = "" if Path(path).is_absolute() else f" below {folder}"
        return None, f"no such file{below}"
    except (OSError, ValueError) as error:  # a loop of links, a name too long, a NUL
        return None, f"no file that can be read: {getattr(error, 'strerror', None) or error}"
    if not stat.S_ISREG(mode):
        what = "folder" if stat.S_ISDIR(mode) else "pipe or device"
        return None, f"a {what}, a .nii or .nii.gz file is needed"
    if not os.access(file, os.R_OK):
        return None, "this user may not read it: change its permissions"
    return file, None


def _outside(place: str | Path) -> str | None:
    """The problem of a table or volume outside the folders that this process may read; None where there is none."""
    roots = data_roots()
    if not roots or is_below(place, roots):
        return None
    return f"outside the folders that may be read: {', '.join(roots)}"


def _object(url: str) -> tuple[str | None, str | None]:
    try:
        bucket_of(url)
    except StorageError as error:
        return None, str(error)
    return url_of(url), None


def shown_cell(text: str) -> str:
    """Text from a table that is safe in a terminal and in a line: names may hold anything."""
    text = visible(text)
    return text if len(text) <= 120 else f"{text[:60]}...{text[-57:]}"


def _quoted(text: str) -> str:
    return repr(shown_cell(text)) if text else "is missing"


def manifest_of(table: Path, rows: list[Row], num_classes: int) -> Manifest:
    columns = {
        "path": pd.Series([str(row.file) for row in rows], dtype=object),
        "label": pd.Series([row.label for row in rows], dtype=np.int64),
        "subject": pd.Series([row.subject for row in rows], dtype=object),
        "split": pd.Series([row.split for row in rows], dtype=object),
        "fold": pd.Series([row.fold for row in rows], dtype="Int64"),
    }
    return Manifest(
        absolute(table),
        pd.DataFrame(columns),
        num_classes,
        tuple(row.number for row in rows),
        _class_names(rows, num_classes),
    )


def _class_names(rows: list[Row], num_classes: int) -> tuple[str, ...]:
    """The name of each class, where the column `class` gives each exactly one, distinct and without `,` or `=`."""
    names = {(row.label, row.class_name) for row in rows}
    found = tuple(name for _, name in sorted(names, key=lambda one: one[0] or 0))
    whole = [label for label, _ in sorted(names, key=lambda one: one[0] or 0)] == [
        *range(num_classes)
    ]
    plain = all(found) and len(set(found)) == len(found) and not set("".join(found)) & {",", "="}
    return found if whole and plain else ()


# Between rows ----------------------------------------------------------------------------------------------------------


def _same_files(rows: list[Row]) -> list[str]:
    first: dict[str, Row] = {}
    problems = []
    for row in rows:
        if row.file is not None:
            known = first.setdefault(real_path(row.file), row)
            if known is not row:
                problems.append(f"{row.name}: the same file as {known.name}: keep one of the rows")
    return problems


def real_path(file: Path | str) -> str:
    return file if isinstance(file, str) else os.path.realpath(file)


def _split_problems(rows: list[Row], num_classes: int) -> list[str]:
    """Problems of the table's own split and folds; classes are counted only where every label and split is known."""
    sound = [row for row in rows if "split" not in row.problems]
    counted = len(sound) == len(rows) and all(row.label is not None for row in rows)
    words = {row.split for row in sound} - {None}
    problems = _side_problems(sound, bool(words & {"train", "val"}))
    if counted:
        problems += _class_problems(rows, words, num_classes)
    pool = [row for row in sound if row.split != "test" and "fold" not in row.problems]
    return problems + _given_fold_problems(pool, counted, num_classes)


def _side_problems(rows: list[Row], divided: bool) -> list[str]:
    """Subjects on several sides of the split, and rows without one; `test` alone leaves the others to be folded."""
    if not divided:
        return _leaks([(row, row.split or "no split") for row in rows])
    bare = [
        f"{row.name}: no split, other rows have one: train, val or test"
        for row in rows
        if row.split is None
    ]
    return bare + _leaks([(row, row.split) for row in rows if row.split is not None])


def _class_problems(rows: list[Row], words: set[str | None], num_classes: int) -> list[str]:
    if "val" in words:
        return [
            problem
            for word in ("train", "val")
            for problem in _absent(
                [row for row in rows if row.split == word], f"split {word!r}", num_classes
            )
        ]
    where = "the table, less its test rows," if "test" in words else "the table"
    return _absent([row for row in rows if row.split != "test"], where, num_classes)


def _given_fold_problems(pool: list[Row], counted: bool, num_classes: int) -> list[str]:
    given = [row.fold for row in pool if row.fold is not None]
    if not given:
        return []
    problems = [
        f"{row.name}: no fold, other rows have one: number it, or make it split=test"
        for row in pool
        if row.fold is None
    ]
    problems += _leaks([(row, f"fold {row.fold}") for row in pool if row.fold is not None])
    numbers = sorted(set(given))
    if wrong := _numbering_problem(numbers):
        problems.append(wrong)
    elif counted and len(given) == len(pool):
        problems += _fold_class_problems(pool, numbers, num_classes)
    return problems


def _numbering_problem(numbers: list[int]) -> str | None:
    """The problem with the numbers, ascending, of a table's folds."""
    gaps = [str(number) for number in range(numbers[-1]) if number not in numbers]
    if gaps:
        return f"no row is in fold {', '.join(gaps)}: folds are numbered from 0 without gaps"
    return "every row is in fold 0: two folds or more are needed" if len(numbers) == 1 else None


def _fold_class_problems(pool: list[Row], numbers: list[int], num_classes: int) -> list[str]:
    problems = []
    for number in numbers:
        inside = [row for row in pool if row.fold == number]
        outside = [row for row in pool if row.fold != number]
        problems += _absent(inside, f"the validation part of fold {number}", num_classes)
        problems += _absent(outside, f"the training part of fold {number}", num_classes)
    return problems


def _leaks(sides: list[tuple[Row, str]]) -> list[str]:
    """A line for each subject that is on more than one side."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for row, side in sides:
        if row.subject is not None:
            found[row.subject].setdefault(side, row)
    return [
        f"subject {shown_cell(subject)!r} is in {' and in '.join(f'{side} (row {row.number})' for side, row in firsts.items())}: "
        "all volumes of a subject belong on one side"
        for subject, firsts in found.items()
        if len(firsts) > 1
    ]


def _absent(part: list[Row], where: str, num_classes: int) -> list[str]:
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
