"""numpyro_bism on the kinds of models that NumPyro users write, each compared with a plain equivalent."""

import functools
import pickle
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from jax.example_libraries import optimizers
from numpyro import handlers
from numpyro.contrib.module import eqx_module, flax_module, nnx_module, random_flax_module
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from numpyro.infer import autoguide as auto

from numpyro_bism import (
    BiSM,
    ConcreteBernoulli,
    ConcreteOneHot,
    DenoisingScoreMatching,
    Detached,
    FisherDivergence,
    MultiscaleDenoisingScoreMatching,
    ScoreMatching,
    SlicedScoreMatching,
    Unrolled,
)
from numpyro_bism.divergences import as_inner_loss
from numpyro_bism.optim.host import as_optim
from numpyro_bism.optim.steps import differentiable_update
from numpyro_bism.programs.pair import ModelAndGuide
from numpyro_bism.programs.visible import Batch, flatten
from oracles import LinearGaussian, Moments, central_difference, dsm_optimum

D, H, N, FULL = 3, 2, 7, 40
DSM = DenoisingScoreMatching(0.3)
AVERAGED = DenoisingScoreMatching(0.3, num_particles=2, average="score")
positive = dist.constraints.positive


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def key(i=0):
    return jax.random.key(i)


def data(n=N, shape=(D,)):
    return jnp.asarray(np.random.default_rng(8).normal(size=(n, *shape)))


def initial():
    """Initial values of the model (w, b, s) and the guide (a, scale)."""
    w, b, a = (np.random.default_rng(4 + i).normal(size=s) for i, s in enumerate(((D, H), (D,), (D, H))))
    return tuple(map(jnp.asarray, (0.3 * w, 0.1 * b, np.full(D, 0.9), 0.3 * a, np.full(H, 0.7))))


class Problem(NamedTuple):
    """A BiSM's two losses at its initial parameters, with known keys."""

    bism: BiSM
    pair: ModelAndGuide
    batch: Batch
    theta: Any
    phi: Any
    mutable: Any

    def params(self, theta=None, phi=None):
        return self.pair.params(self.theta if theta is None else theta, self.phi if phi is None else phi, self.mutable)

    def outer(self, theta=None, phi=None):
        return self.pair.outer_loss(key(2), self.params(theta, phi), self.batch, self.bism.loss)

    def inner(self, theta=None, phi=None):
        v = self.bism.loss.perturb(self.batch.v, self.noise())
        return as_inner_loss(self.bism.inner_loss)(key(3), self.pair, self.params(theta, phi), self.batch, v)

    def noise(self):
        return self.bism.loss.draw(jax.random.split(key(2), 3)[0], self.batch.v)

    def draw(self):
        """The (single) draw of h in the outer loss."""
        v = self.bism.loss.perturb(self.batch.v, self.noise())
        return self.pair.draw(jax.random.split(key(2), 3)[1], self.params(), self.batch, v)[0]

    def by_hand(self, score):
        """The outer loss of a score function written by hand."""
        return self.bism.loss(score, self.batch.v, self.noise()).mean()


def problem(model, guide, *args, loss=DSM, init_params=None, optim=None, **kwargs):
    names = ("visible", "inner_loss", "hypergradient", "inner_optim", "num_inner_steps")
    settings = {name: kwargs.pop(name) for name in names if name in kwargs}
    bism = BiSM(model, guide, optim or numpyro.optim.SGD(0.1), loss, **settings)
    state = bism.init(key(), *args, init_params=init_params, **kwargs)
    leaves, spec = flatten(args, kwargs)
    pair = bism.pair(leaves, spec)
    return Problem(bism, pair, pair.batch(key(1), leaves, spec), *bism._unpack(pair, state), state.mutable_state)


def ravel(tree):
    """All numbers of a tree, in order of size: comparable however they are named and packed."""
    return np.sort(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]))


def assert_same(ours, theirs):
    """Two problems agree in both losses and in their gradients in θ and φ."""
    for name in ("outer", "inner"):
        results = [jax.value_and_grad(getattr(p, name), argnums=(0, 1))(p.theta, p.phi) for p in (ours, theirs)]
        (mine, mine_grad), (other, other_grad) = results
        np.testing.assert_allclose(mine, other, rtol=1e-10)
        for a, b in zip(mine_grad, other_grad, strict=True):
            np.testing.assert_allclose(ravel(a), ravel(b), rtol=1e-9, atol=1e-12)


def check_gradients(p, step=1e-4, losses=("outer", "inner")):
    """Reverse-mode gradients of both losses, in θ and φ together, are their finite differences."""
    point = (p.theta, p.phi)
    leaves, tree = jax.tree.flatten(point)
    direction = [jnp.asarray(np.random.default_rng(i).normal(size=x.shape)) for i, x in enumerate(leaves)]
    for f in (jax.jit(getattr(p, name)) for name in losses):

        def at(t, f=f):
            return f(*jax.tree.unflatten(tree, [x + t * d for x, d in zip(leaves, direction, strict=True)]))

        ours = sum((g * d).sum() for g, d in zip(jax.tree.leaves(jax.grad(f, (0, 1))(*point)), direction, strict=True))
        np.testing.assert_allclose(ours, central_difference(at, step), rtol=1e-6)


def flat(name, value, dim=D):
    return numpyro.sample(name, dist.Normal(0.0, 1.0).expand([dim]).to_event(1).mask(False), obs=value)


def no_latents(*args, **kwargs):
    pass


# One model in many clothes: the reference is written with numpyro.param


def joint(x, w, b, s):
    with numpyro.plate("data", len(x)):
        x = flat("x", x)
        h = numpyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        numpyro.factor("energy", -0.5 * (((x - b) / s) ** 2).sum(-1) + ((x @ w) * h).sum(-1))


def posterior(x, a, scale):
    with numpyro.plate("data", len(x)):
        numpyro.sample("h", dist.Normal(jnp.tanh(x @ a), scale).to_event(1))


def param_model(x):
    w, b, s = initial()[:3]
    joint(x, numpyro.param("w", w), numpyro.param("b", b), numpyro.param("s", s, constraint=positive))


def param_guide(x):
    a, scale = initial()[3:]
    posterior(x, numpyro.param("a", a), numpyro.param("scale", scale, constraint=positive))


class LinenWeights(linen.Module):
    """The positive scale is the exponential of a weight, as NumPyro's own transform."""

    @linen.compact
    def __call__(self, x):
        w = self.param("w", linen.initializers.normal(), (x.shape[-1], H))
        b = self.param("b", linen.initializers.normal(), (x.shape[-1],))
        log_s = self.param("log_s", linen.initializers.normal(), (x.shape[-1],))
        return w, b, jnp.exp(log_s)


class LinenEncoder(linen.Module):
    @linen.compact
    def __call__(self, x):
        log_scale = self.param("log_scale", linen.initializers.zeros, (H,))
        return jnp.tanh(linen.Dense(H, use_bias=False)(x)), jnp.exp(log_scale)


class NnxWeights(nnx.Module):
    def __init__(self):
        w, b, s = initial()[:3]
        self.w, self.b, self.log_s = nnx.Param(w), nnx.Param(b), nnx.Param(jnp.log(s))

    def __call__(self, x):
        return self.w[...], self.b[...], jnp.exp(self.log_s[...])


class NnxEncoder(nnx.Module):
    def __init__(self):
        a, scale = initial()[3:]
        self.dense = nnx.Linear(D, H, use_bias=False, param_dtype=float, rngs=nnx.Rngs(0))
        self.dense.kernel = nnx.Param(a)
        self.log_scale = nnx.Param(jnp.log(scale))

    def __call__(self, x):
        return jnp.tanh(self.dense(x)), jnp.exp(self.log_scale[...])


class EqxWeights(eqx.Module):
    w: jax.Array
    b: jax.Array
    log_s: jax.Array
    activation: str = eqx.field(static=True)

    def __init__(self):
        w, b, s = initial()[:3]
        self.w, self.b, self.log_s, self.activation = w, b, jnp.log(s), "exp"

    def __call__(self, x):
        return self.w, self.b, getattr(jnp, self.activation)(self.log_s)


class EqxEncoder(eqx.Module):
    linear: eqx.nn.Linear
    log_scale: jax.Array

    def __init__(self):
        a, scale = initial()[3:]
        linear = eqx.nn.Linear(D, H, use_bias=False, key=key())
        self.linear, self.log_scale = eqx.tree_at(lambda m: m.weight, linear, a.T), jnp.log(scale)

    def __call__(self, x):
        return jnp.tanh(jax.vmap(self.linear)(x)), jnp.exp(self.log_scale)


