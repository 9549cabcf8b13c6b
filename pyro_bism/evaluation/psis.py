"""Pareto k-hat: how far importance weights are to be trusted."""

import math
from typing import Any

import numpy as np

MIN_DRAWS = 25  # a fifth of the draws is the tail, and fewer than five points fix no tail
MIN_EFFECTIVE = 5  # of them


def psis_khat(log_weight: Any) -> Any:
    r"""Pareto k̂ of importance weights: the shape of a generalised Pareto law fitted to their largest values.

    The weights :math:`\tilde p(v, h) / q(h|v)` have finite moments of all orders below 1/k. Where k̂ > 0.7 the guide is
    too far from the posterior for its draws to be mended by weighting. Vehtari, Simpson, Gelman, Yao, Gabry
    2024 (JMLR 25(72)); the fit is ArviZ's own, of either version, with the sign that this version wants.

    Where ArviZ's fit can't be had, or can't be believed, the answer goes by the effective sample size
    :math:`m = (\sum w)^2 / \sum w^2` of the S draws:

    - the largest weights take fewer than five values (ties, discrete latents), or
    - k̂ < 1/2 says that they have a finite variance, though m < √S; or k̂ < 0 that they are bounded, though m < S/10.

    It is -inf if the weights are all much the same (m > 0.8 S: the guide is exact or nearly so), inf if a few draws
    outweigh all others (m < 5), and else :math:`1 - \log m / (2 \log S)`, between 1/2 and 1, where Pareto weights with
    such an m have their k. Log weights are told apart down to the square root of their precision.

    :param log_weight: log p̃(v, h) - log q(h|v): an array whose leading axis runs over the draws, or an
        ``xarray.DataArray`` with the dimensions ``chain`` and ``draw``. -inf is a weight of zero.
    :returns: k̂, of the shape left when the draws are taken away; a ``DataArray`` if it was given one.
    :raises ValueError: with fewer than 25 draws, or on NaN, on +inf, or where all weights are zero.
    """
    if hasattr(log_weight, "dims"):
        ordered = log_weight.transpose("chain", "draw", ...)
        k = psis_khat(ordered.values.reshape(-1, *ordered.shape[2:]))
        return ordered.isel(chain=0, draw=0, drop=True).copy(data=k).rename("pareto_k")
    weights = np.asarray(log_weight)
    if weights.ndim < 1 or len(weights) < MIN_DRAWS:
        raise ValueError(f"k̂ needs at least {MIN_DRAWS} draws along the leading axis; the shape is {weights.shape}.")
    if np.isnan(weights).any() or np.isposinf(weights).any():
        bad = np.argwhere(np.isnan(weights) | np.isposinf(weights))[0]
        raise ValueError(f"The log weights have NaN or +inf in them, the first at index {tuple(map(int, bad))}.")
    if np.isneginf(weights.max(0)).any():
        bad = np.argwhere(np.isneginf(weights.max(0)))[:1].ravel()
        raise ValueError(f"All log weights are -inf at index {tuple(map(int, bad))}: no draw has a density there.")
    eps = float(np.finfo(weights.dtype).eps) if weights.dtype.kind == "f" else 2.0**-52
    columns = weights.reshape(len(weights), -1).T.astype(float)
    k = np.array([math.nan if _has_tail(column, eps) else -math.inf for column in columns])
    if np.isnan(k).any():
        k[np.isnan(k)] = _arviz_khat(columns[np.isnan(k)])
    k = np.array([_believed(*pair) for pair in zip(k, columns, strict=True)])
    return k.reshape(weights.shape[1:])


def _has_tail(log_weight: np.ndarray, eps: float) -> bool:
    """Whether the largest weights take five values at least: no law can be fitted to fewer."""
    finite = np.abs(log_weight[np.isfinite(log_weight)])
    # below this, differences are rounding: they would be fitted as a tail where there is none
    quantum = max(math.sqrt(eps), 8 * eps * float(finite.max()))
    x = np.sort(np.round((log_weight - log_weight.max()) / quantum) * quantum)
    num_tail = math.ceil(min(len(x) / 5, 3 * math.sqrt(len(x))))
    # weights smaller than a rounding error of the largest are nothing
    tail = x[x > max(x[-num_tail - 1], math.log(2.0**-52))]
    return len(np.unique(tail)) >= 5


def _believed(k: float, log_weight: np.ndarray) -> float:
    """k̂, unless the effective sample size contradicts it: a k̂ never reads as good where few draws count."""
    num, weight = len(log_weight), np.exp(log_weight - log_weight.max())
    effective = float(weight.sum() ** 2 / (weight**2).sum())
    needed = max(math.sqrt(num), 0.1 * num if k < 0 else 0.0)
    if math.isfinite(k) and (k >= 0.5 or effective >= needed):
        return k
    if effective > 0.8 * num:
        return -math.inf
    return math.inf if effective < MIN_EFFECTIVE else 1 - math.log(effective) / (2 * math.log(num))


def _arviz_khat(log_weight: np.ndarray) -> np.ndarray:
    """ArviZ's k̂, draws last."""
    import arviz as az

    if hasattr(az, "psislw"):  # 0.x takes log weights
        k: np.ndarray = az.psislw(log_weight)[1]
        return k
    from arviz_stats.base import array_stats

    # 1.x takes the log likelihood of a point left out, whose weight is its inverse
    k = array_stats.psislw(-log_weight, axis=-1)[1]
    return k
