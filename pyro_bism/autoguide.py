"""AmortizedGuide: a guide made from the model, a small network from v to a distribution of every latent."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import pyro.poutine
import torch
from pyro.distributions import constraints, transforms
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.nn.functional import softplus

from .distributions import ConcreteBernoulli, ConcreteOneHot, base_of
from .programs import visible
from .programs.records import SiteRecord, record

__all__ = ["AmortizedGuide"]

SCALE = math.log(math.expm1(0.5))  # softplus of it is 0.5: a Normal's scale at the start


class AmortizedGuide(PyroModule):
    r"""A guide q(h|v; φ) made from the model: one small network from v to the distribution of every latent site.

    .. math:: q(h|v) = \prod_k q_k(h_k; f_k(v)), \qquad f(v) = A u + B\,\mathrm{net}(u) + c, \quad u = (v - m) / s

    It is what an autoguide of the host is not: it looks at the v that it is given, and so it is the posterior's
    stand-in at perturbed data and at new data too. Linear posteriors and logits are within its reach exactly.

    A continuous site gets a Normal with a mean and a scale for every number (or a flow), mapped to the site's support
    with its log density; a ``Bernoulli`` or ``OneHotCategorical`` site gets logits. Plates are the model's.
    The inputs are all arguments with one row a datapoint: the data, and covariates beside them. m and s are the means
    and standard deviations of those that it sees first;
    they are kept with the state and not trained.

    .. code-block:: python

        bism = BiSM(model, AmortizedGuide(model), optim, loss=DenoisingScoreMatching(sigma=0.1))

    :param model: the model. It is run once, at the guide's first call.
    :param family: ``"normal"``, or ``"flow"``: a Gaussian with a full covariance within each site, sent through
        sinh-arcsinh maps (Jones and Pewsey 2009) that give every number skewness and tails; the covariance takes
        D(D-1)/2 outputs for a site of D numbers.
    :param hidden_dims: the widths of the network's hidden layers; ``()`` leaves the linear map alone.
    :param activation: between them; None takes tanh. Smooth, as the score is a derivative in v.
    :param discrete: ``"relaxed"`` draws from :class:`ConcreteBernoulli` and :class:`ConcreteOneHot`; ``"enumerate"``
        marks the sites ``infer={"enumerate": "parallel"}``, to be summed out by ``inner_loss=TraceEnum_ELBO()``.
    :param temperature: of the relaxed ones.
    :raises ValueError: at construction for settings that are none; at the first call for a latent that it has no
        distribution for, or that all datapoints share.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        family: Literal["normal", "flow"] = "normal",
        hidden_dims: Sequence[int] = (64,),
        activation: Callable[[Tensor], Tensor] | None = None,
        discrete: Literal["relaxed", "enumerate"] = "relaxed",
        temperature: float = 0.1,
    ):
        super().__init__(name=type(self).__name__)
        if not callable(model):
            raise ValueError(f"AmortizedGuide is made from a model, a program; got {model!r}.")
        if family not in ("normal", "flow"):
            raise ValueError(f"family must be 'normal' or 'flow', got {family!r}.")
        if discrete not in ("relaxed", "enumerate"):
            raise ValueError(f"discrete must be 'relaxed' or 'enumerate', got {discrete!r}.")
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be positive and finite, got {temperature}.")
        if any(not isinstance(width, int) or width < 1 for width in hidden_dims):
            raise ValueError(f"hidden_dims must be positive integers, got {hidden_dims!r}.")
        self._model = (model,)  # in a tuple: its weights are not the guide's
        self.family = family
        self.hidden_dims = tuple(hidden_dims)
        self.activation = torch.tanh if activation is None else activation
        self.discrete = discrete
        self.temperature = temperature
        self._inputs: _Inputs | None = None
        self._latents: tuple[_Latent, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws every latent of the model at these arguments; they are returned by name.

        :param args: arguments of the model, the data among them.
        :param kwargs: its keyword arguments.
        """
        leaves, spec = visible.flatten((args, kwargs))
        if self._inputs is None:
            self._set_up(leaves, spec, args, kwargs)
        inputs = self._inputs
        assert inputs is not None
        inputs.check(leaves, spec)
        plates = inputs.plates(leaves)
        outputs = self._network(inputs.read(leaves, plates))
        values, start = {}, 0
        for latent in self._latents:
            raw = latent.arranged(outputs[:, start : start + latent.num_outputs])
            start += latent.num_outputs
            with ExitStack() as stack:
                for frame in latent.frames:
                    stack.enter_context(plates[frame])
                infer: Any = {"enumerate": "parallel"} if latent.is_summed else {}
                values[latent.name] = pyro.sample(latent.name, latent.distribution(raw, self.temperature), infer=infer)
        return values

    def _network(self, u: Tensor) -> Tensor:
        u = (u - self.center) / self.spread
        x = u
        for i in range(len(self.hidden_dims)):
            x = self.activation(x @ getattr(self, f"weight_{i}") + getattr(self, f"bias_{i}"))
        straight: Tensor = u @ self.weight_linear + self.bias
        return straight + x @ self.weight if self.hidden_dims else straight

    def _set_up(self, leaves: Sequence[Any], spec: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad(), pyro.poutine.block(), record() as run:
            self._model[0](*args, **kwargs)
        inputs = _Inputs.found(run.sites, leaves, spec)
        hidden = {name: site for name, site in run.sites.items() if not site.is_observed}
        latents = tuple(_Latent.from_site(site, inputs, self.family, self.discrete) for site in hidden.values())
        if not latents:
            raise ValueError("AmortizedGuide: the model has no latent site. Pass guide=lambda *args: None.")
        with torch.no_grad():
            u = inputs.read_all(leaves)
            spread = u.std(0, correction=0)
            whole = spread.square().mean().sqrt()
            spread = torch.where(spread > 1e-6 * whole, spread, whole)  # a column that does not vary
            # buffers: a captured step, a checkpoint and a move to another device know what to do with them
            self.register_buffer("center", u.mean(0))
            self.register_buffer("spread", torch.where(spread > 0, spread, 1.0))
            widths = [u.shape[1], *self.hidden_dims]
            for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
                self._add(f"weight_{i}", u, fan_in, fan_out, 1.0)
                setattr(self, f"bias_{i}", nn.Parameter(u.new_zeros(fan_out)))
            num = sum(latent.num_outputs for latent in latents)
            # near to a guide that is the same everywhere, but not at it: units have to differ to become different
            self._add("weight_linear", u, u.shape[1], num, 0.1)
            if self.hidden_dims:
                self._add("weight", u, widths[-1], num, 0.1)
            self.bias = nn.Parameter(u.new_zeros(num))
        self._inputs, self._latents = inputs, latents

    def _add(self, name: str, like: Tensor, fan_in: int, fan_out: int, gain: float) -> None:
        draw = torch.randn(fan_in, fan_out, dtype=like.dtype, device=like.device)
        setattr(self, name, nn.Parameter(gain / math.sqrt(fan_in) * draw))


@dataclass(frozen=True)
class _Inputs:
    """Which arguments the network reads, and the model's plates.

    :ivar spec: how the arguments are nested.
    :ivar places: where they stand among the arguments' leaves.
    :ivar first: the place of a visible site's value.
    :ivar batch_frame: the plate over the datapoints, or None.
    :ivar is_subsampled: whether that plate picks its rows out of the arguments.
    :ivar rows: the place of an argument that says which rows the plate has, or None.
    :ivar frames: by name: dimension, full size and size.
    :ivar dtype: the visible site's type, to which the inputs are cast.
    """

    spec: Any
    places: tuple[int, ...]
    first: int
    batch_frame: str | None
    is_subsampled: bool
    rows: int | None
    frames: Mapping[str, tuple[int, int, int]]
    dtype: torch.dtype

    @classmethod
    def found(cls, sites: Mapping[str, SiteRecord], leaves: Sequence[Any], spec: Any) -> "_Inputs":
        site, seen = _first_visible(sites, leaves)
        value = site.value
        leading = site.fn.event_dim - value.dim()
        frame = next((f for f in site.frames if f.vectorized and f.dim == leading), None)
        rows = None
        if frame is not None and frame.name in site.subsamples:
            picked = site.subsamples[frame.name]
            rows = next((i for i, leaf in enumerate(leaves) if leaf is picked), None)
        length = len(leaves[seen.leaves[0]])
        places = tuple(i for i, leaf in enumerate(leaves) if i != rows and _is_input(leaf, length))
        frames = {f.name: (f.dim, f.full_size, f.size) for s in sites.values() for f in s.frames if f.vectorized}
        name = None if frame is None else frame.name
        return cls(spec, places, seen.leaves[0], name, seen.plate is not None, rows, frames, value.dtype)

    def check(self, leaves: Sequence[Any], spec: Any) -> None:
        lengths = {len(leaves[i]) for i in self.places} if spec == self.spec else set()
        if len(lengths) != 1:
            raise ValueError(
                "AmortizedGuide: the arguments are not arranged as at the first call, where those with one row a "
                f"datapoint were number {list(self.places)} of the leaves. Pass the same ones, each with as many rows."
            )

    def plates(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """The model's plates, that over the datapoints as long as the data are now."""
        made, length = {}, len(leaves[self.first])
        for name, (dim, full_size, size) in self.frames.items():
            if name != self.batch_frame:
                made[name] = pyro.plate(name, full_size, subsample_size=size, dim=dim)
            elif self.rows is not None:
                made[name] = pyro.plate(name, full_size, subsample=leaves[self.rows], dim=dim)
            elif self.is_subsampled:
                made[name] = pyro.plate(name, length, subsample_size=size, dim=dim)
            else:
                made[name] = pyro.plate(name, length if size == full_size else full_size, length, dim=dim)
        return made

    def read(self, leaves: Sequence[Any], plates: Mapping[str, Any]) -> Tensor:
        """The inputs of the rows at hand, of shape (n, number of inputs)."""
        picked = [leaves[i] for i in self.places]
        if self.is_subsampled:
            assert self.batch_frame is not None
            with plates[self.batch_frame] as rows:
                picked = [leaf[rows] for leaf in picked]
        return self._joined(picked)

    def read_all(self, leaves: Sequence[Any]) -> Tensor:
        return self._joined([leaves[i] for i in self.places])

    def _joined(self, values: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.reshape(len(x), -1).to(self.dtype) for x in values], -1)


