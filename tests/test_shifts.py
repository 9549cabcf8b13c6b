"""The guide's distributions, shifted: their Fisher information by enumeration, and what can't be shifted."""

import dataclasses
import math
import types

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
import pytest
import torch

import numpyro_bism
import pyro_bism

LOGITS = np.array([[0.3, -1.2, 2.0], [0.1, 0.4, -0.5]])
FACTOR = np.array([[0.7, 0.0, 0.0], [-0.4, 1.3, 0.0], [0.9, 0.2, 0.5]])


class Torch:
    bism, p, dist, infer, shifts = pyro_bism, pyro, pdist, pyro.infer, pyro_bism.hypergradients.shifts
    one_hot = staticmethod(lambda logits: pdist.OneHotCategorical(logits=logits))
    array = staticmethod(lambda x: torch.tensor(x, dtype=torch.float64))

    @staticmethod
    def hessian(function, zero):
        return torch.autograd.functional.hessian(function, zero)

    exp, divergence = staticmethod(torch.exp), staticmethod(torch.distributions.kl_divergence)

    @classmethod
    def gradients(cls, model, guide, as_if_free=False):
        """Functional's dJ/dθ (or what it is if φ moves every parameter), and J's own ∂J/∂θ, the same noise in both."""
        shiftable, (pair, batch) = cls.look(model, guide), cls.analysed(model, guide)
        pair = dataclasses.replace(pair, shiftable=None if as_if_free else shiftable)
        inner = pyro_bism.divergences.as_inner_loss(pyro.infer.TraceMeanField_ELBO())
        theta, phi = list(pair.theta.values()), list(pair.phi.values())

        def shifted():
            torch.manual_seed(1)
            return pyro_bism.hypergradients.shifts.shifted_losses(pair, batch, LOSS[0], inner)

        strategy, losses = pyro_bism.Functional(memory=0), shifted()
        own = torch.autograd.grad(losses.outer(losses.zeros), theta)
        problem = pyro_bism.hypergradients.Bilevel(pair, batch, LOSS[0], inner, theta, phi, None)
        torch.manual_seed(1)
        found = strategy(problem, strategy.init(theta, phi)).gradient
        return tuple({name: x.numpy() for name, x in zip(pair.theta, each, strict=True)} for each in (found, own))

    @staticmethod
    def chosen(model, guide, loss, **settings):
        pyro.clear_param_store()
        bism = pyro_bism.BiSM(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss, **settings)
        assert bism.hypergradient == settings.get("hypergradient")
        bism.step(torch.tensor(X))
        return bism.hypergradient

    @staticmethod
    def stack(*columns):
        return torch.stack(columns, -1)

    @staticmethod
    def analysed(model, guide):
        pyro.clear_param_store()
        leaves, spec = torch.utils._pytree.tree_flatten(((torch.tensor(X),), {}))
        pair = pyro_bism.programs.analysis.analyse(model, guide, leaves, spec, None, None, pyro_bism.Functional())
        return pair, pair.batch(leaves, spec)

    @classmethod
    def look(cls, model, guide):
        """What can be shifted, without a step."""
        pair, batch = cls.analysed(model, guide)
        with pyro_bism.programs.params.jittered([*pair.theta.values(), *pair.phi.values()]):
            return pyro_bism.hypergradients.shifts.require_shiftable(pair, batch, None)

    @staticmethod
    def begin(model, guide, loss, **settings):
        pyro.clear_param_store()
        optim = pyro.optim.Adam({"lr": 1e-3})
        bism = pyro_bism.BiSM(model, guide, optim, loss, hypergradient=pyro_bism.Functional(), **settings)
        return bism.pair(torch.tensor(X)).shiftable


