"""The rivals against closed forms and enumeration, in float64; one test body for both packages.

A host is what differs: how its programs are written, and how its trainers are run.
"""

import dataclasses
import warnings

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import numpyro.infer
import pyro
import pyro.distributions as pdist
import pyro.infer
import pyro.optim
import pytest
import scipy.special
import torch
from torch.utils import _pytree as pytree

import numpyro_bism
import numpyro_bism.evaluation
import numpyro_bism.rivals
import numpyro_bism.sampling.kernels
import pyro_bism
import pyro_bism.evaluation
import pyro_bism.rivals
import pyro_bism.sampling.kernels
from numpyro_bism.programs.visible import flatten
from oracles import GaussianBernoulliRBM, LinearGaussian, central_difference


class Torch:
    name, p, dist, bism, rivals = "pyro", pyro, pdist, pyro_bism, pyro_bism.rivals
    compiled = {"jit": True}
    infer = pyro.infer
    kernels, evaluation = pyro_bism.sampling.kernels, pyro_bism.evaluation
    einsum, exp = staticmethod(torch.einsum), staticmethod(torch.exp)

    def __init__(self):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)

    @staticmethod
    def array(x):
        return torch.as_tensor(np.asarray(x))

    def param(self, name, value, **kwargs):
        return pyro.param(name, lambda: self.array(value), **kwargs)

    @staticmethod
    def onehot(q):
        return pdist.OneHotCategorical(torch.full((q,), 1.0 / q))

    @staticmethod
    def adam(rate):
        return pyro.optim.Adam({"lr": rate})

    @staticmethod
    def sgd(rate):
        return pyro.optim.SGD({"lr": rate})

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
        loss, _ = rival._loss(target, batch, *rival._method_state)
        names = [*target.pair.theta, *(rival._own_names or target.pair.phi)]
        found = torch.autograd.grad(loss, [*target.pair.theta.values(), *rival._own(target.pair)])
        return loss.item(), {name: g.numpy() for name, g in zip(names, found, strict=True)}

    def fit(self, rival, num_steps, *args):
        """Parameters after so many steps."""
        args = [self.array(x) for x in args]
        for _ in range(num_steps):
            rival.step(*args)
        self.info = rival.info
        return {name: pyro.param(name).detach().numpy().copy() for name in pyro.get_param_store()}


class Jax:
    name, p, dist, bism, rivals = "numpyro", numpyro, ndist, numpyro_bism, numpyro_bism.rivals
    compiled: dict = {}  # by itself
    infer = numpyro.infer
    kernels, evaluation = numpyro_bism.sampling.kernels, numpyro_bism.evaluation
    einsum, exp = staticmethod(jnp.einsum), staticmethod(jnp.exp)

    @staticmethod
    def array(x):
        return jnp.asarray(x)

    def param(self, name, value, **kwargs):
        return numpyro.param(name, jnp.asarray(value), **kwargs)

    @staticmethod
    def onehot(q):
        return ndist.Multinomial(1, jnp.full(q, 1.0 / q))

    @staticmethod
    def adam(rate):
        return numpyro.optim.Adam(rate)

    @staticmethod
    def sgd(rate):
        return numpyro.optim.SGD(rate)

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


def log_ratios(host, rival, x, u):
    """VNCE's log p̃(u, h) - log q(h|u), and log shares of q, at rows u; (particles, configurations, n)."""
    args = host.start(rival, x)
    if host.name == "pyro":
        target = rival.target(*args)
        batch = target.batch(*pytree.tree_flatten((tuple(args), {})))
        return [z.detach().numpy() for z in rival._log_ratios(target.pair, batch, host.array(u))]
    leaves, spec = flatten(tuple(args), {})
    target = rival.target(leaves, spec)
    params = target.params(
        rival._theta(target.pair, host.state), None, rival._phi(target.pair, None, host.state.carried)
    )
    batch = target.pair.batch(jax.random.key(1), leaves, spec)
    return [np.asarray(z) for z in rival._log_ratios(jax.random.key(2), target.pair, params, batch, jnp.asarray(u))]


