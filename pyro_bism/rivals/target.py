"""What a rival learns: the model, and its marginal log p̃(v; θ) where the latents can be summed out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

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

    def batch(self, leaves: Sequence[Any], spec: Any) -> visible.Batch:
        """The step's batch: subsampling plates draw their rows here, once."""
        return self.pair.batch(leaves, spec, resizable=True)

    def point(self, seen: Point) -> Point:
        """A point with these visible values, its latents at zero."""
        m = len(seen[VISIBLE])
        return {**seen, **{name: torch.zeros(m, *shape, dtype=dtype) for name, (shape, dtype) in self.hidden.items()}}

    def log_prob(self, batch: visible.Batch) -> Callable[[Point], Tensor]:
        """log p̃(v; θ) of every row of a point's visible part, shape (m,): the latents summed out."""
        energy = self.energy.at(batch)
        # of no block but the latents' is a precision wanted
        hidden = [b._replace(names=tuple(n for n in b.names if n in self.hidden)) for b in energy.blocks]
        energy = replace(energy, blocks=tuple(b for b in hidden if b.names))

        def log_prob(seen: Point) -> Tensor:
            x = self.point(seen)
            if self.integral is None:
                return energy.log_joint(x)
            return self.integral(energy.density(x), x)

        return log_prob


def check_reads(energy: Energy, x: Point) -> None:
    """Checks that the energy reads every visible site.

    :raises ValueError: for one that it never reads.
    """
    moved = energies.random_points(x, energy.latents, torch.ones(()))
    before = energy.log_joint(x)
    start = 0
    for site in energy.sites:
        if site.is_discrete:
            other = {**x, site.name: moved[site.name]}
        else:
            columns = slice(start, start + visible.size(site))
            v = x[VISIBLE].clone()
            v[:, columns] = moved[VISIBLE][:, columns]
            other = {**x, VISIBLE: v}
            start = columns.stop
        if torch.equal(energy.log_joint(other), before):
            raise ValueError(
                f"The energy never reads the value of visible site '{site.name}'. Use the site's value (the argument, "
                "or what pyro.sample returns) in it."
            )
