"""The numbers are those that the pages promise: losses under scales and masks, without bias, schedules, checkpoints.

Every value is compared with one worked out by hand, in both packages, in float64.
"""

import copy
import itertools
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import numpyro.infer
import optax
import pyro
import pyro.distributions as pdist
import pyro.infer
import pyro.optim
import pytest
import torch

import numpyro_bism
import numpyro_bism.losses
import pyro_bism
import pyro_bism.losses
from numpyro_bism.optim.host import as_optim, inner_copy

BOTH = pytest.mark.parametrize("backend", ["pyro", "numpyro"])


@pytest.fixture(autouse=True)
def double(torch_double):
    with jax.enable_x64(True):
        yield


class Host:
    """A host library under one set of names, so that one program is written once."""

    def __init__(self, backend):
        self.is_pyro = backend == "pyro"
        self.ppl, self.dist = (pyro, pdist) if self.is_pyro else (numpyro, ndist)
        self.bism = pyro_bism if self.is_pyro else numpyro_bism
        self.np = torch if self.is_pyro else jnp
        self.infer = pyro.infer if self.is_pyro else numpyro.infer
        self.scale = pyro.poutine.scale if self.is_pyro else numpyro.handlers.scale
        self.mask = pyro.poutine.mask if self.is_pyro else numpyro.handlers.mask
        self.categorical = pdist.Categorical if self.is_pyro else ndist.Categorical

    def array(self, x):
        return torch.tensor(np.asarray(x)) if self.is_pyro else jnp.asarray(x)

    def param(self, name, value):
        return self.ppl.param(name, self.array(value))

    def flat(self, name, value=None):
        return self.ppl.sample(name, self.dist.Normal(0.0, 1.0).mask(False), obs=value)

    def adam(self, rate=0.0):
        return pyro.optim.Adam({"lr": rate}) if self.is_pyro else numpyro.optim.Adam(rate)

    def look(self, model, guide, x, losses, **settings):
        """J under each loss and G, at the initial parameters and one draw of the noise."""
        x = self.array(x)
        trained = self.bism.BiSM(model, guide, self.adam(), losses[0], **settings)
        if self.is_pyro:
            pair, leaves, spec = trained._prepare((x,), {})
            batch = pair.batch(leaves, spec)
            found = [pair.outer_loss(batch, loss) for loss in losses]
            return [value.item() for value in (*found, trained._inner(pair, batch, batch.v))]
        state = trained.init(jax.random.key(0), x)
        leaves, spec = trained._checked((x,), {})
        pair = trained.pair(leaves, spec)
        params = pair.params(*trained._unpack(pair, state), state.mutable_state)
        key = jax.random.key(1)
        batch = pair.batch(key, leaves, spec)

        @jax.jit
        def values(params):
            found = [pair.outer_loss(key, params, batch, loss) for loss in losses]
            return [*found, trained._inner(key, pair, params, batch, batch.v)]

        return values(params)

    def posterior(self, model, guide, x, loss):
        """J and the derivative in w that ``Exact`` takes."""
        trained = self.bism.BiSM(model, guide, self.adam(), loss)
        if self.is_pyro:
            pyro.clear_param_store()
            pair, leaves, spec = trained._prepare((x,), {})
            torch.manual_seed(0)
            value = self.bism.hypergradients.surrogates.posterior_loss(pair, pair.batch(leaves, spec), loss)
            return [value.item(), *torch.autograd.grad(value, list(pair.theta.values()))[0].tolist()]
        state = trained.init(jax.random.key(0), x)
        leaves, spec = trained._checked((x,), {})
        pair, key = trained.pair(leaves, spec), jax.random.key(1)
        theta, phi = trained._unpack(pair, state)
        batch, fixed = pair.batch(key, leaves, spec), pair.params(theta, phi, None)

        def posterior_loss(theta):
            estimate = self.bism.hypergradients.surrogates.posterior_loss
            return estimate(key, pair, pair.params(theta, phi, None), fixed, batch, loss)

        value, slope = jax.jit(jax.value_and_grad(posterior_loss))(theta)
        return [float(value), *slope["w"].tolist()]

    def outer_losses(self, model, guide, x, loss, times):
        """J at the initial parameters, with fresh draws each time."""
        x = self.array(x)
        trained = self.bism.BiSM(model, guide, self.adam(), loss)
        if self.is_pyro:
            return np.array([trained.evaluate_loss(x) for _ in range(times)])
        state = trained.init(jax.random.key(0), x)
        keys = jax.random.split(jax.random.key(1), times)
        return np.asarray(jax.jit(jax.vmap(lambda key: trained.evaluate(state._replace(rng_key=key), x)))(keys))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# Summed-out sites under scale and mask: log p̃ = -½v² + h₁(w₁v + c) + w₂ v h₂ + k h₁h₂, with two bits or one of 3 values

