"""Device models against their published formulas, by moments of many draws, and the order of effects."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.crossbar import (
    PCM_DRIFT,
    PCM_JOSHI_2020,
    RERAM_CMO_2025,
    RERAM_CMO_DRIFT,
    RERAM_MILO_2021,
    RERAM_WAN_2022,
    Cell,
    CrossbarConfig,
    Device,
    Flicker,
    Independent,
    LogLinear,
    Polynomial,
    PowerLaw,
    Proportional,
    ReadNoise,
    Relaxation,
    Sinh,
    StuckAt,
    Tile,
    WriteVerify,
    drift_compensation,
    program,
)
from lorafusion_jax.crossbar.devices.device import depends_on_time, realise
from lorafusion_jax.crossbar.devices.normal_draws import normal

KEY = jax.random.key(7)
N = 40_000
LEVELS = (0.25, 0.5, 0.75, 1.0)


def cells(*levels: float) -> jax.Array:
    return jnp.repeat(jnp.asarray(levels, jnp.float32)[:, None], N, 1)


def assert_normal(draws, mean, deviation) -> None:
    """Mean, variance and fourth moment of every row within five standard errors of a normal distribution's."""
    draws, deviation = np.asarray(draws, float), np.asarray(deviation, float)
    z = (draws - np.asarray(mean, float)[:, None]) / deviation[:, None]
    n = z.shape[1]
    assert np.abs(z.mean(1)).max() < 5 / math.sqrt(n)
    assert np.abs((z**2).mean(1) - 1).max() < 5 * math.sqrt(2 / n)
    assert np.abs((z**4).mean(1) - 3).max() < 5 * math.sqrt(96 / n)


def test_errors_are_independent_of_the_conductance_or_proportional_to_it():
    G = np.asarray(LEVELS)
    assert_normal(Independent(0.05)(cells(*LEVELS), KEY), G, np.full(4, 0.05))
    assert_normal(Proportional(0.1)(cells(*LEVELS), KEY), G, 0.1 * G)


@pytest.mark.parametrize(
    "model, microsiemens, g_max",
    [
        (PCM_JOSHI_2020, lambda g: 0.26348 + 1.9650 * g - 1.1731 * g**2, 25.0),
        (RERAM_WAN_2022, lambda g: 0.348 + 16.03 * g - 43.853 * g**2 + 45.393 * g**3 - 16.815 * g**4, 40.0),
        (RERAM_MILO_2021, lambda g: 4.782321 - 0.009107 * 225 * g, 225.0),
        (RERAM_CMO_2025, lambda g: 0.0112185391 + 0.01129027418 * 88.19 * g, 88.19),
    ],
)
def test_published_programming_errors_have_the_spread_of_their_formula(model, microsiemens, g_max):
    G = np.asarray(LEVELS)
    assert_normal(model(cells(*LEVELS), KEY), G, microsiemens(G) / g_max)


def test_two_independent_fits_of_the_same_measurement_agree():
    """CrossSim fitted the same figures in uS: a quadratic to Joshi's, a cubic to Wan's at one second."""
    G = jnp.linspace(0.2, 0.95, 16)
    z = normal(KEY, G.shape, G.dtype)

    def ours(model: Polynomial, g_max: float) -> np.ndarray:
        return np.asarray((model(G, KEY) - G) / z) * g_max

    x = np.asarray(G) * 25
    np.testing.assert_allclose(ours(PCM_JOSHI_2020, 25), -0.00178767 * x**2 + 0.07585724 * x + 0.28638599, rtol=0.03)
    x = np.asarray(G) * 40
    wan = 1.536e-4 * x**3 - 1.167e-2 * x**2 + 2.374e-1 * x + 1.053
    np.testing.assert_allclose(ours(RERAM_WAN_2022, 40), wan, rtol=0.3)


def test_polynomial_in_time_interpolates_and_shifts():
    model = Polynomial(((0.02,), (0.06,)), shift=((0.0,), (0.1,)), seconds=(1.0, 100.0))
    for time, deviation, shift in [(None, 0.02, 0.0), (0.0, 0.02, 0.0), (10.0, 0.04, 0.05), (1e6, 0.06, 0.1)]:
        assert_normal(model(cells(0.5), KEY, time), [0.5 + shift], [deviation])
    half = dataclasses.replace(model, scale=0.5)
    assert_normal(half(cells(0.5), KEY, 10.0), [0.525], [0.02])
    # A fit that dips below zero is no noise, and not noise of the other sign.
    np.testing.assert_array_equal(Polynomial(((-0.1, 0.1),))(cells(0.5), KEY), cells(0.5))


