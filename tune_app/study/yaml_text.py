"""YAML of unknown origin -> plain values, or one error that gives the reason."""

from typing import Any

import yaml

MAX_VALUES = 100_000
"""Values in a document, aliases written out: some hundred bytes of nested aliases would fill any memory when printed."""
MAX_TEXT = 2**22
"""Characters of a document; the largest study file has some ten thousand."""
MAX_DEPTH = 100


class YamlError(ValueError):
    """Text that is not YAML, or is more of it than anybody would write."""


def load_yaml(text: str) -> Any:
    """Return the values of a YAML document; nothing in it is executed. Raises YamlError in one line."""
    if len(text) > MAX_TEXT:
        raise YamlError(
            f"{len(text)} characters, at most {MAX_TEXT} are read: is it the right file?"
        )
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                event, yaml.CollectionEndEvent
            )
            if depth > MAX_DEPTH:
                raise YamlError(f"nested deeper than {MAX_DEPTH} levels")
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise YamlError(f"not YAML: {' '.join(str(error).split())}") from None
    except (
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:  # dates and numbers that only look like ones
        if isinstance(error, YamlError):
            raise
        raise YamlError(f"not YAML: {' '.join(str(error).split())}") from None
    _count(value, {}, set())
    return value


def _count(value: Any, known: dict[int, int], inside: set[int]) -> int:
    """How many values there are with every alias written out."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) in inside:
        raise YamlError("a value contains itself, through an alias")
    if id(value) not in known:
        inside.add(id(value))
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known, inside) for part in parts)
        inside.remove(id(value))
        if known[id(value)] > MAX_VALUES:
            raise YamlError(f"more than {MAX_VALUES} values, with every alias written out")
    return known[id(value)]


def readable_yaml(*documents: Any) -> str:
    """Return YAML documents, keys in their order: block text for strings of several lines, no references."""
    return str(
        yaml.dump_all(documents, Dumper=_Readable, sort_keys=False, allow_unicode=True, width=100)
    )


class _Readable(yaml.SafeDumper):
    """Block text for strings of several lines, and no references between parts that happen to be equal."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> Any:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", value, style="|" if "\n" in value else None
    )


_Readable.add_representer(str, _text)
