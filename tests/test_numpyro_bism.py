"""numpyro_bism's hypergradient, losses and errors, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.example_libraries import optimizers
from numpyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from scipy import stats

from numpyro_bism import (
    Amortized,
    BiSM,
    ConcreteBernoulli,
    DenoisingScoreMatching,
    Detached,
    FisherDivergence,
    Functional,
    Implicit,
    MultiscaleDenoisingScoreMatching,
    Penalty,
    ScoreMatching,
    SlicedScoreMatching,
    Unrolled,
)
from numpyro_bism.divergences import perturbed_inner_loss
from numpyro_bism.programs.rows import draw_rows
from numpyro_bism.programs.visible import flatten
from oracles import central_difference

D, H, N = 3, 2, 7
X = np.random.default_rng(0).normal(size=(N, D))
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def normal(scale, *shape):
    return lambda key: scale * jax.random.normal(key, shape)


def flat(x):
    return numpyro.sample("x", dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)


def model(x):
    w = numpyro.param("w", normal(0.3, D, H))
    b = numpyro.param("b", normal(0.1, D))
    s = numpyro.param("s", jnp.full(D, 0.9), constraint=dist.constraints.positive)
    with numpyro.plate("data", len(x)):
        x = flat(x)
        h = numpyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        numpyro.factor("energy", -0.5 * (((x - b) / s) ** 2).sum(-1) + ((x @ w) * h).sum(-1))


def guide(x):
    a = numpyro.param("a", normal(0.3, D, H))
    scale = numpyro.param("scale", jnp.full(H, 0.7), constraint=dist.constraints.positive)
    with numpyro.plate("data", len(x)):
        numpyro.sample("h", dist.Normal(jnp.tanh(x @ a), scale).to_event(1))


LOSSES = {
    "exact": ScoreMatching(),
    "sliced": SlicedScoreMatching(num_projections=2),
    "denoising": DenoisingScoreMatching(0.3),
    "denoising-averaged": DenoisingScoreMatching(0.3, num_particles=3, average="score"),
    "multiscale": MultiscaleDenoisingScoreMatching(0.1, 0.5, 0.2, num_particles=2),
}
INNER = {"elbo": Trace_ELBO(), "mean-field": TraceMeanField_ELBO(), "fisher": FisherDivergence()}


def prepared(bism, *args):
    """The pair, a batch, and initial unconstrained parameters on these arguments."""
    leaves, spec = flatten(args, {})
    state = bism.init(KEY, *args)
    pair = bism.pair(leaves, spec)
    return pair, pair.batch(KEY, leaves, spec), *bism._unpack(pair, state)


def check_hypergradient(bism, pair, batch, theta, phi):
    rng = np.random.default_rng(3)
    # off the first step, which in Adam is the sign of the gradient and has no derivative
    gradient = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), phi)
    begun = bism.inner_optim.update(gradient, bism.inner_optim.init(phi), 0.0)
    problem = bism._problem(pair, batch, None, None)
    whole = jax.jit(lambda theta: bism.hypergradient(KEY, problem, theta, begun, None))
    leaves, tree = jax.tree.flatten(theta)
    direction = [rng.normal(size=leaf.shape) for leaf in leaves]

    def at(t):
        return whole(jax.tree.unflatten(tree, [x + t * d for x, d in zip(leaves, direction, strict=True)]))[0]

    gradient = jax.tree.leaves(whole(theta)[1])
    ours = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
    np.testing.assert_allclose(ours, central_difference(at, 1e-3), rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "inner", "num_steps"),
    [
        *[(loss, "elbo", 3) for loss in LOSSES],
        ("denoising", "mean-field", 3),
        ("denoising", "fisher", 3),
        ("exact", "fisher", 3),
        ("exact", "elbo", 0),
        ("denoising", "elbo", 0),
    ],
)
def test_hypergradient_is_the_derivative_of_the_whole_map(loss, inner, num_steps):
    strategy = Unrolled(num_steps) if num_steps else Detached()
    optim = optax.adam(1e-2, b2=0.95)
    bism = BiSM(model, guide, optim, LOSSES[loss], inner_loss=INNER[inner], hypergradient=strategy)
    check_hypergradient(bism, *prepared(bism, X))


OPTIMS = {
    "numpyro": numpyro.optim.Adam(1e-2, b2=0.95),
    "momentum": numpyro.optim.Momentum(1e-2, 0.9),
    "optax": optax.chain(
        optax.clip_by_global_norm(1.0), optax.rmsprop(optax.exponential_decay(1e-2, 1, 0.9), eps=1e-4)
    ),
    "jax": optimizers.nesterov(1e-2, 0.9),
}


@pytest.mark.full
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("loss", LOSSES)
def test_hypergradient_in_every_combination(loss, inner):
    seen = None
    for optim in OPTIMS.values():
        for num_steps in (1, 3, 10):
            strategy = Unrolled(num_steps)
            bism = BiSM(model, guide, optim, LOSSES[loss], inner_loss=INNER[inner], hypergradient=strategy)
            if seen is None:  # the pair is the same for all
                seen = prepared(bism, X)
            check_hypergradient(bism, *seen)


def rbm(x):
    w = numpyro.param("w", normal(0.8, D, H))
    b = numpyro.param("b", normal(0.1, D))
    c = numpyro.param("c", normal(0.1, H))
    with numpyro.plate("data", len(x), dim=-2):
        x = flat(x)
        with numpyro.plate("units", H, dim=-1):
            h = numpyro.sample("h", dist.Bernoulli(0.5).mask(False))
            numpyro.factor("unit", h * ((x @ w).squeeze(-2) + c))
        numpyro.factor("quadratic", -0.5 * ((x - b) ** 2).sum(-1))


RNG = np.random.default_rng(1)
W, B, C = 0.8 * RNG.normal(size=(D, H)), 0.1 * RNG.normal(size=D), 0.1 * RNG.normal(size=H)


def posterior_guide(x):
    numpyro.param("unused", jnp.zeros(()))
    with numpyro.plate("data", len(x), dim=-2), numpyro.plate("units", H, dim=-1):
        logits = (x @ W).squeeze(-2) + C
        numpyro.sample("h", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})


@pytest.mark.parametrize("average", ["loss", "score"])
@pytest.mark.parametrize("loss", [ScoreMatching, SlicedScoreMatching, DenoisingScoreMatching])
def test_summed_out_score_is_the_marginal_score(loss, average):
    """With q the posterior the loss equals that of the free energy's exact score."""
    settings = {"sigma": 0.3} if loss is DenoisingScoreMatching else {}
    bism = BiSM(
        rbm,
        posterior_guide,
        numpyro.optim.Adam(1e-3),
        loss(average=average, **settings),
        inner_loss=TraceEnum_ELBO(max_plate_nesting=2),
        hypergradient=Detached(),
    )
    pair, batch, *_ = prepared(bism, X[:, None])

    def score(v):
        return B - v + jax.nn.sigmoid(v @ W + C) @ W.T

    ours = pair.outer_loss(KEY, {"w": W, "b": B, "c": C, "unused": jnp.zeros(())}, batch, bism.loss)
    noise = bism.loss.draw(jax.random.split(KEY, 3)[0], batch.v)
    np.testing.assert_allclose(ours, bism.loss(score, batch.v, noise).mean(), rtol=1e-10)


