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
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions.continuous import RelaxedBernoulliLogits
from numpyro.distributions.distribution import Unit
from numpyro.distributions.util import scale_and_mask
from numpyro.handlers import seed
from numpyro.primitives import Messenger

from . import guides, rows, visible
from .distributions import ConcreteBernoulli, ConcreteOneHot, base_of, hard, is_averaged, relaxed, unmasked
from .jit import compiled_once
from .losses import OuterLoss
from .params import collect, constrain, jittered, reject_shared, unconstrain

MAX_CONFIGURATIONS = 256


@dataclass
class Site:
    """One sample statement, as it ran.

    :ivar plates: (full size, size) of every plate met, by name.
    """

    name: str
    fn: Any
    value: Any
    scale: Any
    frames: Sequence[Any]
    is_observed: bool
    infer: Mapping[str, Any]
    plates: Mapping[str, tuple[int, int]]
    subsamples: Mapping[str, Array]
    handed: Collection[str] = ()

    @property
    def is_data(self) -> bool:
        """Observed by the user: not a factor."""
        return self.is_observed and not isinstance(base_of(self.fn), Unit)

    @property
    def is_delta(self) -> bool:
        return isinstance(base_of(self.fn), dist.Delta)

    def log_prob(self) -> Array:
        """log density with the user's scale and mask, without a subsampling plate's N/B."""
        scale = self.scale
        for frame in self.frames:
            full_size, size = self.plates[frame.name]
            if size != full_size:
                scale = scale * (size / full_size)
        return scale_and_mask(self.fn.log_prob(self.value), scale)

    def log_q(self) -> Array:
        """log q of the value: how often it is drawn, which neither a scale nor a mask of the density changes."""
        return unmasked(self.fn).log_prob(self.value)


