"""What is trained: fusion of a pool, or a LoRA of its own. Both put adapters on the same frozen model.

A method is a frozen dataclass (hashable, a static argument of the jitted step). Its trainable numbers are a
dictionary of groups, each with a learning rate of its own.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from ..fusion import coefficients as coefficients_lib
from ..fusion.coefficients import Granularity, Start
from ..fusion.compose import Composition, Gram, Lora, column_norms, compose
from ..fusion.pool import LoraPool
from ..models.sites import Site

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What no step changes: the base model's weights, the pool and its Gram terms on the base."""

    base: nnx.State
    pool: LoraPool | None = None
    gram: Gram | None = None


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

    Groups: `coefficients`, in the shape of the granularity; `magnitudes`, site -> [L, d_out].

    Attributes:
      composition: `mix` or `sum` (see `fusion.compose`).
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
        if self.composition == "mix" and pool.uniform_rank is None:
            raise ValueError(
                "the pool's adapters have different ranks, and mix adds their matrices entry by entry: "
                "use the composition sum, or a pool of one rank"
            )

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        """Return coefficients and, where trained, magnitudes: those of the base, or of a DoRA pool."""
        pool, gram = _pool_of(frozen)
        shape = coefficients_lib.shape(pool, index.shape[0], self.granularity)
        params: Params = {"coefficients": coefficients_lib.initial(shape, self.start, key)}
        if self.magnitudes:
            params["magnitudes"] = column_norms(gram)
        if self.magnitudes and pool.magnitude is not None:
            params["coefficients"] = jnp.ones(shape, jnp.float32)
            params["magnitudes"] = {
                site: jnp.where(m > 0, m, params["magnitudes"][site]) for site, m in pool.magnitude.items()
            }
        return params

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return the fused adapters; metrics: `floored_norms`, columns whose norm was floored."""
        pool, gram = _pool_of(frozen)
        spread = coefficients_lib.expand(params["coefficients"], pool, self.granularity)
        magnitudes = params.get("magnitudes")
        if magnitudes is not None:
            acting = _adapted(pool, index)
            start = column_norms(gram)
            magnitudes = {s: jnp.where(acting[s][:, None], m, start[s]) for s, m in magnitudes.items()}
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


# What LoraHub composes: A' = sum_n w_n A_n, B' = sum_n w_n B_n, one weight for every module.
LORAHUB = Fusion(composition="mix", granularity="global", magnitudes=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """The baseline: one new low-rank module, trained from scratch, as PEFT starts it.

    Group `lora`: A, uniform within d_in ** -0.5, and B, zeros.

    Attributes:
      sites: which linear maps, with their shapes.
      rank: r.
      alpha: dW = alpha / r * A B.
    """

    sites: tuple[tuple[str, Site], ...]
    rank: int = 16
    alpha: float = 32.0

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        """Return random A and zero B for every site."""
        keys = jax.random.split(key, len(self.sites))
        bounds = {name: site.d_in**-0.5 for name, site in self.sites}
        A = {
            name: jax.random.uniform(k, (site.layers, site.d_in, self.rank), jnp.float32, -bounds[name], bounds[name])
            for (name, site), k in zip(self.sites, keys, strict=True)
        }
        B = {name: jnp.zeros((site.layers, self.rank, site.d_out)) for name, site in self.sites}
        return {"lora": {"A": A, "B": B}}

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return the LoRA adapters, the scaling folded into B; no metrics."""
        A, B = params["lora"]["A"], params["lora"]["B"]
        return {site: Lora(A[site], B[site] * (self.alpha / self.rank)) for site in A}, {}

    def trainable(self, params: Params, frozen: Frozen, index: Int[Array, " N"]) -> Params:
        """Return that every number counts."""
        return jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)


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