def test_zero_cells_get_half_normal_noise():
    G, _ = realise(cells(0.0), Device(programming=Independent(0.05)), KEY)
    assert abs(float(jnp.mean(G == 0)) - 0.5) < 5 * math.sqrt(0.25 / N)
    mean = 0.05 / math.sqrt(2 * math.pi)
    deviation = 0.05 * math.sqrt(0.5 - 0.5 / math.pi)
    assert abs(float(jnp.mean(G)) - mean) < 5 * deviation / math.sqrt(N)


def test_clip_to_the_range_of_the_cell():
    device = Device(programming=Independent(0.2), clip="range")
    G, _ = realise(cells(0.1, 1.0), device, KEY, g_min=0.1)
    assert float(G.min()) == pytest.approx(0.1) and float(G.max()) == 1.0
    open_top, _ = realise(cells(1.0), Device(programming=Independent(0.2)), KEY, g_min=0.1)
    assert float(open_top.max()) > 1.5


def test_conductances_are_clipped_after_programming_and_after_drift():
    def drifted(programmed, change, clip="positive"):
        device = Device(
            programming=lambda G, key, time: G + programmed, drift=lambda G, key, time: G + change, time=1.0, clip=clip
        )
        return np.unique(realise(cells(0.5), device, KEY, g_min=0.1)[0]).tolist()

    assert drifted(-1.0, 0.25) == [0.25] and drifted(0.0, -1.0) == [0.0]
    assert drifted(1.0, -0.25, "range") == [0.75] and drifted(0.0, 1.0, "range") == [1.0]


def test_a_cell_is_verified_before_it_ages():
    def programming(G, key, time):
        return G if time is None else G + 0.25

    verified = Device(programming=programming, write_verify=WriteVerify(0.01, pulses=3), time=1e6)
    G, pulses = realise(cells(0.5), verified, KEY)
    assert (G == 0.5).all() and (pulses == 1).all()
    aged, _ = realise(cells(0.5), dataclasses.replace(verified, write_verify=None), KEY)
    assert (aged == 0.75).all()


@pytest.mark.parametrize(
    ("device", "wanted"),
    [
        (Device(), False),
        (Device(programming=Independent(0.1)), False),
        (Device(programming=PCM_JOSHI_2020), False),
        (Device(programming=RERAM_WAN_2022), True),
        (Device(programming=PCM_JOSHI_2020, drift=PCM_DRIFT), True),
        (Device(programming=lambda G, key, time: G), True),
    ],
)
def test_cells_age_where_a_model_depends_on_time(device, wanted):
    assert depends_on_time(device) == wanted


def test_cells_are_written_until_they_are_within_the_tolerance():
    sigma, tolerance = 0.05, 0.02
    device = Device(programming=Independent(sigma), write_verify=WriteVerify(tolerance, pulses=200))
    G, pulses = jax.jit(realise)(cells(0.5), device, KEY)
    error = np.asarray(G[0], float) - 0.5
    assert np.abs(error).max() <= tolerance * (1 + 1e-5)
    p = math.erf(tolerance / sigma / math.sqrt(2))
    assert abs(float(jnp.mean(pulses.astype(jnp.float32))) - 1 / p) < 5 * math.sqrt((1 - p) / p**2 / N)
    # The variance of a normal distribution truncated at +-c standard deviations.
    c = tolerance / sigma
    variance = sigma**2 * (1 - 2 * c * math.exp(-(c**2) / 2) / math.sqrt(2 * math.pi) / p)
    assert np.mean(error**2) == pytest.approx(variance, rel=5 * math.sqrt(2 / N))