class record(Messenger):
    """Runs a program with its parameters and some of its sites given, and keeps its sample statements.

    A value in ``values`` stands in for a latent site's draw, or for a plate's rows, however it comes by them: all
    passes of a step are about the same. A site in ``softened`` is scored as its relaxation. Sites marked for
    enumeration get their whole support, in a dimension of their own left of all plates, when ``enumerate_from`` says
    how many dimensions the plates take.

    :ivar subsamples: the rows of the plates that take not all, or take them in another order; ``handed`` names those
        that were handed theirs by the program.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        values: Mapping[str, Array] | None = None,
        softened: frozenset[str] = frozenset(),
        enumerate_from: int | None = None,
        harden: bool = False,
        keys: Sequence[Array] = (),
        offered: Mapping[str, Array] | None = None,
        sought: Collection[str] = (),
    ):
        """
        :param offered: rows for plates that would draw them by themselves, or take all.
        :param sought: plates; the program is left as soon as the rows of all are known.
        """
        super().__init__()
        self.offered = offered or {}
        self.sought = set(sought)
        self.handed: set[str] = set()
        self._drawn: set[str] = set()
        self.given = params
        self.values = values or {}
        self.softened = softened
        self.enumerate_from = enumerate_from
        self.harden = harden
        self.given_keys = iter(keys)
        self.keys: list[Array] = []
        self.sites: dict[str, Site] = {}
        self.params: dict[str, Any] = {}
        self.mutable: dict[str, Any] = {}
        self.plates: dict[str, tuple[int, int]] = {}
        self.subsamples: dict[str, Array] = {}
        self.num_enumerated = 0

    def __enter__(self):
        super().__enter__()
        return self

    def process_message(self, msg):
        kind, name = msg["type"], msg.get("name")
        if kind == "control_flow":
            raise ValueError(
                "BiSM can't look into numpyro's scan and cond. Write the loop in Python, or use jax.lax.scan inside "
                "one factor."
            )
        if kind == "param" and name in self.given:
            msg["value"] = self.given[name]
        elif kind == "mutable" and name in self.given:
            # rebuilt at every level, for modules write their new state into it
            msg["value"] = jax.tree.map(lambda x: x, self.given[name])
        elif kind == "plate":
            self._rows(name, msg)
        elif kind == "subsample" and isinstance(msg["value"], visible.Rows):
            # picked already: the plate has nothing left to take
            msg["value"], msg["kwargs"]["event_dim"] = msg["value"].values, None
        elif kind == "prng_key" and msg["value"] is None:
            msg["value"] = next(self.given_keys, None)
        elif kind == "sample":
            self._sample(name, msg)

    def _rows(self, name, msg):
        if name in self.values:
            msg["value"] = self.values[name]
            msg["args"] = msg["args"][0], len(msg["value"])  # not as many as it says: see Energy.free
        elif name in self.offered and (msg["value"] is None or rows.are_all(msg["value"], msg["args"][0])):
            msg["value"] = self.offered[name]
            self._drawn.add(name)
        elif msg["value"] is None:
            draw = msg["fn"]

            def drawn(*args, **kwargs):  # unless a handler further out hands rows over
                self._drawn.add(name)
                return draw(*args, **kwargs)

            msg["fn"] = drawn

    def _keep_rows(self, name, msg):
        size, taken = msg["args"][0], len(msg["value"])
        self.plates[name] = size, taken
        own = name in self._drawn or name in self.values
        if not own and not rows.are_all(msg["value"], size):
            rows.require_indices(name, size, msg["value"])
            self.handed.add(name)
        if taken != size or name in self.handed or name in self.offered:
            self.subsamples[name] = msg["value"]
        if self.sought and self.sought <= self.plates.keys():
            raise rows.Found

    def _sample(self, name, msg):
        if name in self.softened:
            msg["fn"] = relaxed(msg["fn"])
        if self.harden:
            msg["fn"] = hard(msg["fn"])
        if msg["is_observed"] or msg["value"] is not None:
            return
        if name in self.values:
            msg["value"] = self.values[name]
        elif self.enumerate_from is not None and is_enumerated(msg["infer"]):
            self.num_enumerated += 1
            support = msg["fn"].enumerate_support(expand=False)
            batch_dims = support.ndim - 1 - msg["fn"].event_dim
            ones = self.enumerate_from + self.num_enumerated - 1 - batch_dims
            msg["value"] = support.reshape(support.shape[:1] + (1,) * ones + support.shape[1:])

    def postprocess_message(self, msg):
        kind, name = msg["type"], msg.get("name")
        if kind == "plate":
            self._keep_rows(name, msg)
        elif kind == "param" and msg["value"] is not None:  # flax_module asks for its value first
            self.params[name] = {"kwargs": msg["kwargs"], "value": msg["value"]}
        elif kind == "prng_key" and msg["value"] is not None:
            self.keys.append(msg["value"])
        elif kind == "mutable" and msg["value"] is not None:
            self.mutable[name] = msg["value"]
        elif kind == "sample":
            self.sites[name] = Site(
                name,
                msg["fn"],
                msg["value"],
                msg["scale"],
                tuple(msg["cond_indep_stack"]),
                msg["is_observed"],
                msg["infer"],
                self.plates,
                self.subsamples,
                self.handed,
            )


def is_enumerated(infer: Mapping[str, Any]) -> bool:
    return infer.get("enumerate") == "parallel"


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
class Pair:
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
    :ivar shiftable: the parameters of the guide's distributions that δ shifts (``shifts.py``); None where none does.
    :ivar trained_rows: of a pair that takes all rows: how many there were while training.
    :ivar shapes: of the unconstrained parameters, by name, where they are known.
    """

    model: Callable
    guide: Callable
    sites: tuple[visible.VisibleSite, ...]
    theta: Mapping[str, Any]
    phi: Mapping[str, Any]
    softened: frozenset[str]
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
            name: handed[name] if plate.is_handed else _subsample(key, plate.full_size, plate.size)
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
            q = _run_until(self.guide, key_guide, args, kwargs, {}, sought) if by_guide else record({})
            values = {name: site.value for name, site in q.sites.items() if not site.is_observed}
            p = _run_until(self.model, key_model, args, kwargs, values, by_model) if by_model else record({})
            for run, names in ((q, by_guide), (p, by_model)):
                for name in names & run.subsamples.keys():
                    rows.agree(name, found.setdefault(name, run.subsamples[name]), run.subsamples[name])
        for plate in plates:
            rows.require(plate, found.get(plate.name))
        return found

    def programs(self, params: Mapping[str, Any], batch: visible.Batch) -> tuple[Callable, Callable]:
        """Model and guide for a host ELBO: parameters and rows given, discrete sites softened where the guide's are."""

        def given(program, softened):
            def run(*args, **kwargs):
                with record(params, batch.indices, softened):
                    return program(*args, **kwargs)

            return run

        return given(self.model, self.softened), given(self.guide, frozenset())

    def draw(
        self,
        rng_key: Array,
        params: Mapping[str, Any],
        batch: visible.Batch,
        v: Array,
        given: Mapping[str, Array] | None = None,
        keys: Sequence[Array] = (),
    ) -> tuple[Draw, dict[str, Site]]:
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
        with seed(rng_seed=key_model), record(params, draw.values, self.softened) as run:
            self.model(*args, **kwargs)
        total: Any = sum(expectation(site, probs) for site in run.sites.values())
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
        harden: bool = False,
    ) -> dict[str, Site]:
        """The guide's own sites at v, where some are given.

        :param keys: random keys for the guide's own use, from an earlier draw.
        """
        args, kwargs = batch.arguments(v)
        with seed(rng_seed=rng_key), record(params, {**batch.indices, **values}, harden=harden, keys=keys) as run:
            self.guide(*args, **kwargs)
        return {name: site for name, site in run.sites.items() if not site.is_observed}

    def log_guide(
        self, rng_key: Array, params: Mapping[str, Any], batch: visible.Batch, latents: Mapping[str, Array]
    ) -> Array:
        """log q(h|v) at any h, by example, relaxed sites as discrete ones; NaN where no draws behind h are found."""

        def guide_at(v: Array, values: Mapping[str, Array]) -> dict[str, Site]:
            return self.guide_at(rng_key, params, batch, v, values, harden=True)

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

        def one(v, draw):
            return self.log_weight(rng_key, params, batch, v, draw, guide)

        return partial(jax.grad(one), draw=draws) if num_draws is None else _slope(one, draws, loss)

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

        def value(draws, num_draws=None):
            return loss(self.score(key_score, params, batch, draws, loss, num_draws), batch.v, noise)

        def drawn(key):
            return self.draw(key, params, batch, v)[0]

        def one(key):
            """The loss of one draw of h, averaged over the discrete sites' joint configurations."""
            if not self.enumerated:
                return value(drawn(key)).mean()

            def weighted(given):
                draw, sites = self.draw(key, params, batch, v, given)
                log_q: Any = sum(_per_example(name, sites[name].log_q(), len(batch.v)) for name in self.enumerated)
                return (jnp.exp(log_q) * value(draw)).mean()

            return jax.vmap(weighted)(self.configurations(key, params, batch, v)).sum()

        if num == 1:  # no vmap: it would only cost compilation
            return one(key_draw) if loss.average == "loss" else value(drawn(key_draw)).mean()
        keys = jax.random.split(key_draw, num)
        if loss.average != "loss":
            return value(jax.vmap(drawn)(keys), num).mean()
        return jax.vmap(one)(keys).mean()

    def posterior_loss(
        self,
        rng_key: Array,
        params: Mapping[str, Any],
        fixed: Mapping[str, Any],
        batch: visible.Batch,
        loss: OuterLoss,
    ) -> Array:
        """J, with the derivative in θ that it has where q(h|v) is the posterior p(h|v; θ).

        There ∂_θ log p̃(v) = E_{q(h|v)}[∂_θ log p̃(v, h)] at every v (Fisher's identity), so its gradient in v, taken
        through q too, is ∂_θ of the marginal's score.

        :param fixed: ``params`` without a path to θ.
        """
        key_noise, key_draw, key_score = jax.random.split(rng_key, 3)
        noise = loss.draw(key_noise, batch.v)
        num = loss.num_particles
        keys = jax.random.split(key_draw, num)
        draws = jax.vmap(lambda key: self.draw(key, fixed, batch, loss.perturb(batch.v, noise))[0])(keys)
        value = self.score(key_score, fixed, batch, draws, loss, num)

        def slope(given):
            def log_joint(u, key):
                draw, _ = self.draw(key, fixed, batch, u)  # at u: h moves with it
                return self.log_weight(key_score, given, batch, u, draw, guide=False)

            return _slope(log_joint, keys, loss)

        def score(u):
            # the difference is 0; its derivative in θ is the score's
            return value(u) + slope(params)(u) - slope(fixed)(u)

        return loss(score, batch.v, noise).mean()

    def hard_draw(
        self, rng_key: Array, params: Mapping[str, Any], batch: visible.Batch, v: Array
    ) -> tuple[dict[str, Array], tuple[Array, ...]]:
        """One draw of every site of the guide, and the rows; relaxed and summed-out sites drawn as discrete ones.

        The guide's own random keys come with it.
        """
        args, kwargs = batch.arguments(v)
        with seed(rng_seed=rng_key), record(params, batch.indices, harden=True) as run:
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
        """log p̃(v, h) of every example at a :meth:`hard_draw`."""
        args, kwargs = batch.arguments(v)
        with seed(rng_seed=rng_key), record(params, values) as run:
            self.model(*args, **kwargs)
        return joint_per_example(run.sites.values(), len(v))

    def covariance_loss(
        self,
        rng_key: Array,
        params: Mapping[str, Any],
        fixed: Mapping[str, Any],
        batch: visible.Batch,
        loss: OuterLoss,
        num_particles: int,
    ) -> Array:
        """J, with the derivative in θ that VaGES estimates (Bao et al. 2021): see ``Covariance``.

        :param fixed: ``params`` without a path to θ.
        """
        key_noise, key_draw, key_score = jax.random.split(rng_key, 3)
        key_model, key_guide = jax.random.split(key_score)
        noise = loss.draw(key_noise, batch.v)
        v = loss.perturb(batch.v, noise)

        def log_guide(u, values, keys):
            values = self.fixed_latents(key_guide, fixed, batch, u, values, keys)
            sites = self.guide_at(key_guide, fixed, batch, u, values, keys, harden=True)
            return sum(site.log_prob().sum() for site in sites.values())

        def one(drawn):
            values, keys = drawn

            def model_score(u):
                return jax.grad(lambda u: self.log_joint(key_model, params, batch, u, values).sum())(u)

            log_joint = self.log_joint(key_model, params, batch, v, values)
            return model_score(v), log_joint, jax.grad(log_guide)(v, values, keys)

        keys = jax.random.split(key_draw, num_particles)
        model_scores, log_joints, guide_scores = jax.vmap(lambda key: one(self.hard_draw(key, fixed, batch, v)))(keys)
        fixed_scores = jax.lax.stop_gradient(model_scores)
        centred = fixed_scores - fixed_scores.mean(0)

        def score(u):
            # ... of which only the derivative in θ is at stake: the values of the other two add up to 0
            value = (fixed_scores - jax.lax.stop_gradient(guide_scores)).mean(0)
            varying = log_joints - jax.lax.stop_gradient(log_joints)
            covariance = (centred * varying[..., None]).sum(0) / (num_particles - 1)
            return value + (model_scores - fixed_scores).mean(0) + covariance

        return loss(score, batch.v, noise).mean()

    def moved(self, rng_key: Array, params: Mapping[str, Any], batch: visible.Batch, v: Array) -> dict[str, Any]:
        """The mutable state after one pass over v, as SVI's one pass a step leaves it."""
        args, kwargs = batch.arguments(v)
        key_model, key_guide = jax.random.split(rng_key)
        with seed(rng_seed=key_guide), record(params, batch.indices) as q:
            self.guide(*args, **kwargs)
        values = {name: site.value for name, site in q.sites.items() if not site.is_observed}
        with seed(rng_seed=key_model), record({**params, **q.mutable}, {**values, **batch.indices}, self.softened) as p:
            self.model(*args, **kwargs)
        return {**q.mutable, **p.mutable}


