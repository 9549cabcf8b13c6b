"""A recording of what a function does with tensors, and whether it is what the function does."""

import math
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.util
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ..programs import params
from ..programs.hosts import pytree
from ..programs.records import record
from ..programs.visible import has_memory
from .hosts import recording
from .inductor import compile_recording

PACKAGE = Path(__file__).parents[1]


class Original(NamedTuple):
    """What a recording is of, for a look at whether it is that.

    :ivar run: the function on the tensors themselves.
    :ivar trained: θ and φ, by name.
    :ivar moved: what ``run`` may move, each with the name of the parameter that it belongs to, if it does.
    :ivar num_theta: how many of ``trained`` are θ.
    """

    run: Callable[[], Any]
    trained: Mapping[str, Tensor]
    moved: Sequence[tuple[Tensor, str | None]]
    num_theta: int

    def last(self, k: int, gradient: Any) -> list[str]:
        """Whose gradient the k-th result from the end may be."""
        leaves = list(self.trained.items())
        groups = [group for group in (leaves[: self.num_theta], leaves[self.num_theta :]) if k <= len(group)]
        return [group[-k][0] for group in groups if group[-k][1].shape == getattr(gradient, "shape", None)]


class Graph:
    """A function of a list of tensors, recorded, tried out beside its original and compiled.

    :raises RuntimeError: where what it does depends on the values of tensors, or is not what the original does.
    """

    def __init__(self, function: Callable[..., Any], inputs: list[Tensor], original: Original):
        def flat(*values: Tensor) -> list[Tensor]:
            leaves, self._spec = pytree.tree_flatten(function(values))
            self._is_list = self._spec.type is list and all(child.is_leaf() for child in self._spec.children())
            self._constants = [None if isinstance(x, Tensor) else x for x in leaves]
            self._places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
            return [leaves[i].detach() for i in self._places]

        state = params.random_state()
        inputs = [x.detach() for x in inputs]
        record.last = None
        with _last_site(), recording():
            try:
                recorded = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
            except Exception as error:
                raise _explained(error) from error
            finally:
                params.set_random_state(state)
        closed_over = _lift(recorded)
        self._closed_over = [x.detach() for x in closed_over]
        recorded.recompile()
        beside = [name for name, leaf in original.trained.items() if any(_overlap(x, leaf) for x in closed_over)]
        if beside:
            raise RuntimeError(
                f"jit=True: the step can't be captured: parameters {beside} are read past pyro.param and torch's "
                "functions, so that the captured step would not train them. Take jit=False, or write that part in "
                "plain torch."
            )
        _require_same(original, lambda: self._filled(recorded(*inputs, *self._closed_over)))
        recorded.graph.eliminate_dead_code()
        given = [*inputs, *self._closed_over]
        placeholders = [node for node in recorded.graph.nodes if node.op == "placeholder"]
        self._read = [i for i, node in enumerate(placeholders) if node.users]
        for node in placeholders:
            if not node.users:
                recorded.graph.erase_node(node)
        recorded.recompile()
        self._run = compile_recording(recorded, [given[i] for i in self._read])
        placeholders = [node for node in recorded.graph.nodes if node.op == "placeholder"]
        written = {node.args[0] for node in recorded.graph.nodes if "copy_" in str(node.target)}
        self._written = [i for i, node in enumerate(placeholders) if node in written]

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        given = [*inputs, *self._closed_over]
        values = [given[i] for i in self._read]
        written = [values[i] for i in self._written]
        found = self._run(values)
        torch.autograd.graph.increment_version(written)
        leaves = self._filled(found)
        return leaves if self._is_list else pytree.tree_unflatten(leaves, self._spec)

    def _filled(self, found: Sequence[Tensor]) -> list[Any]:
        """All leaves of the result, of which ``found`` are the tensors."""
        leaves = list(self._constants)
        for i, x in zip(self._places, found, strict=True):
            leaves[i] = x
        return leaves


