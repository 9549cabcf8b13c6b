"""Implicit: the linear system solved anew at every step."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from .linear import LinearSystem, descended, nystrom, ratio
from .problem import Bilevel, Hypergradient, Result, in_theta

__all__ = ["Implicit"]


@dataclass(frozen=True)
class Implicit(Hypergradient):
    """The implicit function theorem at the present φ: dJ/dθ = ∂J/∂θ - ∂²G/∂θ∂φ (∂²G/∂φ² + damping I)⁻¹ ∂J/∂φ.

    Exact where φ minimises G and the system is solved (Lorraine, Vicol, Duvenaud 2020, arXiv:1911.02590). All
    Hessian products of a step share one draw of noise, so that they belong to one symmetric matrix. ``info`` says how
    well the system was solved: ``residual`` is relative to the right-hand side, and a ``curvature`` at or below
    zero says that G has no minimum along a line that the solver took; there it stopped.

    A relaxed latent's Hessian on one draw of noise is far from its mean, and not positive: sum the latents out, or
    take :class:`Amortized`, which averages over the steps.

    :param solver: ``"cg"`` conjugate gradients; ``"neumann"`` the Neumann series, its rate found from the products;
        ``"nystrom"`` a low-rank inverse, best with a ``damping``.
    :param num_steps: Hessian products at most (for ``"nystrom"`` the rank).
    :param damping: added to the Hessian's diagonal.
    """

    cure = "add damping"

    solver: Literal["cg", "neumann", "nystrom"] = "cg"
    num_steps: int = 10
    damping: float = 0.0

    def __post_init__(self) -> None:
        if self.solver not in ("cg", "neumann", "nystrom"):
            raise ValueError(f"solver must be 'cg', 'neumann' or 'nystrom', got {self.solver!r}.")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}.")
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise ValueError(f"damping must not be negative or infinite, got {self.damping}.")

    def __call__(self, problem: Bilevel, state: Any) -> Result:
        if not problem.phi:
            return in_theta(problem.outer(), problem.theta)
        system = LinearSystem(problem)
        if self.solver == "nystrom":
            x, rest, least = nystrom(system.hessian, system.rhs, self.num_steps, self.damping)
        else:
            product = system.hessian if self.damping == 0 else lambda x: system.hessian(x).add(x, alpha=self.damping)
            conjugate = self.solver == "cg"
            x, rest, least = descended(product, system.rhs, self.num_steps, conjugate, problem.is_captured)
            least = least - self.damping
        residual = ratio(rest.norm(), system.rhs.norm())
        return Result(system.loss, system.gradient(x), None, residual, least)
