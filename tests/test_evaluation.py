"""Normalisers, likelihoods, divergences and tests of fit, against closed forms, enumeration and quadrature.

The tests see a package only through its ``Backend``: NumPy arrays in, NumPy arrays out. A model is a function of
``backend``, which has the arrays' functions, and the oracle beside it knows the answers.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from numpy.linalg import inv
from numpyro.infer import TraceEnum_ELBO as NumpyroTraceEnum_ELBO
from pyro.infer import TraceEnum_ELBO

import numpyro_bism
import numpyro_bism.evaluation
import pyro_bism
import pyro_bism.evaluation
from numpyro_bism.energies import Energy
from numpyro_bism.programs import visible
from numpyro_bism.programs.records import record
from oracles import LOG_2PI, GaussianBernoulliRBM, GaussianGuide, LinearGaussian, central_difference, configurations

D, K = 3, 3
rng = np.random.default_rng(0)
LINEAR = LinearGaussian.random(rng, D, K)
X = rng.normal(size=(6, D))


class Backend:
    """What the two have in common: NumPy out of everything."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def free_energy(self, model, x, **options):
        return np.asarray(self._call("free_energy", model, x, **options))

    def exact_log_normalizer(self, model, x, **options):
        return self._call("exact_log_normalizer", model, x, **options)

    def ais(self, model, x, seed=0, **options):
        return self._call("ais", model, x, seed=seed, progress_bar=False, **options)

    def log_likelihood(self, model, x, **options):
        found = self._call("log_likelihood", model, x, seed=0, progress_bar=False, **options)
        return np.asarray(found.value), np.asarray(found.standard_error), found.method

    def fisher_divergence(self, model, x, data_score=None, **options):
        if callable(data_score):
            score = data_score
            data_score = lambda v: self.array(score(np.asarray(v)))  # noqa: E731
        elif data_score is not None:
            data_score = self.array(data_score)
        found = self._call("fisher_divergence", model, x, seed=0, data_score=data_score, **options)
        return float(found.value), float(found.standard_error), found.method

    def kernel_stein_discrepancy(self, model, x, **options):
        return self._call("kernel_stein_discrepancy", model, x, seed=0, **options)


class PyroBackend(Backend):
    """Programs of ``pyro_bism``, in float64."""

    name = "pyro"
    package, evaluation, integrals = pyro_bism, pyro_bism.evaluation, pyro_bism.energies.integrals
    dist, xp = dist, torch
    array = staticmethod(torch.as_tensor)

    def __enter__(self):
        pyro.clear_param_store()
        torch.set_default_dtype(torch.float64)
        return self

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)

    def bism(self, model, rows=None, size=None):
        """:param rows: of the data, are subsampled.
        :param size: a fixed one, of the plate.
        """

        def p(x, tilt=None):
            bias = pyro.param("bias", torch.zeros(()))
            with pyro.plate("data", size or len(x), subsample_size=rows) as i:
                x = x if rows is None else x[i]
                v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1).mask(False), obs=x)
                h = [pyro.sample(name, site.prior(self)) for name, site in model.latents.items()]
                tilted = 0.0 if tilt is None else tilt * v[:, 0]
                pyro.factor("energy", bias * v.sum(-1) + tilted - model.energy(self, v, *h))

        def q(x, tilt=None):
            shift = pyro.param("shift", torch.zeros(()))
            with pyro.plate("data", size or len(x), subsample_size=rows) as i:
                x = x if rows is None else x[i]
                for name, site in model.latents.items():
                    pyro.sample(name, site.guide(self, x, shift), infer=site.infer)

        summed = any(site.infer for site in model.latents.values())
        return pyro_bism.BiSM(
            p,
            q,
            pyro.optim.Adam({"lr": 1e-2}),
            pyro_bism.DenoisingScoreMatching(sigma=0.3),
            inner_loss=TraceEnum_ELBO(max_plate_nesting=1) if summed else None,
        )

    def _call(self, function, model, x, *more, seed=0, guided=False, rows=None, size=None, **options):
        pyro.set_rng_seed(seed)
        bism = self.bism(model, rows, size)
        return getattr(pyro_bism, function)(bism, *map(torch.as_tensor, (x, *more)), **options)

    def summary(self, log_weights):
        return self.evaluation.annealing._summary(torch.as_tensor(log_weights), None)

    def stein_test(self, v, score, num_bootstrap, seed=0):
        pyro.set_rng_seed(seed)
        return self.evaluation.fit.stein_test(v, score, num_bootstrap)

    def maximum_mean_discrepancy(self, first, second, seed=0, **options):
        pyro.set_rng_seed(seed)
        return pyro_bism.maximum_mean_discrepancy(first, second, **options)


