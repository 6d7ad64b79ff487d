"""Layers of NNX as matrices: the layers that can be put on arrays, and the products that read them.

Axis letters: B batch, S spatial, P positions of a filter, C channels, F filters, G groups, K taps of a filter.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ..chip.chip import Chip, is_chip
from ..chip.tree import Preparations, Rules, first_match, program_tree
from ..read.matmul import check_ready, matmul

Model = TypeVar("Model", bound=nnx.Module)

_LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv)
# Norms, whose parameters are vectors, although a stack of vectors has the shape of a matrix; and tables of tokens, also
# where a tied head multiplies by them.
_DIGITAL = (
    nnx.BatchNorm,
    nnx.LayerNorm,
    nnx.RMSNorm,
    nnx.GroupNorm,
    nnx.InstanceNorm,
    nnx.Embed,
)
# Their calls change the parameters of the layers in them.
_WRAPPERS = (nnx.WeightNorm, nnx.SpectralNorm)
# What a model keeps between calls.
_STATE = (nnx.BatchStat, nnx.Cache, nnx.Intermediate)
# Names of a layer's parameters; that of the matrix is before the others.
_PARAMETERS = ("kernel", "embedding", "scale", "bias", "mask")
# The products that a layer may be given, with the values that stand for JAX's own.
_PRODUCTS = {
    "dot_general": (None, jax.lax.dot_general),
    "dot_general_cls": (None,),
    "einsum_op": (jnp.einsum,),
    "conv_general_dilated": (None, jax.lax.conv_general_dilated),
    "conv_general_dilated_cls": (None,),
}


class InArrays(nnx.Variable):
    """The kernel of a layer on arrays. It is not an `nnx.Param`, so that training leaves it alone."""

    def __getitem__(self, key: Any) -> Any:
        """Return the kernel for any index."""
        return self.get_value()


class _Found(NamedTuple):
    """Target of a path: a layer, or a parameter.

    Attributes:
      weight: a matrix, or a stack of them; a vector always stays digital.
      obstacle: reason why it cannot be put on arrays, or None.
      layer: the layer that can be put on arrays.
    """

    weight: Array
    obstacle: str | None = None
    layer: Any = None


def converted(
    model: Model, rules: Rules, key: Array, preparations: Preparations
) -> Model:
    """Return a copy of a model on arrays; arguments as for `crossbar.flax.convert`."""
    model = nnx.clone(model)
    layers = _checked(model, rules)
    weights = {path: layer.weight for path, layer in layers.items()}
    placed = program_tree(weights, rules, key, preparations=preparations)
    for path, leaf in placed.items():
        if not is_chip(leaf):
            continue
        layer = layers[path].layer
        # Without the key of `program_tree`: that would give every step the same noise.
        chip = dataclasses.replace(leaf, key=None)
        equation = getattr(layer, "einsum_str", None)
        kernel = Kernel(chip, _shape(layer), layer.kernel[...].dtype, equation)
        layer.promote_dtype = Promote(layer.promote_dtype)
        layer.kernel = InArrays(kernel)
        if isinstance(layer, nnx.Conv):
            layer.conv_general_dilated = conv_general_dilated
            layer.mask = None
        elif isinstance(layer, nnx.Einsum):
            layer.einsum_op = einsum
        else:
            layer.dot_general = dot_general
    return model


def on_arrays(model: nnx.Module, rules: Rules) -> dict[str, Array]:
    """Return the matrices, or stacks of them, that rules put on arrays, by path."""
    layers = _checked(model, rules).items()
    return {
        path: layer.weight
        for path, layer in layers
        if layer.weight.ndim > 1 and first_match(path, rules) is not None
    }


def _checked(model: nnx.Module, rules: Rules) -> Mapping[str, _Found]:
    """Return the layers and parameters of a model by path; ValueError if rules match one that stays digital."""
    layers = _found(model)
    for path, layer in layers.items():
        if layer.obstacle is not None and first_match(path, rules) is not None:
            raise ValueError(
                f"{path or 'the model'} cannot be put on arrays: {layer.obstacle}. Leave it digital with a rule before "
                f"the one that matches it: {{{path!r}: None, ...}}"
            )
    return layers


def _found(model: nnx.Module) -> Mapping[str, _Found]:
    """Return the layers and other parameters of a model by path."""
    nodes = list(nnx.iter_graph(model))
    wrappers = [
        (parts, type(layer).__name__)
        for parts, layer in nodes
        if isinstance(layer, _WRAPPERS)
    ]
    layers = {}
    owned = set()
    for parts, layer in nodes:
        if not isinstance(layer, (*_LAYERS, *_DIGITAL, nnx.ConvTranspose)):
            continue
        parameters = [
            parameter
            for name in _PARAMETERS
            if (parameter := vars(layer).get(name)) is not None
        ]
        owned |= {id(parameter) for parameter in parameters}
        if isinstance(layer, _DIGITAL):
            if parameters:
                layers[_dotted(parts)] = _digital(parameters[0][...])
            continue
        wrapper = next(
            (name for above, name in wrappers if parts[: len(above)] == above), None
        )
        kernel = parameters[0]
        if isinstance(kernel, nnx.Variable):
            kernel = kernel[...]
        layers[_dotted(parts)] = _of_layer(layer, kernel, wrapper)
    for parts, value in nodes:
        if isinstance(value, nnx.LoRAParam):
            layers[_dotted(parts)] = _digital(value[...])
        elif id(value) not in owned and not isinstance(value, _STATE):
            parameter = isinstance(value, nnx.Param)
            if isinstance(value, nnx.Variable):
                value = value.get_value()
            # Another array could be multiplied with as a matrix.
            if parameter or (
                _is_array(value)
                and value.ndim > 1
                and jnp.issubdtype(value.dtype, jnp.floating)
            ):
                obstacle = (
                    f"it is a parameter of shape {value.shape}, and no layer's kernel"
                )
                layers[_dotted(parts)] = _Found(
                    value, obstacle if value.ndim > 1 else None
                )
    return layers


def _of_layer(layer: Any, kernel: Any, wrapper: str | None) -> _Found:
    """Return a layer as its matrix, given its parameter with the axes of stacked layers in front.

    `wrapper` names the one of `_WRAPPERS` around it.
    """
    if isinstance(kernel, Kernel):
        return _Found(
            kernel.chip.codes,
            "it is on arrays already, so give `convert` the digital model with all rules",
        )
    if not _is_array(kernel):  # as those that qwix quantises
        return _Found(
            jnp.zeros((0, 0)),
            f"its kernel is a {type(kernel).__name__} instead of an array",
        )
    if wrapper is not None:
        return _Found(kernel, f"{wrapper} computes its kernel anew in every call")
    if (obstacle := _obstacle(layer, kernel)) is not None:
        return _Found(kernel, obstacle)
    mask = getattr(layer, "mask", None)
    weight = kernel if mask is None else kernel * mask
    stack = kernel.ndim - len(_shape(layer))
    if isinstance(layer, nnx.Conv) and layer.feature_group_count > 1:
        weight = weight.reshape(*weight.shape[:-1], layer.feature_group_count, -1)
    groups, inputs = _axes(layer, weight.ndim - stack)
    outputs = [
        axis for axis in range(weight.ndim - stack) if axis not in (*groups, *inputs)
    ]
    kinds = [[stack + axis for axis in axes] for axes in (groups, inputs, outputs)]
    sizes = [math.prod(weight.shape[axis] for axis in axes) for axes in kinds]
    weight = weight.transpose(*range(stack), *itertools.chain(*kinds))
    summed = sizes if groups else sizes[1:]
    return _Found(weight.reshape(*weight.shape[:stack], *summed), None, layer)


def _digital(parameter: Array) -> _Found:
    """Return the entry of a parameter that stays digital: a vector [d] of its last axis."""
    return _Found(parameter[(0,) * (parameter.ndim - 1)])


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def _dotted(path: Sequence[Any]) -> str:
    """Return a path as rules name it."""
    return ".".join(map(str, path))


def _shape(layer: Any) -> tuple[int, ...]:
    """Return the shape of a kernel as the layer made it."""
    if isinstance(layer, nnx.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nnx.LinearGeneral):
        return *layer.batch_axis.values(), *layer.in_features, *layer.out_features
    return tuple(layer.kernel_shape)


def _axes(layer: Any, ndim: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return the axes of groups of a kernel, and those that are summed over."""
    if isinstance(layer, nnx.LinearGeneral):
        groups = len(layer.batch_axis)
        return range(groups), range(groups, groups + len(layer.in_features))
    if isinstance(layer, nnx.Einsum):
        return einsum_axes(layer.einsum_str)
    if isinstance(layer, nnx.Conv) and layer.feature_group_count > 1:
        return (ndim - 2,), range(ndim - 2)
    return (), range(ndim - 1)


