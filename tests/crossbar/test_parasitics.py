"""IR drop against a nodal analysis of the same circuit, CrossSim's iteration, and its limits."""

import crossbar_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.crossbar import Cell, CrossbarConfig, Device, Mapping, Sinh, Tile, Wire, matmul, program

TIGHT = {"tolerance": 1e-13, "iterations": 2000}


def currents(v, G, wire: Wire) -> jax.Array:
    """Return the currents of all columns of one array, whose largest conductance is 1."""
    config = CrossbarConfig(
        cell=Cell(bits=None), mapping=Mapping(weight_bits=None), dac=None, tile=Tile(rows=None, cols=None, wire=wire)
    )
    return jax.jit(lambda v, G: matmul(v[None], program(G, config))[0])(v, G)


def nodal(v: np.ndarray, G: np.ndarray, row: float, column: float) -> np.ndarray:
    """Kirchhoff's current law at every node of the word and the bit lines, solved as one linear system."""
    rows, cols = G.shape
    word = np.arange(rows * cols).reshape(rows, cols)
    bit = word + rows * cols
    A, b = np.zeros((2 * rows * cols, 2 * rows * cols)), np.zeros(2 * rows * cols)

    def join(m: int, n: int, g: float) -> None:
        for i, k in ((m, n), (n, m)):
            A[i, i] += g
            A[i, k] -= g

    for r in range(rows):
        A[word[r, 0], word[r, 0]] += 1 / row
        b[word[r, 0]] += v[r] / row
        for j in range(1, cols):
            join(word[r, j - 1], word[r, j], 1 / row)
    for j in range(cols):
        A[bit[-1, j], bit[-1, j]] += 1 / column
        for r in range(1, rows):
            join(bit[r - 1, j], bit[r, j], 1 / column)
    for r in range(rows):
        for j in range(cols):
            join(word[r, j], bit[r, j], G[r, j])
    return np.linalg.solve(A, b)[bit[-1]] / column


def array(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    v, G = rng.integers(-1, 2, rows).astype(float), rng.random((rows, cols))
    v[0], G[0, 0] = 1, 1
    return v, G


@pytest.mark.parametrize("shape", [(12, 9), (5, 14), (1, 1)])
@pytest.mark.parametrize("row, column", [(1e-4, 3e-4), (0.5, 0.3)])
def test_currents_are_those_of_nodal_analysis(shape, row, column):
    v, G = array(*shape)
    with jax.enable_x64(True):
        y = currents(jnp.asarray(v), jnp.asarray(G), Wire(row_resistance=row, column_resistance=column, **TIGHT))
    np.testing.assert_allclose(y, nodal(v, G, row, column), rtol=1e-8, atol=1e-10)


def test_a_full_array_is_right_in_float32():
    v, G = array(128, 128)
    v, wires = np.abs(v), {"row_resistance": 1e-3, "column_resistance": 1e-3}
    y = currents(jnp.asarray(v, jnp.float32), jnp.asarray(G, jnp.float32), Wire(**wires))
    with jax.enable_x64(True):
        exact = currents(jnp.asarray(v), jnp.asarray(G), Wire(**wires, **TIGHT))
    assert y.dtype == jnp.float32
    # Errors of the voltages, at most the tolerance each, add up along a column.
    np.testing.assert_allclose(y, exact, atol=128 * 1e-5)
    assert np.linalg.norm(y - v @ G) > 0.5 * np.linalg.norm(v @ G)


def relax(v: np.ndarray, G: np.ndarray, row: float, column: float, gamma: float, tolerance: float) -> np.ndarray:
    """CrossSim's iteration with its cumulative sums, on rows x columns."""
    V0 = np.repeat(v[:, None], G.shape[1], 1)
    V = V0.copy()
    for _ in range(1000):
        current = G * V
        bit = np.cumsum((column * np.cumsum(current, 0))[::-1], 0)[::-1]
        word = np.cumsum(row * np.cumsum(current[:, ::-1], 1)[:, ::-1], 1)
        error = V0 - bit - word - V
        if np.abs(error).max() < tolerance:
            return current.sum(0)
        V = V + gamma * error
    raise AssertionError("did not converge")


@pytest.mark.parametrize("gamma, tolerance", [(0.9, 2e-4), (1.0, 1e-3), (0.5, 1e-10)])
def test_a_fixed_step_stops_where_cumulative_sums_do(gamma, tolerance):
    v, G = array(32, 24)
    with jax.enable_x64(True):
        wire = Wire(row_resistance=5e-4, column_resistance=1e-3, relaxation=gamma, tolerance=tolerance)
        y = currents(jnp.asarray(v), jnp.asarray(G), wire)
    np.testing.assert_allclose(y, relax(v, G, 5e-4, 1e-3, gamma, tolerance), rtol=1e-11, atol=1e-12)


def test_no_convergence_is_nan_and_chebyshev_converges():
    v, G = jnp.ones(64), jnp.ones((64, 64))
    wires = {"row_resistance": 1e-2, "column_resistance": 1e-2}
    assert jnp.isnan(currents(v, G, Wire(relaxation=1.0, **wires))).all()
    assert jnp.isnan(currents(v, G, Wire(iterations=2, **wires))).all()
    assert jnp.isfinite(currents(v, G, Wire(**wires))).all()


@pytest.mark.parametrize("iv", [None, Sinh(read_voltage=0.5)], ids=["linear", "nonlinear"])
def test_a_compiled_product_is_right_every_time(iv):
    """Loops within a compiled product, run again and again, and with one more axis."""
    rng = np.random.default_rng(0)
    W, x = (rng.normal(size=shape).astype(np.float32) for shape in ((16, 16), (1, 16)))
    wire = Wire(row_resistance=1e-4, column_resistance=1e-4)
    config = CrossbarConfig(tile=Tile(rows=16, cols=16, wire=wire), device=Device(iv=iv))
    wanted = crossbar_oracle.read(crossbar_oracle.program(W, config), x, config).y
    chip, x = program(jnp.asarray(W), config), jnp.asarray(x)
    product = jax.jit(lambda x: matmul(x, chip))
    one_more_axis = jax.jit(jax.vmap(lambda x: matmul(x, chip)))
    for _ in range(5):
        for y in (product(x), one_more_axis(x[None])[0]):
            assert np.linalg.norm(y - wanted) < 1e-4 * np.linalg.norm(wanted)
