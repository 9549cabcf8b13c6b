"""What a model and a guide must not do: an error names the site and the cure."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions.continuous import RelaxedBernoulliLogits
from numpyro.handlers import seed

from ..compiled.convolutions import compiled_once
from ..distributions import base_of
from ..losses import OuterLoss
from . import guides, visible
from .pair import ModelAndGuide
from .params import jittered
from .records import SiteRecord, is_enumerated, joint_per_example, record


class Analysis(NamedTuple):
    """What the first run gave: the pair, and initial values (unconstrained parameters, mutable state)."""

    pair: ModelAndGuide
    theta: dict[str, Any]
    phi: dict[str, Any]
    mutable: dict[str, Any]


def run_once(function: Callable[..., Any], batch: visible.Batch, *args: Any) -> Any:
    """``function(batch, *args)``, compiled; the visible arguments, whole data sets maybe, are no constants of it."""
    places = [i for site in batch.sites for i in site.leaves]

    def run(visible: Sequence[Any], *args: Any) -> Any:
        leaves = list(batch.leaves)
        for i, leaf in zip(places, visible, strict=True):
            leaves[i] = leaf
        return function(replace(batch, leaves=leaves), *args)

    return compiled_once(run, len(batch.v))([batch.leaves[i] for i in places], *args)


def warn_scaled(site: SiteRecord) -> None:
    """A scale around the whole model is often meant as a weight of the minibatch: here it is another density."""
    scale = np.asarray(1.0 if site.scale is None else site.scale, float)
    for frame in site.frames:
        full_size, size = site.plates[frame.name]
        scale = scale * (size / full_size)
    if not np.allclose(scale, 1.0):
        shown = f"{scale.item():.4g}" if scale.ndim == 0 else f"{scale.min():.4g} to {scale.max():.4g}"
        warnings.warn(
            f"A scale of {shown} covers visible site '{site.name}': it multiplies log p̃, so that the model is the "
            "density to that power and its score as many times as large. The losses are means over the batch already: "
            "if the scale should only weigh a minibatch (N/B), drop it, in the guide too.",
            UserWarning,
            stacklevel=2,
        )


def check_plates(sites: Iterable[SiteRecord]) -> None:
    """:raises ValueError: for a plate whose rows are drawn out of sight: every pass would be about others."""
    for site in sites:
        for frame in site.frames:
            if frame.name not in site.plates:
                raise ValueError(
                    f"Plate '{frame.name}' around site '{site.name}' is hidden by a handler (block), and so is which "
                    "rows it takes: model and guide would be about others at every pass. Leave the plate in sight, "
                    f"hide=[...] without '{frame.name}'."
                )


def _cure_of_missing(site: SiteRecord, num_rows: int) -> str:
    if is_enumerated(site.infer):
        return (
            "BiSM sums out what the guide marks: sample it there with infer={'enumerate': 'parallel'}; or take "
            "MarginalSM(model, optim, loss), which sums latents out and needs no guide."
        )
    if jnp.shape(site.value)[:1] != (num_rows,):
        return (
            "It stands outside the data plate, so all examples share it: is it a weight with a prior (a random "
            "module)? Make it a parameter, or take PersistentVI, which learns a posterior over weights."
        )
    return "Sample it there too, or sum it out of the energy by hand."


def check_sites(model_sites: Mapping[str, SiteRecord], latents: Mapping[str, SiteRecord], num_rows: int) -> None:
    model_latents = [name for name, s in model_sites.items() if not s.is_observed]
    for name in model_latents:
        if name not in latents:
            cure = _cure_of_missing(model_sites[name], num_rows)
            raise ValueError(f"The model's latent site '{name}' is missing from the guide. {cure}")
    for name, site in latents.items():
        if name in model_latents or site.infer.get("is_auxiliary", False):
            continue
        observed = " (there it is observed)" if name in model_sites else ""
        raise ValueError(
            f"The guide's site '{name}' is not a latent site of the model{observed}. Rename or remove it, or mark "
            "it infer={'is_auxiliary': True} if another guide site is computed from it."
        )


def check_guide(
    start: Analysis, latents: Mapping[str, SiteRecord], batch: visible.Batch, rng_key: Array, strategy: Any
) -> None:
    pair = start.pair
    for name, site in latents.items():
        fn, base = site.fn, base_of(site.fn)
        if site.infer.get("enumerate") == "sequential":
            raise ValueError(f"Guide site '{name}': enumerate='sequential' is not supported; use 'parallel'.")
        if name in pair.enumerated:
            try:
                fn.enumerate_support(expand=False)
            except NotImplementedError as error:
                raise ValueError(
                    f"Guide site '{name}' ({type(fn).__name__}) is marked for enumeration but its support "
                    "can't be enumerated. Put its units in a plate instead of .to_event()."
                ) from error
            continue
        if not fn.has_rsample:
            if not strategy.reparameterises:
                continue
            raise ValueError(
                f"Guide site '{name}' ({type(base).__name__}) can't be reparameterised: its draws carry "
                "no gradient. Relax it (ConcreteBernoulli, ConcreteOneHot), or sum it out: "
                "infer={'enumerate': 'parallel'} and inner_loss=TraceEnum_ELBO(); or take "
                "hypergradient=Covariance(), which needs none."
            )
        if isinstance(base, RelaxedBernoulliLogits) and bool((jnp.asarray(base.temperature) < 1).any()):
            raise ValueError(
                f"Guide site '{name}' has the Concrete density at a temperature below 1: its draws round to 0 "
                "and 1, where the density's gradient overflows. Use "
                "ConcreteBernoulli(temperature, logits): the same draws, scored by the discrete "
                "cross-entropy."
            )
        if strategy.differentiates_inner and start.phi:
            culprit = _undifferentiable(start, name, batch, rng_key)
            if culprit:
                raise ValueError(
                    f"Guide site '{name}' ({type(base).__name__}) can't be differentiated twice in its "
                    f"parameters ({culprit}). Use another family (LogNormal, Kumaraswamy, sigmoid-Normal), "
                    "fix the parameters of the gamma draw, or take hypergradient=Detached()."
                )


def _undifferentiable(start: Analysis, name: str, batch: visible.Batch, rng_key: Array) -> str | None:
    """Why a site's draw has no second derivative in φ, or None."""

    def value(phi: Mapping[str, Any]) -> Any:
        params = start.pair.params(start.theta, phi, start.mutable)
        return start.pair.draw(rng_key, params, batch, batch.v)[0].values[name].sum()

    def first(phi: Mapping[str, Any]) -> Any:
        return sum(g.sum() for g in jax.tree.leaves(jax.grad(value)(phi)))

    jax.eval_shape(value, start.phi)  # what fails without derivatives is the program's own fault, and told as such
    try:
        jax.eval_shape(jax.grad(first), start.phi)
    except (NotImplementedError, ValueError) as error:
        return str(error).splitlines()[0].split(". ")[0]  # JAX's own cures are not for users of a distribution
    return None


