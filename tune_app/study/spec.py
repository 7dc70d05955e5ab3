"""The specification of a study, and the places of its files: the study file checked, and every file of a study named.

No Ray and no torch here: a study can be checked, listed and read on a laptop.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from search_spaces.space import Space, SpaceError
from search_spaces.written import space_from
from trainables.config import (
    ConfigError,
    FineTuneConfig,
    Scalar,
    build_config,
    cannot_run,
    problem_lines,
)
from trainables.data.storage import absolute, is_url
from trainables.errors import did_you_mean
from trainables.objective import OBJECTIVES
from tune_app.study.errors import SpecError
from tune_app.study.policy_spec import FORMER_DEFAULTS, POLICIES, PolicySpec
from tune_app.study.prior import Prior, prior_of_fields, prior_of_file, shipped_prior
from tune_app.study.yaml_text import YamlError, load_yaml


class PlannedTrial(BaseModel):
    """One trial that is asked for by name instead of sampled: an ablation's variant, a confirmation's candidate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: str
    """The variant that the trial is an instance of; trials of one variant differ in fold and seed only."""
    overrides: dict[str, Scalar]


class StudySpec(BaseModel):
    """One study: its search, its data, its length and its place. The study file holds these fields in YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: str
    """Table of volumes (CSV or Parquet): path, label, subject, optionally fold or split. It and its volumes may be URLs."""
    kind: Literal["search", "ablation", "confirmation"] = "search"
    """search samples a space and stops early; the others run `planned` trials to the end."""
    space: str | dict[str, Any] = "documented"
    """Name of a search space, or one written out (`medtune spaces` shows both forms)."""
    planned: tuple[PlannedTrial, ...] = ()
    """Trials by name, in order; for ablations and confirmations."""
    confirms: str | None = None
    """Folder of the search that a confirmation reruns the best of."""
    seen_folds: tuple[int, ...] = ()
    """Folds with rows that the search chose by: a confirmation runs them, but judges by other folds, or by their other rows."""
    seen_rows: tuple[int, ...] | None = None
    """Rows of the table, from 0, that the search chose by; None in confirmations of versions that knew whole folds only."""
    trials: int = Field(20, ge=1, le=1_000_000)
    """Trials sampled, known settings included. With a time and no number of trials: as many as fit."""
    hours: float | None = Field(None, gt=0)
    """Hours that a session of the search may take; trials are then as many as fit. `medtune resume` gives it as many more."""
    gpu_hours: float | None = Field(None, gt=0)
    """The same, divided by the GPUs that trials hold at a time."""
    confirm_share: float = Field(0.0, ge=0, lt=1)
    """Share of the budget that is kept for running the best again, on folds and seeds that did not choose them, after the
    search: of its hours, or of all trained epochs. 0: `medtune confirm` does it when asked."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Hyperparameters of every trial that differ from the defaults. Parameters set here are not searched."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the sampler. Trials take theirs from `config`."""
    objective: str = "best_median3"
    """Objective that gives the value of a trial; all objectives are maximised."""
    sampler: Literal["model", "tpe", "random", "qmc", "gp"] = "model"
    """How the next trial is chosen: model is medtune's own, the others are Optuna's."""
    prior: bool | Prior = True
    """Whether the model starts from the effect of `backbone_lr` in recorded runs of other cohorts. It holds for runs from
    random weights with Adam, and is left out in all others. A file that `medtune bench prior` wrote takes its place; the study
    keeps its content."""
    warm_start: tuple[str, ...] | None = ()
    """Points tried first: any of `before`, `after`, `defaults`. None: all that are in the space."""
    warm_start_from: tuple[str, ...] = ()
    """Folders of earlier studies whose finished trials the sampler starts from."""
    storage: str | None = None
    """Optuna storage URL; None keeps study.db in the study's folder."""
    policy: PolicySpec = Field(default_factory=PolicySpec)
    """When trials are stopped early: `medtune` (the default), `ray_asha`, `diagnosis` or `none`, or a mapping of fields."""
    gpus_per_trial: float | Literal["auto"] | None = None
    """GPUs of one trial; a fraction shares one GPU. None: where there are GPUs, as many trials share one as train fastest
    together (`auto`, measured once for each kind of GPU and configuration), else none."""
    mps: Literal["auto", "on", "off"] = "auto"
    """Whether trials that share a GPU run side by side under CUDA MPS: auto where that is possible, else in turns; on makes it
    an error where it is not."""
    accelerator_type: str | None = None
    """Kind of GPU that trials run on, by Ray's name such as A100, where a cluster has several kinds; None: any."""
    ranks: int | None = Field(None, ge=1)
    """Ranks of one trial; None: one a GPU. Without GPUs the ranks share the work over CPU processes."""
    rank_deadline_s: float = Field(1800.0, gt=0)
    """Seconds without a finished step after which a trial counts as hanging, and starts again from its checkpoint."""
    cpus_per_rank: int = Field(1, ge=1)
    """CPU threads of each rank."""
    wait_for_resources_s: float = Field(0.0, ge=0)
    """Seconds to wait for a cluster that scales itself up, before a trial that does not fit is an error."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials at a time; None: as many as the resources hold."""
    max_failures: int = Field(2, ge=0)
    """Times a failed trial is started again from its checkpoint."""
    checkpoint_epochs: int = Field(1, ge=1)
    """Epochs between checkpoints of a trial."""
    disk_budget_gib: float | None = Field(None, gt=0)
    """GiB the study's folder may take; None: no limit. Files not needed to resume go first, then the worst trials' weights."""
    keep_best: int = Field(5, ge=1)
    """Trials that have ended whose weights (best.pt) a disk budget leaves alone: the best ones."""
    log: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ()
    """Where each epoch's row goes in addition to epochs.jsonl: tensorboard writes to `tensorboard/` in the study, mlflow to
    the tracking server of MLFLOW_TRACKING_URI or to `mlflow.db` in the study, wandb to the account that is logged in."""
    cache: str | None = None
    """Folder of prepared cohorts; None: `~/.cache/medtune`, or where MEDTUNE_CACHE points."""

    @field_validator("config", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        # What YAML reads where every line below `config:` is a comment
        return {} if value is None else value

    @field_validator("policy", mode="before")
    @classmethod
    def _named_policy(cls, value: object) -> object:
        if isinstance(value, str):
            if value not in POLICIES:
                raise ValueError(
                    f"unknown policy {value!r}: one of {', '.join(POLICIES)}, or its fields"
                )
            return POLICIES[value]
        return value

    @field_validator("prior", mode="before")
    @classmethod
    def _read_prior(cls, value: object) -> object:
        """The content of a file, so that a study holds all that it decides by."""
        if isinstance(value, str | Path):
            return prior_of_file(value)
        if isinstance(value, Mapping):
            return prior_of_fields(value)
        if isinstance(value, bool | Prior):
            return value
        raise ValueError(f"{value!r}: true, false, or a file that `medtune bench prior` wrote")

    @field_validator("cache")
    @classmethod
    def _folder(cls, value: str | None) -> str | None:
        if value is not None and is_url(value):
            raise ValueError(
                f"{value}: a folder is needed, on each node or shared; the data themselves may be a URL"
            )
        return value

    @field_validator("objective")
    @classmethod
    def _known_objective(cls, value: str) -> str:
        if value not in OBJECTIVES:
            raise ValueError(f"unknown objective {value!r}: one of {', '.join(OBJECTIVES)}")
        return value

    @field_validator("gpus_per_trial")
    @classmethod
    def _whole_or_fraction(cls, value: float | str | None) -> float | str | None:
        # Not inf, not NaN
        if isinstance(value, float) and not (0 <= value <= 1 or (value > 1 and value.is_integer())):
            raise ValueError(f"{value:g} GPUs a trial: a whole number, or a fraction of one GPU")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        problems: list[str] = []
        try:
            build_config(self.config)
        except ConfigError as error:
            raise ValueError(
                "\n".join(f"config: {problem}" for problem in error.problems)
            ) from None
        if self.kind == "search":
            try:
                self.resolved_space()
            except SpaceError as error:
                problems += [f"space: {problem}" for problem in error.problems]
            if self.planned:
                problems.append(
                    "planned trials belong to an ablation or a confirmation, this is a search"
                )
        else:
            if not self.planned:
                problems.append(f"kind={self.kind} needs planned trials")
            for trial in self.planned:
                try:
                    self.config_of(trial.overrides)
                except ConfigError as error:
                    problems += [
                        f"variant {trial.variant}: {problem}" for problem in error.problems
                    ]
        if problems:
            # A variant has its problem on every fold
            raise ValueError("\n".join(dict.fromkeys(problems)))
        return self

    @property
    def num_trials(self) -> int:
        return len(self.planned) if self.kind != "search" else self.trials

    @cached_property
    def shared(self) -> dict[str, Any]:
        """Overrides that every trial has: `config`, and the values that the space of a search fixes."""
        if self.kind != "search":
            return dict(self.config)
        return dict(self.resolved_space().fixed)

    @property
    def epochs(self) -> int:
        """Epochs of a trial that is not stopped."""
        return build_config(self.shared).epochs

    def config_of(self, overrides: Mapping[str, Any]) -> FineTuneConfig:
        """Return the complete configuration of a trial with these overrides. Raises ConfigError."""
        return build_config({**self.shared, **overrides})

    @property
    def used_prior(self) -> Prior | None:
        """The prior that the model starts from: one of the user's own, or the shipped one where that holds."""
        if self.sampler != "model" or self.prior is False:
            return None
        if self.prior is not True:
            return self.prior
        config = build_config(self.config)
        holds = config.pretrained_path is None and config.optimizer == "adam"
        return shipped_prior() if holds else None

    def resolved_space(self) -> Space:
        """The space as an object; only searches have one."""
        assert self.kind == "search"
        return space_from(self.space, self.config)

    def cannot_run(self, *, ranks: int | None = None, gpu: bool = True) -> list[str]:
        """Return why some trial of the study would end in its first step (`trainables.config.cannot_run`), one line each.

        Of a search, the corners of its space are looked at.
        """
        if self.kind == "search":
            found = self.resolved_space().cannot_run(ranks=ranks, gpu=gpu)
            return [f"a trial of this search may have {problem}" for problem in found]
        lines = [
            f"variant {trial.variant}: {problem}"
            for trial in self.planned
            for problem in cannot_run(self.config_of(trial.overrides), ranks=ranks, gpu=gpu)
        ]
        return list(dict.fromkeys(lines))  # a variant has its problem on every fold

    def hash(self) -> str:
        """Sixteen hex digits; equal for the same study."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


AS_MANY_AS_FIT = 10_000
"""Trials of a search whose time ends it."""


def build_spec(fields: Mapping[str, Any]) -> StudySpec:
    """Return the checked spec; raises SpecError with every violation at once."""
    if fields.get("hours") is not None or fields.get("gpu_hours") is not None:
        fields = {"trials": AS_MANY_AS_FIT, **fields}
    fields = _with_classes(fields)
    names = StudySpec.model_fields
    listed = f": one of {', '.join(names)}"
    unknown = [
        f"unknown field {name!r}{did_you_mean(name, names) or listed}"
        for name in fields
        if name not in names
    ]
    try:
        spec = StudySpec(**{str(name): value for name, value in fields.items() if name in names})
    except ValidationError as error:
        raise SpecError([*unknown, *problem_lines(error.errors(include_url=False))]) from None
    if unknown:
        raise SpecError(unknown)
    return spec


def _with_classes(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields with `classes`, which is a hyperparameter, moved into `config`, where it need not stand."""
    if fields.get("classes") is None:
        return {name: value for name, value in fields.items() if name != "classes"}
    config = fields.get("config") or {}
    rest = {name: value for name, value in fields.items() if name != "classes"}
    if not isinstance(config, Mapping):
        return {**rest, "config": config}
    return {**rest, "config": {"classes": fields["classes"], **config}}


def refuse_what_cannot_run(spec: StudySpec, *, ranks: int | None = None, gpu: bool = True) -> None:
    """Raise SpecError where trials of a new study would end in their first step, each as often as it is tried."""
    if problems := spec.cannot_run(ranks=ranks, gpu=gpu):
        raise SpecError(problems)


def recorded_spec(fields: Mapping[str, Any]) -> StudySpec:
    """Return the spec in a study.json. A study of an earlier version keeps the defaults of that version: it has to decide as
    it would have. Raises SpecError as `build_spec` does."""
    policy = fields.get("policy")
    if isinstance(policy, Mapping) and "first_rung_share" not in policy:
        former = {"sampler": "tpe", "prior": False, "warm_start": None}
        fields = {**former, **fields, "policy": {**FORMER_DEFAULTS, **policy}}
    elif isinstance(policy, Mapping) and "judge_from" not in policy:
        fields = {**fields, "policy": {"judge_from": 0, **policy}}
    return build_spec(fields)


def read_study_file(path: Path) -> dict[str, Any]:
    """Return the fields of a YAML study file, unchecked; relative paths in it start at the file's folder.

    `-` is the standard input, whose relative paths start at the current folder. Raises SpecError when the file is missing or is not a YAML mapping; nothing in it is executed.
    """
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        fields = load_yaml(text)
    except FileNotFoundError:
        raise SpecError(f"{path}: no such study file; `medtune init` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read as text: {error}") from None
    except YamlError as error:
        raise SpecError(f"{path}: {error}") from None
    if not isinstance(fields, dict):
        raise SpecError(
            f"{path}: a study file is a mapping of fields to values, this is a {type(fields).__name__}"
        )
    config = fields.get("config")
    if not isinstance(config, dict | None):
        raise SpecError(
            f"{path}: config: a mapping of hyperparameters to values, this is a {type(config).__name__}"
        )
    return absolute_paths(fields, path.parent)


PATHS = ("data", "cache", "confirms", "pretrained_path", "prior")
"""Fields of a study, or of a trial's config, that hold one path."""


def paths_in(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return every path in the fields of a study, with its field: in its config, its written-out space and its plan as well."""
    found: list[tuple[str, str]] = []
    for name, value in fields.items():
        if name == "prior" and not isinstance(value, str):
            continue  # read already
        if name in (*PATHS, "warm_start_from"):
            found += [(name, text) for text in _texts(value)]
        elif isinstance(value, Mapping):
            found += [(f"{name}.{inner}", path) for inner, path in paths_in(value)]
        elif isinstance(value, list | tuple):
            items = {str(number): item for number, item in enumerate(value)}
            found += [(f"{name}.{inner}", path) for inner, path in paths_in(items)]
    return found


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def absolute_paths(fields: Mapping[str, Any], base: Path = Path()) -> dict[str, Any]:
    """Return the fields of a study, or of a trial's config, with every path absolute: trials stand elsewhere.

    Relative paths start at `base`, `~` is the home folder, URLs stay as they are.
    """

    def placed(path: str) -> str:
        # Path.expanduser raises for a user that is not there; a file's name may begin with ~, too
        return absolute(base / os.path.expanduser(path))  # noqa: PTH111

    fields = dict(fields)
    for name in PATHS:
        value = fields.get(name)
        if isinstance(value, str) and value and not is_url(value):
            fields[name] = placed(value)
    if isinstance(earlier := fields.get("warm_start_from"), list):
        fields["warm_start_from"] = [placed(str(folder)) for folder in earlier]
    if isinstance(config := fields.get("config"), dict):
        fields["config"] = absolute_paths(config, base)
    return fields
