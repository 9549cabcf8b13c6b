"""What a guide has to be: it sees v, and its density can be had at fixed h.

**Sight.** The score is right where q(h|v) is the posterior at the very v at which it is taken: at data perturbed by the
loss, or around them. A guide that does not look at v, an autoguide with its parameters for each datapoint, can't
be that. Averaging does not mend it, not even an infinite number of draws: E_q ∇_v log p̃(ṽ, h) under q = q(h|v), fitted
at the clean v, is the mean over another distribution than p(h|ṽ), and knows v besides, which the noise was to hide.
With ``ScoreMatching`` the trace lacks Cov_q(∇_v log p̃) in the same way. ``Exact`` and ``Covariance`` change how J is
differentiated, not J; and they put the guide in the posterior's place once more. A site summed out is summed under
q, so its q has to see v too. Only a model without latents asks for nothing here.

**Change of variables.** A guide may draw a ~ q(a|v), an auxiliary site, and state h = T(a, v) as a ``Delta`` with the
log density -log |∂T/∂a|. Then log q(h|v) = log q(a|v) - log |∂T/∂a| at a = a(v), the solution of T(a, v) = h: as v
moves and h stays, a has to move. Its derivatives at the draw are those of Newton's iterates from the draw itself.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.infer.autoguide import AutoContinuous, AutoDAIS

from ..distributions import base_of, is_averaged

NEWTON_STEPS = 2  # the error is of order 2, then 4: two derivatives in v are exact
SEARCH_STEPS = 20  # for h that the guide has not drawn

Sites = Mapping[str, Any]
GuideAt = Callable[[Array, Mapping[str, Array]], Sites]
"""The guide's sites at v, where some of them are given."""


@dataclass(frozen=True)
class ChangeOfVariables:
    """The sites of a guide that draws a and computes h = T(a, v).

    :ivar auxiliary: those of a.
    :ivar computed: those of h.
    """

    auxiliary: tuple[str, ...]
    computed: tuple[str, ...]

    def matched(
        self, guide_at: GuideAt, v: Array, values: Mapping[str, Array], num_steps: int = NEWTON_STEPS
    ) -> dict[str, Array]:
        """``values`` with a(v) in place of a, and without h, which the guide computes from it.

        :param values: a draw (a, h) of the guide, at this v or, under derivatives, at one that differs by nothing.
            After more steps h may be any, and a somewhere near: see :meth:`distance`.
        """
        rest = {name: value for name, value in values.items() if name not in (*self.auxiliary, *self.computed)}
        a, h = _rows(values, self.auxiliary), _rows(values, self.computed)
        for _ in range(num_steps):
            image, jacobian = self._image(guide_at, v, rest, values, a)
            a = a - jnp.linalg.solve(jacobian, (image - h)[..., None])[..., 0]
        return {**rest, **self._parts(a, values)}

    def distance(self, sites: Sites, latents: Mapping[str, Array]) -> Array:
        """How far h as the guide has computed it is from the one wanted, relatively, by row."""
        h = _rows(latents, self.computed)
        return (jnp.abs(_rows(sites, self.computed) - h) / (1 + jnp.abs(h))).max(-1)

    def check(self, guide_at: GuideAt, v: Array, values: Mapping[str, Array]) -> None:
        """Check whether T(., v) is one-to-one, row by row, and whether its sites say its density.

        :raises ValueError: where it is not, or they do not.
        """
        names = ", ".join(f"'{name}'" for name in self.computed)
        from_names = ", ".join(f"'{name}'" for name in self.auxiliary)
        cure = (
            f"Sample {names} from the density itself (dist.Normal(loc(v), scale(v)), a dist.TransformedDistribution), "
            "or take guide=AmortizedGuide(model)."
        )
        for name in (*self.auxiliary, *self.computed):
            if values[name].shape[:1] != v.shape[:1] or not jnp.issubdtype(values[name].dtype, jnp.floating):
                raise ValueError(
                    f"Guide site(s) {names} are computed from {from_names} and from v, but '{name}' of shape "
                    f"{jnp.shape(values[name])} has not the batch of {len(v)} as its leading dimension: log q(h|v) "
                    f"can't be had at fixed h. {cure}"
                )
        rest = {name: value for name, value in values.items() if name not in (*self.auxiliary, *self.computed)}
        a = _rows(values, self.auxiliary)
        num_in, num_out = a.shape[1], _rows(values, self.computed).shape[1]
        if num_in != num_out:
            raise ValueError(
                f"Guide site(s) {names}, of {num_out} numbers a row, are computed from v and from {from_names}, of "
                f"{num_in}: such a map has no density at fixed h. {cure}"
            )
        image, jacobian = self._image(guide_at, v, rest, values, a)
        other = _rows(guide_at(v, {**rest, **self._parts(a.at[0].add(0.5), values)}), self.computed)
        if not jnp.array_equal(other[1:], image[1:]):
            raise ValueError(f"Guide site(s) {names}: a row is computed from other rows' draws of {from_names}. {cure}")
        log_volume = jnp.linalg.slogdet(jacobian)[1]
        sites = guide_at(v, {**rest, **self._parts(a, values)})
        said: Any = sum(sites[name].log_prob().reshape(len(v), -1).sum(-1) for name in self.computed)
        if not jnp.isfinite(log_volume).all():
            raise ValueError(
                f"Guide site(s) {names} are computed from {from_names} and v by a map that has no inverse. {cure}"
            )
        tolerance = jnp.finfo(v.dtype).eps ** 0.5 * (1 + jnp.abs(log_volume).max())
        if jnp.abs(said + log_volume).max() > tolerance:
            raise ValueError(
                f"Guide site(s) {names} are computed from {from_names}, with a log_density of {float(said[0]):.4g} in "
                f"the first row where -log |dh/da| is {-float(log_volume[0]):.4g}: log q(h|v) is wrong then. Pass "
                f"dist.Delta(h, log_density=-log|dh/da|). {cure}"
            )

    def _image(
        self, guide_at: GuideAt, v: Array, rest: Mapping[str, Array], like: Mapping[str, Array], a: Array
    ) -> tuple[Array, Array]:
        """T(a, v) of shape (n, d) and ∂T/∂a of shape (n, d, d)."""

        def image(a: Array) -> Array:
            return _rows(guide_at(v, {**rest, **self._parts(a, like)}), self.computed)

        value, push = jax.linearize(image, a)
        # all rows at once: no row's h is computed from another row's a
        columns = jax.vmap(lambda e: push(jnp.broadcast_to(e, a.shape)))(jnp.eye(a.shape[1], dtype=a.dtype))
        return value, jnp.moveaxis(columns, 0, -1)

    def _parts(self, a: Array, like: Mapping[str, Array]) -> dict[str, Array]:
        parts, start = {}, 0
        for name in self.auxiliary:
            size = math.prod(like[name].shape[1:])
            parts[name] = a[:, start : start + size].reshape(like[name].shape)
            start += size
        return parts


