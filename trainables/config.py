"""Every hyperparameter of a fine-tuning run: name, default, unit and check, once.

The defaults are the after-values of the document this project started from; `search_spaces.fixes` holds the
before-values. Nothing here loads torch or Ray, so that a study can be checked on any machine in milliseconds.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from trainables.errors import ProblemsError, those_that_hold

RULES = 2
"""Version of the rules by which a run computes and a study compares; both keep the rules they started with when resumed.
Formats of checkpoints and of study.json are these numbers. 1: class weights sum to the number of classes, augmentation takes
voxels for cubes, ranks validate with rank 0's BatchNorm statistics, rungs compare `val_auc` and best.pt holds the averaged
weights of the epoch that completes the best window of three, whatever the objective is. 2: class weights have mean 1 over
the samples, rotations are rigid in space, statistics are those of all ranks, rungs and best.pt follow the objective."""

Scalar = str | int | float | bool | None
"""Type of an override: a JSON scalar, so that it fits a Ray trial config, an Optuna parameter and a table cell."""

DEPTHS = (10, 18, 34, 50, 101, 152, 200)
"""Depths of the released MedicalNet checkpoints."""

PREPROCESSING = (
    "volume_shape",
    "spacing_mm",
    "intensity",
    "window_low",
    "window_high",
    "in_channels",
)
"""Hyperparameters that determine a prepared volume: the fields of `trainables.data.scans.Recipe`."""

OF_THE_DATA = ("in_channels", "num_classes", "classes")
"""Hyperparameters that describe the table and its files: the same in all trials of a study."""

FORMER_NAMES = {
    "lr": "backbone_lr",
    "learning_rate": "backbone_lr",
    "head_lr": "classifier_lr",
    "accumulation_steps": "gradient_accumulation_steps",
    "accumulation": "gradient_accumulation_steps",
    "drw_start": "drw_start_epoch",
    "clip": "grad_clip",
    "max_grad_norm": "grad_clip",
    "margin": "max_m",
    "scale": "s",
    "freeze_epochs": "freeze_backbone_epochs",
    "num_epochs": "epochs",
    "lr_scheduler": "scheduler",
    "mixed_precision": "amp",
}
"""Names used elsewhere -> our names: spelling alone would not suggest the right one."""


TRIPLES = ("volume_shape", "spacing_mm")
"""Hyperparameters with a value for each of D, H and W."""


class ConfigError(ProblemsError):
    """A configuration that cannot run. `problems` holds one line a violation, all of them, in field order."""


def _as_triple(value: object) -> object:
    """A cube or an isotropic spacing may be given as one number, or as text `96,96,64` from a table or a flag."""
    if isinstance(value, str):
        try:
            value = [float(part) for part in value.replace("x", ",").split(",")]
        except ValueError:
            return value
        if len(value) == 1:
            value = value[0]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (value, value, value)
    return value


def as_scalar(name: str, value: Any) -> Any:
    """Return a hyperparameter's value as one scalar: a shape or spacing, however written, as text `96x96x64`.

    Tables, search spaces and pages hold and compare scalars; `build_config` reads the text back.
    """
    if name not in TRIPLES:
        return value
    triple = _as_triple(value)
    if not isinstance(triple, list | tuple) or not all(
        isinstance(part, int | float) and not isinstance(part, bool) for part in triple
    ):
        return value
    return "x".join(f"{part:.12g}" for part in triple)


def class_numbers(text: str) -> dict[str, int]:
    """Return `benign=0,malignant=1` as a mapping. Raises ValueError where it is none."""
    pairs = [part.rpartition("=") for part in text.split(",") if part.strip()]
    for name, _, number in pairs:
        if not name.strip() or not number.strip().isdecimal():
            raise ValueError(f"{text!r}: LABEL=NUMBER,LABEL=NUMBER is needed")
    return {name.strip(): int(number) for name, _, number in pairs}


def _as_classes(value: object) -> object:
    """A study file may hold a mapping; overrides are scalars."""
    if isinstance(value, Mapping):
        if wrong := [str(label) for label in value if {",", "="} & set(str(label))]:
            raise ValueError(f"labels cannot contain a comma or an equals sign: {', '.join(wrong)}")
        value = ",".join(f"{label}={number}" for label, number in value.items())
    if isinstance(value, str):
        numbers = sorted(set(class_numbers(value).values()))
        if numbers != list(range(len(numbers))) or len(numbers) < 2:
            raise ValueError(f"class numbers {numbers}: two or more, from 0, without gaps")
    return value


def _off(value: object) -> object:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


ShapeDHW = Annotated[tuple[int, int, int], BeforeValidator(_as_triple)]
SpacingDHW = Annotated[tuple[float, float, float], BeforeValidator(_as_triple)]
Positive = Annotated[float, Field(gt=0)]


class FineTuneConfig(BaseModel):
    """One fine-tuning run. Immutable; build it with `build_config`, which reports all violations together."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    # Length and place
    epochs: int = Field(60, ge=1, le=10_000)
    """Passes over the training fold."""
    fold: int = Field(0, ge=0)
    """Which fold validates; the others train. A table's own `split` goes first unless `cross_validate`."""
    num_folds: int = Field(5, ge=2, le=50)
    """Folds made when the table does not name them."""
    cross_validate: bool = False
    """Makes folds over the table's train and val rows even where the table has a split; test rows are never touched."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seeds initialisation, order of volumes, dropout and augmentation; folds are seeded apart, so that seeds compare."""
    deterministic: bool = False
    """Deterministic GPU kernels: the same numbers each time, at a tenth of the speed (ResNet-50, 96 voxels, H100: 94
    volumes/s instead of 967, no CUDA graph and none of our kernels). The CPU always repeats itself."""

    # Data
    volume_shape: ShapeDHW = (96, 96, 96)
    """Voxels the network sees along (x, y, z), which are left-right, back-front and feet-head whatever the file's order; one
    number is a cube. Larger volumes are cropped, smaller ones padded."""
    spacing_mm: SpacingDHW | None = None
    """Spacing in mm along (x, y, z) that volumes are resampled to. None: each volume at the smallest isotropic spacing at
    which that volume fits, which hides how large things are. A new study, or run, that leaves it out takes the smallest one
    at which every volume fits; `medtune data check` shows it."""
    intensity: Literal["zscore", "zscore_nonzero", "window"] = "zscore"
    """zscore over all voxels; zscore_nonzero with mean and deviation of voxels > 0, all voxels scaled alike (MedicalNet takes
    the same statistics, but fills the background with N(0, 1) noise; on CT in HU they leave out air and fat); window clips
    and scales to [-1, 1]."""
    window_low: float = -1000.0
    """Lower end of the intensity window, in the volume's own units; read by `intensity=window` only."""
    window_high: float = 400.0
    """Upper end of the intensity window, in the volume's own units; read by `intensity=window` only."""
    in_channels: int = Field(1, ge=1, le=16)
    """Channels of a volume. MedicalNet checkpoints have one."""
    num_classes: int = Field(2, ge=2, le=1000)
    """Classes; labels are 0 .. num_classes - 1. With two, class 1 is the positive one."""
    classes: Annotated[str | None, BeforeValidator(_as_classes)] = None
    """Labels of the table with their class numbers, as `benign=0,malignant=1` or a mapping; several labels may share a
    number. None: labels are numbers. Their names stay with the model and its predictions. Sets `num_classes`."""
    augmentation_strength: float = Field(1.0, ge=0, le=3)
    """Scales all random rotation, scale, shift, intensity and noise of training volumes; 0 switches them off."""
    flip_axes: str = "x"
    """Axes flipped at random in training, of x (left-right), y (back-front), z (feet-head); empty for none."""

    # Network
    depth: int = 50
    """Depth of the 3D ResNet: 10, 18, 34, 50, 101, 152 or 200."""
    width: float = Field(1.0, gt=0, le=4)
    """Factor on the channels of every layer. Released checkpoints fit 1 only; smaller ones are for tests and the demo."""
    geometry: Literal["strided", "dilated"] = "strided"
    """strided: stride-2 stem and layers (output stride 32); dilated: MedicalNet's own (output stride 8, about 5 times the arithmetic)."""
    head: Literal["cosine", "linear"] = "cosine"
    """cosine: unit features times unit weights, as LDAM was published; linear: weights and bias, as in the document."""
    dropout: float = Field(0.4, ge=0, lt=1)
    """Share of pooled features dropped before the head, in training."""
    pretrained_path: str | None = None
    """MedicalNet checkpoint to start from; None starts from random weights."""

    # Optimiser
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """adam: weight decay as L2 in the gradient; adamw: decoupled; sgd: Nesterov momentum 0.9."""
    backbone_lr: Positive = 1e-4
    """Peak learning rate of the backbone (`--lr`). The default is the document's, for a pretrained one; from random weights
    1.5e-4 to 3.5e-4 were better on two cohorts, where 1e-4 memorised the training volumes."""
    classifier_lr: Positive = 1e-3
    """Peak learning rate of the new head; its ratio to `backbone_lr` stays constant over the schedule."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay of all parameters, biases and BatchNorm included, as in the document's optimizer."""
    scheduler: Literal["cosine", "constant"] = "cosine"
    """cosine: to zero at the last update of the last epoch; constant: no decay."""
    warmup_epochs: float = Field(0.0, ge=0)
    """Epochs over which both rates rise linearly from zero."""
    batch_size: int = Field(6, ge=1)
    """Volumes in a micro-batch of one rank."""
    gradient_accumulation_steps: int = Field(2, ge=1)
    """Micro-batches an optimiser update is made of."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest gradient norm over all parameters, after unscaling; 0 switches clipping off."""
    amp: Annotated[Literal["off", "fp16", "bf16"], BeforeValidator(_off)] = "fp16"
    """Half precision on a GPU. On a CPU the run is float32 whatever this setting is, and its first line states that."""
    freeze_backbone_epochs: int = Field(0, ge=0)
    """Epochs in which only the head trains; frozen BatchNorm layers keep their statistics."""
    unfreeze_stage_epochs: int = Field(0, ge=0)
    """After freezing: epochs between thawing layer 4, 3, 2, 1 and the stem; 0 thaws all at once."""
    scale_lr_with_batch: bool = False
    """Multiplies both rates by the number of ranks."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over all ranks instead of over each rank's micro-batch."""

    # Loss
    loss: Literal["ldam", "cross_entropy", "focal"] = "ldam"
    """ldam: label-distribution-aware margins; focal: gamma `focal_gamma`. The deferred weights apply to all three."""
    max_m: Positive = 0.2
    """Margin of the rarest class; class j gets max_m * (n_j / n_min)^(-1/4)."""
    s: Positive = 15.0
    """Factor on cosines and margins before the softmax, in training and in prediction."""
    focal_gamma: float = Field(2.0, ge=0, le=10)
    """Focusing exponent; read by `loss=focal` only."""
    drw_start_epoch: int = Field(25, ge=1)
    """First epoch (1-based) with class weights in the loss; beyond `epochs` they never start."""
    drw_beta: float = Field(0.9999, ge=0, lt=1)
    """Class weight (1 - beta) / (1 - beta^n): 0 weights nothing, towards 1 inverse frequency."""

    # Averaged weights
    ema_decay: float = Field(0.995, ge=0, lt=1)
    """Decay of the averaged weights per optimiser update; 0 makes them the raw ones."""
    ema_warmup: bool = True
    """Decay min(ema_decay, (1 + update) / (10 + update)): without it the average keeps the initial weights for long."""
    ema_buffers: Literal["averaged", "copied"] = "averaged"
    """BatchNorm statistics of the average: averaged like the weights, or copied from the raw network (the documented collapse)."""

    # Evaluation
    validation_batch_size: int = Field(16, ge=1)
    """Volumes in a validation batch of one rank."""
    train_auc_volumes: int = Field(64, ge=0)
    """Training volumes scored each epoch, without augmentation, for the train-validation gap; 0 for none."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        problems = {
            f"depth={self.depth}: MedicalNet has {', '.join(map(str, DEPTHS))}": (
                self.depth not in DEPTHS
            ),
            f"volume_shape={self.volume_shape}: every side must be at least 8 voxels": (
                min(self.volume_shape) < 8
            ),
            f"spacing_mm={self.spacing_mm}: every value must be > 0": (
                self.spacing_mm is not None and min(self.spacing_mm) <= 0
            ),
            f"classes={self.classes!r} has {len(self.class_names)} classes, num_classes={self.num_classes}: leave "
            "num_classes out": (
                self.classes is not None and len(self.class_names) != self.num_classes
            ),
            f"window_low={self.window_low} must be below window_high={self.window_high}": (
                self.window_low >= self.window_high
            ),
            f"flip_axes={self.flip_axes!r}: letters of x, y, z, each at most once, or empty": (
                set(self.flip_axes) - set("xyz") or len(set(self.flip_axes)) < len(self.flip_axes)
            ),
            f"warmup_epochs={self.warmup_epochs:g} must be below epochs={self.epochs}": (
                self.warmup_epochs >= self.epochs
            ),
            f"freeze_backbone_epochs={self.freeze_backbone_epochs} must be at most epochs={self.epochs}": (
                self.freeze_backbone_epochs > self.epochs
            ),
            f"unfreeze_stage_epochs={self.unfreeze_stage_epochs} needs freeze_backbone_epochs >= 1: nothing is frozen": (
                self.unfreeze_stage_epochs and not self.freeze_backbone_epochs
            ),
            f"fold={self.fold}: there are folds 0 to {self.num_folds - 1}; raise num_folds or lower fold": (
                self.fold >= self.num_folds
            ),
        }
        if found := those_that_hold(problems):
            raise ValueError("\n".join(found))
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes by number; empty where labels are numbers."""
        numbers = class_numbers(self.classes) if self.classes else {}
        return tuple(
            "/".join(label for label, number in numbers.items() if number == wanted)
            for wanted in sorted(set(numbers.values()))
        )

    def hash(self) -> str:
        """Sixteen hex digits over all fields: equal hashes mean the same run on the same data."""
        fields = self.model_dump(mode="json")
        if self.classes is None:  # runs of versions without this field continue
            del fields["classes"]
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def build_config(overrides: Mapping[str, Any] | None = None) -> FineTuneConfig:
    """Return the default config with `overrides` applied.

    Raises ConfigError with every violation at once: unknown names (each with the nearest known one), wrong types,
    values outside their range, and values that do not go together.
    """
    overrides = dict(overrides or {})
    unknown = [
        unknown_hyperparameter(name)
        for name in overrides
        if name not in FineTuneConfig.model_fields
    ]
    known = {
        name: value for name, value in overrides.items() if name in FineTuneConfig.model_fields
    }
    if known.get("classes") is not None and "num_classes" not in known:
        known |= _number_of_classes(known["classes"])
    try:
        config = FineTuneConfig(**known)
    except ValidationError as error:
        raise ConfigError(unknown + _problems(error, known)) from None
    if unknown:
        raise ConfigError(unknown)
    return config


