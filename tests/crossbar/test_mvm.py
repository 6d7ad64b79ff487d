"""Reads as functions: gradients, seeds, sweeps, noise, wires, mismatch, memory."""

import dataclasses
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from crossbar_problems import problem
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    PCM_DRIFT,
    Cell,
    CrossbarConfig,
    Device,
    Encoding,
    Independent,
    Mapping,
    Proportional,
    ReadNoise,
    Sinh,
    StuckAt,
    Tile,
    Wire,
    calibrated,
    matmul,
    probe,
    program,
    programmed_weights,
    with_read_key,
)

KEY = jax.random.key(11)
module = importlib.import_module("lorafusion_jax.crossbar.read.definition")
UNIT = Encoding(kind="offset", unit_column=True)
NOISY = Device(programming=Independent(0.05))


def given(top, slices=4, signed=True, **others):
    return ADC(range="given", limits=((-top if signed else 0.0, top),) * slices, **others)


def changed(config, **parts):
    """Return the config with `tile__rows=3` in config.tile.rows."""
    for path, value in parts.items():
        part, field = path.split("__")
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{field: value})})
    return config


# Gradients


def central(f, at, direction, step=1e-5):
    return (f(at + step * direction) - f(at - step * direction)) / (2 * step)


@pytest.mark.parametrize(
    "path, scale", [pytest.param(None, "matrix", marks=pytest.mark.long), ("loop", "tile"), ("definition", "column")]
)
def test_gradients_of_inputs_and_weights_pass_straight_through_rounding(path, scale):
    """Those of x @ W, with W as programmed for the inputs: rounding is passed straight through."""
    config = CrossbarConfig(
        mapping=Mapping(scale=scale), tile=Tile(rows=8, cols=4), dac=DAC(scaling="fixed"), adc=given(3.0), device=NOISY
    )
    with jax.enable_x64(True):
        W, x = (a.astype(float) for a in problem())
        rng = np.random.default_rng(3)
        C, dx, dW = (jnp.asarray(rng.normal(size=shape)) for shape in ((4, 9), x.shape, W.shape))

        def loss(x, W):
            return jnp.sum(C * jnp.sin(matmul(x, program(W, config, KEY, path=path))))

        g_x, g_W = jax.jit(jax.grad(loss, (0, 1)))(x, W)
        state = program(W, config, KEY, path=path)
        real = programmed_weights(state)
        y = matmul(x, state)

        def smooth(moved):
            return jnp.sum(C * jnp.sin(y + moved))

        at_x = central(lambda other: smooth((other - x) @ real), x, dx)
        at_W = central(lambda other: smooth(x @ (other - W)), W, dW)
        np.testing.assert_allclose(jnp.sum(g_x * dx), at_x, rtol=1e-6)
        np.testing.assert_allclose(jnp.sum(g_W * dW), at_W, rtol=1e-6)


