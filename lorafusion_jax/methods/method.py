"""What is trained: fusion of a pool; the other methods are in `baselines`. All put adapters on the same frozen model.

A method is a frozen dataclass (hashable, a static argument of the jitted step). Its trainable numbers are a
dictionary of groups, each with a learning rate of its own.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..adapters import coefficients as coefficients_lib
from ..adapters.coefficients import Granularity, Start
from ..adapters.composition import check_mix, compose
from ..adapters.norms import Gram, column_norms
from ..adapters.pool import LoraPool
from ..adapters.updates import Composition
from ..models.architecture import Model

Params = dict[str, Any]


class Projections(NamedTuple):
    """Random matrices, of which a site takes the first rows of A and the first columns of B."""

    A: Float[Array, "*C widest_in r"]
    B: Float[Array, "*C r widest_out"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What no step changes.

    Attributes:
      base: the base model's weights.
      pool: of modules, for methods that fuse.
      gram: the pool's Gram terms on the base.
      norms: site -> [L, d_out], ||W|| of every column of the sites that a baseline with magnitudes adapts.
      projections: VeRA's random matrices, which all sites share.
      redraw: what training steps draw chips from (`chips.Redraw`); None: the weights stay as they are.
      chip_of_seed: which chip each seed of a program computes on, where all leaves have a leading axis of chips.
    """

    base: nnx.State
    pool: LoraPool | None = None
    gram: Gram | None = None
    norms: dict[str, Float[Array, "*C _L _d_out"]] | None = None
    projections: Projections | None = None
    redraw: Any = None
    chip_of_seed: Int[Array, " S"] | None = None


