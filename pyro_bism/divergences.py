"""Inner losses: how far the guide q(h|v; φ) is from the posterior p(h|v; θ)."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from .brief import named
from .losses import OuterLoss
from .programs.pair import Draw, ModelAndGuide
from .programs.records import SiteRecord
from .programs.visible import Batch

__all__ = ["FisherDivergence", "InnerLoss"]


@runtime_checkable
class InnerLoss(Protocol):
    """What BiSM asks of an inner loss that is no ELBO of the host. Your own derives from it: ``docs/extending.md``."""

    def check_guide(self, pair: ModelAndGuide) -> None:
        """Checks that the loss fits the guide's sites; every guide does, if not overridden.

        :param pair: model and guide, as their first run showed them.
        :raises ValueError: where it does not fit.
        """
        return

    @abstractmethod
    def __call__(self, pair: ModelAndGuide, batch: Batch, v: Tensor) -> Tensor:
        """G: the mean over the batch, at the perturbed v, with fresh draws.

        :param pair: model and guide, with the parameters in force.
        :param batch: the rows, and all else that the programs are given.
        :param v: the visible values as the outer loss perturbs them, shape (n, D).
        """
        ...


@dataclass(frozen=True)
class FisherDivergence(InnerLoss):
    r"""The Fisher divergence between guide and posterior, mean over the batch.

    .. math:: \tfrac12\, E_{q(h|v)} \|\nabla_h \log q(h|v; φ) - \nabla_h \log \tilde p(v, h; θ)\|^2

    Bao et al. 2020. It needs no normaliser. h is drawn with reparameterisation; latent
    sites must be continuous (relaxed ones are). Of a latent computed from an auxiliary draw
    the gradients are taken in that draw.

    :param num_particles: draws of h a datapoint.
    """

    num_particles: int = 1

    def __post_init__(self) -> None:
        if self.num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, got {self.num_particles}.")

    def check_guide(self, pair: ModelAndGuide) -> None:
        if pair.phi and not (pair.sampled or pair.enumerated):
            raise ValueError(
                "FisherDivergence needs a guide that draws its latents from a density; this one gives points "
                "(Delta). Use inner_loss=Trace_ELBO()."
            )
        if pair.unreparameterised:
            raise ValueError(
                f"FisherDivergence needs draws that carry a gradient; those of {list(pair.unreparameterised)} do not. "
                "Use inner_loss=Trace_ELBO(), which takes the score-function gradient."
            )
        if pair.enumerated:
            raise ValueError(
                f"FisherDivergence needs continuous latents, but sites {list(pair.enumerated)} are summed out. "
                "Use inner_loss=TraceEnum_ELBO()."
            )

    def __call__(self, pair: ModelAndGuide, batch: Batch, v: Tensor) -> Tensor:
        total: Any = 0.0
        for _ in range(self.num_particles):
            draw, sites = pair.draw(batch, v)
            h = [sites[name].value for name in pair.sampled]
            if not h:  # nothing to fit
                return v.new_zeros(())
            if len(h) > 1:
                # ∇_h is taken at fixed values of the other latents, but a draw may be computed from an earlier one:
                # the same values again, each with a path of its own to nothing but φ
                h = [torch.zeros_like(x).requires_grad_() for x in h]
                moved = {name: sites[name].value + x for name, x in zip(pair.sampled, h, strict=True)}
                draw, sites = self._again(pair, batch, v, moved)
            log_q: Any = sum(s.log_prob().sum() for s in sites.values() if not s.is_observed)
            difference = log_q - pair.log_weight(batch, v.detach(), draw, guide=False)
            gradients = torch.autograd.grad(difference, h, create_graph=True)
            total = total + sum(0.5 * g.square().sum() for g in gradients)
        mean: Tensor = total / (self.num_particles * len(batch.v))
        return mean

    def _again(
        self, pair: ModelAndGuide, batch: Batch, v: Tensor, values: Mapping[str, Tensor]
    ) -> tuple[Draw, dict[str, SiteRecord]]:
        try:
            return pair.draw(batch, v, values)
        except KeyError as error:
            raise ValueError(
                f"FisherDivergence scores the guide's draws of {list(pair.sampled)} again, each at fixed values of the "
                "others, which a flow without an inverse can't. Use one with an inverse (a coupling or spline flow), "
                "or inner_loss=Trace_ELBO()."
            ) from error


def as_inner_loss(inner_loss: Any) -> Callable[[ModelAndGuide, Batch, Tensor], Tensor]:
    """The inner loss as a function of (pair, batch, perturbed v), a mean over the data.

    A host ELBO sums over the data; here it is divided by their number, so that the inner learning rate means
    the same at every batch size, and N/B cancels.

    :param inner_loss: an ELBO of the host, or an :class:`InnerLoss`.
    :raises ValueError: for a loss that is neither a differentiable ELBO nor an :class:`InnerLoss`.
    """
    if isinstance(inner_loss, InnerLoss) and not isinstance(inner_loss, type):
        return inner_loss
    if isinstance(inner_loss, type) or not hasattr(inner_loss, "differentiable_loss"):
        raise ValueError(
            f"inner_loss={named(inner_loss)} has no differentiable_loss. Use Trace_ELBO(), "
            "TraceMeanField_ELBO(), TraceEnum_ELBO(), TraceTMC_ELBO() or FisherDivergence(); one of your own derives "
            "from InnerLoss."
        )

    is_plain = type(inner_loss) is Trace_ELBO and inner_loss.num_particles == 1 and not inner_loss.vectorize_particles

    def elbo(pair: ModelAndGuide, batch: Batch, v: Tensor) -> Tensor:
        host = inner_loss
        if pair.averaged and not pair.enumerated and type(inner_loss) is TraceEnum_ELBO:
            # the same number, without its complaint that there is nothing to enumerate
            host = Trace_ELBO(inner_loss.num_particles, vectorize_particles=inner_loss.vectorize_particles)
        if is_plain and not pair.unreparameterised and not is_validation_enabled():
            return -pair.elbo(batch, v) / pair.num_data
        args, kwargs = batch.arguments(v.detach())
        model, guide = pair.programs(batch)
        value: Tensor = host.differentiable_loss(model, guide, *args, **kwargs)
        return value / pair.num_data

    return elbo


def check(inner_loss: Any, pair: ModelAndGuide) -> None:
    """Checks that the inner loss fits the guide's sites.

    :raises ValueError: where it does not.
    """
    if isinstance(inner_loss, InnerLoss):
        inner_loss.check_guide(pair)
    elif pair.enumerated and not isinstance(inner_loss, TraceEnum_ELBO):
        raise ValueError(
            f"Guide sites {list(pair.enumerated)} are marked for enumeration, which "
            f"{type(inner_loss).__name__} does not do. Use inner_loss=TraceEnum_ELBO()."
        )


def perturbed_inner_loss(
    loss: OuterLoss, inner_loss: Callable[..., Tensor], pair: ModelAndGuide, batch: Batch
) -> Tensor:
    """The inner loss G on freshly perturbed data, perturbed as the outer loss perturbs them."""
    return inner_loss(pair, batch, loss.perturb(batch.v, loss.draw(batch.v)))
