"""Mean squares of the inputs of a model's arrays."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..calibration.whole_model import Counted, Run, summed
from ..chip.chip import Chip, by_name, chips_in
from ..read.matmul import matmul, prepared_inputs


def moments(
    run: Run, weights: Any, batches: Iterable[Any], *, counted: Counted | None = None
) -> dict[str, Float[Array, "*N d_in"]]:
    """Return the mean square of each input of each chip, after its preparation, by the chips' names.

    Inputs that are all zero are left out.

    Args:
      run: function from weights and a batch to an array that depends on every product, such as logits. Use one function
        for all calls, because each function is compiled once.
      weights: tree with chips; those of perfect cells without converters give the digital model's inputs.
      batches: inputs, without labels.
      counted: function from a batch and the name of a chip, whose inputs there are [*B, d_in], to those that are no
        padding; by default all.

    Raises:
      ValueError: there are no batches, or they do not read one of the chips.
    """
    chips = by_name(chips_in(weights))
    zeros = [
        (jnp.zeros(chip.shape[:-1]), jnp.zeros(chip.shape[:-2]))
        for chip in chips.values()
    ]
    sums = summed(run, weights, batches, _squares, zeros, counted=counted)
    mean_squares = {}
    for name, (squares, count) in zip(chips, sums, strict=True):
        if not bool(jnp.all(count > 0)):
            raise ValueError(
                f"{name} was read by none of the batches: give batches that use all chips"
            )
        mean_squares[name] = squares / count[..., None]
    return mean_squares


def _squares(
    x: Float[Array, "*B d_in"], chip: Chip
) -> tuple[Float[Array, "*B d_out"], tuple[Array, Array]]:
    met = prepared_inputs(x.astype(jnp.float32), chip).reshape(-1, x.shape[-1])
    return matmul(x, chip), (
        jnp.sum(jnp.square(met), axis=0),
        jnp.sum(jnp.any(met != 0, axis=1), dtype=jnp.float32),
    )
