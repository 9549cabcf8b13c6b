"""Couplings of sparse Ising models: a posterior with sparsity priors against point estimates (Ingraham and Marks 2017).

A ferromagnet on a 4 x 4 x 4 torus and spin glasses on sparse random graphs of 100 spins; draws of them by tempered
Gibbs sampling, and the root-mean-square error of the couplings that each method finds in them. Graphs, sample sizes and
rivals are those of the authors' published code, whose point estimates have an L1 penalty of cross-validated strength;
without one they are here too. The numbers are written after every run, and a second call goes on where the first one
stopped.

With --data, a table of binary columns instead: the posterior of its couplings, as ArviZ sees it.

    python examples/sparse_ising.py                           both graphs, three seeds, 500 to 2,000 draws: an hour
    python examples/sparse_ising.py --graphs glass --draws 500 --seeds 0
    python examples/sparse_ising.py --data adhd.csv --omit group       symptoms: 0/1 columns, others are left out
    python examples/sparse_ising.py --smoke                   12 spins and few steps, to see that all runs
"""

import argparse
import csv
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import init_to_median
from numpyro.infer.autoguide import AutoNormal
from tqdm import tqdm

import results_file
from numpyro_bism import CD, Gibbs, PersistentVI, PseudoLikelihood, to_arviz

MEAN_DEGREE = 2  # of the random graph
RATE, LAST_RATE = 2e-2, 1e-3
PENALTIES = (0.5, 1.0, 1.5, 2.0)  # in standard errors of the loss's gradient where there is no coupling
PRESENT = 0.1  # a coupling of this size is one


def torus(side: int) -> np.ndarray:
    """Couplings 0.2 between neighbours on a torus of side³ spins ±1, shape (d, d), symmetric.

    The critical coupling of the infinite lattice is 0.2217.
    """
    cells = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    gap = np.abs(cells[:, None] - cells[None])
    distance = np.minimum(gap, side - gap).sum(-1)
    return 0.2 * (distance == 1)


def random_graph(num_spins: int, rng: np.random.Generator) -> np.ndarray:
    """Normal couplings on an Erdős-Rényi graph, their variance one over its mean degree; (d, d), symmetric."""
    edges = np.triu(rng.uniform(size=(num_spins, num_spins)) < MEAN_DEGREE / num_spins, 1)
    couplings = edges * rng.normal(scale=MEAN_DEGREE**-0.5, size=edges.shape)
    return couplings + couplings.T


def draws_of(J: np.ndarray, num_draws: int, num_sweeps: int, seed: int) -> np.ndarray:
    """Spins ±1 of exp(½ sᵀJs) by Gibbs sampling, annealed from a high temperature, one chain a draw; (num_draws, d)."""
    J = jnp.asarray(J, jnp.float32)

    @jax.jit
    def run(key):
        def sweep(s, now):
            key, beta = now

            def one(j, s):
                odds = 2 * beta * s @ J[:, j]
                up = jax.random.bernoulli(jax.random.fold_in(key, j), jax.nn.sigmoid(odds))
                return s.at[:, j].set(2.0 * up - 1.0)

            return jax.lax.fori_loop(0, len(J), one, s), None

        betas = jnp.minimum(jnp.linspace(0, 2, num_sweeps), 1)
        start = jax.random.rademacher(key, (num_draws, len(J)), jnp.float32)
        return jax.lax.scan(sweep, start, (jax.random.split(key, num_sweeps), betas))[0]

    return np.asarray(run(jax.random.key(seed)))


@functools.lru_cache(maxsize=1)
def problem(graph: str, num_draws: int, seed: int, smoke: bool) -> tuple[np.ndarray, np.ndarray]:
    """The couplings, and bits drawn of them."""
    if graph == "ferromagnet":
        J = torus(2 if smoke else 4)
    else:
        J = random_graph(12 if smoke else 100, np.random.default_rng(seed))
    return J, (draws_of(J, num_draws, 50 if smoke else 1000, seed) + 1) / 2


def spins(x, J, b):
    """Observes bits x as spins ±1 of exp(½ sᵀJs + bᵀs), J of shape (d, d) by its upper triangle."""
    with numpyro.plate("data", len(x)):
        v = numpyro.sample("v", dist.Bernoulli(0.5).expand([x.shape[1]]).to_event(1).mask(False), obs=x)
        s = 2.0 * v - 1.0
        numpyro.factor("energy", ((s @ jnp.triu(J, 1)) * s).sum(-1) + s @ b)


