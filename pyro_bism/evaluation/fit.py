"""Measures of fit that need no normaliser."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import losses
from ..energies import VISIBLE
from ..programs.modes import in_own_modes
from .noise import with_noise
from .normalizer import Estimate
from .scores import gradient, guide_score, score_at, summable


class FitTest(NamedTuple):
    """How far two distributions are apart, and a test of the hypothesis that they are the same.

    :ivar statistic: an unbiased estimate of the squared discrepancy; it may be negative.
    :ivar p_value: of the hypothesis that the discrepancy is 0: small values reject it.
    """

    statistic: float
    p_value: float


@in_own_modes
def fisher_divergence(
    trained: Any,
    *args: Any,
    data_score: Any = None,
    num_draws: int = 100,
    num_projections: int | None = None,
    noise: float | str | None = None,
    **kwargs: Any,
) -> Estimate:
    r"""The Fisher divergence between the data and the model, a mean over the rows.

    With the data's score known :math:`\tfrac12 E\|\nabla\log p_{data}(v) - s(v)\|^2`; without it the same up to a
    constant of the data, :math:`E[\tfrac12\|s(v)\|^2 + \mathrm{tr}\,\nabla s(v)]` (Hyvärinen 2005, Theorem 1): two
    models of the same data are compared by it. s is the exact score of the marginal where the latents can be summed,
    else a mean over the guide's draws of h.

    A denoising loss's density is that of noisy data, and is the best of all by this measure on noisy rows; models that
    were learnt with different σ are compared on the rows as they are.

    :param trained: a BiSM or a rival.
    :param args: arguments of model and guide, the data among them, as for ``step``.
    :param data_score: ∇ log p_data at the rows, (n, D), or a function from v to it; with ``noise``, a function, and of
        the noisy data's density.
    :param num_draws: of h, if the guide is needed.
    :param num_projections: random directions that estimate the trace; None takes it exactly, for D gradients.
    :param noise: added to the rows before: None for none, "loss" for the outer loss's, or a standard deviation; see
        :func:`kernel_stein_discrepancy`.
    :param kwargs: keyword arguments of model and guide.
    :returns: ``standard_error`` is that of a mean over the rows.
    """
    if noise is not None and data_score is not None and not callable(data_score):
        raise ValueError("data_score: the noise moves the rows, so give a function from v to the score.")
    args, kwargs = with_noise(trained, args, kwargs, noise)
    if data_score is not None:
        v, s, method, _ = score_at(trained, args, kwargs, num_draws)
        wanted = torch.as_tensor(data_score(v) if callable(data_score) else data_score)
        if wanted.shape != s.shape:
            raise ValueError(f"data_score has shape {wanted.shape}; {s.shape} is wanted.")
        return _mean(0.5 * ((wanted - s) ** 2).sum(-1), method)
    # of one draw's score the square is too great by the score's variance over h
    average: Any = "unbiased" if num_draws > 1 else "score"
    loss: Any = losses.ScoreMatching(num_particles=num_draws, average=average)
    if num_projections is not None:
        loss = losses.SlicedScoreMatching(num_projections, num_particles=num_draws, average=average)
    density, x, integral = summable(trained, args, kwargs)
    if integral is not None:
        v, marginal = x[VISIBLE], gradient(lambda v: integral(density, {**x, VISIBLE: v}))
        return _mean(loss(marginal, v, loss.draw(v)).detach(), "exact")
    batch, draw, score = guide_score(trained, args, kwargs, loss)
    draws = [draw() for _ in range(num_draws)]
    return _mean(loss(score(draws), batch.v, loss.draw(batch.v)).detach(), "guide")


def _mean(values: Tensor, method: str) -> Estimate:
    n = len(values)
    error = values.std() / math.sqrt(n) if n > 1 else values.new_tensor(math.nan)
    return Estimate(values.mean(), error, method)


@in_own_modes
def kernel_stein_discrepancy(
    trained: Any,
    *args: Any,
    num_bootstrap: int = 1000,
    num_draws: int = 100,
    noise: float | str | None = "loss",
    **kwargs: Any,
) -> FitTest:
    r"""The squared kernel Stein discrepancy between data and model, and a test of fit: no normaliser is needed.

    The mean over pairs of rows of (Liu, Lee, Jordan 2016; Chwialkowski, Strathmann, Gretton 2016)

    .. math:: u(x, y) = s(x)^\top s(y) k + s(x)^\top \nabla_y k + s(y)^\top \nabla_x k + \mathrm{tr}\,\nabla_x\nabla_y k

    with the inverse multiquadric (Gorham, Mackey 2017), here of a power that grows with the dimension:

    .. math:: k(x, y) = \left[\tfrac13 \big(1 + (x - y)^\top M (x - y)\big)\right]^{-\sqrt D / 2}.

    Distances differ from pair to pair by a share of 1/√D, and with a fixed power k would hardly differ then, and see
    little more than the mean. M is diagonal, one over D times a column's variance: so few numbers hardly depend on the
    rows that are tested, where an inverse covariance would, and the test keeps its level from 50 rows to 1,000 and from
    one dimension to 784. The p-value is by the wild bootstrap: signs at random.

    A denoising loss learns the density of *noisy* data, which clean data are no draws of. So noise is added to the rows
    first, fresh at every call; ``noise=None`` tests whether the rows, as they are, come from the model.

    :param trained: a BiSM or a rival.
    :param args: arguments of model and guide; the data among them are independent draws of the distribution that is
        tested, one a row, and clean.
    :param num_bootstrap: how often the signs are drawn; no p-value is below 1 / (num_bootstrap + 1).
    :param num_draws: of h, where the score needs the guide; the test is of guide and model together then.
    :param noise: its standard deviation: "loss" takes the outer loss's σ (σ₀ of the multiscale one; none of a loss
        without noise); a number; None for no noise.
    :param kwargs: keyword arguments of model and guide.
    :returns: a small p-value rejects that the rows come from the model.
    """
    args, kwargs = with_noise(trained, args, kwargs, noise)
    found = score_at(trained, args, kwargs, num_draws)
    return stein_test(found.v, found.score, num_bootstrap)


def stein_test(v: Any, score: Any, num_bootstrap: int = 1000) -> FitTest:
    """:func:`kernel_stein_discrepancy` of rows v, (n, D), and the model's score at them, (n, D)."""
    v, score = (torch.as_tensor(a).detach().double().numpy() for a in (v, score))
    if len(v) < 2:
        raise ValueError("kernel_stein_discrepancy needs two rows at least.")
    return _bootstrap(_stein_matrix(v, score), num_bootstrap)


