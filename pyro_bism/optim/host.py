"""The optimisers that users pass, and the steps that Pyro takes with them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def torch_optimizer(optim: PyroOptim, leaf: Tensor) -> torch.optim.Optimizer:
    """The torch optimiser that ``optim`` keeps for a parameter, a scheduler's wrapping taken off."""
    kept = optim.optim_objs[leaf]
    found: torch.optim.Optimizer = getattr(kept, "optimizer", kept)
    return found


class Leading:
    """The ``step`` of a scheduler that others follow: it is theirs too. A class, so that deep copies lead copies."""

    def __init__(self, optim: PyroOptim, follower: PyroOptim):
        earlier = vars(optim).get("step")
        self.optim = optim
        self.followers: list[PyroOptim] = [*(earlier.followers if isinstance(earlier, Leading) else []), follower]

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        schedulers: Any = (self.optim, *self.followers)
        for each in schedulers:
            type(each).step(each, *args, **kwargs)


def create_optimizers(optim: PyroOptim, leaves: Sequence[Tensor]) -> None:
    """Make ``optim`` create its torch optimisers, with a step that has no gradients and moves nothing."""
    fresh = [leaf for leaf in leaves if leaf not in optim.optim_objs]
    for leaf in fresh:
        leaf.grad = None
    clip, optim.pt_clip_args = optim.pt_clip_args, {}  # torch can't clip gradients that are not there
    try:
        optim(fresh)
    finally:
        optim.pt_clip_args = clip
    for leaf in fresh:
        optim.grad_clip[leaf] = optim._get_grad_clip(leaf)  # type: ignore[arg-type]
        kept = torch_optimizer(optim, leaf)
        if isinstance(kept, ClippedAdam):  # its rate decays at every step, a gradient or none
            for group in kept.param_groups:
                group["lr"] /= group["lrd"]


def require_unrollable(optim: PyroOptim, leaves: Sequence[Tensor]) -> None:
    """Checks that the optimiser's step can be differentiated.

    :raises ValueError: where it can't.
    """
    for leaf in leaves:
        kept = torch_optimizer(optim, leaf)
        if not isinstance(kept, ClippedAdam) and "differentiable" not in kept.param_groups[0]:
            raise ValueError(
                f"The inner optimiser {type(kept).__name__} can't be unrolled: torch has no "
                "differentiable form of it. Pass inner_optim= one of SGD, Adam, AdamW, ClippedAdam, RMSprop, "
                "Adagrad, Adadelta, Adamax, NAdam, RAdam, ASGD, Rprop, or hypergradient=Detached()."
            )


def descend(optim: PyroOptim, leaves: Sequence[Tensor], gradient: Sequence[Tensor | None]) -> None:
    """One step of the user's optimiser. No ``.grad`` is left behind, as after ``SVI.step``."""
    slopes = {leaf: g for leaf, g in zip(leaves, gradient, strict=True) if g is not None}
    if slopes and _take_one_adam(optim, slopes):
        return
    for leaf in leaves:
        leaf.grad = slopes.get(leaf)
    optim(list(slopes))
    for leaf in leaves:
        leaf.grad = None


def _take_one_adam(optim: PyroOptim, slopes: Mapping[Tensor, Tensor]) -> bool:
    """The same step in one call for all leaves, where ``optim`` has for all an Adam of the same settings.

    A call for each leaf takes a tenth of a small model's whole step.

    :returns: whether it is such a step; else nothing is done.
    """
    every: list[Any] = [optim.optim_objs.get(leaf) for leaf in slopes]
    first = every[0]
    # where a scheduler stands in its place, the type is another
    if type(first) not in (torch.optim.Adam, torch.optim.AdamW) or not is_adam(first):
        return False
    settings = group_settings(first)
    for leaf, kept in zip(slopes, every, strict=True):
        if not (
            type(kept) is type(first)
            and kept.state.get(leaf)  # its own first step makes it
            and group_settings(kept) == settings
            and optim.grad_clip[leaf] is None
            and not (kept._optimizer_step_pre_hooks or kept._optimizer_step_post_hooks)
            and "step" not in vars(kept)  # a scheduler beside it counts them
            and not slopes[leaf].is_sparse
        ):
            return False
    if type(optim).__call__ is not PyroOptim.__call__ or _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
        return False
    states = [kept.state[leaf] for leaf, kept in zip(slopes, every, strict=True)]
    beta1, beta2 = settings.pop("betas")
    settings.pop("initial_lr", None)  # of a state saved beside a scheduler
    with torch.no_grad():
        adam(
            params=list(slopes),
            grads=list(slopes.values()),
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            beta1=beta1,
            beta2=beta2,
            **settings,
        )
    return True


@contextmanager
def with_second_guide(
    optim: PyroOptim, leaves: Sequence[Tensor], values: Sequence[Tensor], states: Sequence[dict[str, Any]]
) -> Iterator[None]:
    """Inside, the leaves hold ``values`` and ``optim`` works on ``states``; what it does to both is kept in them."""
    kept = [torch_optimizer(optim, leaf) for leaf in leaves]
    # ClippedAdam lowers its rate at every step
    rates = [[group["lr"] for group in k.param_groups if "lr" in group] for k in kept]

    def exchange() -> None:
        with torch.no_grad():
            for leaf, value, k, state in zip(leaves, values, kept, states, strict=True):
                mine = leaf.detach().clone()
                leaf.copy_(value)
                value.copy_(mine)
                other = dict(k.state.get(leaf, {}))
                k.state[leaf] = dict(state)
                state.clear()
                state.update(other)

    exchange()
    try:
        yield
    finally:
        exchange()
        for k, rate in zip(kept, rates, strict=True):
            for group, lr in zip((g for g in k.param_groups if "lr" in g), rate, strict=True):
                group["lr"] = lr


def group_settings(kept: torch.optim.Optimizer) -> dict[str, Any]:
    """The settings of an optimiser of one parameter: its rate, its decays, its switches."""
    return {k: v for k, v in kept.param_groups[0].items() if k != "params"}


def is_adam(kept: torch.optim.Optimizer) -> bool:
    """Whether :class:`~.steps._AdamStep` is its step."""
    if isinstance(kept, ClippedAdam):
        return True
    group = kept.param_groups[0]
    return (
        type(kept) in (torch.optim.Adam, torch.optim.AdamW)
        and not (group["amsgrad"] or group["maximize"])
        and not any(isinstance(setting, Tensor) for setting in (group["lr"], *group["betas"]))
    )
