"""A layer's kernel on arrays, and the products that read it where JAX's own would multiply.

Axis letters: B batch, S spatial, P positions of a filter, C channels, F filters, G groups, K taps of a filter.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..chip.chip import Chip
from ..read.matmul import check_ready, matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel whose matrix is in arrays.

    Attributes:
      chip: the matrix; one for each group and each stacked layer.
      shape: shape of the kernel in one layer.
      dtype: dtype of the kernel, on which that of the computation may depend.
      equation: the equation of an `Einsum`.
    """

    chip: Chip
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    equation: str | None = dataclasses.field(default=None, metadata={"static": True})

    def read(
        self,
        x: Float[Array, "..."],
        *,
        groups: int = 0,
        inputs: int = 1,
        features: Sequence[int] = (-1,),
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> Float[Array, "..."]:
        """Return a product [*groups, *B, *inputs] -> [*groups, *B, *features] of x.

        `groups` and `inputs` are numbers of axes: each group has a separate matrix, and inputs are summed over.
        """
        name = self.chip.name or "the model"
        if stack := self.chip.shape[: -3 if groups else -2]:
            raise ValueError(
                f"{name} is a stack of {stack} layers, which no scan or vmap has taken apart: where nnx.StateAxes "
                "gives an axis to nnx.Param, give it to crossbar.flax.InArrays as well"
            )
        if out_sharding is not None:
            raise ValueError(
                f"{name} is on arrays, which take no out_sharding: leave that out, or the layer digital"
            )
        if self.chip.tap is None:
            key = "model = crossbar.flax.with_read_key(model, jax.random.fold_in(key, step))"
            check_ready(
                self.chip,
                name,
                key=key,
                ranges="model = crossbar.flax.calibrate(model, batches)",
            )
        lead = x.shape[: x.ndim - inputs]
        grouped = (math.prod(lead[:groups]),) if groups else ()
        x = x.reshape(*grouped, *lead[groups:], math.prod(x.shape[x.ndim - inputs :]))
        try:
            y = jax.vmap(matmul)(x, self.chip) if groups else matmul(x, self.chip)
        except ValueError as error:
            error.add_note(f"This is a read of {name}.")
            raise
        y = y.reshape(*lead, *features)
        return y if preferred_element_type is None else y.astype(preferred_element_type)


def dot_general(
    x: Array,
    kernel: Kernel,
    dimension_numbers: Any,
    precision: Any = None,
    **result: Any,
) -> Array:
    """Return `jax.lax.dot_general(x, kernel, ...)`, in its shape; the precision is that of the arrays."""
    (x_axes, kernel_axes), (groups_of_x, groups_of_kernel) = dimension_numbers
    free = [axis for axis in range(x.ndim) if axis not in (*x_axes, *groups_of_x)]
    features = [
        size
        for axis, size in enumerate(kernel.shape)
        if axis not in (*kernel_axes, *groups_of_kernel)
    ]
    x = x.transpose(*groups_of_x, *free, *x_axes)
    return kernel.read(
        x, groups=len(groups_of_x), inputs=len(x_axes), features=features, **result
    )


def einsum(
    equation: str, x: Array, kernel: Kernel, precision: Any = None, **result: Any
) -> Array:
    """Return `jnp.einsum(equation, x, kernel, ...)`, in its shape; the kernel was programmed for the equation."""
    if equation != kernel.equation:
        name = kernel.chip.name or "the model"
        raise ValueError(
            f"{name} is on arrays for {kernel.equation!r}, not {equation!r}: leave it digital"
        )
    x_letters, kernel_letters, y_letters = operands(equation)
    group_axes, input_axes = einsum_axes(equation)
    groups = "".join(kernel_letters[axis] for axis in group_axes)
    inputs = "".join(kernel_letters[axis] for axis in input_axes)
    outputs = "".join(
        letter for letter in kernel_letters if letter not in groups + inputs
    )
    free = "".join(
        letter for letter in y_letters if letter not in kernel_letters
    )  # with its ellipsis
    features = [
        size
        for letter, size in zip(kernel_letters, kernel.shape, strict=True)
        if letter in outputs
    ]
    x = jnp.einsum(f"{x_letters}->{groups}{free}{inputs}", x)
    y = kernel.read(
        x, groups=len(groups), inputs=len(inputs), features=features, **result
    )
    return jnp.einsum(f"{groups}{free}{outputs}->{y_letters}", y)


def operands(equation: str) -> list[str]:
    """Return the axes of both operands of an equation, and of its result."""
    return equation.replace("->", ",").split(",")


def einsum_axes(equation: str) -> tuple[list[int], list[int]]:
    """Return the axes of groups of an equation's second operand, and those that are summed over."""
    x_letters, kernel_letters, y_letters = operands(equation)
    shared = [axis for axis, letter in enumerate(kernel_letters) if letter in x_letters]
    groups = [axis for axis in shared if kernel_letters[axis] in y_letters]
    return groups, [axis for axis in shared if axis not in groups]


def conv_general_dilated(
    x: Float[Array, "B *S C"],
    kernel: Kernel,
    window_strides: Sequence[int],
    padding: Any,
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
    **result: Any,
) -> Float[Array, "B *P F"]:
    """Return `jax.lax.conv_general_dilated(x, kernel, ...)` of channels last, with a read for every position."""
    taps = _patches(
        x, kernel.shape[:-2], window_strides, padding, lhs_dilation, rhs_dilation
    )
    if feature_group_count == 1:
        return kernel.read(taps, inputs=2, features=kernel.shape[-1:], **result)
    taps = taps.reshape(*taps.shape[:-1], feature_group_count, -1)  # [B, *P, K, G, C]
    y = kernel.read(jnp.moveaxis(taps, -2, 0), groups=1, inputs=2, **result)
    y = jnp.moveaxis(y, 0, -2)
    return y.reshape(*y.shape[:-2], kernel.shape[-1])


def _patches(
    x: Float[Array, "B *S C"],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Any,
    x_dilation: Sequence[int],
    window_dilation: Sequence[int],
) -> Float[Array, "B *P K C"]:
    """Return the inputs under the filters at every position: as slices, since a convolution may round them."""
    extent = [
        (size - 1) * step + 1
        for size, step in zip(window, window_dilation, strict=True)
    ]
    if isinstance(padding, str):
        dilated = [
            max((size - 1) * step + 1, 0)
            for size, step in zip(x.shape[1:-1], x_dilation, strict=True)
        ]
        padding = jax.lax.padtype_to_pads(dilated, extent, strides, padding)
    around = [
        (low, high, step - 1)
        for (low, high), step in zip(padding, x_dilation, strict=True)
    ]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *around, (0, 0, 0)])
    room = [size - reach for size, reach in zip(x.shape[1:-1], extent, strict=True)]
    taps = []
    for place in itertools.product(*map(range, window)):
        start = [
            number * step for number, step in zip(place, window_dilation, strict=True)
        ]
        stop = [first + length + 1 for first, length in zip(start, room, strict=True)]
        taps.append(
            jax.lax.slice(
                x, (0, *start, 0), (len(x), *stop, x.shape[-1]), (1, *strides, 1)
            )
        )
    return jnp.stack(taps, axis=-2)


@dataclasses.dataclass(frozen=True)
class Promote:
    """A layer's promotion of dtypes; kernels count as scalars."""

    promote: Callable[..., Any]

    def __call__(self, arrays: tuple[Any, ...], **options: Any) -> tuple[Any, ...]:
        """Return the arrays in the dtype of the computation, and kernels as they are."""
        seen = tuple(
            jnp.zeros((), array.dtype) if isinstance(array, Kernel) else array
            for array in arrays
        )
        promoted = self.promote(seen, **options)
        return tuple(
            old if isinstance(old, Kernel) else new
            for old, new in zip(arrays, promoted, strict=True)
        )
