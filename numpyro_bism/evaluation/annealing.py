"""log Z(θ) by annealed importance sampling."""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import Array

from ..brief import brief
from ..compiled.convolutions import compiled
from ..energies import VISIBLE, Density, Energy, Point, random_labels
from ..programs.modes import in_own_modes
from ..sampling.kernels import Gibbs, Kernel, Langevin, draw_affine, require_kernel
from .normalizer import energy_of

GOOD_GAP = 1.0  # nats between the bounds on log Z, and in its standard error
NUM_TUNING = 3  # steps at every β of the run that finds a kernel's settings


class AIS(NamedTuple):
    """An estimate of log Z in nats, bounds on it from both sides, and the weights that they are made of.

    Of a conditional model, whose rows have a normaliser each, all are arrays (n,), and the weights (chains, n).

    :ivar log_normalizer: log of the mean forward weight: the estimate of log Z.
    :ivar standard_error: the standard error of ``log_normalizer``, by the delta method.
    :ivar effective_sample_size: of the forward weights, (Σw)² / Σw²: how many chains count.
    :ivar lower: mean forward log weight: log Z or less, but for its own ``lower_error``.
    :ivar lower_error: the standard error of ``lower``.
    :ivar upper: mean reverse log weight: log Z or more, but for its own ``upper_error`` and for how well the forward
        run's end stands for draws of p̃. NaN without a reverse run.
    :ivar upper_error: the standard error of ``upper``; NaN without a reverse run.
    :ivar log_weights: log w of the forward run, one a chain.
    :ivar reverse_log_weights: the same sum of log ratios, collected on the way from p̃ back to the base; None without a
        reverse run.
    """

    log_normalizer: Any
    standard_error: Any
    effective_sample_size: Any
    lower: Any
    lower_error: Any
    upper: Any
    upper_error: Any
    log_weights: Array
    reverse_log_weights: Array | None

    def __repr__(self) -> str:
        return brief(self)

    @property
    def doubt(self) -> str | None:
        """Why the estimate is not to be trusted, if it is not; of a conditional model at the worst row."""
        num = len(self.log_weights)
        noise = 3 * np.hypot(self.lower_error, np.nan_to_num(self.upper_error))
        gap = np.nan_to_num(self.upper - self.lower)
        if np.any(gap > GOOD_GAP + noise):
            return f"the runs there and back are {np.max(gap - noise):.1f} nats apart or more"
        if np.less(self.effective_sample_size, max(5.0, 0.05 * num)).any():
            return f"{np.min(self.effective_sample_size):.1f} of {num} chains have all the weight"
        if np.any(np.greater(self.standard_error, GOOD_GAP)):
            return f"its standard error is {np.max(self.standard_error):.1f} nats"
        return None


