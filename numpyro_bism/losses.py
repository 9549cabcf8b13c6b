r"""Outer losses: score matching of a score function s(v) = ∇_v log p(v), up to no constant at all.

Each is minimised where s is the score of the data (of the noisy data, for the denoising two). The
functions take a score function and its noise; they know nothing of latents, guides or
randomness, so that the same function serves training and evaluation. ``v`` and the scores are matrices
of shape (n, D), one row an example, all visible sites side by side. Every function returns shape (n,).

A score function may also give L independent unbiased estimates of the score, of shape (L, n, D)
(``average="unbiased"``). The parts of a loss that are linear in the score then take their mean, and its square the mean
product of two different ones, so that the loss is estimated without bias:

.. math:: \tfrac12 \|s\|^2 \to \frac{1}{2 L (L - 1)} \sum_{k \ne l} s_k^\top s_l
          = \tfrac12 \|\bar s\|^2 - \frac{1}{2 L (L - 1)} \sum_k \|s_k - \bar s\|^2
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from .brief import lacking, named

__all__ = [
    "DenoisingScoreMatching",
    "MultiscaleDenoisingScoreMatching",
    "Noise",
    "OuterLoss",
    "ScoreMatching",
    "SlicedScoreMatching",
    "denoising",
    "exact",
    "multiscale_denoising",
    "require_outer_loss",
    "sliced",
]

Score = Callable[[Array], Array]


def _half_square(s: Array) -> Array:
    """½‖s‖² of every example, shape (n,); of several estimates, shape (L, n, D), without bias."""
    if s.ndim == 2:
        return 0.5 * jnp.square(s).sum(-1)
    mean = s.mean(0)
    spread = jnp.square(s - mean).sum((0, -1)) / (len(s) * (len(s) - 1))
    return 0.5 * (jnp.square(mean).sum(-1) - spread)


def _mean(s: Array) -> Array:
    """The score, shape (n, D): the mean of several estimates."""
    return s if s.ndim == 2 else s.mean(0)


def exact(score: Score, v: Array) -> Array:
    r""":math:`\tfrac12 \|s(v)\|^2 + \mathrm{tr}\,\nabla s(v)` (Hyvärinen 2005, Theorem 1).

    Costs D Jacobian-vector products, batched. The score of one example must not depend on another example.

    :param score: maps rows of shape (n, D) to their scores, of the same shape; or to several estimates, (L, n, D).
    :param v: the data, shape (n, D).
    """
    s, jvp = jax.linearize(score, v)
    rows = jnp.eye(v.shape[1], dtype=v.dtype)
    # the i-th product moves coordinate i of every example at once
    diagonal = jax.vmap(lambda e, i: _mean(jvp(jnp.broadcast_to(e, v.shape)))[:, i])(rows, jnp.arange(v.shape[1]))
    return _half_square(s) + diagonal.sum(0)


def sliced(score: Score, v: Array, projections: Array) -> Array:
    r""":math:`\tfrac12 \|s(v)\|^2 + \frac1M \sum_m w_m^\top \nabla s(v)\, w_m`, projections of shape (M, n, D).

    The variance-reduced form (Song, Garg, Shi, Ermon 2019, arXiv:1905.07088): the squared
    norm is taken exactly, since E[w wᵀ] = I for Gaussian and Rademacher projections.

    :param score: maps rows of shape (n, D) to their scores, of the same shape; or to several estimates, (L, n, D).
    :param v: the data, shape (n, D).
    :param projections: the directions w, shape (M, n, D): M for each example.
    """
    s, jvp = jax.linearize(score, v)
    trace: Array = jax.vmap(lambda w: (_mean(jvp(w)) * w).sum(-1))(projections).mean(0)
    return _half_square(s) + trace


def denoising(score: Score, v: Array, noise: Array, *, sigma: float) -> Array:
    r""":math:`\tfrac12 \|s(v + \sigma \epsilon) + \epsilon / \sigma\|^2` (Vincent 2011).

    Minimised by the score of the data convolved with N(0, σ² I).

    :param score: maps rows of shape (n, D) to their scores, of the same shape; or to several estimates, (L, n, D).
    :param v: the clean data, shape (n, D).
    :param noise: ε, standard normal, in the shape of v.
    :param sigma: σ, the standard deviation of the noise, in the units of v.
    """
    residual = score(v + sigma * noise) + noise / sigma
    return _half_square(residual)


def multiscale_denoising(score: Score, v: Array, noise: Array, sigma: Array, *, sigma0: float) -> Array:
    r""":math:`\tfrac12 \|s(v + \sigma \epsilon) / \sigma + \epsilon / \sigma_0^2\|^2`, σ of shape (n, 1).

    Li, Chen, Sommer 2019 (arXiv:1910.07762), with weight 1/σ²: one energy, scored against a
    Gaussian of fixed scale σ₀ at all noise levels. With σ = σ₀ throughout it is ``denoising`` / σ₀².

    :param score: maps rows of shape (n, D) to their scores, of the same shape; or to several estimates, (L, n, D).
    :param v: the clean data, shape (n, D).
    :param noise: ε, standard normal, in the shape of v.
    :param sigma: σ, the noise level of every example, shape (n, 1), in the units of v.
    :param sigma0: σ₀, the one scale that the energy is scored at, in the units of v.
    """
    residual = score(v + sigma * noise) / sigma + noise / sigma0**2
    return _half_square(residual)


class Noise(NamedTuple):
    """What a loss draws at random for one evaluation: Gaussian noise, noise levels, projections.

    :ivar epsilon: ε, standard normal, shape (n, D); None for a loss that does not perturb v.
    :ivar sigma: the noise level of every example, shape (n, 1), in the units of v; None where it is not drawn.
    :ivar projections: the directions w that the score is sliced along, shape (M, n, D); None for other losses.
    """

    epsilon: Array | None = None
    sigma: Array | None = None
    projections: Array | None = None


Average = Literal["loss", "score", "unbiased"]


def _check_particles(num_particles: int, average: str) -> None:
    if num_particles < 1:
        raise ValueError(f"num_particles must be at least 1, got {num_particles}.")
    if average not in ("loss", "score", "unbiased"):
        raise ValueError(f"average must be 'loss', 'score' or 'unbiased', got {average!r}.")
    if average == "unbiased" and num_particles < 2:
        raise ValueError(
            f"average='unbiased' multiplies the scores of two different draws: num_particles must be at least 2, got "
            f"{num_particles}."
        )


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):  # under vmap and jit there is no number to look at
            continue
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
        """The part of an example's expected loss that depends on no parameter; 0, if not overridden.

        :param num_dims: D, how many visible values an example has.
        """
        return 0.0

    def draw(self, rng_key: Array, v: Array) -> Noise:
        """What one evaluation draws at random; nothing, if not overridden.

        :param rng_key: a JAX random key.
        :param v: the clean data, shape (n, D); the noise has their type.
        """
        return Noise()

    def perturb(self, v: Array, noise: Noise) -> Array:
        """The data as model and guide are given them; v itself, if not overridden.

        :param v: the clean data, shape (n, D).
        :param noise: what :meth:`draw` gave for this evaluation.
        """
        return v

    @abstractmethod
    def __call__(self, score: Score, v: Array, noise: Noise) -> Array:
        """The loss of every example, shape (n,).

        :param score: maps rows of shape (n, D) to their scores, of the same shape; under ``average="unbiased"`` to
            those of L draws of h, (L, n, D).
        :param v: the data, not perturbed yet, shape (n, D).
        :param noise: what :meth:`draw` gave for this evaluation.
        """
        ...


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


@dataclass(frozen=True)
class ScoreMatching(OuterLoss):
    """Exact score matching, see :func:`exact`.

    :param num_particles: L, draws of h a datapoint.
    :param average: what is averaged over the draws; wanted is the loss of s̄ = E_{q(h|v)} s(v, h). ``"loss"`` averages
        the loss, as the BiSM paper does: too great by ½ E‖s(v, h) - s̄‖², the score's variance under q, whatever L is
        (for the multiscale loss, by that over σ²); 0 where q is the posterior. ``"score"`` averages the score first, as
        VaGES does (Bao et al. 2021, arXiv:2010.08258): 1/L of that bias is left, all of it with one draw.
        ``"unbiased"`` multiplies the scores of different draws in place of squaring their mean (a U-statistic): none
        is left, and a square's estimate may be negative; L must be at least 2. Sites that are summed out have no part
        in the variance under the last two. None of the three mends the guide: s̄ is the score of the model's marginal
        where q is the posterior; a guide blind to v has another s̄, however many draws are taken.
    """

    num_particles: int = 1
    average: Average = "loss"

    differentiates_score = True
    needs_uncoupled_examples = True  # its trace is wrong otherwise: checked at the first step

    def __post_init__(self) -> None:
        _check_particles(self.num_particles, self.average)

    def __call__(self, score: Score, v: Array, noise: Noise) -> Array:
        return exact(score, v)


@dataclass(frozen=True)
class SlicedScoreMatching(OuterLoss):
    """Sliced score matching, see :func:`sliced`.

    :param num_projections: M, projections a datapoint.
    :param noise: their distribution, ``"rademacher"`` (less variance) or ``"gaussian"``.
    :param num_particles: as in :class:`ScoreMatching`.
    :param average: as in :class:`ScoreMatching`.
    """

    num_projections: int = 1
    noise: Literal["rademacher", "gaussian"] = "rademacher"
    num_particles: int = 1
    average: Average = "loss"

    differentiates_score = True

    def __post_init__(self) -> None:
        _check_particles(self.num_particles, self.average)
        if self.num_projections < 1:
            raise ValueError(f"num_projections must be at least 1, got {self.num_projections}.")
        if self.noise not in ("rademacher", "gaussian"):
            raise ValueError(f"noise must be 'rademacher' or 'gaussian', got {self.noise!r}.")

    def draw(self, rng_key: Array, v: Array) -> Noise:
        w = jax.random.normal(rng_key, (self.num_projections, *v.shape), v.dtype)
        # the sign of a Gaussian is a Rademacher draw
        signs = jnp.where(w < 0, -1.0, 1.0).astype(v.dtype)  # with x64 they would be float64
        return Noise(projections=signs if self.noise == "rademacher" else w)

    def __call__(self, score: Score, v: Array, noise: Noise) -> Array:
        assert noise.projections is not None
        return sliced(score, v, noise.projections)


@dataclass(frozen=True)
class DenoisingScoreMatching(OuterLoss):
    """Denoising score matching, see :func:`denoising`.

    Nearly all of its value may be the constant D/(2σ²) (:meth:`constant`). Progress shows in ``BiSMInfo.varying_loss``,
    where it is taken off: that falls to -½ E‖∇ log p_σ‖², p_σ the density of the noisy data.

    :param sigma: standard deviation of the noise, in the units of v. The density learnt is that of v with this noise:
        see ``noise`` of :func:`numpyro_bism.kernel_stein_discrepancy`, and :func:`numpyro_bism.denoise`.
    :param num_particles: as in :class:`ScoreMatching`.
    :param average: as in :class:`ScoreMatching`.
    """

    sigma: float
    num_particles: int = 1
    average: Average = "loss"

    def __post_init__(self) -> None:
        _check_particles(self.num_particles, self.average)
        _check_positive(sigma=self.sigma)

    def constant(self, num_dims: int) -> float:
        """D/(2σ²), the part of an example's expected loss that depends on no parameter: E ½‖ε/σ‖².

        :param num_dims: D, how many visible values an example has.
        """
        return num_dims / (2 * self.sigma**2)

    def draw(self, rng_key: Array, v: Array) -> Noise:
        return Noise(epsilon=jax.random.normal(rng_key, v.shape, v.dtype))

    def perturb(self, v: Array, noise: Noise) -> Array:
        assert noise.epsilon is not None
        return v + self.sigma * noise.epsilon

    def __call__(self, score: Score, v: Array, noise: Noise) -> Array:
        assert noise.epsilon is not None
        return denoising(score, v, noise.epsilon, sigma=self.sigma)


@dataclass(frozen=True)
class MultiscaleDenoisingScoreMatching(OuterLoss):
    """Multiscale denoising score matching, see :func:`multiscale_denoising`.

    The noise level of every example is drawn afresh, uniformly between ``sigma_min`` and
    ``sigma_max`` on a geometric or linear scale. (The paper's authors use a fixed grid by position in the batch.)
    Of its value D/(2σ₀⁴) is a constant (:meth:`constant`), as in :class:`DenoisingScoreMatching`.

    :param sigma_min: the least noise level, in the units of v.
    :param sigma_max: the greatest noise level.
    :param sigma0: the scale that the energy is scored at: the density learnt is that of v with noise of this scale.
    :param spacing: ``"geometric"`` or ``"linear"``.
    :param num_particles: as in :class:`ScoreMatching`.
    :param average: as in :class:`ScoreMatching`.
    """

    sigma_min: float
    sigma_max: float
    sigma0: float
    spacing: Literal["geometric", "linear"] = "geometric"
    num_particles: int = 1
    average: Average = "loss"

    def __post_init__(self) -> None:
        _check_particles(self.num_particles, self.average)
        _check_positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max, sigma0=self.sigma0)
        ordered = not isinstance(self.sigma_min, jax.core.Tracer) and not isinstance(self.sigma_max, jax.core.Tracer)
        if ordered and self.sigma_min > self.sigma_max:
            raise ValueError(f"sigma_min ({self.sigma_min}) is above sigma_max ({self.sigma_max}).")
        if self.spacing not in ("geometric", "linear"):
            raise ValueError(f"spacing must be 'geometric' or 'linear', got {self.spacing!r}.")

    def constant(self, num_dims: int) -> float:
        """D/(2σ₀⁴), the part of an example's expected loss that depends on no parameter: E ½‖ε/σ₀²‖².

        :param num_dims: D, how many visible values an example has.
        """
        return num_dims / (2 * self.sigma0**4)

    def draw(self, rng_key: Array, v: Array) -> Noise:
        key_epsilon, key_sigma = jax.random.split(rng_key)
        epsilon = jax.random.normal(key_epsilon, v.shape, v.dtype)
        u = jax.random.uniform(key_sigma, (len(v), 1), v.dtype)
        if self.spacing == "geometric":
            sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** u
        else:
            sigma = self.sigma_min + (self.sigma_max - self.sigma_min) * u
        return Noise(epsilon=epsilon, sigma=sigma)

    def perturb(self, v: Array, noise: Noise) -> Array:
        assert noise.epsilon is not None and noise.sigma is not None
        return v + noise.sigma * noise.epsilon

    def __call__(self, score: Score, v: Array, noise: Noise) -> Array:
        assert noise.epsilon is not None and noise.sigma is not None
        return multiscale_denoising(score, v, noise.epsilon, noise.sigma, sigma0=self.sigma0)
