"""The host's global modes that this package's functions need, whatever modes the caller is in."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp

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


def on_numbers() -> AbstractContextManager[None]:
    """The context in which what is computed of numbers is a number, though a function is being traced around it.

    Outside of a trace it is none: ``jax.ensure_compile_time_eval`` would evaluate every constant of a program that is
    traced inside of it by itself, each operation compiled for that.
    """
    is_traced = isinstance(jnp.zeros(()), jax.core.Tracer)
    return jax.ensure_compile_time_eval() if is_traced else nullcontext()
