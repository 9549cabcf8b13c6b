"""What a model and a guide are: found by running them once on arguments of a structure."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..distributions import ConcreteBernoulli, ConcreteOneHot, base_of, is_averaged
from ..losses import OuterLoss
from . import guides, params, rows, visible
from .checks import (
    _seeded,
    check_examples,
    check_guide,
    check_plates,
    check_registered,
    check_scores,
    check_sight,
    check_sites,
    warn_scaled,
)
from .hosts import pytree
from .pair import ModelAndGuide, gradients_of
from .records import SiteRecord, hidden_from_handlers, is_enumerated, leading_plates, record


def analyse(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    leaves: Sequence[Any],
    spec: Any,
    names: Sequence[str] | None,
    loss: OuterLoss | None,
    strategy: Any,
    discrete: bool = False,
    partial_guide: bool = False,
) -> ModelAndGuide:
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

    def seen(module: torch.nn.Module, _: Any) -> None:
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
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    leaves: Sequence[Any],
    spec: Any,
    names: Sequence[str] | None,
    loss: OuterLoss | None,
    strategy: Any,
    discrete: bool,
    partial_guide: bool,
    ran: Sequence[torch.nn.Module],
) -> ModelAndGuide:
    alone = guide is None
    guide = _no_guide if guide is None else guide
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    with hidden_from_handlers():
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
    check_plates((*p.sites.values(), *q.sites.values()))
    sites = visible.find(p.sites, leaves, names, discrete)
    for found in sites:
        warn_scaled(p.sites[found.name])
    if not (alone or partial_guide):
        check_sites(p.sites, latents, sites[0].shape[0])
    for name, site in q.sites.items():
        if isinstance(base_of(site.fn), dist.Unit):
            raise ValueError(
                f"The guide has a factor, '{name}': its log density is not that of its draws then, and the score needs "
                "it. Use a guide of sample statements alone."
            )
    theta, phi = params.collect(p.params, "model"), params.collect(q.params, "guide")
    params.reject_shared(theta, phi)
    check_registered(ran, {**theta, **phi})
    if not (theta or partial_guide):
        raise ValueError("The model has no parameter to train: no pyro.param, pyro.module or PyroModule.")
    enumerated = tuple(name for name, s in latents.items() if is_enumerated(s.infer))
    averaged = tuple(name for name, s in latents.items() if is_averaged(s.fn))
    sampled = tuple(name for name, s in latents.items() if not (name in (*enumerated, *averaged) or s.is_delta))
    check_guide(latents, enumerated, phi, strategy)
    dims = [len(s.fn.batch_shape) for s in (*p.sites.values(), *q.sites.values())]
    dims += [-f.dim for s in (*p.sites.values(), *q.sites.values()) for f in s.frames if f.vectorized]
    pair = ModelAndGuide(
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
        check_scores(pair, batch, loss, strategy)
        check_sight(pair, batch, [name for name in latents if name in p.sites])
        if not strategy.reparameterises:
            check_examples(pair, batch)
    pair = replace(pair, reads_phi_through_param=_is_stated(pair, batch))
    if strategy.unrolls and pair.phi:
        pair = replace(pair, astray=_astray(pair, batch))
    return pair


def _is_stated(pair: ModelAndGuide, batch: visible.Batch) -> bool:
    """Whether φ itself is out of sight once the statements give stand-ins, and these are in sight.

    Module weights stay in sight, and so does a tensor that the program states but reads from its closure. What has no
    derivative (a module's weight read through ``.data``) may be read by whichever way.
    """
    if not pair.phi:
        return True
    stand_ins = {name: leaf.detach().requires_grad_() for name, leaf in pair.phi.items()}
    with torch.random.fork_rng(devices=[]), params.params_read_as(stand_ins):
        draw, _ = pair.draw(batch, batch.v)
        log_weight = pair.log_weight(batch, batch.v, draw)
    found = gradients_of(log_weight, [*pair.phi.values(), *stand_ins.values()])
    return all((g is None) == (i < len(stand_ins)) for i, g in enumerate(found))


def _astray(pair: ModelAndGuide, batch: visible.Batch) -> tuple[str, ...]:
    """The parameters of φ that unrolled steps would not see move."""
    buffers = [(b, b.clone()) for b in pair.buffers]

    def look() -> Tensor:
        for buffer, value in buffers:
            with torch.no_grad():
                buffer.copy_(value)
        return pair._look(batch)

    with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
        return tuple(params.astray(look, pair.phi, pair.theta, pair.at))


def check_held(pair: ModelAndGuide, batch: visible.Batch, loss: OuterLoss, strategy: Any) -> None:
    """Check whether the score can be had as a function of v in which θ is a number, where it has to be.

    :raises ValueError: where it can't.
    """
    if not (strategy.holds_theta and loss.differentiates_score):
        return
    v = batch.v.detach().requires_grad_()
    with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
        draw = pair.draw(batch, v)[0].detached()
        with params.tensors_read_as({leaf: leaf.detach().requires_grad_() for leaf in pair.theta.values()}):
            value = pair.log_weight(batch, v, draw, guide=False)
        (score,) = torch.autograd.grad(value, v, create_graph=True)
        reached = gradients_of(score.square().sum(), list(pair.theta.values()))
    names = [name for name, g in zip(pair.theta, reached, strict=True) if g is not None]
    if names:
        raise ValueError(
            f"The model's parameters {names} are read where Exact() can't hold them fixed (by an autograd.Function, a "
            "scripted or a checkpointed module), as a loss that differentiates the score asks for. Use "
            "DenoisingScoreMatching, or another hypergradient, such as Implicit()."
        )


def _num_data(model_sites: Mapping[str, SiteRecord], sites: Sequence[visible.VisibleSite]) -> int:
    """How many examples a host ELBO's value speaks for: n, times the plates' N/B."""
    num = float(sites[0].shape[0])
    for frame in model_sites[sites[0].name].frames:
        num *= frame.full_size / frame.size
    return round(num)


def _with_change(
    pair: ModelAndGuide, batch: visible.Batch, latents: Mapping[str, SiteRecord], model_sites: Mapping[str, SiteRecord]
) -> ModelAndGuide:
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