def test_cells_that_exhaust_their_pulses_stay_outside():
    sigma, tolerance, most = 0.05, 0.01, 4
    device = Device(programming=Independent(sigma), write_verify=WriteVerify(tolerance, pulses=most))
    G, pulses = realise(cells(0.5), device, KEY)
    outside = jnp.abs(G - 0.5) > tolerance
    assert int(pulses.min()) == 1 and int(pulses.max()) == most
    assert bool(jnp.all(pulses[outside] == most))
    left = (1 - math.erf(tolerance / sigma / math.sqrt(2))) ** most
    assert abs(float(jnp.mean(outside)) - left) < 5 * math.sqrt(left * (1 - left) / N)


def test_neurrams_tolerance_takes_as_many_pulses_as_it_reports():
    """A single pulse of 17 % and an acceptance of +-1 uS of 40 take the 8.5 pulses that NeuRRAM reports."""
    device = Device(programming=Independent(0.1694), write_verify=WriteVerify(1 / 40, pulses=400))
    _, pulses = realise(cells(0.6), device, KEY)
    assert float(jnp.mean(pulses.astype(jnp.float32))) == pytest.approx(8.52, rel=0.03)


def test_as_many_cells_are_stuck_as_are_said_to_be():
    G, _ = realise(cells(0.5), Device(stuck=StuckAt(low=0.1, high=0.03)), KEY, g_min=0.05)
    for value, share in ((0.05, 0.1), (1.0, 0.03), (0.5, 0.87)):
        found = float(jnp.mean(jnp.isclose(G, value)))
        assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / N)


def test_a_stuck_cell_is_written_in_vain():
    device = Device(programming=Independent(0.02), write_verify=WriteVerify(0.03, pulses=6), stuck=StuckAt(high=0.1))
    G, pulses = realise(cells(0.5), device, KEY)
    stuck = G == 1.0
    assert 0.05 < float(jnp.mean(stuck)) < 0.15
    assert bool(jnp.all(pulses[stuck] == 6)) and float(jnp.mean(pulses[~stuck].astype(jnp.float32))) < 1.5


def test_drift_follows_programming_and_time():
    device = Device(programming=lambda G, key, time: G + 0.1, drift=PowerLaw(0.05), time=999.0)
    G, _ = realise(cells(0.5), device, KEY)
    np.testing.assert_allclose(G, 0.6 * 1000**-0.05, rtol=1e-5)
    fresh, _ = realise(cells(0.5), dataclasses.replace(device, time=None), KEY)
    np.testing.assert_allclose(fresh, 0.6, rtol=1e-6)


def test_exponents_of_a_power_law_have_their_mean_and_spread():
    model = PowerLaw(0.06, 0.01, start=20.0)
    exponents = -jnp.log(model(cells(0.3, 0.9), KEY, 1e5) / cells(0.3, 0.9)) / math.log((1e5 + 20) / 20)
    assert_normal(exponents, [0.06, 0.06], [0.01, 0.01])
    assert (PowerLaw(0.0, 0.05)(cells(0.5), KEY, 1e5) <= 0.5).all()  # no cell gains
    noisy = dataclasses.replace(model, flicker=Flicker())
    flicker = noisy(cells(0.3, 0.9), KEY, 1e5) / model(cells(0.3, 0.9), KEY, 1e5) - 1
    assert abs(np.corrcoef(flicker[0], exponents[0])[0, 1]) < 5 / math.sqrt(N)


def test_pcm_drifts_as_in_aihwkit():
    """Exponents of aihwkit's model at each conductance, and its 1/f noise for cells whose exponents do not vary."""
    G = np.asarray((0.02, 0.1, 0.5, 1.0))
    nu = np.clip(-0.0155 * np.log(G) + 0.0244, 0.049, 0.1)
    spread = np.clip(-0.0125 * np.log(G) - 0.0059, 0.008, 0.045)
    quiet = dataclasses.replace(PCM_DRIFT, flicker=None)
    exponents = -jnp.log(quiet(cells(*G), KEY, 86_400.0) / cells(*G)) / math.log(86_420 / 20)
    wide = nu > 4 * spread  # elsewhere |nu| folds the lower tail
    assert wide.any()
    assert_normal(np.asarray(exponents)[wide], nu[wide], spread[wide])
    still = dataclasses.replace(PCM_DRIFT, exponent=0.0, spread=0.0)
    q = np.minimum(0.0088 / G**0.65, 0.2)
    noise = q * math.sqrt(math.log((86_420 + 250e-9) / 500e-9))
    assert_normal(still(cells(*G), KEY, 86_400.0), G, G * noise)
    # Noise gathers before the first read, too.
    late = dataclasses.replace(still, start=1e4)
    assert_normal(late(cells(*G), KEY, 1.0), G, G * q * math.sqrt(math.log(10_001 / 500e-9)))


