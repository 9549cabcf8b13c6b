"""Weights that torch's functions do not show: of an autograd.Function, a scripted or a checkpointed module (Pyro).

An energy tanh(w * h) and a guide of the same form, in four ways that are one function: each trains as the plain one
does, or says why not and names the weight.
"""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pyro_bism
from pyro_bism import (
    VNCE,
    Amortized,
    BiSM,
    DenoisingScoreMatching,
    Detached,
    Exact,
    Implicit,
    MarginalSM,
    ScoreMatching,
    Unrolled,
)

N, D = 6, 2


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Product(torch.autograd.Function):
    """x * w, differentiable as often as one likes."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.4, -0.3]))

    def forward(self, x):
        return torch.tanh(x * self.w)


class Function(Plain):
    def forward(self, x):
        return torch.tanh(Product.apply(x, self.w))


class Checkpointed(Plain):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Mixed(Plain):
    """Half of the weight's work is in sight."""

    def forward(self, x):
        return torch.tanh(0.5 * x * self.w + Product.apply(0.5 * x, self.w))


def scripted():
    with warnings.catch_warnings():  # torch announces its end
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(Plain())


KINDS = {"function": Function, "script": scripted, "checkpoint": Checkpointed, "mixed": Mixed}


@torch.library.custom_op("bism_tests::product", mutates_args=())
def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * w


@product.register_fake
def _(x, w):
    return torch.empty_like(x)


product.register_autograd(Product.backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


@torch.library.custom_op("bism_tests::silent", mutates_args=())
def silent(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * w


class Operator(Plain):
    def forward(self, x):
        return torch.tanh(product(x, self.w))


class Silent(Plain):
    """A custom operator without a derivative."""

    def forward(self, x):
        return torch.tanh(x * self.w + silent(x, self.w))


class Traced(Plain):
    def __new__(cls):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.trace(Plain(), torch.ones(N, D))


class Reentrant(Plain):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=True)


class Compiled(Plain):
    backend = "eager"

    def __init__(self):
        super().__init__()
        plain = super().forward
        torch.compiler.reset()  # one that compiled too often runs what it was given
        object.__setattr__(self, "run", torch.compile(lambda x: plain(x), backend=self.backend))

    def forward(self, x):
        return self.run(x)


class CompiledWithBackward(Compiled):
    backend = "aot_eager"


class ChangedInPlace(Plain):
    def forward(self, x):
        self.w.data.clamp_(-0.35, 0.35)
        return super().forward(x)


class Closure(Plain):
    def __init__(self):
        super().__init__()
        w = self.w
        object.__setattr__(self, "run", lambda x: torch.tanh(x * w))

    def forward(self, x):
        return self.run(x)


class Nested(Plain):
    """A parameter of its own that a function inside states."""

    def forward(self, x):
        def shift():
            return pyro.param("shift", lambda: torch.tensor([0.1, 0.0]))

        return torch.tanh(x * (self.w + shift()))


class Buffer(Plain):
    """A buffer that follows the weight, and is changed in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x):
        self.mean.lerp_(self.w.detach(), 0.5)
        return torch.tanh(x * (self.w + self.mean))


class Attribute(Plain):
    """A tensor that follows the weight, and is put in the place of the last one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x):
        self.mean = self.mean.lerp(self.w.detach(), 0.5)
        return torch.tanh(x * (self.w + self.mean))


class Hooked(Plain):
    def __init__(self):
        super().__init__()
        self.w.register_hook(lambda g: 2 * g)


class Preconditioned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.module.w.data.abs(), None


class Behind(Plain):
    """The weight is read on the way back alone, through ``.data``."""

    def forward(self, x):
        return torch.tanh(Preconditioned.apply(x * self.w, self))


def linear(parametrisation):
    def module():
        torch.manual_seed(0)
        return torch.nn.Sequential(parametrisation(torch.nn.Linear(D, D)), torch.nn.Tanh())

    return module


