"""Couplings of sparse Ising models: a posterior with sparsity priors against point estimates (Ingraham and Marks 2017).

A ferromagnet on a 4 x 4 x 4 torus or a spin glass on a sparse random graph of 100 spins; draws of it by tempered Gibbs
sampling, and the root-mean-square error of the couplings that each method finds in them. With --data, a table of
binary columns instead, and the posterior of its couplings.

    python examples/sparse_ising.py                           the spin glass, 500 draws of it
    python examples/sparse_ising.py --graph ferromagnet --draws 2000
    python examples/sparse_ising.py --data adhd.csv           symptoms: 0/1 columns, others are left out
"""

import argparse
import csv
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import init_to_median
from numpyro.infer.autoguide import AutoNormal

from numpyro_bism import CD, Gibbs, PersistentVI, PseudoLikelihood, to_arviz

MEAN_DEGREE = 2  # of the random graph
RATE = 2e-2


def torus(side: int) -> np.ndarray:
    """Couplings 0.2 between neighbours on a torus of side³ spins ±1, shape (d, d), symmetric.

    The critical coupling of the infinite lattice is 0.2217.
    """
    cells = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    gap = np.abs(cells[:, None] - cells[None])
    distance = np.minimum(gap, side - gap).sum(-1)
    return 0.2 * (distance == 1)


def random_graph(num_spins: int, rng: np.random.Generator) -> np.ndarray:
    """Standard normal couplings on an Erdős-Rényi graph of mean degree 2, shape (d, d), symmetric."""
    edges = np.triu(rng.uniform(size=(num_spins, num_spins)) < MEAN_DEGREE / (num_spins - 1), 1)
    couplings = edges * rng.normal(size=edges.shape)
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


def posterior(model, x, steps, num_chains, seed):
    """The trained method and its state; couplings are unit · local · scale of its draws."""
    guide = AutoNormal(model, init_loc_fn=init_to_median, init_scale=0.1)
    rate = optax.exponential_decay(RATE, steps, 0.05)
    method = PersistentVI(model, guide, optax.adam(rate), Gibbs(), num_chains=num_chains)
    return method, method.run(jax.random.key(seed), steps, x, progress_bar=False).state


def couplings(method, state, x, seed, num_draws=500):
    """Draws of the couplings above the diagonal."""
    draws = method.posterior(state, x, rng_key=jax.random.key(seed + 1), num_draws=num_draws)
    return np.asarray(draws["unit"] * draws.get("local", 1.0) * draws["scale"][:, None])


def estimates(x, steps, num_chains, seed):
    """The couplings above the diagonal by each method, and the seconds that it took."""
    rate = optax.exponential_decay(RATE, steps, 0.05)
    found = {}

    def keep(name, run):
        begun = time.perf_counter()
        found[name] = run(), time.perf_counter() - begun

    def point(method):
        return np.asarray(method.run(jax.random.key(seed), steps, x, progress_bar=False).params["J"])

    keep("pseudo-likelihood", lambda: point(PseudoLikelihood(point_model, optax.adam(rate))))
    chains = CD(point_model, optax.adam(rate), Gibbs(), persistent=True, num_chains=num_chains)
    keep("PCD", lambda: point(chains))
    for name, model in (("PVI, Gaussian", gaussian_model), ("PVI, horseshoe", horseshoe_model)):
        keep(
            name,
            lambda model=model: couplings(*posterior(model, x, steps, num_chains, seed), x, seed).mean(0),
        )
    return found


def table(path: Path) -> tuple[np.ndarray, list[str]]:
    """The columns of a CSV file that hold 0 and 1 alone, and their names."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if {row[name] for row in rows} <= {"0", "1"}]
    return np.array([[float(row[name]) for name in names] for row in rows], np.float32), names


def report_table(path, steps, num_chains, seed):
    import xarray as xr

    x, names = table(path)
    method, state = posterior(horseshoe_model, x, steps, num_chains, seed)
    J = couplings(method, state, x, seed)
    tree = to_arviz(method, state, x, rng_key=jax.random.key(seed + 1), num_draws=500)
    J = xr.DataArray(J[None], dims=("chain", "draw", "pair"))
    sure = (np.abs(J) > 0.1).mean(("chain", "draw"))
    print(f"{path}: {len(x)} rows, {len(names)} columns; posterior of {list(tree['posterior'].data_vars)}")
    pairs = np.transpose(np.triu_indices(len(names), 1))
    for k in np.argsort(-np.asarray(sure), kind="stable")[:10]:
        a, b = pairs[k]
        mean, sd = float(J[..., k].mean()), float(J[..., k].std())
        print(f"  {names[a]:>20} - {names[b]:<20} {mean:+.2f} ± {sd:.2f}, P(|J| > 0.1) = {float(sure[k]):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graph", choices=["glass", "ferromagnet"], default="glass")
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--data", type=Path, help="a CSV file with a header")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="12 spins and few steps")
    args = parser.parse_args()
    steps = 300 if args.smoke else args.steps
    if args.data is not None:
        report_table(args.data, steps, args.chains, args.seed)
        return
    rng = np.random.default_rng(args.seed)
    if args.graph == "ferromagnet":
        J = torus(2 if args.smoke else 4)
    else:
        J = random_graph(12 if args.smoke else 100, rng)
    x = (draws_of(J, args.draws, 50 if args.smoke else 1000, args.seed) + 1) / 2
    truth = J[np.triu_indices(len(J), 1)]
    print(f"{args.graph}, {len(J)} spins, {(truth != 0).sum()} couplings, {args.draws} draws, {steps} steps")
    print(f"{'zero':<20} {np.sqrt(np.mean(truth**2)):.4f}")
    for name, (found, seconds) in estimates(x, steps, args.chains, args.seed).items():
        print(f"{name:<20} {np.sqrt(np.mean((found - truth) ** 2)):.4f}  {seconds:.0f} s")


if __name__ == "__main__":
    main()