class NumpyroBackend(Backend):
    """Programs of ``numpyro_bism``, in float64."""

    name = "numpyro"
    package, evaluation, integrals = numpyro_bism, numpyro_bism.evaluation, numpyro_bism.energies.integrals
    dist, xp = ndist, jnp
    array = staticmethod(jnp.asarray)

    def __enter__(self):
        self.double = jax.enable_x64(True)
        self.double.__enter__()
        return self

    def __exit__(self, *_):
        self.double.__exit__(None, None, None)

    def bism(self, model, rows=None, size=None):
        """:param rows: of the data, are subsampled.
        :param size: a fixed one, of the plate.
        """

        def p(x, tilt=None):
            bias = numpyro.param("bias", jnp.zeros(()))
            with numpyro.plate("data", size or len(x), subsample_size=rows) as i:
                x = x if rows is None else x[i]
                v = numpyro.sample("v", ndist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1).mask(False), obs=x)
                h = [numpyro.sample(name, site.prior(self)) for name, site in model.latents.items()]
                tilted = 0.0 if tilt is None else tilt * v[:, 0]
                numpyro.factor("energy", bias * v.sum(-1) + tilted - model.energy(self, v, *h))

        def q(x, tilt=None):
            shift = numpyro.param("shift", jnp.zeros(()))
            with numpyro.plate("data", size or len(x), subsample_size=rows) as i:
                x = x if rows is None else x[i]
                for name, site in model.latents.items():
                    numpyro.sample(name, site.guide(self, x, shift), infer=site.infer)

        summed = any(site.infer for site in model.latents.values())
        return numpyro_bism.BiSM(
            p,
            q,
            numpyro.optim.Adam(1e-2),
            numpyro_bism.DenoisingScoreMatching(sigma=0.3),
            inner_loss=NumpyroTraceEnum_ELBO(max_plate_nesting=1) if summed else None,
        )

    @functools.cache  # noqa: B019  (compilation is most of the time: one energy of each kind for all tests)
    def untrained(self, model, size):
        return Untrained(self.bism(model, size=size).model)

    @functools.cache  # noqa: B019
    def initial(self, model):
        """A BiSM, its state and X: it remembers its energy for the same array."""
        bism, x = self.bism(model), jnp.asarray(X)
        return bism, bism.init(jax.random.key(0), x), x

    def _call(self, function, model, x, *more, seed=None, guided=False, rows=None, size=None, **options):
        """:param guided: a BiSM at X is wanted, and not its energy alone."""
        args = [jnp.asarray(a) for a in (x, *more)]
        trained, state = self.untrained(model, size), None
        if guided:
            trained, state, *args = self.initial(model)
        elif rows:
            trained = self.bism(model, rows)
            state = trained.init(jax.random.key(0), *args)
        if seed is not None or function == "ais":
            options["rng_key"] = jax.random.key(seed or 0)
        return getattr(numpyro_bism, function)(trained, state, *args, **options)

    def summary(self, log_weights):
        return self.evaluation.annealing._summary(jnp.asarray(log_weights), None)

    def stein_test(self, v, score, num_bootstrap, seed=0):
        return self.evaluation.fit.stein_test(v, score, jax.random.key(seed), num_bootstrap)

    def maximum_mean_discrepancy(self, first, second, seed=0, **options):
        return numpyro_bism.maximum_mean_discrepancy(first, second, rng_key=jax.random.key(seed), **options)


class Untrained:
    """What the estimators see of a trained model, a rival's say: an energy. It is found once for the same data."""

    def __init__(self, model):
        self.model, self.found = model, {}

    def energy(self, state, *args, rng_key):
        key = tuple((a.shape, np.asarray(a).tobytes()) for a in args)
        if key not in self.found:
            params = {"bias": jnp.zeros(())}
            leaves, spec = visible.flatten(args, {})
            with numpyro.handlers.seed(rng_seed=0), record(params) as run:
                self.model(*args)
            batch = visible.batch(visible.find(run.sites, leaves, ["v"]), {}, leaves, spec)
            energy, x = Energy.from_model(self.model, batch.sites, batch, params, rng_key)
            self.found[key] = energy, params, x
        return self.found[key]


BACKENDS = [PyroBackend(), NumpyroBackend()]


@pytest.fixture(params=BACKENDS, ids=lambda backend: backend.name)
def backend(request):
    with request.param as entered:
        yield entered


# Latent sites: how the model declares one, and what the guide draws it from


class Real:
    infer = None

    def __init__(self, size, posterior=None):
        self.size, self.posterior = size, posterior

    def prior(self, backend):
        return backend.dist.Normal(0.0, 1.0).expand([self.size]).to_event(1).mask(False)

    def guide(self, backend, x, shift):
        if self.posterior is None:
            loc = shift + 0.1 * x[:, :1] + backend.xp.zeros(self.size)
            return backend.dist.Normal(loc, 1.0).to_event(1)
        M, m, cov = map(backend.array, self.posterior)
        return backend.dist.MultivariateNormal(x @ M.T + m + shift, cov)


class Positive:
    infer = None

    def __init__(self, size=None):
        self.size = size

    def prior(self, backend):
        fn = backend.dist.Exponential(1.0)
        return (fn if self.size is None else fn.expand([self.size]).to_event(1)).mask(False)

    def guide(self, backend, x, shift):
        if self.size is None:
            return backend.dist.LogNormal(shift + 0.1 * x[:, 0], 1.0)
        return backend.dist.LogNormal(shift + 0.1 * x[:, :1] + backend.xp.zeros(self.size), 1.0).to_event(1)


class Bits:
    infer = None

    def __init__(self, size, prior=None):
        self.size, self.probability = size, prior

    def prior(self, backend):
        fn = backend.dist.Bernoulli(self.probability or 0.5).expand([self.size]).to_event(1)
        return fn if self.probability else fn.mask(False)

    def guide(self, backend, x, shift):
        logits = shift + 0.1 * x[:, :1] + backend.xp.zeros(self.size)
        return backend.package.ConcreteBernoulli(0.1, logits).to_event(1)


class OneHot:
    infer = None

    def prior(self, backend):
        logits = backend.array(np.zeros(K))
        if backend.dist is dist:
            return dist.OneHotCategorical(logits=logits).mask(False)
        return ndist.Multinomial(1, logits=logits).mask(False)  # NumPyro's one-hot distribution

    def guide(self, backend, x, shift):
        return backend.package.ConcreteOneHot(0.1, (shift + x[:, :1]) * backend.array(np.arange(K) / K))


class Label:
    infer = {"enumerate": "parallel"}

    def prior(self, backend):
        return backend.dist.Categorical(logits=backend.array(LABEL_LOGITS))

    def guide(self, backend, x, shift):
        return backend.dist.Categorical(logits=(shift + x[:, :1]) * backend.array(np.arange(K) / K))


# Models


class Model(NamedTuple):
    """
    :ivar energy: of backend, v and the latents, without what their priors say.
    """

    energy: Callable[..., Any]
    latents: Mapping[str, Any]

    def __hash__(self):
        return id(self.energy)


def linear(oracle, guide=None):
    def energy(backend, v, h):
        A, B, W, b, c = map(backend.array, (oracle.A, oracle.B, oracle.W, oracle.b, oracle.c))
        quadratic = 0.5 * ((v @ A) * v).sum(-1) + 0.5 * ((h @ B) * h).sum(-1)
        return quadratic - ((v @ W) * h).sum(-1) - v @ b - h @ c

    return Model(energy, {"h": Real(len(oracle.c), guide)})


