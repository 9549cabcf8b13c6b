"""log p(v; θ) of every row."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import Array

from ..bism import BiSM
from ..energies import VISIBLE, Integral, OutOfReach, named
from ..programs.modes import in_own_modes
from ..rivals import PersistentVI
from ..rivals.persistent_vi import conditioned
from . import normalizer
from .annealing import AIS, ais
from .guide_draws import guide_draws
from .noise import with_noise
from .normalizer import Estimate, energy_of, finite


@in_own_modes
def log_likelihood(
    trained: Any,
    state: Any,
    *args: Any,
    rng_key: Array,
    log_normalizer: Any = None,
    num_draws: int = 1000,
    method: str | None = None,
    theta: Any = None,
    noise: float | str | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Estimate:
    r"""log p(v) of every row, and how it was found.

    log p̃(v) is exact or by quadrature where :func:`free_energy` is, else the importance-weighted bound
    :math:`\log \tfrac1S \sum_s \tilde p(v, h_s)/q(h_s|v)` (Burda, Grosse, Salakhutdinov 2016), too low on average.
    log Z is what :func:`log_normalizer` finds, else from :func:`ais`; of a conditional model every row has its own.

    Of a :class:`PersistentVI`, whose θ has draws, it is log p(v | θ) by draw, for :func:`loo` and :func:`to_arviz`.

    :param trained: a BiSM or a rival.
    :param state: its state.
    :param args: arguments of model and guide, the data among them, as for ``update``.
    :param rng_key: a JAX random key: all that is drawn follows from it.
    :param log_normalizer: log Z, if it is known; or what ``ais`` or ``log_normalizer`` returned.
    :param num_draws: S; of a PersistentVI, how many draws of θ, if they are not given.
    :param theta: of a PersistentVI: draws of θ, by site, as its ``posterior`` returns them.
    :param noise: added to the rows before: None, the likelihood of the rows as they are, which papers report though a
        denoising loss learns the density of noisy ones; "loss" for the outer loss's σ; or a standard deviation.
    :param method: "exact", "quadrature" or "importance", for log p̃(v); None takes the first that it can.
    :param progress_bar: whether to show how far AIS has come, or how many draws of θ are done.
    :param kwargs: keyword arguments of model and guide.
    :returns: value and standard error of shape (n,), the error of log Z in it; ``method`` says "exact", "quadrature" or
        "importance", and "exact", "quadrature", "AIS" or "given" for the normaliser, in one word where they are the
        same. Of a PersistentVI the shape is (1, draws, n).
    :raises FloatingPointError: if a number is not finite.
    """
    key_energy, key_draws, key_ais = jax.random.split(rng_key, 3)
    if method not in (None, "exact", "quadrature", "importance"):
        raise ValueError(f"method should be 'exact', 'quadrature', 'importance' or None, got {method!r}.")
    args, kwargs = with_noise(trained, args, kwargs, noise, jax.random.fold_in(rng_key, 1))
    if isinstance(trained, PersistentVI):
        _check_theta_options(log_normalizer, method)
        if theta is None:
            theta = trained.posterior(state, *args, rng_key=key_draws, num_draws=num_draws, **kwargs)
        return _over_theta(trained, state, theta, args, kwargs, key_ais, progress_bar)
    if theta is not None:
        raise ValueError("theta goes with a PersistentVI: no other method has draws of θ.")
    energy, params, x = energy_of(trained, state, args, kwargs, key_energy)
    density = energy.density(params, x)
    found: Any = None
    if method != "importance":
        try:
            integral = Integral.over_variables(density, x, energy.hidden)
            if method == "exact" and integral.quadrature:
                raise OutOfReach(
                    f"There is no exact sum over {named(energy.hidden)}, but quadrature over "
                    f"{named(integral.quadrature)} is within reach: method='quadrature'."
                )
            found = *integral.estimate(density, x), integral.method
            finite(found[0], "log p̃(v)", "the energy grows without bound in the latents")
        except OutOfReach:
            if method is not None or not isinstance(trained, BiSM):
                raise
    if found is None:
        run = guide_draws(trained, state, *args, rng_key=key_draws, num_draws=num_draws, **kwargs)
        w = np.asarray(run.log_p - run.log_q, float)
        relative = np.exp(w - w.max(0))
        mean = relative.mean(0)
        error = relative.std(0, ddof=1) / (mean * math.sqrt(num_draws)) if num_draws > 1 else np.full(len(mean), np.nan)
        found = w.max(0) + np.log(mean), error, "importance"
    value, error, how = found
    if log_normalizer is None:
        try:
            log_normalizer = normalizer.log_normalizer(trained, state, *args, rng_key=key_energy, **kwargs)
        except OutOfReach:
            bar = progress_bar
            log_normalizer = ais(trained, state, *args, rng_key=key_ais, reverse=False, progress_bar=bar, **kwargs)
    if isinstance(log_normalizer, AIS):
        log_z, log_z_error, known = log_normalizer.log_normalizer, log_normalizer.standard_error, "AIS"
    elif isinstance(log_normalizer, Estimate):
        log_z, log_z_error, known = log_normalizer
    else:
        log_z, log_z_error, known = np.asarray(log_normalizer, float), 0.0, "given"
    method = how if how == known else f"log p̃: {how}, log Z: {known}"
    return Estimate(value - log_z, np.hypot(error, log_z_error), method)


def _check_theta_options(log_normalizer: Any, method: str | None) -> None:
    if log_normalizer is not None:
        raise ValueError("log_normalizer: a PersistentVI has a log Z for every draw of θ; leave it out.")
    if method == "importance":
        raise ValueError("method='importance' takes a guide of the latents, which a PersistentVI has not.")


def _over_theta(
    trained: PersistentVI, state: Any, theta: Any, args: Any, kwargs: Any, rng_key: Array, progress_bar: bool
) -> Estimate:
    """log p(v | θ) of every draw of θ and row, (1, draws, n)."""
    draws = [jax.tree.map(lambda a, i=i: jnp.asarray(a)[i], theta) for i in range(len(next(iter(theta.values()))))]
    energy, params, x = energy_of(trained.at(draws[0]), state, args, kwargs, rng_key)
    one = {name: value[:1] for name, value in x.items()} if energy.is_homogeneous else x
    try:
        hidden = Integral.over_variables(energy.density(params, x), x, energy.hidden)
        whole = Integral.over_variables(energy.density(params, one), one, [VISIBLE, *energy.latents])
        exact = not (hidden.quadrature or whole.quadrature)
    except ValueError:
        exact = False
    if exact:  # where the energy's structure is known it is the same at all θ: one program for all of them
        model = trained.evaluated_pair(*trained._checked(args, kwargs)).model

        @jax.jit
        def value_at(values: dict[str, Array]) -> Array:
            at = replace(energy, model=conditioned(model, values))
            return hidden(at.density(params, x), x) - whole(at.density(params, one), one)

        value = jnp.stack([value_at(values) for values in draws])
        if not bool(jnp.isfinite(value).all()):
            draw, row = np.argwhere(~np.isfinite(np.asarray(value)))[0]
            raise FloatingPointError(f"log p(v | θ) is not finite at draw {draw} of θ and row {row}.")
        return Estimate(value[None], jnp.zeros_like(value)[None], "exact")
    each = []
    for i, values in enumerate(tqdm.tqdm(draws, disable=not progress_bar, desc="log-likelihood")):
        key = jax.random.fold_in(rng_key, i)
        each.append(log_likelihood(trained.at(values), state, *args, rng_key=key, progress_bar=False, **kwargs))
    values, errors = (np.stack([np.asarray(a) for a in part])[None] for part in list(zip(*each, strict=True))[:2])
    return Estimate(jnp.asarray(values), jnp.asarray(errors), each[0].method)
