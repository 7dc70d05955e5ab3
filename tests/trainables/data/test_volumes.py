"""The prepared cohort under faults, and the way into it from a MedMNIST archive."""

import dataclasses
import errno
import gzip
import hashlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from trainables.config import build_config
from trainables.data import threads, volumes
from trainables.data.manifest import Manifest, read_manifest
from trainables.data.medmnist import import_medmnist
from trainables.data.scans import Recipe, Scan, VolumeError, prepare_scan, read_scan
from trainables.data.volumes import (
    CohortError,
    VolumesRefused,
    cohort_like,
    new_folder,
    open_cohort,
    prepare_cohort,
)

Write = Callable[..., Path]
REPOSITORY = Path(__file__).parents[3]


def recipe(**changes: Any) -> Recipe:
    return dataclasses.replace(Recipe.from_config(build_config({"volume_shape": 16})), **changes)


# The prepared cohort ---------------------------------------------------------------------------------------------------


@pytest.fixture
def table(write_scan: Write, tmp_path: Path) -> Path:
    """Six small volumes of three subjects."""
    lines = ["path,label,subject"]
    for row in range(6):
        write_scan(f"data/{row}.nii.gz", (8 + row, 9, 10), seed=row)
        lines.append(f"{row}.nii.gz,{row % 2},s{row // 2}")
    path = tmp_path / "data" / "table.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache of 'volumes'"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were decoded, as they are."""
    names: list[str] = []

    def count(path: Path, in_channels: int = 1) -> Scan:
        names.append(Path(path).name)
        return read_scan(path, in_channels)

    monkeypatch.setattr(volumes, "read_scan", count)
    return names


def temporaries(cache: Path) -> list[str]:
    return [
        path.name
        for path in cache.iterdir()
        if path.name.startswith(".building-") or path.suffix == ".tmp"
    ]


def test_a_cohort_holds_every_row_of_the_table_in_order(table: Path, cache: Path) -> None:
    manifest, seen = read_manifest(table), []
    folder = prepare_cohort(
        manifest, recipe(), cache, progress=lambda done, total: seen.append((done, total))
    )
    cohort = open_cohort(folder)
    assert seen == [(done, 6) for done in range(1, 7)]
    assert folder.parent == cache
    assert cohort.volumes.shape == (6, 1, 16, 16, 16)
    assert cohort.volumes.dtype == np.float16
    assert isinstance(cohort.volumes, np.memmap)
    assert not cohort.volumes.flags.writeable
    assert cohort.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert cohort.labels.dtype == np.int64
    assert cohort.subjects.tolist() == ["s0", "s0", "s1", "s1", "s2", "s2"]
    assert list(cohort.paths) == manifest.rows["path"].tolist()
    assert cohort.spacings_mm.shape == (6, 3)
    assert cohort.recipe == recipe()
    for path, volume in zip(cohort.paths, cohort.volumes, strict=True):
        np.testing.assert_array_equal(
            volume, prepare_scan(read_scan(path), recipe(), path).astype(np.float16)
        )
    assert temporaries(cache) == []


def test_another_recipe_makes_another_cohort_of_the_same_data_once(
    table: Path, cache: Path, decoded: list[str]
) -> None:
    manifest = read_manifest(table)
    first = prepare_cohort(manifest, recipe(), cache)
    other = recipe(intensity="window", window_low=50.0, window_high=150.0)
    made = cohort_like(manifest, other, first, recipe())
    assert made == prepare_cohort(manifest, other, cache) != first
    assert len(decoded) == 12
    for path, volume in zip(open_cohort(made).paths, open_cohort(made).volumes, strict=True):
        np.testing.assert_array_equal(
            volume, prepare_scan(read_scan(path), other, path).astype(np.float16)
        )
    unread = recipe(window_low=0.0)  # no window is applied: the same volumes
    assert cohort_like(manifest, unread, first, recipe()) == first
    assert cohort_like(manifest, other, first, recipe()) == made
    assert len(decoded) == 12, "a cohort that is there is not prepared again"


def test_another_recipe_knows_the_data_of_the_study_without_its_cohort(
    table: Path, cache: Path, tmp_path: Path, write_scan: Write
) -> None:
    """As on a node that has prepared nothing: the name of the study's cohort is enough."""
    manifest, other = read_manifest(table), recipe(spacing_mm=(1.5, 1.5, 1.5))
    first = prepare_cohort(manifest, recipe(), cache)
    elsewhere = tmp_path / "another node" / first.name
    assert cohort_like(manifest, other, elsewhere, recipe()).parent == elsewhere.parent
    write_scan("data/3.nii.gz", (8, 9, 10), seed=99)
    with pytest.raises(CohortError, match="not the data of the study"):
        cohort_like(manifest, recipe(spacing_mm=(2.0,) * 3), elsewhere, recipe())


