"""Evaluation takes all rows given: a plate that draws some of the data while training takes all of it, in order."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pyro.poutine.subsample_messenger import SubsampleMessenger

from .pair import ModelAndGuide
from .rows import Plate
from .visible import flatten


def with_all_rows(pair: ModelAndGuide, leaves: Sequence[Any]) -> ModelAndGuide:
    """The pair whose plates take every row of the data in these arguments, however many: none is drawn.

    A plate's full size follows the data too, and its N/B is 1. Rows that a program hands to a plate are left to it.

    :raises ValueError: for data of another number of rows than the guide keeps parameters for.
    """
    names = drawn(pair)
    if not names:
        return pair
    first = next(site for site in pair.sites if site.plate in names)
    n = leaves[first.leaves[0]].shape[first.axis]
    places = {site.plate: (site.leaves[0], site.axis) for site in pair.sites if site.plate in names}
    sites = [replace(s, shape=(n, *s.shape[1:])) if s.plate in names else s for s in pair.sites]
    found = replace(
        pair,
        model=_taking_all(pair.model, places),
        guide=_taking_all(pair.guide, places),
        sites=tuple(sites),
        # told to the plate though they are all: the visible sites are read by them
        subsamples={**pair.subsamples, **{name: _whole(pair.subsamples[name], n) for name in names}},
        num_data=n,
    )
    _require_no_local(found, pair.num_data)
    return found


def of_any_size(program: Callable[..., Any], names: Collection[str]) -> Callable[..., Any]:
    """The program whose plates of these names take the rows that a handler gives them, however many."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with _all_rows(dict.fromkeys(names)):
            return program(*args, **kwargs)

    return run


def _whole(plate: Plate, n: int) -> Plate:
    """A plate of which all rows are told, in order: the visible sites are read by them."""
    return replace(plate, full_size=n, size=n, is_told=True)


def drawn(pair: ModelAndGuide) -> set[str]:
    """The plates that draw rows of the visible data by themselves."""
    names = {site.plate for site in pair.sites if site.plate is not None}
    return {name for name in names if not pair.subsamples[name].is_handed}


def _require_no_local(pair: ModelAndGuide, trained_rows: int) -> None:
    if trained_rows == pair.num_data:
        return
    for name, leaf in pair.phi.items():
        if leaf.shape[:1] == (trained_rows,):
            raise ValueError(
                f"Guide parameter '{name}' has {trained_rows} rows, one for every row of the training data, and the "
                f"data given have {pair.num_data}: which belongs to which can't be told. Evaluate on the training "
                "data, or compute the guide's parameters from the data."
            )


@contextmanager
def _all_rows(sizes: Mapping[str, int | None]) -> Iterator[None]:
    """Gives plates that would draw rows all of them, of so many as there are; None is as many as they say.

    A plate sends its size out before any handler may change it, so its own look-up is replaced meanwhile.
    """
    look_up = SubsampleMessenger._subsample

    def all_rows(
        name: str,
        size: int | None = None,
        subsample_size: int | None = None,
        subsample: Any = None,
        use_cuda: bool | None = None,
        device: Any = None,
    ) -> Any:
        if name in sizes and subsample is None:
            size, subsample_size = sizes[name] or size, None
        return look_up(name, size, subsample_size, subsample, use_cuda, device)

    SubsampleMessenger._subsample = staticmethod(all_rows)  # type: ignore[method-assign]
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(look_up)  # type: ignore[method-assign]


def _taking_all(program: Callable[..., Any], places: Mapping[str, tuple[int, int]]) -> Callable[..., Any]:
    """The program whose plates of these names take all rows of the data in its arguments.

    :param places: by plate, the leaf of the arguments that holds the data, and its axis.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, _ = flatten((args, kwargs))
        with _all_rows({name: leaves[i].shape[axis] for name, (i, axis) in places.items()}):
            return program(*args, **kwargs)

    return run
