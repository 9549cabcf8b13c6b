"""Amortized: the linear system's solution is carried from step to step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .linear import LinearSystem, flat, ratio, unflat
from .problem import Bilevel, Hypergradient, Result, in_theta

__all__ = ["Amortized"]

MOMENT_DECAY = 0.99  # of Amortized's running sums, a step
RATE_FRACTION = 0.1  # Amortized's rate as a share of 1/λ_max: noise averages out over some ten steps at least
# share of ∂J/∂φ in Amortized's direction: where H has blocks, no power of it leads from one to another
RHS_SHARE = 0.1
# of x kept a step where it has grown along negative curvature, by 1 + FRACTION a step at most
SHRINK = 0.9


class AmortizedState(NamedTuple):
    """What :class:`Amortized` carries from step to step.

    :ivar solution: x, in the shapes of φ.
    :ivar direction: a unit vector in the shapes of φ, by power iteration that of the greatest curvature.
    :ivar moments: running sums of dᵀHd and ‖Hd‖² along the direction d, and of xᵀHx.
    """

    solution: Sequence[Tensor]
    direction: Sequence[Tensor]
    moments: Tensor


@dataclass(frozen=True)
class Amortized(Hypergradient):
    """The linear system's solution x is kept from step to step and improved by one Hessian product at each.

    x ← x - ρ (∂²G/∂φ² x - ∂J/∂φ), dJ/dθ ≈ ∂J/∂θ - ∂²G/∂θ∂φ x: SOBA (Dagréou, Ablin, Vaiter, Moreau 2022,
    arXiv:2201.13409). The noise of single Hessians averages out in x, and so does the minibatches'. At no minimum, with
    negative curvature, there is no solution: x shrinks while the running sum of xᵀHx is below zero.

    :param step_size: ρ. None finds it: with d the direction of greatest curvature, carried along by power iteration
        at the price of one more product, ρ is a tenth of E[dᵀHd] / E[‖Hd‖²]. The ratio is 1/λ_max where H is the
        same at every step, and less by as much as it is noisy, as stability in the mean square asks for. A tenth of
        ∂J/∂φ is mixed into d at every step, so that it finds its way into whichever block of H has the most curvature.
        Where the curvature along d is negative, φ is at no minimum and x stands still.
    :param num_steps: Hessian products a step.
    """

    cure = "give a smaller step_size"

    step_size: float | None = None
    num_steps: int = 1

    def __post_init__(self) -> None:
        if self.step_size is not None and not (self.step_size > 0 and math.isfinite(self.step_size)):
            raise ValueError(f"step_size must be positive and finite, or None, got {self.step_size}.")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}.")

    def init(self, theta: Sequence[Tensor], phi: Sequence[Tensor]) -> AmortizedState:
        zeros = [torch.zeros_like(p) for p in phi]
        return AmortizedState(zeros, zeros, phi[0].new_zeros(3) if phi else torch.zeros(3))

    def __call__(self, problem: Bilevel, state: AmortizedState) -> Result:
        if not problem.phi:
            return in_theta(problem.outer(), problem.theta)._replace(state=state)
        system = LinearSystem(problem)
        along, square, bent = state.moments
        curvature: Tensor | float = math.inf
        rate: Tensor | float
        x, d = flat(state.solution, problem.phi), flat(state.direction, problem.phi)
        if self.step_size is None:
            d = torch.where(d.any(), d, _unit(system.rhs))  # until there is a direction
            image = system.hessian(d)
            curvature = d.dot(image)
            along, square = MOMENT_DECAY * along + curvature, MOMENT_DECAY * square + image.dot(image)
            rate = RATE_FRACTION * ratio(along, square).clamp_min(0)
            d = _unit(_unit(image) + RHS_SHARE * _unit(system.rhs))
        else:
            rate = self.step_size
        for n in range(self.num_steps):
            if n < self.num_steps - 1:
                image = system.hessian(x)
            else:
                gradient, image = system.both(x)
                bent = MOMENT_DECAY * bent + x.dot(image)
            rest = image - system.rhs
            x = x - rate * rest
        x = torch.where(bent < 0, SHRINK, 1.0) * x
        residual = ratio(rest.norm(), system.rhs.norm())
        new = AmortizedState(unflat(x, problem.phi), unflat(d, problem.phi), torch.stack([along, square, bent]))
        return Result(system.loss, gradient, new, residual, curvature)


def _unit(x: Tensor) -> Tensor:
    norm = x.norm()
    return x / torch.where(norm > 0, norm, 1.0)