def _number_of_classes(classes: object) -> dict[str, int]:
    """num_classes as `classes` has it; nothing where `classes` is wrong, which is reported of that field."""
    try:
        text = _as_classes(classes)
    except ValueError:
        return {}
    return {"num_classes": len(set(class_numbers(text).values()))} if isinstance(text, str) else {}


LAST_STRIDE = {"strided": 32, "dilated": 8}
"""Voxels of the input along each axis for one position after the network's last layer, by geometry."""

STEM_CHANNELS = 64
"""Of the network at width 1."""

TOGETHER = ("batch_size", "volume_shape", "geometry", "freeze_backbone_epochs", "sync_batchnorm")
"""Hyperparameters that `cannot_run` looks at together."""


def cannot_run(config: FineTuneConfig, *, ranks: int | None = None, gpu: bool = True) -> list[str]:
    """Return why a run of `config` would end in its first step, whatever its data are; empty where it would not.

    `ranks`: how many it has, None where that is not known yet. Apart from `build_config`, since studies and models of
    earlier versions, which did not ask, have to load.
    """
    shared = config.sync_batchnorm and ranks != 1  # SyncBatchNorm counts the values of all ranks
    stride = LAST_STRIDE[config.geometry]
    positions = math.prod(math.ceil(side / stride) for side in config.volume_shape)
    trains = config.freeze_backbone_epochs < config.epochs
    shape = as_scalar("volume_shape", config.volume_shape)
    problems = {
        f"width={config.width:g} leaves the stem no channel: it must be at least 1/{STEM_CHANNELS}": (
            int(STEM_CHANNELS * config.width) < 1
        ),
        f"sync_batchnorm=True over {ranks} ranks on the CPU: torch has SyncBatchNorm for GPUs only; leave it out, or "
        "give each rank a GPU (gpus_per_trial)": (
            ranks is not None and ranks > 1 and config.sync_batchnorm and not gpu
        ),
        f"batch_size=1 at volume_shape={shape}, geometry={config.geometry}: the last layer has one value per channel in "
        f"a micro-batch, and BatchNorm needs two: set batch_size to 2 or more, or a side above {stride} voxels": (
            trains and not shared and config.batch_size * positions < 2
        ),
    }
    return those_that_hold(problems)


