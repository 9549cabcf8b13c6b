r"""Hypergradients: how the outer gradient sees the inner fit.

.. math:: \frac{dJ}{dθ} = \frac{∂J}{∂θ} + \Big(\frac{dφ^*}{dθ}\Big)^\top \frac{∂J}{∂φ}
          = \frac{∂J}{∂θ} - \frac{∂^2 G}{∂θ\,∂φ}\, x, \qquad \frac{∂^2 G}{∂φ^2}\, x = \frac{∂J}{∂φ}

A strategy is a frozen dataclass of numbers, called with a :class:`Bilevel` problem; it returns a :class:`Result`.
It reads φ and the inner optimiser's state and changes neither. What it carries from step to step is its own state,
made by ``init`` and handed back in the result.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from .optim import DifferentiableOptim, descend, exchanged
from .params import random_state, set_random_state

__all__ = ["Amortized", "Covariance", "Detached", "Exact", "Implicit", "Penalty", "Unrolled"]

MEMORY = 0.99  # of Amortized's running sums, a step
FRACTION = 0.1  # Amortized's rate as a share of 1/λ_max: noise averages out over some ten steps at least
# share of ∂J/∂φ in Amortized's direction: where H has blocks, no power of it leads from one to another
FRESH = 0.1
NUM_KEPT = 5  # states that Unrolled(memory="recompute") keeps: 20 steps are then taken twice at most, 55 three times


@dataclass
class Bilevel:
    """The two losses on one batch, each drawing its own noise, and the tensors that they depend on.

    :ivar outer: J at the parameters in force.
    :ivar inner: G at the parameters in force.
    :ivar posterior: J, with the derivative in θ that it has where q(h|v) is the posterior.
    :ivar covariance: the same, from a sample covariance of the given number of draws.
    :ivar at: the context that puts given tensors in φ's place.
    :ivar placed: the context that puts given values into φ itself, where ``at`` does not reach all that reads it; else
        None.
    :ivar optim: the inner optimiser.
    :ivar buffers: module buffers that every pass moves, and that the next may read (the vectors of ``spectral_norm``).
    :ivar inner_noise: a :meth:`snapshot` before each of the K inner steps just taken, if the strategy repeats them.
    :cvar is_captured: whether what runs is being captured: it can't look at the value of a tensor then.
    """

    outer: Callable[[], Tensor]
    inner: Callable[[], Tensor]
    posterior: Callable[[], Tensor]
    covariance: Callable[[int], Tensor]
    theta: Sequence[Tensor]
    phi: Sequence[Tensor]
    at: Callable[[Sequence[Tensor]], AbstractContextManager]
    optim: PyroOptim
    inner_noise: list[Any] = field(default_factory=list)
    placed: Callable[[Sequence[Tensor]], AbstractContextManager] | None = None
    buffers: Sequence[Tensor] = ()

    is_captured: ClassVar[bool] = False

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(problem, *args)``: what a captured step replaces by its graph."""
        return function(self, *args)

    def snapshot(self) -> Any:
        """What a pass has beside φ and θ: the random state, and the buffers. From it the same pass can be repeated."""
        return random_state(), [buffer.clone() for buffer in self.buffers]

    def restore(self, snapshot: Any) -> None:
        """Take up a :meth:`snapshot`."""
        noise, values = snapshot
        set_random_state(noise)
        with torch.no_grad():
            for buffer, value in zip(self.buffers, values, strict=True):
                buffer.copy_(value)

    @contextmanager
    def standing_at(self, values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Inside, φ is ``values``; gives the leaves that stand for it, by which to differentiate, inside too."""
        if self.placed is not None:
            with self.placed(values):
                yield list(self.phi)
        else:
            phi = [p.detach().requires_grad_() for p in values]
            with self.at(phi):
                yield phi

    @cached_property
    def steps(self) -> DifferentiableOptim:
        """The inner optimiser's steps from its present state."""
        return DifferentiableOptim(self.optim, self.phi)


Gradient = Sequence[Tensor | None]


class Result(NamedTuple):
    """What a strategy found.

    :ivar loss: J.
    :ivar gradient: dJ/dθ.
    :ivar state: what it carries to the next step.
    :ivar residual: ‖∂²G x - ∂J/∂φ‖ / ‖∂J/∂φ‖ of the linear system; 0 if there is none.
    :ivar curvature: the least curvature of G that the solver met; infinite if it looks at none.
    """

    loss: Tensor
    gradient: Gradient
    state: Any = None
    residual: Tensor | float = 0.0
    curvature: Tensor | float = math.inf


class Hypergradient(Protocol):
    """What BiSM asks of a strategy.

    :cvar differentiates_inner: whether it needs second derivatives of G in φ.
    :cvar unrolls: whether it differentiates the inner optimiser's steps.
    :cvar reparameterises: whether the outer loss's draws of h must carry a path to φ.
    :cvar repeats_noise: whether it wants ``Bilevel.inner_noise``.
    :cvar resets_noise: whether it sets the random state: it is then compiled in parts (``Bilevel.run``), not whole.
    :cvar holds_theta: whether it takes the score as a function in which θ is a number.
    :cvar cure: what to try where the gradient overflows.
    """

    differentiates_inner: ClassVar[bool] = True
    unrolls: ClassVar[bool] = False
    reparameterises: ClassVar[bool] = True
    repeats_noise: ClassVar[bool] = False
    resets_noise: ClassVar[bool] = False
    holds_theta: ClassVar[bool] = False
    cure: ClassVar[str] = "use Detached()"

    def check(self, loss: Any, pair: Any) -> None:
        """:raises ValueError: where the strategy does not fit the outer loss, or the model and its guide."""
        return

    def init(self, phi: Sequence[Tensor]) -> Any:
        """The state before the first step; None if there is none."""
        return None

    def __call__(self, problem: Bilevel, state: Any) -> Result: ...


def slopes(problem: Bilevel, loss: str, params: str) -> tuple[Tensor, Gradient]:
    """J or G (``"outer"`` or ``"inner"``) and its gradient in θ or φ (``"theta"`` or ``"phi"``)."""
    value, leaves = getattr(problem, loss)(), getattr(problem, params)
    return value.detach(), torch.autograd.grad(value, leaves, allow_unused=True) if leaves else []


def norm(gradient: Gradient) -> Tensor:
    """‖gradient‖ over all parameters, on whichever devices; 0 if there is none."""
    norms = [torch.linalg.vector_norm(g.detach()) for g in gradient if g is not None]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms])) if norms else torch.zeros(())


