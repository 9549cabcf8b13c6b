"""The rows that a step is about: the user's own where the programs hand them to a plate, else drawn here."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class Plate:
    """A plate with rows, as the first run showed it.

    :ivar full_size: how many rows there are.
    :ivar size: how many are taken.
    :ivar handed_by: the programs that hand it its rows, of "guide" and "model"; it draws them by itself if none does.
    :ivar argument: the position of the argument that is those rows, if one is.
    """

    name: str
    full_size: int
    size: int
    handed_by: tuple[str, ...] = ()
    argument: int | None = None

    @property
    def is_handed(self) -> bool:
        """Whether its rows are the user's."""
        return bool(self.handed_by)


class Found(BaseException):
    """All rows that were looked for are known: the program need not run on."""


def plates(guide: Any, model: Any, leaves: Sequence[Any]) -> dict[str, Plate]:
    """The plates of which the runs of guide and model have met a part of the rows, or rows in an order of their own.

    :raises ValueError: where both hand rows to a plate and they differ, or where rows are no indices.
    """
    found: dict[str, Plate] = {}
    runs = {"guide": guide, "model": model}
    for name in {**guide.subsamples, **model.subsamples}:
        by = tuple(role for role, run in runs.items() if name in run.handed)
        met = [runs[role] for role in by or runs if name in runs[role].subsamples]
        rows = [run.subsamples[name] for run in met]
        argument = None
        if by:
            agree(name, rows[0], rows[-1])
            argument = next((i for i, leaf in enumerate(leaves) if all(leaf is r for r in rows)), None)
        full_size, size = met[-1].plates[name]
        found[name] = Plate(name, full_size, size, by, argument)
        if by:
            require(found[name], rows[-1])
    return found


def explain(error: Exception, sizes: Mapping[str, tuple[int, int]], leaves: Sequence[Any]) -> None:
    """Say more of an error of the programs' first run, where it is one of a plate's size.

    :param sizes: of the plates met, how many rows each has and takes.
    :raises ValueError: where the error is about a plate's rows and an argument's, and these are of another number.
    """
    numbers = set(re.findall(r"\d+", str(error)))
    given = {n for leaf in leaves for n in getattr(leaf, "shape", ()) if str(n) in numbers}
    for name, (size, taken) in sizes.items():
        if size == taken and str(size) in numbers and size not in given and given:
            raise ValueError(
                f"Plate '{name}' has {size} rows, whatever data it is given, and the arguments are of {max(given)} "
                f"({error}). Let it have as many as the data: plate('{name}', len(v)), in model and guide."
            ) from error


def are_all(rows: Array, full_size: int) -> bool:
    """Whether these are all rows as they stand; no, where they have no numbers yet."""
    return not isinstance(rows, jax.core.Tracer) and np.array_equal(rows, np.arange(full_size))


def are_distinct(rows: Array) -> bool:
    """Whether no row stands twice, as far as can be told."""
    return isinstance(rows, jax.core.Tracer) or len(np.unique(np.asarray(rows))) == len(rows)


def repeated(rows: Array) -> Array:
    """Which rows stand more than once."""
    ordered = jnp.sort(rows)
    first, last = jnp.searchsorted(ordered, rows), jnp.searchsorted(ordered, rows, side="right")
    return last - first > 1


def agree(name: str, guide_rows: Array, model_rows: Array) -> None:
    """Check whether model and guide hand the same rows to a plate of one name.

    :raises ValueError: where they do not.
    """
    if guide_rows is model_rows or any(isinstance(rows, jax.core.Tracer) for rows in (guide_rows, model_rows)):
        return
    if not np.array_equal(guide_rows, model_rows):
        raise ValueError(
            f"Plate '{name}' is handed the rows {_shown(guide_rows)} in the guide and {_shown(model_rows)} in the "
            "model. Both are about the same rows of the data: hand both the same, say as an argument of the step."
        )


def require(plate: Plate, rows: Array | None) -> None:
    """Check whether the rows handed to a plate are indices of it, and as many as at the first run.

    :raises ValueError: where they are not, or where there are none.
    """
    if rows is None:
        raise ValueError(f"Plate '{plate.name}' was handed its rows when the programs first ran, and is not any more.")
    require_indices(plate.name, plate.full_size, rows)
    if len(rows) != plate.size:
        raise ValueError(
            f"Plate '{plate.name}' is handed {len(rows)} rows, and was handed {plate.size} before, on arguments of the "
            "same shapes. Pass the rows as an argument of the step: their number may change then."
        )


def require_indices(name: str, full_size: int, rows: Array) -> None:
    """Check whether rows are indices of a plate.

    :param full_size: how many rows the plate has.
    :raises ValueError: where they are not integers in one dimension, or where the plate has no such row.
    """
    if rows.ndim != 1 or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(
            f"Plate '{name}' is handed rows of shape {rows.shape} and {rows.dtype}. Rows are the numbers of rows of "
            "the data: integers in one dimension."
        )
    if isinstance(rows, jax.core.Tracer):
        return
    numbers = np.asarray(rows)
    outside = numbers[(numbers < -full_size) | (numbers >= full_size)]
    if len(outside):
        raise ValueError(f"Plate '{name}' of {full_size} rows is handed row {outside[0]}.")


def _shown(rows: Array) -> str:
    return str(np.asarray(rows)[:5].tolist()).replace("]", ", ...]" if len(rows) > 5 else "]")


def draw_rows(rng_key: Array, full_size: int, size: int) -> Array:
    """Rows without replacement, every set of them as likely; in order.

    NumPyro's own plate shuffles all ``full_size`` indices, which at 50,000 takes longer than a small model's step. Here
    rows that were drawn twice are drawn again, until none are: no row is told from another, so neither are the sets.
    """
    if 8 * size > full_size:  # too many would be drawn twice
        return jnp.sort(jax.random.permutation(rng_key, full_size)[:size])

    def draw(key: Array) -> Array:
        return jax.random.randint(key, (size,), 0, full_size)

    def twice(rows: Array) -> Array:
        return jnp.concatenate([jnp.zeros(1, bool), rows[1:] == rows[:-1]])

    def again(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        key, rows = carry
        key, key_rows = jax.random.split(key)
        return key, jnp.sort(jnp.where(twice(rows), draw(key_rows), rows))

    rng_key, key_rows = jax.random.split(rng_key)
    return jax.lax.while_loop(lambda c: twice(c[1]).any(), again, (rng_key, jnp.sort(draw(key_rows))))[1]