def _slope(log_weight: Callable[[Array, Any], Array], draws: Any, loss: OuterLoss) -> Callable[[Array], Array]:
    """The gradient in v of the draws' mean log weight; of each, shape (L, n, D), where the loss wants them apart."""
    if loss.average == "unbiased":
        return lambda v: jax.vmap(lambda draw: jax.grad(log_weight)(v, draw))(draws)
    return jax.grad(lambda v: jax.vmap(lambda draw: log_weight(v, draw))(draws).mean())


def _run_until(
    program: Callable, rng_key: Array, args: Any, kwargs: Any, values: Mapping[str, Any], sought: Collection[str]
) -> record:
    """Run a program until the rows of the plates ``sought`` are known; to its end if there are none."""
    with seed(rng_seed=rng_key), record({}, values, sought=sought) as run:
        try:
            program(*args, **kwargs)
        except rows.Found:
            pass
    return run


def _subsample(rng_key: Array, full_size: int, size: int) -> Array:
    """Rows without replacement, every set of them as likely; in order.

    NumPyro's own plate shuffles all ``full_size`` indices, which at 50,000 takes longer than a small model's step. Here
    rows that were drawn twice are drawn again, until none are: no row is told from another, so neither are the sets.
    """
    if 8 * size > full_size:  # too many would be drawn twice
        return jnp.sort(jax.random.permutation(rng_key, full_size)[:size])

    def draw(key):
        return jax.random.randint(key, (size,), 0, full_size)

    def twice(rows):
        return jnp.concatenate([jnp.zeros(1, bool), rows[1:] == rows[:-1]])

    def again(carry):
        key, rows = carry
        key, key_rows = jax.random.split(key)
        return key, jnp.sort(jnp.where(twice(rows), draw(key_rows), rows))

    rng_key, key_rows = jax.random.split(rng_key)
    return jax.lax.while_loop(lambda c: twice(c[1]).any(), again, (rng_key, jnp.sort(draw(key_rows))))[1]


