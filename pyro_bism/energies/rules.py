"""What each operation does to these bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..programs.hosts import pytree
from .values import CONSTANT, COVARIATES, Traced, Unprovable, Value, memory_of, numbers_of

if TYPE_CHECKING:
    from .proof import _Trace


class Call:
    """One operation and what is known of its arguments.

    :ivar tensors: all that it is given.
    :ivar written: those that it writes to.
    :ivar values: what is known of each, by its identity.
    :ivar read: those that depend on a group.
    """

    def __init__(self, trace: _Trace, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]):
        self.func, self.name = func, func.overloadpacket.__name__.rstrip("_")
        schema = func._schema.arguments
        self._args = [*args, *(kwargs.get(a.name, a.default_value) for a in schema[len(args) :])]
        self.tensors = _tensors(self._args)
        self.written = [
            x
            for a, arg in zip(schema, self._args, strict=False)
            if a.alias_info is not None and a.alias_info.is_write
            for x in _tensors(arg)
        ]
        self.values = {id(x): trace.value(x) for x in self.tensors}
        self.read = [x for x in self.tensors if self.values[id(x)].groups]

    def __getitem__(self, i: int) -> Value:
        """Of the argument at this position of the operation's schema."""
        return self._joined(_tensors(self._args[i])) if i < len(self._args) else CONSTANT

    def arg(self, i: int) -> Any:
        return numbers_of(self._args[i]) if i < len(self._args) else None

    def all(self) -> Value:
        """Of all arguments, in any order."""
        return self._joined(self.tensors)

    def _joined(self, tensors: Sequence[Tensor]) -> Value:
        found = CONSTANT
        for x in tensors:
            found = found | self.values[id(x)]
        return found

    def product(self, i: int, j: int) -> Value:
        """Of two arguments' entries: those of one array with itself are squares."""
        a, b = self.arg(i), self.arg(j)
        if (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and memory_of(a) is not None
            and memory_of(a) == memory_of(b)
        ):
            if (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset()):
                return (self[i] | self[j]) ** 2
        return self[i] * self[j]


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


# The table, by the operations' names in ATen and the positions of their arguments


def _any(value: Value) -> Value:
    return CONSTANT.arbitrary(value)


def _power(c: Call) -> Value:
    exponent = torch.as_tensor(c.arg(1))
    if c[1].groups or not isinstance(c.arg(0), Tensor) or exponent.is_complex() or not exponent.numel():
        return c.all().arbitrary()
    if (exponent != exponent.round()).any() or (exponent < 0).any():
        return c.all().arbitrary()
    # smaller powers are among those of the largest
    return c[0] ** int(exponent.max())


def _prod(c: Call) -> Value:
    x, axis = c.arg(0), c.arg(1)
    length = x.shape[axis] if isinstance(axis, int) and x.ndim else x.numel()
    return Value((c[0] ** length).degrees, c[0].groups, c[0].groups)


def _divided(c: Call) -> Value:
    if c.func._overloadname.endswith("_mode") or not isinstance(c.arg(0), Tensor):
        return c.all().arbitrary()
    return c[0] * _any(c[1])


def _lerp(c: Call) -> Value:
    return (c[0] + c[1]) * c[2] + c[0] if c[2].groups else c[0] + c[1]


def _is_nan(c: Call) -> Value:
    """No polynomial of numbers is."""
    finite = all(degree < math.inf for term in c[0].degrees.terms for _, degree in term)
    return CONSTANT if finite else c[0].arbitrary()


def _variance(c: Call) -> Value:
    squares = (c[0] ** 2).degrees
    return Value(squares, squares.groups, squares.groups)


def _reduced(value: Value, reduction: Any) -> Value:
    return value if reduction == 0 else value.sums()


def _scattered(c: Call) -> Value:
    if "reduce" in c.func._overloadname:
        return c.all().arbitrary()
    return _any(c[2]) * (c[0] | c[3])


def logarithm(c: Call) -> Value | None:
    """What is known of an exponential's logarithm: a transform to positive numbers is exp(x) · 1 + 0."""
    if not torch.is_grad_enabled() or len(c.tensors) != 1 or not c.read or c.func.namespace != "aten":
        return None
    if c.name == "exp":
        return c[0]
    log, numbers = _known_log(c.tensors[0]), [a for a in c._args[:2] if isinstance(a, int | float)]
    same = len(numbers) == 1 and (c.name, numbers[0]) in (("mul", 1), ("add", 0))
    return log if same else None


def _known_log(x: Tensor) -> Value | None:
    return x.cell.log if isinstance(x, Traced) and not x.is_cut else None


def _log(c: Call) -> Value:
    """A density of positive numbers takes the logarithm of what a transform has made of the reals."""
    log = _known_log(c.tensors[0]) if len(c.tensors) == 1 else None
    return c.all().arbitrary() if log is None else log


def _selected(c: Call) -> Value:
    return c[0] if _is_every_row(c, c.arg(1), c.arg(2)) else _any(c[2]) * c[0]


def _is_every_row(c: Call, axis: int, which: Tensor) -> bool:
    """Whether a plate that takes all rows picks them: each in its own place."""
    length = c.arg(0).shape[axis] if c.arg(0).ndim else 1
    return which.dtype == torch.long and torch.equal(which, torch.arange(length))


