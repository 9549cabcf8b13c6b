"""The two packages take the same step, given the same parameters and the same noise (float64, to 1e-6 and closer).

Every random draw of either package is replaced by the next number of one tape. The two run the same program in
the same order, so they read the same numbers; a draw too many or too few on one side shows as a mismatch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import numpyro.infer
import optax
import pyro
import pyro.distributions as pdist
import pyro.infer
import pyro.optim
import pytest
import torch

import numpyro_bism
import pyro_bism

D, H, N, SIZE = 3, 2, 7, 5
rng = np.random.default_rng(0)
X = rng.normal(size=(SIZE, D))
START = {
    "w": 0.3 * rng.normal(size=(D, H)),
    "b": 0.1 * rng.normal(size=D),
    "c": 0.1 * rng.normal(size=H),
    "s": np.full(D, 0.9),
    "gw": 0.3 * rng.normal(size=(D, H)),
    "gb": 0.1 * rng.normal(size=H),
    "gs": np.full(H, 0.7),
}


class Tape:
    """Draws that do not depend on who asks: the i-th request of a kind gets the i-th stream of it.

    Noise that is used again is told by its key in NumPyro, in Pyro by the random state, which here is the count.
    """

    def __init__(self):
        self.count = 0
        self.places = {}

    def next(self, kind, shape):
        self.count += 1
        return self.at(self.count - 1, kind, shape)

    def keyed(self, key, kind, shape):
        if isinstance(key, jax.core.Tracer):
            return self.next(kind, shape)
        name = (np.asarray(jax.random.key_data(key)).tobytes(), kind, tuple(shape))
        if name not in self.places:
            self.places[name] = self.count
            self.count += 1
        return self.at(self.places[name], kind, shape)

    def at(self, place, kind, shape):
        generator = np.random.default_rng(place)
        return generator.normal(size=shape) if kind == "normal" else generator.uniform(size=shape)


@pytest.fixture
def tapes(monkeypatch):
    ours, theirs = Tape(), Tape()

    def shape_of(size):
        return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)

    monkeypatch.setattr(torch, "randn_like", lambda v, **_: torch.tensor(ours.next("normal", v.shape)))
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.tensor(ours.next("uniform", shape_of(size))))
    monkeypatch.setattr(torch, "randn", lambda *size, **_: torch.tensor(ours.next("normal", shape_of(size))))
    standard = "torch.distributions.normal._standard_normal"
    monkeypatch.setattr(standard, lambda shape, dtype, device: torch.tensor(ours.next("normal", shape)))
    for module in (pyro_bism.hypergradients.problem, pyro_bism.training.trainer):
        monkeypatch.setattr(module, "random_state", lambda: ours.count)
        monkeypatch.setattr(module, "set_random_state", lambda state: setattr(ours, "count", state))
    for kind in ("normal", "uniform"):

        def draw(key, shape=(), *_, kind=kind, **__):
            return jnp.asarray(theirs.keyed(key, kind, shape))

        monkeypatch.setattr(jax.random, kind, draw)
    return ours, theirs


@pytest.fixture(autouse=True)
def double():
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)


class Torch:
    """One program, two hosts: what differs between them stands in these two classes."""

    p, dist, relaxed = pyro, pdist, pyro_bism.ConcreteBernoulli
    exp, sigmoid, tanh = torch.exp, torch.sigmoid, torch.tanh

    @staticmethod
    def param(name, **kwargs):
        return pyro.param(name, lambda: torch.tensor(START[name]), **kwargs)


class Jax:
    p, dist, relaxed = numpyro, ndist, numpyro_bism.ConcreteBernoulli
    exp, sigmoid, tanh = jnp.exp, jax.nn.sigmoid, jnp.tanh

    @staticmethod
    def param(name, **kwargs):
        return numpyro.param(name, jnp.asarray(START[name]), **kwargs)


def gaussian(host):
    dist, positive = host.dist, host.dist.constraints.positive

    def model(x):
        w, b, s = host.param("w"), host.param("b"), host.param("s", constraint=positive)
        with host.p.plate("data", len(x)):
            x = host.p.sample("x", dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
            h = host.p.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
            host.p.factor("energy", -0.5 * (((x - b) / s) ** 2).sum(-1) + ((x @ w) * h).sum(-1))

    def guide(x):
        a, scale = host.param("gw"), host.param("gs", constraint=positive)
        with host.p.plate("data", len(x)):
            host.p.sample("h", dist.Normal(host.tanh(x @ a), scale).to_event(1))

    return model, guide


def relaxed(host):
    dist = host.dist

    def model(x):
        w, b, c = host.param("w"), host.param("b"), host.param("c")
        with host.p.plate("data", len(x)):
            x = host.p.sample("x", dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
            h = host.p.sample("h", dist.Bernoulli(0.5).expand([H]).to_event(1))
            host.p.factor("energy", -0.5 * ((x - b) ** 2).sum(-1) + ((x @ w + c) * h).sum(-1))

    def guide(x):
        w, b = host.param("gw"), host.param("gb")
        with host.p.plate("data", len(x)):
            host.p.sample("h", host.relaxed(0.5, x @ w + b).to_event(1))

    return model, guide


def summed(host):
    dist = host.dist

    def model(x):
        w, b, c = host.param("w"), host.param("b"), host.param("c")
        with host.p.plate("data", len(x), dim=-2):
            x = host.p.sample("x", dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
            host.p.factor("quadratic", -0.5 * ((x - b) ** 2).sum(-1))
            with host.p.plate("units", H, dim=-1):
                h = host.p.sample("h", dist.Bernoulli(0.5).mask(False))
                host.p.factor("unit", h * ((x @ w)[..., 0, :] + c))

    def guide(x):
        w, b = host.param("gw"), host.param("gb")
        with host.p.plate("data", len(x), dim=-2), host.p.plate("units", H, dim=-1):
            host.p.sample("h", dist.Bernoulli(logits=(x @ w)[..., 0, :] + b), infer={"enumerate": "parallel"})

    return model, guide


LOSSES = {
    "exact": ("ScoreMatching", {}),
    "sliced": ("SlicedScoreMatching", {"num_projections": 2}),
    "sliced-gaussian": ("SlicedScoreMatching", {"noise": "gaussian"}),
    "denoising": ("DenoisingScoreMatching", {"sigma": 0.3}),
    "denoising-score": ("DenoisingScoreMatching", {"sigma": 0.3, "average": "score"}),
    "multiscale": ("MultiscaleDenoisingScoreMatching", {"sigma_min": 0.1, "sigma_max": 0.5, "sigma0": 0.2}),
}
# the inner loss by package; Trace_ELBO and its like are the hosts' own
INNER = {
    "elbo": lambda infer, bism: infer.Trace_ELBO(),
    "mean-field": lambda infer, bism: infer.TraceMeanField_ELBO(),
    "fisher": lambda infer, bism: bism.FisherDivergence(),
    "enum": lambda infer, bism: infer.TraceEnum_ELBO(max_plate_nesting=2),
}


def unrolled(num_steps):
    return "Unrolled", {"num_steps": num_steps}


CASES = [
    *[(gaussian, loss, "elbo", unrolled(2)) for loss in LOSSES],
    (gaussian, "denoising", "mean-field", unrolled(2)),
    (gaussian, "denoising", "fisher", unrolled(2)),
    (gaussian, "exact", "fisher", unrolled(1)),
    (relaxed, "denoising", "elbo", unrolled(2)),
    *[(summed, loss, "enum", unrolled(2)) for loss in ("denoising", "denoising-score")],
    pytest.param(summed, "exact", "enum", unrolled(2), marks=pytest.mark.full),
    (gaussian, "denoising", "elbo", unrolled(0)),
    (gaussian, "denoising", "elbo", unrolled(5)),
    (gaussian, "denoising", "elbo", ("Implicit", {"num_steps": 4})),
    (gaussian, "denoising", "fisher", ("Implicit", {"solver": "neumann", "num_steps": 4, "damping": 0.1})),
    (relaxed, "denoising", "elbo", ("Amortized", {})),
    (summed, "denoising-score", "enum", ("Amortized", {"step_size": 0.3, "num_steps": 2})),
    (gaussian, "denoising", "elbo", ("Penalty", {"strength": 10.0})),
    (summed, "denoising-score", "enum", ("Exact", {})),
    (gaussian, "denoising", "elbo", ("Functional", {"num_particles": 1})),
    (relaxed, "denoising", "elbo", ("Functional", {"num_particles": 1, "memory": 0})),
]


@pytest.mark.parametrize(("program", "loss", "inner", "strategy"), CASES)
def test_same_noise_same_trajectory(tapes, program, loss, inner, strategy):
    x = X[:, None] if program is summed else X
    name, settings = LOSSES[loss]
    steps, rate = 1 if loss == "exact" else 2, 0.01  # exact score matching costs D passes, operation by operation
    theirs = numpyro_bism.BiSM(
        *program(Jax),
        optax.adam(rate, eps=1e-8),
        getattr(numpyro_bism, name)(**settings),
        inner_loss=INNER[inner](numpyro.infer, numpyro_bism),
        num_inner_steps=2,
        hypergradient=getattr(numpyro_bism, strategy[0])(**strategy[1]),
    )
    ours = pyro_bism.BiSM(
        *program(Torch),
        pyro.optim.Adam({"lr": rate}),
        getattr(pyro_bism, name)(**settings),
        inner_loss=INNER[inner](pyro.infer, pyro_bism),
        num_inner_steps=2,
        hypergradient=getattr(pyro_bism, strategy[0])(**strategy[1]),
    )
    data = torch.tensor(x)
    ours.evaluate_loss(data)  # parameters and analysis: only the steps themselves are compared
    state = theirs.init(jax.random.key(0), x)
    for tape in tapes:
        tape.count, tape.places = 0, {}
    with jax.disable_jit():  # a scan would read the tape once, at tracing
        for _ in range(steps):
            expected = ours.step(data)
            state, found = theirs.update(state, x)
            assert tapes[0].count == tapes[1].count
            np.testing.assert_allclose(found, expected, rtol=1e-9)
            np.testing.assert_allclose(np.array(state.info), np.array(ours.info), rtol=1e-6)
    params = theirs.get_params(state)
    for name, value in pyro.get_param_store().items():
        np.testing.assert_allclose(params[name], value.detach().numpy(), rtol=1e-7, atol=1e-9, err_msg=name)
