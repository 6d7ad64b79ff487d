"""Every exact path of a read against 64-bit arithmetic, and against every other.

The oracle is NumPy: column sums of every tile and pair of slices in int64, and their codes in float64, which are exact
for ties too. Weights and inputs are integers, so that digits and input codes follow from them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erfinv

from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    Cell,
    CrossbarConfig,
    Device,
    Encoding,
    Geometry,
    Independent,
    Mapping,
    ReadNoise,
    Tile,
    matmul,
    program,
    with_read_key,
)
from lorafusion_jax.crossbar.devices.normal_draws import normal, normal_at
from lorafusion_jax.crossbar.mapping.adc.quantiser import Converter
from lorafusion_jax.crossbar.mapping.bit_fields import FLOAT_BITS, INT_BITS, Packing, certify
from lorafusion_jax.crossbar.read.conversion_noise import Noise, add_noise, deviations, powers, stream
from lorafusion_jax.crossbar.read.kernels import mosaic as mosaic_module
from lorafusion_jax.crossbar.read.kernels.lookup import lookup
from lorafusion_jax.crossbar.read.kernels.sliced_products import sliced_products

_BATCH, _TILES, _ROWS, _COLS, _SLICES = 6, 2, 40, 70, 4
_PATHS = ("definition", "loop", "lookup", "planes", "packed", "mosaic")
# Currents of the highest code: half of the codes are ties in slices 0 and 2, and sums of slice 3 clip.
_LIMITS = (62.0, 20.5, 124.0, 9.25)


def crossbar(bits: int = 1, *, signed: bool = True, signed_sums: bool = True, rows: int = _ROWS) -> CrossbarConfig:
    """Four slices of 2 bits, whose codes are those of integer weights up to 255 (127), and an ADC that loses bits."""
    return CrossbarConfig(
        encoding=Encoding(kind="differential" if signed_sums else "offset"),
        mapping=Mapping(weight_bits=9 if signed_sums else 8),
        tile=Tile(rows=rows, cols=None),
        dac=DAC(bits=8, slice_bits=bits, signed=signed, scaling="fixed"),
        adc=ADC(bits=6, range="given", limits=tuple((-top if signed_sums else 0.0, top) for top in _LIMITS)),
    )


def weights(kind: str, rows: int = _ROWS, cols: int = _COLS, top: int = 255) -> np.ndarray:
    """Return integer weights of two tiles, the largest of which is `top`."""
    shape, rng = (_TILES * rows, cols), np.random.default_rng(0)
    if kind == "largest":
        return np.full(shape, top)
    if kind == "alternating":
        return top * (-1) ** np.add.outer(np.arange(shape[0]) // 3, np.arange(cols))
    if kind == "one row":
        return np.where(np.arange(shape[0])[:, None] == 7, -top, 0) + np.zeros(shape, int)
    q = rng.integers(-top, top + 1, shape)
    if kind == "empty slices":  # of the second tile, all but the lowest
        q[rows:] = np.sign(q[rows:]) * (abs(q[rows:]) % 4)
    q[0, 0] = top
    return q


def inputs(kind: str, *, signed: bool = True, rows: int = _ROWS, batch: int = _BATCH) -> np.ndarray:
    """Return integer inputs, up to the largest code."""
    top, shape = 127 if signed else 255, (batch, _TILES * rows)
    if kind == "random":
        return np.random.default_rng(1).integers(-top if signed else 0, top + 1, shape)
    return np.full(shape, top) * (-1) ** (np.arange(shape[1]) // 3) if signed else np.full(shape, top)


def _digits(codes: np.ndarray, bits: tuple[int, ...]) -> np.ndarray:
    starts = np.cumsum([0, *bits[:-1]])
    return np.stack([np.sign(codes) * ((abs(codes) >> s) % 2**b) for s, b in zip(starts, bits, strict=True)])


def _steps(config: CrossbarConfig) -> np.ndarray:
    """Return the levels of one code of every weight slice."""
    highest = 31 if config.encoding.kind == "differential" else 63
    return np.asarray(_LIMITS) * 3 * (2 ** config.dac.slices[0] - 1) / highest


def oracle(n: np.ndarray, q: np.ndarray, config: CrossbarConfig) -> np.ndarray:
    """Return the product of integers, conversion by conversion."""
    offset, bits, steps = config.encoding.kind == "offset", config.dac.slices, _steps(config)
    u, g = _digits(n, bits), _digits(q + 128 * offset, (2,) * _SLICES)
    sums = np.einsum(
        "jbti,ktio->kjtbo", u.reshape(*u.shape[:2], _TILES, -1), g.reshape(_SLICES, _TILES, -1, g.shape[2])
    )
    codes = np.clip(np.rint(sums / steps[:, None, None, None, None]), *((0, 63) if offset else (-31, 31)))
    worth = 2.0 ** np.cumsum([0, *bits[:-1]])
    return (
        np.einsum("k,j,kjtbo->bo", 4.0 ** np.arange(_SLICES) * steps, worth, codes) - 128 * offset * n.sum(1)[:, None]
    )


def as_read(n: np.ndarray, q: np.ndarray, config: CrossbarConfig, path: str, dtype=jnp.float32, key=None) -> np.ndarray:
    """Return the product as a path reads it."""
    chip = program(jnp.asarray(q, dtype), config, jax.random.key(0), path=path)
    top = 127 if config.dac.signed else 255
    return np.asarray(matmul(jnp.asarray(n, dtype) / top, with_read_key(chip, key))) * top


def assert_same_codes(found: np.ndarray, wanted: np.ndarray, config: CrossbarConfig, message: str = "") -> None:
    least = np.min(4.0 ** np.arange(_SLICES) * _steps(config))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=least / 4, err_msg=message)


def check_paths(n: np.ndarray, q: np.ndarray, config: CrossbarConfig, paths: tuple[str, ...] = _PATHS) -> None:
    wanted = oracle(n, q, config)
    assert wanted.any()
    for path in paths:
        assert_same_codes(as_read(n, q, config, path), wanted, config, path)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", ["random", "largest", "alternating", "one row", "empty slices"])
def test_exact_paths_agree_with_64_bit_arithmetic(signed: bool, kind: str):
    for of_inputs in ("random", "largest"):
        check_paths(inputs(of_inputs, signed=signed), weights(kind), crossbar(signed=signed))


@pytest.mark.parametrize(
    ("bits", "signed"),
    [
        (2, True),
        pytest.param(2, False, marks=pytest.mark.long),
        pytest.param(4, True, marks=pytest.mark.long),
    ],
)
def test_input_slices_of_several_bits_are_exact_on_every_path(bits: int, signed: bool):
    paths = _PATHS if bits == 2 else ("definition", "loop", "packed", "mosaic")
    n, q = inputs("random", signed=signed, rows=9), weights("random", rows=9)
    check_paths(n, q, crossbar(bits, signed=signed, rows=9), paths)


def test_sums_that_are_never_negative_are_exact_on_every_path():
    check_paths(inputs("random", signed=False), weights("random", top=127), crossbar(signed=False, signed_sums=False))


@pytest.mark.parametrize("batch", [1, 5, 300])
def test_tables_are_exact_at_any_batch_and_width(batch: int):
    """The sizes of chunks and tables follow from the batch; the last chunk and block are padded."""
    check_paths(
        inputs("random", signed=False, batch=batch), weights("random", cols=67), crossbar(signed=False), ("lookup",)
    )


@pytest.mark.usefixtures("own_programs")
@pytest.mark.parametrize(("batch", "cols", "slices_together"), [(1, 1, True), (33, 130, False), (300, 600, True)])
def test_mosaic_at_any_batch_and_width(batch: int, cols: int, slices_together: bool, monkeypatch: pytest.MonkeyPatch):
    """Blocks follow from the sizes; the last ones are padded. Real cells give the codes of the same cells in bytes."""
    if not slices_together:
        monkeypatch.setattr(mosaic_module, "_BLOCK_BYTES", 2**17)
    config = crossbar(signed=False, rows=5)
    n, q = inputs("random", signed=False, rows=5, batch=batch), weights("random", rows=5, cols=cols)
    real = dataclasses.replace(config, device=Device(programming=Independent(0.0)))
    for each, dtype in ((config, jnp.int8), (real, jnp.float32)):
        chip = program(jnp.asarray(q, jnp.float32), each, jax.random.key(0), path="mosaic")
        assert chip.columns.dtype == dtype
        assert (mosaic_module._block(chip.columns, batch)[0] == _SLICES) == slices_together
        wanted = oracle(n, q, config) if each is config else as_read(n, q, real, "loop")  # which rounds ties by chance
        assert_same_codes(as_read(n, q, each, "mosaic"), wanted, config)


def test_slices_share_a_word_where_the_sums_of_the_columns_allow():
    """The certificate is one of columns: random cells pass three to a float32 word, the worst case must not."""

    def words(q: np.ndarray, config: CrossbarConfig) -> list[int]:
        return [word for word, _, _ in program(jnp.asarray(q, jnp.float32), config, path="packed").plan.packing.fields]

    config, tall = crossbar(signed=False), crossbar(signed=False, rows=300)
    assert words(weights("random"), config)[:3] == [0, 0, 0]
    worst, n = weights("largest", rows=300), inputs("largest", signed=False, rows=300)
    assert words(worst, tall) == [0, 0, 1, 1]  # 900 does not fit a field of a third
    check_paths(n, worst, tall, ("packed",))


def test_a_span_fills_its_field_to_the_last_code():
    assert certify((255, 255, 255), FLOAT_BITS) == Packing(((0, 0, 8), (0, 8, 8), (0, 16, 8)))
    assert certify((255, 256, 255), FLOAT_BITS) == Packing(((0, 0, 8), (0, 8, 9), (1, 0, 8)))
    assert certify((2**32,), INT_BITS) is None
    assert certify((3,), INT_BITS, (2**31,)) is None


def test_real_cells_agree_to_rounding():
    """A step of 1 / 4,096 level: a sum that is off by more than a float32's rounding has another code."""
    rng = np.random.default_rng(3)
    g = jnp.asarray(rng.uniform(-3, 3, (_SLICES, _TILES, _ROWS, _COLS)), jnp.float32)
    x = jnp.asarray(rng.integers(-127, 128, (_BATCH, _TILES, _ROWS)), jnp.float32)
    plain = Converter(jnp.asarray([0.5, 1.5, 0.31, 2.75], jnp.float32), -31, 31, rounds=False)
    a, b = sliced_products(x, g, None, plain, (1,) * 7), lookup(x, g, None, plain, (1,) * 7, signed=True)
    np.testing.assert_allclose(a, b, atol=1e-6 * np.max(np.abs(a)))
    fine = Converter(jnp.full(_SLICES, 4096, jnp.float32), -(2**20), 2**20)
    a, b = sliced_products(x, g, None, fine, (7,)), mosaic_module.mosaic(x, g, fine, (7,), signed=True)
    np.testing.assert_allclose(a, b, rtol=0, atol=8)
    assert np.max(np.abs(a)) > 2**19


