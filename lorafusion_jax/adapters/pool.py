"""A pool of pretrained LoRA modules, stacked. On hardware it is written once and stays frozen in the crossbars.

Axis letters: L layer, N adapters, r rank.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..models.architecture import stack_of
from ..models.weights import Weight, dense, quantise
from ..support.platform import is_traced


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraPool:
    """N adapters of one base model, by site. dW of adapter n in layer l is `A[l, n] @ B[l, n]`.

    Attributes:
      A: site -> [L, N, d_in, r].
      B: site -> [L, N, r, d_out], with the adapter's scaling (alpha / r) folded in.
      rank: site -> [L, N], the true rank; smaller ones are padded with zeros, 0 where an adapter lacks it.
      scaling: site -> [L, N], the factor in B, 0 where an adapter lacks the site; None if it is unknown.
      magnitude: site -> [L, d_out] of a pool of one DoRA adapter (0 where a layer lacks it), else None.
      names: names of the adapters, in the order of the axis N.
      sites: the sites in the order of the computation, which dictionaries lose inside `jax.jit`; by default the order
        of `rank`.
    """

    A: dict[str, Weight]
    B: dict[str, Weight]
    rank: dict[str, Int[Array, "*C _L N"]]
    scaling: dict[str, Float[Array, "*C _L N"]] | None = None
    magnitude: dict[str, Array] | None = None
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    sites: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})

    def __post_init__(self) -> None:
        if not self.sites:
            object.__setattr__(self, "sites", tuple(self.rank))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def factors(self) -> dict[str, dict[str, Weight]]:
        return {"A": self.A, "B": self.B}

    def indices(self, chosen: Sequence[str | int]) -> list[int]:
        return positions(self.names, chosen)

    def select(self, chosen: Sequence[str | int]) -> "LoraPool":
        """Return the pool of the adapters given by name or index, in that order."""
        index = np.array(self.indices(chosen))
        fields = {
            field: getattr(self, field) for field in ("A", "B", "rank", "scaling")
        }
        names = tuple(self.names[i] for i in index)
        return dataclasses.replace(
            self, **jax.tree.map(lambda a: a[:, index], fields), names=names
        )

    def quantised(self, qtype: str) -> "LoraPool":
        """Return the pool in 4 or 8 bits: A tiled along d_in, B along d_out (see `weights.quantise`)."""
        return dataclasses.replace(
            self,
            A=quantised_sites(self.A, qtype, tiled_axis=2),
            B=quantised_sites(self.B, qtype, tiled_axis=3),
        )


def quantised_sites(
    weights: dict[str, Weight], qtype: str, *, tiled_axis: int
) -> dict[str, Weight]:
    """Return the weights of all sites in 4 or 8 bits (see `weights.quantise`)."""
    return {
        site: quantise(dense(weight, jnp.float32), qtype, tiled_axis=tiled_axis)
        for site, weight in weights.items()
    }


def positions(names: Sequence[str], chosen: Sequence[str | int]) -> list[int]:
    """Return the positions of adapters given by name or index in a pool that holds `names`.

    Raises a ValueError for one that is not in the pool or occurs twice, and if `chosen` is empty or one text.
    """
    if isinstance(chosen, str):
        raise ValueError(
            f"{chosen!r} is one name: give a list of names or indices, as in [{chosen!r}]"
        )
    if not chosen:
        raise ValueError("a pool needs at least one adapter: none was given")
    position = {name: i for i, name in enumerate(names)}
    indices = [position.get(c, -1) if isinstance(c, str) else c for c in chosen]
    for choice, index in zip(chosen, indices, strict=True):
        if not 0 <= index < len(names):
            raise ValueError(
                f"the pool lacks {choice!r}: choose one of {len(names)}, {names[0]!r} to {names[-1]!r}"
            )
    if len(set(indices)) < len(indices):
        raise ValueError(
            f"an adapter is chosen twice in {list(chosen)}: name each one once"
        )
    return indices


def in_pool(modules: int, index: Int[Array, "..."]) -> Float[Array, ""] | float:
    """Return the factor 1, or NaN if a compiled function got a position outside of a pool of so many modules.

    Raises a ValueError for such a position, or one that a fusion has twice, where the values are known.
    """
    if is_traced(index):
        return jnp.where(jnp.all((index >= 0) & (index < modules)), 1.0, jnp.nan)
    # No process has all values of an array that a mesh of several splits.
    if not isinstance(index, jax.Array) or index.is_fully_addressable:
        indices = np.asarray(index)
        if np.any((indices < 0) | (indices >= modules)):
            raise ValueError(
                f"expected index from 0 to {modules - 1}, for a pool of {modules}, got {indices.tolist()}"
            )
        if np.any(np.diff(np.sort(indices)) == 0):
            raise ValueError(f"expected each module once, got index {indices.tolist()}")
    return 1.0


def random_pool(pool: LoraPool, key: PRNGKeyArray) -> LoraPool:
    """Return a control: a pool of Gaussian matrices, each with the Frobenius norm of the one it replaces.

    A module's draw depends only on the key, its name and its ranks; inside a compiled function, where ranks have no
    values, also on the pool's padding. Sites that an adapter lacks and ranks beyond its own stay zero.
    """

    def like(a: Array, site: str, purpose: str, axis: int) -> Array:
        def draw(n: int, name: str) -> Array:
            module_key = jax.random.fold_in(
                key, zlib.crc32(f"{purpose} of {site}, {name}".encode())
            )
            if is_traced(pool.rank):
                rank = a.shape[axis]
            else:
                rank = int(np.max(np.asarray(pool.rank[site])[:, n]))
            shape = [a.shape[0], *a.shape[2:]]
            room = [(0, 0)] * 3
            shape[axis - 1] = rank
            room[axis - 1] = (0, a.shape[axis] - rank)
            return jnp.pad(jax.random.normal(module_key, shape, a.dtype), room)

        noise = jnp.stack([draw(n, name) for n, name in enumerate(pool.names)], axis=1)
        within_rank = jax.lax.broadcasted_iota(
            jnp.int32, a.shape, axis
        ) < jnp.expand_dims(pool.rank[site], (2, 3))
        noise = jnp.where(within_rank, noise, 0)
        return noise * (_norm(a) / jnp.maximum(_norm(noise), jnp.finfo(a.dtype).tiny))

    return dataclasses.replace(
        pool,
        A={
            site: like(dense(a, jnp.float32), site, "A", 3)
            for site, a in pool.A.items()
        },
        B={
            site: like(dense(b, jnp.float32), site, "B", 2)
            for site, b in pool.B.items()
        },
        names=tuple(f"random-factors {name}" for name in pool.names),
    )


def shuffled_pool(pool: LoraPool, key: PRNGKeyArray) -> LoraPool:
    """Return a control: a pool whose modules keep their matrices, but each in another layer of its stack.

    The layers of a module are permuted by one random cycle, the same at all sites of a stack, so A and B of a layer
    stay together. The draw depends only on the key and the module's name.
    """

    def source(site: str) -> Int[Array, "L N"]:
        layers = pool.rank[site].shape[0]

        def draw(name: str) -> Array:
            module_key = jax.random.fold_in(
                key, zlib.crc32(f"layers of {stack_of(site)}, {name}".encode())
            )
            cycle = jax.random.permutation(module_key, layers)
            return jnp.zeros(layers, jnp.int32).at[cycle].set(jnp.roll(cycle, 1))

        return jnp.stack([draw(name) for name in pool.names], axis=1)

    sources = {site: source(site) for site in pool.rank}
    modules = jnp.arange(len(pool))[None]

    def moved(weights: dict[str, Any]) -> dict[str, Any]:
        return {
            site: jax.tree.map(lambda a, s=sources[site]: a[s, modules], w)
            for site, w in weights.items()
        }

    return dataclasses.replace(
        pool,
        A=moved(pool.A),
        B=moved(pool.B),
        rank=moved(pool.rank),
        scaling=None if pool.scaling is None else moved(pool.scaling),
        magnitude=pool.magnitude
        and {site: m[sources[site][:, 0]] for site, m in pool.magnitude.items()},
        names=tuple(f"shuffled {name}" for name in pool.names),
    )


def rotated_pool(pool: LoraPool, key: PRNGKeyArray) -> LoraPool:
    """Return a control: a pool whose updates B A keep their singular values, but not their singular vectors.

    Each update's singular vectors, left and right, are replaced by random ones (Haar). They are drawn separately for
    every module, site and layer; a module's draw depends only on the key, its name and its ranks.
    """

    def turned(a: Array, site: str, side: str) -> Array:
        """Return matrices [L, N, d, r] whose columns are turned in their space of d dimensions."""
        layers, _, d, r = a.shape

        def draw(name: str, columns: int) -> Array:
            module_key = jax.random.fold_in(
                key, zlib.crc32(f"{side} of {site}, {name}".encode())
            )
            vectors, triangle = _qr(
                jax.random.normal(module_key, (layers, d, columns), a.dtype)
            )
            return vectors * jnp.sign(jnp.diagonal(triangle, axis1=1, axis2=2))[:, None]

        rotated = []
        for n, name in enumerate(pool.names):
            if is_traced(pool.rank):
                rank = r
            else:
                rank = int(np.max(np.asarray(pool.rank[site])[:, n]))
            _, triangle = _qr(a[:, n, :, :rank])
            new = jnp.matmul(draw(name, min(d, rank)), triangle, precision="highest")
            rotated.append(jnp.pad(new, [(0, 0), (0, 0), (0, r - rank)]))
        return jnp.stack(rotated, axis=1)

    def of_outputs(b: Array, site: str) -> Array:
        return jnp.swapaxes(turned(jnp.swapaxes(b, 2, 3), site, "outputs"), 2, 3)

    return dataclasses.replace(
        pool,
        A={
            site: turned(dense(a, jnp.float32), site, "inputs")
            for site, a in pool.A.items()
        },
        B={site: of_outputs(dense(b, jnp.float32), site) for site, b in pool.B.items()},
        names=tuple(f"rotated {name}" for name in pool.names),
    )


_norm = partial(jnp.linalg.norm, axis=(-2, -1), keepdims=True)
# Matrix by matrix: on a CPU a batched factorisation waits for the thread pool inside of it. Two of them in one compiled
# function wait for each other for ever on two cores (jaxlib 0.10.2).
_qr = jax.jit(partial(jax.lax.map, jnp.linalg.qr))
