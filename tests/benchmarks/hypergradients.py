"""Time a BiSM step of a large RBM for every hypergradient: ``pyro_bism`` beside the same work by hand.

    OMP_NUM_THREADS=1 python tests/benchmarks/hypergradients.py --rounds 7 --steps 5
    python tests/benchmarks/hypergradients.py --jit
    python tests/benchmarks/hypergradients.py --check 50 --strategies implicit amortized

A Gaussian-Bernoulli RBM of 560 visible and 400 hidden units, one fixed batch of 100, K = 5, denoising
with σ = 0.3, Adam at both levels, float32. By hand means bare torch: plain tensors,
``torch.autograd.grad``, Adam in place. Both draw the same random numbers in the same order and so walk the
same way, which is checked before anything is timed. The two take turns, round by round, so that a machine
that slows down slows down both; the ratio printed is the median of the rounds' own ratios.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor
from torch.distributions.utils import clamp_probs
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

import pyro_bism
from pyro_bism import BiSM, ConcreteBernoulli, DenoisingScoreMatching

BATCH, VISIBLE, HIDDEN = 100, 560, 400
SIGMA, TEMPERATURE, NUM_INNER_STEPS, RATE = 0.3, 0.1, 5, 2e-4
PRODUCTS, STRENGTH, PARTICLES, UNROLLED = 5, 100.0, 2, 5
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
MOMENT_DECAY, RATE_FRACTION = 0.99, 0.1  # as Amortized's

Tensors = Sequence[Tensor]


@dataclass
class Contender:
    """
    :ivar steps: takes that many steps; returns their mean outer loss.
    :ivar norm: of the last hypergradient.
    :ivar products: Hessian products that the last step took.
    """

    steps: Callable[[int], float]
    norm: Callable[[], float]
    products: Callable[[], int] = lambda: 0


# By hand: Adam


@dataclass
class Adam:
    params: tuple[Tensor, ...]
    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    count: int = 0

    @classmethod
    def of(cls, params: Tensors) -> "Adam":
        params = tuple(p.clone().requires_grad_() for p in params)
        return cls(params, tuple(map(torch.zeros_like, params)), tuple(map(torch.zeros_like, params)))

    @torch.no_grad()
    def descend(self, gradient: Tensors) -> None:
        """In place."""
        self.count += 1
        rate, root2 = RATE / (1 - BETA1**self.count), math.sqrt(1 - BETA2**self.count)
        for p, m, s, g in zip(self.params, self.first, self.second, gradient, strict=True):
            m.lerp_(g, 1 - BETA1)
            s.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            p.addcdiv_(m, s.sqrt().div_(root2).add_(EPS), value=-rate)

    def ahead(self, gradient: Tensors) -> "Adam":
        """Out of place and differentiable."""
        count = self.count + 1
        rate, root2 = RATE / (1 - BETA1**count), math.sqrt(1 - BETA2**count)
        rows = []
        for p, m, s, g in zip(self.params, self.first, self.second, gradient, strict=True):
            m = torch.lerp(m, g, 1 - BETA1)
            s = torch.addcmul(BETA2 * s, g, g, value=1 - BETA2)
            # clamped: the root's derivative at a zero gradient would be infinite
            root = s.clamp_min(torch.finfo(s.dtype).tiny).sqrt() + EPS * root2
            rows.append((torch.addcdiv(p, m, root, value=-rate * root2), m, s))
        return Adam(*zip(*rows, strict=True), count)


# By hand: the two losses. θ is (W, b, c), φ is (W', b')


class Noise(NamedTuple):
    """Of one evaluation: Gaussian for the data; uniform for the relaxed latents, None if they are summed out."""

    v: Tensor
    h: Tensor | None


def draw_noise(x: Tensor, summed: bool) -> Noise:
    v = torch.randn_like(x)
    return Noise(v, None if summed else clamp_probs(torch.rand(len(x), HIDDEN)))


def log_joint(theta: Tensors, v: Tensor, h: Tensor) -> Tensor:
    """log p̃(v, h), shape (n,)."""
    W, b, c = theta
    return h @ c + ((v @ W) * h).sum(-1) - 0.5 * (v - b).square().sum(-1)


def logits(phi: Tensors, v: Tensor) -> Tensor:
    W, b = phi
    return torch.addmm(b, v, W)


def draw(logit: Tensor, uniform: Tensor) -> Tensor:
    """A Concrete draw: sigmoid((logit + log u - log(1 - u)) / T)."""
    return torch.sigmoid((logit + torch.logit(uniform)) / TEMPERATURE)


def log_guide(logit: Tensor, h: Tensor) -> Tensor:
    """The Bernoulli cross-entropy at soft h, shape (n,)."""
    return -binary_cross_entropy_with_logits(logit, h, reduction="none").sum(-1)


def inner_loss(theta: Tensors, phi: Tensors, x: Tensor, noise: Noise) -> Tensor:
    """G: the mean over the batch of E_q [log q(h|ṽ) - log p̃(ṽ, h)]."""
    v = x + SIGMA * noise.v
    logit = logits(phi, v)
    if noise.h is None:
        q = torch.sigmoid(logit)
        return ((q * logit - softplus(logit)).sum(-1) - log_joint(theta, v, q)).mean()
    h = draw(logit, noise.h)
    return (log_guide(logit, h) - log_joint(theta, v, h)).mean()


def outer_loss(theta: Tensors, phi: Tensors, x: Tensor, noise: Noise) -> Tensor:
    """J: the mean over the batch of ½ ‖∇_v E_q [log p̃(ṽ, h) - log q(h|ṽ)] + ε/σ‖², h held fixed."""
    v = x + SIGMA * noise.v
    logit = logits(phi, v)
    h = torch.sigmoid(logit) if noise.h is None else draw(logit, noise.h)
    v.requires_grad_()
    log_weight = log_joint(theta, v, h)
    if noise.h is not None:  # summed out, ∇_v log q is 0 on average
        log_weight = log_weight - log_guide(logits(phi, v), h)
    (score,) = torch.autograd.grad(log_weight.sum(), v, create_graph=True)
    return 0.5 * (score + noise.v / SIGMA).square().sum(-1).mean()


# By hand: the hypergradients. Each returns J, dJ/dθ and what it carries to the next step


# c, on which the score depends only through φ, often has none
gradients = partial(torch.autograd.grad, allow_unused=True, materialize_grads=True)


@dataclass
class Problem:
    """
    :ivar inner_noise: of the K inner steps just taken.
    :ivar products: Hessian products taken so far.
    """

    theta: tuple[Tensor, ...]
    phi: Adam
    x: Tensor
    summed: bool
    inner_noise: list[Noise]
    products: int = 0

    def draw(self) -> Noise:
        return draw_noise(self.x, self.summed)

    def outer(self, phi: Tensors) -> Tensor:
        return outer_loss(self.theta, phi, self.x, self.draw())

    def inner(self, phi: Tensors) -> Tensor:
        return inner_loss(self.theta, phi, self.x, self.draw())


def detached(problem: Problem, state: Any) -> tuple[Tensor, Tensors, Any]:
    loss = problem.outer(problem.phi.params)
    return loss, gradients(loss, problem.theta), state


def unrolled(problem: Problem, state: Any) -> tuple[Tensor, Tensors, Any]:
    phi = problem.phi
    for _ in range(UNROLLED):
        loss = problem.inner(phi.params)
        phi = phi.ahead(torch.autograd.grad(loss, phi.params, create_graph=True))
    loss = problem.outer(phi.params)
    return loss, gradients(loss, problem.theta), state


def flat(values: Tensors) -> Tensor:
    return torch.cat([x.reshape(-1) for x in values])


def system(problem: Problem) -> tuple[Tensor, Tensors, Tensor, Callable[[Tensor, Tensors], Tensors]]:
    """J, ∂J/∂θ, ∂J/∂φ, and the product of a flat x with ∂²G/∂φ∂(inputs)."""
    phi, num = problem.phi.params, len(problem.theta)
    loss = problem.outer(phi)
    gradient = gradients(loss, [*problem.theta, *phi])
    slope = torch.autograd.grad(problem.inner(phi), phi, create_graph=True)
    sizes = [p.numel() for p in phi]

    def product(x: Tensor, inputs: Tensors) -> Tensors:
        problem.products += 1
        parts = [part.view_as(p) for part, p in zip(x.split(sizes), phi, strict=True)]
        return gradients(slope, inputs, grad_outputs=parts, retain_graph=True)

    return loss, gradient[:num], flat(gradient[num:]), product


def minus(direct: Tensors, cross: Tensors) -> list[Tensor]:
    return [a - b for a, b in zip(direct, cross, strict=True)]


def implicit(problem: Problem, state: Any) -> tuple[Tensor, Tensors, Any]:
    """Conjugate gradients; they stop where the curvature is not positive."""
    loss, direct, rhs, product = system(problem)
    x, r, p, square = torch.zeros_like(rhs), rhs, rhs, rhs.dot(rhs).item()
    for _ in range(PRODUCTS):
        image = flat(product(p, problem.phi.params))
        bend = p.dot(image).item()
        if bend <= 0:
            break
        length = square / bend
        x, r = x + length * p, r - length * image
        previous, square = square, r.dot(r).item()
        p = r + square / previous * p
    return loss, minus(direct, product(x, problem.theta)), state


def amortized(problem: Problem, state: Any) -> tuple[Tensor, Tensors, Any]:
    """One product for the power iteration, one for the solution and the cross derivative."""
    loss, direct, rhs, product = system(problem)
    x, d, bend, square = state or (torch.zeros_like(rhs), rhs / rhs.norm(), 0.0, 0.0)
    image = flat(product(d, problem.phi.params))
    length = image.norm().item()
    bend, square = MOMENT_DECAY * bend + d.dot(image).item(), MOMENT_DECAY * square + length**2
    found = product(x, [*problem.theta, *problem.phi.params])
    num = len(problem.theta)
    x = x - RATE_FRACTION * bend / square * (flat(found[num:]) - rhs)
    return loss, minus(direct, found[:num]), (x, image / length, bend, square)


def penalty(problem: Problem, state: Any) -> tuple[Tensor, Tensors, Any]:
    """The second guide takes K steps with the first one's noise; then three evaluations."""
    theta, x, psi = problem.theta, problem.x, state
    for noise in problem.inner_noise:
        loss = inner_loss(theta, psi.params, x, noise) + problem.outer(psi.params) / STRENGTH
        psi.descend(torch.autograd.grad(loss, psi.params))
    loss = problem.outer(psi.params)
    noise = problem.draw()
    raised = gradients(loss + STRENGTH * inner_loss(theta, psi.params, x, noise), theta)
    at_phi = gradients(inner_loss(theta, problem.phi.params, x, noise), theta)
    return loss, [a - STRENGTH * b for a, b in zip(raised, at_phi, strict=True)], psi


