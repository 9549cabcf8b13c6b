"""log Z(θ) and free energies, by sums, Gaussian integrals and quadrature."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..energies import VISIBLE, Integral, OutOfReach
from ..programs.modes import in_own_modes

PRECISE = 1e-3  # nats: the error that a number without one may have


class Estimate(NamedTuple):
    """A number, its error, and how it was found.

    :ivar value: one number, or one for every row.
    :ivar standard_error: of the same shape: of draws, or what a quadrature leaves; 0 where the value is exact to
        rounding. Where rounding costs more than 1e-4 nats (large sums in single precision) it is that.
    :ivar method: how it was found: "exact", "quadrature", "guide", ... as the function that returned it says.
    """

    value: Any
    standard_error: Any
    method: str


@in_own_modes
def free_energy(trained: Any, state: Any, *args: Any, rng_key: Array | None = None, **kwargs: Any) -> Array:
    r"""The free energy :math:`F(v) = -\log \sum_h \int e^{-E(v, h)}\, dh` of every row, shape (n,).

    Exact, or by quadrature over at most three real variables: see :mod:`numpyro_bism.energies.integrals` for what can
    be summed. :func:`log_likelihood` says which it was, and its error.

    :param trained: a BiSM or a rival.
    :param state: its state.
    :param args: arguments of model and guide, the data among them, as for ``update``.
    :param rng_key: a JAX random key, for the guide's draw and for a subsampling plate's rows; None takes a fixed one.
    :param kwargs: keyword arguments of model and guide.
    :raises ValueError: where no sum is within reach; it says what it would take.
    :raises FloatingPointError: if it is not finite.
    """
    energy, params, x = energy_of(trained, state, args, kwargs, rng_key)
    density = energy.density(params, x)
    integral = Integral.over_variables(density, x, energy.hidden)
    value, _ = integral.estimate(density, x)
    finite(value, "free energy", "the energy grows without bound in the latents")
    return jnp.asarray(-value, x[VISIBLE].dtype)


@in_own_modes
def log_normalizer(trained: Any, state: Any, *args: Any, rng_key: Array | None = None, **kwargs: Any) -> Estimate:
    r"""log Z(θ) = log ∫ Σ_h exp(-E(v, h)) dv by sums, Gaussian integrals or quadrature, and how it was found.

    Gaussian-Bernoulli machines of up to 20 hidden units and linear-Gaussian models of any size are "exact"; up to three
    real variables without a closed form are taken by "quadrature". :func:`ais` takes everything else.

    :param trained: a BiSM or a rival.
    :param state: its state.
    :param args: as for :func:`free_energy`. The data, and the guide's draws of h at them, say where to look for mass.
    :param rng_key: as for :func:`free_energy`.
    :param kwargs: keyword arguments of model and guide.
    :returns: one number; of a conditional model, whose rows have densities of their own, one a row.
    :raises ValueError: where it is out of reach, where the integral is infinite as quadrature finds, or where its error
        stays above 0.01.
    :raises FloatingPointError: if Z is infinite in a closed form.
    """
    energy, params, x = energy_of(trained, state, args, kwargs, rng_key)
    density = energy.density(params, x)
    rows = {name: value[:1] for name, value in x.items()} if energy.is_homogeneous else x
    integral = Integral.over_variables(density, rows, [VISIBLE, *energy.latents])
    value, error = integral.estimate(density, rows, x)
    finite(value, "normaliser", "the energy does not grow in every direction: Z is infinite")
    if len(value) == 1:
        value, error = value[0], error[0]
    return Estimate(value, error, integral.method)


@in_own_modes
def exact_log_normalizer(trained: Any, state: Any, *args: Any, rng_key: Array | None = None, **kwargs: Any) -> Any:
    r"""log Z(θ) as a number: the value of :func:`log_normalizer` where its error is at most 0.001.

    It is exact to rounding where sums and Gaussian integrals do. Where only quadrature does, its error is as said;
    :func:`log_normalizer` tells which of the two it was.

    :param trained: a BiSM or a rival.
    :param state: its state.
    :param args: as for :func:`log_normalizer`.
    :param rng_key: as for :func:`free_energy`.
    :param kwargs: keyword arguments of model and guide.
    :returns: a float; of a conditional model one number a row, (n,).
    :raises ValueError: where it is out of reach, or less precise.
    """
    found = log_normalizer(trained, state, *args, rng_key=rng_key, **kwargs)
    error = float(np.max(found.standard_error))
    if found.method == "quadrature" and error > PRECISE:
        raise OutOfReach(
            f"There is no exact log Z: quadrature gives it with an error of {error:.2g}, above {PRECISE:g}. Take "
            "log_normalizer, which says so, or ais."
        )
    return float(found.value) if np.ndim(found.value) == 0 else jnp.asarray(found.value)


def energy_of(trained: Any, state: Any, args: Any, kwargs: Any, rng_key: Array | None) -> Any:
    return trained.energy(state, *args, rng_key=jax.random.key(0) if rng_key is None else rng_key, **kwargs)


def finite(value: np.ndarray, what: str, why: str) -> None:
    """Check whether all numbers are finite.

    :param what: the name of these numbers, for the message.
    :param why: what may be the cause, for the message.
    :raises FloatingPointError: if one is not.
    """
    if not np.isfinite(value).all():
        raise FloatingPointError(f"The {what} is not finite at row {int(np.isfinite(value).argmin())}: {why}.")