def test_summed_out_inner_loss_is_the_kl_by_enumeration():
    """TraceEnum_ELBO at v: -E_q[log p̃ - log q], summed over all 2^H configurations, a mean over the batch."""
    bism = BiSM(rbm, posterior_guide, numpyro.optim.Adam(1e-3), ScoreMatching(average="score"),
                inner_loss=TraceEnum_ELBO(max_plate_nesting=2))  # fmt: skip
    pair, batch, *_ = prepared(bism, X[:, None])
    params = {"w": W + 0.3, "b": B, "c": C, "unused": jnp.zeros(())}
    ours = perturbed_inner_loss(KEY, bism.loss, bism._inner, pair, params, batch)
    logits, field = X @ W + C, X @ (W + 0.3) + C
    q = jax.nn.sigmoid(logits)
    log_q = q * jax.nn.log_sigmoid(logits) + (1 - q) * jax.nn.log_sigmoid(-logits)
    expected = (log_q - q * field).sum(-1) + 0.5 * ((X - B) ** 2).sum(-1)
    np.testing.assert_allclose(ours, expected.mean(), rtol=1e-10)


def test_a_state_that_was_saved_continues_bit_for_bit():
    def fresh():
        return BiSM(model, guide, numpyro.optim.Adam(1e-2), DenoisingScoreMatching(0.3))

    bism = fresh()
    state = bism.run(KEY, 3, X, progress_bar=False).state
    saved = [np.asarray(x) for x in jax.tree.leaves(state._replace(rng_key=jax.random.key_data(state.rng_key)))]
    expected = bism.run(KEY, 3, X, progress_bar=False, init_state=state).losses
    tree = jax.tree.structure(state)
    restored = jax.tree.unflatten(tree, [jnp.asarray(x) for x in saved])
    restored = restored._replace(rng_key=jax.random.wrap_key_data(restored.rng_key))
    later = fresh().run(jax.random.key(99), 3, X, progress_bar=False, init_state=restored).losses
    np.testing.assert_array_equal(later, expected)


