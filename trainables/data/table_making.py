"""A folder of scans and a label sheet -> the table that everything else reads.

The folder may be plain, BIDS (`sub-01/anat/sub-01_T1w.nii.gz`) or nnU-Net's `imagesTr` (`case_0000.nii.gz`). The sheet
is CSV, TSV, Excel or JSON; a JSON file may also be a MONAI datalist. Whatever is guessed is reported. Nothing here
loads torch.
"""

import csv
import io
import os
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainables.checkpoints import replacing
from trainables.data.formats import FoundScan, has_scan_name, scans_below
from trainables.data.json_files import parse_json, regular_bytes
from trainables.data.manifest import MOST_CLASSES, words_in_order
from trainables.data.table_file import MAX_TABLE_BYTES, ManifestError

ID_NAMES = ("id", "scan", "image", "file", "filename", "path", "case", "name", "participant_id")
LABEL_NAMES = ("label", "class", "diagnosis", "target", "group", "outcome", "malignancy", "y")
SUBJECT_NAMES = ("subject", "subject_id", "patient", "patient_id", "participant_id", "person")
SHOWN = 5
"""Names listed in a message; the rest are counted."""


@dataclass(frozen=True)
class Sheet:
    """A label sheet: one dict of texts per row, and the column names in their order."""

    columns: tuple[str, ...]
    rows: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class JoinedTable:
    """What `join_table` found: rows of the new table, classes by number, and lines to show."""

    rows: tuple[Mapping[str, str], ...]
    """Columns path, label, subject, class and, where the sheet has them, split and fold."""
    classes: tuple[str, ...]
    """Name of each class, by its number."""
    lines: tuple[str, ...]
    """The guesses, and the items without a match."""


@dataclass(frozen=True)
class JoinOptions:
    """The caller's settings; None is guessed, and the guess is reported."""

    id_column: str | None = None
    label_column: str | None = None
    subject: str | None = None
    """A column of the sheet, or a regular expression with one group, searched in each scan's path."""
    one_subject_per_scan: bool = False
    positive: str | None = None
    """The label that is class 1; every other label is class 0."""
    classes: Mapping[str, int] = field(default_factory=dict)
    """Label as written -> class number."""
    pattern: str = "*"
    """Which files of the folder are scans: a glob on the file name."""


def join_table(scans: Path, labels: Path, options: JoinOptions) -> JoinedTable:
    """Join the scans of a folder with a label sheet.

    Raises ManifestError with every problem: no scans, columns that cannot be guessed, labels that are measurements,
    scans whose subject is unknown.
    """
    if options.subject is not None and options.one_subject_per_scan:
        raise ManifestError("--subject and --one-subject-per-scan contradict each other")
    found, unread = find_scans(scans, options.pattern)
    if not found:
        raise ManifestError(_nothing_found(scans, options.pattern, unread))
    sheet = read_sheet(labels)
    lines = [f"{len(found)} scans in {scans}, {len(sheet.rows)} rows in {labels}"]
    id_column, key = _matching(found, sheet, options.id_column, scans, labels)
    matched = _matches(found, sheet, id_column, key, scans)
    lines.append(f"id: column {id_column!r}, compared with {KEYS[key]} of each scan")
    label_column = _label_column(sheet, options.label_column, {id_column}, labels)
    lines.append(f"label: column {label_column!r}")
    labelled = [(scan, row) for scan, row in matched if row[label_column]]
    classes, class_of = _classes([row[label_column] for _, row in labelled], label_column, options)
    lines += _count_lines(classes, [class_of[row[label_column]] for _, row in labelled])
    lines += [f"{one.path}: {one.problem}" for one in unread]
    lines += _unmatched_lines(found, matched, labelled, sheet, id_column, scans)
    subject_of, line = _subjects(sheet, options, labelled, id_column, key, scans)
    lines.append(line)
    rows = []
    for scan, row in labelled:
        number = class_of[row[label_column]]
        cells = {"path": str(scan), "label": str(number), "subject": subject_of(scan, row)}
        rows.append({**cells, "class": classes[number], **_placement(row)})
    return JoinedTable(tuple(rows), classes, tuple(lines))


