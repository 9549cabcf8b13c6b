"""The rivals against closed forms and enumeration, in float64; one test body for both packages.

A host is what differs: how its programs are written, and how its trainers are run.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as pdist
import pyro.optim
import pytest
import torch
from torch.utils import _pytree as pytree

import numpyro_bism
import numpyro_bism.rivals
import pyro_bism
import pyro_bism.rivals
from numpyro_bism.visible import flatten
from oracles import GaussianBernoulliRBM, LinearGaussian


class Torch:
    name, p, dist, bism, rivals = "pyro", pyro, pdist, pyro_bism, pyro_bism.rivals
    einsum = staticmethod(torch.einsum)

    def __init__(self):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)

    @staticmethod
    def array(x):
        return torch.as_tensor(np.asarray(x))

    def param(self, name, value, **kwargs):
        return pyro.param(name, lambda: self.array(value), **kwargs)

    @staticmethod
    def adam(rate):
        return pyro.optim.Adam({"lr": rate})

    def start(self, rival, *args):
        args = [self.array(x) for x in args]
        self.value = rival.evaluate_loss(*args)
        return args

    def gradient(self, rival, *args):
        """The loss and its gradient in the parameters, by name."""
        args = self.start(rival, *args)
        pyro.set_rng_seed(1)
        target = rival.target(*args)
        batch = target.batch(*pytree.tree_flatten((tuple(args), {})))
        loss, _ = rival._loss(target, batch, *rival._carried)
        names = [*target.pair.theta, *rival._own_names]
        found = torch.autograd.grad(loss, [*target.pair.theta.values(), *rival._own()])
        return loss.item(), {name: g.numpy() for name, g in zip(names, found, strict=True)}

    def fit(self, rival, num_steps, *args):
        """Parameters after so many steps."""
        args = [self.array(x) for x in args]
        for _ in range(num_steps):
            rival.step(*args)
        self.info = rival.info
        return {name: pyro.param(name).detach().numpy() for name in pyro.get_param_store()}


class Jax:
    name, p, dist, bism, rivals = "numpyro", numpyro, ndist, numpyro_bism, numpyro_bism.rivals
    einsum = staticmethod(jnp.einsum)

    @staticmethod
    def array(x):
        return jnp.asarray(x)

    def param(self, name, value, **kwargs):
        return numpyro.param(name, jnp.asarray(value), **kwargs)

    @staticmethod
    def adam(rate):
        return numpyro.optim.Adam(rate)

    def start(self, rival, *args):
        args = [jnp.asarray(x) for x in args]
        self.state = rival.init(jax.random.key(0), *args)
        return args

    def gradient(self, rival, *args):
        leaves, spec = flatten(tuple(self.start(rival, *args)), {})
        target, state = rival.target(leaves, spec), self.state
        batch = target.pair.batch(jax.random.key(1), leaves, spec)

        @jax.jit
        def loss(theta):
            return rival._loss(jax.random.key(2), theta, state.carried, target, state.mutable_state, batch)[0]

        value, found = jax.value_and_grad(loss)(rival._theta(target.pair, state))
        return float(value), jax.tree.map(np.asarray, found)

    def fit(self, rival, num_steps, *args):
        result = rival.run(jax.random.key(0), num_steps, *args, progress_bar=False)
        self.info = result.state.info
        return jax.tree.map(np.asarray, result.params)


@pytest.fixture(params=[Torch, Jax], ids=["pyro", "numpyro"])
def host(request):
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield request.param()
    torch.set_default_dtype(torch.float32)


RNG = np.random.default_rng(0)
GAUSS = LinearGaussian.random(RNG, 3, 2)
RBM = GaussianBernoulliRBM(0.8 * RNG.normal(size=(2, 3)), 0.3 * RNG.normal(size=2), 0.3 * RNG.normal(size=3), 0.9)


def gaussian(host, truth=GAUSS):
    d, k = truth.W.shape
    flat = host.dist.Normal(0.0, 1.0)

    def model(x):
        A, B, W, b, c = (host.param(name, getattr(truth, name)) for name in "ABWbc")
        with host.p.plate("data", len(x)):
            v = host.p.sample("v", flat.expand([d]).to_event(1).mask(False), obs=x)
            h = host.p.sample("h", flat.expand([k]).to_event(1).mask(False))
            quadratic = host.einsum("ni,ij,nj->n", v, A, v) + host.einsum("ni,ij,nj->n", h, B, h)
            host.p.factor("energy", host.einsum("ni,ij,nj->n", v, W, h) - 0.5 * quadratic + v @ b + h @ c)

    return model


def rbm(host, truth=RBM, size=None):
    d, k = truth.W.shape

    def model(x):
        W, b, c = (host.param(name, getattr(truth, name)) for name in "Wbc")
        with host.p.plate("data", len(x), subsample_size=size) as rows:
            x = x if size is None else x[rows]
            v = host.p.sample("v", host.dist.Normal(0.0, 1.0).expand([d]).to_event(1).mask(False), obs=x)
            h = host.p.sample("h", host.dist.Bernoulli(0.5).expand([k]).to_event(1).mask(False))
            quadratic = 0.5 * (((v - b) / truth.s) ** 2).sum(-1)
            host.p.factor("energy", h @ c + host.einsum("ni,ij,nj->n", v, W, h) - quadratic)

    return model


def test_marginal_sm_has_the_gradient_of_the_exact_score(host):
    """Of the linear-Gaussian model in closed form, its latents integrated out."""
    x = GAUSS.sample(np.random.default_rng(1), 20)[0]
    moved = LinearGaussian(GAUSS.A + np.eye(3), GAUSS.B, GAUSS.W, GAUSS.b + 0.3, GAUSS.c - 0.2)
    rival = host.rivals.MarginalSM(gaussian(host, moved), host.adam(1e-2), host.bism.ScoreMatching())
    loss, gradient = host.gradient(rival, x)
    exact = moved.sm_gradient(x)
    np.testing.assert_allclose(loss, moved.sm_loss(x).mean(), rtol=1e-10)
    for name in "ABWbc":
        ours = gradient[name] if name not in "AB" else 0.5 * (gradient[name] + gradient[name].T)
        np.testing.assert_allclose(ours, getattr(exact, name), rtol=1e-8, atol=1e-12)


def test_nce_is_bayes_rule_for_data_against_noise(host):
    """At the truth, normaliser included, the gradient's mean over data and noise is zero, within 5 standard errors."""
    n, num_noise = 4000, 2
    x = RBM.sample(np.random.default_rng(2), n)[0]
    rival = host.rivals.NCE(rbm(host), host.adam(1e-2), num_noise=num_noise, log_normalizer=RBM.log_normalizer)
    loss, gradient = host.gradient(rival, x)
    assert set(gradient) == {"W", "b", "c", "nce.log_normalizer"}
    # Bayes' rule: the classifier's own entropy bounds the variance of its gradient in log Z by ν + 1 an example
    assert abs(gradient["nce.log_normalizer"]) < 5 * np.sqrt((num_noise + 1) / n)
    mean, cov = x.mean(0), np.cov(x.T, bias=True)
    y = np.random.default_rng(3).multivariate_normal(mean, cov, (num_noise, n))

    def log_ratio(u):
        e = u - mean
        quadratic = np.einsum("...i,ij,...j->...", e, np.linalg.inv(cov), e)
        log_noise = -0.5 * quadratic - 0.5 * np.linalg.slogdet(2 * np.pi * cov)[1]
        return RBM.log_prob(u) - log_noise - np.log(num_noise)

    data, noise = np.logaddexp(0, -log_ratio(x)), np.logaddexp(0, log_ratio(y)).sum(0)
    assert abs(loss - (data + noise).mean()) < 5 * noise.std() / np.sqrt(n) * np.sqrt(2)


