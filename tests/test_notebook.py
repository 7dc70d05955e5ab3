"""The notebook of the documentation: every cell runs, in order, on a small cohort made for it."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import tune_app

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first_hour.ipynb"


def code_cells() -> list[str]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does; returns the value of a last expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, str(NOTEBOOK), "exec"), names)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)


def test_it_imports_what_the_package_offers_and_holds_no_output() -> None:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in content["cells"])
    imported = {
        name.name
        for source in code_cells()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module == "tune_app"
        for name in node.names
    }
    assert {"search", "load_study"} <= imported <= set(tune_app.__all__)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_cell_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = [run_cell(source, names) for source in code_cells()]
    html = [value._repr_html_() for value in shown if hasattr(value, "_repr_html_")]
    assert len(html) == 5, "the study and four tables"
    assert "first" in html[0]
    assert len(names["scores"]) == len(names["table"].read_text().splitlines()) - 1
    assert (tmp_path / "studies" / "first" / "report.html").is_file()
    assert (
        len([line for line in capsys.readouterr().out.splitlines() if line.startswith("0000")]) == 4
    )
