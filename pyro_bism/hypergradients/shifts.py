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

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import transform_to

from ..distributions import (
    AveragedBernoulli,
    AveragedOneHot,
    ConcreteBernoulli,
    ConcreteOneHot,
    base_of,
    rebuild,
    unmasked,
)
from ..divergences import InnerLoss
from ..losses import OuterLoss
from ..programs.pair import ModelAndGuide
from ..programs.params import jittered, unmoved_buffers
from ..programs.records import SiteRecord, is_enumerated, record
from ..programs.visible import Batch
from .problem import Shifted

__all__ = ["require_shiftable", "shifted_losses"]

FIXED = ("temperature", "total_count")  # of a distribution's arguments: no part of what the guide learns
LEAST = 1e-3  # of p(1 - p), and of p, of relaxed units: one that is all but certain has next to no draws to learn from
NEAR = 0.01  # of the data: a guide that takes a logarithm of v must not be sent below zero for it

Shifts = Mapping[tuple[str, str], Tensor]  # by site and parameter


def require_shiftable(
    pair: ModelAndGuide, batch: Batch, inner_loss: Callable[..., Tensor]
) -> frozenset[tuple[str, str]]:
    """The parameters of the guide's distributions that δ shifts, by site and name: those that φ reaches.

    The guide runs three times, and leaves no trace. To be called inside of :func:`params.jittered`: what weights of
    zero keep from the distributions would not be seen.

    :raises ValueError: where ``Functional`` has no right value.
    """
    if not pair.phi:  # ∂J/∂θ is the whole gradient then, whatever the guide is
        return frozenset()
    _require_kind(pair, inner_loss)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), pyro.validation_enabled(False), pyro.poutine.block():
        v = batch.v + NEAR * torch.randn_like(batch.v)  # of the data themselves a zero would hide a weight

        def look(index: int = 0) -> dict[str, SiteRecord]:
            with unmoved_buffers(pair.buffers):  # those that move at every pass would tell of draws
                return _sites(pair, batch, v, index)

        sites, again = look(), look(-1)
        axes = _require_sites(sites, pair, len(v))
        at = _learnt(sites)
        _require_same(at, _learnt(again))
        with jittered(list(pair.phi.values())):
            moved = _learnt(look())
    # to the last bit: a parameter that moves a little is better shifted than taken for a constant
    return frozenset(key for key, x in at.items() if _is_reached(key, (x != moved[key]).any(axes[key[0]])))


def _require_kind(pair: ModelAndGuide, inner_loss: Callable[..., Any]) -> None:
    if pair.change is not None:
        raise ValueError(
            f"Functional() shifts the distributions that the guide samples from; {sorted(pair.change.computed)} are "
            "computed from other draws and have a density of their own. Take hypergradient=Amortized()."
        )
    if isinstance(inner_loss, InnerLoss):
        raise ValueError(
            "Functional() takes the inner loss's curvature in units of the Fisher information, which that of "
            f"{type(inner_loss).__name__}() is not. Take an ELBO as inner_loss, or hypergradient=Implicit()."
        )


def _require_sites(sites: Mapping[str, SiteRecord], pair: ModelAndGuide, n: int) -> dict[str, int]:
    """Along which axis of each site's parameters the examples stand."""
    if not sites:
        raise ValueError(
            "Functional() shifts the distributions that the guide samples from, but this guide samples nothing, though "
            f"it has parameters: {sorted(pair.phi)}. Take hypergradient=Amortized()."
        )
    for name, site in sites.items():
        _free(name, base_of(site.fn))
        _require_plain(site)
    return {name: _axis(site, pair.data_plates, n) for name, site in sites.items()}


def _require_same(at: Shifts, again: Shifts) -> None:
    """Checks that the distributions are the same at other draws.

    :raises ValueError: where one is another.
    """
    for key in sorted({*at, *again}):
        x, y = at.get(key), again.get(key)
        if x is not None and y is not None and x.shape == y.shape and not bool(_differ(x, y).any()):
            continue
        raise ValueError(
            f"Functional() moves each of the guide's distributions by one shift an example: that of site '{key[0]}' "
            "depends on other draws of the guide (another site's value, or dropout), and one shift can't stand for all "
            "of them. Take hypergradient=Amortized()."
        )


def _is_reached(key: tuple[str, str], moves: Tensor) -> bool:
    """Whether φ moves a parameter, from whether it moves its entries, at any of the examples.

    :raises ValueError: where it moves some of them.
    """
    if bool(moves.any()) and not bool(moves.all()):
        raise ValueError(
            f"Functional() shifts all entries of a distribution's parameter or none: of '{key[1]}' of the guide's site "
            f"'{key[0]}' some are constants that no parameter of the guide moves, others not. Take "
            "hypergradient=Amortized(), or compute all of them from the guide's parameters."
        )
    return bool(moves.any())


