"""Pseudo-likelihood of discrete visible sites: Ising and Potts models, and all others of bits or letters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import softplus

from ..energies import Latent, Point, replaced
from ..programs.visible import Batch
from ..training.runaways import Words
from .rival import Rival
from .target import MarginalTarget

__all__ = ["PseudoLikelihood"]

MAX_ROWS = 2**14  # changed rows that are worked on at once


class PseudoLikelihood(Rival):
    r"""Minus the log pseudo-likelihood :math:`\sum_i \log p(v_i \mid v_{-i}; θ)`, i over units (Besag 1975).

    The conditionals are found from the energy itself: with f the log marginal p̃(v; θ), latents summed out,

    .. math:: \log p(v_i \mid v_{-i}) = f(v) - \log \sum_a \exp f(v_1, \dots, v_i = a, \dots)

    from every change of a single unit. Where f is affine in each unit's bit or one-hot vector, the others held, as it
    is in Ising and Potts models that leave a unit's interaction with itself out, one gradient gives them all: where it
    is proved from the program. Sites are Bernoulli, categorical or one-hot. Weight decay is a Gaussian prior.

    :param model: a NumPyro program of an unnormalised density p̃(v, h; θ), as BiSM takes it, but of discrete v.
    :param optim: an optimiser for θ, of ``numpyro.optim``, ``jax.example_libraries.optimizers`` or optax.
    :param visible: names of the visible sites; None takes all observed sample sites. Others are given, as covariates.
    :param static_kwargs: keyword arguments of the model that stay the same, as in SVI.
    :raises ValueError: at :meth:`init` for misuse, for continuous visible sites, and for latents that can't be summed
        out.
    """

    takes_discrete = True
    moves_visible = True
    scale = 1.0  # of a classifier that knows nothing, log 2 a decision
    words = Words.of_rival("or with weight decay, a prior: a unit that the others foretell has no finite couplings")

    def __init__(
        self, model: Callable[..., Any], optim: Any, *, visible: Sequence[str] | None = None, **static_kwargs: Any
    ):
        super().__init__(model, optim, visible, static_kwargs)

    def _check(self, target: MarginalTarget, params: Mapping[str, Any], batch: Batch, rng_key: Array) -> MarginalTarget:
        energy = target.energy
        for site in energy.sites:
            if not site.is_discrete:
                raise ValueError(
                    f"Visible site '{site.name}' is continuous: a pseudo-likelihood is of discrete sites. Leave it out "
                    f"with visible={list(energy.observed)}, which takes it as given, or use MarginalSM or BiSM."
                )
        # a marginal is no polynomial of v: what is known of log p̃(v, h) is nothing of it
        blocks = () if target.hidden else energy.blocks
        found = tuple(
            name
            for block in blocks
            for name in block.names
            if name in energy.observed and (block.kind == "affine" or block.is_multilinear)
        )
        return replace(target, multilinear=found)

    def _loss(
        self, rng_key: Array, theta: Mapping[str, Any], carried: Any, target: MarginalTarget, mutable: Any, batch: Batch
    ) -> tuple[Array, Any]:
        log_prob = target.log_prob(target.params(theta, mutable), batch)
        seen = target.energy.seen(batch.v)
        total = jnp.zeros(len(batch.v), batch.v.dtype)
        for name in target.energy.observed:
            latent = target.energy.latents[name]
            conditionals = _by_gradient if name in target.multilinear else _by_changes
            total -= conditionals(log_prob, seen, name, latent)
        return total.mean(), None


def _by_gradient(log_prob: Callable[[Point], Array], seen: Point, name: str, latent: Latent) -> Array:
    """Σ_i log p(v_i | v_-i) over a site's units, shape (n,), the log odds of all values in one gradient."""
    value = seen[name]
    logits: Array = jax.grad(lambda value: log_prob({**seen, name: value}).sum())(value)
    if latent.kind == "bits":
        each = value * logits - softplus(logits)
    else:
        each = (value * logits).sum(-1) - jax.nn.logsumexp(logits, -1)
    return each.reshape(len(value), -1).sum(-1)


def _by_changes(log_prob: Callable[[Point], Array], seen: Point, name: str, latent: Latent) -> Array:
    """The same, every value of every unit tried in turn."""
    value = seen[name]
    n = len(value)
    support = latent.support(value.dtype)

    @jax.checkpoint  # what a change computes is computed again on the way back: there are thousands of them
    def changed(which: Array) -> Array:
        unit, state = which // len(support), which % len(support)
        return log_prob({**seen, name: replaced(value, latent, unit, support[state])})

    num_units = value[0].size // support[0].size
    which = jnp.arange(num_units * len(support))
    each = jax.lax.map(changed, which, batch_size=max(1, min(len(which), MAX_ROWS // n)))
    return num_units * log_prob(seen) - jax.nn.logsumexp(each.reshape(num_units, len(support), n), 1).sum(0)
