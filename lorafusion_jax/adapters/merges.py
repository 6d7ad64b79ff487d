"""Merges of modules without data, as by PEFT's `add_weighted_adapter`: one weight a module, and no training.

With A_n, B_n the factors as PEFT keeps them, s_n the scaling and w_n the weights:

    linear            A = sum_n sign(w_n s_n) sqrt|w_n s_n| A_n,  B = sum_n sqrt|w_n s_n| B_n: cross terms, as in mix
    magnitude_prune   linear, after all but the largest share `density` of every A_n and B_n is set to zero
    dare_linear       linear, after random entries are set to zero and the others divided by the density
    ties, dare_ties   pruned as above; per entry, the weighted mean of the modules whose sign is that of their sum
    cat               dW = sum_n w_n s_n A_n B_n: the composition `sum` of `composition.compose`
    svd               that dW at the largest rank of the pool

A module without factors at a site adds nothing there and does not vote on signs. The results equal PEFT 0.21's. As in
PEFT, signs are voted on before the weights are applied, so a subtracted module votes like an added one. PEFT itself is
wrong if the first adapter has use_rslora (dW times sqrt(r)), from 0.9 to 0.20 in svd (scaled twice), and up to
0.18 for negative weights.

Sources: Yadav et al. 2023 (TIES), Yu et al. 2024 (DARE), PEFT's utils/merge_utils.py.

Axis letters: L layer, N modules merged, P modules of the pool, r rank.
"""

import zlib
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..models.weights import Weight, dense
from ..support.platform import is_traced
from .coefficients import expand
from .composition import compose
from .norms import product
from .pool import LoraPool, in_pool
from .updates import Dense, LowRank, Modules, Outputs

_OnFactors = Literal["linear", "magnitude_prune", "dare_linear", "ties", "dare_ties"]
MergeKind = Literal[_OnFactors, Literal["cat", "svd"]]


def check_merge(pool: LoraPool, kind: MergeKind) -> None:
    """Raise ValueError for merges that PEFT cannot do, which are not supported here either."""
    if pool.magnitude is not None:
        raise ValueError(
            "a DoRA adapter has magnitudes, which a merge would lose: merge plain LoRAs"
        )
    # Any ranks will do for a single module, which is only weighted. Inside a compiled function ranks have no values.
    if kind not in get_args(_OnFactors) or len(pool) == 1 or is_traced(pool.rank):
        return
    if (
        len({int(r) for rank in pool.rank.values() for r in np.unique(rank) if r > 0})
        > 1
    ):
        raise ValueError(
            f"the pool's adapters have different ranks, and {kind} adds their matrices entry by entry: "
            "use cat or svd, or a pool of one rank"
        )