@pytest.mark.parametrize(
    ("kind", "bits", "signed"),
    [
        ("independent", 1, True),
        pytest.param("proportional", 1, False, marks=pytest.mark.long),
        pytest.param("proportional", 2, True, marks=pytest.mark.nightly),
    ],
)
def test_noise_is_the_same_on_every_path(kind: str, bits: int, signed: bool):
    """One variance for all columns, or one for each."""
    quiet = crossbar(bits, signed=signed)
    config = dataclasses.replace(quiet, device=Device(read_noise=ReadNoise(0.1, kind)))
    n, q = inputs("random", signed=signed), weights("random")
    loops, *others = (as_read(n, q, config, path, key=jax.random.key(5)) for path in ("loop", "lookup", "packed"))
    assert np.mean(np.abs(loops - oracle(n, q, quiet)) > 3) > 0.5
    for found in others:
        assert_same_codes(found, loops, config)


@pytest.mark.parametrize("kind", ["independent", "proportional"])
def test_noise_of_a_cell_in_level_units_counts_gmin(kind):
    device = Device(read_noise=ReadNoise(0.1, kind))
    config = CrossbarConfig(cell=Cell(bits=(2, 6), on_off_ratio=4.0), device=device)
    cells, top = np.random.default_rng(0).uniform(0, 3, (2, 1, 1, 1, 4, 3)), np.reshape([3, 63], (2, 1, 1, 1, 1, 1))
    geometry = Geometry.of((4, 3), config)
    of_cells = np.asarray(powers(jnp.asarray(cells, jnp.float32), geometry, config))
    found = np.sqrt(of_cells) * np.reshape(deviations(geometry, config, jnp.dtype("float32")), (2, 1, 1, 1, 1, 1))
    wanted = 0.1 * (0.25 + 0.75 * cells / top if kind == "proportional" else 1) * top / 0.75
    np.testing.assert_allclose(np.broadcast_to(found, cells.shape), np.broadcast_to(wanted, cells.shape), rtol=1e-5)


