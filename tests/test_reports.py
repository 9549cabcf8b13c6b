"""diagnose, calibration, loo, and chains in to_arviz: a good model passes, a bad one is told what is bad.

The tests see a package only through its ``Backend``: NumPy arrays in, what ArviZ reads out.
"""

import types
import warnings

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpyro.infer import MCMC as NumpyroMCMC
from numpyro.infer import NUTS as NumpyroNUTS
from pyro.infer import MCMC, NUTS
from pyro.infer.mcmc.api import _UnarySampler

import numpyro_bism
import numpyro_bism.evaluation
import pyro_bism
import pyro_bism.evaluation
from oracles import GaussianGuide, LinearGaussian

matplotlib.use("Agg")
rng = np.random.default_rng(3)
D, K, N = 2, 2, 40
LINEAR = LinearGaussian.random(rng, D, K)
X, _ = LINEAR.sample(rng, N)
# half of the spread that the posterior has
NARROW = GaussianGuide(LINEAR.posterior.M, LINEAR.posterior.m, 0.04 * LINEAR.posterior.S)
QUICK = {"num_samples": 100, "num_warmup": 50, "num_points": 10, "progress_bar": False}


class PyroBackend:
    package, evaluation = pyro_bism, pyro_bism.evaluation

    def __enter__(self):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        torch.set_default_dtype(torch.float64)
        return self

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)

    def bism(self, log_joint, guide, **options):
        """:param log_joint: log p̃(v, h) of rows.
        :param guide: from v to the guide's mean and scale (a covariance if it is a matrix).
        """

        def model(x):
            shift = pyro.param("shift", torch.zeros(()))
            with pyro.plate("data", len(x)):
                v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
                h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([K]).to_event(1).mask(False))
                pyro.factor("energy", log_joint(types.SimpleNamespace(array=torch.as_tensor), v, h) + 0.0 * shift)

        def q(x):
            mean, cov = guide(types.SimpleNamespace(array=torch.as_tensor), x)
            bias = pyro.param("bias", torch.zeros(()))
            with pyro.plate("data", len(x)):
                pyro.sample("h", dist.MultivariateNormal(mean + bias, cov))

        loss = pyro_bism.DenoisingScoreMatching(sigma=0.3)
        return pyro_bism.BiSM(model, q, pyro.optim.Adam({"lr": 1e-2}), loss)

    def call(self, function, bism, x, *args, **options):
        return function(bism, torch.as_tensor(x), *args, **options)

    def nuts(self, bism, x, num_samples=40):
        kernel = pyro_bism.with_statistics(NUTS(pyro_bism.as_model(bism, torch.as_tensor(x), sites=["h"])))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "num_chains=2 is more than available_cpu")
            mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=30, num_chains=2, disable_progbar=True)
        # one after the other: each process would import everything
        mcmc.sampler = _UnarySampler(kernel, num_samples, 30, 2, True)
        mcmc.run()
        return mcmc


