"""Fixes put together into named variants: which of them matter, alone and among the others."""

from collections.abc import Callable

from search_spaces.fixes import DOCUMENT_EPOCHS, FIXES, with_fixes
from trainables.config import Scalar
from trainables.errors import did_you_mean

Variants = dict[str, dict[str, Scalar]]
"""Overrides by the name of the variant. Each one writes out the hyperparameters of all fixes, so that tables line up."""

_ALWAYS = tuple(fix.key for fix in FIXES if not fix.optional)
_DOCUMENTED = tuple(fix.key for fix in FIXES if fix.documented and not fix.optional)


def variants(name: str, epochs: int = DOCUMENT_EPOCHS) -> Variants:
    """Return the variants of an ablation study, its reference first; epochs in them keep their share of `epochs`.

    documented: the five of the source document, against the baseline; `combined` is all that the document recommends.
    add-one: the baseline, and the baseline with one fix, each in turn; effects are read against the baseline.
    leave-one-out: all fixes, and all but one, each in turn; effects are read against `all-fixes`. The optional fix is
    off in the defaults and cannot be left out.
    all: every variant of the three, each once.

    Raises ValueError naming the sets there are.
    """
    if name not in VARIANT_SETS:
        raise ValueError(
            f"unknown set of variants {name!r}: one of {', '.join(VARIANT_SETS)}{did_you_mean(name, VARIANT_SETS)}"
        )
    return VARIANT_SETS[name](epochs)


def reference(name: str) -> str:
    """Return the variant of the set that the others are compared with."""
    return next(iter(variants(name)))


def _documented(epochs: int) -> Variants:
    return {
        "baseline": with_fixes((), epochs),
        **{
            f"only-{key}": with_fixes([key], epochs)
            for key in ("differential-lr", "reduced-ldam", "delayed-drw")
        },
        "combined": with_fixes(_DOCUMENTED, epochs),
    }


def _add_one(epochs: int) -> Variants:
    return {
        "baseline": with_fixes((), epochs),
        **{f"only-{fix.key}": with_fixes([fix.key], epochs) for fix in FIXES},
    }


def _leave_one_out(epochs: int) -> Variants:
    return {
        "all-fixes": with_fixes(_ALWAYS, epochs),
        **{
            f"without-{key}": with_fixes([k for k in _ALWAYS if k != key], epochs)
            for key in _ALWAYS
        },
    }


def _all(epochs: int) -> Variants:
    return _documented(epochs) | _add_one(epochs) | _leave_one_out(epochs)


VARIANT_SETS: dict[str, Callable[[int], Variants]] = {
    "documented": _documented,
    "add-one": _add_one,
    "leave-one-out": _leave_one_out,
    "all": _all,
}