def rbm(oracle, prior=None):
    c = oracle.c - (math.log(prior / (1 - prior)) if prior else 0.0)

    def energy(backend, v, h):
        W, b = backend.array(oracle.W), backend.array(oracle.b)
        return 0.5 * (((v - b) / backend.array(oracle.s)) ** 2).sum(-1) - h @ backend.array(c) - ((v @ W) * h).sum(-1)

    return Model(energy, {"h": Bits(len(c), prior)})


# bits coupled in pairs and with a label, a one-hot vector, and a Gaussian that goes with the bits
LABEL_LOGITS, PAIRS = rng.normal(size=K), np.triu(1.5 * rng.normal(size=(K, K)), 1)
TO_BITS, TO_ONE_HOT, TO_REAL, TABLE, CROSS = (rng.normal(size=(K, K)) for _ in range(5))
TO_REAL *= 0.4  # so that 2 I - R'R is positive definite


def _coupled(backend, v, h, o, z):
    J, U, O, table = map(backend.array, (PAIRS, TO_BITS, TO_ONE_HOT, TABLE))
    pairs = ((h @ J) * h).sum(-1) + (h * table[z]).sum(-1)
    return 0.5 * (v**2).sum(-1) - ((v @ U) * h).sum(-1) - ((v @ O) * o).sum(-1) - pairs


def _both(backend, v, h, y):
    U, R, C = map(backend.array, (TO_BITS, TO_REAL, CROSS))
    return 0.5 * (v**2).sum(-1) + (y**2).sum(-1) - ((v @ U) * h).sum(-1) - (((v @ R) + (h @ C)) * y).sum(-1)


SHAPE = 2.5


def _gamma(backend, v, h):
    """h given v has a Gamma distribution, of rate 1 + v²/2."""
    return h * (1 + 0.5 * v[:, 0] ** 2) - (SHAPE - 1) * backend.xp.log(h) + 0.5 * (v**2).sum(-1)


def wells(size, depth=1.0):
    """A Gaussian h makes wells of a quartic in each coordinate, and couples neighbours."""
    W = np.eye(size) + 0.4 * np.eye(size, k=1)

    def energy(backend, v, h):
        return depth * (v**4).sum(-1) - v.sum(-1) + 0.5 * (h**2).sum(-1) - 1.5 * ((v @ backend.array(W)) * h).sum(-1)

    def free_energy(v):
        drive = 1.5 * v @ W
        return depth * (v**4).sum(-1) - v.sum(-1) - 0.5 * (drive**2).sum(-1) - 0.5 * size * LOG_2PI

    return Model(energy, {"h": Real(size)}), free_energy


def machine(num_hidden, scale, seed=0):
    generator = np.random.default_rng(seed)
    W = scale * generator.normal(size=(D, num_hidden))
    return GaussianBernoulliRBM(W, generator.normal(size=D), -0.5 * np.ones(num_hidden), 0.9)


# as they are initialised, and as they are trained: with modes far apart
MACHINES = {
    (num_hidden, kind): machine(num_hidden, scale)
    for num_hidden, scales in ((4, (0.1, 2.0)), (12, (0.1, 1.0)), (16, (0.1, 0.8)))
    for kind, scale in zip(("initial", "trained"), scales, strict=True)
}
MACHINE_MODELS = {key: rbm(oracle) for key, oracle in MACHINES.items()}
MACHINE_DRAWS = {key: oracle.sample(np.random.default_rng(1), 1000)[0] for key, oracle in MACHINES.items()}
MACHINE_BASES = {key: (v.mean(0), v.std(0)) for key, v in MACHINE_DRAWS.items()}
PRIOR = 0.3
SMALL = GaussianBernoulliRBM(0.8 * rng.normal(size=(D, K)), rng.normal(size=D), rng.normal(size=K), 0.8)
LINEAR_MODEL, SMALL_MODEL = linear(LINEAR), rbm(SMALL, PRIOR)
POSTERIOR = linear(LINEAR, LINEAR.posterior)  # with the posterior for its guide
COUPLED = Model(_coupled, {"h": Bits(K), "o": OneHot(), "z": Label()})
BOTH = Model(_both, {"h": Bits(K), "y": Real(K)})
GAMMA = Model(_gamma, {"h": Positive()})
WELLS = {size: wells(size) for size in (1, 2, 3)}


def every(*supports):
    """All joint configurations: one array a site."""
    picks = itertools.product(*supports)
    return [np.array(column, float) for column in zip(*picks, strict=True)]


BITS = np.concatenate(list(configurations(K)))


def coupled_terms():
    """(b, d) of every configuration: log Σ over it is that of b + v·d - v²/2."""
    h, o, z = every(BITS, np.eye(K), np.eye(K))
    pairs = np.einsum("si,ij,sj->s", h, PAIRS, h) + np.einsum("si,ki,sk->s", h, TABLE, z)
    return pairs + z @ (LABEL_LOGITS - scipy.special.logsumexp(LABEL_LOGITS)), h @ TO_BITS.T + o @ TO_ONE_HOT.T


# Free energies


@pytest.mark.parametrize(
    "options",
    [{}, {"size": 6}, pytest.param({"rows": 6}, marks=pytest.mark.full)],
    ids=["any", "fixed", "all rows"],
)
def test_free_energy_of_a_linear_gaussian_model(backend, options):
    exact = LINEAR.free_energy(X)
    np.testing.assert_allclose(backend.free_energy(LINEAR_MODEL, X, **options), exact, rtol=1e-9, atol=1e-9)
    if not options:
        np.testing.assert_allclose(backend.free_energy(POSTERIOR, X, guided=True), exact, rtol=1e-9, atol=1e-9)


def test_free_energy_of_all_rows_though_a_plate_picks_some_in_training(backend):
    """N/B is left out."""
    x = np.concatenate([X, 1 - X])
    np.testing.assert_allclose(backend.free_energy(LINEAR_MODEL, x, rows=6), LINEAR.free_energy(x), rtol=1e-9)


