"""The noise that a density was learnt with, added to data before the two are compared.

Denoising score matching learns the density of *noisy* data, p * N(0, σ² I): clean data are not draws of it, and a test
of fit would reject a model that is perfectly trained.
"""

import math
from typing import Any

import jax
from jax import Array

from ..programs.visible import Arguments


def noise_scale(trained: Any, noise: float | str | None) -> float | None:
    """The standard deviation of the noise that is in the density learnt; None for no noise.

    :param noise: "loss" takes that of the outer loss: ``sigma`` of ``DenoisingScoreMatching``, ``sigma0`` of
        ``MultiscaleDenoisingScoreMatching``, which scores one energy against this scale at all its levels, and none of
        a loss that has neither (``ScoreMatching``, ``SlicedScoreMatching``, the rivals without a loss); a number is
        taken for what it is.
    :raises ValueError: on anything else.
    """
    if noise is None:
        return None
    if isinstance(noise, str):
        if noise != "loss":
            raise ValueError(f"noise must be 'loss', a standard deviation or None, got {noise!r}.")
        loss = getattr(trained, "loss", None)
        return getattr(loss, "sigma0", getattr(loss, "sigma", None))
    if not (noise >= 0 and math.isfinite(noise)):
        raise ValueError(f"noise must be 'loss', a standard deviation or None, got {noise}.")
    return float(noise)


def with_noise(
    trained: Any, args: tuple[Any, ...], kwargs: dict[str, Any], noise: float | str | None, rng_key: Array
) -> Arguments:
    """The arguments with N(0, σ² I) added to the visible ones, see :func:`noise_scale`."""
    sigma = noise_scale(trained, noise)
    if not sigma:
        return args, kwargs
    trainer = getattr(trained, "trained", trained)  # of a PersistentVI at one θ
    leaves, spec = trainer._checked(args, kwargs)
    sites = trainer.evaluated_pair(leaves, spec).sites
    leaves = list(leaves)
    for key, site in zip(jax.random.split(rng_key, len(sites)), sites, strict=True):
        if not site.is_discrete:
            value = leaves[site.leaves[0]]
            value = value + sigma * jax.random.normal(key, value.shape, value.dtype)
            for i in site.leaves:
                leaves[i] = value
    found: Arguments = jax.tree.unflatten(spec, leaves)
    return found
