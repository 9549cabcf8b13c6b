"""Functional: the inner problem's adjoint in the space of the guide's distributions, not of its parameters."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .linear import ratio
from .problem import Bilevel, Hypergradient, Result, Shifted
from .shifts import shifted_losses
from .tracking import Tracked, untracked

__all__ = ["Functional"]

# in units of the Fisher information: a direction with less curvature is taken for one without, as that of a Hessian
# averaged over a few draws may be by accident; at 0.01 a deep energy ended 2.3 % above the best, at 0.1 0.9 %
FLAT = 0.1


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
    E_q s (:class:`~numpyro_bism.ScoreMatching`): its share is left out. (With it, where q can't be the posterior,
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
        (:meth:`Tracked.follow <numpyro_bism.hypergradients.tracking.Tracked.follow>`).
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

    def init(self, theta: Any, optim: Any, inner_state: Any) -> Tracked:
        return untracked(theta)

    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any, state: Tracked) -> Result:
        key_shifted, key_inner = jax.random.split(rng_key)
        phi = problem.optim.get_params(inner_state)
        shifted = _shifted(key_shifted, problem, theta, phi) if jax.tree.leaves(phi) else None
        if shifted is None or not shifted.zeros:  # φ reaches no distribution
            return Result(*jax.value_and_grad(problem.outer, argnums=1)(rng_key, theta, phi), state)
        loss, (direct, rhs) = jax.value_and_grad(shifted.outer, argnums=(0, 1))(theta, shifted.zeros)
        keys = jax.random.split(key_inner, self.num_particles if shifted.is_random else 1)

        def inner(theta: Any, shifts: Any) -> Array:
            if len(keys) == 1:  # no vmap: it would only cost compilation
                return shifted.inner(keys[0], theta, shifts)
            draws: Array = jax.vmap(lambda key: shifted.inner(key, theta, shifts))(keys)
            return draws.mean()

        # G and its gradient are evaluated once; every product is a pullback through them
        _, pullback = jax.vjp(jax.grad(inner, argnums=1), theta, shifted.zeros)
        y, residual, curvature = _solved(shifted, lambda y: pullback(y)[1], rhs, self.num_steps)
        cross, _ = pullback(y)
        new = state.follow(cross, self.memory)
        return Result(loss, jax.tree.map(jnp.subtract, direct, new.mean), new, residual, curvature)


def _shifted(rng_key: Array, problem: Bilevel, theta: Any, phi: Any) -> Shifted:
    def params(theta: Any) -> dict[str, Any]:
        return problem.params(theta, phi)

    return shifted_losses(rng_key, problem.pair, params, problem.batch, problem.loss, problem.inner_loss, theta)


def _solved(shifted: Shifted, product: Any, rhs: Any, num_steps: int) -> tuple[Any, Array, Array]:
    """y of every example by conjugate gradients preconditioned with F⁻¹; of relaxed sites F⁻¹ ∂J/∂δ.

    :returns: y, its residual relative to the right-hand side, in the norm of F⁻¹, and the mean over the examples of the
        curvature along the first direction, in units of the Fisher information.
    """

    def kept(x: Any, are_relaxed: bool) -> Any:
        """Those of the relaxed sites, or of the others, and zeros."""
        return {
            key: value if (key[0] in shifted.relaxed) == are_relaxed else jnp.zeros_like(value)
            for key, value in x.items()
        }

    def moved(x: Any, weights: Array, y: Any) -> Any:
        return jax.tree.map(jnp.add, x, shifted.scaled(weights, y))

    first = shifted.natural(rhs)
    y, r = kept(first, True), kept(rhs, False)
    if all(site in shifted.relaxed for site, _ in rhs):
        image = product(y)
        size = shifted.dot(rhs, first)
        rest = jax.tree.map(jnp.subtract, rhs, image)
        return y, _length(shifted, rest, size), ratio(shifted.dot(y, image).sum(), size.sum())
    z = shifted.natural(r)
    start = shifted.dot(r, z)

    def is_unsolved(carry: tuple[Any, ...]) -> Array:
        i, goes_on, *_ = carry
        unsolved: Array = (i < num_steps) & goes_on.any()
        return unsolved

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, goes_on, curvature, y, r, p, p_in_f, square = carry  # p_in_f is F p
        image = kept(product(p), False)
        bend = shifted.dot(p, image)
        curvature = jnp.where(i == 0, ratio(bend.sum(), square.sum()), curvature)
        goes_on = goes_on & (bend > FLAT * shifted.dot(p, p_in_f))
        length = jnp.where(goes_on, ratio(square, bend), 0.0)
        y, r = moved(y, length, p), moved(r, -length, image)
        z = shifted.natural(r)
        previous, square = square, shifted.dot(r, z)
        weight = jnp.where(goes_on, ratio(square, previous), 0.0)
        goes_on = goes_on & (square > jnp.finfo(square.dtype).eps * start)
        return i + 1, goes_on, curvature, y, r, moved(z, weight, p), moved(r, weight, p_in_f), square

    # one step solves the systems of units that the energy does not couple: a loop ends there
    carry = 0, start > 0, jnp.zeros((), start.dtype), y, r, z, r, start
    _, _, curvature, y, r, *_ = jax.lax.while_loop(is_unsolved, step, carry)
    return y, _length(shifted, r, start), curvature


def _length(shifted: Shifted, rest: Any, start: Array) -> Array:
    return jnp.sqrt(ratio(shifted.dot(rest, shifted.natural(rest)).sum(), start.sum()))
