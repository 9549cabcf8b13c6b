"""Exact answers that both packages are tested against: NumPy in float64, neither torch nor jax.

Two models whose marginal, posterior and normaliser are known: the linear-Gaussian model, where
everything is a closed form, and the Gaussian-Bernoulli restricted Boltzmann machine, where the
hidden units are enumerated. ``test_oracles.py`` checks every function here against quadrature,
sampling or finite differences.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.linalg import inv, slogdet

Array = np.ndarray

LOG_2PI = np.log(2 * np.pi)


def central_difference(at: Callable[[float], Any], step: float) -> Any:
    """The derivative of ``at`` at 0, of fourth order in ``step``."""
    return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)


def _sym(x: Array) -> Array:
    return 0.5 * (x + x.T)


def _logdet(x: Array) -> float:
    sign, value = slogdet(x)
    assert sign > 0, "not positive definite"
    return float(value)


def dsm_residual(score: Array, noise: Array, sigma: float) -> Array:
    """score(v + σ·ε) + ε/σ, shape (n, d), given the score at the perturbed data."""
    return score + noise / sigma


class Moments(NamedTuple):
    """Mean and covariance of the data: all that a quadratic loss sees of them.

    :ivar mean: E v, shape (d,).
    :ivar cov: E (v - E v)(v - E v)ᵀ, shape (d, d).
    """

    mean: Array
    cov: Array

    @classmethod
    def of(cls, v: Array) -> "Moments":
        """Of finite data, shape (n, d): divided by n, so that means over the data are exact."""
        return cls(v.mean(0), np.cov(v.T, bias=True).reshape(v.shape[1], v.shape[1]))

    def perturbed(self, sigma: float) -> "Moments":
        """Of v + σ·ε."""
        return Moments(self.mean, self.cov + sigma**2 * np.eye(len(self.mean)))


class GaussianGuide(NamedTuple):
    """q(h|v) = N(h; M v + m, S).

    :ivar M: shape (k, d).
    :ivar m: shape (k,).
    :ivar S: covariance, shape (k, k); diagonal for a mean-field guide.
    """

    M: Array
    m: Array
    S: Array

    def mean(self, v: Array) -> Array:
        """M v + m, shape (n, k)."""
        return v @ self.M.T + self.m

    def log_prob(self, h: Array, v: Array) -> Array:
        """log q(h|v), shape (n,)."""
        e = h - self.mean(v)
        return -0.5 * (np.einsum("ni,ij,nj->n", e, inv(self.S), e) + _logdet(self.S) + len(self.m) * LOG_2PI)


@dataclasses.dataclass(frozen=True)
class LinearGaussian:
    """Linear-Gaussian latent-variable model, d visible and k hidden units.

    E(v, h) = ½ vᵀA v - vᵀW h + ½ hᵀB h - bᵀv - cᵀh.

    A and B enter through their symmetric parts (as in the energy); gradients are of this energy in
    each entry of A and B, so they are symmetric too.

    :ivar A: shape (d, d), symmetric positive definite.
    :ivar B: shape (k, k), symmetric positive definite.
    :ivar W: shape (d, k), such that A - W B⁻¹ Wᵀ is positive definite.
    :ivar b: shape (d,).
    :ivar c: shape (k,).
    """

    A: Array
    B: Array
    W: Array
    b: Array
    c: Array

    def __post_init__(self):
        object.__setattr__(self, "A", _sym(self.A))
        object.__setattr__(self, "B", _sym(self.B))

    @classmethod
    def random(cls, rng: np.random.Generator, d: int, k: int) -> "LinearGaussian":
        """A well-conditioned model: the joint precision has its eigenvalues above ½."""
        x = rng.normal(size=(d + k, d + k)) / np.sqrt(d + k)
        precision = x @ x.T + 0.5 * np.eye(d + k)
        return cls(
            A=precision[:d, :d],
            B=precision[d:, d:],
            W=-precision[:d, d:],
            b=rng.normal(size=d),
            c=rng.normal(size=k),
        )

    # The joint density

    def energy(self, v: Array, h: Array) -> Array:
        """E(v, h), shape (n,)."""
        return (
            0.5 * np.einsum("ni,ij,nj->n", v, self.A, v)
            - np.einsum("ni,ij,nj->n", v, self.W, h)
            + 0.5 * np.einsum("ni,ij,nj->n", h, self.B, h)
            - v @ self.b
            - h @ self.c
        )

    @property
    def joint_precision(self) -> Array:
        """[[A, -W], [-Wᵀ, B]], of (v, h)."""
        return np.block([[self.A, -self.W], [-self.W.T, self.B]])

    @property
    def joint_mean(self) -> Array:
        """P⁻¹ [b; c] with P the joint precision."""
        return inv(self.joint_precision) @ np.concatenate([self.b, self.c])

    @property
    def log_normalizer(self) -> float:
        """log Z = log ∫ exp(-E) dv dh = ½ (d + k) log 2π - ½ log det P + ½ [b; c]ᵀ P⁻¹ [b; c]."""
        linear = np.concatenate([self.b, self.c])
        return 0.5 * (len(linear) * LOG_2PI - _logdet(self.joint_precision) + linear @ self.joint_mean)

    # The marginal p(v) and the posterior p(h|v)

    @property
    def precision(self) -> Array:
        """Λ = A - W B⁻¹ Wᵀ, the precision of v."""
        return self.A - self.W @ inv(self.B) @ self.W.T

    @property
    def linear(self) -> Array:
        """η = b + W B⁻¹ c; the marginal score is η - Λ v."""
        return self.b + self.W @ inv(self.B) @ self.c

    @property
    def mean(self) -> Array:
        """E v = Λ⁻¹ η."""
        return inv(self.precision) @ self.linear

    @property
    def cov(self) -> Array:
        """Cov v = Λ⁻¹."""
        return inv(self.precision)

    @property
    def moments(self) -> Moments:
        """Mean and covariance of v."""
        return Moments(self.mean, self.cov)

    @property
    def posterior(self) -> GaussianGuide:
        """p(h|v) = N(h; B⁻¹(Wᵀv + c), B⁻¹)."""
        cov = inv(self.B)
        return GaussianGuide(cov @ self.W.T, cov @ self.c, cov)

    def free_energy(self, v: Array) -> Array:
        """F(v) = -log ∫ exp(-E(v, h)) dh, shape (n,).

        F = ½ vᵀA v - bᵀv - ½ (Wᵀv + c)ᵀ B⁻¹ (Wᵀv + c) - (k/2) log 2π + ½ log det B.
        """
        drive = v @ self.W + self.c
        return (
            0.5 * np.einsum("ni,ij,nj->n", v, self.A, v)
            - v @ self.b
            - 0.5 * np.einsum("ni,ij,nj->n", drive, inv(self.B), drive)
            - 0.5 * len(self.c) * LOG_2PI
            + 0.5 * _logdet(self.B)
        )

    def log_prob(self, v: Array) -> Array:
        """log p(v) = -F(v) - log Z, shape (n,)."""
        return -self.free_energy(v) - self.log_normalizer

    def score(self, v: Array) -> Array:
        """∇_v log p(v) = η - Λ v, shape (n, d)."""
        return self.linear - v @ self.precision.T

    def sample(self, rng: np.random.Generator, num_samples: int) -> tuple[Array, Array]:
        """Independent draws of (v, h) from the joint."""
        draws = rng.multivariate_normal(self.joint_mean, inv(self.joint_precision), num_samples)
        return draws[:, : len(self.b)], draws[:, len(self.b) :]

    # Inner losses

    def kl(self, guide: GaussianGuide, v: Array) -> Array:
        """KL(q(h|v) ‖ p(h|v)), shape (n,).

        ½ [tr(B S) - k - log det(B S) + δᵀB δ], with δ = M v + m - B⁻¹(Wᵀv + c).
        """
        gap = guide.mean(v) - self.posterior.mean(v)
        return 0.5 * (
            np.trace(self.B @ guide.S)
            - len(self.c)
            - _logdet(self.B)
            - _logdet(guide.S)
            + np.einsum("ni,ij,nj->n", gap, self.B, gap)
        )

    def negative_elbo(self, guide: GaussianGuide, v: Array) -> Array:
        """E_q [log q(h|v) - log p̃(v, h)] = KL + F(v), shape (n,)."""
        return self.kl(guide, v) + self.free_energy(v)

    def fisher(self, guide: GaussianGuide, v: Array) -> Array:
        """½ E_q ‖∇_h log q(h|v) - ∇_h log p̃(v, h)‖², shape (n,).

        With h = M v + m + e the difference is (B - S⁻¹) e + B δ, so this is
        ½ [tr((B - S⁻¹) S (B - S⁻¹)) + ‖B δ‖²].
        """
        gap = (guide.mean(v) - self.posterior.mean(v)) @ self.B
        excess = self.B - inv(guide.S)
        return 0.5 * (np.trace(excess @ guide.S @ excess) + (gap**2).sum(-1))

    def expected_kl(self, guide: GaussianGuide, moments: Moments) -> float:
        """E_v KL over v of the given moments (perturbed, where the loss perturbs)."""
        R = guide.M - self.posterior.M
        at_mean = self.kl(guide, moments.mean[None])[0]
        return float(at_mean + 0.5 * np.trace(R @ moments.cov @ R.T @ self.B))

    def expected_fisher(self, guide: GaussianGuide, moments: Moments) -> float:
        """E_v Fisher over v of the given moments (perturbed, where the loss perturbs)."""
        R = guide.M - self.posterior.M
        BR = self.B @ R
        at_mean = self.fisher(guide, moments.mean[None])[0]
        return float(at_mean + 0.5 * np.trace(BR @ moments.cov @ BR.T))

    # The fitted guide φ*(θ) and its derivative

    def optimal_guide(self, divergence: str = "kl", diagonal: bool = False) -> GaussianGuide:
        """φ*(θ) = argmin over (M, m, S) of the inner loss, whatever the data (of full rank).

        M* = B⁻¹Wᵀ and m* = B⁻¹c always. S* = B⁻¹ for a full covariance; for a diagonal one
        S*_ii = 1/B_ii ("kl") or 1/√(B²)_ii ("fisher").
        """
        exact = self.posterior
        if not diagonal:
            return exact
        if divergence == "kl":
            return exact._replace(S=np.diag(1 / np.diag(self.B)))
        if divergence == "fisher":
            return exact._replace(S=np.diag(1 / np.sqrt(np.diag(self.B @ self.B))))
        raise ValueError(f"divergence should be 'kl' or 'fisher', got {divergence!r}")

    def optimal_guide_tangent(
        self, change: "LinearGaussian", divergence: str = "kl", diagonal: bool = False
    ) -> GaussianGuide:
        """(dφ*/dθ) applied to a change of θ (a model that holds dA, dB, ...).

        dM = B⁻¹(dWᵀ - dB M), dm = B⁻¹(dc - dB m), dS = -B⁻¹ dB B⁻¹.
        Diagonal: dS_ii = -dB_ii/B_ii² ("kl"), -(B dB)_ii / (B²)_ii^{3/2} ("fisher").
        """
        fitted = self.optimal_guide(divergence, diagonal)
        cov = inv(self.B)
        if not diagonal:
            dS = -cov @ change.B @ cov
        elif divergence == "kl":
            dS = np.diag(-np.diag(change.B) / np.diag(self.B) ** 2)
        else:
            power = np.diag(self.B @ self.B) ** -1.5
            dS = np.diag(-np.diag(self.B @ change.B) * power)
        return GaussianGuide(cov @ (change.W.T - change.B @ fitted.M), cov @ (change.c - change.B @ fitted.m), dS)

    def pull_back(self, cotangent: GaussianGuide, divergence: str = "kl", diagonal: bool = False) -> "LinearGaussian":
        """(dφ*/dθ)ᵀ applied to a gradient in φ = (M, m, S): the adjoint of the tangent above."""
        fitted = self.optimal_guide(divergence, diagonal)
        cov = inv(self.B)
        if not diagonal:
            dB = -cov @ cotangent.S @ cov
        elif divergence == "kl":
            dB = np.diag(-np.diag(cotangent.S) / np.diag(self.B) ** 2)
        else:
            power = np.diag(self.B @ self.B) ** -1.5
            dB = -self.B * (np.diag(cotangent.S) * power)
        dM, dm = cov @ cotangent.M, cov @ cotangent.m
        return LinearGaussian(
            A=np.zeros_like(self.A),
            B=_sym(dB - dM @ fitted.M.T - np.outer(dm, fitted.m)),
            W=dM.T,
            b=np.zeros_like(self.b),
            c=dm,
        )

    # Outer losses of the exact marginal

    def dsm_loss(self, v: Array, noise: Array, sigma: float) -> Array:
        """½ ‖score(v + σε) + ε/σ‖² for given noise, shape (n,)   (Vincent 2011)."""
        return 0.5 * (dsm_residual(self.score(v + sigma * noise), noise, sigma) ** 2).sum(-1)

    def dsm_gradient(self, v: Array, noise: Array, sigma: float) -> "LinearGaussian":
        """Gradient of the mean of :meth:`dsm_loss` in θ.

        With residuals r: dJ/dη = mean r, dJ/dΛ = -mean r (v + σε)ᵀ.
        """
        perturbed = v + sigma * noise
        residual = dsm_residual(self.score(perturbed), noise, sigma)
        return self._from_marginal(-residual.T @ perturbed / len(v), residual.mean(0))

    def expected_dsm_loss(self, moments: Moments, sigma: float) -> float:
        """E over data of mean μ and covariance C, and noise, in closed form.

        ½ [‖η - Λμ‖² + tr(Λ C Λ) + ‖I/σ - σΛ‖²].
        """
        precision, offset = self.precision, self.linear - self.precision @ moments.mean
        spread = np.eye(len(self.b)) / sigma - sigma * precision
        return float(0.5 * (offset @ offset + np.trace(precision @ moments.cov @ precision)) + 0.5 * (spread**2).sum())

    def expected_dsm_gradient(self, moments: Moments, sigma: float) -> "LinearGaussian":
        """Its gradient in θ: dJ/dη = η - Λμ, dJ/dΛ = Λ(C + μμᵀ + σ²I) - ημᵀ - I."""
        return self._from_marginal(*_dsm_gradient_of_affine(self.precision, self.linear, moments, sigma))

    def sm_loss(self, v: Array) -> Array:
        """½ ‖score‖² + tr ∇_v score = ½ ‖η - Λv‖² - tr Λ, shape (n,)   (Hyvärinen 2005)."""
        return 0.5 * (self.score(v) ** 2).sum(-1) - np.trace(self.precision)

    def sm_gradient(self, v: Array) -> "LinearGaussian":
        """Gradient of the mean of :meth:`sm_loss` in θ: dJ/dη = mean s, dJ/dΛ = -mean s vᵀ - I."""
        score = self.score(v)
        return self._from_marginal(-score.T @ v / len(v) - np.eye(v.shape[1]), score.mean(0))

    def _from_marginal(self, d_precision: Array, d_linear: Array) -> "LinearGaussian":
        """Gradient in θ of a loss with the given gradients in Λ and η."""
        exact = self.posterior
        d_precision = _sym(d_precision)
        return LinearGaussian(
            A=d_precision,
            B=_sym(
                exact.M @ d_precision @ exact.M.T - np.outer(exact.M @ d_linear, exact.m),
            ),
            W=-2 * d_precision @ exact.M.T + np.outer(d_linear, exact.m),
            b=d_linear,
            c=exact.M @ d_linear,
        )

    # The bi-level outer loss

    def bilevel_score(self, guide: GaussianGuide, v: Array, h: Array) -> Array:
        """∇_v [log p̃(v, h) - log q(h|v)] at given h, shape (n, d).

        b - A v + W h - Mᵀ S⁻¹ (h - M v - m).
        """
        e = h - guide.mean(v)
        return self.b - v @ self.A + h @ self.W.T - e @ inv(guide.S) @ guide.M

    def expected_bilevel_loss(
        self, guide: GaussianGuide, moments: Moments, sigma: float, num_averaged: int = 1
    ) -> float:
        """J(θ, φ) = E ½ ‖(1/L) Σ_l bilevel_score(v + σε, h_l) + ε/σ‖² over data, noise and h_l ~ q.

        With T = A - W M, u = b + W m and K = W - MᵀS⁻¹ the score is u - T v + K e, e ~ N(0, S), and
        J = ½ [‖u - Tμ‖² + tr(T C Tᵀ) + ‖I/σ - σT‖² + tr(K S Kᵀ)/L].

        :param num_averaged: L; 1 for ``average="loss"`` with any number of particles.
        """
        T = self.A - self.W @ guide.M
        offset = self.b + self.W @ guide.m - T @ moments.mean
        K = self.W - guide.M.T @ inv(guide.S)
        spread = np.eye(len(self.b)) / sigma - sigma * T
        return float(
            0.5 * (offset @ offset + np.trace(T @ moments.cov @ T.T) + (spread**2).sum())
            + 0.5 * np.trace(K @ guide.S @ K.T) / num_averaged
        )

    def bilevel_gradients(
        self, guide: GaussianGuide, moments: Moments, sigma: float
    ) -> tuple["LinearGaussian", GaussianGuide]:
        """∂J/∂θ and ∂J/∂φ of :meth:`expected_bilevel_loss`, L = 1.

        B and c have no direct gradient: only the guide carries one to them.
        """
        M, m, S = guide
        K = self.W - M.T @ inv(S)
        dT, du = _dsm_gradient_of_affine(self.A - self.W @ M, self.b + self.W @ m, moments, sigma)
        theta = LinearGaussian(
            A=dT,
            B=np.zeros_like(self.B),
            W=np.outer(du, m) - dT @ M.T + K @ S,
            b=du,
            c=np.zeros_like(self.c),
        )
        phi = GaussianGuide(
            M=-self.W.T @ dT - K.T,
            m=self.W.T @ du,
            S=0.5 * K.T @ K + _sym(inv(S) @ M @ K),
        )
        return theta, phi

    def hypergradient(
        self, moments: Moments, sigma: float, divergence: str = "kl", diagonal: bool = False
    ) -> "LinearGaussian":
        """dJ(θ, φ*(θ))/dθ = ∂J/∂θ + (dφ*/dθ)ᵀ ∂J/∂φ.

        With a full covariance this is the exact gradient, :meth:`expected_dsm_gradient`.
        """
        direct, phi = self.bilevel_gradients(self.optimal_guide(divergence, diagonal), moments, sigma)
        through = self.pull_back(phi, divergence, diagonal)
        fields = [f.name for f in dataclasses.fields(self)]
        return LinearGaussian(**{f: getattr(direct, f) + getattr(through, f) for f in fields})


def _dsm_gradient_of_affine(T: Array, u: Array, moments: Moments, sigma: float):
    """Gradients in T and u of E ½ ‖u - T(v + σε) + ε/σ‖²."""
    mean = moments.mean
    second = moments.perturbed(sigma).cov + np.outer(mean, mean)
    return T @ second - np.outer(u, mean) - np.eye(len(u)), u - T @ mean


def dsm_optimum(moments: Moments, sigma: float) -> Moments:
    """The Gaussian that minimises the expected denoising loss: mean μ, covariance C + σ²I."""
    return moments.perturbed(sigma)


@dataclasses.dataclass(frozen=True)
class GaussianBernoulliRBM:
    """Gaussian-Bernoulli restricted Boltzmann machine, d visible and k hidden units.

    E(v, h) = ½ ‖(v - b)/s‖² - cᵀh - vᵀW h, so that E[v|h] = b + s² W h (the convention of Bao et
    al. 2020).

    :ivar W: shape (d, k).
    :ivar b: visible bias, shape (d,).
    :ivar c: hidden bias, shape (k,).
    :ivar s: standard deviation of v given h: a number or shape (d,).
    """

    W: Array
    b: Array
    c: Array
    s: Array | float

    def energy(self, v: Array, h: Array) -> Array:
        """E(v, h), shape (n,); h may be soft."""
        return 0.5 * (((v - self.b) / self.s) ** 2).sum(-1) - h @ self.c - np.einsum("...i,ij,...j->...", v, self.W, h)

    def free_energy(self, v: Array) -> Array:
        """F(v) = -log Σ_h exp(-E(v, h)), shape (n,).

        F = ½ ‖(v - b)/s‖² - Σ_j softplus(c_j + (Wᵀv)_j).
        """
        drive = self.c + v @ self.W
        return 0.5 * (((v - self.b) / self.s) ** 2).sum(-1) - np.logaddexp(0, drive).sum(-1)

    def posterior(self, v: Array) -> Array:
        """p(h_j = 1 | v) = sigmoid(c_j + (Wᵀv)_j), shape (n, k); units are independent given v."""
        return 0.5 * (1 + np.tanh(0.5 * (self.c + v @ self.W)))

    def conditional_mean(self, h: Array) -> Array:
        """E[v|h] = b + s² W h, shape (n, d)."""
        return self.b + (h @ self.W.T) * np.square(self.s)

    def score(self, v: Array) -> Array:
        """∇_v log p(v) = -(v - b)/s² + W p(h = 1|v), shape (n, d)."""
        return -(v - self.b) / np.square(self.s) + self.posterior(v) @ self.W.T

    def log_weight(self, h: Array) -> Array:
        """log ∫ exp(-E(v, h)) dv, shape (n,).

        cᵀh + bᵀW h + ½ ‖s ∘ W h‖² + Σ_i log s_i + (d/2) log 2π.
        """
        drive = h @ self.W.T
        volume = (np.log(self.s) + 0.5 * LOG_2PI) * np.ones(len(self.b))
        return h @ self.c + drive @ self.b + 0.5 * ((drive * self.s) ** 2).sum(-1) + volume.sum(-1)

    @property
    def log_normalizer(self) -> float:
        """log Z = log Σ_h exp(log_weight(h)), by enumeration."""
        chunks = [_logsumexp(self.log_weight(h)) for h in configurations(len(self.c))]
        return float(_logsumexp(np.array(chunks)))

    def log_prob(self, v: Array) -> Array:
        """log p(v) = -F(v) - log Z, shape (n,)."""
        return -self.free_energy(v) - self.log_normalizer

    def sample(self, rng: np.random.Generator, num_samples: int) -> tuple[Array, Array]:
        """Independent exact draws of (v, h): h by its enumerated marginal, v given h."""
        h = np.concatenate(list(configurations(len(self.c))))
        weight = self.log_weight(h)
        h = h[rng.choice(len(h), num_samples, p=np.exp(weight - _logsumexp(weight)))]
        noise = rng.normal(size=(num_samples, len(self.b)))
        return self.conditional_mean(h) + self.s * noise, h

    def dsm_loss(self, v: Array, noise: Array, sigma: float) -> Array:
        """½ ‖score(v + σε) + ε/σ‖² for given noise, shape (n,)   (Vincent 2011)."""
        return 0.5 * (dsm_residual(self.score(v + sigma * noise), noise, sigma) ** 2).sum(-1)

    def dsm_gradient(self, v: Array, noise: Array, sigma: float) -> "GaussianBernoulliRBM":
        """Gradient of the mean of :meth:`dsm_loss` in (W, b, c, s); that in s has the shape of s.

        With ṽ = v + σε, residual r, p = p(h = 1|ṽ) and t = p(1 - p) ∘ Wᵀr:
        dW = mean(r pᵀ + ṽ tᵀ), db = mean r/s², dc = mean t, ds = mean 2 r (ṽ - b)/s³.
        """
        perturbed = v + sigma * noise
        residual = dsm_residual(self.score(perturbed), noise, sigma)
        p = self.posterior(perturbed)
        t = p * (1 - p) * (residual @ self.W)
        ds = (2 * residual * (perturbed - self.b) / np.power(self.s, 3)).mean(0)
        return GaussianBernoulliRBM(
            W=(residual.T @ p + perturbed.T @ t) / len(v),
            b=(residual / np.square(self.s)).mean(0),
            c=t.mean(0),
            s=ds if np.ndim(self.s) else ds.sum(),
        )


def configurations(num_bits: int, chunk: int = 1 << 12) -> Iterator[Array]:
    """All 2^k vectors of k bits, in chunks of shape (at most ``chunk``, k)."""
    for start in range(0, 1 << num_bits, chunk):
        number = np.arange(start, min(start + chunk, 1 << num_bits))
        yield (number[:, None] >> np.arange(num_bits) & 1).astype(float)


def _logsumexp(x: Array) -> float:
    return x.max() + np.log(np.exp(x - x.max()).sum())
