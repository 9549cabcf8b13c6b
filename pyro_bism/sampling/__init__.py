"""Draws from a trained p̃(v, h): kernels that move many chains at once, and programs for the host's own MCMC."""

from .chains import Chains, default_kernel, run_chains
from .kernels import AnnealedLangevin, Gibbs, Kernel, Langevin
from .mcmc import as_model, with_statistics
from .predictive import Predictive

__all__ = [
    "AnnealedLangevin",
    "Chains",
    "Gibbs",
    "Kernel",
    "Langevin",
    "Predictive",
    "as_model",
    "default_kernel",
    "run_chains",
    "with_statistics",
]
