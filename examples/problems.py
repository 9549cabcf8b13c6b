"""Twelve small problems on which hypergradients differ, each with a marginal in closed form or by quadrature.

Read by examples/hypergradients.py, which trains each by every strategy, several seeds side by side, and judges by the
exact objective of the marginal: the score-matching loss of ∇_v log p̃(v; θ) on fresh data, the constant of denoising
taken off (0 is a flat density, and lower is better), or the exact log-likelihood of the checkerboard.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import Trace_ELBO, TraceEnum_ELBO

import numpyro_bism as bism
from checkerboard import expected_log_likelihood
from hypergradients import Setting, programs

BATCH_SIZE, BETAS = 100, (0.9, 0.95)


@dataclass(frozen=True)
class Problem:
    """A model, a guide, their losses and data.

    :ivar log_marginal: log p̃(v; θ) of one v, from the parameters.
    :ivar test: fresh data; None where the log-likelihood is exact.
    """

    model: Callable
    guide: Callable
    log_marginal: Callable[[dict[str, Any], Any], Any]
    loss: Any
    x: np.ndarray
    test: np.ndarray | None
    inner_loss: Any
    steps: int
    rate: float = 1e-3


def network(name: str, sizes: list[int], scale: float = 1.0) -> Callable:
    """A multilayer perceptron of numpyro.param's, tanh between its layers."""
    weights = [
        (
            numpyro.param(f"{name}{i}.W", lambda key, a=a, b=b: scale * jax.random.normal(key, (a, b)) / np.sqrt(a)),
            numpyro.param(f"{name}{i}.b", jnp.zeros(b)),
        )
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    ]
    return lambda x: forward(weights, x)


def forward(weights: list, x: Any) -> Any:
    for W, b in weights[:-1]:
        x = jnp.tanh(x @ W + b)
    return x @ weights[-1][0] + weights[-1][1]


def layers(params: dict[str, Any], name: str) -> list:
    num = sum(key.startswith(name) and key.endswith(".W") for key in params)
    return [(params[f"{name}{i}.W"], params[f"{name}{i}.b"]) for i in range(num)]


def plate(x: Any) -> Any:
    return numpyro.plate("data", len(x), subsample_size=BATCH_SIZE)


def visible(x: Any, dims: int) -> Any:
    return numpyro.sample("v", dist.Normal(0.0, 1.0).expand([dims]).to_event(1).mask(False), obs=x)


def boltzmann(setting: Any, test: np.ndarray | None, column: Any = 1.0, *, summed: bool, deep: bool = False) -> Problem:
    """A Gaussian-Bernoulli restricted Boltzmann machine of v divided by ``column``; the guide sees v itself."""
    sizes, scale = (
        ([setting.visible, 64, 64, setting.hidden], 1.0) if deep else ([setting.visible, setting.hidden], 0.1)
    )
    latents = "summed" if summed else "relaxed"
    model, guide = programs(setting, latents, column, lambda: network("guide", sizes, scale))

    def log_marginal(params, v):
        v = v / column
        quadratic = 0.5 * jnp.square((v - params["b"]) * jnp.exp(-params["log_s"])).sum()
        return jax.nn.softplus(params["c"] + v @ params["W"]).sum() - quadratic

    loss = bism.DenoisingScoreMatching(setting.sigma, average="score" if summed else "loss")
    inner_loss = TraceEnum_ELBO(max_plate_nesting=2) if summed else Trace_ELBO()
    # the units stand in a plate of their own, right of the examples
    return Problem(model, guide, log_marginal, loss, setting.train[:, None], test, inner_loss, setting.steps)


def squares(summed: bool, deep: bool) -> Problem:
    """The paper's checkerboard."""
    return boltzmann(Setting("checkerboard"), None, summed=summed, deep=deep)


def scaled_column(summed: bool) -> Problem:
    """Six columns from four bits, the first a hundred times as large: the guide's Hessian is 1e4 times as ill."""
    rng = np.random.default_rng(0)
    W, column = rng.normal(size=(6, 4)), np.array([100, 1, 1, 1, 1, 1], np.float32)
    h = rng.random((24_000, 4)) < 0.5
    x = ((h @ W.T + 0.7 * rng.normal(size=(24_000, 6))) * column).astype(np.float32)
    setting = SimpleNamespace(
        train=x[:20_000], visible=6, hidden=4, batch=BATCH_SIZE, sigma=0.3, steps=12_000, log_s=0.0
    )
    return boltzmann(setting, x[20_000:], column, summed=summed)


