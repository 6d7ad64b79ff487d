"""Pools, fusions, bases and merges that cannot be are refused before anything is computed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import tiny
from flax import nnx
from refusals import refusals

import lorafusion_jax as lf
from lorafusion_jax.adapters import expand
from lorafusion_jax.adapters.basis import directions, in_directions
from lorafusion_jax.adapters.composition import compose_in_basis
from lorafusion_jax.adapters.merges import check_merge, merge
from lorafusion_jax.adapters.norms import pair_terms
from lorafusion_jax.io import fused_adapter

_MODEL = tiny.t5()
_KERNELS = lf.kernels(_MODEL)
_KEY = jax.random.key(0)
_POOL = tiny.pool(4)
_MIXED = tiny.pool(4, lambda n, site, layer: 2 + n % 2)
_DORA = replace(_POOL, magnitude={})
_BASIS = lf.shared_basis(_POOL, 3)
_ALL = jnp.arange(4)
_EVEN = jnp.array([0, 2])  # of one rank
_ONES = expand(jnp.ones(4), _POOL, "global")
_TWO = expand(jnp.ones(2), _POOL, "global")


def _start(method, frozen):
    return method.adapters(method.init(frozen, _ALL, _KEY), frozen, _ALL)


def _precompute(method, pool):
    return method.precompute(lf.Frozen(nnx.state(_MODEL), pool), _KERNELS)


def _first_layers(pool):
    fields = {
        field: {site: w[:1] for site, w in getattr(pool, field).items()}
        for field in ("A", "B", "rank")
    }
    return replace(pool, **fields)


_RANKS = "different ranks.*use the composition sum"
_BY_PAIRS = "a sum of digital modules with one coefficient each: precompute the frozen"
_NO_FACTORS = "lacks a mix's factors"
_MAGNITUDES = "a DoRA adapter has magnitudes"
_NORMS = lf.column_norms(tiny.frozen(_MODEL, _POOL).gram)
_REFUSED = [
    # Pools.
    (lambda: _POOL.select([]), "a pool needs at least one adapter: none was given"),
    (lambda: _BASIS.select([]), "a pool needs at least one adapter: none was given"),
    (
        lambda: _POOL.select(["module_9"]),
        "the pool lacks 'module_9': choose one of 4, 'module_0' to 'module_3'",
    ),
    (lambda: _POOL.select([4]), "the pool lacks 4"),
    (lambda: _POOL.select([-1]), "the pool lacks -1"),
    (lambda: _POOL.select(["module_1", 1]), "chosen twice"),
    (lambda: _POOL.select("module_1"), "'module_1' is one name: give a list"),
    # A mix of several ranks.
    (lambda: lf.Fusion(composition="mix").check(_MIXED), _RANKS),
    (lambda: _start(lf.Fusion(composition="mix"), tiny.frozen(_MODEL, _MIXED)), _RANKS),
    (lambda: lf.compose(_MIXED, _ALL, _ONES, "mix"), _RANKS),
    # The values of an index are not known inside a compiled function, so all modules count.
    (lambda: jax.jit(lambda i: lf.compose(_MIXED, i, _TWO, "mix"))(_EVEN), _RANKS),
    (
        lambda: fused_adapter(tiny.CONFIG, _MIXED, _ALL, _ONES, "mix", base="b"),
        _RANKS,
    ),
    # Fusions.
    (
        lambda: lf.Fusion(composition="mix", start="zeros"),
        "a mix that starts at zero never moves.*composition sum",
    ),
    (
        lambda: lf.Fusion().init(lf.Frozen(nnx.state(_MODEL)), _ALL, _KEY),
        "needs a pool and its Gram terms",
    ),
    (
        lambda: lf.compose(_POOL, _ALL, _ONES, "sum", magnitudes=_NORMS),
        r"Gram terms .* give gram\(pool, kernels\)",
    ),
    (
        lambda: compose_in_basis(_BASIS, _ALL, _ONES, magnitudes=_NORMS),
        r"Gram terms .* give gram\(basis, kernels\)",
    ),
    (
        lambda: _start(
            lf.Fusion(composition="mix"), tiny.frozen(_MODEL, _POOL, pair_terms)
        ),
        _BY_PAIRS,
    ),
    (
        lambda: _start(
            lf.Fusion(granularity="rank"), tiny.frozen(_MODEL, _POOL, pair_terms)
        ),
        _BY_PAIRS,
    ),
    # Shared bases.
    (lambda: lf.shared_basis(_POOL, 0), "0 directions: expected at least 1"),
    (lambda: lf.shared_basis(_POOL, 13), "is 16 x 12: use at most 12"),
    (
        lambda: directions(_POOL.select([0]), 5),
        "1 modules of rank 4 .* at most 4",
    ),
    (lambda: _BASIS.first(4), "has 3 directions, not 4"),
    (
        lambda: _precompute(lf.Fusion(basis=2), _POOL),
        "no shared basis: run `lorafusion convert",
    ),
    (
        lambda: in_directions(_POOL, directions(_first_layers(_POOL), 3)),
        r"give ones for \(3, 16, 12\)",
    ),
    (lambda: lf.Fusion(basis=4, composition="mix"), _NO_FACTORS),
    (lambda: _precompute(lf.Fusion(composition="mix"), _BASIS), _NO_FACTORS),
    (
        lambda: lf.Fusion(basis=4, granularity="rank"),
        "a shared basis mixes the modules' ranks",
    ),
    (lambda: lf.shared_basis(_DORA, 3), _MAGNITUDES),
    (
        lambda: lf.shared_basis(_POOL.quantised("int8"), 3),
        "are QArray: give plain arrays, not quantised ones",
    ),
    # Merges.
    (
        lambda: lf.Merge(kind="ties").check(_MIXED),
        "different ranks, and ties adds .* use cat or svd, or",
    ),
    (
        lambda: check_merge(_MIXED, "linear"),
        "and linear adds .* use cat or svd, or a pool of one rank",
    ),
    (lambda: check_merge(_DORA, "svd"), _MAGNITUDES),
    (lambda: merge(_DORA, _ALL, jnp.ones(4), "cat"), _MAGNITUDES),
    (
        lambda: merge(_POOL, _ALL, jnp.ones(4), "dare_ties"),
        "dare_ties keeps random entries: give a key",
    ),
    (
        lambda: lf.Merge(kind="linear").check(_BASIS),
        "a merge needs a pool of whole modules",
    ),
    (
        lambda: lf.Merge(kind="linear").init(lf.Frozen(nnx.State({})), _ALL, _KEY),
        "a merge needs a pool",
    ),
    (
        lambda: lf.Merge(kind="ties", density=0.0),
        "density is 0.0: give the share",
    ),
    (lambda: lf.Merge(kind="ties", density=1.5), "density is 1.5"),
]


test_what_cannot_be_is_refused = refusals(_REFUSED)


def test_several_ranks_are_taken_where_no_matrices_are_added():
    lf.Fusion(composition="mix").check(tiny.pool(4, tiny.somewhere))
    lf.Fusion(composition="sum").check(_MIXED)
    lf.Merge(kind="cat").check(_MIXED)
    lf.Merge(kind="svd").check(_MIXED)
