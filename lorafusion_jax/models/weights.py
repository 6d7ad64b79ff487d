"""The product of activations with a weight of any kind: plain, quantised or programmed into arrays.

Every dense product of every model is `matmul(x, weight)`. A plain array is multiplied, a `qwix.QArray` is dequantised
first (but not 8-bit codes for one row), and a `Chip` is read. A model is put into 4 bits or on hardware by a map over
its tree of weights, without any change to model code.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt

from .. import crossbar
from ..crossbar import Chip, is_chip as is_chip, programmed_weights, reads as reads
from ..support.platform import check_mesh, for_cpu, is_traced
from .bit_cast import from_bits, kept, pack, to_bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PerLayerWeights:
    """A stack of matrices that loops do not slice (see `per_layer`), frozen: products give plain ones no gradient.

    Attributes:
      matrices: one array for each layer, or the whole stack in codes of 8 bits.
      layer: number of the layer to multiply by, in a loop over layers, which slices it from those of all; None outside.
      bits: those of matrices in bfloat16, in the same memory, for products with one row: XLA would copy each matrix to
        read its bits.
    """

    matrices: tuple[Float[Array, "d_in d_out"], ...] | qwix.QArray
    layer: Int[Array, "*L"] | None = None
    bits: tuple[UInt[Array, "d_in d_out"], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        stack = self.matrices
        if isinstance(stack, qwix.QArray):
            return stack.shape
        return (len(stack), *stack[0].shape)

    def at(self, layer: Int[Array, ""]) -> "PerLayerWeights":
        return dataclasses.replace(self, layer=layer)


Weight = Array | qwix.QArray | Chip | PerLayerWeights

QUANTISED_TYPES = ("nf4", "int4", "int8")
FEW = 16  # rows of a product that takes less time than forming the matrix, from codes or as a sum
_LOOPED = contextvars.ContextVar("looped", default=False)
# Names by which a policy of `jax.checkpoint` saves values: products that it cannot see because of their custom
# gradients; and outputs of linear maps, the reads of their adapters and the residual stream.
PRODUCT = "product"
SUM = "sum"


def matmul(
    x: Float[Array, "*batch d_in"], weight: Weight
) -> Float[Array, "*batch d_out"]:
    """Return `x @ weight` in the dtype of `x`; `weight` is [d_in, d_out]."""
    if isinstance(weight, Chip):
        return crossbar.matmul(x, weight)
    if isinstance(weight, PerLayerWeights):
        assert weight.layer is not None
        if isinstance(weight.matrices, tuple):
            return kept(
                _layer_dot(x, weight.matrices, weight.bits, weight.layer), PRODUCT
            )
        if x.size == x.shape[-1]:
            return _row_product(x, weight.matrices, weight.layer)
        weight = at_layer(weight.matrices, weight.layer)
    if (
        _LOOPED.get()
        and isinstance(weight, qwix.QArray)
        and 0 < math.prod(x.shape[:-1]) <= FEW
        and for_cpu()
    ):
        weight = _after(x, weight)
    plain = dense(weight, x.dtype)
    return kept(_dot(x, plain, 0), PRODUCT) if for_cpu() else jnp.dot(x, plain)


def _row_product(
    x: Float[Array, "*batch d_in"], weight: qwix.QArray, layer: Int[Array, ""]
) -> Float[Array, "*batch d_out"]:
    """Return the product of one row with a layer's matrix in codes, which a loop reads once.

    XLA would otherwise copy the layer's codes, and write its matrix in float32. It computes a last sum in the loop too,
    where it is slow, so that one is a product.
    """
    numbers = weight.qvalue
    scale = weight.scale
    tiles, d_out = scale.shape[1:]
    numbers = numbers.reshape(len(numbers), tiles, -1, d_out)
    row = x.reshape(tiles, -1, 1).astype(_exact(x))
    sums = jnp.zeros((), _exact(x))
    for place in range(row.shape[1]):
        part = jax.lax.dynamic_slice(
            numbers, (layer, 0, place, 0), (1, tiles, 1, d_out)
        ).reshape(tiles, d_out)
        sums = sums + row[:, place] * part.astype(row.dtype)
    sums = sums * scale[layer].astype(row.dtype)
    return (
        jnp.dot(jnp.ones(tiles, row.dtype), sums)
        .reshape(*x.shape[:-1], d_out)
        .astype(x.dtype)
    )


def _row_of_bits(
    x: Float[Array, "*batch d_in"], bits: UInt[Array, "d_in d_out"]
) -> Float[Array, "*batch d_out"]:
    """Return the product of one row with the bits of a matrix in bfloat16, which a loop reads once, in long streams."""
    streams = math.gcd(x.size, 8)
    d_out = bits.shape[1]
    row = x.reshape(streams, -1, 1).astype(jnp.float32)
    parts = bits.reshape(streams, -1, d_out)
    sums = functools.reduce(
        jnp.add,
        (r * _widened(part, row.dtype) for r, part in zip(row, parts, strict=True)),
    )
    return (
        jnp.dot(jnp.ones(len(sums), row.dtype), sums)
        .reshape(*x.shape[:-1], d_out)
        .astype(x.dtype)
    )


@contextlib.contextmanager
def looped(loop: bool) -> Iterator[None]:
    """Trace the products of a layer in a loop. Without one XLA dequantises matrices once for all tokens."""
    token = _LOOPED.set(loop)
    try:
        yield
    finally:
        _LOOPED.reset(token)


def _after(x: Float[Array, "*batch d_in"], weight: qwix.QArray) -> qwix.QArray:
    """Return the weight, which cannot be dequantised before `x` is there.

    XLA would dequantise all matrices of a layer before its first product, and the caches hold only a few.
    """
    if not jax.sharding.get_abstract_mesh().empty:  # devices would wait for each other
        return weight
    unit = 1 + _zero(jax.lax.stop_gradient(x[(0,) * x.ndim]).astype(jnp.float32))
    return dataclasses.replace(
        weight, scale=weight.scale * unit.astype(weight.scale.dtype)
    )


@jax.custom_batching.custom_vmap
def _zero(x: Float[Array, ""]) -> Float[Array, ""]:
    """Return 0, though XLA does not find out."""
    return ((jax.lax.bitcast_convert_type(x, jnp.uint32) >> 31) & 2).astype(jnp.float32)


@_zero.def_vmap
def _zero_of_batch(
    size: int, batched: Any, x: Float[Array, " B"]
) -> tuple[Float[Array, ""], bool]:
    return _zero(x[0]), False  # members share the weight


def embed(
    embedding: Array | qwix.QArray, ids: Int[Array, "*batch"]
) -> Float[Array, "*batch D"]:
    """Return the rows of an embedding. On a CPU, XLA would make a float32 copy of one in bfloat16 to take them from."""
    check_mesh((embedding, ids))
    rows = from_bits(
        jax.tree.map(lambda table: jnp.take(table, ids, axis=0), to_bits(embedding))
    )
    return _dequantised(rows) if isinstance(rows, qwix.QArray) else rows


def unembed(
    x: Float[Array, "*batch D"], embedding: Array | qwix.QArray
) -> Float[Array, "*batch V"]:
    """Return `x @ embedding.T` in the dtype of `x`: the logits of a model whose head is its embedding."""
    if isinstance(embedding, qwix.QArray) and for_cpu() and x.size == x.shape[-1]:
        return _row_of_table(x, embedding)
    plain = dense(embedding, x.dtype)
    if x.dtype != jnp.bfloat16 or not for_cpu():
        return jnp.einsum("...d,vd->...v", x, plain)
    return _dot(x, plain, 1)


def _row_of_table(
    x: Float[Array, "*batch D"], table: Array | qwix.QArray
) -> Float[Array, "*batch V"]:
    """Return the product of one row with all rows of a table in codes or bfloat16, which a loop reads once."""
    numbers, scale = (
        (table.qvalue, table.scale)
        if isinstance(table, qwix.QArray)
        else (pack(table), None)
    )
    if scale is None:
        tiles = x.size // math.gcd(x.size, 16 if x.size < 1024 else 64)
    else:
        tiles = scale.shape[1]
    numbers = numbers.reshape(len(numbers), tiles, -1)
    row = x.reshape(tiles, 1, -1).astype(_exact(x))
    sums = jnp.zeros((), _exact(x))
    # Else XLA would keep copies in float32 for all tokens.
    start = _zero(jax.lax.stop_gradient(row[0, 0, 0]).astype(jnp.float32)).astype(
        jnp.int32
    )
    for tile in range(tiles):
        tile_numbers = jax.lax.dynamic_slice_in_dim(numbers, tile + start, 1, axis=1)[
            :, 0
        ]
        part = row[tile] * _widened(tile_numbers, row.dtype)
        sums = sums + (
            part if scale is None else part * scale[:, tile, None].astype(row.dtype)
        )
    return (
        jnp.dot(sums, jnp.ones(sums.shape[1], row.dtype))
        .reshape(*x.shape[:-1], -1)
        .astype(x.dtype)
    )


def _widened(numbers: Array, dtype: Any) -> Array:
    """Return codes, or the bits of bfloat16, as numbers: XLA would convert whole arrays of bfloat16, not slices."""
    if numbers.dtype != jnp.uint16:
        return numbers.astype(dtype)
    return jax.lax.bitcast_convert_type(numbers.astype(jnp.uint32) << 16, jnp.float32)


def heads_matmul(
    x: Float[Array, "B H T C"], y: Float[Array, "B H C S"]
) -> Float[Array, "B H T S"]:
    """Return `x @ y` of every head; of bfloat16 on a CPU in float32, the result of its kernels."""
    if x.dtype != jnp.bfloat16 or not for_cpu():
        return jnp.matmul(x, y)
    # With two axes of a batch XLA would compute in float32, where one of them is transposed.
    flat: Array = _heads_dot(*(a.reshape(-1, *a.shape[2:]) for a in (x, y)))
    return flat.reshape(*x.shape[:3], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(
    x: Float[Array, "*batch d_in"], w: Float[Array, "m n"], axis: int
) -> Float[Array, "*batch d_out"]:
    """Return the product of `x` with `w`, whose `axis` is d_in, by XLA's fast kernels on a CPU, forward and backward.

    These need factors that are not transposed, and give float32 results of bfloat16. XLA computes other products of
    bfloat16 from float32 copies, two to eight times slower, and the gradient of a narrow `w` nine times slower.
    """
    if axis == 0:
        return _product(x, w)
    if x.size == x.shape[-1] and x.dtype == w.dtype == jnp.bfloat16:
        return _row_of_table(x, w)
    # In this order, or a loop over tokens would keep a transposed copy.
    y = jax.lax.dot_general(
        w, x, (((1,), (x.ndim - 1,)), ((), ())), preferred_element_type=_exact(x)
    )
    return jnp.moveaxis(y, 0, -1).astype(x.dtype)


def _backward(axis: int, factors: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = factors
    first, second = (x, g) if axis == 0 else (g, x)
    first = first.reshape(-1, first.shape[-1])
    second = second.reshape(-1, second.shape[-1])
    return _gradient_of_x(g, w, 1 - axis), _transposed_matmul(first, second).astype(
        w.dtype
    )


def _converted(x: Array, w: Array) -> Array:
    return w.astype(x.dtype)


def _product(x: Array, w: Array) -> Array:
    return jnp.dot(x, _converted(x, w), preferred_element_type=_exact(x)).astype(
        x.dtype
    )


def _gradient_of_x(g: Array, w: Array, axis: int = 1) -> Array:
    contracted = (((g.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(
        g, _converted(g, w), contracted, preferred_element_type=_exact(g)
    ).astype(g.dtype)


_dot.defvjp(lambda x, w, axis: (_dot(x, w, axis), (x, w)), _backward)


@jax.custom_vjp
def _layer_dot(
    x: Float[Array, "*batch d_in"],
    matrices: tuple[Array, ...],
    bits: tuple[Array, ...],
    layer: Int[Array, ""],
) -> Float[Array, "*batch d_out"]:
    """Return the product of `x` with the matrix of a layer."""
    if bits and x.size == x.shape[-1] and x.dtype == jnp.bfloat16:
        return _choose(bits, layer, _row_of_bits, x)
    return _choose(matrices, layer, _product, x)


def _layer_backward(
    factors: tuple[tuple[Array, ...], Array], g: Array
) -> tuple[Array, None, None, None]:
    return _choose(*factors, _gradient_of_x, g), None, None, None


_layer_dot.defvjp(
    lambda x, matrices, bits, layer: (
        _layer_dot(x, matrices, bits, layer),
        (matrices, layer),
    ),
    _layer_backward,
)


@jax.custom_vjp
def _heads_dot(
    x: Float[Array, "N T C"], y: Float[Array, "N C S"]
) -> Float[Array, "N T S"]:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _heads_backward(factors: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, y = factors
    g = g.astype(x.dtype)
    x_gradient = jax.lax.dot_general(
        g, y, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32
    )
    return x_gradient.astype(x.dtype), _transposed_matmul(x, g).astype(y.dtype)


_heads_dot.defvjp(lambda x, y: (_heads_dot(x, y), (x, y)), _heads_backward)


def _transposed_matmul(
    x: Float[Array, "*N T C"], y: Float[Array, "*N T S"]
) -> Float[Array, "*N C S"]:
    """Return `x.T @ y`. The narrower factor is transposed in memory, because XLA is slow at transposed ones."""

    def transposed(a: Array) -> Array:
        turned = jnp.swapaxes(
            a, -2, -1
        )  # below one matrix, because XLA would not write out several ones transposed
        return jax.lax.optimization_barrier(turned.reshape(-1, a.shape[-2])).reshape(
            turned.shape
        )

    if x.shape[-1] <= y.shape[-1]:
        return jnp.matmul(transposed(x), y, preferred_element_type=_exact(x))
    transposed_product = jnp.matmul(transposed(y), x, preferred_element_type=_exact(x))
    return jnp.swapaxes(jax.lax.optimization_barrier(transposed_product), -2, -1)


def _exact(x: Array) -> Any:
    """Return the dtype of sums of products of numbers like `x`."""
    return x.dtype if x.dtype == jnp.float64 else jnp.float32


def summed(y: Float[Array, "*batch d_out"]) -> Float[Array, "*batch d_out"]:
    """Return the output of a linear map with its adapter, named `SUM` for the backward pass."""
    # The named value has one axis more than the residual stream. XLA starts all results of a loop that have one shape
    # from the same zeros, and where a mesh splits one of them it splits all: the residual stream was then gathered.
    return jnp.squeeze(checkpoint_name(jnp.expand_dims(y, 0), SUM), 0)


def dense(weight: Weight, dtype: jax.typing.DTypeLike) -> Float[Array, "..."]:
    """Return the weight as a plain array of `dtype`: dequantised, or the values that were programmed."""
    if isinstance(weight, PerLayerWeights):
        assert weight.layer is not None
        if isinstance(weight.matrices, tuple):
            return _choose(
                weight.matrices, weight.layer, _converted, jnp.zeros((), dtype)
            )
        return dense(at_layer(weight.matrices, weight.layer), dtype)
    if isinstance(weight, qwix.QArray):
        weight = _dequantised(weight)
    elif isinstance(weight, Chip):
        weight = programmed_weights(weight)
    return weight.astype(dtype)


def _dequantised(weight: qwix.QArray) -> Array:
    """Return the numbers of a quantised array, on accelerators those of NF4 without a gather: a TPU is slow at it."""
    if weight.qtype != "nf4" or for_cpu():
        return qwix.dequantize(weight)
    codes = weight.qvalue
    scale = weight.scale
    with jax.ensure_compile_time_eval():
        every = qwix.QArray(
            qvalue=jnp.arange(16, dtype=codes.dtype), scale=jnp.ones(1), qtype="nf4"
        )
        values: list[Any] = list(np.asarray(qwix.dequantize(every)))
    for bit in range(4):
        is_set = (codes.astype(jnp.int32) >> bit) & 1 == 1
        values = [
            jnp.where(is_set, high, low)
            for low, high in zip(values[::2], values[1::2], strict=True)
        ]
    # Every axis as tiles and the numbers in a tile.
    tiled = [
        size
        for length, tiles in zip(codes.shape, scale.shape, strict=True)
        for size in (tiles, length // tiles)
    ]
    scales = [size for tiles in scale.shape for size in (tiles, 1)]
    return (values[0].reshape(tiled) * scale.reshape(scales)).reshape(codes.shape)


def per_layer(weights: Any) -> Any:
    """Return a tree of weights with every stack of plain or 8-bit matrices as `PerLayerWeights` that share its memory.

    On a CPU a loop over layers copies each matrix out of its stack, which costs as much as the product if only a few
    rows are multiplied, as in generation. Nothing changes except on a single CPU, or inside of compiled functions.
    """

    def of_leaf(leaf: Any) -> Any:
        in_codes = isinstance(leaf, qwix.QArray) and leaf.qtype == "int8"
        numbers = leaf.qvalue if in_codes else leaf
        if (
            not isinstance(numbers, jax.Array)
            or numbers.ndim != 3
            or is_traced(numbers)
        ):
            return leaf
        if {device.platform for device in numbers.devices()} != {"cpu"} or len(
            numbers.devices()
        ) > 1:
            return leaf
        if in_codes:  # narrower scales would be copied to float32 for every token
            return PerLayerWeights(leaf) if leaf.scale.dtype == jnp.float32 else leaf
        # `device_put` makes an array from a view of the stack's memory without copying it.
        where = numbers.sharding if numbers.committed else None
        views = list(np.asarray(numbers))
        if numbers.dtype == jnp.bfloat16:
            bits = [view.view(np.uint16) for view in views]
        else:
            bits = []
        matrices, bits = jax.device_put((tuple(views), tuple(bits)), where)
        return PerLayerWeights(matrices, bits=bits)

    return jax.tree.map(
        of_leaf, weights, is_leaf=lambda leaf: isinstance(leaf, qwix.QArray | Chip)
    )


def at_layer(stack: Weight, layer: Int[Array, ""]) -> Weight:
    """Return the matrix of a layer."""
    if isinstance(stack, PerLayerWeights):
        return stack.at(layer)
    return jax.tree.map(lambda a: a[layer], stack)


def is_per_layer(leaf: Any) -> bool:
    """Return whether a leaf of a tree of weights is a stack that loops do not slice."""
    return isinstance(leaf, PerLayerWeights)


def _choose(
    matrices: tuple[Array, ...],
    layer: Int[Array, ""],
    fn: Callable[[Array, Array], Array],
    x: Array,
) -> Array:
    """Return `fn(x, matrix of a layer)`."""
    return jax.lax.switch(
        layer, [_branch(fn, number) for number in range(len(matrices))], x, matrices
    )


@functools.cache  # so that JAX traces one branch for all sites of one shape
def _branch(
    fn: Callable[[Array, Array], Array], layer: int
) -> Callable[[Array, tuple[Array, ...]], Array]:
    return lambda x, matrices: fn(x, matrices[layer])


def is_in_arrays(weights: Any) -> bool:
    """Return whether any weight of a tree is programmed into arrays."""
    return any(map(is_chip, jax.tree.leaves(weights, is_leaf=is_chip)))


def read_at_random(weights: Any) -> bool:
    """Return whether any weight of a tree is read with noise."""
    return any(
        is_chip(leaf) and leaf.key is not None
        for leaf in jax.tree.leaves(weights, is_leaf=is_chip)
    )


# Compiled as one function: the stacks of FLAN-T5-large took 17 s in NF4 on two cores; op by op they took 207 s.
@functools.partial(jax.jit, static_argnames=("qtype", "tiled_axis", "tile"))
def quantise(
    weight: Float[Array, "..."], qtype: str, *, tiled_axis: int, tile: int | None = None
) -> qwix.QArray:
    """Quantise `weight` to one of `QUANTISED_TYPES` in tiles along `tiled_axis`; each tile has one scale.

    All other axes are channelwise. The length of a tile divides the axis (qwix does not accept a remainder) and is by
    default its largest divisor that is at most 64.
    """
    if qtype not in QUANTISED_TYPES:
        raise ValueError(
            f"cannot quantise to {qtype!r}: choose one of {', '.join(QUANTISED_TYPES)}"
        )
    axis = tiled_axis % weight.ndim
    channels: Collection[int] = [a for a in range(weight.ndim) if a != axis]
    tiles = {axis: tile or tile_size(weight.shape[axis])}
    return qwix.quantize(weight, qtype, channelwise_axes=channels, tiled_axes=tiles)


def tile_size(axis_size: int) -> int:
    """Return the largest divisor of `axis_size` that is at most 64."""
    return next(t for t in range(min(64, axis_size), 0, -1) if axis_size % t == 0)
