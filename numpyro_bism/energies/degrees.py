r"""Bounds on the degree of a function in groups of variables: the values of an abstract interpretation.

A :class:`Degrees` stands for all functions that are sums of terms

.. math:: c \prod_g p_g(x_g), \qquad \deg p_g \le d_g \;\text{ for one of its vectors } d,

a polynomial in every group g of total degree :math:`d_g`, or any function of it at all where :math:`d_g = \infty`.
Sums, products and contractions of such functions have bounds that follow from those of their operands; whatever is
not known to be a polynomial of its operands is :meth:`Degrees.arbitrary`. A bound may be too large, and is never too
small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

MAX_TERMS = 64  # of one bound; beyond, it is widened
MAX_DEGREE = 8  # higher ones are as good as infinite: nothing here has a closed form from degree 3 on

Term = frozenset[tuple[str, float]]


@dataclass(frozen=True)
class Degrees:
    """An upper bound.

    :ivar terms: vectors of degrees, each a set of pairs of group and degree above 0; none is below another.
    """

    terms: frozenset[Term] = frozenset([frozenset()])

    @classmethod
    def of(cls, group: str, degree: float = 1) -> Degrees:
        """Of a variable itself."""
        return cls(frozenset([frozenset([(group, degree)])]))

    @property
    def groups(self) -> frozenset[str]:
        """All that the function may depend on."""
        return frozenset(group for term in self.terms for group, _ in term)

    @property
    def is_constant(self) -> bool:
        """Whether it depends on nothing."""
        return not self.groups

    def __or__(self, other: Degrees) -> Degrees:
        """Of a sum, or of a choice between two that depends on nothing."""
        return self if self == other else _pruned(self.terms | other.terms)

    def __mul__(self, other: Degrees) -> Degrees:
        """Of a product or a contraction."""
        if self.is_constant or other.is_constant:
            return other if self.is_constant else self
        return _pruned(_product(a, b) for a in self.terms for b in other.terms)

    def __pow__(self, exponent: int) -> Degrees:
        """Of a power with a whole exponent, 0 or more."""
        if exponent > MAX_DEGREE:
            return self.arbitrary()
        found = Degrees()
        for _ in range(exponent):
            found = found * self
        return found

    def arbitrary(self, *others: Degrees) -> Degrees:
        """Of any function of this and the others."""
        groups = self.groups.union(*(other.groups for other in others))
        return Degrees(frozenset([frozenset((group, math.inf) for group in groups)]))

    def within(self, groups: Iterable[str]) -> float:
        """The total degree in these groups together, all others held."""
        names = set(groups)
        return max(sum(degree for group, degree in term if group in names) for term in self.terms)

    def beside(self, groups: Iterable[str], degree: float) -> frozenset[str]:
        """On which other groups the coefficients of what has at least this degree in these groups may depend."""
        names = set(groups)
        high = [term for term in self.terms if sum(d for group, d in term if group in names) >= degree]
        return frozenset(group for term in high for group, _ in term if group not in names)


def _product(a: Term, b: Term) -> Term:
    degrees = dict(a)
    for group, degree in b:
        degrees[group] = degrees.get(group, 0) + degree
    return frozenset((group, degree if degree <= MAX_DEGREE else math.inf) for group, degree in degrees.items())


def _pruned(terms: Iterable[Term]) -> Degrees:
    kept: list[Term] = []
    for term in sorted(set(terms), key=lambda t: -sum(degree for _, degree in t)):
        degrees = dict(term)
        if not any(all(dict(other).get(g, 0) >= d for g, d in degrees.items()) for other in kept):
            kept.append(term)
    found = Degrees(frozenset(kept))
    return found if len(kept) <= MAX_TERMS else found.arbitrary()
