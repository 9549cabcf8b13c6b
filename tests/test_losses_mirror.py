"""The two packages' outer losses, given the same score and the same noise, are the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import numpyro_bism.losses as jax_losses
import pyro_bism.losses as torch_losses

N, D, M = 11, 3, 4
rng = np.random.default_rng(0)
W = rng.normal(size=(D, D))
V = rng.normal(size=(N, D))
NOISE = rng.normal(size=(N, D))
SIGMA = rng.uniform(0.1, 0.5, size=(N, 1))
PROJECTIONS = rng.normal(size=(M, N, D))


def torch_score(v):
    return torch.tanh(v @ torch.tensor(W)) - v


def jax_score(v):
    return jnp.tanh(v @ W) - v


CASES = {
    "exact": ((), {}),
    "sliced": ((PROJECTIONS,), {}),
    "denoising": ((NOISE,), {"sigma": 0.3}),
    "multiscale_denoising": ((NOISE, SIGMA), {"sigma0": 0.2}),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_agree(name):
    arrays, settings = CASES[name]
    ours = getattr(torch_losses, name)(torch_score, torch.tensor(V), *map(torch.tensor, arrays), **settings)
    with jax.enable_x64(True):
        theirs = getattr(jax_losses, name)(jax_score, jnp.asarray(V), *map(jnp.asarray, arrays), **settings)
        np.testing.assert_allclose(ours.detach(), theirs, rtol=1e-12)


def test_exact_trace_is_the_hand_written_one():
    with jax.enable_x64(True):
        ours = jax_losses.exact(jax_score, jnp.asarray(V))
    slope = 1 - np.tanh(V @ W) ** 2
    trace = (slope * np.diag(W)).sum(-1) - D
    score = np.tanh(V @ W) - V
    np.testing.assert_allclose(ours, 0.5 * (score**2).sum(-1) + trace, rtol=1e-12)


def test_public_names_are_the_same():
    assert jax_losses.__all__ == torch_losses.__all__
