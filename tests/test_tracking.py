"""The running mean of a gradient that is noisy and moves: its rate against the best of all fixed ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from numpyro_bism.hypergradients import tracking as jax_tracking
from pyro_bism.hypergradients import tracking as torch_tracking

NUM = 3000
MEMORIES = (0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99)


def in_jax(xs, memory):
    """The means of two parameters after every step."""

    def step(state, x):
        state = state.follow(list(x), memory)
        return state, jnp.stack(state.mean)

    start = jax_tracking.untracked([jnp.zeros(xs.shape[2])] * 2)
    return np.asarray(jax.jit(lambda xs: jax.lax.scan(step, start, xs)[1])(jnp.asarray(xs, jnp.float32)))


def in_torch(xs, memory):
    state, means = torch_tracking.untracked([torch.zeros(xs.shape[2])] * 2), []
    for x in torch.tensor(xs, dtype=torch.float32):
        state = state.follow(list(x), memory)
        means.append(torch.stack(state.mean).numpy())
    return np.stack(means)


def drifting(drift):
    """Means (steps, two parameters, entries) of which the second stands still, and draws around them."""
    truth = np.stack([drift * np.arange(NUM), np.zeros(NUM)], 1)[:, :, None] * np.ones(5)
    return truth, truth + np.random.default_rng(0).normal(size=truth.shape)


@pytest.mark.parametrize("drift", [0.0, 0.1, 1.0])
def test_the_mean_is_as_long_as_noise_and_drift_ask_for(drift):
    """Parameters of different drift do not share a rate. A rate of 0.01 can't be told from 0.03 by five entries."""
    truth, xs = drifting(drift)

    def errors(memory):
        return np.sqrt(np.square(in_jax(xs, memory) - truth)[NUM // 3 :].mean((0, 2)))

    found, best = errors(None), np.min([errors(memory) for memory in MEMORIES], 0)
    assert (found < np.maximum(1.25 * best, 0.15)).all(), (found, best)
    assert best[1] < 0.1


@pytest.mark.parametrize("memory", [None, 0.9])
def test_both_packages_find_the_same_mean(memory):
    _, xs = drifting(0.1)
    np.testing.assert_allclose(in_torch(xs[:500], memory), in_jax(xs[:500], memory), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("follow", [in_jax, in_torch])
def test_a_fixed_memory_is_the_plain_mean_first_then_an_exponential_one(follow):
    _, xs = drifting(0.0)
    mean = np.zeros(xs.shape[1:])
    for i, (x, found) in enumerate(zip(xs[:50], follow(xs[:50], 0.9), strict=True)):
        mean = mean + max(1 / (i + 1), 0.1) * (x - mean)
        np.testing.assert_allclose(found, mean, rtol=1e-4, atol=1e-5)
    # without noise there is no reason for a mean
    still = np.broadcast_to(np.arange(20.0)[:, None, None], (20, 2, 5))
    assert np.abs(follow(still, None) - still).max() < 2
