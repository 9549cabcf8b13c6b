"""A program's sample statements as they ran, and their log densities by example."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions.distribution import Unit
from numpyro.distributions.util import scale_and_mask
from numpyro.handlers import seed
from numpyro.primitives import Messenger

from ..distributions import base_of, discretized, relaxed, unmasked
from . import rows, visible


@dataclass
class SiteRecord:
    """One sample statement, as it ran.

    :ivar plates: (full size, size) of every plate met, by name.
    """

    name: str
    fn: Any
    value: Any
    scale: Any
    frames: Sequence[Any]
    is_observed: bool
    infer: Mapping[str, Any]
    plates: Mapping[str, tuple[int, int]]
    subsamples: Mapping[str, Array]
    handed: Collection[str] = ()

    @property
    def is_data(self) -> bool:
        """Observed by the user: not a factor."""
        return self.is_observed and not isinstance(base_of(self.fn), Unit)

    @property
    def is_delta(self) -> bool:
        return isinstance(base_of(self.fn), dist.Delta)

    def log_prob(self) -> Array:
        """log density with the user's scale and mask, without a subsampling plate's N/B."""
        scale = self.scale
        for frame in self.frames:
            full_size, size = self.plates[frame.name]
            if size != full_size:
                scale = scale * (size / full_size)
        log_prob: Array = scale_and_mask(self.fn.log_prob(self.value), scale)
        return log_prob

    def log_q(self) -> Array:
        """log q of the value: how often it is drawn, which neither a scale nor a mask of the density changes."""
        log_prob: Array = unmasked(self.fn).log_prob(self.value)
        return log_prob


class record(Messenger):
    """Runs a program with its parameters and some of its sites given, and keeps its sample statements.

    A value in ``values`` stands in for a latent site's draw, or for a plate's rows, however it comes by them: all
    passes of a step are about the same. A site in ``relaxed_sites`` is scored as its relaxation. Sites marked for
    enumeration get their whole support, in a dimension of their own left of all plates, when ``enumerate_from`` says
    how many dimensions the plates take.

    :ivar subsamples: the rows of the plates that take not all, or take them in another order; ``handed`` names those
        that were handed theirs by the program.
    """

    def __init__(
        self,
        params: Mapping[str, Any],
        values: Mapping[str, Array] | None = None,
        relaxed_sites: frozenset[str] = frozenset(),
        enumerate_from: int | None = None,
        discretize: bool = False,
        keys: Sequence[Array] = (),
        offered: Mapping[str, Array] | None = None,
        sought: Collection[str] = (),
    ):
        """What the run is given, and how far it goes.

        :param offered: rows for plates that would draw them by themselves, or take all.
        :param sought: plates; the program is left as soon as the rows of all are known.
        """
        super().__init__()
        self.offered = offered or {}
        self.sought = set(sought)
        self.handed: set[str] = set()
        self._drawn: set[str] = set()
        self.given = params
        self.values = values or {}
        self.relaxed_sites = relaxed_sites
        self.enumerate_from = enumerate_from
        self.discretize = discretize
        self.given_keys = iter(keys)
        self.keys: list[Array] = []
        self.sites: dict[str, SiteRecord] = {}
        self.params: dict[str, Any] = {}
        self.mutable: dict[str, Any] = {}
        self.plates: dict[str, tuple[int, int]] = {}
        self.subsamples: dict[str, Array] = {}
        self.num_enumerated = 0

    def __enter__(self) -> "record":
        super().__enter__()
        return self

    def process_message(self, msg: Any) -> None:
        kind, name = msg["type"], msg.get("name")
        if kind == "control_flow":
            raise ValueError(
                "BiSM can't look into numpyro's scan and cond. Write the loop in Python, or use jax.lax.scan inside "
                "one factor."
            )
        if kind == "param" and name in self.given:
            msg["value"] = self.given[name]
        elif kind == "mutable" and name in self.given:
            # rebuilt at every level, for modules write their new state into it
            msg["value"] = jax.tree.map(lambda x: x, self.given[name])
        elif kind == "plate":
            self._rows(name, msg)
        elif kind == "subsample" and isinstance(msg["value"], visible.Rows):
            # picked already: the plate has nothing left to take
            msg["value"], msg["kwargs"]["event_dim"] = msg["value"].values, None
        elif kind == "prng_key" and msg["value"] is None:
            msg["value"] = next(self.given_keys, None)
        elif kind == "sample":
            self._sample(name, msg)

    def _rows(self, name: str, msg: Any) -> None:
        if name in self.values:
            msg["value"] = self.values[name]
            msg["args"] = msg["args"][0], len(msg["value"])  # not as many as it says: see Energy.free
        elif name in self.offered and (msg["value"] is None or rows.are_all(msg["value"], msg["args"][0])):
            msg["value"] = self.offered[name]
            self._drawn.add(name)
        elif msg["value"] is None:
            draw = msg["fn"]

            def drawn(*args: Any, **kwargs: Any) -> Any:  # unless a handler further out hands rows over
                self._drawn.add(name)
                return draw(*args, **kwargs)

            msg["fn"] = drawn

    def _keep_rows(self, name: str, msg: Any) -> None:
        size, taken = msg["args"][0], len(msg["value"])
        self.plates[name] = size, taken
        own = name in self._drawn or name in self.values
        if not own and not rows.are_all(msg["value"], size):
            rows.require_indices(name, size, msg["value"])
            self.handed.add(name)
        if taken != size or name in self.handed or name in self.offered:
            self.subsamples[name] = msg["value"]
        if self.sought and self.sought <= self.plates.keys():
            raise rows.Found

    def _sample(self, name: str, msg: Any) -> None:
        if name in self.relaxed_sites:
            msg["fn"] = relaxed(msg["fn"])
        if self.discretize:
            msg["fn"] = discretized(msg["fn"])
        if msg["is_observed"] or msg["value"] is not None:
            return
        if name in self.values:
            msg["value"] = self.values[name]
        elif self.enumerate_from is not None and is_enumerated(msg["infer"]):
            self.num_enumerated += 1
            support = msg["fn"].enumerate_support(expand=False)
            batch_dims = support.ndim - 1 - msg["fn"].event_dim
            ones = self.enumerate_from + self.num_enumerated - 1 - batch_dims
            msg["value"] = support.reshape(support.shape[:1] + (1,) * ones + support.shape[1:])

    def postprocess_message(self, msg: Any) -> None:
        kind, name = msg["type"], msg.get("name")
        if kind == "plate":
            self._keep_rows(name, msg)
        elif kind == "param" and msg["value"] is not None:  # flax_module asks for its value first
            self.params[name] = {"kwargs": msg["kwargs"], "value": msg["value"]}
        elif kind == "prng_key" and msg["value"] is not None:
            self.keys.append(msg["value"])
        elif kind == "mutable" and msg["value"] is not None:
            self.mutable[name] = msg["value"]
        elif kind == "sample":
            self.sites[name] = SiteRecord(
                name,
                msg["fn"],
                msg["value"],
                msg["scale"],
                tuple(msg["cond_indep_stack"]),
                msg["is_observed"],
                msg["infer"],
                self.plates,
                self.subsamples,
                self.handed,
            )


def is_enumerated(infer: Mapping[str, Any]) -> bool:
    return infer.get("enumerate") == "parallel"


def run_until(
    program: Callable[..., Any],
    rng_key: Array,
    args: Any,
    kwargs: Any,
    values: Mapping[str, Any],
    sought: Collection[str],
) -> record:
    """Run a program until the rows of the plates ``sought`` are known; to its end if there are none."""
    with seed(rng_seed=rng_key), record({}, values, sought=sought) as run:
        try:
            program(*args, **kwargs)
        except rows.Found:
            pass
    return run


def per_example(site: SiteRecord, n: int) -> Array:
    """A site's log density summed over all but the leading dimension, of shape (n,).

    :raises ValueError: where the leading dimension is not the batch.
    """
    return sum_by_example(site.name, site.log_prob(), n)


def sum_by_example(name: str, log_prob: Array, n: int) -> Array:
    if jnp.ndim(log_prob) < 1 or log_prob.shape[0] != n:
        raise ValueError(
            f"Site '{name}' has a log density of shape {jnp.shape(log_prob)}; its leading dimension "
            f"is not the batch of {n}, so it can't be told which example it belongs to. Put the "
            "statement inside the data plate, and give factors one entry an example."
        )
    return log_prob.reshape(n, -1).sum(-1)


def leading_plates(sites: Iterable[SiteRecord]) -> frozenset[str]:
    """The plates along the leading axis of the sites' values: of the visible ones those whose rows are the batch."""
    lead = [(s, jnp.ndim(s.value) - s.fn.event_dim) for s in sites]
    return frozenset(frame.name for s, dims in lead for frame in s.frames if frame.dim == -dims)


def joint_per_example(sites: Iterable[SiteRecord], n: int) -> Array:
    """The sites' joint log density of every example, shape (n,).

    What stands outside the batch and is one number for all of it (a penalty on the weights) is left out: it is the
    same for every draw of h; :func:`analyse` has made sure of that.
    """
    total = cast(Array, sum(per_example(site, n) for site in sites if jnp.ndim(site.log_prob()) > 0))
    return total
