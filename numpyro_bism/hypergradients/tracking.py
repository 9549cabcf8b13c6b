"""The running mean of a noisy gradient that moves, its rate found from how far it moves and how noisy it is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .linear import ratio

__all__ = ["Tracked", "untracked"]

LONGEST = 0.99  # decay a step of the longest mean
MOMENTS = 0.999  # of the sums that the rate is found from: of fewer steps their ratio would be noise


class Tracked(NamedTuple):
    """A running mean that follows a noisy gradient x, and what its rate is found from.

    :ivar mean: the running mean m of x, in the shapes of θ.
    :ivar last: the last x.
    :ivar noise: decaying sums of ½‖x_t - x_{t-1}‖², parameter by parameter: the variance of x, drift left out.
    :ivar surprise: those of ‖x_t - m_{t-1}‖²: the same, and what m is behind.
    :ivar num_steps: how many x there have been.
    """

    mean: Any
    last: Any
    noise: Any
    surprise: Any
    num_steps: Array

    def follow(self, x: Any, memory: float | None) -> "Tracked":
        r"""With one more x: m ← m + ρ (x - m).

        .. math:: ρ = 1 - \frac{E ½‖x_t - x_{t-1}‖²}{E ‖x_t - m_{t-1}‖²},

        the gain of a Kalman filter (1960) whose innovations have that variance, and at least 1 - ``LONGEST``, for each
        parameter of the model. The first steps take the plain mean at the least.

        :param x: the gradient at this step, in the shapes of θ.
        :param memory: 1 - ρ, where it is fixed; None finds it.
        """
        noise = self._summed(self.noise, jax.tree.map(lambda x, y: 0.5 * jnp.square(x - y).sum(), x, self.last))
        surprise = self._summed(self.surprise, jax.tree.map(lambda x, y: jnp.square(x - y).sum(), x, self.mean))

        def moved(mean: Array, x: Array, noise: Array, surprise: Array) -> Array:
            rate = jnp.maximum(1 - ratio(noise, surprise), 1 - LONGEST) if memory is None else 1 - memory
            return (mean + jnp.maximum(1 / (self.num_steps + 1), rate) * (x - mean)).astype(x.dtype)

        mean = jax.tree.map(moved, self.mean, x, noise, surprise)
        return Tracked(mean, x, noise, surprise, self.num_steps + 1)

    def _summed(self, sums: Any, new: Any) -> Any:
        """Decaying sums, begun at the second step: before it there is neither a last x nor a mean."""
        return jax.tree.map(lambda s, x: MOMENTS * s + jnp.where(self.num_steps > 0, x, jnp.zeros_like(x)), sums, new)


def untracked(theta: Any) -> Tracked:
    """Before the first step."""

    def zeros() -> Any:  # two of them, and two of the sums: the loop donates its buffers, and none can be given twice
        return jax.tree.map(jnp.zeros_like, theta)

    def sums() -> Any:
        return jax.tree.map(lambda x: jnp.zeros((), x.dtype), theta)

    return Tracked(zeros(), zeros(), sums(), sums(), jnp.zeros((), int))
