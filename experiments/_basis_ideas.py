"""Ideas for a fusion in few numbers or from few examples, as entries for the registry of methods.

    vectors             VeRA's two vectors at every matrix, on the pool's directions in place of random ones
    fusion-vectors      the same vectors around the mixed modules of a fusion in a basis
    whitened            coefficients that start at the mean module, in coordinates in which the modules are orthonormal

Axis letters: L layer, N modules of a fusion, P modules of the pool, k directions.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lorafusion_jax.adapters import coefficients as coefficients_lib
from lorafusion_jax.adapters.basis import SharedBasis
from lorafusion_jax.adapters.norms import product
from lorafusion_jax.adapters.pool import LoraPool
from lorafusion_jax.adapters.updates import LowRank
from lorafusion_jax.methods import find
from lorafusion_jax.methods.fusion import Fusion, build
from lorafusion_jax.models.weights import Weight, dense
from lorafusion_jax.training.problem import Frozen, Method, Params
from lorafusion_jax.training.recipe import Recipe

_START = 0.1  # of d, as in VeRA
_SHRINKAGE = 0.1  # of the modules' Gram matrix towards the identity


def _ones(basis: SharedBasis, d: float, b: float) -> Params:
    """Return the vectors of every matrix, each of one value: d over the directions, b over the columns."""
    return {
        "d": {site: jnp.full((u.shape[0], u.shape[2]), d) for site, u in basis.U.items()},
        "b": {site: jnp.full((v.shape[0], v.shape[2]), b) for site, v in basis.V.items()},
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vectors(Method):
    """dW = (U * d) (V * b), `b` starting at zero: VeRA (Kopiczko et al., 2024) on the pool's directions."""

    basis: int

    def learning_rates(self, recipe: Recipe) -> dict[str, float]:
        return {"vera": recipe.lr_vera}

    def prepare(self, frozen: Frozen, kernels: Mapping[str, Weight]) -> Frozen:
        assert isinstance(frozen.pool, SharedBasis)
        return dataclasses.replace(frozen, pool=frozen.pool.first(self.basis))

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        assert isinstance(frozen.pool, SharedBasis)
        return {"vera": _ones(frozen.pool, _START, 0.0)}

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        assert isinstance(basis := frozen.pool, SharedBasis)
        d, b = params["vera"]["d"], params["vera"]["b"]
        return {s: LowRank(u * d[s][:, None], basis.V[s] * b[s][:, None]) for s, u in basis.U.items()}, {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionWithVectors(Fusion):
    """A fusion in a basis whose directions and columns are scaled: dW = (U * d) (sum_n c_n S_n) (V * b), from ones."""

    def learning_rates(self, recipe: Recipe) -> dict[str, float]:
        return super().learning_rates(recipe) | {"vera": recipe.lr_vera}

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        assert isinstance(frozen.pool, SharedBasis)
        return super().init(frozen, index, key) | {"vera": _ones(frozen.pool, 1.0, 1.0)}

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        assert isinstance(basis := frozen.pool, SharedBasis) and frozen.gram is not None
        d, b = params["vera"]["d"], params["vera"]["b"]
        scaled = dataclasses.replace(
            basis,
            U={site: u * d[site][:, None] for site, u in basis.U.items()},
            V={site: v * b[site][:, None] for site, v in basis.V.items()},
        )
        cross = {site: terms * d[site][:, :, None] for site, terms in frozen.gram.cross.items()}
        frozen = dataclasses.replace(frozen, pool=scaled, gram=dataclasses.replace(frozen.gram, cross=cross))
        return super().adapters({g: p for g, p in params.items() if g != "vera"}, frozen, index)

    def trainable(self, params: Params, frozen: Frozen, index: Int[Array, " N"]) -> Params:
        rest = super().trainable({g: p for g, p in params.items() if g != "vera"}, frozen, index)
        return rest | {"vera": jax.tree.map(lambda p: jnp.ones(p.shape, bool), params["vera"])}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenWithProducts(Frozen):
    """Frozen weights and the inner products of the modules.

    Attributes:
      products: <dW_m, dW_n> of whole blocks.
    """

    products: Float[Array, "*C blocks P P"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whitened(Fusion):
    """A fusion with c = 1 / N + G^(-1/2) z in every block, z starting at zero.

    G holds the modules' inner products over a block, divided by their mean square and shrunk towards the identity, so
    that L2 on z is the distance of the fused update from the mean module's.
    """

    def prepare(self, frozen: Frozen, kernels: Mapping[str, Weight]) -> Frozen:
        prepared = super().prepare(frozen, kernels)
        assert isinstance(pool := prepared.pool, LoraPool)
        fields = {field.name: getattr(prepared, field.name) for field in dataclasses.fields(Frozen)}
        return FrozenWithProducts(**fields, products=jax.jit(inner_products)(pool))

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        params = super().init(frozen, index, key)
        return params | {"coefficients": jnp.zeros_like(params["coefficients"])}

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        assert isinstance(frozen, FrozenWithProducts)
        N, products = len(index), frozen.products[:, index][:, :, index]
        squares = jnp.trace(products, axis1=1, axis2=2)[:, None, None] / N
        G = (1 - _SHRINKAGE) * products / squares + _SHRINKAGE * jnp.eye(N)[None]
        values, vectors = jnp.linalg.eigh(G)
        z = params["coefficients"]
        c = 1 / N + jnp.einsum("bij,bj,bkj,kb->ib", vectors, values**-0.5, vectors, z, precision="highest")
        return super().adapters(params | {"coefficients": c}, frozen, index)


def inner_products(pool: LoraPool) -> Float[Array, "blocks P P"]:
    """Return <dW_m, dW_n> of all modules, summed over the matrices of every block."""

    def of_site(A: Float[Array, "L P d r"], B: Float[Array, "L P r e"]) -> Float[Array, "L P P"]:
        def of_pair(Am: Array, Bm: Array, An: Array, Bn: Array) -> Array:
            return jnp.sum(product(Am.T, An) * product(Bm, Bn.T))

        over_n = jax.vmap(of_pair, (None, None, 0, 0))
        return jax.lax.map(lambda layer: jax.vmap(over_n, (0, 0, None, None))(*layer, *layer), (A, B))

    by_site = {s: of_site(*(dense(factor[s], jnp.float32) for factor in (pool.A, pool.B))) for s in pool.rank}
    P, blocks = coefficients_lib.shape(pool, len(pool), "block")
    # The sum over a block's matrices is the transpose of giving them all the block's coefficient.
    give = partial(coefficients_lib.expand, pool=pool, granularity="block")
    collect = jax.linear_transpose(give, jax.ShapeDtypeStruct((P, blocks), jnp.float32))
    rows = [collect({s: products[:, :, n, None] for s, products in by_site.items()})[0] for n in range(P)]
    return jnp.stack(rows, axis=2).swapaxes(0, 1)


_FUSION = dataclasses.replace(find("fusion"), title=None, basis_title=None, placements=lambda billed: {})
ENTRIES = (
    dataclasses.replace(
        _FUSION,
        name="vectors",
        help="train two vectors for each matrix on the directions of a basis",
        build=lambda built: Vectors(basis=built.recipe.basis),
        groups=("vera",),
    ),
    dataclasses.replace(
        _FUSION,
        name="fusion-vectors",
        help="a fusion in a basis with a vector over the directions and one over the columns",
        build=partial(build, kind=FusionWithVectors),
        groups=("coefficients", "magnitudes", "vera"),
    ),
    dataclasses.replace(
        _FUSION,
        name="whitened",
        help="a fusion with whitened coefficients around the mean module",
        build=partial(build, kind=Whitened),
        in_basis=False,
    ),
)
