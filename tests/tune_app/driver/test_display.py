"""Notes on the console: whole words on a terminal, whole lines in a file."""

import io

import pytest
from rich.console import Console

from tune_app.driver.display import Display

NOTE = "the interval of an AUC is wide where few volumes of a class validate, and which run is best is mostly luck"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_note_is_wrapped_between_words_on_a_terminal_alone(terminal: bool) -> None:
    file = io.StringIO()
    console = Console(
        file=file, width=40, force_terminal=terminal, no_color=True, legacy_windows=False
    )
    Display(console, num_trials=1, epochs=1).note(NOTE)
    lines = file.getvalue().splitlines()
    assert " ".join(" ".join(lines).split()) == f"note: {NOTE}"
    assert (max(map(len, lines)) <= 40) == terminal
