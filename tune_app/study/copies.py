"""A study in object storage opened as a local copy."""

import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from trainables.data.storage import Remote, url_of
from trainables.own_folder import fresh_own
from tune_app.study.errors import SpecError
from tune_app.study.files import default_cache, job_name

LEASE = ".driver.json"
"""Object that names the driver of the study; rewritten all the time, removed at the end."""


FRESH_S = 60.0
"""Age up to which a reader takes the study for running."""


LARGE = (".pt", ".db")
"""Ends of names that are not needed to read a study."""


REQUEST = re.compile(r"requests/[0-9A-Za-z_-]{1,64}\.json")
"""Names of the objects that ask the driver for something."""


def opened(place: str | Path) -> tuple[Path, bool | None]:
    """Return the folder to read a study from, and whether it is being driven; None where its lock shows that.

    A study in object storage is copied without weights, to a folder that is used again the next time.
    """
    if (url := url_of(place)) is None:
        return Path(place), None
    remote = Remote(url)
    listed = {one.name: one.written for one in remote.listing()}
    if "study.json" not in listed:
        raise SpecError(
            f"{url}: no study here (no study.json); name the place that `medtune run` was given with --out"
        )
    folder = folder_of(url, "seen")
    fresh_own(folder, url)
    written = listed.pop(LEASE, None)
    # Records before rows, as in a folder: a trial that ends in between must not show an end without its rows.
    for of_trials in (True, False):
        copy_objects(
            remote,
            [
                name
                for name in listed
                if not name.endswith(LARGE) and name.startswith("trials/") == of_trials
            ],
            folder,
        )
    return folder, written is not None and (datetime.now(UTC) - written).total_seconds() < FRESH_S


def folder_of(url: str, kind: str) -> Path:
    """Return the folder of this machine for copies of the objects at the URL; it has the last part of the URL as its name."""
    return default_cache() / kind / job_name(url).rsplit("-", 1)[-1] / url.rsplit("/", 1)[-1]


def fetch_study(place: str, folder: Path) -> int:
    """Copy a study from object storage to a folder, weights and all; returns the number of files.

    Raises SpecError when there is none, or the folder is not empty.
    """
    url = url_of(place)
    if url is None:
        raise SpecError(f"{place}: not object storage; a folder can be used as it is")
    if folder.exists() and any(folder.iterdir()):
        raise SpecError(f"{folder}: not empty; name another folder")
    remote = Remote(url)
    names = [name for name in remote.names() if name != LEASE]
    if "study.json" not in names:
        raise SpecError(f"{url}: no study here (no study.json)")
    copy_objects(remote, names, folder)
    return len(names)


def copy_objects(remote: Remote, names: list[str], folder: Path) -> None:
    """Copy objects to files of the same names below `folder`; those that have been removed meanwhile are left out."""
    with ThreadPoolExecutor(8) as pool:
        for done in pool.map(lambda name: remote.get(name, folder / name), names):
            assert done in (True, False)
