r"""In which of its variables log p̃ is a polynomial, and of which degree: proved from its own program.

The program is traced to a jaxpr and read operation by operation with :class:`Degrees` for values: sums, products,
contractions, powers, index maps and selections have bounds that follow from their operands'. All else is "any
function of what it reads", so that an operation not known here never makes structure appear.

Parameters are constants, so a proof holds at all their values. What differs from row to row and is no variable is one
more group, :data:`COVARIATES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.extend import core
from numpyro.distributions.util import sum_rightmost

from ..distributions import ConcreteBernoulli, ConcreteOneHot
from .degrees import MAX_DEGREE, Degrees
from .density import Point

if TYPE_CHECKING:
    from .energy import Energy

COVARIATES = "(covariates)"  # no site of a program is called so

_POSITION = "(position)"  # of what tells one row from another by where it stands
_SEPARABLE = "(separable)"
_MAX_WHOLE = 2**14
_MAX_STEPS = 32  # of a loop that is followed to where its bounds stand still


class Proof(NamedTuple):
    """
    :ivar degrees: of log p̃ of a row.
    :ivar separable: groups of which no two entries meet in a product, whatever the other groups are.
    :ivar reads_position: whether a row's density depends on where the row stands.
    """

    degrees: Degrees
    separable: frozenset[str]
    reads_position: bool = False


def prove(energy: Energy, params: Mapping[str, Any], x: Point) -> Proof:
    """Of an energy, at a point of any values: nothing but its shapes is looked at.

    A model that runs on any number of rows is traced at one that is none of its dimensions, so that these are not
    taken for rows.
    """
    n, rows = energy.num_rows, _Rows(energy.num_rows)
    if energy.resizes:
        rows = _Rows(_prime([*jax.tree.leaves(params), *energy.batch.leaves, *x.values()]), is_prime=True)
        n = rows.num
        with jax.ensure_compile_time_eval():
            energy = energy.with_rows(n)
    point: Any = {name: jax.ShapeDtypeStruct((n, *value.shape[1:]), value.dtype) for name, value in x.items()}
    try:
        jaxpr = _trace(energy, params, point)
    except Exception:  # a model that runs on a row more than it was given, but not on so many
        if not rows.is_prime:
            raise
        unknown = Degrees().arbitrary(*(Degrees.of(name) for name in (*point, COVARIATES)))
        return Proof(unknown, frozenset(), reads_position=True)
    return _read(jaxpr, point, rows, bool(energy.free))


def prove_function(log_prob: Callable[[Point], Array], x: Point, resizes: bool = False) -> Proof:
    """Of a function of a point with one value a row.

    :param resizes: whether the number of rows was chosen to be told from all other lengths, and from their factors.
    """
    return _read(jax.make_jaxpr(log_prob)(x), x, _Rows(len(next(iter(x.values()))), resizes))


def _read(jaxpr: Any, point: Point, rows: _Rows, is_free: bool = False) -> Proof:
    names = sorted(point)  # as a dictionary is flattened
    inputs = [Value(Degrees.of(name), {name: name}) for name in names]
    inputs += [Value(_row, whole=np.arange(rows.num))] * is_free
    (value,) = _closed(jaxpr, inputs, rows)
    degrees, reads_position = value.degrees, _POSITION in value.degrees.groups
    if reads_position:
        terms = [{COVARIATES if g == _POSITION else g: d for g, d in term} for term in degrees.terms]
        degrees = Degrees(frozenset(frozenset(term.items()) for term in terms))
    separable = frozenset(name for name in names if value.layouts.get(name) or degrees.within([name]) <= 1)
    return Proof(degrees, separable, reads_position)


def _trace(energy: Energy, params: Mapping[str, Any], point: Any) -> Any:
    def trace(energy):
        def log_joint(point, *which):
            # not as the numbers that they are: what a program reads by them it might read before it is traced
            indices = {**energy.batch.indices, **{name: rows for name in energy.free for rows in which}}
            traced = replace(energy, batch=replace(energy.batch, indices=indices))
            return traced.log_joint(params, point, program=log_density)

        which = [jax.ShapeDtypeStruct((energy.num_rows,), jnp.arange(1).dtype)] * bool(energy.free)
        return jax.make_jaxpr(log_joint)(point, *which)

    if energy.batch.indices and not energy.batch.reads_rows:
        try:  # without the whole data, of which a plate's rows are read and written again
            return trace(replace(energy, batch=replace(energy.batch, reads_rows=True)))
        except Exception:  # whatever a program wants of the argument: it gets the whole array then
            pass
    return trace(energy)


def log_density(fn: Any, value: Array) -> Array:
    """A distribution's log density as the polynomial that it is, without checks of the value's support."""
    if isinstance(fn, dist.Independent):
        return sum_rightmost(log_density(fn.base_dist, value), fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.ExpandedDistribution):
        shape = jnp.shape(value)[: max(jnp.ndim(value) - fn.event_dim, 0)]
        return jnp.broadcast_to(log_density(fn.base_dist, value), jnp.broadcast_shapes(fn.batch_shape, shape))
    if isinstance(fn, dist.MaskedDistribution) and not isinstance(fn._mask, bool):
        return jnp.where(fn._mask, log_density(fn.base_dist, value), 0.0)
    if isinstance(fn, dist.MaskedDistribution) and fn._mask:
        return log_density(fn.base_dist, value)
    if isinstance(fn, ConcreteBernoulli):
        return value * fn.logits - jax.nn.softplus(fn.logits)
    if isinstance(fn, ConcreteOneHot):
        return (value * fn.logits).sum(-1)
    return fn.log_prob(value)


# The interpreter


class _Rows(NamedTuple):
    """How many rows there are, and whether a dimension that is a multiple of it can be nothing else."""

    num: int
    is_prime: bool = False

    def has(self, size: int) -> bool:
        """Whether an axis of this size may run over the rows."""
        return self.num > 1 and (size > 0 and size % self.num == 0 if self.is_prime else size == self.num)


@dataclass(frozen=True)
class Value:
    """What is known of an array.

    :ivar degrees: of each of its entries.
    :ivar layouts: by group: where each entry is a function of one entry of the group at most, which one it is, as a
        token that equals another where all these are the same; :data:`_SEPARABLE` where it is a sum of such functions.
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


