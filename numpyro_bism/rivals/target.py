"""What a rival learns: the model, and its marginal log p̃(v; θ) where the latents can be summed out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .. import energies
from ..energies import VISIBLE, Energy, Integral, Point
from ..programs import visible
from ..programs.pair import ModelAndGuide


@dataclass(frozen=True)
class MarginalTarget:
    """What a rival learns, as the model's first run on arguments of this structure showed it.

    :ivar pair: the model, and the guide if the method has one.
    :ivar energy: tried out off the initial parameters, where a structure of zeros may pass for a simpler one.
    :ivar hidden: shape of one row, and type, of each latent.
    :ivar integral: how the latents are summed out; None if there are none.
    :ivar multilinear: the discrete visible sites in each of whose units log p̃ is affine, the others held.
    """

    pair: ModelAndGuide
    energy: Energy
    hidden: Mapping[str, tuple[tuple[int, ...], Any]]
    integral: Integral | None = None
    multilinear: tuple[str, ...] = ()

    def params(self, theta: Mapping[str, Any], mutable: Any, phi: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the programs are given, from unconstrained parameters, a method's own among them, and mutable state."""
        return self.pair.params({name: theta[name] for name in self.pair.theta}, phi or {}, mutable)

    def point(self, seen: Point) -> Point:
        """A point with these visible values, its latents at zero."""
        m = len(seen[VISIBLE])
        return {**seen, **{name: jnp.zeros((m, *shape), dtype) for name, (shape, dtype) in self.hidden.items()}}

    def log_prob(self, params: Mapping[str, Any], batch: visible.Batch) -> Callable[[Point], Array]:
        """log p̃(v; θ) of every row of a point's visible part, shape (m,): the latents summed out."""
        energy = self.energy.at(batch)
        # of no block but the latents' is a precision wanted
        hidden = [b._replace(names=tuple(n for n in b.names if n in self.hidden)) for b in energy.blocks]
        energy = replace(energy, blocks=tuple(b for b in hidden if b.names))

        def log_prob(seen: Point) -> Array:
            x = self.point(seen)
            if self.integral is None:
                return energy.log_joint(params, x)
            return self.integral(energy.density(params, x), x)

        return log_prob


def check_reads(energy: Energy, params: Mapping[str, Any], x: Point, rng_key: Array) -> None:
    """Checks that the energy reads every visible site.

    :raises ValueError: for one that it never reads.
    """

    moved = energies.random_points(rng_key, x, energy.latents, np.ones(()))

    @jax.jit  # one compilation instead of one for every operation
    def moves() -> list[Array]:
        """log p̃ as it is, and with each site in turn at other values."""
        found, start = [x], 0
        for site in energy.sites:
            if site.is_discrete:
                found.append({**x, site.name: moved[site.name]})
            else:
                columns = slice(start, start + visible.size(site))
                found.append({**x, VISIBLE: x[VISIBLE].at[:, columns].set(moved[VISIBLE][:, columns])})
                start = columns.stop
        return [energy.log_joint(params, point) for point in found]

    before, *others = moves()
    for site, log_prob in zip(energy.sites, others, strict=True):
        if bool((log_prob == before).all()):
            raise ValueError(
                f"The energy never reads the value of visible site '{site.name}'. Use the site's value (the argument, "
                "or what numpyro.sample returns) in it."
            )