def test_vnce_is_nce_where_the_guide_is_the_posterior(host):
    """Every draw of h then gives the marginal, exactly; and the gradient at the truth is zero on average."""
    exact = GAUSS.posterior

    def guide(x):
        M, m = host.param("M", exact.M), host.param("m", exact.m)
        with host.p.plate("data", len(x)):
            scale = host.array(np.linalg.cholesky(exact.S))
            host.p.sample("h", host.dist.MultivariateNormal(x @ M.T + m, scale_tril=scale))

    x = GAUSS.sample(np.random.default_rng(5), 4000)[0]
    rival = host.rivals.VNCE(
        gaussian(host), guide, host.adam(1e-2), num_particles=2, log_normalizer=GAUSS.log_normalizer
    )
    ratios, _ = log_ratios(host, rival, x, x + 0.1)
    np.testing.assert_allclose(ratios, np.broadcast_to(-GAUSS.free_energy(x + 0.1), ratios.shape), rtol=1e-8)
    _, gradient = host.gradient(rival, x)
    assert abs(gradient["nce.log_normalizer"]) < 5 * np.sqrt(2 / len(x))


def plated(host, truth, start=0.0):
    """A machine in plates, its parameters so far from their truth."""
    d, k = truth.W.shape

    def model(x):
        W, b, c = (host.param(name, getattr(truth, name) + start) for name in "Wbc")
        with host.p.plate("data", len(x), dim=-2):
            v = host.p.sample("v", host.dist.Normal(0.0, 1.0).expand([d]).to_event(1).mask(False), obs=x)
            host.p.factor("quadratic", -0.5 * (((v - b) / truth.s) ** 2).sum(-1))
            with host.p.plate("units", k, dim=-1):
                h = host.p.sample("h", host.dist.Bernoulli(0.5).mask(False))
                host.p.factor("unit", h * (c + (v @ W).squeeze(-2)))

    return model


def summed_rbm(host):
    """The RBM in plates, and a guide that is not its posterior, summed out."""

    def guide(x):
        a = host.param("a", np.array([0.3, -0.2, 0.5]))
        with host.p.plate("data", len(x), dim=-2), host.p.plate("units", 3, dim=-1):
            logits = a + 0 * x.sum(-1)
            host.p.sample("h", host.dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})

    return plated(host, RBM), guide


def test_vnce_sums_discrete_latents_out(host):
    """The sum over configurations is the marginal, whatever the guide."""
    x = RBM.sample(np.random.default_rng(6), 50)[0]
    rival = host.rivals.VNCE(*summed_rbm(host), host.adam(0.05), log_normalizer=RBM.log_normalizer)
    ratios, log_shares = log_ratios(host, rival, x[:, None], x)
    assert ratios.shape == (1, 8, 50)
    np.testing.assert_allclose(np.exp(log_shares).sum(1), 1.0, rtol=1e-10)
    marginal = np.log(np.exp(ratios + log_shares).sum((0, 1)))
    np.testing.assert_allclose(marginal, -RBM.free_energy(x), rtol=1e-10)


def test_vnce_fits_its_guide_by_the_loss_it_is_given(host):
    """One step of plain descent on the negative ELBO, its sum over h taken by enumeration outside."""
    x = RBM.sample(np.random.default_rng(17), 30)[0]
    rate, a = 0.1, np.array([0.3, -0.2, 0.5])
    h = spins(3)

    def negative_elbo(a):
        log_q = h @ a - np.logaddexp(0, a).sum()
        log_p = -np.stack([RBM.energy(x, np.broadcast_to(row, (len(x), 3))) for row in h], -1)
        return (np.exp(log_q) * (log_q - log_p)).sum(-1).mean()

    elbo = host.infer.TraceEnum_ELBO(max_plate_nesting=2)
    settings = {"inner_optim": host.sgd(rate), "inner_loss": elbo, "num_inner_steps": 1, "log_normalizer": 0.0}
    rival = host.rivals.VNCE(*summed_rbm(host), host.sgd(0.0), **settings)
    found = host.fit(rival, 1, x[:, None])["a"]
    gradient = [central_difference(lambda t, e=e: negative_elbo(a + t * e), 1e-5) for e in np.eye(3)]
    np.testing.assert_allclose(found, a - rate * np.array(gradient), rtol=1e-7)
    np.testing.assert_allclose(host.info.inner_loss, negative_elbo(a), rtol=1e-10)


# What is consistent finds the truth: ten data sets of their own, each fitted from elsewhere

SMALL = GaussianBernoulliRBM(np.array([[1.5], [-1.0]]), np.array([0.3, -0.2]), np.array([-0.4]), 0.8)


def one_unit(host, start):
    """SMALL in plates, its guide of the posterior's family."""

    def guide(x):
        a, u = host.param("a", np.zeros(1)), host.param("u", np.zeros((2, 1)))
        with host.p.plate("data", len(x), dim=-2), host.p.plate("units", 1, dim=-1):
            logits = a + (x @ u).squeeze(-2)
            host.p.sample("h", host.dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})

    return plated(host, SMALL, start), guide


