"""The steps that ``performance.py`` times. Each maker takes (model, data, K, N, strategy) and returns a function of a
number of steps that takes them and returns their mean outer loss."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from models import BETA1, BETA2, EPS, EPS_ROOT, RATE, TEMPERATURE, TINY, Model, in_jax, in_torch

Steps = Callable[[int], float]


# By hand, in torch


class State(NamedTuple):
    """Parameters of one level, with Adam's moments and count."""

    params: dict
    first: dict
    second: dict
    count: Any


class TorchStep:
    """One step of BiSM with N unrolled steps on plain tensors."""

    def __init__(self, model: Model, num_inner: int, num_unrolled: int):
        self.model, self.num_inner, self.num_unrolled = model, num_inner, num_unrolled
        self.log_joint, self.guide = in_torch(model)

    def start(self) -> tuple[State, State]:
        import torch

        def state(params):
            params = {k: torch.from_numpy(v.copy()) for k, v in params.items()}
            zeros = [{k: torch.zeros_like(v) for k, v in params.items()} for _ in range(2)]
            return State(params, *zeros, torch.zeros((), dtype=torch.float64))

        theta, phi = self.model.init(np.random.default_rng(1))
        return state(theta), state(phi)

    def noise(self, x):
        import torch

        if self.model.is_relaxed:
            return torch.randn_like(x), torch.rand(len(x), self.model.hidden).clamp_(TINY, 1 - TINY)
        return torch.randn_like(x), torch.randn(len(x), self.model.hidden)

    def draw(self, q, noise):
        import torch

        if self.model.is_relaxed:
            return torch.sigmoid((q[0] + torch.logit(noise)) / TEMPERATURE)
        return q[0] + q[1] * noise

    def log_guide(self, q, h):
        from torch.nn.functional import binary_cross_entropy_with_logits

        if self.model.is_relaxed:
            return -binary_cross_entropy_with_logits(q[0], h, reduction="none").sum(-1)
        return (-0.5 * ((h - q[0]) / q[1]).square() - q[1].log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def inner(self, phi, theta, x, noise):
        v = x + self.model.sigma * noise[0]
        q = self.guide(phi, v)
        h = self.draw(q, noise[1])
        return (self.log_guide(q, h) - self.log_joint(theta, v, h)).mean()

    def outer(self, theta, phi, x, noise):
        import torch

        v = x + self.model.sigma * noise[0]
        h = self.draw(self.guide(phi, v), noise[1])
        v = v.detach().requires_grad_()
        log_weight = self.log_joint(theta, v, h) - self.log_guide(self.guide(phi, v), h)
        (score,) = torch.autograd.grad(log_weight.sum(), v, create_graph=True)
        return 0.5 * (score + noise[0] / self.model.sigma).square().flatten(1).sum(-1).mean()

    @staticmethod
    def adam(state, gradient):
        import torch

        count = state.count + 1
        rate, bias2 = RATE / (1 - BETA1**count), 1 - BETA2**count
        params, first, second = {}, {}, {}
        for (k, p), g in zip(state.params.items(), gradient, strict=True):
            first[k] = torch.lerp(state.first[k], g, 1 - BETA1)
            second[k] = torch.addcmul(BETA2 * state.second[k], g, g, value=1 - BETA2)
            params[k] = p - rate * first[k] / ((second[k] / bias2 + EPS_ROOT).sqrt() + EPS)
        return State(params, first, second, count)

    def slope(self, loss, params, graph=False):
        import torch

        return torch.autograd.grad(
            loss, list(params.values()), create_graph=graph, allow_unused=True, materialize_grads=True
        )

    @staticmethod
    def leaves(state):
        return state._replace(params={k: p.detach().requires_grad_() for k, p in state.params.items()})

    def step(self, theta, phi, x):
        """One outer update: both states after it, and the outer loss."""
        import torch

        for _ in range(self.num_inner):
            phi = self.leaves(phi)
            gradient = self.slope(self.inner(phi.params, theta.params, x, self.noise(x)), phi.params)
            with torch.no_grad():
                phi = self.adam(phi, gradient)
        theta, ahead = self.leaves(theta), self.leaves(phi)
        for _ in range(self.num_unrolled):
            loss = self.inner(ahead.params, theta.params, x, self.noise(x))
            ahead = self.adam(ahead, self.slope(loss, ahead.params, graph=True))
        loss = self.outer(theta.params, ahead.params, x, self.noise(x))
        gradient = self.slope(loss, theta.params)
        with torch.no_grad():
            return self.adam(theta, gradient), phi, loss.detach()


def torch_eager(model: Model, x: np.ndarray, num_inner: int, num_unrolled: int, strategy: Any) -> Steps:
    import torch

    torch.manual_seed(0)
    by_hand = TorchStep(model, num_inner, num_unrolled)
    theta, phi = by_hand.start()
    data = torch.from_numpy(x)

    def steps(num):
        nonlocal theta, phi
        total = 0.0
        for _ in range(num):
            theta, phi, loss = by_hand.step(theta, phi, data)
            total += loss.item()
        return total / num

    return steps


def torch_compiled(model: Model, x: np.ndarray, num_inner: int, num_unrolled: int, strategy: Any) -> Steps:
    """The whole step in one graph of torch's compiler."""
    import torch
    from torch.utils import _pytree as pytree

    torch.manual_seed(0)
    by_hand = TorchStep(model, num_inner, num_unrolled)
    theta, phi = by_hand.start()
    data = torch.from_numpy(x)
    flat, spec = pytree.tree_flatten((theta, phi))

    def whole(*values):
        theta, phi, loss = by_hand.step(*pytree.tree_unflatten(values[:-1], spec), values[-1])
        return [v.detach() for v in (*pytree.tree_leaves((theta, phi)), loss)]

    compiled = in_one_graph(whole, *flat, data)

    def steps(num):
        nonlocal flat
        total = 0.0
        with torch.no_grad():
            for _ in range(num):
                *flat, loss = compiled(*flat, data)
                total += loss.item()
        return total / num

    return steps


def in_one_graph(function: Callable, *tensors: Any) -> Callable:
    """A function of flat tensors, its own gradients in it, compiled; its noise is torch's own."""
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function, tracing_mode="fake")(*tensors)
    with torch.no_grad():
        return torch._inductor.compile(
            graph, [*tensors], options={"fallback_random": True, "size_asserts": False, "alignment_asserts": False}
        )