def expectation(site: Site, probs: Sequence[tuple[str, Array, int]]) -> Array:
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


def per_example(site: Site, n: int) -> Array:
    """A site's log density summed over all but the leading dimension, of shape (n,).

    :raises ValueError: where the leading dimension is not the batch.
    """
    return _per_example(site.name, site.log_prob(), n)


def _per_example(name: str, log_prob: Array, n: int) -> Array:
    if jnp.ndim(log_prob) < 1 or log_prob.shape[0] != n:
        raise ValueError(
            f"Site '{name}' has a log density of shape {jnp.shape(log_prob)}; its leading dimension "
            f"is not the batch of {n}, so it can't be told which example it belongs to. Put the "
            "statement inside the data plate, and give factors one entry an example."
        )
    return log_prob.reshape(n, -1).sum(-1)


def leading_plates(sites: Iterable[Site]) -> frozenset[str]:
    """The plates along the leading axis of the sites' values: of the visible ones those whose rows are the batch."""
    lead = [(s, jnp.ndim(s.value) - s.fn.event_dim) for s in sites]
    return frozenset(frame.name for s, dims in lead for frame in s.frames if frame.dim == -dims)


def joint_per_example(sites: Iterable[Site], n: int) -> Array:
    """The sites' joint log density of every example, shape (n,).

    What stands outside the batch and is one number for all of it (a penalty on the weights) is left out: it is the
    same for every draw of h; :func:`analyse` has made sure of that.
    """
    total: Any = sum(per_example(site, n) for site in sites if jnp.ndim(site.log_prob()) > 0)
    return total


