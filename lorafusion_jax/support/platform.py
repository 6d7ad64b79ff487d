"""The platform and mesh that functions are traced for, this machine's cores, and whether a value is traced."""

import os
from typing import Any

import jax
import jax.core
from jax.sharding import AxisType


def for_cpu() -> bool:
    """Return whether functions are traced for a CPU: by the ambient mesh, or without one by JAX's default platform.

    With `jax.set_mesh` or `jax.sharding.use_abstract_mesh`, functions can be compiled for other devices than this
    machine's. The mesh is a part of the key under which JAX caches traced functions.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (
        jax.default_backend() == "cpu"
        if device is None
        else device.device_kind == "cpu"
    )


def cores() -> int:
    """Return the number of cores that this process may use; macOS has no affinity, so there it is all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_traced(tree: Any) -> bool:
    """Return whether any leaf is a tracer of a transformation."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def check_mesh(tree: Any) -> None:
    """Raise ValueError for a mesh with explicit axes, ambient or of an array, which `jax.make_mesh` makes by default.

    With them JAX requires a layout for each lookup and product that is ambiguous.
    """
    arrays = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    for mesh in (
        jax.sharding.get_abstract_mesh(),
        *(jax.typeof(array).sharding.mesh for array in arrays),
    ):
        if AxisType.Explicit in mesh.axis_types:
            raise ValueError(
                f"expected a mesh whose axes are Auto, got {dict(zip(mesh.axis_names, mesh.axis_types, strict=True))}: "
                "make it with jax.make_mesh(..., axis_types=(AxisType.Auto,) * number of axes)"
            )
