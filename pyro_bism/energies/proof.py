"""What a log density is as a function of its variables, proved from the operations that compute it.

The function runs once, on numbers, and every ATen operation in it is taken twice: on the numbers, and on bounds of
what they may be as functions of the variables (:class:`~.degrees.Degrees`). An operation that stands in no table here
is an arbitrary function of its operands, so that what is not known can't make structure appear. The numbers are out of
the program's reach otherwise: no NumPy array, compiled kernel or other thread gets at them unseen, and where its path
depends on them (``.item()``, ``if h.sum() > 0``) nothing is proved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from .degrees import Degrees
from .density import Point, close, select

if TYPE_CHECKING:
    from .energy import Energy

COVARIATES = "(covariates)"  # what differs from row to row and is no variable: a group like the variables
NUM_ROWS = (17, 19, 23)  # on which an energy that takes any number is looked at


class Proof(NamedTuple):
    """
    :ivar degrees: of log p̃ of a row.
    :ivar separable: groups of which no two entries meet in a product, whatever the other groups are.
    :ivar reads_position: whether a row's density depends on where the row stands.
    """

    degrees: Degrees
    separable: frozenset[str]
    reads_position: bool = False

    @classmethod
    def nothing(cls, names: Sequence[str]) -> Proof:
        """Any function at all."""
        return cls(Degrees().arbitrary(*(Degrees.of(name) for name in (*names, COVARIATES))), frozenset())


@torch.no_grad()
def prove(energy: Energy, x: Point) -> Proof:
    """Of an energy, at a point of any values.

    A model that runs on any number of rows is looked at on a number that few other lengths are multiples of, so that
    these are not taken for rows.
    """
    if not energy.resizes:
        return prove_function(energy.log_joint, x)
    for num in NUM_ROWS:
        rows = energy.telling_rows(num)
        proof = prove_function(energy.on(rows), select(x, rows), resizes=True)
        # a parameter that happens to be as long tells rows apart as well: not at another number of rows
        if COVARIATES not in proof.degrees.groups:
            return proof
    # the same row all over
    same = prove_function(energy.on(torch.zeros_like(rows)), select(x, torch.zeros_like(rows)), resizes=True)
    return proof._replace(reads_position=COVARIATES in same.degrees.groups)


def prove_function(log_prob: Callable[[Point], Tensor], x: Point, resizes: bool = False) -> Proof:
    """Runs a function at x and returns what holds of each of its rows at any point.

    :param resizes: whether an axis runs over the rows if it is as long as x, or a multiple, and no other axis is so.
    """
    names = [name for name, value in x.items() if value[0].numel()]
    trace = _Trace(len(next(iter(x.values()))), resizes)
    expected = log_prob(x).detach()
    try:
        with torch.enable_grad(), trace:
            point: dict[str, Tensor] = {
                name: trace.wrap(value.detach(), _Cell(Value.of(name))) for name, value in x.items()
            }
            found = log_prob(point)
        value = trace.value(found)
        # a program may do something else while it is looked at
        is_same = close(_inner(found).detach(), expected)
    except Exception:  # whatever a program trips over that is not given plain numbers: nothing is proved then
        return Proof.nothing(names)
    finally:
        trace.is_running = False
    if not is_same:
        return Proof.nothing(names)
    degrees = value.degrees
    if trace.reads_covariates:
        degrees = degrees * Degrees.of(COVARIATES, math.inf)
    return Proof(degrees, frozenset(names) - value.coupled)


@dataclass(frozen=True)
class Value:
    """A bound on what an array's entries are as functions of the variables.

    :ivar spread: groups of which one entry of the array may read several entries.
    :ivar coupled: groups of which one entry may do so in another way than as a sum of functions of one of them each.
    """

    degrees: Degrees = field(default_factory=Degrees)
    spread: frozenset[str] = frozenset()
    coupled: frozenset[str] = frozenset()

    @classmethod
    def of(cls, group: str) -> Value:
        """Of a variable itself."""
        return cls(Degrees.of(group))

    @property
    def groups(self) -> frozenset[str]:
        return self.degrees.groups

    def __or__(self, other: Value) -> Value:
        """Each entry is one of the one or of the other."""
        return Value(self.degrees | other.degrees, self.spread | other.spread, self.coupled | other.coupled)

    def __add__(self, other: Value) -> Value:
        both = self | other
        return Value(both.degrees, both.spread | (self.groups & other.groups), both.coupled)

    def __mul__(self, other: Value) -> Value:
        """Entries times entries of another array."""
        both = self | other
        coupled = both.coupled | (self.groups & other.groups)
        return Value(self.degrees * other.degrees, both.spread | coupled, coupled)

    def __matmul__(self, other: Value) -> Value:
        """A contraction."""
        return (self * other).sums()

    def __pow__(self, exponent: int) -> Value:
        """Entries times themselves."""
        coupled = self.coupled | (self.spread if exponent > 1 else frozenset())
        return Value(self.degrees**exponent, self.spread, coupled)

    def sums(self) -> Value:
        """Sums of entries, with constant weights."""
        return Value(self.degrees, self.groups, self.coupled)

    def arbitrary(self, *others: Value) -> Value:
        """Any function of this and the others."""
        degrees = self.degrees.arbitrary(*(other.degrees for other in others))
        return Value(degrees, degrees.groups, degrees.groups)


CONSTANT = Value()


class _Unprovable(Exception):
    pass


class _Cell:
    """What is known of a piece of memory, shared by all tensors that show it.

    :ivar log: of what is an exponential, what is known of its logarithm.
    """

    def __init__(self, value: Value, log: Value | None = None):
        self.value, self.log = value, log


class _Traced(Tensor):
    """Numbers inside a trace. The tensor itself has no memory that anything else could read.

    :ivar is_cut: whether its gradient is not that of its value: the program has detached it.
    """

    inner: Any
    cell: Any
    is_cut: Any
    trace: Any

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(inner: Tensor, cell: _Cell, is_cut: bool, trace: _Trace) -> _Traced:
        found: Any = Tensor._make_wrapper_subclass(
            _Traced,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=inner.device,
        )
        torch._C._set_throw_on_mutable_data_ptr(found)
        found.inner, found.cell, found.is_cut, found.trace = inner, cell, is_cut, trace
        return found

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        args, kwargs = pytree.tree_map(_outside, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, _Traced) else x


def _outside(x: Any) -> Any:
    """The numbers, for a program that has kept the tensor beyond its trace."""
    if isinstance(x, _Traced) and x.trace.is_running:
        raise _Unprovable("read where the trace does not reach: in another thread")
    return _inner(x)


class _Trace(TorchDispatchMode):
    """Takes every operation on numbers and on bounds.

    :ivar num_rows: an axis of this length runs over the rows.
    :ivar resizes: whether no other axis is so long, or a multiple of it.
    :ivar reads_covariates: whether the program's path depends on what differs from row to row.
    """

    def __init__(self, num_rows: int, resizes: bool):
        super().__init__()
        self.num_rows, self.resizes = num_rows, resizes
        self.is_running, self.reads_covariates = True, False

    def wrap(self, inner: Tensor, cell: _Cell, is_cut: bool = False) -> _Traced:
        return _Traced.of(inner, cell, is_cut, self)

    def value(self, x: Any) -> Value:
        """Of a tensor, of the entries of a list of them, or of a number."""
        if isinstance(x, list | tuple):
            found = CONSTANT
            for item in x:
                found = found | self.value(item)
            return found
        if not isinstance(x, Tensor):
            return CONSTANT
        if isinstance(x, _Traced) and x.cell.value.groups:
            return x.cell.value.arbitrary() if x.is_cut else x.cell.value
        return Value.of(COVARIATES) if self._tells_rows_apart(_inner(x)) else CONSTANT

    def is_row_axis(self, length: int) -> bool:
        return length == self.num_rows or (self.resizes and length > 0 and length % self.num_rows == 0)

    def _tells_rows_apart(self, x: Tensor) -> bool:
        if self.num_rows == 1 or not x.numel() or not any(map(self.is_row_axis, x.shape)):
            return False
        if x.layout is not torch.strided:
            x = x.to_dense()
        for axis, length in enumerate(x.shape):
            first = x.narrow(axis, 0, 1)
            # NaN is as good as NaN
            if self.is_row_axis(length) and bool(((x != first) & ~((x != x) & (first != first))).any()):
                return True
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        call = _Call(self, func, args, kwargs or {})
        value = self._result(call)
        inner_args, inner_kwargs = pytree.tree_map(_inner, (tuple(args), kwargs or {}))
        out = func(*inner_args, **inner_kwargs)
        if torch.Tag.inplace_view in func.tags:  # a tensor's shape changes: so does that of what stands for it
            with no_dispatch():
                func(*args, **kwargs or {})
        if value.groups:
            value = self._checked(call, value, out)
        for x in call.written:
            self._write(x, _cast(value, x, call))
        returned = {id(_inner(x)): x for x in call.written}
        owners = {_memory(x): x for x in reversed(call.tensors)}

        def wrapped(x: Any) -> Any:
            if id(x) in returned or not isinstance(x, Tensor):
                return returned.get(id(x), x)
            if not value.groups and call.name in _PICKS and self._is_cut_from_rows(x, call):
                return self.wrap(x.clone(), _Cell(Value.of(COVARIATES)))
            owner = owners.get(_memory(x))
            if x.layout is not torch.strided or (owner is not None and not isinstance(owner, _Traced)):
                if value.groups - {COVARIATES}:
                    raise _Unprovable(f"{func}: what it gives is in memory that other programs read")
                return x
            if owner is None:
                return self.wrap(x, _Cell(_cast(value, x, call), _logarithm(call)))
            return self.wrap(x, owner.cell, owner.is_cut or call.name == "detach" or not torch.is_grad_enabled())

        return pytree.tree_map(wrapped, out)

    def _is_cut_from_rows(self, x: Tensor, call: _Call) -> bool:
        """Whether it is as many entries as there are rows, of more that are not all the same."""
        for y in map(_inner, call.tensors):
            for axis, (length, whole) in enumerate(zip(x.shape, y.shape, strict=False)):
                if x.ndim == y.ndim and self.is_row_axis(length) and whole > length > 1:
                    return bool((y != y.narrow(axis, 0, 1)).any())
        return False

    def _result(self, call: _Call) -> Value:
        for x in call.tensors:
            if not isinstance(x, _Traced) and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                raise _Unprovable(f"{type(x).__name__}: what is in it can't be told")
        if call.written and call.name in _MOVES_MEMORY:
            raise _Unprovable(f"{call.func}: gives a tensor other memory")
        given = call.all()
        if not given.groups or call.name in _FRESH:
            return CONSTANT
        if torch.Tag.dynamic_output_shape in call.func.tags and call.name not in _RULES:
            self._require_path(call, given)
        rule = _RULES.get(call.name) if call.func.namespace == "aten" else None
        value = rule(call) if rule else given.arbitrary()
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return value.arbitrary()  # the closed forms are made of gradients
        return value

    def _checked(self, call: _Call, value: Value, out: Any) -> Value:
        """With rows that are picked by their number, and refusals."""
        read = call.read
        for x in pytree.tree_leaves(out):
            if not isinstance(x, Tensor):
                if isinstance(x, bool | int | float | complex) and call.name != "is_same_size":
                    self._require_path(call, value)
                continue
            picks = call.name in _PICKS and any(self._num_row_axes(x.shape) < self._num_row_axes(y.shape) for y in read)
            if picks or (call.name in ("tril", "triu") and self._num_row_axes(x.shape[-2:])):
                value = value * Value(Degrees.of(COVARIATES, math.inf))
                for y in read:
                    if _memory(x) == _memory(y):
                        self._write(y, value)
            if _memory(x) in [_memory(y) for y in read if y.dtype != x.dtype]:
                raise _Unprovable(f"{call.func}: the same memory, as another type")
        return value

    def _require_path(self, call: _Call, value: Value) -> None:
        """A number or a length is there for the program to see: its path depends on it from here on."""
        if value.groups - {COVARIATES}:
            raise _Unprovable(f"{call.func}: the program's path depends on its variables")
        self.reads_covariates |= bool(value.groups)

    def _num_row_axes(self, shape: Sequence[int]) -> int:
        return sum(self.is_row_axis(length) for length in shape) if self.num_rows > 1 else 0

    def _write(self, x: Tensor, value: Value) -> None:
        if isinstance(x, _Traced):
            if x.inner.shape != x.shape:
                raise _Unprovable("out= of another shape")
            x.cell.log = None
            x.cell.value = x.cell.value | (value.arbitrary() if x.is_cut and value.groups else value)
        elif value.groups - {COVARIATES}:
            raise _Unprovable("a write into memory from outside the program")


def _cast(value: Value, x: Tensor, call: _Call) -> Value:
    """Of a result of this type: from real numbers to whole ones is a step."""
    same = x.dtype != torch.bool and all(x.dtype == y.dtype for y in call.read)
    return value if not value.groups or x.is_floating_point() or (same and not x.is_complex()) else value.arbitrary()


def _memory(x: Tensor) -> int | None:
    x = _inner(x)
    return x.untyped_storage()._cdata if x.layout is torch.strided else None


class _Call:
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
        return _inner(self._args[i]) if i < len(self._args) else None

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
        if isinstance(a, Tensor) and isinstance(b, Tensor) and _memory(a) is not None and _memory(a) == _memory(b):
            if (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset()):
                return (self[i] | self[j]) ** 2
        return self[i] * self[j]


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


# The table, by the operations' names in ATen and the positions of their arguments


def _any(value: Value) -> Value:
    return CONSTANT.arbitrary(value)


def _power(c: _Call) -> Value:
    exponent = torch.as_tensor(c.arg(1))
    if c[1].groups or not isinstance(c.arg(0), Tensor) or exponent.is_complex() or not exponent.numel():
        return c.all().arbitrary()
    if (exponent != exponent.round()).any() or (exponent < 0).any():
        return c.all().arbitrary()
    # smaller powers are among those of the largest
    return c[0] ** int(exponent.max())


def _prod(c: _Call) -> Value:
    x, axis = c.arg(0), c.arg(1)
    length = x.shape[axis] if isinstance(axis, int) and x.ndim else x.numel()
    return Value((c[0] ** length).degrees, c[0].groups, c[0].groups)


def _divided(c: _Call) -> Value:
    if c.func._overloadname.endswith("_mode") or not isinstance(c.arg(0), Tensor):
        return c.all().arbitrary()
    return c[0] * _any(c[1])


def _lerp(c: _Call) -> Value:
    return (c[0] + c[1]) * c[2] + c[0] if c[2].groups else c[0] + c[1]


def _is_nan(c: _Call) -> Value:
    """No polynomial of numbers is."""
    finite = all(degree < math.inf for term in c[0].degrees.terms for _, degree in term)
    return CONSTANT if finite else c[0].arbitrary()


def _variance(c: _Call) -> Value:
    squares = (c[0] ** 2).degrees
    return Value(squares, squares.groups, squares.groups)


def _reduced(value: Value, reduction: Any) -> Value:
    return value if reduction == 0 else value.sums()


def _scattered(c: _Call) -> Value:
    if "reduce" in c.func._overloadname:
        return c.all().arbitrary()
    return _any(c[2]) * (c[0] | c[3])


def _logarithm(c: _Call) -> Value | None:
    """What is known of an exponential's logarithm: a transform to positive numbers is exp(x) · 1 + 0."""
    if not torch.is_grad_enabled() or len(c.tensors) != 1 or not c.read or c.func.namespace != "aten":
        return None
    if c.name == "exp":
        return c[0]
    log, numbers = _known_log(c.tensors[0]), [a for a in c._args[:2] if isinstance(a, int | float)]
    same = len(numbers) == 1 and (c.name, numbers[0]) in (("mul", 1), ("add", 0))
    return log if same else None


