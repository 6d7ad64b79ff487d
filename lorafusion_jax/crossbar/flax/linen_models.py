"""Linen models on arrays: a module with its variables, whose layers are intercepted."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from ..chip.tree import Rules
from .kernel import Kernel, Promote, conv_general_dilated, dot_general, einsum, operands
from .layers import (
    DIGITAL,
    LAYERS,
    UNABLE,
    WRAPPERS,
    dotted,
    found_digital,
    found_layer,
    found_parameter,
    is_matrix,
    kernels,
)

_COLLECTION = "crossbar"
# What a model keeps between calls.
_STATE = ("batch_stats", "cache", "intermediates", "perturbations")


@dataclasses.dataclass(frozen=True)
class _Module:
    """A module that can be hashed even if its fields cannot, such as lists of widths."""

    module: nn.Module

    def __hash__(self) -> int:
        return hash(type(self.module))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class OnArrays:
    """A Linen model on arrays; a pytree, so that functions under `jax.jit` may take it as an argument.

    Its variables have the kernels on arrays in the collection `crossbar`, and all others in `params`.
    """

    variables: Any
    held: _Module = dataclasses.field(metadata={"static": True})

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self.held.module

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.apply(self.variables, *args, **options)

    def apply(self, variables: Any, *args: Any, **options: Any) -> Any:
        """Return `module.apply(variables, ...)` of variables that may differ from the model's."""
        # The module finds its chips among its parameters: `nn.scan` and `nn.vmap` name the axes of no other collection.
        params = flatten_dict(variables.get("params", {})) | flatten_dict(variables[_COLLECTION])
        digital = {name: collection for name, collection in variables.items() if name != _COLLECTION}
        with nn.intercept_methods(_intercepted):
            return self.module.apply(digital | {"params": unflatten_dict(params)}, *args, **options)


class _Leaf(Kernel):
    """A kernel that JAX takes for a leaf: Linen compares the shapes of a parameter's leaves with the layer's."""


@dataclasses.dataclass
class _Calls:
    """Calls of a layer while a model is traced, with the equations of an `Einsum`."""

    layer: nn.Module
    shape: tuple[int, ...] = ()
    equations: set[str] = dataclasses.field(default_factory=set)
    wrapper: str | None = None


def convert(model: nn.Module, rules: Rules, key: Array, inputs: Sequence[Any], options: Mapping[str, Any]) -> OnArrays:
    """Return a bound model on arrays; arguments as for `crossbar.flax.convert`."""
    if model.scope is None or not (inputs or options):
        raise ValueError(
            "a Linen module has neither its variables nor, before it is called, its layers: give it as "
            "convert(module.bind(variables), rules, key, x), with an example of its inputs"
        )
    module, variables = model.unbind()
    calls = _calls(module, variables, inputs, options)
    params = flatten_dict(variables.get("params", {}))
    found, places = {}, {}
    for place, parameter in params.items():
        path, parameter = dotted(place[:-1]), nn.unbox(parameter)
        seen = calls.get(path)
        if seen is None:
            found[dotted(place)] = found_parameter(parameter)
        elif isinstance(seen.layer, DIGITAL):
            found[path] = found_digital(parameter)
        elif place[-1] == "kernel":
            equation = seen.equations.pop() if len(seen.equations) == 1 else None
            found[path] = found_layer(seen.layer, parameter, seen.shape, equation, seen.wrapper)
            places[path] = place
        elif place[-1] != "bias":
            found[dotted(place)] = found_parameter(parameter)
    for name, collection in variables.items():
        if name not in ("params", *_STATE):
            matrices = {place: nn.unbox(each) for place, each in flatten_dict(collection).items()}
            found |= {dotted(place): found_parameter(each) for place, each in matrices.items() if is_matrix(each)}
    chips = {}
    for path, kernel in kernels(found, rules, key).items():
        del params[places[path]]
        chips[places[path]] = kernel
    on_arrays = {"params": unflatten_dict(params), _COLLECTION: unflatten_dict(chips)}
    return OnArrays({**variables, **on_arrays}, _Module(module))


def _calls(module: nn.Module, variables: Any, inputs: Sequence[Any], options: Mapping[str, Any]) -> dict[str, _Calls]:
    """Return the layers that a model calls, by path."""
    calls: dict[str, _Calls] = {}
    wrappers: list[str] = []

    def noted(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        layer: Any = context.module
        if isinstance(context.module, WRAPPERS) and context.method_name == "__call__":
            wrappers.append(type(layer).__name__)
            try:
                return call(*args, **kwargs)
            finally:
                wrappers.pop()
        if isinstance(context.module, LAYERS + DIGITAL + UNABLE) and context.method_name in ("__call__", "attend"):
            seen = calls.setdefault(dotted(layer.path), _Calls(layer))
            seen.wrapper = wrappers[-1] if wrappers else seen.wrapper
            kernel = layer.get_variable("params", "kernel")
            seen.shape = jnp.shape(nn.unbox(kernel)) if kernel is not None else ()
            if isinstance(layer, nn.Einsum):
                seen.equations.add(_equation(layer, *args, **kwargs))
        return call(*args, **kwargs)

    with nn.intercept_methods(noted):
        jax.eval_shape(lambda variables, *inputs: module.apply(variables, *inputs, **options), variables, *inputs)
    return calls


def _intercepted(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Return the result of a layer, which is read from arrays if its kernel is there."""
    layer: Any = context.module
    multiplies = context.method_name == "__call__" and isinstance(context.module, LAYERS)
    kernel = layer.get_variable("params", "kernel") if multiplies else None
    if type(kernel) is not Kernel:
        return call(*args, **kwargs)
    kernel, promote = _Leaf(**vars(kernel)), Promote(layer.promote_dtype)
    bias = layer.get_variable("params", "bias")
    if isinstance(layer, nn.Einsum):
        return _einsum(layer, promote, kernel, nn.unbox(bias), *args, **kwargs)
    # A layer of the same kind with the same parameters, but other products.
    if isinstance(layer, nn.Conv):
        layer = layer.clone(parent=None, promote_dtype=promote, conv_general_dilated=conv_general_dilated, mask=None)
    else:
        layer = layer.clone(parent=None, promote_dtype=promote, dot_general=dot_general)
    params = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
    return layer.apply({"params": params}, *args, **kwargs)


def _einsum(
    layer: nn.Einsum, promote: Promote, kernel: Kernel, bias: Any, inputs: Array, einsum_str: str | None = None
) -> Array:
    """Return the result of `nn.Einsum`, which does not accept a product as an option."""
    equation = _equation(layer, inputs, einsum_str)
    inputs, kernel, bias = promote(inputs, kernel, bias, dtype=layer.dtype)
    y = einsum(equation, inputs, kernel, preferred_element_type=layer.preferred_element_type)
    if bias is None:
        return y
    _, of_kernel, of_y = operands(equation)
    before, ellipsis, after = of_y.partition("...")
    free = "." * (y.ndim - len(before + after)) if ellipsis else ""
    sizes = dict(zip(of_kernel, kernel.shape, strict=True))
    return y + bias.reshape([sizes.get(letter, 1) for letter in before + free + after])


def _equation(layer: nn.Einsum, inputs: Array, einsum_str: str | None = None) -> str:
    return (layer.einsum_str or einsum_str or "").replace(" ", "")
