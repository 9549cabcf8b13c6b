r"""How far the hypergradient is from the marginal's own gradient, and what to change where it is."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.handlers import seed
from tqdm import tqdm

from ..bism import BiSM
from ..brief import brief, named
from ..densities import Pair, joint_per_example, record
from ..hypergradients import Exact, Functional
from ..modes import in_own_modes
from ..visible import Batch

FINE = 0.1  # of the gradient's length: what Adam's own noise hides
ROUGH = 0.15  # a standard error above this says nothing where the error is small
CLOSE = 0.03  # one below this is small enough
NEAR = 0.1  # nats from the guide to the posterior
FEW = 0.1  # of the draws: where no more count, the estimate is rough itself
PART = 50  # steps between two looks at the standard error


class HypergradientError(NamedTuple):
    """What :func:`hypergradient_error` finds. ``print`` shows the verdict.

    :ivar value: ‖E[hypergradient] - dJ/dθ‖ / ‖dJ/dθ‖, every entry in units of its root mean square; NaN where there is
        no gradient to be told from noise.
    :ivar standard_error: of ``value`` where that is small.
    :ivar by_parameter: the same of every parameter of the model alone, value and standard error.
    :ivar gap: KL(q‖p) from the guide to the posterior in nats, a mean over the examples; too low where ``effective`` is
        small.
    :ivar effective: the effective sample size of the guide's draws, a share of their number.
    :ivar held: ``value``, ``standard_error`` and ``gap`` where the model stands still and the guide catches up.
    :ivar passed: whether the hypergradient is right; None where the draws can't tell.
    :ivar verdict: in one sentence: is the guide fitted, is the hypergradient solved, what is to be changed.
    """

    value: float
    standard_error: float
    by_parameter: Mapping[str, tuple[float, float]]
    gap: float
    effective: float
    held: tuple[float, float, float]
    passed: bool | None
    verdict: str

    def __str__(self) -> str:
        return self.verdict

    def __repr__(self) -> str:
        return brief(self)


@in_own_modes
def hypergradient_error(
    trained: Any,
    state: Any,
    *args: Any,
    rng_key: Array,
    num_draws: int = 500,
    num_particles: int | None = None,
    num_fit: int = 50,
    progress_bar: bool = True,
    **kwargs: Any,
) -> HypergradientError:
    r"""How far off training's hypergradients are from here on, and a verdict in one sentence. Nothing is updated.

    A copy of the run is trained further, and at every step its strategy's dJ/dθ is compared with the gradient of the
    same loss of the marginal, whose score comes from importance-weighted draws of the guide, the sites that it relaxes
    or sums out drawn as discrete ones,

    .. math:: \nabla_v \log \tfrac1L \sum_l \frac{\tilde p(v, h_l; θ)}{q(h_l|v)},

    the draws and the weights' denominators fixed (the bound of Burda, Grosse, Salakhutdinov 2016, with the jackknife of
    Nowozin 2018). It needs no second derivative of the guide, no inner problem, and no knowledge of the strategy; two
    halves of the draws are multiplied where the loss squares the score, so that the noise in them adds no bias. Rows
    and noise are shared with the strategy. What noise is left averages out over the steps, and so does the guide's
    jitter, which does training no harm. A bias of order 1/L² is left, of third cumulants where the loss differentiates
    the score, of all where the guide is far from the posterior: see ``effective``.

    Then the model stands still, the guide catches up, and both are compared again: an error that falls is one of a
    guide that lags behind; one that stays, with a guide at the posterior, is the strategy's.

    Errors are taken as Adam sees them: every entry of the gradient in units of its root mean square over the steps. At
    the end of training there may be no gradient to be wrong about: the draws can't tell then.

    :param trained: a BiSM.
    :param state: its state.
    :param args: arguments of model and guide, as for ``bism.update``.
    :param rng_key: a JAX random key.
    :param num_draws: steps compared at most, 50 at least; it stops where the standard error is below 0.03.
    :param num_particles: L, both halves together; None takes 8, or 64 under a loss that differentiates the score.
    :param num_fit: steps that the guide is given to catch up, in fifties, each of the K of training; 0 leaves the
        second part out.
    :raises ValueError: for what is no BiSM, or where the guide's density is not known.
    :raises FloatingPointError: where a gradient is not finite.
    """
    if not isinstance(trained, BiSM):
        raise ValueError(f"hypergradient_error: {named(trained)} has no hypergradient. Pass a BiSM.")
    if num_particles is None:
        num_particles = 64 if trained.loss.differentiates_score else 8
    if num_draws < 1 or num_particles < 2 or num_fit < 0:
        raise ValueError(
            f"num_draws must be at least 1, num_particles at least 2, and num_fit not negative, got {num_draws}, "
            f"{num_particles} and {num_fit}."
        )
    leaves, spec = trained._checked(args, kwargs)
    theta, _ = trained._unpack(trained.pair(leaves, spec), state)
    keys = jax.random.split(rng_key, 3)
    is_array = [isinstance(leaf, Array) for leaf in leaves]

    @jax.jit
    def several(state: Any, is_held: Array, keys: Array, arrays: Any) -> Any:
        rest = iter(arrays)  # whole data sets maybe: no constants of the program
        filled = [next(rest) if yes else leaf for yes, leaf in zip(is_array, leaves, strict=True)]
        compare = _comparing(trained, filled, spec, num_particles)

        def step(state: Any, key: Array) -> Any:
            new = _stepped(trained, state, filled, spec, is_held)
            return new, compare(key, new)

        state, found = jax.lax.scan(step, state, keys)
        return state, jax.tree.map(lambda x: x.sum(0), found)

    def part(key: Array, state: Any, is_held: bool) -> Any:
        arrays = [leaf for yes, leaf in zip(is_array, leaves, strict=True) if yes]
        return several(state, jnp.asarray(is_held), jax.random.split(key, PART), arrays)

    def compared(key: Array, state: Any, is_held: bool, bar: Any) -> tuple[_Compared, Any]:
        sums: Any = None
        for i, key_part in enumerate(jax.random.split(key, -(-num_draws // PART))):
            state, found = part(key_part, state, is_held)
            found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
            sums = found if sums is None else jax.tree.map(np.add, sums, found)
            num = PART * (i + 1)
            means = jax.tree.map(lambda x, num=num: x / num, sums)
            comparison = _Compared(num, *means[:4], *map(float, means[4:]))
            comparison.require_finite()
            bar.update(PART)
            if comparison.error()[1] < CLOSE:  # not where there is none
                break
        return comparison, state

    with tqdm(disable=not progress_bar, desc="hypergradient", unit="step") as bar:
        before, later = compared(keys[0], state, False, bar)
        for _ in range(-(-num_fit // PART)):  # the same program: another one's compilation would take longer
            later, _ = part(keys[1], later, True)
        after = compared(keys[2], later, True, bar)[0] if num_fit else before
    passed, verdict = _judged(before, after if num_fit else None, num_fit, trained.hypergradient)
    return HypergradientError(
        *before.error(),
        {name: before.error([name]) for name in theta},
        before.gap,
        before.effective,
        (*after.error(), after.gap),
        passed,
        verdict,
    )


class _Compared(NamedTuple):
    """Means over steps, by parameter: of d = hypergradient - reference, of the reference, and of their squares."""

    num: int
    difference: Mapping[str, np.ndarray]
    reference: Mapping[str, np.ndarray]
    square_difference: Mapping[str, np.ndarray]
    square_reference: Mapping[str, np.ndarray]
    gap: float
    effective: float

    def require_finite(self) -> None:
        """:raises FloatingPointError: where a gradient is not finite."""
        bad = [name for name, square in self.square_difference.items() if not np.isfinite(square).all()]
        if bad:
            raise FloatingPointError(
                f"Within {self.num} steps of training a gradient of {bad} is not finite, the hypergradient's or "
                "that of the importance-weighted marginal."
            )

    def error(self, names: Any = None) -> tuple[float, float]:
        """‖E d‖ / ‖E reference‖ without the noise in both, and a standard error; NaN where there is no gradient."""
        parts = []
        for name in self.difference if names is None else names:
            d, r = self.difference[name], self.reference[name]
            noise_d = np.maximum(self.square_difference[name] - d**2, 0) / (self.num - 1)
            noise_r = np.maximum(self.square_reference[name] - r**2, 0) / (self.num - 1)
            unit = self.square_reference[name]
            weight = np.divide(1.0, unit, out=np.zeros_like(unit), where=unit > 0)
            parts.append([(weight * x).sum() for x in (d**2 - noise_d, noise_d, r**2 - noise_r, noise_r)])
        square, noise, length, noise_length = np.sum(parts, 0)
        if length <= noise_length:  # the gradient is not told from zero
            return math.nan, math.nan
        return math.sqrt(max(square, 0) / length), math.sqrt(noise / length)


def _stepped(trained: BiSM, state: Any, leaves: Any, spec: Any, is_held: Array) -> Any:
    """The state after a step of training, or of training with the model held where it is."""
    new, _, _ = trained._update(state, leaves, spec)
    held = jax.tree.map(lambda a, b: jnp.where(is_held, a, b), state.optim_state, new.optim_state)
    return new._replace(optim_state=held)


def _comparing(trained: BiSM, leaves: Any, spec: Any, num_particles: int) -> Callable[[Array, Any], Any]:
    """Both gradients at a state, on a batch of their own: sums of :class:`_Compared`, ``num`` left out."""
    pair, loss = trained.pair(leaves, spec), trained.loss

    def compare(rng_key: Array, state: Any) -> Any:
        key_batch, key_noise, key_steps, key_strategy, key_reference = jax.random.split(rng_key, 5)
        theta, phi = trained._unpack(pair, state)
        batch = pair.batch(key_batch, leaves, spec)
        noise = loss.draw(key_noise, batch.v)
        keys = jax.random.split(key_steps, trained.num_inner_steps)
        problem = trained._problem(pair, batch, state.mutable_state, keys, _Drawn(loss, noise))
        found = trained._strategy(key_strategy, problem, theta, state.inner_optim_state, state.hypergradient_state)

        def marginal(moved: Any) -> Any:
            at, fixed = (pair.params(values, phi, state.mutable_state) for values in (moved, theta))
            return marginal_loss(key_reference, pair, at, fixed, batch, loss, noise, num_particles)

        reference, (gap, effective) = jax.grad(marginal, has_aux=True)(theta)
        difference = jax.tree.map(jnp.subtract, found.gradient, reference)
        squares = [jax.tree.map(jnp.square, x) for x in (difference, reference)]
        return difference, reference, *squares, gap, effective

    return compare


class _Drawn:
    """An outer loss whose noise is drawn already."""

    def __init__(self, loss: Any, noise: Any):
        self.loss, self.noise = loss, noise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loss, name)

    def __call__(self, *args: Any) -> Any:
        return self.loss(*args)

    def draw(self, rng_key: Array, v: Array) -> Any:
        return self.noise


def marginal_loss(
    rng_key: Array,
    pair: Pair,
    params: Mapping[str, Any],
    fixed: Mapping[str, Any],
    batch: Batch,
    loss: Any,
    noise: Any,
    num_particles: int,
) -> tuple[Array, tuple[Array, Array]]:
    """The outer loss of the importance-weighted marginal, a mean over the batch.

    :param fixed: ``params`` without a path to θ.
    :returns: the loss, and of all draws the gap from guide to posterior in nats and their effective share.
    """
    key_draws, key_model, key_guide = jax.random.split(rng_key, 3)
    v, n = loss.perturb(batch.v, noise), len(batch.v)

    def log_model(u: Array, given: Mapping[str, Any], values: Mapping[str, Array]) -> Array:
        args, kwargs = batch.arguments(u)
        with seed(rng_seed=key_model), record(given, values) as run:
            pair.model(*args, **kwargs)
        return joint_per_example(run.sites.values(), n)

    def draw(key: Array) -> Any:
        values, keys = pair.hard_draw(key, fixed, batch, v)
        sites = pair.guide_at(key_guide, fixed, batch, v, values, keys, harden=True)
        return values, joint_per_example([site for site in sites.values() if not site.is_delta], n)

    size = num_particles // 2
    values, log_q = jax.vmap(draw)(jax.random.split(key_draws, 2 * size))
    log_q = jax.lax.stop_gradient(log_q)

    def log_weights(u: Array, given: Mapping[str, Any], part: slice) -> Array:
        some = jax.tree.map(lambda x: x[part], values)
        return jax.vmap(lambda h: log_model(u, given, h))(some) - log_q[part]

    def score(u: Array) -> Array:
        def half(part: slice) -> Array:
            return jax.grad(lambda u: _log_mean(log_weights(u, params, part)).sum())(u)

        return jnp.stack([half(slice(size)), half(slice(size, None))])

    w = log_weights(v, fixed, slice(None))
    bound = jax.nn.logsumexp(w, 0) - math.log(2 * size)
    effective = jnp.exp(2 * jax.nn.logsumexp(w, 0) - jax.nn.logsumexp(2 * w, 0)) / (2 * size)
    return loss(score, batch.v, noise).mean(), ((bound - w.mean(0)).mean(), effective.mean())


def _log_mean(log_weights: Array) -> Array:
    """The log of the weights' mean by the jackknife, draws first: a bias of order 1/L² is left in place of 1/L."""
    num = len(log_weights)
    if num == 1:
        return log_weights[0]
    others = jnp.where(jnp.eye(num, dtype=bool)[..., None], -jnp.inf, log_weights)  # without the i-th
    without = jax.nn.logsumexp(others, axis=1) - math.log(num - 1)
    return num * (jax.nn.logsumexp(log_weights, axis=0) - math.log(num)) - (num - 1) * without.mean(0)


