"""What a log density is as a function of its variables, proved from the operations that compute it.

The function runs once, on numbers, and every ATen operation in it is taken twice: on the numbers, and on bounds of
what they may be as functions of the variables (:class:`~.degrees.Degrees`). An operation that stands in no table here
is an arbitrary function of its operands, so that what is not known can't make structure appear. The numbers are out of
the program's reach otherwise: no NumPy array, compiled kernel or other thread gets at them unseen, and where its path
depends on them (``.item()``, ``if h.sum() > 0``) nothing is proved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from ..programs.hosts import pytree
from .degrees import Degrees
from .density import Point, close, select
from .rules import FRESH, MOVES_MEMORY, PICKS, RULES, Call, logarithm
from .values import CONSTANT, COVARIATES, Cell, Traced, Unprovable, Value, memory_of, numbers_of

if TYPE_CHECKING:
    from .energy import Energy


NUM_ROWS = (17, 19, 23)  # on which an energy that takes any number is looked at


class Proof(NamedTuple):
    """What is proved of a log density, for every row and at all values of its variables.

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
                name: trace.wrap(value.detach(), Cell(Value.of(name))) for name, value in x.items()
            }
            found = log_prob(point)
        value = trace.value(found)
        # a program may do something else while it is looked at
        is_same = close(numbers_of(found).detach(), expected)
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

    def wrap(self, inner: Tensor, cell: Cell, is_cut: bool = False) -> Traced:
        return Traced.of(inner, cell, is_cut, self)

    def value(self, x: Any) -> Value:
        """Of a tensor, of the entries of a list of them, or of a number."""
        if isinstance(x, list | tuple):
            found = CONSTANT
            for item in x:
                found = found | self.value(item)
            return found
        if not isinstance(x, Tensor):
            return CONSTANT
        if isinstance(x, Traced) and x.cell.value.groups:
            value: Value = x.cell.value
            return value.arbitrary() if x.is_cut else value
        return Value.of(COVARIATES) if self._tells_rows_apart(numbers_of(x)) else CONSTANT

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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(self, func, args, kwargs or {})
        value = self._result(call)
        inner_args, inner_kwargs = pytree.tree_map(numbers_of, (tuple(args), kwargs or {}))
        out = func(*inner_args, **inner_kwargs)
        if torch.Tag.inplace_view in func.tags:  # a tensor's shape changes: so does that of what stands for it
            with no_dispatch():
                func(*args, **kwargs or {})
        if value.groups:
            value = self._checked(call, value, out)
        for x in call.written:
            self._write(x, _cast(value, x, call))
        returned = {id(numbers_of(x)): x for x in call.written}
        owners = {memory_of(x): x for x in reversed(call.tensors)}

        def wrapped(x: Any) -> Any:
            if id(x) in returned or not isinstance(x, Tensor):
                return returned.get(id(x), x)
            if not value.groups and call.name in PICKS and self._is_cut_from_rows(x, call):
                return self.wrap(x.clone(), Cell(Value.of(COVARIATES)))
            owner = owners.get(memory_of(x))
            if x.layout is not torch.strided or (owner is not None and not isinstance(owner, Traced)):
                if value.groups - {COVARIATES}:
                    raise Unprovable(f"{func}: what it gives is in memory that other programs read")
                return x
            if owner is None:
                return self.wrap(x, Cell(_cast(value, x, call), logarithm(call)))
            return self.wrap(x, owner.cell, owner.is_cut or call.name == "detach" or not torch.is_grad_enabled())

        return pytree.tree_map(wrapped, out)

    def _is_cut_from_rows(self, x: Tensor, call: Call) -> bool:
        """Whether it is as many entries as there are rows, of more that are not all the same."""
        for y in map(numbers_of, call.tensors):
            for axis, (length, whole) in enumerate(zip(x.shape, y.shape, strict=False)):
                if x.ndim == y.ndim and self.is_row_axis(length) and whole > length > 1:
                    return bool((y != y.narrow(axis, 0, 1)).any())
        return False

    def _result(self, call: Call) -> Value:
        for x in call.tensors:
            if not isinstance(x, Traced) and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                raise Unprovable(f"{type(x).__name__}: what is in it can't be told")
        if call.written and call.name in MOVES_MEMORY:
            raise Unprovable(f"{call.func}: gives a tensor other memory")
        given = call.all()
        if not given.groups or call.name in FRESH:
            return CONSTANT
        if torch.Tag.dynamic_output_shape in call.func.tags and call.name not in RULES:
            self._require_path(call, given)
        rule = RULES.get(call.name) if call.func.namespace == "aten" else None
        value = rule(call) if rule else given.arbitrary()
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return value.arbitrary()  # the closed forms are made of gradients
        return value

    def _checked(self, call: Call, value: Value, out: Any) -> Value:
        """With rows that are picked by their number, and refusals."""
        read = call.read
        for x in pytree.tree_leaves(out):
            if not isinstance(x, Tensor):
                if isinstance(x, bool | int | float | complex) and call.name != "is_same_size":
                    self._require_path(call, value)
                continue
            picks = call.name in PICKS and any(self._num_row_axes(x.shape) < self._num_row_axes(y.shape) for y in read)
            if picks or (call.name in ("tril", "triu") and self._num_row_axes(x.shape[-2:])):
                value = value * Value(Degrees.of(COVARIATES, math.inf))
                for y in read:
                    if memory_of(x) == memory_of(y):
                        self._write(y, value)
            if memory_of(x) in [memory_of(y) for y in read if y.dtype != x.dtype]:
                raise Unprovable(f"{call.func}: the same memory, as another type")
        return value

    def _require_path(self, call: Call, value: Value) -> None:
        """A number or a length is there for the program to see: its path depends on it from here on."""
        if value.groups - {COVARIATES}:
            raise Unprovable(f"{call.func}: the program's path depends on its variables")
        self.reads_covariates |= bool(value.groups)

    def _num_row_axes(self, shape: Sequence[int]) -> int:
        return sum(self.is_row_axis(length) for length in shape) if self.num_rows > 1 else 0

    def _write(self, x: Tensor, value: Value) -> None:
        if isinstance(x, Traced):
            if x.inner.shape != x.shape:
                raise Unprovable("out= of another shape")
            x.cell.log = None
            x.cell.value = x.cell.value | (value.arbitrary() if x.is_cut and value.groups else value)
        elif value.groups - {COVARIATES}:
            raise Unprovable("a write into memory from outside the program")


def _cast(value: Value, x: Tensor, call: Call) -> Value:
    """Of a result of this type: from real numbers to whole ones is a step."""
    same = x.dtype != torch.bool and all(x.dtype == y.dtype for y in call.read)
    return value if not value.groups or x.is_floating_point() or (same and not x.is_complex()) else value.arbitrary()