def torch_higher(model: Model, x: np.ndarray, num_inner: int, num_unrolled: int, strategy: Any) -> Steps:
    """As the paper's authors wrote it: torch's Adam for the kept steps, ``higher`` for the unrolled ones."""
    import higher
    import torch

    torch.manual_seed(0)
    by_hand = TorchStep(model, num_inner, num_unrolled)
    theta_state, phi_state = by_hand.start()
    theta = {k: torch.nn.Parameter(p) for k, p in theta_state.params.items()}
    names = list(phi_state.params)

    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.values = torch.nn.ParameterList(phi_state.params.values())

        def forward(self):
            return dict(zip(names, self.values, strict=True))

    module, data = Guide(), torch.from_numpy(x)
    settings = {"lr": RATE, "betas": (BETA1, BETA2), "eps": EPS}
    inner, outer = torch.optim.Adam(module.parameters(), **settings), torch.optim.Adam(theta.values(), **settings)

    def step():
        constant = {k: p.detach() for k, p in theta.items()}
        for _ in range(num_inner):
            inner.zero_grad()
            by_hand.inner(module(), constant, data, by_hand.noise(data)).backward()
            inner.step()
        with higher.innerloop_ctx(module, inner, copy_initial_weights=True) as (copied, ahead):
            for _ in range(num_unrolled):
                ahead.step(by_hand.inner(copied(), theta, data, by_hand.noise(data)))
            loss = by_hand.outer(theta, copied(), data, by_hand.noise(data))
            for p, g in zip(theta.values(), by_hand.slope(loss, theta), strict=True):
                p.grad = g
        outer.step()
        return loss.item()

    return lambda num: sum(step() for _ in range(num)) / num


