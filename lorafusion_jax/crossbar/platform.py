"""The platform that programs are traced for: every choice that depends on it asks here."""

import jax


def for_cpu() -> bool:
    """Return whether programs are traced for a CPU, which is another question than where this process runs.

    It is the platform of the ambient mesh, as `jax.set_mesh` and `jax.sharding.use_abstract_mesh` set it, and without
    one JAX's default. So a program can be compiled for devices that are not there. The mesh is a part of the key under
    which JAX keeps traced programs.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() == "cpu" if device is None else device.device_kind == "cpu"


def for_one_tpu() -> bool:
    """Return whether programs are traced for one TPU that multiplies bytes, which is v5 or later."""
    mesh = jax.sharding.get_abstract_mesh()
    kind = (mesh.abstract_device or jax.devices()[0]).device_kind
    return mesh.size <= 1 and kind.startswith("TPU") and not kind.startswith(("TPU v2", "TPU v3", "TPU v4"))