def test_a_recipe_that_leaves_nothing_of_a_volume_is_refused_for_good(
    table: Path, cache: Path
) -> None:
    manifest = read_manifest(table)
    first = prepare_cohort(manifest, recipe(), cache)
    above_all = recipe(intensity="window", window_low=5000.0, window_high=6000.0)
    with pytest.raises(VolumesRefused, match="all one value in the window") as caught:
        cohort_like(manifest, above_all, first, recipe())
    assert len(caught.value.problems) == 6
    assert temporaries(cache) == []


def test_the_number_of_workers_changes_no_byte(table: Path, tmp_path: Path) -> None:
    manifest = read_manifest(table)
    one, four = (prepare_cohort(manifest, recipe(), tmp_path / str(n), workers=n) for n in (1, 4))
    assert one.name == four.name
    assert (one / "volumes.npy").read_bytes() == (four / "volumes.npy").read_bytes()


def test_a_rerun_decodes_nothing_and_reads_no_file_again(
    table: Path, cache: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, now = read_manifest(table), time.time_ns
    monkeypatch.setattr(
        time, "time_ns", lambda: now() + 10**10
    )  # the files have been lying there for a while
    folder = prepare_cohort(manifest, recipe(), cache)
    assert len(decoded) == 6
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert prepare_cohort(manifest, recipe(), cache) == folder
    assert len(decoded) == 6


def test_files_written_this_very_moment_are_hashed_again(table: Path, cache: Path) -> None:
    """Two writes within one tick of the file system's clock look alike."""
    prepare_cohort(read_manifest(table), recipe(), cache)
    assert not (cache / "hashes.json").exists()


def test_a_changed_file_is_noticed_even_with_its_size_and_time_put_back(
    table: Path, cache: Path, write_scan: Write
) -> None:
    manifest = read_manifest(table)
    folder = prepare_cohort(manifest, recipe(), cache)
    path = write_scan("data/3.nii", (11, 9, 10), seed=3)
    before = path.stat()
    path.rename(table.parent / "3.nii.gz")
    path = table.parent / "3.nii.gz"
    second = prepare_cohort(manifest, recipe(), cache)
    assert second != folder
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert prepare_cohort(manifest, recipe(), cache) not in (folder, second)


def test_a_changed_recipe_is_another_cohort_and_one_that_changes_nothing_is_not(
    table: Path, cache: Path
) -> None:
    manifest = read_manifest(table)
    folder = prepare_cohort(manifest, recipe(), cache)
    assert (
        prepare_cohort(manifest, recipe(window_high=1.0), cache) == folder
    )  # read by intensity=window only
    for change in (
        {"volume_shape": (16, 16, 8)},
        {"spacing_mm": (1.0, 1.0, 1.0)},
        {"intensity": "window"},
    ):
        other = prepare_cohort(manifest, recipe(**change), cache)
        assert other != folder
        assert open_cohort(other).recipe == recipe(**change)


def test_corrected_labels_cost_no_decoding(table: Path, cache: Path, decoded: list[str]) -> None:
    folder = prepare_cohort(read_manifest(table), recipe(), cache)
    table.write_text(table.read_text().replace("0.nii.gz,0,", "0.nii.gz,1,"))
    other = prepare_cohort(read_manifest(table), recipe(), cache)
    assert len(decoded) == 6
    assert open_cohort(folder).labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert open_cohort(other).labels.tolist() == [1, 1, 0, 1, 0, 1]
    assert (folder / "volumes.npy").samefile(other / "volumes.npy")
    np.testing.assert_array_equal(open_cohort(folder).spacings_mm, open_cohort(other).spacings_mm)


def test_all_bad_files_are_told_together_and_nothing_is_left(table: Path, cache: Path) -> None:
    manifest = read_manifest(table)
    (table.parent / "1.nii.gz").write_bytes(b"")
    (table.parent / "4.nii.gz").write_bytes(gzip.compress(b"x" * 999))
    with pytest.raises(CohortError) as refusal:
        prepare_cohort(manifest, recipe(), cache)
    assert [problem.split(": ")[:2] for problem in refusal.value.problems] == [
        [f"row {number}", f"scan {table.parent / name}"]
        for number, name in ((2, "1.nii.gz"), (5, "4.nii.gz"))
    ]
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    (table.parent / "4.nii.gz").unlink()
    with pytest.raises(
        CohortError, match=r"scan .*4\.nii\.gz: cannot be read: No such file or directory"
    ):
        prepare_cohort(manifest, recipe(), cache)


def test_a_file_that_changes_while_it_is_read_is_refused(
    table: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touching(found: Scan, how: Recipe, path: Path) -> np.ndarray:
        if path.name == "2.nii.gz":
            path.write_bytes(path.read_bytes() + b"\0")
        return prepare_scan(found, how, path)

    monkeypatch.setattr(volumes, "prepare_scan", touching)
    with pytest.raises(CohortError, match=r"2\.nii\.gz: changed while it was being read"):
        prepare_cohort(read_manifest(table), recipe(), cache)


def test_too_small_a_disk_is_told_before_anything_is_decoded(
    table: Path, cache: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2048))
    with pytest.raises(
        CohortError, match=r"the cohort needs 48 KiB, 2 KiB are free: free some room"
    ):
        prepare_cohort(read_manifest(table), recipe(), cache)
    assert decoded == []
    assert temporaries(cache) == []


def test_a_disk_that_fills_up_midway_is_told_and_leaves_nothing(
    table: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*paths: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(paths[0]))

    monkeypatch.setattr(volumes, "_sync", full)
    with pytest.raises(
        CohortError, match=r"No space left on device .*volumes\.npy.*: free some room"
    ):
        prepare_cohort(read_manifest(table), recipe(), cache)
    assert temporaries(cache) == []
    monkeypatch.undo()
    open_cohort(prepare_cohort(read_manifest(table), recipe(), cache))


def test_a_cache_that_cannot_be_made_is_told(table: Path, cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(CohortError, match="choose another"):
        prepare_cohort(read_manifest(table), recipe(), cache)


def cut(folder: Path) -> None:
    os.truncate(folder / "volumes.npy", 5000)


def replace_array(folder: Path) -> None:
    np.save(folder / "volumes.npy", np.zeros(3))


def pickled(folder: Path) -> None:
    np.save(folder / "volumes.npy", np.array([{"a": 1}]), allow_pickle=True)


def cut_record(folder: Path) -> None:
    os.truncate(folder / "cohort.json", 100)


def another_format(folder: Path) -> None:
    written = json.loads((folder / "cohort.json").read_text())
    (folder / "cohort.json").write_text(json.dumps(written | {"format": 0}))


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "damaged"),
        (
            replace_array,
            r"volumes.npy holds float64 \(3,\), float16 \(6, 1, 16, 16, 16\) is expected",
        ),
        (pickled, "damaged"),
        (cut_record, "damaged"),
        (another_format, "format 0, this is 1: prepare it again"),
        (without("volumes.npy"), "volumes.npy is not there"),
        (without("cohort.json"), "cohort.json is not there"),
        (shutil.rmtree, "cohort.json is not there"),
    ],
)
def test_a_damaged_cohort_is_never_read_and_made_again(
    table: Path, cache: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = prepare_cohort(read_manifest(table), recipe(), cache)
    damage(folder)
    with pytest.raises(CohortError, match=message):
        open_cohort(folder)
    assert prepare_cohort(read_manifest(table), recipe(), cache) == folder
    assert open_cohort(folder).volumes.shape == (6, 1, 16, 16, 16)


def test_a_damaged_record_of_hashes_is_made_again(
    table: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    manifest, now = read_manifest(table), time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10**10)  # the files are not new
    for content in ("{", "[1]", '{"/x": 3}'):
        (cache / "hashes.json").write_text(content)
        open_cohort(prepare_cohort(manifest, recipe(), cache))
        assert set(manifest.rows["path"]) <= json.loads((cache / "hashes.json").read_text()).keys()


BUILDER = """
import sys
import threading
from pathlib import Path
from trainables.data import volumes
from trainables.config import build_config
from trainables.data.manifest import read_manifest

table, cache, pause = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "pause"
real = volumes.read_scan
names = []
def read_scan(path, in_channels):
    names.append(path)
    print("decoded", flush=True)
    if pause and len(names) == 3:
        print("halfway", flush=True)
        sys.stdin.readline()
    return real(path, in_channels)
volumes.read_scan = read_scan
recipe = volumes.Recipe.from_config(build_config({"volume_shape": 16}))
print(volumes.prepare_cohort(read_manifest(table), recipe, cache, workers=1), flush=True)
"""


@pytest.fixture
def builder(table: Path, cache: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a process that prepares the cohort; with "pause" it stops in the third volume until it gets a line."""
    started: list[subprocess.Popen[str]] = []

    def start(mode: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", BUILDER, str(table), str(cache), mode]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def read_until(stream: Any, word: str) -> None:
    for line in stream:
        if word in line:
            return
    raise AssertionError(f"the process ended without printing {word!r}")


def test_a_builder_killed_midway_leaves_nothing_that_is_read_and_the_next_one_sweeps(
    builder: Callable[[str], subprocess.Popen[str]], table: Path, cache: Path, decoded: list[str]
) -> None:
    process = builder("pause")
    read_until(process.stdout, "halfway")
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    (left,) = temporaries(cache)
    assert (cache / left / "volumes.npy").exists()
    assert list(cache.glob("[!.]*-*")) == []
    other = prepare_cohort(
        read_manifest(table), recipe(volume_shape=(8, 8, 8)), cache
    )  # another cohort sweeps it too
    assert temporaries(cache) == []
    decoded.clear()
    folder = prepare_cohort(read_manifest(table), recipe(), cache)
    assert len(decoded) == 6
    assert sorted(cache.glob("[!.]*-*")) == sorted([folder, other])
    for path, volume in zip(open_cohort(folder).paths, open_cohort(folder).volumes, strict=True):
        np.testing.assert_array_equal(
            volume, prepare_scan(read_scan(path), recipe(), path).astype(np.float16)
        )


def test_two_processes_at_once_build_a_cohort_once_and_a_living_one_is_not_swept(
    builder: Callable[[str], subprocess.Popen[str]], table: Path, cache: Path
) -> None:
    first = builder("pause")
    read_until(first.stdout, "halfway")
    second = builder("go")
    read_until(second.stderr, "waiting for another process")
    prepare_cohort(read_manifest(table), recipe(volume_shape=(8, 8, 8)), cache)
    assert len(temporaries(cache)) == 1
    ends = [
        first.communicate("go on\n", timeout=60)[0].splitlines(),
        second.communicate(timeout=60)[0].splitlines(),
    ]
    assert ends[1] == [ends[0][-1]], "the second decodes nothing and finds the same folder"
    assert ends[0].count("decoded") == 3, "and three up to the pause"
    assert temporaries(cache) == []


def test_waiting_for_a_builder_that_stands_still_ends_with_what_to_do(
    table: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare_cohort(read_manifest(table), recipe(), cache)
    shutil.rmtree(folder)
    monkeypatch.setattr(volumes, "STALLED_S", 0.2)
    (lock,) = cache.glob(".*.lock")
    with FileLock(lock), pytest.raises(CohortError, match="without finishing a volume: end it"):
        prepare_cohort(read_manifest(table), recipe(), cache)


def test_ctrl_c_ends_a_preparation_and_leaves_nothing(
    table: Path, cache: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second file is held until what waits behind it has been dropped: small files decode faster than Ctrl-C acts."""
    dropped = threading.Event()
    read: Callable[[Path, int], Scan] = vars(volumes)["read_scan"]  # the one that counts

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            if cancel_futures:
                dropped.set()
            super().shutdown(wait=wait)

    def held(path: Path, in_channels: int = 1) -> Scan:
        if decoded:
            dropped.wait(10)
        return read(path, in_channels)

    def press(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threads, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(volumes, "read_scan", held)
    with pytest.raises(KeyboardInterrupt):
        prepare_cohort(read_manifest(table), recipe(), cache, progress=press, workers=1)
    assert 1 <= len(decoded) <= 2
    assert temporaries(cache) == []


def test_a_relative_cache_gives_an_absolute_folder(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare_cohort(read_manifest(table), recipe(), Path("here")).parent == tmp_path / "here"


def test_errors_survive_the_way_between_processes() -> None:
    for error in (VolumeError("a.nii", "why"), CohortError(["one", "two"])):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_reading_volumes_and_tables_does_not_load_torch() -> None:
    code = "import sys, trainables.data.manifest, trainables.data.volumes; sys.exit(bool({'torch', 'monai', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


# MedMNIST --------------------------------------------------------------------------------------------------------------


def medmnist(path: Path, **changes: Any) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (count, 9, 10, 11)).astype(np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
    arrays |= changes
    np.savez_compressed(
        path, **{name: value for name, value in arrays.items() if value is not None}
    )
    return path


def test_adrenalmnist_is_imported_with_its_official_split(
    adrenal_archive: Path, tmp_path: Path
) -> None:
    table = import_medmnist(adrenal_archive, tmp_path / "adrenal", limit=20)
    manifest = read_manifest(table)
    assert manifest.rows["split"].value_counts().to_dict() == {"train": 20, "val": 20, "test": 20}
    assert manifest.rows["subject"].nunique() == 60
    with np.load(adrenal_archive, allow_pickle=False) as arrays:
        assert (
            manifest.rows["label"].tolist()
            == np.concatenate(
                [arrays[f"{split}_labels"][:20, 0] for split in ("train", "val", "test")]
            ).tolist()
        )
        image = arrays["val_images"][7]
    np.testing.assert_array_equal(nib.load(manifest.rows["path"][27]).get_fdata(), image)
    np.testing.assert_array_equal(read_scan(manifest.rows["path"][27]).voxels[0], image)
    cohort = open_cohort(
        prepare_cohort(manifest, recipe(volume_shape=(28, 28, 28)), tmp_path / "cache")
    )
    np.testing.assert_allclose(
        cohort.volumes[27, 0], (image - image.mean()) / image.std(), rtol=2e-3
    )


def test_an_import_gives_the_same_bytes_each_time(tmp_path: Path) -> None:
    archive = medmnist(tmp_path / "small.npz")
    tables = [import_medmnist(archive, tmp_path / name) for name in ("one", "two")]
    files = sorted(tables[0].parent.rglob("*.*"))
    assert len(files) == 17
    for file in files:
        assert (
            file.read_bytes()
            == (tables[1].parent / file.relative_to(tables[0].parent)).read_bytes()
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_labels": None}, "no val_labels; it holds train_images"),
        (
            {"train_images": np.zeros((8, 28, 28), np.uint8)},
            r"train: images of shape \(8, 28, 28\): \(N, D, H, W\) is needed",
        ),
        ({"train_images": np.zeros((8, 4, 4, 4), np.complex64)}, "images of type complex64"),
        (
            {"test_labels": np.zeros((4, 3), np.uint8)},
            r"labels of shape \(4, 3\) for 4 images: one label an image",
        ),
        ({"test_labels": np.zeros(3, np.uint8)}, r"labels of shape \(3,\) for 4 images"),
        ({"test_labels": np.full(4, 0.5)}, "labels of type float64"),
        ({"test_labels": np.full(4, -1)}, "whole numbers from 0 are needed"),
        ({"test_images": np.array([{}] * 4)}, "Object arrays cannot be loaded"),
    ],
)
def test_another_archive_is_refused_and_leaves_nothing(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    archive = medmnist(tmp_path / "odd.npz", **changes)
    with pytest.raises(CohortError, match=message):
        import_medmnist(archive, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [archive]


@pytest.mark.parametrize(
    "content", [b"", b"text", b"PK\x03\x04" + b"\0" * 99, pickle.dumps({"a": 1})]
)
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    archive = tmp_path / "odd.npz"
    archive.write_bytes(content)
    with pytest.raises(CohortError, match="not a MedMNIST archive"):
        import_medmnist(archive, tmp_path / "out")
    with pytest.raises(CohortError, match="no such file"):
        import_medmnist(tmp_path / "none.npz", tmp_path / "out")


def test_a_single_array_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(CohortError, match="one array, not an archive"):
        import_medmnist(tmp_path / "one.npy", tmp_path / "out")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    archive = medmnist(tmp_path / "small.npz")
    (tmp_path / "mine").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(
        CohortError, match="exists and is not an empty folder; remove it or choose another"
    ):
        import_medmnist(archive, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert import_medmnist(archive, tmp_path / "empty").exists()


def test_a_folder_appears_whole_or_not_at_all_and_a_dead_writers_is_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = socket.gethostname()
    (tmp_path / f".new.{here}.{dead.pid}.tmp").mkdir()
    left = {f".new.{here}.{os.getppid()}.tmp", f".new.another-host.{dead.pid}.tmp"}
    for name in left:
        (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "new") as folder:
        (folder / "half").rename(folder / "none")
    assert {path.name for path in tmp_path.iterdir()} == left
    with new_folder(tmp_path / "new") as folder:
        (folder / "whole").touch()
    assert (tmp_path / "new" / "whole").exists()


def test_a_manifest_is_all_that_a_cohort_needs(table: Path, cache: Path) -> None:
    rows = pd.DataFrame({"path": [str(table.parent / "0.nii.gz")], "label": [1], "subject": ["s"]})
    cohort = open_cohort(prepare_cohort(Manifest(str(table), rows, 2), recipe(), cache))
    assert cohort.labels.tolist() == [1]
