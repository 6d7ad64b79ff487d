"""Words, noise and memory of the paths of a read, and the paths that accelerators take.

What the paths compute is held against loops in `test_fuzz.py`.
"""

import dataclasses
import functools

import crossbar_strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import erfinv
from testers import check_chip

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    CrossbarConfig,
    Device,
    Mapping,
    ReadNoise,
    Tile,
    matmul,
    program,
)

_KEY = jax.random.key(3)
problem = functools.partial(
    crossbar_strategies.problem, d_in=40, d_out=6, batch=4, seed=1
)


def test_slices_share_a_word_where_the_sums_of_the_columns_allow():
    """The bound is that of the cells: random ones pass three to a float32 word, the largest must not."""

    def words(q: np.ndarray, rows: int) -> list[int]:
        config = CrossbarConfig(
            mapping=Mapping(weight_bits=9),
            tile=Tile(rows=rows, cols=None),
            dac=DAC(bits=8, slice_bits=1, signed=False, scaling="fixed"),
            adc=ADC(bits=6, range="max"),
        )
        return [
            word
            for word, _, _ in program(
                jnp.asarray(q, jnp.float32), config, path="packed"
            ).plan.packing.fields
        ]

    assert words(np.random.default_rng(0).integers(-255, 256, (80, 70)), 40)[:3] == [
        0,
        0,
        0,
    ]
    assert words(np.full((600, 70), 255), 300) == [
        0,
        0,
        1,
        1,
    ]  # 900 does not fit a field of a third


# By name: the bits of an ADC that the path can read exactly.
PATHS = dict.fromkeys(("definition", "loop", "lookup", "packed"), 5) | {"product": 14}
_SHORT = {"product", "lookup"}  # corners of `test_fuzz.py` have the others


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p in _SHORT else pytest.mark.long) for p in PATHS],
)
def test_a_path_reads_chips_of_every_kind(path, tmp_path):
    check_chip(
        CrossbarConfig(
            adc=ADC(bits=PATHS[path], range="granular"), tile=Tile(rows=10, cols=5)
        ),
        tmp_path,
        path,
    )


def test_every_path_has_a_test():
    with pytest.raises(
        ValueError, match="path='none' is unknown: choose from "
    ) as raised:
        program(*problem()[:1], CrossbarConfig(), path="none")
    assert set(
        str(raised.value).partition("choose from ")[2].partition(", or ")[0].split(", ")
    ) == set(PATHS)


# Noise.


@pytest.mark.parametrize(
    "kind", ["independent", pytest.param("proportional", marks=pytest.mark.long)]
)
def test_noise_is_the_same_on_every_path(kind):
    """One variance for all columns, or one for each."""
    W, x = problem(d_in=80)
    quiet = CrossbarConfig(tile=Tile(rows=40), adc=ADC(bits=6, range="max"))
    noisy = dataclasses.replace(quiet, device=Device(read_noise=ReadNoise(0.1, kind)))
    without = matmul(x, program(W, quiet, path="loop"))
    found = [
        matmul(x, crossbar.with_read_key(program(W, noisy, path=p), _KEY))
        for p in ("loop", "lookup", "packed")
    ]
    least = float(jnp.abs(without).max()) / 1000  # less than a code is worth
    assert np.mean(np.abs(found[0] - without) > least) > 0.5
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=least)


def _threefry(words, low, rounds):
    """Return Threefry-2x32 by its definition; counters (0, low)."""
    mask = 2**32 - 1
    turns = (13, 15, 26, 6, 17, 29, 16, 24)
    keys = [int(w) for w in words]
    keys.append(keys[0] ^ keys[1] ^ 0x1BD11BDA)
    a = np.full(len(low), keys[0], np.uint64)
    b = (low.astype(np.uint64) + np.uint64(keys[1])) & np.uint64(mask)
    for i in range(rounds):
        turn = np.uint64(turns[i % 8])
        a = (a + b) & np.uint64(mask)
        b = (((b << turn) | (b >> (np.uint64(32) - turn))) & np.uint64(mask)) ^ a
        if i % 4 == 3:
            group = i // 4 + 1
            a = (a + np.uint64(keys[group % 3])) & np.uint64(mask)
            b = (b + np.uint64(keys[(group + 1) % 3]) + np.uint64(group)) & np.uint64(
                mask
            )
    return (a ^ b).astype(np.uint32)


def _normal(key, shape, dtype=jnp.float32):
    return ReadNoise(1.0).draw(jnp.zeros(shape, dtype), key)


