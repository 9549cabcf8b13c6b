"""Which sites are visible, and how perturbed data reach the model and the guide.

Model and guide both read the data from their arguments, so it is the *argument* that has to be perturbed.
A visible site's value is found among the leaves of the arguments: it is one of them, or the rows of one
that a subsampling plate picked. :class:`Batch` is then a map from the matrix v, one row an example, to the
arguments of the programs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType
from numpyro.distributions import constraints

from ..distributions import base_of
from . import rows
from .modes import on_numbers

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a program is called with: ``(args, kwargs)``."""


@dataclass(frozen=True)
class VisibleSite:
    """Where a visible site's value stands among the arguments' leaves.

    :ivar leaves: positions of the leaves that hold the value (the same one may be passed twice).
    :ivar plate: the subsampling plate whose indices pick the value's rows out of the leaf, or None.
    :ivar axis: the leaf's axis that the plate subsamples, counted from the right.
    :ivar shape: the value's shape, the batch first.
    :ivar labels: the plate whose rows the batch is, whether it picks them or they came in picked; None if it is all.
    :ivar is_discrete: whether its support is; a method that needs scores takes no such site.
    :ivar is_soft: whether the programs take real numbers in its stead, so that it keeps no integer type.
    """

    name: str
    leaves: tuple[int, ...]
    plate: str | None
    axis: int
    shape: tuple[int, ...]
    is_discrete: bool = False
    is_soft: bool = False
    labels: str | None = None


def size(site: VisibleSite) -> int:
    """How many columns of v a site takes."""
    return math.prod(site.shape[1:])


@dataclass(frozen=True)
class Batch:
    """One call's arguments as a function of the visible values.

    :ivar v: the clean visible values, all sites side by side, of shape (n, D).
    :ivar indices: the rows of each plate that takes not all, the same for a whole step.
    :ivar reads_rows: whether the programs read of a subsampled argument nothing but the plate's rows.
    :ivar handed: the plates that the programs hand their rows.
    """

    v: Array
    sites: tuple[VisibleSite, ...]
    indices: Mapping[str, Array]
    leaves: Sequence[Any]
    spec: Any
    reads_rows: bool = False
    handed: frozenset[str] = frozenset()

    def arguments(self, v: Array) -> Arguments:
        """The programs' ``(args, kwargs)`` with v, of shape (n, D), in place of the visible values."""
        leaves = list(self.leaves)
        start = 0
        for site in self.sites:
            size = math.prod(site.shape[1:])
            value = v[:, start : start + size].reshape(site.shape)
            start += size
            for i in site.leaves:
                # side by side in v the sites share a type, the widest; each argument keeps its own
                own = value if site.is_soft else value.astype(leaves[i].dtype)
                if site.plate is None:
                    leaves[i] = own
                elif self.reads_rows:
                    leaves[i] = Rows(leaves[i], self.indices[site.plate], own)
                else:  # a copy of all the data
                    taken = self.indices[site.plate]
                    if site.plate in self.handed:
                        own = _only_distinct(site, taken, own)
                    place = (..., taken) + (slice(None),) * (-site.axis - 1)
                    leaves[i] = leaves[i].astype(own.dtype).at[place].set(own)
        found: Arguments = jax.tree.unflatten(self.spec, leaves)
        return found


def _only_distinct(site: VisibleSite, taken: Array, values: Array) -> Array:
    """The values, or NaN at rows that stand twice: a copy of the data has one value a row, and each has its own noise.

    :raises ValueError: for these, where the rows have numbers.
    """
    if not rows.are_distinct(taken):
        raise ValueError(
            f"Plate '{site.plate}' is handed a row twice, and model or guide read more of the data of site "
            f"'{site.name}' than the rows of the plate: the two copies have noise of their own there. Hand it "
            "distinct rows, or read the data by the plate's rows alone: with plate as rows: x[rows]."
        )
    twice = rows.repeated(taken).reshape((-1,) + (1,) * (-site.axis - 1))
    return values * jnp.where(twice, jnp.nan, 1.0)  # a factor: the gradient has to be NaN as well


class Rows:
    """Stands for an argument x of which a program reads x[rows] alone: nothing of the rest is copied.

    It has x's shape and type, and no other property of an array. Whether that is enough for a program, and whether it
    reads the plate's rows and no others, is tried on concrete numbers when the program is analysed.
    """

    def __init__(self, x: Array, rows: Array, values: Array):
        self.shape, self.dtype, self.ndim, self.size = x.shape, x.dtype, x.ndim, x.size
        self._rows, self.values = rows, values

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Array:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if first is not self._rows and not self._is_rows(first):
            raise TypeError("other rows than the plate's")
        return self.values[(slice(None), *rest)] if rest else self.values

    def _is_rows(self, index: Any) -> bool:
        # an enumerating handler reshapes the indices, so while they are traced their shape has to do
        same = isinstance(index, Array) and (index.shape, index.dtype) == (self._rows.shape, self._rows.dtype)
        return same and (isinstance(index, jax.core.Tracer) or bool((index == self._rows).all()))


