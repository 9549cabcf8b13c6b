r"""Kernels that move many points at once, each row by itself, and leave a density invariant."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from ..brief import lacking
from ..energies import VISIBLE, Block, Density, Energy, Integral, Point, pack, repeated, unpack

__all__ = ["AnnealedLangevin", "Gibbs", "Kernel", "Langevin"]


class Kernel(Protocol):
    """Leaves a density invariant, row by row. One of your own derives from it: ``docs/extending.md``."""

    def init(self, density: Density, x: Point) -> Any:
        """Its state beside the point, a pytree; none, if not overridden.

        :param density: what it is to leave invariant.
        :param x: where the chains start, one row for each.
        :raises ValueError: if it can't move this density.
        """
        return ()

    @abstractmethod
    def __call__(self, rng_key: Array, density: Density, x: Point, state: Any) -> tuple[Point, Any, Array]:
        """The next point and state, and every row's acceptance probability, shape (m,)."""

    def adapt(self, state: Any, acceptance: Array) -> Any:
        """The ``state`` after a step of the warm-up, where alone it learns from ``acceptance``; by default the same."""
        return state

    def finish(self, density: Density, x: Point) -> Point:
        """What is returned of a point ``x`` drawn from this ``density``; the point, if not overridden."""
        return x


def require_kernel(kernel: Any) -> None:
    """Raises a ``ValueError`` for what is no kernel; a class is none, nor is a kernel of the host's MCMC."""
    missing = lacking(kernel, Kernel)
    if isinstance(kernel, type) or not callable(kernel) or missing:
        name = kernel.__name__ if isinstance(kernel, type) else repr(kernel)
        why = f" It lacks {', '.join(missing)}: one of your own derives from Kernel." if missing else ""
        raise ValueError(
            f"kernel={name} is not a kernel. Pass an instance, such as Gibbs(); for HMC and NUTS see as_model().{why}"
        )


@dataclass(frozen=True)
class Gibbs(Kernel):
    r"""Draws block after block from its conditional given all others (Geman, Geman 1984).

    The conditionals are found from f = log p̃ itself: bits and one-hot vectors in which it is affine have the logits
    :math:`\nabla_h f`, all at once; real variables in which it is quadratic, v among them, have the precision
    :math:`P = -\nabla^2 f` and the mean :math:`x + P^{-1} \nabla f`; the units of other discrete sites are drawn one
    after the other from the differences of f, which are a gradient too where f is affine in each. For a restricted
    Boltzmann machine this is block Gibbs sampling.

    :param conditionals: closed forms for sites that have no other: by site, a function from the values of all sites, by
        name, to a NumPyro distribution of that site's value.
    :raises ValueError: at the first draw, for a real site whose conditional is not Gaussian and not given.
    """

    conditionals: Mapping[str, Callable[[Mapping[str, Array]], dist.Distribution]] | None = None

    def init(self, density: Density, x: Point) -> Any:
        given = self._given(density)
        for block in density.blocks:
            for name in block.names:
                if block.kind == "free" and name not in given:
                    raise ValueError(
                        f"The conditional of {called(density.energy, name)} is not Gaussian: the energy is not "
                        "quadratic in it. Give it in closed form, Gibbs(conditionals={...}), or use Langevin, HMC or "
                        "NUTS."
                    )
        return ()

    def __call__(self, rng_key: Array, density: Density, x: Point, state: Any) -> tuple[Point, Any, Array]:
        given = self._given(density)
        for block in density.blocks:
            names = tuple(name for name in block.names if name not in given)
            if names:
                rng_key, key = jax.random.split(rng_key)
                x = _draw_block(key, density, x, block._replace(names=names))
        moving = {name for block in density.blocks for name in block.names}
        for name in sorted(moving & set(given)):
            rng_key, key = jax.random.split(rng_key)
            x = {**x, name: _draw_given(key, density, x, name, given[name])}
        return x, state, jnp.ones(len(x[VISIBLE]), x[VISIBLE].dtype)

    def _given(self, density: Density) -> dict[str, Callable[..., Any]]:
        """The user's conditionals by the name of their variable in a point."""
        energy, given = density.energy, {}
        for name, conditional in (self.conditionals or {}).items():
            if name in energy.latents:
                given[name] = conditional
            elif [site.name for site in energy.sites] == [name]:
                given[VISIBLE] = conditional
            else:
                known = sorted([*energy.latents, *(s.name for s in energy.sites if len(energy.sites) == 1)])
                raise ValueError(f"Gibbs: conditionals names '{name}'; the sites are {known}.")
        return given


class LangevinState(NamedTuple):
    """The step size, which the warm-up changes.

    :ivar log_step: logarithm of the step size ε.
    :ivar num_adapted: how many steps of the warm-up have changed it.
    """

    log_step: Array
    num_adapted: Array


