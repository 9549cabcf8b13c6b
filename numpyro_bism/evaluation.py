r"""What was learnt: the normaliser, likelihoods, and measures of fit that need no normaliser."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import Array

from . import losses
from .bism import BiSM
from .diagnostics import guide_draws
from .energies import VISIBLE, Density, Energy, Integral, Point, random_labels
from .jit import compiled
from .kernels import Gibbs, Kernel, Langevin, called, draw_affine
from .rivals import PersistentVI
from .rivals.persistent_vi import given

__all__ = [
    "AIS",
    "Estimate",
    "FitTest",
    "ais",
    "exact_log_normalizer",
    "fisher_divergence",
    "free_energy",
    "kernel_stein_discrepancy",
    "log_likelihood",
    "maximum_mean_discrepancy",
]

NUM_TUNING = 3  # steps at every β of the run that finds a kernel's settings


class Estimate(NamedTuple):
    """
    :ivar value: one number, or one for every row.
    :ivar standard_error: of the same shape; 0 where the value is exact.
    :ivar method: how it was found.
    """

    value: Array
    standard_error: Array
    method: str


class FitTest(NamedTuple):
    """
    :ivar statistic: an unbiased estimate of the squared discrepancy; it may be negative.
    :ivar p_value: of the hypothesis that it is 0.
    """

    statistic: float
    p_value: float


class AIS(NamedTuple):
    """
    :ivar log_normalizer: log of the mean forward weight: the estimate of log Z.
    :ivar standard_error: of it, by the delta method.
    :ivar effective_sample_size: of the forward weights, (Σw)² / Σw².
    :ivar lower: mean forward log weight: log Z or less, but for its own ``lower_error``.
    :ivar upper: mean reverse log weight: log Z or more, but for its own ``upper_error`` and for how well the forward
        run's end stands for draws of p̃. NaN without a reverse run.
    :ivar log_weights: forward, one a chain.
    :ivar reverse_log_weights: log f(v) ratios collected from p̃ back to the base.
    """

    log_normalizer: float
    standard_error: float
    effective_sample_size: float
    lower: float
    lower_error: float
    upper: float
    upper_error: float
    log_weights: Array
    reverse_log_weights: Array | None


def free_energy(trained: Any, state: Any, *args: Any, rng_key: Array | None = None, **kwargs: Any) -> Array:
    r"""The free energy :math:`F(v) = -\log \sum_h \int e^{-E(v, h)}\, dh` of every row, shape (n,).

    Exact: see :mod:`numpyro_bism.energies.integrals` for what can be summed.

    :param trained: a BiSM or a rival.
    :param state: its state.
    :param args: arguments of the model, the data among them.
    :param rng_key: for a subsampling plate's rows; a fixed one if it is None.
    :raises ValueError: where no exact sum is within reach; it says what it would take.
    """
    energy, params, x = _energy(trained, state, args, kwargs, rng_key)
    density = energy.density(params, x)
    integral = Integral.of(density, x, energy.hidden)
    return _finite(-_evaluated(integral, density, x), "free energy", "the energy grows without bound in the latents")


def exact_log_normalizer(trained: Any, state: Any, *args: Any, rng_key: Array | None = None, **kwargs: Any) -> float:
    r"""log Z(θ) = log ∫ Σ_h exp(-E(v, h)) dv by sums, Gaussian integrals and quadrature, to rounding.

    Gaussian-Bernoulli machines of up to 20 hidden units, linear-Gaussian models of any size, anything at all with up to
    three visible dimensions.

    :param args: as for :func:`free_energy`; the data say where to look for the density.
    :raises ValueError: where it is out of reach, or a model with covariates is given more than one row.
    """
    energy, params, x = _energy(trained, state, args, kwargs, rng_key)
    x = _one_row(energy, x, "exact_log_normalizer")
    density = energy.density(params, x)
    integral = Integral.of(density, x, [VISIBLE, *energy.latents])
    value = _evaluated(integral, density, x)[:1]
    return float(_finite(value, "normaliser", "the energy does not grow in every direction: Z is infinite")[0])


def ais(
    trained: Any,
    state: Any,
    *args: Any,
    rng_key: Array,
    num_temperatures: int = 1000,
    num_chains: int = 500,
    kernel: Kernel | None = None,
    path: Any = None,
    base: tuple[Any, Any] | None = None,
    reverse: bool = True,
    progress_bar: bool = True,
    **kwargs: Any,
) -> AIS:
    r"""Annealed importance sampling of log Z (Neal 2001), there and back.

    Chains start at draws of a normalised base p₀ and follow :math:`f_\beta = p_0^{1-\beta}\, \tilde p^\beta` from β =
    0 to 1; the mean of :math:`w = \prod_k f_{\beta_k}(x_k)/f_{\beta_{k-1}}(x_k)` is Z. Bits and one-hot vectors in
    which the energy is affine are summed out of the weights (Salakhutdinov, Murray 2008). By Jensen's inequality the
    mean of log w is at most log Z, and the same run backwards from draws of p̃ bounds it from above (Grosse,
    Ghahramani, Adams 2015, arXiv:1511.02543). Draws of p̃ are what the forward chains end at, drawn by weight and
    moved on by as many steps as a tenth of the path has.

    :param num_temperatures: steps on the path.
    :param num_chains: chains, all at once.
    :param kernel: what moves them at every β; None takes :class:`Gibbs` where the energy has the conditionals, else
        :class:`Langevin`. A kernel that adapts learns its settings at every β from a run of its own.
    :param path: the β's, rising from 0 to 1; None takes the sigmoid of Grosse et al., dense at both ends.
    :param base: mean and standard deviation of v in p₀, numbers or of shape (D,); None takes the data's. Latents: fair
        coins and dice, and normal with the mean and the spread of the guide's draws, in the reals.
    :param reverse: whether to run back.
    :raises ValueError: on misuse, or a model with covariates and more than one row.
    :raises FloatingPointError: if a weight is not finite.
    """
    if num_chains < 2 or num_temperatures < 1:
        raise ValueError(f"ais needs 2 chains and 1 temperature at least, got {num_chains} and {num_temperatures}.")
    key_energy, key_base, key_pilot, key_run, key_back = jax.random.split(rng_key, 5)
    energy, params, data = _energy(trained, state, args, kwargs, key_energy)
    target = energy.density(params, data)
    _one_row(energy, data, "ais")
    betas = _path(path, num_temperatures)
    start, draw = _base(energy, data, target, base)
    if kernel is None:
        free = any(block.kind == "free" for block in target.blocks)
        kernel = Langevin(num_steps=3) if free else Gibbs()
    if isinstance(kernel, Gibbs) and kernel.conditionals:
        raise ValueError("ais: closed forms given to Gibbs are those of p̃, not of the path from the base to it.")
    x = draw(key_base, num_chains)
    initial = kernel.init(target, x)
    tuned = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(betas), *jnp.shape(leaf))), initial)
    summed = next((block.names for block in target.blocks if block.kind == "affine"), ())
    rest = target.moving({name: True for block in target.blocks for name in block.names if name not in summed})

    @compiled
    def learn(key, x):
        """A run that only finds the kernel's settings at every β."""

        def step(carry, inputs):
            x, setting = carry
            key, beta = inputs
            x, setting, acceptance = kernel(key, start.mixed(target, beta), x, setting)
            setting = kernel.adapt(setting, acceptance)
            return (x, setting), setting

        inputs = jax.random.split(key, NUM_TUNING * len(betas)), jnp.repeat(betas, NUM_TUNING)
        settings = jax.lax.scan(step, (x, initial), inputs)[1]
        return jax.tree.map(lambda leaf: leaf[NUM_TUNING - 1 :: NUM_TUNING], settings)

    if jax.tree.leaves(initial):
        tuned = learn(key_pilot, jax.tree.map(lambda a: a[: max(2, num_chains // 5)], x))

    last = len(betas) - 1
    num_settling = max(1, len(betas) // 10)

    @compiled
    def anneal(key, x, log_weight, first, stop, backwards):
        """Steps ``first`` to ``stop`` of a run: along the path, or at p̃ for a while and then backwards."""

        def place(i):
            return jnp.where(backwards, jnp.minimum(last, last + num_settling - i), i)

        def step(i, carry):
            x, log_weight = carry
            here, there = betas[place(i)], betas[place(i + 1)]
            at, logits = _tempered(start, target, summed, x)
            change = at(there) - at(here)
            log_weight += jnp.where(backwards, -change, change)
            setting = jax.tree.map(lambda leaf: leaf[place(i + 1)], tuned)
            key_summed, key_rest = jax.random.split(jax.random.fold_in(key, i))
            # first of all and at the new β: the weights know nothing of the values that these had at the last one
            x = {**x, **draw_affine(key_summed, target, {name: there * g for name, g in logits.items()})}
            x, _, _ = kernel(key_rest, start.mixed(rest, there), x, setting)
            return x, log_weight

        return jax.lax.fori_loop(first, stop, step, (x, log_weight))

    def run(key, x, backwards, bar):
        log_weight = jnp.zeros(num_chains, x[VISIBLE].dtype)
        done, size, total = 0, 1, last + num_settling * backwards
        while done < total:
            stop, began = min(total, done + size), time.perf_counter()
            x, log_weight = jax.block_until_ready(anneal(key, x, log_weight, done, stop, backwards))
            bar.update(stop - done)
            seconds = time.perf_counter() - began
            size = 10 if done == 0 else max(1, min(10 * size, round(0.5 * (stop - done) / seconds)))
            done = stop
        if not jnp.isfinite(log_weight).all():
            raise FloatingPointError(
                "ais: a weight is not finite. The energy has no value where the base puts mass, or does not grow in "
                "every direction, so that Z is infinite. Try a narrower base=(mean, sd)."
            )
        return x, log_weight

    with tqdm.tqdm(total=last + (last + num_settling) * reverse, disable=not progress_bar, desc="ais") as bar:
        x, log_weight = run(key_run, x, False, bar)
        back = None
        if reverse:
            key_pick, key_back = jax.random.split(key_back)
            pick = jax.random.categorical(key_pick, log_weight, shape=(num_chains,))
            _, back = run(key_back, jax.tree.map(lambda a: a[pick], x), True, bar)
    return _summary(log_weight, back)


def _summary(log_weight: Array, back: Array | None) -> AIS:
    w = np.asarray(log_weight, float)
    n = len(w)
    relative = np.exp(w - w.max())
    mean = relative.mean()
    upper = (math.nan, math.nan)
    if back is not None:
        b = np.asarray(back, float)
        upper = float(b.mean()), float(b.std(ddof=1) / math.sqrt(n))
    return AIS(
        float(w.max() + math.log(mean)),
        float(relative.std(ddof=1) / (mean * math.sqrt(n))),
        float(relative.sum() ** 2 / (relative**2).sum()),
        float(w.mean()),
        float(w.std(ddof=1) / math.sqrt(n)),
        *upper,
        log_weight,
        back,
    )


def _path(path: Any, num_temperatures: int) -> Array:
    if path is None:
        rise = jax.nn.sigmoid(4 * jnp.linspace(-1, 1, num_temperatures + 1))
        return (rise - rise[0]) / (rise[-1] - rise[0])
    betas = jnp.asarray(path)
    if betas.ndim != 1 or len(betas) < 2 or betas[0] != 0 or betas[-1] != 1 or bool((jnp.diff(betas) <= 0).any()):
        raise ValueError("path must rise from 0 to 1.")
    return betas


def _base(
    energy: Energy, data: Point, target: Density, base: tuple[Any, Any] | None
) -> tuple[Density, Callable[[Array, int], Point]]:
    """p₀ as a density, and its draws."""
    v = data[VISIBLE]
    if base is None:
        loc, scale = v.mean(0), v.std(0)
        scale = jnp.where(scale > 0, scale, 1.0)
    else:
        loc, scale = (jnp.broadcast_to(jnp.asarray(a, v.dtype), v.shape[1:]) for a in base)
        if not (scale > 0).all():
            raise ValueError("base: the standard deviation must be positive.")
    normals = {VISIBLE: (loc, scale)}
    for name, latent in energy.latents.items():
        if latent.kind == "real":
            u = data[name]
            spread = u.std(0) if len(u) > 1 else jnp.ones_like(u[0])
            normals[name] = u.mean(0), jnp.where(spread > 0, spread, 1.0)
    constant: Any = -sum(
        math.prod(latent.units) * math.log(latent.num_values)
        for latent in energy.latents.values()
        if latent.kind != "real"
    )
    for _, scale in normals.values():
        constant -= jnp.log(scale).sum() + 0.5 * math.log(2 * math.pi) * scale.size

    def log_prob(x):
        total = jnp.full(len(x[VISIBLE]), constant, v.dtype)
        for name, (loc, scale) in normals.items():
            z = (x[name] - loc) / scale
            total -= 0.5 * (z**2).reshape(len(z), -1).sum(-1)
        return total

    def draw(key, num):
        x = {}
        for key_name, name in zip(jax.random.split(key, len(data)), data, strict=True):
            if name in normals:
                loc, scale = normals[name]
                x[name] = loc + scale * jax.random.normal(key_name, (num, *loc.shape), v.dtype)
            else:
                x[name] = random_labels(key_name, energy.latents[name], num, data[name].dtype)
        return x

    precisions = {
        names: jnp.concatenate([normals[name][1].ravel() ** -2.0 for name in names]) for names in target.precisions
    }
    return Density(log_prob, energy, target.blocks, precisions), draw


def _tempered(start: Density, target: Density, summed: Sequence[str], x: Point) -> tuple[Callable[[Any], Array], Point]:
    """log f_β of every row as a function of β, these sites summed out; and their logits at β = 1."""
    zero = {**x, **{name: jnp.zeros_like(x[name]) for name in summed}}
    a = start.log_prob(zero)
    b, logits = target.value_and_slope(zero, summed) if summed else (target.log_prob(x), {})

    def at(beta):
        total = (1 - beta) * a + beta * b
        for name, g in logits.items():  # the base's are 0
            each = jax.nn.softplus(beta * g) if target.latents[name].kind == "bits" else jax.nn.logsumexp(beta * g, -1)
            total += each.reshape(len(each), -1).sum(-1)
        return total

    return at, logits


def log_likelihood(
    trained: Any,
    state: Any,
    *args: Any,
    rng_key: Array,
    log_normalizer: float | AIS | None = None,
    num_draws: int = 1000,
    method: str | None = None,
    theta: Any = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Estimate:
    r"""log p(v) of every row, and how it was found.

    log p̃(v) is exact where :func:`free_energy` is, else the importance-weighted bound
    :math:`\log \tfrac1S \sum_s \tilde p(v, h_s)/q(h_s|v)` (Burda, Grosse, Salakhutdinov 2016), too low on average.
    log Z is exact where :func:`exact_log_normalizer` is, else from :func:`ais`.

    Of a :class:`PersistentVI`, whose θ has draws, it is log p(v | θ) by draw, for :func:`loo` and :func:`to_arviz`.

    :param log_normalizer: log Z, if it is known; or what ``ais`` returned.
    :param num_draws: S; of a PersistentVI, how many draws of θ, if they are not given.
    :param theta: of a PersistentVI: draws of θ, by site, as its ``posterior`` returns them.
    :param method: "exact" or "importance", for log p̃(v); None takes the first if it can.
    :returns: value and standard error of shape (n,), the error of log Z in it; ``method`` says "exact" or
        "importance", and "exact", "AIS" or "given" for the normaliser. Of a PersistentVI the shape is (1, draws, n).
    """
    key_energy, key_draws, key_ais = jax.random.split(rng_key, 3)
    if method not in (None, "exact", "importance"):
        raise ValueError(f"method should be 'exact', 'importance' or None, got {method!r}.")
    if isinstance(trained, PersistentVI):
        _check_theta_options(log_normalizer, method)
        if theta is None:
            theta = trained.posterior(state, *args, rng_key=key_draws, num_draws=num_draws, **kwargs)
        return _over_theta(trained, state, theta, args, kwargs, key_ais, progress_bar)
    if theta is not None:
        raise ValueError("theta goes with a PersistentVI: no other method has draws of θ.")
    energy, params, x = _energy(trained, state, args, kwargs, key_energy)
    density = energy.density(params, x)
    found: Any = None
    if method != "importance":
        try:
            integral = Integral.of(density, x, energy.hidden)
            found = np.asarray(_evaluated(integral, density, x), float), np.zeros(energy.num_rows), "exact"
        except ValueError:
            if method == "exact" or not isinstance(trained, BiSM):
                raise
    if found is None:
        run = guide_draws(trained, state, *args, rng_key=key_draws, num_draws=num_draws, **kwargs)
        w = np.asarray(run.log_p - run.log_q, float)
        relative = np.exp(w - w.max(0))
        mean = relative.mean(0)
        error = relative.std(0, ddof=1) / (mean * math.sqrt(num_draws)) if num_draws > 1 else np.full(len(mean), np.nan)
        found = w.max(0) + np.log(mean), error, "importance"
    value, error, how = found
    known = "given"
    if log_normalizer is None:
        try:
            log_normalizer = exact_log_normalizer(trained, state, *args, rng_key=key_energy, **kwargs)
            known = "exact"
        except ValueError:
            bar = progress_bar
            log_normalizer = ais(trained, state, *args, rng_key=key_ais, reverse=False, progress_bar=bar, **kwargs)
    if isinstance(log_normalizer, AIS):
        log_z, log_z_error, known = log_normalizer.log_normalizer, log_normalizer.standard_error, "AIS"
    else:
        log_z, log_z_error = float(log_normalizer), 0.0
    method = how if how == known else f"log p̃: {how}, log Z: {known}"
    return Estimate(value - log_z, np.hypot(error, log_z_error), method)


def _check_theta_options(log_normalizer: Any, method: str | None) -> None:
    if log_normalizer is not None:
        raise ValueError("log_normalizer: a PersistentVI has a log Z for every draw of θ; leave it out.")
    if method == "importance":
        raise ValueError("method='importance' takes a guide of the latents, which a PersistentVI has not.")


def _over_theta(
    trained: PersistentVI, state: Any, theta: Any, args: Any, kwargs: Any, rng_key: Array, progress_bar: bool
) -> Estimate:
    """log p(v | θ) of every draw of θ and row, (1, draws, n)."""
    draws = [jax.tree.map(lambda a, i=i: jnp.asarray(a)[i], theta) for i in range(len(next(iter(theta.values()))))]
    energy, params, x = _energy(trained.at(draws[0]), state, args, kwargs, rng_key)
    one = _one_row(energy, x, "log_likelihood")
    try:
        hidden = Integral.of(energy.density(params, x), x, energy.hidden)
        whole = Integral.of(energy.density(params, one), one, [VISIBLE, *energy.latents])
        exact = not (hidden.quadrature or whole.quadrature)
    except ValueError:
        exact = False
    if exact:  # where the energy's structure is known it is the same at all θ: one program for all of them
        model = trained.pair(*trained._checked(args, kwargs)).model

        @jax.jit
        def value_at(values):
            at = replace(energy, model=given(model, values))
            return hidden(at.density(params, x), x) - whole(at.density(params, one), one)[0]

        value = jnp.stack([value_at(values) for values in draws])
        if not bool(jnp.isfinite(value).all()):
            draw, row = np.argwhere(~np.isfinite(np.asarray(value)))[0]
            raise FloatingPointError(f"log p(v | θ) is not finite at draw {draw} of θ and row {row}.")
        return Estimate(value[None], jnp.zeros_like(value)[None], "exact")
    each = []
    for i, values in enumerate(tqdm.tqdm(draws, disable=not progress_bar, desc="log-likelihood")):
        key = jax.random.fold_in(rng_key, i)
        each.append(log_likelihood(trained.at(values), state, *args, rng_key=key, progress_bar=False, **kwargs))
    values, errors = (np.stack([np.asarray(a) for a in part])[None] for part in list(zip(*each, strict=True))[:2])
    return Estimate(jnp.asarray(values), jnp.asarray(errors), each[0].method)


def _scores(
    trained: Any, state: Any, args: Any, kwargs: Any, rng_key: Array, num_draws: int
) -> tuple[Array, Array, str]:
    r"""v and ∇_v log p(v) of every row, (n, D): exact where the latents can be summed, else a mean over guide draws.

    The latter is :math:`E_{q(h|v)} \nabla_v[\log\tilde p(v, h) - \log q(h|v)]` (Bao et al. 2021), exact if q is the
    posterior.
    """
    density, x, integral = _summable(trained, state, args, kwargs, rng_key)
    if integral is not None:
        v = x[VISIBLE]
        return v, jax.jit(jax.grad(lambda v: integral(density, {**x, VISIBLE: v}).sum()))(v), "exact"
    batch, draw, score = _guide_score(trained, state, args, kwargs, rng_key, losses.ScoreMatching(), None)

    @jax.jit
    def mean(keys):
        return jax.lax.map(lambda key: score(draw(key))(batch.v), keys).mean(0)

    return batch.v, mean(jax.random.split(rng_key, num_draws)), "guide"


def _summable(trained: Any, state: Any, args: Any, kwargs: Any, rng_key: Array) -> tuple[Density, Point, Any]:
    """The density, a point, and the sum over the latents if gradients can go through it; else None."""
    energy, params, x = _energy(trained, state, args, kwargs, rng_key)
    density = energy.density(params, x)
    try:
        integral = Integral.of(density, x, energy.hidden)
    except ValueError:
        integral = None
    integral = None if integral is None or integral.quadrature else integral
    if integral is None and not isinstance(trained, BiSM):
        raise ValueError("The score takes a sum over latents that is out of reach, and there is no guide to draw them.")
    return density, x, integral


def _guide_score(
    trained: BiSM, state: Any, args: Any, kwargs: Any, rng_key: Array, loss: Any, num_draws: int | None
) -> tuple[Any, Callable, Callable]:
    """The batch; a draw of the guide by key; and the score function given draws, ``num_draws`` of them stacked."""
    leaves, spec = trained._checked(args, kwargs)
    pair = trained.pair(leaves, spec)
    params = pair.params(*trained._unpack(pair, state), state.mutable_state)
    key_batch, key_score = jax.random.split(rng_key)
    batch = pair.batch(key_batch, leaves, spec)

    def draw(key):
        return pair.draw(key, params, batch, batch.v)[0]

    def score(draws):
        return pair.score(key_score, params, batch, draws, loss, num_draws)

    return batch, draw, score


def fisher_divergence(
    trained: Any,
    state: Any,
    *args: Any,
    rng_key: Array,
    data_score: Any = None,
    num_draws: int = 100,
    num_projections: int | None = None,
    **kwargs: Any,
) -> Estimate:
    r"""The Fisher divergence between the data and the model, a mean over the rows.

    With the data's score known :math:`\tfrac12 E\|\nabla\log p_{data}(v) - s(v)\|^2`; without it the same up to a
    constant of the data, :math:`E[\tfrac12\|s(v)\|^2 + \mathrm{tr}\,\nabla s(v)]` (Hyvärinen 2005, Theorem 1): two
    models of the same data are compared by it. s is the exact score of the marginal where the latents can be summed,
    else a mean over the guide's draws of h.

    :param data_score: ∇ log p_data at the rows, (n, D), or a function from v to it.
    :param num_draws: of h, if the guide is needed.
    :param num_projections: random directions that estimate the trace; None takes it exactly, for D gradients.
    :returns: ``standard_error`` is that of a mean over the rows.
    """
    key_score, key_draw, key_noise = jax.random.split(rng_key, 3)
    if data_score is not None:
        v, s, method = _scores(trained, state, args, kwargs, key_score, num_draws)
        wanted = jnp.asarray(data_score(v) if callable(data_score) else data_score)
        if wanted.shape != s.shape:
            raise ValueError(f"data_score has shape {wanted.shape}; {s.shape} is wanted.")
        return _mean(0.5 * ((wanted - s) ** 2).sum(-1), method)
    loss: Any = losses.ScoreMatching(num_particles=num_draws, average="score")
    if num_projections is not None:
        loss = losses.SlicedScoreMatching(num_projections, num_particles=num_draws, average="score")
    density, x, integral = _summable(trained, state, args, kwargs, key_score)
    if integral is not None:
        marginal = jax.grad(lambda v: integral(density, {**x, VISIBLE: v}).sum())
        return _mean(jax.jit(lambda v: loss(marginal, v, loss.draw(key_noise, v)))(x[VISIBLE]), "exact")
    batch, draw, score = _guide_score(trained, state, args, kwargs, key_score, loss, num_draws)

    @jax.jit
    def per_row():
        draws = jax.vmap(draw)(jax.random.split(key_draw, num_draws))
        return loss(score(draws), batch.v, loss.draw(key_noise, batch.v))

    return _mean(per_row(), "guide")


def _mean(values: Array, method: str) -> Estimate:
    n = len(values)
    error = values.std(ddof=1) / math.sqrt(n) if n > 1 else jnp.full((), jnp.nan)
    return Estimate(values.mean(), error, method)


def kernel_stein_discrepancy(
    trained: Any,
    state: Any,
    *args: Any,
    rng_key: Array,
    num_bootstrap: int = 1000,
    num_draws: int = 100,
    **kwargs: Any,
) -> FitTest:
    r"""The squared kernel Stein discrepancy between data and model, and a test of fit: no normaliser is needed.

    The mean over pairs of rows of (Liu, Lee, Jordan 2016; Chwialkowski, Strathmann, Gretton 2016)

    .. math:: u(x, y) = s(x)^\top s(y) k + s(x)^\top \nabla_y k + s(y)^\top \nabla_x k + \mathrm{tr}\,\nabla_x\nabla_y k

    with the inverse multiquadric :math:`k = (1 + (x - y)^\top M (x - y))^{-1/2}` (Gorham, Mackey 2017), which sees
    every departure; M is the data's precision over D. The p-value is by the wild bootstrap: signs at random.

    :param args: independent draws of the distribution that is tested, one a row.
    :param num_bootstrap: its replications.
    :param num_draws: of h, where the score needs the guide; the test is of guide and model together then.
    :returns: a small p-value rejects that the rows come from the model.
    """
    key_score, key_boot = jax.random.split(rng_key)
    v, s, _ = _scores(trained, state, args, kwargs, key_score, num_draws)
    return stein_test(v, s, key_boot, num_bootstrap)


def stein_test(v: Any, score: Any, rng_key: Array, num_bootstrap: int = 1000) -> FitTest:
    """:func:`kernel_stein_discrepancy` of rows v, (n, D), and the model's score at them, (n, D)."""
    v, score = np.asarray(v, float), np.asarray(score, float)
    n, d = v.shape
    if n < 2:
        raise ValueError("kernel_stein_discrepancy needs two rows at least.")
    # a ridge: more dimensions than rows, or a constant one
    cov = np.cov(v.T).reshape(d, d)
    precision = np.linalg.inv(cov + 1e-6 * (np.trace(cov) / d + 1e-12) * np.eye(d)) / d
    scaled = v @ np.linalg.cholesky(precision)
    squared = _squared_distances(scaled)
    k = (1 + squared) ** -0.5
    toward = v @ precision  # M x
    s_dot, s_diff = score @ score.T, score @ toward.T
    own = np.diag(s_diff)
    # s(x)·M(x - y) and s(y)·M(y - x)
    along = (own[:, None] - s_diff) + (own[None, :] - s_diff.T)
    far = _squared_distances(toward)
    u = s_dot * k + along * k**3 + np.trace(precision) * k**3 - 3 * far * k**5
    np.fill_diagonal(u, 0.0)
    return _bootstrap(u, rng_key, num_bootstrap)


def _squared_distances(x: np.ndarray) -> np.ndarray:
    norms = (x**2).sum(-1)
    return np.maximum(norms[:, None] + norms[None, :] - 2 * x @ x.T, 0.0)


def _bootstrap(u: np.ndarray, rng_key: Array, num_bootstrap: int) -> FitTest:
    n = len(u)
    signs = np.asarray(jax.random.rademacher(rng_key, (num_bootstrap, n)), float)
    statistic = u.sum() / (n * (n - 1))
    replications = ((signs @ u) * signs).sum(-1) / (n * (n - 1))
    return FitTest(float(statistic), float((1 + (replications >= statistic).sum()) / (num_bootstrap + 1)))


def maximum_mean_discrepancy(
    first: Any, second: Any, *, rng_key: Array, num_permutations: int = 1000, bandwidth: float | None = None
) -> FitTest:
    r"""The squared maximum mean discrepancy between two sets of draws (Gretton et al. 2012, Lemma 6).

    Unbiased, with the kernel :math:`\exp(-\|x - y\|^2 / 2\ell^2)`; the p-value is by permutation.

    :param first: draws of the model, (n, ...).
    :param second: held-out data, (m, ...).
    :param bandwidth: ℓ; None takes the median distance between all draws.
    """
    x, y = (np.asarray(a, float).reshape(len(a), -1) for a in (first, second))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"The draws have {x.shape[1]} and {y.shape[1]} numbers a row.")
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise ValueError("maximum_mean_discrepancy needs two rows of each at least.")
    squared = _squared_distances(np.concatenate([x, y]))
    scale = np.median(squared[np.triu_indices(n + m, 1)]) if bandwidth is None else bandwidth**2
    k = np.exp(-0.5 * squared / max(scale, np.finfo(float).tiny))
    np.fill_diagonal(k, 0.0)
    generator = np.random.default_rng(np.asarray(jax.random.bits(rng_key, (4,), np.uint32)))

    def statistic(order):
        weight = np.where(np.arange(n + m) < n, 1.0, 0.0)[order]
        inside, outside = weight @ k @ weight, (1 - weight) @ k @ (1 - weight)
        return inside / (n * (n - 1)) + outside / (m * (m - 1)) - 2 * (weight @ k @ (1 - weight)) / (n * m)

    found = statistic(np.arange(n + m))
    others = np.array([statistic(generator.permutation(n + m)) for _ in range(num_permutations)])
    return FitTest(float(found), float((1 + (others >= found).sum()) / (num_permutations + 1)))


def _energy(trained: Any, state: Any, args: Any, kwargs: Any, rng_key: Array | None) -> Any:
    return trained.energy(state, *args, rng_key=jax.random.key(0) if rng_key is None else rng_key, **kwargs)


def _evaluated(integral: Integral, density: Density, x: Point) -> Array:
    return integral(density, x) if integral.quadrature else jax.jit(lambda x: integral(density, x))(x)


def _one_row(energy: Energy, x: Point, role: str) -> Point:
    if energy.num_rows > 1 and not energy.is_homogeneous:
        raise ValueError(
            f"{role}: the rows have densities of their own, {called(energy, VISIBLE)} given covariates, and a "
            "normaliser each. Pass one row."
        )
    return {name: value[:1] for name, value in x.items()} if energy.resizes else x


def _finite(value: Array, what: str, why: str) -> Array:
    if not bool(jnp.isfinite(value).all()):
        raise FloatingPointError(f"The {what} is not finite at row {int(jnp.argmin(jnp.isfinite(value)))}: {why}.")
    return value