def _in_theta(loss: Tensor, theta: Sequence[Tensor]) -> Result:
    return Result(loss.detach(), torch.autograd.grad(loss, theta, allow_unused=True))


def require_hypergradient(strategy: Any) -> None:
    """:raises ValueError: for what is no strategy; a class is none."""
    wanted = [name for name in vars(Hypergradient) if not name.startswith("_")]
    missing = [name for name in wanted if not hasattr(strategy, name)]
    if isinstance(strategy, type) or not callable(strategy) or missing:
        raise ValueError(
            f"hypergradient={strategy!r} is not a strategy. Pass an instance, such as Amortized() or "
            "Unrolled(5); one of your own derives from hypergradients.Hypergradient."
        )


@dataclass(frozen=True)
class Detached(Hypergradient):
    """dJ/dθ ≈ ∂J/∂θ: the guide's dependence on θ is left out (the paper's N = 0).

    Biased unless the guide can reach the posterior *and* the loss is stationary in φ there; the linear-Gaussian
    model shows an error of more than the gradient's own length.
    """

    differentiates_inner = False

    def __call__(self, problem: Bilevel, state: Any) -> Result:
        return _in_theta(problem.outer(), problem.theta)


@dataclass(frozen=True)
class Unrolled(Hypergradient):
    """Differentiates through N steps of the inner optimiser (Bao et al. 2020, Algorithm 1).

    From the fitted φ⁰ = φ: φⁿ⁺¹ = φⁿ - step(∇_φ G(θ, φⁿ)), each step with fresh noise; the gradient is that of
    θ ↦ J(θ, φᴺ(θ)). The N steps are then thrown away. ``Unrolled(0)`` is ``Detached()``.

    :param num_steps: N. Past the inner loop's stability limit (a learning rate too high for the curvature) the
        gradient explodes.
    :param memory: ``"store"`` keeps what every step computed: memory grows with N. ``"recompute"`` keeps five
        states of φ and the optimiser, whatever N is, and takes the steps from them again on the way back (Griewank and
        Walther 2000): the same gradient. Besides the pass that is differentiated a step is then taken once on average
        for N = 5, 1.75 times for N = 20, 2.5 times for N = 50.
    """

    cure = "unroll fewer steps, or use Detached()"

    num_steps: int = 5
    memory: Literal["store", "recompute"] = "store"

    def __post_init__(self):
        if self.num_steps < 0:
            raise ValueError(f"num_steps must not be negative, got {self.num_steps}.")
        if self.memory not in ("store", "recompute"):
            raise ValueError(f"memory must be 'store' or 'recompute', got {self.memory!r}.")

    @property
    def differentiates_inner(self) -> bool:  # type: ignore[override]
        return self.num_steps > 0

    @property
    def unrolls(self) -> bool:  # type: ignore[override]
        return self.num_steps > 0

    @property
    def resets_noise(self) -> bool:  # type: ignore[override]
        return self.unrolls and self.memory == "recompute"

    def __call__(self, problem: Bilevel, state: Any) -> Result:
        if not (problem.phi and self.num_steps):
            return _in_theta(problem.outer(), problem.theta)
        if self.memory == "recompute" or problem.placed is not None:
            return self._recomputed(problem)
        optim, phi = problem.steps.resumed({}), list(problem.phi)
        for _ in range(self.num_steps):
            phi = _step(problem, optim, phi)
        with problem.at(phi):
            return _in_theta(problem.outer(), problem.theta)

    def _recomputed(self, problem: Bilevel) -> Result:
        """J at φᴺ and its gradient, by :func:`_reversal`."""
        kept: list[Any] = [(list(problem.phi), problem.steps.state(), problem.snapshot()), *[None] * NUM_KEPT]
        total: Gradient = []
        behind: Gradient = []
        behind_state: dict[Any, Tensor] = {}
        for n, (legs, place) in zip(range(self.num_steps, -1, -1), _reversal(self.num_steps, NUM_KEPT), strict=True):
            for source, target, steps in legs:
                values, optim, noise = kept[source]
                problem.restore(noise)
                for _ in steps:
                    values, optim = problem.run(_forward, values, optim)
                kept[target] = values, optim, problem.snapshot()
            values, optim, noise = kept[place]
            problem.restore(noise)
            if n == self.num_steps:
                loss, total, behind = problem.run(_last, values)
                final = problem.snapshot()
            else:
                total, behind, behind_state = problem.run(_backward, values, optim, total, behind, behind_state)
        problem.restore(final)
        return Result(loss, total)