W1, W2, C, K12, A1, A2, B12 = 0.7, -0.9, 0.2, 0.5, 0.6, -0.4, 0.8
TABLE = np.array([0.3, -0.5, 0.9])
SLOPES = np.array([0.2, -0.7, 0.4])
X = np.array([0.4, -1.1, 0.8])


def bits(v):
    """q, log q, ∂_v log q, ∂²_v log q, log p̃ and its slope for each joint configuration of two dependent bits."""
    for h1, h2 in itertools.product((0.0, 1.0), repeat=2):
        q1, q2 = sigmoid(A1 * v), sigmoid(A2 * v + B12 * h1)
        p1, p2 = np.where(h1 > 0, q1, 1 - q1), np.where(h2 > 0, q2, 1 - q2)
        slope = A1 * (h1 - q1), A2 * (h2 - q2)
        curvature = -(A1**2) * q1 * (1 - q1), -(A2**2) * q2 * (1 - q2)
        energy = -0.5 * v**2 + h1 * (W1 * v + C) + W2 * v * h2 + K12 * h1 * h2
        yield p1 * p2, (np.log(p1), np.log(p2)), slope, curvature, energy, -v + W1 * h1 + W2 * h2


def values(v):
    """The same of one site with three values."""
    logits = v[:, None] * SLOPES
    q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mean = q @ SLOPES
    for k in range(3):
        variance = q @ SLOPES**2 - mean**2
        yield q[:, k], (np.log(q[:, k]),), (SLOPES[k] - mean,), (-variance,), -0.5 * v**2 + TABLE[k] * v, -v + TABLE[k]


def expected(x, configurations, scale, masks):
    """J of exact score matching under average="loss" and "score", and G, where log q's sites have these masks."""
    loss = score = curvature = inner = 0.0
    for q, log_q, slope, curve, log_p, model_slope in configurations(x):
        s = scale * (model_slope - sum(m * d for m, d in zip(masks, slope, strict=False)))
        ds = scale * (-1.0 - sum(m * d for m, d in zip(masks, curve, strict=False)))
        loss, score, curvature = loss + q * (0.5 * s**2 + ds), score + q * s, curvature + q * ds
        inner = inner + q * scale * (sum(m * d for m, d in zip(masks, log_q, strict=False)) - log_p)
    return loss.mean(), (0.5 * score**2 + curvature).mean(), inner.mean()


def two_bits(host, scale=1.0, mask=None, masked_by="handler", beside=False, size=None):
    """Model and guide. ``mask`` is that of h₁'s density; ``size`` rows of a subsampling plate."""
    enumerated = {"enumerate": "parallel"}

    def h1(fn):
        if mask is None:
            return host.ppl.sample("h1", fn, infer=enumerated)
        if masked_by == "distribution":
            return host.ppl.sample("h1", fn.mask(host.array(mask)), infer=enumerated)
        with host.mask(mask=host.array(mask)):
            return host.ppl.sample("h1", fn, infer=enumerated)

    def model(x):
        w = host.param("w", W1)
        with host.scale(scale=scale), host.ppl.plate("data", len(x), subsample_size=size) as rows:
            v = host.flat("v", x if size is None else x[rows])
            h1 = host.ppl.sample("h1", host.dist.Bernoulli(host.array(0.5)).mask(False))
            h2 = host.ppl.sample("h2", host.dist.Bernoulli(host.array(0.5)).mask(False))
            if beside:
                host.ppl.sample("z", host.dist.Normal(2.0 * v, 1.0))
            host.ppl.factor("energy", -0.5 * v**2 + h1 * (w * v + C) + W2 * v * h2 + K12 * h1 * h2)

    def guide(x):
        a = host.param("a", A1)
        with host.scale(scale=scale), host.ppl.plate("data", len(x), subsample_size=size) as rows:
            v = x if size is None else x[rows]
            first = h1(host.dist.Bernoulli(logits=a * v))
            host.ppl.sample("h2", host.dist.Bernoulli(logits=A2 * v + B12 * first), infer=enumerated)
            if beside:
                host.ppl.sample("z", host.dist.Normal(2.0 * v, 1.0))

    return model, guide


def one_of_three(host, scale=1.0):
    def model(x):
        w = host.param("w", TABLE)
        with host.scale(scale=scale), host.ppl.plate("data", len(x)):
            v = host.flat("v", x)
            h = host.ppl.sample("h", host.categorical(logits=host.array(np.zeros(3))).mask(False))
            host.ppl.factor("energy", -0.5 * v**2 + w[h] * v)

    def guide(x):
        a = host.param("a", SLOPES)
        with host.scale(scale=scale), host.ppl.plate("data", len(x)):
            host.ppl.sample("h", host.categorical(logits=x[:, None] * a), infer={"enumerate": "parallel"})

    return model, guide


