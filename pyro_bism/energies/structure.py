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
    close,
    pack,
    products,
    random_labels,
    replaced,
    select,
    unpack,
)

if TYPE_CHECKING:
    from .energy import Energy

NUM_TRIALS = 3


@torch.no_grad()
def find_blocks(energy: Energy, x: Point, moving: Sequence[str]) -> tuple[Block, ...]:
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
        good, along, diagonals, tangent = True, [], [], None
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
            product, row_sums = products(density, here, names, [rows, torch.ones_like(flat)])
            along.append(product)
            diagonals.append(row_sums * rows)
        product, diagonal = torch.stack(along), torch.stack(diagonals)
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
