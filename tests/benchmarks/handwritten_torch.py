"""One BiSM step of the checkerboard RBM in bare eager torch: the yardstick for ``pyro_bism``.

The same mathematics as ``handwritten_jax.py``, name for name: plain tensors,
``torch.autograd.grad``, Adam by hand.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

SIGMA = 0.05
TEMPERATURE = 0.1
NUM_INNER_STEPS = 5
NUM_UNROLLED = 5
RATE, BETA1, BETA2, EPS = 1e-3, 0.9, 0.95, 1e-8
# inside the root: Adam's derivative at a zero gradient would be NaN without it
EPS_ROOT = 1e-16
# keeps the logit of a uniform draw finite
TINY = 1e-7


class Adam(NamedTuple):
    params: tuple[Tensor, ...]
    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    count: int


class State(NamedTuple):
    """θ is (W, b, c, log_s), φ is (W', b')."""

    theta: Adam
    phi: Adam


class Noise(NamedTuple):
    """Of all K + N + 1 passes: data noise, shape (passes, n, d); uniforms, (passes, n, k)."""

    v: Tensor
    h: Tensor


def adam_init(*params):
    zeros = tuple(torch.zeros_like(p) for p in params)
    return Adam(params, zeros, zeros, 0)


def adam_step(state, gradient):
    """Out of place and differentiable."""
    count = state.count + 1
    rate, bias2 = RATE / (1 - BETA1**count), 1 - BETA2**count
    params, first, second = [], [], []
    for p, m, s, g in zip(state.params, state.first, state.second, gradient, strict=True):
        m = torch.lerp(m, g, 1 - BETA1)
        s = torch.addcmul(BETA2 * s, g, g, value=1 - BETA2)
        params.append(torch.addcdiv(p, m, (s / bias2 + EPS_ROOT).sqrt() + EPS, value=-rate))
        first.append(m)
        second.append(s)
    return Adam(tuple(params), tuple(first), tuple(second), count)


def leaves(state):
    """The same state, its parameters cut off from the past and ready to be differentiated in."""
    return state._replace(params=tuple(p.detach().requires_grad_() for p in state.params))


def log_joint(theta, v, h):
    """log p̃(v, h) = -E(v, h), shape (n,)."""
    W, b, c, log_s = theta
    quadratic = 0.5 * ((v - b) * (-log_s).exp()).square().sum(-1)
    return h @ c + ((v @ W) * h).sum(-1) - quadratic


def logits(phi, v):
    W, b = phi
    return torch.addmm(b, v, W)


def draw(logit, uniform):
    """A Concrete draw: sigmoid((logit + log u - log(1 - u)) / T)."""
    return torch.sigmoid((logit + torch.logit(uniform)) / TEMPERATURE)


def log_guide(logit, h):
    """The Bernoulli cross-entropy at soft h, shape (n,)."""
    return -binary_cross_entropy_with_logits(logit, h, reduction="none").sum(-1)


def inner_loss(phi, theta, x, noise):
    """Mean over the batch of E_q [log q(h|ṽ) - log p̃(ṽ, h)], one draw each."""
    v = x + SIGMA * noise.v
    logit = logits(phi, v)
    h = draw(logit, noise.h)
    return (log_guide(logit, h) - log_joint(theta, v, h)).mean()


def outer_loss(theta, phi, x, noise):
    """Mean over the batch of ½ ‖∇_v [log p̃(ṽ, h) - log q(h|ṽ)] + ε/σ‖²."""
    v = x + SIGMA * noise.v
    # h carries a path to φ but none to v: it is drawn once and replayed while v moves
    h = draw(logits(phi, v), noise.h)
    v.requires_grad_()
    log_weight = log_joint(theta, v, h) - log_guide(logits(phi, v), h)
    (score,) = torch.autograd.grad(log_weight.sum(), v, create_graph=True)
    return 0.5 * (score + noise.v / SIGMA).square().sum(-1).mean()


def draw_noise(n, d, k, **options):
    """All noise of one step in two calls."""
    passes = NUM_INNER_STEPS + NUM_UNROLLED + 1
    uniform = torch.rand(passes, n, k, **options).clamp_(TINY, 1 - TINY)
    return Noise(torch.randn(passes, n, d, **options), uniform)


def step_with(state, x, noise):
    """One outer update with given noise."""
    noises = [Noise(v, h) for v, h in zip(noise.v, noise.h, strict=True)]
    # the K kept steps need no path to θ
    constant = tuple(p.detach() for p in state.theta.params)
    phi = state.phi
    for at in noises[:NUM_INNER_STEPS]:
        phi = leaves(phi)
        loss = inner_loss(phi.params, constant, x, at)
        gradient = torch.autograd.grad(loss, phi.params)
        with torch.no_grad():
            phi = adam_step(phi, gradient)
    kept = phi

    theta = leaves(state.theta)
    phi = leaves(kept)
    for at in noises[NUM_INNER_STEPS:-1]:
        loss = inner_loss(phi.params, theta.params, x, at)
        phi = adam_step(phi, torch.autograd.grad(loss, phi.params, create_graph=True))
    loss = outer_loss(theta.params, phi.params, x, noises[-1])
    gradient = torch.autograd.grad(loss, theta.params)
    with torch.no_grad():
        return State(adam_step(theta, gradient), kept), loss.detach()


def step(state, x):
    """One outer update with fresh noise: the state after it, and the outer loss."""
    k = len(state.phi.params[1])
    return step_with(state, x, draw_noise(*x.shape, k, dtype=x.dtype, device=x.device))


def init(d=2, k=4):
    """W, W' ~ N(0, 0.1²), biases nothing, standard deviation one."""
    theta = 0.1 * torch.randn(d, k), torch.zeros(d), torch.zeros(k), torch.zeros(d)
    return State(adam_init(*theta), adam_init(0.1 * torch.randn(d, k), torch.zeros(k)))
