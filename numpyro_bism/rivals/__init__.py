"""Other ways to learn an unnormalised model, behind BiSM's face: one model is trained by all of them."""

from .marginal_sm import MarginalSM
from .rival import RivalInfo, RivalState

__all__ = [
    "MarginalSM",
    "RivalInfo",
    "RivalState",
]
