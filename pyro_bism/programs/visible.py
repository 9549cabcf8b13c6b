"""Which sites are visible, and how perturbed data reach the model and the guide.

Model and guide both read the data from their arguments, so it is the *argument* that has to be perturbed.
A visible site's value is found among the leaves of the arguments: it is one of them, or the rows of one
that a subsampling plate picked. :class:`Batch` is then a map from the matrix v, one row an example, to the
arguments of the programs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor

from ..distributions import base_of
from .hosts import is_stand_in, pytree

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
    return torch.Size(site.shape[1:]).numel()


@dataclass(frozen=True)
class Batch:
    """One call's arguments as a function of the visible values.

    :ivar indices: the rows of each plate, the same for a whole step.
    :ivar handed: the plates that the programs hand their rows.
    """

    sites: tuple[VisibleSite, ...]
    indices: Mapping[str, Tensor]
    leaves: Sequence[Any]
    spec: Any
    handed: frozenset[str] = frozenset()

    @cached_property
    def v(self) -> Tensor:
        """The clean visible values, all sites side by side, of shape (n, D)."""
        columns = []
        for site in self.sites:
            value = self.leaves[site.leaves[0]]
            if site.plate is not None:
                value = value.index_select(site.axis, self.indices[site.plate])
            value = value.detach().reshape(site.shape[0], -1)
            columns.append(value.to(torch.get_default_dtype()) if site.is_discrete else value)
        return columns[0] if len(columns) == 1 else torch.cat(columns, -1)

    def arguments(self, v: Tensor) -> Arguments:
        """The programs' ``(args, kwargs)`` with v, of shape (n, D), in place of the visible values."""
        leaves = list(self.leaves)
        start = 0
        for site in self.sites:
            size = torch.Size(site.shape[1:]).numel()
            value = v[:, start : start + size].reshape(site.shape)
            start += size
            if site.is_discrete and not site.is_soft:
                value = value.to(leaves[site.leaves[0]].dtype)
            for i in site.leaves:
                if site.plate is None:
                    leaves[i] = value
                else:
                    may_repeat = site.name if site.plate in self.handed else None
                    leaves[i] = Rows.with_values(leaves[i], site.axis, self.indices[site.plate], value, may_repeat)
        found: Arguments = pytree.tree_unflatten(leaves, self.spec)
        return found


