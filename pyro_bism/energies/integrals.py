r"""Sums and integrals of exp(log p̃) over some of a point's variables, the others held.

What the energy's structure allows is done in closed form, the rest by enumeration and quadrature:

- a "gaussian" block: :math:`f(a) + \tfrac12 g^\top P^{-1} g + \tfrac d2 \log 2\pi - \tfrac12 \log\det P`, f the log
  density, g its gradient at any a, P minus its Hessian. a is the mode but for rounding, where nothing large cancels;
- an "affine" block: :math:`f(0) + \sum_j \mathrm{softplus}(g_j)` for bits, a log-sum-exp for one-hot vectors;
- other discrete variables: every joint configuration;
- other real variables, up to three: adaptive cubature with an error, see :mod:`.quadrature`.

Only the last is not exact, and is called "quadrature".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from .cells import OutOfReach
from .density import VISIBLE, Block, Density, Point, pack, unpack
from .quadrature import Extended, integrate

MAX_CONFIGURATIONS = 2**20
MAX_ROWS = 2**12  # configurations or grid points, times rows, that are worked on at once
MAX_DIMS = 3
MAX_EVALUATIONS = 2**21  # of the density in a quadrature, all rows and configurations together
MAX_SEEN = 4096  # places at which a quadrature looks first
NOISE = 1e-4  # nats: below, rounding is not spoken of


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
    def over_variables(cls, density: Density, x: Point, over: Sequence[str]) -> "Integral":
        """The cheapest way to take the integral over these variables.

        :param over: the names of the variables in a point that are summed out or integrated over.
        :raises OutOfReach: where there are too many configurations or dimensions; it says which.
        """
        over = tuple(over)
        real = [b for b in density.blocks if b.kind in ("gaussian", "free") and set(b.names) & set(over)]
        gaussian = [b._replace(names=_common(b.names, over)) for b in real if b.kind == "gaussian"]
        affine = [_common(b.names, over) for b in density.blocks if b.kind == "affine"]
        best = max(gaussian, key=lambda b: _size(x, b.names), default=None)
        largest = max(affine, key=lambda names: _count(density, names), default=())
        discrete = _common([name for name in density.latents if density.latents[name].kind != "real"], over)
        variables = tuple(name for b in real for name in _common(b.names, over))

        def plan(gaussian: Block | None, affine: tuple[str, ...]) -> "Integral":
            enumerated = tuple(name for name in discrete if name not in affine)
            rest = tuple(name for name in variables if gaussian is None or name not in gaussian.names)
            return cls(over, gaussian, affine, enumerated, rest, _count(density, enumerated))

        # no closed form takes both: a sum of Gaussian integrals is no longer affine
        plans = [plan(best, ()), plan(None, largest)] if best else [plan(None, largest)]
        able = [p for p in plans if p.num_configurations <= MAX_CONFIGURATIONS and _size(x, p.quadrature) <= MAX_DIMS]
        if not able:
            takes = " or ".join(
                f"{p.num_configurations:.3g} configurations of {named(p.enumerated)} and quadrature in "
                f"{_size(x, p.quadrature)} dimensions"
                for p in plans
            )
            raise OutOfReach(
                f"There is no exact sum over {named(over)}: it takes {takes}; at most {MAX_CONFIGURATIONS:.3g} and "
                f"{MAX_DIMS} are taken. Use ais, or importance sampling from the guide."
            )
        return min(able, key=lambda p: (len(p.quadrature) > 0, p.num_configurations))

    @property
    def method(self) -> str:
        """How it is found: "exact", to rounding, or "quadrature"."""
        return "quadrature" if self.quadrature else "exact"

    @property
    def is_closed(self) -> bool:
        """Whether it is one expression, without a loop."""
        return not self.quadrature and self.num_configurations == 1

    def __call__(self, density: Density, x: Point) -> Tensor:
        """log ∫ of every row, shape (m,). Gradients may go through it, but for quadrature."""
        if self.quadrature:
            return torch.as_tensor(self.estimate(density, x)[0], dtype=x[VISIBLE].dtype)
        return self.summed(density, x)

    @torch.no_grad()
    def estimate(self, density: Density, x: Point, seen: Point | None = None) -> tuple[np.ndarray, np.ndarray]:
        """log ∫ of every row and its error, in double precision: that of the quadrature, and of rounding if it tells.

        :param seen: a point of any number of rows, at which quadrature looks for the mass; None takes x.
        :raises OutOfReach: where quadrature does not settle.
        :raises NoIntegral: where it is infinite, or the density no number.
        """
        if not self.quadrature:
            return self.summed(density, x).double().numpy(), self._rounding(density, x)
        m, names = len(x[VISIBLE]), self.quadrature
        own, others = pack(x, names), pack(x if seen is None else seen, names)
        picks = torch.linspace(0, len(others) - 1, min(len(others), max(1, MAX_SEEN // m))).round().long()
        points = torch.cat([own[None], others[picks][:, None].expand(-1, m, -1)])

        def evaluate(points: np.ndarray) -> np.ndarray:
            parts = []
            for part in torch.as_tensor(points, dtype=own.dtype).split(max(1, MAX_ROWS // m)):
                rows = repeated(x, len(part))
                rows |= unpack(part.reshape(-1, own.shape[1]), rows, names)
                parts.append(self.summed(density, rows).reshape(-1, m))
            return torch.cat(parts).double().numpy()

        f = Extended(evaluate, *_computable(density, x, names))
        rounding = torch.finfo(own.dtype).eps
        budget = max(2**16, MAX_EVALUATIONS // self.num_configurations)
        value, error = integrate(f, points.double().numpy(), named(names), rounding, budget)
        outside = np.exp(np.minimum(f.highest - value, 0.0))
        # a line's slope is known to about so much, and the tail goes on for long
        return value, error + 1000 * math.sqrt(rounding) * np.where(outside < 1e-9, 0.0, outside)

    def _rounding(self, density: Density, x: Point) -> np.ndarray:
        """By how much log p̃ differs if real variables differ in their last digit; 0 where it is next to nothing."""
        if x[VISIBLE].dtype == torch.float64:  # sums of 1e11 have that much left
            return np.zeros(len(x[VISIBLE]))
        real = [name for name in x if name == VISIBLE or density.latents[name].kind == "real"]
        if self.gaussian is not None:
            x = _at_mode(density, x, self.gaussian)
        here = density.log_prob(x)
        noise = torch.zeros_like(here)
        for sign in (-2, -1, 1, 2):
            factor = 1 + sign * torch.finfo(here.dtype).eps
            there = density.log_prob({**x, **{name: x[name] * factor for name in real}})
            noise = torch.maximum(noise, (there - here).abs())
        return torch.where(noise > NOISE, 3 * noise, 0.0).double().numpy()

    def summed(self, density: Density, x: Point) -> Tensor:
        """All of it but the quadrature: the integral at these values of its variables."""
        m = len(x[VISIBLE])
        total = self.num_configurations
        if total == 1:
            return self._closed(density, x)
        chunk = max(1, min(total, MAX_ROWS // m))
        parts = []
        for numbers in torch.arange(total).split(chunk):
            rows = repeated(x, len(numbers))
            rows |= configurations(density, self.enumerated, numbers.repeat_interleave(m), x)
            parts.append(self._closed(density, rows).reshape(-1, m).logsumexp(0))
        return torch.stack(parts).logsumexp(0)

    def _closed(self, density: Density, x: Point) -> Tensor:
        if self.gaussian is not None:
            return _gaussian(density, x, self.gaussian)
        return _affine(density, x, self.affine)


def configurations(density: Density, names: Sequence[str], which: Tensor, x: Point) -> Point:
    """The joint configurations of these discrete sites with the given numbers, one a row."""
    found: Point = {}
    for name in names:
        latent = density.latents[name]
        support = latent.support(x[name].dtype)
        digits = []
        for _ in range(math.prod(latent.units)):
            digits.append(which % len(support))
            which = which // len(support)
        picks = torch.stack(digits, -1) if digits else which.new_zeros(len(which), 0)
        found[name] = support[picks.reshape(len(which), *latent.units)]
    return found


def _affine(density: Density, x: Point, names: tuple[str, ...]) -> Tensor:
    if not names:
        return density.log_prob(x)
    zero = {**x, **{name: torch.zeros_like(x[name]) for name in names}}
    value, logits = density.value_and_slope(zero, names)
    for name in names:
        g = logits[name]
        each = softplus(g) if density.latents[name].kind == "bits" else g.logsumexp(-1)
        value = value + each.reshape(len(each), -1).sum(-1)
    return value


@torch.no_grad()
def _at_mode(density: Density, x: Point, block: Block) -> Point:
    """One Newton step, for a log density quadratic in the block; data far from the mode cost all digits there."""
    precision = density.precision(x, block)
    g = pack(density.slope(x, block.names), block.names)
    if block.is_diagonal:
        step = g / precision
    else:
        factor, _ = torch.linalg.cholesky_ex(precision)
        step = torch.cholesky_solve(g[..., None] if factor.ndim == 3 else g.T, factor)
        step = step[..., 0] if factor.ndim == 3 else step.T
    # where there is none, the integral is refused below: it needs a number at which to look
    moved = pack(x, block.names) + torch.where(step.isfinite(), step, 0.0)
    return {**x, **unpack(moved, x, block.names)}


def _gaussian(density: Density, x: Point, block: Block) -> Tensor:
    x = _at_mode(density, x, block)
    precision = density.precision(x, block)
    value, slope = density.value_and_slope(x, block.names)
    g = pack(slope, block.names)
    d = g.shape[-1]
    # NaN for a precision that is not positive definite, also where only rounding makes it so: there is no integral
    if block.is_diagonal:
        quadratic, logdet = (g**2 / precision).sum(-1), precision.log().sum(-1)
        failed = (precision <= 0).any(-1)
    else:
        factor, info = torch.linalg.cholesky_ex(precision)
        whitened = torch.linalg.solve_triangular(factor, g.T if factor.ndim == 2 else g[..., None], upper=False)
        quadratic = (whitened.T if factor.ndim == 2 else whitened[..., 0]).square().sum(-1)
        pivots = factor.diagonal(dim1=-2, dim2=-1)
        logdet = 2 * pivots.log().sum(-1)
        lost = 8 * math.sqrt(d) * torch.finfo(pivots.dtype).eps * precision.diagonal(dim1=-2, dim2=-1)
        failed = (info > 0) | (pivots.square() < lost).any(-1)
    logdet = torch.where(failed, torch.nan, logdet)
    return value + 0.5 * quadratic + 0.5 * d * math.log(2 * math.pi) - 0.5 * logdet


def repeated(x: Point, num: int) -> Point:
    """A point's rows, num times over."""
    return {name: value.repeat(num, *[1] * (value.ndim - 1)) for name, value in x.items()}


