"""Whether rows are rows: no example's log density depends on another example, and none is one number for all."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import biject_to
from numpyro.handlers import block, seed

from ..compiled.convolutions import compiled_once
from ..distributions import base_of
from .analysis import resized
from .pair import ModelAndGuide
from .records import SiteRecord, record
from .visible import Batch, size
from .visible import batch as batch_of

ROUNDING = 64  # of the precision of the largest entry: a row's own numbers are computed from the same inputs
MAX_ROWS, FEW = 256, 64  # of more rows these few are looked at, where the programs run on any number of them


def check_rows(
    rng_key: Array,
    pair: ModelAndGuide,
    params: Mapping[str, Any],
    batch: Batch,
    *,
    model: Callable[..., Any] | None = None,
    normalises_batch: bool = False,
) -> None:
    """Move half of the examples, visible values and latents, and look whether the others' log densities stay.

    The halves are those of the binary digits of a row's number, both of each: so of any two examples either is moved
    once while the other stands, in 2 log₂ n runs. The noise is the same in all of them. What all examples share (a
    latent outside of the data plate, a penalty on weights) stands still; its density may be one number. Of more
    than 256 rows the first 64 are looked at, where the programs take them for a batch of their own.

    :param params: off the initial ones: a coupling whose weights are still zero would not be seen.
    :param model: the program whose rows these are, if it is not the pair's.
    :param normalises_batch: whether the examples may read each other through a library's batch normalisation.
    :raises ValueError: for a site of which an example reads another, or which has one number for all.
    """
    start = _Start(pair, pair.model if model is None else model, params, _few(pair, batch))
    n = len(start.batch.v)
    described: list[_Described] = []

    def look(rng_key: Array, halves: Array) -> Any:
        key_draw, key_base, key_move = jax.random.split(rng_key, 3)
        drawn, own = _drawn(key_draw, start)
        # away from the draw: where all bits are 0 a product of two does not move with one
        base = _moved(key_base, start, (start.batch.v, drawn), own, jnp.ones(n, bool))

        def at(inputs: tuple[Array, Array]) -> Any:
            moved, key = inputs
            v, values = _moved(key, start, base, own, moved)
            seen = _densities(key_draw, start, v, values, own)
            described.append(seen)
            return seen.rows, seen.whole

        return jax.lax.map(at, (halves, jax.random.split(key_move, len(halves))))

    halves = _halves(n)
    with _frozen_batch_norm() if normalises_batch else nullcontext():
        rows, whole = jax.device_get(compiled_once(look, n)(rng_key, halves))
    for name in described[0].unclear:
        raise ValueError(_one_number(name, "though it holds a value for every example"))
    for name, values in whole.items():
        if not _same(values, values[:1]).all():
            raise ValueError(_one_number(name, "and it depends on the visible values or the latents"))
    for (role, name), values in rows.items():
        bad = ~(_same(values, values[:1]) | halves).all(0)
        if bad.any():
            raise ValueError(
                f"{role} site '{name}': the log density of one example depends on another example (row "
                f"{int(bad.argmax())} moves with other rows): batch normalisation in training mode, or an interaction "
                "along the batch. Scores and likelihoods are taken example by example and would be wrong. Compute "
                "every row from its own values (use_running_average=True); rows that belong together are one example, "
                "of shape (n, rows, ...)."
            )


_Values = tuple[Array, Mapping[str, Array]]  # the visible ones, and the latents by site


class _Start(NamedTuple):
    """Programs, parameters and data, as the check was given them."""

    pair: ModelAndGuide
    model: Callable[..., Any]
    params: Mapping[str, Any]
    batch: Batch


class _Own(NamedTuple):
    """What belongs to the examples, as the programs' first run showed it.

    :ivar plates: along the leading axis of the visible values.
    :ivar latents: the axis of the examples in each latent that they do not share, and its site.
    :ivar visible: the visible sites.
    :ivar masses: the guide's point masses: they follow from v and the other latents.
    """

    plates: frozenset[str]
    latents: dict[str, tuple[int, SiteRecord]]
    visible: dict[str, SiteRecord]
    masses: set[str]


class _Described(NamedTuple):
    """Log densities at one point.

    :ivar rows: by role and site, of every example, (n,); of a point mass the value itself as well.
    :ivar whole: by the model's site, one number for all examples.
    :ivar unclear: sites that hold a value for every example, and have one number for all.
    """

    rows: dict[tuple[str, str], Array]
    whole: dict[str, Array]
    unclear: list[str]


def _few(pair: ModelAndGuide, batch: Batch) -> Batch:
    """The batch, or its first rows where the programs take them for a batch of their own: any number will do then."""
    n = len(batch.v)
    if n <= MAX_ROWS or batch.indices:
        return batch
    leaves = [x[:FEW] if isinstance(x, Array) and x.shape[:1] == (n,) else x for x in batch.leaves]
    try:
        few = resized(pair, leaves, batch.spec)
    except Exception:  # whatever a program says where it takes n rows and no others
        return batch
    if few is None or any(site.shape[0] != FEW for site in few.sites):
        return batch
    return batch_of(few.sites, {}, leaves, batch.spec)


def _halves(n: int) -> np.ndarray:
    """Which rows move, (runs, n): none in the first run."""
    digits = np.arange(n) >> np.arange(max(1, math.ceil(math.log2(n))))[:, None] & 1 == 1
    return np.concatenate([np.zeros((1, n), bool), digits, ~digits])


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether entries agree but for rounding, or are the same infinity or NaN."""
    scale = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    with np.errstate(invalid="ignore"):
        near = np.abs(a - b) <= ROUNDING * np.finfo(a.dtype).eps * scale
    same: np.ndarray = near | (a == b) | (np.isnan(a) & np.isnan(b))
    return same