def _require_same(original: Original, replay: Callable[[], list[Any]]) -> None:
    """Run a recording beside its original, on the same tensors with the same noise.

    What they return and what they move, the optimisers' running means of the gradients too, has to be the same but for
    rounding. It is looked at once a graph, before the recording is compiled, and costs an eager step: little beside
    compilation.

    :raises RuntimeError: where it is not the same: the recording has a number for what changes, or lacks a derivative.
    """
    moved = [x for x, _ in original.moved]
    before = [x.clone() for x in moved]

    def outcome(run: Callable[[], Any], off: float = 0.0) -> list[Any]:
        state = params.random_state()
        try:
            if off:
                with torch.no_grad():
                    for leaf in original.trained.values():
                        leaf.mul_(1.0 + off)
            with pyro.validation_enabled(False):
                leaves = pytree.tree_leaves(run())
            return [x.detach().clone() if isinstance(x, Tensor) else x for x in (*leaves, *moved)]
        finally:
            params.set_random_state(state)
            with torch.no_grad():
                for x, value in zip(moved, before, strict=True):
                    x.copy_(value)

    found, right = outcome(torch.no_grad()(replay)), outcome(original.run)
    num = len(right) - len(moved)
    bases = [*[0.0] * num, *before]
    if len(found) == len(right) and all(map(_agree, right, found, bases)):
        return
    names: list[str] = []
    if len(found) == len(right):
        # what rounding of the parameters changes as much says nothing (Adam's first step is its gradient's sign)
        others = outcome(original.run, 4 * torch.finfo(moved[0].dtype).eps)
        wrong = [i for i, each in enumerate(zip(right, found, bases, others, strict=True)) if not _agree(*each)]
        if not wrong:
            return
        names = [name for i in wrong if i >= num for name in [original.moved[i - num][1]] if name]
        # gradients that the optimiser follows outside of the graph stand last
        names = names or [name for i in wrong for name in original.last(num - i, right[i])]
    listed = f"parameters {list(dict.fromkeys(names))} have" if names else "it has"
    raise RuntimeError(
        f"jit=True: the captured step is not the programs' own: {listed} another gradient in it. What a recording of "
        "torch's operations leaves out is not trained as the programs do: a hook on a parameter's gradient, say, or a "
        "branch on whether the program is being traced. Take jit=False, or write that part in plain torch."
    )


def _agree(right: Any, found: Any, base: Any, other: Any = None) -> bool:
    """Whether two results are the same but for rounding, ``other`` being one that should be."""
    if not (isinstance(right, Tensor) and isinstance(found, Tensor)):
        return right is found or right == found or (right != right and found != found)
    if right.shape != found.shape or not right.is_floating_point() or not right.numel():
        return torch.equal(right, found)
    known = right.isfinite()
    scale = torch.where(known, (right - base).abs(), 0.0).max()
    off = 0.0 if other is None else 10 * (right - other).abs()
    near = (right - found).abs() <= math.sqrt(torch.finfo(right.dtype).eps) * scale + off
    return torch.equal(known, found.isfinite()) and bool((near | ~known).all())


def _lift(recorded: torch.fx.GraphModule) -> list[Tensor]:
    """Make the tensors that the program closed over inputs of the graph: they may change in place."""
    places: dict[str, torch.fx.Node] = {}
    placeholders = [node for node in recorded.graph.nodes if node.op == "placeholder"]
    tensors: list[Tensor] = []
    for node in list(recorded.graph.nodes):
        if node.op != "get_attr":
            continue
        if node.target not in places:
            with recorded.graph.inserting_after(placeholders[-1]):
                places[node.target] = recorded.graph.placeholder(f"closed_over_{len(tensors)}")
            placeholders.append(places[node.target])
            tensors.append(getattr(recorded, node.target))
        node.replace_all_uses_with(places[node.target])
        recorded.graph.erase_node(node)
    for node in placeholders:  # torch's compiler would take what it finds here for its arguments, all or none
        node.meta.pop("val", None)
    for name in places:  # torch's compiler would take what is left for parameters, and pass them too
        delattr(recorded, name)
    return tensors


class _last_site(Messenger):
    """Keeps the name of the statement that ran last, for programs that a host ELBO runs."""

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            record.last = msg["name"]


def _explained(error: Exception) -> Exception:
    """An error that names the place in the user's program."""
    # the last of these folders is Python's own library
    inside = [*(Path(file).parent for file in (torch.__file__, pyro.__file__, warnings.__file__)), PACKAGE]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).exists()]
    own = [f for f in frames if not any(folder in Path(f.filename).parents for folder in inside)]
    place = f"{own[-1].filename}, line {own[-1].lineno}: {own[-1].line}" if own else "no line of yours"
    before = "" if record.last is None else f"The last sample statement before was '{record.last}'; "
    first = (str(error).splitlines() or ["it asks for the value of a tensor"])[0]
    return RuntimeError(
        f"jit=True: the step can't be captured ({first}). {before}{place}. What the program does must not depend on "
        "the values of tensors: write torch.where for if, leave tensors tensors (no float(), .numpy(), .tolist()), or "
        "take jit=False."
    )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share memory: the same one, or one made past torch's functions (``.data``)."""
    if a is b:
        return True
    if a.device != b.device or not (has_memory(a) and has_memory(b)):
        return False
    (first, end), (other, other_end) = (_extent(x) for x in (a, b))
    return first < other_end and other < end


def _extent(x: Tensor) -> tuple[int, int]:
    """Where a tensor's entries begin and end in memory."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
