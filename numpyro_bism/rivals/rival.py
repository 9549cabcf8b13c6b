"""What the rivals share: a loss of the model alone, minimised by one optimiser, with BiSM's face.

A rival is a :class:`Rival` with a loss. Where that needs the marginal log p̃(v; θ), :class:`MarginalTarget` has it:
the latents are summed or integrated out in closed form or by enumeration, in a way found once, at the first analysis.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..compiled.steps import norm
from ..energies import Energy, Integral, Point
from ..hypergradients import Detached
from ..optim.host import as_optim, require_single_steps
from ..programs import visible
from ..programs.analysis import analyse
from ..programs.checks import Analysis
from ..programs.coupling import check_rows
from ..programs.modes import in_own_modes
from ..programs.pair import ModelAndGuide
from ..programs.params import jittered
from ..training import runaways
from ..training.trainer import Trainer, ranks, structure
from .target import MarginalTarget, check_reads


class RivalInfo(NamedTuple):
    """What the last step saw; infinite before the first.

    :ivar loss: the loss, a mean over the batch.
    :ivar grad_norm: the length of its gradient.
    :ivar verdict: 0 as long as training has not run away, else a number; ``in_words`` says it in a sentence.
    """

    loss: Array
    grad_norm: Array
    verdict: Array

    @property
    def in_words(self) -> str:
        """The verdict as a sentence."""
        return runaways.in_words(self.verdict, runaways.RIVAL)

    def __str__(self) -> str:
        return runaways.shown(self, runaways.RIVAL)


class RivalState(NamedTuple):
    """All that training changes; a pytree of arrays, to be saved and restored by any checkpointer.

    :ivar optim_state: θ and the state of its optimiser; parameters of the method's own among them.
    :ivar mutable_state: mutable sites of the model, or None.
    :ivar carried: what the method carries from step to step (noise, chains, a guide), or None.
    :ivar rng_key: the random key of the step to come.
    :ivar info: what the last step saw.
    :ivar watch: what the verdict rests on.
    """

    optim_state: Any
    mutable_state: Any
    carried: Any
    rng_key: Array
    info: RivalInfo
    watch: runaways.Watch


class Rival(Trainer):
    """A method that minimises one loss of the model's parameters.

    :param model: a NumPyro program of an unnormalised density p̃(v, h; θ), as BiSM takes it.
    :param optim: an optimiser for θ, of ``numpyro.optim``, ``jax.example_libraries.optimizers`` or optax.
    :param visible: names of the visible sites; None takes all observed sample sites.
    :param static_kwargs: keyword arguments of the model that stay the same, as in SVI.
    :param guide: of the methods that have one.
    :cvar takes_discrete: whether visible sites may be discrete.
    :cvar sums_latents: whether the latents must be summed out; None if they are where they can be.
    :cvar moves_visible: whether the conditionals of the visible values are wanted.
    :cvar partial_guide: whether the guide is of the model's global sites alone.
    :cvar is_contrast: whether the loss is a difference that crosses zero.
    :cvar scale: of the loss, in nats; infinite if it has none.
    :cvar words: how it is said that training has run away.
    :cvar info_type: the type of what the last step saw.
    """

    takes_discrete = False
    sums_latents: bool | None = True
    moves_visible = False
    partial_guide = False
    is_contrast = False
    scale = math.inf
    words = runaways.RIVAL
    info_type: Any = RivalInfo

    def __init__(
        self,
        model: Callable[..., Any],
        optim: Any,
        visible: Sequence[str] | None,
        static_kwargs: Mapping[str, Any],
        guide: Callable[..., Any] | None = None,
    ):
        super().__init__()
        if isinstance(visible, str):
            raise ValueError(f"visible takes a list of site names: visible=[{visible!r}].")
        self.model = model
        self.guide = guide
        self.optim = as_optim(optim, "optim")
        self.visible = None if visible is None else list(visible)
        self.static_kwargs = static_kwargs
        self._targets: dict[Any, MarginalTarget] = {}

    @abstractmethod
    def _loss(
        self,
        rng_key: Array,
        theta: Mapping[str, Any],
        carried: Any,
        target: MarginalTarget,
        mutable: Any,
        batch: visible.Batch,
    ) -> tuple[Array, Any]:
        """The loss at θ, a mean over the batch, and what is carried to the next step."""

    def _begin(
        self, rng_key: Array, target: MarginalTarget, start: Analysis, batch: visible.Batch
    ) -> tuple[dict[str, Any], Any]:
        """Before the first step: parameters of the method's own, by name, and what it carries."""
        return {}, None

    def _fit(
        self,
        rng_key: Array,
        theta: Mapping[str, Any],
        carried: Any,
        target: MarginalTarget,
        mutable: Any,
        batch: visible.Batch,
    ) -> tuple[Any, tuple[Array, ...]]:
        """What is carried, fitted to θ before θ's own step; and what of this the info tells."""
        return carried, ()

    def _phi(self, pair: ModelAndGuide, theta: Mapping[str, Any], carried: Any) -> dict[str, Any]:
        """The guide's unconstrained parameters, if there is one."""
        return {}

    def _program(self, rng_key: Array, pair: ModelAndGuide, params: Mapping[str, Any], batch: visible.Batch) -> Any:
        """The program whose density this is."""
        return pair.model

    def _scale(self, target: MarginalTarget, batch: visible.Batch) -> float:
        """What no model that fits has its loss at ten times of, in nats; infinite where this isn't known.

        Of log p̃ between chains and data a nat a number of discrete data, which bound its gradient too. Continuous data
        have none: a scale of the model that starts off theirs by a factor of 100 is 5,000 nats a number.
        """
        is_bounded = self.is_contrast and all(site.is_discrete for site in target.energy.sites)
        return float(batch.v.shape[1]) if is_bounded else self.scale

    def _check(
        self, target: MarginalTarget, params: Mapping[str, Any], batch: visible.Batch, rng_key: Array
    ) -> MarginalTarget:
        """The target, with what the method finds out of the model off its initial parameters.

        :raises ValueError: where the method does not fit the model.
        """
        return target

    def _next_key(self, rng_key: Array) -> Array:
        return _keys(rng_key)[0]

    @property
    def _cure(self) -> str:
        return "Lower the learning rate, or clip the gradient"

    def get_params(self, state: RivalState) -> dict[str, Any]:
        """Constrained values of all parameters, by site name; of the method's own (a log normaliser) too.

        :param state: a state of :meth:`init`, :meth:`update` or :meth:`run`.
        :raises ValueError: if the model has not run yet: its constraints are unknown then.
        """
        pair = self._last_pair()
        theta = self._theta(pair, state)
        phi = self._phi(pair, theta, state.carried)
        own = {name: value for name, value in theta.items() if name not in {**pair.theta, **phi}}
        return {**pair.params({name: theta[name] for name in pair.theta}, phi, None), **own}

    @in_own_modes
    def evaluate(self, state: RivalState, *args: Any, **kwargs: Any) -> Array:
        """The loss at the state's parameters, with fresh noise; nothing is updated.

        :param state: a state of :meth:`init`, :meth:`update` or :meth:`run`; its random key gives the noise.
        :param args: arguments of model and guide, the data among them.
        :param kwargs: their keyword arguments.
        :returns: a mean over the batch.
        """
        leaves, spec = self._checked(args, kwargs)
        target = self.target(leaves, spec)
        # split as in update, so that the same state sees the same batch
        _, key_batch, key_loss, _ = _keys(state.rng_key)
        _, key_loss = jax.random.split(key_loss)
        batch = target.pair.batch(key_batch, leaves, spec)
        theta = self._theta(target.pair, state)
        return self._loss(key_loss, theta, state.carried, target, state.mutable_state, batch)[0]

    @in_own_modes
    def energy(
        self, state: RivalState, *args: Any, rng_key: Array, **kwargs: Any
    ) -> tuple[Energy, dict[str, Any], Point]:
        """The trained log p̃(v, h) on these arguments, its parameters, and a point: the data and a draw of h.

        The guide draws it; without one, the model itself.

        :param state: a state of :meth:`init`, :meth:`update` or :meth:`run`.
        :param args: arguments of model and guide, the data among them; a plate that subsamples these takes all rows
            here.
        :param rng_key: a JAX random key, for that draw and for the rows of other subsampling plates than the data's.
        :param kwargs: their keyword arguments.
        """
        return self._energy(state, args, kwargs, rng_key, self._program)

    def _energy(
        self, state: Any, args: Any, kwargs: Any, rng_key: Array, program_of: Callable[..., Any]
    ) -> tuple[Energy, dict[str, Any], Point]:
        leaves, spec = self._checked(args, kwargs)
        pair = self.evaluated_pair(leaves, spec)
        target = replace(self._targets[ranks(structure(leaves, spec))], pair=pair)
        theta = self._theta(target.pair, state)
        params = target.params(theta, state.mutable_state, self._phi(target.pair, theta, state.carried))
        key_batch, key_draw, key_energy = jax.random.split(rng_key, 3)
        batch = target.pair.batch(key_batch, leaves, spec)
        program = program_of(key_draw, target.pair, params, batch)
        values, _ = target.pair.draw_discrete(key_draw, params, batch, batch.v)
        energy, x = Energy.from_model(program, target.pair.sites, batch, params, key_energy, values)
        return energy, params, x

    def target(self, leaves: Sequence[Any], spec: Any) -> MarginalTarget:
        """The model as it runs on arguments of this structure, and how its latents are summed out.

        :param leaves: the programs' arguments, flattened as a pytree.
        :param spec: how they are nested.
        """
        pair = self.pair(leaves, spec)
        return replace(self._targets[ranks(structure(leaves, spec))], pair=pair)

    def _init(self, rng_key: Array, leaves: Sequence[Any], spec: Any, init_params: Any) -> RivalState:
        rng_key, key_start, key_batch, key_own = jax.random.split(rng_key, 4)
        start = self._described(leaves, spec, key_start, init_params)
        target = self.target(leaves, spec)
        batch = target.pair.batch(key_batch, leaves, spec)
        own, carried = self._begin(key_own, target, start, batch)
        theta = {**start.theta, **own}
        require_single_steps(self.optim, theta, "optim")
        unknown = jnp.full((), jnp.inf, jnp.result_type(float))
        info = self.info_type._make([*[unknown] * (len(self.info_type._fields) - 1), jnp.zeros((), int)])
        watch = runaways.begin()
        return RivalState(self.optim.init(theta), start.mutable or None, carried, rng_key, info, watch)

    def _update(self, state: RivalState, leaves: Sequence[Any], spec: Any) -> tuple[RivalState, Array, Array]:
        target = self.target(leaves, spec)
        theta, mutable = self._theta(target.pair, state), state.mutable_state
        rng_key, key_batch, key_loss, key_moved = _keys(state.rng_key)
        batch = target.pair.batch(key_batch, leaves, spec)
        key_fit, key_loss = jax.random.split(key_loss)
        fitted, seen = self._fit(key_fit, theta, state.carried, target, mutable, batch)
        (loss, carried), gradient = jax.value_and_grad(self._loss, argnums=1, has_aux=True)(
            key_loss, theta, fitted, target, mutable, batch
        )
        if mutable is not None:
            params = target.params(theta, mutable, self._phi(target.pair, theta, carried))
            mutable = target.pair.mutable_after_pass(key_moved, params, batch, batch.v)
        length, scale = norm(gradient), self._scale(target, batch)
        watch = runaways.watched(state.watch, loss, length, warm_up=0, is_contrast=self.is_contrast, scale=scale)
        numbers = [jnp.asarray(x, jnp.result_type(float)) for x in (loss, length, *seen)]
        info = self.info_type._make([*numbers, watch.verdict])
        optim_state = self.optim.update(gradient, state.optim_state, value=loss)
        finite = jnp.isfinite(jnp.stack(numbers)).all()
        return RivalState(optim_state, mutable, carried, rng_key, info, watch), info.loss, finite

    def _warn(self, before: RivalState, after: RivalState) -> bool:
        return runaways.warn(before.watch, after.watch, self.words)

    def _theta(self, pair: ModelAndGuide, state: RivalState) -> dict[str, Any]:
        theta: dict[str, Any] = self.optim.get_params(state.optim_state)
        if not set(pair.theta) <= set(theta):
            raise ValueError(
                f"The state has parameters {sorted(theta)}, but the model has {sorted(pair.theta)}. Was the state "
                "made with another model, or by init() on arguments of another structure?"
            )
        return theta

    def _analyse(self, leaves: Sequence[Any], spec: Any, rng_key: Array, init_params: Any) -> Analysis:
        def look(start: Analysis, batch: visible.Batch, rng_key: Array) -> None:
            self._targets[ranks(structure(leaves, spec))] = self._find(start, batch, rng_key)

        return analyse(
            self.model,
            self.guide,
            leaves,
            spec,
            rng_key,
            init_params,
            self.visible,
            None,
            Detached(),
            self.static_kwargs,
            self.takes_discrete,
            self.partial_guide,
            look,
        )

    def _find(self, start: Analysis, batch: visible.Batch, rng_key: Array) -> MarginalTarget:
        """The energy, tried out, and how its latents are summed out."""
        key_params, key_phi, key_program, key_energy, key_check, key_rows, key_method = jax.random.split(rng_key, 7)
        pair, phi = start.pair, jittered(key_phi, start.phi)
        params = pair.params(jittered(key_params, start.theta), phi, start.mutable)
        program = self._program(key_program, pair, params, batch)
        check_rows(key_rows, pair, params, batch, model=program)
        energy, x = Energy.from_model(program, pair.sites, batch, params, key_energy, moves_visible=self.moves_visible)
        check_reads(energy, params, x, key_check)
        hidden = {name: (x[name].shape[1:], x[name].dtype) for name in energy.hidden}
        integral = self._integral(energy, params, x) if hidden and self.sums_latents is not False else None
        return self._check(MarginalTarget(pair, energy, hidden, integral), params, batch, key_method)

    def _integral(self, energy: Energy, params: Mapping[str, Any], x: Point) -> Integral | None:
        cure = f"{type(self).__name__} sums the latents out at every step: learn this model with BiSM or VNCE"
        found: list[Integral] = []
        try:
            # traced alone: of the density nothing but its structure is looked at
            jax.eval_shape(lambda: found.append(Integral.over_variables(energy.density(params, x), x, energy.hidden)))
        except ValueError as error:
            if self.sums_latents is None:
                return None
            raise ValueError(f"{error} {cure}.") from error
        if found[0].quadrature:
            if self.sums_latents is None:
                return None
            raise ValueError(
                f"Latent sites {list(found[0].quadrature)} have no closed-form integral: the energy is not quadratic "
                f"in them. {cure}."
            )
        return found[0]


def _keys(rng_key: Array) -> Array:
    """The next state's key, and those of a step: its rows, its loss, its mutable state."""
    return jax.random.split(rng_key, 4)
