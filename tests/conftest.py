"""Compilation is most of these tests' time: XLA optimises less, steps stay in loops, nothing is compiled twice."""

import atexit
import os
import shutil
import tempfile

# read when JAX is imported; subprocesses inherit it
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the workers of a parallel run, and subprocesses, inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="bism-jax-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import pytest


@pytest.fixture(autouse=True)
def steps_in_loops(monkeypatch):
    """Inner steps are not fused; ``test_fused_steps_are_the_same_steps`` undoes it to compare."""
    monkeypatch.setattr("numpyro_bism.hypergradients.problem.FUSED_STEPS", 1)


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
