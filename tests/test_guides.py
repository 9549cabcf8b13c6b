"""Guides: density at fixed h, sight of v, and AmortizedGuide; one body of programs on both backends."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as pdist
import pytest
import torch
from numpyro.infer import TraceEnum_ELBO as NumpyroEnum
from numpyro.infer.autoguide import AutoNormal as NumpyroAutoNormal
from pyro.infer import TraceEnum_ELBO as PyroEnum
from pyro.infer import autoguide as pauto

import numpyro_bism
import pyro_bism

D, H, N = 3, 2, 9
rng = np.random.default_rng(0)
X = rng.normal(size=(N, D))
W = 0.3 * rng.normal(size=(D, H))
A, B = 0.5 * rng.normal(size=(D, H)), 0.3 * rng.normal(size=(D, H))


class PyroHost:
    """Pyro's statements, and what a BiSM gives at its initial parameters."""

    bism, dist, xp, enum = pyro_bism, pdist, torch, PyroEnum
    sample, plate, factor = staticmethod(pyro.sample), staticmethod(pyro.plate), staticmethod(pyro.factor)

    def array(self, x):
        return torch.as_tensor(np.asarray(x))

    def param(self, name, value):
        return pyro.param(name, lambda: self.array(value).clone())  # training works in place

    def detach(self, x):
        return x.detach()

    def fixed(self, x):
        return self.array(x)

    def auto_normal(self, model):
        return pauto.AutoNormal(model)

    def one_hot(self, size):
        return pdist.OneHotCategorical(torch.ones(size))

    def make(self, model, guide, loss, **settings):
        pyro.clear_param_store()
        torch.manual_seed(0)
        return pyro_bism.BiSM(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss, **settings)

    def look(self, bism, *args):
        bism.pair(*map(self.array, args))

    def losses(self, bism, *args):
        """J and the hypergradient's length, with known noise."""
        args = [self.array(a) for a in args]
        bism.pair(*args)
        torch.manual_seed(1)
        loss = bism.step(*args)
        return loss, bism.info.hypergradient_norm


class NumpyroHost:
    bism, dist, xp, enum = numpyro_bism, ndist, jnp, NumpyroEnum
    sample, plate, factor = staticmethod(numpyro.sample), staticmethod(numpyro.plate), staticmethod(numpyro.factor)

    def array(self, x):
        return jnp.asarray(x)

    def param(self, name, value):
        return numpyro.param(name, jnp.asarray(value))

    def detach(self, x):
        return jax.lax.stop_gradient(x)

    def fixed(self, x):
        return jnp.asarray(x)

    def auto_normal(self, model):
        return NumpyroAutoNormal(model)

    def one_hot(self, size):
        return ndist.Multinomial(1, jnp.ones(size) / size)

    def make(self, model, guide, loss, **settings):
        return numpyro_bism.BiSM(model, guide, numpyro.optim.Adam(1e-3), loss, **settings)

    def look(self, bism, *args):
        bism.init(jax.random.key(0), *map(jnp.asarray, args))

    def losses(self, bism, *args):
        """J and the length of its gradient in θ and φ: a whole step takes long to compile."""
        leaves, spec = numpyro_bism.programs.visible.flatten(tuple(map(jnp.asarray, args)), {})
        state = bism.init(jax.random.key(0), *leaves)
        pair = bism.pair(leaves, spec)

        def outer(both):
            batch = pair.batch(jax.random.key(1), leaves, spec)
            return pair.outer_loss(jax.random.key(2), pair.params(*both, state.mutable_state), batch, bism.loss)

        loss, gradient = jax.jit(jax.value_and_grad(outer))(bism._unpack(pair, state))
        return float(loss), float(numpyro_bism.compiled.steps.norm(gradient))


@pytest.fixture(params=[PyroHost, NumpyroHost], ids=["pyro", "numpyro"])
def host(request, torch_double):
    with jax.enable_x64(True):
        yield request.param()


def visible(host, x):
    return host.sample("x", host.dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)


