"""Kernels, chains and programs: draws against closed forms and enumeration.

The tests see a package only through its ``Backend``: NumPy arrays in, chains out. Means are compared within five
standard errors, by the draws' own effective sample size.
"""

import dataclasses
import functools
import math

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from numpy.linalg import inv
from numpyro.infer import DiscreteHMCGibbs
from numpyro.infer import TraceEnum_ELBO as NumpyroTraceEnum_ELBO
from pyro.infer import TraceEnum_ELBO
from scipy.special import logsumexp

import numpyro_bism
import numpyro_bism.sampling
import pyro_bism
import pyro_bism.sampling
from numpyro_bism.energies import VISIBLE
from oracles import GaussianBernoulliRBM, LinearGaussian, configurations

N, D, K = 6, 3, 3
rng = np.random.default_rng(0)
X = rng.normal(size=(N, D))
LINEAR = LinearGaussian.random(rng, D, K)
PRIOR = 0.3  # of the bits of BITS, in the model's own words; the oracle has its log odds in c
BITS = GaussianBernoulliRBM(0.8 * rng.normal(size=(D, K)), rng.normal(size=D), rng.normal(size=K), 0.8)
BIASES = BITS.c - np.log(PRIOR / (1 - PRIOR))
DRIVES = 3 * rng.normal(size=(2 * N, K))  # of the first latent site, row by row: what covariates may do


class PyroBackend:
    """Programs of ``pyro_bism``, in float64."""

    name = "pyro"
    package, sampling, dist, xp = pyro_bism, pyro_bism.sampling, dist, torch
    array = staticmethod(torch.as_tensor)

    def __enter__(self):
        pyro.clear_param_store()
        torch.set_default_dtype(torch.float64)
        return self

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)

    def bism(self, name, rows=None, size=None, drives=False):
        """A model of MODELS; ``rows`` of the data are subsampled, the plate has a fixed ``size``, rows have DRIVES."""
        energy, latents = MODELS[name]

        def model(x):
            bias = pyro.param("bias", torch.zeros(()))
            with pyro.plate("data", len(x) if size is None else size, subsample_size=rows) as i:
                x = x if rows is None else x[i]
                v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1).mask(False), obs=x)
                h = [pyro.sample(name, site.prior(dist)) for name, site in latents.items()]
                pyro.factor("energy", bias * v.sum(-1) - energy(self, v, *h))
                if drives:
                    pyro.factor("drive", (self.array(DRIVES)[i] * h[0]).sum(-1))

        def guide(x):
            loc = pyro.param("loc", torch.zeros(()))
            with pyro.plate("data", len(x) if size is None else size, subsample_size=rows) as i:
                x = x if rows is None else x[i]
                for name, site in latents.items():
                    pyro.sample(name, site.guide(self, loc + 0.1 * x[:, 0]), infer=site.infer)

        summed = any(site.infer for site in latents.values())
        return pyro_bism.BiSM(
            model,
            guide,
            pyro.optim.Adam({"lr": 1e-2}),
            pyro_bism.DenoisingScoreMatching(sigma=0.3),
            inner_loss=TraceEnum_ELBO(max_plate_nesting=1) if summed else None,
        )

    def density(self, bism, x, *names):
        """The density of the variables named, and a point."""
        energy, point = bism.energy(torch.as_tensor(x))
        return energy.density(point).moving(dict.fromkeys(names, True)), point

    def step(self, kernel, density, x, state=None, seed=0):
        pyro.set_rng_seed(seed)
        state = kernel.init(density, x) if state is None else state
        with torch.no_grad():
            return kernel(density, x, state)

    def run(self, bism, x, seed=0, **options):
        bism.energy(torch.as_tensor(x))  # the first run initialises the parameters, which may draw
        pyro.set_rng_seed(seed)
        return pyro_bism.sampling.chains.run_chains(bism, torch.as_tensor(x), **{"progress_bar": False, **options})

    def program(self, bism, x, **options):
        return pyro_bism.sampling.mcmc.as_model(bism, torch.as_tensor(x), **options)

    def nuts(self, program, num_warmup, num_samples, kernel=pyro.infer.NUTS):
        mcmc = pyro.infer.MCMC(kernel(program), num_samples, warmup_steps=num_warmup, disable_progbar=True)
        pyro.set_rng_seed(0)
        mcmc.run()
        return mcmc

    def log_density(self, program, values):
        """Of the program at these values, and its gradient."""
        values = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
        trace = pyro.poutine.trace(pyro.poutine.condition(program, values)).get_trace()
        total = trace.log_prob_sum()
        slopes = torch.autograd.grad(total, list(values.values()))
        return total.item(), {name: slope.numpy() for name, slope in zip(values, slopes, strict=True)}

    def from_mcmc(self, mcmc):
        if not hasattr(az, "from_pyro"):
            pytest.skip("ArviZ 1.x does not read Pyro's MCMC")
        return az.from_pyro(mcmc, log_likelihood=False)


class Remembered:
    """A BiSM whose energy is found once for the same data, and for the same key if it subsamples them."""

    def __init__(self, bism, subsamples):
        self.bism, self.subsamples, self.states, self.found = bism, subsamples, {}, {}

    def energy(self, state, x, rng_key):
        key = (x.shape, np.asarray(x).tobytes())
        if key not in self.states:
            self.states[key] = self.bism.init(jax.random.key(0), x), x
        state, x = self.states[key]
        if self.subsamples and rng_key is not None:
            return self.bism.energy(state, x, rng_key=rng_key)
        if key not in self.found:
            self.found[key] = self.bism.energy(state, x, rng_key=jax.random.key(1))
        return self.found[key]


