"""Rows are rows: what couples examples is refused, and evaluation takes all rows given; both packages."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions
import pyro
import pyro.distributions
import pytest
import torch
from flax import linen, nnx
from numpyro.contrib.module import flax_module, nnx_module

import numpyro_bism
import pyro_bism

D, H, N = 3, 2, 8
V = np.random.default_rng(0).normal(size=(N, D))


class Torch:
    p, dist, xp, bism = pyro, pyro.distributions, torch, pyro_bism

    @staticmethod
    def array(x):
        return torch.as_tensor(np.asarray(x), dtype=torch.float32)

    @staticmethod
    def begin(trained, *args):
        pyro.clear_param_store()
        trained.step(*args)

    @staticmethod
    def adam():
        return pyro.optim.Adam({"lr": 1e-3})


class Jax:
    p, dist, xp, bism = numpyro, numpyro.distributions, jnp, numpyro_bism
    array = staticmethod(lambda x: jnp.asarray(x, jnp.float32))

    @staticmethod
    def begin(trained, *args):
        return trained.init(jax.random.key(0), *args)

    @staticmethod
    def adam():
        return numpyro.optim.Adam(1e-3)


@pytest.fixture(params=[Torch, Jax], ids=["pyro", "numpyro"])
def host(request):
    return request.param


# What a row's energy is given of other rows: the visible values x, the latents h, and a weight w that starts at zero
COUPLINGS = {
    "sum inside the plate": lambda xp, e, x, h, w: e.sum(),
    "mean, not yet": lambda xp, e, x, h, w: e + w * x.mean(0).sum(),
    "pairs": lambda xp, e, x, h, w: (e.reshape(-1, 2) + w * x[:, 0].reshape(-1, 2).prod(-1)[:, None]).reshape(-1),
    "last reads the one before": lambda xp, e, x, h, w: xp.concatenate([e[:-1], e[-1:] + w * x[-2, 0]]),
    "through h": lambda xp, e, x, h, w: e + w * h[:, 0] * xp.roll(h[:, 0], 1),
}


def programs(host, coupling=None, blind=False, bits=False):
    xp, dist, p = host.xp, host.dist, host.p

    def model(x):
        w = p.param("w", host.array(0.0))
        a = p.param("a", host.array(np.ones(D)))
        p.factor("penalty", -(a**2).sum())
        with p.plate("data", len(x)):
            x = p.sample("x", dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
            prior = dist.Bernoulli(0.5) if bits else dist.Normal(0.0, 1.0)
            h = p.sample("h", prior.expand([H]).to_event(1).mask(not bits))
            e = -((x - a) ** 2).sum(-1) + (x[:, :H] * h).sum(-1)
            p.factor("energy", e if coupling is None else COUPLINGS[coupling](xp, e, x, h, w))

    def guide(x):
        s, z = p.param("s", host.array(np.full(H, 0.5))), p.param("z", host.array(0.0))
        with p.plate("data", len(x)):
            loc = s * x[:, :H] + (z * xp.roll(x[:, :H], 1, 0) if blind else 0.0)
            if bits:  # 0 at every draw
                p.sample("h", host.bism.ConcreteBernoulli(0.1, loc - 10.0).to_event(1))
            else:
                p.sample("h", dist.Normal(loc, 1.0).to_event(1))

    return model, guide


LOSSES = ["ScoreMatching", "SlicedScoreMatching", "DenoisingScoreMatching", "MultiscaleDenoisingScoreMatching"]
SETTINGS = {"DenoisingScoreMatching": (0.3,), "MultiscaleDenoisingScoreMatching": (0.1, 0.5, 0.2)}


def trained(host, loss, model, guide):
    return host.bism.BiSM(model, guide, host.adam(), getattr(host.bism, loss)(*SETTINGS.get(loss, ())))


@pytest.mark.parametrize(("coupling", "loss"), list(zip(COUPLINGS, [*LOSSES, LOSSES[2]], strict=True)))
def test_an_energy_that_couples_rows_is_refused(host, coupling, loss):
    with pytest.raises(ValueError, match="Model site 'energy': the log density of one example depends on another"):
        host.begin(trained(host, loss, *programs(host, coupling)), host.array(V))


def test_coupled_bits_that_are_0_at_the_draw_and_coupled_guides_are_refused(host):
    with pytest.raises(ValueError, match="Model site 'energy': the log density of one example depends on another"):
        host.begin(trained(host, LOSSES[2], *programs(host, "through h", bits=True)), host.array(V))
    with pytest.raises(ValueError, match="Guide site 'h': the log density of one example depends on another"):
        host.begin(trained(host, LOSSES[1], *programs(host, blind=True)), host.array(V))


@pytest.mark.parametrize("takes_any", [True, False], ids=["any number", "300 rows"])
def test_of_many_rows_a_few_are_looked_at_where_the_program_takes_few(host, takes_any):
    """A program for 300 rows alone is tried on them all: the last two lie beyond the few."""
    rng = np.random.default_rng(0)
    x, seen = host.array(rng.normal(size=(300, D))), []

    def model(x):
        w = host.p.param("w", host.array(0.0))
        with host.p.plate("data", len(x) if takes_any else 300):
            x = host.p.sample("x", host.dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
            seen.append(len(x))
            host.p.factor("energy", COUPLINGS["last reads the one before"](host.xp, -(x**2).sum(-1), x, None, w))

    with pytest.raises(ValueError, match=f"depends on another example .row {63 if takes_any else 299} moves"):
        host.begin(host.bism.BiSM(model, lambda x: None, host.adam(), host.bism.SlicedScoreMatching()), x)
    assert seen[-1] == (64 if takes_any else 300)


def test_one_number_for_all_rows_is_refused_but_a_penalty_on_weights_is_not(host):
    model, guide = programs(host)

    def whole(x):
        model(x)
        host.p.factor("all", -(x**2).sum())

    with pytest.raises(ValueError, match="'all' has one log density for the whole batch, and it depends"):
        host.begin(trained(host, LOSSES[2], whole, guide), host.array(V))
    host.begin(trained(host, LOSSES[2], model, guide), host.array(V))  # "penalty" is one number too


@pytest.mark.parametrize("rival", ["MarginalSM", "CD", "NCE"])
def test_rivals_refuse_coupled_rows(host, rival):
    def model(x):
        w = host.p.param("w", host.array(0.0))
        with host.p.plate("data", len(x)):
            x = host.p.sample("x", host.dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
            e = -(x**2).sum(-1)
            host.p.factor("energy", host.xp.concatenate([e[:-1], e[-1:] + w * x[-2, 0]]))

    bism = host.bism
    settings = {"MarginalSM": lambda: (bism.ScoreMatching(),), "CD": lambda: (bism.Langevin(), 1), "NCE": tuple}
    with pytest.raises(ValueError, match="Model site 'energy': the log density of one example depends on another"):
        host.begin(getattr(bism, rival)(model, host.adam(), *settings[rival]()), host.array(V))


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_flax_batch_norm_while_training_hides_no_other_coupling(library):
    """It is let through with its state, and a second coupling beside it is not."""
    own = nnx.BatchNorm(D, use_running_average=False, rngs=nnx.Rngs(0))

    def norm(x):
        if library == "nnx":
            return nnx_module("norm", own)(x)
        return flax_module("norm", linen.BatchNorm(use_running_average=False), x, mutable=["batch_stats"])(x)

    x = Jax.array(V)
    model, guide = programs(Jax)
    state = Jax.begin(trained(Jax, LOSSES[1], model, lambda x: guide(norm(x))), x)
    assert "norm$state" in state.mutable_state
    with pytest.raises(ValueError, match="Guide site 'h': the log density of one example depends on another"):
        Jax.begin(trained(Jax, LOSSES[1], model, lambda x: guide(norm(x) + x.mean(0))), x)


@pytest.mark.parametrize("num", [5, 1])
def test_a_plate_of_one_size_and_data_of_another_are_told_apart(host, num):
    """At the first call and later; one row is not taken for all."""

    def model(x):
        w = host.p.param("w", host.array(np.ones(D)))
        with host.p.plate("data", N):
            x = host.p.sample("x", host.dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
            h = host.p.sample("h", host.dist.Normal(0.0, 1.0).expand([D]).to_event(1))
            host.p.factor("e", -((x - w * h) ** 2).sum(-1))

    def guide(x):
        a = host.p.param("s", host.array(np.ones(D)))
        with host.p.plate("data", N):
            host.p.sample("h", host.dist.Normal(a * x, 1.0).to_event(1))

    bism, x = trained(host, LOSSES[2], model, guide), host.array(V)
    words = (
        "data are not broadcast" if num == 1 else rf"Plate 'data' has {N} rows.*of {num} .*plate\('data', len\(v\)\)"
    )
    with pytest.raises(ValueError, match=words):
        host.begin(bism, x[:num])
    state = host.begin(bism, x)
    first = () if host is Torch else (state,)
    for call in (bism.step if host is Torch else bism.update, bism.evaluate_loss if host is Torch else bism.evaluate):
        with pytest.raises(ValueError, match=words):
            call(*first, x[:num])
    with pytest.raises(ValueError):
        host.bism.free_energy(bism, *first, x[:num])


def test_batch_norm_while_training_hides_no_other_coupling():
    norm = torch.nn.BatchNorm1d(D)
    model, guide = programs(Torch)
    sliced, x = pyro_bism.SlicedScoreMatching(), Torch.array(V)

    def normed(x):
        guide(pyro.module("norm", norm)(x))

    Torch.begin(pyro_bism.BiSM(model, normed, Torch.adam(), sliced), x)
    assert norm.training
    coupled, _ = programs(Torch, "through h")
    with pytest.raises(ValueError, match="Model site 'energy': the log density of one example depends on another"):
        Torch.begin(pyro_bism.BiSM(coupled, normed, Torch.adam(), sliced), x)


# Evaluation takes all rows given

FULL, BATCH, HELD = 40, 10, 25
W = np.array([[0.8, 0.1], [-0.3, 0.5], [0.2, -0.7]])


def subsampling(host, local=False):
    """x | h ~ N(W h, 1), h ~ N(0, 1), whose marginal is N(0, W Wᵀ + 1); trained on ten of forty rows at a time."""
    p, dist = host.p, host.dist

    def model(x):
        w = p.param("w", host.array(W))
        with p.plate("data", FULL, subsample_size=BATCH) as rows:
            h = p.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
            p.sample("x", dist.Normal(h @ w.T, 1.0).to_event(1), obs=x[rows])

    def guide(x):
        a = p.param("a", host.array(np.full((FULL, H) if local else (D, H), 0.1)))
        with p.plate("data", FULL, subsample_size=BATCH) as rows:
            p.sample("h", dist.Normal(a[rows] + 0.1 * x[rows][:, :H] if local else x[rows] @ a, 1.0).to_event(1))

    return model, guide


def log_marginal(v):
    cov = W @ W.T + np.eye(D)
    return -0.5 * (np.einsum("ni,ij,nj->n", v, np.linalg.inv(cov), v) + np.linalg.slogdet(2 * np.pi * cov)[1])


@pytest.mark.parametrize("num", [HELD, FULL])
def test_evaluation_takes_all_rows_given_in_order(host, num):
    rng = np.random.default_rng(1)
    data, held = rng.normal(size=(FULL, D)), rng.normal(size=(num, D))
    bism = host.bism.BiSM(*subsampling(host), host.adam(), host.bism.SlicedScoreMatching())
    if host is Torch:
        pyro.clear_param_store()
        bism.pair(Torch.array(data))
        first, keyed = (), {}
    else:
        first, keyed = (bism.init(jax.random.key(0), Jax.array(data)),), {"rng_key": jax.random.key(1)}
    x = host.array(held)
    found = np.asarray(host.bism.free_energy(bism, *first, x))
    np.testing.assert_allclose(-found, log_marginal(held), rtol=1e-4)
    likelihood = host.bism.log_likelihood(bism, *first, x, progress_bar=False, **keyed)
    np.testing.assert_allclose(np.asarray(likelihood.value), log_marginal(held), rtol=1e-3)
    precision = np.linalg.inv(W @ W.T + np.eye(D))
    divergence = host.bism.fisher_divergence(bism, *first, x, **keyed)
    mean = 0.5 * ((held @ precision) ** 2).sum(-1).mean() - np.trace(precision)
    np.testing.assert_allclose(float(divergence.value), mean, rtol=1e-3)
    tree = host.bism.to_arviz(bism, *first, x, num_draws=2, **keyed)
    np.testing.assert_allclose(tree.observed_data["x"].values, held, rtol=1e-6)
    assert tree.posterior["h"].shape == (1, 2, num, H)
    options = {"sites": ["h"], "num_samples": 3, "num_warmup": 1, "num_chains": 1, "progress_bar": False}
    chains = host.bism.run_chains(bism, *first, x, kernel=host.bism.Gibbs(), **options, **keyed)
    assert chains.values["h"].shape == (1, 3, num, H)


def test_parameters_of_the_training_rows_are_given_to_no_others(host):
    data = np.random.default_rng(1).normal(size=(FULL, D))
    bism = host.bism.BiSM(*subsampling(host, local=True), host.adam(), host.bism.SlicedScoreMatching())
    if host is Torch:
        pyro.clear_param_store()
        bism.pair(Torch.array(data))
        first, keyed = (), {}
    else:
        first, keyed = (bism.init(jax.random.key(0), Jax.array(data)),), {"rng_key": jax.random.key(1)}
    host.bism.to_arviz(bism, *first, host.array(data), num_draws=2, **keyed)
    with pytest.raises(ValueError, match="'a' has 40 rows, one for every row of the training data"):
        host.bism.to_arviz(bism, *first, host.array(data[:HELD]), num_draws=2, **keyed)