def _placement(row: Mapping[str, str]) -> dict[str, str]:
    """The cells of a row that place it in a split or fold of the user's own."""
    return {name: row[name] for name in ("split", "fold") if row.get(name)}


def write_table(joined: JoinedTable, path: Path, *, force: bool = False) -> None:
    """Write the table as CSV, paths relative to its folder where the scans are below it.

    Raises ManifestError when there is a file already, without `force`.
    """
    if path.exists() and not force:
        raise ManifestError(f"{path}: exists already; --force overwrites it")
    columns = ["path", "label", "subject", "class"]
    columns += [name for name in ("split", "fold") if any(name in row for row in joined.rows)]
    folder = _plain(path).parent
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in joined.rows:
        scan = _plain(Path(row["path"]))
        shown = scan.relative_to(folder) if scan.is_relative_to(folder) else scan
        writer.writerow({**row, "path": shown.as_posix()})
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(stream.getvalue(), encoding="utf-8")


def _plain(path: Path) -> Path:
    """The absolute path without `..`; links stay, as a linked table belongs to the link's folder."""
    return Path(os.path.normpath(path.absolute()))


# Scans ---------------------------------------------------------------------------------------------


def find_scans(folder: Path, pattern: str = "*") -> tuple[list[Path], list[FoundScan]]:
    """Return the NIfTI files below `folder` whose name matches the glob, by path, and files that cannot be read.

    Raises ManifestError when `folder` is no folder.
    """
    if not folder.is_dir():
        raise ManifestError(f"{folder}: no such folder of scans")
    found, _ = scans_below(folder)
    named = [one for one in found if one.problem is None and has_scan_name(one.path.name)]
    scans = sorted(one.path for one in named if one.path.match(pattern))
    return scans, [one for one in found if one.problem is not None]


def _nothing_found(folder: Path, pattern: str, unread: Sequence[FoundScan]) -> list[str]:
    here = f"{folder}: no .nii or .nii.gz file"
    here += f" whose name matches {pattern!r}" if pattern != "*" else ""
    kinds = Counter(one.format for one in unread if one.format is not None)
    if not kinds:
        return [here, *(f"{one.path}: {one.problem}" for one in unread)]
    named = [f"{count} {kind} files" for kind, count in kinds.items()]
    how = "dcm2niix converts DICOM" if kinds["DICOM"] else "convert them with 3D Slicer or ITK"
    return [f"{here}, but {', '.join(named)}: {how} to NIfTI"]