class NumpyroBackend:
    """Programs of ``numpyro_bism``, in float64."""

    name = "numpyro"
    package, sampling, dist, xp = numpyro_bism, numpyro_bism.sampling, ndist, jnp
    array = staticmethod(jnp.asarray)

    def __enter__(self):
        self.double = jax.enable_x64(True)
        self.double.__enter__()
        return self

    def __exit__(self, *_):
        self.double.__exit__(None, None, None)

    @functools.cache  # noqa: B019  (compilation is most of the time: one model of each kind for all tests)
    def bism(self, name, rows=None, size=None, drives=False):
        """A model of MODELS; ``rows`` of the data are subsampled, the plate has a fixed ``size``, rows have DRIVES."""
        energy, latents = MODELS[name]

        def model(x):
            bias = numpyro.param("bias", jnp.zeros(()))
            with numpyro.plate("data", len(x) if size is None else size, subsample_size=rows) as i:
                x = x if rows is None else x[i]
                v = numpyro.sample("v", ndist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1).mask(False), obs=x)
                h = [numpyro.sample(name, site.prior(ndist)) for name, site in latents.items()]
                numpyro.factor("energy", bias * v.sum(-1) - energy(self, v, *h))
                if drives:
                    numpyro.factor("drive", (self.array(DRIVES)[i] * h[0]).sum(-1))

        def guide(x):
            loc = numpyro.param("loc", jnp.zeros(()))
            with numpyro.plate("data", len(x) if size is None else size, subsample_size=rows) as i:
                x = x if rows is None else x[i]
                for name, site in latents.items():
                    numpyro.sample(name, site.guide(self, loc + 0.1 * x[:, 0]), infer=site.infer)

        summed = any(site.infer for site in latents.values())
        return Remembered(
            numpyro_bism.BiSM(
                model,
                guide,
                numpyro.optim.Adam(1e-2),
                numpyro_bism.DenoisingScoreMatching(sigma=0.3),
                inner_loss=NumpyroTraceEnum_ELBO(max_plate_nesting=1) if summed else None,
            ),
            rows is not None,
        )

    def density(self, bism, x, *names):
        """The density of the variables named, and a point."""
        energy, params, point = bism.energy(None, jnp.asarray(x), rng_key=None)
        return energy.density(params, point).moving(dict.fromkeys(names, True)), point

    def step(self, kernel, density, x, state=None, seed=0):
        state = kernel.init(density, x) if state is None else state
        return jax.jit(lambda x: kernel(jax.random.key(seed), density, x, state))(x)

    def run(self, bism, x, seed=0, **options):
        return numpyro_bism.sampling.chains.run_chains(
            bism, None, jnp.asarray(x), rng_key=jax.random.key(seed), **{"progress_bar": False, **options}
        )

    def program(self, bism, x, **options):
        return numpyro_bism.sampling.mcmc.as_model(bism, None, jnp.asarray(x), rng_key=None, **options)

    def nuts(self, program, num_warmup, num_samples, kernel=numpyro.infer.NUTS):
        mcmc = numpyro.infer.MCMC(
            kernel(program),
            num_warmup=num_warmup,
            num_samples=num_samples,
            chain_method="sequential",
            progress_bar=False,
        )
        mcmc.run(jax.random.key(0))
        return mcmc

    def log_density(self, program, values):
        """Of the program at these values, and its gradient."""

        def total(values):
            return numpyro.infer.util.log_density(program, (), {}, values)[0]

        value, slopes = jax.value_and_grad(total)(jax.tree.map(jnp.asarray, values))
        return float(value), jax.tree.map(np.asarray, slopes)

    def from_mcmc(self, mcmc):
        return az.from_numpyro(mcmc, log_likelihood=False)


PYRO, NUMPYRO = PyroBackend(), NumpyroBackend()


@pytest.fixture(params=[PYRO, NUMPYRO], ids=lambda backend: backend.name)
def backend(request):
    with request.param as entered:
        yield entered


# Latent sites: how the model declares one, and what the guide draws it from, given one number an example


class Real:
    infer = None

    def __init__(self, size):
        self.size = size

    def prior(self, dist):
        return dist.Normal(0.0, 1.0).expand([self.size]).to_event(1).mask(False)

    def guide(self, backend, drive):
        return backend.dist.Normal(drive[:, None] + backend.xp.zeros(self.size), 1.0).to_event(1)


class Positive:
    infer = None

    def prior(self, dist):
        return dist.Exponential(1.0).mask(False)

    def guide(self, backend, drive):
        return backend.dist.LogNormal(drive, 1.0)


class Bits:
    infer = None

    def __init__(self, size, prior=None):
        self.size, self.probability = size, prior

    def prior(self, dist):
        fn = dist.Bernoulli(self.probability or 0.5).expand([self.size]).to_event(1)
        return fn if self.probability else fn.mask(False)

    def guide(self, backend, drive):
        return backend.package.ConcreteBernoulli(0.1, drive[:, None] + backend.xp.zeros(self.size)).to_event(1)


class OneHot:
    infer = None

    def prior(self, dist):
        logits = array_for(dist, np.zeros(K))
        if dist is ndist:
            return dist.Multinomial(1, logits=logits).mask(False)
        return dist.OneHotCategorical(logits=logits).mask(False)

    def guide(self, backend, drive):
        return backend.package.ConcreteOneHot(0.1, drive[:, None] * backend.array(np.arange(K) / K))


class Label:
    infer = {"enumerate": "parallel"}

    def prior(self, dist):
        return dist.Categorical(logits=array_for(dist, LABEL_LOGITS))

    def guide(self, backend, drive):
        return backend.dist.Categorical(logits=drive[:, None] * backend.array(np.arange(K) / K))


def array_for(module, value):
    return torch.tensor(value) if module is dist else jnp.asarray(value)


def linear(backend, v, h):
    A, B, W, b, c = map(backend.array, (LINEAR.A, LINEAR.B, LINEAR.W, LINEAR.b, LINEAR.c))
    quadratic = 0.5 * ((v @ A) * v).sum(-1) + 0.5 * ((h @ B) * h).sum(-1)
    return quadratic - ((v @ W) * h).sum(-1) - v @ b - h @ c


def rbm(backend, v, h):
    W, b, c = map(backend.array, (BITS.W, BITS.b, BIASES))
    return 0.5 * (((v - b) / BITS.s) ** 2).sum(-1) - h @ c - ((v @ W) * h).sum(-1)


# bits that are coupled in pairs, and a positive latent that is Gamma(SHAPE, 1 + v₀²/2) given v
SHAPE = 4.0
COUPLINGS, TO_BITS = np.triu(1.5 * rng.normal(size=(K, K)), 1), rng.normal(size=(D, K))


def mixed(backend, v, h, g):
    J, U = map(backend.array, (COUPLINGS, TO_BITS))
    bits = 0.5 * (v**2).sum(-1) - ((v @ U) * h).sum(-1) - ((h @ J) * h).sum(-1)
    return bits + g * (1 + 0.5 * v[:, 0] ** 2) - (SHAPE - 1) * backend.xp.log(g)


# a one-hot vector that v drives, and a label that it is coupled with
LABEL_LOGITS, TABLE = rng.normal(size=K), rng.normal(size=(K, K))


def coded(backend, v, o, z):
    U, table = map(backend.array, (TO_BITS, TABLE))
    return 0.5 * (v**2).sum(-1) - ((v @ U + table[z]) * o).sum(-1)


