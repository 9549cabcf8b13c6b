"""In which of its variables log p̃ is a polynomial, and of which degree: proved from its own program.

The program is traced to a jaxpr and read operation by operation with :class:`Degrees` for values: sums, products,
contractions, powers, index maps and selections have bounds that follow from their operands'. All else is "any
function of what it reads", so that an operation not known here never makes structure appear.

Parameters are constants, so a proof holds at all their values. What differs from row to row and is no variable is one
more group, :data:`COVARIATES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.extend import core
from numpyro.distributions.util import sum_rightmost

from ..distributions import ConcreteBernoulli, ConcreteOneHot, mask_of
from ..programs.modes import on_numbers
from .degrees import MAX_DEGREE, Degrees
from .density import Point
from .rules import COUNTS, ROW_BY_ROW, RULES
from .values import COVARIATES, POSITION, ROW, Value, arbitrary, coefficient, contraction, product, sum_of, summed

if TYPE_CHECKING:
    from .energy import Energy


_MAX_WHOLE = 2**14
_MAX_STEPS = 32  # of a loop that is followed to where its bounds stand still


class Proof(NamedTuple):
    """What is proved of a log density, for every row and at all values of its variables.

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
        with on_numbers():
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
    inputs += [Value(ROW, whole=np.arange(rows.num))] * is_free
    (value,) = _closed(jaxpr, inputs, rows)
    degrees, reads_position = value.degrees, POSITION in value.degrees.groups
    if reads_position:
        terms = [{COVARIATES if g == POSITION else g: d for g, d in term} for term in degrees.terms]
        degrees = Degrees(frozenset(frozenset(term.items()) for term in terms))
    separable = frozenset(name for name in names if value.layouts.get(name) or degrees.within([name]) <= 1)
    return Proof(degrees, separable, reads_position)


def _trace(energy: Energy, params: Mapping[str, Any], point: Any) -> Any:
    def trace(energy: Energy) -> Any:
        def log_joint(point: Point, *which: Array) -> Array:
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
        each: Array = sum_rightmost(log_density(fn.base_dist, value), fn.reinterpreted_batch_ndims)
        return each
    if isinstance(fn, dist.ExpandedDistribution):
        shape = jnp.shape(value)[: max(jnp.ndim(value) - fn.event_dim, 0)]
        return jnp.broadcast_to(log_density(fn.base_dist, value), jnp.broadcast_shapes(fn.batch_shape, shape))
    if isinstance(fn, dist.MaskedDistribution) and not isinstance(mask_of(fn), bool):
        return jnp.where(mask_of(fn), log_density(fn.base_dist, value), 0.0)
    if isinstance(fn, dist.MaskedDistribution) and mask_of(fn):
        return log_density(fn.base_dist, value)
    if isinstance(fn, ConcreteBernoulli):
        logits: Array = fn.logits
        return value * logits - jax.nn.softplus(logits)
    if isinstance(fn, ConcreteOneHot):
        return (value * fn.logits).sum(-1)
    log_prob: Array = fn.log_prob(value)
    return log_prob


# The interpreter


class _Rows(NamedTuple):
    """How many rows there are, and whether a dimension that is a multiple of it can be nothing else."""

    num: int
    is_prime: bool = False

    def has(self, size: int) -> bool:
        """Whether an axis of this size may run over the rows."""
        return self.num > 1 and (size > 0 and size % self.num == 0 if self.is_prime else size == self.num)


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

    def read(var: Any) -> Value:
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
        return Value(ROW)
    array = np.asarray(value)
    whole = array if array.dtype.kind == "i" and array.size <= _MAX_WHOLE else None
    if any((array != array.take([0], axis)).any() for axis in axes):
        return Value(Degrees.of(COVARIATES, math.inf), whole=whole)
    return Value(whole=whole)


def _apply(eqn: Any, inputs: list[Value], rows: _Rows) -> list[Value]:
    """An operation's results."""
    name, params, num = eqn.primitive.name, eqn.params, len(eqn.outvars)
    inside = _INSIDE.get(name)
    if inside is not None:
        found = inside(params, inputs, rows)
        return found if len(found) == num else [arbitrary(inputs)] * num
    if (
        name in COUNTS
        and all(value.whole is not None for value in inputs)
        and math.prod(eqn.outvars[0].aval.shape) <= _MAX_WHOLE
    ):
        (known,) = _of_known(eqn, inputs, rows)
        return [replace(known, whole=COUNTS[name](eqn, [value.whole for value in inputs]))]
    return _of_known(eqn, inputs, rows)