class Methods:
    """Programs as bound methods, one of them fed by a partial."""

    def __init__(self, model, guide):
        self.programs = model, guide

    def model(self, name, x):
        assert name == "x"
        self.programs[0](x)

    def guide(self, x):
        self.programs[1](x)


def encoded(x, net):
    with numpyro.plate("data", len(x)):
        numpyro.sample("h", dist.Normal(*net(x)).to_event(1))


def linen_values():
    w, b, s, a, scale = initial()
    return {
        "weights$params": {"w": w, "b": b, "log_s": jnp.log(s)},
        "encoder$params": {"Dense_0": {"kernel": a}, "log_scale": jnp.log(scale)},
    }


def clothes(kind):
    """Model, guide and initial values."""
    if kind == "flax":

        def model(x):
            joint(x, *flax_module("weights", LinenWeights(), input_shape=(1, D))(x))

        return model, lambda x: encoded(x, flax_module("encoder", LinenEncoder(), x)), linen_values()
    if kind == "nnx":
        weights, encoder = NnxWeights(), NnxEncoder()

        def model(x):
            joint(x, *nnx_module("weights", weights)(x))

        return model, lambda x: encoded(x, nnx_module("encoder", encoder)), None
    if kind == "equinox":
        weights, encoder = EqxWeights(), EqxEncoder()

        def model(x):
            joint(x, *eqx_module("weights", weights)(x))

        return model, lambda x: encoded(x, eqx_module("encoder", encoder)), None
    assert kind == "methods"
    programs = Methods(param_model, param_guide)
    return functools.partial(programs.model, "x"), programs.guide, None


def one_update(model, guide, init_params=None):
    """θ and φ after an update with one kept and one unrolled inner step, and its loss."""
    bism = BiSM(model, guide, numpyro.optim.SGD(0.1), DSM, num_inner_steps=1, hypergradient=Unrolled(1))
    state = bism.init(key(), data(), init_params=init_params)
    with jax.disable_jit():  # quicker than compiling
        state, loss = bism.update(state, data())
    return bism.optim.get_params(state.optim_state), bism.inner_optim.get_params(state.inner_optim_state), loss


@pytest.fixture(scope="module")
def reference():
    with jax.enable_x64(True):
        return problem(param_model, param_guide, data()), one_update(param_model, param_guide)


@pytest.mark.parametrize("kind", ["flax", "nnx", "equinox", "methods"])
def test_every_way_to_write_the_parameters_trains_alike(kind, reference):
    model, guide, values = clothes(kind)
    assert_same(problem(model, guide, data(), init_params=values), reference[0])
    for ours, theirs in zip(one_update(model, guide, values), reference[1], strict=True):
        np.testing.assert_allclose(ravel(ours), ravel(theirs), rtol=1e-10)
    start = (reference[0].theta, reference[0].phi)
    assert not np.isclose(ravel(start), ravel(reference[1][:2]), rtol=1e-4).any()


def test_init_params_are_the_initial_values_and_unknown_names_are_errors():
    given = {"w": jnp.ones((D, H)), "scale": 0.25 * np.ones(H)}
    bism = BiSM(param_model, param_guide, numpyro.optim.SGD(0.1), DSM)
    params = bism.get_params(bism.init(key(), data(), init_params=given))
    assert set(params) == {"w", "b", "s", "a", "scale"}
    np.testing.assert_array_equal(params["w"], given["w"])
    np.testing.assert_allclose(params["scale"], given["scale"], rtol=1e-12)
    np.testing.assert_array_equal(params["b"], initial()[1])
    np.testing.assert_allclose(params["s"], initial()[2], rtol=1e-12)
    with pytest.raises(ValueError, match=r"init_params names \['v'\]"):
        bism.init(key(), data(), init_params={"v": 1.0})


# Module state and random layers


