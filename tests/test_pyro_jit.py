"""``jit=True``: the captured step is the eager step, and says so where it can't be."""

import copy
import sys

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from numpy.testing import assert_allclose
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_bism import (
    Amortized,
    AmortizedGuide,
    BiSM,
    ConcreteBernoulli,
    Covariance,
    DenoisingScoreMatching,
    Detached,
    Exact,
    FisherDivergence,
    Functional,
    Implicit,
    MultiscaleDenoisingScoreMatching,
    Penalty,
    ScoreMatching,
    SlicedScoreMatching,
    Unrolled,
)
from pyro_bism.compiled import inductor
from pyro_bism.rivals import CD, NCE, VNCE, MarginalSM, PersistentVI, PseudoLikelihood
from pyro_bism.sampling.kernels import Gibbs, Langevin
from pyro_bism.training import trainer
from test_pyro_bism import guide as gaussian_guide
from test_pyro_bism import model as gaussian

D, H, N = 3, 2, 7


pytestmark = pytest.mark.usefixtures("torch_double")


def data(n=N):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(1))


def energy(x, h):
    W = pyro.param("W", lambda: 0.3 * torch.randn(D, H))
    b = pyro.param("b", lambda: 0.1 * torch.randn(D))
    s = pyro.param("s", lambda: torch.full((D,), 0.9), constraint=dist.constraints.positive)
    return -0.5 * ((x - b) / s).square().sum(-1) + ((x @ W) * h).sum(-1)


def visible(x):
    return pyro.sample("x", dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)


def bits(x):
    with pyro.plate("data", len(x)):
        x = visible(x)
        h = pyro.sample("h", dist.Bernoulli(0.5).expand([H]).to_event(1).mask(False))
        pyro.factor("energy", energy(x, h))


def bits_guide(x):
    a = pyro.param("a", lambda: 0.3 * torch.randn(D, H))
    with pyro.plate("data", len(x)):
        pyro.sample("h", ConcreteBernoulli(0.3, x @ a).to_event(1))


def summed(x):
    W = pyro.param("W", lambda: 0.3 * torch.randn(D, H))
    b = pyro.param("b", lambda: 0.1 * torch.randn(D))
    c = pyro.param("c", lambda: 0.1 * torch.randn(H))
    with pyro.plate("data", len(x), dim=-2):
        v = visible(x)
        pyro.factor("quadratic", -0.5 * (v - b).square().sum(-1))
        with pyro.plate("units", H, dim=-1):
            h = pyro.sample("h", dist.Bernoulli(0.5).mask(False))
            pyro.factor("unit", h * (c + (v @ W).squeeze(-2)))


def summed_guide(x):
    a = pyro.param("a", lambda: 0.3 * torch.randn(D, H))
    with pyro.plate("data", len(x), dim=-2):
        logits = (x @ a).squeeze(-2)
        with pyro.plate("units", H, dim=-1):
            pyro.sample("h", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})


def adam():
    return pyro.optim.Adam({"lr": 1e-2, "betas": (0.9, 0.95)})


def state_of(bism):
    """All that a step changes, by name."""
    state = copy.deepcopy(bism.get_state())
    del state["rng"]
    leaves, _ = torch.utils._pytree.tree_flatten(state)
    return [x for x in leaves if isinstance(x, torch.Tensor | float)]


