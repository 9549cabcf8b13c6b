"""Bi-level score matching for NumPyro: learn energy-based latent-variable models by swapping SVI for BiSM."""

from .bism import BiSM, BiSMInfo, BiSMRunResult, BiSMState
from .diagnostics import psis_khat, to_arviz
from .distributions import ConcreteBernoulli, ConcreteOneHot
from .divergences import FisherDivergence
from .hypergradients import Detached, Unrolled
from .losses import (
    DenoisingScoreMatching,
    MultiscaleDenoisingScoreMatching,
    ScoreMatching,
    SlicedScoreMatching,
)

__version__ = "0.1.0"

__all__ = [
    "BiSM",
    "BiSMInfo",
    "BiSMRunResult",
    "BiSMState",
    "ConcreteBernoulli",
    "ConcreteOneHot",
    "DenoisingScoreMatching",
    "Detached",
    "FisherDivergence",
    "MultiscaleDenoisingScoreMatching",
    "ScoreMatching",
    "SlicedScoreMatching",
    "Unrolled",
    "psis_khat",
    "to_arviz",
]