class Jax:
    bism, p, dist, infer, shifts = numpyro_bism, numpyro, ndist, numpyro.infer, numpyro_bism.hypergradients.shifts
    one_hot = staticmethod(lambda logits: ndist.MultinomialLogits(logits, 1))
    array = staticmethod(jnp.asarray)

    @staticmethod
    def hessian(function, zero):
        return jax.jit(jax.hessian(function))(zero)

    exp, divergence = staticmethod(jnp.exp), staticmethod(ndist.kl_divergence)

    @classmethod
    def gradients(cls, model, guide, as_if_free=False):
        """Functional's dJ/dθ (or what it is if φ moves every parameter), and J's own ∂J/∂θ, the same noise in both."""
        start, batch = cls.analysed(model, guide)
        shiftable = None if as_if_free else cls.look(model, guide)
        pair = dataclasses.replace(start.pair, shiftable=shiftable)
        key, strategy = jax.random.key(1), numpyro_bism.Functional(memory=0)
        inner = numpyro_bism.divergences.as_inner_loss(numpyro.infer.TraceMeanField_ELBO())

        def shifted(key, theta, phi):
            def params(theta):
                return pair.params(theta, phi, None)

            return numpyro_bism.hypergradients.shifts.shifted_losses(key, pair, params, batch, LOSS[1], inner, theta)

        optim = numpyro.optim.SGD(0.1)
        problem = numpyro_bism.hypergradients.Bilevel(pair, batch, LOSS[1], inner, None, optim, None)

        @jax.jit
        def found(theta, phi):
            losses, state = shifted(jax.random.split(key)[0], theta, phi), optim.init(phi)
            gradient = strategy(key, problem, theta, state, strategy.init(theta, optim, state)).gradient
            return gradient, jax.grad(losses.outer)(theta, losses.zeros)

        return jax.tree.map(np.asarray, found(start.theta, start.phi))

    @staticmethod
    def chosen(model, guide, loss, **settings):
        bism = numpyro_bism.BiSM(model, guide, optax.adam(1e-3), loss, **settings)
        assert bism.hypergradient == settings.get("hypergradient")
        bism.init(jax.random.key(0), jnp.asarray(X))
        return bism.hypergradient

    @staticmethod
    def stack(*columns):
        return jnp.stack(columns, -1)

    @staticmethod
    def analysed(model, guide):
        """Without a loss: what compiles for long is no part of it."""
        key, strategy = jax.random.key(0), numpyro_bism.Functional()
        leaves, spec = jax.tree.flatten(((jnp.asarray(X),), {}))
        start = numpyro_bism.programs.analysis.analyse(model, guide, leaves, spec, key, None, None, None, strategy, {})
        return start, start.pair.batch(key, leaves, spec)

    @classmethod
    def look(cls, model, guide):
        """What can be shifted, without a step."""
        key, (start, batch) = jax.random.key(0), cls.analysed(model, guide)
        params = start.pair.params(*numpyro_bism.programs.params.jittered(key, (start.theta, start.phi)), start.mutable)
        return numpyro_bism.hypergradients.shifts.require_shiftable(key, start.pair, params, batch, None)

    @staticmethod
    def begin(model, guide, loss, **settings):
        strategy = numpyro_bism.Functional()
        bism = numpyro_bism.BiSM(model, guide, optax.adam(1e-3), loss, hypergradient=strategy, **settings)
        bism.init(jax.random.key(0), jnp.asarray(X))
        return bism.pair(*jax.tree.flatten(((jnp.asarray(X),), {}))).shiftable


X = np.random.default_rng(0).normal(size=(6, 2))
LOSS = pyro_bism.DenoisingScoreMatching(0.3), numpyro_bism.DenoisingScoreMatching(0.3)


@pytest.fixture(params=[Torch, Jax], ids=["pyro", "numpyro"])
def host(request):
    with jax.enable_x64(request.param is Jax):
        yield request.param


def expected(host, fn):
    """δ to -E_q log q_δ, up to what does not depend on δ; by parameter."""
    base, at = host.bism.distributions.base_of(fn), host.shifts._parameters("h", fn)
    if isinstance(base, host.dist.Normal | host.dist.LogNormal):

        def cross(shift):
            log_scale = at["scale"] + shift["scale"]
            square = shift["loc"] ** 2 + host.array(1.0) * base.scale**2
            return (
                log_scale + 0.5 * square * (-2 * log_scale).exp()
                if host is Torch
                else log_scale + 0.5 * square * jnp.exp(-2 * log_scale)
            ).sum()

        return cross
    if isinstance(base, host.dist.MultivariateNormal):  # up to the entropy of q
        return lambda shift: host.divergence(fn, host.shifts._moved("h", fn, shift)).sum()
    fn = host.bism.distributions.discretized(fn)
    is_one_hot = "logits" in at and fn.event_shape
    support = host.array(np.eye(3)[:, None] + np.zeros((2, 1))) if is_one_hot else fn.enumerate_support()
    log_q = fn.log_prob(support)
    weights = log_q.exp() if host is Torch else jnp.exp(log_q)

    def cross(shift):
        return -(weights * host.shifts._moved("h", fn, shift).log_prob(support)).sum()

    return cross


