"""The weights that no step changes, and the noise that seeds, steps and other purposes read them with."""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ..adapters.basis import Pool
from ..adapters.norms import Gram, PairTerms
from ..models.weights import per_layer, reads
from .seeds import WHOLE

# Purposes of reads of arrays other than training: the first of the numbers that determine the noise.
VALIDATION, SEARCH, GENERATION, LOSS, OPTIONS = range(5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """Weights that no step changes.

    A subclass may give each seed or each step other weights: `hardware.chips` does. `split` is how a mesh splits all
    leaves, where devices compute seeds.

    Attributes:
      base: the base model's weights.
      pool: modules, whole or in a shared basis, for methods that fuse.
      gram: the pool's Gram terms on the base, or its pair terms.
      norms: site -> [L, d_out], ||W|| of every column of the sites that a method without a pool rescales.
      precomputed: other pytree that the method computes once (`Method.precompute`), such as random matrices.
      preparations: preparations of the base's matrices by their names, for arrays (`crossbar.prepare`).
    """

    split: ClassVar[PartitionSpec] = WHOLE

    base: nnx.State
    pool: Pool | None = None
    gram: Gram | PairTerms | None = None
    norms: dict[str, Float[Array, "*C _L _d_out"]] | None = None
    precomputed: Any = None
    preparations: Any = None

    def per_layer(self) -> "Frozen":
        """Return the weights with the base model's layers in separate arrays (`weights.per_layer`)."""
        return dataclasses.replace(self, base=per_layer(self.base))

    def of_seed(self, number: Int[Array, ""]) -> "Frozen":
        """Return the weights of one seed of a program, by its position, with separate read noise."""
        return reads(self, number)

    def of_step(self, step: Int[Array, ""], graph: nnx.GraphDef) -> "Frozen":
        """Return the weights of one training step, with separate read noise."""
        return reads(self, step)
