"""Made scores with labels, and DeLong's components pair by pair."""

import numpy as np


def cohort(
    num: int = 120,
    classes: int = 2,
    *,
    seed: int = 0,
    signal: float = 1.0,
    decimals: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Float32 logits and labels; with few decimals there are ties."""
    random = np.random.default_rng(seed)
    labels = np.concatenate(
        [np.arange(classes), random.choice(classes, num - classes, p=_shares(classes))]
    )
    logits = random.normal(size=(num, classes)) + signal * np.eye(classes)[labels]
    return (logits if decimals is None else logits.round(decimals)).astype(np.float32), labels


def _shares(classes: int) -> np.ndarray:
    shares = 0.6 ** np.arange(classes)  # imbalanced
    return shares / shares.sum()


def delong_by_pairs(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """The structural components of DeLong et al. 1988 over all pairs, and the AUC."""
    difference = scores[labels == 1][:, None] - scores[labels == 0][None, :]
    kernel = (difference > 0) + 0.5 * (difference == 0)
    return kernel.mean(axis=1), kernel.mean(axis=0), kernel.mean()
