r"""Hypergradients: how the outer gradient sees the inner fit.

.. math:: \frac{dJ}{dθ} = \frac{∂J}{∂θ} + \Big(\frac{dφ^*}{dθ}\Big)^\top \frac{∂J}{∂φ}

A strategy is a frozen dataclass of numbers, called with a :class:`Bilevel` problem; it returns the outer
loss and its gradient in θ. It reads φ and the inner optimiser's state and changes neither.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from .optim import differentiable_update

__all__ = ["Detached", "Unrolled"]

FUSED_STEPS = 5


def fused(num_steps: int) -> int:
    """How many inner steps stand in one body of the compiled loop.

    XLA fuses across them, and a small model's step takes 0.7 times as long; more would only compile longer.
    """
    return min(FUSED_STEPS, num_steps)


@dataclass(frozen=True)
class Bilevel:
    """The two losses on one batch, as functions of (rng_key, θ, φ).

    :ivar outer: J.
    :ivar inner: G.
    :ivar optim: the inner optimiser, in NumPyro's form.
    """

    outer: Callable[[Array, Any, Any], Array]
    inner: Callable[[Array, Any, Any], Array]
    optim: Any


@dataclass(frozen=True)
class Detached:
    """dJ/dθ ≈ ∂J/∂θ: the guide's dependence on θ is left out (the paper's N = 0).

    Biased unless the guide can reach the posterior *and* the loss is stationary in φ there; the linear-Gaussian
    model shows an error of more than the gradient's own length.
    """

    differentiates_inner = False

    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, state: Any) -> Any:
        phi = problem.optim.get_params(state)
        return jax.value_and_grad(problem.outer, argnums=1)(rng_key, theta, phi)


@dataclass(frozen=True)
class Unrolled:
    """Differentiates through N steps of the inner optimiser (Bao et al. 2020, Algorithm 1).

    From the fitted φ⁰ = φ: φⁿ⁺¹ = φⁿ - step(∇_φ G(θ, φⁿ)), each step with fresh noise; the gradient is that
    of θ ↦ J(θ, φᴺ(θ)). The N steps are then thrown away. ``Unrolled(0)`` is ``Detached()``.

    :param num_steps: N. Memory grows with it; past the inner loop's stability limit (a learning
        rate too high for the curvature) the gradient explodes.
    """

    num_steps: int = 5

    def __post_init__(self):
        if self.num_steps < 0:
            raise ValueError(f"num_steps must not be negative, got {self.num_steps}.")

    @property
    def differentiates_inner(self) -> bool:
        return self.num_steps > 0

    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, state: Any) -> Any:
        key_outer, key_inner = jax.random.split(rng_key)
        keys = jax.random.split(key_inner, self.num_steps)

        def whole(theta):
            def step(fast, key):
                phi = problem.optim.get_params(fast)
                loss, gradient = jax.value_and_grad(problem.inner, argnums=2)(key, theta, phi)
                return differentiable_update(problem.optim, gradient, fast, loss), None

            fast = jax.lax.scan(step, state, keys, unroll=fused(self.num_steps))[0] if self.num_steps else state
            return problem.outer(key_outer, theta, problem.optim.get_params(fast))

        return jax.value_and_grad(whole)(theta)
