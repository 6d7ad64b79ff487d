"""NNX models on arrays: layers get a variable of another type, and products that read it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from ..chip.tree import Rules
from .kernel import Kernel, Promote, conv_general_dilated, dot_general, einsum
from .layers import HEAD, LAYERS, NORMS, UNABLE, dotted, found_digital, found_layer, found_parameter, kernels


class InArrays(nnx.Variable):
    """The kernel of a layer on arrays. It is not an `nnx.Param`, so that training leaves it alone."""

    def __getitem__(self, key: Any) -> Any:
        """Return the kernel for any index."""
        return self.get_value()


class _Embed(nnx.Embed):
    """An embedding whose head is on arrays, next to the table that tokens are looked up in."""

    def attend(self, query: Float[Array, "*B d"], out_sharding: Any = None) -> Float[Array, "*B V"]:
        """Return the logits of a query."""
        query, head = self.promote_dtype((query, getattr(self, HEAD)[...]), dtype=self.dtype)
        return head.read(query, out_sharding=out_sharding)


def convert(
    model: nnx.Module, rules: Rules, key: Array, inputs: Sequence[Any], options: Mapping[str, Any]
) -> nnx.Module:
    """Return a copy of a model on arrays; arguments as for `crossbar.flax.convert`."""
    attended = _attended(model, inputs, options) if inputs or options else None
    model = nnx.clone(model)
    nodes = list(nnx.iter_graph(model))
    found, owned = {}, set()
    for parts, layer in nodes:
        if not isinstance(layer, LAYERS + NORMS + UNABLE):
            continue
        path = dotted(parts)
        parameters = [each for each in vars(layer).values() if isinstance(each, nnx.Param)]
        owned |= {id(each) for each in parameters}
        looked_up = isinstance(layer, nnx.Embed) and attended is not None and path not in attended
        if isinstance(layer, NORMS) or looked_up:
            found |= {path: found_digital(parameters[0][...])} if parameters else {}
        else:
            kernel = getattr(layer, HEAD, layer.embedding) if isinstance(layer, nnx.Embed) else layer.kernel
            equation = layer.einsum_str if isinstance(layer, nnx.Einsum) else None
            found[path] = found_layer(layer, kernel[...], _shape(layer), equation)
    for parts, parameter in nodes:
        if isinstance(parameter, nnx.Param) and id(parameter) not in owned:
            found[dotted(parts)] = found_parameter(parameter[...])
    for path, kernel in kernels(found, rules, key).items():
        _put(found[path].layer, kernel)
    return model


def _attended(model: nnx.Module, inputs: Sequence[Any], options: Mapping[str, Any]) -> set[str]:
    """Return the paths of the embeddings that a model multiplies by."""
    seen: set[str] = set()

    def noted(path: str, attend: Callable[..., Array], *args: Any, **kwargs: Any) -> Array:
        seen.add(path)
        return attend(*args, **kwargs)

    model = nnx.clone(model)
    for parts, layer in nnx.iter_graph(model):
        if isinstance(layer, nnx.Embed):
            layer.attend = functools.partial(noted, dotted(parts), layer.attend)
    graph, state = nnx.split(model)
    jax.eval_shape(lambda state, *inputs: nnx.merge(graph, state)(*inputs, **options), state, *inputs)
    return seen


def _shape(layer: Any) -> tuple[int, ...]:
    """Return the shape of a kernel as the layer made it."""
    if isinstance(layer, nnx.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nnx.LinearGeneral):
        return *layer.batch_axis.values(), *layer.in_features, *layer.out_features
    if isinstance(layer, nnx.Embed):
        return layer.num_embeddings, layer.features
    return tuple(layer.kernel_shape)


def _put(layer: Any, kernel: Kernel) -> None:
    """Give a layer its kernel on arrays."""
    layer.promote_dtype = Promote(layer.promote_dtype)
    if isinstance(layer, nnx.Embed):
        layer.__class__ = _Embed
        setattr(layer, HEAD, InArrays(kernel))
        return
    layer.kernel = InArrays(kernel)
    if isinstance(layer, nnx.Conv):
        layer.conv_general_dilated, layer.mask = conv_general_dilated, None
    elif isinstance(layer, nnx.Einsum):
        layer.einsum_op = einsum
    else:
        layer.dot_general = dot_general