# By hand, in JAX


def adam_in_jax(state: State, gradient: dict) -> State:
    import jax
    import jax.numpy as jnp

    count = state.count + 1
    first = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, state.first, gradient)
    second = jax.tree.map(lambda s, g: BETA2 * s + (1 - BETA2) * g * g, state.second, gradient)
    rate, bias2 = RATE / (1 - BETA1**count), 1 - BETA2**count
    params = jax.tree.map(
        lambda p, m, s: p - rate * m / (jnp.sqrt(s / bias2 + EPS_ROOT) + EPS), state.params, first, second
    )
    return State(params, first, second, count)


def jax_by_hand(model: Model, x: np.ndarray, num_inner: int, num_unrolled: int, strategy: Any) -> Steps:
    """All steps in one ``lax.scan``; the noise of a step in two calls."""
    import jax
    import jax.numpy as jnp

    log_joint, guide = in_jax(model)

    def draw(q, noise):
        if model.is_relaxed:
            return jax.nn.sigmoid((q[0] + jnp.log(noise) - jnp.log1p(-noise)) / TEMPERATURE)
        return q[0] + q[1] * noise

    def log_guide(q, h):
        if model.is_relaxed:
            return (h * q[0] - jax.nn.softplus(q[0])).sum(-1)
        return (-0.5 * jnp.square((h - q[0]) / q[1]) - jnp.log(q[1]) - 0.5 * math.log(2 * math.pi)).sum(-1)

    def inner(phi, theta, x, noise):
        v = x + model.sigma * noise[0]
        q = guide(phi, v)
        h = draw(q, noise[1])
        return (log_guide(q, h) - log_joint(theta, v, h)).mean()

    def outer(theta, phi, x, noise):
        v = x + model.sigma * noise[0]
        h = draw(guide(phi, v), noise[1])
        score = jax.grad(lambda u: (log_joint(theta, u, h) - log_guide(guide(phi, u), h)).sum())(v)
        return 0.5 * jnp.square(score + noise[0] / model.sigma).reshape(len(x), -1).sum(-1).mean()

    def fit(theta, phi, noises):
        for noise in noises:  # Python loops: XLA fuses across the few iterations
            phi = adam_in_jax(phi, jax.grad(inner)(phi.params, theta, x, noise))
        return phi

    def step(states, key):
        theta, phi = states
        passes, (key_v, key_h) = num_inner + num_unrolled + 1, jax.random.split(key)
        noise_v = jax.random.normal(key_v, (passes, *x.shape))
        if model.is_relaxed:
            noise_h = jax.random.uniform(key_h, (passes, len(x), model.hidden), minval=TINY, maxval=1 - TINY)
        else:
            noise_h = jax.random.normal(key_h, (passes, len(x), model.hidden))
        noises = list(zip(noise_v, noise_h, strict=True))
        kept = fit(theta.params, phi, noises[:num_inner])

        def whole(params):
            ahead = fit(params, kept, noises[num_inner:-1])
            return outer(params, ahead.params, x, noises[-1])

        loss, gradient = jax.value_and_grad(whole)(theta.params)
        return (adam_in_jax(theta, gradient), kept), loss

    @jax.jit
    def run(states, keys):
        return jax.lax.scan(step, states, keys)

    def start(params):
        params = jax.tree.map(jnp.asarray, params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return State(params, zeros, zeros, jnp.zeros((), jnp.int32))

    x = jnp.asarray(x)
    states, key = tuple(map(start, model.init(np.random.default_rng(1)))), jax.random.key(0)

    def steps(num):
        nonlocal states, key
        key, now = jax.random.split(key)
        states, losses = run(states, jax.random.split(now, num))
        return float(losses.mean())

    return steps


# With the packages


def programs(
    model: Model, host: Any, dist: Any, concrete: Any, functions: Any, start: Any
) -> tuple[Callable, Callable]:
    """Model and guide, in Pyro or NumPyro: the same statements in both.

    :param functions: of :func:`in_torch` or :func:`in_jax`.
    :param start: the first θ and φ.
    """
    log_joint, q = functions

    def params(which):
        return {name: host.param(name, value) for name, value in start[which].items()}

    def energy(x):
        p = params(0)
        with host.plate("data", len(x)):
            flat = dist.Normal(0.0, 1.0).expand(model.shape).to_event(len(model.shape)).mask(False)
            v = host.sample("v", flat, obs=x)
            prior = dist.Bernoulli(0.5) if model.is_relaxed else dist.Normal(0.0, 1.0)
            h = host.sample("h", prior.expand([model.hidden]).to_event(1).mask(False))
            host.factor("energy", log_joint(p, v, h))

    def guide(x):
        p = params(1)
        with host.plate("data", len(x)):
            found = q(p, x)
            fn = concrete(TEMPERATURE, *found) if model.is_relaxed else dist.Normal(*found)
            host.sample("h", fn.to_event(1))

    return energy, guide


def _pyro(model: Model, x: np.ndarray, num_inner: int, strategy: Any, jit: bool) -> Steps:
    import pyro
    import pyro.distributions as dist
    import torch

    import pyro_bism
    from pyro_bism import BiSM, ConcreteBernoulli, DenoisingScoreMatching

    pyro.set_rng_seed(0)
    start = [{k: torch.from_numpy(v.copy()) for k, v in p.items()} for p in model.init(np.random.default_rng(1))]
    bism = BiSM(
        *programs(model, pyro, dist, ConcreteBernoulli, in_torch(model), start),
        pyro.optim.Adam({"lr": RATE, "betas": (BETA1, BETA2), "eps": EPS}),
        loss=DenoisingScoreMatching(model.sigma),
        num_inner_steps=num_inner,
        hypergradient=eval(strategy, vars(pyro_bism)),
        jit=jit,
    )
    data = torch.from_numpy(x)
    return lambda num: sum(bism.step(data) for _ in range(num)) / num


def pyro_eager(model: Model, x: np.ndarray, num_inner: int, num_unrolled: int, strategy: str) -> Steps:
    return _pyro(model, x, num_inner, strategy, jit=False)


def pyro_jit(model: Model, x: np.ndarray, num_inner: int, num_unrolled: int, strategy: str) -> Steps:
    return _pyro(model, x, num_inner, strategy, jit=True)


def numpyro_run(model: Model, x: np.ndarray, num_inner: int, num_unrolled: int, strategy: str) -> Steps:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    import optax

    import numpyro_bism
    from numpyro_bism import BiSM, ConcreteBernoulli, DenoisingScoreMatching

    start = [jax.tree.map(jnp.asarray, p) for p in model.init(np.random.default_rng(1))]
    bism = BiSM(
        *programs(model, numpyro, dist, ConcreteBernoulli, in_jax(model), start),
        optax.adam(RATE, b1=BETA1, b2=BETA2, eps=EPS, eps_root=EPS_ROOT),
        loss=DenoisingScoreMatching(model.sigma),
        num_inner_steps=num_inner,
        hypergradient=eval(strategy, vars(numpyro_bism)),
    )
    data = jnp.asarray(x)
    state, key = bism.init(jax.random.key(0), data), jax.random.key(1)

    def steps(num):
        nonlocal state, key
        key, now = jax.random.split(key)
        result = bism.run(now, num, data, progress_bar=False, init_state=state)
        state = result.state
        return float(result.losses.mean())

    return steps


CONTENDERS = {
    "higher": torch_higher,
    "torch by hand, eager": torch_eager,
    "pyro_bism, eager": pyro_eager,
    "torch by hand, compiled": torch_compiled,
    "pyro_bism, jit=True": pyro_jit,
    "JAX by hand, scan": jax_by_hand,
    "numpyro_bism, run": numpyro_run,
}
