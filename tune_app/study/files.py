"""Where a study is stored: the files of a study directory, and lines appended to them."""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainables.checkpoints import HURRY, FileIn, TrialFiles, without_nonfinite, write_json
from trainables.config import RULES
from trainables.data.json_files import read_json
from trainables.data.storage import is_url
from trainables.data.visible import is_unicode
from trainables.objective import DEFAULT_OBJECTIVE
from tune_app.study.errors import SpecError
from tune_app.study.spec import StudySpec, recorded_spec

STUDY_FORMAT = RULES
"""Of new studies: the rules that the study's trials keep to (`trainables.config.RULES`)."""

READABLE_FORMATS = tuple(range(1, RULES + 1))
"""A study resumes by the rules it started with."""

OPTUNA_STUDY = "optuna_study"
"""In study.json: the study's name in a storage that it shares with others. Earlier versions called all of them alike."""

PREPARES = "prepares"
"""Key of study.json for the way trials get their volumes; studies of earlier versions lack it."""

EACH_RECIPE = "each recipe"
"""Each way to prepare volumes that trials ask for is a separate cohort."""

CHOSEN = "chosen"
"""Key of study.json with the entries that the study itself added to its `config` at its start, such as the spacing."""

PLACED = "placed"
"""Key of study.json for the columns `split` and `fold` of the table, where it has them; earlier versions have no such key."""

FIRST_COHORT = "first_cohort"
"""Key of study.json for the name of the cohort with which a study began, where its data have moved since."""


