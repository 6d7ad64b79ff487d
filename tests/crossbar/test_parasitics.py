"""IR drop against a nodal analysis of the same circuit, closed forms, and the circuit's own symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import Sinh, Wire
from lorafusion_jax.crossbar.devices.wires import currents

TIGHT = {"tolerance": 1e-13, "iterations": 2000}
OPTIMISED = {"xla_backend_optimization_level": 3}


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


def array(rows: int, cols: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(-1, 2, rows).astype(float), rng.random((rows, cols))


@pytest.mark.parametrize("shape", [(12, 9), (5, 14), (1, 1)])
@pytest.mark.parametrize("row, column", [(1e-4, 3e-4), (2e-2, 5e-3), (0.5, 0.3)])
def test_currents_are_those_of_nodal_analysis(shape, row, column):
    v, G = array(*shape)
    with jax.enable_x64(True):
        wire = Wire(row_resistance=row, column_resistance=column, **TIGHT)
        y = jax.jit(currents)(jnp.asarray(v), jnp.asarray(G), wire)
        np.testing.assert_allclose(y, nodal(v, G, row, column), rtol=1e-8, atol=1e-10)


def test_a_full_array_is_right_in_float32():
    v, G = array(128, 128)
    v = np.abs(v)
    wire = Wire(row_resistance=1e-3, column_resistance=1e-3)
    y = jax.jit(currents)(jnp.asarray(v, jnp.float32), jnp.asarray(G, jnp.float32), wire)
    with jax.enable_x64(True):
        tight = Wire(row_resistance=1e-3, column_resistance=1e-3, **TIGHT)
        exact = jax.jit(currents)(jnp.asarray(v), jnp.asarray(G), tight)
    assert y.dtype == jnp.float32
    # Errors of the voltages, at most the tolerance each, add up along a column.
    np.testing.assert_allclose(y, exact, atol=128 * 1e-5)
    assert np.linalg.norm(y - v @ G) > 0.5 * np.linalg.norm(v @ G)


def test_ideal_wires_are_a_product():
    v, G = array(30, 20)
    with jax.enable_x64(True):
        np.testing.assert_allclose(currents(jnp.asarray(v), jnp.asarray(G), Wire()), v @ G, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("r, j", [(0, 0), (0, 4), (6, 0), (6, 4), (3, 2)])
def test_one_cell_sees_the_wire_on_its_way(r, j):
    G = np.zeros((7, 5))
    G[r, j] = 0.7
    with jax.enable_x64(True):
        wire = Wire(row_resistance=0.02, column_resistance=0.05, **TIGHT)
        y = currents(jnp.ones(7), jnp.asarray(G), wire)
    resistance = 1 / 0.7 + 0.02 * (j + 1) + 0.05 * (7 - r)
    np.testing.assert_allclose(y, np.eye(5)[j] / resistance, rtol=1e-9)


def test_an_array_and_its_transpose_are_reciprocal():
    _, G = array(8, 5)
    row, column = 0.01, 0.03
    with jax.enable_x64(True):
        turned = jnp.asarray(np.ascontiguousarray(G.T[::-1, ::-1]))
        there = jax.vmap(currents, (0, None, None))(
            jnp.eye(8), jnp.asarray(G), Wire(row_resistance=row, column_resistance=column, **TIGHT)
        )
        back = jax.vmap(currents, (0, None, None))(
            jnp.eye(5), turned, Wire(row_resistance=column, column_resistance=row, **TIGHT)
        )
        np.testing.assert_allclose(there, back.T[::-1, ::-1], rtol=1e-9, atol=1e-11)


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


def in_arrays(x: np.ndarray, W: np.ndarray, R: float) -> np.ndarray:
    """Return x W of 8-bit integers, bit by bit through differential arrays of 2-bit cells."""
    y = np.zeros((len(x), W.shape[1]))
    for low in (0, 2, 4, 6):
        for sign in (1, -1):
            G = ((np.maximum(sign * W, 0) >> low) & 3) / 3
            for j in range(7):
                u = np.sign(x) * ((np.abs(x) >> j) & 1)
                current = np.stack([relax(v.astype(float), G, R, R, 0.9, 1e-10) for v in u])
                y += sign * 2.0 ** (low + j) * 3 * current
    return y


@pytest.mark.parametrize("inputs", [1, pytest.param(4, marks=pytest.mark.long)])
@pytest.mark.parametrize("size", [16, pytest.param(128, marks=pytest.mark.nightly)])
def test_a_compiled_product_is_right_every_time(inputs, size):
    rng = np.random.default_rng(0)
    W, x = rng.integers(-127, 128, (size, size)), rng.integers(-127, 128, (inputs, size))
    W[0, 0], x[:, 0] = 127, 127  # the scales are 1
    wire = Wire(row_resistance=1e-4, column_resistance=1e-4)
    config = crossbar.CrossbarConfig(tile=crossbar.Tile(rows=size, cols=size, wire=wire))
    state = crossbar.program(jnp.asarray(W, jnp.float32), config)
    # Ten runs take longer than LLVM's optimisations, which tests leave out.
    product = jax.jit(lambda x: crossbar.matmul(x, state), compiler_options=OPTIMISED)
    one_more_axis = jax.jit(jax.vmap(lambda x: crossbar.matmul(x, state)), compiler_options=OPTIMISED)
    wanted, x = in_arrays(x, W, 1e-4), jnp.asarray(x, jnp.float32)
    for _ in range(5):
        for y in (product(x), one_more_axis(x[None])[0]):
            assert np.linalg.norm(y - wanted) < 1e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize("gamma, tolerance", [(0.9, 2e-4), (1.0, 1e-3), (0.5, 1e-10)])
def test_a_fixed_step_stops_where_cumulative_sums_do(gamma, tolerance):
    v, G = array(32, 24)
    with jax.enable_x64(True):
        wire = Wire(row_resistance=5e-4, column_resistance=1e-3, relaxation=gamma, tolerance=tolerance)
        y = currents(jnp.asarray(v), jnp.asarray(G), wire)
        np.testing.assert_allclose(y, relax(v, G, 5e-4, 1e-3, gamma, tolerance), rtol=1e-11, atol=1e-12)


def test_error_grows_with_rows():
    def loss(rows: int) -> float:
        v, G = np.ones(rows, np.float32), array(rows, 16)[1].astype(np.float32)
        y = currents(jnp.asarray(v), jnp.asarray(G), Wire(row_resistance=1e-3, column_resistance=1e-3))
        return float(np.linalg.norm(v @ G - y) / np.linalg.norm(v @ G))

    losses = [loss(rows) for rows in (8, 16, 32, 64)]
    assert losses == sorted(losses) and losses[-1] > 4 * losses[0]


def test_padding_above_changes_nothing_and_below_lengthens_the_bit_lines():
    v, G = array(10, 6)
    wire = Wire(row_resistance=1e-3, column_resistance=1e-2, **TIGHT)
    with jax.enable_x64(True):
        alone = currents(jnp.asarray(v), jnp.asarray(G), wire)
        above = currents(jnp.asarray(np.pad(v, (6, 0))), jnp.asarray(np.pad(G, ((6, 0), (0, 3)))), wire)
        below = currents(jnp.asarray(np.pad(v, (0, 6))), jnp.asarray(np.pad(G, ((0, 6), (0, 0)))), wire)
        np.testing.assert_allclose(above[:6], alone, rtol=1e-9)
        np.testing.assert_array_equal(above[6:], 0)
        assert np.abs(below - alone).max() > 1e-3


def test_no_convergence_is_nan_and_chebyshev_converges():
    v, G = np.ones(64, np.float32), np.ones((64, 64), np.float32)
    wires = {"row_resistance": 1e-2, "column_resistance": 1e-2}
    fixed = currents(jnp.asarray(v), jnp.asarray(G), Wire(relaxation=1.0, **wires))
    short = currents(jnp.asarray(v), jnp.asarray(G), Wire(iterations=2, **wires))
    assert np.isnan(fixed).all() and np.isnan(short).all()
    assert np.isfinite(currents(jnp.asarray(v), jnp.asarray(G), Wire(**wires))).all()


def test_an_input_does_not_depend_on_its_batch():
    _, G = array(16, 16)
    inputs = jnp.asarray(np.stack([array(16, 1, seed)[0] for seed in range(6)]), jnp.float32)
    G, wire = jnp.asarray(G, jnp.float32), Wire(row_resistance=1e-2, column_resistance=1e-2)
    batch = jax.vmap(lambda v: currents(v, G, wire))(inputs)
    single = jnp.stack([currents(v, G, wire) for v in inputs])
    np.testing.assert_allclose(batch, single, atol=2e-6)


def test_resistances_are_swept_by_vmap():
    v, G = (jnp.asarray(a, jnp.float32) for a in array(8, 8))
    grid = jnp.asarray([0.0, 1e-3, 1e-2])
    swept = jax.vmap(lambda R: currents(v, G, Wire(row_resistance=R, column_resistance=R)))(grid)
    for R, y in zip((0.0, 1e-3, 1e-2), swept, strict=True):
        np.testing.assert_allclose(y, currents(v, G, Wire(row_resistance=R, column_resistance=R)), atol=2e-5)


def test_nonlinear_cells_have_the_currents_of_nodal_analysis():
    v, G = array(6, 5)
    row, column, iv = 0.02, 0.03, Sinh(read_voltage=0.5)
    r, j = np.arange(1, 7), np.arange(1, 6)
    a = 0.5 / 0.25

    def residual(flat: np.ndarray) -> np.ndarray:
        V = flat.reshape(6, 5)
        current = G * np.sinh(a * V) / np.sinh(a)
        word = row * current @ np.minimum.outer(j, j)
        bit = column * (7 - np.maximum.outer(r, r)) @ current
        return (v[:, None] - word - bit - V).ravel()

    V = scipy.optimize.root(residual, np.repeat(v[:, None], 5, 1).ravel(), tol=1e-13).x.reshape(6, 5)
    with jax.enable_x64(True):
        wire = Wire(row_resistance=row, column_resistance=column, **TIGHT)
        y = currents(jnp.asarray(v), jnp.asarray(G), wire, iv)
        np.testing.assert_allclose(y, (G * np.sinh(a * V) / np.sinh(a)).sum(0), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("size", [16, 128])
def test_a_compiled_product_of_nonlinear_cells_is_right_every_time(size):
    rng = np.random.default_rng(0)
    W, x = rng.integers(-127, 128, (size, size)), rng.integers(-127, 128, (1, size))
    W[0, 0], x[:, 0] = 127, 127
    tile, device = crossbar.Tile(rows=size, cols=size), crossbar.Device(iv=Sinh(read_voltage=0.5))
    config = crossbar.CrossbarConfig(tile=tile, device=device)
    state = crossbar.program(jnp.asarray(W, jnp.float32), config)
    product = jax.jit(lambda x: crossbar.matmul(x, state))
    # One-bit inputs read at full voltage, where a cell's current is G.
    for _ in range(5):
        np.testing.assert_allclose(product(jnp.asarray(x, jnp.float32)), x @ W, rtol=1e-5, atol=1e-5 * size * 127**2)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("row_resistance", -1e-3, r"Wire.row_resistance = -0.001: give a number at least 0"),
        ("column_resistance", float("nan"), r"Wire.column_resistance = nan: give a number at least 0"),
        ("tolerance", 0.0, r"Wire.tolerance = 0.0: give a number above 0"),
        ("relaxation", 2.5, r"Wire.relaxation = 2.5: give a number above 0 and at most 2"),
        ("iterations", 0, r"Wire.iterations = 0: give the most iterations, 1 to 1,000,000"),
    ],
)
def test_bad_wires_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        Wire(**{field: value})
