"""Frozen weights, the linear map that may carry an adapter, RMS norm and the feed-forward layer."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .weights import matmul

# One adapted site: called as adapter(x, kernel), it returns the adapted x @ kernel.
Adapter = Callable[[Array, Array], Array]
Adapters = Mapping[str, Adapter]


class Base(nnx.Variable):
    """A weight of the pretrained base model: an array or a quantised array, frozen during fusion."""


class Linear(nnx.Module):
    """A bias-free linear map, kernels stacked [L, d_in, d_out]; one layer of it inside a scan."""

    def __init__(self, site: str, layers: int, d_in: int, d_out: int, *, scale: float, rngs: nnx.Rngs):
        self.site = site
        self.kernel = Base(scale * rngs.params.normal((layers, d_in, d_out)))

    def __call__(self, x: Float[Array, "*B d_in"], adapters: Adapters) -> Float[Array, "*B d_out"]:
        """Multiply, through the adapter of this site if there is one."""
        kernel = self.kernel.get_value()
        adapter = adapters.get(self.site)
        return matmul(x, kernel) if adapter is None else adapter(x, kernel)


class RMSNorm(nnx.Module):
    """T5's layer norm: no mean, no bias, variance in float32."""

    def __init__(self, shape: tuple[int, ...], eps: float):
        self.eps = eps
        self.scale = Base(jnp.ones(shape))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalise the last axis."""
        x32 = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = (x32 * jax.lax.rsqrt(variance + self.eps)).astype(x.dtype)
        return normed * self.scale[...].astype(x.dtype)[None, None, :]


class FeedForward(nnx.Module):
    """`wo(relu(wi x))` of T5 1.0, or `wo(gelu(wi_0 x) * wi_1 x)` of T5 1.1 and FLAN."""

    def __init__(self, d_model: int, d_ff: int, *, layers: int, gated: bool, rngs: nnx.Rngs):
        self.gated = gated
        inner = {"layers": layers, "d_in": d_model, "d_out": d_ff, "scale": d_model**-0.5, "rngs": rngs}
        if gated:
            self.wi_0 = Linear("ff.wi_0", **inner)
            self.wi_1 = Linear("ff.wi_1", **inner)
        else:
            self.wi = Linear("ff.wi", **inner)
        self.wo = Linear("ff.wo", layers, d_ff, d_model, scale=d_ff**-0.5, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], adapters: Adapters) -> Float[Array, "B T D"]:
        """Apply to every position."""
        if self.gated:
            hidden = jax.nn.gelu(self.wi_0(x, adapters), approximate=True) * self.wi_1(x, adapters)
        else:
            hidden = jax.nn.relu(self.wi(x, adapters))
        return self.wo(hidden, adapters)
