"""What the rivals share: a loss of the model alone, minimised by one optimiser, with BiSM's face.

A rival is a :class:`Rival` with a loss. Where that needs the marginal log p̃(v; θ), :class:`MarginalTarget` has it:
the latents are summed or integrated out in closed form or by enumeration, in a way found once, at the first analysis.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from ..energies import Energy, Integral, Point
from ..hypergradients import Detached, Gradient, Result
from ..hypergradients.problem import in_theta
from ..optim.host import create_optimizers
from ..programs import params, visible
from ..programs.analysis import analyse
from ..programs.coupling import check_rows
from ..programs.modes import in_own_modes
from ..programs.pair import ModelAndGuide
from ..training import runaways
from ..training.settings import require_optim
from ..training.trainer import Buffers, Trainer
from .target import MarginalTarget, check_reads


class RivalInfo(NamedTuple):
    """What the last step saw.

    :ivar loss: the loss, a mean over the batch.
    :ivar grad_norm: the length of its gradient.
    :ivar verdict: 0 as long as training has not run away, else a number; ``in_words`` says it in a sentence.
    """

    loss: float
    grad_norm: float
    verdict: int

    @property
    def in_words(self) -> str:
        """The verdict as a sentence."""
        return runaways.in_words(self.verdict, runaways.RIVAL)

    def __str__(self) -> str:
        return runaways.shown(self, runaways.RIVAL)


@dataclass
class RivalProblem:
    """What a step solves on one batch: a :class:`~pyro_bism.compiled.steps.StepProblem`.

    :ivar loss: of what is carried from step to step, the loss of θ and what is carried on.
    :ivar inner: of what is carried, the guide's own loss, if it has one.
    :ivar theta: what ``optim`` moves.
    :ivar phi: what ``inner_optim`` moves.
    :ivar write_theta: takes θ's optimiser step in place where it is allowed to; None if torch takes it.
    :ivar write_phi: the same for φ.
    """

    loss: Callable[[Any], tuple[Tensor, Any]]
    inner: Callable[[Any], Tensor]
    theta: Sequence[Tensor]
    phi: Sequence[Tensor]
    write_theta: Callable[[Gradient, Tensor], None] | None = None
    write_phi: Callable[[Gradient, Tensor], None] | None = None

    def solve(self, state: Any) -> Result:
        """The loss and its gradient in θ."""
        loss, state = self.loss(state)
        return in_theta(loss, self.theta)._replace(state=state)

    def begin_inner_step(self) -> None:
        """A rival repeats no noise."""


class Rival(Trainer):
    """A method that minimises one loss of the model's parameters.

    :param model: a Pyro program of an unnormalised density p̃(v, h; θ), as BiSM takes it.
    :param optim: a ``pyro.optim`` optimiser, for θ.
    :param visible: names of the visible sites; None takes all observed sample sites.
    :param guide: of the methods that have one.
    :param jit: capture the step and compile it, as in :class:`~pyro_bism.BiSM`.
    :cvar takes_discrete: whether visible sites may be discrete.
    :cvar sums_latents: whether the latents must be summed out; None if they are where they can be.
    :cvar moves_visible: whether the conditionals of the visible values are wanted.
    :cvar partial_guide: whether the guide is of the model's global sites alone.
    :cvar is_contrast: whether the loss is a difference that crosses zero.
    :cvar scale: of the loss, in nats; infinite if it has none.
    :cvar words: how it is said that training has run away.
    :cvar info_type: the type of what the last step saw.
    :cvar num_inner_steps: steps of φ for each of θ, where the guide has a loss of its own.
    """

    takes_discrete = False
    sums_latents: bool | None = True
    moves_visible = False
    partial_guide = False
    is_contrast = False
    scale = math.inf
    words = runaways.RIVAL
    num_inner_steps = 0
    info_type: Any = RivalInfo

    def __init__(
        self,
        model: Callable[..., Any],
        optim: PyroOptim,
        visible: Sequence[str] | None,
        guide: Callable[..., Any] | None = None,
        jit: bool = False,
    ):
        super().__init__(model, guide)
        require_optim(optim, "optim")
        if isinstance(visible, str):
            raise ValueError(f"visible takes a list of site names: visible=[{visible!r}].")
        self.model = model
        self.guide = guide
        self.optim = optim
        self.visible = None if visible is None else list(visible)
        self.jit = jit
        self.info: Any = None
        self._targets: dict[int, MarginalTarget] = {}
        # what the method carries from step to step, in a tuple; None before the first
        self._method_state: tuple[Any] | None = None
        self._watch = runaways.begin()

    @abstractmethod
    def _loss(self, target: MarginalTarget, batch: visible.Batch, carried: Any) -> tuple[Tensor, Any]:
        """The loss, a mean over the batch, and what is carried to the next step."""

    def _begin(self, target: MarginalTarget, batch: visible.Batch) -> Any:
        """What the method carries, before the first step; its own parameters are stated here."""
        return None

    @property
    def _own_names(self) -> tuple[str, ...]:
        """The names of parameters of the method's own in the param store."""
        return ()

    def _own(self, pair: ModelAndGuide) -> list[Tensor]:
        """What is trained beside θ, unconstrained."""
        return [params.stored()[name] for name in self._own_names]

    def _program(self, pair: ModelAndGuide, batch: visible.Batch) -> Callable[..., Any]:
        """The program whose density this is."""
        return pair.model

    def _inner_loss(self, target: MarginalTarget, batch: visible.Batch, carried: Any) -> Tensor:
        """The guide's own loss."""
        raise NotImplementedError

    def _inner_leaves(self, pair: ModelAndGuide) -> list[Tensor]:
        """φ, where the guide has a loss of its own."""
        return []

    def _scale(self, target: MarginalTarget, batch: visible.Batch) -> float:
        """What no model that fits has its loss at ten times of, in nats; infinite where this isn't known.

        Of log p̃ between chains and data a nat a number of discrete data, which bound its gradient too. Continuous data
        have none: a scale of the model that starts off theirs by a factor of 100 is 5,000 nats a number.
        """
        is_bounded = self.is_contrast and all(site.is_discrete for site in target.energy.sites)
        return float(batch.v.shape[1]) if is_bounded else self.scale

    def _check(self, target: MarginalTarget, batch: visible.Batch) -> MarginalTarget:
        """The target, with what the method finds out of the model off its initial parameters.

        :raises ValueError: where the method does not fit the model.
        """
        return target

    @in_own_modes
    def step(self, *args: Any, **kwargs: Any) -> float:
        """One update.

        :param args: arguments of model and guide, the data among them.
        :param kwargs: their keyword arguments.
        :returns: the loss, a mean over the batch.
        :raises ValueError: on misuse, or on NaN or infinity in the data; nothing is updated then.
        :raises FloatingPointError: if the loss or its gradient is not finite; nothing is updated then.
        """
        target, leaves, spec, batch = self._ready(args, kwargs)
        assert self._method_state is not None
        pair = target.pair
        with self._explained(pair, leaves, spec), Buffers(pair.buffers):
            executor = self._executor(pair, batch)
            inner, outer = executor.take(self.num_inner_steps, *self._method_state)
            for n, (loss, length) in enumerate([*inner, *([] if outer is None else [outer[:2]])]):
                if not (math.isfinite(loss) and math.isfinite(length)):
                    raise FloatingPointError(self._diverged(n, loss, length))
            assert outer is not None
            executor.move_theta(outer.left)
            self._method_state = (outer.state,)
        before, scale = self._watch, self._scale(target, batch)
        self._watch = runaways.watched(before, *outer[:2], warm_up=0, is_contrast=self.is_contrast, scale=scale)
        self.info = self.info_type(*outer[:2], *(inner[-1] if inner else ()), self._watch.verdict)
        runaways.warn(before, self._watch, self.words)
        found: float = self.info.loss
        return found

    def _diverged(self, n: int, loss: float, length: float) -> str:
        """What to do about a step, the n-th, whose loss or gradient is not finite."""
        if n < self.num_inner_steps:
            return (
                f"The guide's loss or its gradient is not finite at inner step {n + 1} of {self.num_inner_steps} (loss "
                f"{loss}, gradient's length {length}). Lower the rate in inner_optim, or clip its gradients."
            )
        return (
            f"The loss or its gradient is not finite (loss {loss}, gradient's length {length}). The model was not "
            "updated. Lower the learning rate, or clip the gradient."
        )

    def _theta(self, pair: ModelAndGuide) -> list[Tensor]:
        return [*pair.theta.values(), *self._own(pair)]

    def _problem(
        self, pair: ModelAndGuide, batch: visible.Batch, theta: Sequence[Tensor], phi: Sequence[Tensor]
    ) -> RivalProblem:
        target = self._targets[id(pair)]
        return RivalProblem(
            loss=lambda state: self._loss(target, batch, state),
            inner=lambda state: self._inner_loss(target, batch, state),
            theta=theta,
            phi=phi,
        )

    def _leaves(self, pair: ModelAndGuide) -> tuple[list[Tensor], list[Tensor]]:
        return self._theta(pair), self._inner_leaves(pair)

    @in_own_modes
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss at the present parameters, with fresh noise; nothing is updated.

        :param args: arguments of model and guide, the data among them.
        :param kwargs: their keyword arguments.
        :returns: a mean over the batch.
        """
        target, _, _, batch = self._ready(args, kwargs)
        assert self._method_state is not None
        with Buffers(target.pair.buffers):
            return self._loss(target, batch, *self._method_state)[0].item()

    @in_own_modes
    def energy(self, *args: Any, **kwargs: Any) -> tuple[Energy, Point]:
        """The trained log p̃(v, h) on these arguments, and a point: the data and a draw of h.

        The guide draws it; without one, the model itself.

        :param args: arguments of model and guide, the data among them; a plate that subsamples these takes all rows
            here.
        :param kwargs: their keyword arguments.
        """
        return self._energy(args, kwargs, self._program)

    def _energy(self, args: Any, kwargs: Any, program_of: Callable[..., Any]) -> tuple[Energy, Point]:
        pair, leaves, spec = self._prepare_evaluation(args, kwargs)
        batch = pair.batch(leaves, spec, resizable=True)
        with Buffers(pair.buffers):
            program, values = program_of(pair, batch), pair.draw_discrete(batch, batch.v)
        values = {name: value for name, value in values.items() if name not in pair.subsamples}
        return Energy.from_model(program, pair.sites, batch, pair.buffers, values)

    def target(self, *args: Any, **kwargs: Any) -> MarginalTarget:
        """The model as it runs on arguments of this structure, and how its latents are summed out.

        :param args: arguments of model and guide, the data among them.
        :param kwargs: their keyword arguments.
        """
        return self._targets[id(self.pair(*args, **kwargs))]

    def _ready(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[MarginalTarget, list[Any], Any, visible.Batch]:
        pair, leaves, spec = self._prepare(args, kwargs)
        target = self._targets[id(pair)]
        return target, leaves, spec, target.batch(leaves, spec)

    @property
    def _optims(self) -> dict[str, PyroOptim]:
        return {"optim": self.optim}

    def _checkpoint(self) -> dict[str, Any]:
        return {"method": type(self).__name__, "carried": self._method_state, "watch": self._watch}

    def _restore(self, kept: Mapping[str, Any]) -> None:
        if kept.get("method") != type(self).__name__:
            raise ValueError(f"The state was made by {kept.get('method', 'BiSM')}, not by {type(self).__name__}.")
        self._method_state = kept["carried"]
        self._watch = runaways.Watch(*kept["watch"])

    def _analyse(self, leaves: list[Any], spec: Any) -> ModelAndGuide:
        pair = analyse(
            self.model,
            self.guide,
            leaves,
            spec,
            self.visible,
            None,
            Detached(),
            self.takes_discrete,
            self.partial_guide,
        )
        target = self._find(pair, leaves, spec)
        if self._method_state is None or not set(self._own_names) <= set(pyro.get_param_store().keys()):
            # now, and not at the first step: a state that waits to be taken up is of all parameters
            self._method_state = (self._begin(target, target.batch(leaves, spec)),)
        create_optimizers(self.optim, self._theta(pair))
        self._targets[id(pair)] = target
        return pair

    def _find(self, pair: ModelAndGuide, leaves: Sequence[Any], spec: Any) -> MarginalTarget:
        """The energy, tried out, and how its latents are summed out."""
        with torch.no_grad(), params.jittered([*pair.theta.values(), *pair.phi.values()]):
            batch = pair.batch(leaves, spec, resizable=True)
            program = self._program(pair, batch)
            check_rows(pair, batch, model=program)
            energy, x = Energy.from_model(program, pair.sites, batch, pair.buffers, moves_visible=self.moves_visible)
            check_reads(energy, x)
            hidden = {name: (tuple(x[name].shape[1:]), x[name].dtype) for name in energy.hidden}
            integral = self._integral(energy, x) if hidden and self.sums_latents is not False else None
            return self._check(MarginalTarget(pair, energy, hidden, integral), batch)

    def _integral(self, energy: Energy, x: Point) -> Integral | None:
        cure = f"{type(self).__name__} sums the latents out at every step: learn this model with BiSM or VNCE"
        try:
            integral = Integral.over_variables(energy.density(x), x, energy.hidden)
        except ValueError as error:
            if self.sums_latents is None:
                return None
            raise ValueError(f"{error} {cure}.") from error
        if integral.quadrature:
            if self.sums_latents is None:
                return None
            raise ValueError(
                f"Latent sites {list(integral.quadrature)} have no closed-form integral: the energy is not quadratic "
                f"in them. {cure}."
            )
        return integral