def check_examples(start: Analysis, batch: visible.Batch, rng_key: Array) -> None:
    """:raises ValueError: where the model's log density does not fall apart into those of the examples."""
    pair = start.pair
    params = pair.params(start.theta, start.phi, start.mutable)
    args, kwargs = batch.arguments(batch.v)
    seen: dict[str, Array] = {}
    for key in jax.random.split(rng_key):
        values, _ = pair.draw_discrete(key, params, batch, batch.v)
        with seed(rng_seed=rng_key), record(params, values) as run:
            pair.model(*args, **kwargs)
        joint_per_example(run.sites.values(), len(batch.v))
        for name, site in run.sites.items():
            log_prob = site.log_prob()
            if jnp.ndim(log_prob) == 0 and bool(seen.setdefault(name, log_prob) != log_prob):
                raise ValueError(
                    f"Site '{name}' has one log density for the whole batch, and it depends on the latents: a "
                    "covariance is taken example by example. Put the statement inside the data plate, one entry an "
                    "example."
                )


def find_change_of_variables(
    start: Analysis,
    batch: visible.Batch,
    rng_key: Array,
    latents: Mapping[str, SiteRecord],
    model_sites: Mapping[str, SiteRecord],
) -> guides.ChangeOfVariables | None:
    """:raises ValueError: where the guide's density can't be had at fixed h."""
    pair = start.pair
    deltas = [name for name, site in latents.items() if site.is_delta]
    auxiliary = [name for name in latents if name not in model_sites and name not in deltas]
    if not (auxiliary or deltas):
        return None
    change, other = None, jax.random.fold_in(rng_key, 1)
    # off the initial values too: at a scale of 1, or at weights of zero, a wrong density may be right
    for phi in (start.phi, jittered(rng_key, start.phi)):
        params = pair.params(start.theta, phi, start.mutable)
        keys = pair.draw(rng_key, params, batch, batch.v)[0].keys  # one key for all runs: what differs is v's doing
        at = partial(pair.guide_at, rng_key, params, batch, keys=keys)
        anew = partial(pair.guide_at, other, params, batch)
        values = {name: site.value for name, site in at(batch.v, {}).items()}
        if auxiliary and change is None:
            change = guides.change_of_variables(at, batch.v, values, auxiliary, deltas)
        if change is not None:
            change.check(at, batch.v, values)
        computed = () if change is None else change.computed
        points = [name for name in deltas if name not in computed]
        guides.check_points(at, anew, batch.v, values, points)
    return change


