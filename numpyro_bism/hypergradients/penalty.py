"""Penalty: the inner problem as a penalty, by first derivatives alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..compiled.steps import unroll_factor
from .problem import Bilevel, Hypergradient, Result

__all__ = ["Penalty"]


class PenaltyState(NamedTuple):
    """What :class:`Penalty` carries from step to step: a second guide, ψ.

    :ivar inner_state: the second guide's parameters and the state of their optimiser.
    :ivar num_steps: steps of BiSM so far.
    """

    inner_state: Any
    num_steps: Array


@dataclass(frozen=True)
class Penalty(Hypergradient):
    """First derivatives alone: the inner problem becomes a penalty (F2SA; Kwon, Kwon, Wright, Nowak 2023).

    A second guide ψ is fitted to G + J/λ by K steps of the inner optimiser, beside φ and with φ's noise; then
    dJ/dθ ≈ ∂_θ J(θ, ψ) + λ [∂_θ G(θ, ψ) - ∂_θ G(θ, φ)], both G with the same noise (arXiv:2301.10945). The bias is
    O(1/λ). The loss reported is J(θ, ψ).

    :param strength: λ: a number, or a function of the step (from 0), such as an optax schedule. ψ - φ is small as
        1/λ, and the noise in it is multiplied by λ.
    """

    cure = "lower the strength, and see that it stays positive"

    strength: float | Callable[[Array], Array] = 100.0

    differentiates_inner = False

    def __post_init__(self) -> None:
        if not callable(self.strength) and not (self.strength > 0 and math.isfinite(self.strength)):
            raise ValueError(f"strength must be positive and finite, or a function of the step, got {self.strength}.")

    def init(self, theta: Any, optim: Any, inner_state: Any) -> PenaltyState:
        # copied: the loop donates its buffers, and none can be given twice
        return PenaltyState(jax.tree.map(jnp.copy, inner_state), jnp.zeros((), int))

    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any, state: PenaltyState) -> Result:
        second, count = state
        strength = self.strength(count) if callable(self.strength) else self.strength
        key_fit, key_outer, key_inner = jax.random.split(rng_key, 3)
        phi = problem.optim.get_params(inner_state)

        def penalized(psi: Any, keys: tuple[Array, Array]) -> Array:
            key_inner, key_outer = keys
            return problem.inner(key_inner, theta, psi) + problem.outer(key_outer, theta, psi) / strength

        def fit(second: Any, keys: tuple[Array, Array]) -> tuple[Any, None]:
            loss, gradient = jax.value_and_grad(penalized)(problem.optim.get_params(second), keys)
            return problem.optim.update(gradient, second, value=loss), None

        num = len(problem.inner_keys)
        if num:
            keys = (problem.inner_keys, jax.random.split(key_fit, num))
            second, _ = jax.lax.scan(fit, second, keys, unroll=unroll_factor(num))
        psi = problem.optim.get_params(second)
        loss, direct = jax.value_and_grad(problem.outer, argnums=1)(key_outer, theta, psi)
        rise = jax.grad(lambda t: problem.inner(key_inner, t, psi) - problem.inner(key_inner, t, phi))(theta)
        gradient = jax.tree.map(lambda a, b: a + strength * b, direct, rise)
        return Result(loss, gradient, PenaltyState(second, count + 1))