ROWS = np.array([True, False, True])
PROGRAMS = {
    "rows of a subsampling plate": (two_bits, {"scale": 0.5, "size": 3}, bits, (1, 1)),
    "masked by a handler": (two_bits, {"mask": ROWS}, bits, (ROWS, 1)),
    "masked distribution": (two_bits, {"mask": ROWS, "masked_by": "distribution", "scale": 3.0}, bits, (ROWS, 1)),
    "a sampled site beside": (two_bits, {"scale": 0.5, "beside": True}, bits, (1, 1)),
    "three values": (one_of_three, {"scale": 0.5}, values, (1,)),
}


@pytest.mark.filterwarnings("ignore:A scale of")  # it covers the visible site as well, and is meant here
@BOTH
@pytest.mark.parametrize("name", PROGRAMS)
def test_summed_out_configurations_are_weighed_by_q_under_scales_and_masks(backend, name):
    """The weights add up to 1 whatever the user's scale is: in the loss, in the score and in the inner loss."""
    host = Host(backend)
    make, settings, configurations, masks = PROGRAMS[name]
    model, guide = make(host, **settings)
    # N/B is no part of q; all rows of the plate are the same one, so that it does not matter which are drawn
    x = np.full(6, X[1]) if "size" in settings else X
    exact = expected(x, configurations, settings.get("scale", 1.0), masks)
    losses = [host.bism.ScoreMatching(), host.bism.ScoreMatching(average="score")]
    elbo = host.infer.TraceEnum_ELBO()
    found = host.look(model, guide, x, losses, inner_loss=elbo, hypergradient=host.bism.Detached())
    np.testing.assert_allclose(found, exact, rtol=1e-9)


# The Fisher divergence at fixed values of the other latents

A, B, S1, S2, G, NUM = 0.5, 1.5, 0.8, 0.6, 0.7, 20_000


def dependent(host, constrained):
    """h₂ | h₁ ~ N(b h₁, s₂²), h₁ | v ~ N(a v, s₁²) or its exponential; the model couples them otherwise."""
    first = host.dist.LogNormal if constrained else host.dist.Normal

    def model(x):
        g = host.param("g", G)
        with host.ppl.plate("data", len(x)):
            v = host.flat("v", x)
            h1 = host.ppl.sample("h1", first(host.array(0.0), 1.0))
            h2 = host.ppl.sample("h2", host.dist.Normal(host.array(0.0), 1.0))
            host.ppl.factor("energy", -0.5 * v**2 + g * v * h2 - 0.5 * (h1 - h2) ** 2)

    def guide(x):
        a, b = host.param("a", A), host.param("b", B)
        with host.ppl.plate("data", len(x)):
            u = host.ppl.sample("h1", first(a * x, S1))
            host.ppl.sample("h2", host.dist.Normal(b * u, S2))

    return model, guide


def integrand(v, a, b, noise, constrained):
    """½‖∇_h log q - ∇_h log p̃‖², h₂ fixed in the derivative by h₁ and the other way round."""
    u = a * v + S1 * noise[0]
    h1 = np.exp(u) if constrained else u
    h2 = b * h1 + S2 * noise[1]
    prior = (-1 - u) / h1 if constrained else -h1
    own = (-1 - (u - a * v) / S1**2) / h1 if constrained else -(h1 - a * v) / S1**2
    first = own + b * (h2 - b * h1) / S2**2 - (prior - (h1 - h2))
    second = -(h2 - b * h1) / S2**2 - (-h2 + G * v + (h1 - h2))
    return 0.5 * (first**2 + second**2)


