"""Variational noise-contrastive estimation: NCE where the latents can't be summed out."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.nn.functional import softplus

from .. import divergences
from ..optim.host import create_optimizers
from ..programs.pair import ModelAndGuide
from ..programs.records import joint_per_example, per_example, record
from ..programs.visible import Batch
from ..training import runaways
from ..training.runaways import Words
from ..training.settings import require_guide, require_optim, same_settings
from .nce import LOG_NORMALIZER, Gaussian, check_noise, check_width
from .rival import Rival
from .target import MarginalTarget

__all__ = ["VNCE", "VNCEInfo"]


class VNCEInfo(NamedTuple):
    """What the last step saw.

    :ivar loss: the loss, a mean over the batch.
    :ivar grad_norm: the length of its gradient in θ and log Z.
    :ivar inner_loss: the guide's loss at its last step, before its update; a mean over the data.
    :ivar inner_grad_norm: the length of its gradient in φ.
    :ivar verdict: 0 as long as training has not run away, else a number; ``in_words`` says it in a sentence.
    """

    loss: float
    grad_norm: float
    inner_loss: float
    inner_grad_norm: float
    verdict: int

    @property
    def in_words(self) -> str:
        """The verdict as a sentence."""
        return runaways.in_words(self.verdict, VNCE.words)

    def __str__(self) -> str:
        return runaways.shown(self, VNCE.words)


class VNCE(Rival):
    r"""Variational noise-contrastive estimation (Rhodes and Gutmann 2019, arXiv:1810.08010).

    A bound of NCE's loss from above, with :math:`r(u, h) = \log \tilde p(u, h; θ) - \log Z - \log q(h|u; φ)`:

    .. math:: -E_{q(h|x)} \log \frac{1}{1 + ν p_n(x)\, e^{-r(x, h)}}
              - \sum_{j=1}^{ν} \log \frac{1}{1 + E_{q(h|y_j)}[e^{r(y_j, h)}] / (ν p_n(y_j))}

    The second expectation is estimated by importance sampling, with ``num_particles`` draws. It does not depend on φ,
    so the guide is fitted to the first term alone, which is least where q is the posterior. Latents that the guide
    marks ``infer={"enumerate": "parallel"}`` are summed over all joint configurations in both.

    :param model: a Pyro program of an unnormalised density p̃(v, h; θ), as BiSM takes it.
    :param guide: a Pyro program of q(h|v; φ), as BiSM takes it.
    :param optim: a ``pyro.optim`` optimiser, for θ and log Z.
    :param noise: as in :class:`NCE`.
    :param num_noise: ν, noise draws a datum.
    :param num_particles: draws of h a datum, and a draw of the noise.
    :param inner_optim: an optimiser for φ; None takes ``optim``'s settings with a state of its own. If they are a
        scheduler's, ``optim.step()`` moves the rates of both levels; one of your own is stepped by you.
    :param inner_loss: another loss for the guide: a differentiable ELBO of Pyro, or :class:`FisherDivergence`.
    :param num_inner_steps: steps of φ for each of θ.
    :param log_normalizer: log Z to start from; None estimates it from the noise.
    :param visible: names of the visible sites; None takes all observed sample sites.
    :param jit: capture the step and compile it, as in :class:`~pyro_bism.BiSM`.
    :raises ValueError: at construction for bad settings, at the first step for misuse.
    """

    sums_latents = False
    info_type = VNCEInfo
    scale = 1.0  # of a classifier that knows nothing, log 2 a decision
    words = Words.of_rival("or more inner steps, so that the guide keeps up, or with noise nearer to the data")

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        noise: Any = None,
        num_noise: int = 1,
        num_particles: int = 1,
        *,
        inner_optim: PyroOptim | None = None,
        inner_loss: Any = None,
        num_inner_steps: int = 1,
        log_normalizer: float | None = None,
        visible: Sequence[str] | None = None,
        jit: bool = False,
    ):
        super().__init__(model, optim, visible, guide, jit)
        require_guide(guide)
        check_noise(noise, num_noise)
        if num_particles < 1 or num_inner_steps < 1:
            raise ValueError(
                f"num_particles and num_inner_steps must be at least 1, got {num_particles} and {num_inner_steps}."
            )
        self.noise = noise
        self.num_noise = num_noise
        self.num_particles = num_particles
        if inner_optim is not None:
            require_optim(inner_optim, "inner_optim")
        self.inner_optim = same_settings(optim) if inner_optim is None else inner_optim
        self.inner_loss = inner_loss
        self.num_inner_steps = num_inner_steps
        self.log_normalizer = log_normalizer
        self._inner = None if inner_loss is None else divergences.as_inner_loss(inner_loss)

    def _check(self, target: MarginalTarget, batch: Batch) -> MarginalTarget:
        check_width(self.noise, target)
        if self.inner_loss is not None:
            divergences.check(self.inner_loss, target.pair)
        return target

    @property
    def _own_names(self) -> tuple[str, ...]:
        return (LOG_NORMALIZER,)

    @property
    def _optims(self) -> dict[str, PyroOptim]:
        return {"optim": self.optim, "inner_optim": self.inner_optim}

    def _begin(self, target: MarginalTarget, batch: Batch) -> Any:
        fitted = Gaussian.fitted(target, batch) if self.noise is None else None
        noise = self.noise if fitted is None else fitted.distribution()
        if self.log_normalizer is not None:
            start = torch.tensor(float(self.log_normalizer))
        else:  # log E_y[p̃(y) / p_n(y)]
            with torch.no_grad():
                y = noise.sample((len(batch.v),)).to(batch.v.dtype)
                ratios = _log_mean(*self._log_ratios(target.pair, batch, y)) - noise.log_prob(y)
            start = ratios.logsumexp(0) - math.log(len(y))
        pyro.param(LOG_NORMALIZER, start)
        return fitted

    def _analyse(self, leaves: list[Any], spec: Any) -> ModelAndGuide:
        pair = super()._analyse(leaves, spec)
        create_optimizers(self.inner_optim, list(pair.phi.values()))
        return pair

    def _inner_leaves(self, pair: ModelAndGuide) -> list[Tensor]:
        return list(pair.phi.values())

    def _inner_loss(self, target: MarginalTarget, batch: Batch, carried: Any) -> Tensor:
        if self._inner is not None:
            return self._inner(target.pair, batch, batch.v)
        return self._data_term(target.pair, batch, carried).mean()

    def _loss(self, target: MarginalTarget, batch: Batch, carried: Any) -> tuple[Tensor, Any]:
        noise = self.noise if carried is None else carried.distribution()
        log_normalizer = pyro.param(LOG_NORMALIZER)
        at_noise: Any = 0.0
        for y in noise.sample((self.num_noise, len(batch.v))).to(batch.v.dtype):
            ratio = _log_mean(*self._log_ratios(target.pair, batch, y)) - log_normalizer
            at_noise = at_noise + softplus(ratio - noise.log_prob(y) - math.log(self.num_noise))
        return (self._data_term(target.pair, batch, carried) + at_noise).mean(), carried

    def _data_term(self, pair: ModelAndGuide, batch: Batch, carried: Any) -> Tensor:
        """The first term, of every example: shape (n,)."""
        noise = self.noise if carried is None else carried.distribution()
        ratios, log_weights = self._log_ratios(pair, batch, batch.v)
        log_normalizer = pyro.param(LOG_NORMALIZER)
        each = softplus(math.log(self.num_noise) + noise.log_prob(batch.v) + log_normalizer - ratios)
        return (log_weights.exp() * each).sum(1).mean(0)

    def _log_ratios(self, pair: ModelAndGuide, batch: Batch, v: Tensor) -> tuple[Tensor, Tensor]:
        """log p̃(v, h) - log q(h|v) at draws of h, and the logarithm of each summed-out configuration's share of q.

        Both of shape (particles, configurations, n).
        """
        args, kwargs = batch.arguments(v)
        n = len(v)
        ratios, log_weights = [], []
        for draw in pair.draws(batch, v, self.num_particles, joint=True):
            with record(draw.values, pair.relaxed_sites) as run:
                pair.model(*args, **kwargs)
            log_p = joint_per_example(run.sites.values(), n)
            with record(draw.values) as run:
                pair.guide(*args, **kwargs)
            log_q: Any = sum(per_example(site, n) for site in run.sites.values() if not site.is_observed)
            ratios.append(log_p - log_q)
            log_weights.append(torch.zeros_like(log_p) if draw.weight is None else draw.weight.log())
        shape = (self.num_particles, -1, n)
        return torch.stack(ratios).reshape(shape), torch.stack(log_weights).reshape(shape)


def _log_mean(ratios: Tensor, log_weights: Tensor) -> Tensor:
    """log E_q[exp ratio], estimated: the mean over particles, summed over configurations."""
    return (ratios + log_weights).logsumexp((0, 1)) - math.log(len(ratios))