class Analysis(NamedTuple):
    """What the first run gave: the pair, and initial values (unconstrained parameters, mutable state)."""

    pair: Pair
    theta: dict[str, Any]
    phi: dict[str, Any]
    mutable: dict[str, Any]


def analyse(
    model: Callable,
    guide: Callable | None,
    leaves: Sequence[Any],
    spec: Any,
    rng_key: Array,
    init_params: Mapping[str, Any] | None,
    names: Sequence[str] | None,
    loss: OuterLoss | None,
    strategy: Any,
    static_kwargs: Mapping[str, Any],
    discrete: bool = False,
    partial_guide: bool = False,
    look: Callable[[Analysis, visible.Batch, Array], None] | None = None,
) -> Analysis:
    """Run guide and model once on these arguments, check all that can be checked, and describe them.

    It always runs on concrete numbers: inside a compiled function, where the arguments have none, on stand-ins
    of the same shapes.

    :param guide: None for a model alone: its latents are then nobody's.
    :param loss: None for a method that takes no score of the pair.
    :param strategy: the hypergradient: it says what it needs of the guide.
    :param discrete: whether discrete sites may be visible.
    :param partial_guide: whether the guide may leave latents out, and the model may have no parameters.
    :param look: is shown the pair, its initial values and a batch, all in concrete numbers, and a random key.
    :raises ValueError: for every misuse, naming the site and the cure.
    """
    alone = guide is None
    guide = _no_guide if guide is None else guide
    with jax.ensure_compile_time_eval():
        asked = (rng_key, leaves, init_params)
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(asked))
        if traced:
            rng_key = jax.random.key(0)
        key_stand_in, _, key_guide, key_scores = jax.random.split(rng_key, 4)
        # each of its own: two arguments of one shape are told apart by their values
        leaves = [_stand_in(leaf, jax.random.fold_in(key_stand_in, i)) for i, leaf in enumerate(leaves)]
        given = {k: jax.tree.map(lambda x: _stand_in(x, key_stand_in), v) for k, v in (init_params or {}).items()}
        model, guide = (partial(p, **static_kwargs) if static_kwargs else p for p in (model, guide))
        p, q, soft = _first_run(model, guide, rng_key, given, leaves, spec)
        plates = rows.plates(q, p, leaves)
        # an example that stands twice can't be moved on its own in every program: a look is taken at rows that don't
        twice = {
            plate.argument: jnp.arange(plate.size, dtype=leaves[plate.argument].dtype) % plate.full_size
            for plate in plates.values()
            if plate.argument is not None and not rows.are_distinct(leaves[plate.argument])
        }
        if twice:
            leaves = [twice.get(i, leaf) for i, leaf in enumerate(leaves)]
            p, q, soft = _first_run(model, guide, rng_key, given, leaves, spec)
        p.handed.update(name for name in q.handed if name in p.subsamples)
        _check_plates((*p.sites.values(), *q.sites.values()))
        latents = {name: s for name, s in q.sites.items() if not s.is_observed}
        sites = visible.find(p.sites, leaves, names, discrete)
        for found in sites:
            _warn_scaled(p.sites[found.name])
        if not (alone or partial_guide):
            _check_sites(p.sites, latents, sites[0].shape[0])
        for name, site in q.sites.items():
            if isinstance(base_of(site.fn), Unit):
                raise ValueError(
                    f"The guide has a factor, '{name}' (AutoDAIS and its kin have one): its log density is not that of "
                    "its draws then, and the score needs it. Use a guide of sample statements alone."
                )
        theta, phi = collect(p.params), collect(q.params)
        reject_shared(theta, phi)
        # a module with priors on all its weights leaves a parameter without numbers
        if not (partial_guide or jax.tree.leaves({name: p.params[name]["value"] for name in theta})):
            raise ValueError("The model has no parameter to train: no numpyro.param and no module.")
        unknown = sorted(set(given) - set(theta) - set(phi) - set(q.mutable) - set(p.mutable))
        if unknown:
            raise ValueError(
                f"init_params names {unknown}, but the programs' parameters are {sorted({**theta, **phi})}."
            )
        enumerated = tuple(name for name, s in latents.items() if is_enumerated(s.infer))
        averaged = tuple(name for name, s in latents.items() if is_averaged(s.fn))
        sampled = tuple(name for name, s in latents.items() if not (name in (*enumerated, *averaged) or s.is_delta))
        every = (*p.sites.values(), *q.sites.values())
        dims = [len(s.fn.batch_shape) for s in every] + [-f.dim for s in every for f in s.frames]
        pair = Pair(
            model,
            guide,
            sites,
            theta,
            phi,
            soft,
            enumerated,
            sampled,
            plates,
            _num_data(p.sites, sites),
            max(dims),
            tuple(name for name in sampled if not latents[name].fn.has_rsample),
            averaged=averaged,
            data_plates=leading_plates(p.sites[site.name] for site in sites),
        )
        if loss is not None:
            strategy.check(loss, pair)
        start = _start(pair, p, q)
        shapes = {name: jax.tree.map(jnp.shape, value) for name, value in {**start.theta, **start.phi}.items()}
        pair = replace(pair, shapes=shapes)
        start = start._replace(pair=pair)
        handed = frozenset(name for name, plate in plates.items() if plate.is_handed)
        batch = visible.batch(sites, {**q.subsamples, **p.subsamples}, leaves, spec, handed=handed)
        pair = replace(pair, reads_rows=_reads_rows(start, batch))
        start, batch = start._replace(pair=pair), replace(batch, reads_rows=pair.reads_rows)
        _check_guide(start, latents, batch, key_guide, strategy)
        if loss is not None:
            change = _change_of_variables(start, batch, key_scores, latents, p.sites)
            pair = replace(pair, change=change)
            start = start._replace(pair=pair)
            _check_scores(start, batch, key_scores, loss, [name for name in latents if name in p.sites])
            if not strategy.reparameterises:
                _check_examples(start, batch, key_scores)
        if look is not None:
            look(start, batch, key_scores)
    if traced or twice:  # initial values may depend on the key and on the data: these come from the ones asked for
        rng_key, leaves, init_params = asked
        p, q, _ = _first_run(model, guide, rng_key, init_params or {}, leaves, spec)
        start = _start(start.pair, p, q)
    return start


