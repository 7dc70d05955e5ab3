"""Where the processes that we start look for modules: not in the folder in which the user is.

Python puts the current folder before its own library for `python -m` and `python -c`: a `copy.py`, a `random.py` or a
clone of MONAI there would be run instead of the real one. `-P` and PYTHONSAFEPATH switch that off.
"""

import os
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path

from trainables.machine.variables import SetWithin

SOURCE = Path(__file__).absolute().parents[2]
"""The folder that holds our packages."""


def python(*words: str) -> list[str]:
    """Return the command of this interpreter with `words`, which does not look for modules in the current folder."""
    return [sys.executable, "-P", *words]


def installed() -> bool:
    """Whether Python finds this very code unaided: in its site-packages, or through an editable installation."""
    if SOURCE.name in ("site-packages", "dist-packages"):
        return True
    for finder in sys.meta_path:
        if finder in (BuiltinImporter, FrozenImporter, PathFinder):
            continue
        find_spec = getattr(finder, "find_spec", None)
        spec = find_spec("trainables", None) if find_spec is not None else None
        if spec is not None and spec.origin and Path(spec.origin).parents[1] == SOURCE:
            return True
    return False


def search_variables() -> dict[str, str]:
    """Return the environment variables by which a process that we start finds our code, and nothing in its current folder.

    An empty part of PYTHONPATH, such as `export PYTHONPATH=$PYTHONPATH:/mine` leaves, is the current folder, too.
    """
    parts = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if str(SOURCE) not in parts and not installed():
        parts.append(str(SOURCE))
    found = {"PYTHONPATH": os.pathsep.join(parts)} if parts or "PYTHONPATH" in os.environ else {}
    return {"PYTHONSAFEPATH": "1", **found}


safe_search = SetWithin(search_variables)
"""Let processes that start within `with safe_search():` search as `search_variables` says: Ray's and multiprocessing's."""
