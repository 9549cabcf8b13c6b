"""Measures that may not mislead: k-hat, tests of fit, the noise that a density was learnt with, draws of the energy."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import optax
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

import numpyro_bism
import pyro_bism
from oracles import LinearGaussian

PACKAGES = pytest.mark.parametrize("package", [pyro_bism, numpyro_bism], ids=["pyro", "numpyro"])


# k-hat: never perfect where the weights are not


def effective(log_weight):
    w = np.exp(log_weight - log_weight.max())
    return w.sum() ** 2 / (w**2).sum()


def clusters(num, top, rest):
    x = np.full(num, rest)
    x[: len(top)] = top
    return x


RNG = np.random.default_rng(5)
MISLEADING = {
    "three ties": clusters(1000, [0.0] * 3, -30.0),
    "three ties and one half": clusters(1000, [0.0] * 3 + [np.log(0.5)], -30.0),
    "an atom of ten": clusters(1000, [0.0] * 10, -9.0),
    "constant tail": clusters(1000, [0.0] * 200, -60.0),
    "seven draws that the model allows": clusters(1000, 0.01 * RNG.normal(size=7), -np.inf),
    "ties on steps": clusters(1000, np.repeat([0.0, -0.01, -0.02, -0.03, -0.04, -0.05], 3), -20.0),
    "few draws, a cluster of them": clusters(25, 0.1 * RNG.normal(size=5), -50.0),
    "a cluster beside all others": clusters(400, 0.7 * RNG.normal(size=26), -72.0),
    "float32 of a large energy": (1e7 + clusters(1000, [4.0] * 3, 0.0)).astype("float32"),
}


@PACKAGES
@pytest.mark.parametrize("name", MISLEADING)
def test_khat_is_bad_where_few_draws_count(package, name):
    x = MISLEADING[name]
    m, num = effective(x.astype(float)), len(x)
    k = float(package.psis_khat(x))
    if m < 5:
        assert k == np.inf
    elif m < num / 10:
        assert k == pytest.approx(1 - np.log(m) / (2 * np.log(num)))
        assert k > 0.65
    else:
        assert 0.5 < k < 0.7


@PACKAGES
def test_khat_of_the_issue(package):
    """An effective sample size of 3.5 of 1,000 read as -inf."""
    x = clusters(1000, [0.0, 0.0, 0.0, np.log(0.55)], -40.0)
    assert effective(x) == pytest.approx(3.8, abs=0.3)
    assert package.psis_khat(x) == np.inf


@PACKAGES
def test_khat_is_perfect_where_the_weights_are(package):
    assert package.psis_khat(np.full(1000, -3.0)) == -np.inf
    assert package.psis_khat(np.where(np.arange(1000) < 400, 0.0, -0.2)) == -np.inf  # two values much the same
    with pytest.raises(ValueError, match=r"NaN or \+inf"):
        package.psis_khat(np.where(np.arange(1000) < 1, np.inf, 0.0))


@PACKAGES
def test_khat_of_ordinary_weights_is_arvizs(package):
    """Normal and Pareto log weights, and weights of a bound; light and heavy."""
    rng = np.random.default_rng(6)
    normal = np.array([0.3, 1.0, 2.0, 3.0, 5.0])[:, None] * rng.normal(size=(5, 1000))
    pareto = np.array([0.2, 0.5, 0.7, 1.0])[:, None] * rng.exponential(size=(4, 1000))
    bounded = np.array([0.5, 2.0, 10.0])[:, None] * np.log(rng.uniform(size=(3, 1000)))
    x = np.concatenate([normal, pareto, bounded])
    if hasattr(az, "psislw"):
        expected = az.psislw(x)[1]
    else:
        from arviz_stats.base import array_stats

        expected = array_stats.psislw(-x, axis=-1)[1]
    np.testing.assert_allclose(package.psis_khat(x.T), expected, rtol=1e-10)


# The noise that a density was learnt with: model and data are compared with the same noise in both


class Pyro:
    package = pyro_bism

    def __enter__(self):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        torch.set_default_dtype(torch.float64)
        return self

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)

    def two_sites(self, loss):
        """v = (a, b), each N(0, 1): no latents, two visible sites, the second of shape (n, 1, 2)."""

        def model(a, b):
            shift = pyro.param("shift", torch.zeros(()))
            with pyro.plate("data", len(a)):
                a = pyro.sample("a", dist.Normal(0.0, 1.0).mask(False), obs=a)
                b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2).mask(False), obs=b)
                pyro.factor("energy", shift * a - 0.5 * a**2 - 0.5 * (b**2).sum((-1, -2)))

        return pyro_bism.MarginalSM(model, pyro.optim.Adam({"lr": 1e-2}), loss)

    def linear(self, linear, loss):
        def model(x):
            shift = pyro.param("shift", torch.zeros(()))
            A, B, W, b, c = (torch.as_tensor(a) for a in (linear.A, linear.B, linear.W, linear.b, linear.c))
            with pyro.plate("data", len(x)):
                v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([len(b)]).to_event(1).mask(False), obs=x)
                h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([len(c)]).to_event(1).mask(False))
                quadratic = 0.5 * ((v @ A) * v).sum(-1) + 0.5 * ((h @ B) * h).sum(-1)
                pyro.factor("energy", ((v @ W) * h).sum(-1) + v @ b + h @ c - quadratic + shift * v.sum(-1))

        def guide(x):
            shift = pyro.param("move", torch.zeros(()))
            with pyro.plate("data", len(x)):
                M, m, S = map(torch.as_tensor, linear.posterior)
                pyro.sample("h", dist.MultivariateNormal(shift + x @ M.T + m, S))

        return pyro_bism.BiSM(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss)

    def call(self, name, trained, *x, **options):
        return getattr(pyro_bism, name)(trained, *map(torch.as_tensor, x), **options)

    def predictive(self, trained, *x, **options):
        return self.package.Predictive(trained, **options)(*map(torch.as_tensor, x))

    def host_predictive(self, trained, x):
        return pyro.infer.Predictive(trained.model, num_samples=400)(torch.as_tensor(x))

    def two_wells(self):
        def model(x):
            shift = pyro.param("shift", torch.zeros(()))
            with pyro.plate("data", len(x)):
                v = pyro.sample("v", dist.Normal(0.0, 1.0).mask(False), obs=x)
                pyro.factor("energy", shift * v - 8 * (v**2 - 4) ** 2)

        return pyro_bism.MarginalSM(model, pyro.optim.Adam({"lr": 1e-2}), pyro_bism.ScoreMatching())

    def mmd(self, first, second, **options):
        return pyro_bism.maximum_mean_discrepancy(first, second, **options)

    def stein_test(self, v, score, num_bootstrap, seed):
        torch.manual_seed(seed)
        return pyro_bism.evaluation.fit.stein_test(v, score, num_bootstrap)


class Numpyro:
    package = numpyro_bism

    def __enter__(self):
        self.context = jax.enable_x64(True)
        self.context.__enter__()
        self.states, self.calls = {}, 0
        return self

    def __exit__(self, *error):
        self.context.__exit__(*error)

    def two_sites(self, loss):
        def model(a, b):
            shift = numpyro.param("shift", 0.0)
            with numpyro.plate("data", len(a)):
                a = numpyro.sample("a", ndist.Normal(0.0, 1.0).mask(False), obs=a)
                b = numpyro.sample("b", ndist.Normal(0.0, 1.0).expand([1, 2]).to_event(2).mask(False), obs=b)
                numpyro.factor("energy", shift * a - 0.5 * a**2 - 0.5 * (b**2).sum((-1, -2)))

        return numpyro_bism.MarginalSM(model, optax.adam(1e-2), loss)

    def linear(self, linear, loss):
        def model(x):
            shift = numpyro.param("shift", 0.0)
            A, B, W, b, c = (jnp.asarray(a) for a in (linear.A, linear.B, linear.W, linear.b, linear.c))
            with numpyro.plate("data", len(x)):
                v = numpyro.sample("v", ndist.Normal(0.0, 1.0).expand([len(b)]).to_event(1).mask(False), obs=x)
                h = numpyro.sample("h", ndist.Normal(0.0, 1.0).expand([len(c)]).to_event(1).mask(False))
                quadratic = 0.5 * ((v @ A) * v).sum(-1) + 0.5 * ((h @ B) * h).sum(-1)
                numpyro.factor("energy", ((v @ W) * h).sum(-1) + v @ b + h @ c - quadratic + shift * v.sum(-1))

        def guide(x):
            shift = numpyro.param("move", 0.0)
            with numpyro.plate("data", len(x)):
                M, m, S = map(jnp.asarray, linear.posterior)
                numpyro.sample("h", ndist.MultivariateNormal(shift + x @ M.T + m, S))

        return numpyro_bism.BiSM(model, guide, optax.adam(1e-2), loss)

    def call(self, name, trained, *x, **options):
        x = tuple(map(jnp.asarray, x))
        if id(trained) not in self.states:
            self.states[id(trained)] = trained, trained.init(jax.random.key(0), *x)
        self.calls += 1
        key = jax.random.key(self.calls)
        return getattr(numpyro_bism, name)(trained, self.states[id(trained)][1], *x, rng_key=key, **options)

    def predictive(self, trained, *x, **options):
        x = tuple(map(jnp.asarray, x))
        state = trained.init(jax.random.key(0), *x)
        return self.package.Predictive(trained, state, **options)(jax.random.key(1), *x)

    def host_predictive(self, trained, x):
        params = {"shift": 0.0}
        return numpyro.infer.Predictive(trained.model, params=params, num_samples=400)(
            jax.random.key(0), jnp.asarray(x)
        )

    def two_wells(self):
        def model(x):
            shift = numpyro.param("shift", 0.0)
            with numpyro.plate("data", len(x)):
                v = numpyro.sample("v", ndist.Normal(0.0, 1.0).mask(False), obs=x)
                numpyro.factor("energy", shift * v - 8 * (v**2 - 4) ** 2)

        return numpyro_bism.MarginalSM(model, optax.adam(1e-2), numpyro_bism.ScoreMatching())

    def mmd(self, first, second, **options):
        return numpyro_bism.maximum_mean_discrepancy(first, second, rng_key=jax.random.key(0), **options)

    def stein_test(self, v, score, num_bootstrap, seed):
        return numpyro_bism.evaluation.fit.stein_test(v, score, jax.random.key(seed), num_bootstrap)


@pytest.fixture(params=[Pyro, Numpyro], ids=["pyro", "numpyro"])
def backend(request):
    with request.param() as found:
        yield found


# Draws of the energy, where the host's Predictive draws the placeholder

PREDICTED = LinearGaussian.random(np.random.default_rng(12), 2, 2)


def test_predictive_draws_from_the_energy(backend):
    """The host's own draws h ~ N(0, 1), which only declares the support, whatever the data and the energy say."""
    x, _ = PREDICTED.sample(np.random.default_rng(13), 12)
    x = x + 3.0
    trained = backend.linear(PREDICTED, backend.package.DenoisingScoreMatching(sigma=0.3))
    posterior = PREDICTED.posterior
    h = np.asarray(backend.predictive(trained, x, num_samples=400, num_warmup=5, sites=["h"])["h"])
    assert h.shape == (400, 12, 2)
    error = np.sqrt(np.diag(posterior.S) / 400)
    assert (np.abs(h.mean(0) - posterior.mean(x)) < 5 * error).all()
    theirs = np.asarray(backend.host_predictive(trained, x)["h"])
    assert theirs.shape == h.shape and (np.abs(theirs.mean(0)) < 0.3).all()
    assert (np.abs(theirs.mean(0) - posterior.mean(x)) > 5 * error).mean() > 0.5

    found = backend.predictive(trained, x, num_samples=400, num_warmup=30, thinning=3)
    assert set(found) == {"v", "h"}
    v, h = (np.asarray(found[name]) for name in ("v", "h"))
    assert v.shape == h.shape == (400, 12, 2)
    chains = np.concatenate([v, h], -1).mean(0)  # the twelve rows are chains of their own
    error = chains.std(0, ddof=1) / np.sqrt(12)
    assert (np.abs(chains.mean(0) - PREDICTED.joint_mean) < 5 * error).all()
    cov = np.cov(np.concatenate([v, h], -1).reshape(-1, 4).T)
    np.testing.assert_allclose(cov, np.linalg.inv(PREDICTED.joint_precision), atol=0.3)

    with pytest.raises(ValueError, match=r"return_sites names 'z'; the sites are \['h', 'v'\]"):
        backend.predictive(trained, x, num_samples=1, num_warmup=0, return_sites=["z"])
    with pytest.raises(ValueError, match=r"a BiSM or a rival; got function.*infer\.Predictive"):
        backend.package.Predictive(*[trained.model, None][: 2 if backend.package is numpyro_bism else 1])


