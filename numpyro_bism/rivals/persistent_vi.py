"""Persistent variational inference: a posterior over the parameters of a model without a normaliser."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.handlers import block, seed, substitute, trace

from ..distributions import base_of
from ..energies import Energy, Point
from ..programs.checks import Analysis
from ..programs.modes import in_own_modes
from ..programs.pair import ModelAndGuide
from ..programs.records import SiteRecord, record
from ..programs.visible import Batch
from ..sampling.kernels import Kernel, require_kernel
from ..training.runaways import Words
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

    :param model: a NumPyro program of p(θ) p̃(v, h; θ), v continuous or discrete; latents that are not in the guide are
        summed out where they can be.
    :param guide: a NumPyro program, or autoguide, of q(θ; φ): of the global sites alone.
    :param optim: an optimiser for φ, of ``numpyro.optim``, ``jax.example_libraries.optimizers`` or optax; ``param``
        sites of the model are fitted with it.
    :param kernel: of :mod:`numpyro_bism.sampling.kernels`.
    :param num_chains: how many chains.
    :param num_sweeps: steps of the kernel for each of φ.
    :param visible: names of the visible sites; None takes all observed sample sites.
    :param static_kwargs: keyword arguments of model and guide that stay the same, as in SVI.
    :raises ValueError: at construction for bad settings, at :meth:`init` for misuse.
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
        optim: Any,
        kernel: Kernel,
        num_chains: int = 100,
        num_sweeps: int = 1,
        *,
        visible: Sequence[str] | None = None,
        **static_kwargs: Any,
    ):
        super().__init__(model, optim, visible, static_kwargs, guide)
        if num_chains < 1 or num_sweeps < 1:
            raise ValueError(f"num_chains and num_sweeps must be at least 1, got {num_chains} and {num_sweeps}.")
        require_kernel(kernel)
        self.kernel = kernel
        self.num_chains = num_chains
        self.num_sweeps = num_sweeps

    def posterior(
        self, state: Any, *args: Any, rng_key: Array, num_draws: int = 1000, **kwargs: Any
    ) -> dict[str, Array]:
        """Draws of θ from the guide, by site, the draws first.

        :param state: a state of :meth:`init`, :meth:`update` or :meth:`run`.
        :param args: arguments of the model, the data among them.
        :param rng_key: a JAX random key, for the draws and for a subsampling plate's rows.
        :param num_draws: how many.
        :param kwargs: its keyword arguments.
        """
        leaves, spec = self._checked(args, kwargs)
        pair = self.pair(leaves, spec)
        params = pair.params(*self._split(pair, self._theta(pair, state)), state.mutable_state)
        batch = pair.batch(rng_key, leaves, spec)

        def one(key: Array) -> dict[str, Array]:
            values, _ = _drawn(key, pair, params, batch)
            return values

        draws: dict[str, Array] = jax.vmap(one)(jax.random.split(rng_key, num_draws))
        return draws

    def deterministics(
        self, state: Any, theta: Mapping[str, Any], *args: Any, rng_key: Array, **kwargs: Any
    ) -> dict[str, Array]:
        """The model's ``deterministic`` sites outside the data plate at draws of θ, by site, the draws first.

        :param state: a state of :meth:`init`, :meth:`update` or :meth:`run`.
        :param theta: draws by site, as :meth:`posterior` gives them.
        :param args: arguments of the model, the data among them.
        :param rng_key: a JAX random key, for what model and guide draw, and for a subsampling plate's rows.
        :param kwargs: its keyword arguments.
        :raises ValueError: if θ lacks one of the guide's sites.
        """
        leaves, spec = self._checked(args, kwargs)
        pair = self.pair(leaves, spec)
        params = pair.params(*self._split(pair, self._theta(pair, state)), state.mutable_state)
        batch = pair.batch(rng_key, leaves, spec)
        wanted = _drawn(rng_key, pair, params, batch)[0]
        missing = sorted(set(wanted) - set(theta))
        if missing:
            raise ValueError(f"theta has no draws of the guide's sites {missing}.")
        args, kwargs = batch.arguments(batch.v)

        def one(values: Mapping[str, Array]) -> dict[str, Array]:
            with seed(rng_seed=rng_key), trace() as sites, record(params, {**batch.indices, **values}):
                pair.model(*args, **kwargs)
            rows = {frame.name for site in pair.sites for frame in sites[site.name]["cond_indep_stack"]}
            return {
                name: jnp.asarray(site["value"])
                for name, site in sites.items()
                if site["type"] == "deterministic" and rows.isdisjoint(f.name for f in site["cond_indep_stack"])
            }

        # compiled, so that an energy which no deterministic site reads is left out
        draws = {name: jnp.asarray(theta[name]) for name in wanted}
        found: dict[str, Array] = jax.jit(lambda draws: jax.lax.map(one, draws))(draws)
        return found

    def at(self, theta: Mapping[str, Any]) -> "AtTheta":
        """The model at one θ, which ``run_chains``, ``ais``, ``free_energy`` and the like take for a trained one.

        :param theta: a value for each of the guide's sites: one of the draws of :meth:`posterior`, or their mean.
        """
        return AtTheta(self, {name: jnp.asarray(value) for name, value in theta.items()})

    @in_own_modes
    def energy(self, state: Any, *args: Any, rng_key: Any = None, **kwargs: Any) -> Any:
        """Refuses, as there is one energy for each θ: take that of :meth:`at`.

        :param state: not looked at.
        :param args: not looked at.
        :param rng_key: not looked at.
        :param kwargs: not looked at.
        :raises ValueError: always.
        """
        raise ValueError("A PersistentVI has a posterior of θ and no one θ: pass persistent_vi.at(theta).")

    def _split(self, pair: ModelAndGuide, theta: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return {name: theta[name] for name in pair.theta}, {name: theta[name] for name in pair.phi}

    def _phi(self, pair: ModelAndGuide, theta: Mapping[str, Any], carried: Any) -> dict[str, Any]:
        return self._split(pair, theta)[1]

    def _program(self, rng_key: Array, pair: ModelAndGuide, params: Mapping[str, Any], batch: Batch) -> Any:
        values, _ = _drawn(rng_key, pair, params, batch)
        if not values:
            raise ValueError("The guide has no sample site: it should draw the model's global parameters.")
        return conditioned(pair.model, values)

    def _check(self, target: MarginalTarget, params: Mapping[str, Any], batch: Batch, rng_key: Array) -> MarginalTarget:
        pair = target.pair
        if not target.energy.is_homogeneous:
            raise ValueError(
                "The model has covariates, and persistent chains belong to no row of the data. If it has none, the "
                "guide draws a site in the data plate: let it draw the global parameters alone."
            )
        values, _ = _drawn(rng_key, pair, params, batch)
        prior = _prior_sites(rng_key, pair, params, batch, values)
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

    def _begin(
        self, rng_key: Array, target: MarginalTarget, start: Analysis, batch: Batch
    ) -> tuple[dict[str, Any], Any]:
        key_draw, key_hidden = jax.random.split(rng_key)
        params = target.params(start.theta, start.mutable, start.phi)
        target = _at(target, _drawn(key_draw, target.pair, params, batch)[0])
        energy = target.energy.at(batch)
        rows = jnp.arange(self.num_chains) % len(batch.v)
        x = target.point(jax.tree.map(lambda a: a[rows], energy.seen(batch.v)))
        density = energy.density(params, x)
        x = draw_hidden(key_hidden, self.kernel, density, x, tuple(target.hidden), self.num_sweeps)
        return dict(start.phi), (x, self.kernel.init(density, x))

    def _loss(
        self, rng_key: Array, theta: Mapping[str, Any], carried: Any, target: MarginalTarget, mutable: Any, batch: Batch
    ) -> tuple[Array, Any]:
        pair = target.pair
        params = target.params(theta, mutable, self._split(pair, theta)[1])
        key_draw, key_chains, key_hidden = jax.random.split(rng_key, 3)
        values, log_q = _drawn(key_draw, pair, params, batch)
        fixed = jax.lax.stop_gradient((params, values))
        x, state = carried
        density = _at(target, fixed[1]).energy.at(batch).density(fixed[0], x)
        x, state = advance(key_chains, self.kernel, density, x, state, self.num_sweeps)
        x = jax.lax.stop_gradient(x)

        target = _at(target, values)
        energy = target.energy.at(batch)
        seen = energy.seen(batch.v)
        if target.integral is not None or not target.hidden:
            log_prob = target.log_prob(params, batch)
            gap = log_prob({name: x[name] for name in seen}).mean() - log_prob(seen).mean()
        else:
            data = draw_hidden(
                key_hidden, self.kernel, density, target.point(seen), tuple(target.hidden), self.num_sweeps
            )
            gap = energy.log_joint(params, x).mean() - energy.log_joint(params, jax.lax.stop_gradient(data)).mean()
        sites = _prior_sites(key_draw, pair, params, batch, values)
        log_prior = sum(site.log_prob().sum() for name, site in sites.items() if name in values or _is_global(site))
        return gap + (log_q - log_prior) / pair.num_data, (x, state)


@dataclass(frozen=True)
class AtTheta:
    """The model of a :class:`PersistentVI` at one θ.

    :ivar trained: the method that learnt the posterior.
    :ivar theta: a value for each of the guide's sites, by name.
    """

    trained: PersistentVI
    theta: Mapping[str, Array]

    @property
    def words(self) -> Words:
        """How it is said that training has run away."""
        return self.trained.words

    @in_own_modes
    def energy(self, state: Any, *args: Any, rng_key: Array, **kwargs: Any) -> tuple[Energy, dict[str, Any], Point]:
        """log p̃(v, h) on these arguments, its parameters, and a point: the data and a draw of h.

        :param state: a state of the method's :meth:`init`, :meth:`update` or :meth:`run`.
        :param args: arguments of the model, the data among them; a plate that subsamples these takes all rows here.
        :param rng_key: a JAX random key, for that draw and for the rows of other subsampling plates than the data's.
        :param kwargs: its keyword arguments.
        :raises ValueError: if θ has other sites or shapes than the guide.
        """

        def program(key: Array, pair: ModelAndGuide, params: Mapping[str, Any], batch: Batch) -> Callable[..., Any]:
            wanted = {name: jnp.shape(value) for name, value in _drawn(key, pair, params, batch)[0].items()}
            found = {name: jnp.shape(value) for name, value in self.theta.items()}
            if wanted != found:
                raise ValueError(f"theta has the sites and shapes {found}; the guide has {wanted}.")
            return conditioned(pair.model, self.theta)

        return self.trained._energy(state, args, kwargs, rng_key, program)


def conditioned(model: Callable[..., Any], values: Mapping[str, Array]) -> Callable[..., Any]:
    """The model at these values of its global sites, which are then no sites of it."""
    program: Callable[..., Any] = block(substitute(model, data=dict(values)), hide=list(values))
    return program


def _at(target: MarginalTarget, values: Mapping[str, Array]) -> MarginalTarget:
    return replace(target, energy=replace(target.energy, model=conditioned(target.pair.model, values)))


def _is_global(site: SiteRecord) -> bool:
    """A factor with one number for all the data: a penalty, which counts once, as a prior does."""
    return jnp.ndim(site.log_prob()) == 0


def _drawn(
    rng_key: Array, pair: ModelAndGuide, params: Mapping[str, Any], batch: Batch
) -> tuple[dict[str, Array], Array]:
    """One draw of θ from the guide, and its log density."""
    args, kwargs = batch.arguments(batch.v)
    with seed(rng_seed=rng_key), record(params, batch.indices) as run:
        pair.guide(*args, **kwargs)
    sites = {name: site for name, site in run.sites.items() if not site.is_observed}
    log_q = sum((site.log_prob().sum() for site in sites.values()), jnp.zeros(()))
    return {name: s.value for name, s in sites.items() if not s.infer.get("is_auxiliary", False)}, log_q


def _prior_sites(
    rng_key: Array, pair: ModelAndGuide, params: Mapping[str, Any], batch: Batch, values: Mapping[str, Array]
) -> dict[str, SiteRecord]:
    """The model's sites, run at θ."""
    args, kwargs = batch.arguments(batch.v)
    with seed(rng_seed=rng_key), record(params, {**batch.indices, **values}) as run:
        pair.model(*args, **kwargs)
    return {name: site for name, site in run.sites.items() if not site.is_data}
