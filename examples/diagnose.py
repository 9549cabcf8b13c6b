"""What did it learn? The quickstart's RBM, trained on handwritten digits, before one call that says.

The guide, the chains, the normaliser and the fit each get a verdict with its numbers; the figure shows them.

    python examples/diagnose.py                      both backends, about three minutes
    python examples/diagnose.py --backend numpyro    one of them
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import digits, grbm_log_likelihood
from quickstart import BATCH_SIZE, BETAS, INNER_STEPS, LEARNING_RATE, SIGMA, numpyro_program, pyro_program


def diagnose_pyro(start, images, held_out, rows, options):
    import pyro
    import torch
    from pyro.infer import TraceEnum_ELBO

    from pyro_bism import BiSM, DenoisingScoreMatching, diagnose

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = TraceEnum_ELBO(max_plate_nesting=2)
    optim = pyro.optim.Adam({"lr": LEARNING_RATE, "betas": BETAS})
    loss = DenoisingScoreMatching(SIGMA, average="score")
    bism = BiSM(*pyro_program(start), optim, loss, inner_loss=elbo, num_inner_steps=INNER_STEPS)
    x = torch.tensor(images)[:, None]
    for batch in tqdm(torch.tensor(rows), desc="pyro"):
        bism.step(x[batch])
    found = diagnose(bism, torch.tensor(held_out)[:, None], **options)
    return found, {name: pyro.param(name).detach().numpy() for name in "Wbcs"}


def diagnose_numpyro(start, images, held_out, rows, options):
    import jax
    import jax.numpy as jnp
    import numpyro
    from numpyro.infer import TraceEnum_ELBO

    from numpyro_bism import BiSM, DenoisingScoreMatching, diagnose

    elbo = TraceEnum_ELBO(max_plate_nesting=2)
    optim = numpyro.optim.Adam(LEARNING_RATE, *BETAS)
    loss = DenoisingScoreMatching(SIGMA, average="score")
    bism = BiSM(*numpyro_program(start), optim, loss, inner_loss=elbo, num_inner_steps=INNER_STEPS)
    x = jnp.asarray(images)[:, None]
    state = bism.init(jax.random.key(0), x[:BATCH_SIZE])
    steps = jax.jit(lambda state, rows: jax.lax.scan(lambda state, batch: bism.update(state, x[batch]), state, rows)[0])
    for chunk in tqdm(jnp.asarray(rows).reshape(10, -1, BATCH_SIZE), desc="numpyro, tenths"):
        state = steps(state, chunk)
    found = diagnose(bism, state, jnp.asarray(held_out)[:, None], rng_key=jax.random.key(1), **options)
    return found, {name: np.asarray(value) for name, value in bism.get_params(state).items() if name in "Wbcs"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["pyro", "numpyro", "both"], default="both")
    parser.add_argument("--steps", type=int, default=1000, help="of training (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=16, help="binary units, at most about 20 (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("build"), help="folder for figures (default %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny model, to see that all runs")
    options = parser.parse_args()
    num_steps, num_hidden = (20, 4) if options.smoke else (options.steps, options.hidden)

    import matplotlib

    matplotlib.use("Agg")
    rng = np.random.default_rng(0)
    images, test, _ = digits()
    # the model is one of images with noise on them, so those are held out
    held_out = (test + SIGMA * rng.standard_normal(test.shape)).astype(np.float32)
    start = {
        "W": 0.1 * rng.standard_normal((images.shape[1], num_hidden)),
        "b": images.mean(0),
        "c": np.zeros(num_hidden),
        "s": np.full(images.shape[1], 0.5),
    }
    rows = rng.integers(len(images), size=(num_steps, BATCH_SIZE))
    small = {"num_points": 3, "num_chains": 4, "num_samples": 30, "num_warmup": 20, "num_draws": 100}
    # log Z by annealing although 16 units can be summed over: what most models need
    ais = {"num_temperatures": 30, "num_chains": 20} if options.smoke else {"num_temperatures": 1000}
    settings = {"ais_options": ais, **(small if options.smoke else {"num_samples": 2000})}
    options.output.mkdir(parents=True, exist_ok=True)
    for backend in ["pyro", "numpyro"] if options.backend == "both" else [options.backend]:
        run = {"pyro": diagnose_pyro, "numpyro": diagnose_numpyro}[backend]
        found, theta = run(start, images, held_out, rows, settings)
        exact = grbm_log_likelihood(held_out, **theta).mean()
        print(f"\n{backend}: an RBM of {num_hidden} units on {len(images)} digits, looked at on {len(test)} others")
        print(found)
        print(f"log-likelihood by enumeration outside of the package: {exact:.3f} nats a row")
        figure = options.output / f"diagnose-{backend}.png"
        found.plot().savefig(figure, dpi=120)
        found.data.to_netcdf(str(options.output / f"diagnose-{backend}.nc"))
        print(f"The figure is in {figure}, the draws beside it.")
        estimate = float(np.mean(np.asarray(found.log_likelihood.value)))
        error = float(np.mean(np.asarray(found.log_likelihood.standard_error)))
        if not abs(estimate - exact) < 5 * error + 0.01:
            sys.exit(f"{backend}: log-likelihood {estimate:.3f} is not the exact {exact:.3f}")


if __name__ == "__main__":
    main()
