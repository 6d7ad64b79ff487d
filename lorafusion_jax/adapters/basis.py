"""A shared basis: the sums of a pool's modules, in directions that are written into arrays once for all tasks.

For every adapted matrix, over all modules dW_n = A_n B_n of a pool:

    U [d_in, k]    the leading eigenvectors of sum_n dW_n dW_n^T
    V [k, d_out]   those of sum_n dW_n^T dW_n, as rows
    S_n [k, k]     U^T dW_n V^T
    dW = U (sum_n c_n S_n) V

A task reads U and V, as it would a single LoRA of rank k, instead of N modules of rank r. S_n stays digital. The
directions are nested: the first k of a larger basis are the basis of size k. No dW_n is formed: with B_n^T = Q R, the
eigenvectors of sum_n A_n B_n B_n^T A_n^T are the left singular vectors of the matrices A_n R^T side by side.

Sources: joint diagonalisation of a collection of LoRAs (Gabrielsson et al., "Compress then Serve", 2024); shared
subspaces of adapters (Kaushik et al., "EigenLoRAx", 2025).

Axis letters: L layer, N modules, r rank, k directions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..models.weights import Weight
from .pool import LoraPool, positions, quantised_sites


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedBasis:
    """N modules of one base model in k shared directions, by site.

    Attributes:
      U: site -> [L, d_in, k], orthonormal columns.
      V: site -> [L, k, d_out], orthonormal rows.
      S: site -> [L, N, k, k], the modules, scaling included.
      energy: site -> [L, N], the squared Frobenius norm of each module's dW, in whole.
      rank: site -> [L, N], the rank of each module, 0 where it lacks the site.
      names: names of the modules, in the order of the axis N.
      sites: the sites in the order of the computation, as in `LoraPool`.
    """

    U: dict[str, Weight]
    V: dict[str, Weight]
    S: dict[str, Float[Array, "*C _L _N k k"]]
    energy: dict[str, Float[Array, "*C _L _N"]]
    rank: dict[str, Int[Array, "*C _L _N"]]
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    sites: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    def __len__(self) -> int:
        return len(self.names)

    @property
    def k(self) -> int:
        return next(iter(self.S.values())).shape[-1]

    @property
    def factors(self) -> dict[str, dict[str, Weight]]:
        return {"U": self.U, "V": self.V}

    @property
    def magnitude(self) -> None:
        """A basis holds no DoRA adapter."""
        return None

    def indices(self, chosen: Sequence[str | int]) -> list[int]:
        return positions(self.names, chosen)

    def select(self, chosen: Sequence[str | int]) -> "SharedBasis":
        """Return the basis with the modules given by name or index alone, in that order; the directions stay."""
        index = np.array(self.indices(chosen))
        S, energy, rank = jax.tree.map(
            lambda a: a[:, index], (self.S, self.energy, self.rank)
        )
        return dataclasses.replace(
            self,
            S=S,
            energy=energy,
            rank=rank,
            names=tuple(self.names[i] for i in index),
        )

    def first(self, k: int) -> "SharedBasis":
        """Return the basis of the first k directions."""
        if not 1 <= k <= self.k:
            raise ValueError(
                f"the basis has {self.k} directions, not {k}: use 1 to {self.k}, or `lorafusion convert --basis {k}`"
            )
        return dataclasses.replace(
            self,
            U=jax.tree.map(lambda u: u[..., :k], self.U),
            V=jax.tree.map(lambda v: v[:, :k], self.V),
            S={site: s[..., :k, :k] for site, s in self.S.items()},
        )

    def kept(self) -> dict[str, Float[np.ndarray, "_L _N"]]:
        """Return, by site, the share of every module's squared norm that the directions keep; 1 where it has none."""
        shares = {}
        for site, s in self.S.items():
            total = np.asarray(self.energy[site], float)
            inside = np.sum(np.square(np.asarray(s, float)), axis=(2, 3))
            shares[site] = np.where(
                total > 0, inside / np.where(total > 0, total, 1), 1.0
            )
        return shares

    def quantised(self, qtype: str) -> "SharedBasis":
        """Return the basis with U and V in 4 or 8 bits, tiled along d_in and d_out (see `weights.quantise`)."""
        return dataclasses.replace(
            self,
            U=quantised_sites(self.U, qtype, tiled_axis=1),
            V=quantised_sites(self.V, qtype, tiled_axis=2),
        )


Pool = LoraPool | SharedBasis
# U and V by site.
Directions = tuple[
    dict[str, Float[np.ndarray, "_L _d_in k"]],
    dict[str, Float[np.ndarray, "_L k _d_out"]],
]


def shared_basis(pool: LoraPool, k: int) -> SharedBasis:
    """Return the modules of a pool in the k directions that keep most of their squared norms.

    On the host in float64, one layer of a site at a time.

    Raises:
      ValueError: k is below 1, or larger than a side of a matrix or than the rank of the pool's sum there; the pool is
        quantised, or a DoRA adapter, whose magnitudes a sum lacks.
    """
    return in_directions(pool, directions(pool, k))


def directions(
    pool: LoraPool, k: int, *, done: Callable[[], Any] = lambda: None
) -> Directions:
    """Return the leading k directions of a pool by site, with `shared_basis`'s errors; `done` follows each layer."""
    check_size(pool, k)
    U = {}
    V = {}
    for site in pool.rank:
        left = []
        right = []
        for layer in range(len(pool.rank[site])):
            A, B = _layer(pool, site, layer)
            left.append(_leading(A, B, k))
            right.append(_leading(B.swapaxes(1, 2), A.swapaxes(1, 2), k).T)
            done()
        U[site] = np.stack(left)
        V[site] = np.stack(right)
    return U, V