CONSISTENT = {
    "score matching": lambda host, p, q: host.rivals.MarginalSM(p, host.adam(2e-2), host.bism.ScoreMatching()),
    "sliced": lambda host, p, q: host.rivals.MarginalSM(p, host.adam(2e-2), host.bism.SlicedScoreMatching(4)),
    "CD": lambda host, p, q: host.rivals.CD(p, host.adam(2e-2), host.kernels.Gibbs(), 5),
    "persistent CD": lambda host, p, q: host.rivals.CD(p, host.adam(2e-2), host.kernels.Gibbs(), persistent=True),
    "NCE": lambda host, p, q: host.rivals.NCE(p, host.adam(2e-2), num_noise=4),
    "VNCE": lambda host, p, q: host.rivals.VNCE(p, q, host.adam(2e-2), num_noise=4, num_inner_steps=2, **host.compiled),
}


def recovered(host, rival, truth, sets, num_steps):
    """Each parameter's mean over the sets is the truth within 5 standard errors of theirs."""
    fits = []
    if host.name == "pyro":
        rival.evaluate_loss(host.array(sets[0]))
        start = rival.get_state()
    for x in sets:
        if host.name == "pyro":  # from the same start, without another capture
            rival.set_state(start)
        fits.append(host.fit(rival, num_steps, x))
    for name, exact in truth.items():
        found = np.stack([fit[name] for fit in fits])
        error = found.std(0, ddof=1) / np.sqrt(len(sets))
        assert (abs(found.mean(0) - exact) < 5 * error).all(), (name, found.mean(0), exact, error)
        assert (error < 0.15).all(), (name, error)


@pytest.mark.parametrize(
    "name", [n if n == "score matching" else pytest.param(n, marks=pytest.mark.full) for n in CONSISTENT]
)
def test_the_truth_is_recovered(host, name):
    sets = SMALL.sample(np.random.default_rng(18), 10 * 2000)[0].reshape(10, 2000, 1, 2)
    rival = CONSISTENT[name](host, *one_unit(host, 0.3))
    recovered(host, rival, {"W": SMALL.W, "b": SMALL.b, "c": SMALL.c}, sets, 3000 if name == "VNCE" else 400)


def test_pseudo_likelihood_recovers_the_truth(host):
    """Of an Ising model of 4 spins, drawn from its table."""
    rng = np.random.default_rng(19)
    J, b = np.triu(rng.normal(size=(4, 4)), 1), 0.5 * rng.normal(size=4)
    J = J + J.T
    v = spins(4)
    log_p = 0.5 * ((v @ J) * v).sum(-1) + v @ b
    p = np.exp(log_p - log_p.max())
    sets = v[rng.choice(len(v), (10, 1000), p=p / p.sum())]

    def model(x):
        upper, b_ = (
            host.param("J", np.zeros((4, 4))) * host.array(np.triu(np.ones((4, 4)), 1)),
            host.param("b", b + 0.3),
        )
        with host.p.plate("data", len(x)):
            x = host.p.sample("v", host.dist.Bernoulli(0.5).expand([4]).to_event(1).mask(False), obs=x)
            host.p.factor("energy", ((x @ upper) * x).sum(-1) + x @ b_)

    rival = host.rivals.PseudoLikelihood(model, host.adam(3e-2))
    at = np.triu_indices(4, 1)
    fits = []
    for x in sets:
        if host.name == "pyro":
            pyro.clear_param_store()
            rival = host.rivals.PseudoLikelihood(model, host.adam(3e-2))
        fit = host.fit(rival, 400, x)
        fits.append(np.concatenate([fit["J"][at], fit["b"]]))
    error = np.std(fits, 0, ddof=1) / np.sqrt(len(fits))
    assert (abs(np.mean(fits, 0) - np.concatenate([J[at], b])) < 5 * error).all()
    assert (error < 0.15).all()


def couplings(d, q, rng):
    """Of a Potts model: symmetric, none of a unit with itself."""
    J = 0.5 * rng.normal(size=(d, q, d, q))
    J[np.arange(d), :, np.arange(d), :] = 0.0
    return 0.5 * (J + J.transpose(2, 3, 0, 1)).reshape(d * q, d * q), 0.3 * rng.normal(size=(d, q))