def _learnt(sites: Mapping[str, SiteRecord]) -> dict[tuple[str, str], Tensor]:
    """λ of all sites, as far as the distributions depend on it: of the logits of classes their differences."""
    found = {}
    for name, site in sites.items():
        is_class = isinstance(base_of(site.fn), _CLASSES)
        for k, x in _parameters(name, site.fn).items():
            if k == "scale_tril":
                rows, columns = torch.tril_indices(*x.shape[-2:])
                x = x[..., rows, columns]
            found[name, k] = x.log_softmax(-1) if is_class else x
    return found


def _differ(x: Tensor, y: Tensor) -> Tensor:
    """Entry by entry, beyond rounding."""
    tolerance = torch.finfo(x.dtype).eps ** 0.75
    return ~torch.isclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


def shifted_losses(pair: ModelAndGuide, batch: Batch, loss: OuterLoss, inner_loss: Callable[..., Tensor]) -> Shifted:
    """J and G on one perturbed batch as functions of δ, of a pair that :func:`require_shiftable` has seen."""
    noise = loss.draw(batch.v)
    v = loss.perturb(batch.v, noise)
    with torch.no_grad():
        sites = _sites(pair, batch, v)
    at = {(name, k): x for name, site in sites.items() for k, x in _parameters(name, site.fn).items()}
    if pair.shiftable is not None:
        at = {key: x for key, x in at.items() if key in pair.shiftable}
    zeros = {key: torch.zeros_like(x).requires_grad_() for key, x in at.items()}
    axes = {name: _axis(sites[name], pair.data_plates, len(v)) for name, _ in at}

    def dot(x: Shifts, y: Shifts) -> Tensor:
        parts = [torch.moveaxis(x[key] * y[key], axes[key[0]], 0).reshape(len(v), -1).sum(-1) for key in x]
        total: Tensor = sum(parts[1:], parts[0])
        return total

    def scaled(weights: Tensor, x: Shifts) -> Shifts:
        return {key: value * weights.reshape(-1, *[1] * (value.ndim - axes[key[0]] - 1)) for key, value in x.items()}

    def natural(x: Shifts) -> Shifts:
        return {key: len(v) * _natural(base_of(sites[key[0]].fn), key[1], value) for key, value in x.items()}

    def with_shifts(shifts: Shifts) -> ModelAndGuide:
        return replace(pair, guide=_shifting(pair.guide, shifts))

    def outer(shifts: Shifts) -> Tensor:
        return with_shifts(shifts).outer_loss(batch, loss, noise)

    def inner(shifts: Shifts) -> Tensor:
        return inner_loss(with_shifts(shifts), batch, v)

    relaxed = frozenset(pair.relaxed_sites.difference(pair.averaged))
    return Shifted(zeros, outer, inner, natural, dot, scaled, relaxed, bool(pair.sampled))


def _sites(pair: ModelAndGuide, batch: Batch, v: Tensor, index: int = 0) -> dict[str, SiteRecord]:
    """What the guide samples at v; each summed-out site has the value of its support at ``index``."""
    args, kwargs = batch.arguments(v)
    with record(batch.indices) as run, _Summed(index):
        pair.guide(*args, **kwargs)
    return {name: site for name, site in run.sites.items() if not site.is_observed}


class _Summed(Messenger):
    """Gives summed-out sites one of their values: a captured step would keep their draws, which nobody reads."""

    def __init__(self, index: int):
        super().__init__()
        self.index = index

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and is_enumerated(msg["infer"]):
            msg["value"], msg["done"] = msg["fn"].enumerate_support(expand=True)[self.index], True


class _Shift(Messenger):
    def __init__(self, shifts: Shifts):
        super().__init__()
        self.sites = {name: {k: x for (site, k), x in shifts.items() if site == name} for name, _ in shifts}

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["name"] in self.sites:
            msg["fn"] = _moved(msg["name"], msg["fn"], self.sites[msg["name"]])


def _shifting(guide: Callable[..., Any], shifts: Shifts) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _Shift(shifts):
            return guide(*args, **kwargs)

    return run


def _require_plain(site: SiteRecord) -> None:
    """Checks that no scale and no mask of the user's lies over a site: G's curvature is not F then.

    :raises ValueError: where one does.
    """
    scale: Any = site.scale
    for frame in site.frames:
        scale = scale * (frame.size / frame.full_size)
    if (
        not (isinstance(scale, int | float) and abs(scale - 1) < 1e-6)
        or unmasked(site.fn) is not site.fn
        or site.mask is not None
    ):
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
    return {k: (transform_to(c), c) for k, c in _arguments(base).items() if k not in FIXED}


def _arguments(base: Any) -> dict[str, Any]:
    """The arguments that make the distribution, with their constraints; none of two that say the same."""
    found = base.arg_constraints
    again = ("covariance_matrix", "precision_matrix") if "scale_tril" in found else ("probs",) * ("logits" in found)
    return {k: c for k, c in found.items() if k not in again}


