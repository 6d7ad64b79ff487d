"""IR drop: the voltage that is lost in the wires of an array.

Word line r is driven from the left, bit line j is sensed at the bottom, and every cell is joined to the next by one
segment of either wire. With rows and columns counted from 1 and the cell's current I = G V,

    V_rj = v_r - sum_j' Rr min(j, j') I_rj' - sum_r' Rc (rows + 1 - max(r, r')) I_r'j,

Kirchhoff's laws as two products with fixed matrices (the same fixed point as CrossSim's cumulative sums). Positive and
negative cells are in separate arrays.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .physical import Physical, check_bounds, for_each_cell, like, model, varying_as


@model(
    at_least_0=("row_resistance", "column_resistance"),
    above_0=("tolerance",),
)
class Wire:
    """Resistance of the wires of an array, and how its currents are solved for.

    Attributes:
      row_resistance: resistance of one word line segment, of Rmin = 1 / Gmax.
      column_resistance: resistance of one bit line segment, of Rmin.
      tolerance: largest error of a cell's voltage, of the full read voltage.
      iterations: most iterations; a product that is not within the tolerance by then is NaN.
      relaxation: a fixed step, as CrossSim's gamma, which diverges where wires are long or resistive; None for
        Chebyshev's steps, which converge for every array of linear cells.
    """

    row_resistance: Physical = 0.0
    column_resistance: Physical = 0.0
    tolerance: Physical = 1e-5
    iterations: int = 200
    relaxation: Physical = None

    def __post_init__(self):
        check_bounds(self, "relaxation", 0, 2, open_low=True)
        if (
            not isinstance(self.iterations, int)
            or not 1 <= self.iterations <= 1_000_000
        ):
            raise ValueError(
                f"Wire.iterations = {self.iterations!r}: give the most iterations, 1 to 1,000,000"
            )


def currents(
    v: Float[Array, " rows"],
    G: Float[Array, "rows cols"],
    wire: Wire,
    iv: Callable[[Array, Array], Array] | None = None,
) -> Float[Array, " cols"]:
    """Return the column currents of one array with resistive wires; all NaN where the iteration did not converge.

    A row without current changes nothing above the cells in use but lengthens their bit lines below them: a matrix
    smaller than its array sits in the bottom rows. Cells without `iv`, (V, G) -> current, are linear.
    """
    rows, cols = G.shape
    r = jnp.arange(1, rows + 1)
    j = jnp.arange(1, cols + 1)
    along_row = like(wire.row_resistance, G) * like(
        jnp.minimum(j[:, None], j[None, :]), G
    )
    along_column = like(wire.column_resistance, G) * like(
        rows + 1 - jnp.maximum(r[:, None], r[None, :]), G
    )
    exact = jax.lax.Precision.HIGHEST

    def drop(current: Array) -> Array:
        word = jnp.matmul(current, along_row, precision=exact)
        return word + jnp.matmul(along_column, current, precision=exact)

    def cell(V: Array) -> Array:
        return G * V if iv is None else for_each_cell("iv", iv(V, G), G.shape)

    applied = jnp.broadcast_to(v[:, None], G.shape)

    def error(V: Array) -> Array:
        return applied - drop(cell(V)) - V

    if wire.relaxation is None:
        # V + drop(I(V)) has eigenvalues from 1 to 1 + 2 radius, real since drop is symmetric; its row sums bound them.
        slope = jax.jvp(cell, (applied,), (jnp.ones_like(applied),))[1]
        radius = jnp.max(drop(slope)) / 2
        first = 1 / (1 + radius)

        def weights(q: Array) -> tuple[Array, Array, Array]:
            after = 1 / (2 * (1 + radius) - jnp.square(radius) * q)
            return 2 * after, jnp.square(radius) * q * after, after
    else:
        first = like(wire.relaxation, G)

        def weights(q: Array) -> tuple[Array, Array, Array]:
            return q, jnp.zeros_like(q), q

    tolerance = like(wire.tolerance, G)

    def unsolved(residual: Array) -> Array:
        return ~jnp.all(jnp.abs(residual) <= tolerance)

    def proceed(state: tuple[Array, ...]) -> Array:
        _, _, residual, _, iteration = state
        return (
            (iteration < wire.iterations)
            & unsolved(residual)
            & jnp.all(jnp.isfinite(residual))
        )

    def improve(state: tuple[Array, ...]) -> tuple[Array, ...]:
        V, step, _, q, iteration = state
        V = V + step
        residual = error(V)
        gain, momentum, q = weights(q)
        return V, gain * residual + momentum * step, residual, q, iteration + 1

    residual = error(applied)
    start = (
        varying_as(applied, residual),
        first * residual,
        residual,
        first,
        jnp.int32(0),
    )
    V, _, residual, _, _ = jax.lax.while_loop(proceed, improve, start)
    # Not jnp.sum: vmapped to seven axes or more, jaxlib 0.10.2 gets the sum of G V over one of them wrong on CPUs, or
    # crashes (https://github.com/jax-ml/jax/issues/40412).
    total = jnp.dot(jnp.ones_like(v), cell(V), precision=exact)
    return jnp.where(unsolved(residual), jnp.nan, total)
