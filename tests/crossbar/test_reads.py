"""Reads besides their numbers, which `test_fuzz.py` compares with loops in NumPy: one body for chips of every kind."""

import math
from dataclasses import replace

import crossbar_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from crossbar_strategies import ENCODINGS, problem, single_slices
from numpy.testing import assert_allclose, assert_array_equal
from refusals import refused

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    Cell,
    CrossbarConfig,
    Device,
    Mapping,
    ReadNoise,
    Tile,
    Wire,
    matmul,
    probe,
    program,
    with_read_key,
)

KEY = jax.random.key(11)
SMALL = Tile(rows=10, cols=5)


def truncated(chip):
    """Return the read in NumPy: the sum of every array, rounded down to one of 15 codes on either side."""
    W, x = map(np.asarray, problem())
    top = np.abs(W).max()
    step = float(chip.limits[0, 0, 1]) * 49 / 15
    tiles = np.split(np.arange(len(W)), np.cumsum(chip.geometry.rows)[:-1])
    q = np.rint(W / top * 7)
    n = np.rint(x * 7)
    sums = [n[:, rows] @ q[rows] for rows in tiles]
    return sum(np.clip(np.floor(s / step), -15, 15) for s in sums) * step * top / 49


def granular(bits):
    return CrossbarConfig(adc=ADC(bits=bits, range="granular"), tile=SMALL)


def aged(**device):
    # Without an ADC, at which a sum of real cells may lie half-way between two codes.
    device = Device(time=3600.0, **device)
    return CrossbarConfig(cell=Cell(on_off_ratio=10.0), tile=SMALL, device=device)


TABLE = crossbar.Table((0.1, 1.0), ((0.01, 0.04), (0.03, 0.02)), seconds=(1.0, 1e4))
# By name: a configuration and a path.
KINDS = {
    "product": (granular(14), "product"),
    "definition": (granular(5), "definition"),
    "loop": (granular(5), "loop"),
    "packed": (granular(5), "packed"),
    "lookup": (granular(5), "lookup"),
    "an ADC from outside": (single_slices("truncating"), None),
    "a measured error": (aged(programming=TABLE), None),
    "a drift": (aged(drift=crossbar.RERAM_CMO_DRIFT), None),
    "wires": (CrossbarConfig(tile=Tile(rows=16, wire=Wire(row_resistance=1e-4))), None),
}
_SHORT = {"product", "lookup", "an ADC from outside", "a drift"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in _SHORT else pytest.mark.long) for n in KINDS],
)
def test_a_chip_is_read_alone_stacked_saved_and_differentiated(name, tmp_path):
    config, path = KINDS[name]
    W, x = problem()
    make = jax.jit(lambda W, key: program(W, config, key, path=path))
    read = jax.jit(matmul)
    chip = replace(make(W, KEY), name="blocks.0")
    defined = program(W, config, KEY, path="definition")
    y = read(x, chip)

    def same(got, wanted, tolerance=1e-5):
        most = np.abs(wanted).max(initial=0)
        assert_allclose(got, wanted, rtol=0, atol=tolerance * most)

    if config.distorts:
        wanted = truncated(chip)
    else:
        shape = (len(defined.geometry.rows), W.shape[1])
        scale = np.broadcast_to(np.asarray(defined.scale, float), shape)
        oracle = crossbar_oracle.Chip(np.asarray(defined.cells, float), None, scale)
        wanted = crossbar_oracle.read(oracle, np.asarray(x), config).y
    same(y, wanted, 1e-4 if config.tile.wire else 1e-5)
    same(y, read(x, defined))
    same(y, matmul(x, program(W, config, KEY, path=path)))
    assert crossbar.explain(chip).path == chip.plan.path
    crossbar.save_chip(chip, tmp_path / "chip.safetensors")
    loaded = crossbar.load_chip(tmp_path / "chip.safetensors")
    assert loaded.config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(chip)
    assert_array_equal(read(x, loaded), y)
    # Any leading axes are a batch: none, two, and an empty one.
    for shape in ((), (2, 2), (3, 0)):
        vectors = x[: math.prod(shape)].reshape(*shape, x.shape[1])
        same(read(vectors, chip), y[: math.prod(shape)].reshape(*shape, y.shape[1]))
    keys = jax.random.split(KEY, 2)
    chips = jax.vmap(make)(jnp.stack([W, -2 * W]), keys)
    stacked = jax.vmap(read, (None, 0))(x, chips)
    same(stacked[1], read(x, make(-2 * W, keys[1])))
    narrow = x.astype(jnp.bfloat16)
    wide = read(narrow.astype(x.dtype), chip).astype(jnp.bfloat16)
    assert_array_equal(read(narrow, chip), wide)
    # Derivatives pass straight through the converters, forwards and backwards, and through programming.
    weights = np.asarray(crossbar.programmed_weights(chip))
    forwards = jax.jit(lambda dx: jax.jvp(lambda x: matmul(x, chip), (x,), (dx,))[1])
    same(forwards(x), np.asarray(x) @ weights)
    backwards = jax.jit(jax.grad(lambda x: jnp.sum(y * matmul(x, chip))))
    same(backwards(x), np.asarray(y) @ weights.T)
    of_weights = jax.grad(lambda W: jnp.sum(crossbar.programmed_weights(make(W, KEY))))
    same(of_weights(W), np.ones_like(W))


