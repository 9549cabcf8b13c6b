"""Inner losses: how far the guide q(h|v; φ) is from the posterior p(h|v; θ)."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.infer.elbo import ELBO, TraceEnum_ELBO, TraceGraph_ELBO

from .brief import named
from .losses import OuterLoss
from .programs.pair import Draw, ModelAndGuide
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
    def __call__(self, rng_key: Array, pair: ModelAndGuide, params: Mapping[str, Any], batch: Batch, v: Array) -> Array:
        """G: the mean over the batch, at the perturbed v, with fresh draws.

        :param rng_key: a JAX random key.
        :param pair: model and guide.
        :param params: what the programs are given by name: constrained parameters, and mutable state.
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
        if pair.enumerated:
            raise ValueError(
                f"FisherDivergence needs continuous latents, but sites {list(pair.enumerated)} are summed out. "
                "Use inner_loss=TraceEnum_ELBO()."
            )

    def __call__(self, rng_key: Array, pair: ModelAndGuide, params: Mapping[str, Any], batch: Batch, v: Array) -> Array:
        def one(key: Array) -> Array:
            key_draw, key_model = jax.random.split(key)
            draw, _ = pair.draw(key_draw, params, batch, v)
            h = {name: draw.values[name] for name in pair.sampled}

            def difference(h: Mapping[str, Array]) -> Array:
                # sites computed from h (an autoguide's) are computed anew, so that h's whole effect is seen
                again, sites = pair.draw(key_draw, params, batch, v, h, draw.keys)
                log_q: Any = sum(s.log_prob().sum() for s in sites.values() if not s.is_observed)
                found: Array = log_q - pair.log_weight(key_model, params, batch, v, Draw(again.values), guide=False)
                return found

            total: Any = sum(0.5 * jnp.square(g).sum() for g in jax.grad(difference)(h).values())
            value: Array = total
            return value

        if self.num_particles == 1:
            return one(rng_key) / len(batch.v)
        each: Array = jax.vmap(one)(jax.random.split(rng_key, self.num_particles))
        return each.mean() / len(batch.v)


def as_inner_loss(inner_loss: Any) -> Callable[[Array, ModelAndGuide, Mapping[str, Any], Batch, Array], Array]:
    """The inner loss as a function of (rng_key, pair, params, batch, perturbed v), a mean over the data.

    A host ELBO sums over the data; here it is divided by their number, so that the inner learning rate means
    the same at every batch size, and N/B cancels.

    :param inner_loss: an ELBO of the host, or an :class:`InnerLoss`.
    :raises ValueError: for a loss that is neither a differentiable ELBO nor an :class:`InnerLoss`.
    """
    if isinstance(inner_loss, InnerLoss) and not isinstance(inner_loss, type):
        return inner_loss
    if not isinstance(inner_loss, ELBO):
        raise ValueError(
            f"inner_loss={named(inner_loss)} is not an ELBO. Use Trace_ELBO(), TraceMeanField_ELBO(), "
            "TraceGraph_ELBO(), TraceEnum_ELBO() or FisherDivergence(); one of your own derives from InnerLoss."
        )
    if getattr(inner_loss, "multi_sample_guide", False) or not getattr(inner_loss, "sum_sites", True):
        raise ValueError(
            "inner_loss: multi_sample_guide=True and sum_sites=False are not supported; take the defaults."
        )

    def elbo(rng_key: Array, pair: ModelAndGuide, params: Mapping[str, Any], batch: Batch, v: Array) -> Array:
        args, kwargs = batch.arguments(v)
        model, guide = pair.programs(params, batch)
        value: Array = inner_loss.loss(rng_key, {}, model, guide, *args, **kwargs)
        return value / pair.num_data

    return elbo


def check(inner_loss: Any, pair: ModelAndGuide) -> None:
    """Checks that the inner loss fits the guide's sites.

    :raises ValueError: where it does not.
    """
    if isinstance(inner_loss, InnerLoss):
        inner_loss.check_guide(pair)
    if pair.unreparameterised and not isinstance(inner_loss, TraceGraph_ELBO):
        raise ValueError(
            f"The draws of guide sites {list(pair.unreparameterised)} carry no gradient, which "
            f"{type(inner_loss).__name__} would take for zero. Use inner_loss=TraceGraph_ELBO(), which takes the "
            "score-function gradient."
        )
    if pair.enumerated and not isinstance(inner_loss, InnerLoss | TraceEnum_ELBO):
        raise ValueError(
            f"Guide sites {list(pair.enumerated)} are marked for enumeration, which "
            f"{type(inner_loss).__name__} does not do. Use inner_loss=TraceEnum_ELBO()."
        )


def perturbed_inner_loss(
    rng_key: Array,
    loss: OuterLoss,
    inner_loss: Callable[..., Array],
    pair: ModelAndGuide,
    params: Mapping[str, Any],
    batch: Batch,
) -> Array:
    """The inner loss G on freshly perturbed data, perturbed as the outer loss perturbs them."""
    key_noise, key_inner = jax.random.split(rng_key)
    v = loss.perturb(batch.v, loss.draw(key_noise, batch.v))
    return inner_loss(key_inner, pair, params, batch, v)
