"""The running mean of a noisy gradient that moves, its rate found from how far it moves and how noisy it is."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .linear import ratio

__all__ = ["Tracked", "untracked"]

LONGEST = 0.99  # decay a step of the longest mean
MOMENTS = 0.999  # of the sums that the rate is found from: of fewer steps their ratio would be noise


class Tracked(NamedTuple):
    """A running mean that follows a noisy gradient x, and what its rate is found from.

    :ivar mean: the running mean m of x, in the shapes of θ.
    :ivar last: the last x.
    :ivar noise: decaying sums of ½‖x_t - x_{t-1}‖², parameter by parameter: the variance of x, drift left out.
    :ivar surprise: those of ‖x_t - m_{t-1}‖²: the same, and what m is behind.
    :ivar num_steps: how many x there have been.
    """

    mean: Sequence[Tensor]
    last: Sequence[Tensor]
    noise: Sequence[Tensor]
    surprise: Sequence[Tensor]
    num_steps: Tensor

    def follow(self, x: Sequence[Tensor], memory: float | None) -> "Tracked":
        r"""With one more x: m ← m + ρ (x - m).

        .. math:: ρ = 1 - \frac{E ½‖x_t - x_{t-1}‖²}{E ‖x_t - m_{t-1}‖²},

        the gain of a Kalman filter (1960) whose innovations have that variance, and at least 1 - ``LONGEST``, for each
        parameter of the model. The first steps take the plain mean at the least.

        :param x: the gradient at this step, in the shapes of θ.
        :param memory: 1 - ρ, where it is fixed; None finds it.
        """
        is_later = self.num_steps > 0  # before that there is neither a last x nor a mean
        first = 1 / (self.num_steps + 1)
        mean, noise, surprise = [], [], []
        for new, m, last, sum_noise, sum_surprise in zip(
            x, self.mean, self.last, self.noise, self.surprise, strict=True
        ):
            noise.append(MOMENTS * sum_noise + torch.where(is_later, 0.5 * (new - last).square().sum(), 0.0))
            surprise.append(MOMENTS * sum_surprise + torch.where(is_later, (new - m).square().sum(), 0.0))
            if memory is None:
                rate = (1 - ratio(noise[-1], surprise[-1])).clamp(min=1 - LONGEST)
            else:
                rate = torch.full_like(first, 1 - memory)
            mean.append(m + torch.maximum(first.to(m), rate.to(m)) * (new - m))
        return Tracked(mean, list(x), noise, surprise, self.num_steps + 1)


def untracked(theta: Sequence[Tensor]) -> Tracked:
    """Before the first step."""

    def zeros() -> list[Tensor]:
        return [torch.zeros_like(p) for p in theta]

    def sums() -> list[Tensor]:
        return [p.new_zeros(()) for p in theta]

    count = theta[0].new_zeros(()) if theta else torch.zeros(())
    return Tracked(zeros(), zeros(), sums(), sums(), count.detach())