def test_gradients_stop_where_the_dac_clips():
    config = CrossbarConfig(dac=DAC(scaling="fixed", limit=0.5))
    W, x = problem()
    g_x = jax.grad(lambda x: jnp.sum(matmul(x, program(W, config))))(x)
    inside = np.abs(x) <= 0.5
    assert 0.2 < inside.mean() < 0.8
    assert (np.asarray(g_x)[~inside] == 0).all()
    assert (np.asarray(g_x)[inside] != 0).all()
    g_W = jax.grad(lambda W: jnp.sum(matmul(x, program(W, config))))(W)
    wanted = np.broadcast_to(np.clip(x, -0.5, 0.5).sum(0)[:, None], W.shape)
    np.testing.assert_allclose(g_W, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", [pytest.param("loop", marks=pytest.mark.long), "definition"])
def test_gradients_of_adc_ranges_are_those_of_clipping(path):
    """Those of clipping: rounding aside, sums beyond the range follow it, others do not."""
    tops = np.asarray([1.7, 2.3, 1.9, 0.8])
    config = CrossbarConfig(tile=Tile(rows=8), dac=DAC(scaling="fixed"))
    with jax.enable_x64(True):
        W, x = (a.astype(float) for a in problem())
        state = program(W, changed_adc(config, jnp.asarray(tops)), path="definition")
        cells, C = np.asarray(state.cells), np.random.default_rng(3).normal(size=(4, 9))

        def surrogate(tops):
            n, y = np.rint(np.asarray(x) * 127), 0.0
            heights = [8, 8, 8, 6]
            start = 0
            for r, height in enumerate(heights):
                u_all = n[:, start : start + height]
                start += height
                for k in range(4):
                    g = cells[k, 0, r, 0, -height:] - cells[k, 1, r, 0, -height:]
                    for j in range(7):
                        u = np.sign(u_all) * ((np.abs(u_all).astype(int) >> j) & 1)
                        y = y + 4.0**k * 2.0**j * np.clip(u @ g, -3 * tops[k], 3 * tops[k])
            return np.sum(C * y * np.asarray(state.scale) / 127)

        def loss(tops):
            each = changed_adc(config, tops)
            return jnp.sum(jnp.asarray(C) * matmul(x, program(W, each, path=path)))

        gradient = jax.jit(jax.grad(loss))(jnp.asarray(tops))
        eye = 1e-6 * np.eye(4)
        wanted = [(surrogate(tops + e) - surrogate(tops - e)) / 2e-6 for e in eye]
        assert np.abs(wanted).min() > 0.01
        np.testing.assert_allclose(gradient, wanted, rtol=1e-6)
        each = jax.jit(jax.vmap(jax.grad(loss)))(jnp.stack([jnp.asarray(tops), jnp.asarray(tops)]))
        np.testing.assert_allclose(each, np.stack([wanted, wanted]), rtol=1e-6)


def changed_adc(config, tops):
    limits = jnp.stack([-tops, tops], axis=1)
    return dataclasses.replace(config, tile=Tile(rows=8, partition="full"), adc=ADC(range="given", limits=limits))


@pytest.mark.long
def test_adc_ranges_are_learned():
    config = CrossbarConfig(tile=Tile(rows=8, partition="full"))
    W, x = problem(batch=16)
    ideal = x @ W

    @jax.jit
    @jax.value_and_grad
    def error(logs):
        each = changed_adc(config, jnp.exp(logs))
        return jnp.mean(jnp.square(matmul(x, program(W, each)) - ideal))

    logs = jnp.log(jnp.full((4,), 0.7, jnp.float32))
    before, gradient = error(logs)
    for _ in range(20):
        logs = logs - 0.1 * gradient / jnp.linalg.norm(gradient)
        after, gradient = error(logs)
    assert after < 0.3 * before


# Seeds, sweeps and devices

RANDOM = CrossbarConfig(
    tile=Tile(rows=10, cols=4),
    adc=ADC(bits=6, range="max", gain_error=0.02),
    device=Device(programming=Independent(0.03), stuck=StuckAt(low=0.02), drift=PCM_DRIFT, time=100.0),
)


@pytest.mark.long
def test_a_key_is_a_chip():
    W, x = problem()
    # Only these emitters round one chip as they round several.
    options = tiny.emitters(True)
    chips = jax.jit(jax.vmap(lambda key: program(W, RANDOM, key)), compiler_options=options)(jax.random.split(KEY, 3))
    y = jax.jit(jax.vmap(lambda state: matmul(x, state)))(chips)
    of_key = jax.jit(lambda key: program(W, RANDOM, key), compiler_options=options)
    for i, key in enumerate(jax.random.split(KEY, 3)):
        one = of_key(key)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(jax.tree.map(lambda leaf: leaf[i], chips)), strict=True):  # noqa: B023
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(matmul(x, one), y[i], rtol=0, atol=1e-6 * float(jnp.abs(y).max()))
    assert jnp.abs(y[0] - y[1]).max() > 0.01


@pytest.mark.long
def test_device_count_changes_nothing():
    assert jax.device_count() == 4
    W, x = problem()
    keys = jax.random.split(KEY, 8)
    read = jax.jit(jax.vmap(lambda key: matmul(x, program(W, RANDOM, key))))
    mesh = Mesh(np.asarray(jax.devices()), ("chips",))
    spread = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("chips")))
    y = read(spread)
    assert len(y.sharding.device_set) == 4
    np.testing.assert_allclose(y, read(keys), rtol=0, atol=1e-6 * float(jnp.abs(y).max()))


