"""The linear system H x = ∂J/∂φ of the implicit function theorem, and three ways to solve it."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .problem import Bilevel, Gradient, added

__all__ = ["LinearSystem", "descended", "flat", "nystrom", "pulled_back", "ratio", "unflat"]


class LinearSystem:
    """The linear system at the present φ, all of it with the same random numbers.

    :ivar loss: J.
    :ivar direct: ∂J/∂θ.
    :ivar rhs: ∂J/∂φ as one flat vector.
    """

    def __init__(self, problem: Bilevel):
        theta, self._phi = list(problem.theta), list(problem.phi)
        outer = problem.outer()
        gradients = torch.autograd.grad(outer, [*theta, *self._phi], allow_unused=True)
        self.loss, self.direct = outer.detach(), gradients[: len(theta)]
        self.rhs = flat(gradients[len(theta) :], self._phi)
        self._theta = theta
        # G and its gradient are evaluated once; every product is a pass back through them
        self._slopes = torch.autograd.grad(problem.inner(), self._phi, create_graph=True, allow_unused=True)

    def _products(self, x: Tensor, inputs: Sequence[Tensor]) -> Gradient:
        return pulled_back(self._slopes, unflat(x, self._phi), inputs)

    def hessian(self, x: Tensor) -> Tensor:
        """∂²G/∂φ² x, flat."""
        return flat(self._products(x, self._phi), self._phi)

    def gradient(self, x: Tensor) -> Gradient:
        """∂J/∂θ - ∂²G/∂θ∂φ x."""
        return self._total(self._products(x, self._theta))

    def both(self, x: Tensor) -> tuple[Gradient, Tensor]:
        """:meth:`gradient` and :meth:`hessian` in one pass."""
        found = self._products(x, [*self._theta, *self._phi])
        return self._total(found[: len(self._theta)]), flat(found[len(self._theta) :], self._phi)

    def _total(self, cross: Gradient) -> Gradient:
        return [added(a, None if b is None else -b) for a, b in zip(self.direct, cross, strict=True)]


def pulled_back(slopes: Gradient, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> Gradient:
    """Σ_i weight_i · ∂slope_i/∂inputs, which may be asked for again."""
    moving = [(g, w) for g, w in zip(slopes, weights, strict=True) if g is not None and g.requires_grad]
    if not moving:
        return [None] * len(inputs)
    ends, along = zip(*moving, strict=True)
    return torch.autograd.grad(ends, inputs, along, retain_graph=True, allow_unused=True)


def flat(values: Gradient, like: Sequence[Tensor]) -> Tensor:
    """The values side by side in one vector; None is 0, in the shape of ``like``."""
    if not like:
        return torch.zeros(0)
    return torch.cat([(torch.zeros_like(p) if x is None else x).reshape(-1) for x, p in zip(values, like, strict=True)])


def unflat(x: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What :func:`flat` put side by side, in the shapes of ``like`` again."""
    parts = x.split([p.numel() for p in like]) if like else ()
    return [part.view_as(p) for part, p in zip(parts, like, strict=True)]


def ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 where y is 0."""
    return torch.where(y != 0, x / torch.where(y != 0, y, 1.0), 0.0)


Product = Callable[[Tensor], Tensor]
Solution = tuple[Tensor, Tensor, Tensor]


def descended(product: Product, rhs: Tensor, num_steps: int, conjugate: bool, is_captured: bool) -> Solution:
    """x ← x + α p from x = 0, stopped where the curvature along p is not positive.

    Conjugate gradients, stopped as in Newton-CG (Nocedal and Wright 2006, section 7.1); or the Neumann series, p the
    residual itself and α the inverse of the largest ‖A r‖/‖r‖ met, which the residuals' own growth finds. Captured,
    the products after the stop are still taken, and change nothing.
    """
    x, r, p = torch.zeros_like(rhs), rhs, rhs
    least, largest = rhs.new_tensor(math.inf), rhs.new_zeros(())
    square = r.dot(r)
    tiny = torch.finfo(rhs.dtype).eps ** 2 * square
    goes_on = square > tiny
    for _ in range(num_steps):
        if not is_captured and not goes_on:
            break
        image = product(p)
        bend, extent = p.dot(image), p.dot(p)
        least = torch.where(goes_on, torch.minimum(least, ratio(bend, extent)), least)
        goes_on = goes_on & (bend > 0)
        if conjugate:
            length = ratio(square, bend)
        else:
            largest = torch.maximum(largest, ratio(image.dot(image), extent).sqrt())
            length = ratio(torch.ones_like(largest), largest)
        length = torch.where(goes_on, length, 0.0)
        x, r = x + length * p, r - length * image
        previous, square = square, r.dot(r)
        p = r + ratio(square, previous) * p if conjugate else r
        goes_on = goes_on & (square > tiny)
    return x, r, least


def nystrom(product: Product, rhs: Tensor, num_steps: int, damping: float) -> Solution:
    """(Â + damping I)⁻¹ b with  of rank ``num_steps``, from A's action on a random subspace.

    Hataya and Yamada 2023 (arXiv:2302.09726), with a Gaussian sketch instead of columns (Frangella, Tropp and Udell
    2023). Directions of the sketch without positive curvature are left out.
    """
    rank = min(num_steps, len(rhs))
    basis = torch.linalg.qr(torch.randn(len(rhs), rank, dtype=rhs.dtype, device=rhs.device))[0].T
    images = torch.stack([product(b) for b in basis])
    core = images @ basis.T
    values, vectors = torch.linalg.eigh(0.5 * (core + core.T))
    kept = values > math.sqrt(torch.finfo(rhs.dtype).eps) * values.abs().max()
    scale = torch.where(kept, torch.where(kept, values, 1.0).rsqrt(), 0.0)
    root = scale[:, None] * (vectors.T @ images)  # Â = BᵀB
    _, singular, directions = torch.linalg.svd(root, full_matrices=False)
    along = directions @ rhs
    held = singular > torch.finfo(rhs.dtype).eps * singular.max()
    x = torch.where(held, along / torch.where(held, singular.square() + damping, 1.0), 0.0) @ directions
    if damping > 0:
        x = x + (rhs - torch.where(held, along, 0.0) @ directions) / damping
    return x, rhs - product(x) - damping * x, values.min()
