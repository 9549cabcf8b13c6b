r"""log p̃(v, h; θ) row by row, and which of its conditionals have closed forms.

Samplers and estimators of the normaliser look at a model as a density over a *point* x: the visible values, one matrix,
and the latent ones, by site; every array leads with the rows, and a row knows nothing of the others. Continuous
latents stand in it unconstrained, the Jacobian in the density. Discrete visible values stand by site too.

What can be summed, integrated or drawn in closed form is found from the energy itself, by trying it at random points:

- *affine* in bits or one-hot vectors (every restricted Boltzmann machine is): they are independent given the
  rest, their logits are one gradient;
- *gaussian*, quadratic in real variables: mean and precision are a gradient and a Hessian;
- *units*: other discrete sites, one unit after the other by the differences of the energy;
- *free*: all else.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.distributions import biject_to
from numpyro.distributions.discrete import BernoulliLogits, BernoulliProbs, MultinomialLogits, MultinomialProbs
from numpyro.handlers import block as hidden
from numpyro.handlers import seed

from . import visible
from .densities import Site, joint_per_example, record
from .distributions import ConcreteBernoulli, ConcreteOneHot, base_of, hard

Point = dict[str, Array]

VISIBLE = "(visible)"  # the visible values' name in a point: no site of a program is called so
NUM_TRIALS = 3
MAX_FULL = 64  # a precision that differs from row to row is kept for at most so many variables


@dataclass(frozen=True)
class Latent:
    """One latent site of the model.

    :ivar shape: of its value for one example.
    :ivar kind: "bits", "onehot", "labels" (any other enumerable support) or "real".
    :ivar values: of "labels": the support, one value a row.
    :ivar transform: of "real": from the reals to its support.
    :ivar unconstrained: of "real": the shape of one example's value in the reals.
    :ivar fn: the distribution that declares it.
    """

    shape: tuple[int, ...]
    kind: str
    values: Any = None
    transform: Any = None
    unconstrained: tuple[int, ...] = ()
    fn: Any = None

    @property
    def num_values(self) -> int:
        """How many values one unit takes."""
        return {"bits": 2, "onehot": self.shape[-1] if self.shape else 1}.get(self.kind) or len(self.values)

    @property
    def units(self) -> tuple[int, ...]:
        """The shape in which its units stand."""
        if self.kind == "labels":
            return self.shape[: len(self.shape) - (self.values.ndim - 1)]
        return self.shape[:-1] if self.kind == "onehot" else self.shape

    def support(self, dtype: Any) -> Array:
        """The values of one unit, one a row."""
        if self.kind == "bits":
            return jnp.arange(2, dtype=dtype)
        return jnp.eye(self.shape[-1], dtype=dtype) if self.kind == "onehot" else self.values


class Block(NamedTuple):
    """Variables that are drawn, summed or integrated together, given all others.

    :ivar is_constant: of "gaussian": whether the precision is one for all rows and all values of the rest.
    :ivar is_diagonal: of "gaussian": whether its precision is.
    :ivar is_multilinear: of "units": whether the energy is affine in each bit or one-hot vector, the others held.
    """

    kind: str
    names: tuple[str, ...]
    is_constant: bool = False
    is_diagonal: bool = False
    is_multilinear: bool = False


@dataclass(frozen=True)
class Density:
    """An unnormalised log density of points, row by row.

    :ivar log_prob: of a point with m rows, shape (m,); any m.
    :ivar energy: whose variables these are.
    :ivar blocks: what moves, in parts; all else stands still.
    :ivar precisions: constant ones of "gaussian" blocks, by the block's names: shape (d, d), or (d,) if diagonal.
    :ivar masks: by name, the entries that move where only some do, of the shape of the variable.
    """

    log_prob: Callable[[Point], Array]
    energy: "Energy"
    blocks: tuple[Block, ...]
    precisions: Mapping[tuple[str, ...], Array]
    masks: Mapping[str, Array] = field(default_factory=dict)

    @property
    def latents(self) -> Mapping[str, Latent]:
        """By site."""
        return self.energy.latents

    def moving(self, masks: Mapping[str, Any]) -> "Density":
        """The same, but only these variables move: those whose mask is True, and of others the entries where it is."""
        blocks = []
        for block in self.blocks:
            names = tuple(name for name in block.names if name in masks)
            if names:
                blocks.append(block._replace(names=names))
        precisions = {b.names: self.part(b) for b in blocks if b.kind == "gaussian" and b.is_constant}
        partial = {name: mask for name, mask in masks.items() if mask is not True}
        return replace(self, blocks=tuple(blocks), precisions=precisions, masks=partial)

    def part(self, block: Block) -> Array:
        """The constant precision of a "gaussian" block, or of some variables of one."""
        whole = next(names for names in self.precisions if set(block.names) <= set(names))
        precision = self.precisions[whole]
        if whole == block.names:
            return precision
        sizes = [self.energy.size(name) for name in whole]
        edges = np.cumsum([0, *sizes])
        kept = np.concatenate([np.arange(edges[i], edges[i + 1]) for i, n in enumerate(whole) if n in block.names])
        return precision[kept] if block.is_diagonal else precision[np.ix_(kept, kept)]

    def slope(self, x: Point, names: Sequence[str]) -> Point:
        """The gradient of every row's log density in these variables."""
        return self.value_and_slope(x, names)[1]

    def value_and_slope(self, x: Point, names: Sequence[str]) -> tuple[Array, Point]:
        """Every row's log density and its gradient in these variables."""

        def total(part):
            value = self.log_prob({**x, **part})
            return value.sum(), value

        slopes, value = jax.grad(total, has_aux=True)({name: x[name] for name in names})
        return value, slopes

    def precision(self, x: Point, block: Block) -> Array:
        """Of a "gaussian" block, or of a part of one, at x: shape (d, d) or (m, d, d); (d,) or (m, d) if diagonal."""
        return self.part(block) if block.is_constant else _curvature(self, x, block)

    def mixed(self, other: "Density", weight: Any) -> "Density":
        """(1 - weight) · self + weight · other, in logarithms; ``other``'s blocks serve for both.

        :param other: of the same variables. self is a product of Gaussians and coins, which any block allows.
        """

        def log_prob(x):
            return (1 - weight) * self.log_prob(x) + weight * other.log_prob(x)

        def precision(block):
            a, b = self.precisions[block.names], other.precisions[block.names]
            if a.ndim < b.ndim:
                a = jnp.diag(a)
            return (1 - weight) * a + weight * b

        constant = [block for block in other.blocks if block.names in other.precisions]
        return replace(other, log_prob=log_prob, precisions={block.names: precision(block) for block in constant})