@BOTH
@pytest.mark.parametrize("constrained", [False, True], ids=["normal", "lognormal"])
def test_fisher_divergence_holds_the_other_latents_fixed(backend, constrained):
    """Its value and its slopes in φ, to 5 standard errors, where a later draw is computed from an earlier one."""
    host, v = Host(backend), 0.4
    model, guide = dependent(host, constrained)
    x = host.array(np.full(NUM, v))
    noise = np.random.default_rng(0).normal(size=(2, 400_000))
    d = 1e-4
    values = [
        integrand(v, A, B, noise, constrained),
        (integrand(v, A + d, B, noise, constrained) - integrand(v, A - d, B, noise, constrained)) / (2 * d),
        (integrand(v, A, B + d, noise, constrained) - integrand(v, A, B - d, noise, constrained)) / (2 * d),
    ]
    inner = host.bism.FisherDivergence()
    trained = host.bism.BiSM(model, guide, host.adam(), host.bism.DenoisingScoreMatching(1.0), inner_loss=inner)
    if host.is_pyro:
        pair, leaves, spec = trained._prepare((x,), {})
        batch = pair.batch(leaves, spec)
        value = inner(pair, batch, batch.v)
        found = [value.detach(), *torch.autograd.grad(value, [pyro.param("a"), pyro.param("b")])]
    else:
        state = trained.init(jax.random.key(0), x)
        leaves, spec = trained._checked((x,), {})
        pair = trained.pair(leaves, spec)
        theta, phi = trained._unpack(pair, state)
        batch = pair.batch(jax.random.key(0), leaves, spec)
        value, slopes = jax.value_and_grad(
            lambda phi: inner(jax.random.key(1), pair, pair.params(theta, phi, None), batch, batch.v)
        )(phi)
        found = [value, slopes["a"], slopes["b"]]
    for got, wanted in zip(found, values, strict=True):
        error = wanted.std() * (1 / NUM + 1 / noise.shape[1]) ** 0.5
        assert abs(float(got) - wanted.mean()) < 5 * error


# Averages over draws of h


def pairwise(scores, scale, shift):
    """½ mean over k ≠ l of (s_k/scale + shift)·(s_l/scale + shift), one by one."""
    residuals = scores / scale + shift
    num = len(residuals)
    products = [(residuals[k] * residuals[j]).sum(-1) for k in range(num) for j in range(num) if k != j]
    return 0.5 * np.mean(products, 0)


@BOTH
def test_losses_of_several_scores_multiply_different_ones(backend):
    """Squares become products of two draws' residuals; the trace, linear in the score, is that of the mean."""
    host = Host(backend)
    rng = np.random.default_rng(0)
    weights, v, noise = rng.normal(size=(4, 3, 3)), rng.normal(size=(5, 3)), rng.normal(size=(5, 3))
    sigma, projections = rng.uniform(0.5, 1.0, size=(5, 1)), rng.normal(size=(2, 5, 3))

    def score(u):
        return host.np.stack([host.np.tanh(u @ host.array(w)) for w in weights])

    def by_hand(u):
        return np.stack([np.tanh(u @ w) for w in weights])

    slopes = 1 - by_hand(v) ** 2  # (L, n, D): of output j, which all inputs i reach by w_ij
    jacobian = np.einsum("lnj,lij->nij", slopes, weights) / 4
    trace = np.einsum("nii->n", jacobian)
    quadratic = np.einsum("mni,nij,mnj->n", projections, jacobian, projections) / 2
    losses, array = host.bism.losses, host.array
    cases = {
        "exact": ((), {}, pairwise(by_hand(v), 1, 0) + trace),
        "sliced": ((array(projections),), {}, pairwise(by_hand(v), 1, 0) + quadratic),
        "denoising": ((array(noise),), {"sigma": 0.3}, pairwise(by_hand(v + 0.3 * noise), 1, noise / 0.3)),
        "multiscale_denoising": (
            (array(noise), array(sigma)),
            {"sigma0": 0.7},
            pairwise(by_hand(v + sigma * noise), sigma, noise / 0.49),
        ),
    }
    for name, (arrays, settings, wanted) in cases.items():
        found = getattr(losses, name)(score, array(v), *arrays, **settings)
        np.testing.assert_allclose(np.asarray(found.detach() if host.is_pyro else found), wanted, rtol=1e-10)


M, C0, W0, SD = np.array([[0.5], [-0.3]]), 0.2, np.array([0.8, 0.4]), 0.9


def amortised(host, m=M[:, 0], c=C0, sd=SD):
    """log p̃ = -½‖v‖² + h wᵀv - ½h², q(h|v) = N(mᵀv + c, s²): not the posterior unless m = w, c = 0, s = 1."""

    def model(x):
        w = host.param("w", W0)
        with host.ppl.plate("data", len(x)):
            v = host.ppl.sample("v", host.dist.Normal(0.0, 1.0).expand((2,)).to_event(1).mask(False), obs=x)
            h = host.ppl.sample("h", host.dist.Normal(host.array(0.0), 1.0).mask(False))
            host.ppl.factor("energy", -0.5 * (v**2).sum(-1) + h * (v @ w) - 0.5 * h**2)

    def guide(x):
        slope = host.param("m", m)
        with host.ppl.plate("data", len(x)):
            host.ppl.sample("h", host.dist.Normal(x @ slope + c, sd))

    return model, guide


