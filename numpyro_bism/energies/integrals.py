r"""Sums and integrals of exp(log p̃) over some of a point's variables, the others held.

What the energy's structure allows is done in closed form, the rest by enumeration and quadrature:

- a "gaussian" block: :math:`f(a) + \tfrac12 g^\top P^{-1} g + \tfrac d2 \log 2\pi - \tfrac12 \log\det P`, f the log
  density, g its gradient at any a, P minus its Hessian;
- an "affine" block: :math:`f(0) + \sum_j \mathrm{softplus}(g_j)` for bits, a log-sum-exp for one-hot vectors;
- other discrete variables: every joint configuration;
- other real variables, few of them: the trapezoid rule, whose error falls exponentially for smooth integrands. It is
  refined until it stands still.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .density import VISIBLE, Block, Density, Point, pack, unpack

MAX_CONFIGURATIONS = 2**20
MAX_ROWS = 2**12  # configurations or grid points, times rows, that are worked on at once
MAX_DIMS = 3
NUM_NODES = 33


@dataclass(frozen=True)
class Integral:
    """How the integral over ``over`` is taken.

    :ivar gaussian: the block, cut to ``over``, that is integrated in closed form.
    :ivar affine: the block that is summed in closed form.
    :ivar enumerated: sites whose joint configurations are enumerated.
    :ivar quadrature: variables taken by quadrature.
    """

    over: tuple[str, ...]
    gaussian: Block | None
    affine: tuple[str, ...]
    enumerated: tuple[str, ...]
    quadrature: tuple[str, ...]
    num_configurations: int

    @classmethod
    def of(cls, density: Density, x: Point, over: Sequence[str]) -> "Integral":
        """:raises ValueError: where there are too many configurations or dimensions; it says which."""
        over = tuple(over)
        real = [b for b in density.blocks if b.kind in ("gaussian", "free") and set(b.names) & set(over)]
        gaussian = [b._replace(names=_common(b.names, over)) for b in real if b.kind == "gaussian"]
        affine = [_common(b.names, over) for b in density.blocks if b.kind == "affine"]
        best = max(gaussian, key=lambda b: _size(x, b.names), default=None)
        largest = max(affine, key=lambda names: _count(density, names), default=())
        discrete = _common([name for name in density.latents if density.latents[name].kind != "real"], over)
        variables = tuple(name for b in real for name in _common(b.names, over))

        def plan(gaussian, affine):
            enumerated = tuple(name for name in discrete if name not in affine)
            rest = tuple(name for name in variables if gaussian is None or name not in gaussian.names)
            return cls(over, gaussian, affine, enumerated, rest, _count(density, enumerated))

        # no closed form takes both: a sum of Gaussian integrals is no longer affine
        plans = [plan(best, ()), plan(None, largest)] if best else [plan(None, largest)]
        able = [p for p in plans if p.num_configurations <= MAX_CONFIGURATIONS and _size(x, p.quadrature) <= MAX_DIMS]
        if not able:
            takes = " or ".join(
                f"{p.num_configurations:.3g} configurations of {_named(p.enumerated)} and quadrature in "
                f"{_size(x, p.quadrature)} dimensions"
                for p in plans
            )
            raise ValueError(
                f"There is no exact sum over {_named(over)}: it takes {takes}; at most {MAX_CONFIGURATIONS:.3g} and "
                f"{MAX_DIMS} are taken. Use ais, or importance sampling from the guide."
            )
        return min(able, key=lambda p: (len(p.quadrature) > 0, p.num_configurations))

    @property
    def is_closed(self) -> bool:
        """Whether it is one expression, without a loop."""
        return not self.quadrature and self.num_configurations == 1

    def __call__(self, density: Density, x: Point) -> Array:
        """log ∫ of every row, shape (m,). Compiled programs and gradients may go through it, but for quadrature."""
        if self.quadrature:
            return _trapezoid(self, density, x)
        return self.summed(density, x)

    def summed(self, density: Density, x: Point) -> Array:
        """All of it but the quadrature: the integral at these values of its variables."""
        m = len(x[VISIBLE])
        total = self.num_configurations
        if total == 1:
            return self._closed(density, x)
        chunk = max(1, min(total, MAX_ROWS // m))

        def step(carry, start):
            numbers = start + jnp.arange(chunk)
            rows = repeated(x, chunk)
            which = jnp.repeat(jnp.minimum(numbers, total - 1), m)
            rows |= configurations(density, self.enumerated, which, x)
            value = self._closed(density, rows).reshape(chunk, m)
            value = jnp.where((numbers < total)[:, None], value, -jnp.inf)
            return jnp.logaddexp(carry, jax.nn.logsumexp(value, 0)), None

        start = jnp.full(m, -jnp.inf, x[VISIBLE].dtype)
        return jax.lax.scan(step, start, jnp.arange(0, total, chunk))[0]

    def _closed(self, density: Density, x: Point) -> Array:
        if self.gaussian is not None:
            return _gaussian(density, x, self.gaussian)
        return _affine(density, x, self.affine)


def configurations(density: Density, names: Sequence[str], which: Array, x: Point) -> Point:
    """The joint configurations of these discrete sites with the given numbers, one a row."""
    found: Point = {}
    for name in names:
        latent = density.latents[name]
        support = latent.support(x[name].dtype)
        digits = []
        for _ in range(math.prod(latent.units)):
            digits.append(which % len(support))
            which = which // len(support)
        picks = jnp.stack(digits, -1) if digits else jnp.zeros((len(which), 0), int)
        found[name] = support[picks.reshape(len(which), *latent.units)]
    return found


def _affine(density: Density, x: Point, names: tuple[str, ...]) -> Array:
    if not names:
        return density.log_prob(x)
    zero = {**x, **{name: jnp.zeros_like(x[name]) for name in names}}
    value, logits = density.value_and_slope(zero, names)
    for name in names:
        g = logits[name]
        each = jax.nn.softplus(g) if density.latents[name].kind == "bits" else jax.nn.logsumexp(g, -1)
        value += each.reshape(len(each), -1).sum(-1)
    return value


def _gaussian(density: Density, x: Point, block: Block) -> Array:
    precision = density.precision(x, block)
    g = pack(density.slope(x, block.names), block.names)
    d = g.shape[-1]
    # NaN for a precision that is not positive definite: there is no integral
    if block.is_diagonal:
        quadratic, logdet = (g**2 / precision).sum(-1), jnp.log(precision).sum(-1)
    else:
        factor = jnp.linalg.cholesky(precision)
        whitened = jax.scipy.linalg.solve_triangular(
            jnp.broadcast_to(factor, (len(g), d, d)) if factor.ndim == 3 else factor,
            g[..., None] if factor.ndim == 3 else g.T,
            lower=True,
        )
        whitened = whitened[..., 0] if factor.ndim == 3 else whitened.T
        quadratic = (whitened**2).sum(-1)
        logdet = 2 * jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)).sum(-1)
    return density.log_prob(x) + 0.5 * quadratic + 0.5 * d * math.log(2 * math.pi) - 0.5 * logdet


def repeated(x: Point, num: int) -> Point:
    """A point's rows, num times over."""
    return {name: jnp.tile(value, (num,) + (1,) * (value.ndim - 1)) for name, value in x.items()}