def _prime(arrays: Sequence[Any]) -> int:
    """The first from 1009 on that none of the sizes is a multiple of: no program's own dimension is."""
    sizes = {size for array in arrays for size in getattr(array, "shape", ()) if size}
    number = 1009
    while any(number % k == 0 for k in range(2, 1 + math.isqrt(number))) or any(size % number == 0 for size in sizes):
        number += 2
    return number


def _closed(program: Any, inputs: Sequence[Value], rows: _Rows) -> list[Value]:
    consts = [_constant(value, rows) for value in program.consts]
    return _evaluate(program.jaxpr, [*consts, *inputs], rows)


def _evaluate(jaxpr: Any, inputs: Sequence[Value], rows: _Rows) -> list[Value]:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))

    def read(var):
        return _constant(var.val, rows) if isinstance(var, core.Literal) else known[var]

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _apply(eqn, [read(var) for var in eqn.invars], rows), strict=True))
    return [read(var) for var in jaxpr.outvars]


def _constant(value: Any, rows: _Rows) -> Value:
    if not jnp.shape(value):
        kind = jnp.result_type(value)
        is_real = jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)
        is_whole = jnp.issubdtype(kind, jnp.integer)
        return Value(number=float(value) if is_real else None, whole=np.asarray(value) if is_whole else None)
    axes = [axis for axis, size in enumerate(jnp.shape(value)) if rows.has(size)]
    if not axes:
        return Value()
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return Value(_row)
    array = np.asarray(value)
    whole = array if array.dtype.kind == "i" and array.size <= _MAX_WHOLE else None
    if any((array != array.take([0], axis)).any() for axis in axes):
        return Value(Degrees.of(COVARIATES, math.inf), whole=whole)
    return Value(whole=whole)


_row = Degrees.of(_POSITION, math.inf)


def _apply(eqn: Any, inputs: list[Value], rows: _Rows) -> list[Value]:
    """An operation's results."""
    name, params, num = eqn.primitive.name, eqn.params, len(eqn.outvars)
    inside = _INSIDE.get(name)
    if inside is not None:
        found = inside(params, inputs, rows)
        return found if len(found) == num else [_arbitrary(inputs)] * num
    if (
        name in _COUNTS
        and all(value.whole is not None for value in inputs)
        and math.prod(eqn.outvars[0].aval.shape) <= _MAX_WHOLE
    ):
        (known,) = _of_known(eqn, inputs, rows)
        return [replace(known, whole=_COUNTS[name](eqn, [value.whole for value in inputs]))]
    return _of_known(eqn, inputs, rows)