@runtime_checkable
class Method(Protocol):
    """How trainable numbers become adapters.

    `index` [N] says which modules of the pool a seed fuses; a method without a pool ignores it.
    """

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        """Return the numbers that training starts from, by group."""
        ...

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return the adapters for the model, and metrics about them."""
        ...

    def trainable(self, params: Params, frozen: Frozen, index: Int[Array, " N"]) -> Params:
        """Return, in the shape of `params`, which numbers act on anything: the others are not counted."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fusion:
    """LoRAFusion: coefficients mix the frozen pool, magnitudes rescale the adapted columns.

    Groups: `coefficients`, in the shape of the granularity; `magnitudes`, site -> [L, d_out]. A DoRA pool has
    magnitudes of its own: they are where trained ones start, and stay as they are where only coefficients are trained.

    Attributes:
      composition: `mix` or `sum` (see `adapters.composition`).
      granularity: of the coefficients: one per module, and block, site or rank.
      start: of the coefficients.
      magnitudes: train them; else coefficients only.
      differentiate_norm: let gradients flow through ||W + dW|| (PEFT's DoRA does not).
    """

    composition: Composition = "sum"
    granularity: Granularity = "block"
    start: Start = "uniform"
    magnitudes: bool = True
    differentiate_norm: bool = False

    def __post_init__(self) -> None:
        if self.composition == "mix" and self.start == "zeros":
            raise ValueError(
                "a mix that starts at zero never moves: its gradient is exactly zero there. "
                "Start from xavier or uniform, or use the composition sum"
            )

    def check(self, pool: LoraPool) -> None:
        """Raise ValueError where this fusion cannot use the pool."""
        if self.composition == "mix":
            check_mix(pool)

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        """Return coefficients and, where trained, magnitudes: those of the base, or of a DoRA pool.

        Raises:
          ValueError: there is no pool, or a mix cannot use it (see `composition.check_mix`).
        """
        pool, gram = _pool_of(frozen)
        if self.composition == "mix":
            check_mix(pool, index)
        shape = coefficients_lib.shape(pool, index.shape[0], self.granularity)
        params: Params = {"coefficients": coefficients_lib.initial(shape, self.start, key)}
        if pool.magnitude is not None:  # one adapter, which training starts from as it is
            params["coefficients"] = jnp.ones(shape, jnp.float32)
        if self.magnitudes:
            params["magnitudes"] = _magnitudes(pool.magnitude or column_norms(gram), frozen, index)
        return params

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return the fused adapters; metrics: `floored_norms`, columns whose norm was floored."""
        pool, gram = _pool_of(frozen)
        spread = coefficients_lib.expand(params["coefficients"], pool, self.granularity)
        magnitudes = params.get("magnitudes", pool.magnitude)
        if magnitudes is not None:
            magnitudes = _magnitudes(magnitudes, frozen, index)
        adapters, floored = compose(
            pool,
            index,
            spread,
            self.composition,
            gram=gram,
            magnitudes=magnitudes,
            differentiate_norm=self.differentiate_norm,
        )
        return adapters, {"floored_norms": floored}

    def trainable(self, params: Params, frozen: Frozen, index: Int[Array, " N"]) -> Params:
        """Return which coefficients meet a module that is there, and which columns any module adapts."""
        pool, _ = _pool_of(frozen)
        acting: Params = {"coefficients": coefficients_lib.present(pool, index, self.granularity)}
        if self.magnitudes:
            adapted = _adapted(pool, index)
            acting["magnitudes"] = {
                s: jnp.broadcast_to(adapted[s][:, None], m.shape) for s, m in params["magnitudes"].items()
            }
        return acting


def adapted_model(
    params: Params, index: Int[Array, " N"], frozen: Frozen, *, graph: nnx.GraphDef, method: Method
) -> tuple[Model, dict[str, Any], dict[str, Array]]:
    """Return the model, the adapters to call it with, and metrics about them.

    Weights in the group `base`, by path, take the place of the frozen ones.
    """
    adapters, metrics = method.adapters(params, frozen, index)
    weights = frozen.base
    if "base" in params:
        by_path, tree = jax.tree.flatten_with_path(frozen.base)
        weights = tree.unflatten([params["base"][jax.tree_util.keystr(path)] for path, _ in by_path])
    return nnx.merge(graph, weights), adapters, metrics


# What LoraHub composes: A' = sum_n w_n A_n, B' = sum_n w_n B_n, one weight for every module.
LORAHUB = Fusion(composition="mix", granularity="global", magnitudes=False)


def check_lorahub(pool: LoraPool) -> None:
    """Raise ValueError where LoraHub's objective is not defined on the pool."""
    if pool.magnitude is not None:
        raise ValueError(
            "LoraHub's weights scale plain LoRAs, and weights of zero stand for the base, but a DoRA adapter has "
            "magnitudes besides: use the method fusion, coefficients, single or mean, or a pool of plain LoRAs"
        )


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """The base model as it is: nothing is trained."""

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        """Return no numbers."""
        return {}

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return no adapters."""
        return {}, {}

    def trainable(self, params: Params, frozen: Frozen, index: Int[Array, " N"]) -> Params:
        """Return no numbers."""
        return {}


def _pool_of(frozen: Frozen) -> tuple[LoraPool, Gram]:
    if frozen.pool is None or frozen.gram is None:
        raise ValueError("a fusion needs a pool and its Gram terms: Frozen(base, pool, gram(pool, kernels))")
    return frozen.pool, frozen.gram


def _adapted(pool: LoraPool, index: Int[Array, " N"]) -> dict[str, Array]:
    """Return, by site, in which layers [L] any of the chosen modules is there."""
    return {site: jnp.any(rank[:, index] > 0, axis=1) for site, rank in pool.rank.items()}


def _magnitudes(magnitudes: dict[str, Array], frozen: Frozen, index: Int[Array, " N"]) -> dict[str, Array]:
    """Return the magnitudes, but ||W|| in layers that none of the chosen modules adapts: no value tells those apart."""
    pool, gram = _pool_of(frozen)
    adapted, norms = _adapted(pool, index), column_norms(gram)
    return {s: jnp.where(adapted[s][:, None], m.astype(norms[s].dtype), norms[s]) for s, m in magnitudes.items()}
