"""What follows a study from the page: its expected time, a confirmation, an ablation and a model."""

import io
import itertools
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from browsing import wait_for
from filelock import FileLock
from starlette.testclient import TestClient

from tune_app.compare.confirm import confirmation_spec
from tune_app.results.loading import load_study
from tune_app.serve.access import Access
from tune_app.serve.app import build_app
from tune_app.serve.estimate import estimate, pace_of
from tune_app.study.files import StudyFiles
from tune_app.study.spec import build_spec
from tune_app.synthetic import write_cohort

WriteStudy = Callable[..., Path]
TOKEN = "a token of the test"
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"), subjects=20, side=(8, 9))


@pytest.fixture
def study(write_study: WriteStudy, table: Path) -> Path:
    """A search over a table that can be read; its rows are synthetic."""
    spec = {"data": str(table), "config": {"epochs": 12, "depth": 10, "volume_shape": 28}}
    return write_study("a search", trials=10, epochs=12, spec=spec)


@pytest.fixture
def client(tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """The service over the study's folder; a lock keeps the machine, so that nothing that is queued starts."""
    monkeypatch.setenv("MEDTUNE_CACHE", str(tmp_path / "cache"))
    busy = StudyFiles(tmp_path / "busy")
    busy.root.mkdir()
    busy.asked.write_text("{}")
    with (
        FileLock(busy.lock),
        TestClient(build_app(tmp_path, Access(TOKEN)), base_url="http://127.0.0.1:8321") as client,
    ):
        yield client


def post(client: TestClient, path: str, body: Any) -> Any:
    return client.post(f"/api/studies/a%20search/{path}", json=body, headers=BEARER)


def test_the_best_are_queued_for_confirmation_as_the_command_would(
    client: TestClient, study: Path
) -> None:
    wanted, notes = confirmation_spec(load_study(study), top=1, seeds=2, folds="0,1,2")
    asked = {"top": 1, "seeds": 2, "folds": "0,1,2"}
    checked = post(client, "confirm", {**asked, "check": True}).json()
    assert (checked["runs"], checked["became"]) == (len(wanted.planned), "checked")
    assert checked["notes"] == notes
    files = StudyFiles(StudyFiles(study).confirmation)
    assert not files.root.exists(), "a check writes nothing"
    queued = post(client, "confirm", asked).json()
    assert queued["became"] == "queued"
    assert build_spec(yaml.safe_load(files.asked.read_text())) == wanted
    told = client.get(f"/api/studies/{queued['study']}").json()
    assert (told["state"], told["place"]) == ("queued", 1)
    again = post(client, "confirm", asked)
    assert (again.status_code, "exists already" in again.json()["detail"][0]) == (409, True)


def test_an_ablation_takes_the_table_and_the_settings_of_the_study(
    client: TestClient, study: Path, table: Path
) -> None:
    asked = {"name": "which fix", "variants": "add-one", "seeds": 1, "folds": "0,1"}
    answer = post(client, "ablate", asked).json()
    spec = build_spec(yaml.safe_load(StudyFiles(study.parent / "which fix").asked.read_text()))
    assert (spec.kind, spec.data, spec.num_trials) == ("ablation", str(table), answer["runs"])
    assert (spec.config["depth"], spec.epochs) == (10, 12)
    assert {trial.overrides["fold"] for trial in spec.planned} == {0, 1}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("confirm", {"folds": "7"}, "no fold 7"),
        ("confirm", {"top": 0}, "top"),
        ("ablate", {"name": "../x"}, "name"),
        ("ablate", {"name": "x", "variants": "mine.yaml"}, "variants"),
        ("export", {"name": "m", "trial": "99999"}, "no trial '99999'"),
        ("export", {"name": "m", "trial": "../../etc"}, "trial"),
        ("export", {"name": "m", "trial": "00001", "confirmed": True}, "not both"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_the_field(
    client: TestClient, path: str, body: Any, words: str
) -> None:
    answer = post(client, path, body)
    assert answer.status_code in (404, 409, 422)
    assert words in "\n".join(answer.json()["detail"])


def test_a_table_outside_the_given_folders_is_not_read(
    tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    app = build_app(study.parent, Access(TOKEN), data_roots=[str(tmp_path / "data")])
    with TestClient(app, base_url="http://127.0.0.1:8321") as client:
        for path, body in (("confirm", {}), ("ablate", {"name": "x"}), ("export", {"name": "m"})):
            answer = post(client, path, body)
            assert answer.status_code == 422, path
            assert "outside what --data-root allows" in answer.json()["detail"][0]


def test_the_expected_time_is_what_a_study_of_the_same_network_took(
    client: TestClient, study: Path, table: Path
) -> None:
    found = load_study(study)
    pace = pace_of(found)
    assert pace is not None
    times = sorted(found.epochs["time"])
    gaps = [min(b - a, 5 * found.epochs["epoch_s"].median()) for a, b in itertools.pairwise(times)]  # fmt: skip
    assert pace.epoch_s == pytest.approx(sum(gaps) / len(gaps))
    ended = found.trials_full[found.trials_full["state"].isin(["completed", "stopped", "failed"])]
    assert pace.share == pytest.approx(ended["epochs_run"].sum() / ended["epochs"].sum())

    fields = {"data": str(table), "trials": 30, "config": found.spec.config}
    told = estimate(build_spec(fields), None, [found])
    assert told is not None
    assert told.latest_s == pytest.approx(30 * 12 * pace.epoch_s)
    assert told.likely_s == pytest.approx(told.latest_s * pace.share)
    alone = estimate(build_spec({**fields, "max_concurrent": 1}), None, [found])
    assert alone is not None
    assert alone.latest_s == pytest.approx(told.latest_s * pace.at_once)
    other = {**fields, "data": "/elsewhere.csv"}
    twice = estimate(build_spec(other), round(2 * pace.volumes), [found])
    assert twice is not None
    assert twice.latest_s == pytest.approx(2 * told.latest_s, rel=0.01)
    assert estimate(build_spec(other), None, [found]) is None, "of how many volumes?"
    deeper = {**fields, "config": {**found.spec.config, "depth": 50}}
    assert estimate(build_spec(deeper), None, [found]) is None, "no network of that depth was run"

    client.get("/api/studies/a%20search")  # read once
    answer = client.post("/api/check", json=fields, headers=BEARER).json()["estimate"]
    assert answer["latest_s"] == pytest.approx(told.latest_s)
    assert answer["study"] == "a search"


def test_a_checkpoint_that_is_not_there_is_told_before_anything_is_queued(
    client: TestClient, table: Path
) -> None:
    fields = {"data": str(table), "config": {"pretrained_path": "/nowhere/resnet.pth"}}
    answer = client.post("/api/check", json=fields, headers=BEARER)
    assert answer.status_code == 422
    assert answer.json()["detail"] == ["config: pretrained_path: no file /nowhere/resnet.pth"]


def test_a_trial_becomes_a_model_that_is_downloaded_with_the_token(
    tmp_path: Path, trained_study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDTUNE_CACHE", str(trained_study.parent / "cache"))
    folder = tmp_path / "studies"
    folder.mkdir()
    shutil.copytree(trained_study, folder / "a search")
    with TestClient(build_app(folder, Access(TOKEN)), base_url="http://127.0.0.1:8321") as client:

        def listed(**headers: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = client.get(
                "/api/studies/a%20search/models", headers=headers
            ).json()["models"]
            return found

        assert listed() == []
        assert post(client, "export", {"name": "first", "trial": "00000"}).status_code == 200
        assert listed()[0]["state"] == "writing"
        busy = post(client, "export", {"name": "second"})
        assert (busy.status_code, "wait for it" in busy.json()["detail"][0]) == (409, True)
        wait_for(lambda: listed()[0]["state"] != "writing")
        (model,) = listed(**BEARER)
        assert model["state"] == "written", model["lines"]
        assert json.loads((Path(model["place"]) / "model.json").read_text())
        assert listed()[0]["place"] == "", "the rest takes the token"
        taken = post(client, "export", {"name": "first"})
        assert (taken.status_code, "there is a model" in taken.json()["detail"][0]) == (409, True)
        path = "/api/studies/a%20search/models/first"
        assert client.get(path).status_code == 401
        content = client.get(path, headers=BEARER).content
        names = zipfile.ZipFile(io.BytesIO(content)).namelist()
        assert "first/model.json" in names
        assert any(name.endswith(".safetensors") for name in names)
        assert client.get(f"{path}x", headers=BEARER).status_code == 409
        assert not list((folder / ".medtune" / "models").glob("*.zip"))