def test_nce_learns_the_normaliser_and_conditional_noise_needs_none(host):
    """The scale of a Gaussian whose energy leaves its normaliser out: by the moments, up to the noise's own error."""
    x = np.random.default_rng(4).normal(0.5, 0.8, (2000, 1))

    def model(x):
        mean, precision = host.param("mean", np.zeros(1)), host.param("precision", np.ones(1))
        with host.p.plate("data", len(x)):
            v = host.p.sample("v", host.dist.Normal(0.0, 1.0).expand([1]).to_event(1).mask(False), obs=x)
            host.p.factor("energy", -0.5 * (precision * (v - mean) ** 2).sum(-1))

    def near(v):
        return host.dist.Normal(v, 0.7).to_event(1)

    rival = host.rivals.NCE(model, host.adam(2e-2), num_noise=4)
    found = host.fit(rival, 300, x)
    errors = {"mean": 5 * 0.8 / np.sqrt(2000) * 1.5, "precision": 5 * np.sqrt(2 / 2000) / 0.64 * 1.5}
    assert abs(found["mean"] - 0.5) < errors["mean"] and abs(found["precision"] - 1 / 0.64) < errors["precision"]
    exact = 0.5 * np.log(2 * np.pi / found["precision"])
    np.testing.assert_allclose(found["nce.log_normalizer"], exact, atol=0.1)
    if host.name == "pyro":
        pyro.clear_param_store()
    rival = host.rivals.NCE(model, host.adam(2e-2), num_noise=4, conditional=near)
    found = host.fit(rival, 300, x)
    assert set(found) == {"mean", "precision"}
    assert abs(found["mean"] - 0.5) < errors["mean"] and abs(found["precision"] - 1 / 0.64) < errors["precision"]
