r"""How far the hypergradient is from the marginal's own gradient, and what to change where it is."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from ..bism import BiSM
from ..brief import brief, named
from ..densities import Pair, joint_per_example, record
from ..hypergradients import Exact, Functional
from ..modes import in_own_modes
from ..training import Buffers
from ..visible import Batch

FINE = 0.1  # of the gradient's length: what Adam's own noise hides
ROUGH = 0.15  # a standard error above this says nothing where the error is small
CLOSE = 0.03  # one below this is small enough
NEAR = 0.1  # nats from the guide to the posterior
FEW = 0.1  # of the draws: where no more count, the estimate is rough itself
PART = 50  # steps between two looks at the standard error


class HypergradientError(NamedTuple):
    """What :func:`hypergradient_error` finds. ``print`` shows the verdict.

    :ivar value: ‖E[hypergradient] - dJ/dθ‖ / ‖dJ/dθ‖, every entry in units of its root mean square; NaN where there is
        no gradient to be told from noise.
    :ivar standard_error: of ``value`` where that is small.
    :ivar by_parameter: the same of every parameter of the model alone, value and standard error.
    :ivar gap: KL(q‖p) from the guide to the posterior in nats, a mean over the examples; too low where ``effective`` is
        small.
    :ivar effective: the effective sample size of the guide's draws, a share of their number.
    :ivar held: ``value``, ``standard_error`` and ``gap`` where the model stands still and the guide catches up.
    :ivar passed: whether the hypergradient is right; None where the draws can't tell.
    :ivar verdict: in one sentence: is the guide fitted, is the hypergradient solved, what is to be changed.
    """

    value: float
    standard_error: float
    by_parameter: Mapping[str, tuple[float, float]]
    gap: float
    effective: float
    held: tuple[float, float, float]
    passed: bool | None
    verdict: str

    def __str__(self) -> str:
        return self.verdict

    def __repr__(self) -> str:
        return brief(self)


@in_own_modes
def hypergradient_error(
    trained: Any,
    *args: Any,
    num_draws: int = 500,
    num_particles: int | None = None,
    num_fit: int = 50,
    progress_bar: bool = True,
    **kwargs: Any,
) -> HypergradientError:
    r"""How far off training's hypergradients are from here on, and a verdict in one sentence. Nothing is updated.

    A copy of the run is trained further, and at every step its strategy's dJ/dθ is compared with the gradient of the
    same loss of the marginal, whose score comes from importance-weighted draws of the guide, the sites that it relaxes
    or sums out drawn as discrete ones,

    .. math:: \nabla_v \log \tfrac1L \sum_l \frac{\tilde p(v, h_l; θ)}{q(h_l|v)},

    the draws and the weights' denominators fixed (the bound of Burda, Grosse, Salakhutdinov 2016, with the jackknife of
    Nowozin 2018). It needs no second derivative of the guide, no inner problem, and no knowledge of the strategy; two
    halves of the draws are multiplied where the loss squares the score, so that the noise in them adds no bias. Rows
    and noise are shared with the strategy. What noise is left averages out over the steps, and so does the guide's
    jitter, which does training no harm. A bias of order 1/L² is left, of third cumulants where the loss differentiates
    the score, of all where the guide is far from the posterior: see ``effective``.

    Then the model stands still, the guide catches up, and both are compared again: an error that falls is one of a
    guide that lags behind; one that stays, with a guide at the posterior, is the strategy's.

    Errors are taken as Adam sees them: every entry of the gradient in units of its root mean square over the steps. At
    the end of training there may be no gradient to be wrong about: the draws can't tell then.

    :param trained: a BiSM.
    :param args: arguments of model and guide, as for ``bism.step``.
    :param num_draws: steps compared at most, 50 at least; it stops where the standard error is below 0.03.
    :param num_particles: L, both halves together; None takes 8, or 64 under a loss that differentiates the score.
    :param num_fit: steps that the guide is given to catch up, each of the K of training; 0 leaves the second part out.
    :raises ValueError: for what is no BiSM, or where the guide's density is not known.
    :raises FloatingPointError: where a gradient is not finite.
    """
    if not isinstance(trained, BiSM):
        raise ValueError(f"hypergradient_error: {named(trained)} has no hypergradient. Pass a BiSM.")
    if num_particles is None:
        num_particles = 64 if trained.loss.differentiates_score else 8
    if num_draws < 1 or num_particles < 2 or num_fit < 0:
        raise ValueError(
            f"num_draws must be at least 1, num_particles at least 2, and num_fit not negative, got {num_draws}, "
            f"{num_particles} and {num_fit}."
        )
    pair, leaves, spec = trained._prepare(args, kwargs)
    theta = list(pair.theta.values())

    def stepped(held: Sequence[Tensor] | None) -> None:
        """A step of training, or of training with the model held where it is."""
        trained.step(*args, **kwargs)
        if held is not None:
            with torch.no_grad():
                for p, value in zip(theta, held, strict=True):
                    p.copy_(value)

    def compared(held: Sequence[Tensor] | None, bar: Any) -> _Compared:
        sums: Any = None
        for i in range(-(-num_draws // PART) * PART):
            stepped(held)
            buffers = Buffers(pair.buffers)
            with pyro.validation_enabled(False):
                found = _both(trained, pair, pair.batch(leaves, spec), num_particles)
            buffers.restore()
            sums = found if sums is None else _added(sums, found)
            bar.update()
            if (i + 1) % PART == 0:
                _mean(sums).require_finite()
                if _mean(sums).error()[1] < CLOSE:  # not where there is none
                    break
        return _mean(sums)

    with _kept(trained), tqdm(disable=not progress_bar, desc="hypergradient", unit="step") as bar:
        before = after = compared(None, bar)
        if num_fit:
            held = [p.detach().clone() for p in theta]
            for _ in range(num_fit):
                stepped(held)
            after = compared(held, bar)
    passed, verdict = _judged(before, after if num_fit else None, num_fit, trained.hypergradient)
    return HypergradientError(
        *before.error(),
        {name: before.error([name]) for name in pair.theta},
        before.gap,
        before.effective,
        (*after.error(), after.gap),
        passed,
        verdict,
    )


class _Compared(NamedTuple):
    """Means over steps, by parameter: of d = hypergradient - reference, of the reference, and of their squares."""

    num: int
    difference: Mapping[str, np.ndarray]
    reference: Mapping[str, np.ndarray]
    square_difference: Mapping[str, np.ndarray]
    square_reference: Mapping[str, np.ndarray]
    gap: float
    effective: float

    def require_finite(self) -> None:
        """:raises FloatingPointError: where a gradient is not finite."""
        bad = [name for name, square in self.square_difference.items() if not np.isfinite(square).all()]
        if bad:
            raise FloatingPointError(
                f"Within {self.num} steps of training a gradient of {bad} is not finite, the hypergradient's or "
                "that of the importance-weighted marginal."
            )

    def error(self, names: Any = None) -> tuple[float, float]:
        """‖E d‖ / ‖E reference‖ without the noise in both, and a standard error; NaN where there is no gradient."""
        parts = []
        for name in self.difference if names is None else names:
            d, r = self.difference[name], self.reference[name]
            noise_d = np.maximum(self.square_difference[name] - d**2, 0) / (self.num - 1)
            noise_r = np.maximum(self.square_reference[name] - r**2, 0) / (self.num - 1)
            unit = self.square_reference[name]
            weight = np.divide(1.0, unit, out=np.zeros_like(unit), where=unit > 0)
            parts.append([(weight * x).sum() for x in (d**2 - noise_d, noise_d, r**2 - noise_r, noise_r)])
        square, noise, length, noise_length = np.sum(parts, 0)
        if length <= noise_length:  # the gradient is not told from zero
            return math.nan, math.nan
        return math.sqrt(max(square, 0) / length), math.sqrt(noise / length)


@contextmanager
def _kept(trained: BiSM) -> Iterator[None]:
    """All of a run, the random state too, is at the end what it was."""
    state, info = trained.get_state(), trained.info
    try:
        yield
    finally:
        trained.set_state(state)
        trained.info = info


def _both(trained: BiSM, pair: Pair, batch: Batch, num_particles: int) -> _Compared:
    """Both gradients on one batch."""
    loss, theta, phi = trained.loss, list(pair.theta.values()), list(pair.phi.values())
    noise = loss.draw(batch.v)
    problem = trained._problem(pair, batch, theta, phi, _Drawn(loss, noise))
    if trained._strategy.repeats_noise:
        for _ in range(trained.num_inner_steps):
            problem.inner_noise.append(problem.snapshot())
            torch.rand((), device=batch.v.device)  # the next one's is another
    assert trained._carried is not None  # a step was taken
    found = trained._strategy(problem, *trained._carried)
    value, gap, effective = marginal_loss(pair, batch, loss, noise, num_particles)
    reference = torch.autograd.grad(value, theta, allow_unused=True)
    numbers = [
        {
            name: np.zeros(p.shape) if g is None else g.detach().cpu().double().numpy()
            for (name, p), g in zip(pair.theta.items(), each, strict=True)
        }
        for each in (found.gradient, reference)
    ]
    differences = {name: a - numbers[1][name] for name, a in numbers[0].items()}
    squared = [{name: x**2 for name, x in each.items()} for each in (differences, numbers[1])]
    return _Compared(1, differences, numbers[1], squared[0], squared[1], float(gap), float(effective))


def _added(a: _Compared, b: _Compared) -> _Compared:
    def both(x: Mapping[str, np.ndarray], y: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: value + y[name] for name, value in x.items()}

    return _Compared(
        a.num + b.num,
        both(a.difference, b.difference),
        both(a.reference, b.reference),
        both(a.square_difference, b.square_difference),
        both(a.square_reference, b.square_reference),
        a.gap + b.gap,
        a.effective + b.effective,
    )


def _mean(sums: _Compared) -> _Compared:
    def over(x: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: value / sums.num for name, value in x.items()}

    return _Compared(
        sums.num,
        over(sums.difference),
        over(sums.reference),
        over(sums.square_difference),
        over(sums.square_reference),
        sums.gap / sums.num,
        sums.effective / sums.num,
    )


class _Drawn:
    """An outer loss whose noise is drawn already."""

    def __init__(self, loss: Any, noise: Any):
        self.loss, self.noise = loss, noise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loss, name)

    def __call__(self, *args: Any) -> Any:
        return self.loss(*args)

    def draw(self, v: Tensor) -> Any:
        return self.noise


def marginal_loss(pair: Pair, batch: Batch, loss: Any, noise: Any, num_particles: int) -> tuple[Tensor, Tensor, Tensor]:
    """The outer loss of the importance-weighted marginal, a mean over the batch.

    :returns: the loss, and of all draws the gap from guide to posterior in nats and their effective share.
    """
    v, n = loss.perturb(batch.v, noise).detach(), len(batch.v)

    def draw() -> tuple[Any, Tensor]:
        values = pair.hard_draw(batch, v)
        with torch.no_grad():
            sites = pair.guide_at(batch, v, values, harden=True)
            log_q = joint_per_example([site for site in sites.values() if not site.is_delta], n)
        return values, log_q

    size = num_particles // 2
    draws = [draw() for _ in range(2 * size)]

    def log_weights(u: Tensor, some: Sequence[tuple[Any, Tensor]]) -> Tensor:
        args, kwargs = batch.arguments(u)
        found = []
        for values, log_q in some:
            with record(values) as run:
                pair.model(*args, **kwargs)
            found.append(joint_per_example(run.sites.values(), n) - log_q)
        return torch.stack(found)

    seen = []

    def score(u: Tensor) -> Tensor:
        u = u if u.requires_grad else u.detach().requires_grad_()

        def half(some: Sequence[tuple[Any, Tensor]]) -> Tensor:
            w = log_weights(u, some)
            seen.append(w.detach())
            return torch.autograd.grad(_log_mean(w).sum(), u, create_graph=True)[0]

        return torch.stack([half(draws[:size]), half(draws[size:])])

    value = loss(score, batch.v, noise).mean()
    w = torch.cat(seen[:2])
    bound = w.logsumexp(0) - math.log(2 * size)
    effective = (2 * w.logsumexp(0) - (2 * w).logsumexp(0)).exp() / (2 * size)
    return value, (bound - w.mean(0)).mean(), effective.mean()


def _log_mean(log_weights: Tensor) -> Tensor:
    """The log of the weights' mean by the jackknife, draws first: a bias of order 1/L² is left in place of 1/L."""
    num = len(log_weights)
    if num == 1:
        return log_weights[0]
    itself = torch.eye(num, dtype=torch.bool, device=log_weights.device).unsqueeze(-1)
    without = log_weights.masked_fill(itself, -math.inf).logsumexp(1) - math.log(num - 1)  # without the i-th
    return num * (log_weights.logsumexp(0) - math.log(num)) - (num - 1) * without.mean(0)


