"""A log density of points, row by row: its variables, its blocks, gradients and curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

if TYPE_CHECKING:
    from .energy import Energy

Point = dict[str, Array]

VISIBLE = "(visible)"  # the visible values' name in a point: no site of a program is called so
MAX_FULL = 64  # a precision that differs from row to row is kept for at most so many variables


@dataclass(frozen=True)
class Latent:
    """One latent site of the model.

    :ivar shape: of its value for one example.
    :ivar kind: "bits", "onehot", "labels" (any other enumerable support) or "real".
    :ivar values: of "labels": the support, one value a row.
    :ivar transform: of "real": from the reals to its support.
    :ivar unconstrained: of "real": the shape of one example's value in the reals.
    :ivar fn: the distribution that declares it.
    """

    shape: tuple[int, ...]
    kind: str
    values: Any = None
    transform: Any = None
    unconstrained: tuple[int, ...] = ()
    fn: Any = None

    @property
    def num_values(self) -> int:
        """How many values one unit takes."""
        return {"bits": 2, "onehot": self.shape[-1] if self.shape else 1}.get(self.kind) or len(self.values)

    @property
    def units(self) -> tuple[int, ...]:
        """The shape in which its units stand."""
        if self.kind == "labels":
            return self.shape[: len(self.shape) - (self.values.ndim - 1)]
        return self.shape[:-1] if self.kind == "onehot" else self.shape

    def support(self, dtype: Any) -> Array:
        """The values of one unit, one a row."""
        if self.kind == "bits":
            return jnp.arange(2, dtype=dtype)
        return jnp.eye(self.shape[-1], dtype=dtype) if self.kind == "onehot" else self.values


class Block(NamedTuple):
    """Variables that are drawn, summed or integrated together, given all others.

    :ivar is_constant: of "gaussian": whether the precision is one for all rows and all values of the rest.
    :ivar is_diagonal: of "gaussian": whether its precision is.
    :ivar is_multilinear: of "units": whether the energy is affine in each bit or one-hot vector, the others held.
    :ivar is_declared: whether the user says so, and no proof: it is checked wherever it is made use of.
    """

    kind: str
    names: tuple[str, ...]
    is_constant: bool = False
    is_diagonal: bool = False
    is_multilinear: bool = False
    is_declared: bool = False


@dataclass(frozen=True)
class Density:
    """An unnormalised log density of points, row by row.

    :ivar log_prob: of a point with m rows, shape (m,); any m.
    :ivar energy: whose variables these are.
    :ivar blocks: what moves, in parts; all else stands still.
    :ivar precisions: constant ones of "gaussian" blocks, by the block's names: shape (d, d), or (d,) if diagonal.
    :ivar masks: by name, the entries that move where only some do, of the shape of the variable.
    """

    log_prob: Callable[[Point], Array]
    energy: Energy
    blocks: tuple[Block, ...]
    precisions: Mapping[tuple[str, ...], Array]
    masks: Mapping[str, Array] = field(default_factory=dict)

    @property
    def latents(self) -> Mapping[str, Latent]:
        """By site."""
        return self.energy.latents

    def moving(self, masks: Mapping[str, Any]) -> Density:
        """The same, but only these variables move: those whose mask is True, and of others the entries where it is."""
        blocks = []
        for block in self.blocks:
            names = tuple(name for name in block.names if name in masks)
            if names:
                blocks.append(block._replace(names=names))
        precisions = {b.names: self.part(b) for b in blocks if b.kind == "gaussian" and b.is_constant}
        partial = {name: mask for name, mask in masks.items() if mask is not True}
        return replace(self, blocks=tuple(blocks), precisions=precisions, masks=partial)

    def part(self, block: Block) -> Array:
        """The constant precision of a "gaussian" block, or of some variables of one."""
        whole = next(names for names in self.precisions if set(block.names) <= set(names))
        precision = self.precisions[whole]
        if whole == block.names:
            return precision
        sizes = [self.energy.size(name) for name in whole]
        edges = np.cumsum([0, *sizes])
        kept = np.concatenate([np.arange(edges[i], edges[i + 1]) for i, n in enumerate(whole) if n in block.names])
        return precision[kept] if block.is_diagonal else precision[np.ix_(kept, kept)]

    def slope(self, x: Point, names: Sequence[str]) -> Point:
        """The gradient of every row's log density in these variables."""
        return self.value_and_slope(x, names)[1]

    def value_and_slope(self, x: Point, names: Sequence[str]) -> tuple[Array, Point]:
        """Every row's log density and its gradient in these variables.

        Discrete ones that the user says to be affine have a gradient of NaN in the rows where they are not.
        """
        value, slopes = value_and_slope(self.log_prob, x, names)
        for block in self.blocks:
            said = [name for name in block.names if name in names] if block.is_declared else []
            if said and block.kind == "affine":
                good = is_affine(self, x, said)
                slopes |= {name: _poisoned(slopes[name], good) for name in said}
        return value, slopes

    def precision(self, x: Point, block: Block) -> Array:
        """Of a "gaussian" block, or of a part of one, at x: shape (d, d) or (m, d, d); (d,) or (m, d) if diagonal.

        Where the user says that a block is "gaussian" and it is not, it is NaN.
        """
        if block.is_constant:
            return self.part(block)
        found = curvature(self, x, block)
        return _poisoned(found, is_quadratic(self, x, block, found)) if block.is_declared else found

    def holds(self, x: Point, block: Block) -> Array:
        """Whether a block is what the user says, in every row at x: shape (m,)."""
        if block.kind == "affine":
            return is_affine(self, x, block.names)
        return is_quadratic(self, x, block, curvature(self, x, block))

    def mixed(self, other: Density, weight: float | Array) -> Density:
        """(1 - weight) · self + weight · other, in logarithms; ``other``'s blocks serve for both.

        :param other: of the same variables. self is a product of Gaussians and coins, which any block allows.
        """

        def log_prob(x: Point) -> Array:
            return (1 - weight) * self.log_prob(x) + weight * other.log_prob(x)

        def precision(block: Block) -> Array:
            a, b = self.precisions[block.names], other.precisions[block.names]
            if a.ndim < b.ndim:
                a = jnp.diag(a)
            return (1 - weight) * a + weight * b

        constant = [block for block in other.blocks if block.names in other.precisions]
        return replace(other, log_prob=log_prob, precisions={block.names: precision(block) for block in constant})


