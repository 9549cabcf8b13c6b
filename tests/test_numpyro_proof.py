"""The proof of structure on JAX's own ground: whatever a program does, no degree is ever too low."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax

from numpyro_bism import ConcreteBernoulli, ConcreteOneHot
from numpyro_bism.energies import COVARIATES, VISIBLE, Energy
from numpyro_bism.energies.proof import log_density, prove_function
from numpyro_bism.programs import records, visible

N, D, H, K = 17, 3, 2, 3  # a prime number of rows, no multiple of which is a length here
UNKNOWN = math.inf
rng = np.random.default_rng(0)
W, P, MU = (rng.normal(size=shape).astype(np.float32) for shape in ((D, H), (D, D), (K, D)))
COVARIATE, LONG = np.arange(N, dtype=np.float32)[:, None], np.arange(40.0, dtype=np.float32)
KEEP = np.array([True, False, True])


@jax.custom_jvp
def lie(x):
    return x**2


lie.defjvp(lambda x, t: (lie(*x), *t))


@jax.custom_jvp
def nothing(x):
    return jnp.zeros(len(x))


nothing.defjvp(lambda x, t: (nothing(*x), t[0].sum(-1)))


@jax.custom_vjp
def backwards(x):
    return (x**2).sum(-1)


backwards.defvjp(lambda x: (backwards(x), x), lambda x, g: (g[:, None] * x**3,))


def sq(x):
    return (x**2).sum(-1)


def through(body, length=4):
    return lambda p: lax.fori_loop(0, length, lambda i, total: body(total, p.v[:, 0], i), jnp.ones(N))


def until(p):
    return lax.while_loop(
        lambda c: (c[0] < 3) & (c[1].sum() < 9), lambda c: (c[0] + 1, c[1] + p.v[:, 0]), (0, p.v[:, 1])
    )[1]


def normal(loc, scale, v):
    return dist.Normal(loc, scale).to_event(1).log_prob(v)


# program: degrees in v and in h, whether v's entries stay apart, whether rows are told apart
PROGRAMS = {
    "constant": (lambda p: jnp.zeros(N), 0, 0, True, False),
    "sum": (lambda p: p.v.sum(-1) - p.h.sum(-1), 1, 1, True, False),
    "square": (lambda p: sq(p.v), 2, 0, True, False),
    "float power": (lambda p: (p.v**2.0).sum(-1), 2, 0, True, False),
    "power of an array": (lambda p: (p.v ** jnp.full((D,), 2.0)).sum(-1), 2, 0, True, False),
    "half power": (lambda p: (p.v**2.5).sum(-1), UNKNOWN, 0, False, False),
    "negative power": (lambda p: (p.v**-2).sum(-1), UNKNOWN, 0, False, False),
    "power that varies": (lambda p: (2.0**p.v).sum(-1), UNKNOWN, 0, False, False),
    "product with itself": (lambda p: (p.v * p.v).sum(-1), 2, 0, True, False),
    "dot with itself": (lambda p: jnp.einsum("ni,ni->n", p.v, p.v), 2, 0, True, False),
    "dot with another order": (lambda p: jnp.einsum("ni,ni->n", p.v, p.v[:, ::-1]), 2, 0, False, False),
    "neighbours": (lambda p: (p.v[:, 1:] * p.v[:, :-1]).sum(-1), 2, 0, False, False),
    "sums of neighbours": (lambda p: sq(p.v[:, 1:] + p.v[:, :-1]), 2, 0, False, False),
    "picked twice": (lambda p: (p.v[:, KEEP.nonzero()[0]] * p.v[:, np.array([1, 0])]).sum(-1), 2, 0, False, False),
    "two picks by one function": (
        lambda p: (jax.jit(jnp.take, static_argnums=2)(p.v, jnp.array([0, 1]), 1)
                   * jax.jit(jnp.take, static_argnums=2)(p.v, jnp.array([1, 2]), 1)).sum(-1),
        2, 0, False, False,
    ),
    "outer": (lambda p: (p.v[:, :, None] * p.v[:, None, :]).sum((1, 2)), 2, 0, False, False),
    "matrix": (lambda p: ((p.v @ P) * p.v).sum(-1), 2, 0, False, False),
    "three factors": (lambda p: jnp.einsum("ni,ij,nj->n", p.v, W, p.h), 1, 1, True, False),
    "square of a sum": (lambda p: p.v.sum(-1) ** 2, 2, 0, False, False),
    "residual": (lambda p: sq(p.v - p.h @ W.T), 2, 2, True, False),
    "scaled": (lambda p: sq(p.v / jnp.exp(p.h @ W.T)), 2, UNKNOWN, True, False),
    "divided by itself": (lambda p: (p.v[:, 0] / (1 + p.v[:, 1] ** 2)), UNKNOWN, 0, False, False),
    "side by side": (lambda p: sq(jnp.concatenate([p.v, p.h], 1)), 2, 2, True, False),
    "side by side and apart": (lambda p: (jnp.concatenate([p.v, p.h], 1)[:, :D] ** 2).sum(-1), 2, 0, True, False),
    "a part of one side": (lambda p: (jnp.concatenate([p.v, p.h], 1)[:, 1:3] ** 2).sum(-1), 2, 0, True, False),
    "stacked": (lambda p: sq(jnp.stack([p.v, 2 * p.v], -1).reshape(N, -1)), 2, 0, False, False),
    "product of entries": (lambda p: p.v.prod(-1), 3, 0, False, False),
    "masked": (lambda p: jnp.where(KEEP, p.v**2, p.v).sum(-1), 2, 0, True, False),
    "clipped": (lambda p: jnp.clip(p.v, -9, 9).sum(-1), UNKNOWN, 0, False, False),
    "relu": (lambda p: jax.nn.relu(p.v).sum(-1), UNKNOWN, 0, False, False),
    "wall": (lambda p: jnp.where(p.v[:, 0] > 99, -50.0, p.h[:, 0]), UNKNOWN, 1, False, False),
    "rare state": (lambda p: jnp.where((p.h == 0).all(-1), sq(p.v), 0.0), 2, UNKNOWN, True, False),
    "finite": (lambda p: jnp.where(jnp.isfinite(p.v), p.v**2, 0.0).sum(-1), 2, 0, True, False),
    "no number": (lambda p: jnp.where(jnp.isnan(jnp.log(p.v)), 0.0, p.v).sum(-1), UNKNOWN, 0, False, False),
    "rounded": (lambda p: p.v.astype(int).astype(float).sum(-1), UNKNOWN, 0, False, False),
    "cast": (lambda p: sq(p.v.astype(jnp.float16)).astype(jnp.float32), 2, 0, True, False),
    "largest": (lambda p: p.v.max(-1), UNKNOWN, 0, False, False),
    "sorted": (lambda p: jnp.sort(p.v)[:, 0], UNKNOWN, 0, False, False),
    "table": (lambda p: sq(p.v - jnp.asarray(MU)[p.z]), 2, 0, True, False),
    "picked by a label": (lambda p: jnp.take_along_axis(p.v, p.z[:, None], 1)[:, 0], 1, 0, True, False),
    "written": (lambda p: sq(p.v.at[:, 0].set(p.v[:, 1])), 2, 0, False, False),
    "added": (lambda p: p.v.at[:, 0].add(p.v[:, 1] ** 2).sum(-1), 2, 0, True, False),
    "multiplied": (lambda p: p.v.at[:, 0].multiply(2.0).sum(-1), UNKNOWN, 0, False, False),
    "held": (lambda p: (p.v * lax.stop_gradient(p.v)).sum(-1), UNKNOWN, 0, False, False),
    "held in another's place": (lambda p: lax.stop_gradient(p.v).sum(-1) * p.h[:, 0], UNKNOWN, 1, False, False),
    "lie": (lambda p: lie(p.v).sum(-1), UNKNOWN, 0, False, False),
    "lie about nothing": (lambda p: nothing(p.v), UNKNOWN, 0, False, False),
    "lie backwards": (lambda p: backwards(p.v), UNKNOWN, 0, False, False),
    "told by the host": (
        lambda p: jax.pure_callback(lambda a: a.sum(-1), jax.ShapeDtypeStruct((N,), jnp.float32), p.v),
        UNKNOWN, 0, False, False,
    ),
    "recomputed": (lambda p: jax.checkpoint(sq)(p.v), 2, 0, True, False),
    "compiled": (lambda p: jax.jit(sq)(p.v) + jax.jit(sq)(p.h), 2, 2, True, False),
    "row by row": (lambda p: jax.vmap(lambda v, h: v @ P @ v + v @ W @ h)(p.v, p.h), 2, 1, False, False),
    "mapped": (lambda p: lax.map(lambda v: (v**2).sum(), p.v), 2, 0, False, False),
    "gradient of a cubic": (lambda p: jax.grad(lambda v: (v**3).sum())(p.v).sum(-1), 2, 0, True, False),
    "loop of sums": (through(lambda total, x, i: total + x**2), 2, 0, True, False),
    "loop of products": (through(lambda total, x, i: total * x), 4, 0, False, False),
    "long loop of products": (through(lambda total, x, i: total * x, 12), UNKNOWN, 0, False, False),
    "long loop of sums": (through(lambda total, x, i: total + i * x, 50), 1, 0, True, False),
    "loop to a place that varies": (until, UNKNOWN, 0, False, False),
    "branches": (lambda p: lax.cond(jnp.asarray(MU).sum() > 0, sq, lambda v: v.sum(-1), p.v), 2, 0, True, False),
    "branches that vary": (lambda p: lax.cond(p.h.sum() > 0, sq, lambda v: v.sum(-1), p.v), 2, UNKNOWN, True, False),
    "solved": (lambda p: sq(jnp.linalg.solve(P, p.v.T).T), 2, 0, False, False),
    "convolved": (
        lambda p: sq(lax.conv_general_dilated(p.v[:, None], jnp.ones((2, 1, 2)), (1,), "VALID").reshape(N, -1)),
        2, 0, False, False,
    ),
    "running sums": (lambda p: sq(jnp.cumsum(p.v, 1)), 2, 0, False, False),
    "padded": (lambda p: sq(jnp.pad(p.v, ((0, 0), (1, 1)))), 2, 0, True, False),
    "normal": (lambda p: normal(p.h @ W.T, 2.0, p.v), 2, 2, True, False),
    "normal, scale": (lambda p: normal(0.0, jnp.exp(p.h @ W.T), p.v), 2, UNKNOWN, True, False),
    "uniform": (lambda p: dist.Uniform(-9.0, 9.0).log_prob(p.v).sum(-1), UNKNOWN, 0, False, False),
    "exponential": (lambda p: dist.Exponential(1.0).log_prob(p.v).sum(-1), UNKNOWN, 0, False, False),
    "multivariate normal": (
        lambda p: dist.MultivariateNormal(p.h @ W.T, P @ P.T + np.eye(D, dtype=np.float32)).log_prob(p.v),
        2, 2, False, False,
    ),
    "label": (lambda p: dist.Categorical(logits=MU[0]).log_prob(p.z) + sq(p.v), 2, 0, True, False),
    "bits": (lambda p: log_density(ConcreteBernoulli(1.0, p.v @ W).to_event(1), p.h), UNKNOWN, 1, False, False),
    "log-normal": (lambda p: dist.LogNormal(0.0, 1.0).log_prob(jnp.exp(p.v)).sum(-1), 2, 0, True, False),
    "gamma": (lambda p: dist.Gamma(2.0, 1.0).log_prob(jnp.exp(p.v)).sum(-1), UNKNOWN, 0, False, False),
    "logarithm of what is negative": (lambda p: jnp.log(-jnp.exp(p.v)).sum(-1), UNKNOWN, 0, False, False),
    "logarithm of another": (lambda p: jnp.log(jnp.exp(p.v) + 1).sum(-1), UNKNOWN, 0, False, False),
    "student": (lambda p: dist.StudentT(3.0, 0.0, 100.0).log_prob(p.v).sum(-1), UNKNOWN, 0, False, False),
    # rows that are told apart
    "covariate": (lambda p: (p.h * COVARIATE).sum(-1), 0, 1, True, True),
    "place": (lambda p: p.h[:, 0] * jnp.arange(N), 0, 1, True, True),
    "place by a running sum": (lambda p: p.h[:, 0] * jnp.cumsum(jnp.ones(N)), 0, 1, True, True),
    "cut from a longer one": (lambda p: p.h[:, 0] * jnp.asarray(LONG)[:N], 0, 1, True, True),
    "one row of them": (lambda p: p.v.at[0].add(1.0).sum(-1), 1, 0, True, True),
    "noise": (lambda p: p.h[:, 0] * jax.random.normal(jax.random.key(0), (N,)), 0, 1, True, True),
    "noise for all": (lambda p: (p.v * jax.random.normal(jax.random.key(0), (D,))).sum(-1), 1, 0, True, False),
    "all rows, in their order": (lambda p: sq(p.v[jnp.arange(N)]), 2, 0, True, False),
    "all rows, counted backwards": (lambda p: sq(p.v[-jnp.arange(N)]), 2, 0, True, True),
    "all rows, in another order": (lambda p: sq(p.v[N - 1 - jnp.arange(N)]), 2, 0, True, True),
    "which covariates are there": (
        lambda p: jnp.where(jnp.isnan(jnp.asarray(COVARIATE[:, 0])), p.h[:, 0], p.v[:, 0]), 1, 1, True, True,
    ),
}  # fmt: skip


def proved(f):
    kinds = {"v": (D, jnp.float32), "h": (H, jnp.float32), "z": (None, jnp.int32)}
    x = {name: jax.ShapeDtypeStruct((N, size) if size else (N,), kind) for name, (size, kind) in kinds.items()}
    return prove_function(lambda point: f(SimpleNamespace(**point)), x, resizes=True)


@pytest.mark.parametrize("name", PROGRAMS)
def test_degrees_of_programs(name):
    f, v, h, is_separable, tells_rows_apart = PROGRAMS[name]
    proof = proved(f)
    assert (proof.degrees.within("v"), proof.degrees.within("h")) == (v, h)
    assert ("v" in proof.separable) == is_separable
    assert (COVARIATES in proof.degrees.groups) == tells_rows_apart


def test_the_programs_of_sites_are_the_hosts():
    """What is proved is what is computed."""
    v = jnp.asarray(rng.normal(size=(4, D)))
    h = jnp.asarray(rng.integers(2, size=(4, D)), float)
    o = jax.nn.one_hot(jnp.arange(4) % D, D)
    mask = jnp.asarray([True, False, True, True])
    for fn, value in (
        (dist.Normal(v[0], 2.0), v),
        (dist.Normal(v[0], 2.0).expand([4, D]).to_event(1), v),
        (dist.Normal(v[0], 2.0).expand([4, D]).to_event(1).mask(mask), v),
        (dist.Normal(v[0], 2.0).mask(False), v),
        (dist.Normal(v[0], 2.0).mask(True), v),
        (ConcreteBernoulli(1.0, v[0]).expand([4, D]).to_event(1), h),
        (ConcreteBernoulli(1.0, v).to_event(1).mask(mask), h),
        (ConcreteOneHot(1.0, v[0]).expand([4]), o),
        (dist.MultivariateNormal(v[0], jnp.eye(D)), v),
        (dist.ImproperUniform(dist.constraints.real, (), (D,)), v),
    ):
        ours, theirs = log_density(fn, value), fn.log_prob(value)
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def energy_of(model, *args):
    leaves, spec = visible.flatten(args, {})
    with numpyro.handlers.seed(rng_seed=0), records.record({}) as run:
        model(*args)
    batch = visible.batch(visible.find(run.sites, leaves, ["v"], discrete=True), {}, leaves, spec)
    return Energy.from_model(model, batch.sites, batch, {}, jax.random.key(0))[0]


@pytest.mark.parametrize("longer", [False, True])
def test_rows_of_a_longer_array_are_covariates(longer):
    """A model that runs on any number of rows up to some, and on no more: its rows are not the first again."""
    table = jnp.arange(9.0 if longer else 4.0)

    def model(x):
        with numpyro.plate("data", len(x)):
            v = numpyro.sample("v", dist.Normal(0.0, 1.0).expand([1]).to_event(1).mask(False), obs=x)
            h = numpyro.sample("h", dist.Bernoulli(0.5).mask(False))
            numpyro.factor("energy", -0.5 * (v**2).sum(-1) + 1e-30 * h * table[: len(x)])

    energy = energy_of(model, jnp.ones((4, 1)))
    assert not energy.resizes
    assert not energy.is_homogeneous


def test_mixed_visible_sites_keep_their_structure():
    """Bits and real numbers that are observed stand side by side in v; what holds of one is not said of the other."""

    def model(x, y):
        with numpyro.plate("data", len(x)):
            v = numpyro.sample("v", dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
            u = numpyro.sample("u", dist.Bernoulli(0.5).expand([H]).to_event(1).mask(False), obs=y)
            numpyro.factor("energy", -0.5 * (v**2).sum(-1) + ((v @ W) * u).sum(-1))

    leaves, spec = visible.flatten((jnp.ones((4, D)), jnp.ones((4, H))), {})
    with numpyro.handlers.seed(rng_seed=0), records.record({}) as run:
        model(*leaves)
    batch = visible.batch(visible.find(run.sites, leaves, ["v", "u"], discrete=True), {}, leaves, spec)
    energy = Energy.from_model(model, batch.sites, batch, {}, jax.random.key(0))[0]
    assert [(b.kind, b.names, b.is_constant, b.is_diagonal) for b in energy.blocks] == [
        ("gaussian", (VISIBLE,), True, True),
        ("affine", ("u",), False, False),
    ]
    assert energy.is_homogeneous
