"""What a model and a guide are: found by running them once on arguments of a structure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.distributions.distribution import Unit
from numpyro.handlers import seed

from ..distributions import ConcreteBernoulli, ConcreteOneHot, base_of, is_averaged
from ..losses import OuterLoss
from . import rows, visible
from .checks import (
    Analysis,
    check_examples,
    check_guide,
    check_plates,
    check_scores,
    check_sites,
    find_change_of_variables,
    run_once,
    warn_scaled,
)
from .modes import on_numbers
from .pair import ModelAndGuide
from .params import collect, reject_shared, unconstrain
from .records import SiteRecord, is_enumerated, leading_plates, record


def analyse(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    leaves: Sequence[Any],
    spec: Any,
    rng_key: Array,
    init_params: Mapping[str, Any] | None,
    names: Sequence[str] | None,
    loss: OuterLoss | None,
    strategy: Any,
    static_kwargs: Mapping[str, Any],
    discrete: bool = False,
    partial_guide: bool = False,
    look: Callable[[Analysis, visible.Batch, Array], None] | None = None,
) -> Analysis:
    """Run guide and model once on these arguments, check all that can be checked, and describe them.

    It always runs on concrete numbers: inside a compiled function, where the arguments have none, on stand-ins
    of the same shapes.

    :param guide: None for a model alone: its latents are then nobody's.
    :param loss: None for a method that takes no score of the pair.
    :param strategy: the hypergradient: it says what it needs of the guide.
    :param discrete: whether discrete sites may be visible.
    :param partial_guide: whether the guide may leave latents out, and the model may have no parameters.
    :param look: is shown the pair, its initial values and a batch, all in concrete numbers, and a random key.
    :raises ValueError: for every misuse, naming the site and the cure.
    """
    alone = guide is None
    guide = _no_guide if guide is None else guide
    with on_numbers():
        asked = (rng_key, leaves, init_params)
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(asked))
        if traced:
            rng_key = jax.random.key(0)
        key_stand_in, _, key_guide, key_scores = jax.random.split(rng_key, 4)
        # each of its own: two arguments of one shape are told apart by their values
        leaves = [_stand_in(leaf, key_stand_in, i) for i, leaf in enumerate(leaves)]
        given = {k: jax.tree.map(lambda x: _stand_in(x, key_stand_in, 0), v) for k, v in (init_params or {}).items()}
        model, guide = (partial(p, **static_kwargs) if static_kwargs else p for p in (model, guide))
        p, q, soft = _first_run(model, guide, rng_key, given, leaves, spec)
        plates = rows.plates(q, p, leaves)
        # an example that stands twice can't be moved on its own in every program: a look is taken at rows that don't
        twice = {
            plate.argument: jnp.arange(plate.size, dtype=leaves[plate.argument].dtype) % plate.full_size
            for plate in plates.values()
            if plate.argument is not None and not rows.are_distinct(leaves[plate.argument])
        }
        if twice:
            leaves = [twice.get(i, leaf) for i, leaf in enumerate(leaves)]
            p, q, soft = _first_run(model, guide, rng_key, given, leaves, spec)
        p.handed.update(name for name in q.handed if name in p.subsamples)
        check_plates((*p.sites.values(), *q.sites.values()))
        latents = {name: s for name, s in q.sites.items() if not s.is_observed}
        sites = visible.find(p.sites, leaves, names, discrete)
        for found in sites:
            warn_scaled(p.sites[found.name])
        if not (alone or partial_guide):
            check_sites(p.sites, latents, sites[0].shape[0])
        for name, site in q.sites.items():
            if isinstance(base_of(site.fn), Unit):
                raise ValueError(
                    f"The guide has a factor, '{name}' (AutoDAIS and its kin have one): its log density is not that of "
                    "its draws then, and the score needs it. Use a guide of sample statements alone."
                )
        theta, phi = collect(p.params), collect(q.params)
        reject_shared(theta, phi)
        # a module with priors on all its weights leaves a parameter without numbers
        if not (partial_guide or jax.tree.leaves({name: p.params[name]["value"] for name in theta})):
            raise ValueError("The model has no parameter to train: no numpyro.param and no module.")
        unknown = sorted(set(given) - set(theta) - set(phi) - set(q.mutable) - set(p.mutable))
        if unknown:
            raise ValueError(
                f"init_params names {unknown}, but the programs' parameters are {sorted({**theta, **phi})}."
            )
        enumerated = tuple(name for name, s in latents.items() if is_enumerated(s.infer))
        averaged = tuple(name for name, s in latents.items() if is_averaged(s.fn))
        sampled = tuple(name for name, s in latents.items() if not (name in (*enumerated, *averaged) or s.is_delta))
        every = (*p.sites.values(), *q.sites.values())
        dims = [len(s.fn.batch_shape) for s in every] + [-f.dim for s in every for f in s.frames]
        pair = ModelAndGuide(
            model,
            guide,
            sites,
            theta,
            phi,
            soft,
            enumerated,
            sampled,
            plates,
            _num_data(p.sites, sites),
            max(dims),
            tuple(name for name in sampled if not latents[name].fn.has_rsample),
            averaged=averaged,
            data_plates=leading_plates(p.sites[site.name] for site in sites),
        )
        if loss is not None:
            strategy.check(loss, pair)
        start = _start(pair, p, q)
        shapes = {name: jax.tree.map(jnp.shape, value) for name, value in {**start.theta, **start.phi}.items()}
        pair = replace(pair, shapes=shapes)
        start = start._replace(pair=pair)
        handed = frozenset(name for name, plate in plates.items() if plate.is_handed)
        batch = visible.batch(sites, {**q.subsamples, **p.subsamples}, leaves, spec, handed=handed)
        pair = replace(pair, reads_rows=_reads_rows(start, batch))
        start, batch = start._replace(pair=pair), replace(batch, reads_rows=pair.reads_rows)
        check_guide(start, latents, batch, key_guide, strategy)
        if loss is not None:
            change = find_change_of_variables(start, batch, key_scores, latents, p.sites)
            pair = replace(pair, change=change)
            start = start._replace(pair=pair)
            check_scores(start, batch, key_scores, loss, [name for name in latents if name in p.sites])
            if not strategy.reparameterises:
                check_examples(start, batch, key_scores)
        if look is not None:
            look(start, batch, key_scores)
    if traced or twice:  # initial values may depend on the key and on the data: these come from the ones asked for
        rng_key, leaves, init_params = asked
        p, q, _ = _first_run(model, guide, rng_key, init_params or {}, leaves, spec)
        start = _start(start.pair, p, q)
    return start


def _no_guide(*args: Any, **kwargs: Any) -> None:
    """The guide of a model alone."""


def _reads_rows(start: Analysis, batch: visible.Batch) -> bool:
    """Whether both programs run, to the same result, on arguments that have the plate's rows and no others."""
    pair = start.pair
    leading = all(leaf.ndim == -s.axis for s in pair.sites for leaf in [batch.leaves[s.leaves[0]]])
    if not (leading and any(site.plate for site in pair.sites)):
        return False

    params = pair.params(start.theta, start.phi, start.mutable)

    def log_weight(batch: visible.Batch, rng_key: Array) -> Array:
        draw, _ = pair.draw(rng_key, params, batch, batch.v)
        return pair.log_weight(rng_key, params, batch, batch.v, draw)

    try:
        lean = run_once(log_weight, replace(batch, reads_rows=True), jax.random.key(0))
    except Exception:  # whatever a program wanted of the argument: it gets the whole array then
        return False
    return bool(jnp.allclose(lean, run_once(log_weight, batch, jax.random.key(0))))


