"""What BiSM and its rivals share: one program's analysis a structure, checkpoints, finiteness, module buffers."""

import copy
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from ..compiled.captured import MAX_CAPTURES, CapturedStep
from ..compiled.steps import Eager, Executor
from ..hypergradients import Hypergradient
from ..optim.host import torch_optimizer
from ..programs import visible
from ..programs.all_rows import drawn, with_all_rows
from ..programs.pair import ModelAndGuide
from ..programs.params import random_state, set_random_state, stored
from ..programs.visible import Batch


class Trainer(ABC):
    """A method that learns a model: what is the same for all of them.

    :ivar jit: whether its steps are captured.
    """

    jit: bool

    def __init__(self, *programs: Any):
        self._modules = programs
        self._pairs: dict[Any, ModelAndGuide] = {}
        self._pending: dict[str, Any] | None = None
        self._finite: dict[int, tuple[int, int, int]] = {}
        # what the last call's arguments were, the arguments themselves, and their pair
        self._last: tuple[tuple[Any, ...], list[Any], ModelAndGuide] | None = None
        self._programs: dict[Any, Any] = {}
        self._num_captures = 0
        _raise_heap_limit()

    @abstractmethod
    def _analyse(self, leaves: list[Any], spec: Any) -> ModelAndGuide:
        """What the programs are, run once on these arguments; their optimisers made ready."""

    @abstractmethod
    def _problem(self, pair: ModelAndGuide, batch: Batch, theta: Sequence[Tensor], phi: Sequence[Tensor]) -> Any:
        """What a step solves on this batch: a :class:`~pyro_bism.compiled.steps.StepProblem`."""

    @abstractmethod
    def _leaves(self, pair: ModelAndGuide) -> tuple[list[Tensor], list[Tensor]]:
        """What ``optim`` moves, and what ``inner_optim`` does."""

    @property
    def _strategy(self) -> Hypergradient | None:
        """The hypergradient, of a method that has one."""
        return None

    @property
    @abstractmethod
    def _optims(self) -> Mapping[str, PyroOptim]:
        """The optimisers, by their names in a checkpoint."""

    @abstractmethod
    def _checkpoint(self) -> dict[str, Any]:
        """What is carried from step to step besides, by its names in a checkpoint."""

    @abstractmethod
    def _restore(self, kept: Mapping[str, Any]) -> None:
        """Takes up what :meth:`_checkpoint` gave.

        :raises ValueError: if it is another method's.
        """

    def get_state(self) -> dict[str, Any]:
        """All that a later process needs to continue bit for bit: parameters, optimisers, random state."""
        if self._pending is not None:  # nothing has run since it was taken up
            return {**copy.deepcopy(self._pending), "rng": random_state()}
        return {
            "params": {name: leaf.detach().clone() for name, leaf in stored().items()},
            "buffers": [b.clone() for b in self._buffers()],
            **{name: _of_store(copy.deepcopy(optim.get_state())) for name, optim in self._optims.items()},
            **copy.deepcopy(self._checkpoint()),
            "rng": random_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes up a state of :meth:`get_state`.

        The random state is back when this returns, and so is all else if the programs have run. In a process where they
        have not yet (or the param store was cleared since) their parameters do not exist: those and what belongs to
        them come back at the first call that runs the programs, which draws nothing to make them.

        :param state: what :meth:`get_state` gave, of the same method with the same programs.
        :raises ValueError: if it is of other programs, sizes or methods; at that first call if it is taken up there.
        """
        self._pending = copy.deepcopy(state)
        set_random_state(state["rng"])
        if any(pair.is_current() for pair in self._pairs.values()):
            self._load_pending()

    def save(self, path: Any) -> None:
        """Writes :meth:`get_state` to a file, in one piece: a crash leaves the old file or the new one.

        :param path: where to; beside it stands ``<path>.partial`` while it is written.
        """
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        torch.save(self.get_state(), partial)
        partial.replace(target)

    def load(self, path: Any, map_location: Any = None) -> None:
        """Takes up a state that :meth:`save` wrote. The file is unpickled: load only what you trust.

        :param path: the file.
        :param map_location: the device to load tensors on, as ``torch.load`` takes it; None: those they were on.
        """
        self.set_state(torch.load(path, map_location=map_location, weights_only=False))

    def pair(self, *args: Any, **kwargs: Any) -> ModelAndGuide:
        """Model and guide as they run on arguments of this structure; analysed once for each structure.

        :param args: arguments of the programs, the data among them.
        :param kwargs: their keyword arguments.
        """
        return self._pair(*visible.flatten((args, kwargs)))

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ModelAndGuide, list[Any], Any]:
        leaves, spec = visible.flatten((args, kwargs))
        before = None if self._pending is None else random_state()
        leaves = visible.ordinary(leaves, spec)
        # most steps see the last one's tensors again, unchanged: a data set that a plate subsamples
        seen = (spec, _modes(*self._modules), [_state(leaf) for leaf in leaves])
        if self._last is not None and self._last[0] == seen and self._last[2].is_current():
            pair = self._last[2]
        else:
            pair = self._pair(leaves, spec)
            self._require_finite(leaves, spec, pair.sites)
            self._last = seen, leaves, pair  # held, so that no number is given to another tensor
        if before is not None:
            self._load_pending()
            set_random_state(before)  # the initial values that were drawn have been replaced
        return pair, leaves, spec

    def _prepare_evaluation(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[ModelAndGuide, list[Any], Any]:
        """The same for an evaluation, which takes all rows given: plates draw none."""
        leaves, spec = visible.flatten((args, kwargs))
        leaves = visible.ordinary(leaves, spec)
        like = next((p for key, p in self._pairs.items() if key[0] == spec and drawn(p) and p.is_current()), None)
        if like is None or self._pending is not None:
            like, leaves, spec = self._prepare(args, kwargs)
        else:
            self._require_finite(leaves, spec, like.sites)
        return with_all_rows(like, leaves), leaves, spec

    def _require_finite(self, leaves: list[Any], spec: Any, sites: Sequence[visible.VisibleSite]) -> None:
        """Looks at a tensor again only when it has changed: a whole data set, subsampled, takes longer than a step."""
        used = [leaves[i] for site in sites for i in site.leaves]
        fresh = {id(leaf): leaf for leaf in used if self._finite.get(id(leaf)) != _state(leaf)}
        if fresh:
            visible.require_finite([leaf if id(leaf) in fresh else None for leaf in leaves], spec, sites)
        for key, leaf in fresh.items():
            if key not in self._finite:  # its number may be given to another tensor
                weakref.finalize(leaf, self._finite.pop, key, None)
            self._finite[key] = _state(leaf)

    def _annotate(self, error: Exception, leaves: list[Any], spec: Any, pair: ModelAndGuide) -> None:
        """Tells a failed step's error what is wrong with the arguments, where anything is."""
        visible.require_finite(leaves, spec, pair.sites)  # memory shared with NumPy changes without a trace
        reason = visible.suspect(leaves, spec)
        if reason is not None:
            error.add_note(reason)

    def _pair(self, leaves: list[Any], spec: Any) -> ModelAndGuide:
        signature = (spec, tuple(_signature(leaf) for leaf in leaves))
        pair = self._pairs.get((*signature, _modes(*self._modules)))
        if pair is None or not pair.is_current():
            store = pyro.get_param_store()
            known, before = set(store.keys()), random_state()
            try:
                pair = self._analyse(leaves, spec)
            except Exception as error:
                reason = visible.suspect(leaves, spec)
                if reason is None:
                    raise
                _forget_all_but(known)  # initial values may have been made from what these arguments hold
                raise ValueError(f"{reason} What failed: {error}") from error
            try:
                self._require_finite(leaves, spec, pair.sites)
            except ValueError:
                _forget_all_but(known)
                raise
            # an autoguide makes its modules at its first run
            self._pairs[(*signature, _modes(*self._modules))] = pair
            if known.issuperset(store.keys()):
                # nothing was initialised: a look that a resumed run takes at another time draws nothing
                set_random_state(before)
        return pair

    def _executor(self, pair: ModelAndGuide, batch: Batch) -> Executor:
        """Who runs the steps on this batch: eagerly, or as captured graphs."""
        if self.jit:
            return self._captured(pair, batch)
        return Eager(self._problem(pair, batch, *self._leaves(pair)), *self._both_optims())

    def _both_optims(self) -> tuple[PyroOptim, PyroOptim]:
        """θ's, and φ's; a method whose guide has no loss of its own has the one."""
        optim = self._optims["optim"]
        return optim, self._optims.get("inner_optim", optim)

    def _captured(self, pair: ModelAndGuide, batch: Batch) -> CapturedStep:
        """The captured step for arguments of this structure, filled with this batch.

        :raises ValueError: for an argument that is neither a tensor nor a constant.
        :raises RuntimeError: if there have been too many.
        """
        constants = tuple([leaf for leaf in batch.leaves if not isinstance(leaf, Tensor)])
        for leaf in constants:
            if not isinstance(leaf, int | float | str | None):
                raise ValueError(f"jit=True: an argument is a {type(leaf).__name__}. Pass tensors, numbers or strings.")
        key = (id(pair), constants)
        program = self._programs.get(key)
        if program is None or not program.is_current(pair):
            self._num_captures += 1
            if self._num_captures > MAX_CAPTURES:
                numbers = f", numbers among them (now {', '.join(map(repr, constants))})" if constants else ""
                raise RuntimeError(
                    f"jit=True: the step has been captured {MAX_CAPTURES} times. Shapes and types of the arguments"
                    f"{numbers}, training modes and optimiser settings other than Adam's rate "
                    "are constants of a captured step: pass numbers that change as tensors and batches of one size, or "
                    "take jit=False."
                )
            _require_sight(pair, batch)
            program = self._programs[key] = self._capture(pair)
        program.bind(batch)
        return program

    def _capture(self, pair: ModelAndGuide) -> CapturedStep:
        strategy = self._strategy
        return CapturedStep(
            pair,
            self._problem,
            *self._leaves(pair),
            *self._both_optims(),
            unrolls=strategy is not None and strategy.unrolls,
            in_parts=strategy is not None and strategy.resets_noise,
        )

    @contextmanager
    def _explained(self, pair: ModelAndGuide, leaves: list[Any], spec: Any) -> Iterator[None]:
        """A step that fails tells what is wrong with the arguments, where anything is."""
        try:
            yield
        except (FloatingPointError, ValueError) as error:
            self._annotate(error, leaves, spec, pair)
            raise

    def _buffers(self) -> list[Tensor]:
        return list({id(b): b for pair in self._pairs.values() for b in pair.buffers}.values())

    def _load_pending(self) -> None:
        state = self._pending
        assert state is not None
        store = pyro.get_param_store()
        missing = sorted(set(state["params"]) - set(store.keys()))
        if missing:
            raise ValueError(
                f"The state has parameters {missing}, which model and guide have not created. Was it saved from "
                "another model?"
            )
        leaves = stored()
        here = {**{name: leaves[name] for name in state["params"]}, **_numbered(self._buffers())}
        for name, value in {**state["params"], **_numbered(state["buffers"])}.items():
            if name not in here or here[name].shape != value.shape:
                found = tuple(here[name].shape) if name in here else "none"
                raise ValueError(
                    f"The state's '{name}' has shape {tuple(value.shape)}, but that of model and guide here has "
                    f"{found}. Was it saved from a model of another size?"
                )
        self._restore(state)
        self._pending = None
        with torch.no_grad():
            for name, value in state["params"].items():
                leaves[name].copy_(value)
            for buffer, value in zip(self._buffers(), state["buffers"], strict=True):
                buffer.copy_(value)
        for role, optim in self._optims.items():
            names = {store.param_name(leaf): leaf for leaf in optim.optim_objs}
            for name, values in state[role].items():
                obj = optim.optim_objs[names[name]]
                if "optimizer" in values:  # a scheduler's state holds its optimiser's
                    torch_optimizer(optim, names[name]).load_state_dict(values["optimizer"])
                    obj.load_state_dict(values["scheduler"])
                else:
                    obj.load_state_dict(values)


def _forget_all_but(names: set[str]) -> None:
    """Leaves in the param store what was there before the programs ran."""
    store = pyro.get_param_store()
    state: Any = store.get_state()
    store.clear()
    kept: Any = {kind: {k: v for k, v in old.items() if k in names} for kind, old in state.items()}
    store.set_state(kept)


def _numbered(buffers: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"buffer {i}": buffer for i, buffer in enumerate(buffers)}


def _require_sight(pair: ModelAndGuide, batch: visible.Batch) -> None:
    """Checks that a captured step would see all parameters, and leave none as it is or go by a value of the past.

    :raises RuntimeError: where it would not.
    """
    names = pair.out_of_sight(batch) or pair.astray
    if names:
        raise RuntimeError(
            f"jit=True: the step can't be captured: parameters {list(names)} are read past pyro.param and torch's "
            "functions, by an autograd.Function, a scripted or a checkpointed module. Take jit=False, which trains "
            "them, or write that part in plain torch."
        )


def _raise_heap_limit() -> None:
    """Have glibc keep what a step frees for the next one.

    It gives free memory at the end of its heap back to the system, and each page taken again is a fault: 4,000 of them,
    a tenth of the time, in a step of a 560 x 400 RBM. The size from which on it does so is twice that of the largest
    block freed so far (up to 32 MB): so one is freed, its pages never touched. XLA keeps its memory by itself.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


class Buffers:
    """Module buffers (batch-norm statistics) move once a step, as in SVI, not at every re-scoring.

    On leaving they are what they were on entering, or after the first pass where that is kept.
    """

    def __init__(self, buffers: Sequence[Tensor]):
        self._buffers = buffers
        self._is_first = True

    def __enter__(self) -> "Buffers":
        self._kept = [b.clone() for b in self._buffers]
        return self

    def keep_first(self) -> None:
        """After the first pass: what it has made of them stays."""
        if self._is_first:
            self._kept = [b.clone() for b in self._buffers]
        self._is_first = False

    def __exit__(self, *_: Any) -> None:
        for buffer, value in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(value)


def _of_store(states: dict[Any, Any]) -> dict[str, Any]:
    """The optimisers' states without those of parameters that have left the store."""
    return {name: state for name, state in states.items() if name is not None}


def _state(leaf: Any) -> Any:
    """What tells whether an argument is the very same as before."""
    if not isinstance(leaf, Tensor):
        return id(leaf)
    return id(leaf), leaf.data_ptr() if visible.has_memory(leaf) else None, leaf._version


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return None if leaf.is_nested else leaf.shape, leaf.dtype, leaf.device, leaf.layout
    # a float is no structure: one that changes from step to step would be analysed anew each time
    return leaf if isinstance(leaf, int | str | bool | None) else type(leaf)


def _modes(*programs: Any) -> tuple[bool, ...]:
    """Training or evaluation mode of every module: a change may change what runs."""
    return tuple([m.training for p in programs if isinstance(p, torch.nn.Module) for m in p.modules()])
