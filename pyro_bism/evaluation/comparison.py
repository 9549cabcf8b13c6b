"""What a comparison of hypergradients with the marginal's gradient says: the error, and a verdict in one sentence."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..brief import brief
from ..hypergradients import Exact, Functional

__all__ = ["CLOSE", "PART", "Compared", "HypergradientError", "judged"]

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
    :ivar held: ``value``, ``standard_error`` and ``gap`` where the model stands still and the guide catches up; None
        where that was left out.
    :ivar passed: whether the hypergradient is right; None where the draws can't tell.
    :ivar verdict: in one sentence: is the guide fitted, is the hypergradient solved, what is to be changed.
    """

    value: float
    standard_error: float
    by_parameter: Mapping[str, tuple[float, float]]
    gap: float
    effective: float
    held: tuple[float, float, float] | None
    passed: bool | None
    verdict: str

    def __str__(self) -> str:
        return self.verdict

    def __repr__(self) -> str:
        return brief(self)


class Compared(NamedTuple):
    """Sums over steps of training of what two gradients differ in.

    :ivar num: steps.
    :ivar sums: by parameter, side by side: d = hypergradient - reference, the reference, and the squares of both.
    :ivar gap: from the guide to the posterior, in nats.
    :ivar effective: share of the guide's draws.
    """

    num: int
    sums: Mapping[str, np.ndarray]
    gap: float
    effective: float

    def plus(self, other: "Compared") -> "Compared":
        """The sums over these steps and those of ``other``."""
        sums = {name: x + other.sums[name] for name, x in self.sums.items()}
        return Compared(self.num + other.num, sums, self.gap + other.gap, self.effective + other.effective)

    def means(self) -> tuple[float, float]:
        """Of gap and effective share."""
        return self.gap / self.num, self.effective / self.num

    def require_finite(self) -> None:
        """Check whether all gradients were finite.

        :raises FloatingPointError: where one was not.
        """
        bad = [name for name, x in self.sums.items() if not np.isfinite(x).all()]
        if bad:
            raise FloatingPointError(
                f"Within {self.num} steps of training a gradient of {bad} is not finite, the hypergradient's or "
                "that of the importance-weighted marginal."
            )

    def error(self, names: Iterable[str] | None = None) -> tuple[float, float]:
        """‖E d‖ / ‖E reference‖ without the noise in both, and a standard error; NaN where there is no gradient.

        :param names: the parameters over whose entries the norms are taken; None takes all.
        """
        parts = []
        for name in self.sums if names is None else names:
            d, r, square_d, square_r = self.sums[name] / self.num
            noise_d = np.maximum(square_d - d**2, 0) / (self.num - 1)
            noise_r = np.maximum(square_r - r**2, 0) / (self.num - 1)
            weight = np.divide(1.0, square_r, out=np.zeros_like(square_r), where=square_r > 0)
            parts.append([(weight * x).sum() for x in (d**2 - noise_d, noise_d, r**2 - noise_r, noise_r)])
        square, noise, length, noise_length = np.sum(parts, 0)
        if length <= noise_length:  # the gradient is not told from zero
            return math.nan, math.nan
        return math.sqrt(max(square, 0) / length), math.sqrt(noise / length)


def judged(before: Compared, after: Compared | None, num_fit: int, strategy: Any) -> HypergradientError:
    """What is said of a comparison in training and, where there is one, with the model held for ``num_fit`` steps."""
    passed, verdict = _said(before, after, num_fit, strategy)
    held = None if after is None else (*after.error(), after.means()[0])
    by_parameter = {name: before.error([name]) for name in before.sums}
    return HypergradientError(*before.error(), by_parameter, *before.means(), held, passed, verdict)


def _said(before: Compared, after: Compared | None, num_fit: int, strategy: Any) -> tuple[bool | None, str]:
    error, noise = before.error()
    rough = " (roughly: few of the guide's draws count)" if before.means()[1] < FEW else ""
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
    gap, _ = after.means()
    if gap > NEAR:
        return False, (
            f"{start}: the guide stays {gap:.2g} nats from the posterior. Give it a richer family or network, or "
            "more inner steps."
        )
    start = f"{start}, though the guide is fitted ({max(gap, 0):.1g} nats from the posterior)"
    if isinstance(strategy, Exact):
        return False, (
            f"{start}: {name} takes it for the posterior, to the slope. Take more inner steps, a lower rate in "
            "inner_optim, or a denoising loss."
        )
    if isinstance(strategy, Functional):
        return False, f"{start}: {name} leaves the slope of its distributions out. Take hypergradient=Amortized()."
    return False, f"{start}: {name} does not solve the inner problem. Take hypergradient=None, which chooses."
