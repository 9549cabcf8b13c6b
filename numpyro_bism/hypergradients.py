r"""Hypergradients: how the outer gradient sees the inner fit.

.. math:: \frac{dJ}{dθ} = \frac{∂J}{∂θ} + \Big(\frac{dφ^*}{dθ}\Big)^\top \frac{∂J}{∂φ}
          = \frac{∂J}{∂θ} - \frac{∂^2 G}{∂θ\,∂φ}\, x, \qquad \frac{∂^2 G}{∂φ^2}\, x = \frac{∂J}{∂φ}

A strategy is a frozen dataclass of numbers, called with a :class:`Bilevel` problem; it returns a :class:`Result`.
It reads φ and the inner optimiser's state and changes neither. What it carries from step to step is its own state,
made by ``init`` and handed back in the result.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from .optim import differentiable_update

__all__ = ["Amortized", "Covariance", "Detached", "Exact", "Implicit", "Penalty", "Unrolled"]

MAX_FUSED, FUSED_STEPS = 20, 5
MEMORY = 0.99  # of Amortized's running sums, a step
FRACTION = 0.1  # Amortized's rate as a share of 1/λ_max: noise averages out over some ten steps at least
# share of ∂J/∂φ in Amortized's direction: where H has blocks, no power of it leads from one to another
FRESH = 0.1
NUM_KEPT = 5  # states that Unrolled(memory="recompute") keeps: 20 steps are then taken twice at most, 55 three times


def fused(num_steps: int) -> int:
    """How many inner steps stand in one body of the compiled loop: all of a few, so that there is no loop, else five.

    XLA fuses across them, and a small model's step takes 0.7 times as long. Steps that are differentiated hand on what
    the way back needs; copied from body to body it costs a 560 x 400 RBM another third of its time and memory.
    More would take long to compile.
    """
    return num_steps if num_steps <= MAX_FUSED else FUSED_STEPS


@dataclass(frozen=True)
class Bilevel:
    """The two losses on one batch, as functions of (rng_key, θ, φ).

    :ivar outer: J.
    :ivar inner: G.
    :ivar posterior: J, with the derivative in θ that it has where q(h|v) is the posterior.
    :ivar covariance: the same, from a sample covariance; it takes the number of draws besides.
    :ivar optim: the inner optimiser, in NumPyro's form.
    :ivar inner_keys: the keys of the K inner steps just taken.
    :ivar ahead: the noise of the strategy's own keys, those of ``Hypergradient.ahead``, and G as a function of
        (noise, θ, φ); None where each step is to draw its own.
    """

    outer: Callable[[Array, Any, Any], Array]
    inner: Callable[[Array, Any, Any], Array]
    posterior: Callable[[Array, Any, Any], Array]
    covariance: Callable[[Array, Any, Any, int], Array]
    optim: Any
    inner_keys: Array
    ahead: tuple[Any, Callable[[Any, Any, Any], Array]] | None = None


class Result(NamedTuple):
    """What a strategy found.

    :ivar loss: J.
    :ivar gradient: dJ/dθ.
    :ivar state: what it carries to the next step.
    :ivar residual: ‖∂²G x - ∂J/∂φ‖ / ‖∂J/∂φ‖ of the linear system; 0 if there is none.
    :ivar curvature: the least curvature of G that the solver met; infinite if it looks at none.
    """

    loss: Array
    gradient: Any
    state: Any = None
    residual: Array | float = 0.0
    curvature: Array | float = math.inf


class Hypergradient(Protocol):
    """What BiSM asks of a strategy.

    :cvar differentiates_inner: whether it needs second derivatives of G in φ.
    :cvar unrolls: whether it differentiates the inner optimiser's steps.
    :cvar reparameterises: whether the outer loss's draws of h must carry a path to φ.
    :cvar cure: what to try where the gradient overflows.
    """

    differentiates_inner: ClassVar[bool] = True
    unrolls: ClassVar[bool] = False
    reparameterises: ClassVar[bool] = True
    cure: ClassVar[str] = "use Detached()"

    def check(self, loss: Any, pair: Any) -> None:
        """:raises ValueError: where the strategy does not fit the outer loss, or the model and its guide."""
        return

    def init(self, optim: Any, inner_state: Any) -> Any:
        """The state before the first step, from the inner optimiser and its state; None if there is none."""
        return None

    def ahead(self, rng_key: Array) -> Array:
        """The keys of inner steps that it will take, called with this one: their noise is drawn beforehand."""
        return rng_key[None][:0]

    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any, state: Any) -> Result: ...


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

    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any, state: Any) -> Result:
        phi = problem.optim.get_params(inner_state)
        return Result(*jax.value_and_grad(problem.outer, argnums=1)(rng_key, theta, phi))


@dataclass(frozen=True)
class Unrolled(Hypergradient):
    """Differentiates through N steps of the inner optimiser (Bao et al. 2020, Algorithm 1).

    From the fitted φ⁰ = φ: φⁿ⁺¹ = φⁿ - step(∇_φ G(θ, φⁿ)), each step with fresh noise; the gradient is that
    of θ ↦ J(θ, φᴺ(θ)). The N steps are then thrown away. ``Unrolled(0)`` is ``Detached()``.

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

    def ahead(self, rng_key: Array) -> Array:
        # to recompute is to save memory: there every step draws its own
        return self._keys(rng_key)[1] if self.memory == "store" else super().ahead(rng_key)

    def _keys(self, rng_key: Array) -> tuple[Array, Array]:
        key_outer, key_inner = jax.random.split(rng_key)
        return key_outer, jax.random.split(key_inner, self.num_steps)

    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any, state: Any) -> Result:
        key_outer, keys = self._keys(rng_key)
        stores = self.memory == "store"
        noise, inner = problem.ahead if stores and problem.ahead else (keys, problem.inner)

        def step(theta, fast, noise):
            phi = problem.optim.get_params(fast)
            loss, gradient = jax.value_and_grad(inner, argnums=2)(noise, theta, phi)
            return differentiable_update(problem.optim, gradient, fast, loss)

        def last(theta, fast):
            return problem.outer(key_outer, theta, problem.optim.get_params(fast))

        if self.num_steps and not stores:
            return _recomputed(step, last, theta, inner_state, keys)

        def whole(theta):
            fast = inner_state
            if self.num_steps:
                fast, _ = jax.lax.scan(
                    lambda fast, noise: (step(theta, fast, noise), None),
                    fast,
                    noise,
                    length=self.num_steps,
                    unroll=fused(self.num_steps),
                )
            return last(theta, fast)

        return Result(*jax.value_and_grad(whole)(theta))


