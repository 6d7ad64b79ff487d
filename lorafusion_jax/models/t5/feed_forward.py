"""The feed-forward layer, plain or gated."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from ..layers import Adapters, Linear


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
        """Apply the layer to every position."""
        if self.gated:
            hidden = jax.nn.gelu(self.wi_0(x, adapters), approximate=True) * self.wi_1(x, adapters)
        else:
            hidden = jax.nn.relu(self.wi(x, adapters))
        return self.wo(hidden, adapters)
