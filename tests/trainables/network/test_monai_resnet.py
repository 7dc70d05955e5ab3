"""What loading the network loads beside it."""

import subprocess
import sys
from pathlib import Path

from trainables.network.monai_resnet import UNUSED


def found_by(code: str, folder: Path) -> set[str]:
    """Return which of the packages kept out, all of which are installed in `folder`, a new process has loaded."""
    for name in UNUSED:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(
            "from pathlib import Path\nPath(__file__).with_name('loaded').touch()\n"
        )
    start = f"import sys; sys.path.insert(0, {str(folder)!r})"
    subprocess.run([sys.executable, "-c", f"{start}; {code}"], check=True)
    return {name for name in UNUSED if (folder / name / "loaded").exists()}


def test_the_network_loads_no_package_that_monai_does_without(tmp_path: Path) -> None:
    assert found_by("import monai", tmp_path / "alone") == set(UNUSED), (
        "else there is nothing to keep out"
    )
    assert found_by("import trainables.network.model", tmp_path / "ours") == set()


def test_the_packages_can_be_loaded_afterwards_and_are_left_alone_if_they_were_before(
    tmp_path: Path,
) -> None:
    every = ", ".join(UNUSED)
    assert found_by(f"import trainables.network.model, {every}", tmp_path / "after") == set(UNUSED)
    code = f"import {every}, trainables.network.model; assert all(sys.modules[name] for name in {UNUSED!r})"
    assert found_by(code, tmp_path / "before") == set(UNUSED)
