"""Amortized: the linear system's solution is carried from step to step."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from .linear import linearized, ratio
from .problem import Bilevel, Hypergradient, Result

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

    solution: Any
    direction: Any
    moments: Array


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

    def init(self, theta: Any, optim: Any, inner_state: Any) -> AmortizedState:
        def zeros() -> Any:  # two of them: the loop donates its buffers, and none can be given twice
            return jax.tree.map(jnp.zeros_like, optim.get_params(inner_state))

        return AmortizedState(zeros(), zeros(), jnp.zeros(3))

    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any, state: AmortizedState) -> Result:
        system = linearized(rng_key, problem, theta, inner_state)
        norm, (along, square, bent) = jnp.linalg.norm(system.rhs), state.moments
        x, unravel = ravel_pytree(state.solution)
        d, _ = ravel_pytree(state.direction)
        curvature: Array | float
        if self.step_size is None:
            # until there is a direction: that of the right-hand side
            d = jnp.where((d == 0).all(), ratio(system.rhs, norm), d)
            image = system.products(d)[1]
            curvature = d.dot(image)
            along, square = MOMENT_DECAY * along + curvature, MOMENT_DECAY * square + image.dot(image)
            rate = RATE_FRACTION * jnp.maximum(ratio(along, square), 0)
            d = ratio(image, jnp.linalg.norm(image)) + RHS_SHARE * ratio(system.rhs, norm)
            d = ratio(d, jnp.linalg.norm(d))
        else:
            rate, curvature = jnp.asarray(self.step_size, x.dtype), jnp.inf

        def improved(x: Array, image: Array) -> Array:
            return (x - rate * (image - system.rhs)).astype(x.dtype)

        if self.num_steps > 1:
            x = jax.lax.fori_loop(0, self.num_steps - 1, lambda _, x: improved(x, system.products(x)[1]), x)
        cross, image = system.products(x)
        bent = MOMENT_DECAY * bent + x.dot(image)
        rest, x = image - system.rhs, improved(x, image) * jnp.where(bent < 0, SHRINK, 1.0).astype(x.dtype)
        moments = jnp.stack([along, square, bent]).astype(state.moments.dtype)
        gradient = jax.tree.map(jnp.subtract, system.direct, cross)
        residual = ratio(jnp.linalg.norm(rest), norm)
        return Result(system.loss, gradient, AmortizedState(unravel(x), unravel(d), moments), residual, curvature)