# real latents of which no two are Gaussian together, each alone given the others: three blocks
def crossed(backend, v, h, g):
    v, h, g = v**2, h**2, g**2
    return 0.5 * (v + h + g + v * h + h * g + g * v).sum(-1)


MODELS = {
    "linear": (linear, {"h": Real(K)}),
    "rbm": (rbm, {"h": Bits(K, PRIOR)}),
    "mixed": (mixed, {"h": Bits(K), "g": Positive()}),
    "coded": (coded, {"o": OneHot(), "z": Label()}),
    "crossed": (crossed, {"h": Real(K), "g": Real(K)}),
}


def agree(draws, exact, min_ess=100):
    """Means over (chain, draw, ...) are the exact ones, by their own effective sample sizes."""
    draws, exact = np.asarray(draws, float), np.broadcast_to(np.asarray(exact, float), np.shape(draws)[2:])
    flat = draws.reshape(*draws.shape[:2], -1)
    data = xr.Dataset({"x": (("chain", "draw", "k"), flat)})
    ess = np.asarray(az.ess(data, method="mean")["x"].values)
    assert (ess > min_ess).all(), ess
    error = flat.std((0, 1), ddof=1) / np.sqrt(ess)
    gap = np.abs(flat.mean((0, 1)) - exact.ravel())
    assert (gap <= 5 * error).all(), (gap / error).reshape(exact.shape)


def agree_gaussian(z, mean, cov, min_ess=100):
    """Mean and covariance of z, (chain, draw, ..., d)."""
    agree(z, mean, min_ess)
    centred, (i, j) = np.asarray(z) - mean, np.triu_indices(np.shape(z)[-1])
    agree(centred[..., i] * centred[..., j], cov[i, j], min_ess)


def joined(chains, *names):
    values = [np.asarray(chains.values[name], float) for name in names]
    return np.concatenate([a.reshape(*a.shape[: 3 if chains.has_rows else 2], -1) for a in values], -1)


def by_row(draws):
    """(draw, row, ...) of a program, all rows copies of one density, as chains."""
    return np.moveaxis(np.asarray(draws), 0, 1)


def softmax(x):
    weight = np.exp(x - x.max())
    return weight / weight.sum()


# (v, h)


def gibbs(backend, **options):
    return {"kernel": backend.sampling.Gibbs(), "num_samples": 100, "num_warmup": 20, **options}


def langevin(backend, **options):
    return {"kernel": backend.sampling.Langevin(0.3), "num_samples": 200, "num_warmup": 150, **options}


KERNELS = [gibbs, pytest.param(langevin, marks=pytest.mark.full)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_linear_gaussian_joint(backend, kernel):
    chains = backend.run(backend.bism("linear"), X, **kernel(backend, num_chains=100))
    agree_gaussian(joined(chains, "v", "h"), LINEAR.joint_mean, inv(LINEAR.joint_precision))
    energy = LINEAR.energy(*(np.asarray(chains.values[name][:, -1]) for name in "vh"))
    np.testing.assert_allclose(np.asarray(chains.log_joint[:, -1]), -energy, rtol=1e-10)
    acceptance = float(np.mean(np.asarray(chains.acceptance)))
    assert acceptance == 1 if kernel is gibbs else abs(acceptance - 0.574) < 0.05


@pytest.mark.parametrize("kernel", KERNELS)
def test_rbm_joint(backend, kernel):
    """Bits with a normalised prior: it counts."""
    chains = backend.run(backend.bism("rbm"), X, **kernel(backend, num_chains=100, init="noise"))
    z = joined(chains, "v", "h")
    h = np.concatenate(list(configurations(K)))
    weight, mean = softmax(BITS.log_weight(h)), BITS.conditional_mean(h)
    points = np.concatenate([mean, h], -1)
    second = np.einsum("s,si,sj->ij", weight, points, points)
    second[:D, :D] += BITS.s**2 * np.eye(D)
    agree(z, weight @ points)
    i, j = np.triu_indices(D + K)
    agree(z[..., i] * z[..., j], second[i, j])


# Given the rest


def test_each_given_the_other(backend):
    bism, options = backend.bism("rbm"), gibbs(backend, num_warmup=0, num_chains=2)
    chains = backend.run(bism, X, sites=["h"], **options)
    assert (chains.moved, chains.has_rows) == (("h",), True)
    assert np.shape(chains.values["h"]) == (2, 100, N, K)
    assert (np.asarray(chains.values["v"]) == X).all()
    agree(chains.values["h"], BITS.posterior(X))

    h = rng.integers(0, 2, (N, K)).astype(float)
    chains = backend.run(bism, X, sites=["v"], init={"h": backend.array(h)}, **options)
    assert chains.moved == ("v",)
    assert (np.asarray(chains.values["h"]) == h).all()
    agree_gaussian(np.asarray(chains.values["v"]) - BITS.conditional_mean(h), np.zeros(D), BITS.s**2 * np.eye(D))


# from nothing missing to everything
MISSING = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]], bool)


@pytest.mark.parametrize("kernel", KERNELS)
def test_missing_entries_of_a_gaussian(backend, kernel):
    num_chains = 10 if kernel is gibbs else 30
    chains = backend.run(backend.bism("linear"), X, **kernel(backend, missing=MISSING, num_chains=num_chains))
    assert chains.moved == ("v", "h")
    z, precision = joined(chains, "v", "h"), LINEAR.joint_precision
    for i, missing in enumerate(MISSING):
        assert (z[:, :, i, :D][..., ~missing] == X[i, ~missing]).all()
        moves = np.append(missing, [True] * K)
        held, inside = precision[np.ix_(moves, ~moves)], precision[np.ix_(moves, moves)]
        drive = np.append(LINEAR.b, LINEAR.c)[moves] - held @ X[i, ~missing]
        agree_gaussian(z[:, :, i, moves], inv(inside) @ drive, inv(inside))


@pytest.mark.full
def test_missing_entries_of_an_rbm(backend):
    chains = backend.run(backend.bism("rbm"), X, **gibbs(backend, missing={"v": MISSING}, num_chains=20))
    h = np.concatenate(list(configurations(K)))
    mean = BITS.conditional_mean(h)
    for i, missing in enumerate(MISSING):
        drive = h @ BITS.W.T
        free = (drive * BITS.b + 0.5 * (BITS.s * drive) ** 2)[:, missing].sum(-1)
        weight = softmax(h @ BITS.c + drive[:, ~missing] @ X[i, ~missing] + free)
        agree(np.asarray(chains.values["h"])[:, :, i], weight @ h)
        agree(np.asarray(chains.values["v"])[:, :, i, missing], weight @ mean[:, missing])
        assert (np.asarray(chains.values["v"])[:, :, i, ~missing] == X[i, ~missing]).all()


