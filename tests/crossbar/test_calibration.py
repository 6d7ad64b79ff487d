"""Calibration of converters: what data it looks at, the steps and ranges that it chooses, and what it reports.

`test_fuzz.py` holds ranges of drawn crossbars against the loops' sums.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossbar_strategies import ENCODINGS, product
from numpy.testing import assert_allclose
from refusals import refusals

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    CrossbarConfig,
    Device,
    Encoding,
    Tile,
    calibrated,
    matmul,
)

# Operations one by one take longer to compile than together.
program = jax.jit(crossbar.program, static_argnames=("config", "path"))
probe = jax.jit(crossbar.probe)
KEY = jax.random.key(5)
ONE = CrossbarConfig(
    cell=crossbar.Cell(bits=(7,)),
    dac=DAC(bits=8, slice_bits=None, scaling="fixed"),
    adc=ADC(bits=8),
)
REAL = Device(programming=crossbar.Proportional(0.05))
PREPARED = replace(
    ONE,
    mapping=crossbar.Mapping(scale="column", transform="hadamard"),
    dac=DAC(bits=8, slice_bits=None),
    adc=ADC(bits=4),
    tile=Tile(rows=64),
)


def normal(*shape):
    rng = np.random.default_rng((0, *shape))
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def settled(chip, x):
    for _ in "inputs", "sums":
        chip = calibrated(chip, probe(x, chip)[1])
    return chip


def prepared(weights, moments=None):
    preparation = crossbar.prepare({"w": weights}, moments, PREPARED)["w"]
    return crossbar.program(weights, PREPARED, KEY, preparation=preparation)


# Every vector counts.


def test_the_clipped_share_of_a_prepared_chip_does_not_depend_on_the_size_of_inputs():
    """With ranges of other vectors, so that many conversions are clipped; zero vectors count as nothing."""
    size = 1e6
    x = normal(64, 32)
    chip = prepared(normal(32, 8))
    chip = calibrated(chip, probe(x[:2], chip)[1])
    y, seen = probe(x, chip)
    assert seen.clip_share[0] > 0.005
    padded = jnp.concatenate([jnp.float32(size) * x, jnp.zeros((64, 32))])
    scaled, seen_of_padded = probe(padded, chip)
    assert_allclose(scaled[:64], size * y, rtol=1e-4, atol=1e-6 * size)
    assert_allclose(seen_of_padded.clip_share, seen.clip_share, rtol=1e-3)
    nothing = probe(jnp.zeros((64, 32)), chip)[1]
    assert not nothing.clip_share.any() and not nothing.histogram.any()


def test_a_sample_of_the_sums_stands_for_all():
    """Of 1.1 million conversions a million are put into bins: the counts are of all, the range of the sample."""
    x = normal(1200, 256)
    adc = ADC(bits=8, quantile=0.99)
    config = replace(ONE, dac=DAC(bits=8), adc=adc, device=REAL)
    chip = program(normal(256, 64), config, KEY)
    seen = probe(x, chip)[1]
    assert_allclose(seen.histogram.sum(), 1200 * 7 * 2 * 64, rtol=1e-5)
    share = probe(x, calibrated(chip, seen))[1].clip_share
    assert_allclose(share, 0.01, rtol=0.2)


# The steps of whole sums, and the ranges of others.


def test_ranges_of_a_prepared_chip_have_the_least_error_of_its_outputs():
    """Against every range: one of 200 vectors is massive, and a transform spreads it over all rows."""
    weights = normal(64, 16)
    x = normal(200, 64).at[0, 3].set(300)
    chip = settled(prepared(weights, jnp.mean(x**2, axis=0)), x)

    def error(octave):
        wider = replace(chip, limits=chip.limits * 2.0**octave)
        return float(jnp.sum((matmul(x, wider) - x @ weights) ** 2))

    assert np.argmin([error(octave) for octave in range(-3, 4)]) == 3


def test_chosen_bits_have_less_error_than_equal_ones_of_their_energy():
    weights = normal(200, 16)
    x = normal(64, 200)
    config = CrossbarConfig(
        mapping=crossbar.Mapping(scale="column"), adc=ADC(bits=8), device=REAL
    )
    fives = replace(config, adc=ADC(bits=((5,) * 7,) * 4))
    on_arrays = crossbar.program_tree({"w": weights}, {"w": config}, KEY)
    on_fives = crossbar.program_tree({"w": weights}, {"w": fives}, KEY)

    def run(tree, x):
        return matmul(x, tree["w"])

    def error_and_energy(chip):
        wrong = matmul(x, chip) - x @ crossbar.programmed_weights(chip)
        energy = crossbar.conversion_energy(chip.config.adc)
        conversions = crossbar.counts(chip.shape, chip.config).conversions
        return float(jnp.sum(wrong**2)), conversions * energy.typical

    def calibrated_at(tradeoff, sensitivity=1.0):
        return crossbar.calibrate_tree(
            run, on_arrays, [x], tradeoff=tradeoff, sensitivities={"w": sensitivity}
        )["w"]

    chip = calibrated_at(1e6)
    table = chip.config.adc.bits
    assert table[0][0] == 0 and table[3][6] == 2 * table[3][0] == 8
    error, energy = error_and_energy(chip)
    five = replace(on_fives["w"], limits=chip.limits)
    error_of_five, energy_of_five = error_and_energy(five)
    assert energy < energy_of_five and error < 0.1 * error_of_five
    assert calibrated_at(1e5, sensitivity=10.0).config == chip.config
    assert error_and_energy(calibrated_at(1e5))[1] < energy
    with pytest.raises(ValueError, match="tradeoff = 1 is worth no conversion"):
        calibrated_at(1.0)


def test_calibrated_ranges_cover_flipped_columns_whose_cells_exceed_their_targets():
    """All cells at Gmax where half of it is the target of a flipped column: the range is what the sums reach."""
    config = CrossbarConfig(
        encoding=ENCODINGS["flip"],
        dac=DAC(signed=False, scaling="fixed"),
        adc=ADC(bits=8, quantile=1.0),
    )
    cells = program(normal(40, 6), config, path="definition").cells
    chip = program(normal(40, 6), config, conductances=jnp.ones_like(cells))
    chip = settled(chip, jnp.ones((2, 40)))
    assert_allclose(chip.limits[0, :, 1], 40, rtol=1e-3)


# Full scale of the inputs.


def of_inputs(x, *, signed=True):
    dac = DAC(signed=signed, scaling="calibrated", quantile=1.0)
    encoding = Encoding() if signed else Encoding(kind="offset")
    chip = program(normal(x.shape[-1], 6), CrossbarConfig(encoding=encoding, dac=dac))
    return calibrated(chip, probe(x, chip)[1])


def test_the_range_of_inputs_is_of_those_that_the_dac_can_pass():
    """Not of negative ones where it is unsigned, which count as clipped; 1 where all are zero."""
    x = normal(8, 40)
    x = jnp.where(x < 0, -8.0, x / jnp.max(x))
    assert_allclose(of_inputs(x).input_limit, 8, rtol=0.02)
    unsigned = of_inputs(x, signed=False)
    assert_allclose(unsigned.input_limit, 1, rtol=0.02)
    share = probe(x, unsigned)[1].clip_share_of_inputs
    assert float(share) == pytest.approx(float(np.mean(np.asarray(x) < 0)))
    assert_allclose(of_inputs(0 * x).input_limit, 1, rtol=0.02)


def calibrate_head(batches, run=lambda weights, x: product(x, weights["head"])):
    config = CrossbarConfig(adc=ADC(bits=6))
    chips = crossbar.program_tree({"head": normal(40, 6)}, {"*": config}, KEY)
    crossbar.calibrate_tree(run, chips, batches)


def calibrate_on_nothing():
    chip = program(normal(40, 6), ONE)
    seen = probe(normal(8, 40), chip)[1]
    calibrated(chip, jax.tree.map(jnp.zeros_like, seen))


test_data_without_a_range_is_refused = refusals([
    (calibrate_on_nothing, "calibration saw no conversion: probe the arrays"),
    (lambda: calibrate_head([]), "there are no batches"),
    (
        lambda: calibrate_head([normal(8, 40)], lambda weights, x: x),
        "head was read by none of the batches",
    ),
    (
        lambda: calibrate_head([normal(8, 40).at[3, 2].set(np.nan)]),
        "inputs or outputs of head are NaN or infinite: give batches whose",
    ),
])  # fmt: skip
