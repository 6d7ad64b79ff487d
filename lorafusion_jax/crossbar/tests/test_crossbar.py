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

_WEIGHTS, _X = (jax.random.normal(jax.random.key(0), shape) for shape in ((40, 6), (3, 40)))


def test_an_ideal_crossbar_is_a_matrix_product():
    np.testing.assert_allclose(matmul(_X, program(_WEIGHTS, PRESETS["ideal"])), _X @ _WEIGHTS, rtol=1e-4, atol=1e-4)


def test_a_calibrated_adc_is_read_and_saved(tmp_path):
    placed = program_tree(
        {"a": _WEIGHTS, "b": _WEIGHTS}, {"a": CrossbarConfig(adc=ADC()), "b": None}, jax.random.key(0)
    )
    chip = calibrated(placed["a"], probe(_X, placed["a"])[1])
    y, ideal = matmul(_X, chip), _X @ placed["b"]
    assert 0 < np.linalg.norm(y - ideal) / np.linalg.norm(ideal) < 0.1
    save_chip(chip, tmp_path / "chip.npz")
    np.testing.assert_array_equal(matmul(_X, load_chip(tmp_path / "chip.npz")), y)


def test_read_noise_needs_a_key_and_follows_it():
    chip = program(_WEIGHTS, CrossbarConfig(device=Device(read_noise=ReadNoise(0.05))))
    with pytest.raises(ValueError, match="give it a key"):
        matmul(_X, chip)
    one, again, other = (matmul(_X, with_read_key(chip, jax.random.key(n))) for n in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert float(abs(one - other).max()) > 0


def test_a_flax_model_goes_onto_arrays_in_one_call():
    nnx = pytest.importorskip("flax.nnx")
    from ..flax import calibrate, convert

    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(40, 5, rngs=rngs), nnx.relu, nnx.Linear(5, 3, rngs=rngs))
    np.testing.assert_allclose(convert(model, {"*": PRESETS["ideal"]}, jax.random.key(1))(_X), model(_X), atol=1e-5)
    on_arrays = convert(model, {"layers.2": None, "*": CrossbarConfig(adc=ADC(bits=6))}, jax.random.key(1))
    assert 0 < np.abs(calibrate(on_arrays, [_X])(_X) - model(_X)).max() < 1
