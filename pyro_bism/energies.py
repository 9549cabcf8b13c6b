r"""log p̃(v, h; θ) row by row, and which of its conditionals have closed forms.

Samplers and estimators of the normaliser look at a model as a density over a *point* x: the visible values, one matrix,
and the latent ones, by site; every array leads with the rows, and a row knows nothing of the others. Continuous
latents stand in it unconstrained, the Jacobian in the density. Discrete visible values stand by site too.

What can be summed, integrated or drawn in closed form is found from the energy itself, by trying it at random points:

- *affine* in bits or one-hot vectors (every restricted Boltzmann machine is): they are independent given the
  rest, their logits are one gradient;
- *gaussian*, quadratic in real variables: mean and precision are a gradient and a Hessian;
- *units*: other discrete sites, one unit after the other by the differences of the energy;
- *free*: all else.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to

from . import visible
from .densities import Site, joint_per_example, record
from .distributions import ConcreteBernoulli, ConcreteOneHot, base_of, hard

Point = dict[str, Tensor]

VISIBLE = "(visible)"  # the visible values' name in a point: no site of a program is called so
NUM_TRIALS = 3
MAX_FULL = 64  # a precision that differs from row to row is kept for at most so many variables


@dataclass(frozen=True)
class Latent:
    """One latent site of the model.

    :ivar shape: of its value for one example.
    :ivar kind: "bits", "onehot", "labels" (any other enumerable support) or "real".
    :ivar values: of "labels": the support, one value a row.
    :ivar transform: of "real": from the reals to its support.
    :ivar unconstrained: of "real": the shape of one example's value in the reals.
    :ivar fn: the distribution that declares it.
    """

    shape: tuple[int, ...]
    kind: str
    values: Any = None
    transform: Any = None
    unconstrained: tuple[int, ...] = ()
    fn: Any = None

    @property
    def num_values(self) -> int:
        """How many values one unit takes."""
        return {"bits": 2, "onehot": self.shape[-1] if self.shape else 1}.get(self.kind) or len(self.values)

    @property
    def units(self) -> tuple[int, ...]:
        """The shape in which its units stand."""
        if self.kind == "labels":
            return self.shape[: len(self.shape) - (self.values.ndim - 1)]
        return self.shape[:-1] if self.kind == "onehot" else self.shape

    def support(self, dtype: Any) -> Tensor:
        """The values of one unit, one a row."""
        if self.kind == "bits":
            return torch.arange(2, dtype=dtype)
        return torch.eye(self.shape[-1], dtype=dtype) if self.kind == "onehot" else self.values


class Block(NamedTuple):
    """Variables that are drawn, summed or integrated together, given all others.

    :ivar is_constant: of "gaussian": whether the precision is one for all rows and all values of the rest.
    :ivar is_diagonal: of "gaussian": whether its precision is.
    :ivar is_multilinear: of "units": whether the energy is affine in each bit or one-hot vector, the others held.
    """

    kind: str
    names: tuple[str, ...]
    is_constant: bool = False
    is_diagonal: bool = False
    is_multilinear: bool = False


@dataclass(frozen=True)
class Density:
    """An unnormalised log density of points, row by row.

    :ivar log_prob: of a point with m rows, shape (m,); any m.
    :ivar energy: whose variables these are.
    :ivar blocks: what moves, in parts; all else stands still.
    :ivar precisions: constant ones of "gaussian" blocks, by the block's names: shape (d, d), or (d,) if diagonal.
    :ivar masks: by name, the entries that move where only some do, of the shape of the variable.
    """

    log_prob: Callable[[Point], Tensor]
    energy: "Energy"
    blocks: tuple[Block, ...]
    precisions: Mapping[tuple[str, ...], Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def latents(self) -> Mapping[str, Latent]:
        """By site."""
        return self.energy.latents

    def moving(self, masks: Mapping[str, Any]) -> "Density":
        """The same, but only these variables move: those whose mask is True, and of others the entries where it is."""
        blocks = []
        for block in self.blocks:
            names = tuple(name for name in block.names if name in masks)
            if names:
                blocks.append(block._replace(names=names))
        precisions = {b.names: self.part(b) for b in blocks if b.kind == "gaussian" and b.is_constant}
        partial = {name: mask for name, mask in masks.items() if mask is not True}
        return replace(self, blocks=tuple(blocks), precisions=precisions, masks=partial)

    def part(self, block: Block) -> Tensor:
        """The constant precision of a "gaussian" block, or of some variables of one."""
        whole = next(names for names in self.precisions if set(block.names) <= set(names))
        precision = self.precisions[whole]
        if whole == block.names:
            return precision
        sizes = [self.energy.size(name) for name in whole]
        edges = np.cumsum([0, *sizes])
        kept = np.concatenate([np.arange(edges[i], edges[i + 1]) for i, n in enumerate(whole) if n in block.names])
        return precision[kept] if block.is_diagonal else precision[np.ix_(kept, kept)]

    def slope(self, x: Point, names: Sequence[str]) -> Point:
        """The gradient of every row's log density in these variables; it can be differentiated but under no_grad."""
        return self.value_and_slope(x, names)[1]

    def value_and_slope(self, x: Point, names: Sequence[str]) -> tuple[Tensor, Point]:
        """Every row's log density and its gradient in these variables; both can be differentiated but under no_grad."""
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            part = [x[name] if x[name].requires_grad else x[name].detach().requires_grad_() for name in names]
            value = self.log_prob({**x, **dict(zip(names, part, strict=True))})
            slopes = torch.autograd.grad(value.sum(), part, create_graph=differentiable, materialize_grads=True)
        return value if differentiable else value.detach(), dict(zip(names, slopes, strict=True))

    def precision(self, x: Point, block: Block) -> Tensor:
        """Of a "gaussian" block, or of a part of one, at x: shape (d, d) or (m, d, d); (d,) or (m, d) if diagonal."""
        return self.part(block) if block.is_constant else _curvature(self, x, block)

    def mixed(self, other: "Density", weight: Any) -> "Density":
        """(1 - weight) · self + weight · other, in logarithms; ``other``'s blocks serve for both.

        :param other: of the same variables. self is a product of Gaussians and coins, which any block allows.
        """

        def log_prob(x):
            return (1 - weight) * self.log_prob(x) + weight * other.log_prob(x)

        def precision(block):
            a, b = self.precisions[block.names], other.precisions[block.names]
            if a.ndim < b.ndim:
                a = torch.diag(a)
            return (1 - weight) * a + weight * b

        constant = [block for block in other.blocks if block.names in other.precisions]
        return replace(other, log_prob=log_prob, precisions={block.names: precision(block) for block in constant})