def trajectory(model, guide, jit, num_steps=4, optim=adam, x=None, between=None, **settings):
    """What ``info`` said at every step, and the state at the end."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    settings = {"loss": DenoisingScoreMatching(0.3), "num_inner_steps": 2, **settings}
    model, guide = (make() if getattr(make, "is_factory", False) else make for make in (model, guide))
    bism = BiSM(model, guide, optim(), jit=jit, **settings)
    infos = []
    for n in range(num_steps):
        bism.step(data() if x is None else x)
        infos.append(list(bism.info))
        if between:
            between(bism, n)
    return infos, state_of(bism), torch.rand(3), bism


def assert_same(*arguments, tolerance=1e-10, **settings):
    eager, captured = (trajectory(*arguments, jit=jit, **settings) for jit in (False, True))
    assert_allclose(eager[0], captured[0], rtol=tolerance, atol=1e-12)
    assert len(eager[1]) == len(captured[1])
    for ours, theirs in zip(eager[1], captured[1], strict=True):
        assert_allclose(ours, theirs, rtol=tolerance, atol=1e-10)
    assert_allclose(eager[2], captured[2])  # as many random numbers were drawn
    return captured[3]


STRATEGIES = {
    "detached": Detached(),
    "unrolled": Unrolled(2),
    "recomputed": Unrolled(3, memory="recompute"),
    "cg": Implicit("cg", 2, damping=0.1),
    "neumann": Implicit("neumann", 2),
    "nystrom": Implicit("nystrom", 2, damping=0.1),
    "amortized": Amortized(),
    "amortized-given": Amortized(0.1, 2),
    "penalty": Penalty(10.0),
    "scheduled-penalty": Penalty(lambda n: 1.0 + n),
    "covariance": Covariance(3),
    "functional": Functional(num_steps=2),
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_every_strategy_is_the_eager_one(replayed, strategy):
    bism = assert_same(bits, bits_guide, hypergradient=strategy)
    assert bism._num_captures == 1


@pytest.mark.parametrize("strategy", [Unrolled(1), Implicit(num_steps=2), Amortized(), Exact()], ids=repr)
def test_summed_out_latents(replayed, strategy):
    inner_loss = TraceEnum_ELBO(max_plate_nesting=2)
    loss = DenoisingScoreMatching(0.3, average="score")
    x = data()[:, None]
    assert_same(summed, summed_guide, hypergradient=strategy, inner_loss=inner_loss, loss=loss, x=x)


@pytest.mark.parametrize(
    ("loss", "inner_loss"),
    [
        (ScoreMatching(), Trace_ELBO()),
        (SlicedScoreMatching(2, num_particles=2), FisherDivergence()),
        (MultiscaleDenoisingScoreMatching(0.1, 0.5, 0.2), TraceMeanField_ELBO()),
        (DenoisingScoreMatching(0.3, num_particles=2, average="score"), Trace_ELBO(num_particles=2)),
    ],
    ids=["exact", "sliced-fisher", "multiscale-mean-field", "averaged"],
)
def test_every_loss_is_the_eager_one(replayed, loss, inner_loss):
    assert_same(gaussian, gaussian_guide, loss=loss, inner_loss=inner_loss, hypergradient=Unrolled(1))


OPTIMS = {
    "adamw": lambda: pyro.optim.AdamW({"lr": 1e-2}),
    "adam-decayed": lambda: pyro.optim.Adam({"lr": 1e-2, "weight_decay": 0.1}),
    "by-parameter": lambda: pyro.optim.Adam(lambda name: {"lr": 1e-2 if name in ("a", "w") else 1e-3}),
    "clipped": lambda: pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.9, "clip_norm": 0.05}),
    "clipped-norm": lambda: pyro.optim.Adam({"lr": 1e-2}, {"clip_norm": 0.1}),
    "amsgrad": lambda: pyro.optim.Adam({"lr": 1e-2, "amsgrad": True}),
    "sgd": lambda: pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9}),
    "rmsprop": lambda: pyro.optim.RMSprop({"lr": 1e-3}),
}


@pytest.mark.parametrize(
    "strategy", [Unrolled(2), pytest.param(Amortized(), marks=pytest.mark.full)], ids=["unrolled", "amortized"]
)
@pytest.mark.parametrize(
    "optim",
    [
        pytest.param(
            optim, id=name, marks=[] if name in ("clipped", "clipped-norm", "amsgrad", "sgd") else pytest.mark.full
        )
        for name, optim in OPTIMS.items()
    ],
)
def test_every_optimiser_is_the_eager_one(replayed, optim, strategy):
    assert_same(gaussian, gaussian_guide, optim=optim, hypergradient=strategy)


@pytest.mark.parametrize(
    ("kind", "strategy"), [(torch.optim.Adam, Unrolled(1)), (torch.optim.SGD, Amortized())], ids=["adam", "sgd"]
)
def test_a_schedule_moves_the_rate_and_captures_nothing_anew(replayed, kind, strategy):
    def scheduled():
        return pyro.optim.ExponentialLR({"optimizer": kind, "optim_args": {"lr": 1e-3}, "gamma": 0.5})

    def between(bism, n):
        bism.optim.step()

    bism = assert_same(gaussian, gaussian_guide, optim=scheduled, between=between, hypergradient=strategy)
    assert bism._num_captures == 1


def factory(make):
    make.is_factory = True
    return make


@factory
def batch_normed():
    class Guide(PyroModule):
        def __init__(self):
            super().__init__(name="guide")
            self.net = PyroModule[nn.Sequential](nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, H))
            self.scale = PyroParam(torch.full((H,), 0.7), constraint=dist.constraints.positive)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                return pyro.sample("h", dist.Normal(self.net(x), self.scale).to_event(1))

    return Guide()


def test_modules_and_their_buffers(replayed):
    bism = assert_same(gaussian, batch_normed, hypergradient=Unrolled(1))
    assert any(b.abs().sum() > 0 for b in bism._buffers())


def test_a_guide_made_from_the_model(replayed):
    assert_same(gaussian, factory(lambda: AmortizedGuide(gaussian, hidden_dims=(3,))), hypergradient=Amortized())


@pytest.mark.parametrize("read", [lambda x, i: x[i], lambda x, i: (x + 0.0)[i]], ids=["rows", "whole"])
def test_subsampled_rows(replayed, read):
    def rows(x):
        return pyro.plate("data", len(x), subsample_size=5)

    def model(x):
        with rows(x) as i:
            v = visible(x[i])
            assert x.shape == (40, D)
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
            pyro.factor("energy", energy(v, h))

    def guide(x):
        a = pyro.param("a", lambda: 0.3 * torch.randn(D, H))
        with rows(x) as i:
            pyro.sample("h", dist.Normal(torch.tanh(read(x, i) @ a), 0.7).to_event(1))

    assert_same(model, guide, hypergradient=Unrolled(1), x=data(40))


def test_a_closed_over_tensor_may_change_in_place(replayed):
    temperature = torch.tensor(1.0)

    def guide(x):
        a = pyro.param("a", lambda: 0.3 * torch.randn(D, H))
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(torch.tanh(x @ a), 0.7 * temperature).to_event(1))

    def between(bism, n):
        temperature.fill_(1.0 / (n + 2) if n < 3 else 1.0)

    bism = assert_same(gaussian, guide, between=between, hypergradient=Detached())
    assert bism._num_captures == 1


def test_new_shapes_are_captured_and_a_flood_of_them_is_refused(replayed, monkeypatch):
    monkeypatch.setattr(trainer, "MAX_CAPTURES", 3)
    bism = BiSM(gaussian, gaussian_guide, adam(), DenoisingScoreMatching(0.3), jit=True, hypergradient=Detached())
    for n in (4, 5, 4, 5):
        bism.step(data(n))
    assert bism._num_captures == 2
    with pytest.raises(RuntimeError, match="captured 3 times"):
        for n in range(6, 9):
            bism.step(data(n))
    bism.step(data(4))


def test_a_changed_setting_is_captured_anew(replayed):
    bism = BiSM(gaussian, gaussian_guide, adam(), DenoisingScoreMatching(0.3), jit=True, hypergradient=Detached())
    bism.step(data())
    for kept in bism.optim.optim_objs.values():
        kept.param_groups[0]["betas"] = (0.5, 0.9)
    bism.step(data())
    assert bism._num_captures == 2


def branches(x):
    with pyro.plate("data", len(x)):
        x = visible(x)
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        if pyro.param("turn", torch.ones(())) > 0:
            h = -h
        pyro.factor("energy", energy(x, h))


def leaves_torch(x):
    with pyro.plate("data", len(x)):
        x = visible(x)
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        turn = pyro.param("turn", torch.ones(()))
        pyro.factor("energy", energy(x, h) * float(turn.detach().numpy()))


@pytest.mark.parametrize(("model", "line"), [(branches, "if pyro.param"), (leaves_torch, "turn.detach")])
def test_what_looks_at_values_is_refused_by_site_and_line(replayed, model, line):
    bism = BiSM(model, gaussian_guide, adam(), DenoisingScoreMatching(0.3), jit=True)
    with pytest.raises(RuntimeError, match=rf"can't be captured[\s\S]*'h'[\s\S]*{line}"):
        bism.step(data())
    before = state_of(bism)
    with pytest.raises(RuntimeError):
        bism.step(data())
    for ours, theirs in zip(before, state_of(bism), strict=True):
        assert_allclose(ours, theirs)


def test_an_argument_that_is_no_tensor_is_refused():
    def with_object(program):
        return lambda x, extra: program(x)

    bism = BiSM(with_object(gaussian), with_object(gaussian_guide), adam(), DenoisingScoreMatching(0.3), jit=True)
    with pytest.raises(ValueError, match="is a object"):
        bism.step(data(), object())


def test_a_diverging_inner_loop_moves_nothing(replayed):
    bism = BiSM(
        gaussian,
        gaussian_guide,
        adam(),
        DenoisingScoreMatching(0.3),
        inner_optim=pyro.optim.Adam({"lr": 1e200}),
        jit=True,
        hypergradient=Detached(),
    )
    with pytest.raises(FloatingPointError, match="inner learning rate"):
        for _ in range(5):
            bism.step(data())
    assert all(p.isfinite().all() for p in bism.get_state()["params"].values())


def test_eager_and_captured_steps_take_turns(replayed):
    """One state: a run may change over at any step, and go on from a checkpoint."""

    def between(bism, n):
        bism.jit = not bism.jit
        bism.set_state(bism.get_state())

    eager = trajectory(gaussian, gaussian_guide, jit=False, num_steps=6, hypergradient=Amortized())
    mixed = trajectory(gaussian, gaussian_guide, jit=True, num_steps=6, hypergradient=Amortized(), between=between)
    assert_allclose(eager[0], mixed[0], rtol=1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_without_a_compiler_the_graph_is_replayed_and_that_is_said(monkeypatch):
    from torch._inductor import compile_fx, exc

    def missing(*args, **kwargs):
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(compile_fx, "compile_fx", missing)
    inductor._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler") as found:
        assert_same(gaussian, gaussian_guide, hypergradient=Unrolled(1))
    assert len([w for w in found if "compiler" in str(w.message)]) == 1


@pytest.mark.parametrize("part", ["compile_fx.compile_fx_inner", "cpu_vec_isa", "decomposition.select_decomp_table"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_torch_that_lacks_a_private_part_replays_the_graph_and_says_so_once(monkeypatch, part):
    monkeypatch.delattr(f"torch._inductor.{part}")
    if part == "cpu_vec_isa":  # else it would be imported anew
        monkeypatch.setitem(sys.modules, "torch._inductor.cpu_vec_isa", None)
    inductor._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"lacks what compiles it.*replayed operation by operation") as found:
        assert_same(gaussian, gaussian_guide, hypergradient=Detached())
    assert len([w for w in found if "replayed" in str(w.message)]) == 1


COMPILED = {"unrolled": Unrolled(1), "amortized": Amortized(), "covariance": Covariance(2)}


@pytest.mark.parametrize("strategy", [pytest.param(s, id=n, marks=pytest.mark.full) for n, s in COMPILED.items()])
def test_compiled(strategy):
    """torch's compiler keeps the noise: the same trajectory, to rounding."""
    assert_same(bits, bits_guide, hypergradient=strategy, num_steps=6, tolerance=1e-8)


