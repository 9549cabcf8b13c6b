"""A ``PyroOptim``'s own step as a differentiable function of parameters and gradients.

Unrolling differentiates the *user's* inner optimiser: its per-parameter settings, clipping, schedules
and current state. ``torch.optim`` can do it (``differentiable=True``); three of its corners are mended here,
and Adam has a shorter step of its own.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.overrides import TorchFunctionMode


def _root(x: Tensor) -> Tensor:
    """√x with derivative 0 at 0. Adam divides by √(mean g²): at a gradient of exactly 0 torch gives 0·∞ = NaN."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()


class _ZeroSafeRoot(TorchFunctionMode):
    """Inside this context every square root is :func:`_root`."""

    _roots = frozenset({torch.sqrt, Tensor.sqrt})

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self._roots or func is Tensor.sqrt_:
            (x,) = args
            # the root in place is taken of a copy: the clamp's derivative reads its argument
            return _root(x) if func is not Tensor.sqrt_ else x.copy_(_root(x.clone()))
        return func(*args, **(kwargs or {}))


def torch_optimizer(optim: PyroOptim, leaf: Tensor) -> torch.optim.Optimizer:
    """The torch optimiser that ``optim`` keeps for a parameter, a scheduler's wrapping taken off."""
    kept = optim.optim_objs[leaf]
    return getattr(kept, "optimizer", kept)


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


