"""The host's global modes that this package's functions need, whatever modes the caller is in."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def in_own_modes(function: Function) -> Function:
    """A function that takes gradients, and so turns them on under ``torch.no_grad`` and ``torch.inference_mode``."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)

    return cast(Function, run)
