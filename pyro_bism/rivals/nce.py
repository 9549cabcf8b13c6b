"""Noise-contrastive estimation: learn the model, and its normaliser, by telling data from noise."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.nn.functional import softplus

from ..brief import named
from ..energies import VISIBLE
from ..programs.visible import Batch
from ..training.runaways import Words
from .rival import Rival
from .target import MarginalTarget

__all__ = ["LOG_NORMALIZER", "NCE", "Gaussian", "conditional_contrast", "contrast"]

LOG_NORMALIZER = "nce.log_normalizer"  # its name among the parameters


def contrast(data: Tensor, noise: Tensor) -> Tensor:
    r"""Loss per example, shape (n,), of log ratios :math:`G = \log p(u; θ) - \log p_n(u)`.

    .. math:: -\log \frac{1}{1 + ν e^{-G(x)}} - \sum_{j=1}^{ν} \log \frac{1}{1 + e^{G(y_j)} / ν}

    Gutmann and Hyvärinen 2012 (JMLR 13:307), for x of the data and ν draws y of the noise a datum.

    :param data: G at the data, shape (n,).
    :param noise: G at the draws of the noise, shape (ν, n).
    """
    log_num = math.log(len(noise))
    return softplus(log_num - data) + softplus(noise - log_num).sum(0)


def conditional_contrast(log_ratio: Tensor) -> Tensor:
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

    mean: Tensor
    scale_tril: Tensor

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
            value = value if site.plate is None else value.movedim(site.axis, 0)
            columns.append(value.detach().reshape(len(value), -1))
        v = torch.cat(columns, -1)
        covariance = torch.cov(v.T, correction=0).reshape(v.shape[1], v.shape[1])
        scale_tril, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            raise ValueError(
                f"The covariance of the data, {len(v)} rows of {v.shape[1]} numbers, is singular: no Gaussian can be "
                "fitted for the noise. Give one: noise=dist.Normal(mean, scale).to_event(1)."
            )
        return cls(v.mean(0), scale_tril)

    def distribution(self) -> Any:
        """It as a distribution of the host's over one row, of event shape (D,)."""
        return dist.MultivariateNormal(self.mean, scale_tril=self.scale_tril)


def check_noise(noise: Any, num_noise: int) -> None:
    """Checks what a method is told of its noise.

    :raises ValueError: for a number of draws below 1, and for what is no distribution of one row.
    """
    if num_noise < 1:
        raise ValueError(f"num_noise must be at least 1, got {num_noise}.")
    if noise is not None and not isinstance(noise, torch.distributions.Distribution):
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

    :param model: a Pyro program of an unnormalised density p̃(v, h; θ), as BiSM takes it.
    :param optim: a ``pyro.optim`` optimiser, for θ and log Z.
    :param noise: a distribution over one row of visible values, all sites side by side, of event shape (D,); None fits
        a Gaussian to the data.
    :param num_noise: ν, noise draws a datum.
    :param conditional: the noise given the data instead: a function of rows v, shape (n, D), to a distribution of batch
        shape (n,) and event shape (D,), such as ``lambda v: dist.Normal(v, 0.3).to_event(1)``.
    :param log_normalizer: log Z to start from; None estimates it from the noise.
    :param visible: names of the visible sites; None takes all observed sample sites.
    :param jit: capture the step and compile it, as in :class:`~pyro_bism.BiSM`.
    :raises ValueError: at construction for bad settings, at the first step for misuse and for latents that can't be
        summed out.
    """

    scale = 1.0  # of a classifier that knows nothing, log 2 a decision
    words = Words.of_rival("or with noise nearer to the data, or clip the gradient")

    def __init__(
        self,
        model: Callable[..., Any],
        optim: PyroOptim,
        noise: Any = None,
        num_noise: int = 1,
        *,
        conditional: Callable[[Tensor], Any] | None = None,
        log_normalizer: float | None = None,
        visible: Sequence[str] | None = None,
        jit: bool = False,
    ):
        super().__init__(model, optim, visible, jit=jit)
        check_noise(noise, num_noise)
        if conditional is not None and not (noise is None and log_normalizer is None):
            raise ValueError("conditional noise needs neither noise nor log_normalizer: leave them out.")
        self.noise = noise
        self.num_noise = num_noise
        self.conditional = conditional
        self.log_normalizer = log_normalizer

    def _check(self, target: MarginalTarget, batch: Batch) -> MarginalTarget:
        check_width(self.noise, target)
        return target

    @property
    def _own_names(self) -> tuple[str, ...]:
        return () if self.conditional is not None else (LOG_NORMALIZER,)

    def _begin(self, target: MarginalTarget, batch: Batch) -> Any:
        if self.conditional is not None:
            return None
        fitted = Gaussian.fitted(target, batch) if self.noise is None else None
        noise = self.noise if fitted is None else fitted.distribution()
        if self.log_normalizer is not None:
            start = torch.tensor(float(self.log_normalizer))
        else:  # log E_y[p̃(y) / p_n(y)]
            with torch.no_grad():
                y = noise.sample((len(batch.v),)).to(batch.v.dtype)
                ratios = target.log_prob(batch)({VISIBLE: y}) - noise.log_prob(y)
            start = ratios.logsumexp(0) - math.log(len(y))
        pyro.param(LOG_NORMALIZER, start)
        return fitted

    def _loss(self, target: MarginalTarget, batch: Batch, carried: Any) -> tuple[Tensor, Any]:
        log_prob = target.log_prob(batch)
        v, shape = batch.v, (self.num_noise, len(batch.v))
        if self.conditional is not None:
            near = self.conditional(v)
            y = near.sample((self.num_noise,)).to(v.dtype)
            there, back = near.log_prob(y), torch.stack([self.conditional(row).log_prob(v) for row in y])
            at_noise = log_prob({VISIBLE: y.reshape(-1, v.shape[1])}).reshape(shape)
            return conditional_contrast(log_prob({VISIBLE: v}) + there - at_noise - back).mean(), None
        noise = self.noise if carried is None else carried.distribution()
        y = noise.sample(shape).to(v.dtype)
        log_normalizer = pyro.param(LOG_NORMALIZER)

        def ratio(u: Tensor) -> Tensor:
            found: Tensor = log_prob({VISIBLE: u}) - log_normalizer - noise.log_prob(u)
            return found

        return contrast(ratio(v), ratio(y.reshape(-1, v.shape[1])).reshape(shape)).mean(), carried
