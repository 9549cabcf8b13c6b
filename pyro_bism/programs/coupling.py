"""Whether rows are rows: no example's log density depends on another example, and none is one number for all."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.nn.modules.batchnorm import _BatchNorm

from ..distributions import base_of, plain_support
from .pair import ModelAndGuide
from .params import unmoved_buffers
from .records import SiteRecord, record
from .visible import Batch, size

ROUNDING = 64  # of the precision of the largest entry: a row's own numbers are computed from the same inputs

MAX_ROWS, FEW = 256, 64  # of more rows these few are looked at, where the programs run on any number of them


def check_rows(
    pair: ModelAndGuide,
    batch: Batch,
    *,
    model: Callable[..., Any] | None = None,
    normalises_batch: bool = False,
    seed: int = 0,
) -> None:
    """Move half of the examples, visible values and latents, and look whether the others' log densities stay.

    The halves are those of the binary digits of a row's number, both of each: so of any two examples either is moved
    once while the other stands, in 2 log₂ n runs. The noise is the same in all of them. What all examples share (a
    latent outside of the data plate, a penalty on weights) stands still; its density may be one number. Of more
    than 256 rows the first 64 are looked at, where the programs take them for a batch of their own. To be called inside
    of :func:`params.jittered`: a coupling whose weights are still zero would not be seen.

    :param model: the program whose rows these are, if it is not the pair's.
    :param normalises_batch: whether the examples may read each other through torch's batch normalisation.
    :raises ValueError: for a site of which an example reads another, or which has one number for all.
    """
    start = _Start(pair, pair.model if model is None else model, batch, seed)
    with (
        unmoved_buffers(pair.buffers),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        pyro.validation_enabled(False),
        pyro.poutine.block(),
        _frozen_batch_norm() if normalises_batch else nullcontext(),
    ):
        start, (drawn, own) = _few(start)
        batch, n = start.batch, len(start.batch.v)
        # away from the draw: where all bits are 0 a product of two does not move with one
        base = _moved(start, (batch.v, drawn), own, torch.ones(n, dtype=torch.bool, device=batch.v.device))
        first: _Described | None = None
        for run, moved in enumerate(_halves(n).to(batch.v.device)):
            torch.default_generator.manual_seed(seed + run)
            with unmoved_buffers(pair.buffers):  # those of the old spectral_norm move at every pass
                seen = _densities(start, *_moved(start, base, own, moved), own)
            first = first or seen
            try:
                _compare(first, seen, moved)
            except ValueError:
                torch.default_generator.manual_seed(seed)
                again = _densities(start, *_moved(start, base, own, torch.zeros_like(moved)), own)
                _require_repeatable(first, again)
                raise


_Values = tuple[Tensor, Mapping[str, Tensor]]  # the visible ones, and the latents by site


class _Start(NamedTuple):
    """Programs and data, as the check was given them."""

    pair: ModelAndGuide
    model: Callable[..., Any]
    batch: Batch
    seed: int


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

    rows: dict[tuple[str, str], Tensor]
    whole: dict[str, Tensor]
    unclear: list[str]


def _compare(first: _Described, seen: _Described, moved: Tensor) -> None:
    for name in seen.unclear:
        raise ValueError(_one_number(name, "though it holds a value for every example"))
    for name, value in seen.whole.items():
        if not _same(value, first.whole[name]).all():
            raise ValueError(_one_number(name, "and it depends on the visible values or the latents"))
    for (role, name), values in seen.rows.items():
        bad = ~(_same(values, first.rows[role, name]) | moved)
        if bad.any():
            raise ValueError(
                f"{role} site '{name}': the log density of one example depends on another example (row "
                f"{int(bad.nonzero()[0])} moves with other rows): batch normalisation in training mode, or an "
                "interaction along the batch. Scores and likelihoods are taken example by example and would be wrong. "
                "Compute every row from its own values (module.eval()); rows that belong together are one example, of "
                "shape (n, rows, ...)."
            )


def _require_repeatable(first: _Described, again: _Described) -> None:
    """Check whether the same values and the same noise give the same densities again.

    :raises ValueError: for a density that is another then.
    """
    for (role, name), values in again.rows.items():
        if not _same(values, first.rows[role, name]).all():
            raise ValueError(
                f"{role} site '{name}': its log density is another at every pass, with the same values and the same "
                "noise: a module keeps something from pass to pass in an attribute (self.mean = ...). Keep it in a "
                "buffer that is changed in place (register_buffer; self.mean.copy_(...)), or fix it (module.eval())."
            )


def _few(start: _Start) -> tuple[_Start, tuple[dict[str, Tensor], _Own]]:
    """What is looked at, and a draw there: the batch, or its first rows where the programs take these for one too."""
    batch, subsamples = start.batch, start.pair.subsamples
    n = len(batch.v)
    if n > MAX_ROWS and all(subsamples[name].takes_all for name in batch.indices):
        leaves = [x[:FEW] if isinstance(x, Tensor) and x.shape[:1] == (n,) else x for x in batch.leaves]
        sites = tuple(replace(site, shape=(FEW, *site.shape[1:])) for site in batch.sites)
        few = start._replace(batch=replace(batch, sites=sites, indices={}, leaves=leaves))
        try:
            drawn, own = _drawn(few)
        except Exception:  # whatever a program says where it takes n rows and no others
            return start, _drawn(start)
        if own.plates and all(len(site.value) == FEW for site in own.visible.values()):
            return few, (drawn, own)
    return start, _drawn(start)


def _halves(n: int) -> Tensor:
    """Which rows move, (runs, n): none in the first run."""
    digits = torch.arange(n) >> torch.arange(max(1, math.ceil(math.log2(n))))[:, None] & 1 == 1
    return torch.cat([torch.zeros(1, n, dtype=torch.bool), digits, ~digits])


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Whether entries agree but for rounding, or are the same infinity or NaN."""
    known = b[torch.isfinite(b)].abs()
    scale = known.max() if known.numel() else 0.0
    return ((a - b).abs() <= ROUNDING * torch.finfo(a.dtype).eps * scale) | (a == b) | (a.isnan() & b.isnan())


