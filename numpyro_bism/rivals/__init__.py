"""Other ways to learn an unnormalised model, behind BiSM's face: one model is trained by all of them."""

from .marginal_sm import MarginalSM
from .nce import NCE
from .rival import RivalInfo, RivalState

__all__ = [
    "NCE",
    "MarginalSM",
    "RivalInfo",
    "RivalState",
]