def test_an_improper_visible_site_can_not_be_drawn_by_the_hosts():
    """What docs/evaluation.md says of it: loud, where a flat one is silent."""

    def model():
        pyro.sample("v", dist.ImproperUniform(dist.constraints.real, (), (2,)))

    with pytest.raises(NotImplementedError):
        pyro.infer.Predictive(model, num_samples=2)()

    def theirs():
        numpyro.sample("v", ndist.ImproperUniform(ndist.constraints.real, (), (2,)))

    with pytest.raises(NotImplementedError):
        numpyro.infer.Predictive(theirs, num_samples=2)(jax.random.key(0))


def test_predictive_says_when_chains_have_not_mixed(backend):
    """Two wells 16 standard deviations apart: each chain stays where it started."""
    x = np.array([-2.0, 2.0, 2.0, -2.0])
    with pytest.warns(UserWarning, match="chains have not mixed, R-hat"):
        v = np.asarray(backend.predictive(backend.two_wells(), x, num_samples=100, num_warmup=20)["v"])
    assert (np.sign(v) == np.sign(x)).all()


SIGMA = 0.7
# clean data, which N(0, 1) is the noisy density of
CLEAN = np.sqrt(1 - SIGMA**2) * np.random.default_rng(8).normal(size=(400, 3))
A, B = CLEAN[:, 0], CLEAN[:, 1:].reshape(-1, 1, 2)


