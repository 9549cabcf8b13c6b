"""pyro_bism on the kinds of models that Pyro users write, each compared with a plain equivalent."""

import copy
import functools
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pyro.optim
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer import autoguide as auto
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils import _pytree as pytree

from oracles import LinearGaussian, Moments, dsm_optimum
from pyro_bism import (
    Amortized,
    AmortizedGuide,
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
from pyro_bism.optim.host import create_optimizers, descend, torch_optimizer
from pyro_bism.programs.visible import Rows
from test_pyro_bism import (
    OPTIMS,
    D,
    H,
    N,
    check_hypergradient,
    guide,
    model,
)

pytestmark = pytest.mark.usefixtures("torch_double")

DSM = DenoisingScoreMatching(0.3)
positive = dist.constraints.positive


def adam(lr=1e-2):
    return pyro.optim.Adam({"lr": lr})


def data(n=N):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(8))


def initial():
    """Initial values of the model (w, b, s) and the guide (a, scale)."""
    generator = torch.Generator().manual_seed(4)
    w, b, a = (torch.randn(shape, generator=generator) for shape in ((D, H), (D,), (D, H)))
    return 0.3 * w, 0.1 * b, torch.full((D,), 0.9), 0.3 * a, torch.full((H,), 0.7)


def train(model, guide, *args, optim=None, loss=DSM, num_steps=2, **kwargs):
    """Losses and final φ, θ of a few steps from one seed, in the order the programs meet them."""
    settings = {k: kwargs.pop(k) for k in ("visible", "inner_loss", "hypergradient", "inner_optim") if k in kwargs}
    pyro.clear_param_store()
    bism = BiSM(model, guide, optim or adam(), loss, **settings)
    bism.pair(*args, **kwargs)
    torch.manual_seed(1)
    losses = [bism.step(*args, **kwargs) for _ in range(num_steps)]
    return losses, bism, bism.pair(*args, **kwargs)


def assert_same(ours, theirs, theta_order=None):
    """Two trainings agree, in losses and in every parameter; same names sorted by size, then by value."""
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9)
    for mine, other in ((ours[2].theta, theirs[2].theta), (ours[2].phi, theirs[2].phi)):
        mine, other = (torch.cat([p.detach().flatten() for p in ps.values()]).sort().values for ps in (mine, other))
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def outer_loss(bism, *args, seed=1, **kwargs):
    """J on these arguments with a known seed, and the batch it was taken on."""
    pair = bism.pair(*args, **kwargs)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    batch = pair.batch(leaves, spec)
    torch.manual_seed(seed)
    return pair.outer_loss(batch, bism.loss), pair, batch


def hand_loss(bism, score, v, seed=1):
    """The same for a score function written by hand; draws of h come after the noise, as in BiSM."""
    torch.manual_seed(seed)
    noise = bism.loss.draw(v)
    return bism.loss(score, v, noise).mean()


def flat(name, value, dim=D):
    return pyro.sample(name, dist.Normal(0.0, 1.0).expand([dim]).to_event(1).mask(False), obs=value)


def no_latents(*args, **kwargs):
    pass


# One model in many clothes: the reference is written with pyro.param


def joint(x, w, b, s):
    with pyro.plate("data", len(x)):
        x = flat("x", x)
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        pyro.factor("energy", -0.5 * (((x - b) / s) ** 2).sum(-1) + ((x @ w) * h).sum(-1))


def posterior(x, a, scale):
    with pyro.plate("data", len(x)):
        pyro.sample("h", dist.Normal(torch.tanh(x @ a), scale).to_event(1))


def param_model(x):
    w, b, s = initial()[:3]
    joint(x, pyro.param("w", w), pyro.param("b", b), pyro.param("s", s, constraint=positive))


def param_guide(x):
    a, scale = initial()[3:]
    posterior(x, pyro.param("a", a), pyro.param("scale", scale, constraint=positive))


class Weights(nn.Module):
    """A plain module: the positive scale by an exponential, as Pyro's own transform."""

    def __init__(self):
        super().__init__()
        w, b, s = initial()[:3]
        self.w, self.b, self.log_s = nn.Parameter(w), nn.Parameter(b), nn.Parameter(s.log())

    def forward(self):
        return self.w, self.b, self.log_s.exp()


class Energy(PyroModule):
    def __init__(self):
        super().__init__()
        w, b, s = initial()[:3]
        self.w, self.b = nn.Parameter(w), PyroParam(b)
        self.s = PyroParam(s, constraint=positive)

    def forward(self, x):
        joint(x, self.w, self.b, self.s)

    @pyro_method
    def density(self, x):
        self(x)


class Inner(PyroModule):
    def __init__(self, **values):
        super().__init__()
        for name, value in values.items():
            setattr(self, name, value)


class Nested(PyroModule):
    """Two levels down, one level down, and a decorated property."""

    def __init__(self):
        super().__init__()
        w, b, s = initial()[:3]
        self.net = Inner(deep=Inner(w=nn.Parameter(w)), s=PyroParam(s, constraint=positive))
        self.linear = PyroModule[nn.Linear](D, 1)
        with torch.no_grad():
            self.linear.weight.copy_(b)
        self.linear.bias.requires_grad_(False)

    def forward(self, x):
        joint(x, self.net.deep.w, self.linear.weight.squeeze(0), self.net.s)


class Guide(PyroModule):
    def __init__(self, name=""):
        super().__init__(name)
        a, scale = initial()[3:]
        self.a, self.scale = nn.Parameter(a), PyroParam(scale, constraint=positive)

    def forward(self, x):
        posterior(x, self.a, self.scale)

    def run(self, x):
        self(x)


def by_module(net):
    return lambda x: joint(x, *pyro.module("net", net)())


CLOTHES = {
    "pyro.module": lambda: (by_module(Weights()), param_guide),
    "PyroModule": lambda: (Energy(), Guide("guide")),
    "nested PyroModules": lambda: (Nested(), param_guide),
    "bound methods": lambda: (Energy().density, Guide("guide").run),
    "partials": lambda: (
        functools.partial(lambda scale, x: param_model(scale * x), 1),
        functools.partial(lambda x, twice: param_guide(x), twice=False),
    ),
}


@pytest.mark.parametrize("loss", [DSM, ScoreMatching()], ids=["denoising", "exact"])
@pytest.mark.parametrize("kind", ["pyro.module", "PyroModule", "nested PyroModules", "bound methods"])
def test_every_way_to_write_the_parameters_trains_alike(kind, loss):
    expected = train(param_model, param_guide, data(), loss=loss)
    start = torch.cat([p.flatten() for p in initial()[:3]])
    moved = torch.cat([p.detach().flatten() for p in expected[2].theta.values()])
    assert not torch.allclose(start.sort().values, moved.sort().values, rtol=1e-3)
    assert_same(train(*CLOTHES[kind](), data(), loss=loss), expected)


def test_partials_and_lambdas_are_models():
    pair = functools.partial(lambda n, x: param_model(x), 1), functools.partial(lambda x, on: param_guide(x), on=True)
    assert_same(train(*pair, data()), train(param_model, param_guide, data()))