# Other latents


def test_bits_that_are_coupled_and_a_conditional_in_closed_form(backend):
    def given(values):
        return backend.dist.Gamma(SHAPE, 1 + 0.5 * values["v"][:, 0] ** 2)

    bism, kernel = backend.bism("mixed"), backend.sampling.Gibbs(conditionals={"g": given})
    density, _ = backend.density(bism, X, VISIBLE, "h", "g")
    kinds = {name: block.kind for block in density.blocks for name in block.names}
    assert kinds == {VISIBLE: "gaussian", "h": "units", "g": "free"}
    chains = backend.run(bism, X, kernel=kernel, num_samples=100, num_warmup=30, num_chains=100, init="noise")
    h = np.concatenate(list(configurations(K)))
    drive = h @ TO_BITS.T
    # v is Gaussian but for v₀, in which g leaves (1 + v₀²/2) to the power -SHAPE
    v0 = np.linspace(-15, 15, 3001)
    log_v0 = drive[:, :1] * v0 - 0.5 * v0**2 - SHAPE * np.log1p(0.5 * v0**2)
    rest = 0.5 * (drive[:, 1:] ** 2).sum(-1) + np.einsum("si,ij,sj->s", h, COUPLINGS, h)
    joint = softmax(log_v0 + rest[:, None])
    weight = joint.sum(-1)
    v, bits, g = (np.asarray(chains.values[name]) for name in "vhg")
    agree(bits[..., :, None] * bits[..., None, :], np.einsum("s,si,sj->ij", weight, h, h))
    agree(v[..., 1:], weight @ drive[:, 1:])
    for power in (1, 2):
        agree(v[..., 0] ** power, joint.sum(0) @ v0**power)
    mean = SHAPE / (1 + 0.5 * v0**2)
    agree(g, joint.sum(0) @ mean)
    agree(g[..., None] * bits, (joint @ mean) @ h)


def test_a_positive_latent(backend):
    chains = backend.run(
        backend.bism("mixed"),
        X,
        kernel=backend.sampling.Langevin(0.5),
        sites=["g"],
        num_samples=150,
        num_warmup=100,
        num_chains=20,
    )
    g, rate = np.asarray(chains.values["g"]), 1 + 0.5 * X[:, 0] ** 2
    agree(g, SHAPE / rate)
    agree(g**2, SHAPE * (SHAPE + 1) / rate**2)
    assert abs(np.mean(np.asarray(chains.acceptance)) - 0.574) < 0.1
    # of the site's own values, without the Jacobian of the transform
    exact = (SHAPE - 1) * np.log(g) - g * rate
    still = np.asarray(chains.log_joint) - exact
    np.testing.assert_allclose(still, np.broadcast_to(still[:1, :1], still.shape), rtol=1e-9, atol=1e-9)


@pytest.mark.full
def test_a_one_hot_vector_and_a_label(backend):
    bism = backend.bism("coded")
    density, _ = backend.density(bism, X, "o", "z")
    assert {name: block.kind for block in density.blocks for name in block.names} == {"o": "affine", "z": "units"}
    chains = backend.run(bism, X, **gibbs(backend, num_chains=100))
    joint = softmax(0.5 * (TO_BITS**2).sum(0)[:, None] + TABLE.T + LABEL_LOGITS)
    o, z = np.asarray(chains.values["o"]), np.eye(K)[np.asarray(chains.values["z"])]
    assert (o.sum(-1) == 1).all()
    agree(o[..., None] * z[..., None, :], joint)
    agree(np.asarray(chains.values["v"])[..., None] * o[..., None, :], TO_BITS * joint.sum(1))
    with pytest.raises(ValueError, match=r"Site 'o' is .*marginal=True.*run_chains.*Gibbs"):
        backend.program(bism, X)


def test_a_conditional_of_the_visible_site(backend):
    """Drawn after the bits, given their new values, with noise of its own."""
    m = 4000

    def given(values):
        mean = backend.array(BITS.b) + BITS.s**2 * (values["h"] @ backend.array(BITS.W).T)
        return backend.dist.Normal(mean, BITS.s)

    density, _ = backend.density(backend.bism("rbm"), X, VISIBLE, "h")
    point = {VISIBLE: backend.array(np.tile(X[:1], (m, 1))), "h": backend.array(np.zeros((m, K)))}
    x, _, _ = backend.step(backend.sampling.Gibbs(conditionals={"v": given}), density, point)
    h = np.asarray(x["h"])
    noise = np.asarray(x[VISIBLE]) - BITS.conditional_mean(h)
    agree(h[None], BITS.posterior(X[0]))
    agree_gaussian(noise[None], np.zeros(D), BITS.s**2 * np.eye(D))
    agree((noise[:, :, None] * h[:, None, :])[None], 0)


@pytest.mark.parametrize("given", [(), ("g",), ("g", "h")], ids=["found", "one", "two"])
def test_no_two_draws_share_their_noise(backend, given):
    """Neither of two blocks, nor of two conditionals, nor of two steps: a random key used twice would show."""
    m, start = 4000, rng.normal(size=(N, 2, K))

    def conditional(name):
        def fn(values):
            squares = sum(value**2 for site, value in values.items() if site != name)
            return backend.dist.Normal(0.0, 1 / backend.xp.sqrt(1 + squares)).to_event(1)

        return fn

    bism = backend.bism("crossed")
    density, _ = backend.density(bism, X, VISIBLE, "h", "g")
    assert [(block.kind, block.names) for block in density.blocks] == [("gaussian", (n,)) for n in (VISIBLE, "h", "g")]
    kernel = backend.sampling.Gibbs(conditionals={name: conditional(name) for name in given})
    init = {"h": backend.array(start[:, 0]), "g": backend.array(start[:, 1])}
    chains = backend.run(bism, X, kernel=kernel, num_samples=2, num_warmup=0, num_chains=m, init=init)
    rows = np.arange(m) % N
    here = {"v": X[rows], "h": start[rows, 0], "g": start[rows, 1]}
    noise = []
    for step in range(2):
        # the order of the draws: what is found from the energy, then what is given
        for name in [*(name for name in "vhg" if name not in given), *given]:
            squares = sum(value**2 for site, value in here.items() if site != name)
            here[name] = np.asarray(chains.values[name])[:, step]
            noise.append(here[name] * np.sqrt(1 + squares))
    noise = np.concatenate(noise, -1)
    agree_gaussian(noise[None], np.zeros(noise.shape[1]), np.eye(noise.shape[1]))


