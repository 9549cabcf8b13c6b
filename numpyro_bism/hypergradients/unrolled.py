"""Unrolled: the gradient through the inner optimiser's steps."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..compiled.steps import unroll_factor
from ..optim.steps import differentiable_update
from .problem import Bilevel, Hypergradient, Result

__all__ = ["Unrolled"]

NUM_KEPT = 5  # states that Unrolled(memory="recompute") keeps: 20 steps are then taken twice at most, 55 three times


@dataclass(frozen=True)
class Unrolled(Hypergradient):
    """Differentiates through N steps of the inner optimiser (Bao et al. 2020, Algorithm 1).

    From the fitted φ⁰ = φ: φⁿ⁺¹ = φⁿ - step(∇_φ G(θ, φⁿ)), each step with fresh noise; the gradient is that
    of θ ↦ J(θ, φᴺ(θ)). The N steps are then thrown away. ``Unrolled(0)`` is ``Detached()``.

    :param num_steps: N. Past the inner loop's stability limit (a learning rate too high for the curvature) the
        gradient explodes.
    :param memory: ``"store"`` keeps what every step computed: memory grows with N. ``"recompute"`` keeps five
        states of φ and the optimiser, whatever N is, and takes the steps from them again on the way back (Griewank and
        Walther 2000): the same gradient. Besides the pass that is differentiated a step is then taken once on average
        for N = 5, 1.75 times for N = 20, 2.5 times for N = 50.
    """

    cure = "unroll fewer steps, or use Detached()"

    num_steps: int = 5
    memory: Literal["store", "recompute"] = "store"

    def __post_init__(self) -> None:
        if self.num_steps < 0:
            raise ValueError(f"num_steps must not be negative, got {self.num_steps}.")
        if self.memory not in ("store", "recompute"):
            raise ValueError(f"memory must be 'store' or 'recompute', got {self.memory!r}.")

    @property
    def differentiates_inner(self) -> bool:  # type: ignore[override]
        return self.num_steps > 0

    @property
    def unrolls(self) -> bool:  # type: ignore[override]
        return self.num_steps > 0

    def noise_keys(self, rng_key: Array) -> Array:
        # to recompute is to save memory: there every step draws its own
        return self._keys(rng_key)[1] if self.memory == "store" else super().noise_keys(rng_key)

    def _keys(self, rng_key: Array) -> tuple[Array, Array]:
        key_outer, key_inner = jax.random.split(rng_key)
        return key_outer, jax.random.split(key_inner, self.num_steps)

    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any, state: Any) -> Result:
        key_outer, keys = self._keys(rng_key)
        stores = self.memory == "store"
        inner, noise = problem.prefetched if stores and problem.prefetched else (problem.inner, keys)

        def step(theta: Any, fast: Any, noise: Any) -> Any:
            phi = problem.optim.get_params(fast)
            loss, gradient = jax.value_and_grad(inner, argnums=2)(noise, theta, phi)
            return differentiable_update(problem.optim, gradient, fast, loss)

        def last(theta: Any, fast: Any) -> Array:
            return problem.outer(key_outer, theta, problem.optim.get_params(fast))

        if self.num_steps and not stores:
            return _recomputed(step, last, theta, inner_state, keys)

        def whole(theta: Any) -> Array:
            fast = inner_state
            if self.num_steps:
                fast, _ = jax.lax.scan(
                    lambda fast, noise: (step(theta, fast, noise), None),
                    fast,
                    noise,
                    length=self.num_steps,
                    unroll=unroll_factor(self.num_steps),
                )
            return last(theta, fast)

        return Result(*jax.value_and_grad(whole)(theta))


def _recomputed(step: Callable[..., Any], last: Callable[..., Array], theta: Any, start: Any, keys: Array) -> Result:
    """J = last(θ, sᴺ) and its gradient, with sⁿ⁺¹ = step(θ, sⁿ, keyⁿ), by :func:`_reversal`."""
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, start))
    moves = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]  # a count of steps has no derivative

    def parted(leaves: list[Array]) -> list[list[Array]]:
        return [[x for x, yes in zip(leaves, moves, strict=True) if yes == kind] for kind in (True, False)]

    def joined(moving: list[Array], still: list[Array]) -> Any:
        parts = {True: iter(moving), False: iter(still)}
        return jax.tree.unflatten(tree, [next(parts[yes]) for yes in moves])

    plan = _reversal(len(keys), NUM_KEPT)
    # a leg: from which place, to which, the first of its steps and the one after its last
    legs = jnp.array([(a, b, steps.start, steps.stop) for each, _ in plan for a, b, steps in each]).reshape(-1, 4)
    ends = np.cumsum([len(each) for each, _ in plan])
    kept = [jnp.broadcast_to(x, (NUM_KEPT + 1, *x.shape)) for x in leaves]

    def reached(kept: list[Array], first: Any, end: Any) -> list[Array]:
        """The legs from one to another."""

        def leg(i: Any, kept: list[Array]) -> list[Array]:
            source, target, start, stop = legs[i]
            state = jax.tree.unflatten(tree, [x[source] for x in kept])
            state = jax.lax.fori_loop(start, stop, lambda n, state: step(theta, state, keys[n]), state)
            return [x.at[target].set(y) for x, y in zip(kept, jax.tree.leaves(state), strict=True)]

        found: list[Array] = jax.lax.fori_loop(first, end, leg, kept)
        return found

    kept = reached(kept, 0, ends[0])
    moving, still = parted([x[plan[0][1]] for x in kept])
    loss, found = jax.value_and_grad(lambda t, m: last(t, joined(m, still)), argnums=(0, 1))(theta, moving)

    def back(carry: tuple[Any, ...], now: tuple[Any, ...]) -> tuple[tuple[Any, ...], None]:
        kept, total, behind = carry
        n, first, end, place = now
        kept = reached(kept, first, end)
        moving, still = parted([x[place] for x in kept])

        def moved(theta: Any, moving: list[Array]) -> list[Array]:
            return parted(jax.tree.leaves(step(theta, joined(moving, still), keys[n])))[0]

        in_theta, behind = jax.vjp(moved, theta, moving)[1](behind)
        return (kept, jax.tree.map(jnp.add, total, in_theta), behind), None

    places = np.array([place for _, place in plan])
    rows = (np.arange(len(keys))[::-1], ends[:-1], ends[1:], places[1:])
    (_, total, _), _ = jax.lax.scan(back, (kept, *found), jax.tree.map(jnp.asarray, rows))
    return Result(loss, total)


def _reversal(num_steps: int, num_kept: int) -> list[tuple[list[tuple[int, int, range]], int]]:
    """How to reach the states N, N - 1, ..., 0 of N steps with ``num_kept`` states in memory, the first in place 0.

    For each, the legs (from a place, to a place, which steps between), and the place where it then is;
    place ``num_kept`` is for passing use. A step is taken at most r times, C(num_kept + r, r) > N, and the fewest times
    in all that is possible (Griewank and Walther 2000, Algorithm 799).
    """

    def longest(places: int, times: int) -> int:
        return math.comb(places + times, places)

    found, kept = [], [0]
    for state in range(num_steps, -1, -1):
        while kept[-1] > state:
            kept.pop()
        legs = []
        while (length := state - kept[-1] + 1) > 2 and (free := num_kept - len(kept) + 1) > 1:
            times = next(r for r in itertools.count(1) if longest(free, r) >= length)
            ahead = min(longest(free, times - 1), length - longest(free - 1, times - 1))
            legs.append((len(kept) - 1, len(kept), range(kept[-1], kept[-1] + ahead)))
            kept.append(kept[-1] + ahead)
        if kept[-1] < state:
            legs.append((len(kept) - 1, num_kept, range(kept[-1], state)))
        found.append((legs, legs[-1][1] if legs else len(kept) - 1))
    return found
