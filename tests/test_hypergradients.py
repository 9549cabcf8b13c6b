"""Every strategy against exact gradients, in float64, on both packages: one test body, two hosts.

On the linear-Gaussian model and on the Gaussian-Bernoulli RBM the marginal's score is known, so dJ/dθ with the guide
at the posterior is the plain gradient of a score-matching loss. Noise is frozen where a fixed point or a slope is
looked at: every evaluation of J sees one draw, every evaluation of G another.
"""

import copy
import math
import types
from functools import cache

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
from jax.flatten_util import ravel_pytree
from torch.utils import _pytree as pytree

import numpyro_bism
import pyro_bism
from numpyro_bism.programs.visible import flatten
from oracles import central_difference

SIGMA = 0.3
rng = np.random.default_rng(0)


class LinearGaussian:
    """log p̃ = -½ vᵀAv + vᵀWh - ½ hᵀdiag(eᵍ)h + bᵀv + cᵀh; the guide N(Mv + m, diag(e²ˢ)) can be its posterior."""

    D, inner, x_shape, rate, to_fit, column = 3, "FisherDivergence", (), 0.2, 600, 1.0
    theta = {
        "A": np.array([[1.5, 0.2, -0.1], [0.2, 1.2, 0.3], [-0.1, 0.3, 1.8]]),
        "W": 0.5 * rng.normal(size=(3, 2)),
        "g": np.array([0.2, -0.3]),
        "b": rng.normal(size=3),
        "c": rng.normal(size=2),
    }

    @classmethod
    def posterior(cls):
        scale = np.exp(-cls.theta["g"])
        return {
            "M": scale[:, None] * cls.theta["W"].T,
            "m": scale * cls.theta["c"],
            "s": -0.5 * cls.theta["g"],
        }

    @staticmethod
    def programs(host):
        dist = host.dist

        def model(x):
            A, W, g, b, c = (host.param(name) for name in ("A", "W", "g", "b", "c"))
            with host.p.plate("data", len(x)):
                v = host.p.sample("v", dist.Normal(0.0, 1.0).expand([3]).to_event(1).mask(False), obs=x)
                h = host.p.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False))
                quadratic = 0.5 * ((v @ A) * v).sum(-1) + 0.5 * (host.exp(g) * h**2).sum(-1)
                host.p.factor("energy", ((v @ W) * h).sum(-1) + v @ b + h @ c - quadratic)

        def guide(x):
            M, m, s = (host.param(name) for name in ("M", "m", "s"))
            with host.p.plate("data", len(x)):
                host.p.sample("h", dist.Normal(x @ M.T + m, host.exp(s)).to_event(1))

        return model, guide

    @staticmethod
    def score(host, theta, v):
        A, W, g, b, c = (theta[name] for name in ("A", "W", "g", "b", "c"))
        scaled = W * host.exp(-g)
        return b + scaled @ c - v @ (0.5 * (A + A.T) - scaled @ W.T)


class RBM:
    """The checkerboard's Gaussian-Bernoulli RBM, hidden units summed out."""

    D, inner, x_shape, rate, to_fit, column = 2, "TraceEnum_ELBO", (1,), 4.0, 300, np.ones(2)
    theta = {
        "W": 2 * rng.normal(size=(2, 4)),
        "b": rng.normal(size=2),
        "c": rng.normal(size=4),
        "s": np.array([-0.3, -0.5]),
    }

    @classmethod
    def posterior(cls):
        return {"gW": cls.theta["W"], "gb": cls.theta["c"]}

    @staticmethod
    def programs(host, kind="summed"):
        dist = host.dist

        def model(x):
            W, b, c, s = (host.param(name) for name in ("W", "b", "c", "s"))
            with host.p.plate("data", len(x), dim=-2):
                v = host.p.sample("v", dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False), obs=x)
                host.p.factor("quadratic", -0.5 * (((v - b) * host.exp(-s)) ** 2).sum(-1))
                with host.p.plate("units", 4, dim=-1):
                    h = host.p.sample("h", dist.Bernoulli(0.5).mask(False))
                    host.p.factor("unit", h * (c + (v @ W)[..., 0, :]))

        def guide(x):
            W, b = host.param("gW"), host.param("gb")
            with host.p.plate("data", len(x), dim=-2), host.p.plate("units", 4, dim=-1):
                logits = (x @ W)[..., 0, :] + b
                if kind == "relaxed":
                    host.p.sample("h", host.bism.ConcreteBernoulli(0.3, logits))
                else:
                    infer = {"enumerate": "parallel"} if kind == "summed" else {}
                    host.p.sample("h", dist.Bernoulli(logits=logits), infer=infer)

        return model, guide

    @staticmethod
    def score(host, theta, v):
        W, b, c, s = (theta[name] for name in ("W", "b", "c", "s"))
        return -(v - b) * host.exp(-2 * s) + host.sigmoid(v @ W + c) @ W.T


full = pytest.mark.full  # run by `pytest -m full`: in NumPyro they are mostly compilation
MODELS = {"linear-gaussian": LinearGaussian, "rbm": RBM}


