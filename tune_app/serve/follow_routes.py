"""The routes that start what follows a study: a confirmation, an ablation, a model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from fastapi import APIRouter, Request, Response
from fastapi import Path as InPath
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.background import BackgroundTask

from search_spaces.ablations import variants
from trainables.checkpoints import replacing
from tune_app.compare.ablation import DECIDED, ablation_spec
from tune_app.compare.confirm import confirmation_spec, shared_config
from tune_app.results.study import Study
from tune_app.serve.access import Refused
from tune_app.serve.answers import JSONResponse
from tune_app.serve.change_routes import (
    STUDY_NAME,
    Asked,
    expected_time,
    own_folder,
    with_paths,
)
from tune_app.serve.folder import UnknownError
from tune_app.serve.queue import QueueError
from tune_app.serve.service import Service, StudyId, TheService
from tune_app.study.files import StudyFiles
from tune_app.study.spec import StudySpec

router = APIRouter(prefix="/api/studies/{study}")

Name = Annotated[str, Field(pattern=STUDY_NAME)]


class Runs(BaseModel):
    """The runs of each variant. With `check`, the plan is returned and nothing starts."""

    model_config = ConfigDict(extra="forbid")

    seeds: int = Field(3, ge=1, le=100)
    folds: Annotated[str, Field(max_length=200)] = "all"
    check: bool = False


class Confirmation(Runs):
    """How a search's best are run again."""

    top: int = Field(3, ge=1, le=100)


class Ablation(Runs):
    """Which variants of the fixes run on a study's data."""

    name: Name
    variants: Literal["documented", "add-one", "leave-one-out", "all"] = "documented"


class Export(BaseModel):
    """The source of a model: a trial, the confirmation's choice, or the best trial."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    trial: str | None = Field(None, pattern="^[0-9A-Za-z_-]{1,64}$")
    confirmed: bool = False


class Planned(BaseModel):
    """A plan, and its outcome."""

    study: str
    became: Literal["checked", "queued"]
    runs: int
    epochs: int
    notes: list[str]
    estimate: dict[str, Any] | None
    measured: dict[str, Any] | None


@router.post("/confirm")
def confirm(study: StudyId, asked: Confirmation, service: TheService) -> Planned:
    """Queue the confirmation of a search, in the folder `confirmation` of the search."""
    path = own_folder(study, service)
    search = service.read(study).study
    spec, notes = confirmation_spec(
        _readable(search, service), top=asked.top, folds=asked.folds, seeds=asked.seeds
    )
    return _queued(StudyFiles(path).confirmation, spec, notes, service, check=asked.check)


@router.post("/ablate")
def ablate(study: StudyId, asked: Ablation, service: TheService) -> Planned:
    """Queue an ablation on the table and with the settings of a study, in a separate folder."""
    own_folder(study, service)
    found = _readable(service.read(study).study, service)
    spec = found.spec
    chosen = variants(asked.variants, spec.epochs)
    decided = {*DECIDED, *(name for overrides in chosen.values() for name in overrides)}
    config = {name: value for name, value in shared_config(spec).items() if name not in decided}
    ablation = ablation_spec(
        Path(spec.data),
        chosen,
        seeds=asked.seeds,
        folds=asked.folds,
        config=config,
        **_resources(spec),
    )
    return _queued(service.folder.root / asked.name, ablation, [], service, check=asked.check)


@router.post("/export")
def export(study: StudyId, asked: Export, service: TheService) -> Asked:
    """Start writing a trial as a model; GET models reports when it is done."""
    path = own_folder(study, service)
    found = _readable(service.read(study).study, service)
    options: list[str] = []
    if asked.trial is not None and asked.confirmed:
        raise QueueError("a trial or the confirmed settings, not both")
    if asked.trial is not None:
        if asked.trial not in set(found.trials_full["trial"]):
            raise UnknownError(f"{path.name} has no trial {asked.trial!r}")
        options = ["--trial", asked.trial]
    elif asked.confirmed:
        options = ["--confirmed"]
    service.exports.begin(asked.name, study, path, options)
    return Asked(study=study, became="being exported")


@router.get("/models")
def models(study: StudyId, service: TheService, request: Request) -> JSONResponse:
    """List the models that were exported from a study here; their logs take the token."""
    service.folder.path(study)
    found = service.exports.of(study)
    if not request.scope["trusted"]:
        found = [each | {"lines": [], "place": ""} for each in found]
    return JSONResponse({"models": found})


@router.get("/models/{name}", response_class=FileResponse)
def model(
    study: StudyId,
    name: Annotated[str, InPath(pattern=STUDY_NAME)],
    service: TheService,
    request: Request,
) -> Response:
    """Download a model as a zip file. It takes the token, as weights may reveal their training data."""
    if not request.scope["trusted"]:
        raise Refused(401, "models take the token: log in on the page, or send it")
    path = service.exports.archive(study, name)
    return FileResponse(
        path,
        filename=re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{name}.zip"),
        media_type="application/zip",
        background=BackgroundTask(lambda: path.unlink(missing_ok=True)),
    )


def _readable(study: Study, service: Service) -> Study:
    """Return the study if its inputs may be read here. Raises SpecError."""
    fields = study.spec.model_dump(mode="json", exclude={"planned"})
    with_paths({name: fields[name] for name in ("data", "config", "space")}, service)
    return study


def _resources(spec: StudySpec) -> Mapping[str, Any]:
    kept = {
        "objective", "gpus_per_trial", "mps", "accelerator_type", "ranks", "cpus_per_rank", "max_concurrent",
        "wait_for_resources_s", "cache",
    }  # fmt: skip
    return spec.model_dump(mode="json", include=kept, exclude_defaults=True)


def _queued(
    root: Path, spec: StudySpec, notes: list[str], service: Service, *, check: bool
) -> Planned:
    if root.exists():
        raise QueueError(
            f"{root.name}: this folder exists already: its page continues what it holds"
        )
    became: Literal["checked", "queued"] = "checked"
    if not check:
        root.mkdir()
        with replacing(StudyFiles(root).asked) as temporary:
            fields = spec.model_dump(mode="json", exclude_defaults=True)
            text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
            temporary.write_text(text, encoding="utf-8")
        service.queue.add(root)
        became = "queued"
    return Planned(
        study=service.folder.name(root),
        became=became,
        runs=spec.num_trials,
        epochs=spec.epochs,
        notes=notes,
        **expected_time(spec, service),
    )
