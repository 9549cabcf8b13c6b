"""A NumPyro optimiser's own step as a differentiable function of parameters and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core


def differentiable_update(optim: Any, gradient: Any, state: Any, value: Array) -> Any:
    """``optim.update``, in which √0 has derivative 0; the new state is the same number for number.

    Adam divides by √(mean g²): at a gradient of exactly 0 its derivative would be 0·∞ = NaN.
    """
    flat, tree = jax.tree.flatten((gradient, state, value))
    jaxpr, shape = jax.make_jaxpr(lambda *leaves: _update(optim, *jax.tree.unflatten(tree, leaves)), return_shape=True)(
        *flat
    )
    out = _evaluate(jaxpr.jaxpr, jaxpr.consts, flat)
    return jax.tree.unflatten(jax.tree.structure(shape), out)


def _update(optim, gradient, state, value):
    return optim.update(gradient, state, value=value)


def _root(x: Array) -> Array:
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), jnp.where(x < 0, jnp.nan, 0.0))


def _bind(eqn: Any, inputs: Any) -> Any:
    bound = eqn.primitive.get_bind_params(eqn.params)
    # an older JAX returns functions among the parameters apart
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    return eqn.primitive.bind(*functions, *inputs, **params)


def _evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    values: dict[Any, Any] = {}

    def read(var):
        return var.val if isinstance(var, core.Literal) else values[var]

    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        inner = eqn.params.get("jaxpr")
        if eqn.primitive.name == "sqrt":
            outputs = [_root(*inputs)]
        elif eqn.primitive.name in ("pjit", "jit") and inner is not None:
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        else:
            outputs = _bind(eqn, inputs)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]
