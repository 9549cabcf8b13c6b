"""Predictive: draws of a trained energy with the face of the host's Predictive, which can't make them."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..programs.modes import in_own_modes
from .chains import default_kernel, run_chains
from .kernels import Kernel

GOOD_RHAT = 1.1  # of chains too short to be held to a diagnosis's 1.05
MIN_SAMPLES = 100  # draws of a chain from which on R̂ says anything


class Predictive:
    r"""Draws of (v, h) from a trained energy, or of some sites given others, called as ``numpyro.infer.Predictive`` is.

    .. code-block:: python

        Predictive(bism, state, num_samples=200)(rng_key, x)["v"]  # (200, n, ...): v of the model, beside x

    The host's own runs a model forward, site after site, and knows nothing of factors: of a *flat* site,
    ``.mask(False)``, it draws the placeholder that declares its support, whatever the energy; so are the ``prior`` and
    the ``posterior_predictive`` that ArviZ's ``from_numpyro`` is given. This one runs chains: as many as the data have
    rows, all at once, each started at its row.

    :param trained: a BiSM or a rival.
    :param state: its state.
    :param num_samples: draws of every chain.
    :param num_warmup: steps before them; None as for :func:`run_chains`.
    :param thinning: steps from one draw to the next.
    :param kernel: what moves them; None takes :class:`Gibbs` where the energy has the conditionals, else
        :class:`Langevin`.
    :param sites: the sites that are drawn, given all others at the data and at the guide's draw; None draws all of (v,
        h). ``["h"]`` draws latents given the data.
    :param return_sites: the sites that are returned; None returns all that are drawn.
    :param init: where the chains start, as for :func:`run_chains`.
    :param progress_bar: whether to show how many steps the chains have taken.
    :raises ValueError: if ``trained`` is a program and not a trained energy.
    """

    def __init__(
        self,
        trained: Any,
        state: Any,
        *,
        num_samples: int = 1000,
        num_warmup: int | None = None,
        thinning: int = 1,
        kernel: Kernel | None = None,
        sites: Sequence[str] | None = None,
        return_sites: Sequence[str] | None = None,
        init: str | Mapping[str, Any] = "data",
        progress_bar: bool = False,
    ):
        if not hasattr(trained, "energy"):
            raise ValueError(
                f"Predictive draws from a trained energy, a BiSM or a rival; got {type(trained).__name__}. A model "
                "without flat sites and factors is numpyro.infer.Predictive's."
            )
        self.trained = trained
        self.state = state
        self.return_sites = return_sites
        self.kernel = kernel
        self.options: dict[str, Any] = {
            "num_samples": num_samples,
            "num_warmup": num_warmup,
            "thinning": thinning,
            "sites": sites,
            "init": init,
            "progress_bar": progress_bar,
        }

    @in_own_modes
    def __call__(self, rng_key: Array, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """The draws by site, of shape (num_samples, n, ...); draws of one row follow one another in its chain.

        They are those of the density learnt: after denoising score matching, of noisy v. :func:`denoise` takes the
        noise away. A warning says if the chains have not mixed.

        :param rng_key: a JAX random key.
        :param args: arguments of model and guide, the data among them.
        :param kwargs: keyword arguments of model and guide.
        :raises ValueError: on misuse, naming the site and the cure.
        :raises FloatingPointError: if a chain's log density is not finite.
        """
        key_energy, key_chains = jax.random.split(rng_key)
        kernel = self.kernel
        if kernel is None:
            kernel = default_kernel(self.trained.energy(self.state, *args, rng_key=key_energy, **kwargs)[0])
        chains = run_chains(
            self.trained, self.state, *args, rng_key=key_chains, kernel=kernel, **self.options, **kwargs
        )
        names = chains.moved if self.return_sites is None else tuple(self.return_sites)
        for name in names:
            if name not in chains.values:
                raise ValueError(f"return_sites names '{name}'; the sites are {sorted(chains.values)}.")
        if not chains.has_rows:
            _warn_unless_mixed(chains)
        values = {name: chains.values[name] for name in names}
        if chains.has_rows:  # in the one copy of the data
            return {name: value[0] for name, value in values.items()}
        return {name: jnp.swapaxes(value, 0, 1) for name, value in values.items()}  # every row is a chain


def _warn_unless_mixed(chains: Any) -> None:
    num_chains, num_samples = chains.log_joint.shape
    if num_chains < 2 or num_samples < MIN_SAMPLES:
        return
    values = [chains.log_joint, *(chains.values[name] for name in chains.moved)]
    flat = [np.asarray(value, float).reshape(num_chains, num_samples, -1) for value in values]
    rhat = float(_split_rhat(np.concatenate(flat, -1)).max())
    if rhat > GOOD_RHAT:
        warnings.warn(
            f"Predictive: the chains have not mixed, R-hat {rhat:.2f}: the draws still tell where they started. Take "
            "more num_warmup and num_samples, or another kernel; diagnose() says more.",
            UserWarning,
            stacklevel=3,
        )


def _split_rhat(draws: np.ndarray) -> np.ndarray:
    """R̂ of half chains by unit, of (chain, draw, unit) (Gelman et al. 2013): 1 where nothing moves and all agree."""
    num = draws.shape[1] // 2
    halves = np.concatenate([draws[:, :num], draws[:, num : 2 * num]])
    within, between = halves.var(1, ddof=1).mean(0), halves.mean(1).var(0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rhat = np.sqrt((num - 1) / num + between / within)
    return np.where(within > 0, rhat, np.where(between > 0, math.inf, 1.0))