def test_tied_weights_get_the_sum_of_both_gradients():
    """x Vᵀ V h-style tying: one matrix read as encoder and as decoder."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(D, H, bias=False)
            self.two = nn.Linear(D, H, bias=False)
            self.one.weight = nn.Parameter(initial()[0].T.contiguous())
            self.two.weight = self.one.weight

        def forward(self, x):
            return torch.tanh(self.one(x)) + self.two(x)

    def energy(x, drive):
        with pyro.plate("data", len(x)):
            x = flat("x", x)
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
            pyro.factor("energy", -0.5 * (x**2).sum(-1) + (drive(x) * h).sum(-1))

    def plain(x):
        w = pyro.param("w", initial()[0].T.contiguous())
        energy(x, lambda x: torch.tanh(x @ w.T) + x @ w.T)

    net = Tied()
    tied = train(lambda x: energy(x, pyro.module("net", net)), param_guide, data())
    assert_same(tied, train(plain, param_guide, data()))
    assert net.one.weight is net.two.weight
    torch.testing.assert_close(net.two.weight, pyro.param("w"), rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store:UserWarning")  # Pyro's own
def test_frozen_weights_stay_and_the_rest_train_as_if_they_were_constants():
    frozen = Weights()
    frozen.b.requires_grad_(False)

    def constant_b(x):
        w, b, s = initial()[:3]
        joint(x, pyro.param("w", w), b, pyro.param("s", s, constraint=positive))

    ours = train(by_module(frozen), param_guide, data())
    assert_same(ours, train(constant_b, param_guide, data()))
    assert torch.equal(frozen.b, initial()[1])


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store:UserWarning")  # Pyro's own
def test_a_weight_unfrozen_during_training_starts_to_train():
    net = Weights()
    net.b.requires_grad_(False)
    bism = BiSM(by_module(net), param_guide, adam(), DSM)
    x = data()
    bism.step(x)
    net.b.requires_grad_(True)
    bism.step(x)
    assert not torch.allclose(net.b, initial()[1])
    net.w.requires_grad_(False)
    w = net.w.clone()
    bism.step(x)
    assert torch.equal(net.w, w)


def test_parameters_cleared_or_loaded_during_training_are_the_ones_trained(tmp_path):
    x = data()
    bism = BiSM(param_model, param_guide, adam(), DSM)
    bism.step(x)
    pyro.get_param_store().save(tmp_path / "store.pt")
    saved = pyro.param("w").detach().clone()
    for _ in range(2):
        bism.step(x)
    pyro.clear_param_store()
    bism.step(x)
    assert not torch.equal(pyro.param("w"), initial()[0])  # made anew, and moved
    pyro.get_param_store().load(tmp_path / "store.pt")
    torch.testing.assert_close(pyro.param("w"), saved, rtol=0, atol=0)
    bism.step(x)
    assert not torch.equal(pyro.param("w"), saved)


def test_per_parameter_settings_and_clipping_are_the_users():
    """A callable rate: the slow parameter moves a tenth as far at Adam's first step, the clipped ones as SGD says."""

    def rate(name):
        return {"lr": 1e-3 if name == "b" else 1e-2}

    _, _, pair = train(param_model, param_guide, data(), optim=pyro.optim.Adam(rate), num_steps=1)
    w, b = initial()[:2]
    torch.testing.assert_close((pair.theta["w"] - w).abs(), torch.full_like(w, 1e-2), rtol=1e-4, atol=0)
    torch.testing.assert_close((pair.theta["b"] - b).abs(), torch.full_like(b, 1e-3), rtol=1e-4, atol=0)

    def clip(module, name):
        return {"clip_norm": 1e-3} if name == "w" else {"clip_value": 1e-4}

    sgd = pyro.optim.SGD({"lr": 1.0}, clip)
    _, _, pair = train(param_model, param_guide, data(), optim=sgd, num_steps=1)
    assert (pair.theta["w"] - w).norm().item() == pytest.approx(1e-3, rel=1e-4)
    torch.testing.assert_close((pair.theta["b"] - b).abs(), torch.full_like(b, 1e-4))


# Module state: batch normalisation, dropout


def normed_guide(net):
    def run(x):
        a, scale = initial()[3:]
        z = pyro.module("norm", net)(x)
        posterior(z, pyro.param("a", a), pyro.param("scale", scale, constraint=positive))

    return run


@pytest.mark.parametrize("num_inner_steps", [0, 1, 5])
@pytest.mark.parametrize("inner_loss", [Trace_ELBO(), FisherDivergence()], ids=["elbo", "fisher"])
def test_batch_norm_buffers_move_once_a_step_as_under_svi(inner_loss, num_inner_steps):
    """Also when the batch changes its size, which makes BiSM look at the programs anew."""
    batches = [data(N), data(N) + 2.0, data(N - 2) - 1.0, data(N)]
    theirs = nn.BatchNorm1d(D, affine=False)
    svi = SVI(param_model, normed_guide(theirs), adam(), Trace_ELBO())
    for x in batches:
        svi.step(x)
    pyro.clear_param_store()
    ours = nn.BatchNorm1d(D, affine=False)
    # sliced score matching leaves the data as they are
    bism = BiSM(
        param_model,
        normed_guide(ours),
        adam(),
        SlicedScoreMatching(),
        inner_loss=inner_loss,
        num_inner_steps=num_inner_steps,
    )
    for x in batches:
        bism.evaluate_loss(x)
        bism.step(x)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == len(batches)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-12, atol=0)


def test_batch_norm_in_the_model_moves_once_a_step():
    net = nn.BatchNorm1d(D, affine=False)
    x = data() + 1.0

    def normed(x):
        param_model(x)
        with pyro.plate("rows", len(x)):
            pyro.factor("norm", -0.1 * (pyro.module("norm", net)(x) ** 2).sum(-1))

    for inner_loss in (Trace_ELBO(), FisherDivergence()):
        net.reset_running_stats()
        bism = BiSM(normed, param_guide, adam(), SlicedScoreMatching(), inner_loss=inner_loss)
        for step in (1, 2, 3):
            bism.step(x)
            torch.testing.assert_close(net.running_mean, (1 - 0.9**step) * x.mean(0))


def test_batch_norm_buffers_move_no_further_when_a_step_fails():
    net = nn.BatchNorm1d(D, affine=False)
    runs = [-1000]

    def fails_at_last(x):
        runs[0] += 1
        if runs[0] > 3:
            raise ZeroDivisionError
        normed_guide(net)(x)

    bism = BiSM(param_model, fails_at_last, adam(), DSM)
    bism.pair(data())
    runs[0] = 0
    with pytest.raises(ZeroDivisionError):
        bism.step(data())
    assert net.num_batches_tracked == 1


def test_exact_score_matching_refuses_batch_norm_that_couples_examples():
    net = nn.BatchNorm1d(D)
    bism = BiSM(param_model, normed_guide(net), adam(), ScoreMatching())
    with pytest.raises(ValueError, match="of one example depends on another"):
        bism.step(data())
    net.eval()
    assert np.isfinite(bism.step(data()))


def test_dropout_draws_anew_at_every_pass_and_its_mean_is_kept():
    """The gradient in b of a score with dropout scatters around the mask-free one."""
    drop = nn.Dropout(0.5)

    def dropped(x):
        b = pyro.param("b", torch.zeros(D))
        with pyro.plate("data", len(x)):
            x = flat("x", x)
            pyro.factor("energy", -0.5 * (x**2).sum(-1) + (pyro.module("drop", drop)(x) * b).sum(-1))

    x = data(2000)
    bism = BiSM(dropped, no_latents, adam(), ScoreMatching())
    # s = -v + 2 m b, so ∂J/∂b = mean of 2 m (2 m b - v), m ~ Bernoulli(½): here b = 0
    loss, pair, _ = outer_loss(bism, x)
    (gradient,) = torch.autograd.grad(loss, [pair.theta["b"]])
    terms = -2 * (torch.rand(2000, D) < 0.5) * x
    assert ((gradient + x.mean(0)).abs() < 5 * terms.std(0) / 2000**0.5).all()
    assert not torch.allclose(gradient, -x.mean(0), rtol=1e-3)
    drop.eval()
    (gradient,) = torch.autograd.grad(outer_loss(bism, x)[0], [pair.theta["b"]])
    torch.testing.assert_close(gradient, -x.mean(0))


# Plates, masks, scales


def centred(x, b, scale=1.0):
    return scale * -0.5 * ((x - b) ** 2).sum(-1)


def hand_score(v):
    return 0.1 - v


FULL = 40


def subsampled_by_index(x):
    b = pyro.param("b", lambda: 0.1 * torch.ones(D))
    with pyro.plate("data", FULL, subsample_size=N) as rows:
        x = flat("x", x[rows])
        pyro.factor("energy", centred(x, b))


def subsampled_by_primitive(x):
    b = pyro.param("b", lambda: 0.1 * torch.ones(D))
    with pyro.plate("data", FULL, subsample_size=N):
        x = flat("x", pyro.subsample(x, event_dim=1))
        pyro.factor("energy", centred(x, b))


def subsampled_in_nested_plates(x):
    b = pyro.param("b", lambda: 0.1 * torch.ones(D))
    with pyro.plate("data", FULL, subsample_size=N, dim=-2) as rows, pyro.plate("columns", D, dim=-1):
        x = pyro.sample("x", dist.Normal(0.0, 1.0).mask(False), obs=x[rows])
        pyro.factor("energy", -0.5 * (x - b) ** 2)


def whole(x):
    b = pyro.param("b", lambda: 0.1 * torch.ones(D))
    with pyro.plate("data", len(x)):
        pyro.factor("energy", centred(flat("x", x), b))


def normal_pieces(x):
    """The same energy as a normalised density, drawn inside nested plates."""
    b = pyro.param("b", lambda: 0.1 * torch.ones(D))
    with pyro.plate("data", len(x), dim=-2), pyro.plate("columns", D, dim=-1):
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


