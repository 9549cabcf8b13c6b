"""A ``PyroOptim``'s own step as a differentiable function of parameters and gradients.

Unrolling differentiates the *user's* inner optimiser: its per-parameter settings, clipping, schedules
and current state. ``torch.optim`` can do it (``differentiable=True``); three of its corners are mended here,
and Adam has a shorter step of its own.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .host import clip_settings, group_settings, is_adam, torch_optimizer


def _root(x: Tensor) -> Tensor:
    """√x with derivative 0 at 0. Adam divides by √(mean g²): at a gradient of exactly 0 torch gives 0·∞ = NaN."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()


class _ZeroSafeRoot(TorchFunctionMode):
    """Inside this context every square root is :func:`_root`."""

    _roots = frozenset({torch.sqrt, Tensor.sqrt})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._roots or func is Tensor.sqrt_:
            (x,) = args
            # the root in place is taken of a copy: the clamp's derivative reads its argument
            return _root(x) if func is not Tensor.sqrt_ else x.copy_(_root(x.clone()))
        return func(*args, **(kwargs or {}))


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
        self.clip = clip_settings(optim, leaf)
        group, state = group_settings(kept), dict(kept.state.get(leaf, {}))
        self.inner = _AdamStep(leaf, group, state) if is_adam(kept) else _TorchStep(kept, group, state)

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
        group |= {key: False for key in ("foreach", "unroll_factor", "capturable") if key in group}
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
            moved: Tensor = value - length * (self.mean / root)
            return moved
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
