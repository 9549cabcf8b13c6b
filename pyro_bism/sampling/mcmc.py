"""A trained p̃(v, h) as a program for Pyro's own MCMC."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import HMC, NUTS

from ..distributions import base_of
from ..energies import VISIBLE, Energy, Integral, Latent
from ..programs.visible import is_real
from .chains import given_values, masks_of


def as_model(
    trained: Any,
    *args: Any,
    sites: Sequence[str] | None = None,
    missing: Any = None,
    init: Mapping[str, Any] | None = None,
    marginal: bool | Sequence[str] = False,
    **kwargs: Any,
) -> Callable[[], None]:
    """The trained density as a Pyro model without arguments, for ``MCMC``, whose draws ArviZ reads.

    .. code-block:: python

        mcmc = MCMC(NUTS(as_model(bism, x[:1])), warmup_steps=500, num_samples=1000, num_chains=4)

    What moves becomes a latent site, the visible sites too; all rows move together, as one point of a chain: give one
    row for chains of (v, h), the data for draws of h given v (``sites=["h"]``). Missing entries of a visible site ``v``
    are the site ``v_missing``, and ``v`` is deterministic. No kernel of Pyro moves discrete latents: sum them out.

    :param trained: a BiSM or a rival.
    :param args: arguments of model and guide, the data among them, as for ``step``.
    :param sites: as for :func:`run_chains`, and so are ``missing`` and ``init``.
    :param marginal: latent sites that are summed out, in closed form or by enumeration, and the rest moves; True for
        all of them.
    :param kwargs: keyword arguments of model and guide.
    :returns: a function without arguments: sample statements, and one factor ``log_density``.
    :raises ValueError: on misuse.
    """
    energy, data = trained.energy(*args, **kwargs)
    data = {**data, **given_values(energy, data, init or {}, torch.arange(energy.num_rows))}
    summed = _summed(energy, sites, marginal)
    masks = {name: mask for name, mask in masks_of(energy, sites, missing).items() if name not in summed}
    if not masks:
        raise ValueError("Nothing moves: sites and missing name no site that marginal leaves.")
    for name, latent in energy.latents.items():
        if name in masks and latent.kind != "real":
            raise ValueError(
                f"Site '{name}' is discrete, which no kernel of Pyro moves. Use marginal=True or marginal=['{name}'], "
                "which sum it out, or run_chains with Gibbs()."
            )
    declared = {name: _declared(name, energy.latents[name], energy.num_rows) for name in masks if name != VISIBLE}
    integral: Any = None
    density: Any = None
    if summed:
        with torch.no_grad():
            density = energy.density(data)
        integral = Integral.over_variables(density, data, summed)
        if integral.quadrature:
            raise ValueError(f"marginal: {sorted(summed)} can't be summed in closed form or by enumeration.")

    def model() -> None:
        x, columns, start = dict(data), [], 0
        mask = masks.get(VISIBLE, False)
        for site in energy.sites:
            old = data[VISIBLE][:, start : start + math.prod(site.shape[1:])]
            moves = torch.as_tensor(mask) if isinstance(mask, bool) else mask[:, start : start + old.shape[1]]
            start += old.shape[1]
            if moves.all():
                old = pyro.sample(site.name, _flat(site.shape)).reshape(old.shape).to(old.dtype)
            elif moves.any():
                value = pyro.sample(f"{site.name}_missing", _flat((int(moves.sum()),)))
                old = old.masked_scatter(moves, value.to(old.dtype))
                pyro.deterministic(site.name, old.reshape(site.shape))
            columns.append(old)
        x[VISIBLE] = torch.cat(columns, -1)
        jacobian: Any = 0.0
        for name, fn in declared.items():
            value, transform = pyro.sample(name, fn), energy.latents[name].transform
            x[name] = transform.inv(value).to(data[name].dtype)
            if integral is not None:  # the sum is over a density of the reals, and the host transforms by itself
                jacobian = jacobian + transform.log_abs_det_jacobian(x[name], value).sum()
        if integral is not None:
            log_density = integral(density, x)
        else:
            log_density = energy.log_joint(x, jacobian=False)
        pyro.factor("log_density", log_density.sum() - jacobian)

    return model


def _summed(energy: Energy, sites: Sequence[str] | None, marginal: bool | Sequence[str]) -> tuple[str, ...]:
    """The latent sites that are summed out."""
    if isinstance(marginal, str):
        raise ValueError(f"marginal takes True or a list of names: marginal=[{marginal!r}].")
    names = energy.hidden if marginal is True else tuple(marginal or ())
    for name in names:
        if name not in energy.hidden:
            raise ValueError(f"marginal names '{name}'; the latent sites are {sorted(energy.hidden)}.")
        if sites is not None and name in sites:
            raise ValueError(f"Site '{name}' is in sites and in marginal: it can't both move and be summed out.")
    return names


def _declared(name: str, latent: Latent, n: int) -> Any:
    """A flat site of a latent's support and shape."""
    if is_real(latent.fn.support):
        return _flat((n, *latent.shape))
    if isinstance(base_of(latent.fn), dist.ImproperUniform):
        raise ValueError(
            f"Site '{name}' is an ImproperUniform of bounded support, which Pyro's HMC can't start: declare it by a "
            "proper distribution of that support and .mask(False)."
        )
    fn = latent.fn.expand((n, *latent.shape)[: 1 + len(latent.shape) - latent.fn.event_dim])
    return fn.to_event(len(fn.batch_shape)).mask(False)


