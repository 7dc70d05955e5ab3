"""A study directory -> dataframes."""

from tune_app.results.study import Studies, Study, load_studies, load_study

__all__ = ["Studies", "Study", "load_studies", "load_study"]