def convert_dicom(folder: Path, target: Path) -> list[str]:
    """Convert the DICOM series below `folder` to NIfTI files in `target` with dcm2niix; returns lines to show.

    File names are `<patient id>_<series number>`. Raises ManifestError where dcm2niix is not installed or fails.
    """
    program = shutil.which("dcm2niix")
    if program is None:
        raise ManifestError(
            f"{folder}: DICOM is converted by dcm2niix, which is not installed here"
        )
    target.mkdir(parents=True, exist_ok=True)
    command = [program, "-z", "y", "-f", "%i_%s", "-o", str(target), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    made = len(find_scans(target)[0])
    if done.returncode != 0 or not made:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
        raise ManifestError(f"{folder}: dcm2niix ended with {done.returncode}: {reason[0]}")
    return [f"dcm2niix wrote {made} volumes to {target}"]


# Sheet ---------------------------------------------------------------------------------------------


def read_sheet(path: Path) -> Sheet:
    """Return a label sheet: CSV, TSV, Excel (.xlsx), JSON (a list of objects, or a MONAI datalist).

    Raises ManifestError when it cannot be read, or has no rows.
    """
    try:
        content = regular_bytes(path, MAX_TABLE_BYTES)
    except OSError as error:
        raise ManifestError(f"label sheet {path}: {error.strerror}") from None
    header, *body = _table(path, content)
    columns = [cell.strip() for cell in header]
    twice = [name for name, count in Counter(filter(None, columns)).items() if count > 1]
    if twice:
        raise ManifestError(f"label sheet {path}: duplicate column {twice[0]!r}: rename one")
    rows = [dict(zip(columns, cells, strict=False)) for cells in filter(any, body)]
    names = tuple(filter(None, columns))
    if not rows:
        raise ManifestError(f"label sheet {path}: no rows below the header")
    return Sheet(names, tuple({name: row.get(name, "") for name in names} for row in rows))


def _table(path: Path, content: bytes) -> list[list[str]]:
    """The cells of a sheet in any of the formats, its header first."""
    if content.startswith(b"PK\x03\x04"):
        return _excel(path, content)
    return _json(path, content) if content.lstrip()[:1] in (b"{", b"[") else _text(path, content)


def _excel(path: Path, content: bytes) -> list[list[str]]:
    try:
        import openpyxl
    except ImportError:
        raise ManifestError(
            f"label sheet {path}: Excel needs `pip install openpyxl`, or save the sheet as CSV"
        ) from None
    try:
        book = openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=True)
        sheet = book.worksheets[0]
        rows = [[_cell(value) for value in row] for row in sheet.iter_rows(values_only=True)]
    except (ValueError, KeyError, OSError, IndexError) as error:
        raise ManifestError(f"label sheet {path}: not an Excel workbook: {error}") from None
    return _from_first_filled(rows)


