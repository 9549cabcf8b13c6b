"""What an outer loss is: a Protocol, its noise, and how estimates of a score are squared."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..brief import lacking, named

Score = Callable[[Tensor], Tensor]


def half_square(s: Tensor) -> Tensor:
    """½‖s‖² of every example, shape (n,); of several estimates, shape (L, n, D), without bias.

    :param s: a score, or a residual of one: shape (n, D), or (L, n, D) under ``average="unbiased"``.
    """
    if s.ndim == 2:
        return 0.5 * torch.square(s).sum(-1)
    mean = s.mean(0)
    spread = torch.square(s - mean).sum((0, -1)) / (len(s) * (len(s) - 1))
    return 0.5 * (torch.square(mean).sum(-1) - spread)


def mean_score(s: Tensor) -> Tensor:
    """The score, shape (n, D): the mean of several estimates.

    :param s: shape (n, D), or (L, n, D) under ``average="unbiased"``.
    """
    return s if s.ndim == 2 else s.mean(0)


class Noise(NamedTuple):
    """What a loss draws at random for one evaluation: Gaussian noise, noise levels, projections.

    :ivar epsilon: ε, standard normal, shape (n, D); None for a loss that does not perturb v.
    :ivar sigma: the noise level of every example, shape (n, 1), in the units of v; None where it is not drawn.
    :ivar projections: the directions w that the score is sliced along, shape (M, n, D); None for other losses.
    """

    epsilon: Tensor | None = None
    sigma: Tensor | None = None
    projections: Tensor | None = None


Average = Literal["loss", "score", "unbiased"]


def check_particles(num_particles: int, average: str) -> None:
    if num_particles < 1:
        raise ValueError(f"num_particles must be at least 1, got {num_particles}.")
    if average not in ("loss", "score", "unbiased"):
        raise ValueError(f"average must be 'loss', 'score' or 'unbiased', got {average!r}.")
    if average == "unbiased" and num_particles < 2:
        raise ValueError(
            f"average='unbiased' multiplies the scores of two different draws: num_particles must be at least 2, got "
            f"{num_particles}."
        )


def check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value}.")


class OuterLoss(Protocol):
    """What BiSM asks of an outer loss. One of your own derives from it; ``docs/extending.md`` shows one.

    :ivar num_particles: draws of h a datapoint.
    :ivar average: what is averaged over the draws, see :class:`ScoreMatching`.
    :cvar differentiates_score: whether it takes the score's derivative in v.
    :cvar needs_uncoupled_examples: whether it is wrong where one example's score depends on another.
    """

    num_particles: int = 1
    average: Average = "loss"

    differentiates_score: ClassVar[bool] = False
    needs_uncoupled_examples: ClassVar[bool] = False

    def constant(self, num_dims: int) -> float:
        """The part of an example's expected loss that depends on no parameter; 0 where there is none to be named.

        :param num_dims: D, how many visible values an example has.
        """
        return 0.0

    def draw(self, v: Tensor) -> Noise:
        """What one evaluation draws at random; nothing, if not overridden.

        :param v: the clean data, shape (n, D); the noise has their type and device.
        """
        return Noise()

    def perturb(self, v: Tensor, noise: Noise) -> Tensor:
        """The data as model and guide are given them; v itself, if not overridden.

        :param v: the clean data, shape (n, D).
        :param noise: what :meth:`draw` gave for this evaluation.
        """
        return v

    @abstractmethod
    def __call__(self, score: Score, v: Tensor, noise: Noise) -> Tensor:
        """The loss of every example, shape (n,).

        :param score: maps rows of shape (n, D) to their scores, of the same shape; under ``average="unbiased"`` to
            those of L draws of h, (L, n, D).
        :param v: the data, not perturbed yet, shape (n, D).
        :param noise: what :meth:`draw` gave for this evaluation.
        """
        ...


def loss_by_example(loss: OuterLoss, score: Score, v: Tensor, noise: Any) -> Tensor:
    """The loss of every example, shape (n,), looked at for its shape.

    :param loss: an outer loss.
    :param score: maps rows to their scores, as the loss takes them.
    :param v: the data, not perturbed yet, shape (n, D).
    :param noise: what the loss has drawn for this evaluation.
    :raises ValueError: where the loss gives another shape: its mean would be another loss.
    """
    value = loss(score, v, noise)
    shape = getattr(value, "shape", None)
    if shape != v.shape[:1]:
        found = f"a {type(value).__name__}" if shape is None else f"a loss of shape {tuple(shape)}"
        cure = (
            " Under average='unbiased' a score is that of L draws, of shape (L, n, D): square it with "
            "losses.half_square, and take losses.mean_score of it where the loss is linear in it."
        )
        raise ValueError(
            f"{type(loss).__name__} gave {found}, where one number an example is wanted: ({len(v)},)."
            f"{cure if loss.average == 'unbiased' else ''}"
        )
    return value


def require_outer_loss(loss: Any, cure: str) -> None:
    """Checks that a loss has all that :class:`OuterLoss` names, and is no class.

    :param loss: the argument as the user gave it.
    :param cure: a sentence that says what to pass instead, for the message about what is no loss at all.
    :raises ValueError: where it is not an outer loss.
    """
    if isinstance(loss, type) or not callable(loss):
        raise ValueError(f"loss={named(loss)} is not an outer loss. {cure}")
    if missing := lacking(loss, OuterLoss):
        raise ValueError(
            f"loss={named(loss)} is not an outer loss: it lacks {', '.join(missing)}. One of your own derives from "
            "OuterLoss."
        )
