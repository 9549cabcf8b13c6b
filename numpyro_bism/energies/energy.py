"""A model's log p̃(v, h; θ) on one batch, row by row."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.distributions import biject_to
from numpyro.distributions.discrete import BernoulliLogits, BernoulliProbs, MultinomialLogits, MultinomialProbs
from numpyro.handlers import block as hidden
from numpyro.handlers import seed

from ..distributions import ConcreteBernoulli, ConcreteOneHot, base_of, discretized
from ..programs import visible
from ..programs.modes import on_numbers
from ..programs.records import SiteRecord, joint_per_example, leading_plates, record
from .density import VISIBLE, Block, Density, Latent, Point, close, curvature, pack
from .proof import Proof, prove
from .structure import find_blocks
from .values import COVARIATES

Program = Callable[[Any, Array], Array]
"""A log density, from a site's distribution and its value."""


@dataclass(frozen=True)
class Energy:
    """A model's log p̃(v, h; θ) on one batch.

    :ivar latents: by site, discrete visible ones among them.
    :ivar num_rows: of the batch.
    :ivar observed: the discrete visible sites.
    :ivar declared: "gaussian" or "affine", by the name in a point of what the user says of them.
    :ivar resizes: whether the model runs on any number of rows; else they are taken ``num_rows`` at a time.
    :ivar is_homogeneous: whether all rows have the same density: no covariates that tell them apart.
    :ivar free: the plates that take as many rows as a point has, whatever size they say.
    """

    model: Callable[..., Any]
    sites: tuple[visible.VisibleSite, ...]
    batch: visible.Batch
    latents: Mapping[str, Latent]
    num_rows: int
    resizes: bool = False
    is_homogeneous: bool = False
    blocks: tuple[Block, ...] = ()
    observed: tuple[str, ...] = ()
    declared: Mapping[str, str] = field(default_factory=dict)
    free: frozenset[str] = frozenset()

    @property
    def hidden(self) -> tuple[str, ...]:
        """The sites that are not visible."""
        return tuple(name for name in self.latents if name not in self.observed)

    @classmethod
    def from_model(
        cls,
        model: Callable[..., Any],
        sites: tuple[visible.VisibleSite, ...],
        batch: visible.Batch,
        params: Mapping[str, Any],
        rng_key: Array,
        values: Mapping[str, Array] | None = None,
        like: "Energy | None" = None,
        moves_visible: bool = True,
    ) -> tuple["Energy", Point]:
        """The energy, tried out on this batch, and the point where it was: the data and one draw of the latents.

        :param params: all that the model is given by name.
        :param values: of the latents, if the model should not draw them itself.
        :param like: the same energy, tried out before.
        :param moves_visible: whether the visible values are of any block; else their structure is not looked for.
        :raises ValueError: where a latent has not the batch as its leading dimension, or is of no kind known here; for
            a structure that is declared and not there.
        """
        key_model, _ = jax.random.split(rng_key)
        args, kwargs = batch.arguments(batch.v)
        with seed(rng_seed=key_model), record(params, {**batch.indices, **(values or {})}, discretize=True) as run:
            model(*args, **kwargs)
        n = len(batch.v)
        drawn = {name: site for name, site in run.sites.items() if not site.is_observed}
        latents = {name: _latent(site, n) for name, site in drawn.items()}
        observed = {site.name: _latent(run.sites[site.name], n) for site in sites if site.is_discrete}
        x = {VISIBLE: _widened(batch.v)}
        for name, latent in latents.items():
            value = drawn[name].value
            if latent.kind == "real":
                value = latent.transform.inv(value)
            x[name] = value.astype(x[VISIBLE].dtype) if latent.kind != "labels" else value
        if like is not None:
            return like.at(batch), {**x, **like.seen(batch.v)}
        energy = cls(model, sites, batch, latents, n)
        if observed:
            energy, seen = energy._observing(params, x, observed)
            x |= seen
        energy = replace(energy, resizes=energy._can_resize(params, x))
        proof = prove(energy, params, x)
        if energy.resizes and proof.reads_position:  # a row that comes again is not the same row
            energy = replace(energy, resizes=False)
            proof = prove(energy, params, x)
        elif not energy.resizes and COVARIATES in proof.degrees.groups:
            proof = energy._proved_at_any_size(params, run.sites, x) or proof
        energy = replace(energy, is_homogeneous=COVARIATES not in proof.degrees.groups)
        moving = [name for name in (VISIBLE, *latents, *observed) if moves_visible or name in latents]
        energy = replace(energy, declared=_declared(run.sites, energy.sites, energy.latents))
        energy = replace(energy, blocks=find_blocks(energy, params, x, proof, moving))
        energy.require_declared(params, x)
        return energy, x

    def log_joint(
        self, params: Mapping[str, Any], x: Point, jacobian: bool = True, program: Program | None = None
    ) -> Array:
        """log p̃ of every row, of shape (m,), with or without the Jacobians of transformed latents.

        Row i of a point with more rows than the batch has the covariates of row i modulo ``num_rows``.

        :param program: of a site's distribution and value, instead of the distribution's own log density.
        """
        m, n = len(x[VISIBLE]), self.num_rows
        if m == n:
            return self._run(params, self.batch, x, jacobian, program)
        if self.resizes:
            return self._run(params, self._resized(m), x, jacobian)
        passes = -(-m // n)
        rows = jnp.arange(passes * n) % m  # the last pass is filled up
        parts = jax.tree.map(lambda a: a[rows].reshape(passes, n, *a.shape[1:]), x)
        return jax.vmap(lambda part: self._run(params, self.batch, part, jacobian))(parts).reshape(-1)[:m]

    def density(self, params: Mapping[str, Any], x: Point) -> Density:
        """At these parameters; x is any point, at which the constant precisions are taken."""
        density = Density(lambda x: self.log_joint(params, x), self, self.blocks, {})
        self.require_declared(params, x)
        first = jax.tree.map(lambda a: a[:1], x) if self.resizes else x
        constant = [b for b in self.blocks if b.kind == "gaussian" and b.is_constant]
        return replace(density, precisions={b.names: curvature(density, first, b)[0] for b in constant})

    def at(self, batch: visible.Batch) -> "Energy":
        """The same on another batch."""
        soft = {site.name for site in self.sites if site.is_soft}
        sites = tuple(replace(site, is_soft=site.name in soft) for site in batch.sites)
        return replace(self, sites=sites, batch=replace(batch, sites=sites), num_rows=len(batch.v))

    def require_declared(self, params: Mapping[str, Any], x: Point) -> None:
        """Where the numbers are known; in compiled programs what is made of a false declaration is NaN.

        :raises ValueError: where log p̃ is not at x what the user has declared.
        """
        blocks = [block for block in self.blocks if block.is_declared]
        if not blocks or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, x))):
            return
        density = Density(lambda x: self.log_joint(params, x), self, (), {})
        for block in blocks:
            with on_numbers():
                good = jax.jit(lambda x, block=block: density.holds(x, block))(x)
                row = int(jnp.argmin(good))
                good = bool(good.all())
            if not good:
                is_not = {
                    "affine": "affine in its value: its gradient differs between configurations. Take the declaration "
                    "out: the units are then drawn and summed one by one.",
                    "gaussian": "quadratic in its value with a positive definite precision: at the mode and a few "
                    "standard deviations off it, value, gradient or curvature are others. Take the declaration out: "
                    "integrals are then done by quadrature, draws by Langevin dynamics or NUTS.",
                }[block.kind]
                raise ValueError(
                    f"{self.called(block.names[0])} declared infer={{'structure': '{block.kind}'}}, but the energy, at "
                    f"row {row}, is not {is_not}"
                )

    def called(self, name: str) -> str:
        """A variable, for the beginning of a message."""
        names = [site.name for site in self.sites if not site.is_discrete] if name == VISIBLE else [name]
        return f"Site {names[0]!r} is" if len(names) == 1 else f"Sites {', '.join(map(repr, names))} are"

    def with_rows(self, m: int) -> "Energy":
        """The same on m rows, the batch's again and again, if it ``resizes``."""
        return replace(self, batch=self._resized(m), num_rows=m)

    def seen(self, v: Array) -> Point:
        """The visible part of a point, from all visible values side by side as a batch has them."""
        v = _widened(v)
        sizes = [self.size(name) for name in self.observed]
        start = v.shape[1] - sum(sizes)
        x = {VISIBLE: v[:, :start]}
        for name, size in zip(self.observed, sizes, strict=True):
            latent = self.latents[name]
            dtype = latent.values.dtype if latent.kind == "labels" else v.dtype
            x[name] = v[:, start : start + size].reshape(len(v), *latent.shape).astype(dtype)
            start += size
        return x

    def size(self, name: str) -> int:
        """How many numbers a variable has in one row."""
        if name == VISIBLE:
            return sum(visible.size(site) for site in self.sites if not site.is_discrete)
        latent = self.latents[name]
        return math.prod(latent.unconstrained if latent.kind == "real" else latent.shape)

    def values(self, x: Point) -> dict[str, Array]:
        """A point as the sites' own values, by name: visible and latent."""
        found, start = {}, 0
        for site in self.sites:
            if site.is_discrete:
                continue
            size = math.prod(site.shape[1:])
            found[site.name] = x[VISIBLE][..., start : start + size].reshape(*x[VISIBLE].shape[:-1], *site.shape[1:])
            start += size
        for name, latent in self.latents.items():
            if name in x:
                found[name] = latent.transform(x[name]) if latent.kind == "real" else x[name]
        return found

    def _run(
        self,
        params: Mapping[str, Any],
        batch: visible.Batch,
        x: Point,
        jacobian: bool,
        program: Program | None = None,
    ) -> Array:
        m = len(x[VISIBLE])
        args, kwargs = batch.arguments(pack(x, (VISIBLE, *self.observed)) if self.observed else x[VISIBLE])
        values, total = dict(batch.indices), jnp.zeros(m, x[VISIBLE].dtype)
        for name in self.hidden:
            latent = self.latents[name]
            values[name] = x[name]
            if latent.kind == "real":
                values[name] = latent.transform(x[name])
                terms = latent.transform.log_abs_det_jacobian(x[name], values[name])
                total += terms.reshape(m, -1).sum(-1) if jacobian else 0.0
        soft = frozenset(name for name, latent in self.latents.items() if latent.kind in ("bits", "onehot"))
        # one key for every point: what a model draws by itself (dropout) is part of the density
        with hidden(), seed(rng_seed=0), record(params, values, soft) as run:
            self.model(*args, **kwargs)
        sites = list(run.sites.values())
        if program is not None:
            sites = [replace(site, fn=_Rewritten(site.fn, program)) for site in sites]
        return joint_per_example(sites, m) + total

    def _observing(self, params: Mapping[str, Any], x: Point, observed: Mapping[str, Latent]) -> tuple["Energy", Point]:
        """This energy with discrete visible sites, as real numbers where the model takes them for the same; its point.

        Tried, for a model may look its values up in a table: such sites are "labels", whatever they are declared.
        """
        v = self.batch.v
        energy = replace(self, latents={**self.latents, **observed}, observed=tuple(observed))
        discretized = energy.log_joint(params, {**x, **energy.seen(v)})
        for name, latent in observed.items():
            sites = tuple(replace(site, is_soft=site.is_soft or site.name == name) for site in energy.sites)
            trial = replace(energy, sites=sites, batch=replace(energy.batch, sites=sites))
            takes = latent.kind != "labels"
            if takes:
                try:
                    takes = bool(close(trial.log_joint(params, {**x, **energy.seen(v)}), discretized))
                except Exception:  # whatever a program trips over: it gets integers then
                    takes = False
            if takes:
                energy = trial
            elif latent.kind != "labels":
                labels = replace(latent, kind="labels", values=latent.support(int))
                energy = replace(energy, latents={**energy.latents, name: labels})
        return energy, energy.seen(v)

    def _resized(self, m: int) -> visible.Batch:
        """The batch with its rows repeated, or cut, to m: of all arguments that have as many rows as the data."""
        n = self.num_rows
        rows = jnp.arange(m) % n
        visible_leaves = {i for site in self.sites for i in site.leaves}
        leaves = [
            leaf[rows] if isinstance(leaf, Array) and leaf.shape[:1] == (n,) and i not in visible_leaves else leaf
            for i, leaf in enumerate(self.batch.leaves)
        ]
        sites = tuple(replace(site, shape=(m, *site.shape[1:])) for site in self.sites)
        indices = {**self.batch.indices, **{name: jnp.arange(m) for name in self.free}}
        # the programs are given v in the visible leaves' place, so these need no more than their type
        return replace(self.batch, sites=sites, leaves=leaves, indices=indices)

    def _has_equal_rows(self, params: Mapping[str, Any], x: Point) -> bool:
        """Whether the same point has one density in all rows."""
        same = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), x)
        log_joint = jax.jit(self.log_joint)(params, same)
        return bool(close(log_joint, log_joint[:1]))

    def _proved_at_any_size(
        self, params: Mapping[str, Any], recorded: Mapping[str, SiteRecord], x: Point
    ) -> Proof | None:
        """What is proved where the batch's plates take any number of rows, if the density is the same there; else None.

        A plate of a fixed size, or one that draws rows, may have as many as there are units: an array of parameters
        is then taken for one of covariates. At another number its rows are told from all else. A program with rows of
        its own has not as many then, and fails, or reads them by their places, which shows.
        """
        names = self._batch_plates(recorded)
        if not names:
            return None
        # a copy of all the data has no more rows than these
        free = replace(self, batch=replace(self.batch, reads_rows=True), resizes=True, free=names)
        proof = prove(free, params, x)  # first of all, as it compiles nothing
        if proof.reads_position or not free._can_resize(params, x, self):
            return None
        hides = COVARIATES not in proof.degrees.groups and not self._has_equal_rows(params, x)
        return None if hides else proof

    def _batch_plates(self, recorded: Mapping[str, SiteRecord]) -> frozenset[str]:
        """The plates whose rows are the batch, but for those that are handed them: these are the user's."""
        names = (*(site.name for site in self.sites), *self.latents)
        return leading_plates(recorded[name] for name in names) - self.batch.handed

    def _can_resize(self, params: Mapping[str, Any], x: Point, like: "Energy | None" = None) -> bool:
        """Tried, at one row more: plates of a fixed size and subsampled ones say no.

        :param like: an energy that has to be the same on these rows.
        """
        if self.batch.indices.keys() - self.free:
            return False
        n = self.num_rows
        wrapped = jax.tree.map(lambda a: a[jnp.arange(n + 1) % n], x)
        try:
            found = jax.jit(replace(self, resizes=True).log_joint)(params, wrapped)
        except Exception:  # whatever a program trips over: it gets its own number of rows then
            return False
        return bool(close(found[:n], jax.jit((like or self).log_joint)(params, x)) & close(found[n:], found[:1]))


