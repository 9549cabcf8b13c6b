"""to_arviz and psis_khat: what a trained BiSM tells ArviZ, against closed forms and enumeration.

The tests see a package only through its ``Backend``: NumPy arrays in, what ArviZ reads out.
"""

import json
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
from numpyro.infer import TraceEnum_ELBO as NumpyroTraceEnum_ELBO
from numpyro.infer import importance
from pyro.infer import TraceEnum_ELBO
from pyro.infer.importance import psis_diagnostic

import numpyro_bism
import pyro_bism
from oracles import GaussianBernoulliRBM, GaussianGuide, LinearGaussian

N, D, K, S = 6, 3, 4, 100
rng = np.random.default_rng(0)
X = rng.normal(size=(N, D))
LINEAR = LinearGaussian.random(rng, D, K)
OFF = GaussianGuide(0.3 * rng.normal(size=(K, D)), 0.2 * rng.normal(size=K), np.diag(rng.uniform(0.5, 1.5, K)))
RBM = GaussianBernoulliRBM(rng.normal(size=(D, K)), rng.normal(size=D), rng.normal(size=K), 0.8)


class PyroBackend:
    """Programs of ``pyro_bism``, in float64."""

    name = "pyro"
    psis_khat = staticmethod(pyro_bism.psis_khat)

    def __enter__(self):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        torch.set_default_dtype(torch.float64)
        return self

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)

    def to_arviz(self, bism, *args, **options):
        """Of a BiSM that has not been trained: its parameters are the initial ones."""
        return pyro_bism.to_arviz(bism, *map(torch.as_tensor, args), **options)

    def parameters(self, bism):
        return {name: value.detach().clone().numpy() for name, value in pyro.get_param_store().items()}

    def bism(self, model, guide, **options):
        loss = pyro_bism.DenoisingScoreMatching(sigma=0.3)
        return pyro_bism.BiSM(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss, **options)

    def flat(self, size):
        return dist.Normal(0.0, 1.0).expand([size]).to_event(1).mask(False)

    def linear(self, guide, visible="v", latent="h", scale=1.0, rows=None, keep=None, **options):
        """LINEAR with a Gaussian guide. ``scale`` and ``keep`` scale and mask everything; ``rows`` are subsampled."""
        A, B, W, b, c = (torch.tensor(x) for x in (LINEAR.A, LINEAR.B, LINEAR.W, LINEAR.b, LINEAR.c))
        M, m, cov = map(torch.tensor, guide)

        def model(x):
            bias = pyro.param("bias", b.clone())
            with pyro.plate("data", len(x), subsample_size=rows) as i, pyro.poutine.scale(scale=scale):
                x = x if rows is None else x[i]
                v = pyro.sample(visible, self.flat(D), obs=x)
                h = pyro.sample(latent, self.flat(K))
                quadratic = 0.5 * ((v @ A) * v).sum(-1) + 0.5 * ((h @ B) * h).sum(-1)
                with pyro.poutine.mask(mask=torch.tensor(True if keep is None else keep)):
                    pyro.factor("energy", ((v @ W) * h).sum(-1) + v @ bias + h @ c - quadratic)

        def q(x):
            shift = pyro.param("shift", m.clone())
            with pyro.plate("data", len(x), subsample_size=rows) as i:
                x = x if rows is None else x[i]
                pyro.sample(latent, dist.MultivariateNormal(x @ M.T + shift, cov))

        return self.bism(model, q, **options)

    def rbm(self, enumerate):
        """RBM with the exact guide: relaxed, or its units in a plate and summed out. Takes data of shape (n, 1, D)."""
        W, b, c = (torch.tensor(x) for x in (RBM.W, RBM.b, RBM.c))

        def model(x):
            bias = pyro.param("bias", c.clone())
            with pyro.plate("data", len(x), dim=-2):
                v = pyro.sample("v", self.flat(D), obs=x)
                with pyro.plate("units", K, dim=-1):
                    h = pyro.sample("h", dist.Bernoulli(0.5).mask(False))
                    pyro.factor("unit", ((v @ W).squeeze(-2) + bias) * h)
                pyro.factor("gauss", -0.5 * ((v - b) / RBM.s).square().sum(-1))

        def guide(x):
            bias = pyro.param("guide_bias", c.clone())
            with pyro.plate("data", len(x), dim=-2), pyro.plate("units", K, dim=-1):
                logits = (x @ W).squeeze(-2) + bias
                if enumerate:
                    pyro.sample("h", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})
                else:
                    pyro.sample("h", pyro_bism.ConcreteBernoulli(0.1, logits))

        return self.bism(model, guide, inner_loss=TraceEnum_ELBO(max_plate_nesting=2) if enumerate else None)

    def exponential(self, rate):
        """p(h|v) exponential of this rate and q of rate 1: the weights' tail index is 1 - rate exactly."""

        def model(x):
            bias = pyro.param("bias", torch.zeros(1))
            with pyro.plate("data", len(x)):
                v = pyro.sample("v", self.flat(1), obs=x)
                h = pyro.sample("h", dist.Exponential(1.0).mask(False))
                pyro.factor("energy", -0.5 * (v - bias).square().sum(-1) - rate * h)

        def guide(x):
            log_rate = pyro.param("log_rate", torch.zeros(()))
            with pyro.plate("data", len(x)):
                pyro.sample("h", dist.Exponential(log_rate.exp() + 1e-3 * x[:, 0]))

        return self.bism(model, guide)

    def covariates(self):
        """A visible site called obs, beside a discrete and a continuous covariate, and a latent without an event."""

        def model(x, y, z):
            slope = pyro.param("slope", torch.ones(()))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Bernoulli(0.5), obs=y)
                pyro.sample("scope/z", dist.Normal(0.0, 1.0), obs=z)
                h = pyro.sample("h", dist.Normal(0.0, 1.0))
                pyro.sample("obs", dist.Normal(slope * h + y + z, 1.0), obs=x)

        def guide(x, y, z):
            loc = pyro.param("loc", torch.zeros(()))
            with pyro.plate("data", len(x)):
                pyro.sample("h", dist.Normal(loc + 0.5 * x, 1.0))

        return self.bism(model, guide, visible=["obs"])

    def shared_latent(self):
        """A latent outside the data plate."""

        def model(x):
            s = pyro.sample("shared", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("v", dist.Normal(s, 1.0).expand([D]).to_event(1), obs=x)

        def guide(x):
            pyro.sample("shared", dist.Normal(x.mean() + pyro.param("q_loc", torch.zeros(())), 1.0))

        return self.bism(model, guide)

    def diverging(self):
        """An energy of -inf where h is negative."""

        def model(x):
            bias = pyro.param("bias", torch.zeros(D))
            with pyro.plate("data", len(x)):
                v = pyro.sample("v", self.flat(D), obs=x)
                h = pyro.sample("h", dist.Normal(0.0, 1.0))
                pyro.factor("energy", h.clamp(min=0).reciprocal() - (v - bias).square().sum(-1))

        def guide(x):
            loc = pyro.param("loc", torch.zeros(()))
            with pyro.plate("data", len(x)):
                pyro.sample("h", dist.Normal(loc + x[:, 0], 1.0))

        return self.bism(model, guide)


class NumpyroBackend:
    """Programs of ``numpyro_bism``, in float64."""

    name = "numpyro"
    psis_khat = staticmethod(numpyro_bism.psis_khat)

    def __enter__(self):
        self.double = jax.enable_x64(True)
        self.double.__enter__()
        return self

    def __exit__(self, *_):
        self.double.__exit__(None, None, None)

    def to_arviz(self, bism, *args, **options):
        """Of a BiSM that has not been trained: its parameters are the initial ones."""
        state = bism.init(jax.random.key(0), *args)
        return numpyro_bism.to_arviz(bism, state, *args, rng_key=jax.random.key(1), **options)

    def parameters(self, bism):
        return {}  # states are values: nothing could change

    def bism(self, model, guide, **options):
        loss = numpyro_bism.DenoisingScoreMatching(sigma=0.3)
        return numpyro_bism.BiSM(model, guide, numpyro.optim.Adam(1e-2), loss, **options)

    def flat(self, size):
        return ndist.Normal(0.0, 1.0).expand([size]).to_event(1).mask(False)

    def linear(self, guide, visible="v", latent="h", scale=1.0, rows=None, keep=None, **options):
        """LINEAR with a Gaussian guide. ``scale`` and ``keep`` scale and mask everything; ``rows`` are subsampled."""
        A, B, W, b, c = (jnp.asarray(x) for x in (LINEAR.A, LINEAR.B, LINEAR.W, LINEAR.b, LINEAR.c))
        M, m, cov = map(jnp.asarray, guide)

        def model(x):
            bias = numpyro.param("bias", b)
            with numpyro.plate("data", len(x), subsample_size=rows) as i, numpyro.handlers.scale(scale=scale):
                x = x if rows is None else x[i]
                v = numpyro.sample(visible, self.flat(D), obs=x)
                h = numpyro.sample(latent, self.flat(K))
                quadratic = 0.5 * ((v @ A) * v).sum(-1) + 0.5 * ((h @ B) * h).sum(-1)
                with numpyro.handlers.mask(mask=jnp.asarray(True if keep is None else keep)):
                    numpyro.factor("energy", ((v @ W) * h).sum(-1) + v @ bias + h @ c - quadratic)

        def q(x):
            shift = numpyro.param("shift", m)
            with numpyro.plate("data", len(x), subsample_size=rows) as i:
                x = x if rows is None else x[i]
                numpyro.sample(latent, ndist.MultivariateNormal(x @ M.T + shift, cov))

        return self.bism(model, q, **options)

    def rbm(self, enumerate):
        """RBM with the exact guide: relaxed, or its units in a plate and summed out. Takes data of shape (n, 1, D)."""
        W, b, c = (jnp.asarray(x) for x in (RBM.W, RBM.b, RBM.c))

        def model(x):
            bias = numpyro.param("bias", c)
            with numpyro.plate("data", len(x), dim=-2):
                v = numpyro.sample("v", self.flat(D), obs=x)
                with numpyro.plate("units", K, dim=-1):
                    h = numpyro.sample("h", ndist.Bernoulli(0.5).mask(False))
                    numpyro.factor("unit", ((v @ W).squeeze(-2) + bias) * h)
                numpyro.factor("gauss", -0.5 * (((v - b) / RBM.s) ** 2).sum(-1))

        def guide(x):
            bias = numpyro.param("guide_bias", c)
            with numpyro.plate("data", len(x), dim=-2), numpyro.plate("units", K, dim=-1):
                logits = (x @ W).squeeze(-2) + bias
                if enumerate:
                    numpyro.sample("h", ndist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})
                else:
                    numpyro.sample("h", numpyro_bism.ConcreteBernoulli(0.1, logits))

        return self.bism(model, guide, inner_loss=NumpyroTraceEnum_ELBO(max_plate_nesting=2) if enumerate else None)

    def exponential(self, rate):
        """p(h|v) exponential of this rate and q of rate 1: the weights' tail index is 1 - rate exactly."""

        def model(x):
            bias = numpyro.param("bias", jnp.zeros(1))
            with numpyro.plate("data", len(x)):
                v = numpyro.sample("v", self.flat(1), obs=x)
                h = numpyro.sample("h", ndist.Exponential(1.0).mask(False))
                numpyro.factor("energy", -0.5 * ((v - bias) ** 2).sum(-1) - rate * h)

        def guide(x):
            log_rate = numpyro.param("log_rate", jnp.zeros(()))
            with numpyro.plate("data", len(x)):
                numpyro.sample("h", ndist.Exponential(jnp.exp(log_rate) + 1e-3 * x[:, 0]))

        return self.bism(model, guide)

    def covariates(self):
        """A visible site called obs, beside a discrete and a continuous covariate, and a latent without an event."""

        def model(x, y, z):
            slope = numpyro.param("slope", jnp.ones(()))
            with numpyro.plate("data", len(x)):
                numpyro.sample("y", ndist.Bernoulli(0.5), obs=y)
                numpyro.sample("scope/z", ndist.Normal(0.0, 1.0), obs=z)
                h = numpyro.sample("h", ndist.Normal(0.0, 1.0))
                numpyro.sample("obs", ndist.Normal(slope * h + y + z, 1.0), obs=x)

        def guide(x, y, z):
            loc = numpyro.param("loc", jnp.zeros(()))
            with numpyro.plate("data", len(x)):
                numpyro.sample("h", ndist.Normal(loc + 0.5 * x, 1.0))

        return self.bism(model, guide, visible=["obs"])

    def shared_latent(self):
        """A latent outside the data plate."""

        def model(x):
            s = numpyro.sample("shared", ndist.Normal(numpyro.param("loc", jnp.zeros(())), 1.0))
            with numpyro.plate("data", len(x)):
                numpyro.sample("v", ndist.Normal(s, 1.0).expand([D]).to_event(1), obs=x)

        def guide(x):
            numpyro.sample("shared", ndist.Normal(x.mean() + numpyro.param("q_loc", jnp.zeros(())), 1.0))

        return self.bism(model, guide)

    def diverging(self):
        """An energy of -inf where h is negative."""

        def model(x):
            bias = numpyro.param("bias", jnp.zeros(D))
            with numpyro.plate("data", len(x)):
                v = numpyro.sample("v", self.flat(D), obs=x)
                h = numpyro.sample("h", ndist.Normal(0.0, 1.0))
                numpyro.factor("energy", 1 / jnp.clip(h, 0) - ((v - bias) ** 2).sum(-1))

        def guide(x):
            loc = numpyro.param("loc", jnp.zeros(()))
            with numpyro.plate("data", len(x)):
                numpyro.sample("h", ndist.Normal(loc + x[:, 0], 1.0))

        return self.bism(model, guide)


