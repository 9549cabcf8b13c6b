"""Denoising score matching, at one noise level."""

from dataclasses import dataclass

import jax
from jax import Array

from .outer import Average, Noise, OuterLoss, Score, check_particles, check_positive, half_square


def denoising(score: Score, v: Array, noise: Array, *, sigma: float) -> Array:
    r""":math:`\tfrac12 \|s(v + \sigma \epsilon) + \epsilon / \sigma\|^2` (Vincent 2011).

    Minimised by the score of the data convolved with N(0, σ² I).

    :param score: maps rows of shape (n, D) to their scores, of the same shape; or to several estimates, (L, n, D).
    :param v: the clean data, shape (n, D).
    :param noise: ε, standard normal, in the shape of v.
    :param sigma: σ, the standard deviation of the noise, in the units of v.
    """
    residual = score(v + sigma * noise) + noise / sigma
    return half_square(residual)


@dataclass(frozen=True)
class DenoisingScoreMatching(OuterLoss):
    """Denoising score matching, see :func:`denoising`.

    Nearly all of its value may be the constant D/(2σ²) (:meth:`constant`). Progress shows in ``BiSMInfo.varying_loss``,
    where it is taken off: that falls to -½ E‖∇ log p_σ‖², p_σ the density of the noisy data.

    :param sigma: standard deviation of the noise, in the units of v. The density learnt is that of v with this noise:
        see ``noise`` of :func:`numpyro_bism.kernel_stein_discrepancy`, and :func:`numpyro_bism.denoise`.
    :param num_particles: as in :class:`ScoreMatching`.
    :param average: as in :class:`ScoreMatching`.
    """

    sigma: float
    num_particles: int = 1
    average: Average = "loss"

    def __post_init__(self) -> None:
        check_particles(self.num_particles, self.average)
        check_positive(sigma=self.sigma)

    def constant(self, num_dims: int) -> float:
        """D/(2σ²), the part of an example's expected loss that depends on no parameter: E ½‖ε/σ‖².

        :param num_dims: D, how many visible values an example has.
        """
        return num_dims / (2 * self.sigma**2)

    def draw(self, rng_key: Array, v: Array) -> Noise:
        return Noise(epsilon=jax.random.normal(rng_key, v.shape, v.dtype))

    def perturb(self, v: Array, noise: Noise) -> Array:
        assert noise.epsilon is not None
        return v + self.sigma * noise.epsilon

    def __call__(self, score: Score, v: Array, noise: Noise) -> Array:
        assert noise.epsilon is not None
        return denoising(score, v, noise.epsilon, sigma=self.sigma)
