"""What a model and a guide must not do: an error names the site and the cure."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..distributions import base_of
from ..losses import OuterLoss
from . import guides, params, visible
from .pair import ModelAndGuide, expectation, gradients_of
from .records import SiteRecord, is_enumerated, joint_per_example, record


def warn_scaled(site: SiteRecord) -> None:
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


def check_plates(sites: Iterable[SiteRecord]) -> None:
    """:raises ValueError: for a plate whose rows are drawn out of sight: every pass would be about others."""
    for site in sites:
        for frame in site.frames:
            if frame.size != frame.full_size and frame.name not in site.subsamples:
                raise ValueError(
                    f"Plate '{frame.name}' around site '{site.name}' subsamples, and a handler (block) hides which "
                    "rows it takes: model and guide would be about others at every pass. Leave the plate in sight, "
                    f"hide=[...] without '{frame.name}', or hand it the rows: pyro.plate(..., subsample=rows)."
                )


def _cure_of_missing(site: SiteRecord, num_rows: int) -> str:
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


def check_registered(modules: Sequence[torch.nn.Module], known: Mapping[str, Tensor]) -> None:
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


def check_guide(
    latents: Mapping[str, SiteRecord],
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


def _seeded(pair: ModelAndGuide, batch: visible.Batch) -> guides.GuideAt:
    """The guide's sites by v and by what is given, with the same random numbers every time."""
    seed = int(torch.randint(2**31, ()))

    def guide_at(v: Tensor, values: Mapping[str, Tensor]) -> dict[str, SiteRecord]:
        torch.manual_seed(seed)  # what differs between two runs is v's doing
        return pair.guide_at(batch, v, values)

    return guide_at


def check_sight(pair: ModelAndGuide, batch: visible.Batch, latents: Sequence[str]) -> None:
    """:raises ValueError: where a latent of the model does not look at v, or loses its gradient in v."""
    if not latents:
        return
    # jittered parameters may leave what a distribution allows
    with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
        tries = (nullcontext, lambda: params.jittered(list(pair.phi.values())))
        guides.sight(_seeded(pair, batch), batch.v, latents, pair.change, tries).require()


def check_scores(
    pair: ModelAndGuide,
    batch: visible.Batch,
    loss: OuterLoss,
    strategy: Any,
) -> None:
    draw, _ = pair.draw(batch, batch.v)
    sizes = [torch.Size(site.shape[1:]).numel() for site in pair.sites]
    pieces = [piece.clone().requires_grad_() for piece in batch.v.split(sizes, -1)]
    v = torch.cat(pieces, -1)
    args, kwargs = batch.arguments(v)
    with record(draw.values, pair.relaxed_sites) as run:
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
    reads = zip(pair.theta.items(), gradients_of(h + log_q, list(pair.theta.values())), strict=True)
    shared = dict(item for item, g in reads if g is not None)
    params.reject_shared(shared, shared)
    if strategy.differentiates_inner and pair.phi:
        _require_second_derivative(h + log_q, (*pieces, *pair.phi.values()), "guide")


def check_examples(pair: ModelAndGuide, batch: visible.Batch) -> None:
    """:raises ValueError: where the model's log density does not fall apart into those of the examples."""
    args, kwargs = batch.arguments(batch.v)
    seen: dict[str, Tensor] = {}
    for _ in range(2):
        with torch.no_grad(), record(pair.draw_discrete(batch, batch.v)) as run:
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


def _require_second_derivative(total: Any, inputs: Sequence[Tensor], role: str) -> Sequence[Tensor | None]:
    """The gradients of ``total``.

    :raises ValueError: if torch has no derivative of them; found before anything is updated.
    """
    try:
        first = gradients_of(total, inputs, create_graph=True)
        norm: Any = sum(g.square().sum() for g in first if g is not None)
        if isinstance(norm, Tensor) and any(name.endswith("::Error") for name in _nodes(norm)):
            # torch raises only where the node is on the way to an input; elsewhere it drops the path silently
            raise RuntimeError("an autograd function in it is once_differentiable")
        gradients_of(norm, inputs)
    except RuntimeError as error:
        raise ValueError(
            f"The {role} can't be differentiated twice: {error}. For attention, run it inside "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH); don't torch.compile a part of the program; "
            "write torch.cdist out by broadcasting; take a distribution whose draws are made of torch's own operations."
        ) from error
    return first