class NumpyroBackend:
    package, evaluation = numpyro_bism, numpyro_bism.evaluation

    def __enter__(self):
        self.context = jax.enable_x64(True)
        self.context.__enter__()
        self.states = {}
        return self

    def __exit__(self, *error):
        self.context.__exit__(*error)

    def bism(self, log_joint, guide, **options):
        def model(x):
            shift = numpyro.param("shift", 0.0)
            with numpyro.plate("data", len(x)):
                v = numpyro.sample("v", ndist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
                h = numpyro.sample("h", ndist.Normal(0.0, 1.0).expand([K]).to_event(1).mask(False))
                numpyro.factor("energy", log_joint(types.SimpleNamespace(array=jnp.asarray), v, h) + 0.0 * shift)

        def q(x):
            mean, cov = guide(types.SimpleNamespace(array=jnp.asarray), x)
            bias = numpyro.param("bias", 0.0)
            with numpyro.plate("data", len(x)):
                numpyro.sample("h", ndist.MultivariateNormal(mean + bias, cov))

        loss = numpyro_bism.DenoisingScoreMatching(sigma=0.3)
        return numpyro_bism.BiSM(model, q, numpyro.optim.Adam(1e-2), loss)

    def call(self, function, bism, x, *args, **options):
        x = jnp.asarray(x)
        if id(bism) not in self.states:
            self.states[id(bism)] = bism, bism.init(jax.random.key(0), x)
        return function(bism, self.states[id(bism)][1], x, *args, rng_key=jax.random.key(1), **options)

    def nuts(self, bism, x, num_samples=40):
        kernel = numpyro_bism.with_statistics(NumpyroNUTS(self.call(numpyro_bism.as_model, bism, x, sites=["h"])))
        options = {"num_chains": 2, "chain_method": "vectorized", "progress_bar": False}
        mcmc = NumpyroMCMC(kernel, num_samples=num_samples, num_warmup=100, **options)
        mcmc.run(jax.random.key(0))
        return mcmc


def linear(guide):
    def log_joint(f, v, h):
        A, B, W, b, c = (f.array(x) for x in (LINEAR.A, LINEAR.B, LINEAR.W, LINEAR.b, LINEAR.c))
        quadratic = 0.5 * ((v @ A) * v).sum(-1) + 0.5 * ((h @ B) * h).sum(-1)
        return ((v @ W) * h).sum(-1) + v @ b + h @ c - quadratic

    def q(f, x):
        M, m, S = (f.array(a) for a in guide)
        return x @ M.T + m, S

    return log_joint, q


def wells():
    """Two wells in every variable, 4 apart and 16 nats deep; the guide is in one of those of h."""

    def log_joint(f, v, h):
        return -(((v**2 - 4) ** 2).sum(-1) + ((h**2 - 4) ** 2).sum(-1))

    return log_joint, lambda f, x: (0.01 * x + 2.0, 0.03 * f.array(np.eye(K)))


# compiling takes its time
SLOW_IN_NUMPYRO = pytest.mark.parametrize(
    "good",
    [PyroBackend, pytest.param(NumpyroBackend, marks=pytest.mark.full)],
    indirect=True,
    ids=["pyro", "numpyro"],
)


@pytest.fixture(scope="module", params=[PyroBackend, NumpyroBackend], ids=["pyro", "numpyro"])
def good(request):
    """A backend, a model whose guide is the posterior, and what diagnose says of it."""
    with request.param() as backend:
        bism = backend.bism(*linear(LINEAR.posterior))
        yield backend, bism, backend.call(backend.package.diagnose, bism, X, **QUICK)


def test_a_good_model_passes(good):
    _, _, found = good
    assert {v.subject: v.passed for v in found.verdicts} == {
        "guide": True,
        "posterior chains": True,
        "model chains": True,
        "normaliser": True,
        "log-likelihood": None,
        "fit": True,
        "Fisher divergence": None,
    }
    assert found.log_normalizer == pytest.approx(LINEAR.log_normalizer, abs=1e-9)
    assert np.allclose(np.asarray(found.log_likelihood.value), LINEAR.log_prob(X))
    assert np.abs(found.guide.kl).max() < 1e-9 and np.abs(found.guide.gap).max() < 1e-9
    assert str(found).count("\n") == 6 and "trusted" in str(found)
    figure = found.plot()
    assert len(figure.axes) == 6
    matplotlib.pyplot.close(figure)


def test_what_it_carries_goes_through_arviz(good, tmp_path):
    _, _, found = good
    groups = found.data.children if hasattr(found.data, "children") else found.data.groups()  # ArviZ 1.x, 0.23
    assert {"posterior", "sample_stats", "observed_data", "model_samples"} <= set(groups)
    # all chains, those from data and those from noise
    assert list(found.data.model_samples["v"].dims) == ["chain", "draw", "v_dim_0"]
    np.testing.assert_array_equal(found.data.model_samples["v"], found.chain_visible)
    assert found.data.model_samples.sizes["chain"] == 8
    # the ten points by their rows
    rows = np.linspace(0, N - 1, 10).round()
    np.testing.assert_array_equal(found.data.observed_data["obs"], rows)
    np.testing.assert_array_equal(found.data.observed_data["v"], X[rows.astype(int)])
    summary = az.summary(found.data, group="model_samples", round_to="none")
    assert (summary["r_hat"] < 1.1).all()
    cov = np.linalg.inv(LINEAR.joint_precision)
    error = np.sqrt(np.diag(cov) / summary["ess_bulk"].to_numpy())  # v and h, in this order
    mean = summary["mean"].reindex(["v[0]", "v[1]", "h[0]", "h[1]"])
    assert (np.abs(mean - LINEAR.joint_mean) < 5 * error + 1e-3).all()
    found.data.to_netcdf(str(tmp_path / "found.nc"))


# ArviZ 0.23 itself calls what matplotlib 3.11 wants to be called otherwise
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")
def test_chains_fill_every_group(good):
    backend, bism, _ = good
    x, run, package = X[:4], backend.package.run_chains, backend.package
    quick = {"kernel": package.Gibbs(), "num_samples": 30, "num_warmup": 5, "num_chains": 2, "progress_bar": False}
    posterior = backend.call(run, bism, x, sites=["h"], **quick)
    predictive = backend.call(run, bism, x, sites=["v"], **quick)
    samples = backend.call(run, bism, x, **quick)
    groups = {"posterior": posterior, "posterior_predictive": predictive, "model_samples": samples}
    data = backend.call(package.to_arviz, bism, x, dims={"h": ["unit"], "v": ["pixel"]}, **groups)
    assert data.posterior["h"].shape == (2, 30, 4, K) and data.posterior["h"].dims[-1] == "unit"
    assert data.posterior.attrs["sampling_method"] == "gibbs"
    assert data.posterior_predictive["v"].dims == ("chain", "draw", "obs", "pixel")
    assert data.model_samples["h"].dims == ("chain", "draw", "unit")
    h, energy = np.asarray(data.posterior["h"]), np.asarray(data.sample_stats["model_energy"])
    expected = LINEAR.energy(np.broadcast_to(x, (2, 30, 4, D)).reshape(-1, D), h.reshape(-1, K))
    assert np.allclose(energy.ravel(), expected)
    assert np.allclose(data.sample_stats["lp"], -energy.sum(-1))
    assert "pareto_k" not in data.sample_stats and (np.asarray(data.sample_stats["acceptance_rate"]) == 1).all()
    if hasattr(az, "plot_ppc"):
        assert az.plot_ppc(data, num_pp_samples=5, random_seed=0) is not None
    else:  # ArviZ 1.x
        assert az.plot_ppc_dist(data, num_samples=5) is not None
    matplotlib.pyplot.close("all")
    with pytest.raises(ValueError, match=r"posterior takes chains at the data: run_chains\(\.\.\., sites="):
        backend.call(package.to_arviz, bism, x, posterior=samples)
    with pytest.raises(ValueError, match="model_samples takes chains of all of"):
        backend.call(package.to_arviz, bism, x, model_samples=posterior)
    with pytest.raises(ValueError, match="Were they made at other data"):
        backend.call(package.to_arviz, bism, X[:3], posterior=posterior)
    with pytest.raises(ValueError, match="an MCMC that has run; got float"):
        backend.call(package.to_arviz, bism, x, posterior=1.0)


# ArviZ 0.23 with matplotlib 3.11, as above
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")
@SLOW_IN_NUMPYRO
def test_nuts_of_the_host_through_diagnose_and_arviz(good):
    """The guide beside NUTS on the same rows, in the report and its figure; then what ArviZ says of the chains."""
    backend, bism, _ = good
    x, mcmc = X[:4], backend.nuts(bism, X[:4], 300)
    found = backend.call(backend.package.diagnose, bism, x, posterior=mcmc, **QUICK)
    assert found["guide"].passed, str(found)
    assert found["posterior chains"].passed
    h = np.asarray(mcmc.get_samples(group_by_chain=True)["h"])
    np.testing.assert_array_equal(found.chain_latents["h"], h)
    assert np.abs(found.guide.kl).max() < 1e-9
    beside = found.plot().axes[1].lines[0]
    np.testing.assert_allclose(beside.get_xdata(), h.mean((0, 1)).ravel())
    np.testing.assert_allclose(beside.get_ydata(), found.guide_latents["h"].mean(0).ravel())
    matplotlib.pyplot.close("all")

    data = backend.call(backend.package.to_arviz, bism, x, posterior=mcmc)
    assert data.posterior["h"].shape == (2, 300, 4, K)
    assert data.posterior.attrs["sampling_method"] == "nuts"
    expected = LINEAR.energy(np.tile(x, (600, 1)), h.reshape(-1, K))
    assert np.allclose(np.asarray(data.sample_stats["model_energy"]).ravel(), expected)
    stats = {name: np.asarray(data.sample_stats[name]) for name in ("diverging", "acceptance_rate", "step_size")}
    assert {x.shape for x in stats.values()} == {(2, 300)}
    # by its definition, (Betancourt 2016)
    energy = np.asarray(data.sample_stats["energy"])
    bfmi = (np.diff(energy) ** 2).mean(-1) / energy.var(-1)
    seen = az.bfmi(data)
    np.testing.assert_allclose(np.asarray(seen["energy"] if hasattr(seen, "keys") else seen), bfmi, rtol=0.02)
    assert (bfmi > 0.3).all()
    assert (np.asarray(az.rhat(data)["h"]) < 1.1).all()
    assert (np.asarray(az.ess(data)["h"]) > 50).all()
    for plot in ("plot_energy", "plot_rank", "plot_trace", "plot_forest"):
        assert getattr(az, plot)(data) is not None
        matplotlib.pyplot.close("all")


@SLOW_IN_NUMPYRO
def test_calibration_tells_the_posterior_from_a_narrow_guide(good):
    backend, bism, _ = good
    options = {"num_points": 100, "num_warmup": 10, "progress_bar": False}
    right = backend.call(backend.package.calibration, bism, X, **options)
    assert right.pit["h"].shape == (100, K) and right.p_values["h"] > 0.01
    wrong = backend.call(backend.package.calibration, backend.bism(*linear(NARROW)), X, **options)
    assert wrong.p_values["h"] < 1e-3


@SLOW_IN_NUMPYRO
def test_either_test_of_fit_rejects(good, monkeypatch):
    """Chains that are not where the data are tell it, whatever the score says; each at half of the level."""
    backend, bism, _ = good
    verdicts = backend.package.evaluation.verdicts
    options = {**QUICK, "num_points": 2, "dims": {"v": ["pixel"]}, "coords": {"obs": ["a", "b"]}}

    def fit(stein, x):
        monkeypatch.setattr(verdicts, "kernel_stein_discrepancy", lambda *a, **k: FitTest(0.0, stein))
        return backend.call(backend.package.diagnose, bism, x, **options)

    FitTest = backend.evaluation.FitTest
    found = fit(0.5, X + 1.0)
    assert found["fit"].passed is False
    assert "rejected: kernel Stein discrepancy 0, p = 0.500; maximum mean" in found["fit"].text
    assert found.data.model_samples["v"].dims == ("chain", "draw", "pixel")
    assert list(found.data.posterior["obs"].values) == ["a", "b"]
    assert fit(0.004, X)["fit"].passed is False
    assert fit(0.006, X)["fit"].passed is True


@pytest.mark.parametrize("kind", [PyroBackend, NumpyroBackend], ids=["pyro", "numpyro"])
def test_a_bad_model_is_told_what_is_bad(kind):
    """A guide in one of two modes, chains that stay in their wells, an AIS run of two steps from far away."""
    with kind() as backend:
        bism = backend.bism(*wells())
        ais = {"num_temperatures": 2, "num_chains": 20, "base": (8.0, 1.0), "progress_bar": False}
        x = 2 * rng.choice([-1.0, 1.0], size=(12, D)) + 0.1 * rng.normal(size=(12, D))
        found = backend.call(
            backend.package.diagnose, bism, x, kernel=backend.package.Langevin(0.1), ais_options=ais, **QUICK
        )
    assert found["guide"].passed is False and "leaves out a part of the posterior" in found["guide"].text
    assert found["posterior chains"].passed is False and "not mixed" in found["posterior chains"].text
    assert found["model chains"].passed is False and "not mixed" in found["model chains"].text
    assert found["normaliser"].passed is False and "too short" in found["normaliser"].text
    # the guide knows one of four wells, and most chains are in another
    assert (found.guide.kl > 1).mean() > 0.5


@SLOW_IN_NUMPYRO
def test_a_narrow_guide_is_not_trusted_for_its_weights(good):
    backend, _, _ = good
    bism = backend.bism(*linear(NARROW))
    found = backend.call(backend.package.diagnose, bism, X[:10], **QUICK)
    assert found["guide"].passed is False and "can't be mended by weighting" in found["guide"].text


@pytest.mark.parametrize("package", [pyro_bism, numpyro_bism])
def test_loo_is_arvizs_or_refused(package):
    Estimate = __import__(f"{package.__name__}.evaluation", fromlist=["Estimate"]).Estimate
    value = -0.05 * rng.normal(size=(2, 100, 8)) ** 2
    found = package.loo(Estimate(value, np.full(8, 0.01), "exact"))
    groups = {"posterior": {"theta": value.mean(-1)}, "log_likelihood": {"v": value}}
    theirs = az.loo(az.from_dict(**groups) if hasattr(az, "from_datatree") else az.from_dict(groups))
    name = "elpd_loo" if hasattr(az, "from_datatree") else "elpd"
    assert float(getattr(found, name)) == pytest.approx(float(getattr(theirs, name)))
    with pytest.raises(ValueError, match=r"refused: the log-likelihood's standard error reaches 0\.2 nat"):
        package.loo(Estimate(value, np.full(8, 0.2), "AIS"))
    with pytest.raises(ValueError, match="this θ is one point"):
        package.loo(Estimate(value[0, 0], np.zeros(8), "exact"))