def pseudo_likelihood(J, b, x):
    """Mean of -Σ_i log p(x_i | x_-i) by direct evaluation of every change, and its gradient in J and b."""
    n, d, q = x.shape
    flat = x.reshape(n, d * q)
    loss, dJ, db = 0.0, np.zeros_like(J), np.zeros_like(b)
    for i in range(d):
        logits = b[i] + flat @ (J + J.T)[:, i * q : (i + 1) * q] / 2
        logits -= logits.max(-1, keepdims=True)
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        loss -= np.log((p * x[:, i]).sum(-1)).mean()
        gap = (p - x[:, i]) / n
        db[i] += gap.sum(0)
        dJ[:, i * q : (i + 1) * q] += 0.5 * flat.T @ gap
        dJ[i * q : (i + 1) * q] += 0.5 * gap.T @ flat
    return loss, dJ, db


def potts(host, J, b, labels=False):
    d, q = b.shape
    between = host.array(1 - np.kron(np.eye(d), np.ones((q, q))))

    def model(x):
        J_, b_ = between * host.param("J", J), host.param("b", b)
        with host.p.plate("data", len(x)):
            if labels:
                fn = host.dist.Categorical(host.array(np.full(q, 1.0 / q))).expand([d]).to_event(1)
                x = host.array(np.eye(q))[host.p.sample("v", fn.mask(False), obs=x)]
            else:
                x = host.p.sample("v", host.onehot(q).expand([d]).to_event(1).mask(False), obs=x)
            flat = x.reshape(-1, d * q)
            host.p.factor("energy", 0.5 * ((flat @ J_) * flat).sum(-1) + flat @ b_.reshape(-1))

    return model


@pytest.mark.parametrize("data", ["one-hot", "labels"])
def test_pseudo_likelihood_of_a_potts_model(host, data):
    """One gradient where the model takes one-hot values, every change in turn where it takes labels: one result."""
    rng = np.random.default_rng(7)
    J, b = couplings(4, 3, rng)
    labels = rng.integers(3, size=(9, 4))
    x = np.eye(3)[labels]
    given = labels if data == "labels" else x
    rival = host.rivals.PseudoLikelihood(potts(host, J, b, data == "labels"), host.adam(1e-2))
    loss, gradient = host.gradient(rival, given)
    exact, dJ, db = pseudo_likelihood(J, b, x)
    np.testing.assert_allclose(loss, exact, rtol=1e-10)
    np.testing.assert_allclose(gradient["b"], db, rtol=1e-8, atol=1e-12)
    between = 1 - np.kron(np.eye(4), np.ones((3, 3)))
    np.testing.assert_allclose(gradient["J"] + gradient["J"].T, between * (dJ + dJ.T), rtol=1e-8, atol=1e-12)
    (target,) = rival._targets.values()
    assert target.multilinear == (("v",) if data == "one-hot" else ())


def test_pseudo_likelihood_sums_latents_out_of_integer_bits(host):
    """A binary RBM's conditionals by enumeration; its free energy is affine in no bit, so every change is tried."""
    rng = np.random.default_rng(8)
    W, b = rng.normal(size=(3, 2)), rng.normal(size=3)
    x = rng.integers(2, size=(6, 3))

    def model(x):
        W_, b_ = host.param("W", W), host.param("b", b)
        with host.p.plate("data", len(x)):
            v = host.p.sample("v", host.dist.Bernoulli(0.5).expand([3]).to_event(1).mask(False), obs=x)
            h = host.p.sample("h", host.dist.Bernoulli(0.5).expand([2]).to_event(1).mask(False))
            host.p.factor("energy", host.einsum("ni,ij,nj->n", 1.0 * v, W_, h) + 1.0 * v @ b_)

    def log_marginal(v):
        return v @ b + np.logaddexp(0, v @ W).sum(-1)

    exact = 0.0
    for i in range(3):
        flipped = x.copy()
        flipped[:, i] = 1 - x[:, i]
        exact += np.logaddexp(0, log_marginal(flipped) - log_marginal(x)).mean()
    rival = host.rivals.PseudoLikelihood(model, host.adam(1e-2))
    loss, _ = host.gradient(rival, x)
    np.testing.assert_allclose(loss, exact, rtol=1e-10)


def check_likelihood(host, kernel, model, x, log_likelihood, theta, num_steps, **settings):
    """Chains run to their end from data that are not the model's: the gradient of the exact log-likelihood."""
    rival = host.rivals.CD(model, host.adam(1e-2), kernel, num_steps, **settings)
    _, gradient = host.gradient(rival, x)
    rng = np.random.default_rng(9)
    for name, value in theta.items():
        direction = rng.normal(size=value.shape)
        exact = central_difference(lambda t, n=name, d=direction: -log_likelihood(**{n: theta[n] + t * d}), 1e-3)
        # every statistic here is a product of bits or of units of order 1, a few of them a parameter
        error = 5 * np.sqrt((direction**2).sum() / len(x)) * (1.5 if x.dtype == float else 0.5)
        assert abs((gradient[name] * direction).sum() - exact) < error, name