def model_of(host):
    """Two latents, one of them positive, and their couplings to v."""

    def model(x):
        w = host.param("w", W)
        with host.plate("data", len(x)):
            v = visible(host, x)
            h = host.sample("h", host.dist.Normal(0.0, 1.0).expand([H]).to_event(1))
            t = host.sample("t", host.dist.LogNormal(0.0, 1.0))
            host.factor("energy", ((v @ w) * h).sum(-1) - 0.5 * (1 + t) * (v**2).sum(-1))

    return model


def plain_of(host):
    def model(x):
        w = host.param("w", W)
        with host.plate("data", len(x)):
            v = visible(host, x)
            h = host.sample("h", host.dist.Normal(0.0, 1.0).expand([H]).to_event(1))
            host.factor("energy", ((v @ w) * h).sum(-1) - 0.5 * (v**2).sum(-1))

    return model


def moments(host, x):
    """Mean and scale of h, mean and scale of log t."""
    a, b = host.param("a", A), host.param("b", B)
    return host.xp.tanh(x @ a), host.xp.exp(x @ b), x.sum(-1) * 0.3, host.xp.exp(0.2 * (x @ b)[:, 0])


# D: h computed from other draws and from v


def directly(host):
    def guide(x):
        m, s, mt, st = moments(host, x)
        with host.plate("data", len(x)):
            host.sample("h", host.dist.Normal(m, s).to_event(1))
            host.sample("t", host.dist.LogNormal(mt, st))

    return guide


def by_transforms(host):
    def guide(x):
        m, s, mt, st = moments(host, x)
        affine, exp = host.dist.transforms.AffineTransform, host.dist.transforms.ExpTransform()
        with host.plate("data", len(x)):
            base = host.dist.Normal(host.xp.zeros_like(m), 1.0)
            host.sample("h", host.dist.TransformedDistribution(base, [affine(m, s)]).to_event(1))
            base = host.dist.Normal(host.xp.zeros_like(mt), 1.0)
            host.sample("t", host.dist.TransformedDistribution(base, [affine(mt, st), exp]))

    return guide


def by_auxiliary(host):
    """h = m + s e; log t = mt + st (u - mt) / 2 with u ~ N(mt, 2): a base that moves with v as well."""

    def guide(x):
        m, s, mt, st = moments(host, x)
        auxiliary = {"infer": {"is_auxiliary": True}}
        log = host.xp.log
        with host.plate("data", len(x)):
            # both before the points: NumPyro gives a point a key as well, and the draws are to be those of the others
            e = host.sample("e_", host.dist.Normal(0.0, 1.0).expand([H]).to_event(1), **auxiliary)
            u = host.sample("u_", host.dist.Normal(mt, 2.0), **auxiliary)
            h = m + s * e
            host.sample("h", host.dist.Delta(h, log_density=-log(s).sum(-1), event_dim=1))
            t = host.xp.exp(mt + st * (u - mt) / 2)
            host.sample("t", host.dist.Delta(t, log_density=-log(t * st / 2)))

    return guide


@pytest.mark.parametrize("name", ["DenoisingScoreMatching", "ScoreMatching"])
def test_a_latent_computed_from_other_draws_is_scored_at_fixed_h(host, name):
    """Three programs of one and the same q: the same J and the same gradient of it, to rounding."""
    loss = getattr(host.bism, name)(**({"sigma": 0.3} if name.startswith("D") else {}))
    strategy = host.bism.Unrolled(1)
    found = [
        host.losses(host.make(model_of(host), guide(host), loss, hypergradient=strategy, num_inner_steps=1), X)
        for guide in (directly, by_transforms, by_auxiliary)
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-9)


def without_density(host, x, e):
    m, s = moments(host, x)[:2]
    return host.dist.Delta(m + s * e, event_dim=1)


def right_at_the_start(host, x, e):
    """Of a scale that is 1 there, so that a log_density of 0 is the right one before the first step alone."""
    m = moments(host, x)[0]
    return host.dist.Delta(m + host.xp.exp(host.param("raw", 0.0)) * e, event_dim=1)


def of_another_size(host, x, e):
    m, s = moments(host, x)[:2]
    return host.dist.Delta(m + s * e[:, :1], log_density=-host.xp.log(s).sum(-1), event_dim=1)


def across_rows(host, x, e):
    m, s = moments(host, x)[:2]
    return host.dist.Delta(m + s * (e + 0.1 * e.sum(0)), log_density=-host.xp.log(s).sum(-1), event_dim=1)