LOSSES = [
    ScoreMatching(),
    SlicedScoreMatching(2, "gaussian"),
    DSM,
    MultiscaleDenoisingScoreMatching(0.1, 0.5, 0.2, "linear"),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize(
    "program", [subsampled_by_index, subsampled_by_primitive, subsampled_in_nested_plates, whole, normal_pieces]
)
def test_plates_of_every_kind_give_the_score_of_their_rows(program, loss):
    bism = BiSM(program, no_latents, adam(), loss)
    ours, _, batch = outer_loss(bism, data(FULL))
    rows = batch.indices.get("data", torch.arange(FULL))
    assert len(set(rows.tolist())) == (FULL if program in (whole, normal_pieces) else N)
    torch.testing.assert_close(ours, hand_loss(bism, hand_score, data(FULL)[rows]))


def test_subsampled_rows_are_drawn_anew_every_step_and_all_are_reached():
    seen = set()
    bism = BiSM(subsampled_by_index, no_latents, adam(), ScoreMatching())
    pair = bism.pair(data(FULL))
    for _ in range(60):
        seen |= set(pair.batch([data(FULL)], None).indices["data"].tolist())
    assert seen == set(range(FULL))


@pytest.mark.parametrize("style", ["index", "primitive"])
def test_local_parameters_of_subsampled_rows_alone_move(style):
    """A guide with one location a datum: rows outside the minibatch keep theirs, under Adam's first step."""
    x = data(FULL)

    def energy(x):
        w = pyro.param("w", lambda: 0.3 * torch.ones(D, H))
        with pyro.plate("data", FULL, subsample_size=N) as rows:
            x = flat("x", x[rows] if style == "index" else pyro.subsample(x, event_dim=1))
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
            pyro.factor("energy", -0.5 * (x**2).sum(-1) + ((x @ w) * h).sum(-1))

    def local(x):
        loc = pyro.param("loc", lambda: torch.zeros(FULL, H))
        with pyro.plate("data", FULL, subsample_size=N) as rows:
            z = loc[rows] if style == "index" else pyro.subsample(loc, event_dim=1)
            seen.append(rows)
            pyro.sample("h", dist.Normal(z + 0.1 * (x if len(x) == N else x[rows])[:, :H], 0.5).to_event(1))

    seen = []
    bism = BiSM(energy, local, adam(), DenoisingScoreMatching(0.3, num_particles=2, average="score"))
    bism.pair(x)
    seen.clear()
    bism.step(x)
    assert len({tuple(rows.tolist()) for rows in seen}) == 1  # one minibatch a step, for both levels
    moved = (pyro.param("loc") != 0).any(-1)
    assert set(moved.nonzero().flatten().tolist()) == set(seen[0].tolist())


def test_masked_examples_have_no_energy_and_scaled_ones_more():
    """mask and scale multiply the energy, hence the score, of each example; around the visible site that is said."""
    x = data()
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0])

    def masked(x):
        b = pyro.param("b", lambda: 0.1 * torch.ones(D))
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=weight.bool()):
            pyro.factor("energy", centred(flat("x", x), b))

    def scaled(x):
        b = pyro.param("b", lambda: 0.1 * torch.ones(D))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=1.0 + weight):
            pyro.factor("energy", centred(flat("x", x), b))

    def scaled_subsample(x):
        b = pyro.param("b", lambda: 0.1 * torch.ones(D))
        with pyro.plate("data", 4 * N, subsample_size=N) as rows, pyro.poutine.scale(scale=3.0):
            pyro.factor("energy", centred(flat("x", x[rows]), b))

    for loss in LOSSES:
        pyro.clear_param_store()
        for program, factor in ((masked, weight[:, None]), (scaled, 1 + weight[:, None])):
            bism = BiSM(program, no_latents, adam(), loss)
            with nullcontext() if program is masked else pytest.warns(UserWarning, match="A scale of 1 to 2 covers"):
                ours = outer_loss(bism, x)[0]
            torch.testing.assert_close(ours, hand_loss(bism, lambda v, f=factor: f * hand_score(v), x))
        bism = BiSM(scaled_subsample, no_latents, adam(), loss)
        with pytest.warns(UserWarning, match="A scale of 3 covers visible site 'x'"):
            ours, _, batch = outer_loss(bism, data(4 * N))
        rows = data(4 * N)[batch.indices["data"]]
        torch.testing.assert_close(ours, hand_loss(bism, lambda v: 3 * hand_score(v), rows))


def test_masked_examples_train_nothing():
    """Model and guide masked alike: training on all rows is training on the unmasked ones, up to the mean's 1/n."""
    keep = torch.tensor([True, False, True, True, False, True, False])

    def on(program):
        def run(x, keep):
            with pyro.poutine.mask(mask=keep):
                program(x)

        return run

    x = data()
    bism = BiSM(on(param_model), on(param_guide), adam(), ScoreMatching())
    _, pair, batch = outer_loss(bism, x, keep)
    torch.manual_seed(1)
    loss = pair.outer_loss(batch, bism.loss)
    gradients = torch.autograd.grad(loss, [*pair.theta.values(), *pair.phi.values()])
    # the same draws of h by hand
    w, b, s, a, scale = initial()
    w, b, s, a, scale = leaves = [t.clone().requires_grad_() for t in (w, b, s.log(), a, scale.log())]
    torch.manual_seed(1)
    h = dist.Normal(torch.tanh(x @ a), scale.exp()).rsample()

    def score(v):
        log_q = dist.Normal(torch.tanh(v @ a), scale.exp()).log_prob(h).sum(-1)
        total = -0.5 * (((v - b) / s.exp()) ** 2).sum(-1) + ((v @ w) * h).sum(-1) - log_q
        return torch.autograd.grad((keep * total).sum(), v, create_graph=True)[0]

    by_hand = bism.loss(score, x, bism.loss.draw(x))
    assert (by_hand[~keep] == 0).all()
    torch.testing.assert_close(loss, by_hand.mean())
    for ours, theirs in zip(gradients, torch.autograd.grad(by_hand.mean(), leaves), strict=True):
        torch.testing.assert_close(ours, theirs)


# Sites and arguments of every kind


def test_several_visible_sites_of_different_shapes_are_one_vector():
    """x (n, 3), y (n,), z (n, 2, 2): the loss is that of the joined vector, whatever the order of arguments."""
    sizes = {"x": (3,), "y": (), "z": (2, 2)}
    generator = torch.Generator().manual_seed(2)
    values = {name: torch.randn(N, *shape, generator=generator) for name, shape in sizes.items()}
    root = torch.randn(8, 8, generator=generator)
    precision = root @ root.T / 8 + torch.eye(8)

    def three(z, x, y):
        p = pyro.param("p", precision)
        with pyro.plate("data", len(x)):
            x = flat("x", x)
            y = pyro.sample("y", dist.Normal(0.0, 1.0).mask(False), obs=y)
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2).mask(False), obs=z)
            v = torch.cat([x, y[:, None], z.flatten(1)], -1)
            pyro.factor("energy", -0.5 * ((v @ p) * v).sum(-1))

    v = torch.cat([values["x"], values["y"][:, None], values["z"].flatten(1)], -1)
    for loss in LOSSES:
        bism = BiSM(three, no_latents, adam(), loss)
        ours = outer_loss(bism, values["z"], y=values["y"], x=values["x"])[0]
        torch.testing.assert_close(ours, hand_loss(bism, lambda v: -v @ precision, v))