SEEN = {  # by the captured step as by the programs
    "operator": Operator,
    "in place": ChangedInPlace,
    "closure": Closure,
    "nested": Nested,
    "weight norm": linear(torch.nn.utils.parametrizations.weight_norm),
    "spectral norm": linear(torch.nn.utils.parametrizations.spectral_norm),
    "spectral norm of old": linear(torch.nn.utils.spectral_norm),
    "buffer": Buffer,
}
NAMED = {  # the captured step's refusal
    "trace": (Traced, "'{}...w'.* are read past pyro.param"),
    "checkpoint": (Checkpointed, "'{}...w'.* are read past pyro.param"),
    "hook": (Hooked, r"'{}...w'\].* (have another gradient|are read past)"),
    "behind": (Behind, "'{}...w'.* are read past pyro.param"),
    "compile": (Compiled, "can't be captured .*self.run"),
}
REFUSED = {  # both steps'
    "silent operator": (Silent, "can't be differentiated twice.*no autograd formula"),
    "reentrant": (Reentrant, "use_reentrant=True"),
    "compiled with backward": (CompiledWithBackward, "can't be differentiated twice.*does not currently support"),
    "attribute": (Attribute, "another at every pass"),
}


def programs(model_module, guide_module):
    def model(x):
        pyro.module("energy", model_module)
        loc = pyro.param("loc", lambda: torch.tensor([0.1, 0.2]))
        with pyro.plate("data", len(x)):
            v = pyro.sample("x", dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
            h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
            pyro.factor("f", -0.5 * ((v - loc - model_module(h)) ** 2).sum(-1))

    def guide(x):
        pyro.module("guide", guide_module)
        scale = pyro.param("scale", lambda: torch.full((D,), 0.8), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(guide_module(x), scale).to_event(1))

    return model, guide


def data():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(3))


def trained(kinds, num_steps=2, loss=None, **options):
    """The parameters after some steps; ``kinds`` are the modules' of model and guide."""
    pyro.clear_param_store()
    torch.manual_seed(1)
    loss = DenoisingScoreMatching(0.5) if loss is None else loss
    optim = pyro.optim.Adam({"lr": 0.05})
    bism = BiSM(*programs(*(kind() for kind in kinds)), optim, loss, **{"num_inner_steps": 1, **options})
    for _ in range(num_steps):
        bism.step(data())
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


PLAIN: dict = {}


def expected(**options):
    key = repr(options)
    if key not in PLAIN:
        PLAIN[key] = trained((Plain, Plain), **options)
    return PLAIN[key]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", ["store", "recompute"])
def test_unrolled_steps_see_every_weight_move(kind, memory):
    """The same parameters as with the plain module: the derivative goes through the guide's weight in all N steps."""
    options = {"hypergradient": Unrolled(3, memory=memory)}
    for kinds in ((KINDS[kind], KINDS[kind]), (Plain, KINDS[kind])):
        found = trained(kinds, **options)
        for name, value in expected(**options).items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("strategy", [Amortized(), Implicit(num_steps=2), Exact()])
def test_other_strategies_train_every_weight_without_a_swap(strategy):
    options = {"hypergradient": strategy, "num_steps": 1}
    for kind in KINDS.values():
        found = trained((kind, kind), **options)
        for name, value in expected(**options).items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["function", "script", "mixed"])
def test_a_captured_step_names_the_weight_that_it_would_not_train(kind):
    """For θ and for φ, before anything has moved; in a rival too."""
    for kinds, name in (((KINDS[kind], Plain), "energy$$$w"), ((Plain, KINDS[kind]), "guide$$$w")):
        with pytest.raises(RuntimeError, match=r"jit=True.*read past pyro.param.*jit=False") as told:
            trained(kinds, num_steps=1, hypergradient=Detached(), jit=True)
        assert repr([name]) in str(told.value)
        store = pyro.get_param_store()
        assert torch.equal(store["energy$$$w"], Plain().w) and torch.equal(store["guide$$$w"], Plain().w)


