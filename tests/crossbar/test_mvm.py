"""Reads besides their numbers: configurations as arguments, one product, measured cells, and the range of floats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossbar_strategies import ENCODINGS, problem

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    CrossbarConfig,
    Tile,
    calibrated,
    matmul,
    probe,
    program,
    programmed_weights,
)


@pytest.mark.parametrize(
    "config",
    [
        CrossbarConfig(adc=ADC(bits=10), tile=Tile(rows=10)),
        CrossbarConfig(
            cell=crossbar.Cell(on_off_ratio=jnp.float32(50.0)),
            adc=ADC(bits=10, quantile=1.0),
        ),
    ],
    ids=["tiles", "a ratio"],
)
def test_a_calibrated_chip_that_became_one_product_is_calibrated_again_and_read_inside_a_jit(
    config,
):
    W, x = problem()
    chip = program(W, config)
    chip = calibrated(chip, probe(x, chip)[1])
    assert chip.plan.path == "product"
    again = calibrated(chip, probe(2 * x, chip)[1])
    np.testing.assert_array_equal(matmul(x, again), matmul(x, chip))
    np.testing.assert_allclose(
        jax.jit(lambda x: matmul(x, chip))(x), matmul(x, chip), rtol=1e-6, atol=1e-6
    )


def test_granular_steps_of_whole_sums_warn_where_they_clip():
    W, x = problem(128, 9, 16)
    wide = CrossbarConfig(adc=ADC(bits=14, range="granular", convert="sum"))
    narrow = CrossbarConfig(adc=ADC(bits=8, range="granular", convert="sum"))
    clipped = probe(x, program(W, wide))[1].clip_share
    assert clipped.max() < 0.02
    with pytest.warns(
        UserWarning,
        match=r"'granular' with convert='sum' covers 127 levels .* usually 1,437, .* clip:",
    ):
        state = program(W, narrow)
    assert probe(x, state)[1].clip_share.max() > 0.4


def test_ranges_that_lose_bits_do_not_pass_for_lossless_ones():
    """A lossless ADC leaves one product behind, which cannot clip: refused, and NaN where a program cannot refuse."""
    weights, x = problem()
    config = CrossbarConfig(adc=ADC(bits=9, range="granular"))
    state = program(weights, config)
    assert state.plan.path == "product"
    narrow = dataclasses.replace(state, limits=state.limits / 8)
    with pytest.raises(ValueError, match="chip.limits lose bits, .* path='loop'"):
        matmul(x, narrow)
    assert jnp.isnan(
        jax.jit(lambda limits: matmul(x, dataclasses.replace(state, limits=limits)))(
            narrow.limits
        )
    ).all()
    y = matmul(x, program(weights, config, path="loop"))
    np.testing.assert_allclose(
        matmul(x, state), y, rtol=0, atol=1e-5 * float(jnp.abs(y).max())
    )


@pytest.mark.parametrize("name", ["two-sided", "unit column"])
def test_measured_conductances_are_read_like_those_that_are_modelled(name):
    """Every cell's own target, read back, is the same chip; a measured error is W's."""
    config = CrossbarConfig(
        cell=crossbar.Cell(on_off_ratio=8.0),
        encoding=ENCODINGS[name],
        tile=Tile(rows=10, cols=5),
    )
    W, x = problem()
    perfect = program(W, config, path="definition")
    tops = np.asarray(perfect.geometry.levels).reshape(-1, 1, 1, 1, 1, 1)
    G = 1 / 8 + np.asarray(perfect.cells) / tops * (7 / 8)
    again = program(W, config, conductances=jnp.asarray(G, jnp.float32))
    np.testing.assert_allclose(again.codes, perfect.codes, rtol=0, atol=1e-3)
    np.testing.assert_allclose(matmul(x, again), matmul(x, perfect), rtol=0, atol=1e-4)
    rng = np.random.default_rng(0)
    measured = jnp.asarray(
        np.maximum(G + rng.normal(scale=0.02, size=G.shape), 0), jnp.float32
    )
    state = program(W, config, conductances=measured)
    n = np.rint(
        np.asarray(x, float) / np.abs(np.asarray(x)).max(1, keepdims=True) * 127
    )
    wanted = (
        n
        * np.abs(np.asarray(x)).max(1, keepdims=True)
        / 127
        @ np.asarray(programmed_weights(state))
    )
    for path in ("product", "definition"):
        y = matmul(x, program(W, config, conductances=measured, path=path))
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-3)
    assert np.abs(wanted - x @ W).max() > 0.01


@pytest.mark.parametrize("largest", [1e-40, 1e-37])
def test_weights_whose_code_would_underflow_have_fewer_codes(largest):
    """Each is right to the smallest normal number; smaller ones are zeros for XLA itself."""
    weights, x = problem()
    weights = weights.at[:, 2].set(largest * jnp.linspace(-1, 1, 30))
    chip = program(
        weights, CrossbarConfig(dac=None, mapping=crossbar.Mapping(scale="column"))
    )
    np.testing.assert_allclose(
        programmed_weights(chip)[:, 2], weights[:, 2], rtol=0, atol=1.2e-38
    )
    large = 1e30 * x
    wanted = np.asarray(large, float) @ np.asarray(programmed_weights(chip), float)
    np.testing.assert_allclose(
        matmul(large, chip)[:, 2], wanted[:, 2], rtol=1e-4, atol=1e-6 * largest * 1e30
    )
    assert (largest < 1e-38) == (not matmul(large, chip)[:, 2].any())


@pytest.mark.parametrize(
    "config",
    [
        CrossbarConfig(),
        CrossbarConfig(
            dac=None, mapping=crossbar.Mapping(scale="tile"), tile=Tile(rows=16)
        ),
        CrossbarConfig(
            adc=ADC(bits=8, range="max"), mapping=crossbar.Mapping(scale="column")
        ),
    ],
    ids=["product", "tiles", "columns"],
)
def test_only_results_out_of_range_are_lost(config):
    """Powers of two on weights and inputs change no bit of a result but its exponent."""
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.uniform(0.1, 1, (64, 9)), jnp.float32)
    x = jnp.asarray(rng.uniform(0.1, 1, (4, 64)), jnp.float32)
    read = jax.jit(lambda W, x: matmul(x, program(W, config)))
    wanted = np.asarray(read(weights, x), float)
    for of_weights, of_inputs in ((1, -120), (118, -40), (-90, 100)):
        found = read(
            weights * jnp.float32(2.0**of_weights), x * jnp.float32(2.0**of_inputs)
        )
        np.testing.assert_array_equal(
            np.asarray(found, float), wanted * 2.0 ** (of_weights + of_inputs)
        )