def _judged(before: _Compared, after: _Compared | None, num_fit: int, strategy: Any) -> tuple[bool | None, str]:
    error, noise = before.error()
    rough = " (roughly: few of the guide's draws count)" if before.effective < FEW else ""
    if math.isnan(error):
        return None, f"No gradient is told from noise in {before.num} steps{rough}: the model stands still."
    if error <= max(FINE, 2 * noise):
        if noise > ROUGH:
            return None, f"The hypergradient's error is not told from noise in {before.num} steps: give more num_draws."
        return True, f"The hypergradient is right to within {max(error, 2 * noise):.0%}{rough}."
    start, name = f"The hypergradient is {error:.0%} off{rough}", type(strategy).__name__
    if after is None:
        return False, f"{start}; num_fit=0 leaves open whether the guide or {name} is to blame."
    later, noise_later = after.error()
    if not later > max(0.5 * error, FINE, 2 * noise_later):
        return False, (
            f"{start}, for the guide lags behind the model: where that stands still for {num_fit} steps it is "
            f"{0 if math.isnan(later) else later:.0%}. Take more inner steps (num_inner_steps), a higher rate in "
            "inner_optim, or a lower one in optim."
        )
    start = f"{start}, and where the model stands still {later:.0%}"
    if after.gap > NEAR:
        return False, (
            f"{start}: the guide stays {after.gap:.2g} nats from the posterior. Give it a richer family or network, or "
            "more inner steps."
        )
    start = f"{start}, though the guide is fitted ({max(after.gap, 0):.1g} nats from the posterior)"
    if isinstance(strategy, Exact | Functional):
        return False, f"{start}: {name} takes it for the posterior, to the slope. Take hypergradient=Implicit(20)."
    return False, f"{start}: {name} does not solve the inner problem. Take hypergradient=None, which chooses."
