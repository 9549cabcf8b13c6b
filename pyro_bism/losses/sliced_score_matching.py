"""Sliced score matching: the trace along random directions."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .outer import Average, Noise, OuterLoss, Score, check_particles, half_square, mean_score


def sliced(score: Score, v: Tensor, projections: Tensor) -> Tensor:
    r""":math:`\tfrac12 \|s(v)\|^2 + \frac1M \sum_m w_m^\top \nabla s(v)\, w_m`, projections of shape (M, n, D).

    The variance-reduced form (Song, Garg, Shi, Ermon 2019, arXiv:1905.07088): the squared
    norm is taken exactly, since E[w wᵀ] = I for Gaussian and Rademacher projections.

    :param score: maps rows of shape (n, D) to their scores, of the same shape; or to several estimates, (L, n, D).
    :param v: the data, shape (n, D).
    :param projections: the directions w, shape (M, n, D): M for each example.
    """
    v = v.detach().requires_grad_()
    s = score(v)
    mean = mean_score(s)
    trace = torch.zeros_like(mean[:, 0])
    for w in projections:
        (jw,) = torch.autograd.grad(mean, v, w, create_graph=True)
        trace = trace + (jw * w).sum(-1)
    return half_square(s) + trace / len(projections)


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

    def draw(self, v: Tensor) -> Noise:
        w = torch.randn((self.num_projections, *v.shape), dtype=v.dtype, device=v.device)
        # the sign of a Gaussian is a Rademacher draw
        return Noise(projections=torch.where(w < 0, -1.0, 1.0).to(v) if self.noise == "rademacher" else w)

    def __call__(self, score: Score, v: Tensor, noise: Noise) -> Tensor:
        assert noise.projections is not None
        return sliced(score, v, noise.projections)
