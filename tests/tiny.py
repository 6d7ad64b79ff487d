"""A small T5 of unequal depths and pools for it, for tests that need no pretrained weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorafusion_jax.fusion.pool import LoraPool
from lorafusion_jax.models.sites import sites
from lorafusion_jax.models.t5 import T5, T5Config
from lorafusion_jax.tasks import Batch

CONFIG = T5Config(vocab_size=48, d_model=16, d_kv=4, d_ff=24, num_heads=3, num_layers=3, num_decoder_layers=2)

# The rank of adapter n at a site in a layer; 0 where it has none.
Ranks = Callable[[int, str, int], int]


def t5(config: T5Config = CONFIG, seed: int = 0) -> T5:
    return T5(config, rngs=nnx.Rngs(seed))


def pool(
    modules: int,
    ranks: Ranks = lambda n, site, layer: 4,
    *,
    names: str = "qv",
    config: T5Config = CONFIG,
    seed: int = 0,
) -> LoraPool:
    """Random modules at the sites whose last name is one of `names`, about as large as the base's kernels."""
    rng = np.random.default_rng(seed)
    A, B, rank = {}, {}, {}
    for name, site in sites(config).items():
        if name.rpartition(".")[2] not in names:
            continue
        r = np.array([[ranks(n, name, layer) for n in range(modules)] for layer in range(site.layers)])
        real = np.arange(r.max()) < r[:, :, None]
        a = rng.normal(size=(*r.shape, site.d_in, r.max())) * site.d_in**-0.5 * real[:, :, None, :]
        b = rng.normal(size=(*r.shape, r.max(), site.d_out)) * 0.5 * real[:, :, :, None]
        A[name], B[name] = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
        rank[name] = jnp.asarray(r, jnp.int32)
    return LoraPool(A=A, B=B, rank=rank, names=tuple(f"module_{n}" for n in range(modules)))


def batch(config: T5Config = CONFIG, seed: int = 0, *, rows: int = 3, source: int = 7, target: int = 5) -> Batch:
    """Random tokens, of which the last row's are partly padding."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(2, config.vocab_size, (rows, source))
    labels = rng.integers(2, config.vocab_size, (rows, target))
    labels[-1, target // 2 :] = -100
    lengths = np.array([source] * (rows - 1) + [source // 2])
    return Batch(
        input_ids=jnp.asarray(input_ids, jnp.int32),
        input_mask=jnp.asarray(np.arange(source) < lengths[:, None]),
        labels=jnp.asarray(labels, jnp.int32),
        row_mask=jnp.ones(rows, bool),
    )


def coefficients(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    """Coefficients of either sign, none small."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(0.3, 1.0, shape) * rng.choice([-1, 1], shape), jnp.float32)
