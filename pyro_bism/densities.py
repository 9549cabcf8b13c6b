"""Log densities of a (model, guide) pair on a batch, and the score function they give.

For one draw h ~ q(h|v) the outer losses need (Bao et al. 2020)

    s(v) = ∇_v [log p̃(v, h; θ) - log q(h|v; φ)],

with h held fixed as v moves: at q = p(h|v; θ) this is the score of the marginal, whatever h is. Where a
discrete site is summed out the expectation under q of the same difference is taken, its weights
held fixed as v moves; then the score's own derivative in v stays right as well.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.utils import _pytree as pytree

from . import guides, params, rows, visible
from .distributions import ConcreteBernoulli, ConcreteOneHot, base_of, hard, is_averaged, relaxed, unmasked
from .losses import OuterLoss

MAX_CONFIGURATIONS = 256


@dataclass
class Site:
    """One sample statement, as it ran."""

    name: str
    fn: Any
    value: Any
    scale: Any
    mask: Any
    frames: tuple
    is_observed: bool
    infer: Mapping[str, Any]
    subsamples: Mapping[str, Tensor]
    handed: Collection[str] = ()

    @property
    def is_data(self) -> bool:
        """Observed by the user: not a factor, not a deterministic value."""
        return (
            self.is_observed
            and not isinstance(base_of(self.fn), dist.Unit)
            and not self.infer.get("_deterministic", False)
        )

    @property
    def is_delta(self) -> bool:
        return isinstance(base_of(self.fn), dist.Delta)

    def log_prob(self) -> Tensor:
        """log density with the user's scale and mask, without a subsampling plate's N/B."""
        scale = self.scale
        for frame in self.frames:
            if frame.size != frame.full_size:
                scale = scale * (frame.size / frame.full_size)
        return scale_and_mask(self.fn.log_prob(self.value), scale, self.mask)

    def log_q(self) -> Tensor:
        """log q of the value: how often it is drawn, which neither a scale nor a mask of the density changes."""
        return unmasked(self.fn).log_prob(self.value)

    def total(self) -> Tensor:
        """Σ log density as a host ELBO takes it, a subsampling plate's N/B too."""
        return scale_and_mask(self.fn.log_prob(self.value), self.scale, self.mask).sum()


class replay(Messenger):
    """Runs a program with some of its sites given.

    A value in ``values`` stands in for a latent site's draw, or for a plate's rows, however it comes by them: all
    passes of a step are about the same. A site in ``softened`` is scored as its relaxation.
    """

    def __init__(self, values: Mapping[str, Tensor], softened: frozenset[str] = frozenset()):
        super().__init__()
        self.values = values
        self.softened = softened

    def _pyro_sample(self, msg):
        name = msg["name"]
        if isinstance(msg["fn"], _Subsample):
            if name in self.values:
                msg["value"], msg["done"], msg["is_observed"] = self.values[name], True, False
            return
        if name in self.softened:
            msg["fn"] = relaxed(msg["fn"])
        if name in self.values and not (msg["is_observed"] or msg["done"]):
            msg["value"], msg["done"] = self.values[name], True