@in_own_modes
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

    Warns where the bounds are far apart, few chains have all the weight, or the standard error is large. A mode that
    no chain has found is missed without a warning.

    :param trained: a BiSM or a rival.
    :param state: its state.
    :param args: arguments of model and guide, the data among them, as for ``update``.
    :param rng_key: a JAX random key: all that is drawn follows from it.
    :param num_temperatures: steps on the path.
    :param num_chains: chains, all at once; of a conditional model so many for every row.
    :param kernel: what moves them at every β; None takes :class:`Gibbs` where the energy has the conditionals, else
        :class:`Langevin`. A kernel that adapts learns its settings at every β from a run of its own.
    :param path: the β's, rising from 0 to 1; None takes the sigmoid of Grosse et al., dense at both ends.
    :param base: mean and standard deviation of v in p₀, numbers or of shape (D,); None takes the data's. Latents: fair
        coins and dice, and normal with the mean and the spread of the guide's draws, in the reals.
    :param reverse: whether to run back.
    :param progress_bar: whether to show how many steps there and back were taken.
    :param kwargs: keyword arguments of model and guide.
    :raises ValueError: on misuse.
    :raises FloatingPointError: if a weight is not finite.
    """
    if num_chains < 2 or num_temperatures < 1:
        raise ValueError(f"ais needs 2 chains and 1 temperature at least, got {num_chains} and {num_temperatures}.")
    key_energy, key_base, key_pilot, key_run, key_back = jax.random.split(rng_key, 5)
    energy, params, data = energy_of(trained, state, args, kwargs, key_energy)
    target = energy.density(params, data)
    # row i of a point has the covariates of row i modulo n: the chains of all rows stand side by side
    num_rows = 1 if energy.is_homogeneous else energy.num_rows
    betas = _path(path, num_temperatures)
    start, draw = _base(energy, data, target, base)
    if kernel is None:
        free = any(block.kind == "free" for block in target.blocks)
        kernel = Langevin(num_steps=3) if free else Gibbs()
    require_kernel(kernel)
    if isinstance(kernel, Gibbs) and kernel.conditionals:
        raise ValueError("ais: closed forms given to Gibbs are those of p̃, not of the path from the base to it.")
    x = draw(key_base, num_chains * num_rows)
    initial = kernel.init(target, x)
    tuned = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(betas), *jnp.shape(leaf))), initial)
    summed = next((block.names for block in target.blocks if block.kind == "affine"), ())
    rest = target.moving({name: True for block in target.blocks for name in block.names if name not in summed})

    @compiled
    def learn(key: Array, x: Point) -> Any:
        """A run that only finds the kernel's settings at every β."""

        def step(carry: tuple[Point, Any], inputs: tuple[Array, Array]) -> tuple[tuple[Point, Any], Any]:
            x, setting = carry
            key, beta = inputs
            x, setting, acceptance = kernel(key, start.mixed(target, beta), x, setting)
            setting = kernel.adapt(setting, acceptance)
            return (x, setting), setting

        inputs = jax.random.split(key, NUM_TUNING * len(betas)), jnp.repeat(betas, NUM_TUNING)
        settings = jax.lax.scan(step, (x, initial), inputs)[1]
        return jax.tree.map(lambda leaf: leaf[NUM_TUNING - 1 :: NUM_TUNING], settings)

    if jax.tree.leaves(initial):
        tuned = learn(key_pilot, jax.tree.map(lambda a: a[: max(2, num_chains // 5) * num_rows], x))

    last = len(betas) - 1
    num_settling = max(1, len(betas) // 10)

    @compiled
    def anneal(key: Array, x: Point, log_weight: Array, first: int, stop: int, backwards: bool) -> tuple[Point, Array]:
        """Steps ``first`` to ``stop`` of a run: along the path, or at p̃ for a while and then backwards."""

        def place(i: Array) -> Array:
            return jnp.where(backwards, jnp.minimum(last, last + num_settling - i), i)

        def step(i: Array, carry: tuple[Point, Array]) -> tuple[Point, Array]:
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

        end: tuple[Point, Array] = jax.lax.fori_loop(first, stop, step, (x, log_weight))
        return end

    def run(key: Array, x: Point, backwards: bool, bar: Any) -> tuple[Point, Array]:
        log_weight = jnp.zeros(num_chains * num_rows, x[VISIBLE].dtype)
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
            chances = log_weight.reshape(num_chains, num_rows)
            picks = jax.random.categorical(key_pick, chances, axis=0, shape=(num_chains, num_rows))
            picks = (picks * num_rows + jnp.arange(num_rows)).reshape(-1)
            _, back = run(key_back, jax.tree.map(lambda a: a[picks], x), True, bar)
    if num_rows > 1:
        log_weight = log_weight.reshape(num_chains, num_rows)
        back = None if back is None else back.reshape(num_chains, num_rows)
    found = _summary(log_weight, back)
    if found.doubt is not None:
        warnings.warn(
            f"ais: log Z is not to be trusted, {found.doubt}. Take more num_temperatures (here {len(betas) - 1}), a "
            f"base=(mean, sd) nearer to the model, or more num_chains (here {num_chains}).",
            UserWarning,
            stacklevel=3,  # the caller of ais
        )
    return found


def _summary(log_weight: Array, back: Array | None) -> AIS:
    """Of weights by chain, or by chain and row."""
    w = np.asarray(log_weight, float)
    n = len(w)
    relative = np.exp(w - w.max(0))
    mean = relative.mean(0)
    bound: Any = np.full((2, *w.shape[1:]), np.nan)
    if back is not None:
        b = np.asarray(back, float)
        bound = b.mean(0), b.std(0, ddof=1) / math.sqrt(n)
    numbers: tuple[Any, ...] = (
        w.max(0) + np.log(mean),
        relative.std(0, ddof=1) / (mean * math.sqrt(n)),
        relative.sum(0) ** 2 / (relative**2).sum(0),
        w.mean(0),
        w.std(0, ddof=1) / math.sqrt(n),
        *bound,
    )
    if w.ndim == 1:
        numbers = tuple(map(float, numbers))
    log_z, error, size, lower, lower_error, *upper = numbers
    return AIS(log_z, error, size, lower, lower_error, upper[0], upper[1], log_weight, back)


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

    def log_prob(x: Point) -> Array:
        total = jnp.full(len(x[VISIBLE]), constant, v.dtype)
        for name, (loc, scale) in normals.items():
            z = (x[name] - loc) / scale
            total -= 0.5 * (z**2).reshape(len(z), -1).sum(-1)
        return total

    def draw(key: Array, num: int) -> Point:
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


def _tempered(
    start: Density, target: Density, summed: Sequence[str], x: Point
) -> tuple[Callable[[Array], Array], Point]:
    """log f_β of every row as a function of β, these sites summed out; and their logits at β = 1."""
    zero = {**x, **{name: jnp.zeros_like(x[name]) for name in summed}}
    a = start.log_prob(zero)
    b, logits = target.value_and_slope(zero, summed) if summed else (target.log_prob(x), {})

    def at(beta: Array) -> Array:
        total = (1 - beta) * a + beta * b
        for name, g in logits.items():  # the base's are 0
            each = jax.nn.softplus(beta * g) if target.latents[name].kind == "bits" else jax.nn.logsumexp(beta * g, -1)
            total += each.reshape(len(each), -1).sum(-1)
        return total

    return at, logits
