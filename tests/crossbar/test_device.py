"""Device models against their published formulas, by moments of many cells, and the order of effects."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from testers import KEY, assert_normal, check_chip, check_technology

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    PCM_DRIFT,
    CrossbarConfig,
    Device,
    Independent,
    Polynomial,
    PowerLaw,
    Tile,
    program,
)

N = 40_000


def cells(*levels: float) -> jax.Array:
    return jnp.repeat(jnp.asarray(levels, jnp.float32)[:, None], N, 1)


def written(
    device: Device, *levels: float, g_min: float = 0.0, key: jax.Array = KEY
) -> tuple[np.ndarray, float]:
    """Return the conductances [levels, N] that cells get which are asked for `levels`, and the mean of their pulses."""
    config = CrossbarConfig(
        cell=crossbar.Cell(bits=None, on_off_ratio=1 / g_min if g_min else None),
        mapping=crossbar.Mapping(weight_bits=None),
        encoding=crossbar.Encoding(kind="offset"),
        tile=Tile(rows=None, cols=None),
        device=device,
    )
    digits = (cells(*levels, 1.0) - g_min) / (
        1 - g_min
    )  # the last row sets the full scale
    chip = jax.jit(lambda weights: program(weights, config, key, path="definition"))(
        2 * digits - 1
    )
    return g_min + np.asarray(chip.cells, float)[0, 0, 0, 0, :-1] * (
        1 - g_min
    ), chip.pulses


# By name: the field of a device, the model, the mean and the deviation of its formula, and the age in seconds.
_BY_AGE = Polynomial(((0.02,), (0.06,)), shift=((0.0,), (0.1,)), seconds=(1.0, 100.0))
_TARGETS = (0.1, 0.4, 1.0)
_SPREADS = ((0.01, 0.04, 0.02), (0.03, 0.06, 0.02))
_SHIFT = (0.0, 0.1, 0.0)
_FLICKER = math.sqrt(math.log((86_420 + 250e-9) / 500e-9))
TECHNOLOGIES = {
    "independent": (
        "programming",
        Independent(0.05),
        lambda g: g,
        lambda g: 0.05,
        None,
    ),
    "proportional": (
        "programming",
        crossbar.Proportional(0.1),
        lambda g: g,
        lambda g: 0.1 * g,
        None,
    ),
    "PCM": (
        "programming",
        crossbar.PCM_JOSHI_2020,
        lambda g: g,
        lambda g: (0.26348 + 1.9650 * g - 1.1731 * g**2) / 25,
        None,
    ),
    "NeuRRAM": (
        "programming",
        crossbar.RERAM_WAN_2022,
        lambda g: g,
        lambda g: (
            (0.348 + 16.03 * g - 43.853 * g**2 + 45.393 * g**3 - 16.815 * g**4) / 40
        ),
        None,
    ),
    "IGVVA": (
        "programming",
        crossbar.RERAM_MILO_2021,
        lambda g: g,
        lambda g: (4.782321 - 0.009107 * 225 * g) / 225,
        None,
    ),
    "CMO": (
        "programming",
        crossbar.RERAM_CMO_2025,
        lambda g: g,
        lambda g: (0.0112185391 + 0.01129027418 * 88.19 * g) / 88.19,
        None,
    ),
    # Half-way between both rows, in the logarithm of time.
    "polynomial of age": (
        "programming",
        _BY_AGE,
        lambda g: g + 0.05,
        lambda g: 0.04,
        10.0,
    ),
    "polynomial beyond its last age": (
        "programming",
        dataclasses.replace(_BY_AGE, extrapolate=True, scale=0.5),
        lambda g: g + 0.075,
        lambda g: 0.04,
        1000.0,
    ),
    "table": (
        "programming",
        crossbar.Table(_TARGETS, _SPREADS, (_SHIFT,) * 2, seconds=(1.0, 100.0)),
        lambda g: g + np.interp(g, _TARGETS, _SHIFT),
        lambda g: np.interp(g, _TARGETS, np.mean(_SPREADS, axis=0)),
        10.0,
    ),
    "CMO, an hour later": (
        "drift",
        crossbar.RERAM_CMO_DRIFT,
        lambda g: g - 0.08900206 * math.log(3600) / 88.19,
        lambda g: (0.41183342 + 0.04201137 * math.log(3600)) / 88.19,
        3600.0,
    ),
    "1/f noise of PCM": (
        "drift",
        dataclasses.replace(PCM_DRIFT, exponent=0.0, spread=0.0),
        lambda g: g,
        lambda g: g * np.minimum(0.0088 / g**0.65, 0.2) * _FLICKER,
        86_400.0,
    ),
}
_SHORT = {
    "table",
    "CMO, an hour later",
}  # chips of the others are compiled in long tests


@pytest.mark.parametrize("name", TECHNOLOGIES)
def test_a_cell_technology_has_the_moments_of_its_formula(name):
    check_technology(*TECHNOLOGIES[name][1:])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in _SHORT else pytest.mark.long)
        for n in TECHNOLOGIES
    ],
)
def test_a_cell_technology_is_programmed_read_and_saved(name, tmp_path):
    """Without an ADC, at which a sum of real cells may lie half-way between two codes."""
    field, model, *_, age = TECHNOLOGIES[name]
    cell = crossbar.Cell(on_off_ratio=10.0)
    device = Device(**{field: model, "time": age})
    check_chip(
        CrossbarConfig(cell=cell, tile=Tile(rows=10, cols=5), device=device), tmp_path
    )


def test_ages_beyond_the_last_measurement_are_refused_or_nan():
    wan = crossbar.RERAM_WAN_2022
    for time in (200_000, 31_536_000.0, jnp.float32(2e5), np.array([1.0, 2e5])):
        with pytest.raises(
            ValueError,
            match=r"last measurement .* is at 172800 seconds: .* set extrapolate=True",
        ):
            Device(programming=wan, time=time)
    (
        Device(programming=wan, time=172_800),
        Device(programming=wan, time=jnp.float32(172_800)),
    )
    Device(
        programming=wan, time=1e9, write_verify=crossbar.WriteVerify(0.1)
    )  # the error is that of the first row
    Device(programming=crossbar.PCM_JOSHI_2020, time=1e9)  # its drift is another model
    aged = jax.jit(lambda time: wan(cells(0.5), KEY, time))
    assert jnp.isfinite(aged(172_800.0)).all() and jnp.isnan(aged(200_000.0)).all()
    assert jnp.isfinite(
        dataclasses.replace(wan, extrapolate=True)(cells(0.5), KEY, 200_000.0)
    ).all()


def test_conductances_are_clipped_after_programming_and_after_drift():
    def drifted(programmed, change, clip="positive"):
        device = Device(
            programming=lambda G, key, time: G + programmed,
            drift=lambda G, key, time: G + change,
            time=1.0,
            clip=clip,
        )
        return written(device, 0.5, g_min=0.1)[0][0, 0]

    cases = [
        (-1.0, 0.25),
        (0.0, -1.0),
        (0.0, 1.0),
        (1.0, -0.25, "range"),
        (0.0, 1.0, "range"),
        (-1.0, 0.25, "range"),
    ]
    np.testing.assert_allclose(
        [drifted(*case) for case in cases], [0.25, 0, 1.5, 0.75, 1, 0.35], atol=1e-6
    )


def test_a_cell_is_verified_before_it_ages():
    def programming(G, key, time):
        return G if time is None else G + 0.25

    verified = Device(
        programming=programming,
        write_verify=crossbar.WriteVerify(0.01, pulses=3),
        time=1e6,
    )
    G, pulses = written(verified, 0.5)
    np.testing.assert_allclose(G, 0.5, rtol=1e-6)
    assert pulses == 1
    np.testing.assert_allclose(
        written(dataclasses.replace(verified, write_verify=None), 0.5)[0],
        0.75,
        rtol=1e-6,
    )


@pytest.mark.parametrize(("tolerance", "most"), [(0.02, 30), (0.01, 4)])
def test_cells_are_written_until_they_are_within_the_tolerance_or_out_of_pulses(
    tolerance, most
):
    sigma = 0.05
    G, pulses = written(
        Device(
            programming=Independent(sigma),
            write_verify=crossbar.WriteVerify(tolerance, pulses=most),
        ),
        0.5,
    )
    p = math.erf(tolerance / sigma / math.sqrt(2))
    left = (1 - p) ** most
    assert abs(pulses - (1 - left) / p) < 5 * math.sqrt((1 - p) / p**2 / (2 * N))
    outside = np.abs(G - 0.5) > tolerance * (1 + 1e-5)
    assert abs(outside.mean() - left) <= 5 * math.sqrt(left * (1 - left) / N)
    # The variance of a normal distribution truncated at +-c standard deviations.
    c = tolerance / sigma
    variance = sigma**2 * (
        1 - 2 * c * math.exp(-(c**2) / 2) / math.sqrt(2 * math.pi) / p
    )
    assert np.mean((G[~outside] - 0.5) ** 2) == pytest.approx(
        variance, rel=5 * math.sqrt(2 / np.sum(~outside))
    )


def test_as_many_cells_are_stuck_as_are_said_to_be():
    G, _ = written(Device(stuck=crossbar.StuckAt(low=0.1, high=0.03)), 0.5, g_min=0.05)
    for value, share in ((0.05, 0.1), (1.0, 0.03), (0.5, 0.87)):
        found = np.mean(np.isclose(G, value))
        assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / N)


def test_a_stuck_cell_is_written_in_vain():
    device = Device(
        programming=Independent(0.02),
        write_verify=crossbar.WriteVerify(0.03, pulses=6),
        stuck=crossbar.StuckAt(low=0.1),
    )
    G, pulses = written(device, 0.5)
    assert 0.05 < np.mean(G == 0) < 0.15
    p = math.erf(0.03 / 0.02 / math.sqrt(2))
    assert pulses == pytest.approx(0.1 * 6 + 0.9 / p, rel=0.02)


def test_drift_follows_programming_and_time():
    device = Device(
        programming=lambda G, key, time: G + 0.1, drift=PowerLaw(0.05), time=999.0
    )
    np.testing.assert_allclose(written(device, 0.5)[0], 0.6 * 1000**-0.05, rtol=1e-5)
    np.testing.assert_allclose(
        written(dataclasses.replace(device, time=None), 0.5)[0], 0.6, rtol=1e-6
    )


def test_cells_that_do_not_conduct_stay_finite():
    drifted = PCM_DRIFT(jnp.zeros(8), KEY, 1e6)
    np.testing.assert_array_equal(drifted, 0)
    assert np.isfinite(
        jax.grad(lambda G: PCM_DRIFT(G, KEY, 1e6).sum())(jnp.zeros(8))
    ).all()


def test_flicker_gathers_with_the_logarithm_of_time():
    flicker = crossbar.Flicker(
        magnitude=0.01, exponent=0.5, largest=0.015, read_time=1.0
    )
    found = flicker.deviation(jnp.array([1.0, 0.64, 0.01]), jnp.array(99.0))
    np.testing.assert_allclose(
        found, np.array([0.01, 0.0125, 0.015]) * math.sqrt(math.log(50)), rtol=1e-6
    )
    assert not flicker.deviation(
        jnp.array([0.5]), jnp.array(0.1)
    ).any()  # within the first read


def test_conductances_begin_to_relax_after_a_second():
    at_start = crossbar.Relaxation(shift=-0.1, spread=0.02, growth=0.01)(
        cells(0.4), KEY, 0.5
    )
    assert_normal(at_start, [0.4], [0.02])


def test_compensation_is_of_weights_whatever_both_cells_of_a_pair_share():
    """A shift of every cell moves no weight: the factor is 1, although all conductances fall."""
    device = Device(drift=lambda G, key, time: G - 0.05, time=1.0, compensate=True)
    config = CrossbarConfig(cell=crossbar.Cell(on_off_ratio=5.0), device=device)
    fresh = dataclasses.replace(config, device=Device())
    scales = [
        program(jax.random.normal(KEY, (6, 5)), each, KEY).scale
        for each in (config, fresh)
    ]
    np.testing.assert_allclose(*scales, rtol=1e-5)


def test_compensation_is_of_the_cells_that_hold_weights():
    """The last of three rows has an array of its own, whose other row of cells at Gmin drifts most."""
    drift = PowerLaw(crossbar.LogLinear(0.02, -0.02))
    device = Device(drift=drift, time=1e6, compensate=True)
    weights = jax.random.normal(KEY, (3, 5))

    def scale(tile: Tile) -> jax.Array:
        return program(
            weights,
            CrossbarConfig(
                cell=crossbar.Cell(on_off_ratio=10.0), tile=tile, device=device
            ),
            KEY,
        ).scale

    np.testing.assert_allclose(
        scale(Tile(rows=2, cols=2, partition="full")),
        scale(Tile(rows=3, cols=5)),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("kind", "spread"), [("independent", (0.03, 0.03)), ("proportional", (0.015, 0.03))]
)
def test_read_noise_of_a_cell_has_its_spread_and_may_be_clipped(kind, spread):
    model = crossbar.ReadNoise(0.03, kind)
    G = cells(0.5, 1.0)
    assert_normal(model.draw(G, KEY), [0.5, 1.0], spread)
    assert float(dataclasses.replace(model, clip=True).draw(cells(0.0), KEY).min()) == 0
    assert float(dataclasses.replace(model, sigma=2.0).draw(cells(0.5), KEY).min()) < 0


def test_a_key_is_a_chip_and_effects_draw_independently():
    """Adding one effect does not redraw another."""
    noise = Device(programming=Independent(0.01))
    G, _ = written(noise, 0.5)
    np.testing.assert_array_equal(written(noise, 0.5)[0], G)
    assert np.mean(written(noise, 0.5, key=jax.random.key(8))[0] == G) < 0.1
    with_faults, _ = written(
        dataclasses.replace(noise, stuck=crossbar.StuckAt(0.1, 0.1)), 0.5
    )
    working = (with_faults != 0) & (with_faults != 1)
    np.testing.assert_allclose(with_faults[working], G[working], rtol=1e-6)
    drifted, _ = written(
        dataclasses.replace(noise, drift=PowerLaw(0.05, 0.01), time=99.0), 0.5
    )
    exponents = -np.log(drifted / G) / math.log(100)
    assert abs(np.corrcoef(G[0], exponents[0])[0, 1]) < 5 / math.sqrt(N)


def test_gains_and_offsets_of_converters_have_their_spread():
    adc = crossbar.ADC(bits=8, range="max", gain_error=0.03, offset_error=0.2)
    config = CrossbarConfig(tile=Tile(rows=2, cols=None), adc=adc)
    chip = program(jnp.ones((8, 4000)), config, KEY)
    assert_normal(chip.gain.reshape(4, -1), np.ones(4), np.full(4, 0.03))
    assert_normal(
        chip.offset.reshape(4, -1), np.zeros(4), np.full(4, 0.2 * 3)
    )  # in levels: 2 bits are up to 3