def _no_guide(*args: Any, **kwargs: Any) -> None:
    """The guide of a model alone."""


def _reads_rows(start: Analysis, batch: visible.Batch) -> bool:
    """Whether both programs run, to the same result, on arguments that have the plate's rows and no others."""
    pair = start.pair
    leading = all(leaf.ndim == -s.axis for s in pair.sites for leaf in [batch.leaves[s.leaves[0]]])
    if not (leading and any(site.plate for site in pair.sites)):
        return False

    params = pair.params(start.theta, start.phi, start.mutable)

    def log_weight(batch, rng_key):
        draw, _ = pair.draw(rng_key, params, batch, batch.v)
        return pair.log_weight(rng_key, params, batch, batch.v, draw)

    try:
        lean = _once(log_weight, replace(batch, reads_rows=True), jax.random.key(0))
    except Exception:  # whatever a program wanted of the argument: it gets the whole array then
        return False
    return bool(jnp.allclose(lean, _once(log_weight, batch, jax.random.key(0))))


def _once(function: Callable[..., Any], batch: visible.Batch, *args: Any) -> Any:
    """``function(batch, *args)``, compiled; the visible arguments, whole data sets maybe, are no constants of it."""
    places = [i for site in batch.sites for i in site.leaves]

    def run(visible, *args):
        leaves = list(batch.leaves)
        for i, leaf in zip(places, visible, strict=True):
            leaves[i] = leaf
        return function(replace(batch, leaves=leaves), *args)

    return compiled_once(run, len(batch.v))([batch.leaves[i] for i in places], *args)


