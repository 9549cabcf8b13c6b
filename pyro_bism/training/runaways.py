"""Whether training runs away: the loss, the hypergradient or the curvature grows by orders of magnitude, and stays.

Score matching has no lower bound of its own: where the guide lags behind, its error can be made to look like a gain,
and a hypergradient that is wrong, or unstable, follows it. What tells is the growth of three numbers beside what they
were: |J|, ‖dJ/dθ‖ and the curvature of G. A step's own value tells little (J crosses zero, a relaxed draw has a spike
now and then), so logarithms are averaged over some fifty steps; the reference is the least that a slowly sinking
envelope above these averages has been.

The rivals have no curvature, and a loss that is a contrast, a difference that crosses zero, is no yardstick: there the
gradient is compared with one nat. Of discrete data it is bounded, however far the model goes astray, but then the loss
itself, in nats, has a scale.
"""

import math
import warnings
from typing import Any, NamedTuple

WARM_UP = 20  # steps: the optimisers' first ones, and those in which a kept linear system finds its solution
EARLIEST = 5  # steps before a verdict: of fewer one that a high rate overshoots would decide
DECAY = 0.98  # of the running means, a step
SINKING = math.log(2) / 500  # of the envelope, a step
GROWTH = math.log(1e3)
SHARPENING = math.log(1e5)  # of the curvature, which may grow a thousandfold with a guide that narrows as it should
FAR = math.log(10)  # beside the loss's scale and its first value
STEADY, LOSS, HYPERGRADIENT, CURVATURE, ASTRAY = range(5)


class Words(NamedTuple):
    """How a verdict on a method is said.

    :ivar loss: what |J| is called.
    :ivar gradient: what ‖dJ/dθ‖ is.
    :ivar cure: what to do about it.
    """

    loss: str
    gradient: str
    cure: str

    @classmethod
    def of_rival(cls, cure: str) -> "Words":
        """How it is said of a method with a loss of the model alone.

        :param cure: what else may help, after "Start again with a lower rate in optim, ".
        """
        return cls("the loss", "the gradient", f"Start again with a lower rate in optim, {cure}")


BISM = Words(
    "the outer loss",
    "the hypergradient",
    "Start again with hypergradient=Exact() and a guide that can be the posterior; or with DenoisingScoreMatching, "
    "whose loss has a lower bound; or with a lower rate in optim or more inner steps, so that the guide keeps up",
)
RIVAL = Words.of_rival("or clip the gradient")


class Watch(NamedTuple):
    """What has been seen of the three numbers, each of three entries: |J|, ‖dJ/dθ‖, curvature.

    :ivar num_steps: so far.
    :ivar level: running means of their logarithms.
    :ivar envelope: the levels, but sinking no faster than by half in 500 steps.
    :ivar reference: the least envelope since the warm-up.
    :ivar start: the first |J|.
    :ivar verdict: 0 while nothing runs away, else which of them did; it stays.
    """

    num_steps: int
    level: tuple[float, ...]
    envelope: tuple[float, ...]
    reference: tuple[float, ...]
    start: float
    verdict: int


def begin() -> Watch:
    """The watch before the first step."""
    return Watch(0, (0.0,) * 3, (0.0,) * 3, (0.0,) * 3, 0.0, STEADY)


def watched(
    watch: Watch,
    loss: float,
    gradient: float,
    curvature: float = math.inf,
    *,
    warm_up: int = WARM_UP,
    is_contrast: bool = False,
    scale: float = math.inf,
) -> Watch:
    """The watch after one more step.

    :param watch: the watch before it.
    :param loss: J at this step.
    :param gradient: ‖dJ/dθ‖ at this step.
    :param curvature: the least curvature of G at this step; infinite if there is none to look at.
    :param warm_up: steps before anything is compared with what it was.
    :param is_contrast: whether the loss crosses zero as it likes.
    :param scale: of the loss, in nats: no model that fits has it at ten times that; infinite where this isn't known.
    """
    num, seen = watch.num_steps, [abs(x) for x in (loss, gradient, curvature)]
    rate = max(1 / (num + 1), 1 - DECAY)
    # what is exactly zero has no size yet: a flat energy's loss, a gradient at a symmetric start
    steps = [
        math.log(x) - mean if math.isfinite(x) and x > 0 else 0.0 for x, mean in zip(seen, watch.level, strict=True)
    ]
    level = tuple(mean + rate * step for mean, step in zip(watch.level, steps, strict=True))
    envelope = tuple(max(x, e - SINKING) if num else x for x, e in zip(level, watch.envelope, strict=True))
    reference = tuple(e if num < max(warm_up, 1) else min(r, e) for r, e in zip(watch.reference, envelope, strict=True))
    start = seen[0] if num == 0 and math.isfinite(loss) else watch.start
    grown = [x - r for x, r in zip(level, reference, strict=True)]
    # beside the loss too, past and present: from a symmetric start both grow from next to nothing to what is usual
    beside = (0.0, 0.0) if is_contrast else (reference[0], level[0])
    steep = level[1] > beside[0] + math.log(10) and level[1] > beside[1] + math.log(3)
    rising = grown[1] > math.log(10)
    verdict = watch.verdict
    if verdict == STEADY and num >= EARLIEST:
        if grown[1] > GROWTH and steep:
            verdict = HYPERGRADIENT
        elif grown[0] > GROWTH and loss > 0 and rising and not is_contrast:
            verdict = LOSS
        elif grown[2] > SHARPENING and rising:
            verdict = CURVATURE
        elif num > 1 / (1 - DECAY) and level[0] > FAR + math.log(max(start, scale)):
            verdict = ASTRAY
    return Watch(num + 1, level, envelope, reference, start, verdict)


def in_words(verdict: Any, words: Words = BISM) -> str:
    """A verdict as a sentence with its cure."""
    code = int(verdict)
    if code == STEADY:
        return "no runaway seen"
    if code == ASTRAY:
        what = f"{words.loss} stays at more than ten times its first value, where no model that fits has it"
    else:
        subject = (words.loss, words.gradient, "the inner loss's curvature")[code - 1]
        what = f"{subject} grew more than {'100,000' if code == CURVATURE else '1,000'}-fold"
    return f"training has run away: {what}, and what was learnt since is not to be trusted. {words.cure}"


def shown(info: Any, words: Words = BISM) -> str:
    """An info whose last field is the verdict: its numbers, and the verdict as a sentence."""
    numbers = ", ".join(f"{name} {x:.4g}" for name, x in zip(info._fields[:-1], info[:-1], strict=True))
    return f"{numbers}; {in_words(info.verdict, words)}"


def warn(before: Watch, after: Watch, words: Words = BISM) -> bool:
    """Says it where it is new.

    :param before: the watch at the start.
    :param after: the watch now.
    :param words: how the method says it.
    :returns: whether there was something to say.
    """
    code = after.verdict
    if code == STEADY or before.verdict != STEADY:
        return False
    place = LOSS - 1 if code == ASTRAY else code - 1
    was, now = (math.exp(x[place]) for x in (after.reference, after.level))
    was = after.start if code == ASTRAY else was
    text = f"By step {after.num_steps} {in_words(code, words)}. It was about {was:.2g} and is now about {now:.2g}."
    warnings.warn(text, UserWarning, stacklevel=4)  # the caller of step
    return True
