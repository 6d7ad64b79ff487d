"""Ideas for a fusion in few numbers or from few examples, as entries for the registry of methods.

    whitened    coefficients that start at the mean module, in coordinates in which the modules are orthonormal

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
from lorafusion_jax.adapters.norms import product
from lorafusion_jax.adapters.pool import LoraPool
from lorafusion_jax.methods import find
from lorafusion_jax.methods.fusion import Fusion, build
from lorafusion_jax.models.weights import Weight, dense
from lorafusion_jax.training.problem import Frozen, Params

_SHRINKAGE = 0.1  # of the modules' Gram matrix towards the identity


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
        name="whitened",
        help="a fusion with whitened coefficients around the mean module",
        build=partial(build, kind=Whitened),
        in_basis=False,
    ),
)
