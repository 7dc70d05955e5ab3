"""A study directory -> dataframes."""

from tune_app.results.loading import load_studies, load_study
from tune_app.results.study import Studies, Study

__all__ = ["Studies", "Study", "load_studies", "load_study"]
