"""Sliced score matching: the trace along random directions."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from .outer import Average, Noise, OuterLoss, Score, check_particles, half_square, mean_score


def sliced(score: Score, v: Array, projections: Array) -> Array:
    r""":math:`\tfrac12 \|s(v)\|^2 + \frac1M \sum_m w_m^\top \nabla s(v)\, w_m`, projections of shape (M, n, D).

    The variance-reduced form (Song, Garg, Shi, Ermon 2019, arXiv:1905.07088): the squared
    norm is taken exactly, since E[w wᵀ] = I for Gaussian and Rademacher projections.

    :param score: maps rows of shape (n, D) to their scores, of the same shape; or to several estimates, (L, n, D).
    :param v: the data, shape (n, D).
    :param projections: the directions w, shape (M, n, D): M for each example.
    """
    s, jvp = jax.linearize(score, v)
    trace: Array = jax.vmap(lambda w: (mean_score(jvp(w)) * w).sum(-1))(projections).mean(0)
    return half_square(s) + trace


@dataclass(frozen=True)
class SlicedScoreMatching(OuterLoss):
    """Sliced score matching, see :func:`sliced`.

    :param num_projections: M, projections a datapoint.
    :param noise: their distribution, ``"rademacher"`` (less variance) or ``"gaussian"``.
    :param num_particles: as in :class:`ScoreMatching`.
    :param average: as in :class:`ScoreMatching`.
    """

    num_projections: int = 1
    noise: Literal["rademacher", "gaussian"] = "rademacher"
    num_particles: int = 1
    average: Average = "loss"

    differentiates_score = True

    def __post_init__(self) -> None:
        check_particles(self.num_particles, self.average)
        if self.num_projections < 1:
            raise ValueError(f"num_projections must be at least 1, got {self.num_projections}.")
        if self.noise not in ("rademacher", "gaussian"):
            raise ValueError(f"noise must be 'rademacher' or 'gaussian', got {self.noise!r}.")

    def draw(self, rng_key: Array, v: Array) -> Noise:
        w = jax.random.normal(rng_key, (self.num_projections, *v.shape), v.dtype)
        # the sign of a Gaussian is a Rademacher draw
        signs = jnp.where(w < 0, -1.0, 1.0).astype(v.dtype)  # with x64 they would be float64
        return Noise(projections=signs if self.noise == "rademacher" else w)

    def __call__(self, score: Score, v: Array, noise: Noise) -> Array:
        assert noise.projections is not None
        return sliced(score, v, noise.projections)
