"""The score ∇_v log p(v) of what was learnt, its use as a denoiser, and how it is found."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from .. import losses
from ..bism import BiSM
from ..energies import VISIBLE, Density, Integral, Point
from ..programs.modes import in_own_modes
from ..programs.pair import Draw
from ..programs.visible import Batch
from .noise import noise_scale
from .normalizer import energy_of


@in_own_modes
def score(trained: Any, state: Any, *args: Any, rng_key: Array, num_draws: int = 100, **kwargs: Any) -> Any:
    r"""The score :math:`\nabla_v \log p(v)` of every row, of the shape of the visible site's value.

    It needs no normaliser. Exact where the latents can be summed out, else a mean over the guide's draws,
    :math:`E_{q(h|v)} \nabla_v[\log\tilde p(v, h) - \log q(h|v)]` (Bao et al. 2021), exact if q is the posterior. It is
    taken at the rows as they are; after denoising score matching it is that of *noisy* data's density.

    :param trained: a BiSM or a rival.
    :param state: its state.
    :param args: arguments of model and guide, v among them.
    :param rng_key: a JAX random key, for draws of the guide and of a subsampling plate.
    :param num_draws: of h, if the guide is needed.
    :param kwargs: keyword arguments of model and guide.
    :returns: with several continuous visible sites, a mapping from their names.
    :raises ValueError: where neither a sum nor a guide is within reach.
    """
    found = score_at(trained, state, args, kwargs, rng_key, num_draws)
    return _by_site(found.sites, found.score)


@in_own_modes
def denoise(
    trained: Any,
    state: Any,
    *args: Any,
    rng_key: Array,
    noise: float | str = "loss",
    num_draws: int = 100,
    **kwargs: Any,
) -> Any:
    r"""The posterior mean of clean data given noisy ones: Tweedie's formula, :math:`v + \sigma^2 \nabla_v \log p(v)`.

    For noisy v = x + σε and p the density of such v, as denoising score matching learns it, this is E[x | v] (Robbins
    1956; Efron 2011), the best guess in the mean square. The score is :func:`score`'s.

    :param trained: a BiSM or a rival.
    :param state: its state.
    :param args: arguments of model and guide, the *noisy* v among them.
    :param rng_key: a JAX random key, for draws of the guide and of a subsampling plate.
    :param noise: σ of the noise in v: "loss" takes the outer loss's, ``sigma`` or, of the multiscale one, ``sigma0``;
        or a number.
    :param num_draws: of h, if the guide is needed.
    :param kwargs: keyword arguments of model and guide.
    :returns: of the shape of the visible site's value; with several sites, a mapping from their names.
    :raises ValueError: where the outer loss has no σ, and none is given.
    """
    sigma = noise_scale(trained, noise)
    if sigma is None:
        raise ValueError(
            f"denoise: {type(getattr(trained, 'loss', trained)).__name__} has no noise of its own. Say how much there "
            "is in the data, noise=σ."
        )
    found = score_at(trained, state, args, kwargs, rng_key, num_draws)
    return _by_site(found.sites, found.v + sigma**2 * found.score)


def _by_site(sites: Any, v: Any) -> Any:
    """Columns side by side as the sites' values; of one site, its value."""
    found, start = {}, 0
    for site in sites:
        if not site.is_discrete:
            size = math.prod(site.shape[1:])
            found[site.name] = v[:, start : start + size].reshape(len(v), *site.shape[1:])
            start += size
    return next(iter(found.values())) if len(found) == 1 else found


class ScoreAt(NamedTuple):
    """The score at the rows of the data.

    :ivar v: the continuous visible values, all sites side by side, (n, D).
    :ivar score: ∇_v log p(v) at them, (n, D).
    :ivar method: "exact", or "guide" where it is a mean over the guide's draws.
    :ivar sites: the visible sites.
    """

    v: Array
    score: Array
    method: str
    sites: Any


def score_at(trained: Any, state: Any, args: Any, kwargs: Any, rng_key: Array, num_draws: int) -> ScoreAt:
    r"""v and ∇_v log p(v) of every row, (n, D): exact where the latents can be summed, else a mean over guide draws.

    The latter is :math:`E_{q(h|v)} \nabla_v[\log\tilde p(v, h) - \log q(h|v)]` (Bao et al. 2021), exact if q is the
    posterior.
    """
    density, x, integral = summable(trained, state, args, kwargs, rng_key)
    if integral is not None:
        v = x[VISIBLE]
        found = jax.jit(jax.grad(lambda v: integral(density, {**x, VISIBLE: v}).sum()))(v)
        return ScoreAt(v, found, "exact", density.energy.sites)
    batch, draw, score = guide_score(trained, state, args, kwargs, rng_key, losses.ScoreMatching(), None)

    @jax.jit
    def mean(keys: Array) -> Array:
        found: Array = jax.lax.map(lambda key: score(draw(key))(batch.v), keys).mean(0)
        return found

    return ScoreAt(batch.v, mean(jax.random.split(rng_key, num_draws)), "guide", batch.sites)


def summable(trained: Any, state: Any, args: Any, kwargs: Any, rng_key: Array) -> tuple[Density, Point, Any]:
    """The density, a point, and the sum over the latents if gradients can go through it; else None."""
    energy, params, x = energy_of(trained, state, args, kwargs, rng_key)
    density = energy.density(params, x)
    try:
        integral = Integral.over_variables(density, x, energy.hidden)
    except ValueError:
        integral = None
    integral = None if integral is None or integral.quadrature else integral
    if integral is None and not isinstance(trained, BiSM):
        raise ValueError("The score takes a sum over latents that is out of reach, and there is no guide to draw them.")
    return density, x, integral


def guide_score(
    trained: BiSM, state: Any, args: Any, kwargs: Any, rng_key: Array, loss: Any, num_draws: int | None
) -> tuple[Batch, Callable[[Array], Draw], Callable[[Draw], Callable[[Array], Array]]]:
    """The batch; a draw of the guide by key; and the score function given draws, ``num_draws`` of them stacked."""
    leaves, spec = trained._checked(args, kwargs)
    pair = trained.evaluated_pair(leaves, spec)
    params = pair.params(*trained._unpack(pair, state), state.mutable_state)
    key_batch, key_score = jax.random.split(rng_key)
    batch = pair.batch(key_batch, leaves, spec)

    def draw(key: Array) -> Draw:
        return pair.draw(key, params, batch, batch.v)[0]

    def score(draws: Draw) -> Callable[[Array], Array]:
        return pair.score(key_score, params, batch, draws, loss, num_draws)

    return batch, draw, score
