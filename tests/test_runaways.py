"""A run that runs away says so once, in words with a cure, and an ordinary one says nothing; both packages."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions
import pyro
import pyro.distributions
import pytest
import torch

import numpyro_bism
import pyro_bism
from numpyro_bism.training import runaways as jax_runaways
from pyro_bism.training import runaways as torch_runaways

RNG = np.random.default_rng(0)
T = 1500
NOISE = np.exp(RNG.normal(size=T))


def series(loss, hypergradient, curvature=math.inf):
    return np.stack([np.broadcast_to(np.asarray(x, float), T) for x in (loss, hypergradient, curvature)], -1)


STEPS = np.arange(T)
SPIKES = np.where(STEPS % 97 == 50, 1e6, 1.0)
ORDINARY = {
    "noisy, crosses zero": series(3 - 5 * STEPS / T + RNG.normal(size=T), NOISE),
    "converges, without noise": series(-2 + 5 * 0.98**STEPS, 1e-12 + 0.97**STEPS),
    "to its noise": series(-2 + np.exp(-STEPS / 50), np.maximum(1e3 * 0.95**STEPS, 1e-2) * NOISE),
    "spikes": series(NOISE * SPIKES, NOISE * SPIKES, NOISE),
    "from a symmetric start": series(-4 / (1 + 4e6 * 0.98**STEPS), 1 / (1 + 1e6 * 0.98**STEPS)),
    "a guide that narrows as it should": series(-2.0, NOISE, np.minimum(1 + STEPS, 1e3)),
    "a bad start": series(1e6 * 0.9**STEPS - 2, 1e6 * 0.9**STEPS + NOISE),
    "a flat start": series(np.where(STEPS < 15, 0.0, 0.1 * NOISE), np.where(STEPS < 15, 0.01, NOISE)),
}
GROWING = np.exp(np.clip(STEPS - 700, 0, 400) / 20)
RUNAWAYS = {
    "upwards": series(-2 + 0.01 * GROWING, NOISE * GROWING),
    "downwards": series(-2 - 0.01 * GROWING, NOISE * GROWING),
    "after a bad start": series(1e3 * 0.9**STEPS + 0.01 * GROWING, 1e3 * 0.9**STEPS + NOISE * GROWING),
    "the loss first": series(2 * GROWING, NOISE * GROWING**0.5),
    "a guide that collapses": series(2.0, NOISE * GROWING**0.2, GROWING**0.9),
}
VERDICTS = {"the loss first": 1, "a guide that collapses": 3}


# of the rivals: a loss that crosses zero, of ten discrete numbers a row; and one in nats that is never below zero
CONTRAST, IN_NATS = ({"warm_up": 0, "is_contrast": yes, "scale": scale} for yes, scale in ((True, 10.0), (False, 1.0)))
GAP = RNG.normal(size=T) * np.minimum(STEPS, 100)
OF_RIVALS = {
    "chains with noise, from zero parameters": (CONTRAST, series(0.01 * GAP, 0.1 + NOISE / (1 + STEPS)), 0),
    "Adam at a gradient of nothing": (IN_NATS, series(5.0, np.where(STEPS < 700, 0.95**STEPS, 1e-3) + 1e-7), 0),
    "a step that overshoots": (IN_NATS, series(np.where(STEPS == 1, 1e4, 3.0), np.where(STEPS == 1, 1e4, NOISE)), 0),
    "worse than at the start for a while": (IN_NATS, series(3 + 300 * 0.9**STEPS * (STEPS > 0), NOISE), 0),
    "chains that leave": (CONTRAST, series(-GAP, NOISE * np.exp(STEPS / 60)), 2),
    "chains that freeze, their gradient bounded": (CONTRAST, series(3 * GAP, 1 + 3 * NOISE / (1 + NOISE)), 4),
    "a classifier that is sure and wrong": (IN_NATS, series(np.minimum(1.0 + STEPS, 50), 0.5), 4),
    "from the first steps on": (IN_NATS, series(4.0 ** np.minimum(STEPS, 400), 2.0 ** np.minimum(STEPS, 400)), 1),
}


def in_torch(numbers, settings=None):
    watch = torch_runaways.begin()
    for row in numbers:
        watch = torch_runaways.watched(watch, *map(float, row), **(settings or {}))
    return watch


@pytest.fixture(scope="module")
def in_jax():
    with jax.enable_x64(True):

        @functools.partial(jax.jit, static_argnames=("warm_up", "is_contrast", "scale"))
        def last(numbers, **settings):
            def step(watch, row):
                return jax_runaways.watched(watch, *row, **settings), None

            return jax.lax.scan(step, jax_runaways.begin(), numbers)[0]

        yield lambda numbers, settings=None: last(jnp.asarray(numbers), **(settings or {}))


@pytest.mark.parametrize("name", [*ORDINARY, *RUNAWAYS])
def test_the_verdict_on_ordinary_runs_and_on_runaways(name, in_jax):
    numbers = {**ORDINARY, **RUNAWAYS}[name]
    ours, theirs = in_torch(numbers), in_jax(numbers)
    assert ours.verdict == int(theirs.verdict) == (0 if name in ORDINARY else VERDICTS.get(name, 2))
    same(ours, theirs)


def same(ours, theirs):
    for a, b in zip(ours[1:5], theirs[1:5], strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OF_RIVALS)
def test_the_verdict_on_rivals(name, in_jax):
    settings, numbers, verdict = OF_RIVALS[name]
    ours, theirs = in_torch(numbers, settings), in_jax(numbers, settings)
    assert ours.verdict == int(theirs.verdict) == verdict
    same(ours, theirs)


def test_a_verdict_reads_as_a_sentence_with_its_cure():
    for module in (torch_runaways, jax_runaways):
        assert module.in_words(0) == "no runaway seen"
        for code, what in ((1, "the outer loss"), (2, "the hypergradient"), (3, "the inner loss's curvature")):
            assert f"training has run away: {what} grew more than" in module.in_words(code)
            assert "Exact()" in module.in_words(code)


D, H, N = 3, 2, 100
LOADINGS = RNG.normal(size=(D, H))
V = RNG.multivariate_normal(np.zeros(D), LOADINGS @ LOADINGS.T + 0.5 * np.eye(D), size=N)


def linear_gaussian(x):
    w = numpyro.param("w", lambda key: 0.3 * jax.random.normal(key, (D, H)))
    s = numpyro.param("s", jnp.ones(D), constraint=numpyro.distributions.constraints.positive)
    with numpyro.plate("data", len(x)):
        h = numpyro.sample("h", numpyro.distributions.Normal(0.0, 1.0).expand([H]).to_event(1))
        numpyro.sample("x", numpyro.distributions.Normal(h @ w.T, s).to_event(1), obs=x)


def its_posterior(x):
    a = numpyro.param("a", jnp.full((D, H), 0.1))
    scale = numpyro.param("scale", 0.7 * jnp.eye(H), constraint=numpyro.distributions.constraints.lower_cholesky)
    with numpyro.plate("data", len(x)):
        numpyro.sample("h", numpyro.distributions.MultivariateNormal(x @ a, scale_tril=scale))


def test_score_matching_that_has_run_away_says_so_once():
    """Adam at 5e-3 and Amortized(), though the guide holds the posterior at every θ."""
    optim, loss, strategy = numpyro.optim.Adam(5e-3), numpyro_bism.ScoreMatching(), numpyro_bism.Amortized()
    bism = numpyro_bism.BiSM(linear_gaussian, its_posterior, optim, loss, hypergradient=strategy)
    x = jnp.asarray(V, jnp.float32)
    with pytest.warns(UserWarning, match="the hypergradient grew more than 1,000-fold.*Exact") as caught:
        state = bism.run(jax.random.key(0), 600, x, progress_bar=False).state
    assert len(caught) == 1 and caught[0].filename == __file__
    assert int(state.info.verdict) == 2 and "training has run away" in str(state.info)
    # a resumed run knows it already
    again = bism.run(jax.random.key(0), 600, x, init_state=state, progress_bar=False).state
    assert int(again.watch.num_steps) == 1200 and int(again.info.verdict) == 2
    (verdict,) = numpyro_bism.evaluation.verdicts.judge_training(int(again.info.verdict))
    assert verdict.passed is False and verdict.text == state.info.in_words


def saddle(p, dist, array):
    """A guide that stands between two wells: G has negative curvature there, and a kept linear system explodes."""

    def model(x):
        a = p.param("a", array(0.5))
        with p.plate("data", len(x)):
            x = p.sample("x", dist.Normal(0.0, 1.0).expand([1]).to_event(1).mask(False), obs=x)
            h = p.sample("h", dist.Normal(0.0, 1.0).expand([1]).to_event(1).mask(False))
            p.factor("energy", (a * x * h - 0.5 * x**2 - (h**2 - 1) ** 2).sum(-1))

    def guide(x):
        m = p.param("m", array(0.0))
        with p.plate("data", len(x)):
            p.sample("h", dist.Normal(m + 0.1 * x, 0.1).to_event(1))

    return model, guide


FIXED = {"num_inner_steps": 0}


@pytest.mark.parametrize("jit", [False, True])
def test_a_guide_on_the_wrong_side_is_seen_before_long(jit, tmp_path):
    def begun():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        programs = saddle(pyro, pyro.distributions, torch.tensor)
        strategy = pyro_bism.Amortized(step_size=0.1)
        optim, loss = pyro.optim.Adam({"lr": 1e-3}), pyro_bism.SlicedScoreMatching()
        return pyro_bism.BiSM(*programs, optim, loss, hypergradient=strategy, jit=jit, **FIXED)

    x = torch.as_tensor(V[:10, :1], dtype=torch.float32)
    bism = begun()
    with pytest.warns(UserWarning, match="the hypergradient grew more than 1,000-fold.*Exact") as caught:
        for _ in range(90):
            bism.step(x)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert bism.info.verdict == 2 and "training has run away" in str(bism.info)
    if jit:
        return
    bism.save(tmp_path / "state")
    other = begun()
    other.step(x)
    assert other.info.verdict == 0 and "no runaway seen" in str(other.info)
    other.load(tmp_path / "state")
    assert other._watch == bism._watch
    other.step(x)  # nothing is said again
    assert other._watch.num_steps == 91 and other.info.verdict == 2


def test_the_same_of_update_and_stable_update_where_they_are_not_compiled():
    with jax.enable_x64(False):  # a fixture of this module may hold it
        check_update_and_stable_update()


def check_update_and_stable_update():
    programs = saddle(numpyro, numpyro.distributions, jnp.asarray)
    strategy, loss = numpyro_bism.Amortized(step_size=0.1), numpyro_bism.SlicedScoreMatching()
    bism = numpyro_bism.BiSM(*programs, numpyro.optim.Adam(1e-3), loss, hypergradient=strategy, **FIXED)
    x = jnp.asarray(V[:10, :1], jnp.float32)
    update, state = jax.jit(bism.update), bism.init(jax.random.key(0), x)
    for number in range(1, 300):  # noqa: B007
        state, _ = update(state, x)
        if int(state.info.verdict):
            break
    assert int(state.info.verdict) == 2
    unheard = state._replace(watch=state.watch._replace(verdict=jnp.zeros((), int)))
    for step in (bism.update, bism.stable_update):
        with pytest.warns(UserWarning, match=f"By step {number + 1} training has run away"):
            step(unheard, x)


def gauss(p, dist, array):
    """A normal density of unknown mean, its normaliser left out."""

    def model(x):
        m = p.param("m", array(0.0))
        with p.plate("data", len(x)):
            x = p.sample("x", dist.Normal(0.0, 1.0).expand([1]).to_event(1).mask(False), obs=x)
            p.factor("energy", -0.5 * ((x - m) ** 2).sum(-1))

    return model


def spins(p, dist, array):
    """Three bits, their couplings."""

    def model(x):
        J = p.param("J", array([[0.0, 0.0, 0.0]] * 3))
        with p.plate("data", len(x)):
            x = p.sample("x", dist.Bernoulli(0.5).expand([3]).to_event(1).mask(False), obs=x)
            p.factor("energy", ((x @ (J * array([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0] * 3]))) * x).sum(-1))

    return model


BITS = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
# the model, its data, a rate, steps, the verdict, and what is said
WILD = {
    "CD": (gauss, V[:, :1], 10.0, 15, 2, "the gradient grew more than 1,000-fold.*more num_steps, so that the chains"),
    "NCE": (gauss, V[:, :1], 10.0, 12, 1, "the loss grew more than 1,000-fold.*noise nearer to the data"),
    "PseudoLikelihood": (spins, BITS, 200.0, 60, 4, "more than ten times its first value.*weight decay"),
}


@pytest.mark.parametrize("name", WILD)
def test_a_rival_that_has_run_away_says_so_once(name, tmp_path):
    program, x, rate, steps, verdict, words = WILD[name]
    x = torch.as_tensor(x, dtype=torch.float32)

    def begun(rate):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model, kernel = program(pyro, pyro.distributions, torch.tensor), [pyro_bism.Gibbs()] * (name == "CD")
        return getattr(pyro_bism, name)(model, pyro.optim.SGD({"lr": rate}), *kernel)

    tame = begun(rate / 100)
    for _ in range(60):
        tame.step(x)
    assert tame.info.verdict == 0 and "no runaway seen" in str(tame.info)
    rival = begun(rate)
    with pytest.warns(UserWarning, match=words) as caught:
        for _ in range(steps):
            rival.step(x)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert rival.info.verdict == verdict and "training has run away" in str(rival.info)
    (training,) = pyro_bism.evaluation.verdicts.judge_training(rival._watch.verdict, rival.words)
    assert training.passed is False and "optim" in training.text and "Exact" not in training.text
    rival.save(tmp_path / "state")
    other = begun(rate)
    other.step(x)
    other.load(tmp_path / "state")
    assert other._watch == rival._watch
    other.step(x)  # nothing is said again
    assert other._watch.num_steps == steps + 1 and other.info.verdict == verdict


@pytest.mark.parametrize(
    "name", [n if n == "PseudoLikelihood" else pytest.param(n, marks=pytest.mark.full) for n in WILD]
)
def test_the_same_of_a_rival_in_numpyro(name):
    program, x, rate, steps, verdict, words = WILD[name]
    x = jnp.asarray(x, jnp.float32)
    model, kernel = program(numpyro, numpyro.distributions, jnp.array), [numpyro_bism.Gibbs()] * (name == "CD")
    rival = getattr(numpyro_bism, name)(model, numpyro.optim.SGD(rate), *kernel)
    with jax.enable_x64(False):  # a fixture of this module may hold it
        with pytest.warns(UserWarning, match=words) as caught:
            state = rival.run(jax.random.key(0), steps, x, progress_bar=False).state
        assert len(caught) == 1 and caught[0].filename == __file__
        assert int(state.info.verdict) == verdict and "training has run away" in str(state.info)
        if verdict != 4:  # the others end at infinity
            return
        again = rival.run(jax.random.key(0), steps, x, init_state=state, progress_bar=False).state  # it knows already
        assert int(again.watch.num_steps) == 2 * steps and int(again.info.verdict) == verdict