@dataclass(frozen=True)
class Langevin(Kernel):
    r"""Langevin dynamics on the real variables, :math:`x' = x + \tfrac{\epsilon^2}{2} \nabla f(x) + \epsilon \xi`.

    Constrained latents move in the reals, discrete ones by :class:`Gibbs` before every step. Unadjusted, the draws
    are those of a density that differs from p̃ by O(ε²); adjusted (MALA: Roberts, Tweedie 1996), each row's proposal is
    accepted or refused by itself, and the warm-up takes ε to an acceptance of 0.574 (Roberts, Rosenthal 1998).

    :param step_size: ε, in units of v; adjusted, a first guess.
    :param adjusted: whether to accept and refuse.
    :param num_steps: Langevin steps to one of the discrete latents.
    """

    step_size: float = 0.1
    adjusted: bool = True
    num_steps: int = 1

    def __post_init__(self) -> None:
        if not self.step_size > 0:
            raise ValueError(f"step_size must be positive, got {self.step_size}.")
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}.")

    def init(self, density: Density, x: Point) -> LangevinState:
        dtype = x[VISIBLE].dtype
        return LangevinState(jnp.asarray(math.log(self.step_size), dtype), jnp.zeros((), dtype))

    def __call__(self, rng_key: Array, density: Density, x: Point, state: Any) -> tuple[Point, Any, Array]:
        step = jnp.exp(state.log_step)
        keys = jax.random.split(rng_key, self.num_steps + 1)
        x = _draw_discrete(keys[0], density, x)
        names = _real_names(density)
        acceptance = jnp.ones(len(x[VISIBLE]), x[VISIBLE].dtype)
        if not names:
            return x, state, acceptance

        def move(carry: tuple[Point, Any], key: Array) -> tuple[tuple[Point, Any], Array]:
            x, here = carry
            key_noise, key_accept = jax.random.split(key)
            x, here, accepted = _langevin(key_noise, key_accept, density, x, names, step, here)
            return (x, here), accepted

        start = x, _climb(density, x, names) if self.adjusted else None
        # a loop: many steps compile as fast as one
        (x, _), accepted = jax.lax.scan(move, start, keys[1:])
        return x, state, accepted.mean(0)

    def adapt(self, state: LangevinState, acceptance: Array) -> LangevinState:
        if not self.adjusted:
            return state
        # Robbins-Monro; the first steps go far
        rate = 1 / jnp.sqrt(1 + 0.1 * state.num_adapted)
        change = rate * (acceptance.mean() - 0.574)
        # of the state's own type: with x64 an acceptance may be float64 where v is float32
        return LangevinState(state.log_step + change.astype(state.log_step.dtype), state.num_adapted + 1)


