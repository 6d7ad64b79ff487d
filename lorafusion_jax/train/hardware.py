"""A fusion whose weights sit in arrays: base kernels, head and every module's A and B programmed and calibrated.

Embeddings, norms, softmax, coefficients and magnitudes stay digital, and so does a head that is the embedding.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ..crossbar.tree import Rules, program_tree
from ..fusion.compose import gram, norms
from ..linear import dense
from ..models.t5 import kernels, matrices, set_matrices
from ..tasks import Batch
from .methods import Frozen, Method, Params
from .step import batch_logits


def program(graph: nnx.GraphDef, frozen: Frozen, rules: Rules, key: Array) -> Frozen:
    """Write what rules name into arrays; the norms' terms become those of the weights as programmed.

    Paths: a site, as in `encoder.self.q`; `head` where it is not tied; `pool.A.encoder.self.q` and
    `pool.B.encoder.self.q` for the modules.

    Args:
      graph: the model's structure.
      frozen: digital weights, quantised or not.
      rules: path pattern -> configuration, or None for digital (see `crossbar.tree`).
      key: of the chip. The same key is the same chip; may be vmapped over.

    Raises:
      ValueError: a pattern matches nothing, or a weight cannot be programmed.
    """
    # A copy of the state: merged models share its variables, and the digital one must stay as it is.
    model, pool = nnx.merge(graph, jax.tree.map(lambda weight: weight, frozen.base)), frozen.pool
    base = {name: dense(weight, jnp.float32) for name, weight in matrices(model).items()}
    modules = {} if pool is None else {"A": pool.A, "B": pool.B}
    modules = {factor: {s: dense(w, jnp.float32) for s, w in by_site.items()} for factor, by_site in modules.items()}
    placed = program_tree(base | ({"pool": modules} if modules else {}), rules, key)
    modules = placed.pop("pool", None)
    set_matrices(model, placed)
    _, state = nnx.split(model)
    programmed = dataclasses.replace(frozen, base=state)
    if frozen.norms is not None:
        adapted = {site: kernel for site, kernel in kernels(model).items() if site in frozen.norms}
        programmed = dataclasses.replace(programmed, norms=jax.jit(norms)(adapted))
    if pool is None or modules is None:
        return programmed
    pool = dataclasses.replace(pool, A=modules["A"], B=modules["B"])
    used = {site: kernel for site, kernel in kernels(model).items() if site in pool.A}
    return dataclasses.replace(programmed, pool=pool, gram=jax.jit(gram)(pool, used))


def logits_of(graph: nnx.GraphDef, method: Method) -> Callable[[Frozen, tuple[Params, Array, Batch]], Array]:
    """Return the model as `crossbar.probing` runs it: of frozen weights and (params, index, batch) of one seed."""

    def run(frozen: Frozen, inputs: tuple[Params, Array, Batch]) -> Array:
        params, index, batch = inputs
        return batch_logits(params, batch, index, frozen, graph=graph, method=method)[0]

    return run