def _picked(c: Call) -> Value:
    places = [(i, x) for i, x in enumerate(c.arg(1)) if x is not None] if isinstance(c.arg(1), list | tuple) else []
    if len(places) == 1 and _is_every_row(c, places[0][0], numbers_of(places[0][1])):
        return c[0]
    for x in _tensors(c._args[1]):
        if x.dtype in (torch.bool, torch.uint8) and c.values[id(x)].groups - {COVARIATES}:
            raise Unprovable(f"{c.func}: how many entries are picked depends on a variable")
    return _any(c[1]) * c[0]


def _put(c: Call) -> Value:
    return _any(c[1]) * ((c[0] + c[2]).sums() if c.arg(3) else c[0] | c[2])


def _normalized(c: Call) -> Value:
    """Batch normalisation by the running statistics."""
    if c.name == "native_batch_norm" and c.arg(5):
        raise Unprovable("batch normalisation in training mode writes to its statistics")
    return (c[0] + c[3]) * _any(c[1] | c[4]) + c[2]


_ENTRIES = """view _unsafe_view reshape _reshape_alias expand permute transpose t unsqueeze squeeze slice select narrow
    split split_with_sizes unsafe_split unsafe_split_with_sizes unbind alias clone contiguous flip roll repeat diagonal
    diag_embed as_strided unfold neg cat stack lift lift_fresh _to_copy constant_pad_nd tril triu slice_scatter
    select_scatter diagonal_scatter as_strided_scatter reflection_pad1d reflection_pad2d replication_pad1d
    replication_pad2d im2col pixel_shuffle""".split()
_SUMS = """sum mean cumsum trace avg_pool2d avg_pool3d _adaptive_avg_pool2d col2im upsample_nearest1d
    upsample_nearest2d upsample_bilinear2d""".split()
_CONTRACTIONS = "mm bmm mv dot vdot _sparse_mm".split()
FRESH = frozenset(
    """zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full new_empty
    new_empty_strided zero""".split()
)
MOVES_MEMORY = frozenset("set resize resize_as".split())
# operations that may take some rows and leave others
PICKS = frozenset(
    """slice select narrow split split_with_sizes unsafe_split unsafe_split_with_sizes unbind diagonal as_strided unfold
    index index_select gather take masked_select constant_pad_nd trace""".split()
)

RULES: dict[str, Callable[[Call], Value]] = {
    **dict.fromkeys(_ENTRIES, lambda c: c.all()),
    **dict.fromkeys(_SUMS, lambda c: c[0].sums()),
    **dict.fromkeys(_CONTRACTIONS, lambda c: c[0] @ c[1]),
    **dict.fromkeys(["add", "sub", "rsub"], lambda c: c[0] + c[1]),
    **dict.fromkeys(["addmm", "_sparse_addmm", "addmv", "addr", "baddbmm", "addbmm"], lambda c: c[0] + (c[1] @ c[2])),
    **dict.fromkeys(["scatter", "index_copy", "index_fill"], _scattered),
    **dict.fromkeys(["scatter_add", "index_add"], lambda c: _any(c[2]) * (c[0] + c[3]).sums()),
    "gather": lambda c: _any(c[2]) * c[0],
    "index_select": _selected,
    "log": _log,
    **dict.fromkeys(["take", "embedding"], lambda c: _any(c[1]) * c[0]),
    **dict.fromkeys(["index", "masked_select"], _picked),
    **dict.fromkeys(["masked_fill", "masked_scatter"], lambda c: _any(c[1]) * (c[0] | c[2])),
    **dict.fromkeys(["linalg_solve_triangular", "_linalg_solve_ex"], lambda c: _any(c[0]) @ c[1]),
    **dict.fromkeys(["triangular_solve", "cholesky_solve"], lambda c: c[0] @ _any(c[1])),
    **dict.fromkeys(["native_batch_norm", "_native_batch_norm_legit_no_training"], _normalized),
    **dict.fromkeys(["convolution", "linear"], lambda c: c[0] @ c[1] + c[2]),
    "isnan": _is_nan,
    "var": _variance,
    "nan_to_num": lambda c: c[0] | _is_nan(c),
    "_trilinear": lambda c: (c[0] * c[1] * c[2]).sums(),
    "mul": lambda c: c.product(0, 1),
    "div": _divided,
    "pow": _power,
    "prod": _prod,
    "lerp": _lerp,
    "addcmul": lambda c: c[0] + c.product(1, 2),
    "addcdiv": lambda c: c[0] + c[1] * _any(c[2]),
    "xlogy": lambda c: c[0] * _any(c[1]),
    "mse_loss": lambda c: _reduced((c[0] + c[1]) ** 2, c.arg(2)),
    # target · input - softplus(input), with weights
    "binary_cross_entropy_with_logits": lambda c: _reduced(_any(c[0] | c[2] | c[3]) * c[1], c.arg(4)),
    "where": lambda c: _any(c[0]) * (c[1] | c[2]),
    "index_put": _put,
    "copy": lambda c: c[1],
    "fill": lambda c: c[1],
}
