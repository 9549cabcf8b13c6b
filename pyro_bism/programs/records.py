"""A program's sample statements as they ran, and their log densities by example."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..distributions import base_of, discretized, relaxed, unmasked
from . import rows
from .hosts import Subsample


@dataclass
class SiteRecord:
    """One sample statement, as it ran."""

    name: str
    fn: Any
    value: Any
    scale: Any
    mask: Any
    frames: tuple[Any, ...]
    is_observed: bool
    infer: Mapping[str, Any]
    subsamples: Mapping[str, Tensor]
    handed: Collection[str] = ()

    @property
    def is_data(self) -> bool:
        """Observed by the user: not a factor, not a deterministic value."""
        return (
            self.is_observed
            and not isinstance(base_of(self.fn), dist.Unit)
            and not self.infer.get("_deterministic", False)
        )

    @property
    def is_delta(self) -> bool:
        return isinstance(base_of(self.fn), dist.Delta)

    def log_prob(self) -> Tensor:
        """log density with the user's scale and mask, without a subsampling plate's N/B."""
        scale = self.scale
        for frame in self.frames:
            if frame.size != frame.full_size:
                scale = scale * (frame.size / frame.full_size)
        log_prob: Tensor = scale_and_mask(self.fn.log_prob(self.value), scale, self.mask)
        return log_prob

    def log_q(self) -> Tensor:
        """log q of the value: how often it is drawn, which neither a scale nor a mask of the density changes."""
        return unmasked(self.fn).log_prob(self.value)

    def total(self) -> Tensor:
        """Σ log density as a host ELBO takes it, a subsampling plate's N/B too."""
        log_prob: Tensor = scale_and_mask(self.fn.log_prob(self.value), self.scale, self.mask)
        return log_prob.sum()


class replay(Messenger):
    """Runs a program with some of its sites given.

    A value in ``values`` stands in for a latent site's draw, or for a plate's rows, however it comes by them: all
    passes of a step are about the same. A site in ``relaxed_sites`` is scored as its relaxation.
    """

    def __init__(self, values: Mapping[str, Tensor], relaxed_sites: frozenset[str] = frozenset()):
        super().__init__()
        self.values = values
        self.relaxed_sites = relaxed_sites

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if isinstance(msg["fn"], Subsample):
            if name in self.values:
                msg["value"], msg["done"], msg["is_observed"] = self.values[name], True, False
            return
        if name in self.relaxed_sites:
            msg["fn"] = relaxed(msg["fn"])
        if name in self.values and not (msg["is_observed"] or msg["done"]):
            msg["value"], msg["done"] = self.values[name], True


