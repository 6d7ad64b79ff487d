"""The platform that functions are traced for, and whether a value is traced."""

from typing import Any

import jax
import jax.core


def for_cpu() -> bool:
    """Return whether functions are traced for a CPU: by the ambient mesh, or without one by JAX's default platform.

    With `jax.set_mesh` or `jax.sharding.use_abstract_mesh`, functions can be compiled for other devices than this
    machine's. The mesh is a part of the key under which JAX caches traced functions.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() == "cpu" if device is None else device.device_kind == "cpu"


def is_traced(tree: Any) -> bool:
    """Return whether any leaf is a tracer of a transformation."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
