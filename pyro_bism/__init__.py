"""Bi-level score matching for Pyro: learn energy-based latent-variable models by swapping SVI for BiSM."""

from .bism import BiSM, BiSMInfo
from .diagnostics import psis_khat, to_arviz
from .distributions import ConcreteBernoulli, ConcreteOneHot
from .divergences import FisherDivergence
from .hypergradients import Amortized, Covariance, Detached, Exact, Implicit, Penalty, Unrolled
from .losses import (
    DenoisingScoreMatching,
    MultiscaleDenoisingScoreMatching,
    ScoreMatching,
    SlicedScoreMatching,
)

__version__ = "0.1.0"

__all__ = [
    "Amortized",
    "BiSM",
    "BiSMInfo",
    "ConcreteBernoulli",
    "ConcreteOneHot",
    "Covariance",
    "DenoisingScoreMatching",
    "Detached",
    "Exact",
    "FisherDivergence",
    "Implicit",
    "MultiscaleDenoisingScoreMatching",
    "Penalty",
    "ScoreMatching",
    "SlicedScoreMatching",
    "Unrolled",
    "psis_khat",
    "to_arviz",
]
