"""Detached: the strategy that looks away from the inner problem."""

from dataclasses import dataclass
from typing import Any

from .problem import Bilevel, Hypergradient, Result, in_theta

__all__ = ["Detached"]


@dataclass(frozen=True)
class Detached(Hypergradient):
    """dJ/dθ ≈ ∂J/∂θ: the guide's dependence on θ is left out (the paper's N = 0).

    Biased unless the guide can reach the posterior *and* the loss is stationary in φ there; the linear-Gaussian
    model shows an error of more than the gradient's own length.
    """

    differentiates_inner = False
    cure = "lower the learning rate of optim, or clip its gradients"

    def __call__(self, problem: Bilevel, state: Any) -> Result:
        return in_theta(problem.outer(), problem.theta)