def batch(
    sites: tuple[VisibleSite, ...],
    indices: Mapping[str, Array],
    leaves: Sequence[Any],
    spec: Any,
    reads_rows: bool = False,
    handed: frozenset[str] = frozenset(),
) -> Batch:
    """Read the visible values out of the arguments' leaves."""
    columns = []
    for site in sites:
        value = leaves[site.leaves[0]]
        if site.plate is not None:
            value = jnp.take(value, indices[site.plate], site.axis)
        value = value.reshape(site.shape[0], -1)
        columns.append(value.astype(float) if site.is_discrete else value)
    v = columns[0] if len(columns) == 1 else jnp.concatenate(columns, -1)
    return Batch(v, sites, indices, leaves, spec, reads_rows, handed)


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The arguments' leaves, NumPy arrays made JAX arrays: a program that converts them would lose their identity."""
    leaves, spec = jax.tree.flatten((args, kwargs))
    # one for each array, so that data passed twice are still the same
    converted = {id(leaf): jnp.asarray(leaf) for leaf in leaves if isinstance(leaf, np.ndarray)}
    return [converted.get(id(leaf), leaf) for leaf in leaves], spec


def find(
    model_sites: Mapping[str, Any], leaves: Sequence[Any], names: Sequence[str] | None, discrete: bool = False
) -> tuple[VisibleSite, ...]:
    """The visible sites among the model's recorded sites, checked; continuous ones first.

    :param names: ``BiSM``'s argument ``visible``.
    :param discrete: whether discrete ones are taken.
    :raises ValueError: naming the site, what was found, and the cure.
    """
    observed = {name: site for name, site in model_sites.items() if site.is_data}
    if names is not None:
        for name in names:
            if name not in observed:
                raise ValueError(
                    f"visible={list(names)!r}: the model has no observed sample site '{name}'; its "
                    f"observed sites are {sorted(observed)}. Was the data passed to the model?"
                )
        observed = {name: observed[name] for name in names}
    if not observed:
        raise ValueError(
            "The model has no visible site: no sample statement is observed. Declare the data with "
            "numpyro.sample('x', dist.Normal(0., 1.).expand([D]).to_event(1).mask(False), obs=x) and pass "
            "x to init() and update()."
        )
    found = tuple(_locate(name, site, leaves, discrete) for name, site in observed.items())
    found = tuple(sorted(found, key=lambda site: site.is_discrete))
    for i, site in enumerate(found):
        for other in found[:i]:
            if set(site.leaves) & set(other.leaves):
                raise ValueError(
                    f"Visible sites '{other.name}' and '{site.name}' observe the same argument, which is one variable. "
                    f"Name one of them, visible=['{other.name}']: the other's density still counts."
                )
    sizes = {site.name: site.shape[0] for site in found}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"The visible sites differ in their leading dimension, which is the batch: {sizes}. Leave "
            "covariates out with visible=[...], or give all sites the same number of rows."
        )
    return found


def require_declared(site: Any) -> None:
    """Check whether a visible value has the shape that the model declares: it is not broadcast over it.

    :raises ValueError: where it would be.
    """
    shape, declared = jnp.shape(site.value), tuple(site.fn.batch_shape + site.fn.event_shape)
    # the declaration may be broadcast over the value, never the value over the declaration
    fits = all(d in (1, n) for d, n in zip(reversed(declared), reversed(shape), strict=False))
    if len(declared) > len(shape) or not fits:
        raise ValueError(
            f"Visible site '{site.name}' has a value of shape {shape} where the model declares {declared}. Pass data "
            "of the declared shape, the leading dimension the batch: data are not broadcast."
        )


