"""What cannot be built, programmed or read, and what the error says about it."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    PCM_DRIFT,
    PCM_JOSHI_2020,
    RERAM_WAN_2022,
    Cell,
    CrossbarConfig,
    Device,
    Encoding,
    Flicker,
    Independent,
    LogLinear,
    Mapping,
    Polynomial,
    PowerLaw,
    Proportional,
    ReadNoise,
    Relaxation,
    Sinh,
    StuckAt,
    Tile,
    Wire,
    WriteVerify,
    calibrated,
    matmul,
    probe,
    program,
    with_config,
    with_read_key,
)

OFFSET, FLIP = Encoding(kind="offset"), Encoding(kind="offset", unit_column=True, flip=True)
FOUR = ((-1.0, 1.0),) * 4
INF, NAN = float("inf"), float("nan")


def untyped(cls, **values):
    """Build a part as users do, without the type checks that run in tests, which would refuse it first."""
    part = object.__new__(cls)
    for field in dataclasses.fields(cls):
        default = 1.0 if field.default is dataclasses.MISSING else field.default
        object.__setattr__(part, field.name, values.get(field.name, default))
    part.__post_init__()
    return part


def measured(one=0.5):
    """Return conductances of the cells of `W`, one of which is `one`."""
    return jnp.full((4, 2, 1, 1, 6, 5), 0.5, jnp.float32).at[0, 0, 0, 0, 2, 3].set(one)


def given(*limits, **others):
    return ADC(range="given", limits=limits, **others)


# Values of a field that are refused, and what the message advises.
_FIELDS = [
    (Cell, "bits", [2, (), (2, 0), (9,)], "give 1 to 8 bits for each weight slice"),
    (Cell, "on_off_ratio", [1.0, NAN, np.float32(0.5)], "give Gmax / Gmin > 1, or None for infinite"),
    (Encoding, "kind", ["balanced"], "choose differential or offset"),
    (DAC, "bits", [1, 17], "give 2 to 16 bits, or dac=None for ideal inputs"),
    (DAC, "slice_bits", [0, 9, 1.5], "give 1 to 8 bits, or None for no slicing"),
    (DAC, "scaling", ["batch"], "choose fixed, calibrated or row"),
    (DAC, "limit", [0.0, np.float32(-1), INF, NAN], r"give the largest \|x\|, positive and finite"),
    (DAC, "quantile", [0.1], "give a share of inputs from 0.5 to 1"),
    (ADC, "bits", [0, 17], "give 2 to 16 bits, or adc=None for an ideal ADC"),
    (ADC, "range", ["widest"], "choose calibrated, max, granular or given"),
    (ADC, "convert", ["bit"], "choose slice or sum"),
    (ADC, "quantile", [0.3], "give a share of conversions from 0.5 to 1"),
    (ADC, "gain_error", [-0.1], "a standard deviation cannot be negative"),
    (ADC, "offset_error", [-1.0], "a standard deviation cannot be negative"),
    (ADC, "noise", [np.float32(-1), NAN], "a standard deviation cannot be negative"),
    (ADC, "retries", [-1], "give a number of reads, 0 to 1,000"),
    (Tile, "rows", [0], "give a positive number, or None for no limit"),
    (Tile, "cols", [-4], "give a positive number, or None for no limit"),
    (Tile, "partition", ["half"], "choose equal or full"),
    (Tile, "current_limit", [0.0, np.int32(0)], "give a positive current, or None"),
    (Mapping, "weight_bits", [1, 0], "give 2 to 16 bits, or None for real weights"),
    (Mapping, "scale", ["row"], "choose matrix, tile or column"),
    (Mapping, "quantile", [0.0, 1.5], r"give a share of weights in \(0, 1\]"),
    (Independent, "sigma", [-0.1, NAN, np.float16(-0.5)], "give a number at least 0"),
    (Proportional, "sigma", [-1], "give a number at least 0"),
    (ReadNoise, "sigma", [-0.1], "give a number at least 0"),
    (ReadNoise, "kind", ["white"], "choose independent or proportional"),
    (StuckAt, "low", [1.5], "give a number at least 0 and at most 1"),
    (StuckAt, "high", [-0.1], "give a number at least 0 and at most 1"),
    (WriteVerify, "tolerance", [0.0], "give a number above 0"),
    (WriteVerify, "pulses", [0], "give the most pulses of a cell, 1 to 1,000,000"),
    (PowerLaw, "exponent", [-0.1], "give a number at least 0"),
    (PowerLaw, "start", [0.0], "give a number above 0"),
    (Flicker, "magnitude", [-1.0], "give a number at least 0"),
    (Relaxation, "spread", [-0.1], "give a number at least 0"),
    (Sinh, "scale", [0.0], "give a number above 0"),
    (Device, "time", [-1.0], "give a number at least 0"),
    (Device, "clip", ["none"], r"choose positive \(G >= 0\) or range"),
    (Device, "read_noise", [0.01], r"give ReadNoise\(...\), or None"),
    (Device, "programming", [0.01, np.float32(0.5)], "give a function .* Independent"),
    (Device, "drift", ["PCM_DRIFT"], "give a function"),
    (Wire, "row_resistance", [-1e-3], "give a number at least 0"),
    (Wire, "column_resistance", [NAN], "give a number at least 0"),
    (Wire, "tolerance", [0.0], "give a number above 0"),
    (Wire, "relaxation", [2.5], "give a number above 0 and at most 2"),
    (Wire, "iterations", [0], "give the most iterations, 1 to 1,000,000"),
]


@pytest.mark.parametrize(("part", "field", "values", "advice"), _FIELDS)
def test_values_that_no_part_has_are_refused(part, field, values, advice):
    own = part in (Cell, Encoding, DAC, ADC, Tile, Mapping)
    name = part.__name__.lower() if own else part.__name__
    for value in values:
        with pytest.raises(ValueError, match=rf"{name}\.{field} = .*: {advice}"):
            untyped(part, **{field: value})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DAC(bits=0, signed=False), "give 1 to 16 bits"),
        (lambda: Encoding(unit_column=True), "belong to kind='offset'"),
        (lambda: Encoding(kind="offset", two_sided=True), "two_sided belongs to kind='differential'"),
        (lambda: Encoding(kind="offset", flip=True), "set unit_column=True"),
        (lambda: ADC(range="given"), "adc.limits go with adc.range='given'"),
        (lambda: ADC(limits=FOUR), "adc.limits go with adc.range='given'"),
        (lambda: StuckAt(low=0.7, high=0.7), r"StuckAt: low \+ high = 1.4: together at most all cells can be stuck"),
        (lambda: Device(write_verify=WriteVerify(0.1)), "Device.write_verify .* give programming too"),
        (lambda: LogLinear(0.1, 0.0, 0.2, 0.1), "LogLinear: low = 0.2 is above high = 0.1"),
        (lambda: Polynomial(((0.1,), (0.2,))), r"Polynomial.deviation = .* for each of seconds = \(1.0,\)"),
        (lambda: Polynomial(((0.1,),), shift=((0.1,), (0.2,))), "Polynomial.shift = "),
        (lambda: Polynomial(((),)), r"Polynomial.deviation = \(\(\),\): give one tuple of coefficients"),
        (lambda: Polynomial(((0.1,), (0.2,)), seconds=(5.0, 1.0)), "Polynomial.seconds = .*: give rising positive"),
    ],
)
def test_settings_of_a_part_that_do_not_fit_together_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"cell": Cell(bits=None)}, r"cell.bits = None with mapping.weight_bits = 8: either both are None"),
        ({"mapping": Mapping(weight_bits=None)}, r"either both are None"),
        (
            {"cell": Cell(bits=(2, 2, 2))},
            r"hold 6 bits, but 8-bit weights in differential encoding need 7: add a slice",
        ),
        (
            {"cell": Cell(bits=(2, 2, 3)), "encoding": OFFSET},
            r"hold 7 bits, but 8-bit weights in offset encoding need 8",
        ),
        (
            {
                "cell": Cell(bits=None),
                "mapping": Mapping(weight_bits=None),
                "encoding": FLIP,
            },
            r"encoding.flip inverts digits: give cell.bits and mapping.weight_bits",
        ),
        ({"encoding": OFFSET, "device": Device(compensate=True)}, r"device.compensate .* needs kind='differential'"),
        ({"encoding": OFFSET, "adc": ADC(separate=True)}, r"adc.separate .* needs kind='differential'"),
        ({"dac": None, "adc": ADC(range="granular")}, r"adc.range='granular' .* give dac and cell.bits"),
        (
            {"adc": given(*FOUR[:3])},
            r"ADC limits of shape \(3, 2\): give \[lowest, highest\] for each of 4 weight slices",
        ),
        ({"adc": given((-1.0, INF), *FOUR[:3])}, r"ADC limits .* are not finite"),
        ({"adc": given((-1.0, NAN), *FOUR[:3])}, r"ADC limits .* are not finite"),
        ({"adc": given((1.0, 1.0), *FOUR[:3])}, r"ADC range .* is empty: the lowest current must be below the highest"),
        ({"adc": given((1.0, -1.0), *FOUR[:3])}, r"ADC range .* is empty"),
        ({"adc": given((0.0, 1.0), *FOUR[:3])}, r"one-sided, but these sums are signed: give \[-a, a\]"),
        ({"adc": given(*FOUR), "dac": DAC(signed=False), "encoding": OFFSET}, r"never negative: give \[0, a\]"),
        ({"adc": given(*FOUR, separate=True), "dac": DAC(signed=False)}, r"never negative: give \[0, a\]"),
        ({"adc": given(*((0.0, 0.0),) * 4)}, r"ADC range .* is empty"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        CrossbarConfig(**parts)


W = jnp.ones((6, 5), jnp.float32)
NOISY, _NOISY_ADC = Device(programming=Independent(0.1)), ADC(range="max", noise=0.5)


@pytest.mark.parametrize(
    "weights, message",
    [
        (jnp.ones(5, jnp.float32), r"weights of shape \(5,\): give a matrix \[d_in, d_out\]"),
        (jnp.ones((2, 6, 5), jnp.float32), r"weights of shape \(2, 6, 5\): .* use jax.vmap for stacks"),
        (jnp.ones((0, 5), jnp.float32), r"weights of shape \(0, 5\)"),
        (jnp.ones((6, 5), jnp.int32), r"weights of dtype int32: give floating point numbers"),
        (W.at[2, 3].set(jnp.nan), r"1 of 30 weights are NaN or infinite"),
        (W.at[0].set(-jnp.inf), r"5 of 30 weights are NaN or infinite"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        program(weights, CrossbarConfig())


@pytest.mark.parametrize("wrong", [lambda G: G[:1], lambda G: G.mean(), lambda G: G[0]])
@pytest.mark.parametrize("field", ["programming", "drift", "iv"])
def test_functions_of_a_device_return_a_value_for_each_cell(field, wrong):
    of_cells = {field: (lambda v, G: wrong(G)) if field == "iv" else (lambda G, key, time: wrong(G))}
    config = CrossbarConfig(device=Device(**of_cells, time=1.0 if field == "drift" else None))
    with pytest.raises(ValueError, match=rf"Device.{field} returned values of shape .* for cells of shape .*, 6, 5\)"):
        matmul(jnp.ones((1, 6), jnp.float32), program(W, config, jax.random.key(0)))


@pytest.mark.parametrize(
    "device",
    [Device(time=10.0), *(Device(programming=model, time=10.0) for model in (Independent(0.1), PCM_JOSHI_2020))],
)
def test_a_time_that_changes_nothing_is_refused(device):
    with pytest.raises(ValueError, match=r"device.time = 10.0 changes nothing, .*: give device.drift too"):
        program(W, CrossbarConfig(device=device), jax.random.key(0))
    for ages in (RERAM_WAN_2022, lambda G, key, time: G / (1 + time)):
        program(W, CrossbarConfig(device=dataclasses.replace(device, programming=ages)), jax.random.key(0))


def test_constant_weights_inside_jit_are_checked():
    bad = W.at[2, 3].set(jnp.nan)
    with pytest.raises(ValueError, match="1 of 30 weights are NaN"):
        jax.jit(lambda: program(bad, CrossbarConfig()).codes)()


@pytest.mark.parametrize(
    "config",
    [
        CrossbarConfig(device=NOISY),
        CrossbarConfig(device=Device(stuck=StuckAt(low=0.1))),
        CrossbarConfig(device=Device(drift=PCM_DRIFT, time=10.0)),
        CrossbarConfig(adc=ADC(range="max", gain_error=0.1)),
        CrossbarConfig(adc=ADC(range="max", offset_error=0.1)),
    ],
)
def test_a_random_chip_needs_a_key(config):
    with pytest.raises(ValueError, match=r"random .*: give the chip's key, as in jax.random.key\(0\)"):
        program(W, config)
    assert program(W, config, jax.random.key(0)).shape == (6, 5)


def test_ranges_of_another_number_of_tiles_are_refused():
    limits = np.tile(np.asarray([-3.0, 3.0]), (2, 4, 1))
    config = CrossbarConfig(tile=Tile(rows=2), adc=ADC(range="given", limits=limits))
    with pytest.raises(ValueError, match=r"ADC limits of 2 row tiles, but .* 3"):
        program(W, config)
    chip = program(W, CrossbarConfig(tile=Tile(rows=2), adc=ADC(range="max")))
    with pytest.raises(ValueError, match=r"chip.limits of shape \(2, 4, 2\): give .* or \(3, 4, 2\)"):
        matmul(jnp.ones((2, 6)), dataclasses.replace(chip, limits=jnp.asarray(limits, jnp.float32)))


@pytest.mark.parametrize(
    "config, path, message",
    [
        (CrossbarConfig(adc=ADC(bits=4, range="max")), "product", "not exact here: the ADC loses bits"),
        (CrossbarConfig(tile=Tile(wire=Wire())), "product", r"not exact here: IR drop"),
        (CrossbarConfig(), "loop", r"path='loop' cannot compute this without an ADC"),
        (CrossbarConfig(tile=Tile(current_limit=1.0), adc=ADC(range="max")), "loop", r"column currents are limited"),
        (CrossbarConfig(encoding=FLIP, dac=DAC(signed=False), adc=_NOISY_ADC), "loop", "noise below zero"),
    ],
)
def test_paths_that_are_not_exact_are_refused(config, path, message):
    with pytest.raises(ValueError, match=message):
        program(W, config, path=path)


def test_bad_inputs_are_refused():
    x = jnp.ones((3, 7), jnp.float32)
    config = CrossbarConfig()
    with pytest.raises(ValueError, match=r"x of shape \(3, 7\) meets arrays of \(6, 5\): its last axis must be 6"):
        matmul(x, program(W, config))
    with pytest.raises(ValueError, match=r"its last axis must be 6"):
        jax.jit(matmul)(x, program(W, config))
    with pytest.raises(ValueError, match=r"x of shape \(\) meets arrays of \(6, 5\)"):
        inspect.unwrap(matmul)(jnp.float32(1), program(W, config))
    for changes in ({"device": Device(read_noise=ReadNoise(0.1))}, {"adc": ADC(bits=10, range="granular", noise=0.1)}):
        with pytest.raises(ValueError, match="again for every read: give it a key"):
            matmul(x[:, :6], program(W, dataclasses.replace(config, **changes)))
    for read in (matmul, probe):
        with pytest.raises(ValueError, match=r"x of dtype int32: give floating point numbers"):
            inspect.unwrap(read)(jnp.ones((2, 6), jnp.int32), program(W, config))


@pytest.mark.parametrize("path", [None, "definition"])
def test_an_adc_is_read_only_once_it_is_calibrated(path):
    config = CrossbarConfig(adc=ADC(bits=4))
    state = program(W, config, path=path)
    x = jnp.ones((3, 6), jnp.float32)
    with pytest.raises(ValueError, match=r"has an ADC whose range comes from data: chip = calibrated\(chip, "):
        matmul(x, state)
    _, statistics = probe(x, state)
    matmul(x, calibrated(state, statistics))
    nothing = jax.tree.map(jnp.zeros_like, statistics)
    with pytest.raises(ValueError, match="calibration saw no conversion: probe the arrays with some inputs first"):
        calibrated(state, nothing)


def test_swept_values_and_placeholders_pass():
    """Arrays, tracers and a pytree's placeholders are no plain numbers: they are not refused."""
    config = CrossbarConfig(
        cell=Cell(on_off_ratio=10.0), adc=ADC(range="given", limits=FOUR), device=NOISY, tile=Tile(current_limit=2.0)
    )
    leaves, structure = jax.tree.flatten(config)
    assert jax.tree.unflatten(structure, [object()] * len(leaves)).adc.bits == 8
    assert jax.tree.unflatten(structure, [None] * len(leaves)).cell.bits == (2, 2, 2, 2)
    jax.eval_shape(lambda config: jax.tree.leaves(jax.tree.map(lambda v: v * 2, config)), config)
    assert hash(structure) == hash(jax.tree.structure(config))


