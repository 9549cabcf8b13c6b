"""numpyro_bism's unrolled hypergradient is the finite difference of the whole map, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from jax.example_libraries import optimizers
from numpyro.optim import _NumPyroOptim, optax_to_numpyro

from numpyro_bism.hypergradients import Bilevel, Detached, Unrolled
from oracles import central_difference

A = np.random.default_rng(0).normal(size=(4, 3))
OPTIMS = {
    "adam": numpyro.optim.Adam(1e-2),
    "clipped-adam": numpyro.optim.ClippedAdam(1e-2),
    "sgd": numpyro.optim.SGD(1e-2),
    "momentum": numpyro.optim.Momentum(1e-2, 0.9),
    "rmsprop": numpyro.optim.RMSProp(1e-2),
    "adagrad": numpyro.optim.Adagrad(1e-2),
    "optax-clipped-scheduled": optax_to_numpyro(
        optax.chain(optax.clip_by_global_norm(0.1), optax.adam(optax.exponential_decay(1e-2, 1, 0.9)))
    ),
    "jax-nesterov": _NumPyroOptim(lambda *a: a, *optimizers.nesterov(1e-2, 0.9)),
}


def inner(key, theta, phi):
    noise = 0.1 * jax.random.normal(key, (3,))
    residual = phi["m"] - jnp.tanh(theta @ A) + noise
    return jnp.sum(residual**2 * jnp.exp(phi["s"])) + jnp.sum(phi["s"] ** 2)


def outer(key, theta, phi):
    return jnp.sum(jnp.sin(phi["m"] + theta[:3]) * phi["s"]) + jnp.sum(theta**2)


class Problem(Bilevel):
    """These two losses, of no programs."""

    outer, inner = staticmethod(outer), staticmethod(inner)

    def __init__(self, optim):
        super().__init__(None, None, None, None, None, optim, None)


@pytest.mark.parametrize("num_steps", [0, 1, 3, 10])
@pytest.mark.parametrize("name", OPTIMS)
def test_hypergradient_is_the_derivative_of_the_whole_map(name, num_steps):
    with jax.enable_x64(True):
        optim, key = OPTIMS[name], jax.random.key(0)
        # "dead" has a gradient of exactly zero, where Adam's own derivative would be NaN
        state = optim.init({"m": jnp.ones(3), "s": jnp.ones(3), "dead": jnp.zeros(2)})
        theta, direction = jnp.array([0.1, 0.2, -0.3, 0.4]), jnp.array([1.0, -0.5, 0.3, 0.7])
        strategy = Unrolled(num_steps) if num_steps else Detached()
        whole = jax.jit(lambda t: strategy(key, Problem(optim), t, state, None))

        def at(t):
            return whole(theta + t * direction)[0]

        gradient = whole(theta)[1]
        np.testing.assert_allclose(gradient @ direction, central_difference(at, 1e-4), rtol=1e-8)