def recorded(function, *inputs):
    graph = make_fx(function, tracing_mode="fake")(*inputs)
    return graph, lambda name: sum(name in str(node.target) for node in graph.graph.nodes)


def test_what_stands_twice_is_done_once_and_noise_is_drawn_as_often_as_it_stands():
    def function(x, w):
        first, second = x @ w + torch.randn_like(x @ w), x @ w + torch.randn_like(x @ w)
        return [first, first * second, (x @ w).sum(0), (x @ w).sum(1), torch.rand(2), torch.rand(2)]

    x, w = data(), torch.ones(D, 2)
    graph, count = recorded(function, x, w)
    torch.manual_seed(3)
    expected = function(x, w)
    assert count("mm") == 6
    inductor._merge(graph.graph)
    graph.graph.lint()
    graph.recompile()
    assert (count("mm"), count("randn_like"), count("rand."), count("sum")) == (1, 2, 2, 2)
    torch.manual_seed(3)
    for ours, theirs in zip(graph(x, w), expected, strict=True):
        assert (ours == theirs).all()


def test_equal_outputs_stay_tensors_of_their_own():
    graph, _ = recorded(lambda x: [x + 1, x + 1, x + 1.0], data())
    inductor._merge(graph.graph)
    graph.recompile()
    assert len({found.data_ptr() for found in graph(data())}) == 3