def _refusal(name: str, base: Any) -> str:
    return (
        "Functional() shifts the parameters of the distributions that the guide samples from, in units of their Fisher "
        "information, which it knows of normal, multivariate normal, log-normal, Bernoulli and categorical ones "
        f"(logits), and of relaxed bits and classes; site '{name}' is a {type(base).__name__}. Take "
        "hypergradient=Amortized()."
    )


def _spread(fn: Any, base: Any, value: Tensor, constraint: Any) -> Tensor:
    """A parameter of the base with one entry for every one of its variables, none shared."""
    own = value.shape[value.ndim - constraint.event_dim :]
    return torch.broadcast_to(value, (*_shape(fn, base), *own))


def _shape(fn: Any, base: Any) -> tuple[int, ...]:
    """Of the base's variables."""
    return (*fn.batch_shape, *fn.event_shape[: fn.event_dim - base.event_dim])


def _parameters(name: str, fn: Any) -> dict[str, Tensor]:
    """λ, mapped to the reals."""
    base = base_of(fn)
    free = _free(name, base)
    return {k: to.inv(_spread(fn, base, getattr(base, k), c)) for k, (to, c) in free.items()}


def _moved(name: str, fn: Any, shift: Mapping[str, Tensor]) -> Any:
    """``fn`` at λ + δ, see :func:`_shifted`."""
    base = base_of(fn)
    given = {k: getattr(base, k) for k in _arguments(base)}
    for k, (transform, constraint) in _free(name, base).items():
        if k not in shift:
            continue
        value = _spread(fn, base, given[k], constraint)
        # a real parameter's way there and back would only cost time
        is_real = constraint in (constraints.real, constraints.real_vector)
        free = _shifted(base, value if is_real else transform.inv(value), shift[k])
        given[k] = free if is_real else transform(free)
    return rebuild(fn, lambda base: type(base)(**given, validate_args=False))


def _shifted(base: Any, free: Tensor, shift: Tensor) -> Tensor:
    """λ + δ; of bits and classes, up to third order in δ, the logits of p + F δ.

    The slope in δ is the same, and G, seen along it, the negative entropy and an expectation that is linear in every
    unit's p: the curvature of one unit is F however far the guide is from the posterior. In logits a unit that is surer
    of itself than the posterior has a negative one, with nothing wrong in its derivative.
    """
    if isinstance(base, _BITS):
        return free + shift - 0.5 * (1 - 2 * torch.sigmoid(free)) * shift.square()
    if isinstance(base, _CLASSES):
        centred = shift - (free.softmax(-1) * shift).sum(-1, keepdim=True)
        return free + centred - 0.5 * centred.square()
    return free + shift


def _natural(base: Any, name: str, x: Tensor) -> Tensor:
    """F(λ)⁻¹ x of one parameter."""
    least = LEAST if type(base) in (ConcreteBernoulli, ConcreteOneHot) else torch.finfo(x.dtype).eps
    if isinstance(base, _BITS):
        p = torch.sigmoid(base.logits)
        return x / (p * (1 - p)).clamp_min(least)
    if isinstance(base, _CLASSES):  # F = diag(p) - ppᵀ, and x is orthogonal to its null space
        return x / base.logits.softmax(-1).clamp_min(least)
    if isinstance(base, dist.MultivariateNormal):
        return _natural_factor(base.scale_tril, x) if name == "scale_tril" else _times_covariance(base.scale_tril, x)
    return x * base.scale.square() if name == "loc" else x / 2


def _times_covariance(factor: Tensor, x: Tensor) -> Tensor:
    return (factor @ (factor.mT @ x.unsqueeze(-1))).squeeze(-1)


def _natural_factor(factor: Tensor, x: Tensor) -> Tensor:
    """F⁻¹ x of a Cholesky factor L, the logarithms of its diagonal in place of that.

    With dL = L Φ it is ½ tr (Σ⁻¹ dΣ)² = ‖Φ off its diagonal‖² + 2 ‖its diagonal‖², and ⟨x, dL⟩ = ⟨Lᵀx, Φ⟩.
    """

    def scaled(matrix: Tensor, diagonal: Tensor) -> Tensor:
        return matrix.tril(-1) + torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1) * diagonal)

    inverse = 1 / factor.diagonal(dim1=-2, dim2=-1)
    slope = scaled(x, inverse)  # in L
    return scaled(factor @ scaled(factor.mT @ slope, torch.full_like(inverse, 0.5)), inverse)


_BITS = ConcreteBernoulli, AveragedBernoulli, dist.Bernoulli
_CLASSES = ConcreteOneHot, AveragedOneHot, dist.Categorical, dist.OneHotCategorical
_FAMILIES = {*_BITS, *_CLASSES, dist.Normal, dist.LogNormal, dist.MultivariateNormal}


def _axis(site: SiteRecord, plates: Collection[str], n: int) -> int:
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
