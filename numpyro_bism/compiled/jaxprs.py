"""Reading a traced program, operation by operation."""

from collections.abc import Callable
from typing import Any

from jax.extend import core


def bind(eqn: Any, inputs: Any) -> list[Any]:
    """The outputs of a recorded operation on ``inputs``."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    # an older JAX returns functions among the parameters apart
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return outputs if eqn.primitive.multiple_results else [outputs]


def value_of(values: dict[Any, Any], var: Any) -> Any:
    return var.val if isinstance(var, core.Literal) else values[var]


def evaluate(eqns: list[Any], values: dict[Any, Any], bind: Callable[..., list[Any]] = bind) -> dict[Any, Any]:
    for eqn in eqns:
        values.update(zip(eqn.outvars, bind(eqn, [value_of(values, v) for v in eqn.invars]), strict=True))
    return values


def subprograms(eqn: Any) -> dict[str, tuple[Any, ...]]:
    """The programs that an operation runs, by parameter: a loop's body, the branches of a condition."""
    several = {name: x if isinstance(x, list | tuple) else (x,) for name, x in eqn.params.items()}
    found = {name: tuple(y for y in x if isinstance(y, core.ClosedJaxpr | core.Jaxpr)) for name, x in several.items()}
    return {name: programs for name, programs in found.items() if programs}
