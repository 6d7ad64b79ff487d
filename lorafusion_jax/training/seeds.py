"""Seeds as an array axis: one program for all of them, batched or one after the other."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.sharding import PartitionSpec

from ..support.platform import for_cpu

SeedMode = Literal["batched", "sequential"]
WHOLE = PartitionSpec()  # of arrays that every device has
AXIS = "seeds_of_a_device"  # of the batched mode, for collectives of a device's seeds


def default_seed_mode() -> SeedMode:
    """Return the faster mode on this platform.

    Accelerators read the base weights once for all seeds (`batched`). On CPUs `sequential` measured faster, because
    caches hold one seed's activations, except for short rows on a Xeon.
    """
    return "sequential" if for_cpu() else "batched"


def over_seeds(
    fn: Callable[..., Any], seed_mode: SeedMode, split: Any = WHOLE
) -> Callable[..., Any]:
    """Return `fn(seeds, shared)`, of one seed's arrays and shared ones, mapped over the first axis of all `seeds`.

    Results of `batched` are within 1e-5 of single runs, and those of `sequential` equal them bit for bit. On a mesh
    (see `training.mesh`) every device maps its seeds without waiting for other devices. `split` is how the shared
    arrays are split, a prefix of their tree; by default every device has all.
    """

    def mapped(seeds: Any, shared: Any) -> Any:
        if seed_mode == "batched":
            return jax.vmap(fn, in_axes=(0, None), axis_name=AXIS)(seeds, shared)
        return jax.lax.map(lambda seed: fn(seed, shared), seeds)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return mapped
    # The compiler partitions the axis `model`. Without that axis, the program has the bits of one device.
    by_hand = {axis for axis, size in mesh.shape.items() if axis == "seed" or size == 1}
    seed_axis = PartitionSpec("seed")
    return jax.shard_map(
        mapped,
        in_specs=(seed_axis, split),
        out_specs=seed_axis,
        axis_names=by_hand,
        check_vma=False,
    )