def resized(pair: Pair, leaves: Sequence[Any], spec: Any) -> Pair | None:
    """The same programs on arguments that differ in size alone, described without running or compiling anything.

    :returns: None if they turn out to have other sites, parameters or subsampling plates there.
    """

    def run(arrays):
        rest = iter(arrays)
        filled = [next(rest) if isinstance(leaf, Array) else leaf for leaf in leaves]
        seen.extend(_first_run(pair.model, pair.guide, jax.random.key(0), {}, filled, spec)[:2])

    seen: list[record] = []
    jax.eval_shape(run, [leaf for leaf in leaves if isinstance(leaf, Array)])
    p, q = seen
    known = {**q.plates, **p.plates}
    handed = {name for name, plate in pair.subsampled.items() if plate.is_handed}
    subsampled = {
        name: replace(pair.subsampled[name], full_size=sizes[0], size=sizes[1])
        for name, sizes in known.items()
        if name in pair.subsampled and (sizes[0] != sizes[1] or name in handed)
    }
    others = {name for name, sizes in known.items() if sizes[0] != sizes[1] and name not in subsampled}
    latents = [name for name, s in q.sites.items() if not (s.is_observed or s.is_delta)]
    same = (
        not others
        and set(subsampled) == set(pair.subsampled)
        and set(latents) == {*pair.enumerated, *pair.sampled}
        and (set(p.params), set(q.params)) == (set(pair.theta), set(pair.phi))
        and all(site.name in p.sites for site in pair.sites)
    )
    if not same:
        return None
    for site in pair.sites:
        visible.require_declared(p.sites[site.name])
    sites = tuple(replace(site, shape=jnp.shape(p.sites[site.name].value)) for site in pair.sites)
    num_data = _num_data(p.sites, sites)
    return replace(pair, sites=sites, subsampled=subsampled, num_data=num_data, shapes={})


def _first_run(
    model: Callable, guide: Callable, rng_key: Array, given: Mapping[str, Any], leaves: Sequence[Any], spec: Any
) -> tuple[record, record, frozenset[str]]:
    """What model and guide recorded, the model at the guide's draws; and the guide's relaxed sites."""
    args, kwargs = jax.tree.unflatten(spec, leaves)
    _, key_model, key_guide, _ = jax.random.split(rng_key, 4)
    q = record(given)
    try:
        with seed(rng_seed=key_guide), q:
            guide(*args, **kwargs)
    except (ValueError, TypeError) as error:
        rows.explain(error, q.plates, leaves)
        raise
    latents = {name: s for name, s in q.sites.items() if not s.is_observed}
    soft = frozenset(
        name for name, s in latents.items() if isinstance(base_of(s.fn), ConcreteBernoulli | ConcreteOneHot)
    )
    values = {name: s.value for name, s in latents.items()}
    # a plate that would draw rows has to take the guide's
    p = record(given, values, soft, offered=q.subsamples)
    try:
        with seed(rng_seed=key_model), p:
            model(*args, **kwargs)
    except (ValueError, TypeError) as error:
        rows.explain(error, p.plates, leaves)
        if "relaxed guide site" in str(error):
            raise ValueError(f"Sites {sorted(soft)}: {error}.") from error
        raise
    return p, q, soft


def _start(pair: Pair, p: record, q: record) -> Analysis:
    return Analysis(
        pair,
        unconstrain(pair.theta, {name: s["value"] for name, s in p.params.items()}),
        unconstrain(pair.phi, {name: s["value"] for name, s in q.params.items()}),
        # of strong types, as the parameters: a program may start a counter at 0.0
        jax.tree.map(lambda x: jax.lax.convert_element_type(x, jnp.result_type(x)), {**q.mutable, **p.mutable}),
    )


