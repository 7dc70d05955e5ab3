"""Scans -> one prepared array a cohort on disk, content-addressed; and scans from a MedMNIST archive.

The form of a volume, axes first of all, is defined in `trainables.data.scans`.

Nothing here loads torch: a cohort is prepared and read on any machine.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import Timeout

from trainables import installed_version
from trainables.checkpoints import is_disk_full, naming_a_full_disk, replacing
from trainables.data.json_files import read_json
from trainables.data.scans import (
    Recipe,
    VolumeError,
    bytes_text,
    naming,
    open_bytes,
    prepare_scan,
    read_scan,
    stamp,
)
from trainables.data.storage import absolute, url_of
from trainables.data.threads import Progress, in_threads
from trainables.errors import ProblemsError
from trainables.machine.file_locks import acquire_lock, is_alive

if TYPE_CHECKING:
    from trainables.data.manifest import Manifest

FORMAT_VERSION = 1
"""Part of every cohort's key. Raise it whenever a volume comes out different from the same file and recipe."""

STALLED_S = 600.0
"""How long another process may hold a cohort without finishing a single volume before we stop waiting for it."""


log = logging.getLogger(__name__)


class CohortError(ProblemsError):
    """A cohort that cannot be prepared or opened. `problems` holds one line a problem, in row order."""


class VolumesRefused(CohortError):
    """A cohort some of whose volumes cannot be prepared: preparing them again would fail in the same way."""


@dataclass(frozen=True, eq=False)
class Cohort:
    """A prepared cohort, row by row as in its table. Hand its folder to other processes: pickling would copy the volumes."""

    folder: Path
    volumes: np.memmap
    """(N, C, D, H, W) float16, read only, mapped from the file."""
    labels: np.ndarray
    """(N,) int64."""
    subjects: np.ndarray
    """(N,) text."""
    paths: tuple[str, ...]
    """The files, as absolute paths on the machine that prepared the cohort, or URLs."""
    spacings_mm: np.ndarray
    """(N, 3) float64, of the files, before resampling."""
    recipe: Recipe


# A cohort on disk ------------------------------------------------------------------------------------------------------


def prepare_cohort(
    manifest: "Manifest",
    recipe: Recipe,
    cache: Path,
    progress: Progress | None = None,
    *,
    workers: int | None = None,
) -> Path:
    """Return the folder `<cache>/<key>` of the prepared cohort, made now if it is not there; `open_cohort` reads it.

    The key covers every file's bytes, the recipe, labels, subjects and paths: a change of any of them is another cohort, and
    when only the last three changed the volumes are linked, not decoded again. Files whose size and times are those of last
    time are not read again; objects in object storage are read twice the first time, once for the key and once for their
    voxels, in pieces that are not kept. Of several processes one builds and the others wait for it. The folder is renamed
    into place when it is whole, so a killed build is never read; the next build removes its files.

    Each of `workers` threads (one per core, at most 8) holds one file and writes its volume straight to disk, in the
    table's order whichever is first. Raises CohortError with the problems of all files.
    """
    cache = cache.absolute()  # the folder is handed to processes that stand elsewhere
    paths = [url_of(path) or Path(path) for path in manifest.rows["path"]]
    numbers = manifest.numbers or tuple(range(1, len(paths) + 1))
    rows = {
        "paths": [str(path) for path in paths],
        "labels": [int(label) for label in manifest.rows["label"]],
        "subjects": [str(subject) for subject in manifest.rows["subject"]],
    }
    try:
        cache.mkdir(parents=True, exist_ok=True)
        digests, stats = _file_digests(paths, numbers, cache, workers)
        contents = _contents_key(digests, recipe)
        folder = cache / _cohort_name(digests, rows, recipe)
        if _is_whole(folder):
            return folder
        building = cache / f".building-{contents}"
        with _sole_builder(cache, contents, building, progress):
            if _is_whole(folder):  # built while we waited
                return folder
            _sweep(cache, building)
            try:
                building.mkdir()
                donor = next(
                    (other for other in sorted(cache.glob(f"{contents}-*")) if _is_whole(other)),
                    None,
                )
                if donor is None:
                    spacings_mm = _build_volumes(
                        building, paths, numbers, stats, recipe, progress, workers
                    )
                else:
                    _link(donor / "volumes.npy", building / "volumes.npy")
                    spacings_mm = open_cohort(donor).spacings_mm.tolist()
                _write_record(
                    building, {"sha256": digests, "spacings_mm": spacings_mm, **rows}, recipe
                )
                shutil.rmtree(folder, ignore_errors=True)  # one that is there is damaged
                _sync(building / "volumes.npy", building / "cohort.json", building)
                building.rename(folder)
                _sync(cache)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        reason = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        raise CohortError(f"cache {cache}: {reason}: {_advice(error)}") from error
    return folder


