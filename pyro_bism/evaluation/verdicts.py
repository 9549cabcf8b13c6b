"""What is good and what is not: a sentence on each part of a trained model."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..brief import brief
from ..energies import Energy, NoIntegral, OutOfReach
from ..programs.hosts import pytree
from ..programs.visible import Arguments
from ..training import runaways
from . import (
    ais,
    kernel_stein_discrepancy,
    log_normalizer,
    maximum_mean_discrepancy,
)
from .noise import noise_scale
from .psis import psis_khat

GOOD_K = 0.7  # Vehtari et al. 2024
GOOD_RHAT = 1.05
GOOD_ESS = 100
GOOD_KL = 1.0  # nats
SIGNIFICANT = 0.01


class Verdict(NamedTuple):
    """What is said of one part of a trained model.

    :ivar subject: the part: "guide", "normaliser", "fit", ...
    :ivar passed: whether it is good; None where that can't be told, or is not asked.
    :ivar text: the verdict in words, with its numbers.
    """

    subject: str
    passed: bool | None
    text: str


class GuideQuality(NamedTuple):
    """The guide at some data points, each array of shape (points,).

    :ivar pareto_k: k̂ of the importance weights.
    :ivar effective_sample_size: of them, as a share of the draws.
    :ivar gap: importance-weighted bound minus ELBO, in nats: KL(q‖p), if the bound is tight.
    :ivar kl: KL(p‖q) in nats from chains of p(h|v): large where the guide leaves out a part of the posterior. NaN where
        the guide computes h from other draws and those can't be found from h.
    """

    pareto_k: np.ndarray
    effective_sample_size: np.ndarray
    gap: np.ndarray
    kl: np.ndarray

    def __repr__(self) -> str:
        return brief(self)


def judge_training(code: int, words: runaways.Words = runaways.BISM) -> list[Verdict]:
    """Of a run that ran away guide, chains and normaliser may all be right, and the model is not."""
    return [] if code == runaways.STEADY else [Verdict("training", False, runaways.in_words(code, words))]


def arguments_of(energy: Energy, rows: np.ndarray) -> Arguments:
    """The arguments with some of the data's rows."""
    leaves = [
        leaf[rows] if hasattr(leaf, "shape") and leaf.shape[:1] == (energy.num_rows,) else leaf
        for leaf in energy.batch.leaves
    ]
    found: Arguments = pytree.tree_unflatten(leaves, energy.batch.spec)
    return found


def guide_quality(run: Any, at_chains: np.ndarray) -> GuideQuality:
    w = (run.log_p - run.log_q).double().numpy()
    relative = np.exp(w - w.max(0))
    bound = w.max(0) + np.log(relative.mean(0))
    share = relative.sum(0) ** 2 / (relative**2).sum(0) / len(w)
    # E_p[log p̃ - log q] = log p̃(v) + KL(p‖q)
    kl = at_chains.astype(float).mean((0, 1)) - bound
    return GuideQuality(psis_khat((run.log_p - run.log_q).numpy()), share, bound - w.mean(0), kl)


def judge_guide(guide: GuideQuality, mixed: Verdict) -> Verdict:
    n = len(guide.pareto_k)
    bad = int((guide.pareto_k > GOOD_K).sum())
    left_out = int((guide.kl > GOOD_KL).sum())
    known = guide.kl[~np.isnan(guide.kl)]
    kl = (
        f"KL(p|q) above {GOOD_KL:g} nat at {left_out} (median {np.median(known):.2f})"
        if len(known)
        else ("KL(p|q) not known, as the guide computes its latents from other draws")
    )
    numbers = (
        f"k-hat above {GOOD_K} at {bad} of {n} points (worst {guide.pareto_k.max():.2f}), {kl}, "
        f"{np.median(guide.effective_sample_size):.0%} of the draws effective, "
        f"ELBO {np.median(guide.gap):.2f} nats below the importance-weighted bound"
    )
    reasons = []
    if bad > 0.05 * n:
        reasons.append("its draws can't be mended by weighting")
    if left_out > 0.05 * n:
        reasons.append("it leaves out a part of the posterior")
    if reasons:
        return Verdict("guide", False, f"not trusted: {' and '.join(reasons)}; {numbers}")
    if mixed.passed is False:
        return Verdict("guide", None, "can't be told, as the posterior's chains have not mixed; " + numbers)
    return Verdict("guide", True, "trusted: " + numbers)


