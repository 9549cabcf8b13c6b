"""Unusual arguments, modes and settings: each works, or is refused in one sentence with the cure."""

import dataclasses
import inspect
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import optax
import pyro
import pytest
import torch
from numpyro import distributions as jax_dist
from numpyro.infer import Trace_ELBO as NumPyroELBO
from pyro import distributions as torch_dist
from pyro.infer import Trace_ELBO as PyroELBO

import numpyro_bism
import pyro_bism

matplotlib.use("Agg")
D, H, N = 3, 2, 12
DATA = np.random.default_rng(0).normal(size=(N, D)).astype("float32")
ROOT = Path(__file__).resolve().parents[1]


class Pyro:
    """A restricted Boltzmann machine in Pyro; further arguments are not read."""

    package, dist, data = pyro_bism, torch_dist, torch.as_tensor(DATA)

    @staticmethod
    def model(x, *others, width=H):
        W = pyro.param("W", lambda: 0.1 * torch.randn(D, width))
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", torch_dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
            h = pyro.sample("h", torch_dist.Bernoulli(0.5).expand([width]).to_event(1).mask(False))
            pyro.factor("energy", ((v @ W) * h).sum(-1) - 0.5 * (v**2).sum(-1))

    @staticmethod
    def guide(x, *others, width=H):
        W = pyro.param("guide_W", lambda: torch.zeros(D, width))
        with pyro.plate("data", len(x)):
            pyro.sample("h", pyro_bism.ConcreteBernoulli(0.5, x @ W).to_event(1))

    def bism(self, loss=None, **settings):
        pyro.clear_param_store()
        torch.manual_seed(0)
        settings = {"model": self.model, "guide": self.guide, "optim": pyro.optim.Adam({"lr": 1e-3}), **settings}
        return pyro_bism.BiSM(**settings, loss=loss or pyro_bism.DenoisingScoreMatching(0.1))

    def step(self, bism, *args):
        return bism.step(*args)


class NumPyro:
    """The same in NumPyro."""

    package, dist, data = numpyro_bism, jax_dist, jnp.asarray(DATA)

    @staticmethod
    def model(x, *others, width=H):
        W = numpyro.param("W", lambda key: 0.1 * jax.random.normal(key, (D, width)))
        with numpyro.plate("data", len(x)):
            v = numpyro.sample("v", jax_dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
            h = numpyro.sample("h", jax_dist.Bernoulli(0.5).expand([width]).to_event(1).mask(False))
            numpyro.factor("energy", ((v @ W) * h).sum(-1) - 0.5 * (v**2).sum(-1))

    @staticmethod
    def guide(x, *others, width=H):
        W = numpyro.param("guide_W", jnp.zeros((D, width)))
        with numpyro.plate("data", len(x)):
            numpyro.sample("h", numpyro_bism.ConcreteBernoulli(0.5, x @ W).to_event(1))

    def bism(self, loss=None, **settings):
        settings = {"model": self.model, "guide": self.guide, "optim": optax.adam(1e-3), **settings}
        return numpyro_bism.BiSM(**settings, loss=loss or numpyro_bism.DenoisingScoreMatching(0.1))

    def step(self, bism, *args):
        return bism.evaluate(bism.init(jax.random.key(0), *args), *args)


BOTH = pytest.mark.parametrize("backend", [Pyro(), NumPyro()], ids=["pyro", "numpyro"])


@BOTH
def test_only_the_visible_data_have_to_be_finite(backend):
    mask = np.zeros((D, H), "float32")
    mask[0, 0] = -np.inf
    hole = DATA.copy()
    hole[2, 1] = np.nan
    like = type(backend.data) if isinstance(backend, Pyro) else None
    arrays = [torch.as_tensor(a) if like else jnp.asarray(a) for a in (mask, hole)]
    assert np.isfinite(float(backend.step(backend.bism(), backend.data, *arrays)))
    with pytest.raises(ValueError, match=r"args\[0\] has 1 NaN or infinite values, the first at index \(2, 1\)"):
        backend.step(backend.bism(), arrays[1])


UNUSUAL = {
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1]]),
    "mkldnn": lambda x: x.to_mkldnn(),
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_tensors(kind):
    backend = Pyro()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that these are in beta state
        x = UNUSUAL[kind](backend.data)
        with pytest.raises(ValueError, match=rf"args\[0\] .*{kind}"):
            backend.bism().step(x)
        if kind != "meta":  # the programs do not read it
            assert np.isfinite(backend.bism().step(backend.data, x))


def test_inference_tensors_are_data_as_others():
    backend = Pyro()
    with torch.inference_mode():
        x = backend.data.clone()
    assert backend.bism().step(x, x) == backend.bism().step(backend.data, backend.data)