def pack(x: Point, names: Sequence[str]) -> Array:
    """These variables side by side, shape (m, d)."""
    parts = [x[name].reshape(len(x[name]), math.prod(x[name].shape[1:])) for name in names]
    return jnp.concatenate(parts, -1)


def unpack(flat: Array, like: Point, names: Sequence[str]) -> Point:
    """The inverse of :func:`pack`."""
    found, start = {}, 0
    for name in names:
        size = math.prod(like[name].shape[1:])
        found[name] = flat[:, start : start + size].reshape(len(flat), *like[name].shape[1:])
        start += size
    return found


def value_and_slope(
    log_prob: Callable[[Point], Array], x: Point, names: Sequence[str]
) -> tuple[Array, dict[str, Array]]:
    """Every row's value and its gradient in these variables."""

    def total(part: Point) -> tuple[Array, Array]:
        value = log_prob({**x, **part})
        return value.sum(), value

    slopes, value = jax.grad(total, has_aux=True)({name: x[name] for name in names})
    return value, slopes


def is_quadratic(density: Density, x: Point, block: Block, precision: Array) -> Array:
    r"""Whether a log density with this curvature at x is the Gaussian that it says, in every row: shape (m,).

    At the mode :math:`m = x + P^{-1} \nabla f` and three standard deviations off it, to both sides, value, gradient and
    curvature are those of :math:`f(m) - \tfrac12 (x - m)^\top P (x - m)`.
    """
    names, flat = block.names, pack(x, block.names)
    tolerance = float(jnp.finfo(flat.dtype).eps) ** (2 / 3)
    factor = jnp.linalg.cholesky(precision)

    def at(flat: Array) -> tuple[Array, Array, Point]:
        y = {**x, **unpack(flat, x, names)}
        value, slopes = value_and_slope(density.log_prob, y, names)
        # the gradient in units of its own standard deviation
        return value, solve(pack(slopes, names), 0), y

    def solve(g: Array, trans: int) -> Array:
        return jax.scipy.linalg.solve_triangular(factor, g[..., None], lower=True, trans=trans)[..., 0]

    value, g, _ = at(flat)
    mode = flat + solve(g, 1)
    top = value + 0.5 * (g**2).sum(-1)
    z = 3.0 * np.where(np.arange(flat.shape[1]) % 2, -1.0, 1.0)
    away = solve(jnp.broadcast_to(z, flat.shape).astype(flat.dtype), 1)
    low = top - 0.5 * (z**2).sum()
    scale = 1 + jnp.abs(top) + jnp.abs(low) + jnp.abs(value)
    good = jnp.isfinite(value)
    for place, expected, slope in ((mode, top, 0.0), (mode + away, low, -z), (mode - away, low, z)):
        value, g, y = at(place)
        good &= jnp.abs(value - expected) <= tolerance * scale
        good &= (jnp.abs(g - slope) <= tolerance * scale[:, None]).all(-1)
        off = jnp.abs(curvature(density, y, block) - precision).max((-2, -1))
        good &= off <= tolerance * jnp.abs(precision).max((-2, -1))
    return good


