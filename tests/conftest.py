"""Compilation is most of these tests' time: XLA optimises less here, and steps stay in loops."""

import os

# read when JAX is imported; subprocesses inherit it
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import pytest


@pytest.fixture(autouse=True)
def steps_in_loops(monkeypatch):
    """Inner steps are not fused; ``test_fused_steps_are_the_same_steps`` undoes it to compare."""
    monkeypatch.setattr("numpyro_bism.hypergradients.FUSED_STEPS", 1)


@pytest.fixture
def torch_double():
    """A fresh param store and seed, in float64."""
    import pyro
    import torch

    pyro.clear_param_store()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
