"""The folder of an exported model: its files, written once and checked on every load. No torch here.

    model.json          description of the model, its purpose and its decision rule: `ModelInfo`
    model.safetensors   weights, as tensors by name; nothing in it can run
    config.json         the FineTuneConfig of the run
    validation.csv      scores of the validation volumes: row of the table, class, logits; no paths, no subjects
    MODEL_CARD.md       the same in words
    model.onnx          on request
    SHA256SUMS          of all of these but the card, which is to be completed by hand; `sha256sum --check` reads it

Weights and config of an ensemble's members are in `members/<trial>`. The sums show damage and mix-ups; they are no
signature: a person able to replace a file can replace its sum.
"""

import contextlib
import hashlib
import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainables.checkpoints import FileIn
from trainables.config import ConfigError, FineTuneConfig, build_config, problem_lines
from trainables.data.json_files import parse_json, regular_bytes
from trainables.data.scans import Recipe
from trainables.data.visible import visible
from trainables.data.volumes import new_folder, same_volumes
from trainables.diagnosis import NO_FAULT, WITHOUT_FAULT
from trainables.errors import ProblemsError, one_line
from tune_app.models.fingerprint import Fingerprint
from tune_app.results.calibration import Calibration

MODEL_FORMAT = 1

SPACING_FACTOR = 2.0
"""Voxels this many times smaller or larger than all training voxels are refused."""

NOTED_FACTOR = 1.1
"""Voxels or extents this many times beyond training's are noted, and scored."""

Triple = tuple[float, float, float]

Decides = Literal["threshold", "likeliest", "largest score", "nothing"]
"""threshold: class 1 from the threshold on; likeliest: the class with the largest calibrated probability; largest score: that
with the largest score before calibration, in models of earlier versions with more than two classes; nothing: the threshold
and the calibration of other networks do not belong to this one."""


class ModelError(ProblemsError):
    """A model folder that cannot be used. `problems` holds one line a problem, all of them."""


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class Measured(_Part):
    """A number with its 95 % interval; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    interval: str | None = None
    """Kind of the interval: score (of an AUC; DeLong in earlier versions), Wilson, or bootstrap over subjects."""


class Evaluation(_Part):
    """How the model did on one set of volumes."""

    volumes: int
    subjects: int
    classes: tuple[int, ...]
    """Volumes of each class."""
    class_subjects: tuple[int, ...] | None = None
    """Subjects with volumes of each class; None in models of versions that did not count them."""
    metrics: dict[str, Measured]
    """By name, in the order of the model card."""


class Member(_Part):
    """One network of the model; a model of one has one."""

    folder: str
    """Where its weights and config are, from the model's folder."""
    trial: str
    epoch: int
    """1-based epoch its weights are of."""
    weights: Literal["raw", "ema"] = "ema"
    """Which of a run's two networks: that of the objective, averaged (ema) or raw."""
    scale: float
    """Factor on its logits: softmax(scale * logits) is the probability it was trained to give."""
    validates: str
    """The volumes its epoch was chosen on, in words."""
    seed: int
    precision: str
    """Precision of its training; prediction is always in float32."""
    verdict: str | None
    verdict_summary: str | None
    study_auc: float | None
    """Validation AUC that the study recorded for it."""
    auc: float | None
    """The same, computed again at export."""
    parameters: int
    calibration: Calibration
    """Of this member alone: it puts the members of an ensemble on one scale."""
    onnx_difference: float | None = None
    """Largest difference between the logits of model.onnx and of torch, on validation volumes; None without one."""

    @property
    def trouble(self) -> str | None:
        """The fault of its run, in a sentence; None where there was none. A collapse that healed counts, too."""
        if self.verdict in (None, *WITHOUT_FAULT) and self.verdict_summary in (
            None,
            NO_FAULT.summary,
        ):
            return None
        return self.verdict_summary or self.verdict