def in_directions(pool: LoraPool, directions: Directions) -> SharedBasis:
    """Return a pool's modules projected on given directions, orthonormal columns U and rows V by site.

    Raises a ValueError for a site without directions or of another shape, and for a DoRA adapter.
    """
    if pool.magnitude is not None:
        raise ValueError(
            "a DoRA adapter has magnitudes, which a basis does not hold: fuse it as a module"
        )
    U, V = directions
    for site, A in pool.A.items():
        sizes = (A.shape[0], A.shape[2], pool.B[site].shape[3])
        if site not in U:
            raise ValueError(
                f"the basis lacks directions at {site}, which the modules adapt: make a new one of them"
            )
        if (got := (U[site].shape[0], U[site].shape[1], V[site].shape[2])) != sizes:
            raise ValueError(
                f"directions at {site} for layers, d_in and d_out {got}: give ones for {sizes}"
            )
    S = {}
    energy = {}
    for site in pool.rank:
        cores = []
        energies = []
        for layer in range(len(pool.rank[site])):
            A, B = _layer(pool, site, layer)
            left = np.asarray(U[site][layer], float)
            right = np.asarray(V[site][layer], float)
            squared = (A.swapaxes(1, 2) @ A) * (B @ B.swapaxes(1, 2))
            energies.append(np.sum(squared, axis=(1, 2)))
            cores.append((left.T @ A) @ (B @ right.T))
        S[site] = np.stack(cores)
        energy[site] = np.stack(energies)
    fields: Any = {
        "U": {site: U[site] for site in S},
        "V": {site: V[site] for site in S},
        "S": S,
        "energy": energy,
    }
    fields = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), fields)
    return SharedBasis(**fields, rank=pool.rank, names=pool.names, sites=pool.sites)


def random_directions(pool: LoraPool, k: int, key: PRNGKeyArray) -> Directions:
    """Return a control: directions at a pool's sites, drawn evenly and independently of the modules."""
    check_size(pool, k)
    U = {}
    V = {}
    for number, (site, A) in enumerate(pool.A.items()):
        left, right = jax.random.split(jax.random.fold_in(key, number))
        shape = A.shape[0], A.shape[2], pool.B[site].shape[3]
        U[site] = np.linalg.qr(
            np.asarray(jax.random.normal(left, (shape[0], shape[1], k)), float)
        )[0]
        V[site] = np.linalg.qr(
            np.asarray(jax.random.normal(right, (shape[0], shape[2], k)), float)
        )[0].swapaxes(1, 2)
    return U, V


def check_size(pool: LoraPool, k: int) -> None:
    """Raise ValueError if a pool has no k directions at one of its sites."""
    if k < 1:
        raise ValueError(f"a basis of {k} directions: expected at least 1")
    for site, A in pool.A.items():
        _, modules, d_in, rank = A.shape
        d_out = pool.B[site].shape[3]
        check_width(k, site, d_in, d_out)
        if k > modules * rank:
            raise ValueError(
                f"a basis of {k} directions, but the sum of {modules} modules of rank {rank} at {site} has a rank of "
                f"at most {modules * rank}: use a smaller basis, or the modules themselves"
            )


def check_width(k: int, site: str, d_in: int, d_out: int) -> None:
    """Raise ValueError if a matrix is too small for a basis of k directions."""
    if k > min(d_in, d_out):
        raise ValueError(
            f"a basis of {k} directions, but {site} is {d_in} x {d_out}: use at most {min(d_in, d_out)}"
        )


def _layer(
    pool: LoraPool, site: str, layer: int
) -> tuple[Float[np.ndarray, "N d_in r"], Float[np.ndarray, "N r d_out"]]:
    for weight in (pool.A[site], pool.B[site]):
        if not isinstance(weight, jax.Array | np.ndarray):
            kind = type(weight).__name__
            raise ValueError(
                f"the modules at {site} are {kind}: give plain arrays, not quantised ones"
            )
    A, B = jax.tree.map(lambda a: a[layer], (pool.A[site], pool.B[site]))
    return np.asarray(A, float), np.asarray(B, float)


def _leading(
    left: Float[np.ndarray, "N d r"], right: Float[np.ndarray, "N r e"], k: int
) -> Float[np.ndarray, "d k"]:
    """Return the leading eigenvectors of sum_n (left_n right_n)(left_n right_n)^T, each of positive largest entry."""
    import scipy.linalg  # 0.1 s that commands without a basis save

    R = np.asarray(np.linalg.qr(right.swapaxes(1, 2), mode="r"))
    side_by_side = (left @ R.swapaxes(1, 2)).swapaxes(0, 1).reshape(left.shape[1], -1)
    d, width = side_by_side.shape
    if width < d:
        vectors = scipy.linalg.svd(side_by_side, full_matrices=False)[0][:, :k]
    else:
        gram = side_by_side @ side_by_side.T
        vectors = scipy.linalg.eigh(gram, subset_by_index=[d - k, d - 1])[1][:, ::-1]
    largest = np.take_along_axis(
        vectors, np.argmax(np.abs(vectors), axis=0)[None], axis=0
    )
    return vectors * np.where(largest < 0, -1.0, 1.0)
