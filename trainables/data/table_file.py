"""A table of volumes as a file: CSV or Parquet, recognised by content, read whole or refused."""

import csv
import io
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from trainables.data.storage import StorageError, bucket_of, url_of
from trainables.errors import ProblemsError

COLUMNS = {
    "path": "the NIfTI file of each row",
    "label": "the class of each row, a whole number from 0",
    "subject": (
        "the person that each volume shows. Volumes of one subject on both sides of a split make scores worthless, so it is not "
        "guessed; where every volume is of another subject, give each row another value"
    ),
}
"""The columns a table must have, and their purpose."""


MAX_ROWS = 1_000_000


MAX_TABLE_BYTES = 2**28


class ManifestError(ProblemsError):
    """A table that cannot be used. `problems` holds one line a problem, all of them, rows first."""


@dataclass(frozen=True)
class Record:
    """A row as the file holds it: text from CSV, any value from Parquet."""

    number: int
    cells: dict[str, Any]
    width: int


NO_TABLES = {
    "looks like a spreadsheet: export it as CSV": (b"PK\x03\x04", b"\xd0\xcf\x11\xe0"),
    "is UTF-16 text: save it as UTF-8": (b"\xff\xfe", b"\xfe\xff"),
    "is compressed: CSV or Parquet is needed; unpack it (`gunzip` for .gz)": (
        b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd",
    ),
    "is a Feather (Arrow) file: CSV or Parquet is needed (`to_parquet` in pandas)": (
        b"ARROW1", b"FEA1",
    ),
}  # fmt: skip
"""What a file is that cannot be read as a table, and what to do -> how such files begin."""


def table_bytes(table: Path) -> bytes:
    """Return the table's content, of a file or a URL. Raises ManifestError."""
    try:
        if (url := url_of(table)) is not None:
            bucket, name = bucket_of(url)
            with bucket.opened(name) as (stream, size):
                if size > MAX_TABLE_BYTES:
                    _too_large(url, size)
                return stream.read()
        found = table.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ManifestError(
                f"table {table}: a CSV or Parquet file is needed, this is a folder or device"
            )
        if found.st_size > MAX_TABLE_BYTES:
            _too_large(str(table), found.st_size)
        return table.read_bytes()
    except FileNotFoundError:
        what = "file" if url_of(table) is None else "object"
        raise ManifestError(f"table {url_of(table) or table}: no such {what}") from None
    except StorageError as error:
        raise ManifestError(f"table {url_of(table)}: {error}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(
            f"table {table}: cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None


def _too_large(table: str, size: int) -> NoReturn:
    most = MAX_TABLE_BYTES // 2**20
    raise ManifestError(
        f"table {table}: {size / 2**20:.0f} MiB, at most {most} are read: is it the table?"
    )


def read_records(table: Path) -> tuple[list[str], list[Record]]:
    """Return all column names, and the rows that are not empty. Row 1 is the first line below the header.

    Every table of volumes is read here; its format is recognised by content, whatever its name. Spaces around cells, empty
    lines and empty cells beyond the last column are dropped. Raises ManifestError: no file, too large, no CSV and no
    Parquet.
    """
    content, named = table_bytes(table), url_of(table) or str(table)
    if content.startswith(b"PAR1"):
        return _parquet(named, content)
    return _csv(named, content)


def _csv(table: str, content: bytes) -> tuple[list[str], list[Record]]:
    for kind, starts in NO_TABLES.items():
        if content.startswith(starts):
            raise ManifestError(f"table {table}: {kind}")
    if b"\0" in content:
        raise ManifestError(f"table {table}: is a binary file: CSV or Parquet is needed")
    try:
        lines = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        columns = next((names for cells in lines if (names := _trimmed(cells, 0))), None)
        if columns is None:
            raise ManifestError(f"table {table}: empty: a header and rows are needed")
        records = []
        for number, cells in enumerate(lines, 1):
            if number > MAX_ROWS:  # of all lines: a file of line ends alone would fill the memory
                raise ManifestError(
                    f"table {table}: more than {MAX_ROWS} rows, at most {MAX_ROWS} are read"
                )
            if any(cell.strip() for cell in cells):
                cells = _trimmed(cells, len(columns))
                named = dict(zip(columns, cells, strict=False))
                records.append(Record(number, named, len(cells)))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ManifestError(
            f"table {table}: line {line} is not UTF-8 text: save it as UTF-8"
        ) from None
    except csv.Error as error:
        raise ManifestError(f"table {table}: not a CSV table: {error}") from None
    return columns, records


def _trimmed(cells: list[str], width: int) -> list[str]:
    """The cells without spaces around them, and without the empty ones that trailing commas add beyond `width`."""
    cells = [cell.strip() for cell in cells]
    while len(cells) > width and not cells[-1]:
        cells.pop()
    return cells


def _parquet(table: str, content: bytes) -> tuple[list[str], list[Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    unreadable = (pa.ArrowException, OSError, ValueError, OverflowError)
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        schema, count = file.schema_arrow, file.metadata.num_rows
    except unreadable as error:
        raise _no_parquet(table, error) from None
    columns = [str(name).strip() for name in schema.names]
    if count > MAX_ROWS:
        raise ManifestError(f"table {table}: {count} rows, at most {MAX_ROWS} are read")
    wanted = {
        name: schema.names[columns.index(name)]
        for name in (*COLUMNS, "split", "fold", "class")
        if columns.count(name) == 1
    }
    texts = [name for name in wanted.values() if _is_text(schema.field(name).type)]
    try:
        # As dictionaries: a long text that is in every row is in the file, and in memory, once.
        file = pq.ParquetFile(pa.BufferReader(content), read_dictionary=texts)
        read = file.read(columns=list(wanted.values())) if wanted else None
        size = 0 if read is None else sum(_expanded_bytes(column) for column in read.columns)
        values = (
            {name: read[there].to_pylist() for name, there in wanted.items()}
            if read is not None and size <= MAX_TABLE_BYTES
            else {}
        )
    except unreadable as error:
        raise _no_parquet(table, error) from None
    if size > MAX_TABLE_BYTES:
        _too_large(table, size)
    return columns, [
        Record(n + 1, {name: values[name][n] for name in values}, len(columns))
        for n in range(count)
    ]


def _no_parquet(table: str, error: Exception) -> ManifestError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ManifestError(f"table {table}: not a Parquet table: {reason}")


def _is_text(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "binary", "large_binary")


def _expanded_bytes(column: Any) -> int:
    """Bytes of the column's texts as Python objects would hold them, each row separately."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = (
        pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)) for chunk in column.chunks
    )
    return sum(length.as_py() or 0 for length in lengths)
