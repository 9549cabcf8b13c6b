"""Which variables of an energy have conditionals in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .density import MAX_FULL, VISIBLE, Block, Density, Latent, Point, close, pack, replaced, unpack

if TYPE_CHECKING:
    from .energy import Energy

NUM_TRIALS = 3


def find_blocks(
    energy: Energy, params: Mapping[str, Any], x: Point, rng_key: Array, moving: Sequence[str]
) -> tuple[Block, ...]:
    density = Density(lambda x: energy.log_joint(params, x), energy, (), {})
    if energy.resizes:
        x = jax.tree.map(lambda a: a[:16], x)
    spread = jnp.std(energy.batch.v[:, : x[VISIBLE].shape[1]], 0) + 1e-3
    keys = jax.random.split(rng_key, 2 * NUM_TRIALS)
    moved = [random_points(key, x, energy.latents, spread) for key in keys]
    pairs = tuple(jax.tree.map(lambda *a: np.stack(a), *points) for points in (moved[::2], moved[1::2]))

    @partial(jax.jit, static_argnums=0)
    def affine(names, pairs):
        """f(b) - f(a) = f'(a) (b - a), and f'(b) = f'(a), as b differs from a in these names."""

        def trial(pair):
            a, b = pair
            b = {**a, **{name: b[name] for name in names}}
            at_a, at_b = (pack(density.slope(u, names), names) for u in (a, b))
            change = (at_a * (pack(b, names) - pack(a, names))).sum(-1)
            f = density.log_prob(a)
            return close(at_a, at_b) & close(density.log_prob(b), f + change, jnp.abs(f).max())

        return jax.lax.map(trial, pairs).all()

    @partial(jax.jit, static_argnums=0)
    def quadratic(names, pairs):
        """f'(a + d) + f'(a - d) = 2 f'(a), f(a + d) - f(a - d) = 2 f'(a) d; and what the curvature is like."""
        first = jax.tree.map(lambda a: a[0, :1], pairs)
        tangent = pack(first[1], names) - pack(first[0], names)

        def trial(pair):
            a, b = pair
            flat, d = pack(a, names), pack(b, names) - pack(a, names)

            def at(flat):
                return {**a, **unpack(flat, a, names)}

            def slope(flat):
                return pack(density.slope(at(flat), names), names)

            middle, up, down = slope(flat), slope(flat + d), slope(flat - d)
            good = close(0.5 * (up + down), middle, jnp.abs(up).max())
            rise, expected = density.log_prob(at(flat + d)) - density.log_prob(at(flat - d)), 2 * (middle * d).sum(-1)
            good &= close(rise, expected, jnp.abs(density.log_prob(at(flat + d))).max())
            rows = jnp.broadcast_to(tangent, flat.shape)
            product = jax.jvp(slope, (flat,), (rows,))[1]
            return good, product, jax.jvp(slope, (flat,), (jnp.ones_like(flat),))[1] * rows

        good, product, diagonal = jax.lax.map(trial, pairs)
        return good.all(), close(product, product[:1, :1]), close(product, diagonal)

    blocks = []
    kinds = {name: energy.latents[name].kind for name in moving if name in energy.latents}
    real = [VISIBLE] if VISIBLE in moving and x[VISIBLE].shape[1] else []
    real += [name for name, kind in kinds.items() if kind == "real"]
    seen: dict[tuple[str, ...], tuple[bool, bool]] = {}

    def is_gaussian(names):
        good, constant, diagonal = (bool(z) for z in quadratic(names, pairs))
        seen[names] = constant, diagonal
        return good and (constant or diagonal or pack(x, names).shape[1] <= MAX_FULL)

    groups, rest = _partition(tuple(real), is_gaussian)
    blocks += [Block("gaussian", names, *seen[names]) for names in groups]
    blocks += [Block("free", (name,)) for name in rest]
    soft = tuple(name for name, kind in kinds.items() if kind in ("bits", "onehot"))
    groups, rest = _partition(soft, lambda names: bool(affine(names, pairs)))
    blocks += [Block("affine", names) for names in groups]
    for name in rest:
        multilinear = is_multilinear(rng_key, density.log_prob, x, energy.latents, name)
        blocks.append(Block("units", (name,), is_multilinear=multilinear))
    blocks += [Block("units", (name,)) for name, kind in kinds.items() if kind == "labels"]
    return tuple(blocks)


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


def random_points(rng_key: Array, x: Point, latents: Mapping[str, Latent], spread: Array) -> Point:
    """Anywhere that the variables may be."""
    found = {}
    with jax.ensure_compile_time_eval():
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


def is_multilinear(
    rng_key: Array, log_prob: Callable[[Point], Array], seen: Point, latents: Mapping[str, Latent], name: str
) -> bool:
    """f(b) - f(a) = f'(a) (b - a) as b differs from a in a single unit, for every unit."""

    @jax.jit
    def trial(a, b):
        latent, f = latents[name], log_prob(a)
        slope = jax.grad(lambda value: log_prob({**a, name: value}).sum())(a[name])
        others = b[name].reshape(len(f), -1, *b[name].shape[1 + len(latent.units) :])

        def of(unit):
            other = replaced(a[name], latent, unit, others[:, unit])
            expected = (slope * (other - a[name])).reshape(len(f), -1).sum(-1)
            return close(log_prob({**a, name: other}), f + expected, jnp.abs(f).max())

        return jax.lax.map(of, jnp.arange(others.shape[1])).all()

    return bool(trial(*(random_points(key, seen, latents, jnp.ones(())) for key in jax.random.split(rng_key))))