def covariance(problem: Problem, state: Any) -> tuple[Tensor, Tensors, Any]:
    """Draws of bits; every term of the score has its value from one place, its derivative in θ from another."""
    noise = torch.randn_like(problem.x)
    v = (problem.x + SIGMA * noise).requires_grad_()
    phi = [p.detach() for p in problem.phi.params]
    joints, scores, guide_scores = [], [], []
    for _ in range(PARTICLES):
        h = torch.bernoulli(torch.sigmoid(logits(phi, v.detach())))
        joint = log_joint(problem.theta, v, h)
        joints.append(joint)
        scores.append(torch.autograd.grad(joint.sum(), v, create_graph=True)[0])
        guide_scores.append(torch.autograd.grad(log_guide(logits(phi, v), h).sum(), v)[0])
    model_scores, joint = torch.stack(scores), torch.stack(joints)
    fixed = model_scores.detach()
    centred = fixed - fixed.mean(0)
    score = (fixed - torch.stack(guide_scores)).mean(0) + (model_scores - fixed).mean(0)
    score = score + (centred * (joint - joint.detach()).unsqueeze(-1)).sum(0) / (PARTICLES - 1)
    loss = 0.5 * (score + noise / SIGMA).square().sum(-1).mean()
    return loss, gradients(loss, problem.theta), state