def _recomputed(step: Callable, last: Callable, theta: Any, start: Any, keys: Array) -> Result:
    """J = last(θ, sᴺ) and its gradient, with sⁿ⁺¹ = step(θ, sⁿ, keyⁿ), by :func:`_reversal`."""
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, start))
    moves = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]  # a count of steps has no derivative

    def parted(leaves):
        return [[x for x, yes in zip(leaves, moves, strict=True) if yes == kind] for kind in (True, False)]

    def joined(moving, still):
        parts = {True: iter(moving), False: iter(still)}
        return jax.tree.unflatten(tree, [next(parts[yes]) for yes in moves])

    plan = _reversal(len(keys), NUM_KEPT)
    # a leg: from which place, to which, the first of its steps and the one after its last
    legs = jnp.array([(a, b, steps.start, steps.stop) for each, _ in plan for a, b, steps in each]).reshape(-1, 4)
    ends = np.cumsum([len(each) for each, _ in plan])
    kept = [jnp.broadcast_to(x, (NUM_KEPT + 1, *x.shape)) for x in leaves]

    def reached(kept, first, end):
        """The legs from one to another."""

        def leg(i, kept):
            source, target, start, stop = legs[i]
            state = jax.tree.unflatten(tree, [x[source] for x in kept])
            state = jax.lax.fori_loop(start, stop, lambda n, state: step(theta, state, keys[n]), state)
            return [x.at[target].set(y) for x, y in zip(kept, jax.tree.leaves(state), strict=True)]

        return jax.lax.fori_loop(first, end, leg, kept)

    kept = reached(kept, 0, ends[0])
    moving, still = parted([x[plan[0][1]] for x in kept])
    loss, found = jax.value_and_grad(lambda t, m: last(t, joined(m, still)), argnums=(0, 1))(theta, moving)

    def back(carry, now):
        kept, total, behind = carry
        n, first, end, place = now
        kept = reached(kept, first, end)
        moving, still = parted([x[place] for x in kept])

        def moved(theta, moving):
            return parted(jax.tree.leaves(step(theta, joined(moving, still), keys[n])))[0]

        in_theta, behind = jax.vjp(moved, theta, moving)[1](behind)
        return (kept, jax.tree.map(jnp.add, total, in_theta), behind), None

    places = np.array([place for _, place in plan])
    rows = (np.arange(len(keys))[::-1], ends[:-1], ends[1:], places[1:])
    (_, total, _), _ = jax.lax.scan(back, (kept, *found), jax.tree.map(jnp.asarray, rows))
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