def many_latents(x):
    """Continuous of two shapes, soft bits, a soft one-hot vector and summed-out bits in a plate of units."""
    w, u, r = (pyro.param(n, v.clone()) for n, v in zip("wur", mixed_initial(), strict=True))
    with pyro.plate("data", len(x), dim=-2):
        x = flat("x", x)
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        t = pyro.sample("t", dist.LogNormal(0.0, 0.5))
        s = pyro.sample("s", dist.Bernoulli(0.3).expand([H]).to_event(1))
        o = pyro.sample("o", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        drive = x @ w
        pyro.factor("soft", ((h + s) * drive).sum(-1) + (o * (x @ r)).sum(-1) - 0.5 * t * (x**2).sum(-1))
        with pyro.plate("units", H, dim=-1):
            bit = pyro.sample("bit", dist.Bernoulli(0.5).mask(False))
            pyro.factor("unit", bit * (x @ u).squeeze(-2))


def mixed_initial():
    generator = torch.Generator().manual_seed(6)
    return [0.5 * torch.randn(D, k, generator=generator) for k in (H, H, 3)]


@config_enumerate
def many_latents_guide(x):
    a = pyro.param("a", lambda: 0.3 * torch.ones(D, H))
    with pyro.plate("data", len(x), dim=-2):
        drive = x @ a
        pyro.sample("h", dist.Normal(drive, 0.5).to_event(1), infer={"enumerate": None})
        pyro.sample("t", dist.LogNormal(drive[..., 0], 0.5), infer={"enumerate": None})
        pyro.sample("s", ConcreteBernoulli(0.5, drive).to_event(1))
        pyro.sample("o", ConcreteOneHot(0.5, torch.cat([drive, drive[..., :1]], -1)))
        with pyro.plate("units", H, dim=-1):
            pyro.sample("bit", dist.Bernoulli(logits=drive.squeeze(-2)))


@pytest.mark.parametrize("average", ["score", "loss"])
def test_latents_of_every_kind_in_one_model(average):
    """Against the same energy by hand: draws in the guide's order, the bits summed over all configurations."""
    x = data().unsqueeze(-2)
    loss = DenoisingScoreMatching(0.3, average=average)
    bism = BiSM(many_latents, many_latents_guide, adam(), loss, inner_loss=TraceEnum_ELBO(max_plate_nesting=2))
    bism.step(x)
    pyro.clear_param_store()
    ours, pair, batch = outer_loss(bism, x)
    w, u, r = mixed_initial()
    a = 0.3 * torch.ones(D, H)
    torch.manual_seed(1)
    noise = loss.draw(batch.v)
    perturbed = loss.perturb(batch.v, noise)
    if average == "loss":  # first a look at the shapes of the discrete sites
        next(pair._configurations(batch, perturbed))
    bits = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0))

    def draw():
        drive = perturbed @ a
        h = dist.Normal(drive.unsqueeze(1), 0.5).to_event(1).sample()
        t = dist.LogNormal(drive[:, None, 0], 0.5).sample()
        s = ConcreteBernoulli(0.5, drive.unsqueeze(1)).sample()
        o = ConcreteOneHot(0.5, torch.cat([drive, drive[:, :1]], -1).unsqueeze(1)).sample()
        return h.squeeze(1), t.squeeze(1), s.squeeze(1), o.squeeze(1)

    def score(v, h, t, s, o, bit):
        """∇_v [log p̃ - log q] at given latents."""
        v = v.detach().requires_grad_()
        log_p = ((h + s) * (v @ w)).sum(-1) + (o * (v @ r)).sum(-1) - 0.5 * t * (v**2).sum(-1)
        log_p = log_p + (bit * (v @ u)).sum(-1)
        drive = v @ a
        logits = torch.cat([drive, drive[:, :1]], -1)
        log_q = dist.Normal(drive, 0.5).log_prob(h).sum(-1) + dist.LogNormal(drive[:, 0], 0.5).log_prob(t)
        log_q = log_q + (s * drive - nn.functional.softplus(drive)).sum(-1) + (o * logits.log_softmax(-1)).sum(-1)
        log_q = log_q + (bit * drive - nn.functional.softplus(drive)).sum(-1)
        return torch.autograd.grad((log_p - log_q).sum(), v)[0]

    q = torch.sigmoid(perturbed @ a)
    total, mean_score = 0.0, 0.0
    for i, bit in enumerate(bits):
        if i == 0 or average == "loss":
            drawn = draw()
        weight = (q * bit + (1 - q) * (1 - bit)).prod(-1)
        s = score(perturbed, *drawn, bit)
        mean_score = mean_score + weight[:, None] * s
        total = total + weight * 0.5 * (s + noise.epsilon / 0.3).square().sum(-1)
    if average == "score":
        total = 0.5 * (mean_score + noise.epsilon / 0.3).square().sum(-1)
    torch.testing.assert_close(ours, total.mean())


def test_arguments_may_be_keywords_tuples_and_dictionaries():
    x = data()
    expected = train(param_model, param_guide, x)
    calls = [
        (lambda *, values: (values,), (), {"values": x}),
        (lambda batch: (batch[0],), ((x, 3),), {}),
        (lambda batch, *, flag=True: (batch["x"],), ({"x": x, "id": "a"},), {"flag": False}),
        (lambda batch: (batch["nested"][1],), ({"nested": [None, x]},), {}),
    ]
    for unpack, args, kwargs in calls:
        programs = [lambda *a, f=f, u=unpack, **k: f(*u(*a, **k)) for f in (param_model, param_guide)]
        assert_same(train(*programs, *args, **kwargs), expected)


def regression(x, y, label):
    """p(x | y, label): y an observed covariate with a density of its own, label an integer."""
    w = pyro.param("w", initial()[0][:, 0].clone())
    rows = pyro.module("embedding", EMBEDDING[0])(label)
    with pyro.plate("data", len(x)):
        x = flat("x", x)
        y = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        pyro.factor("energy", -0.5 * ((x - rows - y[:, None] * w) ** 2).sum(-1))


EMBEDDING = []


def test_covariates_are_left_alone():
    """visible=["x"]: neither the observed y nor the labels are perturbed, and y has no score."""
    EMBEDDING[:] = [nn.Embedding(2, D)]
    x, y, label = data(), torch.linspace(-1, 1, N), torch.arange(N) % 2
    for loss in LOSSES:
        bism = BiSM(regression, no_latents, adam(), loss, visible=["x"])
        ours, pair, _ = outer_loss(bism, x, y, label)
        w, table = initial()[0][:, 0].clone().requires_grad_(), EMBEDDING[0].weight
        by_hand = hand_loss(bism, lambda v, w=w, t=table: t[label] + y[:, None] * w - v, x)
        torch.testing.assert_close(ours, by_hand)
        gradients = torch.autograd.grad(ours, list(pair.theta.values()))
        expected = torch.autograd.grad(by_hand, [w, table])
        for g, e in zip(gradients, expected, strict=True):
            torch.testing.assert_close(g, e)
    # with y visible as well its own score comes in: s_y = -y + wᵀ(x - r - w y)
    bism = BiSM(regression, no_latents, adam(), DSM)
    ours = outer_loss(bism, x, y, label)[0]
    w, rows = w.detach(), table.detach()[label]

    def both(v):
        r = v[:, :D] - rows - v[:, D:] * w
        return torch.cat([-r, (r @ w)[:, None] - v[:, D:]], -1)

    torch.testing.assert_close(ours, hand_loss(bism, both, torch.cat([x, y[:, None]], -1)))


def test_deterministic_and_auxiliary_sites_change_nothing():
    def with_deterministic(x):
        w, b, s = initial()[:3]
        w = pyro.param("w", w)
        pyro.deterministic("norm", (w**2).sum())
        joint(x, w, pyro.param("b", b), pyro.param("s", s, constraint=positive))

    def through_auxiliary(x):
        """The same h, drawn as u and then moved: q(h) = q(u), as the map is a shift."""
        a, scale = initial()[3:]
        a, scale = pyro.param("a", a), pyro.param("scale", scale, constraint=positive)
        with pyro.plate("data", len(x)):
            fn = dist.Normal(torch.tanh(x @ a), scale).to_event(1)
            u = pyro.sample("u", fn, infer={"is_auxiliary": True})
            pyro.sample("h", dist.Delta(u, event_dim=1))

    strategy = {
        "hypergradient": Amortized()
    }  # the first pair would be given Functional(), which the last has no place for
    expected = train(param_model, param_guide, data(), **strategy)
    assert_same(train(with_deterministic, param_guide, data(), **strategy), expected)
    assert_same(train(with_deterministic, through_auxiliary, data(), **strategy), expected)


# Autoguides: local latents, in the data plate


AUTO = {
    "AutoNormal": auto.AutoNormal,
    "AutoDiagonalNormal": auto.AutoDiagonalNormal,
    "AutoMultivariateNormal": auto.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": auto.AutoLowRankMultivariateNormal,
    "AutoIAFNormal": lambda m: auto.AutoIAFNormal(m, hidden_dim=[2 * N * H]),
    "AutoDelta": auto.AutoDelta,
    "AutoLaplaceApproximation": auto.AutoLaplaceApproximation,
}

AVERAGED = DenoisingScoreMatching(0.3, num_particles=2, average="score")


def test_point_guide_gives_the_score_at_its_point():
    """A point at f(v) has no entropy, so the score is ∇_v log p̃(v, h) at h = f(v) held fixed."""

    def point(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Delta(torch.tanh(x @ pyro.param("a", initial()[3])), event_dim=1))

    x = data()
    bism = BiSM(param_model, point, adam(), DSM)
    ours = outer_loss(bism, x)[0]
    w, b, s, a = initial()[:4]
    torch.testing.assert_close(ours, hand_loss(bism, lambda v: -(v - b) / s**2 + torch.tanh(v @ a) @ w.T, x))


@pytest.mark.parametrize("loss", [DSM, AVERAGED, ScoreMatching()], ids=["one", "averaged", "exact"])
@pytest.mark.parametrize("kind", AUTO)
def test_autoguides_do_not_look_at_the_data(kind, loss):
    bism = BiSM(model, AUTO[kind](model), adam(), loss)
    with pytest.raises(ValueError, match=r"does not look at the visible values.*AmortizedGuide\(model\)"):
        bism.step(data())


