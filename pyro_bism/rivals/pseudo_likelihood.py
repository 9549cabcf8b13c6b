"""Pseudo-likelihood of discrete visible sites: Ising and Potts models, and all others of bits or letters."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

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
    is in Ising and Potts models that leave a unit's interaction with itself out, one gradient gives them all; that is
    proved from the program. Sites are Bernoulli, categorical or one-hot. The optimiser's weight decay is a Gaussian
    prior.

    :param model: a Pyro program of an unnormalised density p̃(v, h; θ), as BiSM takes it, but of discrete v.
    :param optim: a ``pyro.optim`` optimiser, for θ.
    :param visible: names of the visible sites; None takes all observed sample sites. Others are given, as covariates.
    :param jit: capture the step and compile it, as in :class:`~pyro_bism.BiSM`.
    :raises ValueError: at the first step for misuse, for continuous visible sites, and for latents that can't be summed
        out.
    """

    takes_discrete = True
    moves_visible = True
    scale = 1.0  # of a classifier that knows nothing, log 2 a decision
    words = Words.of_rival("or with weight decay, a prior: a unit that the others foretell has no finite couplings")

    def __init__(
        self, model: Callable[..., Any], optim: PyroOptim, *, visible: Sequence[str] | None = None, jit: bool = False
    ):
        super().__init__(model, optim, visible, jit=jit)

    def _check(self, target: MarginalTarget, batch: Batch) -> MarginalTarget:
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

    def _loss(self, target: MarginalTarget, batch: Batch, carried: Any) -> tuple[Tensor, Any]:
        log_prob = target.log_prob(batch)
        seen = target.energy.seen(batch.v)
        total = torch.zeros_like(batch.v[:, 0])
        for name in target.energy.observed:
            latent = target.energy.latents[name]
            conditionals = _by_gradient if name in target.multilinear else _by_changes
            total = total - conditionals(log_prob, seen, name, latent)
        return total.mean(), None


def _by_gradient(log_prob: Callable[[Point], Tensor], seen: Point, name: str, latent: Latent) -> Tensor:
    """Σ_i log p(v_i | v_-i) over a site's units, shape (n,), the log odds of all values in one gradient."""
    value = seen[name]
    with torch.enable_grad():
        soft = value.detach().requires_grad_()
        (logits,) = torch.autograd.grad(log_prob({**seen, name: soft}).sum(), soft, create_graph=True)
    if latent.kind == "bits":
        each = value * logits - softplus(logits)
    else:
        each = (value * logits).sum(-1) - logits.logsumexp(-1)
    return each.reshape(len(value), -1).sum(-1)


def _by_changes(log_prob: Callable[[Point], Tensor], seen: Point, name: str, latent: Latent) -> Tensor:
    """The same, every value of every unit tried in turn."""
    value = seen[name]
    n = len(value)
    support = latent.support(value.dtype)
    num_units = value[0].numel() // support[0].numel()

    def changed(which: range) -> Tensor:
        rows = [replaced(value, latent, i // len(support), support[i % len(support)]) for i in which]
        others = {other: x.repeat(len(which), *[1] * (x.ndim - 1)) for other, x in seen.items() if other != name}
        return log_prob({**others, name: torch.cat(rows)})

    total, size = num_units * len(support), max(1, MAX_ROWS // n)
    which = [range(start, min(start + size, total)) for start in range(0, total, size)]
    # what a change computes is computed again on the way back: there are thousands of them
    each = torch.cat([checkpoint(changed, part, use_reentrant=False) for part in which])
    return num_units * log_prob(seen) - each.reshape(num_units, len(support), n).logsumexp(1).sum(0)