FAMILIES = {
    "normal": lambda h: h.dist.Normal(h.array(LOGITS), h.array(np.exp(LOGITS))).to_event(1),
    "log-normal": lambda h: h.dist.LogNormal(h.array(LOGITS), h.array(np.exp(LOGITS))),
    "multivariate": lambda h: h.dist.MultivariateNormal(h.array(LOGITS), scale_tril=h.array(FACTOR)),
    "by-covariance": lambda h: h.dist.MultivariateNormal(h.array(LOGITS), h.array(FACTOR @ FACTOR.T)),
    "bits": lambda h, logits=LOGITS: h.dist.Bernoulli(logits=h.array(logits)),
    "bits-by-probs": lambda h: h.dist.Bernoulli(probs=1 / (1 + np.exp(-1)) * h.array(np.ones((2, 3)))),
    "relaxed": lambda h: h.bism.ConcreteBernoulli(0.1, h.array(LOGITS)),
    "classes": lambda h, logits=LOGITS: h.dist.Categorical(logits=h.array(logits)),
    "one-hot": lambda h, logits=LOGITS: h.one_hot(h.array(logits)),
}


@pytest.mark.parametrize("family", ["bits", "classes", "one-hot"])
def test_curvature_is_the_fisher_information_far_from_the_posterior_too(host, family):
    """KL(q_δ || p) of bits and classes whose p is another: in logits its curvature may be negative."""
    fn, other = FAMILIES[family](host), FAMILIES[family](host, -4.0 * LOGITS[::-1])
    (k, at), *_ = host.shifts._parameters("h", fn).items()
    cross, is_one_hot = expected(host, fn), family == "one-hot"
    support = host.array(np.eye(3)[:, None] + np.zeros((2, 1))) if is_one_hot else fn.enumerate_support()
    log_p = other.log_prob(support)

    def divergence(shift):
        log_q = host.shifts._moved("h", fn, {k: shift}).log_prob(support)
        return ((log_q.exp() if host is Torch else jnp.exp(log_q)) * (log_q - log_p)).sum()

    information = host.hessian(lambda x: cross({k: x}), 0 * at)
    np.testing.assert_allclose(host.hessian(divergence, 0 * at), information, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_natural_is_the_inverse_fisher_information(host, family):
    fn = FAMILIES[family](host)
    at = host.shifts._parameters("h", fn)
    zeros = {k: 0 * x for k, x in at.items()}
    base = host.bism.distributions.base_of(fn)
    cross = expected(host, fn)
    for k, zero in zeros.items():
        information = host.hessian(lambda x, k=k: cross({**zeros, k: x}), zero)
        fisher = np.asarray(information).reshape(math.prod(zero.shape), -1)
        # of a softmax's logits a slope adds up to 0 along the classes
        slope = fisher @ np.random.default_rng(0).normal(size=len(fisher))
        natural = np.asarray(host.shifts._natural(base, k, host.array(slope.reshape(zero.shape))))
        np.testing.assert_allclose(fisher @ natural.reshape(-1), slope, rtol=1e-6, atol=1e-9)


def test_every_variable_has_a_shift_of_its_own(host):
    """Also where the guide's examples share a scale, or all is expanded from one number."""
    shared = host.dist.Normal(host.array(LOGITS), host.array(1.0)).to_event(1)
    expanded = host.dist.Normal(host.array(0.0), host.array(2.0)).expand([2, 3])
    within = host.dist.Normal(host.array(LOGITS), host.array(1.0)).mask(host.array(LOGITS) > 0).to_event(1)
    for fn in (shared, expanded, within):
        at = host.shifts._parameters("h", fn)
        assert {k: tuple(x.shape) for k, x in at.items()} == {"loc": (2, 3), "scale": (2, 3)}
        moved = host.shifts._moved("h", fn, {k: 0 * x for k, x in at.items()})
        assert (moved.batch_shape, moved.event_shape) == (fn.batch_shape, fn.event_shape)
        value = host.array(0.3 * LOGITS)
        np.testing.assert_allclose(np.asarray(moved.log_prob(value)), np.asarray(fn.log_prob(value)), rtol=1e-9)


def programs(host, draw, is_flat=False):
    def model(x):
        w = host.p.param("w", host.array(0.5))
        with host.p.plate("data", len(x)):
            host.p.sample("v", host.dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False), obs=x)
            h = host.p.sample("h", host.dist.Normal(0.0, 1.0).mask(not is_flat))
            host.p.factor("energy", w * h * x.sum(-1) - (x**2).sum(-1))

    def guide(x):
        m = host.p.param("m", host.array(0.1))
        with host.p.plate("data", len(x)):
            host.p.sample("h", draw(host, m * x.sum(-1)))

    return model, guide