def problem_lines(errors: Iterable[Mapping[str, Any]], *, below: int = 0) -> list[str]:
    """Return Pydantic's `errors` as lines `place: message`; those of the whole as its message's lines.

    `below`: leading parts of each place that are left out.
    """
    lines: list[str] = []
    for item in errors:
        place, message = (
            ".".join(map(str, item["loc"][below:])),
            item["msg"].removeprefix(OF_PYDANTIC),
        )
        lines += [f"{place}: {message}"] if place else message.splitlines()
    return lines


OF_PYDANTIC = "Value error, "
"""What Pydantic puts before a validator's own words."""


def unknown_hyperparameter(given: object, others: Iterable[str] = ()) -> str:
    """Return the message on a name that is none, with the nearest one of the hyperparameters and of `others`."""
    name = str(given)  # YAML allows any scalar for a key
    guesses = difflib.get_close_matches(name, [*others, *FineTuneConfig.model_fields], n=1)
    guess = FORMER_NAMES.get(name.lower().lstrip("-").replace("-", "_")) or (
        guesses[0] if guesses else None
    )
    hint = f"did you mean {guess!r}?" if guess else "`medtune config` lists them all"
    return f"unknown hyperparameter {name!r}; {hint}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def _problems(error: ValidationError, given: dict[str, Any]) -> list[str]:
    """One line per violation. Pydantic checks fields together only once each alone is valid: the valid ones are checked
    again without the others, and problems that depend on a left-out field are not reported."""
    problems: list[str] = []
    bad: set[str] = set()
    for item in error.errors(include_url=False):
        message = item["msg"].removeprefix(OF_PYDANTIC)
        if item["loc"]:
            name = str(item["loc"][0])
            bad.add(name)
            problems.append(f"{name}={_shown(item['input'])}: {message[0].lower()}{message[1:]}")
        else:
            problems.extend(message.splitlines())
    if bad:
        try:
            FineTuneConfig(**{name: value for name, value in given.items() if name not in bad})
        except ValidationError as rest:
            together = _problems(rest, {})
            problems += [line for line in together if not any(f"{name}=" in line for name in bad)]
    return problems
