"""What is known of an array inside a program that is read: bounds on what its entries are as functions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..programs.hosts import pytree
from .degrees import Degrees

if TYPE_CHECKING:
    from .proof import _Trace

COVARIATES = "(covariates)"  # what differs from row to row and is no variable: a group like the variables


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


class Unprovable(Exception):
    pass


class Cell:
    """What is known of a piece of memory, shared by all tensors that show it.

    :ivar log: of what is an exponential, what is known of its logarithm.
    """

    def __init__(self, value: Value, log: Value | None = None):
        self.value, self.log = value, log


class Traced(Tensor):
    """Numbers inside a trace. The tensor itself has no memory that anything else could read.

    :ivar is_cut: whether its gradient is not that of its value: the program has detached it.
    """

    inner: Any
    cell: Any
    is_cut: Any
    trace: Any

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def of(inner: Tensor, cell: Cell, is_cut: bool, trace: _Trace) -> Traced:
        found: Traced = Tensor._make_wrapper_subclass(
            Traced,
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
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = pytree.tree_map(_outside, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def numbers_of(x: Any) -> Any:
    return x.inner if isinstance(x, Traced) else x


def _outside(x: Any) -> Any:
    """The numbers, for a program that has kept the tensor beyond its trace."""
    if isinstance(x, Traced) and x.trace.is_running:
        raise Unprovable("read where the trace does not reach: in another thread")
    return numbers_of(x)


def memory_of(x: Tensor) -> int | None:
    x = numbers_of(x)
    return x.untyped_storage()._cdata if x.layout is torch.strided else None