def test_free_energy_of_bits_with_a_normalised_prior(backend):
    """log Σ p(h) exp(-E) with the Bernoulli's own log(1 - p) in it."""
    exact = SMALL.free_energy(X) - K * math.log(1 - PRIOR)
    np.testing.assert_allclose(backend.free_energy(SMALL_MODEL, X), exact, rtol=1e-9, atol=1e-9)


def test_free_energy_of_discrete_sites_that_are_coupled(backend):
    b, drive = coupled_terms()
    exact = 0.5 * (X**2).sum(-1) - scipy.special.logsumexp(b + X @ drive.T, axis=1)
    np.testing.assert_allclose(backend.free_energy(COUPLED, X), exact, rtol=1e-9, atol=1e-9)


def test_free_energy_of_bits_and_gaussians_together(backend):
    """Given the bits the Gaussian part has the precision 2 and the slope R'v + C'h."""
    drive = (X @ TO_REAL)[:, None] + BITS @ CROSS
    log_weight = (X @ TO_BITS) @ BITS.T + 0.25 * (drive**2).sum(-1) + 0.5 * K * math.log(math.pi)
    exact = 0.5 * (X**2).sum(-1) - scipy.special.logsumexp(log_weight, axis=1)
    np.testing.assert_allclose(backend.free_energy(BOTH, X), exact, rtol=1e-9, atol=1e-9)


def test_free_energy_of_a_positive_latent(backend):
    """∫ h^(a-1) exp(-r h) dh = Γ(a) / r^a, by quadrature over log h with its Jacobian."""
    v = X[:, :1]
    rate = 1 + 0.5 * v[:, 0] ** 2
    exact = 0.5 * v[:, 0] ** 2 - math.lgamma(SHAPE) + SHAPE * np.log(rate)
    np.testing.assert_allclose(backend.free_energy(GAMMA, v), exact, rtol=1e-6)


def test_free_energy_out_of_reach(backend, monkeypatch):
    monkeypatch.setattr(backend.integrals, "MAX_DIMS", 0)
    monkeypatch.setattr(backend.integrals, "MAX_CONFIGURATIONS", 20)
    with pytest.raises(
        ValueError, match=r"no exact sum over 'h': .* quadrature in 1 dimensions; at most 20 and 0 are taken. Use ais"
    ):
        backend.free_energy(GAMMA, X[:, :1])
    # the one-hot vector is summed in closed form
    with pytest.raises(ValueError, match=r"it takes 24 configurations of 'h', 'z'"):
        backend.free_energy(COUPLED, X)


# Exact normalisers


@pytest.mark.parametrize("size", [None, 6], ids=["any", "fixed"])
def test_exact_log_normalizer_of_a_linear_gaussian_model(backend, size):
    found = backend.exact_log_normalizer(LINEAR_MODEL, X, size=size)
    assert found == pytest.approx(LINEAR.log_normalizer, rel=1e-9)


@pytest.mark.parametrize("key", [(4, "trained"), (12, "trained"), (16, "trained")], ids=lambda key: str(key[0]))
def test_exact_log_normalizer_of_a_machine(backend, key):
    found = backend.exact_log_normalizer(MACHINE_MODELS[key], X)
    assert found == pytest.approx(MACHINES[key].log_normalizer, rel=1e-9)


def test_exact_log_normalizer_of_coupled_sites_and_of_bits_with_gaussians(backend):
    b, drive = coupled_terms()
    exact = 0.5 * K * LOG_2PI + scipy.special.logsumexp(b + 0.5 * (drive**2).sum(-1))
    assert backend.exact_log_normalizer(COUPLED, X) == pytest.approx(exact, rel=1e-9)

    # of (v, y) given the bits
    precision = np.block([[np.eye(D), -TO_REAL], [-TO_REAL.T, 2 * np.eye(K)]])
    slope = np.concatenate([BITS @ TO_BITS.T, BITS @ CROSS], 1)
    log_weight = 0.5 * np.einsum("si,ij,sj->s", slope, inv(precision), slope)
    exact = scipy.special.logsumexp(log_weight) + 0.5 * (D + K) * LOG_2PI - 0.5 * np.linalg.slogdet(precision)[1]
    assert backend.exact_log_normalizer(BOTH, X) == pytest.approx(exact, rel=1e-9)


def exact_wells(size):
    """By quadrature on a box, fine enough that it is exact for so smooth a density."""
    grid = np.linspace(-4, 4, 81)
    points = np.stack(np.meshgrid(*[grid] * size, indexing="ij"), -1).reshape(-1, size)
    return scipy.special.logsumexp(-WELLS[size][1](points)) + size * math.log(grid[1] - grid[0])


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.full)])
def test_exact_log_normalizer_by_quadrature(backend, size):
    model, free_energy = WELLS[size]
    if size == 1:  # the reference itself against an adaptive rule
        z, _ = scipy.integrate.quad(lambda v: math.exp(-free_energy(np.array([v]))), -5, 5)
        assert exact_wells(1) == pytest.approx(math.log(z), abs=1e-10)
    assert backend.exact_log_normalizer(model, X[:, :size]) == pytest.approx(exact_wells(size), abs=1e-6)


def test_no_normalizer(backend):
    A = LINEAR.W @ inv(LINEAR.B) @ LINEAR.W.T - 0.1 * np.eye(D)
    with pytest.raises(FloatingPointError, match="Z is infinite"):
        backend.exact_log_normalizer(linear(dataclasses.replace(LINEAR, A=A)), X)
    with pytest.raises(ValueError, match="does not fall off fast enough where the visible values is large"):
        backend.exact_log_normalizer(TAILS[0.5], X[:, :1])


def test_a_wide_box(backend):
    """∫ (1 + v²)^-p dv = √π Γ(p - ½) / Γ(p): log p̃ falls by 60 where v is in the thousands."""
    exact = 0.5 * math.log(math.pi) + math.lgamma(3.5) - math.lgamma(4.0) + 0.5 * LOG_2PI
    assert backend.exact_log_normalizer(TAILS[4.0], X[:, :1]) == pytest.approx(exact, abs=1e-6)