class Torch:
    bism, p, dist, infer = pyro_bism, pyro, pdist, pyro.infer
    exp, sigmoid = staticmethod(torch.exp), staticmethod(torch.sigmoid)

    def __init__(self, case, programs, phi, loss, inner, strategy, n, optim):
        pyro.clear_param_store()
        torch.manual_seed(0)
        self.case, self.values = case, {**case.theta, **phi}
        self.param = lambda name: pyro.param(name, lambda: torch.tensor(self.values[name]))
        self.x = torch.tensor(np.random.default_rng(1).normal(size=(n, *case.x_shape, case.D)) * case.column)
        optim = optim or pyro.optim.SGD({"lr": case.rate})
        self.trained = pyro_bism.BiSM(*programs(self), optim, loss, inner_loss=inner, hypergradient=strategy)
        self.pair = self.trained.pair(self.x)
        leaves, spec = pytree.tree_flatten(((self.x,), {}))
        self.batch = self.pair.batch(leaves, spec)
        theta, phi = list(self.pair.theta.values()), list(self.pair.phi.values())
        self.problem = self.trained._problem(self.pair, self.batch, theta, phi)

    def freeze(self):
        def at(seed, evaluate):
            def value():
                torch.manual_seed(seed)
                return evaluate()

            return value

        self.problem.outer, self.problem.inner = at(1, self.problem.outer), at(2, self.problem.inner)

    def fit(self, num_steps):
        """Plain gradient steps on φ."""
        for _ in range(num_steps):
            gradient = torch.autograd.grad(self.problem.inner(), self.problem.phi)
            with torch.no_grad():
                for p, g in zip(self.problem.phi, gradient, strict=True):
                    p.sub_(self.case.rate * g)

    def solve(self):
        """Newton's method on G, to rounding."""
        for _ in range(30):
            system = pyro_bism.hypergradients.linear.LinearSystem(self.problem)
            hessian = torch.stack([system.hessian(e) for e in torch.eye(len(system.rhs))])
            slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(self.problem.inner(), self.problem.phi)])
            step = torch.linalg.solve(hessian, slope)
            with torch.no_grad():
                for p, d in zip(
                    self.problem.phi, pyro_bism.hypergradients.linear.unflat(step, self.problem.phi), strict=True
                ):
                    p.sub_(d)

    def moved(self, t, direction):
        """J(θ + t·direction, φ*)."""

        def move(length):
            with torch.no_grad():
                for name, leaf in self.pair.theta.items():
                    leaf.add_(length * torch.tensor(direction[name]))

        move(t)
        self.solve()
        value = self.problem.outer().item()
        move(-t)
        return value

    def call(self, num=1, num_fit=0, fresh=False):
        """The last of ``num`` results, the state handed on; gradients by name. ``fresh`` gives all, new noise each."""
        strategy, found = self.trained.hypergradient, []
        state = strategy.init(self.problem.theta, self.problem.phi)
        self.problem.inner_noise = [self.problem.snapshot()] * num_fit
        for i in range(num):
            torch.manual_seed(i if fresh else 1)
            result = strategy(self.problem, state)
            state = result.state
            found.append(self._named(result.gradient))
        return (found if fresh else found[-1]), result

    def exact(self, i=1):
        """The gradient of the marginal's loss, with J's own noise."""
        torch.manual_seed(i)
        noise = self.trained.loss.draw(self.batch.v)
        theta = self.pair.theta
        value = self.trained.loss(lambda v: self.case.score(self, theta, v), self.batch.v, noise).mean()
        return self._named(torch.autograd.grad(value, list(theta.values())))

    def _named(self, gradient):
        return {
            name: np.zeros(leaf.shape) if g is None else g.detach().numpy()
            for (name, leaf), g in zip(self.pair.theta.items(), gradient, strict=True)
        }


