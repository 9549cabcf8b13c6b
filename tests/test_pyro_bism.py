"""pyro_bism's hypergradient, losses and errors, in float64."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam
from scipy import stats
from torch.utils import _pytree as pytree

import pyro_bism
from oracles import central_difference
from pyro_bism import (
    Amortized,
    BiSM,
    ConcreteBernoulli,
    Covariance,
    DenoisingScoreMatching,
    Detached,
    FisherDivergence,
    Functional,
    Implicit,
    MultiscaleDenoisingScoreMatching,
    Penalty,
    ScoreMatching,
    SlicedScoreMatching,
    Unrolled,
)
from pyro_bism.optim.host import torch_optimizer
from pyro_bism.optim.steps import DifferentiableOptim
from pyro_bism.programs.params import tensors_read_as
from pyro_bism.programs.rows import draw_rows

D, H, N = 3, 2, 7


pytestmark = pytest.mark.usefixtures("torch_double")


def model(x):
    w = pyro.param("w", lambda: 0.3 * torch.randn(D, H))
    b = pyro.param("b", lambda: 0.1 * torch.randn(D))
    s = pyro.param("s", lambda: torch.full((D,), 0.9), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        pyro.factor("energy", -0.5 * (((x - b) / s) ** 2).sum(-1) + ((x @ w) * h).sum(-1))


def guide(x):
    a = pyro.param("a", lambda: 0.3 * torch.randn(D, H))
    scale = pyro.param("scale", lambda: torch.full((H,), 0.7), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("h", dist.Normal(torch.tanh(x @ a), scale).to_event(1))


LOSSES = {
    "exact": ScoreMatching(),
    "sliced": SlicedScoreMatching(num_projections=2),
    "denoising": DenoisingScoreMatching(0.3),
    "denoising-averaged": DenoisingScoreMatching(0.3, num_particles=3, average="score"),
    "multiscale": MultiscaleDenoisingScoreMatching(0.1, 0.5, 0.2),
}
INNER = {
    "elbo": Trace_ELBO(),
    "mean-field": TraceMeanField_ELBO(),
    "fisher": FisherDivergence(),
}
OPTIMS = {
    "adam": pyro.optim.Adam({"lr": 1e-2, "betas": (0.9, 0.95)}),
    "adamw": pyro.optim.AdamW({"lr": 1e-2}),
    "sgd-momentum": pyro.optim.SGD({"lr": 1e-2, "momentum": 0.9, "dampening": 0.2}),
    "rmsprop": pyro.optim.RMSprop({"lr": 1e-3}),
    "rmsprop-centred": pyro.optim.RMSprop({"lr": 1e-3, "centered": True}),
    "adam-decayed": pyro.optim.Adam({"lr": 1e-2, "weight_decay": 0.1}),
    "adagrad": pyro.optim.Adagrad({"lr": 1e-2}),
    "adamax": pyro.optim.Adamax({"lr": 1e-2}),
    "nadam": pyro.optim.NAdam({"lr": 1e-2}),
    "clipped-adam": pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.9, "clip_norm": 0.05}),
    "clipped-norm": pyro.optim.Adam({"lr": 1e-2}, {"clip_norm": 0.1}),
    "scheduled": pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "gamma": 0.5}),
}


def problem_of(bism, x):
    leaves, spec = pytree.tree_flatten(((x,), {}))
    pair = bism.pair(x)
    batch = pair.batch(leaves, spec)
    return bism._problem(pair, batch, list(pair.theta.values()), list(pair.phi.values()))


def finite_difference(value, theta, direction, step=1e-5):
    """Fourth-order central difference along a direction."""

    def at(t):
        with torch.no_grad():
            for leaf, d in zip(theta, direction, strict=True):
                leaf.add_(t * d)
        result = value()
        with torch.no_grad():
            for leaf, d in zip(theta, direction, strict=True):
                leaf.sub_(t * d)
        return result

    return central_difference(at, step * 100)


def check_hypergradient(bism, x, step=1e-5):
    bism.step(x)  # a state to start from
    problem = problem_of(bism, x)
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(t.shape, generator=generator) for t in problem.theta]

    def value():
        torch.manual_seed(5)
        return bism.hypergradient(problem, None).loss.item()

    torch.manual_seed(5)
    gradient = bism.hypergradient(problem, None).gradient
    ours = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True) if g is not None)
    theirs = finite_difference(value, problem.theta, direction, step)
    # relative to the gradient's length: a direction across it has a slope of nearly nothing
    length = sum(g.square().sum() for g in gradient if g is not None).sqrt().item()
    assert ours.item() == pytest.approx(theirs, rel=1e-6, abs=1e-6 * length)


@pytest.mark.parametrize("num_steps", [0, 1, 3, 10])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("loss", LOSSES)
def test_hypergradient_is_the_derivative_of_the_whole_map(loss, inner, num_steps):
    strategy = Unrolled(num_steps) if num_steps else Detached()
    bism = BiSM(model, guide, OPTIMS["adam"], LOSSES[loss], inner_loss=INNER[inner], hypergradient=strategy)
    check_hypergradient(bism, torch.randn(N, D))


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("optim", OPTIMS)
def test_hypergradient_through_every_optimiser(optim, num_steps):
    bism = BiSM(
        model,
        guide,
        pyro.optim.SGD({"lr": 1e-3}),
        LOSSES["denoising"],
        inner_optim=OPTIMS[optim],
        hypergradient=Unrolled(num_steps),
    )
    check_hypergradient(bism, torch.randn(N, D))


def reads_statement():
    return guide


def reads_pyro_params():
    class Guide(PyroModule):
        def __init__(self):
            super().__init__(name="guide")
            self.a = PyroParam(0.3 * torch.randn(D, H))
            self.scale = PyroParam(torch.full((H,), 0.7), dist.constraints.positive)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("h", dist.Normal(torch.tanh(x @ self.a), self.scale).to_event(1))

    return Guide()


def reads_module(update=False):
    net = torch.nn.Linear(D, H)

    def run(x):
        scale = pyro.param("scale", lambda: torch.full((H,), 0.7), constraint=dist.constraints.positive)
        pyro.module("net", net, update_module_params=update)
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(torch.tanh(net(x)), scale).to_event(1))

    return run


def reads_closure():
    a = (0.3 * torch.randn(D, H)).requires_grad_()

    def run(x):
        pyro.param("a", a)
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(torch.tanh(x @ a), 0.7).to_event(1))

    return run


@pytest.mark.parametrize(
    ("make", "reads_phi_through_param"),
    [
        (reads_statement, True),
        (reads_pyro_params, True),
        (reads_module, False),
        (lambda: reads_module(update=True), False),
        (reads_closure, False),
    ],
)
def test_hypergradient_however_the_guide_reads_its_parameters(make, reads_phi_through_param):
    bism = BiSM(model, make(), OPTIMS["adam"], LOSSES["denoising"], hypergradient=Unrolled(3))
    x = torch.randn(N, D)
    check_hypergradient(bism, x)
    assert bism.pair(x).reads_phi_through_param is reads_phi_through_param


def test_every_steps_data_are_validated():
    def conditional(x, y):
        b = pyro.param("b", lambda: torch.zeros(D))
        with pyro.plate("data", len(x)):
            x = flat(x)
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=x @ b + h.sum(-1)), obs=y)

    bism = BiSM(conditional, lambda x, y: guide(x), pyro.optim.Adam({}), LOSSES["denoising"], visible=["x"])
    x = torch.randn(N, D)
    bism.step(x, torch.ones(N))
    with pytest.raises(ValueError, match="support"):
        bism.step(x, torch.full((N,), 2.0))
    assert pyro.infer.is_validation_enabled()


@pytest.mark.full
@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("loss", LOSSES)
def test_hypergradient_in_every_combination(loss, inner, optim):
    x = torch.randn(N, D)
    for num_steps in (1, 3, 10):
        pyro.clear_param_store()
        bism = BiSM(
            model,
            guide,
            pyro.optim.SGD({"lr": 1e-3}),
            LOSSES[loss],
            inner_optim=copy.deepcopy(OPTIMS[optim]),
            inner_loss=INNER[inner],
            hypergradient=Unrolled(num_steps),
        )
        # a maximum and a clamp have kinks, which a longer step would cross
        check_hypergradient(bism, x, step=1e-7 if optim in ("adamax", "clipped-adam") else 1e-5)


@pytest.mark.parametrize("optim", OPTIMS)
def test_a_differentiable_step_is_the_step(optim):
    bism = BiSM(model, guide, pyro.optim.SGD({"lr": 1e-3}), LOSSES["denoising"], inner_optim=OPTIMS[optim])
    x = torch.randn(N, D)
    bism.step(x)
    phi = list(bism.pair(x).phi.values())
    fast = DifferentiableOptim(bism.inner_optim, phi)
    gradients = [torch.randn_like(p) for p in phi]
    values = fast.step(phi, gradients)
    for p, g in zip(phi, gradients, strict=True):
        p.grad = g.clone()
    bism.inner_optim(phi)
    for p, value in zip(phi, values, strict=True):
        torch.testing.assert_close(p.detach(), value.detach(), rtol=1e-12, atol=1e-14)
    assert torch_optimizer(bism.inner_optim, phi[0]) is not None


def rbm(x):
    w = pyro.param("w", lambda: 0.8 * torch.randn(D, H))
    b = pyro.param("b", lambda: 0.1 * torch.randn(D))
    c = pyro.param("c", lambda: 0.1 * torch.randn(H))
    with pyro.plate("data", len(x), dim=-2):
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
        with pyro.plate("units", H, dim=-1):
            h = pyro.sample("h", dist.Bernoulli(0.5).mask(False))
            pyro.factor("unit", h * ((x @ w).squeeze(-2) + c))
        pyro.factor("quadratic", -0.5 * ((x - b) ** 2).sum(-1))


def posterior_guide(x):
    pyro.param("unused", lambda: torch.zeros(()))
    store = pyro.get_param_store()
    w, c = store._params["w"].detach(), store._params["c"].detach()
    with pyro.plate("data", len(x), dim=-2), pyro.plate("units", H, dim=-1):
        logits = (x @ w).squeeze(-2) + c
        pyro.sample("h", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})


@pytest.mark.parametrize("average", ["loss", "score"])
@pytest.mark.parametrize("loss", [ScoreMatching, SlicedScoreMatching, DenoisingScoreMatching])
def test_summed_out_score_is_the_marginal_score(loss, average):
    """With q the posterior the loss equals that of the free energy's exact score."""
    x = torch.randn(N, 1, D)
    rbm(x)
    settings = {"sigma": 0.3} if loss is DenoisingScoreMatching else {}
    bism = BiSM(
        rbm,
        posterior_guide,
        pyro.optim.Adam({"lr": 1e-3}),
        loss(average=average, **settings),
        inner_loss=TraceEnum_ELBO(max_plate_nesting=2),
        hypergradient=Detached(),
    )
    store = pyro.get_param_store()
    w, b, c = (store._params[name].detach() for name in "wbc")

    def score(v):
        return b - v + torch.sigmoid(v @ w + c) @ w.T

    leaves, spec = pytree.tree_flatten(((x,), {}))
    pair = bism.pair(x)
    batch = pair.batch(leaves, spec)
    torch.manual_seed(1)
    ours = pair.outer_loss(batch, bism.loss)
    torch.manual_seed(1)
    noise = bism.loss.draw(batch.v)
    torch.testing.assert_close(ours, bism.loss(score, batch.v, noise).mean(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("loss", [ScoreMatching(), SlicedScoreMatching(), DenoisingScoreMatching(0.2)])
def test_loss_is_minimised_at_the_truth(loss):
    """For v ~ N(0, P⁻¹) the gradient in the precision vanishes at the data's (noisy) precision."""
    generator = torch.Generator().manual_seed(1)
    num = 200_000
    root = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    v = torch.randn(num, 2, generator=generator) @ root.T
    sigma = getattr(loss, "sigma", 0.0)
    precision = torch.linalg.inv(root @ root.T + sigma**2 * torch.eye(2))
    noise = loss.draw(v)

    def per_example(p):
        return loss(lambda u: -u @ p, v, noise).detach()

    for i in range(2):
        for j in range(2):
            step = torch.zeros(2, 2)
            step[i, j] = 1e-4
            slope = (per_example(precision + step) - per_example(precision - step)) / 2e-4
            error = slope.std() / num**0.5
            assert abs(slope.mean()) < 5 * error
            wrong = (per_example(1.2 * precision + step) - per_example(1.2 * precision - step)) / 2e-4
            if i == j:
                assert wrong.mean() > 5 * error


@pytest.mark.parametrize("strategy", [Unrolled(5), Amortized(), Penalty(lambda step: 10.0 + step), Functional()])
def test_checkpoint_continues_bit_for_bit(tmp_path, strategy):
    def fresh():
        optim = pyro.optim.Adam({"lr": 1e-2})
        return BiSM(model, guide, optim, DenoisingScoreMatching(0.3), hypergradient=strategy)

    x = torch.randn(N, D)
    bism = fresh()
    for _ in range(3):
        bism.step(x)
    bism.save(tmp_path / "state.pt")
    expected = [bism.step(x) for _ in range(3)]
    pyro.clear_param_store()
    torch.manual_seed(99)
    later = fresh()
    later.load(tmp_path / "state.pt")
    assert [later.step(x) for _ in range(3)] == expected


@pytest.mark.parametrize(("saved", "loaded"), [(Amortized(), Unrolled(5)), (Functional(), Penalty())])
def test_a_state_of_another_strategy_is_refused(saved, loaded):
    def fresh(strategy):
        return BiSM(model, guide, pyro.optim.Adam({}), DenoisingScoreMatching(0.3), hypergradient=strategy)

    x, bism = torch.randn(N, D), fresh(saved)
    bism.step(x)
    later = fresh(loaded)
    later.set_state(bism.get_state())
    with pytest.raises(ValueError, match=f"another hypergradient than {type(loaded).__name__}"):
        later.step(x)


STRATEGIES = [Unrolled(5), Implicit(), Implicit("neumann"), Implicit("nystrom"), Amortized(), Penalty(), Covariance()]
STRATEGIES += [Functional()]


@pytest.mark.filterwarnings("ignore:Encountered NaN")  # Pyro's own word on it comes first
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_diverging_inner_loop_ends_in_an_error_that_names_the_cure(strategy):
    bism = BiSM(
        model,
        guide,
        pyro.optim.SGD({"lr": 1e-3}),
        DenoisingScoreMatching(0.3),
        inner_optim=pyro.optim.SGD({"lr": 1e3}),
        hypergradient=strategy,
    )
    with pytest.raises(FloatingPointError, match="inner learning rate"):
        for _ in range(200):
            bism.step(torch.randn(N, D))
    for name, value in pyro.get_param_store().items():
        if name in ("w", "b", "s"):
            assert value.isfinite().all()


def test_penaltys_second_guide_leaves_the_first_alone():
    """Between steps the leaves hold φ and the optimiser φ's state, whatever ψ did; a failure inside changes nothing."""
    x = torch.randn(N, D)
    runs = []
    for strategy in (Detached(), Penalty()):
        pyro.clear_param_store()
        torch.manual_seed(0)
        optim = pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.9})
        bism = BiSM(model, guide, optim, DenoisingScoreMatching(0.3), hypergradient=strategy)
        bism.step(x)
        phi = bism.pair(x).phi
        kept = [torch_optimizer(bism.inner_optim, leaf) for leaf in phi.values()]
        runs.append(([p.detach().clone() for p in phi.values()], [k.state_dict() for k in kept]))
    (phi, states), (again, same) = runs
    for a, b in zip(phi, again, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(states, same, strict=True):
        assert a["param_groups"] == b["param_groups"]
        assert torch.equal(a["state"][0]["exp_avg"], b["state"][0]["exp_avg"])


@pytest.mark.parametrize("hypergradient", [Amortized, "amortized"])
def test_a_strategy_is_an_instance(hypergradient):
    with pytest.raises(ValueError, match="is not a strategy"):
        BiSM(model, guide, pyro.optim.Adam({}), DenoisingScoreMatching(0.3), hypergradient=hypergradient)


def flat(x):
    return pyro.sample("x", dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_nan_written_through_numpy_is_named():
    """Torch does not see such a change; the step that meets it looks again."""
    data = np.random.default_rng(0).normal(size=(N, D))
    x = torch.from_numpy(data)
    bism = BiSM(model, guide, pyro.optim.Adam({"lr": 1e-2}), DenoisingScoreMatching(0.3))
    bism.step(x)
    before = {k: v.detach().clone() for k, v in pyro.get_param_store().items()}
    data[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"args\[0\].*\(2, 1\)"):
        bism.step(x)
    for name, value in pyro.get_param_store().items():
        assert torch.equal(value, before[name])


def test_data_are_looked_at_once(monkeypatch):
    looks = []
    check = pyro_bism.programs.visible.require_finite
    monkeypatch.setattr(pyro_bism.programs.visible, "require_finite", lambda *a: looks.append(1) or check(*a))
    x = torch.randn(N, D)
    bism = BiSM(model, guide, pyro.optim.Adam({"lr": 1e-2}), DenoisingScoreMatching(0.3))
    for _ in range(3):
        bism.step(x)
    assert len(looks) == 1
    bism.step(x.clone())
    x += 1
    bism.step(x)
    assert len(looks) == 3


def test_nan_is_named_and_nothing_moves():
    x = torch.randn(N, D)
    bism = BiSM(model, guide, pyro.optim.Adam({"lr": 1e-2}), DenoisingScoreMatching(0.3))
    bism.step(x)
    before = {k: v.detach().clone() for k, v in pyro.get_param_store().items()}
    x[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"args\[0\].*\(2, 1\)"):
        bism.step(x)
    for name, value in pyro.get_param_store().items():
        assert torch.equal(value, before[name])


def never_reads(x):
    w = pyro.param("w", lambda: torch.ones(H))
    with pyro.plate("data", len(x)):
        flat(x)
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        pyro.factor("energy", (h * w).sum(-1))


def unobserved(x):
    w = pyro.param("w", lambda: torch.ones(H))
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        pyro.factor("energy", (h * w).sum(-1) + x.sum(-1))


def cast(x):
    w = pyro.param("w", lambda: torch.ones(D))
    with pyro.plate("data", len(x)):
        x = flat(2 * x)
        pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        pyro.factor("energy", (x * w).sum(-1))


def bounded(x):
    w = pyro.param("w", lambda: torch.ones(D))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Exponential(1.0).expand([D]).to_event(1), obs=x.abs())
        pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        pyro.factor("energy", (x * w).sum(-1))


def one_row(x):
    w = pyro.param("w", lambda: torch.ones(D))
    with pyro.plate("data", len(x)):
        flat(x[0])
        pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        pyro.factor("energy", (x * w).sum(-1))


def observed_twice(x):
    w = pyro.param("w", lambda: torch.ones(D))
    with pyro.plate("data", len(x)):
        x = flat(x)
        pyro.sample("y", dist.Normal(w, 1.0).to_event(1), obs=x)
        pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        pyro.factor("energy", -(x**2).sum(-1))


def discrete(x):
    w = pyro.param("w", lambda: torch.ones(D))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(0.5).expand([D]).to_event(1), obs=1.0 * (x > 0))
        pyro.sample("h", dist.Normal(0.0, 1.0).expand([H]).to_event(1))
        pyro.factor("energy", (x * w).sum(-1))


