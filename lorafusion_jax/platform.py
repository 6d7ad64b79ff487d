"""The platform that programs are traced for, and whether a value is traced: choices made while tracing ask here."""

from typing import Any

import jax
import jax.core


def for_cpu() -> bool:
    """Return whether programs are traced for a CPU, which is another question than where this process runs.

    It is the platform of the ambient mesh, as `jax.set_mesh` and `jax.sharding.use_abstract_mesh` set it, and without
    one JAX's default. So a program can be compiled for devices that are not there. The mesh is a part of the key under
    which JAX keeps traced programs.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() == "cpu" if device is None else device.device_kind == "cpu"


def is_traced(tree: Any) -> bool:
    """Return whether any leaf is a tracer of a transformation."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