@pytest.mark.parametrize(
    "size, kept",
    [
        (inductor.MIN_ENTRIES, ["aten.rsub.Scalar"]),
        (inductor.MIN_ENTRIES - 1, []),
    ],
)
def test_a_scalar_is_kept_for_a_large_tensor(size, kept):
    """β^t stays a step on the way to 1 - β^t, which is all that the loop over the entries reads."""
    graph, _ = recorded(lambda x, t: [x / (1 - 0.9**t), 0.5**t], torch.ones(size), torch.tensor(3.0))
    inductor._store_scalars(graph.graph)
    assert [str(n.target) for n in graph.graph.nodes if n.meta.get("inductor_realize_to_strides")] == kept


def test_compiled_continues_bit_for_bit():
    """In float32, from a checkpoint, in a second BiSM."""
    torch.set_default_dtype(torch.float32)
    settings = {"loss": DenoisingScoreMatching(0.3), "num_inner_steps": 2, "hypergradient": Detached(), "jit": True}
    x = data().float()
    first = BiSM(gaussian, gaussian_guide, adam(), **settings)
    for _ in range(3):
        first.step(x)
    state = first.get_state()
    expected = [first.step(x) for _ in range(3)]
    pyro.clear_param_store()
    second = BiSM(gaussian, gaussian_guide, adam(), **settings)
    second.set_state(state)
    assert [second.step(x) for _ in range(3)] == expected


