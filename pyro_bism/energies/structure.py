"""Which variables of an energy have conditionals in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .density import (
    MAX_FULL,
    VISIBLE,
    Block,
    Density,
    Latent,
    Point,
    check_affine,
    check_gaussian,
    close,
    curvature,
    pack,
    random_labels,
    select,
    unpack,
)

if TYPE_CHECKING:
    from .energy import Energy
    from .proof import Proof

MAX_ROWS = 2**10  # of second derivatives that are taken at once


@torch.no_grad()
def find_blocks(energy: Energy, x: Point, proof: Proof, moving: Sequence[str]) -> tuple[Block, ...]:
    """What is proved has its closed form, and what is not has it by declaration.

    :raises ValueError: for a declaration that does not hold at x.
    """
    degrees, log_prob = proof.degrees, energy.log_joint
    names = [VISIBLE] if VISIBLE in moving and energy.size(VISIBLE) else []
    names += [name for name in moving if name in energy.latents]
    kinds = {name: energy.latents[name].kind for name in moving if name in energy.latents}
    real = tuple(name for name in names if kinds.get(name, "real") == "real")
    soft = tuple(name for name in names if kinds.get(name) in ("bits", "onehot"))

    def is_constant(names: Sequence[str]) -> bool:
        return not degrees.beside(names, 2)

    def is_separable(names: Sequence[str]) -> bool:
        """Whether no term has two entries of these variables."""
        return set(names) <= proof.separable and all(
            len([name for name, _ in term if name in names]) <= 1 for term in degrees.terms
        )

    def gaussian(names: tuple[str, ...]) -> bool:
        kept = is_constant(names) or is_separable(names) or sum(map(energy.size, names)) <= MAX_FULL
        return degrees.within(names) <= 2 and kept

    def is_diagonal(names: tuple[str, ...]) -> bool:
        if is_separable(names) or not is_constant(names):
            return is_separable(names)
        return _is_diagonal(second_derivatives(log_prob, x, names))

    trial = _Trial(energy, x)
    blocks: list[Block] = []
    rest: list[str] = []
    groups, left = _partition(real, gaussian)
    for group in groups:
        if trial.is_gaussian(group):
            blocks.append(Block("gaussian", group, is_constant(group), is_diagonal(group)))
        else:
            left += group
    for name in left:
        if energy.declared.get(name) != "gaussian":
            blocks.append(Block("free", (name,)))
            continue
        # a polynomial in it of degree 2, if the user is right: what stands beside it is what its precision may read
        if not is_constant((name,)) and energy.size(name) > MAX_FULL:
            raise ValueError(
                f"{name}: declared 'gaussian', with a precision of {energy.size(name)} variables for every row; "
                f"at most {MAX_FULL} are taken."
            )
        blocks.append(Block("gaussian", (name,), is_constant((name,)), is_declared=True))
    groups, left = _partition(soft, lambda names: degrees.within(names) <= 1)
    for group in groups:
        if trial.is_affine(group):
            blocks.append(Block("affine", group))
        else:
            rest += group
    for name in [*left, *rest]:
        if energy.declared.get(name) == "affine":
            blocks.append(Block("affine", (name,), is_declared=True))
            continue
        multilinear = _is_multilinear(proof, log_prob, x, energy.latents[name], name) and trial.is_quadratic(name)
        blocks.append(Block("units", (name,), is_multilinear=multilinear))
    blocks += [Block("units", (name,)) for name, kind in kinds.items() if kind == "labels"]
    for block in blocks:
        if block.is_declared:
            check_declared(energy, x, block)
    return tuple(blocks)


def check_declared(energy: Energy, x: Point, block: Block) -> None:
    """Check whether log p̃ has the structure that the user declares of a block.

    :raises ValueError: where it has not, at x.
    """
    density = Density(energy.log_joint, energy, (), {})
    if block.kind == "affine":
        check_affine(density, x, block.names)
    else:
        first = select(x, slice(1)) if energy.resizes else x
        precision = curvature(density, first if block.is_constant else x, block)
        check_gaussian(density, x, block, precision[0] if block.is_constant else precision)


class _Trial:
    """One look at what a proof says: a gradient that a program has altered by a hook shows here and nowhere else."""

    def __init__(self, energy: Energy, x: Point):
        self.density = Density(energy.log_joint, energy, (), {})
        if energy.resizes:
            x = select(x, slice(16))
        v = energy.batch.v[:, : x[VISIBLE].shape[1]]
        spread = (v - v.mean(0)).square().mean(0).sqrt() + 1e-3
        with torch.random.fork_rng(devices=[]):  # a look at the model draws nothing
            torch.default_generator.manual_seed(0)
            self.a, self.b = (random_points(x, energy.latents, spread) for _ in range(2))

    def is_affine(self, names: tuple[str, ...]) -> bool:
        """f(b) - f(a) = f'(a) (b - a), and f'(b) = f'(a), as b differs from a in these names."""
        a, b = self.a, {**self.a, **{name: self.b[name] for name in names}}
        at_a, at_b = (pack(self.density.slope(u, names), names) for u in (a, b))
        change = (at_a * (pack(b, names) - pack(a, names))).sum(-1)
        f = self.density.log_prob(a)
        return close(at_a, at_b) and close(self.density.log_prob(b), f + change, f.abs().max())

    def is_quadratic(self, name: str) -> bool:
        """f(b) - f(a) = ½ (f'(a) + f'(b)) (b - a), as b differs from a in this one."""
        a, b = self.a, {**self.a, name: self.b[name]}
        slope = 0.5 * (self.density.slope(a, (name,))[name] + self.density.slope(b, (name,))[name])
        change = (slope * (b[name] - a[name])).reshape(len(slope), -1).sum(-1)
        f = self.density.log_prob(a)
        return close(self.density.log_prob(b), f + change, f.abs().max())

    def is_gaussian(self, names: tuple[str, ...]) -> bool:
        """f'(a + d) + f'(a - d) = 2 f'(a), f(a + d) - f(a - d) = 2 f'(a) d."""
        flat = pack(self.a, names)
        d = pack(self.b, names) - flat
        here, up, down = ({**self.a, **unpack(flat + k * d, self.a, names)} for k in (0, 1, -1))
        middle, above, below = (pack(self.density.slope(u, names), names) for u in (here, up, down))
        f = self.density.log_prob(up)
        change = f - self.density.log_prob(down)
        return close(0.5 * (above + below), middle, above.abs().max()) and close(
            change, 2 * (middle * d).sum(-1), f.abs().max()
        )


