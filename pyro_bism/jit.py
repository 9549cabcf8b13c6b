"""The captured step: a step of BiSM, or of a rival, as graphs of tensor operations, compiled.

A function of the problem runs once on stand-ins for all tensors that change from step to step (parameters,
optimiser states, data, buffers); every operation on them is recorded (``make_fx``) and torch's compiler makes a
program of the recording. The inner step is one such graph, called K times; hypergradient and outer update are
another. Noise is drawn inside by torch's own generator, in the order of the eager step.
"""

import math
import operator
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pyro
import pyro.util
import torch
from pyro.infer.util import Dice
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from . import optim, params
from .densities import Pair, record
from .hypergradients import Bilevel, Gradient, Hypergradient, Result, norm, slopes
from .visible import Batch, flatten, has_memory

MAX_CAPTURES = 8  # as torch.compile's own limit
MAX_SUMS = 2**13  # multiplications
MIN_ENTRIES = 2**10  # for which a scalar is worth a place in memory
# torch's own generator, and no check of what the graph itself has made
OPTIONS = {
    "fallback_random": True,
    "size_asserts": False,
    "alignment_asserts": False,
    "cpp.min_chunk_size": 16384,  # threads cost more than they gain on less
}
# For an early first step. All in one C++ program, not one for each group of operations between two calls of a library;
# what calls the kernels is compiled with little optimisation, the kernels with all; two graphs are too few for a
# precompiled header to pay; and the processor's own list of vector instructions is taken at its word: to try out which
# of them compile and load takes longer than a small model's kernels. A torch that lacks one of these goes without.
EARLY = {
    "cpp_wrapper": True,
    "cpp_wrapper_build_separate": True,
    "cpp_cache_precompile_headers": False,
    "cpp.vec_isa_ok": True,
}


@dataclass
class Captured(Bilevel):
    """A bi-level problem on stand-ins.

    :ivar strategy: the hypergradient.
    :ivar write_theta: takes θ's optimiser step in place where it is allowed to; None if torch takes it, outside.
    :ivar write_phi: the same for φ.
    """

    is_captured = True

    strategy: Hypergradient | None = None
    write_theta: Callable[[Gradient, Tensor], None] | None = None
    write_phi: Callable[[Gradient, Tensor], None] | None = None


def told(*values: Tensor) -> Tensor:
    """What a step tells of itself, in one tensor: to read numbers out one by one takes longer than to compute them."""
    return torch.stack([value.detach().to(values[0].device) for value in values])


def left(write: Callable[[Gradient, Tensor], None] | None, gradient: Gradient, allowed: Tensor) -> list[Any]:
    """What of an optimiser's step is left to torch: the gradient; where ``write`` takes it, which leaves have moved."""
    if write is None:
        return list(gradient)
    write(gradient, allowed)
    return [g is not None for g in gradient]


def _look(problem: Bilevel) -> list[Any]:
    """G and ‖∇_φ G‖."""
    loss, gradient = slopes(problem, "inner", "phi")
    return [told(loss, norm(gradient))]


def _fit(problem: Captured) -> list[Any]:
    """An inner step: G, ‖∇_φ G‖, and the gradient if it has yet to be followed, else which leaves it moves."""
    loss, gradient = slopes(problem, "inner", "phi")
    length = norm(gradient)
    return [told(loss, length), *left(problem.write_phi, gradient, length.isfinite())]


def _follow(problem: Captured, state: Any) -> list[Any]:
    """The outer step: ‖dJ/dθ‖, the rest of the strategy's result, and the gradient, or which leaves it moves."""
    assert problem.strategy is not None
    found = problem.strategy(problem, state)
    length = norm(found.gradient)
    rest = left(problem.write_theta, found.gradient, length.isfinite() & found.loss.isfinite())
    return [length, found.loss, found.state, found.residual, found.curvature, *rest]


