"""A run on a mesh of devices: seeds over its axis `seed`, matrices over its axis `model`.

The mesh is ambient (`jax.set_mesh`): `sweep.over_seeds` gives every device its own seeds, and the table below says
where arrays are. Matrices are split as in Megatron-LM (Shoeybi et al., 2019): q, k, v and wi by columns, o and wo,
which take what those return, by rows. So attention and feed-forward layer each sum over devices once.
"""

import contextlib
import re
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..models.t5.model import T5Config

_Tree = TypeVar("_Tree")

AXES = ("seed", "model")

_BY_COLUMNS, _BY_ROWS = (None, "model"), ("model", None)
_COLUMNS, _ROWS = r"(q|k|v|wi|wi_0|wi_1)\b", r"(o|wo)\b"
# What is in a path of the tree -> axes of the array's last dimensions; the first that fits, none for all others. A path
# names a base weight by its module, what belongs to a site by the site: encoder/ff/wo/kernel, pool/A/encoder.ff.wo.
RULES = (
    (r"\bembedding\b", _BY_ROWS),
    (r"\bhead\b", _BY_COLUMNS),
    (r"\btable\b", _BY_COLUMNS),
    (rf"\b{_COLUMNS}\W+kernel\b", _BY_COLUMNS),
    (rf"\b{_ROWS}\W+kernel\b", _BY_ROWS),
    (rf"\bA/.*\.{_ROWS}", _BY_ROWS),
    (rf"\bB/.*\.{_COLUMNS}", _BY_COLUMNS),
    (rf"\b(squared|cross|norms|magnitudes?|kept)/.*\.{_COLUMNS}", ("model",)),
)


def make_mesh(asked: str, seeds: int) -> Mesh:
    """Return the mesh that an option asks for.

    Args:
      asked: sizes of its axes, such as `seed=4,model=2`; an axis that is not named has size 1.
      seeds: of the run.

    Raises:
      ValueError: no such axis or size, more devices than there are, fewer than several processes have, or seeds that
        cannot be shared out evenly.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in asked.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--mesh {asked}: {part!r} is no axis and its size: wanted for example seed=4,model=2")
        sizes[name] = int(size)
    if seeds % sizes["seed"]:
        raise ValueError(
            f"{seeds} seeds cannot be shared out evenly over --mesh seed={sizes['seed']}: give a multiple of "
            f"{sizes['seed']} seeds, or a smaller axis"
        )
    wanted, there = sizes["seed"] * sizes["model"], jax.device_count()
    if wanted > there:
        forced = f"; on a CPU XLA_FLAGS=--xla_force_host_platform_device_count={wanted} makes its cores so many"
        raise ValueError(
            f"--mesh {asked} asks for {wanted} devices: there are {there}"
            + (forced if jax.default_backend() == "cpu" else "")
        )
    if jax.process_count() > 1 and wanted < there:
        raise ValueError(
            f"--mesh {asked} asks for {wanted} of the {there} devices of {jax.process_count()} processes: use them all"
        )
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto, AxisType.Auto), devices=jax.devices()[:wanted])


def check_model(config: T5Config) -> None:
    """Raise ValueError for a base model whose dimensions the ambient mesh does not divide."""
    for name in ("num_heads", "d_ff", "vocab_size"):
        _check_divides(_axis_size("model"), getattr(config, name), name)


def on_mesh(tree: _Tree, *, of_seeds: bool = False) -> _Tree:
    """Return arrays where the ambient mesh wants them, and as they are without one.

    Args:
      tree: of arrays; with several processes, the same in each.
      of_seeds: they have a leading axis of seeds.

    Raises:
      ValueError: the mesh does not divide a dimension.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return tree

    def place(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = partition(name, leaf.ndim, of_seeds=of_seeds)
        for axis, size in zip(spec, leaf.shape, strict=False):
            if axis is not None:
                _check_divides(mesh.shape[axis], size, name, axis)
        return _placed(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def partition(name: str, dimensions: int, *, of_seeds: bool = False) -> PartitionSpec:
    """Return how an array is split.

    Args:
      name: its path in the tree, such as `pool/A/encoder.ff.wo`.
      dimensions: how many it has.
      of_seeds: the first of them is the seeds'.
    """
    last = next((axes for pattern, axes in RULES if re.search(pattern, name)), ())
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
    """Return the context to load weights in: of those that a mesh shares out, no accelerator has to hold all."""
    if _axis_size("model") == 1 or jax.default_backend() == "cpu":
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
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _check_divides(size: int, dimension: int, name: str, axis: str = "model") -> None:
    if dimension % size:
        raise ValueError(
            f"--mesh {axis}={size} does not divide {name}, which is {dimension}: give a size that divides it"
        )


def _axis_size(axis: str) -> int:
    return jax.sharding.get_mesh().shape.get(axis, 1)
