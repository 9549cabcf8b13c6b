"""Contrastive divergence and its persistent form, with any kernel."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..compiled.noise import num_prefetched, split_noise
from ..compiled.steps import unroll_factor
from ..energies import Density, Point
from ..programs.checks import Analysis
from ..programs.visible import Batch
from ..sampling.kernels import Gibbs, Kernel, require_kernel
from ..training.runaways import Words
from .rival import Rival
from .target import MarginalTarget

__all__ = ["CD"]


class CD(Rival):
    r"""Contrastive divergence (Hinton 2002) and persistent contrastive divergence (Tieleman 2008).

    .. math:: -\nabla_θ E_{data} \log \tilde p(v; θ) + \nabla_θ E_{chains} \log \tilde p(v; θ)

    The chains start at the data, h drawn given them, and take ``num_steps`` steps of the kernel; persistent ones go on
    from where the last step left them. Latents are summed out of log p̃ where they can be, else taken at the chains' and
    at draws given the data. The value is no likelihood: the difference of log p̃ between chains and data.

    :param model: a NumPyro program of an unnormalised density p̃(v, h; θ), as BiSM takes it; v may be discrete.
    :param optim: an optimiser for θ, of ``numpyro.optim``, ``jax.example_libraries.optimizers`` or optax.
    :param kernel: of :mod:`numpyro_bism.sampling.kernels`: ``Gibbs()`` finds block Gibbs sampling for a restricted
        Boltzmann machine; ``Langevin(step_size)`` needs no structure.
    :param num_steps: k, steps of the kernel.
    :param persistent: whether the chains go on.
    :param num_chains: of the persistent chains; None takes as many as the batch has rows.
    :param visible: names of the visible sites; None takes all observed sample sites.
    :param static_kwargs: keyword arguments of the model that stay the same, as in SVI.
    :raises ValueError: at construction for bad settings, at :meth:`init` for misuse, for a kernel that can't move the
        model, and for persistent chains of a model with covariates.
    """

    takes_discrete = True
    sums_latents = None
    moves_visible = True
    is_contrast = True
    words = Words.of_rival("or more num_steps, so that the chains keep up, or clip the gradient")

    def __init__(
        self,
        model: Callable[..., Any],
        optim: Any,
        kernel: Kernel,
        num_steps: int = 1,
        persistent: bool = False,
        *,
        num_chains: int | None = None,
        visible: Sequence[str] | None = None,
        **static_kwargs: Any,
    ):
        super().__init__(model, optim, visible, static_kwargs)
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
        if num_chains is not None and (num_chains < 1 or not persistent):
            raise ValueError(
                f"num_chains={num_chains}: give a positive number, and persistent=True; other chains start at the data."
            )
        require_kernel(kernel)
        self.kernel = kernel
        self.num_steps = num_steps
        self.persistent = persistent
        self.num_chains = num_chains

    def _check(self, target: MarginalTarget, params: Mapping[str, Any], batch: Batch, rng_key: Array) -> MarginalTarget:
        if self.persistent and not target.energy.is_homogeneous:
            raise ValueError(
                "persistent=True: the model has covariates, and a chain that goes on belongs to no row of the next "
                "batch. Use persistent=False."
            )
        x = target.point(target.energy.seen(batch.v))
        jax.eval_shape(lambda: self.kernel.init(target.energy.density(params, x), x))
        return target

    def _begin(
        self, rng_key: Array, target: MarginalTarget, start: Analysis, batch: Batch
    ) -> tuple[dict[str, Any], Any]:
        if not self.persistent:
            return {}, None
        energy = target.energy.at(batch)
        rows = jnp.arange(self.num_chains or len(batch.v)) % len(batch.v)
        x = target.point(jax.tree.map(lambda a: a[rows], energy.seen(batch.v)))
        density = energy.density(target.params(start.theta, start.mutable), x)
        x = draw_hidden(rng_key, self.kernel, density, x, tuple(target.hidden), self.num_steps)
        return {}, (x, self.kernel.init(density, x))

    def _loss(
        self, rng_key: Array, theta: Mapping[str, Any], carried: Any, target: MarginalTarget, mutable: Any, batch: Batch
    ) -> tuple[Array, Any]:
        params = target.params(theta, mutable)
        fixed = jax.lax.stop_gradient(params)  # the chains are data here: their own way through θ is CD's bias
        energy = target.energy.at(batch)
        key_hidden, key_chains = jax.random.split(rng_key)
        seen = energy.seen(batch.v)
        x = target.point(seen)
        density = energy.density(fixed, x)
        if target.hidden and not (self.persistent and target.integral):
            x = draw_hidden(key_hidden, self.kernel, density, x, tuple(target.hidden), self.num_steps)
        y, state = (x, self.kernel.init(density, x)) if carried is None else carried
        y, state = advance(key_chains, self.kernel, density, y, state, self.num_steps)
        y = jax.lax.stop_gradient(y)
        if target.integral is not None or not target.hidden:
            log_prob = target.log_prob(params, batch)
            loss = log_prob({name: y[name] for name in seen}).mean() - log_prob(seen).mean()
        else:
            loss = energy.log_joint(params, y).mean() - energy.log_joint(params, jax.lax.stop_gradient(x)).mean()
        return loss, (y, state) if self.persistent else None


def advance(
    rng_key: Array, kernel: Kernel, density: Density, x: Point, state: Any, num_steps: int
) -> tuple[Point, Any]:
    """So many steps of a kernel."""

    def step(key: Array, carry: tuple[Point, Any]) -> tuple[Point, Any]:
        return kernel(key, density, *carry)[:2]

    if num_steps == 1:
        return step(rng_key, (x, state))
    draw, rest = split_noise(step, rng_key, (x, state))
    noise: Any = jax.random.split(rng_key, num_steps)
    if num_steps <= num_prefetched(draw, rng_key):
        noise, step = jax.vmap(draw)(noise), rest
    found: tuple[Point, Any] = jax.lax.scan(
        lambda carry, now: (step(now, carry), None), (x, state), noise, unroll=unroll_factor(num_steps)
    )[0]
    return found


def draw_hidden(
    rng_key: Array, kernel: Kernel, density: Density, x: Point, names: tuple[str, ...], num_steps: int
) -> Point:
    """h given v: by Gibbs sampling where the conditionals have closed forms, exactly where it is one block."""
    if not names:
        return x
    moving = density.moving(dict.fromkeys(names, True))
    if all(block.kind != "free" for block in moving.blocks):
        kernel = Gibbs()
    num_steps = num_steps if len(moving.blocks) > 1 or kernel != Gibbs() else 1
    return advance(rng_key, kernel, moving, x, kernel.init(moving, x), num_steps)[0]
