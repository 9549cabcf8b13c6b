r"""The guide's distributions, their parameters shifted example by example: q(h|v; λ(v; φ) + δ).

λ are the parameters of every distribution that the guide samples from, mapped to the reals as the host maps parameters
under their constraint (a Normal's scale by its logarithm). A shift δ is one number for each of them at every example,
the same at all v near by. What the inner loss does in δ is the guide's fit with the network taken away: its curvature
falls apart into the examples', and where q is the posterior it is the Fisher information of q,

.. math:: \frac{∂^2 G_i}{∂δ^2} = F(λ_i) = -E_q \frac{∂^2 \log q}{∂λ^2}.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.discrete import BernoulliProbs
from numpyro.handlers import seed
from numpyro.primitives import Messenger

from .densities import Pair, Site, record
from .distributions import (
    AveragedBernoulli,
    AveragedOneHot,
    ConcreteBernoulli,
    ConcreteOneHot,
    base_of,
    rebuild,
    unmasked,
)
from .divergences import FisherDivergence
from .hypergradients import Shifted
from .losses import OuterLoss
from .visible import Batch

__all__ = ["shifted_losses"]

FIXED = ("temperature", "total_count")  # of a distribution's arguments: no part of what the guide learns
LEAST = 1e-3  # of p(1 - p), and of p: a relaxed unit that is all but certain gives next to no draws to learn from

Shifts = Mapping[tuple[str, str], Array]  # by site and parameter


def shifted_losses(
    rng_key: Array,
    pair: Pair,
    params: Callable[[Any], Mapping[str, Any]],
    batch: Batch,
    loss: OuterLoss,
    inner_loss: Callable,
    theta: Any,
) -> Shifted:
    """J and G on one perturbed batch as functions of (θ, δ).

    :param params: what the programs are given, as a function of θ.
    :raises ValueError: where the guide has a site whose distribution can't be shifted.
    """
    if pair.change is not None:
        raise ValueError(
            f"Functional() shifts the distributions that the guide samples from; {sorted(pair.change.computed)} are "
            "computed from other draws and have a density of their own. Take hypergradient=Amortized()."
        )
    if isinstance(inner_loss, FisherDivergence):
        raise ValueError(
            "Functional() takes the inner loss's curvature in units of the Fisher information, which that of "
            "FisherDivergence() is not. Take an ELBO as inner_loss, or hypergradient=Implicit()."
        )
    key_noise, key_guide, key_outer = jax.random.split(rng_key, 3)
    noise = loss.draw(key_noise, batch.v)
    v = loss.perturb(batch.v, noise)
    args, kwargs = batch.arguments(v)
    with seed(rng_seed=key_guide), record(params(theta), batch.indices) as run:
        pair.guide(*args, **kwargs)
    sites = {name: site for name, site in run.sites.items() if not site.is_observed}
    for site in sites.values():
        _require_plain(site)
    at = {(name, k): x for name, site in sites.items() for k, x in _parameters(name, site.fn).items()}
    zeros = jax.tree.map(jnp.zeros_like, at)
    axes = {name: _axis(site, pair.data_plates, len(v)) for name, site in sites.items()}

    def dot(x: Shifts, y: Shifts) -> Array:
        parts = [jnp.moveaxis(x[key] * y[key], axes[key[0]], 0).reshape(len(v), -1).sum(-1) for key in x]
        return sum(parts[1:], parts[0])

    def scaled(weights: Array, x: Shifts) -> Shifts:
        return {key: value * weights.reshape(-1, *[1] * (value.ndim - axes[key[0]] - 1)) for key, value in x.items()}

    def natural(x: Shifts) -> Shifts:
        return {key: len(v) * _natural(base_of(sites[key[0]].fn), key[1], value) for key, value in x.items()}

    def with_shifts(shifts: Shifts) -> Pair:
        return replace(pair, guide=_shifting(pair.guide, shifts))

    def outer(theta: Any, shifts: Shifts) -> Array:
        return with_shifts(shifts).outer_loss(key_outer, params(theta), batch, loss, noise)

    def inner(rng_key: Array, theta: Any, shifts: Shifts) -> Array:
        return inner_loss(rng_key, with_shifts(shifts), params(theta), batch, v)

    relaxed = frozenset(pair.softened.difference(pair.averaged))
    return Shifted(zeros, outer, inner, natural, dot, scaled, relaxed, bool(pair.sampled))


class _Shift(Messenger):
    def __init__(self, shifts: Shifts):
        super().__init__()
        self.sites = {name: {k: x for (site, k), x in shifts.items() if site == name} for name, _ in shifts}

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and not msg["is_observed"] and msg["name"] in self.sites:
            msg["fn"] = _moved(msg["name"], msg["fn"], self.sites[msg["name"]])


def _shifting(guide: Callable, shifts: Shifts) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _Shift(shifts):
            return guide(*args, **kwargs)

    return run


def _require_plain(site: Site) -> None:
    """:raises ValueError: where a scale or a mask of the user's lies over a site: G's curvature is not F then."""
    scale: Any = 1.0 if site.scale is None else site.scale
    for frame in site.frames:
        full_size, size = site.plates[frame.name]
        scale = scale * (size / full_size)
    is_scaled = not (isinstance(scale, int | float) and abs(scale - 1) < 1e-6)
    if is_scaled or unmasked(site.fn) is not site.fn:
        raise ValueError(
            f"Functional(): guide site '{site.name}' stands under a scale or a mask: the inner loss's curvature is not "
            "the Fisher information of its distribution then. Take it off, or take hypergradient=Amortized()."
        )


def _free(name: str, base: Any) -> dict[str, Any]:
    """The map from the reals of every parameter that can be shifted, and its constraint.

    :raises ValueError: for a distribution whose Fisher information is not known here.
    """
    if type(base) not in _FAMILIES:
        raise ValueError(_refusal(name, base))
    return {k: (biject_to(c), c) for k, c in _arguments(base).items() if k not in FIXED}


def _arguments(base: Any) -> dict[str, Any]:
    """The arguments that make the distribution, with their constraints; none of two that say the same."""
    found = base.arg_constraints
    return {k: c for k, c in found.items() if not (k == "probs" and "logits" in found)}


def _refusal(name: str, base: Any) -> str:
    return (
        "Functional() shifts the parameters of the distributions that the guide samples from, in units of their Fisher "
        "information, which it knows of normal, log-normal, Bernoulli and categorical ones (logits), and of relaxed "
        f"bits and classes; site '{name}' is a {type(base).__name__}. Take hypergradient=Amortized()."
    )


def _spread(fn: Any, base: Any, value: Array, constraint: Any) -> Array:
    """A parameter of the base with one entry for every one of its variables, none shared."""
    own = value.shape[value.ndim - constraint.event_dim :]
    return jnp.broadcast_to(value, (*_shape(fn, base), *own))


def _shape(fn: Any, base: Any) -> tuple[int, ...]:
    """Of the base's variables."""
    return (*fn.batch_shape, *fn.event_shape[: fn.event_dim - base.event_dim])