def _rows(values: Mapping[str, Any], names: Sequence[str]) -> Array:
    found = [getattr(values[name], "value", values[name]) for name in names]
    return jnp.concatenate([x.reshape(len(x), -1) for x in found], -1)


def change_of_variables(
    guide_at: GuideAt, v: Array, values: Mapping[str, Array], auxiliary: Sequence[str], deltas: Sequence[str]
) -> ChangeOfVariables | None:
    """Which sites are computed from auxiliary draws *and* from v; None if none are.

    Where the map does not depend on v, as in an autoguide, h stays where its auxiliary draws stay.

    :param auxiliary: sites that the guide draws and the model does not have.
    :param deltas: the guide's points.
    :raises ValueError: for an auxiliary site that no other determines.
    """
    if not auxiliary:
        return None

    def moved(u: Array, others: Sequence[str] = ()) -> set[str]:
        """The points that change with v, or with these auxiliary draws."""
        given = {name: value + 0.5 if name in others else value for name, value in fixed.items()}
        sites = guide_at(u, given)
        return {name for name in deltas if not bool(_same(sites[name].value, values[name]))}

    fixed = {name: value for name, value in values.items() if name not in deltas}
    drawn = [name for name in auxiliary if jnp.issubdtype(values[name].dtype, jnp.floating)]
    depends = {name: moved(v, [name]) for name in drawn}
    for name in auxiliary:
        size, images = values[name].size, sum(values[d].size for d in depends.get(name, ()))
        if images < size:
            raise ValueError(
                f"The guide's auxiliary site '{name}' is not determined by the latents that are computed from it: "
                "log q(h|v) would be an integral over it. Compute a latent from all of it by a one-to-one map "
                "(dist.Delta), sample the latents from their density, or take guide=AmortizedGuide(model)."
            )
    with_v: set[str] = set().union(*[moved(u) for u in _moves(v)])
    computed: set[str] = {d for d in with_v if any(d in images for images in depends.values())}
    while True:  # all that is computed from these draws, and all draws that those are computed from
        sources = {name for name, images in depends.items() if images & computed}
        closure = set().union(computed, *[depends[name] for name in sources])
        if closure == computed:
            break
        computed = closure
    if not computed:
        return None
    return ChangeOfVariables(
        tuple(name for name in auxiliary if name in sources), tuple(name for name in deltas if name in computed)
    )


def refuse_autoguide(guide: Any) -> None:
    """Check whether it is an autoguide of the host's, before it runs: a flow takes a minute to compile.

    :raises ValueError: for one, as it does not look at the visible values.
    """
    if isinstance(guide, AutoDAIS):  # it follows the model's gradient: what it lacks is a density, and that is said
        return
    if isinstance(guide, AutoContinuous) and type(guide).__module__ == AutoContinuous.__module__:
        raise ValueError(
            f"{type(guide).__name__} does not look at the visible values: it has one posterior for all data, and the "
            "model learnt would be wrong. Take guide=AmortizedGuide(model)."
        )


