"""Boxes that a cubature splits until its error is small; it stands in both packages to the letter."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

NUM_NODES = {1: 10, 2: 7, 3: 8}  # of a box, in each dimension
NUM_BOXES = {1: 8, 2: 4, 3: 2}  # at first, in each dimension
ACCEPTED = 1e-2  # nats: with more error than this there is no answer
FARTHEST = 1e15  # its square is a number in single precision
ALIVE = 45.0  # nats below the highest value, where there is no mass
MAX_DEPTH = 40  # halvings of a box

Function = Callable[[np.ndarray], np.ndarray]


class Cubature(NamedTuple):
    """The integrals of several functions, as logarithms, and their errors.

    :ivar value: log ∫ exp f, one number for each function, shape (m,).
    :ivar error: the absolute error of each of these logarithms, in nats, shape (m,).
    """

    value: np.ndarray
    error: np.ndarray


class OutOfReach(ValueError):
    """There is no sum or integral to be had here with a small error; sampling may do."""


class NoIntegral(ValueError):
    """The integral is infinite, or the density no number where it has mass: no method helps."""


class SinhMap(NamedTuple):
    """u = μ + L sinh t of every function: μ (m, d), L and its inverse (m, d, d)."""

    centre: np.ndarray
    basis: np.ndarray
    inverse: np.ndarray

    def forward(self, t: np.ndarray) -> np.ndarray:
        u: np.ndarray = self.centre + np.einsum("mij,...mj->...mi", self.basis, np.sinh(t))
        return u

    def backward(self, u: np.ndarray) -> np.ndarray:
        t: np.ndarray = np.arcsinh(np.einsum("mij,...mj->...mi", self.inverse, u - self.centre))
        return t

    def log_volume(self, t: np.ndarray) -> np.ndarray:
        bend = np.logaddexp(t, -t) - np.log(2.0)  # log cosh
        total: np.ndarray = np.linalg.slogdet(self.basis)[1] + bend.sum(-1)
        return total


def checked(value: np.ndarray, what: str) -> np.ndarray:
    """NaN is taken for no mass here; who calls looks whether there is any beside it."""
    if np.isposinf(value).any():
        row = int(np.isposinf(value).any(0).argmax())
        raise NoIntegral(f"The log density of {what} is +inf at row {row}: there is no integral.")
    return np.where(np.isnan(value), -np.inf, value)


class Cells:
    """A forest of boxes of all functions, one a line, and points that keep them honest.

    The roots fill the range of every function; the leaves' integrals are added.
    """

    def __init__(self, f: Function, place: SinhMap, low: np.ndarray, high: np.ndarray, what: str):
        m, d = low.shape
        self.f, self.place, self.what = f, place, what
        nodes, weights = np.polynomial.legendre.leggauss(NUM_NODES[d])
        self.margin = 0.5 * (nodes[0] + 1)
        self.nodes = products_of(0.5 * (nodes + 1), d)
        self.log_weights = np.log(products_of(0.5 * weights, d)).sum(-1)
        self.parts = products_of(np.array([0, 1]), d)
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
        corner = products_of(np.arange(num), d)
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
        value = checked(value, self.what) + self.place.log_volume(all_rows)
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


def products_of(values: np.ndarray, d: int) -> np.ndarray:
    """All d-tuples of these values, one a line."""
    return np.stack(np.meshgrid(*[values] * d, indexing="ij"), -1).reshape(-1, d)
