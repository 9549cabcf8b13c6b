"""BiSM: the bi-level loop (Bao et al. 2020, Algorithm 1), with the face of ``pyro.infer.SVI``."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pyro.infer import Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from . import divergences, energies
from .compiled.steps import Outer
from .energies import averages
from .hypergradients import Amortized, Bilevel, Hypergradient, chosen, require_hypergradient
from .hypergradients.shifts import require_shiftable
from .losses import OuterLoss, require_outer_loss
from .optim.host import create_optimizers, require_unrollable
from .programs.analysis import analyse, check_held
from .programs.coupling import check_rows
from .programs.guides import refuse_autoguide, runs_model
from .programs.modes import in_own_modes
from .programs.pair import ModelAndGuide
from .programs.params import jittered, unmoved_buffers
from .programs.visible import Batch
from .training import runaways
from .training.settings import require_guide, require_optim, same_settings
from .training.trainer import Buffers, Trainer

__all__ = ["BiSM", "BiSMInfo"]


class BiSMInfo(NamedTuple):
    """What the last step saw.

    :ivar outer_loss: J at the fitted (and, if unrolled, further fitted) guide.
    :ivar inner_loss: G at the last kept inner step, before its update; a mean over the data.
    :ivar inner_grad_norm: ‖∇_φ G‖ there: small and steady if the guide is fitted.
    :ivar hypergradient_norm: ‖dJ/dθ‖: a run of growing values says that the unroll is about to explode.
    :ivar residual: relative residual of the hypergradient's linear system on the draws at hand, 0 if there is none.
        Where these are noisy it is large though the mean is solved: how far the hypergradient is off, and why, is
        what ``hypergradient_error`` tells.
    :ivar curvature: the least curvature of G that its solver met (a mean under ``Functional``); at or below 0 φ is at
        no minimum. Infinite if it looks at none.
    :ivar varying_loss: J less the constant in it that no model changes (D/(2σ²) under denoising): where progress shows.
    :ivar verdict: 0 as long as training has not run away, else a number; ``in_words`` says it in a sentence.
    """

    outer_loss: float
    inner_loss: float
    inner_grad_norm: float
    hypergradient_norm: float
    residual: float
    curvature: float
    varying_loss: float
    verdict: int

    @property
    def in_words(self) -> str:
        """The verdict as a sentence."""
        return runaways.in_words(self.verdict)

    def __str__(self) -> str:
        return runaways.shown(self)


class BiSM(Trainer):
    """Bi-level score matching of an unnormalised latent-variable model.

    .. code-block:: python

        svi  = SVI (model, guide, optim, loss=Trace_ELBO())
        bism = BiSM(model, guide, optim, loss=DenoisingScoreMatching(sigma=0.1))

    A step takes K inner steps on the guide's parameters φ, which are kept, and one outer step on the model's
    θ along the hypergradient. All work on one minibatch, each with fresh noise.

    :param model: a Pyro program of an unnormalised density p̃(v, h; θ): any mixture of ``sample`` and
        ``factor`` statements, the visible sites observed.
    :param guide: a Pyro program of q(h|v; φ) with the same arguments. It is given the perturbed v and has to look
        at it; :class:`AmortizedGuide` makes one from the model.
    :param optim: a ``pyro.optim`` optimiser, for θ.
    :param loss: an outer loss of :mod:`pyro_bism.losses`.
    :param inner_optim: an optimiser for φ; None takes ``optim``'s settings with a state of its own. If they are a
        scheduler's, ``optim.step()`` moves the rates of both levels; one of your own is stepped by you.
    :param inner_loss: a differentiable ELBO of Pyro, or :class:`FisherDivergence`.
    :param num_inner_steps: K.
    :param hypergradient: a strategy of :mod:`pyro_bism.hypergradients`; the paper's is ``Unrolled(5)``. None chooses
        when the programs are first run, and the attribute holds the choice from then on: ``Functional()`` under a
        denoising loss, where it knows the guide's distributions; ``Exact()`` under a loss that differentiates the
        score, where no site is relaxed; else ``Amortized()``.
    :param visible: names of the visible sites; None takes all observed sample sites.
    :param jit: capture the step as graphs of tensor operations and compile them (needs a C++ compiler; without one
        the graphs are replayed). Model and guide must not look at the values of tensors, and Python numbers in them are
        constants. New shapes, types, modes and optimiser settings are captured by themselves, eight times at most;
        learning rates of Adam and its like may change freely.
    :raises ValueError: at construction for bad settings, at the first step for misuse (see the docs).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: PyroOptim,
        loss: OuterLoss,
        *,
        inner_optim: PyroOptim | None = None,
        inner_loss: Any = None,
        num_inner_steps: int = 5,
        hypergradient: Hypergradient | None = None,
        visible: Sequence[str] | None = None,
        jit: bool = False,
    ):
        super().__init__(model, guide)
        require_guide(guide)
        inner_loss = Trace_ELBO() if inner_loss is None else inner_loss
        require_outer_loss(
            loss,
            "BiSM matches scores: use DenoisingScoreMatching(sigma=...) or another of pyro_bism.losses; an ELBO goes "
            "to inner_loss.",
        )
        require_optim(optim, "optim")
        if inner_optim is not None:
            require_optim(inner_optim, "inner_optim")
        if num_inner_steps < 0:
            raise ValueError(f"num_inner_steps must not be negative, got {num_inner_steps}.")
        if hypergradient is not None:
            require_hypergradient(hypergradient)
        if isinstance(visible, str):
            raise ValueError(f"visible takes a list of site names: visible=[{visible!r}].")
        self.model = model
        self.guide = guide
        self.optim = optim
        self.loss = loss
        self.inner_optim = same_settings(optim) if inner_optim is None else inner_optim
        self.inner_loss = inner_loss
        self.num_inner_steps = num_inner_steps
        self.hypergradient = hypergradient
        self.visible = None if visible is None else list(visible)
        self.jit = jit
        self.info: BiSMInfo | None = None
        self._inner = divergences.as_inner_loss(inner_loss)
        # what the hypergradient carries from step to step, in a tuple; None before the first
        self._method_state: tuple[Any] | None = None
        self._carried_by: tuple[tuple[str, ...], tuple[str, ...]] | None = None  # whose names; None after loading
        self._watch = runaways.begin()

    @in_own_modes
    def step(self, *args: Any, **kwargs: Any) -> float:
        """One outer update: Algorithm 1 of Bao et al. 2020 on one minibatch, its steps in their order.

        :param args: arguments of model and guide, the data among them.
        :param kwargs: their keyword arguments.
        :returns: the outer loss, a mean over the batch.
        :raises ValueError: on misuse, or on NaN or infinity in the data; nothing is updated then.
        :raises FloatingPointError: if the inner loop has diverged; θ is not updated then.
        :raises RuntimeError: under ``jit``, if the step can't be captured, or has been too often.
        """
        pair, leaves, spec = self._prepare(args, kwargs)
        with self._explained(pair, leaves, spec), Buffers(pair.buffers) as buffers:
            batch = pair.batch(leaves, spec)  # 1. the rows
            executor = self._executor(pair, batch)  # runs each step eagerly, or as a captured graph
            state = self._state_of(pair)

            for k in range(self.num_inner_steps):  # 2. K inner steps on φ, which are kept
                inner_loss, inner_norm = executor.fit()
                buffers.keep_first()  # batch normalisation's statistics move once a step
                self._require_fit(k, inner_loss, inner_norm)
            if not self.num_inner_steps:
                inner_loss, inner_norm = executor.look()  # for info alone
                buffers.keep_first()
                self._require_fit(0, inner_loss, inner_norm)

            outer = executor.solve(state)  # 3. - 5. the hypergradient: N steps thrown away, J, and dJ/dθ
            self.info = self._seen(outer, inner_loss, inner_norm, batch)
            self._require_outer(self.info)

            executor.move_theta(outer.left)  # 6. the outer step, or what a captured one has left of it
            self._method_state = (outer.state,)

        before, self._watch = self._watch, runaways.watched(self._watch, outer.loss, outer.length, outer.curvature)
        self.info = self.info._replace(verdict=self._watch.verdict)
        runaways.warn(before, self._watch)
        return outer.loss

    def _state_of(self, pair: ModelAndGuide) -> Any:
        """What the hypergradient carries from step to step; fresh where there is nothing yet that fits the programs."""
        names = tuple(pair.theta), tuple(pair.phi)
        # a parameter that was frozen or unfrozen on the way has no place in what is carried
        if self._method_state is None or self._carried_by not in (None, names):
            self._method_state = (self._strategy.init(*self._leaves(pair)),)
        self._carried_by = names
        return self._method_state[0]

    def _require_fit(self, k: int, loss: float, length: float) -> None:
        """Checks that an inner step, the k-th from 0, has found numbers.

        :raises FloatingPointError: where G or the length of its gradient is none.
        """
        if not (math.isfinite(loss) and math.isfinite(length)):
            raise FloatingPointError(
                f"The inner loss or its gradient is not finite at inner step {k + 1} of {self.num_inner_steps} (inner "
                f"loss {loss}, gradient's length {length}). The inner learning rate is too high, or the guide's scale "
                "has collapsed: lower the rate in inner_optim, or clip its gradients."
            )

    def _seen(self, outer: Outer, inner_loss: float, inner_norm: float, batch: Batch) -> BiSMInfo:
        varying = outer.loss - self.loss.constant(batch.v.shape[1])
        found = outer.length, outer.residual, outer.curvature, varying
        return BiSMInfo(outer.loss, inner_loss, inner_norm, *found, self._watch.verdict)

    def _require_outer(self, info: BiSMInfo) -> None:
        """Checks that the outer step has found numbers.

        :raises FloatingPointError: where J or the length of its gradient is none.
        """
        if not (math.isfinite(info.outer_loss) and math.isfinite(info.hypergradient_norm)):
            raise FloatingPointError(
                f"The outer loss or its gradient is not finite ({info}). The model was not updated. "
                "If inner_grad_norm grows from step to step, the inner learning rate is too high: lower it in "
                f"inner_optim. Otherwise {self._strategy.cure}."
            )

    @property
    def _strategy(self) -> Hypergradient:
        assert self.hypergradient is not None  # chosen when the programs were looked at
        return self.hypergradient

    def _problem(
        self, pair: ModelAndGuide, batch: Batch, theta: Sequence[Tensor], phi: Sequence[Tensor], loss: Any = None
    ) -> Bilevel:
        loss = self.loss if loss is None else loss
        return Bilevel(pair, batch, loss, self._inner, theta, phi, self.inner_optim, self._strategy)

    @in_own_modes
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The outer loss at the present parameters, with fresh noise; nothing is updated.

        :param args: arguments of model and guide, the data among them.
        :param kwargs: their keyword arguments.
        :returns: a mean over the batch.
        """
        pair, leaves, spec = self._prepare(args, kwargs)
        with Buffers(pair.buffers):
            return pair.outer_loss(pair.batch(leaves, spec), self.loss).item()

    def _analyse(self, leaves: list[Any], spec: Any) -> ModelAndGuide:
        refuse_autoguide(self.guide)
        guide = averages.averaging(self.guide)
        # what Amortized() asks of a guide is no less than what the others do that may be chosen
        strategy = self.hypergradient or Amortized()
        pair = analyse(self.model, guide, leaves, spec, self.visible, self.loss, strategy)
        if pair.averaged:
            averages.check(pair, leaves, spec, self.loss, self.inner_loss)
        elif not runs_model(self.guide):
            pair = replace(pair, guide=self.guide)  # nothing to average: a handler less at every pass
        divergences.check(self.inner_loss, pair)
        with jittered([*pair.theta.values(), *pair.phi.values()]):
            # a loss that takes no trace is a loss of the batch then, and batch normalisation a part of the model
            batch = pair.batch(leaves, spec)
            check_rows(pair, batch, normalises_batch=not self.loss.needs_uncoupled_examples)

            with unmoved_buffers(pair.buffers):
                pair = self._fitted(pair, batch)
        theta, phi = self._leaves(pair)
        create_optimizers(self.optim, theta)
        create_optimizers(self.inner_optim, phi)
        if self._strategy.unrolls:
            require_unrollable(self.inner_optim, phi)
        return pair

    def _fitted(self, pair: ModelAndGuide, batch: Any) -> ModelAndGuide:
        """The pair with what the hypergradient knows of it; where none was asked for, it is chosen.

        :raises ValueError: where the one asked for does not fit the programs.
        """

        def require_fit(strategy: Hypergradient) -> None:
            nonlocal pair
            check_held(pair, batch, self.loss, strategy)
            if strategy.shifts_guide:
                pair = replace(pair, shiftable=require_shiftable(pair, batch, self._inner))

        if self.hypergradient is None:
            self.hypergradient = chosen(self.loss, pair, require_fit)
        else:
            require_fit(self.hypergradient)
        return pair

    def _leaves(self, pair: ModelAndGuide) -> tuple[list[Tensor], list[Tensor]]:
        return list(pair.theta.values()), list(pair.phi.values())

    @property
    def _optims(self) -> dict[str, PyroOptim]:
        return {"optim": self.optim, "inner_optim": self.inner_optim}

    def _checkpoint(self) -> dict[str, Any]:
        return {"hypergradient": self._method_state, "watch": self._watch}

    def _restore(self, kept: Mapping[str, Any]) -> None:
        carried = kept["hypergradient"]
        pair = next(reversed(self._pairs.values()))
        fresh = self._strategy.init(*self._leaves(pair))
        if carried is not None and type(carried[0]) is not type(fresh):
            raise ValueError(
                f"The state was made with another hypergradient than {type(self._strategy).__name__}: it lacks "
                "what that one carries from step to step, or has more."
            )
        self._method_state, self._carried_by = carried, None
        self._watch = runaways.Watch(*kept["watch"])

    @in_own_modes
    def energy(self, *args: Any, **kwargs: Any) -> tuple[energies.Energy, energies.Point]:
        """The trained log p̃(v, h) on these arguments, and a point: the data and the guide's draw of h.

        :param args: arguments of model and guide, the data among them; a plate that subsamples these takes all rows
            here.
        :param kwargs: their keyword arguments.
        """
        pair, leaves, spec = self._prepare_evaluation(args, kwargs)
        batch = pair.batch(leaves, spec, resizable=True)
        with Buffers(pair.buffers):
            values = pair.draw_discrete(batch, batch.v)
        values = {name: value for name, value in values.items() if name not in pair.subsamples}
        return energies.Energy.from_model(pair.model, pair.sites, batch, pair.buffers, values)