def test_noise_of_cells_and_of_their_conversion_add_up_as_variances():
    quiet = Noise(None, jnp.full(_SLICES, 0.3, jnp.float32), stream(jax.random.key(5)))
    both = quiet._replace(of_adc=jnp.full(_SLICES, 0.8, jnp.float32))
    sums, where = jnp.zeros((_SLICES, 5, 7)), (jnp.int32(0), (0, 0, 0), 7)
    of_cells, of_both = (add_noise(sums, jnp.full_like(sums, 4.0), noise, *where) for noise in (quiet, both))
    np.testing.assert_allclose(of_both, of_cells * np.hypot(0.3 * 2, 0.8) / (0.3 * 2), rtol=1e-5)


def test_noise_is_normal_and_has_the_columns_variance():
    """With an ADC of many steps the error of a read is normal, with variance sum_k,r,j 16^k 4^j u^2 v."""
    adc = ADC(bits=16, range="given", limits=((-float(_ROWS), float(_ROWS)),) * _SLICES)
    config = dataclasses.replace(crossbar(), adc=adc, device=Device(read_noise=ReadNoise(0.1, "proportional")))
    n, q = inputs("random"), weights("random")
    chip, x = program(jnp.asarray(q, jnp.float32), config, path="loop"), jnp.asarray(n, jnp.float32) / 127
    draws = jax.vmap(lambda key: matmul(x, with_read_key(chip, key)))(jax.random.split(jax.random.key(6), 400))
    power = np.einsum("j,jbi->bi", 4.0 ** np.arange(7), _digits(n, (1,) * 7) ** 2)
    v = np.einsum("k,kio->io", 16.0 ** np.arange(_SLICES), (0.1 * _digits(q, (2,) * _SLICES)) ** 2)
    z = (np.asarray(draws) * 127 - n @ q) / np.sqrt(power @ v)
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