@pytest.fixture(params=[PyroBackend, NumpyroBackend], ids=lambda backend: backend.name)
def backend(request):
    with request.param() as entered:
        yield entered


def values(data, group, name):
    return data[group][name].values


def within_five_errors(draws, exact, axis=0):
    """Whether the mean over draws is the exact one, by the draws' own standard error."""
    error = draws.std(axis, ddof=1) / np.sqrt(draws.shape[axis])
    return np.abs(draws.mean(axis) - exact) <= 5 * error


# The numbers


def test_weights_are_those_of_the_energy_and_the_guide(backend):
    data = backend.to_arviz(backend.linear(OFF), X, num_draws=S)
    h = values(data, "posterior", "h")[0]
    log_p = np.array([-LINEAR.energy(X, draw) for draw in h])
    log_q = np.array([OFF.log_prob(draw, X) for draw in h])
    np.testing.assert_allclose(values(data, "sample_stats", "model_energy")[0], -log_p, rtol=1e-10)
    np.testing.assert_allclose(values(data, "sample_stats", "log_weight")[0], log_p - log_q, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(values(data, "sample_stats", "lp")[0], log_p.sum(-1), rtol=1e-10)
    np.testing.assert_array_equal(
        values(data, "sample_stats", "pareto_k"), backend.psis_khat(values(data, "sample_stats", "log_weight")[0])
    )


def test_draws_are_the_guides_at_the_clean_data(backend):
    # noise of the loss's sigma on v would widen the draws by far more than their standard error
    data = backend.to_arviz(backend.linear(OFF), X, num_draws=4 * S)
    error = values(data, "posterior", "h")[0] - OFF.mean(X)
    assert within_five_errors(error, 0).all()
    second = np.einsum("sni,snj->snij", error, error)
    assert within_five_errors(second, OFF.S).all()


def test_the_exact_guide_has_constant_weights(backend):
    """log_weight is then the unnormalised log marginal, whatever the draw, and there is no tail."""
    data = backend.to_arviz(backend.linear(LINEAR.posterior), X, num_draws=S)
    expected = np.broadcast_to(-LINEAR.free_energy(X), (1, S, N))
    np.testing.assert_allclose(values(data, "sample_stats", "log_weight"), expected, rtol=1e-9, atol=1e-9)
    assert (values(data, "sample_stats", "pareto_k") == -np.inf).all()


@pytest.mark.parametrize("enumerate", [False, True], ids=["relaxed", "summed-out"])
def test_discrete_guides_are_drawn_and_scored_as_discrete(backend, enumerate):
    data = backend.to_arviz(backend.rbm(enumerate), X[:, None], num_draws=4 * S)
    h = values(data, "posterior", "h")[0]
    assert set(np.unique(h)) == {0, 1}
    assert within_five_errors(h, RBM.posterior(X)).all()
    energy = np.array([RBM.energy(X, draw) for draw in h])
    np.testing.assert_allclose(values(data, "sample_stats", "model_energy")[0], energy, rtol=1e-10)
    expected = np.broadcast_to(-RBM.free_energy(X), h.shape[:2])
    np.testing.assert_allclose(values(data, "sample_stats", "log_weight")[0], expected, rtol=1e-9, atol=1e-9)
    assert (values(data, "sample_stats", "pareto_k") == -np.inf).all()


def test_scale_and_mask_count_but_subsampling_does_not(backend):
    keep = np.arange(N) % 2 == 0
    with pytest.warns(UserWarning, match="A scale of 3 covers visible site 'v'"):
        data = backend.to_arviz(backend.linear(OFF, scale=3.0, keep=keep), X, num_draws=2)
    h = values(data, "posterior", "h")[0, 0]
    np.testing.assert_allclose(
        values(data, "sample_stats", "model_energy")[0, 0], np.where(keep, 3 * LINEAR.energy(X, h), 0), rtol=1e-10
    )


def test_all_rows_are_there_though_a_plate_subsamples_them_in_training(backend):
    data = backend.to_arviz(backend.linear(OFF, rows=4), X, num_draws=2)
    np.testing.assert_array_equal(values(data, "observed_data", "obs"), np.arange(len(X)))
    np.testing.assert_array_equal(values(data, "observed_data", "v"), X)
    h = values(data, "posterior", "h")[0, 0]
    np.testing.assert_allclose(values(data, "sample_stats", "model_energy")[0, 0], LINEAR.energy(X, h), rtol=1e-10)


# k-hat


@pytest.mark.parametrize("rate", [0.25, 0.7])
def test_khat_finds_a_known_tail(backend, rate):
    """Weights r exp((1 - r)h) with h ~ Exp(1) are a Pareto law of k = 1 - r; the wrong sign gives a k below 0."""
    data = backend.to_arviz(backend.exponential(rate), np.zeros((300, 1)), num_draws=500)
    k = values(data, "sample_stats", "pareto_k")
    # the prior: ten observations at 1/2 beside the 68 of the tail
    assert within_five_errors(k, (68 * (1 - rate) + 5) / 78)
    log_weight = data["sample_stats"]["log_weight"]
    assert abs(k.mean() - arviz_khat(log_weight.values[0].T).mean()) < 0.01
    assert backend.psis_khat(-log_weight).values.mean() < 0
    ours = backend.psis_khat(log_weight)
    assert ours.dims == ("obs",)
    np.testing.assert_array_equal(ours.values, k)


class DrawnAs(pyro.poutine.messenger.Messenger):
    """Sites take these values for their draws. ``replay`` would keep them out of the plate of particles."""

    def __init__(self, given):
        self.given = given

    def _pyro_sample(self, msg):
        msg["value"] = self.given.get(msg["name"], msg["value"])


@pytest.mark.parametrize("name", ["normalised", "unnormalised", "heavy"])
def test_khat_is_that_of_pyros_own_diagnostic(backend, name):
    """psis_diagnostic knows one k for all data, so it is asked row by row, at the draws that to_arviz made."""
    arguments = {
        "normalised": (X[:, 0], (X[:, 1] > 0).astype(float), X[:, 2]),
        "unnormalised": (X,),
        "heavy": (np.zeros((N, 1)),),
    }[name]

    def bism(backend):
        if name == "normalised":
            return backend.covariates()
        return backend.linear(OFF) if name == "unnormalised" else backend.exponential(0.25)

    data = backend.to_arviz(bism(backend), *arguments, num_draws=S)
    h = torch.tensor(values(data, "posterior", "h")[0])
    with PyroBackend() as host:
        programs = bism(host)
        for i, k in enumerate(values(data, "sample_stats", "pareto_k")):
            row = [torch.as_tensor(x[i : i + 1]) for x in arguments]
            guide = DrawnAs({"h": h[:, i : i + 1]})(programs.guide)
            theirs = psis_diagnostic(programs.model, guide, *row, num_particles=S, max_plate_nesting=1)
            assert k == pytest.approx(theirs, rel=1e-7)


@pytest.mark.parametrize("name", ["normalised", pytest.param("unnormalised", marks=pytest.mark.full), "heavy"])
def test_khat_is_that_of_numpyros_own_diagnostic(name, monkeypatch):
    """On the weights that it makes: one number for all data, so it is asked at one row."""
    arguments = {
        "normalised": (X[:1, 0], (X[:1, 1] > 0).astype(float), X[:1, 2]),
        "unnormalised": (X[:1],),
        "heavy": (np.zeros((1, 1)),),
    }[name]
    seen, theirs = [], importance._psis_khat

    def watched(log_weight):
        seen.append(np.array(log_weight))
        return theirs(log_weight)

    monkeypatch.setattr(importance, "_psis_khat", watched)
    with NumpyroBackend() as backend:
        if name == "normalised":
            bism = backend.covariates()
        else:
            bism = backend.linear(OFF) if name == "unnormalised" else backend.exponential(0.25)
        params = bism.get_params(bism.init(jax.random.key(0), *arguments))
        # of 400 draws the tail has 60; 3√S is rounded up by NumPyro and ArviZ 0.23, and down by ArviZ 1.x
        options = {"num_particles": 400}
        k = importance.psis_diagnostic(jax.random.key(1), params, bism.model, bism.guide, *arguments, **options)
        (log_weight,) = seen
        assert len(np.unique(log_weight)) == 400
        assert backend.psis_khat(log_weight) == pytest.approx(k, rel=1e-6)


def arviz_khat(log_weight):
    """ArviZ's k-hat, draws last: 1.x takes the log likelihood of a left-out point, that is, minus log weights."""
    if hasattr(az, "from_datatree"):
        return az.psislw(log_weight)[1]
    from arviz_stats.base import array_stats

    return array_stats.psislw(-log_weight, axis=-1)[1]


def test_khat_is_free_of_scale_order_and_zero_weights(backend):
    log_weight = 0.75 * rng.exponential(size=(1000, 3))
    k = backend.psis_khat(log_weight)
    np.testing.assert_allclose(backend.psis_khat(log_weight[::-1] - 300), k, rtol=1e-4)
    np.testing.assert_allclose(backend.psis_khat(log_weight.astype("float32")), k, atol=0.01)
    log_weight[log_weight < 0.1] = -np.inf  # far below the tail
    np.testing.assert_allclose(backend.psis_khat(log_weight), k, rtol=1e-10)


@pytest.mark.parametrize(
    ("weights", "k"),
    [
        (np.full(100, 0.3), -np.inf),
        (np.exp(1e-12 * rng.normal(size=100)), -np.inf),  # one value, but for rounding
        (np.where(np.arange(100) < 3, 1.0, 0.3), -np.inf),  # a bound that several draws attain
        (np.where(np.arange(100) < 1, 1.05, 1.0), -np.inf),  # the highest of weights much the same
        (np.where(np.arange(100) < 1, 1.0, 1e-9), np.inf),  # one draw outweighs all
        (np.append(1e-30 * rng.exponential(size=97), [1, 2, 3]), np.inf),
    ],
    ids=["equal", "rounding", "atom", "nearly", "single", "few"],
)
def test_khat_of_weights_without_a_tail(backend, weights, k):
    assert backend.psis_khat(np.log(weights)) == k


def test_khat_rejects_what_it_cannot_judge(backend):
    with pytest.raises(ValueError, match="at least 25 draws"):
        backend.psis_khat(np.zeros((24, 3)))
    for bad in (np.nan, np.inf):
        log_weight = np.zeros((30, 2))
        log_weight[4, 1] = bad
        with pytest.raises(ValueError, match=r"NaN or \+inf .* index \(4, 1\)"):
            backend.psis_khat(log_weight)
    log_weight[:, 1] = -np.inf
    with pytest.raises(ValueError, match=r"-inf at index \(1,\)"):
        backend.psis_khat(log_weight)


# What ArviZ reads


def test_groups_dimensions_and_attributes(backend):
    data = backend.to_arviz(backend.linear(OFF), X, num_draws=S)
    dimensions = {
        "posterior": {"h": ("chain", "draw", "obs", "h_dim_0")},
        "sample_stats": {
            "model_energy": ("chain", "draw", "obs"),
            "log_weight": ("chain", "draw", "obs"),
            "lp": ("chain", "draw"),
            "pareto_k": ("obs",),
        },
        "observed_data": {"v": ("obs", "v_dim_0")},
        "constant_data": {"sigma": ()},
    }
    for group, variables in dimensions.items():
        assert {name: x.dims for name, x in data[group].data_vars.items()} == variables
    np.testing.assert_array_equal(values(data, "observed_data", "v"), X)
    assert values(data, "constant_data", "sigma") == 0.3
    for attrs in (data.attrs, data["posterior"].attrs, data["sample_stats"].attrs):
        assert attrs["inference_library"] == backend.name
        assert (attrs["sampling_method"], attrs["normalized"]) == ("guide", 0)
    configuration = json.loads(data.attrs["configuration"])
    assert configuration["loss"] == {
        "name": "DenoisingScoreMatching",
        "sigma": 0.3,
        "num_particles": 1,
        "average": "loss",
    }
    assert configuration["inner_loss"]["name"] == "Trace_ELBO"
    chosen = {"name": "Functional", "num_particles": 4, "num_steps": 4, "memory": None}
    assert configuration["hypergradient"] == chosen
    assert (configuration["num_inner_steps"], configuration["visible"]) == (5, ["v"])


def test_dimensions_can_be_named(backend):
    names = [f"patient {i}" for i in range(N)]
    coords = {"unit": list("abcd"), "obs": names}
    data = backend.to_arviz(backend.linear(OFF), X, num_draws=2, coords=coords, dims={"h": ["unit"], "v": ["pixel"]})
    assert data["posterior"]["h"].sel(obs="patient 3", unit="c").shape == (1, 2)
    assert list(values(data, "sample_stats", "obs")) == names
    assert data["observed_data"]["v"].dims == ("obs", "pixel")
    assert "pareto_k" not in data["sample_stats"].data_vars  # two draws have no tail


def test_covariates_are_constant_data(backend):
    x, y, z = X[:, 0], (X[:, 1] > 0).astype(float), X[:, 2]
    data = backend.to_arviz(backend.covariates(), x, y, z, num_draws=S)
    assert data["posterior"]["h"].dims == ("chain", "draw", "obs_id")
    assert data["observed_data"]["obs"].dims == ("obs_id",)
    np.testing.assert_array_equal(values(data, "observed_data", "obs"), x)
    np.testing.assert_array_equal(values(data, "constant_data", "y"), y)
    np.testing.assert_array_equal(values(data, "constant_data", "scope.z"), z)
    h = values(data, "posterior", "h")[0]
    normal = 0.5 * (h**2 + (x - h - y - z) ** 2 + z**2 + 3 * np.log(2 * np.pi)) + np.log(2)
    np.testing.assert_allclose(values(data, "sample_stats", "model_energy")[0], normal, rtol=1e-10)


def test_netcdf_brings_back_the_same(backend, tmp_path):
    data = backend.to_arviz(backend.linear(OFF), X, num_draws=30, dims={"h": ["unit"]}, coords={"unit": list("abcd")})
    path = tmp_path / "draws.nc"
    data.to_netcdf(path)
    back = az.from_netcdf(path)
    assert back.attrs["configuration"] == data.attrs["configuration"]
    for group in ("posterior", "sample_stats", "observed_data", "constant_data"):
        written, read = (d[group] if hasattr(d, "from_datatree") else d[group].to_dataset() for d in (data, back))
        assert written.identical(read.load())


def test_arviz_summarises_it(backend):
    data = backend.to_arviz(backend.linear(OFF), X, num_draws=S)
    summary = az.summary(data, round_to="none")
    assert len(summary) == N * K
    h = values(data, "posterior", "h")[0]
    np.testing.assert_allclose(summary["mean"].to_numpy(float), h.mean(0).ravel(), rtol=1e-10)
    # variables without draws may stand beside those with them
    stats = az.extract(data, group="sample_stats")
    assert stats["log_weight"].sizes["sample"] == S
    assert stats["pareto_k"].dims == ("obs",)
    assert len(az.summary(data, group="sample_stats", var_names=["lp"])) == 1


# Misuse


def test_looking_changes_nothing(backend):
    bism = backend.linear(OFF)
    backend.to_arviz(bism, X, num_draws=2)
    before = backend.parameters(bism)
    backend.to_arviz(bism, X, num_draws=2)
    after = backend.parameters(bism)
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draws": 0}, "num_draws must be at least 1"),
        ({"dims": {"g": ["unit"]}}, r"dims names 'g'; the latent and observed sites are \['h', 'v'\]"),
        (
            {"dims": {"h": ["unit", "copy"]}},
            r"list of 1 names: the site's dimensions after 'obs' have the shape \(4,\)",
        ),
        ({"dims": {"h": "unit"}}, "should be a list of 1 names"),
        ({"dims": {"v": ["h"]}}, "Site 'h' has the name of a dimension"),
        ({"coords": {"unit": [1, 2]}}, "coords names 'unit'; the dimensions are"),
    ],
)
def test_options_are_checked(backend, options, message):
    with pytest.raises(ValueError, match=message):
        backend.to_arviz(backend.linear(OFF), X, **{"num_draws": 2, **options})


