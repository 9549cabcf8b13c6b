"""Whether a guide's ranks of latents are uniform, and leave-one-out by ArviZ."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from ..bism import BiSM
from ..brief import brief
from ..energies import VISIBLE
from ..programs.modes import in_own_modes
from ..sampling.chains import default_kernel, run_chains
from ..sampling.kernels import Kernel
from . import (
    Estimate,
)
from .arviz import check_noise
from .guide_draws import guide_draws


class Calibration(NamedTuple):
    """Ranks of the model's own latents among the guide's draws, and whether they are uniform.

    :ivar pit: by site, the ranks of the model's own h among the guide's draws, in (0, 1): (points, units).
    :ivar p_values: by site, the smallest p-value of Kolmogorov and Smirnov's tests that a unit's ranks are uniform,
        times the number of units, and at most 1.
    """

    pit: dict[str, np.ndarray]
    p_values: dict[str, float]

    def __repr__(self) -> str:
        return brief(self)


@in_own_modes
def calibration(
    trained: BiSM,
    state: Any,
    *args: Any,
    rng_key: Array,
    num_points: int = 200,
    num_draws: int = 99,
    num_warmup: int = 500,
    kernel: Kernel | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Calibration:
    """Simulation-based calibration of the guide (Talts et al. 2018, arXiv:1804.06788).

    (v, h) is drawn from the model itself, by chains; if the guide is the posterior, the rank of h among draws of
    q(h|v) is uniform. Ties of discrete latents are broken at random.

    :param trained: a BiSM.
    :param state: its state.
    :param args: arguments of model and guide, as for ``update``; chains start at the rows of the data among them.
    :param rng_key: a JAX random key: all that is drawn follows from it.
    :param num_points: independent chains, each giving one (v, h).
    :param num_draws: draws of the guide at each.
    :param num_warmup: steps of every chain before its (v, h), in which the kernel adapts.
    :param kernel: what moves the chains; None takes :class:`Gibbs` where the energy has the conditionals, else
        :class:`Langevin`.
    :param progress_bar: whether to show how many steps the chains have taken.
    :param kwargs: keyword arguments of model and guide.
    :raises ValueError: for a model with covariates, or of a fixed number of rows that is not ``num_points``.
    """
    key_energy, key_chains, key_guide, key_ties = jax.random.split(rng_key, 4)
    energy, _, _ = trained.energy(state, *args, rng_key=key_energy, **kwargs)
    if not energy.is_homogeneous:
        raise ValueError(
            "calibration draws data from the model, which has covariates: there is no one density to draw from."
        )
    if not energy.resizes and num_points != energy.num_rows:
        raise ValueError(f"calibration: the model runs on {energy.num_rows} rows only: num_points={energy.num_rows}.")
    chains = run_chains(
        trained,
        state,
        *args,
        rng_key=key_chains,
        kernel=kernel or default_kernel(energy),
        num_chains=num_points,
        num_samples=1,
        num_warmup=num_warmup,
        progress_bar=progress_bar,
        **kwargs,
    )
    batch = energy._resized(num_points) if energy.resizes else energy.batch
    new_args, new_kwargs = batch.arguments(chains.point[VISIBLE])
    run = guide_draws(trained, state, *new_args, rng_key=key_guide, num_draws=num_draws, **new_kwargs)
    pit: dict[str, np.ndarray] = {}
    p_values: dict[str, float] = {}
    for name, draws in run.latents.items():
        q = np.asarray(draws, float).reshape(num_draws, num_points, -1)
        h = np.asarray(chains.values[name], float).reshape(num_points, -1)
        ties = np.asarray(jax.random.uniform(jax.random.fold_in(key_ties, len(pit)), h.shape))
        rank = (q < h).sum(0) + ties * ((q == h).sum(0) + 1)
        pit[name] = rank / (num_draws + 1)
        p_values[name] = min(1.0, min(_kolmogorov(unit) for unit in pit[name].T) * h.shape[1])
    return Calibration(pit, p_values)


def _kolmogorov(u: np.ndarray) -> float:
    """p-value that u is uniform on (0, 1): Kolmogorov's limit with Stephens' correction."""
    n = len(u)
    u = np.sort(u)
    distance = max((np.arange(1, n + 1) / n - u).max(), (u - np.arange(n) / n).max())
    scaled = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    k = np.arange(1, 101)
    return float(np.clip(2 * ((-1.0) ** (k - 1) * np.exp(-2 * k**2 * scaled**2)).sum(), 0.0, 1.0))


@in_own_modes
def loo(estimate: Estimate) -> Any:
    """Leave-one-out cross-validation of log p(v | θ) over draws of θ, by ArviZ, where the normaliser allows it.

    Noise of 1 nat in log Z moves the result by tens of nats without an alarm, so a standard error above 0.1 is refused.

    :param estimate: ``value`` of shape (chain, draw, n), and its standard error: ``log_likelihood`` of a PersistentVI.
    :returns: ArviZ's ``ELPDData``.
    :raises ValueError: if θ has no draws, or the error is too large: it says so.
    """
    value = np.asarray(estimate.value, float)
    if value.ndim != 3:
        raise ValueError(
            "LOO takes draws of θ, log p(v | θ) of shape (chain, draw, n): this θ is one point. Use the log_likelihood "
            "of held-out data."
        )
    check_noise(estimate.standard_error)
    import arviz as az
    import xarray as xr

    dims = ("chain", "draw", "obs")
    tree = xr.DataTree.from_dict(
        {
            "posterior": xr.Dataset({"theta": (dims[:2], value.mean(-1))}),
            "log_likelihood": xr.Dataset({"v": (dims, value)}),
        }
    )
    return az.loo(az.from_datatree(tree) if hasattr(az, "from_datatree") else tree)