def test_cells_that_do_not_conduct_stay_finite():
    drifted = PCM_DRIFT(jnp.zeros(8), KEY, 1e6)
    np.testing.assert_array_equal(drifted, 0)
    assert np.isfinite(jax.grad(lambda G: PCM_DRIFT(G, KEY, 1e6).sum())(jnp.zeros(8))).all()


def test_no_flicker_has_gathered_within_the_first_read():
    drift = PowerLaw(0.01, start=1e-8, flicker=Flicker())
    still = PowerLaw(0.01, start=1e-8)
    np.testing.assert_array_equal(drift(cells(0.4), KEY, 1e-8), still(cells(0.4), KEY, 1e-8))


def test_flicker_gathers_with_the_logarithm_of_time():
    flicker = Flicker(magnitude=0.01, exponent=0.5, largest=0.015, read_time=1.0)
    found = flicker.deviation(jnp.array([1.0, 0.64, 0.01]), jnp.array(99.0))
    np.testing.assert_allclose(found, np.array([0.01, 0.0125, 0.015]) * math.sqrt(math.log(50)), rtol=1e-6)


def test_conductances_relax_as_published():
    assert_normal(
        RERAM_CMO_DRIFT(cells(0.4, 0.8), KEY, 3600.0),
        np.asarray([0.4, 0.8]) - 0.08900206 * math.log(3600) / 88.19,
        np.full(2, 0.41183342 + 0.04201137 * math.log(3600)) / 88.19,
    )
    at_start = Relaxation(shift=-0.1, spread=0.02, growth=0.01)(cells(0.4), KEY, 0.5)
    assert_normal(at_start, [0.4], [0.02])


def test_drift_compensation_restores_the_mean():
    G = jax.random.uniform(KEY, (2, 64, 32))
    device = Device(drift=PowerLaw(0.05), time=1e6)
    later, _ = realise(G, device, KEY)
    np.testing.assert_allclose(later * drift_compensation(G, later), G, rtol=1e-5)
    signed = jnp.asarray([[1.0, -3.0]])
    assert float(drift_compensation(signed, signed / 2)) == 2
    assert float(drift_compensation(jnp.zeros(4), jnp.zeros(4))) == 1
    spread = dataclasses.replace(device, drift=PowerLaw(0.05, 0.01))
    later, _ = realise(G, spread, KEY)
    before, after = jnp.abs(later - G).mean(), jnp.abs(later * drift_compensation(G, later) - G).mean()
    assert float(after) < 0.5 * float(before)


def test_compensation_is_of_the_cells_that_hold_weights():
    """The last of three rows has an array of its own, whose other row of cells at Gmin drifts most."""
    drift = PowerLaw(LogLinear(0.02, -0.02))
    device = Device(drift=drift, time=1e6, compensate=True)
    weights = jax.random.normal(KEY, (3, 5))

    def scale(tile: Tile) -> jax.Array:
        return program(weights, CrossbarConfig(cell=Cell(on_off_ratio=10.0), tile=tile, device=device), KEY).scale

    np.testing.assert_allclose(scale(Tile(rows=2, cols=2, partition="full")), scale(Tile(rows=3, cols=5)), rtol=1e-6)


@pytest.mark.parametrize(("kind", "spread"), [("independent", (0.03, 0.03)), ("proportional", (0.015, 0.03))])
def test_read_noise_of_a_cell_has_its_spread_and_may_be_clipped(kind, spread):
    model, G = ReadNoise(0.03, kind), cells(0.5, 1.0)
    assert_normal(model.draw(G, KEY), [0.5, 1.0], spread)
    assert float(dataclasses.replace(model, clip=True).draw(cells(0.0), KEY).min()) == 0
    assert float(dataclasses.replace(model, sigma=2.0).draw(cells(0.5), KEY).min()) < 0