def check_points(guide_at: GuideAt, other: GuideAt, v: Array, values: Mapping[str, Any], names: Sequence[str]) -> None:
    """Point masses that are computed from no draw of a statement.

    :param other: the guide with other random numbers than those of ``guide_at``.
    :param values: of all sites.
    :raises ValueError: for one that has a density after all, of draws that nobody sees.
    """
    given = {name: value for name, value in values.items() if name not in names}
    if not names:
        return
    sites = guide_at(v, given)
    for seen in (other(v, given), *(guide_at(u, given) for u in _moves(v))):
        for name in names:
            densities = [jnp.asarray(base_of(s.fn).log_density) for s in (seen[name], sites[name])]
            if bool(_same(*densities)):
                continue
            raise ValueError(
                f"Guide site '{name}' is a dist.Delta whose log_density is not the same at all v and all draws, and "
                "what it is computed from is drawn by no sample statement: log q at fixed h can't be had. Draw that by "
                "numpyro.sample('e', dist.Normal(0., 1.), infer={'is_auxiliary': True}), with log_density=-log|dh/de|; "
                f"or sample '{name}' from the density itself."
            )


def _moves(v: Array) -> Array:
    """Other places, stacked: near by, and far off, where something badly scaled is not saturated."""
    spread = v.std() if v.size > 1 else jnp.abs(v).max()
    near = v + (spread + 1e-3) * jax.random.normal(jax.random.key(0), v.shape, v.dtype)
    return jnp.stack([near, jnp.zeros_like(v), -v + 1.0])


def _same(x: Any, y: Any) -> Array:
    return jnp.array_equal(x, y, equal_nan=True)


def _off_mean(site: Any) -> Array:
    """A draw; of a site that is summed out, whose draw is its mean, another value: there its density has no slope."""
    return jnp.square(site.value) if is_averaged(site.fn) else site.value


class Sight(NamedTuple):
    """How the guide's latents look at v, by name; booleans.

    :ivar seeing: whether its draws or its density move with v.
    :ivar changing: whether its density does at fixed draws.
    :ivar sloped: whether its density has a gradient in v.
    """

    seeing: Mapping[str, Any]
    changing: Mapping[str, Any]
    sloped: Mapping[str, Any]


def sight(guide_at: GuideAt, v: Array, change: ChangeOfVariables | None) -> Sight:
    """How the latents look at v. Values decide, not traces: ``0 * v`` is blind.

    :param guide_at: with the same random numbers at every call.
    :param change: the sites that are computed from v and from other draws.
    """
    base = guide_at(v, {})
    drawn = {name: site.value for name, site in base.items()}
    hidden = change.computed if change else ()
    given = {name: _off_mean(base[name]) for name in drawn if name not in hidden}

    def log_probs(u: Array) -> dict[str, Array]:
        sites = guide_at(u, given)
        return {name: site.log_prob() for name, site in sites.items() if not site.is_delta}

    at_v, pull = jax.vjp(log_probs, v)
    slopes = {name: pull({k: jnp.full_like(x, float(k == name)) for k, x in at_v.items()})[0] for name in at_v}

    def looked(u: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        sites, scored = guide_at(u, {}), log_probs(u)
        moved = {name: ~_same(sites[name].value, drawn[name]) for name in drawn}
        return moved, {name: ~_same(scored[name], at_v[name]) for name in at_v}

    moved, changed = jax.vmap(looked)(_moves(v))
    changing = {name: x.any() for name, x in changed.items()}
    seeing = {name: x.any() | changing.get(name, False) for name, x in moved.items()}
    return Sight(seeing, changing, {name: (x != 0).any() for name, x in slopes.items()})


def require_sight(latents: Sequence[str], found: Sight) -> None:
    """Check whether all latents look at v, and by steps that have a gradient.

    :param found: with the present parameters, and with others near by: weights that start at zero are not blind.
    :raises ValueError: for a latent that does not look at v, or loses its gradient in v.
    """
    for name in latents:
        if not found.seeing[name].any():
            raise ValueError(
                f"Guide site '{name}' does not look at the visible values: neither its draws nor its density move with "
                "them. The score is taken at data that have moved, where such a guide is not the posterior, and the "
                "model learnt would be wrong, whatever average= and num_particles= are. Compute the site from the "
                "guide's argument (it is given the perturbed data), or take guide=AmortizedGuide(model)."
            )
    for name in found.changing:
        if found.changing[name].any() and not found.sloped[name].any():
            raise ValueError(
                f"Guide site '{name}' looks at the visible values by detached or discrete steps alone: its density "
                "moves with v and has no gradient in v, which the score needs. Leave out stop_gradient() (to keep "
                "a network fixed, make it no parameter), and rounding and thresholds."
            )
