"""NNX models on arrays: layers get a variable of another type, and products that read it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from ..chip.tree import Rules, first_match
from .kernel import Kernel, Promote, conv_general_dilated, dot_general, einsum
from .layers import (
    HEAD,
    LAYERS,
    NORMS,
    UNABLE,
    WRAPPERS,
    Table,
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


class _Embed(nnx.Embed):
    """An embedding whose head is on arrays, next to the table that tokens are looked up in."""

    path: str

    @property
    def embedding(self) -> Any:
        """Shape and dtype of the table."""
        return Table(self.path, vars(self)["embedding"])

    @embedding.setter
    def embedding(self, table: Any) -> None:
        # As nnx does for an attribute without a property.
        if isinstance(held := vars(self).get("embedding"), nnx.Variable) and isinstance(table, nnx.Variable):
            held.update_from_state(table)
        else:
            vars(self)["embedding"] = table

    def __call__(self, *args: Any, **options: Any) -> Float[Array, "*B d"]:
        """Return the rows of the table for tokens."""
        return nnx.Embed.__call__(_plain(self), *args, **options)

    def attend(self, query: Float[Array, "*B d"], out_sharding: Any = None) -> Float[Array, "*B V"]:
        """Return the logits of a query."""
        query, head = self.promote_dtype((query, getattr(self, HEAD)[...]), dtype=self.dtype)
        return head.read(query, out_sharding=out_sharding)


def _plain(embed: nnx.Embed) -> Any:
    """Return what the code of `nnx.Embed` needs of an embedding: its attributes."""
    return SimpleNamespace(**vars(embed))


def _guard(path: str, embed: Any) -> None:
    """Keep the table of an embedding from all code but the layer's."""
    embed.__class__, embed.path = _Embed, path


def convert(model: Model, rules: Rules, key: Array, inputs: Sequence[Any], options: Mapping[str, Any]) -> Model:
    """Return a copy of a model on arrays; arguments as for `crossbar.flax.convert`."""
    attended = _attended(model, rules, inputs, options) if inputs or options else None
    model = nnx.clone(model)
    nodes = list(nnx.iter_graph(model))
    wrappers = [(parts, type(layer).__name__) for parts, layer in nodes if isinstance(layer, WRAPPERS)]
    found, owned = {}, set()
    for parts, layer in nodes:
        if not isinstance(layer, LAYERS + NORMS + UNABLE):
            continue
        path = dotted(parts)
        names = (HEAD, *_PARAMETERS) if isinstance(layer, _Embed) else _PARAMETERS
        parameters = [each for name in names if (each := vars(layer).get(name)) is not None]
        owned |= {id(each) for each in parameters}
        looked_up = isinstance(layer, nnx.Embed) and attended is not None and path not in attended
        if isinstance(layer, NORMS) or looked_up:
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
        _put(path, found[path].layer, kernel)
    return model


def _attended(model: nnx.Module, rules: Rules, inputs: Sequence[Any], options: Mapping[str, Any]) -> set[str]:
    """Return the paths of the embeddings that a model multiplies by."""
    seen: set[str] = set()

    def noted(path: str, attend: Callable[..., Array], *args: Any, **kwargs: Any) -> Array:
        seen.add(path)
        return attend(*args, **kwargs)

    model = nnx.clone(model)
    for parts, layer in nnx.iter_graph(model):
        if isinstance(layer, nnx.Embed):
            path, attend = dotted(parts), layer.attend
            if type(layer) is nnx.Embed and first_match(path, None, rules) is not None:
                attend = functools.partial(nnx.Embed.attend, _plain(layer))
                _guard(path, layer)
            layer.attend = functools.partial(noted, path, attend)
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


def _put(path: str, layer: Any, kernel: Kernel) -> None:
    """Give a layer its kernel on arrays."""
    layer.promote_dtype = Promote(layer.promote_dtype)
    if isinstance(layer, nnx.Embed):
        _guard(path, layer)
        setattr(layer, HEAD, InArrays(kernel))
        return
    layer.kernel = InArrays(kernel)
    if isinstance(layer, nnx.Conv):
        layer.conv_general_dilated, layer.mask = conv_general_dilated, None
    elif isinstance(layer, nnx.Einsum):
        layer.einsum_op = einsum
    else:
        layer.dot_general = dot_general
