"""What a converter may do at every read: noise, stochastic rounding, ranges from data, reads at half the voltage."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossbar_problems import problem

from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    PRESETS,
    CrossbarConfig,
    Device,
    Encoding,
    Geometry,
    ReadNoise,
    Tile,
    calibrate_tree,
    calibrated,
    config_hash,
    load_config,
    matmul,
    observe,
    probe,
    program,
    program_tree,
    programmed_weights,
    save_config,
    site_errors,
    with_config,
    with_read_key,
)
from lorafusion_jax.crossbar.mapping import encoding

KEY = jax.random.key(5)
FLIP = Encoding(kind="offset", unit_column=True, flip=True)
problem = functools.partial(problem, d_in=40, d_out=6, batch=8, seed=2)


def reads(x, chip, count):
    return jax.lax.map(lambda key: matmul(x, with_read_key(chip, key)), jax.random.split(KEY, count))


@pytest.mark.parametrize(
    "path, separate", [("definition", False), ("loop", True), ("lookup", False), ("packed", False)]
)
def test_noise_of_conversions_adds_up(path, separate):
    """Every conversion has sigma Gmax of its own: R tiles, K slices, J pulses, both polarities where each is read."""
    sigma = 0.5
    adc = ADC(bits=16, range="max", noise=sigma, separate=separate)
    config = CrossbarConfig(tile=Tile(rows=10), dac=DAC(bits=4, scaling="fixed"), adc=adc)
    weights, x = problem()
    state = program(weights, config, path=path)
    found = reads(x, state, 400)
    # In level units, times what the slices are worth: levels of 3, one-bit pulses.
    conversions = [(4**k * 2**j * 3 * sigma) ** 2 for k in range(4) for j in range(3) for _ in range(4)]
    wanted = float(state.scale[0, 0]) / 7 * np.sqrt(sum(conversions) * (2 if separate else 1))
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(jnp.var(found, axis=0))), wanted, rtol=0.03)
    ideal = dataclasses.replace(config, adc=None)
    mean_error = jnp.mean(found, axis=0) - matmul(x, program(weights, ideal))
    assert float(jnp.abs(mean_error).max()) < 5 * wanted / np.sqrt(400) + 0.01


def test_noise_makes_an_adc_lossy_and_reads_random():
    config = CrossbarConfig(adc=ADC(bits=10, range="granular", noise=0.1))
    weights, x = problem()
    state = program(weights, config)
    assert state.plan.path != "product"
    with pytest.raises(ValueError, match="again for every read: give it a key"):
        matmul(x, state)
    assert program_tree({"w": weights}, {"w": config}, KEY)["w"].key is not None


@pytest.mark.parametrize("adc", [None, ADC(bits=12, range="max")], ids=["product", "planes"])
def test_stochastic_rounding_is_right_on_average(adc):
    """E[n] = x / limit 7, so that 4-bit inputs lose nothing on average; the variance is f (1 - f) per input."""
    config = CrossbarConfig(dac=DAC(bits=4, scaling="fixed", rounding="stochastic"), adc=adc)
    weights, x = problem()
    state = program(weights, config)
    found = reads(x, state, 2000)
    exact = x @ programmed_weights(state)
    fraction = np.asarray(x) * 7 - np.floor(np.asarray(x) * 7)
    variance = (fraction * (1 - fraction)) @ np.square(np.asarray(programmed_weights(state))) / 49
    np.testing.assert_allclose(jnp.var(found, axis=0), variance, rtol=0.25)
    z = (jnp.mean(found, axis=0) - exact) / np.sqrt(variance / 2000)
    assert float(jnp.sqrt(jnp.mean(jnp.square(z)))) < (1.3 if adc is None else 2)
    nearest = dataclasses.replace(config, dac=DAC(bits=4, scaling="fixed"))
    rounded = matmul(x, with_config(state, nearest))
    assert float(jnp.abs(rounded - exact).max()) > 10 * float(np.sqrt(variance / 2000).max())


def test_the_range_of_inputs_comes_from_data_then_that_of_sums():
    config = CrossbarConfig(dac=DAC(scaling="calibrated", quantile=0.9), adc=ADC(bits=8))
    weights, x = problem(batch=200)
    x = x * jnp.linspace(0.1, 3, 200)[:, None]
    state = program(weights, config)
    with pytest.raises(ValueError, match="this crossbar has a DAC whose range comes from data"):
        matmul(x, state)
    state = calibrated(state, probe(x, state)[1])
    assert state.limits is None
    assert 1 <= float(state.input_limit) / np.quantile(np.abs(x), 0.9) < 1.02
    state = calibrated(state, probe(x, state)[1])
    y, seen = probe(x, state)
    fixed = dataclasses.replace(config, dac=DAC(scaling="fixed", limit=float(state.input_limit)))
    same = dataclasses.replace(program(weights, fixed), limits=state.limits)
    np.testing.assert_array_equal(y, matmul(x, same))
    assert float(seen.clip_share_of_inputs) == pytest.approx(np.mean(np.abs(x) > float(state.input_limit)), abs=1e-3)


@pytest.mark.parametrize(("signed", "low", "wanted"), [(True, -8.0, 8.0), (False, -8.0, 1.0), (True, 0.0, 1.0)])
def test_the_range_of_inputs_is_of_those_that_the_dac_can_pass(signed, low, wanted):
    """Not of negative ones where it is unsigned; and 1 where all are zero, as for each input vector."""
    weights, x = problem()
    x = jnp.where(x < 0, low, x / jnp.max(x)) if low else jnp.zeros_like(x)
    encoding = Encoding() if signed else Encoding(kind="offset")
    config = CrossbarConfig(encoding=encoding, dac=DAC(signed=signed, scaling="calibrated", quantile=1.0))
    state = program(weights, config)
    state = calibrated(state, probe(x, state)[1])
    np.testing.assert_allclose(state.input_limit, wanted, rtol=0.02)


def test_ranges_of_a_model_come_from_data():
    """Two passes over the batches; one that clips more inputs than it may is named."""
    config = CrossbarConfig(dac=DAC(scaling="calibrated", quantile=0.5), adc=ADC(bits=8))
    weights, x = problem()
    tree = program_tree({"a": weights, "b": weights[:6, :6]}, {"*": config}, KEY)

    def run(tree, batch):
        return matmul(matmul(batch, tree["a"]), tree["b"])

    settled = calibrate_tree(run, tree, [x])
    assert all(leaf.limits is not None and leaf.input_limit > 0 for leaf in settled.values())
    with pytest.warns(UserWarning, match=r"DACs clip more inputs than dac.clip_share: .*a: (4|5)\d\.\d%"):
        rows = site_errors(settled, observe(run, settled, [x]))
    assert [row["site"] for row in rows] == ["a", "b"]


def test_every_batch_is_observed_with_noise_of_its_own():
    weights, x = problem()
    tree = program_tree({"w": weights}, {"*": CrossbarConfig(device=Device(read_noise=ReadNoise(0.1)))}, KEY)

    def run(tree, batch):
        return matmul(batch, tree["w"])

    once, twice = (float(observe(run, tree, [x] * batches)[0].error) for batches in (1, 2))
    assert abs(twice / once - 2) > 1e-3


def test_negative_inputs_of_an_unsigned_dac_are_counted():
    config = CrossbarConfig(dac=DAC(signed=False))
    weights, x = problem()
    seen = probe(x, program(weights, config))[1]
    assert float(seen.clip_share_of_inputs) == pytest.approx(float(np.mean(np.asarray(x) < 0)))


@pytest.mark.parametrize(
    "path, encoding, scaling",
    [
        ("definition", Encoding(), "row"),
        pytest.param("lookup", Encoding(), "fixed", marks=pytest.mark.long),
        pytest.param("planes", FLIP, "row", marks=pytest.mark.long),
        ("loop", FLIP, "fixed"),
    ],
)
def test_clipped_reads_are_repeated_at_half_the_voltage(path, encoding, scaling):
    """The oracle reads each row at full scale, half and a quarter of it, and takes the first that clips nothing."""
    adc = ADC(bits=5, range="given", limits=[[-9.0, 9.0]] * 4, retries=2)
    config = CrossbarConfig(encoding=encoding, dac=DAC(scaling=scaling), adc=adc)
    weights, x = problem(batch=12)
    x = x.at[:4].set(jnp.abs(x[:4])).at[8:].multiply(0.1)
    state = program(jnp.abs(weights), config, path=path)
    once = dataclasses.replace(config, adc=dataclasses.replace(adc, retries=0), dac=DAC(scaling="fixed"))
    plain = program(jnp.abs(weights), once, path=path)
    full = jnp.max(jnp.abs(x), axis=1) if scaling == "row" else jnp.ones(12)

    def row(x, limit):
        tried = []
        for halving in range(3):
            at = dataclasses.replace(plain, input_limit=limit * 2**halving)
            y, seen = probe(x[None], at)
            tried.append((y[0], float(jnp.sum(seen.clipped))))
        halvings = next((t for t, (_, clipped) in enumerate(tried) if clipped == 0), 2)
        return tried[halvings][0], halvings

    wanted, halvings = zip(*(row(*one) for one in zip(x, full, strict=True)), strict=True)
    assert len(set(halvings)) > 1
    np.testing.assert_allclose(matmul(x, state), jnp.stack(wanted), rtol=0, atol=1e-6 * float(jnp.abs(wanted[0]).max()))


def test_at_half_the_voltage_the_largest_input_is_rounded_from_a_tie():
    config = CrossbarConfig(dac=DAC(bits=8), adc=ADC(retries=1))
    x = np.random.default_rng(1).normal(size=(100, 4)).astype(np.float32)
    limit = 2 * np.abs(x).max(axis=1, keepdims=True)
    geometry = Geometry.of((4, 1), config)
    codes = jax.jit(encoding.input_codes, static_argnums=2)(x, limit, geometry, config)
    np.testing.assert_array_equal(codes, np.rint(x / limit * np.float32(127)))
    assert (np.abs(codes).max(axis=1) == 64).all()


@pytest.mark.parametrize("path", ["definition", pytest.param("loop", marks=pytest.mark.long)])
def test_noise_below_zero_does_not_repeat_a_read(path):
    """Few inputs in a range that holds every sum: the same read as without retries, draw by draw."""
    weights, x = problem(d_in=24, d_out=5)
    x = jnp.where(jnp.arange(24) % 8 == 0, abs(x), 0)
    config = CrossbarConfig(
        encoding=Encoding(kind="offset"),
        dac=DAC(signed=False, scaling="fixed"),
        adc=ADC(bits=8, range="max", noise=0.5, retries=3),
    )
    once = dataclasses.replace(config, adc=dataclasses.replace(config.adc, retries=0))
    state = with_read_key(program(weights, config, path=path), KEY)
    np.testing.assert_array_equal(matmul(x, state), matmul(x, with_config(state, once)))


@pytest.mark.long
def test_repeated_reads_have_the_gradient_of_their_scale():
    """Straight through: d y / d x is W wherever the DAC, at its final scale, does not clip."""
    adc = ADC(bits=5, range="given", limits=[[-9.0, 9.0]] * 4, retries=3)
    config = CrossbarConfig(dac=DAC(scaling="fixed", limit=0.25), adc=adc)
    weights, x = map(jnp.abs, problem())
    state = program(weights, config)
    once = with_config(state, dataclasses.replace(config, adc=dataclasses.replace(adc, retries=0)))

    @jax.jit
    def gradients(x, limits):
        of_limits = jax.grad(lambda limits: jnp.sum(matmul(x, dataclasses.replace(state, limits=limits))))(limits)
        return *(jax.grad(lambda x, of=of: jnp.sum(matmul(x, of)))(x) for of in (state, once)), of_limits

    slope, without, _ = gradients(x, state.limits)
    sums = jnp.sum(programmed_weights(state), axis=1)
    seen = np.isclose(slope, np.broadcast_to(sums, slope.shape), atol=1e-5)
    assert (seen | np.isclose(slope, 0)).all()
    assert seen.mean() - np.isclose(without, sums[None], atol=1e-5).mean() > 0.05


def test_new_settings_are_written_down_and_change_a_hash_only_where_they_are_set(tmp_path):
    config = CrossbarConfig(
        dac=DAC(scaling="calibrated", quantile=0.99, rounding="stochastic"), adc=ADC(noise=0.1, retries=2)
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    # As chips that were saved before these settings existed have it.
    assert config_hash(PRESETS["puma"]) == "b9854359283bd6109cd88343825a10db191923d25b030121e900d3c3d2cb352c"
    assert (
        len({config_hash(c) for c in (config, dataclasses.replace(config, adc=ADC(noise=0.1)), CrossbarConfig())}) == 3
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ADC(noise=-1.0), "adc.noise = -1.0: a standard deviation cannot be negative"),
        (lambda: ADC(retries=-1), "adc.retries = -1: give a number of reads, 0 to 1,000"),
        (lambda: DAC(quantile=0.1), "dac.quantile = 0.1: give a share of inputs from 0.5 to 1"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
