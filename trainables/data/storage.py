"""Object storage, as a study uses it: whole objects by name below one URL. No Ray and no torch here.

An object is there whole or not at all, as a renamed file is, so what holds for a study's folder holds for its copy.
"""

import io
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast
from urllib.parse import quote

from trainables.checkpoints import HURRY, TrialFiles, replacing

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")
OF_URLS = "%:/?[]@!$&'()*+,;="
"""Characters that a URL holds unescaped, in addition to letters, digits and `-._~`."""
CHUNK = 16 * 2**20
BUFFER = 4 * 2**20
"""Bytes that one request brings where an object is read as a stream."""


CHECKPOINT = TrialFiles(Path()).checkpoint.name
OUTAGE_S = 600.0
"""Seconds for which a trial, and a driver at its end, try again what object storage has not answered."""

P = ParamSpec("P")
Result = TypeVar("Result")

log = logging.getLogger("medtune.disk")


class StorageError(OSError):
    """Object storage that cannot be reached, read or written. The message names the URL."""


def is_url(place: str | Path) -> bool:
    """Whether `place` is object storage, not a folder."""
    return url_of(place) is not None


def url_of(place: str | Path) -> str | None:
    """Return `place` as a URL, None for a folder. A Path has lost one of the URL's slashes, which is given back."""
    found = re.match(rf"({'|'.join(SCHEMES)}):/{{1,2}}([^/].*)", str(place), re.DOTALL)
    return f"{found[1]}://{found[2].rstrip('/')}" if found else None


DATA_ROOTS = "MEDTUNE_DATA_ROOTS"
"""Environment variable with folders and URLs, one per line. Where it is set, tables and volumes are read below them alone.

`medtune serve --data-root` sets it for the drivers that it starts.
"""


def data_roots() -> list[str]:
    """Return the folders and URLs of DATA_ROOTS; empty: everything may be read."""
    return [line for line in os.environ.get(DATA_ROOTS, "").split("\n") if line]


def is_below(place: str | Path, roots: Iterable[str]) -> bool:
    """Whether a file or URL is below one of the `roots`, folders without links and URLs. Links are followed."""
    if (url := url_of(place)) is not None:
        return ".." not in url.split("/") and any(
            url == root or url.startswith(f"{root.rstrip('/')}/") for root in roots if is_url(root)
        )
    real = Path(os.path.realpath(place))
    return any(real.is_relative_to(root) for root in roots if not is_url(root))


def absolute(place: str | Path) -> str:
    """Return the place as another process or node can find it: a URL as it is, a path made absolute.

    Links are kept: a table's relative paths start at the folder in which the user sees the table, and the file behind
    the link may be in another one (DataLad and git-annex keep it under .git/annex). `..` is removed where that leads to
    the same folder.
    """
    if (url := url_of(place)) is not None:
        return url
    kept = str(Path(place).absolute())
    short = os.path.normpath(kept)
    same = os.path.realpath(Path(short).parent) == os.path.realpath(Path(kept).parent)
    return short if same else kept


class _Patience(NamedTuple):
    seconds: float
    waits: Callable[[], None]


_patience = _Patience(0.0, lambda: None)


