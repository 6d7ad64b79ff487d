"""Device models against their published formulas, by moments of many cells, and the order of effects."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from refusals import refused

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    PCM_DRIFT,
    CrossbarConfig,
    Device,
    Independent,
    Polynomial,
    PowerLaw,
    Tile,
    WriteVerify,
    program,
)

KEY = jax.random.key(7)
N = 40_000
LEVELS = np.array([0.25, 0.5, 0.75, 1.0])


def cells(*levels):
    return jnp.repeat(jnp.asarray(levels, jnp.float32)[:, None], N, 1)


def assert_normal(draws, mean, deviation):
    """Mean, variance and fourth moment of every row within five standard errors of a normal distribution's."""
    mean = np.broadcast_to(mean, len(draws))[:, None]
    deviation = np.broadcast_to(deviation, len(draws))[:, None]
    z = (np.asarray(draws, float) - mean) / deviation
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        error = np.abs((z**power).mean(1) - moment)
        assert error.max() < 5 * math.sqrt(spread / z.shape[1])


def written(device, *levels, g_min=0.0, key=KEY):
    """Return the conductances [levels, N] that cells get which are asked for `levels`, and the mean of their pulses."""
    config = CrossbarConfig(
        cell=crossbar.Cell(bits=None, on_off_ratio=1 / g_min if g_min else None),
        mapping=crossbar.Mapping(weight_bits=None),
        encoding=crossbar.Encoding(kind="offset"),
        tile=Tile(rows=None, cols=None),
        device=device,
    )
    # The last row sets the full scale.
    digits = (cells(*levels, 1.0) - g_min) / (1 - g_min)
    make = jax.jit(lambda W: program(W, config, key, path="definition"))
    chip = make(2 * digits - 1)
    levels_of_cells = np.asarray(chip.cells, float)[0, 0, 0, 0, :-1]
    return g_min + levels_of_cells * (1 - g_min), chip.pulses


_BY_AGE = Polynomial(((0.02,), (0.06,)), shift=((0.0,), (0.1,)), seconds=(1.0, 100.0))
_FAR = replace(_BY_AGE, extrapolate=True, scale=0.5)
_TARGETS = (0.1, 0.4, 1.0)
_SPREADS = ((0.01, 0.04, 0.02), (0.03, 0.06, 0.02))
_SHIFT = (0.0, 0.1, 0.0)
_TABLE = crossbar.Table(_TARGETS, _SPREADS, (_SHIFT,) * 2, seconds=(1.0, 100.0))
_1_OVER_F = replace(PCM_DRIFT, exponent=0.0, spread=0.0)
_GATHERED = math.sqrt(math.log((86_420 + 250e-9) / 500e-9))
_SMALL = crossbar.Flicker(0.01, 0.5, largest=0.015, read_time=1.0)
_HOUR = math.log(3600)


def _read(kind):
    model = crossbar.ReadNoise(0.03, kind)
    return lambda G, key, time: model.draw(G, key)


# By name: a model, the mean and the deviation of its formula at LEVELS, and the age in seconds.
_g = LEVELS
TECHNOLOGIES = {
    "independent": (Independent(0.05), _g, 0.05, None),
    "proportional": (crossbar.Proportional(0.1), _g, 0.1 * _g, None),
    "read noise": (_read("independent"), _g, 0.03, None),
    "proportional read noise": (_read("proportional"), _g, 0.03 * _g, None),
    "PCM": (
        crossbar.PCM_JOSHI_2020,
        _g,
        (0.26348 + 1.9650 * _g - 1.1731 * _g**2) / 25,
        None,
    ),
    "NeuRRAM": (
        crossbar.RERAM_WAN_2022,
        _g,
        np.polyval([-16.815, 45.393, -43.853, 16.03, 0.348], _g) / 40,
        None,
    ),
    "IGVVA": (crossbar.RERAM_MILO_2021, _g, 4.782321 / 225 - 0.009107 * _g, None),
    "CMO": (
        crossbar.RERAM_CMO_2025,
        _g,
        0.0112185391 / 88.19 + 0.01129027418 * _g,
        None,
    ),
    # Half-way between both rows, in the logarithm of time.
    "polynomial of age": (_BY_AGE, _g + 0.05, 0.04, 10.0),
    "polynomial beyond its last age": (_FAR, _g + 0.075, 0.04, 1000.0),
    "table": (
        _TABLE,
        _g + np.interp(_g, _TARGETS, _SHIFT),
        np.interp(_g, _TARGETS, np.mean(_SPREADS, axis=0)),
        10.0,
    ),
    "CMO, an hour later": (
        crossbar.RERAM_CMO_DRIFT,
        _g - 0.08900206 * _HOUR / 88.19,
        (0.41183342 + 0.04201137 * _HOUR) / 88.19,
        3600.0,
    ),
    "CMO, within a second": (
        crossbar.Relaxation(shift=-0.1, spread=0.02, growth=0.01),
        _g,
        0.02,
        0.5,
    ),
    "power law": (
        PowerLaw(0.05, start=20.0, flicker=_SMALL),
        _g * 4.95**-0.05,
        _g * 4.95**-0.05 * np.minimum(0.01 / _g**0.5, 0.015) * math.sqrt(math.log(50)),
        79.0,
    ),
    "1/f noise of PCM": (
        _1_OVER_F,
        _g,
        _g * np.minimum(0.0088 / _g**0.65, 0.2) * _GATHERED,
        86_400.0,
    ),
}


