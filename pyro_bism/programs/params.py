"""Which tensors a program trains, and running the program with other tensors in their place."""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import transform_to
from torch.nn import Module, Parameter
from torch.overrides import TorchFunctionMode


def stored() -> dict[str, Tensor]:
    """The unconstrained leaves that the param store holds, by name."""
    return dict(pyro.get_param_store().named_parameters())


class params_read_as(Messenger):
    """Inside this context ``pyro.param`` statements give these values, unconstrained and by name.

    A module states its weights only to register them and goes on to read its own, so its statements are
    let be: a program with such weights needs :class:`tensors_read_as`.
    """

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self._values = values

    def _pyro_param(self, msg: Any) -> None:
        name, initial = msg["name"], msg["args"][1:]
        if name not in self._values or (initial and isinstance(initial[0], Parameter)):
            return
        value = self._values[name]
        # the store keeps the constraint of the first statement, as pyro.param does
        # there is no public way to ask the store for one
        constraint = pyro.get_param_store()._constraints.get(name, msg["kwargs"]["constraint"])
        msg["value"] = transform_to(constraint)(value)
        msg["value"].unconstrained = weakref.ref(value)
        msg["done"] = True


class tensors_read_as(TorchFunctionMode):
    """Inside this context every torch function that is given a key of ``swaps`` sees its value.

    Parameters are told apart by identity. So one mechanism reaches ``pyro.param`` (the constraint's
    transform is itself a torch function), ``pyro.module``, ``PyroModule``, autoguides and plain
    ``nn.Module``s, and the param store is never touched. It costs a Python call for every torch function;
    where all parameters are read from their ``pyro.param`` statements, :class:`given` does the same for less.
    """

    def __init__(self, swaps: Mapping[Tensor, Tensor]):
        super().__init__()
        # the leaves are held as well, so that no id is given to another tensor meanwhile
        self._leaves = list(swaps)
        self._swaps = {id(leaf): value for leaf, value in swaps.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A parameter's hash is its identity: the param store looks names up by it.
        if func is not Tensor.__hash__:
            args = self._swapped(args)
            if kwargs:
                kwargs = dict(zip(kwargs, self._swapped(kwargs.values()), strict=True))
        return func(*args, **(kwargs or {}))

    def _swapped(self, args: Iterable[Any]) -> list[Any]:
        swaps = self._swaps
        return [
            # lists and tuples, as torch.cat, torch.stack and the RNNs take them
            swaps.get(id(a), a) if type(a) not in (list, tuple) else type(a)(self._swapped(a))
            for a in args
        ]


@contextmanager
def holding_values(leaves: Iterable[Tensor], values: Iterable[Tensor]) -> Iterator[None]:
    """Inside, these parameters have these values themselves: whatever reads them sees these.

    So it is for weights that :class:`tensors_read_as` does not reach: those that an ``autograd.Function``, a scripted
    module or a checkpointed one reads. What is differentiated must be so inside: outside the parameters have their own
    values.
    """
    pairs = [(leaf, leaf.detach().clone(), value.detach()) for leaf, value in zip(leaves, values, strict=True)]
    with torch.no_grad():
        for leaf, _, value in pairs:
            leaf.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for leaf, own, _ in pairs:
                leaf.copy_(own)


@contextmanager
def unmoved_buffers(buffers: Sequence[Tensor]) -> Iterator[None]:
    """Module buffers (batch-norm statistics) are afterwards what they were before: a look is no step."""
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)


@contextmanager
def unmoved_attributes(modules: Iterable[Module]) -> Iterator[None]:
    """Inside, what these modules set of themselves (``self.b = ...``) they have set until the end only.

    A recorded pass would leave a stand-in there: ``spectral_norm`` takes its vectors for what its iteration returned.
    """
    own = [module for module in modules if not isinstance(module, torch.jit.ScriptModule)]  # theirs are not Python's
    kept = [(place, dict(place)) for module in own for place in (module._buffers, vars(module))]
    try:
        yield
    finally:
        for place, before in kept:
            for name in [name for name in place if name not in before]:
                del place[name]
            place.update(before)


