"""What each operation does to these bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from .degrees import MAX_DEGREE, Degrees
from .values import Value, arbitrary, coefficient, contraction, moved, power, product, sum_of, summed

# Rules of single operations: from the equation and its operands to its results


def _convert(eqn: Any, inputs: list[Value]) -> Value:
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    is_whole = not jnp.issubdtype(old, jnp.inexact)
    exact = jnp.issubdtype(new, jnp.floating) and not jnp.issubdtype(old, jnp.complexfloating)
    return inputs[0] if exact or (is_whole and jnp.issubdtype(new, jnp.integer)) else arbitrary(inputs)


def _raised(eqn: Any, inputs: list[Value]) -> Value:
    exponent = eqn.params["y"] if "y" in eqn.params else inputs[1].number
    if len(inputs) == 2 and not inputs[1].degrees.is_constant:
        return arbitrary(inputs)
    if exponent is None or not 0 <= exponent <= MAX_DEGREE or exponent != round(exponent):
        return arbitrary(inputs)
    return power(inputs[0], int(exponent))


def _divided(eqn: Any, inputs: list[Value]) -> Value:
    a, b = inputs
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return arbitrary(inputs)
    return product(a, coefficient(b))


def _dotted(eqn: Any, inputs: list[Value]) -> Value:
    (over_a, over_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    same = tuple(over_a) == tuple(over_b) and tuple(batch_a) == tuple(batch_b)
    is_aligned = same and len(over_a) + len(batch_a) == eqn.invars[0].aval.ndim == eqn.invars[1].aval.ndim
    return contraction(inputs[0], inputs[1], is_aligned)


def _multiplied(eqn: Any, inputs: list[Value]) -> Value:
    """A product along axes."""
    num = math.prod(eqn.invars[0].aval.shape[axis] for axis in eqn.params["axes"])
    return Value(inputs[0].degrees ** max(num, 1))


def _selected(eqn: Any, inputs: list[Value]) -> Value:
    return product(coefficient(inputs[0]), sum_of(inputs[1:]))


def _is_finite(eqn: Any, inputs: list[Value]) -> Value:
    """A constant where it asks whether a number is one: a polynomial of numbers is."""
    asked = (
        len(inputs) == 1
        or eqn.invars[0] is eqn.invars[1]
        or any(value.number is not None and math.isinf(value.number) for value in inputs)
    )
    if not asked:
        return arbitrary(inputs)
    logs = [value.log for value in inputs if value.log is not None]
    return _is_finite_number(sum_of(logs or inputs))


def _is_finite_number(value: Value) -> Value:
    """Of what is a polynomial of numbers; of others it depends on what they depend on."""
    groups = {group for term in value.degrees.terms for group, degree in term if degree == math.inf}
    return Value(Degrees(frozenset([frozenset((group, math.inf) for group in groups)])))


def _is_above(eqn: Any, inputs: list[Value]) -> Value:
    """A constant where it asks whether an exponential is positive."""
    if inputs[0].log is not None and inputs[1].number == 0:
        return _is_finite_number(inputs[0].log)
    return arbitrary(inputs)


def _exponential(eqn: Any, inputs: list[Value]) -> Value:
    return replace(arbitrary(inputs), log=inputs[0])


def _logarithm(eqn: Any, inputs: list[Value]) -> Value:
    """A density of positive numbers takes the logarithm of what a transform has made of the reals."""
    return arbitrary(inputs) if inputs[0].log is None else inputs[0].log


def _rearranged(eqn: Any, inputs: list[Value]) -> Value:
    key = eqn.primitive.name, str(sorted(eqn.params.items(), key=lambda item: item[0])), eqn.invars[0].aval.shape
    return moved(inputs[0], *key)


def _sliced(eqn: Any, inputs: list[Value]) -> Value:
    start, stop, strides = (eqn.params[name] for name in ("start_indices", "limit_indices", "strides"))
    pieces = inputs[0].pieces
    if pieces is not None and strides is None:
        axis, parts = pieces
        shape = eqn.invars[0].aval.shape
        others = [a for a in range(len(shape)) if a != axis]
        if all(start[a] == 0 and stop[a] == shape[a] for a in others):
            edge, inside = 0, []
            for size, part in parts:
                if edge < stop[axis] and edge + size > start[axis]:
                    inside.append((start[axis] - edge, stop[axis] - edge, size, part))
                edge += size
            if len(inside) == 1:
                first, last, size, part = inside[0]
                return part if (first, last) == (0, size) else moved(part, "within", axis, first, last)
            if inside:
                return sum_of([summed(part) for *_, part in inside])
    return _rearranged(eqn, inputs)


def _joined(eqn: Any, inputs: list[Value]) -> Value:
    axis = eqn.params["dimension"]
    parts = tuple((var.aval.shape[axis], value) for var, value in zip(eqn.invars, inputs, strict=True))
    shape, edges = eqn.outvars[0].aval.shape, np.cumsum([0, *(size for size, _ in parts)])
    found = sum_of([moved(value, "part", shape, axis, edge) for value, edge in zip(inputs, edges, strict=False)])
    return replace(found, pieces=(axis, parts))


def _stacked(eqn: Any, inputs: list[Value]) -> Value:
    shape, axis = eqn.outvars[0].aval.shape, eqn.params["axis"]
    return sum_of([moved(value, "layer", shape, axis, i) for i, value in enumerate(inputs)])


def _parted(eqn: Any, inputs: list[Value]) -> list[Value]:
    key = eqn.primitive.name, str(eqn.params)
    return [moved(inputs[0], *key, i) for i in range(len(eqn.outvars))]


def _picked(eqn: Any, inputs: list[Value]) -> Value:
    """Entries at places that the other operands say."""
    # which places is not known here: no other such array is taken to have the same
    return product(moved(inputs[0], object()), coefficient(sum_of(inputs[1:])))


def _written(eqn: Any, inputs: list[Value]) -> Value:
    """Entries put or added in places that the last operands say."""
    if eqn.primitive.name == "dynamic_update_slice":
        array, update, *places = inputs
    else:
        array, places, update = inputs[0], [inputs[1]], inputs[2]
    return product(summed(sum_of([summed(array), summed(update)])), coefficient(sum_of(places)))


def _solved(eqn: Any, inputs: list[Value]) -> Value:
    return contraction(coefficient(inputs[0]), inputs[1])


RULES: dict[str, Callable[[Any, list[Value]], Any]] = {
    **dict.fromkeys(("add", "sub", "add_any"), lambda eqn, inputs: sum_of(inputs)),
    **dict.fromkeys(("copy", "copy_p", "name", "sharding_constraint", "reshard"), lambda eqn, inputs: inputs[0]),
    "neg": lambda eqn, inputs: Value(inputs[0].degrees, inputs[0].layouts),
    "optimization_barrier": lambda eqn, inputs: inputs,
    "convert_element_type": _convert,
    "mul": lambda eqn, inputs: product(*inputs),
    "div": _divided,
    "integer_pow": _raised,
    "pow": _raised,
    "square": lambda eqn, inputs: power(inputs[0], 2),
    "dot_general": _dotted,
    "conv_general_dilated": lambda eqn, inputs: contraction(inputs[0], inputs[1]),
    "triangular_solve": _solved,
    "reduce_sum": lambda eqn, inputs: summed(inputs[0]),
    "reduce_window_sum": lambda eqn, inputs: summed(inputs[0]),
    "cumsum": lambda eqn, inputs: summed(inputs[0]),
    "reduce_prod": _multiplied,
    "select_n": _selected,
    **dict.fromkeys(("is_finite", "eq", "ne"), _is_finite),
    "gt": _is_above,
    "exp": _exponential,
    "log": _logarithm,
    **dict.fromkeys(("reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "rev", "tile"), _rearranged),
    "slice": _sliced,
    **dict.fromkeys(("split", "unstack"), _parted),
    "stack": _stacked,
    "pad": lambda eqn, inputs: sum_of([moved(inputs[0], "pad", str(eqn.params)), moved(inputs[1], "padding")]),
    "concatenate": _joined,
    **dict.fromkeys(("gather", "dynamic_slice"), _picked),
    **dict.fromkeys(("scatter", "scatter-add", "scatter-sub", "dynamic_update_slice"), _written),
}


# on whole numbers that are known: where they count rows, as an index does
COUNTS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "iota": lambda eqn, _: np.indices(eqn.params["shape"])[eqn.params["dimension"]],
    "lt": lambda eqn, x: x[0] < x[1],
    "add": lambda eqn, x: x[0] + x[1],
    "mul": lambda eqn, x: x[0] * x[1],
    "select_n": lambda eqn, x: np.where(x[0], x[2], x[1]) if len(x) == 3 else None,
    "convert_element_type": lambda eqn, x: x[0] if jnp.issubdtype(eqn.params["new_dtype"], jnp.integer) else None,
    "broadcast_in_dim": lambda eqn, x: np.broadcast_to(
        np.reshape(
            x[0],
            [
                dict(zip(eqn.params["broadcast_dimensions"], x[0].shape, strict=True)).get(axis, 1)
                for axis in range(len(eqn.params["shape"]))
            ],
        ),
        eqn.params["shape"],
    ),
    "reshape": lambda eqn, x: x[0].reshape(eqn.params["new_sizes"]),
    "squeeze": lambda eqn, x: x[0].reshape(eqn.outvars[0].aval.shape),
}

# of constants whose rows are all the same they make such constants
ROW_BY_ROW = frozenset(
    """abs add add_any and atan2 cbrt ceil cholesky clamp convert_element_type copy copy_p cos cosh digamma div
    dot_general eq erf erf_inv erfc exp exp2 expand_dims expm1 floor ge gt integer_pow is_finite le lgamma log log1p
    logistic lt max min mul ne neg nextafter not or pow reduce_and reduce_max reduce_min reduce_or reduce_prod
    reduce_sum rem reshape rev round rsqrt select_n sharding_constraint sign sin sinh slice sqrt square squeeze
    stop_gradient sub tan tanh transpose triangular_solve xor""".split()
)
