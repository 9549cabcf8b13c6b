"""The compiled step: what inner steps draw is drawn for all of them at once.

An inner step's noise depends on its random key alone, and all keys are known before the first step. Threefry in a
compiled loop costs a small model more than the step itself; vectorised over the keys it gives the same numbers for the
price of one draw.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.extend import core


def bind(eqn: Any, inputs: Any) -> list[Any]:
    """The outputs of a recorded operation on ``inputs``."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    # an older JAX returns functions among the parameters apart
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return outputs if eqn.primitive.multiple_results else [outputs]


def drawn_ahead(function: Callable[..., Any], keys: Array, *args: Any) -> tuple[list[Array], Callable[..., Any]]:
    """``function(key, *args)`` taken apart into what depends on the key alone, computed for all ``keys``, and the rest.

    :param args: pytrees of arrays of the shapes that the rest will be called with.
    :returns: the noise, stacked over the keys, and ``rest`` with ``rest(noise[k], *args) == function(keys[k], *args)``.
    """
    one = jax.eval_shape(lambda k: k[0], keys)
    jaxpr, shape = jax.make_jaxpr(function, return_shape=True)(one, *args)
    key, *inputs = jaxpr.jaxpr.invars
    later, from_key = set(inputs), {key: None}  # a dictionary keeps the order
    ahead, fixed, behind = [], [], []
    for eqn in jaxpr.eqns:
        read = {v for v in eqn.invars if not isinstance(v, core.Literal)}
        if eqn.effects or read & later:
            behind.append(eqn)
            later.update(eqn.outvars)
        elif read & from_key.keys():
            ahead.append(eqn)
            from_key |= dict.fromkeys(eqn.outvars)
        else:
            fixed.append(eqn)
    wanted = {v for eqn in behind for v in eqn.invars if not isinstance(v, core.Literal)}
    wanted.update(v for v in jaxpr.jaxpr.outvars if not isinstance(v, core.Literal))
    noise = [v for v in from_key if v in wanted]
    known = _run(fixed, dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True)))

    def draw(key_now: Array) -> list[Array]:
        values = _run(ahead, {**known, key: key_now})
        return [values[v] for v in noise]

    def rest(drawn: list[Array], *args: Any) -> Any:
        values = {**known, **dict(zip(noise, drawn, strict=True))}
        values.update(zip(jaxpr.jaxpr.invars[1:], jax.tree.leaves(args), strict=True))
        values = _run(behind, values)
        return jax.tree.unflatten(jax.tree.structure(shape), [_read(values, v) for v in jaxpr.jaxpr.outvars])

    return jax.vmap(draw)(keys), rest


def _read(values: dict[Any, Any], var: Any) -> Any:
    return var.val if isinstance(var, core.Literal) else values[var]


def _run(eqns: list[Any], values: dict[Any, Any]) -> dict[Any, Any]:
    values = dict(values)
    for eqn in eqns:
        values.update(zip(eqn.outvars, bind(eqn, [_read(values, v) for v in eqn.invars]), strict=True))
    return values
