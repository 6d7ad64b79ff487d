"""SHA-256 of tensors as they were read: of names, shapes, dtypes and bytes, whatever the format of their file.

Processors have instructions for SHA-256, so it takes half the time of BLAKE2.

Axis letters: L layer, N modules.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np

from ..adapters.basis import Pool, SharedBasis
from ..adapters.pool import LoraPool
from .gguf.reader import StoredTensor
from .source import release

_ROWS = (
    1024  # hashed at a time: a tensor that was transposed is never in memory as a whole
)


# A view of a mapped file, or a tensor that is dequantised when its rows are read.
Tensor = np.ndarray | StoredTensor


class Digests(TypedDict):
    """SHA-256 of the base, of each fused module by name, and of the directions of a shared basis.

    A run also has those of the base's configuration, tokenizer and chat template.
    """

    base: str
    modules: dict[str, str]
    basis: NotRequired[str | None]
    config: NotRequired[str]
    tokenizer: NotRequired[str]
    chat_template: NotRequired[str]


class PoolDigests(NamedTuple):
    """SHA-256 of the modules of a pool by name, and of the directions of a shared basis."""

    modules: dict[str, str]
    basis: str | None


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors; their order makes no difference."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return digest_of_all(
            dict(
                zip(
                    tensors,
                    threads.map(digest_of_one, tensors, tensors.values()),
                    strict=True,
                )
            )
        )


def digest_of_one(name: str, tensor: Tensor) -> bytes:
    """Return the SHA-256 of a tensor and its name."""
    dtype = tensor.stored_dtype if isinstance(tensor, StoredTensor) else tensor.dtype
    sha = hashlib.sha256(f"{name}\0{dtype}\0{list(tensor.shape)}\0".encode())
    is_stack = len(tensor.shape) > 1
    for row in range(0, tensor.shape[0] if is_stack else 1, _ROWS):
        rows = slice(row, row + _ROWS) if is_stack else slice(None)
        if isinstance(tensor, StoredTensor):
            part = tensor.as_stored(rows)
        else:
            part = np.atleast_1d(tensor)[rows]
        sha.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    release(tensor)
    return sha.digest()


def digest_of_all(digests: Mapping[str, bytes]) -> str:
    """Return the SHA-256 of tensors from that of each, by name."""
    return hashlib.sha256(
        b"".join(digests[name] for name in sorted(digests))
    ).hexdigest()


def pool_digests(pool: Pool) -> PoolDigests:
    """Return the digests of a pool that was read from a disk in full precision, with the scaling in B.

    A converted pool has the digests of its adapters.
    """
    if isinstance(pool, SharedBasis):
        cores = {site: np.asarray(S) for site, S in pool.S.items()}
        modules = {
            name: tensor_digest(
                {site: S[:, n] for site, S in cores.items() if np.any(S[:, n])}
            )
            for n, name in enumerate(pool.names)
        }
        site_digests = {
            f"{side}.{site}": np.asarray(a)
            for side, factor in pool.factors.items()
            for site, a in factor.items()
        }
        return PoolDigests(modules, tensor_digest(site_digests))
    return PoolDigests(
        {name: tensor_digest(_tensors(pool, n)) for n, name in enumerate(pool.names)},
        None,
    )


def _tensors(pool: LoraPool, n: int) -> dict[str, np.ndarray]:
    """Return the matrices of one module, without the zeros that pad smaller ranks."""
    matrices = {}
    for site, rank in pool.rank.items():
        A = np.asarray(pool.A[site])
        B = np.asarray(pool.B[site])
        for layer, r in enumerate(np.asarray(rank)[:, n].tolist()):
            if r:
                matrices |= {
                    f"{site}.{layer}.A": A[layer, n, :, :r],
                    f"{site}.{layer}.B": B[layer, n, :r],
                }
                if pool.magnitude is not None:
                    matrices[f"{site}.{layer}.magnitude"] = np.asarray(
                        pool.magnitude[site]
                    )[layer]
    return matrices