@dataclass(frozen=True)
class Energy:
    """A model's log p̃(v, h; θ) on one batch.

    :ivar latents: by site, discrete visible ones among them.
    :ivar num_rows: of the batch.
    :ivar observed: the discrete visible sites.
    :ivar resizes: whether the model runs on any number of rows; else they are taken ``num_rows`` at a time.
    :ivar is_homogeneous: whether all rows have the same density: no covariates that tell them apart.
    """

    model: Callable
    sites: tuple[visible.VisibleSite, ...]
    batch: visible.Batch
    latents: Mapping[str, Latent]
    num_rows: int
    resizes: bool = False
    is_homogeneous: bool = False
    blocks: tuple[Block, ...] = ()
    buffers: tuple[Tensor, ...] = ()
    observed: tuple[str, ...] = ()

    @property
    def hidden(self) -> tuple[str, ...]:
        """The sites that are not visible."""
        return tuple(name for name in self.latents if name not in self.observed)

    @classmethod
    def of(
        cls,
        model: Callable,
        sites: tuple[visible.VisibleSite, ...],
        batch: visible.Batch,
        buffers: Sequence[Tensor] = (),
        values: Mapping[str, Tensor] | None = None,
        moves_visible: bool = True,
    ) -> tuple["Energy", Point]:
        """The energy, tried out on this batch, and the point where it was: the data and one draw of the latents.

        :param buffers: of the model's modules; a look at the density leaves them as they are.
        :param values: of the latents, if the model should not draw them itself.
        :param moves_visible: whether the visible values are of any block; else their structure is not looked for.
        :raises ValueError: where a latent has not the batch as its leading dimension, or is of no kind known here.
        """
        args, kwargs = batch.arguments(batch.v)
        kept = [b.clone() for b in buffers]
        with torch.no_grad(), record({**batch.indices, **(values or {})}, harden=True) as run:
            model(*args, **kwargs)
        _restore(buffers, kept)
        n = len(batch.v)
        drawn = {name: site for name, site in run.sites.items() if not site.is_observed}
        latents = {name: _latent(site, n) for name, site in drawn.items()}
        observed = {site.name: _latent(run.sites[site.name], n) for site in sites if site.is_discrete}
        x = {VISIBLE: batch.v}
        for name, latent in latents.items():
            value = drawn[name].value
            if latent.kind == "real":
                value = latent.transform.inv(value)
            x[name] = value.detach().to(batch.v.dtype) if latent.kind in ("bits", "onehot") else value.detach()
        energy = cls(model, sites, batch, latents, n, buffers=tuple(buffers))
        if observed:
            energy, seen = energy._observing(x, observed)
            x |= seen
        energy = replace(energy, resizes=energy._can_resize(x))
        energy = replace(energy, is_homogeneous=energy._is_homogeneous(x))
        moving = [name for name in (VISIBLE, *latents, *observed) if moves_visible or name in latents]
        return replace(energy, blocks=_find_blocks(energy, x, moving)), x

    def log_joint(self, x: Point, jacobian: bool = True) -> Tensor:
        """log p̃ of every row, of shape (m,), with or without the Jacobians of transformed latents.

        Row i of a point with more rows than the batch has the covariates of row i modulo ``num_rows``.
        """
        m, n = len(x[VISIBLE]), self.num_rows
        if m == n:
            return self._run(self.batch, x, jacobian)
        if self.resizes:
            return self._run(self._resized(m), x, jacobian)
        passes = -(-m // n)
        rows = (torch.arange(passes * n) % m).chunk(passes)  # the last pass is filled up
        return torch.cat([self._run(self.batch, select(x, part), jacobian) for part in rows])[:m]

    def density(self, x: Point) -> Density:
        """At these parameters; x is any point, at which the constant precisions are taken."""
        density = Density(self.log_joint, self, self.blocks, {})
        first = select(x, slice(1)) if self.resizes else x
        constant = [b for b in self.blocks if b.kind == "gaussian" and b.is_constant]
        return replace(density, precisions={b.names: _curvature(density, first, b)[0] for b in constant})

    def at(self, batch: visible.Batch) -> "Energy":
        """The same on another batch."""
        soft = {site.name for site in self.sites if site.is_soft}
        sites = tuple(replace(site, is_soft=site.name in soft) for site in batch.sites)
        return replace(self, sites=sites, batch=replace(batch, sites=sites), num_rows=len(batch.v))

    def seen(self, v: Tensor) -> Point:
        """The visible part of a point, from all visible values side by side as a batch has them."""
        sizes = [self.size(name) for name in self.observed]
        start = v.shape[1] - sum(sizes)
        x = {VISIBLE: v[:, :start]}
        for name, size in zip(self.observed, sizes, strict=True):
            latent = self.latents[name]
            dtype = latent.values.dtype if latent.kind == "labels" else v.dtype
            x[name] = v[:, start : start + size].reshape(len(v), *latent.shape).to(dtype)
            start += size
        return x

    def size(self, name: str) -> int:
        """How many numbers a variable has in one row."""
        if name == VISIBLE:
            return sum(visible.size(site) for site in self.sites if not site.is_discrete)
        latent = self.latents[name]
        return math.prod(latent.unconstrained if latent.kind == "real" else latent.shape)

    def values(self, x: Point) -> dict[str, Tensor]:
        """A point as the sites' own values, by name: visible and latent."""
        found, start = {}, 0
        for site in self.sites:
            if site.is_discrete:
                continue
            size = math.prod(site.shape[1:])
            found[site.name] = x[VISIBLE][..., start : start + size].reshape(*x[VISIBLE].shape[:-1], *site.shape[1:])
            start += size
        for name, latent in self.latents.items():
            if name in x:
                found[name] = latent.transform(x[name]) if latent.kind == "real" else x[name]
        return found

    def _run(self, batch: visible.Batch, x: Point, jacobian: bool) -> Tensor:
        m = len(x[VISIBLE])
        args, kwargs = batch.arguments(pack(x, (VISIBLE, *self.observed)) if self.observed else x[VISIBLE])
        values, total = dict(batch.indices), x[VISIBLE].new_zeros(m)
        for name in self.hidden:
            latent = self.latents[name]
            values[name] = x[name]
            if latent.kind == "real":
                values[name] = latent.transform(x[name])
                terms = latent.transform.log_abs_det_jacobian(x[name], values[name])
                total = total + (terms.reshape(m, -1).sum(-1) if jacobian else 0.0)
        soft = frozenset(name for name, latent in self.latents.items() if latent.kind in ("bits", "onehot"))
        kept = [b.clone() for b in self.buffers]
        # one seed for every point: what a model draws by itself (dropout) is part of the density
        with (
            torch.random.fork_rng(devices=[]),
            pyro.validation_enabled(False),
            pyro.poutine.block(),
            record(values, soft) as run,
        ):
            torch.default_generator.manual_seed(0)  # torch.manual_seed keeps a stack trace at every call
            self.model(*args, **kwargs)
        _restore(self.buffers, kept)
        return joint_per_example(run.sites.values(), m) + total

    @torch.no_grad()
    def _observing(self, x: Point, observed: Mapping[str, Latent]) -> tuple["Energy", Point]:
        """This energy with discrete visible sites, as real numbers where the model takes them for the same; its point.

        Tried, for a model may look its values up in a table: such sites are "labels", whatever they are declared.
        """
        v = self.batch.v
        energy = replace(self, latents={**self.latents, **observed}, observed=tuple(observed))
        hard = energy.log_joint({**x, **energy.seen(v)})
        for name, latent in observed.items():
            sites = tuple(replace(site, is_soft=site.is_soft or site.name == name) for site in energy.sites)
            trial = replace(energy, sites=sites, batch=replace(energy.batch, sites=sites))
            takes = latent.kind != "labels"
            if takes:
                try:
                    takes = close(trial.log_joint({**x, **energy.seen(v)}), hard)
                except Exception:  # whatever a program trips over: it gets integers then
                    takes = False
            if takes:
                energy = trial
            elif latent.kind != "labels":
                labels = replace(latent, kind="labels", values=latent.support(torch.long))
                energy = replace(energy, latents={**energy.latents, name: labels})
        return energy, energy.seen(v)

    def _resized(self, m: int) -> visible.Batch:
        """The batch with its rows repeated, or cut, to m: of all arguments that have as many rows as the data."""
        n = self.num_rows
        rows = torch.arange(m) % n
        visible_leaves = {i for site in self.sites for i in site.leaves}
        leaves = [
            leaf[rows] if isinstance(leaf, Tensor) and leaf.shape[:1] == (n,) and i not in visible_leaves else leaf
            for i, leaf in enumerate(self.batch.leaves)
        ]
        sites = tuple(replace(site, shape=(m, *site.shape[1:])) for site in self.sites)
        # the programs are given v in the visible leaves' place, so these need no more than their type
        return replace(self.batch, sites=sites, leaves=leaves)

    def _can_resize(self, x: Point) -> bool:
        """Tried, at one row more: plates of a fixed size and subsampled ones say no."""
        if self.batch.indices:
            return False
        n = self.num_rows
        wrapped = select(x, torch.arange(n + 1) % n)
        try:
            with torch.no_grad():
                found = replace(self, resizes=True).log_joint(wrapped)
        except Exception:  # whatever a program trips over: it gets its own number of rows then
            return False
        with torch.no_grad():
            return len(found) == n + 1 and close(found[:n], self.log_joint(x)) and close(found[n:], found[:1])

    def _is_homogeneous(self, x: Point) -> bool:
        with torch.no_grad():
            log_joint = self.log_joint({name: a[:1].expand(a.shape) for name, a in x.items()})
        return close(log_joint, log_joint[:1])


def _restore(buffers: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)


def _latent(site: Site, n: int) -> Latent:
    fn, base, shape = hard(site.fn), base_of(hard(site.fn)), tuple(site.value.shape)
    if shape[:1] != (n,):
        raise ValueError(
            f"Latent site '{site.name}' has shape {shape}, without the batch of {n} as its leading dimension: all "
            "examples share it, so it is a part of no example. Put it inside the data plate, or make it a parameter."
        )
    if isinstance(base, dist.Bernoulli | ConcreteBernoulli):
        return Latent(shape[1:], "bits", fn=fn)
    if isinstance(base, dist.OneHotCategorical | ConcreteOneHot):
        return Latent(shape[1:], "onehot", fn=fn)
    support: Any = fn.support
    if not support.is_discrete:
        transform = biject_to(support)
        unconstrained = tuple(transform.inverse_shape(torch.Size(shape)))[1:]
        return Latent(shape[1:], "real", transform=transform, unconstrained=unconstrained, fn=fn)
    try:
        values = base.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise ValueError(
            f"Latent site '{site.name}' ({type(base).__name__}) is discrete and its support can't be enumerated: "
            "there is no way to draw or sum it here. Use a Bernoulli, Categorical or other finite distribution."
        ) from error
    return Latent(shape[1:], "labels", values.reshape(len(values), *base.event_shape), fn=fn)


def pack(x: Point, names: Sequence[str]) -> Tensor:
    """These variables side by side, shape (m, d)."""
    return torch.cat([x[name].reshape(len(x[name]), math.prod(x[name].shape[1:])) for name in names], -1)


def select(x: Point, rows: Any) -> Point:
    """Some rows of a point."""
    return {name: value[rows] for name, value in x.items()}


def unpack(flat: Tensor, like: Point, names: Sequence[str]) -> Point:
    """The inverse of :func:`pack`."""
    found, start = {}, 0
    for name in names:
        size = math.prod(like[name].shape[1:])
        found[name] = flat[:, start : start + size].reshape(len(flat), *like[name].shape[1:])
        start += size
    return found


def _curvature(density: Density, x: Point, block: Block) -> Tensor:
    """Minus the Hessian of the log density in a block's variables, or its diagonal, for every row."""
    flat = pack(x, block.names)
    if block.is_diagonal:
        return -_products(density, x, block.names, [torch.ones_like(flat)])[0]
    basis = torch.eye(flat.shape[1], dtype=flat.dtype)
    return -torch.stack(_products(density, x, block.names, [row.expand_as(flat) for row in basis]), 1)


def _products(density: Density, x: Point, names: Sequence[str], tangents: Sequence[Tensor]) -> list[Tensor]:
    """The Hessian of every row's log density times each tangent, (m, d)."""
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = {name: x[name] if x[name].requires_grad else x[name].detach().requires_grad_() for name in names}
        slope = pack(density.slope({**x, **leaves}, names), names)
        found = []
        for tangent in tangents:
            if not slope.requires_grad:  # a constant slope
                found.append(torch.zeros_like(slope))
                continue
            products = torch.autograd.grad(
                (slope * tangent).sum(),
                list(leaves.values()),
                create_graph=keep,
                retain_graph=True,
                materialize_grads=True,
            )
            found.append(pack(dict(zip(names, products, strict=True)), names))
    return found


def close(a: Tensor, b: Tensor, scale: Any = None) -> bool:
    """Whether two tensors agree to half of their digits, beside the largest number in them."""
    tolerance = math.sqrt(torch.finfo(a.dtype).eps)
    scale = b.abs().max() if scale is None else scale
    return bool(((a - b).abs() <= tolerance * (scale + b.abs())).all())  # NaN is not


@torch.no_grad()
def _find_blocks(energy: Energy, x: Point, moving: Sequence[str]) -> tuple[Block, ...]:
    density = Density(energy.log_joint, energy, (), {})
    if energy.resizes:
        x = select(x, slice(16))
    v = energy.batch.v[:, : x[VISIBLE].shape[1]]
    spread = (v - v.mean(0)).square().mean(0).sqrt() + 1e-3
    with torch.random.fork_rng(devices=[]):  # a look at the model draws nothing
        torch.default_generator.manual_seed(0)
        pairs = [[random_points(x, energy.latents, spread) for _ in range(2)] for _ in range(NUM_TRIALS)]

    def affine(names):
        """f(b) - f(a) = f'(a) (b - a), and f'(b) = f'(a), as b differs from a in these names."""
        good = True
        for a, b in pairs:
            b = {**a, **{name: b[name] for name in names}}
            at_a, at_b = (pack(density.slope(u, names), names) for u in (a, b))
            change = (at_a * (pack(b, names) - pack(a, names))).sum(-1)
            f = density.log_prob(a)
            good = good and close(at_a, at_b) and close(density.log_prob(b), f + change, f.abs().max())
        return good

    seen: dict[tuple[str, ...], tuple[bool, bool]] = {}

    def gaussian(names):
        """f'(a + d) + f'(a - d) = 2 f'(a), f(a + d) - f(a - d) = 2 f'(a) d; and what the curvature is like."""
        good, products, diagonals, tangent = True, [], [], None
        for a, b in pairs:
            flat, d = pack(a, names), pack(b, names) - pack(a, names)
            here, up, down = ({**a, **unpack(flat + k * d, a, names)} for k in (0, 1, -1))
            middle, above, below = (pack(density.slope(u, names), names) for u in (here, up, down))
            good = good and close(0.5 * (above + below), middle, above.abs().max())
            f_up = density.log_prob(up)
            good = good and close(f_up - density.log_prob(down), 2 * (middle * d).sum(-1), f_up.abs().max())
            if not good:
                return False
            tangent = d[:1] if tangent is None else tangent
            rows = tangent.expand_as(flat)
            product, row_sums = _products(density, here, names, [rows, torch.ones_like(flat)])
            products.append(product)
            diagonals.append(row_sums * rows)
        product, diagonal = torch.stack(products), torch.stack(diagonals)
        constant, is_diagonal = close(product, product[:1, :1]), close(product, diagonal)
        seen[names] = constant, is_diagonal
        return constant or is_diagonal or flat.shape[1] <= MAX_FULL

    blocks = []
    kinds = {name: energy.latents[name].kind for name in moving if name in energy.latents}
    real = [VISIBLE] if VISIBLE in moving and x[VISIBLE].shape[1] else []
    real += [name for name, kind in kinds.items() if kind == "real"]
    groups, rest = _partition(tuple(real), gaussian)
    blocks += [Block("gaussian", names, *seen[names]) for names in groups]
    blocks += [Block("free", (name,)) for name in rest]
    soft = tuple(name for name, kind in kinds.items() if kind in ("bits", "onehot"))
    groups, rest = _partition(soft, affine)
    blocks += [Block("affine", names) for names in groups]
    for name in rest:
        multilinear = is_multilinear(density.log_prob, x, energy.latents, name)
        blocks.append(Block("units", (name,), is_multilinear=multilinear))
    blocks += [Block("units", (name,)) for name, kind in kinds.items() if kind == "labels"]
    return tuple(blocks)


def _partition(
    names: tuple[str, ...], test: Callable[[tuple[str, ...]], bool]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Groups of names, as large as pass the test together, and the names that fail it by themselves."""
    if not names:
        return [], []
    if test(names):
        return [names], []
    groups: list[tuple[str, ...]] = []
    rest = []
    for name in names:
        for i, group in enumerate(groups):
            if test((*group, name)):
                groups[i] = (*group, name)
                break
        else:
            if test((name,)):
                groups.append((name,))
            else:
                rest.append(name)
    return groups, rest


def random_points(x: Point, latents: Mapping[str, Latent], spread: Tensor) -> Point:
    """Anywhere that the variables may be."""
    found = {}
    for name, value in x.items():
        latent = latents.get(name)
        if latent is None or latent.kind == "real":
            scale = spread if latent is None else 1.0
            found[name] = value + scale * torch.randn_like(value)
        else:
            found[name] = random_labels(latent, len(value), value.dtype)
    return found


def random_labels(latent: Latent, m: int, dtype: Any) -> Tensor:
    """Values of a discrete site, all as likely, for m rows."""
    support = latent.support(dtype)
    return support[torch.randint(len(support), (m, *latent.units))]


def replaced(value: Tensor, latent: Latent, unit: int, new: Tensor) -> Tensor:
    """A site's value with one unit, counted in order, at another value: one for all rows, or one for each."""
    flat = value.reshape(len(value), -1, *value.shape[1 + len(latent.units) :]).clone()
    flat[:, unit] = new
    return flat.reshape(value.shape)


def is_multilinear(log_prob: Callable[[Point], Tensor], seen: Point, latents: Mapping[str, Latent], name: str) -> bool:
    """f(b) - f(a) = f'(a) (b - a) as b differs from a in a single unit, for every unit."""
    with torch.random.fork_rng(devices=[]):  # a look at the model draws nothing
        torch.default_generator.manual_seed(1)
        a, b = (random_points(seen, latents, torch.ones(())) for _ in range(2))
    latent, f = latents[name], log_prob(a)
    with torch.enable_grad():
        soft = a[name].detach().requires_grad_()
        (slope,) = torch.autograd.grad(log_prob({**a, name: soft}).sum(), soft, materialize_grads=True)
    others = b[name].reshape(len(f), -1, *b[name].shape[1 + len(latent.units) :])

    def holds(unit):
        other = replaced(a[name], latent, unit, others[:, unit])
        expected = (slope * (other - a[name])).reshape(len(f), -1).sum(-1)
        return close(log_prob({**a, name: other}), f + expected, f.abs().max())

    return all(holds(unit) for unit in range(others.shape[1]))
