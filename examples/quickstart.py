"""An RBM learns handwritten digits: first the model goes to SVI, then, one line changed, to BiSM.

The model is a Gaussian-Bernoulli RBM on 64 pixels v and 16 binary units h, with the energy

    E(v, h) = ½ ‖(v - b) / s‖² - Σ_j h_j (c_j + W_jᵀ v),

written as an ordinary program whose ``factor`` statements add up to -E. Nobody tells it the normaliser Z.
16 units have 65,536 states, few enough to sum over, so the exact log-likelihood can be had here to check with.

    python examples/quickstart.py                    both backends, two to three minutes
    python examples/quickstart.py --backend pyro     one of them
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data import digits, grbm_log_likelihood
from tables import Run, Theta, describe_posterior, draw, gaussian_log_likelihood, print_table

# Noise of the denoising loss, pixels being in [0, 1]. Score matching with noise learns the density of the *noisy*
# images, so those are held out too. Clean ones have pixels that never vary, where a density has no bound.
SIGMA = 0.3
LEARNING_RATE = 0.02
BETAS = 0.9, 0.95  # Adam's, as in the paper's experiments
INNER_STEPS = 2  # K = N; the default of 5 learns a little better, in twice the time
BATCH_SIZE = 500
NUM_CHUNKS = 20  # how often the likelihood is looked at


# ---- The model and the guide, in Pyro and in NumPyro -----------------------------------------------------------------
#
# One factor a unit, inside a plate of units: that is what lets the units be summed out one by one. Images have the
# shape (n, 1, 64), so that the 1 makes room for the plate. `.mask(False)` takes a site's own density away; the factors
# are all there is. The guide is free to be wrong: its weights are its own, and training has to bring them to W and c.


def pyro_program(start: Theta) -> tuple[Callable, Callable]:
    import pyro
    import pyro.distributions as dist
    import torch

    num_pixels, num_hidden = start["W"].shape
    W, b, c, s = (torch.tensor(start[name], dtype=torch.float32) for name in "Wbcs")

    def model(x):
        weight, visible_bias, hidden_bias = pyro.param("W", W), pyro.param("b", b), pyro.param("c", c)
        scale = pyro.param("s", s, constraint=dist.constraints.positive)
        with pyro.plate("images", len(x), dim=-2):
            x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([num_pixels]).to_event(1).mask(False), obs=x)
            pyro.factor("pixels", -0.5 * (((x - visible_bias) / scale) ** 2).sum(-1))
            with pyro.plate("units", num_hidden, dim=-1):
                h = pyro.sample("h", dist.Bernoulli(0.5).mask(False))
                pyro.factor("unit", h * (hidden_bias + (x @ weight).squeeze(-2)))

    def guide(x):
        weight, bias = pyro.param("guide_W", torch.zeros_like(W)), pyro.param("guide_c", torch.zeros_like(c))
        with pyro.plate("images", len(x), dim=-2), pyro.plate("units", num_hidden, dim=-1):
            logits = bias + (x @ weight).squeeze(-2)
            pyro.sample("h", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})

    return model, guide


def numpyro_program(start: Theta) -> tuple[Callable, Callable]:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    num_pixels, num_hidden = start["W"].shape
    W, b, c, s = (jnp.asarray(start[name], dtype=jnp.float32) for name in "Wbcs")

    def model(x):
        weight, visible_bias, hidden_bias = numpyro.param("W", W), numpyro.param("b", b), numpyro.param("c", c)
        scale = numpyro.param("s", s, constraint=dist.constraints.positive)
        with numpyro.plate("images", len(x), dim=-2):
            x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([num_pixels]).to_event(1).mask(False), obs=x)
            numpyro.factor("pixels", -0.5 * (((x - visible_bias) / scale) ** 2).sum(-1))
            with numpyro.plate("units", num_hidden, dim=-1):
                h = numpyro.sample("h", dist.Bernoulli(0.5).mask(False))
                numpyro.factor("unit", h * (hidden_bias + (x @ weight).squeeze(-2)))

    def guide(x):
        weight, bias = numpyro.param("guide_W", jnp.zeros_like(W)), numpyro.param("guide_c", jnp.zeros_like(c))
        with numpyro.plate("images", len(x), dim=-2), numpyro.plate("units", num_hidden, dim=-1):
            logits = bias + (x @ weight).squeeze(-2)
            numpyro.sample("h", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})

    return model, guide


# ---- Training --------------------------------------------------------------------------------------------------------
#
# SVI and BiSM differ in the line that makes them, and in nothing else. TraceEnum_ELBO sums the units out.


class Progress(NamedTuple):
    """What a backend hands out after every chunk of steps.

    :ivar loss: its mean over the chunk: a sum over the batch for SVI, a mean for BiSM.
    :ivar posterior: the guide's draws for some images, as ArviZ reads them (BiSM only).
    """

    loss: float
    theta: Theta
    posterior: Callable[[np.ndarray], Any]


def fit_pyro(method: str, start: Theta, images: np.ndarray, chunks: np.ndarray) -> Iterator[Progress]:
    import pyro
    import torch
    from pyro.infer import SVI, TraceEnum_ELBO

    from pyro_bism import BiSM, DenoisingScoreMatching, Unrolled, to_arviz

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide = pyro_program(start)
    optim = pyro.optim.Adam({"lr": LEARNING_RATE, "betas": BETAS})
    elbo = TraceEnum_ELBO(max_plate_nesting=2)
    inner = {"inner_loss": elbo, "num_inner_steps": INNER_STEPS, "hypergradient": Unrolled(INNER_STEPS)}
    if method == "SVI":
        engine = SVI(model, guide, optim, loss=elbo)
    else:  # the one line that changes
        engine = BiSM(model, guide, optim, loss=DenoisingScoreMatching(SIGMA, average="score"), **inner)

    def posterior(images):
        return to_arviz(engine, torch.tensor(images)[:, None], num_draws=1000, dims={"h": ["unit"]})

    x = torch.tensor(images)[:, None]
    for chunk in torch.tensor(chunks):
        losses = [engine.step(x[rows]) for rows in chunk]
        theta = {name: pyro.param(name).detach().numpy().copy() for name in "Wbcs"}
        yield Progress(float(np.mean(losses)), theta, posterior)


def fit_numpyro(method: str, start: Theta, images: np.ndarray, chunks: np.ndarray) -> Iterator[Progress]:
    import jax
    import jax.numpy as jnp
    import numpyro
    from numpyro.infer import SVI, TraceEnum_ELBO

    from numpyro_bism import BiSM, DenoisingScoreMatching, Unrolled, to_arviz

    model, guide = numpyro_program(start)
    optim = numpyro.optim.Adam(LEARNING_RATE, *BETAS)
    elbo = TraceEnum_ELBO(max_plate_nesting=2)
    inner = {"inner_loss": elbo, "num_inner_steps": INNER_STEPS, "hypergradient": Unrolled(INNER_STEPS)}
    if method == "SVI":
        engine = SVI(model, guide, optim, loss=elbo)
    else:  # the one line that changes
        engine = BiSM(model, guide, optim, loss=DenoisingScoreMatching(SIGMA, average="score"), **inner)

    def posterior(images):
        v, key = jnp.asarray(images)[:, None], jax.random.key(1)
        return to_arviz(engine, state, v, rng_key=key, num_draws=1000, dims={"h": ["unit"]})

    x = jnp.asarray(images)[:, None]
    state = engine.init(jax.random.key(0), x[:BATCH_SIZE])
    steps = jax.jit(lambda state, chunk: jax.lax.scan(lambda state, rows: engine.update(state, x[rows]), state, chunk))
    for chunk in jnp.asarray(chunks):
        state, losses = steps(state, chunk)
        params = engine.get_params(state)
        theta = {name: np.asarray(params[name]) for name in "Wbcs"}
        yield Progress(float(losses.mean()), theta, posterior)


# ---- What is the same for both ---------------------------------------------------------------------------------------


def train(backend: str, method: str, start: Theta, images: np.ndarray, chunks: np.ndarray, held_out: np.ndarray) -> Run:
    """Run one backend with one method, looking at the exact held-out log-likelihood on the way."""
    fit = {"pyro": fit_pyro, "numpyro": fit_numpyro}[backend](method, start, images, chunks)
    num_chunks, per_chunk, batch_size = chunks.shape
    losses, log_likelihoods, seconds = [], [grbm_log_likelihood(held_out, **start).mean()], 0.0
    with tqdm(total=num_chunks * per_chunk, desc=f"{backend} {method}", unit="step") as bar:
        began = time.perf_counter()
        for progress in fit:
            seconds += time.perf_counter() - began
            losses.append(progress.loss / batch_size if method == "SVI" else progress.loss)
            log_likelihoods.append(grbm_log_likelihood(held_out, **progress.theta).mean())
            bar.update(per_chunk)
            bar.set_postfix_str(f"loss {losses[-1]:.4g}, held-out log-likelihood {log_likelihoods[-1]:.4g}")
            began = time.perf_counter()
    steps = np.arange(num_chunks + 1) * per_chunk
    return Run(backend, method, steps, np.array(losses), np.array(log_likelihoods), seconds, *progress[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["pyro", "numpyro", "both"], default="both")
    parser.add_argument("--steps", type=int, default=1000, help="of each method (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=16, help="binary units, at most about 20 (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("build/quickstart.png"), help="default %(default)s")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model, to see that all runs")
    options = parser.parse_args()
    num_steps, num_hidden = (40, 4) if options.smoke else (options.steps, options.hidden)
    if num_steps < NUM_CHUNKS:
        parser.error(f"--steps must be at least {NUM_CHUNKS}")

    rng = np.random.default_rng(0)
    images, test, _ = digits()
    held_out = np.repeat(test, 10, axis=0)  # ten copies, so that the noise does not decide
    held_out = held_out + SIGMA * rng.standard_normal(held_out.shape)
    start = {
        "W": 0.1 * rng.standard_normal((images.shape[1], num_hidden)),
        "b": images.mean(0),
        "c": np.zeros(num_hidden),
        "s": np.full(images.shape[1], 0.5),
    }
    chunks = rng.integers(len(images), size=(NUM_CHUNKS, num_steps // NUM_CHUNKS, BATCH_SIZE))

    backends = ["pyro", "numpyro"] if options.backend == "both" else [options.backend]
    runs = [train(b, method, start, images, chunks, held_out) for b in backends for method in ("SVI", "BiSM")]

    yardstick = gaussian_log_likelihood(images, held_out, SIGMA)
    print_table(runs, yardstick)
    for run in runs:
        if run.method == "BiSM":
            describe_posterior(run, test[:5])
    draw(runs, yardstick, test, options.output)
    print(f"\nThe figure is in {options.output}.")

    # A demo that went wrong must not look right. A smoke test has no time to overtake the Gaussian.
    floor = runs[0].log_likelihoods[0] if options.smoke else yardstick
    for run in runs:
        if run.method == "BiSM" and not run.log_likelihoods[-1] > floor:
            sys.exit(
                f"{run.backend}: BiSM ended at {run.log_likelihoods[-1]:.2f}, not above {floor:.2f}. More --steps?"
            )


if __name__ == "__main__":
    main()