class Program:
    """The graphs of what a method solves, on arguments of one structure.

    :param problem: makes it of a pair, a batch, θ and φ: an object with attributes ``theta`` and ``phi``, and
        ``write_theta`` and ``write_phi``, which take the optimisers' steps in place where torch need not.
    :param theta: what ``outer_optim`` moves.
    :param phi: what ``inner_optim`` moves.
    :param unrolls: whether the inner optimiser's steps are differentiated.
    """

    def __init__(
        self,
        pair: Pair,
        problem: Callable[..., Any],
        theta: Sequence[Tensor],
        phi: Sequence[Tensor],
        outer_optim: PyroOptim,
        inner_optim: PyroOptim,
        unrolls: bool = False,
    ):
        self.pair, self._problem, self._unrolls = pair, problem, unrolls
        self._theta, self._phi = theta, phi
        self._outer_optim, self._inner_optim = outer_optim, inner_optim
        self._outer_kept = optim.KeptAdam.of(outer_optim, theta)
        self._inner_kept = optim.KeptAdam.of(inner_optim, phi)
        # the optimisers that are part of a graph; others take their steps outside
        self._settings = [optim.Settings(inner_optim, phi)] if self._inner_kept is not None or unrolls else []
        if self._outer_kept:
            self._settings.append(optim.Settings(outer_optim, theta))
        # whether a graph may take several steps of both: ClippedAdam's rate changes between them, outside
        self.takes_steps = all([kept is not None and kept.is_steady for kept in (self._outer_kept, self._inner_kept)])
        self._graphs: dict[Any, _Graph] = {}
        self._batch: Any = None
        self._inputs: Mapping[str, Sequence[Tensor]] = {}
        self._flat: list[Tensor] = []

    def is_current(self, pair: Pair) -> bool:
        """Whether this is the pair, and the optimisers' settings are those that were captured."""
        return self.pair is pair and all([settings.are_current() for settings in self._settings])

    def bind(self, batch: Batch, unrolls: bool = False) -> None:
        """Take up a step's data; ``unrolls`` says whether an optimiser that is not Adam is read too."""
        self._batch = batch
        self._inputs = self._context(unrolls)
        self._flat = [x for group in self._inputs.values() for x in group]

    def move_phi(self, gradient: Any) -> None:
        """What is left of an inner step after its graph: ``gradient``, or which leaves the graph has moved."""
        if self._inner_kept is None:
            optim.descend(self._inner_optim, self._phi, gradient)
        elif self._inner_kept.ticked(gradient):
            self.bind(self._batch)

    def move_theta(self, gradient: Any) -> None:
        """The same of an outer step."""
        if self._outer_kept:
            self._outer_kept.ticked(gradient)
        else:
            optim.descend(self._outer_optim, self._theta, gradient)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(problem, *args)``, captured the first time. Numbers in ``args`` are scalar inputs too."""
        leaves, spec = ([], None) if args in ((), (None,)) else flatten(args)
        leaves = [torch.tensor(x, dtype=torch.float64) if type(x) in (int, float) else x for x in leaves]
        given = [x.detach() for x in leaves if isinstance(x, Tensor)]
        key = (function, spec, tuple(None if isinstance(x, Tensor) else x for x in leaves)) if spec else function
        graph = self._graphs.get(key)
        if graph is None:

            def whole(values: Sequence[Tensor]) -> Any:
                rest = iter(values)
                stand_ins = {name: [next(rest) for _ in group] for name, group in self._inputs.items()}
                problem, swaps = self._captured(stand_ins)
                mine = [next(rest) if isinstance(x, Tensor) else x for x in leaves]
                with params.attributes_kept(self.pair.modules), params.swapped(swaps):
                    return function(problem, *(pytree.tree_unflatten(mine, spec) if spec else args))

            graph = self._graphs[key] = _Graph(whole, [*self._flat, *given], self._original(function, args))
        return graph([*self._flat, *given])

    def _original(self, function: Callable[..., Any], args: Any) -> "_Original":
        """``function`` as the programs themselves run it."""

        def run() -> Any:
            problem = self._bound(self._inputs, self._batch, list(self._theta), list(self._phi))
            with params.attributes_kept(self.pair.modules):
                return function(problem, *args)

        name = pyro.get_param_store().param_name
        trained = {str(name(leaf)): leaf for leaf in (*self._theta, *self._phi)}
        moved: list[tuple[Tensor, str | None]] = [(leaf.detach(), name) for name, leaf in trained.items()]
        for leaves, kept, group in (
            (self._theta, self._outer_kept, "outer_state"),
            (self._phi, self._inner_kept, "inner_state"),
        ):
            if kept is not None:
                width = len(self._inputs[group]) // len(leaves) if leaves else 1
                moved += [(x, name(leaves[i // width])) for i, x in enumerate(self._inputs[group])]
        moved += [(buffer, None) for buffer in self._inputs["buffers"]]
        return _Original(run, trained, moved, len(self._theta))

    def _context(self, unrolls: bool) -> dict[str, Sequence[Tensor]]:
        """All tensors that change from step to step."""
        batch: Batch = self._batch
        inner: Sequence[Tensor] = []
        if self._inner_kept:
            inner = self._inner_kept.tensors()
        elif unrolls:
            inner = list(optim.DifferentiableOptim(self._inner_optim, self._phi).state().values())
        return {
            "theta": [p.detach() for p in self._theta],
            "phi": [p.detach() for p in self._phi],
            "buffers": self.pair.buffers,
            "outer_state": self._outer_kept.tensors() if self._outer_kept else [],
            "inner_state": inner,
            "rows": [*batch.indices.values()],
            "data": [x for x in batch.leaves if isinstance(x, Tensor)],
        }

    def _captured(self, given: Mapping[str, Sequence[Tensor]]) -> tuple[Any, dict[Tensor, Tensor]]:
        """The problem on stand-ins for :meth:`_context`, and what they stand in for."""
        batch: Batch = self._batch
        data = iter(given["data"])
        leaves = [next(data) if isinstance(x, Tensor) else x for x in batch.leaves]
        indices = {}
        for (name, rows), own in zip(batch.indices.items(), given["rows"], strict=True):
            # rows that are an argument are one tensor with it: so a program reads the rows that it hands to its plate
            indices[name] = next((y for x, y in zip(batch.leaves, leaves, strict=True) if x is rows), own)
        stand_in = replace(batch, indices=indices, leaves=leaves)
        theta, phi = ([p.detach().requires_grad_() for p in given[name]] for name in ("theta", "phi"))
        swaps = dict(zip((*self._theta, *self._phi), (*theta, *phi), strict=True))
        swaps |= dict(zip(self.pair.buffers, given["buffers"], strict=True))
        return self._bound(given, stand_in, theta, phi), swaps

    def _bound(
        self, given: Mapping[str, Sequence[Tensor]], batch: Batch, theta: Sequence[Tensor], phi: Sequence[Tensor]
    ) -> Any:
        """The problem on these parameters, whose optimisers' steps are taken in place in ``given``."""
        problem = self._stand_in(self.pair, batch, theta, phi)
        if self._outer_kept:
            kept = self._outer_kept
            problem.write_theta = lambda g, allowed: kept.write(given["theta"], given["outer_state"], g, allowed)
        if self._inner_kept:
            inner = self._inner_kept
            problem.write_phi = lambda g, allowed: inner.write(given["phi"], given["inner_state"], g, allowed)
        return problem

    def _stand_in(self, pair: Pair, batch: Batch, theta: Sequence[Tensor], phi: Sequence[Tensor]) -> Any:
        return self._problem(pair, batch, theta, phi)