class LinenNorm(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.BatchNorm(use_running_average=False, momentum=0.9, param_dtype=float)(x)


class Counted(eqx.Module):
    """The running mean of what it sees, and how many passes it has seen."""

    weight: jax.Array
    mean: eqx.nn.StateIndex
    passes: eqx.nn.StateIndex

    def __init__(self):
        self.weight = jnp.ones(D)
        self.mean, self.passes = eqx.nn.StateIndex(jnp.zeros(D)), eqx.nn.StateIndex(jnp.array(0))

    def __call__(self, x, state):
        before = state.get(self.mean)  # of the passes before: no row reads another
        passes = state.get(self.passes) + 1
        state = state.set(self.mean, 0.9 * before + 0.1 * x.mean(0)).set(self.passes, passes)
        return self.weight * (x - before), state


def normalised_by(kind):
    """A function that normalises inside a program, keeping its state there."""
    if kind == "flax":
        return lambda x: flax_module("norm", LinenNorm(), x, mutable=["batch_stats"])(x)
    if kind == "nnx":
        net = nnx.BatchNorm(D, momentum=0.9, param_dtype=float, rngs=nnx.Rngs(0))
        net.mean, net.var = nnx.BatchStat(jnp.zeros(D)), nnx.BatchStat(jnp.ones(D))
        return lambda x: nnx_module("norm", net)(x)
    net, state = eqx.nn.make_with_state(Counted)()

    def run(x):
        holder = numpyro.primitives.mutable("norm$state", {"state": jax.tree.map(lambda a: a, state)})
        x, holder["state"] = eqx_module("norm", net)(x, holder["state"])
        return x

    return run


@pytest.mark.parametrize("role", ["guide", "model"])
@pytest.mark.parametrize("kind", ["flax", "nnx", "equinox"])
def test_module_state_moves_once_an_update_as_under_svi(kind, role):
    norm = normalised_by(kind)

    def model(x):
        param_model(x)
        if role == "model":
            with numpyro.plate("rows", len(x)):
                numpyro.factor("norm", -0.1 * (norm(x) ** 2).sum(-1))

    def guide(x):
        param_guide(norm(x) if role == "guide" else x)

    x = data() + 2.0
    # sliced score matching leaves the data as they are
    bism = BiSM(
        model, guide, numpyro.optim.SGD(0.1), SlicedScoreMatching(), num_inner_steps=1, hypergradient=Unrolled(1)
    )
    svi = SVI(model, guide, numpyro.optim.SGD(0.1), Trace_ELBO())
    ours, theirs = bism.init(key(), x), svi.init(key(), x)
    with jax.disable_jit():
        for shift in (0.0, 1.0):
            bism.evaluate(ours, x)
            ours, _ = bism.update(ours, x + shift)
            theirs, _ = svi.update(theirs, x + shift)
            for a, b in zip(*map(jax.tree.leaves, (ours.mutable_state, theirs.mutable_state)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-10)
    moved = ravel(ours.mutable_state)
    assert abs(moved - ravel(bism.init(key(), x).mutable_state)).max() > 0.1


def test_exact_score_matching_refuses_batch_norm_that_couples_examples():
    norm = normalised_by("flax")
    bism = BiSM(param_model, lambda x: param_guide(norm(x)), numpyro.optim.SGD(0.1), ScoreMatching())
    with pytest.raises(ValueError, match="of one example depends on another"):
        bism.init(key(), data())


class Dropped(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dropout(0.5, deterministic=False)(linen.Dense(H, use_bias=False, param_dtype=float)(x))


@pytest.mark.parametrize("inner_loss", [Trace_ELBO(), FisherDivergence()], ids=["elbo", "fisher"])
def test_the_guide_is_scored_with_the_dropout_mask_that_drew(inner_loss):
    """The net runs between two sample statements: with h given at the second pass, its key must not change."""

    def model(x):
        w = numpyro.param("w", initial()[0])
        with numpyro.plate("data", len(x)):
            x = flat("x", x)
            t = numpyro.sample("t", dist.Normal(0.0, 1.0))
            h = numpyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
            numpyro.factor("energy", -0.5 * (x**2).sum(-1) + ((x @ w) * h).sum(-1) * (1 + t))

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("t", dist.Normal(x[:, 0], 1.0))
            net = flax_module("net", Dropped(), x, apply_rng=["dropout"])
            numpyro.sample("h", dist.Normal(net(x, rngs={"dropout": numpyro.prng_key()}), 0.7).to_event(1))

    p = problem(model, guide, data(), inner_loss=inner_loss)
    draw = p.draw()
    t, h, rng = draw.values["t"], draw.values["h"], draw.keys[-1]

    def score(v):
        def total(v):
            loc = Dropped().apply({"params": p.phi["net$params"]}, v, rngs={"dropout": rng})
            log_q = dist.Normal(loc, 0.7).log_prob(h).sum() + dist.Normal(v[:, 0], 1.0).log_prob(t).sum()
            return -0.5 * (v**2).sum() + (((v @ p.theta["w"]) * h).sum(-1) * (1 + t)).sum() - log_q

        return jax.grad(total)(v)

    loc = Dropped().apply(
        {"params": p.phi["net$params"]}, p.bism.loss.perturb(p.batch.v, p.noise()), rngs={"dropout": rng}
    )
    assert 0 < (loc == 0).sum() < loc.size
    np.testing.assert_allclose(p.outer(), p.by_hand(score), rtol=1e-10)
    if isinstance(inner_loss, FisherDivergence):
        # had the mask changed, ½‖∇_h log q - ∇_h log p̃‖² would compare h with another location
        v = p.bism.loss.perturb(p.batch.v, p.noise())
        draw, _ = p.pair.draw(jax.random.split(key(3))[0], p.params(), p.batch, v)
        t, h = draw.values["t"], draw.values["h"]
        loc = Dropped().apply({"params": p.phi["net$params"]}, v, rngs={"dropout": draw.keys[-1]})
        drive = v @ p.theta["w"]
        g_h = -(h - loc) / 0.7**2 - drive * (1 + t)[:, None] + h
        g_t = -(t - v[:, 0]) - (drive * h).sum(-1) + t
        np.testing.assert_allclose(p.inner(), 0.5 * ((g_h**2).sum() + (g_t**2).sum()) / N, rtol=1e-10)


def test_nnx_dropout_keeps_its_stream_in_the_state():
    """A mask a step, the same in all of it: the state's random count moves by what one pass uses."""
    net = nnx.Sequential(nnx.Linear(D, D, param_dtype=float, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))

    def guide(x):
        param_guide(nnx_module("net", net)(x))

    bism = BiSM(param_model, guide, numpyro.optim.SGD(0.1), DSM, num_inner_steps=1, hypergradient=Unrolled(1))
    state = bism.init(key(), data())
    counts = []
    with jax.disable_jit():
        for _ in range(2):
            state, _ = bism.stable_update(state, data())
            integers = [x for x in jax.tree.leaves(state.mutable_state) if jnp.issubdtype(x.dtype, jnp.integer)]
            counts.append(sum(int(x.sum()) for x in integers if x.ndim == 0))
    assert counts[1] == counts[0] + 1


def test_mutable_sites_of_any_kind_are_left_alone_while_scoring():
    """A nested dictionary, written in place, which starts with a Python number."""

    def model(x):
        param_model(x)
        seen = numpyro.primitives.mutable("seen", {"deep": {"count": 0.0}})
        seen["deep"]["count"] = seen["deep"]["count"] + 1.0

    bism = BiSM(model, param_guide, numpyro.optim.SGD(0.1), DSM, num_inner_steps=1, hypergradient=Unrolled(1))
    state = bism.init(key(), data())
    assert not state.mutable_state["seen"]["deep"]["count"].weak_type
    with jax.disable_jit():
        later, _ = bism.update(state, data())
    assert later.mutable_state["seen"]["deep"]["count"] == state.mutable_state["seen"]["deep"]["count"] + 1
    shapes = jax.eval_shape(bism.update, later, data())[0]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), later)


# Plates, masks, scales


def centred(x, b):
    return -0.5 * ((x - b) ** 2).sum(-1)


def hand_score(v):
    return 0.1 - v


def b_param():
    return numpyro.param("b", 0.1 * jnp.ones(D))


def subsampled_by_index(x):
    b = b_param()
    with numpyro.plate("data", FULL, subsample_size=N) as rows:
        numpyro.factor("energy", centred(flat("x", x[rows]), b))


def subsampled_by_primitive(x):
    b = b_param()
    with numpyro.plate("data", FULL, subsample_size=N):
        numpyro.factor("energy", centred(flat("x", numpyro.subsample(x, event_dim=1)), b))


def subsampled_in_nested_plates(x):
    b = b_param()
    with numpyro.plate("data", FULL, subsample_size=N, dim=-2) as rows, numpyro.plate("columns", D, dim=-1):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).mask(False), obs=x[rows])
        numpyro.factor("energy", -0.5 * (x - b) ** 2)


def whole(x):
    b = b_param()
    with numpyro.plate("data", len(x)):
        numpyro.factor("energy", centred(flat("x", x), b))


def normal_pieces(x):
    """The same energy as a normalised density, drawn inside nested plates."""
    b = b_param()
    with numpyro.plate("data", len(x), dim=-2), numpyro.plate("columns", D, dim=-1):
        numpyro.sample("x", dist.Normal(b, 1.0), obs=x)


def improper(x):
    b = b_param()
    with numpyro.plate("data", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), event_shape=(D,)), obs=x)
        numpyro.factor("energy", centred(x, b))


LOSSES = [
    ScoreMatching(),
    SlicedScoreMatching(2, "gaussian"),
    DSM,
    MultiscaleDenoisingScoreMatching(0.1, 0.5, 0.2, "linear"),
]
PLATES = [
    subsampled_by_index,
    subsampled_by_primitive,
    subsampled_in_nested_plates,
    whole,
    normal_pieces,
    improper,
]


@pytest.mark.parametrize("loss", [LOSSES[1], LOSSES[3]], ids=["sliced", "multiscale"])
@pytest.mark.parametrize("program", PLATES)
def test_plates_of_every_kind_give_the_score_of_their_rows(program, loss):
    p = problem(program, no_latents, data(FULL), loss=loss)
    rows = p.batch.indices.get("data", jnp.arange(FULL))
    assert len(set(rows.tolist())) == (N if "subsampled" in program.__name__ else FULL)
    np.testing.assert_array_equal(p.batch.v, data(FULL)[rows])
    np.testing.assert_allclose(p.outer(), p.by_hand(hand_score), rtol=1e-10)


def test_subsampled_rows_are_drawn_anew_every_step_and_all_are_reached():
    p = problem(subsampled_by_index, no_latents, data(FULL))
    draws = jax.vmap(lambda k: p.pair.batch(k, [data(FULL)], None).indices["data"])(jax.random.split(key(), 60))
    assert all(len(set(rows)) == N for rows in draws.tolist())
    assert set(jnp.ravel(draws).tolist()) == set(range(FULL))


@pytest.mark.parametrize("style", ["index", "event_dim"])
def test_local_parameters_of_subsampled_rows_alone_have_a_gradient(style):
    """A guide with one location a datum, in the rows that the model sees."""
    x = data(FULL)

    def model(x):
        w = numpyro.param("w", initial()[0])
        with numpyro.plate("data", FULL, subsample_size=N):
            x = flat("x", numpyro.subsample(x, event_dim=1))
            h = numpyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
            numpyro.factor("energy", -0.5 * (x**2).sum(-1) + ((x @ w) * h).sum(-1))

    def local(x):
        loc = numpyro.param("loc", jnp.zeros((FULL, H))) if style == "index" else None
        with numpyro.plate("data", FULL, subsample_size=N) as rows:
            z = loc[rows] if style == "index" else numpyro.param("loc", jnp.zeros((FULL, H)), event_dim=1)
            numpyro.sample("h", dist.Normal(z + 0.1 * x[rows, :H], 0.5).to_event(1))

    p = problem(model, local, x, loss=AVERAGED)
    assert p.phi["loc"].shape == (FULL, H)
    for loss in (p.outer, p.inner):
        moved = (jax.grad(loss, 1)(p.theta, p.phi)["loc"] != 0).any(-1)
        assert set(jnp.nonzero(moved)[0].tolist()) == set(p.batch.indices["data"].tolist())


def test_a_covariate_that_equals_the_data_is_not_mistaken_for_it_in_a_compiled_first_run():
    """Rows are found by value; the stand-ins for traced arguments must differ from one another."""
    x, z = data(FULL), data(FULL)[::-1]

    def model(x, z):
        b = b_param()
        with numpyro.plate("data", FULL, subsample_size=N) as rows:
            numpyro.factor("energy", centred(flat("x", x[rows]), b + z[rows]))

    bism = BiSM(model, no_latents, numpyro.optim.SGD(0.1), DSM)
    shapes = []

    def look(x, z):
        leaves, spec = flatten((x, z), {})
        shapes.append(bism.pair(leaves, spec).sites[0].leaves)
        return x

    jax.eval_shape(look, x, z)
    assert shapes == [(0,)]