def test_what_it_can_not_shift_is_named(host):
    denoising = host.bism.DenoisingScoreMatching(0.3)
    points = programs(host, lambda h, m: h.dist.Delta(m))
    with pytest.raises(ValueError, match=r"site 'h' is a Delta.*Amortized"):
        host.begin(*points, denoising)
    flow = host.dist.transforms.AffineTransform(0.1, 2.0)
    sent = programs(host, lambda h, m: h.dist.TransformedDistribution(h.dist.Normal(m, 1.0), [flow]))
    with pytest.raises(ValueError, match=r"site 'h' is a TransformedDistribution.*Amortized"):
        host.begin(*sent, denoising)
    masked = programs(host, lambda h, m: h.dist.Normal(m, 1.0).mask(m > 0))
    with pytest.raises(ValueError, match=r"'h' stands under a scale or a mask.*Amortized"):
        host.begin(*masked, denoising)
    plain = programs(host, lambda h, m: h.dist.Normal(m, 1.0))
    assert host.begin(*plain, denoising) == {("h", "loc")}
    with pytest.raises(ValueError, match=r"FisherDivergence\(\) is not.*ELBO"):
        host.begin(*plain, denoising, inner_loss=host.bism.FisherDivergence())
    with pytest.raises(ValueError, match=r"ScoreMatching differentiates the score.*Exact"):
        host.begin(*plain, host.bism.ScoreMatching())
    with pytest.raises(ValueError, match="memory must be"):
        host.bism.Functional(memory=1.0)
    with pytest.raises(ValueError, match="num_steps must be"):
        host.bism.Functional(num_steps=0)


def test_what_is_chosen_where_no_hypergradient_is_asked_for(host):
    """The rule of docs/hypergradients.md; the attribute holds the choice once the programs have been run."""
    plain = programs(host, lambda h, m: h.dist.Normal(m, 1.0))
    points = programs(host, lambda h, m: h.dist.Delta(m))
    relaxed = programs(host, lambda h, m: h.bism.ConcreteBernoulli(0.5, m), is_flat=True)
    denoising, exact = host.bism.DenoisingScoreMatching(0.3), host.bism.ScoreMatching()
    assert host.chosen(*plain, denoising) == host.bism.Functional()
    assert host.chosen(*points, denoising) == host.bism.Amortized()
    assert host.chosen(*plain, denoising, inner_loss=host.bism.FisherDivergence()) == host.bism.Amortized()
    assert host.chosen(*plain, exact) == host.bism.Exact()
    assert host.chosen(*relaxed, exact) == host.bism.Amortized()
    assert host.chosen(*plain, exact, hypergradient=host.bism.Detached()) == host.bism.Detached()


def dropped(host, x):
    """Half of the entries, others at every pass."""
    if host is Torch:
        return torch.nn.functional.dropout(x)
    return x * jax.random.bernoulli(numpyro.prng_key(), 0.5, x.shape)


