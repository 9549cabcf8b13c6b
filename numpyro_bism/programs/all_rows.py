"""Evaluation takes all rows given: a plate that draws some of the data while training takes all of it, in order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.primitives import Messenger

from .pair import ModelAndGuide
from .rows import Plate
from .visible import flatten


def with_all_rows(pair: ModelAndGuide, leaves: Sequence[Any]) -> ModelAndGuide:
    """The pair whose plates take every row of the data in these arguments, however many: none is drawn.

    A plate's full size follows the data too, and its N/B is 1. Rows that a program hands to a plate are left to it.
    """
    names = drawn(pair)
    if not names:
        return pair
    first = next(site for site in pair.sites if site.plate in names)
    n = leaves[first.leaves[0]].shape[first.axis]
    places = {site.plate: (site.leaves[0], site.axis) for site in pair.sites if site.plate in names}
    sites = [replace(s, shape=(n, *s.shape[1:])) if s.plate in names else s for s in pair.sites]
    return replace(
        pair,
        model=_taking_all(pair.model, places),
        guide=_taking_all(pair.guide, places),
        sites=tuple(sites),
        subsampled={**pair.subsampled, **{name: _whole(pair.subsampled[name], n) for name in names}},
        num_data=n,
        trained_rows=pair.num_data,
    )


def _whole(plate: Plate, n: int) -> Plate:
    """A plate of which all rows are drawn: in order."""
    return replace(plate, full_size=n, size=n)


def drawn(pair: ModelAndGuide) -> set[str]:
    """The plates that draw rows of the visible data by themselves."""
    names = {site.plate for site in pair.sites if site.plate is not None}
    return {name for name in names if not pair.subsampled[name].is_handed}


def require_no_local(pair: ModelAndGuide, phi: Mapping[str, Any]) -> None:
    """Check, of data with another number of rows than the training data, that the guide has no parameters by row.

    :raises ValueError: where it has.
    """
    if pair.trained_rows in (None, pair.num_data):
        return
    for name, leaf in phi.items():
        if any(jnp.shape(x)[:1] == (pair.trained_rows,) for x in jax.tree.leaves(leaf)):
            raise ValueError(
                f"Guide parameter '{name}' has {pair.trained_rows} rows, one for every row of the training data, and "
                f"the data given have {pair.num_data}: which belongs to which can't be told. Evaluate on the training "
                "data, or compute the guide's parameters from the data."
            )


class _AllRows(Messenger):
    """Gives plates that would draw rows all of them, of so many as there are."""

    def __init__(self, sizes: Mapping[str, int]):
        super().__init__()
        self._sizes = sizes

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "plate" and msg["name"] in self._sizes and msg["value"] is None:
            n = self._sizes[msg["name"]]
            # the full size stays: densities divide N/n out again
            msg["args"], msg["value"] = (msg["args"][0], n), jnp.arange(n)
        elif msg["type"] == "subsample" and set(self._sizes.values()) & set(jnp.shape(msg["value"])):
            msg["kwargs"]["event_dim"] = None  # these are all: there is nothing to take


def _taking_all(program: Callable[..., Any], places: Mapping[str, tuple[int, int]]) -> Callable[..., Any]:
    """The program whose plates of these names take all rows of the data in its arguments.

    :param places: by plate, the leaf of the arguments that holds the data, and its axis.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, _ = flatten(args, kwargs)
        with _AllRows({name: leaves[i].shape[axis] for name, (i, axis) in places.items()}):
            return program(*args, **kwargs)

    return run
