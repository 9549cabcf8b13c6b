"""Optimisers: what SVI takes, and their own step as a differentiable function of parameters and gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core

from ..compiled.jaxprs import bind


def differentiable_update(optim: Any, gradient: Any, state: Any, value: Array) -> Any:
    """``optim.update``, in which √0 and x/0 have derivative 0; the new state is the same number for number.

    Adam divides by √(mean g²): at a gradient of exactly 0 its derivative would be 0·∞ = NaN. Clipping by the
    norm divides by it in a branch that is not taken then.
    """
    flat, tree = jax.tree.flatten((gradient, state, value))

    def update(*leaves: Any) -> Any:
        gradient, state, value = jax.tree.unflatten(tree, leaves)
        return optim.update(gradient, state, value=value)

    jaxpr, shape = jax.make_jaxpr(update, return_shape=True)(*flat)
    return jax.tree.unflatten(jax.tree.structure(shape), _evaluate(jaxpr.jaxpr, jaxpr.consts, flat))


def _root(x: Array) -> Array:
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), jnp.where(x < 0, jnp.nan, 0.0))


def _quotient(x: Array, y: Array) -> Array:
    zero = y == 0
    return jnp.where(zero, jax.lax.stop_gradient(x / y), x / jnp.where(zero, jnp.ones_like(y), y))


def _inverse_root(x: Array) -> Array:
    positive = x > 0
    return jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, x, 1.0)), jax.lax.stop_gradient(jax.lax.rsqrt(x)))


_SAFE: dict[str, Callable[..., Array]] = {"sqrt": _root, "rsqrt": _inverse_root, "div": _quotient}


def _branch(branch: Any) -> Any:
    return lambda *operands: _evaluate(branch.jaxpr, branch.consts, operands)


def _in(var: Any, known: set[Any]) -> bool:
    return not isinstance(var, core.Literal) and var in known


def _is_positive(var: Any) -> bool:
    return isinstance(var, core.Literal) and jnp.ndim(var.val) == 0 and var.val > 0


def _evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    values: dict[Any, Any] = {}
    roots, positive = set(), set()  # a root and a positive number: what Adam divides by needs no guard

    def read(var: Any) -> Any:
        return var.val if isinstance(var, core.Literal) else values[var]

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        inner = eqn.params.get("jaxpr")
        name = eqn.primitive.name
        if name == "sqrt":
            roots.update(eqn.outvars)
        elif name == "add" and _in(eqn.invars[0], roots) and _is_positive(eqn.invars[1]):
            positive.update(eqn.outvars)
        if name == "div" and _in(eqn.invars[1], positive):
            outputs = bind(eqn, inputs)
        elif name in _SAFE and jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
            outputs = [_SAFE[name](*inputs)]
        elif name == "cond":  # optax's every-k-steps and if-finite wrappers keep the optimiser in a branch
            outputs = jax.lax.switch(inputs[0], [_branch(b) for b in eqn.params["branches"]], *inputs[1:])
        elif name in ("pjit", "jit") and inner is not None:
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        else:
            outputs = bind(eqn, inputs)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]