def _parameters(name: str, fn: Any) -> dict[str, Array]:
    """λ, mapped to the reals."""
    base = base_of(fn)
    free = _free(name, base)
    return {k: to.inv(_spread(fn, base, jnp.asarray(getattr(base, k)), c)) for k, (to, c) in free.items()}


def _moved(name: str, fn: Any, shift: Mapping[str, Array]) -> Any:
    """``fn`` at λ + δ."""
    base = base_of(fn)
    given = {k: jnp.asarray(getattr(base, k)) for k in _arguments(base)}
    for k, (transform, constraint) in _free(name, base).items():
        value = _spread(fn, base, given[k], constraint)
        # a real parameter's way there and back would only cost time
        is_real = constraint in (constraints.real, constraints.real_vector)
        given[k] = value + shift[k] if is_real else transform(transform.inv(value) + shift[k])
    return rebuild(fn, lambda base: type(base)(**given, validate_args=False))


def _natural(base: Any, name: str, x: Array) -> Array:
    """F(λ)⁻¹ x of one parameter."""
    if isinstance(base, _BITS):
        p = jax.nn.sigmoid(base.logits)
        return x / jnp.maximum(p * (1 - p), LEAST)
    if isinstance(base, _CLASSES):  # F = diag(p) - ppᵀ, and x is orthogonal to its null space
        return x / jnp.maximum(jax.nn.softmax(base.logits, -1), LEAST)
    return x * jnp.square(base.scale) if name == "loc" else x / 2


_BITS = ConcreteBernoulli, AveragedBernoulli, dist.BernoulliLogits, BernoulliProbs
_CLASSES = ConcreteOneHot, AveragedOneHot, dist.CategoricalLogits, dist.MultinomialLogits
_FAMILIES = {*_BITS, *_CLASSES, dist.Normal, dist.LogNormal}


def _axis(site: Site, plates: Collection[str], n: int) -> int:
    """Along which axis of the parameters the examples stand."""
    shape = _shape(site.fn, base_of(site.fn))
    dims = [frame.dim for frame in site.frames if frame.name in plates]
    axis = len(site.fn.batch_shape) + dims[0] if dims else 0
    if not 0 <= axis < len(shape) or shape[axis] != n:
        raise ValueError(
            f"Functional() needs an entry for every example in the guide's site '{site.name}', whose distributions are "
            f"of shape {shape}. Take hypergradient=Amortized()."
        )
    return axis
