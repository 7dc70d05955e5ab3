"""The texts sent to a cluster, tested without one: pure functions against golden files and Ray's own rules."""

import io
import json
import shutil
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import requests
import yaml
from ray.runtime_env import RuntimeEnv
from typer.testing import CliRunner

from trainables.data.table_file import ManifestError
from tune_app.cli import app as cli
from tune_app.cli import cluster as cli_cluster
from tune_app.cli import studies as cli_studies
from tune_app.cli.common import err
from tune_app.cluster.jobs import Jobs, JobServerError, is_loopback, job_server
from tune_app.cluster.kubernetes import Cluster, kuberay_manifest
from tune_app.cluster.slurm import Allocation, slurm_script
from tune_app.cluster.submit import (
    PACKAGES,
    SPEC_FILE,
    build_submission,
    next_id,
    pinned_requirements,
    refuse_other_settings,
)
from tune_app.study.asked import AskedAblation, AskedConfirmation, AskedResumption, read_asked
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles, job_name, resumed_spec
from tune_app.study.spec import StudySpec, build_spec, read_study_file

ROOT = Path(__file__).parents[3]
WriteStudy = Callable[..., Path]
SHARED = {"data": "/shared/adrenal/table.csv", "config": {"epochs": 30}, "trials": 8}


def a_spec(**fields: Any) -> StudySpec:
    return build_spec(SHARED | fields)


def test_only_code_and_the_spec_are_packed(tmp_path: Path) -> None:
    """A checkout as people have them: data, weights and history lie between the code."""
    for name in (
        "tune_app/cli/app.py",
        "trainables/finetune.py",
        "search_spaces/fixes.py",
        "pyproject.toml",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("code\n")
    unwanted = [
        ".git/objects/aa",
        "tune_app/checkpoint.pt",
        "trainables/scan.nii.gz",
        "pretrained/resnet_50.pth",
    ]
    unwanted += [
        "studies/a/study.db",
        "trainables/__pycache__/finetune.pyc",
        ".env",
        "table.csv",
        "tune_app/.secret",
        "tune_app/study/settings.json",
    ]
    for name in unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"secret")
    sent = build_submission(a_spec(), "/shared/studies/first", source=tmp_path, pip=False)
    names = {name for name, _ in sent.contents()}
    assert names == {
        "tune_app/cli/app.py",
        "trainables/finetune.py",
        "search_spaces/fixes.py",
        "pyproject.toml",
        SPEC_FILE,
    }


