"""The paper's toy density: a Gaussian-Bernoulli RBM of 4 hidden units on a checkerboard of two squares.

With ``Unrolled(5)`` the exact log-likelihood comes close to what the exact marginal score reaches; with
``Detached()`` it stays below zero, because the hidden biases get no gradient at all (Bao et al. 2020).

    python examples/checkerboard.py                              NumPyro, Unrolled(5), 100,000 steps
    python examples/checkerboard.py --hypergradient detached
    python examples/checkerboard.py --hypergradient amortized --steps 50000
    python examples/checkerboard.py --backend pyro --steps 5000
    python examples/checkerboard.py --latents summed             summed out instead of relaxed
"""

import argparse
import time
from pathlib import Path

import numpy as np
from tqdm import trange

from data import checkerboard, grbm_log_likelihood

VISIBLE, HIDDEN, BATCH_SIZE, SIGMA, TEMPERATURE = 2, 4, 100, 0.05, 0.1
RATE, BETAS = 1e-3, (0.9, 0.95)
STRATEGIES = ["Unrolled", "Detached", "Amortized", "Implicit", "Penalty", "Covariance", "Exact"]
ENTROPY_BOUND = np.log(2)  # half of the unit square, uniformly


def train_numpyro(x, strategy, settings, summed, steps, seed):
    """Parameters after ``steps`` steps, and the seconds that they took."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    import optax
    from numpyro.infer import Trace_ELBO, TraceEnum_ELBO

    import numpyro_bism
    from numpyro_bism import BiSM, ConcreteBernoulli, DenoisingScoreMatching

    def weights(key):
        return 0.1 * jax.random.normal(key, (VISIBLE, HIDDEN))

    def model(x):
        W, b, c = (
            numpyro.param("W", weights),
            numpyro.param("b", jnp.zeros(VISIBLE)),
            numpyro.param("c", jnp.zeros(HIDDEN)),
        )
        log_s = numpyro.param("log_s", jnp.zeros(VISIBLE))
        with numpyro.plate("points", len(x), subsample_size=BATCH_SIZE, dim=-2) as rows:
            v = numpyro.sample("v", dist.Normal(0, 1).expand([VISIBLE]).to_event(1).mask(False), obs=x[rows])
            numpyro.factor("quadratic", -0.5 * jnp.square((v - b) * jnp.exp(-log_s)).sum(-1))
            with numpyro.plate("units", HIDDEN, dim=-1):
                h = numpyro.sample("h", dist.Bernoulli(0.5).mask(False))
                numpyro.factor("unit", h * (c + (v @ W).squeeze(-2)))

    def guide(x):
        W, b = numpyro.param("guide_W", weights), numpyro.param("guide_b", jnp.zeros(HIDDEN))
        with numpyro.plate("points", len(x), subsample_size=BATCH_SIZE, dim=-2) as rows:
            logits = b + (x[rows] @ W).squeeze(-2)
            with numpyro.plate("units", HIDDEN, dim=-1):
                if summed:
                    numpyro.sample("h", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})
                else:
                    numpyro.sample("h", ConcreteBernoulli(TEMPERATURE, logits))

    bism = BiSM(
        model,
        guide,
        optax.adam(RATE, *BETAS),
        loss=DenoisingScoreMatching(SIGMA, average="score" if summed else "loss"),
        inner_loss=TraceEnum_ELBO(max_plate_nesting=2) if summed else Trace_ELBO(),
        hypergradient=getattr(numpyro_bism, strategy)(*settings),
    )
    start = time.perf_counter()
    result = bism.run(jax.random.key(seed), steps, x[:, None])
    return {name: np.asarray(result.params[name]) for name in ("W", "b", "c", "log_s")}, time.perf_counter() - start


def train_pyro(x, strategy, settings, summed, steps, seed):
    """Parameters after ``steps`` steps, and the seconds that they took."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import Trace_ELBO, TraceEnum_ELBO

    import pyro_bism
    from pyro_bism import BiSM, ConcreteBernoulli, DenoisingScoreMatching

    pyro.set_rng_seed(seed)
    pyro.clear_param_store()

    def weights():
        return 0.1 * torch.randn(VISIBLE, HIDDEN)

    def model(x):
        W, b, c = pyro.param("W", weights), pyro.param("b", torch.zeros(VISIBLE)), pyro.param("c", torch.zeros(HIDDEN))
        log_s = pyro.param("log_s", torch.zeros(VISIBLE))
        with pyro.plate("points", len(x), subsample_size=BATCH_SIZE, dim=-2) as rows:
            v = pyro.sample("v", dist.Normal(0, 1).expand([VISIBLE]).to_event(1).mask(False), obs=x[rows])
            pyro.factor("quadratic", -0.5 * ((v - b) * torch.exp(-log_s)).square().sum(-1))
            with pyro.plate("units", HIDDEN, dim=-1):
                h = pyro.sample("h", dist.Bernoulli(0.5).mask(False))
                pyro.factor("unit", h * (c + (v @ W).squeeze(-2)))

    def guide(x):
        W, b = pyro.param("guide_W", weights), pyro.param("guide_b", torch.zeros(HIDDEN))
        with pyro.plate("points", len(x), subsample_size=BATCH_SIZE, dim=-2) as rows:
            logits = b + (x[rows] @ W).squeeze(-2)
            with pyro.plate("units", HIDDEN, dim=-1):
                if summed:
                    pyro.sample("h", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})
                else:
                    pyro.sample("h", ConcreteBernoulli(TEMPERATURE, logits))

    bism = BiSM(
        model,
        guide,
        pyro.optim.Adam({"lr": RATE, "betas": BETAS}),
        loss=DenoisingScoreMatching(SIGMA, average="score" if summed else "loss"),
        inner_loss=TraceEnum_ELBO(max_plate_nesting=2) if summed else Trace_ELBO(),
        hypergradient=getattr(pyro_bism, strategy)(*settings),
    )
    data = torch.from_numpy(x[:, None])
    start = time.perf_counter()
    for _ in trange(steps):
        bism.step(data)
    params = {name: pyro.param(name).detach().numpy() for name in ("W", "b", "c", "log_s")}
    return params, time.perf_counter() - start