@dataclass(frozen=True)
class Energy:
    """A model's log p̃(v, h; θ) on one batch.

    :ivar latents: by site, discrete visible ones among them.
    :ivar num_rows: of the batch.
    :ivar observed: the discrete visible sites.
    :ivar resizes: whether the model runs on any number of rows; else they are taken ``num_rows`` at a time.
    :ivar is_homogeneous: whether all rows have the same density: no covariates that tell them apart.
    """

    model: Callable
    sites: tuple[visible.VisibleSite, ...]
    batch: visible.Batch
    latents: Mapping[str, Latent]
    num_rows: int
    resizes: bool = False
    is_homogeneous: bool = False
    blocks: tuple[Block, ...] = ()
    observed: tuple[str, ...] = ()

    @property
    def hidden(self) -> tuple[str, ...]:
        """The sites that are not visible."""
        return tuple(name for name in self.latents if name not in self.observed)

    @classmethod
    def of(
        cls,
        model: Callable,
        sites: tuple[visible.VisibleSite, ...],
        batch: visible.Batch,
        params: Mapping[str, Any],
        rng_key: Array,
        values: Mapping[str, Array] | None = None,
        like: "Energy | None" = None,
        moves_visible: bool = True,
    ) -> tuple["Energy", Point]:
        """The energy, tried out on this batch, and the point where it was: the data and one draw of the latents.

        :param params: all that the model is given by name.
        :param values: of the latents, if the model should not draw them itself.
        :param like: the same energy, tried out before.
        :param moves_visible: whether the visible values are of any block; else their structure is not looked for.
        :raises ValueError: where a latent has not the batch as its leading dimension, or is of no kind known here.
        """
        key_model, key_trial = jax.random.split(rng_key)
        args, kwargs = batch.arguments(batch.v)
        with seed(rng_seed=key_model), record(params, {**batch.indices, **(values or {})}, harden=True) as run:
            model(*args, **kwargs)
        n = len(batch.v)
        drawn = {name: site for name, site in run.sites.items() if not site.is_observed}
        latents = {name: _latent(site, n) for name, site in drawn.items()}
        observed = {site.name: _latent(run.sites[site.name], n) for site in sites if site.is_discrete}
        x = {VISIBLE: batch.v}
        for name, latent in latents.items():
            value = drawn[name].value
            if latent.kind == "real":
                value = latent.transform.inv(value)
            x[name] = value.astype(batch.v.dtype) if latent.kind in ("bits", "onehot") else value
        if like is not None:
            return like.at(batch), {**x, **like.seen(batch.v)}
        energy = cls(model, sites, batch, latents, n)
        if observed:
            energy, seen = energy._observing(params, x, observed)
            x |= seen
        energy = replace(energy, resizes=energy._can_resize(params, x))
        energy = replace(energy, is_homogeneous=energy._is_homogeneous(params, x))
        moving = [name for name in (VISIBLE, *latents, *observed) if moves_visible or name in latents]
        return replace(energy, blocks=_find_blocks(energy, params, x, key_trial, moving)), x

    def log_joint(self, params: Mapping[str, Any], x: Point, jacobian: bool = True) -> Array:
        """log p̃ of every row, of shape (m,), with or without the Jacobians of transformed latents.

        Row i of a point with more rows than the batch has the covariates of row i modulo ``num_rows``.
        """
        m, n = len(x[VISIBLE]), self.num_rows
        if m == n:
            return self._run(params, self.batch, x, jacobian)
        if self.resizes:
            return self._run(params, self._resized(m), x, jacobian)
        passes = -(-m // n)
        rows = jnp.arange(passes * n) % m  # the last pass is filled up
        parts = jax.tree.map(lambda a: a[rows].reshape(passes, n, *a.shape[1:]), x)
        return jax.vmap(lambda part: self._run(params, self.batch, part, jacobian))(parts).reshape(-1)[:m]

    def density(self, params: Mapping[str, Any], x: Point) -> Density:
        """At these parameters; x is any point, at which the constant precisions are taken."""
        density = Density(lambda x: self.log_joint(params, x), self, self.blocks, {})
        first = jax.tree.map(lambda a: a[:1], x) if self.resizes else x
        constant = [b for b in self.blocks if b.kind == "gaussian" and b.is_constant]
        return replace(density, precisions={b.names: _curvature(density, first, b)[0] for b in constant})

    def at(self, batch: visible.Batch) -> "Energy":
        """The same on another batch."""
        soft = {site.name for site in self.sites if site.is_soft}
        sites = tuple(replace(site, is_soft=site.name in soft) for site in batch.sites)
        return replace(self, sites=sites, batch=replace(batch, sites=sites), num_rows=len(batch.v))

    def seen(self, v: Array) -> Point:
        """The visible part of a point, from all visible values side by side as a batch has them."""
        sizes = [self.size(name) for name in self.observed]
        start = v.shape[1] - sum(sizes)
        x = {VISIBLE: v[:, :start]}
        for name, size in zip(self.observed, sizes, strict=True):
            latent = self.latents[name]
            dtype = latent.values.dtype if latent.kind == "labels" else v.dtype
            x[name] = v[:, start : start + size].reshape(len(v), *latent.shape).astype(dtype)
            start += size
        return x

    def size(self, name: str) -> int:
        """How many numbers a variable has in one row."""
        if name == VISIBLE:
            return sum(visible.size(site) for site in self.sites if not site.is_discrete)
        latent = self.latents[name]
        return math.prod(latent.unconstrained if latent.kind == "real" else latent.shape)

    def values(self, x: Point) -> dict[str, Array]:
        """A point as the sites' own values, by name: visible and latent."""
        found, start = {}, 0
        for site in self.sites:
            if site.is_discrete:
                continue
            size = math.prod(site.shape[1:])
            found[site.name] = x[VISIBLE][..., start : start + size].reshape(*x[VISIBLE].shape[:-1], *site.shape[1:])
            start += size
        for name, latent in self.latents.items():
            if name in x:
                found[name] = latent.transform(x[name]) if latent.kind == "real" else x[name]
        return found

    def _run(self, params: Mapping[str, Any], batch: visible.Batch, x: Point, jacobian: bool) -> Array:
        m = len(x[VISIBLE])
        args, kwargs = batch.arguments(pack(x, (VISIBLE, *self.observed)) if self.observed else x[VISIBLE])
        values, total = dict(batch.indices), jnp.zeros(m, x[VISIBLE].dtype)
        for name in self.hidden:
            latent = self.latents[name]
            values[name] = x[name]
            if latent.kind == "real":
                values[name] = latent.transform(x[name])
                terms = latent.transform.log_abs_det_jacobian(x[name], values[name])
                total += terms.reshape(m, -1).sum(-1) if jacobian else 0.0
        soft = frozenset(name for name, latent in self.latents.items() if latent.kind in ("bits", "onehot"))
        # one key for every point: what a model draws by itself (dropout) is part of the density
        with hidden(), seed(rng_seed=0), record(params, values, soft) as run:
            self.model(*args, **kwargs)
        return joint_per_example(run.sites.values(), m) + total

    def _observing(self, params: Mapping[str, Any], x: Point, observed: Mapping[str, Latent]) -> tuple["Energy", Point]:
        """This energy with discrete visible sites, as real numbers where the model takes them for the same; its point.

        Tried, for a model may look its values up in a table: such sites are "labels", whatever they are declared.
        """
        v = self.batch.v
        energy = replace(self, latents={**self.latents, **observed}, observed=tuple(observed))
        hard = energy.log_joint(params, {**x, **energy.seen(v)})
        for name, latent in observed.items():
            sites = tuple(replace(site, is_soft=site.is_soft or site.name == name) for site in energy.sites)
            trial = replace(energy, sites=sites, batch=replace(energy.batch, sites=sites))
            takes = latent.kind != "labels"
            if takes:
                try:
                    takes = bool(close(trial.log_joint(params, {**x, **energy.seen(v)}), hard))
                except Exception:  # whatever a program trips over: it gets integers then
                    takes = False
            if takes:
                energy = trial
            elif latent.kind != "labels":
                labels = replace(latent, kind="labels", values=latent.support(int))
                energy = replace(energy, latents={**energy.latents, name: labels})
        return energy, energy.seen(v)

    def _resized(self, m: int) -> visible.Batch:
        """The batch with its rows repeated, or cut, to m: of all arguments that have as many rows as the data."""
        n = self.num_rows
        rows = jnp.arange(m) % n
        visible_leaves = {i for site in self.sites for i in site.leaves}
        leaves = [
            leaf[rows] if isinstance(leaf, Array) and leaf.shape[:1] == (n,) and i not in visible_leaves else leaf
            for i, leaf in enumerate(self.batch.leaves)
        ]
        sites = tuple(replace(site, shape=(m, *site.shape[1:])) for site in self.sites)
        # the programs are given v in the visible leaves' place, so these need no more than their type
        return replace(self.batch, sites=sites, leaves=leaves)

    def _can_resize(self, params: Mapping[str, Any], x: Point) -> bool:
        """Tried, at one row more: plates of a fixed size and subsampled ones say no."""
        if self.batch.indices:
            return False
        n = self.num_rows
        wrapped = jax.tree.map(lambda a: a[jnp.arange(n + 1) % n], x)
        try:
            found = jax.jit(replace(self, resizes=True).log_joint)(params, wrapped)
        except Exception:  # whatever a program trips over: it gets its own number of rows then
            return False
        return bool(close(found[:n], jax.jit(self.log_joint)(params, x)) & close(found[n:], found[:1]))

    def _is_homogeneous(self, params: Mapping[str, Any], x: Point) -> bool:
        same = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), x)
        log_joint = jax.jit(self.log_joint)(params, same)
        return bool(close(log_joint, log_joint[:1]))


