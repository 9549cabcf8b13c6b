r"""Outer losses: score matching of a score function s(v) = ∇_v log p(v), up to no constant at all.

Each is minimised where s is the score of the data (of the noisy data, for the denoising two). The
functions take a score function and its noise; they know nothing of latents, guides or
randomness, so that the same function serves training and evaluation. ``v`` and the scores are matrices
of shape (n, D), one row an example, all visible sites side by side. Every function returns shape (n,).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DenoisingScoreMatching",
    "MultiscaleDenoisingScoreMatching",
    "ScoreMatching",
    "SlicedScoreMatching",
    "denoising",
    "exact",
    "multiscale_denoising",
    "sliced",
]

Score = Callable[[Tensor], Tensor]


def exact(score: Score, v: Tensor) -> Tensor:
    r""":math:`\tfrac12 \|s(v)\|^2 + \mathrm{tr}\,\nabla s(v)` (Hyvärinen 2005, Theorem 1).

    Costs D backward passes, batched. The score of one example must not depend on another example.
    """
    v = v.detach().requires_grad_()
    s = score(v)
    n, num_dims = v.shape
    basis = torch.eye(num_dims, dtype=v.dtype, device=v.device)
    rows = basis.unsqueeze(1).expand(num_dims, n, num_dims)
    # rows[i] picks s_i of every example at once: J[i, b, j] = ∂ s_i(v_b) / ∂ v_bj
    (jacobian,) = torch.autograd.grad(s, v, rows, create_graph=True, is_grads_batched=True)
    return 0.5 * s.square().sum(-1) + jacobian.diagonal(dim1=0, dim2=2).sum(-1)


def sliced(score: Score, v: Tensor, projections: Tensor) -> Tensor:
    r""":math:`\tfrac12 \|s(v)\|^2 + \frac1M \sum_m w_m^\top \nabla s(v)\, w_m`, projections of shape (M, n, D).

    The variance-reduced form (Song, Garg, Shi, Ermon 2019, arXiv:1905.07088): the squared
    norm is taken exactly, since E[w wᵀ] = I for Gaussian and Rademacher projections.
    """
    v = v.detach().requires_grad_()
    s = score(v)
    trace = torch.zeros_like(s[:, 0])
    for w in projections:
        (jw,) = torch.autograd.grad(s, v, w, create_graph=True)
        trace = trace + (jw * w).sum(-1)
    return 0.5 * s.square().sum(-1) + trace / len(projections)


def denoising(score: Score, v: Tensor, noise: Tensor, *, sigma: float) -> Tensor:
    r""":math:`\tfrac12 \|s(v + \sigma \epsilon) + \epsilon / \sigma\|^2` (Vincent 2011).

    Minimised by the score of the data convolved with N(0, σ² I).
    """
    residual = score(v + sigma * noise) + noise / sigma
    return 0.5 * residual.square().sum(-1)


def multiscale_denoising(score: Score, v: Tensor, noise: Tensor, sigma: Tensor, *, sigma0: float) -> Tensor:
    r""":math:`\tfrac12 \|s(v + \sigma \epsilon) / \sigma + \epsilon / \sigma_0^2\|^2`, σ of shape (n, 1).

    Li, Chen, Sommer 2019 (arXiv:1910.07762), with weight 1/σ²: one energy, scored against a
    Gaussian of fixed scale σ₀ at all noise levels. With σ = σ₀ throughout it is ``denoising`` / σ₀².
    """
    residual = score(v + sigma * noise) / sigma + noise / sigma0**2
    return 0.5 * residual.square().sum(-1)


class Noise(NamedTuple):
    """What a loss draws at random for one evaluation: Gaussian noise, noise levels, projections."""

    epsilon: Tensor | None = None
    sigma: Tensor | None = None
    projections: Tensor | None = None


Average = Literal["loss", "score"]


def _check_particles(num_particles: int, average: str) -> None:
    if num_particles < 1:
        raise ValueError(f"num_particles must be at least 1, got {num_particles}.")
    if average not in ("loss", "score"):
        raise ValueError(f"average must be 'loss' or 'score', got {average!r}.")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}.")


@dataclass(frozen=True)
class ScoreMatching:
    """Exact score matching, see :func:`exact`.

    :param num_particles: draws of h a datapoint.
    :param average: ``"loss"`` averages the loss over the draws, as the BiSM paper does;
        ``"score"`` averages the score first, as VaGES does (Bao et al. 2021, arXiv:2010.08258), which takes
        away the bias that a guide blind to v has under ``"loss"``.
    """

    num_particles: int = 1
    average: Average = "loss"

    differentiates_score = True
    needs_uncoupled_examples = True  # its trace is wrong otherwise: checked at the first step

    def __post_init__(self):
        _check_particles(self.num_particles, self.average)

    def draw(self, v: Tensor) -> Noise:
        return Noise()

    def perturb(self, v: Tensor, noise: Noise) -> Tensor:
        return v

    def __call__(self, score: Score, v: Tensor, noise: Noise) -> Tensor:
        return exact(score, v)


@dataclass(frozen=True)
class SlicedScoreMatching:
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
    needs_uncoupled_examples = False

    def __post_init__(self):
        _check_particles(self.num_particles, self.average)
        if self.num_projections < 1:
            raise ValueError(f"num_projections must be at least 1, got {self.num_projections}.")
        if self.noise not in ("rademacher", "gaussian"):
            raise ValueError(f"noise must be 'rademacher' or 'gaussian', got {self.noise!r}.")

    def draw(self, v: Tensor) -> Noise:
        w = torch.randn((self.num_projections, *v.shape), dtype=v.dtype, device=v.device)
        # the sign of a Gaussian is a Rademacher draw
        return Noise(projections=torch.where(w < 0, -1.0, 1.0).to(v) if self.noise == "rademacher" else w)

    def perturb(self, v: Tensor, noise: Noise) -> Tensor:
        return v

    def __call__(self, score: Score, v: Tensor, noise: Noise) -> Tensor:
        assert noise.projections is not None
        return sliced(score, v, noise.projections)


@dataclass(frozen=True)
class DenoisingScoreMatching:
    """Denoising score matching, see :func:`denoising`.

    :param sigma: standard deviation of the noise, in the units of v.
    :param num_particles: as in :class:`ScoreMatching`.
    :param average: as in :class:`ScoreMatching`.
    """

    sigma: float
    num_particles: int = 1
    average: Average = "loss"

    differentiates_score = False
    needs_uncoupled_examples = False

    def __post_init__(self):
        _check_particles(self.num_particles, self.average)
        _check_positive(sigma=self.sigma)

    def draw(self, v: Tensor) -> Noise:
        return Noise(epsilon=torch.randn_like(v))

    def perturb(self, v: Tensor, noise: Noise) -> Tensor:
        assert noise.epsilon is not None
        return v + self.sigma * noise.epsilon

    def __call__(self, score: Score, v: Tensor, noise: Noise) -> Tensor:
        assert noise.epsilon is not None
        return denoising(score, v, noise.epsilon, sigma=self.sigma)


@dataclass(frozen=True)
class MultiscaleDenoisingScoreMatching:
    """Multiscale denoising score matching, see :func:`multiscale_denoising`.

    The noise level of every example is drawn afresh, uniformly between ``sigma_min`` and
    ``sigma_max`` on a geometric or linear scale. (The paper's authors use a fixed grid by position in the batch.)

    :param sigma_min: the least noise level, in the units of v.
    :param sigma_max: the greatest noise level.
    :param sigma0: the scale that the energy is scored at.
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

    differentiates_score = False
    needs_uncoupled_examples = False

    def __post_init__(self):
        _check_particles(self.num_particles, self.average)
        _check_positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max, sigma0=self.sigma0)
        if self.sigma_min > self.sigma_max:
            raise ValueError(f"sigma_min ({self.sigma_min}) is above sigma_max ({self.sigma_max}).")
        if self.spacing not in ("geometric", "linear"):
            raise ValueError(f"spacing must be 'geometric' or 'linear', got {self.spacing!r}.")

    def draw(self, v: Tensor) -> Noise:
        epsilon = torch.randn_like(v)
        u = torch.rand((len(v), 1), dtype=v.dtype, device=v.device)
        if self.spacing == "geometric":
            sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** u
        else:
            sigma = self.sigma_min + (self.sigma_max - self.sigma_min) * u
        return Noise(epsilon=epsilon, sigma=sigma)

    def perturb(self, v: Tensor, noise: Noise) -> Tensor:
        assert noise.epsilon is not None and noise.sigma is not None
        return v + noise.sigma * noise.epsilon

    def __call__(self, score: Score, v: Tensor, noise: Noise) -> Tensor:
        assert noise.epsilon is not None and noise.sigma is not None
        return multiscale_denoising(score, v, noise.epsilon, noise.sigma, sigma0=self.sigma0)


OuterLoss = ScoreMatching | SlicedScoreMatching | DenoisingScoreMatching | MultiscaleDenoisingScoreMatching