def test_gradients_are_turned_on():
    backend = Pyro()
    bism = backend.bism()
    plain = [bism.step(backend.data), pyro_bism.fisher_divergence(bism, backend.data).value.item()]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            bism = backend.bism()
            found = [bism.step(backend.data), pyro_bism.fisher_divergence(bism, backend.data).value.item()]
            pyro_bism.run_chains(
                bism, backend.data, kernel=pyro_bism.Langevin(), num_samples=2, num_warmup=2, progress_bar=False
            )
        assert found == plain


STRICT = {"numpy_rank_promotion": "raise", "numpy_dtype_promotion": "strict", "transfer_guard": "disallow"}


@pytest.mark.parametrize("mode", STRICT)
def test_strict_modes_of_jax(mode):
    backend = NumPyro()
    x, key = backend.data, jax.random.key(0)
    with getattr(jax, mode)(STRICT[mode]):
        bism = backend.bism()
        state = bism.init(key, x)
        losses = bism.run(key, 2, x, progress_bar=False, init_state=state).losses
        value = numpyro_bism.log_likelihood(bism, state, x, rng_key=key).value
        chains = numpyro_bism.run_chains(
            bism, state, x, rng_key=key, kernel=numpyro_bism.Gibbs(), num_samples=2, num_warmup=2, progress_bar=False
        )
    assert np.isfinite(np.concatenate([losses, value, chains.log_joint.ravel()])).all()


def test_float32_data_beside_x64():
    backend = NumPyro()
    with jax.enable_x64(True):
        x, key = jnp.asarray(DATA), jax.random.key(0)
        assert x.dtype == jnp.float32
        bism = backend.bism()
        state = bism.init(key, x)
        settings = {"rng_key": key, "progress_bar": False}
        exact = numpyro_bism.exact_log_normalizer(bism, state, x)
        found = numpyro_bism.ais(bism, state, x, num_temperatures=100, num_chains=100, reverse=False, **settings)
        assert abs(found.log_normalizer - exact) < 5 * found.standard_error
        for kernel in (numpyro_bism.Langevin(), numpyro_bism.Gibbs()):
            chains = numpyro_bism.run_chains(bism, state, x, kernel=kernel, num_samples=2, num_warmup=2, **settings)
            assert bool(jnp.isfinite(chains.log_joint).all())


def test_sigma_may_be_traced():
    backend = NumPyro()
    x = backend.data

    def loss(sigma):
        outer = numpyro_bism.MultiscaleDenoisingScoreMatching(sigma, 1.0, 0.1)
        return backend.step(backend.bism(outer), x)

    each = [float(loss(sigma)) for sigma in (0.1, 0.2)]
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(jnp.array([0.1, 0.2])), each, rtol=1e-4)


def test_states_can_be_written(tmp_path):
    import equinox
    from flax import serialization

    backend = NumPyro()
    bism, x = backend.bism(), backend.data
    state = bism.init(jax.random.key(0), x)
    equinox.tree_serialise_leaves(tmp_path / "state", state)
    copies = (
        equinox.tree_deserialise_leaves(tmp_path / "state", state),
        serialization.from_bytes(state, serialization.to_bytes(state)),
    )
    for copy in copies:
        assert float(bism.evaluate(copy, x)) == float(bism.evaluate(state, x))


def test_explicit_mesh_axes_are_named():
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    backend = NumPyro()
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(backend.data, NamedSharding(mesh, PartitionSpec("rows")))
    with pytest.raises(ValueError, match=r"args\[0\] lies on a mesh with explicit axes.*AxisType.Auto"):
        backend.step(backend.bism(), x)


@BOTH
def test_what_is_no_setting_is_named(backend):
    package, x = backend.package, backend.data
    elbo = PyroELBO if isinstance(backend, Pyro) else NumPyroELBO
    for wrong in (print, package.Detached, lambda *args: None, "cg"):
        with pytest.raises(ValueError, match="is not a strategy"):
            backend.bism(hypergradient=wrong)
    with pytest.raises(ValueError, match="the class ScoreMatching itself is not an outer loss"):
        backend.bism(package.ScoreMatching)
    with pytest.raises(ValueError, match="the class Trace_ELBO itself"):
        backend.bism(inner_loss=elbo)
    optim = backend.bism().optim
    for wrong in (package.Gibbs, print, "gibbs"):
        with pytest.raises(ValueError, match=r"is not a kernel\. Pass an instance, such as Gibbs\(\)"):
            package.CD(backend.model, optim, wrong)
        state = () if isinstance(backend, Pyro) else (None,)
        keyed = {} if isinstance(backend, Pyro) else {"rng_key": jax.random.key(0)}
        with pytest.raises(ValueError, match="is not a kernel"):
            package.run_chains(backend.bism(), *state, x, kernel=wrong, **keyed)
    with pytest.raises(ValueError, match="is not a distribution"):
        package.NCE(backend.model, optim, print)


