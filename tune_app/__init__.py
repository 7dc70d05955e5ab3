"""The search over fine-tuning runs, and all around it: command line, studies, results, reports."""

from tune_app.api import confirm, export, load_study, predict, resume, search, write_report

__all__ = ["confirm", "export", "load_study", "predict", "resume", "search", "write_report"]