def test_an_eager_read_is_compiled_once(caplog):
    chip = program(jnp.ones((11, 13)), CrossbarConfig(adc=ADC(bits=6, range="max")))
    for read in (matmul, probe):
        with jax.log_compiles():
            read(jnp.ones((2, 11)), chip)
            assert "Compiling" in caplog.text
            caplog.clear()
            read(jnp.zeros((2, 11)), chip)
            assert "Compiling" not in caplog.text


# Values of a configuration.


@pytest.mark.long
@pytest.mark.usefixtures("fusion_emitters")
def test_values_before_an_adc_have_the_derivatives_of_finite_differences():
    """With common random numbers. Values that no ADC rounds have theirs in `test_fuzz.py`."""
    at = {"gain": 0.1, "offset": 0.2, "noise": 0.05, "ratio": 5.0, "current": 0.9}
    at |= {"voltage": 0.3, "scale": 0.25}
    wide = ADC(bits=16, range="given", limits=((-8.0, 8.0),) * 4)

    @jax.jit
    @jax.value_and_grad
    def both(values):
        adc = replace(wide, offset_error=values["offset"], gain_error=values["gain"])
        device = Device(
            iv=crossbar.Sinh(values["voltage"], values["scale"]),
            read_noise=ReadNoise(values["noise"]),
        )
        config = CrossbarConfig(
            cell=Cell(bits=(2, 2, 2, 2), on_off_ratio=values["ratio"]),
            dac=None,
            adc=adc,
            tile=Tile(rows=8, current_limit=values["current"]),
            device=device,
        )
        chip = with_read_key(program(W, config, KEY), jax.random.key(12))
        return jnp.sum(C * matmul(x, chip))

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        W = jnp.asarray(rng.normal(size=(20, 7)))
        x = jnp.asarray(rng.normal(size=(3, 20)))
        C = jnp.asarray(rng.normal(size=(3, 7)))
        at = {name: jnp.asarray(value) for name, value in at.items()}
        _, gradient = both(at)
        for name, value in at.items():  # steps of the ADC are small over a distance
            step = (0.3 if name in ("gain", "offset", "noise") else 0.03) * value
            rise = (
                both(at | {name: value + step})[0] - both(at | {name: value - step})[0]
            )
            assert abs(rise) > 1e-3 * step
            assert_allclose(
                gradient[name], rise / (2 * step), rtol=0.05, atol=1e-8, err_msg=name
            )


def test_compensation_cancels_a_drift_that_is_the_same_in_all_cells():
    """Rounding of inputs, which the derivative passes straight through, has no part in it."""
    W, x = problem()

    def loss(exponent, compensate):
        drift = crossbar.PowerLaw(exponent)
        device = Device(drift=drift, time=1e4, compensate=compensate)
        config = CrossbarConfig(dac=DAC(bits=4), device=device)
        return jnp.sum(matmul(x, program(W, config, KEY))[:, 0])

    both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    young, slope = both(jnp.float32(0.05), True)
    old, _ = both(jnp.float32(0.1), True)
    assert_allclose(young, old, rtol=1e-5)
    assert abs(slope) < 1e-4 * abs(both(jnp.float32(0.05), False)[1])


def test_an_input_of_zero_has_no_noise_and_no_undefined_derivative():
    @jax.jit
    @jax.grad
    def gradient(sigma):
        noise = ReadNoise(0.1, "proportional")
        device = Device(programming=crossbar.Independent(sigma), read_noise=noise)
        chip = program(jnp.ones((6, 5)), CrossbarConfig(device=device), KEY)
        return jnp.sum(matmul(jnp.zeros((2, 6)), with_read_key(chip, KEY)))

    assert gradient(jnp.float32(0.1)) == 0


# Measured cells, and the range of floats.