# Langevin dynamics


def test_the_bias_of_unadjusted_langevin(backend):
    """On a Gaussian of precision P it leaves that of precision P (1 - ε² P / 4)."""
    P, step, m = LINEAR.joint_precision, 0.7, 20_000
    biased = inv(P - step**2 / 4 * P @ P)
    z = np.random.default_rng(1).multivariate_normal(LINEAR.joint_mean, biased, m)
    density, _ = backend.density(backend.bism("linear"), X, VISIBLE, "h")
    point = {VISIBLE: backend.array(z[:, :D]), "h": backend.array(z[:, D:])}
    x, _, acceptance = backend.step(backend.sampling.Langevin(step, adjusted=False), density, point)
    z = np.concatenate([np.asarray(x[VISIBLE]), np.asarray(x["h"])], -1)
    agree_gaussian(z[None], LINEAR.joint_mean, biased)
    assert (np.asarray(acceptance) == 1).all()


def test_adjusted_langevin_leaves_what_it_is_given(backend):
    """One step from exact draws of a half-normal; proposals without a density, NaN here, are refused."""
    numbers = np.random.default_rng(1).normal(size=(40_000, 1))
    density, _ = backend.density(backend.bism("linear"), X, VISIBLE)
    half = dataclasses.replace(
        density,
        log_prob=lambda x: (backend.xp.sqrt(x[VISIBLE]) * 0 - 0.5 * x[VISIBLE] ** 2).sum(-1),
        blocks=(density.blocks[0]._replace(kind="free"),),
        precisions={},
    )
    x, _, acceptance = backend.step(backend.sampling.Langevin(1.0), half, {VISIBLE: backend.array(np.abs(numbers))})
    v, acceptance = np.asarray(x[VISIBLE])[:, 0], np.asarray(acceptance)
    assert (v > 0).all()
    stayed = v == np.abs(numbers[:, 0])
    for draws, exact in (
        (v, math.sqrt(2 / math.pi)),
        (v**2, 1),
        (v**3, 2 * math.sqrt(2 / math.pi)),
        (stayed, 1 - acceptance.mean()),
    ):
        assert abs(draws.mean() - exact) < 5 * draws.std() / math.sqrt(len(draws))
    assert (acceptance == 0).mean() > 0.1


def test_a_step_at_a_temperature(backend):
    """Bits given v, then v given the bits: both of the density to the power 1/T."""
    step, T, m = 0.3, 5.0, 4000
    kernel = backend.sampling.AnnealedLangevin(step, temperatures=(T, 1.0), num_steps=1)
    density, _ = backend.density(backend.bism("rbm"), X, VISIBLE, "h")
    v, logits = np.tile(X[:1], (m, 1)), BITS.c + X[0] @ BITS.W
    point = {VISIBLE: backend.array(v), "h": backend.array(np.zeros((m, K)))}
    x, state, _ = backend.step(kernel, density, point)
    h = np.asarray(x["h"])
    agree(h[None], 1 / (1 + np.exp(-logits / T)))
    score = (BITS.conditional_mean(h) - v) / BITS.s**2
    noise = (np.asarray(x[VISIBLE]) - v - 0.5 * step**2 * score) / (step * math.sqrt(T))
    agree_gaussian(noise[None], np.zeros(D), np.eye(D))
    # the schedule goes on to 1, and stays there
    assert int(state) == 1
    x, _, _ = backend.step(kernel, density, point, 7)
    agree(np.asarray(x["h"])[None], 1 / (1 + np.exp(-logits)))


def test_the_last_step_is_the_mean_of_clean_data(backend):
    sigma, options = 0.4, {"temperatures": (1.0,), "num_steps": 1}
    finish = backend.sampling.AnnealedLangevin(0.1, sigma=sigma, **options).finish
    density, x = backend.density(backend.bism("linear"), X, VISIBLE, "h")
    # clean data of precision (Λ⁻¹ - σ²I)⁻¹, seen with noise
    clean = LINEAR.cov - sigma**2 * np.eye(D)
    mean = LINEAR.mean + (X - LINEAR.mean) @ LINEAR.precision @ clean
    np.testing.assert_allclose(np.asarray(finish(density, x)[VISIBLE]), mean, rtol=1e-9)
    # latents that stand still are conditioned upon
    h = np.asarray(x["h"])
    mean = X + sigma**2 * (LINEAR.b + h @ LINEAR.W.T - X @ LINEAR.A)
    np.testing.assert_allclose(np.asarray(finish(density.moving({VISIBLE: True}), x)[VISIBLE]), mean, rtol=1e-9)
    # and so are visible values
    held = density.moving({VISIBLE: backend.array(MISSING), "h": True})
    moved = np.asarray(finish(held, x)[VISIBLE])
    assert ((moved == X) == ~MISSING).all()
    assert (np.asarray(finish(density.moving({"h": True}), x)[VISIBLE]) == X).all()
    # bits are summed out
    density, x = backend.density(backend.bism("rbm"), X, VISIBLE, "h")
    np.testing.assert_allclose(
        np.asarray(finish(density, x)[VISIBLE]), X + sigma**2 * BITS.score(X), rtol=1e-9, atol=1e-12
    )


@pytest.mark.full
def test_annealed_chains(backend):
    P, step, sigma = LINEAR.joint_precision, 0.7, 0.4
    kernel = backend.sampling.AnnealedLangevin(step, temperatures=(9, 3, 1), num_steps=25, sigma=sigma)
    chains = backend.run(backend.bism("linear"), X, kernel=kernel, num_samples=100, num_chains=200, init="noise")
    assert int(chains.kernel_state) == 175
    shrink = np.eye(D) - sigma**2 * LINEAR.precision
    cov = shrink @ inv(P - step**2 / 4 * P @ P)[:D, :D] @ shrink.T
    agree_gaussian(chains.values["v"], LINEAR.mean, cov)
    # the chains themselves keep their noise
    v = np.asarray(chains.point[VISIBLE])
    np.testing.assert_allclose(np.asarray(chains.values["v"])[:, -1], v + sigma**2 * LINEAR.score(v), rtol=1e-9)


# Where chains start, and how they go on