def resized(pair: ModelAndGuide, leaves: Sequence[Any], spec: Any) -> ModelAndGuide | None:
    """The same programs on arguments that differ in size alone, described without running or compiling anything.

    :returns: None if they turn out to have other sites, parameters or subsampling plates there.
    """

    def run(arrays: Sequence[Array]) -> None:
        rest = iter(arrays)
        filled = [next(rest) if isinstance(leaf, Array) else leaf for leaf in leaves]
        seen.extend(_first_run(pair.model, pair.guide, jax.random.key(0), {}, filled, spec)[:2])

    seen: list[record] = []
    jax.eval_shape(run, [leaf for leaf in leaves if isinstance(leaf, Array)])
    p, q = seen
    known = {**q.plates, **p.plates}
    handed = {name for name, plate in pair.subsampled.items() if plate.is_handed}
    subsampled = {
        name: replace(pair.subsampled[name], full_size=sizes[0], size=sizes[1])
        for name, sizes in known.items()
        if name in pair.subsampled and (sizes[0] != sizes[1] or name in handed)
    }
    others = {name for name, sizes in known.items() if sizes[0] != sizes[1] and name not in subsampled}
    latents = [name for name, s in q.sites.items() if not (s.is_observed or s.is_delta)]
    same = (
        not others
        and set(subsampled) == set(pair.subsampled)
        and set(latents) == {*pair.enumerated, *pair.sampled}
        and (set(p.params), set(q.params)) == (set(pair.theta), set(pair.phi))
        and all(site.name in p.sites for site in pair.sites)
    )
    if not same:
        return None
    for site in pair.sites:
        visible.require_declared(p.sites[site.name])
    sites = tuple(replace(site, shape=jnp.shape(p.sites[site.name].value)) for site in pair.sites)
    num_data = _num_data(p.sites, sites)
    return replace(pair, sites=sites, subsampled=subsampled, num_data=num_data, shapes={})