def linear_gaussian(loss: Any, rate: float, guide_kind: str) -> Problem:
    """v of three columns, h of two, all Gaussian.

    ``guide_kind`` is "mlp", "linear", or "mean-field": independent latents for a posterior whose precision couples
    them by 0.8, which no guide of that kind can reach.
    """
    coupling = np.eye(2) + (0.8 * (1 - np.eye(2)) if guide_kind == "mean-field" else 0.0)
    rng = np.random.default_rng(5)
    L = rng.normal(size=(3, 2))
    x = (rng.normal(size=(9000, 2)) @ L.T + 0.5 * rng.normal(size=(9000, 3))).astype(np.float32)

    def model(x):
        W = numpyro.param("W", lambda key: 0.3 * jax.random.normal(key, (3, 2)))
        b, log_s = numpyro.param("b", jnp.zeros(3)), numpyro.param("log_s", jnp.zeros(3))
        with plate(x) as rows:
            v = visible(x[rows], 3)
            h = numpyro.sample("h", dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False))
            misfit = jnp.square((v - b - h @ W.T) * jnp.exp(-log_s)).sum(-1)
            numpyro.factor("energy", -0.5 * (misfit + ((h @ coupling) * h).sum(-1)))

    def guide(x):
        if guide_kind == "mlp":
            loc_and_scale = network("guide", [3, 64, 64, 4])
        else:
            loc, log_scale = network("guide", [3, 2], 0.1), numpyro.param("log_scale", jnp.zeros(2))
            lower = numpyro.param("lower", jnp.zeros(()))
        with plate(x) as rows:
            if guide_kind == "mlp":
                loc, log_scale = jnp.split(loc_and_scale(x[rows]), 2, -1)
                q = dist.Normal(loc, jnp.exp(log_scale)).to_event(1)
            elif guide_kind == "mean-field":
                q = dist.Normal(loc(x[rows]), jnp.exp(log_scale)).to_event(1)
            else:
                tril = jnp.diag(jnp.exp(log_scale)) + lower * jnp.array([[0.0, 0.0], [1.0, 0.0]])
                q = dist.MultivariateNormal(loc(x[rows]), scale_tril=tril)
            numpyro.sample("h", q)

    def log_marginal(params, v):
        precision = jnp.exp(-2 * params["log_s"])
        drive = ((v - params["b"]) * precision) @ params["W"]
        posterior = (params["W"].T * precision) @ params["W"] + coupling
        return 0.5 * drive @ jnp.linalg.solve(posterior, drive) - 0.5 * (jnp.square(v - params["b"]) * precision).sum()

    return Problem(model, guide, log_marginal, loss, x[:5000], x[5000:], Trace_ELBO(), 8000, rate)


def categories() -> Problem:
    """Eight Gaussians on a circle, the class summed out."""
    rng = np.random.default_rng(3)
    angle = rng.integers(0, 8, 24_000) * np.pi / 4
    x = (2 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.3 * rng.normal(size=(24_000, 2))).astype(np.float32)

    def model(x):
        mean = numpyro.param("mean", lambda key: jax.random.normal(key, (8, 2)))
        weight, log_s = numpyro.param("weight", jnp.zeros(8)), numpyro.param("log_s", jnp.zeros(()))
        with plate(x) as rows:
            v = visible(x[rows], 2)
            h = numpyro.sample("h", dist.Categorical(logits=jnp.zeros(8)).mask(False))
            numpyro.factor("energy", weight[h] - 0.5 * jnp.square((v - mean[h]) * jnp.exp(-log_s)).sum(-1))

    def guide(x):
        logits = network("guide", [2, 8])
        with plate(x) as rows:
            numpyro.sample("h", dist.Categorical(logits=logits(x[rows])), infer={"enumerate": "parallel"})

    def log_marginal(params, v):
        square = jnp.square((v - params["mean"]) * jnp.exp(-params["log_s"])).sum(-1)
        return jax.nn.logsumexp(params["weight"] - 0.5 * square)

    loss = bism.DenoisingScoreMatching(0.2, average="score")
    return Problem(
        model, guide, log_marginal, loss, x[:20_000], x[20_000:], TraceEnum_ELBO(max_plate_nesting=1), 20_000
    )