def _latent(site: Site, n: int) -> Latent:
    fn, base, shape = hard(site.fn), base_of(hard(site.fn)), jnp.shape(site.value)
    if shape[:1] != (n,):
        raise ValueError(
            f"Latent site '{site.name}' has shape {shape}, without the batch of {n} as its leading dimension: all "
            "examples share it, so it is a part of no example. Put it inside the data plate, or make it a parameter."
        )
    if isinstance(base, BernoulliLogits | BernoulliProbs | ConcreteBernoulli):
        return Latent(shape[1:], "bits", fn=fn)
    if isinstance(base, ConcreteOneHot) or (
        isinstance(base, MultinomialLogits | MultinomialProbs) and bool((jnp.asarray(base.total_count) == 1).all())
    ):
        return Latent(shape[1:], "onehot", fn=fn)
    if not fn.support.is_discrete:
        transform = biject_to(fn.support)
        unconstrained = transform.inverse_shape(shape)[1:]
        return Latent(shape[1:], "real", transform=transform, unconstrained=unconstrained, fn=fn)
    try:
        values = base.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise ValueError(
            f"Latent site '{site.name}' ({type(base).__name__}) is discrete and its support can't be enumerated: "
            "there is no way to draw or sum it here. Use a Bernoulli, Categorical or other finite distribution."
        ) from error
    return Latent(shape[1:], "labels", values.reshape(len(values), *base.event_shape), fn=fn)