class BilevelProgram(Program):
    """The graphs of a bi-level problem.

    :param strategy: the hypergradient.
    """

    def __init__(
        self,
        pair: Pair,
        problem: Callable[..., Bilevel],
        theta: Sequence[Tensor],
        phi: Sequence[Tensor],
        outer_optim: PyroOptim,
        inner_optim: PyroOptim,
        strategy: Hypergradient,
    ):
        super().__init__(pair, problem, theta, phi, outer_optim, inner_optim, strategy.unrolls)
        self._strategy = strategy

    def fit(self, moves: bool) -> tuple[float, float]:
        """An inner step, or a look at G: its value, and ‖∇_φ G‖. Nothing moves where that is not finite."""
        report, *gradient = self.run(_fit if moves else _look)
        loss, length = report.tolist()
        if moves and math.isfinite(length):
            self.move_phi(gradient)
        return loss, length

    def follow(self, problem: Bilevel, state: Any) -> tuple[Result, float]:
        """The outer step: what the strategy found, and ‖dJ/dθ‖. Nothing moves where they are not finite."""
        whole = not self._strategy.resets_noise
        if self._inner_kept is None and self._strategy.unrolls:
            self.bind(self._batch, unrolls=True)
        if whole:
            size, loss, state, residual, curvature, *gradient = self.run(_follow, state)
            found = Result(loss, gradient, state, residual, curvature)
        else:
            found = self._strategy(problem, state)
            size = norm(found.gradient)
        length = size.item()
        if math.isfinite(length) and math.isfinite(found.loss.item()):
            if whole:
                self.move_theta(gradient)
            else:
                optim.descend(self._outer_optim, self._theta, found.gradient)
        return found, length

    def _bound(
        self, given: Mapping[str, Sequence[Tensor]], batch: Batch, theta: Sequence[Tensor], phi: Sequence[Tensor]
    ) -> Captured:
        problem = super()._bound(given, batch, theta, phi)
        if self._inner_kept:
            problem.steps = self._inner_kept.bound(given["inner_state"])
        elif given["inner_state"]:
            steps = optim.DifferentiableOptim(self._inner_optim, self._phi)
            problem.steps = steps.resumed(dict(zip(steps.state(), given["inner_state"], strict=True)))
        return problem

    def _stand_in(self, pair: Pair, batch: Batch, theta: Sequence[Tensor], phi: Sequence[Tensor]) -> Captured:
        plain = self._problem(pair, batch, theta, phi)
        return Captured(**{f.name: getattr(plain, f.name) for f in fields(plain)}, strategy=self._strategy)