def deep_energy() -> Problem:
    """E(v, h) = ‖v - D(h)‖²/2s² + h²/2 + N(v, h) with networks D, N, and h of one dimension, on a curve."""
    rng = np.random.default_rng(4)
    t = rng.normal(size=24_000)
    x = (np.stack([t, np.sin(2 * t)], 1) + 0.15 * rng.normal(size=(24_000, 2))).astype(np.float32)

    def energy(decode, net, log_s, v, h):
        misfit = jnp.square((v - decode(h)) * jnp.exp(-log_s)).sum(-1) / 2
        return misfit + jnp.square(h).sum(-1) / 2 + net(jnp.concatenate([v, h], -1))[..., 0]

    def model(x):
        decode, net = network("decoder", [1, 32, 2]), network("net", [3, 32, 1], 0.5)
        log_s = numpyro.param("log_s", jnp.zeros(()))
        with plate(x) as rows:
            v = visible(x[rows], 2)
            h = numpyro.sample("h", dist.Normal(0.0, 1.0).expand([1]).to_event(1).mask(False))
            numpyro.factor("energy", -energy(decode, net, log_s, v, h))

    def guide(x):
        loc_and_scale = network("guide", [2, 64, 64, 2])
        with plate(x) as rows:
            loc, log_scale = jnp.split(loc_and_scale(x[rows]), 2, -1)
            numpyro.sample("h", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    grid = jnp.linspace(-8, 8, 401)[:, None]

    def log_marginal(params, v):
        def decode(h):
            return forward(layers(params, "decoder"), h)

        def net(x):
            return forward(layers(params, "net"), x)

        return jax.nn.logsumexp(-energy(decode, net, params["log_s"], jnp.broadcast_to(v, (401, 2)), grid))

    loss = bism.DenoisingScoreMatching(0.2)
    return Problem(model, guide, log_marginal, loss, x[:20_000], x[20_000:], Trace_ELBO(), 10_000)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "checkerboard, relaxed": lambda: squares(summed=False, deep=False),
    "checkerboard, relaxed, deep guide": lambda: squares(summed=False, deep=True),
    "checkerboard, summed out": lambda: squares(summed=True, deep=False),
    "checkerboard, summed out, deep guide": lambda: squares(summed=True, deep=True),
    "a column times 100, relaxed": lambda: scaled_column(summed=False),
    "a column times 100, summed out": lambda: scaled_column(summed=True),
    "linear-Gaussian, denoising, deep guide": lambda: linear_gaussian(bism.DenoisingScoreMatching(0.3), 1e-3, "mlp"),
    "linear-Gaussian, exact": lambda: linear_gaussian(bism.ScoreMatching(), 5e-3, "linear"),
    "linear-Gaussian, sliced": lambda: linear_gaussian(bism.SlicedScoreMatching(), 5e-3, "linear"),
    "linear-Gaussian, mean-field guide": lambda: linear_gaussian(bism.DenoisingScoreMatching(0.3), 1e-3, "mean-field"),
    "classes, summed out": categories,
    "deep energy": deep_energy,
}


def engine(problem: Problem, strategy: str, optim: Any = None) -> bism.BiSM:
    """Adam at both levels, if no other ``optim`` is given for the model."""
    adam = optax.adam(problem.rate, *BETAS)
    settings = {"inner_optim": adam, "inner_loss": problem.inner_loss, "hypergradient": eval(strategy, vars(bism))}
    return bism.BiSM(problem.model, problem.guide, optim or adam, problem.loss, **settings)


def trained(problem: Problem, strategy: str, seeds: int, steps: int) -> tuple[list[dict[str, Any]], float, str]:
    """Parameters at every seed, milliseconds a step (all seeds side by side), and which strategy it was."""
    trainer = engine(problem, strategy)
    x, part = jnp.asarray(problem.x), max(steps // 4, 1)
    states = [trainer.init(jax.random.key(seed), x) for seed in range(seeds)]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    @jax.jit
    @jax.vmap
    def several(state):
        return jax.lax.scan(lambda state, _: (trainer.update(state, x)[0], None), state, length=part)[0]

    seconds = []
    for _ in range(4):
        begun = time.perf_counter()
        state = jax.block_until_ready(several(state))
        seconds.append(time.perf_counter() - begun)
    found = [trainer.get_params(jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(seeds)]
    return found, 1e3 * sum(seconds[1:]) / (3 * part), repr(trainer.hypergradient)


def judged(problem: Problem, params: dict[str, Any]) -> float:
    """The exact objective, lower is better; NaN where the parameters are not finite."""
    if not all(np.isfinite(value).all() for value in jax.tree.leaves(params)):
        return float("nan")
    if problem.test is None:
        return -expected_log_likelihood({name: np.asarray(value) for name, value in params.items()})
    v = jnp.asarray(problem.test)

    def score(v):
        return jax.grad(problem.log_marginal, 1)(params, v)

    if problem.loss.differentiates_score:
        losses = jax.vmap(lambda v: 0.5 * jnp.square(score(v)).sum() + jnp.trace(jax.jacfwd(score)(v)))(v)
        return float(losses.mean())
    noise = jax.random.normal(jax.random.key(99), v.shape)
    scores = jax.vmap(score)(v + problem.loss.sigma * noise)
    # ½‖s + ε/σ‖² without what has no s in it
    return float((0.5 * jnp.square(scores).sum(-1) + (scores * noise).sum(-1) / problem.loss.sigma).mean())
