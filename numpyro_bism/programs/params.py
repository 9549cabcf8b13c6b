"""Which parameters a program trains, and the map between their own values and unconstrained ones."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import biject_to, constraints
from numpyro.infer.util import transform_fn

__all__ = ["collect", "constrain", "jittered", "reject_shared", "unconstrain"]


def collect(sites: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The transform from the reals of every ``param`` site, by name."""
    return {name: biject_to(site["kwargs"].get("constraint", constraints.real)) for name, site in sites.items()}


def constrain(transforms: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as the programs see them."""
    values: dict[str, Any] = transform_fn(transforms, params)
    return values


def unconstrain(transforms: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as the optimisers see them; a value may be a whole pytree, as flax and equinox modules have."""
    values = transform_fn(transforms, params, invert=True)
    # strong types: a Python float's weak one would turn strong after a step, and everything be compiled twice
    strong: dict[str, Any] = jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.result_type(x)), values)
    return strong


def reject_shared(theta: Iterable[str], phi: Iterable[str]) -> None:
    """Check whether every parameter belongs to the model alone or to the guide alone.

    :raises ValueError: if one belongs to both.
    """
    for name in sorted(set(theta) & set(phi)):
        raise ValueError(
            f"Parameter '{name}' is used by both the model and the guide. The outer problem trains the "
            "model's parameters and the inner one the guide's, so no parameter can belong to both. Give one "
            "of them another name, or keep a copy."
        )


def jittered(rng_key: Array, params: Any) -> Any:
    """Parameters off these: at weights of zero what is not read, or is linear, can't be told from what is.

    Of numbers by NumPy's generator: JAX's would be compiled for every shape.
    """
    every = jax.tree.leaves((rng_key, params))
    if any(isinstance(x, jax.core.Tracer) or not x.is_fully_addressable for x in every if isinstance(x, Array)):
        return _jittered(rng_key, params)
    generator = np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))

    def moved(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        noise = generator.standard_normal(jnp.shape(x), np.float32).astype(x.dtype)
        return jax.device_put(
            (np.asarray(x) + np.asarray(0.1, x.dtype) * noise), x.sharding if isinstance(x, Array) else None
        )

    return jax.tree.map(moved, params)


@jax.jit
def _jittered(rng_key: Array, params: Any) -> Any:
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(rng_key, max(len(leaves), 1))
    moved = [
        x + 0.1 * jax.random.normal(key, jnp.shape(x), x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
        for key, x in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(tree, moved)