@BOTH
def test_at_the_posterior_the_averages_agree_in_value_and_in_the_exact_hypergradient(backend):
    """There s does not depend on h: the scores of all draws are one, and the derivative is their mean's."""
    host = Host(backend)
    model, guide = amortised(host, W0, 0.0, 1.0)
    x = host.array(np.random.default_rng(0).normal(size=(5, 2)))
    found = [host.posterior(model, guide, x, host.bism.ScoreMatching(3, name)) for name in ("score", "unbiased")]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-10)


@BOTH
def test_the_unbiased_average_is_unbiased_and_the_others_keep_what_their_docstrings_say(backend):
    """Var/2 under average="loss", Var/(2L) under "score", nothing under "unbiased": to 5 standard errors."""
    host, num, sigma, rows, times = Host(backend), 3, 0.7, 400, 30
    model, guide = amortised(host)
    v, m = np.array([0.4, -1.1]), M[:, 0]
    # s(v, h) = -v + h w - m (h - mᵀv - c)/s², so that s̄ = -B v + c w
    slope, mean = np.eye(2) - np.outer(W0, m), C0 * W0
    deviation = W0 - m / SD**2
    bias = 0.5 * SD**2 * deviation @ deviation
    at_v = 0.5 * ((mean - slope @ v) ** 2).sum()
    exact = at_v + np.trace(-np.eye(2) + np.outer(m, m) / SD**2)
    noise = np.eye(2) / sigma - sigma * slope
    denoising = at_v + 0.5 * (noise**2).sum()
    b = host.bism
    cases = [
        (b.ScoreMatching(num, "unbiased"), exact),
        (b.DenoisingScoreMatching(sigma, num, "unbiased"), denoising),
        (b.DenoisingScoreMatching(sigma, num, "score"), denoising + bias / num),
        (b.DenoisingScoreMatching(sigma, num, "loss"), denoising + bias),
    ]
    assert bias > 0.05
    for loss, wanted in cases:
        found = host.outer_losses(model, guide, np.tile(v, (rows, 1)), loss, times)
        assert abs(found.mean() - wanted) < 5 * found.std(ddof=1) / times**0.5, loss
        assert found.std() / times**0.5 < bias / 10  # the test would see what is left


@BOTH
def test_settings_that_can_not_be_unbiased_are_refused(backend):
    b = Host(backend).bism
    with pytest.raises(ValueError, match="num_particles must be at least 2"):
        b.DenoisingScoreMatching(0.1, average="unbiased")
    with pytest.raises(ValueError, match="average must be 'loss', 'score' or 'unbiased'"):
        b.ScoreMatching(2, average="mean")
    with pytest.raises(ValueError, match="Take average='score'"):
        b.Covariance().check(b.DenoisingScoreMatching(0.1, 2, "unbiased"), None)


# The denoising losses' constant


@BOTH
def test_the_loss_without_its_constant_is_reported(backend):
    """On data of one point the model's optimum is N(x, σ²), with -½ E‖∇ log p_σ‖² = -D/(2σ²)."""
    host = Host(backend)
    b, sigma, rows = host.bism, 0.5, 20_000

    def model(x):
        precision = host.param("precision", 1 / sigma**2)
        with host.ppl.plate("data", len(x)):
            v = host.ppl.sample("v", host.dist.Normal(0.0, 1.0).expand((2,)).to_event(1).mask(False), obs=x)
            host.ppl.factor("energy", -0.5 * precision * (v**2).sum(-1))

    x = host.array(np.zeros((rows, 2)))
    trained = b.BiSM(model, lambda x: None, host.adam(), b.DenoisingScoreMatching(sigma), hypergradient=b.Detached())
    if host.is_pyro:
        trained.step(x)
        info = trained.info
    else:
        info = trained.update(trained.init(jax.random.key(0), x), x)[0].info
    assert float(info.varying_loss) == pytest.approx(float(info.outer_loss) - 4.0)
    assert abs(float(info.varying_loss) + 4.0) < 1e-6  # there s + ε/σ = 0
    assert b.DenoisingScoreMatching(0.1).constant(3) == pytest.approx(150.0)
    assert b.MultiscaleDenoisingScoreMatching(0.1, 1.0, 0.1).constant(3) == pytest.approx(3 / (2 * 0.1**4))
    assert b.ScoreMatching().constant(3) == b.SlicedScoreMatching().constant(3) == 0.0


# Schedules move both levels


def rates(optim):
    return {kept.optimizer.param_groups[0]["lr"] for kept in optim.optim_objs.values()}