def test_diagnose_accepts_a_perfect_denoising_model_on_clean_data(backend):
    """It was rejected at p = 0.001: the density learnt is that of noisy data."""
    trained = backend.two_sites(backend.package.DenoisingScoreMatching(sigma=SIGMA))
    found = backend.call("diagnose", trained, A, B, num_samples=100, num_warmup=5, progress_bar=False)
    assert found["model chains"].passed and found["fit"].passed, str(found)
    assert "noise of standard deviation 0.7 added to the data" in found["fit"].text
    assert abs(float(found.fisher_divergence.value) + 1.5) < 5 * float(found.fisher_divergence.standard_error)
    # the likelihood is that of the data as they are
    log_prob = -0.5 * (CLEAN**2).sum(-1) - 1.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(np.asarray(found.log_likelihood.value), log_prob, rtol=1e-9)


def test_every_measure_of_fit_takes_the_noise(backend):
    package = backend.package
    trained = backend.two_sites(package.DenoisingScoreMatching(sigma=SIGMA))
    stein = lambda trained, **options: backend.call("kernel_stein_discrepancy", trained, A, B, **options)  # noqa: E731
    assert stein(trained).p_value > 0.02 and stein(trained, noise=SIGMA).p_value > 0.02
    assert stein(trained, noise=None).p_value < 0.005 and stein(trained, noise=0.0).p_value < 0.005
    for noise, variance in ((None, 1 - SIGMA**2), ("loss", 1.0)):
        found = backend.call("fisher_divergence", trained, A, B, noise=noise)
        assert abs(float(found.value) - 3 * (0.5 * variance - 1)) < 5 * float(found.standard_error)
        likelihood = np.asarray(backend.call("log_likelihood", trained, A, B, noise=noise).value)
        expected = -1.5 * (np.log(2 * np.pi) + variance)
        assert abs(likelihood.mean() - expected) < 5 * likelihood.std() / 20
    draws = np.random.default_rng(9).normal(size=(400, 3))
    assert backend.mmd(draws, CLEAN, num_permutations=200).p_value < 0.01
    assert backend.mmd(draws, CLEAN, num_permutations=200, noise=SIGMA).p_value > 0.02
    with pytest.raises(ValueError, match="noise must be 'loss', a standard deviation or None, got 'data'"):
        stein(trained, noise="data")
    with pytest.raises(ValueError, match=r"noise must be 'loss', a standard deviation or None, got -1\.0"):
        stein(trained, noise=-1.0)
    with pytest.raises(ValueError, match="give a function"):
        backend.call("fisher_divergence", trained, A, B, noise="loss", data_score=CLEAN)


