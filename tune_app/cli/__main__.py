"""`python -m tune_app.cli`."""

from tune_app.cli.app import main

main()
