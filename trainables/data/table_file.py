"""A table of volumes as a file: CSV or Parquet, told apart by content, read whole or refused."""

import csv
import io
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.data.storage import StorageError, bucket_of, url_of
from trainables.errors import ProblemsError

COLUMNS = {
    "path": "the NIfTI file of each row",
    "label": "the class of each row, a whole number from 0",
    "subject": (
        "whom each volume is of. Volumes of one subject on both sides of a split make scores worthless, so it is not "
        "guessed; where every volume is of another subject, give each row another value"
    ),
}
"""The columns a table must have, and what they are for."""


MAX_ROWS = 1_000_000


MAX_TABLE_BYTES = 2**28


class ManifestError(ProblemsError):
    """A table that cannot be used. `problems` holds one line a problem, all of them, rows first."""


@dataclass(frozen=True)
class Record:
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
                f"table {table}: a CSV or Parquet file is needed, this is a folder or device"
            )
        return (
            table.read_bytes()
            if found.st_size <= MAX_TABLE_BYTES
            else _too_large(str(table), found.st_size)
        )
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


def _too_large(table: str, size: int) -> bytes:
    most = MAX_TABLE_BYTES // 2**20
    raise ManifestError(
        f"table {table}: {size / 2**20:.0f} MiB, at most {most} are read: is it the table?"
    )


def read_records(table: Path) -> tuple[list[str], list[Record]]:
    """All column names, and the rows."""
    content, named = table_bytes(table), url_of(table) or str(table)
    if content.startswith(b"PAR1"):
        return _parquet(named, content)
    return _csv(named, content)


def _csv(table: str, content: bytes) -> tuple[list[str], list[Record]]:
    kind = None
    if content.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        kind = "looks like a spreadsheet: export it as CSV"
    elif content.startswith((b"\xff\xfe", b"\xfe\xff")):
        kind = "is UTF-16 text: save it as UTF-8"
    elif b"\0" in content:
        kind = "is a binary file: CSV or Parquet is needed"
    if kind:
        raise ManifestError(f"table {table}: {kind}")
    try:
        lines = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ManifestError(
            f"table {table}: line {line} is not UTF-8 text: save it as UTF-8"
        ) from None
    except csv.Error as error:
        raise ManifestError(f"table {table}: not a CSV table: {error}") from None
    if len(lines) > MAX_ROWS:
        raise ManifestError(f"table {table}: {len(lines)} rows, at most {MAX_ROWS} are read")
    header = next((number for number, cells in enumerate(lines) if _filled(cells)), None)
    if header is None:
        raise ManifestError(
            f"table {table}: empty: a header with path, label, subject and a row a volume are needed"
        )
    columns = [name.strip() for name in lines[header]]
    rows = enumerate(lines[header + 1 :], 1)
    return columns, [
        Record(n, dict(zip(columns, cells, strict=False)), len(cells))
        for n, cells in rows
        if _filled(cells)
    ]


def _filled(cells: list[str]) -> bool:
    return any(cell.strip() for cell in cells)


def _parquet(table: str, content: bytes) -> tuple[list[str], list[Record]]:
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
        raise ManifestError(f"table {table}: not a Parquet table: {reason}") from None
    if count > MAX_ROWS:
        raise ManifestError(f"table {table}: {count} rows, at most {MAX_ROWS} are read")
    return columns, [
        Record(n + 1, {name: values[name][n] for name in values}, len(columns))
        for n in range(count)
    ]