def test_run_is_update_step_by_step_with_or_without_progress_bar():
    bism = BiSM(model, guide, numpyro.optim.Adam(1e-2), DenoisingScoreMatching(0.3))
    silent = bism.run(KEY, 25, X, progress_bar=False)
    shown = bism.run(KEY, 25, X, progress_bar=True)
    np.testing.assert_array_equal(silent.losses, shown.losses)
    state, update = bism.init(KEY, X), jax.jit(bism.update)
    losses = []
    for _ in range(25):
        state, loss = update(state, X)
        losses.append(loss)
    np.testing.assert_allclose(losses, silent.losses, rtol=1e-12)
    for name, value in bism.get_params(state).items():
        np.testing.assert_allclose(value, silent.params[name], rtol=1e-12)
    assert update._cache_size() == 1  # never traced again


def test_the_progress_bar_compiles_nothing(monkeypatch):
    """It returns from the loop after as many steps as half a second takes, another number every time."""
    bism = BiSM(model, guide, numpyro.optim.Adam(1e-2), DenoisingScoreMatching(0.3))
    state = bism.init(KEY, X)
    bism.run(KEY, 60, X, init_state=state)
    compilations, clock = [], iter(np.cumsum(np.random.default_rng(0).uniform(0.1, 1.0, 200)))
    monkeypatch.setattr("numpyro_bism.training.trainer.time.perf_counter", lambda: next(clock))
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compilations.append(name) if "backend_compile" in name else None
    )
    try:
        bism.run(KEY, 60, X, init_state=state)
    finally:
        jax.monitoring.clear_event_listeners()
    assert next(clock) > 5  # it did return many times
    assert not compilations


def test_nan_is_named_before_anything_moves():
    bad = X.copy()
    bad[2, 1] = np.nan
    bism = BiSM(model, guide, numpyro.optim.Adam(1e-2), DenoisingScoreMatching(0.3))
    for call in (
        lambda: bism.init(KEY, bad),
        lambda: bism.run(KEY, 10, bad),
        lambda: bism.update(bism.init(KEY, X), bad),
        lambda: bism.evaluate(bism.init(KEY, X), bad),
    ):
        with pytest.raises(ValueError, match=r"args\[0\].*\(2, 1\)"):
            call()


