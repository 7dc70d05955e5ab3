"""Calibration against scikit-learn's own Platt fit, and the properties that prediction relies on."""

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.calibration import _SigmoidCalibration

from tune_app.results.calibration import Calibration, cross_fits, fit_calibration


def scores(
    count: int = 200, *, shift: float = 1.5, stretch: float = 8.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.3).astype(np.int64)
    odds = stretch * (labels - 0.5 + rng.normal(0, 1, count)) + shift
    return np.stack([-odds / 2, odds / 2], axis=1), labels


@pytest.mark.parametrize("stretch", [0.05, 1.0, 40.0])
@pytest.mark.parametrize("count", [12, 200])
def test_two_classes_equal_scikit_learns_platt_fit(count: int, stretch: float) -> None:
    z, labels = scores(count, stretch=stretch)
    oracle = _SigmoidCalibration().fit(z[:, 1] - z[:, 0], labels)
    fitted = fit_calibration(z, labels)
    np.testing.assert_allclose(
        fitted.probabilities(z)[:, 1], oracle.predict(z[:, 1] - z[:, 0]), atol=2e-4
    )


def test_a_shift_and_a_stretch_are_undone() -> None:
    rng = np.random.default_rng(1)
    truth = rng.normal(0, 1.5, 20_000)
    labels = (rng.random(20_000) < expit(truth)).astype(np.int64)
    distorted = 5 * truth - 7
    fitted = fit_calibration(np.stack([np.zeros_like(distorted), distorted], axis=1), labels)
    assert fitted.slope == pytest.approx(1 / 5, rel=0.05)
    assert fitted.offsets == pytest.approx((0, 7 / 5), rel=0.05)


def test_more_than_two_classes_are_calibrated_class_by_class() -> None:
    rng = np.random.default_rng(2)
    truth = rng.normal(0, 1.5, (20_000, 3))
    labels = (softmax(truth, axis=1).cumsum(axis=1) < rng.random((20_000, 1))).sum(axis=1)
    fitted = fit_calibration(3 * truth + np.array([0.0, 2.0, -1.0]), labels)
    assert fitted.slope == pytest.approx(1 / 3, rel=0.05)
    assert fitted.offsets == pytest.approx((0, -2 / 3, 1 / 3), abs=0.06)


def test_separated_and_constant_and_inverted_scores_stay_finite() -> None:
    labels = np.array([0] * 8 + [1] * 3)
    separated = fit_calibration(np.stack([0 * labels, 1e4 * (labels - 0.5)], axis=1), labels)
    high = separated.probabilities(np.array([[0.0, 5e3]]))[0, 1]
    assert 0.7 < high < 0.9, "three positives make 4 in 5 likely, not certainty"
    for z in (np.zeros((11, 2)), np.stack([labels, -labels], axis=1) * 5.0):
        known = fit_calibration(z, labels)
        np.testing.assert_allclose(known.probabilities(z)[:, 1], known.probabilities(z)[0, 1])
        assert known.probabilities(z)[0, 1] == pytest.approx(3 / 11, abs=0.06)
    assert fit_calibration(np.stack([labels, -labels], axis=1) * 5.0, labels).slope == 0


def test_the_order_of_volumes_never_changes() -> None:
    z, labels = scores()
    p = fit_calibration(z, labels).probabilities(z)[:, 1]
    assert (np.diff(p[np.argsort(z[:, 1] - z[:, 0])]) >= 0).all()


def test_calibration_survives_json() -> None:
    fitted = fit_calibration(*scores())
    assert Calibration.model_validate_json(fitted.model_dump_json()) == fitted


def test_cross_fits_judge_every_row_once_and_part_no_subject() -> None:
    rng = np.random.default_rng(3)
    groups = np.sort(rng.integers(0, 40, 90)).astype(str)
    labels = (np.unique(groups, return_inverse=True)[1] < 12).astype(np.int64)
    judged: list[int] = []
    for fit, judge in cross_fits(labels, groups):
        assert not set(groups[fit]) & set(groups[judge])
        assert set(labels[fit]) == {0, 1}
        assert labels[judge].any(), "positives are dealt out over all parts"
        judged.extend(judge)
    assert sorted(judged) == list(range(90))


def test_one_subject_cannot_be_cross_fitted() -> None:
    assert list(cross_fits(np.array([0, 1]), np.array(["a", "a"]))) == []