def _first_visible(sites: Mapping[str, SiteRecord], leaves: Sequence[Any]) -> tuple[SiteRecord, visible.VisibleSite]:
    """A site that is data, and where its value stands among the arguments.

    :raises ValueError: if there is none; what is wrong with the first.
    """
    problem: ValueError | None = None
    for name, site in sites.items():
        if not site.is_data:
            continue
        try:
            return site, visible.find({name: site}, leaves, None, discrete=True)[0]
        except ValueError as error:  # it may be one that BiSM leaves out: visible=[...]
            problem = problem or error
    raise problem or ValueError("AmortizedGuide: the model has no observed site. Was the data passed to it?")


def _is_input(leaf: Any, length: int) -> bool:
    """A number or more for every datapoint; not a mask of infinities."""
    if not isinstance(leaf, Tensor) or leaf.layout != torch.strided or leaf.is_complex():
        return False
    if leaf.shape[:1] != (length,):
        return False
    return bool(leaf.isfinite().all())


@dataclass(frozen=True)
class _Latent:
    """A latent site's distribution, as a function of the network's outputs.

    :ivar name: the site's.
    :ivar kind: ``"normal"``, ``"flow"``, ``"bernoulli"``, ``"one hot"`` or ``"categorical"``.
    :ivar axis: where the datapoints stand in the batch shape.
    :ivar rest: the batch shape without them.
    :ivar shape: the event shape; of a continuous site in the unconstrained space.
    :ivar transform: from there to the site's support, or None.
    :ivar num_cell: outputs for one entry of the batch shape.
    :ivar frames: the names of the plates that it stands in.
    :ivar is_summed: whether it is marked for enumeration.
    """

    name: str
    kind: str
    axis: int
    rest: tuple[int, ...]
    shape: tuple[int, ...]
    transform: Any
    num_cell: int
    frames: tuple[str, ...]
    is_summed: bool

    @classmethod
    def from_site(cls, site: SiteRecord, inputs: _Inputs, family: str, discrete: str) -> "_Latent":
        fn, base = site.fn, base_of(site.fn)
        frames = tuple(f.name for f in site.frames if f.vectorized)
        batch_shape = list(site.value.shape[: site.value.dim() - fn.event_dim])
        if inputs.batch_frame is not None and inputs.batch_frame in frames:
            axis = len(batch_shape) + inputs.frames[inputs.batch_frame][0]
        elif inputs.batch_frame is None and batch_shape:
            axis = 0
        else:
            raise ValueError(
                f"AmortizedGuide: all datapoints share the latent site '{site.name}', of shape "
                f"{tuple(site.value.shape)}. Put it inside the data plate, make it a parameter, or write the guide by "
                "hand."
            )
        del batch_shape[axis]
        event, transform, is_summed = tuple(fn.event_shape), None, False
        if fn.support.is_discrete:
            kinds = {dist.Bernoulli: "bernoulli", dist.OneHotCategorical: "one hot", dist.Categorical: "categorical"}
            kind = next((k for family, k in kinds.items() if isinstance(base, family)), "")
            is_summed = discrete == "enumerate"
            if not kind or (kind == "categorical" and not is_summed):
                raise ValueError(
                    f"AmortizedGuide: the latent site '{site.name}' ({type(base).__name__}) can't be relaxed. Make it "
                    "Bernoulli or OneHotCategorical, sum a Categorical out (discrete='enumerate'), or write the guide "
                    "by hand."
                )
            num = base.probs.shape[-1] if kind == "categorical" else math.prod(event)
        else:
            kind = family
            if not visible.is_real(fn.support):
                transform = biject_to(_constant_support(site.name, fn.support))
                shape = transform.inverse_shape(site.value.shape)
                event = tuple(shape[len(shape) - transform.domain.event_dim :])
            size = math.prod(event)
            num = 2 * size if family == "normal" else 4 * size + size * (size - 1) // 2
        return cls(site.name, kind, axis, tuple(batch_shape), event, transform, num, frames, is_summed)

    @property
    def num_outputs(self) -> int:
        return math.prod(self.rest) * self.num_cell

    def arranged(self, outputs: Tensor) -> Tensor:
        """Outputs of shape (n, ``num_outputs``) as the site's batch shape and, last, ``num_cell``."""
        return outputs.reshape(len(outputs), *self.rest, self.num_cell).movedim(0, self.axis)

    def distribution(self, raw: Tensor, temperature: float) -> Any:
        batch = raw.shape[:-1]
        if self.kind == "categorical":
            return dist.Categorical(logits=raw)
        if self.kind == "bernoulli":
            logits = raw.reshape(*batch, *self.shape)
            fn = dist.Bernoulli(logits=logits) if self.is_summed else ConcreteBernoulli(temperature, logits)
            return fn.to_event(len(self.shape))
        if self.kind == "one hot":
            logits = raw.reshape(*batch, *self.shape)
            one = dist.OneHotCategorical(logits=logits) if self.is_summed else ConcreteOneHot(temperature, logits)
            return one.to_event(len(self.shape) - 1)
        size, steps = math.prod(self.shape), list[Any]()
        loc, scale = raw[..., :size], softplus(raw[..., size : 2 * size] + SCALE)
        if self.kind == "normal":
            fn = dist.Normal(loc.reshape(*batch, *self.shape), scale.reshape(*batch, *self.shape))
            fn = fn.to_event(len(self.shape))
        else:
            skew, tail = raw[..., 2 * size : 3 * size], raw[..., 3 * size : 4 * size]
            fn, steps = _flow(loc, scale, skew, tail, raw[..., 4 * size :], self.shape)
        steps = steps if self.transform is None else [*steps, self.transform]
        return dist.TransformedDistribution(fn, steps) if steps else fn