class Jax:
    bism, p, dist, infer = numpyro_bism, numpyro, ndist, numpyro.infer
    exp, sigmoid = staticmethod(jnp.exp), staticmethod(jax.nn.sigmoid)

    def __init__(self, case, programs, phi, loss, inner, strategy, n, optim):
        self.case, self.values = case, {**case.theta, **phi}
        self.param = lambda name: numpyro.param(name, jnp.asarray(self.values[name]))
        self.x = jnp.asarray(np.random.default_rng(1).normal(size=(n, *case.x_shape, case.D)) * case.column)
        optim = optim or numpyro.optim.SGD(case.rate)
        self.trained = numpyro_bism.BiSM(*programs(self), optim, loss, inner_loss=inner, hypergradient=strategy)
        self.state = self.trained.init(jax.random.key(0), self.x)
        leaves, spec = flatten((self.x,), {})
        self.pair = self.trained.pair(leaves, spec)
        self.batch = self.pair.batch(jax.random.key(0), leaves, spec)
        self.theta, self.phi = self.trained._unpack(self.pair, self.state)
        self.problem = self.trained._problem(self.pair, self.batch, None, None)
        self.frozen = False

    def freeze(self):
        outer, inner = self.problem.outer, self.problem.inner
        self.problem = copy.copy(self.problem)
        vars(self.problem).update(
            outer=lambda key, theta, phi: outer(jax.random.key(1), theta, phi),
            inner=lambda key, theta, phi: inner(jax.random.key(2), theta, phi),
        )
        self.frozen = True

    def fit(self, num_steps):
        def step(_, phi):
            gradient = jax.grad(self.problem.inner, argnums=2)(jax.random.key(0), self.theta, phi)
            return jax.tree.map(lambda p, g: p - self.case.rate * g, phi, gradient)

        self.phi = jax.jit(lambda phi: jax.lax.fori_loop(0, num_steps, step, phi))(self.phi)

    def solve(self):
        self.phi = self._solved(self.theta)

    def _solved(self, theta):
        if not hasattr(self, "_newton"):
            flat, unravel = ravel_pytree(self.phi)

            def step(_, carry):
                theta, x = carry

                def inner(x):
                    return self.problem.inner(jax.random.key(0), theta, unravel(x))

                return theta, x - jnp.linalg.solve(jax.hessian(inner)(x), jax.grad(inner)(x))

            self._newton = jax.jit(lambda theta: unravel(jax.lax.fori_loop(0, 30, step, (theta, flat))[1]))
        return self._newton(theta)

    def moved(self, t, direction):
        theta = {name: x + t * direction[name] for name, x in self.theta.items()}
        return self.problem.outer(jax.random.key(0), theta, self._solved(theta))

    def call(self, num=1, num_fit=0, fresh=False):
        strategy, inner_state = self.trained.hypergradient, self.trained.inner_optim.init(self.phi)
        problem = copy.copy(self.problem)
        vars(problem).update(inner_keys=jax.random.split(jax.random.key(3), num_fit))
        state = strategy.init(self.theta, self.trained.inner_optim, inner_state)

        def step(carry, key):
            state, _ = carry
            result = strategy(key, problem, self.theta, inner_state, state)
            result = result._replace(residual=jnp.asarray(result.residual), curvature=jnp.asarray(result.curvature))
            return (result.state, result), result.gradient if fresh else None

        keys = jax.vmap(jax.random.key)(jnp.arange(num) if fresh else jnp.ones(num, int))
        first, _ = jax.eval_shape(lambda: step((state, None), keys[0]))
        blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), first[1])
        (_, result), found = jax.jit(lambda: jax.lax.scan(step, (state, blank), keys))()
        if fresh:
            return [jax.tree.map(lambda g, i=i: np.asarray(g[i]), found) for i in range(num)], result
        return jax.tree.map(np.asarray, result.gradient), result

    def exact(self, i=1):
        key = jax.random.key(i)
        strategy = self.trained.hypergradient
        if isinstance(strategy, numpyro_bism.Functional) or (strategy.differentiates_inner and not self.frozen):
            key = jax.random.split(key)[0]  # as the strategy splits it
        noise = self.trained.loss.draw(jax.random.split(key, 3)[0], self.batch.v)

        def value(theta):
            return self.trained.loss(lambda v: self.case.score(self, theta, v), self.batch.v, noise).mean()

        return jax.tree.map(np.asarray, jax.grad(value)(self.theta))


HOSTS = {"pyro": Torch, "numpyro": Jax}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


@pytest.fixture(params=HOSTS)
def host(request):
    return HOSTS[request.param]


def each(names, heavy=()):
    """Both hosts by all names; in NumPyro the ``heavy`` ones, which are mostly compilation, only under ``-m full``."""
    return [
        pytest.param(
            package,
            name,
            id=f"{host}-{getattr(name, '__name__', name)}",
            marks=[full] if host == "numpyro" and name in heavy else [],
        )
        for name in names
        for host, package in HOSTS.items()
    ]


def at_posterior(host, case, strategy, loss=None, inner=None, phi=None, n=20, optim=None, kind=None):
    """``strategy`` is (name, settings), so that each host takes its own package's."""
    name, settings = strategy
    settings = {"average": "score"} if case is RBM and loss is None else {}
    loss = loss or host.bism.DenoisingScoreMatching(SIGMA, **settings)
    inner = inner or case.inner
    if inner == "FisherDivergence":
        inner = host.bism.FisherDivergence()
    elif inner == "TraceEnum_ELBO":
        inner = host.infer.TraceEnum_ELBO(max_plate_nesting=2)
    else:
        inner = getattr(host.infer, inner)()
    programs = case.programs if kind is None else lambda h: case.programs(h, kind)
    strategy = getattr(host.bism, name)(**strategy[1])
    return host(case, programs, phi or case.posterior(), loss, inner, strategy, n, optim)


def error(found, exact):
    """Of the whole gradient, relative to its length."""
    difference = sum(np.square(found[name] - exact[name]).sum() for name in exact)
    return np.sqrt(difference / sum(np.square(g).sum() for g in exact.values()))