@pytest.mark.parametrize(
    "path, values",
    [
        pytest.param("device__programming", [0.0, 0.02, 0.1], marks=pytest.mark.long),
        pytest.param("device__time", [1.0, 1e3, 1e6], marks=pytest.mark.long),
        pytest.param("cell__on_off_ratio", [3.0, 10.0, 100.0], marks=pytest.mark.long),
        ("tile__current_limit", [0.5, 1.0, 4.0]),
        pytest.param("adc__limits", [1.0, 2.0, 4.0], marks=pytest.mark.long),
        pytest.param("adc__gain_error", [0.0, 0.01, 0.05], marks=pytest.mark.long),
        ("adc__offset_error", [0.0, 0.1, 0.5]),
    ],
)
def test_sweeps_are_loops(path, values):
    """vmap over one physical value of the configuration, and over a whole pytree of them."""
    W, x = problem()
    base = CrossbarConfig(tile=Tile(rows=10), adc=given(3.0, bits=6), device=Device(drift=PCM_DRIFT, time=1.0))

    def config(value):
        if path == "device__programming":
            value = Proportional(value)
        if path == "adc__limits":
            value = jnp.stack([-value, value])[None] * jnp.ones((4, 1), jnp.float32)
        return changed(base, **{path: value})

    @jax.jit
    def read(value):
        each = config(value)
        return matmul(x, program(W, each, KEY))

    swept = jax.jit(jax.vmap(read))(jnp.asarray(values, jnp.float32))
    assert jnp.abs(swept[0] - swept[2]).max() > 1e-3
    for value, y in zip(values, swept, strict=True):
        # A conversion next to a tie may fall either way: one code of the lowest slice, of 127 * 3 * 2^7.
        difference = np.abs(np.asarray(read(jnp.float32(value)) - y))
        assert np.median(difference) < 1e-5
        assert (difference > 1e-4).mean() < 0.05


@pytest.mark.parametrize("adc", [pytest.param(ADC(bits=6, range="max"), marks=pytest.mark.long), given(3.0, bits=6)])
def test_an_on_off_ratio_is_swept_under_an_adc_whose_range_does_not_follow_it(adc):
    """Differential pairs subtract Gmin, so that perfect sums are integers at any ratio; the range in levels is not."""
    W, x = problem()

    def read(ratio):
        config = CrossbarConfig(cell=Cell(on_off_ratio=ratio), tile=Tile(rows=10), adc=adc)
        return matmul(x, program(W, config))

    ratios = (3.0, 100.0)
    swept = jax.jit(jax.vmap(read))(jnp.asarray(ratios, jnp.float32))
    for ratio, y in zip(ratios, swept, strict=True):
        np.testing.assert_allclose(y, read(ratio), rtol=0, atol=2e-5)


def test_a_batch_of_configurations_is_programmed_under_vmap():
    W, x = problem()
    config = CrossbarConfig(device=Device(programming=Independent(0.0)))
    many = jax.tree.map(lambda v: jnp.asarray([v, v], jnp.float32), config)
    many = changed(many, device__programming=Independent(jnp.asarray([0.0, 0.1], jnp.float32)))
    y = jax.vmap(lambda each: matmul(x, program(W, each, KEY)))(many)
    np.testing.assert_allclose(y[0], matmul(x, program(W, config, KEY)), rtol=1e-6, atol=1e-6)
    assert jnp.abs(y[1] - y[0]).max() > 0.1


@pytest.mark.parametrize("path", ["loop", "lookup", "packed", "mosaic", "definition", "product"])
def test_an_empty_batch_has_an_empty_result(path):
    W, _ = problem()
    config = CrossbarConfig(adc=None if path == "product" else ADC(bits=6, range="max"), tile=Tile(rows=10))
    state = program(W, config, path=path)
    empty = jnp.zeros((0, 30), jnp.float32)
    assert matmul(empty, state).shape == jax.jit(lambda x: matmul(x, state))(empty).shape == (0, 9)
    assert matmul(empty.reshape(3, 0, 30), state).shape == (3, 0, 9)
    assert jax.grad(lambda x: jnp.sum(matmul(x, state)))(empty).shape == (0, 30)
    assert probe(empty, state)[0].shape == (0, 9)


def test_calibrating_again_keeps_a_range_that_loses_nothing():
    W, x = problem()
    config = CrossbarConfig(adc=ADC(bits=10), tile=Tile(rows=10))
    state = program(W, config)
    state = calibrated(state, probe(x, state)[1])
    assert state.plan.path == "product"
    again = calibrated(state, probe(2 * x, state)[1])
    np.testing.assert_array_equal(matmul(x, again), matmul(x, state))


