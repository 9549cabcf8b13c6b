"""The linear system H x = ∂J/∂φ of the implicit function theorem, and three ways to solve it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.flatten_util import ravel_pytree

from .problem import Bilevel

__all__ = ["LinearSystem", "descended", "linearized", "nystrom", "ratio"]


class LinearSystem(NamedTuple):
    """The linear system at the present φ, all of it with the same random numbers.

    :ivar loss: J.
    :ivar direct: ∂J/∂θ.
    :ivar rhs: ∂J/∂φ as one flat vector.
    :ivar products: x ↦ (∂²G/∂θ∂φ x, ∂²G/∂φ² x), the latter flat.
    """

    loss: Array
    direct: Any
    rhs: Array
    products: Callable[[Array], tuple[Any, Array]]


def linearized(rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any) -> LinearSystem:
    """The system at these parameters: J, G and their gradients evaluated once, with the noise of this key."""
    key_outer, key_inner = jax.random.split(rng_key)
    phi = problem.optim.get_params(inner_state)
    loss, (direct, right) = jax.value_and_grad(problem.outer, argnums=(1, 2))(key_outer, theta, phi)
    rhs, unravel = ravel_pytree(right)
    # G and its gradient are evaluated once; every product is a pullback through them
    _, pullback = jax.vjp(lambda t, p: jax.grad(problem.inner, argnums=2)(key_inner, t, p), theta, phi)

    def products(x: Array) -> tuple[Any, Array]:
        cross, product = pullback(unravel(x))
        return cross, ravel_pytree(product)[0]

    return LinearSystem(loss, direct, rhs, products)


def ratio(x: Array, y: Array) -> Array:
    """x / y, and 0 where y is 0."""
    return jnp.where(y == 0, 0.0, x / jnp.where(y == 0, 1.0, y))


Product = Callable[[Array], Array]
Solution = tuple[Array, Array, Array]


def descended(product: Product, rhs: Array, num_steps: int, conjugate: bool) -> Solution:
    """x ← x + α p from x = 0, stopped where the curvature along p is not positive.

    Conjugate gradients, stopped as in Newton-CG (Nocedal and Wright 2006, section 7.1); or the Neumann series, p the
    residual itself and α the inverse of the largest ‖A r‖/‖r‖ met, which the residuals' own growth finds.
    """
    tiny = jnp.square(jnp.finfo(rhs.dtype).eps) * rhs.dot(rhs)

    def goes_on(carry: tuple[Any, ...]) -> Array:
        i, _, r, _, _, least = carry
        still: Array = (i < num_steps) & (r.dot(r) > tiny) & (least > 0)
        return still

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, x, r, p, largest, least = carry
        image = product(p)
        curvature = p.dot(image) / p.dot(p)
        largest = jnp.maximum(largest, jnp.sqrt(image.dot(image) / p.dot(p)))
        length = r.dot(r) / p.dot(image) if conjugate else 1 / largest
        length = jnp.where(curvature > 0, length, 0.0)
        rest = r - length * image
        p_next = rest + rest.dot(rest) / r.dot(r) * p if conjugate else rest
        return i + 1, x + length * p, rest, p_next, largest, jnp.minimum(least, curvature)

    nothing, infinite = jnp.zeros((), rhs.dtype), jnp.full((), jnp.inf, rhs.dtype)
    start = (0, jnp.zeros_like(rhs), rhs, rhs, nothing, infinite)
    _, x, r, _, _, least = jax.lax.while_loop(goes_on, step, start)
    return x, r, least


def nystrom(rng_key: Array, product: Product, rhs: Array, num_steps: int, damping: float) -> Solution:
    """(Â + damping I)⁻¹ b with  of rank ``num_steps``, from A's action on a random subspace.

    Hataya and Yamada 2023 (arXiv:2302.09726), with a Gaussian sketch instead of columns (Frangella, Tropp and Udell
    2023). Directions of the sketch without positive curvature are left out.
    """
    rank = min(num_steps, rhs.size)
    basis = jnp.linalg.qr(jax.random.normal(rng_key, (rhs.size, rank), rhs.dtype))[0].T
    images = jax.lax.map(product, basis)
    core = images @ basis.T
    values, vectors = jnp.linalg.eigh(0.5 * (core + core.T))
    kept = values > jnp.sqrt(jnp.finfo(rhs.dtype).eps) * jnp.abs(values).max()
    # Â = BᵀB
    root = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1.0)), 0.0)[:, None] * (vectors.T @ images)
    _, singular, directions = jnp.linalg.svd(root, full_matrices=False)
    known = singular > 0 if damping == 0 else jnp.ones_like(kept)
    along = directions @ rhs
    x = jnp.where(known, along / jnp.where(known, jnp.square(singular) + damping, 1.0), 0.0) @ directions
    if damping > 0:
        x = x + (rhs - along @ directions) / damping
    return x, rhs - product(x) - damping * x, values.min()
