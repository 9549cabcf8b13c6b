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

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import pyro.poutine
import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.guide import GuideMessenger
from torch import Tensor

from ..distributions import base_of, is_averaged

NEWTON_STEPS = 2  # the error is of order 2, then 4: two derivatives in v are exact
SEARCH_STEPS = 20  # for h that the guide has not drawn

Sites = Mapping[str, Any]
GuideAt = Callable[[Tensor, Mapping[str, Tensor]], Sites]
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
        self, guide_at: GuideAt, v: Tensor, values: Mapping[str, Tensor], num_steps: int = NEWTON_STEPS
    ) -> dict[str, Tensor]:
        """``values`` with a(v) in place of a, and without h, which the guide computes from it.

        :param values: a draw (a, h) of the guide, at this v or, under derivatives, at one that differs by nothing.
            After more steps h may be any, and a somewhere near: see :meth:`distance`.
        """
        rest = {name: value for name, value in values.items() if name not in (*self.auxiliary, *self.computed)}
        a, h = _rows(values, self.auxiliary), _rows(values, self.computed)
        for _ in range(num_steps):
            a, image, jacobian = self._image(guide_at, v, rest, values, a)
            a = a - torch.linalg.solve(jacobian, image - h)
        return {**rest, **self._parts(a, values)}

    def distance(self, sites: Sites, latents: Mapping[str, Tensor]) -> Tensor:
        """How far h as the guide has computed it is from the one wanted, relatively, by row."""
        h = _rows(latents, self.computed)
        return ((_rows(sites, self.computed) - h) / (1 + h.abs())).abs().amax(-1)

    def check(self, guide_at: GuideAt, v: Tensor, values: Mapping[str, Tensor]) -> None:
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
            if values[name].shape[:1] != v.shape[:1] or not values[name].is_floating_point():
                raise ValueError(
                    f"Guide site(s) {names} are computed from {from_names} and from v, but '{name}' of shape "
                    f"{tuple(values[name].shape)} has not the batch of {len(v)} as its leading dimension: log q(h|v) "
                    f"can't be had at fixed h. {cure}"
                )
        rest = {name: value for name, value in values.items() if name not in (*self.auxiliary, *self.computed)}
        num_in, num_out = _rows(values, self.auxiliary).shape[1], _rows(values, self.computed).shape[1]
        if num_in != num_out:
            raise ValueError(
                f"Guide site(s) {names}, of {num_out} numbers a row, are computed from v and from {from_names}, of "
                f"{num_in}: such a map has no density at fixed h. {cure}"
            )
        with torch.enable_grad():
            a, image, jacobian = self._image(guide_at, v, rest, values, _rows(values, self.auxiliary).detach())
        moved = a.detach().clone()
        moved[0] += 0.5
        other = _rows(guide_at(v, {**rest, **self._parts(moved, values)}), self.computed)
        if not torch.equal(other[1:], image[1:]):
            raise ValueError(f"Guide site(s) {names}: a row is computed from other rows' draws of {from_names}. {cure}")
        log_volume = torch.linalg.slogdet(jacobian)[1].detach()
        sites = guide_at(v, {**rest, **self._parts(a.detach(), values)})
        said: Any = sum(_per_row(sites[name].log_prob().detach(), len(v)) for name in self.computed)
        if not log_volume.isfinite().all():
            raise ValueError(
                f"Guide site(s) {names} are computed from {from_names} and v by a map that has no inverse. {cure}"
            )
        tolerance = torch.finfo(v.dtype).eps ** 0.5 * (1 + log_volume.abs().max())
        if (said + log_volume).abs().max() > tolerance:
            raise ValueError(
                f"Guide site(s) {names} are computed from {from_names}, with a log_density of {float(said[0]):.4g} in "
                f"the first row where -log |dh/da| is {-float(log_volume[0]):.4g}: log q(h|v) is wrong then. Pass "
                f"dist.Delta(h, log_density=-log|dh/da|). {cure}"
            )

    def _image(
        self, guide_at: GuideAt, v: Tensor, rest: Mapping[str, Tensor], like: Mapping[str, Tensor], a: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """a with a graph, T(a, v) of shape (n, d) and ∂T/∂a of shape (n, d, d)."""
        if not a.requires_grad:
            a = a.detach().requires_grad_()
        image = _rows(guide_at(v, {**rest, **self._parts(a, like)}), self.computed)
        # the sum over rows: no row's h is computed from another row's a
        rows = [torch.autograd.grad(image[:, j].sum(), a, create_graph=True)[0] for j in range(image.shape[1])]
        return a, image, torch.stack(rows, 1)

    def _parts(self, a: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sizes = [like[name][0].numel() for name in self.auxiliary]
        parts = zip(self.auxiliary, a.split(sizes, -1), strict=True)
        return {name: part.reshape(like[name].shape) for name, part in parts}


def _rows(values: Mapping[str, Any], names: Sequence[str]) -> Tensor:
    found = [value if isinstance(value := values[name], Tensor) else value.value for name in names]
    return torch.cat([x.reshape(len(x), -1) for x in found], -1)


def _per_row(log_prob: Tensor, n: int) -> Tensor:
    return log_prob.reshape(n, -1).sum(-1)


def runs_model(guide: Callable[..., Any]) -> bool:
    """Whether it is an effect-based guide (``AutoNormalMessenger`` and its kin), which runs the model inside."""
    return isinstance(getattr(guide, "__wrapped__", guide), GuideMessenger)


def posteriors(guide: Callable[..., Any], model_params: Sequence[str]) -> Callable[..., Any]:
    """What of an effect-based guide is the guide's.

    The model's own statements, data, factors and parameters, are hidden from those who look at it.
    """

    def hidden(msg: Any) -> bool:
        observed = msg["type"] == "sample" and msg["is_observed"]
        return observed or (msg["type"] == "param" and msg["name"] in model_params)

    def run(*args: Any, **kwargs: Any) -> Any:
        with pyro.poutine.block(hide_fn=hidden):
            return guide(*args, **kwargs)

    return run


def change_of_variables(
    guide_at: GuideAt, v: Tensor, values: Mapping[str, Tensor], auxiliary: Sequence[str], deltas: Sequence[str]
) -> ChangeOfVariables | None:
    """Which sites are computed from auxiliary draws *and* from v; None if none are.

    Where the map does not depend on v, as in an autoguide, h stays where its auxiliary draws stay.

    :param auxiliary: sites that the guide draws and the model does not have.
    :param deltas: the guide's points.
    :raises ValueError: for an auxiliary site that no other determines.
    """

    def moved(u: Tensor, others: Sequence[str] = ()) -> set[str]:
        """The points that change with v, or with these auxiliary draws."""
        given = {name: value + 0.5 if name in others else value for name, value in fixed.items()}
        sites = guide_at(u, given)
        return {name for name in deltas if not _same(sites[name].value, values[name])}

    fixed = {name: value for name, value in values.items() if name not in deltas}
    drawn = [name for name in auxiliary if values[name].is_floating_point()]
    depends = {name: moved(v, [name]) for name in drawn}
    for name in auxiliary:
        size, images = values[name].numel(), sum(values[d].numel() for d in depends.get(name, ()))
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
    if isinstance(guide, AutoContinuous) and type(guide).__module__ == AutoContinuous.__module__:
        raise ValueError(
            f"{type(guide).__name__} does not look at the visible values: it has one posterior for all data, and the "
            "model learnt would be wrong. Take guide=AmortizedGuide(model)."
        )


def check_points(guide_at: GuideAt, other: GuideAt, v: Tensor, values: Mapping[str, Any], names: Sequence[str]) -> None:
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
            densities = [torch.as_tensor(base_of(s.fn).log_density) for s in (seen[name], sites[name])]
            if _same(*densities):
                continue
            raise ValueError(
                f"Guide site '{name}' is a dist.Delta whose log_density is not the same at all v and all draws, and "
                "what it is computed from is drawn by no sample statement: log q at fixed h can't be had. Draw that by "
                "pyro.sample('e', dist.Normal(0., 1.), infer={'is_auxiliary': True}), with log_density=-log|dh/de|; "
                f"or sample '{name}' from the density itself."
            )


def _moves(v: Tensor) -> list[Tensor]:
    """Other places: near by, and far off, where something badly scaled is not saturated."""
    spread = v.std() if v.numel() > 1 else v.abs().max()
    near = v + (spread + 1e-3) * torch.randn_like(v)
    return [near, torch.zeros_like(v), -v + 1.0]


def _same(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


def _off_mean(site: Any) -> Tensor:
    """A draw; of a site that is summed out, whose draw is its mean, another value: there its density has no slope."""
    value: Tensor = site.value.detach()
    return value.square() if is_averaged(site.fn) else value


class Sight(NamedTuple):
    """How the guide's latents look at v.

    :ivar blind: those that do not, at any parameters tried.
    :ivar lost: those whose density moves with v while its derivative in v is nothing.
    """

    blind: frozenset[str]
    lost: frozenset[str]

    def require(self) -> None:
        """Check whether all latents look at v, and by steps that have a gradient.

        :raises ValueError: for a site that is blind or lost.
        """
        for name in sorted(self.blind):
            raise ValueError(
                f"Guide site '{name}' does not look at the visible values: neither its draws nor its density move with "
                "them. The score is taken at data that have moved, where such a guide is not the posterior, and the "
                "model learnt would be wrong, whatever average= and num_particles= are. Compute the site from the "
                "guide's argument (it is given the perturbed data), or take guide=AmortizedGuide(model)."
            )
        for name in sorted(self.lost):
            raise ValueError(
                f"Guide site '{name}' looks at the visible values by detached or discrete steps alone: its density "
                "moves with v and has no gradient in v, which the score needs. Leave out detach() and no_grad() "
                "(to keep a network fixed, requires_grad_(False) on its weights), and rounding and thresholds."
            )


def sight(
    guide_at: GuideAt,
    v: Tensor,
    latents: Sequence[str],
    change: ChangeOfVariables | None,
    tries: Sequence[Callable[[], AbstractContextManager[Any]]],
) -> Sight:
    """How the latents look at v. Values decide, not graphs: ``0 * v`` is blind, weights that start at zero are not.

    :param guide_at: with the same random numbers at every call.
    :param change: the sites that are computed from v and from other draws.
    :param tries: contexts with parameters in force; beside the present ones others near by.
    """
    seeing: set[str] = set()
    found: set[str] = set()
    changing: set[str] = set()
    for parameters in tries:
        with parameters():
            base = guide_at(v, {})
            hidden = change.computed if change else ()
            given = {name: _off_mean(site) for name, site in base.items() if name not in hidden}
            seen, changed = _changes(guide_at, v, base, given, set(latents))
            seeing |= seen | changed
            changing |= changed
            found |= {name for name in changed if _has_gradient(guide_at, v, given, name)}
        if seeing.issuperset(latents) and changing == found:
            break
    return Sight(frozenset(set(latents) - seeing), frozenset(changing - found))


def _changes(
    guide_at: GuideAt, v: Tensor, base: Sites, given: Mapping[str, Tensor], latents: set[str]
) -> tuple[set[str], set[str]]:
    """The sites whose draws move with v, and those whose density does at fixed draws; until all latents are seen to."""
    seen: set[str] = set()
    changed: set[str] = set()
    at_v = guide_at(v, given)
    for u in _moves(v):
        drawn, scored = guide_at(u, {}), guide_at(u, given)
        seen |= {name for name in base if not _same(drawn[name].value, base[name].value)}
        drawn_sites = [name for name in base if not base[name].is_delta]
        changed |= {name for name in drawn_sites if not _same(scored[name].log_prob(), at_v[name].log_prob())}
        if latents <= seen | changed:
            break
    return seen, changed


def _has_gradient(guide_at: GuideAt, v: Tensor, given: Mapping[str, Tensor], name: str) -> bool:
    u = v.detach().clone().requires_grad_()
    log_q = guide_at(u, given)[name].log_prob().sum()
    if not log_q.requires_grad:
        return False
    (g,) = torch.autograd.grad(log_q, u, allow_unused=True)
    return g is not None and bool(g.any())
