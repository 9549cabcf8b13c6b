"""The inner and the outer step that every method takes, and running them as they are; ``captured.py`` makes graphs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple, Protocol

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from ..hypergradients.problem import Gradient, Result, norm, value_and_grad
from ..optim.host import descend


class StepProblem(Protocol):
    """What a step solves on one batch: ``Bilevel`` for BiSM, a rival's own loss for a rival.

    :ivar write_theta: takes θ's optimiser step in place, where it is allowed to; None if torch takes it, outside.
    :ivar write_phi: the same for φ.
    """

    theta: Sequence[Tensor]
    phi: Sequence[Tensor]
    write_theta: Callable[[Gradient, Tensor], None] | None
    write_phi: Callable[[Gradient, Tensor], None] | None

    def inner(self, *state: Any) -> Tensor:
        """The guide's loss."""

    def solve(self, state: Any) -> Result:
        """The model's loss, its gradient in θ, and what is carried to the next step."""

    def begin_inner_step(self) -> None:
        """Called before each inner step."""


def stack_report(*values: Tensor | float) -> Tensor:
    """What a step tells of itself, in one tensor: to read numbers out one by one takes longer than to compute them."""
    first = values[0]
    assert isinstance(first, Tensor)
    # a number is made where the rest is computed: a tensor of its own would be one more input of a captured step
    each = [x.detach().to(first) if isinstance(x, Tensor) else first.detach().new_full((), x) for x in values]
    return torch.stack(each)


def apply_or_return(
    write: Callable[[Gradient, Tensor], None] | None, gradient: Gradient, allowed: Any
) -> list[Tensor | bool | None]:
    """What of an optimiser's step is left to torch: the gradient; where ``write`` takes it, which leaves have moved."""
    if write is None:
        return list(gradient)
    write(gradient, allowed)
    return [g is not None for g in gradient]


def evaluate_inner(problem: StepProblem, *state: Any) -> list[Any]:
    """G and ‖∇_φ G‖; nothing moves."""
    loss, gradient = value_and_grad(problem.inner, problem.phi, *state)
    return [stack_report(loss, norm(gradient))]


def inner_step(problem: StepProblem, *state: Any, allowed: Any = True) -> list[Any]:
    """A step of φ: G, ‖∇_φ G‖ and the gradient; or, in its place, which leaves the graph itself has moved."""
    loss, gradient = value_and_grad(problem.inner, problem.phi, *state)
    length = norm(gradient)
    allowed = loss.isfinite() & length.isfinite() & allowed
    return [stack_report(loss, length), *apply_or_return(problem.write_phi, gradient, allowed)]


def outer_step(problem: StepProblem, state: Any, allowed: Any = True) -> list[Any]:
    """A step of θ: the loss, ‖dJ/dθ‖, residual, curvature; what is carried on; and the gradient.

    Run as it is it moves nothing. Captured with Adam it takes the step itself, where all is finite, and tells which
    leaves it has moved in the gradient's place.
    """
    found = problem.solve(state)
    length = norm(found.gradient)
    allowed = found.loss.isfinite() & length.isfinite() & allowed
    report = stack_report(found.loss, length, found.residual, found.curvature)
    return [report, found.state, *apply_or_return(problem.write_theta, found.gradient, allowed)]


@cache
def all_steps(num_inner: int) -> Callable[[StepProblem, Any], list[Any]]:
    """So many inner steps and an outer one, which a captured graph takes itself.

    It returns what all have told, one after the other, what is carried on, and which leaves of φ and of θ have moved.
    Nothing moves after a step that is not finite.
    """

    def solve(problem: StepProblem, state: Any) -> list[Any]:
        reports: list[Tensor] = []
        moved: list[Any] = []
        allowed: Any = True
        for _ in range(num_inner):
            report, *moved = inner_step(problem, state, allowed=allowed)
            reports.append(report)
            allowed = report.isfinite().all() & allowed
        report, state, *also_moved = outer_step(problem, state, allowed)
        return [torch.cat([*reports, report]), state, *moved, *also_moved]

    return solve


class Outer(NamedTuple):
    """What an outer step found: J, ‖dJ/dθ‖, the solver's residual and curvature, what is carried on, what is left."""

    loss: float
    length: float
    residual: float
    curvature: float
    state: Any
    left: Sequence[Any]


class Executor(ABC):
    """How the steps of one problem are run."""

    problem: Any

    @abstractmethod
    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(problem, *args)``."""

    @abstractmethod
    def move_phi(self, left: Sequence[Any]) -> None:
        """The rest of an inner step: the optimiser's own, or its books alone where a graph has moved φ.

        :param left: what :func:`inner_step` gave after its report.
        """

    @abstractmethod
    def move_theta(self, left: Sequence[Any]) -> None:
        """The rest of an outer step, in the same way."""

    def look(self, *state: Any) -> tuple[float, float]:
        """G and ‖∇_φ G‖."""
        (report,) = self.run(evaluate_inner, *state)
        loss, length = report.tolist()
        return loss, length

    def fit(self, *state: Any) -> tuple[float, float]:
        """One inner step on φ: G and ‖∇_φ G‖. Nothing moves where these are not finite."""
        self.problem.begin_inner_step()
        report, *left = self.run(inner_step, *state)
        loss, length = report.tolist()
        if math.isfinite(loss) and math.isfinite(length):
            self.move_phi(left)
        return loss, length

    def solve(self, state: Any) -> Outer:
        """The outer step's gradient. θ is moved by :meth:`move_theta`, or was by the graph, if that was allowed to."""
        report, state, *left = self.run(outer_step, state)
        loss, length, residual, curvature = report.tolist()
        return Outer(loss, length, residual, curvature, state, left)

    def take(self, num_inner: int, state: Any) -> tuple[list[tuple[float, float]], Outer | None]:
        """:meth:`fit` so many times, and :meth:`solve`; None in its place after an inner step that is not finite."""
        inner = []
        for _ in range(num_inner):
            inner.append(self.fit(state))
            if not all(map(math.isfinite, inner[-1])):
                return inner, None
        return inner, self.solve(state)


class Eager(Executor):
    """Runs each function as it is; the optimisers take their own steps."""

    def __init__(self, problem: StepProblem, outer_optim: PyroOptim, inner_optim: PyroOptim):
        self.problem = problem
        self._outer_optim, self._inner_optim = outer_optim, inner_optim
        self._is_first = True

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        # The first pass of a step shows Pyro's own checks the new data and parameters. The later ones differ in their
        # noise, and a guide that goes astray between them is caught by its gradient.
        with nullcontext() if self._is_first else pyro.validation_enabled(False):
            self._is_first = False
            return function(self.problem, *args)

    def move_phi(self, left: Sequence[Any]) -> None:
        descend(self._inner_optim, self.problem.phi, left)

    def move_theta(self, left: Sequence[Any]) -> None:
        descend(self._outer_optim, self.problem.theta, left)