def _advice(error: OSError) -> str:
    """What to do about a cache that cannot be written."""
    other = "choose another folder with --cache, or MEDTUNE_CACHE for all commands"
    if is_disk_full(error):
        return f"free some room, or {other}"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR):
        return f"this user cannot write there: {other}"
    return other


def cohort_like(
    manifest: "Manifest",
    recipe: Recipe,
    first: Path,
    first_recipe: Recipe,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of the cohort that `recipe` makes of the data of the cohort `first`, prepared if it is missing.

    `first_recipe` is the recipe of `first`, whose folder need not exist on this machine: its name is enough to recognise
    its data. Recipes that give the same volumes share one folder. Raises CohortError where the table or its files are not
    those of `first`, VolumesRefused where `recipe` makes some volume constant.
    """
    if same_volumes(recipe, first_recipe) and first.exists():
        return first
    if (first / "cohort.json").is_file():
        there = first.parent / cohort_name_like(first, recipe)
        if there.exists():
            return there
    made = prepare_cohort(manifest, recipe, first.parent, progress)
    if cohort_name_like(made, first_recipe) != first.name:
        raise CohortError(
            f"{manifest.table}: not the data of the study (cohort {first.name}, here {made.name})"
        )
    return made


def cohort_name_like(folder: Path, recipe: Recipe) -> str:
    """Return the name that the data of the cohort in `folder` have when `recipe` prepares them. Raises CohortError."""
    try:
        written = read_json(folder / "cohort.json")
        rows = {name: written[name] for name in ("paths", "labels", "subjects")}
        return _cohort_name(written["sha256"], rows, recipe)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CohortError(f"cohort {folder}: damaged ({error}): prepare it again") from None


def is_moved(recorded: str, made: Path, before: str | Path, table: str | Path) -> bool:
    """Whether `made` holds the data of the cohort of the name `recorded`, whose files were elsewhere: only the paths differ.

    `before` is the table of the recorded cohort, `table` that of `made`. The names tell whether the files have the same
    bytes. Labels and subjects are compared with the recorded cohort, where it is still in the cache, and otherwise by its
    name, which also covers the paths: they have to be in the same places as seen from the table.
    """
    contents, _, key = recorded.partition("-")
    if contents != made.name.partition("-")[0]:
        return False
    try:
        now = read_json(made / "cohort.json")
        old = made.parent / recorded / "cohort.json"
        if old.is_file():
            was = read_json(old)
            return all(was[name] == now[name] for name in ("labels", "subjects"))
        rows = {name: now[name] for name in ("paths", "labels", "subjects")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CohortError(f"cohort {made}: damaged ({error}): prepare it again") from None
    folder, earlier = Path(absolute(table)).parent, Path(absolute(before)).parent
    rows["paths"] = [
        path if url_of(path) else os.path.normpath(earlier / os.path.relpath(path, folder))
        for path in rows["paths"]
    ]
    return _key(rows, 8) == key


def same_volumes(one: Recipe, other: Recipe) -> bool:
    """Whether both recipes make the same volumes of every file."""
    return _deciding(one) == _deciding(other)


def prepared_bytes(volumes: int, recipe: Recipe) -> int:
    """Return how many bytes the prepared array of this number of volumes has on disk."""
    return 2 * volumes * recipe.in_channels * math.prod(recipe.volume_shape)


def open_cohort(folder: Path) -> Cohort:
    """Return the cohort that `prepare_cohort` made in `folder`, its volumes mapped, not loaded.

    Raises CohortError when there is none, or one that is damaged or of another version.
    """
    try:
        written = read_json(folder / "cohort.json")
        if written["format"] != FORMAT_VERSION:
            raise CohortError(
                f"cohort {folder}: format {written['format']}, this is {FORMAT_VERSION}: prepare it again"
            )
        volumes = np.load(folder / "volumes.npy", mmap_mode="r", allow_pickle=False)
        recipe = Recipe.from_json(written["recipe"])
        cohort = Cohort(
            folder=folder,
            volumes=volumes,
            labels=np.array(written["labels"], dtype=np.int64),
            subjects=np.array(written["subjects"], dtype=str),
            paths=tuple(written["paths"]),
            spacings_mm=np.array(written["spacings_mm"], dtype=np.float64),
            recipe=recipe,
        )
        expected = (len(cohort.labels), recipe.in_channels, *recipe.volume_shape)
        if volumes.shape != expected or volumes.dtype != np.float16:
            raise ValueError(
                f"volumes.npy holds {volumes.dtype} {volumes.shape}, float16 {expected} is expected"
            )
    except CohortError:
        raise
    except FileNotFoundError as error:
        raise CohortError(
            f"cohort {folder}: {Path(error.filename).name} is not there: prepare it again"
        ) from None
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise CohortError(f"cohort {folder}: damaged ({error}): prepare it again") from None
    return cohort


def _write_record(folder: Path, rows: dict[str, Any], recipe: Recipe) -> None:
    versions = {name: installed_version(name) for name in ("medtune", "nibabel", "numpy")}
    written = {
        "format": FORMAT_VERSION,
        "recipe": dataclasses.asdict(recipe),
        "versions": versions,
        **rows,
    }
    (folder / "cohort.json").write_text(json.dumps(written) + "\n", encoding="utf-8")


def _deciding(recipe: Recipe) -> dict[str, Any]:
    """The recipe without the fields that it does not use: another window must not rebuild a cohort of z-scores."""
    fields = dataclasses.asdict(recipe)
    if recipe.intensity != "window":
        del fields["window_low"], fields["window_high"]
    return fields


def _contents_key(digests: list[str], recipe: Recipe) -> str:
    return _key({"format": FORMAT_VERSION, "recipe": _deciding(recipe), "files": digests}, 24)


def _cohort_name(digests: list[str], rows: dict[str, Any], recipe: Recipe) -> str:
    return f"{_contents_key(digests, recipe)}-{_key(rows, 8)}"


def _key(value: object, digits: int) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]


def _file_digests(
    paths: list[Path | str], numbers: tuple[int, ...], cache: Path, workers: int | None
) -> tuple[list[str], list[tuple[int, ...]]]:
    """SHA-256 of every file's bytes, and the stat each was taken at; a file that looks untouched is not read again."""
    store = cache / "hashes.json"
    try:
        known = read_json(store)
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict):
        known = {}

    def digest(row: int) -> tuple[str, tuple[int, ...], bool]:
        with naming(paths[row]):
            found = stamp(paths[row])
            entry = known.get(str(paths[row]))
            if isinstance(entry, list) and entry[1:] == list(found):
                return str(entry[0]), found, False
            with open_bytes(paths[row]) as (file, _):
                return hashlib.file_digest(file, "sha256").hexdigest(), found, True

    results = _all_or_errors(digest, numbers, workers)
    # A file written in the last two seconds may be written again with the same times: clocks tick that slowly.
    settled = time.time_ns() - 2 * 10**9
    fresh = {
        str(path): [sha256, *found]
        for path, (sha256, found, read) in zip(paths, results, strict=True)
        if read and found[1] < settled and found[2] < settled
    }
    if fresh:
        with replacing(store) as temporary:
            temporary.write_text(json.dumps({**known, **fresh}), encoding="utf-8")
    return [sha256 for sha256, _, _ in results], [found for _, found, _ in results]


