"""Denoising score matching at many noise levels."""

from dataclasses import dataclass
from typing import Literal

import jax
from jax import Array

from .outer import Average, Noise, OuterLoss, Score, check_particles, check_positive, half_square


def multiscale_denoising(score: Score, v: Array, noise: Array, sigma: Array, *, sigma0: float) -> Array:
    r""":math:`\tfrac12 \|s(v + \sigma \epsilon) / \sigma + \epsilon / \sigma_0^2\|^2`, σ of shape (n, 1).

    Li, Chen, Sommer 2019 (arXiv:1910.07762), with weight 1/σ²: one energy, scored against a
    Gaussian of fixed scale σ₀ at all noise levels. With σ = σ₀ throughout it is ``denoising`` / σ₀².

    :param score: maps rows of shape (n, D) to their scores, of the same shape; or to several estimates, (L, n, D).
    :param v: the clean data, shape (n, D).
    :param noise: ε, standard normal, in the shape of v.
    :param sigma: σ, the noise level of every example, shape (n, 1), in the units of v.
    :param sigma0: σ₀, the one scale that the energy is scored at, in the units of v.
    """
    residual = score(v + sigma * noise) / sigma + noise / sigma0**2
    return half_square(residual)


@dataclass(frozen=True)
class MultiscaleDenoisingScoreMatching(OuterLoss):
    """Multiscale denoising score matching, see :func:`multiscale_denoising`.

    The noise level of every example is drawn afresh, uniformly between ``sigma_min`` and
    ``sigma_max`` on a geometric or linear scale. (The paper's authors use a fixed grid by position in the batch.)
    Of its value D/(2σ₀⁴) is a constant (:meth:`constant`), as in :class:`DenoisingScoreMatching`.

    :param sigma_min: the least noise level, in the units of v.
    :param sigma_max: the greatest noise level.
    :param sigma0: the scale that the energy is scored at: the density learnt is that of v with noise of this scale.
    :param spacing: ``"geometric"`` or ``"linear"``.
    :param num_particles: as in :class:`ScoreMatching`.
    :param average: as in :class:`ScoreMatching`.
    """

    sigma_min: float
    sigma_max: float
    sigma0: float
    spacing: Literal["geometric", "linear"] = "geometric"
    num_particles: int = 1
    average: Average = "loss"

    def __post_init__(self) -> None:
        check_particles(self.num_particles, self.average)
        check_positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max, sigma0=self.sigma0)
        ordered = not isinstance(self.sigma_min, jax.core.Tracer) and not isinstance(self.sigma_max, jax.core.Tracer)
        if ordered and self.sigma_min > self.sigma_max:
            raise ValueError(f"sigma_min ({self.sigma_min}) is above sigma_max ({self.sigma_max}).")
        if self.spacing not in ("geometric", "linear"):
            raise ValueError(f"spacing must be 'geometric' or 'linear', got {self.spacing!r}.")

    def constant(self, num_dims: int) -> float:
        """D/(2σ₀⁴), the part of an example's expected loss that depends on no parameter: E ½‖ε/σ₀²‖².

        :param num_dims: D, how many visible values an example has.
        """
        return num_dims / (2 * self.sigma0**4)

    def draw(self, rng_key: Array, v: Array) -> Noise:
        key_epsilon, key_sigma = jax.random.split(rng_key)
        epsilon = jax.random.normal(key_epsilon, v.shape, v.dtype)
        u = jax.random.uniform(key_sigma, (len(v), 1), v.dtype)
        if self.spacing == "geometric":
            sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** u
        else:
            sigma = self.sigma_min + (self.sigma_max - self.sigma_min) * u
        return Noise(epsilon=epsilon, sigma=sigma)

    def perturb(self, v: Array, noise: Noise) -> Array:
        assert noise.epsilon is not None and noise.sigma is not None
        return v + noise.sigma * noise.epsilon

    def __call__(self, score: Score, v: Array, noise: Noise) -> Array:
        assert noise.epsilon is not None and noise.sigma is not None
        return multiscale_denoising(score, v, noise.epsilon, noise.sigma, sigma0=self.sigma0)