def test_what_is_sent_runs_without_the_checkout_and_is_the_same_each_time() -> None:
    spec = a_spec(
        space={"base": "documented", "search": {"s": {"low": 5, "high": 40, "log": True}}}
    )
    sent, again = (build_submission(spec, "/shared/studies/first") for _ in range(2))
    assert sent == again, "a cluster stores one package once"
    with zipfile.ZipFile(io.BytesIO(sent.package)) as archive:
        code = {name for name in archive.namelist() if name.endswith(".py")}
        fields = json.loads(archive.read(SPEC_FILE))
    assert code == {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    files_read = {
        path.relative_to(ROOT).as_posix()
        for package, patterns in installed["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    assert {
        "tune_app/report/report.html",
        "tune_app/report/report.css",
        "tune_app/report/report.js",
        "tune_app/serve/static/serve.html",
        "tune_app/study/prior.json",
    } <= files_read
    assert files_read <= {name for name, _ in sent.contents()}
    assert build_spec(fields) == spec
    assert len(sent.package) < 2**20
    assert RuntimeEnv(**sent.runtime_env)["pip"]["packages"] == pinned_requirements()


def test_the_packed_spec_means_the_same_as_a_study_file(tmp_path: Path) -> None:
    sent = build_submission(a_spec(), "/shared/studies/first", pip=False)
    with zipfile.ZipFile(io.BytesIO(sent.package)) as archive:
        archive.extract(SPEC_FILE, tmp_path)
    assert build_spec(read_study_file(tmp_path / SPEC_FILE)) == a_spec()


def test_versions_are_pinned_but_for_the_clusters_own() -> None:
    pins = pinned_requirements(
        ["ray[default,tune]>=2.54", "torch>=2.10", "numpy>=1", 'onnx>=1; extra == "onnx"']
    )
    assert [pin.partition("==")[0] for pin in pins] == ["numpy"]
    names = {pin.partition("==")[0] for pin in pinned_requirements()}
    assert {"optuna", "monai", "pandas"} <= names
    assert not {"ray", "torch", "pytest"} & names


@pytest.mark.parametrize(
    ("earlier", "number"),
    [
        ([], 1),
        (["medtune-first-00000000-7"], 1),
        (["{}-1", "{}-9", "{}-10"], 11),
        (["{}-x", "{}-2-3"], 1),
    ],
)
def test_the_next_job_of_a_study_counts_on(earlier: list[str], number: int) -> None:
    stem = job_name("/shared/studies/first")
    assert (
        next_id("/shared/studies/first", [one.format(stem) for one in earlier])
        == f"{stem}-{number}"
    )


def test_job_names_tell_folders_apart_and_stay_readable() -> None:
    assert job_name("/a/My Study, fold 0") != job_name("/b/My Study, fold 0")
    assert job_name("s3://bucket/My Study, fold 0/").startswith("medtune-")
    assert job_name("/a/My Study, fold 0").startswith("medtune-my-study-fold-0-")
    assert len(job_name("/a/" + "x" * 200)) <= 47, "KubeRay refuses a RayJob with a longer name"


def test_a_place_that_a_cluster_cannot_find_is_refused() -> None:
    with pytest.raises(SpecError, match="absolute path of a shared folder, or a URL"):
        build_submission(a_spec(), "studies/first")


def test_a_package_over_rays_limit_is_refused_and_its_largest_file_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tune_app.cluster.submit.LIMIT_MIB", 0.01)
    with pytest.raises(
        SpecError, match=r"Ray takes 0.01: move out files that are no code \(.*\.py 0\.0 MiB"
    ):
        build_submission(a_spec(), "/shared/studies/first")


def test_a_study_goes_on_only_as_itself(tmp_path: Path) -> None:
    files = StudyFiles(tmp_path)
    files.write({"spec": a_spec(gpus_per_trial=0.25).model_dump(mode="json")})
    asked = a_spec(max_concurrent=2, gpus_per_trial="auto", wait_for_resources_s=60)
    spec = resumed_spec(files, asked)
    assert (spec.max_concurrent, spec.gpus_per_trial, spec.wait_for_resources_s) == (2, 0.25, 60)
    with pytest.raises(
        SpecError, match="trials is 8 there, 9 was asked for; seed is 0 there, 1 was asked for"
    ):
        resumed_spec(files, a_spec(trials=9, seed=1))


def test_a_dry_run_shows_everything_and_needs_no_cluster(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SHARED))
    asked = [
        "submit",
        "--dry-run",
        "--",
        "run",
        str(tmp_path / "study.yaml"),
        "--out",
        "/shared/studies/first",
    ]
    shown = yaml.safe_load(CliRunner().invoke(cli.app, asked, catch_exceptions=False).stdout)
    assert shown["submission_id"] == next_id("/shared/studies/first", [])
    assert (
        shown["entrypoint"]
        == "python -P -m tune_app.cli run study.json --out /shared/studies/first --resume"
    )
    assert shown["study"]["trials"] == 8
    assert "tune_app/cli/app.py" in shown["package"]["files"]
    again = yaml.safe_load(
        CliRunner().invoke(cli.app, [*asked, "--retry-failed"], catch_exceptions=False).stdout
    )
    assert again["entrypoint"] == shown["entrypoint"] + " --retry-failed"
    manifest = CliRunner().invoke(
        cli.app, ["submit", "--kuberay", "-", *asked[2:], "--retry-failed"]
    )
    assert manifest.exit_code == 2, "its job may start more than once"
    wrong = CliRunner().invoke(cli.app, [*asked, "--trails", "3"])
    assert wrong.exit_code == 2, "options are checked before anything is sent"


# Plans that are made by the job ----------------------------------------------------------------------------------------


def sent(*asked: object) -> dict[str, Any]:
    """The study file that `submit -- asked` sends."""
    shown = CliRunner().invoke(
        cli.app, ["submit", "--dry-run", "--", *map(str, asked)], catch_exceptions=False
    )
    assert shown.exit_code == 0, shown.stderr
    fields: dict[str, Any] = yaml.safe_load(shown.stdout)["study"]
    return fields


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[StudySpec, Path, dict[str, Any]]]:
    """What commands would run here, instead of running it."""
    found: list[tuple[StudySpec, Path, dict[str, Any]]] = []

    def instead(spec: StudySpec, root: Path, start: cli_studies.Start, **how: Any) -> None:
        found.append((spec, root, vars(start) | how))

    monkeypatch.setattr(cli_studies, "_run_and_tell", instead)
    return found