def mixed_over(host, x, e):
    m, s = moments(host, x)[:2]
    return host.dist.Normal(m + e, s).to_event(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_density, r"'h'.*log_density of 0 in the first row.*AmortizedGuide"),
        (right_at_the_start, r"'h'.*log_density of 0 in the first row.*AmortizedGuide"),
        (of_another_size, r"such a map has no density|no inverse"),
        (across_rows, r"'h': a row is computed from other rows' draws of 'e_'"),
        (mixed_over, r"auxiliary site 'e_' is not determined"),
    ],
)
def test_what_has_no_density_at_fixed_h_is_refused(host, make, message):
    def guide(x):
        with host.plate("data", len(x)):
            noise = host.dist.Normal(0.0, 1.0).expand([H]).to_event(1)
            host.sample("h", make(host, x, host.sample("e_", noise, infer={"is_auxiliary": True})))

    bism = host.make(plain_of(host), guide, host.bism.DenoisingScoreMatching(0.3))
    with pytest.raises(ValueError, match=message):
        host.look(bism, X)


# E: guides that do not look at v


def site(host, fn, **infer):
    def guide(x):
        with host.plate("data", len(x)):
            host.sample("h", fn(x), **({"infer": infer} if infer else {}))

    return guide


def normal(host, loc):
    return host.dist.Normal(loc, 0.5).to_event(1)


BLIND = {
    "a constant": lambda host: site(host, lambda x: normal(host, host.param("m", X[:, :H]))),
    "a product with nothing": lambda host: site(host, lambda x: normal(host, host.param("m", W[0]) + 0 * x[:, :H])),
    "a point": lambda host: site(host, lambda x: host.dist.Delta(host.param("m", X[:, :H]), event_dim=1)),
    "an autoguide": lambda host: host.auto_normal(plain_of(host)),
}


@pytest.mark.parametrize("kind", BLIND)
def test_a_blind_guide_is_an_error_whatever_is_averaged(host, kind):
    b = host.bism
    settings = [({"sigma": 0.3}, b.Amortized())]
    if kind == "a constant":
        settings += [({"sigma": 0.3, "num_particles": 16, "average": "score"}, b.Exact())]
        settings += [({"sigma": 0.3, "average": "score"}, b.Covariance()), (None, b.Implicit())]
    for options, strategy in settings:
        loss = b.ScoreMatching(average="score") if options is None else b.DenoisingScoreMatching(**options)
        bism = host.make(plain_of(host), BLIND[kind](host), loss, hypergradient=strategy)
        with pytest.raises(ValueError, match=r"does not look at the visible values.*AmortizedGuide\(model\)"):
            host.look(bism, X)


def test_blindness_is_each_sites_own(host):
    """One of two sites is blind; a chain v - h - t is not; weights that start at zero are not; bits summed out are."""

    def guide_of(loc_of_t, w):
        def guide(x):
            with host.plate("data", len(x)):
                h = host.sample("h", normal(host, x @ host.param("gw", w)))
                host.sample("t", host.dist.LogNormal(loc_of_t(x, h), 0.5))

        return guide

    loss = host.bism.DenoisingScoreMatching(0.3)

    def look(loc_of_t, w=W):
        host.look(host.make(model_of(host), guide_of(loc_of_t, w), loss), X)

    look(lambda x, h: 0.3 * h[:, 0])
    look(lambda x, h: 0.3 * h[:, 0], 0 * W)
    with pytest.raises(ValueError, match="'t' does not look"):
        look(lambda x, h: host.param("loc", np.zeros(())))
    with pytest.raises(ValueError, match=r"'t' looks at the visible values by detached or discrete steps alone"):
        look(lambda x, h: host.detach(x.sum(-1)) * host.param("slope", np.ones(())))
    with pytest.raises(ValueError, match=r"'t' looks at the visible values by detached or discrete steps alone"):
        look(lambda x, h: host.xp.where(x[:, 0] > 0, 1.0, -1.0) * host.param("slope", np.ones(())))