def test_chips_of_a_stack_are_exact_under_vmap():
    q, n, config = np.stack([weights("random"), np.flip(weights("random"), 0)]), inputs("random"), crossbar()
    chips = jax.vmap(lambda W: program(W, config, path="lookup"))(jnp.asarray(q, jnp.float32))
    found = jax.jit(jax.vmap(matmul, (None, 0)))(jnp.asarray(n, jnp.float32) / 127, chips)
    for one, of_chip in zip(np.asarray(found) * 127, q, strict=True):
        assert_same_codes(one, oracle(n, of_chip, config), config)


def test_paths_are_exact_in_float64():
    n, q, config = inputs("random", signed=False), weights("random"), crossbar(signed=False)
    with jax.enable_x64(True):
        for path in ("loop", "lookup"):
            found = as_read(n, q, config, path, jnp.float64)
            assert found.dtype == np.float64
            np.testing.assert_allclose(found, oracle(n, q, config), rtol=1e-13, atol=1e-6)


def test_a_step_of_the_loop_slices_one_plane():
    """Not a weight slice's planes of all row tiles first, which a TPU copied in every step."""
    cells = jnp.zeros((_SLICES, _TILES, _ROWS, _COLS))
    adc = Converter(jnp.ones(_SLICES), -128, 127)
    noise = Noise(jnp.ones((_SLICES, _TILES, _ROWS, _COLS)), jnp.ones(_SLICES), stream(jax.random.key(0)))
    codes = jnp.zeros((_BATCH, _TILES, _ROWS))
    text = str(jax.make_jaxpr(lambda cells: sliced_products(codes, cells, None, adc, (4, 4), None, noise))(cells))
    assert f"slice_sizes=(1, 1, {_ROWS}, {_COLS})" in text
    assert f"f32[{_TILES},{_ROWS},{_COLS}]" not in text and f"f32[1,{_TILES},{_ROWS},{_COLS}]" not in text