def _computable(density: Density, x: Point, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The box, in the reals, in which the number type tells these variables' constrained values apart; (d,) each."""
    low, high = [], []
    steps = 0.5 * 1.02 ** torch.arange(400, dtype=x[VISIBLE].dtype)  # to 1,350
    for name in names:
        size = math.prod(x[name].shape[1:])
        edges = []
        for sign in (-1, 1):
            edge = torch.full((size,), math.inf)
            if name != VISIBLE:
                transform = density.latents[name].transform
                u = (sign * steps).reshape(-1, *[1] * x[name].ndim).expand(-1, 1, *x[name].shape[1:])
                back = transform.inv(transform(u))
                tolerance = math.sqrt(torch.finfo(u.dtype).eps)
                lost = ~((back - u).abs() <= tolerance * (1 + u.abs()))
                lost = lost.any(1).reshape(len(steps), size)
                first = torch.where(lost.any(0), lost.int().argmax(0), len(steps))
                edge = torch.where(first < len(steps), steps[(first - 1).clamp(0, len(steps) - 1)], math.inf)
            edges.append(sign * edge.double().numpy())
        low.append(edges[0])
        high.append(edges[1])
    return np.concatenate(low), np.concatenate(high)


def _common(names: Sequence[str], over: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name in over)


def _size(x: Point, names: Sequence[str]) -> int:
    return sum(math.prod(x[name].shape[1:]) for name in names)


def _count(density: Density, names: Sequence[str]) -> int:
    return math.prod(density.latents[name].num_values ** math.prod(density.latents[name].units) for name in names)


def named(names: Sequence[str]) -> str:
    return ", ".join("the visible values" if name == VISIBLE else f"'{name}'" for name in names) or "nothing"
