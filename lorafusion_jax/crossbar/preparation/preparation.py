"""A preparation: a change of a matrix, and of its inputs, that keeps their product but loses less to errors of cells.

y = x W = ((x / a) H^T) (H diag(a) W), with factors a of the inputs and an orthogonal H. The matrix on the right is
written, with a range for each of its columns, beyond which weights are clipped.
"""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..config.schema import CrossbarConfig
from .transform import transform, transform_matrices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Preparation:
    """Preparation of a matrix, or of each matrix of a stack.

    Attributes:
      factors: a, whose signs are random if inputs are transformed; None for ones.
      ranges: full scale of each column of the prepared matrix, in its units; None for its largest weight.
      transforms: inputs are transformed by H.
      white: it was made for inputs of equal mean squares, because none were given.
      identity: digests of the whole stack: of what changes inputs, a hyphen, and of the ranges.
    """

    factors: Float[Array, "*N d_in"] | None = None
    ranges: Float[Array, "*N d_out"] | None = None
    transforms: bool = dataclasses.field(default=False, metadata={"static": True})
    white: bool = dataclasses.field(default=False, metadata={"static": True})
    identity: str = dataclasses.field(default="", metadata={"static": True})

    def inputs(self, x: Float[Array, "*B d_in"]) -> Float[Array, "*B d_in"]:
        """Return (x / a) H^T, for one matrix."""
        if self.factors is not None:
            x = x / jnp.expand_dims(self.factors.astype(x.dtype), range(x.ndim - 1))
        return transform(x, transform_matrices(x.shape[-1])) if self.transforms else x

    def weights(
        self, weights: Float[Array, "d_in d_out"]
    ) -> Float[Array, "d_in d_out"]:
        """Return H diag(a) W."""
        if self.factors is not None:
            weights = weights * self.factors.astype(weights.dtype)[:, None]
        if self.transforms:
            return transform(weights.T, transform_matrices(len(weights))).T
        return weights

    def moments(self, squares: Float[Array, "*B d_in"]) -> Float[Array, "*B d_in"]:
        """Return the mean squares of the prepared inputs: after a transform, their mean over its random signs."""
        if self.factors is not None:
            squares = squares / jnp.square(self.factors)
        if not self.transforms:
            return squares
        return jnp.broadcast_to(
            jnp.mean(squares, axis=-1, keepdims=True), squares.shape
        )

    def undo(self, prepared: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
        """Return diag(1 / a) H^T W~, the matrix that inputs meet, given the prepared one."""
        if self.transforms:
            prepared = transform(
                prepared.T, transform_matrices(len(prepared)), inverse=True
            ).T
        if self.factors is None:
            return prepared
        return prepared / self.factors.astype(prepared.dtype)[:, None]

    def identified(self) -> "Preparation":
        """Return the preparation with digests of its arrays as identity."""
        contents = [
            b"" if part is None else np.asarray(part).tobytes()
            for part in (self.factors, self.ranges)
        ]
        contents[0] = str(self.transforms).encode() + contents[0]
        identity = "-".join(
            hashlib.sha256(content).hexdigest()[:16] for content in contents
        )
        return dataclasses.replace(self, identity=identity)


def needs_preparation(config: CrossbarConfig) -> bool:
    """Return whether matrices are changed before they are written."""
    mapping = config.mapping
    return mapping.factors or mapping.transform != "none" or mapping.clip != "none"


def check_preparation(
    preparation: Preparation | None, shape: tuple[int, ...], config: CrossbarConfig
) -> None:
    """Raise a ValueError if matrices [..., d_in, d_out] have another preparation than their configuration requires."""
    mapping = config.mapping
    if preparation is None:
        if needs_preparation(config):
            raise ValueError(
                "mapping.factors, transform or clip need a preparation: give one, as in prepare({'W': weights}, "
                "moments, config)['W'], with the mean squares of the inputs, or None for equal ones"
            )
        return
    transforms = mapping.transform != "none"
    parts = {
        "factors": (preparation.factors is not None, mapping.factors or transforms),
        "a transform": (preparation.transforms, transforms),
        "ranges": (preparation.ranges is not None, mapping.clip != "none"),
    }
    if foreign := [
        name
        for name, (present, configured) in parts.items()
        if present and not configured
    ]:
        raise ValueError(
            f"the preparation has {' and '.join(foreign)}, and the configuration's mapping does not: call prepare with "
            "this configuration"
        )
    *lead, d_in, d_out = shape
    for name, expected in (("factors", (*lead, d_in)), ("ranges", (*lead, d_out))):
        values = getattr(preparation, name)
        if values is not None and values.shape != expected:
            raise ValueError(
                f"{name} of shape {values.shape} in a preparation for a matrix of {shape}: expected {expected}; call "
                "prepare with this matrix"
            )
