"""From a trained BiSM to ArviZ: draws of the guide, their importance weights, and how far to trust them."""

import contextlib
import dataclasses
import datetime
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from . import visible
from .bism import BiSM
from .densities import Pair, Site, per_example, record
from .modes import in_own_modes
from .rivals import PersistentVI
from .sampling import Chains

__all__ = ["psis_khat", "to_arviz"]

MIN_DRAWS = 25  # a fifth of the draws is the tail, and fewer than five points fix no tail
MIN_EFFECTIVE = 5  # of them
MAX_CELLS = 2**20  # numbers of v and h that are worked on at once


def psis_khat(log_weight: Any) -> Any:
    r"""Pareto k̂ of importance weights: the shape of a generalised Pareto law fitted to their largest values.

    The weights :math:`\tilde p(v, h) / q(h|v)` have finite moments of all orders below 1/k. Where k̂ > 0.7 the guide is
    too far from the posterior for its draws to be mended by weighting. Vehtari, Simpson, Gelman, Yao, Gabry
    2024 (JMLR 25(72)); the fit is ArviZ's own, of either version, with the sign that this version wants.

    Where ArviZ's fit can't be had, or can't be believed, the answer goes by the effective sample size
    :math:`m = (\sum w)^2 / \sum w^2` of the S draws:

    - the largest weights take fewer than five values (ties, discrete latents), or
    - k̂ < 1/2 says that they have a finite variance, though m < √S; or k̂ < 0 that they are bounded, though m < S/10.

    It is -inf if the weights are all much the same (m > 0.8 S: the guide is exact or nearly so), inf if a few draws
    outweigh all others (m < 5), and else :math:`1 - \log m / (2 \log S)`, between 1/2 and 1, where Pareto weights with
    such an m have their k. Log weights are told apart down to the square root of their precision.

    :param log_weight: log p̃(v, h) - log q(h|v): an array whose leading axis runs over the draws, or an
        ``xarray.DataArray`` with the dimensions ``chain`` and ``draw``. -inf is a weight of zero.
    :returns: k̂, of the shape left when the draws are taken away; a ``DataArray`` if it was given one.
    :raises ValueError: with fewer than 25 draws, or on NaN, on +inf, or where all weights are zero.
    """
    if hasattr(log_weight, "dims"):
        ordered = log_weight.transpose("chain", "draw", ...)
        k = psis_khat(ordered.values.reshape(-1, *ordered.shape[2:]))
        return ordered.isel(chain=0, draw=0, drop=True).copy(data=k).rename("pareto_k")
    weights = np.asarray(log_weight)
    if weights.ndim < 1 or len(weights) < MIN_DRAWS:
        raise ValueError(f"k̂ needs at least {MIN_DRAWS} draws along the leading axis; the shape is {weights.shape}.")
    if np.isnan(weights).any() or np.isposinf(weights).any():
        bad = np.argwhere(np.isnan(weights) | np.isposinf(weights))[0]
        raise ValueError(f"The log weights have NaN or +inf in them, the first at index {tuple(map(int, bad))}.")
    if np.isneginf(weights.max(0)).any():
        bad = np.argwhere(np.isneginf(weights.max(0)))[:1].ravel()
        raise ValueError(f"All log weights are -inf at index {tuple(map(int, bad))}: no draw has a density there.")
    eps = float(np.finfo(weights.dtype).eps) if weights.dtype.kind == "f" else 2.0**-52
    columns = weights.reshape(len(weights), -1).T.astype(float)
    k = np.array([math.nan if _has_tail(column, eps) else -math.inf for column in columns])
    if np.isnan(k).any():
        k[np.isnan(k)] = _arviz_khat(columns[np.isnan(k)])
    k = np.array([_believed(*pair) for pair in zip(k, columns, strict=True)])
    return k.reshape(weights.shape[1:])


def _has_tail(log_weight: np.ndarray, eps: float) -> bool:
    """Whether the largest weights take five values at least: no law can be fitted to fewer."""
    finite = np.abs(log_weight[np.isfinite(log_weight)])
    # below this, differences are rounding: they would be fitted as a tail where there is none
    quantum = max(math.sqrt(eps), 8 * eps * float(finite.max()))
    x = np.sort(np.round((log_weight - log_weight.max()) / quantum) * quantum)
    num_tail = math.ceil(min(len(x) / 5, 3 * math.sqrt(len(x))))
    # weights smaller than a rounding error of the largest are nothing
    tail = x[x > max(x[-num_tail - 1], math.log(2.0**-52))]
    return len(np.unique(tail)) >= 5