def test_draws_have_threefrys_bits_and_the_quantiles_of_the_normal_distribution():
    key = jax.random.key(3)
    shape = (7, 3, 1000)
    words = np.asarray(jax.random.key_data(key))
    places = np.arange(21_000)
    # The oracle's own oracle: with 20 rounds these are the bits of `jax.random`.
    np.testing.assert_array_equal(
        _threefry(words, places, 20).reshape(shape),
        jax.random.bits(key, shape, jnp.uint32),
    )
    bits = _threefry(words, places, 13).reshape(shape)
    least = np.nextafter(np.float32(-1), np.float32(0))
    uniform = (bits >> 9).astype(np.float32) * np.float32(2.0**-23) * (
        1 - least
    ) + least
    expected = np.sqrt(2) * erfinv(np.maximum(uniform, least).astype(np.float64))
    np.testing.assert_allclose(
        jax.jit(lambda key: _normal(key, shape))(key), expected, rtol=1e-6, atol=1e-12
    )
    assert 4.5 < jnp.abs(_normal(key, 2**22)).max() < 5.5


def test_draws_of_other_generators_and_dtypes_are_those_of_jax_random():
    key = jax.random.key(0, impl="rbg")
    np.testing.assert_array_equal(_normal(key, (5,)), jax.random.normal(key, (5,)))
    with jax.enable_x64(True):
        found = _normal(jax.random.key(0), (5,), jnp.float64)
        np.testing.assert_array_equal(
            found, jax.random.normal(jax.random.key(0), (5,), jnp.float64)
        )


# Accelerators.


def _compiled(chip):
    """Return a jitted read of a chip with a key, and the chip's leaves."""
    leaves, structure = jax.tree.flatten(chip)
    return jax.jit(
        lambda x, leaves: matmul(
            x, crossbar.with_read_key(jax.tree.unflatten(structure, leaves), _KEY)
        )
    ), leaves


@pytest.mark.parametrize(
    ("device", "path"),
    [(Device(), "definition"), (Device(read_noise=ReadNoise(0.1)), "packed")],
)
def test_a_tpu_draws_noise_for_each_conversion_and_else_reads_by_definition(
    device, path
):
    weights, _ = problem()
    config = CrossbarConfig(adc=ADC(range="calibrated"), device=device)
    with tiny.for_tpu():
        assert program(weights, config, _KEY).plan.path == path


@pytest.mark.parametrize(
    ("dac", "narrow"), [(DAC(slice_bits=4), True), (DAC(bits=10, slice_bits=9), False)]
)
def test_an_accelerator_multiplies_small_integers_in_bfloat16(dac, narrow):
    """The sums are exact. Slices of nine bits are not bfloat16 numbers."""
    weights, x = problem()
    read, leaves = _compiled(
        program(
            weights, CrossbarConfig(dac=dac, adc=ADC(range="max")), path="definition"
        )
    )
    wanted = read(x, leaves)
    with tiny.for_tpu():
        assert ("bf16" in read.lower(x, leaves).as_text()) == narrow
        np.testing.assert_array_equal(read(x, leaves), wanted)


# Memory.


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({"tile": Tile(rows=1)}, (512, 256, 128)),
        (
            {
                "tile": Tile(
                    rows=32,
                    wire=crossbar.Wire(row_resistance=1e-3, column_resistance=1e-3),
                )
            },
            (256, 256, 64),
        ),
        (
            {
                "tile": Tile(rows=32),
                "device": Device(read_noise=ReadNoise(0.1, clip=True)),
            },
            (256, 256, 64),
        ),
    ],
    ids=["conversions", "wires", "cells"],
)
def test_a_read_that_would_take_much_memory_is_computed_in_parts(changes, sizes):
    """All conversions, or all cells for every input, would take between 0.9 and 1.9 GB at once."""
    weights, x = crossbar_strategies.problem(*sizes)
    read, leaves = _compiled(
        program(
            weights, CrossbarConfig(adc=ADC(range="max"), **changes), path="definition"
        )
    )
    assert read.lower(x, leaves).compile().memory_analysis().temp_size_in_bytes < 0.5e9


def test_a_read_in_parts_gives_the_read_at_once():
    """All conversions would take 0.36 GB, more than a read takes at once."""
    weights, x = crossbar_strategies.problem(512, 256, 24)
    chip = program(
        weights,
        CrossbarConfig(adc=ADC(range="max"), tile=Tile(rows=1)),
        path="definition",
    )
    np.testing.assert_allclose(
        matmul(x, chip)[-3:], matmul(x[-3:], chip), rtol=1e-6, atol=1e-5
    )