@contextmanager
def patient(seconds: float = OUTAGE_S, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Have all threads of this process try again for `seconds`, within the block, what object storage does not answer.

    A process that has a table or a study to find must fail at once on a wrong name, which looks the same: so patience is for
    those that others have found before. `waits` is called before each try, as a sign of life for the process that supervises
    this one.
    """
    global _patience
    before, _patience = _patience, _Patience(seconds, waits)
    try:
        yield
    finally:
        _patience = before


def _lasting(call: Callable[P, Result]) -> Callable[P, Result]:
    """Have `call` tried again after each StorageError for the time that `patient` sets."""

    @wraps(call)
    def lasting(*args: P.args, **kwargs: P.kwargs) -> Result:
        seconds, waits = _patience
        deadline, pause_s = None, 0.5
        while True:
            try:
                return call(*args, **kwargs)
            except StorageError as error:
                if not seconds:
                    raise
                if deadline is None:
                    deadline = time.monotonic() + seconds
                    until = time.strftime("%H:%M:%S", time.localtime(time.time() + seconds))
                    log.warning("%s: tried again until %s", error, until)
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise StorageError(f"{error}; tried again for {seconds:.0f} s") from None
            waits()
            time.sleep(min(pause_s, left_s))
            pause_s = min(5.0, 2 * pause_s)

    return lasting


class Listed(NamedTuple):
    """An object as a listing has it."""

    name: str
    written: datetime
    size: int


class Remote:
    """The objects below a URL. Credentials come from the environment or the machine, never from the URL.

    Every method raises StorageError when the storage does not answer or refuses, after trying again for the time that
    `patient` sets.
    """

    def __init__(self, url: str) -> None:
        from pyarrow import ArrowException

        self.url = url
        self._errors = (OSError, ArrowException)
        try:
            self.system, self.path = self._connected()
        except ValueError as error:
            raise self._error("cannot be used", error) from None

    @_lasting
    def _connected(self) -> tuple[Any, str]:
        from pyarrow.fs import FileSystem

        try:
            name = quote(self.url, safe=OF_URLS)  # a name may have a space in it
            return cast(tuple[Any, str], FileSystem.from_uri(name))
        except self._errors as error:
            raise self._error("cannot be used", error) from None

    @_lasting
    def read(self, name: str) -> bytes | None:
        """Return the object, None where there is none."""
        try:
            with self.system.open_input_stream(f"{self.path}/{name}", compression=None) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None
        except self._errors as error:
            raise self._error(f"{name} cannot be read", error) from None

    @_lasting
    def write(self, name: str, content: bytes) -> None:
        """Write the object, replacing one that is there."""
        try:
            with self.system.open_output_stream(f"{self.path}/{name}", compression=None) as stream:
                stream.write(content)
        except self._errors as error:
            raise self._error(f"{name} cannot be written", error) from None

    @_lasting
    def put(self, name: str, file: Path) -> None:
        """Write a file's content, however large, as the object."""
        try:
            with (
                file.open("rb") as source,
                self.system.open_output_stream(f"{self.path}/{name}", compression=None) as stream,
            ):
                while chunk := source.read(CHUNK):
                    stream.write(chunk)
        except self._errors as error:
            raise self._error(f"{name} cannot be written", error) from None

    @_lasting
    def get(self, name: str, file: Path) -> bool:
        """Write the object to a file, whole or not at all; False where there is none."""
        try:
            with (
                self.system.open_input_stream(f"{self.path}/{name}", compression=None) as stream,
                replacing(file) as temporary,
                temporary.open("wb") as target,
            ):
                while chunk := stream.read(CHUNK):
                    target.write(chunk)
            return True
        except FileNotFoundError:
            return False
        except self._errors as error:
            raise self._error(f"{name} cannot be read", error) from None

    @_lasting
    def stamp(self, name: str) -> tuple[int, int] | None:
        """Return size and time of writing (ns) of the object, None where there is none."""
        from pyarrow.fs import FileType

        try:
            found = self.system.get_file_info(f"{self.path}/{name}")
        except self._errors as error:
            raise self._error(f"{name} cannot be looked up", error) from None
        return (found.size, found.mtime_ns or 0) if found.type == FileType.File else None

    @contextmanager
    def opened(self, name: str) -> Iterator[tuple[io.BufferedReader, int]]:
        """Give a stream that can seek, and the object's size; content comes in pieces of BUFFER, none is kept.

        Raises FileNotFoundError where there is none.
        """
        with (
            self._open(name) as file,
            io.BufferedReader(cast(Any, _Pieces(self, name, file)), BUFFER) as stream,
        ):
            yield stream, file.size()

    @_lasting
    def _open(self, name: str) -> Any:
        try:
            return self.system.open_input_file(f"{self.path}/{name}")
        except FileNotFoundError:
            raise
        except self._errors as error:
            raise self._error(f"{name} cannot be read", error) from None

    @_lasting
    def piece(self, file: Any, name: str, offset: int, size: int) -> bytes:
        """Return up to `size` bytes at `offset` of an object that `_open` has given."""
        try:
            return bytes(file.read_at(size, offset))
        except self._errors as error:
            raise self._error(f"{name} cannot be read", error) from None

    @_lasting
    def delete(self, name: str) -> None:
        """Remove the object, if it is there."""
        try:
            self.system.delete_file(f"{self.path}/{name}")
        except FileNotFoundError:
            return
        except self._errors as error:
            raise self._error(f"{name} cannot be removed", error) from None

    def names(self) -> list[str]:
        """Names of all objects, in order."""
        return [one.name for one in self.listing()]

    @_lasting
    def listing(self, below: str = "") -> list[Listed]:
        """All objects, or those whose names begin with `below` and a slash, by name.

        Names become paths: those that would lead out of a folder (`../x`, `a//b`) are no study's and left out.
        """
        from pyarrow.fs import FileSelector, FileType

        prefix = self.path.rstrip("/") + "/"
        try:
            found = self.system.get_file_info(
                FileSelector((prefix + below).rstrip("/"), recursive=True, allow_not_found=True)
            )
        except self._errors as error:
            raise self._error("cannot be listed", error) from None
        objects = [
            Listed(one.path.removeprefix(prefix), one.mtime, one.size)
            for one in found
            if one.type == FileType.File
        ]
        return sorted(one for one in objects if _stays_below(one.name))

    def require(self) -> None:
        """Raise StorageError unless the storage answers, and there is such a bucket: listing one that is not gives nothing."""
        from pyarrow.fs import FileType

        if self.listing():
            return
        bucket = self.path.strip("/").split("/")[0]
        try:
            there = self.system.get_file_info(bucket).type != FileType.NotFound
        except self._errors as error:
            raise self._error("cannot be used", error) from None
        if not there:
            raise StorageError(f"{self.url}: there is no {bucket!r}: make it, or name another")

    def _error(self, what: str, error: BaseException) -> StorageError:
        return StorageError(f"{self.url}: {what}: {' '.join(str(error).split())[:300]}")


class _Pieces(io.RawIOBase):
    """An open object as a raw stream; each piece that is read is tried again through an outage."""

    def __init__(self, remote: Remote, name: str, file: Any) -> None:
        super().__init__()
        self.remote, self.name, self.file = remote, name, file
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.file.size()}[whence]
        self.at = max(0, begin + offset)
        return self.at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self.file.size() - self.at))
        content = b""
        if wanted:
            content = self.remote.piece(self.file, self.name, self.at, wanted)
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)


