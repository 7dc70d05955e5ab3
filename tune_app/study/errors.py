"""Errors of what users write."""

from trainables.errors import ProblemsError


class SpecError(ProblemsError):
    """A study that cannot run as asked. `problems` holds one line a violation, all of them."""
