"""Arithmetic of the methods that fuse a pool: as a sum of modules, as a mix of their factors, or in a shared basis.

Letters: N modules of a fusion, P modules in memory, r rank, k directions of a basis.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..adapters.norms import pairs_are_smaller, product_is_smaller
from ..adapters.updates import Composition, matrix_is_faster
from ..models.architecture import Site
from .entry import PlannedPool, Update
from .recipes import PoolRecipe, basis_of

_GROUP = 4  # layers whose norms and fused factors `compose` computes together


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedUpdate(Update):
    """Update of a fusion.

    Attributes:
      rank: rank of one module; of a basis, the number k of its directions.
      modules: N, the number of modules.
      pool: P, the number of modules that any seed fuses; a mix reads all of them.
      magnitudes: the fusion has magnitudes.
    """

    rank: int = 16
    modules: int = 1
    pool: int = 1
    magnitudes: bool = False

    def width(self, site: Site, tokens: int) -> int:
        return self.rank

    def frozen_width(self) -> int:
        return self.pool * self.rank

    def frozen_numbers(self, sites: Sequence[Site]) -> int:
        return sum(s.layers * (self._terms() + 1) * s.d_out for s in sites)

    def _terms(self) -> int:
        return self.frozen_width()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixUpdate(FusedUpdate):
    """Update by (sum c A)(sum c B)."""

    def once(self, site: Site) -> int:
        d_in = site.d_in
        d_out = site.d_out
        r = self.rank
        factors = 2 * self.pool * r * (d_in + d_out)
        return factors + (
            2 * self.pool * r * d_out + 2 * r * r * (d_in + d_out)
            if self.magnitudes
            else 0
        )

    def gradients(self, site: Site, tokens: int) -> int:
        return 2 * (self.pool + tokens) * self.rank * (site.d_in + site.d_out)

    def working_numbers(self, sites: Sequence[Site]) -> int:
        factors = sum(s.layers * self.rank * (s.d_in + s.d_out) for s in sites)
        return _group(sites, self.pool * self.rank) + factors


@dataclasses.dataclass(frozen=True, kw_only=True)
class SumUpdate(FusedUpdate):
    """Update by sum c A B.

    Attributes:
      forms: norms form the sum as a matrix where it is smaller than its factors, and products may use it.
      pair_terms: number of inner products for each column that the norms come from (`adapters.norms.PairTerms`); 0 if
        they come from the modules.
    """

    forms: bool = False
    pair_terms: int = 0

    def width(self, site: Site, tokens: int) -> int:
        return 0 if self._multiplies(site, tokens) else self.rank * self.modules

    def is_dense(self, site: Site) -> bool:
        """Return whether the sum is formed as a whole matrix (see `adapters.updates.Dense`), never in arrays."""
        return not self.in_arrays and self.modules * self.rank >= site.d_in

    def _forms(self, site: Site) -> bool:
        needed = self.forms and self.magnitudes and not self.in_arrays
        return (
            self.is_dense(site)
            or needed
            and product_is_smaller(site.d_in, self.modules * self.rank, site.d_out)
        )

    def _multiplies(self, site: Site, tokens: int) -> bool:
        """Return whether tokens are multiplied by the sum as a matrix."""
        faster = matrix_is_faster(
            tokens, site.d_in, self.modules * self.rank, site.d_out
        )
        return self.is_dense(site) or faster and self._forms(site)

    def once(self, site: Site) -> int:
        k = self.modules * self.rank
        of_pairs = 2 * self.pair_terms * site.d_out
        if self.is_dense(site):
            return 2 * k * site.d_in * site.d_out + of_pairs
        if of_pairs:
            return of_pairs
        return _norm(k, site) if self.magnitudes else 0

    def gradients(self, site: Site, tokens: int) -> int:
        # The gradients of narrow products are a part of backpropagation.
        of_matrix = 2 * (tokens + self.modules * self.rank) * site.d_in * site.d_out
        return of_matrix if self._multiplies(site, tokens) else 0

    def working_numbers(self, sites: Sequence[Site]) -> int:
        read = [s for s in sites if not self.pair_terms or self.is_dense(s)]
        whole = sum(s.layers * s.d_in * s.d_out for s in sites if self._forms(s))
        return _group(read, self.modules * self.rank) + whole

    def _terms(self) -> int:
        return self.pair_terms or self.frozen_width()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BasisUpdate(FusedUpdate):
    """Update by U (sum c S) V: a sum of modules in a shared basis of k directions.

    In arrays, every token is multiplied by the mixed core; elsewhere the core is multiplied by V first.
    """

    def core(self, site: Site) -> int:
        return self.rank**2 if self.in_arrays else 0

    def once(self, site: Site) -> int:
        k = self.rank
        mixed = (
            2
            * k
            * k
            * (
                self.modules
                + (0 if self.in_arrays and not self.magnitudes else site.d_out)
            )
        )
        return mixed + (_norm(k, site) if self.magnitudes else 0)

    def gradients(self, site: Site, tokens: int) -> int:
        k = self.rank
        if self.in_arrays:
            of_core = tokens * self.core(site)
        else:
            of_core = k * site.d_out * (tokens + k)
        return 2 * (of_core + self.modules * k**2)

    def frozen_width(self) -> int:
        return self.rank

    def frozen_numbers(self, sites: Sequence[Site]) -> int:
        cores = sum(s.layers * self.pool * self.rank**2 for s in sites)
        return cores + super().frozen_numbers(sites)

    def working_numbers(self, sites: Sequence[Site]) -> int:
        return sum(
            s.layers * self.rank * (self.modules * self.rank + s.d_out) for s in sites
        )


def _norm(k: int, site: Site) -> int:
    """Return the FLOPs of the columns' norms of a product of rank k, in the order that `squared_columns` uses."""
    return 2 * k * min(k * (site.d_in + site.d_out), site.d_in * site.d_out)


def _group(sites: Sequence[Site], width: int) -> int:
    return max(
        (min(s.layers, _GROUP) * width * (s.d_in + 2 * s.d_out) for s in sites),
        default=0,
    )


def fused(
    recipe: PoolRecipe,
    modules: PlannedPool,
    composition: Composition,
    *,
    magnitudes: bool = False,
    shared_coefficients: bool = True,
) -> FusedUpdate:
    """Return the update of a method that fuses the recipe's number of modules, a sum in the recipe's basis.

    `shared_coefficients` means that the ranks of a module have one coefficient.
    """
    P = modules.pool
    targets = modules.targets
    shared: dict[str, Any] = {
        "modules": recipe.modules,
        "pool": P,
        "magnitudes": magnitudes,
        "targets": targets,
    }
    if composition == "mix":
        return MixUpdate(rank=modules.rank, **shared)
    if (k := basis_of(recipe)) is not None:
        return BasisUpdate(rank=k, **shared)
    in_pairs = (
        modules.accelerator
        and magnitudes
        and shared_coefficients
        and pairs_are_smaller(P, modules.rank)
    )
    pair_terms = P * (P + 1) // 2 + P if in_pairs else 0
    return SumUpdate(
        rank=modules.rank, **shared, forms=modules.forms, pair_terms=pair_terms
    )
