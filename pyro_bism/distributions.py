"""Relaxed discrete guides: Concrete draws, scored by the discrete cross-entropy.

A guide over bits has no gradient along its draws. These two draw from the Concrete (Gumbel-softmax)
distribution (Maddison, Mnih, Teh 2017, arXiv:1611.00712, sections 2.2 and 3.3; Jang, Gu, Poole 2017,
arXiv:1611.01144), but ``log_prob`` is the log mass of the *discrete* distribution, continued
to soft values. The Concrete density itself is no substitute: at a temperature of 0.1 its gradient reaches
1e30 where a draw rounds to 0 or 1.

The price is a relaxation bias: the soft draws are not distributed as ``exp(log_prob)``. Summing the
latents out (``infer={"enumerate": "parallel"}`` and ``TraceEnum_ELBO``) is exact where it can be
afforded.
"""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions.utils import broadcast_all, clamp_probs
from torch.nn.functional import binary_cross_entropy_with_logits

__all__ = ["ConcreteBernoulli", "ConcreteOneHot"]

Shape = torch.Size | list[int] | tuple[int, ...]  # as torch takes it


class ConcreteBernoulli(TorchDistribution):
    r"""Soft bits in [0, 1]: :math:`h = \mathrm{sigmoid}((\ell + \log u - \log(1-u)) / T)`.

    .. math:: \log q(h) = h \log \mathrm{sigmoid}(\ell) + (1 - h) \log \mathrm{sigmoid}(-\ell)

    :param temperature: :math:`T > 0`; at 0 the draws are bits.
    :param logits: :math:`\ell`, the log odds of a one.
    :param validate_args: whether arguments and scored values are checked; None takes the host's setting.
    """

    arg_constraints = {"temperature": constraints.positive, "logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, temperature: Tensor | float, logits: Tensor, validate_args: bool | None = None):
        self.logits, self.temperature = broadcast_all(logits, temperature)
        super().__init__(self.logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "ConcreteBernoulli":
        new: ConcreteBernoulli = self._get_checked_instance(type(self), _instance)
        new.logits = self.logits.expand(batch_shape)
        new.temperature = self.temperature.expand(batch_shape)
        super(ConcreteBernoulli, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        # clamped: u = 0 would give an infinite logit
        u = clamp_probs(torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device))
        return torch.sigmoid((self.logits + torch.logit(u)) / self.temperature)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        logits, value = broadcast_all(self.logits, value)
        return -binary_cross_entropy_with_logits(logits, value, reduction="none")

    @property
    def mean(self) -> Tensor:
        """The mean of the *discrete* distribution."""
        return torch.sigmoid(self.logits)

    def discrete(self) -> dist.Bernoulli:
        """The distribution over bits that ``log_prob`` belongs to."""
        return dist.Bernoulli(logits=self.logits)


class ConcreteOneHot(TorchDistribution):
    r"""Soft one-hot vectors on the simplex: :math:`h = \mathrm{softmax}((\ell + g) / T)`, g Gumbel.

    .. math:: \log q(h) = \sum_k h_k \log \mathrm{softmax}(\ell)_k

    :param temperature: :math:`T > 0`, of the batch shape.
    :param logits: :math:`\ell`, of shape ``batch_shape + (num_classes,)``; need not be normalised.
    :param validate_args: whether arguments and scored values are checked; None takes the host's setting.
    """

    arg_constraints = {"temperature": constraints.positive, "logits": constraints.real_vector}
    support = constraints.simplex
    has_rsample = True

    def __init__(self, temperature: Tensor | float, logits: Tensor, validate_args: bool | None = None):
        if logits.dim() < 1:
            raise ValueError("ConcreteOneHot: logits need a last dimension that runs over the classes.")
        batch_shape = logits.shape[:-1]
        temperature = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
        batch_shape = torch.broadcast_shapes(batch_shape, temperature.shape)
        self.temperature = temperature.expand(batch_shape)
        self.logits = logits.log_softmax(-1).expand(batch_shape + logits.shape[-1:])
        super().__init__(batch_shape, logits.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> "ConcreteOneHot":
        new: ConcreteOneHot = self._get_checked_instance(type(self), _instance)
        batch_shape = torch.Size(batch_shape)
        new.logits = self.logits.expand(batch_shape + self.event_shape)
        new.temperature = self.temperature.expand(batch_shape)
        super(ConcreteOneHot, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        # clamped: u = 0 or 1 would give an infinite Gumbel draw
        u = clamp_probs(torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device))
        gumbel = -torch.log(-torch.log(u))
        return torch.softmax((self.logits + gumbel) / self.temperature.unsqueeze(-1), -1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return (value * self.logits).sum(-1)

    @property
    def mean(self) -> Tensor:
        """The mean of the *discrete* distribution."""
        return self.logits.exp()

    def discrete(self) -> dist.OneHotCategorical:
        """The distribution over one-hot vectors that ``log_prob`` belongs to."""
        return dist.OneHotCategorical(logits=self.logits)


class AveragedBernoulli(ConcreteBernoulli):
    """Bits that are summed out: the draw is their mean, and ``log_prob`` there is E[log q]."""

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        return self.mean.expand(self._extended_shape(sample_shape))


class AveragedOneHot(ConcreteOneHot):
    """One-hot vectors that are summed out: the draw is their mean, and ``log_prob`` there is E[log q]."""

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        return self.mean.expand(self._extended_shape(sample_shape))


def base_of(fn: TorchDistribution) -> TorchDistribution:
    """The distribution under ``Independent``, ``mask`` and ``expand``."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def is_averaged(fn: TorchDistribution) -> bool:
    """Whether its draw is a mean."""
    return isinstance(base_of(fn), AveragedBernoulli | AveragedOneHot)


def plain_support(support: Any) -> Any:
    """A mixture's support is that of its components, which ``biject_to`` knows."""
    if isinstance(support, constraints.independent):
        return constraints.independent(plain_support(support.base_constraint), support.reinterpreted_batch_ndims)
    if hasattr(support, "base_constraint"):
        return plain_support(support.base_constraint)
    return support


def mask_of(fn: dist.MaskedDistribution) -> Any:
    """The mask of a masked distribution, which has no public name: True, False, or one for every entry."""
    return fn._mask


def is_flat(fn: TorchDistribution) -> bool:
    """Whether the site is declared by ``.mask(False)`` and adds no density."""
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        if isinstance(fn, dist.MaskedDistribution) and mask_of(fn) is False:
            return True
        fn = fn.base_dist
    return False


def rebuild(fn: TorchDistribution, change: Callable[[Any], TorchDistribution]) -> TorchDistribution:
    """``fn`` with ``change`` applied to the distribution under ``Independent``, ``mask``, ``expand``."""
    found: TorchDistribution
    if isinstance(fn, dist.Independent):
        found = rebuild(fn.base_dist, change).to_event(fn.reinterpreted_batch_ndims)
        return found
    if isinstance(fn, dist.MaskedDistribution):
        found = rebuild(fn.base_dist, change).mask(mask_of(fn))
        return found
    if isinstance(fn, dist.ExpandedDistribution):
        return rebuild(fn.base_dist, change).expand(fn.batch_shape)
    return change(fn)


def unmasked(fn: TorchDistribution) -> TorchDistribution:
    """``fn`` without its masks: the distribution that its draws come from."""
    if isinstance(fn, dist.MaskedDistribution):
        return unmasked(fn.base_dist)
    if isinstance(fn, dist.Independent | dist.ExpandedDistribution):
        base = unmasked(fn.base_dist)
        if base is fn.base_dist:  # nothing is masked
            return fn
        is_event = isinstance(fn, dist.Independent)
        return base.to_event(fn.reinterpreted_batch_ndims) if is_event else base.expand(fn.batch_shape)
    return fn


def relaxed(fn: TorchDistribution) -> TorchDistribution:
    """A model's Bernoulli or OneHotCategorical site, made to score soft values by its own log mass.

    :raises ValueError: for any other distribution.
    """

    def change(base: Any) -> TorchDistribution:
        if isinstance(base, dist.Bernoulli):
            return ConcreteBernoulli(torch.ones_like(base.logits), base.logits, validate_args=False)
        if isinstance(base, dist.OneHotCategorical):
            return ConcreteOneHot(1.0, base.logits, validate_args=False)
        if isinstance(base, ConcreteBernoulli | ConcreteOneHot):
            return base
        raise ValueError(
            f"a relaxed guide site needs a Bernoulli or OneHotCategorical in the model, or a flat site "
            f"made with .mask(False); found {type(base).__name__}"
        )

    return fn if is_flat(fn) else rebuild(fn, change)


def discretized(fn: TorchDistribution) -> TorchDistribution:
    """The discrete distribution that a relaxed guide site stands for; any other unchanged."""
    if not isinstance(base_of(fn), ConcreteBernoulli | ConcreteOneHot):
        return fn
    return rebuild(fn, lambda base: base.discrete())