def test_the_scale_is_the_losses(backend):
    package = backend.package
    scale = package.evaluation.noise.noise_scale
    multiscale = package.MultiscaleDenoisingScoreMatching(sigma_min=0.1, sigma_max=2.0, sigma0=0.4)
    assert scale(backend.two_sites(package.DenoisingScoreMatching(sigma=SIGMA)), "loss") == SIGMA
    assert scale(backend.two_sites(multiscale), "loss") == 0.4
    for loss in (package.ScoreMatching(), package.SlicedScoreMatching()):
        trained = backend.two_sites(loss)
        assert scale(trained, "loss") is None and scale(trained, 0.3) == 0.3 and scale(trained, None) is None
    with pytest.raises(ValueError, match="ScoreMatching has no noise of its own"):
        backend.call("denoise", trained, A, B)


def test_score_and_denoise_of_several_sites(backend):
    trained = backend.two_sites(backend.package.DenoisingScoreMatching(sigma=SIGMA))
    found = backend.call("score", trained, A, B)
    np.testing.assert_allclose(np.asarray(found["a"]), -A, rtol=1e-12)
    np.testing.assert_allclose(np.asarray(found["b"]), -B, rtol=1e-12)
    found = backend.call("denoise", trained, A, B)  # E[x | v] of x ~ N(0, 1 - σ²)
    np.testing.assert_allclose(np.asarray(found["b"]), (1 - SIGMA**2) * B, rtol=1e-12)
    np.testing.assert_allclose(np.asarray(backend.call("denoise", trained, A, B, noise=0.5)["a"]), 0.75 * A, rtol=1e-12)


