"""Exact score matching, with the trace of the score's derivative."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .outer import Average, Noise, OuterLoss, Score, check_particles, half_square, mean_score


def exact(score: Score, v: Tensor) -> Tensor:
    r""":math:`\tfrac12 \|s(v)\|^2 + \mathrm{tr}\,\nabla s(v)` (Hyvärinen 2005, Theorem 1).

    Costs D backward passes, batched. The score of one example must not depend on another example.

    :param score: maps rows of shape (n, D) to their scores, of the same shape; or to several estimates, (L, n, D).
    :param v: the data, shape (n, D).
    """
    v = v.detach().requires_grad_()
    s = score(v)
    n, num_dims = v.shape
    basis = torch.eye(num_dims, dtype=v.dtype, device=v.device)
    rows = basis.unsqueeze(1).expand(num_dims, n, num_dims)
    # rows[i] picks s_i of every example at once: J[i, b, j] = ∂ s_i(v_b) / ∂ v_bj
    (jacobian,) = torch.autograd.grad(mean_score(s), v, rows, create_graph=True, is_grads_batched=True)
    return half_square(s) + jacobian.diagonal(dim1=0, dim2=2).sum(-1)


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

    def __call__(self, score: Score, v: Tensor, noise: Noise) -> Tensor:
        return exact(score, v)
