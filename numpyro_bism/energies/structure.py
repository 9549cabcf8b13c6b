"""Which variables of an energy have conditionals in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..programs.modes import on_numbers
from .density import MAX_FULL, VISIBLE, Block, Density, Latent, Point, curvature

if TYPE_CHECKING:
    from .energy import Energy
    from .proof import Proof

MAX_LOOKED_AT = 4096  # a constant precision of more variables counts as full unless it is proved diagonal


def find_blocks(
    energy: Energy, params: Mapping[str, Any], x: Point, proof: Proof, moving: Sequence[str]
) -> tuple[Block, ...]:
    """From bounds on the degrees of log p̃; at a point of any values, for the entries of constant matrices.

    - "gaussian": of degree 2 or less in all of its variables together;
    - "affine": of degree 1 or less;
    - what the user declares.

    :raises ValueError: for a declaration of more variables than a precision a row is kept for.
    """
    density, degrees = Density(lambda x: energy.log_joint(params, x), energy, (), {}), proof.degrees
    if energy.resizes:
        x = jax.tree.map(lambda a: a[:1], x)
    kinds = {name: energy.latents[name].kind for name in moving if name in energy.latents}
    real = [VISIBLE] if VISIBLE in moving and x[VISIBLE].shape[1] else []
    real += [name for name, kind in kinds.items() if kind == "real"]
    seen: dict[tuple[str, ...], tuple[bool, bool]] = {}

    def is_gaussian(names: tuple[str, ...]) -> bool:
        if degrees.within(names) > 2:
            return False
        is_constant = not degrees.beside(names, 2)
        apart = all(sum(name in names for name, _ in term) < 2 or _degree(term, names) < 2 for term in degrees.terms)
        is_diagonal = apart and proof.separable.issuperset(names)
        if is_constant and not is_diagonal:
            is_diagonal = _is_diagonal(density, x, names)
        seen[names] = is_constant, is_diagonal
        return is_constant or is_diagonal or _size(x, names) <= MAX_FULL

    groups, rest = _partition(tuple(real), is_gaussian)
    blocks = [Block("gaussian", names, *seen[names]) for names in groups]
    for name in rest:
        size = _size(x, [name])
        if name in energy.declared and size > MAX_FULL:
            raise ValueError(
                f"{energy.called(name)} declared infer={{'structure': 'gaussian'}} and has {size} numbers a row: a "
                f"precision that is declared is kept for at most {MAX_FULL}. Leave the declaration out."
            )
    blocks += [Block(energy.declared.get(name, "free"), (name,), is_declared=name in energy.declared) for name in rest]
    soft = tuple(name for name, kind in kinds.items() if kind in ("bits", "onehot"))
    groups, rest = _partition(soft, lambda names: degrees.within(names) <= 1)
    blocks += [Block("affine", names) for names in groups]
    for name in rest:
        if name in energy.declared:
            blocks.append(Block("affine", (name,), is_declared=True))
            continue
        is_constant = degrees.within([name]) <= 2 and not degrees.beside([name], 2)
        is_multilinear = is_constant and _has_no_squares(density, x, name)
        blocks.append(Block("units", (name,), is_multilinear=is_multilinear))
    blocks += [Block("units", (name,)) for name, kind in kinds.items() if kind == "labels"]
    return tuple(blocks)


def _degree(term: frozenset[tuple[str, float]], names: Sequence[str]) -> float:
    return sum(degree for name, degree in term if name in names)


def _size(x: Point, names: Sequence[str]) -> int:
    return sum(math.prod(x[name].shape[1:]) for name in names)


def _partition(
    names: tuple[str, ...], test: Callable[[tuple[str, ...]], bool]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Groups of names, as large as pass the test together, and the names that fail it by themselves."""
    if not names:
        return [], []
    if test(names):
        return [names], []
    groups: list[tuple[str, ...]] = []
    rest = []
    for name in names:
        for i, group in enumerate(groups):
            if test((*group, name)):
                groups[i] = (*group, name)
                break
        else:
            if test((name,)):
                groups.append((name,))
            else:
                rest.append(name)
    return groups, rest


def _is_diagonal(density: Density, x: Point, names: tuple[str, ...]) -> bool:
    """Of a constant precision: what stands off the diagonal is nothing but rounding."""
    if _size(x, names) > MAX_LOOKED_AT:
        return False
    with on_numbers():
        found = jax.jit(lambda x: curvature(density, x, Block("gaussian", names))[0])(x)
        scale = jnp.sqrt(jnp.abs(jnp.diagonal(found)))
        off = jnp.abs(found - jnp.diag(jnp.diagonal(found)))
        return bool((off <= 4 * jnp.finfo(found.dtype).eps * scale[:, None] * scale).all())


def _has_no_squares(density: Density, x: Point, name: str) -> bool:
    """Of a Hessian that is constant: whether log p̃ is affine in each unit, the others held."""
    latent, value = density.latents[name], x[name]
    num_units = math.prod(latent.units)
    shape = (num_units, value[0].size // max(num_units, 1))

    def slope(flat: Array) -> Array:
        return density.slope({**x, name: flat.reshape(value.shape)}, (name,))[name].reshape(len(value), -1)

    @jax.jit
    def own(which: Array) -> tuple[Array, Array]:
        """A row of the Hessian: the part of its own unit, and the largest entry."""
        flat = value.reshape(len(value), -1)
        tangent = jnp.zeros_like(flat).at[:, which].set(1)
        row = jax.jvp(slope, (flat,), (tangent,))[1][0]
        return row.reshape(shape)[which // shape[1]], jnp.abs(row).max()

    with on_numbers():
        part, largest = jax.jit(lambda: jax.lax.map(own, jnp.arange(shape[0] * shape[1])))()
        square = part.reshape(num_units, shape[1], shape[1])
        diagonal = jnp.diagonal(square, axis1=1, axis2=2)
        # of a bit the other value is 0; of a one-hot vector it is another entry
        change = diagonal[:, :, None] + diagonal[:, None] - square - square.swapaxes(1, 2)
        change = diagonal if latent.kind == "bits" else change
        return bool((jnp.abs(change) <= 8 * jnp.finfo(square.dtype).eps * largest.max(initial=0.0)).all())


def random_points(rng_key: Array, x: Point, latents: Mapping[str, Latent], spread: Array | np.ndarray) -> Point:
    """Anywhere that the variables may be."""
    found = {}
    with on_numbers():
        # NumPy's generator: JAX's would be compiled for every shape, and that takes longer than all else here
        generator = np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))
        for name, value in x.items():
            latent = latents.get(name)
            if latent is None or latent.kind == "real":
                scale = np.asarray(spread) if latent is None else 1.0
                moved = np.asarray(value) + scale * generator.standard_normal(value.shape)
            else:
                support = np.asarray(latent.support(value.dtype))
                moved = support[generator.integers(len(support), size=(len(value), *latent.units))]
            found[name] = jnp.asarray(moved, value.dtype)
    return found
