r"""The guide's distributions, their parameters shifted example by example: q(h|v; λ(v; φ) + δ).

λ are the parameters of every distribution that the guide samples from, mapped to the reals by the host's own bijection
of their support (a Normal's scale by its logarithm). A shift δ is one number for each of them at every example, the
same at all v near by. What the inner loss does in δ is the guide's fit with the network taken away: its curvature
falls apart into the examples', and where q is the posterior it is the Fisher information of q,

.. math:: \frac{∂^2 G_i}{∂δ^2} = F(λ_i) = -E_q \frac{∂^2 \log q}{∂λ^2}.
"""

from collections.abc import Callable, Mapping
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
from .distributions import AveragedBernoulli, ConcreteBernoulli, base_of
from .hypergradients import Shifted
from .losses import OuterLoss
from .visible import Batch

__all__ = ["shifted_losses"]

FIXED = ("temperature", "total_count")  # of a distribution's arguments: no part of what the guide learns
LEAST = 1e-3  # of p(1 - p), and of p: a relaxed unit that is all but certain gives next to no draws to learn from

Shifts = Mapping[str, Mapping[str, Array]]  # by site and parameter


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
    key_noise, key_guide, key_outer = jax.random.split(rng_key, 3)
    noise = loss.draw(key_noise, batch.v)
    v = loss.perturb(batch.v, noise)
    args, kwargs = batch.arguments(v)
    with seed(rng_seed=key_guide), record(params(theta), batch.indices) as run:
        pair.guide(*args, **kwargs)
    sites = {name: site for name, site in run.sites.items() if not site.is_observed}
    zeros = {name: jax.tree.map(jnp.zeros_like, _parameters(name, site.fn)) for name, site in sites.items()}
    axes = {name: _axis(site, len(v)) for name, site in sites.items()}

    def by_example(name: str, x: Array) -> Array:
        return jnp.moveaxis(x, axes[name], 0).reshape(len(v), -1)

    def dot(x: Shifts, y: Shifts) -> Array:
        parts = [by_example(s, x[s][k] * y[s][k]).sum(-1) for s in x for k in x[s]]
        return sum(parts[1:], parts[0])

    def scaled(weights: Array, x: Shifts) -> Shifts:
        def along(name: str, value: Array) -> Array:
            return value * weights.reshape(-1, *[1] * (value.ndim - axes[name] - 1))

        return {name: {k: along(name, value) for k, value in each.items()} for name, each in x.items()}

    def natural(x: Shifts) -> Shifts:
        return {s: {k: len(v) * y for k, y in _natural(base_of(sites[s].fn), x[s]).items()} for s in x}

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
        self.shifts = shifts

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and not msg["is_observed"] and msg["name"] in self.shifts:
            msg["fn"] = _moved(msg["name"], msg["fn"], self.shifts[msg["name"]])


def _shifting(guide: Callable, shifts: Shifts) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _Shift(shifts):
            return guide(*args, **kwargs)

    return run


def _free(name: str, base: Any) -> dict[str, Any]:
    """The constraint of every parameter that can be shifted."""
    if isinstance(base, dist.Delta | dist.TransformedDistribution) and type(base) is not dist.LogNormal:
        raise ValueError(_refusal(name, base))
    found = {k: c for k, c in base.arg_constraints.items() if k in vars(base) and k not in FIXED}
    if not found:
        raise ValueError(_refusal(name, base))
    return found


def _refusal(name: str, base: Any) -> str:
    return (
        f"Functional() shifts the parameters of the distributions that the guide samples from, and knows none of site "
        f"'{name}' ({type(base).__name__}). Take hypergradient=Amortized()."
    )


def _spread(fn: Any, base: Any, value: Array, constraint: Any) -> Array:
    """A parameter of the base with one entry for every one of its variables, none shared."""
    num_events = fn.event_dim - base.event_dim
    batch = fn.batch_shape + fn.event_shape[:num_events]
    value = jnp.asarray(value)
    own = value.shape[value.ndim - constraint.event_dim :]
    return jnp.broadcast_to(value, batch + own)


def _parameters(name: str, fn: Any) -> dict[str, Array]:
    """λ, mapped to the reals."""
    base = base_of(fn)
    free = _free(name, base)
    return {k: biject_to(c).inv(_spread(fn, base, getattr(base, k), c)) for k, c in free.items()}


def _moved(name: str, fn: Any, shift: Mapping[str, Array]) -> Any:
    """``fn`` at λ + δ."""
    base, mask = base_of(fn), _mask(fn)
    given = {k: getattr(base, k) for k in base.arg_constraints if k in vars(base)}
    for k, constraint in _free(name, base).items():
        transform = biject_to(constraint)
        value = _spread(fn, base, given[k], constraint)
        # a real parameter's way there and back would only cost time
        is_real = constraint in (constraints.real, constraints.real_vector)
        given[k] = value + shift[k] if is_real else transform(transform.inv(value) + shift[k])
    try:
        moved = type(base)(**given)
    except TypeError as error:
        raise ValueError(_refusal(name, base)) from error
    moved = moved.to_event(fn.event_dim - base.event_dim)
    return moved if mask is None else moved.mask(mask)


def _mask(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            return fn._mask
        fn = fn.base_dist
    return None


def _natural(base: Any, x: Mapping[str, Array]) -> dict[str, Array]:
    """F(λ)⁻¹ x, where F is known and easily inverted; else x."""

    def solved(name: str, value: Array) -> Array:
        if name in ("logits", "probs") and isinstance(base, _BITS):
            p = jax.nn.sigmoid(base.logits)
            return value / jnp.maximum(p * (1 - p), LEAST)
        if name == "logits":  # F = diag(p) - ppᵀ, and x is orthogonal to its null space
            return value / jnp.maximum(jax.nn.softmax(base.logits, -1), LEAST)
        if isinstance(base, dist.MultivariateNormal) and name == "loc":
            return (base.scale_tril @ (jnp.swapaxes(base.scale_tril, -1, -2) @ value[..., None]))[..., 0]
        if isinstance(base, dist.Normal | dist.LogNormal):
            return value * jnp.square(base.scale) if name == "loc" else value / 2
        return value

    return {name: solved(name, value) for name, value in x.items()}


_BITS = ConcreteBernoulli, AveragedBernoulli, dist.BernoulliLogits, BernoulliProbs


def _axis(site: Site, n: int) -> int:
    """Along which axis of the parameters the examples stand."""
    base = base_of(site.fn)
    shape = site.fn.batch_shape + site.fn.event_shape[: site.fn.event_dim - base.event_dim]
    dims = [frame.dim for frame in site.frames]
    axis = len(site.fn.batch_shape) + min(dims) if dims else 0
    if not 0 <= axis < len(shape) or shape[axis] != n:
        raise ValueError(
            f"Functional() needs an entry for every example in the guide's site '{site.name}', whose distributions are "
            f"of shape {shape}. Take hypergradient=Amortized()."
        )
    return axis
