"""The host's global modes that this package's functions need, whatever modes the caller is in."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import jax

Function = TypeVar("Function", bound=Callable[..., Any])


def in_own_modes(function: Function) -> Function:
    """A function that broadcasts, promotes types and makes constants, as its host does, in JAX's strict modes too."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with (
            jax.numpy_rank_promotion("allow"),
            jax.numpy_dtype_promotion("standard"),
            jax.transfer_guard("allow"),
        ):
            return function(*args, **kwargs)

    return cast(Function, run)
