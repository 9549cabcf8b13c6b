"""Time a BiSM step of the checkerboard RBM: both packages beside the same step written by hand.

    python tests/benchmarks/checkerboard.py --backend both --rounds 9

Two visible and four hidden units, one fixed batch of 100, K = N = 5, denoising with σ = 0.05, Adam
at both levels, a Concrete guide. The contenders take turns, round by round, so that a machine that
slows down slows down all; the ratio printed is the median of the rounds' own ratios. ``--cores 1``
pins the process: XLA's hand-over between threads costs more than such a small step gains from them.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

SIGMA, TEMPERATURE, NUM_INNER_STEPS, NUM_UNROLLED = 0.05, 0.1, 5, 5
ADAM = {"lr": 1e-3, "betas": (0.9, 0.95)}
BATCH, VISIBLE, HIDDEN = 100, 2, 4

# Called with a number of steps; returns their mean outer loss once all have been computed.
Contender = Callable[[int], float]


def handwritten_jax(x: np.ndarray) -> Contender:
    """Bare JAX, all steps in one ``lax.scan``."""
    import handwritten_jax as by_hand
    import jax

    state, key, data = by_hand.init(jax.random.key(0)), jax.random.key(1), jax.numpy.asarray(x)

    def steps(num_steps):
        nonlocal state, key
        key, now = jax.random.split(key)
        state, losses = by_hand.run(now, state, data, num_steps)
        return float(losses.mean())

    return steps


def numpyro_program(x: np.ndarray) -> Contender:
    """``numpyro_bism``'s ``run``."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    import optax

    from numpyro_bism import BiSM, ConcreteBernoulli, DenoisingScoreMatching, Unrolled

    def weights(key):
        return 0.1 * jax.random.normal(key, (VISIBLE, HIDDEN))

    def model(x):
        W = numpyro.param("W", weights)
        b = numpyro.param("b", jnp.zeros(VISIBLE))
        c = numpyro.param("c", jnp.zeros(HIDDEN))
        log_s = numpyro.param("log_s", jnp.zeros(VISIBLE))
        with numpyro.plate("data", len(x)):
            flat = dist.Normal(0.0, 1.0).expand([VISIBLE]).to_event(1).mask(False)
            v = numpyro.sample("v", flat, obs=x)
            h = numpyro.sample("h", dist.Bernoulli(0.5).expand([HIDDEN]).to_event(1).mask(False))
            quadratic = 0.5 * jnp.square((v - b) * jnp.exp(-log_s)).sum(-1)
            numpyro.factor("energy", h @ c + ((v @ W) * h).sum(-1) - quadratic)

    def guide(x):
        W = numpyro.param("guide_W", weights)
        b = numpyro.param("guide_b", jnp.zeros(HIDDEN))
        with numpyro.plate("data", len(x)):
            numpyro.sample("h", ConcreteBernoulli(TEMPERATURE, x @ W + b).to_event(1))

    b1, b2 = ADAM["betas"]
    bism = BiSM(
        model,
        guide,
        # eps_root as by hand: Adam's derivative at a zero gradient is NaN without it
        optax.adam(ADAM["lr"], b1=b1, b2=b2, eps_root=1e-16),
        loss=DenoisingScoreMatching(sigma=SIGMA),
        num_inner_steps=NUM_INNER_STEPS,
        hypergradient=Unrolled(NUM_UNROLLED),
    )
    data = jnp.asarray(x)
    state, key = bism.init(jax.random.key(0), data), jax.random.key(1)

    def steps(num_steps):
        nonlocal state, key
        key, now = jax.random.split(key)
        result = bism.run(now, num_steps, data, progress_bar=False, init_state=state)
        state = result.state
        return float(result.losses.mean())

    return steps


def handwritten_torch(x: np.ndarray) -> Contender:
    """Bare torch, eager autograd."""
    import handwritten_torch as by_hand
    import torch

    torch.manual_seed(0)
    state, data = by_hand.init(), torch.from_numpy(x)

    def steps(num_steps):
        nonlocal state
        total = 0.0
        for _ in range(num_steps):
            state, loss = by_hand.step(state, data)
            total += loss.item()
        return total / num_steps

    return steps


