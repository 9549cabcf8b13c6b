"""Bi-level score matching for NumPyro. So far the outer losses only."""

from .losses import (
    DenoisingScoreMatching,
    MultiscaleDenoisingScoreMatching,
    ScoreMatching,
    SlicedScoreMatching,
)

__version__ = "0.1.0"

__all__ = [
    "DenoisingScoreMatching",
    "MultiscaleDenoisingScoreMatching",
    "ScoreMatching",
    "SlicedScoreMatching",
]