@pytest.mark.parametrize("name", ["two-sided", "unit column"])
def test_measured_conductances_are_read_like_those_that_are_modelled(name):
    """Every cell's own target, read back, is the same chip; a measured error is that of the weights."""
    config = CrossbarConfig(
        cell=Cell(on_off_ratio=8.0), encoding=ENCODINGS[name], tile=SMALL, dac=None
    )
    W, x = problem()
    perfect = program(W, config, path="definition")
    tops = np.asarray(perfect.geometry.levels).reshape(-1, 1, 1, 1, 1, 1)
    G = jnp.asarray(1 / 8 + np.asarray(perfect.cells) / tops * (7 / 8), jnp.float32)
    again = program(W, config, conductances=G)
    assert_allclose(again.codes, perfect.codes, rtol=0, atol=1e-3)
    noise = np.random.default_rng(0).normal(scale=0.02, size=G.shape)
    measured = jnp.maximum(G + jnp.asarray(noise, jnp.float32), 0)
    for path in ("product", "definition"):
        chip = program(W, config, conductances=measured, path=path)
        y = np.asarray(x) @ np.asarray(crossbar.programmed_weights(chip))
        assert_allclose(matmul(x, chip), y, rtol=0, atol=1e-3)
        assert np.abs(y - x @ W).max() > 0.01


def test_weights_whose_code_would_underflow_have_fewer_codes():
    """Each is right to the smallest normal number; smaller ones are zeros for XLA itself."""
    W, x = problem()
    W = W.at[:, 2].set(1e-37 * jnp.linspace(-1, 1, 30))
    chip = program(W, CrossbarConfig(dac=None, mapping=Mapping(scale="column")))
    weights = crossbar.programmed_weights(chip)[:, 2]
    assert_allclose(weights, W[:, 2], rtol=0, atol=1.2e-38)
    y = 1e30 * np.asarray(x, float) @ np.asarray(weights, float)
    assert_allclose(matmul(1e30 * x, chip)[:, 2], y, rtol=1e-4, atol=1e-13)


@pytest.mark.parametrize(
    ("mapping", "adc"),
    [("matrix", None), ("tile", None), ("column", ADC(bits=8, range="max"))],
)
def test_only_results_out_of_range_are_lost(mapping, adc):
    """Powers of two on weights and inputs change no bit of a result but its exponent."""
    config = CrossbarConfig(mapping=Mapping(scale=mapping), adc=adc, tile=Tile(rows=16))
    rng = np.random.default_rng(0)
    W = jnp.asarray(rng.uniform(0.1, 1, (64, 9)), jnp.float32)
    x = jnp.asarray(rng.uniform(0.1, 1, (4, 64)), jnp.float32)
    read = jax.jit(lambda W, x: matmul(x, program(W, config)))
    y = np.asarray(read(W, x), float)
    for i, j in ((1, -120), (118, -40), (-90, 100)):
        scaled = read(W * jnp.float32(2.0**i), x * jnp.float32(2.0**j))
        assert_array_equal(np.asarray(scaled, float), y * 2.0 ** (i + j))


def test_wires_that_lose_too_much_are_nan_and_chebyshev_converges():
    ideal = crossbar.PRESETS["ideal"]

    def currents(**solver):
        wire = Wire(row_resistance=4e-2, column_resistance=4e-2, **solver)
        config = replace(ideal, tile=Tile(rows=None, cols=None, wire=wire))
        return matmul(jnp.ones((1, 32)), program(jnp.ones((32, 32)), config))

    assert jnp.isnan(currents(relaxation=1.0, iterations=100)).all()
    assert jnp.isnan(currents(iterations=2)).all()
    assert jnp.isfinite(currents()).all()


# Ranges of ADCs.


def test_granular_steps_of_whole_sums_warn_where_they_clip():
    W, x = problem(128, 9, 16)
    wide = CrossbarConfig(adc=ADC(bits=14, range="granular", convert="sum"))
    narrow = CrossbarConfig(adc=ADC(bits=8, range="granular", convert="sum"))
    assert probe(x, program(W, wide))[1].clip_share.max() < 0.02
    with pytest.warns(
        UserWarning, match=r"covers 127 levels .* usually 1,437, .* clip"
    ):
        chip = program(W, narrow)
    assert probe(x, chip)[1].clip_share.max() > 0.4


def test_ranges_that_lose_bits_do_not_pass_for_lossless_ones():
    """A lossless ADC leaves one product, which cannot clip: refused, and NaN where a program cannot refuse."""
    W, x = problem()
    chip = program(W, granular(9))
    assert chip.plan.path == "product"
    narrow = replace(chip, limits=chip.limits / 16)
    with refused(r"chip.limits lose bits, .* path='loop'"):
        matmul(x, narrow)
    read = jax.jit(lambda limits: matmul(x, replace(chip, limits=limits)))
    assert jnp.isnan(read(narrow.limits)).all()


def test_a_calibrated_chip_that_became_one_product_is_calibrated_again():
    W, x = problem()
    chip = program(W, CrossbarConfig(adc=ADC(bits=10), tile=Tile(rows=10)))
    chip = crossbar.calibrated(chip, probe(x, chip)[1])
    assert chip.plan.path == "product"
    again = crossbar.calibrated(chip, probe(2 * x, chip)[1])
    assert_array_equal(matmul(x, again), matmul(x, chip))


