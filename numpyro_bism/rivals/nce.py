"""Noise-contrastive estimation: learn the model, and its normaliser, by telling data from noise."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.nn import softplus

from ..brief import named
from ..energies import VISIBLE
from ..programs.checks import Analysis
from ..programs.visible import Batch
from ..training.runaways import Words
from .rival import Rival
from .target import MarginalTarget

__all__ = ["LOG_NORMALIZER", "NCE", "Gaussian", "conditional_contrast", "contrast"]

LOG_NORMALIZER = "nce.log_normalizer"  # its name among the parameters


def contrast(data: Array, noise: Array) -> Array:
    r"""Loss per example, shape (n,), of log ratios :math:`G = \log p(u; θ) - \log p_n(u)`.

    .. math:: -\log \frac{1}{1 + ν e^{-G(x)}} - \sum_{j=1}^{ν} \log \frac{1}{1 + e^{G(y_j)} / ν}

    Gutmann and Hyvärinen 2012 (JMLR 13:307), for x of the data and ν draws y of the noise a datum.

    :param data: G at the data, shape (n,).
    :param noise: G at the draws of the noise, shape (ν, n).
    """
    log_num = math.log(len(noise))
    return softplus(log_num - data) + softplus(noise - log_num).sum(0)


def conditional_contrast(log_ratio: Array) -> Array:
    r"""Loss per example, shape (n,): :math:`\frac2ν \sum_j \log(1 + e^{-G(x, y_j)})`, ratios of shape (ν, n).

    .. math:: G(x, y) = \log \frac{\tilde p(x; θ)\, p_c(y|x)}{\tilde p(y; θ)\, p_c(x|y)}

    Ceylan and Gutmann 2018 (arXiv:1806.03664): the noise y is drawn given the datum x, and the normaliser cancels.

    :param log_ratio: G of each datum and each of its ν draws, shape (ν, n).
    """
    return 2 * softplus(-log_ratio).mean(0)


class Gaussian(NamedTuple):
    """A Gaussian fitted to data.

    :ivar mean: of each visible number, shape (D,).
    :ivar scale_tril: the lower Cholesky factor of the covariance, shape (D, D).
    """

    mean: Array
    scale_tril: Array

    @classmethod
    def fitted(cls, target: MarginalTarget, batch: Batch) -> "Gaussian":
        """The Gaussian with the mean and the covariance of all the data, and not just of the batch.

        :param target: not looked at.
        :param batch: the rows, and the arguments that hold all the data.
        :raises ValueError: where the covariance is singular.
        """
        columns = []
        for site in batch.sites:
            value = batch.leaves[site.leaves[0]]
            # the batch stands first in v, whichever axis its plate subsamples
            value = value if site.plate is None else jnp.moveaxis(value, site.axis, 0)
            columns.append(value.reshape(len(value), -1))
        v = jnp.concatenate(columns, -1)
        covariance = jnp.cov(v.T, bias=True).reshape(v.shape[1], v.shape[1])
        scale_tril = jnp.linalg.cholesky(covariance)
        if not isinstance(scale_tril, jax.core.Tracer) and not bool(jnp.isfinite(scale_tril).all()):
            raise ValueError(
                f"The covariance of the data, {len(v)} rows of {v.shape[1]} numbers, is singular: no Gaussian can be "
                "fitted for the noise. Give one: noise=dist.Normal(mean, scale).to_event(1)."
            )
        return cls(v.mean(0), scale_tril)

    def distribution(self) -> dist.Distribution:
        """It as a distribution of the host's over one row, of event shape (D,)."""
        return dist.MultivariateNormal(self.mean, scale_tril=self.scale_tril)


def check_noise(noise: Any, num_noise: int) -> None:
    """Checks what a method is told of its noise.

    :raises ValueError: for a number of draws below 1, and for what is no distribution of one row.
    """
    if num_noise < 1:
        raise ValueError(f"num_noise must be at least 1, got {num_noise}.")
    if noise is not None and not isinstance(noise, dist.Distribution):
        raise ValueError(
            f"noise={named(noise)} is not a distribution. Use one such as dist.Normal(mean, scale).to_event(1)."
        )
    if noise is not None and (noise.batch_shape != () or len(noise.event_shape) != 1):
        raise ValueError(
            f"noise should be a distribution of one row of visible values, of event shape (D,): found batch shape "
            f"{noise.batch_shape} and event shape {noise.event_shape}. Use .to_event(1)."
        )


