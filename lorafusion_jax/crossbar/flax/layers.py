"""Layers of NNX and Linen as matrices: the layers that can be put on arrays, and how."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from ..chip.chip import is_chip
from ..chip.tree import Rules, first_match, program_tree
from .kernel import Kernel, einsum_axes, operands

_GENERAL = (nnx.LinearGeneral, nn.DenseGeneral)
_EINSUM = (nnx.Einsum, nn.Einsum)
_CONV = (nnx.Conv, nn.Conv)
LAYERS = (nnx.Linear, nn.Dense, *_GENERAL, *_EINSUM, *_CONV)
UNABLE = (nnx.ConvTranspose, nn.ConvTranspose, nn.ConvLocal)
# Their calls change the parameters of the layers in them.
WRAPPERS = (nnx.WeightNorm, nnx.SpectralNorm, nn.WeightNorm, nn.SpectralNorm)
# Norms, whose parameters are vectors, although a stack of vectors has the shape of a matrix; and tables of tokens, also
# where a tied head multiplies by them.
_DIGITAL = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "Embed")
DIGITAL = tuple(getattr(module, name) for module in (nnx, nn) for name in _DIGITAL)
# The products that a layer may be given, with the values that stand for JAX's own.
_PRODUCTS = {
    "dot_general": (None, jax.lax.dot_general),
    "dot_general_cls": (None,),
    "einsum_op": (jnp.einsum,),
    "conv_general_dilated": (None, jax.lax.conv_general_dilated),
    "conv_general_dilated_cls": (None,),
}


class Found(NamedTuple):
    """Target of a path: a layer, or a parameter.

    Attributes:
      weight: a matrix, or a stack of them; a vector always stays digital.
      obstacle: reason why it cannot be put on arrays, or None.
      layer: the layer that can be put on arrays.
      shape: shape of the kernel in one layer.
    """

    weight: Array
    obstacle: str | None = None
    layer: Any = None
    shape: tuple[int, ...] = ()
    dtype: Any = None
    equation: str | None = None


def found_layer(
    layer: Any, kernel: Any, shape: tuple[int, ...], equation: str | None = None, wrapper: str | None = None
) -> Found:
    """Return a layer as its matrix, given its parameter with the axes of stacked layers in front.

    The equation is that of an `Einsum`; None where it has several. `wrapper` names the one of `WRAPPERS` around it.
    """
    if isinstance(kernel, Kernel):
        return Found(kernel.chip.codes, "it is on arrays already, so give `convert` the digital model with all rules")
    if not _is_array(kernel):  # as those that qwix quantises
        return Found(jnp.zeros((0, 0)), f"its kernel is a {type(kernel).__name__} instead of an array")
    if wrapper is not None:
        return Found(kernel, f"{wrapper} computes its kernel anew in every call")
    if (obstacle := _obstacle(layer, kernel, shape, equation)) is not None:
        return Found(kernel, obstacle)
    mask = getattr(layer, "mask", None)
    weight = kernel if mask is None else kernel * mask
    stack = kernel.ndim - len(shape)
    if isinstance(layer, _CONV) and layer.feature_group_count > 1:
        weight = weight.reshape(*weight.shape[:-1], layer.feature_group_count, -1)
    groups, inputs = _axes(layer, weight.ndim - stack, equation)
    outputs = [axis for axis in range(weight.ndim - stack) if axis not in (*groups, *inputs)]
    weight = weight.transpose(*range(stack), *(stack + axis for axis in (*groups, *inputs, *outputs)))
    sizes, count = weight.shape[stack:], len(groups)
    summed = (math.prod(sizes[:count]),) if groups else ()
    summed += (math.prod(sizes[count : count + len(inputs)]), math.prod(sizes[count + len(inputs) :]))
    return Found(weight.reshape(*weight.shape[:stack], *summed), None, layer, shape, kernel.dtype, equation)


def found_digital(parameter: Array) -> Found:
    """Return the entry of a parameter that stays digital: a vector [d] of its last axis."""
    return Found(parameter[(0,) * (parameter.ndim - 1)])


def is_matrix(value: Any) -> bool:
    """Return whether a value that is no parameter could be multiplied with as one."""
    return _is_array(value) and value.ndim > 1 and jnp.issubdtype(value.dtype, jnp.floating)


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def found_parameter(parameter: Any) -> Found:
    """Return the entry of a parameter that does not belong to a layer of Flax."""
    obstacle = f"it is a parameter of shape {parameter.shape}, and no layer's kernel"
    return Found(parameter, None if parameter.ndim < 2 else obstacle)


def kernels(found: Mapping[str, Found], rules: Rules, key: PRNGKeyArray) -> dict[str, Kernel]:
    """Return the kernels that rules put on arrays, by path; raises a ValueError where that is impossible."""
    for path, each in found.items():
        if each.obstacle is not None and first_match(path, rules) is not None:
            raise ValueError(
                f"{path or 'the model'} cannot be put on arrays: {each.obstacle}. Leave it digital with a rule before "
                f"the one that matches it: {{{path!r}: None, ...}}"
            )
    placed = program_tree({path: each.weight for path, each in found.items()}, rules, key)
    return {
        # Without the key of `program_tree`: that would give every step the same noise.
        path: Kernel(dataclasses.replace(leaf, key=None), found[path].shape, found[path].dtype, found[path].equation)
        for path, leaf in placed.items()
        if is_chip(leaf)
    }


def dotted(path: Iterable[Any]) -> str:
    """Return a path as rules name it."""
    return ".".join(map(str, path))


def _axes(layer: Any, ndim: int, equation: str | None) -> tuple[Sequence[int], Sequence[int]]:
    """Return the axes of groups of a kernel, and those that are summed over."""
    if isinstance(layer, _GENERAL):
        groups = len(_tuple(layer.batch_axis if isinstance(layer, nnx.Module) else layer.batch_dims))
        return range(groups), range(groups, groups + len(_tuple(layer.axis)))
    if isinstance(layer, _EINSUM):
        assert equation is not None
        return einsum_axes(equation)
    if isinstance(layer, _CONV) and layer.feature_group_count > 1:
        return (ndim - 2,), range(ndim - 2)
    return (), range(ndim - 1)


def _obstacle(layer: Any, kernel: Array, shape: tuple[int, ...], equation: str | None) -> str | None:
    """Return the reason why a layer cannot be put on arrays, or None."""
    if isinstance(layer, UNABLE):
        return f"{type(layer).__name__} has no form on arrays"
    if 0 in kernel.shape:
        return f"its kernel of shape {kernel.shape} is empty"
    for name, usual in _PRODUCTS.items():
        if not any(getattr(layer, name, usual[0]) is each for each in usual):
            return f"its {name} is not that of JAX"
    if kernel.shape[kernel.ndim - len(shape) :] != shape:
        return f"layers of shape {shape} are stacked to {kernel.shape}, and their axis has to be the first"
    if isinstance(layer, _EINSUM):
        if equation is None:
            return "it is called with several equations"
        of_x, of_kernel, of_y = operands(equation)
        if "." in of_kernel or len(set(of_kernel)) < len(of_kernel) or set(of_kernel) - set(of_x + of_y):
            return f"the kernel of {equation!r} has an axis that is neither of inputs, of outputs nor of groups"
    return None


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Iterable) else (value,)
