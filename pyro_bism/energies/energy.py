"""A model's log p̃(v, h; θ) on one batch, row by row."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to

from ..distributions import ConcreteBernoulli, ConcreteOneHot, base_of, discretized, plain_support
from ..programs import visible
from ..programs.all_rows import of_any_size
from ..programs.records import SiteRecord, joint_per_example, leading_plates, record
from .density import VISIBLE, Block, Density, Latent, Point, close, curvature, pack, select
from .proof import Proof, prove
from .structure import find_blocks
from .values import COVARIATES


@dataclass(frozen=True)
class Energy:
    """A model's log p̃(v, h; θ) on one batch.

    :ivar latents: by site, discrete visible ones among them.
    :ivar num_rows: of the batch.
    :ivar observed: the discrete visible sites.
    :ivar resizes: whether the model runs on any number of rows; else they are taken ``num_rows`` at a time.
    :ivar declared: variables whose structure the user declares, "gaussian" or "affine".
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
    buffers: tuple[Tensor, ...] = ()
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
        buffers: Sequence[Tensor] = (),
        values: Mapping[str, Tensor] | None = None,
        moves_visible: bool = True,
    ) -> tuple["Energy", Point]:
        """The energy, tried out on this batch, and the point where it was: the data and one draw of the latents.

        :param buffers: of the model's modules; a look at the density leaves them as they are.
        :param values: of the latents, if the model should not draw them itself.
        :param moves_visible: whether the visible values are of any block; else their structure is not looked for.
        :raises ValueError: where a latent has not the batch as its leading dimension, or is of no kind known here.
        """
        args, kwargs = batch.arguments(batch.v)
        kept = [b.clone() for b in buffers]
        with torch.no_grad(), record({**batch.indices, **(values or {})}, discretize=True) as run:
            model(*args, **kwargs)
        _restore(buffers, kept)
        n = len(batch.v)
        drawn = {name: site for name, site in run.sites.items() if not site.is_observed}
        latents = {name: _latent(site, n) for name, site in drawn.items()}
        observed = {site.name: _latent(run.sites[site.name], n) for site in sites if site.is_discrete}
        x = {VISIBLE: batch.v}
        for name, latent in latents.items():
            value = drawn[name].value
            if latent.kind == "real":
                value = latent.transform.inv(value)
            x[name] = value.detach().to(batch.v.dtype) if latent.kind in ("bits", "onehot") else value.detach()
        declared = _declared(run.sites, sites, latents | observed)
        energy = cls(model, sites, batch, latents, n, buffers=tuple(buffers), declared=declared)
        if observed:
            energy, seen = energy._observing(x, observed)
            x |= seen
        energy = replace(energy, resizes=energy._can_resize(x))
        proof = prove(energy, x)
        # arrays from outside of torch may be of as many rows as there are, and differ where none was looked at
        if proof.reads_position or (COVARIATES not in proof.degrees.groups and not energy._has_equal_rows(x)):
            # a row that comes again is not the same row
            energy = replace(energy, resizes=False)
            proof = prove(energy, x)
        elif not energy.resizes and COVARIATES in proof.degrees.groups:
            proof = energy._proved_at_any_size(run.sites, x) or proof
        energy = replace(energy, is_homogeneous=COVARIATES not in proof.degrees.groups)
        moving = [name for name in (VISIBLE, *latents, *observed) if moves_visible or name in latents]
        return replace(energy, blocks=find_blocks(energy, x, proof, moving)), x

    def log_joint(self, x: Point, jacobian: bool = True) -> Tensor:
        """log p̃ of every row, of shape (m,), with or without the Jacobians of transformed latents.

        Row i of a point with more rows than the batch has the covariates of row i modulo ``num_rows``.
        """
        m, n = len(x[VISIBLE]), self.num_rows
        if m == n:
            return self._run(self.batch, x, jacobian)
        if self.resizes:
            return self.on(torch.arange(m) % n)(x, jacobian)
        passes = -(-m // n)
        rows = (torch.arange(passes * n) % m).chunk(passes)  # the last pass is filled up
        return torch.cat([self._run(self.batch, select(x, part), jacobian) for part in rows])[:m]

    def with_rows(self, m: int) -> "Energy":
        """The same on m rows, the batch's again and again, if it ``resizes``."""
        return replace(self, batch=self._resized(torch.arange(m) % self.num_rows), num_rows=m)

    def on(self, rows: Tensor) -> Callable[..., Tensor]:
        """:meth:`log_joint` of points whose rows have the covariates of these rows, where the model resizes."""
        batch = self._resized(rows)

        def log_joint(x: Point, jacobian: bool = True) -> Tensor:
            return self._run(batch, x, jacobian)

        return log_joint

    def telling_rows(self, num: int) -> Tensor:
        """So many of the batch's rows, over and over; of every argument that differs between rows two that do."""
        told = [0]
        for leaf in self._covariates().values():
            flat = leaf.reshape(self.num_rows, -1)
            told += (flat != flat[:1]).any(-1).nonzero()[:1, 0].tolist()
        told = list(dict.fromkeys(told))[:num]
        return torch.cat([torch.tensor(told), torch.arange(num - len(told)) % self.num_rows])

    def density(self, x: Point) -> Density:
        """At these parameters; x is any point, at which the constant precisions are taken."""
        density = Density(self.log_joint, self, self.blocks, {})
        first = select(x, slice(1)) if self.resizes else x
        constant = [b for b in self.blocks if b.kind == "gaussian" and b.is_constant]
        return replace(density, precisions={b.names: curvature(density, first, b)[0] for b in constant})

    def at(self, batch: visible.Batch) -> "Energy":
        """The same on another batch."""
        soft = {site.name for site in self.sites if site.is_soft}
        sites = tuple(replace(site, is_soft=site.name in soft) for site in batch.sites)
        return replace(self, sites=sites, batch=replace(batch, sites=sites), num_rows=len(batch.v))

    def seen(self, v: Tensor) -> Point:
        """The visible part of a point, from all visible values side by side as a batch has them."""
        sizes = [self.size(name) for name in self.observed]
        start = v.shape[1] - sum(sizes)
        x = {VISIBLE: v[:, :start]}
        for name, size in zip(self.observed, sizes, strict=True):
            latent = self.latents[name]
            dtype = latent.values.dtype if latent.kind == "labels" else v.dtype
            x[name] = v[:, start : start + size].reshape(len(v), *latent.shape).to(dtype)
            start += size
        return x

    def size(self, name: str) -> int:
        """How many numbers a variable has in one row."""
        if name == VISIBLE:
            return sum(visible.size(site) for site in self.sites if not site.is_discrete)
        latent = self.latents[name]
        return math.prod(latent.unconstrained if latent.kind == "real" else latent.shape)

    def values(self, x: Point) -> dict[str, Tensor]:
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

    def _run(self, batch: visible.Batch, x: Point, jacobian: bool) -> Tensor:
        m = len(x[VISIBLE])
        args, kwargs = batch.arguments(pack(x, (VISIBLE, *self.observed)) if self.observed else x[VISIBLE])
        values, total = dict(batch.indices), x[VISIBLE].new_zeros(m)
        for name in self.hidden:
            latent = self.latents[name]
            values[name] = x[name]
            if latent.kind == "real":
                values[name] = latent.transform(x[name])
                terms = latent.transform.log_abs_det_jacobian(x[name], values[name])
                total = total + (terms.reshape(m, -1).sum(-1) if jacobian else 0.0)
        soft = frozenset(name for name, latent in self.latents.items() if latent.kind in ("bits", "onehot"))
        kept = [b.clone() for b in self.buffers]
        # one seed for every point: what a model draws by itself (dropout) is part of the density
        with (
            torch.random.fork_rng(devices=[]),
            pyro.validation_enabled(False),
            pyro.poutine.block(),
            record(values, soft) as run,
        ):
            torch.default_generator.manual_seed(0)  # torch.manual_seed keeps a stack trace at every call
            self.model(*args, **kwargs)
        _restore(self.buffers, kept)
        return joint_per_example(run.sites.values(), m) + total

    @torch.no_grad()
    def _observing(self, x: Point, observed: Mapping[str, Latent]) -> tuple["Energy", Point]:
        """This energy with discrete visible sites, as real numbers where the model takes them for the same; its point.

        Tried, for a model may look its values up in a table: such sites are "labels", whatever they are declared.
        """
        v = self.batch.v
        energy = replace(self, latents={**self.latents, **observed}, observed=tuple(observed))
        discretized = energy.log_joint({**x, **energy.seen(v)})
        for name, latent in observed.items():
            sites = tuple(replace(site, is_soft=site.is_soft or site.name == name) for site in energy.sites)
            trial = replace(energy, sites=sites, batch=replace(energy.batch, sites=sites))
            takes = latent.kind != "labels"
            if takes:
                try:
                    takes = close(trial.log_joint({**x, **energy.seen(v)}), discretized)
                except Exception:  # whatever a program trips over: it gets integers then
                    takes = False
            if takes:
                energy = trial
            elif latent.kind != "labels":
                labels = replace(latent, kind="labels", values=latent.support(torch.long))
                energy = replace(energy, latents={**energy.latents, name: labels})
        return energy, energy.seen(v)

    def _covariates(self) -> dict[int, Tensor]:
        """Arguments beside the visible values that have as many rows as the data, by their place among the leaves."""
        visible_leaves = {i for site in self.sites for i in site.leaves}
        return {
            i: leaf
            for i, leaf in enumerate(self.batch.leaves)
            if isinstance(leaf, Tensor) and leaf.shape[:1] == (self.num_rows,) and i not in visible_leaves
        }

    def _resized(self, rows: Tensor) -> visible.Batch:
        """The batch with these rows of all arguments that have as many rows as the data."""
        leaves = list(self.batch.leaves)
        for i, leaf in self._covariates().items():
            leaves[i] = leaf[rows]
        sites = tuple(replace(site, shape=(len(rows), *site.shape[1:])) for site in self.sites)
        indices = {**self.batch.indices, **{name: torch.arange(len(rows)) for name in self.free}}
        # the programs are given v in the visible leaves' place, so these need no more than their type
        return replace(self.batch, sites=sites, leaves=leaves, indices=indices)

    def _has_equal_rows(self, x: Point) -> bool:
        """Whether the same point has one density in all rows."""
        with torch.no_grad():
            log_joint = self.log_joint({name: a[:1].expand(a.shape) for name, a in x.items()})
        return close(log_joint, log_joint[:1])

    def _proved_at_any_size(self, recorded: Mapping[str, SiteRecord], x: Point) -> Proof | None:
        """What is proved where the batch's plates take any number of rows, if the density is the same there; else None.

        A plate of a fixed size, or one that draws rows, may have as many as there are units: an array of parameters
        is then taken for one of covariates. At another number its rows are told from all else. A program with rows of
        its own has not as many then, and fails, or reads them by their places, which shows.
        """
        names = self._batch_plates(recorded)
        if not names:
            return None
        free = replace(self, model=of_any_size(self.model, names), resizes=True, free=names)
        if not free._can_resize(x, self):
            return None
        proof = prove(free, x)
        hides = COVARIATES not in proof.degrees.groups and not self._has_equal_rows(x)
        return None if hides or proof.reads_position else proof

    def _batch_plates(self, recorded: Mapping[str, SiteRecord]) -> frozenset[str]:
        """The plates whose rows are the batch, but for those that are handed them: these are the user's."""
        names = (*(site.name for site in self.sites), *self.latents)
        return leading_plates(recorded[name] for name in names) - self.batch.handed

    def _can_resize(self, x: Point, like: "Energy | None" = None) -> bool:
        """Tried, at one row more: plates of a fixed size and subsampled ones say no.

        :param like: an energy that has to be the same on these rows.
        """
        if self.batch.indices.keys() - self.free:
            return False
        n = self.num_rows
        wrapped = select(x, torch.arange(n + 1) % n)
        try:
            with torch.no_grad():
                found = replace(self, resizes=True).log_joint(wrapped)
        except Exception:  # whatever a program trips over: it gets its own number of rows then
            return False
        with torch.no_grad():
            return len(found) == n + 1 and close(found[:n], (like or self).log_joint(x)) and close(found[n:], found[:1])


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


def _restore(buffers: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)


def _latent(site: SiteRecord, n: int) -> Latent:
    fn, base, shape = discretized(site.fn), base_of(discretized(site.fn)), tuple(site.value.shape)
    if shape[:1] != (n,):
        raise ValueError(
            f"Latent site '{site.name}' has shape {shape}, without the batch of {n} as its leading dimension: all "
            "examples share it, so it is a part of no example. Put it inside the data plate, or make it a parameter."
        )
    if isinstance(base, dist.Bernoulli | ConcreteBernoulli):
        return Latent(shape[1:], "bits", fn=fn)
    if isinstance(base, dist.OneHotCategorical | ConcreteOneHot):
        return Latent(shape[1:], "onehot", fn=fn)
    support: Any = plain_support(fn.support)
    if not support.is_discrete:
        transform = biject_to(support)
        unconstrained = tuple(transform.inverse_shape(torch.Size(shape)))[1:]
        return Latent(shape[1:], "real", transform=transform, unconstrained=unconstrained, fn=fn)
    try:
        values = base.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise ValueError(
            f"Latent site '{site.name}' ({type(base).__name__}) is discrete and its support can't be enumerated: "
            "there is no way to draw or sum it here. Use a Bernoulli, Categorical or other finite distribution."
        ) from error
    return Latent(shape[1:], "labels", values.reshape(len(values), *base.event_shape), fn=fn)
