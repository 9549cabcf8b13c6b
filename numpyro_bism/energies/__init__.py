r"""log p̃(v, h; θ) row by row, and which of its conditionals have closed forms.

Samplers and estimators of the normaliser look at a model as a density over a *point* x: the visible values, one matrix,
and the latent ones, by site; every array leads with the rows, and a row knows nothing of the others. Continuous
latents stand in it unconstrained, the Jacobian in the density. Discrete visible values stand by site too.

What can be summed, integrated or drawn in closed form is proved from the program of the energy (:mod:`.proof`):

- *affine* in bits or one-hot vectors (every restricted Boltzmann machine is): they are independent given the
  rest, their logits are one gradient;
- *gaussian*, quadratic in real variables: mean and precision are a gradient and a Hessian;
- *units*: other discrete sites, one unit after the other by the differences of the energy;
- *free*: all else.
"""

from .cells import NoIntegral, OutOfReach
from .density import VISIBLE, Block, Density, Latent, Point, pack, random_labels, replaced, unpack
from .energy import Energy
from .integrals import Integral, named, repeated
from .proof import prove
from .structure import random_points
from .values import COVARIATES

__all__ = [
    "COVARIATES",
    "VISIBLE",
    "Block",
    "Density",
    "Energy",
    "Integral",
    "Latent",
    "NoIntegral",
    "OutOfReach",
    "Point",
    "named",
    "pack",
    "prove",
    "random_labels",
    "random_points",
    "repeated",
    "replaced",
    "unpack",
]
