"""Which hypergradient, where none is asked for: the rule of docs/hypergradients.md."""

from collections.abc import Callable
from typing import Any

from .amortized import Amortized
from .functional import Functional
from .problem import Hypergradient
from .surrogates import Exact

__all__ = ["chosen"]


def chosen(loss: Any, pair: Any, require_fit: Callable[[Hypergradient], None]) -> Hypergradient:
    """``Exact()`` for losses that differentiate the score, ``Functional()`` for the others, or else ``Amortized()``.

    :param loss: the outer loss.
    :param pair: model and guide.
    :param require_fit: raises ValueError where a strategy does not fit the programs.
    """
    first: Hypergradient = Exact() if loss.differentiates_score else Functional()
    try:
        first.check(loss, pair)
        require_fit(first)
    except ValueError:
        return Amortized()
    return first