def test_a_sum_under_a_blind_q_is_blind(host):
    def model(x):
        w = host.param("w", W)
        with host.plate("data", len(x), dim=-1):
            v = visible(host, x)
            h = host.sample("h", host.dist.Bernoulli(0.5).mask(False))
            host.factor("energy", (v @ w)[:, 0] * h - 0.5 * (v**2).sum(-1))

    def guide(x):
        with host.plate("data", len(x), dim=-1):
            logits = host.param("logits", np.zeros(N))
            host.sample("h", host.dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})

    bism = host.make(model, guide, host.bism.DenoisingScoreMatching(0.3, average="score"), inner_loss=host.enum())
    with pytest.raises(ValueError, match="'h' does not look at the visible values"):
        host.look(bism, X)


class AmortizedMessenger(pauto.AutoNormalMessenger):
    def get_posterior(self, name, prior):
        (x,) = self.args_kwargs[0]
        a = pyro.param("a", lambda: torch.tensor(A))
        b = pyro.param("b", lambda: torch.tensor(B))
        return pdist.Normal(torch.tanh(x @ a), torch.exp(x @ b)).to_event(1)


def test_messenger_guides_work_where_they_look_at_v(torch_double):
    """An effect-based guide runs the model inside: data, factors and θ are the model's all the same."""
    host = PyroHost()
    loss = pyro_bism.DenoisingScoreMatching(0.3)

    def by_hand(x):
        m, s = moments(host, x)[:2]
        with pyro.plate("data", len(x)):
            pyro.sample("h", pdist.Normal(m, s).to_event(1))

    model = plain_of(host)
    found = [host.losses(host.make(model, guide, loss), X) for guide in (AmortizedMessenger(model), by_hand)]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9)
    for kind in (pauto.AutoNormalMessenger, pauto.AutoHierarchicalNormalMessenger, pauto.AutoRegressiveMessenger):
        with pytest.raises(ValueError, match="does not look at the visible values"):
            host.look(host.make(model, kind(model), loss), X)

    def conditional(x):
        w = host.param("w", W)
        with pyro.plate("data", len(x)):
            v = visible(host, x)
            pyro.sample("h", pdist.Normal(v @ w, 1.0).to_event(1))

    guide = pauto.AutoHierarchicalNormalMessenger(conditional)
    with pytest.raises(ValueError, match=r"'w' is used by both the model and the guide"):
        host.look(host.make(conditional, guide, loss), X)


# AmortizedGuide


def test_the_flow_has_a_density(host):
    """Its log density is that of its draws: it sums to one over a grid, on its support."""
    bend = [0.4, -0.2, 0.9, 0.5]
    latent = host.bism.autoguide._Latent
    positive = host.dist.transforms.ExpTransform()
    one = latent("t", "flow", 0, (), (), positive, 4, (), False)
    fn = one.distribution(host.array(np.array([bend])), 0.1)
    grid = np.linspace(-60, 60, 24001)
    density = np.exp(np.asarray(fn.log_prob(host.array(np.exp(grid)[:, None])))[:, 0] + grid)
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-6)
    two = latent("h", "flow", 0, (), (2,), None, 9, (), False)
    raw = np.array([[0.3, -0.2, 0.1, -0.3, 0.4, -0.5, 0.3, -0.3, 0.8]])
    fn = two.distribution(host.array(raw), 0.1)
    axis = np.linspace(-14, 14, 401)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
    density = np.exp(np.asarray(fn.log_prob(host.array(points))))[:, 0]
    assert density.sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-3)