def tails(power):
    def energy(backend, v, h):
        return power * backend.xp.log(1 + v[:, 0] ** 2) + 0.5 * (h**2).sum(-1)

    return Model(energy, {"h": Real(1)})


TAILS = {power: tails(power) for power in (0.5, 4.0)}


def test_covariates_have_a_normalizer_each(backend):
    """b is that row's: all rows at once, each exactly, annealed, and in the likelihood."""
    tilt = np.linspace(-1, 1, len(X))

    def call(function, rows, **options):
        return backend._call(function, LINEAR_MODEL, X[rows], tilt[rows], **options)

    everything = slice(None)
    tilted = [dataclasses.replace(LINEAR, b=LINEAR.b + t * np.eye(D)[0]) for t in tilt]
    log_z = np.array([one.log_normalizer for one in tilted])
    assert call("exact_log_normalizer", slice(1)) == pytest.approx(log_z[0], rel=1e-9)
    np.testing.assert_allclose(np.asarray(call("exact_log_normalizer", everything)), log_z, rtol=1e-9)
    exact = np.array([tilted[i].free_energy(X[i : i + 1])[0] for i in range(len(X))])
    np.testing.assert_allclose(np.asarray(call("free_energy", everything)), exact, rtol=1e-9)
    found = call("log_likelihood", everything, seed=0, progress_bar=False)
    np.testing.assert_allclose(found.value, -exact - log_z, rtol=1e-9)
    assert found.method == "exact"

    run = call("ais", everything, num_temperatures=100, num_chains=200, progress_bar=False)
    assert run.log_weights.shape == (200, len(X))
    assert (abs(run.log_normalizer - log_z) <= 4 * run.standard_error).all(), (run[:7], log_z)
    assert (run.standard_error < 0.2).all()
    assert (run.lower - 3 * run.lower_error <= log_z).all()
    assert (log_z <= run.upper + 3 * run.upper_error).all()
    found = call("log_likelihood", everything, seed=0, log_normalizer=run)
    np.testing.assert_allclose(found.value, -exact - run.log_normalizer, rtol=1e-9)
    np.testing.assert_allclose(found.standard_error, run.standard_error)
    assert found.method == "log p̃: exact, log Z: AIS"


# Annealed importance sampling


def brackets(found, exact):
    """log Z within three standard errors, and between the bounds within theirs."""
    assert abs(found.log_normalizer - exact) <= 3 * found.standard_error + 1e-9, (found[:7], exact)
    assert found.lower - 3 * found.lower_error <= exact + 1e-9, (found[:7], exact)
    assert exact <= found.upper + 3 * found.upper_error + 1e-9, (found[:7], exact)
    assert found.lower <= found.log_normalizer


FULL = {(12, "initial")}


@pytest.mark.parametrize(
    "key",
    [pytest.param(key, marks=pytest.mark.full) if key in FULL else key for key in MACHINES],
    ids=lambda key: f"{key[1]}-{key[0]}",
)
def test_ais_of_a_machine(backend, key):
    exact = MACHINES[key].log_normalizer
    found = backend.ais(MACHINE_MODELS[key], X, num_temperatures=60, num_chains=300, base=MACHINE_BASES[key])
    brackets(found, exact)
    assert found.standard_error < 0.1
    assert found.effective_sample_size > 100
    assert found.upper - found.lower < 1


@functools.cache
def learnt(num_hidden):
    """A machine trained on eight clusters by the exact gradient of its likelihood; the data, and what it gained."""
    generator, s, n = np.random.default_rng(2), 0.5, 200
    x = generator.choice([-1.0, 1.0], size=(n, D)) + s * generator.normal(size=(n, D))
    theta = [0.1 * generator.normal(size=(D, num_hidden)), x.mean(0), np.zeros(num_hidden)]
    h = np.concatenate(list(configurations(num_hidden)))
    start, speed = GaussianBernoulliRBM(*theta, s), [np.zeros_like(a) for a in theta]
    for _ in range(150):
        oracle = GaussianBernoulliRBM(*theta, s)
        log_weight, mean, p = oracle.log_weight(h), oracle.conditional_mean(h), oracle.posterior(x)
        weight = np.exp(log_weight - scipy.special.logsumexp(log_weight))
        gap = (
            x.T @ p / n - (weight[:, None] * mean).T @ h,
            (x.mean(0) - weight @ mean) / s**2,
            p.mean(0) - weight @ h,
        )
        speed = [0.9 * v + 0.05 * g for v, g in zip(speed, gap, strict=True)]
        theta = [a + v for a, v in zip(theta, speed, strict=True)]
    oracle = GaussianBernoulliRBM(*theta, s)
    return oracle, x, (oracle.log_prob(x) - start.log_prob(x)).mean()


@pytest.mark.parametrize("num_hidden", [*(pytest.param(n, marks=pytest.mark.full) for n in (4, 12)), 16])
def test_ais_of_a_machine_that_has_learnt(backend, num_hidden):
    """From the default base, which knows nothing but the moments of the data."""
    oracle, x, gain = learnt(num_hidden)
    assert gain > 0.3
    found = backend.ais(rbm(oracle), x, num_temperatures=60, num_chains=300)
    brackets(found, oracle.log_normalizer)
    assert found.standard_error < 0.1
    assert found.upper - found.lower < 1


def honest(backend, log_weights, exact, num_repetitions=20):
    """The chains of a run know nothing of each other: parts of it are runs. Their 95 % intervals cover log Z."""
    parts = np.asarray(log_weights).reshape(num_repetitions, -1)
    runs = [backend.summary(part) for part in parts]
    covered = np.mean([abs(run.log_normalizer - exact) <= 1.96 * run.standard_error for run in runs])
    assert 0.85 <= covered <= 1, covered


@pytest.mark.parametrize("kernel", [None, pytest.param("langevin", marks=pytest.mark.full)])
def test_ais_of_a_linear_gaussian_model_and_honest_errors(backend, kernel):
    kernel = kernel and backend.package.Langevin(0.3, num_steps=2)
    found = backend.ais(LINEAR_MODEL, X, num_temperatures=60, num_chains=1000, kernel=kernel)
    brackets(found, LINEAR.log_normalizer)
    honest(backend, found.log_weights, LINEAR.log_normalizer)


