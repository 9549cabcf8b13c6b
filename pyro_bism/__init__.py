"""Bi-level score matching for Pyro: learn energy-based latent-variable models by swapping SVI for BiSM."""

from .autoguide import AmortizedGuide
from .bism import BiSM, BiSMInfo
from .diagnostics import psis_khat, to_arviz
from .distributions import ConcreteBernoulli, ConcreteOneHot
from .divergences import FisherDivergence, InnerLoss
from .evaluation import (
    ais,
    denoise,
    exact_log_normalizer,
    fisher_divergence,
    free_energy,
    hypergradient_error,
    kernel_stein_discrepancy,
    log_likelihood,
    log_normalizer,
    maximum_mean_discrepancy,
    score,
)
from .hypergradients import (
    Amortized,
    Bilevel,
    Covariance,
    Detached,
    Exact,
    Functional,
    Hypergradient,
    Implicit,
    Penalty,
    Result,
    Unrolled,
)
from .kernels import Kernel
from .losses import (
    DenoisingScoreMatching,
    MultiscaleDenoisingScoreMatching,
    Noise,
    OuterLoss,
    ScoreMatching,
    SlicedScoreMatching,
)
from .predictive import Predictive
from .reports import calibration, diagnose, loo
from .rivals import CD, NCE, VNCE, MarginalSM, PersistentVI, PseudoLikelihood, RivalInfo, VNCEInfo
from .sampling import AnnealedLangevin, Gibbs, Langevin, program, recorded, run_chains

__version__ = "0.1.0"

__all__ = [
    "CD",
    "NCE",
    "VNCE",
    "Amortized",
    "AmortizedGuide",
    "AnnealedLangevin",
    "BiSM",
    "BiSMInfo",
    "Bilevel",
    "ConcreteBernoulli",
    "ConcreteOneHot",
    "Covariance",
    "DenoisingScoreMatching",
    "Detached",
    "Exact",
    "FisherDivergence",
    "Functional",
    "Gibbs",
    "Hypergradient",
    "Implicit",
    "InnerLoss",
    "Kernel",
    "Langevin",
    "MarginalSM",
    "MultiscaleDenoisingScoreMatching",
    "Noise",
    "OuterLoss",
    "Penalty",
    "PersistentVI",
    "Predictive",
    "PseudoLikelihood",
    "Result",
    "RivalInfo",
    "ScoreMatching",
    "SlicedScoreMatching",
    "Unrolled",
    "VNCEInfo",
    "ais",
    "calibration",
    "denoise",
    "diagnose",
    "exact_log_normalizer",
    "fisher_divergence",
    "free_energy",
    "hypergradient_error",
    "kernel_stein_discrepancy",
    "log_likelihood",
    "log_normalizer",
    "loo",
    "maximum_mean_discrepancy",
    "program",
    "psis_khat",
    "recorded",
    "run_chains",
    "score",
    "to_arviz",
]