def every_kind(host):
    """Latents of every kind; two visible sites, a covariate, a plate of units at the left."""

    def model(x, y, z):
        w = host.param("w", W)
        with host.plate("data", len(x), dim=-1):
            v = visible(host, x)
            u = host.sample("y", host.dist.Normal(0.0, 1.0).mask(False), obs=y)
            h = host.sample("h", host.dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
            t = host.sample("t", host.dist.Gamma(2.0, 1.0))
            s = host.sample("s", host.dist.Dirichlet(host.xp.ones(D)))
            r = host.sample("r", host.dist.Uniform(0.0, 2.0).expand([H]).to_event(1))
            bits = host.sample("b", host.dist.Bernoulli(0.5).expand([H]).to_event(1).mask(False))
            hot = host.sample("o", host.one_hot(D).mask(False))
            with host.plate("units", H, dim=-2):
                k = host.sample("k", host.dist.Normal(0.0, 1.0))
                host.factor("units_energy", 0.1 * k * (v @ w).T)
            bilinear = ((v @ w) * (bits + r + h.sum(-1))).sum(-1) + (v * (s + hot)).sum(-1)
            host.factor("energy", bilinear + u * z - (0.5 + t) * (v**2).sum(-1) - 0.5 * u**2)

    return model


@pytest.mark.parametrize("family", ["normal", "flow"])
def test_a_guide_for_latents_of_every_kind(host, family):
    """Every latent gets its draws in its own support, at other sizes too."""
    if family == "normal" and isinstance(host, NumpyroHost):
        return  # the same programs as with a flow, and long to compile
    model, y, z = every_kind(host), X[:, 0] * 2, (X[:, 1] > 0).astype(int)
    guide = host.bism.AmortizedGuide(model, family=family, hidden_dims=(4,))
    bism = host.make(model, guide, host.bism.DenoisingScoreMatching(0.3), num_inner_steps=1)
    loss, length = host.losses(bism, X, y, z)
    assert np.isfinite(loss) and length > 0
    args = [host.array(a[:5]) for a in (X, y, z)]
    if isinstance(host, PyroHost):
        draws = guide(*args)
    else:
        params = bism.get_params(bism.init(jax.random.key(0), *map(jnp.asarray, (X, y, z))))
        run = numpyro.handlers.substitute(numpyro.handlers.seed(guide, 0), params)
        draws = run(*args)
    shapes = {"h": (5, 2, 2), "t": (5,), "s": (5, D), "r": (5, H), "b": (5, H), "o": (5, D), "k": (H, 5)}
    assert {name: tuple(x.shape) for name, x in draws.items()} == shapes
    draws = {name: np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for name, x in draws.items()}
    assert draws["t"].min() > 0 and 0 < draws["r"].min() and draws["r"].max() < 2
    np.testing.assert_allclose(draws["s"].sum(-1), 1)
    with pytest.raises(ValueError, match="not arranged as at the first call"):
        guide(*args[:2], host.array(z))


def test_what_it_has_no_distribution_for_is_refused(host):
    guide_of, loss = host.bism.AmortizedGuide, host.bism.DenoisingScoreMatching(0.3)

    def model_with(make, outside=False):
        def model(x):
            w = host.param("w", W)
            if outside:
                make()
            with host.plate("data", len(x)):
                v = visible(host, x)
                if not outside:
                    make()
                host.factor("energy", -0.5 * (w.sum() * v**2).sum(-1))

        return model

    for make, outside, message in (
        (lambda: host.sample("h", host.dist.Normal(0.0, 1.0)), True, "all datapoints share the latent site 'h'"),
        (lambda: host.sample("h", host.dist.Poisson(1.0)), False, r"'h' \(Poisson\) can't be relaxed"),
        (lambda: None, False, "no latent site"),
    ):
        model = model_with(make, outside)
        with pytest.raises(ValueError, match=message):
            host.look(host.make(model, guide_of(model), loss), X)
    for settings, message in (
        ({"family": "laplace"}, "family must be"),
        ({"hidden_dims": (0,)}, "hidden_dims must be"),
        ({"discrete": "sampled"}, "discrete must be"),
        ({"temperature": 0.0}, "temperature must be"),
    ):
        with pytest.raises(ValueError, match=message):
            guide_of(plain_of(host), **settings)
    with pytest.raises(ValueError, match="made from a model"):
        guide_of(None)


def fitted(host, model, guide, num_steps, rate=0.05, **settings):
    """The guide's site, at the data, after steps of the inner problem alone: θ stays."""
    loss, b = host.bism.DenoisingScoreMatching(0.05, average="score"), host.bism
    settings = {"hypergradient": b.Detached(), "num_inner_steps": 10, **settings}
    if isinstance(host, PyroHost):
        pyro.clear_param_store()
        torch.manual_seed(0)
        inner = pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": rate}, "gamma": 0.01 ** (1 / num_steps)}
        )
        bism = b.BiSM(model, guide, pyro.optim.Adam({"lr": 0.0}), loss, inner_optim=inner, **settings)
        for _ in range(num_steps):
            bism.step(torch.as_tensor(X))
            inner.step()
        (site,) = [
            s for s in pyro.poutine.trace(guide).get_trace(torch.as_tensor(X)).nodes.values() if s["name"] == "h"
        ]
        return site["fn"]
    inner = numpyro.optim.Adam(lambda i: rate * 0.01 ** (i / (10 * num_steps)))
    bism = b.BiSM(model, guide, numpyro.optim.Adam(0.0), loss, inner_optim=inner, **settings)
    result = bism.run(jax.random.key(0), num_steps, jnp.asarray(X), progress_bar=False)
    run = numpyro.handlers.substitute(numpyro.handlers.seed(guide, 0), result.params)
    return numpyro.handlers.trace(run).get_trace(jnp.asarray(X))["h"]["fn"]