def test_granular_steps_of_whole_sums_warn_where_they_clip():
    W, x = problem(128, 9, 16)
    wide, narrow = (CrossbarConfig(adc=ADC(bits=bits, range="granular", convert="sum")) for bits in (14, 8))
    clipped = probe(x, program(W, wide))[1].clip_share
    assert clipped.max() < 0.02
    with pytest.warns(UserWarning, match=r"'granular' with convert='sum' covers 127 levels .* usually 1,437, .* clip:"):
        state = program(W, narrow)
    assert probe(x, state)[1].clip_share.max() > 0.4


# Read noise


@pytest.mark.parametrize("adc", [None, pytest.param(given(3.0, bits=6), marks=pytest.mark.long)])
def test_the_same_key_gives_the_same_read_noise(adc):
    config = CrossbarConfig(adc=adc, tile=Tile(rows=10), device=Device(read_noise=ReadNoise(0.05)))
    W, x = problem()
    state = program(W, config)
    one, again, other = (matmul(x, with_read_key(state, jax.random.key(i))) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert jnp.abs(one - other).max() > 0.05
    for each in (state, program(W, config, path="definition")):
        same = matmul(jnp.stack([x[0], x[0]]), with_read_key(each, KEY))
        assert jnp.abs(same[0] - same[1]).max() > 0.05


@pytest.mark.parametrize("kind", ["independent", pytest.param("proportional", marks=pytest.mark.long)])
@pytest.mark.parametrize("encoding", [Encoding(), Encoding(kind="offset"), UNIT])
@pytest.mark.parametrize("path", [None, "definition"])
def test_read_noise_has_the_variance_of_its_cells(path, encoding, kind):
    """Of every output, summed in NumPy over slices, polarities, rows and the unit column."""
    sigma, draws, ratio = 0.04, 3000, 4.0
    config = CrossbarConfig(
        cell=Cell(bits=(4, 4), on_off_ratio=ratio),
        encoding=encoding,
        tile=Tile(rows=10, cols=4),
        dac=DAC(bits=4, slice_bits=2, scaling="fixed"),
        device=Device(read_noise=ReadNoise(sigma, kind)),
    )
    W, x = problem(batch=1)
    still = dataclasses.replace(config, device=Device())
    state = program(W, config, path=path)
    read = jax.jit(jax.vmap(lambda key: matmul(x, with_read_key(state, key))[0]))
    y = np.asarray(read(jax.random.split(KEY, draws)), float)

    cells = np.asarray(program(W, still, path="definition").cells, float)  # [K, P, R, C, rows, cols + units]
    G = 1 / ratio + cells / 15 * (1 - 1 / ratio)
    noise = np.full_like(G, sigma) if kind == "independent" else sigma * G
    n = np.rint(np.asarray(x[0], float) * 7)
    power = sum(16.0**j * (np.sign(n) * ((np.abs(n).astype(int) >> 2 * j) & 3)) ** 2 for j in range(2))
    variance = (noise * 15 / (1 - 1 / ratio)) ** 2 * 256.0 ** np.arange(2)[:, None, None, None, None, None]
    variance = np.einsum("rx,kprcxo->co", power.reshape(3, 10), variance)
    if encoding.unit_column:
        variance = variance[:, :-1] + variance[:, -1:]
    variance = variance.reshape(-1)
    widths = [4, 4, 1] if variance.size != 9 else [3, 3, 3]
    keep = np.concatenate([np.arange(max(widths)) < w for w in widths])
    wanted = variance[keep] * float(state.scale[0, 0]) ** 2 / 49

    ideal = np.asarray(matmul(x, program(W, still))[0], float)
    error = y - ideal
    assert np.abs(error.mean(0) / np.sqrt(wanted / draws)).max() < 4.5
    np.testing.assert_allclose(error.var(0) / wanted, 1, atol=4.5 * np.sqrt(2 / draws))
    if encoding.unit_column and kind == "independent":
        correlation = np.corrcoef(error.T)
        array = np.repeat(np.arange(len(widths)), widths)
        same = (array[:, None] == array[None, :]) & ~np.eye(9, dtype=bool)
        # The unit column's cells are as noisy as every other column's: half of the variance is shared.
        np.testing.assert_allclose(correlation[same], 0.5, atol=0.08)
        assert np.abs(correlation[array[:, None] != array[None, :]]).max() < 0.08


# Wires, nonlinear cells, mismatch, measured arrays


def rms(y):
    return float(jnp.sqrt(jnp.mean(jnp.square(y))))


@pytest.mark.parametrize("encoding", [Encoding(), UNIT])
@pytest.mark.parametrize("adc", [None, given(4.0, bits=8)])
def test_errors_of_sliced_weights_grow_with_the_resistance_of_wires(encoding, adc):
    config = CrossbarConfig(encoding=encoding, tile=Tile(rows=16), adc=adc)
    W, x = problem()
    with jax.enable_x64(True):
        W, x = W.astype(float), x.astype(float)
        ideal = matmul(x, program(W, config))

        def read(resistance):
            wire = Wire(row_resistance=resistance, column_resistance=resistance, tolerance=1e-6)
            each = changed(config, tile__wire=wire)
            return matmul(x, program(W, each))

        errors = [rms(y - ideal) / rms(ideal) for y in jax.lax.map(read, jnp.asarray([0, 1e-4, 1e-3, 1e-2]))]
    assert errors[0] < (1e-5 if adc is None else 0.02)
    assert errors[0] < errors[1] * (1 if adc is None else 2) and errors[1] < errors[2] < errors[3]
    assert errors[3] > 0.02


def test_errors_grow_as_the_current_limit_falls():
    W, x = problem()
    config = CrossbarConfig(tile=Tile(rows=10))
    ideal = matmul(x, program(W, config))
    errors = []
    for limit in (100.0, 2.0, 1.0, 0.5):
        each = changed(config, tile__current_limit=limit)
        state = program(W, each)
        assert state.plan.path == "definition"
        errors.append(rms(matmul(x, state) - ideal))
    assert errors[0] < 1e-5
    assert errors[0] < errors[1] < errors[2] < errors[3]


def test_currents_are_cut_on_either_side():
    W, x = problem()
    tile, dac = Tile(current_limit=0.5), DAC(slice_bits=None, scaling="fixed")
    state = program(W, CrossbarConfig(cell=Cell(bits=(8,)), dac=dac, tile=tile))
    G = np.asarray(state.cells, float)[0, :, 0, 0] / 255
    currents = np.einsum("br,prc->pbc", np.rint(np.asarray(x, float) * 127) / 127, G)
    assert currents.min() < -0.5 and currents.max() > 0.5
    positive, negative = np.clip(currents, -0.5, 0.5)
    np.testing.assert_allclose(matmul(x, state), (positive - negative) * 255 * np.asarray(state.scale), atol=1e-4)


def test_nonlinear_cells_carry_less_current_at_part_of_the_voltage():
    """One-bit pulses see G at the read voltage; wider ones see less current at part of it, as sinh says."""
    W, x = problem()
    serial = CrossbarConfig(device=Device(iv=Sinh(read_voltage=0.5)))
    ideal = CrossbarConfig()
    np.testing.assert_allclose(matmul(x, program(W, serial)), matmul(x, program(W, ideal)), rtol=0, atol=1e-4)
    wide = changed(serial, dac__slice_bits=None, dac__scaling="fixed")
    n = np.rint(np.asarray(x, float) * 127) / 127
    state = program(W, wide)
    bent = np.sinh(n * 2.0) / np.sinh(2.0) @ np.asarray(programmed_weights(state), float)
    np.testing.assert_allclose(matmul(x, state), bent, rtol=0, atol=1e-4)
    assert np.abs(bent - np.asarray(x @ W)).max() > 0.5


def test_gains_scale_and_offsets_shift_the_codes_of_each_column():
    """Gains scale and offsets shift each column's codes; both are drawn once per chip."""
    W, x = problem(d_out=4)
    config = CrossbarConfig(
        cell=Cell(bits=(8,)), dac=DAC(bits=8, slice_bits=None, scaling="fixed"), adc=given(30.0, slices=1, bits=16)
    )
    ideal = matmul(x, program(W, config))
    keys = jax.random.split(KEY, 4000)

    def reads(**errors):
        each = dataclasses.replace(config, adc=dataclasses.replace(config.adc, **errors))
        return np.asarray(jax.jit(jax.vmap(lambda key: matmul(x, program(W, each, key))))(keys), float)

    gain = reads(gain_error=0.03) / np.asarray(ideal) - 1
    spread = 5 / np.sqrt(2 * len(keys))
    big = np.abs(np.asarray(ideal)) > 0.5
    np.testing.assert_allclose(gain.std(0)[big] / 0.03, 1, atol=spread + 0.01)
    both = big[0] & big[1]
    assert both.any()
    np.testing.assert_allclose(gain[:, 0][:, both], gain[:, 1][:, both], atol=0.01)  # a column's gain is every input's
    offset = reads(offset_error=0.2) - np.asarray(ideal)
    scale = float(jnp.max(jnp.abs(W))) * 255 / 127  # the weight that one unit of current stands for
    np.testing.assert_allclose(offset.std(0) / (0.2 * scale), 1, atol=spread + 0.01)
    np.testing.assert_allclose(offset[:, 0], offset[:, 3], atol=0.02)
    correlation = np.corrcoef(offset[:, 0].T)
    assert np.abs(correlation - np.eye(4)).max() < 5 / np.sqrt(len(keys))


def test_an_offset_is_added_to_what_the_gain_has_scaled():
    W, x = problem()
    state = program(W, CrossbarConfig(adc=given(30.0, bits=16, gain_error=0.5, offset_error=0.5)), KEY)
    without = dataclasses.replace(state, gain=None)
    nothing = jnp.zeros_like(x)
    np.testing.assert_array_equal(matmul(nothing, state), matmul(nothing, without))
    assert jnp.abs(matmul(x, state) - matmul(x, without)).max() > 0.1 and matmul(nothing, state).any()


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(two_sided=True), Encoding(kind="offset"), UNIT])
def test_measured_conductances_are_read_like_those_that_are_modelled(encoding):
    """Every cell's own target, read back, is the same chip; a measured error is W's."""
    config = CrossbarConfig(cell=Cell(on_off_ratio=8.0), encoding=encoding, tile=Tile(rows=10, cols=5))
    W, x = problem()
    perfect = program(W, config, path="definition")
    tops = np.asarray(perfect.geometry.levels).reshape(-1, 1, 1, 1, 1, 1)
    G = 1 / 8 + np.asarray(perfect.cells) / tops * (7 / 8)
    again = program(W, config, conductances=jnp.asarray(G, jnp.float32))
    np.testing.assert_allclose(again.codes, perfect.codes, rtol=0, atol=1e-3)
    np.testing.assert_allclose(matmul(x, again), matmul(x, perfect), rtol=0, atol=1e-4)
    rng = np.random.default_rng(0)
    measured = jnp.asarray(np.maximum(G + rng.normal(scale=0.02, size=G.shape), 0), jnp.float32)
    state = program(W, config, conductances=measured)
    n = np.rint(np.asarray(x, float) / np.abs(np.asarray(x)).max(1, keepdims=True) * 127)
    wanted = n * np.abs(np.asarray(x)).max(1, keepdims=True) / 127 @ np.asarray(programmed_weights(state))
    for path in ("product", "definition"):
        y = matmul(x, program(W, config, conductances=measured, path=path))
        np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-3)
    assert rms(wanted - x @ W) > 0.01


