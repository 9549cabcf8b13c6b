"""Score matching of the marginal: no guide, the latents summed out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from ..energies import VISIBLE
from ..losses import OuterLoss, require_outer_loss
from ..programs.visible import Batch
from ..training.runaways import Words
from .rival import Rival
from .target import MarginalTarget

__all__ = ["MarginalSM"]


class MarginalSM(Rival):
    r"""Score matching of :math:`s(v) = \nabla_v \log \sum_h \tilde p(v, h; θ)`, the marginal's own score.

    For models without latents, or with latents that have a closed form (bits and one-hot vectors that the energy is
    affine in, real ones that it is quadratic in) or few joint configurations. What BiSM approximates is exact here.

    :param model: a Pyro program of an unnormalised density p̃(v, h; θ), as BiSM takes it.
    :param optim: a ``pyro.optim`` optimiser, for θ.
    :param loss: a loss of :mod:`pyro_bism.losses`; its ``num_particles`` and ``average`` have nothing to average.
    :param visible: names of the visible sites; None takes all observed sample sites.
    :param jit: capture the step and compile it, as in :class:`~pyro_bism.BiSM`.
    :raises ValueError: at construction for bad settings, at the first step for misuse and for latents that can't be
        summed out.
    """

    words = Words.of_rival("or with DenoisingScoreMatching, whose loss has a lower bound, or clip the gradient")

    def __init__(
        self,
        model: Callable[..., Any],
        optim: PyroOptim,
        loss: OuterLoss,
        *,
        visible: Sequence[str] | None = None,
        jit: bool = False,
    ):
        super().__init__(model, optim, visible, jit=jit)
        require_outer_loss(loss, "Use DenoisingScoreMatching(sigma=...) or another of pyro_bism.losses.")
        self.loss = loss

    def _loss(self, target: MarginalTarget, batch: Batch, carried: Any) -> tuple[Tensor, Any]:
        log_prob = target.log_prob(batch)

        def score(v: Tensor) -> Tensor:
            if not v.requires_grad:
                v = v.detach().requires_grad_()
            return torch.autograd.grad(log_prob({VISIBLE: v}).sum(), v, create_graph=True)[0]

        return self.loss(score, batch.v, self.loss.draw(batch.v)).mean(), None