def test_cd_with_long_chains_is_maximum_likelihood(host):
    """Block Gibbs sampling of the Gaussian-Bernoulli machine, the hidden units summed out."""
    x = np.random.default_rng(10).normal(1.5, 1.0, (20_000, 2))
    theta = {"W": RBM.W, "b": RBM.b, "c": RBM.c}

    def log_likelihood(**changed):
        return dataclasses.replace(RBM, **changed).log_prob(x).mean()

    check_likelihood(host, host.kernels.Gibbs(), rbm(host), x, log_likelihood, theta, 20)


def spins(q):
    return np.stack(np.meshgrid(*[np.arange(2.0)] * q, indexing="ij"), -1).reshape(-1, q)


def ising(host, J, b, labels=False):
    d = len(b)
    between = host.array(1 - np.eye(d))

    def model(x):
        J_, b_ = between * host.param("J", J), host.param("b", b)
        with host.p.plate("data", len(x)):
            x = host.p.sample("v", host.dist.Bernoulli(0.5).expand([d]).to_event(1).mask(False), obs=x)
            host.p.factor("energy", 0.5 * ((x @ J_) * x).sum(-1) + x @ b_)

    return model


def ising_log_likelihood(x, J, b):
    J = J * (1 - np.eye(len(b)))

    def log_p(v):
        return 0.5 * ((v @ J) * v).sum(-1) + v @ b

    return (log_p(x) - np.log(np.exp(log_p(spins(len(b)))).sum())).mean()


def test_persistent_cd_of_discrete_data(host):
    """An Ising model's spins, one after the other."""
    rng = np.random.default_rng(11)
    J, b = rng.normal(size=(3, 3)), rng.normal(size=3)
    theta = {"J": J + J.T, "b": b}
    x = rng.integers(2, size=(20_000, 3)).astype(float)

    def log_likelihood(**changed):
        return ising_log_likelihood(x, **{**theta, **changed})

    check_likelihood(host, host.kernels.Gibbs(), ising(host, **theta), x, log_likelihood, theta, 20, persistent=True)


def gaussian_mean(host):
    """Data of an unknown mean, which has a Gaussian prior."""

    def model(x):
        mean = host.p.sample("mean", host.dist.Normal(0.0, 0.5))
        with host.p.plate("data", len(x)):
            v = host.p.sample("v", host.dist.Normal(0.0, 1.0).expand([1]).to_event(1).mask(False), obs=x)
            host.p.factor("energy", (v * mean - 0.5 * v**2).sum(-1))

    return model


def test_persistent_vi_finds_a_gaussian_posterior(host):
    """Of the mean of Gaussian data under a Gaussian prior, in closed form: mean and standard deviation."""
    rng = np.random.default_rng(12)
    x = rng.normal(1.0, 1.0, (50, 1))

    def guide(x):
        loc, log_scale = host.param("loc", np.zeros(())), host.param("log_scale", np.array(-1.0))
        host.p.sample("mean", host.dist.Normal(loc, host.exp(log_scale)))

    rival = host.rivals.PersistentVI(gaussian_mean(host), guide, host.adam(2e-2), host.kernels.Gibbs(), num_chains=500)
    found = host.fit(rival, 600, x)
    precision = 1 / 0.25 + len(x)
    # Adam's last steps wander by its rate
    assert abs(found["loc"] - x.sum() / precision) < 0.08
    assert abs(np.exp(found["log_scale"]) - precision**-0.5) < 0.04


