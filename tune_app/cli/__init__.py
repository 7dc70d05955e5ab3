"""The command line: parse, call one function, return an exit code."""

from tune_app.cli.app import main

__all__ = ["main"]
