"""Errors that list problems reach another process whole: Ray pickles a trial's exception."""

import pickle
from importlib import import_module

import pytest

from trainables.errors import ProblemsError

LISTING = [
    ("trainables.config", "ConfigError"),
    ("trainables.data.table_file", "ManifestError"),
    ("trainables.data.volumes", "CohortError"),
    ("search_spaces.space", "SpaceError"),
    ("tune_app.backtest.curves", "CurveError"),
    ("tune_app.models.evaluation", "ExportError"),
    ("tune_app.models.folder", "ModelError"),
    ("tune_app.study.errors", "SpecError"),
    ("tune_app.study.policy_spec", "PolicyError"),
    ("tune_app.study.rows", "StudyDamageError"),
]


@pytest.mark.parametrize(("module", "name"), LISTING)
def test_errors_keep_their_problems_when_pickled(module: str, name: str) -> None:
    error = getattr(import_module(module), name)(["ab", "c"])
    assert isinstance(error, ProblemsError)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert copy.problems == ["ab", "c"]
    assert str(copy) == str(error) == "ab\nc"


def test_one_problem_may_be_given_as_text() -> None:
    error = pickle.loads(pickle.dumps(ProblemsError("ab")))
    assert (error.problems, str(error)) == (["ab"], "ab")
