"""A small Gaussian RBM in ``pyro_bism``: the loss falls and ArviZ reads the posterior."""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import torch

from pyro_bism import BiSM, ConcreteBernoulli, DenoisingScoreMatching, psis_khat, to_arviz

VISIBLE, HIDDEN = 2, 4


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

pyro.set_rng_seed(0)
optim = pyro.optim.Adam({"lr": 1e-2})
bism = BiSM(model, guide, optim, loss=DenoisingScoreMatching(sigma=0.3))
losses = np.array([bism.step(x) for _ in range(400)])
first, last = losses[:20].mean(), losses[-100:].mean()
print(f"pyro {pyro.__version__}: loss {first:.3f} -> {last:.3f}")
assert last < 0.85 * first, "the loss did not fall"

data = to_arviz(bism, x[:10], num_draws=200)
assert data["posterior"]["h"].dims[:3] == ("chain", "draw", "obs"), data["posterior"]["h"].dims
assert np.isfinite(data["sample_stats"]["log_weight"].values).all()
summary = az.summary(data, var_names=["h"])
print(f"ArviZ {az.__version__}:", summary.head(3), sep="\n")
assert len(summary) == 10 * HIDDEN

# weights whose law has k = 0.75: with ArviZ's other sign they would look perfect
k = float(psis_khat(0.75 * rng.exponential(size=4000)))
print(f"k-hat of weights with k = 0.75: {k:.2f}")
assert 0.6 < k < 0.9, k