class _Linear(NamedTuple):
    """The linear system at the present φ, all of it with the same random numbers.

    :ivar loss: J.
    :ivar direct: ∂J/∂θ.
    :ivar rhs: ∂J/∂φ as one flat vector.
    :ivar products: x ↦ (∂²G/∂θ∂φ x, ∂²G/∂φ² x), the latter flat.
    """

    loss: Array
    direct: Any
    rhs: Array
    products: Callable[[Array], tuple[Any, Array]]


def _linearized(rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any) -> _Linear:
    key_outer, key_inner = jax.random.split(rng_key)
    phi = problem.optim.get_params(inner_state)
    loss, (direct, right) = jax.value_and_grad(problem.outer, argnums=(1, 2))(key_outer, theta, phi)
    rhs, unravel = ravel_pytree(right)
    # G and its gradient are evaluated once; every product is a pullback through them
    _, pullback = jax.vjp(lambda t, p: jax.grad(problem.inner, argnums=2)(key_inner, t, p), theta, phi)

    def products(x):
        cross, product = pullback(unravel(x))
        return cross, ravel_pytree(product)[0]

    return _Linear(loss, direct, rhs, products)


def _ratio(x: Array, y: Array) -> Array:
    """x / y, and 0 where y is 0."""
    return jnp.where(y == 0, 0.0, x / jnp.where(y == 0, 1.0, y))


Product = Callable[[Array], Array]
Solution = tuple[Array, Array, Array]


def _descended(product: Product, rhs: Array, num_steps: int, conjugate: bool) -> Solution:
    """x ← x + α p from x = 0, stopped where the curvature along p is not positive.

    Conjugate gradients, stopped as in Newton-CG (Nocedal and Wright 2006, section 7.1); or the Neumann series, p the
    residual itself and α the inverse of the largest ‖A r‖/‖r‖ met, which the residuals' own growth finds.
    """
    tiny = jnp.square(jnp.finfo(rhs.dtype).eps) * rhs.dot(rhs)

    def goes_on(carry):
        i, _, r, _, _, least = carry
        return (i < num_steps) & (r.dot(r) > tiny) & (least > 0)

    def step(carry):
        i, x, r, p, largest, least = carry
        image = product(p)
        curvature = p.dot(image) / p.dot(p)
        largest = jnp.maximum(largest, jnp.sqrt(image.dot(image) / p.dot(p)))
        length = r.dot(r) / p.dot(image) if conjugate else 1 / largest
        length = jnp.where(curvature > 0, length, 0.0)
        rest = r - length * image
        p_next = rest + rest.dot(rest) / r.dot(r) * p if conjugate else rest
        return i + 1, x + length * p, rest, p_next, largest, jnp.minimum(least, curvature)

    nothing, infinite = jnp.zeros((), rhs.dtype), jnp.full((), jnp.inf, rhs.dtype)
    start = (0, jnp.zeros_like(rhs), rhs, rhs, nothing, infinite)
    _, x, r, _, _, least = jax.lax.while_loop(goes_on, step, start)
    return x, r, least


