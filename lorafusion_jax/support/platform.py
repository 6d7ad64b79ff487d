"""The platform and mesh that functions are traced for, this machine's cores, and whether a value is traced."""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.sharding import AxisType

_MAPPING_LIMIT = Path("/proc/sys/vm/max_map_count")
_MAPPINGS = Path("/proc/self/maps")
_PROCESSOR = Path("/proc/cpuinfo")
_LEVEL = "xla_backend_optimization_level"
# A level that the environment names holds for every program.
_QUICK = None if _LEVEL in os.environ.get("XLA_FLAGS", "") else {_LEVEL: 1}


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


def quick_jit(function: Callable[..., Any], **arguments: Any) -> Any:
    """Return `jax.jit` of a function whose programs for a CPU are compiled with LLVM's level 1.

    They compile faster and run as fast, because most of their time is that of products, which LLVM does not compile.
    """
    usual = jax.jit(function, **arguments)
    quick = jax.jit(function, compiler_options=_QUICK, **arguments)

    def program() -> Any:
        return quick if for_cpu() else usual

    @functools.wraps(usual)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Within another program JAX takes no options, and there a new array is traced, even if no argument is.
        within = is_traced((args, kwargs, jnp.zeros(())))
        return (usual if within else program())(*args, **kwargs)

    jitted: Any = call
    jitted.lower = lambda *args, **kwargs: program().lower(*args, **kwargs)
    jitted.cache_size = lambda: program()._cache_size()
    return jitted


def cores() -> int:
    """Return the number of cores that this process may use; macOS has no affinity, so there it is all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def suggest_bfloat16(dtype: str) -> None:
    """Print a line where a CPU has tiles for bfloat16 (AMX), for a run in another type.

    The time is that of a step of FLAN-T5-small (0.53) and of SmolLM2-135M (0.45 to 0.54) on one core of a Xeon.
    """
    if dtype == "bfloat16" or not for_cpu() or not _PROCESSOR.is_file():
        return
    if "amx_bf16" in _PROCESSOR.read_text():
        print(
            "this processor has tiles for bfloat16: with --dtype bfloat16 a step takes about half of the time",
            file=sys.stderr,
        )


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


def make_room(limit: int | None = None) -> bool:
    """Forget all compiled programs if the process has more than half of its mappings; return whether it did.

    On a CPU every program takes several mappings of memory. At Linux's limit, by default 65,530 mappings, LLVM ends the
    process or the next allocation fails.
    """
    if not (_MAPPING_LIMIT.is_file() and _MAPPINGS.is_file()):
        return False
    with _MAPPINGS.open("rb") as file:
        taken = sum(1 for _ in file)
    if 2 * taken <= (limit or int(_MAPPING_LIMIT.read_text())):
        return False
    jax.clear_caches()
    return True
