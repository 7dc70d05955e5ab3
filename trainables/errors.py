"""All problems of a user's input, reported together."""

import difflib
from collections.abc import Iterable, Mapping


class ProblemsError(ValueError):
    """An error of one problem or more. `problems` holds one line per problem, all of them, in the order of the input."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__(self.problems)  # what pickle, and so Ray, gives to the copy

    def __str__(self) -> str:
        return "\n".join(self.problems)


def those_that_hold(lines: Mapping[str, object]) -> list[str]:
    """Return the lines whose condition is true, in their order."""
    return [line for line, holds in lines.items() if holds]


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return `; did you mean 'backbone_lr'?` of the known name next to `name`; empty where none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def one_line(error: BaseException) -> str:
    """Return the error's message without its line ends, 200 characters at most."""
    return " ".join(str(error).split())[:200]