# Memory


def test_a_large_layer_keeps_to_the_stated_budget():
    """1024 x 1024, 1024 inputs: the block of all conversions would be 940 MB."""
    config = CrossbarConfig(adc=ADC(bits=8, range="max"))
    W, x = problem(1024, 1024, 1024)
    leaves, structure = jax.tree.flatten(program(W, config, path="definition"))
    read = jax.jit(lambda x, leaves: matmul(x, jax.tree.unflatten(structure, leaves)))
    temporary = read.lower(x, leaves).compile().memory_analysis().temp_size_in_bytes
    assert 7 * 4 * 8 * 1024 * 1024 * 4 > 3 * module.BUDGET
    assert temporary < 1.5 * module.BUDGET


@pytest.mark.parametrize("scale", ["matrix", "tile", "column"])
def test_a_quantile_of_zero_is_no_full_scale(scale):
    weights = jnp.zeros((10, 4), jnp.float32).at[0].set(jnp.asarray([0.003, -0.002, 0.003, 0.001]))
    config = CrossbarConfig(mapping=Mapping(quantile=0.75, scale=scale))
    np.testing.assert_allclose(programmed_weights(program(weights, config)), weights, atol=0.003 / 127)


def test_weights_beyond_the_quantile_are_clipped_to_it():
    weights, _ = problem()
    top = np.quantile(np.abs(weights), 0.75)
    found = programmed_weights(program(weights, CrossbarConfig(mapping=Mapping(quantile=0.75))))
    np.testing.assert_allclose(found, np.clip(weights, -top, top), rtol=0, atol=0.51 * top / 127)


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(kind="offset", unit_column=True, flip=True)])
def test_rows_of_a_short_tile_lie_next_to_the_converters_and_the_others_are_empty(encoding):
    weights = jnp.abs(problem(d_in=13)[0])  # whose columns are flipped, if any are
    config = CrossbarConfig(encoding=encoding, tile=Tile(rows=10, partition="full"))
    cells = program(weights, config, path="definition").cells[..., :9]
    assert not cells[:, :, 1, :, :7].any() and cells[:, :, 1, :, 7:].any(axis=(0, 1, 2, 4)).all()