SOLVED = {
    "cg": (("Implicit", {"num_steps": 40}), 1, 1e-5),
    "neumann": (("Implicit", {"solver": "neumann", "num_steps": 3000}), 1, 1e-4),
    "nystrom": (("Implicit", {"solver": "nystrom", "num_steps": 40}), 1, 1e-5),
    "amortized": (("Amortized", {"num_steps": 200}), 20, 1e-3),
    "amortized-given-rate": (("Amortized", {"step_size": 0.2, "num_steps": 400}), 10, 1e-3),
}


@pytest.mark.parametrize(("host", "name"), each(SOLVED, heavy=("neumann", "amortized-given-rate")))
def test_linear_system_gives_the_exact_gradient_on_the_linear_gaussian_model(host, name):
    """The Fisher inner loss is 0 at the posterior for every draw of h, so the theorem is exact on any noise."""
    strategy, num, tolerance = SOLVED[name]
    problem = at_posterior(host, LinearGaussian, strategy)
    problem.freeze()
    found, result = problem.call(num)
    assert error(found, problem.exact()) < tolerance
    assert float(result.residual) < tolerance
    assert float(result.curvature) > 0


def test_detached_is_far_off_there(host):
    problem = at_posterior(host, LinearGaussian, ("Detached", {}))
    problem.freeze()
    assert error(problem.call()[0], problem.exact()) > 0.3


SUMMED = {**SOLVED, "exact": (("Exact", {}), 1, 1e-10), "functional": (("Functional", {}), 1, 1e-6)}


@pytest.mark.parametrize(("host", "name"), each(SUMMED, heavy=("neumann", "nystrom", "amortized-given-rate")))
def test_every_parameter_of_the_rbm_gets_its_gradient(host, name):
    strategy, num, tolerance = SUMMED[name]
    problem = at_posterior(host, RBM, strategy)
    if name not in ("exact", "functional"):
        problem.freeze()
    found, _ = problem.call(num)
    for parameter, exact in problem.exact().items():
        np.testing.assert_allclose(found[parameter], exact, rtol=0.02, atol=0.02 * np.abs(exact).max())
    assert error(found, problem.exact()) < max(tolerance, 1e-3)


LOSSES = ["ScoreMatching", "SlicedScoreMatching", "MultiscaleDenoisingScoreMatching"]


@pytest.mark.parametrize(("host", "name"), each(LOSSES, heavy=LOSSES[::2]))
def test_exact_under_every_outer_loss(host, name):
    settings = {"sigma_min": 0.1, "sigma_max": 0.5, "sigma0": 0.2} if name.startswith("Multi") else {}
    loss = getattr(host.bism, name)(average="score", **settings)
    problem = at_posterior(host, RBM, ("Exact", {}), loss=loss)
    found, result = problem.call()
    assert error(found, problem.exact()) < 1e-10
    assert np.isfinite(float(result.loss))


ESTIMATES = {
    "exact": (LinearGaussian, ("Exact", {}), None, None),
    "covariance": (LinearGaussian, ("Covariance", {"num_particles": 3}), None, None),
    "summed": (RBM, ("Covariance", {"num_particles": 2}), None, "summed"),
    "drawn": (RBM, ("Covariance", {"num_particles": 2}), "score-function", "drawn"),
    "relaxed": (RBM, ("Covariance", {"num_particles": 2}), "Trace_ELBO", "relaxed"),
}


@pytest.mark.parametrize(("host", "name"), each(ESTIMATES, heavy=("summed", "relaxed", "exact")))
def test_estimates_are_unbiased_at_the_posterior(host, name):
    case, strategy, inner, kind = ESTIMATES[name]
    if inner == "score-function":  # NumPyro's Trace_ELBO has none
        inner = "TraceGraph_ELBO" if host is Jax else "Trace_ELBO"
    problem = at_posterior(host, case, strategy, inner=inner, kind=kind, n=5)
    num = 300 if host is Torch else 3000
    found, _ = problem.call(num, fresh=True)
    exact = [problem.exact(i) for i in range(num)] if host is Torch else None
    if exact is None:  # as above, in one program
        each = jax.jit(jax.vmap(lambda i: jax.tree.map(jnp.asarray, _traced_exact(problem, i))))(jnp.arange(num))
        exact = [jax.tree.map(lambda g, i=i: np.asarray(g[i]), each) for i in range(num)]
    for name in case.theta:
        errors = np.stack([f[name] - e[name] for f, e in zip(found, exact, strict=True)])
        scale = np.abs(np.stack([e[name] for e in exact])).mean()
        spread = errors.std(0) / np.sqrt(num)
        assert np.all(np.abs(errors.mean(0)) <= 5 * spread + 1e-12), name
        assert np.all(spread < 0.2 * scale), name  # or the test would pass by its width


def _traced_exact(problem, i):
    noise = problem.trained.loss.draw(jax.random.split(jax.random.key(i), 3)[0], problem.batch.v)

    def value(theta):
        return problem.trained.loss(lambda v: problem.case.score(problem, theta, v), problem.batch.v, noise).mean()

    return jax.grad(value)(problem.theta)


