"""Does ``hypergradient_error`` tell the truth? Its estimate beside the error against the marginal's exact gradient.

The problems are those of examples/problems.py, which have marginals in closed form or by quadrature. Each is trained by
several strategies for a while; then the model stands still, the guide goes on, and the mean of many hypergradients is
compared with that of the exact marginal's gradients, in the units that the estimate takes: every entry's root mean
square. What counts is the order: the rank correlation of estimate and truth over all runs.

    python examples/hypergradient_errors.py                                     about two hours on one core
    python examples/hypergradient_errors.py --strategies None "Detached()" --gradients 2000          about one
    python examples/hypergradient_errors.py --problems "deep energy" --steps 100 --draws 200
"""

import argparse
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr  # scikit-learn brings SciPy
from tqdm import tqdm

import numpyro_bism as bism
import results_file
from hypergradients import tally
from problems import BATCH_SIZE, PROBLEMS, engine

STRATEGIES = ["None", "Amortized()", "Unrolled(5)", "Detached()"]


def moments(sums, num):
    """Mean, mean square, and the noise of the mean, by parameter."""
    first, second = (jax.tree.map(lambda x: np.asarray(x, np.float64) / num, part) for part in sums)
    return {name: (first[name], second[name], (second[name] - first[name] ** 2) / num) for name in first}


def true_error(problem, strategy, params, num):
    """‖E[hypergradient] - dJ/dθ‖ / ‖dJ/dθ‖ where the model stands still; NaN where there is no gradient."""
    x = jnp.asarray(problem.x)
    standing = engine(problem, strategy, tally())
    state = standing.init(jax.random.key(2), x, init_params=params)
    sums = []
    for _ in range(6):  # runs of one length, compiled once; in the first what is carried from step to step settles
        state = standing.run(None, num // 5, x, init_state=state, progress_bar=False).state
        _, (_, tallied) = state.optim_state
        sums.append(jax.tree.map(np.asarray, tallied))
    num = 5 * (num // 5)
    found = moments(jax.tree.map(lambda a, b: a.astype(np.float64) - b, sums[-1], sums[0]), num)
    theta = {name: jnp.asarray(params[name]) for name in found}

    def marginal(theta, key):
        key_rows, key_noise = jax.random.split(key)
        v = x[jax.random.choice(key_rows, len(x), (BATCH_SIZE,), replace=False)].reshape(BATCH_SIZE, -1)

        def score(u):
            return jax.vmap(jax.grad(problem.log_marginal, 1), (None, 0))(theta, u)

        return problem.loss(score, v, problem.loss.draw(key_noise, v)).mean()

    def add(sums, key):
        gradient = jax.grad(marginal)(theta, key)
        return jax.tree.map(jnp.add, sums, (gradient, jax.tree.map(jnp.square, gradient))), None

    zeros = jax.tree.map(jnp.zeros_like, (theta, theta))
    exact = moments(
        jax.jit(lambda keys: jax.lax.scan(add, zeros, keys)[0])(jax.random.split(jax.random.key(3), num)), num
    )
    square = length = 0.0
    for name, (mean, unit, noise) in exact.items():
        weight = np.divide(1.0, unit, out=np.zeros_like(unit), where=unit > 0)
        off, _, noise_off = found[name]
        square += (weight * ((off - mean) ** 2 - noise - noise_off)).sum()
        length += (weight * (mean**2 - noise)).sum()
    return float(np.sqrt(max(square, 0) / length)) if length > 0 else float("nan")


def row(problem, strategy, steps, draws, gradients):
    x = jnp.asarray(problem.x)
    trained = engine(problem, strategy)
    result = trained.run(jax.random.key(0), steps, x, progress_bar=False)
    key = jax.random.key(1)
    found = bism.hypergradient_error(trained, result.state, x, rng_key=key, num_draws=draws, progress_bar=False)
    params = {name: np.asarray(value) for name, value in result.params.items()}
    value, noise, _ = found.held
    true = true_error(problem, strategy, params, gradients)
    return {"true": true, "estimate": value, "standard error": noise, "verdict": found.verdict}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--steps", type=int, help="of training; the default is a 25th of the problem's own")
    parser.add_argument("--draws", type=int, default=500, help="of the estimate")
    parser.add_argument("--gradients", type=int, default=10_000, help="that the truth is a mean of")
    parser.add_argument("--output", type=Path, default=Path("build"))
    args = parser.parse_args()
    path = args.output / "hypergradient_errors.json"
    about = {"steps": args.steps, "draws": args.draws, "gradients": args.gradients}
    found = results_file.load(parser, path, about)
    for name, strategy in tqdm(list(itertools.product(args.problems, args.strategies)), desc="runs"):
        if strategy in found.setdefault(name, {}):
            continue
        problem = PROBLEMS[name]()
        steps = args.steps or problem.steps // 25
        found[name][strategy] = row(problem, strategy, steps, args.draws, args.gradients)
        results_file.save(path, about, found)
    print("| problem | strategy | true | estimate | verdict |\n|---|---|---|---|---|")
    pairs = []
    for name, strategy in itertools.product(args.problems, args.strategies):
        r = found[name][strategy]
        estimate = f"{r['estimate']:.3f} ± {r['standard error']:.3f}"
        print(f"| {name} | `{strategy}` | {r['true']:.3f} | {estimate} | {r['verdict']} |")
        pairs.append((r["true"], r["estimate"]))
    told = np.array([pair for pair in pairs if np.isfinite(pair).all()])
    if len(told) > 2:
        print(f"\nrank correlation over {len(told)} of {len(pairs)} runs: {spearmanr(*told.T).statistic:.2f}")


if __name__ == "__main__":
    main()