def chained(host, first, second):
    """Two latents; ``second`` is given the first one's draw, and what the guide computes from v."""

    def model(x):
        w = host.p.param("w", host.array(0.5))
        with host.p.plate("data", len(x)):
            host.p.sample("v", host.dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False), obs=x)
            g = host.p.sample("g", host.dist.Normal(0.0, 1.0))
            h = host.p.sample("h", first(host, 0.0 * x[..., 0]))
            host.p.factor("energy", w * (g + h) * x.sum(-1) - (x**2).sum(-1))

    def guide(x):
        m, n = (host.p.param(name, host.array(0.1)) for name in "mn")
        with host.p.plate("data", len(x)):
            infer = {} if first is gaussian else {"enumerate": "parallel"}
            h = host.p.sample("h", first(host, m * x.sum(-1)), infer=infer)
            host.p.sample("g", host.dist.Normal(second(host, h, n * x[..., 0]), 1.0))

    return model, guide


def bits(host, logits):
    return host.dist.Bernoulli(logits=logits)


def classes(host, logits):
    return host.dist.Categorical(logits=host.stack(logits, 0 * logits))


def gaussian(host, loc):
    return host.dist.Normal(loc, 1.0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(gaussian, lambda host, h, loc: loc + 1e-3 * h, id="draws"),
        pytest.param(bits, lambda host, h, loc: loc + h, id="summed-out"),
        pytest.param(gaussian, lambda host, h, loc: dropped(host, loc), id="dropout"),
    ],
)
def test_a_distribution_that_depends_on_draws_is_refused(host, first, second):
    with pytest.raises(ValueError, match=r"that of site 'g' depends on other draws.*Amortized"):
        host.look(*chained(host, first, second))


def test_a_guide_that_samples_nothing_is_refused(host):
    def model(x):
        w = host.p.param("w", host.array(0.5))
        with host.p.plate("data", len(x)):
            host.p.sample("v", host.dist.Normal(w, 1.0).expand([2]).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"this guide samples nothing, though it has parameters: \['m'\].*Amortized"):
        host.look(model, lambda x: host.p.param("m", host.array(0.1)))
    assert host.look(model, lambda x: None) == frozenset()


def test_the_look_leaves_buffers_where_they_were():
    """Those of the old spectral_norm move at every pass, and the weight with them: no dependence on draws."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.utils.spectral_norm(torch.nn.Linear(2, 2))).double()

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("h", pdist.Normal(net(x).sum(-1), 1.0))

    before = {name: x.clone() for name, x in net.named_buffers()}
    assert Torch.look(programs(Torch, gaussian)[0], guide) == {("h", "loc")}
    assert all(torch.equal(x, before[name]) for name, x in net.named_buffers())


def test_what_no_parameter_of_the_guide_moves_is_not_shifted(host):
    plain = programs(host, lambda h, m: h.dist.Normal(m, 2.0))
    assert host.look(*plain) == {("h", "loc")}
    both = chained(host, bits, lambda host, h, loc: loc)
    assert host.look(*both) == {("h", "logits"), ("g", "loc")}
    still = programs(host, lambda h, m: h.dist.Normal(0 * m, 1.0))
    assert host.look(*still) == frozenset()
    with pytest.raises(ValueError, match=r"of 'loc' of the guide's site 'h' some are constants.*Amortized"):
        host.shifts._is_reached(("h", "loc"), host.array([1.0, 0.0]) > 0)
    reference = chained(host, classes, lambda host, h, loc: loc)  # one class has a logit of 0
    assert host.look(*reference) == {("h", "logits"), ("g", "loc")}


def factor(host, t):
    """A Cholesky factor of three numbers."""
    e = host.exp(t)
    return host.stack(host.stack(e[0], t[1]), host.stack(0 * e[0], e[2]))


def correlated(host, loc, t):
    return host.dist.MultivariateNormal(loc, scale_tril=factor(host, t))


def fixed(host, loc, t):
    return host.dist.Normal(loc, 0.7).to_event(1)


def independent(host, loc, t):
    return host.dist.Normal(loc, host.exp(t[:2])).to_event(1)


def linear_gaussian(host, posterior, q):
    """p̃(v, h) = exp f(v) p(h|v), and a guide whose mean is the posterior's.

    f(v) = (b + T c)·v - ‖v‖², and c and t are the posterior's offset and scales.
    """
    B = host.array([[0.5, -0.3], [0.8, 1.1]])
    T, t = host.array(LINK), [-0.5, 0.6, 0.2]

    def model(x):
        b, c = host.p.param("b", host.array([0.4, -0.2])), host.p.param("c", host.array([0.3, 0.9]))
        s = host.p.param("t", host.array(t))
        with host.p.plate("data", len(x)):
            v = host.p.sample("v", host.dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False), obs=x)
            host.p.sample("h", posterior(host, v @ B + c, s))
            host.p.factor("energy", v @ (b + T @ c) - (v**2).sum(-1))

    def guide(x):
        M, m = host.p.param("M", 1.0 * B), host.p.param("m", host.array([0.3, 0.9]))
        s = host.p.param("s", host.array(t)) if q is not fixed else None
        with host.p.plate("data", len(x)):
            host.p.sample("h", q(host, x @ M + m, s))

    return model, guide


LINK = np.array([[0.2, -0.6], [0.7, 0.4]])


def test_functional_with_a_multivariate_guide_gives_the_marginals_gradient(host):
    """log p(v) = f(v): the correlated posterior's own parameters have no part in it."""
    found, own = host.gradients(*linear_gaussian(host, correlated, correlated))
    np.testing.assert_allclose(found["b"], own["b"], rtol=1e-9)
    np.testing.assert_allclose(found["c"], LINK.T @ own["b"], rtol=1e-6)
    np.testing.assert_allclose(found["t"], 0.0, atol=1e-9)
    assert min(abs(own["t"])) > 0.01
    assert min(abs(own["c"] - found["c"])) > 0.01