class _Original(NamedTuple):
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


class _Graph:
    """A function of a list of tensors, recorded, tried out beside its original and compiled.

    :raises RuntimeError: where what it does depends on the values of tensors, or is not what the original does.
    """

    def __init__(self, function: Callable, inputs: list[Tensor], original: _Original):
        def flat(*values: Tensor) -> list[Tensor]:
            leaves, self._spec = pytree.tree_flatten(function(values))
            self._is_list = self._spec.type is list and all(child.is_leaf() for child in self._spec.children())
            self._constants = [None if isinstance(x, Tensor) else x for x in leaves]
            self._places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
            return [leaves[i].detach() for i in self._places]

        state = params.random_state()
        inputs = [x.detach() for x in inputs]
        record.last = None
        with _last_site(), _recording():
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
        self._run = _compiled(recorded, [given[i] for i in self._read])
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


def _require_same(original: _Original, replay: Callable[[], list[Any]]) -> None:
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


def _compiled(recorded: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    with torch.no_grad(), warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # of the compiler's own making
            warnings.filterwarnings("ignore", category=category)
        from torch._inductor import compile_fx, config, cpu_vec_isa, exc
        from torch._inductor.decomposition import select_decomp_table

        # a random operation taken apart would draw other numbers than the eager step
        seeded = torch.Tag.nondeterministic_seeded
        kept = {op: f for op, f in select_decomp_table().items() if seeded not in getattr(op, "tags", ())}
        kept |= {op: _sums(kept.get(op)) for op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)}
        kept[torch.ops.aten.normal.Tensor_Tensor] = _normal
        found: list[Any] = []

        def inner(graph, *args, **kwargs):
            _merge(graph.graph)
            _store_scalars(graph.graph)
            found.append((graph.graph, compile_fx.compile_fx_inner(graph, *args, **kwargs)))
            return found[-1][1]

        for early in (True, False):
            patches = {**OPTIONS, **({k: EARLY[k] for k in EARLY.keys() & config.get_config_copy()} if early else {})}
            try:
                compiled = compile_fx.compile_fx(
                    recorded, [*inputs], inner_compile=inner, config_patches=patches, decompositions=kept
                )
                assert callable(compiled)
                return _bare(recorded.graph, found) or _unpacked(compiled)
            except Exception as error:
                found.clear()
                cpu_vec_isa.valid_vec_isa_list.cache_clear()
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, exc.InvalidCxxCompiler | exc.CppCompileError):
                    cause = cause.__cause__ or getattr(cause, "inner_exception", None)
                if cause is None and not early:
                    raise
    _warn_once()
    return _unpacked(recorded)


def _sums(other: Callable | None) -> Callable:
    """Small matrix products as sums, which fuse: a call of the library's takes longer than its few multiplications."""

    def product(*args, beta=1, alpha=1):
        a, b = args[-2:]
        if a.shape[0] * a.shape[1] * b.shape[1] > MAX_SUMS:
            scale = {"beta": beta, "alpha": alpha} if len(args) == 3 else {}
            return other(*args, **scale) if other else NotImplemented
        found = (a.unsqueeze(2) * b).sum(1)
        if len(args) == 2:
            return found
        return (args[0] if beta == 1 else beta * args[0]) + (found if alpha == 1 else alpha * found)

    return product


