"""Magnitudes alone: the columns of the base's own matrices are rescaled, and no pool is needed."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
from jaxtyping import PRNGKeyArray

from ..adapters.norms import norms
from ..adapters.updates import Rescaled
from ..models.weights import Weight
from ..training.frozen import Frozen
from ..training.method import Adapted, Index, Method, Params
from .entry import MethodEntry
from .recipes import RescalingRecipe, TargetedRecipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagnitudesRecipe(RescalingRecipe, TargetedRecipe):
    """Recipe of magnitudes alone."""


@dataclasses.dataclass(frozen=True)
class Magnitudes(Method):
    """LoRAFusion's magnitudes without its coefficients: y = m / ||W|| * x W.

    Group `magnitudes`: site -> [L, d_out], from ||W||.

    Attributes:
      sites: names of the linear maps; None for all.
    """

    sites: tuple[str, ...] | None = None

    def precompute(self, frozen: Frozen, kernels: Mapping[str, Weight]) -> Frozen:
        return with_norms(frozen, kernels, self.sites)

    def init(self, frozen: Frozen, index: Index, key: PRNGKeyArray) -> Params:
        assert frozen.norms is not None
        return {"magnitudes": frozen.norms}

    def adapters(self, params: Params, frozen: Frozen, index: Index) -> Adapted:
        assert frozen.norms is not None
        return {
            site: Rescaled(m / frozen.norms[site])
            for site, m in params["magnitudes"].items()
        }, {}


def with_norms(
    frozen: Frozen, kernels: Mapping[str, Weight], sites: Iterable[str] | None
) -> Frozen:
    """Return the frozen weights with ||W|| of every column of some sites; None for all sites."""
    adapted = {name: kernels[name] for name in (kernels if sites is None else sites)}
    return dataclasses.replace(frozen, norms=jax.jit(norms)(adapted))


ENTRIES = (
    MethodEntry(
        name="magnitudes",
        help="train the magnitudes of the base's own matrices, alone",
        title="LoRAFusion, magnitudes only",
        build=lambda built: Magnitudes(tuple(name for name, _ in built.sites)),
        recipe=MagnitudesRecipe,
        groups=("magnitudes",),
    ),
)
