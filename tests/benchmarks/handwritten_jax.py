"""One BiSM step of the checkerboard RBM in bare JAX: the yardstick for ``numpyro_bism``.

E(v, h) = ½ ‖(v - b)/s‖² - cᵀh - vᵀW h, s = exp(log_s), and a Concrete guide of linear logits vᵀW' +
b', scored by the Bernoulli cross-entropy. K kept Adam steps on φ, N differentiable ones from the
state then reached, one Adam step on θ (Algorithm 1 of Bao et al. 2020, KL inner loss, denoising
outer loss).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

SIGMA = 0.05
TEMPERATURE = 0.1
NUM_INNER_STEPS = 5
NUM_UNROLLED = 5
RATE, BETA1, BETA2, EPS = 1e-3, 0.9, 0.95, 1e-8
# inside the root: Adam's derivative at a zero gradient would be NaN without it
EPS_ROOT = 1e-16
# keeps the logit of a uniform draw finite
TINY = 1e-7


class Adam(NamedTuple):
    params: dict
    first: dict
    second: dict
    count: jax.Array


class State(NamedTuple):
    theta: Adam
    phi: Adam


class Noise(NamedTuple):
    """Of all K + N + 1 passes: data noise, shape (passes, n, d); uniforms, (passes, n, k)."""

    v: jax.Array
    h: jax.Array


def adam_init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return Adam(params, zeros, zeros, jnp.zeros((), jnp.int32))


def adam_step(state, gradient):
    count = state.count + 1
    first = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, state.first, gradient)
    second = jax.tree.map(lambda s, g: BETA2 * s + (1 - BETA2) * g * g, state.second, gradient)
    bias1, bias2 = 1 - BETA1**count, 1 - BETA2**count
    params = jax.tree.map(
        lambda p, m, s: p - RATE * (m / bias1) / (jnp.sqrt(s / bias2 + EPS_ROOT) + EPS),
        state.params,
        first,
        second,
    )
    return Adam(params, first, second, count)


def log_joint(theta, v, h):
    """log p̃(v, h) = -E(v, h), shape (n,)."""
    quadratic = 0.5 * jnp.square((v - theta["b"]) * jnp.exp(-theta["log_s"])).sum(-1)
    return h @ theta["c"] + ((v @ theta["W"]) * h).sum(-1) - quadratic


def logits(phi, v):
    return v @ phi["W"] + phi["b"]


def draw(logit, uniform):
    """A Concrete draw: sigmoid((logit + log u - log(1 - u)) / T)."""
    return jax.nn.sigmoid((logit + jnp.log(uniform) - jnp.log1p(-uniform)) / TEMPERATURE)


def log_guide(logit, h):
    """The Bernoulli cross-entropy at soft h: h·logit - softplus(logit), shape (n,)."""
    return (h * logit - jax.nn.softplus(logit)).sum(-1)


def inner_loss(phi, theta, x, noise):
    """Mean over the batch of E_q [log q(h|ṽ) - log p̃(ṽ, h)], one draw each."""
    v = x + SIGMA * noise.v
    logit = logits(phi, v)
    h = draw(logit, noise.h)
    return (log_guide(logit, h) - log_joint(theta, v, h)).mean()


def outer_loss(theta, phi, x, noise):
    """Mean over the batch of ½ ‖∇_v [log p̃(ṽ, h) - log q(h|ṽ)] + ε/σ‖²."""
    v = x + SIGMA * noise.v
    # h carries a path to φ but none to v: it is drawn once and replayed while v moves
    h = draw(logits(phi, v), noise.h)
    score = jax.grad(lambda u: (log_joint(theta, u, h) - log_guide(logits(phi, u), h)).sum())(v)
    return 0.5 * jnp.square(score + noise.v / SIGMA).sum(-1).mean()


def draw_noise(key, n, d, k):
    """All noise of one step in two calls."""
    passes = NUM_INNER_STEPS + NUM_UNROLLED + 1
    key_v, key_h = jax.random.split(key)
    uniform = jax.random.uniform(key_h, (passes, n, k), minval=TINY, maxval=1 - TINY)
    return Noise(jax.random.normal(key_v, (passes, n, d)), uniform)


def step_with(state, x, noise):
    """One outer update with given noise.

    Python loops, not ``lax.scan``: XLA then fuses across the few iterations.
    """

    def fit(theta, phi, passes):
        for i in passes:
            at = Noise(noise.v[i], noise.h[i])
            phi = adam_step(phi, jax.grad(inner_loss)(phi.params, theta, x, at))
        return phi

    kept = fit(state.theta.params, state.phi, range(NUM_INNER_STEPS))

    def outer(theta):
        unrolled = range(NUM_INNER_STEPS, NUM_INNER_STEPS + NUM_UNROLLED)
        phi = fit(theta, kept, unrolled)
        return outer_loss(theta, phi.params, x, Noise(noise.v[-1], noise.h[-1]))

    loss, gradient = jax.value_and_grad(outer)(state.theta.params)
    return State(adam_step(state.theta, gradient), kept), loss


def init(key, d=2, k=4):
    """W, W' ~ N(0, 0.1²), biases nothing, standard deviation one."""
    key_theta, key_phi = jax.random.split(key)
    theta = {
        "W": 0.1 * jax.random.normal(key_theta, (d, k)),
        "b": jnp.zeros(d),
        "c": jnp.zeros(k),
        "log_s": jnp.zeros(d),
    }
    phi = {"W": 0.1 * jax.random.normal(key_phi, (d, k)), "b": jnp.zeros(k)}
    return State(adam_init(theta), adam_init(phi))


@partial(jax.jit, static_argnames=("num_steps", "batch_size"))
def run(key, state, x, num_steps, batch_size=None):
    """``num_steps`` steps in one compiled program.

    :param batch_size: rows drawn from x with replacement at every step; None takes all of x.
    :returns: the last state, and the outer loss of every step.
    """

    def body(state, key):
        batch = x
        if batch_size is not None:
            key, key_rows = jax.random.split(key)
            batch = x[jax.random.randint(key_rows, (batch_size,), 0, len(x))]
        noise = draw_noise(key, *batch.shape, len(state.phi.params["b"]))
        return step_with(state, batch, noise)

    return jax.lax.scan(body, state, jax.random.split(key, num_steps))