@pytest.mark.parametrize("kernel", [None, pytest.param("langevin", marks=pytest.mark.full)])
def test_ais_is_unbiased_on_a_short_path(backend, kernel):
    """The mean weight is Z whatever the path is: bits that are summed out of the weights are drawn anew at each β."""
    key = (4, "trained")
    exact = MACHINES[key].log_normalizer
    kernel = kernel and backend.package.Langevin(0.5)
    path = [0.0, 0.15, 0.4, 0.7, 1.0]
    options = {"path": path, "num_chains": 20_000, "kernel": kernel, "base": MACHINE_BASES[key], "reverse": False}
    found = backend.ais(MACHINE_MODELS[key], X, **options)
    assert abs(found.log_normalizer - exact) <= 3 * found.standard_error
    assert found.standard_error < 0.03
    assert math.isnan(found.upper)
    assert found.reverse_log_weights is None
    honest(backend, found.log_weights, exact)


def test_ais_of_a_density_that_is_not_gaussian(backend):
    """Langevin is what None takes; the base is given."""
    found = backend.ais(WELLS[1][0], X[:, :1], num_temperatures=40, num_chains=1000, base=(0.3, [0.9]))
    brackets(found, exact_wells(1))
    assert found.effective_sample_size > 300
    honest(backend, found.log_weights, exact_wells(1))


@pytest.mark.full
def test_ais_of_coupled_sites(backend):
    b, drive = coupled_terms()
    exact = 0.5 * K * LOG_2PI + scipy.special.logsumexp(b + 0.5 * (drive**2).sum(-1))
    found = backend.ais(COUPLED, X, num_temperatures=30, num_chains=300, base=(0.5, 2.0))
    brackets(found, exact)


@pytest.mark.full
def test_ais_of_a_model_with_a_fixed_number_of_rows(backend):
    found = backend.ais(LINEAR_MODEL, X, num_temperatures=30, num_chains=301, size=6)
    brackets(found, LINEAR.log_normalizer)


def test_ais_that_is_too_short_says_so(backend):
    with pytest.warns(UserWarning, match="not to be trusted, the runs there and back .*more num_temperatures .here 4"):
        found = backend.ais(LINEAR_MODEL, X, num_temperatures=4, num_chains=300, base=(15.0, 1.0))
    assert found.effective_sample_size < 10
    assert found.lower < LINEAR.log_normalizer - 5
    assert found.upper > LINEAR.log_normalizer - 3 * found.upper_error
    assert found.upper - found.lower > 10


def test_ais_of_two_far_modes(backend):
    """A path of two steps from a base over both says that it is too short; one of sixty is not, and says nothing."""
    oracle = GaussianBernoulliRBM(np.full((D, 1), 12.0), np.full(D, -6.0), np.zeros(1), np.ones(D))
    options = {"num_chains": 300, "base": (0.0, 6.0)}
    with pytest.warns(UserWarning, match="ais: log Z is not to be trusted, .*num_chains .here 300"):
        found = backend.ais(rbm(oracle), X, num_temperatures=2, **options)
    assert found.doubt is not None
    found = backend.ais(rbm(oracle), X, num_temperatures=60, **options)
    brackets(found, oracle.log_normalizer)
    assert found.doubt is None


def test_ais_with_the_target_for_its_base(backend):
    """Without couplings all weights are Z, and the path has nothing to do."""
    free = GaussianBernoulliRBM(np.zeros((D, K)), np.array([1.0, 0.0, -2.0]), SMALL.c, np.array([1.0, 0.5, 2.0]))
    found = backend.ais(rbm(free), X, path=[0.0, 1.0], num_chains=300, base=(free.b, free.s))
    np.testing.assert_allclose(np.asarray(found.log_weights), free.log_normalizer, rtol=1e-9)
    np.testing.assert_allclose(np.asarray(found.reverse_log_weights), free.log_normalizer, rtol=1e-9)
    assert found.effective_sample_size == pytest.approx(300)


def test_ais_misuse(backend):
    closed = backend.package.Gibbs(conditionals={"h": None})
    for model, options, message in (
        (LINEAR_MODEL, {"num_chains": 1}, "2 chains and 1 temperature"),
        (LINEAR_MODEL, {"num_temperatures": 0}, "2 chains and 1 temperature"),
        (LINEAR_MODEL, {"path": [0.0, 0.5, 0.5, 1.0]}, "path must rise from 0 to 1"),
        (LINEAR_MODEL, {"path": [0.1, 1.0]}, "path must rise from 0 to 1"),
        (LINEAR_MODEL, {"base": (0.0, [1.0, 0.0, 1.0])}, "standard deviation must be positive"),
        (LINEAR_MODEL, {"kernel": closed}, "are those of p̃"),
        (WELLS[3][0], {"kernel": backend.package.Gibbs()}, "is not Gaussian"),
    ):
        with pytest.raises(ValueError, match=message):
            backend.ais(model, X, **{"num_temperatures": 3, "num_chains": 300, **options})
    # so far out that the energy overflows
    with pytest.raises(FloatingPointError, match="a weight is not finite"):
        backend.ais(LINEAR_MODEL, X, num_temperatures=4, num_chains=300, base=(0.0, 1e200))


@pytest.mark.full
@pytest.mark.parametrize("key", [(12, "trained"), (16, "initial")], ids=lambda key: f"{key[1]}-{key[0]}")
def test_standard_errors_of_runs_of_their_own(backend, key):
    exact = MACHINES[key].log_normalizer
    options = {"num_temperatures": 50, "num_chains": 100, "base": MACHINE_BASES[key]}
    runs = [backend.ais(MACHINE_MODELS[key], X, seed, **options) for seed in range(20)]
    covered = np.mean([abs(run.log_normalizer - exact) <= 1.96 * run.standard_error for run in runs])
    assert 0.85 <= covered <= 1
    for run in runs:
        assert run.lower - 4 * run.lower_error <= exact <= run.upper + 4 * run.upper_error


# Likelihoods


