"""The bi-level problem as a strategy meets it, and the strategy that looks away from the inner one."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from ..brief import lacking
from ..optim.steps import DifferentiableOptim
from ..programs.params import random_state, set_random_state

__all__ = [
    "Bilevel",
    "Detached",
    "Gradient",
    "Hypergradient",
    "Result",
    "Shifted",
    "norm",
    "require_hypergradient",
    "slopes",
]


class Shifted(NamedTuple):
    """J and G on one perturbed batch, as functions of shifts δ of the guide's distributions, by site and parameter.

    :ivar zeros: δ = 0, leaves to differentiate by.
    :ivar outer: J(δ), the same noise at every call.
    :ivar inner: G(δ), with fresh draws.
    :ivar natural: n F⁻¹ x, with F the Fisher information of the guide's distributions.
    :ivar dot: inner products of shifts, example by example: (n,).
    :ivar scaled: (weights of the examples, x) to x with these weights.
    :ivar relaxed: the sites that are relaxed.
    :ivar is_random: whether G draws latents.
    """

    zeros: Mapping[tuple[str, str], Tensor]
    outer: Callable[[Any], Tensor]
    inner: Callable[[Any], Tensor]
    natural: Callable[[Any], Any]
    dot: Callable[[Any, Any], Tensor]
    scaled: Callable[[Tensor, Any], Any]
    relaxed: frozenset[str]
    is_random: bool


@dataclass
class Bilevel:
    """The two losses on one batch, each drawing its own noise, and the tensors that they depend on.

    :ivar outer: J at the parameters in force.
    :ivar inner: G at the parameters in force.
    :ivar posterior: J, with the derivative in θ that it has where q(h|v) is the posterior.
    :ivar covariance: the same, from a sample covariance of the given number of draws.
    :ivar shifted: gives both on shifted distributions.
    :ivar at: the context that puts given tensors in φ's place.
    :ivar placed: the context that puts given values into φ itself, where ``at`` does not reach all that reads it; else
        None.
    :ivar optim: the inner optimiser.
    :ivar buffers: module buffers that every pass moves, and that the next may read (the vectors of ``spectral_norm``).
    :ivar inner_noise: a :meth:`snapshot` before each of the K inner steps just taken, if the strategy repeats them.
    :cvar is_captured: whether what runs is being captured: it can't look at the value of a tensor then.
    """

    outer: Callable[[], Tensor]
    inner: Callable[[], Tensor]
    posterior: Callable[[], Tensor]
    covariance: Callable[[int], Tensor]
    shifted: Callable[[], Shifted]
    theta: Sequence[Tensor]
    phi: Sequence[Tensor]
    at: Callable[[Sequence[Tensor]], AbstractContextManager]
    optim: PyroOptim
    inner_noise: list[Any] = field(default_factory=list)
    placed: Callable[[Sequence[Tensor]], AbstractContextManager] | None = None
    buffers: Sequence[Tensor] = ()

    is_captured: ClassVar[bool] = False

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(problem, *args)``: what a captured step replaces by its graph."""
        return function(self, *args)

    def snapshot(self) -> Any:
        """What a pass has beside φ and θ: the random state, and the buffers. From it the same pass can be repeated."""
        return random_state(), [buffer.clone() for buffer in self.buffers]

    def restore(self, snapshot: Any) -> None:
        """Take up a :meth:`snapshot`."""
        noise, values = snapshot
        set_random_state(noise)
        with torch.no_grad():
            for buffer, value in zip(self.buffers, values, strict=True):
                buffer.copy_(value)

    @contextmanager
    def standing_at(self, values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Inside, φ is ``values``; gives the leaves that stand for it, by which to differentiate, inside too."""
        if self.placed is not None:
            with self.placed(values):
                yield list(self.phi)
        else:
            phi = [p.detach().requires_grad_() for p in values]
            with self.at(phi):
                yield phi

    @cached_property
    def steps(self) -> DifferentiableOptim:
        """The inner optimiser's steps from its present state."""
        return DifferentiableOptim(self.optim, self.phi)


Gradient = Sequence[Tensor | None]


class Result(NamedTuple):
    """What a strategy found.

    :ivar loss: J.
    :ivar gradient: dJ/dθ.
    :ivar state: what it carries to the next step.
    :ivar residual: ‖∂²G x - ∂J/∂φ‖ / ‖∂J/∂φ‖ of the linear system; 0 if there is none.
    :ivar curvature: the least curvature of G that the solver met; infinite if it looks at none.
    """

    loss: Tensor
    gradient: Gradient
    state: Any = None
    residual: Tensor | float = 0.0
    curvature: Tensor | float = math.inf


class Hypergradient(Protocol):
    """What BiSM asks of a strategy.

    :cvar differentiates_inner: whether it needs second derivatives of G in φ.
    :cvar unrolls: whether it differentiates the inner optimiser's steps.
    :cvar reparameterises: whether the outer loss's draws of h must carry a path to φ.
    :cvar repeats_noise: whether it wants ``Bilevel.inner_noise``.
    :cvar resets_noise: whether it sets the random state: it is then compiled in parts (``Bilevel.run``), not whole.
    :cvar holds_theta: whether it takes the score as a function in which θ is a number.
    :cvar shifts_guide: whether it asks for ``Bilevel.shifted``: the guide is looked at for it before the first step.
    :cvar cure: what to try where the gradient overflows.
    """

    differentiates_inner: ClassVar[bool] = True
    unrolls: ClassVar[bool] = False
    reparameterises: ClassVar[bool] = True
    repeats_noise: ClassVar[bool] = False
    resets_noise: ClassVar[bool] = False
    holds_theta: ClassVar[bool] = False
    shifts_guide: ClassVar[bool] = False
    cure: ClassVar[str] = "use Detached()"

    def check(self, loss: Any, pair: Any) -> None:
        """:raises ValueError: where the strategy does not fit the outer loss, or the model and its guide."""
        return

    def init(self, theta: Sequence[Tensor], phi: Sequence[Tensor]) -> Any:
        """The state before the first step; None if there is none."""
        return None

    @abstractmethod
    def __call__(self, problem: Bilevel, state: Any) -> Result: ...


def slopes(problem: Bilevel, loss: str, params: str) -> tuple[Tensor, Gradient]:
    """J or G (``"outer"`` or ``"inner"``) and its gradient in θ or φ (``"theta"`` or ``"phi"``)."""
    value, leaves = getattr(problem, loss)(), getattr(problem, params)
    return value.detach(), torch.autograd.grad(value, leaves, allow_unused=True) if leaves else []


def norm(gradient: Gradient) -> Tensor:
    """‖gradient‖ over all parameters, on whichever devices; 0 if there is none."""
    norms = [torch.linalg.vector_norm(g.detach()) for g in gradient if g is not None]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms])) if norms else torch.zeros(())


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


def in_theta(loss: Tensor, theta: Sequence[Tensor]) -> Result:
    return Result(loss.detach(), torch.autograd.grad(loss, theta, allow_unused=True))


def require_hypergradient(strategy: Any) -> None:
    """:raises ValueError: for what is no strategy; a class is none."""
    missing = lacking(strategy, Hypergradient)
    if isinstance(strategy, type) or not callable(strategy) or missing:
        why = f"It lacks {', '.join(missing)}: one" if missing and not isinstance(strategy, type) else "One"
        raise ValueError(
            f"hypergradient={strategy!r} is not a strategy. {why} of your own derives from Hypergradient; pass an "
            "instance, such as Amortized() or Unrolled(5)."
        )


@dataclass(frozen=True)
class Detached(Hypergradient):
    """dJ/dθ ≈ ∂J/∂θ: the guide's dependence on θ is left out (the paper's N = 0).

    Biased unless the guide can reach the posterior *and* the loss is stationary in φ there; the linear-Gaussian
    model shows an error of more than the gradient's own length.
    """

    differentiates_inner = False

    def __call__(self, problem: Bilevel, state: Any) -> Result:
        return in_theta(problem.outer(), problem.theta)
