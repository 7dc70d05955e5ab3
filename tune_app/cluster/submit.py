"""A study -> the files for a Ray cluster: the packed code, the job, a KubeRay manifest, a cluster-launcher file.

Pure functions, so that `--dry-run` shows exactly the files sent and a test compares it with a golden text. Only code goes
out: the packages' own files of known kinds, `pyproject.toml` and the study's resolved spec. Data, checkpoints and
weights stay where they are, and are named by paths that every node sees. `jobs.py` does the sending.
"""

import io
import json
import re
import shlex
import uuid
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

from trainables.data.json_files import parse_json
from trainables.data.storage import url_of
from tune_app.study.asked import KIND, Asked, AskedResumption, asked_text, read_asked
from tune_app.study.errors import SpecError
from tune_app.study.files import differing_fields, job_name, refuse_other_bytes
from tune_app.study.spec import StudySpec, build_spec

PACKAGES = ("search_spaces", "trainables", "tune_app")
KINDS = (".py", ".html", ".css", ".js")
"""Kinds of files that are sent; of others only `DATA_FILES`, whatever is in a package's folder."""

DATA_FILES = frozenset({"tune_app/study/prior.json"})
"""Files that the code reads, of kinds that also hold people's data."""

SPEC_FILE = "study.json"
"""Name of the resolved spec among the files sent."""

SETTINGS = "medtune_settings"
"""Name of a job's metadata that holds the resolved spec."""

LIMIT_MIB = 100
"""Ray's own limit for a working directory in its documentation; some versions take more."""

STOP_S = 60
"""Seconds a stopped job's driver has to close the study, before it is killed."""

NOT_PINNED = ("ray", "torch")
"""The cluster's own: Ray must be the one that runs there, and torch belongs to its CUDA driver."""


@dataclass(frozen=True)
class Submission:
    """One job, as it is sent."""

    submission_id: str
    entrypoint: str
    package: bytes
    """Zip of the working directory."""
    runtime_env: Mapping[str, Any]
    """Without the working directory, which is the package."""
    metadata: Mapping[str, str]

    def contents(self) -> list[tuple[str, int]]:
        """Name and size in bytes of every file in the package."""
        with zipfile.ZipFile(io.BytesIO(self.package)) as archive:
            return [(item.filename, item.file_size) for item in archive.infolist()]

    def size_line(self) -> str:
        """Number and size of the files sent, in a line."""
        return f"{len(self.contents())} files, {len(self.package) / 1024:.0f} KiB packed"

    def dry_run(self) -> str:
        """Return everything that would be sent, as YAML."""
        shown = {
            "submission_id": self.submission_id,
            "entrypoint": self.entrypoint,
            "metadata": dict(self.metadata),
            "runtime_env": dict(self.runtime_env),
            "package": {"sent": self.size_line(), "files": dict(self.contents())},
        }
        with zipfile.ZipFile(io.BytesIO(self.package)) as archive:
            if SPEC_FILE in archive.namelist():
                shown["study"] = parse_json(archive.read(SPEC_FILE))
        return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=100)


def build_submission(
    spec: StudySpec | Asked,
    study: str,
    *,
    earlier: Collection[str] = (),
    pip: bool = True,
    source: Path | None = None,
    retry_failed: bool = False,
) -> Submission:
    """Return the job that runs `spec` in the folder or URL `study`, and resumes a study that is there already.

    The plan of what is `Asked` is made by the job. `earlier`: ids of the jobs that the cluster knows, since Ray takes no id twice. `pip`: pin the packages that are
    installed here. `source`: folder that holds the packages; None: where they were imported from. `retry_failed`: trials
    of the study that have failed resume, too.

    Raises SpecError for a study folder that a cluster cannot see, and for a package over Ray's limit.
    """
    study = cluster_place(study)
    return Submission(
        submission_id=next_id(study, earlier),
        entrypoint=f"python -P -m tune_app.cli {entry_arguments(SPEC_FILE, study, retry_failed=retry_failed)}",
        package=_checked(
            pack_code(source or Path(__file__).parents[2], {SPEC_FILE: spec_text(spec)})
        ),
        runtime_env=_runtime_env(pip),
        metadata={
            "medtune_study": study,
            SETTINGS: json.dumps(json.loads(spec_text(spec))),
        },
    )


def refuse_other_settings(asked: StudySpec | Asked, job: str, metadata: Mapping[str, str]) -> None:
    """Raise SpecError that names the settings in which `asked` differs from the ones that the running `job` was sent with.

    A job that resumes a study has the study's settings, which only the cluster knows; asking for that takes any job.
    """
    if SETTINGS not in metadata:  # sent by an earlier version
        return
    sent = parse_json(metadata[SETTINGS])
    there = read_asked(sent) if KIND in sent else build_spec(sent)
    if isinstance(asked, AskedResumption) or isinstance(there, AskedResumption):
        return
    if _kind(there) != _kind(asked):
        differ = [f"it is a study of kind {_kind(there)}, {_kind(asked)} was asked for"]
    elif isinstance(there, StudySpec) and isinstance(asked, StudySpec):
        differ = differing_fields(there, asked, StudySpec.model_fields)
    elif isinstance(there, StudySpec) or isinstance(asked, StudySpec):
        return  # one of them is a whole plan, as earlier versions sent: only the job can compare them
    else:
        one, other = there.model_dump(), asked.model_dump()
        differ = [
            f"{name} is {one[name]!r} there, {other[name]!r} was asked for"
            for name in one
            if one[name] != other[name]
        ]
    if differ:
        raise SpecError(
            f"{job} runs this study with other settings: {'; '.join(differ)}. `medtune jobs stop {job}` ends it; "
            "then the study can be submitted again"
        )