def _known_log(x: Tensor) -> Value | None:
    return x.cell.log if isinstance(x, _Traced) and not x.is_cut else None


def _log(c: _Call) -> Value:
    """A density of positive numbers takes the logarithm of what a transform has made of the reals."""
    log = _known_log(c.tensors[0]) if len(c.tensors) == 1 else None
    return c.all().arbitrary() if log is None else log


def _selected(c: _Call) -> Value:
    return c[0] if _is_every_row(c, c.arg(1), c.arg(2)) else _any(c[2]) * c[0]


def _is_every_row(c: _Call, axis: int, which: Tensor) -> bool:
    """Whether a plate that takes all rows picks them: each in its own place."""
    length = c.arg(0).shape[axis] if c.arg(0).ndim else 1
    return which.dtype == torch.long and torch.equal(which, torch.arange(length))


def _picked(c: _Call) -> Value:
    places = [(i, x) for i, x in enumerate(c.arg(1)) if x is not None] if isinstance(c.arg(1), list | tuple) else []
    if len(places) == 1 and _is_every_row(c, places[0][0], _inner(places[0][1])):
        return c[0]
    for x in _tensors(c._args[1]):
        if x.dtype in (torch.bool, torch.uint8) and c.values[id(x)].groups - {COVARIATES}:
            raise _Unprovable(f"{c.func}: how many entries are picked depends on a variable")
    return _any(c[1]) * c[0]


