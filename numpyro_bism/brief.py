"""How results that hold arrays, and arguments in messages, are put into a few words."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

MAX_SHOWN = 4  # entries of an array that are printed one by one
MAX_LENGTH = 60  # characters of anything else


def brief(result: Any) -> str:
    """One named tuple or dataclass in a few lines, whatever the size of its arrays."""
    names = getattr(result, "_fields", None) or [f.name for f in dataclasses.fields(result)]
    parts = [f"{name}={_shown(getattr(result, name))}" for name in names]
    return f"{type(result).__name__}({', '.join(parts)})"


def named(thing: Any) -> str:
    """What a message calls an argument: its type, or that it is a class where an instance is wanted."""
    return f"the class {thing.__name__} itself" if isinstance(thing, type) else type(thing).__name__


def lacking(thing: Any, protocol: type) -> list[str]:
    """What a Protocol names that the thing has not."""
    return [name for name in vars(protocol) if not name.startswith("_") and not hasattr(thing, name)]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        text = repr(value)
        return text if len(text) <= MAX_LENGTH else f"<{type(value).__name__}>"
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.size <= MAX_SHOWN or array.dtype.kind not in "biuf":
        return np.array2string(array, precision=6, threshold=MAX_SHOWN)
    return f"<{' x '.join(map(str, array.shape))} from {array.min():.6g} to {array.max():.6g}>"