@pytest.mark.parametrize("case", MODELS)
def test_penaltys_error_falls_as_one_over_its_strength(host, case):
    errors = []
    for strength in (1e3, 1e4):
        problem = at_posterior(host, MODELS[case], ("Penalty", {"strength": strength}))
        problem.freeze()
        errors.append(error(problem.call(num_fit=MODELS[case].to_fit)[0], problem.exact()))
    np.testing.assert_allclose(np.log10(errors[1] / errors[0]), -1, atol=0.1)


def test_penaltys_strength_may_follow_a_schedule(host):
    found = []
    for strength in (10.0, lambda step: 10.0 + 0 * step, lambda step: 10.0 * (step + 1)):
        problem = at_posterior(host, RBM, ("Penalty", {"strength": strength}))
        problem.freeze()
        found.append(problem.call(num=2, num_fit=5)[0])
    number, constant, growing = found
    assert error(constant, number) < 1e-12
    assert error(growing, number) > 1e-3


FITTED = {
    "implicit": ("Implicit", {"num_steps": 40}),
    "nystrom": ("Implicit", {"solver": "nystrom", "num_steps": 40}),
    "amortized": ("Amortized", {"step_size": 4.0, "num_steps": 300}),
    "exact": ("Exact", {}),
}


@pytest.mark.parametrize(("host", "name"), each(FITTED, heavy=("nystrom", "amortized", "exact")))
def test_bias_shrinks_as_the_inner_fit_goes_on(host, name):
    """From a guide off the posterior: the longer the fit, the nearer the gradient."""
    start = {key: value + 0.5 for key, value in RBM.posterior().items()}
    problem = at_posterior(host, RBM, FITTED[name], phi=start)
    if name != "exact":
        problem.freeze()
    errors = []
    for num_steps in (0, 10, 100):
        problem.fit(num_steps)
        errors.append(error(problem.call()[0], problem.exact()))
    assert errors[0] > 0.05
    assert errors[1] < errors[0] and errors[2] < 0.3 * errors[1]


BUDGETS = {
    "cg": [("Implicit", {"num_steps": n}) for n in (1, 4, 12)],
    "neumann": [("Implicit", {"solver": "neumann", "num_steps": n}) for n in (3, 30, 300)],
    "nystrom": [("Implicit", {"solver": "nystrom", "num_steps": n, "damping": 1e-6}) for n in (2, 8, 12)],
    "amortized": [("Amortized", {"num_steps": n}) for n in (10, 100, 3000)],
    "unrolled": [("Unrolled", {"num_steps": n}) for n in (1, 30, 300)],
}


@pytest.mark.parametrize(("host", "name"), each(BUDGETS, heavy=BUDGETS))
def test_bias_shrinks_as_the_budget_grows(host, name):
    errors = []
    for strategy in BUDGETS[name]:
        problem = at_posterior(host, RBM, strategy)
        problem.freeze()
        errors.append(error(problem.call()[0], problem.exact()))
    assert errors[1] < 0.9 * errors[0] and errors[2] < 0.7 * errors[1], errors


def test_implicit_is_the_derivative_of_the_solved_map(host):
    """θ ↦ J(θ, φ*(θ)), φ* the minimiser of G on frozen noise, which is not the posterior; by Newton's method."""
    problem = at_posterior(host, LinearGaussian, ("Implicit", {"num_steps": 60}), inner="Trace_ELBO")
    problem.freeze()
    generator = np.random.default_rng(5)
    direction = {name: generator.normal(size=value.shape) for name, value in LinearGaussian.theta.items()}
    problem.solve()
    found, result = problem.call()
    assert float(result.curvature) > 0
    ours = sum((found[name] * d).sum() for name, d in direction.items())
    theirs = central_difference(lambda t: problem.moved(t, direction), 1e-3)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize(("host", "name"), each(["covariance"], heavy=["covariance"]))
def test_covariance_gains_from_more_draws(host, name):
    spreads = []
    for num_particles in (2, 32):
        problem = at_posterior(host, RBM, ("Covariance", {"num_particles": num_particles}), n=5)
        found, _ = problem.call(20, fresh=True)
        spreads.append(np.mean([error(f, problem.exact(i)) for i, f in enumerate(found)]))
    assert spreads[1] < 0.5 * spreads[0]


RECOMPUTED = [f"{optim}-{n}" for optim in ("adam", "momentum", "rmsprop") for n in (1, 3, 10)]
RECOMPUTED.append("adam-30")  # some steps three times


@pytest.mark.parametrize(("host", "name"), each(RECOMPUTED, heavy=[n for n in RECOMPUTED if n != "momentum-3"]))
def test_recomputing_gives_the_same_gradient(host, name):
    optim, num_steps = name.split("-")[0], int(name.split("-")[1])
    if host is Torch:
        optim = {
            "adam": pyro.optim.Adam({"lr": 1e-2}, {"clip_norm": 0.1}),
            "momentum": pyro.optim.SGD({"lr": 1e-2, "momentum": 0.9}),
            "rmsprop": pyro.optim.RMSprop({"lr": 1e-3, "centered": True}),
        }[optim]
    else:
        optim = {
            "adam": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
            "momentum": numpyro.optim.Momentum(1e-2, 0.9),
            "rmsprop": numpyro.optim.RMSProp(1e-3),
        }[optim]
    start = {key: value + 0.3 for key, value in LinearGaussian.posterior().items()}
    found = []
    for memory in ("store", "recompute"):
        strategy = ("Unrolled", {"num_steps": num_steps, "memory": memory})
        problem = at_posterior(host, LinearGaussian, strategy, phi=start, optim=optim)
        found.append(problem.call()[0])
    assert error(found[1], found[0]) < 1e-12


