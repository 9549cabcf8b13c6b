"""Penalty: the inner problem as a penalty, by first derivatives alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..optim.host import descend, with_second_guide
from .problem import Bilevel, Gradient, Hypergradient, Result, added, in_theta, value_and_grad

__all__ = ["Penalty"]


class PenaltyState(NamedTuple):
    """What :class:`Penalty` carries from step to step: a second guide, ψ.

    :ivar psi: the second guide's parameters.
    :ivar optim: the state that the inner optimiser keeps for each.
    :ivar num_steps: steps of BiSM so far.
    """

    psi: Sequence[Tensor]
    optim: Sequence[dict[str, Any]]
    num_steps: int


@dataclass(frozen=True)
class Penalty(Hypergradient):
    """First derivatives alone: the inner problem becomes a penalty (F2SA; Kwon, Kwon, Wright, Nowak 2023).

    A second guide ψ is fitted to G + J/λ by K steps of the inner optimiser, beside φ and with φ's noise; then
    dJ/dθ ≈ ∂_θ J(θ, ψ) + λ [∂_θ G(θ, ψ) - ∂_θ G(θ, φ)], both G with the same noise (arXiv:2301.10945). The bias is
    O(1/λ). The loss reported is J(θ, ψ).

    :param strength: λ: a number, or a function of the step (from 0). ψ - φ is small as 1/λ, and the noise in it is
        multiplied by λ.
    """

    cure = "lower the strength, and see that it stays positive"

    strength: float | Callable[[int], float] = 100.0

    differentiates_inner = False
    repeats_noise = True
    resets_noise = True

    def __post_init__(self) -> None:
        if not callable(self.strength) and not (self.strength > 0 and math.isfinite(self.strength)):
            raise ValueError(f"strength must be positive and finite, or a function of the step, got {self.strength}.")

    def init(self, theta: Sequence[Tensor], phi: Sequence[Tensor]) -> PenaltyState:
        return PenaltyState([p.detach().clone() for p in phi], [{} for _ in phi], 0)

    def __call__(self, problem: Bilevel, state: PenaltyState) -> Result:
        if not problem.phi:
            return in_theta(problem.outer(), problem.theta)._replace(state=state)
        strength = float(self.strength(state.num_steps) if callable(self.strength) else self.strength)
        phi = list(problem.phi)
        # on copies: a step that fails leaves the state as it was
        psi = [p.clone() for p in state.psi]
        optim = [{k: s.clone() if isinstance(s, Tensor) else s for k, s in kept.items()} for kept in state.optim]
        with with_second_guide(problem.optim, phi, psi, optim):
            for noise in problem.inner_noise:
                fresh = problem.snapshot()
                problem.restore(noise)
                _, fit = problem.run(_inner_in_phi)
                problem.restore(fresh)
                _, match = problem.run(_outer_in_phi)
                both = [added(a, None if b is None else b / strength) for a, b in zip(fit, match, strict=True)]
                descend(problem.optim, phi, both)
            loss, raised = problem.run(_outer_in_theta)
            shared = problem.snapshot()
            _, at_psi = problem.run(_inner_in_theta)
        problem.restore(shared)
        _, at_phi = problem.run(_inner_in_theta)
        gradient = []
        for direct, upper, lower in zip(raised, at_psi, at_phi, strict=True):
            apart = added(upper, None if lower is None else -lower)
            gradient.append(added(direct, None if apart is None else strength * apart))
        return Result(loss, gradient, PenaltyState(psi, optim, state.num_steps + 1))


def _inner_in_phi(problem: Bilevel) -> tuple[Tensor, Gradient]:
    return value_and_grad(problem.inner, problem.phi)


def _outer_in_phi(problem: Bilevel) -> tuple[Tensor, Gradient]:
    return value_and_grad(problem.outer, problem.phi)


def _inner_in_theta(problem: Bilevel) -> tuple[Tensor, Gradient]:
    return value_and_grad(problem.inner, problem.theta)


def _outer_in_theta(problem: Bilevel) -> tuple[Tensor, Gradient]:
    return value_and_grad(problem.outer, problem.theta)
