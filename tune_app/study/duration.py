"""How long a study takes: from the seconds of an epoch to those of all trials."""

import math

from tune_app.study.policy import Policy


def study_s(trials: int, epochs: float, epoch_s: float, concurrent: int) -> float:
    """Return the seconds of `trials`, `concurrent` at a time; the last ones leave places empty."""
    return math.ceil(trials / concurrent) * epochs * epoch_s


def expected_epochs(policy: Policy, trials: int) -> float:
    """Return the epochs that one of `trials` is expected to train, where the same share passes each rung.

    A rung stops no trial before `judge_from` have arrived, so the first ones train to the end.
    """
    last = policy.max_epochs
    rungs = [rung for rung in policy.rungs if rung < last] if policy.spec.halving else []
    expected, share, before = 0.0, 1.0, 0.0
    for rung in [*rungs, float(last)]:
        expected += share * (rung - before)
        share, before = share / policy.spec.reduction_factor, rung
    free = min(trials, max(0, policy.spec.judge_from - 1))
    return (free * last + (trials - free) * expected) / trials


def span(seconds: float) -> str:
    """Return seconds in the unit that people would use."""
    for limit, unit, size in ((100.0, "s", 1.0), (6000.0, "min", 60.0), (2 * 86400.0, "h", 3600.0)):
        if seconds < limit:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 86400:.3g} days"