# State that was supplied.


@pytest.mark.parametrize(
    "programmed, read, message",
    [
        (CrossbarConfig(), CrossbarConfig(cell=Cell(bits=(4, 4))), r"cell.bits = \(4, 4\), not \(2, 2, 2, 2\)"),
        (CrossbarConfig(), CrossbarConfig(encoding=OFFSET), r"encoding.kind = 'offset', not 'differential'"),
        (CrossbarConfig(), CrossbarConfig(device=Device(read_noise=ReadNoise(0.1))), r"device.read_noise = ReadNoise"),
        (
            CrossbarConfig(cell=Cell(on_off_ratio=10.0)),
            CrossbarConfig(cell=Cell(on_off_ratio=20.0)),
            r"cell.on_off_ratio = 20.0, not 10.0",
        ),
        (
            CrossbarConfig(device=Device(drift=PCM_DRIFT)),
            CrossbarConfig(device=Device(drift=PCM_DRIFT, time=1e6)),
            r"device.time = 1000000.0, not None. Read them with their own, or program",
        ),
        (CrossbarConfig(), CrossbarConfig(cell=Cell(on_off_ratio=jnp.float32(9))), r"ratio = an array, not None"),
        (
            CrossbarConfig(adc=given(*FOUR)),
            CrossbarConfig(adc=given(*FOUR[:3], (-2.0, 2.0))),
            r"adc.limits\[3\]\[0\] = -2.0, not -1.0; adc.limits\[3\]\[1\] = 2.0, not 1.0",
        ),
    ],
)
def test_arrays_of_another_configuration_are_not_read(programmed, read, message):
    state, x = program(W, programmed), jnp.ones((2, 6), jnp.float32)
    key = jax.random.key(0)

    def reading(by):
        return lambda x, chip: by(x, with_read_key(with_config(chip, read), key))

    for multiply in (reading(matmul), jax.jit(reading(matmul)), reading(probe)):
        with pytest.raises(ValueError, match=f"programmed with another configuration: .*{message}"):
            multiply(x, state)