@dataclass(frozen=True)
class _Rewritten:
    """A distribution whose log density another program computes."""

    fn: Any
    program: Program

    def log_prob(self, value: Array) -> Array:
        return self.program(self.fn, value)


def _declared(
    recorded: Mapping[str, SiteRecord], sites: Sequence[visible.VisibleSite], latents: Mapping[str, Latent]
) -> dict[str, str]:
    """By variable, the structure that ``infer={"structure": ...}`` declares.

    :raises ValueError: for one that does not exist, for one that a variable of its kind can't have, and for one of what
        is no variable by itself.
    """
    said = {name: site.infer["structure"] for name, site in recorded.items() if site.infer.get("structure") is not None}
    visible_sites = [site.name for site in sites if not site.is_discrete]
    found = {}
    for name, structure in said.items():
        if name not in visible_sites and name not in latents:
            raise ValueError(f"Site '{name}' declares infer={{'structure': ...}}, but it is no variable. Leave it out.")
        kind = latents[name].kind if name in latents else "real"
        fitting = {"real": "gaussian", "bits": "affine", "onehot": "affine"}.get(kind)
        if structure != fitting:
            cure = f"Declare infer={{'structure': '{fitting}'}}" if fitting else "Take the declaration out"
            raise ValueError(
                f"Site '{name}' ({type(base_of(recorded[name].fn)).__name__}) is declared infer={{'structure': "
                f"{structure!r}}}, which it can't have: real variables may be 'gaussian', bits and one-hot vectors "
                f"'affine'. {cure}."
            )
        if name in visible_sites and not said.keys() >= set(visible_sites):
            raise ValueError(
                f"Site '{name}' is declared infer={{'structure': 'gaussian'}} and others of the visible sites "
                f"{visible_sites} are not. They are one variable here: declare all of them, or none."
            )
        found[VISIBLE if name in visible_sites else name] = structure
    return found