def pack(x: Point, names: Sequence[str]) -> Array:
    """These variables side by side, shape (m, d)."""
    parts = [x[name].reshape(len(x[name]), math.prod(x[name].shape[1:])) for name in names]
    return jnp.concatenate(parts, -1)


def unpack(flat: Array, like: Point, names: Sequence[str]) -> Point:
    """The inverse of :func:`pack`."""
    found, start = {}, 0
    for name in names:
        size = math.prod(like[name].shape[1:])
        found[name] = flat[:, start : start + size].reshape(len(flat), *like[name].shape[1:])
        start += size
    return found


def _curvature(density: Density, x: Point, block: Block) -> Array:
    """Minus the Hessian of the log density in a block's variables, or its diagonal, for every row."""
    flat = pack(x, block.names)

    def slope(flat):
        return pack(density.slope({**x, **unpack(flat, x, block.names)}, block.names), block.names)

    def product(tangent):
        return -jax.jvp(slope, (flat,), (jnp.broadcast_to(tangent, flat.shape),))[1]

    if block.is_diagonal:
        return product(jnp.ones_like(flat))
    # one row of the matrix at a time: all at once they may not fit in memory
    return jnp.moveaxis(jax.lax.map(product, jnp.eye(flat.shape[1], dtype=flat.dtype)), 0, 1)


