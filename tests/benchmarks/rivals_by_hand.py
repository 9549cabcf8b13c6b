"""The rivals' steps by hand, as ``rivals.py`` times them: log p̃(v) written out, gradients the framework's own."""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from contenders import State, TorchStep, adam_in_jax, in_one_graph
from models import MODELS, TINY, in_jax, in_torch

import paper_checkerboard as paper

SETTING = paper.CHECKERBOARD
N, D, H, SIGMA = SETTING.batch_size, SETTING.visible, SETTING.hidden, SETTING.sigma


class ByHand:
    """The losses, on arrays of either framework.

    :param op: the framework's functions.
    :param name: of the method.
    """

    def __init__(self, op: SimpleNamespace, name: str):
        self.op, self.name = op, name
        self.log_joint, self.guide = op.model
        self.num_inner = paper.INNER_STEPS if name == "VNCE" else 0
        self.is_persistent = name.startswith("PCD")
        kind, _, k = name.partition("-")
        self.outer: Callable = getattr(self, kind.lower().removeprefix("p"))
        self.num_gibbs = int(k or 0)

    def start(self) -> tuple[dict, dict, np.ndarray]:
        """θ, φ, and h of the persistent chains."""
        values = paper.start(0, SETTING)
        phi = {name: values.pop(name) for name in ("guide_W", "guide_b")}
        if self.name in ("NCE", "VNCE"):
            # no scalar: by torch's rules Adam's float64 rate would make it float64
            values["log_z"] = np.zeros(1, np.float32)
        h = np.random.default_rng(0).integers(2, size=(N if self.is_persistent else 0, H)).astype(np.float32)
        return values, phi if self.num_inner else {}, h

    def log_prob(self, theta, v):
        op = self.op
        quadratic = 0.5 * op.square((v - theta["b"]) * op.exp(-theta["log_s"])).sum(-1)
        return op.softplus(theta["c"] + v @ theta["W"]).sum(-1) - quadratic

    def dsm(self, theta, phi, h, x, draw):
        noise = draw.normal((N, D))
        score = self.op.slope(partial(self.log_prob, theta), x + SIGMA * noise)
        return (0.5 * self.op.square(score + noise / SIGMA).sum(-1)).mean(), h

    def ssm(self, theta, phi, h, x, draw):
        w = self.op.sign(draw.normal((N, D)))
        score, along = self.op.slope_along(partial(self.log_prob, theta), x, w)
        return (0.5 * self.op.square(score).sum(-1) + (along * w).sum(-1)).mean(), h

    def cd(self, theta, phi, h, x, draw):
        op, fixed = self.op, self.op.constant(theta)
        normal, uniform = draw.normal((self.num_gibbs, N, D)), draw.uniform((self.num_gibbs + 1, N, H))
        scale = op.exp(fixed["log_s"])

        def bits(v, u):
            return 1.0 * (u < op.sigmoid(fixed["c"] + v @ fixed["W"]))

        if not self.is_persistent:
            h = bits(x, uniform[-1])
        for i in range(self.num_gibbs):
            v = fixed["b"] + scale**2 * (h @ fixed["W"].T) + scale * normal[i]
            h = bits(v, uniform[i])
        loss = self.log_prob(theta, v).mean() - self.log_prob(theta, x).mean()
        return loss, h if self.is_persistent else h[:0]

    @staticmethod
    def log_noise(v):
        return -0.5 * (v * v).sum(-1) - 0.5 * D * math.log(2 * math.pi)

    def nce(self, theta, phi, h, x, draw):
        def ratio(u):
            return self.log_prob(theta, u) - theta["log_z"] - self.log_noise(u)

        softplus = self.op.softplus
        return (softplus(-ratio(x)) + softplus(ratio(draw.normal((N, D))))).mean(), h

    def vnce(self, theta, phi, h, x, draw):
        op, u, y = self.op, draw.uniform((2, paper.NUM_PARTICLES, N, H)), draw.normal((N, D))

        def ratio(v, u):
            return self.log_ratio(theta, phi, v, u) - theta["log_z"] - self.log_noise(v)

        at_noise = op.logsumexp(ratio(y, u[1]), 0) - math.log(paper.NUM_PARTICLES)
        return (op.softplus(-ratio(x, u[0])).mean(0) + op.softplus(at_noise)).mean(), h

    def inner(self, phi, theta, x, u):
        return -self.log_ratio(theta, phi, x, u).mean()

    def log_ratio(self, theta, phi, v, u):
        """log p̃(v, h) - log q(h|v) at relaxed draws."""
        (logits,) = self.guide(phi, v)
        h = self.op.sigmoid((logits + self.op.log(u) - self.op.log(1 - u)) / paper.TEMPERATURE)
        return self.log_joint(theta, v, h) - (h * logits - self.op.softplus(logits)).sum(-1)