def _flat(shape: tuple[int, ...]) -> Any:
    return dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)).mask(False)


def with_statistics(kernel: HMC) -> HMC:
    """The same kernel, but its ``MCMC`` tells :func:`to_arviz` more of every draw than whether it diverged.

    .. code-block:: python

        mcmc = MCMC(with_statistics(NUTS(as_model(bism, x, sites=["h"]))), warmup_steps=500, num_samples=1000)

    That is ``energy``, the Hamiltonian, for ``az.bfmi`` and ``az.plot_energy``, with ``acceptance_rate`` and
    ``step_size``. The energy is that of the trajectory's start, from which its end differs by the integrator's error.

    :param kernel: an ``HMC`` or ``NUTS`` of ``pyro.infer``.
    :raises ValueError: for any other.
    """
    made: Any = {HMC: RecordedHMC, NUTS: RecordedNUTS}.get(type(kernel))
    if made is None:
        raise ValueError(f"with_statistics takes an HMC or NUTS of pyro.infer, got {type(kernel).__name__}.")
    new: HMC = made.__new__(made)
    new.__dict__.update(kernel.__dict__)
    return new


class _Recording:
    """Keeps what the kernel knows at every draw: ``MCMC`` hands a kernel's diagnostics on, from other processes too."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        self._per_draw: dict[str, list[float]] = {"energy": [], "acceptance_rate": [], "step_size": []}
        super().setup(*args, **kwargs)  # type: ignore[misc]

    def _sample_r(self, name: str) -> Any:
        r, unscaled = super()._sample_r(name)  # type: ignore[misc]
        self._hamiltonian = float(self._kinetic_energy(unscaled) + self._potential_energy_last)  # type: ignore[attr-defined]
        return r, unscaled

    def sample(self, params: Any) -> Any:
        kernel: Any = self
        mean = kernel._mean_accept_prob
        params = super().sample(params)  # type: ignore[misc]
        n = kernel._t - kernel._warmup_steps
        if n > 0:
            # the kernel keeps but the running mean, which begins anew after the warm-up
            acceptance = kernel._mean_accept_prob if n == 1 else mean + n * (kernel._mean_accept_prob - mean)
            for key, value in zip(self._per_draw, (self._hamiltonian, acceptance, kernel.step_size), strict=True):
                self._per_draw[key].append(float(value))
        return params

    def diagnostics(self) -> dict[str, Any]:
        return {**super().diagnostics(), "per draw": self._per_draw}  # type: ignore[misc]


class RecordedHMC(_Recording, HMC):
    pass


class RecordedNUTS(_Recording, NUTS):
    pass
