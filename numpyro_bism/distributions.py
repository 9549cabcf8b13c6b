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

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.discrete import BernoulliLogits, BernoulliProbs, MultinomialLogits, MultinomialProbs
from numpyro.distributions.util import promote_shapes, validate_sample

__all__ = ["ConcreteBernoulli", "ConcreteOneHot"]


class ConcreteBernoulli(dist.Distribution):
    r"""Soft bits in [0, 1]: :math:`h = \mathrm{sigmoid}((\ell + \log u - \log(1-u)) / T)`.

    .. math:: \log q(h) = h \log \mathrm{sigmoid}(\ell) + (1 - h) \log \mathrm{sigmoid}(-\ell)

    :param temperature: :math:`T > 0`; at 0 the draws are bits.
    :param logits: :math:`\ell`, the log odds of a one.
    :param validate_args: whether arguments and scored values are checked; None takes the host's setting.
    """

    arg_constraints = {"temperature": constraints.positive, "logits": constraints.real}
    support = constraints.unit_interval
    reparametrized_params = ["temperature", "logits"]

    def __init__(self, temperature: Any, logits: Any, *, validate_args: bool | None = None):
        self.temperature, self.logits = promote_shapes(jnp.asarray(temperature), jnp.asarray(logits))
        shape = jnp.broadcast_shapes(jnp.shape(self.temperature), jnp.shape(self.logits))
        super().__init__(shape, validate_args=validate_args)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        u = _uniform(key, sample_shape + self.batch_shape, self.logits.dtype)
        return jax.nn.sigmoid((self.logits + jnp.log(u) - jnp.log1p(-u)) / self.temperature)

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        log_prob: Array = value * self.logits - jax.nn.softplus(self.logits)
        return log_prob

    @property
    def mean(self) -> Array:
        """The mean of the *discrete* distribution."""
        return jnp.broadcast_to(jax.nn.sigmoid(self.logits), self.batch_shape)

    def discrete(self) -> dist.Distribution:
        """The distribution over bits that ``log_prob`` belongs to."""
        return dist.Bernoulli(logits=jnp.broadcast_to(self.logits, self.batch_shape))


class ConcreteOneHot(dist.Distribution):
    r"""Soft one-hot vectors on the simplex: :math:`h = \mathrm{softmax}((\ell + g) / T)`, g Gumbel.

    .. math:: \log q(h) = \sum_k h_k \log \mathrm{softmax}(\ell)_k

    :param temperature: :math:`T > 0`, of the batch shape.
    :param logits: :math:`\ell`, of shape ``batch_shape + (num_classes,)``; need not be normalised.
    :param validate_args: whether arguments and scored values are checked; None takes the host's setting.
    """

    arg_constraints = {"temperature": constraints.positive, "logits": constraints.real_vector}
    support = constraints.simplex
    reparametrized_params = ["temperature", "logits"]

    def __init__(self, temperature: Any, logits: Any, *, validate_args: bool | None = None):
        if jnp.ndim(logits) < 1:
            raise ValueError("ConcreteOneHot: logits need a last dimension that runs over the classes.")
        self.temperature, logits = jnp.asarray(temperature), jnp.asarray(logits)
        self.logits = jax.nn.log_softmax(logits, -1)
        shape = jnp.broadcast_shapes(jnp.shape(self.temperature), logits.shape[:-1])
        super().__init__(shape, logits.shape[-1:], validate_args=validate_args)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        u = _uniform(key, sample_shape + self.batch_shape + self.event_shape, self.logits.dtype)
        gumbel = -jnp.log(-jnp.log(u))
        return jax.nn.softmax((self.logits + gumbel) / self.temperature[..., None], -1)

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        return (value * self.logits).sum(-1)

    @property
    def mean(self) -> Array:
        """The mean of the *discrete* distribution."""
        return jnp.broadcast_to(jnp.exp(self.logits), self.batch_shape + self.event_shape)

    def discrete(self) -> dist.Distribution:
        """The distribution over one-hot vectors that ``log_prob`` belongs to."""
        logits = jnp.broadcast_to(self.logits, self.batch_shape + self.event_shape)
        return dist.Multinomial(total_count=1, logits=logits)  # NumPyro's one-hot distribution


class AveragedBernoulli(ConcreteBernoulli):
    """Bits that are summed out: the draw is their mean, and ``log_prob`` there is E[log q]."""

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        return jnp.broadcast_to(self.mean, sample_shape + self.batch_shape)


class AveragedOneHot(ConcreteOneHot):
    """One-hot vectors that are summed out: the draw is their mean, and ``log_prob`` there is E[log q]."""

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        return jnp.broadcast_to(self.mean, sample_shape + self.batch_shape + self.event_shape)


def _uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    # clamped: u = 0 or 1 would give an infinite logit or Gumbel draw
    eps = jnp.finfo(dtype).eps
    return jnp.clip(jax.random.uniform(key, shape, dtype), eps, 1 - eps)


_WRAPPERS = dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution


def base_of(fn: dist.Distribution) -> dist.Distribution:
    """The distribution under ``Independent``, ``mask`` and ``expand``."""
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn


def is_averaged(fn: dist.Distribution) -> bool:
    """Whether its draw is a mean."""
    return isinstance(base_of(fn), AveragedBernoulli | AveragedOneHot)


def mask_of(fn: dist.MaskedDistribution) -> Any:
    """The mask of a masked distribution, which has no public name: True, False, or one for every entry."""
    return fn._mask


def is_flat(fn: dist.Distribution) -> bool:
    """Whether the site is declared by ``.mask(False)`` and adds no density."""
    while isinstance(fn, _WRAPPERS):
        if isinstance(fn, dist.MaskedDistribution) and mask_of(fn) is False:
            return True
        fn = fn.base_dist
    return False


def rebuild(fn: dist.Distribution, change: Callable[[dist.Distribution], dist.Distribution]) -> dist.Distribution:
    """``fn`` with ``change`` applied to the distribution under ``Independent``, ``mask``, ``expand``."""
    if isinstance(fn, dist.Independent):
        return rebuild(fn.base_dist, change).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return rebuild(fn.base_dist, change).mask(mask_of(fn))
    if isinstance(fn, dist.ExpandedDistribution):
        return rebuild(fn.base_dist, change).expand(fn.batch_shape)
    return change(fn)


def unmasked(fn: dist.Distribution) -> dist.Distribution:
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


def relaxed(fn: dist.Distribution) -> dist.Distribution:
    """A model's Bernoulli or one-hot Multinomial site, made to score soft values by its own log mass.

    :raises ValueError: for any other distribution.
    """

    def change(base: dist.Distribution) -> dist.Distribution:
        if isinstance(base, BernoulliLogits | BernoulliProbs):
            return ConcreteBernoulli(1.0, base.logits)
        if isinstance(base, MultinomialLogits | MultinomialProbs):
            logits = base.logits if isinstance(base, MultinomialLogits) else jnp.log(base.probs)
            return ConcreteOneHot(1.0, logits)
        if isinstance(base, ConcreteBernoulli | ConcreteOneHot):
            return base
        raise ValueError(
            "a relaxed guide site needs a Bernoulli or one-hot Multinomial in the model, or a flat site made "
            f"with .mask(False); found {type(base).__name__}"
        )

    return fn if is_flat(fn) else rebuild(fn, change)


def discretized(fn: dist.Distribution) -> dist.Distribution:
    """The discrete distribution that a relaxed guide site stands for; any other unchanged."""
    if not isinstance(base_of(fn), ConcreteBernoulli | ConcreteOneHot):
        return fn
    return rebuild(fn, lambda base: base.discrete())