def by_hand(hypergradient: Callable, x: Tensor, theta: Tensors, phi: Tensors, summed: bool) -> Contender:
    """Bare torch, eager autograd."""
    outer, inner = Adam.of(theta), Adam.of(phi)
    state = Adam.of(phi) if hypergradient is penalty else None
    gradient: Tensors = ()
    products = 0

    def step() -> Tensor:
        nonlocal state, gradient, products
        constant = [p.detach() for p in outer.params]
        noises = []
        for _ in range(NUM_INNER_STEPS):
            noises.append(draw_noise(x, summed))
            loss = inner_loss(constant, inner.params, x, noises[-1])
            inner.descend(torch.autograd.grad(loss, inner.params))
        problem = Problem(outer.params, inner, x, summed, noises)
        loss, gradient, state = hypergradient(problem, state)
        outer.descend(gradient)
        products = problem.products
        return loss

    return Contender(
        lambda num: sum(step().item() for _ in range(num)) / num,
        lambda: flat(gradient).norm().item(),
        lambda: products,
    )


# With the package


def relaxed_programs(theta: Tensors, phi: Tensors) -> tuple[Callable, Callable]:
    def model(x):
        W, b, c = (pyro.param(name, p.clone) for name, p in zip("Wbc", theta, strict=True))
        with pyro.plate("data", len(x)):
            flat_normal = dist.Normal(0.0, 1.0).expand([VISIBLE]).to_event(1).mask(False)
            v = pyro.sample("x", flat_normal, obs=x)
            h = pyro.sample("h", dist.Bernoulli(0.5).expand([HIDDEN]).to_event(1).mask(False))
            pyro.factor("energy", h @ c + ((v @ W) * h).sum(-1) - 0.5 * (v - b).square().sum(-1))

    def guide(x):
        W, b = pyro.param("guide_W", phi[0].clone), pyro.param("guide_b", phi[1].clone)
        with pyro.plate("data", len(x)):
            pyro.sample("h", ConcreteBernoulli(TEMPERATURE, x @ W + b).to_event(1))

    return model, guide


