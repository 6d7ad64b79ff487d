"""Every exact path of a read against 64-bit arithmetic, and against every other, bit for bit.

The oracle is NumPy: each slice's column sums in int64, the ADC's scaling in float32 as an ADC here does it, codes
added in float64.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erfinv

from lorafusion_jax.crossbar import Cell, CrossbarConfig, Device, ReadNoise
from lorafusion_jax.crossbar.devices.normal_draws import normal, normal_at
from lorafusion_jax.crossbar.mapping.adc import Converter
from lorafusion_jax.crossbar.mapping.bit_fields import FLOAT_BITS, INT_BITS, Packing, certify, extent, pack
from lorafusion_jax.crossbar.read.conversion_noise import Noise, add_noise, deviations, powers, stream
from lorafusion_jax.crossbar.read.kernels import mosaic as mosaic_module
from lorafusion_jax.crossbar.read.kernels.bit_planes import planes, to_planes
from lorafusion_jax.crossbar.read.kernels.lookup import lookup
from lorafusion_jax.crossbar.read.kernels.loop import loop
from lorafusion_jax.crossbar.read.kernels.mosaic import mosaic
from lorafusion_jax.crossbar.read.kernels.packed_product import packed

_BATCH, _TILES, _ROWS, _COLS, _SLICES, _BITS = 6, 2, 40, 70, 4, 2


def _cells(kind: str, rows: int = _ROWS) -> np.ndarray:
    """[K, R, rows, cols] signed levels of 2-bit cells."""
    shape, top = (_SLICES, _TILES, rows, _COLS), 2**_BITS - 1
    rng = np.random.default_rng(0)
    if kind == "largest":
        return np.full(shape, top)
    if kind == "alternating":
        return top * (-1) ** np.add.outer(np.arange(rows) // 3, np.arange(_COLS)) + np.zeros(shape, int)
    if kind == "one row":
        return np.where(np.arange(rows)[:, None] == 7, -top, 0) + np.zeros(shape, int)
    cells = rng.integers(-top, top + 1, shape)
    if kind == "empty slices":
        cells[1:3], cells[3, 1] = 0, 0
    return cells


def _codes(signed: bool, kind: str, rows: int = _ROWS) -> np.ndarray:
    top = 127 if signed else 255
    if kind == "random":
        return np.random.default_rng(1).integers(-top if signed else 0, top + 1, (_BATCH, _TILES, rows))
    codes = np.full((_BATCH, _TILES, rows), top)
    return codes * (-1) ** (np.arange(rows) // 3) if signed else codes


def _slices(n: np.ndarray, bits: tuple[int, ...]) -> np.ndarray:
    starts = np.cumsum([0, *bits[:-1]])
    return np.stack([np.sign(n) * ((np.abs(n) >> s) % 2**b) for s, b in zip(starts, bits, strict=True)])


def _oracle(n: np.ndarray, cells: np.ndarray, adc: Converter, bits: tuple[int, ...]) -> np.ndarray:
    sums = np.einsum("jbri,krio->rjkbo", _slices(n, bits), cells)
    scaled = sums.astype(np.float32) * np.asarray(adc.scale)[:, None, None]
    codes = np.clip(np.rint(scaled), adc.qmin, adc.qmax)
    worth = 2.0 ** np.cumsum([0, *bits[:-1]])
    return np.einsum("j,rjkbo->kbo", worth, codes.astype(np.float64))


def _adc(signed_sums: bool = True) -> Converter:
    inv_lsb = jnp.asarray([0.5, 1.5, 0.31, 2.75], jnp.float32)  # ties of every kind among them
    return Converter(inv_lsb, -31 if signed_sums else 0, 31)


def _packing(cells: np.ndarray, top: int, signed: bool, word_bits: int, variances: np.ndarray | None = None) -> Packing:
    low, high = extent(jnp.asarray(cells, jnp.float32), top, signed=signed)
    spans = tuple(int(s) for s in np.max(np.asarray(high - low), axis=(1, 2)))
    most = () if variances is None else tuple(int(v) for v in np.max(top**2 * np.sum(variances, 2), axis=(1, 2)))
    packing = certify(spans, word_bits, most)
    assert packing is not None
    return packing


# Programs are shared by all cells and codes, but for those that pack cells into words as their sums allow.
@functools.cache
def _unpacked(bits: tuple[int, ...], signed: bool, signed_sums: bool) -> dict[str, Callable[..., jax.Array]]:
    adc = _adc(signed_sums)
    return {
        "loop": jax.jit(lambda x, g: loop(x, g, adc, bits)),
        "loop of occupied planes": jax.jit(lambda x, g: loop(x, g, adc, bits, jnp.any(g != 0, axis=(2, 3)))),
        "lookup of real cells": jax.jit(lambda x, g: lookup(x, g, None, adc, bits, signed=signed)),
        "planes": jax.jit(lambda x, g: planes(x, to_planes(g, _BITS), adc, bits, signed=signed)),
        "mosaic": jax.jit(lambda x, g: mosaic(x, g.astype(jnp.int8), adc, bits, signed=signed)),
        "mosaic of real cells": jax.jit(lambda x, g: mosaic(x, g, adc, bits, signed=signed)),
    }


@functools.cache
def _packed(
    bits: tuple[int, ...], signed: bool, signed_sums: bool, in_float: Packing, in_int: Packing
) -> dict[str, Callable[..., jax.Array]]:
    adc, top = _adc(signed_sums), 2 ** max(bits) - 1
    return {
        "packed": jax.jit(lambda x, g: packed(x, pack(g, in_float, top, signed=signed), in_float, adc, bits)),
        "lookup": jax.jit(
            lambda x, g: lookup(x, pack(g, in_int, top, signed=signed), in_int, adc, bits, signed=signed)
        ),
    }


def _check_paths(n: np.ndarray, cells: np.ndarray, bits: tuple[int, ...], *, signed: bool, signed_sums: bool = True):
    expected = _oracle(n, cells, _adc(signed_sums), bits)
    assert np.any(expected)
    packings = (_packing(cells, 2 ** max(bits) - 1, signed, size) for size in (FLOAT_BITS, INT_BITS))
    paths = _unpacked(bits, signed, signed_sums) | _packed(bits, signed, signed_sums, *packings)
    for path, read in paths.items():
        found = read(jnp.asarray(n, jnp.float32), jnp.asarray(cells, jnp.float32))
        np.testing.assert_array_equal(found, expected, err_msg=path)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", ["random", "largest", "alternating", "one row", "empty slices"])
def test_exact_paths_agree_with_64_bit_arithmetic(signed: bool, kind: str):
    for inputs in ("random", "largest"):
        _check_paths(_codes(signed, inputs), _cells(kind), (1,) * 7 if signed else (1,) * 8, signed=signed)


@pytest.mark.parametrize(
    ("bits", "signed"),
    [
        ((2, 2, 2, 1), True),
        pytest.param((2, 2, 2, 2), False, marks=pytest.mark.long),
        pytest.param((4, 3), True, marks=pytest.mark.long),
    ],
)
def test_wide_input_slices(bits: tuple[int, ...], signed: bool):
    _check_paths(_codes(signed, "random", rows=9), _cells("random", rows=9), bits, signed=signed)


def test_unsigned_sums_and_codes():
    cells = np.abs(_cells("random"))
    _check_paths(_codes(False, "random"), cells, (1,) * 8, signed=False, signed_sums=False)


@pytest.mark.parametrize("batch", [1, 5, 300])
def test_lookup_at_any_batch_and_width(batch: int):
    """The sizes of chunks and tables follow from the batch; the last chunk and block are padded."""
    cells = _cells("random")[..., :67]
    n = np.random.default_rng(2).integers(0, 256, (batch, _TILES, _ROWS))
    packing = _packing(cells, 1, False, INT_BITS)
    operand = pack(jnp.asarray(cells, jnp.float32), packing, 1, signed=False)
    found = lookup(jnp.asarray(n, jnp.float32), operand, packing, _adc(), (1,) * 8, signed=False)
    np.testing.assert_array_equal(found, _oracle(n, cells, _adc(), (1,) * 8))


@pytest.mark.parametrize(("batch", "cols", "slices_together"), [(1, 1, True), (33, 130, False), (300, 600, True)])
def test_mosaic_at_any_batch_and_width(batch: int, cols: int, slices_together: bool, monkeypatch: pytest.MonkeyPatch):
    """Blocks follow from the sizes; the last ones are padded."""
    if not slices_together:
        monkeypatch.setattr(mosaic_module, "_BLOCK_BYTES", 2**17)
    rng = np.random.default_rng(2)
    cells, n = rng.integers(-3, 4, (_SLICES, _TILES, 5, cols)), rng.integers(0, 256, (batch, _TILES, 5))
    expected = _oracle(n, cells, _adc(), (1,) * 8)
    for g in (jnp.asarray(cells, jnp.int8), jnp.asarray(cells, jnp.float32)):
        assert (mosaic_module._block(g, batch)[0] == _SLICES) == slices_together
        found = mosaic(jnp.asarray(n, jnp.float32), g, _adc(), (1,) * 8, signed=False)
        np.testing.assert_array_equal(found, expected)


def test_three_slices_share_a_word_where_bounds_allow_and_would_be_wrong_where_they_do_not():
    """The certificate is one of columns: random cells pass three to a float32 word, the worst case must not."""
    three = _packing(_cells("random"), 1, False, FLOAT_BITS)
    assert [word for word, _, _ in three.fields[:3]] == [0, 0, 0]
    worst, n = _cells("largest", rows=300), _codes(False, "largest", rows=300)
    refused = _packing(worst, 1, False, FLOAT_BITS)
    assert [word for word, _, _ in refused.fields] == [0, 0, 1, 1]

    expected = _oracle(n, worst, _adc(), (1,) * 8)

    def read(packing: Packing) -> np.ndarray:
        operand = pack(jnp.asarray(worst, jnp.float32), packing, 1, signed=False)
        return np.asarray(packed(jnp.asarray(n, jnp.float32), operand, packing, _adc(), (1,) * 8))

    np.testing.assert_array_equal(read(refused), expected)
    assert np.any(read(three) != expected)  # 900 does not fit the field


def test_a_span_fills_its_field_to_the_last_code():
    assert certify((255, 255, 255), FLOAT_BITS) == Packing(((0, 0, 8), (0, 8, 8), (0, 16, 8)))
    assert certify((255, 256, 255), FLOAT_BITS) == Packing(((0, 0, 8), (0, 8, 9), (1, 0, 8)))
    assert certify((2**32,), INT_BITS) is None
    assert certify((3,), INT_BITS, (2**31,)) is None


def test_real_cells_agree_to_rounding():
    rng = np.random.default_rng(3)
    cells = _cells("random") + 0.1 * rng.standard_normal((_SLICES, _TILES, _ROWS, _COLS))
    n, adc = _codes(True, "random"), _adc()._replace(rounds=False)
    x, g = jnp.asarray(n, jnp.float32), jnp.asarray(cells, jnp.float32)
    a, b = loop(x, g, adc, (1,) * 7), lookup(x, g, None, adc, (1,) * 7, signed=True)
    np.testing.assert_allclose(a, b, atol=1e-6 * np.max(np.abs(a)))
    # A step of 1 / 4,096 level: a sum that is off by more than a float32's rounding has another code.
    fine = Converter(jnp.full(_SLICES, 4096, jnp.float32), -(2**20), 2**20)
    a, b = loop(x, g, fine, (7,)), mosaic(x, g, fine, (7,), signed=True)
    np.testing.assert_allclose(a, b, rtol=0, atol=8)
    assert np.max(np.abs(a)) > 2**19


def _noise(variance: np.ndarray) -> Noise:
    return Noise(jnp.asarray(variance, jnp.float32), jnp.full(_SLICES, 0.3, jnp.float32), stream(jax.random.key(5)))


@pytest.mark.long
@pytest.mark.parametrize("signed", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_noisy_reads_are_the_same_on_every_path(signed: bool):
    bits = (2, 2, 2, 1) if signed else (1,) * 8
    cells, n = _cells("random"), _codes(signed, "random")
    variance, top = cells**2, 2 ** max(bits) - 1
    x, g, noise = jnp.asarray(n, jnp.float32), jnp.asarray(cells, jnp.float32), _noise(variance)
    expected = loop(x, g, _adc(), bits, noise=noise)
    assert np.mean(np.asarray(expected) != _oracle(n, cells, _adc(), bits)) > 0.5
    np.testing.assert_array_equal(lookup(x, g, None, _adc(), bits, signed=signed, noise=noise), expected)
    for kernel, size in ((lookup, INT_BITS), (packed, FLOAT_BITS)):
        packing = _packing(cells, top, signed, size, variance)
        operand = pack(g, packing, top, signed=signed, variances=jnp.asarray(variance, jnp.float32))
        more = {"signed": signed} if kernel is lookup else {}
        found = kernel(x, operand, packing, _adc(), bits, noise=noise, **more)
        np.testing.assert_array_equal(found, expected)


def test_noise_alike_in_all_columns():
    cells, n, bits = _cells("random"), _codes(True, "random"), (1,) * 7
    x, g = jnp.asarray(n, jnp.float32), jnp.asarray(cells, jnp.float32)
    narrow = np.full((_SLICES, _TILES, _ROWS, 1), 2)
    expected = loop(x, g, _adc(), bits, noise=_noise(np.broadcast_to(narrow, cells.shape)))
    np.testing.assert_array_equal(loop(x, g, _adc(), bits, noise=_noise(narrow)), expected)
    for kernel, size in ((lookup, INT_BITS), (packed, FLOAT_BITS)):
        packing = _packing(cells, 1, True, size)
        operand = pack(g, packing, 1, signed=True)
        more = {"signed": True} if kernel is lookup else {}
        np.testing.assert_array_equal(kernel(x, operand, packing, _adc(), bits, noise=_noise(narrow), **more), expected)


@pytest.mark.parametrize("kind", ["independent", "proportional"])
def test_noise_of_a_cell_in_level_units_counts_gmin(kind):
    device = Device(read_noise=ReadNoise(0.1, kind))
    config = CrossbarConfig(cell=Cell(bits=(2, 6), on_off_ratio=4.0), device=device)
    cells, top = np.random.default_rng(0).uniform(0, 3, (2, 1, 1, 1, 4, 3)), np.reshape([3, 63], (2, 1, 1, 1, 1, 1))
    of_cells = np.asarray(powers(jnp.asarray(cells, jnp.float32), config))
    found = np.sqrt(of_cells) * np.reshape(deviations(config, jnp.dtype("float32")), (2, 1, 1, 1, 1, 1))
    wanted = 0.1 * (0.25 + 0.75 * cells / top if kind == "proportional" else 1) * top / 0.75
    np.testing.assert_allclose(np.broadcast_to(found, cells.shape), np.broadcast_to(wanted, cells.shape), rtol=1e-5)


def test_noise_of_cells_and_of_their_conversion_add_up_as_variances():
    quiet = Noise(None, jnp.full(_SLICES, 0.3, jnp.float32), stream(jax.random.key(5)))
    both = quiet._replace(of_adc=jnp.full(_SLICES, 0.8, jnp.float32))
    sums, where = jnp.zeros((_SLICES, 5, 7)), (jnp.int32(0), (0, 0, 0), 7)
    of_cells, of_both = (add_noise(sums, jnp.full_like(sums, 4.0), noise, *where) for noise in (quiet, both))
    np.testing.assert_allclose(of_both, of_cells * np.hypot(0.3 * 2, 0.8) / (0.3 * 2), rtol=1e-5)


def test_noise_has_the_columns_variance():
    """Without rounding and clipping the error of a read is normal, with variance sum_r,j 4^j u^2 v."""
    cells, n, bits = _cells("random"), _codes(True, "random"), (1,) * 7
    adc = Converter(jnp.ones(_SLICES, jnp.float32), -(10**6), 10**6, rounds=False)
    x, g = jnp.asarray(n, jnp.float32), jnp.asarray(cells, jnp.float32)
    keys = jax.random.split(jax.random.key(6), 400)
    one = _noise(cells**2)
    draws = jax.vmap(lambda key: loop(x, g, adc, bits, noise=one._replace(words=stream(key))))(keys)
    error = np.asarray(draws) - _oracle(n, cells, adc._replace(qmin=-(10**9), qmax=10**9), bits)
    power = np.einsum("j,jbri->bri", 4.0 ** np.arange(7), _slices(n, bits) ** 2)
    deviation = 0.3 * np.sqrt(np.einsum("bri,krio->kbo", power, cells**2))
    z = error / deviation
    count = z.size
    assert abs(z.mean()) < 4 / np.sqrt(count)
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / count)
    assert abs((z**4).mean() - 3) < 4 * np.sqrt(96 / count)


def _threefry(words, low, rounds):
    """Threefry-2x32 by its definition; counters (0, low)."""
    mask, turns = 2**32 - 1, (13, 15, 26, 6, 17, 29, 16, 24)
    keys = [int(w) for w in words]
    keys.append(keys[0] ^ keys[1] ^ 0x1BD11BDA)
    a, b = np.full(len(low), keys[0], np.uint64), (low.astype(np.uint64) + np.uint64(keys[1])) & np.uint64(mask)
    for i in range(rounds):
        turn = np.uint64(turns[i % 8])
        a = (a + b) & np.uint64(mask)
        b = (((b << turn) | (b >> (np.uint64(32) - turn))) & np.uint64(mask)) ^ a
        if i % 4 == 3:
            group = i // 4 + 1
            a = (a + np.uint64(keys[group % 3])) & np.uint64(mask)
            b = (b + np.uint64(keys[(group + 1) % 3]) + np.uint64(group)) & np.uint64(mask)
    return (a ^ b).astype(np.uint32)


def test_normal_has_threefrys_bits_and_the_quantiles_of_the_normal_distribution():
    key, shape = jax.random.key(3), (7, 3, 1000)
    words, places = np.asarray(jax.random.key_data(key)), np.arange(21_000)
    # The oracle's own oracle: with 20 rounds these are the bits of `jax.random`.
    np.testing.assert_array_equal(_threefry(words, places, 20).reshape(shape), jax.random.bits(key, shape, jnp.uint32))
    bits = _threefry(words, places, 13).reshape(shape)
    least = np.nextafter(np.float32(-1), np.float32(0))
    uniform = (bits >> 9).astype(np.float32) * np.float32(2.0**-23) * (1 - least) + least
    expected = np.sqrt(2) * erfinv(np.maximum(uniform, least).astype(np.float64))
    found = np.asarray(jax.jit(lambda key: normal(key, shape, jnp.dtype(jnp.float32)))(key))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


def test_normal_of_other_generators_and_dtypes_is_that_of_jax_random():
    key = jax.random.key(0, impl="rbg")
    np.testing.assert_array_equal(normal(key, (5,), jnp.dtype(jnp.float32)), jax.random.normal(key, (5,)))
    with jax.enable_x64(True):
        key = jax.random.key(0)
        found = normal(key, (5,), jnp.dtype(jnp.float64))
        np.testing.assert_array_equal(found, jax.random.normal(key, (5,), jnp.float64))


@pytest.mark.long
def test_normal_tails():
    """The least and the largest of the 2^23 numbers a draw is made from are at 5.2 deviations or beyond."""
    words, size = jax.random.key_data(jax.random.key(1)), 2**20
    extremes = []
    for high in range(8):
        low = jnp.arange(size, dtype=jnp.uint32)
        drawn = normal_at(words, jnp.full_like(low, high), low)
        assert bool(jnp.all(jnp.isfinite(drawn)))
        extremes.append(float(jnp.max(jnp.abs(drawn))))
    assert 4.8 < max(extremes) < 5.5


def test_draws_do_not_depend_on_how_a_batch_is_split():
    """Same key, same place, same draw: a path reads any block of columns by itself."""
    words = stream(jax.random.key(2))
    whole = normal_at(words, jnp.zeros((4, 6), jnp.uint32), jnp.arange(24, dtype=jnp.uint32).reshape(4, 6))
    part = normal_at(words, jnp.zeros((2, 3), jnp.uint32), jnp.asarray([[8, 9, 10], [14, 15, 16]], jnp.uint32))
    np.testing.assert_array_equal(whole[1:3, 2:5], part)


def test_under_vmap_over_chips():
    chips = np.stack([_cells("random"), np.flip(_cells("random"), 1)])
    n, bits = _codes(True, "random"), (1,) * 7
    packing = _packing(np.concatenate(chips, axis=1), 1, True, INT_BITS)

    def read(g: jax.Array) -> jax.Array:
        operand = pack(g, packing, 1, signed=True)
        return lookup(jnp.asarray(n, jnp.float32), operand, packing, _adc(), bits, signed=True)

    found = jax.jit(jax.vmap(read))(jnp.asarray(chips, jnp.float32))
    for one, cells in itertools.zip_longest(found, chips):
        np.testing.assert_array_equal(one, _oracle(n, cells, _adc(), bits))


def test_in_float64():
    with jax.enable_x64(True):
        n, cells, bits = _codes(False, "random"), _cells("random"), (1,) * 8
        packing, adc = _packing(cells, 1, False, INT_BITS), _adc()._replace(scale=jnp.asarray([0.5, 1.5, 0.25, 2.75]))
        assert adc.scale.dtype == jnp.float64
        x, g = jnp.asarray(n, jnp.float64), jnp.asarray(cells, jnp.float64)
        expected = loop(x, g, adc, bits)
        found = lookup(x, pack(g, packing, 1, signed=False), packing, adc, bits, signed=False)
        assert found.dtype == jnp.float64
        np.testing.assert_array_equal(found, expected)


def test_a_step_of_the_loop_slices_one_plane():
    """Not a weight slice's planes of all row tiles first, which a TPU copied in every step."""
    cells = jnp.zeros((_SLICES, _TILES, _ROWS, _COLS))
    adc = Converter(jnp.ones(_SLICES), -128, 127)
    noise = Noise(jnp.ones((_SLICES, _TILES, _ROWS, _COLS)), jnp.ones(_SLICES), stream(jax.random.key(0)))
    codes = jnp.zeros((_BATCH, _TILES, _ROWS))
    text = str(jax.make_jaxpr(lambda cells: loop(codes, cells, adc, (4, 4), None, noise))(cells))
    assert f"slice_sizes=(1, 1, {_ROWS}, {_COLS})" in text
    assert f"f32[{_TILES},{_ROWS},{_COLS}]" not in text and f"f32[1,{_TILES},{_ROWS},{_COLS}]" not in text
