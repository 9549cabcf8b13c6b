"""What a method is given, checked when it is made."""

from typing import Any

from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler

from ..optim.host import Leading, unused_copy


def require_optim(optim: Any, name: str) -> None:
    """Checks that an optimiser is one of Pyro's.

    :param optim: the argument as the user gave it.
    :param name: the argument's name, for the message.
    :raises ValueError: where it is none.
    """
    if not isinstance(optim, PyroOptim):
        raise ValueError(
            f"{name} should be an instance of pyro.optim.PyroOptim, such as "
            f"pyro.optim.Adam({{'lr': 1e-3}}); got {type(optim).__name__}."
        )


def require_guide(guide: Any) -> None:
    """Checks that the guide is a program; without one the model's latents would be drawn from nowhere.

    :raises ValueError: where it is none.
    """
    if not callable(guide):
        raise ValueError(
            f"guide={guide!r} is not a program. Write q(h|v) as one; for a model without latents pass "
            "lambda *args: None."
        )


def same_settings(optim: PyroOptim) -> PyroOptim:
    """A new optimiser of the same settings, without the state and the parameters of the old one.

    Where the old one is a scheduler, the new one follows it: ``optim.step()`` moves the rates of both.
    """
    new = unused_copy(optim)
    if isinstance(optim, PyroLRScheduler):
        vars(new)["step"] = _follows
        vars(optim)["step"] = Leading(optim, new)
    return new


def _follows(*args: Any, **kwargs: Any) -> None:
    """The step of a scheduler that follows another: it has been taken with the other's."""
