"""Compilation is most of these tests' time: XLA optimises less here, and steps stay in loops."""

import os

# read when JAX is imported; subprocesses inherit it
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import pytest


@pytest.fixture(autouse=True)
def steps_in_loops(monkeypatch):
    """Inner steps are not fused; ``test_fused_steps_are_the_same_steps`` undoes it to compare."""
    monkeypatch.setattr("numpyro_bism.hypergradients.FUSED_STEPS", 1)
