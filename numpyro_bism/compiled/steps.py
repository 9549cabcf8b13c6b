"""The inner steps that BiSM and its rivals take, in one compiled loop, the noise of all drawn before it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .noise import split_noise

MAX_FUSED, FUSED_STEPS = 20, 5


def unroll_factor(num_steps: int) -> int:
    """How many inner steps stand in one body of the compiled loop: all of a few, so that there is no loop, else five.

    XLA fuses across them, and a small model's step takes 0.7 times as long. Steps that are differentiated hand on what
    the way back needs; copied from body to body it costs a 560 x 400 RBM another third of its time and memory.
    More would take long to compile.
    """
    return num_steps if num_steps <= MAX_FUSED else FUSED_STEPS


def norm(gradient: Any) -> Array:
    """The length of a pytree of gradients, all leaves side by side."""
    leaves = jax.tree.leaves(gradient)
    return jnp.sqrt(sum(jnp.square(g).sum() for g in leaves)) if leaves else jnp.zeros(())


class Prefetched(NamedTuple):
    """The inner loss as a function of noise that is drawn already.

    :ivar loss: G of (noise, θ, φ).
    :ivar noise: of the steps to come, one after the other along the leading axes.
    """

    loss: Callable[[Any, Any, Any], Array]
    noise: Any


def prefetch(loss: Callable[[Array, Any, Any], Array], keys: Array, theta: Any, phi: Any) -> Prefetched:
    """The noise that G of (rng_key, θ, φ) draws with each of these keys: the same numbers as one by one, for less."""
    draw, rest = split_noise(loss, keys[0], theta, phi)
    return Prefetched(rest, jax.vmap(draw)(keys))


def inner_steps(ahead: Prefetched, num_steps: int, theta: Any, optim: Any, state: Any) -> tuple[Any, Array, Array]:
    """So many steps of the inner optimiser on φ, θ held, with the first of the noise.

    :returns: the optimiser's state, and G and ‖∇_φ G‖ before each of the steps.
    """

    def step(state: Any, noise: Any) -> tuple[Any, tuple[Array, Array]]:
        phi = optim.get_params(state)
        loss, gradient = jax.value_and_grad(ahead.loss, argnums=2)(noise, theta, phi)
        return optim.update(gradient, state, value=loss), (loss, norm(gradient))

    noise = [x[:num_steps] for x in ahead.noise]
    state, (losses, norms) = jax.lax.scan(step, state, noise, length=num_steps, unroll=unroll_factor(num_steps))
    return state, losses, norms