def test_masked_examples_have_no_energy_and_scaled_ones_more():
    """handlers.mask, dist.mask, obs in a mask, and scale multiply the energy, hence the score, of each example."""
    x = data()
    weight = jnp.array([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0])

    def masked(x):
        b = b_param()
        with numpyro.plate("data", len(x)), handlers.mask(mask=weight == 1):
            numpyro.factor("energy", centred(flat("x", x), b))

    def masked_density(x):
        b = b_param()
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(b, 1.0).to_event(1).mask(weight == 1), obs=x)

    def scaled(x):
        b = b_param()
        with numpyro.plate("data", len(x)), handlers.scale(scale=1.0 + weight):
            numpyro.factor("energy", centred(flat("x", x), b))

    def scaled_subsample(x):
        b = b_param()
        with numpyro.plate("data", FULL, subsample_size=N) as rows, handlers.scale(scale=3.0):
            numpyro.factor("energy", centred(flat("x", x[rows]), b))

    column = weight[:, None]
    for program, args, factor in (
        (masked, x, column),
        (masked_density, x, column),
        (scaled, x, 1 + column),
        (handlers.scale(whole, 3.0), x, 3.0),
        (scaled_subsample, data(FULL), 3.0),
    ):
        covered = program not in (masked, masked_density)
        with pytest.warns(UserWarning, match="A scale of .* covers visible site 'x'") if covered else nullcontext():
            p = problem(program, no_latents, args, loss=LOSSES[1])
        np.testing.assert_allclose(p.outer(), p.by_hand(lambda v, f=factor: f * hand_score(v)), rtol=1e-10)


def test_masked_examples_train_nothing():
    """Model and guide masked alike: their rows add nothing to either loss's gradient."""
    keep = jnp.array([True, False, True, True, False, True, False])

    def on(program):
        return lambda x, keep: handlers.mask(program, mask=keep)(x)

    p = problem(on(param_model), on(param_guide), data(), keep, loss=ScoreMatching())
    h = p.draw().values["h"]

    def by_hand(theta, phi):
        def score(v):
            def total(v):
                log_q = dist.Normal(jnp.tanh(v @ phi["a"]), jnp.exp(phi["scale"])).log_prob(draw).sum(-1)
                energy = 0.5 * (((v - theta["b"]) / jnp.exp(theta["s"])) ** 2).sum(-1)
                prior = dist.Normal(0, 1).log_prob(draw).sum(-1)
                return (keep * (-energy + ((v @ theta["w"]) * draw).sum(-1) + prior - log_q)).sum()

            return jax.grad(total)(v)

        noise = (h - jnp.tanh(p.batch.v @ p.phi["a"])) / jnp.exp(p.phi["scale"])
        draw = jnp.tanh(p.batch.v @ phi["a"]) + jnp.exp(phi["scale"]) * noise
        losses = p.bism.loss(score, p.batch.v, None)
        return (losses * keep).sum() / N, losses

    (expected, losses), gradients = jax.value_and_grad(by_hand, (0, 1), has_aux=True)(p.theta, p.phi)
    assert (losses[~keep] == 0).all()
    value, ours = jax.value_and_grad(p.outer, (0, 1))(p.theta, p.phi)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), ours, gradients)


# Sites and arguments of every kind


def test_several_visible_sites_of_different_shapes_are_one_vector():
    """x (n, 3), y (n,), z (n, 2, 2): the loss is that of the joined vector, whatever the order of arguments."""
    x, y, z = data(), data(shape=()), data(shape=(2, 2))
    root = np.random.default_rng(2).normal(size=(8, 8))
    precision = jnp.asarray(root @ root.T / 8 + np.eye(8))

    def three(z, x, y):
        p = numpyro.param("p", precision)
        with numpyro.plate("data", len(x)):
            x = flat("x", x)
            y = numpyro.sample("y", dist.Normal(0.0, 1.0).mask(False), obs=y)
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2).mask(False), obs=z)
            v = jnp.concatenate([x, y[:, None], z.reshape(-1, 4)], -1)
            numpyro.factor("energy", -0.5 * ((v @ p) * v).sum(-1))

    for loss in LOSSES:
        p = problem(three, no_latents, z, y=y, x=x, loss=loss)
        np.testing.assert_array_equal(p.batch.v, jnp.concatenate([x, y[:, None], z.reshape(-1, 4)], -1))
        np.testing.assert_allclose(p.outer(), p.by_hand(lambda v: -v @ precision), rtol=1e-10)


def test_visible_values_of_two_precisions_keep_their_types():
    def two(x, y):
        b = b_param()
        with numpyro.plate("data", FULL, subsample_size=N) as rows:
            seen.append((x.dtype, y.dtype))
            x, y = flat("x", x[rows]), flat("y", y[rows])
            numpyro.factor("energy", centred(x, b) + centred(y, b))

    seen: list = []
    p = problem(two, no_latents, data(FULL).astype("float32"), data(FULL))
    np.testing.assert_allclose(p.outer(), p.by_hand(hand_score), rtol=1e-5)
    assert set(seen) == {(np.dtype("float32"), np.dtype("float64"))}


def test_one_argument_observed_twice_is_named():
    def product(x):
        b = b_param()
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(b, 1.0).to_event(1), obs=x)
            numpyro.sample("again", dist.Normal(0.0, 1.0).expand([D]).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"'x'.*'again'.*visible="):
        problem(product, no_latents, data())
    p = problem(product, no_latents, data(), visible=["x"])
    np.testing.assert_allclose(p.outer(), p.by_hand(lambda v: 0.1 - 2 * v), rtol=1e-10)


def mixed_initial():
    return [jnp.asarray(0.5 * np.random.default_rng(6).normal(size=(D, k))) for k in (H, H, 3)]


def many_latents(x):
    """Continuous of two shapes, soft bits, a soft one-hot vector and summed-out bits and classes in plates."""
    w, u, r = (numpyro.param(n, v) for n, v in zip("wur", mixed_initial(), strict=True))
    with numpyro.plate("data", len(x), dim=-2):
        x = flat("x", x)
        h = numpyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        t = numpyro.sample("t", dist.LogNormal(0.0, 0.5))
        s = numpyro.sample("s", dist.Bernoulli(0.3).expand([H]).to_event(1))
        o = numpyro.sample("o", dist.Multinomial(total_count=1, probs=jnp.array([0.2, 0.3, 0.5])))
        drive = x @ w
        numpyro.factor("soft", ((h + s) * drive).sum(-1) + (o * (x @ r)).sum(-1) - 0.5 * t * (x**2).sum(-1))
        with numpyro.plate("units", H, dim=-1):
            bit = numpyro.sample("bit", dist.Bernoulli(0.5).mask(False))
            numpyro.factor("unit", bit * (x @ u).squeeze(-2))
        level = numpyro.sample("level", dist.Categorical(jnp.array([0.1, 0.4, 0.5])))
        numpyro.factor("class", 0.3 * level * x[..., 0])


def many_latents_guide(x):
    a = numpyro.param("a", 0.3 * jnp.ones((D, H)))
    summed = {"enumerate": "parallel"}
    with numpyro.plate("data", len(x), dim=-2):
        drive = x @ a
        numpyro.sample("h", dist.Normal(drive, 0.5).to_event(1))
        numpyro.sample("t", dist.LogNormal(drive[..., 0], 0.5))
        numpyro.sample("s", ConcreteBernoulli(0.5, drive).to_event(1))
        numpyro.sample("o", ConcreteOneHot(0.5, jnp.concatenate([drive, drive[..., :1]], -1)))
        with numpyro.plate("units", H, dim=-1):
            numpyro.sample("bit", dist.Bernoulli(logits=drive.squeeze(-2)), infer=summed)
        logits = jnp.concatenate([drive, -drive[..., :1]], -1)
        numpyro.sample("level", dist.Categorical(logits=logits), infer=summed)


