r"""Outer losses: score matching of a score function s(v) = ∇_v log p(v), up to no constant at all.

Each is minimised where s is the score of the data (of the noisy data, for the denoising two). The
functions take a score function and its noise; they know nothing of latents, guides or
randomness, so that the same function serves training and evaluation. ``v`` and the scores are matrices
of shape (n, D), one row an example, all visible sites side by side. Every function returns shape (n,).

A score function may also give L independent unbiased estimates of the score, of shape (L, n, D)
(``average="unbiased"``). The parts of a loss that are linear in the score then take their mean, and its square the mean
product of two different ones, so that the loss is estimated without bias:

.. math:: \tfrac12 \|s\|^2 \to \frac{1}{2 L (L - 1)} \sum_{k \ne l} s_k^\top s_l
          = \tfrac12 \|\bar s\|^2 - \frac{1}{2 L (L - 1)} \sum_k \|s_k - \bar s\|^2
"""

from .denoising_score_matching import DenoisingScoreMatching, denoising
from .multiscale_score_matching import MultiscaleDenoisingScoreMatching, multiscale_denoising
from .outer import Noise, OuterLoss, half_square, loss_by_example, mean_score, require_outer_loss
from .score_matching import ScoreMatching, exact
from .sliced_score_matching import SlicedScoreMatching, sliced

__all__ = [
    "DenoisingScoreMatching",
    "MultiscaleDenoisingScoreMatching",
    "Noise",
    "OuterLoss",
    "ScoreMatching",
    "SlicedScoreMatching",
    "denoising",
    "exact",
    "half_square",
    "loss_by_example",
    "mean_score",
    "multiscale_denoising",
    "require_outer_loss",
    "sliced",
]
