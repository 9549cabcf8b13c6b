"""Whether training runs away: the loss, the hypergradient or the curvature grows by orders of magnitude, and stays.

Score matching has no lower bound of its own: where the guide lags behind, its error can be made to look like a gain,
and a hypergradient that is wrong, or unstable, follows it. What tells is the growth of three numbers beside what they
were: |J|, ‖dJ/dθ‖ and the curvature of G. A step's own value tells little (J crosses zero, a relaxed draw has a spike
now and then), so logarithms are averaged over some fifty steps; the reference is the least that a slowly sinking
envelope above these averages has been.
"""

import math
import sys
import warnings
from typing import NamedTuple

WARM_UP = 20  # steps: the optimisers' first ones, and those in which a kept linear system finds its solution
DECAY = 0.98  # of the running means, a step
SINKING = math.log(2) / 500  # of the envelope, a step
GROWTH = math.log(1e3)
SHARPENING = math.log(1e5)  # of the curvature, which may grow a thousandfold with a guide that narrows as it should
STEADY, LOSS, HYPERGRADIENT, CURVATURE = range(4)


class Watch(NamedTuple):
    """What has been seen of the three numbers, each of three entries: |J|, ‖dJ/dθ‖, curvature.

    :ivar num_steps: so far.
    :ivar level: running means of their logarithms.
    :ivar envelope: the levels, but sinking no faster than by half in 500 steps.
    :ivar reference: the least envelope since the warm-up.
    :ivar verdict: 0 while nothing runs away, else which of them did; it stays.
    """

    num_steps: int
    level: tuple[float, ...]
    envelope: tuple[float, ...]
    reference: tuple[float, ...]
    verdict: int


def begin() -> Watch:
    """Before the first step."""
    return Watch(0, (0.0,) * 3, (0.0,) * 3, (0.0,) * 3, STEADY)


def watched(watch: Watch, loss: float, hypergradient: float, curvature: float) -> Watch:
    """The watch after one more step."""
    num, seen = watch.num_steps, [abs(x) for x in (loss, hypergradient, curvature)]
    rate = max(1 / (num + 1), 1 - DECAY)
    steps = [
        math.log(max(x, sys.float_info.min)) - mean if math.isfinite(x) else 0.0
        for x, mean in zip(seen, watch.level, strict=True)
    ]
    level = tuple(mean + rate * step for mean, step in zip(watch.level, steps, strict=True))
    envelope = tuple(max(x, e - SINKING) if num else x for x, e in zip(level, watch.envelope, strict=True))
    reference = tuple(e if num < WARM_UP else min(r, e) for r, e in zip(watch.reference, envelope, strict=True))
    grown = [x - r for x, r in zip(level, reference, strict=True)]
    # beside the loss too, past and present: from a symmetric start both grow from next to nothing to what is usual
    steep = level[1] > reference[0] + math.log(10) and level[1] > level[0] + math.log(3)
    rising = grown[1] > math.log(10)
    verdict = watch.verdict
    if verdict == STEADY:
        if grown[1] > GROWTH and steep:
            verdict = HYPERGRADIENT
        elif grown[0] > GROWTH and loss > 0 and rising:
            verdict = LOSS
        elif grown[2] > SHARPENING and rising:
            verdict = CURVATURE
    return Watch(num + 1, level, envelope, reference, verdict)


def in_words(verdict: int) -> str:
    """A verdict as a sentence with its cure."""
    if verdict == STEADY:
        return "no runaway seen"
    what = {LOSS: "the outer loss", HYPERGRADIENT: "the hypergradient", CURVATURE: "the inner loss's curvature"}[
        verdict
    ]
    fold = "100,000" if verdict == CURVATURE else "1,000"
    return (
        f"training has run away: {what} grew more than {fold}-fold, and what was learnt since is not to be trusted. "
        "Start again with hypergradient=Exact() if the guide can be the posterior; or with DenoisingScoreMatching, "
        "whose loss has a lower bound; or with a lower rate in optim or more inner steps, so that the guide keeps up"
    )


def warn(before: Watch, after: Watch) -> bool:
    """Say it where it is new.

    :param before: the watch at the start.
    :returns: whether there was something to say.
    """
    code = after.verdict
    if code == STEADY or before.verdict != STEADY:
        return False
    was, now = (math.exp(x[code - 1]) for x in (after.reference, after.level))
    text = f"By step {after.num_steps} {in_words(code)}. It was about {was:.2g} and is now about {now:.2g}."
    warnings.warn(text, UserWarning, stacklevel=4)  # the caller of step
    return True