def bucket_of(url: str) -> tuple[Remote, str]:
    """Return the bucket of an object, whose connections all callers share, and the object's name in it."""
    found = re.fullmatch(r"([a-z0-9]+://[^/]+)/+(.+)", url, re.DOTALL)
    if found is None:
        raise StorageError(f"{url}: a bucket, an object in one is needed")
    variables = tuple(
        sorted(
            one for one in os.environ.items() if one[0].startswith(("AWS_", "GOOGLE_", "AZURE_"))
        )
    )
    return _bucket(found[1], variables), found[2]


@lru_cache(maxsize=16)
def _bucket(url: str, variables: tuple[tuple[str, str], ...]) -> Remote:
    """`variables` of the environment name the storage and the credentials: another value, another connection."""
    return Remote(url)


class TrialStore:
    """A trial's files kept in object storage too, so that the trial can continue on any node."""

    def __init__(self, url: str, trial: str, files: TrialFiles) -> None:
        self.remote, self.prefix, self.files = Remote(url), f"trials/{trial}/", files
        self._sent: dict[Path, tuple[int, int]] = {}

    def fetch(self) -> None:
        """Bring the files that an earlier attempt kept, on whichever node it ran; they replace those here."""
        for path in (self.files.best, self.files.checkpoint):
            path.unlink(missing_ok=True)
            if self.remote.get(self.prefix + path.name, path):
                self._sent[path] = _stamp(path)

    def hurries(self) -> bool:
        """Whether the driver's machine is about to be taken away, and with it the study; not while nothing answers."""
        try:
            return self.remote.stamp(HURRY) is not None
        except StorageError:
            return False

    def keep(self) -> None:
        """Send the changed files, the checkpoint last: one that is there has everything that belongs to it."""
        self._send((self.files.config, self.files.log, self.files.best, self.files.checkpoint))

    def _send(self, paths: Iterable[Path]) -> None:
        for path in paths:
            if path.is_file() and self._sent.get(path) != (stamp := _stamp(path)):
                self.remote.put(self.prefix + path.name, path)
                self._sent[path] = stamp


def kept_since_asked(remote: Remote, trials: Iterable[str]) -> bool:
    """Whether a study's storage has a checkpoint of each of these trials that is as new as HURRY; not while nothing answers.

    A checkpoint in the trial's own folder does not count: the machine is taken away with it.
    """
    try:
        if (asked := remote.stamp(HURRY)) is None:
            return False
        found = [remote.stamp(f"trials/{trial}/{CHECKPOINT}") for trial in trials]
    except StorageError:
        return False
    return all(one is not None and one[1] >= asked[1] for one in found)


def _stays_below(name: str) -> bool:
    return "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
