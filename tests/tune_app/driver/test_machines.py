"""Studies on machines that lack something: a cluster at its address, locks, shared memory, a home to write to."""

import errno
import fcntl
import os
import signal
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from filelock import Timeout

import tune_app.driver.ray_access
from trainables.config import build_config
from trainables.data.manifest import read_manifest
from trainables.data.scans import Recipe
from trainables.data.volumes import CohortError, prepare_cohort
from tune_app.driver.local_ray import cpus_of_ray
from tune_app.driver.optuna_database import Database, SearchError, sqlite_url
from tune_app.driver.ray_access import AddressError, join
from tune_app.driver.stopping import (
    exit_code_at_start,
    stopping_on_request,
    taken_away_while_ray_starts,
)
from tune_app.study.files import StudyFiles
from tune_app.study.rows import driver_lock, is_held
from tune_app.synthetic import write_cohort


@pytest.fixture
def web_server() -> Iterator[str]:
    """The address of something that is no cluster's head: such as Ray's dashboard."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    serving.join()
    server.server_close()


def test_an_address_at_which_nothing_answers_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray asks it for minutes, and prints each try."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(AddressError, match=rf"{dead}: no Ray cluster answers there .*RAY_ADDRESS"):
        join(dead)
    with pytest.raises(AddressError, match=r"no Ray cluster answers there"):
        join("no-such-host.invalid:6379")


def test_an_address_of_something_else_is_refused_soon(
    web_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_app.driver.ray_access, "ANSWER_S", 2.0)
    with pytest.raises(AddressError, match=r"not the head of a Ray cluster: .*6379"):
        join(web_server)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75), (signal.SIGUSR2, 130)]
)
def test_a_signal_before_the_trials_begin_has_one_exit_code(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Also while Ray starts, whose own handler of SIGTERM exits with the signal's number."""
    with pytest.raises(KeyboardInterrupt) as error, stopping_on_request(StudyFiles(tmp_path)):
        signal.raise_signal(number)
    assert exit_code_at_start(error.value) == code
    with pytest.raises(KeyboardInterrupt) as error, taken_away_while_ray_starts():
        sys.exit(signal.SIGTERM)
    assert exit_code_at_start(error.value) == 143
    with pytest.raises(SystemExit), taken_away_while_ray_starts():
        sys.exit(3)


def test_a_local_ray_has_the_cpus_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr("tune_app.driver.local_ray.usable_cpus", lambda: 3)
    assert cpus_of_ray() == {"num_cpus": 3}
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "7")
    assert cpus_of_ray() == {"num_cpus": 7}


def test_a_driver_is_seen_at_work_without_flock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = tmp_path / ".driver.lock"
    assert not is_held(lock)
    with driver_lock(lock):
        assert is_held(lock)
        with pytest.raises(Timeout):
            driver_lock(lock)
        monkeypatch.undo()
        assert is_held(lock), "for a reader whose own machine has flock"
    assert not is_held(lock)


def test_a_database_needs_no_memory_that_processes_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder in the place of the file that SQLite shares has it fail as a file system without shared mappings does."""
    path = tmp_path / "study.db"
    (tmp_path / "study.db-shm").mkdir()
    with (
        closing(sqlite3.connect(tmp_path / "study.db")) as db,
        pytest.raises(sqlite3.OperationalError),
    ):
        db.executescript("PRAGMA journal_mode=WAL; BEGIN IMMEDIATE;")
    for _ in range(2):
        database = Database(sqlite_url(path))
        database.set_attr("a", 1)
        database.close()
    assert "rollback journal" in caplog.text
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert db.execute("SELECT count(*) FROM study_user_attributes").fetchone() == (1,)


def test_a_database_on_a_file_system_that_fails_it_comes_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorname = "SQLITE_IOERR_LOCK"
        raise error

    monkeypatch.setattr("tune_app.driver.optuna_database._choose_journal", fails)
    with pytest.raises(SearchError, match=r"disk I/O error: .*on a local disk.*`storage`"):
        Database(sqlite_url(tmp_path / "study.db"))


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EROFS, "cannot write there: choose another folder with --cache, or MEDTUNE_CACHE"),
        (errno.EACCES, "cannot write there: choose another folder with --cache, or MEDTUNE_CACHE"),
        (errno.ENOSPC, "free some room, or choose another folder with --cache"),
        (errno.EIO, "Input/output error.*: choose another folder with --cache"),
    ],
)
def test_what_to_do_about_a_cache_depends_on_what_is_wrong_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    table = write_cohort(tmp_path / "cohort", subjects=4, side=(14, 18))

    def mkdir(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    manifest = read_manifest(table)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(CohortError, match=advice) as error:
        prepare_cohort(
            manifest,
            Recipe.from_config(build_config({"volume_shape": 16})),
            tmp_path / "home" / "cache",
        )
    assert ("free some room" in str(error.value)) == (number == errno.ENOSPC)