class Training(_Part):
    """The volumes the model was made of, and which inputs are like them."""

    table: str
    """Name of the table; its rows stay where they are."""
    cohort: str
    """Key of the prepared cohort: content of all files and the recipe."""
    volumes: int
    """Volumes trained on; for an ensemble, by any of its members."""
    subjects: int
    classes: tuple[int, ...]
    """Volumes of each class."""
    spacing_low_mm: Triple
    """Smallest voxel spacing (x, y, z in RAS+) of a training file."""
    spacing_high_mm: Triple
    extent_low_mm: Triple
    """Smallest extent (x, y, z in RAS+) of a training file."""
    extent_high_mm: Triple
    unoriented: int
    """Training files that state no orientation. If there is none, such files are refused."""
    pretrained: str | None
    """Name of the checkpoint the backbone started from."""
    intensity: Fingerprint | None = None
    """What their intensities looked like; None in models of versions that did not look."""

    def problems_of(self, spacing_mm: Triple, oriented: bool) -> list[str]:
        """Return why the model was not made for a file with this header; nothing when it was."""
        problems = []
        if not oriented and not self.unoriented:
            problems.append(
                "its header states no orientation (sform and qform codes are 0) and every training file does: "
                "set the orientation, or convert it again from its source"
            )
        low = [value / SPACING_FACTOR for value in self.spacing_low_mm]
        high = [value * SPACING_FACTOR for value in self.spacing_high_mm]
        if not all(a <= b <= c for a, b, c in zip(low, spacing_mm, high, strict=True)):
            problems.append(
                f"spacing {times(spacing_mm)} mm (RAS+), the model was trained on {self.spacing()} and takes "
                f"{times(low)} to {times(high)}: is it this kind of scan? resample it if it is"
            )
        return problems

    def notes_on(self, spacing_mm: Triple, extent_mm: Triple) -> list[str]:
        """Return notes on unusual properties of an accepted file."""
        notes = []
        for name, value, low, high in (
            ("spacing", spacing_mm, self.spacing_low_mm, self.spacing_high_mm),
            ("extent", extent_mm, self.extent_low_mm, self.extent_high_mm),
        ):
            if not all(
                a / NOTED_FACTOR <= b <= c * NOTED_FACTOR
                for a, b, c in zip(low, value, high, strict=True)
            ):
                notes.append(f"{name} {times(value)} mm outside training's {_between(low, high)}")
        return notes

    def spacing(self) -> str:
        """Return the training files' spacing as `0.8x0.8x1 to 1.2x1.2x2 mm`."""
        return f"{_between(self.spacing_low_mm, self.spacing_high_mm)} mm"


class HeldOut(_Part):
    """The table's test rows, as scored by the confirmation's runs of the model's configuration; not by this model."""

    when: str
    times: int
    """How often the test rows had been looked at by then."""
    runs: int
    volumes: int
    positive: int
    negative: int
    mean_auc: float
    """Of a single run."""
    lowest_auc: float
    highest_auc: float
    ensemble_auc: Measured
    """Of the mean of the runs' log-odds."""


class Choice(_Part):
    """How the model was chosen."""

    study: str
    kind: str
    objective: str
    trials: int
    """Trials of the study with a score."""
    how: str
    """In a sentence."""
    luck: str
    """How far its score may be luck of the choice, in a clause."""