def _text(path: Path, content: bytes) -> list[list[str]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ManifestError(f"label sheet {path}: not UTF-8 text: save it as UTF-8") from None
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(",;\t|", key=first.count)
    try:
        rows = [
            [cell.strip() for cell in row]
            for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        ]
    except csv.Error as error:
        raise ManifestError(f"label sheet {path}: not a table of text: {error}") from None
    return _from_first_filled(rows)


def _from_first_filled(rows: list[list[str]]) -> list[list[str]]:
    first = next((number for number, row in enumerate(rows) if any(row)), len(rows))
    return rows[first:] or [[]]


def _json(path: Path, content: bytes) -> list[list[str]]:
    try:
        value = parse_json(content)
    except ValueError as error:
        raise ManifestError(f"label sheet {path}: not JSON: {error}") from None
    items = value if isinstance(value, list) else _datalist(value)
    if not items or not all(isinstance(item, dict) for item in items):
        raise ManifestError(
            f"label sheet {path}: a list of objects is needed, or a MONAI datalist "
            '({"training": [{"image": ..., "label": ...}]})'
        )
    if any(str(item.get("label", "")).lower().endswith((".nii", ".nii.gz")) for item in items):
        raise ManifestError(
            f"label sheet {path}: its labels are segmentation files; a class per scan is needed: "
            "give a sheet with one class per case"
        )
    columns = list(dict.fromkeys(str(name) for item in items for name in item))
    return [columns, *([_cell(item.get(name)) for name in columns] for item in items)]


def _datalist(value: Mapping[str, Any]) -> list[Any]:
    """The entries of a MONAI datalist; which list an entry is in becomes its split."""
    words = {"training": "train", "train": "train", "validation": "val", "val": "val"}
    words |= {"test": "test", "testing": "test"}
    items = []
    for name, split in words.items():
        for item in value.get(name, []) if isinstance(value.get(name), list) else []:
            items.append({**item, "split": split} if isinstance(item, dict) else item)
    only = {item["split"] for item in items if isinstance(item, dict)}
    if len(only) < 2:  # a datalist with folds, or one list: it defines no split
        items = [
            {name: cell for name, cell in item.items() if name != "split"}
            if isinstance(item, dict)
            else item
            for item in items
        ]
    return items


def _cell(value: Any) -> str:
    """A cell as text; 7.0, as Excel stores a 7, is `7`."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


# Matching ------------------------------------------------------------------------------------------


KEYS = {
    "path": "the path below the folder",
    "file": "the file name",
    "stem": "the file name without its extension",
    "case": "the file name without extension and channel number",
    "bids": "the BIDS subject",
    "folder": "the name of the folder it is in",
}
"""What of a scan an id is compared with, most specific first."""


def _key(kind: str, scan: Path, folder: Path) -> str:
    stem = re.sub(r"\.nii(\.gz)?$", "", scan.name, flags=re.IGNORECASE)
    if kind == "path":
        return scan.relative_to(folder).as_posix()
    if kind == "file":
        return scan.name
    if kind == "case":
        return re.sub(r"_\d{4}$", "", stem)
    if kind == "bids":
        return _bids_subject(scan, folder) or ""
    return scan.parent.name if kind == "folder" else stem


def _bids_subject(scan: Path, folder: Path) -> str | None:
    found = re.search(r"(?:^|[/_])(sub-[A-Za-z0-9]+)", scan.relative_to(folder).as_posix())
    return found[1] if found else None


def _normal(identifier: str) -> str:
    """An id without what spreadsheets and people change: case, `sub-`, `./`, extension, leading zeros."""
    text = identifier.strip().replace("\\", "/").removeprefix("./").casefold()
    text = re.sub(r"\.nii(\.gz)?$", "", text).removeprefix("sub-")
    return text.lstrip("0") or "0" if text.isdigit() else text


def _matching(
    scans: Sequence[Path], sheet: Sheet, asked: str | None, folder: Path, labels: Path
) -> tuple[str, str]:
    """Return the id column and the kind of key that match the most scans; the most specific kind among equals."""
    best = (0, False, "", "")
    for column in _candidates(asked, "--id", sheet, labels):
        cells = {_normal(row[column]) for row in sheet.rows if row[column]}
        for kind in KEYS:
            keys = {_normal(_key(kind, scan, folder)) for scan in scans}
            named = column.casefold() in ID_NAMES
            score = (len(keys & cells), named, column, kind)
            best = score if score[:2] > best[:2] else best
    if not best[0]:
        where = f"column {asked!r}" if asked is not None else "no column"
        first = [_key("stem", scan, folder) for scan in scans[:3]]
        raise ManifestError(
            f"label sheet {labels}: {where} names the scans, which are called "
            f"{', '.join(first)}, ...; its columns are {', '.join(sheet.columns)}: "
            "add a column with the file names, and name it with --id"
        )
    return best[2], best[3]


def _matches(
    scans: Sequence[Path], sheet: Sheet, column: str, kind: str, folder: Path
) -> list[tuple[Path, Mapping[str, str]]]:
    rows: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    for row in sheet.rows:
        rows[_normal(row[column])].append(row)
    matched = []
    problems = []
    for scan in scans:
        found = rows.get(_normal(_key(kind, scan, folder)), [])
        if len({tuple(row.items()) for row in found}) > 1:
            problems.append(
                f"scan {scan}: {len(found)} different rows have its id {found[0][column]!r} in column "
                f"{column!r}: keep one, or name another column with --id"
            )
        elif found:
            matched.append((scan, found[0]))
    if problems:
        raise ManifestError(problems)
    return matched


def _label_column(sheet: Sheet, asked: str | None, taken: set[str], labels: Path) -> str:
    others = [name for name in _candidates(asked, "--label", sheet, labels) if name not in taken]
    if asked is not None:
        return asked
    named = [name for word in LABEL_NAMES for name in others if name.casefold() == word]
    return named[0] if named else _only_class_column(others, sheet, labels)


def _only_class_column(columns: Sequence[str], sheet: Sheet, labels: Path) -> str:
    """The column that alone has as many different values as classes may be. Raises ManifestError for none and several."""
    candidates = [
        name
        for name in columns
        if name.casefold() not in (*SUBJECT_NAMES, "split", "fold", "age", "sex", "gender", "site")
        and 2 <= len({row[name] for row in sheet.rows if row[name]}) <= MOST_CLASSES
    ]
    if len(candidates) == 1:
        return candidates[0]
    found = f"any of {', '.join(candidates)} could be it" if candidates else "none could be it"
    raise ManifestError(
        f"label sheet {labels}: which column is the label? {found}: name it with --label"
    )


def _candidates(asked: str | None, option: str, sheet: Sheet, labels: Path) -> Sequence[str]:
    """The columns to choose from: the one asked for with `option`, or all. Raises ManifestError for an unknown one."""
    if asked is None:
        return sheet.columns
    if asked not in sheet.columns:
        raise ManifestError(
            f"label sheet {labels}: no column {asked!r} for {option}; "
            f"its columns are {', '.join(sheet.columns)}"
        )
    return [asked]


# Classes -------------------------------------------------------------------------------------------


def _classes(
    labels: Sequence[str], column: str, options: JoinOptions
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the names of the classes by number, and the class of each label as written."""
    written = sorted(set(labels))
    if options.classes:
        return _mapped_classes(written, column, options.classes)
    if options.positive is not None:
        return _one_against_rest(written, options.positive)
    numbers = [number for word in written if (number := _number(word)) is not None]
    if len(written) > MOST_CLASSES or not all(map(float.is_integer, numbers)):
        raise ManifestError(
            f"label column {column!r}: {len(written)} different values ({', '.join(written[:4])}, "
            "...) look like a measurement. medtune classifies: choose limits and write a "
            "column of classes, or name another column with --label"
        )
    if len(written) < 2:
        raise ManifestError(
            f"label column {column!r}: every scan has {', '.join(written)}: two classes are needed"
        )
    if len(numbers) == len(written):
        written.sort(key=float)
    else:
        written = words_in_order(written)
    return tuple(written), {word: number for number, word in enumerate(written)}


def _one_against_rest(
    written: Sequence[str], positive: str
) -> tuple[tuple[str, ...], dict[str, int]]:
    if positive not in written:
        raise ManifestError(f"--positive {positive!r}: the labels are {', '.join(written[:10])}")
    rest = [word for word in written if word != positive]
    name = rest[0] if len(rest) == 1 else f"not {positive}"
    return (name, positive), {word: int(word == positive) for word in written}


def _mapped_classes(
    written: Sequence[str], column: str, classes: Mapping[str, int]
) -> tuple[tuple[str, ...], dict[str, int]]:
    missing = [word for word in written if word not in classes]
    numbers = sorted(set(classes.values()))
    problems = []
    if missing:
        problems.append(f"label column {column!r}: no class for {', '.join(missing[:10])}")
    if numbers != list(range(len(numbers))):
        problems.append(f"classes {numbers}: they are counted from 0, without gaps")
    if problems:
        raise ManifestError(problems)
    names = tuple(
        "/".join(word for word, number in classes.items() if number == wanted) for wanted in numbers
    )
    return names, dict(classes)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _count_lines(classes: Sequence[str], numbers: Sequence[int]) -> list[str]:
    counts = Counter(numbers)
    named = ", ".join(f"{n} = {name} ({counts[n]})" for n, name in enumerate(classes))
    return [f"classes: {named}"]


# Subjects ------------------------------------------------------------------------------------------


def _subjects(
    sheet: Sheet,
    options: JoinOptions,
    labelled: Sequence[tuple[Path, Mapping[str, str]]],
    id_column: str,
    key: str,
    folder: Path,
) -> tuple[Callable[[Path, Mapping[str, str]], str], str]:
    """Return the subject of each scan, as a function of scan and row, and the line on how it is known."""
    if options.one_subject_per_scan:
        told = "subject: every scan is of another person"
        return lambda scan, _: _key("path", scan, folder), told
    asked = options.subject
    if asked is None:
        asked = _guessed_subject(sheet, id_column, key, labelled) or _subject_in_path(
            labelled, folder
        )
    if asked is None:
        raise ManifestError(
            "whose scans are these? Scans of one person on both sides of a split make every score "
            "worthless. Name a column or a pattern of the path with --subject (for example "
            "--subject '([^_/]+)_[^/]*$'), or state --one-subject-per-scan"
        )
    if asked in sheet.columns:
        empty = [scan for scan, row in labelled if not row[asked]]
        if empty:
            raise ManifestError(
                f"subject column {asked!r}: empty for {_some(_below(folder, empty))}"
            )
        people = len({row[asked] for _, row in labelled})
        return lambda _, row: row[asked], f"subject: column {asked!r}, {people} subjects"
    return _subjects_by_pattern(asked, labelled, sheet, folder)


def _subjects_by_pattern(
    pattern: str,
    labelled: Sequence[tuple[Path, Mapping[str, str]]],
    sheet: Sheet,
    folder: Path,
) -> tuple[Callable[[Path, Mapping[str, str]], str], str]:
    try:
        searched = re.compile(pattern)
    except re.error as error:
        raise ManifestError(f"--subject {pattern!r}: no column, no pattern: {error}") from None
    if searched.groups != 1:
        raise ManifestError(
            f"--subject {pattern!r}: no such column (they are {', '.join(sheet.columns)}), and a "
            "pattern needs one group in parentheses"
        )
    found = {scan: searched.search(scan.relative_to(folder).as_posix()) for scan, _ in labelled}
    without = [scan for scan, match in found.items() if match is None]
    if without:
        raise ManifestError(f"--subject {pattern!r}: not found in {_some(_below(folder, without))}")
    names = {scan: match[1] for scan, match in found.items() if match is not None}
    people = len(set(names.values()))
    return lambda scan, _: names[scan], f"subject: {pattern!r} in the path, {people} subjects"


def _guessed_subject(
    sheet: Sheet, id_column: str, key: str, labelled: Sequence[tuple[Path, Mapping[str, str]]]
) -> str | None:
    for word in SUBJECT_NAMES:
        for name in sheet.columns:
            if name.casefold() == word and all(row[name] for _, row in labelled):
                return name
    shared = len({row[id_column] for _, row in labelled}) < len(labelled)
    return id_column if shared or key in ("bids", "folder") else None


def _subject_in_path(
    labelled: Sequence[tuple[Path, Mapping[str, str]]], folder: Path
) -> str | None:
    """The pattern of BIDS' subjects, where paths have them."""
    in_path = any(_bids_subject(scan, folder) for scan, _ in labelled)
    return r"(sub-[A-Za-z0-9]+)" if in_path else None


def _unmatched_lines(
    scans: Sequence[Path],
    matched: Sequence[tuple[Path, Mapping[str, str]]],
    labelled: Sequence[tuple[Path, Mapping[str, str]]],
    sheet: Sheet,
    id_column: str,
    folder: Path,
) -> list[str]:
    known, kept = dict(matched), dict(labelled)
    used = {row[id_column] for row in known.values()}
    groups = {
        "scans without a row": _below(folder, [scan for scan in scans if scan not in known]),
        "scans with an empty label": _below(folder, [scan for scan in known if scan not in kept]),
        "rows without a scan": [row[id_column] for row in sheet.rows if row[id_column] not in used],
    }
    return [f"{len(names)} {what}: {_some(names)}" for what, names in groups.items() if names]


def _below(folder: Path, scans: Sequence[Path]) -> list[str]:
    return [scan.relative_to(folder).as_posix() for scan in scans]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
