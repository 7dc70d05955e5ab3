"""`python -m tune_app.cli`."""

from tune_app.cli import main

main()
