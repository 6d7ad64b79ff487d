"""Digital parameters next to the arrays that bring their outputs closer to those of the digital weights."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Correction:
    """Correction of a chip's reads: y = scale * read(x) + offset + (x @ U) @ V. A part that is None is left out.

    Attributes:
      scale: factor of each column.
      offset: number that is added to each column.
      U: first factor of a matrix of low rank; matrices of a stack with a smaller rank than r have columns of zeros.
      V: second factor.
    """

    scale: Float[Array, "*N d_out"] | None = None
    offset: Float[Array, "*N d_out"] | None = None
    U: Float[Array, "*N d_in r"] | None = None
    V: Float[Array, "*N r d_out"] | None = None

    def __post_init__(self):
        if (self.U is None) != (self.V is None):
            raise ValueError(
                "Correction: U and V are the factors of one matrix: give both or neither"
            )

    def __call__(
        self, x: Float[Array, "*B d_in"], y: Float[Array, "*B d_out"]
    ) -> Float[Array, "*B d_out"]:
        """Return the corrected outputs, given the inputs and outputs of one matrix."""
        lead = range(y.ndim - 1)
        if self.scale is not None:
            y = y * jnp.expand_dims(self.scale.astype(y.dtype), lead)
        if self.offset is not None:
            y = y + jnp.expand_dims(self.offset.astype(y.dtype), lead)
        if self.U is not None and self.V is not None:
            y = y + (x @ self.U.astype(x.dtype)) @ self.V.astype(x.dtype)
        return y

    def weights(self, read: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
        """Return the matrix of the corrected reads, without offsets, given that of the reads."""
        scaled = read if self.scale is None else read * self.scale[None]
        return scaled if self.U is None or self.V is None else scaled + self.U @ self.V

    def numbers(self) -> int:
        """Return how many digital parameters it has; columns of zeros in U, and their rows of V, do not count."""
        count = sum(part.size for part in (self.scale, self.offset) if part is not None)
        if self.U is None or self.V is None:
            return count
        ranks = int(jnp.sum(jnp.any(self.U != 0, axis=-2)))
        return count + ranks * (self.U.shape[-2] + self.V.shape[-1])


def numbers_per_rank(chips: Sequence[Any]) -> int:
    """Return how many numbers matrices of rank 1 have, one for each matrix of the chips, or of stacks of matrices."""
    return sum(math.prod(chip.shape[:-2]) * sum(chip.shape[-2:]) for chip in chips)


def check_correction(correction: Correction, name: str, shape: tuple[int, ...]) -> None:
    """Raise a ValueError if a part of a correction does not fit the chip of this name and shape."""
    *lead, d_in, d_out = shape
    rank = () if correction.U is None else correction.U.shape[-1:]
    for part, expected_shape in {
        "scale": (d_out,),
        "offset": (d_out,),
        "U": (d_in, *rank),
        "V": (*rank, d_out),
    }.items():
        values = getattr(correction, part)
        if values is not None and values.shape != (*lead, *expected_shape):
            raise ValueError(
                f"the {part} of the correction of {name!r} has shape {values.shape}: expected "
                f"{(*lead, *expected_shape)}. Give "
                "the correction of this chip"
            )


def by_name(chips: Sequence[Any]) -> dict[str, Any]:
    """Return chips by their names; raises a ValueError if two share one."""
    chips_by_name = {chip.name: chip for chip in chips}
    for name in chips_by_name if len(chips_by_name) < len(chips) else ():
        if (count := sum(chip.name == name for chip in chips)) > 1:
            raise ValueError(
                f"{count} chips have the name {name!r}, by which their data are given: set other names with "
                "dataclasses.replace(chip, name=...)"
            )
    return chips_by_name


# The corrections of a model, by the names of its chips.
Corrections = Mapping[str, Correction]
