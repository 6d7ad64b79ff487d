"""Calibration of converters: what data it looks at, the steps and ranges that it chooses, and what it reports."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    CrossbarConfig,
    Device,
    Encoding,
    calibrated,
    matmul,
)

# Operations one by one take longer to compile than together.
program = jax.jit(crossbar.program, static_argnames=("config", "path"))
probe = jax.jit(crossbar.probe)
KEY = jax.random.key(5)
_UNIT = Encoding(kind="offset", unit_column=True)
FLIP = dataclasses.replace(_UNIT, flip=True)
ONE = CrossbarConfig(
    cell=crossbar.Cell(bits=(7,)),
    dac=DAC(bits=8, slice_bits=None, scaling="fixed"),
    adc=ADC(bits=8),
)
REAL = dataclasses.replace(ONE, device=Device(programming=crossbar.Proportional(0.05)))


def normal(*shape, seed=0):
    return jnp.asarray(
        np.random.default_rng((seed, *shape)).normal(size=shape), jnp.float32
    )


def settled(chip, x):
    chip = calibrated(chip, probe(x, chip)[1])
    return (
        chip
        if chip.limits is not None or chip.config.adc is None
        else calibrated(chip, probe(x, chip)[1])
    )


# Every vector counts.


def test_clipped_conversions_of_all_vectors_are_counted():
    """Ranges of small vectors clip most conversions of the last ten, which are large."""
    vectors = 5000
    weights = normal(40, 6)
    x = (0.01 * normal(vectors, 40)).at[-10:].multiply(60)
    chip = settled(program(weights, ONE), x[:-10])
    share = float(probe(x, chip)[1].clip_share[0])
    of_last = float(probe(x[-10:], chip)[1].clip_share[0])
    assert of_last > 0.5
    np.testing.assert_allclose(share, of_last * 10 / vectors, atol=1e-3, rtol=0.05)


PREPARED = dataclasses.replace(
    ONE,
    mapping=crossbar.Mapping(scale="column", transform="hadamard"),
    dac=DAC(bits=8, slice_bits=None),
    adc=ADC(bits=4),
)


def prepared_chip(weights, config):
    preparation = crossbar.prepare({"w": weights}, None, config)["w"]
    return crossbar.program(weights, config, KEY, preparation=preparation)


@pytest.mark.parametrize("size", [1e-12, 1e-4, 1e6])
def test_clipped_share_of_a_prepared_chip_does_not_depend_on_the_size_of_inputs(size):
    """Read with ADC ranges of other vectors, so that many conversions are clipped; zero vectors count as nothing."""
    x = normal(64, 32)
    chip = prepared_chip(normal(32, 8), PREPARED)
    chip = calibrated(chip, probe(x[:2], chip)[1])
    share = float(probe(x, chip)[1].clip_share[0])
    assert share > 0.005
    padded = jnp.concatenate([jnp.float32(size) * x, jnp.zeros((64, 32))])
    seen = probe(padded, chip)[1]
    np.testing.assert_allclose(seen.clip_share[0], share, rtol=1e-3)
    nothing = probe(jnp.zeros((64, 32)), chip)[1]
    assert not nothing.clip_share.any() and not nothing.histogram.any()
    assert calibrated(chip, nothing).limits is not None


def test_a_sample_of_the_sums_stands_for_all():
    """Of 1.1 million conversions a million are put into bins: the counts are of all, the range of the sample."""
    x = normal(1200, 256)
    chip = program(
        normal(256, 64),
        dataclasses.replace(REAL, dac=DAC(bits=8), adc=ADC(bits=8, quantile=0.99)),
        KEY,
    )
    seen = probe(x, chip)[1]
    np.testing.assert_allclose(seen.histogram.sum(), 1200 * 7 * 2 * 64, rtol=1e-5)
    share = probe(x, calibrated(chip, seen))[1].clip_share
    np.testing.assert_allclose(share, 0.01, rtol=0.2)


# The steps of whole sums, and the ranges of others.


def test_ranges_of_a_prepared_chip_have_the_least_error_of_its_outputs():
    """Against every range: one of 200 vectors is massive, and a transform spreads it over all rows."""
    config = dataclasses.replace(PREPARED, tile=crossbar.Tile(rows=64))
    weights = normal(64, 16)
    x = normal(200, 64).at[0, 3].set(300)
    preparation = crossbar.prepare({"w": weights}, jnp.mean(x**2, axis=0), config)["w"]
    chip = settled(crossbar.program(weights, config, preparation=preparation), x)

    def error(limits):
        return float(
            jnp.sum(
                (matmul(x, dataclasses.replace(chip, limits=limits)) - x @ weights) ** 2
            )
        )

    errors = [error(chip.limits * 2.0**octave) for octave in range(-3, 4)]
    assert np.argmin(errors) == 3


def test_ranges_of_real_sums_follow_them_however_small_they_are():
    """Their quantile, to a bin, where the worst case is far larger; zeros have no part in it."""
    weights = normal(4096, 8).at[3, 2].set(60)
    x = normal(32, 4096).at[:, 3].set(0).at[5, 7].set(50)
    x = jnp.concatenate([x, jnp.zeros((3000, 4096))])
    adc = ADC(bits=8, quantile=0.9)
    config = dataclasses.replace(
        REAL, dac=DAC(bits=8, slice_bits=None), adc=adc, tile=crossbar.Tile(rows=None)
    )
    chip = settled(program(weights, config, KEY), x)
    codes = np.rint(
        np.asarray(x[:32]) / np.abs(x[:32]).max(axis=1, keepdims=True) * 127
    )
    sums = np.abs(codes @ np.asarray(chip.codes, float)) / 127**2
    assert (
        1
        <= float(chip.limits.max()) / np.quantile(sums, 0.9, method="inverted_cdf")
        < 1.012
    )


def test_a_slice_that_meets_only_zeros_has_a_range():
    config = CrossbarConfig(
        adc=ADC(bits=8), device=Device(programming=crossbar.Proportional(0.05))
    )
    chip = program(0.01 * jnp.abs(normal(40, 6)).at[0, 0].set(100), config, KEY)
    x = normal(50, 40).at[:, 0].set(0)
    limits = settled(chip, x).limits
    assert (
        np.isfinite(limits).all()
        and float(limits.max() / limits[..., 1].min()) <= 2**10
    )


def test_calibrated_ranges_cover_flipped_columns_whose_cells_exceed_their_targets():
    """All cells at Gmax where half of it is the target of a flipped column: the range is what the sums reach."""
    config = CrossbarConfig(
        encoding=FLIP,
        dac=DAC(signed=False, scaling="fixed"),
        adc=ADC(bits=8, quantile=1.0),
    )
    weights = normal(40, 6)
    cells = program(weights, config, path="definition").cells
    state = program(weights, config, conductances=jnp.ones_like(cells))
    x = jnp.ones((2, 40), jnp.float32)
    state = settled(state, x)
    np.testing.assert_allclose(state.limits[0, :, 1], 40, rtol=1e-3)
    assert float(jnp.max(probe(x, state)[1].clip_share)) == 0


# Full scale of the inputs.


def of_inputs(x, **fields):
    config = CrossbarConfig(dac=DAC(scaling="calibrated", **fields))
    chip = program(normal(x.shape[-1], 6), config)
    return settled(chip, x)


@pytest.mark.parametrize("exponent", [-120, 120])
def test_full_scale_covers_inputs_of_any_size(exponent):
    x = normal(20, 30) * jnp.float32(2.0**exponent)
    chip = of_inputs(x, quantile=1.0)
    assert 1 <= float(chip.input_limit) / float(jnp.abs(x).max()) < 1.02


@pytest.mark.parametrize(
    ("signed", "low", "wanted"),
    [(True, -8.0, 8.0), (False, -8.0, 1.0), (True, 0.0, 1.0)],
)
def test_the_range_of_inputs_is_of_those_that_the_dac_can_pass(signed, low, wanted):
    """Not of negative ones where it is unsigned; and 1 where all are zero, as for each input vector."""
    x = normal(8, 40)
    x = jnp.where(x < 0, low, x / jnp.max(x)) if low else jnp.zeros_like(x)
    encoding = Encoding() if signed else Encoding(kind="offset")
    config = CrossbarConfig(
        encoding=encoding, dac=DAC(signed=signed, scaling="calibrated", quantile=1.0)
    )
    np.testing.assert_allclose(
        settled(program(normal(40, 6), config), x).input_limit, wanted, rtol=0.02
    )


def test_inputs_that_are_nan_are_refused():
    x = normal(8, 40).at[3, 2].set(np.nan)
    chip = crossbar.program_tree(
        {"head": normal(40, 6)}, {"*": CrossbarConfig(adc=ADC(bits=6))}, KEY
    )
    run = lambda weights, x: matmul(x, weights["head"])  # noqa: E731
    seen = crossbar.observe(run, chip, [x])
    for refused in (
        lambda: crossbar.calibrate_tree(run, chip, [x]),
        lambda: crossbar.site_errors(chip, seen),
    ):
        with pytest.raises(
            ValueError,
            match="inputs or outputs of head are NaN or infinite: give batches whose",
        ):
            refused()


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_inputs_of_a_prepared_chip_whose_squares_leave_float32_are_refused(size):
    chip = prepared_chip(normal(32, 8), PREPARED)
    with pytest.raises(
        ValueError, match="prepared inputs of the chip are below .* scale them"
    ):
        calibrated(chip, probe(jnp.float32(size) * normal(4, 32), chip)[1])


@pytest.mark.parametrize("size", [np.inf, 1e-50])
def test_inputs_without_a_full_scale_are_refused(size):
    with jax.enable_x64(True):
        x = jnp.full((3, 4), size)
        chip = program(jnp.ones((4, 2)), CrossbarConfig(dac=DAC(scaling="calibrated")))
        with pytest.raises(
            ValueError,
            match="inputs are below 2.-128, above 2.128 or infinite: scale them",
        ):
            calibrated(chip, probe(x, chip)[1])


@pytest.mark.parametrize(
    "encoding", [pytest.param(Encoding(), marks=pytest.mark.long), _UNIT]
)
def test_the_statistics_are_those_of_every_conversion(encoding):
    """Tiles of unequal height, in groups that do not divide the batch."""
    config = CrossbarConfig(
        cell=crossbar.Cell(bits=(4, 4)),
        encoding=encoding,
        mapping=crossbar.Mapping(weight_bits=8),
        dac=DAC(bits=4, slice_bits=None, scaling="fixed"),
        adc=ADC(bits=6),
        tile=crossbar.Tile(rows=10, partition="full"),
        device=Device(programming=crossbar.Independent(0.02)),
    )
    weights = normal(25, 7)
    x = jnp.clip(normal(11, 25), -1, 1)
    ways = [
        probe(x, program(weights, config, KEY, path=each))[1]
        for each in ("loop", "definition")
    ]
    for one, other in zip(*map(jax.tree.leaves, ways), strict=True):
        np.testing.assert_allclose(
            np.atleast_1d(one).sum(-1), np.atleast_1d(other).sum(-1), rtol=1e-3
        )
    columns = 7 + encoding.unit_column
    assert ways[0].histogram.sum(axis=-1).tolist() == [11 * 3 * columns] * 2
    assert float(ways[0].inputs.sum()) == 11 * 25


def test_negative_inputs_of_an_unsigned_dac_are_counted():
    config = CrossbarConfig(dac=DAC(signed=False))
    x = normal(8, 40)
    seen = probe(x, program(normal(40, 6), config))[1]
    assert float(seen.clip_share_of_inputs) == pytest.approx(
        float(np.mean(np.asarray(x) < 0))
    )