@pytest.mark.parametrize("kind", ["exponential", "plateau"])
def test_one_step_of_the_scheduler_moves_both_rates(kind):
    settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}}
    if kind == "exponential":
        optim, metric = pyro.optim.ExponentialLR({**settings, "gamma": 0.5}), ()
    else:
        optim, metric = pyro.optim.ReduceLROnPlateau({**settings, "factor": 0.5, "patience": 0}), (1.0,)
    model, guide = amortised(Host("pyro"))
    bism = pyro_bism.BiSM(model, guide, optim, pyro_bism.DenoisingScoreMatching(0.5), num_inner_steps=1)
    x = torch.tensor(np.ones((3, 2)))
    for _ in range(3):
        bism.step(x)
        optim.step(*metric)
        bism.inner_optim.step(*metric)  # it follows: a step of its own is none
    rate = 1e-2 * 0.5 ** (3 if kind == "exponential" else 2)
    assert rates(optim) == rates(bism.inner_optim) == {rate}
    other = copy.deepcopy(optim)
    other.step(*metric)
    assert rates(other) == {rate / 2}
    assert rates(optim) == rates(bism.inner_optim) == {rate}
    own = pyro.optim.ExponentialLR({**settings, "gamma": 0.5})
    mine = pyro_bism.BiSM(model, guide, optim, pyro_bism.DenoisingScoreMatching(0.5), inner_optim=own)
    mine.step(x)
    optim.step(*metric)
    assert rates(own) == {1e-2}  # the user's own is stepped by the user


