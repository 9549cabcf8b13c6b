r"""Hypergradients: how the outer gradient sees the inner fit.

.. math:: \frac{dJ}{dθ} = \frac{∂J}{∂θ} + \Big(\frac{dφ^*}{dθ}\Big)^\top \frac{∂J}{∂φ}
          = \frac{∂J}{∂θ} - \frac{∂^2 G}{∂θ\,∂φ}\, x, \qquad \frac{∂^2 G}{∂φ^2}\, x = \frac{∂J}{∂φ}

A strategy is a frozen dataclass of numbers, called with a :class:`Bilevel` problem; it returns a :class:`Result`.
It reads φ and the inner optimiser's state and changes neither. What it carries from step to step is its own state,
made by ``init`` and handed back in the result.
"""

from .amortized import Amortized
from .choice import chosen
from .detached import Detached
from .functional import Functional
from .implicit import Implicit
from .penalty import Penalty
from .problem import (
    Bilevel,
    Gradient,
    Hypergradient,
    Result,
    Shifted,
    norm,
    require_hypergradient,
    value_and_grad,
)
from .surrogates import Covariance, Exact
from .unrolled import Unrolled

__all__ = [
    "Amortized",
    "Bilevel",
    "Covariance",
    "Detached",
    "Exact",
    "Functional",
    "Gradient",
    "Hypergradient",
    "Implicit",
    "Penalty",
    "Result",
    "Shifted",
    "Unrolled",
    "chosen",
    "norm",
    "require_hypergradient",
    "value_and_grad",
]
