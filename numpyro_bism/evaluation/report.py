"""A verdict on a trained model in one call: its guide, its chains, its normaliser, its fit."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.handlers import seed

from ..bism import BiSM
from ..energies import VISIBLE, Energy
from ..programs.modes import in_own_modes
from ..programs.records import per_example, record
from ..sampling.chains import Chains, default_kernel, run_chains
from ..sampling.kernels import Kernel
from ..training import runaways
from . import (
    AIS,
    Estimate,
    fisher_divergence,
    log_likelihood,
)
from .arviz import read_samples, to_arviz
from .guide_draws import guide_draws
from .verdicts import (
    GOOD_K,
    GOOD_KL,
    GuideQuality,
    Verdict,
    arguments_of,
    guide_quality,
    judge_fit,
    judge_guide,
    judge_mixing,
    judge_normaliser,
    judge_training,
    rhat_and_ess,
)


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
    guide: GuideQuality | None
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
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Diagnosis:
    """Verdicts on all of a trained model: on its guide, its chains, its normaliser and its fit.

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
    :param rng_key: a JAX random key: all that is drawn follows from it.
    :param num_draws: guide draws of h.
    :param num_points: data points at which the guide is looked at, evenly spaced; all where model or guide have a
        fixed size.
    :param num_chains: chains of the model, and of p(h|v) half as many.
    :param num_samples: draws of every chain, after ``num_warmup``.
    :param kernel: what moves them; None takes :class:`Gibbs` where the energy has the conditionals, else
        :class:`Langevin`.
    :param posterior: chains of h given v at *all* data points given, of ``run_chains`` or of an ``MCMC`` that ran
        ``as_model(..., sites=[...])``, in place of chains made here.
    :param ais_options: arguments of :func:`ais`; log Z is taken from it then, even if the exact one can be had.
    :param noise: added to the data before model and data are compared: "loss" for the outer loss's σ, a standard
        deviation, or None if the data have it already; see :func:`kernel_stein_discrepancy`.
    :param coords: as for :func:`to_arviz`, and so is ``dims``; ``obs`` counts the data's rows by default.
    :param progress_bar: whether to show how far chains and AIS have come.
    :param kwargs: keyword arguments of model and guide.
    :raises ValueError: on misuse.
    """
    keys = jax.random.split(rng_key, 9)
    energy, _, x = trained.energy(state, *args, rng_key=keys[0], **kwargs)
    words = getattr(trained, "words", runaways.BISM)
    verdicts = judge_training(int(getattr(getattr(state, "info", None), "verdict", runaways.STEADY)), words)
    options: dict[str, Any] = {"num_samples": num_samples, "num_warmup": num_warmup, "progress_bar": progress_bar}
    moves = kernel or default_kernel(energy)

    rows = np.arange(energy.num_rows)
    if posterior is None and energy.resizes:
        rows = np.linspace(0, energy.num_rows - 1, min(num_points, energy.num_rows)).round().astype(int)
    some_args, some_kwargs = arguments_of(energy, rows) if energy.resizes else (args, kwargs)
    if len(rows) < energy.num_rows and not _is_by_row(trained, state, keys[1], energy, rows, args, kwargs):
        rows, some_args, some_kwargs = np.arange(energy.num_rows), args, kwargs
    guide: GuideQuality | None = None
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
        read = read_samples("posterior", posterior, len(rows), first, rows=True)
        chain_latents = read.values
        mixed = judge_mixing("posterior chains", chain_latents.values())
        guide = guide_quality(run, _weights_at(trained, state, some_args, some_kwargs, keys[1], chain_latents))
        verdicts += [judge_guide(guide, mixed), mixed]

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
        verdicts.append(judge_mixing("model chains", [chain_visible, log_joint]))
    else:
        verdicts.append(Verdict("model chains", None, "the rows have covariates: no chain of its own for the model"))

    log_z, verdict = judge_normaliser(trained, state, args, kwargs, keys[5], ais_options, progress_bar)
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
        judge_fit(trained, state, energy, args, kwargs, keys[7], noise, chain_visible, verdicts, np.asarray(x[VISIBLE]))
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


def _joined(first: Chains, second: Chains) -> Chains:
    """Both, one after the other, as :func:`to_arviz` reads them."""

    def both(a: Array, b: Array) -> Array:
        return jnp.concatenate([a, b])

    values = {name: both(value, second.values[name]) for name, value in first.values.items()}
    log_joint, acceptance = both(first.log_joint, second.log_joint), both(first.acceptance, second.acceptance)
    return replace(first, values=values, log_joint=log_joint, acceptance=acceptance)


def _visible(energy: Energy, chains: Any) -> np.ndarray:
    """v of chains, (chain, draw, D)."""
    parts = [np.asarray(chains.values[site.name]) for site in energy.sites]
    return np.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], -1)


def _is_by_row(
    trained: Any, state: Any, rng_key: Array, energy: Energy, rows: np.ndarray, args: Any, kwargs: Any
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
            drawn, _ = pair.draw_discrete(rng_key, params, batch, batch.v)
            values = {name: x for name, x in drawn.items() if name not in batch.indices}
        sites = pair.guide_at(rng_key, params, batch, batch.v, values, discretize=True)
        total: Any = sum(per_example(site, len(batch.v)) for site in sites.values())
        return total, dict(values)

    whole, values = log_q(args, kwargs, {})
    if any(x.shape[:1] != whole.shape for x in values.values()):
        return False
    try:
        part, _ = log_q(*arguments_of(energy, rows), {name: x[rows] for name, x in values.items()})
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

    def one(values: Mapping[str, Array]) -> Array:
        with seed(rng_seed=key_guide), record(params, {**batch.indices, **values}, discretize=True) as p:
            pair.model(*args, **kwargs)
        log_p = cast(Array, sum(per_example(site, n) for site in p.sites.values()))
        return log_p - pair.log_guide(key_guide, params, batch, values)

    first = next(iter(latents.values()))
    flat = {name: jnp.asarray(x).reshape(-1, *x.shape[2:]) for name, x in latents.items()}
    return np.asarray(jax.jit(lambda flat: jax.lax.map(one, flat))(flat)).reshape(*first.shape[:2], n)


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
        worst = int(rhat_and_ess(found.chain_visible)[0].argmax())
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