def _build_volumes(
    building: Path,
    paths: list[Path | str],
    numbers: tuple[int, ...],
    stats: list[tuple[int, ...]],
    recipe: Recipe,
    progress: Progress | None,
    workers: int | None,
) -> list[tuple[float, ...]]:
    """Write volumes.npy; returns the files' spacings."""
    file = building / "volumes.npy"
    shape = (len(paths), recipe.in_channels, *recipe.volume_shape)
    needed, free = prepared_bytes(len(paths), recipe), shutil.disk_usage(building).free
    if needed > free:
        raise CohortError(
            f"cache {building.parent}: the cohort needs {bytes_text(needed)}, {bytes_text(free)} are free: free some room, or choose another with --cache"
        )
    mapped = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
    start, stride = mapped.offset, mapped[0].nbytes
    del mapped

    def build(row: int) -> tuple[float, ...]:
        scan = read_scan(paths[row], recipe.in_channels)
        volume = prepare_scan(scan, recipe, paths[row])
        with naming(paths[row]):
            now = stamp(paths[row])
        if now != stats[row]:
            raise VolumeError(
                paths[row], "changed while it was being read; prepare again when it is complete"
            )
        # A write, not the map: on a full disk a map ends the process with SIGBUS
        with file.open("r+b") as slots:
            slots.seek(start + row * stride)
            slots.write(volume.astype(np.float16).tobytes())
        return scan.spacing_mm

    def alive(done: int, total: int) -> None:
        os.utime(building)  # the sign of life that waiting processes look for
        if progress is not None:
            progress(done, total)

    return _all_or_errors(build, numbers, workers, alive)