def judge_mixing(subject: str, values: Any) -> Verdict:
    """R̂ and effective sample size of arrays (chain, draw, ...)."""
    rhat, ess = 1.0, math.inf
    num = 0
    for value in values:
        flat = np.asarray(value, float).reshape(*value.shape[:2], -1)
        # a unit that never moves has no R̂; if all chains agree on it there is nothing to mix
        moves = flat.std((0, 1)) > 0
        num += flat.shape[-1]
        if moves.any():
            r, e = rhat_and_ess(flat[..., moves])
            rhat, ess = max(rhat, r.max()), min(ess, e.min())
    numbers = f"largest R-hat {rhat:.3f}, smallest effective sample size {ess:.0f}, over {num} numbers"
    if not rhat <= GOOD_RHAT or not ess >= GOOD_ESS:
        return Verdict(subject, False, f"not mixed: {numbers}; try more num_samples and num_warmup, or another kernel")
    return Verdict(subject, True, "mixed: " + numbers)


def rhat_and_ess(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R̂ and effective sample size by unit, of (chain, draw, unit); 1 and inf where ArviZ knows none."""
    import arviz as az
    import xarray as xr

    dataset = xr.Dataset({"x": (("chain", "draw", "unit"), flat)})
    with np.errstate(divide="ignore", invalid="ignore"):  # a rare bit that no chain or only one has seen
        rhat, ess = az.rhat(dataset)["x"].values, az.ess(dataset)["x"].values
    return np.where(np.isnan(rhat), 1.0, rhat), np.where(np.isnan(ess), math.inf, ess)


def judge_normaliser(trained: Any, args: Any, kwargs: Any, options: Any, progress_bar: bool) -> tuple[Any, Verdict]:
    exact = None
    try:
        exact = log_normalizer(trained, *args, **kwargs)
        if options is None:
            return exact.value, Verdict("normaliser", True, f"log Z = {_over_rows(exact.value, '.4f')}, {exact.method}")
    except NoIntegral as error:
        return None, Verdict("normaliser", False, str(error))
    except OutOfReach:
        pass
    with warnings.catch_warnings():  # the verdict says it
        warnings.filterwarnings("ignore", "ais: log Z")
        run = ais(trained, *args, **{"progress_bar": progress_bar, **(options or {})}, **kwargs)
    num = len(run.log_weights)
    numbers = (
        f"log Z = {_over_rows(run.log_normalizer)}, s.e. {_over_rows(run.standard_error)}, AIS between "
        f"{_over_rows(run.lower)} and {_over_rows(run.upper)}, {_over_rows(run.effective_sample_size, '.0f')} of {num} "
        "chains effective"
    )
    if exact is not None:
        numbers += f"; {'exactly' if exact.method == 'exact' else 'by quadrature'} {_over_rows(exact.value)}"
    if run.doubt is not None:
        more = "; try ais_options with more num_temperatures, or a base nearer to the model"
        return run, Verdict("normaliser", False, f"the AIS run is too short: {numbers}{more}")
    return run, Verdict("normaliser", True, numbers)


def _over_rows(number: Any, form: str = ".3f") -> str:
    """One number, or the smallest and the largest of a conditional model's rows."""
    if np.ndim(number) == 0:
        return format(float(number), form)
    return f"{np.min(number):{form}} to {np.max(number):{form}} (over rows)"


def judge_fit(
    trained: Any,
    energy: Energy,
    args: Any,
    kwargs: Any,
    noise: float | str | None,
    chain_visible: np.ndarray | None,
    verdicts: Sequence[Verdict],
    v: np.ndarray,
) -> Verdict:
    if energy.num_rows < 2:
        return Verdict("fit", None, "one row is no sample")
    sigma = noise_scale(trained, noise)
    some, named = args, kwargs
    if energy.resizes and energy.num_rows > 1000:  # the test takes all pairs of rows
        some, named = arguments_of(energy, np.linspace(0, energy.num_rows - 1, 1000).astype(int))
    try:
        stein = kernel_stein_discrepancy(trained, *some, noise=noise, **named)
    except ValueError as error:
        return Verdict("fit", None, str(error))
    text = f"kernel Stein discrepancy {stein.statistic:.3g}, p = {stein.p_value:.3f}"
    p_values = [stein.p_value]
    if chain_visible is not None and next(v for v in verdicts if v.subject == "model chains").passed:
        # thinned to as many as there are data, or are effective: the test takes independent draws
        draws = chain_visible.reshape(-1, chain_visible.shape[-1])
        effective = rhat_and_ess(chain_visible)[1].min()
        step = math.ceil(len(draws) / max(2, min(len(v), 1000, effective)))
        mmd = maximum_mean_discrepancy(draws[::step], v[:1000], num_permutations=500, noise=sigma)
        text += f"; maximum mean discrepancy of chains and data {mmd.statistic:.3g}, p = {mmd.p_value:.3f}"
        p_values.append(mmd.p_value)
    if sigma:
        text += f"; noise of standard deviation {sigma:g} added to the data"
    if min(p_values) < SIGNIFICANT / len(p_values):  # Bonferroni
        return Verdict("fit", False, "rejected: " + text)
    return Verdict("fit", True, "not rejected: " + text)