@pytest.mark.parametrize("name", TECHNOLOGIES)
def test_a_cell_technology_has_the_moments_of_its_formula(name):
    model, mean, deviation, age = TECHNOLOGIES[name]
    draw = jax.jit(lambda G, key: model(G, key, age))
    assert_normal(draw(cells(*LEVELS), KEY), mean, deviation)
    few = cells(0.0, *LEVELS)[:, :3]
    keys = jax.random.split(KEY, 3)
    eager = jnp.stack([model(few, key, age) for key in keys])
    assert len(np.unique(eager[:, -1, 0])) == 3
    assert_allclose(jax.vmap(draw, (None, 0))(few, keys), eager, rtol=1e-5)
    # Cells that do not conduct stay finite, and have finite derivatives.
    assert jnp.isfinite(eager).all()
    assert jnp.isfinite(jax.grad(lambda G: jnp.sum(draw(G, KEY)))(few)).all()
    with jax.enable_x64(True):
        assert model(few.astype(jnp.float64), KEY, age).dtype == jnp.float64


def test_ages_beyond_the_last_measurement_are_refused_or_nan():
    wan = crossbar.RERAM_WAN_2022
    for time in (200_000, jnp.float32(2e5), np.array([1.0, 2e5])):
        with refused("at 172800 seconds: .* extrapolate=True"):
            Device(programming=wan, time=time)
    Device(programming=wan, time=jnp.float32(172_800))
    # A verified cell has the error of the first row, and others drift by another model.
    Device(programming=wan, time=1e9, write_verify=WriteVerify(0.1))
    Device(programming=crossbar.PCM_JOSHI_2020, time=1e9)
    aged = jax.jit(lambda time: wan(cells(0.5), KEY, time))
    assert jnp.isfinite(aged(172_800.0)).all() and jnp.isnan(aged(200_000.0)).all()


def _plus(change):
    return lambda G, key, time: G + change


@pytest.mark.parametrize(
    ("device", "conductance"),
    [
        # Conductances are clipped after programming and after drift.
        (Device(programming=_plus(-1.0), drift=_plus(0.25), time=1.0), 0.25),
        (Device(programming=_plus(0.0), drift=_plus(1.0), time=1.0), 1.5),
        (Device(drift=_plus(-1.0), time=1.0), 0.0),
        (Device(programming=_plus(1.0), drift=_plus(-0.25), time=1.0, clip="range"), 0.75),
        (Device(programming=_plus(-1.0), drift=_plus(0.25), time=1.0, clip="range"), 0.35),
        # Drift follows programming and time.
        (Device(programming=_plus(0.1), drift=PowerLaw(0.05), time=999.0), 0.6 * 1000**-0.05),
        (Device(programming=_plus(0.1), drift=PowerLaw(0.05)), 0.6),
        # A cell is verified before it ages.
        (
            Device(
                programming=lambda G, key, time: G if time is None else G + 0.25,
                write_verify=WriteVerify(0.01, pulses=3),
                time=1e6,
            ),
            0.5,
        ),
    ],
)  # fmt: skip
def test_effects_follow_each_other(device, conductance):
    G, pulses = written(device, 0.5, g_min=0.1)
    assert_allclose(G[0, 0], conductance, rtol=1e-5, atol=1e-6)
    assert pulses is None or pulses == 1


@pytest.mark.parametrize(("tolerance", "most"), [(0.02, 30), (0.01, 4)])
def test_cells_are_written_until_they_are_within_the_tolerance_or_out_of_pulses(
    tolerance, most
):
    sigma = 0.05
    verify = WriteVerify(tolerance, pulses=most)
    G, pulses = written(
        Device(programming=Independent(sigma), write_verify=verify), 0.5
    )
    p = math.erf(tolerance / sigma / math.sqrt(2))
    left = (1 - p) ** most
    assert abs(pulses - (1 - left) / p) < 5 * math.sqrt((1 - p) / p**2 / (2 * N))
    outside = np.abs(G - 0.5) > tolerance * (1 + 1e-5)
    assert abs(outside.mean() - left) <= 5 * math.sqrt(left * (1 - left) / N)
    # The variance of a normal distribution truncated at +-c standard deviations.
    c = tolerance / sigma
    density = math.exp(-(c**2) / 2) / math.sqrt(2 * math.pi)
    variance = sigma**2 * (1 - 2 * c * density / p)
    error = 5 * math.sqrt(2 / np.sum(~outside))
    assert np.mean((G[~outside] - 0.5) ** 2) == pytest.approx(variance, rel=error)