class Rows(Tensor):
    """An argument x in which some rows have other values. Reading just those copies nothing of the rest."""

    base: Tensor
    axis: int
    rows: Tensor
    replaced: Tensor
    may_repeat: str | None

    @staticmethod
    def with_values(x: Tensor, axis: int, rows: Tensor, values: Tensor, may_repeat: str | None = None) -> "Rows":
        """The argument x that reads as if it had these values in these rows along an axis.

        :param may_repeat: the visible site's name, if a row may stand twice: the user's may.
        """
        shell = x
        if is_stand_in(x):  # while a step is captured: what has its shape and type, and no memory
            with torch._C._DisableTorchDispatch():
                shell = torch.empty(1, dtype=x.dtype, device=x.device).expand(x.shape)
        new = shell.as_subclass(Rows)
        new.base, new.axis, new.rows, new.replaced = x, axis % x.dim(), rows, values
        new.may_repeat = may_repeat
        return new

    def _whole(self) -> Tensor:
        """x with those rows in it: one value a row.

        :raises ValueError: if a row stands twice, as each of the two has noise of its own.
        """
        replaced = self.replaced
        if self.may_repeat is not None:
            ordered = self.rows.sort().values
            twice = torch.searchsorted(ordered, self.rows, right=True) - torch.searchsorted(ordered, self.rows) > 1
            if is_stand_in(twice):  # while a step is captured there are no values: they will be NaN
                twice = twice.reshape((-1,) + (1,) * (replaced.dim() - 1 - self.axis))
                replaced = replaced * torch.where(twice, torch.nan, 1.0)  # a factor: the gradient is NaN as well
            elif twice.any():
                raise ValueError(
                    f"The rows handed to a plate name a row twice, and model or guide read more of the data of site "
                    f"'{self.may_repeat}' than these rows: the two copies have noise of their own there. Hand distinct "
                    "rows, or read the data by the plate's rows alone: with plate as rows: x[rows]."
                )
        return torch.index_copy(self.base, self.axis, self.rows, replaced)

    def _picked(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """What is read, if it is those rows."""
        if func is Tensor.__getitem__ and self.axis == 0:
            first, *rest = args[1] if isinstance(args[1], tuple) else (args[1],)
            if first is self.rows:
                return self.replaced[(slice(None), *rest)] if rest else self.replaced
        if func in (Tensor.index_select, torch.index_select) and len(args) == 3 and not kwargs:
            if args[1] % self.replaced.dim() == self.axis and args[2] is self.rows:
                return self.replaced
        return None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        if isinstance(args[0], Rows):
            picked = args[0]._picked(func, args, kwargs)
            if picked is not None:
                return picked
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = pytree.tree_map(lambda x: x._whole() if isinstance(x, Rows) else x, (tuple(args), kwargs))
        return func(*args, **kwargs)


_METADATA = frozenset(
    [vars(Tensor.__base__)[name].__get__ for name in ("shape", "dtype", "ndim", "device")]
    + [Tensor.size, Tensor.dim, Tensor.__len__]
)


_SPECS: dict[Any, Any] = {}


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """As torch's ``tree_flatten``, which takes as long as a small step's kernels: a structure met before is known."""
    leaves: list[Any] = []
    structure = _structure(tree, leaves)
    spec = _SPECS.get(structure)
    if spec is None:
        spec = _SPECS[structure] = pytree.tree_structure(tree)
    return leaves, spec


def _structure(tree: Any, leaves: list[Any]) -> Any:
    """What is left of nested containers when their leaves, added to ``leaves``, are taken out."""
    kind = type(tree)
    if isinstance(tree, Tensor):
        leaves.append(tree)
        return None
    if kind is tuple or kind is list:
        return kind, tuple([_structure(item, leaves) for item in tree])
    if kind is dict:
        return kind, tuple(tree), tuple([_structure(item, leaves) for item in tree.values()])
    more, spec = pytree.tree_flatten(tree)
    leaves += more
    return spec


def find(
    model_sites: Mapping[str, Any],
    leaves: Sequence[Any],
    names: Sequence[str] | None,
    discrete: bool = False,
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
            "pyro.sample('x', dist.Normal(0., 1.).expand([D]).to_event(1).mask(False), obs=x) and pass "
            "x to step()."
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


def _locate(name: str, site: Any, leaves: Sequence[Any], discrete: bool) -> VisibleSite:
    value = site.value
    is_discrete = discrete and isinstance(value, Tensor) and site.fn.support.is_discrete
    if not is_discrete and (not isinstance(value, Tensor) or not value.is_floating_point()):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"Visible site '{name}' holds {kind}: a score needs floating-point data. If it is "
            "discrete, leave it out with visible=[...] naming the continuous sites; otherwise cast it "
            "before step()."
        )
    support = site.fn.support
    if not is_discrete and not is_real(support):
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
    if value.dim() < 1:
        raise ValueError(
            f"Visible site '{name}' is a scalar. The leading dimension of a visible value is the batch: "
            "pass data of shape (n, ...)."
        )
    shape = tuple(value.shape)
    declared = tuple(site.fn.batch_shape + site.fn.event_shape)
    # the declaration may be broadcast over the value, never the value over the declaration
    fits = all(d in (1, n) for d, n in zip(reversed(declared), reversed(shape), strict=False))
    if len(declared) > len(shape) or not fits:
        raise ValueError(
            f"Visible site '{name}' has a value of shape {shape} where the model declares {declared}. Pass data of "
            "the declared shape, the leading dimension the batch: data are not broadcast."
        )
    frames = [frame for frame in site.frames if frame.vectorized and frame.name in site.subsamples]
    # a plate that takes all rows by itself takes them in order
    picking = {frame.name for frame in frames if frame.size != frame.full_size or frame.name in site.handed}
    same = tuple(i for i, leaf in enumerate(leaves) if _is_same(leaf, value))
    if same:
        leading = [f.name for f in frames if f.name in picking and f.dim - site.fn.event_dim == -value.dim()]
        return VisibleSite(name, same, None, 0, shape, is_discrete, labels=leading[0] if leading else None)
    for frame in frames:
        axis = frame.dim - site.fn.event_dim
        picked = site.subsamples[frame.name]
        rows = tuple(
            i
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor)
            and leaf.dtype == value.dtype
            and leaf.dim() >= -axis
            and leaf.shape[axis] == frame.full_size
            and torch.equal(leaf.index_select(axis, picked), value)
        )
        if rows:
            plate = frame.name if frame.name in picking else None
            return VisibleSite(name, rows, plate, axis, shape, is_discrete, labels=plate)
    raise ValueError(
        f"The value of visible site '{name}', of shape {shape} and {value.dtype}, is none of the arguments "
        "of step(), nor the rows of one that a subsampling plate picked. BiSM perturbs the data, and "
        "both the model and the guide must see it perturbed, so it has to come in as an argument "
        "(found again as the same tensor): do casts, reshapes and indexing before step(), and do not "
        "close over the data."
    )


