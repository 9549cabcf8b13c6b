"""log Z(θ) and free energies, by sums, Gaussian integrals and quadrature."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..energies import VISIBLE, Density, Energy, Integral, Point
from ..kernels import called


class Estimate(NamedTuple):
    """
    :ivar value: one number, or one for every row.
    :ivar standard_error: of the same shape; 0 where the value is exact.
    :ivar method: how it was found.
    """

    value: Tensor
    standard_error: Tensor
    method: str


def free_energy(trained: Any, *args: Any, **kwargs: Any) -> Tensor:
    r"""The free energy :math:`F(v) = -\log \sum_h \int e^{-E(v, h)}\, dh` of every row, shape (n,).

    Exact: see :mod:`pyro_bism.energies.integrals` for what can be summed.

    :param trained: a BiSM or a rival.
    :param args: arguments of the model, the data among them.
    :raises ValueError: where no exact sum is within reach; it says what it would take.
    """
    energy, x = energy_of(trained, args, kwargs)
    density = energy.density(x)
    integral = Integral.of(density, x, energy.hidden)
    return finite(-evaluated(integral, density, x), "free energy", "the energy grows without bound in the latents")


def exact_log_normalizer(trained: Any, *args: Any, **kwargs: Any) -> float:
    r"""log Z(θ) = log ∫ Σ_h exp(-E(v, h)) dv by sums, Gaussian integrals and quadrature, to rounding.

    Gaussian-Bernoulli machines of up to 20 hidden units, linear-Gaussian models of any size, anything at all with up to
    three visible dimensions.

    :param args: as for :func:`free_energy`; the data say where to look for the density.
    :raises ValueError: where it is out of reach, or a model with covariates is given more than one row.
    """
    energy, x = energy_of(trained, args, kwargs)
    x = one_row(energy, x, "exact_log_normalizer")
    density = energy.density(x)
    integral = Integral.of(density, x, [VISIBLE, *energy.latents])
    value = evaluated(integral, density, x)[:1]
    return float(finite(value, "normaliser", "the energy does not grow in every direction: Z is infinite")[0])


def energy_of(trained: Any, args: Any, kwargs: Any) -> Any:
    with torch.enable_grad():  # the first look at the programs tries their gradients
        return trained.energy(*args, **kwargs)


def evaluated(integral: Integral, density: Density, x: Point) -> Tensor:
    with torch.no_grad():
        return integral(density, x)


def one_row(energy: Energy, x: Point, role: str) -> Point:
    if energy.num_rows > 1 and not energy.is_homogeneous:
        raise ValueError(
            f"{role}: the rows have densities of their own, {called(energy, VISIBLE)} given covariates, and a "
            "normaliser each. Pass one row."
        )
    return {name: value[:1] for name, value in x.items()} if energy.resizes else x


def finite(value: Tensor, what: str, why: str) -> Tensor:
    if not value.isfinite().all():
        raise FloatingPointError(f"The {what} is not finite at row {int(value.isfinite().int().argmin())}: {why}.")
    return value
