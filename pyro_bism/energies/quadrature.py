r"""Integrals of exp(f) over up to three real variables, for many functions f at once, with an error.

It stands in both packages to the letter. Of f nothing is known but points near which its mass may be:

1. Rays from these points, at distances from tiny to astronomic, find where f is high, how wide it is there, and how it
   falls off. Hence coordinates :math:`u = \mu + L \sinh t`: μ where f is highest, L from its curvature. A tail
   of any power law falls exponentially in t, and one that does not fall has no integral.
2. Boxes in t, split where the Gauss-Legendre rule on a box and on its 2^d parts differ, and wherever a point is known
   at which f is higher than the box's nodes say: modes far apart, however narrow, are not stepped over.
3. The error is the sum of these differences, the tails beyond the last box, and the rounding of f.
"""

import math
from typing import Any

import numpy as np

from .cells import ALIVE, FARTHEST, NUM_BOXES, Cells, Cubature, Function, NoIntegral, SinhMap, checked, products_of

TOLERANCE = {1: 1e-9, 2: 1e-7, 3: 1e-6}  # of the differences that are left; the error of the finer rule is far below
MAX_STARTS = 12
MAX_CLIMBS = 12


class Extended:
    """f, continued along straight lines beyond the box in which it can be computed.

    A constrained variable's density falls or rises as a power at the edge of its support, which is a straight line in
    the reals; near the edge the number type holds only the edge itself.

    :ivar highest: that it was found to be out there, by function.
    """

    def __init__(self, f: Function, low: np.ndarray, high: np.ndarray):
        self.f, self.low, self.high = f, low, high
        self.highest: Any = -np.inf

    def __call__(self, points: np.ndarray) -> np.ndarray:
        held = np.clip(points, self.low, self.high)
        value, out = self.f(held), (held != points).any(-1)
        if out.any():
            step = points - held
            length = np.sqrt((step**2).sum(-1))
            inner = held - step / np.where(out, length, 1.0)[..., None]
            with np.errstate(invalid="ignore", over="ignore"):
                beyond = value + (value - self.f(inner)) * length
            value = np.where(out & ~np.isneginf(value), beyond, value)
            self.highest = np.maximum(self.highest, np.where(out & ~np.isnan(value), value, -np.inf).max(0))
        return value


