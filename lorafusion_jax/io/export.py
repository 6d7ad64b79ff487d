"""Export of a fusion: as one adapter that PEFT loads, or merged into a base model.

Coefficients are folded into the factors, and alpha is the rank, so PEFT's scaling is 1. A `sum` stacks the factors of
its modules (PEFT's `cat`), so ranks differ between matrices; a `mix` keeps their rank. With magnitudes the adapter is a
DoRA.

Axis letters: L layer, N adapters of a fusion, r rank.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ..adapters.composition import check_mix
from ..adapters.pool import LoraPool
from ..adapters.updates import Composition, LowRank, WeightDecomposed
from ..models.architecture import HEAD, Architecture, Model, kernels, set_matrices
from ..models.layers import Adapter, Base, check_sites
from ..models.registry import family_of
from ..models.weights import Weight, dense
from .peft.config import plain_config

# (A [r, d_in], B [r, d_out]) by site and layer.
_Factors = dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]


def fused_adapter(
    config: Architecture,
    pool: LoraPool,
    index: Int[Array, " N"],
    coefficients: Mapping[str, Float[Array, "_L N _k"]],
    composition: Composition,
    *,
    base: str,
    magnitudes: Mapping[str, Float[Array, "_L _d_out"]] | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the configuration and the tensors of a PEFT adapter that equals a fusion: A [r, d_in] and B [d_out, r].

    Left out are matrices that none of the chosen modules adapts and, in a `sum`, modules whose coefficient is zero. The
    modules of a `mix` must have one rank.

    Args:
      config: structure of the base model.
      pool: plain or quantised pool.
      index: numbers of the fused modules.
      coefficients: `adapters.coefficients.expand`'s.
      composition: `mix` or `sum`.
      base: name or folder of the base model, for the configuration.
      magnitudes: m per site, for a DoRA adapter; by default the pool's.
    """
    if composition == "mix":
        check_mix(pool, index)
    chosen = np.asarray(index)
    factors: _Factors = {}
    for site, spread in coefficients.items():
        ranks = np.asarray(pool.rank[site])[:, chosen]
        for layer in np.flatnonzero(ranks.any(axis=1)).tolist():
            A = _layer(pool.A[site], layer, chosen)
            B = _layer(pool.B[site], layer, chosen)
            c = np.asarray(spread[layer])
            if composition == "mix":
                rank = ranks[layer].max()
                mixed = (
                    (A * c[:, None, :]).sum(axis=0).T[:rank],
                    (B * c[:, :, None]).sum(axis=0)[:rank],
                )
            else:
                real = (np.arange(A.shape[2]) < ranks[layer][:, None]) & (c != 0)
                mixed = A.swapaxes(1, 2)[real], (B * c[:, :, None])[real]
            factors[site, layer] = mixed
    return _adapter(
        config, factors, base, pool.magnitude if magnitudes is None else magnitudes
    )


def lora_adapter(
    config: Architecture,
    adapters: Mapping[str, LowRank | WeightDecomposed],
    *,
    base: str,
    magnitudes: Mapping[str, Float[Array, "_L _d_out"]] | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the configuration and the tensors, A [r, d_in] and B [d_out, r], of the PEFT adapter of a LoRA or DoRA.

    `adapters` holds by site A [L, d_in, r] and B [L, r, d_out] with the scaling folded in; the other arguments are
    those of `fused_adapter`. Raises a ValueError for arrays of other layers than the site has.
    """
    check_sites(adapters, config.adaptable)
    factors = {
        (site, layer): (A.T, B)
        for site, lora in adapters.items()
        for layer, (A, B) in enumerate(
            zip(
                *(np.asarray(dense(w, jnp.float32)) for w in (lora.A, lora.B)),
                strict=True,
            )
        )
    }
    return _adapter(config, factors, base, magnitudes)


def merged_base(model: Model, adapters: Mapping[str, Adapter]) -> Model:
    """Return a copy of a model with adapters merged into its kernels, W' = (W + dW) * scale, in float32.

    A tied head that they change becomes a matrix of its own.

    Raises a ValueError for an adapter at a site that the model lacks.
    """
    check_sites(adapters, model.config.adaptable)
    merged: Any = nnx.clone(model)
    adapted = {
        site: _merge(adapters[site], kernel)
        for site, kernel in kernels(model, adapters).items()
        if site in adapters
    }
    if HEAD in adapted:
        head = adapted.pop(HEAD)[0]
        if model.config.tied:
            merged.config = dataclasses.replace(model.config, tied=False)
            merged.head = Base(head)
        else:
            adapted["head"] = head
    set_matrices(merged, adapted)
    return merged


def _layer(
    weight: Weight, layer: int, modules: Int[np.ndarray, " N"]
) -> Float[np.ndarray, "N _ _"]:
    """Return the factors of some modules in one layer."""
    factors = jax.tree.map(lambda a: a[layer][modules], weight)
    return np.asarray(dense(factors, jnp.float32))


@jax.jit
def _merge(adapter: Adapter, kernel: Weight) -> Float[Array, "L d_in d_out"]:
    # An adapter maps the unit vectors to the rows of its matrix.
    unit = jnp.eye(kernel.shape[1])
    with jax.default_matmul_precision("highest"):
        return jax.lax.map(lambda layer: layer[0](unit, layer[1]), (adapter, kernel))


def _adapter(
    config: Architecture,
    factors: _Factors,
    base: str,
    magnitudes: Mapping[str, Float[Array, "_L _d_out"]] | None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    tensors = {}
    ranks = {}
    for (site, layer), (A, B) in factors.items():
        path = config.adaptable[site].path_of(layer)
        module = f"base_model.model.{path}"
        ranks[path] = max(1, len(A))
        # PEFT has no rank of zero.
        room = ((0, ranks[path] - len(A)), (0, 0))
        tensors[f"{module}.lora_A.weight"] = np.pad(A, room)
        tensors[f"{module}.lora_B.weight"] = np.pad(B, room).T
        if magnitudes is not None:
            tensors[f"{module}.lora_magnitude_vector"] = np.asarray(
                magnitudes[site][layer], np.float32
            )
    rank = max(ranks.values())
    family = family_of(config)
    fields = plain_config(
        base,
        ranks,
        rank=rank,
        alpha=rank,
        task_type=family.task_type,
        dora=magnitudes is not None,
        flipped=bool(family.checkpoint(config).flipped),
    )
    # By full path, which all versions of PEFT match alike; rank_pattern alone would change the scaling.
    other_ranks = {path: r for path, r in ranks.items() if r != rank}
    if other_ranks:
        fields["rank_pattern"] = other_ranks
        fields["alpha_pattern"] = other_ranks
    return fields, tensors
