"""All problems of a user's input, reported together."""

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