def close(a: Array, b: Array, scale: Any = None) -> Array:
    """Whether two arrays agree to half of their digits, beside the largest number in them."""
    tolerance = math.sqrt(float(jnp.finfo(a.dtype).eps))
    scale = jnp.abs(b).max(initial=0.0) if scale is None else scale
    return jnp.all(jnp.abs(a - b) <= tolerance * (scale + jnp.abs(b)))  # NaN is not


def _find_blocks(
    energy: Energy, params: Mapping[str, Any], x: Point, rng_key: Array, moving: Sequence[str]
) -> tuple[Block, ...]:
    density = Density(lambda x: energy.log_joint(params, x), energy, (), {})
    if energy.resizes:
        x = jax.tree.map(lambda a: a[:16], x)
    spread = jnp.std(energy.batch.v[:, : x[VISIBLE].shape[1]], 0) + 1e-3
    keys = jax.random.split(rng_key, 2 * NUM_TRIALS)
    moved = [random_points(key, x, energy.latents, spread) for key in keys]
    pairs = tuple(jax.tree.map(lambda *a: np.stack(a), *points) for points in (moved[::2], moved[1::2]))

    @partial(jax.jit, static_argnums=0)
    def affine(names, pairs):
        """f(b) - f(a) = f'(a) (b - a), and f'(b) = f'(a), as b differs from a in these names."""

        def trial(pair):
            a, b = pair
            b = {**a, **{name: b[name] for name in names}}
            at_a, at_b = (pack(density.slope(u, names), names) for u in (a, b))
            change = (at_a * (pack(b, names) - pack(a, names))).sum(-1)
            f = density.log_prob(a)
            return close(at_a, at_b) & close(density.log_prob(b), f + change, jnp.abs(f).max())

        return jax.lax.map(trial, pairs).all()

    @partial(jax.jit, static_argnums=0)
    def quadratic(names, pairs):
        """f'(a + d) + f'(a - d) = 2 f'(a), f(a + d) - f(a - d) = 2 f'(a) d; and what the curvature is like."""
        first = jax.tree.map(lambda a: a[0, :1], pairs)
        tangent = pack(first[1], names) - pack(first[0], names)

        def trial(pair):
            a, b = pair
            flat, d = pack(a, names), pack(b, names) - pack(a, names)

            def at(flat):
                return {**a, **unpack(flat, a, names)}

            def slope(flat):
                return pack(density.slope(at(flat), names), names)

            middle, up, down = slope(flat), slope(flat + d), slope(flat - d)
            good = close(0.5 * (up + down), middle, jnp.abs(up).max())
            rise, expected = density.log_prob(at(flat + d)) - density.log_prob(at(flat - d)), 2 * (middle * d).sum(-1)
            good &= close(rise, expected, jnp.abs(density.log_prob(at(flat + d))).max())
            rows = jnp.broadcast_to(tangent, flat.shape)
            product = jax.jvp(slope, (flat,), (rows,))[1]
            return good, product, jax.jvp(slope, (flat,), (jnp.ones_like(flat),))[1] * rows

        good, product, diagonal = jax.lax.map(trial, pairs)
        return good.all(), close(product, product[:1, :1]), close(product, diagonal)

    blocks = []
    kinds = {name: energy.latents[name].kind for name in moving if name in energy.latents}
    real = [VISIBLE] if VISIBLE in moving and x[VISIBLE].shape[1] else []
    real += [name for name, kind in kinds.items() if kind == "real"]
    seen: dict[tuple[str, ...], tuple[bool, bool]] = {}

    def is_gaussian(names):
        good, constant, diagonal = (bool(z) for z in quadratic(names, pairs))
        seen[names] = constant, diagonal
        return good and (constant or diagonal or pack(x, names).shape[1] <= MAX_FULL)

    groups, rest = _partition(tuple(real), is_gaussian)
    blocks += [Block("gaussian", names, *seen[names]) for names in groups]
    blocks += [Block("free", (name,)) for name in rest]
    soft = tuple(name for name, kind in kinds.items() if kind in ("bits", "onehot"))
    groups, rest = _partition(soft, lambda names: bool(affine(names, pairs)))
    blocks += [Block("affine", names) for names in groups]
    for name in rest:
        multilinear = is_multilinear(rng_key, density.log_prob, x, energy.latents, name)
        blocks.append(Block("units", (name,), is_multilinear=multilinear))
    blocks += [Block("units", (name,)) for name, kind in kinds.items() if kind == "labels"]
    return tuple(blocks)