def test_two_sided_pairs_lie_about_half_of_the_range():
    config = CrossbarConfig(encoding=Encoding(two_sided=True))
    chip = program(problem()[0], config, path="definition")
    cells = chip.cells
    top = np.reshape(chip.geometry.levels, (-1, 1, 1, 1, 1)) * np.ones(cells[:, 0].shape)
    np.testing.assert_array_equal(cells[:, 0] + cells[:, 1], top)
    assert cells.min() == 0 and (cells <= top[:, None]).all()


@pytest.mark.parametrize("largest", [1e-40, 2e-38, 1e-37, 1e-36])
def test_weights_whose_code_would_underflow_have_fewer_codes(largest):
    """Each is right to the smallest normal number; smaller ones are zeros for XLA itself."""
    weights, x = problem()
    weights = weights.at[:, 2].set(largest * jnp.linspace(-1, 1, 30))
    chip = program(weights, CrossbarConfig(dac=None, mapping=Mapping(scale="column")))
    np.testing.assert_allclose(programmed_weights(chip)[:, 2], weights[:, 2], rtol=0, atol=1.2e-38)
    large = 1e30 * x
    wanted = np.asarray(large, float) @ np.asarray(programmed_weights(chip), float)
    np.testing.assert_allclose(matmul(large, chip)[:, 2], wanted[:, 2], rtol=1e-4, atol=1e-6 * largest * 1e30)
    assert (largest < 1e-38) == (not matmul(large, chip)[:, 2].any())