@BOTH
def test_latents_that_the_guide_lacks(backend):
    """What the guide leaves out is summed out by MarginalSM, or is a weight with a prior."""
    host = pyro if isinstance(backend, Pyro) else numpyro
    dist, x = backend.dist, backend.data

    def mixture(x):
        a = host.param("a", torch.tensor(0.5) if host is pyro else 0.5)
        with host.plate("data", len(x)):
            z = host.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            host.sample("v", dist.Normal((a * z)[..., None], 1.0).expand([len(x), D]).to_event(1), obs=x)

    def bayesian(x):
        w = host.sample("w", dist.Normal(0.0, 1.0).expand([D]).to_event(1))
        with host.plate("data", len(x)):
            host.sample("v", dist.Normal(w * x[:1], 1.0).expand([len(x), D]).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"'z' is missing from the guide\. BiSM sums out what.*MarginalSM"):
        backend.step(backend.bism(model=mixture, guide=lambda x: None), x)
    with pytest.raises(ValueError, match=r"'w' is missing from the guide\. It stands outside.*PersistentVI"):
        backend.step(backend.bism(model=bayesian, guide=lambda x: None), x)


@BOTH
def test_a_latent_whose_density_is_a_mixture(backend):
    host, dist, x = (pyro, torch_dist, backend.data) if isinstance(backend, Pyro) else (numpyro, jax_dist, backend.data)
    array = torch.tensor if host is pyro else jnp.array

    def model(x):
        a = host.param("a", array(0.5))
        parts = dist.Normal(array([-1.0, 1.0]), array([1.0, 1.0]))
        with host.plate("data", len(x)):
            z = host.sample("z", dist.MixtureSameFamily(dist.Categorical(array([0.5, 0.5])), parts))
            host.sample("v", dist.Normal((a * z)[..., None], 1.0).expand([len(x), 1]).to_event(1), obs=x)

    def guide(x):
        a = host.param("b", array(0.0))
        with host.plate("data", len(x)):
            host.sample("z", dist.Normal(a * x[:, 0], 1.0))

    bism, x = backend.bism(model=model, guide=guide), x[:, :1]
    backend.step(bism, x)
    keyed = {} if host is pyro else {"rng_key": jax.random.key(0)}
    state = () if host is pyro else (bism.init(jax.random.key(0), x),)
    found = backend.package.log_likelihood(bism, *state, x, **keyed)
    a, v = 0.5, DATA[:, 0].astype(float)
    if host is pyro:
        a = pyro.param("a").item()
    variance = 1 + a**2
    parts = [-0.5 * (v - a * sign) ** 2 / variance for sign in (-1, 1)]
    right = np.logaddexp(*parts) - np.log(2) - 0.5 * np.log(2 * np.pi * variance)
    np.testing.assert_allclose(np.asarray(found.value), right, atol=1e-4)