@pytest.mark.parametrize("num_kept", [1, 2, 5])
def test_few_states_reach_all_in_the_fewest_steps(host, num_kept):
    @cache
    def fewest(length, places):
        """Steps to reach the last of so many states, then the one before, and so on."""
        if places == 1 or length == 1:
            return length * (length - 1) // 2
        return min(m + fewest(length - m, places - 1) + fewest(m, places) for m in range(1, length))

    for num_steps in range(1, 60):
        at, taken = {0: 0}, [0] * num_steps
        plan = host.bism.hypergradients.unrolled._reversal(num_steps, num_kept)
        for state, (legs, place) in zip(range(num_steps, -1, -1), plan, strict=True):
            for source, target, steps in legs:
                assert at[source] == steps.start
                at[target] = steps.stop
                for n in steps:
                    taken[n] += 1
            assert at[place] == state
        assert max(at) <= num_kept
        assert sum(taken) == fewest(num_steps + 1, num_kept)
        assert max(taken) <= next(r for r in range(num_steps + 1) if math.comb(num_kept + r, r) > num_steps)


def test_functional_on_continuous_latents():
    """On the linear-Gaussian model: the exact gradient, but for a bias of a Hessian of 16 draws, which is small."""
    problem = at_posterior(
        Torch, LinearGaussian, ("Functional", {"memory": 0, "num_particles": 16}), inner="Trace_ELBO", n=5
    )
    found, _ = problem.call(200, fresh=True)
    exact = [problem.exact(i) for i in range(200)]
    for name in exact[0]:
        errors = np.stack([f[name] - e[name] for f, e in zip(found, exact, strict=True)])
        scale = np.abs(np.stack([e[name] for e in exact])).mean()
        spread = errors.std(0) / np.sqrt(200)
        assert np.all(np.abs(errors.mean(0)) <= 4 * spread + 0.05 * scale), name
        assert np.all(spread < 0.15 * scale), name  # or the test would pass by its width


class Scaled(RBM):
    """The RBM on data of which one column is a hundred times as large: the guide's Hessian is 1e4 times as ill."""

    theta = {**RBM.theta, "W": RBM.theta["W"] / np.array([[100.0], [1.0]]), "s": np.array([4.3, -0.5])}
    column = np.array([100.0, 1.0])


class WrongSide(RBM):
    """The RBM with a guide that is sure of the opposite."""

    @classmethod
    def posterior(cls):
        return {"gW": -3 * cls.theta["W"], "gb": -3 * cls.theta["c"]}


@pytest.mark.parametrize(("host", "case"), each([Scaled, WrongSide], heavy=[Scaled]))
def test_functional_needs_no_conditioning_and_no_minimum(host, case):
    problem = at_posterior(host, case, ("Functional", {}))
    found, result = problem.call()
    if case is Scaled:
        assert error(found, problem.exact()) < 1e-6
        assert float(result.residual) < 1e-5
        np.testing.assert_allclose(float(result.curvature), 1.0, rtol=1e-3)
    else:
        detached = at_posterior(host, case, ("Detached", {})).call()[0]
        lengths = [np.sqrt(sum(np.square(g).sum() for g in each.values())) for each in (found, detached)]
        assert lengths[0] < 2 * lengths[1]


def test_functionals_second_term_is_a_running_mean(host):
    """Of fresh noise each step: what the gradients of two memories differ in is known from the first alone."""
    found = {
        memory: at_posterior(host, RBM, ("Functional", {"memory": memory}), n=5).call(3, fresh=True)[0]
        for memory in (0.0, 0.6)
    }
    # the biases c reach J through the second term alone
    terms, means = ([-each["c"] for each in found[memory]] for memory in (0.0, 0.6))
    mean = np.zeros(4)
    for i, (term, kept) in enumerate(zip(terms, means, strict=True)):
        mean = mean + max(1 / (i + 1), 0.4) * (term - mean)
        np.testing.assert_allclose(kept, mean, rtol=1e-8, atol=1e-12)


class TorchProblem(pyro_bism.hypergradients.Bilevel):
    """Two losses of no programs."""

    def __init__(self, outer, inner, theta, phi):
        super().__init__(None, None, None, None, theta, phi, None)
        self.outer, self.inner = outer, inner


class JaxProblem(numpyro_bism.hypergradients.Bilevel):
    """The same: functions of a key, θ and φ."""

    def __init__(self, outer, inner, optim):
        super().__init__(None, None, None, None, None, optim, None)
        vars(self).update(outer=outer, inner=inner)