@pytest.mark.parametrize("average", [pytest.param("score", marks=pytest.mark.full), "loss"])
def test_latents_of_every_kind_in_one_model(average):
    """Against the same energy by hand at the same draws, bits and classes summed over all configurations."""
    x = data()[:, None]
    loss = DenoisingScoreMatching(0.3, average=average)
    p = problem(many_latents, many_latents_guide, x, loss=loss, inner_loss=TraceEnum_ELBO(max_plate_nesting=2))
    w, u, r = mixed_initial()
    a = p.phi["a"]
    perturbed = p.bism.loss.perturb(p.batch.v, p.noise())
    if average == "score":
        drawn = p.draw()
    else:  # the discrete values are given there, so they take no random keys
        key_draw = jax.random.split(key(2), 3)[1]
        given = jax.tree.map(lambda g: g[0], p.pair.configurations(key_draw, p.params(), p.batch, perturbed))
        drawn, _ = p.pair.draw(key_draw, p.params(), p.batch, perturbed, given)
    h, t, s, o = (drawn.values[name][:, 0] for name in "htso")

    def log_q(v, bit, level):
        drive = v @ a
        logits = jnp.concatenate([drive, -drive[:, :1]], -1)
        discrete = dist.Bernoulli(logits=drive).log_prob(bit).sum(-1) + dist.Categorical(logits=logits).log_prob(level)
        one = jnp.concatenate([drive, drive[:, :1]], -1)
        relaxed = ConcreteBernoulli(0.5, drive).log_prob(s).sum(-1) + ConcreteOneHot(0.5, one).log_prob(o)
        smooth = dist.Normal(drive, 0.5).log_prob(h).sum(-1) + dist.LogNormal(drive[:, 0], 0.5).log_prob(t)
        return discrete, discrete + relaxed + smooth

    def score(v, bit, level):
        """∇_v [log p̃ - log q] at given latents."""

        def total(v):
            energy = ((h + s) * (v @ w)).sum(-1) + (o * (v @ r)).sum(-1) - 0.5 * t * (v**2).sum(-1)
            energy += (bit * (v @ u)).sum(-1) + 0.3 * level * v[:, 0]
            return (energy - log_q(v, bit, level)[1]).sum()

        return jax.grad(total)(v)

    configurations = [
        (jnp.broadcast_to(jnp.array([i, j], float), (N, H)), jnp.full(N, k))
        for i in range(2)
        for j in range(2)
        for k in range(3)
    ]
    weights = [jnp.exp(log_q(perturbed, *c)[0])[:, None] for c in configurations]
    np.testing.assert_allclose(sum(weights), 1, rtol=1e-12)

    @jax.jit
    def expected():
        if average == "score":
            return p.by_hand(lambda v: sum(q * score(v, *c) for q, c in zip(weights, configurations, strict=True)))
        losses = [p.bism.loss(lambda v, c=c: score(v, *c), p.batch.v, p.noise()) for c in configurations]
        return sum((q[:, 0] * value).mean() for q, value in zip(weights, losses, strict=True))

    np.testing.assert_allclose(jax.jit(p.outer)(), expected(), rtol=1e-9)
    # NumPyro's own TraceEnum_ELBO stumbles on a guide with two enumerated sites, so no inner loss
    check_gradients(p, losses=["outer"])


def test_arguments_may_be_keywords_tuples_dictionaries_and_numpy(reference):
    def unpacked(program):
        def run(batch, *, extra, missing=None, name="x", power=2, on=False):
            assert missing is None and name == "x" and power == 3 and on
            (x, _), extra = batch, extra["deep"][0]
            program(x * 1.0 if extra is None else x)

        return run

    args = ((np.asarray(data()), [np.arange(3)]),)
    bism = BiSM(
        unpacked(param_model), unpacked(param_guide), numpyro.optim.SGD(0.1), DSM, power=3, on=True
    )  # static keyword arguments
    assert bism.static_kwargs == {"power": 3, "on": True}
    kwargs = {"extra": {"deep": [jnp.ones(2)]}, "missing": None, "name": "x"}
    state = bism.init(key(), *args, **kwargs)
    leaves, spec = flatten(args, kwargs)
    pair = bism.pair(leaves, spec)
    ours = Problem(bism, pair, pair.batch(key(1), leaves, spec), *bism._unpack(pair, state), None)
    assert_same(ours, reference[0])
    np.testing.assert_allclose(bism.evaluate(state, *args, **kwargs), reference[0].bism.evaluate(state, data()))


def test_the_same_numpy_array_passed_twice_is_one_argument():
    """Model and guide each take their own: both must see the perturbed data."""

    def model(x, y):
        param_model(x)

    def guide(x, y):
        param_guide(y)

    x = np.asarray(data())
    assert problem(model, guide, x, x).pair.sites[0].leaves == (0, 1)


EMBEDDING = jnp.asarray(np.random.default_rng(5).normal(size=(4, D)))


def regression(x, y, label):
    """x given covariates: y shifts it, an integer label picks a row of a table."""
    w, table = numpyro.param("w", initial()[0][:, 0]), numpyro.param("table", EMBEDDING)
    with numpyro.plate("data", len(x)):
        y = numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        numpyro.sample("label", dist.Categorical(jnp.ones(4) / 4), obs=label)
        numpyro.sample("x", dist.Normal(table[label] + y[:, None] * w, 1.0).to_event(1), obs=x)


def test_covariates_are_left_alone():
    x, y, label = data(), data(shape=()), jnp.arange(N) % 4
    p = problem(regression, no_latents, x, y, label, visible=["x"])

    def by_hand(theta):
        return p.by_hand(lambda v: theta["table"][label] + y[:, None] * theta["w"] - v)

    ours, expected = (jax.value_and_grad(f)(p.theta) for f in (p.outer, by_hand))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), ours, expected)
    # with y visible as well its own score comes in: s_y = -y + wᵀ(x - r - w y)
    p = problem(regression, no_latents, x, y, label, visible=["x", "y"])
    w, rows = p.theta["w"], EMBEDDING[label]

    def both(v):
        r = v[:, :D] - rows - v[:, D:] * w
        return jnp.concatenate([-r, (r @ w)[:, None] - v[:, D:]], -1)

    np.testing.assert_allclose(p.outer(), p.by_hand(both), rtol=1e-10)
    with pytest.raises(ValueError, match=r"'label' holds int.*leave it out with visible="):
        problem(regression, no_latents, x, y, label)


def test_deterministic_and_auxiliary_sites_change_nothing(reference):
    def with_deterministic(x):
        numpyro.deterministic("norm", (x**2).sum())
        param_model(x)

    def through_auxiliary(x):
        """The same h, drawn as u and then moved: q(h) = q(u), as the map is a shift."""
        a, scale = initial()[3:]
        a, scale = numpyro.param("a", a), numpyro.param("scale", scale, constraint=positive)
        with numpyro.plate("data", len(x)):
            fn = dist.Normal(jnp.tanh(x @ a), scale).to_event(1)
            u = numpyro.sample("u", fn, infer={"is_auxiliary": True})
            numpyro.sample("h", dist.Delta(u, event_dim=1))

    assert_same(problem(with_deterministic, param_guide, data()), reference[0])
    assert_same(problem(with_deterministic, through_auxiliary, data()), reference[0])


def test_a_reparameterised_model_has_the_reparameterised_score():
    """handlers.reparam moves a latent's location into the energy: the score at h = loc + z is the centred one."""

    def centred_model(x):
        w = numpyro.param("w", initial()[0])
        with numpyro.plate("data", len(x)):
            x = flat("x", x)
            h = numpyro.sample("h", dist.Normal(x @ w, 1.0).to_event(1))
            numpyro.factor("energy", -0.5 * (x**2).sum(-1) - (h * x[:, :H]).sum(-1))

    from numpyro.infer.reparam import LocScaleReparam

    reparam = handlers.reparam(centred_model, {"h": LocScaleReparam(0, shape_params=())})

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("h_decentered", dist.Normal(jnp.tanh(x[:, :H]), 0.5).to_event(1))

    p = problem(reparam, guide, data())
    z = p.draw().values["h_decentered"]

    def score(v):
        def total(v):
            h = v @ p.theta["w"] + z
            log_q = dist.Normal(jnp.tanh(v[:, :H]), 0.5).log_prob(z).sum()
            return -0.5 * (v**2).sum() - (h * v[:, :H]).sum() - log_q

        return jax.grad(total)(v)

    np.testing.assert_allclose(p.outer(), p.by_hand(score), rtol=1e-10)


