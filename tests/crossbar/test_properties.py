"""What holds for every crossbar, by hypothesis, against NumPy and among configurations that must agree."""

import dataclasses

import crossbar_oracle
import crossbar_problems
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossbar_strategies import ENCODINGS
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    Cell,
    CrossbarConfig,
    Geometry,
    Mapping,
    Tile,
    calibrated,
    matmul,
    probe,
    program,
)

few = settings(max_examples=4, phases=[Phase.generate])
seeds = st.integers(0, 2**16)

UNFLIPPED = tuple(name for name in ENCODINGS if name != "flip")
SUBTRACTED = ("differential", "two-sided")  # column sums are integers at any on/off ratio
SLICINGS = [(2, 2, 2, 2), (1,) * 8, (4, 4), (2, 2, 4), (8,), (3, 3, 2)]


def choices(encodings=tuple(ENCODINGS)):
    """Draw what `crossbar` takes. (Run-time type checks call `random`, which a strategy must not.)"""
    return st.fixed_dictionaries(
        {
            "encoding": st.sampled_from(encodings),
            "cells": st.sampled_from(SLICINGS),
            "ratio": st.sampled_from([None, 10.0]),
            "scale": st.sampled_from(["matrix", "tile", "column"]),
            "rows": st.sampled_from([None, 10, 13]),
            "cols": st.sampled_from([None, 5]),
            "partition": st.sampled_from(["equal", "full"]),
            "bits": st.sampled_from([4, 8]),
            "slice_bits": st.sampled_from([None, 1, 2, 3]),
            "signed": st.booleans(),
            "scaling": st.sampled_from(["fixed", "row"]),
        }
    )


def crossbar(choice, **changes):
    """Return a quantised crossbar without an ADC, of up to 3 x 2 arrays in the 30 x 9 matrices of `problem`."""
    c = {**choice, **changes}
    return CrossbarConfig(
        cell=Cell(bits=c["cells"], on_off_ratio=c["ratio"]),
        encoding=ENCODINGS[c["encoding"]],
        mapping=Mapping(scale=c["scale"]),
        tile=Tile(rows=c["rows"], cols=c["cols"], partition=c["partition"]),
        dac=DAC(bits=c["bits"], slice_bits=c["slice_bits"], signed=c["signed"], scaling=c["scaling"]),
    )


UNTILED = st.sampled_from(["matrix", "column"])


def problem(seed, config, d_in=30, d_out=9, batch=3):
    W, x = crossbar_problems.problem(d_in, d_out, batch, seed=seed)
    return W, x if config.signed_inputs else jnp.abs(x)


def converting(config, bits=6, clip=0.4, **others):
    """Return the crossbar with an ADC whose steps are the same power of two of a level in every slice."""
    pulse = Geometry.of((30, 9), config).pulse
    lsb = 2.0 ** np.floor(np.log2(max(1.0, clip * 13 * pulse * 3 / 2 ** (bits - 1))))
    adc = ADC(bits=bits, range="max", **others)
    signed = dataclasses.replace(config, adc=adc).signed_sums
    top = lsb * (2 ** (bits - 1) - 1 if signed else 2**bits - 1)
    g_min = 0.0 if config.cell.on_off_ratio is None else 1 / config.cell.on_off_ratio
    limits = [(1 - g_min) * top / (pulse * (2**p - 1)) for p in config.weight_slices]
    given = tuple((-a if signed else 0.0, a) for a in limits)
    return dataclasses.replace(config, adc=dataclasses.replace(adc, range="given", limits=given))


def product(W, x, config, path="definition"):
    return np.asarray(jax.jit(lambda W, x: matmul(x, program(W, config, path=path)))(W, x))