def _believed(k: float, log_weight: np.ndarray) -> float:
    """k̂, unless the effective sample size contradicts it: a k̂ never reads as good where few draws count."""
    num, weight = len(log_weight), np.exp(log_weight - log_weight.max())
    effective = float(weight.sum() ** 2 / (weight**2).sum())
    needed = max(math.sqrt(num), 0.1 * num if k < 0 else 0.0)
    if math.isfinite(k) and (k >= 0.5 or effective >= needed):
        return k
    if effective > 0.8 * num:
        return -math.inf
    return math.inf if effective < MIN_EFFECTIVE else 1 - math.log(effective) / (2 * math.log(num))


def _arviz_khat(log_weight: np.ndarray) -> np.ndarray:
    """ArviZ's k̂, draws last."""
    import arviz as az

    if hasattr(az, "psislw"):  # 0.x takes log weights
        return az.psislw(log_weight)[1]
    from arviz_stats.base import array_stats

    # 1.x takes the log likelihood of a point left out, whose weight is its inverse
    return array_stats.psislw(-log_weight, axis=-1)[1]


@in_own_modes
def to_arviz(
    bism: BiSM | PersistentVI,
    *args: Any,
    num_draws: int = 1000,
    posterior: Any = None,
    posterior_predictive: Any = None,
    model_samples: Any = None,
    log_likelihood: Any = None,
    coords: Mapping[str, Sequence] | None = None,
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
    \                    ``step_size``, ``energy`` if collected (``recorded``)
    posterior_predictive visible sites                                            chain, draw, obs, ...
    model_samples        visible and latent sites                                 chain, draw, ...
    observed_data        each visible site                                        obs, ...
    constant_data        other observed sites; the outer loss's noise scales      obs, ... ; none
    ==================== ======================================================== =============================

    The guide gives one chain, of independent draws, so R̂ and the effective sample size say nothing about it;
    ``pareto_k`` does. The last three groups of draws are there if they are given: chains of
    :func:`pyro_bism.run_chains`, or an ``MCMC`` that has run :func:`pyro_bism.program`. The user's ``scale``
    and ``mask`` are part of the densities, a subsampling plate's N/B is not; all rows are taken, in order, whatever
    such a plate draws while training, but where the program hands it rows the coordinates of ``obs`` are their numbers.
    If a site is itself called ``obs``, the dimension is called ``obs_id``.
    A ``/`` in a site's name becomes a dot. p̃ is not normalised: ``lp`` and ``log_weight`` are known up to a
    constant, and there is no ``log_likelihood`` for ``az.loo`` to read.

    Groups and root carry the attributes inference_library and its version, created_at, sampling_method ("guide",
    "nuts", "gibbs", "langevin", ...), normalized (0) and configuration (BiSM's settings, JSON).

    :param bism: trained or not.
    :param args: arguments of model and guide, the data among them, as for ``bism.step``.
    :param num_draws: draws of h, a keyword as are the next two: a model with a keyword of one of these names is given
        it by position, or wrapped in ``functools.partial``.
    :param posterior: chains of h given v at these data, ``run_chains(..., sites=[...])``, in the guide's place.
    :param posterior_predictive: chains of v given h at these data.
    :param log_likelihood: of a PersistentVI: an estimate of log p(v | θ) by draw; refused with a standard error above
        0.1 nat, whose noise would pass for the data's.
    :param model_samples: chains of (v, h).
    :param coords: coordinate values by dimension, ``obs`` among them; the default counts from 0.
    :param dims: by site, names of the dimensions that follow ``obs`` (``h_dim_0``, ... by default).
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
            posterior = bism.posterior(*args, num_draws=num_draws, **kwargs)
        computed = bism.deterministics(posterior, *args, **kwargs)
        draws_of = {name: np.asarray(value) for name, value in {**posterior, **computed}.items()}
        names = [site.name for site in bism.pair(*args, **kwargs).sites] if log_likelihood is not None else []
        return _of_parameters(bism, draws_of, log_likelihood, names, coords or {}, dims or {})
    if log_likelihood is not None:
        raise ValueError("log_likelihood goes with draws of θ, and this θ is one point: see that of held-out data.")
    if not isinstance(bism, BiSM):
        raise ValueError(f"to_arviz reads a BiSM or a PersistentVI, got {type(bism).__name__}.")
    pair, leaves, spec = bism._prepare_evaluation(args, kwargs)
    batch = pair.batch(leaves, spec)
    run = _run(pair, batch, num_draws if posterior is None else 1)
    n = len(batch.v)
    known = {**run.visible, **{name: value[0] for name, value in run.latents.items()}}
    given = {
        group: _read(group, source, n, known, rows=group != "model_samples")
        for group, source in (
            ("posterior", posterior),
            ("posterior_predictive", posterior_predictive),
            ("model_samples", model_samples),
        )
        if source is not None
    }
    layout = _Layout.of(pair, batch, run, coords or {}, dims or {})

    draws = ("chain", "draw")
    if posterior is None:
        log_p, log_q = (_numpy(x)[None] for x in (run.log_p, run.log_q))
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
        log_p = read.log_p if read.log_p is not None else _log_p(pair, batch, latents)
        stats = {name: ((*draws, layout.obs)[: x.ndim], x) for name, x in read.stats.items()}
    stats["model_energy"] = ((*draws, layout.obs), -log_p)
    stats["lp"] = (draws, log_p.sum(-1, dtype=float))
    scales = {f.name: np.asarray(getattr(bism.loss, f.name)) for f in _fields(bism.loss) if "sigma" in f.name}

    def drawn(group, names, has_rows):
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


def _read(group: str, source: Any, n: int, known: Mapping[str, np.ndarray], rows: bool) -> _Read:
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
        num_chains, num_draws = next(iter(samples.values())).shape[:2]
        diverging = np.zeros((num_chains, num_draws), bool)
        diagnostics = source.diagnostics()
        for chain, draws in enumerate(diagnostics.get("divergences", {}).values()):
            diverging[chain, list(draws)] = True
        stats = {"diverging": diverging}
        kept = list(diagnostics.get("per draw", {}).values())
        stats |= {name: np.stack([chain[name] for chain in kept]) for name in (kept[0] if kept else ())}
        if not rows:  # each row is a chain of its own
            values = {name: np.moveaxis(x, 2, 1).reshape(-1, x.shape[1], *x.shape[3:]) for name, x in values.items()}
        found = _Read(values, stats, None, type(source.kernel).__name__.lower().removeprefix("recorded"))
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


def _log_p(pair: Pair, batch: visible.Batch, latents: Mapping[str, np.ndarray]) -> np.ndarray:
    """log p̃(v, h) of draws (chain, draw, n, ...), by draw and datapoint."""
    args, kwargs = batch.arguments(batch.v)
    first, n = next(iter(latents.values())), len(batch.v)
    flat = {name: torch.as_tensor(x).reshape(-1, *x.shape[2:]) for name, x in latents.items()}
    found = []
    with torch.no_grad():
        for i in range(math.prod(first.shape[:2])):
            with record({**batch.indices, **{name: x[i] for name, x in flat.items()}}) as p:
                pair.model(*args, **kwargs)
            found.append(_total("model", p.sites, n, None, pair.num_plate_dims)[0])
    return _numpy(torch.stack(found)).reshape(*first.shape[:2], -1)


class GuideDraws(NamedTuple):
    """What num_draws runs of guide and model gave; the draws lead where there are any.

    :ivar log_p: log p̃(v, h), of shape (num_draws, n).
    :ivar log_q: log q(h|v), of shape (num_draws, n).
    """

    latents: dict[str, np.ndarray]
    visible: dict[str, np.ndarray]
    covariates: dict[str, np.ndarray]
    log_p: Tensor
    log_q: Tensor


@in_own_modes
def guide_draws(bism: BiSM, *args: Any, num_draws: int, **kwargs: Any) -> GuideDraws:
    """h ~ q(h|v; φ) at these data, relaxed sites drawn as discrete ones, with the log densities of model and guide."""
    pair, leaves, spec = bism._prepare_evaluation(args, kwargs)
    return _run(pair, pair.batch(leaves, spec), num_draws)


def _run(pair: Pair, batch: visible.Batch, num_draws: int) -> GuideDraws:
    buffers = [b.clone() for b in pair.buffers]
    try:
        with torch.no_grad():
            first, model_sites = _draw(pair, batch)
            check_latents(first, len(batch.v))
            shapes = {name: s.value.shape for name, s in first.items()}
            size = MAX_CELLS // (batch.v.numel() + sum(shape.numel() for shape in shapes.values()))
            chunks: list[_Chunk] = []
            # each chunk is checked at the price of one draw
            if min(num_draws, size) >= 4 and _broadcasts(pair, batch, shapes):
                chunks = _collect(pair, batch, shapes, num_draws, size)
            if not chunks:
                chunks = _collect(pair, batch, shapes, num_draws, None)
    finally:
        # batch-norm statistics move in training, not in looking
        for buffer, value in zip(pair.buffers, buffers, strict=True):
            buffer.copy_(value)
    data = {name: _numpy(s.value) for name, s in model_sites.items() if s.is_data}
    latents = [name for name, s in first.items() if not s.infer.get("is_auxiliary", False)]
    return GuideDraws(
        {name: _numpy(torch.cat([chunk.values[name] for chunk in chunks])) for name in latents},
        {site.name: data.pop(site.name) for site in pair.sites},
        data,
        torch.cat([chunk.log_p for chunk in chunks]),
        torch.cat([chunk.log_q for chunk in chunks]),
    )


class _Chunk(NamedTuple):
    """Some draws, which lead, of all the guide's sites; and their log densities, of shape (draws, n)."""

    values: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor


def _draw(
    pair: Pair, batch: visible.Batch, size: int | None = None, given: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Site], dict[str, Site]]:
    """One run of guide and model: the guide's drawn sites, the model's sites. ``size`` draws stand in a plate."""
    args, kwargs = batch.arguments(batch.v)

    def plate():
        if size is None:
            return contextlib.nullcontext()
        return pyro.plate("_draws", size, dim=-(pair.num_plate_dims + 1))  # left of all others

    with plate(), record({**batch.indices, **(given or {})}, harden=True) as q:
        pair.guide(*args, **kwargs)
    drawn = {name: s for name, s in q.sites.items() if not s.is_observed}
    with plate(), record({**batch.indices, **{name: s.value for name, s in drawn.items()}}, harden=True) as p:
        pair.model(*args, **kwargs)
    return drawn, p.sites


def _chunk(
    pair: Pair,
    batch: visible.Batch,
    shapes: Mapping[str, torch.Size],
    size: int | None,
    given: Mapping[str, Tensor] | None = None,
) -> _Chunk:
    drawn, model_sites = _draw(pair, batch, size, given)
    n = len(batch.v)
    return _Chunk(
        {name: s.value.reshape(size or 1, *shapes[name]) for name, s in drawn.items()},
        _total("model", model_sites, n, size, pair.num_plate_dims),
        _total("guide", drawn, n, size, pair.num_plate_dims),
    )


def _collect(
    pair: Pair, batch: visible.Batch, shapes: Mapping[str, torch.Size], num_draws: int, size: int | None
) -> list[_Chunk]:
    """num_draws draws, ``size`` at a time; empty if they turn out to differ from draws one at a time."""
    chunks = []
    step = size or 1
    # no bar where nobody looks, nor for what is soon over
    for start in tqdm(range(0, num_draws, step), desc="guide draws", delay=3, leave=False, disable=None):
        chunk = _chunk(pair, batch, shapes, size and min(size, num_draws - start))
        if size and not _agrees(pair, batch, shapes, chunk, -1):
            return []
        chunks.append(chunk)
    return chunks


def _broadcasts(pair: Pair, batch: visible.Batch, shapes: Mapping[str, torch.Size]) -> bool:
    """Whether several draws at once give what single ones give: some programs index or reshape from the left."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = _chunk(pair, batch, shapes, 3)
            return all(_agrees(pair, batch, shapes, trial, i) for i in range(3))
    except Exception:  # whatever such a program trips over; single draws are right for every program
        return False


def _agrees(pair: Pair, batch: visible.Batch, shapes: Mapping[str, torch.Size], chunk: _Chunk, i: int) -> bool:
    """Whether a draw has the same log densities when it is scored alone."""
    alone = _chunk(pair, batch, shapes, None, {name: value[i] for name, value in chunk.values.items()})

    def close(x, y):
        tolerance = math.sqrt(torch.finfo(x.dtype).eps)
        return torch.allclose(x, y, rtol=tolerance, atol=tolerance * float(y[y.isfinite()].abs().sum() / len(y)))

    return close(chunk.log_p[i], alone.log_p[0]) and close(chunk.log_q[i], alone.log_q[0])


def _total(role: str, sites: Mapping[str, Site], n: int, size: int | None, num_plate_dims: int) -> Tensor:
    """A program's log density by draw and datapoint, of shape (size, n)."""
    terms = {}
    for name, site in sites.items():
        if size is None:
            terms[name] = per_example(site, n)[None]
            continue
        log_prob = site.log_prob()
        if log_prob.dim() != num_plate_dims + 1 or log_prob.shape[0] != size:
            raise ValueError(f"Site '{name}' does not stand in the plate of draws.")
        terms[name] = log_prob.reshape(size, n, -1).sum(-1)
    total: Any = sum(terms.values())
    if _is_bad(total).any():
        name, term = next((name, term) for name, term in terms.items() if _is_bad(term).any())
        draw, row = _is_bad(term).nonzero()[0].tolist()
        raise FloatingPointError(
            f"The {role}'s site '{name}' has a log density of {term[draw, row].item()} at datapoint {row}. The "
            "parameters have diverged, or the energy has no value there."
        )
    return total


def _is_bad(x: Tensor) -> Tensor:
    """-inf is no fault: a draw that the model rules out has a weight of zero."""
    return torch.isnan(x) | torch.isposinf(x)


def check_latents(sites: Mapping[str, Site], n: int) -> None:
    latents = {name: s for name, s in sites.items() if not s.infer.get("is_auxiliary", False)}
    if not latents:
        raise ValueError("The guide has no latent site, so there is nothing to draw.")
    # an autoguide's Delta sites carry the density of its auxiliary ones
    auxiliary = any(name not in latents and not s.is_delta for name, s in sites.items())
    for name, site in latents.items():
        if site.is_delta and not auxiliary:
            raise ValueError(
                f"Guide site '{name}' is a point mass (Delta): log q(h|v) is not a density there, so the draws have no "
                "weights. Use a guide with a spread."
            )
        shape = tuple(site.value.shape)
        if not shape or shape[0] != n:
            raise ValueError(
                f"Latent site '{name}' has shape {shape}, without the batch of {n} as its leading dimension: all "
                "datapoints share it, so their weights can't be told apart. Put it inside the data plate, or make it "
                "a parameter."
            )


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Names of the dimensions, and their coordinates."""

    obs: str
    rows: np.ndarray
    coords: Mapping[str, Sequence]
    dims: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, pair: Pair, batch: visible.Batch, run: GuideDraws, coords: Mapping, dims: Mapping) -> "_Layout":
        sites = {**run.latents, **run.visible, **run.covariates}
        obs = "obs_id" if "obs" in sites else "obs"
        plate = pair.sites[0].labels
        rows = np.arange(len(batch.v)) if plate is None else _numpy(batch.indices[plate])
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
    """
    :raises ValueError: where the noise of a log-likelihood would pass for the data's.
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
    coords: Mapping,
    dims: Mapping,
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
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
    }


def _settings(thing: Any) -> dict[str, Any]:
    """A loss or a strategy as its class's name and its numbers; a schedule, a function, by its name."""
    values = {f.name: getattr(thing, f.name) for f in _fields(thing)}
    settings = {k: getattr(v, "__qualname__", type(v).__name__) if callable(v) else v for k, v in values.items()}
    if not settings and hasattr(thing, "num_particles"):  # a host ELBO
        settings = {"num_particles": thing.num_particles}
    return {"name": type(thing).__name__, **settings}


def _fields(thing: Any) -> Sequence[dataclasses.Field]:
    return dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