def _judged(before: _Compared, after: _Compared | None, num_fit: int, strategy: Any) -> tuple[bool | None, str]:
    error, noise = before.error()
    rough = " (roughly: few of the guide's draws count)" if before.effective < FEW else ""
    if math.isnan(error):
        return None, f"No gradient is told from noise in {before.num} steps{rough}: the model stands still."
    if error <= max(FINE, 2 * noise):
        if noise > ROUGH:
            return None, f"The hypergradient's error is not told from noise in {before.num} steps: give more num_draws."
        return True, f"The hypergradient is right to within {max(error, 2 * noise):.0%}{rough}."
    start, name = f"The hypergradient is {error:.0%} off{rough}", type(strategy).__name__
    if after is None:
        return False, f"{start}; num_fit=0 leaves open whether the guide or {name} is to blame."
    later, noise_later = after.error()
    if not later > max(0.5 * error, FINE, 2 * noise_later):
        return False, (
            f"{start}, for the guide lags behind the model: where that stands still for {num_fit} steps it is "
            f"{0 if math.isnan(later) else later:.0%}. Take more inner steps (num_inner_steps), a higher rate in "
            "inner_optim, or a lower one in optim."
        )
    start = f"{start}, and where the model stands still {later:.0%}"
    if after.gap > NEAR:
        return False, (
            f"{start}: the guide stays {after.gap:.2g} nats from the posterior. Give it a richer family or network, or "
            "more inner steps."
        )
    start = f"{start}, though the guide is fitted ({max(after.gap, 0):.1g} nats from the posterior)"
    if isinstance(strategy, Exact | Functional):
        return False, f"{start}: {name} takes it for the posterior, to the slope. Take hypergradient=Implicit(20)."
    return False, f"{start}: {name} does not solve the inner problem. Take hypergradient=None, which chooses."