def test_a_global_latent_gives_the_score_of_all_data_jointly():
    """x_i ~ N(b + w, 1) with one w ~ N(0, 2²) and its exact posterior: every draw gives the joint marginal's score."""

    def model(x):
        b = b_param()
        w = numpyro.sample("w", dist.Normal(0.0, 2.0).expand([D]).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(b + w, 1.0).to_event(1), obs=x)

    def guide(x):
        precision = len(x) + 1 / 4
        loc = (x - 0.1).sum(0) / precision
        numpyro.sample("w", dist.Normal(loc, precision**-0.5).to_event(1))

    p = problem(model, guide, data(), loss=LOSSES[1])
    cov = jnp.eye(N) + 4.0
    np.testing.assert_allclose(p.outer(), p.by_hand(lambda v: -jnp.linalg.solve(cov, v - 0.1)), rtol=1e-10)


def test_a_model_whose_weights_all_have_priors_has_nothing_to_train():
    def model(x):
        net = random_flax_module("net", linen.Dense(1, param_dtype=float), dist.Normal(0.0, 1.0), input_shape=(D,))
        with numpyro.plate("data", len(x)):
            x = flat("x", x)
            numpyro.factor("energy", -0.5 * (x**2).sum(-1) + net(x)[:, 0])

    with pytest.raises(ValueError, match="no parameter to train"):
        problem(model, auto.AutoNormal(model), data())


def test_missing_values_are_refused_in_words():
    def model(x, seen):
        b = b_param()
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(b, 1.0).to_event(1), obs=x, obs_mask=seen)

    with pytest.raises(ValueError, match="'x_unobserved' is missing from the guide"):
        problem(model, no_latents, data(), jnp.arange(N) > 2)


# Autoguides: local latents, in the data plate


def auto_iaf(model):
    return auto.AutoIAFNormal(model, hidden_dims=[2 * N * H], num_flows=1)


AUTO = {
    "AutoNormal": auto.AutoNormal,
    "AutoMultivariateNormal": auto.AutoMultivariateNormal,
    "AutoIAFNormal": auto_iaf,
    "AutoDelta": auto.AutoDelta,
}


HEAVY = ("AutoMultivariateNormal", "AutoIAFNormal")  # to compile


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.full] if k in HEAVY else []) for k in AUTO])
def test_autoguides_do_not_look_at_the_data(kind):
    for loss in (DSM, AVERAGED):
        with pytest.raises(ValueError, match=r"does not look at the visible values.*AmortizedGuide\(model\)"):
            problem(param_model, AUTO[kind](param_model), data(), loss=loss)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (lambda m: auto.AutoBNAFNormal(m, num_flows=1, hidden_factors=[1]), "AutoBNAFNormal does not look"),
        (lambda m: auto.AutoDAIS(m, K=2), "guide has a factor"),
    ],
    ids=["AutoBNAFNormal", "AutoDAIS"],
)
def test_autoguides_that_cannot_be_scored_are_named(kind, message):
    with pytest.raises(ValueError, match=message):
        problem(param_model, kind(param_model), data(), loss=AVERAGED)


# Guides that can't be differentiated


def guide_of(make):
    def run(x):
        a = numpyro.param("a", jnp.ones(H))
        with numpyro.plate("data", len(x)):
            fn = make(a + 0.01 * x[:, :1] ** 2)
            numpyro.sample("h", fn if fn.event_dim else fn.to_event(1))

    return run


def relaxed_bernoulli(**kwargs):
    return dist.RelaxedBernoulli(jnp.array(0.1), **kwargs)


def without_inverse(a):
    """A flow with a forward map only."""
    from numpyro.distributions.flows import BlockNeuralAutoregressiveTransform
    from numpyro.nn import BlockNeuralAutoregressiveNN

    init, apply = BlockNeuralAutoregressiveNN(H, [4])
    arn = functools.partial(apply, init(key(1), (H,))[1])
    return dist.TransformedDistribution(dist.Normal(a, 1.0).to_event(1), BlockNeuralAutoregressiveTransform(arn))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a: dist.Beta(a, 1.0), r"'h' \(Beta\) can't be differentiated twice"),
        (lambda a: dist.Dirichlet(a), r"'h' \(Dirichlet\) can't be differentiated twice"),
        (lambda a: dist.Gamma(a, 1.0), r"'h' \(Gamma\) can't be differentiated twice"),
        (lambda a: dist.InverseGamma(a, 1.0), "can't be differentiated twice"),
        (lambda a: dist.StudentT(a, 0.0, 1.0), "can't be differentiated twice"),
        (lambda a: relaxed_bernoulli(logits=a), "temperature below 1"),
        (lambda a: relaxed_bernoulli(probs=0.5 * a), "temperature below 1"),
        (lambda a: dist.Poisson(a), "can't be reparameterised"),
        (lambda a: dist.Bernoulli(logits=a), "can't be reparameterised"),
        (without_inverse, "flow without an inverse"),
    ],
    ids=[
        "beta",
        "dirichlet",
        "gamma",
        "inverse-gamma",
        "student",
        "concrete",
        "concrete-probs",
        "poisson",
        "bernoulli",
        "flow",
    ],
)
def test_guides_that_cannot_be_differentiated_are_caught_at_init(make, message):
    with pytest.raises(ValueError, match=message):
        problem(param_model, guide_of(make), data())


def test_a_gamma_with_fixed_concentration_is_welcome():
    def model(x):
        w = numpyro.param("w", initial()[0])
        with numpyro.plate("data", len(x)):
            x = flat("x", x)
            h = numpyro.sample("h", dist.Gamma(2.0, 1.0).expand([H]).to_event(1))
            numpyro.factor("energy", -0.5 * (x**2).sum(-1) + ((x @ w) * h).sum(-1))

    def guide(x):
        a = numpyro.param("a", initial()[3])
        with numpyro.plate("data", len(x)):
            numpyro.sample("h", dist.Gamma(2.0, jnp.exp(x @ a)).to_event(1))

    check_gradients(problem(model, guide, data()))


# Optimisers


def labels(params):
    return {name: "slow" if name in ("b", "a") else "fast" for name in params}


