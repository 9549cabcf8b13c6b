"""Contacts of a protein family: couplings of a Potts model of its alignment, by pseudo-likelihood or their posterior.

The strength of two columns' coupling is the Frobenius norm of its 21 x 21 matrix in the zero-sum gauge, less the
product of the columns' own means (the average product correction: Dunn, Wahl, Gloor 2008; Ekeberg et al. 2013).

    python examples/potts_contacts.py --data kunitz.npz       x: letters 0 to 20, shape (sequences, columns)
    python examples/potts_contacts.py --data kunitz.npz --posterior       by PersistentVI, under a Gaussian prior
    python examples/potts_contacts.py --smoke                 an alignment made up of pairs of columns that agree

The Kunitz domain (PF00014), 11,819 sequences of 53 columns, comes with https://github.com/jertubiana/PGM.
"""

import argparse
import resource
import sys
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

from numpyro_bism import Gibbs, PersistentVI, PseudoLikelihood

LETTERS = 21
RATE, DECAY = 3e-2, 1e-2
PRIOR_SCALE = 0.1


def observe(x, J, b, batch_size):
    """log p̃ = Σ_{i<j} J_ij(x_i, x_j) + Σ_i b_i(x_i) of one-hot x, shape (n, columns, letters)."""
    n, columns, letters = x.shape
    between = jnp.kron(jnp.triu(jnp.ones((columns, columns)), 1), jnp.ones((letters, letters)))
    with numpyro.plate("data", n, subsample_size=batch_size) as rows:
        flat = dist.Multinomial(1, jnp.full(letters, 1 / letters)).expand([columns]).to_event(1).mask(False)
        v = numpyro.sample("v", flat, obs=x if batch_size is None else x[rows]).reshape(-1, columns * letters)
        numpyro.factor("energy", ((v @ (between * J)) * v).sum(-1) + v @ b)


def potts(x, batch_size=None):
    size = x.shape[1] * x.shape[2]
    observe(x, numpyro.param("J", jnp.zeros((size, size))), numpyro.param("b", jnp.zeros(size)), batch_size)


def potts_with_prior(x, batch_size=None):
    size = x.shape[1] * x.shape[2]
    J = numpyro.sample("J", dist.Normal(0.0, PRIOR_SCALE).expand([size, size]).to_event(2))
    observe(x, J, numpyro.sample("b", dist.Normal(0.0, 1.0).expand([size]).to_event(1)), batch_size)


def strengths(J: np.ndarray, columns: int) -> np.ndarray:
    """Corrected coupling strengths, shape (columns, columns), symmetric, 0 on the diagonal."""
    J = J.reshape(columns, LETTERS, columns, LETTERS).transpose(0, 2, 1, 3)
    J = np.triu(np.ones((columns, columns)), 1)[..., None, None] * J
    J = J - J.mean(2, keepdims=True) - J.mean(3, keepdims=True) + J.mean((2, 3), keepdims=True)
    norm = np.sqrt((J**2).sum((2, 3)))
    norm = norm + norm.T
    mean = norm.sum(0) / (columns - 1)
    corrected = norm - np.outer(mean, mean) / mean.mean()
    return corrected * (1 - np.eye(columns))


def made_up(num_sequences: int, rng: np.random.Generator) -> np.ndarray:
    """Letters of 8 columns, in which column 2k + 1 repeats column 2k three times out of four."""
    x = rng.integers(LETTERS, size=(num_sequences, 8))
    repeats = rng.uniform(size=(num_sequences, 4)) < 0.75
    x[:, 1::2] = np.where(repeats, x[:, ::2], x[:, 1::2])
    return x


def picture(found: np.ndarray, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4.2), layout="constrained")
    image = axes.imshow(found, cmap="cividis", vmin=0)
    axes.set(title="coupling strength", xlabel="column", ylabel="column")
    figure.colorbar(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an .npz file with x")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("build/contacts.png"))
    parser.add_argument("--posterior", action="store_true", help="PersistentVI in pseudo-likelihood's place")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        letters, args.steps, args.batch_size = made_up(2000, np.random.default_rng(args.seed)), 200, 500
    elif args.data is None:
        parser.error("give an alignment: --data kunitz.npz, or --smoke")
    else:
        letters = np.load(args.data)["x"]
        if letters.ndim != 2 or letters.dtype.kind not in "iu" or letters.min() < 0 or letters.max() >= LETTERS:
            parser.error(
                f"x in {args.data} is no alignment: whole numbers from 0 to {LETTERS - 1}, (sequences, columns)"
            )
    x = np.eye(LETTERS, dtype=np.float32)[letters]
    rate = optax.exponential_decay(RATE, args.steps, 0.1)
    began = time.perf_counter()
    if args.posterior:
        guide = AutoNormal(potts_with_prior, init_loc_fn=init_to_median, init_scale=0.01)
        settings = {"num_chains": args.batch_size, "batch_size": args.batch_size}
        method = PersistentVI(potts_with_prior, guide, optax.adam(rate), Gibbs(), **settings)
        J = guide.median(method.run(jax.random.key(args.seed), args.steps, x).params)["J"]
    else:
        # decoupled weight decay is a Gaussian prior: a rare pair of letters says nothing of its coupling
        method = PseudoLikelihood(potts, optax.adamw(rate, weight_decay=DECAY), batch_size=args.batch_size)
        J = method.run(jax.random.key(args.seed), args.steps, x).params["J"]
    columns = x.shape[1]
    found = strengths(np.asarray(J), columns)
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak /= 2**30 if sys.platform == "darwin" else 2**20  # there in bytes, elsewhere in KiB
    print(f"{len(x)} sequences, {columns} columns, {args.steps} steps, {seconds:.0f} s, {peak:.1f} GiB at most")
    pairs = np.transpose(np.triu_indices(columns, 1))
    best = np.argsort(-found[tuple(pairs.T)])[: columns // 2]
    print("strongest pairs: " + ", ".join(f"{i}-{j}" for i, j in pairs[best]))
    picture(found, args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