@contextmanager
def jittered(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Inside, parameters are off their values: at weights of zero what is not read, or is linear, can't be told from
    what is. What is drawn there leaves no trace."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        moved = [leaf.detach() + 0.1 * torch.randn_like(leaf) for leaf in leaves]
        with holding_values(leaves, moved):
            yield


def out_of_sight(function: Callable[[], Tensor], leaves: Mapping[str, Tensor]) -> list[str]:
    """The parameters that a function reads, by autograd's account, where :class:`tensors_read_as` gives others."""
    stand_ins = {leaf: leaf.detach().clone().requires_grad_() for leaf in leaves.values()}
    with tensors_read_as(stand_ins):
        value = function()
    if not value.requires_grad:
        return []
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return [name for name, g in zip(leaves, found, strict=True) if g is not None]


def astray(
    function: Callable[[], Tensor],
    phi: Mapping[str, Tensor],
    theta: Mapping[str, Tensor],
    at: Callable[[Sequence[Tensor]], AbstractContextManager[Any]],
) -> list[str]:
    """The names of φ's parameters in which a function has other derivatives where stand-ins are put in their place.

    Tried off their present values, the derivatives taken as unrolled steps take them, after the context that puts the
    stand-ins in place has been left; against those that autograd finds with the parameters themselves moved there. A
    checkpointed module, which reads its weights once more on the way back, is found so.
    """
    moved = [(1.05 * leaf + 0.05).detach() for leaf in phi.values()]

    def slopes(leaves: Sequence[Tensor], value: Tensor) -> list[Tensor | None]:
        if not value.requires_grad:
            return [None] * (2 * len(leaves) + len(theta))
        first = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        square: Any = sum(g.square().sum() for g in first if g is not None)
        second: Sequence[Tensor | None] = [None] * (len(leaves) + len(theta))
        if isinstance(square, Tensor) and square.requires_grad:
            second = torch.autograd.grad(square, [*leaves, *theta.values()], allow_unused=True)
        return [*first, *second]

    before = random_state()
    leaves = list(phi.values())
    with holding_values(leaves, moved):
        right = slopes(leaves, function())
    set_random_state(before)
    stand_ins = [value.clone().requires_grad_() for value in moved]
    with at(stand_ins):
        value = function()
    found = slopes(stand_ins, value)
    wrong = [not _alike(a, b) for a, b in zip(right, found, strict=True)]
    num = len(phi)
    for part in (wrong[:num], wrong[num : 2 * num]):  # the second derivatives of all others are wrong with one's first
        if any(part):
            return [name for name, is_wrong in zip(phi, part, strict=True) if is_wrong]
    return list(phi) if any(wrong) else []


def _alike(right: Tensor | None, found: Tensor | None) -> bool:
    a, b = (x if x is None else x.detach() for x in (right, found))
    if a is None or b is None:
        return a is b or not bool((b if a is None else a).any())  # type: ignore[union-attr]
    scale = a.abs().max() if a.numel() else a.sum()
    return bool(((a - b).abs() <= 1e-3 * scale).all()) or not bool(a.isfinite().all())


@contextmanager
def fixed(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Inside, these parameters are numbers: no graph is built to them.

    Only for what is used up inside: a graph that is built here and run through later finds them again.
    """
    held = [leaf for leaf in leaves if leaf.requires_grad]
    for leaf in held:
        leaf.requires_grad_(False)
    try:
        with warnings.catch_warnings():  # of pyro.module's, that such a weight is not registered: it is
            warnings.filterwarnings("ignore", ".* was not registered in the param store", UserWarning)
            yield
    finally:
        for leaf in held:
            leaf.requires_grad_(True)


def random_state() -> dict[str, Any]:
    """The state of every random number generator that a program may draw from."""
    state = pyro.util.get_rng_state()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Take up a state of :func:`random_state`."""
    pyro.util.set_rng_state({k: s for k, s in state.items() if k != "cuda"})
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


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


def frozen(sites: Iterable[Any], modules: Iterable[Module]) -> tuple[Tensor, ...]:
    """The leaf tensors of ``param`` sites and of modules that do not require grad.

    Pyro states no site for a module's frozen weights.
    """
    leaves = [v.unconstrained() if hasattr(v, "unconstrained") else v for v in sites]
    leaves += [weight for module in modules for weight in module.parameters()]
    return tuple({id(leaf): leaf for leaf in leaves if not leaf.requires_grad}.values())


def reject_shared(theta: Mapping[str, Tensor], phi: Mapping[str, Tensor]) -> None:
    """Check whether every parameter belongs to the model alone or to the guide alone.

    :raises ValueError: if one belongs to both.
    """
    guide_names = {id(leaf): name for name, leaf in phi.items()}
    for name, leaf in theta.items():
        if name in phi or id(leaf) in guide_names:
            raise ValueError(
                f"Parameter '{guide_names.get(id(leaf), name)}' is used by both the model and the "
                "guide. The outer problem trains the model's parameters and the inner one the guide's, "
                "so no parameter can belong to both. Give one of them another name (or the "
                "PyroModules names of their own: PyroModule(name='guide')), or keep a copy."
            )