def _nystrom(rng_key: Array, product: Product, rhs: Array, num_steps: int, damping: float) -> Solution:
    """(Â + damping I)⁻¹ b with  of rank ``num_steps``, from A's action on a random subspace.

    Hataya and Yamada 2023 (arXiv:2302.09726), with a Gaussian sketch instead of columns (Frangella, Tropp and Udell
    2023). Directions of the sketch without positive curvature are left out.
    """
    rank = min(num_steps, rhs.size)
    basis = jnp.linalg.qr(jax.random.normal(rng_key, (rhs.size, rank), rhs.dtype))[0].T
    images = jax.lax.map(product, basis)
    core = images @ basis.T
    values, vectors = jnp.linalg.eigh(0.5 * (core + core.T))
    kept = values > jnp.sqrt(jnp.finfo(rhs.dtype).eps) * jnp.abs(values).max()
    # Â = BᵀB
    root = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1.0)), 0.0)[:, None] * (vectors.T @ images)
    _, singular, directions = jnp.linalg.svd(root, full_matrices=False)
    known = singular > 0 if damping == 0 else jnp.ones_like(kept)
    along = directions @ rhs
    x = jnp.where(known, along / jnp.where(known, jnp.square(singular) + damping, 1.0), 0.0) @ directions
    if damping > 0:
        x = x + (rhs - along @ directions) / damping
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

    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any, state: Any) -> Result:
        key_linear, key_sketch = jax.random.split(rng_key)
        system = _linearized(key_linear, problem, theta, inner_state)

        def hessian(x):
            return system.products(x)[1]

        def damped(x):
            return hessian(x) + self.damping * x

        if self.solver == "nystrom":
            x, rest, least = _nystrom(key_sketch, hessian, system.rhs, self.num_steps, self.damping)
        else:
            x, rest, least = _descended(damped, system.rhs, self.num_steps, conjugate=self.solver == "cg")
            least = least - self.damping
        gradient = jax.tree.map(jnp.subtract, system.direct, system.products(x)[0])
        residual = _ratio(jnp.linalg.norm(rest), jnp.linalg.norm(system.rhs))
        return Result(system.loss, gradient, None, residual, least)


class AmortizedState(NamedTuple):
    """
    :ivar solution: x, in the shapes of φ.
    :ivar direction: a unit vector in the shapes of φ, by power iteration that of the greatest curvature.
    :ivar moments: running sums of dᵀHd and ‖Hd‖² along the direction d.
    """

    solution: Any
    direction: Any
    moments: Array


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

    def init(self, optim: Any, inner_state: Any) -> AmortizedState:
        def zeros():  # two of them: the loop donates its buffers, and none can be given twice
            return jax.tree.map(jnp.zeros_like, optim.get_params(inner_state))

        return AmortizedState(zeros(), zeros(), jnp.zeros(2))

    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any, state: AmortizedState) -> Result:
        system = _linearized(rng_key, problem, theta, inner_state)
        norm, moments = jnp.linalg.norm(system.rhs), state.moments
        x, unravel = ravel_pytree(state.solution)
        d, _ = ravel_pytree(state.direction)
        if self.step_size is None:
            # until there is a direction: that of the right-hand side
            d = jnp.where((d == 0).all(), _ratio(system.rhs, norm), d)
            image = system.products(d)[1]
            curvature = d.dot(image)
            moments = MEMORY * moments + jnp.stack([curvature, image.dot(image)]).astype(moments.dtype)
            rate = FRACTION * _ratio(*moments)
            d = _ratio(image, jnp.linalg.norm(image)) + FRESH * _ratio(system.rhs, norm)
            d = _ratio(d, jnp.linalg.norm(d))
        else:
            rate, curvature = jnp.asarray(self.step_size, x.dtype), jnp.inf  # type: ignore[assignment]

        def improved(x, image):
            return (x - rate * (image - system.rhs)).astype(x.dtype)

        if self.num_steps > 1:
            x = jax.lax.fori_loop(0, self.num_steps - 1, lambda _, x: improved(x, system.products(x)[1]), x)
        cross, image = system.products(x)
        rest, x = image - system.rhs, improved(x, image)
        gradient = jax.tree.map(jnp.subtract, system.direct, cross)
        residual = _ratio(jnp.linalg.norm(rest), norm)
        return Result(system.loss, gradient, AmortizedState(unravel(x), unravel(d), moments), residual, curvature)


class PenaltyState(NamedTuple):
    """
    :ivar inner_state: the second guide's parameters and the state of their optimiser.
    :ivar num_steps: taken so far.
    """

    inner_state: Any
    num_steps: Array


