"""The compiled step: noise that depends on random keys alone is drawn for many keys at once, and convolutions have the
form that is fast in a loop.

The keys of all inner steps, and of the next outer ones, are known before the first is taken. Threefry in a compiled
loop costs a small model as much as the rest of the step; vectorised over the keys it gives the same numbers for less.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.extend import core

MAX_NUMBERS = 2**20  # drawn ahead for outer steps to come: 4 MB
MAX_STEPS = 32

FEW_ROWS = 256  # of more, optimised code is worth its compilation even if it runs once
UNOPTIMIZED = {"xla_backend_optimization_level": 0}


def bind(eqn: Any, inputs: Any) -> list[Any]:
    """The outputs of a recorded operation on ``inputs``."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    # an older JAX returns functions among the parameters apart
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return outputs if eqn.primitive.multiple_results else [outputs]


def taken_apart(
    function: Callable[..., Any], key: Any, *args: Any
) -> tuple[Callable[[Array], list[Array]], Callable[..., Any]]:
    """``draw``, what needs the key alone, and ``rest``: ``rest(draw(key), *args) == function(key, *args)``.

    What makes more numbers than it is given (rows written into a whole data set) stays with the rest, unless it is a
    draw: so the noise takes no more memory than its draws do.

    :param key: a key, or its shape and type; ``args`` too may be such stand-ins.
    """
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]  # who looks at values sees the function as written
        return lambda key: [key], lambda found, *args: function(found[0], *args)
    jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(key, *args)
    first, *others = jaxpr.jaxpr.invars
    later, drawn = set(others), {first: None}  # a dictionary keeps the order
    fixed, ahead, behind = [], [], []
    for eqn in jaxpr.eqns:
        read = {v for v in eqn.invars if not isinstance(v, core.Literal)}
        if not (read & later or read & drawn.keys() or eqn.effects):
            fixed.append(eqn)
        elif read & later or eqn.effects or _grows(eqn, [v for v in read if v in drawn]):
            behind.append(eqn)
            later.update(eqn.outvars)
        else:
            ahead.append(eqn)
            drawn |= dict.fromkeys(eqn.outvars)
    wanted = {v for eqn in behind for v in eqn.invars if not isinstance(v, core.Literal)}
    wanted.update(v for v in jaxpr.jaxpr.outvars if not isinstance(v, core.Literal))
    noise = [v for v in drawn if v in wanted]
    known = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))

    def draw(key: Array) -> list[Array]:
        values = _run([*fixed, *ahead], {**known, first: key})
        return [values[v] for v in noise]

    def rest(found: list[Array], *args: Any) -> Any:
        given = dict(zip([*noise, *others], [*found, *jax.tree.leaves(args)], strict=True))
        values = _run([*fixed, *behind], {**known, **given})
        return jax.tree.unflatten(jax.tree.structure(shape), [_read(values, v) for v in jaxpr.jaxpr.outvars])

    return draw, rest


