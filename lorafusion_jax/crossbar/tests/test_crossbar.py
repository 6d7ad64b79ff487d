"""Short tests that travel with this folder: they import it relatively, under whatever name it has."""

import jax
import numpy as np
import pytest

from .. import (
    ADC,
    PRESETS,
    CrossbarConfig,
    Device,
    ReadNoise,
    calibrated,
    load_chip,
    matmul,
    probe,
    program,
    program_tree,
    save_chip,
    with_read_key,
)


@pytest.fixture
def weights():
    return jax.random.normal(jax.random.key(0), (40, 6))


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (3, 40))


def test_an_ideal_crossbar_is_a_matrix_product(weights, x):
    np.testing.assert_allclose(matmul(x, program(weights, PRESETS["ideal"])), x @ weights, rtol=1e-4, atol=1e-4)


def test_a_calibrated_adc_is_read_and_saved(weights, x, tmp_path):
    placed = program_tree({"a": weights, "b": weights}, {"a": CrossbarConfig(adc=ADC()), "b": None}, jax.random.key(0))
    chip = calibrated(placed["a"], probe(x, placed["a"])[1])
    y, ideal = matmul(x, chip), x @ placed["b"]
    assert 0 < np.linalg.norm(y - ideal) / np.linalg.norm(ideal) < 0.1
    save_chip(chip, tmp_path / "chip.npz")
    np.testing.assert_array_equal(matmul(x, load_chip(tmp_path / "chip.npz")), y)


def test_read_noise_needs_a_key_and_follows_it(weights, x):
    chip = program(weights, CrossbarConfig(device=Device(read_noise=ReadNoise(0.05))))
    with pytest.raises(ValueError, match="give it a key"):
        matmul(x, chip)
    one, again, other = (matmul(x, with_read_key(chip, jax.random.key(n))) for n in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert float(abs(one - other).max()) > 0


def test_a_flax_model_goes_onto_arrays_in_one_call(x):
    nnx = pytest.importorskip("flax.nnx")
    from ..flax import calibrate, convert

    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(40, 5, rngs=rngs), nnx.relu, nnx.Linear(5, 3, rngs=rngs))
    np.testing.assert_allclose(convert(model, {"*": PRESETS["ideal"]}, jax.random.key(1))(x), model(x), atol=1e-5)
    on_arrays = convert(model, {"layers.2": None, "*": CrossbarConfig(adc=ADC(bits=6))}, jax.random.key(1))
    assert 0 < np.abs(calibrate(on_arrays, [x])(x) - model(x)).max() < 1