def _of_known(eqn: Any, inputs: list[Value], rows: _Rows) -> list[Value]:
    name, num = eqn.primitive.name, len(eqn.outvars)
    if all(value.degrees.is_constant for value in inputs):
        return [_of_constants(eqn, var.aval, inputs, rows) for var in eqn.outvars]
    if name not in _RULES:
        return [_arbitrary(inputs)] * num
    if name == "gather" and _is_every_row(eqn, inputs):
        return [inputs[0]]
    found = _RULES[name](eqn, inputs)
    each = found if isinstance(found, list) else [found] * num
    return [_product(value, Value(_row)) for value in each] if _picks_rows(eqn, rows) else each


def _is_every_row(eqn: Any, inputs: list[Value]) -> bool:
    """Whether a plate that takes all rows picks them: each in its own place."""
    shape, numbers, which = eqn.invars[0].aval.shape, eqn.params["dimension_numbers"], inputs[1].whole
    return (
        which is not None
        and which.shape == (shape[0], 1)
        and (tuple(numbers.start_index_map), tuple(numbers.collapsed_slice_dims)) == ((0,), (0,))
        and tuple(eqn.params["slice_sizes"]) == (1, *shape[1:])
        and eqn.outvars[0].aval.shape == shape
        and bool((which[:, 0] == np.arange(shape[0])).all())
    )


def _picks_rows(eqn: Any, rows: _Rows) -> bool:
    """Whether an operation takes some rows, or writes to some, and leaves others."""
    name, params, shape = eqn.primitive.name, eqn.params, eqn.invars[0].aval.shape
    axes = [axis for axis, size in enumerate(shape) if rows.has(size)]
    if name in ("concatenate", "stack"):
        return rows.has(eqn.outvars[0].aval.shape[params["dimension" if name == "concatenate" else "axis"]])
    if name in ("slice", "dynamic_slice"):
        return any(eqn.outvars[0].aval.shape[axis] != shape[axis] for axis in axes)
    if name == "dynamic_update_slice":
        return any(eqn.invars[1].aval.shape[axis] != shape[axis] for axis in axes)
    if name in ("split", "unstack"):
        return params["axis"] in axes
    if name == "pad":
        return any(any(params["padding_config"][axis]) for axis in axes)
    if name == "gather":
        batched = params["dimension_numbers"].operand_batching_dims
        return any(params["slice_sizes"][axis] != shape[axis] and axis not in batched for axis in axes)
    if name.startswith("scatter"):
        return any(axis in params["dimension_numbers"].scatter_dims_to_operand_dims for axis in axes)
    return False


def _of_constants(eqn: Any, aval: Any, inputs: list[Value], rows: _Rows) -> Value:
    """A constant, unless its rows may differ: then it has been made by an operation that counts or draws."""
    name, axes = eqn.primitive.name, [axis for axis, size in enumerate(getattr(aval, "shape", ())) if rows.has(size)]
    if name == "broadcast_in_dim" or (name == "convert_element_type" and not axes):
        return Value(number=inputs[0].number if jnp.issubdtype(aval.dtype, jnp.floating) else None)
    if not axes:
        return Value()
    along = {"iota": "dimension", "concatenate": "dimension", "stack": "axis"}.get(name)
    if along is not None:
        return Value(_row) if eqn.params[along] in axes else Value()
    before = [var.aval.shape for var in eqn.invars]
    had_rows = any(rows.has(size) for shape in before for size in shape)
    # rows cut out of something longer are not the same ones
    is_cut = name == "slice" and any(before[0][axis] != aval.shape[axis] for axis in axes)
    return Value() if name in _ROW_BY_ROW and had_rows and not is_cut else Value(_row)


def _arbitrary(inputs: Sequence[Value]) -> Value:
    return Value(Degrees().arbitrary(*(value.degrees for value in inputs)))


def _sum(values: Sequence[Value]) -> Value:
    """Entry by entry."""
    degrees, layouts = values[0].degrees, {}
    for value in values[1:]:
        degrees |= value.degrees
    for group in degrees.groups:
        found = {value.layouts.get(group) for value in values if group in value.degrees.groups}
        if None not in found:
            layouts[group] = found.pop() if len(found) == 1 else _SEPARABLE
    return Value(degrees, layouts)