def test_optax_schedules_keep_pace_at_the_inner_level():
    """K inner steps have the rate of their one outer step, whatever the optimiser does with its own step count."""
    schedule = optax.piecewise_constant_schedule(0.1, {2: 0.1, 3: 5.0})
    kinds = {
        "adam": optax.adam,
        "injected": lambda s: optax.inject_hyperparams(optax.adam)(learning_rate=s),
        "accumulated": lambda s: optax.MultiSteps(optax.adam(s), 2).gradient_transformation(),
    }
    for kind, make in kinds.items():
        every = 2 if kind == "accumulated" else 1  # such an optimiser takes a step in two, at both levels
        slow = as_optim(make(lambda i: schedule(i // 3)), "optim")
        ours = inner_copy(as_optim(make(schedule), "optim"), 3, "inner_optim")
        params = {"a": jnp.array([1.0, -2.0])}
        states = [optim.init(params) for optim in (slow, ours)]
        for t in range(12 * every):
            gradient = {"a": jnp.array([0.3, 1.0 + 0.1 * t])}
            states = [o.update(gradient, s, value=0.0) for o, s in zip((slow, ours), states, strict=True)]
            found = [o.get_params(s)["a"] for o, s in zip((slow, ours), states, strict=True)]
            np.testing.assert_allclose(*found, rtol=1e-12)


def test_a_schedule_that_can_not_keep_pace_is_said():
    model, guide = amortised(Host("numpyro"))
    loss = numpyro_bism.DenoisingScoreMatching(0.5)
    schedule = jax.example_libraries.optimizers.exponential_decay(1e-3, 10, 0.5)
    for scheduled in (
        numpyro.optim.Adam(schedule),
        numpyro.optim.ClippedAdam(lambda i: 1e-3 / (i + 1)),
        jax.example_libraries.optimizers.sgd(schedule),
    ):
        with pytest.warns(UserWarning, match="5 times as fast. Pass inner_optim="):
            numpyro_bism.BiSM(model, guide, scheduled, loss)
        numpyro_bism.BiSM(model, guide, scheduled, loss, num_inner_steps=1)
        numpyro_bism.BiSM(model, guide, scheduled, loss, inner_optim=numpyro.optim.Adam(1e-3))
    for constant in (numpyro.optim.Adam(1e-3), numpyro.optim.Momentum(1e-3, 0.9), numpyro.optim.RMSProp(1e-3)):
        numpyro_bism.BiSM(model, guide, constant, loss)


# Checkpoints


def test_the_random_state_is_back_when_load_returns(tmp_path):
    """A batch drawn between load and the first step is the one that would have been, and so is all that follows."""
    model, guide = amortised(Host("pyro"))
    data = torch.randn(20, 2)

    def fresh():
        pyro.clear_param_store()
        optim = pyro.optim.Adam({"lr": 1e-2})
        return pyro_bism.BiSM(model, guide, optim, pyro_bism.DenoisingScoreMatching(0.5), num_inner_steps=2)

    def advance(bism):
        lines = []
        for _ in range(2):
            rows = torch.randint(20, (5,))
            lines += [rows.tolist(), bism.step(data[rows]), torch.rand(()).item()]
        return [*lines, {name: value.tolist() for name, value in pyro.get_param_store().items()}]

    first = fresh()
    first.step(data[:5])
    first.save(tmp_path / "a")
    expected = advance(first)
    torch.manual_seed(5)
    first.load(tmp_path / "a")  # where it all exists
    assert advance(first) == expected
    torch.manual_seed(5)
    second = fresh()
    second.load(tmp_path / "a")  # where nothing has run
    second.save(tmp_path / "b")
    assert advance(second) == expected
    torch.manual_seed(5)
    pyro.clear_param_store()
    second.load(tmp_path / "b")  # where all that ran is gone; and the copy of a state that nothing had used yet
    assert advance(second) == expected


def test_a_numpyro_state_continues_in_a_fresh_bism():
    """All that a step draws comes from the state: nothing has to run before it is used."""
    model, guide = amortised(Host("numpyro"))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))

    def fresh():
        loss = numpyro_bism.DenoisingScoreMatching(0.5)
        return numpyro_bism.BiSM(model, guide, optax.adam(1e-2), loss, num_inner_steps=2)

    first = fresh()
    state, _ = jax.jit(first.update)(first.init(jax.random.key(0), x), x)
    again = jax.tree.map(jnp.asarray, pickle.loads(pickle.dumps(jax.device_get(state))))
    expected, found = first.update(state, x), fresh().update(again, x)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert (a == b).all()


# Many units in one event and one factor, summed out by their mean

D, H = 2, 3
RNG = np.random.default_rng(3)
W, CH, U, DU = (RNG.normal(size=shape) for shape in ((D, H), H, (D, H), H))
K = np.array([[0.3, -0.6, 0.2], [0.1, 0.5, -0.4]])  # of v, for a one-hot latent


def one_factor(host, onehot=False, extra=lambda h: 0.0, mixed=False):
    """log p̃ = -½‖v‖² + (vᵀW + c)·h, all units in one factor; the guide's units in one event."""

    def site(logits):
        if not onehot:
            return host.dist.Bernoulli(logits=logits).to_event(1)
        fn = host.dist.OneHotCategorical if host.is_pyro else host.dist.Multinomial
        return fn(logits=logits).to_event(1) if host.is_pyro else fn(total_count=1, logits=logits).to_event(1)

    def shaped(x):
        return x[..., None, :] if onehot else x

    def flatten(h):
        return h[..., 0, :] if onehot else h

    def model(x):
        w, c = host.param("w", W), host.param("c", CH)
        with host.ppl.plate("data", len(x)):
            v = host.ppl.sample("v", host.dist.Normal(0.0, 1.0).expand((D,)).to_event(1).mask(False), obs=x)
            h = flatten(host.ppl.sample("h", site(shaped(host.np.zeros((len(x), H)))).mask(False)))
            z = host.ppl.sample("z", host.dist.Normal(v[:, 0], 1.0)) if mixed else 0.0
            host.ppl.factor("energy", -0.5 * (v**2).sum(-1) + ((v @ w + c) * h).sum(-1) + extra(h) + 0.0 * z)

    def guide(x):
        u, d = host.param("u", U), host.param("d", DU)
        with host.ppl.plate("data", len(x)):
            h = host.ppl.sample("h", site(shaped(x @ u + d)), infer={"enumerate": "parallel"})
            if mixed:
                host.ppl.sample("z", host.dist.Normal(x[:, 0] + h[..., 0], 1.0))

    return model, guide


def by_enumeration(v, onehot):
    """J under average="score" of exact score matching, and G: over all configurations of the units."""
    hs = np.eye(H) if onehot else np.array(list(itertools.product((0.0, 1.0), repeat=H)))
    logits = v @ U + DU
    if onehot:
        log_q = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))) @ hs.T
        mean = np.exp(log_q) @ hs
        covariance = mean[:, :, None] * (np.eye(H) - mean[:, None])
        curve = -np.einsum("dh,nhk,dk->n", U, covariance, U)
    else:
        log_q = logits @ hs.T - np.log1p(np.exp(logits)).sum(-1, keepdims=True)
        mean = sigmoid(logits)
        curve = -np.einsum("dh,nh,dh->n", U, mean * (1 - mean), U)
    q = np.exp(log_q)
    np.testing.assert_allclose(q.sum(-1), 1.0)
    score = (q[:, :, None] * (-v[:, None] + hs @ W.T)).sum(1)
    log_p = -0.5 * (v**2).sum(-1, keepdims=True) + (v @ W + CH) @ hs.T
    return (0.5 * (score**2).sum(-1) - D - curve).mean(), (q * (log_q - log_p)).sum(-1).mean()


@BOTH
@pytest.mark.parametrize("onehot", [False, True], ids=["bits", "onehot"])
def test_units_in_one_event_and_one_factor_are_summed_out_exactly(backend, onehot):
    host = Host(backend)
    v = np.random.default_rng(0).normal(size=(4, D))
    model, guide = one_factor(host, onehot)
    elbo = host.infer.TraceEnum_ELBO() if onehot else None
    found = host.look(model, guide, v, [host.bism.ScoreMatching(average="score")], inner_loss=elbo)
    np.testing.assert_allclose(found, by_enumeration(v, onehot), rtol=1e-9)


