"""From what the columns of the arrays were converted to, to the product: the digital side of shift-and-add.

Axis letters: K weight slices, A inputs or row tiles, R row tiles, C column tiles.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..chip.program import ArrayState
from ..config.schema import CrossbarConfig
from ..mapping import decoding as arrays
from ..mapping import encoding
from ..mapping.adc import Converter


def finish(
    total: Float[Array, "K A C cols"],
    ones: Float[Array, "#A 1 1"],
    quantise: Converter | None,
    state: ArrayState,
    config: CrossbarConfig,
) -> Float[Array, "A d_out"]:
    """Return the weighted sum over weight slices, in weight codes times input codes.

    Args:
      total: codes, or sums without an ADC, shifted and added over input slices; unit columns last.
      ones: sums of the inputs, for what is removed digitally.
      quantise: the ADC.
      state: of the chip.
      config: of the crossbar.
    """
    lsb = None if quantise is None else quantise.lsb
    if config.encoding.kind == "offset" and (state.flipped is not None or not config.encoding.unit_column):
        if lsb is not None:
            total = total * lsb.T[:, :, None, None]
        return weigh(arrays.recover(total, ones, state.flipped, config), None, state, config)
    if config.encoding.unit_column:
        total = total[..., :-1] - total[..., -1:]
    return weigh(total, lsb, state, config)


def weigh(
    slices: Float[Array, "K A C cols"], lsb: Float[Array, "_R K"] | None, state: ArrayState, config: CrossbarConfig
) -> Float[Array, "A d_out"]:
    """Return the sum over weight slices, each times what its level (or its code, given `lsb`) is worth."""
    worth = jnp.asarray(encoding.significance(config), slices.dtype)[None]
    if lsb is not None:
        worth = worth * lsb
    # Powers of two times integers add up exactly in any order; what is left is one factor.
    shares = (worth / worth[:, :1]).T[:, :, None, None]
    whole = sum(share * of_slice for share, of_slice in zip(shares, slices, strict=True))
    _, cols = encoding.grid(state.shape, config)
    return encoding.join(whole * worth[:, 0, None, None], cols, axis=1)
