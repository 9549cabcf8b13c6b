r"""What was learnt: the normaliser, likelihoods, the score, and measures of fit that need no normaliser."""

from .annealing import AIS, ais
from .comparison import HypergradientError
from .fit import FitTest, fisher_divergence, kernel_stein_discrepancy, maximum_mean_discrepancy
from .hypergradient import hypergradient_error
from .likelihood import log_likelihood
from .normalizer import Estimate, exact_log_normalizer, free_energy, log_normalizer
from .scores import denoise, score

__all__ = [
    "AIS",
    "Estimate",
    "FitTest",
    "HypergradientError",
    "ais",
    "denoise",
    "exact_log_normalizer",
    "fisher_divergence",
    "free_energy",
    "hypergradient_error",
    "kernel_stein_discrepancy",
    "log_likelihood",
    "log_normalizer",
    "maximum_mean_discrepancy",
    "score",
]