def guide_with_a_factor(x):
    guide(x)
    with pyro.plate("data", len(x)):
        pyro.factor("tilt", x.sum(-1), has_rsample=True)


def guide_of(make, name="h"):
    def run(x):
        a = pyro.param("a", lambda: torch.ones(H))
        with pyro.plate("data", len(x)):
            fn = make(a + 0.01 * x[:, :1] ** 2)
            pyro.sample(name, fn if fn.event_dim else fn.to_event(1))

    return run


def shared(x):
    w = pyro.param("w", lambda: torch.ones(D, H))
    with pyro.plate("data", len(x)):
        pyro.sample("h", dist.Normal(x @ w, 1.0).to_event(1))


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (never_reads, guide, "'x' is zero everywhere"),
        (unobserved, guide, "no visible site"),
        (cast, guide, "is none of the arguments"),
        (bounded, guide, "of bounded support"),
        (discrete, guide, r"\(Bernoulli\) is discrete.*noise added"),
        (one_row, guide, r"shape \(3,\) where the model declares \(7, 3\)"),
        (observed_twice, guide, "observe the same argument"),
        (model, guide_with_a_factor, "guide has a factor, 'tilt'"),
        (model, shared, "'w' is used by both"),
        (model, guide_of(lambda a: dist.Normal(a, 1.0), "z"), "'h' is missing from the guide"),
        (model, guide_of(lambda a: dist.Poisson(a)), "can't be reparameterised"),
        (model, guide_of(lambda a: dist.Gamma(a, 1.0)), "can't be differentiated twice"),
        (model, guide_of(lambda a: dist.Beta(a, 1.0)), "can't be differentiated twice"),
        (model, guide_of(lambda a: dist.Dirichlet(a)), "can't be differentiated twice"),
        (
            model,
            guide_of(lambda a: dist.RelaxedBernoulli(torch.tensor(0.1), logits=a)),
            "temperature below 1",
        ),
        (model, guide_of(lambda a: ConcreteBernoulli(0.1, a)), "relaxed guide site needs"),
    ],
)
def test_misuse_names_the_site_and_the_cure(model, guide, message):
    bism = BiSM(model, guide, pyro.optim.Adam({"lr": 1e-3}), DenoisingScoreMatching(0.3))
    with pytest.raises(ValueError, match=message):
        bism.step(torch.randn(N, D))


