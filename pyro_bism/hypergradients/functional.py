"""Functional: the inner problem's adjoint in the space of the guide's distributions, not of its parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .linear import pulled_back, ratio
from .problem import Bilevel, Gradient, Hypergradient, Result, Shifted, added, in_theta
from .shifts import shifted_losses
from .tracking import Tracked, untracked

__all__ = ["Functional"]

# in units of the Fisher information: a direction with less curvature is taken for one without, as that of a Hessian
# averaged over a few draws may be by accident; at 0.01 a deep energy ended 2.3 % above the best, at 0.1 0.9 %
FLAT = 0.1

Shifts = Mapping[tuple[str, str], Tensor]


@dataclass(frozen=True)
class Functional(Hypergradient):
    r"""The adjoint example by example, in the parameters of the guide's distributions.

    .. math:: \frac{dJ}{dθ} = \frac{∂J}{∂θ} - \sum_i \frac{∂^2 G_i}{∂θ\,∂δ} y_i,
              \qquad \frac{∂^2 G_i}{∂δ^2} y_i = \frac{∂J}{∂δ_i}

    δ_i shifts the parameters of the distributions that the guide samples from at example i, mapped to the reals
    (functional implicit differentiation: Petrulionytė, Mairal, Arbel 2024, arXiv:2403.20233; there the adjoint is a
    second network, here it is solved for). The guide's network takes no part: its second derivatives are not needed,
    its conditioning does not matter, and nothing drifts in directions that G does not see. The system of an example is
    as small as its latents, its curvature at the posterior is the Fisher information of q, and preconditioned by that
    a few conjugate-gradient steps solve it. Where they meet a direction with next to no curvature in units of F, an
    example's steps end, as in Newton-CG: a guide far from the posterior gives a truncated correction.

    What it assumes: that the guide fits every example by itself, with distributions whose parameters are free and
    independent. Where a network is too rigid for that, or examples share what each would need for itself, dφ*/dθ is
    another. What no parameter of the guide moves (a constant scale) is not shifted. Examples that the model couples
    (batch normalisation) are solved as if they were not.

    δ is a shift, not a slope: how the distributions turn with v is no part of it. E_q s(v, h), s the score at a draw,
    does not depend on that. What does is the score's variance under q, which ``average="loss"`` adds to the loss of
    E_q s (:class:`~pyro_bism.ScoreMatching`): its share is left out. (With it, where q can't be the posterior,
    the exact objective of the marginal ended 1 to 2 % worse.)

    It is for denoising losses, an ELBO inside, and normal, multivariate normal, log-normal, Bernoulli and categorical
    sites. Others are refused before the first step, and so are sites under scales or masks, latents computed from other
    draws, and distributions that depend on another site's draw or on dropout: one shift can't stand for all of them.

    Relaxed sites get F⁻¹ ∂J/∂δ itself, whatever the curvature is: conjugate gradients fail on the Hessian of a few
    relaxed draws. Beside other sites their part of the coupled system is left out.

    ``info.residual`` is that of the examples' systems in the norm of F⁻¹ (of relaxed sites mostly the noise of single
    draws; of the others alone where there are both), ``info.curvature`` the curvature along F⁻¹ ∂J/∂δ in units of F, of
    all examples: 1 where the guide is the posterior; for bits that the energy does not couple, at every guide.

    :param num_particles: draws of h that the Hessian is a mean of, where it is random.
    :param num_steps: conjugate-gradient steps at most.
    :param memory: decay a step of the running mean that is kept of the second term; 0 keeps none. That term is noisy:
        with its mean Adam learns sooner what it alone moves (the biases of hidden units). A mean over a hundred steps
        lags behind where θ moves fast, and left a 560 x 400 RBM with mass far from the data. None finds it, parameter
        by parameter of the model, from how noisy the term is and how far the mean is behind: 0.99 at most
        (:meth:`Tracked.follow <pyro_bism.hypergradients.tracking.Tracked.follow>`).
    """

    cure = "give memory=0, or use Exact() or Detached()"

    num_particles: int = 4
    num_steps: int = 4
    memory: float | None = None

    differentiates_inner = False
    shifts_guide = True

    def __post_init__(self) -> None:
        for name in ("num_particles", "num_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.memory is not None and not 0 <= self.memory < 1:
            raise ValueError(f"memory must be at least 0 and below 1, or None, got {self.memory}.")

    def check(self, loss: Any, pair: Any) -> None:
        if loss.differentiates_score:
            raise ValueError(
                f"{type(loss).__name__} differentiates the score, so that the slope of the guide's distributions in v "
                "matters, which Functional() does not shift. Use a denoising loss, or hypergradient=Exact()."
            )

    def init(self, theta: Sequence[Tensor], phi: Sequence[Tensor]) -> Tracked:
        return untracked(theta)

    def __call__(self, problem: Bilevel, state: Tracked) -> Result:
        shifted = shifted_losses(problem.pair, problem.batch, problem.loss, problem.inner_loss) if problem.phi else None
        if shifted is None or not shifted.zeros:  # φ reaches no distribution
            return in_theta(problem.outer(), problem.theta)._replace(state=state)
        theta, names, leaves = list(problem.theta), list(shifted.zeros), list(shifted.zeros.values())
        outer = shifted.outer(shifted.zeros)
        found = torch.autograd.grad(outer, [*theta, *leaves], allow_unused=True)
        direct, rhs = found[: len(theta)], _shifts(names, found[len(theta) :], leaves)
        draws = [shifted.inner(shifted.zeros) for _ in range(self.num_particles if shifted.is_random else 1)]
        # G and its gradient are evaluated once; every product is a pass back through them
        inner = torch.stack(draws).mean()
        slopes = torch.autograd.grad(inner, leaves, create_graph=True, allow_unused=True)

        def product(y: Shifts) -> Shifts:
            return _shifts(names, pulled_back(slopes, list(y.values()), leaves), leaves)

        y, residual, curvature = _solved(shifted, product, rhs, self.num_steps)
        crosses = pulled_back(slopes, list(y.values()), theta)
        filled = [torch.zeros_like(p) if cross is None else cross for p, cross in zip(theta, crosses, strict=True)]
        new = state.follow(filled, self.memory)
        # None, as the host has it, where neither loss reads a parameter
        gradient = [
            None if part is None and cross is None else added(part, -mean)
            for part, cross, mean in zip(direct, crosses, new.mean, strict=True)
        ]
        return Result(outer.detach(), gradient, new, residual, curvature)


def _shifts(names: Sequence[tuple[str, str]], values: Gradient, like: Sequence[Tensor]) -> Shifts:
    """By name; 0 where there is none."""
    parts = [torch.zeros_like(p) if x is None else x for x, p in zip(values, like, strict=True)]
    return dict(zip(names, parts, strict=True))


def _solved(
    shifted: Shifted, product: Callable[[Shifts], Shifts], rhs: Shifts, num_steps: int
) -> tuple[Shifts, Tensor, Tensor]:
    """y of every example by conjugate gradients preconditioned with F⁻¹; of relaxed sites F⁻¹ ∂J/∂δ.

    :returns: y, its residual relative to the right-hand side, in the norm of F⁻¹, and the mean over the examples of the
        curvature along the first direction, in units of the Fisher information.
    """

    def kept(x: Shifts, are_relaxed: bool) -> Shifts:
        """Those of the relaxed sites, or of the others, and zeros."""
        return {
            key: value if (key[0] in shifted.relaxed) == are_relaxed else torch.zeros_like(value)
            for key, value in x.items()
        }

    def moved(x: Shifts, weights: Tensor, y: Shifts) -> Shifts:
        along = shifted.scaled(weights, y)
        return {key: value + along[key] for key, value in x.items()}

    first = shifted.natural(rhs)
    y, r = kept(first, True), kept(rhs, False)
    if all(site in shifted.relaxed for site, _ in rhs):
        image = product(y)
        size = shifted.dot(rhs, first)
        rest = {key: value - image[key] for key, value in rhs.items()}
        return y, _length(shifted, rest, size), ratio(shifted.dot(y, image).sum(), size.sum())
    z = shifted.natural(r)
    p, p_in_f, square = z, r, shifted.dot(r, z)  # the second is F p
    start, goes_on = square, square > 0
    curvature = torch.zeros_like(square.sum())
    for i in range(num_steps):  # all of them: a captured step has no branches
        image = kept(product(p), False)
        bend = shifted.dot(p, image)
        if i == 0:
            curvature = ratio(bend.sum(), square.sum())
        goes_on = goes_on & (bend > FLAT * shifted.dot(p, p_in_f)) & (square > torch.finfo(square.dtype).eps * start)
        length = torch.where(goes_on, ratio(square, bend), 0.0)
        y, r = moved(y, length, p), moved(r, -length, image)
        z = shifted.natural(r)
        previous, square = square, shifted.dot(r, z)
        weight = torch.where(goes_on, ratio(square, previous), 0.0)
        p, p_in_f = moved(z, weight, p), moved(r, weight, p_in_f)
    return y, _length(shifted, r, start), curvature


def _length(shifted: Shifted, rest: Shifts, start: Tensor) -> Tensor:
    return ratio(shifted.dot(rest, shifted.natural(rest)).sum(), start.sum()).sqrt()
