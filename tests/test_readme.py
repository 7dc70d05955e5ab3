"""README and docs against the code: the table of fixes, and every command and option they name."""

import re
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from search_spaces.fixes import FIXES, fixes_markdown
from tune_app.cli.app import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
COMMAND = re.compile(r"\bmedtune((?: +[a-z][a-z-]*)+)((?:\\\n|[^\n`])*)")
"""A command and its subcommands, then the rest of the line or code span; a backslash at the end of a line continues it."""


def code_in(text: str) -> list[str]:
    """Code blocks and code spans of Markdown: prose may put any word after the name."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [
        *blocks,
        *re.findall(
            r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        ),
    ]


def problems_of(text: str) -> list[str]:
    """One line for each command or option in the code of `text` that the command line does not have.

    The words after `--` form a second command: `medtune submit -- run study.yaml`.
    """
    found = []
    for code in code_in(text):
        code = re.sub(r"\bmedtune(.*?) -- (?=[a-z])", r"medtune\1\nmedtune ", code)
        for words, rest in COMMAND.findall(code):
            command = get_command(app)
            path = "medtune"
            for word in words.split():
                if not isinstance(command, TyperGroup):
                    break  # an argument
                path += f" {word}"
                if word not in command.commands:
                    found.append(f"no command `{path}`")
                    break
                command = command.commands[word]
            else:
                known = {
                    name
                    for parameter in command.params
                    for name in (*parameter.opts, *parameter.secondary_opts)
                }
                options = re.findall(r"(?<!\S)--[a-zA-Z][\w-]*", rest.split("#")[0].split("|")[0])
                found += [
                    f"no option {name} of `{path}`"
                    for name in options
                    if name not in known | {"--help"}
                ]
    return found


def test_the_table_of_fixes_is_the_one_in_the_code() -> None:
    between = re.findall(
        r"<!-- fixes:begin -->\n(.*?)<!-- fixes:end -->",
        DOCUMENTS["docs/fixes.md"],
        flags=re.DOTALL,
    )
    assert between == [fixes_markdown()], (
        "put the output of `medtune fixes --format markdown` between the markers"
    )
    assert DOCUMENTS["docs/fixes.md"].count("(`") >= len(FIXES)


def test_the_documents_are_seen() -> None:
    assert len(DOCUMENTS) > 10


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_and_option_that_is_named_exists(name: str) -> None:
    assert problems_of(DOCUMENTS[name]) == []


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("`medtune ablate --data T --seeds 3`", []),
        ("```\nmedtune data import FILE.npz OUT --limit 3\nmedtune fixes  # --all\n```\n", []),
        (
            "```\nmedtune run \\\n  --data T \\\n  --trails 3\n```\n",
            ["no option --trails of `medtune run`"],
        ),
        ("`medtune ablation`", ["no command `medtune ablation`"]),
        ("`medtune data chek TABLE`", ["no command `medtune data chek`"]),
        ("medtune is a program --with options", []),
    ],
)
def test_a_command_that_does_not_exist_would_be_noticed(text: str, problems: list[str]) -> None:
    assert problems_of(text) == problems


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_a_document_shows_or_links_are_there(name: str) -> None:
    named = re.findall(r"\]\(([^)#\s]+)", DOCUMENTS[name])
    here = (ROOT / name).parent
    assert [path for path in named if "://" not in path and not (here / path).exists()] == []


def test_the_readme_shows_the_collapse() -> None:
    assert "](docs/collapse.svg)" in DOCUMENTS["README.md"]