def _reversal(num_steps: int, num_kept: int) -> list[tuple[list[tuple[int, int, range]], int]]:
    """How to reach the states N, N - 1, ..., 0 of N steps with ``num_kept`` states in memory, the first in place 0.

    For each, the legs (from a place, to a place, which steps between), and the place where it then is;
    place ``num_kept`` is for passing use. A step is taken at most r times, C(num_kept + r, r) > N, and the fewest times
    in all that is possible (Griewank and Walther 2000, Algorithm 799).
    """

    def longest(places: int, times: int) -> int:
        return math.comb(places + times, places)

    found, kept = [], [0]
    for state in range(num_steps, -1, -1):
        while kept[-1] > state:
            kept.pop()
        legs = []
        while (length := state - kept[-1] + 1) > 2 and (free := num_kept - len(kept) + 1) > 1:
            times = next(r for r in itertools.count(1) if longest(free, r) >= length)
            ahead = min(longest(free, times - 1), length - longest(free - 1, times - 1))
            legs.append((len(kept) - 1, len(kept), range(kept[-1], kept[-1] + ahead)))
            kept.append(kept[-1] + ahead)
        if kept[-1] < state:
            legs.append((len(kept) - 1, num_kept, range(kept[-1], state)))
        found.append((legs, legs[-1][1] if legs else len(kept) - 1))
    return found


def _step(problem: Bilevel, optim: DifferentiableOptim, phi: Sequence[Tensor]) -> list[Tensor]:
    with problem.at(phi):
        loss = problem.inner()
    gradients = torch.autograd.grad(loss, phi, create_graph=True, allow_unused=True)
    return optim.step(phi, gradients)


