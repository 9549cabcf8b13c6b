"""What a method is given, checked when it is made."""

from typing import Any


def require_guide(guide: Any) -> None:
    """Checks that the guide is a program; without one the model's latents would be drawn from nowhere.

    :raises ValueError: where it is none.
    """
    if not callable(guide):
        raise ValueError(
            f"guide={guide!r} is not a program. Write q(h|v) as one; for a model without latents pass "
            "lambda *args: None."
        )