def _kind(what: StudySpec | Asked) -> str:
    return what.kind if isinstance(what, StudySpec) else what.asked


def build_task(arguments: Sequence[str], *, source: Path | None = None) -> Submission:
    """Return the job that runs another command of medtune on the head, in the cluster's own environment."""
    return Submission(
        submission_id=f"medtune-{arguments[0]}-{uuid.uuid4().hex[:8]}",
        entrypoint=f"python -P -m tune_app.cli {shlex.join(arguments)}",
        package=_checked(pack_code(source or Path(__file__).parents[2])),
        runtime_env=_runtime_env(pip=False),
        metadata={"medtune_command": arguments[0]},
    )


def _runtime_env(pip: bool) -> dict[str, Any]:
    variables = {
        # Ctrl-C, as on a terminal: the driver closes the study, and prints how to resume it.
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S),
    }
    return {"env_vars": variables} | ({"pip": pinned_requirements()} if pip else {})


def entry_arguments(spec_file: str, study: str, *, retry_failed: bool = False) -> str:
    """Return the arguments of `medtune` that a job runs: start the study, or resume it if it is there."""
    return shlex.join(
        ["run", spec_file, "--out", study, "--resume", *["--retry-failed"] * retry_failed]
    )


def cluster_place(study: str) -> str:
    """Return the study's folder as a cluster can find it; raises SpecError for a relative one."""
    if url := url_of(study):
        return url.rstrip("/")
    refuse_other_bytes([study])
    if not Path(study).is_absolute():
        raise SpecError(
            f"--out {study}: on a cluster a study needs a place that every node sees and that stays the same when it "
            "is submitted again: the absolute path of a shared folder, or a URL such as s3://bucket/study"
        )
    return str(Path(study))


# Names -----------------------------------------------------------------------------------------------------------------


def next_id(study: str, earlier: Collection[str]) -> str:
    """Return the id of the next job of a study: its name and a number."""
    stem = job_name(study) + "-"
    numbers = [
        int(one.removeprefix(stem))
        for one in earlier
        if re.fullmatch(re.escape(stem) + r"\d+", one)
    ]
    return f"{stem}{max(numbers, default=0) + 1}"


# Packed files ----------------------------------------------------------------------------------------------------------


def package_files(source: Path) -> dict[str, Path]:
    """Return the code below `source`, name in the package -> file, in order."""
    listed = {
        path.relative_to(source).as_posix(): path
        for package in PACKAGES
        for path in sorted((source / package).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {
        name: path for name, path in listed.items() if path.suffix in KINDS or name in DATA_FILES
    }
    if "tune_app/cli/app.py" not in found:
        raise SpecError(f"{source}: medtune's packages are not there: nothing to send")
    project = source / "pyproject.toml"
    return found | ({"pyproject.toml": project} if project.is_file() else {})


def pack_code(source: Path, more: Mapping[str, str] | None = None) -> bytes:
    """Return the zip of the code below `source`, with the texts `more` by name.

    The same code and texts give the same bytes, which a cluster stores once.
    """
    content = {name: path.read_bytes() for name, path in package_files(source).items()}
    content |= {name: text.encode() for name, text in (more or {}).items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            item = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            item.external_attr = 0o644 << 16
            item.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(item, data)
    return buffer.getvalue()


def _checked(package: bytes) -> bytes:
    """Return the package; raises SpecError for one over Ray's limit, naming its largest files."""
    if len(package) > LIMIT_MIB * 2**20:
        with zipfile.ZipFile(io.BytesIO(package)) as archive:
            largest = sorted(archive.infolist(), key=lambda item: -item.compress_size)[:5]
        told = ", ".join(
            f"{item.filename} {item.compress_size / 2**20:.1f} MiB" for item in largest
        )
        raise SpecError(
            f"the package has {len(package) / 2**20:.1f} MiB, Ray takes {LIMIT_MIB}: move out files that are no code ({told})"
        )
    return package


def spec_text(spec: StudySpec | Asked) -> str:
    """Return the resolved spec, or what was asked for, as a study file (JSON is YAML); paths are absolute or URLs."""
    if not isinstance(spec, StudySpec):
        return asked_text(spec)
    return (
        json.dumps(
            spec.model_dump(mode="json", exclude_defaults=True) | {"data": spec.data}, indent=1
        )
        + "\n"
    )


def required_packages(requires: Collection[str] | None = None) -> list[Requirement]:
    """Return what this version of medtune requires on this machine, by its package's metadata; extras left out."""
    lines = requires if requires is not None else metadata.requires("medtune") or []
    found = map(Requirement, lines)
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def pinned_requirements(requires: Collection[str] | None = None) -> list[str]:
    """Return medtune's requirements at the versions installed here, without Ray and torch, which are the cluster's.

    Where a node has that very version nothing is installed.
    """
    pins = []
    for requirement in required_packages(requires):
        if requirement.name in NOT_PINNED:
            continue
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        # A local part (+cu130) names the builder; no index has it, and without it any build of the version will do.
        version = metadata.version(requirement.name).partition("+")[0]
        pins.append(f"{requirement.name}{extras}=={version}")
    return sorted(pins, key=str.lower)