def test_stable_update_leaves_all_but_the_key():
    bism = BiSM(model, guide, numpyro.optim.Adam(1e-2), DenoisingScoreMatching(0.3))
    update = jax.jit(bism.stable_update)
    state, loss = update(bism.init(KEY, X), X)
    assert np.isfinite(loss)
    kept, loss = update(state, np.full_like(X, np.nan))
    assert np.isnan(loss)
    assert not np.array_equal(jax.random.key_data(kept.rng_key), jax.random.key_data(state.rng_key))
    for a, b in zip(jax.tree.leaves(kept._replace(rng_key=0)), jax.tree.leaves(state._replace(rng_key=0)), strict=True):
        np.testing.assert_array_equal(a, b)
    after, loss = update(kept, X)
    assert np.isfinite(loss)
    assert int(after.optim_state[0]) == 2


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(Amortized(), marks=pytest.mark.full),
        Penalty(optax.linear_schedule(1.0, 100.0, 10)),
        Functional(num_steps=1),
    ],
)
def test_a_strategys_state_is_part_of_the_state(strategy, tmp_path):
    """Saved as plain arrays, taken up by a new BiSM: the run goes on bit for bit."""

    def fresh():
        return BiSM(model, guide, numpyro.optim.Adam(1e-2), DenoisingScoreMatching(0.3), hypergradient=strategy)

    bism = fresh()
    half = bism.run(KEY, 3, X, progress_bar=False).state
    whole = bism.run(None, 3, X, progress_bar=False, init_state=half)
    moved = [np.abs(x).max() > 0 for x in jax.tree.leaves(half.hypergradient_state)]
    assert (
        any(moved) if isinstance(strategy, Functional) else all(moved)
    )  # a parameter that no latent meets has no term
    leaves, tree = jax.tree.flatten(half._replace(rng_key=jax.random.key_data(half.rng_key)))
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz") as archive:
        loaded = jax.tree.unflatten(tree, [jnp.asarray(archive[name]) for name in archive.files])
    loaded = loaded._replace(rng_key=jax.random.wrap_key_data(loaded.rng_key))
    rest = fresh().run(None, 3, X, progress_bar=False, init_state=loaded)
    np.testing.assert_array_equal(rest.losses, whole.losses)
    for a, b in zip(jax.tree.leaves(rest.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_state_of_another_strategy_is_refused():
    def fresh(strategy):
        return BiSM(model, guide, numpyro.optim.Adam(1e-2), DenoisingScoreMatching(0.3), hypergradient=strategy)

    for saved, loaded in ((Unrolled(5), Amortized()), (Unrolled(5), Penalty()), (Functional(), Amortized())):
        state, bism = fresh(saved).init(KEY, X), fresh(loaded)
        with pytest.raises(ValueError, match=f"another hypergradient than {type(loaded).__name__}"):
            bism.update(state, X)


@pytest.mark.parametrize(
    "strategy",
    [
        Unrolled(5),
        Amortized(),
        *[pytest.param(s, marks=pytest.mark.full) for s in (Implicit(), Penalty(), Functional())],
    ],
)
def test_a_diverging_inner_loop_ends_in_an_error_that_names_the_cure(strategy):
    bism = BiSM(
        model,
        guide,
        numpyro.optim.SGD(1e-3),
        DenoisingScoreMatching(0.3),
        inner_optim=numpyro.optim.SGD(1e3),
        hypergradient=strategy,
    )
    with pytest.raises(FloatingPointError, match="inner learning rate"):
        bism.run(KEY, 200, X, progress_bar=False)
    losses = bism.run(KEY, 200, X, progress_bar=False, stable_update=True).losses
    assert np.isnan(losses).any()


def never_reads(x):
    w = numpyro.param("w", jnp.ones(H))
    with numpyro.plate("data", len(x)):
        flat(x)
        h = numpyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        numpyro.factor("energy", (h * w).sum(-1))


def unobserved(x):
    w = numpyro.param("w", jnp.ones(H))
    with numpyro.plate("data", len(x)):
        h = numpyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        numpyro.factor("energy", (h * w).sum(-1) + x.sum(-1))


def energy_of(change, fn=None):
    fn = dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False) if fn is None else fn

    def run(x):
        w = numpyro.param("w", jnp.ones(D))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", fn, obs=change(x))
            numpyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
            numpyro.factor("energy", (x * w).sum(-1))

    return run


def no_parameters(x):
    with numpyro.plate("data", len(x)):
        x = flat(x)
        h = numpyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        numpyro.factor("energy", -(x**2).sum(-1) - h.sum(-1))


def guide_of(make, name="h"):
    def run(x):
        a = numpyro.param("a", jnp.ones(H))
        with numpyro.plate("data", len(x)):
            fn = make(a + 0.01 * x[:, :1] ** 2)
            numpyro.sample(name, fn if fn.event_dim else fn.to_event(1))

    return run


def shared(x):
    w = numpyro.param("w", jnp.ones((D, H)))
    with numpyro.plate("data", len(x)):
        numpyro.sample("h", dist.Normal(x @ w, 1.0).to_event(1))


def bits(x):
    w = numpyro.param("w", jnp.ones((D, H)))
    with numpyro.plate("data", len(x)):
        x = flat(x)
        h = numpyro.sample("h", dist.Bernoulli(0.5).expand([H]).to_event(1).mask(False))
        numpyro.factor("energy", ((x @ w) * h).sum(-1) - (x**2).sum(-1))


def enumerated_event(x):
    a = numpyro.param("a", jnp.ones(H))
    with numpyro.plate("data", len(x)):
        numpyro.sample("h", dist.Bernoulli(logits=x[:, :H] + a).to_event(1), infer={"enumerate": "parallel"})


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (never_reads, guide, "'x' is zero everywhere"),
        (unobserved, guide, "no visible site"),
        (energy_of(lambda x: 2 * x), guide, "is none of the arguments"),
        (energy_of(jnp.abs, dist.Exponential(1.0).expand([D]).to_event(1)), guide, "of bounded support"),
        (
            energy_of(lambda x: (x > 0).astype(int), dist.Bernoulli(0.5).expand([D]).to_event(1)),
            guide,
            "floating-point",
        ),
        (no_parameters, guide, "no parameter to train"),
        (energy_of(lambda x: x[0]), guide, r"shape \(3,\) where the model declares \(7, 3\)"),
        (
            energy_of(lambda x: x, dist.Normal(0.0, 1.0).expand([D + 1]).to_event(1).mask(False)),
            guide,
            r"shape \(7, 3\) where the model declares \(7, 4\)",
        ),
        (
            energy_of(lambda x: 1.0 * (x > 0), dist.Bernoulli(0.5).expand([D]).to_event(1)),
            guide,
            r"\(BernoulliProbs\) is discrete.*noise added",
        ),
        (model, shared, "'w' is used by both"),
        (model, guide_of(lambda a: dist.Normal(a, 1.0), "z"), "'h' is missing from the guide"),
        (model, guide_of(lambda a: dist.Poisson(a)), "can't be reparameterised"),
        (model, guide_of(lambda a: dist.Gamma(a, 1.0)), "can't be differentiated twice"),
        (model, guide_of(lambda a: dist.Beta(a, 1.0)), "can't be differentiated twice"),
        (model, guide_of(lambda a: dist.Dirichlet(a)), "can't be differentiated twice"),
        (model, guide_of(lambda a: dist.RelaxedBernoulli(jnp.array(0.1), logits=a)), "temperature below 1"),
        (model, guide_of(lambda a: ConcreteBernoulli(0.1, a)), "relaxed guide site needs"),
        (bits, enumerated_event, "Use average='score'"),
    ],
)
def test_misuse_names_the_site_and_the_cure(model, guide, message):
    bism = BiSM(model, guide, numpyro.optim.Adam(1e-3), DenoisingScoreMatching(0.3))
    with pytest.raises(ValueError, match=message):
        bism.init(KEY, X)


