"""The oracles themselves, against quadrature, SciPy, simulation and finite differences."""

import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import integrate, stats

from oracles import (
    GaussianBernoulliRBM,
    GaussianGuide,
    LinearGaussian,
    Moments,
    configurations,
    dsm_optimum,
)

SIGMA = 0.3
COVARIANCES = [("kl", False), ("kl", True), ("fisher", False), ("fisher", True)]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def model(rng):
    return LinearGaussian.random(rng, 3, 2)


@pytest.fixture
def guide(rng):
    return random_guide(rng, 3, 2)


def random_guide(rng, d, k, diagonal=False):
    x = rng.normal(size=(k, k))
    cov = x @ x.T + np.eye(k)
    return GaussianGuide(rng.normal(size=(k, d)), rng.normal(size=k), np.diag(np.diag(cov)) if diagonal else cov)


def fields(x):
    return x._asdict() if isinstance(x, tuple) else {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}


def replaced(x, name, value):
    return x._replace(**{name: value}) if isinstance(x, tuple) else dataclasses.replace(x, **{name: value})


def finite_difference(f, x, name, step=1e-5):
    """Central differences of f in one field of a model or guide, entry by entry."""
    value = np.asarray(fields(x)[name], dtype=float)
    out = np.zeros_like(value)
    for i in np.ndindex(value.shape):
        e = np.zeros_like(value)
        e[i] = step
        out[i] = (f(replaced(x, name, value + e)) - f(replaced(x, name, value - e))) / (2 * step)
    return out


def assert_gradient(f, x, gradient, rtol=1e-7):
    for name, value in fields(gradient).items():
        expected = finite_difference(f, x, name)
        assert_allclose(value, expected, rtol=rtol, atol=1e-8, err_msg=name)


def symmetric_guide(f):
    """f of a guide whose S is perturbed entry by entry: seen through its symmetric part."""
    return lambda g: f(g._replace(S=0.5 * (g.S + g.S.T)))


def quadrature(f, dims, width=12.0):
    """∫ f over [-width, width]^dims, by the trapezoid rule (spectrally accurate here)."""
    axis = np.linspace(-width, width, 241)
    grid = np.stack(np.meshgrid(*[axis] * dims, indexing="ij"), -1).reshape(-1, dims)
    return f(grid).sum() * (axis[1] - axis[0]) ** dims


def gauss_hermite(dims, order=4):
    """Nodes and weights exact for polynomials to degree 2·order - 1 under N(0, I)."""
    x, w = np.polynomial.hermite_e.hermegauss(order)
    nodes = np.stack(np.meshgrid(*[x] * dims, indexing="ij"), -1).reshape(-1, dims)
    weights = np.stack(np.meshgrid(*[w / w.sum()] * dims, indexing="ij"), -1).reshape(-1, dims)
    return nodes, weights.prod(-1)


# Linear-Gaussian


def test_joint_is_the_exponential_of_the_energy(model, rng):
    v, h = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    joint = stats.multivariate_normal(model.joint_mean, np.linalg.inv(model.joint_precision))
    expected = joint.logpdf(np.hstack([v, h]))
    assert_allclose(-model.energy(v, h) - model.log_normalizer, expected, rtol=1e-12)


def test_log_normalizer_by_quadrature(rng):
    small = LinearGaussian.random(rng, 1, 1)
    z = quadrature(lambda x: np.exp(-small.energy(x[:, :1], x[:, 1:])), 2, width=20.0)
    assert_allclose(small.log_normalizer, np.log(z), rtol=1e-10)


def test_free_energy_by_quadrature(model, rng):
    v = rng.normal(size=3)
    z = quadrature(lambda h: np.exp(-model.energy(np.broadcast_to(v, (len(h), 3)), h)), 2, 20.0)
    assert_allclose(model.free_energy(v[None])[0], -np.log(z), rtol=1e-10)


