"""BiSM: the bi-level loop (Bao et al. 2020, Algorithm 1), with the face of ``numpyro.infer.SVI``."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tqdm
from jax import Array
from numpyro.infer import Trace_ELBO

from . import densities, divergences, energies
from . import visible as visibles
from .hypergradients import Amortized, Bilevel, Hypergradient, fused
from .jit import num_ahead, taken_apart
from .losses import OuterLoss
from .optim import as_optim

__all__ = ["BiSM", "BiSMInfo", "BiSMRunResult", "BiSMState"]


class BiSMInfo(NamedTuple):
    """What the last step saw; infinite before the first.

    :ivar outer_loss: J at the fitted (and, if unrolled, further fitted) guide.
    :ivar inner_loss: G at the last kept inner step, before its update; a mean over the data.
    :ivar inner_grad_norm: ‖∇_φ G‖ there: small and steady if the guide is fitted.
    :ivar hypergradient_norm: ‖dJ/dθ‖: a run of growing values says that the unroll is about to explode.
    :ivar residual: relative residual of the hypergradient's linear system: near 0 it is solved; 0 if there is none.
    :ivar curvature: the least curvature of G that its solver met; at or below 0 φ is at no minimum. Infinite if it
        looks at none.
    """

    outer_loss: Array
    inner_loss: Array
    inner_grad_norm: Array
    hypergradient_norm: Array
    residual: Array
    curvature: Array


class BiSMState(NamedTuple):
    """All that training changes; a pytree of arrays, to be saved and restored by any checkpointer.

    :ivar optim_state: θ and the state of its optimiser.
    :ivar inner_optim_state: φ and the state of its optimiser.
    :ivar mutable_state: mutable sites (batch-norm statistics), or None.
    :ivar hypergradient_state: what the hypergradient strategy carries from step to step, or None.
    """

    optim_state: Any
    inner_optim_state: Any
    mutable_state: Any
    hypergradient_state: Any
    rng_key: Array
    info: BiSMInfo


class BiSMRunResult(NamedTuple):
    """What :meth:`BiSM.run` returns: constrained parameters, the last state, the outer loss of every step."""

    params: dict[str, Any]
    state: BiSMState
    losses: Array


class BiSM:
    """Bi-level score matching of an unnormalised latent-variable model.

    .. code-block:: python

        svi  = SVI (model, guide, optim, loss=Trace_ELBO())
        bism = BiSM(model, guide, optim, loss=DenoisingScoreMatching(sigma=0.1))

    A step takes K inner steps on the guide's parameters φ, which are kept, and one outer step on the model's
    θ along the hypergradient. All work on one minibatch, each with fresh noise.

    :param model: a NumPyro program of an unnormalised density p̃(v, h; θ): any mixture of ``sample`` and
        ``factor`` statements, the visible sites observed.
    :param guide: a NumPyro program of q(h|v; φ) with the same arguments.
    :param optim: an optimiser for θ, of ``numpyro.optim``, ``jax.example_libraries.optimizers`` or optax.
    :param loss: an outer loss of :mod:`numpyro_bism.losses`.
    :param inner_optim: an optimiser for φ; None takes ``optim``'s settings with a state of its own.
    :param inner_loss: an ELBO of NumPyro, or :class:`FisherDivergence`.
    :param num_inner_steps: K.
    :param hypergradient: a strategy of :mod:`numpyro_bism.hypergradients`; the paper's is ``Unrolled(5)``.
    :param visible: names of the visible sites; None takes all observed sample sites.
    :param static_kwargs: keyword arguments of model and guide that stay the same, as in SVI.
    :raises ValueError: at construction for bad settings, at :meth:`init` for misuse (see the docs).
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Any,
        loss: OuterLoss,
        *,
        inner_optim: Any = None,
        inner_loss: Any = None,
        num_inner_steps: int = 5,
        hypergradient: Hypergradient = Amortized(),  # noqa: B008  (frozen)
        visible: Sequence[str] | None = None,
        **static_kwargs: Any,
    ):
        inner_loss = Trace_ELBO() if inner_loss is None else inner_loss
        if not isinstance(loss, OuterLoss):
            raise ValueError(
                f"loss={type(loss).__name__} is not an outer loss. BiSM matches scores: use "
                "DenoisingScoreMatching(sigma=...) or another of numpyro_bism.losses; an ELBO goes to inner_loss."
            )
        if num_inner_steps < 0:
            raise ValueError(f"num_inner_steps must not be negative, got {num_inner_steps}.")
        if isinstance(hypergradient, type) or not callable(hypergradient):
            raise ValueError(
                f"hypergradient={hypergradient!r} is not a strategy. Pass an instance, such as Amortized() or "
                "Unrolled(5)."
            )
        if isinstance(visible, str):
            raise ValueError(f"visible takes a list of site names: visible=[{visible!r}].")
        self.model = model
        self.guide = guide
        self.optim = as_optim(optim, "optim")
        self.loss = loss
        self.inner_optim = self.optim if inner_optim is None else as_optim(inner_optim, "inner_optim")
        self.inner_loss = inner_loss
        self.num_inner_steps = num_inner_steps
        self.hypergradient = hypergradient
        self.visible = None if visible is None else list(visible)
        self.static_kwargs = static_kwargs
        self._inner = divergences.as_inner_loss(inner_loss)
        # These are caches of what the programs are; nothing that training changes is kept here.
        self._pairs: dict[Any, densities.Pair] = {}
        self._loops: dict[Any, Callable] = {}
        self._energies: list[tuple[BiSMState, Sequence[Any], energies.Energy]] = []

    def init(
        self, rng_key: Array, *args: Any, init_params: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> BiSMState:
        """The initial state; model and guide run once, and misuse is found here.

        :param rng_key: a JAX random key.
        :param args: arguments of model and guide, the data among them.
        :param init_params: values for ``param`` sites by name, instead of the programs' own.
        :raises ValueError: on misuse, naming the site and the cure, or on NaN or infinity in the data.
        """
        return self._init(rng_key, *self._checked(args, kwargs), init_params)

    def _init(self, rng_key: Array, leaves: Sequence[Any], spec: Any, init_params: Any) -> BiSMState:
        rng_key, key_start = jax.random.split(rng_key)
        start = self._analyse(leaves, spec, key_start, init_params)
        self._pairs[self._key(leaves, spec)] = start.pair
        self._check_optims(start.theta, start.phi)
        inner_state = self.inner_optim.init(start.phi)
        unknown = jnp.full((), jnp.inf, jnp.result_type(float))
        return BiSMState(
            self.optim.init(start.theta),
            inner_state,
            start.mutable or None,
            self.hypergradient.init(self.inner_optim, inner_state),
            rng_key,
            BiSMInfo(*[unknown] * len(BiSMInfo._fields)),
        )

    def get_params(self, state: BiSMState) -> dict[str, Any]:
        """Constrained values of all parameters, the model's and the guide's, by site name.

        :raises ValueError: if model and guide have not run yet in this ``BiSM``: constraints are unknown then.
        """
        if not self._pairs:
            raise ValueError(
                "The constraints are not known yet. Call init(rng_key, *args) once; the state stays yours."
            )
        pair = next(reversed(self._pairs.values()))
        theta, phi = self._unpack(pair, state)
        return pair.params(theta, phi, None)

    def update(self, state: BiSMState, *args: Any, **kwargs: Any) -> tuple[BiSMState, Array]:
        """One outer update, to be compiled with ``jax.jit`` by the caller, as SVI's.

        :returns: the new state and the outer loss, a mean over the batch.
        :raises ValueError: on misuse, and on NaN or infinity in the data where it is not compiled.
        """
        state, loss, _ = self._update(state, *self._checked(args, kwargs))
        return state, loss

    def stable_update(self, state: BiSMState, *args: Any, **kwargs: Any) -> tuple[BiSMState, Array]:
        """:meth:`update`, but if the data, a loss or a gradient is not finite, nothing changes but the random key.

        The loss returned is NaN then.
        """
        leaves, spec = visibles.flatten(args, kwargs)
        return self._stable_update(state, leaves, spec)

    def _stable_update(self, state: BiSMState, leaves: Sequence[Any], spec: Any) -> tuple[BiSMState, Array]:
        new, loss, finite = self._update(state, leaves, spec)
        # the key moves on all the same, as in SVI: the next try sees other noise
        old = state._replace(rng_key=new.rng_key)
        kept = jax.tree.map(lambda a, b: a if a is b else jnp.where(finite, a, b), new, old)
        return kept, jnp.where(finite, loss, jnp.nan)

    def run(
        self,
        rng_key: Array,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        stable_update: bool = False,
        init_state: BiSMState | None = None,
        init_params: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> BiSMRunResult:
        """``num_steps`` outer updates in one compiled program.

        :param rng_key: a JAX random key; not used with ``init_state``, which has its own.
        :param progress_bar: show steps and losses; costs a few returns from the compiled loop a second.
        :param stable_update: use :meth:`stable_update`.
        :param init_state: continue from this state.
        :param init_params: as in :meth:`init`.
        :raises ValueError: on misuse, or on NaN or infinity in the data.
        :raises FloatingPointError: if a loss is not finite, unless ``stable_update``.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be a positive integer, got {num_steps}.")
        leaves, spec = self._checked(args, kwargs)
        state = self._init(rng_key, leaves, spec, init_params) if init_state is None else init_state
        loop, arrays = self._loop(leaves, spec, stable_update)
        # copied: the loop works in place, and init_state stays the caller's
        state = jax.tree.map(jnp.copy, state)
        losses = jnp.full(num_steps, jnp.inf, jnp.result_type(float))
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((state, arrays))):
            state, losses = loop(state, losses, 0, num_steps, arrays)
            return BiSMRunResult(self.get_params(state), state, losses)
        done, chunk = 0, 1 if progress_bar else num_steps
        with tqdm.tqdm(total=num_steps, disable=not progress_bar) as bar:
            while done < num_steps:
                stop, began = min(done + chunk, num_steps), time.perf_counter()
                state, losses = loop(state, losses, done, stop, arrays)
                recent = jax.device_get(losses[done:stop])
                finite = jnp.isfinite(recent)
                if not stable_update and not finite.all():
                    raise FloatingPointError(
                        f"The outer loss is not finite from step {done + int(finite.argmin())} of {num_steps} on "
                        f"({jax.tree.map(float, state.info)}). If inner_grad_norm grows from step to step, or is not "
                        "finite, the inner learning rate is too high: lower it in inner_optim. Otherwise "
                        f"{self.hypergradient.cure}. "
                        "stable_update=True skips such steps."
                    )
                bar.update(stop - done)
                bar.set_postfix_str(
                    f"avg loss [{done + 1}-{stop}]: {recent[finite].mean() if finite.any() else jnp.nan:.4f}"
                )
                # the first chunk is a single step, with the compilation in it; then half a second each
                seconds = time.perf_counter() - began
                chunk = 10 if done == 0 else max(1, min(10 * chunk, round(0.5 * (stop - done) / seconds)))
                done = stop
        return BiSMRunResult(self.get_params(state), state, losses)

    def evaluate(self, state: BiSMState, *args: Any, **kwargs: Any) -> Array:
        """The outer loss at the state's parameters, with fresh noise; nothing is updated."""
        leaves, spec = self._checked(args, kwargs)
        pair = self.pair(leaves, spec)
        theta, phi = self._unpack(pair, state)
        # split as in update, so that the same state sees the same batch
        _, key_batch, _, _, key_outer = _keys(state.rng_key)
        batch = pair.batch(key_batch, leaves, spec)
        return pair.outer_loss(key_outer, pair.params(theta, phi, state.mutable_state), batch, self.loss)

    def _update(self, state: BiSMState, leaves: Sequence[Any], spec: Any) -> tuple[BiSMState, Array, Array]:
        """The new state, the outer loss, and whether all that was computed is finite."""
        pair = self.pair(leaves, spec)
        theta, phi = self._unpack(pair, state)
        mutable = state.mutable_state
        rng_key, key_batch, key_inner, key_moved, key_outer = _keys(state.rng_key)
        batch = pair.batch(key_batch, leaves, spec)

        # without inner steps the losses are for info alone
        num = max(self.num_inner_steps, 1)
        keys = jax.random.split(key_inner, num) if self.num_inner_steps else key_inner[None]
        ahead = self.hypergradient.ahead(key_outer)
        problem = self._problem(pair, batch, mutable, keys[: self.num_inner_steps])
        draw, inner = taken_apart(problem.inner, key_inner, theta, phi)
        noise = jax.vmap(draw)(jnp.concatenate([keys, ahead]))
        problem = replace(problem, ahead=([x[num:] for x in noise], inner))
        inner_state = state.inner_optim_state

        def fit(inner_state, noise):
            """One kept inner step."""
            phi = self.inner_optim.get_params(inner_state)
            loss, gradient = jax.value_and_grad(inner, argnums=2)(noise, theta, phi)
            return self.inner_optim.update(gradient, inner_state, value=loss), (loss, _norm(gradient))

        fitted, (inner_losses, inner_norms) = jax.lax.scan(
            fit, inner_state, [x[:num] for x in noise], length=num, unroll=fused(num)
        )
        if self.num_inner_steps:
            inner_state = fitted
        fresh = jax.eval_shape(lambda: self.hypergradient.init(self.inner_optim, inner_state))
        if not _alike(fresh, state.hypergradient_state):
            raise ValueError(
                f"The state was made with another hypergradient than {type(self.hypergradient).__name__}: it lacks "
                "what that one carries from step to step, or has more. Take the state of this BiSM's init() or run()."
            )
        found = self.hypergradient(key_outer, problem, theta, inner_state, state.hypergradient_state)
        loss, gradient, norm = found.loss, found.gradient, _norm(found.gradient)
        if mutable is not None:
            v = self.loss.perturb(batch.v, self.loss.draw(key_moved, batch.v))
            mutable = pair.moved(key_moved, pair.params(theta, phi, mutable), batch, v)
        seen = (loss, inner_losses[-1], inner_norms[-1], norm, found.residual, found.curvature)
        info = BiSMInfo(*[jnp.asarray(x, jnp.result_type(float)) for x in seen])
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(inner_norms).all()
        optim_state = self.optim.update(gradient, state.optim_state, value=loss)
        return BiSMState(optim_state, inner_state, mutable, found.state, rng_key, info), info.outer_loss, finite

    def _problem(self, pair: densities.Pair, batch: Any, mutable: Any, inner_keys: Any) -> Bilevel:
        def outer(key, theta, phi):
            return pair.outer_loss(key, pair.params(theta, phi, mutable), batch, self.loss)

        def inner(key, theta, phi):
            return divergences.of(key, self.loss, self._inner, pair, pair.params(theta, phi, mutable), batch)

        def surrogate(estimate):
            """A loss that needs θ a second time, as numbers: what it does not differentiate."""

            def value(key, theta, phi, *settings):
                fixed = pair.params(jax.lax.stop_gradient(theta), phi, mutable)
                return estimate(key, pair.params(theta, phi, mutable), fixed, batch, self.loss, *settings)

            return value

        posterior, covariance = surrogate(pair.posterior_loss), surrogate(pair.covariance_loss)
        return Bilevel(outer, inner, posterior, covariance, self.inner_optim, inner_keys)

    def _loop(self, leaves: Sequence[Any], spec: Any, stable: bool) -> tuple[Callable, list[Array]]:
        """The compiled loop for arguments of this structure, kept between calls of ``run``; and its arrays."""
        is_array = [isinstance(leaf, Array) for leaf in leaves]
        static = tuple(None if yes else leaf for yes, leaf in zip(is_array, leaves, strict=True))
        key = (*self._key(leaves, spec), *(id(x) if x.__hash__ is None else x for x in static), stable)
        if key not in self._loops:

            def loop(state, losses, start, stop, arrays):
                rest = iter(arrays)
                filled = [next(rest) if yes else leaf for yes, leaf in zip(is_array, static, strict=True)]

                def update(rng_key, state):
                    state = state._replace(rng_key=rng_key)
                    return (self._stable_update if stable else self._update)(state, filled, spec)[:2]

                draw, rest = taken_apart(update, state.rng_key, state)
                num = num_ahead(draw, state.rng_key)

                def some(carry):
                    """``num`` steps, or as many as are left."""
                    start, state, losses = carry
                    end = jnp.minimum(start + num, stop)
                    _, keys = jax.lax.scan(lambda key, _: (_keys(key)[0], key), state.rng_key, length=num)
                    noise = jax.vmap(draw)(keys)

                    def one(i, carry):
                        state, losses = carry
                        state, loss = rest([x[i - start] for x in noise], state)
                        return state, losses.at[i].set(loss)

                    return end, *jax.lax.fori_loop(start, end, one, (state, losses))

                return jax.lax.while_loop(lambda carry: carry[0] < stop, some, (start, state, losses))[1:]

            self._loops[key] = jax.jit(loop, donate_argnums=(0, 1))
        return self._loops[key], [leaf for yes, leaf in zip(is_array, leaves, strict=True) if yes]

    def _checked(self, args: tuple, kwargs: dict) -> tuple[list[Any], Any]:
        leaves, spec = visibles.flatten(args, kwargs)
        visibles.require_finite(leaves, spec)
        return leaves, spec

    def _analyse(self, leaves, spec, rng_key, init_params) -> densities.Analysis:
        start = densities.analyse(
            self.model,
            self.guide,
            leaves,
            spec,
            rng_key,
            init_params,
            self.visible,
            self.loss,
            self.hypergradient,
            self.static_kwargs,
        )
        divergences.check(self.inner_loss, start.pair)
        return start

    def pair(self, leaves: Sequence[Any], spec: Any) -> densities.Pair:
        """Model and guide as they run on arguments of this structure; analysed once for each structure."""
        key = self._key(leaves, spec)
        if key not in self._pairs:
            like = next((pair for known, pair in self._pairs.items() if _ranks(known) == _ranks(key)), None)
            pair = None if like is None else densities.resized(like, leaves, spec)
            # a key of its own: what is drawn here is only looked at
            self._pairs[key] = pair or self._analyse(leaves, spec, jax.random.key(0), None).pair
        return self._pairs[key]

    def energy(
        self, state: BiSMState, *args: Any, rng_key: Array, **kwargs: Any
    ) -> tuple[energies.Energy, dict[str, Any], energies.Point]:
        """The trained log p̃(v, h) on these arguments, its parameters, and a point: the data and the guide's draw of h.

        :param rng_key: a JAX random key, for that draw and for a subsampling plate's rows.
        """
        leaves, spec = self._checked(args, kwargs)
        pair = self.pair(leaves, spec)
        params = pair.params(*self._unpack(pair, state), state.mutable_state)
        key_batch, key_draw, key_energy = jax.random.split(rng_key, 3)
        batch = pair.batch(key_batch, leaves, spec)
        values, _ = pair.hard_draw(key_draw, params, batch, batch.v)

        def same(kept_state, kept_leaves, _):
            return kept_state is state and all(a is b for a, b in zip(kept_leaves, leaves, strict=False))

        like = next((kept[2] for kept in self._energies if len(kept[1]) == len(leaves) and same(*kept)), None)
        energy, x = energies.Energy.of(pair.model, pair.sites, batch, params, key_energy, values, like)
        if like is None:  # two, as a report looks at all rows and at some
            self._energies = [(state, leaves, energy), *self._energies[:1]]
        return energy, params, x

    def _check_optims(self, theta: Any, phi: Any) -> None:
        """:raises ValueError: for an optimiser that wants more than gradients and the loss (line searches, L-BFGS)."""
        for name, optim, params in (("optim", self.optim, theta), ("inner_optim", self.inner_optim, phi)):
            try:
                jax.eval_shape(lambda p, optim=optim: optim.update(p, optim.init(p), value=jnp.zeros(())), params)
            except TypeError as error:
                raise ValueError(
                    f"{name} can't be stepped with a gradient and a loss alone ({error}). Line searches and L-BFGS "
                    "evaluate the loss again and again, on other noise each time; use a stochastic optimiser."
                ) from error

    def _key(self, leaves: Sequence[Any], spec: Any) -> tuple:
        return spec, tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Array) else _static(leaf) for leaf in leaves)

    def _unpack(self, pair: densities.Pair, state: BiSMState) -> tuple[dict[str, Any], dict[str, Any]]:
        theta = self.optim.get_params(state.optim_state)
        phi = self.inner_optim.get_params(state.inner_optim_state)
        for role, found, wanted in (("model", theta, pair.theta), ("guide", phi, pair.phi)):
            if set(found) != set(wanted):
                raise ValueError(
                    f"The state has parameters {sorted(found)}, but the {role} has {sorted(wanted)}. Was the state "
                    "made with another model, or by init() on arguments of another structure?"
                )
        return theta, phi


def _keys(rng_key: Array) -> Array:
    """The state's next key, and those of the batch, the inner steps, the mutable sites and the hypergradient."""
    return jax.random.split(rng_key, 5)


def _static(leaf: Any) -> Any:
    # a float is no structure: one that changes from step to step would be analysed anew each time
    return type(leaf) if isinstance(leaf, float) or leaf.__hash__ is None else leaf


def _ranks(key: tuple) -> tuple:
    """A structure without the sizes of its arrays."""
    spec, leaves = key
    return spec, tuple((len(x[0]), x[1]) if isinstance(x, tuple) else x for x in leaves)


def _alike(a: Any, b: Any) -> bool:
    structures: Any = jax.tree.structure(a), jax.tree.structure(b)
    return structures[0] == structures[1]


def _norm(gradient: Any) -> Array:
    leaves = jax.tree.leaves(gradient)
    return jnp.sqrt(sum(jnp.square(g).sum() for g in leaves)) if leaves else jnp.zeros(())