# Guides with nets


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, 3, num_layers=2, batch_first=True), nn.Linear(3, H)

    def forward(self, x):
        return self.out(self.lstm(x.unsqueeze(-1))[0][:, -1])


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.SiLU(), nn.Flatten(), nn.Linear(2 * (D - 1), H)
        )

    def forward(self, x):
        return self.net(x.unsqueeze(1))


class Attentive(nn.Module):
    """One token a coordinate; the plain kernel of attention has no second derivative."""

    def __init__(self, kernel=SDPBackend.MATH):
        super().__init__()
        self.kernel = kernel
        self.embed = nn.Linear(1, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, H)

    def forward(self, x):
        tokens = self.embed(x.unsqueeze(-1))
        with sdpa_kernel(self.kernel):
            tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.out(tokens.mean(1))


def net_guide(net):
    def run(x):
        loc = pyro.module("net", net)(x)
        scale = pyro.param("scale", lambda: torch.full((H,), 0.7), constraint=positive)
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(loc, scale).to_event(1))

    return run


def net_model(net):
    def run(x):
        with pyro.plate("data", len(x)):
            x = flat("x", x)
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
            pyro.factor("energy", -0.5 * (x**2).sum(-1) + (pyro.module("energy_net", net)(x) * h).sum(-1))

    return run


@pytest.mark.parametrize("net", [Recurrent, Convolutional, Attentive])
@pytest.mark.parametrize("role", ["model", "guide"])
def test_hypergradient_through_nets(net, role):
    net = net()
    programs = (net_model(net), guide) if role == "model" else (model, net_guide(net))
    check_hypergradient(BiSM(*programs, adam(1e-3), DSM, hypergradient=Unrolled(2)), data())


# Optimisers


MORE_OPTIMS = {
    "adadelta": pyro.optim.Adadelta({"lr": 0.5}),
    "asgd": pyro.optim.ASGD({"lr": 1e-2, "lambd": 0.1, "t0": 2.0}),
    "radam": pyro.optim.RAdam({"lr": 1e-2}),
    "rprop": pyro.optim.Rprop({"lr": 1e-2}),
    "amsgrad": pyro.optim.Adam({"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1}),
    "maximising": pyro.optim.Adam({"lr": 1e-3, "maximize": True}),
    "centred": pyro.optim.RMSprop({"lr": 1e-3, "centered": True, "momentum": 0.9}),
    "nesterov": pyro.optim.SGD({"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "per-parameter": pyro.optim.Adam(lambda name: {"lr": 1e-2 if name == "a" else 1e-3}),
    "clipped-value": pyro.optim.Adam({"lr": 1e-2}, {"clip_value": 0.02}),
    "clipped-per-parameter": pyro.optim.SGD(
        {"lr": 1e-2}, lambda module, name: {"clip_norm": {"a": 0.1}.get(name, 9.0)}
    ),
    "plateau": pyro.optim.ReduceLROnPlateau({"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}}),
    "one-cycle": pyro.optim.OneCycleLR(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-2}, "max_lr": 0.1, "total_steps": 50}
    ),
}


@pytest.mark.parametrize("optim", MORE_OPTIMS)
def test_hypergradient_through_more_optimisers(optim):
    assert optim not in OPTIMS
    bism = BiSM(model, guide, adam(1e-3), DSM, inner_optim=MORE_OPTIMS[optim], hypergradient=Unrolled(4))
    bism.step(data())  # RAdam, Rprop and ASGD change their step after the first ones
    check_hypergradient(bism, data())


@pytest.mark.parametrize("optim", MORE_OPTIMS)
def test_a_run_of_differentiable_steps_is_the_run_of_steps(optim):
    from pyro_bism.optim.steps import DifferentiableOptim

    bism = BiSM(model, guide, adam(1e-3), DSM, inner_optim=MORE_OPTIMS[optim])
    bism.step(data())
    phi = list(bism.pair(data()).phi.values())
    fast, values = DifferentiableOptim(bism.inner_optim, phi), phi
    gradients = [[torch.randn_like(p) for p in phi] for _ in range(7)]
    for step in gradients:
        values = fast.step(values, step)
    for step in gradients:
        for p, g in zip(phi, step, strict=True):
            p.grad = g.clone()
        bism.inner_optim(phi)
    for p, value in zip(phi, values, strict=True):
        torch.testing.assert_close(p.detach(), value.detach(), rtol=1e-10, atol=1e-13)


def _alike(name):
    return {"lr": 1e-2, "betas": (0.8, 0.9)}


def _two_rates(name):
    return {"lr": 1e-2 if name == "p0" else 1e-3}


@pytest.mark.parametrize(
    "settings",
    [
        (pyro.optim.Adam, _alike),
        (pyro.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
        (pyro.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
        (pyro.optim.Adam, {"lr": 1e-2, "foreach": True}),
        (pyro.optim.Adam, _two_rates),
        (pyro.optim.Adam, {"lr": 1e-2}, {"clip_norm": 0.1}),
        (pyro.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.3}),
        (pyro.optim.AdamW, {"lr": 1e-2, "maximize": True}),
        (pyro.optim.ClippedAdam, {"lr": 1e-2, "lrd": 0.9}),
        (pyro.optim.ExponentialLR, {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "gamma": 0.9}),
    ],
)
def test_a_step_is_the_optimisers_own(settings):
    """Also where it is taken for all parameters in one call, and where a parameter has no gradient now and then."""
    make, *arguments = settings
    ours, theirs = (make(*copy.deepcopy(arguments)) for _ in range(2))  # a scheduler empties its settings
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for optim in (ours, theirs):
        pyro.clear_param_store()
        leaves = [pyro.param(f"p{i}", torch.full((i + 1, 2), 0.5)) for i in range(3)]
        create_optimizers(optim, leaves)
        pairs.append(leaves)
    for t in range(6):
        gradient = [
            torch.randn(p.shape, generator=generator) if (t, i) != (3, 1) else None for i, p in enumerate(pairs[0])
        ]
        descend(ours, pairs[0], [None if g is None else g.clone() for g in gradient])
        for p, g in zip(pairs[1], gradient, strict=True):
            p.grad = None if g is None else g.clone()
        theirs([p for p in pairs[1] if p.grad is not None])
        if hasattr(ours, "pt_scheduler_constructor"):
            ours.step()
            theirs.step()
        for mine, other in zip(*pairs, strict=True):
            assert mine.grad is None
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
    for mine, other in zip(*pairs, strict=True):
        states = [torch_optimizer(o, p).state[p] for o, p in ((ours, mine), (theirs, other))]
        assert states[0].keys() == states[1].keys()
        for key in states[0]:
            assert states[0][key] == pytest.approx(states[1][key], rel=0, abs=0), key


def test_a_step_in_one_call_is_not_taken_past_a_listener():
    """Hooks and schedulers of the torch optimisers that PyroOptim keeps see every step."""
    heard = []
    bism = BiSM(model, guide, pyro.optim.Adam({"lr": 1e-2}), DSM, num_inner_steps=2)
    bism.step(data())
    outer, inner = (list(optim.optim_objs.values()) for optim in (bism.optim, bism.inner_optim))
    outer[0].register_step_post_hook(lambda *_: heard.append("outer"))
    inner[0].register_step_pre_hook(lambda *_: heard.append("inner"))
    torch.optim.lr_scheduler.StepLR(outer[1], 1)
    bism.step(data())
    assert heard == ["inner", "inner", "outer"]
    assert outer[1]._opt_called
    handle = register_optimizer_step_post_hook(lambda *_: heard.append("all"))
    try:
        bism.step(data())
    finally:
        handle.remove()
    assert heard.count("all") == len(outer) + 2 * len(inner)


def test_schedulers_step_beside_each_other():
    """ReduceLROnPlateau: a loss that no longer falls halves the rate of both levels."""
    settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "factor": 0.5, "patience": 1}
    bism = BiSM(model, guide, pyro.optim.ReduceLROnPlateau(settings), DSM)
    for _ in range(5):
        bism.step(data())
        bism.optim.step(1.0)
    rates = [
        {o.optimizer.param_groups[0]["lr"] for o in optim.optim_objs.values()}
        for optim in (bism.optim, bism.inner_optim)
    ]
    assert rates == [{1e-2 / 4}, {1e-2 / 4}]
    assert set(bism.optim.optim_objs).isdisjoint(bism.inner_optim.optim_objs)


def test_rate_decays_of_clipped_adam_begin_with_the_first_step():
    bism = BiSM(model, guide, pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.5}), DSM, num_inner_steps=2)
    bism.step(data())
    assert {o.param_groups[0]["lr"] for o in bism.optim.optim_objs.values()} == {1e-2 / 2}
    assert {o.param_groups[0]["lr"] for o in bism.inner_optim.optim_objs.values()} == {1e-2 / 4}


# The truth


def linear_gaussian(num_latent=1):
    return LinearGaussian.random(np.random.default_rng(3), D, num_latent)


def tensors(oracle):
    return {name: torch.as_tensor(getattr(oracle, name)) for name in "ABWbc"}


def oracle_model(x):
    """The linear-Gaussian energy; only b and the precision of v through A are free to move."""
    t = tensors(linear_gaussian())
    A, b = pyro.param("A", t["A"].clone()), pyro.param("b", t["b"].clone())
    with pyro.plate("data", len(x)):
        x = flat("x", x)
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([1]).to_event(1).mask(False))
        quadratic = -0.5 * ((x @ A) * x).sum(-1) + ((x @ t["W"]) * h).sum(-1) - 0.5 * ((h @ t["B"]) * h).sum(-1)
        pyro.factor("energy", quadratic + x @ b + h @ t["c"])


def oracle_guide(x):
    q = linear_gaussian().posterior
    M, m = (pyro.param(name, torch.as_tensor(getattr(q, name)).clone()) for name in "Mm")
    root = torch.as_tensor(q.S).sqrt()
    with pyro.plate("data", len(x)):
        pyro.sample("h", dist.Normal(x @ M.T + m, root[0]).to_event(1))


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
    ScoreMatching(2, "score"),
    SlicedScoreMatching(),
    SlicedScoreMatching(2, "gaussian"),
    DenoisingScoreMatching(0.3),
    DenoisingScoreMatching(0.3, 2, "score"),
    MultiscaleDenoisingScoreMatching(0.3, 0.6, 0.4),
    MultiscaleDenoisingScoreMatching(0.3, 0.6, 0.4, "linear", 2, "score"),
]