def test_a_scale_that_the_guide_holds_constant_is_not_shifted(host):
    """Of the guide the means alone follow θ, to the posterior's: t moves J by itself, c through f."""
    case = linear_gaussian(host, independent, fixed)
    found, own = host.gradients(*case)
    np.testing.assert_allclose(found["t"], own["t"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found["c"], LINK.T @ own["b"], rtol=1e-6)
    if host is Torch:  # where every parameter is shifted it is another
        found, own = host.gradients(*case, as_if_free=True)
        assert max(abs(found["t"] - own["t"])) > 0.01


def test_every_example_has_its_own_system(host):
    """Coupled ones are solved; along a direction of next to no curvature a step ends, and keeps what it has found."""
    rng = np.random.default_rng(0)
    square = rng.normal(size=(3, 3))
    systems = np.stack([square @ square.T + np.eye(3), np.diag([2.0, 0.5, 1.0]), np.diag([0.05, 0.05, 0.05])])
    b, H = rng.normal(size=(3, 3)), host.array(systems)
    shifted = host.bism.hypergradients.Shifted(
        zeros=None,
        outer=None,
        inner=None,
        natural=lambda x: x,
        dot=lambda x, y: (x["h", "loc"] * y["h", "loc"]).sum(-1),
        scaled=lambda weights, x: {("h", "loc"): weights[:, None] * x["h", "loc"]},
        relaxed=frozenset(),
        is_random=False,
    )

    def product(y):
        return {("h", "loc"): (H @ y["h", "loc"][..., None])[..., 0]}

    rhs = {("h", "loc"): host.array(b)}
    y, residual, curvature = host.bism.hypergradients.functional._solved(shifted, product, rhs, 4)
    found = np.asarray(y["h", "loc"])
    np.testing.assert_allclose(found[:2], np.linalg.solve(systems, b[..., None])[:2, :, 0], rtol=1e-8)
    np.testing.assert_array_equal(found[2], 0.0)
    np.testing.assert_allclose(float(residual), np.linalg.norm(b[2]) / np.linalg.norm(b), rtol=1e-8)
    np.testing.assert_allclose(float(curvature), np.einsum("ni,nij,nj", b, systems, b) / (b**2).sum(), rtol=1e-8)


def test_examples_are_told_from_as_many_units(host):
    fn = host.dist.Normal(host.array(np.zeros((6, 6))), 1.0)
    frames = {name: types.SimpleNamespace(name=name, dim=dim) for name, dim in (("units", -2), ("data", -1))}
    site = types.SimpleNamespace(name="h", fn=fn, frames=list(frames.values()))
    assert host.shifts._axis(site, {"data"}, 6) == 1
    site.frames = [frames["units"]]  # the data in no plate: along the first axis
    assert host.shifts._axis(site, set(), 6) == 0
    with pytest.raises(ValueError, match="an entry for every example"):
        host.shifts._axis(site, set(), 5)