def test_data_and_densities_must_be_finite(backend):
    with pytest.raises(ValueError, match="NaN"):
        backend.to_arviz(backend.linear(OFF), np.where(X > 1, np.nan, X), num_draws=2)
    with pytest.raises(FloatingPointError, match="site 'energy' has a log density of inf at datapoint"):
        backend.to_arviz(backend.diverging(), X, num_draws=20)


def test_a_latent_must_belong_to_a_datapoint(backend):
    with pytest.raises(ValueError, match=r"Latent site 'shared' has shape \(\), without the batch of 6"):
        backend.to_arviz(backend.shared_latent(), X, num_draws=2)


# Pyro alone


def smooth(x):
    bias = pyro.param("bias", lambda: torch.zeros(D))
    with pyro.plate("data", len(x)):
        v = pyro.sample("v", dist.Normal(bias, 1.0).to_event(1), obs=x)
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.factor("energy", -0.5 * (v[:, :2] - h).square().sum(-1))


def test_auxiliary_sites_count_in_log_q_but_are_no_latents():
    """h = 2u with u ~ N(m, s) has the log density of N(2m, 2s), and an autoguide works the same way."""

    def guide(x):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x)):
            base = dist.Normal(loc + 0.25 * x[:, :2], 0.4).to_event(1)
            u = pyro.sample("u", base, infer={"is_auxiliary": True})
            density = torch.full((len(x),), -2 * np.log(2.0))
            pyro.sample("h", dist.Delta(2 * u, log_density=density, event_dim=1))

    with PyroBackend() as backend:
        data = backend.to_arviz(backend.bism(smooth, guide), X, num_draws=S)
        assert list(data["posterior"].data_vars) == ["h"]
        h = values(data, "posterior", "h")[0]
        log_q = -0.5 * (((h - 0.5 * X[:, :2]) / 0.8) ** 2 + np.log(2 * np.pi) + 2 * np.log(0.8)).sum(-1)
        log_weight = -values(data, "sample_stats", "model_energy")[0] - log_q
        np.testing.assert_allclose(values(data, "sample_stats", "log_weight")[0], log_weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("axis", [1, -1])
def test_programs_that_count_axes_from_the_left_are_right_too(axis):
    """Such a program can't run several draws at once: here the sum would run over the datapoints, without an error."""

    def model(x):
        bias = pyro.param("bias", lambda: torch.zeros(D))
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", dist.Normal(bias, 1.0).to_event(1), obs=x)
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([N]).to_event(1))
            pyro.factor("energy", v[:, 0] * h.sum(axis))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(x[:, :1] * pyro.param("slope", torch.ones(N)), 1.0).to_event(1))

    with PyroBackend() as backend:
        data = backend.to_arviz(backend.bism(model, guide), X, num_draws=20)
        h = values(data, "posterior", "h")[0]
        energy = 0.5 * ((X**2).sum(-1) + (h**2).sum(-1) + (D + N) * np.log(2 * np.pi)) - X[:, 0] * h.sum(-1)
        np.testing.assert_allclose(values(data, "sample_stats", "model_energy")[0], energy, rtol=1e-9)