def _normal(mean: Tensor, std: Tensor, generator: Any = None) -> Any:
    """``torch.normal`` by the numbers that it draws itself: the compiler has no fast way to call it."""
    if generator is not None:
        return NotImplemented
    shape = torch.broadcast_shapes(mean.shape, std.shape)
    return torch.randn(shape, dtype=torch.result_type(mean, std), device=mean.device) * std + mean


def _unpacked(compiled: Callable) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    return torch.no_grad()(lambda values: compiled(*values))


def _merge(graph: torch.fx.Graph) -> None:
    """Do once what the graph computes twice: a guide's logits, say, that draw and score both need.

    The graph writes nothing but its inputs, at its end. torch's own pass for this takes two ``randn_like`` for one.
    """
    firsts: dict[Any, torch.fx.Node] = {}
    for node in list(graph.nodes):
        target = node.target
        pure = target is operator.getitem or (
            isinstance(target, torch._ops.OpOverload)
            and not target._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in target.tags
        )
        # what has no inputs is a constant, better made again; outputs have to be tensors of their own
        if not (pure and node.all_input_nodes) or any(user.op == "output" for user in node.users):
            continue
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        first = firsts.setdefault((target, spec, tuple((type(x), x) for x in leaves)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _store_scalars(graph: torch.fx.Graph) -> None:
    """Have the compiler keep a scalar that a large tensor needs: it would put it into the loop over the entries.

    Adam's corrections, 1 - βᵗ, are powers: two of them for every sixteen entries take longer than all the rest.
    """

    def size(node):
        value = node.meta.get("val")
        return value.numel() if isinstance(value, Tensor) else 0

    for node in graph.nodes:
        if node.op == "call_function" and size(node) == 1 and any(size(user) >= MIN_ENTRIES for user in node.users):
            node.meta["inductor_realize_to_strides"] = True


def _bare(recorded: torch.fx.Graph, found: Sequence[tuple[torch.fx.Graph, Any]]) -> Callable | None:
    """The program that the compiler made, without the layers that torch calls it through: they take as long as it.

    They have nothing to do where it has the recording's own inputs and outputs: no alias to be made, nothing to be
    written back. None if that is not so.
    """

    def face(graph):
        return sum(node.op == "placeholder" for node in graph.nodes), len(graph.output_node().args[0])

    if len(found) == 1 and face(found[0][0]) == face(recorded):
        return getattr(found[0][1], "current_callable", None)
    return None


@cache
def _warn_once() -> None:
    warnings.warn(
        "jit=True: there is no C++ compiler that works here, so the captured graph is replayed operation by "
        "operation: about half the time of the eager step, not a tenth. Install g++ or clang.",
        UserWarning,
        stacklevel=2,
    )


class _Fixed(TorchFunctionMode):
    """Inside, what Pyro's ELBOs do with the values of tensors has a form that does not depend on them.

    ``x.item()`` is x itself, a scalar without a graph: the ELBOs take a detached value so. Where Dice leaves out
    entries of probability 0, they count as 0 there.
    """

    _dice = Dice.compute_expectation.__code__

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.item:
            return args[0].detach()
        if func in (Tensor.all, Tensor.masked_select) and self._in_dice():
            return False if func is Tensor.all else torch.where(args[1], args[0], 0.0)
        return func(*args, **(kwargs or {}))

    def _in_dice(self) -> bool:
        frame = sys._getframe(2)
        for _ in range(4):  # other modes stand between
            if frame is None or frame.f_code is self._dice:
                return frame is not None
            frame = frame.f_back  # type: ignore[assignment]
        return False


@contextmanager
def _recording() -> Iterator[None]:
    """Without the host's checks, which look at values: NaN is looked for in what the graph returns."""
    with (
        pyro.validation_enabled(False),
        mock.patch.object(pyro.util, "torch_isnan", lambda _: False),
        mock.patch.object(pyro.util, "torch_isinf", lambda _: False),
        _Fixed(),
    ):
        yield


class _last_site(Messenger):
    """Keeps the name of the statement that ran last, for programs that a host ELBO runs."""

    def _process_message(self, msg):
        if msg["type"] == "sample":
            record.last = msg["name"]


def _explained(error: Exception) -> Exception:
    """An error that names the place in the user's program."""
    hosts = (torch.__file__, pyro.__file__, __file__, warnings.__file__)  # the last: Python's own library
    inside = [Path(file).parent for file in hosts]
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
