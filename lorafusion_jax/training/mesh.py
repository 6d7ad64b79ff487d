"""Seeds as an array axis, and a mesh of devices: seeds over its axis `seed`, matrices over its axis `model`.

One program computes all seeds, batched or one after the other. The mesh is ambient (`jax.set_mesh`): `over_seeds` gives
every device its own seeds, and `rules` places arrays. Matrices are split as in Megatron-LM (Shoeybi et al., 2019): the
first of a chain by columns, the last by rows, so attention and feed-forward layer each sum over devices once.
"""

import contextlib
import functools
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..models.architecture import Architecture, Split
from ..models.registry import abstract_model
from ..models.weights import is_chip
from ..support.platform import for_cpu

SeedMode = Literal["batched", "sequential"]
WHOLE = PartitionSpec()  # of arrays that every device has
AXIS = "seeds_of_a_device"  # of the batched mode, for collectives of a device's seeds
_Tree = TypeVar("_Tree")

AXES = ("seed", "model")

_SPLIT = {"columns": (None, "model"), "rows": ("model", None)}
# Pattern in an array's path -> axes of its last dimensions.
Rules = tuple[tuple[str, tuple[str | None, ...]], ...]


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
    every device maps its seeds without waiting for other devices. `split` is how the shared arrays are split, a prefix
    of their tree; by default every device has all.
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


def make_mesh(option: str, seeds: int = 0) -> Mesh:
    """Return the mesh of an option such as `seed=4,model=2` for a run of so many seeds.

    Raises a ValueError for an axis or size that is not valid, too few devices, more devices of several processes than
    the mesh has, and seeds that cannot be divided evenly.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in option.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--mesh {option}: {part!r} is not an axis and its size: give for example seed=4,model=2"
            )
        sizes[name] = int(size)
    if seeds % sizes["seed"]:
        raise ValueError(
            f"{seeds} seeds cannot be shared out evenly over --mesh seed={sizes['seed']}: give a multiple"
        )
    size = sizes["seed"] * sizes["model"]
    devices = jax.device_count()
    if size > devices:
        forced = f", or set XLA_FLAGS=--xla_force_host_platform_device_count={size}"
        raise ValueError(
            f"--mesh {option} needs {size} devices, got {devices}: use fewer"
            + (forced if for_cpu() else "")
        )
    if jax.process_count() > 1 and size < devices:
        raise ValueError(
            f"--mesh {option} uses {size} of {devices} devices of {jax.process_count()} processes: use all"
        )
    shape = tuple(sizes.values())
    return jax.make_mesh(
        shape,
        AXES,
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=jax.devices()[:size],
    )


@functools.lru_cache(maxsize=16)
def rules(config: Architecture) -> Rules:
    """Return the rules that split the arrays of a run. The first match counts; arrays without a match are not split.

    A path contains the modules of a base weight (`base/first/map/kernel`), or the name of a site (`pool/A/first.map`).
    """
    model = abstract_model(config)
    variables = {id(variable): name for name, variable in model.variables().items()}
    # Full fine-tuning writes the modules' names with brackets.
    paths = {
        variables[id(node)]: r"\W+".join(re.escape(str(part)) for part in path)
        for path, node in nnx.iter_graph(model)
        if id(node) in variables
    }
    names_by_split = {
        split: [name for name, site in config.adaptable.items() if site.split == split]
        for split in get_args(Split)
    }
    split_paths: list[tuple[str, tuple[str | None, ...]]] = [
        (rf"\b{name}\b(?!\.)", _SPLIT[split]) for name, split in config.splits.items()
    ]
    for split, names in names_by_split.items():
        if names:
            split_paths.append(
                (
                    rf"\b({'|'.join(paths[name] for name in names if name in paths)})\b",
                    _SPLIT[split],
                )
            )
            sites = rf"({'|'.join(map(re.escape, names))})(?![\w.])"
            if split == "rows":
                split_paths.append((rf"\b[AU]/{sites}", _SPLIT[split]))
            else:
                split_paths.append((rf"\b[BV]/{sites}", _SPLIT[split]))
                split_paths.append(
                    (
                        rf"\b(squared|cross|pairs|norms|magnitudes?|kept)/{sites}",
                        ("model",),
                    )
                )
    return tuple(split_paths)


def check_model(config: Architecture) -> None:
    """Raise ValueError for a base model whose dimensions the ambient mesh does not divide."""
    size = axis_size("model")
    for stack in config.stacks.values():
        for attention in stack.attentions:
            _check_divides(size, attention.heads, "num_heads")
            _check_divides(size, attention.kv_heads, "num_kv_heads")
        if stack.recurrent_heads:
            _check_divides(size, stack.recurrent_heads, "linear_num_value_heads")
        _check_divides(size, stack.d_ff, "d_ff")
    _check_divides(size, config.vocab_size, "vocab_size")


def on_mesh(
    tree: _Tree, config: Architecture | None = None, *, of_seeds: bool = False
) -> _Tree:
    """Return arrays placed on the ambient mesh, or unchanged without one; with several processes, the same in each.

    `config` is the structure of the model, None if no matrix is split, as in batches. With `of_seeds` the arrays have a
    leading axis of seeds. Raises a ValueError if the mesh does not divide a dimension.
    """
    if jax.sharding.get_mesh().empty:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(
        map(_placed, leaves, shardings(tree, config, of_seeds=of_seeds))
    )


def shardings(
    tree: Any, config: Architecture | None = None, *, of_seeds: bool = False
) -> list[NamedSharding]:
    """Return where `on_mesh` places the leaves of a tree, given arrays or their shapes."""
    mesh = jax.sharding.get_mesh()
    split = () if config is None else rules(config)

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> list[NamedSharding]:
        if is_chip(leaf):
            spec = PartitionSpec("seed") if of_seeds else PartitionSpec()
            return [NamedSharding(mesh, spec)] * len(jax.tree.leaves(leaf))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = partition(name, leaf.ndim, split, of_seeds=of_seeds)
        for axis, size in zip(spec, leaf.shape, strict=False):
            if axis is not None:
                _check_divides(mesh.shape[axis], size, name, axis)
        return [NamedSharding(mesh, spec)]

    by_path = jax.tree.leaves_with_path(tree, is_leaf=is_chip)
    return [sharding for path, leaf in by_path for sharding in of_leaf(path, leaf)]


def partition(
    name: str, dimensions: int, rules: Rules, *, of_seeds: bool = False
) -> PartitionSpec:
    """Return the partition of an array by its path, such as `pool/A/first.map`, and its number of dimensions."""
    last = next((axes for pattern, axes in rules if re.search(pattern, name)), ())
    first = ("seed",) if of_seeds else ()
    between = (None,) * (dimensions - len(first) - len(last))
    return PartitionSpec(*first, *between, *last)


def to_host(tree: Any) -> Any:
    """Return arrays as NumPy's, whole in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(tree, tiled=True)


def loading() -> contextlib.AbstractContextManager[Any]:
    """Return the context to load weights in, so that one accelerator need not hold all weights of a mesh."""
    if axis_size("model") == 1 or for_cpu():
        return contextlib.nullcontext()
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def _placed(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        bits = _placed(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)  # from where it is on the mesh already
    array = np.asarray(leaf)
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: array[index]
    )


def _check_divides(size: int, dimension: int, name: str, axis: str = "model") -> None:
    if dimension % size:
        raise ValueError(
            f"--mesh {axis}={size} does not divide {name}, which is {dimension}: give one that divides it"
        )


def axis_size(axis: str) -> int:
    """Return the size of an axis of the ambient mesh, 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)
