"""The paper's study of N and K: a Gaussian-Bernoulli RBM of 560 x 400 units on the Frey faces.

N steps of the guide are unrolled and K kept, as in Figure 3 of Bao et al. (2020); settings and initialisation are those
of the authors' published code (Adam 2e-4, batches of 100, σ = 0.3, 20,000 steps). The log-likelihood of the held-out
faces is exact but for log Z, which is annealed; the Fisher divergence is exact but for a constant of the data's own.
The numbers are written after every run, and a second call goes on where the first one stopped.

    python examples/paper_freyface.py --data freyface.npz                    the sixteen runs: four hours on two cores
    python examples/paper_freyface.py --data freyface.npz --pairs 0,5 5,5    some of them: N,K
    python examples/paper_freyface.py                                        scikit-learn's digits, 64 x 64 units
    python examples/paper_freyface.py --smoke                                a few steps, to see that all runs
"""

import argparse
import itertools
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from scipy.special import expit  # scikit-learn brings SciPy
from tqdm import tqdm

import results_file
from data import Split, digits, frey_faces
from paper_checkerboard import Setting, numpyro_backend, pyro_backend, start

SIGMA, RATE, BATCH_SIZE = 0.3, 2e-4, 100
NUM_SAMPLES = 24
NAMED = {"default": None, "amortised": "Amortized"}  # hypergradients beside the paper's


def engine(backend: SimpleNamespace, n: int | str, k: int):
    """BiSM with N unrolled steps, none for N = 0, and K kept ones; or with the hypergradient of that name."""
    b = backend.bism
    if isinstance(n, str):
        hypergradient = getattr(b, NAMED[n])() if NAMED[n] else None
    else:
        hypergradient = b.Unrolled(n) if n else b.Detached()
    return b.BiSM(
        backend.model,
        backend.guide,
        backend.adam(),
        b.DenoisingScoreMatching(SIGMA),
        inner_loss=backend.elbo,
        num_inner_steps=k,
        hypergradient=hypergradient,
        **backend.compiled,
    )


def judged(backend: SimpleNamespace, params: dict, x: np.ndarray, seed: int, temperatures: int, sweeps: int) -> dict:
    """Log-likelihood of x and its standard error, Fisher divergence, bounds of log Z, and draws without their noise."""
    b = backend.bism
    method = b.MarginalSM(backend.model, backend.adam(), b.DenoisingScoreMatching(SIGMA))
    annealing = {"num_temperatures": temperatures, "progress_bar": False}
    chains = {"kernel": b.Gibbs(), "num_samples": 1, "num_warmup": sweeps, "progress_bar": False}
    if b.__name__ == "numpyro_bism":
        import jax
        import jax.numpy as jnp

        keys = list(jax.random.split(jax.random.key(seed), 5))
        v, init = jnp.asarray(x)[:, None], {name: jnp.asarray(value) for name, value in params.items()}
        state = method.init(keys[0], v, init)
        log_z = b.ais(method, state, v, init, rng_key=keys[1], **annealing)
        value, error, _ = b.log_likelihood(method, state, v, init, rng_key=keys[2], log_normalizer=log_z)
        fisher = b.fisher_divergence(method, state, v, init, rng_key=keys[3])
        draws = b.run_chains(method, state, v, init, rng_key=keys[4], num_chains=NUM_SAMPLES, **chains)
    else:
        import pyro
        import torch

        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        v, init = torch.tensor(x)[:, None], {name: torch.tensor(value) for name, value in params.items()}
        log_z = b.ais(method, v, init, **annealing)
        value, error, _ = b.log_likelihood(method, v, init, log_normalizer=log_z)
        fisher = b.fisher_divergence(method, v, init)
        draws = b.run_chains(method, v, init, num_chains=NUM_SAMPLES, **chains)
    v = np.asarray(draws.values["v"]).reshape(-1, x.shape[1])[:NUM_SAMPLES]
    return {
        "log_likelihood": float(np.mean(np.asarray(value))),
        "standard_error": float(np.asarray(error).mean()),  # of log Z, which is the same for all rows
        "fisher_divergence": float(fisher.value),
        "bounds": [log_z.lower, log_z.upper],
        "draws": denoised(v, params).round(3).tolist(),
    }


def denoised(v: np.ndarray, params: dict) -> np.ndarray:
    """E[x | v], where v is x with noise of scale σ, as the model has learned it: v + σ² ∇_v log p(v).

    Tweedie's formula (Robbins 1956; Miyasawa 1961).
    """
    W, b, c, log_s = (params[name] for name in ("W", "b", "c", "log_s"))
    score = (b - v) * np.exp(-2 * log_s) + expit(c + v @ W) @ W.T
    return v + SIGMA**2 * score