@dataclass(frozen=True)
class StudyFiles:
    """Names every file of a study directory."""

    root: Path

    spec = FileIn("root", "study.json")
    """study.json: the resolved spec, versions, hardware and the data's fingerprint."""
    database = FileIn("root", "study.db")
    """study.db: the Optuna study, SQLite."""
    epochs = FileIn("root", "epochs.jsonl")
    """epochs.jsonl: one row a trial and epoch, in the order of arrival."""
    decisions = FileIn("root", "decisions.jsonl")
    """decisions.jsonl: each decision of the stopping policy, with its grounds."""
    log = FileIn("root", "study.log")
    """study.log: messages of Ray, Optuna and the driver."""
    lock = FileIn("root", ".driver.lock")
    """Held by the driver while it runs: two drivers on one study would undo each other."""
    ray = FileIn("root", "ray")
    """What Tune itself writes; nothing is read back from it."""
    trials = FileIn("root", "trials")
    confirmation = FileIn("root", "confirmation")
    """confirmation/: the study that confirms this search's best, where it is not put elsewhere."""
    test = FileIn("root", "test.json")
    """test.json: every time the test rows were scored for this search, and what came of it."""
    requests = FileIn("root", "requests")
    """requests/: requests to the driver, a file each; see `tune_app.study.requests`."""
    stop_request = FileIn("root", "requests/study.json")
    """requests/study.json: the study is to stop."""
    hurry = FileIn("root", HURRY)
    """.hurry: the machine is about to be taken away, and trials write a checkpoint after the epoch they are in."""

    def trial_request(self, trial_id: str) -> Path:
        """requests/<trial>.json: the trial is to stop."""
        return self.requests / f"{trial_id}.json"

    asked = FileIn("root", "study.yaml")
    """study.yaml: the study file, where the study was started from the page of `medtune serve`."""
    console = FileIn("root", "console.log")
    """console.log: the driver's output, where it was started from the page of `medtune serve`."""

    def trial(self, trial_id: str) -> TrialFiles:
        return TrialFiles(self.trials / trial_id)

    def require_own(self) -> None:
        """Raise SpecError where a file of the study is a link, a pipe or a device.

        A folder may come from anyone: a link would have the driver write to another file of its user, or the page show
        one, and a pipe would be waited for.
        """
        files = (self.spec, self.database, self.epochs, self.decisions, self.log, self.lock)
        for path in (*files, self.test, self.asked, self.console):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(mode):
                what = "a link" if stat.S_ISLNK(mode) else "no regular file"
                raise SpecError(
                    f"{path}: {what}; a study's files are regular files in its folder: copy it there or remove it"
                )

    def require(self) -> None:
        """Raise SpecError unless this is a study of a version that can be read."""
        if not self.spec.is_file():
            raise SpecError(
                f"{self.root}: no study here (no study.json); name the folder that `medtune run` printed"
            )
        self.read()

    def read(self) -> dict[str, Any]:
        """Return study.json. Raises SpecError when it is damaged or of another version."""
        try:
            value: dict[str, Any] = read_json(self.spec)
            found = value["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SpecError(f"{self.spec}: damaged or not a study: {error}") from None
        if found not in READABLE_FORMATS:
            known = " and ".join(map(str, READABLE_FORMATS))
            raise SpecError(
                f"{self.spec}: format {found}, this version reads {known}: use the medtune that wrote it"
            )
        if not isinstance(value.get("spec"), dict):
            raise SpecError(
                f"{self.spec}: damaged: spec is a {type(value.get('spec')).__name__}, must be an object"
            )
        if (problem := _info_problem(value)) is not None:
            raise SpecError(f"{self.spec}: damaged: {problem}")
        return value

    def read_spec(self) -> StudySpec:
        return recorded_spec(self.read()["spec"])

    def write(self, value: Mapping[str, Any]) -> None:
        """Write study.json; of the format that `value` names, where it is another study's or an earlier content."""
        write_json(self.spec, {"format": STUDY_FORMAT, **value})


LATEST_CREATED = 1e11
"""Unix seconds, the year 5138: a later one is no date that Python's calendar functions take."""


def _info_problem(value: Mapping[str, Any]) -> str | None:
    """Return the first problem of the fields of study.json that a report shows; None where there is none."""
    created = value.get("created", 0.0)
    if not isinstance(created, int | float) or not 0 <= created <= LATEST_CREATED:
        return f"created is {created!r:.100}, must be Unix seconds"
    groups = [(name, value.get(name, {})) for name in ("versions", "hardware")]
    if isinstance(groups[1][1], dict):
        groups.append(("hardware.resources", groups[1][1].get("resources", {})))
    for name, group in groups:
        if not isinstance(group, dict):
            return f"{name} is a {type(group).__name__}, must be an object"
    for name, amount in groups[-1][1].items():
        if not isinstance(amount, int | float) or not math.isfinite(amount):
            return f"hardware.resources.{name!s:.100} is {amount!r:.100}, must be a number"
    return None


@dataclass(frozen=True)
class KeptBy:
    """The objective by which a study's rungs compare and its trials keep weights."""

    objective: str
    window_end: bool
    """See `trainables.objective.BestEpoch`."""


def kept_by(objective: str, study_format: int) -> KeptBy:
    """Return how a study of this objective and format compares trials at rungs and chooses the weights to keep."""
    if study_format == 1:
        return KeptBy(DEFAULT_OBJECTIVE, window_end=True)
    return KeptBy(objective, window_end=False)


def default_cache() -> Path:
    """Return the folder of prepared cohorts where none is named."""
    return Path(os.environ.get("MEDTUNE_CACHE") or Path.home() / ".cache" / "medtune")


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON row as one write, so that a reader sees whole lines only; a killed writer can cut the last one.

    A write that fails (the disk is full) leaves the file as it was.
    """
    line = json.dumps(without_nonfinite(dict(row)), separators=(",", ":")).encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(end)
            raise


def mend_last_line(path: Path) -> str | None:
    """Cut a last line that a killed writer left unfinished, and return it; call it before appending again."""
    if not path.is_file():
        return None
    with path.open("rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end == len(content):
            return None
        file.truncate(end)
        return content[end:].decode(errors="replace")


def refuse_other_bytes(paths: Iterable[str]) -> None:
    """Raise SpecError for names with bytes that are not UTF-8: Ray and Arrow cannot be given them."""
    if problems := [
        f"{path}: the name holds bytes that are not UTF-8, which Ray cannot take: rename it, or make a link with a plain name "
        "(ln -s) and use that"
        for path in dict.fromkeys(paths)
        if not is_unicode(path)
    ]:
        raise SpecError(problems)


def job_name(study: str) -> str:
    """Return the stem of the ids of all jobs of a study: readable, and equal for equal folders only.

    It has 47 characters at most, which is what KubeRay takes as the name of a RayJob.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", study.rsplit("/", 1)[-1].lower()).strip("-")[:30] or "study"
    return f"medtune-{slug}-{hashlib.sha256(os.fsencode(study)).hexdigest()[:8]}"


def _with_links_followed(spec: StudySpec) -> StudySpec:
    """Return the spec with the paths as earlier versions recorded them: of the files behind links."""

    def followed(place: str) -> str:
        return place if is_url(place) else os.path.realpath(place)

    config = dict(spec.config)
    if isinstance(weights := config.get("pretrained_path"), str):
        config["pretrained_path"] = followed(weights)
    return spec.model_copy(
        update={
            "data": followed(spec.data),
            "confirms": spec.confirms and followed(spec.confirms),
            "warm_start_from": tuple(followed(place) for place in spec.warm_start_from),
            "config": config,
        }
    )


HOW_ONLY = (
    "accelerator_type",
    "cache",
    "checkpoint_epochs",
    "confirm_share",
    "gpu_hours",
    "gpus_per_trial",
    "hours",
    "log",
    "max_concurrent",
    "max_failures",
    "mps",
    "rank_deadline_s",
    "wait_for_resources_s",
)
"""Fields that set how a study is run and leave its results alone: they may differ when it resumes."""


def _shown(spec: StudySpec, name: str) -> str:
    """The value of a field for a message; a plan may have thousands of runs."""
    if name != "planned":
        return f"{getattr(spec, name)!r:.300}"
    variants = ", ".join(dict.fromkeys(trial.variant for trial in spec.planned))
    folds, seeds = (
        len({trial.overrides.get(what) for trial in spec.planned}) for what in ("fold", "seed")
    )
    return f"{len(spec.planned)} runs ({variants}; folds {folds}, seeds {seeds})"


def differing_fields(there: StudySpec, asked: StudySpec, fields: Collection[str]) -> list[str]:
    """Return a text for each of the `fields` in which two studies differ, with both values; links are followed."""
    followed = _with_links_followed(asked)
    return [
        f"{name} is {_shown(there, name)} there, {_shown(asked, name)} was asked for"
        for name in StudySpec.model_fields
        if name in fields
        and getattr(there, name) not in (getattr(asked, name), getattr(followed, name))
    ]


def resumed_spec(files: "StudyFiles", asked: StudySpec) -> StudySpec:
    """Return the spec to resume with in a folder that holds a study, when `asked` is the same study.

    How it is run may change (HOW_ONLY); raises SpecError that names every other field that differs.
    """
    there = files.read_spec()
    chosen = files.read().get(CHOSEN) or {}
    asked = asked.model_copy(
        update={"config": {name: there.config[name] for name in chosen} | asked.config}
    )
    differ = differing_fields(there, asked, set(StudySpec.model_fields) - set(HOW_ONLY))
    if differ:
        raise SpecError(
            f"{files.root}: holds another study: {'; '.join(differ)}. Name another folder with --out"
        )
    how = {name: getattr(asked, name) for name in HOW_ONLY}
    if asked.gpus_per_trial in (None, "auto"):
        how["gpus_per_trial"] = there.gpus_per_trial  # measured when it began
    return there.model_copy(update=how)