def test_score_and_denoise_of_a_linear_gaussian_model(backend):
    """E[x | v] = μ + (C - σ² I) C⁻¹ (v - μ), C the covariance of noisy v."""
    linear = LinearGaussian.random(np.random.default_rng(10), 3, 2)
    sigma = 0.8 * np.sqrt(np.linalg.eigvalsh(linear.cov).min())
    v, _ = linear.sample(np.random.default_rng(11), 7)
    trained = backend.linear(linear, backend.package.DenoisingScoreMatching(sigma=sigma))
    found = np.asarray(backend.call("score", trained, v))
    assert found.shape == v.shape
    np.testing.assert_allclose(found, linear.score(v), rtol=1e-8, atol=1e-10)
    gain = (linear.cov - sigma**2 * np.eye(3)) @ np.linalg.inv(linear.cov)
    expected = linear.mean + (v - linear.mean) @ gain.T
    np.testing.assert_allclose(np.asarray(backend.call("denoise", trained, v)), expected, rtol=1e-8, atol=1e-10)


# Tests of fit: a true model is rejected as often as the level says, in few dimensions and in many


def skewed(rng, shape):
    """Gumbel draws and their score: not symmetric, so that signs at random are no exact test."""
    v = rng.gumbel(size=shape)
    return v, np.exp(-v) - 1


def stein_p_values(backend, num_rows, num_dims, num_repetitions, num_bootstrap=200):
    rng = np.random.default_rng([num_rows, num_dims])
    found = []
    for i in range(num_repetitions):
        v, score = skewed(rng, (num_rows, num_dims)) if i % 2 else (v := rng.normal(size=(num_rows, num_dims)), -v)
        found.append(backend.stein_test(v, score, num_bootstrap, seed=i).p_value)
    return np.array(found)


@pytest.mark.parametrize(("num_rows", "num_dims"), [(50, 1), (50, 200), (100, 50)])
def test_stein_test_is_calibrated(backend, num_rows, num_dims):
    """With the inverse covariance of the same rows as its metric, p ≤ 0.05 in 46 % of cases at n = 100, D = 50."""
    p = stein_p_values(backend, num_rows, num_dims, 200)
    assert abs((p <= 0.05).mean() - 0.05) < 2 * np.sqrt(0.05 * 0.95 / 200)
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01


@pytest.mark.full
def test_stein_test_is_calibrated_from_50_rows_to_1000_and_from_1_dimension_to_784(backend):
    rates = {
        (n, d): (stein_p_values(backend, n, d, 200) <= 0.05).mean()
        for n in (50, 100, 300, 1000)
        for d in (1, 10, 50, 200, 784)
    }
    errors = np.abs(np.array(list(rates.values())) - 0.05) / np.sqrt(0.05 * 0.95 / 200)
    # of twenty right ones, one in twenty is beyond two errors
    assert (errors > 2).sum() <= 2 and errors.max() < 3.5, rates
    assert abs(np.mean(list(rates.values())) - 0.05) < 2 * np.sqrt(0.05 * 0.95 / 4000), rates


def test_stein_test_has_power_in_many_dimensions_and_for_a_constant_column(backend):
    rng = np.random.default_rng(14)
    v = rng.normal(size=(300, 50))
    assert backend.stein_test(1.2 * v, -1.2 * v, 200, seed=0).p_value < 0.02  # wider than the model
    mixed = np.sqrt(0.9) * v + np.sqrt(0.1) * rng.normal(size=(300, 1))
    assert backend.stein_test(mixed, -mixed, 200, seed=0).p_value < 0.02  # its columns go together, a little
    assert backend.stein_test(v + 0.1, -(v + 0.1), 200, seed=0).p_value < 0.02
    v[:, 0] = 2.0  # a column that the rows do not move: the score says what that is worth
    score = -v
    score[:, 0] = 0.0
    assert np.isfinite(backend.stein_test(v, score, 50, seed=0).statistic)


def test_mean_discrepancy_is_calibrated_in_many_dimensions(backend):
    rng = np.random.default_rng(15)
    p = [
        float(backend.mmd(rng.normal(size=(30, 300)), rng.normal(size=(40, 300)), num_permutations=99).p_value)
        for _ in range(100)
    ]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