def _forward(problem: Bilevel, values: Sequence[Tensor], state: dict[Any, Any]) -> tuple[list[Tensor], dict[Any, Any]]:
    """A step of the inner optimiser from φ = ``values`` and its ``state``."""
    optim = problem.steps.resumed(state)
    with problem.standing_at(values) as leaves:
        gradients = torch.autograd.grad(problem.inner(), leaves, allow_unused=True)
    phi = optim.step([p.detach().requires_grad_() for p in values], gradients)
    state = {key: s.detach() if isinstance(s, Tensor) else s for key, s in optim.state().items()}
    return [p.detach() for p in phi], state


def _last(problem: Bilevel, values: Sequence[Tensor]) -> tuple[Tensor, Gradient, Gradient]:
    """J at φ = ``values``, and its gradients in θ and φ."""
    with problem.standing_at(values) as phi:
        loss = problem.outer()
        found = torch.autograd.grad(loss, [*problem.theta, *phi], allow_unused=True)
    return loss.detach(), found[: len(problem.theta)], found[len(problem.theta) :]


def _backward(
    problem: Bilevel,
    values: Sequence[Tensor],
    state: dict[Any, Any],
    total: Gradient,
    behind: Gradient,
    behind_state: dict[Any, Tensor],
) -> tuple[Gradient, Gradient, dict[Any, Tensor]]:
    """One step back: from the gradients in its results those in θ, added to ``total``, in φ and in the state."""
    optim = problem.steps.resumed(state)
    before = {key: s.detach().requires_grad_() for key, s in optim.tensors().items()}
    optim = optim.resumed(before)
    with problem.standing_at(values) as phi:
        gradients = torch.autograd.grad(problem.inner(), phi, create_graph=True, allow_unused=True)
        new_phi = optim.step(phi, gradients)
        new_state = optim.tensors()
        outputs = [(y, g) for y, g in zip(new_phi, behind, strict=True) if g is not None and y.requires_grad]
        outputs += [(new_state[key], g) for key, g in behind_state.items() if new_state[key].requires_grad]
        if not outputs:
            return total, [None] * len(phi), {}
        ends, weights = zip(*outputs, strict=True)
        found = torch.autograd.grad(ends, [*problem.theta, *phi, *before.values()], weights, allow_unused=True)
    first, second = len(problem.theta), len(problem.theta) + len(phi)
    total = [_sum(a, b) for a, b in zip(total, found[:first], strict=True)]
    return total, found[first:second], {k: g for k, g in zip(before, found[second:], strict=True) if g is not None}


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a + b


class _Linear:
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
        self.rhs = _flat(gradients[len(theta) :], self._phi)
        self._theta = theta
        # G and its gradient are evaluated once; every product is a pass back through them
        found = torch.autograd.grad(problem.inner(), self._phi, create_graph=True, allow_unused=True)
        self._moving = [(i, g) for i, g in enumerate(found) if g is not None and g.requires_grad]

    def _products(self, x: Tensor, inputs: Sequence[Tensor]) -> Gradient:
        if not self._moving:
            return [None] * len(inputs)
        parts = unflat(x, self._phi)
        outputs, weights = [g for _, g in self._moving], [parts[i] for i, _ in self._moving]
        return torch.autograd.grad(outputs, inputs, weights, retain_graph=True, allow_unused=True)

    def hessian(self, x: Tensor) -> Tensor:
        """∂²G/∂φ² x, flat."""
        return _flat(self._products(x, self._phi), self._phi)

    def gradient(self, x: Tensor) -> Gradient:
        """∂J/∂θ - ∂²G/∂θ∂φ x."""
        return self._total(self._products(x, self._theta))

    def both(self, x: Tensor) -> tuple[Gradient, Tensor]:
        """:meth:`gradient` and :meth:`hessian` in one pass."""
        found = self._products(x, [*self._theta, *self._phi])
        return self._total(found[: len(self._theta)]), _flat(found[len(self._theta) :], self._phi)

    def _total(self, cross: Gradient) -> Gradient:
        return [_sum(a, None if b is None else -b) for a, b in zip(self.direct, cross, strict=True)]


def _flat(values: Gradient, like: Sequence[Tensor]) -> Tensor:
    if not like:
        return torch.zeros(0)
    return torch.cat([(torch.zeros_like(p) if x is None else x).reshape(-1) for x, p in zip(values, like, strict=True)])


