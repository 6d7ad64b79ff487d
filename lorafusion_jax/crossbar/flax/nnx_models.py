"""NNX models on arrays: layers get a variable of another type, and products that read it."""

from typing import Any, TypeVar

from flax import nnx
from jaxtyping import Array

from ..chip.tree import Rules
from .kernel import Kernel, Promote, conv_general_dilated, dot_general, einsum
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

Model = TypeVar("Model", bound=nnx.Module)
# What a model keeps between calls.
_STATE = (nnx.BatchStat, nnx.Cache, nnx.Intermediate)
# Names of a layer's parameters; that of the matrix is before the others.
_PARAMETERS = ("kernel", "embedding", "scale", "bias", "mask")


class InArrays(nnx.Variable):
    """The kernel of a layer on arrays. It is not an `nnx.Param`, so that training leaves it alone."""

    def __getitem__(self, key: Any) -> Any:
        """Return the kernel for any index."""
        return self.get_value()


def convert(model: Model, rules: Rules, key: Array) -> Model:
    """Return a copy of a model on arrays; arguments as for `crossbar.flax.convert`."""
    model = nnx.clone(model)
    nodes = list(nnx.iter_graph(model))
    wrappers = [(parts, type(layer).__name__) for parts, layer in nodes if isinstance(layer, WRAPPERS)]
    found, owned = {}, set()
    for parts, layer in nodes:
        if not isinstance(layer, LAYERS + DIGITAL + UNABLE):
            continue
        path = dotted(parts)
        parameters = [each for name in _PARAMETERS if (each := vars(layer).get(name)) is not None]
        owned |= {id(each) for each in parameters}
        if isinstance(layer, DIGITAL):
            found |= {path: found_digital(parameters[0][...])} if parameters else {}
        else:
            equation = layer.einsum_str if isinstance(layer, nnx.Einsum) else None
            wrapper = next((name for above, name in wrappers if parts[: len(above)] == above), None)
            kernel = parameters[0][...] if isinstance(parameters[0], nnx.Variable) else parameters[0]
            found[path] = found_layer(layer, kernel, _shape(layer), equation, wrapper)
    for parts, value in nodes:
        if isinstance(value, nnx.LoRAParam):
            found[dotted(parts)] = found_digital(value[...])
        elif id(value) in owned or isinstance(value, _STATE):
            continue
        elif isinstance(value, nnx.Param):
            found[dotted(parts)] = found_parameter(value[...])
        elif is_matrix(value := value.get_value() if isinstance(value, nnx.Variable) else value):
            found[dotted(parts)] = found_parameter(value)
    for path, kernel in kernels(found, rules, key).items():
        _put(found[path].layer, kernel)
    return model


def _shape(layer: Any) -> tuple[int, ...]:
    """Return the shape of a kernel as the layer made it."""
    if isinstance(layer, nnx.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nnx.LinearGeneral):
        return *layer.batch_axis.values(), *layer.in_features, *layer.out_features
    return tuple(layer.kernel_shape)


def _put(layer: Any, kernel: Kernel) -> None:
    """Give a layer its kernel on arrays."""
    layer.promote_dtype = Promote(layer.promote_dtype)
    layer.kernel = InArrays(kernel)
    if isinstance(layer, nnx.Conv):
        layer.conv_general_dilated, layer.mask = conv_general_dilated, None
    elif isinstance(layer, nnx.Einsum):
        layer.einsum_op = einsum
    else:
        layer.dot_general = dot_general
