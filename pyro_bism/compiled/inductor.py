"""torch's compiler, called without the layers above it: all that is used of ``torch._inductor`` stands here.

The public ``torch.compile(graph, options=...)`` takes 3.4 times the toy model's step and 1.4 times that of a 560 x 400
RBM. A torch that lacks any of these private parts replays its graph instead, operation by operation, and says so once.
"""

import operator
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..programs.hosts import pytree

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


def compile_recording(
    recorded: torch.fx.GraphModule, inputs: list[Tensor]
) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """The recording as a compiled program of its inputs; the recording itself where that can't be had."""
    with torch.no_grad(), warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # of the compiler's own making
            warnings.filterwarnings("ignore", category=category)
        try:
            parts = _private_parts()
        except (ImportError, AttributeError) as error:
            why: str | None = f"torch {torch.__version__} lacks what compiles it ({error})"
        else:
            compiled, why = _compiled(parts, recorded, inputs)
            if compiled is not None:
                return compiled
    _warn_once(why)
    return _unpacked(recorded)


class _Parts(NamedTuple):
    """What is used of ``torch._inductor``.

    :ivar compile_fx: makes a program of a graph, given what compiles its inner one.
    :ivar compile_inner: compiles that.
    :ivar options: the names of its settings.
    :ivar decompositions: what it takes operations apart into.
    :ivar forget_instructions: has it look anew for the processor's vector instructions.
    :ivar no_compiler: the errors that say that there is no C++ compiler that works.
    """

    compile_fx: Callable[..., Any]
    compile_inner: Callable[..., Any]
    options: Collection[str]
    decompositions: Mapping[Any, Callable[..., Any]]
    forget_instructions: Callable[[], None]
    no_compiler: tuple[type[Exception], ...]


def _private_parts() -> _Parts:
    """:raises ImportError: or AttributeError, where this torch lacks one."""
    from torch._inductor import compile_fx, config, cpu_vec_isa, exc
    from torch._inductor.decomposition import select_decomp_table

    return _Parts(
        compile_fx.compile_fx,
        compile_fx.compile_fx_inner,
        config.get_config_copy().keys(),
        select_decomp_table(),
        cpu_vec_isa.valid_vec_isa_list.cache_clear,
        (exc.InvalidCxxCompiler, exc.CppCompileError),
    )


def _compiled(
    parts: _Parts, recorded: torch.fx.GraphModule, inputs: list[Tensor]
) -> tuple[Callable[[list[Tensor]], Sequence[Tensor]] | None, str | None]:
    """The program, or None and why there is none."""
    # a random operation taken apart would draw other numbers than the eager step
    seeded = torch.Tag.nondeterministic_seeded
    kept = {op: f for op, f in parts.decompositions.items() if seeded not in getattr(op, "tags", ())}
    kept |= {op: _sums(kept.get(op)) for op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)}
    kept[torch.ops.aten.normal.Tensor_Tensor] = _normal
    found: list[Any] = []

    def inner(graph: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        _merge(graph.graph)
        _store_scalars(graph.graph)
        found.append((graph.graph, parts.compile_inner(graph, *args, **kwargs)))
        return found[-1][1]

    for early in (True, False):
        patches = {**OPTIONS, **({k: EARLY[k] for k in EARLY.keys() & parts.options} if early else {})}
        try:
            compiled = parts.compile_fx(
                recorded, [*inputs], inner_compile=inner, config_patches=patches, decompositions=kept
            )
            assert callable(compiled)
            return _bare(recorded.graph, found) or _unpacked(compiled), None
        except Exception as error:
            found.clear()
            parts.forget_instructions()
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, parts.no_compiler):
                cause = cause.__cause__ or getattr(cause, "inner_exception", None)
            if cause is None and not early:
                raise
    return None, None


def _sums(other: Callable[..., Any] | None) -> Callable[..., Any]:
    """Small matrix products as sums, which fuse: a call of the library's takes longer than its few multiplications."""

    def product(*args: Any, beta: Any = 1, alpha: Any = 1) -> Any:
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


def _unpacked(compiled: Callable[..., Any]) -> Callable[[list[Tensor]], Sequence[Tensor]]:
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

    def size(node: torch.fx.Node) -> int:
        value = node.meta.get("val")
        return value.numel() if isinstance(value, Tensor) else 0

    for node in graph.nodes:
        if node.op == "call_function" and size(node) == 1 and any(size(user) >= MIN_ENTRIES for user in node.users):
            node.meta["inductor_realize_to_strides"] = True


def _bare(recorded: torch.fx.Graph, found: Sequence[tuple[torch.fx.Graph, Any]]) -> Callable[..., Any] | None:
    """The program that the compiler made, without the layers that torch calls it through: they take as long as it.

    They have nothing to do where it has the recording's own inputs and outputs: no alias to be made, nothing to be
    written back. None if that is not so.
    """

    def face(graph: torch.fx.Graph) -> tuple[int, int]:
        outputs: Any = graph.output_node().args[0]
        return sum(node.op == "placeholder" for node in graph.nodes), len(outputs)

    if len(found) == 1 and face(found[0][0]) == face(recorded):
        return getattr(found[0][1], "current_callable", None)
    return None


@cache
def _warn_once(why: str | None) -> None:
    """Says that a graph is not compiled.

    :param why: in words; None where there is no C++ compiler.
    """
    reason = "there is no C++ compiler that works here" if why is None else why
    cure = "Install g++ or clang." if why is None else "Install a torch that pyproject.toml names."
    warnings.warn(
        f"jit=True: {reason}, so the captured graph is replayed operation by operation: about half the time of the "
        f"eager step, not a tenth. {cure}",
        UserWarning,
        stacklevel=2,
    )