def _product(a: Value, b: Value) -> Value:
    """Entry by entry."""
    layouts = {}
    for group in a.degrees.groups | b.degrees.groups:
        found = {value.layouts.get(group) for value in (a, b) if group in value.degrees.groups}
        both = group in a.degrees.groups and group in b.degrees.groups
        if len(found) == 1 and None not in found and not (both and _SEPARABLE in found):
            layouts[group] = found.pop()
    return Value(a.degrees * b.degrees, layouts)


def _coefficient(value: Value) -> Value:
    """Any function of this, by which something is multiplied, or which chooses among several."""
    return value if value.degrees.is_constant else _arbitrary([value])


def _moved(value: Value, *key: Any) -> Value:
    """Entries elsewhere, by a map that ``key`` and the entries' own layout describe wholly."""
    layouts = {g: layout if layout == _SEPARABLE else (layout, *key) for g, layout in value.layouts.items()}
    return Value(value.degrees, layouts)


def _summed(value: Value) -> Value:
    """Sums over entries, with constant weights."""
    return Value(value.degrees, dict.fromkeys(value.layouts, _SEPARABLE))


def _power(value: Value, exponent: int) -> Value:
    if exponent == 1:
        return value
    layouts = {group: layout for group, layout in value.layouts.items() if layout != _SEPARABLE}
    return Value(value.degrees**exponent, layouts)


def _contraction(a: Value, b: Value, is_aligned: bool = False) -> Value:
    """Sums of products of entries; ``is_aligned`` where it is every entry with its own likes."""
    if is_aligned:
        return _summed(_product(a, b))
    layouts: dict[str, Any] = {}
    for one, other in ((a, b), (b, a)):
        layouts |= {group: _SEPARABLE for group in one.layouts if group not in other.degrees.groups}
    return Value(a.degrees * b.degrees, layouts)


# Rules of single operations: from the equation and its operands to its results


def _convert(eqn: Any, inputs: list[Value]) -> Value:
    old, new = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
    is_whole = not jnp.issubdtype(old, jnp.inexact)
    exact = jnp.issubdtype(new, jnp.floating) and not jnp.issubdtype(old, jnp.complexfloating)
    return inputs[0] if exact or (is_whole and jnp.issubdtype(new, jnp.integer)) else _arbitrary(inputs)


def _raised(eqn: Any, inputs: list[Value]) -> Value:
    exponent = eqn.params["y"] if "y" in eqn.params else inputs[1].number
    if len(inputs) == 2 and not inputs[1].degrees.is_constant:
        return _arbitrary(inputs)
    if exponent is None or not 0 <= exponent <= MAX_DEGREE or exponent != round(exponent):
        return _arbitrary(inputs)
    return _power(inputs[0], int(exponent))


def _divided(eqn: Any, inputs: list[Value]) -> Value:
    a, b = inputs
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return _arbitrary(inputs)
    return _product(a, _coefficient(b))


def _dotted(eqn: Any, inputs: list[Value]) -> Value:
    (over_a, over_b), (batch_a, batch_b) = eqn.params["dimension_numbers"]
    same = tuple(over_a) == tuple(over_b) and tuple(batch_a) == tuple(batch_b)
    is_aligned = same and len(over_a) + len(batch_a) == eqn.invars[0].aval.ndim == eqn.invars[1].aval.ndim
    return _contraction(inputs[0], inputs[1], is_aligned)


def _multiplied(eqn: Any, inputs: list[Value]) -> Value:
    """A product along axes."""
    num = math.prod(eqn.invars[0].aval.shape[axis] for axis in eqn.params["axes"])
    return Value(inputs[0].degrees ** max(num, 1))


def _selected(eqn: Any, inputs: list[Value]) -> Value:
    return _product(_coefficient(inputs[0]), _sum(inputs[1:]))


def _is_finite(eqn: Any, inputs: list[Value]) -> Value:
    """A constant where it asks whether a number is one: a polynomial of numbers is."""
    asked = (
        len(inputs) == 1
        or eqn.invars[0] is eqn.invars[1]
        or any(value.number is not None and math.isinf(value.number) for value in inputs)
    )
    if not asked:
        return _arbitrary(inputs)
    logs = [value.log for value in inputs if value.log is not None]
    return _is_finite_number(_sum(logs or inputs))


def _is_finite_number(value: Value) -> Value:
    """Of what is a polynomial of numbers; of others it depends on what they depend on."""
    groups = {group for term in value.degrees.terms for group, degree in term if degree == math.inf}
    return Value(Degrees(frozenset([frozenset((group, math.inf) for group in groups)])))


