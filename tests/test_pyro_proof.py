"""The proof of structure on torch's own ground: whatever a program does, no degree is ever too low."""

import ctypes
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn.functional import conv1d, linear, mse_loss, one_hot

from pyro_bism import CD, Langevin, PseudoLikelihood, exact_log_normalizer, free_energy
from pyro_bism.distributions import ConcreteBernoulli, ConcreteOneHot
from pyro_bism.energies import COVARIATES, VISIBLE, Energy
from pyro_bism.energies.proof import prove_function

N, D, H, K = 17, 3, 2, 3  # a prime number of rows, no multiple of which is a length here
UNKNOWN = math.inf
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.double)


W, P, MU, COVARIATE = normal(D, H), normal(D, D), normal(K, D), normal(N, 1)
KEEP, FIRST = torch.tensor([True, False, True]), torch.arange(D) % 2
CONV, NORM = torch.nn.Conv1d(1, 2, 2).double(), torch.nn.BatchNorm1d(D).double().eval()
BUFFER = torch.zeros(N, D, dtype=torch.double)
SUMS, ROW = torch.zeros(N, H, dtype=torch.double), torch.arange(N)[:, None]
SPARSE = P.to_sparse()


def cubes(x: torch.Tensor) -> torch.Tensor:
    return (x * x * x).sum(-1)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of all scripting
    scripted = torch.jit.script(cubes)
    compiled = torch.compile(cubes, backend="eager")
    compiled(W)


