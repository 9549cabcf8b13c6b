r"""Discrete sites of many units in one factor, summed out exactly by their mean.

Where a guide's units are independent, as those of ``Bernoulli(logits).to_event(1)`` are, and log p̃ is affine in each
with all else held, its expectation is its value at their means, and so it is with log q:

.. math:: E_{q(h|v)}[\log \tilde p(v, h) - \log q(h|v)] = \log \tilde p(v, \mu) - \log q(\mu|v), \qquad \mu = E_q[h],

both continued to values between 0 and 1 as the polynomials that they are. A site marked for enumeration whose support
is a product of many then needs no sum over it: it "draws" its mean. That log p̃ is affine is proved
(:mod:`pyro_bism.energies.proof`), never assumed.
"""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .. import energies
from ..distributions import AveragedBernoulli, AveragedOneHot, base_of, rebuild
from ..losses import OuterLoss
from ..programs.pair import ModelAndGuide
from ..programs.records import is_enumerated, record
from .proof import prove, prove_function

__all__ = ["averaging", "check"]


class _Averaging(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["is_observed"] or not is_enumerated(msg["infer"]) or not _is_product(fn):
            return
        msg["fn"] = rebuild(fn, _averaged)
        msg["infer"] = {key: value for key, value in msg["infer"].items() if key != "enumerate"}


def _is_product(fn: Any) -> bool:
    """Whether its support is a product over units that it calls one event, which can't be enumerated."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        if isinstance(fn, dist.Independent) and fn.reinterpreted_batch_ndims:
            return isinstance(base_of(fn), dist.Bernoulli | dist.OneHotCategorical)
        fn = fn.base_dist
    return False


def _averaged(base: Any) -> Any:
    if isinstance(base, dist.Bernoulli):
        return AveragedBernoulli(1.0, base.logits)
    return AveragedOneHot(1.0, base.logits)


def averaging(guide: Callable[..., Any]) -> Callable[..., Any]:
    """The guide, its sites that are marked for enumeration and have many units in one event drawing their mean."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _Averaging():
            return guide(*args, **kwargs)

    run.__wrapped__ = guide  # type: ignore[attr-defined]  # what kind of guide it is may matter to others
    return run


def check(pair: ModelAndGuide, leaves: Any, spec: Any, loss: OuterLoss, inner_loss: Any) -> None:
    """Check whether the sites that are summed out by their mean may be: whether the mean is the sum.

    :raises ValueError: where it is not: what is not proved to be affine, or not linear in E_q.
    """
    for name in pair.averaged:
        cure = "Put its units in a plate instead of .to_event(), with one factor a unit, or relax it."
        if loss.average == "loss":
            raise ValueError(
                f"Guide site '{name}' has many units in one event: they are summed out exactly in the score and in the "
                "inner loss, not in the squared score of average='loss'. Use average='score'."
            )
        if type(inner_loss).__name__ not in ("Trace_ELBO", "TraceMeanField_ELBO", "TraceEnum_ELBO"):
            raise ValueError(
                f"Guide site '{name}' is marked for enumeration and has many units in one event: "
                f"{type(inner_loss).__name__} can't sum it out. Use inner_loss=Trace_ELBO() or TraceEnum_ELBO()."
            )
        if not _is_affine(pair, leaves, spec, name):
            raise ValueError(
                f"Guide site '{name}' is marked for enumeration but its support can't be enumerated, and log p̃ is not "
                f"proved to be affine in each of its units. {cure}"
            )
        if _is_read(pair, leaves, spec, name):
            raise ValueError(
                f"Guide site '{name}' is marked for enumeration, has many units in one event, and the guide reads its "
                f"value again: the other sites' densities need not be affine in it. {cure}"
            )


def _is_affine(pair: ModelAndGuide, leaves: Any, spec: Any, name: str) -> bool:
    with torch.random.fork_rng(devices=[]):
        batch = pair.batch(leaves, spec, resizable=True)
        values = {n: v for n, v in pair.draw_discrete(batch, batch.v).items() if n not in pair.subsamples}
        energy, x = energies.Energy.from_model(pair.model, pair.sites, batch, pair.buffers, values)
        return prove(energy, x).degrees.within((name,)) <= 1


def _is_read(pair: ModelAndGuide, leaves: Any, spec: Any, name: str) -> bool:
    """Whether another site of the guide depends on this one's value."""
    with torch.random.fork_rng(devices=[]):
        batch = pair.batch(leaves, spec)
        args, kwargs = batch.arguments(batch.v)

        def others(point: dict[str, Tensor]) -> Tensor:
            torch.manual_seed(0)
            with record({**batch.indices, **point}, enumerate_from=pair.num_plate_dims) as run:
                pair.guide(*args, **kwargs)
            rest = [site for site in run.sites.values() if not site.is_observed and site.name != name]
            every: Tensor = sum((site.value.sum() + site.log_prob().sum() for site in rest), torch.zeros(()))
            return every

        with torch.no_grad():
            value = pair.draw(batch, batch.v)[0].values[name]
        return name in prove_function(others, {name: value}).degrees.groups