def test_marginal_is_the_joints(model, rng):
    v = rng.normal(size=(5, 3))
    cov = np.linalg.inv(model.joint_precision)[:3, :3]
    assert_allclose(model.cov, cov, rtol=1e-12)
    assert_allclose(model.mean, model.joint_mean[:3], rtol=1e-12)
    expected = stats.multivariate_normal(model.joint_mean[:3], cov).logpdf(v)
    assert_allclose(model.log_prob(v), expected, rtol=1e-12)


def test_score_is_the_slope_of_log_prob(model, rng):
    v = rng.normal(size=(1, 3))
    step = 1e-5 * np.eye(3)
    central = (model.log_prob(v + step) - model.log_prob(v - step)) / 2e-5
    assert_allclose(model.score(v)[0], central, rtol=1e-9, atol=1e-9)


def test_posterior_by_bayes(model, rng):
    v, h = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    expected = -model.energy(v, h) + model.free_energy(v)
    assert_allclose(model.posterior.log_prob(h, v), expected, rtol=1e-11)


def test_draws_have_the_joints_moments(model, rng):
    v, h = model.sample(rng, 200_000)
    draws = np.hstack([v, h])
    cov = np.linalg.inv(model.joint_precision)
    error = np.sqrt(np.diag(cov) / len(v))
    assert np.all(np.abs(draws.mean(0) - model.joint_mean) < 5 * error)
    spread = np.sqrt((cov**2 + np.outer(np.diag(cov), np.diag(cov))) / len(v))
    assert np.all(np.abs(np.cov(draws.T) - cov) < 5 * spread)


def test_divergences_by_gauss_hermite(model, guide, rng):
    v = rng.normal(size=3)
    e, weight = gauss_hermite(2)
    h = guide.mean(v[None]) + e @ np.linalg.cholesky(guide.S).T
    vs = np.broadcast_to(v, (len(h), 3))
    log_ratio = guide.log_prob(h, vs) + model.energy(vs, h)
    assert_allclose(model.negative_elbo(guide, v[None])[0], weight @ log_ratio, rtol=1e-11)
    kl = weight @ (guide.log_prob(h, vs) - model.posterior.log_prob(h, vs))
    assert_allclose(model.kl(guide, v[None])[0], kl, rtol=1e-11)
    slope = np.zeros_like(h)
    for j, step in enumerate(1e-5 * np.eye(2)):
        up = guide.log_prob(h + step, vs) + model.energy(vs, h + step)
        slope[:, j] = (up - guide.log_prob(h - step, vs) - model.energy(vs, h - step)) / 2e-5
    fisher = 0.5 * weight @ (slope**2).sum(-1)
    assert_allclose(model.fisher(guide, v[None])[0], fisher, rtol=1e-8)


def test_expected_divergences_are_means_over_data(model, guide, rng):
    v = rng.normal(size=(20, 3))
    moments = Moments.of(v)
    assert_allclose(model.expected_kl(guide, moments), model.kl(guide, v).mean(), rtol=1e-12)
    assert_allclose(model.expected_fisher(guide, moments), model.fisher(guide, v).mean(), rtol=1e-12)


@pytest.mark.parametrize("divergence, diagonal", COVARIANCES)
def test_optimal_guide_minimises_the_inner_loss(model, rng, divergence, diagonal):
    """The gradient vanishes and every finite step away is worse."""
    moments = Moments.of(rng.normal(size=(20, 3)))
    expected = model.expected_kl if divergence == "kl" else model.expected_fisher
    best = model.optimal_guide(divergence, diagonal)
    loss = symmetric_guide(lambda g: expected(g, moments))
    gradient = {name: finite_difference(loss, best, name) for name in fields(best)}
    assert_allclose(gradient["M"], 0, atol=1e-8)
    assert_allclose(gradient["m"], 0, atol=1e-8)
    assert_allclose(np.diag(gradient["S"]) if diagonal else gradient["S"], 0, atol=1e-8)
    for scale in (0.01, 0.1, 1.0):
        other = random_guide(rng, 3, 2, diagonal)
        step = [x + scale * (y - x) for x, y in zip(best, other, strict=True)]
        assert loss(GaussianGuide(*step)) > loss(best)
    if not diagonal:
        assert_allclose(loss(best), 0, atol=1e-12)


