"""Seeds as an array axis: one program for all of them, batched or one after the other."""

from collections.abc import Callable
from typing import Any, Literal

import jax

Path = Literal["vmap", "map"]


def default_path() -> Path:
    """Return how seeds run best on this platform.

    Accelerators read the base weights once for all seeds (`vmap`). On a CPU a batched program measures
    slower than its seeds in turn (`map`): caches hold one seed's activations, not all of them.
    """
    return "map" if jax.default_backend() == "cpu" else "vmap"


def over_seeds(fn: Callable[..., Any], path: Path) -> Callable[..., Any]:
    """Return `fn(seeds, shared)` mapped over the leading axis of every array in `seeds`.

    Args:
      fn: of (one seed's arrays, what all seeds share).
      path: `vmap` (results within 1e-5 of single runs) or `map` (equal to them bit for bit).
    """
    if path == "vmap":
        return jax.vmap(fn, in_axes=(0, None))
    return lambda seeds, shared: jax.lax.map(lambda seed: fn(seed, shared), seeds)
