"""A log density of points, row by row: its variables, its blocks, gradients and curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..programs.hosts import is_stand_in

if TYPE_CHECKING:
    from .energy import Energy

Point = dict[str, Tensor]

VISIBLE = "(visible)"  # the visible values' name in a point: no site of a program is called so
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
    :ivar is_declared: whether the user says so, and no proof: it is checked wherever it is made use of.
    """

    kind: str
    names: tuple[str, ...]
    is_constant: bool = False
    is_diagonal: bool = False
    is_multilinear: bool = False
    is_declared: bool = False


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
    energy: Energy
    blocks: tuple[Block, ...]
    precisions: Mapping[tuple[str, ...], Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def latents(self) -> Mapping[str, Latent]:
        """By site."""
        return self.energy.latents

    def moving(self, masks: Mapping[str, Any]) -> Density:
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
        for block in self.blocks:
            if block.is_declared and block.kind == "affine" and set(names) <= set(block.names):
                check_affine(self, x, names)
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            part = [x[name] if x[name].requires_grad else x[name].detach().requires_grad_() for name in names]
            value = self.log_prob({**x, **dict(zip(names, part, strict=True))})
            slopes = torch.autograd.grad(value.sum(), part, create_graph=differentiable, materialize_grads=True)
        return value if differentiable else value.detach(), dict(zip(names, slopes, strict=True))

    def precision(self, x: Point, block: Block) -> Tensor:
        """Of a "gaussian" block, or of a part of one, at x: shape (d, d) or (m, d, d); (d,) or (m, d) if diagonal."""
        precision = self.part(block) if block.is_constant else curvature(self, x, block)
        if block.is_declared:
            check_gaussian(self, x, block, precision)
        return precision

    def mixed(self, other: Density, weight: float) -> Density:
        """(1 - weight) · self + weight · other, in logarithms; ``other``'s blocks serve for both.

        :param other: of the same variables. self is a product of Gaussians and coins, which any block allows.
        """

        def log_prob(x: Point) -> Tensor:
            return (1 - weight) * self.log_prob(x) + weight * other.log_prob(x)

        def precision(block: Block) -> Tensor:
            a, b = self.precisions[block.names], other.precisions[block.names]
            if a.ndim < b.ndim:
                a = torch.diag(a)
            return (1 - weight) * a + weight * b

        constant = [block for block in other.blocks if block.names in other.precisions]
        return replace(other, log_prob=log_prob, precisions={block.names: precision(block) for block in constant})


def moments(v: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every column."""
    centre = v.mean(0)
    # not std: where all of v is discrete there is no column, of which it warns
    return centre, (v - centre).square().mean(0).sqrt()


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


def curvature(density: Density, x: Point, block: Block) -> Tensor:
    """Minus the Hessian of the log density in a block's variables, or its diagonal, for every row."""
    flat = pack(x, block.names)
    if block.is_diagonal:
        return -products(density, x, block.names, [torch.ones_like(flat)])[0]
    basis = torch.eye(flat.shape[1], dtype=flat.dtype)
    return -torch.stack(products(density, x, block.names, [row.expand_as(flat) for row in basis]), 1)


def products(density: Density, x: Point, names: Sequence[str], tangents: Sequence[Tensor]) -> list[Tensor]:
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


@torch.no_grad()
def check_affine(density: Density, x: Point, names: Sequence[str]) -> None:
    """Check whether the log density is affine in these bits or one-hot vectors, whatever the user says.

    Looked at where they are all 0, where the bits are all 1, and at two configurations drawn at random.

    :raises ValueError: where it is not.
    """
    _refuse_capture(x, names)
    density = replace(density, blocks=())
    zero = {**x, **{name: torch.zeros_like(x[name]) for name in names}}
    value, slope = density.value_and_slope(zero, names)
    g = pack(slope, names)
    with torch.random.fork_rng(devices=[]):  # a look at the model draws nothing
        torch.default_generator.manual_seed(0)
        others = [{name: random_labels(density.latents[name], len(g), g.dtype) for name in names} for _ in range(2)]
    if all(density.latents[name].kind == "bits" for name in names):
        others.append({name: torch.ones_like(x[name]) for name in names})
    for other in others:
        there, at = density.value_and_slope({**x, **other}, names)
        change = (g * pack(other, names)).sum(-1)
        if not (close(pack(at, names), g) and close(there, value + change, value.abs().max() + change.abs().max())):
            raise ValueError(
                f"{_sites(density, names)} declared infer={{'structure': 'affine'}}, but the energy is not affine in "
                "its value: its gradient differs between configurations. Take the declaration out: the units are "
                "then drawn and summed one by one."
            )


@torch.no_grad()
def check_gaussian(density: Density, x: Point, block: Block, precision: Tensor) -> None:
    """Check whether the log density is the quadratic with this precision, whatever the user says.

    Looked at at its mode and three standard deviations off it: the value, the gradient, and a product with the Hessian.

    :raises ValueError: where it is not.
    """
    names = block.names
    _refuse_capture(x, names)
    density = replace(density, blocks=())
    flat = pack(x, names)
    value, slope = density.value_and_slope(x, names)
    g = pack(slope, names)
    full = torch.diag_embed(precision) if block.is_diagonal else precision
    full = full.expand(len(flat), *full.shape[-2:])
    factor, failed = torch.linalg.cholesky_ex(full)
    mode = flat + torch.cholesky_solve(g[..., None], factor)[..., 0]
    signs = torch.ones_like(flat)
    signs[:, 1::2] = -1
    off = 3 * torch.linalg.solve_triangular(factor.mT, signs[..., None] / signs.shape[1] ** 0.5, upper=True)[..., 0]
    top = value + 0.5 * (g * (mode - flat)).sum(-1)
    good = not failed.any()
    for step in (0 * off, off, -off):
        there = {**x, **unpack(mode + step, x, names)}
        f, at = density.value_and_slope(there, names)
        curved = (full @ step[..., None])[..., 0]
        expected = top - 0.5 * (step * curved).sum(-1)
        size = g.abs().max() + (full @ signs[..., None]).abs().max()
        good = good and close(f, expected, value.abs().max() + (top - value).abs().max())
        good = good and close(pack(at, names), -curved, size)
        product = -products(density, there, names, [signs])[0]
        good = good and close(product, (full @ signs[..., None])[..., 0])
    if not good:
        raise ValueError(
            f"{_sites(density, names)} declared infer={{'structure': 'gaussian'}}, but the energy is not quadratic in "
            "its value with a positive definite precision: at the mode and a few standard deviations off it, value, "
            "gradient or curvature are others. Take the declaration out: integrals are then done by quadrature, draws "
            "by Langevin dynamics or NUTS."
        )


def _sites(density: Density, names: Sequence[str]) -> str:
    sites = [s.name for s in density.energy.sites if not s.is_discrete] if VISIBLE in names else []
    sites += [name for name in names if name != VISIBLE]
    return f"Site{'s' * (len(sites) > 1)} {', '.join(map(repr, sites))} {'are' if len(sites) > 1 else 'is'}"


def _refuse_capture(x: Point, names: Sequence[str]) -> None:
    if any(is_stand_in(x[name]) for name in x):
        raise ValueError(
            f"The structure of {', '.join(map(repr, names))} is declared, which is checked at every step: a captured "
            "step can't do that. Take jit=False."
        )


def close(a: Tensor, b: Tensor, scale: Any = None) -> bool:
    """Whether two tensors agree to half of their digits, beside the largest number in them."""
    tolerance = math.sqrt(torch.finfo(a.dtype).eps)
    scale = b.abs().max() if scale is None else scale
    return bool(((a - b).abs() <= tolerance * (scale + b.abs())).all())  # NaN is not


def random_labels(latent: Latent, m: int, dtype: Any) -> Tensor:
    """Values of a discrete site, all as likely, for m rows."""
    support = latent.support(dtype)
    return support[torch.randint(len(support), (m, *latent.units))]


def replaced(value: Tensor, latent: Latent, unit: int, new: Tensor) -> Tensor:
    """A site's value with one unit, counted in order, at another value: one for all rows, or one for each."""
    flat = value.reshape(len(value), -1, *value.shape[1 + len(latent.units) :]).clone()
    flat[:, unit] = new
    return flat.reshape(value.shape)
