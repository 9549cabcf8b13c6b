"""Draws of a trained guide, and their importance weights."""

import contextlib
import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from ..bism import BiSM
from ..programs import visible
from ..programs.modes import in_own_modes
from ..programs.pair import ModelAndGuide
from ..programs.records import SiteRecord, per_example, record

MAX_CELLS = 2**20  # numbers of v and h that are worked on at once


class GuideDraws(NamedTuple):
    """What num_draws runs of guide and model gave; the draws lead where there are any.

    :ivar latents: h by site, of shape (num_draws, n, ...); the guide's auxiliary sites are left out.
    :ivar visible: the visible sites' values, without an axis of draws.
    :ivar covariates: the values of the model's other observed sites, without an axis of draws.
    :ivar log_p: log p̃(v, h), of shape (num_draws, n).
    :ivar log_q: log q(h|v), of shape (num_draws, n).
    """

    latents: dict[str, np.ndarray]
    visible: dict[str, np.ndarray]
    covariates: dict[str, np.ndarray]
    log_p: Tensor
    log_q: Tensor


@in_own_modes
def guide_draws(bism: BiSM, *args: Any, num_draws: int, **kwargs: Any) -> GuideDraws:
    """h ~ q(h|v; φ) at these data, relaxed sites drawn as discrete ones, with the log densities of model and guide."""
    pair, leaves, spec = bism._prepare_evaluation(args, kwargs)
    return run_guide(pair, pair.batch(leaves, spec), num_draws)


def run_guide(pair: ModelAndGuide, batch: visible.Batch, num_draws: int) -> GuideDraws:
    buffers = [b.clone() for b in pair.buffers]
    try:
        with torch.no_grad():
            first, model_sites = _draw(pair, batch)
            check_latents(first, len(batch.v))
            shapes = {name: s.value.shape for name, s in first.items()}
            size = MAX_CELLS // (batch.v.numel() + sum(shape.numel() for shape in shapes.values()))
            chunks: list[_Chunk] = []
            # each chunk is checked at the price of one draw
            if min(num_draws, size) >= 4 and _broadcasts(pair, batch, shapes):
                chunks = _collect(pair, batch, shapes, num_draws, size)
            if not chunks:
                chunks = _collect(pair, batch, shapes, num_draws, None)
    finally:
        # batch-norm statistics move in training, not in looking
        for buffer, value in zip(pair.buffers, buffers, strict=True):
            buffer.copy_(value)
    data = {name: as_numpy(s.value) for name, s in model_sites.items() if s.is_data}
    latents = [name for name, s in first.items() if not s.infer.get("is_auxiliary", False)]
    return GuideDraws(
        {name: as_numpy(torch.cat([chunk.values[name] for chunk in chunks])) for name in latents},
        {site.name: data.pop(site.name) for site in pair.sites},
        data,
        torch.cat([chunk.log_p for chunk in chunks]),
        torch.cat([chunk.log_q for chunk in chunks]),
    )


class _Chunk(NamedTuple):
    """Some draws, which lead, of all the guide's sites; and their log densities, of shape (draws, n)."""

    values: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor


def _draw(
    pair: ModelAndGuide, batch: visible.Batch, size: int | None = None, given: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, SiteRecord], dict[str, SiteRecord]]:
    """One run of guide and model: the guide's drawn sites, the model's sites. ``size`` draws stand in a plate."""
    args, kwargs = batch.arguments(batch.v)

    def plate() -> contextlib.AbstractContextManager[Any]:
        if size is None:
            return contextlib.nullcontext()
        return pyro.plate("_draws", size, dim=-(pair.num_plate_dims + 1))  # left of all others

    with plate(), record({**batch.indices, **(given or {})}, discretize=True) as q:
        pair.guide(*args, **kwargs)
    drawn = {name: s for name, s in q.sites.items() if not s.is_observed}
    with plate(), record({**batch.indices, **{name: s.value for name, s in drawn.items()}}, discretize=True) as p:
        pair.model(*args, **kwargs)
    return drawn, p.sites


def _chunk(
    pair: ModelAndGuide,
    batch: visible.Batch,
    shapes: Mapping[str, torch.Size],
    size: int | None,
    given: Mapping[str, Tensor] | None = None,
) -> _Chunk:
    drawn, model_sites = _draw(pair, batch, size, given)
    n = len(batch.v)
    return _Chunk(
        {name: s.value.reshape(size or 1, *shapes[name]) for name, s in drawn.items()},
        total_log_prob("model", model_sites, n, size, pair.num_plate_dims),
        total_log_prob("guide", drawn, n, size, pair.num_plate_dims),
    )


