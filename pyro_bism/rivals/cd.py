"""Contrastive divergence and its persistent form, with any kernel."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from ..energies import Density, Point, select
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

    :param model: a Pyro program of an unnormalised density p̃(v, h; θ), as BiSM takes it; v may be discrete.
    :param optim: a ``pyro.optim`` optimiser, for θ.
    :param kernel: of :mod:`pyro_bism.sampling.kernels`: ``Gibbs()`` finds block Gibbs sampling for a restricted
        Boltzmann machine; ``Langevin(step_size)`` needs no structure.
    :param num_steps: k, steps of the kernel.
    :param persistent: whether the chains go on.
    :param num_chains: of the persistent chains; None takes as many as the batch has rows.
    :param visible: names of the visible sites; None takes all observed sample sites.
    :param jit: capture the step and compile it, as in :class:`~pyro_bism.BiSM`.
    :raises ValueError: at construction for bad settings, at the first step for misuse, for a kernel that can't move the
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
        optim: PyroOptim,
        kernel: Kernel,
        num_steps: int = 1,
        persistent: bool = False,
        *,
        num_chains: int | None = None,
        visible: Sequence[str] | None = None,
        jit: bool = False,
    ):
        super().__init__(model, optim, visible, jit=jit)
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

    def _check(self, target: MarginalTarget, batch: Batch) -> MarginalTarget:
        if self.persistent and not target.energy.is_homogeneous:
            raise ValueError(
                "persistent=True: the model has covariates, and a chain that goes on belongs to no row of the next "
                "batch. Use persistent=False."
            )
        x = target.point(target.energy.seen(batch.v))
        self.kernel.init(target.energy.density(x), x)
        return target

    @torch.no_grad()
    def _begin(self, target: MarginalTarget, batch: Batch) -> Any:
        if not self.persistent:
            return None
        energy = target.energy.at(batch)
        rows = torch.arange(self.num_chains or len(batch.v)) % len(batch.v)
        x = target.point(select(energy.seen(batch.v), rows))
        density = energy.density(x)
        x = draw_hidden(self.kernel, density, x, tuple(target.hidden), self.num_steps)
        return x, self.kernel.init(density, x)

    def _loss(self, target: MarginalTarget, batch: Batch, carried: Any) -> tuple[Tensor, Any]:
        energy = target.energy.at(batch)
        seen = energy.seen(batch.v)
        x = target.point(seen)
        with torch.no_grad():  # the chains are data here: their own way through θ is CD's bias
            density = energy.density(x)
            if target.hidden and not (self.persistent and target.integral):
                x = draw_hidden(self.kernel, density, x, tuple(target.hidden), self.num_steps)
            y, state = (x, self.kernel.init(density, x)) if carried is None else carried
            y, state = advance(self.kernel, density, y, state, self.num_steps)
        if target.integral is not None or not target.hidden:
            log_prob = target.log_prob(batch)
            loss = log_prob({name: y[name] for name in seen}).mean() - log_prob(seen).mean()
        else:
            loss = energy.log_joint(y).mean() - energy.log_joint(x).mean()
        return loss, (y, state) if self.persistent else None


def advance(kernel: Kernel, density: Density, x: Point, state: Any, num_steps: int) -> tuple[Point, Any]:
    """So many steps of a kernel."""
    for _ in range(num_steps):
        x, state, _ = kernel(density, x, state)
    return x, state


def draw_hidden(kernel: Kernel, density: Density, x: Point, names: tuple[str, ...], num_steps: int) -> Point:
    """h given v: by Gibbs sampling where the conditionals have closed forms, exactly where it is one block."""
    if not names:
        return x
    moving = density.moving(dict.fromkeys(names, True))
    if all(block.kind != "free" for block in moving.blocks):
        kernel = Gibbs()
    num_steps = num_steps if len(moving.blocks) > 1 or kernel != Gibbs() else 1
    return advance(kernel, moving, x, kernel.init(moving, x), num_steps)[0]
