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
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

NUM_NODES = {1: 10, 2: 7, 3: 8}  # of a box, in each dimension
NUM_BOXES = {1: 8, 2: 4, 3: 2}  # at first, in each dimension
TOLERANCE = {1: 1e-9, 2: 1e-7, 3: 1e-6}  # of the differences that are left; the error of the finer rule is far below
ACCEPTED = 1e-2  # nats: with more error than this there is no answer
FARTHEST = 1e15  # its square is a number in single precision
ALIVE = 45.0  # nats below the highest value, where there is no mass
MAX_STARTS = 12
MAX_CLIMBS = 12
MAX_DEPTH = 40  # halvings of a box

Function = Callable[[np.ndarray], np.ndarray]


class Cubature(NamedTuple):
    """
    :ivar value: log ∫ exp f, one a function.
    :ivar error: of it, absolute.
    """

    value: np.ndarray
    error: np.ndarray


class OutOfReach(ValueError):
    """There is no sum or integral to be had here with a small error; sampling may do."""


class NoIntegral(ValueError):
    """The integral is infinite, or the density no number where it has mass: no method helps."""


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


class _Map(NamedTuple):
    """u = μ + L sinh t of every function: μ (m, d), L and its inverse (m, d, d)."""

    centre: np.ndarray
    basis: np.ndarray
    inverse: np.ndarray

    def forward(self, t: np.ndarray) -> np.ndarray:
        return self.centre + np.einsum("mij,...mj->...mi", self.basis, np.sinh(t))

    def backward(self, u: np.ndarray) -> np.ndarray:
        return np.arcsinh(np.einsum("mij,...mj->...mi", self.inverse, u - self.centre))

    def log_volume(self, t: np.ndarray) -> np.ndarray:
        bend = np.logaddexp(t, -t) - np.log(2.0)  # log cosh
        return np.linalg.slogdet(self.basis)[1] + bend.sum(-1)


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
    value = _checked(f(points), what)
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
    cells = _Cells(f, place, low, high, what)
    cells.tell(np.broadcast_to(np.arange(m), heights.shape).reshape(-1), t.reshape(-1, d), heights.reshape(-1))
    # of f, whose terms may be larger than itself: gamma functions, say
    noise = 4 * rounding * np.maximum(30.0, np.abs(highest))
    return cells.refined(np.maximum(TOLERANCE[d], noise), noise, budget // m)


def _checked(value: np.ndarray, what: str) -> np.ndarray:
    """NaN is taken for no mass here; who calls looks whether there is any beside it."""
    if np.isposinf(value).any():
        row = int(np.isposinf(value).any(0).argmax())
        raise NoIntegral(f"The log density of {what} is +inf at row {row}: there is no integral.")
    return np.where(np.isnan(value), -np.inf, value)


def _directions(d: int) -> np.ndarray:
    """Along the axes and the diagonals, there and back."""
    corners = _products(np.array([-1.0, 1.0]), d)
    return np.concatenate([np.eye(d), -np.eye(d), corners]) if d > 1 else corners


def _explore(f: Function, points: np.ndarray, value: np.ndarray, what: str) -> tuple[_Map, np.ndarray, np.ndarray]:
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
    return _Map(centre, basis, np.linalg.inv(basis)), np.concatenate(seen), np.concatenate(heights)


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
    value = _checked(value.reshape(-1, m), what).reshape(value.shape)
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
        value = _checked(f(u + step), what)
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
        fall = height - _checked(f(moved), what).reshape(2, num, d, m).mean(0)
        within = np.maximum((fall <= 0.5).cumprod(0).sum(0) - 1, 0)
        powers = powers + spacing * within
    scaled = basis * 2.0 ** powers.T[:, None, :]
    scaled /= np.maximum(1.0, np.abs(scaled).max(1, keepdims=True) / math.sqrt(FARTHEST))  # a flat direction
    axes = np.einsum("mij->jmi", scaled)
    pairs = [(i, j) for i in range(d) for j in range(i, d)]
    moved = np.concatenate(
        [[axes[i] + sign * axes[j], -axes[i] - sign * axes[j]] for i, j in pairs for sign in (1, -1)]
    )
    value = _checked(f(centre + moved), what).reshape(len(pairs), 4, m)
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
    return scaled @ (turn / np.sqrt(size)[:, None, :])


def _check_tails(f: Function, place: _Map, low: np.ndarray, high: np.ndarray, top: np.ndarray, what: str) -> None:
    """:raises NoIntegral: where the density does not fall off along an axis: there is no integral."""
    t = np.concatenate([edge[None] * np.eye(low.shape[1])[:, None] for edge in (low, high)])
    at, before = (_checked(f(place.forward(z)), what) + place.log_volume(z) for z in (t, t - np.sign(t)))
    endless = (at > top - 35.0) & (at > before - 0.02)
    if endless.any():
        raise NoIntegral(_endless(what, int(endless.any(0).argmax())))


def _endless(what: str, row: int) -> str:
    return (
        f"The density does not fall off fast enough where {what} is large (row {row}): the integral is infinite, or "
        "the tails are too heavy for quadrature."
    )


class _Cells:
    """A forest of boxes of all functions, one a line, and points that keep them honest.

    The roots fill the range of every function; the leaves' integrals are added.
    """

    def __init__(self, f: Function, place: _Map, low: np.ndarray, high: np.ndarray, what: str):
        m, d = low.shape
        self.f, self.place, self.what = f, place, what
        nodes, weights = np.polynomial.legendre.leggauss(NUM_NODES[d])
        self.margin = 0.5 * (nodes[0] + 1)
        self.nodes = _products(0.5 * (nodes + 1), d)
        self.log_weights = np.log(_products(0.5 * weights, d)).sum(-1)
        self.parts = _products(np.array([0, 1]), d)
        self.num_evaluations = 0
        self.bottom, self.top = low.copy(), high.copy()
        self.grids: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.outside: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.row, self.depth, self.child = np.empty(0, int), np.empty(0, int), np.empty(0, int)
        self.low, self.high = np.empty((0, d)), np.empty((0, d))
        self.value, self.highest, self.error, self.broken = np.empty(0), np.empty(0), np.empty(0), np.empty(0, bool)
        self.peak, self.leaks = np.full(m, -np.inf), np.zeros((m, d, 2), bool)
        self.point, self.point_height, self.point_cell = np.empty((0, d)), np.empty(0), np.empty(0, int)
        self._plant(np.arange(m), low, high)

    def _plant(self, rows: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
        """Boxes of the same size that fill [low, high] of these rows."""
        num, d = NUM_BOXES[low.shape[1]], low.shape[1]
        corner = _products(np.arange(num), d)
        edges = low[:, None] + np.arange(num + 1)[:, None] * ((high - low) / num)[:, None]
        edges[:, -1] = high  # to the letter: the outermost edges are looked for by equality
        row, axis = np.arange(len(rows))[:, None, None], np.arange(d)
        lower, upper = (edges[row, corner + side, axis].reshape(-1, d) for side in (0, 1))
        where = np.full(len(self.bottom), -1)
        where[rows] = len(self.row) + num**d * np.arange(len(rows))
        self.grids.append((where, low, high))
        self._grow(np.repeat(rows, len(corner)), lower, upper, np.inf, 0)
        outside, self.outside = self.outside, []
        for told in outside:
            self.tell(*told)

    def _grow(self, row: np.ndarray, low: np.ndarray, high: np.ndarray, error: Any, depth: Any) -> np.ndarray:
        """New boxes behind the others; their integrals."""
        value, highest, broken, nodes = self._evaluated(row, low, high)
        first, new = len(self.row), len(row)
        self.row, self.low, self.high = (
            np.concatenate(z) for z in ((self.row, row), (self.low, low), (self.high, high))
        )
        self.value, self.highest = np.concatenate([self.value, value]), np.concatenate([self.highest, highest])
        self.broken = np.concatenate([self.broken, broken])
        self.child = np.concatenate([self.child, np.full(new, -1)])
        self.depth = np.concatenate([self.depth, np.broadcast_to(depth, new)])
        self.error = np.concatenate([self.error, np.broadcast_to(error, new)])
        np.maximum.at(self.peak, row, highest)
        self._look_around(np.arange(first, first + new), nodes)
        return value

    def _evaluated(
        self, row: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """log ∫ of each box, its highest node's value, whether a node is no number, and all nodes' values."""
        t = low[:, None] + self.nodes * (high - low)[:, None]
        value, broken = self._heights(row, t)
        log_volume = np.log(high - low).sum(-1)
        total: np.ndarray = np.logaddexp.reduce(value + self.log_weights, -1) + log_volume
        return total, np.asarray(value.max(-1)), np.asarray(broken.any(-1)), value

    def _heights(self, row: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of points t (c, q, d) of these rows: the integrand's logarithm, and where it is no number; (c, q)."""
        m, d = self.place.centre.shape
        order = np.argsort(row, kind="stable")
        counts = np.bincount(row, minlength=m)
        slot = np.empty(len(row), int)
        slot[order] = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        num, size = int(counts.max()), t.shape[1]
        side_by_side = np.zeros((num, size, m, d))
        side_by_side[slot, :, row] = t
        all_rows = side_by_side.reshape(-1, m, d)
        self.num_evaluations += len(all_rows)
        value = self.f(self.place.forward(all_rows))
        broken: np.ndarray = np.isnan(value)
        value = _checked(value, self.what) + self.place.log_volume(all_rows)
        return value.reshape(num, size, m)[slot, :, row], broken.reshape(num, size, m)[slot, :, row]

    def _look_around(self, which: np.ndarray, nodes: np.ndarray) -> None:
        """From the highest node of these boxes to each of their faces: what the neighbour has to know of, and walls."""
        d = self.low.shape[1]
        alive = self.highest[which] > self.peak[self.row[which]] - 30.0
        which, nodes = which[alive], nodes[alive]
        if not len(which):
            return
        index = np.stack(np.unravel_index(nodes.argmax(-1), (NUM_NODES[d],) * d), -1)
        width = (self.high - self.low)[which]
        at = self.low[which] + self.nodes[nodes.argmax(-1)] * width
        points = np.repeat(at[:, None], 2 * d, 1)
        nearest = np.empty((len(which), 2 * d))
        nudged = np.zeros((2 * d, d))
        for axis in range(d):
            for side, edge in enumerate((self.low, self.high)):
                points[:, 2 * axis + side, axis] = edge[which, axis]
                nudged[2 * axis + side, axis] = 1e-9 * (2 * side - 1)
                line = index.copy()
                line[:, axis] = (NUM_NODES[d] - 1) * side
                flat = np.ravel_multi_index(tuple(line.T), (NUM_NODES[d],) * d)
                nearest[:, 2 * axis + side] = nodes[np.arange(len(which)), flat]
        value, _ = self._heights(self.row[which], points)
        # a fall by far between two nodes, or between the last one and the face: a wall, and no rule knows where
        shape = (len(which), *(NUM_NODES[d],) * d)
        cut = np.maximum(nodes - self.highest[which, None], -100.0).reshape(shape)
        falls = ((nearest > value + 5.0) & (nearest > self.highest[which, None] - 5.0)).sum(-1) * self.margin
        for axis in range(1, d + 1):
            a, b = np.moveaxis(cut, axis, 0)[1:], np.moveaxis(cut, axis, 0)[:-1]
            far = (np.abs(a - b) > 5.0) & (np.maximum(a, b) > -5.0)
            falls = falls + np.moveaxis(far, 1, 0).reshape(len(which), -1).sum(-1) / nodes.shape[1]
        hidden = self.value[which] + np.log(np.maximum(falls, 1e-300))
        self.error[which] = np.maximum(self.error[which], np.where(falls > 0, hidden, -np.inf))
        row = np.repeat(self.row[which], 2 * d)
        beyond = (points + nudged * width[:, None]).reshape(-1, d)
        self.tell(row, beyond, value.reshape(-1))

    def tell(self, row: np.ndarray, points: np.ndarray, heights: np.ndarray) -> None:
        """What the integrand's logarithm is at some points: the boxes there have to have seen as much."""
        num, d = NUM_BOXES[points.shape[1]], points.shape[1]
        alive = heights > self.peak[row] - 25.0
        row, points, heights = row[alive], points[alive], heights[alive]
        found = np.full(len(row), -1)
        for where, low, high in self.grids:
            ours = np.flatnonzero((found < 0) & (where[row] >= 0))
            k = (where[row[ours]] - where[where >= 0].min()) // num**d
            inside = ((points[ours] >= low[k]) & (points[ours] <= high[k])).all(-1)
            ours, k = ours[inside], k[inside]
            cell = np.clip(((points[ours] - low[k]) / (high[k] - low[k]) * num).astype(int), 0, num - 1)
            found[ours] = where[row[ours]] + np.ravel_multi_index(tuple(cell.T), (num,) * d)
        lost = found < 0
        self.outside.append((row[lost], points[lost], heights[lost]))
        for side, out in enumerate((points[lost] < self.bottom[row[lost]], points[lost] > self.top[row[lost]])):
            self.leaks[..., side] |= np.stack([np.bincount(row[lost], o, len(self.leaks)) > 0 for o in out.T], -1)
        self.point = np.concatenate([self.point, points[~lost]])
        self.point_height = np.concatenate([self.point_height, heights[~lost]])
        self.point_cell = np.concatenate([self.point_cell, found[~lost]])
        self._descend()

    def _descend(self) -> None:
        """Every point to the leaf that it is in."""
        powers = 2 ** np.arange(self.low.shape[1])[::-1]
        moves = np.flatnonzero(self.child[self.point_cell] >= 0)
        while len(moves):
            cell = self.point_cell[moves]
            part = (self.point[moves] >= 0.5 * (self.low + self.high)[cell]) @ powers
            self.point_cell[moves] = self.child[cell] + part
            moves = moves[self.child[self.point_cell[moves]] >= 0]

    def refined(self, tolerance: np.ndarray, noise: np.ndarray, budget: int) -> Cubature:
        """Leaves are split until what is left of the error is below the tolerance."""
        m, beyond = len(tolerance), np.zeros(len(tolerance))
        history: list[np.ndarray] = []
        while True:
            leaves = np.flatnonzero(self.child < 0)
            log_z = np.full(m, -np.inf)
            np.logaddexp.at(log_z, self.row[leaves], self.value[leaves])
            share = self._shares(leaves, log_z)
            left = np.bincount(self.row[leaves], share, m)
            history.append(left)
            stalled = np.zeros(m, bool)
            if len(history) > 8:  # it is rounding, and will not get much better
                stalled = (left < 100 * noise) & (left > 0.5 * history[-8])
            unfinished = (left > tolerance) & ~stalled
            if self.num_evaluations > budget:
                break
            if not unfinished.any():
                grown, beyond = self._extended(0.1 * tolerance, log_z)
                if not grown:
                    break
                continue
            worst = np.zeros(m)
            np.maximum.at(worst, self.row[leaves], np.where(np.isfinite(share), share, 0.0))
            counts = np.bincount(self.row[leaves], minlength=m)
            limit = np.maximum(tolerance / (4 * counts), 0.02 * worst)[self.row[leaves]]
            chosen = leaves[unfinished[self.row[leaves]] & (share > limit) & (self.depth[leaves] < MAX_DEPTH)]
            # the worst of them, as far as the budget goes
            room = max(1, int((budget - self.num_evaluations) // (len(self.nodes) * len(self.parts) / m)))
            if len(chosen) > room:
                chosen = chosen[np.argsort(-share[np.searchsorted(leaves, chosen)], kind="stable")[:room]]
            if not len(chosen):
                break
            self._split(np.sort(chosen))
        error = np.hypot(left, noise) + beyond
        if not (error <= ACCEPTED).all():
            row = int(np.where(np.isnan(error), np.inf, error).argmax())
            raise OutOfReach(
                f"Quadrature over {self.what} does not settle: after {self.num_evaluations} points a row the error of "
                f"log ∫ is {error[row]:.2g} at row {row}; the density is too rough or its tails are too heavy. Use ais."
            )
        return Cubature(log_z, error)

    def _shares(self, leaves: np.ndarray, log_z: np.ndarray) -> np.ndarray:
        """Every leaf's error over Z; infinite where nothing is known of it."""
        row, highest = self.row[leaves], self.highest[leaves]
        unseen = np.full(len(self.row), -np.inf)
        np.maximum.at(unseen, self.point_cell, self.point_height)
        unseen = unseen[leaves]
        log_volume = np.log(self.high[leaves] - self.low[leaves]).sum(-1) - log_z[row]
        error = np.where(np.isposinf(self.error[leaves]), np.inf, self.error[leaves] - log_z[row])
        error = np.where(np.maximum(unseen, highest) + log_volume < -ALIVE, -np.inf, error)
        # the nodes have missed what is known to be there
        error = np.maximum(error, np.where(unseen > highest + 0.7, unseen + log_volume, -np.inf))
        broken = self.broken[leaves] & (highest + log_volume > -30.0)
        if (broken & (self.depth[leaves] > 12)).any():
            where = int(row[(broken & (self.depth[leaves] > 12)).argmax()])
            raise NoIntegral(f"The log density of {self.what} is no number (NaN) at row {where}, where it has mass.")
        return np.where(broken, np.inf, np.exp(np.minimum(error, 50.0)))

    def _split(self, chosen: np.ndarray) -> None:
        num = len(self.parts)
        row, part = np.repeat(self.row[chosen], num), np.tile(self.parts, (len(chosen), 1))
        start, end = np.repeat(self.low[chosen], num, 0), np.repeat(self.high[chosen], num, 0)
        low = np.where(part == 1, 0.5 * (start + end), start)
        high = np.where(part == 1, end, 0.5 * (start + end))
        first, before = len(self.row), self.error[chosen]
        self.child[chosen] = first + num * np.arange(len(chosen))
        depth = np.repeat(self.depth[chosen] + 1, num)
        value = self._grow(row, low, high, -np.inf, depth)
        whole, parent = np.logaddexp.reduce(value.reshape(-1, num), -1), self.value[chosen]
        larger = np.maximum(whole, parent)
        with np.errstate(invalid="ignore", divide="ignore"):
            difference = np.log(np.abs(np.exp(whole - larger) - np.exp(parent - larger))) + larger
            difference = np.where(np.isneginf(larger), -np.inf, difference) - np.log(num)
            # what the last halving gained the next one will gain, for a smooth density
            gain = np.exp(np.minimum(difference - before, 0.0))
        gain = np.where(np.isposinf(before) | np.isnan(gain), 1.0, np.clip(10 * gain, 0.2, 1.0))
        self.error[first:] = np.maximum(self.error[first:], np.repeat(difference + np.log(gain), num))
        self._descend()

    def _extended(self, tolerance: np.ndarray, log_z: np.ndarray) -> tuple[bool, np.ndarray]:
        """Boxes beyond the faces through which mass goes on; whether there are any, and what is out of all reach."""
        m, d = self.bottom.shape
        reach = np.arcsinh(FARTHEST / np.abs(self.place.basis).max(1))
        grown, beyond = False, np.zeros(m)
        for axis, side in ((axis, side) for axis in range(d) for side in (0, 1)):
            edge, own = (self.top, self.high) if side else (self.bottom, self.low)
            outer = np.flatnonzero((self.child < 0) & (own[:, axis] == edge[self.row, axis]))
            first = self.nodes[:, axis] == self.nodes[0, axis]
            nodes, log_weights = self.nodes[first].copy(), self.log_weights[first]
            nodes[:, axis] = side
            width = (self.high - self.low)[outer]
            value, _ = self._heights(self.row[outer], self.low[outer][:, None] + nodes * width[:, None])
            area = np.log(width).sum(-1) - np.log(width[:, axis]) - np.logaddexp.reduce(log_weights)
            value = np.logaddexp.reduce(value + log_weights, -1) + area - log_z[self.row[outer]]
            flow = np.bincount(self.row[outer], np.exp(value), m)
            within = np.abs(edge[:, axis]) < reach[:, axis]
            # a tail falls at least as exp(-t/10): _check_tails has looked
            beyond += np.where(within, 0.0, 10 * flow)
            rows = np.flatnonzero(((flow > tolerance) | self.leaks[:, axis, side]) & within)
            self.leaks[:, axis, side] = False
            if not len(rows):
                continue
            grown = True
            low, high = self.bottom[rows].copy(), self.top[rows].copy()
            if side:
                low[:, axis] = edge[rows, axis]
                high[:, axis] = self.top[rows, axis] = np.minimum(edge[rows, axis] + 2.0, reach[rows, axis])
            else:
                high[:, axis] = edge[rows, axis]
                low[:, axis] = self.bottom[rows, axis] = np.maximum(edge[rows, axis] - 2.0, -reach[rows, axis])
            self._plant(rows, low, high)
        return grown, beyond


def _products(values: np.ndarray, d: int) -> np.ndarray:
    """All d-tuples of these values, one a line."""
    return np.stack(np.meshgrid(*[values] * d, indexing="ij"), -1).reshape(-1, d)
