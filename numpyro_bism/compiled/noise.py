"""The compiled step: noise that depends on random keys alone is drawn for many keys at once, and convolutions have the
form that is fast in a loop.

The keys of all inner steps, and of the next outer ones, are known before the first is taken. Threefry in a compiled
loop costs a small model as much as the rest of the step; vectorised over the keys it gives the same numbers for less.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.extend import core

from .jaxprs import evaluate, value_of

MAX_NUMBERS = 2**20  # drawn ahead for outer steps to come: 4 MB
MAX_STEPS = 32


def split_noise(
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
        values = evaluate([*fixed, *ahead], {**known, first: key})
        return [values[v] for v in noise]

    def rest(found: list[Array], *args: Any) -> Any:
        given = dict(zip([*noise, *others], [*found, *jax.tree.leaves(args)], strict=True))
        values = evaluate([*fixed, *behind], {**known, **given})
        return jax.tree.unflatten(jax.tree.structure(shape), [value_of(values, v) for v in jaxpr.jaxpr.outvars])

    return draw, rest


def num_prefetched(draw: Callable[[Array], list[Array]], key: Any) -> int:
    """For how many steps to come noise is drawn at once: few enough to hold it."""
    size: int = sum(math.prod(x.shape) for x in jax.eval_shape(draw, key))
    return max(1, min(MAX_STEPS, MAX_NUMBERS // max(size, 1)))


def _grows(eqn: Any, drawn: list[Any]) -> bool:
    if any(jax.dtypes.issubdtype(v.aval.dtype, jax.dtypes.prng_key) for v in drawn):
        return False
    return bool(max(math.prod(v.aval.shape) for v in eqn.outvars) > max(math.prod(v.aval.shape) for v in drawn))