def _flow(
    loc: Tensor, scale: Tensor, skew: Tensor, tail: Tensor, below: Tensor, shape: tuple[int, ...]
) -> tuple[Any, list[Any]]:
    """L ε with a unit-triangular L, and the maps after it: sinh-arcsinh of every number, then the event's shape."""
    size, batch = loc.shape[-1], loc.shape[:-1]
    # bounded: sinh of a large number is no guide's wish
    settings = loc, scale, 3 * torch.tanh(skew / 3), torch.exp2(torch.tanh(tail))
    if not shape:
        return dist.Normal(torch.zeros_like(loc[..., 0]), 1.0), [_SinhArcsinh(*[x[..., 0] for x in settings])]
    row, column = torch.tril_indices(size, size, -1, device=loc.device)
    flat = torch.zeros(*batch, size * size, dtype=loc.dtype, device=loc.device)
    flat = flat.index_copy(-1, row * size + column, below)
    triangle = torch.eye(size, dtype=loc.dtype, device=loc.device) + flat.reshape(*batch, size, size)
    reshape = [transforms.ReshapeTransform(torch.Size([size]), torch.Size(shape))] if len(shape) > 1 else []
    base = dist.MultivariateNormal(torch.zeros_like(loc), scale_tril=triangle)
    return base, [transforms.IndependentTransform(_SinhArcsinh(*settings), 1), *reshape]