def _of_known(eqn: Any, inputs: list[Value], rows: _Rows) -> list[Value]:
    name, num = eqn.primitive.name, len(eqn.outvars)
    if all(value.degrees.is_constant for value in inputs):
        return [_of_constants(eqn, var.aval, inputs, rows) for var in eqn.outvars]
    if name not in RULES:
        return [arbitrary(inputs)] * num
    if name == "gather" and _is_every_row(eqn, inputs):
        return [inputs[0]]
    found = RULES[name](eqn, inputs)
    each = found if isinstance(found, list) else [found] * num
    return [product(value, Value(ROW)) for value in each] if _picks_rows(eqn, rows) else each


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
        return Value(ROW) if eqn.params[along] in axes else Value()
    before = [var.aval.shape for var in eqn.invars]
    had_rows = any(rows.has(size) for shape in before for size in shape)
    # rows cut out of something longer are not the same ones
    is_cut = name == "slice" and any(before[0][axis] != aval.shape[axis] for axis in axes)
    return Value() if name in ROW_BY_ROW and had_rows and not is_cut else Value(ROW)


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
    return found if all(value.degrees.is_constant for value in inputs) else [arbitrary(inputs)] * len(found)


def _branched(params: Any, inputs: list[Value], rows: _Rows) -> list[Value]:
    which, *operands = inputs
    each = [_closed(branch, operands, rows) for branch in params["branches"]]
    return [product(coefficient(which), sum_of(values)) for values in zip(*each, strict=True)]


def _carried(value: Value) -> Value:
    """From one turn of a loop to the next other entries are looked at: nothing is said of single ones."""
    return summed(value)


def _to_rest(step: Callable[[list[Value]], list[Value]], start: list[Value], length: int | None) -> list[Value]:
    """Bounds on what a loop carries after any number of turns, or after just as many as it takes."""
    values = [_carried(value) for value in start]
    if length is not None and length <= MAX_DEGREE:
        for _ in range(length):
            values = [_carried(value) for value in step(values)]
        return values
    for _ in range(_MAX_STEPS):
        after = [sum_of([value, _carried(new)]) for value, new in zip(values, step(values), strict=True)]
        if after == values:
            return values
        values = after
    return [arbitrary(values)] * len(values)


def _scanned(params: Any, inputs: list[Value], rows: _Rows) -> list[Value]:
    num_consts, num_carry, length = params["num_consts"], params["num_carry"], params["length"]
    fixed, start, each = (
        inputs[:num_consts],
        inputs[num_consts : num_consts + num_carry],
        inputs[num_consts + num_carry :],
    )
    each = [_carried(value) for value in each]
    seen: list[list[Value]] = []

    def step(carry: list[Value]) -> list[Value]:
        found = _closed(params["jaxpr"], [*fixed, *carry, *each], rows)
        seen.append([_carried(value) for value in found[num_carry:]])
        return found[:num_carry]

    end = _to_rest(step, start, length)
    if not seen:
        step(end)
    return [*end, *(sum_of(values) for values in zip(*seen, strict=True))]


def _while(params: Any, inputs: list[Value], rows: _Rows) -> list[Value]:
    num_test, num_body = params["cond_nconsts"], params["body_nconsts"]
    of_test, of_body, start = inputs[:num_test], inputs[num_test : num_test + num_body], inputs[num_test + num_body :]
    end = _to_rest(lambda carry: _closed(params["body_jaxpr"], [*of_body, *carry], rows), start, None)
    (test,) = _closed(params["cond_jaxpr"], [*of_test, *end], rows)
    return [product(coefficient(test), value) for value in end]


def _linear_solve(params: Any, inputs: list[Value], rows: _Rows) -> list[Value]:
    num = sum(params["const_lengths"])
    matrix = coefficient(sum_of([Value(), *inputs[:num]]))
    return [contraction(matrix, sum_of(inputs[num:]))] * (len(inputs) - num)


_INSIDE: dict[str, Callable[[Any, list[Value], _Rows], list[Value]]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"), _called),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _with_own_rule),
    "cond": _branched,
    "scan": _scanned,
    "while": _while,
    "custom_linear_solve": _linear_solve,
}
