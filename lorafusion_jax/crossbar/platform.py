"""The platform that functions are compiled for."""

import jax


def for_cpu() -> bool:
    """Return whether functions are traced for a CPU: by the ambient mesh, or without one by JAX's default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() == "cpu" if device is None else device.device_kind == "cpu"


def for_one_tpu() -> bool:
    """Return whether programs are traced for one TPU that multiplies bytes, which is v5 or later."""
    mesh = jax.sharding.get_abstract_mesh()
    kind = (mesh.abstract_device or jax.devices()[0]).device_kind
    return mesh.size <= 1 and kind.startswith("TPU") and not kind.startswith(("TPU v2", "TPU v3", "TPU v4"))