def is_affine(density: Density, x: Point, names: Sequence[str]) -> Array:
    """Whether a log density is affine in bits and one-hot vectors, in every row: shape (m,).

    Looked at where all bits are off, where all are on, and at values of theirs at random.
    """
    generator = np.random.default_rng(0)
    m, dtype = len(x[names[0]]), x[names[0]].dtype
    tolerance = float(jnp.finfo(dtype).eps) ** (2 / 3)

    def at(pick: Callable[[int, tuple[int, ...]], np.ndarray]) -> tuple[Array, Array, Array]:
        found = {}
        for name in names:
            latent = density.latents[name]
            support = latent.support(dtype)
            found[name] = support[pick(len(support), (m, *latent.units))]
        value, slopes = value_and_slope(density.log_prob, {**x, **found}, names)
        return value, pack(slopes, names), pack(found, names)

    def first(num: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape, int)

    def last(num: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.full(shape, num - 1)

    def random(num: int, shape: tuple[int, ...]) -> np.ndarray:
        return generator.integers(num, size=shape)

    value, g, b = at(first)
    good = jnp.isfinite(value)
    for pick in (last, random, random):
        there, slope, c = at(pick)
        expected = value + (g * (c - b)).sum(-1)
        good &= jnp.abs(there - expected) <= tolerance * (1 + jnp.abs(there) + jnp.abs(value))
        good &= (jnp.abs(slope - g) <= tolerance * (1 + jnp.abs(g).max(-1, keepdims=True))).all(-1)
    return good


def _poisoned(values: Array, good: Array) -> Array:
    """NaN in the rows that are not good: what is made of them is no number."""
    return jnp.where(good.reshape(-1, *[1] * (values.ndim - 1)), values, jnp.nan)


def curvature(density: Density, x: Point, block: Block) -> Array:
    """Minus the Hessian of the log density in a block's variables, or its diagonal, for every row."""
    flat = pack(x, block.names)

    def slope(flat: Array) -> Array:
        y = {**x, **unpack(flat, x, block.names)}
        return pack(value_and_slope(density.log_prob, y, block.names)[1], block.names)

    def product(tangent: Array) -> Array:
        change: Array = jax.jvp(slope, (flat,), (jnp.broadcast_to(tangent, flat.shape),))[1]
        return -change

    if block.is_diagonal:
        return product(jnp.ones_like(flat))
    # one row of the matrix at a time: all at once they may not fit in memory
    return jnp.moveaxis(jax.lax.map(product, jnp.eye(flat.shape[1], dtype=flat.dtype)), 0, 1)


def close(a: Array, b: Array, scale: Any = None) -> Array:
    """Whether two arrays agree to half of their digits, beside the largest number in them."""
    tolerance = math.sqrt(float(jnp.finfo(a.dtype).eps))
    scale = jnp.abs(b).max(initial=0.0) if scale is None else scale
    return jnp.all(jnp.abs(a - b) <= tolerance * (scale + jnp.abs(b)))  # NaN is not


def random_labels(rng_key: Array, latent: Latent, m: int, dtype: Any) -> Array:
    """Values of a discrete site, all as likely, for m rows."""
    support = latent.support(dtype)
    return support[jax.random.randint(rng_key, (m, *latent.units), 0, len(support))]


def replaced(value: Array, latent: Latent, unit: Any, new: Array) -> Array:
    """A site's value with one unit, counted in order, at another value: one for all rows, or one for each."""
    flat = value.reshape(len(value), -1, *value.shape[1 + len(latent.units) :])
    return flat.at[:, unit].set(new).reshape(value.shape)
