"""Exact and Covariance: the gradient from a property of the posterior, no inner problem differentiated."""

from dataclasses import dataclass
from typing import Any

from .problem import Bilevel, Hypergradient, Result, in_theta

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
    holds_theta = True

    def check(self, loss: Any, pair: Any) -> None:
        relaxed = sorted(pair.softened.difference(pair.averaged))
        if relaxed:
            raise ValueError(
                f"Exact() asks for a guide that is the posterior; the relaxed sites {relaxed} never are. "
                "Sum them out: infer={'enumerate': 'parallel'} and inner_loss=TraceEnum_ELBO()."
            )

    def __call__(self, problem: Bilevel, state: Any) -> Result:
        return in_theta(problem.posterior(), problem.theta)


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

    def __post_init__(self):
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

    def __call__(self, problem: Bilevel, state: Any) -> Result:
        return in_theta(problem.covariance(self.num_particles), problem.theta)
