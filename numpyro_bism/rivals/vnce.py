"""Variational noise-contrastive estimation: NCE where the latents can't be summed out."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import softplus
from numpyro.handlers import seed

from .. import divergences
from ..compiled.steps import inner_steps, prefetch
from ..optim.host import as_optim, inner_copy, require_single_steps
from ..programs.checks import Analysis
from ..programs.pair import ModelAndGuide
from ..programs.records import joint_per_example, per_example, record
from ..programs.visible import Batch
from ..training import runaways
from ..training.runaways import Words
from ..training.settings import require_guide
from .nce import LOG_NORMALIZER, Gaussian, check_noise, check_width
from .rival import Rival
from .target import MarginalTarget

__all__ = ["VNCE", "VNCEInfo"]


class VNCEInfo(NamedTuple):
    """What the last step saw; infinite before the first.

    :ivar loss: the loss, a mean over the batch.
    :ivar grad_norm: the length of its gradient in θ and log Z.
    :ivar inner_loss: the guide's loss at its last step, before its update; a mean over the data.
    :ivar inner_grad_norm: the length of its gradient in φ.
    :ivar verdict: 0 as long as training has not run away, else a number; ``in_words`` says it in a sentence.
    """

    loss: Array
    grad_norm: Array
    inner_loss: Array
    inner_grad_norm: Array
    verdict: Array

    @property
    def in_words(self) -> str:
        """The verdict as a sentence."""
        return runaways.in_words(self.verdict, VNCE.words)

    def __str__(self) -> str:
        return runaways.shown(self, VNCE.words)


class VNCE(Rival):
    r"""Variational noise-contrastive estimation (Rhodes and Gutmann 2019, arXiv:1810.08010).

    A bound of NCE's loss from above, with :math:`r(u, h) = \log \tilde p(u, h; θ) - \log Z - \log q(h|u; φ)`:

    .. math:: -E_{q(h|x)} \log \frac{1}{1 + ν p_n(x)\, e^{-r(x, h)}}
              - \sum_{j=1}^{ν} \log \frac{1}{1 + E_{q(h|y_j)}[e^{r(y_j, h)}] / (ν p_n(y_j))}

    The second expectation is estimated by importance sampling, with ``num_particles`` draws. It does not depend on φ,
    so the guide is fitted to the first term alone, which is least where q is the posterior. Latents that the guide
    marks ``infer={"enumerate": "parallel"}`` are summed over all joint configurations in both.

    :param model: a NumPyro program of an unnormalised density p̃(v, h; θ), as BiSM takes it.
    :param guide: a NumPyro program of q(h|v; φ), as BiSM takes it.
    :param optim: an optimiser for θ and log Z, of ``numpyro.optim``, ``jax.example_libraries.optimizers`` or optax.
    :param noise: as in :class:`NCE`.
    :param num_noise: ν, noise draws a datum.
    :param num_particles: draws of h a datum, and a draw of the noise.
    :param inner_optim: an optimiser for φ; None takes ``optim``'s settings with a state of its own. optax's schedules
        then keep pace: the K inner steps of a step have its rate.
    :param inner_loss: another loss for the guide: an ELBO of NumPyro, or :class:`FisherDivergence`.
    :param num_inner_steps: steps of φ for each of θ.
    :param log_normalizer: log Z to start from; None estimates it from the noise.
    :param visible: names of the visible sites; None takes all observed sample sites.
    :param static_kwargs: keyword arguments of model and guide that stay the same, as in SVI.
    :raises ValueError: at construction for bad settings, at :meth:`init` for misuse.
    """

    sums_latents = False
    info_type = VNCEInfo
    scale = 1.0  # of a classifier that knows nothing, log 2 a decision
    words = Words.of_rival("or more inner steps, so that the guide keeps up, or with noise nearer to the data")

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        noise: Any = None,
        num_noise: int = 1,
        num_particles: int = 1,
        *,
        inner_optim: Any = None,
        inner_loss: Any = None,
        num_inner_steps: int = 1,
        log_normalizer: float | None = None,
        visible: Sequence[str] | None = None,
        **static_kwargs: Any,
    ):
        super().__init__(model, optim, visible, static_kwargs, guide)
        require_guide(guide)
        check_noise(noise, num_noise)
        if num_particles < 1 or num_inner_steps < 1:
            raise ValueError(
                f"num_particles and num_inner_steps must be at least 1, got {num_particles} and {num_inner_steps}."
            )
        self.noise = noise
        self.num_noise = num_noise
        self.num_particles = num_particles
        if inner_optim is None:
            self.inner_optim = inner_copy(self.optim, num_inner_steps, "inner_optim")
        else:
            self.inner_optim = as_optim(inner_optim, "inner_optim")
        self.inner_loss = inner_loss
        self.num_inner_steps = num_inner_steps
        self.log_normalizer = log_normalizer
        self._inner = None if inner_loss is None else divergences.as_inner_loss(inner_loss)

    def _check(self, target: MarginalTarget, params: Mapping[str, Any], batch: Batch, rng_key: Array) -> MarginalTarget:
        check_width(self.noise, target)
        if self.inner_loss is not None:
            divergences.check(self.inner_loss, target.pair)
        return target

    def _phi(self, pair: ModelAndGuide, theta: Mapping[str, Any], carried: Any) -> dict[str, Any]:
        phi: dict[str, Any] = self.inner_optim.get_params(carried[0])
        return phi

    def _begin(
        self, rng_key: Array, target: MarginalTarget, start: Analysis, batch: Batch
    ) -> tuple[dict[str, Any], Any]:
        require_single_steps(self.inner_optim, start.phi, "inner_optim")
        fitted = Gaussian.fitted(target, batch) if self.noise is None else None
        noise = self.noise if fitted is None else fitted.distribution()
        if self.log_normalizer is not None:
            log_normalizer = jnp.asarray(self.log_normalizer, jnp.result_type(float))
        else:  # log E_y[p̃(y) / p_n(y)]
            key_noise, key_draw = jax.random.split(rng_key)
            y = noise.sample(key_noise, (len(batch.v),)).astype(batch.v.dtype)
            params = target.params(start.theta, start.mutable, start.phi)
            ratios = _log_mean(*self._log_ratios(key_draw, target.pair, params, batch, y)) - noise.log_prob(y)
            log_normalizer = jax.nn.logsumexp(ratios) - math.log(len(y))
        return {LOG_NORMALIZER: log_normalizer}, (self.inner_optim.init(start.phi), fitted)

    def _fit(
        self, rng_key: Array, theta: Mapping[str, Any], carried: Any, target: MarginalTarget, mutable: Any, batch: Batch
    ) -> tuple[Any, tuple[Array, ...]]:
        inner_state, fitted = carried

        def loss(key: Array, theta: Mapping[str, Any], phi: Mapping[str, Any]) -> Array:
            params = target.params(theta, mutable, phi)
            if self._inner is not None:
                return self._inner(key, target.pair, params, batch, batch.v)
            return self._data_term(key, target.pair, params, theta, batch, fitted).mean()

        num, phi = self.num_inner_steps, self.inner_optim.get_params(inner_state)
        ahead = prefetch(loss, jax.random.split(rng_key, num), theta, phi)
        inner_state, losses, lengths = inner_steps(ahead, num, theta, self.inner_optim, inner_state)
        return (inner_state, fitted), (losses[-1], lengths[-1])

    def _loss(
        self, rng_key: Array, theta: Mapping[str, Any], carried: Any, target: MarginalTarget, mutable: Any, batch: Batch
    ) -> tuple[Array, Any]:
        inner_state, fitted = carried
        params = target.params(theta, mutable, self.inner_optim.get_params(inner_state))
        key_data, key_noise, key_draw = jax.random.split(rng_key, 3)
        noise = self.noise if fitted is None else fitted.distribution()
        y = noise.sample(key_noise, (self.num_noise, len(batch.v))).astype(batch.v.dtype)

        def noise_term(y: Array, key: Array) -> Array:
            ratio = _log_mean(*self._log_ratios(key, target.pair, params, batch, y)) - theta[LOG_NORMALIZER]
            return softplus(ratio - noise.log_prob(y) - math.log(self.num_noise))

        at_noise = jax.vmap(noise_term)(y, jax.random.split(key_draw, self.num_noise)).sum(0)
        return (self._data_term(key_data, target.pair, params, theta, batch, fitted) + at_noise).mean(), carried

    def _data_term(
        self,
        rng_key: Array,
        pair: ModelAndGuide,
        params: Mapping[str, Any],
        theta: Mapping[str, Any],
        batch: Batch,
        fitted: Any,
    ) -> Array:
        """The first term, of every example: shape (n,)."""
        noise = self.noise if fitted is None else fitted.distribution()
        ratios, log_weights = self._log_ratios(rng_key, pair, params, batch, batch.v)
        each = softplus(math.log(self.num_noise) + noise.log_prob(batch.v) + theta[LOG_NORMALIZER] - ratios)
        return (jnp.exp(log_weights) * each).sum(1).mean(0)

    def _log_ratios(
        self, rng_key: Array, pair: ModelAndGuide, params: Mapping[str, Any], batch: Batch, v: Array
    ) -> tuple[Array, Array]:
        """log p̃(v, h) - log q(h|v) at draws of h, and the logarithm of each summed-out configuration's share of q.

        Both of shape (particles, configurations, n).
        """
        args, kwargs = batch.arguments(v)
        n = len(v)

        def one(key: Array, given: Mapping[str, Array] | None = None) -> tuple[Array, Array]:
            key_draw, key_model = jax.random.split(key)
            draw, sites = pair.draw(key_draw, params, batch, v, given)
            with seed(rng_seed=key_model), record(params, draw.values, pair.relaxed_sites) as run:
                pair.model(*args, **kwargs)
            log_p = joint_per_example(run.sites.values(), n)
            zero = jnp.zeros(n, v.dtype)
            log_q = sum((per_example(site, n) for site in sites.values() if not site.is_observed), zero)
            # neither a scale nor a mask of the density changes how probable a configuration is
            shares = (sites[name].log_q().reshape(n, -1).sum(-1) for name in given or ())
            return log_p - log_q, sum(shares, zero)

        def particle(key: Array) -> Any:
            if not pair.enumerated:
                return jax.tree.map(lambda a: a[None], one(key))
            return jax.vmap(lambda given: one(key, given))(pair.configurations(key, params, batch, v))

        found: tuple[Array, Array] = jax.vmap(particle)(jax.random.split(rng_key, self.num_particles))
        return found


def _log_mean(ratios: Array, log_weights: Array) -> Array:
    """log E_q[exp ratio], estimated: the mean over particles, summed over configurations."""
    return jax.nn.logsumexp(ratios + log_weights, (0, 1)) - math.log(len(ratios))
