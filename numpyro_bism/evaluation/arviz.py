"""From a trained model to ArviZ: draws of the guide with their weights, chains, samples of other samplers."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array
from numpyro.handlers import seed

from ..bism import BiSM
from ..programs import visible
from ..programs.modes import in_own_modes
from ..programs.pair import ModelAndGuide
from ..programs.records import record
from ..rivals import PersistentVI
from ..sampling.chains import Chains
from .guide_draws import GuideDraws, run_guide, terms_by_site
from .psis import MIN_DRAWS, psis_khat


@in_own_modes
def to_arviz(
    bism: BiSM | PersistentVI,
    state: Any,
    *args: Any,
    rng_key: Array,
    num_draws: int = 1000,
    posterior: Any = None,
    posterior_predictive: Any = None,
    model_samples: Any = None,
    log_likelihood: Any = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> Any:
    r"""Draws of h at these data, of the guide or of chains, and draws of the model, as ArviZ reads them.

    Of a :class:`PersistentVI` the posterior is one of θ: ``num_draws`` draws of its guide, or those given as
    ``posterior``, with the model's ``deterministic`` sites outside the data plate and with what
    ``log_likelihood(..., theta=...)`` said of them.

    h ~ q(h|v; φ) at the clean v and the present parameters: no noise is added and nothing is updated. Relaxed sites
    (``ConcreteBernoulli``, ``ConcreteOneHot``) are drawn and scored as the discrete distributions that they stand
    for, and so are sites marked for enumeration.

    ==================== ======================================================== =============================
    group                variable                                                 dimensions
    ==================== ======================================================== =============================
    posterior            each latent site; not the guide's auxiliary sites        chain, draw, obs, ...
    sample_stats         ``model_energy`` = -log p̃(v, h)                          chain, draw, obs
    \                    ``lp``: log p̃ summed over the datapoints                 chain, draw
    \                    of the guide: ``log_weight`` = log p̃(v, h) - log q(h|v)  chain, draw, obs
    \                    ``pareto_k``: :func:`psis_khat`, from 25 draws on        obs
    \                    of chains: ``acceptance_rate``                           chain, draw, obs
    \                    of HMC and NUTS: ``diverging``, and ``acceptance_rate``, chain, draw
    \                    ``step_size``, ``energy``: see :func:`with_statistics`
    posterior_predictive visible sites                                            chain, draw, obs, ...
    model_samples        visible and latent sites                                 chain, draw, ...
    observed_data        each visible site                                        obs, ...
    constant_data        other observed sites; the outer loss's noise scales      obs, ... ; none
    ==================== ======================================================== =============================

    The guide gives one chain, of independent draws, so R̂ and the effective sample size say nothing about it;
    ``pareto_k`` does. ``posterior_predictive`` and ``model_samples`` are there if they are given: chains of
    :func:`numpyro_bism.run_chains`, or an ``MCMC`` that has run :func:`numpyro_bism.as_model`. The user's ``scale``
    and ``mask`` are part of the densities, a subsampling plate's N/B is not; all rows are taken, in order, whatever
    such a plate draws while training, but where the program hands it rows the coordinates of ``obs`` are their numbers.
    If a site is itself called ``obs``, the dimension is called ``obs_id``.
    A ``/`` in a site's name becomes a dot. p̃ is not normalised: ``lp`` and ``log_weight`` are known up to a
    constant, and there is no ``log_likelihood`` for ``az.loo`` to read.

    Groups and root carry the attributes inference_library and its version, created_at, sampling_method ("guide",
    "nuts", "gibbs", "langevin", ...), normalized (0) and configuration (BiSM's settings, JSON).

    :param bism: a BiSM or a PersistentVI.
    :param state: a state of it, trained or not.
    :param args: arguments of model and guide, the data among them, as for ``bism.update``.
    :param rng_key: a JAX random key: all that is drawn follows from it.
    :param num_draws: how many draws of h. A model with a keyword of this name, or of one below, is given it by
        position, or wrapped in ``functools.partial``.
    :param posterior: chains of h given v at these data, ``run_chains(..., sites=[...])``, in the guide's place.
    :param posterior_predictive: chains of v given h at these data.
    :param log_likelihood: of a PersistentVI: an estimate of log p(v | θ) by draw; refused with a standard error above
        0.1 nat, whose noise would pass for the data's.
    :param model_samples: chains of (v, h).
    :param coords: coordinate values by dimension, ``obs`` among them; the default counts from 0.
    :param dims: by site, names of the dimensions that follow ``obs`` (``h_dim_0``, ... by default).
    :param kwargs: keyword arguments of model and guide.
    :returns: an ``xarray.DataTree``; under ArviZ 0.x the ``InferenceData`` made of it. Both have ``to_netcdf``.
    :raises ValueError: on misuse, NaN in the data, a latent without the batch as its leading dimension, a guide that is
        a point mass.
    :raises FloatingPointError: if log p̃ or log q comes out as NaN or +inf.
    :raises ImportError: without ArviZ: ``pip install 'bism-ppl[arviz]'``.
    """
    try:
        import arviz as az
        import xarray as xr
    except ImportError as error:
        raise ImportError("to_arviz needs ArviZ and xarray: pip install 'bism-ppl[arviz]'.") from error
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}.")
    if isinstance(bism, PersistentVI):
        if posterior_predictive is not None or model_samples is not None:
            raise ValueError(
                "Of a PersistentVI there are draws of θ: leave posterior_predictive and model_samples out."
            )
        if posterior is None:
            posterior = bism.posterior(state, *args, rng_key=rng_key, num_draws=num_draws, **kwargs)
        computed = bism.deterministics(state, posterior, *args, rng_key=rng_key, **kwargs)
        draws_of = {name: np.asarray(value) for name, value in {**posterior, **computed}.items()}
        names = (
            [site.name for site in bism.pair(*bism._checked(args, kwargs)).sites] if log_likelihood is not None else []
        )
        return _of_parameters(bism, draws_of, log_likelihood, names, coords or {}, dims or {})
    if log_likelihood is not None:
        raise ValueError("log_likelihood goes with draws of θ, and this θ is one point: see that of held-out data.")
    if not isinstance(bism, BiSM):
        raise ValueError(f"to_arviz reads a BiSM or a PersistentVI, got {type(bism).__name__}.")
    leaves, spec = bism._checked(args, kwargs)
    pair = bism.evaluated_pair(leaves, spec)
    key_batch, key_draws = jax.random.split(rng_key)
    params = pair.params(*bism._unpack(pair, state), state.mutable_state)
    batch = pair.batch(key_batch, leaves, spec)
    run = run_guide(key_draws, pair, params, batch, num_draws if posterior is None else 1)
    n = len(batch.v)
    known = {**run.visible, **{name: value[0] for name, value in run.latents.items()}}
    given = {
        group: read_samples(group, source, n, known, rows=group != "model_samples")
        for group, source in (
            ("posterior", posterior),
            ("posterior_predictive", posterior_predictive),
            ("model_samples", model_samples),
        )
        if source is not None
    }
    layout = _Layout.from_run(pair, batch, run, coords or {}, dims or {})

    draws = ("chain", "draw")
    if posterior is None:
        log_p, log_q = run.log_p[None], run.log_q[None]
        latents, method = {name: x[None] for name, x in run.latents.items()}, "guide"
        stats: dict[str, Any] = {"log_weight": ((*draws, layout.obs), log_p - log_q)}
        if num_draws >= MIN_DRAWS:
            stats["pareto_k"] = ((layout.obs,), psis_khat((log_p - log_q)[0]))
    else:
        read = given["posterior"]
        latents, method = {name: x for name, x in read.values.items() if name in run.latents}, read.method
        missing = sorted(set(run.latents) - set(latents))
        if missing:
            raise ValueError(f"posterior has no draws of the latent sites {missing}.")
        log_p = read.log_p if read.log_p is not None else _log_p(pair, params, batch, latents)
        stats = {name: ((*draws, layout.obs)[: x.ndim], x) for name, x in read.stats.items()}
    stats["model_energy"] = ((*draws, layout.obs), -log_p)
    stats["lp"] = (draws, log_p.sum(-1, dtype=float))
    scales = {f.name: np.asarray(getattr(bism.loss, f.name)) for f in _fields(bism.loss) if "sigma" in f.name}

    def drawn(group: str, names: Mapping[str, Any], has_rows: bool) -> dict[str, Any]:
        values = given[group].values if group in given else {}
        return {name: layout.place(name, x, draws, has_rows) for name, x in values.items() if name in names}

    groups = {
        "posterior": {name: layout.place(name, x, draws) for name, x in latents.items()},
        "sample_stats": stats,
        "posterior_predictive": drawn("posterior_predictive", run.visible, True),
        "model_samples": drawn("model_samples", known, False),
        "observed_data": {name: layout.place(name, x) for name, x in run.visible.items()},
        "constant_data": {
            **{name: layout.place(name, x) for name, x in run.covariates.items()},
            **{name: ((), x) for name, x in scales.items() if name not in run.covariates},
        },
    }
    attrs = _attributes(bism, [site.name for site in pair.sites])
    datasets = {"/": xr.Dataset(attrs={**attrs, "sampling_method": method})}
    for group, variables in groups.items():
        if variables:
            named = {name.replace("/", "."): value for name, value in variables.items()}
            how = given[group].method if group in given else method
            datasets[group] = xr.Dataset(named, layout.coordinates(named.values()), {**attrs, "sampling_method": how})
    tree = xr.DataTree.from_dict(datasets)
    # ArviZ 1.0 took the DataTree for its own, and from_datatree went
    return az.from_datatree(tree) if hasattr(az, "from_datatree") else tree


class _Read(NamedTuple):
    """Draws of chains, (chain, draw, [n,] ...), and what was recorded beside them."""

    values: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]
    log_p: np.ndarray | None
    method: str


_STATS = {
    "diverging": "diverging",
    "accept_prob": "acceptance_rate",
    "adapt_state.step_size": "step_size",
    "energy": "energy",
}


def read_samples(group: str, source: Any, n: int, known: Mapping[str, np.ndarray], rows: bool) -> _Read:
    """Chains of this package or of the host's MCMC.

    :param known: a value of every site, for every row of the data.
    :param rows: whether the draws are wanted row by row of the data.
    """
    if isinstance(source, Chains):
        if source.has_rows != rows:
            raise ValueError(
                f"{group} takes chains "
                + (
                    "at the data: run_chains(..., sites=[...])."
                    if rows
                    else "of all of (v, h): run_chains without sites."
                )
            )
        values = {name: np.asarray(source.values[name]) for name in source.moved}
        stats = {"acceptance_rate": np.asarray(source.acceptance)}
        found = _Read(values, stats, np.asarray(source.log_joint), source.kernel.lower())
    elif hasattr(source, "get_samples"):
        samples = source.get_samples(group_by_chain=True)
        values = {name: np.asarray(x) for name, x in samples.items() if name in known}
        extra = source.get_extra_fields(group_by_chain=True)
        stats = {_STATS[name]: np.asarray(x) for name, x in extra.items() if name in _STATS}
        if not rows:  # each row is a chain of its own
            values = {name: np.moveaxis(x, 2, 1).reshape(-1, x.shape[1], *x.shape[3:]) for name, x in values.items()}
        found = _Read(values, stats, None, type(source.sampler).__name__.lower().removeprefix("recorded"))
    else:
        raise ValueError(
            f"{group} takes the result of run_chains, or an MCMC that has run; got {type(source).__name__}."
        )
    for name, x in found.values.items():
        wanted = (n, *known[name].shape[1:]) if rows else known[name].shape[1:]
        if x.shape[2:] != wanted:
            raise ValueError(
                f"{group}: the draws of '{name}' have shape {x.shape[2:]}, where {wanted} is wanted. Were they made at "
                "other data?"
            )
    if not found.values:
        raise ValueError(f"{group} has no draws of the sites {sorted(known)}.")
    return found


def _log_p(
    pair: ModelAndGuide, params: Mapping[str, Any], batch: visible.Batch, latents: Mapping[str, np.ndarray]
) -> np.ndarray:
    """log p̃(v, h) of draws (chain, draw, n, ...), by draw and datapoint."""
    args, kwargs = batch.arguments(batch.v)

    def one(values: Mapping[str, Array]) -> Any:
        with seed(rng_seed=0), record(params, {**batch.indices, **values}) as p:
            pair.model(*args, **kwargs)
        return sum(terms_by_site(p.sites, len(batch.v)).values())

    flat = {name: jnp.asarray(x).reshape(-1, *x.shape[2:]) for name, x in latents.items()}
    first = next(iter(latents.values()))
    return np.asarray(jax.jit(lambda flat: jax.lax.map(one, flat))(flat)).reshape(*first.shape[:2], -1)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Names of the dimensions, and their coordinates."""

    obs: str
    rows: np.ndarray
    coords: Mapping[str, Sequence[Any]]
    dims: Mapping[str, Sequence[str]]

    @classmethod
    def from_run(cls, pair: ModelAndGuide, batch: visible.Batch, run: GuideDraws, coords: Any, dims: Any) -> "_Layout":
        sites = {**run.latents, **run.visible, **run.covariates}
        obs = "obs_id" if "obs" in sites else "obs"
        plate = pair.sites[0].labels
        rows = np.arange(len(batch.v)) if plate is None else np.asarray(batch.indices[plate])
        layout = cls(obs, rows, coords, dims)
        for name in dims:
            if name not in sites:
                raise ValueError(f"dims names '{name}'; the latent and observed sites are {sorted(sites)}.")
        known = {obs, "chain", "draw"}
        for name, x in sites.items():
            known.update(layout.place(name, x, ("draw",) if name in run.latents else ())[0])
        for name in coords:
            if name not in known:
                raise ValueError(f"coords names '{name}'; the dimensions are {sorted(known)}.")
        for name in sites:
            if name in known:
                raise ValueError(
                    f"Site '{name}' has the name of a dimension; the dimensions are {sorted(known)}. Rename one."
                )
        return layout

    def place(
        self, name: str, value: np.ndarray, draws: tuple[str, ...] = (), has_rows: bool = True
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """A site's dimensions beside its value, whose leading axes are the draws and, it may be, the datapoints."""
        shape = value.shape[len(draws) :]
        # a covariate may be shared by all datapoints
        lead = (*draws, self.obs) if has_rows and shape[:1] == self.rows.shape else draws
        rest = value.shape[len(lead) :]
        named = self.dims.get(name)
        if named is None:
            named = [f"{name.replace('/', '.')}_dim_{i}" for i in range(len(rest))]
        if isinstance(named, str) or len(named) != len(rest):
            raise ValueError(
                f"dims[{name!r}] = {named!r} should be a list of {len(rest)} names: the site's dimensions after "
                f"'{self.obs}' have the shape {rest}."
            )
        return (*lead, *named), value

    def coordinates(self, variables: Any) -> dict[str, Any]:
        sizes = {dim: size for names, value in variables for dim, size in zip(names, np.shape(value), strict=True)}
        default = {dim: self.rows if dim == self.obs else np.arange(size) for dim, size in sizes.items()}
        return {dim: self.coords.get(dim, counted) for dim, counted in default.items()}


def check_noise(standard_error: Any) -> None:
    """Check whether the noise of a log-likelihood, its standard error in nats, is small beside the data's.

    :raises ValueError: where it is above 0.1.
    """
    worst = float(np.max(np.asarray(standard_error)))
    if not worst <= 0.1:
        raise ValueError(
            f"LOO is refused: the log-likelihood's standard error reaches {worst:.2g} nat, more than 0.1, and its "
            "noise would pass for the data's. Anneal for longer (ais), or use exact_log_normalizer."
        )


def _of_parameters(
    trained: PersistentVI,
    draws: Mapping[str, np.ndarray],
    log_likelihood: Any,
    names: Sequence[str],
    coords: Mapping[str, Sequence[Any]],
    dims: Mapping[str, Sequence[str]],
) -> Any:
    """Draws of θ as ArviZ's posterior: one chain, of independent draws of the guide.

    :param names: of the visible sites.
    """
    import arviz as az
    import xarray as xr

    variables = {}
    for name, value in draws.items():
        trailing = dims.get(name, [f"{name}_dim_{i}" for i in range(value.ndim - 1)])
        if len(trailing) != value.ndim - 1:
            raise ValueError(f"dims['{name}'] has {len(trailing)} names, but the site has {value.ndim - 1} dimensions.")
        variables[name.replace("/", ".")] = (("chain", "draw", *trailing), value[None])
    groups = {"posterior": variables}
    if log_likelihood is not None:
        check_noise(log_likelihood.standard_error)
        value = np.asarray(log_likelihood.value)
        num = len(next(iter(draws.values())))
        if value.ndim != 3 or value.shape[:2] != (1, num):
            raise ValueError(
                f"log_likelihood has shape {value.shape} where (1, {num}, n) is wanted: make it of the draws given as "
                "posterior, log_likelihood(..., theta=draws)."
            )
        groups["log_likelihood"] = {"_".join(names).replace("/", "."): (("chain", "draw", "obs"), value)}
    used = {dim for group in groups.values() for named, _ in group.values() for dim in named}
    for name in coords:
        if name not in used:
            raise ValueError(f"coords names '{name}'; the dimensions are {sorted(used)}.")
    configuration = {"kernel": _settings(trained.kernel), "num_chains": trained.num_chains, "method": "PersistentVI"}
    attrs = {**_library(), "normalized": int(log_likelihood is not None), "sampling_method": "guide"}
    attrs["configuration"] = json.dumps(configuration, default=repr)
    datasets = {"/": xr.Dataset(attrs=attrs)}
    for group, values in groups.items():
        here = {dim for named, _ in values.values() for dim in named}
        datasets[group] = xr.Dataset(values, {dim: list(c) for dim, c in coords.items() if dim in here}, attrs)
    tree = xr.DataTree.from_dict(datasets)
    return az.from_datatree(tree) if hasattr(az, "from_datatree") else tree


def _attributes(bism: BiSM, visible_names: Sequence[str]) -> dict[str, Any]:
    """Strings and numbers only: netCDF takes nothing else."""
    configuration = {
        "loss": _settings(bism.loss),
        "inner_loss": _settings(bism.inner_loss),
        "hypergradient": _settings(bism.hypergradient),
        "num_inner_steps": bism.num_inner_steps,
        "visible": list(visible_names),
    }
    return {
        **_library(),
        "normalized": 0,
        "configuration": json.dumps(configuration, default=repr),
    }


def _library() -> dict[str, Any]:
    return {
        "inference_library": "numpyro",
        "inference_library_version": numpyro.__version__,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
    }


def _settings(thing: Any) -> dict[str, Any]:
    """A loss or a strategy as its class's name and its numbers; a schedule, a function, by its name."""
    values = {f.name: getattr(thing, f.name) for f in _fields(thing)}
    settings = {k: getattr(v, "__qualname__", type(v).__name__) if callable(v) else v for k, v in values.items()}
    if not settings and hasattr(thing, "num_particles"):  # a host ELBO
        settings = {"num_particles": thing.num_particles}
    return {"name": type(thing).__name__, **settings}


def _fields(thing: Any) -> Sequence[dataclasses.Field[Any]]:
    return dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
