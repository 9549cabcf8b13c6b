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

import jax
import jax.numpy as jnp
from jax import Array

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
    """What has been seen of the three numbers, each array of shape (3,): |J|, ‖dJ/dθ‖, curvature.

    :ivar num_steps: so far.
    :ivar level: running means of their logarithms.
    :ivar envelope: the levels, but sinking no faster than by half in 500 steps.
    :ivar reference: the least envelope since the warm-up.
    :ivar start: the first |J|.
    :ivar verdict: 0 while nothing runs away, else which of them did; it stays.
    """

    num_steps: Array
    level: Array
    envelope: Array
    reference: Array
    start: Array
    verdict: Array


def begin() -> Watch:
    """The watch before the first step."""
    return Watch(jnp.zeros((), int), jnp.zeros(3), jnp.zeros(3), jnp.zeros(3), jnp.zeros(()), jnp.zeros((), int))


def watched(
    watch: Watch,
    loss: Array,
    gradient: Array,
    curvature: Any = math.inf,
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
    dtype = watch.level.dtype
    seen = jnp.abs(jnp.stack([jnp.asarray(x, dtype) for x in (loss, gradient, curvature)]))
    # what is exactly zero has no size yet: a flat energy's loss, a gradient at a symmetric start
    num, known = watch.num_steps, jnp.isfinite(seen) & (seen > 0)
    rate = jnp.maximum(1 / (num + 1.0), 1 - DECAY).astype(dtype)
    step = jnp.where(known, jnp.log(jnp.where(known, seen, 1.0)) - watch.level, 0.0)
    level = watch.level + rate * step
    envelope = jnp.where(num == 0, level, jnp.maximum(level, watch.envelope - SINKING))
    reference = jnp.where(num < max(warm_up, 1), envelope, jnp.minimum(watch.reference, envelope))
    start = jnp.where((num == 0) & jnp.isfinite(seen[0]), seen[0], watch.start)
    grown = level - reference
    # beside the loss too, past and present: from a symmetric start both grow from next to nothing to what is usual
    beside = jnp.zeros(2, dtype) if is_contrast else jnp.stack([reference[0], level[0]])
    steep = (level[1] > beside[0] + math.log(10)) & (level[1] > beside[1] + math.log(3))
    rising = grown[1] > math.log(10)
    found = jnp.select(
        [
            (grown[1] > GROWTH) & steep,
            (grown[0] > GROWTH) & (loss > 0) & rising & (not is_contrast),
            (grown[2] > SHARPENING) & rising,
            (num > 1 / (1 - DECAY)) & (level[0] > FAR + jnp.log(jnp.maximum(start, scale))),
        ],
        [HYPERGRADIENT, LOSS, CURVATURE, ASTRAY],
        STEADY,
    )
    verdict = jnp.where((watch.verdict == STEADY) & (num >= EARLIEST), found, watch.verdict).astype(watch.verdict.dtype)
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
    if any(isinstance(x, jax.core.Tracer) for x in info):
        return repr(info)
    numbers = ", ".join(f"{name} {float(x):.4g}" for name, x in zip(info._fields[:-1], info[:-1], strict=True))
    return f"{numbers}; {in_words(info.verdict, words)}"


def warn(before: Any, after: Any, words: Words = BISM) -> bool:
    """Says it where it is new; inside a compiled function nobody knows yet.

    :param before: the watch at the start.
    :param after: the watch now.
    :param words: how the method says it.
    :returns: whether there was something to say.
    """
    if any(isinstance(x, jax.core.Tracer) for x in (before.verdict, after.verdict)):
        return False
    code = int(after.verdict)
    if code == STEADY or int(before.verdict) != STEADY:
        return False
    place = LOSS - 1 if code == ASTRAY else code - 1
    was, now = (jnp.exp(x)[place].item() for x in (after.reference, after.level))
    was = after.start.item() if code == ASTRAY else was
    text = f"By step {int(after.num_steps)} {in_words(code, words)}. It was about {was:.2g} and is now about {now:.2g}."
    warnings.warn(text, UserWarning, stacklevel=5)  # the caller of run or update
    return True