@pytest.mark.parametrize("kind", ["function", "script"])
def test_a_captured_rival_names_it_too(kind):
    module = KINDS[kind]()

    def model(x):
        pyro.module("energy", module)
        with pyro.plate("data", len(x)):
            v = pyro.sample("x", dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
            pyro.factor("f", -0.5 * (v**2).sum(-1) + module(v).sum(-1))

    def moved(jit):
        pyro.clear_param_store()
        rival = MarginalSM(model, pyro.optim.Adam({"lr": 0.05}), DenoisingScoreMatching(0.5), jit=jit)
        rival.step(data())
        return (pyro.get_param_store()["energy$$$w"] - Plain().w).abs().min()

    with pytest.raises(RuntimeError, match=r"jit=True.*'energy...w'"):
        moved(True)
    assert moved(False) > 0.01


def test_a_captured_unrolled_step_names_a_checkpointed_weight():
    with pytest.raises(RuntimeError, match=r"jit=True.*'guide...w'"):
        trained((Plain, Checkpointed), num_steps=1, hypergradient=Unrolled(2), jit=True)


def test_exact_names_a_weight_that_it_can_not_hold_fixed():
    """A loss that differentiates the score takes the guide's part of it at fixed θ."""
    options = {"hypergradient": Exact(), "loss": ScoreMatching(), "num_steps": 1}
    assert set(trained((Plain, Plain), **options)) == {"energy$$$w", "loc", "guide$$$w", "scale"}
    for kind in (Function, scripted, Mixed):
        with pytest.raises(ValueError, match=r"parameters \['energy...w'\].*Exact\(\) can't hold"):
            trained((kind, Plain), **options)


def test_rivals_try_the_model_with_every_weight_moved():
    """At weights of zero what reads v can't be told from what doesn't: the trial moves those out of sight as well."""
    module = Function()
    with torch.no_grad():
        module.w.zero_()

    def model(x):
        pyro.module("energy", module)
        with pyro.plate("data", len(x)):
            v = pyro.sample("x", dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
            pyro.factor("f", module(v).sum(-1))

    pyro.clear_param_store()
    rival = MarginalSM(model, pyro.optim.Adam({"lr": 0.05}), DenoisingScoreMatching(0.5))
    rival.step(data())
    assert (pyro.get_param_store()["energy$$$w"].abs() > 0.01).all()
    assert pyro_bism.free_energy(rival, data()).abs().min() > 0


@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.parametrize(
    "strategy", [Unrolled(2), pytest.param(Amortized(), marks=pytest.mark.full)], ids=["unrolled", "amortized"]
)
def test_a_captured_step_moves_every_weight_as_the_programs_do(kind, strategy, replayed):
    """In model and guide; torch itself can't unroll steps around a model's buffer that changes in place."""
    kinds = (Plain if kind in ("buffer", "nested") else SEEN[kind], SEEN[kind])
    right, found = (trained(kinds, hypergradient=strategy, jit=jit) for jit in (False, True))
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own
@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize(
    "strategy", [Unrolled(2), pytest.param(Amortized(), marks=pytest.mark.full)], ids=["unrolled", "amortized"]
)
def test_a_captured_step_names_what_it_would_not_train(kind, strategy, replayed):
    module, message = NAMED[kind]
    for kinds, name in (((module, Plain), "energy"), ((Plain, module), "guide")):
        with pytest.raises(RuntimeError, match="jit=True.*" + message.format(name)):
            trained(kinds, num_steps=1, hypergradient=strategy, jit=True)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning", "ignore:None of the inputs have requires_grad:UserWarning"
)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_step_can_train_is_refused_by_both(kind):
    module, message = REFUSED[kind]
    for kinds in ((module, Plain), (Plain, module)):
        for strategy in (Unrolled(2), Amortized()):
            for captured in (False, True):
                with pytest.raises((ValueError, RuntimeError), match=message):
                    trained(kinds, num_steps=1, hypergradient=strategy, jit=captured)


def test_a_rivals_folded_steps_and_gradients_followed_outside_name_it_too(replayed):
    """VNCE's graph takes steps of both levels; torch's SGD takes its own, by the gradients that the graph returns."""
    x = data()
    vnce = VNCE(*programs(Plain(), Hooked()), pyro.optim.Adam({"lr": 0.05}), jit=True)
    pyro.clear_param_store()
    with pytest.raises(RuntimeError, match=r"parameters \['guide...w'.* have another gradient"):
        vnce.step(x)
    pyro.clear_param_store()
    bism = BiSM(
        *programs(Hooked(), Plain()),
        pyro.optim.SGD({"lr": 0.05}),
        DenoisingScoreMatching(0.5),
        num_inner_steps=1,
        jit=True,
    )
    with pytest.raises(RuntimeError, match=r"parameters \['energy...w'.* have another gradient"):
        bism.step(x)


@pytest.mark.parametrize("kind", ["spectral norm", "spectral norm of old", "buffer"])
def test_steps_taken_again_find_the_buffers_of_the_first_time(kind):
    found = [
        trained((Plain, SEEN[kind]), hypergradient=Unrolled(7, memory=memory)) for memory in ("store", "recompute")
    ]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-12)