def _stand_in(leaf: Any, rng_key: Array) -> Any:
    if not isinstance(leaf, jax.core.Tracer):
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jax.random.normal(rng_key, leaf.shape, leaf.dtype)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _num_data(model_sites: Mapping[str, Site], sites: Sequence[visible.VisibleSite]) -> int:
    """How many examples a host ELBO's value speaks for: n, times the plates' N/B."""
    first = model_sites[sites[0].name]
    num = float(sites[0].shape[0])
    for frame in first.frames:
        full_size, size = first.plates[frame.name]
        num *= full_size / size
    return round(num)


def _warn_scaled(site: Site) -> None:
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


def _check_plates(sites: Iterable[Site]) -> None:
    """:raises ValueError: for a plate whose rows are drawn out of sight: every pass would be about others."""
    for site in sites:
        for frame in site.frames:
            if frame.name not in site.plates:
                raise ValueError(
                    f"Plate '{frame.name}' around site '{site.name}' is hidden by a handler (block), and so is which "
                    "rows it takes: model and guide would be about others at every pass. Leave the plate in sight, "
                    f"hide=[...] without '{frame.name}'."
                )


def _cure_of_missing(site: Site, num_rows: int) -> str:
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


def _check_sites(model_sites: Mapping[str, Site], latents: Mapping[str, Site], num_rows: int) -> None:
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


def _check_guide(
    start: Analysis, latents: Mapping[str, Site], batch: visible.Batch, rng_key: Array, strategy: Any
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

    def value(phi):
        params = start.pair.params(start.theta, phi, start.mutable)
        return start.pair.draw(rng_key, params, batch, batch.v)[0].values[name].sum()

    def first(phi):
        return sum(g.sum() for g in jax.tree.leaves(jax.grad(value)(phi)))

    jax.eval_shape(value, start.phi)  # what fails without derivatives is the program's own fault, and told as such
    try:
        jax.eval_shape(jax.grad(first), start.phi)
    except (NotImplementedError, ValueError) as error:
        return str(error).splitlines()[0].split(". ")[0]  # JAX's own cures are not for users of a distribution
    return None


def _check_examples(start: Analysis, batch: visible.Batch, rng_key: Array) -> None:
    """:raises ValueError: where the model's log density does not fall apart into those of the examples."""
    pair = start.pair
    params = pair.params(start.theta, start.phi, start.mutable)
    args, kwargs = batch.arguments(batch.v)
    seen: dict[str, Array] = {}
    for key in jax.random.split(rng_key):
        values, _ = pair.hard_draw(key, params, batch, batch.v)
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


def _change_of_variables(
    start: Analysis,
    batch: visible.Batch,
    rng_key: Array,
    latents: Mapping[str, Site],
    model_sites: Mapping[str, Site],
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


def _check_scores(
    start: Analysis, batch: visible.Batch, rng_key: Array, loss: OuterLoss, latents: Sequence[str]
) -> None:
    pair = start.pair

    def scores(batch, rng_key):
        """The gradient in v of log p̃; and how the guide looks at v, at moved parameters and at the initial ones."""
        key_params, key_draw, key_score, key_v = jax.random.split(rng_key, 4)
        # off the initial values: at weights of zero a score may vanish though the energy reads v
        theta, phi = jittered(key_params, (start.theta, start.phi))
        params = pair.params(theta, phi, start.mutable)
        v = batch.v + 0.1 * jax.random.normal(key_v, batch.v.shape, batch.v.dtype)
        draw, _ = pair.draw(key_draw, params, batch, v)

        def log_weight(u, guide):
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

        def seen(phi):
            params = pair.params(theta, phi, start.mutable)

            def guide_at(u, values):
                return pair.guide_at(key_draw, params, batch, u, values, draw.keys)

            return guides.sight(guide_at, v, pair.change)

        both = jax.tree.map(lambda *x: jnp.stack(x), phi, start.phi)
        looks = jax.vmap(seen)(both) if start.phi else seen(phi)
        return model_score, looks if latents else None

    model_score, seen = _once(scores, batch, rng_key)
    start_column = 0
    for site in pair.sites:
        size = math.prod(site.shape[1:])
        columns = model_score[:, start_column : start_column + size]
        start_column += size
        if not bool(columns.any()):
            raise ValueError(
                f"The score of visible site '{site.name}' is zero everywhere: the energy never reads its "
                "value. Use the site's value (the argument, or what numpyro.sample returns) in the energy, and do "
                "not stop its gradient."
            )
    if seen is not None:
        guides.require_sight(latents, seen)