def check_width(noise: Any, target: MarginalTarget) -> None:
    """Checks that a row of the noise has as many numbers as one of the visible values.

    :raises ValueError: where it has others.
    """
    num_columns = target.energy.batch.v.shape[1]
    if noise is not None and noise.event_shape != (num_columns,):
        raise ValueError(
            f"noise has event shape {noise.event_shape}, but the visible values, all sites side by side, are "
            f"{num_columns} numbers a row."
        )


class NCE(Rival):
    """Noise-contrastive estimation, see :func:`contrast`; log Z is learned beside θ.

    With ``conditional`` noise, see :func:`conditional_contrast`, there is no log Z to learn. Latents are summed out.

    :param model: a NumPyro program of an unnormalised density p̃(v, h; θ), as BiSM takes it.
    :param optim: an optimiser for θ and log Z, of ``numpyro.optim``, ``jax.example_libraries.optimizers`` or optax.
    :param noise: a distribution over one row of visible values, all sites side by side, of event shape (D,); None fits
        a Gaussian to the data.
    :param num_noise: ν, noise draws a datum.
    :param conditional: the noise given the data instead: a function of rows v, shape (n, D), to a distribution of batch
        shape (n,) and event shape (D,), such as ``lambda v: dist.Normal(v, 0.3).to_event(1)``.
    :param log_normalizer: log Z to start from; None estimates it from the noise.
    :param visible: names of the visible sites; None takes all observed sample sites.
    :param static_kwargs: keyword arguments of the model that stay the same, as in SVI.
    :raises ValueError: at construction for bad settings, at :meth:`init` for misuse and for latents that can't be
        summed out.
    """

    scale = 1.0  # of a classifier that knows nothing, log 2 a decision
    words = Words.of_rival("or with noise nearer to the data, or clip the gradient")

    def __init__(
        self,
        model: Callable[..., Any],
        optim: Any,
        noise: Any = None,
        num_noise: int = 1,
        *,
        conditional: Callable[[Array], Any] | None = None,
        log_normalizer: float | None = None,
        visible: Sequence[str] | None = None,
        **static_kwargs: Any,
    ):
        super().__init__(model, optim, visible, static_kwargs)
        check_noise(noise, num_noise)
        if conditional is not None and not (noise is None and log_normalizer is None):
            raise ValueError("conditional noise needs neither noise nor log_normalizer: leave them out.")
        self.noise = noise
        self.num_noise = num_noise
        self.conditional = conditional
        self.log_normalizer = log_normalizer

    def _check(self, target: MarginalTarget, params: Mapping[str, Any], batch: Batch, rng_key: Array) -> MarginalTarget:
        check_width(self.noise, target)
        return target

    def _begin(
        self, rng_key: Array, target: MarginalTarget, start: Analysis, batch: Batch
    ) -> tuple[dict[str, Any], Any]:
        if self.conditional is not None:
            return {}, None
        fitted = Gaussian.fitted(target, batch) if self.noise is None else None
        noise = self.noise if fitted is None else fitted.distribution()
        if self.log_normalizer is not None:
            log_normalizer = jnp.asarray(self.log_normalizer, jnp.result_type(float))
        else:  # log E_y[p̃(y) / p_n(y)]
            y = noise.sample(rng_key, (len(batch.v),)).astype(batch.v.dtype)
            params = target.params(start.theta, start.mutable)
            ratios = target.log_prob(params, batch)({VISIBLE: y}) - noise.log_prob(y)
            log_normalizer = jax.nn.logsumexp(ratios) - math.log(len(y))
        return {LOG_NORMALIZER: log_normalizer}, fitted

    def _loss(
        self, rng_key: Array, theta: Mapping[str, Any], carried: Any, target: MarginalTarget, mutable: Any, batch: Batch
    ) -> tuple[Array, Any]:
        log_prob = target.log_prob(target.params(theta, mutable), batch)
        v, shape = batch.v, (self.num_noise, len(batch.v))
        if self.conditional is not None:
            near = self.conditional(v)
            y = near.sample(rng_key, (self.num_noise,)).astype(v.dtype)
            there, back = near.log_prob(y), jax.vmap(lambda y, near=self.conditional: near(y).log_prob(v))(y)
            at_noise = log_prob({VISIBLE: y.reshape(-1, v.shape[1])}).reshape(shape)
            return conditional_contrast(log_prob({VISIBLE: v}) + there - at_noise - back).mean(), None
        noise = self.noise if carried is None else carried.distribution()
        y = noise.sample(rng_key, shape).astype(v.dtype)

        def ratio(u: Array) -> Array:
            found: Array = log_prob({VISIBLE: u}) - theta[LOG_NORMALIZER] - noise.log_prob(u)
            return found

        return contrast(ratio(v), ratio(y.reshape(-1, v.shape[1])).reshape(shape)).mean(), carried
