"""A verdict on a trained model in one call: its guide, its chains, its normaliser, its fit."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.handlers import seed

from . import runaways
from .bism import BiSM
from .brief import brief
from .densities import per_example, record
from .diagnostics import _read, check_noise, guide_draws, psis_khat, to_arviz
from .energies import VISIBLE, Energy, NoIntegral, OutOfReach
from .evaluation import (
    AIS,
    Estimate,
    ais,
    fisher_divergence,
    kernel_stein_discrepancy,
    log_likelihood,
    log_normalizer,
    maximum_mean_discrepancy,
)
from .evaluation.noise import noise_scale
from .kernels import Kernel
from .modes import in_own_modes
from .sampling import Chains, default_kernel, run_chains

__all__ = ["Calibration", "Diagnosis", "Verdict", "calibration", "diagnose", "loo"]

GOOD_K = 0.7  # Vehtari et al. 2024
GOOD_RHAT = 1.05
GOOD_ESS = 100
GOOD_KL = 1.0  # nats
SIGNIFICANT = 0.01


class Verdict(NamedTuple):
    """
    :ivar subject: what it is on.
    :ivar passed: None if nothing could be said.
    :ivar text: in words, with its numbers.
    """

    subject: str
    passed: bool | None
    text: str


class Guide(NamedTuple):
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


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What :func:`diagnose` found. Print it; ``plot()`` it; ``data`` is for ArviZ.

    :ivar verdicts: by subject.
    :ivar guide: None without a guide or latents.
    :ivar log_normalizer: a number, of a conditional model one a row; or what ``ais`` returned; None if there is none.
    :ivar log_likelihood: of the data points, or None.
    :ivar fisher_divergence: Hyvärinen's, up to a constant of the data; lower is better.
    :ivar data: the ArviZ tree: guide draws, chains of the model, observed data.
    :ivar guide_latents: the guide's draws, by site, (draw, point, ...).
    :ivar chain_latents: draws of p(h|v) at the same points, (chain, draw, point, ...).
    :ivar chain_visible: chains of the model's v, (chain, draw, D), or None.
    :ivar visible: the data, (n, D).
    """

    verdicts: tuple[Verdict, ...]
    guide: Guide | None
    log_normalizer: Any
    log_likelihood: Estimate | None
    fisher_divergence: Estimate | None
    data: Any
    guide_latents: Mapping[str, np.ndarray]
    chain_latents: Mapping[str, np.ndarray]
    chain_visible: np.ndarray | None
    visible: np.ndarray

    def __getitem__(self, subject: str) -> Verdict:
        return next(verdict for verdict in self.verdicts if verdict.subject == subject)

    def __repr__(self) -> str:  # in words: its arrays would be pages of numbers
        marks = {True: "ok", False: "NOT OK", None: "-"}
        width = max(len(verdict.subject) for verdict in self.verdicts)
        return "\n".join(f"{v.subject:<{width}}  {marks[v.passed]:<6}  {v.text}" for v in self.verdicts)

    def plot(self) -> Any:
        """One matplotlib figure: k̂ and KL by point, guide beside chains, chains beside data, the weights of AIS.

        It is pyplot's no more than yours: a notebook shows what is returned, once; a script saves it with ``savefig``.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 7), layout="constrained")
        axes = figure.subplots(2, 3)
        _plot_guide(axes[0], self)
        _plot_chains(axes[1], self)
        return figure


@in_own_modes
def diagnose(
    trained: Any,
    state: Any,
    *args: Any,
    rng_key: Array,
    num_draws: int = 1000,
    num_points: int = 20,
    num_chains: int = 8,
    num_samples: int = 500,
    num_warmup: int = 500,
    kernel: Kernel | None = None,
    posterior: Any = None,
    ais_options: Mapping[str, Any] | None = None,
    noise: float | str | None = "loss",
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Diagnosis:
    """Everything that fits the model: is the guide to be trusted, have the chains mixed, is log Z known, does it fit?

    - **training**: spoken of where it has run away.
    - **guide**: draws h ~ q(h|v) at some data points, k̂ at most 0.7 at 95 % of them, and chains of p(h|v), started all
      over, at which log p̃ - log q says what the guide leaves out: KL(p‖q) at most 1 nat.
    - **posterior chains** and **model chains**: R̂ (rank-normalised, split) at most 1.05 and an effective sample size
      of 100. Half of the model's chains start at data, half at noise.
    - **normaliser**: exact, or AIS whose bounds from both ends are within a nat, with 5 % of its chains effective.
    - **fit**: kernel Stein discrepancy of data and model, and the maximum mean discrepancy between the data and the
      model's chains, if these have mixed; rejected at p < 0.01, the two taken together. Denoising score matching learns
      the density of noisy data, so its noise is added to the data for this and for the Fisher divergence; guide and
      likelihood are those of the data as they are.

    :param trained: a BiSM, or a rival without a guide, whose guide is not spoken of then.
    :param state: its state.
    :param args: arguments of model and guide, the data among them; best held-out data.
    :param rng_key: a JAX random key.
    :param num_draws: guide draws of h.
    :param num_points: data points at which the guide is looked at, evenly spaced; all where model or guide have a
        fixed size.
    :param num_chains: chains of the model, and of p(h|v) half as many.
    :param num_samples: draws of every chain, after ``num_warmup``.
    :param kernel: what moves them; None takes :class:`Gibbs` where the energy has the conditionals, else
        :class:`Langevin`.
    :param posterior: chains of h given v at *all* data points given, of ``run_chains`` or of an ``MCMC`` that ran
        ``program(..., sites=[...])``, in place of chains made here.
    :param ais_options: arguments of :func:`ais`; log Z is taken from it then, even if the exact one can be had.
    :param noise: added to the data before model and data are compared: "loss" for the outer loss's σ, a standard
        deviation, or None if the data have it already; see :func:`kernel_stein_discrepancy`.
    :param coords: as for :func:`to_arviz`, and so is ``dims``; ``obs`` counts the data's rows by default.
    :raises ValueError: on misuse.
    """
    keys = jax.random.split(rng_key, 9)
    energy, _, x = trained.energy(state, *args, rng_key=keys[0], **kwargs)
    words = getattr(trained, "words", runaways.BISM)
    verdicts = _training(int(getattr(getattr(state, "info", None), "verdict", runaways.STEADY)), words)
    options: dict[str, Any] = {"num_samples": num_samples, "num_warmup": num_warmup, "progress_bar": progress_bar}
    moves = kernel or default_kernel(energy)

    rows = np.arange(energy.num_rows)
    if posterior is None and energy.resizes:
        rows = np.linspace(0, energy.num_rows - 1, min(num_points, energy.num_rows)).round().astype(int)
    some_args, some_kwargs = _arguments(energy, rows) if energy.resizes else (args, kwargs)
    if len(rows) < energy.num_rows and not _is_by_row(trained, state, keys[1], energy, rows, args, kwargs):
        rows, some_args, some_kwargs = np.arange(energy.num_rows), args, kwargs
    guide: Guide | None = None
    guide_latents: Mapping[str, np.ndarray] = {}
    chain_latents: Mapping[str, np.ndarray] = {}
    if isinstance(trained, BiSM) and energy.latents:
        run = guide_draws(trained, state, *some_args, rng_key=keys[1], num_draws=num_draws, **some_kwargs)
        guide_latents = run.latents
        if energy.resizes and len(rows) < energy.num_rows:
            sites = {**run.latents, **run.visible, **run.covariates}
            coords = {"obs_id" if "obs" in sites else "obs": list(rows), **(coords or {})}
        if posterior is None:
            posterior = run_chains(
                trained,
                state,
                *some_args,
                rng_key=keys[2],
                kernel=moves,
                num_chains=max(2, num_chains // 2),
                sites=list(energy.latents),
                init="noise",
                **options,
                **some_kwargs,
            )
        first = {name: value[0] for name, value in run.latents.items()}
        read = _read("posterior", posterior, len(rows), first, rows=True)
        chain_latents = read.values
        mixed = _mixing("posterior chains", chain_latents.values())
        guide = _guide(run, _weights_at(trained, state, some_args, some_kwargs, keys[1], chain_latents))
        verdicts += [_judge_guide(guide, mixed), mixed]

    chain_visible, model_chains = None, None
    if energy.is_homogeneous:
        halves = [
            run_chains(
                trained,
                state,
                *args,
                rng_key=key,
                kernel=moves,
                num_chains=max(2, num_chains // 2),
                init=init,
                **options,
                **kwargs,
            )
            for key, init in ((keys[3], "data"), (keys[4], "noise"))
        ]
        model_chains = _joined(*halves)
        chain_visible = np.concatenate([_visible(energy, half) for half in halves])
        log_joint = np.concatenate([np.asarray(half.log_joint) for half in halves])
        verdicts.append(_mixing("model chains", [chain_visible, log_joint]))
    else:
        verdicts.append(Verdict("model chains", None, "the rows have covariates: no chain of its own for the model"))

    log_z, verdict = _normaliser(trained, state, args, kwargs, keys[5], ais_options, progress_bar)
    verdicts.append(verdict)
    likelihood = None
    if log_z is not None:
        likelihood = log_likelihood(
            trained,
            state,
            *args,
            rng_key=keys[6],
            log_normalizer=log_z if isinstance(log_z, AIS) else None,
            num_draws=num_draws,
            **kwargs,
        )
        value = np.asarray(likelihood.value)
        error = value.std() / math.sqrt(len(value))
        verdicts.append(
            Verdict(
                "log-likelihood",
                None,
                f"{value.mean():.3f} nats a row, s.e. {error:.3f} over rows and "
                f"{float(np.mean(likelihood.standard_error)):.3f} of the estimate ({likelihood.method})",
            )
        )
    verdicts.append(
        _fit(trained, state, energy, args, kwargs, keys[7], noise, chain_visible, verdicts, np.asarray(x[VISIBLE]))
    )
    try:
        fisher = fisher_divergence(
            trained,
            state,
            *some_args,
            rng_key=keys[8],
            num_draws=min(num_draws, 100),
            num_projections=10,
            noise=noise,
            **some_kwargs,
        )
        text = f"{float(fisher.value):.4g}, s.e. {float(fisher.standard_error):.2g} ({fisher.method}; lower is better)"
        verdicts.append(Verdict("Fisher divergence", None, text + ", up to a constant of the data"))
    except ValueError as error:
        fisher = None
        verdicts.append(Verdict("Fisher divergence", None, str(error)))
    data = None
    if guide is not None:
        data = to_arviz(
            trained,
            state,
            *some_args,
            rng_key=keys[1],
            num_draws=num_draws,
            model_samples=model_chains,
            coords=coords,
            dims=dims,
            **some_kwargs,
        )
    return Diagnosis(
        tuple(verdicts),
        guide,
        log_z,
        likelihood,
        fisher,
        data,
        guide_latents,
        chain_latents,
        chain_visible,
        np.asarray(x[VISIBLE]),
    )


def _training(code: int, words: runaways.Words = runaways.BISM) -> list[Verdict]:
    """Of a run that ran away guide, chains and normaliser may all be right, and the model is not."""
    return [] if code == runaways.STEADY else [Verdict("training", False, runaways.in_words(code, words))]


def _arguments(energy: Energy, rows: np.ndarray) -> tuple[tuple, dict]:
    """The arguments with some of the data's rows."""
    leaves = [
        leaf[rows] if hasattr(leaf, "shape") and leaf.shape[:1] == (energy.num_rows,) else leaf
        for leaf in energy.batch.leaves
    ]
    return jax.tree.unflatten(energy.batch.spec, leaves)