def saddle(host, strategy, bend=(1.0, -1.0), num_steps=1):
    """G = φ₁² - φ₂² + θφ, J = φ₁ + 2φ₂ + θ²: along φ₂ there is no minimum. What is found after so many steps."""
    if host is Torch:
        theta = torch.tensor([0.3, 0.4], requires_grad=True)
        phi = torch.tensor([0.1, 0.2], requires_grad=True)
        sign, weight = torch.tensor(bend), torch.tensor([1.0, 2.0])
        problem = TorchProblem(
            lambda: (weight * phi).sum() + theta.square().sum(),
            lambda: (sign * phi.square() + theta * phi).sum(),
            [theta],
            [phi],
        )
        found = pyro_bism.hypergradients.Result(None, None, strategy.init([theta], [phi]))
        for _ in range(num_steps):
            found = strategy(problem, found.state)
        return found
    sign, weight = jnp.array(bend), jnp.array([1.0, 2.0])
    optim = numpyro.optim.SGD(0.1)
    problem = JaxProblem(
        lambda key, theta, phi: (weight * phi).sum() + jnp.square(theta).sum(),
        lambda key, theta, phi: (sign * jnp.square(phi) + theta * phi).sum(),
        optim,
    )
    theta, inner_state = jnp.array([0.3, 0.4]), optim.init(jnp.array([0.1, 0.2]))
    found = numpyro_bism.hypergradients.Result(None, None, strategy.init(theta, optim, inner_state))
    step = jax.jit(lambda state: strategy(jax.random.key(0), problem, theta, inner_state, state))
    for _ in range(num_steps):
        found = step(found.state)
    return found


@pytest.mark.parametrize("bend", [(2.0, -0.4), (-2.0, 0.4)], ids=["the least", "the greatest"])
def test_amortized_does_not_run_off_along_negative_curvature(host, bend):
    gradient = np.asarray(saddle(host, host.bism.Amortized(), bend, 1000).gradient).reshape(-1)
    assert np.abs(gradient).max() < 10  # θ's own part is below 1, and |φ*'s| along the other direction is 1.25


@pytest.mark.parametrize("solver", ["cg", "neumann", "nystrom"])
def test_a_direction_without_a_minimum_is_told(host, solver):
    result = saddle(host, host.bism.Implicit(solver))
    assert float(result.curvature) < 0
    assert float(result.residual) > 0.5
    gradient = result.gradient[0] if host is Torch else result.gradient
    assert np.isfinite(np.asarray(gradient)).all()
    if solver == "cg":  # enough damping makes it a minimum again: (H + 3) x = (1, 2), dJ/dθ = 2θ - x
        damped = saddle(host, host.bism.Implicit(solver, damping=3.0))
        assert float(damped.residual) < 1e-6
        gradient = damped.gradient[0] if host is Torch else damped.gradient
        np.testing.assert_allclose(np.asarray(gradient), [0.6 - 1 / 5, 0.8 - 2 / 1], rtol=1e-6)


WITHOUT = ["Implicit", "Amortized", "Functional", "Penalty", "Exact", "Covariance", "Unrolled"]


