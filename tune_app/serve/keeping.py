"""Notes and tags of studies, and renaming, archiving and deleting their folders."""

import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainables.checkpoints import write_json
from tune_app.results.text import printable
from tune_app.serve.queue import QueueError
from tune_app.study.files import StudyFiles
from tune_app.study.rows import read_object

NOTES = "notes.json"
"""File in a study's folder."""

Tag = str


class Note(BaseModel):
    """What users wrote about a study or a trial."""

    model_config = ConfigDict(extra="forbid")

    note: str = Field("", max_length=4000)
    tags: list[Tag] = Field(default_factory=list, max_length=20)

    def cleaned(self) -> "Note":
        """Return it without control characters, empty tags and tags that are there twice."""
        lines = "\n".join(printable(line) for line in self.note.splitlines()).strip()
        tags = [printable(tag).strip()[:40] for tag in self.tags]
        return Note(note=lines, tags=list(dict.fromkeys(tag for tag in tags if tag)))


class Notes(BaseModel):
    """The notes of a study: its own, and those of its trials by id."""

    study: Note = Field(default_factory=Note)
    trials: dict[str, Note] = Field(default_factory=dict)


def read_notes(root: Path) -> Notes:
    """Return the notes of the study in `root`; none where the file is missing or holds something else."""
    path = root / NOTES
    if not path.is_file() or path.is_symlink():
        return Notes()
    value = read_object(path, damage=[])
    try:
        return Notes.model_validate(value or {})
    except ValidationError:
        return Notes()


def write_note(root: Path, trial: str | None, note: Note) -> Notes:
    """Set the note of the study in `root`, or of one of its trials, and return all notes."""
    note = note.cleaned()
    with _writing:
        notes = read_notes(root)
        if trial is None:
            notes.study = note
        elif note == Note():
            notes.trials.pop(trial, None)
        else:
            notes.trials[trial] = note
        write_json(root / NOTES, notes.model_dump())
    return notes


_writing = threading.Lock()
"""Two notes at the same time are both kept."""


def contents(root: Path) -> Mapping[str, Any]:
    """Return the content of a study's folder: trials, trials with weights, and bytes."""
    files = StudyFiles(root)
    trials = (
        [each for each in files.trials.iterdir() if each.is_dir()] if files.trials.is_dir() else []
    )
    found = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    return {
        "trials": len(trials),
        "with_weights": sum(any(each.glob("*.pt")) for each in trials),
        "bytes": sum(path.stat().st_size for path in found),
        "confirmation": StudyFiles(files.confirmation).spec.is_file(),
    }


def rename(root: Path, name: str) -> Path:
    """Give the study's folder another name. Raises QueueError where that is taken."""
    wanted = root.with_name(name)
    if wanted.exists():
        raise QueueError(f"{name}: this folder exists already; choose another name")
    return root.rename(wanted)


def archive(root: Path, into: Path) -> Path:
    """Move the study's folder into `into`, where the page does not look; moving it back brings it back."""
    into.mkdir(parents=True, exist_ok=True)
    return root.rename(into / f"{root.name}-{time.strftime('%Y%m%d-%H%M%S')}")


def hide(root: Path) -> Path:
    """Give the study's folder a name that the page passes over, and return it: removing everything takes a while."""
    return root.rename(root.with_name(f".deleted-{secrets.token_hex(8)}"))


def delete(root: Path) -> None:
    """Remove the folder with everything in it."""
    shutil.rmtree(root)
