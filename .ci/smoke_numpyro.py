"""A small Gaussian RBM in ``numpyro_bism``: the loss falls, chains draw from it, ArviZ reads it all."""

import tempfile
from pathlib import Path

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax

from numpyro_bism import BiSM, ConcreteBernoulli, DenoisingScoreMatching, Gibbs, psis_khat, run_chains, to_arviz

VISIBLE, HIDDEN = 2, 4
SIGMA = 0.3


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
        numpyro.factor("energy", ((v @ W + c) * h).sum(-1) - quadratic)


def guide(x):
    W = numpyro.param("guide_W", weights)
    c = numpyro.param("guide_c", jnp.zeros(HIDDEN))
    with numpyro.plate("data", len(x)):
        numpyro.sample("h", ConcreteBernoulli(0.5, x @ W + c).to_event(1))


# Two clusters, narrower than the unit Gaussian that the model starts as.
rng = np.random.default_rng(0)
x = jnp.asarray(0.3 * rng.choice([-1.0, 1.0], (500, 1)) + 0.2 * rng.normal(size=(500, VISIBLE)))

# eps_root: Adam's square root has no derivative at a gradient of exactly zero.
bism = BiSM(model, guide, optax.adam(1e-2, eps_root=1e-8), loss=DenoisingScoreMatching(sigma=SIGMA))
result = bism.run(jax.random.key(0), 400, x, progress_bar=False)
losses = np.asarray(result.losses)
first, last = losses[:20].mean(), losses[-100:].mean()
print(f"jax {jax.__version__}, numpyro {numpyro.__version__}: loss {first:.3f} -> {last:.3f}")
assert last < 0.85 * first, "the loss did not fall"
assert set(result.params) >= {"W", "b", "c", "log_s", "guide_W", "guide_c"}, set(result.params)

settings = {"kernel": Gibbs(), "num_samples": 200, "num_warmup": 50, "num_chains": 100, "progress_bar": False}
chains = run_chains(bism, result.state, x, rng_key=jax.random.key(1), **settings)
drawn, expected = chains.values["v"].std((0, 1)), jnp.sqrt(x.var(0) + SIGMA**2)  # what is learnt has the noise
print(f"standard deviation {expected.tolist()}, of draws {drawn.tolist()}")
assert np.allclose(drawn, expected, rtol=0.15), "the draws are not like the data"

data = to_arviz(bism, result.state, x[:10], rng_key=jax.random.key(2), num_draws=200, model_samples=chains)
assert data["posterior"]["h"].dims[:3] == ("chain", "draw", "obs"), data["posterior"]["h"].dims
assert data["model_samples"]["v"].shape == (100, 200, VISIBLE), data["model_samples"]["v"].shape
assert np.isfinite(data["sample_stats"]["log_weight"].values).all()
summary = az.summary(data, var_names=["h"])
print(f"ArviZ {az.__version__}:", summary.head(3), sep="\n")
assert len(summary) == 10 * HIDDEN
with tempfile.TemporaryDirectory() as folder:
    data.to_netcdf(path := Path(folder, "draws.nc"))
    back = az.from_netcdf(path)
    assert back["posterior"]["h"].equals(data["posterior"]["h"]), "netCDF brings back something else"
    back.close()

# weights whose law has k = 0.75: with ArviZ's other sign they would look perfect
k = float(psis_khat(0.75 * rng.exponential(size=4000)))
print(f"k-hat of weights with k = 0.75: {k:.2f}")
assert 0.6 < k < 0.9, k
