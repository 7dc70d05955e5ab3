"""Fixtures of the service's tests: a client of it, and a running service to open in a browser."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import TOKEN, Service
from starlette.testclient import TestClient

from tune_app.serve.access import Access
from tune_app.serve.app import build_app
from tune_app.study.files import StudyFiles


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDTUNE_CACHE", str(tmp_path / "cache"))  # holds the machine's lock


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, a_search: Path) -> Path:
    """Two studies: one that has ended, and one in a folder, with a name that tries to be more, that was interrupted."""
    root = tmp_path_factory.mktemp("written")
    shutil.copytree(a_search, root / "first")
    again = root / "group" / "second & <b>third<"
    shutil.copytree(a_search, again / "b>")
    record = StudyFiles(again / "b>").trial("00003").record
    record.write_text(
        json.dumps(json.loads(record.read_text()) | {"state": "running", "ended": None})
    )
    return root


@pytest.fixture
def client(tmp_path: Path, written: Path, own_cache: None) -> Iterator[TestClient]:
    """The service over copies of these studies, bound to this machine."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    with TestClient(build_app(tmp_path, Access(TOKEN)), base_url="http://127.0.0.1:8321") as client:
        yield client


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, a_search: Path, an_ablation: Path
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(a_search, folder / "a search")
    shutil.copytree(an_ablation, folder / "an ablation")
    running = Service(folder, folder / "cache")
    yield running
    said = running.end()
    assert "Traceback" not in said, said


@pytest.fixture
def another(service: Service) -> Iterator[Callable[[str], StudyFiles]]:
    """Return a function that puts a copy of the search next to it under another name; whatever happens, it is removed."""
    copies = []

    def copy(name: str) -> StudyFiles:
        copies.append(service.folder / name)
        return StudyFiles(shutil.copytree(service.folder / "a search", copies[-1]))

    yield copy
    for root in copies:
        shutil.rmtree(root, ignore_errors=True)