def check_scores(
    start: Analysis, batch: visible.Batch, rng_key: Array, loss: OuterLoss, latents: Sequence[str]
) -> None:
    pair = start.pair

    # off the initial values: at weights of zero a score may vanish though the energy reads v
    theta, phi, v = jittered(rng_key, (start.theta, start.phi, batch.v))

    def scores(batch: visible.Batch, rng_key: Array, theta: Any, phi: Any, v: Array) -> tuple[Array, Any]:
        """The gradient in v of log p̃; and how the guide looks at v, at moved parameters and at the initial ones."""
        key_draw, key_score = jax.random.split(rng_key)
        params = pair.params(theta, phi, start.mutable)
        draw, _ = pair.draw(key_draw, params, batch, v)

        def log_weight(u: Array, guide: bool) -> Array:
            return pair.log_weight(key_score, params, batch, u, draw, guide)

        model_score = jax.grad(log_weight)(v, False)
        try:
            jax.grad(log_weight)(v, True)
        except NotImplementedError as error:
            raise ValueError(
                "The guide can't score a value of h that it has not just drawn: one of the sites "
                f"{list(pair.sampled)} uses a flow without an inverse. Use one with an inverse (a "
                "coupling or spline flow has one)."
            ) from error

        def seen(phi: Mapping[str, Any]) -> guides.Sight:
            params = pair.params(theta, phi, start.mutable)

            def guide_at(u: Array, values: Mapping[str, Array]) -> dict[str, SiteRecord]:
                return pair.guide_at(key_draw, params, batch, u, values, draw.keys)

            return guides.sight(guide_at, v, pair.change)

        both = jax.tree.map(lambda *x: jnp.stack(x), phi, start.phi)
        looks = jax.vmap(seen)(both) if start.phi else seen(phi)
        return model_score, looks if latents else None

    model_score, seen = jax.device_get(run_once(scores, batch, rng_key, theta, phi, v))
    start_column = 0
    for site in pair.sites:
        size = math.prod(site.shape[1:])
        columns = model_score[:, start_column : start_column + size]
        start_column += size
        if not columns.any():
            raise ValueError(
                f"The score of visible site '{site.name}' is zero everywhere: the energy never reads its "
                "value. Use the site's value (the argument, or what numpyro.sample returns) in the energy, and do "
                "not stop its gradient."
            )
    if seen is not None:
        guides.require_sight(latents, seen)
