"""Peak memory of one unrolled step on a 560 x 400 Gaussian-Bernoulli RBM, by N and by ``memory=``.

    python tests/benchmarks/memory.py

Batch 100, K = 1, Adam, a relaxed guide. Every figure is a process of its own: its peak resident set, the libraries
(``import``) included and also given alone.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

VISIBLE, HIDDEN, BATCH = 560, 400, 100


def step_pyro(num_steps: int, memory: str) -> None:
    import pyro
    import pyro.distributions as dist
    import torch

    from pyro_bism import BiSM, ConcreteBernoulli, DenoisingScoreMatching, Unrolled

    def model(x):
        W, c = pyro.param("W", lambda: 0.01 * torch.randn(VISIBLE, HIDDEN)), pyro.param("c", torch.zeros(HIDDEN))
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(0, 1).expand([VISIBLE]).to_event(1).mask(False), obs=x)
            h = pyro.sample("h", dist.Bernoulli(0.5).expand([HIDDEN]).to_event(1).mask(False))
            pyro.factor("energy", ((v @ W + c) * h).sum(-1) - 0.5 * v.square().sum(-1))

    def guide(x):
        W, b = pyro.param("gW", lambda: 0.01 * torch.randn(VISIBLE, HIDDEN)), pyro.param("gb", torch.zeros(HIDDEN))
        with pyro.plate("data", len(x)):
            pyro.sample("h", ConcreteBernoulli(0.1, x @ W + b).to_event(1))

    x = torch.from_numpy(np.random.default_rng(0).normal(size=(BATCH, VISIBLE)).astype(np.float32))
    optim, loss = pyro.optim.Adam({"lr": 1e-3}), DenoisingScoreMatching(0.3)
    strategy = Unrolled(num_steps, memory=memory)  # type: ignore[arg-type]
    bism = BiSM(model, guide, optim, loss, num_inner_steps=1, hypergradient=strategy)
    for _ in range(2 if num_steps else 0):
        bism.step(x)


def step_numpyro(num_steps: int, memory: str) -> None:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from numpyro_bism import BiSM, ConcreteBernoulli, DenoisingScoreMatching, Unrolled

    def weights(key):
        return 0.01 * jax.random.normal(key, (VISIBLE, HIDDEN))

    def model(x):
        W, c = numpyro.param("W", weights), numpyro.param("c", jnp.zeros(HIDDEN))
        with numpyro.plate("data", len(x)):
            v = numpyro.sample("v", dist.Normal(0, 1).expand([VISIBLE]).to_event(1).mask(False), obs=x)
            h = numpyro.sample("h", dist.Bernoulli(0.5).expand([HIDDEN]).to_event(1).mask(False))
            numpyro.factor("energy", ((v @ W + c) * h).sum(-1) - 0.5 * jnp.square(v).sum(-1))

    def guide(x):
        W, b = numpyro.param("gW", weights), numpyro.param("gb", jnp.zeros(HIDDEN))
        with numpyro.plate("data", len(x)):
            numpyro.sample("h", ConcreteBernoulli(0.1, x @ W + b).to_event(1))

    x = np.random.default_rng(0).normal(size=(BATCH, VISIBLE)).astype(np.float32)
    optim, loss = numpyro.optim.Adam(1e-3), DenoisingScoreMatching(0.3)
    strategy = Unrolled(num_steps, memory=memory)  # type: ignore[arg-type]
    bism = BiSM(model, guide, optim, loss, num_inner_steps=1, hypergradient=strategy)
    if num_steps:
        bism.run(jax.random.key(0), 2, x, progress_bar=False)


def peak(backend: str, num_steps: int, memory: str) -> float:
    """Megabytes, of a process that takes two steps; none with ``num_steps=0``."""
    command = [sys.executable, __file__, "--one", backend, str(num_steps), memory]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        backend, num_steps, memory = args.one
        {"pyro": step_pyro, "numpyro": step_numpyro}[backend](int(num_steps), memory)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    print(f"{'':8}  {'memory':10} {'import':>8} {'N = 1':>8} {'N = 50':>8} {'ratio':>6}   (MB)")
    for backend in ("pyro", "numpyro"):
        for memory in ("store", "recompute"):
            before, short, long = (peak(backend, n, memory) for n in (0, 1, 50))
            print(f"{backend:8}  {memory:10} {before:8.0f} {short:8.0f} {long:8.0f} {long / short:6.2f}")


if __name__ == "__main__":
    main()
