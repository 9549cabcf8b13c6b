"""The optimisers that users pass, and the steps that NumPyro takes with them."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.example_libraries import optimizers
from numpyro.optim import Minimize, _NumPyroOptim, optax_to_numpyro


def as_optim(optim: Any, name: str) -> _NumPyroOptim:
    """An optimiser in NumPyro's form, from any of the three kinds that SVI takes.

    :raises ValueError: for anything else, and for ``Minimize``, which takes no single steps.
    """
    if isinstance(optim, Minimize):
        raise ValueError(
            f"{name}=Minimize() solves a whole problem at once and can't be stepped or unrolled. Use "
            "numpyro.optim.Adam or another stochastic optimiser."
        )
    if isinstance(optim, _NumPyroOptim):
        return optim
    if isinstance(optim, optimizers.Optimizer):
        return _NumPyroOptim(lambda *args: args, *optim)
    # optax's transformations are named tuples of two functions; optax itself need not be installed
    if isinstance(optim, tuple) and hasattr(optim, "init") and hasattr(optim, "update"):
        return optax_to_numpyro(optim)
    raise ValueError(
        f"{name} should be an optimiser of numpyro.optim, jax.example_libraries.optimizers or optax, such as "
        f"numpyro.optim.Adam(1e-3); got {type(optim).__name__}."
    )


def inner_copy(optim: _NumPyroOptim, num_inner_steps: int, name: str) -> _NumPyroOptim:
    """``optim``'s settings for the inner level, its schedules at the outer level's pace, which takes one step in K.

    optax's schedules keep a count of their own, which is told in outer steps. Those of the other kinds read the step
    count that Adam corrects its means by as well, so that they can't be slowed alone.

    :param name: the argument that was not given, for the warning.
    """
    if num_inner_steps < 2:
        return optim
    if _has_schedule(optim.update_fn):
        warnings.warn(
            f"optim has a schedule, which counts its own steps: the inner level takes {num_inner_steps} of them for "
            f"one of the outer, and goes through the schedule {num_inner_steps} times as fast. Pass {name}=, the same "
            f"optimiser with lambda i: schedule(i // {num_inner_steps}), or an optax one, whose schedules keep pace.",
            UserWarning,
            stacklevel=4,
        )

    def update(step: Any, gradient: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        counts = _counts(state)
        outer = [count // num_inner_steps for count in counts]
        state = optim.update_fn(step, gradient, _with_counts(state, iter(outer)), *args, **kwargs)
        moved = [count + now - then for count, now, then in zip(counts, _counts(state), outer, strict=True)]
        return _with_counts(state, iter(moved))

    new = copy.copy(optim)
    new.update_fn = update
    return new


_COUNTED = ("ScaleByScheduleState", "WrappedScheduleState", "InjectHyperparamsState", "InjectStatefulHyperparamsState")


def _counts(state: Any) -> list[Any]:
    """How far optax's schedules in an optimiser's state have come."""
    if isinstance(state, dict):
        return [count for child in state.values() for count in _counts(child)]
    if not isinstance(state, list | tuple):
        return []
    fields: Any = state
    mine = [fields.count] if type(state).__name__ in _COUNTED else []
    return [*mine, *(count for child in state for count in _counts(child))]


def _with_counts(state: Any, counts: Iterator[Array]) -> Any:
    """The same state with these counts, in the order of :func:`_counts`."""
    if isinstance(state, dict):
        return type(state)({key: _with_counts(child, counts) for key, child in state.items()})
    if not isinstance(state, list | tuple):
        return state
    if type(state).__name__ in _COUNTED:
        state = state._replace(count=next(counts))  # type: ignore[union-attr]
    children = [_with_counts(child, counts) for child in state]
    return type(state)(*children) if hasattr(state, "_fields") else type(state)(children)


def _has_schedule(update: Any) -> bool:
    """Whether an optimiser of jax.example_libraries has a step size that is a function of the step."""
    closed_over = getattr(update, "__closure__", None) or ()
    names = getattr(getattr(update, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, closed_over, strict=True):
        value = cell.cell_contents
        if name == "step_size" and callable(value):
            return not value.__qualname__.startswith(optimizers.constant.__qualname__)
        if callable(value) and _has_schedule(value):
            return True
    return False


def require_single_steps(optim: _NumPyroOptim, params: Any, name: str) -> None:
    """Checks that an optimiser takes single steps, by gradients and the loss; line searches and L-BFGS want more.

    :raises ValueError: where it does not.
    """
    try:
        jax.eval_shape(lambda p: optim.update(p, optim.init(p), value=jnp.zeros(())), params)
    except TypeError as error:
        raise ValueError(
            f"{name} can't be stepped with a gradient and a loss alone ({error}). Line searches and L-BFGS "
            "evaluate the loss again and again, on other noise each time; use a stochastic optimiser."
        ) from error