def _widened(v: Array) -> Array:
    """In the type that JAX prefers: with x64, float32 data meet float64 parameters and draws."""
    return v.astype(jnp.promote_types(v.dtype, jnp.result_type(float)))


def _latent(site: SiteRecord, n: int) -> Latent:
    fn, base, shape = discretized(site.fn), base_of(discretized(site.fn)), jnp.shape(site.value)
    if shape[:1] != (n,):
        raise ValueError(
            f"Latent site '{site.name}' has shape {shape}, without the batch of {n} as its leading dimension: all "
            "examples share it, so it is a part of no example. Put it inside the data plate, or make it a parameter."
        )
    if isinstance(base, BernoulliLogits | BernoulliProbs | ConcreteBernoulli):
        return Latent(shape[1:], "bits", fn=fn)
    if isinstance(base, ConcreteOneHot) or (
        isinstance(base, MultinomialLogits | MultinomialProbs) and bool((jnp.asarray(base.total_count) == 1).all())
    ):
        return Latent(shape[1:], "onehot", fn=fn)
    if not fn.support.is_discrete:
        transform = biject_to(fn.support)
        unconstrained = transform.inverse_shape(shape)[1:]
        return Latent(shape[1:], "real", transform=transform, unconstrained=unconstrained, fn=fn)
    try:
        values = base.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise ValueError(
            f"Latent site '{site.name}' ({type(base).__name__}) is discrete and its support can't be enumerated: "
            "there is no way to draw or sum it here. Use a Bernoulli, Categorical or other finite distribution."
        ) from error
    return Latent(shape[1:], "labels", values.reshape(len(values), *base.event_shape), fn=fn)