def test_fixed_gamma_draws_and_detached_are_welcome():
    fixed = guide_of(lambda a: dist.Gamma(jnp.full(a.shape, 2.0), 1.0 + a))
    BiSM(model, fixed, numpyro.optim.Adam(1e-3), DenoisingScoreMatching(0.3, average="score")).init(KEY, X)
    free = guide_of(lambda a: dist.Gamma(a, 1.0))
    loss = DenoisingScoreMatching(0.3, average="score")
    BiSM(model, free, numpyro.optim.Adam(1e-3), loss, hypergradient=Detached()).init(KEY, X)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": Trace_ELBO()}, "is not an outer loss"),
        ({"optim": numpyro.optim.Minimize()}, "Minimize"),
        ({"optim": 1e-3}, "should be an optimiser"),
        ({"inner_loss": DenoisingScoreMatching(0.1)}, "is not an ELBO"),
        ({"num_inner_steps": -1}, "must not be negative"),
        ({"hypergradient": Amortized}, "is not a strategy"),
        ({"hypergradient": "amortized"}, "is not a strategy"),
        ({"visible": "x"}, r"visible=\['x'\]"),
    ],
)
def test_bad_settings_are_refused_at_construction(settings, message):
    settings = {"optim": numpyro.optim.Adam(1e-3), "loss": DenoisingScoreMatching(0.3), **settings}
    with pytest.raises(ValueError, match=message):
        BiSM(model, guide, settings.pop("optim"), settings.pop("loss"), **settings)