def numbers(x):
    return np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)


def test_bits_of_a_gaussian_rbm_are_fitted_exactly(host):
    """The posterior's logits are linear in v, and so may be the guide's."""
    weights, offset = 2 * W, np.array([0.3, -0.4])

    def model(x):
        w = host.param("w", weights)
        with host.plate("data", len(x), dim=-1):
            v = visible(host, x)
            host.factor("gauss", -0.5 * (v**2).sum(-1))
            with host.plate("units", H, dim=-2):
                h = host.sample("h", host.dist.Bernoulli(0.5).mask(False))
                host.factor("unit", h * (v @ w + host.array(offset)).T)

    guide = host.bism.AmortizedGuide(model, hidden_dims=(), discrete="enumerate")
    fn = fitted(host, model, guide, 40, rate=0.1, inner_loss=host.enum())
    exact = 1 / (1 + np.exp(-(X @ weights + offset).T))
    np.testing.assert_allclose(numbers(fn.probs), exact, atol=0.01)


def test_a_positive_latent_is_fitted(host):
    """t of a Gamma prior is the precision of v, so that its posterior is Gamma(a + D/2, b + |v|²/2)."""
    shape, rate = 2.0, 1.5

    def model(x):
        scale = host.param("scale", np.ones(()))
        with host.plate("data", len(x)):
            v = visible(host, x)
            h = host.sample("h", host.dist.Gamma(shape, rate))
            host.factor("energy", -0.5 * h * (v**2).sum(-1) * scale + 0.5 * D * host.xp.log(h))

    guide = host.bism.AmortizedGuide(model, family="flow", hidden_dims=(8,))
    fn = fitted(host, model, guide, 60, rate=0.03)
    grid = np.linspace(-8, 4, 1000)[:, None]
    log_q = numbers(fn.log_prob(host.array(np.exp(grid)))) + grid
    a, b = shape + D / 2, rate + 0.5 * (X**2).sum(-1)
    log_p = a * grid - b * np.exp(grid)
    log_p -= np.log(np.trapezoid(np.exp(log_p), grid, axis=0))
    kl = np.trapezoid(np.exp(log_q) * (log_q - log_p), grid, axis=0)
    assert kl.mean() < 0.1


def gaussian_data(num, trace=2.5):
    """Rows whose covariance is what it should be, exactly."""
    x = np.random.default_rng(3).normal(size=(num, D))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T, bias=True))).T
    cov = np.diag([1.2, 0.8, 0.5]) + 0.2 - 0.2 * np.eye(D)
    return x @ np.linalg.cholesky(cov * trace / np.trace(cov)).T


def linear_gaussian(host):
    def model(x):
        root, w = host.param("root", np.eye(D)), host.param("w", 0.3 * np.ones(D))
        with host.plate("data", len(x)):
            v = visible(host, x)
            h = host.sample("h", host.dist.Normal(0.0, 1.0))
            host.factor("energy", -0.5 * ((v @ root) ** 2).sum(-1) + h * (v @ w))

    return model