@BOTH
def test_the_exact_hypergradient_is_that_of_the_marginal_where_units_are_summed_by_their_mean(backend):
    """At the posterior (u = w, d = c): a step of SGD goes along the gradient of J of the marginal's score."""
    host, rate = Host(backend), 1e-3
    v = np.random.default_rng(0).normal(size=(4, D))
    model, guide = one_factor(host)

    def marginal(w, c):
        p = sigmoid(v @ w + c)
        score = -v + p @ w.T
        return (0.5 * (score**2).sum(-1) - D + np.einsum("dh,nh,dh->n", w, p * (1 - p), w)).mean()

    eps = 1e-5
    steps = eps * np.eye(D * H).reshape(D, H, D, H)
    slopes = [[(marginal(W + e, CH) - marginal(W - e, CH)) / (2 * eps) for e in row] for row in steps]
    b = host.bism
    settings = {"num_inner_steps": 0, "hypergradient": b.Exact()}
    if host.is_pyro:
        x = torch.tensor(v)
        trained = b.BiSM(model, guide, pyro.optim.SGD({"lr": rate}), b.ScoreMatching(average="score"), **settings)
        trained.pair(x)
        with torch.no_grad():
            pyro.param("u").copy_(torch.tensor(W))
            pyro.param("d").copy_(torch.tensor(CH))
        trained.step(x)
        moved = pyro.param("w").detach().numpy()
    else:
        trained = b.BiSM(model, guide, numpyro.optim.SGD(rate), b.ScoreMatching(average="score"), **settings)
        start = {"u": jnp.asarray(W), "d": jnp.asarray(CH)}
        result = trained.run(jax.random.key(0), 1, jnp.asarray(v), progress_bar=False, init_params=start)
        moved = np.asarray(result.params["w"])
    np.testing.assert_allclose((W - moved) / rate, slopes, rtol=1e-5, atol=1e-8)


@BOTH
def test_what_is_not_proved_affine_is_refused(backend):
    host = Host(backend)
    b, x = host.bism, host.array(np.ones((4, D)))

    def begin(model, guide, loss, **settings):
        trained = b.BiSM(model, guide, host.adam(), loss, **settings)
        return trained.pair(x) if host.is_pyro else trained.init(jax.random.key(0), x)

    score = b.DenoisingScoreMatching(0.5, average="score")
    for extra in (lambda h: h[..., 0] * h[..., 1], lambda h: host.np.exp(h).sum(-1), lambda h: (h**2).sum(-1)):
        with pytest.raises(ValueError, match=r"'h' is marked for enumeration.* not proved to be affine.* plate"):
            begin(*one_factor(host, extra=extra), score)
    with pytest.raises(ValueError, match="the guide reads its value again"):
        begin(*one_factor(host, mixed=True), score)
    with pytest.raises(ValueError, match="average='score'"):
        begin(*one_factor(host), b.DenoisingScoreMatching(0.5))
    with pytest.raises(ValueError, match="Use inner_loss=Trace_ELBO"):
        begin(*one_factor(host), score, inner_loss=b.FisherDivergence())


def test_jit_sums_units_out_by_their_mean_too():
    """The captured step is the eager one."""
    model, guide = one_factor(Host("pyro"))
    x = torch.randn(4, D)
    moved = []
    for jit in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(1)
        loss = pyro_bism.DenoisingScoreMatching(0.5, average="score")
        bism = pyro_bism.BiSM(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss, num_inner_steps=1, jit=jit)
        bism.pair(x)
        torch.manual_seed(2)
        bism.step(x)
        moved.append({name: value.detach() for name, value in pyro.get_param_store().items()})
    for name, value in moved[0].items():
        torch.testing.assert_close(value, moved[1][name], rtol=1e-9, atol=1e-12)


# README's programs


@BOTH
def test_the_readmes_programs_run_as_they_stand(backend):
    """On few data and for two steps; ``to_arviz`` draws the summed-out bits."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    (program,) = [
        block.split("```")[0] for block in text.split("```python\n") if f"from {backend}_bism import (" in block
    ]
    host = Host(backend)
    names = {"D": 3, "H": 2, "x": host.array(np.random.default_rng(0).normal(size=(12, 3)))}
    exec(program.replace("10_000", "2"), names)
    bits = names["data"].posterior["h"].values
    assert bits.shape[2:] == (10, 2) and set(np.unique(bits)) <= {0.0, 1.0}
