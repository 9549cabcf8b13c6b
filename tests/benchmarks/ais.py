"""Seconds of annealed importance sampling, forward and reverse, on a Gaussian-Bernoulli RBM of 560 x 400 units.

    python tests/benchmarks/ais.py --backends pyro numpyro

1,000 temperatures, 500 chains, compilation included. The couplings are random; where log Z is, its two bounds tell.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from contenders import programs  # noqa: E402
from models import MODELS, in_jax, in_torch  # noqa: E402

MODEL = MODELS["rbm"]


def parameters() -> tuple[dict, dict]:
    """θ with couplings of a trained machine's size, and any φ."""
    rng = np.random.default_rng(0)
    theta, phi = MODEL.init(rng)
    (d,), k = MODEL.shape, MODEL.hidden
    theta |= {"W": 0.05 * rng.normal(size=(d, k)), "b": rng.normal(size=d), "c": np.full(k, -0.5)}
    return {name: value.astype(np.float32) for name, value in theta.items()}, phi


def pyro(num_temperatures: int, num_chains: int):
    import pyro
    import pyro.distributions as dist
    import torch

    from pyro_bism import BiSM, ConcreteBernoulli, DenoisingScoreMatching, ais

    pyro.set_rng_seed(0)
    start = [{name: torch.from_numpy(value) for name, value in each.items()} for each in parameters()]
    model, guide = programs(MODEL, pyro, dist, ConcreteBernoulli, in_torch(MODEL), start)
    bism = BiSM(model, guide, pyro.optim.Adam({"lr": 1e-3}), DenoisingScoreMatching(MODEL.sigma))
    return ais(bism, torch.from_numpy(MODEL.data(100)), num_temperatures=num_temperatures, num_chains=num_chains)


def numpyro(num_temperatures: int, num_chains: int):
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from numpyro_bism import BiSM, ConcreteBernoulli, DenoisingScoreMatching, ais

    start = [jax.tree.map(jnp.asarray, each) for each in parameters()]
    model, guide = programs(MODEL, numpyro, dist, ConcreteBernoulli, in_jax(MODEL), start)
    bism = BiSM(model, guide, numpyro.optim.Adam(1e-3), DenoisingScoreMatching(MODEL.sigma))
    x = jnp.asarray(MODEL.data(100))
    state, key = bism.init(jax.random.key(0), x), jax.random.key(1)
    return ais(bism, state, x, rng_key=key, num_temperatures=num_temperatures, num_chains=num_chains)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", choices=["pyro", "numpyro"], default=["pyro", "numpyro"])
    parser.add_argument("--temperatures", type=int, default=1000)
    parser.add_argument("--chains", type=int, default=500)
    args = parser.parse_args()
    for backend in args.backends:
        start = time.perf_counter()
        found = {"pyro": pyro, "numpyro": numpyro}[backend](args.temperatures, args.chains)
        seconds = time.perf_counter() - start
        bounds = f"log Z between {float(found.lower):.2f} and {float(found.upper):.2f}"
        print(f"{backend:8}{seconds:7.1f} s   {bounds}, standard error {float(found.standard_error):.3f}", flush=True)


if __name__ == "__main__":
    main()