@dataclass(frozen=True)
class AnnealedLangevin(Kernel):
    r"""Langevin dynamics from a high temperature down to 1, and a last step that takes the noise away.

    .. math:: x' = x + \tfrac{\epsilon^2}{2} \nabla f(x) + \epsilon \sqrt{T_k}\, \xi, \qquad
              \hat v = v + \sigma_0^2\, \nabla_v \log p(v)

    Li, Chen, Sommer 2019 (arXiv:1910.07762), section 3.2. A model of :class:`MultiscaleDenoisingScoreMatching`
    is the density of data with noise of σ₀ on them; the last step is the mean of the data given v (Tweedie). Its score
    is the marginal's where the latents that move can be summed in closed form, else that of log p̃(v, h) at the chain's
    h, whose mean over p(h|v) it is. Discrete latents are drawn at the same temperature.

    The steps from the first temperature on are the warm-up: ``run_chains`` needs ``num_warmup >= num_steps *
    len(temperatures)``.

    :param step_size: ε.
    :param temperatures: T, falling to 1.
    :param num_steps: steps at each temperature.
    :param sigma: σ₀; None leaves the last step out.
    """

    step_size: float
    temperatures: tuple[float, ...] = tuple(100.0 ** (1 - k / 20) for k in range(21))
    num_steps: int = 20
    sigma: float | None = None

    def __post_init__(self) -> None:
        if not self.step_size > 0:
            raise ValueError(f"step_size must be positive, got {self.step_size}.")
        object.__setattr__(self, "temperatures", tuple(map(float, self.temperatures)))
        falling = all(a >= b for a, b in zip(self.temperatures, self.temperatures[1:], strict=False))
        if not self.temperatures or not falling or self.temperatures[-1] != 1:
            raise ValueError(f"temperatures must fall to 1, got {self.temperatures}.")

    @property
    def num_warmup(self) -> int:
        """Steps until the temperature is 1."""
        return self.num_steps * len(self.temperatures)

    def init(self, density: Density, x: Point) -> Array:
        return jnp.zeros((), int)

    def __call__(self, rng_key: Array, density: Density, x: Point, state: Any) -> tuple[Point, Any, Array]:
        temperatures = jnp.asarray(self.temperatures, x[VISIBLE].dtype)
        temperature = temperatures[jnp.minimum(state // self.num_steps, len(temperatures) - 1)]

        def log_prob(x: Point) -> Array:
            return density.log_prob(x) / temperature

        cooler = replace(
            density, log_prob=log_prob, precisions={k: p / temperature for k, p in density.precisions.items()}
        )
        key_discrete, key_noise = jax.random.split(rng_key)
        x = _draw_discrete(key_discrete, cooler, x)
        step = self.step_size * jnp.sqrt(temperature)
        names = _real_names(density)
        if names:
            x, _, _ = _langevin(key_noise, key_noise, cooler, x, names, step, None)
        return x, state + 1, jnp.ones(len(x[VISIBLE]), x[VISIBLE].dtype)

    def finish(self, density: Density, x: Point) -> Point:
        moving = {name for block in density.blocks for name in block.names}
        if self.sigma is None or VISIBLE not in moving:
            return x
        try:
            integral: Any = Integral.over_variables(density, x, [name for name in density.latents if name in moving])
        except ValueError:
            integral = None

        def log_prob(v: Array) -> Array:
            y = {**x, VISIBLE: v}
            closed = integral is not None and integral.is_closed
            return (integral(density, y) if closed else density.log_prob(y)).sum()

        v = x[VISIBLE] + self.sigma**2 * jax.grad(log_prob)(x[VISIBLE])
        return {**x, VISIBLE: jnp.where(density.masks.get(VISIBLE, True), v, x[VISIBLE])}


def _draw_block(rng_key: Array, density: Density, x: Point, block: Block) -> Point:
    if block.kind == "gaussian":
        return _draw_gaussian(rng_key, density, x, block)
    if block.kind == "affine":
        return _draw_affine(rng_key, density, x, block.names)
    return _draw_units(rng_key, density, x, block)


def _draw_gaussian(rng_key: Array, density: Density, x: Point, block: Block) -> Point:
    flat = pack(x, block.names)
    precision = density.precision(x, block)
    g = pack(density.slope(x, block.names), block.names)
    mask = _mask(density, x, block.names)
    noise = jax.random.normal(rng_key, flat.shape, flat.dtype)
    if block.is_diagonal:
        new = flat + g / precision + noise / jnp.sqrt(precision)
        return {**x, **unpack(new if mask is None else jnp.where(mask, new, flat), x, block.names)}
    if mask is not None:
        # held entries: a unit precision of their own, and no slope
        kept = mask[:, :, None] & mask[:, None, :]
        precision = jnp.where(kept, precision, jnp.eye(flat.shape[1], dtype=flat.dtype))
        g = jnp.where(mask, g, 0.0)
    factor = jnp.linalg.cholesky(precision)

    def move(factor: Array, g: Array, noise: Array) -> Array:
        mean = jax.scipy.linalg.cho_solve((factor, True), g)
        return mean + jax.scipy.linalg.solve_triangular(factor, noise, lower=True, trans=1)

    change = jax.vmap(move)(factor, g, noise) if factor.ndim == 3 else move(factor, g.T, noise.T).T
    new = flat + change
    return {**x, **unpack(new if mask is None else jnp.where(mask, new, flat), x, block.names)}


def _draw_affine(rng_key: Array, density: Density, x: Point, names: Sequence[str]) -> Point:
    drawn = draw_affine(rng_key, density, density.slope(x, names))
    return {**x, **{name: jnp.where(density.masks.get(name, True), new, x[name]) for name, new in drawn.items()}}


def draw_affine(rng_key: Array, density: Density, logits: Point) -> Point:
    """Bits and one-hot vectors that are independent, from their logits."""
    found = {}
    for key, (name, g) in zip(jax.random.split(rng_key, len(logits)), logits.items(), strict=True):
        if density.latents[name].kind == "bits":
            new = jax.random.bernoulli(key, jax.nn.sigmoid(g)).astype(g.dtype)
        else:
            new = jax.nn.one_hot(jax.random.categorical(key, g), g.shape[-1], dtype=g.dtype)
        found[name] = jnp.where(jnp.isnan(g), g, new)  # of logits that are no numbers no bit may be drawn
    return found


def _draw_units(rng_key: Array, density: Density, x: Point, block: Block) -> Point:
    """One unit after the other."""
    (name,) = block.names
    latent = density.latents[name]
    support = latent.support(x[name].dtype)
    m, num_units = len(x[name]), math.prod(latent.units)
    rows = repeated(x, len(support))
    flat = (m, num_units, *support.shape[1:])

    def one(j: Array, value: Array) -> Array:
        """``value`` with unit j drawn anew."""
        if block.is_multilinear:
            whole = {**x, name: value.reshape(x[name].shape)}
            slope = density.slope(whole, block.names)[name].reshape(flat)[:, j]
            logits = support[:, None] * slope if latent.kind == "bits" else slope.T
        else:
            tried = jnp.tile(value[None], (len(support), *[1] * value.ndim))
            tried = tried.at[:, :, j].set(jnp.broadcast_to(support[:, None], (len(support), m, *support.shape[1:])))
            logits = density.log_prob({**rows, name: tried.reshape(-1, *latent.shape)}).reshape(len(support), m)
        pick = jax.random.categorical(jax.random.fold_in(rng_key, j), logits, axis=0)
        return value.at[:, j].set(support[pick])

    new = jax.lax.fori_loop(0, num_units, one, x[name].reshape(flat)).reshape(x[name].shape)
    return {**x, name: jnp.where(density.masks.get(name, True), new, x[name])}


def _draw_given(rng_key: Array, density: Density, x: Point, name: str, conditional: Callable[..., Any]) -> Array:
    fn = conditional(density.energy.values(x))
    value = fn.sample(rng_key)
    latent = density.latents.get(name)
    if latent is not None and latent.kind == "real":
        value = latent.transform.inv(value)
    if value.size != x[name].size:
        raise ValueError(
            f"The conditional of {called(density.energy, name)} gives values of shape {value.shape}, where "
            f"{x[name].shape} are wanted: one for every row."
        )
    new = value.reshape(x[name].shape).astype(x[name].dtype)
    return jnp.where(density.masks.get(name, True), new, x[name])


def _draw_discrete(rng_key: Array, density: Density, x: Point) -> Point:
    for block in density.blocks:
        if block.kind in ("affine", "units"):
            rng_key, key = jax.random.split(rng_key)
            x = _draw_block(key, density, x, block)
    return x


def _real_names(density: Density) -> tuple[str, ...]:
    return tuple(name for b in density.blocks if b.kind in ("gaussian", "free") for name in b.names)


def _climb(density: Density, x: Point, names: Sequence[str]) -> tuple[Array, Array]:
    """log p̃ of every row and its gradient."""
    value, slopes = density.value_and_slope(x, names)
    return value, pack(slopes, names)


def _langevin(
    key_noise: Array,
    key_accept: Array,
    density: Density,
    x: Point,
    names: Sequence[str],
    step: Array,
    here: tuple[Array, Array] | None,
) -> tuple[Point, tuple[Array, Array] | None, Array]:
    """One step; with ``here`` (value and gradient at x) it is accepted or refused."""
    flat = pack(x, names)
    mask = _mask(density, x, names)
    moves = 1.0 if mask is None else mask.astype(flat.dtype)
    g = pack(density.slope(x, names), names) if here is None else here[1]
    noise = jax.random.normal(key_noise, flat.shape, flat.dtype)
    new = flat + moves * (0.5 * step**2 * g + step * noise)
    proposed = {**x, **unpack(new, x, names)}
    if here is None:
        return proposed, None, jnp.ones(len(flat), flat.dtype)
    there = _climb(density, proposed, names)

    def log_q(to: Array, start: Array, slope: Array) -> Array:
        return -0.5 * (((to - start - 0.5 * step**2 * slope) * moves / step) ** 2).sum(-1)

    ratio = there[0] - here[0] + log_q(flat, new, there[1]) - log_q(new, flat, g)
    # a proposal without a density is refused
    ratio = jnp.where(jnp.isnan(ratio), -jnp.inf, ratio)
    accepted = jnp.log(jax.random.uniform(key_accept, ratio.shape, flat.dtype)) < ratio

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(accepted.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    x = {**x, **{name: choose(proposed[name], x[name]) for name in names}}
    return x, (choose(there[0], here[0]), choose(there[1], here[1])), jnp.exp(jnp.minimum(ratio, 0.0))


def _mask(density: Density, x: Point, names: Sequence[str]) -> Array | None:
    """Which entries of these variables move, (m, d); None if all."""
    if not any(name in density.masks for name in names):
        return None
    masks = {name: jnp.broadcast_to(density.masks.get(name, True), x[name].shape) for name in names}
    return pack(masks, names)


def called(energy: Energy, name: str) -> str:
    if name != VISIBLE:
        return f"site '{name}'"
    return (
        "the visible "
        + ("site " if len(energy.sites) == 1 else "sites ")
        + ", ".join(f"'{site.name}'" for site in energy.sites)
    )