def test_log_likelihood_and_loo_where_theta_has_draws(host, monkeypatch):
    """Of v = N(mean, 1) with a factor h of two latent bits that the mean drives, whose sums are known."""
    rng = np.random.default_rng(14)
    x, num = rng.normal(1.0, 1.0, (12, 1)), 30

    def model(x):
        mean = host.p.sample("mean", host.dist.Normal(0.0, 0.5))
        with host.p.plate("data", len(x)):
            v = host.p.sample("v", host.dist.Normal(0.0, 1.0).expand([1]).to_event(1).mask(False), obs=x)
            h = host.p.sample("h", host.dist.Bernoulli(0.5).expand([2]).to_event(1).mask(False))
            host.p.factor("energy", (v * (mean + h.sum(-1)[..., None]) - 0.5 * v**2).sum(-1))

    def guide(x):
        loc, log_scale = host.param("loc", np.zeros(())), host.param("log_scale", np.array(-2.5))
        host.p.sample("mean", host.dist.Normal(loc, host.exp(log_scale)))

    rival = host.rivals.PersistentVI(model, guide, host.adam(1e-2), host.kernels.Gibbs(), num_chains=4)
    package, evaluation = host.bism, host.evaluation
    if host.name == "pyro":
        data, state, keyed = (host.array(x),), (), {}
        pyro.set_rng_seed(0)
    else:
        data, keyed = (jnp.asarray(x),), {"rng_key": jax.random.key(1)}
        state = (rival.init(jax.random.key(0), *data),)
    theta = rival.posterior(*state, *data, num_draws=num, **keyed)
    mean = np.asarray(theta["mean"])
    assert mean.shape == (num,)
    assert mean.std() > 0.05

    # v given the bits is N(mean + h₁ + h₂, 1), and the bits are summed
    drive = mean[:, None] + np.array([0, 1, 1, 2])
    log_z = scipy.special.logsumexp(0.5 * drive**2, -1) + 0.5 * np.log(2 * np.pi)
    log_p = scipy.special.logsumexp(x * drive[:, None, :], -1) - 0.5 * x[:, 0] ** 2
    exact = log_p - log_z[:, None]
    found = package.log_likelihood(rival, *state, *data, theta=theta, progress_bar=False, **keyed)
    np.testing.assert_allclose(np.asarray(found.value), exact[None], rtol=1e-6)
    assert np.shape(found.standard_error) == (1, num, 12)
    assert (np.asarray(found.standard_error) == 0).all()
    assert found.method == "exact"
    at = rival.at({"mean": theta["mean"][3]})
    np.testing.assert_allclose(np.asarray(package.free_energy(at, *state, *data)), -log_p[3], rtol=1e-6)
    own = package.log_likelihood(rival, *state, *data, num_draws=3, progress_bar=False, **keyed)
    assert np.shape(own.value) == (1, 3, 12)

    # what loo says of it, and what ArviZ says of the tree
    tree = package.to_arviz(rival, *state, *data, posterior=theta, log_likelihood=found, **keyed)
    np.testing.assert_array_equal(np.asarray(tree.posterior["mean"])[0], mean)
    assert tree.log_likelihood["v"].dims == ("chain", "draw", "obs")
    assert tree.posterior.attrs["normalized"] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # thirty draws, whose k-hat may be large
        name = "elpd_loo" if hasattr(az, "from_datatree") else "elpd"
        elpd = [float(getattr(loo, name)) for loo in (az.loo(tree), package.loo(found))]
    assert elpd[0] == pytest.approx(elpd[1])
    # the harmonic mean over draws, whose weights PSIS smooths: they hardly vary here
    harmonic = np.log(num) - scipy.special.logsumexp(-exact, 0)
    assert elpd[0] == pytest.approx(harmonic.sum(), abs=0.1)

    # annealed where there is no exact sum, within its errors; too noisy for LOO, and refused
    def out_of_reach(*args, **kwargs):
        raise package.energies.OutOfReach("out of reach")

    two = {name: value[:2] for name, value in theta.items()}
    real = evaluation.likelihood.Integral.over_variables
    monkeypatch.setattr(evaluation.normalizer, "log_normalizer", out_of_reach)
    monkeypatch.setattr(
        evaluation.likelihood.Integral,
        "over_variables",
        staticmethod(lambda density, x, over: out_of_reach() if "(visible)" in over else real(density, x, over)),
    )
    short = evaluation.ais
    monkeypatch.setattr(
        evaluation.likelihood, "ais", lambda *a, **k: short(*a, num_temperatures=4, num_chains=100, **k)
    )
    noisy = package.log_likelihood(rival, *state, *data, theta=two, progress_bar=False, **keyed)
    assert noisy.method == "log p̃: exact, log Z: AIS"
    error = np.asarray(noisy.standard_error)
    assert (error > 0).all()
    assert (np.abs(np.asarray(noisy.value) - exact[None, :2]) < 4 * error).all()
    coarse = noisy._replace(standard_error=0.2 + error)
    for refuse in (
        lambda: package.loo(coarse),
        lambda: package.to_arviz(rival, *state, *data, posterior=two, log_likelihood=coarse, **keyed),
    ):
        with pytest.raises(ValueError, match="LOO is refused: the log-likelihood's standard error reaches"):
            refuse()