@pytest.mark.parametrize("loss", TRUTH, ids=str)
def test_every_outer_loss_is_minimised_at_the_truth(loss):
    """Data whose noisy optimum is the model itself: ∂J/∂(A, b) is nothing there, and not nothing elsewhere.

    The guide is the posterior, so the score is the marginal's for every h. Data of the right
    covariance C exist where P⁻¹ minus the noise's share is positive definite; P is scaled until it is.
    """
    oracle = linear_gaussian()
    cov = np.asarray(oracle.cov)
    # data covariance such that noisy_optimum(C) = cov: noisy_optimum is affine in C
    at_zero = noisy_optimum(loss, np.zeros_like(cov))
    slope = (noisy_optimum(loss, np.eye(D)) - at_zero)[0, 0]
    of_data = (cov - at_zero) / slope
    num = 40_000
    root = np.linalg.cholesky(of_data)
    mean = oracle.mean
    x = torch.as_tensor(np.random.default_rng(1).normal(size=(num, D)) @ root.T + mean)
    bism = BiSM(oracle_model, oracle_guide, adam(), loss)
    pair = bism.pair(x[:1000])
    errors = {}
    for scale in (1.0, 1.3):
        chunks = []
        with torch.no_grad():
            pair.theta["A"].mul_(scale)
        for chunk in x.split(1000):
            leaves, spec = pytree.tree_flatten(((chunk,), {}))
            value = pair.outer_loss(pair.batch(leaves, spec), loss)
            gradient = torch.autograd.grad(value, [pair.theta["A"], pair.theta["b"]])
            chunks.append(torch.cat([g.flatten() for g in gradient]))
        chunks = torch.stack(chunks)
        errors[scale] = chunks.mean(0) / (chunks.std(0) / len(chunks) ** 0.5)
    assert errors[1.0].abs().max() < 5
    assert errors[1.3].reshape(-1)[: D * D].reshape(D, D).diagonal().min() > 5


def test_a_look_at_the_programs_draws_no_random_numbers():
    """A new batch size, met early or late, leaves the trajectory alone; so does a guide made at its first run."""
    x = data()

    def run(look_first):
        pyro.clear_param_store()
        bism = BiSM(param_model, param_guide, adam(), DSM)
        bism.pair(x)
        if look_first:
            bism.pair(x[:4])
        torch.manual_seed(1)
        return [bism.step(x), bism.step(x[:4]), bism.step(x)]

    assert run(True) == run(False)
    bism = BiSM(param_model, AmortizedGuide(param_model), adam(), AVERAGED)
    pair = bism.pair(x)
    assert bism.pair(x) is pair


CHECKPOINTED = """
import pyro, torch
import pyro.distributions as dist
from pyro_bism import AmortizedGuide, BiSM, DenoisingScoreMatching

torch.set_default_dtype(torch.float64)
x = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))

def model(x):
    w = pyro.param("w", lambda: torch.randn(3))
    with pyro.plate("data", len(x)):
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1).mask(False), obs=x)
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.factor("energy", -0.5 * (x**2).sum(-1) + h * (pyro.module("norm", norm)(x) @ w))

def by_hand(x):
    a = pyro.param("a", lambda: torch.randn(3))
    s = pyro.param("s", lambda: torch.rand(()), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("h", dist.Normal(x @ a, s))

lines = []
for kind in ("by hand", "auto"):
    pyro.clear_param_store()
    torch.manual_seed(9 if load else 0)
    norm = torch.nn.BatchNorm1d(3)
    optim = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.5})
    guide = AmortizedGuide(model) if kind == "auto" else by_hand
    bism = BiSM(model, guide, optim, DenoisingScoreMatching(0.3, 2, "score"))

    def advance(times):
        for _ in range(times):
            lines.append((bism.step(x).hex(), bism.info.inner_loss.hex()))
            optim.step()

    if load:
        bism.load(f"{path}/{kind}.pt")
    else:
        advance(2)
        bism.save(f"{path}/{kind}.pt")
        lines.clear() if kind == "by hand" else lines.__delitem__(slice(-2, None))
    advance(2)
    rows = x if kind == "auto" else x[:4]
    lines.append((bism.evaluate_loss(x).hex(), bism.step(rows).hex(), bism.step(x).hex()))
    lines.append((norm.running_mean.tolist(), int(norm.num_batches_tracked)))
    lines.append({k: v.tolist() for k, v in sorted(pyro.get_param_store().items())})
    lines.append([o.optimizer.param_groups[0]["lr"] for o in bism.inner_optim.optim_objs.values()])
"""


def test_another_process_continues_bit_for_bit(tmp_path):
    """Schedulers, batch-norm buffers, a guide made at its first run and a new batch size included."""
    here = {"path": tmp_path, "load": False}
    exec(CHECKPOINTED, here)
    header = f"path, load = {str(tmp_path)!r}, True\n"
    command = [sys.executable, "-W", "error", "-c", header + CHECKPOINTED + "\nprint(lines)"]
    there = subprocess.run(command, capture_output=True, text=True, check=False)
    assert there.returncode == 0, there.stderr
    assert len(here["lines"]) == 12
    assert there.stdout.strip() == str(here["lines"])


# The same model, unchanged, elsewhere


def test_the_inner_loss_is_svis_loss_on_the_same_draws():
    x = data()
    bism = BiSM(param_model, param_guide, adam(), ScoreMatching(), num_inner_steps=1)
    bism.pair(x)
    svi = SVI(param_model, param_guide, adam(), Trace_ELBO())
    torch.manual_seed(1)
    expected = svi.evaluate_loss(x)
    torch.manual_seed(1)
    bism.step(x)
    assert bism.info.inner_loss * N == pytest.approx(expected, rel=1e-12)
    before = pyro.param("a").detach().clone()
    svi.step(x)
    assert not torch.equal(pyro.param("a"), before)


def test_a_trained_model_goes_to_mcmc_and_predictive_unchanged():
    """NUTS on h given x finds the linear-Gaussian posterior, Predictive the guide's mean."""
    oracle = linear_gaussian()
    x = data(2)
    BiSM(oracle_model, oracle_guide, adam(0.0), DSM).step(x)  # a rate of 0: the oracle stays
    exact = oracle.posterior
    mcmc = MCMC(NUTS(oracle_model, max_tree_depth=3), num_samples=150, warmup_steps=50, disable_progbar=True)
    mcmc.run(x)
    draws = mcmc.get_samples()["h"]
    summary = mcmc.diagnostics()["h"]
    expected = torch.as_tensor(exact.mean(x.numpy()))
    error = draws.std(0) / summary["n_eff"].clamp(max=150).sqrt()
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()
    assert (draws.std(0) / exact.S[0, 0] ** 0.5 - 1).abs().max() < 0.3
    predicted = Predictive(oracle_model, guide=oracle_guide, num_samples=300, return_sites=["h"])(x)["h"]
    error = exact.S[0, 0] ** 0.5 / 300**0.5
    assert ((predicted.mean(0) - expected).abs() < 5 * error).all()


