"""The captured step: a step of BiSM, or of a rival, as graphs of tensor operations, compiled.

A function of the problem runs once on stand-ins for all tensors that change from step to step (parameters,
optimiser states, data, buffers); every operation on them is recorded (``make_fx``) and torch's compiler makes a
program of the recording. The inner step is one such graph, called K times; hypergradient and outer update are
another. Noise is drawn inside by torch's own generator, in the order of the eager step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import pyro.util
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from ..optim.captured import AdamTensors, FrozenSettings
from ..optim.host import descend
from ..optim.steps import DifferentiableOptim
from ..programs import params
from ..programs.hosts import pytree
from ..programs.pair import ModelAndGuide
from ..programs.visible import Batch, flatten
from .graph import Graph, Original
from .steps import Executor, Outer, all_steps, outer_step

MAX_CAPTURES = 8  # as torch.compile's own limit
MAX_FOLDED = 10  # inner steps in one graph: it takes the longer to compile


class CapturedStep(Executor):
    """The graphs of what a method solves, on arguments of one structure.

    :param problem: makes a :class:`~.steps.StepProblem` of a pair, a batch, θ and φ.
    :param theta: what ``outer_optim`` moves.
    :param phi: what ``inner_optim`` moves.
    :param unrolls: whether the inner optimiser's steps are differentiated.
    :param in_parts: whether the outer step sets the random state: its parts are captured (``problem.run``), not it.
    """

    def __init__(
        self,
        pair: ModelAndGuide,
        problem: Callable[..., Any],
        theta: Sequence[Tensor],
        phi: Sequence[Tensor],
        outer_optim: PyroOptim,
        inner_optim: PyroOptim,
        unrolls: bool = False,
        in_parts: bool = False,
    ):
        self.pair, self._make, self._unrolls, self._in_parts = pair, problem, unrolls, in_parts
        self._theta, self._phi = theta, phi
        self._outer_optim, self._inner_optim = outer_optim, inner_optim
        self._outer_kept = AdamTensors.from_optim(outer_optim, theta)
        self._inner_kept = AdamTensors.from_optim(inner_optim, phi)
        # the optimisers that are part of a graph; others take their steps outside
        self._settings = [FrozenSettings(inner_optim, phi)] if self._inner_kept is not None or unrolls else []
        if self._outer_kept:
            self._settings.append(FrozenSettings(outer_optim, theta))
        # whether a graph may take several steps of both: ClippedAdam's rate changes between them, outside
        self._takes_steps = all([kept is not None and kept.is_steady for kept in (self._outer_kept, self._inner_kept)])
        self._graphs: dict[Any, Graph] = {}
        self._batch: Any = None
        self._inputs: Mapping[str, Sequence[Tensor]] = {}
        self._flat: list[Tensor] = []

    def is_current(self, pair: ModelAndGuide) -> bool:
        """Whether this is the pair, and the optimisers' settings are those that were captured."""
        return self.pair is pair and all([settings.are_current() for settings in self._settings])

    def bind(self, batch: Batch) -> None:
        """Take up a step's data."""
        self._batch = batch
        self.problem = self._make(self.pair, batch, self._theta, self._phi)
        self.problem.run = self.run
        self._read()

    def _read(self, unrolls: bool = False) -> None:
        """Read what the graphs are given; ``unrolls`` says whether an optimiser that is not Adam is read too."""
        self._inputs = self._context(unrolls)
        self._flat = [x for group in self._inputs.values() for x in group]

    def move_phi(self, left: Sequence[Any]) -> None:
        if self._inner_kept is None:
            descend(self._inner_optim, self._phi, left)
        elif self._inner_kept.after_step(left):
            self._read()

    def move_theta(self, left: Sequence[Any]) -> None:
        if self._outer_kept and not self._in_parts:
            self._outer_kept.after_step(left)
        else:
            descend(self._outer_optim, self._theta, left)

    def take(self, num_inner: int, state: Any) -> tuple[list[tuple[float, float]], Outer | None]:
        """The same in one graph, where a few steps of Adam at both levels are all there is to do."""
        if not (self._takes_steps and 0 < num_inner <= MAX_FOLDED):
            return super().take(num_inner, state)
        report, state, *moved = self.run(all_steps(num_inner), state)
        told, num_phi = report.tolist(), len(self._phi)
        self.move_phi(moved[:num_phi])
        inner = list(zip(told[: 2 * num_inner : 2], told[1 : 2 * num_inner : 2], strict=True))
        loss, length, residual, curvature = told[2 * num_inner :]
        return inner, Outer(loss, length, residual, curvature, state, moved[num_phi:])

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(problem, *args)``, captured the first time. Numbers in ``args`` are scalar inputs too."""
        if function is outer_step:
            if self._unrolls and self._inner_kept is None:
                self._read(unrolls=True)
            if self._in_parts:
                return function(self.problem, *args)
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
                with params.unmoved_attributes(self.pair.modules), params.tensors_read_as(swaps):
                    return function(problem, *(pytree.tree_unflatten(mine, spec) if spec else args))

            graph = self._graphs[key] = Graph(whole, [*self._flat, *given], self._original(function, args))
        return graph([*self._flat, *given])

    def _original(self, function: Callable[..., Any], args: Any) -> "Original":
        """``function`` as the programs themselves run it."""

        def run() -> Any:
            problem = self._bound(self._inputs, self._batch, list(self._theta), list(self._phi))
            with params.unmoved_attributes(self.pair.modules):
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
        return Original(run, trained, moved, len(self._theta))

    def _context(self, unrolls: bool) -> dict[str, Sequence[Tensor]]:
        """All tensors that change from step to step."""
        batch: Batch = self._batch
        inner: Sequence[Tensor] = []
        if self._inner_kept:
            inner = self._inner_kept.tensors()
        elif unrolls:
            inner = list(DifferentiableOptim(self._inner_optim, self._phi).state().values())
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
        problem = self._make(self.pair, batch, theta, phi)
        problem.is_captured = True
        if self._outer_kept:
            kept = self._outer_kept
            problem.write_theta = lambda g, allowed: kept.write(given["theta"], given["outer_state"], g, allowed)
        if self._inner_kept:
            inner = self._inner_kept
            problem.write_phi = lambda g, allowed: inner.write(given["phi"], given["inner_state"], g, allowed)
        if self._unrolls and self._inner_kept:
            problem.steps = self._inner_kept.steps_on(given["inner_state"])
        elif self._unrolls and given["inner_state"]:
            steps = DifferentiableOptim(self._inner_optim, self._phi)
            problem.steps = steps.resumed(dict(zip(steps.state(), given["inner_state"], strict=True)))
        return problem