def run_here(*asked: object) -> str:
    done = CliRunner().invoke(cli.app, list(map(str, asked)), catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stderr


def a_table(folder: Path) -> Path:
    """A table of empty volumes, a subject each, every third positive."""
    folder.mkdir()
    lines = ["path,label,subject"]
    for number in range(30):
        (folder / f"{number}.nii").touch()
        lines.append(f"{number}.nii,{int(number % 3 == 0)},s{number}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


def test_an_ablation_is_planned_by_its_job_where_only_that_sees_the_table(
    tmp_path: Path, runs: list[Any]
) -> None:
    table, away = a_table(tmp_path / "data"), tmp_path / "away"
    variants = tmp_path / "variants.yaml"
    variants.write_text("reference: {}\nwider: {max_m: 0.5}\n")
    asked = ["ablate", "--data", table, "--variants", variants, "--seeds", 2, "--first-seed", 4]
    asked += ["--set", "num_folds=3", "--max-concurrent", 2, "--epochs", 5]
    run_here(*asked, "--out", tmp_path / "here")
    seen = sent(*asked, "--out", "/shared/second")
    table.parent.rename(away)
    unseen = CliRunner().invoke(
        cli.app, ["submit", "--dry-run", "--", *map(str, asked), "--out", "/shared/second"]
    )
    assert f"note: {table} cannot be read on this machine: the job checks it" in unseen.stderr
    assert yaml.safe_load(unseen.stdout)["study"] == seen

    variants.unlink()
    away.rename(table.parent)
    (tmp_path / SPEC_FILE).write_text(json.dumps(seen))
    job = ["run", tmp_path / SPEC_FILE, "--out", "/shared/second", "--resume"]
    assert "12 runs of 5 epochs: 2 variants, seeds 2 from 4, folds all" in run_here(*job)
    (here, _, _), (there, root, how) = runs
    assert there == here
    assert (len(there.planned), there.max_concurrent, str(root)) == (12, 2, "/shared/second")
    assert (how["go_on"], how["resume"]) == (True, False), "the same job again continues"

    table.unlink()
    refused = CliRunner().invoke(cli.app, list(map(str, job)))
    assert isinstance(refused.exception, ManifestError)
    assert f"table {table}: no such file" in str(refused.exception)
    assert len(runs) == 2


def test_a_confirmation_is_planned_by_its_job_where_only_that_sees_search_and_table(
    write_study: WriteStudy, tmp_path: Path, runs: list[Any]
) -> None:
    table = a_table(tmp_path / "data")
    search = write_study(trials=8, epochs=6, spec={"data": str(table)})
    asked = ["confirm", search, "--top", 2, "--seeds", 2, "--folds", "0,1", "--max-concurrent", 3]
    run_here(*asked)
    seen = sent(*asked)
    table.unlink()
    with_search = sent(*asked)
    search.rename(tmp_path / "away")
    assert seen == with_search == sent(*asked)

    (tmp_path / SPEC_FILE).write_text(json.dumps(seen))
    job = ["run", str(tmp_path / SPEC_FILE), "--out", str(search / "confirmation"), "--resume"]
    refused = CliRunner().invoke(cli.app, job)
    assert isinstance(refused.exception, SpecError)
    assert "no study here" in str(refused.exception)
    (tmp_path / "away").rename(search)
    refused = CliRunner().invoke(cli.app, job)
    assert isinstance(refused.exception, ManifestError), "its table is still away"
    shutil.rmtree(table.parent)
    a_table(table.parent)
    run_here(*job)
    (here, place, _), (there, root, how) = runs
    assert (there, root) == (here, place)
    assert len(there.planned) == 16, "2 folds x 2 seeds x (2 candidates and 2 settings)"
    assert (how["go_on"], how["resume"]) == (True, False)

    StudyFiles(root).write({"spec": there.model_dump(mode="json")})
    run_here(*job)
    assert runs[2][2]["resume"] is True
    (tmp_path / SPEC_FILE).write_text(json.dumps(seen | {"seeds": 3}))
    refused = CliRunner().invoke(cli.app, job)
    assert "holds a confirmation with other candidates, folds or seeds" in str(refused.exception)


def test_a_study_is_resumed_by_a_job_that_alone_sees_it(a_search: Path, runs: list[Any]) -> None:
    assert sent("resume", "/nowhere/study", "--hours", 2) == sent("resume", a_search, "--hours", 2)
    file = {"asked": "resumption", "hours": 2.0, "fields": {"wait_for_resources_s": 60}}
    done = CliRunner().invoke(
        cli.app,
        ["run", "-", "--out", str(a_search), "--resume", "--retry-failed"],
        input=json.dumps(file),
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.stderr
    spec, root, how = runs[0]
    recorded = StudyFiles(a_search).read_spec()
    assert root == a_search
    assert spec == recorded.model_copy(update={"hours": 2.0, "wait_for_resources_s": 60.0})
    assert (how["resume"], how["retry_failed"]) == (True, True)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["ablate", "--folds", "first"], "folds='first': all, own, or numbers"),
        (["ablate", "--folds", "1,1"], "each fold once"),
        (["ablate", "--set", "seed=3"], "seed is decided by seeds: leave it out"),
        (["ablate", "--variants", "add-two"], "add-two"),
        (["ablate", "--set", "amp=half"], "amp"),
    ],
)
def test_what_needs_no_table_is_checked_before_anything_is_sent(
    asked: list[str], message: str
) -> None:
    verb, *options = asked
    where = ["--data", "/nowhere/table.csv", "--out", "/shared/second"]
    refused = CliRunner().invoke(cli.app, ["submit", "--dry-run", "--", verb, *where, *options])
    assert refused.exit_code == 1
    assert message in str(refused.exception)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["results", "/shared/first"], "results is not sent to a cluster: one of run, ablate"),
        (["train", "--data", "/shared/table.csv"], "train is not sent"),
        (["confirm", "/shared/first", "--test"], "--test is not sent"),
    ],
)
def test_a_command_that_no_cluster_runs_is_refused(asked: list[str], message: str) -> None:
    refused = CliRunner().invoke(cli.app, ["submit", "--dry-run", "--", *asked])
    assert refused.exit_code == 2
    assert message in " ".join(refused.stderr.replace("\u2502", " ").split())