def _first_run(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    rng_key: Array,
    given: Mapping[str, Any],
    leaves: Sequence[Any],
    spec: Any,
) -> tuple[record, record, frozenset[str]]:
    """What model and guide recorded, the model at the guide's draws; and the guide's relaxed sites."""
    args, kwargs = jax.tree.unflatten(spec, leaves)
    _, key_model, key_guide, _ = jax.random.split(rng_key, 4)
    q = record(given)
    try:
        with seed(rng_seed=key_guide), q:
            guide(*args, **kwargs)
    except (ValueError, TypeError) as error:
        rows.explain(error, q.plates, leaves)
        raise
    latents = {name: s for name, s in q.sites.items() if not s.is_observed}
    soft = frozenset(
        name for name, s in latents.items() if isinstance(base_of(s.fn), ConcreteBernoulli | ConcreteOneHot)
    )
    values = {name: s.value for name, s in latents.items()}
    # a plate that would draw rows has to take the guide's
    p = record(given, values, soft, offered=q.subsamples)
    try:
        with seed(rng_seed=key_model), p:
            model(*args, **kwargs)
    except (ValueError, TypeError) as error:
        rows.explain(error, p.plates, leaves)
        if "relaxed guide site" in str(error):
            raise ValueError(f"Sites {sorted(soft)}: {error}.") from error
        raise
    return p, q, soft


def _start(pair: ModelAndGuide, p: record, q: record) -> Analysis:
    return Analysis(
        pair,
        unconstrain(pair.theta, {name: s["value"] for name, s in p.params.items()}),
        unconstrain(pair.phi, {name: s["value"] for name, s in q.params.items()}),
        # of strong types, as the parameters: a program may start a counter at 0.0
        jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.result_type(x)), {**q.mutable, **p.mutable}),
    )


def _stand_in(leaf: Any, rng_key: Array, i: int) -> Any:
    if not isinstance(leaf, jax.core.Tracer):
        return leaf
    rng_key = jax.random.fold_in(rng_key, i)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jax.random.normal(rng_key, leaf.shape, leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _num_data(model_sites: Mapping[str, SiteRecord], sites: Sequence[visible.VisibleSite]) -> int:
    """How many examples a host ELBO's value speaks for: n, times the plates' N/B."""
    first = model_sites[sites[0].name]
    num = float(sites[0].shape[0])
    for frame in first.frames:
        full_size, size = first.plates[frame.name]
        num *= full_size / size
    return round(num)
