"""IR drop against a nodal analysis of the same circuit, and its limits."""

import dataclasses

import crossbar_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.crossbar import (
    PRESETS,
    CrossbarConfig,
    Device,
    Sinh,
    Tile,
    Wire,
    matmul,
    program,
)

TIGHT = {"tolerance": 1e-13, "iterations": 2000}


def one_array(wire: Wire) -> CrossbarConfig:
    """Return an array as large as its matrix, whose largest conductance is 1, without converters."""
    return dataclasses.replace(
        PRESETS["ideal"], tile=Tile(rows=None, cols=None, wire=wire)
    )


def currents(v, G, wire: Wire) -> jax.Array:
    """Return the currents of all columns of one array."""
    return jax.jit(lambda v, G: matmul(v[None], program(G, one_array(wire)))[0])(
        jnp.asarray(v), jnp.asarray(G)
    )


def array(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    v = rng.integers(-1, 2, rows).astype(float)
    G = rng.random((rows, cols))
    v[0] = 1
    G[0, 0] = 1
    return v, G


@pytest.mark.parametrize(
    "shape, row, column",
    [
        ((12, 9), 1e-4, 3e-4),
        ((5, 14), 0.5, 0.3),
        ((12, 9), 0.5, 0.3),
        ((1, 1), 0.5, 0.3),
    ],
)
def test_currents_are_those_of_nodal_analysis(shape, row, column):
    v, G = array(*shape)
    wire = Wire(row_resistance=row, column_resistance=column, **TIGHT)
    with jax.enable_x64(True):
        y = currents(v, G, wire)
    np.testing.assert_allclose(
        y, crossbar_oracle.nodal(v, G, one_array(wire)), rtol=1e-8, atol=1e-10
    )


def test_no_convergence_is_nan_and_chebyshev_converges():
    v = jnp.ones(32)
    G = jnp.ones((32, 32))
    assert jnp.isnan(
        currents(
            v,
            G,
            Wire(
                relaxation=1.0,
                iterations=100,
                row_resistance=4e-2,
                column_resistance=4e-2,
            ),
        )
    ).all()
    assert jnp.isnan(
        currents(v, G, Wire(iterations=2, row_resistance=4e-2, column_resistance=4e-2))
    ).all()
    assert jnp.isfinite(
        currents(v, G, Wire(row_resistance=4e-2, column_resistance=4e-2))
    ).all()


@pytest.mark.parametrize(
    "iv",
    [pytest.param(None, marks=pytest.mark.long), Sinh(read_voltage=0.5)],
    ids=["linear", "nonlinear"],
)
def test_a_compiled_product_is_right_every_time(iv):
    """Loops within a compiled product, run again and again, and with one more axis."""
    rng = np.random.default_rng(0)
    W = rng.normal(size=(16, 16)).astype(np.float32)
    x = rng.normal(size=(1, 16)).astype(np.float32)
    wire = Wire(row_resistance=1e-4, column_resistance=1e-4)
    config = CrossbarConfig(
        tile=Tile(rows=16, cols=16, wire=wire), device=Device(iv=iv)
    )
    wanted = crossbar_oracle.read(crossbar_oracle.program(W, config), x, config).y
    chip = program(jnp.asarray(W), config)
    x = jnp.asarray(x)
    product = jax.jit(lambda x: matmul(x, chip))
    one_more_axis = jax.jit(jax.vmap(lambda x: matmul(x, chip)))
    for _ in range(5):
        for y in (product(x), one_more_axis(x[None])[0]):
            assert np.linalg.norm(y - wanted) < 1e-4 * np.linalg.norm(wanted)