def point(seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    v = scale * torch.randn(N, D, generator=g, dtype=torch.double)
    h = torch.randint(2, (N, H), generator=g).double()
    return {"v": v, "h": h, "z": torch.randint(K, (N,), generator=g)}


class Lying(torch.autograd.Function):
    """2x with the gradient of 7x."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 7 * g


@torch.library.custom_op("bism_tests::square", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x * x


def in_place(p, power):
    a = torch.zeros(N, D, dtype=torch.double)
    a[:, 0] = p.v[:, 0] ** power
    a[:, 1].copy_(p.v[:, 1])
    a.add_(1.0).mul_(2.0)
    return (a * a).sum(-1)


def put(p):
    a = p.v.clone()
    a[:, [0, 1]] = p.v[:, [1, 2]] ** 2
    a.masked_fill_(KEEP, 0.5)
    return a.sum(-1)


def out(p):
    a = torch.empty(N, D, dtype=torch.double)
    with torch.no_grad():  # torch has no out= with a gradient
        torch.mul(p.v, 2.0, out=a)
    return a.sum(-1)


def without_gradient(p):
    with torch.no_grad():
        return p.v.sum(-1)


def detached_in_place(p):
    a = p.v * 1
    a.detach().pow_(3)
    return a.sum(-1)


def branch(p):
    return p.v.sum(-1) if p.h.sum() > 0 else (p.v**2).sum(-1)


def pointer(p):
    numbers = (ctypes.c_double * (N * D)).from_address(p.v.data_ptr())
    return (torch.tensor(list(numbers)).reshape(N, D) ** 3).sum(-1)


def other_thread(p):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: (p.v**3).sum(-1)).result()


def kept_outside(p):
    with torch.no_grad():
        BUFFER.copy_(p.v)
    return BUFFER.sum(-1)


def score(p):
    v = p.v if p.v.requires_grad else p.v.requires_grad_()
    (g,) = torch.autograd.grad((v**3).sum(), v, create_graph=True)
    return g.sum(-1)


def swallowed(p):
    """Does something else while it is looked at."""
    try:
        return (torch.from_numpy(p.v.detach().numpy()) ** 3).sum(-1)
    except RuntimeError:
        return p.v.sum(-1)


def triangle(p):
    return torch.linalg.solve_triangular(P.tril() + 3 * torch.eye(D), p.v.mT, upper=False).square().sum(0)


def rows_by_number(p):
    return torch.cat([2 * p.v[:5], p.v[5:]]).sum(-1)


# log p̃, its degrees in v and h, and whether rows have densities of their own; None: nothing is known of it
CASES = {
    "squares": (lambda p: -0.5 * (p.v**2).sum(-1), 2, 0),
    "matrix": (lambda p: torch.einsum("ni,ij,nj->n", p.v, P, p.v), 2, 0),
    "machine": (lambda p: ((p.v @ W) * p.h).sum(-1), 1, 1),
    "couplings": (lambda p: torch.einsum("ni,ij,nj->n", p.h, W.T @ W, p.h), 0, 2),
    "double well": (lambda p: -((p.v**2 - 1) ** 2).sum(-1), 4, 0),
    "mixture": (lambda p: torch.logsumexp(torch.stack([-(p.v**2).sum(-1), -((p.v - 9) ** 2).sum(-1)]), 0), UNKNOWN, 0),
    "rare state": (lambda p: -30.0 * (p.h.sum(-1) == 0).double(), 0, UNKNOWN),
    "rare state, a product": (lambda p: -30 * (1 - p.h).prod(-1), 0, 2),
    "norm": (lambda p: p.v.norm(dim=-1), UNKNOWN, 0),
    "given its label": (lambda p: ((p.v - MU[p.z]) ** 2 / MU[p.z].exp()).sum(-1), 2, 0),
    "variance of bits": (lambda p: (p.v**2 * (p.h @ W.T).exp()).sum(-1), 2, UNKNOWN),
    "quotient": (lambda p: (p.v**2 / (1 + p.h.sum(-1, keepdim=True))).sum(-1), 2, UNKNOWN),
    "quotient by itself": (lambda p: (1 / (1 + p.v**2)).sum(-1), UNKNOWN, 0),
    "odd power": (lambda p: (p.v.abs() ** 1.5).sum(-1), UNKNOWN, 0),
    "written to": (lambda p: in_place(p, 1), 2, 0),
    "square written to": (lambda p: in_place(p, 2), 4, 0),
    "put": (put, 2, 0),
    "index_add": (lambda p: torch.zeros(N, 2, dtype=torch.double).index_add(1, FIRST, p.v).pow(2).sum(-1), 2, 0),
    "out=": (out, UNKNOWN, 0),
    "cat, stack": (lambda p: torch.cat([p.v, p.h], -1).sum(-1) + torch.stack([p.v[:, 0], p.h[:, 0]]).sum(0), 1, 1),
    "put, added up": (
        lambda p: SUMS.index_put((ROW, FIRST), p.v, accumulate=True).pow(2).mul(1 + p.h).sum(-1),
        2,
        1,
        True,
    ),
    "baddbmm": (lambda p: torch.baddbmm(p.h[:, :1, None], p.v[:, None], P.expand(N, D, D)).sum((1, 2)), 1, 1),
    "addmm": (lambda p: torch.addmm(p.h[:, :1], p.v, W).pow(2).sum(-1), 2, 2),
    "linear": (lambda p: (linear(p.v, W.T) * p.h).sum(-1), 1, 1),
    "convolution": (lambda p: CONV(p.v[:, None]).flatten(1).sum(-1), 1, 0),
    "convolution of squares": (lambda p: conv1d(p.v[:, None], p.v[:1, None])[:, 0, 0], 2, 0, True),
    "sparse": (lambda p: torch.sparse.mm(SPARSE, p.v.mT).pow(2).sum(0), 2, 0),
    "solved": (lambda p: torch.linalg.solve(P, p.v.mT).sum(0), 1, 0),
    "triangle": (triangle, 2, 0),
    "batch norm": (lambda p: NORM(p.v).pow(2).sum(-1), 2, 0),
    "mse_loss": (lambda p: mse_loss(p.v, MU[p.z], reduction="none").sum(-1), 2, 0),
    "network": (lambda p: torch.tanh(p.v @ W).sum(-1), UNKNOWN, 0),
    "constant mask": (lambda p: torch.where(KEEP, p.v, p.v**2).sum(-1), 2, 0),
    "mask of bits": (lambda p: torch.where(p.h[:, :1] > 0.5, p.v, 2 * p.v).sum(-1), 1, UNKNOWN),
    "mask of v": (lambda p: torch.where(p.v > 0, p.v, 2 * p.v).sum(-1), UNKNOWN, 0),
    "clamped": (lambda p: p.v.clamp(-50, 50).sum(-1), UNKNOWN, 0),
    "rounded": (lambda p: p.v.sum(-1) + p.v.long().sum(-1), UNKNOWN, 0),
    "detached": (lambda p: p.v.sum(-1) * p.v.detach().sum(-1), UNKNOWN, 0),
    "data": (lambda p: p.v.data.sum(-1), UNKNOWN, 0),
    "detached, in place": (detached_in_place, UNKNOWN, 0),
    "no_grad": (without_gradient, UNKNOWN, 0),
    "lying gradient": (lambda p: Lying.apply(p.v).sum(-1), UNKNOWN, 0),
    "vmap": (lambda p: torch.vmap(lambda v, h: v @ P @ v + (v @ W) @ h)(p.v, p.h), 2, 1),
    "func.grad": (lambda p: torch.vmap(torch.func.grad(lambda v: (v**3).sum()))(p.v).sum(-1), 2, 0),
    "score": (score, 2, 0),
    "scripted": (lambda p: scripted(p.v), 3, 0),
    "compiled": (lambda p: compiled(p.v), 3, 0),
    "custom operation": (lambda p: opaque(p.v).sum(-1), UNKNOWN, 0),
    "item": (lambda p: p.v.sum(-1) * p.v.mean().item(), None, None),
    "branch": (branch, None, None),
    "numpy": (lambda p: p.v.sum(-1) + torch.from_numpy(p.v.detach().numpy() ** 3).sum(-1), None, None),
    "list": (lambda p: p.v.sum(-1) + (torch.tensor(p.v.tolist()) ** 3).sum(-1), None, None),
    "dlpack": (lambda p: (torch.from_dlpack(p.v.detach()) ** 3).sum(-1), None, None),
    "pointer": (pointer, None, None),
    "thread": (other_thread, None, None),
    "memory from outside": (kept_outside, None, None),
    "as integers": (lambda p: p.v.view(torch.long).view(torch.double).sum(-1), None, None),
    "swallowed": (swallowed, None, None),
    "mask from outside": (lambda p: p.v[p.v > 0].sum() + p.v.sum(-1), None, None),
    "a length": (lambda p: p.v.sum(-1) * torch.unique(p.z).numel(), None, None),
    "variance": (lambda p: p.v.var(-1), 2, 0),
    "holes": (lambda p: torch.where(torch.isnan(p.v), 0.0, p.v**2).sum(-1), 2, 0),
    "numbers of bits": (lambda p: (one_hot(p.z, K) * p.v).sum(-1) + p.h.long().sum(-1), 1, UNKNOWN),
    "covariate": (lambda p: (p.v * COVARIATE).sum(-1), 1, 0, True),
    "covariate through bits": (lambda p: (p.v**2).sum(-1) + (COVARIATE.exp() * p.h).sum(-1), 2, 1, True),
    "position": (lambda p: (p.v * torch.arange(N)[:, None]).sum(-1), 1, 0, True),
    "rows by number": (rows_by_number, 1, 0, True),
    "triangle of rows": (lambda p: p.v.tril(-1).sum(-1), 1, 0, True),
}


def proved(f, resizes=True):
    x = point()
    return prove_function(lambda x: f(SimpleNamespace(**x)), x, resizes)


@pytest.mark.parametrize("name", CASES)
def test_no_degree_is_too_low(name):
    """As expected; and where a degree is finite, differences of one order more vanish, near and far."""
    f, v, h, *told = CASES[name]
    proof = proved(f)
    if v is None:
        assert proof.degrees.within("v") == proof.degrees.within("h") == UNKNOWN
        assert COVARIATES in proof.degrees.groups and not proof.separable
        return
    assert (proof.degrees.within("v"), proof.degrees.within("h")) == (v, h)
    assert (COVARIATES in proof.degrees.groups) == bool(told)
    for group, degree in (("v", v), ("h", h)):
        if degree == UNKNOWN:
            continue
        for scale in (1.0, 30.0):
            x, other = point(1), point(2, scale)
            steps = range(int(degree) + 2)
            along = [{**x, group: x[group] + k * (other[group] - x[group])} for k in steps]
            values = torch.stack([f(SimpleNamespace(**u)) for u in along]).detach()
            signs = torch.tensor([(-1.0) ** k * math.comb(len(steps) - 1, k) for k in steps], dtype=torch.double)
            assert (signs @ values).abs().max() <= 1e-10 * values.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    "name", ["squares", "matrix", "machine", "given its label", "variance of bits", "written to", "put, added up"]
)
def test_separable_is_what_has_a_diagonal_hessian(name):
    f, x = CASES[name][0], point(1)
    first = {k: u[:1].repeat(N, *[1] * (u.ndim - 1)) for k, u in x.items()}
    hessian = torch.autograd.functional.hessian(lambda v: f(SimpleNamespace(**{**first, "v": v})).sum(), first["v"])
    own = torch.stack([hessian[i, :, i] for i in range(N)])
    is_diagonal = torch.equal(own, own.diagonal(dim1=1, dim2=2).diag_embed())
    assert is_diagonal == ("v" in proved(f).separable) == (name not in ("matrix", "put, added up"))


# The host's distributions, scored as an energy scores them

TO_POSITIVE = torch.distributions.biject_to(dist.constraints.positive)
SITES = {
    "Normal": (lambda p: dist.Normal(p.v, 2.0).log_prob(3.0).sum(-1), 2, 0),
    "Normal, location": (lambda p: dist.Normal(p.h @ W.T, 2.0).to_event(1).log_prob(p.v), 2, 2),
    "Normal, scale": (lambda p: dist.Normal(0.0, (p.h @ W.T).exp()).to_event(1).log_prob(p.v), 2, UNKNOWN),
    "MultivariateNormal": (lambda p: dist.MultivariateNormal(p.h @ W.T, P @ P.T + torch.eye(D)).log_prob(p.v), 2, 2),
    "LowRank": (lambda p: dist.LowRankMultivariateNormal(p.h @ W.T, W, MU[0].exp()).log_prob(p.v), 2, 2),
    "bits": (lambda p: ConcreteBernoulli(1.0, p.v @ W).to_event(1).log_prob(p.h), UNKNOWN, 1),
    "one of many": (lambda p: ConcreteOneHot(1.0, W[0].expand(N, H)).log_prob(p.h), 0, 1),
    "label": (lambda p: dist.Categorical(logits=MU[0]).log_prob(p.z) + (p.v**2).sum(-1), 2, 0),
    "expanded": (lambda p: dist.Normal(0.0, 1.0).expand([N, D]).to_event(1).log_prob(p.v), 2, 0),
    "masked": (lambda p: dist.Normal(p.h[:, :1], 1.0).expand([N, D]).mask(KEEP).log_prob(p.v).sum(-1), 2, 2),
    "Laplace": (lambda p: dist.Laplace(0.0, 1.0).log_prob(p.v).sum(-1), UNKNOWN, 0),
    "StudentT": (lambda p: dist.StudentT(3.0, 0.0, 100.0).log_prob(p.v).sum(-1), UNKNOWN, 0),
    "LogNormal": (lambda p: dist.LogNormal(0.0, 1.0).log_prob(TO_POSITIVE(p.v)).sum(-1), 2, 0),
    "exponential that was written to": (lambda p: TO_POSITIVE(p.v).add_(p.v**2).log().sum(-1), UNKNOWN, 0),
    "Gamma": (lambda p: dist.Gamma(2.0, 1.0).log_prob(p.v.exp()).sum(-1), UNKNOWN, 0),
}


@pytest.mark.parametrize("name", SITES)
def test_what_is_known_of_sites(name):
    f, v, h = SITES[name]
    with pyro.validation_enabled(False):
        proof = proved(f)
    assert (proof.degrees.within("v"), proof.degrees.within("h")) == (v, h)
    assert COVARIATES not in proof.degrees.groups


# Energies


def energy_of(model, *args, method=None):
    pyro.clear_param_store()
    optim = pyro.optim.Adam({"lr": 1e-3})
    method = method or (lambda model, optim: CD(model, optim, Langevin()))
    with pyro.validation_enabled(False):
        return method(model, optim).energy(*args)[0]


def flat(name, shape, obs=None, base=None):
    base = base or dist.Normal(0.0, 1.0)
    return pyro.sample(name, base.expand(shape).to_event(len(shape)).mask(False), obs=obs)


def machine(penalty=0.0, hook=False, size=None):
    def model(v, c=None):
        weights = pyro.param("W", lambda: torch.full((D, H), 0.3))
        with pyro.plate("data", size or len(v)) as rows:
            v = flat("v", [D], v[rows])
            h = flat("h", [H], base=dist.Bernoulli(0.5))
            drive = v @ weights if c is None else v @ weights + c
            if hook and h.requires_grad:
                h = h * 1
                h.register_hook(lambda g: 3 * g)
            energy = 0.5 * (v**2).sum(-1) - (drive * h).sum(-1)
            pyro.factor("energy", -energy - penalty * (h.sum(-1) == 0) if penalty else -energy)

    return model


def kinds(energy: Energy):
    return {name: (block.kind, block.is_constant, block.is_diagonal) for block in energy.blocks for name in block.names}


@pytest.mark.parametrize("n", [1, D, H, 17, 40])
@pytest.mark.parametrize("fixed", [False, True])
def test_a_machine_on_as_many_rows_as_it_has_units(n, fixed):
    """One density for all rows; its closed forms, whatever the number of rows."""
    energy = energy_of(machine(size=n if fixed else None), torch.randn(n, D))
    assert kinds(energy)["h"][0] == "affine" and kinds(energy)[VISIBLE][0] == "gaussian"
    assert energy.resizes == (not fixed)
    if energy.resizes:
        assert energy.is_homogeneous and kinds(energy)[VISIBLE] == ("gaussian", True, True)


def test_a_penalty_on_a_rare_state_and_a_hooked_gradient():
    assert kinds(energy_of(machine(penalty=30.0), torch.randn(5, D)))["h"][0] == "units"
    # no operation shows it: the one trial of what was proved does
    assert kinds(energy_of(machine(hook=True), torch.randn(5, D)))["h"][0] == "units"


def test_covariates_through_bits_alone():
    c = torch.zeros(40, 1)
    assert energy_of(machine(), torch.randn(40, D), c).is_homogeneous
    c[31] = 1.0  # in a row that a look at the first ones does not see
    energy = energy_of(machine(), torch.randn(40, D), c)
    assert not energy.is_homogeneous and kinds(energy) == {
        VISIBLE: ("gaussian", True, True),
        "h": ("affine", False, False),
    }


def test_a_program_that_counts_its_rows_has_a_fixed_number_of_them():
    def model(v):
        weights = pyro.param("b", lambda: torch.zeros(D))
        with pyro.plate("data", len(v)):
            v = flat("v", [D], v)
            pyro.factor("energy", -0.5 * (v**2).sum(-1) + (torch.arange(len(v)) // 9)[:, None].mul(v + weights).sum(-1))

    energy = energy_of(model, torch.randn(8, D))
    assert not energy.resizes or energy.is_homogeneous
    energy = energy_of(model, torch.randn(18, D))
    assert not energy.resizes and not energy.is_homogeneous


@pytest.mark.parametrize("array", [torch.tensor, np.array], ids=["torch", "numpy"])
def test_rows_of_a_longer_array(array):
    """They differ where a look at a few rows does not come to."""
    covariate = array([[0.0]] * 30 + [[1.0]] * 70)

    def model(v):
        slope = pyro.param("b", lambda: torch.ones(D))
        with pyro.plate("data", len(v)):
            v = flat("v", [D], v)
            own = torch.as_tensor(covariate[: len(v)], dtype=v.dtype)
            pyro.factor("energy", -0.5 * (v**2).sum(-1) + (own * slope * v).sum(-1))

    energy = energy_of(model, torch.randn(40, D))
    assert not energy.resizes and not energy.is_homogeneous
    assert kinds(energy) == {VISIBLE: ("gaussian", True, True)}


@pytest.mark.parametrize("zero_diagonal", [True, False])
def test_a_potts_model_has_no_squares_where_its_couplings_have_none(zero_diagonal):
    sites, letters = 4, 3

    def model(v):
        J = pyro.param("J", lambda: torch.randn(sites, letters, sites, letters))
        J = J + J.permute(2, 3, 0, 1)
        if zero_diagonal:
            J = J * (1 - torch.eye(sites))[:, None, :, None]
        with pyro.plate("data", len(v)):
            v = flat("v", [sites], v, base=dist.OneHotCategorical(torch.ones(letters)))
            pyro.factor("energy", torch.einsum("nia,iajb,njb->n", v, J, v))

    v = one_hot(torch.randint(letters, (7, sites)), letters).float()
    energy = energy_of(model, v)
    assert [(block.kind, block.is_multilinear) for block in energy.blocks] == [("units", zero_diagonal)]
    method = PseudoLikelihood(model, pyro.optim.Adam({"lr": 1e-3}))
    assert method.target(v).multilinear == (("v",) if zero_diagonal else ())


# What a proof misses, the user may declare


def declared(structure, visible=None, power=2.0, rare=0.0, limit=50.0):
    """A Gaussian with bits: the clamps hide that it is quadratic and affine where there is any mass."""

    def model(v):
        weights = pyro.param("W", lambda: torch.full((D, H), 0.3))
        with pyro.plate("data", len(v)):
            prior = dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False)
            v = pyro.sample("v", prior, obs=v, infer={"structure": visible} if visible else {})
            bits = dist.Bernoulli(0.5).expand([H]).to_event(1).mask(False)
            h = pyro.sample("h", bits, infer={"structure": structure} if structure else {})
            drive = ((v @ weights).sum(-1, keepdim=True) * h).clamp(-limit, limit).sum(-1)
            pyro.factor(
                "energy", -0.5 * (v.clamp(-50, 50) ** 2).sum(-1) ** (power / 2) + drive - rare * (h.sum(-1) == 0)
            )

    return model


def rival(model):
    pyro.clear_param_store()
    return CD(model, pyro.optim.Adam({"lr": 1e-3}), Langevin())


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_a_declaration_gives_the_closed_form(double):
    v = torch.randn(5, D, generator=generator)
    exact = -torch.stack(
        [-0.5 * (v**2).sum(-1) + 0.6 * v.sum(-1) * k for k in (0, 1, 1, 2)]  # the configurations of two bits
    ).logsumexp(0)
    found = rival(declared("affine", "gaussian"))
    energy = found.energy(v)[0]
    assert kinds(energy) == {VISIBLE: ("gaussian", False, False), "h": ("affine", False, False)}
    assert all(block.is_declared for block in energy.blocks)
    torch.testing.assert_close(free_energy(found, v), exact, rtol=1e-9, atol=1e-9)
    # each configuration is a Gaussian integral
    each = torch.tensor([0.5 * D * (0.6 * k) ** 2 + 0.5 * D * math.log(2 * math.pi) for k in (0, 1, 1, 2)])
    assert exact_log_normalizer(found, v) == pytest.approx(float(each.logsumexp(0)), rel=1e-9)
    assert kinds(rival(declared(None)).energy(v)[0]) == {VISIBLE: ("free", False, False), "h": ("units", False, False)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "affine", "rare": 30.0}, "'h' is declared .*not affine"),
        ({"structure": "affine", "limit": 0.01}, "'h' is declared .*not affine"),
        ({"structure": None, "visible": "gaussian", "power": 4.0}, "'v' is declared .*'gaussian'.*not quadratic"),
        ({"structure": "gaussian"}, "'h' .*can't have.*'affine'"),
        ({"structure": "linear"}, "'h' .*'linear'.*can't have"),
        ({"structure": None, "visible": "affine"}, "'v' .*can't have.*'gaussian'"),
    ],
)
def test_a_false_declaration_is_refused(double, options, message):
    with pytest.raises(ValueError, match=message):
        rival(declared(**options)).energy(torch.randn(5, D, generator=generator))


def test_a_declaration_that_fails_later_is_refused_there(double):
    """Quadratic where the data are, but with a wall 6 away: found where a closed form comes to it."""

    def model(v):
        scale = pyro.param("s", lambda: torch.ones(()))
        with pyro.plate("data", len(v)):
            v = flat("v", [1], v)
            h = pyro.sample("h", dist.Normal(0.0, 1.0).mask(False), infer={"structure": "gaussian"})
            pyro.factor(
                "energy", -0.5 * (v[:, 0] ** 2 + (h - v[:, 0]).clamp(-50, 50) ** 2) * scale - 50 * torch.relu(h - 6)
            )

    found = rival(model)
    v = torch.zeros(3, 1)
    torch.testing.assert_close(free_energy(found, v), torch.full((3,), -0.5 * math.log(2 * math.pi)))
    with pytest.raises(ValueError, match=r"'h' is declared .*not quadratic"):
        free_energy(found, v + 5.0)
