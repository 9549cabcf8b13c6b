r"""Hypergradients: how the outer gradient sees the inner fit.

.. math:: \frac{dJ}{dθ} = \frac{∂J}{∂θ} + \Big(\frac{dφ^*}{dθ}\Big)^\top \frac{∂J}{∂φ}

A strategy is a frozen dataclass of numbers, called with a :class:`Bilevel` problem; it returns the outer
loss and its gradient in θ. It reads φ and the inner optimiser's state and changes neither.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from .optim import DifferentiableOptim

__all__ = ["Detached", "Unrolled"]


@dataclass(frozen=True)
class Bilevel:
    """The two losses on one batch, each drawing its own noise, and the tensors that they depend on.

    :ivar outer: J at the parameters in force.
    :ivar inner: G at the parameters in force.
    :ivar at: the context that puts given values of φ in force.
    :ivar unrolled: makes the inner optimiser's step differentiable, from its present state.
    """

    outer: Callable[[], Tensor]
    inner: Callable[[], Tensor]
    theta: Sequence[Tensor]
    phi: Sequence[Tensor]
    at: Callable[[Sequence[Tensor]], AbstractContextManager]
    unrolled: Callable[[], DifferentiableOptim]


Result = tuple[Tensor, tuple[Tensor | None, ...]]


def _outer(problem: Bilevel) -> Result:
    loss = problem.outer()
    gradient = torch.autograd.grad(loss, problem.theta, allow_unused=True)
    return loss.detach(), gradient


@dataclass(frozen=True)
class Detached:
    """dJ/dθ ≈ ∂J/∂θ: the guide's dependence on θ is left out (the paper's N = 0).

    Biased unless the guide can reach the posterior *and* the loss is stationary in φ there; the linear-Gaussian
    model shows an error of more than the gradient's own length.
    """

    differentiates_inner = False

    def __call__(self, problem: Bilevel) -> Result:
        return _outer(problem)


@dataclass(frozen=True)
class Unrolled:
    """Differentiates through N steps of the inner optimiser (Bao et al. 2020, Algorithm 1).

    From the fitted φ⁰ = φ: φⁿ⁺¹ = φⁿ - step(∇_φ G(θ, φⁿ)), each step with fresh noise; the gradient is that of
    θ ↦ J(θ, φᴺ(θ)). The N steps are then thrown away. ``Unrolled(0)`` is ``Detached()``.

    :param num_steps: N. Memory grows with it; past the inner loop's stability limit (a learning
        rate too high for the curvature) the gradient explodes.
    """

    num_steps: int = 5

    def __post_init__(self):
        if self.num_steps < 0:
            raise ValueError(f"num_steps must not be negative, got {self.num_steps}.")

    @property
    def differentiates_inner(self) -> bool:
        return self.num_steps > 0

    def __call__(self, problem: Bilevel) -> Result:
        optim, phi = problem.unrolled(), list(problem.phi)
        for _ in range(self.num_steps if phi else 0):
            with problem.at(phi):
                loss = problem.inner()
            gradients = torch.autograd.grad(loss, phi, create_graph=True, allow_unused=True)
            phi = optim.step(phi, gradients)
        with problem.at(phi):
            return _outer(problem)