def log_likelihood(params, v):
    """Exact log p(v) of the trained RBM, by enumeration of its 16 hidden states."""
    return grbm_log_likelihood(v, params["b"], params["c"], params["W"], np.exp(params["log_s"]))


def expected_log_likelihood(params, cells=400):
    """E log p(v) over the true density, by midpoints of a grid on its two squares: no test set's luck in it."""
    middle = (np.arange(cells) + 0.5) / (2 * cells)
    square = np.stack(np.meshgrid(middle, middle), -1).reshape(-1, 2)
    return float(np.mean([log_likelihood(params, square + corner).mean() for corner in (0.0, 0.5)]))


def picture(params, x, title, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axis = np.linspace(-0.25, 1.25, 301)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    density = np.exp(log_likelihood(params, grid)).reshape(301, 301)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.6), sharex=True, sharey=True, layout="constrained")
    left.plot(*x[:2000].T, ".", markersize=1.5, color="#005f73")
    left.set(title="data", xlabel="$v_1$", ylabel="$v_2$", aspect="equal")
    image = right.pcolormesh(axis, axis, density, cmap="cividis", rasterized=True)
    right.set(title=title, xlabel="$v_1$", aspect="equal")
    figure.colorbar(image, ax=right, label="learnt density")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--hypergradient", default="unrolled", choices=[name.lower() for name in STRATEGIES])
    parser.add_argument("--unroll", type=int, default=5, metavar="N", help="N of Unrolled(N)")
    parser.add_argument("--latents", choices=["relaxed", "summed"], default="relaxed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/checkerboard.png"))
    args = parser.parse_args()
    x = checkerboard(50_000, np.random.default_rng(1234))
    strategy = next(name for name in STRATEGIES if name.lower() == args.hypergradient)
    settings = (args.unroll,) if strategy == "Unrolled" else ()
    train = {"numpyro": train_numpyro, "pyro": train_pyro}[args.backend]
    params, seconds = train(x, strategy, settings, args.latents == "summed", args.steps, args.seed)
    value = expected_log_likelihood(params)
    name = f"{strategy}({args.unroll if settings else ''})"
    picture(params, x, f"{name}: {value:.3f} nats", args.output)
    print(f"{args.backend}, {name}, {args.latents} latents, {args.steps:,} steps, {seconds:.0f} s")
    print(f"expected log-likelihood {value:.3f} nats (no density can have more than {ENTROPY_BOUND:.3f})")
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