def test_chains_start_where_they_are_told_and_go_on(backend):
    bism = backend.bism("linear")

    def run(step, **more):
        kernel = backend.sampling.Langevin(step, adjusted=False)
        chains = backend.run(bism, X, kernel=kernel, num_samples=1, **more)
        return chains, {name: np.asarray(value)[:, 0] for name, value in chains.values.items()}

    rows, h = np.arange(N + 2) % N, rng.normal(size=(N + 2, K))
    chains, x = run(1e-9, num_warmup=0, num_chains=N + 2, init={"h": backend.array(h)})
    np.testing.assert_allclose(x["v"], X[rows], atol=1e-7)
    np.testing.assert_allclose(x["h"], h, atol=1e-7)
    # from the same place and with the same state, whose step is the small one; without a warm-up
    _, x = run(0.5, num_chains=N + 2, chains=chains)
    np.testing.assert_allclose(x["v"], X[rows], atol=1e-7)
    np.testing.assert_allclose(x["h"], h, atol=1e-7)
    _, x = run(1e-9, num_warmup=0, num_chains=2000, init="noise")
    agree_gaussian(x["v"][None], X.mean(0), np.diag(4 * X.var(0)))
    assert abs(x["h"]).max() < 2 + 1e-7
    agree(x["h"][None] ** 2, 4 / 3)


def test_the_same_seed_gives_the_same_draws(backend):
    bism, options = backend.bism("linear"), gibbs(backend, num_warmup=3)
    one = backend.run(bism, X, **{**options, "num_samples": 6})
    two = backend.run(bism, X, **{**options, "num_samples": 2, "thinning": 3})
    for name in ("v", "h"):
        np.testing.assert_array_equal(np.asarray(one.values[name])[:, 2::3], np.asarray(two.values[name]))
    assert (np.asarray(one.values["v"])[:, 1:] != np.asarray(one.values["v"])[:, :-1]).all()


@pytest.mark.full
@pytest.mark.parametrize("options", [{"size": N}, {"rows": N}], ids=["fixed", "subsampled"])
def test_models_of_a_fixed_number_of_rows(backend, options):
    """The draws are those of a model that takes any number: they are run a few rows at a time, N/B left out."""
    bism, x = backend.bism("linear", **options), np.tile(X, (2, 1)) if "rows" in options else X
    density, _ = backend.density(bism, x, VISIBLE)
    assert not density.energy.resizes
    chains = backend.run(bism, x, kernel=backend.sampling.Gibbs(), num_samples=100, num_warmup=0, num_chains=25)
    z = joined(chains, "v", "h")
    agree_gaussian(z, LINEAR.joint_mean, inv(LINEAR.joint_precision))
    np.testing.assert_allclose(
        np.asarray(chains.log_joint), -LINEAR.energy(*np.split(z.reshape(-1, D + K), [D], -1)).reshape(z.shape[:2])
    )


def test_chains_go_on_at_their_own_rows(backend):
    """All rows, though a plate subsamples them in training; and the rows have densities of their own."""
    bism, x = backend.bism("linear", rows=4, drives=True), rng.normal(size=(2 * N, D))
    options = {"kernel": backend.sampling.Gibbs(), "num_warmup": 0, "num_chains": 50}
    chains = backend.run(bism, x, sites=["h"], num_samples=1, **options)
    rows = np.asarray(chains.rows["data"])
    np.testing.assert_array_equal(np.asarray(chains.values["v"])[0, 0], x)
    np.testing.assert_array_equal(rows, np.arange(2 * N))
    later = backend.run(bism, x, seed=1, sites=["h"], num_samples=20, chains=chains, **options)
    np.testing.assert_array_equal(np.asarray(later.rows["data"]), rows)
    np.testing.assert_array_equal(np.asarray(later.values["v"])[0, 0], x[rows])
    h = np.asarray(later.values["h"])
    agree_gaussian(h - (x[rows] @ LINEAR.W + LINEAR.c + DRIVES[rows]) @ inv(LINEAR.B), np.zeros(K), inv(LINEAR.B))
    quadratic = -LINEAR.energy(x[rows], h[0, -1]) + (DRIVES[rows] * h[0, -1]).sum(-1)
    np.testing.assert_allclose(np.asarray(later.log_joint)[0, -1], quadratic, rtol=1e-9)
    # (v, h) too, as the rows are not alike
    joint = backend.run(bism, x, num_samples=1, **options)
    later = backend.run(bism, x, seed=1, num_samples=20, chains=joint, **options)
    rows, z = np.asarray(joint.rows["data"]), joined(later, "v", "h")
    drive = np.concatenate([np.zeros((2 * N, D)), DRIVES[rows]], -1) @ inv(LINEAR.joint_precision)
    agree_gaussian(z - LINEAR.joint_mean - drive, np.zeros(D + K), inv(LINEAR.joint_precision))
    for other in (x + 1, x[:N]):
        with pytest.raises(ValueError, match=r"chains (belong to other data|were made by another call)"):
            backend.run(bism, other, sites=["h"], num_samples=1, chains=chains, **options)


def test_chains_go_on_at_their_own_data(backend):
    bism, options = backend.bism("linear"), gibbs(backend, num_samples=1, num_warmup=0, num_chains=2)
    chains = backend.run(bism, X, missing=MISSING, **options)
    backend.run(bism, np.where(MISSING, 0.0, X), missing=MISSING, chains=chains, **options)
    with pytest.raises(ValueError, match="chains belong to other data"):
        backend.run(bism, np.where(MISSING, X, 0.0), missing=MISSING, chains=chains, **options)
    # the data are but a start if all moves
    chains = backend.run(bism, X, **options)
    backend.run(bism, X + 1, chains=chains, **options)


# Misuse


