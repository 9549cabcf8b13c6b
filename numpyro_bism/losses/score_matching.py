"""Exact score matching, with the trace of the score's derivative."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from .outer import Average, Noise, OuterLoss, Score, check_particles, half_square, mean_score


def exact(score: Score, v: Array) -> Array:
    r""":math:`\tfrac12 \|s(v)\|^2 + \mathrm{tr}\,\nabla s(v)` (Hyvärinen 2005, Theorem 1).

    Costs D Jacobian-vector products, batched. The score of one example must not depend on another example.

    :param score: maps rows of shape (n, D) to their scores, of the same shape; or to several estimates, (L, n, D).
    :param v: the data, shape (n, D).
    """
    s, jvp = jax.linearize(score, v)
    rows = jnp.eye(v.shape[1], dtype=v.dtype)
    # the i-th product moves coordinate i of every example at once
    diagonal = jax.vmap(lambda e, i: mean_score(jvp(jnp.broadcast_to(e, v.shape)))[:, i])(rows, jnp.arange(v.shape[1]))
    return half_square(s) + diagonal.sum(0)


@dataclass(frozen=True)
class ScoreMatching(OuterLoss):
    """Exact score matching, see :func:`exact`.

    :param num_particles: L, draws of h a datapoint.
    :param average: what is averaged over the draws; wanted is the loss of s̄ = E_{q(h|v)} s(v, h). ``"loss"`` averages
        the loss, as the BiSM paper does: too great by ½ E‖s(v, h) - s̄‖², the score's variance under q, whatever L is
        (for the multiscale loss, by that over σ²); 0 where q is the posterior. ``"score"`` averages the score first, as
        VaGES does (Bao et al. 2021, arXiv:2010.08258): 1/L of that bias is left, all of it with one draw.
        ``"unbiased"`` multiplies the scores of different draws in place of squaring their mean (a U-statistic): none
        is left, and a square's estimate may be negative; L must be at least 2. Sites that are summed out have no part
        in the variance under the last two. None of the three mends the guide: s̄ is the score of the model's marginal
        where q is the posterior; a guide blind to v has another s̄, however many draws are taken.
    """

    num_particles: int = 1
    average: Average = "loss"

    differentiates_score = True
    needs_uncoupled_examples = True  # its trace is wrong otherwise: checked at the first step

    def __post_init__(self) -> None:
        check_particles(self.num_particles, self.average)

    def __call__(self, score: Score, v: Array, noise: Noise) -> Array:
        return exact(score, v)
