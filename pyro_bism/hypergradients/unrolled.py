"""Unrolled: the gradient through the inner optimiser's steps."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..optim.steps import DifferentiableOptim
from .problem import Bilevel, Gradient, Hypergradient, Result, added, in_theta

__all__ = ["Unrolled"]

NUM_KEPT = 5  # states that Unrolled(memory="recompute") keeps: 20 steps are then taken twice at most, 55 three times


@dataclass(frozen=True)
class Unrolled(Hypergradient):
    """Differentiates through N steps of the inner optimiser (Bao et al. 2020, Algorithm 1).

    From the fitted φ⁰ = φ: φⁿ⁺¹ = φⁿ - step(∇_φ G(θ, φⁿ)), each step with fresh noise; the gradient is that of
    θ ↦ J(θ, φᴺ(θ)). The N steps are then thrown away. ``Unrolled(0)`` is ``Detached()``.

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

    @property
    def resets_noise(self) -> bool:  # type: ignore[override]
        return self.unrolls and self.memory == "recompute"

    def __call__(self, problem: Bilevel, state: Any) -> Result:
        if not (problem.phi and self.num_steps):
            return in_theta(problem.outer(), problem.theta)
        if self.memory == "recompute" or problem.is_out_of_reach:
            return self._recomputed(problem)
        optim, phi = problem.steps.resumed({}), list(problem.phi)
        for _ in range(self.num_steps):
            phi = _step(problem, optim, phi)
        with problem.at(phi):
            return in_theta(problem.outer(), problem.theta)

    def _recomputed(self, problem: Bilevel) -> Result:
        """J at φᴺ and its gradient, by :func:`_reversal`."""
        kept: list[Any] = [(list(problem.phi), problem.steps.state(), problem.snapshot()), *[None] * NUM_KEPT]
        total: Gradient = []
        behind: Gradient = []
        behind_state: dict[Any, Tensor] = {}
        for n, (legs, place) in zip(range(self.num_steps, -1, -1), _reversal(self.num_steps, NUM_KEPT), strict=True):
            for source, target, steps in legs:
                values, optim, noise = kept[source]
                problem.restore(noise)
                for _ in steps:
                    values, optim = problem.run(_forward, values, optim)
                kept[target] = values, optim, problem.snapshot()
            values, optim, noise = kept[place]
            problem.restore(noise)
            if n == self.num_steps:
                loss, total, behind = problem.run(_last, values)
                final = problem.snapshot()
            else:
                total, behind, behind_state = problem.run(_backward, values, optim, total, behind, behind_state)
        problem.restore(final)
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


def _step(problem: Bilevel, optim: DifferentiableOptim, phi: Sequence[Tensor]) -> list[Tensor]:
    """φ after one more step of the inner optimiser, with a graph back to ``phi`` and to θ."""
    with problem.at(phi):
        loss = problem.inner()
    gradients = torch.autograd.grad(loss, phi, create_graph=True, allow_unused=True)
    return optim.step(phi, gradients)


def _forward(problem: Bilevel, values: Sequence[Tensor], state: dict[Any, Any]) -> tuple[list[Tensor], dict[Any, Any]]:
    """A step of the inner optimiser from φ = ``values`` and its ``state``."""
    optim = problem.steps.resumed(state)
    with problem.standing_at(values) as leaves:
        gradients = torch.autograd.grad(problem.inner(), leaves, allow_unused=True)
    phi = optim.step([p.detach().requires_grad_() for p in values], gradients)
    state = {key: s.detach() if isinstance(s, Tensor) else s for key, s in optim.state().items()}
    return [p.detach() for p in phi], state


def _last(problem: Bilevel, values: Sequence[Tensor]) -> tuple[Tensor, Gradient, Gradient]:
    """J at φ = ``values``, and its gradients in θ and φ."""
    with problem.standing_at(values) as phi:
        loss = problem.outer()
        found = torch.autograd.grad(loss, [*problem.theta, *phi], allow_unused=True)
    return loss.detach(), found[: len(problem.theta)], found[len(problem.theta) :]


def _backward(
    problem: Bilevel,
    values: Sequence[Tensor],
    state: dict[Any, Any],
    total: Gradient,
    behind: Gradient,
    behind_state: dict[Any, Tensor],
) -> tuple[Gradient, Gradient, dict[Any, Tensor]]:
    """One step back: from the gradients in its results those in θ, added to ``total``, in φ and in the state."""
    optim = problem.steps.resumed(state)
    before = {key: s.detach().requires_grad_() for key, s in optim.tensors().items()}
    optim = optim.resumed(before)
    with problem.standing_at(values) as phi:
        gradients = torch.autograd.grad(problem.inner(), phi, create_graph=True, allow_unused=True)
        new_phi = optim.step(phi, gradients)
        new_state = optim.tensors()
        outputs = [(y, g) for y, g in zip(new_phi, behind, strict=True) if g is not None and y.requires_grad]
        outputs += [(new_state[key], g) for key, g in behind_state.items() if new_state[key].requires_grad]
        if not outputs:
            return total, [None] * len(phi), {}
        ends, weights = zip(*outputs, strict=True)
        found = torch.autograd.grad(ends, [*problem.theta, *phi, *before.values()], weights, allow_unused=True)
    first, second = len(problem.theta), len(problem.theta) + len(phi)
    total = [added(a, b) for a, b in zip(total, found[:first], strict=True)]
    return total, found[first:second], {k: g for k, g in zip(before, found[second:], strict=True) if g is not None}
