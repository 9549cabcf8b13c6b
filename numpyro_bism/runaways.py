"""Whether training runs away: the loss, the hypergradient or the curvature grows by orders of magnitude, and stays.

Score matching has no lower bound of its own: where the guide lags behind, its error can be made to look like a gain,
and a hypergradient that is wrong, or unstable, follows it. What tells is the growth of three numbers beside what they
were: |J|, ‖dJ/dθ‖ and the curvature of G. A step's own value tells little (J crosses zero, a relaxed draw has a spike
now and then), so logarithms are averaged over some fifty steps; the reference is the least that a slowly sinking
envelope above these averages has been.
"""

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

WARM_UP = 20  # steps: the optimisers' first ones, and those in which a kept linear system finds its solution
DECAY = 0.98  # of the running means, a step
SINKING = math.log(2) / 500  # of the envelope, a step
GROWTH = math.log(1e3)
SHARPENING = math.log(1e5)  # of the curvature, which may grow a thousandfold with a guide that narrows as it should
STEADY, LOSS, HYPERGRADIENT, CURVATURE = range(4)


class Watch(NamedTuple):
    """What has been seen of the three numbers, each array of shape (3,): |J|, ‖dJ/dθ‖, curvature.

    :ivar num_steps: so far.
    :ivar level: running means of their logarithms.
    :ivar envelope: the levels, but sinking no faster than by half in 500 steps.
    :ivar reference: the least envelope since the warm-up.
    :ivar verdict: 0 while nothing runs away, else which of them did; it stays.
    """

    num_steps: Array
    level: Array
    envelope: Array
    reference: Array
    verdict: Array


def begin() -> Watch:
    """Before the first step."""
    return Watch(jnp.zeros((), int), jnp.zeros(3), jnp.zeros(3), jnp.zeros(3), jnp.zeros((), int))


def watched(watch: Watch, loss: Array, hypergradient: Array, curvature: Any) -> Watch:
    """The watch after one more step."""
    dtype = watch.level.dtype
    seen = jnp.abs(jnp.stack([jnp.asarray(x, dtype) for x in (loss, hypergradient, curvature)]))
    num, known = watch.num_steps, jnp.isfinite(seen)
    rate = jnp.maximum(1 / (num + 1.0), 1 - DECAY).astype(dtype)
    step = jnp.where(known, jnp.log(jnp.maximum(seen, jnp.finfo(dtype).tiny)) - watch.level, 0.0)
    level = watch.level + rate * step
    envelope = jnp.where(num == 0, level, jnp.maximum(level, watch.envelope - SINKING))
    reference = jnp.where(num < WARM_UP, envelope, jnp.minimum(watch.reference, envelope))
    grown = level - reference
    # beside the loss too, past and present: from a symmetric start both grow from next to nothing to what is usual
    steep = (level[1] > reference[0] + math.log(10)) & (level[1] > level[0] + math.log(3))
    rising = grown[1] > math.log(10)
    found = jnp.select(
        [
            (grown[1] > GROWTH) & steep,
            (grown[0] > GROWTH) & (loss > 0) & rising,
            (grown[2] > SHARPENING) & rising,
        ],
        [HYPERGRADIENT, LOSS, CURVATURE],
        STEADY,
    )
    verdict = jnp.where(watch.verdict == STEADY, found, watch.verdict).astype(watch.verdict.dtype)
    return Watch(num + 1, level, envelope, reference, verdict)


def in_words(verdict: Any) -> str:
    """A verdict as a sentence with its cure."""
    code = int(verdict)
    if code == STEADY:
        return "no runaway seen"
    what = ("", "the outer loss", "the hypergradient", "the inner loss's curvature")[code]
    fold = "100,000" if code == CURVATURE else "1,000"
    return (
        f"training has run away: {what} grew more than {fold}-fold, and what was learnt since is not to be trusted. "
        "Start again with hypergradient=Exact() if the guide can be the posterior; or with DenoisingScoreMatching, "
        "whose loss has a lower bound; or with a lower rate in optim or more inner steps, so that the guide keeps up"
    )


def warn(before: Any, after: Any) -> bool:
    """Say it where it is new; inside a compiled function nobody knows yet.

    :param before: the watch at the start.
    :returns: whether there was something to say.
    """
    if any(isinstance(x, jax.core.Tracer) for x in (before.verdict, after.verdict)):
        return False
    code = int(after.verdict)
    if code == STEADY or int(before.verdict) != STEADY:
        return False
    was, now = (jnp.exp(x)[code - 1].item() for x in (after.reference, after.level))
    text = f"By step {int(after.num_steps)} {in_words(code)}. It was about {was:.2g} and is now about {now:.2g}."
    warnings.warn(text, UserWarning, stacklevel=5)  # the caller of run or update
    return True
