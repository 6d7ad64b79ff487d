"""What searches without a gradient minimise: LoraHub's objective of one weight for every module.

The modules are mixed as A' = sum_n w_n A_n, B' = sum_n w_n B_n, and w scores

    (sum over batches of the mean cross-entropy) / rows + 0.05 mean |w|

Source: Huang et al., "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition" (2023), and
its code.

Axis letters: N modules of a seed.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...models.weights import reads
from ...runs.evaluate import seed_entropies
from ...tasks import Batch
from ...training.mesh import on_mesh, to_host
from ...training.seeds import Path
from ..method import LORAHUB, Frozen, check_lorahub

BOUND = 1.5
L1 = 0.05


def score(
    weights: Float[np.ndarray, "seeds N"],
    batches: Sequence[Batch],
    index: Int[Array, "seeds N"],
    frozen: Frozen,
    *,
    graph: nnx.GraphDef,
    path: Path,
) -> Float[np.ndarray, " seeds"]:
    """Return the objective of every seed at its weights.

    Args:
      weights: of every seed's modules.
      batches: of every seed's rows, leaves with a leading axis of seeds.
      index: the modules of each seed.
      frozen: the base model and the pool.
      graph: the model's structure.
      path: how seeds run.

    Raises:
      ValueError: as `check_lorahub` does.
    """
    if frozen.pool is not None:
        check_lorahub(frozen.pool)
    params = on_mesh({"coefficients": jnp.asarray(weights, jnp.float32)}, of_seeds=True)
    static = {"graph": graph, "method": LORAHUB, "path": path}
    losses = [
        to_host(seed_entropies(params, on_mesh(batch, of_seeds=True), index, reads(frozen, number), **static))
        for number, batch in enumerate(batches)
    ]
    rows = np.sum([np.sum(batch.row_mask, axis=1) for batch in batches], axis=0)
    return np.sum(losses, axis=0, dtype=float) / rows + L1 * np.mean(np.abs(weights), axis=1)
