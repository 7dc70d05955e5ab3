"""What several commands share: consoles, options that mean the same everywhere, and how `--set` is read."""

import io
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from trainables.config import ConfigError
from trainables.data.visible import visible
from tune_app.study.yaml_text import YamlError, load_yaml


class VisibleConsole(Console):
    """Writes out invisible characters of the text it is given, such as ESC in the name of a file; colours are its own."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text, keep="\n\t"), **options)


def write_any_name() -> None:
    """Have standard output and error take every character: those that their encoding lacks are written out."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


out = VisibleConsole(highlight=False, soft_wrap=False)
err = VisibleConsole(stderr=True, highlight=False)

elsewhere: ContextVar[Callable[[Any, Path, bool], int] | None] = ContextVar(
    "elsewhere", default=None
)
"""What takes a study (its spec, or what was asked for; its folder; whether failed trials are tried again) instead of running
it here, and returns the exit code; set by `medtune submit`."""

DataOption = Annotated[
    Path,
    typer.Option(
        "--data", help="Table of volumes: path, label, subject, optionally fold or split."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Any hyperparameter; `medtune config` lists them."
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache", help="Folder of prepared cohorts; default: $MEDTUNE_CACHE, or ~/.cache/medtune."
    ),
]
WeightsOption = Annotated[
    Path | None, typer.Option("--pretrained-path", help="MedicalNet checkpoint.")
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="Folder to write to; default: a new one below studies/."),
]
GpusOption = Annotated[
    str | None, typer.Option("--gpus-per-trial", help="Whole number, fraction of one GPU, or auto.")
]
MpsOption = Annotated[
    Literal["auto", "on", "off"] | None,
    typer.Option("--mps", help="CUDA MPS for trials that share a GPU: auto, on or off."),
]
ConcurrentOption = Annotated[int | None, typer.Option("--max-concurrent", help="Trials at a time.")]
WaitOption = Annotated[
    float | None,
    typer.Option(
        "--wait-for-resources", help="Seconds to wait for a cluster that scales itself up."
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Ray cluster: HOST:PORT, auto, or local; default: RAY_ADDRESS, else a local Ray.",
    ),
]
RetryOption = Annotated[
    bool,
    typer.Option(
        "--retry-failed", help="Let trials that have failed continue, too, from their checkpoints."
    ),
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option("--device", help="auto, cpu or cuda.")
]


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """`["s=15", "head=linear"]` -> `{"s": 15, "head": "linear"}`; values are read as YAML scalars, paths made absolute."""
    from tune_app.study.spec import absolute_paths  # loads Optuna, which `--help` does without

    parsed: dict[str, Any] = {}
    problems = []
    for setting in settings or []:
        name, separator, value = setting.partition("=")
        if not separator or not name.strip():
            problems.append(f"--set {setting!r}: write NAME=VALUE")
            continue
        try:
            parsed[name.strip()] = load_yaml(value) if value else ""
        except YamlError:
            parsed[name.strip()] = value
        if isinstance(parsed[name.strip()], str):
            with_number = as_number(value)
            parsed[name.strip()] = value if with_number is None else with_number
    if problems:
        raise ConfigError(problems)
    return absolute_paths(parsed)


def as_number(text: str) -> float | None:
    """YAML 1.1 reads 1e-4 as text, for want of a dot; people write it as a number."""
    try:
        return float(text)
    except ValueError:
        return None


def cache_folder(cache: Path | None) -> Path:
    from tune_app.study.files import default_cache

    return cache or default_cache()


def gpus_option(text: str | None) -> float | str | None:
    if text is None or text == "auto":
        return text
    number = as_number(text)
    if number is None:
        raise typer.BadParameter(
            f"--gpus-per-trial {text!r}: a whole number, a fraction of one GPU, or auto"
        )
    return number


def stated(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given: those of None were left out, and have their defaults elsewhere."""
    return {name: value for name, value in options.items() if value is not None}


def to_stdout(text: str) -> None:
    """Print a line as it is: no markup, not broken."""
    out.print(text, soft_wrap=True, markup=False)


def to_stderr(text: str) -> None:
    err.print(
        text, soft_wrap=True, markup=False, style="red" if text.startswith("error:") else None
    )


class progress_bar:
    """A bar on stderr while the block runs; gives a callback (done, total). Nothing is drawn when stderr is no terminal."""

    def __init__(self, title: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
        self.title = title

    def __enter__(self) -> Callable[[int, int], None]:
        self.progress.start()
        self.task = self.progress.add_task(self.title, total=None)
        return lambda done, total: self.progress.update(self.task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