@dataclass(frozen=True)
class Penalty(Hypergradient):
    """First derivatives alone: the inner problem becomes a penalty (F2SA; Kwon, Kwon, Wright, Nowak 2023).

    A second guide ψ is fitted to G + J/λ by K steps of the inner optimiser, beside φ and with φ's noise; then
    dJ/dθ ≈ ∂_θ J(θ, ψ) + λ [∂_θ G(θ, ψ) - ∂_θ G(θ, φ)], both G with the same noise (arXiv:2301.10945). The bias is
    O(1/λ). The loss reported is J(θ, ψ).

    :param strength: λ: a number, or a function of the step (from 0), such as an optax schedule. ψ - φ is small as
        1/λ, and the noise in it is multiplied by λ.
    """

    cure = "lower the strength, and see that it stays positive"

    strength: float | Callable[[Array], Array] = 100.0

    differentiates_inner = False

    def __post_init__(self):
        if not callable(self.strength) and not (self.strength > 0 and math.isfinite(self.strength)):
            raise ValueError(f"strength must be positive and finite, or a function of the step, got {self.strength}.")

    def init(self, optim: Any, inner_state: Any) -> PenaltyState:
        # copied: the loop donates its buffers, and none can be given twice
        return PenaltyState(jax.tree.map(jnp.copy, inner_state), jnp.zeros((), int))

    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any, state: PenaltyState) -> Result:
        second, count = state
        strength = self.strength(count) if callable(self.strength) else self.strength
        key_fit, key_outer, key_inner = jax.random.split(rng_key, 3)
        phi = problem.optim.get_params(inner_state)

        def penalized(psi, keys):
            key_inner, key_outer = keys
            return problem.inner(key_inner, theta, psi) + problem.outer(key_outer, theta, psi) / strength

        def fit(second, keys):
            loss, gradient = jax.value_and_grad(penalized)(problem.optim.get_params(second), keys)
            return problem.optim.update(gradient, second, value=loss), None

        num = len(problem.inner_keys)
        if num:
            keys = (problem.inner_keys, jax.random.split(key_fit, num))
            second, _ = jax.lax.scan(fit, second, keys, unroll=fused(num))
        psi = problem.optim.get_params(second)
        loss, direct = jax.value_and_grad(problem.outer, argnums=1)(key_outer, theta, psi)
        rise = jax.grad(lambda t: problem.inner(key_inner, t, psi) - problem.inner(key_inner, t, phi))(theta)
        gradient = jax.tree.map(lambda a, b: a + strength * b, direct, rise)
        return Result(loss, gradient, PenaltyState(second, count + 1))


@dataclass(frozen=True)
class Exact(Hypergradient):
    """The gradient where q(h|v; φ) *is* the posterior p(h|v; θ): no inner problem has to be differentiated.

    The marginal's score then has ∂_θ s(v) = ∇_v E_{q(h|v)}[∂_θ log p̃(v, h; θ)] (Fisher's identity), the derivative in v
    taken through q as well: through the weights of summed-out sites, and through the draws of the others. Away from the
    posterior it is as wrong as the guide is. The score is averaged over the draws, as under ``average="score"``,
    unless the loss has ``average="unbiased"``.
    """

    differentiates_inner = False

    def check(self, loss: Any, pair: Any) -> None:
        relaxed = sorted(pair.softened.difference(pair.averaged))
        if relaxed:
            raise ValueError(
                f"Exact() asks for a guide that is the posterior; the relaxed sites {relaxed} never are. "
                "Sum them out: infer={'enumerate': 'parallel'} and inner_loss=TraceEnum_ELBO()."
            )

    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any, state: Any) -> Result:
        phi = problem.optim.get_params(inner_state)
        return Result(*jax.value_and_grad(problem.posterior, argnums=1)(rng_key, theta, phi))


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

    def __call__(self, rng_key: Array, problem: Bilevel, theta: Any, inner_state: Any, state: Any) -> Result:
        phi = problem.optim.get_params(inner_state)
        surrogate = jax.value_and_grad(problem.covariance, argnums=1)
        return Result(*surrogate(rng_key, theta, phi, self.num_particles))
