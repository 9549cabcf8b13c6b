"""Other ways to learn an unnormalised model, behind BiSM's face: one model is trained by all of them."""

from .cd import CD
from .marginal_sm import MarginalSM
from .nce import NCE
from .persistent_vi import PersistentVI
from .pseudo_likelihood import PseudoLikelihood
from .rival import RivalInfo, RivalState
from .vnce import VNCE, VNCEInfo

__all__ = [
    "CD",
    "NCE",
    "VNCE",
    "MarginalSM",
    "PersistentVI",
    "PseudoLikelihood",
    "RivalInfo",
    "RivalState",
    "VNCEInfo",
]