def summed_programs(theta: Tensors, phi: Tensors) -> tuple[Callable, Callable]:
    def model(x):
        W, b, c = (pyro.param(name, p.clone) for name, p in zip("Wbc", theta, strict=True))
        with pyro.plate("data", len(x), dim=-2):
            flat_normal = dist.Normal(0.0, 1.0).expand([VISIBLE]).to_event(1).mask(False)
            v = pyro.sample("x", flat_normal, obs=x)
            pyro.factor("quadratic", -0.5 * (v - b).square().sum(-1))
            with pyro.plate("units", HIDDEN, dim=-1):
                h = pyro.sample("h", dist.Bernoulli(0.5).mask(False))
                pyro.factor("unit", h * (c + (v @ W).squeeze(-2)))

    def guide(x):
        W, b = pyro.param("guide_W", phi[0].clone), pyro.param("guide_b", phi[1].clone)
        with pyro.plate("data", len(x), dim=-2):
            logit = (x @ W).squeeze(-2) + b
            with pyro.plate("units", HIDDEN, dim=-1):
                pyro.sample("h", dist.Bernoulli(logits=logit), infer={"enumerate": "parallel"})

    return model, guide


def with_package(
    hypergradient: Any, x: Tensor, theta: Tensors, phi: Tensors, summed: bool, jit: bool = False
) -> Contender:
    """``pyro_bism``'s ``step``."""
    pyro.clear_param_store()
    model, guide = (summed_programs if summed else relaxed_programs)(theta, phi)
    bism = BiSM(
        model,
        guide,
        pyro.optim.Adam({"lr": RATE, "betas": (BETA1, BETA2), "eps": EPS}),
        loss=DenoisingScoreMatching(SIGMA, average="score" if summed else "loss"),
        inner_loss=TraceEnum_ELBO(max_plate_nesting=2) if summed else Trace_ELBO(),
        num_inner_steps=NUM_INNER_STEPS,
        hypergradient=hypergradient,
        jit=jit,
    )
    data = x[:, None] if summed else x
    bism.evaluate_loss(data)  # the programs are analysed at their first run, with random draws
    return Contender(lambda num: sum(bism.step(data) for _ in range(num)) / num, lambda: bism.info.hypergradient_norm)