def is_real(support: Any) -> bool:
    while hasattr(support, "base_constraint"):  # independent ones, and those of mixtures
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector)


def _is_same(leaf: Any, value: Tensor) -> bool:
    """Whether a leaf is the value: the same tensor, or a view that shows the same memory the same way."""
    return leaf is value or (
        isinstance(leaf, Tensor)
        and has_memory(leaf)
        and has_memory(value)
        and leaf.dtype == value.dtype
        and leaf.shape == value.shape
        and leaf.stride() == value.stride()
        and leaf.data_ptr() == value.data_ptr()
        and leaf.numel() > 0
    )


def has_memory(x: Tensor) -> bool:
    """Whether a tensor is an ordinary one, its numbers in memory: not sparse, nested, mkldnn, quantised or meta."""
    return x.layout is torch.strided and not (x.is_nested or x.is_quantized or x.is_meta)


def ordinary(leaves: Sequence[Any], spec: Any) -> list[Any]:
    """The arguments as they can be differentiated: tensors of ``torch.inference_mode`` are copied.

    :raises ValueError: naming a tensor that has no numbers.
    """
    copies: dict[int, Tensor] = {}
    found = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            if leaf.is_meta:
                raise ValueError(f"Argument {_name(i, leaves, spec)} is on the meta device: it has no numbers.")
            if leaf.is_inference():
                # one for each tensor, so that data passed twice are still the same
                leaf = copies.setdefault(id(leaf), leaf.clone())
        found.append(leaf)
    return found


def require_finite(leaves: Sequence[Any], spec: Any, sites: Sequence[VisibleSite]) -> None:
    """What else is not finite among the arguments is the programs' business: a mask of -inf is no fault.

    :raises ValueError: naming the visible argument and the place of its first NaN or infinity.
    """
    for i in dict.fromkeys(i for site in sites for i in site.leaves):
        leaf = leaves[i]
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not torch.isfinite(leaf).all():
            bad = (~torch.isfinite(leaf)).nonzero().tolist()
            raise ValueError(
                f"Argument {_name(i, leaves, spec)} has {len(bad)} NaN or infinite values, the first "
                f"at index {tuple(bad[0])}. Nothing was updated. Remove or impute them before step()."
            )


def suspect(leaves: Sequence[Any], spec: Any) -> str | None:
    """What is out of the ordinary about the arguments, should the programs fail on them; None if nothing is."""
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            continue
        name = f"Argument {_name(i, leaves, spec)}"
        if leaf.is_quantized:
            return f"{name} is quantised: pass x.dequantize()."
        if leaf.is_nested:
            return f"{name} is nested: pass it padded, torch.nested.to_padded_tensor(x, 0.0), and a mask beside it."
        if leaf.layout is not torch.strided:
            kind = str(leaf.layout).removeprefix("torch.").removeprefix("_")
            return f"{name} has the layout {kind}: pass x.to_dense()."
        if leaf.is_complex():
            return f"{name} is complex: pass its parts, torch.view_as_real(x)."
        if leaf.is_floating_point() and (leaf.isnan() | leaf.isposinf()).any():  # a mask may hold -inf
            bad = (~leaf.isfinite()).nonzero().tolist()
            place = tuple(bad[0])
            return f"{name} has {len(bad)} NaN or infinite values, the first at index {place}. Remove or impute them."
    return None


def _name(i: int, leaves: Sequence[Any], spec: Any) -> str:
    marked = pytree.tree_unflatten([j == i for j in range(len(leaves))], spec)
    paths = [pytree.keystr(path) for path, mark in pytree.tree_flatten_with_path(marked)[0] if mark]
    path = paths[0]
    return f"args{path[3:]}" if path.startswith("[0]") else f"kwargs{path[3:]}"
