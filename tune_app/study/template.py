"""The study file that `medtune init` writes: every field with its meaning and default, from the code that reads them."""

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from search_spaces.space import SpaceError
from search_spaces.written import space_from
from trainables.checkpoints import replacing
from trainables.config import FineTuneConfig
from trainables.objective import OBJECTIVES
from tune_app.study.errors import SpecError
from tune_app.study.policy_spec import PolicySpec
from tune_app.study.presets import PRESETS
from tune_app.study.spec import StudySpec

WIDTH = 80

OF_PLANS = ("kind", "planned", "confirms", "seen_folds", "seen_rows")
"""Fields that `medtune ablate` and `medtune confirm` fill in."""

HEADER = (
    "A study of medtune: medtune run {name}",
    "Options of `medtune run` override this file. Fields left out have their defaults, and all values below are "
    "the defaults but for `data` and the lines of `config` without a # before them. Relative paths start at this file's "
    "folder.",
)

SPACE_HELP = """\
Written out, for example:
  space:
    base: documented            # optional: a space to start from
    search:                     # the parameters to search
      s: {low: 5, high: 40, log: true}
      one_minus_ema_decay: {low: 0.001, high: 0.02, log: true}
      head: [cosine, linear]
    retune:                     # varied only to be fair
      backbone_lr: {low: 0.00001, high: 0.001, log: true}
    fixed:
      dropout: 0.5
"""

CONFIG_HELP = "To set one, remove the # before it."

CLASSES_HELP = """\
Where labels are words, their class numbers (here, or below `config`):
  classes: {benign: 0, malignant: 1}
"""


def study_file(
    name: str = "study.yaml",
    *,
    data: str = "table.csv",
    space: str = "documented",
    preset: str | None = None,
    advice: Mapping[str, tuple[Any, str]] | None = None,
) -> str:
    """Return the text of a study file: YAML that gives the defaults, each field below its meaning.

    `name` is the file's own name. `preset` sets the fields of a preset, which are then no defaults. `advice`: hyperparameters that
    are set as well, each with its reason. Other hyperparameters are comments: a value that is set is not searched.
    """
    values = {
        field: info.get_default(call_default_factory=True)
        for field, info in StudySpec.model_fields.items()
    }
    values |= {"data": data, "space": space}
    given = PRESETS[preset] if preset is not None else {"config": {}}
    values |= given
    advised = {name: one for name, one in (advice or {}).items() if name not in given["config"]}
    lines = [line for part in HEADER for line in _comment(part.format(name=name))]
    helps = {
        "space": _as_comment(SPACE_HELP),
        "data": _as_comment(CLASSES_HELP),
        "config": _comment(CONFIG_HELP),
        "objective": [
            line
            for each in OBJECTIVES.values()
            for line in _comment(f"  {each.name}: {each.title}")
        ],
    }
    for field in [field for field in values if field not in OF_PLANS]:
        lines += ["", *_comment(_meaning(StudySpec, field)), *helps.get(field, [])]
        if field == "config":
            settings = given["config"] | {name: value for name, (value, _) in advised.items()}
            reasons = {name: reason for name, (_, reason) in advised.items()}
            lines += ["config:", *_hyperparameters(settings, reasons)]
        elif isinstance(values[field], PolicySpec):
            lines += [f"{field}:", *_nested(values[field])]
        else:
            lines.append(_entry(field, values[field]))
    lines += ["", *_comment("What follows is filled in by `medtune ablate` and `medtune confirm`.")]
    for field in OF_PLANS:
        lines += ["", *_comment(_meaning(StudySpec, field)), _entry(field, values[field])]
    return "\n".join(lines) + "\n"


def write_study_file(
    path: Path,
    *,
    data: str,
    space: str,
    preset: str | None = None,
    advice: Mapping[str, tuple[Any, str]] | None = None,
    force: bool = False,
) -> None:
    """Write `study_file` to `path`. Raises SpecError when there is a file (without `force`), or no such space."""
    if path.exists() and not force:
        raise SpecError(f"{path}: there already; --force writes over it, or name another file")
    try:
        space_from(space)
    except SpaceError as error:
        raise SpecError(error.problems) from None
    with replacing(path) as temporary:
        temporary.write_text(
            study_file(path.name, data=data, space=space, preset=preset, advice=advice),
            encoding="utf-8",
        )


def _meaning(model: type[BaseModel], field: str) -> str:
    meaning = model.model_fields[field].description
    assert meaning, f"{model.__name__}.{field} has no docstring"
    return meaning


def _nested(values: BaseModel) -> list[str]:
    lines: list[str] = []
    for field in type(values).model_fields:
        lines += [
            *_comment(_meaning(type(values), field), "  "),
            *_indented(_entry(field, getattr(values, field))),
        ]
    return lines


def _hyperparameters(given: Mapping[str, Any], reasons: Mapping[str, str]) -> list[str]:
    lines: list[str] = []
    for field, info in FineTuneConfig.model_fields.items():
        lines += _comment(_meaning(FineTuneConfig, field), "  ")
        if field in reasons:
            lines += _comment(f"Recommended: {reasons[field]}.", "  ")
        if field in given:
            lines += _indented(_entry(field, given[field]))
        else:
            lines += [f"  #{line}" for line in _entry(field, info.default).splitlines()]
    return lines


def _entry(field: str, value: Any) -> str:
    """`field: value` in YAML; mappings below it, sequences in one line."""
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, dict) and value:
        return yaml.safe_dump({field: value}, sort_keys=False, allow_unicode=True).rstrip()
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return f"{field}: {text.removesuffix('...' + chr(10)).rstrip()}"


def _indented(text: str) -> list[str]:
    return textwrap.indent(text, "  ").splitlines()


def _as_comment(text: str) -> list[str]:
    """The text's own lines."""
    return [f"# {line}".rstrip() for line in text.splitlines()]


def _comment(text: str, indent: str = "") -> list[str]:
    prefix = f"{indent}# "
    text = re.sub(r"\bNone\b", "null", text)  # as YAML has it
    return textwrap.wrap(
        text, WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False
    )