def assert_same_codes(y, wanted):
    """Equal but for the last bits: one code of the converter is worth a thousand times as much."""
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@given(st.integers(1, 300), st.integers(1, 40), st.sampled_from(["equal", "full"]))
def test_no_part_of_an_axis_is_larger_than_an_array(size, limit, how):
    parts = Geometry.of((size, 1), CrossbarConfig(tile=Tile(rows=limit, partition=how))).rows
    assert sum(parts) == size and len(parts) == -(-size // limit)
    assert len(set(parts[:-1])) <= 1 and 0 < min(parts) and max(parts) <= limit
    assert how == "equal" or all(part == limit for part in parts[:-1])


@few
@given(choices(), seeds)
def test_without_an_adc_only_rounding_is_lost(choice, seed):
    config = crossbar(choice, partition="full")
    W, x = problem(seed, config)
    W, x = np.asarray(W), np.asarray(x)
    wanted = crossbar_oracle.read(crossbar_oracle.program(W, config), x, config, None).y
    for path in ("product", "definition"):
        np.testing.assert_allclose(product(W, x, config, path), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@few
@given(
    st.sampled_from(UNFLIPPED),
    st.sampled_from([None, 10, 13]),
    st.sampled_from([None, 4.5]),
    seeds,
)
def test_infinite_precision_is_the_product(encoding, rows, ratio, seed):
    config = CrossbarConfig(
        cell=Cell(bits=None, on_off_ratio=ratio),
        encoding=ENCODINGS[encoding],
        mapping=Mapping(weight_bits=None),
        tile=Tile(rows=rows, cols=5),
        dac=None,
    )
    W, x = problem(seed, config)
    wanted = np.asarray(x, float) @ np.asarray(W, float)
    for path in ("product", "definition"):
        np.testing.assert_allclose(product(W, x, config, path), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@few
@given(choices(), st.sampled_from(SLICINGS), st.sampled_from([None, 1, 2, 3]), seeds)
def test_slices_agree_pairwise(choice, cells, slice_bits, seed):
    config, other = crossbar(choice), crossbar(choice, cells=cells, slice_bits=slice_bits)
    W, x = problem(seed, config)
    one, two = (product(W, x, each, "definition") for each in (config, other))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * np.abs(one).max())


@pytest.mark.long
@few
@given(choices(), st.sampled_from([3, 4]), st.sampled_from([0.9, 0.99, 1.0]), seeds)
def test_twice_the_adc_bits_are_no_worse(choice, bits, quantile, seed):
    """At the range that calibration finds for half of them."""
    config = crossbar(choice)
    W, x = problem(seed, config, batch=16)
    ideal = product(W, x, config)
    coarse = dataclasses.replace(config, adc=ADC(bits=bits, quantile=quantile))
    state = program(W, coarse, path="definition")
    limits = calibrated(state, probe(x, state)[1]).limits
    errors = []
    for each in (bits, 2 * bits):
        y = product(W, x, dataclasses.replace(config, adc=ADC(bits=each, range="given", limits=limits)))
        errors.append(np.sqrt(np.mean((y - ideal) ** 2)))
    assert errors[1] <= errors[0] * (1 + 1e-5)


@few
@given(choices(UNFLIPPED), UNTILED, st.integers(1, 6), st.integers(1, 4), seeds)
def test_padding_to_arrays_changes_nothing(choice, scale, rows, cols, seed):
    """Zero inputs and zero weights fill arrays of 10 x 5 up."""
    ratio = choice["ratio"] if choice["encoding"] in SUBTRACTED else None
    config = converting(crossbar(choice, scale=scale, ratio=ratio, rows=10, cols=5, partition="full"))
    W, x = problem(seed, config, d_in=30 - rows, d_out=10 - cols)
    padded = product(jnp.pad(W, ((0, rows), (0, cols))), jnp.pad(x, ((0, 0), (0, rows))), config)
    assert_same_codes(padded[:, : 10 - cols], product(W, x, config))


@few
@given(choices(), UNTILED, st.permutations(range(3)), seeds)
def test_order_of_arrays_changes_nothing(choice, scale, order, seed):
    ratio = choice["ratio"] if choice["encoding"] in SUBTRACTED else None
    config = converting(crossbar(choice, scale=scale, ratio=ratio, rows=10, cols=3))
    W, x = problem(seed, config)
    rows = np.concatenate([np.arange(10) + 10 * r for r in order])
    cols = np.concatenate([np.arange(3) + 3 * c for c in order])
    y = product(W, x, config)
    assert_same_codes(product(W[:, cols], x, config), y[:, cols])
    assert_same_codes(product(W[rows], x[:, rows], config), y)


@few
@given(choices(), st.sampled_from([0.25, 2.0, 8.0]), seeds)
def test_signs_and_powers_of_two_carry_through(choice, factor, seed):
    config = converting(crossbar(choice, ratio=choice["ratio"] if choice["encoding"] in SUBTRACTED else None))
    W, x = problem(seed, config)
    y = product(W, x, config)
    np.testing.assert_array_equal(product(factor * W, x, config), factor * y)
    if config.signed_inputs:
        np.testing.assert_array_equal(product(W, -x, config), -y)
    if config.dac.scaling == "row":
        np.testing.assert_array_equal(product(W, factor * x, config), factor * y)
    if config.encoding.kind == "differential":
        np.testing.assert_array_equal(product(-W, x, config), -y)


@few
@given(choices(UNFLIPPED), UNTILED, st.booleans(), st.booleans(), seeds)
def test_every_path_is_the_definition(choice, scale, separate, together, seed):
    """Bitwise where column sums are integers; elsewhere ties may fall either way."""
    separate = separate and choice["encoding"] in SUBTRACTED
    subtracted = choice["encoding"] in SUBTRACTED and not separate
    config = crossbar(choice, scale=scale, ratio=choice["ratio"] if subtracted else None)
    W, x = problem(seed, config)
    paths = {"product": config}
    converts = converting(config, separate=separate, convert="sum" if together else "slice")
    paths["loop"] = converts
    if not together and max(converts.dac.slices) <= 2:
        paths["lookup"] = converts
    for path, each in paths.items():
        y, wanted = product(W, x, each, path), product(W, x, each, "definition")
        if each.encoding.kind == "offset" and not each.encoding.unit_column and each.adc is not None:
            assert_same_codes(y, wanted)
        else:
            np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("encoding", ["two-sided", "unit column"])
def test_an_adc_with_enough_bits_loses_nothing(encoding):
    """The range and the steps hold every sum of 16 rows: the same result as without an ADC, by every path."""
    config = CrossbarConfig(encoding=ENCODINGS[encoding], tile=Tile(rows=16), dac=DAC(signed=False))
    W, x = problem(3, config)
    ideal = product(W, x, config)
    signed = encoding in SUBTRACTED
    top = (2**7 - 1 if signed else 2**8 - 1) / 3  # one code for each level
    limits = ((-top if signed else 0.0, top),) * 4
    lossless = dataclasses.replace(config, adc=ADC(bits=8, range="given", limits=limits))
    assert program(W, lossless).plan.path == "product"
    for path in ("product", "loop", "lookup", "definition"):
        np.testing.assert_array_equal(product(W, x, lossless, path), ideal)
    lossy = dataclasses.replace(config, adc=ADC(bits=6, range="max"))
    assert program(W, lossy).plan.path != "product"
    assert np.abs(product(W, x, lossy) - ideal).max() > 1e-3 * np.abs(ideal).max()