def _one_number(name: str, why: str) -> str:
    return (
        f"Site '{name}' has one log density for the whole batch, {why}: a score and a likelihood are an example's. Put "
        "the statement inside the data plate, one entry an example (no .sum() over the batch, no .to_event() of it)."
    )


@contextmanager
def _frozen_batch_norm() -> Iterator[None]:
    """Inside, torch's batch normalisation takes its running statistics: what else couples rows is seen then."""
    switched: list[torch.nn.Module] = []

    def switch(module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
            switched.append(module)
            module.training = False

    hook = torch.nn.modules.module.register_module_forward_pre_hook(switch)
    try:
        yield
    finally:
        hook.remove()
        for module in switched:
            module.training = True


def _drawn(start: _Start) -> tuple[dict[str, Tensor], _Own]:
    """A draw of all latents, the guide's, and else the model's."""
    pair, batch = start.pair, start.batch
    args, kwargs = batch.arguments(batch.v)
    torch.default_generator.manual_seed(start.seed)
    with record(batch.indices) as q:
        pair.guide(*args, **kwargs)
    drawn = {name: s.value for name, s in q.sites.items() if not s.is_observed}
    with record({**drawn, **batch.indices}, pair.relaxed_sites) as p:
        start.model(*args, **kwargs)
    visible = {site.name: p.sites[site.name] for site in batch.sites}
    plates = pair.data_plates
    latents = {}
    for name, site in p.sites.items():
        axis = None if site.is_observed else _axis(site, plates, site.value.shape, len(batch.v), site.fn.event_dim)
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


def _moved(start: _Start, base: _Values, own: _Own, moved: Tensor) -> _Values:
    """Visible values and latents, those of some examples anywhere on their support."""
    batch, relaxed_sites = start.batch, start.pair.relaxed_sites
    v, latents = base
    columns, first = [], 0
    for site in batch.sites:
        part = v[:, first : first + size(site)]
        first += size(site)
        columns.append(_elsewhere(own.visible[site.name], part.reshape(site.shape)).reshape(part.shape))
    v = torch.where(moved[:, None], torch.cat(columns, -1), v)
    values = dict(latents)
    for name, (axis, latent) in own.latents.items():
        value = latents[name]
        rows = moved.reshape(-1, *[1] * (value.dim() - axis - 1))
        values[name] = torch.where(rows, _elsewhere(latent, value, name in relaxed_sites), value)
    return v, values


def _elsewhere(site: SiteRecord, value: Tensor, is_soft: bool = False) -> Tensor:
    """Other values of a site's support: a coupling of bits that are 0 at the draw has to be seen as well."""
    base = base_of(site.fn)
    if is_soft:
        return (2 * torch.randn_like(value)).softmax(-1) if base.event_shape else torch.rand_like(value)
    if not site.fn.support.is_discrete:
        transform: Any = biject_to(plain_support(site.fn.support))
        x = transform.inv(value)
        spread = x.std(unbiased=False)
        step = torch.where(spread > 0, 2 * spread, torch.ones_like(spread)) * torch.randn_like(x)
        moved: Tensor = transform(x + step)
        return moved.to(value.dtype)
    try:
        support = base.enumerate_support(expand=False)
    except NotImplementedError:  # counts, of any size
        return value + torch.randint(3, value.shape, device=value.device).to(value.dtype)
    support = support.reshape(len(support), *base.event_shape).to(value.dtype)
    units = value.shape[: value.dim() - len(base.event_shape)]
    return support[torch.randint(len(support), units, device=value.device)]


def _densities(start: _Start, v: Tensor, values: Mapping[str, Tensor], own: _Own) -> _Described:
    pair, indices, n = start.pair, start.batch.indices, len(v)
    args, kwargs = start.batch.arguments(v)
    torch.default_generator.manual_seed(start.seed)  # what a program draws by itself (dropout) is part of the density
    with record({**values, **indices}, pair.relaxed_sites) as p:
        start.model(*args, **kwargs)
    given = {name: value for name, value in values.items() if name not in own.masses}
    try:
        with record({**given, **indices}) as q:
            pair.guide(*args, **kwargs)
    except KeyError:  # a flow without an inverse scores its last draw alone
        q = record()
    found = _Described({}, {}, [])
    for role, name, site in [
        *[("Model", name, site) for name, site in p.sites.items()],
        *[("Guide", name, site) for name, site in q.sites.items() if not site.is_observed],
    ]:
        log_prob = torch.as_tensor(site.log_prob())
        axis = _axis(site, own.plates, log_prob.shape, n)
        if axis is not None:
            found.rows[role, name] = _per_row(log_prob, axis)
        elif n > 1 and site.fn.event_dim > 1 and site.value.shape[:1] == (n,):
            found.unclear.append(name)
        elif role == "Model":
            found.whole[name] = log_prob.sum()
        if role == "Guide" and name in own.masses and name in own.latents:
            found.rows["Guide", f"{name} (its value)"] = _per_row(site.value, own.latents[name][0])
    return found


def _per_row(x: Tensor, axis: int) -> Tensor:
    return x.movedim(axis, 0).reshape(x.shape[axis], -1).sum(-1)