def learnt_trace(params):
    root, w = numbers(params["root"]), numbers(params["w"])
    return np.trace(np.linalg.inv(root @ root.T - np.outer(w, w)))


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_the_covariance_is_learnt_in_numpyro(sigma):
    """The trace of the noisy data's covariance, 2.5 + 3 σ². A blind guide is off by a half at both noise levels."""
    with jax.enable_x64(True):
        host, x = NumpyroHost(), gaussian_data(400)
        model = linear_gaussian(host)
        loss, steps = numpyro_bism.DenoisingScoreMatching(sigma), 2500
        rate = numpyro.optim.Adam(lambda i: 0.02 * 0.01 ** (i / steps))
        inner = numpyro.optim.Adam(lambda i: 0.02 * 0.05 ** (i / (5 * steps)))
        guide = numpyro_bism.AmortizedGuide(model, hidden_dims=(8,))
        bism = numpyro_bism.BiSM(model, guide, rate, loss, inner_optim=inner)
        result = bism.run(jax.random.key(0), steps, jnp.asarray(x), progress_bar=False)
    assert learnt_trace(result.params) == pytest.approx(2.5 + 3 * sigma**2, rel=0.05)


def test_the_covariance_is_learnt_in_pyro(torch_double):
    host, x, sigma, steps = PyroHost(), torch.as_tensor(gaussian_data(400)), 0.5, 250
    model = linear_gaussian(host)

    def optim(rate, end):
        settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": rate}, "gamma": end ** (1 / steps)}
        return pyro.optim.ExponentialLR(settings)

    outer, inner = optim(0.05, 0.01), optim(0.05, 0.1)
    guide = pyro_bism.AmortizedGuide(model, hidden_dims=(8,))
    loss = pyro_bism.DenoisingScoreMatching(sigma)
    bism = pyro_bism.BiSM(model, guide, outer, loss, inner_optim=inner, hypergradient=pyro_bism.Exact())
    for _ in range(steps):
        bism.step(x)
        outer.step()
        inner.step()
    assert learnt_trace({k: pyro.param(k) for k in ("root", "w")}) == pytest.approx(2.5 + 3 * sigma**2, rel=0.05)


# What else reads a guide