def test_a_file_for_a_job_takes_no_other_settings(tmp_path: Path) -> None:
    (tmp_path / SPEC_FILE).write_text('{"asked": "resumption"}')
    asked = ["run", str(tmp_path / SPEC_FILE), "--out", "/shared/first", "--trials", "3"]
    refused = CliRunner().invoke(cli.app, asked)
    assert refused.exit_code == 2
    with pytest.raises(SpecError, match="top"):
        read_asked({"asked": "confirmation", "search": "/shared/first", "top": "x", "seeds": 1})
    with pytest.raises(SpecError, match="asked"):
        read_asked({"asked": "everything"})


def test_every_form_of_a_job_holds_what_was_asked_for() -> None:
    asked = AskedAblation(data="/shared/table.csv", variants={"a": {}, "b": {"s": 20}}, seeds=2)
    batch = slurm_script(asked, "/shared/second", Allocation())
    text = batch.split("<<'STUDY' &\n")[1].split("STUDY\n")[0]
    assert read_asked(json.loads(text)) == asked
    config, _ = yaml.safe_load_all(kuberay_manifest(asked, "/shared/second", Cluster()))
    waiting = read_asked(json.loads(config["data"][SPEC_FILE]))
    assert waiting == asked.model_copy(update={"fields": {"wait_for_resources_s": 1800.0}})
    hidden = asked.model_copy(update={"data": "/home/me/table.csv"})
    with pytest.raises(SpecError, match=r"data /home/me/table\.csv: no pod sees it"):
        kuberay_manifest(hidden, "/shared/second", Cluster())
    search = AskedConfirmation(search="/home/me/first", top=1, seeds=1)
    with pytest.raises(SpecError, match="the search /home/me/first: no pod sees it"):
        kuberay_manifest(search, "/shared/second", Cluster())
    moved = AskedResumption(fields={"data": "/home/me/table.csv"})
    with pytest.raises(SpecError, match=r"data /home/me/table\.csv: no pod sees it"):
        kuberay_manifest(moved, "/shared/second", Cluster())


