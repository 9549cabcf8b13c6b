"""Log densities of a (model, guide) pair on a batch, and the score function they give.

For one draw h ~ q(h|v) the outer losses need (Bao et al. 2020)

    s(v) = ∇_v [log p̃(v, h; θ) - log q(h|v; φ)],

with h held fixed as v moves: at q = p(h|v; θ) this is the score of the marginal, whatever h is. Where a
discrete site is summed out the expectation under q of the same difference is taken, its weights
held fixed as v moves; then the score's own derivative in v stays right as well.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import pyro
import torch
from torch import Tensor

from ..losses import OuterLoss, loss_by_example
from . import guides, params, rows, visible
from .hosts import pytree
from .records import (
    SiteRecord,
    hidden_from_handlers,
    joint_per_example,
    per_example,
    record,
    replay,
    run_until,
    sum_by_example,
)
from .rows import draw_plate

MAX_CONFIGURATIONS = 256


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
class ModelAndGuide:
    """A (model, guide) pair, as the first run on arguments of this structure showed it.

    :ivar theta: the model's unconstrained parameter tensors, by name.
    :ivar phi: the guide's.
    :ivar subsamples: the plates that have rows.
    :ivar num_plate_dims: how many dimensions the plates take.
    :ivar buffers: module buffers that a pass changes (batch-norm statistics).
    :ivar modules: the modules that ran.
    :ivar frozen: parameters met that do not require grad.
    :ivar reads_phi_through_param: whether the programs read φ through ``pyro.param`` statements alone.
    :ivar unreparameterised: the guide's sites whose draws carry no path to φ.
    :ivar averaged: the guide's sites that are summed out by their mean.
    :ivar data_plates: the plates along the leading axis of the visible values.
    :ivar change: the guide's sites that are computed from v and from auxiliary draws, or None.
    :ivar shiftable: the parameters of the guide's distributions that δ shifts (``hypergradients/shifts.py``); None
        where none does.
    :ivar astray: the parameters of φ that stand-ins do not take the place of; looked for where steps are unrolled.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    sites: tuple[visible.VisibleSite, ...]
    theta: Mapping[str, Tensor]
    phi: Mapping[str, Tensor]
    relaxed_sites: frozenset[str]
    enumerated: tuple[str, ...]
    sampled: tuple[str, ...]
    subsamples: Mapping[str, rows.Plate]
    num_data: int
    num_plate_dims: int
    buffers: tuple[Tensor, ...] = field(default=())
    modules: tuple[torch.nn.Module, ...] = field(default=())
    frozen: tuple[Tensor, ...] = field(default=())
    reads_phi_through_param: bool = False
    unreparameterised: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()
    data_plates: frozenset[str] = frozenset()
    change: guides.ChangeOfVariables | None = None
    shiftable: frozenset[tuple[str, str]] | None = None
    astray: tuple[str, ...] = ()

    def is_current(self) -> bool:
        """Whether the programs still train these tensors: none was replaced, cleared, frozen or unfrozen since."""
        store = params.stored()
        for leaves in (self.theta, self.phi):
            for name, leaf in leaves.items():
                if store.get(name) is not leaf or not leaf.requires_grad:
                    return False
        return not any([leaf.requires_grad for leaf in self.frozen])

    def batch(self, leaves: Sequence[Any], spec: Any, resizable: bool = False) -> visible.Batch:
        """The step's batch: subsampling plates draw their rows here, once, or are handed them by the programs.

        :param resizable: leave plates that take all rows to themselves: such a plate takes any number of them.
        """
        handed = self._handed(leaves, spec)
        indices = {
            name: handed[name] if plate.is_handed else draw_plate(plate)
            for name, plate in self.subsamples.items()
            if not (resizable and plate.takes_all)
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
            with (
                params.unmoved_buffers(self.buffers),
                torch.no_grad(),
                pyro.validation_enabled(False),
                hidden_from_handlers(),
            ):
                # to its end where the model needs its draws
                q = run_until(self.guide, args, kwargs, {}, () if by_model else by_guide) if by_guide else record()
                values = {name: site.value for name, site in q.sites.items() if not site.is_observed}
                p = run_until(self.model, args, kwargs, values, by_model) if by_model else record()
            for run, names in ((q, by_guide), (p, by_model)):
                for name in names & run.subsamples.keys():
                    rows.agree(name, found.setdefault(name, run.subsamples[name]), run.subsamples[name])
        for plate in plates:
            rows.require(plate, found.get(plate.name))
        return found

    def programs(self, batch: visible.Batch) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Model and guide for a host ELBO: rows fixed, discrete sites softened where the guide's are."""

        def replayed(program: Callable[..., Any], relaxed_sites: frozenset[str]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with replay(batch.indices, relaxed_sites):
                    return program(*args, **kwargs)

            return run if batch.indices or relaxed_sites else program

        return replayed(self.model, self.relaxed_sites), replayed(self.guide, frozenset())

    def at(self, phi: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """The context in which the programs run with these tensors, unconstrained, as φ."""
        if self.reads_phi_through_param:
            return params.params_read_as(dict(zip(self.phi, phi, strict=True)))
        return params.tensors_read_as(dict(zip(self.phi.values(), phi, strict=True)))

    def holding_values(self, phi: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """The context in which φ has these values itself: see :func:`params.holding_values`."""
        return params.holding_values(self.phi.values(), phi)

    def out_of_sight(self, batch: visible.Batch) -> list[str]:
        """The parameters that the programs read where no other tensors can be put in their place."""
        with (
            params.unmoved_buffers(self.buffers),
            torch.random.fork_rng(devices=[]),
            pyro.validation_enabled(False),
            hidden_from_handlers(),
        ):
            return params.out_of_sight(lambda: self._look(batch), {**self.theta, **self.phi})

    def _look(self, batch: visible.Batch) -> Tensor:
        """log p̃ - log q at a draw of the guide's, with a path to all that is trained."""
        draw, _ = self.draw(batch, batch.v)
        drawn = sum(x.sum() for x in draw.values.values() if x.is_floating_point())
        return self.log_weight(batch, batch.v, draw) + drawn

    def draw(
        self, batch: visible.Batch, v: Tensor, given: Mapping[str, Tensor] | None = None, moves: bool = False
    ) -> tuple[Draw, dict[str, SiteRecord]]:
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
        with record({**drawn, **batch.indices}, self.relaxed_sites) as p:
            self.model(*args, **kwargs)
        total = sum(site.total() for site in p.sites.values()) - sum(site.total() for site in q.sites.values())
        return cast(Tensor, total)

    def log_guide(self, batch: visible.Batch, latents: Mapping[str, Tensor]) -> Tensor:
        """log q(h|v) at any h, by example, relaxed sites as discrete ones; NaN where no draws behind h are found."""

        def guide_at(v: Tensor, values: Mapping[str, Tensor]) -> dict[str, SiteRecord]:
            return self.guide_at(batch, v, values, discretize=True)

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
                log_q: Any = sum(sum_by_example(name, sites[name].log_q(), n) for name in self.enumerated)
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
        with record(draw.values, self.relaxed_sites) as run:
            self.model(*args, **kwargs)
        total = cast(Tensor, sum(expectation(site, draw) for site in run.sites.values()))
        if guide:
            sites = self.guide_at(batch, v, self.fixed_latents(batch, v, draw.values))
            total = total - sum(expectation(site, draw) for site in sites.values())
        return total

    def guide_at(
        self, batch: visible.Batch, v: Tensor, values: Mapping[str, Tensor], discretize: bool = False
    ) -> dict[str, SiteRecord]:
        """The guide's own sites at v, where some are given."""
        args, kwargs = batch.arguments(v)
        with record({**batch.indices, **values}, discretize=discretize) as run:
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
            return mean_slope([self.log_weight(batch, v, draw, guide) for draw in draws], v, loss)

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
            return loss_by_example(loss, self.score(batch, list(draws), loss), batch.v, noise).mean()
        total: Any = 0.0
        for draw in draws:
            value = loss_by_example(loss, self.score(batch, [draw], loss), batch.v, noise)
            total = total + (value if draw.weight is None else draw.weight * value).mean()
        return cast(Tensor, total / loss.num_particles)

    def draw_discrete(self, batch: visible.Batch, v: Tensor) -> dict[str, Tensor]:
        """One draw of every site of the guide, and the rows; relaxed and summed-out sites drawn as discrete ones."""
        args, kwargs = batch.arguments(v.detach())
        with torch.no_grad(), record(batch.indices, discretize=True) as run:
            self.guide(*args, **kwargs)
        return {**{name: s.value for name, s in run.sites.items() if not s.is_observed}, **batch.indices}

    def log_joint(self, batch: visible.Batch, v: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """log p̃(v, h) of every example at a :meth:`draw_discrete`."""
        args, kwargs = batch.arguments(v)
        with record(values) as run:
            self.model(*args, **kwargs)
        return joint_per_example(run.sites.values(), len(v))


def mean_slope(log_weights: Sequence[Tensor], v: Tensor, loss: OuterLoss) -> Tensor:
    """The gradient in v of the draws' mean log weight; of each, shape (L, n, D), where the loss wants them apart."""
    if loss.average == "unbiased" and len(log_weights) > 1:
        return torch.stack([torch.autograd.grad(each, v, create_graph=True)[0] for each in log_weights])
    total: Any = sum(log_weights)
    return torch.autograd.grad(total / len(log_weights), v, create_graph=True)[0]


def expectation(site: SiteRecord, draw: Draw) -> Tensor:
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


def gradients_of(total: Any, inputs: Sequence[Tensor], create_graph: bool = False) -> Sequence[Tensor | None]:
    if not isinstance(total, Tensor) or not total.requires_grad:
        return [None] * len(inputs)
    return torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True, create_graph=create_graph)
