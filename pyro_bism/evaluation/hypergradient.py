r"""How far the hypergradient is from the marginal's own gradient, and what to change where it is."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from ..bism import BiSM
from ..brief import named
from ..losses import loss_by_example
from ..programs.modes import in_own_modes
from ..programs.pair import ModelAndGuide
from ..programs.records import per_example
from ..programs.visible import Batch
from ..training.trainer import Buffers
from .comparison import CLOSE, PART, Compared, HypergradientError, judged
from .guide_draws import check_latents


@in_own_modes
def hypergradient_error(
    trained: Any,
    *args: Any,
    num_draws: int = 500,
    num_particles: int | None = None,
    num_fit: int = 50,
    progress_bar: bool = True,
    **kwargs: Any,
) -> HypergradientError:
    r"""How far off training's hypergradients are from here on, and a verdict in one sentence. Nothing is updated.

    A copy of the run is trained further, and at every step its strategy's dJ/dθ is compared with the gradient of the
    same loss of the marginal, whose score comes from importance-weighted draws of the guide, the sites that it relaxes
    or sums out drawn as discrete ones,

    .. math:: \nabla_v \log \tfrac1L \sum_l \frac{\tilde p(v, h_l; θ)}{q(h_l|v)},

    the draws and the weights' denominators fixed (the bound of Burda, Grosse, Salakhutdinov 2016, with the jackknife of
    Nowozin 2018). It needs no second derivative of the guide, no inner problem, and no knowledge of the strategy; two
    halves of the draws are multiplied where the loss squares the score, so that the noise in them adds no bias. Rows
    and noise are shared with the strategy. What noise is left averages out over the steps, and so does the guide's
    jitter, which does training no harm. A bias of order 1/L² is left, of third cumulants where the loss differentiates
    the score, of all where the guide is far from the posterior: see ``effective``.

    Then the model stands still, the guide catches up, and both are compared again: an error that falls is one of a
    guide that lags behind; one that stays, with a guide at the posterior, is the strategy's.

    Errors are taken as Adam sees them: every entry of the gradient in units of its root mean square over the steps. At
    the end of training there may be no gradient to be wrong about: the draws can't tell then.

    :param trained: a BiSM.
    :param args: arguments of model and guide, as for ``bism.step``.
    :param num_draws: steps compared at most, 50 at least; it stops where the standard error is below 0.03.
    :param num_particles: L, both halves together; None takes 8, or 64 under a loss that differentiates the score.
    :param num_fit: steps that the guide is given to catch up, each of the K of training; 0 leaves the second part out.
    :param progress_bar: whether to show how many steps were compared.
    :param kwargs: keyword arguments of model and guide.
    :raises ValueError: for what is no BiSM, or where the guide's density is not known.
    :raises FloatingPointError: where a gradient is not finite.
    """
    if not isinstance(trained, BiSM):
        raise ValueError(f"hypergradient_error: {named(trained)} has no hypergradient. Pass a BiSM.")
    if num_particles is None:
        num_particles = 64 if trained.loss.differentiates_score else 8
    if num_draws < 1 or num_particles < 2 or num_fit < 0:
        raise ValueError(
            f"num_draws must be at least 1, num_particles at least 2, and num_fit not negative, got {num_draws}, "
            f"{num_particles} and {num_fit}."
        )
    pair, leaves, spec = trained._prepare(args, kwargs)
    theta = list(pair.theta.values())

    def stepped(held: Sequence[Tensor] | None) -> None:
        """A step of training, or of training with the model held where it is."""
        trained.step(*args, **kwargs)
        if held is not None:
            with torch.no_grad():
                for p, value in zip(theta, held, strict=True):
                    p.copy_(value)

    def compared(held: Sequence[Tensor] | None, bar: Any) -> Compared:
        sums: Compared | None = None
        for i in range(-(-num_draws // PART) * PART):
            stepped(held)
            with Buffers(pair.buffers), pyro.validation_enabled(False):
                found = _both(trained, pair, pair.batch(leaves, spec), num_particles)
            sums = found if sums is None else sums.plus(found)
            bar.update()
            if (i + 1) % PART == 0:
                sums.require_finite()
                if sums.error()[1] < CLOSE:  # not where there is none
                    break
        return cast(Compared, sums)

    with _kept(trained), tqdm(disable=not progress_bar, desc="hypergradient", unit="step") as bar:
        before, after = compared(None, bar), None
        if num_fit:
            held = [p.detach().clone() for p in theta]
            for _ in range(num_fit):
                stepped(held)
            after = compared(held, bar)
    return judged(before, after, num_fit, trained.hypergradient)


@contextmanager
def _kept(trained: BiSM) -> Iterator[None]:
    """All of a run, the random state too, is at the end what it was."""
    state, info = trained.get_state(), trained.info
    try:
        yield
    finally:
        trained.set_state(state)
        trained.info = info


def _both(trained: BiSM, pair: ModelAndGuide, batch: Batch, num_particles: int) -> Compared:
    """Both gradients on one batch."""
    loss, theta, phi = trained.loss, list(pair.theta.values()), list(pair.phi.values())
    noise = loss.draw(batch.v)
    problem = trained._problem(pair, batch, theta, phi, _Drawn(loss, noise))
    if trained._strategy.repeats_noise:
        for _ in range(trained.num_inner_steps):
            problem.inner_noise.append(problem.snapshot())
            torch.rand((), device=batch.v.device)  # the next one's is another
    assert trained._method_state is not None  # a step was taken
    found = trained._strategy(problem, *trained._method_state)
    value, gap, effective = marginal_loss(pair, batch, loss, noise, num_particles)
    reference = torch.autograd.grad(value, theta, allow_unused=True)
    numbers = [
        {
            name: np.zeros(p.shape) if g is None else g.detach().cpu().double().numpy()
            for (name, p), g in zip(pair.theta.items(), each, strict=True)
        }
        for each in (found.gradient, reference)
    ]
    hypergradient, exact = numbers
    sums = {name: np.stack([d, r, d**2, r**2]) for name, r in exact.items() for d in [hypergradient[name] - r]}
    return Compared(1, sums, float(gap), float(effective))


class _Drawn:
    """An outer loss whose noise is drawn already."""

    def __init__(self, loss: Any, noise: Any):
        self.loss, self.noise = loss, noise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loss, name)

    def __call__(self, *args: Any) -> Any:
        return self.loss(*args)

    def draw(self, v: Tensor) -> Any:
        return self.noise


def marginal_loss(
    pair: ModelAndGuide, batch: Batch, loss: Any, noise: Any, num_particles: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The outer loss of the importance-weighted marginal, a mean over the batch.

    :returns: the loss, and of all draws the gap from guide to posterior in nats and their effective share.
    """
    v, n = loss.perturb(batch.v, noise).detach(), len(batch.v)

    def draw() -> tuple[Any, Tensor]:
        values = pair.draw_discrete(batch, v)
        with torch.no_grad():
            sites = pair.guide_at(batch, v, values, discretize=True)
        check_latents(sites, n)
        # a latent that is computed from other draws (Delta) carries their change of volume
        log_q: Any = sum(per_example(site, n) for site in sites.values())
        return values, log_q.detach()

    size = num_particles // 2
    draws = [draw() for _ in range(2 * size)]

    def log_weights(u: Tensor, some: Sequence[tuple[Any, Tensor]]) -> Tensor:
        return torch.stack([pair.log_joint(batch, u, values) - log_q for values, log_q in some])

    seen = []

    def score(u: Tensor) -> Tensor:
        u = u if u.requires_grad else u.detach().requires_grad_()

        def half(some: Sequence[tuple[Any, Tensor]]) -> Tensor:
            w = log_weights(u, some)
            seen.append(w.detach())
            return torch.autograd.grad(_log_mean(w).sum(), u, create_graph=True)[0]

        return torch.stack([half(draws[:size]), half(draws[size:])])

    value = loss_by_example(loss, score, batch.v, noise).mean()
    w = torch.cat(seen[:2])
    bound = w.logsumexp(0) - math.log(2 * size)
    effective = (2 * w.logsumexp(0) - (2 * w).logsumexp(0)).exp() / (2 * size)
    return value, (bound - w.mean(0)).mean(), effective.mean()


def _log_mean(log_weights: Tensor) -> Tensor:
    """The log of the weights' mean by the jackknife, draws first: a bias of order 1/L² is left in place of 1/L."""
    num = len(log_weights)
    if num == 1:
        return log_weights[0]
    itself = torch.eye(num, dtype=torch.bool, device=log_weights.device).unsqueeze(-1)
    without = log_weights.masked_fill(itself, -math.inf).logsumexp(1) - math.log(num - 1)  # without the i-th
    return num * (log_weights.logsumexp(0) - math.log(num)) - (num - 1) * without.mean(0)
