"""Persistent variational inference: a posterior over the parameters of a model without a normaliser."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from ..distributions import base_of
from ..energies import Energy, Point, select
from ..programs.modes import in_own_modes
from ..programs.pair import ModelAndGuide
from ..programs.records import SiteRecord, record, replay
from ..programs.visible import Batch
from ..sampling.kernels import Kernel, require_kernel
from ..training.runaways import Watch, Words
from .cd import advance, draw_hidden
from .rival import Rival
from .target import MarginalTarget

__all__ = ["PersistentVI"]


class PersistentVI(Rival):
    r"""Variational inference of θ with persistent chains (Ingraham and Marks 2017, arXiv:1602.03807).

    θ are the model's own ``sample`` sites outside the data plate, with their priors; the guide is q(θ; φ). Of

    .. math:: E_{q(θ)}\Big[\sum_i \log \tilde p(v_i; θ) - N \log Z(θ) + \log p(θ) - \log q(θ; φ)\Big]

    the gradient is taken along reparameterised draws of θ, that of log Z being the mean of
    :math:`\nabla_θ \log \tilde p` over chains that go on from step to step and follow the θ drawn. A horseshoe or any
    other scale mixture is written as the model writes it: centred, or not, with the scales as sites (the paper's
    "fadeout" is a mean-field guide over the product's factors in the non-centred form).

    N is the data plate's full size: minibatches come from a subsampling plate, or the prior would count at each of them
    as if it were all the data. In such a model the chains run as many at a time as the plate has rows, so that fewer
    of them take no less time.

    The value is minus that bound a datum without log Z, which no chain tells: the mean of log p̃ over the chains stands
    in its place, so its gradient is right and its level is not.

    :param model: a Pyro program of p(θ) p̃(v, h; θ), v continuous or discrete; latents that are not in the guide are
        summed out where they can be.
    :param guide: a Pyro program, or autoguide, of q(θ; φ): of the global sites alone.
    :param optim: a ``pyro.optim`` optimiser, for φ; parameters of the model are fitted with it.
    :param kernel: of :mod:`pyro_bism.sampling.kernels`.
    :param num_chains: how many chains.
    :param num_sweeps: steps of the kernel for each of φ.
    :param visible: names of the visible sites; None takes all observed sample sites.
    :param jit: capture the step and compile it, as in :class:`~pyro_bism.BiSM`.
    :raises ValueError: at construction for bad settings, at the first step for misuse.
    """

    takes_discrete = True
    sums_latents = None
    moves_visible = True
    partial_guide = True
    is_contrast = True
    words = Words.of_rival("or more num_sweeps, so that the chains keep up, or with a prior that holds the parameters")

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        kernel: Kernel,
        num_chains: int = 100,
        num_sweeps: int = 1,
        *,
        visible: Sequence[str] | None = None,
        jit: bool = False,
    ):
        super().__init__(model, optim, visible, guide, jit)
        if num_chains < 1 or num_sweeps < 1:
            raise ValueError(f"num_chains and num_sweeps must be at least 1, got {num_chains} and {num_sweeps}.")
        require_kernel(kernel)
        self.kernel = kernel
        self.num_chains = num_chains
        self.num_sweeps = num_sweeps

    def posterior(self, *args: Any, num_draws: int = 1000, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of θ from the guide, by site, the draws first.

        :param args: arguments of the model, the data among them.
        :param num_draws: how many.
        :param kwargs: its keyword arguments.
        """
        pair, leaves, spec = self._prepare(args, kwargs)
        batch = pair.batch(leaves, spec)
        with torch.no_grad():
            draws = [_drawn(pair, batch)[0] for _ in range(num_draws)]
        return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}

    def deterministics(self, theta: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The model's ``deterministic`` sites outside the data plate at draws of θ, by site, the draws first.

        :param theta: draws by site, as :meth:`posterior` gives them.
        :param args: arguments of the model, the data among them.
        :param kwargs: its keyword arguments.
        :raises ValueError: if θ lacks one of the guide's sites.
        """
        pair, leaves, spec = self._prepare(args, kwargs)
        batch = pair.batch(leaves, spec)
        with torch.no_grad():
            wanted = _drawn(pair, batch)[0]
        missing = sorted(set(wanted) - set(theta))
        if missing:
            raise ValueError(f"theta has no draws of the guide's sites {missing}.")
        args, kwargs = batch.arguments(batch.v)

        def one(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            with torch.no_grad(), pyro.poutine.block(), record({**batch.indices, **values}) as run:
                pair.model(*args, **kwargs)
            rows = {frame.name for site in pair.sites for frame in run.sites[site.name].frames}
            return {
                name: site.value
                for name, site in run.sites.items()
                if site.infer.get("_deterministic", False) and rows.isdisjoint(f.name for f in site.frames)
            }

        draws = {name: torch.as_tensor(theta[name]) for name in wanted}
        found = [one({name: value[0] for name, value in draws.items()})]
        if not found[0]:
            return {}
        found += [
            one(dict(zip(draws, values, strict=True))) for values in zip(*(x[1:] for x in draws.values()), strict=True)
        ]
        return {name: torch.stack([each[name] for each in found]) for name in found[0]}

    def at(self, theta: Mapping[str, Any]) -> "AtTheta":
        """The model at one θ, which ``run_chains``, ``ais``, ``free_energy`` and the like take for a trained one.

        :param theta: a value for each of the guide's sites: one of the draws of :meth:`posterior`, or their mean.
        """
        return AtTheta(self, {name: torch.as_tensor(value) for name, value in theta.items()})

    @in_own_modes
    def energy(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses, as there is one energy for each θ: take that of :meth:`at`.

        :param args: not looked at.
        :param kwargs: not looked at.
        :raises ValueError: always.
        """
        raise ValueError("A PersistentVI has a posterior of θ and no one θ: pass persistent_vi.at(theta).")

    def _own(self, pair: ModelAndGuide) -> list[Tensor]:
        return list(pair.phi.values())

    def _program(self, pair: ModelAndGuide, batch: Batch) -> Callable[..., Any]:
        with torch.no_grad():
            values, _ = _drawn(pair, batch)
        if not values:
            raise ValueError("The guide has no sample site: it should draw the model's global parameters.")
        return conditioned(pair.model, values)

    def _check(self, target: MarginalTarget, batch: Batch) -> MarginalTarget:
        pair = target.pair
        if not target.energy.is_homogeneous:
            raise ValueError(
                "The model has covariates, and persistent chains belong to no row of the data. If it has none, the "
                "guide draws a site in the data plate: let it draw the global parameters alone."
            )
        values, _ = _drawn(pair, batch)
        prior = _prior_sites(pair, batch, values)
        for name in values:
            if name not in prior:
                raise ValueError(
                    f"The guide's site '{name}' is not a latent site of the model. Rename or remove it, or mark it "
                    "infer={'is_auxiliary': True} if another guide site is computed from it."
                )
            if prior[name].fn.support.is_discrete:
                raise ValueError(
                    f"Site '{name}' ({type(base_of(prior[name].fn)).__name__}) is discrete: its draws carry no "
                    "gradient. Take a continuous prior, such as a horseshoe."
                )
        return target

    @torch.no_grad()
    def _begin(self, target: MarginalTarget, batch: Batch) -> Any:
        target = _at(target, _drawn(target.pair, batch)[0])
        energy = target.energy.at(batch)
        x = target.point(select(energy.seen(batch.v), torch.arange(self.num_chains) % len(batch.v)))
        density = energy.density(x)
        x = draw_hidden(self.kernel, density, x, tuple(target.hidden), self.num_sweeps)
        return x, self.kernel.init(density, x)

    def _loss(self, target: MarginalTarget, batch: Batch, carried: Any) -> tuple[Tensor, Any]:
        pair = target.pair
        values, log_q = _drawn(pair, batch)
        target = _at(target, values)
        energy = target.energy.at(batch)
        seen = energy.seen(batch.v)
        x, state = carried
        with torch.no_grad():
            density = energy.density(x)
            x, state = advance(self.kernel, density, x, state, self.num_sweeps)
        if target.integral is not None or not target.hidden:
            log_prob = target.log_prob(batch)
            gap = log_prob({name: x[name] for name in seen}).mean() - log_prob(seen).mean()
        else:
            with torch.no_grad():
                data = draw_hidden(self.kernel, density, target.point(seen), tuple(target.hidden), self.num_sweeps)
            gap = energy.log_joint(x).mean() - energy.log_joint(data).mean()
        sites = _prior_sites(pair, batch, values)
        log_prior: Any = sum(
            site.log_prob().sum() for name, site in sites.items() if name in values or _is_global(site)
        )
        return gap + (log_q - log_prior) / pair.num_data, (x, state)


@dataclass(frozen=True)
class AtTheta:
    """The model of a :class:`PersistentVI` at one θ.

    :ivar trained: the method that learnt the posterior.
    :ivar theta: a value for each of the guide's sites, by name.
    """

    trained: PersistentVI
    theta: Mapping[str, Tensor]

    @property
    def words(self) -> Words:
        """How it is said that training has run away."""
        return self.trained.words

    @property
    def _watch(self) -> Watch:
        return self.trained._watch

    @in_own_modes
    def energy(self, *args: Any, **kwargs: Any) -> tuple[Energy, Point]:
        """log p̃(v, h) on these arguments, and a point: the data and a draw of h.

        :param args: arguments of the model, the data among them; a plate that subsamples these takes all rows here.
        :param kwargs: its keyword arguments.
        :raises ValueError: if θ has other sites or shapes than the guide.
        """

        def program(pair: ModelAndGuide, batch: Batch) -> Callable[..., Any]:
            with torch.no_grad():
                wanted = {name: tuple(value.shape) for name, value in _drawn(pair, batch)[0].items()}
            found = {name: tuple(value.shape) for name, value in self.theta.items()}
            if wanted != found:
                raise ValueError(f"theta has the sites and shapes {found}; the guide has {wanted}.")
            return conditioned(pair.model, self.theta)

        return self.trained._energy(args, kwargs, program)


def conditioned(model: Callable[..., Any], values: Mapping[str, Tensor]) -> Callable[..., Any]:
    """The model at these values of its global sites, which are then no sites of it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.poutine.block(hide=list(values)), replay(values):
            return model(*args, **kwargs)

    return run


def _at(target: MarginalTarget, values: Mapping[str, Tensor]) -> MarginalTarget:
    return replace(target, energy=replace(target.energy, model=conditioned(target.pair.model, values)))


def _is_global(site: SiteRecord) -> bool:
    """A factor with one number for all the data: a penalty, which counts once, as a prior does."""
    return site.log_prob().ndim == 0


def _drawn(pair: ModelAndGuide, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """One draw of θ from the guide, and its log density."""
    args, kwargs = batch.arguments(batch.v)
    with pyro.poutine.block(), record(batch.indices) as run:
        pair.guide(*args, **kwargs)
    sites = {name: site for name, site in run.sites.items() if not site.is_observed}
    log_q = sum((site.log_prob().sum() for site in sites.values()), torch.zeros(()))
    return {name: s.value for name, s in sites.items() if not s.infer.get("is_auxiliary", False)}, log_q


def _prior_sites(pair: ModelAndGuide, batch: Batch, values: Mapping[str, Tensor]) -> dict[str, SiteRecord]:
    """The model's sites, run at θ."""
    args, kwargs = batch.arguments(batch.v)
    with pyro.poutine.block(), record({**batch.indices, **values}) as run:
        pair.model(*args, **kwargs)
    return {name: site for name, site in run.sites.items() if not site.is_data}