@pytest.mark.parametrize(("host", "name"), each(WITHOUT, heavy=WITHOUT[2:]))
def test_a_guide_without_parameters(host, name):
    """Nothing to fit, nothing to differentiate through: ∂J/∂θ, or what the posterior alone gives."""

    def programs(h):
        model, _ = LinearGaussian.programs(h)

        def guide(x):
            with h.p.plate("data", len(x)):
                h.p.sample("h", h.dist.Normal(0.3 * x[..., :2], 1.0).to_event(1))

        return model, guide

    case = types.SimpleNamespace(
        D=3,
        rate=0.5,
        x_shape=(),
        theta=LinearGaussian.theta,
        column=1.0,
        inner="FisherDivergence",
        posterior=dict,
        programs=programs,
    )
    found = []
    for strategy in (name, "Detached"):
        problem = at_posterior(host, case, (strategy, {}))
        problem.freeze()
        found.append(problem.call()[0])
        assert all(np.isfinite(g).all() for g in found[-1].values())
    if name not in ("Exact", "Covariance"):
        assert error(*found) < 1e-12


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Implicit", {"solver": "lu"}, "solver must be"),
        ("Implicit", {"num_steps": 0}, "num_steps must be at least 1"),
        ("Implicit", {"damping": -1.0}, "damping must not be negative"),
        ("Amortized", {"step_size": 0.0}, "step_size must be positive"),
        ("Amortized", {"num_steps": 0}, "num_steps must be at least 1"),
        ("Penalty", {"strength": -1.0}, "strength must be positive"),
        ("Covariance", {"num_particles": 1}, "at least 2"),
        ("Unrolled", {"num_steps": -1}, "must not be negative"),
        ("Unrolled", {"memory": "lots"}, "memory must be"),
    ],
)
def test_bad_settings(host, name, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(host.bism, name)(**settings)


def test_covariance_needs_a_loss_that_reads_the_score_at_one_point(host):
    with pytest.raises(ValueError, match="differentiates the score"):
        at_posterior(host, LinearGaussian, ("Covariance", {}), loss=host.bism.ScoreMatching())


def test_exact_refuses_relaxed_latents(host):
    with pytest.raises(ValueError, match="never are"):
        at_posterior(host, RBM, ("Exact", {}), inner="Trace_ELBO", kind="relaxed")


def test_draws_without_a_gradient_need_covariance_and_an_inner_loss_for_them(host):
    with pytest.raises(ValueError, match="can't be reparameterised"):
        at_posterior(host, RBM, ("Implicit", {}), inner="Trace_ELBO", kind="drawn")
    with pytest.raises(ValueError, match=r"carry (a|no) gradient"):
        at_posterior(host, RBM, ("Covariance", {}), inner="FisherDivergence", kind="drawn")
    if host is Jax:
        with pytest.raises(ValueError, match="TraceGraph_ELBO"):
            at_posterior(host, RBM, ("Covariance", {}), inner="Trace_ELBO", kind="drawn")


def test_covariance_takes_the_energy_example_by_example(host):
    def programs(h, total):
        def model(x):
            W = h.param("W")
            with h.p.plate("data", len(x)):
                v = h.p.sample("v", h.dist.Normal(0.0, 1.0).expand([3]).to_event(1).mask(False), obs=x)
                hidden = h.p.sample("h", h.dist.Normal(0.0, 1.0).expand([2]).to_event(1))
                energy = ((v @ W) * hidden).sum(-1)
                if not total:
                    h.p.factor("energy", energy)
            h.p.factor("rest", energy.sum() if total else (W**2).sum())

        return model, LinearGaussian.programs(h)[1]

    case = types.SimpleNamespace(
        **{k: getattr(LinearGaussian, k) for k in ("D", "rate", "x_shape", "column", "theta", "inner", "posterior")}
    )
    case.programs = lambda h: programs(h, False)
    found, _ = at_posterior(host, case, ("Covariance", {})).call()
    assert np.isfinite(found["W"]).all()
    case.programs = lambda h: programs(h, True)
    with pytest.raises(ValueError, match="'rest' has one log density for the whole batch"):
        at_posterior(host, case, ("Covariance", {}))


# The Hessian of two latents that have nothing to do with each other, with curvatures 0.5 and 1
CURVATURES = np.array([0.5, 1.0])


def _separate(p, dist, array):
    def model(x):
        a = p.param("a", array(np.array([0.5, -0.7])))
        with p.plate("data", len(x)):
            v = p.sample("v", dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False), obs=x)
            h = p.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False))
            quadratic = 0.5 * (array(CURVATURES) * h**2).sum(-1) + 0.5 * (v**2).sum(-1)
            p.factor("energy", (a * v * h).sum(-1) - quadratic)

    def guide(x):
        loc = p.param("loc", array(np.array([0.3, 0.4])))
        with p.plate("data", len(x)):
            p.sample("h", dist.Normal(loc + 0.5 * x, 1.0).to_event(1))

    return model, guide


@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
def test_amortized_finds_the_greatest_curvature_in_another_block(backend):
    """Power iteration alone stays in the block where it is, and its rate is then too great for the others."""
    x = np.random.default_rng(0).normal(size=(20, 2))
    if backend == "pyro":
        pyro.clear_param_store()
        torch.set_default_dtype(torch.float64)
        still = pyro.optim.SGD({"lr": 0.0})
        programs = _separate(pyro, pyro.distributions, torch.as_tensor)
        loss, strategy = pyro_bism.DenoisingScoreMatching(0.3), pyro_bism.Amortized()
        bism = pyro_bism.BiSM(*programs, still, loss, hypergradient=strategy)
        bism.step(torch.as_tensor(x))
        (state,) = bism._method_state
        bism._method_state = (state._replace(direction=[torch.tensor([1.0, 0.0])], moments=torch.zeros(3)),)
        curvatures = []
        for _ in range(30):
            bism.step(torch.as_tensor(x))
            curvatures.append(bism.info.curvature)
        torch.set_default_dtype(torch.float32)
    else:
        with jax.enable_x64(True):
            programs = _separate(numpyro, numpyro.distributions, jnp.asarray)
            still = numpyro.optim.SGD(0.0)
            loss, strategy = numpyro_bism.DenoisingScoreMatching(0.3), numpyro_bism.Amortized()
            bism = numpyro_bism.BiSM(*programs, still, loss, hypergradient=strategy)
            state, update, curvatures = bism.init(jax.random.key(0), jnp.asarray(x)), jax.jit(bism.update), []
            caught = state.hypergradient_state._replace(direction={"loc": jnp.array([1.0, 0.0])})
            state = state._replace(hypergradient_state=caught)
            for _ in range(30):
                state, _ = update(state, jnp.asarray(x))
                curvatures.append(float(state.info.curvature))
    assert curvatures[0] == pytest.approx(0.5)
    # of a direction that is a tenth ∂J/∂φ, at most
    assert curvatures[-1] == pytest.approx(1.0, rel=0.02)