def unflat(x: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = x.split([p.numel() for p in like]) if like else ()
    return [part.view_as(p) for part, p in zip(parts, like, strict=True)]


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 where y is 0."""
    return torch.where(y != 0, x / torch.where(y != 0, y, 1.0), 0.0)


Product = Callable[[Tensor], Tensor]
Solution = tuple[Tensor, Tensor, Tensor]


def _descended(product: Product, rhs: Tensor, num_steps: int, conjugate: bool, is_captured: bool) -> Solution:
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
        least = torch.where(goes_on, torch.minimum(least, _ratio(bend, extent)), least)
        goes_on = goes_on & (bend > 0)
        if conjugate:
            length = _ratio(square, bend)
        else:
            largest = torch.maximum(largest, _ratio(image.dot(image), extent).sqrt())
            length = _ratio(torch.ones_like(largest), largest)
        length = torch.where(goes_on, length, 0.0)
        x, r = x + length * p, r - length * image
        previous, square = square, r.dot(r)
        p = r + _ratio(square, previous) * p if conjugate else r
        goes_on = goes_on & (square > tiny)
    return x, r, least


def _nystrom(product: Product, rhs: Tensor, num_steps: int, damping: float) -> Solution:
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


@dataclass(frozen=True)
class Implicit(Hypergradient):
    """The implicit function theorem at the present φ: dJ/dθ = ∂J/∂θ - ∂²G/∂θ∂φ (∂²G/∂φ² + damping I)⁻¹ ∂J/∂φ.

    Exact where φ minimises G and the system is solved (Lorraine, Vicol, Duvenaud 2020, arXiv:1911.02590). All
    Hessian products of a step share one draw of noise, so that they belong to one symmetric matrix. ``info`` says how
    well the system was solved: ``residual`` is relative to the right-hand side, and a ``curvature`` at or below
    zero says that G has no minimum along a line that the solver took; there it stopped.

    A relaxed latent's Hessian on one draw of noise is far from its mean, and not positive: sum the latents out, or
    take :class:`Amortized`, which averages over the steps.

    :param solver: ``"cg"`` conjugate gradients; ``"neumann"`` the Neumann series, its rate found from the products;
        ``"nystrom"`` a low-rank inverse, best with a ``damping``.
    :param num_steps: Hessian products at most (for ``"nystrom"`` the rank).
    :param damping: added to the Hessian's diagonal.
    """

    cure = "add damping"

    solver: Literal["cg", "neumann", "nystrom"] = "cg"
    num_steps: int = 10
    damping: float = 0.0

    def __post_init__(self):
        if self.solver not in ("cg", "neumann", "nystrom"):
            raise ValueError(f"solver must be 'cg', 'neumann' or 'nystrom', got {self.solver!r}.")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}.")
        if not (self.damping >= 0 and math.isfinite(self.damping)):
            raise ValueError(f"damping must not be negative or infinite, got {self.damping}.")

    def __call__(self, problem: Bilevel, state: Any) -> Result:
        if not problem.phi:
            return _in_theta(problem.outer(), problem.theta)
        system = _Linear(problem)
        if self.solver == "nystrom":
            x, rest, least = _nystrom(system.hessian, system.rhs, self.num_steps, self.damping)
        else:
            product = system.hessian if self.damping == 0 else lambda x: system.hessian(x).add(x, alpha=self.damping)
            conjugate = self.solver == "cg"
            x, rest, least = _descended(product, system.rhs, self.num_steps, conjugate, problem.is_captured)
            least = least - self.damping
        residual = _ratio(rest.norm(), system.rhs.norm())
        return Result(system.loss, system.gradient(x), None, residual, least)


class AmortizedState(NamedTuple):
    """
    :ivar solution: x, in the shapes of φ.
    :ivar direction: a unit vector in the shapes of φ, by power iteration that of the greatest curvature.
    :ivar moments: running sums of dᵀHd and ‖Hd‖² along the direction d.
    """

    solution: Sequence[Tensor]
    direction: Sequence[Tensor]
    moments: Tensor


@dataclass(frozen=True)
class Amortized(Hypergradient):
    """The linear system's solution x is kept from step to step and improved by one Hessian product at each.

    x ← x - ρ (∂²G/∂φ² x - ∂J/∂φ), dJ/dθ ≈ ∂J/∂θ - ∂²G/∂θ∂φ x: SOBA (Dagréou, Ablin, Vaiter, Moreau 2022,
    arXiv:2201.13409). The noise of single Hessians averages out in x, and so does the minibatches'.

    :param step_size: ρ. None finds it: with d the direction of greatest curvature, carried along by power iteration
        at the price of one more product, ρ is a tenth of E[dᵀHd] / E[‖Hd‖²]. The ratio is 1/λ_max where H is the
        same at every step, and less by as much as it is noisy, as stability in the mean square asks for. A tenth of
        ∂J/∂φ is mixed into d at every step, so that it finds its way into whichever block of H has the most curvature.
    :param num_steps: Hessian products a step.
    """

    cure = "give a smaller step_size"

    step_size: float | None = None
    num_steps: int = 1

    def __post_init__(self):
        if self.step_size is not None and not (self.step_size > 0 and math.isfinite(self.step_size)):
            raise ValueError(f"step_size must be positive and finite, or None, got {self.step_size}.")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}.")

    def init(self, phi: Sequence[Tensor]) -> AmortizedState:
        zeros = [torch.zeros_like(p) for p in phi]
        return AmortizedState(zeros, zeros, phi[0].new_zeros(2) if phi else torch.zeros(2))

    def __call__(self, problem: Bilevel, state: AmortizedState) -> Result:
        if not problem.phi:
            return _in_theta(problem.outer(), problem.theta)._replace(state=state)
        system = _Linear(problem)
        moments: Tensor = state.moments
        curvature: Tensor | float = math.inf
        rate: Tensor | float
        x, d = _flat(state.solution, problem.phi), _flat(state.direction, problem.phi)
        if self.step_size is None:
            d = torch.where(d.any(), d, _unit(system.rhs))  # until there is a direction
            image = system.hessian(d)
            curvature = d.dot(image)
            moments = MEMORY * moments + torch.stack([curvature, image.dot(image)])
            rate = FRACTION * _ratio(moments[0], moments[1])
            d = _unit(_unit(image) + FRESH * _unit(system.rhs))
        else:
            rate = self.step_size
        for n in range(self.num_steps):
            if n < self.num_steps - 1:
                image = system.hessian(x)
            else:
                gradient, image = system.both(x)
            rest = image - system.rhs
            x = x - rate * rest
        residual = _ratio(rest.norm(), system.rhs.norm())
        new = AmortizedState(unflat(x, problem.phi), unflat(d, problem.phi), moments)
        return Result(system.loss, gradient, new, residual, curvature)


def _unit(x: Tensor) -> Tensor:
    norm = x.norm()
    return x / torch.where(norm > 0, norm, 1.0)


class PenaltyState(NamedTuple):
    """
    :ivar psi: the second guide's parameters.
    :ivar optim: the state that the inner optimiser keeps for each.
    :ivar num_steps: taken so far.
    """

    psi: Sequence[Tensor]
    optim: Sequence[dict]
    num_steps: int


@dataclass(frozen=True)
class Penalty(Hypergradient):
    """First derivatives alone: the inner problem becomes a penalty (F2SA; Kwon, Kwon, Wright, Nowak 2023).

    A second guide ψ is fitted to G + J/λ by K steps of the inner optimiser, beside φ and with φ's noise; then
    dJ/dθ ≈ ∂_θ J(θ, ψ) + λ [∂_θ G(θ, ψ) - ∂_θ G(θ, φ)], both G with the same noise (arXiv:2301.10945). The bias is
    O(1/λ). The loss reported is J(θ, ψ).

    :param strength: λ: a number, or a function of the step (from 0). ψ - φ is small as 1/λ, and the noise in it is
        multiplied by λ.
    """

    cure = "lower the strength, and see that it stays positive"

    strength: float | Callable[[int], float] = 100.0

    differentiates_inner = False
    repeats_noise = True
    resets_noise = True

    def __post_init__(self):
        if not callable(self.strength) and not (self.strength > 0 and math.isfinite(self.strength)):
            raise ValueError(f"strength must be positive and finite, or a function of the step, got {self.strength}.")

    def init(self, phi: Sequence[Tensor]) -> PenaltyState:
        return PenaltyState([p.detach().clone() for p in phi], [{} for _ in phi], 0)

    def __call__(self, problem: Bilevel, state: PenaltyState) -> Result:
        if not problem.phi:
            return _in_theta(problem.outer(), problem.theta)._replace(state=state)
        strength = float(self.strength(state.num_steps) if callable(self.strength) else self.strength)
        phi = list(problem.phi)
        # on copies: a step that fails leaves the state as it was
        psi = [p.clone() for p in state.psi]
        optim = [{k: s.clone() if isinstance(s, Tensor) else s for k, s in kept.items()} for kept in state.optim]
        with exchanged(problem.optim, phi, psi, optim):
            for noise in problem.inner_noise:
                fresh = problem.snapshot()
                problem.restore(noise)
                _, fit = problem.run(slopes, "inner", "phi")
                problem.restore(fresh)
                _, match = problem.run(slopes, "outer", "phi")
                both = [_sum(a, None if b is None else b / strength) for a, b in zip(fit, match, strict=True)]
                descend(problem.optim, phi, both)
            loss, raised = problem.run(slopes, "outer", "theta")
            shared = problem.snapshot()
            _, at_psi = problem.run(slopes, "inner", "theta")
        problem.restore(shared)
        _, at_phi = problem.run(slopes, "inner", "theta")
        gradient = []
        for direct, upper, lower in zip(raised, at_psi, at_phi, strict=True):
            apart = _sum(upper, None if lower is None else -lower)
            gradient.append(_sum(direct, None if apart is None else strength * apart))
        return Result(loss, gradient, PenaltyState(psi, optim, state.num_steps + 1))


@dataclass(frozen=True)
class Exact(Hypergradient):
    """The gradient where q(h|v; φ) *is* the posterior p(h|v; θ): no inner problem has to be differentiated.

    The marginal's score then has ∂_θ s(v) = ∇_v E_{q(h|v)}[∂_θ log p̃(v, h; θ)] (Fisher's identity), the derivative in v
    taken through q as well: through the weights of summed-out sites, and through the draws of the others. Away from the
    posterior it is as wrong as the guide is. The score is averaged over the draws, as under ``average="score"``,
    unless the loss has ``average="unbiased"``.
    """

    differentiates_inner = False
    holds_theta = True

    def check(self, loss: Any, pair: Any) -> None:
        relaxed = sorted(pair.softened.difference(pair.averaged))
        if relaxed:
            raise ValueError(
                f"Exact() asks for a guide that is the posterior; the relaxed sites {relaxed} never are. "
                "Sum them out: infer={'enumerate': 'parallel'} and inner_loss=TraceEnum_ELBO()."
            )

    def __call__(self, problem: Bilevel, state: Any) -> Result:
        return _in_theta(problem.posterior(), problem.theta)


@dataclass(frozen=True)
class Covariance(Hypergradient):
    """The score's gradient as a covariance under the guide (VaGES; Bao et al. 2021, arXiv:2010.08258).

    ∂_θ s(v) ≈ E_q[∂_θ ∇_v log p̃(v, h)] + Cov_q(∇_v log p̃(v, h), ∂_θ log p̃(v, h)), the sample covariance of L draws with
    its L - 1, which is the estimate with every draw's leave-one-out mean as control variate; the score itself is
    the mean of ∇_v log (p̃/q) over the same draws. Unbiased at the posterior. No inner problem is differentiated and no
    draw has to be reparameterised: sites may be discrete, and those that are relaxed or summed out in the inner
    loss are drawn as discrete here. For losses that read the score at one point (denoising ones).

    :param num_particles: L, at least 2.
    """

    num_particles: int = 2

    differentiates_inner = False
    reparameterises = False

    def __post_init__(self):
        if self.num_particles < 2:
            raise ValueError(f"num_particles must be at least 2 for a covariance, got {self.num_particles}.")

    def check(self, loss: Any, pair: Any) -> None:
        if loss.differentiates_score:
            raise ValueError(
                f"{type(loss).__name__} differentiates the score, of which Covariance() estimates only the value. Use "
                "DenoisingScoreMatching, MultiscaleDenoisingScoreMatching, or another hypergradient."
            )
        if loss.average == "unbiased":
            raise ValueError(
                "Covariance() makes one estimate of the score from all its draws, and average='unbiased' multiplies "
                "two. Take average='score', or another hypergradient."
            )

    def __call__(self, problem: Bilevel, state: Any) -> Result:
        return _in_theta(problem.covariance(self.num_particles), problem.theta)
