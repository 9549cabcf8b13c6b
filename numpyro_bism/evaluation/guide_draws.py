"""Draws of a trained guide, and their importance weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.handlers import seed
from tqdm import tqdm

from ..bism import BiSM, BiSMState
from ..programs import visible
from ..programs.modes import in_own_modes
from ..programs.pair import ModelAndGuide
from ..programs.records import SiteRecord, per_example, record

MAX_CELLS = 2**20  # numbers of v and h that are worked on at once


class GuideDraws(NamedTuple):
    """What num_draws runs of guide and model gave; the draws lead where there are any.

    :ivar latents: h by site, of shape (num_draws, n, ...); the guide's auxiliary sites are left out.
    :ivar visible: the visible sites' values, without an axis of draws.
    :ivar covariates: the values of the model's other observed sites, without an axis of draws.
    :ivar log_p: log p̃(v, h), of shape (num_draws, n).
    :ivar log_q: log q(h|v), of shape (num_draws, n).
    """

    latents: dict[str, np.ndarray]
    visible: dict[str, np.ndarray]
    covariates: dict[str, np.ndarray]
    log_p: np.ndarray
    log_q: np.ndarray


@in_own_modes
def guide_draws(bism: BiSM, state: BiSMState, *args: Any, rng_key: Array, num_draws: int, **kwargs: Any) -> GuideDraws:
    """h ~ q(h|v; φ) at these data, relaxed sites drawn as discrete ones, with the log densities of model and guide."""
    leaves, spec = bism._checked(args, kwargs)
    pair = bism.evaluated_pair(leaves, spec)
    key_batch, key_draws = jax.random.split(rng_key)
    batch = pair.batch(key_batch, leaves, spec)
    return run_guide(key_draws, pair, pair.params(*bism._unpack(pair, state), state.mutable_state), batch, num_draws)


def run_guide(
    rng_key: Array, pair: ModelAndGuide, params: Mapping[str, Any], batch: visible.Batch, num_draws: int
) -> GuideDraws:
    n = len(batch.v)
    seen: dict[str, dict[str, SiteRecord]] = {}

    @jax.jit
    def first() -> dict[str, Array]:
        """Checks and describes the sites as it is traced; what they observed comes back in numbers."""
        seen["guide"], seen["model"] = _draw(rng_key, pair, params, batch)
        check_latents(seen["guide"], n)
        return {name: jnp.asarray(s.value) for name, s in seen["model"].items() if s.is_data}

    @jax.jit
    def chunk(keys: Array) -> Any:
        def one(key: Array) -> Any:
            drawn, sites = _draw(key, pair, params, batch)
            values = {name: s.value for name, s in drawn.items()}
            return values, sum(terms_by_site(sites, n).values()), sum(terms_by_site(drawn, n).values())

        return jax.vmap(one)(keys)

    data = {name: np.asarray(value) for name, value in first().items()}
    size = min(num_draws, max(1, MAX_CELLS // (batch.v.size + sum(jnp.size(s.value) for s in seen["guide"].values()))))
    chunks = []
    # no bar where nobody looks, nor for what is soon over
    for start in tqdm(range(0, num_draws, size), desc="guide draws", delay=3, leave=False, disable=None):
        keys = jax.random.split(jax.random.fold_in(rng_key, start), size)
        values, log_p, log_q = chunk(keys)
        for role, total in (("model", log_p), ("guide", log_q)):
            if _is_bad(total).any():
                draw = int(_is_bad(total).any(1).argmax())
                _raise_bad(role, *_draw(keys[draw], pair, params, batch), n)
        # the last chunk is as large as the others, so that nothing is compiled twice, and cut
        chunks.append(jax.tree.map(lambda x, most=num_draws - start: np.asarray(x)[:most], (values, log_p, log_q)))
    values, log_p, log_q = jax.tree.map(lambda *parts: np.concatenate(parts), *chunks)
    latents = [name for name, s in seen["guide"].items() if not s.infer.get("is_auxiliary", False)]
    return GuideDraws(
        {name: values[name] for name in latents},
        {site.name: data.pop(site.name) for site in pair.sites},
        data,
        log_p,
        log_q,
    )


def _draw(
    rng_key: Array, pair: ModelAndGuide, params: Mapping[str, Any], batch: visible.Batch
) -> tuple[dict[str, SiteRecord], dict[str, SiteRecord]]:
    """One run of guide and model: the guide's drawn sites, the model's sites."""
    args, kwargs = batch.arguments(batch.v)
    key_model, key_guide = jax.random.split(rng_key)
    with seed(rng_seed=key_guide), record(params, batch.indices, discretize=True) as q:
        pair.guide(*args, **kwargs)
    drawn = {name: s for name, s in q.sites.items() if not s.is_observed}
    given = {**batch.indices, **{name: s.value for name, s in drawn.items()}}
    with seed(rng_seed=key_model), record(params, given, discretize=True) as p:
        pair.model(*args, **kwargs)
    return drawn, p.sites


def terms_by_site(sites: Mapping[str, SiteRecord], n: int) -> dict[str, Any]:
    """A program's log density by site and datapoint, each of shape (n,)."""
    return {name: per_example(site, n) for name, site in sites.items()}


def _raise_bad(role: str, drawn: Mapping[str, SiteRecord], model_sites: Mapping[str, SiteRecord], n: int) -> None:
    terms = terms_by_site(model_sites if role == "model" else drawn, n)
    # a sum of +inf and -inf is bad though neither need be
    terms["all sites together"] = sum(terms.values())
    name, term = next((name, term) for name, term in terms.items() if _is_bad(term).any())
    row = int(_is_bad(term).argmax())
    raise FloatingPointError(
        f"The {role}'s site '{name}' has a log density of {float(term[row])} at datapoint {row}. The "
        "parameters have diverged, or the energy has no value there."
    )


def _is_bad(x: Array) -> Array:
    """-inf is no fault: a draw that the model rules out has a weight of zero."""
    return jnp.isnan(x) | jnp.isposinf(x)


def check_latents(sites: Mapping[str, SiteRecord], n: int) -> None:
    latents = {name: s for name, s in sites.items() if not s.infer.get("is_auxiliary", False)}
    if not latents:
        raise ValueError("The guide has no latent site, so there is nothing to draw.")
    # an autoguide's Delta sites carry the density of its auxiliary ones
    auxiliary = any(name not in latents and not s.is_delta for name, s in sites.items())
    for name, site in latents.items():
        if site.is_delta and not auxiliary:
            raise ValueError(
                f"Guide site '{name}' is a point mass (Delta): log q(h|v) is not a density there, so the draws have no "
                "weights. Use a guide with a spread."
            )
        shape = jnp.shape(site.value)
        if not shape or shape[0] != n:
            raise ValueError(
                f"Latent site '{name}' has shape {shape}, without the batch of {n} as its leading dimension: all "
                "datapoints share it, so their weights can't be told apart. Put it inside the data plate, or make it "
                "a parameter."
            )