class ModelInfo(_Part):
    """model.json."""

    format: int = MODEL_FORMAT
    kind: Literal["network", "ensemble", "retrained"]
    created: str
    """UTC, to the second."""
    num_classes: int = Field(ge=2)
    class_names: tuple[str, ...] = ()
    """Names of the classes by number; empty where the study knew numbers only."""
    members: tuple[Member, ...] = Field(min_length=1)
    preprocessing: dict[str, Any]
    """The recipe: the fields of trainables.data.scans.Recipe."""
    training: Training
    threshold: float | None
    """Two classes: log-odds at or above which class 1 is decided, best balanced accuracy on validation. Else None."""
    calibration: Calibration
    """Scores to calibrated probabilities; where the model decides nothing, it changes nothing."""
    decides: Decides = "largest score"
    """How a decision comes about."""
    validation: Evaluation
    """Chosen, calibrated and measured on the same volumes, where the metric's name does not state otherwise."""
    test: HeldOut | None = None
    """What `medtune confirm --test` recorded of this configuration; None where it did not."""
    choice: Choice
    versions: dict[str, str | None]

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, fields: Any) -> Any:
        if (
            isinstance(fields, dict)
            and "decides" not in fields
            and fields.get("threshold") is not None
        ):
            return {**fields, "decides": "threshold"}
        return fields

    @property
    def class_numbers(self) -> dict[str, int]:
        """Return the class number of each word that a table may have as label."""
        return {
            word: number
            for number, name in enumerate(self.class_names)
            for word in (*name.split("/"), name)
        }

    @property
    def named_classes(self) -> str:
        """Return `0 = benign, 1 = malignant`; empty where the classes have no names."""
        return ", ".join(
            f"{number} = {visible(name)}" for number, name in enumerate(self.class_names)
        )

    def class_name(self, label: int) -> str:
        """Return the label of a class: its name, or its number."""
        return self.class_names[label] if label < len(self.class_names) else str(label)

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_json(self.preprocessing)

    @property
    def threshold_probability(self) -> float | None:
        """The threshold as the network's own probability of class 1."""
        return None if self.threshold is None else sigmoid(self.threshold)

    @property
    def threshold_calibrated(self) -> float | None:
        """The threshold as the calibrated probability of class 1."""
        if self.threshold is None:
            return None
        return sigmoid(self.calibration.slope * self.threshold + self.calibration.offsets[1])


MAX_SUMS_BYTES = 2**20
MAX_FILE_BYTES = 2**33
"""Of SHA256SUMS, and of any file that it lists: a folder from elsewhere is checked before anything in it is believed."""


@dataclass(frozen=True)
class ModelFiles:
    """Names every file of an exported model."""

    root: Path

    info = FileIn("root", "model.json")
    card = FileIn("root", "MODEL_CARD.md")
    validation = FileIn("root", "validation.csv")
    sums = FileIn("root", "SHA256SUMS")

    def weights(self, member: str) -> Path:
        return self.root / member / "model.safetensors"

    def config(self, member: str) -> Path:
        return self.root / member / "config.json"

    def onnx(self, member: str) -> Path:
        return self.root / member / "model.onnx"

    def write_sums(self) -> None:
        """Write SHA256SUMS over all files that are there but the card, and have the disk hold them."""
        lines = []
        for path in sorted(
            path
            for path in self.root.rglob("*")
            if path.is_file() and path not in (self.sums, self.card)
        ):
            with path.open("rb") as file:
                lines.append(
                    f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(self.root).as_posix()}"
                )
                os.fsync(file.fileno())
        self.sums.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def read_all(self) -> tuple[dict[str, bytes], str]:
        """Return the content of every listed file by its name, each as it was exported, and the model's short id.

        The content returned is the content checked: no file is opened again afterwards. Other files are checked and left
        out. Raises ModelError for files missing, damaged, or listed outside the folder.
        """
        try:
            listed = regular_bytes(self.sums, MAX_SUMS_BYTES)
        except OSError as error:
            raise ModelError(
                f"model {self.root}: no exported model here (SHA256SUMS: {error.strerror}); `medtune export` makes one"
            ) from None
        contents: dict[str, bytes] = {}
        problems = []
        for line in listed.decode("utf-8", "replace").splitlines():
            match = re.fullmatch(r"([0-9a-f]{64})  ([0-9A-Za-z_./-]{1,200})", line)
            if match is None or ".." in match[2].split("/") or match[2].startswith("/"):
                problems.append(
                    f"{self.sums}: line {line[:80]!r} is no checksum of a file in this folder"
                )
                continue
            problem, content = _checked(self.root / match[2], match[1])
            problems += [problem] if problem else []
            if content is not None and Path(match[2]).suffix in (".json", ".safetensors"):
                contents[match[2]] = content
        if problems:
            raise ModelError(problems)
        return contents, hashlib.sha256(listed).hexdigest()[:12]