class _SinhArcsinh(transforms.Transform):
    r"""x ↦ loc + scale · sinh(tail · arcsinh x + skew), the identity at (0, 1, 0, 1)."""

    domain = codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, loc: Tensor, scale: Tensor, skew: Tensor, tail: Tensor):
        super().__init__()
        self.loc, self.scale, self.skew, self.tail = loc, scale, skew, tail

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + self.scale * torch.sinh(self.tail * torch.asinh(x) + self.skew)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.sinh((torch.asinh((y - self.loc) / self.scale) - self.skew) / self.tail)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        bent = torch.cosh(self.tail * torch.asinh(x) + self.skew)
        return torch.log(self.scale * self.tail * bent) - 0.5 * torch.log1p(x**2)


def _constant_support(name: str, support: Any) -> Any:
    """The support with its bounds as single numbers: a plate's expansion has given them a batch.

    :raises ValueError: if they differ from place to place, or are trained.
    """
    if isinstance(support, constraints.independent):
        base = _constant_support(name, support.base_constraint)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    support = copy.copy(support)
    for bound in ("lower_bound", "upper_bound"):
        value = getattr(support, bound, None)
        if not isinstance(value, Tensor):
            continue
        first = value.reshape(-1)[0]
        if value.requires_grad or bool((value != first).any()):
            raise ValueError(
                f"AmortizedGuide: the support of latent site '{name}' differs between datapoints or units, or depends "
                "on a parameter. Take a latent of fixed support and scale it in the energy."
            )
        setattr(support, bound, first.detach())
    return support