class record(replay):
    """Runs a program as :class:`replay` does, and keeps its sample statements.

    Sites marked for enumeration get their whole support, in a dimension of their own left of all plates,
    when ``enumerate_from`` says how many dimensions the plates take.

    :ivar subsamples: the rows of every plate; ``handed`` names the plates that were handed theirs by the program.
    :cvar last: the name of the statement that ran last, in whichever run: an energy hides its own from outer handlers.
    """

    last: ClassVar[str | None] = None

    def __init__(
        self,
        values: Mapping[str, Tensor] | None = None,
        relaxed_sites: frozenset[str] = frozenset(),
        enumerate_from: int | None = None,
        discretize: bool = False,
        offered: Mapping[str, Tensor] | None = None,
        sought: Collection[str] = (),
    ):
        """What the run is given, and how far it goes.

        :param offered: rows for plates that would draw them by themselves.
        :param sought: plates; the program is left as soon as the rows of all are known.
        """
        super().__init__(values or {}, relaxed_sites)
        self.enumerate_from = enumerate_from
        self.discretize = discretize
        self.offered = offered or {}
        self.sought = sought
        self.full_sizes: dict[str, int] = {}
        self.handed: set[str] = set()
        self._drawn: set[str] = set()
        self.sites: dict[str, SiteRecord] = {}
        self.params: dict[str, Any] = {}
        self.subsamples: dict[str, Tensor] = {}
        self.num_enumerated = 0

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if isinstance(msg["fn"], Subsample):
            if msg["value"] is None:
                msg["value"] = self.offered.get(msg["name"])
                msg["fn"] = rows.watched(msg["fn"], msg["name"], self._drawn)
                if msg["value"] is not None:
                    self._drawn.add(msg["name"])
            return
        record.last = msg["name"]
        if self.discretize:
            msg["fn"] = discretized(msg["fn"])
        if msg["is_observed"] or msg["done"]:
            return
        if self.enumerate_from is not None and is_enumerated(msg["infer"]):
            self.num_enumerated += 1
            support = msg["fn"].enumerate_support(expand=False)
            batch_dims = support.dim() - 1 - msg["fn"].event_dim
            ones = self.enumerate_from + self.num_enumerated - 1 - batch_dims
            msg["value"] = support.reshape(support.shape[:1] + (1,) * ones + support.shape[1:])
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], Subsample):
            self._keep_rows(msg)
            return
        self.sites[msg["name"]] = SiteRecord(
            msg["name"],
            msg["fn"],
            msg["value"],
            msg["scale"],
            msg["mask"],
            msg["cond_indep_stack"],
            msg["is_observed"],
            msg["infer"],
            self.subsamples,
            self.handed,
        )

    def _keep_rows(self, msg: Any) -> None:
        name = msg["name"]
        if not isinstance(msg["value"], Tensor):  # a list
            msg["value"] = torch.as_tensor(msg["value"])
        self.subsamples[name], self.full_sizes[name] = msg["value"], msg["fn"].size
        if name not in self.values and name not in self._drawn:
            rows.require_indices(name, msg["fn"].size, msg["value"])
            self.handed.add(name)
        if self.sought and set(self.sought) <= self.subsamples.keys():
            raise rows.Found

    def _pyro_post_param(self, msg: Any) -> None:
        self.params[msg["name"]] = msg["value"]

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Of the plates met, how many rows each has and takes."""
        return {name: (size, len(self.subsamples[name])) for name, size in self.full_sizes.items()}


def is_enumerated(infer: Mapping[str, Any]) -> bool:
    return infer.get("enumerate") == "parallel"


def leading_plates(sites: Iterable[SiteRecord]) -> frozenset[str]:
    """The plates along the leading axis of the sites' values: of the visible ones those whose rows are the batch."""
    lead = [(s, s.value.dim() - s.fn.event_dim) for s in sites]
    return frozenset(frame.name for s, dims in lead for frame in s.frames if frame.dim == -dims)


def joint_per_example(sites: Iterable[SiteRecord], n: int) -> Tensor:
    """The sites' joint log density of every example, shape (n,).

    What stands outside the batch and is one number for all of it (a penalty on the weights) is left out: it is the
    same for every draw of h; :func:`analyse` has made sure of that.
    """
    log_probs = ((site.name, site.log_prob()) for site in sites)
    total = cast(Tensor, sum(sum_by_example(name, log_prob, n) for name, log_prob in log_probs if log_prob.dim() > 0))
    return total


def per_example(site: SiteRecord, n: int) -> Tensor:
    """A site's log density summed over all but the leading dimension, of shape (n,).

    :raises ValueError: where the leading dimension is not the batch.
    """
    return sum_by_example(site.name, site.log_prob(), n)


def sum_by_example(name: str, log_prob: Tensor, n: int) -> Tensor:
    if log_prob.dim() < 1 or log_prob.shape[0] != n:
        raise ValueError(
            f"Site '{name}' has a log density of shape {tuple(log_prob.shape)}; its leading dimension "
            f"is not the batch of {n}, so it can't be told which example it belongs to. Put the "
            "statement inside the data plate, and give factors one entry an example."
        )
    return log_prob.reshape(n, -1).sum(-1)


def hidden_from_handlers() -> Any:
    """The context in which a look at the programs is hidden from all outside, but for who hands rows to a plate."""
    return pyro.poutine.block(hide_fn=lambda msg: not isinstance(msg.get("fn"), Subsample))


def run_until(
    program: Callable[..., Any], args: Any, kwargs: Any, values: Mapping[str, Any], sought: Collection[str]
) -> record:
    """Run a program until the rows of the plates ``sought`` are known; to its end if there are none."""
    with record(values, sought=sought) as run:
        try:
            program(*args, **kwargs)
        except rows.Found:
            pass
    return run