def test_misuse(backend):
    s = backend.sampling
    gibbs = s.Gibbs()
    short = s.AnnealedLangevin(0.1, temperatures=(2, 1), num_steps=5)
    wrong = s.Gibbs(conditionals={"g": lambda values: backend.dist.Exponential(backend.xp.ones(3))})
    linear, other = backend.bism("linear"), backend.bism("mixed")
    for bism, x, options, message in (
        (other, X, {"kernel": gibbs}, "conditional of site 'g' is not Gaussian"),
        (
            other,
            X,
            {"kernel": s.Gibbs(conditionals={"y": None})},
            r"names 'y'; the sites are \['g', 'h', 'v'\]",
        ),
        (other, X, {"kernel": wrong}, r"site 'g' gives values of shape \(3,\), where \(6,\)"),
        (linear, X, {"kernel": gibbs, "sites": ["g"]}, r"sites names 'g'; the sites are \['h', 'v'\]"),
        (linear, X, {"kernel": gibbs, "sites": "h"}, r"sites=\['h'\]"),
        (linear, X, {"kernel": gibbs, "missing": MISSING[:2]}, r"missing\['v'\] has shape \(2, 3\).* has \(6, 3\)"),
        (linear, X, {"kernel": gibbs, "missing": {"w": MISSING}}, r"missing names \['w'\]; .* are \['v'\]"),
        (linear, X, {"kernel": gibbs, "missing": MISSING & False, "sites": ["v"]}, "Nothing moves"),
        (linear, X, {"kernel": gibbs, "init": "zero"}, "init should be 'data', 'noise'"),
        (linear, X, {"kernel": gibbs, "init": {"g": X}}, "init names 'g'"),
        (linear, X, {"kernel": gibbs, "init": {"h": backend.array(X[:2])}}, r"init\['h'\] has shape \(2, 3\)"),
        (linear, X, {"kernel": gibbs, "num_samples": 0}, "at least 1, got 0"),
        (linear, X, {"kernel": gibbs, "num_chains": 0}, "num_chains must be at least 1"),
        (linear, X, {"kernel": short, "num_warmup": 9}, "num_warmup = 9 ends before the schedule"),
    ):
        with pytest.raises(ValueError, match=message):
            backend.run(bism, x, **options)
    with pytest.raises(ValueError, match="step_size must be positive"):
        s.Langevin(0.0)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        s.Langevin(num_steps=0)
    with pytest.raises(ValueError, match="temperatures must fall to 1"):
        s.AnnealedLangevin(0.1, temperatures=(1, 2))
    chains = backend.run(linear, X, kernel=gibbs, num_samples=1, num_warmup=0)
    with pytest.raises(ValueError, match="made by another call"):
        backend.run(linear, X, kernel=gibbs, chains=chains, num_chains=2)


def test_chains_that_leave_the_model(backend):
    kernel = backend.sampling.Langevin(20.0, adjusted=False)
    with pytest.raises(FloatingPointError, match=r"not finite at draw \d+ of row \d: .*smaller step_size"):
        backend.run(backend.bism("linear"), X, kernel=kernel, num_samples=200, num_warmup=0)


# The host library's own MCMC


def test_nuts_on_the_joint(backend):
    program = backend.program(backend.bism("linear"), X)
    h = rng.normal(size=(N, K))
    value, slopes = backend.log_density(program, {"v": X, "h": h})
    assert value == pytest.approx(-LINEAR.energy(X, h).sum(), rel=1e-10)
    np.testing.assert_allclose(slopes["v"], LINEAR.b + h @ LINEAR.W.T - X @ LINEAR.A, rtol=1e-8, atol=1e-10)
    mcmc = backend.nuts(program, 50, 60)
    draws = mcmc.get_samples()
    z = np.concatenate([by_row(draws["v"]), by_row(draws["h"])], -1)
    agree_gaussian(z, LINEAR.joint_mean, inv(LINEAR.joint_precision))
    tree = backend.from_mcmc(mcmc)
    assert tree["posterior"]["v"].shape == (1, 60, N, D)
    assert {"diverging"} <= set(tree["sample_stats"])


@pytest.mark.full
def test_nuts_on_a_positive_latent(backend):
    """The host library's own transform and Jacobian, and not ours besides."""
    program = backend.program(backend.bism("mixed"), X, sites=["g"])
    g, rate = by_row(backend.nuts(program, 100, 200).get_samples()["g"])[:, :, None], 1 + 0.5 * X[:, 0] ** 2
    for row, r in zip(g, rate, strict=True):
        agree(row[None], SHAPE / r, 100)
        agree(row[None] ** 2, SHAPE * (SHAPE + 1) / r**2, 100)


def test_the_program_of_a_positive_latent(backend):
    program = backend.program(backend.bism("mixed"), X, sites=["g"])
    g, rate = rng.gamma(SHAPE, size=N), 1 + 0.5 * X[:, 0] ** 2
    _, slopes = backend.log_density(program, {"g": g})
    np.testing.assert_allclose(slopes["g"], (SHAPE - 1) / g - rate, rtol=1e-8, atol=1e-10)


def test_the_program_with_the_bits_summed_out(backend):
    program = backend.program(backend.bism("rbm"), X, marginal=True)
    value, slopes = backend.log_density(program, {"v": X})
    prior = X.shape[0] * K * np.log(1 - PRIOR)  # of the bits, which the oracle leaves out
    assert value == pytest.approx(prior - BITS.free_energy(X).sum(), rel=1e-10)
    np.testing.assert_allclose(slopes["v"], BITS.score(X), rtol=1e-8, atol=1e-10)


@pytest.mark.full
def test_nuts_with_the_bits_summed_out(backend):
    program = backend.program(backend.bism("rbm"), X, marginal=True)
    v = by_row(backend.nuts(program, 150, 300).get_samples()["v"])
    h = np.concatenate(list(configurations(K)))
    agree(v, softmax(BITS.log_weight(h)) @ BITS.conditional_mean(h))


def test_the_program_of_missing_entries(backend):
    program = backend.program(backend.bism("linear"), X, missing=MISSING)
    v, h = np.where(MISSING, rng.normal(size=X.shape), X), rng.normal(size=(N, K))
    value, slopes = backend.log_density(program, {"v_missing": v[MISSING], "h": h})
    assert value == pytest.approx(-LINEAR.energy(v, h).sum(), rel=1e-10)
    np.testing.assert_allclose(slopes["v_missing"], (LINEAR.b + h @ LINEAR.W.T - v @ LINEAR.A)[MISSING], rtol=1e-8)


def test_the_program_with_some_latents_summed_out(backend):
    """Coupled bits are summed over, the positive latent moves: the host's own Jacobian, and not ours besides."""
    program = backend.program(backend.bism("mixed"), X, marginal=["h"])
    g, h = rng.gamma(SHAPE, size=N), np.concatenate(list(configurations(K)))
    drive = X @ TO_BITS @ h.T + np.einsum("si,ij,sj->s", h, COUPLINGS, h)
    weight = np.exp(drive - logsumexp(drive, 1, keepdims=True))
    rate = 1 + 0.5 * X[:, 0] ** 2
    rows = logsumexp(drive, 1) - 0.5 * (X**2).sum(-1) + (SHAPE - 1) * np.log(g) - g * rate
    value, slopes = backend.log_density(program, {"v": X, "g": g})
    assert value == pytest.approx(rows.sum(), rel=1e-10)
    np.testing.assert_allclose(slopes["g"], (SHAPE - 1) / g - rate, rtol=1e-8, atol=1e-10)
    score = weight @ h @ TO_BITS.T - X - np.outer(g * X[:, 0], np.eye(D)[0])
    np.testing.assert_allclose(slopes["v"], score, rtol=1e-8, atol=1e-10)