@pytest.mark.parametrize("sizes", [(5, 3), (17, 2)])  # shuffled; drawn again where twice
def test_rows_are_drawn_without_replacement_and_every_sequence_is_as_likely(sizes):
    num = 20_000
    pyro.set_rng_seed(0)
    draws = torch.stack([draw_rows(*sizes, "cpu") for _ in range(num)])
    found, counts = np.unique(draws, axis=0, return_counts=True)
    total = math.perm(*sizes)
    assert len(found) == total
    assert all(len(set(rows)) == sizes[1] for rows in found.tolist())
    assert np.square(counts - num / total).sum() / (num / total) < stats.chi2.ppf(0.999, total - 1)


def test_subsampled_rows_give_the_score_of_those_rows():
    """A plate's N/B is no part of the score: the loss on picked rows is that of those rows alone."""
    full = torch.randn(40, D)

    def subsampled(x):
        b = pyro.param("b", lambda: 0.1 * torch.ones(D))
        with pyro.plate("data", 40, subsample_size=N) as rows:
            x = flat(x[rows])
            pyro.factor("energy", -0.5 * ((x - b) ** 2).sum(-1))

    def empty(x):
        pass

    bism = BiSM(subsampled, empty, pyro.optim.Adam({"lr": 1e-3}), ScoreMatching())
    leaves, spec = pytree.tree_flatten(((full,), {}))
    pair = bism.pair(full)
    batch = pair.batch(leaves, spec)
    ours = pair.outer_loss(batch, bism.loss)
    rows = full[batch.indices["data"]]
    assert len(rows) == N
    torch.testing.assert_close(ours, (0.5 * ((rows - 0.1) ** 2).sum(-1) - D).mean())


def test_swapped_reaches_parameters_by_identity():
    p, q = torch.ones(2, requires_grad=True), torch.full((2,), 3.0)
    with tensors_read_as({p: q}):
        assert torch.equal(torch.cat([p, p]), torch.full((4,), 3.0))
    assert torch.equal(p.detach(), torch.ones(2))
