"""Chains that draw from a trained p̃(v, h), many at once."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax import Array

from ..brief import brief
from ..compiled.convolutions import compiled
from ..energies import VISIBLE, Density, Energy, Point, random_labels
from ..programs import visible
from ..programs.modes import in_own_modes
from .kernels import Gibbs, Kernel, Langevin, require_kernel


@dataclass(frozen=True, repr=False)
class Chains:
    """Draws, and all that it takes to go on.

    :ivar values: by site, of shape (num_chains, num_samples, ...); where rows are data points and not chains of their
        own, (num_chains, num_samples, n, ...).
    :ivar log_joint: log p̃(v, h) of the draws, (num_chains, num_samples) or (num_chains, num_samples, n).
    :ivar acceptance: acceptance probabilities of the moves that led to them, of the same shape.
    :ivar moved: the sites that were drawn; the others stand still.
    :ivar has_rows: whether the values have the axis n.
    :ivar point: where the chains are.
    :ivar kernel_state: the kernel's state.
    :ivar kernel: the kernel's name.
    :ivar rows: by subsampling plate, the rows of the data that they belong to; empty if all are taken.
    :ivar v: the data's visible values, (n, D), at these rows.
    """

    values: Mapping[str, Array]
    log_joint: Array
    acceptance: Array
    moved: tuple[str, ...]
    has_rows: bool
    point: Point
    kernel_state: Any
    kernel: str
    rows: Mapping[str, Array]
    v: Array

    def __repr__(self) -> str:
        return brief(self)


@in_own_modes
def run_chains(
    trained: Any,
    state: Any,
    *args: Any,
    rng_key: Array,
    kernel: Kernel,
    num_samples: int = 1000,
    num_warmup: int | None = None,
    thinning: int = 1,
    num_chains: int | None = None,
    sites: Sequence[str] | None = None,
    missing: Any = None,
    init: str | Mapping[str, Any] = "data",
    chains: Chains | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Chains:
    """Draws of (v, h), of h given v, of v given h, or of missing entries of v given the rest.

    With ``sites`` and ``missing`` left out all of (v, h) moves, and the chains start at the rows of the data; otherwise
    only what is named does, and the rest is conditioned upon, at the data and at the guide's draw or at ``init``.

    :param trained: a BiSM or a rival.
    :param state: its state.
    :param args: arguments of model and guide, the data among them, as for ``update``.
    :param rng_key: a JAX random key: all that is drawn follows from it.
    :param kernel: :class:`Gibbs`, :class:`Langevin` or :class:`AnnealedLangevin`.
    :param num_samples: draws kept of every chain.
    :param num_warmup: steps before them, in which the kernel adapts; None takes 500, none with ``chains``, and what the
        schedule of ``AnnealedLangevin`` takes.
    :param thinning: steps from one draw to the next.
    :param num_chains: if all moves, the number of rows that do, as many as the data have by default; else copies of
        the data, 1 by default. A model with covariates has copies of the data in either case.
    :param sites: names of the sites that move.
    :param missing: True where an entry of the visible values is missing, of the shape of the visible site's value, or
        a mapping from site names to such arrays.
    :param init: "data"; "noise" (v normal with the data's mean and twice their spread, latents anywhere); or a mapping
        from site names to values, the rest as for "data".
    :param chains: go on from these, made by the same call; at the same rows of the data, if a plate subsamples them.
    :param progress_bar: whether to show how many steps the chains have taken.
    :param kwargs: keyword arguments of model and guide.
    :returns: the draws, which go to ``to_arviz`` as ``posterior``, ``posterior_predictive`` or ``model_samples``.
    :raises ValueError: on misuse, naming the site and the cure.
    :raises FloatingPointError: if a chain's log density is not finite.
    """
    require_kernel(kernel)
    if num_samples < 1 or thinning < 1:
        raise ValueError(f"num_samples and thinning must be at least 1, got {num_samples} and {thinning}.")
    key_energy, key_init, key_run = jax.random.split(rng_key, 3)
    energy, params, data = trained.energy(state, *args, rng_key=key_energy, **kwargs)
    masks = masks_of(energy, sites, missing)
    everything = sites is None and missing is None
    has_rows = not (everything and energy.is_homogeneous)
    copies = 1 if num_chains is None else num_chains
    rows = energy.num_rows * copies
    if not has_rows:
        copies = rows = energy.num_rows if num_chains is None else num_chains
    if copies < 1:
        raise ValueError(f"num_chains must be at least 1, got {num_chains}.")
    which = np.arange(rows) % energy.num_rows
    masks = {name: mask if mask is True else mask[which] for name, mask in masks.items()}
    if chains is not None:
        if len(chains.point[VISIBLE]) != rows or set(chains.point) != {VISIBLE, *energy.latents}:
            raise ValueError("chains were made by another call: they have other sites or another number of rows.")
        if has_rows:
            energy = _rejoined(energy, chains, masks)
    # where the constant precisions are taken matters not
    density = energy.density(params, data).moving(masks)
    if chains is None:
        x = _start(key_init, energy, data, which, init, density)
        kernel_state = kernel.init(density, x)
        default = getattr(kernel, "num_warmup", 500)
    else:
        x, kernel_state, default = chains.point, chains.kernel_state, 0
    warmup = default if num_warmup is None else num_warmup
    if chains is None and warmup < getattr(kernel, "num_warmup", 0):
        raise ValueError(f"num_warmup = {warmup} ends before the schedule of {kernel} does, at {default}.")

    def collect(x: Point) -> tuple[dict[str, Array], Array]:
        return energy.values(x), energy.log_joint(params, x, jacobian=False)

    shapes = jax.eval_shape(collect, x)
    kept = jax.tree.map(lambda s: jnp.zeros((num_samples, *s.shape), s.dtype), (*shapes, shapes[1]))

    @compiled
    def loop(x: Point, kernel_state: Any, kept: Any, start: int, stop: int) -> tuple[Point, Any, Any]:
        """Steps ``start`` to ``stop``, counted from the first of the warm-up."""

        def body(i: Array, carry: tuple[Point, Any, Any]) -> tuple[Point, Any, Any]:
            x, kernel_state, kept = carry
            x, kernel_state, acceptance = kernel(jax.random.fold_in(key_run, i), density, x, kernel_state)
            kernel_state = jax.lax.cond(i < warmup, kernel.adapt, lambda s, _: s, kernel_state, acceptance)
            place = jnp.maximum(i - warmup, 0) // thinning

            def keep(kept: Any) -> Any:
                values, log_joint = collect(kernel.finish(density, x))
                seen = (values, log_joint, acceptance.astype(log_joint.dtype))
                return jax.tree.map(lambda all, new: all.at[place].set(new), kept, seen)

            due = (i >= warmup) & ((i - warmup) % thinning == thinning - 1)
            return x, kernel_state, jax.lax.cond(due, keep, lambda kept: kept, kept)

        end: tuple[Point, Any, Any] = jax.lax.fori_loop(start, stop, body, (x, kernel_state, kept))
        return end

    total, done, step = warmup + num_samples * thinning, 0, 1
    with tqdm.tqdm(total=total, disable=not progress_bar, desc=type(kernel).__name__) as bar:
        while done < total:
            stop, began = min(total, done + step), time.perf_counter()
            x, kernel_state, kept = jax.block_until_ready(loop(x, kernel_state, kept, done, stop))
            bar.update(stop - done)
            # the first step has the compilation in it; then about half a second each
            seconds = time.perf_counter() - began
            step = 10 if done == 0 else max(1, min(10 * step, round(0.5 * (stop - done) / seconds)))
            done = stop
    values, log_joint, acceptance = kept
    if not jnp.isfinite(log_joint).all():
        at = tuple(int(i) for i in jnp.argwhere(~jnp.isfinite(log_joint))[0])
        raise FloatingPointError(
            f"The log density is not finite at draw {at[0]} of row {at[1]}: the chain has left the model, or the "
            "energy has no normaliser. Take a smaller step_size, or Langevin(adjusted=True)."
        )

    def placed(a: Array) -> Array:
        """(draw, row, ...) to (chain, draw, ...) or (chain, draw, row, ...)."""
        if not has_rows:
            return jnp.moveaxis(a, 0, 1)
        return jnp.moveaxis(a.reshape(num_samples, copies, energy.num_rows, *a.shape[2:]), 0, 1)

    names = [site.name for site in energy.sites] if VISIBLE in masks else []
    return Chains(
        {name: placed(value) for name, value in values.items()},
        placed(log_joint),
        placed(acceptance),
        (*names, *(name for name in energy.latents if name in masks)),
        has_rows,
        x,
        kernel_state,
        type(kernel).__name__,
        energy.batch.indices,
        energy.batch.v,
    )


def default_kernel(energy: Energy) -> Kernel:
    """Gibbs where the energy has all conditionals, else Langevin."""
    return Langevin(num_steps=5) if any(block.kind == "free" for block in energy.blocks) else Gibbs()


def masks_of(energy: Energy, sites: Sequence[str] | None, missing: Any) -> dict[str, Any]:
    """Which variables move: by name, True or the entries, (n, D), that do."""
    names = [site.name for site in energy.sites]
    if isinstance(sites, str):
        raise ValueError(f"sites takes a list of names: sites=[{sites!r}].")
    for name in sites or ():
        if name not in names and name not in energy.latents:
            raise ValueError(f"sites names '{name}'; the sites are {sorted([*names, *energy.latents])}.")
    if missing is None and sites is None:
        return {VISIBLE: True, **dict.fromkeys(energy.latents, True)}
    if missing is not None:
        given = missing if isinstance(missing, Mapping) else {names[0]: missing}
        if not isinstance(missing, Mapping) and len(names) > 1:
            raise ValueError(f"missing: there are several visible sites, {names}. Give a mapping from their names.")
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"missing names {unknown}; the visible sites are {names}.")
    else:
        given = {name: True for name in sites or () if name in names}
    # with missing entries all latents move, unless sites says otherwise
    moving = dict.fromkeys((n for n in energy.latents if sites is None or n in sites), True)
    columns = []
    for site in energy.sites:
        mask = np.asarray(given.get(site.name, False), bool)
        if mask.ndim and mask.shape != site.shape:
            raise ValueError(f"missing['{site.name}'] has shape {mask.shape}; the site's value has {site.shape}.")
        columns.append(np.broadcast_to(mask, site.shape).reshape(site.shape[0], -1))
    mask = np.concatenate(columns, -1)
    if not mask.any() and not moving:
        raise ValueError("Nothing moves: sites and missing name no site.")
    if mask.all():
        return {VISIBLE: True, **moving}
    return {VISIBLE: mask, **moving} if mask.any() else moving


def _rejoined(energy: Energy, chains: Chains, masks: Mapping[str, Any]) -> Energy:
    """The energy at the rows that the chains belong to: a subsampling plate has drawn others.

    :raises ValueError: where visible values that stand still are not those that the chains were given.
    """
    b = energy.batch
    same = b.v.shape == chains.v.shape and b.indices.keys() == chains.rows.keys()
    same = same and all([bool((b.indices[name] == chains.rows[name]).all()) for name in b.handed])
    for site in b.sites:
        if same and site.plate is not None:
            same = int(chains.rows[site.plate].max()) < b.leaves[site.leaves[0]].shape[site.axis]
    if same:
        energy = energy.at(visible.batch(b.sites, chains.rows, b.leaves, b.spec, b.reads_rows, b.handed))
        old, new = energy.seen(chains.v), energy.seen(energy.batch.v)
        for name, values in new.items():
            moves = masks.get(name, False)
            moves = moves if isinstance(moves, bool) else moves[: len(values)]
            same = same and bool(((old[name] == values) | moves).all())
    if not same:
        raise ValueError(
            "chains belong to other data: the visible values that stand still are not those of these arguments. Give "
            "the data that the chains were made with, or start anew."
        )
    return energy


def _start(rng_key: Array, energy: Energy, data: Point, which: np.ndarray, init: Any, density: Density) -> Point:
    x = {name: value[which] for name, value in data.items()}
    if isinstance(init, str):
        if init not in ("data", "noise"):
            raise ValueError(f"init should be 'data', 'noise' or a mapping from site names to values, got {init!r}.")
        if init == "data":
            return x
        noise = {}
        moving = {name for block in density.blocks for name in block.names}
        for key, name in zip(jax.random.split(rng_key, len(x)), x, strict=True):
            latent = energy.latents.get(name)
            if latent is None:
                centre, spread = data[VISIBLE].mean(0), 2 * data[VISIBLE].std(0) + 1e-6
                new = centre + spread * jax.random.normal(key, x[name].shape, x[name].dtype)
            elif latent.kind == "real":
                new = jax.random.uniform(key, x[name].shape, x[name].dtype, -2, 2)  # as init_to_uniform
            else:
                new = random_labels(key, latent, len(which), x[name].dtype)
            noise[name] = jnp.where(density.masks.get(name, True), new, x[name]) if name in moving else x[name]
        return noise
    return {**x, **given_values(energy, x, init, which)}


def given_values(energy: Energy, x: Point, values: Mapping[str, Any], which: np.ndarray) -> Point:
    """Site values as parts of a point; values for every row, or for every row of the data."""
    found, v, start = {}, x[VISIBLE], 0
    known = {site.name for site in energy.sites} | set(energy.latents)
    for name in values:
        if name not in known:
            raise ValueError(f"init names '{name}'; the sites are {sorted(known)}.")

    def rows(name: str, shape: tuple[int, ...]) -> Array:
        value = jnp.asarray(values[name])
        if value.shape == (energy.num_rows, *shape):
            return value[which]
        if value.shape != (len(which), *shape):
            raise ValueError(f"init['{name}'] has shape {value.shape}; {(len(which), *shape)} is wanted.")
        return value

    for site in energy.sites:
        size = math.prod(site.shape[1:])
        if site.name in values:
            value = rows(site.name, site.shape[1:]).astype(v.dtype)
            v = v.at[:, start : start + size].set(value.reshape(len(which), size))
        start += size
    for name, latent in energy.latents.items():
        if name in values:
            value = rows(name, latent.shape)
            found[name] = (latent.transform.inv(value) if latent.kind == "real" else value).astype(x[name].dtype)
    return {VISIBLE: v, **found}
