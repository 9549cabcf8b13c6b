"""BiSM: the bi-level loop (Bao et al. 2020, Algorithm 1), with the face of ``numpyro.infer.SVI``."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.infer import Trace_ELBO

from . import divergences, energies
from .compiled.steps import Prefetched, inner_steps, norm, prefetch
from .energies import averages
from .hypergradients import Amortized, Bilevel, Hypergradient, chosen, require_hypergradient
from .hypergradients.shifts import require_shiftable
from .losses import OuterLoss, require_outer_loss
from .optim.host import as_optim, inner_copy, require_single_steps
from .programs.all_rows import require_no_local
from .programs.analysis import analyse
from .programs.checks import Analysis
from .programs.coupling import check_rows
from .programs.guides import refuse_autoguide
from .programs.modes import in_own_modes
from .programs.pair import ModelAndGuide
from .programs.params import jittered
from .programs.visible import Batch
from .training import runaways
from .training.settings import require_guide
from .training.trainer import BiSMRunResult, Trainer

__all__ = ["BiSM", "BiSMInfo", "BiSMRunResult", "BiSMState"]


class BiSMInfo(NamedTuple):
    """What the last step saw; infinite before the first.

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

    outer_loss: Array
    inner_loss: Array
    inner_grad_norm: Array
    hypergradient_norm: Array
    residual: Array
    curvature: Array
    varying_loss: Array
    verdict: Array

    @property
    def in_words(self) -> str:
        """The verdict as a sentence."""
        return runaways.in_words(self.verdict)

    def __str__(self) -> str:
        return runaways.shown(self)


class BiSMState(NamedTuple):
    """All that training changes; a pytree of arrays, to be saved and restored by any checkpointer.

    (flax's ``to_bytes`` takes it where the optimiser is optax's: NumPyro's own keep a tree definition, which it can't
    write, in SVI's state as in this one.)

    :ivar optim_state: θ and the state of its optimiser.
    :ivar inner_optim_state: φ and the state of its optimiser.
    :ivar mutable_state: mutable sites (batch-norm statistics), or None.
    :ivar hypergradient_state: what the hypergradient strategy carries from step to step, or None.
    :ivar rng_key: the random key of the step to come.
    :ivar info: what the last step saw.
    :ivar watch: what the verdict rests on.
    """

    optim_state: Any
    inner_optim_state: Any
    mutable_state: Any
    hypergradient_state: Any
    rng_key: Array
    info: BiSMInfo
    watch: runaways.Watch