def test_the_density_at_any_h_behind_other_draws(host):
    """``diagnose`` scores chains of h: the draws behind them are found, for a map that is not linear too."""
    bism = host.make(model_of(host), by_auxiliary(host), host.bism.DenoisingScoreMatching(0.3))
    h, t = rng.normal(size=(N, H)), np.exp(rng.normal(size=N))
    latents = {"h": host.array(h), "t": host.array(t)}
    x = host.array(X)
    if isinstance(host, PyroHost):
        pair = bism.pair(x)
        batch = pair.batch([x], torch.utils._pytree.tree_structure(((x,), {})))
        found = numbers(pair.log_guide(batch, latents))
    else:
        state = bism.init(jax.random.key(0), x)
        pair = bism.pair(*numpyro_bism.programs.visible.flatten((x,), {}))
        params = pair.params(*bism._unpack(pair, state), None)
        batch = pair.batch(jax.random.key(0), *numpyro_bism.programs.visible.flatten((x,), {}))
        found = numbers(jax.jit(lambda: pair.log_guide(jax.random.key(1), params, batch, latents))())

    def normal(y, loc, scale):
        return -0.5 * ((y - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)

    scale = np.exp(X @ B)
    expected = normal(h, np.tanh(X @ A), scale).sum(-1)
    expected += normal(np.log(t), 0.3 * X.sum(-1), np.exp(0.2 * (X @ B)[:, 0])) - np.log(t)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


ROWS = np.random.default_rng(5).normal(size=(24, D))


def by_datapoint(host, num):
    """A guide with a parameter for every datapoint, or none, beside its look at v."""

    def guide(x):
        loc = host.param("loc", 0.1 * np.arange(num * H).reshape(num, H))
        with host.plate("data", len(x)):
            host.sample("h", normal(host, loc + x @ host.param("a", A)))

    return guide


def test_whether_a_guide_has_parameters_a_datapoint(host):
    for num, expected in ((24, False), (1, True)):
        bism = host.make(plain_of(host), by_datapoint(host, num), host.bism.DenoisingScoreMatching(0.3))
        x, rows = host.array(ROWS), np.arange(0, 24, 3)
        if isinstance(host, PyroHost):
            found = pyro_bism.evaluation.report._is_by_row(bism, bism.energy(x)[0], rows, (x,), {})
        else:
            state, key = bism.init(jax.random.key(0), x), jax.random.key(1)
            energy = bism.energy(state, x, rng_key=key)[0]
            found = numpyro_bism.evaluation.report._is_by_row(bism, state, key, energy, rows, (x,), {})
        assert found is expected


def test_a_guide_of_a_fixed_size_is_diagnosed_at_all_rows(torch_double):
    """On twenty of the rows such a guide can't run. NumPyro's report decides it as Pyro's does: above."""
    host, x = PyroHost(), torch.as_tensor(ROWS)
    bism = host.make(plain_of(host), by_datapoint(host, 24), pyro_bism.DenoisingScoreMatching(0.3))
    few = {"num_draws": 30, "num_chains": 4, "num_samples": 8, "num_warmup": 2, "progress_bar": False}
    assert pyro_bism.diagnose(bism, x, **few).guide.pareto_k.shape == (24,)
    draws = pyro_bism.to_arviz(bism, x, num_draws=200)["posterior"]["h"].values[0]
    expected = 0.1 * np.arange(24 * H).reshape(24, H) + ROWS @ A
    np.testing.assert_allclose(draws.mean(0), expected, atol=5 * 0.5 / np.sqrt(200))


def test_a_state_goes_on_with_a_new_guide(host):
    """All that the guide has learnt is in the state, the means and deviations of its inputs too."""
    if isinstance(host, PyroHost):  # tests/test_pyro_models.py: another process continues bit for bit
        return
    x, loss, model = jnp.asarray(1e4 + 100 * X), numpyro_bism.DenoisingScoreMatching(1.0), plain_of(host)

    def fresh():
        return host.make(model, numpyro_bism.AmortizedGuide(model, hidden_dims=(3,)), loss, num_inner_steps=1)

    bism = fresh()
    half = bism.run(jax.random.key(0), 1, x, progress_bar=False)
    inputs = half.params["AmortizedGuide.inputs"]
    np.testing.assert_allclose(inputs, np.stack([x.mean(0), x.std(0)]), rtol=1e-6)  # kept as they were
    whole = bism.run(jax.random.key(0), 1, x, init_state=half.state, progress_bar=False)
    other = fresh()
    other.init(jax.random.key(3), x[::-1] * 2)
    again = other.run(jax.random.key(0), 1, x, init_state=half.state, progress_bar=False)
    np.testing.assert_array_equal(again.losses, whole.losses)


@pytest.mark.parametrize("host", ["pyro", "numpyro"])
def test_a_point_with_the_density_of_unseen_draws_is_refused(host):
    """Its noise is drawn by no statement: at fixed h nobody knows which it was."""

    def model(x):
        scale = pyro.param("scale", torch.ones(())) if host == "pyro" else numpyro.param("scale", 1.0)
        ppl, dist = (pyro, pdist) if host == "pyro" else (numpyro, numpyro.distributions)
        with ppl.plate("data", len(x)):
            h = ppl.sample("h", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
            ppl.sample("v", dist.Normal(scale * h, 1.0).expand([len(x), 2]).to_event(1), obs=x)

    def guide(x):
        if host == "pyro":
            slope = pyro.param("slope", torch.tensor(0.4))
            with pyro.plate("data", len(x)):
                q = pdist.Normal(slope * x[:, :1], 0.7).to_event(1)
                h = q.rsample()
                pyro.sample("h", pdist.Delta(h, log_density=q.log_prob(h), event_dim=1))
        else:
            slope = numpyro.param("slope", 0.4)
            with numpyro.plate("data", len(x)):
                q = numpyro.distributions.Normal(slope * x[:, :1], 0.7).to_event(1)
                h = q.sample(numpyro.prng_key())
                numpyro.sample("h", numpyro.distributions.Delta(h, log_density=q.log_prob(h), event_dim=1))

    x = np.random.default_rng(0).normal(size=(6, 2)).astype("float32")
    with pytest.raises(ValueError, match=r"log_density is not the same at all v and all draws.*is_auxiliary"):
        if host == "pyro":
            pyro.clear_param_store()
            loss = pyro_bism.DenoisingScoreMatching(0.3)
            pyro_bism.BiSM(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss).step(torch.as_tensor(x))
        else:
            loss = numpyro_bism.DenoisingScoreMatching(0.3)
            numpyro_bism.BiSM(model, guide, numpyro.optim.Adam(1e-3), loss).init(jax.random.key(0), jnp.asarray(x))