def test_the_program_of_missing_entries_with_the_bits_summed_out(backend):
    program = backend.program(backend.bism("rbm"), X, missing=MISSING, marginal=True)
    v = np.where(MISSING, rng.normal(size=X.shape), X)
    value, slopes = backend.log_density(program, {"v_missing": v[MISSING]})
    assert value == pytest.approx(N * K * np.log(1 - PRIOR) - BITS.free_energy(v).sum(), rel=1e-10)
    np.testing.assert_allclose(slopes["v_missing"], BITS.score(v)[MISSING], rtol=1e-8, atol=1e-10)


@pytest.mark.full
def test_nuts_with_some_latents_summed_out(backend):
    """Given v the positive latent is a Gamma, whatever the bits are."""
    program = backend.program(backend.bism("mixed"), X, sites=["g"], marginal=["h"])
    g, rate = by_row(backend.nuts(program, 100, 200).get_samples()["g"])[:, :, None], 1 + 0.5 * X[:, 0] ** 2
    for row, r in zip(g, rate, strict=True):
        agree(row[None], SHAPE / r, 100)


def test_programs_that_can_not_be(backend):
    rbm, linear, mixed = (backend.bism(name) for name in ("rbm", "linear", "mixed"))
    for bism, options, message in (
        (rbm, {"marginal": True, "sites": ["h"]}, "Site 'h' is in sites and in marginal"),
        (rbm, {"marginal": True, "sites": []}, "Nothing moves"),
        (rbm, {"marginal": "h"}, r"marginal=\['h'\]"),
        (rbm, {"marginal": ["v"]}, r"marginal names 'v'; the latent sites are \['h'\]"),
        (mixed, {"marginal": True}, "can't be summed in closed form or by enumeration"),
        (linear, {"sites": ["g"]}, r"sites names 'g'; the sites are \['h', 'v'\]"),
        (linear, {"sites": "h"}, r"sites=\['h'\]"),
        (linear, {"missing": MISSING[:2]}, r"missing\['v'\] has shape \(2, 3\).* has \(6, 3\)"),
        (linear, {"missing": {"w": MISSING}}, r"missing names \['w'\]; .* are \['v'\]"),
        (linear, {"missing": MISSING & False, "sites": ["v"]}, "Nothing moves"),
        (linear, {"init": {"g": X}}, "init names 'g'"),
        (linear, {"sites": ["v"], "init": {"h": backend.array(X[:2])}}, r"init\['h'\] has shape \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            backend.program(bism, X, **options)


@pytest.mark.parametrize("kind", ["HMC", pytest.param("NUTS", marks=pytest.mark.full)])
def test_a_recorded_kernel_tells_its_energy(backend, kind):
    """Of d Gaussian coordinates it is, above the minimum, half a chi-square of 2d: U has d of them and K the rest."""
    program, m = backend.program(backend.bism("linear"), X), N * (D + K)
    host = numpyro.infer if backend is NUMPYRO else pyro.infer
    options = {"trajectory_length": 1.5} if kind == "HMC" else {}

    def kernel(program):
        return backend.sampling.with_statistics(getattr(host, kind)(program, **options))

    mcmc = backend.nuts(program, 100, 200, kernel)
    data = backend.package.evaluation.arviz.read_samples("posterior", mcmc, N, {"h": np.zeros((N, K))}, rows=True)
    assert data.method == kind.lower()
    energy = data.stats["energy"] - N * LINEAR.energy(*np.split(LINEAR.joint_mean[None], [D], -1))
    agree(np.stack([energy, (energy - m) ** 2], -1), m, 20)  # its mean and its variance
    assert not data.stats["diverging"].any()
    step, acceptance = data.stats["step_size"], data.stats["acceptance_rate"]
    assert step.shape == acceptance.shape == (1, 200)
    assert (step == step[0, 0]).all()
    assert 0 < step[0, 0] < 2
    assert ((acceptance >= 0) & (acceptance <= 1 + 1e-9)).all()
    assert 0.6 < acceptance.mean() < 1
    with pytest.raises(ValueError, match="with_statistics takes an HMC or NUTS"):
        backend.sampling.with_statistics(program)


def test_progress_is_shown(backend, capsys):
    options = {"num_samples": 3, "num_warmup": 2, "num_chains": 2}
    backend.run(backend.bism("linear"), X, kernel=backend.sampling.Gibbs(), progress_bar=True, **options)
    shown = capsys.readouterr().err
    assert "Gibbs" in shown
    assert "5/5" in shown
    backend.run(backend.bism("linear"), X, kernel=backend.sampling.Gibbs(), **options)
    assert capsys.readouterr().err == ""


def test_pyro_starts_no_hmc_on_a_bounded_improper_site():
    def model(x):
        bias = pyro.param("bias", torch.zeros(()))
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
            g = pyro.sample("g", dist.ImproperUniform(dist.constraints.positive, (), ()))
            pyro.factor("energy", bias - 0.5 * (v**2).sum(-1) - g)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("g", dist.LogNormal(pyro.param("loc", torch.zeros(())) + 0.1 * x[:, 0], 1.0))

    loss = pyro_bism.DenoisingScoreMatching(sigma=0.3)
    with (
        PYRO as backend,
        pytest.raises(ValueError, match=r"'g' is an ImproperUniform of bounded support.*mask\(False\)"),
    ):
        bism = pyro_bism.BiSM(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss)
        backend.program(bism, X, sites=["g"])


def test_pyro_moves_no_discrete_site():
    with PYRO as backend, pytest.raises(ValueError, match=r"Site 'h' is discrete.*marginal=True.*run_chains.*Gibbs"):
        backend.program(backend.bism("rbm"), X)


@pytest.mark.full
def test_discrete_hmc_within_gibbs():
    with NUMPYRO as backend:
        program = backend.program(backend.bism("rbm"), X)
        mcmc = backend.nuts(program, 200, 400, lambda program: DiscreteHMCGibbs(numpyro.infer.NUTS(program)))
        h = np.concatenate(list(configurations(K)))
        weight = softmax(BITS.log_weight(h))
        agree(by_row(mcmc.get_samples()["h"]), weight @ h)
        agree(by_row(mcmc.get_samples()["v"]), weight @ BITS.conditional_mean(h))