def test_a_parameter_without_dimensions_unrolls_in_a_captured_step(monkeypatch):
    backend = Pyro()
    # the captured graphs, run without a compiler
    monkeypatch.setattr(
        pyro_bism.compiled.graph,
        "compile_recording",
        lambda recorded, inputs: torch.no_grad()(lambda values: recorded(*values)),
    )

    def guide(x):
        a = pyro.param("a", lambda: torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("h", pyro_bism.ConcreteBernoulli(0.5, a * x[:, :H]).to_event(1))

    losses = []
    for jit in (False, True):
        bism = backend.bism(guide=guide, hypergradient=pyro_bism.Unrolled(2), jit=jit)
        losses.append([bism.step(backend.data) for _ in range(3)])
        assert pyro.param("a").dtype == torch.float32
    np.testing.assert_allclose(*losses, rtol=1e-5)


@BOTH
def test_results_print_in_words(backend):
    package = backend.package
    array = torch.zeros if isinstance(backend, Pyro) else jnp.zeros
    ais = package.evaluation.AIS(1.0, 0.1, 50.0, 0.9, 0.1, 1.1, 0.1, array(500), None)
    assert repr(ais).endswith("log_weights=<500 from 0 to 0>, reverse_log_weights=None)")
    zeros = array((2, 3))
    chains = package.sampling.Chains({"v": array((2, 3, 4))}, zeros, zeros, ("v",), False, {}, (), "Gibbs", {}, None)
    assert "values={'v': <2 x 3 x 4 from 0 to 0>}" in repr(chains) and len(repr(chains)) < 400
    verdict = package.evaluation.verdicts.Verdict("guide", True, "trusted")
    fields = {f.name: None for f in dataclasses.fields(package.evaluation.report.Diagnosis)}
    found = package.evaluation.report.Diagnosis(**{**fields, "verdicts": (verdict,)})
    assert repr(found) == str(found) == "guide  ok      trusted"


@BOTH
def test_a_figure_is_shown_once(backend):
    """What a notebook shows is what ``plot`` returns: pyplot must not show it again at the end of the cell."""
    from matplotlib import pyplot

    fields = {f.name: None for f in dataclasses.fields(backend.package.evaluation.report.Diagnosis)}
    found = backend.package.evaluation.report.Diagnosis(**{**fields, "verdicts": (), "visible": DATA})
    before = pyplot.get_fignums()
    assert found.plot().axes and pyplot.get_fignums() == before


@BOTH
def test_docstrings_promise_no_arguments_that_do_not_exist(backend):
    """Every ``name(argument=...)`` of a public name in docstrings, messages and pages is one that it takes."""
    package = backend.package
    texts = [p.read_text() for p in (ROOT / package.__name__).rglob("*.py")]
    texts += [p.read_text() for p in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md")]
    wrong = set()
    for name in package.__all__:
        thing = getattr(package, name)
        if not callable(thing):
            continue
        parameters = inspect.signature(thing).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not inspect.isfunction(thing):
            continue
        for text in texts:
            for call in re.finditer(rf"(?<![\w.]){name}\(([^()]*)", text):
                wrong |= {
                    f"{name}({key}=)"
                    for key in re.findall(r"(?:^|[\s,])(\w+)=(?!=)", call[1])
                    if key not in parameters and key not in ("rng_key", "state", "jit")
                }
    assert not wrong


@BOTH
def test_a_state_of_another_size(backend, tmp_path):
    """It is refused by name before anything of it is taken up; also where the programs have not run yet."""
    from functools import partial

    small, wide = (
        {"model": partial(backend.model, width=w), "guide": partial(backend.guide, width=w)} for w in (H, H + 2)
    )
    x = backend.data
    bism = backend.bism(**small)
    if isinstance(backend, NumPyro):
        state = bism.init(jax.random.key(0), x)
        other = backend.bism(**wide)
        other.init(jax.random.key(0), x)
        for call in (other.update, other.evaluate):
            with pytest.raises(ValueError, match=r"W' has shape \(3, 2\).*has \(3, 4\)"):
                call(state, x)
        return
    bism.step(x)
    bism.save(tmp_path / "state")
    for has_run in (True, False):
        other = backend.bism(**wide)
        if has_run:
            other.step(x)
        with pytest.raises(ValueError, match=r"W' has shape \(3, 2\).*has \(3, 4\)"):
            other.load(tmp_path / "state")
            other.step(x)


@pytest.mark.parametrize("norm", [torch.nn.utils.spectral_norm, torch.nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_under_exact_score_matching(norm):
    """Its power iteration moves at every pass in training mode: that couples no examples."""
    backend = Pyro()
    linear = norm(torch.nn.Linear(D, H))

    def model(x):
        layer = pyro.module("layer", linear)
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", torch_dist.Normal(0.0, 1.0).expand([D]).to_event(1).mask(False), obs=x)
            h = pyro.sample("h", torch_dist.Bernoulli(0.5).expand([H]).to_event(1).mask(False))
            pyro.factor("energy", (layer(v) * h).sum(-1) - 0.5 * (v**2).sum(-1))

    assert np.isfinite(backend.step(backend.bism(pyro_bism.ScoreMatching(), model=model), backend.data))


def test_annealing_and_chains_of_bits_alone():
    """There is no column of real numbers then, of whose spread torch would warn; log Z of independent bits."""

    def model(x):
        b = pyro.param("b", torch.tensor([0.5, -1.0, 2.0]))
        with pyro.plate("data", len(x)):
            v = pyro.sample("v", torch_dist.Bernoulli(0.5).expand([3]).to_event(1).mask(False), obs=x)
            pyro.factor("energy", v @ b)

    x = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    rival = pyro_bism.PseudoLikelihood(model, pyro.optim.Adam({"lr": 1e-2}))
    found = pyro_bism.ais(rival, x, num_temperatures=20, num_chains=200, progress_bar=False)
    exact = np.log1p(np.exp(0.5)) + np.log1p(np.exp(-1.0)) + np.log1p(np.exp(2.0))
    assert abs(found.log_normalizer - exact) < max(4 * found.standard_error, 1e-4)
    settings = {"num_warmup": 0, "num_samples": 2, "num_chains": 2, "progress_bar": False}
    pyro_bism.run_chains(rival, x, kernel=pyro_bism.Gibbs(), init="noise", **settings)