def _trapezoid(integral: Integral, density: Density, x: Point) -> Array:
    """The trapezoid rule on a box a row, found by looking where the integrand is."""
    names = integral.quadrature
    centre = pack(x, names)
    m, d = centre.shape
    nodes = np.stack(np.meshgrid(*[np.arange(NUM_NODES)] * d, indexing="ij"), -1).reshape(-1, d)

    @jax.jit
    def evaluate(x, low, high, unit):
        """The log integrand at fractions ``unit`` of the way from low to high; (len(unit), m)."""
        chunk = max(1, MAX_ROWS // m)
        padded = -(-len(unit) // chunk) * chunk

        def part(unit):
            flat = low + unit[:, None] * (high - low)
            rows = repeated(x, chunk)
            rows |= unpack(flat.reshape(-1, d), rows, names)
            return integral.summed(density, rows).reshape(chunk, m)

        unit = jnp.concatenate([unit, jnp.zeros((padded - len(unit), d), unit.dtype)])
        return jax.lax.map(part, unit.reshape(-1, chunk, d)).reshape(padded, m)

    def grid(low, high, num):
        unit = nodes_of(num) / (num - 1)
        found = evaluate(x, low, high, jnp.asarray(unit, centre.dtype))[: len(unit)]
        return np.asarray(found, float), unit

    def nodes_of(num):
        if num == NUM_NODES:
            return nodes
        return np.stack(np.meshgrid(*[np.arange(num)] * d, indexing="ij"), -1).reshape(-1, d)

    def total(value, low, high, num):
        return np.logaddexp.reduce(value, 0) + np.log((high - low) / (num - 1)).sum(-1)

    low, high = np.asarray(centre) - 100.0, np.asarray(centre) + 100.0
    for _ in range(60):
        value, unit = grid(low, high, NUM_NODES)
        if not np.isfinite(value.max(0)).all():
            raise ValueError(f"The log density is not finite where {_named(names)} is integrated.")
        alive = value > value.max(0) - 60.0
        width = (high - low) / (NUM_NODES - 1)
        points = low + unit[:, None] * (high - low)
        new_low = np.where(alive[..., None], points, np.inf).min(0) - width
        new_high = np.where(alive[..., None], points, -np.inf).max(0) + width
        # where it is alive at the edge, nobody knows how far it goes
        new_low = np.where((alive[..., None] & (unit == 0)[:, None]).any(0), 2 * low - high, new_low)
        new_high = np.where((alive[..., None] & (unit == 1)[:, None]).any(0), 2 * high - low, new_high)
        if np.abs(np.concatenate([new_low, new_high])).max() > 1e8:
            raise ValueError(
                f"The density does not fall off fast enough where {_named(names)} is large: it has no normaliser, or "
                "tails too heavy for quadrature."
            )
        # a factor of two either way is no gain
        settled = (new_high - new_low <= 1.01 * (high - low)).all() and (
            (new_high - new_low) >= 0.7 * (high - low)
        ).all()
        low, high = new_low, new_high
        if settled:
            break
    else:
        raise ValueError(f"There is no telling where {_named(names)} has its mass: the density is too rough. Use ais.")
    num, before = NUM_NODES, None
    while num**d <= 2**21:
        value, _ = grid(low, high, num)
        now = total(value, low, high, num)
        if before is not None and np.abs(now - before).max() < 1e-6 * max(1.0, np.abs(now).max()):
            return jnp.asarray(now, centre.dtype)
        before, num = now, 2 * num - 1
    raise ValueError(
        f"Quadrature over {_named(names)} does not settle with {num} points a dimension: the density is too rough. "
        "Use ais."
    )


def _common(names: Sequence[str], over: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name in over)


def _size(x: Point, names: Sequence[str]) -> int:
    return sum(math.prod(x[name].shape[1:]) for name in names)


def _count(density: Density, names: Sequence[str]) -> int:
    return math.prod(density.latents[name].num_values ** math.prod(density.latents[name].units) for name in names)


def _named(names: Sequence[str]) -> str:
    return ", ".join("the visible values" if name == VISIBLE else f"'{name}'" for name in names) or "nothing"