def _stein_matrix(v: np.ndarray, score: np.ndarray) -> np.ndarray:
    """u(x, y) of all pairs of rows, (n, n), and 0 of a row with itself."""
    d = v.shape[1]
    precision = 1 / (d * _variances(v))
    v = v - v.mean(0)  # only differences count, and these keep more digits
    toward = v * precision  # M x
    s_dot, s_toward = score @ score.T, score @ toward.T
    own = np.diag(s_toward)[:, None]
    # s(x)·M(x - y) and s(y)·M(y - x)
    along = (own - s_toward) + (own - s_toward).T
    power = 0.5 * math.sqrt(d)
    r = (1 + _squared_distances(v * np.sqrt(precision))) / 3
    u: np.ndarray = s_dot + 2 * power * (along + precision.sum()) / (3 * r)
    u -= 4 * power * (power + 1) * _squared_distances(toward) / (3 * r) ** 2
    u *= r**-power
    np.fill_diagonal(u, 0.0)
    return u


def _variances(v: np.ndarray) -> np.ndarray:
    """Of the columns; a constant one, which has no scale of its own, gets that of the others."""
    variance = v.var(0, ddof=1)
    moves = np.sqrt(variance) > 1e-12 * np.abs(v).max(0)  # else it is rounding
    return np.where(moves, variance, variance[moves].mean() if moves.any() else 1.0)


def _squared_distances(x: np.ndarray) -> np.ndarray:
    norms = (x**2).sum(-1)
    squared: np.ndarray = np.maximum(norms[:, None] + norms[None, :] - 2 * x @ x.T, 0.0)
    return squared


def _bootstrap(u: np.ndarray, num_bootstrap: int) -> FitTest:
    n = len(u)
    signs = 2 * torch.randint(2, (num_bootstrap, n)).double().numpy() - 1
    statistic = u.sum() / (n * (n - 1))
    replications = ((signs @ u) * signs).sum(-1) / (n * (n - 1))
    return FitTest(float(statistic), float((1 + (replications >= statistic).sum()) / (num_bootstrap + 1)))


def maximum_mean_discrepancy(
    first: Any,
    second: Any,
    *,
    num_permutations: int = 1000,
    bandwidth: float | None = None,
    noise: float | None = None,
) -> FitTest:
    r"""The squared maximum mean discrepancy between two sets of draws (Gretton et al. 2012, Lemma 6).

    Unbiased, with the kernel :math:`\exp(-\|x - y\|^2 / 2\ell^2)`; the p-value is by permutation.

    :param first: draws of the model, (n, ...).
    :param second: held-out data, (m, ...).
    :param num_permutations: how often the rows are dealt out anew; no p-value is below 1 / (num_permutations + 1).
    :param bandwidth: ℓ; None takes the median distance between all draws.
    :param noise: standard deviation of the noise that is added to ``second`` before: σ, if ``first`` are draws of a
        model that denoising score matching has learnt, whose density is that of noisy data; None for none.
    """
    x, y = (torch.as_tensor(a).double().numpy().reshape(len(a), -1) for a in (first, second))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"The draws have {x.shape[1]} and {y.shape[1]} numbers a row.")
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError("maximum_mean_discrepancy needs two rows of each at least.")
    if noise is not None:
        y = y + noise * torch.randn(y.shape, dtype=torch.float64).numpy()
    squared = _squared_distances(np.concatenate([x, y]))
    scale = np.median(squared[np.triu_indices(n + m, 1)]) if bandwidth is None else bandwidth**2
    k = np.exp(-0.5 * squared / max(scale, np.finfo(float).tiny))
    np.fill_diagonal(k, 0.0)

    def statistic(order: np.ndarray) -> Any:
        weight = np.where(np.arange(n + m) < n, 1.0, 0.0)[order]
        inside, outside = weight @ k @ weight, (1 - weight) @ k @ (1 - weight)
        return inside / (n * (n - 1)) + outside / (m * (m - 1)) - 2 * (weight @ k @ (1 - weight)) / (n * m)

    found = statistic(np.arange(n + m))
    others = np.array([statistic(torch.randperm(n + m).numpy()) for _ in range(num_permutations)])
    return FitTest(float(found), float((1 + (others >= found).sum()) / (num_permutations + 1)))
