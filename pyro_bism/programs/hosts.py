"""Parts of torch and Pyro that have no public form, under one roof: what a new version of either is held against first.

- Trees of arguments: ``torch.utils._pytree`` takes them apart in torch's own exporter, and has no public form.
- Stand-ins: a ``FakeTensor`` has a shape and no memory, and stands for a tensor while a step is captured.
- Plates: a ``_Subsample`` is how Pyro's handlers tell a plate's own statement from others.

Other private parts stand beside their one use: torch's compiler in ``compiled/inductor.py``, Pyro's ELBOs in
``compiled/hosts.py``, tensor subclasses in ``energies/values.py`` and ``visible.py``, optimisers in ``optim/host.py``,
HMC in ``sampling/mcmc.py``, a plate's draw in ``all_rows.py``, the param store's constraints in ``params.py``.
"""

from pyro.poutine.subsample_messenger import _Subsample as Subsample
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

__all__ = ["Subsample", "is_stand_in", "pytree"]


def is_stand_in(x: Tensor) -> bool:
    """Whether there are no values behind a tensor: it stands for one while a step is captured."""
    return isinstance(x, FakeTensor)
