"""The models that ``performance.py`` times, as bare functions in torch and in JAX.

``log_joint(θ, v, h)`` is log p̃(v, h) = -E(v, h) of shape (n,), ``guide(φ, v)`` the parameters of q(h|v). The programs
of both packages and the steps written by hand all call these, so that they differ in nothing but their machinery.

- checkerboard: a Gaussian-Bernoulli RBM of 2 x 4 units, relaxed guide, σ = 0.05.
- rbm: the same at 560 x 400 units, σ = 0.3; and with half, twice and four times as many of either.
- conv: 1 x 32 x 32 images, 16 channels twice, 50 Gaussian latents: E = ½‖v‖² + ½‖h‖² - f(v)·h, f two strided
  convolutions and a linear map; the guide has such a network of its own. σ = 0.3. And with four times the channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TEMPERATURE = 0.1
TINY = 1e-7  # keeps the logit of a uniform draw finite
RATE, BETA1, BETA2, EPS = 1e-3, 0.9, 0.95, 1e-8
EPS_ROOT = 1e-16  # inside the root: Adam's derivative at a zero gradient would be NaN without it


@dataclass(frozen=True)
class Model:
    """
    :ivar shape: of one v.
    :ivar hidden: number of latents.
    :ivar is_relaxed: whether they are relaxed bits; else they are Gaussian.
    :ivar init: θ and φ, from a random number generator.
    """

    name: str
    shape: tuple[int, ...]
    hidden: int
    sigma: float
    is_relaxed: bool
    init: Callable[[np.random.Generator], tuple[dict, dict]]

    def data(self, batch: int) -> np.ndarray:
        """Of low rank and some noise; the checkerboard's own for two visible units."""
        rng = np.random.default_rng(0)
        if self.name == "checkerboard":
            from data import checkerboard

            return checkerboard(batch, rng)
        d = int(np.prod(self.shape))
        x = rng.normal(size=(batch, 20)) @ rng.normal(size=(20, d)) / np.sqrt(20) + 0.1 * rng.normal(size=(batch, d))
        return x.reshape(batch, *self.shape).astype(np.float32)


def _rbm(d: int, k: int, scale: float) -> Callable:
    def init(rng):
        def weights():
            return (scale * rng.normal(size=(d, k))).astype(np.float32)

        zeros = np.zeros(d, np.float32), np.zeros(k, np.float32)
        theta = {"W": weights(), "b": zeros[0], "c": zeros[1], "log_s": zeros[0]}
        return theta, {"guide_W": weights(), "guide_b": zeros[1]}

    return init


def _conv(channels: int, hidden: int) -> Callable:
    def init(rng):
        def normal(*shape):
            return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

        def network(name):
            return {
                f"{name}1": normal(channels, 1, 4, 4),
                f"{name}2": normal(channels, channels, 4, 4),
                f"{name}3": normal(hidden, channels * 64).T.copy(),
                f"{name}_bias": np.zeros(hidden, np.float32),
            }

        return network("f"), {**network("g"), "log_scale": np.zeros(hidden, np.float32)}

    return init


MODELS = {
    "checkerboard": Model("checkerboard", (2,), 4, 0.05, True, _rbm(2, 4, 0.1)),
    "rbm": Model("rbm", (560,), 400, 0.3, True, _rbm(560, 400, 0.01)),
    "rbm / 2": Model("rbm / 2", (280,), 200, 0.3, True, _rbm(280, 200, 0.01)),
    "rbm x 2": Model("rbm x 2", (1120,), 800, 0.3, True, _rbm(1120, 800, 0.01)),
    "rbm x 4": Model("rbm x 4", (2240,), 1600, 0.3, True, _rbm(2240, 1600, 0.01)),
    "conv": Model("conv", (1, 32, 32), 50, 0.3, False, _conv(16, 50)),
    "conv x 4": Model("conv x 4", (1, 32, 32), 50, 0.3, False, _conv(64, 50)),
}


def in_torch(model: Model) -> tuple[Callable, Callable]:
    """``log_joint`` and ``guide``."""
    from torch.nn.functional import conv2d, silu

    def features(p, name, v):
        u = silu(conv2d(v, p[f"{name}1"], stride=2, padding=1))
        u = silu(conv2d(u, p[f"{name}2"], stride=2, padding=1))
        return u.flatten(1) @ p[f"{name}3"] + p[f"{name}_bias"]

    def rbm_joint(p, v, h):
        quadratic = 0.5 * ((v - p["b"]) * (-p["log_s"]).exp()).square().sum(-1)
        return h @ p["c"] + ((v @ p["W"]) * h).sum(-1) - quadratic

    def conv_joint(p, v, h):
        quadratic = 0.5 * v.square().flatten(1).sum(-1) + 0.5 * h.square().sum(-1)
        return (features(p, "f", v) * h).sum(-1) - quadratic

    if model.is_relaxed:
        return rbm_joint, lambda p, v: (v @ p["guide_W"] + p["guide_b"],)
    return conv_joint, lambda p, v: (features(p, "g", v), p["log_scale"].exp())


def in_jax(model: Model) -> tuple[Callable, Callable]:
    """``log_joint`` and ``guide``."""
    import jax
    import jax.numpy as jnp

    def conv2d(v, w):
        return jax.lax.conv_general_dilated(v, w, (2, 2), ((1, 1), (1, 1)))

    def features(p, name, v):
        u = jax.nn.silu(conv2d(v, p[f"{name}1"]))
        u = jax.nn.silu(conv2d(u, p[f"{name}2"]))
        return u.reshape(len(u), -1) @ p[f"{name}3"] + p[f"{name}_bias"]

    def rbm_joint(p, v, h):
        quadratic = 0.5 * jnp.square((v - p["b"]) * jnp.exp(-p["log_s"])).sum(-1)
        return h @ p["c"] + ((v @ p["W"]) * h).sum(-1) - quadratic

    def conv_joint(p, v, h):
        quadratic = 0.5 * jnp.square(v).sum((1, 2, 3)) + 0.5 * jnp.square(h).sum(-1)
        return (features(p, "f", v) * h).sum(-1) - quadratic

    if model.is_relaxed:
        return rbm_joint, lambda p, v: (v @ p["guide_W"] + p["guide_b"],)
    return conv_joint, lambda p, v: (features(p, "g", v), jnp.exp(p["log_scale"]))
