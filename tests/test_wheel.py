"""The built package holds everything that a checkout has: an installed package differs from the source tree."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("search_spaces", "trainables", "tune_app")
CHECK = """
import sys
from pathlib import Path
import tune_app
from tune_app.report import page
from tune_app.serve import app
from tune_app.cli import main
assert Path(tune_app.__file__).is_relative_to(sys.argv.pop(1)), tune_app.__file__
main()
"""


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_asset_and_runs_outside_the_checkout(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *PACKAGES):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run([sys.executable, "-m", "pip", *map(str, build)], check=True, timeout=240)
    (wheel,) = tmp_path.glob("medtune-*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)

    files = {
        path.relative_to(source)
        for package in PACKAGES
        for path in (source / package).rglob("*")
        if path.is_file()
    }
    assert len([path for path in files if path.suffix in (".js", ".css", ".html")]) >= 9
    assert {path for path in files if not (installed / path).is_file()} == set()
    shown = subprocess.run(
        [sys.executable, "-c", CHECK, installed, "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "resume" in shown.stdout
