"""Sums and integrals over all kinds of densities, against SciPy and closed forms: right, or with the error said."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.special
import torch

import numpyro_bism
import pyro_bism
from numpyro_bism import energies as numpyro_energies
from numpyro_bism.programs import visible as numpyro_visible
from pyro_bism import energies as pyro_energies
from pyro_bism.programs import visible as pyro_visible


class Trained:
    """What the estimators see of a trained model: an energy, whose blocks may be replaced by what proves nothing."""

    def __init__(self, backend, model, free):
        self.backend, self.model, self.free = backend, model, free

    def energy(self, *args, **kwargs):
        *rest, point = self.backend.energy_of(self.model, *args, **kwargs)
        energy = rest[0]
        if self.free:
            real = [VISIBLE, *(name for name, latent in energy.latents.items() if latent.kind == "real")]
            blocks = tuple(b for b in energy.blocks if b.kind not in ("gaussian", "free"))
            free = tuple(self.backend.energies.Block("free", (name,)) for name in real)
            energy = dataclasses.replace(energy, blocks=blocks + free)
        return (energy, *rest[1:], point)


VISIBLE = pyro_energies.VISIBLE


class Pyro:
    name, p, dist, xp, energies, package = "pyro", pyro, dist, torch, pyro_energies, pyro_bism

    @contextlib.contextmanager
    def precision(self, bits):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        torch.set_default_dtype(torch.float64 if bits == 64 else torch.float32)
        try:
            yield self
        finally:
            torch.set_default_dtype(torch.float32)

    def array(self, a):
        a = torch.as_tensor(np.asarray(a))
        return a.to(torch.get_default_dtype()) if a.is_floating_point() else a

    def energy_of(self, model, *args):
        leaves, spec = pyro_visible.flatten((args, {}))
        with pyro.poutine.block(), pyro_bism.programs.records.record({}) as run:
            model(*args)
        batch = pyro_visible.Batch(pyro_visible.find(run.sites, leaves, ["v"]), {}, leaves, spec)
        return self.energies.Energy.from_model(model, batch.sites, batch)

    def call(self, function, model, *args, free=True, **options):
        options.pop("rng_key", None)
        args = [self.array(a) for a in args]
        return getattr(pyro_bism, function)(Trained(self, model, free), *args, **options)


class Numpyro:
    name, p, dist, xp, energies, package = "numpyro", numpyro, ndist, jnp, numpyro_energies, numpyro_bism

    @contextlib.contextmanager
    def precision(self, bits):
        with jax.enable_x64(bits == 64):
            yield self

    array = staticmethod(jnp.asarray)

    def energy_of(self, model, state, *args, rng_key):
        leaves, spec = numpyro_visible.flatten(args, {})
        with numpyro.handlers.seed(rng_seed=0), numpyro_bism.programs.records.record({}) as run:
            model(*args)
        batch = numpyro_visible.batch(numpyro_visible.find(run.sites, leaves, ["v"]), {}, leaves, spec)
        energy, x = self.energies.Energy.from_model(model, batch.sites, batch, {}, rng_key)
        return energy, {}, x

    def call(self, function, model, *args, free=True, **options):
        options.setdefault("rng_key", jax.random.key(0))
        args = [self.array(a) for a in args]
        return getattr(numpyro_bism, function)(Trained(self, model, free), None, *args, **options)


@pytest.fixture(params=[Pyro(), Numpyro()], ids=lambda host: host.name)
def host(request):
    return request.param


def flat(host, x):
    """The visible site without a density of its own."""
    return host.p.sample("v", host.dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1).mask(False), obs=x)


def normal(host, v, mean, sd):
    return -0.5 * ((v - mean) / sd) ** 2 - math.log(sd * math.sqrt(2 * math.pi))


# what log p̃(v) may be in one dimension, what log Z is, and where the data are
DENSITIES = {
    "two modes": (
        lambda h, v: h.xp.logaddexp(normal(h, v, 0.0, 0.1), normal(h, v, 8.0, 0.1)),
        math.log(2),
        (0.02, 8.07),
    ),
    "needles far apart": (
        lambda h, v: h.xp.logaddexp(normal(h, v, -400.0, 1e-3), normal(h, v, 400.0, 1e-3)),
        math.log(2),
        (-399.9995, 400.0003),
    ),
    "a mode unseen": (
        lambda h, v: h.xp.logaddexp(normal(h, v, 0.0, 1.0), math.log(10) + normal(h, v, 20.0, 1.0)),
        math.log(11),
        (0.3, -0.4),
    ),
    "double well": (
        lambda h, v: -((v**2 - 1) ** 2),
        math.log(scipy.integrate.quad(lambda v: math.exp(-((v**2 - 1) ** 2)), -6, 6)[0]),
        (1.5, 2.0),
    ),
    "far from the data": (lambda h, v: -((v - 1e3) ** 4), math.log(2 * math.gamma(1.25)), (0.0, 1.0)),
    "Cauchy": (lambda h, v: -h.xp.log(1 + v**2), math.log(math.pi), (0.5, -3.0)),
    "Student": (
        lambda h, v: -2 * h.xp.log(1 + (v / 100) ** 2 / 3),
        math.log(100 * math.sqrt(3 * math.pi)) + math.lgamma(1.5) - math.lgamma(2.0),
        (1.0, -2.0),
    ),
    "kink": (lambda h, v: -abs(v - 0.3) / 0.7, math.log(1.4), (0.1, 0.2)),
    "walls": (
        lambda h, v: h.xp.where((v > -0.2) & (v < 1.17), 0.0 * v, -math.inf),
        math.log(1.37),
        (0.5, 0.1),
    ),
}


def by_row(host):
    """A row of the data takes its density by number: a conditional model."""

    def model(x, which):
        with host.p.plate("data", len(x)):
            v = flat(host, x)[:, 0]
            total = 0.0
            for k, (log_prob, _, _) in enumerate(DENSITIES.values()):
                total = total + host.xp.where(which == k, log_prob(host, v), 0.0)
            host.p.factor("energy", total)

    return model


ROWS = np.array([[v] for _, _, data in DENSITIES.values() for v in data])
WHICH = np.repeat(np.arange(len(DENSITIES)), 2)
LOG_Z = np.repeat([log_z for _, log_z, _ in DENSITIES.values()], 2)


@pytest.mark.parametrize("bits", [64, pytest.param(32, marks=pytest.mark.full)])
def test_densities_of_all_kinds(host, bits):
    """Row by row, each within its error; no result is called exact."""
    with host.precision(bits):
        found = host.call("log_normalizer", by_row(host), ROWS, WHICH)
        assert found.method == "quadrature"
        off = abs(found.value - LOG_Z)
        named = dict(zip(DENSITIES, zip(off[::2], found.standard_error[::2], strict=True), strict=True))
        assert (found.standard_error < (1e-6 if bits == 64 else 2e-3)).all(), named
        assert (off <= 3 * found.standard_error + 1e-7).all(), named
        if bits == 64:
            likelihood = host.call("log_likelihood", by_row(host), ROWS, WHICH)
            assert likelihood.method == "log p̃: exact, log Z: quadrature"
            np.testing.assert_array_equal(likelihood.standard_error, found.standard_error)


PRIORS = {
    "Gamma": (lambda d, a: d.Gamma(a, 1.0), (0.1, 0.5, 1.0, 30.0)),
    "LogNormal": (lambda d, a: d.LogNormal(1.0, a), (0.1, 1.0, 3.0, 5.0)),
    "HalfCauchy": (lambda d, a: d.HalfCauchy(a), (0.01, 1.0, 10.0, 1000.0)),
    "Beta": (lambda d, a: d.Beta(a, a), (0.1, 0.3, 1.0, 9.0)),
    "StudentT": (lambda d, a: d.StudentT(3.0, 0.0, a), (0.1, 1.0, 10.0, 100.0)),
}


@pytest.mark.parametrize(
    ("name", "bits"),
    [("Gamma", 64), ("LogNormal", 64), ("HalfCauchy", 32), ("Beta", 64), ("Beta", 32), ("StudentT", 32)],
)
def test_tails_of_latents(host, name, bits):
    """∫ p(h) dh = 1."""
    prior, scales = PRIORS[name]

    def model(x, scale):
        with host.p.plate("data", len(x)):
            v = flat(host, x)
            host.p.sample("h", prior(host.dist, scale))
            host.p.factor("energy", -0.5 * (v**2).sum(-1))

    x = np.array([[0.1], [0.5], [-0.3], [1.0]])
    with host.precision(bits):
        found = host.call("log_likelihood", model, x, np.array(scales), log_normalizer=0.0)
        assert found.method == "log p̃: quadrature, log Z: given"
        off = abs(found.value + 0.5 * x[:, 0] ** 2)
        assert (off <= 3 * found.standard_error + 1e-7).all(), (off, found.standard_error)
        assert (found.standard_error < (1e-6 if bits == 64 else 1e-2)).all(), found.standard_error


def test_two_and_three_dimensions(host):
    """v in two dimensions and h in one; two modes in two; two free latents."""

    def three(x):
        with host.p.plate("data", len(x)):
            v = flat(host, x)
            h = host.p.sample("h", host.dist.Normal(0.0, 1.0).mask(False))
            host.p.factor("energy", -0.5 * (v**2).sum(-1) - (h - v[:, 0] * v[:, 1]) ** 2)

    def modes(x):
        with host.p.plate("data", len(x)):
            v = flat(host, x)
            host.p.factor("energy", host.xp.logaddexp(*(normal(host, v, m, 0.1).sum(-1) for m in (0.0, 8.0))))

    def latents(x):
        with host.p.plate("data", len(x)):
            v = flat(host, x)
            h = host.p.sample("h", host.dist.Normal(0.0, 1.0).expand([2]).to_event(1).mask(False))
            host.p.factor("energy", -((h[:, 0] - v[:, 0]) ** 2) - (h[:, 1] - h[:, 0] ** 2) ** 4 - 0.5 * v[:, 0] ** 2)

    near = np.array([[0.05, 0.02], [-0.1, 0.04], [8.1, 7.9]])
    with host.precision(64):
        found = host.call("log_normalizer", three, near[:2])
        assert found.value == pytest.approx(math.log(2 * math.pi) + 0.5 * math.log(math.pi), abs=1e-6)
        assert found.standard_error < 1e-4
        found = host.call("log_normalizer", modes, near)
        assert found.value == pytest.approx(math.log(2), abs=1e-8)
        exact = 0.5 * near[:, 0] ** 2 - 0.5 * math.log(math.pi) - math.log(2 * math.gamma(1.25))
        np.testing.assert_allclose(np.asarray(host.call("free_energy", latents, near[:, :1])), exact, atol=1e-6)
        with pytest.raises(ValueError, match="no exact sum over 'h', but quadrature over 'h' is within reach"):
            host.call("log_likelihood", latents, near[:, :1], method="exact")


def test_what_has_no_integral(host):
    def of(log_prob):
        def model(x):
            with host.p.plate("data", len(x)):
                host.p.factor("energy", log_prob(flat(host, x)))

        return model

    x = np.array([[0.5, 0.2], [1.5, 1.0]])
    infinite = "does not fall off fast enough where the visible values is large .*: the integral is infinite"
    with host.precision(64):
        for log_prob, words in (
            (lambda v: -((v[:, 0] - 2 * v[:, 1]) ** 2), infinite),  # a flat direction
            (lambda v: -(host.xp.log(v[:, 0]) ** 2) - v[:, 0] - v[:, 1] ** 2, r"is no number \(NaN\) at row 0"),
        ):
            for function in ("exact_log_normalizer", "log_likelihood"):
                with pytest.raises(ValueError, match=words):
                    host.call(function, of(log_prob), x)
        with pytest.raises(FloatingPointError, match="Z is infinite"):
            host.call("log_normalizer", of(lambda v: -((v[:, 0] - 2 * v[:, 1]) ** 2)), x, free=False)


def test_pixels_in_single_precision(host):
    """Sums of 100 squares of 0 to 255: log Z to rounding, and a likelihood whose error is said."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (3, 100)).astype(float)
    mean, pull = rng.uniform(100, 150, 100), rng.normal(size=100) / 10

    def model(x):
        with host.p.plate("data", len(x)):
            v = flat(host, x)
            h = host.p.sample("h", host.dist.Normal(0.0, 1.0).mask(False))
            at, along = host.array(mean.astype(np.float32)), host.array(pull.astype(np.float32))
            host.p.factor("energy", -0.5 * ((v - at - h[:, None] * along) ** 2).sum(-1) - 0.5 * h**2)

    mean32, pull32 = mean.astype(np.float32).astype(float), pull.astype(np.float32).astype(float)
    log_z = 0.5 * 101 * math.log(2 * math.pi)
    precision = 1 + pull32 @ pull32
    r = x - mean32
    exact = -0.5 * (r**2).sum(-1) + 0.5 * (r @ pull32) ** 2 / precision - 0.5 * math.log(precision)
    exact += 0.5 * math.log(2 * math.pi) - log_z
    with host.precision(32):
        found = host.call("log_normalizer", model, x, free=False)
        assert found.method == "exact"
        assert found.value == pytest.approx(log_z, rel=1e-4)
        found = host.call("log_likelihood", model, x, free=False)
        assert found.method == "exact"
        assert (abs(found.value - exact) <= found.standard_error).all()
        assert (found.standard_error < 1e-4 * abs(exact)).all()
