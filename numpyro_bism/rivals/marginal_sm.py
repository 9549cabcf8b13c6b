"""Score matching of the marginal: no guide, the latents summed out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import Array

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

    :param model: a NumPyro program of an unnormalised density p̃(v, h; θ), as BiSM takes it.
    :param optim: an optimiser for θ, of ``numpyro.optim``, ``jax.example_libraries.optimizers`` or optax.
    :param loss: a loss of :mod:`numpyro_bism.losses`; its ``num_particles`` and ``average`` have nothing to average.
    :param visible: names of the visible sites; None takes all observed sample sites.
    :param static_kwargs: keyword arguments of the model that stay the same, as in SVI.
    :raises ValueError: at construction for bad settings, at :meth:`init` for misuse and for latents that can't be
        summed out.
    """

    words = Words.of_rival("or with DenoisingScoreMatching, whose loss has a lower bound, or clip the gradient")

    def __init__(
        self,
        model: Callable[..., Any],
        optim: Any,
        loss: OuterLoss,
        *,
        visible: Sequence[str] | None = None,
        **static_kwargs: Any,
    ):
        super().__init__(model, optim, visible, static_kwargs)
        require_outer_loss(loss, "Use DenoisingScoreMatching(sigma=...) or another of numpyro_bism.losses.")
        self.loss = loss

    def _loss(
        self, rng_key: Array, theta: Mapping[str, Any], carried: Any, target: MarginalTarget, mutable: Any, batch: Batch
    ) -> tuple[Array, Any]:
        log_prob = target.log_prob(target.params(theta, mutable), batch)
        score = jax.grad(lambda v: log_prob({VISIBLE: v}).sum())
        return self.loss(score, batch.v, self.loss.draw(rng_key, batch.v)).mean(), None
