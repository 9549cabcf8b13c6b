"""A small Gaussian RBM in ``pyro_bism``: the loss falls, compiled too, chains draw from it, ArviZ reads it all."""

import shutil
import tempfile
import warnings
from pathlib import Path

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_bism import BiSM, ConcreteBernoulli, DenoisingScoreMatching, Gibbs, psis_khat, run_chains, to_arviz

VISIBLE, HIDDEN = 2, 4
SIGMA = 0.3


def weights():
    return 0.1 * torch.randn(VISIBLE, HIDDEN)


def model(x):
    W = pyro.param("W", weights)
    b = pyro.param("b", lambda: torch.zeros(VISIBLE))
    c = pyro.param("c", lambda: torch.zeros(HIDDEN))
    log_s = pyro.param("log_s", lambda: torch.zeros(VISIBLE))
    with pyro.plate("data", len(x)):
        flat = dist.Normal(0.0, 1.0).expand([VISIBLE]).to_event(1).mask(False)
        v = pyro.sample("v", flat, obs=x)
        h = pyro.sample("h", dist.Bernoulli(0.5).expand([HIDDEN]).to_event(1).mask(False))
        quadratic = 0.5 * ((v - b) * (-log_s).exp()).square().sum(-1)
        pyro.factor("energy", ((v @ W + c) * h).sum(-1) - quadratic)


def guide(x):
    W = pyro.param("guide_W", weights)
    c = pyro.param("guide_c", lambda: torch.zeros(HIDDEN))
    with pyro.plate("data", len(x)):
        pyro.sample("h", ConcreteBernoulli(0.5, x @ W + c).to_event(1))


# Two clusters, narrower than the unit Gaussian that the model starts as.
rng = np.random.default_rng(0)
x = 0.3 * rng.choice([-1.0, 1.0], (500, 1)) + 0.2 * rng.normal(size=(500, VISIBLE))
x = torch.tensor(x, dtype=torch.float32)

if shutil.which("g++"):  # then what was captured has to be compiled, not replayed
    warnings.filterwarnings("error", "jit=True")
found = []
for jit in (False, True):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    optim = pyro.optim.Adam({"lr": 3e-2})
    bism = BiSM(model, guide, optim, loss=DenoisingScoreMatching(sigma=SIGMA), jit=jit)
    losses = np.array([bism.step(x) for _ in range(150)])
    first, last = losses[:10].mean(), losses[-50:].mean()
    print(f"torch {torch.__version__}, pyro {pyro.__version__}, {jit=}: loss {first:.3f} -> {last:.3f}")
    assert last < 0.85 * first, "the loss did not fall"
    found.append((first, last))
assert np.allclose(*found, rtol=1e-3), "jit=True is not the eager step"

chains = run_chains(bism, x, kernel=Gibbs(), num_samples=200, num_warmup=50, num_chains=100, progress_bar=False)
drawn, expected = chains.values["v"].std((0, 1)), (x.var(0) + SIGMA**2).sqrt()  # what is learnt has the noise
print(f"standard deviation {expected.tolist()}, of draws {drawn.tolist()}")
assert np.allclose(drawn, expected, rtol=0.15), "the draws are not like the data"

data = to_arviz(bism, x[:10], num_draws=200, model_samples=chains)
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
