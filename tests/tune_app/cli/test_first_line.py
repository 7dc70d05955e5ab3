"""The first line of a command, printed before it loads modules that take seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from tune_app.cli import studies
from tune_app.study.spec import build_spec

CODE = """
import sys
sys.modules.update(ray=None, torch=None)  # importing them fails
sys.argv = ["medtune", *sys.argv[1:]]
from tune_app.cli import main
main()
"""


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        (["run", "--data", "t.csv", "--out", "first"], "study: first"),
        (["train", "--data", "t.csv", "--out", "first"], "run: first"),
        (["demo", "--out", "first"], "demo: writing"),
    ],
)
def test_a_line_comes_before_ray_and_torch_are_loaded(
    tmp_path: Path, arguments: list[str], first: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0, "Ray or torch were needed after all"
    lines = done.stderr.splitlines()
    assert any(line.startswith(first) for line in lines[:3]), done.stderr
    assert "import of" in done.stderr


@pytest.mark.parametrize("begun", [False, True])
def test_an_interruption_before_the_first_trial_is_said_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], begun: bool
) -> None:
    import tune_app.driver.run

    def interrupted(spec: object, root: Path, **_: object) -> None:
        root.mkdir()
        if begun:
            (root / "epochs.jsonl").write_text("{}\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(tune_app.driver.run, "run_study", interrupted)
    spec = build_spec({"data": "/t.csv"})
    with pytest.raises(KeyboardInterrupt):
        studies._run_and_tell(spec, tmp_path / "s", studies.Start(address=None))
    said = " ".join(capsys.readouterr().err.split())
    assert ("interrupted before the first trial: nothing has been trained" in said) != begun
