"""Peak memory of one unrolled step on a 560 x 400 Gaussian-Bernoulli RBM, by N and by ``memory=``.

    python tests/benchmarks/performance.py --part memory

Batch 100, K = 1, Adam, a relaxed guide. Every figure is of a process of its own: what its steps hold at their height
beyond what lies there between them (``own``), and its peak, libraries and compiler included.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from performance import own_memory

VISIBLE, HIDDEN, BATCH = 560, 400, 100
STEPS = (1, 5, 10, 50)


def pyro_step(num_steps: int, memory: str) -> Callable[[], object]:
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
    return lambda: bism.step(x)


def numpyro_step(num_steps: int, memory: str) -> Callable[[], object]:
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
    state = bism.init(jax.random.key(0), x)

    def step():
        nonlocal state
        state = bism.run(jax.random.key(0), 1, x, init_state=state, progress_bar=False).state
        jax.block_until_ready(state)

    return step


def measured(host: str, num_steps: int, memory: str) -> dict[str, float]:
    """Megabytes, in a process of its own."""
    command = [sys.executable, __file__, "--one", host, str(num_steps), memory]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        host, num_steps, memory = args.one
        step = {"pyro": pyro_step, "numpyro": numpyro_step}[host](int(num_steps), memory)
        step()
        step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"own": median(own_memory(step) for _ in range(5)), "peak": peak}))
        return
    found = []
    for host, memory, n in tqdm([*itertools.product(("pyro", "numpyro"), ("store", "recompute"), STEPS)]):
        found.append({"host": host, "memory": memory, "N": n, **measured(host, n, memory)})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