def test_calibration_with_another_configuration_is_refused():
    config = CrossbarConfig(adc=ADC(bits=4))
    state = program(W, config)
    _, statistics = probe(jnp.ones((3, 6), jnp.float32), state)
    with pytest.raises(ValueError, match=r"another configuration: adc.bits = 5, not 4"):
        calibrated(with_config(state, CrossbarConfig(adc=ADC(bits=5))), statistics)
    calibrated(with_config(state, CrossbarConfig(adc=ADC(bits=4, quantile=0.9, clip_share=0.5))), statistics)


def test_a_chip_is_read_with_other_settings_of_a_read():
    """The size of read noise, warnings, swept values, and functions, which cannot be compared."""
    x, key = jnp.ones((2, 6), jnp.float32), jax.random.key(0)

    def made(sigma=0.1, ratio=10.0, clip_share=0.02):
        device = Device(programming=lambda G, key, time: G, read_noise=ReadNoise(sigma))
        adc = ADC(range="max", clip_share=clip_share)
        return CrossbarConfig(cell=Cell(on_off_ratio=ratio), adc=adc, device=device)

    state = program(W, made(), key)
    for other in (made(sigma=0.2), made(clip_share=0.5), made(ratio=jnp.float32(10.0))):
        placed = with_read_key(with_config(state, other), key)
        assert jax.eval_shape(lambda x, state=placed: matmul(x, state), x).shape == (2, 5)