def _checked(path: Path, expected: str) -> tuple[str | None, bytes | None]:
    try:
        content = regular_bytes(path, MAX_FILE_BYTES)
    except OSError as error:
        return f"{path}: {error.strerror or error}: copy the whole folder again", None
    if hashlib.sha256(content).hexdigest() != expected:
        says = f"{path}: not the file that was exported ({len(content)} bytes, SHA-256 differs)"
        return f"{says}: it is cut, damaged or changed; copy the folder or export it again", None
    return None, content


def parse_info(folder: Path, contents: dict[str, bytes]) -> tuple[ModelInfo, list[FineTuneConfig]]:
    """Return model.json and the members' configs, checked against each other. Raises ModelError."""
    files = ModelFiles(folder)
    try:
        fields = parse_json(contents["model.json"])
        if isinstance(fields, dict) and fields.get("format") != MODEL_FORMAT:
            raise ModelError(
                f"{files.info}: format {fields.get('format')!r}, this version reads {MODEL_FORMAT}: export it again"
            )
        info = ModelInfo.model_validate(fields)
        recipe = info.recipe
        configs = [
            build_config(parse_json(contents[_name(member, "config.json")]))
            for member in info.members
        ]
    except KeyError as error:
        raise ModelError(
            f"{files.sums}: does not list {error.args[0]}: copy the folder again"
        ) from None
    except ModelError:
        raise
    except ValidationError as error:
        told = problem_lines(error.errors(include_url=False))
        raise ModelError([f"{files.info}: {line}; export it again" for line in told[:5]]) from None
    except ConfigError as error:
        raise ModelError(
            [f"model {folder}: config.json: {line}; export it again" for line in error.problems]
        ) from None
    except (ValueError, TypeError) as error:
        raise ModelError(f"model {folder}: damaged ({one_line(error)}); export it again") from None
    for config in configs:
        if (
            not same_volumes(Recipe.from_config(config), recipe)
            or config.num_classes != info.num_classes
        ):
            raise ModelError(
                f"model {folder}: config.json and model.json disagree on input or classes: export it again"
            )
    return info, configs


def weights_of(member: Member, contents: dict[str, bytes], folder: Path) -> bytes:
    """Return the member's weights file. Raises ModelError when it is not listed."""
    try:
        return contents[_name(member, "model.safetensors")]
    except KeyError as error:
        raise ModelError(
            f"{ModelFiles(folder).sums}: does not list {error.args[0]}: copy the folder again"
        ) from None


def _name(member: Member, file: str) -> str:
    return file if member.folder == "." else f"{member.folder}/{file}"


@contextlib.contextmanager
def new_model(folder: Path, *, force: bool) -> Iterator[ModelFiles]:
    """Give an empty temporary folder that becomes `folder` when the block ends well, its sums written.

    With `force` an exported model in `folder` is replaced, once the new one is whole; anything else never is.
    """
    check_target(folder, force=force)
    old = folder.exists() and any(folder.iterdir())
    build = folder.with_name(f".{folder.name}.new") if old else folder
    if old and build.exists():  # of an export that was killed before its last step
        check_target(build, force=True)
        shutil.rmtree(build, ignore_errors=True)
    with new_folder(build) as temporary:
        files = ModelFiles(temporary)
        yield files
        files.write_sums()
    if old:
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        folder.rename(aside)
        try:
            build.rename(folder)
        except OSError:
            aside.rename(folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def check_target(folder: Path, *, force: bool) -> None:
    """Raise ModelError unless a model may be written to `folder`; called before any work is done for it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ModelError(f"{folder}: a file is there; choose another name")
    if not any(folder.iterdir()):
        return
    files = ModelFiles(folder)
    if not (files.sums.is_file() and files.info.is_file()):
        raise ModelError(
            f"{folder}: holds something that is no exported model; choose another folder"
        )
    if not force:
        raise ModelError(f"{folder}: holds an exported model; --force replaces it")


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow at either end."""
    return (1 + math.tanh(x / 2)) / 2


def times(values: Any) -> str:
    """`1x1x2.5` of three numbers."""
    return "x".join(f"{value:.3g}" for value in values)


def _between(low: Triple, high: Triple) -> str:
    return times(low) if times(low) == times(high) else f"{times(low)} to {times(high)}"
