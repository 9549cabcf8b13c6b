"""Rows of a plate that has a size of its own, or draws its rows, are told from units; on both backends."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as pdist
import pytest
import scipy.special
import torch

import numpyro_bism
import pyro_bism

D, H, FULL = 3, 2, 40
rng = np.random.default_rng(0)
W, B = rng.normal(size=(D, H)), rng.normal(size=D)
X = rng.normal(size=(FULL, D))
# of every row of the data, alike in the first ones
TABLE = np.repeat([[0.0], [1.0]], [30, 10], 0)


class Torch:
    name, package, dist, p = "pyro", pyro_bism, pdist, pyro

    def __enter__(self):
        pyro.clear_param_store()
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        return self

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)

    @staticmethod
    def array(x):
        return torch.as_tensor(np.asarray(x))

    def energy(self, model, *args):
        """As a step finds it that takes the first rows."""
        leaves, spec = pyro_bism.programs.visible.flatten((args, {}))
        first = {"data": torch.arange(model.size)}
        with torch.no_grad(), pyro_bism.programs.records.record(first) as run:
            model(*args)
        indices = first if run.full_sizes["data"] != model.size else {}
        sites = pyro_bism.programs.visible.find(run.sites, leaves, ["v"], discrete=True)
        energy, x = pyro_bism.energies.Energy.from_model(
            model, sites, pyro_bism.programs.visible.Batch(sites, indices, leaves, spec)
        )
        return energy, energy.density(x), x

    def step(self, model, x, kernel):
        method = pyro_bism.CD(model, pyro.optim.SGD({"lr": 0.0}), kernel, persistent=True, num_chains=5)
        method.step(x)
        return method._method_state[0][0]


class Jax:
    name, package, dist, p = "numpyro", numpyro_bism, ndist, numpyro

    def __enter__(self):
        jax.config.update("jax_enable_x64", True)
        return self

    def __exit__(self, *_):
        jax.config.update("jax_enable_x64", False)

    @staticmethod
    def array(x):
        return jnp.asarray(np.asarray(x))

    def energy(self, model, *args):
        leaves, spec = numpyro_bism.programs.visible.flatten(args, {})
        first = {"data": jnp.arange(model.size)}
        with numpyro.handlers.seed(rng_seed=0), numpyro_bism.programs.records.record({}, first) as run:
            model(*args)
        indices = first if run.plates["data"][0] != model.size else {}
        sites = numpyro_bism.programs.visible.find(run.sites, leaves, ["v"], discrete=True)
        params = {name: param["value"] for name, param in run.params.items()}
        batch = numpyro_bism.programs.visible.batch(sites, indices, leaves, spec)
        energy, x = numpyro_bism.energies.Energy.from_model(model, sites, batch, params, jax.random.key(0))
        return energy, energy.density(params, x), x

    def step(self, model, x, kernel):
        method = numpyro_bism.CD(model, numpyro.optim.SGD(0.0), kernel, persistent=True, num_chains=5)
        state, _ = jax.jit(method.update)(method.init(jax.random.key(0), x), x)
        return state.carried[0]


@pytest.fixture(params=[Torch, Jax], ids=["pyro", "numpyro"])
def host(request):
    with request.param() as made:
        yield made


class Model:
    """
    :param kind: "machine" of bits, "Gaussian machine" with visible reals, "linear" with all of them real.
    :param own: what tells its rows apart.
    """

    def __init__(self, host, kind, size, draws, own=None):
        self.host, self.kind, self.size, self.draws, self.own = host, kind, size, draws, own

    def __call__(self, x, c=None):
        host, dist, p, own = self.host, self.host.dist, self.host.p, self.own
        num = FULL if self.draws else self.size
        w, b = p.param("w", host.array(W)), p.param("b", host.array(B))
        table = host.array(TABLE if self.draws else np.arange(float(num))[:, None])
        local = p.param("local", table) if own == "parameter" else 0
        real = dist.Normal(host.array(0.0), 1.0)
        bits = dist.Bernoulli(host.array(0.5))
        with p.plate("data", num, **({"subsample_size": self.size} if self.draws else {})) as rows:
            v = x[rows] if self.draws else x
            v = p.sample("v", self._flat(bits if self.kind == "machine" else real, D), obs=v)
            h = p.sample("h", self._flat(real if self.kind == "linear" else bits, H))
            shift = (
                b
                + {
                    None: lambda: 0,
                    "parameter": lambda: local[rows],
                    "statement": lambda: p.param("inside", table, event_dim=1),
                    "argument": lambda: c[rows],
                    "array": lambda: table[rows],
                    "subsample": lambda: p.subsample(table, event_dim=1),
                }[own]()
            )
            drive = v @ w
            pull = (drive * h).sum(-1) + (shift * v).sum(-1)
            squares = 0 if self.kind == "machine" else 0.5 * (v**2).sum(-1)
            if self.kind == "linear":
                squares = squares + 0.5 * ((h @ w.T) ** 2).sum(-1) + 0.5 * (h**2).sum(-1)
            p.factor("energy", pull - squares)

    @staticmethod
    def _flat(fn, size):
        return fn.expand([size]).to_event(1).mask(False)


def log_normalizer(kind):
    """Of one row, in closed form or by enumeration."""
    h = np.array(list(itertools.product([0, 1], repeat=H)))
    if kind == "linear":  # v - W h - b and h are independent; W h + b takes b²/2 and h b along
        precision = np.block([[np.eye(D), -W], [-W.T, W.T @ W + np.eye(H)]])
        pull = np.concatenate([B, np.zeros(H)])
        log_det = np.linalg.slogdet(precision / (2 * math.pi))[1]
        return 0.5 * (pull @ np.linalg.solve(precision, pull) - log_det)
    if kind == "machine":
        return scipy.special.logsumexp(np.logaddexp(0, h @ W.T + B).sum(-1))
    return scipy.special.logsumexp(0.5 * ((h @ W.T + B) ** 2).sum(-1)) + 0.5 * D * math.log(2 * math.pi)


def data(host, kind, num=FULL):
    return host.array((X[:num] > 0).astype(float) if kind == "machine" else X[:num])


# as many rows as there are visible units, hidden ones, or neither
@pytest.mark.parametrize(
    ("kind", "draws", "sizes"),
    [
        ("machine", False, [D]),
        ("linear", True, [H]),
        ("Gaussian machine", False, [D]),
        ("Gaussian machine", True, [H, 5]),
        pytest.param("machine", True, [D, H, 5], marks=pytest.mark.full),
        pytest.param("linear", False, [D, H, 5], marks=pytest.mark.full),
        pytest.param("Gaussian machine", False, [H, 5], marks=pytest.mark.full),
        pytest.param("Gaussian machine", True, [D], marks=pytest.mark.full),
    ],
)
def test_rows_of_one_density(host, kind, draws, sizes):
    """Their plate is of a fixed size, or draws them; the normaliser of every row is the one that all have."""
    for size in sizes:
        energy, density, x = host.energy(Model(host, kind, size, draws), data(host, kind, FULL if draws else size))
        assert energy.is_homogeneous
        assert all(block.is_constant for block in energy.blocks if block.kind == "gaussian")
    integral = host.package.energies.Integral.over_variables(
        density, x, [host.package.energies.VISIBLE, *energy.latents]
    )
    value, _ = integral.estimate(density, x)
    np.testing.assert_allclose(value, log_normalizer(kind), rtol=1e-9)


@pytest.mark.parametrize(
    ("own", "draws"),
    [
        ("parameter", False),
        ("argument", False),
        ("statement", False),
        # what the first rows have is alike, and what the others have is not
        ("parameter", True),
        ("argument", True),
        ("statement", True),
        ("array", True),
        ("subsample", True),
    ],
)
def test_rows_of_their_own(host, own, draws):
    num = FULL if draws else D
    args = [data(host, "Gaussian machine", num)]
    if own == "argument":
        args.append(host.array(TABLE if draws else np.arange(num)[:, None]))
    assert not host.energy(Model(host, "Gaussian machine", D, draws, own), *args)[0].is_homogeneous


def test_persistent_chains(host):
    """Of a plate that draws as many rows as there are units."""
    kind = "Gaussian machine"
    chains = host.step(Model(host, kind, D, draws=True), data(host, kind), host.package.Gibbs())
    v = np.asarray(chains[host.package.energies.VISIBLE])
    assert v.shape == (5, D)
    # moved by Gibbs sampling: v given h has the mean W h + b and unit variance
    assert ((np.abs(v - np.asarray(chains["h"]) @ W.T - B)).max()) < 5
