"""Folders that this program may remove: those it has made and marked as its own. No other folder is ever removed."""

import os
import shutil
import time
from pathlib import Path

MARKER = ".made-by-medtune"
"""Name of the file in such a folder that states its purpose."""


def is_own(folder: Path, purpose: str) -> bool:
    """Whether medtune has made `folder`, for this purpose. A link to such a folder is not one."""
    try:
        if folder.is_symlink():
            return False
        return (folder / MARKER).read_text(encoding="utf-8") == purpose
    except (OSError, UnicodeDecodeError):
        return False


def mark_own(folder: Path, purpose: str) -> Path:
    """Make the folder, which may exist and be empty, and mark it. Raises FileExistsError where it holds something."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(
            17, "holds files that medtune did not write: move or remove them", str(folder)
        )
    (folder / MARKER).write_text(purpose, encoding="utf-8")
    return folder


def remove_own(folder: Path, purpose: str) -> bool:
    """Remove the folder if medtune has made it for this purpose; returns whether it did."""
    if not is_own(folder, purpose):
        return False
    for entry in list(folder.iterdir()):  # the mark last: a removal that is killed can be repeated
        if entry.name == MARKER:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    return True


def fresh_own(folder: Path, purpose: str) -> Path | None:
    """Make the folder, empty and marked; replaces one of ours, moves any other aside and returns its new place, or None."""
    aside = None
    if not remove_own(folder, purpose) and folder.exists() and any(folder.iterdir()):
        aside = folder.with_name(
            f"{folder.name}.kept-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        )
        folder.rename(aside)
    mark_own(folder, purpose)
    return aside