class JaxByHand(ByHand):
    """All steps in one scan."""

    def __init__(self, name: str, x: np.ndarray):
        import jax
        import jax.numpy as jnp

        def slope(f, v):
            return jax.grad(lambda v: f(v).sum())(v)

        nn = jax.nn
        super().__init__(
            SimpleNamespace(
                **{f: getattr(jnp, f) for f in ("exp", "log", "square")},
                **{f: getattr(nn, f) for f in ("softplus", "sigmoid", "logsumexp")},
                sign=lambda z: jnp.where(z < 0, -1.0, 1.0),
                slope=slope,
                slope_along=lambda f, v, w: jax.jvp(partial(slope, f), (v,), (w,)),
                constant=jax.lax.stop_gradient,
                model=in_jax(MODELS["checkerboard"]),
            ),
            name,
        )
        self.x = jnp.asarray(x)
        *levels, h = jax.tree.map(jnp.asarray, self.start())
        # copied: the loop works in place
        zeros = [[jax.tree.map(jnp.zeros_like, p) for _ in range(2)] for p in levels]
        states = [State(p, *z, jnp.zeros((), jnp.int32)) for p, z in zip(levels, zeros, strict=True)]
        self.state, self.key = (*states, h), jax.random.key(0)

        def run(state, keys):
            def step(state, key):
                phi, h, loss, gradient = self.gradient(state, key)
                return (adam_in_jax(state[0], gradient), phi, h), loss

            return jax.lax.scan(step, state, keys)

        self.run = jax.jit(run, donate_argnums=0)

    def gradient(self, state: Any, key: Any, is_fitted: bool = True) -> tuple:
        """φ, fitted if it is to be, the chains, the loss and its gradient."""
        import jax

        (theta, phi, h), (key_rows, *keys) = state, jax.random.split(key, 4)
        x, keys = self.x[self.rows(key_rows)], iter(keys)
        draw = SimpleNamespace(
            normal=lambda shape: jax.random.normal(next(keys), shape),
            uniform=lambda shape: jax.random.uniform(next(keys), shape, minval=TINY, maxval=1 - TINY),
        )
        if self.num_inner and is_fitted:
            for u in draw.uniform((self.num_inner, N, H)):
                phi = adam_in_jax(phi, jax.grad(self.inner)(phi.params, theta.params, x, u))
        loss = jax.value_and_grad(self.outer, has_aux=True)
        (value, h), gradient = loss(theta.params, phi.params, h, x, draw)
        return phi, h, value, gradient

    def rows(self, key: Any) -> Any:
        """Distinct rows: all drawn again where two are the same."""
        import jax

        def draw(key):
            return jax.numpy.sort(jax.random.randint(key, (N,), 0, len(self.x)))

        def again(carry):
            key, key_rows = jax.random.split(carry[0])
            return key, draw(key_rows)

        return jax.lax.while_loop(lambda c: (c[1][1:] == c[1][:-1]).any(), again, again((key, None)))[1]

    def steps(self, num: int) -> float:
        import jax

        self.key, now = jax.random.split(self.key)
        self.state, losses = self.run(self.state, jax.random.split(now, num))
        return float(losses.mean())


class TorchByHand(ByHand):
    """The whole step in one graph of torch's compiler, but for the choice of rows."""

    def __init__(self, name: str, x: np.ndarray):
        import torch
        from torch.utils import _pytree as pytree

        def slope(f, v):
            v = v.detach().requires_grad_()
            return torch.autograd.grad(f(v).sum(), v, create_graph=True)[0]

        def slope_along(f, v, w):
            v = v.detach().requires_grad_()
            (score,) = torch.autograd.grad(f(v).sum(), v, create_graph=True)
            return score, torch.autograd.grad((score * w).sum(), v, create_graph=True)[0]

        super().__init__(
            SimpleNamespace(
                **{f: getattr(torch, f) for f in ("exp", "log", "square", "sigmoid", "logsumexp")},
                softplus=torch.nn.functional.softplus,
                sign=lambda z: torch.where(z < 0, -1.0, 1.0),
                slope=slope,
                slope_along=slope_along,
                constant=lambda p: {k: v.detach() for k, v in p.items()},
                model=in_torch(MODELS["checkerboard"]),
            ),
            name,
        )
        self.x = torch.from_numpy(x)
        self.draw = SimpleNamespace(normal=torch.randn, uniform=lambda shape: torch.rand(shape).clamp_(TINY, 1 - TINY))
        *levels, h = pytree.tree_map(lambda a: torch.tensor(a), self.start())
        zeros = [[pytree.tree_map(torch.zeros_like, p) for _ in range(2)] for p in levels]
        states = [State(p, *z, torch.zeros((), dtype=torch.float64)) for p, z in zip(levels, zeros, strict=True)]
        self.state, self.spec = pytree.tree_flatten((*states, h))

        def whole(*values):
            theta, phi, h, loss = self.step(*pytree.tree_unflatten(values[:-2], self.spec), values[-2][values[-1]])
            return [v.detach() for v in (*pytree.tree_leaves((theta, phi, h)), loss)]

        self.compiled = in_one_graph(whole, *self.state, self.x, self.rows())

    def step(self, theta, phi, h, x):
        import torch

        if self.num_inner:
            for u in self.draw.uniform((self.num_inner, N, H)):
                phi = TorchStep.leaves(phi)
                gradient = torch.autograd.grad(self.inner(phi.params, theta.params, x, u), [*phi.params.values()])
                phi = TorchStep.adam(phi, gradient)
        theta = TorchStep.leaves(theta)
        loss, h = self.outer(theta.params, phi.params, h, x, self.draw)
        gradient = torch.autograd.grad(loss, [*theta.params.values()], allow_unused=True, materialize_grads=True)
        return TorchStep.adam(theta, gradient), phi, h, loss

    def rows(self) -> Any:
        """Distinct rows: all drawn again where two are the same."""
        import torch

        while True:
            rows = torch.randint(len(self.x), (N,))
            if len(set(rows.tolist())) == N:
                return rows

    def steps(self, num: int) -> float:
        import torch

        total = 0.0
        with torch.no_grad():
            for _ in range(num):
                *self.state, loss = self.compiled(*self.state, self.x, self.rows())
                total += loss.item()
        return total / num