@pytest.mark.parametrize("inner", [Trace_ELBO(), FisherDivergence()])
def test_enumerated_sites_need_the_enumerating_elbo(inner):
    bism = BiSM(rbm, posterior_guide, numpyro.optim.Adam(1e-3), DenoisingScoreMatching(0.3), inner_loss=inner)
    with pytest.raises(ValueError, match="TraceEnum_ELBO"):
        bism.init(KEY, X[:, None])


def test_fisher_divergence_needs_draws():
    points = guide_of(lambda a: dist.Delta(a, event_dim=1))
    bism = BiSM(model, points, numpyro.optim.Adam(1e-3), DenoisingScoreMatching(0.3), inner_loss=FisherDivergence())
    with pytest.raises(ValueError, match=r"gives points \(Delta\)"):
        bism.init(KEY, X)


@pytest.mark.parametrize(
    ("pick", "reads_rows"),
    [
        (lambda x, rows: x[rows], True),
        (lambda x, rows: numpyro.subsample(x, event_dim=1), True),
        # what wants more of the data than the rows is given the whole
        (lambda x, rows: jnp.take(x, rows, axis=0), False),
        (lambda x, rows: x.at[rows].get(), False),
    ],
)
def test_subsampled_rows_give_the_score_of_those_rows(pick, reads_rows):
    """A plate's N/B is no part of the score: the loss on picked rows is that of those rows alone."""
    full = np.random.default_rng(2).normal(size=(40, D))

    def subsampled(x):
        b = numpyro.param("b", 0.1 * jnp.ones(D))
        with numpyro.plate("data", 40, subsample_size=N) as rows:
            x = flat(pick(x, rows))
            numpyro.factor("energy", -0.5 * ((x - b) ** 2).sum(-1))

    bism = BiSM(subsampled, lambda x: None, numpyro.optim.Adam(1e-3), ScoreMatching())
    pair, batch, theta, phi = prepared(bism, full)
    assert pair.reads_rows == reads_rows
    ours = pair.outer_loss(KEY, pair.params(theta, phi, None), batch, bism.loss)
    rows = full[batch.indices["data"]]
    assert len(np.unique(batch.indices["data"])) == N
    np.testing.assert_allclose(ours, (0.5 * ((rows - 0.1) ** 2).sum(-1) - D).mean())