def test_a_transfer_curve_is_read_conversion_by_conversion():
    """Also where no bits are lost, and with ranges from data."""
    W, x = problem()
    wide = single_slices("truncating", bits=16, range="granular")
    assert "transfer curve" in program(W, wide).plan.reason
    chip = program(W, single_slices("truncating", range="calibrated"))
    chip = crossbar.calibrated(chip, probe(x, chip)[1])
    assert_allclose(matmul(x, chip), truncated(chip), rtol=0, atol=1e-5)


# Noise.


def test_noise_is_the_same_on_every_path():
    W, x = problem(80, 6)
    quiet = CrossbarConfig(tile=Tile(rows=40), adc=ADC(bits=6, range="max"))
    noise = ReadNoise(0.1, "proportional")
    noisy = replace(quiet, device=Device(read_noise=noise))
    without = matmul(x, program(W, quiet, path="loop"))
    least = float(jnp.abs(without).max()) / 1000  # less than a code is worth
    paths = ("loop", "packed")
    reads = [matmul(x, with_read_key(program(W, noisy, path=p), KEY)) for p in paths]
    assert np.mean(np.abs(reads[0] - without) > least) > 0.5
    assert_allclose(reads[1], reads[0], rtol=0, atol=least)


def test_draws_are_the_same_everywhere():
    """Written down once. Those of other generators and dtypes are of `jax.random`."""

    def normal(key, dtype):
        return ReadNoise(1.0).draw(jnp.zeros(3, dtype), key)

    assert_allclose(
        normal(KEY, jnp.float32), [0.2111731, -0.2799265, 0.5688647], rtol=1e-5
    )
    rbg = jax.random.key(0, impl="rbg")
    assert_array_equal(normal(rbg, jnp.float32), jax.random.normal(rbg, 3))
    with jax.enable_x64(True):
        wide = jax.random.normal(KEY, 3, jnp.float64)
        assert_array_equal(normal(KEY, jnp.float64), wide)


# Accelerators and memory.


def compiled(chip):
    """Return a jitted read of a chip with a key, and the chip's leaves."""
    leaves, structure = jax.tree.flatten(chip)

    @jax.jit
    def read(x, leaves):
        return matmul(x, with_read_key(jax.tree.unflatten(structure, leaves), KEY))

    return read, leaves


@pytest.mark.parametrize(
    ("noise", "path"), [(None, "definition"), (ReadNoise(0.1), "packed")]
)
def test_a_tpu_draws_noise_for_each_conversion_and_else_reads_by_definition(
    noise, path
):
    config = CrossbarConfig(adc=ADC(), device=Device(read_noise=noise))
    with tiny.for_tpu():
        assert program(problem()[0], config, KEY).plan.path == path


@pytest.mark.parametrize(("slice_bits", "is_narrow"), [(4, True), (9, False)])
def test_an_accelerator_multiplies_small_integers_in_bfloat16(slice_bits, is_narrow):
    """The sums are exact. Slices of nine bits are not bfloat16 numbers."""
    W, x = problem()
    dac = DAC(bits=slice_bits + 1, slice_bits=slice_bits)
    config = CrossbarConfig(dac=dac, adc=ADC(range="max"))
    read, leaves = compiled(program(W, config, path="definition"))
    y = read(x, leaves)
    with tiny.for_tpu():
        assert ("bf16" in read.lower(x, leaves).as_text()) == is_narrow
        assert_array_equal(read(x, leaves), y)


_RESISTIVE = Wire(row_resistance=1e-3, column_resistance=1e-3)
_CLIPPED = Device(read_noise=ReadNoise(0.1, clip=True))


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        ({"tile": Tile(rows=1)}, (512, 256, 128)),
        ({"tile": Tile(rows=32, wire=_RESISTIVE)}, (256, 256, 64)),
        ({"tile": Tile(rows=32), "device": _CLIPPED}, (256, 256, 64)),
    ],
    ids=["conversions", "wires", "cells"],
)
def test_a_read_that_would_take_much_memory_is_computed_in_parts(parts, sizes):
    """All conversions, or all cells for every input, would take between 0.9 and 1.9 GB at once."""
    W, x = problem(*sizes)
    config = CrossbarConfig(adc=ADC(range="max"), **parts)
    read, leaves = compiled(program(W, config, path="definition"))
    memory = read.lower(x, leaves).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5e9


def test_a_read_in_parts_gives_the_read_at_once():
    W, x = problem(512, 256, 24)  # all conversions would take 0.36 GB
    config = CrossbarConfig(adc=ADC(range="max"), tile=Tile(rows=1))
    chip = program(W, config, path="definition")
    few = matmul(x[-3:], chip)
    assert_allclose(matmul(x, chip)[-3:], few, rtol=1e-6, atol=1e-5)
