"""Short tests that travel with this folder: they import it relatively, under whatever name it has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .. import (
    ADC,
    PRESETS,
    CrossbarConfig,
    Device,
    Independent,
    ReadNoise,
    calibrated,
    explain,
    load_chip,
    matmul,
    probe,
    program,
    program_tree,
    save_chip,
    with_config,
    with_read_key,
)


def _problem() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(40, 6)), jnp.float32), jnp.asarray(rng.normal(size=(3, 40)), jnp.float32)


def test_an_ideal_crossbar_is_a_matrix_product():
    weights, x = _problem()
    chip = program(weights, PRESETS["ideal"])
    np.testing.assert_allclose(matmul(x, chip), np.asarray(x) @ np.asarray(weights), rtol=1e-4, atol=1e-4)


def test_a_calibrated_adc_is_read_and_saved(tmp_path):
    weights, x = _problem()
    chip = program(weights, CrossbarConfig(adc=ADC(bits=8)))
    chip = calibrated(chip, probe(x, chip)[1])
    y = matmul(x, chip)
    assert float(jnp.linalg.norm(y - x @ weights) / jnp.linalg.norm(x @ weights)) < 0.1
    save_chip(chip, tmp_path / "chip.npz")
    np.testing.assert_array_equal(matmul(x, load_chip(tmp_path / "chip.npz")), y)


def test_read_noise_needs_a_key_and_follows_it():
    weights, x = _problem()
    config = CrossbarConfig(device=Device(read_noise=ReadNoise(0.05)))
    chip = program(weights, config)
    with pytest.raises(ValueError, match="give it a key"):
        matmul(x, chip)
    one, again, other = (matmul(x, with_read_key(chip, jax.random.key(n))) for n in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert float(jnp.abs(one - other).max()) > 0
    quiet = dataclasses.replace(config, device=Device(read_noise=ReadNoise(0.0)))
    still = matmul(x, with_read_key(with_config(chip, quiet), jax.random.key(1)))
    assert float(jnp.abs(one - still).max()) > 0


def test_a_tree_of_weights_is_put_on_arrays_by_rules():
    weights, x = _problem()
    noisy = CrossbarConfig(device=Device(programming=Independent(0.05)))
    placed = program_tree({"a": weights, "b": weights}, {"a": noisy, "b": None}, jax.random.key(0))
    assert placed["b"] is weights
    assert float(jnp.abs(matmul(x, placed["a"]) - x @ weights).max()) > 0
    assert explain(placed["a"]).path == "product"
