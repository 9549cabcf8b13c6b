"""The optimisers that users pass, and the steps that Pyro takes with them."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor


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
    for leaf in leaves:
        leaf.grad = slopes.get(leaf)
    optim(list(slopes))
    for leaf in leaves:
        leaf.grad = None


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


def clip_settings(optim: PyroOptim, leaf: Tensor) -> dict[str, Any]:
    """How ``optim`` clips a parameter's gradient: its ``pt_clip_args``, which may be a function of the name."""
    return optim._get_grad_clip_args(leaf) or {}  # type: ignore[arg-type]


def unused_copy(optim: PyroOptim) -> PyroOptim:
    """An optimiser of the same settings that has seen no parameter yet."""
    new = copy.copy(optim)
    new.optim_objs, new.grad_clip, new._state_waiting_to_be_consumed = {}, {}, {}
    return new


def say_stepped(kept: torch.optim.Optimizer) -> None:
    """What torch's own step says of itself, for a scheduler that asks whether there was one."""
    kept._opt_called = True  # type: ignore[attr-defined]
