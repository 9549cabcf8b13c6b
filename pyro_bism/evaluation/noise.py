"""The noise that a density was learnt with, added to data before the two are compared.

Denoising score matching learns the density of *noisy* data, p * N(0, σ² I): clean data are not draws of it, and a test
of fit would reject a model that is perfectly trained.
"""

import math
from typing import Any

import torch

from ..programs.hosts import pytree
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


def with_noise(trained: Any, args: tuple[Any, ...], kwargs: dict[str, Any], noise: float | str | None) -> Arguments:
    """The arguments with N(0, σ² I) added to the visible ones, see :func:`noise_scale`."""
    sigma = noise_scale(trained, noise)
    if not sigma:
        return args, kwargs
    trainer = getattr(trained, "trained", trained)  # of a PersistentVI at one θ
    pair, leaves, spec = trainer._prepare_evaluation(args, kwargs)
    leaves = list(leaves)
    for site in pair.sites:
        if not site.is_discrete:
            value = leaves[site.leaves[0]].detach()
            value = value + sigma * torch.randn_like(value)
            for i in site.leaves:
                leaves[i] = value
    found: Arguments = pytree.tree_unflatten(leaves, spec)
    return found
