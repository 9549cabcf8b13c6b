"""Log densities of a (model, guide) pair on a batch, and the score function they give.

For one draw h ~ q(h|v) the outer losses need (Bao et al. 2020)

    s(v) = ∇_v [log p̃(v, h; θ) - log q(h|v; φ)],

with h held fixed as v moves: at q = p(h|v; θ) this is the score of the marginal, whatever h is. Where a
discrete site is summed out the expectation under q of the same difference is taken, its weights
held fixed as v moves; then the score's own derivative in v stays right as well.

``params`` is everywhere one dictionary by site name: constrained parameters of both programs, and mutable
state (batch-norm statistics), which is read as it stands and never written back while scoring.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.handlers import seed

from ..losses import OuterLoss, loss_by_example
from . import guides, rows, visible
from .params import constrain
from .records import SiteRecord, joint_per_example, per_example, record, run_until, sum_by_example
from .rows import draw_rows

MAX_CONFIGURATIONS = 256


class Draw(NamedTuple):
    """What the guide gave at v: values of all its sites, and the weight of each value summed out.

    :ivar values: by site; drawn values carry a path to φ but none to v.
    :ivar probs: q(h|v) of each enumerated site over its support, in the site's own dimension.
    :ivar keys: the random keys that the guide asked for (dropout): q is the guide *with* these, and scored so.
    """

    values: Mapping[str, Array]
    probs: tuple[Array, ...] = ()
    keys: tuple[Array, ...] = ()


@dataclass(frozen=True)
class ModelAndGuide:
    """A (model, guide) pair, as the first run on arguments of this structure showed it. It holds no arrays.

    :ivar theta: transforms of the model's parameters, by name.
    :ivar phi: the guide's.
    :ivar subsampled: the plates that take not all rows, or are handed them.
    :ivar num_plate_dims: how many dimensions the plates take.
    :ivar unreparameterised: the guide's sites whose draws carry no path to φ.
    :ivar averaged: the guide's sites that are summed out by their mean.
    :ivar data_plates: the plates along the leading axis of the visible values.
    :ivar reads_rows: whether the programs read of a subsampled argument nothing but the plate's rows.
    :ivar change: the guide's sites that are computed from v and from auxiliary draws, or None.
    :ivar shiftable: the parameters of the guide's distributions that δ shifts (``hypergradients/shifts.py``); None
        where none does.
    :ivar trained_rows: of a pair that takes all rows: how many there were while training.
    :ivar shapes: of the unconstrained parameters, by name, where they are known.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    sites: tuple[visible.VisibleSite, ...]
    theta: Mapping[str, Any]
    phi: Mapping[str, Any]
    relaxed_sites: frozenset[str]
    enumerated: tuple[str, ...]
    sampled: tuple[str, ...]
    subsampled: Mapping[str, rows.Plate]
    num_data: int
    num_plate_dims: int
    unreparameterised: tuple[str, ...]
    reads_rows: bool = False
    shapes: Mapping[str, Any] = field(default_factory=dict)
    averaged: tuple[str, ...] = ()
    data_plates: frozenset[str] = frozenset()
    change: guides.ChangeOfVariables | None = None
    shiftable: frozenset[tuple[str, str]] | None = None
    trained_rows: int | None = None

    def params(self, theta: Mapping[str, Any], phi: Mapping[str, Any], mutable: Any) -> dict[str, Any]:
        """What the programs are given, from unconstrained parameters and mutable state."""
        return {**constrain(self.theta, theta), **constrain(self.phi, phi), **(mutable or {})}

    def batch(self, rng_key: Array, leaves: Sequence[Any], spec: Any) -> visible.Batch:
        """The step's batch: subsampling plates draw their rows here, once, or are handed them by the programs."""
        keys = jax.random.split(rng_key, len(self.subsampled)) if self.subsampled else ()
        handed = self._handed(rng_key, leaves, spec)
        indices = {
            name: handed[name] if plate.is_handed else draw_rows(key, plate.full_size, plate.size)
            for key, (name, plate) in zip(keys, self.subsampled.items(), strict=True)
        }
        return visible.batch(self.sites, indices, leaves, spec, self.reads_rows, frozenset(handed))

    def _handed(self, rng_key: Array, leaves: Sequence[Any], spec: Any) -> dict[str, Array]:
        """The rows that the programs hand to their plates on these arguments.

        Rows that are an argument are read off; for others the programs run as far as the plates.
        """
        plates = [plate for plate in self.subsampled.values() if plate.is_handed]
        found = {plate.name: leaves[plate.argument] for plate in plates if plate.argument is not None}
        unknown = [plate for plate in plates if plate.argument is None]
        if unknown:
            args, kwargs = jax.tree.unflatten(spec, leaves)
            key_guide, key_model = jax.random.split(rng_key)
            by_guide, by_model = ({p.name for p in unknown if role in p.handed_by} for role in ("guide", "model"))
            # to its end where the model needs its draws
            sought = () if by_model else by_guide
            q = run_until(self.guide, key_guide, args, kwargs, {}, sought) if by_guide else record({})
            values = {name: site.value for name, site in q.sites.items() if not site.is_observed}
            p = run_until(self.model, key_model, args, kwargs, values, by_model) if by_model else record({})
            for run, names in ((q, by_guide), (p, by_model)):
                for name in names & run.subsamples.keys():
                    rows.agree(name, found.setdefault(name, run.subsamples[name]), run.subsamples[name])
        for plate in plates:
            rows.require(plate, found.get(plate.name))
        return found

    def programs(
        self, params: Mapping[str, Any], batch: visible.Batch
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Model and guide for a host ELBO: parameters and rows given, discrete sites softened where the guide's are."""

        def replayed(program: Callable[..., Any], relaxed_sites: frozenset[str]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with record(params, batch.indices, relaxed_sites):
                    return program(*args, **kwargs)

            return run

        return replayed(self.model, self.relaxed_sites), replayed(self.guide, frozenset())

    def draw(
        self,
        rng_key: Array,
        params: Mapping[str, Any],
        batch: visible.Batch,
        v: Array,
        given: Mapping[str, Array] | None = None,
        keys: Sequence[Array] = (),
    ) -> tuple[Draw, dict[str, SiteRecord]]:
        """Run the guide at v; sites marked for enumeration and not ``given`` are summed out.

        :param keys: random keys for the guide's own use, from an earlier draw.
        """
        args, kwargs = batch.arguments(v)
        values = {**batch.indices, **(given or {})}
        with seed(rng_seed=rng_key), record(params, values, enumerate_from=self.num_plate_dims, keys=keys) as run:
            self.guide(*args, **kwargs)
        drawn = {name: site.value for name, site in run.sites.items() if not site.is_observed}
        summed = () if given else self.enumerated
        probs = tuple(jnp.exp(run.sites[name].log_q()) for name in summed)
        return Draw({**drawn, **batch.indices}, probs, tuple(run.keys)), run.sites

    def configurations(
        self, rng_key: Array, params: Mapping[str, Any], batch: visible.Batch, v: Array
    ) -> dict[str, Array]:
        """Every joint configuration of the summed-out sites, stacked along a new leading dimension."""
        args, kwargs = batch.arguments(v)
        with seed(rng_seed=rng_key), record(params, batch.indices) as run:
            self.guide(*args, **kwargs)
        n = len(batch.v)
        supports, counts = [], []
        for name in self.enumerated:
            site = run.sites[name]
            if jnp.ndim(site.value) == 0 or site.value.shape[0] != n:
                raise ValueError(
                    f"Guide site '{name}' of shape {jnp.shape(site.value)} lacks the batch of {n} as its "
                    "leading dimension, so the loss can't be averaged over it. Use average='score'."
                )
            supports.append(site.fn.enumerate_support(expand=True))  # one row a value, over the batch dimensions
            counts.append([len(supports[-1])] * math.prod(site.fn.batch_shape[1:]))
        total = math.prod(m for count in counts for m in count)
        if total > MAX_CONFIGURATIONS:
            raise ValueError(
                f"average='loss' would enumerate {total} joint configurations of the summed-out sites "
                f"{list(self.enumerated)}; at most {MAX_CONFIGURATIONS} are taken. Use average='score', "
                "which is exact and needs no joint enumeration."
            )
        grid = np.indices([m for count in counts for m in count]).reshape(-1, total).T
        given, start = {}, 0
        for name, support, count in zip(self.enumerated, supports, counts, strict=True):
            shape = run.sites[name].fn.batch_shape
            picks = grid[:, start : start + len(count)].reshape(total, 1, *shape[1:])
            start += len(count)
            places = np.ix_(*[np.arange(m) for m in shape])
            given[name] = support[(picks, *[p[None] for p in places])]
        return given

    def log_weight(
        self,
        rng_key: Array,
        params: Mapping[str, Any],
        batch: visible.Batch,
        v: Array,
        draw: Draw,
        guide: bool = True,
    ) -> Array:
        """Σ over the batch of E[log p̃(v, h) - log q(h|v)], scalar; the expectation is over summed-out sites."""
        args, kwargs = batch.arguments(v)
        probs = [
            (name, prob, -(self.num_plate_dims + k + 1))
            for k, (name, prob) in enumerate(zip(self.enumerated, draw.probs, strict=False))
        ]
        # one key for every v: what a model draws by itself (dropout) stays as v moves
        key_model, key_guide = jax.random.split(rng_key)
        with seed(rng_seed=key_model), record(params, draw.values, self.relaxed_sites) as run:
            self.model(*args, **kwargs)
        total = cast(Array, sum(expectation(site, probs) for site in run.sites.values()))
        if guide:
            values = self.fixed_latents(key_guide, params, batch, v, draw.values, draw.keys)
            sites = self.guide_at(key_guide, params, batch, v, values, draw.keys)
            total = total - sum(expectation(site, probs) for site in sites.values())
        return total

    def guide_at(
        self,
        rng_key: Array,
        params: Mapping[str, Any],
        batch: visible.Batch,
        v: Array,
        values: Mapping[str, Array],
        keys: Sequence[Array] = (),
        discretize: bool = False,
    ) -> dict[str, SiteRecord]:
        """The guide's own sites at v, where some are given.

        :param keys: random keys for the guide's own use, from an earlier draw.
        """
        args, kwargs = batch.arguments(v)
        with (
            seed(rng_seed=rng_key),
            record(params, {**batch.indices, **values}, discretize=discretize, keys=keys) as run,
        ):
            self.guide(*args, **kwargs)
        return {name: site for name, site in run.sites.items() if not site.is_observed}

    def log_guide(
        self, rng_key: Array, params: Mapping[str, Any], batch: visible.Batch, latents: Mapping[str, Array]
    ) -> Array:
        """log q(h|v) at any h, by example, relaxed sites as discrete ones; NaN where no draws behind h are found."""

        def guide_at(v: Array, values: Mapping[str, Array]) -> dict[str, SiteRecord]:
            return self.guide_at(rng_key, params, batch, v, values, discretize=True)

        sites = guide_at(batch.v, latents)
        known = jnp.zeros(len(batch.v), bool)
        if all(name in latents or site.is_delta for name, site in sites.items()):
            known = ~known
        elif self.change is not None:
            start = {**{name: site.value for name, site in guide_at(batch.v, {}).items()}, **latents}
            sites = guide_at(batch.v, self.change.matched(guide_at, batch.v, start, guides.SEARCH_STEPS))
            known = self.change.distance(sites, latents) < 1e-3
        log_q: Any = sum(per_example(site, len(batch.v)) for site in sites.values())
        return jnp.where(known, log_q, jnp.nan)

    def fixed_latents(
        self,
        rng_key: Array,
        params: Mapping[str, Any],
        batch: visible.Batch,
        v: Array,
        values: Mapping[str, Array],
        keys: Sequence[Array],
    ) -> Mapping[str, Array]:
        """What the guide is given so that h stays as v moves: a draw, or one whose auxiliary sites move with v."""
        if self.change is None:
            return values
        return self.change.matched(lambda u, given: self.guide_at(rng_key, params, batch, u, given, keys), v, values)

    def score(
        self,
        rng_key: Array,
        params: Mapping[str, Any],
        batch: visible.Batch,
        draws: Draw,
        loss: OuterLoss,
        num_draws: int | None = None,
    ) -> Callable[[Array], Array]:
        """The score function at given draws of h, averaged over them; differentiable in v, θ and φ.

        Under ``average="unbiased"`` the draws' scores side by side, as the losses take them.

        :param num_draws: how many draws are stacked in ``draws``; None if it is a single one.
        """
        # E_q[∇_v log q] = 0 exactly where all of h is summed out into the score, and so it is for
        # every φ; only the derivative of the score in v still needs that term.
        drawn = bool(self.sampled) or not draws.probs
        guide = drawn or loss.differentiates_score

        def one(v: Array, draw: Draw) -> Array:
            return self.log_weight(rng_key, params, batch, v, draw, guide)

        return partial(jax.grad(one), draw=draws) if num_draws is None else mean_slope(one, draws, loss)

    def outer_loss(
        self,
        rng_key: Array,
        params: Mapping[str, Any],
        batch: visible.Batch,
        loss: OuterLoss,
        noise: Any = None,
    ) -> Array:
        """J: the mean over the batch of the loss per example, fresh noise and fresh draws of h.

        A subsampling plate's N/B is a weight on every example's loss; in the mean over the data, of which
        this is an unbiased estimate, it cancels against the 1/N.

        :param noise: the loss's own, from an earlier draw; None draws it.
        """
        key_noise, key_draw, key_score = jax.random.split(rng_key, 3)
        noise = loss.draw(key_noise, batch.v) if noise is None else noise
        v = loss.perturb(batch.v, noise)
        num = loss.num_particles

        def value(draws: Draw, num_draws: int | None = None) -> Array:
            score = self.score(key_score, params, batch, draws, loss, num_draws)
            return loss_by_example(loss, score, batch.v, noise)

        def drawn(key: Array) -> Draw:
            return self.draw(key, params, batch, v)[0]

        def one(key: Array) -> Array:
            """The loss of one draw of h, averaged over the discrete sites' joint configurations."""
            if not self.enumerated:
                return value(drawn(key)).mean()

            def weighted(given: Mapping[str, Array]) -> Array:
                draw, sites = self.draw(key, params, batch, v, given)
                log_q: Any = sum(sum_by_example(name, sites[name].log_q(), len(batch.v)) for name in self.enumerated)
                return (jnp.exp(log_q) * value(draw)).mean()

            return jax.vmap(weighted)(self.configurations(key, params, batch, v)).sum()

        if num == 1:  # no vmap: it would only cost compilation
            return one(key_draw) if loss.average == "loss" else value(drawn(key_draw)).mean()
        keys = jax.random.split(key_draw, num)
        if loss.average != "loss":
            return value(jax.vmap(drawn)(keys), num).mean()
        return jax.vmap(one)(keys).mean()

    def draw_discrete(
        self, rng_key: Array, params: Mapping[str, Any], batch: visible.Batch, v: Array
    ) -> tuple[dict[str, Array], tuple[Array, ...]]:
        """One draw of every site of the guide, and the rows; relaxed and summed-out sites drawn as discrete ones.

        The guide's own random keys come with it.
        """
        args, kwargs = batch.arguments(v)
        with seed(rng_seed=rng_key), record(params, batch.indices, discretize=True) as run:
            self.guide(*args, **kwargs)
        values = {name: site.value for name, site in run.sites.items() if not site.is_observed}
        return jax.lax.stop_gradient({**values, **batch.indices}), tuple(run.keys)

    def log_joint(
        self,
        rng_key: Array,
        params: Mapping[str, Any],
        batch: visible.Batch,
        v: Array,
        values: Mapping[str, Array],
    ) -> Array:
        """log p̃(v, h) of every example at a :meth:`draw_discrete`."""
        args, kwargs = batch.arguments(v)
        with seed(rng_seed=rng_key), record(params, values) as run:
            self.model(*args, **kwargs)
        return joint_per_example(run.sites.values(), len(v))

    def mutable_after_pass(
        self, rng_key: Array, params: Mapping[str, Any], batch: visible.Batch, v: Array
    ) -> dict[str, Any]:
        """The mutable state after one pass over v, as SVI's one pass a step leaves it."""
        args, kwargs = batch.arguments(v)
        key_model, key_guide = jax.random.split(rng_key)
        with seed(rng_seed=key_guide), record(params, batch.indices) as q:
            self.guide(*args, **kwargs)
        values = {name: site.value for name, site in q.sites.items() if not site.is_observed}
        with (
            seed(rng_seed=key_model),
            record({**params, **q.mutable}, {**values, **batch.indices}, self.relaxed_sites) as p,
        ):
            self.model(*args, **kwargs)
        return {**q.mutable, **p.mutable}


def mean_slope(log_weight: Callable[[Array, Any], Array], draws: Any, loss: OuterLoss) -> Callable[[Array], Array]:
    """The gradient in v of the draws' mean log weight; of each, shape (L, n, D), where the loss wants them apart."""
    if loss.average == "unbiased":
        return lambda v: jax.vmap(lambda draw: jax.grad(log_weight)(v, draw))(draws)
    return jax.grad(lambda v: jax.vmap(lambda draw: log_weight(v, draw))(draws).mean())


def expectation(site: SiteRecord, probs: Sequence[tuple[str, Array, int]]) -> Array:
    """Sum of a site's log density, its summed-out dimensions weighted by q."""
    cost = site.log_prob()
    summed = {dim for _, _, dim in probs}
    # in reverse: a later site's probabilities may depend on an earlier site's value
    for name, prob, dim in reversed(probs):
        if cost.ndim < -dim or cost.shape[dim] == 1:
            continue
        for d in range(-1, dim, -1):
            plated = d not in summed and prob.ndim >= -d and prob.shape[d] > 1
            if plated and (cost.ndim < -d or cost.shape[d] == 1):
                raise ValueError(
                    f"Site '{site.name}' depends on the summed-out site '{name}' but stands outside a plate "
                    f"(dim {d}, size {prob.shape[d]}) that '{name}' is in, so it can't be summed unit by "
                    "unit. Put one factor a unit inside that plate; or make the units one event, .to_event(1), if "
                    "log p̃ is affine in each; or relax the site with ConcreteBernoulli."
                )
        cost = (prob * cost).sum(dim, keepdims=True)
    return cost.sum()