def integrate(f: Function, points: np.ndarray, what: str, rounding: float, budget: int) -> Cubature:
    """log ∫ exp f(u) du of m functions.

    :param f: from points (p, m, d), the functions' own, to values (p, m).
    :param points: (s, m, d) in the reals, at which to look for the mass.
    :param what: is integrated, in words.
    :param rounding: the relative precision of f.
    :param budget: how often f may be evaluated, all m at once.
    :raises NoIntegral: where f is no number where it has mass, or the integral is infinite.
    :raises OutOfReach: where the error stays large.
    """
    m, d = points.shape[1:]
    value = checked(f(points), what)
    if not np.isfinite(value.max(0, initial=-np.inf)).all():
        row = int(np.isfinite(value.max(0)).argmin())
        raise NoIntegral(f"The density of {what} is 0, or no number, at every point at which row {row} was looked at.")
    place, seen, heights = _explore(f, points, value, what)
    t, highest = place.backward(seen), heights.max(0)
    heights = heights + place.log_volume(t)
    top = heights.max(0)
    alive = heights > top - ALIVE
    reach = np.arcsinh(FARTHEST / np.abs(place.basis).max(1))  # (m, d)
    low = np.maximum(np.where(alive[..., None], t, np.inf).min(0) - 1.0, -reach)
    high = np.minimum(np.where(alive[..., None], t, -np.inf).max(0) + 1.0, reach)
    low, high = np.minimum(low, -3.0), np.maximum(high, 3.0)
    # no edge of a box at the mode, now or after halvings: both rules would step over a kink there
    low = low - 0.137 * (high - low) / NUM_BOXES[d]
    _check_tails(f, place, low, high, top, what)
    cells = Cells(f, place, low, high, what)
    cells.tell(np.broadcast_to(np.arange(m), heights.shape).reshape(-1), t.reshape(-1, d), heights.reshape(-1))
    # of f, whose terms may be larger than itself: gamma functions, say
    noise = 4 * rounding * np.maximum(30.0, np.abs(highest))
    return cells.refined(np.maximum(TOLERANCE[d], noise), noise, budget // m)


def _directions(d: int) -> np.ndarray:
    """Along the axes and the diagonals, there and back."""
    corners = products_of(np.array([-1.0, 1.0]), d)
    return np.concatenate([np.eye(d), -np.eye(d), corners]) if d > 1 else corners


def _explore(f: Function, points: np.ndarray, value: np.ndarray, what: str) -> tuple[SinhMap, np.ndarray, np.ndarray]:
    """The coordinates, all points that were looked at, (p, m, d), and their heights."""
    m, d = points.shape[1:]
    spread = points.std(0) if len(points) > 1 else np.zeros((m, d))
    unit = np.where(spread > 0, spread, 1.0)
    starts, height = _apart(points / unit, points, value, min(MAX_STARTS, max(2, 512 // m)))
    basis = unit[:, :, None] * np.eye(d)
    seen, heights = [points], [value]
    for _ in range(MAX_CLIMBS):
        before = height.max(0)
        found, height_found = _along_rays(f, starts, height, basis, what)
        seen.append(found.reshape(-1, m, d))
        heights.append(height_found.reshape(-1, m))
        # every start climbs to the best point on its rays
        best = height_found.reshape(len(starts), -1, m).argmax(1)  # (b, m)
        flat = found.reshape(len(starts), -1, m, d)
        climbed = np.take_along_axis(flat, best[:, None, :, None], 1)[:, 0]
        above = np.take_along_axis(height_found.reshape(len(starts), -1, m), best[:, None], 1)[:, 0]
        starts = np.where((above > height)[..., None], climbed, starts)
        height = np.maximum(above, height)
        centre = np.take_along_axis(starts, height.argmax(0)[None, :, None], 0)[0]
        escaped = np.abs(centre).max(-1) > 0.1 * FARTHEST
        if escaped.any():
            raise NoIntegral(_endless(what, int(escaped.argmax())))
        basis = _curvature(f, centre, height.max(0), basis, what)
        if len(seen) > 2 and (height.max(0) - before < 0.5).all():
            break
    for found, height_found in (
        _along_rays(f, starts, height, basis, what),
        _walked(f, starts, height, basis, what),
    ):
        seen.append(found.reshape(-1, m, d))
        heights.append(height_found.reshape(-1, m))
    return SinhMap(centre, basis, np.linalg.inv(basis)), np.concatenate(seen), np.concatenate(heights)


def _apart(scaled: np.ndarray, points: np.ndarray, value: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """The highest point of each function, and those with mass that are the farthest from all others chosen."""
    mass = value > value.max(0) - ALIVE
    chosen = [value.argmax(0)]
    distance = np.where(mass, np.inf, -1.0)
    for _ in range(min(num, len(points)) - 1):
        last = np.take_along_axis(scaled, chosen[-1][None, :, None], 0)
        distance = np.minimum(distance, ((scaled - last) ** 2).sum(-1))
        chosen.append(distance.argmax(0))
    picks = np.stack(chosen)
    return np.take_along_axis(points, picks[..., None], 0), np.take_along_axis(value, picks, 0)


def _along_rays(
    f: Function, starts: np.ndarray, height: np.ndarray, basis: np.ndarray, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Points (b, rays, distances, m, d) and their heights."""
    m, d = starts.shape[1:]
    steps = np.einsum("mij,rj->rmi", basis, _directions(d))[:, None]
    longest = FARTHEST / np.abs(steps).max(-1, keepdims=True)
    distances = np.minimum(2.0 ** np.arange(-16, 51)[:, None, None], longest)
    found = starts[:, None, None] + distances * steps
    value = f(found.reshape(-1, m, d)).reshape(found.shape[:-1])
    broken = np.isnan(value)
    value = checked(value.reshape(-1, m), what).reshape(value.shape)
    before = np.concatenate([np.broadcast_to(height[:, None, None], (*value.shape[:2], 1, m)), value[:, :, :-1]], 2)
    if (broken & (before > height.max(0) - ALIVE)).any():
        row = int((broken & (before > height.max(0) - ALIVE)).any((0, 1, 2)).argmax())
        raise NoIntegral(f"The log density of {what} is no number (NaN) at row {row}, near where it has mass.")
    return found, value


def _walked(
    f: Function, starts: np.ndarray, height: np.ndarray, basis: np.ndarray, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Where random walks go, (steps, walkers, m, d): along ridges and bends that rays leave. Their heights.

    Metropolis at a temperature of 4, so that they see the flanks, with steps of all sizes.
    """
    m, d = starts.shape[1:]
    generator = np.random.default_rng(0)
    # a start where there is no mass walks from the highest one
    low = height < height.max(0) - 10.0
    best = np.take_along_axis(starts, height.argmax(0)[None, :, None], 0)
    starts, height = np.where(low[..., None], best, starts), np.where(low, height.max(0), height)
    num = max(2, 200 // m)
    u, here = (np.resize(a, (num, *a.shape[1:])) for a in (starts, height))
    found, heights = [], []
    for _ in range(50 if d > 1 else 1):
        size = 2.0 ** generator.uniform(-3, 3, (num, m, 1))
        step = np.einsum("mij,wmj->wmi", basis, size * generator.standard_normal((num, m, d)))
        value = checked(f(u + step), what)
        accepted = np.log(generator.uniform(size=(num, m))) < 0.25 * (value - here)
        u, here = np.where(accepted[..., None], u + step, u), np.where(accepted, value, here)
        found.append(u)
        heights.append(here)
    return np.stack(found), np.stack(heights)


def _curvature(f: Function, centre: np.ndarray, height: np.ndarray, basis: np.ndarray, what: str) -> np.ndarray:
    """Directions and lengths on which f falls by about a half: of minus the Hessian, by differences; (m, d, d)."""
    m, d = centre.shape
    # first the length on each axis of the old basis at which f falls by a half, to a factor of 2, then of 2^(1/8)
    axes = np.einsum("mij->jmi", basis)
    powers = np.full((d, m), -30.0)
    for spacing, num in ((1.0, 61), (0.125, 9)):
        tried = powers + spacing * np.arange(num)[:, None, None]
        steps = 2.0 ** tried[..., None] * axes
        moved = (centre + np.stack([steps, -steps])).reshape(-1, m, d)
        fall = height - checked(f(moved), what).reshape(2, num, d, m).mean(0)
        within = np.maximum((fall <= 0.5).cumprod(0).sum(0) - 1, 0)
        powers = powers + spacing * within
    scaled = basis * 2.0 ** powers.T[:, None, :]
    scaled /= np.maximum(1.0, np.abs(scaled).max(1, keepdims=True) / math.sqrt(FARTHEST))  # a flat direction
    axes = np.einsum("mij->jmi", scaled)
    pairs = [(i, j) for i in range(d) for j in range(i, d)]
    moved = np.concatenate(
        [[axes[i] + sign * axes[j], -axes[i] - sign * axes[j]] for i, j in pairs for sign in (1, -1)]
    )
    value = checked(f(centre + moved), what).reshape(len(pairs), 4, m)
    hessian = np.zeros((m, d, d))
    with np.errstate(invalid="ignore"):
        for (i, j), (up, down, left, right) in zip(pairs, value, strict=True):
            # along 2 e_i where i = j: f(2e) + f(-2e) - 2 f(0) over 4; else the mixed difference
            second = (up + down - 2 * height) / 4 if i == j else (up + down - left - right) / 4
            hessian[:, i, j] = hessian[:, j, i] = second
    usable = np.isfinite(hessian).all((1, 2))
    hessian[~usable] = -np.eye(d)
    size, turn = np.linalg.eigh(-hessian)
    # a flat direction is followed far; one along which f rises is left as it is
    size = np.where(size < -0.1, 1.0, np.clip(size, 1e-6, 1e6))
    found: np.ndarray = scaled @ (turn / np.sqrt(size)[:, None, :])
    return found


def _check_tails(f: Function, place: SinhMap, low: np.ndarray, high: np.ndarray, top: np.ndarray, what: str) -> None:
    """Check whether the density falls off along every axis, to both sides.

    :raises NoIntegral: where it does not: there is no integral.
    """
    t = np.concatenate([edge[None] * np.eye(low.shape[1])[:, None] for edge in (low, high)])
    at, before = (checked(f(place.forward(z)), what) + place.log_volume(z) for z in (t, t - np.sign(t)))
    endless = (at > top - 35.0) & (at > before - 0.02)
    if endless.any():
        raise NoIntegral(_endless(what, int(endless.any(0).argmax())))


def _endless(what: str, row: int) -> str:
    return (
        f"The density does not fall off fast enough where {what} is large (row {row}): the integral is infinite, or "
        "the tails are too heavy for quadrature."
    )