def test_a_point_mass_has_no_weights():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Delta(x[:, :2] * pyro.param("slope", torch.ones(())), event_dim=1))

    with PyroBackend() as backend, pytest.raises(ValueError, match="Guide site 'h' is a point mass"):
        backend.to_arviz(backend.bism(smooth, guide), X, num_draws=2)


def test_batch_norm_statistics_stay():
    norm = torch.nn.BatchNorm1d(D)

    def guide(x):
        pyro.module("norm", norm)
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(norm(x)[:, :2], 1.0).to_event(1))

    with PyroBackend() as backend:
        norm.double()
        bism = backend.bism(smooth, guide)
        x = torch.tensor(X)
        bism.evaluate_loss(x)
        before = norm.running_mean.clone()
        pyro_bism.to_arviz(bism, x, num_draws=3)
        assert torch.equal(norm.running_mean, before)


def test_a_saved_state_is_taken_up(tmp_path):
    with PyroBackend() as backend:
        bism = backend.linear(OFF)
        x = torch.tensor(X)
        bism.step(x)
        bism.save(tmp_path / "state")
        expected = pyro_bism.to_arviz(bism, x, num_draws=2)
        pyro.clear_param_store()
        fresh = backend.linear(OFF)
        fresh.load(tmp_path / "state")
        data = pyro_bism.to_arviz(fresh, x, num_draws=2)
        assert (values(data, "posterior", "h") == values(expected, "posterior", "h")).all()


def test_only_a_bism_is_read():
    with pytest.raises(ValueError, match="got SVI"):
        pyro_bism.to_arviz(pyro.infer.SVI(smooth, smooth, pyro.optim.Adam({}), pyro.infer.Trace_ELBO()))


def test_a_schedule_is_named_in_the_configuration():
    settings = pyro_bism.evaluation.arviz._settings(pyro_bism.Penalty(strength=math.sqrt))
    assert settings == {"name": "Penalty", "strength": "sqrt"}