def test_theta_that_can_not_be(host):
    x = np.random.default_rng(15).normal(size=(6, 1))

    def guide(x):
        host.p.sample("mean", host.dist.Normal(host.param("loc", np.zeros(())), 0.1))

    rival = host.rivals.PersistentVI(gaussian_mean(host), guide, host.adam(1e-2), host.kernels.Gibbs(), num_chains=4)
    marginal = host.rivals.MarginalSM(rbm(host), host.adam(1e-2), host.bism.ScoreMatching())
    package = host.bism
    if host.name == "pyro":
        data, state, keyed = (host.array(x),), (), {}
    else:
        data, keyed = (jnp.asarray(x),), {"rng_key": jax.random.key(1)}
        state = (rival.init(jax.random.key(0), *data),)
    theta = rival.posterior(*state, *data, num_draws=3, **keyed)
    found = package.log_likelihood(rival, *state, *data, theta=theta, progress_bar=False, **keyed)
    for call, message in (
        (lambda: package.free_energy(rival, *state, *data), r"no one θ: pass persistent_vi\.at\(theta\)"),
        (lambda: package.free_energy(rival.at({"mena": 0.0}), *state, *data), "theta has the sites and shapes"),
        (lambda: package.free_energy(rival.at(theta), *state, *data), "theta has the sites and shapes"),
        (
            lambda: package.log_likelihood(rival, *state, *data, log_normalizer=1.0, **keyed),
            "a log Z for every draw of θ",
        ),
        (lambda: package.log_likelihood(rival, *state, *data, method="importance", **keyed), "has not"),
        (
            lambda: package.log_likelihood(marginal, *state, *data, theta=theta, **keyed),
            "theta goes with a PersistentVI",
        ),
        (
            lambda: package.to_arviz(rival, *state, *data, log_likelihood=found, num_draws=2, **keyed),
            r"shape \(1, 3, 6\) where \(1, 2, n\)",
        ),
        (lambda: package.to_arviz(rival, *state, *data, model_samples=1, **keyed), "leave posterior_predictive"),
        (
            lambda: package.to_arviz(rival, *state, *data, posterior=theta, coords={"unit": [0]}, **keyed),
            "coords names 'unit'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_run_goes_on_from_its_state(host):
    """Minibatches, the noise fitted at the start, log Z and the random state among what is kept."""
    x = RBM.sample(np.random.default_rng(13), 40)[0]
    rival = host.rivals.NCE(rbm(host, size=10), host.adam(1e-2), num_noise=2)
    if host.name == "pyro":
        x = host.array(x)
        rival.step(x)
        state = rival.get_state()
        losses = [rival.step(x) for _ in range(3)]
        pyro.clear_param_store()
        fresh = host.rivals.NCE(rbm(host, size=10), host.adam(1e-2), num_noise=2)
        fresh.set_state(state)
        np.testing.assert_array_equal([fresh.step(x) for _ in range(3)], losses)
        with pytest.raises(ValueError, match="made by NCE, not by MarginalSM"):
            other = host.rivals.MarginalSM(rbm(host, size=10), host.adam(1e-2), host.bism.ScoreMatching())
            other.evaluate_loss(x)
            other.set_state(state)
    else:
        state, update, losses = rival.init(jax.random.key(0), x), jax.jit(rival.update), []
        for _ in range(4):
            states, (state, loss) = state, update(state, x)
            losses.append(loss)
        rest = rival.run(jax.random.key(9), 1, x, init_state=states, progress_bar=False)
        np.testing.assert_allclose(rest.losses, losses[-1:], rtol=1e-12)


def quartic(host):
    """A real latent that the energy is not quadratic in."""

    def model(x):
        w = host.param("w", np.ones(()))
        with host.p.plate("data", len(x)):
            v = host.p.sample("v", host.dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False), obs=x)
            h = host.p.sample("h", host.dist.Normal(0.0, 1.0).mask(False))
            host.p.factor("energy", -0.5 * (v**2).sum(-1) - h**4 + w * h * v.sum(-1))

    return model


def unread(host):
    def model(x):
        w = host.param("w", np.ones(()))
        with host.p.plate("data", len(x)):
            host.p.sample("v", host.dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False), obs=x)
            host.p.factor("energy", w * host.array(np.ones(len(x))))

    return model