def test_a_nonlinear_cell_has_the_current_of_sinh():
    iv = Sinh(read_voltage=0.5, scale=0.25)
    v, G = jnp.linspace(-1, 1, 9)[:, None], jnp.linspace(0, 1, 5)[None, :]
    np.testing.assert_allclose(iv(v, G), np.asarray(G) * np.sinh(2 * np.asarray(v)) / np.sinh(2), rtol=1e-5, atol=1e-7)
    ones = jnp.ones((1, 1))
    np.testing.assert_allclose(iv(ones, G), G, rtol=1e-6)
    np.testing.assert_allclose(iv(0.01 * ones, ones) / iv(0.005 * ones, ones), 2, rtol=1e-3)
    assert float(iv(ones / 2, ones)[0, 0]) < 0.4


FULL = Device(
    programming=Independent(0.03),
    write_verify=WriteVerify(0.02),
    stuck=StuckAt(0.01, 0.01),
    drift=PCM_DRIFT,
    time=3600.0,
    read_noise=ReadNoise(0.01),
    iv=Sinh(),
)


def test_same_key_same_chip():
    G = jax.random.uniform(KEY, (3, 50, 40))
    one, pulses = realise(G, FULL, KEY)
    again, _ = jax.jit(realise)(G, FULL, KEY)
    other, _ = realise(G, FULL, jax.random.key(8))
    np.testing.assert_allclose(one, again, rtol=1e-5, atol=1e-6)
    assert float(jnp.mean(one == other)) < 0.1
    assert one.shape == pulses.shape == G.shape and pulses.dtype == jnp.int32


@pytest.mark.long
def test_chips_are_mapped_over_keys():
    G = jax.random.uniform(KEY, (20, 20))
    keys = jax.random.split(KEY, 3)
    chips, pulses = jax.vmap(lambda key: realise(G, FULL, key))(keys)
    mapped, _ = jax.lax.map(lambda key: realise(G, FULL, key), keys)
    np.testing.assert_allclose(chips, mapped, rtol=1e-5, atol=1e-6)
    for i, key in enumerate(keys):
        single, count = realise(G, FULL, key)
        np.testing.assert_allclose(chips[i], single, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(pulses[i], count)


def test_effects_draw_independently():
    """Adding one effect does not redraw another: purposes have keys of their own."""
    noise = realise(cells(0.5), Device(programming=Independent(0.01)), KEY)[0]
    with_faults = realise(cells(0.5), Device(programming=Independent(0.01), stuck=StuckAt(0.1, 0.1)), KEY)[0]
    working = (with_faults != 0) & (with_faults != 1)
    np.testing.assert_array_equal(with_faults[working], noise[working])
    drifted = realise(cells(0.5), Device(programming=Independent(0.01), drift=PowerLaw(0.05, 0.01), time=99.0), KEY)[0]
    exponents = -jnp.log(drifted / noise) / math.log(100)
    assert abs(np.corrcoef(noise[0], exponents[0])[0, 1]) < 5 / math.sqrt(N)


@pytest.mark.long
def test_values_are_swept_and_learned():
    G = jnp.full((30, 30), 0.5)

    def spread(sigma, time):
        device = Device(programming=Independent(sigma), drift=PowerLaw(0.05), time=time)
        return jnp.std(realise(G, device, KEY)[0])

    sigmas = jnp.asarray([0.0, 0.01, 0.02])
    swept = jax.vmap(spread, (0, None))(sigmas, 9.0)
    np.testing.assert_allclose(swept, swept[1] * jnp.arange(3.0), rtol=1e-4, atol=1e-5)
    assert float(jax.grad(spread)(0.01, 9.0)) == pytest.approx(float(swept[1]) / 0.01, rel=1e-3)

    def mean(time):
        return jnp.mean(realise(G, Device(drift=PowerLaw(0.05), time=time), KEY)[0])

    assert float(jax.grad(mean)(9.0)) == pytest.approx(-0.05 * 0.5 * 10**-0.05 / 10, rel=1e-3)
    stacked = jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * 2), FULL)
    chips = jax.vmap(lambda device: realise(G, device, KEY)[0])(stacked)
    np.testing.assert_allclose(chips[0], chips[1], rtol=1e-6)