class record(replay):
    """Runs a program as :class:`replay` does, and keeps its sample statements.

    Sites marked for enumeration get their whole support, in a dimension of their own left of all plates,
    when ``enumerate_from`` says how many dimensions the plates take.

    :ivar subsamples: the rows of every plate; ``handed`` names the plates that were handed theirs by the program.
    :cvar last: the name of the statement that ran last, in whichever run: an energy hides its own from outer handlers.
    """

    last: ClassVar[str | None] = None

    def __init__(
        self,
        values: Mapping[str, Tensor] | None = None,
        softened: frozenset[str] = frozenset(),
        enumerate_from: int | None = None,
        harden: bool = False,
        offered: Mapping[str, Tensor] | None = None,
        sought: Collection[str] = (),
    ):
        """
        :param offered: rows for plates that would draw them by themselves.
        :param sought: plates; the program is left as soon as the rows of all are known.
        """
        super().__init__(values or {}, softened)
        self.enumerate_from = enumerate_from
        self.harden = harden
        self.offered = offered or {}
        self.sought = sought
        self.full_sizes: dict[str, int] = {}
        self.handed: set[str] = set()
        self._drawn: set[str] = set()
        self.sites: dict[str, Site] = {}
        self.params: dict[str, Any] = {}
        self.subsamples: dict[str, Tensor] = {}
        self.num_enumerated = 0

    def _pyro_sample(self, msg):
        super()._pyro_sample(msg)
        if isinstance(msg["fn"], _Subsample):
            if msg["value"] is None:
                msg["value"] = self.offered.get(msg["name"])
                msg["fn"] = rows.watched(msg["fn"], msg["name"], self._drawn)
                if msg["value"] is not None:
                    self._drawn.add(msg["name"])
            return
        record.last = msg["name"]
        if self.harden:
            msg["fn"] = hard(msg["fn"])
        if msg["is_observed"] or msg["done"]:
            return
        if self.enumerate_from is not None and is_enumerated(msg["infer"]):
            self.num_enumerated += 1
            support = msg["fn"].enumerate_support(expand=False)
            batch_dims = support.dim() - 1 - msg["fn"].event_dim
            ones = self.enumerate_from + self.num_enumerated - 1 - batch_dims
            msg["value"] = support.reshape(support.shape[:1] + (1,) * ones + support.shape[1:])
            msg["done"] = True

    def _pyro_post_sample(self, msg):
        if isinstance(msg["fn"], _Subsample):
            self._keep_rows(msg)
            return
        self.sites[msg["name"]] = Site(
            msg["name"],
            msg["fn"],
            msg["value"],
            msg["scale"],
            msg["mask"],
            msg["cond_indep_stack"],
            msg["is_observed"],
            msg["infer"],
            self.subsamples,
            self.handed,
        )

    def _keep_rows(self, msg):
        name = msg["name"]
        if not isinstance(msg["value"], Tensor):  # a list
            msg["value"] = torch.as_tensor(msg["value"])
        self.subsamples[name], self.full_sizes[name] = msg["value"], msg["fn"].size
        if name not in self.values and name not in self._drawn:
            rows.require_indices(name, msg["fn"].size, msg["value"])
            self.handed.add(name)
        if self.sought and set(self.sought) <= self.subsamples.keys():
            raise rows.Found

    def _pyro_post_param(self, msg):
        self.params[msg["name"]] = msg["value"]

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Of the plates met, how many rows each has and takes."""
        return {name: (size, len(self.subsamples[name])) for name, size in self.full_sizes.items()}


def is_enumerated(infer: Mapping[str, Any]) -> bool:
    return infer.get("enumerate") == "parallel"


@dataclass(frozen=True)
class Draw:
    """What the guide gave at v: values of all its sites, and the weight of each value summed out.

    :ivar values: by site; drawn values carry a path to φ but none to v.
    :ivar probs: q(h|v) of each enumerated site over its support, in the site's own dimension.
    :ivar weight: per example, where the draw is one configuration of many; else None.
    """

    values: Mapping[str, Tensor]
    probs: tuple[tuple[str, Tensor, int], ...] = ()
    weight: Tensor | None = None

    def detached(self) -> "Draw":
        values = {name: value.detach() for name, value in self.values.items()}
        return Draw(values, tuple((name, prob.detach(), dim) for name, prob, dim in self.probs))


@dataclass(frozen=True)
class Pair:
    """A (model, guide) pair, as the first run on arguments of this structure showed it.

    :ivar theta: the model's unconstrained parameter tensors, by name.
    :ivar phi: the guide's.
    :ivar subsamples: the plates that have rows.
    :ivar num_plate_dims: how many dimensions the plates take.
    :ivar buffers: module buffers that a pass changes (batch-norm statistics).
    :ivar modules: the modules that ran.
    :ivar frozen: parameters met that do not require grad.
    :ivar is_stated: whether the programs read φ through ``pyro.param`` statements alone.
    :ivar unreparameterised: the guide's sites whose draws carry no path to φ.
    :ivar averaged: the guide's sites that are summed out by their mean.
    :ivar data_plates: the plates along the leading axis of the visible values.
    :ivar change: the guide's sites that are computed from v and from auxiliary draws, or None.
    :ivar shiftable: the parameters of the guide's distributions that δ shifts (``shifts.py``); None where none does.
    :ivar astray: the parameters of φ that stand-ins do not take the place of; looked for where steps are unrolled.
    """

    model: Callable
    guide: Callable
    sites: tuple[visible.VisibleSite, ...]
    theta: Mapping[str, Tensor]
    phi: Mapping[str, Tensor]
    softened: frozenset[str]
    enumerated: tuple[str, ...]
    sampled: tuple[str, ...]
    subsamples: Mapping[str, rows.Plate]
    num_data: int
    num_plate_dims: int
    buffers: tuple[Tensor, ...] = field(default=())
    modules: tuple[torch.nn.Module, ...] = field(default=())
    frozen: tuple[Tensor, ...] = field(default=())
    is_stated: bool = False
    unreparameterised: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()
    data_plates: frozenset[str] = frozenset()
    change: guides.ChangeOfVariables | None = None
    shiftable: frozenset[tuple[str, str]] | None = None
    astray: tuple[str, ...] = ()

    def is_current(self) -> bool:
        """Whether the programs still train these tensors: none was replaced, cleared, frozen or unfrozen since."""
        store = pyro.get_param_store()._params
        for leaves in (self.theta, self.phi):
            for name, leaf in leaves.items():
                if store.get(name) is not leaf or not leaf.requires_grad:
                    return False
        return not any([leaf.requires_grad for leaf in self.frozen])

    def batch(self, leaves: Sequence[Any], spec: Any, cut: bool = False) -> visible.Batch:
        """The step's batch: subsampling plates draw their rows here, once, or are handed them by the programs.

        :param cut: leave plates that take all rows to themselves: such a plate takes any number of them.
        """
        handed = self._handed(leaves, spec)
        indices = {
            name: handed[name] if plate.is_handed else _draw(plate)
            for name, plate in self.subsamples.items()
            if not (cut and plate.takes_all)
        }
        return visible.Batch(self.sites, indices, leaves, spec, frozenset(handed))

    def _handed(self, leaves: Sequence[Any], spec: Any) -> dict[str, Tensor]:
        """The rows that the programs hand to their plates on these arguments.

        Rows that are an argument are read off; for others the programs run as far as the plates.
        """
        plates = [plate for plate in self.subsamples.values() if plate.is_handed]
        found = {plate.name: leaves[plate.argument] for plate in plates if plate.argument is not None}
        unknown = [plate for plate in plates if plate.argument is None]
        if unknown:
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            by_guide, by_model = ({p.name for p in unknown if role in p.handed_by} for role in ("guide", "model"))
            with params.buffers_kept(self.buffers), torch.no_grad(), pyro.validation_enabled(False), _hidden():
                # to its end where the model needs its draws
                q = _run_until(self.guide, args, kwargs, {}, () if by_model else by_guide) if by_guide else record()
                values = {name: site.value for name, site in q.sites.items() if not site.is_observed}
                p = _run_until(self.model, args, kwargs, values, by_model) if by_model else record()
            for run, names in ((q, by_guide), (p, by_model)):
                for name in names & run.subsamples.keys():
                    rows.agree(name, found.setdefault(name, run.subsamples[name]), run.subsamples[name])
        for plate in plates:
            rows.require(plate, found.get(plate.name))
        return found

    def programs(self, batch: visible.Batch) -> tuple[Callable, Callable]:
        """Model and guide for a host ELBO: rows fixed, discrete sites softened where the guide's are."""

        def replayed(program, softened):
            def run(*args, **kwargs):
                with replay(batch.indices, softened):
                    return program(*args, **kwargs)

            return run if batch.indices or softened else program

        return replayed(self.model, self.softened), replayed(self.guide, frozenset())

    def at(self, phi: Sequence[Tensor]) -> AbstractContextManager:
        """The context in which the programs run with these tensors, unconstrained, as φ."""
        if self.is_stated:
            return params.given(dict(zip(self.phi, phi, strict=True)))
        return params.swapped(dict(zip(self.phi.values(), phi, strict=True)))

    def placed(self, phi: Sequence[Tensor]) -> AbstractContextManager:
        """The context in which φ has these values itself: see :func:`params.placed`."""
        return params.placed(self.phi.values(), phi)

    def out_of_sight(self, batch: visible.Batch) -> list[str]:
        """The parameters that the programs read where no other tensors can be put in their place."""
        with (
            params.buffers_kept(self.buffers),
            torch.random.fork_rng(devices=[]),
            pyro.validation_enabled(False),
            _hidden(),
        ):
            return params.out_of_sight(lambda: self._look(batch), {**self.theta, **self.phi})

    def _look(self, batch: visible.Batch) -> Tensor:
        """log p̃ - log q at a draw of the guide's, with a path to all that is trained."""
        draw, _ = self.draw(batch, batch.v)
        drawn: Any = sum(x.sum() for x in draw.values.values() if x.is_floating_point())
        return self.log_weight(batch, batch.v, draw) + drawn

    def draw(
        self, batch: visible.Batch, v: Tensor, given: Mapping[str, Tensor] | None = None, moves: bool = False
    ) -> tuple[Draw, dict[str, Site]]:
        """Run the guide at v; sites marked for enumeration and not ``given`` are summed out.

        :param moves: whether h moves with v; in a score it must not.
        """
        args, kwargs = batch.arguments(v if moves else v.detach())
        with record({**batch.indices, **(given or {})}, enumerate_from=self.num_plate_dims) as run:
            self.guide(*args, **kwargs)
        values: dict[str, Tensor] = {}
        probs: list[tuple[str, Tensor, int]] = []
        for name, site in run.sites.items():
            if site.is_observed:
                continue
            values[name] = site.value
            if name in self.enumerated and not (given and name in given):
                dim = -(self.num_plate_dims + len(probs) + 1)
                probs.append((name, site.log_q().exp(), dim))
        return Draw({**values, **batch.indices}, tuple(probs)), run.sites

    def elbo(self, batch: visible.Batch, v: Tensor) -> Tensor:
        """log p̃(v, h) - log q(h|v) at a reparameterised draw: Trace_ELBO's estimate, without its traces and checks."""
        args, kwargs = batch.arguments(v.detach())
        with record(batch.indices) as q:
            self.guide(*args, **kwargs)
        drawn = {name: site.value for name, site in q.sites.items() if not site.is_observed}
        with record({**drawn, **batch.indices}, self.softened) as p:
            self.model(*args, **kwargs)
        total: Any = sum(site.total() for site in p.sites.values()) - sum(site.total() for site in q.sites.values())
        return total

    def log_guide(self, batch: visible.Batch, latents: Mapping[str, Tensor]) -> Tensor:
        """log q(h|v) at any h, by example, relaxed sites as discrete ones; NaN where no draws behind h are found."""

        def guide_at(v: Tensor, values: Mapping[str, Tensor]) -> dict[str, Site]:
            return self.guide_at(batch, v, values, harden=True)

        sites = guide_at(batch.v, latents)
        known = torch.zeros(len(batch.v), dtype=torch.bool, device=batch.v.device)
        if all(name in latents or site.is_delta for name, site in sites.items()):
            known = ~known
        elif self.change is not None:
            start = {**{name: site.value for name, site in guide_at(batch.v, {}).items()}, **latents}
            with torch.enable_grad():
                values = self.change.matched(guide_at, batch.v, start, guides.SEARCH_STEPS)
            sites = guide_at(batch.v, {name: value.detach() for name, value in values.items()})
            known = self.change.distance(sites, latents) < 1e-3
        log_q: Any = sum(per_example(site, len(batch.v)) for site in sites.values())
        return torch.where(known, log_q, torch.nan)

    def draws(self, batch: visible.Batch, v: Tensor, num: int, joint: bool) -> Iterator[Draw]:
        """``num`` draws; with ``joint``, each once for every joint configuration of the discrete sites."""
        for _ in range(num):
            if not (joint and self.enumerated):
                yield self.draw(batch, v)[0]
                continue
            for given in self._configurations(batch, v):
                draw, sites = self.draw(batch, v, given)
                n = len(batch.v)
                log_q: Any = sum(_per_example(name, sites[name].log_q(), n) for name in self.enumerated)
                yield Draw(draw.values, (), log_q.exp())

    def _configurations(self, batch: visible.Batch, v: Tensor) -> Iterator[dict[str, Tensor]]:
        args, kwargs = batch.arguments(v.detach())
        with torch.no_grad(), record(batch.indices) as run:
            self.guide(*args, **kwargs)
        n = len(batch.v)
        supports, counts = [], []
        for name in self.enumerated:
            site = run.sites[name]
            # as in Pyro's own enumeration: one row a value, over the batch dimensions at the right
            support = site.fn.enumerate_support(expand=True)
            if site.value.dim() == 0 or site.value.shape[0] != n:
                raise ValueError(
                    f"Guide site '{name}' of shape {tuple(site.value.shape)} lacks the batch of {n} as its "
                    "leading dimension, so the loss can't be averaged over it. Use average='score'."
                )
            supports.append(support)
            cells = torch.Size(site.fn.batch_shape[1:]).numel()
            counts.append([len(support)] * cells)
        flat = [m for count in counts for m in count]
        total = 1
        for m in flat:
            total *= m
        if total > MAX_CONFIGURATIONS:
            raise ValueError(
                f"average='loss' would enumerate {total} joint configurations of the summed-out sites "
                f"{list(self.enumerated)}; at most {MAX_CONFIGURATIONS} are taken. Use average='score', "
                "which is exact and needs no joint enumeration."
            )
        for choice in torch.cartesian_prod(*[torch.arange(m) for m in flat]).reshape(total, len(flat)):
            given, start = {}, 0
            for name, support, count in zip(self.enumerated, supports, counts, strict=True):
                site = run.sites[name]
                picks = choice[start : start + len(count)].reshape(site.fn.batch_shape[1:])
                start += len(count)
                index = picks.reshape((1, 1, *picks.shape) + (1,) * site.fn.event_dim)
                given[name] = support.gather(0, index.expand(1, *support.shape[1:]))[0]
            yield given

    def log_weight(self, batch: visible.Batch, v: Tensor, draw: Draw, guide: bool = True) -> Tensor:
        """Σ over the batch of E[log p̃(v, h) - log q(h|v)], scalar; the expectation is over summed-out sites."""
        args, kwargs = batch.arguments(v)
        with record(draw.values, self.softened) as run:
            self.model(*args, **kwargs)
        total: Any = sum(expectation(site, draw) for site in run.sites.values())
        if guide:
            sites = self.guide_at(batch, v, self.fixed_latents(batch, v, draw.values))
            total = total - sum(expectation(site, draw) for site in sites.values())
        return total

    def guide_at(
        self, batch: visible.Batch, v: Tensor, values: Mapping[str, Tensor], harden: bool = False
    ) -> dict[str, Site]:
        """The guide's own sites at v, where some are given."""
        args, kwargs = batch.arguments(v)
        with record({**batch.indices, **values}, harden=harden) as run:
            self.guide(*args, **kwargs)
        return {name: site for name, site in run.sites.items() if not site.is_observed}

    def fixed_latents(self, batch: visible.Batch, v: Tensor, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the guide is given so that h stays as v moves: a draw, or one whose auxiliary sites move with v."""
        if self.change is None:
            return values
        return self.change.matched(lambda u, given: self.guide_at(batch, u, given), v, values)

    def score(self, batch: visible.Batch, draws: Sequence[Draw], loss: OuterLoss) -> Callable[[Tensor], Tensor]:
        """The score function at given draws of h, averaged over them; differentiable in v, θ and φ.

        Under ``average="unbiased"`` the draws' scores side by side, as the losses take them.
        """
        # E_q[∇_v log q] = 0 exactly where all of h is summed out into the score, and so it is for
        # every φ; only the derivative of the score in v still needs that term.
        drawn = bool(self.sampled) or any(draw.weight is not None for draw in draws)
        guide = drawn or loss.differentiates_score

        def score(v: Tensor) -> Tensor:
            if not v.requires_grad:
                v = v.detach().requires_grad_()
            return _slope([self.log_weight(batch, v, draw, guide) for draw in draws], v, loss)

        return score

    def outer_loss(self, batch: visible.Batch, loss: OuterLoss, noise: Any = None) -> Tensor:
        """J: the mean over the batch of the loss per example, fresh noise and fresh draws of h.

        A subsampling plate's N/B is a weight on every example's loss; in the mean over the data, of which
        this is an unbiased estimate, it cancels against the 1/N.

        :param noise: the loss's own, from an earlier draw; None draws it.
        """
        noise = loss.draw(batch.v) if noise is None else noise
        v = loss.perturb(batch.v, noise)
        draws = self.draws(batch, v, loss.num_particles, joint=loss.average == "loss")
        if loss.average != "loss":
            return loss(self.score(batch, list(draws), loss), batch.v, noise).mean()
        total: Any = 0.0
        for draw in draws:
            value = loss(self.score(batch, [draw], loss), batch.v, noise)
            total = total + (value if draw.weight is None else draw.weight * value).mean()
        return total / loss.num_particles

    def posterior_loss(self, batch: visible.Batch, loss: OuterLoss) -> Tensor:
        """J, with the derivative in θ that it has where q(h|v) is the posterior p(h|v; θ).

        There ∂_θ log p̃(v) = E_{q(h|v)}[∂_θ log p̃(v, h)] at every v (Fisher's identity), so its gradient in v, taken
        through q too, is ∂_θ of the marginal's score.
        """
        noise = loss.draw(batch.v)
        num = loss.num_particles

        def score(u: Tensor) -> Tensor:
            if not u.requires_grad:
                u = u.detach().requires_grad_()
            # at u: h moves with it
            moving = [self.draw(batch, u, moves=True)[0] for _ in range(num)]
            still = [draw.detached() for draw in moving]

            def slope() -> Tensor:
                return _slope([self.log_weight(batch, u, draw, guide=False) for draw in moving], u, loss)

            varying = slope()
            if not loss.differentiates_score:
                with params.fixed(self.theta.values()):
                    value = self.score(batch, still, loss)(u)
                return value.detach() + varying - varying.detach()
            # numbers in θ, but functions of u
            # that require grad still: pyro.module takes a weight that does not for one that is not trained, and says so
            with params.swapped({leaf: leaf.detach().requires_grad_() for leaf in self.theta.values()}):
                value = self.score(batch, still, loss)(u)
                same = slope()
            # the difference is 0; its derivative in θ is the score's
            return value + varying - same

        return loss(score, batch.v, noise).mean()

    def hard_draw(self, batch: visible.Batch, v: Tensor) -> dict[str, Tensor]:
        """One draw of every site of the guide, and the rows; relaxed and summed-out sites drawn as discrete ones."""
        args, kwargs = batch.arguments(v.detach())
        with torch.no_grad(), record(batch.indices, harden=True) as run:
            self.guide(*args, **kwargs)
        return {**{name: s.value for name, s in run.sites.items() if not s.is_observed}, **batch.indices}

    def log_joint(self, batch: visible.Batch, v: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """log p̃(v, h) of every example at a :meth:`hard_draw`."""
        args, kwargs = batch.arguments(v)
        with record(values) as run:
            self.model(*args, **kwargs)
        return joint_per_example(run.sites.values(), len(v))

    def covariance_loss(self, batch: visible.Batch, loss: OuterLoss, num_particles: int) -> Tensor:
        """J, with the derivative in θ that VaGES estimates (Bao et al. 2021): see ``Covariance``."""
        noise = loss.draw(batch.v)
        v = loss.perturb(batch.v, noise).detach().requires_grad_()
        scores, log_joints, guide_scores = [], [], []
        for _ in range(num_particles):
            values = self.hard_draw(batch, v)
            log_joints.append(self.log_joint(batch, v, values))
            scores.append(torch.autograd.grad(log_joints[-1].sum(), v, create_graph=True)[0])
            with params.fixed(self.phi.values()):
                guide_sites = self.guide_at(batch, v, self.fixed_latents(batch, v, values), harden=True)
            log_q: Any = sum(site.log_prob().sum() for site in guide_sites.values())
            (guide_score,) = _gradients(log_q, [v])
            guide_scores.append(torch.zeros_like(v) if guide_score is None else guide_score)
        model_scores, log_joint = torch.stack(scores), torch.stack(log_joints)
        fixed_scores = model_scores.detach()
        centred = fixed_scores - fixed_scores.mean(0)
        value = (fixed_scores - torch.stack(guide_scores)).mean(0)
        # both are 0; their derivatives in θ make up the score's
        covariance = (centred * (log_joint - log_joint.detach()).unsqueeze(-1)).sum(0) / (num_particles - 1)
        score = value + (model_scores - fixed_scores).mean(0) + covariance
        return loss(lambda _: score, batch.v, noise).mean()


def _slope(log_weights: Sequence[Tensor], v: Tensor, loss: OuterLoss) -> Tensor:
    """The gradient in v of the draws' mean log weight; of each, shape (L, n, D), where the loss wants them apart."""
    if loss.average == "unbiased" and len(log_weights) > 1:
        return torch.stack([torch.autograd.grad(each, v, create_graph=True)[0] for each in log_weights])
    total: Any = sum(log_weights)
    return torch.autograd.grad(total / len(log_weights), v, create_graph=True)[0]


def leading_plates(sites: Iterable[Site]) -> frozenset[str]:
    """The plates along the leading axis of the sites' values: of the visible ones those whose rows are the batch."""
    lead = [(s, s.value.dim() - s.fn.event_dim) for s in sites]
    return frozenset(frame.name for s, dims in lead for frame in s.frames if frame.dim == -dims)


def joint_per_example(sites: Iterable[Site], n: int) -> Tensor:
    """The sites' joint log density of every example, shape (n,).

    What stands outside the batch and is one number for all of it (a penalty on the weights) is left out: it is the
    same for every draw of h; :func:`analyse` has made sure of that.
    """
    log_probs = ((site.name, site.log_prob()) for site in sites)
    total: Any = sum(_per_example(name, log_prob, n) for name, log_prob in log_probs if log_prob.dim() > 0)
    return total


def expectation(site: Site, draw: Draw) -> Tensor:
    """Sum of a site's log density, its summed-out dimensions weighted by q."""
    cost = site.log_prob()
    summed = {dim for _, _, dim in draw.probs}
    # in reverse: a later site's probabilities may depend on an earlier site's value
    for name, prob, dim in reversed(draw.probs):
        if cost.dim() < -dim or cost.shape[dim] == 1:
            continue
        for d in range(-1, dim, -1):
            plated = d not in summed and prob.dim() >= -d and prob.shape[d] > 1
            if plated and (cost.dim() < -d or cost.shape[d] == 1):
                raise ValueError(
                    f"Site '{site.name}' depends on the summed-out site '{name}' but stands outside a plate "
                    f"(dim {d}, size {prob.shape[d]}) that '{name}' is in, so it can't be summed unit by "
                    "unit. Put one factor a unit inside that plate; or make the units one event, .to_event(1), if "
                    "log p̃ is affine in each; or relax the site with ConcreteBernoulli."
                )
        cost = (prob * cost).sum(dim, keepdim=True)
    return cost.sum()


def per_example(site: Site, n: int) -> Tensor:
    """A site's log density summed over all but the leading dimension, of shape (n,).

    :raises ValueError: where the leading dimension is not the batch.
    """
    return _per_example(site.name, site.log_prob(), n)


def _per_example(name: str, log_prob: Tensor, n: int) -> Tensor:
    if log_prob.dim() < 1 or log_prob.shape[0] != n:
        raise ValueError(
            f"Site '{name}' has a log density of shape {tuple(log_prob.shape)}; its leading dimension "
            f"is not the batch of {n}, so it can't be told which example it belongs to. Put the "
            "statement inside the data plate, and give factors one entry an example."
        )
    return log_prob.reshape(n, -1).sum(-1)


def analyse(
    model: Callable,
    guide: Callable | None,
    leaves: Sequence[Any],
    spec: Any,
    names: Sequence[str] | None,
    loss: OuterLoss | None,
    strategy: Any,
    discrete: bool = False,
    partial_guide: bool = False,
) -> Pair:
    """Run guide and model once on these arguments, check all that can be checked, and describe them.

    :param guide: None for a model alone: its latents are then nobody's.
    :param loss: None for a method that takes no score of the pair.
    :param strategy: the hypergradient: it says what it needs of the guide.
    :param discrete: whether discrete sites may be visible.
    :param partial_guide: whether the guide may leave latents out, and the model may have no parameters.
    :raises ValueError: for every misuse, naming the site and the cure.
    """
    ran: list[torch.nn.Module] = []
    buffers: dict[int, tuple[Tensor, Tensor]] = {}

    def seen(module, _):
        ran.append(module)
        for b in module.buffers():
            if id(b) not in buffers:
                buffers[id(b)] = (b, b.clone())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(seen)
    try:
        return _describe(model, guide, leaves, spec, names, loss, strategy, discrete, partial_guide, ran)
    finally:
        hook.remove()
        # a look at the programs is no step: batch-norm statistics stay where they were
        for buffer, value in buffers.values():
            buffer.copy_(value)


def _no_guide(*args: Any, **kwargs: Any) -> None:
    """The guide of a model alone."""


def _describe(
    model, guide, leaves, spec, names, loss: OuterLoss | None, strategy: Any, discrete, partial_guide, ran
) -> Pair:
    alone = guide is None
    guide = _no_guide if alone else guide
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    with _hidden():
        if guides.runs_model(guide):
            with record() as p:
                model(*args, **kwargs)
            guide = guides.posteriors(guide, tuple(p.params))
        q = record()
        try:
            with q:
                guide(*args, **kwargs)
        except (ValueError, RuntimeError) as error:
            rows.explain(error, q.sizes(), leaves)
            raise
        latents = {name: s for name, s in q.sites.items() if not s.is_observed}
        soft = frozenset(
            name for name, s in latents.items() if isinstance(base_of(s.fn), ConcreteBernoulli | ConcreteOneHot)
        )
        values = {name: s.value for name, s in latents.items()}
        # a plate that would draw rows has to take the guide's
        p = record(values, soft, offered=q.subsamples)
        try:
            with p:
                model(*args, **kwargs)
        except (ValueError, RuntimeError) as error:
            rows.explain(error, p.sizes(), leaves)
            if "relaxed guide site" in str(error):
                raise ValueError(f"Sites {sorted(soft)}: {error}.") from error
            raise
    plates = rows.plates(q, p, leaves)
    p.handed.update(name for name in q.handed if name in p.subsamples)
    _check_plates((*p.sites.values(), *q.sites.values()))
    sites = visible.find(p.sites, leaves, names, discrete)
    for found in sites:
        _warn_scaled(p.sites[found.name])
    if not (alone or partial_guide):
        _check_sites(p.sites, latents, sites[0].shape[0])
    for name, site in q.sites.items():
        if isinstance(base_of(site.fn), dist.Unit):
            raise ValueError(
                f"The guide has a factor, '{name}': its log density is not that of its draws then, and the score needs "
                "it. Use a guide of sample statements alone."
            )
    theta, phi = params.collect(p.params, "model"), params.collect(q.params, "guide")
    params.reject_shared(theta, phi)
    _check_registered(ran, {**theta, **phi})
    if not (theta or partial_guide):
        raise ValueError("The model has no parameter to train: no pyro.param, pyro.module or PyroModule.")
    enumerated = tuple(name for name, s in latents.items() if is_enumerated(s.infer))
    averaged = tuple(name for name, s in latents.items() if is_averaged(s.fn))
    sampled = tuple(name for name, s in latents.items() if not (name in (*enumerated, *averaged) or s.is_delta))
    _check_guide(latents, enumerated, phi, strategy)
    dims = [len(s.fn.batch_shape) for s in (*p.sites.values(), *q.sites.values())]
    dims += [-f.dim for s in (*p.sites.values(), *q.sites.values()) for f in s.frames if f.vectorized]
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
        tuple({id(b): b for m in ran for b in m.buffers()}.values()),
        tuple({id(m): m for m in ran}.values()),
        params.frozen((*p.params.values(), *q.params.values()), ran),
        unreparameterised=tuple(name for name in sampled if not latents[name].fn.has_rsample),
        averaged=averaged,
        data_plates=leading_plates(p.sites[site.name] for site in sites),
    )
    subsamples = {**q.subsamples, **p.subsamples}
    handed = frozenset(name for name, plate in plates.items() if plate.is_handed)
    batch = visible.Batch(sites, subsamples, leaves, spec, handed)
    if loss is not None:
        strategy.check(loss, pair)
        pair = _with_change(pair, batch, latents, p.sites)
        _check_scores(pair, batch, loss, strategy)
        _check_sight(pair, batch, [name for name in latents if name in p.sites])
        if not strategy.reparameterises:
            _check_examples(pair, batch)
    pair = replace(pair, is_stated=_is_stated(pair, batch))
    if strategy.unrolls and pair.phi:
        pair = replace(pair, astray=_astray(pair, batch))
    return pair


def _is_stated(pair: Pair, batch: visible.Batch) -> bool:
    """Whether φ itself is out of sight once the statements give stand-ins, and these are in sight.

    Module weights stay in sight, and so does a tensor that the program states but reads from its closure. What has no
    derivative (a module's weight read through ``.data``) may be read by whichever way.
    """
    if not pair.phi:
        return True
    stand_ins = {name: leaf.detach().requires_grad_() for name, leaf in pair.phi.items()}
    with torch.random.fork_rng(devices=[]), params.given(stand_ins):
        draw, _ = pair.draw(batch, batch.v)
        log_weight = pair.log_weight(batch, batch.v, draw)
    found = _gradients(log_weight, [*pair.phi.values(), *stand_ins.values()])
    return all((g is None) == (i < len(stand_ins)) for i, g in enumerate(found))


def _astray(pair: Pair, batch: visible.Batch) -> tuple[str, ...]:
    """The parameters of φ that unrolled steps would not see move."""
    buffers = [(b, b.clone()) for b in pair.buffers]

    def look():
        for buffer, value in buffers:
            with torch.no_grad():
                buffer.copy_(value)
        return pair._look(batch)

    with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
        return tuple(params.astray(look, pair.phi, pair.theta, pair.at))


def check_held(pair: Pair, batch: visible.Batch, loss: OuterLoss, strategy: Any) -> None:
    """:raises ValueError: where the score can't be had as a function of v in which θ is a number, and has to be."""
    if not (strategy.holds_theta and loss.differentiates_score):
        return
    v = batch.v.detach().requires_grad_()
    with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
        draw = pair.draw(batch, v)[0].detached()
        with params.swapped({leaf: leaf.detach().requires_grad_() for leaf in pair.theta.values()}):
            value = pair.log_weight(batch, v, draw, guide=False)
        (score,) = torch.autograd.grad(value, v, create_graph=True)
        reached = _gradients(score.square().sum(), list(pair.theta.values()))
    names = [name for name, g in zip(pair.theta, reached, strict=True) if g is not None]
    if names:
        raise ValueError(
            f"The model's parameters {names} are read where Exact() can't hold them fixed (by an autograd.Function, a "
            "scripted or a checkpointed module), as a loss that differentiates the score asks for. Use "
            "DenoisingScoreMatching, or another hypergradient, such as Implicit()."
        )


def _hidden() -> Any:
    """The context in which a look at the programs is hidden from all outside, but for who hands rows to a plate."""
    return pyro.poutine.block(hide_fn=lambda msg: not isinstance(msg.get("fn"), _Subsample))


def _run_until(program: Callable, args: Any, kwargs: Any, values: Mapping[str, Any], sought: Collection[str]) -> record:
    """Run a program until the rows of the plates ``sought`` are known; to its end if there are none."""
    with record(values, sought=sought) as run:
        try:
            program(*args, **kwargs)
        except rows.Found:
            pass
    return run


def _draw(plate: rows.Plate) -> Tensor:
    """The rows of a step, where a plate draws them."""
    if plate.size == plate.full_size:
        return torch.arange(plate.size, device=plate.device)
    return _subsample(plate.full_size, plate.size, plate.device)


def _warn_scaled(site: Site) -> None:
    """A scale around the whole model is often meant as a weight of the minibatch: here it is another density."""
    scale = torch.as_tensor(site.scale, dtype=torch.double)
    for frame in site.frames:
        scale = scale * (frame.size / frame.full_size)
    if not torch.allclose(scale, torch.ones_like(scale)):
        shown = f"{scale.item():.4g}" if scale.dim() == 0 else f"{scale.min().item():.4g} to {scale.max().item():.4g}"
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
            if frame.size != frame.full_size and frame.name not in site.subsamples:
                raise ValueError(
                    f"Plate '{frame.name}' around site '{site.name}' subsamples, and a handler (block) hides which "
                    "rows it takes: model and guide would be about others at every pass. Leave the plate in sight, "
                    f"hide=[...] without '{frame.name}', or hand it the rows: pyro.plate(..., subsample=rows)."
                )


def _subsample(full_size: int, size: int, device: Any) -> Tensor:
    """Rows without replacement, every sequence of them as likely.

    Pyro's own plate shuffles all ``full_size`` indices, which at 50,000 takes longer than a small model's step. Here
    rows are drawn until so many are distinct; each stands where it came first.
    """
    if 8 * size > full_size:  # too many would be drawn twice
        return _Subsample(full_size, size, device=device).sample()
    rows = torch.randint(full_size, (size,), device=device)
    while len(distinct := dict.fromkeys(rows.tolist())) < size:
        more = torch.randint(full_size, (size - len(distinct),), device=device)
        rows = torch.cat([torch.tensor(list(distinct), device=device), more])
    return rows


def _num_data(model_sites: Mapping[str, Site], sites: Sequence[visible.VisibleSite]) -> int:
    """How many examples a host ELBO's value speaks for: n, times the plates' N/B."""
    num = float(sites[0].shape[0])
    for frame in model_sites[sites[0].name].frames:
        num *= frame.full_size / frame.size
    return round(num)


def _cure_of_missing(site: Site, num_rows: int) -> str:
    if is_enumerated(site.infer):
        return (
            "BiSM sums out what the guide marks: sample it there with infer={'enumerate': 'parallel'}; or take "
            "MarginalSM(model, optim, loss), which sums latents out and needs no guide."
        )
    if tuple(site.value.shape)[:1] != (num_rows,):
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


def _check_registered(modules: Sequence[torch.nn.Module], known: Mapping[str, Tensor]) -> None:
    """Every weight of a PyroModule that ran must be one that the optimiser will see."""
    ids = {id(leaf) for leaf in known.values()}
    for module in modules:
        if not isinstance(module, pyro.nn.PyroModule):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in ids or not weight.requires_grad:
                continue
            full = f"{module._pyro_name}.{name}".strip(".").removesuffix("_unconstrained")
            if full in known:
                raise ValueError(
                    f"Two PyroModules have a parameter called '{full}': in the param store they are one, so "
                    "the second one's weights would never be trained. Give the modules names: "
                    "super().__init__(name='guide')."
                )


def _check_guide(
    latents: Mapping[str, Site],
    enumerated: Sequence[str],
    phi: Mapping[str, Tensor],
    strategy: Any,
) -> None:
    for name, site in latents.items():
        fn, base = site.fn, base_of(site.fn)
        if site.infer.get("enumerate") == "sequential":
            raise ValueError(f"Guide site '{name}': enumerate='sequential' is not supported; use 'parallel'.")
        if name in enumerated:
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
        if isinstance(base, dist.RelaxedBernoulli | dist.RelaxedOneHotCategorical):
            cure = "Bernoulli" if isinstance(base, dist.RelaxedBernoulli) else "OneHot"
            if (base.temperature < 1).any():
                raise ValueError(
                    f"Guide site '{name}' has the Concrete density at a temperature below 1: its draws round to 0 "
                    "and 1, where the density's gradient overflows. Use "
                    f"Concrete{cure}(temperature, logits): the same draws, scored by the discrete "
                    "cross-entropy."
                )
        if strategy.differentiates_inner and phi and isinstance(site.value, Tensor):
            culprit = _undifferentiable(site.value)
            if culprit:
                raise ValueError(
                    f"Guide site '{name}' ({type(base).__name__}) can't be differentiated twice in its "
                    f"parameters ({culprit}). Use another family (LogNormal, Kumaraswamy, sigmoid-Normal), "
                    "fix the parameters of the gamma draw, or take hypergradient=Detached()."
                )


def _undifferentiable(value: Tensor) -> str | None:
    """The autograd node of a draw whose second derivative is missing, or wrong without a word."""
    # Gamma raises in the backward of its backward; Beta and Dirichlet drop the path silently
    return next((n for n in _nodes(value) if "StandardGamma" in n or "Dirichlet" in n), None)


def _nodes(value: Tensor) -> Iterator[str]:
    """The names of all autograd nodes behind a value."""
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node.name()
        stack.extend(parent for parent, _ in node.next_functions)


def _seeded(pair: Pair, batch: visible.Batch) -> guides.GuideAt:
    """The guide's sites by v and by what is given, with the same random numbers every time."""
    seed = int(torch.randint(2**31, ()))

    def guide_at(v: Tensor, values: Mapping[str, Tensor]) -> dict[str, Site]:
        torch.manual_seed(seed)  # what differs between two runs is v's doing
        return pair.guide_at(batch, v, values)

    return guide_at


def _with_change(
    pair: Pair, batch: visible.Batch, latents: Mapping[str, Site], model_sites: Mapping[str, Site]
) -> Pair:
    """The pair, with the sites that its guide computes from other draws and from v.

    :raises ValueError: where the guide has no density at fixed h.
    """
    deltas = [name for name, site in latents.items() if site.is_delta]
    auxiliary = [name for name in latents if name not in model_sites and name not in deltas]
    if not (auxiliary or deltas):
        return pair
    with torch.random.fork_rng(devices=[]):
        guide_at, change = _seeded(pair, batch), None
        # off the initial values too: at a scale of 1, or at weights of zero, a wrong density may be right
        for parameters in (nullcontext(), params.jittered(list(pair.phi.values()))):
            with parameters:
                values = {name: site.value.detach() for name, site in guide_at(batch.v, {}).items()}
                if auxiliary and change is None:
                    change = guides.change_of_variables(guide_at, batch.v, values, auxiliary, deltas)
                if change is not None:
                    change.check(guide_at, batch.v, values)
                computed = () if change is None else change.computed
                points = [name for name in deltas if name not in computed]
                guides.check_points(guide_at, _seeded(pair, batch), batch.v, values, points)
    return replace(pair, change=change)


def _check_sight(pair: Pair, batch: visible.Batch, latents: Sequence[str]) -> None:
    """:raises ValueError: where a latent of the model does not look at v, or loses its gradient in v."""
    if not latents:
        return
    # jittered parameters may leave what a distribution allows
    with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
        tries = (nullcontext, lambda: params.jittered(list(pair.phi.values())))
        guides.sight(_seeded(pair, batch), batch.v, latents, pair.change, tries).require()


def _check_scores(
    pair: Pair,
    batch: visible.Batch,
    loss: OuterLoss,
    strategy: Any,
) -> None:
    draw, _ = pair.draw(batch, batch.v)
    sizes = [torch.Size(site.shape[1:]).numel() for site in pair.sites]
    pieces = [piece.clone().requires_grad_() for piece in batch.v.split(sizes, -1)]
    v = torch.cat(pieces, -1)
    args, kwargs = batch.arguments(v)
    with record(draw.values, pair.softened) as run:
        pair.model(*args, **kwargs)
    log_p: Any = sum(expectation(site, draw) for site in run.sites.values())
    scores = _require_second_derivative(log_p, (*pieces, *pair.theta.values()), "model's energy")
    for site, s in zip(pair.sites, scores[: len(pieces)], strict=True):
        if s is None:
            raise ValueError(
                f"The score of visible site '{site.name}' is zero everywhere: the energy never reads its "
                "value. Use the site's value (the argument, or what pyro.sample returns) in the energy, and do "
                "not detach it."
            )
    try:
        if loss.average == "score" and loss.num_particles > 1:
            pair.draw(batch, batch.v)  # a flow may cache its last draw's inverse, and no more
        guide_sites = pair.guide_at(batch, v, pair.fixed_latents(batch, v, draw.values))
        log_q = sum(expectation(site, draw) for site in guide_sites.values())
    except KeyError as error:
        raise ValueError(
            "The guide can't score a value of h that it has not just drawn: one of the sites "
            f"{list(pair.sampled)} uses a flow without an inverse. Use one with an inverse (an "
            "inverse-autoregressive flow caches; a coupling or spline flow has one)."
        ) from error
    # squared: a once-differentiable function tells its want of a second derivative only where the gradient
    # that reaches it has a graph
    h: Any = sum(value.square().sum() for value in draw.values.values() if value.is_floating_point())
    # weights read without a pyro statement belong to both programs unseen
    reads = zip(pair.theta.items(), _gradients(h + log_q, list(pair.theta.values())), strict=True)
    shared = dict(item for item, g in reads if g is not None)
    params.reject_shared(shared, shared)
    if strategy.differentiates_inner and pair.phi:
        _require_second_derivative(h + log_q, (*pieces, *pair.phi.values()), "guide")


def _check_examples(pair: Pair, batch: visible.Batch) -> None:
    """:raises ValueError: where the model's log density does not fall apart into those of the examples."""
    args, kwargs = batch.arguments(batch.v)
    seen: dict[str, Tensor] = {}
    for _ in range(2):
        with torch.no_grad(), record(pair.hard_draw(batch, batch.v)) as run:
            pair.model(*args, **kwargs)
        joint_per_example(run.sites.values(), len(batch.v))
        for name, site in run.sites.items():
            log_prob = site.log_prob()
            if log_prob.dim() == 0 and not torch.equal(seen.setdefault(name, log_prob), log_prob):
                raise ValueError(
                    f"Site '{name}' has one log density for the whole batch, and it depends on the latents: a "
                    "covariance is taken example by example. Put the statement inside the data plate, one entry an "
                    "example."
                )


def _gradients(total: Any, inputs: Sequence[Tensor], create_graph: bool = False) -> Sequence[Tensor | None]:
    if not isinstance(total, Tensor) or not total.requires_grad:
        return [None] * len(inputs)
    return torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True, create_graph=create_graph)


def _require_second_derivative(total: Any, inputs: Sequence[Tensor], role: str) -> Sequence[Tensor | None]:
    """The gradients of ``total``.

    :raises ValueError: if torch has no derivative of them; found before anything is updated.
    """
    try:
        first = _gradients(total, inputs, create_graph=True)
        norm: Any = sum(g.square().sum() for g in first if g is not None)
        if isinstance(norm, Tensor) and any(name.endswith("::Error") for name in _nodes(norm)):
            # torch raises only where the node is on the way to an input; elsewhere it drops the path silently
            raise RuntimeError("an autograd function in it is once_differentiable")
        _gradients(norm, inputs)
    except RuntimeError as error:
        raise ValueError(
            f"The {role} can't be differentiated twice: {error}. For attention, run it inside "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH); don't torch.compile a part of the program; "
            "write torch.cdist out by broadcasting; take a distribution whose draws are made of torch's own operations."
        ) from error
    return first