@pytest.mark.parametrize(
    ("method", "program", "message"),
    [
        ("MarginalSM", quartic, "no closed-form integral.*BiSM or VNCE"),
        ("MarginalSM", unread, "never reads the value of visible site 'v'"),
        ("PseudoLikelihood", rbm, "Visible site 'v' is continuous"),
        ("CD", quartic, "conditional of site 'h' is not Gaussian"),
    ],
)
def test_misuse_is_an_error_that_names_the_cure(host, method, program, message):
    settings = {"MarginalSM": [host.bism.ScoreMatching()], "PseudoLikelihood": [], "CD": [host.kernels.Gibbs()]}
    rival = getattr(host.rivals, method)(program(host), host.adam(1e-2), *settings[method])
    with pytest.raises(ValueError, match=message):
        host.start(rival, np.random.default_rng(14).normal(size=(5, 2)))


@pytest.mark.parametrize("method", ["BiSM", "VNCE"])
def test_no_guide_is_an_error(host, method):
    """Not a step with latents that nothing draws; a guide without sites is one."""
    settings = {"BiSM": [host.bism.ScoreMatching()], "VNCE": []}[method]
    with pytest.raises(ValueError, match=r"guide=None is not a program.*lambda \*args: None"):
        getattr(host.bism, method)(quartic(host), None, host.adam(1e-2), *settings)
    getattr(host.bism, method)(quartic(host), lambda x: None, host.adam(1e-2), *settings)


def test_evaluation_takes_a_trained_rival(host):
    """The normaliser of an Ising model by enumeration, its visible sites found to be discrete."""
    rng = np.random.default_rng(15)
    J, b = rng.normal(size=(4, 4)), rng.normal(size=4)
    x = rng.integers(2, size=(6, 4)).astype(float)
    rival = host.rivals.PseudoLikelihood(ising(host, J + J.T, b), host.adam(1e-2))
    (x,) = host.start(rival, x)
    state = () if host.name == "pyro" else (host.state,)
    log_z = host.bism.exact_log_normalizer(rival, *state, x)
    off = (J + J.T) * (1 - np.eye(4))
    v = spins(4)
    exact = np.log(np.exp(0.5 * ((v @ off) * v).sum(-1) + v @ b).sum())
    np.testing.assert_allclose(log_z, exact, rtol=1e-10)


def test_the_posterior_of_the_parameters_goes_to_arviz(host):
    """Its draws are the guide's: mean and standard deviation within 5 standard errors."""
    pytest.importorskip("arviz")

    def model(x):
        w = host.p.sample("w", host.dist.Laplace(0.0, 1.0).expand([2]).to_event(1))
        host.p.deterministic("product", w[:, None] * w)
        with host.p.plate("data", len(x)):
            v = host.p.sample("v", host.dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False), obs=x)
            host.p.deterministic("of a row", v.sum(-1) * w.sum())
            host.p.factor("energy", (v * w - 0.5 * v**2).sum(-1))

    def guide(x):
        loc = host.param("loc", np.array([1.0, -2.0]))
        host.p.sample("w", host.dist.Normal(loc, 0.5).to_event(1))

    rival = host.rivals.PersistentVI(model, guide, host.adam(1e-2), host.kernels.Gibbs(), num_chains=3)
    (x,) = host.start(rival, np.random.default_rng(16).normal(size=(5, 2)))
    pixels = {"w": ["pixel"], "product": ["pixel", "other"]}
    settings = {"num_draws": 2000, "dims": pixels, "coords": {"pixel": ["left", "right"]}}
    if host.name == "pyro":
        package, state, keyed = pyro_bism, (), {}
    else:
        package, state, keyed = numpyro_bism, (host.state,), {"rng_key": jax.random.key(3)}
    tree = package.to_arviz(rival, *state, x, **settings, **keyed)
    w, product = tree["posterior"]["w"], tree["posterior"]["product"]
    assert list(tree["posterior"].data_vars) == ["w", "product"]
    assert product.dims == ("chain", "draw", "pixel", "other")
    np.testing.assert_allclose(product, np.einsum("cdi,cdj->cdij", w, w), rtol=1e-12)
    with pytest.raises(ValueError, match=r"theta has no draws of the guide's sites \['w'\]"):
        rival.deterministics(*state, {"u": w[0]}, x, **keyed)
    assert w.dims == ("chain", "draw", "pixel") and list(w.coords["pixel"].values) == ["left", "right"]
    draws = np.asarray(w)[0]
    np.testing.assert_allclose(draws.mean(0), [1.0, -2.0], atol=5 * 0.5 / np.sqrt(2000))
    np.testing.assert_allclose(draws.std(0), 0.5, atol=5 * 0.5 / np.sqrt(4000))
