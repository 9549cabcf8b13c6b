"""The bi-level problem as a strategy meets it, what it finds, and what it has to be."""

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
from ..divergences import perturbed_inner_loss
from ..losses import OuterLoss
from ..optim.steps import DifferentiableOptim
from ..programs.pair import ModelAndGuide
from ..programs.params import random_state, set_random_state
from ..programs.visible import Batch

__all__ = [
    "Bilevel",
    "Gradient",
    "Hypergradient",
    "Result",
    "Shifted",
    "norm",
    "require_hypergradient",
    "value_and_grad",
]


Gradient = Sequence[Tensor | None]


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

    :ivar pair: model and guide.
    :ivar batch: the rows.
    :ivar loss: the outer loss.
    :ivar inner_loss: the inner one, a function of (pair, batch, v).
    :ivar theta: the model's parameters, unconstrained leaves.
    :ivar phi: the guide's.
    :ivar optim: the inner optimiser.
    :ivar strategy: the hypergradient.
    :ivar inner_noise: a :meth:`snapshot` before each of the K inner steps just taken, if the strategy repeats them.
    :ivar is_captured: whether what runs is being captured: it can't look at the value of a tensor then.
    :ivar write_theta: takes θ's optimiser step in place where it is allowed to; None if torch takes it.
    :ivar write_phi: the same for φ.
    """

    pair: ModelAndGuide
    batch: Batch
    loss: OuterLoss
    inner_loss: Callable[..., Tensor]
    theta: Sequence[Tensor]
    phi: Sequence[Tensor]
    optim: PyroOptim
    strategy: Any = None
    inner_noise: list[Any] = field(default_factory=list)
    is_captured: bool = False
    write_theta: Callable[[Gradient, Tensor], None] | None = None
    write_phi: Callable[[Gradient, Tensor], None] | None = None

    def outer(self) -> Tensor:
        """J at the parameters in force: the outer loss with fresh noise and fresh draws of h."""
        return self.pair.outer_loss(self.batch, self.loss)

    def inner(self) -> Tensor:
        """G at the parameters in force: the inner loss at v as the outer loss perturbs it, a mean over the batch."""
        return perturbed_inner_loss(self.loss, self.inner_loss, self.pair, self.batch)

    def solve(self, state: Any) -> "Result":
        """What the strategy finds; ``state`` is what it carried from the last step."""
        found: Result = self.strategy(self, state)
        return found

    def at(self, phi: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """The context that puts these tensors in φ's place.

        :param phi: tensors in the order and the shapes of φ, with a path to whatever they are to be differentiated by.
        """
        return self.pair.at(phi)

    @property
    def is_out_of_reach(self) -> bool:
        """Whether :meth:`at` does not reach all that reads φ, so that values have to be put into φ itself."""
        return bool(self.pair.astray)

    @property
    def buffers(self) -> Sequence[Tensor]:
        """Module buffers that every pass moves, and that the next may read (the vectors of ``spectral_norm``)."""
        return self.pair.buffers

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls ``function(problem, *args)``: what a captured step replaces by its graph.

        :param function: a function of the problem.
        :param args: its other arguments.
        """
        return function(self, *args)

    def begin_inner_step(self) -> None:
        """Keeps the noise of the step to come, for a strategy that repeats it."""
        if self.strategy.repeats_noise:
            self.inner_noise.append(self.snapshot())

    def snapshot(self) -> Any:
        """What a pass has beside φ and θ: the random state, and the buffers. From it the same pass can be repeated."""
        return random_state(), [buffer.clone() for buffer in self.buffers]

    def restore(self, snapshot: Any) -> None:
        """Takes up a :meth:`snapshot`: what runs next has the same random numbers, and the same buffers.

        :param snapshot: what :meth:`snapshot` gave.
        """
        noise, values = snapshot
        set_random_state(noise)
        with torch.no_grad():
            for buffer, value in zip(self.buffers, values, strict=True):
                buffer.copy_(value)

    @contextmanager
    def standing_at(self, values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Inside, φ is ``values``; gives the leaves that stand for it, by which to differentiate, inside too."""
        if self.is_out_of_reach:
            with self.pair.holding_values(values):
                yield list(self.phi)
        else:
            phi = [p.detach().requires_grad_() for p in values]
            with self.at(phi):
                yield phi

    @cached_property
    def steps(self) -> DifferentiableOptim:
        """The inner optimiser's steps from its present state."""
        return DifferentiableOptim(self.optim, self.phi)


class Result(NamedTuple):
    """What a strategy found.

    :ivar loss: J.
    :ivar gradient: dJ/dθ, one for each leaf of θ; None for one that J does not read.
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
    :cvar shifts_guide: whether it shifts the guide's distributions, which are looked at for it before the first step.
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
        """Checks that the strategy fits the outer loss, the model and its guide; it does, if not overridden.

        :param loss: the outer loss.
        :param pair: model and guide, as their first run showed them.
        :raises ValueError: where it does not fit.
        """
        return

    def init(self, theta: Sequence[Tensor], phi: Sequence[Tensor]) -> Any:
        """The state before the first step; None if there is none.

        :param theta: the model's parameters, unconstrained.
        :param phi: the guide's parameters, unconstrained.
        """
        return None

    @abstractmethod
    def __call__(self, problem: Bilevel, state: Any) -> Result:
        """The hypergradient at the fitted guide: J, dJ/dθ, and what is carried to the next step.

        :param problem: the two losses on one batch, and the parameters.
        :param state: what :meth:`init` made before the first step, and the last result's ``state`` from then on.
        """
        ...


def value_and_grad(loss: Callable[..., Tensor], leaves: Sequence[Tensor], *args: Any) -> tuple[Tensor, Gradient]:
    """A loss and its gradient in these leaves; None for a leaf that it does not depend on."""
    value = loss(*args)
    return value.detach(), torch.autograd.grad(value, leaves, allow_unused=True) if leaves else []


def norm(gradient: Gradient) -> Tensor:
    """‖gradient‖ over all parameters, on whichever devices; 0 if there is none."""
    norms = [torch.linalg.vector_norm(g.detach()) for g in gradient if g is not None]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms])) if norms else torch.zeros(())


def added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where None is 0; None if both are."""
    if a is None or b is None:
        return a if b is None else b
    return a + b


def in_theta(loss: Tensor, theta: Sequence[Tensor]) -> Result:
    """A loss and its gradient in θ as the whole result."""
    return Result(loss.detach(), torch.autograd.grad(loss, theta, allow_unused=True))


def require_hypergradient(strategy: Any) -> None:
    """Checks that a hypergradient has all that :class:`Hypergradient` names, and is no class.

    :raises ValueError: where it is no strategy.
    """
    missing = lacking(strategy, Hypergradient)
    if isinstance(strategy, type) or not callable(strategy) or missing:
        why = f"It lacks {', '.join(missing)}: one" if missing and not isinstance(strategy, type) else "One"
        raise ValueError(
            f"hypergradient={strategy!r} is not a strategy. {why} of your own derives from Hypergradient; pass an "
            "instance, such as Amortized() or Unrolled(5)."
        )