def settle(optim: PyroOptim, leaves: Sequence[Tensor]) -> None:
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
    """:raises ValueError: if the optimiser's step can't be differentiated."""
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
    if type(first) not in (torch.optim.Adam, torch.optim.AdamW) or not _is_adam(first):
        return False
    settings = _group(first)
    for leaf, kept in zip(slopes, every, strict=True):
        if not (
            type(kept) is type(first)
            and kept.state.get(leaf)  # its own first step makes it
            and _group(kept) == settings
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
def exchanged(
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


class DifferentiableOptim:
    """Steps of ``optim`` from its present state, on a copy of that state.

    ``step(values, gradients)`` returns the new values with a graph to both arguments.
    """

    def __init__(self, optim: PyroOptim, leaves: Sequence[Tensor]):
        self._steps = [_Clipped(optim, leaf) for leaf in leaves]

    def step(self, values: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor]:
        return [
            value if g is None else step(value, g)
            for step, value, g in zip(self._steps, values, gradients, strict=True)
        ]

    def tensors(self) -> dict[Any, Tensor]:
        """The tensors of the state (momenta, mean squares), by parameter and name."""
        return {(i, name): x for i, step in enumerate(self._steps) for name, x in step.inner.tensors().items()}

    def state(self) -> dict[Any, Any]:
        """All that changes from step to step: :meth:`tensors`, rates and step counts."""
        counts = {(i, name): x for i, step in enumerate(self._steps) for name, x in step.inner.counts().items()}
        return {**self.tensors(), **counts}

    def resumed(self, tensors: Mapping[Any, Any]) -> "DifferentiableOptim":
        """A copy that goes on by itself from the same state, these parts of :meth:`state` in place of its own."""
        new = copy.copy(self)
        new._steps = [
            step.resumed({name: x for (j, name), x in tensors.items() if j == i}) for i, step in enumerate(self._steps)
        ]
        return new


class _Clipped:
    """A parameter's step, its gradient clipped first as its ``PyroOptim`` does."""

    def __init__(self, optim: PyroOptim, leaf: Tensor):
        kept = torch_optimizer(optim, leaf)
        self.clip = optim._get_grad_clip_args(leaf) or {}  # type: ignore[arg-type]
        group, state = _group(kept), dict(kept.state.get(leaf, {}))
        self.inner = _AdamStep(leaf, group, state) if _is_adam(kept) else _TorchStep(kept, group, state)

    def __call__(self, value: Tensor, gradient: Tensor) -> Tensor:
        return self.inner(value, _clip(gradient, **self.clip))

    def resumed(self, tensors: Mapping[str, Tensor]) -> "_Clipped":
        new = copy.copy(self)
        new.inner = self.inner.resumed(tensors)
        return new


def _clip(gradient: Tensor, clip_norm: float | None = None, clip_value: float | None = None) -> Tensor:
    """``clip_grad_norm_`` and ``clip_grad_value_``, out of place, as ``PyroOptim`` applies them."""
    if clip_norm is not None:
        gradient = gradient * (clip_norm / (_root(gradient.square().sum()) + 1e-6)).clamp(max=1.0)
    if clip_value is not None:
        gradient = gradient.clamp(-clip_value, clip_value)
    return gradient


class _TorchStep:
    """A step of ``torch.optim``'s own. Its settings are numbers, constants of a captured step."""

    def __init__(self, kept: torch.optim.Optimizer, group: dict[str, Any], state: dict[str, Any]):
        # the fused and multi-tensor forms have no derivative
        group = {**group, "differentiable": True}
        group |= {key: False for key in ("foreach", "fused", "capturable") if key in group}
        self.group, self.state = group, state
        self.optim = object.__new__(type(kept))  # its settings come from the group, not from a constructor
        # torch asks the defaults, not the group, whether to keep the step's graph
        self.optim.__dict__.update({**kept.__dict__, "defaults": {**kept.defaults, **group}})
        # a scheduler hangs a counting step() on its optimiser, bound to the kept one
        self.optim.__dict__.pop("step", None)

    def __call__(self, value: Tensor, gradient: Tensor) -> Tensor:
        fast = value.clone()  # the step works in place
        fast.grad = gradient
        # torch changes the state in place, but the graph of the last step still needs it
        state = {k: s.clone() if isinstance(s, Tensor) else s for k, s in self.state.items()}
        group = {**self.group, "params": [fast]}
        if group.get("momentum") and "dampening" in group and state.get("momentum_buffer") is None:
            # SGD detaches its first buffer from the graph. A buffer of zeros, undamped, is the same step.
            state["momentum_buffer"] = torch.zeros_like(fast)
            group["dampening"] = 0.0
        self.optim.param_groups, self.optim.state = [group], {fast: state}  # type: ignore[assignment]
        with _ZeroSafeRoot():
            self.optim.step()
        self.state = self.optim.state[fast]
        fast.grad = None
        return fast

    def tensors(self) -> dict[str, Tensor]:
        return {k: s for k, s in self.state.items() if isinstance(s, Tensor) and s.is_floating_point() and k != "step"}

    def counts(self) -> dict[str, Any]:
        return {k: s for k, s in self.state.items() if k == "step"}

    def resumed(self, tensors: Mapping[str, Tensor]) -> "_TorchStep":
        new = copy.copy(self)
        new.state = {**self.state, **tensors}
        return new


def _group(kept: torch.optim.Optimizer) -> dict[str, Any]:
    return {k: v for k, v in kept.param_groups[0].items() if k != "params"}


def _is_adam(kept: torch.optim.Optimizer) -> bool:
    """Whether :class:`_AdamStep` is its step."""
    if isinstance(kept, ClippedAdam):
        return True
    group = kept.param_groups[0]
    return (
        type(kept) in (torch.optim.Adam, torch.optim.AdamW)
        and not (group["amsgrad"] or group["maximize"])
        and not any(isinstance(setting, Tensor) for setting in (group["lr"], *group["betas"]))
    )


class Settings:
    """What a captured step has as constants. Adam's rate is none: it is an input."""

    def __init__(self, optim: PyroOptim, leaves: Sequence[Tensor]):
        self._optim, self._leaves = optim, leaves
        self._found = []
        for leaf in leaves:
            kept = torch_optimizer(optim, leaf)
            free = ("lr", "initial_lr", "params") if _is_adam(kept) else ("params",)
            whole = dict(kept.param_groups[0])
            group = {k: v for k, v in whole.items() if k not in free}
            self._found.append((kept, whole, group, optim._get_grad_clip_args(leaf)))  # type: ignore[arg-type]

    def are_current(self) -> bool:
        for leaf, (kept, whole, group, clip) in zip(self._leaves, self._found, strict=True):
            now = torch_optimizer(self._optim, leaf)
            if now is not kept or self._optim._get_grad_clip_args(leaf) != clip:  # type: ignore[arg-type]
                return False
            values = now.param_groups[0]
            # the whole first: one comparison is all it takes while no schedule moves the rate
            if values != whole and any(values.get(k, math.nan) != v for k, v in group.items()):
                return False
        return True


class _AdamStep:
    """The step of Adam, AdamW and ``pyro.optim.ClippedAdam``.

    ClippedAdam works on ``.data`` and so has no graph of its own. For the other two, the default choices, these few
    operations are several times faster than torch's differentiable form. ``lr`` and ``step`` are numbers, or scalar
    tensors where a step is captured.
    """

    def __init__(self, leaf: Tensor, group: dict[str, Any], state: dict[str, Any]):
        self.group = group
        self.lr: Any = group["lr"]
        self.step: Any = int(state.get("step", 0))
        # cloned: the kept state is changed in place by the kept steps
        self.mean, self.square = (
            state[key].clone() if key in state else torch.zeros_like(leaf) for key in ("exp_avg", "exp_avg_sq")
        )

    def __call__(self, value: Tensor, gradient: Tensor) -> Tensor:
        group, g = self.group, gradient
        beta1, beta2 = group["betas"]
        clipped = "clip_norm" in group  # ClippedAdam
        self.step = self.step + 1
        if clipped:
            self.lr = self.lr * group["lrd"]
            g = g.clamp(-group["clip_norm"], group["clip_norm"])
        if group.get("decoupled_weight_decay"):
            value = value * _like(1 - self.lr * group["weight_decay"], value)
        elif group["weight_decay"] != 0:
            g = g + group["weight_decay"] * value
        self.mean = torch.lerp(self.mean, g, 1 - beta1)
        centred = g - self.mean if group.get("centered_variance") else g
        self.square = torch.addcmul(beta2 * self.square, centred, centred, value=1 - beta2)
        correction1, correction2 = 1 - beta1**self.step, (1 - beta2**self.step) ** 0.5
        # Adam adds eps to the corrected root, ClippedAdam to the uncorrected one. The least number under the root keeps
        # its derivative finite where all gradients have been 0, which then multiply it; a mean square needs no clamp.
        root = (self.square + torch.finfo(self.square.dtype).tiny).sqrt()
        root = root + (group["eps"] if clipped else _like(group["eps"] * correction2, value))
        length = _like(self.lr * correction2 / correction1, value)
        if isinstance(length, Tensor):
            return value - length * (self.mean / root)
        return torch.addcdiv(value, self.mean, root, value=-length)

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "square": self.square}

    def counts(self) -> dict[str, Any]:
        return {"lr": self.lr, "step": self.step}

    def resumed(self, tensors: Mapping[str, Tensor]) -> "_AdamStep":
        new = copy.copy(self)
        new.__dict__.update(tensors)
        return new


def _like(factor: Any, value: Tensor) -> Any:
    """A captured step's factor, a float64, as a parameter of no dimensions takes it: it would become float64 too."""
    return factor.to(value.dtype) if isinstance(factor, Tensor) and value.dim() == 0 else factor


class KeptAdam:
    """The state that ``optim`` keeps for these leaves, as tensors that a captured step reads and writes in place.

    For Adam, AdamW and ClippedAdam alone; for other optimisers :meth:`of` gives None.

    :ivar is_steady: whether a step leaves the rates as they are.
    """

    _WIDTH = 4

    def __init__(self, optim: PyroOptim, leaves: Sequence[Tensor]):
        self._leaves = leaves
        self._kept = [torch_optimizer(optim, leaf) for leaf in leaves]
        self._steps = DifferentiableOptim(optim, leaves)
        self._rates: list[tuple[float, Tensor]] = [(math.nan, torch.zeros(()))] * len(leaves)
        self.is_steady = not any(isinstance(kept, ClippedAdam) for kept in self._kept)

    @classmethod
    def of(cls, optim: PyroOptim, leaves: Sequence[Tensor]) -> "KeptAdam | None":
        return cls(optim, leaves) if all(_is_adam(torch_optimizer(optim, leaf)) for leaf in leaves) else None

    def tensors(self) -> list[Tensor]:
        """Mean, mean square, step count and rate of every leaf, one after the other."""
        found = []
        for i, (leaf, kept) in enumerate(zip(self._leaves, self._kept, strict=True)):
            state, lr = kept.state[leaf], kept.param_groups[0]["lr"]
            if not state:  # as at its own first step
                count = 0 if isinstance(kept, ClippedAdam) else torch.zeros(())
                state.update(step=count, exp_avg=torch.zeros_like(leaf), exp_avg_sq=torch.zeros_like(leaf))
            if self._rates[i][0] != lr:
                self._rates[i] = lr, torch.tensor(lr, dtype=torch.float64)
            count = state["step"]
            count = count if isinstance(count, Tensor) else torch.tensor(float(count))
            found += [state["exp_avg"], state["exp_avg_sq"], count, self._rates[i][1]]
        return found

    def bound(self, tensors: Sequence[Tensor]) -> DifferentiableOptim:
        """Steps from that state, these tensors standing in for :meth:`tensors`."""
        values: dict[Any, Tensor] = {}
        for i in range(len(self._leaves)):
            mean, square, step, lr = tensors[self._WIDTH * i : self._WIDTH * (i + 1)]
            values |= {(i, "mean"): mean, (i, "square"): square, (i, "step"): step.double(), (i, "lr"): lr}
        return self._steps.resumed(values)

    def write(
        self,
        leaves: Sequence[Tensor],
        tensors: Sequence[Tensor],
        gradient: Sequence[Tensor | None],
        allowed: Tensor,
    ) -> None:
        """A step in place, where ``allowed``. Leaves without a gradient stand still."""
        steps = self.bound(tensors)
        values = steps.step(leaves, gradient)
        for i, (leaf, value, g) in enumerate(zip(leaves, values, gradient, strict=True)):
            if g is None:
                continue
            step: Any = steps._steps[i].inner
            old = (leaf, *tensors[self._WIDTH * i : self._WIDTH * i + 3])
            for kept, new in zip(old, (value, step.mean, step.square, step.step), strict=True):
                kept.copy_(torch.where(allowed, new.to(kept.dtype), kept))

    def ticked(self, moved: Sequence[bool]) -> bool:
        """After a step: see to what torch and Pyro keep in Python.

        :returns: whether that changes :meth:`tensors`.
        """
        changed = False
        for leaf, kept, has_moved in zip(self._leaves, self._kept, moved, strict=True):
            if not has_moved:  # as PyroOptim, which is not told of these
                continue
            kept._opt_called = True  # type: ignore[attr-defined]  # a scheduler asks
            if isinstance(kept, ClippedAdam):
                changed = True
                kept.state[leaf]["step"] += 1
                for group in kept.param_groups:
                    group["lr"] *= group["lrd"]
        return changed