@pytest.mark.parametrize("divergence, diagonal", COVARIANCES)
def test_implicit_derivative_of_the_guide(model, rng, divergence, diagonal):
    change = LinearGaussian.random(rng, 3, 2)
    step = 1e-5

    def fitted(t):
        moved = {f: x + t * fields(change)[f] for f, x in fields(model).items()}
        return LinearGaussian(**moved).optimal_guide(divergence, diagonal)

    tangent = model.optimal_guide_tangent(change, divergence, diagonal)
    for value, up, down in zip(tangent, fitted(step), fitted(-step), strict=True):
        assert_allclose(value, (up - down) / (2 * step), rtol=1e-7, atol=1e-9)
    cotangent = random_guide(rng, 3, 2, diagonal)
    back = fields(model.pull_back(cotangent, divergence, diagonal))
    along = sum((back[f] * x).sum() for f, x in fields(change).items())
    forward = sum((x * y).sum() for x, y in zip(cotangent, tangent, strict=True))
    assert_allclose(along, forward, rtol=1e-12)


def test_dsm_gradient_for_given_noise(model, rng):
    v, noise = rng.normal(size=(2, 20, 3))
    gradient = model.dsm_gradient(v, noise, SIGMA)
    assert_gradient(lambda m: m.dsm_loss(v, noise, SIGMA).mean(), model, gradient)


def test_expected_dsm_loss_by_gauss_hermite(model, rng):
    v = rng.normal(size=(7, 3))
    noise, weight = gauss_hermite(3)
    per_datum = [weight @ model.dsm_loss(x[None], noise, SIGMA) for x in v]
    assert_allclose(model.expected_dsm_loss(Moments.of(v), SIGMA), np.mean(per_datum), rtol=1e-12)


def test_expected_dsm_gradient(model, rng):
    moments = Moments.of(rng.normal(size=(20, 3)))
    gradient = model.expected_dsm_gradient(moments, SIGMA)
    assert_gradient(lambda m: m.expected_dsm_loss(moments, SIGMA), model, gradient)


def test_dsm_optimum(model, rng):
    """At mean μ and covariance C + σ²I the gradient is nothing; other marginals are worse."""
    v = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 3)) + 1.0
    moments = Moments.of(v)
    best = dsm_optimum(moments, SIGMA)
    exact = model.posterior
    precision = np.linalg.inv(best.cov)
    fitted = dataclasses.replace(
        model,
        A=precision + model.W @ exact.M,
        b=precision @ best.mean - model.W @ exact.m,
    )
    assert_allclose(fitted.mean, best.mean, rtol=1e-10)
    assert_allclose(fitted.cov, best.cov, rtol=1e-10)
    for name, value in fields(fitted.expected_dsm_gradient(moments, SIGMA)).items():
        assert_allclose(value, 0, atol=1e-11, err_msg=name)
    lowest = fitted.expected_dsm_loss(moments, SIGMA)
    for scale in (1e-3, 1e-1, 1.0):
        other = dataclasses.replace(fitted, A=fitted.A + scale * np.eye(3), b=fitted.b - scale)
        assert other.expected_dsm_loss(moments, SIGMA) > lowest


def test_dsm_on_its_own_samples_recovers_the_model(model):
    """Without noise to speak of, the best Gaussian for the model's own law is the model."""
    best = dsm_optimum(model.moments, 1e-6)
    assert_allclose(best.cov, model.cov, rtol=1e-9)


def test_score_matching_loss_and_gradient(model, rng):
    v = rng.normal(size=(20, 3))
    step = 1e-5
    trace = sum((model.score(v + step * e) - model.score(v - step * e)) @ e / (2 * step) for e in np.eye(3))
    expected = 0.5 * (model.score(v) ** 2).sum(-1) + trace
    assert_allclose(model.sm_loss(v), expected, rtol=1e-8)
    assert_gradient(lambda m: m.sm_loss(v).mean(), model, model.sm_gradient(v))