def _obstacle(layer: Any, kernel: Array) -> str | None:
    """Return the reason why a layer cannot be put on arrays, or None."""
    if isinstance(layer, nnx.ConvTranspose):
        return "ConvTranspose has no form on arrays"
    if 0 in kernel.shape:
        return f"its kernel of shape {kernel.shape} is empty"
    for name, usual in _PRODUCTS.items():
        if not any(
            getattr(layer, name, usual[0]) is usual_value for usual_value in usual
        ):
            return f"its {name} is not that of JAX"
    if kernel.shape[kernel.ndim - len(shape := _shape(layer)) :] != shape:
        return f"layers of shape {shape} are stacked to {kernel.shape}, and their axis has to be the first"
    if isinstance(layer, nnx.Einsum):
        if layer.einsum_str is None:
            return "its equation comes with its calls"
        x_letters, kernel_letters, y_letters = operands(layer.einsum_str)
        if (
            "." in kernel_letters
            or len(set(kernel_letters)) < len(kernel_letters)
            or set(kernel_letters) - set(x_letters + y_letters)
        ):
            return f"the kernel of {layer.einsum_str!r} has an axis that is neither of inputs, of outputs nor of groups"
    return None


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
    positions = [
        [
            slice(first, max(first + size - reach + 1, 0), stride)
            for first in range(0, reach, step)
        ]
        for size, reach, step, stride in zip(
            x.shape[1:-1], extent, window_dilation, strides, strict=True
        )
    ]
    taps = [x[:, *place] for place in itertools.product(*positions)]
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