def square(upper, d):
    """A (d, d) matrix with these numbers above its diagonal."""
    return jnp.zeros((d, d)).at[jnp.triu_indices(d, 1)].set(upper)


def point_model(x):
    d = x.shape[1]
    upper = numpyro.param("J", jnp.zeros(d * (d - 1) // 2))
    spins(x, square(upper, d), numpyro.param("b", jnp.zeros(d)))


def gaussian_model(x):
    """Couplings with one Gaussian prior, its scale learnt."""
    d = x.shape[1]
    scale = numpyro.sample("scale", dist.HalfCauchy(1.0))
    unit = numpyro.sample("unit", dist.Normal(0.0, 1.0).expand([d * (d - 1) // 2]).to_event(1))
    upper = numpyro.deterministic("J", scale * unit)
    spins(x, square(upper, d), numpyro.sample("b", dist.Normal(0.0, 1.0).expand([d]).to_event(1)))


def horseshoe_model(x):
    """Couplings of a scale each, all of half-Cauchy law: the non-centred horseshoe."""
    d = x.shape[1]
    scale = numpyro.sample("scale", dist.HalfCauchy(1.0))
    local = numpyro.sample("local", dist.HalfCauchy(1.0).expand([d * (d - 1) // 2]).to_event(1))
    unit = numpyro.sample("unit", dist.Normal(0.0, 1.0).expand([d * (d - 1) // 2]).to_event(1))
    upper = numpyro.deterministic("J", scale * local * unit)
    spins(x, square(upper, d), numpyro.sample("b", dist.Normal(0.0, 1.0).expand([d]).to_event(1)))


def adam(steps: int) -> optax.GradientTransformation:
    """Of one rate for all methods."""
    return optax.adam(optax.exponential_decay(RATE, steps, LAST_RATE / RATE))


def penalised(optim: optax.GradientTransformation, strength: float) -> optax.GradientTransformation:
    """The optimiser of the loss with strength · Σ_{i<j} |J_ij| added."""

    def add(gradient, params):
        return {**gradient, "J": gradient["J"] + strength * jnp.sign(params["J"])}

    return optax.chain(optax.stateless(add), optim)


def cross_validated(x, steps, seed) -> float:
    """The penalty under which the pseudo-likelihood of a held-out fifth is greatest, in standard errors."""
    num_held = len(x) // 5
    train, held = x[num_held:], x[:num_held]
    losses = []
    for penalty in PENALTIES:
        method = PseudoLikelihood(point_model, penalised(adam(steps), 2 * penalty / len(train) ** 0.5))
        state = method.run(jax.random.key(seed), steps, train, progress_bar=False).state
        losses.append(float(method.evaluate(state, held)))
    return PENALTIES[int(np.argmin(losses))]


def small(site=None):
    """Where the guide starts: at the medians, but at a common scale of e⁻³, as in the authors' code."""
    if site is None:
        return functools.partial(small)
    return jnp.exp(-3.0) if site["type"] == "sample" and site["name"] == "scale" else init_to_median(site)


def vi(model, steps, num_chains):
    guide = AutoNormal(model, init_loc_fn=small, init_scale=0.1)
    return PersistentVI(model, guide, adam(steps), Gibbs(), num_chains=num_chains)


def posterior_mean(model, x, steps, num_chains, seed):
    method = vi(model, steps, num_chains)
    state = method.run(jax.random.key(seed), steps, x, progress_bar=False).state
    key = jax.random.key(seed + 1)
    draws = method.posterior(state, x, rng_key=key, num_draws=1000)
    return method.deterministics(state, draws, x, rng_key=key)["J"].mean(0)


def point(method, x, steps, seed):
    return method.run(jax.random.key(seed), steps, x, progress_bar=False).params["J"]


def persistent(optim, num_chains):
    return CD(point_model, optim, Gibbs(), persistent=True, num_chains=num_chains)


# each takes data, steps, chains, seed and the penalty in standard errors: of the likelihood's gradient in a coupling,
# 1/√n, and of the pseudo-likelihood's, which sees a coupling from both of its ends, 2/√n
METHODS = {
    "pseudo-likelihood": lambda x, steps, chains, seed, c: point(
        PseudoLikelihood(point_model, adam(steps)), x, steps, seed
    ),
    "pseudo-likelihood, L1": lambda x, steps, chains, seed, c: point(
        PseudoLikelihood(point_model, penalised(adam(steps), 2 * c / len(x) ** 0.5)), x, steps, seed
    ),
    "PCD": lambda x, steps, chains, seed, c: point(persistent(adam(steps), chains), x, steps, seed),
    "PCD, L1": lambda x, steps, chains, seed, c: point(
        persistent(penalised(adam(steps), c / len(x) ** 0.5), chains), x, steps, seed
    ),
    "PVI, Gaussian": lambda x, steps, chains, seed, c: posterior_mean(gaussian_model, x, steps, chains, seed),
    "PVI, horseshoe": lambda x, steps, chains, seed, c: posterior_mean(horseshoe_model, x, steps, chains, seed),
}


def table(path: Path, omit: list[str]) -> tuple[np.ndarray, list[str]]:
    """The columns of a CSV file that hold 0 and 1 alone, and their names, but for those to omit.

    :raises ValueError: if there are fewer than two of them, or the file is no table.
    """
    try:
        with path.open(encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} can't be read as a CSV file: {error}") from error
    names = [name for name in columns if name not in omit and {row[name] for row in rows} <= {"0", "1"}]
    if len(names) < 2:
        raise ValueError(f"{path} has {len(names)} columns of 0 and 1 alone besides {omit}: two at least are needed")
    return np.array([[float(row[name]) for name in names] for row in rows], np.float32), names


def report_table(x: np.ndarray, names: list[str], steps: int, num_chains: int, seed: int, output: Path) -> None:
    """The horseshoe's posterior of the table's couplings: ArviZ's summary of the surest, and a picture of all."""
    import arviz as az

    pairs = np.transpose(np.triu_indices(len(names), 1))
    method = vi(horseshoe_model, steps, num_chains)
    begun = time.perf_counter()
    state = method.run(jax.random.key(seed), steps, x).state
    labels = [f"{names[a]} - {names[b]}" for a, b in pairs]
    dims = {"J": ["pair"], "unit": ["pair"], "local": ["pair"], "b": ["column"]}
    coords = {"pair": labels, "column": names}
    tree = to_arviz(method, state, x, rng_key=jax.random.key(seed + 1), num_draws=4000, dims=dims, coords=coords)
    seconds = time.perf_counter() - begun
    J = tree["posterior"]["J"]
    inclusion = (abs(J) > PRESENT).mean(("chain", "draw"))
    summary = az.summary(tree, var_names=["J"], kind="stats")
    summary[f"P(|J| > {PRESENT})"] = inclusion.values.round(3)
    order = np.argsort(-inclusion.values - 1e-6 * abs(J.mean(("chain", "draw"))).values, kind="stable")
    print(f"{len(x)} rows, {len(names)} columns, {steps} steps, seed {seed}, {seconds:.0f} s")
    print(summary.iloc[order[:15]].to_string())
    sure, out = int((inclusion > 0.9).sum()), int((inclusion < 0.1).sum())
    print(f"of {len(pairs)} pairs {sure} have P(|J| > {PRESENT}) above 0.9 and {out} below 0.1")
    picture(J, inclusion.values, names, order[:20], output)
    print(f"picture: {output}")


def picture(J: Any, inclusion: np.ndarray, names: list[str], strongest: np.ndarray, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    d = len(names)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    matrix = np.full((d, d), np.nan)
    matrix[np.triu_indices(d, 1)] = inclusion
    image = left.imshow(np.fmax(matrix, matrix.T), cmap="cividis", vmin=0, vmax=1)
    left.set(title=f"posterior probability that |J| > {PRESENT}")
    left.set_xticks(range(d), names, rotation=90)
    left.set_yticks(range(d), names)
    figure.colorbar(image)
    draws = J.isel(pair=strongest).stack(sample=("chain", "draw"))
    low, inner_low, middle, inner_high, high = draws.quantile([0.03, 0.25, 0.5, 0.75, 0.97], "sample").values
    rows = np.arange(len(strongest))
    right.hlines(rows, low, high, lw=1.2)
    right.hlines(rows, inner_low, inner_high, lw=4)
    right.plot(middle, rows, "o", c="white", mec="C0", zorder=3)
    right.axvspan(-PRESENT, PRESENT, color="0.9", zorder=0)
    right.set_yticks(rows, draws["pair"].values)
    right.invert_yaxis()
    right.set(title="couplings most surely there: median, 50 % and 94 %", xlabel="J")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def report_cells(results: dict, cells: list, methods: list[str]) -> str:
    """Mean ± standard deviation of the error over seeds, and the median of the seconds, by method."""
    names = ["zero", *methods]
    lines = ["| graph | draws | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for graph, num_draws in dict.fromkeys((graph, num) for graph, num, _ in cells):
        runs = [results[key_of(*cell)] for cell in cells if cell[:2] == (graph, num_draws)]
        values = [[run[name]["error"] for run in runs] for name in names]
        row = [f"{np.mean(v):.4f} ± {np.std(v, ddof=1) if len(v) > 1 else 0:.4f}" for v in values]
        seconds = ["", *(f"{np.median([run[name]['seconds'] for run in runs]):.0f} s" for name in methods)]
        lines.append(f"| {graph} | {num_draws:,} | " + " | ".join(row) + " |")
        lines.append("| | | " + " | ".join(seconds) + " |")
    return "\n".join(lines)


def key_of(graph: str, num_draws: int, seed: int) -> str:
    return f"{graph}, {num_draws} draws, seed {seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", nargs="+", choices=["glass", "ferromagnet"], default=["glass", "ferromagnet"])
    parser.add_argument("--draws", nargs="+", type=int, default=[500, 1000, 2000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--data", type=Path, help="a CSV file with a header")
    parser.add_argument("--omit", nargs="*", default=[], help="columns of it to leave out")
    parser.add_argument("--output", type=Path, default=Path("build/sparse_ising"), help="the numbers, and a picture")
    parser.add_argument("--smoke", action="store_true", help="12 spins and few steps")
    args = parser.parse_args()
    if min(*args.draws, args.steps, args.chains) < 1 or min(args.seeds) < 0:
        parser.error("--draws, --steps and --chains must be at least 1, --seeds at least 0")
    steps = 300 if args.smoke else args.steps
    if args.data is not None:
        try:
            x, names = table(args.data, args.omit)
        except ValueError as error:
            parser.error(str(error))
        report_table(x, names, steps, args.chains, args.seeds[0], args.output.with_suffix(".png"))
        return
    if args.smoke:
        args.draws, args.seeds = [500], [0]
    cells = [(graph, num, seed) for seed in args.seeds for graph in args.graphs for num in args.draws]
    path = args.output.with_suffix(".json")
    about = {"steps": steps, "chains": args.chains, "smoke": args.smoke}
    results = results_file.load(parser, path, about)
    with tqdm([(*cell, method) for cell in cells for method in args.methods]) as bar:
        for graph, num_draws, seed, method in bar:
            key = key_of(graph, num_draws, seed)
            bar.set_postfix_str(f"{key}, {method}")
            run = results.setdefault(key, {})
            if method in run:
                continue
            J, x = problem(graph, num_draws, seed, args.smoke)
            truth = J[np.triu_indices(len(J), 1)]
            run["zero"] = {"error": float(np.sqrt(np.mean(truth**2)))}
            if method.endswith("L1") and "penalty" not in run:
                begun = time.perf_counter()
                run["penalty"] = cross_validated(x, max(300, steps // 6), seed)
                run["seconds of its choice"] = time.perf_counter() - begun
            begun = time.perf_counter()
            found = np.asarray(METHODS[method](x, steps, args.chains, seed, run.get("penalty")))
            seconds = time.perf_counter() - begun
            run[method] = {"error": float(np.sqrt(np.mean((found - truth) ** 2))), "seconds": seconds}
            results_file.save(path, about, results)
    print(f"root-mean-square error of the couplings, {steps:,} steps, seeds {args.seeds}")
    print(report_cells(results, cells, args.methods))
    print(f"The numbers are in {path}.")


if __name__ == "__main__":
    main()