STRATEGIES = {
    "detached": (detached, pyro_bism.Detached()),
    "unrolled": (unrolled, pyro_bism.Unrolled(UNROLLED)),
    "implicit": (implicit, pyro_bism.Implicit("cg", PRODUCTS)),
    "amortized": (amortized, pyro_bism.Amortized()),
    "penalty": (penalty, pyro_bism.Penalty(STRENGTH)),
    "covariance": (covariance, pyro_bism.Covariance(PARTICLES)),
}


def start(seed: int = 0) -> tuple[Tensor, Tensors, Tensors]:
    """The batch, of low rank and some noise; θ and φ."""
    torch.manual_seed(seed)
    x = 0.5 + torch.randn(BATCH, 20) @ torch.randn(20, VISIBLE) / math.sqrt(20) + 0.1 * torch.randn(BATCH, VISIBLE)
    theta = 0.01 * torch.randn(VISIBLE, HIDDEN), torch.zeros(VISIBLE), torch.zeros(HIDDEN)
    return x, theta, (0.01 * torch.randn(VISIBLE, HIDDEN), torch.zeros(HIDDEN))


def contenders(name: str, summed: bool, jit: bool) -> tuple[Contender, Contender]:
    """By hand, and with the package."""
    hand, package = STRATEGIES[name]
    x, theta, phi = start()
    return by_hand(hand, x, theta, phi, summed), with_package(package, x, theta, phi, summed, jit)


def check(name: str, summed: bool, num_steps: int, jit: bool) -> str:
    """Both step by step from the same start with the same random numbers.

    :raises AssertionError: if the two part.
    """
    pair = contenders(name, summed, jit)
    losses: list[list[float]] = [[], []]
    norms: list[list[float]] = [[], []]
    for n in range(num_steps):
        for contender, loss, norm in zip(pair, losses, norms, strict=True):
            torch.manual_seed(n)
            loss.append(contender.steps(1))
            norm.append(contender.norm())
    worst = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
    first, last = abs(norms[1][0] / norms[0][0] - 1), abs(norms[1][-1] / norms[0][-1] - 1)
    line = (
        f"{name:12}loss {losses[0][0]:.3f} -> {losses[0][-1]:.3f} by hand, {losses[1][0]:.3f} -> {losses[1][-1]:.3f} "
        f"ours; apart by {worst:.1e} at most; |dJ/dθ| by {first:.1e} at first, {last:.1e} at last"
    )
    assert worst < 1e-3 and first < 1e-3, line
    return line


def measure(name: str, summed: bool, rounds: int, num_steps: int, jit: bool) -> str:
    """A row of the table."""
    pair = contenders(name, summed, jit)
    times: tuple[list[float], list[float]] = ([], [])
    for n in range(rounds + 1):
        for contender, seconds in zip(pair, times, strict=True):
            torch.manual_seed(n)
            begin = time.perf_counter()
            contender.steps(num_steps)
            seconds.append((time.perf_counter() - begin) / num_steps)
    hand, ours = times[0][1:], times[1][1:]  # the first round is not counted
    ratios = [b / a for a, b in zip(hand, ours, strict=True)]
    return (
        f"{name:12}{1e3 * median(ours):10.1f}{1e3 * median(hand):10.1f}{median(ratios):8.2f}"
        f"{min(ratios):8.2f}{max(ratios):8.2f}{pair[0].products():10d}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--latents", choices=["relaxed", "summed"], default="relaxed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jit", action="store_true", help="the package with jit=True; by hand stays eager")
    parser.add_argument("--check", type=int, metavar="STEPS", help="compare that many steps, and time nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    summed = args.latents == "summed"
    for name in args.strategies:
        line = check(name, summed, args.check or 2, args.jit)
        if args.check:
            print(line, flush=True)
    if args.check:
        return
    print(
        f"RBM {VISIBLE}x{HIDDEN}, batch {BATCH}, K = {NUM_INNER_STEPS}, {args.latents} latents, "
        f"{'jit, ' if args.jit else ''}{args.threads} threads, median of {args.rounds} rounds of {args.steps} steps"
    )
    print(f"{'':12}{'ms ours':>10}{'by hand':>10}{'ratio':>8}{'least':>8}{'most':>8}{'products':>10}")
    for name in args.strategies:
        print(measure(name, summed, args.rounds, args.steps, args.jit), flush=True)
    print("products: Hessian products of the last step, the cross product among them")


if __name__ == "__main__":
    main()
