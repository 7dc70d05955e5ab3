"""Errors of what users write."""


class SpecError(ValueError):
    """A study that cannot run as asked. `problems` holds one line a violation, all of them."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))
