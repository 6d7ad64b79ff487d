"""Parts that families share: frozen weights, linear maps that may have an adapter, RMS norm, the scan over layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from ..crossbar import with_shared_factors
from ..crossbar.calibration.whole_model import TAPPED
from ..support.platform import for_cpu
from .bit_cast import from_bits, to_bits
from .weights import PRODUCT, SUM, PerLayerWeights, is_per_layer, looped, matmul, summed

# One adapted site: called as adapter(x, kernel), it returns the adapted x @ kernel.
Adapter = Callable[[Array, Array], Array]
Adapters = Mapping[str, Adapter]
# Arguments and results of models. Axis letters: B batch, S source, T target, V vocabulary, D model width.
Source = Int[Array, "B S"]
Mask = Bool[Array, "B S"]
Target = Int[Array, "B T"]
Hidden = Float[Array, "B T D"]
Logits = Float[Array, "B T V"]
# The rows of a packed batch (`tasks.Rows`): by groups, the places of source tokens and of labels in the line of the
# batch; and the token before each label.
Rows = tuple[tuple[Array, ...], tuple[Array, ...], Target]

_POLICIES = jax.checkpoint_policies
# Keeps the products with weights and recomputes everything else, which is cheap: half the memory of saving everything,
# at the same speed. The attention products have batch dimensions and are recomputed.
_PRODUCTS = _POLICIES.save_from_both_policies(
    _POLICIES.dots_with_no_batch_dims_saveable,
    _POLICIES.save_only_these_names(PRODUCT, TAPPED),
)
# On accelerators one value replaces a map's product and its adapter's, the adapter's reads and the residual stream.
_SUMS = _POLICIES.save_only_these_names(SUM, TAPPED)


class Base(nnx.Variable):
    """A weight of the pretrained base model: an array or a quantised array, frozen during fusion."""


class Linear(nnx.Module):
    """A linear map, kernels stacked [L, d_in, d_out]; one layer of it inside a scan.

    Attributes:
      site: name of its site without the stack's, the key of its adapter.
      bias: added to the product, [L, d_out], or None.
    """

    def __init__(
        self,
        site: str,
        layers: int,
        d_in: int,
        d_out: int,
        *,
        scale: float,
        biased: bool = False,
        rngs: nnx.Rngs,
    ):
        self.site = site
        self.kernel = Base(scale * rngs.params.normal((layers, d_in, d_out)))
        self.bias = Base(jnp.zeros((layers, d_out))) if biased else None

    def __call__(
        self, x: Float[Array, "*B d_in"], adapters: Adapters
    ) -> Float[Array, "*B d_out"]:
        """Return the product with the kernel, through this site's adapter if it has one, plus the bias."""
        kernel = self.kernel.get_value()
        adapter = adapters.get(self.site)
        y = summed(matmul(x, kernel)) if adapter is None else adapter(x, kernel)
        if self.bias is None:
            return y
        return y + jnp.expand_dims(self.bias[...].astype(y.dtype), range(y.ndim - 1))


class RMSNorm(nnx.Module):
    """Root-mean-square norm: no mean, no bias, variance in float32.

    Attributes:
      offset: added to the scale, in float32; 1 where files hold the scale less 1.
      scale: stacked [L, D], or [D].
    """

    def __init__(self, shape: tuple[int, ...], eps: float, *, offset: float = 0.0):
        self.eps = eps
        self.offset = offset
        self.scale = Base(jnp.full(shape, 1.0 - offset))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        normed = unscaled_norm(x, self.eps)
        scale = jnp.expand_dims(self.scale[...], range(x.ndim - 1))
        if self.offset:
            return (normed * (scale.astype(normed.dtype) + self.offset)).astype(x.dtype)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