# Rivals


def weighted(x):
    """Its weight is a latent site with a prior."""
    w = pyro.sample("w", dist.Laplace(0.0, 1.0).expand([D]).to_event(1))
    with pyro.plate("data", len(x)):
        v = visible(x)
        pyro.factor("energy", (v @ w) - 0.5 * v.square().sum(-1))


def weighted_guide(x):
    loc = pyro.param("loc", lambda: 0.1 * torch.randn(D))
    pyro.sample("w", dist.Normal(loc, 0.5).to_event(1))


def ising(x):
    J = pyro.param("J", lambda: 0.3 * torch.randn(D, D))
    with pyro.plate("data", len(x)):
        v = pyro.sample("v", dist.Bernoulli(0.5).expand([D]).to_event(1).mask(False), obs=x)
        pyro.factor("energy", ((v @ J.triu(1)) * v).sum(-1))


def far():
    return dist.Normal(torch.zeros(D), 2.0).to_event(1)


RIVALS = {
    "score matching": lambda **k: MarginalSM(bits, adam(), ScoreMatching(), **k),
    "sliced": lambda **k: MarginalSM(bits, adam(), SlicedScoreMatching(), **k),
    "denoising": lambda **k: MarginalSM(bits, adam(), DenoisingScoreMatching(0.3), **k),
    "SGD": lambda **k: MarginalSM(bits, pyro.optim.SGD({"lr": 1e-2}), DenoisingScoreMatching(0.3), **k),
    "CD": lambda **k: CD(bits, adam(), Gibbs(), 2, **k),
    "persistent CD": lambda **k: CD(bits, adam(), Gibbs(), persistent=True, num_chains=4, **k),
    "Langevin": lambda **k: CD(bits, adam(), Langevin(0.1), 2, persistent=True, **k),
    "NCE": lambda **k: NCE(bits, adam(), num_noise=2, **k),
    "conditional NCE": lambda **k: NCE(bits, adam(), conditional=lambda v: dist.Normal(v, 0.5).to_event(1), **k),
    "VNCE": lambda **k: VNCE(bits, bits_guide, adam(), far(), num_particles=2, num_inner_steps=2, **k),
    "VNCE, ELBO": lambda **k: VNCE(summed, summed_guide, adam(), inner_loss=TraceEnum_ELBO(max_plate_nesting=2), **k),
    "persistent VI": lambda **k: PersistentVI(weighted, weighted_guide, adam(), Gibbs(), num_chains=4, **k),
    "pseudo-likelihood": lambda **k: PseudoLikelihood(ising, adam(), **k),
}


