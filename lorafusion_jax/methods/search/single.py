"""The best single module: which one of a seed's modules has the least training loss by itself.

Axis letters: N modules of a seed.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ...models.weights import reads
from ...runs.evaluate import SEARCH, seed_entropies
from ...tasks import IGNORED, Batch
from ...training.mesh import on_mesh, to_host
from ...training.seeds import Path
from ..method import Frozen, Method


def single_losses(
    batches: Sequence[Batch],
    index: Int[Array, "seeds N"],
    frozen: Frozen,
    *,
    graph: nnx.GraphDef,
    method: Method,
    path: Path,
) -> Float[np.ndarray, "seeds N"]:
    """Return every module's training loss by itself, in nats per token.

    Args:
      batches: of every seed's rows, leaves with a leading axis of seeds.
      index: the modules of each seed.
      frozen: the base model and the pool.
      graph: the model's structure.
      method: a fusion whose coefficients are one for each module.
      path: how seeds run.
    """
    seeds, modules = index.shape
    total, targets = np.zeros((seeds, modules)), np.zeros(seeds)
    for number, batch in enumerate(batches):
        count = np.sum(batch.labels != IGNORED, axis=(1, 2))
        read, batch = reads(frozen, SEARCH, number), on_mesh(batch, of_seeds=True)
        for n in range(modules):
            params = on_mesh({"coefficients": jnp.tile(jax.nn.one_hot(n, modules), (seeds, 1))}, of_seeds=True)
            losses = seed_entropies(params, batch, index, read, graph=graph, method=method, path=path)
            total[:, n] += to_host(losses).astype(float) * count
        targets += count
    return total / targets[:, None]
