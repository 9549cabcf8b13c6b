"""The rows that a step is about: the user's own where the programs hand them to a plate, else drawn here."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .hosts import Subsample, is_stand_in


class watched(Subsample):
    """A plate's own draw of rows, which tells that it was taken."""

    def __init__(self, plate: Subsample, name: str, drawn: set[str]):
        self.__dict__.update(plate.__dict__)
        self._plate, self._name, self._drawn = plate, name, drawn

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        self._drawn.add(self._name)
        return self._plate.sample(sample_shape)

    __call__ = sample


watched.__name__ = Subsample.__name__  # by which Pyro knows a plate's own site


@dataclass(frozen=True)
class Plate:
    """A plate with rows, as the first run showed it.

    :ivar full_size: how many rows there are.
    :ivar size: how many are taken.
    :ivar handed_by: the programs that hand it its rows, of "guide" and "model"; it draws them by itself if none does.
    :ivar argument: the position of the argument that is those rows, if one is.
    :ivar is_told: whether it is told its rows though it takes all of them.
    """

    name: str
    full_size: int
    size: int
    device: Any
    handed_by: tuple[str, ...] = ()
    argument: int | None = None
    is_told: bool = False

    @property
    def is_handed(self) -> bool:
        """Whether its rows are the user's."""
        return bool(self.handed_by)

    @property
    def takes_all(self) -> bool:
        """Whether it takes all rows in their order, and any number of them."""
        return not self.handed_by and self.size == self.full_size and not self.is_told


class Found(BaseException):
    """All rows that were looked for are known: the program need not run on."""


def plates(guide: Any, model: Any, leaves: Sequence[Any]) -> dict[str, Plate]:
    """The plates that the runs of guide and model have met.

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
        found[name] = Plate(name, met[-1].full_sizes[name], len(rows[-1]), rows[-1].device, by, argument)
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


def agree(name: str, guide_rows: Tensor, model_rows: Tensor) -> None:
    """Check whether model and guide hand the same rows to a plate of one name.

    :raises ValueError: where they do not.
    """
    if guide_rows is not model_rows and not torch.equal(guide_rows, model_rows):
        raise ValueError(
            f"Plate '{name}' is handed the rows {_shown(guide_rows)} in the guide and {_shown(model_rows)} in the "
            "model. Both are about the same rows of the data: hand both the same, say as an argument of the step."
        )


def require(plate: Plate, rows: Tensor | None) -> None:
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


def require_indices(name: str, full_size: int, rows: Tensor) -> None:
    """Check whether rows are indices of a plate.

    :param full_size: how many rows the plate has.
    :raises ValueError: where they are not integers in one dimension, or where the plate has no such row.
    """
    if rows.dim() != 1 or rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool:
        raise ValueError(
            f"Plate '{name}' is handed rows of shape {tuple(rows.shape)} and {rows.dtype}. Rows are the numbers of "
            "rows of the data: integers in one dimension."
        )
    if is_stand_in(rows):  # while a step is captured
        return
    outside = (rows < -full_size) | (rows >= full_size)
    if bool(outside.any()):
        raise ValueError(f"Plate '{name}' of {full_size} rows is handed row {int(rows[outside][0])}.")


def _shown(rows: Tensor) -> str:
    return str(rows[:5].tolist()).replace("]", ", ...]" if len(rows) > 5 else "]")


def draw_plate(plate: Plate) -> Tensor:
    """The rows of a step, where a plate draws them."""
    if plate.size == plate.full_size:
        return torch.arange(plate.size, device=plate.device)
    return draw_rows(plate.full_size, plate.size, plate.device)


def draw_rows(full_size: int, size: int, device: Any) -> Tensor:
    """Rows without replacement, every sequence of them as likely.

    Pyro's own plate shuffles all ``full_size`` indices, which at 50,000 takes longer than a small model's step. Here
    rows are drawn until so many are distinct; each stands where it came first.
    """
    if 8 * size > full_size:  # too many would be drawn twice
        return Subsample(full_size, size, device=device).sample()
    rows = torch.randint(full_size, (size,), device=device)
    while len(distinct := dict.fromkeys(rows.tolist())) < size:
        more = torch.randint(full_size, (size - len(distinct),), device=device)
        rows = torch.cat([torch.tensor(list(distinct), device=device), more])
    return rows