def parsed(pair: str) -> tuple[int | str, int]:
    """N, or the name of another hypergradient, and K."""
    first, _, second = pair.partition(",")
    if not (first in NAMED or first.isdecimal()) or not second.isdecimal():
        raise argparse.ArgumentTypeError(f"{pair!r} is not N,K: two whole numbers, or {' or '.join(NAMED)} for N")
    return first if first in NAMED else int(first), int(second)


def picture(results: dict, data: Split, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(1.2, 1), layout="constrained")
    grid = [run for run in results.values() if isinstance(run["N"], int)]
    fitted = [run["log_likelihood"] for run in results.values() if run["K"] > 0]
    low, high = (min(fitted) - 2, max(fitted) + 2) if fitted else (-np.inf, np.inf)  # without K = 0, far off
    for k in sorted({run["K"] for run in grid}):
        runs = sorted((run for run in grid if run["K"] == k), key=lambda run: run["N"])
        n, value = [run["N"] for run in runs], [run["log_likelihood"] for run in runs]
        left.plot(n, value, "o-", label=f"K = {k}" + ", below" * (max(value) < low))
    others = [run for run in results.values() if isinstance(run["N"], str)]
    for run, style in zip(others, itertools.cycle(("--", ":", "-.")), strict=False):
        left.axhline(run["log_likelihood"], color="black", linestyle=style, label=f"{run['N']}, K = {run['K']}")
    if fitted:
        left.set_ylim(low, high)
    left.set(xlabel="N, unrolled steps", ylabel="held-out log-likelihood, nats", title="what N and K buy")
    left.legend()
    left.grid(alpha=0.3)
    name, best = max(results.items(), key=lambda item: item[1]["log_likelihood"])
    rows = [
        np.concatenate([image.reshape(data.shape) for image in row], 1)
        for row in np.array(best["draws"]).reshape(3, -1, data.train.shape[1])
    ]
    right.imshow(np.concatenate(rows), cmap="gray", vmin=0, vmax=1)
    right.set(title=f"draws, denoised: {name}")
    right.axis("off")
    figure.savefig(path, dpi=150)


def table(results: dict) -> str:
    lines = ["| run | log-likelihood, nats | log Z between | Fisher divergence | seconds |", "|---|---|---|---|---|"]
    for name, run in results.items():
        value = f"{run['log_likelihood']:.2f} ± {run['standard_error']:.2f}"
        low, high = run["bounds"]
        lines.append(
            f"| {name} | {value} | {low:.1f}, {high:.1f} | {run['fisher_divergence']:.1f} | {run['seconds']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["numpyro", "pyro"], default="numpyro")
    parser.add_argument("--data", help="the Frey faces; also by the environment variable BISM_DATA")
    parser.add_argument(
        "--pairs",
        nargs="+",
        type=parsed,
        metavar="N,K",
        help=f"N,K of the runs, or {' or '.join(NAMED)} for N; all of 0, 1, 5 and 10 if none",
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/paper_freyface"), help="a picture and the numbers")
    parser.add_argument("--smoke", action="store_true", help="a few steps of two runs, to see that all runs")
    args = parser.parse_args()
    given = args.data or os.environ.get("BISM_DATA")
    data = frey_faces(given) if given and not args.smoke else digits()
    d = data.train.shape[1]
    setting = Setting(d, 400 if d == 560 else 8 if args.smoke else 64, BATCH_SIZE, RATE, SIGMA)
    steps, temperatures, sweeps = (20, 20, 20) if args.smoke else (args.steps, 1000, 1000)
    pairs = args.pairs or [*itertools.product((0, 1, 5, 10), repeat=2), *((name, 5) for name in NAMED)]
    pairs = [(1, 1), ("default", 1)] if args.smoke else pairs
    make = {"numpyro": numpyro_backend, "pyro": pyro_backend}[args.backend]
    backend, whole = make(setting), make(setting._replace(batch_size=None))
    path = args.output.with_suffix(".json")
    about = {"backend": args.backend, "steps": steps, "seed": args.seed, "setting": list(setting)}
    results = results_file.load(parser, path, about)
    with tqdm(pairs) as bar:
        for n, k in bar:
            name = f"{n}, K = {k}" if isinstance(n, str) else f"N = {n}, K = {k}"
            bar.set_postfix_str(name)
            if name in results:
                continue
            begun = time.perf_counter()
            made, begin = engine(backend, n, k), start(args.seed, setting)
            ((params, _),) = backend.train(made, data.train[:, None], begin, args.seed, [steps])
            seconds = time.perf_counter() - begun
            found = judged(whole, params, data.test, args.seed, temperatures, sweeps)
            results[name] = {"N": n, "K": k, "seconds": seconds, **found}
            results_file.save(path, about, results)
    print(f"{args.backend}, {setting.visible} x {setting.hidden} units, {steps:,} steps, seed {args.seed}")
    print(table(results))
    picture(results, data, args.output.with_suffix(".png"))
    print(f"The figure is in {args.output.with_suffix('.png')}, the numbers beside it.")


if __name__ == "__main__":
    main()