def test_score_matching_is_stationary_at_the_truth(model, rng):
    v = rng.normal(size=(50, 3))
    v = (v - v.mean(0)) @ np.linalg.inv(np.linalg.cholesky(Moments.of(v).cov)).T
    v = model.mean + v @ np.linalg.cholesky(model.cov).T  # exactly the model's moments
    for name, value in fields(model.sm_gradient(v)).items():
        assert_allclose(value, 0, atol=1e-11, err_msg=name)


def test_bilevel_score(model, guide, rng):
    v, h = rng.normal(size=(1, 3)), rng.normal(size=(1, 2))
    step = 1e-5
    for i, e in enumerate(step * np.eye(3)):
        up = -model.energy(v + e, h) - guide.log_prob(h, v + e)
        down = -model.energy(v - e, h) - guide.log_prob(h, v - e)
        slope = (up - down)[0] / (2 * step)
        assert_allclose(model.bilevel_score(guide, v, h)[0, i], slope, rtol=1e-8, atol=1e-8)
    exact = model.bilevel_score(model.posterior, v, h)
    assert_allclose(exact, model.score(v), rtol=1e-11)  # whatever h


@pytest.mark.parametrize("num_averaged", [1, 2])
def test_expected_bilevel_loss_by_gauss_hermite(model, guide, rng, num_averaged):
    v = rng.normal(size=3)
    nodes, weight = gauss_hermite(3 + 2 * num_averaged, order=3)
    noise, perturbed = nodes[:, :3], v + SIGMA * nodes[:, :3]
    root = np.linalg.cholesky(guide.S).T
    draws = [nodes[:, 3 + 2 * i : 5 + 2 * i] @ root for i in range(num_averaged)]
    scores = [model.bilevel_score(guide, perturbed, guide.mean(perturbed) + e) for e in draws]
    loss = 0.5 * ((np.mean(scores, 0) + noise / SIGMA) ** 2).sum(-1)
    moments = Moments(v, np.zeros((3, 3)))
    got = model.expected_bilevel_loss(guide, moments, SIGMA, num_averaged)
    assert_allclose(got, weight @ loss, rtol=1e-11)


def test_bilevel_gradients(model, guide, rng):
    moments = Moments.of(rng.normal(size=(20, 3)))
    theta, phi = model.bilevel_gradients(guide, moments, SIGMA)
    assert_gradient(lambda m: m.expected_bilevel_loss(guide, moments, SIGMA), model, theta)
    loss = symmetric_guide(lambda g: model.expected_bilevel_loss(g, moments, SIGMA))
    assert_gradient(loss, guide, phi)


@pytest.mark.parametrize("divergence, diagonal", COVARIANCES)
def test_hypergradient(model, rng, divergence, diagonal):
    moments = Moments.of(rng.normal(size=(20, 3)))

    def loss(m):
        return m.expected_bilevel_loss(m.optimal_guide(divergence, diagonal), moments, SIGMA)

    gradient = model.hypergradient(moments, SIGMA, divergence, diagonal)
    assert_gradient(loss, model, gradient)
    if not diagonal:
        exact = fields(model.expected_dsm_gradient(moments, SIGMA))
        for name, value in fields(gradient).items():
            assert_allclose(value, exact[name], rtol=1e-9, atol=1e-10, err_msg=name)


# Gaussian-Bernoulli RBM


@pytest.fixture(params=["scalar", "vector"])
def rbm(request, rng):
    s = 0.7 if request.param == "scalar" else np.array([0.5, 0.9])
    return GaussianBernoulliRBM(rng.normal(size=(2, 5)), rng.normal(size=2), rng.normal(size=5), s)


def test_configurations():
    h = np.concatenate(list(configurations(5, chunk=7)))
    assert len(np.unique(h, axis=0)) == len(h) == 32
    assert set(h.ravel()) == {0.0, 1.0}


