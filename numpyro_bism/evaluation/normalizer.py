"""log Z(θ) and free energies, by sums, Gaussian integrals and quadrature."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ..energies import VISIBLE, Density, Energy, Integral, Point
from ..kernels import called


class Estimate(NamedTuple):
    """
    :ivar value: one number, or one for every row.
    :ivar standard_error: of the same shape; 0 where the value is exact.
    :ivar method: how it was found.
    """

    value: Array
    standard_error: Array
    method: str


def free_energy(trained: Any, state: Any, *args: Any, rng_key: Array | None = None, **kwargs: Any) -> Array:
    r"""The free energy :math:`F(v) = -\log \sum_h \int e^{-E(v, h)}\, dh` of every row, shape (n,).

    Exact: see :mod:`numpyro_bism.energies.integrals` for what can be summed.

    :param trained: a BiSM or a rival.
    :param state: its state.
    :param args: arguments of the model, the data among them.
    :param rng_key: for a subsampling plate's rows; a fixed one if it is None.
    :raises ValueError: where no exact sum is within reach; it says what it would take.
    """
    energy, params, x = energy_of(trained, state, args, kwargs, rng_key)
    density = energy.density(params, x)
    integral = Integral.of(density, x, energy.hidden)
    return finite(-evaluated(integral, density, x), "free energy", "the energy grows without bound in the latents")


def exact_log_normalizer(trained: Any, state: Any, *args: Any, rng_key: Array | None = None, **kwargs: Any) -> float:
    r"""log Z(θ) = log ∫ Σ_h exp(-E(v, h)) dv by sums, Gaussian integrals and quadrature, to rounding.

    Gaussian-Bernoulli machines of up to 20 hidden units, linear-Gaussian models of any size, anything at all with up to
    three visible dimensions.

    :param args: as for :func:`free_energy`; the data say where to look for the density.
    :raises ValueError: where it is out of reach, or a model with covariates is given more than one row.
    """
    energy, params, x = energy_of(trained, state, args, kwargs, rng_key)
    x = one_row(energy, x, "exact_log_normalizer")
    density = energy.density(params, x)
    integral = Integral.of(density, x, [VISIBLE, *energy.latents])
    value = evaluated(integral, density, x)[:1]
    return float(finite(value, "normaliser", "the energy does not grow in every direction: Z is infinite")[0])


def energy_of(trained: Any, state: Any, args: Any, kwargs: Any, rng_key: Array | None) -> Any:
    return trained.energy(state, *args, rng_key=jax.random.key(0) if rng_key is None else rng_key, **kwargs)


def evaluated(integral: Integral, density: Density, x: Point) -> Array:
    return integral(density, x) if integral.quadrature else jax.jit(lambda x: integral(density, x))(x)


def one_row(energy: Energy, x: Point, role: str) -> Point:
    if energy.num_rows > 1 and not energy.is_homogeneous:
        raise ValueError(
            f"{role}: the rows have densities of their own, {called(energy, VISIBLE)} given covariates, and a "
            "normaliser each. Pass one row."
        )
    return {name: value[:1] for name, value in x.items()} if energy.resizes else x


def finite(value: Array, what: str, why: str) -> Array:
    if not bool(jnp.isfinite(value).all()):
        raise FloatingPointError(f"The {what} is not finite at row {int(jnp.argmin(jnp.isfinite(value)))}: {why}.")
    return value