def _is_above(eqn: Any, inputs: list[Value]) -> Value:
    """A constant where it asks whether an exponential is positive."""
    if inputs[0].log is not None and inputs[1].number == 0:
        return _is_finite_number(inputs[0].log)
    return _arbitrary(inputs)


def _exponential(eqn: Any, inputs: list[Value]) -> Value:
    return replace(_arbitrary(inputs), log=inputs[0])


def _logarithm(eqn: Any, inputs: list[Value]) -> Value:
    """A density of positive numbers takes the logarithm of what a transform has made of the reals."""
    return _arbitrary(inputs) if inputs[0].log is None else inputs[0].log


def _rearranged(eqn: Any, inputs: list[Value]) -> Value:
    key = eqn.primitive.name, str(sorted(eqn.params.items(), key=lambda item: item[0])), eqn.invars[0].aval.shape
    return _moved(inputs[0], *key)


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
                return part if (first, last) == (0, size) else _moved(part, "within", axis, first, last)
            if inside:
                return _sum([_summed(part) for *_, part in inside])
    return _rearranged(eqn, inputs)


def _joined(eqn: Any, inputs: list[Value]) -> Value:
    axis = eqn.params["dimension"]
    parts = tuple((var.aval.shape[axis], value) for var, value in zip(eqn.invars, inputs, strict=True))
    shape, edges = eqn.outvars[0].aval.shape, np.cumsum([0, *(size for size, _ in parts)])
    found = _sum([_moved(value, "part", shape, axis, edge) for value, edge in zip(inputs, edges, strict=False)])
    return replace(found, pieces=(axis, parts))


def _stacked(eqn: Any, inputs: list[Value]) -> Value:
    shape, axis = eqn.outvars[0].aval.shape, eqn.params["axis"]
    return _sum([_moved(value, "layer", shape, axis, i) for i, value in enumerate(inputs)])


def _parted(eqn: Any, inputs: list[Value]) -> list[Value]:
    key = eqn.primitive.name, str(eqn.params)
    return [_moved(inputs[0], *key, i) for i in range(len(eqn.outvars))]


def _picked(eqn: Any, inputs: list[Value]) -> Value:
    """Entries at places that the other operands say."""
    # which places is not known here: no other such array is taken to have the same
    return _product(_moved(inputs[0], object()), _coefficient(_sum(inputs[1:])))


def _written(eqn: Any, inputs: list[Value]) -> Value:
    """Entries put or added in places that the last operands say."""
    if eqn.primitive.name == "dynamic_update_slice":
        array, update, *places = inputs
    else:
        array, places, update = inputs[0], [inputs[1]], inputs[2]
    return _product(_summed(_sum([_summed(array), _summed(update)])), _coefficient(_sum(places)))


def _solved(eqn: Any, inputs: list[Value]) -> Value:
    return _contraction(_coefficient(inputs[0]), inputs[1])


_RULES: dict[str, Callable[[Any, list[Value]], Any]] = {
    **dict.fromkeys(("add", "sub", "add_any"), lambda eqn, inputs: _sum(inputs)),
    **dict.fromkeys(("copy", "copy_p", "name", "sharding_constraint", "reshard"), lambda eqn, inputs: inputs[0]),
    "neg": lambda eqn, inputs: Value(inputs[0].degrees, inputs[0].layouts),
    "optimization_barrier": lambda eqn, inputs: inputs,
    "convert_element_type": _convert,
    "mul": lambda eqn, inputs: _product(*inputs),
    "div": _divided,
    "integer_pow": _raised,
    "pow": _raised,
    "square": lambda eqn, inputs: _power(inputs[0], 2),
    "dot_general": _dotted,
    "conv_general_dilated": lambda eqn, inputs: _contraction(inputs[0], inputs[1]),
    "triangular_solve": _solved,
    "reduce_sum": lambda eqn, inputs: _summed(inputs[0]),
    "reduce_window_sum": lambda eqn, inputs: _summed(inputs[0]),
    "cumsum": lambda eqn, inputs: _summed(inputs[0]),
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
    "pad": lambda eqn, inputs: _sum([_moved(inputs[0], "pad", str(eqn.params)), _moved(inputs[1], "padding")]),
    "concatenate": _joined,
    **dict.fromkeys(("gather", "dynamic_slice"), _picked),
    **dict.fromkeys(("scatter", "scatter-add", "scatter-sub", "dynamic_update_slice"), _written),
}