def pyro_program(x: np.ndarray) -> Contender:
    """``pyro_bism``'s eager ``step``."""
    import pyro
    import pyro.distributions as dist
    import torch

    from pyro_bism import BiSM, ConcreteBernoulli, DenoisingScoreMatching, Unrolled

    pyro.set_rng_seed(0)
    pyro.clear_param_store()

    def weights():
        return 0.1 * torch.randn(VISIBLE, HIDDEN)

    def model(x):
        W = pyro.param("W", weights)
        b = pyro.param("b", lambda: torch.zeros(VISIBLE))
        c = pyro.param("c", lambda: torch.zeros(HIDDEN))
        log_s = pyro.param("log_s", lambda: torch.zeros(VISIBLE))
        with pyro.plate("data", len(x)):
            flat = dist.Normal(0.0, 1.0).expand([VISIBLE]).to_event(1).mask(False)
            v = pyro.sample("v", flat, obs=x)
            h = pyro.sample("h", dist.Bernoulli(0.5).expand([HIDDEN]).to_event(1).mask(False))
            quadratic = 0.5 * ((v - b) * (-log_s).exp()).square().sum(-1)
            pyro.factor("energy", h @ c + ((v @ W) * h).sum(-1) - quadratic)

    def guide(x):
        W = pyro.param("guide_W", weights)
        b = pyro.param("guide_b", lambda: torch.zeros(HIDDEN))
        with pyro.plate("data", len(x)):
            pyro.sample("h", ConcreteBernoulli(TEMPERATURE, x @ W + b).to_event(1))

    bism = BiSM(
        model,
        guide,
        pyro.optim.Adam(ADAM),
        loss=DenoisingScoreMatching(sigma=SIGMA),
        num_inner_steps=NUM_INNER_STEPS,
        hypergradient=Unrolled(NUM_UNROLLED),
    )
    data = torch.from_numpy(x)

    def steps(num_steps):
        return sum(bism.step(data) for _ in range(num_steps)) / num_steps

    return steps


# backend: (yardstick, package, steps a round)
CONTENDERS = {
    "numpyro": (
        ("hand-written JAX, scan", handwritten_jax),
        ("numpyro_bism run", numpyro_program),
        1000,
    ),
    "pyro": (
        ("hand-written torch, eager", handwritten_torch),
        ("pyro_bism step, eager", pyro_program),
        50,
    ),
}


def measure(backends: list[str], rounds: int, packages: bool, scale: float) -> list[dict]:
    """Seconds a step of every contender, round by round, after one round that is not counted."""
    from data import checkerboard

    x = checkerboard(BATCH, np.random.default_rng(0))
    rows = []
    for backend in backends:
        yardstick, package, num_steps = CONTENDERS[backend]
        base = None
        for name, make in (yardstick, package) if packages else (yardstick,):
            start = time.perf_counter()
            steps = make(x)
            num = max(1, round(num_steps * scale))
            steps(num)
            first = time.perf_counter() - start
            row = {"name": name, "steps": steps, "num": num, "first": first, "base": base}
            row["times"] = []
            rows.append(row)
            base = row
    for _ in range(rounds):
        for row in rows:
            start = time.perf_counter()
            row["loss"] = row["steps"](row["num"])
            row["times"].append((time.perf_counter() - start) / row["num"])
    return rows


def table(rows: list[dict]) -> str:
    """Medians, ratios, and the loss: a sign that all do the same work."""
    lines = [f"{'':28}{'ms a step':>12}{'fastest':>10}{'slowest':>10}{'ratio':>8}{'first s':>10}{'loss':>9}"]
    for row in rows:
        ms = [1e3 * t for t in row["times"]]
        base = row["base"] or row
        ratio = median(t / u for t, u in zip(row["times"], base["times"], strict=True))
        lines.append(
            f"{row['name']:28}{median(ms):12.3f}{min(ms):10.3f}{max(ms):10.3f}{ratio:8.2f}"
            f"{row['first']:10.1f}{row['loss']:9.1f}"
        )
    lines.append("ratio: to the row written by hand; first s: set-up, compilation, one round")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["pyro", "numpyro", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of a round")
    parser.add_argument("--cores", type=int, help="pin the process to this many cores (Linux)")
    parser.add_argument("--handwritten-only", action="store_true", help="the yardsticks alone, no package imported")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if args.cores:
        if not cores:
            parser.error("--cores needs an operating system that can pin a process")
        # before torch and jax are imported: they size their thread pools then
        os.sched_setaffinity(0, cores[: args.cores])
        cores = cores[: args.cores]
    backends = ["numpyro", "pyro"] if args.backend == "both" else [args.backend]
    rows = measure(backends, args.rounds, not args.handwritten_only, args.scale)
    print(
        f"RBM {VISIBLE}x{HIDDEN}, batch {BATCH}, K = {NUM_INNER_STEPS}, N = {NUM_UNROLLED}, "
        f"{len(cores) or os.cpu_count()} cores, median of {args.rounds} rounds"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