def unscaled_norm(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """Return numbers over their root mean square, in float32 (float64 stays)."""
    exact = widened(x)
    variance = jnp.mean(jnp.square(exact), axis=-1, keepdims=True)
    return exact * jax.lax.rsqrt(variance + eps)


class LayerNorm(RMSNorm):
    """Layer norm: an RMS norm of the deviations from the mean, with a bias."""

    def __init__(self, shape: tuple[int, ...], eps: float):
        super().__init__(shape, eps)
        self.bias = Base(jnp.zeros(shape))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        exact = widened(x)
        normed = super().__call__(exact - jnp.mean(exact, axis=-1, keepdims=True))
        bias = jnp.expand_dims(self.bias[...].astype(exact.dtype), range(x.ndim - 1))
        return (normed + bias).astype(x.dtype)


def scan_blocks(
    block: Callable[..., tuple[Any, Any]],
    stacked: nnx.Module,
    x: Any,
    xs: Any,
    *,
    unroll: bool,
) -> tuple[Any, Any]:
    """Call `block(layer, x, xs of the layer)` for one layer after the other; return the last x and all outputs.

    Variables of `stacked`, the blocks, and leaves of `xs` are [L, ...]; x is an array or a tree. `unroll` is that of
    `Architecture`.
    """
    graph, state = nnx.split(stacked)
    leaves, tree = jax.tree.flatten(state, is_leaf=is_per_layer)
    per_layer = [leaf for leaf in leaves if is_per_layer(leaf)]

    def of_layer(x: Any, weights: nnx.State, layer_inputs: Any) -> tuple[Any, Any]:
        with looped(not unroll):
            return block(
                nnx.merge(graph, with_shared_factors(weights)), x, layer_inputs
            )

    if unroll and per_layer:
        # traced once for all layers
        of_layer = jax.jit(of_layer)
        outputs = []
        for layer in _layers((state, xs)):
            x, output = of_layer(x, *layer)
            outputs.append(output)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
    # Stacks in separate arrays are not sliced: the loop passes numbers of layers instead.
    sliced = tree.unflatten(
        [
            PerLayerWeights((), jnp.arange(leaf.shape[0]))
            if is_per_layer(leaf)
            else leaf
            for leaf in leaves
        ]
    )

    def body(x: Any, layer: Any) -> tuple[Any, Any]:
        x, (weights, layer_inputs) = from_bits((x, layer))
        following = iter(per_layer)
        weights = jax.tree.map(
            lambda leaf: next(following).at(leaf.layer) if is_per_layer(leaf) else leaf,
            weights,
            is_leaf=is_per_layer,
        )
        return to_bits(of_layer(x, weights, layer_inputs))

    if not unroll:
        body = jax.checkpoint(
            body, policy=_PRODUCTS if for_cpu() else _SUMS, prevent_cse=False
        )
    return from_bits(jax.lax.scan(body, *to_bits((x, (sliced, xs))), unroll=unroll))


def _layers(stacked: Any) -> list[Any]:
    """Return a tree for each layer. The gradient of a split array is one concatenation, that of slices many sums."""

    def split(leaf: Any) -> Sequence[Any]:
        if is_per_layer(leaf):
            in_codes = not isinstance(leaf.matrices, tuple)  # a stack in codes
            if in_codes:
                return [leaf.at(jnp.int32(layer)) for layer in range(leaf.shape[0])]
            return leaf.matrices
        return [jnp.squeeze(part, 0) for part in jax.lax.split(leaf, [1] * len(leaf))]

    leaves, tree = jax.tree.flatten(stacked, is_leaf=is_per_layer)
    return [
        tree.unflatten(layer_leaves)
        for layer_leaves in zip(*map(split, leaves), strict=True)
    ]


def of_stack(
    adapters: Adapters, stack: str, sites: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the adapters of one stack, by their sites' names without the stack's.

    Raises a ValueError as `check_sites` does.
    """
    check_sites(adapters, sites)
    return {
        site.partition(".")[2]: adapter
        for site, adapter in adapters.items()
        if site.partition(".")[0] == stack
    }


def check_sites(adapters: Adapters, sites: Mapping[str, Any]) -> None:
    """Raise ValueError for an adapter at a site that the model lacks, or with arrays for other layers than it has."""
    if foreign := sorted(adapters.keys() - {*sites}):
        raise ValueError(
            f"the model lacks the site {foreign[0]!r} of an adapter: its sites are {', '.join(sites)}; leave it out"
        )
    for site, adapter in adapters.items():
        for name, values in getattr(adapter, "__dict__", {}).items():
            layers = sites[site].layers
            if isinstance(values, jax.Array | np.ndarray) and values.shape[:1] != (
                layers,
            ):
                raise ValueError(
                    f"{name} of the adapter at {site} has the shape {values.shape}: stack it for {layers} layers, "
                    f"({layers}, ...)"
                )


def widened(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Return numbers in float32, those of 64 bits as they are."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


class Line(NamedTuple):
    """The places of a line's tokens in the rows that attention takes apart, and the other way round.

    Attributes:
      groups: for each group of rows, the place of every token in the line; behind its end where a row has none.
      tokens: those of all groups.
      places: the reverse: the place of each token of the line in `tokens`; behind their end for padding.
    """

    groups: tuple[Int[Array, "_ _"], ...]
    tokens: Int[Array, " N"]
    places: Int[Array, " T"]

    def masks(self) -> list[Bool[Array, "_ _"]]:
        """Return which places of the groups have tokens."""
        return [group < len(self.places) for group in self.groups]


def line_of(groups: Sequence[Int[Array, "_ _"]], width: int) -> Line:
    """Return a line of so many tokens, from the places of each row's tokens; larger ones mean none."""
    tokens = jnp.concatenate([jnp.ravel(group) for group in groups])
    places = jnp.full(width, len(tokens), jnp.int32)
    return Line(
        tuple(groups),
        tokens,
        places.at[tokens].set(jnp.arange(len(tokens), dtype=jnp.int32), mode="drop"),
    )


def folded(line: Shaped[Array, "1 T"]) -> Shaped[Array, "_ _"]:
    """Return a line in halves, if it has any: XLA is slow at sums over a CPU's array whose first axis is 1."""
    return line.reshape(2 - line.shape[1] % 2, -1)


def apart(x: Float[Array, "B T D"], line: Line | None) -> list[Float[Array, "_ _ D"]]:
    """Return the rows of a folded line by groups, zero where a row has no token; without a line the rows of `x`."""
    if line is None:
        return [x]
    moved = _moved(x.reshape(-1, x.shape[-1]), line.tokens, line.places)
    parts = jax.lax.split(moved, [group.size for group in line.groups])
    return [
        part.reshape(*group.shape, -1)
        for part, group in zip(parts, line.groups, strict=True)
    ]


def together(
    parts: Sequence[Float[Array, "_ _ D"]], line: Line | None, shape: tuple[int, ...]
) -> Float[Array, "B T D"]:
    """Return what `apart` divides, [B, T, ...] of this shape, zero for padding."""
    if line is None:
        return parts[0]
    flat = jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
    return _moved(flat, line.places, line.tokens).reshape(*shape[:2], -1)


@jax.custom_vjp
def _moved(
    x: Float[Array, "M D"], to: Int[Array, " N"], back: Int[Array, " M"]
) -> Float[Array, "N D"]:
    """Return row `to[n]` of `x` at n, or zero; `back` is the inverse, so that the gradient is no scatter either."""
    return jnp.take(x, to, axis=0, mode="fill", fill_value=0)


_moved.defvjp(
    lambda x, to, back: (_moved(x, to, back), (to, back)),
    lambda places, g: (_moved(g, places[1], places[0]), None, None),
)