# on whole numbers that are known: where they count rows, as an index does
_COUNTS: dict[str, Callable[[Any, list[Any]], Any]] = {
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
_ROW_BY_ROW = frozenset(
    """abs add add_any and atan2 cbrt ceil cholesky clamp convert_element_type copy copy_p cos cosh digamma div
    dot_general eq erf erf_inv erfc exp exp2 expand_dims expm1 floor ge gt integer_pow is_finite le lgamma log log1p
    logistic lt max min mul ne neg nextafter not or pow reduce_and reduce_max reduce_min reduce_or reduce_prod
    reduce_sum rem reshape rev round rsqrt select_n sharding_constraint sign sin sinh slice sqrt square squeeze
    stop_gradient sub tan tanh transpose triangular_solve xor""".split()
)


# Operations that run programs of their own


def _called(params: Any, inputs: list[Value], rows: _Rows) -> list[Value]:
    program = params.get("jaxpr", params.get("call_jaxpr"))
    if program is None:  # kept in some other way: nothing is known of it
        return []
    if isinstance(program, core.Jaxpr):
        return _evaluate(program, inputs, rows)
    return _closed(program, inputs, rows)


def _with_own_rule(params: Any, inputs: list[Value], rows: _Rows) -> list[Value]:
    """A function with a gradient that its author wrote: nobody knows whether it is the function's."""
    found = _called(params, inputs, rows)
    return found if all(value.degrees.is_constant for value in inputs) else [_arbitrary(inputs)] * len(found)


def _branched(params: Any, inputs: list[Value], rows: _Rows) -> list[Value]:
    which, *operands = inputs
    each = [_closed(branch, operands, rows) for branch in params["branches"]]
    return [_product(_coefficient(which), _sum(values)) for values in zip(*each, strict=True)]


def _carried(value: Value) -> Value:
    """From one turn of a loop to the next other entries are looked at: nothing is said of single ones."""
    return _summed(value)


def _to_rest(step: Callable[[list[Value]], list[Value]], start: list[Value], length: int | None) -> list[Value]:
    """Bounds on what a loop carries after any number of turns, or after just as many as it takes."""
    values = [_carried(value) for value in start]
    if length is not None and length <= MAX_DEGREE:
        for _ in range(length):
            values = [_carried(value) for value in step(values)]
        return values
    for _ in range(_MAX_STEPS):
        after = [_sum([value, _carried(new)]) for value, new in zip(values, step(values), strict=True)]
        if after == values:
            return values
        values = after
    return [_arbitrary(values)] * len(values)


def _scanned(params: Any, inputs: list[Value], rows: _Rows) -> list[Value]:
    num_consts, num_carry, length = params["num_consts"], params["num_carry"], params["length"]
    fixed, start, each = (
        inputs[:num_consts],
        inputs[num_consts : num_consts + num_carry],
        inputs[num_consts + num_carry :],
    )
    each = [_carried(value) for value in each]
    seen: list[list[Value]] = []

    def step(carry):
        found = _closed(params["jaxpr"], [*fixed, *carry, *each], rows)
        seen.append([_carried(value) for value in found[num_carry:]])
        return found[:num_carry]

    end = _to_rest(step, start, length)
    if not seen:
        step(end)
    return [*end, *(_sum(values) for values in zip(*seen, strict=True))]


def _while(params: Any, inputs: list[Value], rows: _Rows) -> list[Value]:
    num_test, num_body = params["cond_nconsts"], params["body_nconsts"]
    of_test, of_body, start = inputs[:num_test], inputs[num_test : num_test + num_body], inputs[num_test + num_body :]
    end = _to_rest(lambda carry: _closed(params["body_jaxpr"], [*of_body, *carry], rows), start, None)
    (test,) = _closed(params["cond_jaxpr"], [*of_test, *end], rows)
    return [_product(_coefficient(test), value) for value in end]


def _linear_solve(params: Any, inputs: list[Value], rows: _Rows) -> list[Value]:
    num = sum(params["const_lengths"])
    matrix = _coefficient(_sum([Value(), *inputs[:num]]))
    return [_contraction(matrix, _sum(inputs[num:]))] * (len(inputs) - num)


_INSIDE: dict[str, Callable[[Any, list[Value], _Rows], list[Value]]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"), _called),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _with_own_rule),
    "cond": _branched,
    "scan": _scanned,
    "while": _while,
    "custom_linear_solve": _linear_solve,
}