def test_dtype_follows_the_conductances():
    G = jnp.full((4, 5), 0.5)
    assert jax.eval_shape(realise, G, FULL, KEY)[0].dtype == jnp.float32
    with jax.enable_x64(True):
        for dtype in (jnp.float32, jnp.float64):
            device = dataclasses.replace(FULL, programming=RERAM_WAN_2022, time=jnp.asarray(3600.0))
            assert jax.eval_shape(realise, G.astype(dtype), device, KEY)[0].dtype == dtype


def test_functions_are_models():
    def programming(G, key, time):
        return G * (1 + 0.1 * jax.random.normal(key, G.shape))

    def drift(G, key, time):
        return G / (1 + time)

    device = Device(programming=programming, drift=drift, time=1.0, iv=lambda v, G: G * v)
    G, _ = jax.jit(realise)(cells(0.5), device, KEY)
    assert_normal(G, [0.25], [0.025])
    assert float(device.iv(jnp.float32(2), jnp.float32(0.5))) == 1
    assert jax.tree.leaves(device) == [1.0]
    assert jax.tree.unflatten(jax.tree.structure(device), [2.0]).time == 2.0


def test_an_ideal_device_needs_no_key():
    G = cells(*LEVELS)
    same, pulses = realise(G, Device(), None)
    np.testing.assert_array_equal(same, G)
    assert pulses is None and jax.tree.leaves(Device()) == [] and hash(Device()) == hash(Device())


def test_a_random_device_needs_a_key():
    with pytest.raises(ValueError, match="this device is random .* give the chip's key"):
        realise(cells(0.5), Device(programming=Independent(0.1)), None)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Independent(-0.1), r"Independent.sigma = -0.1: give a number at least 0"),
        (lambda: Independent(float("nan")), r"Independent.sigma = nan: give a number at least 0"),
        (lambda: Proportional(-1), r"Proportional.sigma = -1: give a number at least 0"),
        (lambda: ReadNoise(-0.1), r"ReadNoise.sigma = -0.1: give a number at least 0"),
        (lambda: ReadNoise(0.1, "uniform"), r"ReadNoise.kind = 'uniform': choose independent or proportional"),
        (lambda: StuckAt(low=1.5), r"StuckAt.low = 1.5: give a number at least 0 and at most 1"),
        (lambda: StuckAt(high=-0.1), r"StuckAt.high = -0.1: give a number at least 0 and at most 1"),
        (lambda: StuckAt(low=0.7, high=0.7), r"StuckAt: low \+ high = 1.4: together at most all cells"),
        (lambda: WriteVerify(0.0), r"WriteVerify.tolerance = 0.0: give a number above 0"),
        (lambda: WriteVerify(0.1, pulses=0), r"WriteVerify.pulses = 0: give the most pulses of a cell, 1 to 1,000,000"),
        (lambda: Device(time=-1.0), r"Device.time = -1.0: give a number at least 0"),
        (lambda: Device(clip="none"), r"Device.clip = 'none': choose positive .* or range"),
        (lambda: Device(write_verify=WriteVerify(0.1)), r"Device.write_verify .* give programming too"),
        (lambda: PowerLaw(-0.1), r"PowerLaw.exponent = -0.1: give a number at least 0"),
        (lambda: PowerLaw(0.1, start=0.0), r"PowerLaw.start = 0.0: give a number above 0"),
        (lambda: Flicker(magnitude=-1.0), r"Flicker.magnitude = -1.0: give a number at least 0"),
        (lambda: LogLinear(0.1, 0.0, 0.2, 0.1), r"LogLinear: low = 0.2 is above high = 0.1"),
        (lambda: Relaxation(0.0, -0.1), r"Relaxation.spread = -0.1: give a number at least 0"),
        (lambda: Sinh(scale=0.0), r"Sinh.scale = 0.0: give a number above 0"),
        (lambda: Polynomial(((0.1,), (0.2,))), r"Polynomial.deviation = .* for each of seconds = \(1.0,\)"),
        (lambda: Polynomial(((0.1,),), shift=((0.1,), (0.2,))), r"Polynomial.shift = "),
        (lambda: Polynomial(((),)), r"Polynomial.deviation = \(\(\),\): give one tuple of coefficients"),
        (lambda: Polynomial(((0.1,), (0.2,)), seconds=(5.0, 1.0)), r"Polynomial.seconds = .*: give rising positive"),
    ],
)
def test_values_that_no_device_has_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
