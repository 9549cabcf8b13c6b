"""What is known of an array inside a program that is read: bounds on what its entries are as functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .degrees import Degrees

COVARIATES = "(covariates)"  # no site of a program is called so

POSITION = "(position)"  # of what tells one row from another by where it stands
SEPARABLE = "(separable)"


@dataclass(frozen=True)
class Value:
    """What is known of an array.

    :ivar degrees: of each of its entries.
    :ivar layouts: by group: where each entry is a function of one entry of the group at most, which one it is, as a
        token that equals another where all these are the same; :data:`SEPARABLE` where it is a sum of such functions.
    :ivar number: its one value, if it is a known number.
    :ivar pieces: the axis and the sizes and values of the parts that were put side by side.
    :ivar whole: all its values, of a few whole numbers that are known: rows are counted, and picked, by such ones.
    :ivar log: of an exponential, what is known of its logarithm.
    """

    degrees: Degrees = field(default_factory=Degrees)
    layouts: Mapping[str, Any] = field(default_factory=dict)
    number: float | None = None
    pieces: tuple[int, tuple[tuple[int, Value], ...]] | None = None
    whole: Any = field(default=None, compare=False)
    log: Value | None = None


ROW = Degrees.of(POSITION, math.inf)


def arbitrary(inputs: Sequence[Value]) -> Value:
    return Value(Degrees().arbitrary(*(value.degrees for value in inputs)))


def sum_of(values: Sequence[Value]) -> Value:
    """Entry by entry."""
    degrees, layouts = values[0].degrees, {}
    for value in values[1:]:
        degrees |= value.degrees
    for group in degrees.groups:
        found = {value.layouts.get(group) for value in values if group in value.degrees.groups}
        if None not in found:
            layouts[group] = found.pop() if len(found) == 1 else SEPARABLE
    return Value(degrees, layouts)


def product(a: Value, b: Value) -> Value:
    """Entry by entry."""
    layouts = {}
    for group in a.degrees.groups | b.degrees.groups:
        found = {value.layouts.get(group) for value in (a, b) if group in value.degrees.groups}
        both = group in a.degrees.groups and group in b.degrees.groups
        if len(found) == 1 and None not in found and not (both and SEPARABLE in found):
            layouts[group] = found.pop()
    return Value(a.degrees * b.degrees, layouts)


def coefficient(value: Value) -> Value:
    """Any function of this, by which something is multiplied, or which chooses among several."""
    return value if value.degrees.is_constant else arbitrary([value])


def moved(value: Value, *key: Any) -> Value:
    """Entries elsewhere, by a map that ``key`` and the entries' own layout describe wholly."""
    layouts = {g: layout if layout == SEPARABLE else (layout, *key) for g, layout in value.layouts.items()}
    return Value(value.degrees, layouts)


def summed(value: Value) -> Value:
    """Sums over entries, with constant weights."""
    return Value(value.degrees, dict.fromkeys(value.layouts, SEPARABLE))


def power(value: Value, exponent: int) -> Value:
    if exponent == 1:
        return value
    layouts = {group: layout for group, layout in value.layouts.items() if layout != SEPARABLE}
    return Value(value.degrees**exponent, layouts)


def contraction(a: Value, b: Value, is_aligned: bool = False) -> Value:
    """Sums of products of entries; ``is_aligned`` where it is every entry with its own likes."""
    if is_aligned:
        return summed(product(a, b))
    layouts: dict[str, Any] = {}
    for one, other in ((a, b), (b, a)):
        layouts |= {group: SEPARABLE for group in one.layouts if group not in other.degrees.groups}
    return Value(a.degrees * b.degrees, layouts)
