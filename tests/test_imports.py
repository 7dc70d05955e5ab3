"""Allowed imports. Loading torch or Ray takes seconds, and a laptop that only reads results may have neither."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("search_spaces", "trainables", "tune_app")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAY_IMPORT_RAY = {
    "trainables.ranks",
    "trainables.rank_actors",
    "trainables.ray_trainable",
    "trainables.machine.ray_workers",
}
HEAVY = ("torch", "ray", "monai")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(tree: ast.AST) -> set[str]:
    """Every module that is named in an import below `tree`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative import; write the whole name"
            assert node.module is not None
            found.add(node.module)
            if (ROOT / node.module.replace(".", "/")).is_dir():
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


TREES = {
    name_of(path): ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for path in MODULES
}
IMPORTS = {name: imports_of(tree) for name, tree in TREES.items()}


def test_the_modules_are_seen() -> None:
    missing = {"search_spaces.fixes", "search_spaces.ablations", "search_spaces.spaces", "trainables.config", "trainables.finetune",
               "trainables.ranks", "trainables.ray_trainable", "tune_app.cli", "tune_app.driver.run", "tune_app.driver.searcher",
               "tune_app.results.study"} - set(IMPORTS)  # fmt: skip
    assert not missing, f"the layout names modules that are not there: {sorted(missing)}"


@pytest.mark.parametrize("module", IMPORTS)
def test_imports_point_one_way(module: str) -> None:
    """tune_app -> search_spaces -> trainables.config, and nothing back."""
    package = module.split(".")[0]
    allowed: Callable[[str], bool] = {
        "tune_app": lambda name: True,
        "search_spaces": lambda name: (
            name.split(".")[0] == "search_spaces"
            or name in ("trainables", "trainables.config", "trainables.errors")
        ),
        "trainables": lambda name: name.split(".")[0] == "trainables",
    }[package]
    wrong = {name for name in IMPORTS[module] if own(name) and not allowed(name)}
    assert not wrong, f"{module} imports {sorted(wrong)}"


def test_search_spaces_need_nothing_but_optunas_distributions() -> None:
    for module in (name for name in IMPORTS if name.startswith("search_spaces")):
        foreign = {
            name
            for name in IMPORTS[module]
            if not own(name) and name.split(".")[0] not in sys.stdlib_module_names
        }
        assert foreign <= {"optuna.distributions"}, f"{module} imports {sorted(foreign)}"


@pytest.mark.parametrize("module", [name for name in IMPORTS if name.startswith("trainables")])
def test_training_does_not_know_ray(module: str) -> None:
    if module not in MAY_IMPORT_RAY:
        wrong = {
            name
            for name in IMPORTS[module]
            if name.split(".")[0] == "ray" or name in MAY_IMPORT_RAY
        }
        assert not wrong, f"{module} imports {sorted(wrong)}: only {sorted(MAY_IMPORT_RAY)} may"


ROOMS: tuple[tuple[set[str], set[str]], ...] = (
    ({"study"}, set()),
    ({"driver", "backtest", "results"}, {"study"}),
    ({"cluster"}, {"study", "driver"}),
    ({"compare"}, {"study", "results"}),
    ({"report"}, {"study", "results", "compare"}),
    ({"models"}, {"study", "results", "compare", "driver"}),
    ({"serve"}, {"study", "results", "compare", "report"}),
    ({"bench"}, {"study", "driver", "backtest", "results", "compare", "report", "models", "serve"}),
)
"""Rooms of tune_app, and what each may import besides itself. The command line may import all of them."""


@pytest.mark.parametrize(
    ("room", "below"), [(room, below) for rooms, below in ROOMS for room in sorted(rooms)]
)
def test_rooms_import_what_lies_below_them(room: str, below: set[str]) -> None:
    """Imports inside functions and those for type checkers count as well."""
    seen = {name for name in IMPORTS if name.startswith(f"tune_app.{room}.")}
    assert seen, f"no module in tune_app/{room}"
    rooms = {path.name for path in (ROOT / "tune_app").iterdir() if path.is_dir()}
    wrong = {
        (name, target)
        for name in seen
        for target in IMPORTS[name]
        if target.startswith("tune_app.") and target.split(".")[1] in rooms - below - {room}
    }
    assert not wrong, f"the room `{room}` may import {sorted(below)} only: {sorted(wrong)}"


def test_the_config_imports_nothing_of_ours_but_its_error() -> None:
    allowed = {"trainables", "trainables.errors"}
    assert {name for name in IMPORTS["trainables.config"] if own(name)} <= allowed


def test_no_module_imports_itself_in_a_circle() -> None:
    """Not even by an import inside a function, or for type checkers only."""
    graph = {
        name: {n for n in targets if n in TREES and not f"{name}.".startswith(f"{n}.")}
        for name, targets in IMPORTS.items()
    }
    order = TopologicalSorter(graph).static_order()  # raises CycleError with the circle
    assert len(tuple(order)) == len(TREES)


def test_no_function_has_80_lines_or_more() -> None:
    functions = [
        (f"{name}:{node.name}", (node.end_lineno or 0) - node.lineno)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert len(functions) > 1000
    long = {name: lines + 1 for name, lines in functions if lines >= 80}
    assert not long


def test_no_folder_holds_more_files_than_one_finds_ones_way_in() -> None:
    folders = Counter(path.parent for path in MODULES)
    assert folders.most_common(1)[0][1] <= 26


def loaded_by(code: str, *arguments: str) -> list[str]:
    """Run `code` in a fresh interpreter, and return which of the heavy packages it has loaded at its end."""
    report = f"\nimport sys; print('LOADED', *(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code + report, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, f"{code.strip()}\n{done.stderr}"
    return done.stdout.splitlines()[-1].split()[1:]


LIGHT = [
    "trainables.config",
    *(name for name in IMPORTS if name.startswith("search_spaces")),
    "tune_app.study.spec",
    "tune_app.results.study",
]


@pytest.mark.parametrize("module", LIGHT)
def test_a_laptop_without_torch_and_ray_can_import(module: str) -> None:
    if module not in IMPORTS:
        pytest.fail(f"{module} is not there")
    assert loaded_by(f"import {module}") == []


def test_a_driver_starts_without_torch() -> None:
    """Its trials train, in processes of their own: MONAI and torch would cost it five seconds of start-up."""
    assert loaded_by("import tune_app.driver.run") == ["ray"]


def test_the_command_line_shows_its_help_without_torch_and_ray() -> None:
    if "tune_app.cli" not in IMPORTS:
        pytest.fail("tune_app.cli is not there")
    code = """
import sys
from tune_app.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert loaded_by(code, "--help") == []