class BiSM(Trainer):
    """Bi-level score matching of an unnormalised latent-variable model.

    .. code-block:: python

        svi  = SVI (model, guide, optim, loss=Trace_ELBO())
        bism = BiSM(model, guide, optim, loss=DenoisingScoreMatching(sigma=0.1))

    A step takes K inner steps on the guide's parameters φ, which are kept, and one outer step on the model's
    θ along the hypergradient. All work on one minibatch, each with fresh noise.

    :param model: a NumPyro program of an unnormalised density p̃(v, h; θ): any mixture of ``sample`` and
        ``factor`` statements, the visible sites observed.
    :param guide: a NumPyro program of q(h|v; φ) with the same arguments. It is given the perturbed v and has to look
        at it; :class:`AmortizedGuide` makes one from the model.
    :param optim: an optimiser for θ, of ``numpyro.optim``, ``jax.example_libraries.optimizers`` or optax.
    :param loss: an outer loss of :mod:`numpyro_bism.losses`.
    :param inner_optim: an optimiser for φ; None takes ``optim``'s settings with a state of its own. optax's schedules
        then keep pace: the K inner steps of a step have its rate.
    :param inner_loss: an ELBO of NumPyro, or :class:`FisherDivergence`.
    :param num_inner_steps: K.
    :param hypergradient: a strategy of :mod:`numpyro_bism.hypergradients`; the paper's is ``Unrolled(5)``. None chooses
        when the programs are first run, and the attribute holds the choice from then on: ``Functional()`` under a
        denoising loss, where it knows the guide's distributions; ``Exact()`` under a loss that differentiates the
        score, where no site is relaxed; else ``Amortized()``.
    :param visible: names of the visible sites; None takes all observed sample sites.
    :param static_kwargs: keyword arguments of model and guide that stay the same, as in SVI.
    :raises ValueError: at construction for bad settings, at :meth:`init` for misuse (see the docs).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        loss: OuterLoss,
        *,
        inner_optim: Any = None,
        inner_loss: Any = None,
        num_inner_steps: int = 5,
        hypergradient: Hypergradient | None = None,
        visible: Sequence[str] | None = None,
        **static_kwargs: Any,
    ):
        super().__init__()
        require_guide(guide)
        inner_loss = Trace_ELBO() if inner_loss is None else inner_loss
        require_outer_loss(
            loss,
            "BiSM matches scores: use DenoisingScoreMatching(sigma=...) or another of numpyro_bism.losses; an ELBO "
            "goes to inner_loss.",
        )
        if num_inner_steps < 0:
            raise ValueError(f"num_inner_steps must not be negative, got {num_inner_steps}.")
        if hypergradient is not None:
            require_hypergradient(hypergradient)
        if isinstance(visible, str):
            raise ValueError(f"visible takes a list of site names: visible=[{visible!r}].")
        self.model = model
        self.guide = guide
        self.optim = as_optim(optim, "optim")
        self.loss = loss
        if inner_optim is None:
            self.inner_optim = inner_copy(self.optim, num_inner_steps, "inner_optim")
        else:
            self.inner_optim = as_optim(inner_optim, "inner_optim")
        self.inner_loss = inner_loss
        self.num_inner_steps = num_inner_steps
        self.hypergradient = hypergradient
        self.visible = None if visible is None else list(visible)
        self.static_kwargs = static_kwargs
        self._inner = divergences.as_inner_loss(inner_loss)
        # a cache of what the programs are, as the trainer's
        self._energies: list[tuple[BiSMState, Sequence[Any], energies.Energy]] = []

    def _init(self, rng_key: Array, leaves: Sequence[Any], spec: Any, init_params: Any) -> BiSMState:
        rng_key, key_start = jax.random.split(rng_key)
        start = self._described(leaves, spec, key_start, init_params)
        require_single_steps(self.optim, start.theta, "optim")
        require_single_steps(self.inner_optim, start.phi, "inner_optim")
        inner_state = self.inner_optim.init(start.phi)
        unknown = jnp.full((), jnp.inf, jnp.result_type(float))
        return BiSMState(
            self.optim.init(start.theta),
            inner_state,
            start.mutable or None,
            self._strategy.init(start.theta, self.inner_optim, inner_state),
            rng_key,
            BiSMInfo._make([*[unknown] * 7, jnp.zeros((), int)]),
            runaways.begin(),
        )

    def get_params(self, state: BiSMState) -> dict[str, Any]:
        """Constrained values of all parameters, the model's and the guide's, by site name.

        :param state: a state of :meth:`init`, :meth:`update` or :meth:`run`.
        :raises ValueError: if model and guide have not run yet in this ``BiSM``: constraints are unknown then.
        """
        pair = self._last_pair()
        theta, phi = self._unpack(pair, state)
        return pair.params(theta, phi, None)

    @in_own_modes
    def evaluate(self, state: BiSMState, *args: Any, **kwargs: Any) -> Array:
        """The outer loss at the state's parameters, with fresh noise; nothing is updated.

        :param state: a state of :meth:`init`, :meth:`update` or :meth:`run`; its random key gives the noise.
        :param args: arguments of model and guide, the data among them.
        :param kwargs: their keyword arguments.
        :returns: a mean over the batch.
        """
        leaves, spec = self._checked(args, kwargs)
        pair = self.pair(leaves, spec)
        theta, phi = self._unpack(pair, state)
        # split as in update, so that the same state sees the same batch
        _, key_batch, _, _, key_outer = _keys(state.rng_key)
        batch = pair.batch(key_batch, leaves, spec)
        return pair.outer_loss(key_outer, pair.params(theta, phi, state.mutable_state), batch, self.loss)

    def _update(self, state: BiSMState, leaves: Sequence[Any], spec: Any) -> tuple[BiSMState, Array, Array]:
        """Algorithm 1 of Bao et al. 2020 on one minibatch, its steps in their order.

        :returns: the new state, the outer loss, and whether all that was computed is finite.
        """
        pair = self.pair(leaves, spec)
        theta, phi = self._unpack(pair, state)
        rng_key, key_batch, key_inner, key_moved, key_outer = _keys(state.rng_key)

        batch = pair.batch(key_batch, leaves, spec)  # 1. the rows

        num = max(self.num_inner_steps, 1)  # without inner steps the losses are for info alone
        keys = jax.random.split(key_inner, num) if self.num_inner_steps else key_inner[None]
        problem = self._problem(pair, batch, state.mutable_state, keys[: self.num_inner_steps])
        problem, ahead = self._prefetched(problem, keys, key_outer, theta, phi)

        # 2. K inner steps on φ, which are kept
        fitted, inner_losses, inner_norms = inner_steps(ahead, num, theta, self.inner_optim, state.inner_optim_state)
        inner_state = fitted if self.num_inner_steps else state.inner_optim_state

        # 3. - 5. the hypergradient: N steps thrown away, J, and dJ/dθ
        self._require_state(state, theta, inner_state)
        found = self._strategy(key_outer, problem, theta, inner_state, state.hypergradient_state)
        length = norm(found.gradient)

        # 6. the outer step
        optim_state = self.optim.update(found.gradient, state.optim_state, value=found.loss)

        mutable = self._moved(key_moved, problem, theta, phi)
        watch = runaways.watched(state.watch, found.loss, length, found.curvature)
        varying = found.loss - self.loss.constant(batch.v.shape[1])
        seen = (found.loss, inner_losses[-1], inner_norms[-1], length, found.residual, found.curvature, varying)
        info = BiSMInfo._make([*[jnp.asarray(x, jnp.result_type(float)) for x in seen], watch.verdict])
        every = found.loss, length, inner_losses, inner_norms
        finite = jnp.array([jnp.isfinite(x).all() for x in every]).all()
        new = BiSMState(optim_state, inner_state, mutable, found.state, rng_key, info, watch)
        return new, info.outer_loss, finite

    def _prefetched(
        self, problem: Bilevel, keys: Array, key_outer: Array, theta: Any, phi: Any
    ) -> tuple[Bilevel, Prefetched]:
        """The noise of all inner steps, drawn at once: of those that are kept, and of the strategy's own."""
        ahead = prefetch(problem.inner, jnp.concatenate([keys, self._strategy.noise_keys(key_outer)]), theta, phi)
        own = Prefetched(ahead.loss, [x[len(keys) :] for x in ahead.noise])
        return replace(problem, prefetched=own), ahead

    def _require_state(self, state: BiSMState, theta: Any, inner_state: Any) -> None:
        """Checks that this strategy made what is carried.

        :raises ValueError: if another did.
        """
        fresh = jax.eval_shape(lambda: self._strategy.init(theta, self.inner_optim, inner_state))
        if not _alike(fresh, state.hypergradient_state):
            raise ValueError(
                f"The state was made with another hypergradient than {type(self._strategy).__name__}: it lacks "
                "what that one carries from step to step, or has more. Take the state of this BiSM's init() or run()."
            )

    def _moved(self, rng_key: Array, problem: Bilevel, theta: Any, phi: Any) -> Any:
        """The mutable sites after a pass: once a step."""
        if problem.mutable is None:
            return None
        v = self.loss.perturb(problem.batch.v, self.loss.draw(rng_key, problem.batch.v))
        return problem.pair.mutable_after_pass(rng_key, problem.params(theta, phi), problem.batch, v)

    def _warn(self, before: BiSMState, after: BiSMState) -> bool:
        return runaways.warn(before.watch, after.watch)

    @property
    def _strategy(self) -> Hypergradient:
        assert self.hypergradient is not None  # chosen when the programs were looked at
        return self.hypergradient

    def _next_key(self, rng_key: Array) -> Array:
        return _keys(rng_key)[0]

    @property
    def _cure(self) -> str:
        return (
            "If inner_grad_norm grows from step to step, or is not finite, the inner learning rate is too high: lower "
            f"it in inner_optim. Otherwise {self._strategy.cure}"
        )

    def _problem(self, pair: ModelAndGuide, batch: Batch, mutable: Any, inner_keys: Any, loss: Any = None) -> Bilevel:
        loss = self.loss if loss is None else loss
        return Bilevel(pair, batch, loss, self._inner, mutable, self.inner_optim, inner_keys)

    def _analyse(self, leaves: Sequence[Any], spec: Any, rng_key: Array, init_params: Any) -> Analysis:
        refuse_autoguide(self.guide)
        shiftable: frozenset[tuple[str, str]] | None = None

        def look(start: Analysis, batch: Batch, rng_key: Array) -> None:
            nonlocal shiftable
            averages.check(start, batch, rng_key, self.loss, self.inner_loss)
            key_theta, key_phi, key_rows, key_fit = jax.random.split(rng_key, 4)
            theta, phi = jittered(key_theta, start.theta), jittered(key_phi, start.phi)
            # a loss that takes no trace is a loss of the batch then, and batch normalisation a part of the model
            normalises = not self.loss.needs_uncoupled_examples
            params = start.pair.params(theta, phi, start.mutable)
            check_rows(key_rows, start.pair, params, batch, normalises_batch=normalises)

            def require_fit(strategy: Hypergradient) -> None:
                nonlocal shiftable
                if strategy.shifts_guide:
                    shiftable = require_shiftable(key_fit, start.pair, params, batch, self._inner)

            if self.hypergradient is None:
                self.hypergradient = chosen(self.loss, start.pair, require_fit)
            else:
                require_fit(self.hypergradient)

        start = analyse(
            self.model,
            averages.averaging(self.guide),
            leaves,
            spec,
            rng_key,
            init_params,
            self.visible,
            self.loss,
            self.hypergradient or Amortized(),  # what it asks of a guide is no less than what the others do
            self.static_kwargs,
            look=look,
        )
        divergences.check(self.inner_loss, start.pair)
        return start._replace(pair=replace(start.pair, shiftable=shiftable))

    @in_own_modes
    def energy(
        self, state: BiSMState, *args: Any, rng_key: Array, **kwargs: Any
    ) -> tuple[energies.Energy, dict[str, Any], energies.Point]:
        """The trained log p̃(v, h) on these arguments, its parameters, and a point: the data and the guide's draw of h.

        :param state: a state of :meth:`init`, :meth:`update` or :meth:`run`.
        :param args: arguments of model and guide, the data among them; a plate that subsamples these takes all rows
            here.
        :param rng_key: a JAX random key, for that draw and for the rows of other subsampling plates than the data's.
        :param kwargs: their keyword arguments.
        """
        leaves, spec = self._checked(args, kwargs)
        pair = self.evaluated_pair(leaves, spec)
        params = pair.params(*self._unpack(pair, state), state.mutable_state)
        key_batch, key_draw, key_energy = jax.random.split(rng_key, 3)
        batch = pair.batch(key_batch, leaves, spec)
        values, _ = pair.draw_discrete(key_draw, params, batch, batch.v)

        def same(kept_state: BiSMState, kept_leaves: Sequence[Any], _: energies.Energy) -> bool:
            return kept_state is state and all(a is b for a, b in zip(kept_leaves, leaves, strict=False))

        like = next((kept[2] for kept in self._energies if len(kept[1]) == len(leaves) and same(*kept)), None)
        energy, x = energies.Energy.from_model(pair.model, pair.sites, batch, params, key_energy, values, like)
        if like is None:  # two, as a report looks at all rows and at some
            self._energies = [(state, leaves, energy), *self._energies[:1]]
        return energy, params, x

    def _unpack(self, pair: ModelAndGuide, state: BiSMState) -> tuple[dict[str, Any], dict[str, Any]]:
        theta = self.optim.get_params(state.optim_state)
        phi = self.inner_optim.get_params(state.inner_optim_state)
        require_no_local(pair, phi)
        for role, found, wanted in (("model", theta, pair.theta), ("guide", phi, pair.phi)):
            if set(found) != set(wanted):
                raise ValueError(
                    f"The state has parameters {sorted(found)}, but the {role} has {sorted(wanted)}. Was the state "
                    "made with another model, or by init() on arguments of another structure?"
                )
            for name, value in found.items():
                shape = jax.tree.map(jnp.shape, value)
                if name in pair.shapes and shape != pair.shapes[name]:
                    raise ValueError(
                        f"The state's parameter '{name}' has shape {shape}, but that of the {role} here has "
                        f"{pair.shapes[name]}. Was the state made with a model of another size?"
                    )
        return theta, phi


def _keys(rng_key: Array) -> Array:
    """The state's next key, and those of the batch, the inner steps, the mutable sites and the hypergradient."""
    return jax.random.split(rng_key, 5)


def _alike(a: Any, b: Any) -> bool:
    structures: Any = jax.tree.structure(a), jax.tree.structure(b)
    is_same: bool = structures[0] == structures[1]
    return is_same
