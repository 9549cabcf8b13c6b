r"""How far the hypergradient is from the marginal's own gradient, and what to change where it is."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from ..bism import BiSM, BiSMState
from ..brief import named
from ..losses import loss_by_example
from ..programs.modes import in_own_modes
from ..programs.pair import ModelAndGuide
from ..programs.records import per_example
from ..programs.visible import Batch
from .comparison import CLOSE, PART, Compared, HypergradientError, judged
from .guide_draws import check_latents


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
    :param rng_key: a JAX random key: all that is drawn follows from it.
    :param num_draws: steps compared at most, 50 at least; it stops where the standard error is below 0.03.
    :param num_particles: L, both halves together; None takes 8, or 64 under a loss that differentiates the score.
    :param num_fit: steps that the guide is given to catch up, in fifties, each of the K of training; 0 leaves the
        second part out.
    :param progress_bar: whether to show how many steps were compared.
    :param kwargs: keyword arguments of model and guide.
    :raises ValueError: for what is no BiSM, or where the guide's density is not known.
    :raises FloatingPointError: where a gradient is not finite.
    """
    if not isinstance(trained, BiSM):
        raise ValueError(f"hypergradient_error: {named(trained)} has no hypergradient. Pass a BiSM.")
    if not isinstance(state, BiSMState):
        raise ValueError(f"hypergradient_error: {named(state)} is no state. Pass that of init(), update() or run().")
    if num_particles is None:
        num_particles = 64 if trained.loss.differentiates_score else 8
    if num_draws < 1 or num_particles < 2 or num_fit < 0:
        raise ValueError(
            f"num_draws must be at least 1, num_particles at least 2, and num_fit not negative, got {num_draws}, "
            f"{num_particles} and {num_fit}."
        )
    leaves, spec = trained._checked(args, kwargs)
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

    def compared(key: Array, state: Any, is_held: bool, bar: Any) -> tuple[Compared, Any]:
        sums: Any = None
        for key_part in jax.random.split(key, -(-num_draws // PART)):
            state, found = part(key_part, state, is_held)
            found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
            new = Compared(PART, found[0], *map(float, found[1:]))
            sums = new if sums is None else sums.plus(new)
            sums.require_finite()
            bar.update(PART)
            if sums.error()[1] < CLOSE:  # not where there is none
                break
        return sums, state

    with tqdm(disable=not progress_bar, desc="hypergradient", unit="step") as bar:
        before, later = compared(keys[0], state, False, bar)
        for _ in range(-(-num_fit // PART)):  # the same program: another one's compilation would take longer
            later, _ = part(keys[1], later, True)
        after = compared(keys[2], later, True, bar)[0] if num_fit else None
    return judged(before, after, num_fit, trained.hypergradient)


def _stepped(trained: BiSM, state: Any, leaves: Any, spec: Any, is_held: Array) -> Any:
    """The state after a step of training, or of training with the model held where it is."""
    new, _, _ = trained._update(state, leaves, spec)
    held = jax.tree.map(lambda a, b: jnp.where(is_held, a, b), state.optim_state, new.optim_state)
    return new._replace(optim_state=held)


def _comparing(trained: BiSM, leaves: Any, spec: Any, num_particles: int) -> Callable[[Array, Any], Any]:
    """Both gradients at a state, on a batch of their own: what :class:`Compared` sums, ``num`` left out."""
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
        moments = jax.tree.map(lambda d, r: jnp.stack([d, r, d**2, r**2]), difference, reference)
        return moments, gap, effective

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
    pair: ModelAndGuide,
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

    def draw(key: Array) -> Any:
        values, keys = pair.draw_discrete(key, fixed, batch, v)
        sites = pair.guide_at(key_guide, fixed, batch, v, values, keys, discretize=True)
        check_latents(sites, n)
        # a latent that is computed from other draws (Delta) carries their change of volume
        return values, sum(per_example(site, n) for site in sites.values())

    size = num_particles // 2
    values, log_q = jax.vmap(draw)(jax.random.split(key_draws, 2 * size))
    log_q = jax.lax.stop_gradient(log_q)

    def log_weights(u: Array, given: Mapping[str, Any], part: slice) -> Array:
        some = jax.tree.map(lambda x: x[part], values)
        found: Array = jax.vmap(lambda h: pair.log_joint(key_model, given, batch, u, h))(some) - log_q[part]
        return found

    def score(u: Array) -> Array:
        def half(part: slice) -> Array:
            slope: Array = jax.grad(lambda u: _log_mean(log_weights(u, params, part)).sum())(u)
            return slope

        return jnp.stack([half(slice(size)), half(slice(size, None))])

    w = log_weights(v, fixed, slice(None))
    bound = jax.nn.logsumexp(w, 0) - math.log(2 * size)
    effective = jnp.exp(2 * jax.nn.logsumexp(w, 0) - jax.nn.logsumexp(2 * w, 0)) / (2 * size)
    return loss_by_example(loss, score, batch.v, noise).mean(), ((bound - w.mean(0)).mean(), effective.mean())


def _log_mean(log_weights: Array) -> Array:
    """The log of the weights' mean by the jackknife, draws first: a bias of order 1/L² is left in place of 1/L."""
    num = len(log_weights)
    if num == 1:
        return log_weights[0]
    others = jnp.where(jnp.eye(num, dtype=bool)[..., None], -jnp.inf, log_weights)  # without the i-th
    without = jax.nn.logsumexp(others, axis=1) - math.log(num - 1)
    return num * (jax.nn.logsumexp(log_weights, axis=0) - math.log(num)) - (num - 1) * without.mean(0)
