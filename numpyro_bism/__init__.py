"""Bi-level score matching for NumPyro. So far the outer losses and hypergradients only."""

from .hypergradients import Detached, Unrolled
from .losses import (
    DenoisingScoreMatching,
    MultiscaleDenoisingScoreMatching,
    ScoreMatching,
    SlicedScoreMatching,
)

__version__ = "0.1.0"

__all__ = [
    "DenoisingScoreMatching",
    "Detached",
    "MultiscaleDenoisingScoreMatching",
    "ScoreMatching",
    "SlicedScoreMatching",
    "Unrolled",
]