def _collect(
    pair: ModelAndGuide, batch: visible.Batch, shapes: Mapping[str, torch.Size], num_draws: int, size: int | None
) -> list[_Chunk]:
    """num_draws draws, ``size`` at a time; empty if they turn out to differ from draws one at a time."""
    chunks = []
    step = size or 1
    # no bar where nobody looks, nor for what is soon over
    for start in tqdm(range(0, num_draws, step), desc="guide draws", delay=3, leave=False, disable=None):
        chunk = _chunk(pair, batch, shapes, size and min(size, num_draws - start))
        if size and not _agrees(pair, batch, shapes, chunk, -1):
            return []
        chunks.append(chunk)
    return chunks


def _broadcasts(pair: ModelAndGuide, batch: visible.Batch, shapes: Mapping[str, torch.Size]) -> bool:
    """Whether several draws at once give what single ones give: some programs index or reshape from the left."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = _chunk(pair, batch, shapes, 3)
            return all(_agrees(pair, batch, shapes, trial, i) for i in range(3))
    except Exception:  # whatever such a program trips over; single draws are right for every program
        return False


def _agrees(pair: ModelAndGuide, batch: visible.Batch, shapes: Mapping[str, torch.Size], chunk: _Chunk, i: int) -> bool:
    """Whether a draw has the same log densities when it is scored alone."""
    alone = _chunk(pair, batch, shapes, None, {name: value[i] for name, value in chunk.values.items()})

    def close(x: Tensor, y: Tensor) -> bool:
        tolerance = math.sqrt(torch.finfo(x.dtype).eps)
        return torch.allclose(x, y, rtol=tolerance, atol=tolerance * float(y[y.isfinite()].abs().sum() / len(y)))

    return close(chunk.log_p[i], alone.log_p[0]) and close(chunk.log_q[i], alone.log_q[0])


def total_log_prob(role: str, sites: Mapping[str, SiteRecord], n: int, size: int | None, num_plate_dims: int) -> Tensor:
    """A program's log density by draw and datapoint, of shape (size, n)."""
    terms = {}
    for name, site in sites.items():
        if size is None:
            terms[name] = per_example(site, n)[None]
            continue
        log_prob = site.log_prob()
        if log_prob.dim() != num_plate_dims + 1 or log_prob.shape[0] != size:
            raise ValueError(f"Site '{name}' does not stand in the plate of draws.")
        terms[name] = log_prob.reshape(size, n, -1).sum(-1)
    total = cast(Tensor, sum(terms.values()))
    if _is_bad(total).any():
        name, term = next((name, term) for name, term in terms.items() if _is_bad(term).any())
        draw, row = _is_bad(term).nonzero()[0].tolist()
        raise FloatingPointError(
            f"The {role}'s site '{name}' has a log density of {term[draw, row].item()} at datapoint {row}. The "
            "parameters have diverged, or the energy has no value there."
        )
    return total


def _is_bad(x: Tensor) -> Tensor:
    """-inf is no fault: a draw that the model rules out has a weight of zero."""
    return torch.isnan(x) | torch.isposinf(x)


def check_latents(sites: Mapping[str, SiteRecord], n: int) -> None:
    latents = {name: s for name, s in sites.items() if not s.infer.get("is_auxiliary", False)}
    if not latents:
        raise ValueError("The guide has no latent site, so there is nothing to draw.")
    # an autoguide's Delta sites carry the density of its auxiliary ones
    auxiliary = any(name not in latents and not s.is_delta for name, s in sites.items())
    for name, site in latents.items():
        if site.is_delta and not auxiliary:
            raise ValueError(
                f"Guide site '{name}' is a point mass (Delta): log q(h|v) is not a density there, so the draws have no "
                "weights. Use a guide with a spread."
            )
        shape = tuple(site.value.shape)
        if not shape or shape[0] != n:
            raise ValueError(
                f"Latent site '{name}' has shape {shape}, without the batch of {n} as its leading dimension: all "
                "datapoints share it, so their weights can't be told apart. Put it inside the data plate, or make it "
                "a parameter."
            )


def as_numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
