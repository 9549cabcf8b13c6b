r"""Discrete sites of many units in one factor, summed out exactly by their mean.

Where a guide's units are independent, as those of ``Bernoulli(logits).to_event(1)`` are, and log p̃ is affine in each
with all else held, its expectation is its value at their means, and so it is with log q:

.. math:: E_{q(h|v)}[\log \tilde p(v, h) - \log q(h|v)] = \log \tilde p(v, \mu) - \log q(\mu|v), \qquad \mu = E_q[h],

both continued to values between 0 and 1 as the polynomials that they are. A site marked for enumeration whose support
is a product of many then needs no sum over it: it "draws" its mean. That log p̃ is affine is proved
(:mod:`numpyro_bism.energies.proof`), never assumed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core
from numpyro.distributions.discrete import BernoulliLogits, BernoulliProbs, MultinomialLogits, MultinomialProbs
from numpyro.handlers import seed
from numpyro.primitives import Messenger

from .. import energies
from ..distributions import AveragedBernoulli, AveragedOneHot, base_of, rebuild
from ..losses import OuterLoss
from ..programs.checks import Analysis
from ..programs.pair import ModelAndGuide
from ..programs.records import is_enumerated, record
from ..programs.visible import Batch
from .proof import prove

__all__ = ["averaging", "check"]


class _Averaging(Messenger):
    def process_message(self, msg: Any) -> None:
        if msg["type"] != "sample" or msg["is_observed"] or not is_enumerated(msg["infer"]):
            return
        if _is_product(msg["fn"]):
            msg["fn"] = rebuild(msg["fn"], _averaged)
            msg["infer"] = {key: value for key, value in msg["infer"].items() if key != "enumerate"}


def _is_product(fn: Any) -> bool:
    """Whether its support is a product over units that it calls one event, which can't be enumerated."""
    base = base_of(fn)
    if isinstance(base, MultinomialLogits | MultinomialProbs):  # NumPyro's one-hot distribution, of one unit or more
        # inside a compiled function it may have no value; the first look at the programs, outside, has seen it
        return isinstance(base.total_count, jax.core.Tracer) or bool((np.asarray(base.total_count) == 1).all())
    return isinstance(base, BernoulliLogits | BernoulliProbs) and fn.event_dim > 0


def _averaged(base: Any) -> Any:
    if isinstance(base, BernoulliLogits | BernoulliProbs):
        return AveragedBernoulli(1.0, base.logits)
    return AveragedOneHot(1.0, base.logits if isinstance(base, MultinomialLogits) else jnp.log(base.probs))


def averaging(guide: Callable[..., Any]) -> Callable[..., Any]:
    """The guide, its sites that are marked for enumeration and have many units in one event drawing their mean."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _Averaging():
            return guide(*args, **kwargs)

    return run


def check(start: Analysis, batch: Batch, rng_key: Array, loss: OuterLoss, inner_loss: Any) -> None:
    """Check whether the sites that are summed out by their mean may be: whether the mean is the sum.

    :raises ValueError: where it is not: what is not proved to be affine, or not linear in E_q.
    """
    pair = start.pair
    params = pair.params(start.theta, start.phi, start.mutable)
    for name in pair.averaged:
        cure = "Put its units in a plate instead of .to_event(), with one factor a unit, or relax it."
        if loss.average == "loss":
            raise ValueError(
                f"Guide site '{name}' has many units in one event: they are summed out exactly in the score and in the "
                "inner loss, not in the squared score of average='loss'. Use average='score'."
            )
        if type(inner_loss).__name__ not in ("Trace_ELBO", "TraceMeanField_ELBO", "TraceEnum_ELBO", "TraceGraph_ELBO"):
            raise ValueError(
                f"Guide site '{name}' is marked for enumeration and has many units in one event: "
                f"{type(inner_loss).__name__} can't sum it out. Use inner_loss=Trace_ELBO() or TraceEnum_ELBO()."
            )
        if not _is_affine(pair, params, batch, rng_key, name):
            raise ValueError(
                f"Guide site '{name}' is marked for enumeration but its support can't be enumerated, and log p̃ is not "
                f"proved to be affine in each of its units. {cure}"
            )
        if _is_read(pair, params, batch, rng_key, name):
            raise ValueError(
                f"Guide site '{name}' is marked for enumeration, has many units in one event, and the guide reads its "
                f"value again: the other sites' densities need not be affine in it. {cure}"
            )


def _is_affine(pair: ModelAndGuide, params: Mapping[str, Any], batch: Batch, rng_key: Array, name: str) -> bool:
    drawn, _ = pair.draw_discrete(rng_key, params, batch, batch.v)
    values = {n: v for n, v in drawn.items() if n not in pair.subsampled}
    energy, x = energies.Energy.from_model(pair.model, pair.sites, batch, params, rng_key, values)
    return prove(energy, params, x).degrees.within((name,)) <= 1


def _is_read(pair: ModelAndGuide, params: Mapping[str, Any], batch: Batch, rng_key: Array, name: str) -> bool:
    """Whether another site of the guide depends on this one's value."""
    args, kwargs = batch.arguments(batch.v)

    def others(value: Array) -> list[tuple[Array, Array]]:
        values = {**batch.indices, name: value}
        with seed(rng_seed=rng_key), record(params, values, enumerate_from=pair.num_plate_dims) as run:
            pair.guide(*args, **kwargs)
        rest = [site for site in run.sites.values() if not site.is_observed and site.name != name]
        return [(site.value, site.log_prob()) for site in rest]

    jaxpr = jax.make_jaxpr(others)(pair.draw(rng_key, params, batch, batch.v)[0].values[name]).jaxpr
    reached = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(var in reached for var in eqn.invars if not isinstance(var, core.Literal)):
            reached.update(eqn.outvars)
    return any(var in reached for var in jaxpr.outvars if not isinstance(var, core.Literal))