def test_log_likelihood_in_closed_form(backend):
    value, error, method = backend.log_likelihood(SMALL_MODEL, X)
    np.testing.assert_allclose(value, SMALL.log_prob(X), rtol=1e-9)
    assert (error == 0).all()
    assert method == "exact"
    log_z = SMALL.log_normalizer + K * math.log(1 - PRIOR)
    value, _, method = backend.log_likelihood(SMALL_MODEL, X, log_normalizer=log_z)
    np.testing.assert_allclose(value, SMALL.log_prob(X), rtol=1e-9)
    assert method == "log p̃: exact, log Z: given"


def test_log_likelihood_by_importance_sampling(backend):
    exact = LINEAR.posterior
    off = GaussianGuide(exact.M, exact.m + 0.3, 1.5 * exact.S)
    options = {"method": "importance", "guided": True}
    value, error, method = backend.log_likelihood(linear(LINEAR, off), X, num_draws=2000, **options)
    assert method == "log p̃: importance, log Z: exact"
    assert (abs(value - LINEAR.log_prob(X)) <= 3 * error).all()
    assert (error < 0.05).all()
    # the weights of the exact posterior are all the same
    value, error, _ = backend.log_likelihood(POSTERIOR, X, num_draws=5, **options)
    np.testing.assert_allclose(value, LINEAR.log_prob(X), rtol=1e-9)
    assert (error < 1e-9).all()


def test_log_likelihood_with_an_annealed_normalizer(backend, monkeypatch):
    run = backend.ais(SMALL_MODEL, X, num_temperatures=20, num_chains=300, reverse=False)
    value, error, method = backend.log_likelihood(SMALL_MODEL, X, log_normalizer=run)
    assert method == "log p̃: exact, log Z: AIS"
    assert (error == run.standard_error).all()
    assert error[0] > 0
    assert (abs(value - SMALL.log_prob(X)) <= 3 * error).all()
    # and it makes a run of its own where there is no exact sum
    monkeypatch.setattr(backend.evaluation.normalizer, "log_normalizer", out_of_reach(backend))
    monkeypatch.setattr(backend.evaluation.likelihood, "ais", lambda *args, **options: run)
    again, _, method = backend.log_likelihood(SMALL_MODEL, X)
    np.testing.assert_array_equal(again, value)
    assert method == "log p̃: exact, log Z: AIS"


def out_of_reach(backend):
    def raises(*args, **kwargs):
        raise backend.package.energies.OutOfReach("out of reach")

    return raises


def test_log_likelihood_misuse(backend, monkeypatch):
    with pytest.raises(ValueError, match="method should be 'exact', 'quadrature', 'importance' or None, got 'both'"):
        backend.log_likelihood(SMALL_MODEL, X, method="both")
    monkeypatch.setattr(backend.integrals, "MAX_CONFIGURATIONS", 20)
    with pytest.raises(ValueError, match="no exact sum over 'h'"):
        backend.log_likelihood(COUPLED, X, method="exact")


# The Fisher divergence

# data with the very moments of TRUTH: means of quadratics over them are its expectations
TRUTH = LinearGaussian.random(np.random.default_rng(5), D, K)
_noise = np.random.default_rng(6).normal(size=(6, D))
_noise -= _noise.mean(0)
_whitened = _noise @ np.linalg.cholesky(inv(np.cov(_noise.T, bias=True)))
DATA = TRUTH.mean + _whitened @ np.linalg.cholesky(TRUTH.cov).T


def test_fisher_divergence_at_the_truth_and_off_it(backend):
    truth, off = linear(TRUTH), LINEAR_MODEL
    value, error, method = backend.fisher_divergence(truth, DATA, TRUTH.score)
    assert abs(value) < 1e-20
    assert error < 1e-20
    assert method == "exact"
    # E ½‖η - η' - (Λ - Λ')v‖² under N(μ, Λ⁻¹)
    change = TRUTH.precision - LINEAR.precision
    offset = TRUTH.linear - LINEAR.linear - change @ TRUTH.mean
    exact = 0.5 * (offset @ offset + np.trace(change @ TRUTH.cov @ change))
    value, error, _ = backend.fisher_divergence(off, DATA, TRUTH.score(DATA))
    assert value == pytest.approx(exact, rel=1e-9)
    each = 0.5 * ((TRUTH.score(DATA) - LINEAR.score(DATA)) ** 2).sum(-1)
    assert error == pytest.approx(each.std(ddof=1) / math.sqrt(len(DATA)), rel=1e-9)
    # without the data's score both are less by E ½‖∇ log p_data‖² = ½ tr Λ
    constant = 0.5 * np.trace(TRUTH.precision)
    for model, divergence in ((truth, 0.0), (off, exact)):
        assert backend.fisher_divergence(model, DATA)[0] == pytest.approx(divergence - constant, rel=1e-9)


def test_fisher_divergence_of_a_machine(backend):
    value, _, method = backend.fisher_divergence(SMALL_MODEL, X, np.zeros_like(X))
    assert value == pytest.approx(0.5 * (SMALL.score(X) ** 2).sum(-1).mean(), rel=1e-9)
    assert method == "exact"


def test_fisher_divergence_by_the_guide(backend, monkeypatch):
    """At the exact posterior ∇_v [log p̃(v, h) - log q(h|v)] is the marginal's score whatever h is."""
    with_score = backend.fisher_divergence(LINEAR_MODEL, X, TRUTH.score)
    without = backend.fisher_divergence(LINEAR_MODEL, X)
    monkeypatch.setattr(backend.evaluation.likelihood.Integral, "over_variables", out_of_reach(backend))
    for exact, options in ((with_score, {"data_score": TRUTH.score}), (without, {})):
        value, error, method = backend.fisher_divergence(POSTERIOR, X, num_draws=3, guided=True, **options)
        assert (exact[2], method) == ("exact", "guide")
        assert value == pytest.approx(exact[0], rel=1e-9)
        assert error == pytest.approx(exact[1], rel=1e-6)


