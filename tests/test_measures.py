"""Measures that may not mislead: k-hat, tests of fit, the noise that a density was learnt with, draws of the energy."""

import arviz as az
import numpy as np
import pytest

import numpyro_bism
import pyro_bism

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
