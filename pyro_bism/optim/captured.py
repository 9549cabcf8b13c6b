"""What of an optimiser's step a captured graph takes itself."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor

from .host import clip_settings, is_adam, say_stepped, torch_optimizer
from .steps import DifferentiableOptim


class FrozenSettings:
    """What a captured step has as constants. Adam's rate is none: it is an input."""

    def __init__(self, optim: PyroOptim, leaves: Sequence[Tensor]):
        self._optim, self._leaves = optim, leaves
        self._found = []
        for leaf in leaves:
            kept = torch_optimizer(optim, leaf)
            free = ("lr", "initial_lr", "params") if is_adam(kept) else ("params",)
            whole = dict(kept.param_groups[0])
            group = {k: v for k, v in whole.items() if k not in free}
            self._found.append((kept, whole, group, clip_settings(optim, leaf)))

    def are_current(self) -> bool:
        for leaf, (kept, whole, group, clip) in zip(self._leaves, self._found, strict=True):
            now = torch_optimizer(self._optim, leaf)
            if now is not kept or clip_settings(self._optim, leaf) != clip:
                return False
            values = now.param_groups[0]
            # the whole first: one comparison is all it takes while no schedule moves the rate
            if values != whole and any(values.get(k, math.nan) != v for k, v in group.items()):
                return False
        return True


class AdamTensors:
    """The state that ``optim`` keeps for these leaves, as tensors that a captured step reads and writes in place.

    For Adam, AdamW and ClippedAdam alone; for other optimisers :meth:`from_optim` gives None.

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
    def from_optim(cls, optim: PyroOptim, leaves: Sequence[Tensor]) -> "AdamTensors | None":
        return cls(optim, leaves) if all(is_adam(torch_optimizer(optim, leaf)) for leaf in leaves) else None

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

    def steps_on(self, tensors: Sequence[Tensor]) -> DifferentiableOptim:
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
        steps = self.steps_on(tensors)
        values = steps.step(leaves, gradient)
        for i, (leaf, value, g) in enumerate(zip(leaves, values, gradient, strict=True)):
            if g is None:
                continue
            step: Any = steps._steps[i].inner
            old = (leaf, *tensors[self._WIDTH * i : self._WIDTH * i + 3])
            for kept, new in zip(old, (value, step.mean, step.square, step.step), strict=True):
                kept.copy_(torch.where(allowed, new.to(kept.dtype), kept))

    def after_step(self, moved: Sequence[bool]) -> bool:
        """After a step: see to what torch and Pyro keep in Python.

        :returns: whether that changes :meth:`tensors`.
        """
        changed = False
        for leaf, kept, has_moved in zip(self._leaves, self._kept, moved, strict=True):
            if not has_moved:  # as PyroOptim, which is not told of these
                continue
            say_stepped(kept)
            if isinstance(kept, ClippedAdam):
                changed = True
                kept.state[leaf]["step"] += 1
                for group in kept.param_groups:
                    group["lr"] *= group["lrd"]
        return changed