def test_projections_are_unbiased(backend):
    """w'Λw has the mean tr Λ and, with signs at random, the variance 2 Σ_{i≠j} Λ_ij²."""
    num = 500
    value, _, _ = backend.fisher_divergence(LINEAR_MODEL, X, num_projections=num)
    off = LINEAR.precision - np.diag(np.diag(LINEAR.precision))
    error = math.sqrt(2 * (off**2).sum() / (len(X) * num))
    gap = abs(value - LINEAR.sm_loss(X).mean())
    assert 1e-12 < gap < 5 * error


def test_data_score_of_the_wrong_shape(backend):
    with pytest.raises(ValueError, match=r"data_score has shape .*2.*; .*6, 3.* is wanted"):
        backend.fisher_divergence(LINEAR_MODEL, X, np.zeros(2))


# The kernel Stein discrepancy

COUPLED_MACHINE = GaussianBernoulliRBM(
    1.5 * np.random.default_rng(1).normal(size=(3, 4)), np.zeros(3), -np.ones(4), 1.0
)


def stein_kernel(x, y, s_x, s_y, M):
    """s(x)·s(y) k + s(x)·∇_y k + s(y)·∇_x k + tr ∇_x ∇_y k, by finite differences of k."""

    def k(x, y):
        return ((1 + (x - y) @ M @ (x - y)) / 3) ** (-math.sqrt(len(x)) / 2)

    def along(i, f):
        return central_difference(lambda t: f(t * np.eye(len(x))[i]), 1e-2)

    dims = range(len(x))
    k_x = np.array([along(i, lambda t: k(x + t, y)) for i in dims])
    k_y = np.array([along(i, lambda t: k(x, y + t)) for i in dims])
    mixed = sum(along(i, lambda t: along(i, lambda u: k(x + t, y + u))) for i in dims)  # noqa: B023
    return s_x @ s_y * k(x, y) + s_x @ k_y + s_y @ k_x + mixed


def test_stein_statistic_is_the_mean_over_pairs(backend):
    v, score, n = X, LINEAR.score(X), len(X)
    M = np.diag(1 / v.var(0, ddof=1)) / D
    pairs = [stein_kernel(v[i], v[j], score[i], score[j], M) for i in range(n) for j in range(n) if i != j]
    found = backend.stein_test(v, score, 10)
    assert found.statistic == pytest.approx(np.mean(pairs), rel=1e-5)
    whole = backend.kernel_stein_discrepancy(LINEAR_MODEL, v, num_bootstrap=10, noise=None)
    assert whole.statistic == pytest.approx(found.statistic, rel=1e-9)


def test_stein_p_values_are_uniform_under_the_truth(backend):
    v, _ = COUPLED_MACHINE.sample(np.random.default_rng(3), 200 * 80)
    v, score = (a.reshape(200, 80, -1) for a in (v, COUPLED_MACHINE.score(v)))
    p = [backend.stein_test(v[i], score[i], 200, seed=i).p_value for i in range(200)]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01


def test_stein_test_rejects_a_coupling_that_is_a_tenth_off(backend):
    """The largest of the machine's couplings; 1,000 draws of it."""
    W = COUPLED_MACHINE.W.copy()
    W[np.unravel_index(abs(W).argmax(), W.shape)] *= 1.1
    wrong = dataclasses.replace(COUPLED_MACHINE, W=W)
    v, _ = COUPLED_MACHINE.sample(np.random.default_rng(4), 5 * 1000)
    for part in v.reshape(5, 1000, -1):
        assert backend.stein_test(part, wrong.score(part), 500).p_value < 0.05
        assert backend.stein_test(part, COUPLED_MACHINE.score(part), 500).p_value > 0.01


def test_stein_test_needs_two_rows(backend):
    with pytest.raises(ValueError, match="two rows"):
        backend.stein_test(X[:1], X[:1], 10)


# The maximum mean discrepancy


def test_mean_discrepancy_is_unbiased_and_as_by_hand(backend):
    a, b = X[:4], X[3:] + 0.5

    def k(x, y, scale):
        return math.exp(-0.5 * ((x - y) ** 2).sum() / scale**2)

    pooled = np.concatenate([a, b])
    distances = [np.linalg.norm(x - y) for x, y in itertools.combinations(pooled, 2)]
    for bandwidth in (0.7, None):
        scale = bandwidth or np.median(distances)
        inside = np.mean([k(x, y, scale) for x, y in itertools.permutations(a, 2)])
        outside = np.mean([k(x, y, scale) for x, y in itertools.permutations(b, 2)])
        across = np.mean([k(x, y, scale) for x in a for y in b])
        found = backend.maximum_mean_discrepancy(a, b, bandwidth=bandwidth, num_permutations=10)
        assert found.statistic == pytest.approx(inside + outside - 2 * across, rel=1e-6)


def test_mean_discrepancy_p_values(backend):
    generator = np.random.default_rng(7)

    def p(shift, seed):
        first, second = generator.normal(size=(30, 2)), generator.normal(size=(25, 2)) + shift
        return backend.maximum_mean_discrepancy(first, second, seed, num_permutations=99).p_value

    assert scipy.stats.kstest([p(0.0, i) for i in range(100)], "uniform").pvalue > 0.01
    assert max(p(1.5, i) for i in range(5)) < 0.05


def test_mean_discrepancy_misuse(backend):
    with pytest.raises(ValueError, match="3 and 2 numbers a row"):
        backend.maximum_mean_discrepancy(X, X[:, :2])
    with pytest.raises(ValueError, match="two rows of each"):
        backend.maximum_mean_discrepancy(X, X[:1])


# NumPyro alone


def test_sums_over_many_rows():
    """jaxlib 0.10.2 gets such a sum wrong from row 32,769 on, unless ``import numpyro_bism`` keeps it from it."""
    generator = np.random.default_rng(0)
    x, W, c, B, h = (
        generator.normal(size=shape).astype(np.float32) for shape in ((300, 3), (3, 4), (4,), (4, 4), (499, 300, 4))
    )

    def log_joint(h):
        return ((x @ W) * h).sum(-1) + h @ c - 0.5 * ((h @ B) * h).sum(-1)

    np.testing.assert_allclose(jax.jit(jax.vmap(log_joint))(h), log_joint(h), rtol=1e-3, atol=1e-3)
