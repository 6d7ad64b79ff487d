"""A model of one layer, a pool for one of its sites, and the job of a search over them."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx

from lorafusion_jax.adapters.pool import LoraPool
from lorafusion_jax.methods.entry import SearchJob
from lorafusion_jax.methods.lorahub import LORAHUB
from lorafusion_jax.models.architecture import kernels
from lorafusion_jax.models.t5 import T5, T5Config
from lorafusion_jax.tasks import Batch
from lorafusion_jax.training.problem import Problem

SITE = "decoder.self.v"
_CONFIG = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_heads=2, num_layers=1, num_decoder_layers=1)


def job_of(
    model, pool, batches, *, seeds=(1,), method=LORAHUB, seed_mode="sequential", record=lambda rows: None, **recipe
):
    """A search over all modules of a pool, on batches whose leaves have an axis of seeds."""
    index = jnp.tile(jnp.arange(len(pool)), (len(seeds), 1))
    frozen = tiny.frozen(model, pool)
    problem = Problem(graph=nnx.graphdef(model), method=method, frozen=frozen, index=index, seed_mode=seed_mode)
    rows = SimpleNamespace(once=lambda size: iter(batches))
    return SearchJob(problem, rows, SimpleNamespace(batch_size=4, **recipe), seeds, (pool.names,) * len(seeds), record)


def small(seeds=(1,), **more):
    """A random model and pool of three modules, and two batches of one-token answers, those of the modules' sum.

    The second batch holds a row that only fills it up.
    """
    model, pool, batches = _drawn()
    batches = [jax.tree.map(lambda a: np.stack([np.asarray(a)] * len(seeds)), batch) for batch in batches]
    return job_of(model, pool, batches, seeds=seeds, **more)


@functools.cache
def _drawn():
    model = T5(_CONFIG, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(2, 1, 3, 2, 8)).astype(np.float32)
    pool = LoraPool(
        A={SITE: jnp.asarray(A.swapaxes(2, 3))},
        B={SITE: jnp.asarray(B)},
        rank={SITE: jnp.full((1, 3), 2)},
        names=("a", "b", "c"),
    )
    batches = []
    for real in (4, 3):
        row_mask = np.arange(4) < real
        ids = rng.integers(2, 16, (4, 5)).astype(np.int32)
        mask = np.broadcast_to(row_mask[:, None], ids.shape)
        answers = np.argmax(mixed(model, pool, np.ones(3))(ids, mask, np.zeros((4, 1), np.int32)), axis=-1)
        labels = np.where(row_mask[:, None], answers, -100).astype(np.int32)
        batches.append(Batch(ids, mask, labels, row_mask))
    return model, pool, batches


def mixed(model, pool, weights):
    """Return the model with A' B' added to its kernel: the oracle, which knows no adapters."""
    A, B = (np.einsum("lnab,n->lab", np.asarray(m[SITE]), weights) for m in (pool.A, pool.B))
    kernel = np.asarray(kernels(model)[SITE]) + A @ B
    mixed = nnx.clone(model)
    mixed.decoder.self_attention.v.kernel.set_value(jnp.asarray(kernel, jnp.float32))
    graph, weights = nnx.split(mixed)
    return lambda *inputs: _logits(graph, weights, *map(jnp.asarray, inputs))


@functools.partial(jax.jit, static_argnames="graph")
def _logits(graph, weights, ids, mask, start):
    return nnx.merge(graph, weights)(ids, mask, start)