def test_default_settings_recover_the_covariance_of_linear_gaussian_data():
    """To 5 %, the noise's share included: only the learning rate is chosen, and annealed by a scheduler."""
    oracle, sigma = linear_gaussian(), 0.3
    v = torch.as_tensor(oracle.sample(np.random.default_rng(0), 500)[0])
    v = v - v.mean(0)

    def energy(x):
        root = pyro.param("root", 1.5 * torch.eye(D))
        w = pyro.param("w", torch.tensor([0.3, -0.2, 0.1]))
        with pyro.plate("data", len(x)):
            x = flat("x", x)
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.factor("energy", -0.5 * ((x @ root.tril()) ** 2).sum(-1) + h * (x @ w))

    def inference(x):
        a = pyro.param("a", torch.zeros(D))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=positive)
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(x @ a, scale))

    steps = 160
    gamma = 0.02 ** (1 / steps)
    optim = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": gamma})
    bism = BiSM(energy, inference, optim, DenoisingScoreMatching(sigma))
    for _ in range(steps):
        bism.step(v)
        bism.optim.step()
    root, w = pyro.param("root").detach().tril(), pyro.param("w").detach()
    learnt = torch.linalg.inv(root @ root.T - torch.outer(w, w))
    expected = torch.as_tensor(dsm_optimum(Moments.of(v.numpy()), sigma).cov)
    assert w.norm() > 0.05  # the latent has its part
    assert (learnt - expected).norm() < 0.05 * expected.norm()


# Misuse: an error in BiSM's own words at the first step, and no parameter moved


def with_sites(visible=None, latent=None, extra=None):
    """A valid model but for one site."""

    def run(x, *rest):
        w, b = initial()[:2]
        w, b = pyro.param("w", w), pyro.param("b", b)
        with pyro.plate("data", len(x)):
            x = flat("x", x) if visible is None else visible(x, *rest)
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1)) if latent is None else latent()
            pyro.factor("energy", -0.5 * ((x - b) ** 2).sum(-1) + ((x @ w) * h).sum(-1))
            if extra is not None:
                extra(x)

    return run


def guide_of(make, name="h", infer=None):
    """A guide of parameters a and scale whose site is made of a positive tensor that depends on both."""

    def run(x, *rest):
        a, scale = initial()[3:]
        a = pyro.param("a", a)
        scale = pyro.param("scale", scale, constraint=positive)
        with pyro.plate("data", len(x)):
            fn = make(nn.functional.softplus(x @ a) * scale + 0.1)
            pyro.sample(name, fn if fn.event_dim else fn.to_event(1), infer=infer or {})

    return run


def conditional_planar(x):
    net = pyro.module("planar", PLANAR[0])
    with pyro.plate("data", len(x)):
        base = dist.Normal(torch.zeros(H), 1.0).expand([len(x), H]).to_event(1)
        pyro.sample("h", dist.ConditionalTransformedDistribution(base, [net]).condition(x))


PLANAR = []


def planar(x):
    a = pyro.param("a", initial()[3])
    with pyro.plate("data", len(x)):
        base = dist.Normal(x @ a, 1.0).to_event(1)
        pyro.sample("h", dist.TransformedDistribution(base, [pyro.module("planar", PLANAR[1])]))


def mixture(locs):
    return dist.MixtureOfDiagNormals(locs, torch.ones_like(locs), torch.zeros(locs.shape[:-1]))


def two_sites(x):
    param_guide(x)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0], 1.0))


def sees_observed(x):
    param_guide(x)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(x, 1.0).to_event(1))


def mixed_batch(x):
    flat("y", torch.zeros(3, D) + x[:3])
    param_model(x)


class Shared(PyroModule):
    """One net, read by model and guide."""

    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](D, H)

    def model(self, x):
        with_sites(visible=lambda v: flat("x", v) + 0 * self.net(v).sum(-1, keepdim=True))(x)

    def guide(self, x):
        posterior(x, self.net.weight.T, torch.ones(H))