def second_derivatives(log_prob: Callable[[Point], Tensor], x: Point, names: Sequence[str]) -> Tensor:
    """The Hessian of a row's log density in these variables, where it is the same everywhere: shape (d, d)."""
    first = select(x, slice(1))
    tangents = torch.eye(pack(first, names).shape[1], dtype=pack(first, names).dtype)
    found = []
    with torch.enable_grad():
        for part in tangents.split(MAX_ROWS):
            rows = {name: value.detach().repeat(len(part), *[1] * (value.ndim - 1)) for name, value in first.items()}
            leaves = [rows[name].requires_grad_() for name in names]
            total = log_prob(rows).sum()
            slopes = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
            slope = pack(dict(zip(names, slopes, strict=True)), names)
            if not slope.requires_grad:  # a constant slope
                found.append(torch.zeros_like(part))
                continue
            products = torch.autograd.grad((slope * part).sum(), leaves, materialize_grads=True)
            found.append(pack(dict(zip(names, products, strict=True)), names))
    return torch.cat(found)


def _is_diagonal(matrix: Tensor) -> bool:
    scale = matrix.diagonal().abs()
    return bool((matrix - matrix.diag().diag()).abs().le(4 * torch.finfo(matrix.dtype).eps * scale.min()).all())


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


def _is_multilinear(proof: Proof, log_prob: Callable[[Point], Tensor], x: Point, latent: Latent, name: str) -> bool:
    """Proved, or quadratic with a constant matrix in which no unit acts on itself."""
    degree = proof.degrees.within((name,))
    if degree <= 1:
        return True
    if degree > 2 or proof.degrees.beside((name,), 2):
        return False
    matrix = second_derivatives(log_prob, x, (name,))
    tolerance = 8 * torch.finfo(matrix.dtype).eps * matrix.abs().max()
    if latent.kind == "bits":
        return bool((matrix.diagonal().abs() <= tolerance).all())
    k = latent.shape[-1]
    own = torch.stack([matrix[i : i + k, i : i + k] for i in range(0, len(matrix), k)])
    ends = own.diagonal(dim1=-2, dim2=-1)
    # (e_a - e_b)ᵀ H (e_a - e_b) for all values a and b of a unit
    return bool((ends[:, :, None] + ends[:, None] - own - own.mT).abs().le(tolerance).all())
