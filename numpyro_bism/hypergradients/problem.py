"""The bi-level problem as a strategy meets it, what it finds, and what it has to be."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from jax import Array

from ..brief import lacking
from ..compiled.steps import Prefetched
from ..divergences import perturbed_inner_loss
from ..losses import OuterLoss
from ..programs.pair import ModelAndGuide
from ..programs.visible import Batch

__all__ = ["Bilevel", "Hypergradient", "Result", "Shifted", "require_hypergradient"]


class Shifted(NamedTuple):
    """J and G on one perturbed batch, as functions of shifts δ of the guide's distributions, by site and parameter.

    :ivar zeros: δ = 0.
    :ivar outer: J(θ, δ), the same noise at every call.
    :ivar inner: G(rng_key, θ, δ).
    :ivar natural: n F⁻¹ x, with F the Fisher information of the guide's distributions.
    :ivar dot: inner products of shifts, example by example: (n,).
    :ivar scaled: (weights of the examples, x) to x with these weights.
    :ivar relaxed: the sites that are relaxed.
    :ivar is_random: whether G draws latents.
    """

    zeros: Any
    outer: Callable[[Any, Any], Array]
    inner: Callable[[Array, Any, Any], Array]
    natural: Callable[[Any], Any]
    dot: Callable[[Any, Any], Array]
    scaled: Callable[[Array, Any], Any]
    relaxed: frozenset[str]
    is_random: bool


@dataclass(frozen=True)
class Bilevel:
    """The two losses on one batch, as functions of (rng_key, θ, φ).

    :ivar pair: model and guide.
    :ivar batch: the rows.
    :ivar loss: the outer loss.
    :ivar inner_loss: the inner one, a function of (rng_key, pair, params, batch, v).
    :ivar mutable: the values of mutable sites.
    :ivar optim: the inner optimiser, in NumPyro's form.
    :ivar inner_keys: the keys of the K inner steps just taken.
    :ivar prefetched: G with the noise of the strategy's own keys, those of ``Hypergradient.noise_keys``; None where
        each step is to draw its own.
    """

    pair: ModelAndGuide
    batch: Batch
    loss: OuterLoss
    inner_loss: Callable[..., Array]
    mutable: Any
    optim: Any
    inner_keys: Array
    prefetched: Prefetched | None = None

    def params(self, theta: Any, phi: Any) -> dict[str, Any]:
        """What the programs are given: constrained, by name.

        :param theta: the model's parameters, unconstrained, by name.
        :param phi: the guide's parameters, unconstrained, by name.
        """
        return self.pair.params(theta, phi, self.mutable)

    def outer(self, rng_key: Array, theta: Any, phi: Any) -> Array:
        """J: the outer loss with fresh noise and fresh draws of h.

        :param rng_key: a JAX random key: J with the same key has the same noise and draws.
        :param theta: the model's parameters, unconstrained, by name.
        :param phi: the guide's parameters, unconstrained, by name.
        """
        return self.pair.outer_loss(rng_key, self.params(theta, phi), self.batch, self.loss)

    def inner(self, rng_key: Array, theta: Any, phi: Any) -> Array:
        """G: the inner loss at v as the outer loss perturbs it, a mean over the batch.

        :param rng_key: a JAX random key: G with the same key has the same noise and draws.
        :param theta: the model's parameters, unconstrained, by name.
        :param phi: the guide's parameters, unconstrained, by name.
        """
        params = self.params(theta, phi)
        return perturbed_inner_loss(rng_key, self.loss, self.inner_loss, self.pair, params, self.batch)


class Result(NamedTuple):
    """What a strategy found.

    :ivar loss: J.
    :ivar gradient: dJ/dθ, a tree like θ.
    :ivar state: what it carries to the next step.
    :ivar residual: ‖∂²G x - ∂J/∂φ‖ / ‖∂J/∂φ‖ of the linear system; 0 if there is none.
    :ivar curvature: the least curvature of G that the solver met; infinite if it looks at none.
    """

    loss: Array
    gradient: Any
    state: Any = None
    residual: Array | float = 0.0
    curvature: Array | float = math.inf


class Hypergradient(Protocol):
    """What BiSM asks of a strategy.

    :cvar differentiates_inner: whether it needs second derivatives of G in φ.
    :cvar unrolls: whether it differentiates the inner optimiser's steps.
    :cvar reparameterises: whether the outer loss's draws of h must carry a path to φ.
    :cvar shifts_guide: whether it shifts the guide's distributions, which are looked at for it before the first step.
    :cvar cure: what to try where the gradient overflows.
    """

    differentiates_inner: ClassVar[bool] = True
    unrolls: ClassVar[bool] = False
    reparameterises: ClassVar[bool] = True
    shifts_guide: ClassVar[bool] = False
    cure: ClassVar[str] = "use Detached()"

    def check(self, loss: Any, pair: Any) -> None:
        """Checks that the strategy fits the outer loss, the model and its guide; it does, if not overridden.

        :param loss: the outer loss.
        :param pair: model and guide, as their first run showed them.
        :raises ValueError: where it does not fit.
        """
        return

    def init(self, theta: Any, optim: Any, inner_state: Any) -> Any:
        """The state before the first step; None if there is none.

        :param theta: the model's parameters, unconstrained, by name.
        :param optim: the inner optimiser, in NumPyro's form.
        :param inner_state: its state, φ among it: ``optim.get_params(inner_state)``.
        """
        return None

    def noise_keys(self, rng_key: Array) -> Array:
        """The keys of the inner steps that it takes by itself, their noise to be drawn beforehand; none by default.

        :param rng_key: the key that the strategy will be called with.
        :returns: keys along the leading axis, in the order of the steps.
        """
        return rng_key[None][:0]

    @abstractmethod
    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any, state: Any) -> Result:
        """The hypergradient at the fitted guide: J, dJ/dθ, and what is carried to the next step.

        :param rng_key: a JAX random key.
        :param problem: the two losses on one batch.
        :param theta: the model's parameters, unconstrained, by name.
        :param inner_state: the inner optimiser's state after the inner steps, the fitted φ among it.
        :param state: what :meth:`init` made before the first step, and the last result's ``state`` from then on.
        """
        ...


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