def _joined(first: Chains, second: Chains) -> Chains:
    """Both, one after the other, as :func:`to_arviz` reads them."""

    def both(a, b):
        return jnp.concatenate([a, b])

    values = {name: both(value, second.values[name]) for name, value in first.values.items()}
    log_joint, acceptance = both(first.log_joint, second.log_joint), both(first.acceptance, second.acceptance)
    return replace(first, values=values, log_joint=log_joint, acceptance=acceptance)


def _visible(energy: Energy, chains: Any) -> np.ndarray:
    """v of chains, (chain, draw, D)."""
    parts = [np.asarray(chains.values[site.name]) for site in energy.sites]
    return np.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], -1)


def _is_by_row(
    trained: Any, state: Any, rng_key: Array, energy: Energy, rows: np.ndarray, args: tuple, kwargs: dict
) -> bool:
    """Whether the guide has the same density at some rows as at all: one with parameters a datapoint has not."""
    if not (isinstance(trained, BiSM) and energy.latents):
        return True

    def log_q(args: Any, kwargs: Any, values: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        leaves, spec = trained._checked(args, kwargs)
        pair = trained.pair(leaves, spec)
        params = pair.params(*trained._unpack(pair, state), state.mutable_state)
        batch = pair.batch(rng_key, leaves, spec)
        if not values:
            drawn, _ = pair.hard_draw(rng_key, params, batch, batch.v)
            values = {name: x for name, x in drawn.items() if name not in batch.indices}
        sites = pair.guide_at(rng_key, params, batch, batch.v, values, harden=True)
        total: Any = sum(per_example(site, len(batch.v)) for site in sites.values())
        return total, dict(values)

    whole, values = log_q(args, kwargs, {})
    if any(x.shape[:1] != whole.shape for x in values.values()):
        return False
    try:
        part, _ = log_q(*_arguments(energy, rows), {name: x[rows] for name, x in values.items()})
    except Exception:  # whatever such a guide trips over at another size
        return False
    return bool(jnp.allclose(part, whole[rows], rtol=1e-3, atol=1e-3))


def _weights_at(
    bism: BiSM, state: Any, args: Any, kwargs: Any, rng_key: Array, latents: Mapping[str, np.ndarray]
) -> np.ndarray:
    """log p̃(v, h) - log q(h|v) at given h, (chain, draw, n, ...), of shape (chain, draw, n)."""
    leaves, spec = bism._checked(args, kwargs)
    pair = bism.evaluated_pair(leaves, spec)
    params = pair.params(*bism._unpack(pair, state), state.mutable_state)
    key_batch, key_guide = jax.random.split(rng_key)
    batch = pair.batch(key_batch, leaves, spec)
    args, kwargs = batch.arguments(batch.v)
    n = len(batch.v)

    def one(values):
        with seed(rng_seed=key_guide), record(params, {**batch.indices, **values}, harden=True) as p:
            pair.model(*args, **kwargs)
        log_p: Any = sum(per_example(site, n) for site in p.sites.values())
        return log_p - pair.log_guide(key_guide, params, batch, values)

    first = next(iter(latents.values()))
    flat = {name: jnp.asarray(x).reshape(-1, *x.shape[2:]) for name, x in latents.items()}
    return np.asarray(jax.jit(lambda flat: jax.lax.map(one, flat))(flat)).reshape(*first.shape[:2], n)


def _guide(run: Any, at_chains: np.ndarray) -> Guide:
    w = np.asarray(run.log_p - run.log_q, float)
    relative = np.exp(w - w.max(0))
    bound = w.max(0) + np.log(relative.mean(0))
    share = relative.sum(0) ** 2 / (relative**2).sum(0) / len(w)
    # E_p[log p̃ - log q] = log p̃(v) + KL(p‖q)
    kl = at_chains.astype(float).mean((0, 1)) - bound
    return Guide(psis_khat(run.log_p - run.log_q), share, bound - w.mean(0), kl)


def _judge_guide(guide: Guide, mixed: Verdict) -> Verdict:
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


def _mixing(subject: str, values: Any) -> Verdict:
    """R̂ and effective sample size of arrays (chain, draw, ...)."""
    rhat, ess = 1.0, math.inf
    num = 0
    for value in values:
        flat = np.asarray(value, float).reshape(*value.shape[:2], -1)
        # a unit that never moves has no R̂; if all chains agree on it there is nothing to mix
        moves = flat.std((0, 1)) > 0
        num += flat.shape[-1]
        if moves.any():
            r, e = _rhat_and_ess(flat[..., moves])
            rhat, ess = max(rhat, r.max()), min(ess, e.min())
    numbers = f"largest R-hat {rhat:.3f}, smallest effective sample size {ess:.0f}, over {num} numbers"
    if not rhat <= GOOD_RHAT or not ess >= GOOD_ESS:
        return Verdict(subject, False, f"not mixed: {numbers}; try more num_samples and num_warmup, or another kernel")
    return Verdict(subject, True, "mixed: " + numbers)


def _rhat_and_ess(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R̂ and effective sample size by unit, of (chain, draw, unit); 1 and inf where ArviZ knows none."""
    import arviz as az
    import xarray as xr

    dataset = xr.Dataset({"x": (("chain", "draw", "unit"), flat)})
    with np.errstate(divide="ignore", invalid="ignore"):  # a rare bit that no chain or only one has seen
        rhat, ess = az.rhat(dataset)["x"].values, az.ess(dataset)["x"].values
    return np.where(np.isnan(rhat), 1.0, rhat), np.where(np.isnan(ess), math.inf, ess)


def _normaliser(
    trained: Any, state: Any, args: Any, kwargs: Any, rng_key: Array, options: Any, progress_bar: bool
) -> tuple[Any, Verdict]:
    exact = None
    try:
        exact = log_normalizer(trained, state, *args, rng_key=rng_key, **kwargs)
        if options is None:
            return exact.value, Verdict("normaliser", True, f"log Z = {_over_rows(exact.value, '.4f')}, {exact.method}")
    except NoIntegral as error:
        return None, Verdict("normaliser", False, str(error))
    except OutOfReach:
        pass
    with warnings.catch_warnings():  # the verdict says it
        warnings.filterwarnings("ignore", "ais: log Z")
        run = ais(trained, state, *args, rng_key=rng_key, **{"progress_bar": progress_bar, **(options or {})}, **kwargs)
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


def _fit(
    trained: Any,
    state: Any,
    energy: Energy,
    args: Any,
    kwargs: Any,
    rng_key: Array,
    noise: float | str | None,
    chain_visible: np.ndarray | None,
    verdicts: Sequence[Verdict],
    v: np.ndarray,
) -> Verdict:
    key_stein, key_mmd = jax.random.split(rng_key)
    if energy.num_rows < 2:
        return Verdict("fit", None, "one row is no sample")
    sigma = noise_scale(trained, noise)
    some, named = args, kwargs
    if energy.resizes and energy.num_rows > 1000:  # the test takes all pairs of rows
        some, named = _arguments(energy, np.linspace(0, energy.num_rows - 1, 1000).astype(int))
    try:
        stein = kernel_stein_discrepancy(trained, state, *some, rng_key=key_stein, noise=noise, **named)
    except ValueError as error:
        return Verdict("fit", None, str(error))
    text = f"kernel Stein discrepancy {stein.statistic:.3g}, p = {stein.p_value:.3f}"
    p_values = [stein.p_value]
    if chain_visible is not None and next(v for v in verdicts if v.subject == "model chains").passed:
        # thinned to as many as there are data, or are effective: the test takes independent draws
        draws = chain_visible.reshape(-1, chain_visible.shape[-1])
        effective = _rhat_and_ess(chain_visible)[1].min()
        step = math.ceil(len(draws) / max(2, min(len(v), 1000, effective)))
        mmd = maximum_mean_discrepancy(draws[::step], v[:1000], rng_key=key_mmd, num_permutations=500, noise=sigma)
        text += f"; maximum mean discrepancy of chains and data {mmd.statistic:.3g}, p = {mmd.p_value:.3f}"
        p_values.append(mmd.p_value)
    if sigma:
        text += f"; noise of standard deviation {sigma:g} added to the data"
    if min(p_values) < SIGNIFICANT / len(p_values):  # Bonferroni
        return Verdict("fit", False, "rejected: " + text)
    return Verdict("fit", True, "not rejected: " + text)


def _plot_guide(axes: Any, found: Diagnosis) -> None:
    if found.guide is None:
        for ax in axes:
            ax.set_axis_off()
        axes[0].text(0.5, 0.5, "no guide", ha="center")
        return
    n = len(found.guide.pareto_k)
    k = np.clip(found.guide.pareto_k, -1.0, 2.0)  # ±inf stand for no tail and for one draw that outweighs all
    axes[0].plot(range(n), k, "o", label="k̂")
    axes[0].plot(range(n), np.clip(found.guide.kl, -1.0, 2.0), "x", label="KL(p‖q), nats")
    axes[0].axhline(GOOD_K, ls="--", c="tab:blue", lw=1)
    axes[0].axhline(GOOD_KL, ls="--", c="tab:orange", lw=1)
    axes[0].set(xlabel="data point", title="guide: below the lines is good", ylim=(-1.1, 2.1))
    axes[0].legend()
    for name, draws in found.guide_latents.items():
        chains = np.asarray(found.chain_latents[name], float)
        q, p = np.asarray(draws, float).mean(0).ravel(), chains.mean((0, 1)).ravel()
        axes[1].plot(p, q, ".", alpha=0.6, label=name)
    low, high = min(axes[1].get_xlim()[0], axes[1].get_ylim()[0]), max(axes[1].get_xlim()[1], axes[1].get_ylim()[1])
    axes[1].plot([low, high], [low, high], c="k", lw=0.7)
    axes[1].set(xlabel="mean of p(h|v), chains", ylabel="mean of q(h|v), guide", title="latents, all points")
    axes[1].legend()
    name = next(iter(found.guide_latents))
    q = np.asarray(found.guide_latents[name], float)
    p = np.asarray(found.chain_latents[name], float)
    q, p = q.reshape(*q.shape[:2], -1)[:, 0], p.reshape(-1, *p.shape[2:3], max(1, math.prod(p.shape[3:])))[:, 0]
    units = range(min(8, q.shape[-1]))
    for offset, draws, colour, label in ((-0.15, q, "tab:blue", "guide"), (0.15, p, "tab:orange", "chains")):
        mean, spread = draws[:, units].mean(0), draws[:, units].std(0)
        axes[2].errorbar([u + offset for u in units], mean, spread, fmt="o", c=colour, label=label, capsize=3)
    axes[2].set(xlabel=f"unit of {name}", title="first data point: mean, deviation")
    axes[2].legend()


def _plot_chains(axes: Any, found: Diagnosis) -> None:
    v = found.visible
    if found.chain_visible is None:
        axes[0].text(0.5, 0.5, "no chains of the model", ha="center")
    elif v.shape[1] == 2:
        draws = found.chain_visible.reshape(-1, 2)
        axes[0].plot(*draws[:: max(1, len(draws) // 2000)].T, ".", ms=2, c="tab:orange", label="chains")
        axes[0].plot(*v[:2000].T, ".", ms=2, c="tab:blue", label="data")
        axes[0].set(title="draws of the model, and the data")
        axes[0].legend()
    else:
        draws = found.chain_visible.reshape(-1, v.shape[1])
        axes[0].plot(v.mean(0), draws.mean(0), ".", label="mean")
        axes[0].plot(v.std(0), draws.std(0), "x", label="standard deviation")
        low, high = axes[0].get_xlim()
        axes[0].plot([low, high], [low, high], c="k", lw=0.7)
        axes[0].set(xlabel="data", ylabel="chains", title="visible units")
        axes[0].legend()
    if found.chain_visible is not None:
        worst = int(_rhat_and_ess(found.chain_visible)[0].argmax())
        for chain in found.chain_visible:
            axes[1].plot(chain[:, worst], lw=0.6)
        title = "chains: half from data, half from noise"
        axes[1].set(xlabel="draw", ylabel=f"visible unit {worst}, of the largest R-hat", title=title)
    if isinstance(found.log_normalizer, AIS):
        run = found.log_normalizer
        axes[2].hist(np.ravel(run.log_weights), bins=30, alpha=0.6, label="forward")
        if run.reverse_log_weights is not None:
            axes[2].hist(np.ravel(run.reverse_log_weights), bins=30, alpha=0.6, label="reverse")
        axes[2].axvline(np.mean(run.log_normalizer), c="k", lw=1)
        axes[2].set(xlabel="log weight", title="AIS: the bounds on log Z")
        axes[2].legend()
    else:
        axes[2].text(0.02, 0.5, "\n".join(f"{v.subject}: {v.passed}" for v in found.verdicts), fontsize=9)
        axes[2].set_axis_off()


class Calibration(NamedTuple):
    """
    :ivar pit: by site, the ranks of the model's own h among the guide's draws, in (0, 1): (points, units).
    :ivar p_values: by site, the smallest of Kolmogorov and Smirnov's tests that a unit's ranks are uniform, times the
        number of units.
    """

    pit: dict[str, np.ndarray]
    p_values: dict[str, float]

    def __repr__(self) -> str:
        return brief(self)


@in_own_modes
def calibration(
    trained: BiSM,
    state: Any,
    *args: Any,
    rng_key: Array,
    num_points: int = 200,
    num_draws: int = 99,
    num_warmup: int = 500,
    kernel: Kernel | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Calibration:
    """Simulation-based calibration of the guide (Talts et al. 2018, arXiv:1804.06788).

    (v, h) is drawn from the model itself, by chains; if the guide is the posterior, the rank of h among draws of
    q(h|v) is uniform. Ties of discrete latents are broken at random.

    :param num_points: independent chains, each giving one (v, h).
    :param num_draws: draws of the guide at each.
    :raises ValueError: for a model with covariates, or of a fixed number of rows that is not ``num_points``.
    """
    key_energy, key_chains, key_guide, key_ties = jax.random.split(rng_key, 4)
    energy, _, _ = trained.energy(state, *args, rng_key=key_energy, **kwargs)
    if not energy.is_homogeneous:
        raise ValueError(
            "calibration draws data from the model, which has covariates: there is no one density to draw from."
        )
    if not energy.resizes and num_points != energy.num_rows:
        raise ValueError(f"calibration: the model runs on {energy.num_rows} rows only: num_points={energy.num_rows}.")
    chains = run_chains(
        trained,
        state,
        *args,
        rng_key=key_chains,
        kernel=kernel or default_kernel(energy),
        num_chains=num_points,
        num_samples=1,
        num_warmup=num_warmup,
        progress_bar=progress_bar,
        **kwargs,
    )
    batch = energy._resized(num_points) if energy.resizes else energy.batch
    new_args, new_kwargs = batch.arguments(chains.point[VISIBLE])
    run = guide_draws(trained, state, *new_args, rng_key=key_guide, num_draws=num_draws, **new_kwargs)
    pit: dict[str, np.ndarray] = {}
    p_values: dict[str, float] = {}
    for name, draws in run.latents.items():
        q = np.asarray(draws, float).reshape(num_draws, num_points, -1)
        h = np.asarray(chains.values[name], float).reshape(num_points, -1)
        ties = np.asarray(jax.random.uniform(jax.random.fold_in(key_ties, len(pit)), h.shape))
        rank = (q < h).sum(0) + ties * ((q == h).sum(0) + 1)
        pit[name] = rank / (num_draws + 1)
        p_values[name] = min(1.0, min(_kolmogorov(unit) for unit in pit[name].T) * h.shape[1])
    return Calibration(pit, p_values)


def _kolmogorov(u: np.ndarray) -> float:
    """p-value that u is uniform on (0, 1): Kolmogorov's limit with Stephens' correction."""
    n = len(u)
    u = np.sort(u)
    distance = max((np.arange(1, n + 1) / n - u).max(), (u - np.arange(n) / n).max())
    scaled = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    k = np.arange(1, 101)
    return float(np.clip(2 * ((-1.0) ** (k - 1) * np.exp(-2 * k**2 * scaled**2)).sum(), 0.0, 1.0))


@in_own_modes
def loo(estimate: Estimate) -> Any:
    """Leave-one-out cross-validation of log p(v | θ) over draws of θ, by ArviZ, where the normaliser allows it.

    Noise of 1 nat in log Z moves the result by tens of nats without an alarm, so a standard error above 0.1 is refused.

    :param estimate: ``value`` of shape (chain, draw, n), and its standard error: ``log_likelihood`` of a PersistentVI.
    :returns: ArviZ's ``ELPDData``.
    :raises ValueError: if θ has no draws, or the error is too large: it says so.
    """
    value = np.asarray(estimate.value, float)
    if value.ndim != 3:
        raise ValueError(
            "LOO takes draws of θ, log p(v | θ) of shape (chain, draw, n): this θ is one point. Use the log_likelihood "
            "of held-out data."
        )
    check_noise(estimate.standard_error)
    import arviz as az
    import xarray as xr

    dims = ("chain", "draw", "obs")
    tree = xr.DataTree.from_dict(
        {
            "posterior": xr.Dataset({"theta": (dims[:2], value.mean(-1))}),
            "log_likelihood": xr.Dataset({"v": (dims, value)}),
        }
    )
    return az.loo(az.from_datatree(tree) if hasattr(az, "from_datatree") else tree)
