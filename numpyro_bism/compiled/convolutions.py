"""``jax.jit``, with convolutions in the form that is fast in a loop."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.extend import core

from .jaxprs import bind, evaluate, subprograms, value_of

FEW_ROWS = 256  # of more, optimised code is worth its compilation even if it runs once
UNOPTIMIZED = {"xla_backend_optimization_level": 0}


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


def _convolves(program: Any) -> bool:
    eqns = program.eqns if isinstance(program, core.Jaxpr) else program.jaxpr.eqns
    return any(
        eqn.primitive is jax.lax.conv_general_dilated_p or any(map(_convolves, sum(subprograms(eqn).values(), ())))
        for eqn in eqns
    )


def _channels_last(program: Any) -> Any:
    """The same program, its convolutions and those inside of its loops with the axes (n, ..., channels)."""
    closed = core.ClosedJaxpr(program, ()) if isinstance(program, core.Jaxpr) else program
    jaxpr = closed.jaxpr

    def rewritten(eqn: Any, inputs: list[Any]) -> list[Any]:
        if eqn.primitive is jax.lax.conv_general_dilated_p and eqn.params["batch_group_count"] == 1:
            return [_convolution(eqn, *inputs)]
        programs = subprograms(eqn)
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
        values = evaluate(jaxpr.eqns, given, rewritten)
        return [value_of(values, v) for v in jaxpr.outvars]

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
    found: Array = eqn.primitive.bind(images, filters, **{**eqn.params, "dimension_numbers": plain})
    places = dict(zip(axes.out_spec, last, strict=True))
    return found.transpose([places[axis] for axis in range(num + 2)])
