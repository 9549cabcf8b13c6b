"""Which tensors a program trains, and running the program with other tensors in their place."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class swapped(TorchFunctionMode):
    """Inside this context every torch function that is given a key of ``swaps`` sees its value.

    Parameters are told apart by identity. So one mechanism reaches ``pyro.param`` (the constraint's
    transform is itself a torch function), ``pyro.module``, ``PyroModule``, autoguides and plain
    ``nn.Module``s, and the param store is never touched.
    """

    def __init__(self, swaps: Mapping[Tensor, Tensor]):
        super().__init__()
        # the keys are held as well, so that no id is given to another tensor meanwhile
        self._swaps = {id(leaf): (leaf, value) for leaf, value in swaps.items()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # A parameter's hash is its identity: the param store looks names up by it.
        if func is not Tensor.__hash__:
            args = tuple([self._swap(a) for a in args])
            if kwargs:
                kwargs = {k: self._swap(a) for k, a in kwargs.items()}
        return func(*args, **(kwargs or {}))

    def _swap(self, arg: Any) -> Any:
        if type(arg) in (list, tuple):  # as torch.cat, torch.stack and the RNNs take them
            return type(arg)([self._swap(a) for a in arg])
        found = self._swaps.get(id(arg))
        return arg if found is None else found[1]


def collect(sites: Mapping[str, Any], role: str) -> dict[str, Tensor]:
    """The unconstrained leaf tensors of all ``param`` sites, by name, frozen ones left out.

    :raises ValueError: if one name stands for two tensors, as with two unnamed ``PyroModule``s that
        have an attribute of the same name: only the first would ever be trained.
    """
    leaves: dict[str, Tensor] = {}
    for name, value in sites.items():
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        if not leaf.is_leaf:
            raise ValueError(
                f"The {role}'s parameter '{name}' is not a leaf tensor: it was computed from another "
                "tensor that requires grad. Pass the initial value detached."
            )
        if leaf.requires_grad:
            leaves[name] = leaf
    return leaves


def reject_shared(theta: Mapping[str, Tensor], phi: Mapping[str, Tensor]) -> None:
    """:raises ValueError: if a parameter belongs to model and guide at once."""
    guide_names = {id(leaf): name for name, leaf in phi.items()}
    for name, leaf in theta.items():
        if name in phi or id(leaf) in guide_names:
            raise ValueError(
                f"Parameter '{guide_names.get(id(leaf), name)}' is used by both the model and the "
                "guide. The outer problem trains the model's parameters and the inner one the guide's, "
                "so no parameter can belong to both. Give one of them another name (or the "
                "PyroModules names of their own: PyroModule(name='guide')), or keep a copy."
            )