def _one_number(name: str, why: str) -> str:
    return (
        f"Site '{name}' has one log density for the whole batch, {why}: a score and a likelihood are an example's. Put "
        "the statement inside the data plate, one entry an example (no .sum() over the batch, no .to_event() of it)."
    )


@contextmanager
def _frozen_batch_norm() -> Iterator[None]:
    """Inside, flax's and equinox's batch normalisation takes its running statistics: what else couples rows is seen.

    JAX has no module hooks: flax's linen has interceptors; where there are none the method is replaced meanwhile.
    """
    linen, nnx, eqx = (sys.modules.get(name) for name in ("flax.linen", "flax.nnx", "equinox"))

    def running(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if linen is None or not (isinstance(module, linen.BatchNorm) and context.method_name == "__call__"):
            return method(*args, **kwargs)
        own = module.use_running_average
        object.__setattr__(module, "use_running_average", True)  # linen takes its flag from one of two places
        try:
            return method(*args[:1], **{**kwargs, "use_running_average": None})
        finally:
            object.__setattr__(module, "use_running_average", own)

    with ExitStack() as stack:
        if linen is not None:
            stack.enter_context(linen.intercept_methods(running))
        if nnx is not None:
            stack.enter_context(_called_with(nnx.BatchNorm, use_running_average=True))
        if eqx is not None:
            stack.enter_context(_called_with(eqx.nn.BatchNorm, inference=True))
        yield


@contextmanager
def _called_with(kind: Any, **settings: Any) -> Iterator[None]:
    """Inside, modules of this class are called with these settings."""
    call = kind.__call__

    def run(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        # the flag is flax's second argument, by position or by name
        return call(self, x, *(args if "inference" in settings else ()), **{**kwargs, **settings})

    kind.__call__ = run
    try:
        yield
    finally:
        kind.__call__ = call


def _drawn(rng_key: Array, start: _Start) -> tuple[dict[str, Array], _Own]:
    """A draw of all latents, the guide's, and else the model's."""
    pair, batch = start.pair, start.batch
    args, kwargs = batch.arguments(batch.v)
    key_model, key_guide = jax.random.split(rng_key)
    with block(), seed(rng_seed=key_guide), record(start.params, batch.indices) as q:
        pair.guide(*args, **kwargs)
    drawn = {name: s.value for name, s in q.sites.items() if not s.is_observed}
    with block(), seed(rng_seed=key_model), record(start.params, {**drawn, **batch.indices}, pair.relaxed_sites) as p:
        start.model(*args, **kwargs)
    visible = {site.name: p.sites[site.name] for site in batch.sites}
    plates = pair.data_plates
    latents = {}
    for name, site in p.sites.items():
        axis = None if site.is_observed else _axis(site, plates, jnp.shape(site.value), len(batch.v), site.fn.event_dim)
        if axis is not None:
            latents[name] = axis, site
    drawn |= {name: s.value for name, s in p.sites.items() if not s.is_observed}
    masses = {name for name, s in q.sites.items() if s.is_delta and not s.is_observed}
    return drawn, _Own(plates, latents, visible, masses)


def _axis(site: SiteRecord, plates: frozenset[str], shape: Sequence[int], n: int, event_dim: int = 0) -> int | None:
    """Along which axis of a site's value, or of its log density, the examples stand; None if there is none."""
    dims = [frame.dim for frame in site.frames if frame.name in plates]
    axis = len(shape) - event_dim + dims[0] if dims else 0
    return axis if 0 <= axis < len(shape) - event_dim and shape[axis] == n else None


def _moved(rng_key: Array, start: _Start, base: _Values, own: _Own, moved: Array) -> _Values:
    """Visible values and latents, those of some examples anywhere on their support."""
    batch, relaxed_sites = start.batch, start.pair.relaxed_sites
    v, latents = base
    keys = iter(jax.random.split(rng_key, len(own.latents) + len(batch.sites)))
    columns, first = [], 0
    for site in batch.sites:
        part = v[:, first : first + size(site)]
        first += size(site)
        columns.append(_elsewhere(next(keys), own.visible[site.name], part.reshape(site.shape)).reshape(part.shape))
    v = jnp.where(moved[:, None], jnp.concatenate(columns, -1), v)
    values = dict(latents)
    for name, (axis, latent) in own.latents.items():
        value = latents[name]
        rows = moved.reshape(-1, *[1] * (jnp.ndim(value) - axis - 1))
        values[name] = jnp.where(rows, _elsewhere(next(keys), latent, value, name in relaxed_sites), value)
    return v, values


def _elsewhere(rng_key: Array, site: SiteRecord, value: Array, is_soft: bool = False) -> Array:
    """Other values of a site's support: a coupling of bits that are 0 at the draw has to be seen as well."""
    base = base_of(site.fn)
    if is_soft:
        if base.event_shape:
            return jax.nn.softmax(2 * jax.random.normal(rng_key, value.shape, value.dtype), -1)
        return jax.random.uniform(rng_key, value.shape, value.dtype)
    if not site.fn.support.is_discrete:
        transform = biject_to(site.fn.support)
        x = transform.inv(value)
        spread = x.std()
        step = jnp.where(spread > 0, 2 * spread, 1.0) * jax.random.normal(rng_key, x.shape, x.dtype)
        elsewhere: Array = transform(x + step).astype(value.dtype)
        return elsewhere
    try:
        support = base.enumerate_support(expand=False)
    except NotImplementedError:  # counts, of any size
        return value + jax.random.randint(rng_key, value.shape, 0, 3).astype(value.dtype)
    support = support.reshape(len(support), *base.event_shape)
    units = value.shape[: value.ndim - len(base.event_shape)]
    drawn: Array = support[jax.random.randint(rng_key, units, 0, len(support))]
    return drawn.astype(value.dtype)


def _densities(rng_key: Array, start: _Start, v: Array, values: Mapping[str, Array], own: _Own) -> _Described:
    pair, indices, n = start.pair, start.batch.indices, len(v)
    args, kwargs = start.batch.arguments(v)
    key_model, key_guide = jax.random.split(rng_key)
    with block(), seed(rng_seed=key_model), record(start.params, {**values, **indices}, pair.relaxed_sites) as p:
        start.model(*args, **kwargs)
    given = {name: value for name, value in values.items() if name not in own.masses}
    with block(), seed(rng_seed=key_guide), record(start.params, {**given, **indices}) as q:
        pair.guide(*args, **kwargs)
    found = _Described({}, {}, [])
    for role, name, site in [
        *[("Model", name, site) for name, site in p.sites.items()],
        *[("Guide", name, site) for name, site in q.sites.items() if not site.is_observed],
    ]:
        log_prob = jnp.asarray(site.log_prob())
        axis = _axis(site, own.plates, log_prob.shape, n)
        if axis is not None:
            found.rows[role, name] = _per_row(log_prob, axis)
        elif n > 1 and site.fn.event_dim > 1 and jnp.shape(site.value)[:1] == (n,):
            found.unclear.append(name)
        elif role == "Model":
            found.whole[name] = log_prob.sum()
        if role == "Guide" and name in own.masses and name in own.latents:
            found.rows["Guide", f"{name} (its value)"] = _per_row(site.value, own.latents[name][0])
    return found


def _per_row(x: Array, axis: int) -> Array:
    return jnp.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).sum(-1)
