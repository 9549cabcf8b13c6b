"""Exact and Covariance: the gradient from a property of the posterior, no inner problem differentiated."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..losses import OuterLoss, loss_by_example
from ..programs import params
from ..programs.pair import ModelAndGuide, gradients_of, mean_slope
from ..programs.visible import Batch
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
        relaxed = sorted(pair.relaxed_sites.difference(pair.averaged))
        if relaxed:
            raise ValueError(
                f"Exact() asks for a guide that is the posterior; the relaxed sites {relaxed} never are. "
                "Sum them out: infer={'enumerate': 'parallel'} and inner_loss=TraceEnum_ELBO()."
            )

    def __call__(self, problem: Bilevel, state: Any) -> Result:
        return in_theta(posterior_loss(problem.pair, problem.batch, problem.loss), problem.theta)


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

    def __call__(self, problem: Bilevel, state: Any) -> Result:
        loss = covariance_loss(problem.pair, problem.batch, problem.loss, self.num_particles)
        return in_theta(loss, problem.theta)


def posterior_loss(pair: ModelAndGuide, batch: Batch, loss: OuterLoss) -> Tensor:
    """J, with the derivative in θ that it has where q(h|v) is the posterior p(h|v; θ).

    There ∂_θ log p̃(v) = E_{q(h|v)}[∂_θ log p̃(v, h)] at every v (Fisher's identity), so its gradient in v, taken
    through q too, is ∂_θ of the marginal's score.
    """
    noise = loss.draw(batch.v)
    num = loss.num_particles

    def score(u: Tensor) -> Tensor:
        if not u.requires_grad:
            u = u.detach().requires_grad_()
        # at u: h moves with it
        moving = [pair.draw(batch, u, moves=True)[0] for _ in range(num)]
        still = [draw.detached() for draw in moving]

        def slope() -> Tensor:
            return mean_slope([pair.log_weight(batch, u, draw, guide=False) for draw in moving], u, loss)

        varying = slope()
        if not loss.differentiates_score:
            with params.fixed(pair.theta.values()):
                value = pair.score(batch, still, loss)(u)
            return value.detach() + varying - varying.detach()
        # numbers in θ, but functions of u
        # that require grad still: pyro.module takes a weight that does not for one that is not trained, and says so
        with params.tensors_read_as({leaf: leaf.detach().requires_grad_() for leaf in pair.theta.values()}):
            value = pair.score(batch, still, loss)(u)
            same = slope()
        # the difference is 0; its derivative in θ is the score's
        return value + varying - same

    return loss_by_example(loss, score, batch.v, noise).mean()


def covariance_loss(pair: ModelAndGuide, batch: Batch, loss: OuterLoss, num_particles: int) -> Tensor:
    """J, with the derivative in θ that VaGES estimates (Bao et al. 2021): see ``Covariance``."""
    noise = loss.draw(batch.v)
    v = loss.perturb(batch.v, noise).detach().requires_grad_()
    scores, log_joints, guide_scores = [], [], []
    for _ in range(num_particles):
        values = pair.draw_discrete(batch, v)
        log_joints.append(pair.log_joint(batch, v, values))
        scores.append(torch.autograd.grad(log_joints[-1].sum(), v, create_graph=True)[0])
        with params.fixed(pair.phi.values()):
            guide_sites = pair.guide_at(batch, v, pair.fixed_latents(batch, v, values), discretize=True)
        log_q: Any = sum(site.log_prob().sum() for site in guide_sites.values())
        (guide_score,) = gradients_of(log_q, [v])
        guide_scores.append(torch.zeros_like(v) if guide_score is None else guide_score)
    model_scores, log_joint = torch.stack(scores), torch.stack(log_joints)
    fixed_scores = model_scores.detach()
    centred = fixed_scores - fixed_scores.mean(0)
    value = (fixed_scores - torch.stack(guide_scores)).mean(0)
    # both are 0; their derivatives in θ make up the score's
    covariance = (centred * (log_joint - log_joint.detach()).unsqueeze(-1)).sum(0) / (num_particles - 1)
    score = value + (model_scores - fixed_scores).mean(0) + covariance
    return loss_by_example(loss, lambda _: score, batch.v, noise).mean()