def _all_or_errors(
    function: Callable[[int], Any],
    numbers: tuple[int, ...],
    workers: int | None,
    progress: Progress | None = None,
) -> list[Any]:
    """What `function` gives for each row from 0, or VolumesRefused with the VolumeErrors of all rows, by their numbers."""

    def caught(row: int) -> Any:
        try:
            return function(row)
        except VolumeError as error:
            return error

    results = in_threads(caught, range(len(numbers)), workers, progress)
    problems = [
        f"row {number}: {result}"
        for number, result in zip(numbers, results, strict=True)
        if isinstance(result, VolumeError)
    ]
    if problems:
        raise VolumesRefused(problems)
    return results


@contextlib.contextmanager
def _sole_builder(
    cache: Path, contents: str, building: Path, progress: Progress | None
) -> Iterator[None]:
    """Hold the lock of these contents. The kernel frees it when its holder dies, so a wait is for a living process.

    While the holder finishes volumes, `progress` is called here too, with (0, 1): a waiting trial is not a stalled one.
    """
    seen, since = _beat(building), time.monotonic()
    wait_s = 0.0
    while True:
        try:
            held = acquire_lock(_lock_file(cache, contents), wait_s)
            break
        except Timeout:
            if not wait_s:
                log.warning(
                    "waiting for another process that is preparing this cohort in %s", building
                )
            wait_s = min(5.0, STALLED_S)
            beat, now = _beat(building), time.monotonic()
            if beat != seen:
                seen, since = beat, now
                if progress is not None:
                    progress(0, 1)
            elif now - since >= STALLED_S:
                raise CohortError(
                    f"cohort {building}: another process has held {_lock_file(cache, contents)} for {STALLED_S:.0f} s without "
                    "finishing a volume: end it (`fuser` on the lock file names it) and prepare again"
                ) from None
    with held:
        yield


OF_CONTENTS = re.compile(r"[0-9a-f]{24}")
"""Names of cohorts being built, after `.building-`."""


def _lock_file(cache: Path, contents: str) -> Path:
    return cache / f".{contents}.lock"


def _beat(building: Path) -> int | None:
    try:
        return building.stat().st_mtime_ns
    except OSError:
        return None


def _sweep(cache: Path, building: Path) -> None:
    """Remove what killed builders left: ours is free because we hold its lock, others if their lock is free."""
    shutil.rmtree(building, ignore_errors=True)
    for left in cache.glob(".building-*"):
        if not OF_CONTENTS.fullmatch(left.name.removeprefix(".building-")):
            continue  # the cache may share its folder with other files
        lock = _lock_file(cache, left.name.removeprefix(".building-"))
        with contextlib.suppress(Timeout), acquire_lock(lock):
            shutil.rmtree(left, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    if not folder.exists():
        return False
    try:
        open_cohort(folder)
    except CohortError as error:
        log.warning("%s; it is made again", error)
        return False
    return True


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _sync(*paths: Path) -> None:
    """Have the disk hold them: a rename may otherwise outlive a power cut that its contents do not."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# MedMNIST ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give an empty temporary sibling that becomes `folder` when the block ends well, and is removed otherwise.

    Raises CohortError when `folder` holds something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CohortError(
            f"{folder}: exists and is not an empty folder; remove it or choose another"
        )
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.absolute().name}.{socket.gethostname()}."  # elsewhere the process may live
    for left in folder.absolute().parent.iterdir():  # of a writer that was killed
        process = left.name.removeprefix(prefix).removesuffix(".tmp")
        if (
            left.name == f"{prefix}{process}.tmp"
            and process.isdecimal()
            and not is_alive(int(process))
        ):
            shutil.rmtree(left, ignore_errors=True)
    temporary = folder.absolute().with_name(f"{prefix}{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        with naming_a_full_disk(folder):
            yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