@pytest.mark.parametrize(("of_weights", "of_inputs"), [(1, -120), (118, -40), (-40, 118), (-90, 100), (100, -120)])
@pytest.mark.parametrize(
    "config",
    [
        CrossbarConfig(),
        CrossbarConfig(dac=None, mapping=Mapping(scale="tile"), tile=Tile(rows=16)),
        CrossbarConfig(adc=ADC(bits=8, range="max"), mapping=Mapping(scale="column")),
    ],
    ids=["product", "tiles", "columns"],
)
def test_only_results_out_of_range_are_lost(config, of_weights, of_inputs):
    """Powers of two on weights and inputs change no bit of a result but its exponent."""
    rng = np.random.default_rng(0)
    weights, x = (jnp.asarray(rng.uniform(0.1, 1, shape), jnp.float32) for shape in ((64, 9), (4, 64)))
    wanted = np.asarray(matmul(x, program(weights, config)), float) * 2.0 ** (of_weights + of_inputs)
    found = matmul(x * jnp.float32(2.0**of_inputs), program(weights * jnp.float32(2.0**of_weights), config))
    np.testing.assert_array_equal(np.asarray(found, float), wanted)


def test_weights_of_eight_bits_are_programmed_as_float32():
    weights, x = problem()
    narrow = weights.astype(jnp.float8_e4m3fn)
    found = matmul(x, inspect.unwrap(program)(narrow, CrossbarConfig()))
    np.testing.assert_array_equal(found, matmul(x, program(narrow.astype(jnp.float32), CrossbarConfig())))


@pytest.mark.parametrize("ratio", [None, jnp.float32(50.0)])
def test_a_calibrated_chip_that_became_one_product_is_read_inside_a_jit(ratio):
    weights, x = problem()
    chip = program(weights, CrossbarConfig(cell=Cell(on_off_ratio=ratio), adc=ADC(bits=10, quantile=1.0)))
    chip = calibrated(chip, probe(x, chip)[1])
    assert chip.plan.path == "product"
    np.testing.assert_allclose(jax.jit(lambda x: matmul(x, chip))(x), matmul(x, chip), rtol=1e-6, atol=1e-6)
