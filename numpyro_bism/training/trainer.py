"""The training loop that BiSM and its rivals share: the face of ``numpyro.infer.SVI``, progress, finiteness, caches."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tqdm
from jax import Array

from ..compiled.convolutions import compiled
from ..compiled.noise import num_prefetched, split_noise
from ..programs import visible as visibles
from ..programs.all_rows import drawn, with_all_rows
from ..programs.analysis import resized
from ..programs.checks import Analysis
from ..programs.modes import in_own_modes
from ..programs.pair import ModelAndGuide


class BiSMRunResult(NamedTuple):
    """What ``run`` returns.

    :ivar params: constrained values of all parameters, by site name, after the last step.
    :ivar state: the last state: ``init_state`` of a run that is to go on.
    :ivar losses: the (outer) loss of every step, shape (num_steps,).
    """

    params: dict[str, Any]
    state: Any
    losses: Array


class Trainer(ABC):
    """A method that learns a model: what is the same for all of them.

    States are named tuples with the fields ``rng_key`` and ``info`` among others.
    """

    def __init__(self) -> None:
        # Both are caches of what the programs are; nothing that training changes is kept here.
        self._pairs: dict[Any, ModelAndGuide] = {}
        self._loops: dict[Any, Callable[..., Any]] = {}

    @abstractmethod
    def get_params(self, state: Any) -> dict[str, Any]:
        """Constrained values of all parameters by site name.

        :param state: a state of :meth:`init`, :meth:`update` or :meth:`run`.
        """

    @abstractmethod
    def _init(self, rng_key: Array, leaves: Sequence[Any], spec: Any, init_params: Any) -> Any:
        """The initial state."""

    @abstractmethod
    def _update(self, state: Any, leaves: Sequence[Any], spec: Any) -> tuple[Any, Array, Array]:
        """The new state, the loss, and whether all that was computed is finite."""

    @abstractmethod
    def _analyse(self, leaves: Sequence[Any], spec: Any, rng_key: Array, init_params: Any) -> Analysis:
        """What the programs are, run once on these arguments."""

    def _next_key(self, rng_key: Array) -> Array | None:
        """The state's key after a step, where that is known beforehand: the noise of many is drawn at once then."""
        return None

    @property
    @abstractmethod
    def _cure(self) -> str:
        """What to try where a loss is not finite."""

    @in_own_modes
    def init(self, rng_key: Array, *args: Any, init_params: Mapping[str, Any] | None = None, **kwargs: Any) -> Any:
        """The initial state; the programs run once, and misuse is found here.

        :param rng_key: a JAX random key.
        :param args: arguments of the programs, the data among them.
        :param init_params: constrained values for ``param`` sites by name, instead of the programs' own.
        :param kwargs: keyword arguments of the programs.
        :raises ValueError: on misuse, naming the site and the cure, or on NaN or infinity in the data.
        """
        return self._init(_plain(rng_key), *self._checked(args, kwargs), init_params)

    @in_own_modes
    def update(self, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Array]:
        """One (outer) update, to be compiled with ``jax.jit`` by the caller, as SVI's.

        :param state: a state of :meth:`init`, :meth:`update` or :meth:`run`.
        :param args: arguments of the programs, the data among them.
        :param kwargs: keyword arguments of the programs.
        :returns: the new state and the loss, a mean over the batch.
        :raises ValueError: on misuse, and on NaN or infinity in the data where it is not compiled.
        """
        new, loss, _ = self._update(state, *self._checked(args, kwargs))
        self._warn(state, new)
        return new, loss

    @in_own_modes
    def stable_update(self, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Array]:
        """:meth:`update`, but if the data, a loss or a gradient is not finite, nothing changes but the random key.

        The loss returned is NaN then.

        :param state: a state of :meth:`init`, :meth:`update` or :meth:`run`.
        :param args: arguments of the programs, the data among them.
        :param kwargs: keyword arguments of the programs.
        :returns: the new state and the loss, a mean over the batch.
        """
        leaves, spec = visibles.flatten(args, kwargs)
        new, loss = self._stable_update(state, leaves, spec)
        self._warn(state, new)
        return new, loss

    def _warn(self, before: Any, after: Any) -> bool:
        """Say what the new state knows of a runaway, if it is news."""
        return False

    def _stable_update(self, state: Any, leaves: Sequence[Any], spec: Any) -> tuple[Any, Array]:
        new, loss, finite = self._update(state, leaves, spec)
        # the key moves on all the same, as in SVI: the next try sees other noise
        old = state._replace(rng_key=new.rng_key)
        kept = jax.tree.map(lambda a, b: a if a is b else jnp.where(finite, a, b), new, old)
        return kept, jnp.where(finite, loss, jnp.nan)

    @in_own_modes
    def run(
        self,
        rng_key: Array,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        stable_update: bool = False,
        init_state: Any = None,
        init_params: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> BiSMRunResult:
        """``num_steps`` updates in one compiled program.

        :param rng_key: a JAX random key; not used with ``init_state``, which has its own.
        :param num_steps: how many updates, at least 1.
        :param args: arguments of the programs, the data among them.
        :param progress_bar: show steps and losses; costs a few returns from the compiled loop a second.
        :param stable_update: use :meth:`stable_update`.
        :param init_state: continue from this state.
        :param init_params: as in :meth:`init`; not used with ``init_state``.
        :param kwargs: keyword arguments of the programs.
        :raises ValueError: on misuse, or on NaN or infinity in the data.
        :raises FloatingPointError: if a loss is not finite, unless ``stable_update``.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be a positive integer, got {num_steps}.")
        leaves, spec = self._checked(args, kwargs)
        state = self._init(_plain(rng_key), leaves, spec, init_params) if init_state is None else init_state
        loop, arrays = self._loop(leaves, spec, stable_update)
        # copied: the loop works in place, and init_state stays the caller's
        began_at, state = state, jax.tree.map(jnp.copy, state)
        losses = jnp.full(num_steps, jnp.inf, jnp.result_type(float))
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((state, arrays))):
            state, losses, _ = loop(state, losses, 0, num_steps, arrays)
            return BiSMRunResult(self.get_params(state), state, losses)
        done, chunk, warned = 0, 1 if progress_bar else num_steps, False
        with tqdm.tqdm(total=num_steps, disable=not progress_bar) as bar:
            while done < num_steps:
                stop, began = min(done + chunk, num_steps), time.perf_counter()
                state, losses, seen = loop(state, losses, done, stop, arrays)
                mean, bad = jax.device_get(seen)
                if not stable_update and bad < stop:
                    raise FloatingPointError(
                        f"The outer loss is not finite from step {bad} of {num_steps} on "
                        f"({jax.tree.map(float, state.info)}). {self._cure}. "
                        "stable_update=True skips such steps."
                    )
                warned = warned or self._warn(began_at, state)
                bar.update(stop - done)
                bar.set_postfix_str(f"avg loss [{done + 1}-{stop}]: {mean:.4f}")
                # the first chunk is a single step, with the compilation in it; then half a second each
                seconds = time.perf_counter() - began
                chunk = 10 if done == 0 else max(1, min(10 * chunk, round(0.5 * (stop - done) / seconds)))
                done = stop
        return BiSMRunResult(self.get_params(state), state, losses)

    def _loop(self, leaves: Sequence[Any], spec: Any, stable: bool) -> tuple[Callable[..., Any], list[Array]]:
        """The compiled loop for arguments of this structure, kept between calls of ``run``; and its arrays."""
        is_array = [isinstance(leaf, Array) for leaf in leaves]
        static = tuple(None if yes else leaf for yes, leaf in zip(is_array, leaves, strict=True))
        key = (*structure(leaves, spec), *(id(x) if x.__hash__ is None else x for x in static), stable)
        if key not in self._loops:

            def loop(
                state: Any, losses: Array, start: Any, stop: Any, arrays: list[Array]
            ) -> tuple[Any, Array, tuple[Array, Array]]:
                """The steps, and what is seen of them: looked at here, as every slice would be compiled anew."""
                state, losses = steps(state, losses, start, stop, arrays)
                place, finite = jnp.arange(len(losses)), jnp.isfinite(losses)
                recent = (start <= place) & (place < stop)
                mean = jnp.where(recent & finite, losses, 0.0).sum() / (recent & finite).sum()
                return state, losses, (mean, jnp.where(recent & ~finite, place, len(losses)).min())

            def steps(state: Any, losses: Array, start: Any, stop: Any, arrays: list[Array]) -> tuple[Any, Array]:
                rest = iter(arrays)
                filled = [next(rest) if yes else leaf for yes, leaf in zip(is_array, static, strict=True)]

                def update(rng_key: Array, state: Any) -> tuple[Any, Array]:
                    state = state._replace(rng_key=rng_key)
                    state, loss, *_ = (self._stable_update if stable else self._update)(state, filled, spec)
                    return state, loss

                if self._next_key(state.rng_key) is None:

                    def body(i: Any, carry: tuple[Any, Array]) -> tuple[Any, Array]:
                        state, losses = carry
                        state, loss = update(state.rng_key, state)
                        return state, losses.at[i].set(loss)

                    found: tuple[Any, Array] = jax.lax.fori_loop(start, stop, body, (state, losses))
                    return found

                draw, rest_of = split_noise(update, state.rng_key, state)
                num = num_prefetched(draw, state.rng_key)

                def some(carry: tuple[Any, Any, Array]) -> tuple[Any, Any, Array]:
                    """``num`` steps, or as many as are left."""
                    start, state, losses = carry
                    end = jnp.minimum(start + num, stop)
                    _, keys = jax.lax.scan(lambda key, _: (self._next_key(key), key), state.rng_key, length=num)
                    noise = jax.vmap(draw)(keys)

                    def one(i: Any, carry: tuple[Any, Array]) -> tuple[Any, Array]:
                        state, losses = carry
                        state, loss = rest_of([x[i - start] for x in noise], state)
                        return state, losses.at[i].set(loss)

                    return end, *jax.lax.fori_loop(start, end, one, (state, losses))

                return jax.lax.while_loop(lambda carry: carry[0] < stop, some, (start, state, losses))[1:]

            self._loops[key] = compiled(loop, donate_argnums=(0, 1))
        return self._loops[key], [leaf for yes, leaf in zip(is_array, leaves, strict=True) if yes]

    def _checked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
        leaves, spec = visibles.flatten(args, kwargs)
        known = self._pairs.get(structure(leaves, spec))
        if known is not None:  # else they are looked at with the programs
            visibles.require_finite(leaves, spec, known.sites)
        return leaves, spec

    def _described(self, leaves: Sequence[Any], spec: Any, rng_key: Array, init_params: Any) -> Analysis:
        """The analysis that a new state starts from; the pair is kept."""
        try:
            start = self._analyse(leaves, spec, rng_key, init_params)
        except Exception as error:
            reason = visibles.suspect(leaves, spec)
            if reason is None:
                raise
            raise ValueError(f"{reason} What failed: {error}") from error
        visibles.require_finite(leaves, spec, start.pair.sites)
        self._pairs[structure(leaves, spec)] = start.pair
        return start

    def pair(self, leaves: Sequence[Any], spec: Any) -> ModelAndGuide:
        """Model and guide as they run on arguments of this structure; analysed once for each structure.

        :param leaves: the programs' arguments, flattened as a pytree.
        :param spec: how they are nested.
        """
        key = structure(leaves, spec)
        if key not in self._pairs:
            # one row does not show whether rows read each other
            known = [pair for k, pair in self._pairs.items() if ranks(k) == ranks(key) and pair.sites[0].shape[0] > 1]
            like = known[0] if known else None
            pair = None if like is None else resized(like, leaves, spec)
            if pair is None:  # a key of its own: what is drawn here is only looked at
                return self._described(leaves, spec, jax.random.key(0), None).pair
            visibles.require_finite(leaves, spec, pair.sites)
            self._pairs[key] = pair
        return self._pairs[key]

    def evaluated_pair(self, leaves: Sequence[Any], spec: Any) -> ModelAndGuide:
        """The same for an evaluation, which takes all rows given: plates draw none.

        :param leaves: the programs' arguments, flattened as a pytree.
        :param spec: how they are nested.
        """
        key = structure(leaves, spec)
        like = next((pair for known, pair in self._pairs.items() if ranks(known) == ranks(key)), None)
        if like is None or not drawn(like):
            like = self.pair(leaves, spec)
        return with_all_rows(like, leaves)

    def _last_pair(self) -> ModelAndGuide:
        if not self._pairs:
            raise ValueError(
                "The constraints are not known yet. Call init(rng_key, *args) once; the state stays yours."
            )
        return next(reversed(self._pairs.values()))


def _plain(rng_key: Array) -> Array:
    """A key as numbers, the same key: what serialises arrays (flax, equinox) knows no typed ones.

    One of another generator than JAX's default stays typed, as the numbers alone do not tell which.
    """
    if not jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key):
        return rng_key
    is_default = str(jax.random.key_impl(rng_key)) == jax.config.jax_default_prng_impl  # type: ignore[attr-defined]
    return jax.random.key_data(rng_key) if is_default else rng_key


def structure(leaves: Sequence[Any], spec: Any) -> tuple[Any, ...]:
    """What arguments are told apart by: how they are nested, shapes, types, and static values other than floats."""
    return spec, tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Array) else _static(leaf) for leaf in leaves)


def _static(leaf: Any) -> Any:
    # a float is no structure: one that changes from step to step would be analysed anew each time
    return type(leaf) if isinstance(leaf, float) or leaf.__hash__ is None else leaf


def ranks(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """A structure without the sizes of its arrays."""
    spec, leaves = key
    return spec, tuple((len(x[0]), x[1]) if isinstance(x, tuple) else x for x in leaves)
