"""What of Pyro looks at the values of tensors, and runs without that look while a step is recorded.

Pyro's own ``JitTrace_ELBO`` is no way around it: it traces with ``torch.jit``, whose graphs torch's compiler does not
take, and has no second derivatives. So three of Pyro's functions have stand-ins for the time of a recording: its checks
for NaN and infinity, which warn of a loss and don't change it, and the expectation of ``TraceEnum_ELBO``.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pyro
import pyro.util
import torch
from pyro.infer.util import Dice
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _WithoutValues(TorchFunctionMode):
    """Inside, what Pyro's ELBOs do with the values of tensors has a form that does not depend on them.

    ``x.item()`` is x itself, a scalar without a graph: the ELBOs take a detached value so. Where Dice leaves out
    entries of probability 0, they count as 0 there.

    :ivar in_dice: whether an expectation of ``TraceEnum_ELBO`` is being taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_dice = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.item:
            return args[0].detach()
        if self.in_dice and func is Tensor.all:
            return False
        if self.in_dice and func is Tensor.masked_select:
            return torch.where(args[1], args[0], 0.0)
        return func(*args, **(kwargs or {}))

    def expecting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that says of itself when it runs."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            before, self.in_dice = self.in_dice, True
            try:
                return function(*args, **kwargs)
            finally:
                self.in_dice = before

        return run


@contextmanager
def _standing_in(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    own = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, own)


@contextmanager
def recording() -> Iterator[None]:
    """Without the host's checks, which look at values: NaN is looked for in what the graph returns."""
    mode = _WithoutValues()
    with (
        pyro.validation_enabled(False),
        _standing_in(pyro.util, "torch_isnan", lambda _: False),
        _standing_in(pyro.util, "torch_isinf", lambda _: False),
        _standing_in(Dice, "compute_expectation", mode.expecting(Dice.compute_expectation)),
        mode,
    ):
        yield
