"""LoRAFusion: coefficients mix a frozen pool, magnitudes rescale the columns; and coefficients alone.

Axis letters: L layer, N modules of a fusion, r rank, k directions of a basis.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..adapters import coefficients as coefficients_lib
from ..adapters.basis import Pool, SharedBasis
from ..adapters.coefficients import GRANULARITIES, Granularity, Start
from ..adapters.composition import check_mix, compose, compose_in_basis
from ..adapters.norms import (
    Gram,
    PairTerms,
    column_norms,
    gram,
    pair_terms,
    pairs_are_smaller,
)
from ..adapters.pool import LoraPool
from ..adapters.updates import Composition
from ..models.weights import Weight, is_in_arrays
from ..support.checks import at_least, one_of
from ..support.platform import for_cpu
from ..training.method import Adapted, Frozen, Fused, Index, Method, Params
from ..training.recipe import Optimisation, Recipe
from .entry import (
    BasisRecipe,
    Built,
    CostLayout,
    MethodEntry,
    RescalingRecipe,
    module,
    recipe_of,
)

Choose = Literal["draw", "gradient", "basis-gradient"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoefficientsRecipe(BasisRecipe):
    """Recipe of a fusion that trains coefficients.

    Attributes:
      choose: choice of the modules: `draw` them by seed, or rank the whole pool by one backward pass over the training
        rows at zero coefficients, `gradient`; with a basis that ranks whole modules, and `basis-gradient` ranks them
        inside it.
      composition: combination of the modules: `sum` is sum c A B, `mix` is (sum c A)(sum c B).
      granularity: coefficients of a module: one (`global`), or one for each `block`, each `site` (adapted matrix) or
        each `rank` of a site.
      start: initial coefficients: 1 / N (`uniform`), 2 / N (`twice`), `zeros`, or drawn as in the paper's code
        (`xavier`).
      differentiate_norm: let gradients flow through the magnitudes' norm.
      lr_coefficients: learning rate of the coefficients.
      l2: share of the coefficients that is added to their gradient, before it is clipped.
      l1: weight of mean |c| in the objective.
    """

    choose: Choose = "draw"
    composition: Composition = "sum"
    granularity: Granularity = "block"
    start: Start = "uniform"
    differentiate_norm: bool = False
    lr_coefficients: float = 0.1
    l2: float = 0.0
    l1: float = 0.0

    def check(self) -> None:
        super().check()
        at_least(0, l1=self.l1, l2=self.l2)
        fusion_of(self)
        if self.basis is None and self.choose == "basis-gradient":
            raise ValueError(
                "--choose basis-gradient needs a shared basis: give its number of directions with --basis"
            )
        if self.choose != "draw" and self.composition != "sum":
            raise ValueError(
                "no gradient can choose modules of a mix: leave out --choose, or use the composition sum"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionRecipe(RescalingRecipe, CoefficientsRecipe):
    """Recipe of LoRAFusion.

    Attributes:
      prune: share of the smallest magnitudes that are set to zero at half time and kept there.
    """

    prune: float = 0.0

    def check(self) -> None:
        super().check()
        if not 0 <= self.prune < 1:
            raise ValueError(
                f"prune is {self.prune}: give a share of the magnitudes, from 0 to below 1"
            )

    def optimisation(self, steps: int) -> Optimisation:
        return dataclasses.replace(super().optimisation(steps), prune=self.prune)


PRESETS = {
    "default": FusionRecipe(),
    # The protocol of the paper's published code, in every number.
    "reference": FusionRecipe(
        composition="mix",
        start="xavier",
        lr_coefficients=0.02,
        lr_magnitudes=0.005,
        l2=1e-5,
        l1=5e-4,
        schedule="constant",
        clip=None,
        stop_early=True,
        pack=False,
        protocol="reference",
        max_new_tokens=256,
    ),
}


def choice_of(recipe: Recipe) -> Choose:
    """Return how the modules of a run are chosen: drawn, unless its recipe has another choice."""
    return recipe.choose if isinstance(recipe, CoefficientsRecipe) else "draw"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fusion(Method):
    """LoRAFusion: coefficients mix the frozen pool, magnitudes rescale the adapted columns.

    Groups: `coefficients`, in the shape of the granularity; `magnitudes`, site -> [L, d_out]. Trained magnitudes start
    from those of a DoRA pool, which stay unchanged if only coefficients are trained. Metrics: `floored_norms`, columns
    whose norm was floored.

    Attributes:
      composition: `mix` or `sum` (see `adapters.composition`).
      granularity: granularity of the coefficients: one per module, and block, site or rank.
      start: initial values of the coefficients.
      magnitudes: train magnitudes as well as coefficients.
      basis: number of directions of a pool in a shared basis; None for all that it has, and for whole modules.
      differentiate_norm: let gradients flow through ||W + dW|| (PEFT's DoRA does not).
      l1: weight of mean |c| in the objective.
      l2: weight of sum c^2 / 2 in the objective.
    """

    composition: Composition = "sum"
    granularity: Granularity = "block"
    start: Start = "uniform"
    magnitudes: bool = True
    basis: int | None = None
    differentiate_norm: bool = False
    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        one_of(get_args(Composition), composition=self.composition)
        one_of(GRANULARITIES, granularity=self.granularity)
        one_of(get_args(Start), start=self.start)
        if self.composition == "mix" and self.start == "zeros":
            raise ValueError(
                "a mix that starts at zero never moves: its gradient is exactly zero there. "
                "Start from xavier or uniform, or use the composition sum"
            )
        if self.basis is None:
            return
        if self.basis < 1:
            raise ValueError(
                f"expected a basis of at least 1 direction, got {self.basis}"
            )
        if self.composition == "mix":
            raise ValueError(
                "a shared basis lacks a mix's factors: use the composition sum, or leave out the basis"
            )
        if self.granularity == "rank":
            raise ValueError(
                "a shared basis mixes the modules' ranks: use the granularity global, block or site"
            )

    def precompute(self, frozen: Frozen, kernels: Mapping[str, Weight]) -> Frozen:
        """Return the frozen weights with the directions that are used, and the pool's Gram terms.

        On accelerators a sum of whole modules has pair terms instead, unless these would take more memory.
        """
        pool = frozen.pool
        assert pool is not None
        self.check(pool)
        if self.basis is not None and isinstance(pool, SharedBasis):
            pool = pool.first(self.basis)
        terms = gram
        if (
            isinstance(pool, LoraPool)
            and not for_cpu()  # keeps its bits
            and self.magnitudes
            and self.composition == "sum"
            and self.granularity != "rank"
            and not is_in_arrays((pool.A, pool.B))
        ):
            ranks = (jax.tree.leaves(b)[0].shape[2] for b in pool.B.values())
            if pairs_are_smaller(len(pool), min(ranks)):
                terms = pair_terms
        return dataclasses.replace(
            frozen, pool=pool, gram=jax.jit(terms)(pool, dict(kernels))
        )

    def check(self, pool: Pool) -> None:
        if isinstance(pool, SharedBasis):
            dataclasses.replace(self, basis=self.basis or pool.k)  # checks the options
            if self.basis is not None:
                pool.first(self.basis)
        elif self.basis is not None:
            raise ValueError(
                f"the pool has no shared basis: run `lorafusion convert --basis {self.basis}`"
            )
        elif self.composition == "mix":
            check_mix(pool)

    def init(self, frozen: Frozen, index: Index, key: PRNGKeyArray) -> Params:
        pool, terms = _pool_of(frozen)
        if self.composition == "mix" and not isinstance(pool, SharedBasis):
            check_mix(pool, index)
        shape = coefficients_lib.shape(pool, index.shape[0], self.granularity)
        params: Params = {
            "coefficients": coefficients_lib.initial(shape, self.start, key)
        }
        if (
            pool_magnitudes := pool.magnitude
        ) is not None:  # one adapter, which training starts from as it is
            params["coefficients"] = jnp.ones(shape, jnp.float32)
        if self.magnitudes:
            params["magnitudes"] = _magnitudes(
                pool_magnitudes or column_norms(terms), frozen, index
            )
        return params

    def start_at(
        self, coefficients: Float[Array, "N ..."], frozen: Frozen, index: Index
    ) -> Params:
        """Return the parameters that leave the model at W + dW: coefficients, and as magnitudes its column norms.

        The magnitudes of a DoRA pool stay as they are.
        """
        params = self.init(frozen, index, jax.random.key(0)) | {
            "coefficients": coefficients
        }
        pool, _ = _pool_of(frozen)
        if self.magnitudes and pool.magnitude is None:
            ones = jax.tree.map(jnp.ones_like, params["magnitudes"])
            adapters, _ = self.adapters(params | {"magnitudes": ones}, frozen, index)
            norms = {site: 1 / update.scale for site, update in adapters.items()}
            params["magnitudes"] = _magnitudes(norms, frozen, index)
        return params

    def adapters(self, params: Params, frozen: Frozen, index: Index) -> Adapted:
        pool, terms = _pool_of(frozen)
        spread = coefficients_lib.expand(params["coefficients"], pool, self.granularity)
        magnitudes = params.get("magnitudes", pool.magnitude)
        if magnitudes is not None:
            magnitudes = _magnitudes(magnitudes, frozen, index)
        if isinstance(pool, SharedBasis):
            assert not isinstance(terms, PairTerms)  # the terms of whole modules
            adapters, floored = compose_in_basis(
                pool,
                index,
                spread,
                gram=terms,
                magnitudes=magnitudes,
                differentiate_norm=self.differentiate_norm,
            )
        else:
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

    def penalty(self, params: Params, frozen: Frozen, index: Index) -> Float[Array, ""]:
        if not self.l1 and not self.l2:
            return jnp.float32(0)
        c = params["coefficients"]
        acting = self.trainable(params, frozen, index)["coefficients"]
        size = jnp.sum(jnp.where(acting, jnp.abs(c), 0.0))
        mean = size / jnp.maximum(jnp.sum(acting), 1).astype(jnp.float32)
        return self.l1 * mean + self.l2 / 2 * jnp.sum(jnp.square(c))

    def as_fusion(self, params: Params, frozen: Frozen, index: Index) -> Fused | None:
        if (
            not isinstance(frozen.pool, LoraPool)
            or type(self).adapters is not Fusion.adapters
        ):
            return None
        return coefficients_lib.expand(
            params["coefficients"], frozen.pool, self.granularity
        ), self.composition

    def trainable(self, params: Params, frozen: Frozen, index: Index) -> Params:
        pool, _ = _pool_of(frozen)
        acting: Params = {
            "coefficients": coefficients_lib.present(pool, index, self.granularity)
        }
        adapted = _adapted(pool, index)
        for group in params.keys() - acting.keys():
            acting[group] = {
                s: jnp.broadcast_to(
                    jnp.expand_dims(adapted[s], range(1, p.ndim)), p.shape
                )
                for s, p in params[group].items()
            }
        return acting


def fusion_of(recipe: CoefficientsRecipe) -> Fusion:
    """Return the fusion of a recipe; ValueError for options that do not go together."""
    return recipe_of(
        Fusion, vars(recipe) | {"magnitudes": isinstance(recipe, FusionRecipe)}
    )


# One coefficient for each module, and no magnitudes.
PLAIN_SUM = Fusion(granularity="global", magnitudes=False)


def _pool_of(frozen: Frozen) -> tuple[Pool, Gram | PairTerms]:
    if frozen.pool is None or frozen.gram is None:
        raise ValueError(
            "a fusion needs a pool and its Gram terms: Frozen(base, pool, gram(pool, kernels))"
        )
    return frozen.pool, frozen.gram


def _adapted(pool: Pool, index: Index) -> dict[str, Array]:
    """Return, by site, the layers [L] that any of the chosen modules adapts."""
    return {
        site: jnp.any(rank[:, index] > 0, axis=1) for site, rank in pool.rank.items()
    }


def _magnitudes(
    magnitudes: dict[str, Array], frozen: Frozen, index: Index
) -> dict[str, Array]:
    """Return the magnitudes, with ||W|| in layers that none of the chosen modules adapts."""
    pool, terms = _pool_of(frozen)
    adapted = _adapted(pool, index)
    norms = column_norms(terms)
    return {
        s: jnp.where(adapted[s][:, None], m.astype(norms[s].dtype), norms[s])
        for s, m in magnitudes.items()
    }


def _build(built: Built) -> Fusion:
    """Return the fusion of a recipe; ValueError if it cannot use the pool."""
    fusion = fusion_of(built.recipe)
    assert built.pool is not None
    fusion.check(built.pool)
    return fusion


def separate_modules(modules: int, rank: int) -> CostLayout:
    """Return the layout of frozen modules in separate arrays."""
    return CostLayout(
        matrices=lambda site: module(rank)(site) * modules, trains_in_arrays=True
    )


def _cost_layouts(recipe: FusionRecipe, rank: int) -> dict[str, CostLayout]:
    """Return two layouts: the modules' A next to each other along columns, their B along rows, add up in the array.

    The second layout can be read by a sum alone. A basis has one layout.
    """
    if (k := recipe.basis) is not None:
        layout = CostLayout(
            matrices=module(k), digital=lambda site: [(k, k)], trains_in_arrays=True
        )
        return {_BASIS_TITLE.format(basis=k): layout}
    separate = separate_modules(recipe.modules, rank)
    together = dataclasses.replace(separate, matrices=module(recipe.modules * rank))
    return {"LoRAFusion": separate, "LoRAFusion, side by side": together}


_BASIS_TITLE = "LoRAFusion, basis of {basis}"
_FUSION = MethodEntry(
    name="fusion",
    help="train coefficients that mix the pool, and magnitudes",
    title="LoRAFusion",
    basis_title=_BASIS_TITLE,
    build=_build,
    recipe=FusionRecipe,
    pool=True,
    groups=("coefficients", "magnitudes"),
    cost_layouts=_cost_layouts,
)
ENTRIES = (
    _FUSION,
    dataclasses.replace(
        _FUSION,
        name="coefficients",
        help="train coefficients that mix the pool, alone",
        title="LoRAFusion, coefficients only",
        basis_title=None,
        recipe=CoefficientsRecipe,
        groups=("coefficients",),
        cost_layouts=lambda recipe, rank: {},
    ),
)
