"""BiSM: the bi-level loop (Bao et al. 2020, Algorithm 1), with the face of ``pyro.infer.SVI``."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import pyro
from pyro.infer import Trace_ELBO
from pyro.optim import PyroOptim

from . import divergences, energies
from .compiled.step import CapturedBilevelStep
from .energies import averages
from .hypergradients import Amortized, Bilevel, Hypergradient, Result, chosen, norm, require_hypergradient, slopes
from .hypergradients.shifts import require_shiftable, shifted_losses
from .hypergradients.surrogates import covariance_loss, posterior_loss
from .losses import OuterLoss, require_outer_loss
from .optim.host import create_optimizers, descend, require_unrollable
from .programs.analysis import analyse, check_held
from .programs.coupling import check_rows
from .programs.guides import refuse_autoguide, runs_model
from .programs.modes import in_own_modes
from .programs.pair import ModelAndGuide
from .programs.params import buffers_kept, jittered
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
        model: Callable,
        guide: Callable,
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
        """One outer update.

        :param args: arguments of model and guide, the data among them.
        :returns: the outer loss, a mean over the batch.
        :raises ValueError: on misuse, or on NaN or infinity in the data; nothing is updated then.
        :raises FloatingPointError: if the inner loop has diverged; θ is not updated then.
        :raises RuntimeError: under ``jit``, if the step can't be captured, or has been too often.
        """
        pair, leaves, spec = self._prepare(args, kwargs)
        theta, phi = list(pair.theta.values()), list(pair.phi.values())
        batch = pair.batch(leaves, spec)
        buffers = Buffers(pair.buffers)
        problem = self._problem(pair, batch, theta, phi)
        program: CapturedBilevelStep | None = self._captured(pair, batch) if self.jit else None
        if program is not None:
            problem.run = program.run  # type: ignore[method-assign]
        names = tuple(pair.theta), tuple(pair.phi)
        # a parameter that was frozen or unfrozen on the way has no place in what is carried
        if self._method_state is None or self._carried_by not in (None, names):
            self._method_state = (self._strategy.init(theta, phi),)
        self._carried_by = names
        try:
            inner_loss, inner_norm = self._fit(problem, buffers, program)
            found, length = self._follow(problem, program)
        except (FloatingPointError, ValueError) as error:
            self._annotate(error, leaves, spec, pair)
            raise
        finally:
            buffers.restore()
        outer_loss = found.loss.item()
        self.info = BiSMInfo(
            outer_loss,
            inner_loss,
            inner_norm,
            length,
            float(found.residual),
            float(found.curvature),
            outer_loss - self.loss.constant(batch.v.shape[1]),
            self._watch.verdict,
        )
        if not (math.isfinite(self.info.outer_loss) and math.isfinite(length)):
            failure = FloatingPointError(
                f"The outer loss or its gradient is not finite ({self.info}). The model was not updated. "
                "If inner_grad_norm grows from step to step, the inner learning rate is too high: lower it in "
                f"inner_optim. Otherwise {self._strategy.cure}."
            )
            self._annotate(failure, leaves, spec, pair)
            raise failure
        self._method_state = (found.state,)
        if program is None:
            descend(self.optim, theta, found.gradient)
        before = self._watch
        self._watch = runaways.watched(before, self.info.outer_loss, length, self.info.curvature)
        self.info = self.info._replace(verdict=self._watch.verdict)
        runaways.warn(before, self._watch)
        return self.info.outer_loss

    def _follow(self, problem: Bilevel, program: CapturedBilevelStep | None) -> tuple[Result, float]:
        """What the hypergradient finds, and its norm; a program moves θ too."""
        assert self._method_state is not None
        if program is not None:
            return program.follow(problem, *self._method_state)
        with pyro.validation_enabled(False):
            found = self._strategy(problem, *self._method_state)
        return found, norm(found.gradient).item()

    @property
    def _strategy(self) -> Hypergradient:
        assert self.hypergradient is not None  # chosen when the programs were looked at
        return self.hypergradient

    def _capture(self, pair: ModelAndGuide) -> CapturedBilevelStep:
        theta, phi = list(pair.theta.values()), list(pair.phi.values())
        return CapturedBilevelStep(pair, self._problem, theta, phi, self.optim, self.inner_optim, self._strategy)

    def _problem(self, pair, batch, theta, phi, outer_loss=None) -> Bilevel:
        loss = self.loss if outer_loss is None else outer_loss
        return Bilevel(
            outer=lambda: pair.outer_loss(batch, loss),
            inner=lambda: divergences.perturbed_inner_loss(self.loss, self._inner, pair, batch),
            posterior=lambda: posterior_loss(pair, batch, loss),
            covariance=lambda num: covariance_loss(pair, batch, loss, num),
            shifted=lambda: shifted_losses(pair, batch, loss, self._inner),
            theta=theta,
            phi=phi,
            at=pair.at,
            optim=self.inner_optim,
            placed=pair.placed if pair.astray else None,
            buffers=pair.buffers,
        )

    def _fit(self, problem: Bilevel, buffers: Buffers, program: CapturedBilevelStep | None) -> tuple[float, float]:
        """The K kept inner steps: G and ‖∇_φ G‖ at the last."""
        for k in range(max(self.num_inner_steps, 1)):
            # The first pass of a step shows Pyro's own checks the new data and parameters. The later ones differ
            # in their noise, and a guide that goes astray between them is caught by its gradient.
            if self._strategy.repeats_noise and self.num_inner_steps:
                problem.inner_noise.append(problem.snapshot())
            if program is not None:
                loss, length = program.fit(moves=self.num_inner_steps > 0)
            else:
                with nullcontext() if k == 0 else pyro.validation_enabled(False):
                    value, gradient = slopes(problem, "inner", "phi")
                loss, length = value.item(), norm(gradient).item()
            if k == 0:
                buffers.keep()
            if not math.isfinite(length):
                raise FloatingPointError(
                    f"The gradient of the inner loss is not finite at inner step {k + 1} of "
                    f"{self.num_inner_steps} (inner loss {loss}). The inner learning rate is too "
                    "high, or the guide's scale has collapsed: lower the rate in inner_optim, or clip "
                    "its gradients."
                )
            if program is None and self.num_inner_steps:
                descend(self.inner_optim, problem.phi, gradient)
        return loss, length

    @in_own_modes
    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The outer loss at the present parameters, with fresh noise; nothing is updated."""
        pair, leaves, spec = self._prepare(args, kwargs)
        buffers = Buffers(pair.buffers)
        try:
            return pair.outer_loss(pair.batch(leaves, spec), self.loss).item()
        finally:
            buffers.restore()

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

            with buffers_kept(pair.buffers):
                pair = self._fitted(pair, batch)
        phi = list(pair.phi.values())
        create_optimizers(self.optim, list(pair.theta.values()))
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

    @property
    def _optims(self) -> dict[str, PyroOptim]:
        return {"optim": self.optim, "inner_optim": self.inner_optim}

    def _checkpoint(self) -> dict[str, Any]:
        return {"hypergradient": self._method_state, "watch": self._watch}

    def _restore(self, kept: Mapping[str, Any]) -> None:
        carried = kept["hypergradient"]
        pair = next(reversed(self._pairs.values()))
        fresh = self._strategy.init(list(pair.theta.values()), list(pair.phi.values()))
        if carried is not None and type(carried[0]) is not type(fresh):
            raise ValueError(
                f"The state was made with another hypergradient than {type(self._strategy).__name__}: it lacks "
                "what that one carries from step to step, or has more."
            )
        self._method_state, self._carried_by = carried, None
        self._watch = runaways.Watch(*kept["watch"])

    @in_own_modes
    def energy(self, *args: Any, **kwargs: Any) -> tuple[energies.Energy, energies.Point]:
        """The trained log p̃(v, h) on these arguments, and a point: the data and the guide's draw of h."""
        pair, leaves, spec = self._prepare_evaluation(args, kwargs)
        batch = pair.batch(leaves, spec, resizable=True)
        buffers = Buffers(pair.buffers)
        try:
            values = pair.draw_discrete(batch, batch.v)
        finally:
            buffers.restore()
        values = {name: value for name, value in values.items() if name not in pair.subsamples}
        return energies.Energy.from_model(pair.model, pair.sites, batch, pair.buffers, values)