def merge(
    pool: LoraPool,
    index: Int[Array, " N"],
    weights: Float[Array, " N"],
    kind: MergeKind,
    *,
    density: float = 0.5,
    key: Array | None = None,
) -> dict[str, LowRank | Dense | Modules | Outputs]:
    """Return one adapter by site, merged from modules of a pool.

    Args:
      pool: P adapters; if their scalings are unknown, they count as equal.
      index: positions of the modules, as for `compose`; a single one is only weighted, as in PEFT.
      weights: one for each module, of either sign.
      kind: the rule; `cat` gives what `compose` does, the others a `LowRank`.
      density: share of the entries that pruning keeps.
      key: PRNG key of the masks of dare; whether an entry is kept depends only on it and the module's name, site and
        layer.

    Raises:
      ValueError: as `check_merge` does; a dare without a key; an index outside of the pool.
    """
    check_merge(pool, kind)
    if kind == "cat":
        return compose(pool, index, expand(weights, pool, "global"), "sum")[0]
    if kind.startswith("dare") and key is None:
        raise ValueError(f"{kind} keeps random entries: give a key")
    factor = in_pool(len(pool), index)
    rule = "linear" if index.shape[0] == 1 else kind
    width = max(A.shape[-1] for A in pool.A.values())

    def of_layer(
        site: str, layer: tuple[Array, Weight, Weight, Array]
    ) -> tuple[Array, Array]:
        number, A, B, scaling = layer
        A = jnp.take(dense(A, jnp.float32), index, axis=0)
        B = jnp.take(dense(B, jnp.float32), index, axis=0)
        scaling = jnp.take(dense(scaling, jnp.float32), index, axis=0)

        def combined(factor: str, tasks: Array, by: Array) -> Array:
            if rule.startswith("dare") and key is not None:
                masks = dare_masks(
                    key,
                    pool.names,
                    index,
                    f"{factor} of {site}",
                    number,
                    tasks.shape[1:],
                    density,
                )
                tasks = jnp.where(masks, tasks / density, jnp.zeros_like(tasks))
            elif rule in ("ties", "magnitude_prune"):
                tasks = jax.vmap(partial(_largest, count=int(density * tasks[0].size)))(
                    tasks
                )
            return (_elected if rule.endswith("ties") else _summed)(
                tasks, by[:, None, None]
            )

        if kind == "svd":
            U, S, Vt = jnp.linalg.svd(
                _summed(product(A, B), weights[:, None, None]), full_matrices=False
            )
            return U[:, :width], S[:width, None] * Vt[:width]
        # B cannot be recovered from a scaling of 0.
        unfolded = (
            B / jnp.where(scaling == 0, jnp.ones_like(scaling), scaling)[:, None, None]
        )
        signed = weights * scaling
        root = jnp.sqrt(jnp.abs(signed))
        return combined("A", A, jnp.sign(signed) * root), combined("B", unfolded, root)

    merged = {}
    for site, ranks in pool.rank.items():
        scaling = jnp.ones(ranks.shape) if pool.scaling is None else pool.scaling[site]
        layers = (jnp.arange(ranks.shape[0]), pool.A[site], pool.B[site], scaling)
        A, B = jax.lax.map(partial(of_layer, site), layers)
        merged[site] = LowRank(A, B * factor)
    return merged


def dare_masks(
    key: Array,
    names: tuple[str, ...],
    index: Int[Array, " N"],
    matrix: str,
    layer: Int[Array, ""],
    shape: tuple[int, ...],
    density: float,
) -> Bool[Array, "N d_in d_out"]:
    """Return the masks of the entries that dare keeps, with probability `density`, in one matrix of each module.

    `names` are those of the whole pool; `matrix` is `A of ` or `B of ` and the site.
    """
    name_hashes = np.array(
        [zlib.crc32(f"{matrix}, {name}".encode()) for name in names], np.uint32
    )

    def draw(name_hash: Array) -> Array:
        mask_key = jax.random.fold_in(jax.random.fold_in(key, name_hash), layer)
        return jax.random.bernoulli(mask_key, density, shape)

    return jax.vmap(draw)(jnp.take(name_hashes, index))


def _largest(matrix: Float[Array, "a b"], count: int) -> Float[Array, "a b"]:
    """Keep the `count` entries of largest size; of equals the first (torch.topk does not define which)."""
    _, largest = jax.lax.top_k(jnp.abs(matrix).ravel(), count)
    mask = jnp.zeros(matrix.size, bool).at[largest].set(True).reshape(matrix.shape)
    return jnp.where(mask, matrix, jnp.zeros_like(matrix))


def _summed(
    tasks: Float[Array, "N a b"], weights: Float[Array, "N 1 1"]
) -> Float[Array, "a b"]:
    return jnp.sum(tasks * weights, axis=0)


def _elected(
    tasks: Float[Array, "N a b"], weights: Float[Array, "N 1 1"]
) -> Float[Array, "a b"]:
    """Return the weighted mean over the modules that agree with the sign of the sum."""
    majority = jnp.where(jnp.sum(tasks, axis=0) >= 0, 1.0, -1.0)
    agreeing = (jnp.sign(tasks) == majority[None]).astype(tasks.dtype)
    return _summed(tasks * agreeing, weights) / jnp.maximum(
        jnp.sum(agreeing, axis=0), 1
    )