def test_get_params_before_any_run_says_so():
    bism = BiSM(model, guide, numpyro.optim.Adam(1e-3), DenoisingScoreMatching(0.3))
    state = bism.init(KEY, X)
    fresh = BiSM(model, guide, numpyro.optim.Adam(1e-3), DenoisingScoreMatching(0.3))
    with pytest.raises(ValueError, match="constraints are not known"):
        fresh.get_params(state)
    fresh.evaluate(state, X)
    for name, value in bism.get_params(state).items():
        np.testing.assert_array_equal(value, fresh.get_params(state)[name])


@pytest.mark.parametrize("sizes", [(5, 3), (17, 2)])  # shuffled; drawn again where twice
def test_rows_are_drawn_without_replacement_and_every_set_is_as_likely(sizes):
    num = 20_000
    draws = jax.vmap(lambda key: draw_rows(key, *sizes))(jax.random.split(KEY, num))
    sets, counts = np.unique(draws, axis=0, return_counts=True)
    total = math.comb(*sizes)
    assert len(sets) == total
    assert all(len(set(s)) == sizes[1] for s in sets.tolist())
    assert np.square(counts - num / total).sum() / (num / total) < stats.chi2.ppf(0.999, total - 1)


def subsampling(size):
    def model(x):
        b = numpyro.param("b", 0.1 * jnp.ones(D))
        with numpyro.plate("data", len(x), subsample_size=min(size, len(x))) as rows:
            x = flat(x[rows])
            h = numpyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
            numpyro.factor("energy", -0.5 * ((x - b) ** 2).sum(-1) + (x[:, :H] * h).sum(-1))

    def guide(x):
        shift = numpyro.param("shift", jnp.zeros(H))
        with numpyro.plate("data", len(x), subsample_size=min(size, len(x))) as rows:
            numpyro.sample("h", dist.Normal(jnp.tanh(x[rows][:, :H] + shift), 0.5).to_event(1))

    return model, guide


@pytest.mark.parametrize("programs", [(model, guide), subsampling(4), subsampling(12)])
def test_other_sizes_are_described_without_a_second_analysis(programs, monkeypatch):
    """What is found on arguments of another size is what a fresh analysis finds there."""
    bism, other = (BiSM(*programs, numpyro.optim.Adam(1e-2), DenoisingScoreMatching(0.3)) for _ in range(2))
    more = np.random.default_rng(1).normal(size=(2 * N, D))
    bism.init(KEY, X)
    for x in (more, more[:5]):
        leaves, spec = flatten((x,), {})
        other.init(KEY, x)
        pair, fresh = bism.pair(leaves, spec), other.pair(leaves, spec)
        for name in ("sites", "subsampled", "num_data", "num_plate_dims", "enumerated", "sampled", "relaxed_sites"):
            assert getattr(pair, name) == getattr(fresh, name)
    if programs[0] is model:  # the rest leave and enter subsampling, which takes a new look
        monkeypatch.setattr(bism, "_analyse", None)
        bism.pair(*flatten((more[:3],), {}))


def test_optimisers_that_search_along_a_line_are_refused():
    bism = BiSM(model, guide, numpyro.optim.Adam(1e-2), DenoisingScoreMatching(0.3), inner_optim=optax.lbfgs())
    with pytest.raises(ValueError, match="inner_optim can't be stepped"):
        bism.init(KEY, X)


def test_fused_steps_are_the_same_steps(monkeypatch):
    """Three steps in bodies of two, and one by one."""
    settings = {"num_inner_steps": 3, "hypergradient": Unrolled(3)}

    def losses():
        bism = BiSM(model, guide, numpyro.optim.Adam(1e-2), DenoisingScoreMatching(0.3), **settings)
        return bism.run(KEY, 3, X, progress_bar=False).losses

    alone = losses()
    monkeypatch.setattr("numpyro_bism.compiled.steps.FUSED_STEPS", 2)
    np.testing.assert_allclose(losses(), alone, rtol=1e-10)