# Where the job server is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("127.0.0.1:8265", "http://127.0.0.1:8265"),
        ("https://ray.example.org/", "https://ray.example.org"),
    ],
)
def test_addresses_of_job_servers(given: str, url: str) -> None:
    assert job_server(given) == url


@pytest.mark.parametrize("given", ["ray://head:10001", "http://", "https://user:secret@head:8265"])
def test_what_is_no_job_server_or_shows_a_password_is_refused(given: str) -> None:
    with pytest.raises(JobServerError):
        job_server(given)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("192.0.2.7", False),
    ],
)
def test_loopback_is_told_from_networks(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


# Files for clusters ----------------------------------------------------------------------------------------------------

GOLDEN = """\
# medtune: /shared/studies/first
# kubectl apply -f THIS; kubectl logs -f job/medtune-first-6ad55b09. Needs KubeRay 1.5.1, the image medtune:0.2.0 with medtune
# in it, and the claim medtune-shared with the data. The operator makes the access token, in a Secret.
apiVersion: v1
kind: ConfigMap
metadata:
  name: medtune-first-6ad55b09
data:
  study.json: |
    {
     "data": "/shared/adrenal/table.csv",
     "trials": 8,
     "config": {
      "epochs": 30
     },
     "wait_for_resources_s": 1800.0
    }
---
apiVersion: ray.io/v1
kind: RayJob
metadata:
  name: medtune-first-6ad55b09
spec:
  entrypoint: medtune run /etc/medtune/study.json --out /shared/studies/first --resume
  backoffLimit: 0
  shutdownAfterJobFinishes: true
  ttlSecondsAfterFinished: 600
  rayClusterSpec:
    rayVersion: 2.60.0
    authOptions:
      mode: token
    enableInTreeAutoscaling: true
    autoscalerOptions:
      idleTimeoutSeconds: 300
    headGroupSpec:
      serviceType: ClusterIP
      rayStartParams:
        num-cpus: '0'
      template:
        spec:
          containers:
          - name: ray-head
            image: medtune:0.2.0
            ports:
            - containerPort: 6379
              name: gcs-server
            - containerPort: 8265
              name: dashboard
            - containerPort: 10001
              name: client
            resources:
              requests:
                cpu: '4'
                memory: 16Gi
              limits:
                cpu: '4'
                memory: 16Gi
            volumeMounts:
            - name: shared
              mountPath: /shared
            - name: study
              mountPath: /etc/medtune
              readOnly: true
            - name: shm
              mountPath: /dev/shm
          volumes:
          - name: shared
            persistentVolumeClaim:
              claimName: medtune-shared
          - name: study
            configMap:
              name: medtune-first-6ad55b09
          - name: shm
            emptyDir:
              medium: Memory
              sizeLimit: 8Gi
    workerGroupSpecs:
    - groupName: gpu
      replicas: 0
      minReplicas: 0
      maxReplicas: 4
      rayStartParams: {}
      template:
        spec:
          containers:
          - name: ray-worker
            image: medtune:0.2.0
            resources:
              requests:
                cpu: '8'
                memory: 32Gi
                nvidia.com/gpu: '1'
              limits:
                cpu: '8'
                memory: 32Gi
                nvidia.com/gpu: '1'
            volumeMounts:
            - name: shared
              mountPath: /shared
            - name: study
              mountPath: /etc/medtune
              readOnly: true
            - name: shm
              mountPath: /dev/shm
          volumes:
          - name: shared
            persistentVolumeClaim:
              claimName: medtune-shared
          - name: study
            configMap:
              name: medtune-first-6ad55b09
          - name: shm
            emptyDir:
              medium: Memory
              sizeLimit: 8Gi
"""


def test_the_kuberay_manifest_is_the_golden_one() -> None:
    assert kuberay_manifest(a_spec(), "/shared/studies/first", Cluster()) == GOLDEN


def test_the_manifest_holds_the_study_and_survives_its_head() -> None:
    config, job = yaml.safe_load_all(
        kuberay_manifest(a_spec(), "s3://bucket/first", Cluster(gpus=0, max_workers=2))
    )
    assert build_spec(json.loads(config["data"][SPEC_FILE])) == a_spec(wait_for_resources_s=1800)
    assert config["metadata"]["name"] == job["metadata"]["name"] == job_name("s3://bucket/first")
    assert job["spec"]["entrypoint"].split()[-3:] == ["--out", "s3://bucket/first", "--resume"]
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert "nvidia.com/gpu" not in str(cluster["workerGroupSpecs"])


def test_a_path_that_no_pod_sees_is_refused() -> None:
    with pytest.raises(
        SpecError, match=r"data /home/me/table\.csv: no pod sees it; put it below /shared"
    ):
        kuberay_manifest(a_spec(data="/home/me/table.csv"), "/shared/first", Cluster())


def test_a_running_job_with_other_settings_is_told_and_the_same_one_is_not() -> None:
    sent = build_submission(a_spec(), "/shared/studies/first", pip=False)
    refuse_other_settings(a_spec(), "job-1", sent.metadata)
    refuse_other_settings(a_spec(seed=7), "job-1", {})
    with pytest.raises(SpecError) as error:
        refuse_other_settings(a_spec(seed=7, max_concurrent=2), "job-1", sent.metadata)
    told = str(error.value)
    assert "job-1 runs this study with other settings" in told
    assert "seed is 0 there, 7 was asked for" in told
    assert "max_concurrent is None there, 2 was asked for" in told


def test_a_running_job_with_another_plan_is_told() -> None:
    asked = AskedAblation(data="/shared/table.csv", variants={"a": {}, "b": {}}, seeds=2)
    sent = build_submission(asked, "/shared/studies/first", pip=False)
    refuse_other_settings(asked, "job-1", sent.metadata)
    refuse_other_settings(AskedResumption(hours=2), "job-1", sent.metadata)
    other = asked.model_copy(update={"seeds": 3})
    with pytest.raises(SpecError, match="seeds is 2 there, 3 was asked for"):
        refuse_other_settings(other, "job-1", sent.metadata)
    with pytest.raises(SpecError, match="a study of kind ablation, search was asked for"):
        refuse_other_settings(a_spec(), "job-1", sent.metadata)
    whole = a_spec(kind="ablation", planned=[{"variant": "a", "overrides": {}}])
    refuse_other_settings(whole, "job-1", sent.metadata)


@pytest.mark.parametrize(
    "error",
    [
        aiohttp.ClientConnectionError("reset"),
        aiohttp.WSServerHandshakeError(None, (), status=500),  # type: ignore[arg-type]
        requests.ConnectionError("refused"),
    ],
)
def test_a_job_server_that_breaks_off_is_told_in_a_line(error: Exception) -> None:
    jobs = Jobs.__new__(Jobs)
    jobs.url = "http://127.0.0.1:8265"
    with pytest.raises(JobServerError, match="no job server answers at http://127"), jobs._told():
        raise error


@pytest.mark.parametrize(
    ("code", "told"), [(1, "job-1 failed: exit code 1"), (None, "job-1 failed: never started")]
)
def test_the_log_of_a_failed_job_is_shown_once(
    code: int | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(err, "print", lambda text, **_: said.append(text))
    message = "Job entrypoint failed, last available logs: a line" if code else "never started"
    job = SimpleNamespace(
        status=SimpleNamespace(value="FAILED"), driver_exit_code=code, message=message
    )
    jobs = SimpleNamespace(follow=lambda number, write: 1, find=lambda number: job)
    assert cli_cluster._follow(jobs, "job-1") == 1
    assert said == [told]