def _locate(name: str, site: Any, leaves: Sequence[Any], discrete: bool) -> VisibleSite:
    value = site.value
    is_discrete = discrete and site.fn.support.is_discrete
    if not is_discrete and not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            f"Visible site '{name}' holds {jnp.result_type(value)}: a score needs floating-point data. If it is "
            "discrete, leave it out with visible=[...] naming the continuous sites; otherwise cast it first."
        )
    support = site.fn.support
    if not is_discrete and not _is_real(support):
        kind, cure = (
            "of bounded support",
            "Transform the data to the reals first (and add the log Jacobian to the energy)",
        )
        if support.is_discrete:
            kind, cure = "discrete", "Give the data as continuous ones, say with noise added"
        raise ValueError(
            f"Visible site '{name}' ({type(base_of(site.fn)).__name__}) is {kind}: {support}. Score matching "
            f"needs a density on all of R^D. {cure}, or leave the site out with visible=[...]."
        )
    if jnp.ndim(value) < 1:
        raise ValueError(
            f"Visible site '{name}' is a scalar. The leading dimension of a visible value is the batch: "
            "pass data of shape (n, ...)."
        )
    shape = jnp.shape(value)
    require_declared(site)
    # a plate that takes all rows by itself takes them in order
    picking = [f.name for f in site.frames if site.plates[f.name][0] != site.plates[f.name][1] or f.name in site.handed]
    same = tuple(i for i, leaf in enumerate(leaves) if leaf is value)
    if same:
        leading = [f.name for f in site.frames if f.name in picking and f.dim - site.fn.event_dim == -value.ndim]
        return VisibleSite(name, same, None, 0, shape, is_discrete, labels=leading[0] if leading else None)
    for frame in site.frames:
        axis = frame.dim - site.fn.event_dim
        full_size, size = site.plates[frame.name]
        picked = site.subsamples.get(frame.name, np.arange(size))
        found = tuple(
            i
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Array)
            and leaf.dtype == value.dtype
            and leaf.ndim >= -axis
            and leaf.shape[axis] == full_size
            and np.array_equal(jnp.take(leaf, picked, axis), value)
        )
        if found:
            plate = frame.name if frame.name in picking else None
            return VisibleSite(name, found, plate, axis, shape, is_discrete, labels=plate)
    raise ValueError(
        f"The value of visible site '{name}', of shape {shape} and {value.dtype}, is none of the arguments, "
        "nor the rows of one that a subsampling plate picked. BiSM perturbs the data, and "
        "both the model and the guide must see it perturbed, so it has to come in as an argument "
        "(found again as the same array): do casts, reshapes and indexing before, and do not "
        "close over the data."
    )


def _is_real(support: Any) -> bool:
    # a type, not a singleton: numpyro's independent() is a class in some releases and a function in others
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is constraints.real or support == constraints.real


def require_finite(leaves: Sequence[Any], spec: Any, sites: Sequence[VisibleSite]) -> None:
    """Checks concrete arrays; inside a compiled function there is nothing to look at yet.

    What else is not finite among the arguments is the programs' business: a mask of -inf is no fault.

    :raises ValueError: naming the visible argument and the place of its first NaN or infinity.
    """
    for i in dict.fromkeys(i for site in sites for i in site.leaves):
        leaf = leaves[i]
        if _is_concrete(leaf) and (bad := _places(leaf, lambda x: ~np.isfinite(x))):
            raise ValueError(
                f"Argument {_name(i, leaves, spec)} has {len(bad)} NaN or infinite values, the first "
                f"at index {bad[0]}. Nothing was updated. Remove or impute them first."
            )


def suspect(leaves: Sequence[Any], spec: Any) -> str | None:
    """What is out of the ordinary about the arguments, should the programs fail on them; None if nothing is."""
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Array):
            continue
        name = f"Argument {_name(i, leaves, spec)}"
        mesh = getattr(jax.typeof(leaf).sharding, "mesh", None)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            return (
                f"{name} lies on a mesh with explicit axes, where the sum of a gradient over the rows needs a sharding "
                "of its own. Make the mesh with axis_types=(AxisType.Auto,)."
            )
        if _is_concrete(leaf) and _places(leaf, lambda x: np.isnan(x) | np.isposinf(x)):  # a mask may hold -inf
            bad = _places(leaf, lambda x: ~np.isfinite(x))
            return f"{name} has {len(bad)} NaN or infinite values, the first at index {bad[0]}. Remove or impute them."
    return None


def _is_concrete(leaf: Any) -> bool:
    return (
        isinstance(leaf, Array) and not isinstance(leaf, jax.core.Tracer) and jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def _places(leaf: Array, test: Callable[[np.ndarray], np.ndarray]) -> list[tuple[int, ...]]:
    """Where a test of NumPy's says yes."""
    if leaf.is_fully_addressable and all(device.platform == "cpu" for device in leaf.devices()):
        is_finite = np.isfinite(np.asarray(leaf)).all()  # where it lies: nothing is compiled for that
    else:
        with on_numbers():  # a concrete array may meet a program being traced
            is_finite = bool(jnp.isfinite(leaf).all())
    if is_finite:
        return []
    return [tuple(place) for place in np.argwhere(test(np.asarray(leaf))).tolist()]


def _name(i: int, leaves: Sequence[Any], spec: Any) -> str:
    marked = jax.tree.unflatten(spec, [j == i for j in range(len(leaves))])
    paths = [jax.tree_util.keystr(path) for path, mark in jax.tree_util.tree_flatten_with_path(marked)[0] if mark]
    path = paths[0]
    return f"args{path[3:]}" if path.startswith("[0]") else f"kwargs{path[3:]}"
