"""Bi-level score matching for NumPyro: learn energy-based latent-variable models by swapping SVI for BiSM."""

import os
import warnings

import jaxlib
from jax._src.xla_bridge import backends_are_initialized  # there is no public way to ask

from .autoguide import AmortizedGuide
from .bism import BiSM, BiSMInfo, BiSMRunResult, BiSMState
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

# jaxlib 0.10.2, the newest for Python 3.11, silently sums wrongly on CPUs from row 32,769 on where a product with a
# matrix is summed (jax-ml/jax#39103): every quadratic energy is such a sum. Without that fusion it is right.
if jaxlib.__version__ == "0.10.2" and "ynn_fusion_type" not in os.environ.get("XLA_FLAGS", ""):
    if backends_are_initialized():
        warnings.warn(
            "jaxlib 0.10.2 computes some sums over more than 32,768 rows wrongly on CPUs. Import numpyro_bism before "
            "JAX is first used, or install another jaxlib (0.10.1).",
            UserWarning,
            stacklevel=2,
        )
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_experimental_ynn_fusion_type=-reduce"
    os.environ["XLA_FLAGS"] = flags.strip()
