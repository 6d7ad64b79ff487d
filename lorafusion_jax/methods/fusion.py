"""LoRAFusion: coefficients mix a frozen pool, magnitudes rescale the columns; and coefficients alone.

Axis letters: N modules of a fusion, r rank.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ..adapters import coefficients as coefficients_lib
from ..adapters.coefficients import Granularity, Start
from ..adapters.composition import check_mix, compose
from ..adapters.norms import Gram, column_norms, gram
from ..adapters.pool import LoraPool
from ..adapters.updates import Composition
from ..models.architecture import Site
from ..models.weights import Weight
from ..training.problem import Frozen, Method, Params
from ..training.recipe import Recipe
from .method import Billed, Built, Fused, MethodEntry, Placement, Update, fused, module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fusion(Method):
    """LoRAFusion: coefficients mix the frozen pool, magnitudes rescale the adapted columns.

    Groups: `coefficients`, in the shape of the granularity; `magnitudes`, site -> [L, d_out]. A DoRA pool's own
    magnitudes are the start of the trained ones, and stay unchanged if only coefficients are trained.

    Attributes:
      composition: `mix` or `sum` (see `adapters.composition`).
      granularity: granularity of the coefficients: one per module, and block, site or rank.
      start: initial values of the coefficients.
      magnitudes: train magnitudes as well as coefficients.
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

    def learning_rates(self, recipe: Recipe) -> dict[str, float]:
        """Return the rates of coefficients and magnitudes."""
        return {"coefficients": recipe.lr_coefficients, "magnitudes": recipe.lr_magnitudes}

    def prepare(self, frozen: Frozen, kernels: Mapping[str, Weight]) -> Frozen:
        """Return the frozen weights with the pool's Gram terms."""
        assert frozen.pool is not None
        used = {site: kernel for site, kernel in kernels.items() if site in frozen.pool.A}
        return dataclasses.replace(frozen, gram=jax.jit(gram)(frozen.pool, used))

    def check(self, pool: LoraPool) -> None:
        """Raise ValueError if this fusion cannot use the pool."""
        if self.composition == "mix":
            check_mix(pool)

    def init(self, frozen: Frozen, index: Int[Array, " N"], key: Array) -> Params:
        """Return coefficients and, if they are trained, magnitudes: those of the base, or of a DoRA pool.

        Raises:
          ValueError: there is no pool, or a mix cannot use it (see `composition.check_mix`).
        """
        pool, terms = _pool_of(frozen)
        if self.composition == "mix":
            check_mix(pool, index)
        shape = coefficients_lib.shape(pool, index.shape[0], self.granularity)
        params: Params = {"coefficients": coefficients_lib.initial(shape, self.start, key)}
        if pool.magnitude is not None:  # one adapter, which training starts from as it is
            params["coefficients"] = jnp.ones(shape, jnp.float32)
        if self.magnitudes:
            params["magnitudes"] = _magnitudes(pool.magnitude or column_norms(terms), frozen, index)
        return params

    def adapters(
        self, params: Params, frozen: Frozen, index: Int[Array, " N"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Return the fused adapters; metrics: `floored_norms`, columns whose norm was floored."""
        pool, terms = _pool_of(frozen)
        spread = coefficients_lib.expand(params["coefficients"], pool, self.granularity)
        magnitudes = params.get("magnitudes", pool.magnitude)
        if magnitudes is not None:
            magnitudes = _magnitudes(magnitudes, frozen, index)
        adapters, floored = compose(
            pool,
            index,
            spread,
            self.composition,
            gram=terms,
            magnitudes=magnitudes,
            differentiate_norm=self.differentiate_norm,
        )
        return adapters, {"floored_norms": floored}

    def trainable(self, params: Params, frozen: Frozen, index: Int[Array, " N"]) -> Params:
        """Return the coefficients that affect a module, and the columns that any module adapts."""
        pool, _ = _pool_of(frozen)
        acting: Params = {"coefficients": coefficients_lib.present(pool, index, self.granularity)}
        if self.magnitudes:
            adapted = _adapted(pool, index)
            acting["magnitudes"] = {
                s: jnp.broadcast_to(adapted[s][:, None], m.shape) for s, m in params["magnitudes"].items()
            }
        return acting


def _pool_of(frozen: Frozen) -> tuple[LoraPool, Gram]:
    if frozen.pool is None or frozen.gram is None:
        raise ValueError("a fusion needs a pool and its Gram terms: Frozen(base, pool, gram(pool, kernels))")
    return frozen.pool, frozen.gram


def _adapted(pool: LoraPool, index: Int[Array, " N"]) -> dict[str, Array]:
    """Return, by site, the layers [L] that any of the chosen modules adapts."""
    return {site: jnp.any(rank[:, index] > 0, axis=1) for site, rank in pool.rank.items()}


def _magnitudes(magnitudes: dict[str, Array], frozen: Frozen, index: Int[Array, " N"]) -> dict[str, Array]:
    """Return the magnitudes, but ||W|| in layers that none of the chosen modules adapts: no value tells those apart."""
    pool, terms = _pool_of(frozen)
    adapted, norms = _adapted(pool, index), column_norms(terms)
    return {s: jnp.where(adapted[s][:, None], m.astype(norms[s].dtype), norms[s]) for s, m in magnitudes.items()}


def _build(built: Built, *, magnitudes: bool) -> Fusion:
    recipe = built.recipe
    fusion = Fusion(
        composition=recipe.composition,
        granularity=recipe.granularity,
        start=recipe.start,
        magnitudes=magnitudes,
        differentiate_norm=recipe.differentiate_norm,
    )
    assert built.pool is not None
    fusion.check(built.pool)
    return fusion


def _update(recipe: Recipe, modules: Fused, *, magnitudes: bool) -> Update:
    return fused(recipe, modules, recipe.composition, magnitudes=magnitudes)


def placement(modules: int, rank: int, words: int) -> Placement:
    """Return the placement of a pool with separate arrays for each module, and N + d_out numbers in memory per site.

    Args:
      modules: N.
      rank: r.
      words: total of trained numbers.
    """

    def matrices(site: Site) -> list[tuple[int, int]]:
        return module(rank)(site) * modules

    return Placement(
        installed_words=words,
        matrices=matrices,
        macs=lambda site: modules * (rank + site.d_out) + site.d_out,
        words=lambda site: modules + site.d_out,
        trains_in="arrays",
        stays_in="arrays",
    )


def _placements(billed: Billed) -> dict[str, Placement]:
    """Return the two layouts: the modules' A next to each other along columns, their B along rows, add up in the array.

    The second layout can be read by a sum alone.
    """
    N, r = billed.recipe.modules, billed.rank
    own = placement(N, r, sum(billed.counts.values()))
    together = dataclasses.replace(own, matrices=module(N * r), macs=lambda site: N * r + 2 * site.d_out)
    return {"LoRAFusion": own, "LoRAFusion, side by side": together}


_FUSION = MethodEntry(
    name="fusion",
    help="train coefficients that mix the pool, and magnitudes",
    title="LoRAFusion",
    build=partial(_build, magnitudes=True),
    update=partial(_update, magnitudes=True),
    pool=True,
    groups=("coefficients", "magnitudes"),
    placements=_placements,
)
ENTRIES = (
    _FUSION,
    dataclasses.replace(
        _FUSION,
        name="coefficients",
        help="train coefficients that mix the pool, alone",
        title="LoRAFusion, coefficients only",
        build=partial(_build, magnitudes=False),
        update=partial(_update, magnitudes=False),
        groups=("coefficients",),
        placements=lambda billed: {},
    ),
)