def rival_trajectory(make, jit, num_steps=4):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    rival, infos = make(jit=jit), []
    x = data() if rival.model is not ising else (data() > 0).double()
    x = x[:, None] if rival.model is summed else x
    for _ in range(num_steps):
        rival.step(x)
        infos.append(rival.info)
    return infos, state_of(rival)


def same_trajectory(make):
    (eager, kept), (captured, found) = (rival_trajectory(make, jit) for jit in (False, True))
    assert_allclose(captured, eager, rtol=1e-9, atol=1e-12)
    assert len(found) == len(kept)
    for a, b in zip(found, kept, strict=True):
        assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", RIVALS.values(), ids=RIVALS)
def test_every_rival_is_the_eager_one(replayed, make):
    same_trajectory(make)


@pytest.mark.parametrize("name", ["persistent CD", pytest.param("VNCE, ELBO", marks=pytest.mark.full)])
def test_a_compiled_rival(name):
    same_trajectory(RIVALS[name])


def test_a_diverging_rival_moves_nothing(replayed):
    rival = MarginalSM(bits, pyro.optim.Adam({"lr": 1e200}), ScoreMatching(), jit=True)
    rival.step(data())
    before = state_of(rival)
    with pytest.raises(FloatingPointError, match="The loss or its gradient is not finite"):
        rival.step(data())
    for a, b in zip(state_of(rival), before, strict=True):
        assert_allclose(a, b, rtol=0)


@pytest.mark.parametrize("optim", [adam, lambda: pyro.optim.SGD({"lr": 1e-2})], ids=["one graph", "step by step"])
def test_a_guide_that_diverges_stops_the_step(replayed, optim):
    """At the inner step where it does: neither that one nor any later moves anything."""

    def guide(x):
        a = pyro.param("a", lambda: 0.3 * torch.randn(D, H))
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(x @ a, 1.0).to_event(1))

    fast = pyro.optim.Adam({"lr": 1e200})
    rival = VNCE(gaussian, guide, optim(), far(), num_inner_steps=3, inner_optim=fast, jit=True)
    rival.evaluate_loss(data())
    theta = {name: pyro.param(name).detach().clone() for name in pyro.get_param_store() if name != "a"}
    with pytest.raises(FloatingPointError, match="guide's loss or its gradient is not finite at inner step 2 of 3"):
        rival.step(data())
    for name, value in theta.items():
        assert_allclose(pyro.param(name).detach(), value, rtol=0)
    assert pyro.param("a").isfinite().all()


def peeking(program):
    """It looks at the data once all its sites have been stated."""

    def model(x):
        program(x)
        if x.sum() > 1e9:
            raise AssertionError("no such data")

    return model


PEEKING = {
    "score matching": lambda: MarginalSM(peeking(bits), adam(), DenoisingScoreMatching(0.3), jit=True),
    # nothing is proved of a program whose path depends on values: no Gibbs
    "CD": lambda: CD(peeking(bits), adam(), Langevin(0.1), jit=True),
    "NCE": lambda: NCE(peeking(bits), adam(), far(), log_normalizer=0.0, jit=True),
    "VNCE": lambda: VNCE(peeking(bits), bits_guide, adam(), far(), log_normalizer=0.0, jit=True),
    "pseudo-likelihood": lambda: PseudoLikelihood(peeking(ising), adam(), jit=True),
}


@pytest.mark.parametrize("name", PEEKING)
def test_a_rival_that_looks_at_values_is_refused_by_site_and_line(replayed, name):
    x = (data() > 0).double() if name == "pseudo-likelihood" else data()
    with pytest.raises(RuntimeError, match=r"can't be captured[\s\S]*'energy'[\s\S]*if x.sum"):
        PEEKING[name]().step(x)