@pytest.mark.parametrize(
    ("config", "key", "conductances", "message"),
    [
        (
            CrossbarConfig(),
            None,
            measured()[:, :1],
            r"of shape \(4, 1, 1, 1, 6, 5\): this matrix takes \(4, 2, 1, 1, 6, 5\)",
        ),
        (CrossbarConfig(), None, measured(40.0), r"from 0.5 to 40: .* microsiemens by the Gmax"),
        (CrossbarConfig(), None, measured(-0.1), r"from -0.1 to 0.5: give fractions of Gmax"),
        (CrossbarConfig(), None, measured(NAN), r"from nan to nan: give fractions of Gmax, finite"),
        (CrossbarConfig(), None, measured(INF), r"conductances from 0.5 to inf"),
        (CrossbarConfig(adc=ADC(range="max", gain_error=0.1)), None, measured(), "give the chip's key"),
        (
            CrossbarConfig(device=Device(drift=PCM_DRIFT, time=1e6)),
            jax.random.key(0),
            measured(),
            r"device.time = 1000000.0 would add drift: set device.time=None",
        ),
    ],
    ids=["shape", "microsiemens", "negative", "NaN", "infinite", "no key", "drift"],
)
def test_measured_conductances_that_no_array_has_are_refused(config, key, conductances, message):
    with pytest.raises(ValueError, match=message):
        program(W, config, key, conductances=conductances)


def test_keys_of_another_number_than_the_arrays_are_refused():
    chip = program(W, CrossbarConfig(device=Device(read_noise=ReadNoise(0.1))))
    with pytest.raises(ValueError, match=r"keys of shape \(2,\) for arrays of \(6, 5\): give one key"):
        with_read_key(chip, jax.random.split(jax.random.key(0), 2))
