"""A trained p̃(v, h) as a program for NumPyro's own MCMC."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.infer import HMC, NUTS

from ..distributions import base_of
from ..energies import VISIBLE, Energy, Integral, Latent
from .chains import given_values, masks_of


def as_model(
    trained: Any,
    state: Any,
    *args: Any,
    rng_key: Array,
    sites: Sequence[str] | None = None,
    missing: Any = None,
    init: Mapping[str, Any] | None = None,
    marginal: bool | Sequence[str] = False,
    **kwargs: Any,
) -> Callable[[], None]:
    """The trained density as a NumPyro model without arguments, for ``MCMC``, whose draws ArviZ reads.

    .. code-block:: python

        mcmc = MCMC(NUTS(as_model(bism, state, x[:1], rng_key=key)), num_warmup=500, num_samples=1000, num_chains=4)

    What moves becomes a latent site, the visible sites too; all rows move together, as one point of a chain: give one
    row for chains of (v, h), the data for draws of h given v (``sites=["h"]``). Missing entries of a visible site ``v``
    are the site ``v_missing``, and ``v`` is deterministic. ``DiscreteHMCGibbs`` can move discrete latents, but for
    one-hot vectors; or sum them out.

    :param trained: a BiSM or a rival.
    :param state: its state.
    :param args: arguments of model and guide, the data among them, as for ``update``.
    :param rng_key: a JAX random key, for the guide's draw of what stands still and for a subsampling plate's rows.
    :param sites: as for :func:`run_chains`, and so are ``missing`` and ``init``.
    :param marginal: latent sites that are summed out, in closed form or by enumeration, and the rest moves; True for
        all of them.
    :param kwargs: keyword arguments of model and guide.
    :returns: a function without arguments: sample statements, and one factor ``log_density``.
    :raises ValueError: on misuse.
    """
    energy, params, data = trained.energy(state, *args, rng_key=rng_key, **kwargs)
    which = np.arange(energy.num_rows)
    data = {**data, **given_values(energy, data, init or {}, which)}
    summed = _summed(energy, sites, marginal)
    masks = {name: mask for name, mask in masks_of(energy, sites, missing).items() if name not in summed}
    if not masks:
        raise ValueError("Nothing moves: sites and missing name no site that marginal leaves.")
    for name, latent in energy.latents.items():
        if name in masks and latent.kind == "onehot":
            raise ValueError(
                f"Site '{name}' is one-hot, which no kernel of NumPyro moves. Use marginal=True or "
                f"marginal=['{name}'], which sum it out, or run_chains with Gibbs()."
            )
    integral: Any = None
    density: Any = None
    if summed:
        density = energy.density(params, data)
        integral = Integral.over_variables(density, data, summed)
        if integral.quadrature:
            raise ValueError(f"marginal: {sorted(summed)} can't be summed in closed form or by enumeration.")

    def model() -> None:
        x, v, start = dict(data), data[VISIBLE], 0
        mask = masks.get(VISIBLE, False)
        for site in energy.sites:
            size = math.prod(site.shape[1:])
            columns = slice(start, start + size)
            start += size
            old = v[:, columns]
            moves = np.broadcast_to(mask if isinstance(mask, bool) else mask[:, columns], old.shape)
            if not moves.any():
                continue
            shape = site.shape if moves.all() else (int(moves.sum()),)
            name = site.name if moves.all() else f"{site.name}_missing"
            value = numpyro.sample(name, dist.ImproperUniform(dist.constraints.real, (), shape))
            if moves.all():
                new = value.reshape(old.shape)
            else:
                new = old.at[np.nonzero(moves)].set(value)
                numpyro.deterministic(site.name, new.reshape(site.shape))
            v = v.at[:, columns].set(new.astype(v.dtype))
        x[VISIBLE] = v
        jacobian: Any = 0.0
        for name, latent in energy.latents.items():
            if name not in masks:
                continue
            value = numpyro.sample(name, _declared(latent, energy.num_rows))
            x[name] = latent.transform.inv(value) if latent.kind == "real" else value.astype(data[name].dtype)
            if integral is not None and latent.kind == "real":
                # the sum is over a density of the reals, and the host transforms by itself
                jacobian = jacobian + latent.transform.log_abs_det_jacobian(x[name], value).sum()
        if integral is not None:
            log_density = integral(density, x)
        else:
            log_density = energy.log_joint(params, x, jacobian=False)
        numpyro.factor("log_density", log_density.sum() - jacobian)

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


def _declared(latent: Latent, n: int) -> dist.Distribution:
    """A flat site of a latent's support and shape; discrete ones unit by unit, as enumeration wants them."""
    if latent.kind == "bits":
        return dist.Bernoulli(0.5).expand((n, *latent.shape)).mask(False)
    if latent.kind == "real":
        return dist.ImproperUniform(latent.fn.support, (), (n, *latent.shape))
    return base_of(latent.fn).expand((n, *latent.units)).mask(False)


def with_statistics(kernel: HMC) -> HMC:
    """The same kernel, but its ``MCMC`` tells :func:`to_arviz` more of every draw than whether it diverged.

    .. code-block:: python

        posterior = as_model(bism, state, x, rng_key=key, sites=["h"])
        mcmc = MCMC(with_statistics(NUTS(posterior)), num_warmup=500, num_samples=1000)

    That is ``energy``, the Hamiltonian, for ``az.bfmi`` and ``az.plot_energy``, with ``acceptance_rate`` and
    ``step_size``: the ``extra_fields`` of ``mcmc.run`` that hold them need not be named.

    :param kernel: an ``HMC`` or ``NUTS`` of ``numpyro.infer``.
    :raises ValueError: for any other.
    """
    made: Any = {HMC: RecordedHMC, NUTS: RecordedNUTS}.get(type(kernel))
    if made is None:
        raise ValueError(f"with_statistics takes an HMC or NUTS of numpyro.infer, got {type(kernel).__name__}.")
    new: HMC = made.__new__(made)
    new.__dict__.update(kernel.__dict__)
    return new


class _Recording:
    """Collects what the kernel knows at every draw."""

    @property
    def default_fields(self) -> tuple[str, ...]:
        return (*super().default_fields, "energy", "accept_prob", "adapt_state.step_size")  # type: ignore[misc]


class RecordedHMC(_Recording, HMC):
    pass


class RecordedNUTS(_Recording, NUTS):
    pass