def num_ahead(draw: Callable[[Array], list[Array]], key: Any) -> int:
    """For how many steps to come noise is drawn at once: few enough to hold it."""
    size = sum(math.prod(x.shape) for x in jax.eval_shape(draw, key))
    return max(1, min(MAX_STEPS, MAX_NUMBERS // max(size, 1)))


def _grows(eqn: Any, drawn: list[Any]) -> bool:
    if any(jax.dtypes.issubdtype(v.aval.dtype, jax.dtypes.prng_key) for v in drawn):
        return False
    return max(math.prod(v.aval.shape) for v in eqn.outvars) > max(math.prod(v.aval.shape) for v in drawn)


def _read(values: dict[Any, Any], var: Any) -> Any:
    return var.val if isinstance(var, core.Literal) else values[var]


def _run(eqns: list[Any], values: dict[Any, Any], bind: Callable[..., list[Any]] = bind) -> dict[Any, Any]:
    for eqn in eqns:
        values.update(zip(eqn.outvars, bind(eqn, [_read(values, v) for v in eqn.invars]), strict=True))
    return values


def compiled(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """``jax.jit``, whose convolutions are as fast in a loop on CPUs as outside of one.

    XLA has fast code for a convolution with channels last, and brings others to that form; but not those in the body
    of a loop, which take 10 to 100 times as long there. The numbers are the same.

    :param settings: of ``jax.jit``.
    """

    @functools.wraps(function)
    def rewritten(*args: Any) -> Any:
        if jax.default_backend() != "cpu" or jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return function(*args)
        jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        found = _channels_last(jaxpr) if _convolves(jaxpr) else jaxpr
        return jax.tree.unflatten(jax.tree.structure(shape), core.jaxpr_as_fun(found)(*jax.tree.leaves(args)))

    return jax.jit(rewritten, **settings)


def compiled_once(function: Callable[..., Any], num_rows: int) -> Callable[..., Any]:
    """:func:`compiled`, for what runs once: one compilation instead of one for every operation, and a short one."""
    options = UNOPTIMIZED if num_rows <= FEW_ROWS and jax.default_backend() == "cpu" else None
    return compiled(function, compiler_options=options)


def _inside(eqn: Any) -> dict[str, tuple[Any, ...]]:
    """The programs that an operation runs, by parameter: a loop's body, the branches of a condition."""
    several = {name: x if isinstance(x, list | tuple) else (x,) for name, x in eqn.params.items()}
    found = {name: tuple(y for y in x if isinstance(y, core.ClosedJaxpr | core.Jaxpr)) for name, x in several.items()}
    return {name: programs for name, programs in found.items() if programs}


def _convolves(program: Any) -> bool:
    eqns = program.eqns if isinstance(program, core.Jaxpr) else program.jaxpr.eqns
    return any(
        eqn.primitive is jax.lax.conv_general_dilated_p or any(map(_convolves, sum(_inside(eqn).values(), ())))
        for eqn in eqns
    )


def _channels_last(program: Any) -> Any:
    """The same program, its convolutions and those inside of its loops with the axes (n, ..., channels)."""
    closed = core.ClosedJaxpr(program, ()) if isinstance(program, core.Jaxpr) else program
    jaxpr = closed.jaxpr

    def rewritten(eqn: Any, inputs: list[Any]) -> list[Any]:
        if eqn.primitive is jax.lax.conv_general_dilated_p and eqn.params["batch_group_count"] == 1:
            return [_convolution(eqn, *inputs)]
        programs = _inside(eqn)
        if any(map(_convolves, sum(programs.values(), ()))):
            changed = {name: map(_channels_last, each) for name, each in programs.items()}
            params = {
                name: type(eqn.params[name])(each) if isinstance(eqn.params[name], list | tuple) else next(each)
                for name, each in changed.items()
            }
            eqn = eqn.replace(params={**eqn.params, **params})
        return bind(eqn, inputs)

    def run(*args: Any) -> list[Any]:
        given = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))
        values = _run(jaxpr.eqns, given, rewritten)
        return [_read(values, v) for v in jaxpr.outvars]

    kinds = [v.aval for v in jaxpr.invars]
    found = jax.make_jaxpr(run)(*[jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in kinds])
    return found.jaxpr if isinstance(program, core.Jaxpr) else found


def _convolution(eqn: Any, images: Array, filters: Array) -> Array:
    axes, num = eqn.params["dimension_numbers"], images.ndim - 2
    middle = tuple(range(1, num + 1))
    images = images.transpose(axes.lhs_spec[0], *axes.lhs_spec[2:], axes.lhs_spec[1])
    filters = filters.transpose(*axes.rhs_spec[2:], axes.rhs_spec[1], axes.rhs_spec[0])
    last = (0, num + 1, *middle)
    plain = jax.lax.ConvDimensionNumbers(last, (num + 1, num, *range(num)), last)
    found = eqn.primitive.bind(images, filters, **{**eqn.params, "dimension_numbers": plain})
    places = dict(zip(axes.out_spec, last, strict=True))
    return found.transpose([places[axis] for axis in range(num + 2)])