OPTIMS = {
    "adam": numpyro.optim.Adam(1e-2),
    "clipped-adam": numpyro.optim.ClippedAdam(1e-2, clip_norm=0.05),
    "adagrad": numpyro.optim.Adagrad(1e-2),
    "momentum": numpyro.optim.Momentum(1e-2, 0.9),
    "rmsprop": numpyro.optim.RMSProp(1e-2),
    "rmsprop-momentum": numpyro.optim.RMSPropMomentum(1e-2),
    "sm3": numpyro.optim.SM3(1e-2),
    "sgd": numpyro.optim.SGD(optimizers.exponential_decay(1e-2, 2, 0.5)),
    "jax-nesterov": optimizers.nesterov(1e-2, 0.9),
    "jax-adamax": optimizers.adamax(1e-2),
    "optax-adam": optax.adam(optax.exponential_decay(1e-2, 2, 0.5)),
    "optax-adamw": optax.adamw(1e-2),
    "optax-adagrad": optax.adagrad(1e-2),
    "optax-clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(optax.cosine_decay_schedule(1e-2, 9))),
    "optax-clipped-value": optax.chain(optax.clip(0.1), optax.trace(0.9), optax.scale(-1e-2)),
    "optax-multi": optax.multi_transform({"slow": optax.sgd(1e-3), "fast": optax.adam(1e-2)}, labels),
    "optax-masked": optax.masked(optax.adam(1e-2), lambda params: {name: name == "a" for name in params}),
    "optax-injected": optax.inject_hyperparams(optax.rmsprop)(learning_rate=1e-2),
    "optax-multi-steps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


@pytest.mark.parametrize("name", OPTIMS)
def test_a_differentiable_step_is_the_step_and_its_derivative_is_finite_at_zero(name):
    """ "dead" has a gradient of exactly 0 that still hangs on t, as behind a ReLU."""
    optim = as_optim(OPTIMS[name], "optim")
    start = optim.init({"a": jnp.array([1.0, -0.5]), "w": jnp.ones((2, 2)), "dead": jnp.zeros(2)})

    def steps(t, update):
        state = start
        for i in range(3):
            a, w = (optim.get_params(state)[name] for name in "aw")
            gradient = {"a": jnp.sin(a * t) + i, "w": w - t, "dead": jnp.maximum(t - jnp.array([9.0, 8.0]), 0.0)}
            state = update(gradient, state, jnp.sum(a * t))
        return sum(jnp.sin(p).sum() for p in optim.get_params(state).values()), state

    whole = jax.jit(lambda t: steps(t, lambda *a: differentiable_update(optim, *a)))
    plain = jax.jit(lambda t: steps(t, lambda g, s, value: optim.update(g, s, value=value)))
    t = jnp.array(0.7)
    for a, b in zip(jax.tree.leaves(whole(t)), jax.tree.leaves(plain(t)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    slope = jax.jit(jax.grad(lambda t: whole(t)[0]))(t)
    theirs = central_difference(lambda step: whole(t + step)[0], 1e-4)
    np.testing.assert_allclose(slope, theirs, rtol=1e-6, atol=1e-10)


def test_per_parameter_settings_are_the_users():
    optim = optax.multi_transform({"slow": optax.sgd(1e-3), "fast": optax.sgd(1e-1)}, labels)
    sgd = numpyro.optim.SGD(1.0)
    moves = []
    for outer in (optim, sgd):
        bism = BiSM(param_model, param_guide, outer, DSM, inner_optim=sgd, num_inner_steps=0, hypergradient=Detached())
        state = bism.init(key(), data())
        before = bism.optim.get_params(state.optim_state)
        with jax.disable_jit():
            after = bism.optim.get_params(bism.update(state, data())[0].optim_state)
        moves.append({name: after[name] - before[name] for name in before})
    for name, factor in {"w": 0.1, "b": 0.001, "s": 0.1}.items():
        np.testing.assert_allclose(moves[0][name], factor * moves[1][name], rtol=1e-8)
        assert jnp.abs(moves[1][name]).max() > 1e-3


def test_optimisers_that_take_no_steps_are_refused():
    with pytest.raises(ValueError, match="inner_optim=Minimize"):
        BiSM(param_model, param_guide, numpyro.optim.Adam(1e-2), DSM, inner_optim=numpyro.optim.Minimize())
    with pytest.raises(ValueError, match="got float"):
        BiSM(param_model, param_guide, 1e-2, DSM)


# Training: one small problem, compiled a few times


TINY = """
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro_bism import BiSM, DenoisingScoreMatching, Unrolled

    def model(x):
        w = numpyro.param("w", lambda k: jax.random.normal(k, ()))
        with numpyro.plate("data", len(x)):
            x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False), obs=x)
            h = numpyro.sample("h", dist.Normal(0.0, 1.0))
            numpyro.factor("energy", -0.5 * (x**2).sum(-1) + w * h * x[:, 0])

    def guide(x):
        a = numpyro.param("a", 0.3)
        with numpyro.plate("data", len(x)):
            numpyro.sample("h", dist.Normal(a * x[:, 0], 0.7))

    def fresh():
        optim = numpyro.optim.Adam(1e-2)
        return BiSM(model, guide, optim, DenoisingScoreMatching(0.3), num_inner_steps=1, hypergradient=Unrolled(1))

    x = jax.random.normal(jax.random.key(5), (6, 2))
"""


@pytest.fixture(scope="module")
def tiny():
    """A small trained problem in single precision: its namespace, and a run of six steps."""
    names: dict[str, Any] = {}
    with jax.enable_x64(False):
        exec(textwrap.dedent(TINY), names)
        names["bism"] = names["fresh"]()
        names["six"] = names["bism"].run(jax.random.key(0), 6, names["x"], progress_bar=False)
    return names


@pytest.fixture
def single():
    with jax.enable_x64(False):
        yield


def assert_equal(ours, theirs):
    ours, theirs = map(jax.tree.leaves, (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = map(jax.random.key_data, (a, b))
        np.testing.assert_array_equal(a, b)


def test_run_does_not_depend_on_the_progress_bar_or_on_where_it_stopped(tiny, single, capsys):
    bism, x, six = tiny["bism"], tiny["x"], tiny["six"]
    assert six.losses.dtype == jnp.float32 and len(set(six.losses.tolist())) == 6
    assert_equal(bism.run(jax.random.key(0), 6, x, progress_bar=True), six)
    assert "6/6" in capsys.readouterr().err
    half = bism.run(jax.random.key(0), 3, x, progress_bar=False)
    rest = bism.run(jax.random.key(9), 3, x, progress_bar=False, init_state=half.state)
    assert_equal(jnp.concatenate([half.losses, rest.losses]), six.losses)
    assert_equal((rest.params, rest.state), (six.params, six.state))
    again = bism.run(jax.random.key(9), 3, x, progress_bar=False, init_state=half.state)  # still the caller's
    assert_equal(again, rest)


def test_updates_in_a_loop_are_the_run_and_compile_once(tiny, single):
    traced = []

    def update(state, x):
        traced.append(x)
        return tiny["bism"].update(state, x)

    update = jax.jit(update)
    state = tiny["bism"].init(jax.random.key(0), tiny["x"])
    for expected in tiny["six"].losses:
        state, loss = update(state, tiny["x"])
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert len(traced) == 1
    np.testing.assert_allclose(ravel(tiny["bism"].get_params(state)), ravel(tiny["six"].params), rtol=1e-5)
    np.testing.assert_allclose(state.info.outer_loss, tiny["six"].losses[-1], rtol=1e-5)


def test_run_under_vmap_and_jit_is_the_run_of_each_seed(tiny, single):
    """Initial values too, which here depend on the key, by a BiSM that has met nothing concrete before."""
    bism, x = tiny["fresh"](), tiny["x"]

    @jax.jit
    def seeds(keys, x):
        def one(k):
            result = bism.run(k, 6, x)
            return result.params, result.losses

        return jax.vmap(one)(keys)

    keys = jax.random.split(jax.random.key(3), 2)
    params, losses = seeds(keys, x)
    for i, k in enumerate(keys):
        expected = tiny["bism"].run(k, 6, x, progress_bar=False)
        np.testing.assert_allclose(losses[i], expected.losses, rtol=1e-4)
        for name, value in expected.params.items():
            np.testing.assert_allclose(params[name][i], value, rtol=1e-4)


def test_init_under_jit_starts_where_init_does():
    """Initial values that depend on the key and on the data, and mutable state, come from the real ones."""

    def model(x):
        b = numpyro.param("b", lambda k: x.mean(0) + jax.random.normal(k, (D,)))
        norm = flax_module("norm", LinenNorm(), x, mutable=["batch_stats"])
        with numpyro.plate("data", len(x)):
            numpyro.factor("energy", centred(flat("x", x), b) - 0.1 * (norm(x) ** 2).sum(-1))

    def init(k, x, given):
        bism = BiSM(model, no_latents, numpyro.optim.SGD(0.1), DSM)
        state = bism.init(k, x, init_params=given)
        return state.optim_state[1][0], state.mutable_state

    given = {  # flax_module wants both or neither
        "norm$params": {"BatchNorm_0": {"bias": jnp.ones(D), "scale": 2 * jnp.ones(D)}},
        "norm$state": {"batch_stats": {"BatchNorm_0": {"mean": jnp.ones(D), "var": 2 * jnp.ones(D)}}},
    }
    ours = [jax.tree.leaves(f(key(7), data() + 1.0, given)) for f in (init, jax.jit(init))]
    for a, b in zip(*ours, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_old_random_keys_and_numpy_data_train_alike(tiny, single):
    old = tiny["bism"].run(jax.random.PRNGKey(0), 6, np.asarray(tiny["x"]), progress_bar=False)
    assert_equal((old.params, old.losses), (tiny["six"].params, tiny["six"].losses))
    assert old.state.rng_key.dtype == jnp.uint32


CONTINUE = """
    import pickle, sys
    with open(sys.argv[1], "rb") as file:
        state = pickle.load(file)
    bism = fresh()
    result = bism.run(None, 3, x, progress_bar=False, init_state=state)
    with open(sys.argv[2], "wb") as file:
        pickle.dump((result.losses, result.params, result.state), file)
"""


def test_a_pickled_state_continues_in_another_process_bit_for_bit(tiny, single, tmp_path):
    half = tiny["bism"].run(jax.random.key(0), 3, tiny["x"], progress_bar=False)
    (tmp_path / "state").write_bytes(pickle.dumps(half.state))
    code = textwrap.dedent(TINY) + textwrap.dedent(CONTINUE)
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path / "state"), str(tmp_path / "result")]
    subprocess.run(command, check=True, timeout=300)
    losses, params, state = pickle.loads((tmp_path / "result").read_bytes())
    assert_equal((losses, params, state), (tiny["six"].losses[3:], tiny["six"].params, tiny["six"].state))


def test_a_state_saved_as_arrays_is_restored_into_a_fresh_one(tiny, single, tmp_path):
    """With numpy alone: the leaves in order, the random key as its data."""
    half = tiny["bism"].run(jax.random.PRNGKey(0), 3, tiny["x"], progress_bar=False).state
    np.savez(tmp_path / "state.npz", *jax.tree.leaves(half))
    blank = tiny["fresh"]().init(jax.random.PRNGKey(1), tiny["x"])
    with np.load(tmp_path / "state.npz") as saved:
        state = jax.tree.unflatten(jax.tree.structure(blank), [jnp.asarray(saved[name]) for name in saved.files])
    rest = tiny["bism"].run(None, 3, tiny["x"], progress_bar=False, init_state=state)
    assert_equal((rest.losses, rest.params), (tiny["six"].losses[3:], tiny["six"].params))


# The rest of NumPyro


def test_the_same_model_goes_to_svi_mcmc_and_predictive():
    """p(h | v) = N(Wᵀv, I): NUTS on the model unchanged, at given θ, finds it; SVI's first loss is the inner loss."""
    x = data()
    params = {"w": 2 * initial()[0], "b": initial()[1], "s": initial()[2]}
    kernel = NUTS(handlers.substitute(param_model, params))
    mcmc = MCMC(kernel, num_warmup=200, num_samples=500, progress_bar=False)
    mcmc.run(key(1), x)
    h = mcmc.get_samples()["h"]
    effective = numpyro.diagnostics.effective_sample_size(np.asarray(h)[None])
    assert (abs(h.mean(0) - x @ params["w"]) < 5 * h.std(0) / effective**0.5).all()
    assert abs(h.mean(0)).max() > 0.5

    p = problem(param_model, param_guide, x, loss=SlicedScoreMatching())
    svi = SVI(param_model, param_guide, numpyro.optim.SGD(0.1), Trace_ELBO(num_particles=500))
    state = svi.init(key(), x)
    many = problem(param_model, param_guide, x, loss=SlicedScoreMatching(), inner_loss=Trace_ELBO(num_particles=500))
    np.testing.assert_allclose(many.inner() * N, svi.evaluate(state, x), rtol=0.05)
    draws = Predictive(param_guide, params=p.params(), num_samples=400)(key(2), x)["h"]
    error = draws.std(0) / 400**0.5
    assert (abs(draws.mean(0) - jnp.tanh(x @ initial()[3])) < 5 * error).all()


# The truth


def linear_gaussian():
    return LinearGaussian.random(np.random.default_rng(3), D, 1)


def oracle_model(x):
    """The linear-Gaussian energy; only b and the precision of v through A are free to move."""
    o = linear_gaussian()
    A, b = numpyro.param("A", jnp.asarray(o.A)), numpyro.param("b", jnp.asarray(o.b))
    with numpyro.plate("data", len(x)):
        x = flat("x", x)
        h = numpyro.sample("h", dist.Normal(0.0, 1.0).expand([1]).to_event(1).mask(False))
        quadratic = -0.5 * ((x @ A) * x).sum(-1) + ((x @ o.W) * h).sum(-1) - 0.5 * ((h @ o.B) * h).sum(-1)
        numpyro.factor("energy", quadratic + x @ b + h @ o.c)


def oracle_guide(x):
    q = linear_gaussian().posterior
    M, m = (numpyro.param(name, jnp.asarray(getattr(q, name))) for name in "Mm")
    with numpyro.plate("data", len(x)):
        numpyro.sample("h", dist.Normal(x @ M.T + m, np.sqrt(q.S[0])).to_event(1))


def noisy_optimum(loss, cov):
    """The model covariance that minimises the expected loss on data of this covariance."""
    if isinstance(loss, DenoisingScoreMatching):
        return dsm_optimum(Moments(np.zeros(len(cov)), cov), loss.sigma).cov
    if isinstance(loss, MultiscaleDenoisingScoreMatching):
        # E_σ [P (C + σ²I) / σ² - I / σ₀²] = 0, so P⁻¹ = σ₀² (E[σ⁻²] C + I)
        low, high = loss.sigma_min, loss.sigma_max
        mean = (low**-2 - high**-2) / (2 * np.log(high / low)) if loss.spacing == "geometric" else 1 / (low * high)
        return loss.sigma0**2 * (mean * cov + np.eye(len(cov)))
    return cov


TRUTH = [
    ScoreMatching(),
    SlicedScoreMatching(2, "gaussian"),
    DenoisingScoreMatching(0.3),
    DenoisingScoreMatching(0.3, 2, "score"),
    MultiscaleDenoisingScoreMatching(0.3, 0.6, 0.4),
    MultiscaleDenoisingScoreMatching(0.3, 0.6, 0.4, "linear", 2, "score"),
]


@pytest.mark.parametrize("loss", TRUTH, ids=str)
def test_every_outer_loss_is_minimised_at_the_truth(loss):
    """Data whose noisy optimum is the model itself: ∂J/∂(A, b) is nothing there, and not nothing elsewhere.

    The guide is the posterior, so the score is the marginal's for every h.
    """
    oracle = linear_gaussian()
    # data covariance C such that noisy_optimum(C) is the model's: noisy_optimum is affine in C
    at_zero = noisy_optimum(loss, np.zeros((D, D)))
    slope = (noisy_optimum(loss, np.eye(D)) - at_zero)[0, 0]
    root = np.linalg.cholesky((oracle.cov - at_zero) / slope)
    num, chunk = 40_000, 1000
    x = jnp.asarray(np.random.default_rng(1).normal(size=(num, D)) @ root.T + oracle.mean)
    p = problem(oracle_model, oracle_guide, x[:chunk], loss=loss)

    def gradient(theta, k, chunk):
        batch = p.pair.batch(k, [chunk], p.batch.spec)
        return jax.grad(lambda t: p.pair.outer_loss(k, p.params(t), batch, loss))(theta)

    gradients = jax.jit(jax.vmap(gradient, (None, 0, 0)))
    chunks = x.reshape(-1, chunk, D)
    keys = jax.random.split(key(4), len(chunks))
    errors = []
    for scale in (1.0, 1.3):
        g = gradients({**p.theta, "A": scale * p.theta["A"]}, keys, chunks)
        errors.append({name: v.mean(0) / (v.std(0) / len(chunks) ** 0.5) for name, v in g.items()})
    assert max(abs(v).max() for v in errors[0].values()) < 5
    assert jnp.diag(errors[1]["A"]).min() > 5


def test_default_settings_recover_the_linear_gaussian_model():
    """K = N = 5, Trace_ELBO, a learning rate that anneals: the model's covariance is the (noisy) data's to 5 %."""
    oracle = linear_gaussian()
    v, _ = oracle.sample(np.random.default_rng(2), 4000)
    sigma = 0.5

    def model(x):
        root = numpyro.param("root", jnp.eye(D))
        w, b = numpyro.param("w", 0.1 * jnp.ones(D)), numpyro.param("b", jnp.zeros(D))
        with numpyro.plate("data", len(v), subsample_size=200) as rows:
            x = flat("x", x[rows])
            h = numpyro.sample("h", dist.Normal(0.0, 1.0))
            numpyro.factor("energy", -0.5 * ((x @ root) ** 2).sum(-1) + h * (x @ w) + x @ b)

    def guide(x):
        M, m = numpyro.param("M", jnp.zeros(D)), numpyro.param("m", 0.0)
        scale = numpyro.param("scale", 1.0, constraint=positive)
        with numpyro.plate("data", len(v), subsample_size=200) as rows:
            numpyro.sample("h", dist.Normal(x[rows] @ M + m, scale))

    bism = BiSM(model, guide, optax.adam(optax.cosine_decay_schedule(3e-2, 1500)), DenoisingScoreMatching(sigma))
    p = bism.run(key(), 1500, jnp.asarray(v), progress_bar=False).params
    cov = np.linalg.inv(p["root"] @ p["root"].T - np.outer(p["w"], p["w"]))
    wanted = dsm_optimum(Moments.of(v), sigma)
    assert np.linalg.norm(cov - wanted.cov) < 0.05 * np.linalg.norm(wanted.cov)
    np.testing.assert_allclose(cov @ p["b"], wanted.mean, atol=0.05 * np.sqrt(wanted.cov.max()))