class Colliding(PyroModule):
    """Without a name of its own: its weights are called as those of the model."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(initial()[3])
        self.b = PyroParam(initial()[1])

    def forward(self, x):
        posterior(x, self.w + self.b[:, None], torch.ones(H))


def misuses():
    """(model, guide, settings of BiSM, further arguments, message)"""
    unit = guide_of(lambda a: dist.Normal(a, 1.0))
    ok = with_sites()
    elsewhere, shared = data(), Shared()
    enumerated = {"infer": {"enumerate": "parallel"}}
    points = guide_of(lambda a: dist.Delta(a))
    bits = with_sites(latent=lambda: pyro.sample("h", dist.Bernoulli(0.5).expand([H]).to_event(1)))
    cases = {
        "discrete": (
            with_sites(
                visible=lambda x: pyro.sample("x", dist.Poisson(1.0).expand([D]).to_event(1).mask(False), obs=x)
            ),
            unit,
            r"'x' \(\w+\) is discrete",
        ),
        "integers": (with_sites(extra=lambda x: flat("k", torch.ones(N, D).long())), unit, "'k' holds torch.int64"),
        "bounded": (
            with_sites(
                visible=lambda x: pyro.sample("x", dist.Beta(1.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
            ),
            unit,
            r"'x' \(\w+\) is of bounded support",
        ),
        "scalar": (
            with_sites(extra=lambda x: pyro.sample("k", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))),
            unit,
            "is a scalar",
        ),
        "closed over": (lambda x: param_model(elsewhere), unit, "'x'.*is none of the arguments"),
        "detached": (with_sites(visible=lambda x: flat("x", x).detach()), unit, "score of visible site 'x' is zero"),
        "missing in the guide": (ok, no_latents, "latent site 'h' is missing from the guide"),
        "missing in the model": (ok, two_sites, "guide's site 'z' is not a latent site of the model"),
        "observed in the model": (ok, sees_observed, r"guide's site 'x' .*\(there it is observed\)"),
        "no parameter": (lambda x: joint(x, *initial()[:3]), unit, "no parameter to train"),
        "shared": (shared.model, shared.guide, "is used by both the model and the guide"),
        "colliding": (
            Energy(),
            Colliding(),
            r"'(w|b)' is used by both|Two PyroModules have a parameter called '(w|b)'",
        ),
        "sequential": (
            ok,
            guide_of(lambda a: dist.Normal(a, 1.0), infer={"enumerate": "sequential"}),
            "'sequential' is not",
        ),
        "not enumerable": (
            ok,
            guide_of(lambda a: dist.Normal(a, 1.0), **enumerated),
            "'h'.*is marked for enumeration but its support",
        ),
        "not reparameterised": (
            bits,
            guide_of(lambda a: dist.Bernoulli(logits=a)),
            r"'h' \(Bernoulli\) can't be repara",
        ),
        "gamma": (ok, guide_of(lambda a: dist.Gamma(a, 1.0)), r"'h' \(Gamma\) can't be differentiated twice"),
        "beta": (ok, guide_of(lambda a: dist.Beta(a, a)), r"'h' \(Beta\) can't be differentiated twice"),
        "dirichlet": (ok, guide_of(dist.Dirichlet), r"'h' \(Dirichlet\) can't be differentiated twice"),
        "chi square": (ok, guide_of(dist.Chi2), r"'h' \(Chi2\) can't be differentiated twice"),
        "degrees of freedom": (
            ok,
            guide_of(lambda a: dist.StudentT(a)),
            r"'h' \(StudentT\) can't be differentiated twice",
        ),
        "transformed beta": (
            ok,
            guide_of(lambda a: dist.TransformedDistribution(dist.Beta(a, a), [T.AffineTransform(0.0, 2.0)])),
            r"'h' \(TransformedDistribution\) can't be differentiated twice",
        ),
        "once differentiable": (
            ok,
            guide_of(lambda a: mixture(torch.stack([a, -a], -2))),
            "can't be differentiated twice",
        ),
        "concrete density": (
            bits,
            guide_of(lambda a: dist.RelaxedBernoulli(torch.tensor(0.1), logits=a)),
            "'h' has the Concrete density at a temperature below 1.*ConcreteBernoulli",
        ),
        "concrete one-hot density": (
            with_sites(latent=lambda: pyro.sample("h", dist.OneHotCategorical(torch.ones(H)))),
            guide_of(lambda a: dist.RelaxedOneHotCategorical(torch.tensor(0.1), logits=a)),
            "'h' has the Concrete density at a temperature below 1.*ConcreteOneHot",
        ),
        "relaxed against continuous": (
            ok,
            guide_of(lambda a: ConcreteBernoulli(0.1, a)),
            r"'h'.*relaxed guide site needs",
        ),
        "planar flow": (ok, conditional_planar, r"'h'.*flow without an inverse"),
        "attention in the guide": (
            ok,
            net_guide(Attentive(SDPBackend.FLASH_ATTENTION)),
            "guide can't be differentiated twice.*SDPBackend.MATH",
        ),
        "cdist in the model": (
            with_sites(extra=lambda x: pyro.factor("far", -torch.cdist(x, torch.ones(2, D)).sum(-1))),
            unit,
            "model's energy can't be differentiated twice.*cdist",
        ),
        "attention in the model": (
            net_model(Attentive(SDPBackend.FLASH_ATTENTION)),
            unit,
            "model's energy can't be differentiated twice.*SDPBackend.MATH",
        ),
    }
    return {name: (*case[:2], {}, case[2]) for name, case in cases.items()} | {
        "different rows": (mixed_batch, param_guide, {}, "none of the arguments"),
        "a name that is not there": (ok, unit, {"visible": ["v"]}, r"no observed sample site 'v'.*\['x'\]"),
        "an optimiser without a graph": (
            ok,
            unit,
            {"inner_optim": pyro.optim.Adafactor({"lr": 1e-2})},
            "Adafactor can't be unrolled",
        ),
        "an optimiser of Pyro's without a graph": (
            ok,
            unit,
            {"inner_optim": pyro.optim.AdagradRMSProp({"eta": 1e-2})},
            "AdagradRMSProp can't be unrolled",
        ),
        "planar flow, two draws": (ok, planar, {"loss": AVERAGED}, r"'h'.*flow without an inverse"),
        "fisher of points": (ok, points, {"inner_loss": FisherDivergence()}, "gives points"),
        "fisher of bits": (bits_in_units, bits_guide, {"inner_loss": FisherDivergence()}, r"continuous latents.*'h'"),
        "elbo that does not enumerate": (bits_in_units, bits_guide, {}, r"'h'.*Trace_ELBO does not do"),
    }


def bits_in_units(x):
    w = pyro.param("w", initial()[0])
    with pyro.plate("data", len(x), dim=-2):
        x = flat("x", x)
        with pyro.plate("units", H, dim=-1):
            h = pyro.sample("h", dist.Bernoulli(0.5).mask(False))
            pyro.factor("unit", h * (x @ w).squeeze(-2))


def bits_guide(x):
    a = pyro.param("a", initial()[3])
    with pyro.plate("data", len(x), dim=-2), pyro.plate("units", H, dim=-1):
        pyro.sample("h", dist.Bernoulli(logits=(x @ a).squeeze(-2)), infer={"enumerate": "parallel"})


@pytest.mark.parametrize("name", misuses())
def test_misuse_is_an_error_before_anything_moves(name):
    PLANAR[:] = [T.conditional_planar(H, D, [4]), T.planar(H)]
    model, guide, settings, message = misuses()[name]
    settings = {"hypergradient": Unrolled(1), **settings}
    bism = BiSM(model, guide, adam(), settings.pop("loss", DSM), **settings)
    x = data().abs().unsqueeze(-2) if model is bits_in_units else data().abs()
    with pytest.raises(ValueError, match=message):
        bism.step(x)
    kept = {name: p.detach().clone() for name, p in pyro.get_param_store().items()}
    with pytest.raises(ValueError, match=message):  # and again: the failure left nothing half made
        bism.step(x)
    for name, p in pyro.get_param_store().items():
        assert torch.equal(p, kept[name])
    assert bism.info is None


# Pyro's other ways to put a program together


def test_easy_guides_and_conditioned_models_are_what_they_stand_for():
    from pyro.contrib.easyguide import easy_guide

    x = data()
    expected = train(param_model, param_guide, x)

    @easy_guide(param_model)
    def easy(self, x):
        a, scale = initial()[3:]
        a, scale = pyro.param("a", a), pyro.param("scale", scale, constraint=positive)
        with self.plate("data", len(x)):
            pyro.sample("h", dist.Normal(torch.tanh(x @ a), scale).to_event(1))

    assert_same(train(param_model, easy, x), expected)

    def conditioned(x):
        pyro.condition(lambda n: joint_of(None, n), data={"x": x})(len(x))

    def joint_of(x, n):
        w, b, s = initial()[:3]
        w, b, s = pyro.param("w", w), pyro.param("b", b), pyro.param("s", s, constraint=positive)
        with pyro.plate("data", n):
            x = flat("x", x)
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
            pyro.factor("energy", -0.5 * (((x - b) / s) ** 2).sum(-1) + ((x @ w) * h).sum(-1))

    assert_same(train(conditioned, param_guide, x), expected)
    assert_same(train(param_model, param_guide, torch.stack([x, x], -1)[..., 0]), expected)  # a strided view


@pytest.mark.parametrize(
    "loop", [lambda: pyro.plate("units", H), lambda: pyro.markov(range(H))], ids=["plate", "markov"]
)
def test_sites_in_a_loop_are_the_sites_side_by_side(loop):
    def looped_model(x):
        w, b, s = initial()[:3]
        w, b, s = pyro.param("w", w), pyro.param("b", b), pyro.param("s", s, constraint=positive)
        with pyro.plate("data", len(x)):
            x = flat("x", x)
            h = [pyro.sample(f"h{i}", dist.Normal(0.0, 1.0)) for i in loop()]
            pyro.factor("energy", -0.5 * (((x - b) / s) ** 2).sum(-1) + ((x @ w) * torch.stack(h, -1)).sum(-1))

    def looped_guide(x):
        a, scale = initial()[3:]
        a, scale = pyro.param("a", a), pyro.param("scale", scale, constraint=positive)
        with pyro.plate("data", len(x)):
            loc = torch.tanh(x @ a)
            for i in loop():
                pyro.sample(f"h{i}", dist.Normal(loc[:, i], scale[i]))

    x = data()
    bism = BiSM(looped_model, looped_guide, adam(), ScoreMatching())
    _, pair, batch = outer_loss(bism, x)
    draw, _ = pair.draw(batch, batch.v)
    h = torch.stack([draw.values["h0"], draw.values["h1"]], -1)
    ours = ScoreMatching()(pair.score(batch, [draw], ScoreMatching()), x, ScoreMatching().draw(x))
    pyro.clear_param_store()
    bism = BiSM(param_model, param_guide, adam(), ScoreMatching())
    _, pair, batch = outer_loss(bism, x)
    draw, _ = pair.draw(batch, batch.v)
    draw.values["h"] = h
    theirs = ScoreMatching()(pair.score(batch, [draw], ScoreMatching()), x, ScoreMatching().draw(x))
    torch.testing.assert_close(ours, theirs)
    pyro.clear_param_store()
    check_hypergradient(BiSM(looped_model, looped_guide, adam(), DSM, hypergradient=Unrolled(2)), x)


@pytest.mark.parametrize("strategy", [Detached(), Unrolled(0), Unrolled(5)], ids=str)
@pytest.mark.parametrize("inner_loss", [Trace_ELBO(), FisherDivergence()], ids=["elbo", "fisher"])
def test_a_model_without_latents_needs_no_guide_parameters(strategy, inner_loss):
    """J = ½ ‖b - v‖² - D: one gradient step of length 1 ends at the mean of the data."""
    x, sgd = data(), pyro.optim.SGD({"lr": 1.0})
    settings = {"loss": ScoreMatching(), "hypergradient": strategy, "inner_loss": inner_loss}
    losses, bism, pair = train(whole, no_latents, x, optim=sgd, num_steps=2, **settings)
    torch.testing.assert_close(pair.theta["b"].detach(), x.mean(0))
    assert losses[1] == pytest.approx((0.5 * (x - x.mean(0)) ** 2).sum(-1).mean().item() - D)
    assert bism.info.hypergradient_norm == pytest.approx(0, abs=1e-12)


def test_rows_of_a_subsampled_argument_are_read_without_a_copy_and_all_else_sees_them():
    x, rows, values = torch.randn(10, 3), torch.tensor([4, 1]), torch.randn(2, 3, requires_grad=True)
    stand_in = Rows.with_values(x, 0, rows, values)
    whole = x.index_copy(0, rows, values.detach())
    assert stand_in[rows] is values and stand_in.index_select(-2, rows) is values
    torch.testing.assert_close(stand_in[rows, 1:], values[:, 1:])
    assert stand_in.shape == x.shape and len(stand_in) == 10 and isinstance(stand_in, torch.Tensor)
    # any other use is of the whole, the rows in it
    same = [lambda t: t[4], lambda t: t[torch.tensor([4, 1])], lambda t: t @ torch.ones(3, 2), lambda t: 2 * t - 1]
    same += [lambda t: torch.cat([t, t]), lambda t: t.mean(0), lambda t: torch.nn.functional.linear(t, torch.eye(3))]
    for use in same:
        torch.testing.assert_close(use(stand_in), use(whole))
    (gradient,) = torch.autograd.grad(stand_in.sum(), values)
    assert torch.equal(gradient, torch.ones(2, 3))
