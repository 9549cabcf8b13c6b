"""Exact and Covariance: the gradient from a property of the posterior, no inner problem differentiated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from ..losses import OuterLoss, loss_by_example
from ..programs.pair import ModelAndGuide, mean_slope
from ..programs.visible import Batch
from .problem import Bilevel, Hypergradient, Result

__all__ = ["Covariance", "Exact"]


@dataclass(frozen=True)
class Exact(Hypergradient):
    """The gradient where q(h|v; φ) *is* the posterior p(h|v; θ): no inner problem has to be differentiated.

    The marginal's score then has ∂_θ s(v) = ∇_v E_{q(h|v)}[∂_θ log p̃(v, h; θ)] (Fisher's identity), the derivative in v
    taken through q as well: through the weights of summed-out sites, and through the draws of the others. Away from the
    posterior it is as wrong as the guide is. The score is averaged over the draws, as under ``average="score"``,
    unless the loss has ``average="unbiased"``.
    """

    differentiates_inner = False

    def check(self, loss: Any, pair: Any) -> None:
        relaxed = sorted(pair.relaxed_sites.difference(pair.averaged))
        if relaxed:
            raise ValueError(
                f"Exact() asks for a guide that is the posterior; the relaxed sites {relaxed} never are. "
                "Sum them out: infer={'enumerate': 'parallel'} and inner_loss=TraceEnum_ELBO()."
            )

    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any, state: Any) -> Result:
        phi = problem.optim.get_params(inner_state)

        def loss(theta: Any) -> Array:
            params, fixed = problem.params(theta, phi), problem.params(jax.lax.stop_gradient(theta), phi)
            return posterior_loss(rng_key, problem.pair, params, fixed, problem.batch, problem.loss)

        return Result(*jax.value_and_grad(loss)(theta))


@dataclass(frozen=True)
class Covariance(Hypergradient):
    """The score's gradient as a covariance under the guide (VaGES; Bao et al. 2021, arXiv:2010.08258).

    ∂_θ s(v) ≈ E_q[∂_θ ∇_v log p̃(v, h)] + Cov_q(∇_v log p̃(v, h), ∂_θ log p̃(v, h)), the sample covariance of L draws with
    its L - 1, which is the estimate with every draw's leave-one-out mean as control variate; the score itself is
    the mean of ∇_v log (p̃/q) over the same draws. Unbiased at the posterior. No inner problem is differentiated and no
    draw has to be reparameterised: sites may be discrete, and those that are relaxed or summed out in the inner
    loss are drawn as discrete here. For losses that read the score at one point (denoising ones).

    :param num_particles: L, at least 2.
    """

    num_particles: int = 2

    differentiates_inner = False
    reparameterises = False

    def __post_init__(self) -> None:
        if self.num_particles < 2:
            raise ValueError(f"num_particles must be at least 2 for a covariance, got {self.num_particles}.")

    def check(self, loss: Any, pair: Any) -> None:
        if loss.differentiates_score:
            raise ValueError(
                f"{type(loss).__name__} differentiates the score, of which Covariance() estimates only the value. Use "
                "DenoisingScoreMatching, MultiscaleDenoisingScoreMatching, or another hypergradient."
            )
        if loss.average == "unbiased":
            raise ValueError(
                "Covariance() makes one estimate of the score from all its draws, and average='unbiased' multiplies "
                "two. Take average='score', or another hypergradient."
            )

    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any, state: Any) -> Result:
        phi = problem.optim.get_params(inner_state)

        def loss(theta: Any) -> Array:
            params, fixed = problem.params(theta, phi), problem.params(jax.lax.stop_gradient(theta), phi)
            return covariance_loss(
                rng_key, problem.pair, params, fixed, problem.batch, problem.loss, self.num_particles
            )

        return Result(*jax.value_and_grad(loss)(theta))


def posterior_loss(
    rng_key: Array,
    pair: ModelAndGuide,
    params: Mapping[str, Any],
    fixed: Mapping[str, Any],
    batch: Batch,
    loss: OuterLoss,
) -> Array:
    """J, with the derivative in θ that it has where q(h|v) is the posterior p(h|v; θ).

    There ∂_θ log p̃(v) = E_{q(h|v)}[∂_θ log p̃(v, h)] at every v (Fisher's identity), so its gradient in v, taken
    through q too, is ∂_θ of the marginal's score.

    :param fixed: ``params`` without a path to θ.
    """
    key_noise, key_draw, key_score = jax.random.split(rng_key, 3)
    noise = loss.draw(key_noise, batch.v)
    num = loss.num_particles
    keys = jax.random.split(key_draw, num)
    draws = jax.vmap(lambda key: pair.draw(key, fixed, batch, loss.perturb(batch.v, noise))[0])(keys)
    value = pair.score(key_score, fixed, batch, draws, loss, num)

    def slope(given: Mapping[str, Any]) -> Callable[[Array], Array]:
        def log_joint(u: Array, key: Array) -> Array:
            draw, _ = pair.draw(key, fixed, batch, u)  # at u: h moves with it
            return pair.log_weight(key_score, given, batch, u, draw, guide=False)

        return mean_slope(log_joint, keys, loss)

    def score(u: Array) -> Array:
        # the difference is 0; its derivative in θ is the score's
        return value(u) + slope(params)(u) - slope(fixed)(u)

    return loss_by_example(loss, score, batch.v, noise).mean()


def covariance_loss(
    rng_key: Array,
    pair: ModelAndGuide,
    params: Mapping[str, Any],
    fixed: Mapping[str, Any],
    batch: Batch,
    loss: OuterLoss,
    num_particles: int,
) -> Array:
    """J, with the derivative in θ that VaGES estimates (Bao et al. 2021): see ``Covariance``.

    :param fixed: ``params`` without a path to θ.
    """
    key_noise, key_draw, key_score = jax.random.split(rng_key, 3)
    key_model, key_guide = jax.random.split(key_score)
    noise = loss.draw(key_noise, batch.v)
    v = loss.perturb(batch.v, noise)

    def log_guide(u: Array, values: Mapping[str, Array], keys: Sequence[Array]) -> Any:
        values = pair.fixed_latents(key_guide, fixed, batch, u, values, keys)
        sites = pair.guide_at(key_guide, fixed, batch, u, values, keys, discretize=True)
        return sum(site.log_prob().sum() for site in sites.values())

    def one(drawn: tuple[Mapping[str, Array], Sequence[Array]]) -> tuple[Array, Array, Array]:
        values, keys = drawn

        def model_score(u: Array) -> Array:
            slope: Array = jax.grad(lambda u: pair.log_joint(key_model, params, batch, u, values).sum())(u)
            return slope

        log_joint = pair.log_joint(key_model, params, batch, v, values)
        return model_score(v), log_joint, jax.grad(log_guide)(v, values, keys)

    keys = jax.random.split(key_draw, num_particles)
    model_scores, log_joints, guide_scores = jax.vmap(lambda key: one(pair.draw_discrete(key, fixed, batch, v)))(keys)
    fixed_scores = jax.lax.stop_gradient(model_scores)
    centred = fixed_scores - fixed_scores.mean(0)

    def score(u: Array) -> Array:
        # ... of which only the derivative in θ is at stake: the values of the other two add up to 0
        value = (fixed_scores - jax.lax.stop_gradient(guide_scores)).mean(0)
        varying = log_joints - jax.lax.stop_gradient(log_joints)
        covariance = (centred * varying[..., None]).sum(0) / (num_particles - 1)
        return value + (model_scores - fixed_scores).mean(0) + covariance

    return loss_by_example(loss, score, batch.v, noise).mean()