def test_stuck_cells_have_their_shares_and_are_written_in_vain():
    stuck = crossbar.StuckAt(low=0.1, high=0.03)
    G, _ = written(Device(stuck=stuck), 0.5, g_min=0.05)
    for value, share in ((0.05, 0.1), (1.0, 0.03), (0.5, 0.87)):
        error = abs(np.mean(np.isclose(G, value)) - share)
        assert error < 5 * math.sqrt(share * (1 - share) / N)
    verify = WriteVerify(0.03, pulses=6)
    stuck = crossbar.StuckAt(low=0.1)
    device = Device(programming=Independent(0.02), write_verify=verify, stuck=stuck)
    _, pulses = written(device, 0.5)
    p = math.erf(0.03 / 0.02 / math.sqrt(2))
    assert pulses == pytest.approx(0.1 * 6 + 0.9 / p, rel=0.02)


def test_compensation_is_of_the_cells_that_hold_weights():
    """A shift of both cells of a pair moves no weight, and cells at Gmin beside the matrix count as nothing."""
    W = jax.random.normal(KEY, (3, 5))
    cell = crossbar.Cell(on_off_ratio=10.0)

    def scale(drift, tile):
        device = Device(drift=drift, time=1e6, compensate=True)
        return program(
            W, CrossbarConfig(cell=cell, tile=tile, device=device), KEY
        ).scale

    large = Tile(rows=3, cols=5)
    fresh = program(W, CrossbarConfig(cell=cell, tile=large), KEY).scale
    assert_allclose(scale(_plus(-0.05), large), fresh, rtol=1e-5)
    drift = PowerLaw(crossbar.LogLinear(0.02, -0.02))
    small = scale(drift, Tile(rows=2, cols=2, partition="full"))
    assert_allclose(small, scale(drift, large), rtol=1e-6)


def test_a_key_is_a_chip_and_effects_draw_independently():
    """Adding one effect does not redraw another."""
    noise = Device(programming=Independent(0.01))
    G, _ = written(noise, 0.5)
    np.testing.assert_array_equal(written(noise, 0.5)[0], G)
    assert np.mean(written(noise, 0.5, key=jax.random.key(8))[0] == G) < 0.1
    stuck = replace(noise, stuck=crossbar.StuckAt(0.1, 0.1))
    with_faults, _ = written(stuck, 0.5)
    working = (with_faults != 0) & (with_faults != 1)
    assert_allclose(with_faults[working], G[working], rtol=1e-6)
    aged = replace(noise, drift=PowerLaw(0.05, 0.01), time=99.0)
    exponents = -np.log(written(aged, 0.5)[0] / G) / math.log(100)
    assert abs(np.corrcoef(G[0], exponents[0])[0, 1]) < 5 / math.sqrt(N)


def test_gains_and_offsets_of_converters_have_their_spread():
    adc = crossbar.ADC(bits=8, range="max", gain_error=0.03, offset_error=0.2)
    cell = crossbar.Cell(bits=(2, 2, 2, 2))
    config = CrossbarConfig(cell=cell, tile=Tile(rows=2, cols=None), adc=adc)
    chip = program(jnp.ones((8, 4000)), config, KEY)
    assert_normal(chip.gain.reshape(4, -1), 1, 0.03)
    assert_normal(chip.offset.reshape(4, -1), 0, 0.2 * 3)  # 2 bits are up to 3 levels


def test_a_table_has_the_mean_and_the_deviation_of_measured_cells():
    targets = [10.0, 10.0, 40.0, 40.0, 40.0]
    hour = [9.0, 13.0, 38.0, 42.0, np.nan]
    table = crossbar.Table.from_measurements(
        targets, [[11.0, 11.0, 40.0, 42.0, 44.0], hour], 40.0, seconds=(1.0, 3600.0)
    )
    assert table.targets == (0.25, 1.0) and table.seconds == (1.0, 3600.0)
    np.testing.assert_allclose(table.shift, [[1 / 40, 2 / 40], [1 / 40, 0]], atol=1e-9)
    spread = np.array([[0, 2], [math.sqrt(8), math.sqrt(8)]]) / 40
    np.testing.assert_allclose(table.deviation, spread, atol=1e-9)