def test_rbm_normaliser_by_quadrature(rbm):
    def density(v):
        return np.exp(-rbm.free_energy(v))

    assert_allclose(rbm.log_normalizer, np.log(quadrature(density, 2, width=10.0)), rtol=1e-10)


def test_rbm_normaliser_by_adaptive_quadrature(rng):
    rbm = GaussianBernoulliRBM(rng.normal(size=(1, 3)), np.array([0.3]), rng.normal(size=3), 0.6)
    z, _ = integrate.quad(lambda v: np.exp(-rbm.free_energy(np.array([v]))), -12, 12, epsabs=1e-12, epsrel=1e-12)
    assert_allclose(rbm.log_normalizer, np.log(z), rtol=1e-11)


def test_rbm_normaliser_of_sixteen_units(rng):
    """Chunks add up: against the normaliser of two independent halves, each enumerated whole."""
    W = np.zeros((4, 16))
    W[:2, :8], W[2:, 8:] = rng.normal(size=(2, 2, 8))
    b, c = rng.normal(size=4), rng.normal(size=16)
    whole = GaussianBernoulliRBM(W, b, c, 0.4).log_normalizer
    halves = [
        GaussianBernoulliRBM(W[:2, :8], b[:2], c[:8], 0.4).log_normalizer,
        GaussianBernoulliRBM(W[2:, 8:], b[2:], c[8:], 0.4).log_normalizer,
    ]
    assert_allclose(whole, sum(halves), rtol=1e-12)


def test_rbm_density_sums_the_joint(rbm, rng):
    v = rng.normal(size=(4, 2))
    h = np.concatenate(list(configurations(5)))
    joint = np.exp([-rbm.energy(np.broadcast_to(x, (32, 2)), h) for x in v])
    assert_allclose(np.exp(-rbm.free_energy(v)), joint.sum(-1), rtol=1e-12)
    posterior = joint / joint.sum(-1, keepdims=True)
    assert_allclose(rbm.posterior(v), posterior @ h, rtol=1e-11)
    assert_allclose(rbm.log_prob(v), np.log(joint.sum(-1)) - rbm.log_normalizer, rtol=1e-11)


def test_rbm_weight_and_conditional(rbm, rng):
    """The weight of h is the v-integral of the joint; the conditional has the mean b + s²Wh."""
    for h in rng.integers(0, 2, size=(3, 5)).astype(float):
        offset = rbm.conditional_mean(h)

        def joint(v, h=h, offset=offset):
            return np.exp(-rbm.energy(v + offset, np.broadcast_to(h, (len(v), 5))))

        z = quadrature(joint, 2)
        assert_allclose(rbm.log_weight(h), np.log(z), rtol=1e-10)
        for i in range(2):
            shift = quadrature(lambda v, i=i, joint=joint: v[:, i] * joint(v), 2) / z
            assert_allclose(shift, 0, atol=1e-10)


def test_rbm_score(rbm, rng):
    v = rng.normal(size=(4, 2))
    step = 1e-5
    for i, e in enumerate(step * np.eye(2)):
        slope = (rbm.log_prob(v + e) - rbm.log_prob(v - e)) / (2 * step)
        assert_allclose(rbm.score(v)[:, i], slope, rtol=1e-8, atol=1e-8)


def test_rbm_dsm_gradient(rbm, rng):
    v, noise = rng.normal(size=(2, 20, 2))
    gradient = rbm.dsm_gradient(v, noise, SIGMA)
    assert np.shape(gradient.s) == np.shape(rbm.s)
    assert_gradient(lambda m: m.dsm_loss(v, noise, SIGMA).mean(), rbm, gradient)


def test_rbm_draws_match_the_density(rbm, rng):
    """E[score] = 0 under the model, and hidden frequencies match the enumerated marginal."""
    v, h = rbm.sample(rng, 100_000)
    score = rbm.score(v)
    assert np.all(np.abs(score.mean(0)) < 5 * score.std(0) / np.sqrt(len(v)))
    gap = h - rbm.posterior(v)
    assert np.all(np.abs(gap.mean(0)) < 5 * gap.std(0) / np.sqrt(len(v)))
