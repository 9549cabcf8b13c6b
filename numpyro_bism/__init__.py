"""Bi-level score matching for NumPyro: learn energy-based latent-variable models by swapping SVI for BiSM."""

from .autoguide import AmortizedGuide
from .bism import BiSM, BiSMInfo, BiSMRunResult, BiSMState
from .compiled.xla import set_flags
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
from .evaluation.arviz import to_arviz
from .evaluation.calibration import calibration, loo
from .evaluation.psis import psis_khat
from .evaluation.report import diagnose
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
from .losses import (
    DenoisingScoreMatching,
    MultiscaleDenoisingScoreMatching,
    Noise,
    OuterLoss,
    ScoreMatching,
    SlicedScoreMatching,
)
from .rivals import CD, NCE, VNCE, MarginalSM, PersistentVI, PseudoLikelihood, RivalInfo, RivalState, VNCEInfo
from .sampling import AnnealedLangevin, Gibbs, Langevin
from .sampling.chains import run_chains
from .sampling.kernels import Kernel
from .sampling.mcmc import as_model, with_statistics
from .sampling.predictive import Predictive

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
    "BiSMRunResult",
    "BiSMState",
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
    "RivalState",
    "ScoreMatching",
    "SlicedScoreMatching",
    "Unrolled",
    "VNCEInfo",
    "ais",
    "as_model",
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
    "psis_khat",
    "run_chains",
    "score",
    "to_arviz",
    "with_statistics",
]

set_flags()  # before JAX is first used
