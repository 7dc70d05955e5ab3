"""The command line: parse, call one function, return an exit code."""

import sys


def main() -> None:
    """Run the command that the process was started with; Ctrl-C while its modules are loaded ends it without a traceback."""
    try:
        from tune_app.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()