def _partition(
    names: tuple[str, ...], test: Callable[[tuple[str, ...]], bool]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """Groups of names, as large as pass the test together, and the names that fail it by themselves."""
    if not names:
        return [], []
    if test(names):
        return [names], []
    groups: list[tuple[str, ...]] = []
    rest = []
    for name in names:
        for i, group in enumerate(groups):
            if test((*group, name)):
                groups[i] = (*group, name)
                break
        else:
            if test((name,)):
                groups.append((name,))
            else:
                rest.append(name)
    return groups, rest


def random_points(rng_key: Array, x: Point, latents: Mapping[str, Latent], spread: Array) -> Point:
    """Anywhere that the variables may be."""
    found = {}
    with jax.ensure_compile_time_eval():
        # NumPy's generator: JAX's would be compiled for every shape, and that takes longer than all else here
        generator = np.random.default_rng(np.asarray(jax.random.key_data(rng_key)))
        for name, value in x.items():
            latent = latents.get(name)
            if latent is None or latent.kind == "real":
                scale = np.asarray(spread) if latent is None else 1.0
                moved = np.asarray(value) + scale * generator.standard_normal(value.shape)
            else:
                support = np.asarray(latent.support(value.dtype))
                moved = support[generator.integers(len(support), size=(len(value), *latent.units))]
            found[name] = jnp.asarray(moved, value.dtype)
    return found


def random_labels(rng_key: Array, latent: Latent, m: int, dtype: Any) -> Array:
    """Values of a discrete site, all as likely, for m rows."""
    support = latent.support(dtype)
    return support[jax.random.randint(rng_key, (m, *latent.units), 0, len(support))]


def replaced(value: Array, latent: Latent, unit: Any, new: Array) -> Array:
    """A site's value with one unit, counted in order, at another value: one for all rows, or one for each."""
    flat = value.reshape(len(value), -1, *value.shape[1 + len(latent.units) :])
    return flat.at[:, unit].set(new).reshape(value.shape)


def is_multilinear(
    rng_key: Array, log_prob: Callable[[Point], Array], seen: Point, latents: Mapping[str, Latent], name: str
) -> bool:
    """f(b) - f(a) = f'(a) (b - a) as b differs from a in a single unit, for every unit."""

    @jax.jit
    def trial(a, b):
        latent, f = latents[name], log_prob(a)
        slope = jax.grad(lambda value: log_prob({**a, name: value}).sum())(a[name])
        others = b[name].reshape(len(f), -1, *b[name].shape[1 + len(latent.units) :])

        def of(unit):
            other = replaced(a[name], latent, unit, others[:, unit])
            expected = (slope * (other - a[name])).reshape(len(f), -1).sum(-1)
            return close(log_prob({**a, name: other}), f + expected, jnp.abs(f).max())

        return jax.lax.map(of, jnp.arange(others.shape[1])).all()

    return bool(trial(*(random_points(key, seen, latents, jnp.ones(())) for key in jax.random.split(rng_key))))