def _put(c: _Call) -> Value:
    return _any(c[1]) * ((c[0] + c[2]).sums() if c.arg(3) else c[0] | c[2])


def _normalized(c: _Call) -> Value:
    """Batch normalisation by the running statistics."""
    if c.name == "native_batch_norm" and c.arg(5):
        raise _Unprovable("batch normalisation in training mode writes to its statistics")
    return (c[0] + c[3]) * _any(c[1] | c[4]) + c[2]


_ENTRIES = """view _unsafe_view reshape _reshape_alias expand permute transpose t unsqueeze squeeze slice select narrow
    split split_with_sizes unsafe_split unsafe_split_with_sizes unbind alias clone contiguous flip roll repeat diagonal
    diag_embed as_strided unfold neg cat stack lift lift_fresh _to_copy constant_pad_nd tril triu slice_scatter
    select_scatter diagonal_scatter as_strided_scatter reflection_pad1d reflection_pad2d replication_pad1d
    replication_pad2d im2col pixel_shuffle""".split()
_SUMS = """sum mean cumsum trace avg_pool2d avg_pool3d _adaptive_avg_pool2d col2im upsample_nearest1d
    upsample_nearest2d upsample_bilinear2d""".split()
_CONTRACTIONS = "mm bmm mv dot vdot _sparse_mm".split()
_FRESH = frozenset(
    """zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full new_empty
    new_empty_strided zero""".split()
)
_MOVES_MEMORY = frozenset("set resize resize_as".split())
# operations that may take some rows and leave others
_PICKS = frozenset(
    """slice select narrow split split_with_sizes unsafe_split unsafe_split_with_sizes unbind diagonal as_strided unfold
    index index_select gather take masked_select constant_pad_nd trace""".split()
)

_RULES: dict[str, Callable[[_Call], Value]] = {
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
