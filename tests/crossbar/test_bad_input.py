"""What cannot be built, programmed or read, and what the error says about it."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    Cell,
    CrossbarConfig,
    Device,
    Encoding,
    Mapping,
    Tile,
    Wire,
    matmul,
    probe,
)

OFFSET = Encoding(kind="offset")
FLIP = Encoding(kind="offset", unit_column=True, flip=True)
FOUR = ((-1.0, 1.0),) * 4
INF = float("inf")
NAN = float("nan")


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


W = jnp.ones((6, 5), jnp.float32)
X = jnp.ones((3, 6), jnp.float32)
BAD = W.at[2, 3].set(NAN)
KEY = jax.random.key(0)
AT_MAX = ADC(range="max")
RANDOM = Device(programming=crossbar.Independent(0.1))
RANDOM_READS = Device(read_noise=crossbar.ReadNoise(0.1))


def chip(key=None, path=None, conductances=None, weights=W, **parts):
    """Program a crossbar with some parts."""
    return crossbar.program(
        weights, CrossbarConfig(**parts), key, path=path, conductances=conductances
    )


def made_of(programming=None, **device):
    """Program cells at the age of ten seconds, unless another one is given."""
    return chip(
        KEY, device=Device(**{"programming": programming, "time": 10.0} | device)
    )


# Values of a field that are refused, and what the message advises.
_FIELDS = [
    (Cell, "bits", [2, (), (2, 0), (9,)], "give 1 to 8 bits for each weight slice"),
    (
        Cell,
        "on_off_ratio",
        [1.0, NAN, np.float32(0.5)],
        "give Gmax / Gmin > 1, or None for infinite",
    ),
    (Encoding, "kind", ["balanced"], "choose differential or offset"),
    (DAC, "bits", [1, 17], "give 2 to 16 bits, or dac=None for ideal inputs"),
    (DAC, "slice_bits", [0, 9, 1.5], "give 1 to 8 bits, or None for no slicing"),
    (DAC, "scaling", ["batch"], "choose fixed, calibrated or row"),
    (
        DAC,
        "limit",
        [0.0, np.float32(-1), INF, NAN],
        r"give the largest \|x\|, positive and finite",
    ),
    (DAC, "clip_share", [-0.1, 3.0], "give a share of inputs from 0 to 1"),
    (ADC, "clip_share", [-0.1, 3.0], "give a share of conversions from 0 to 1"),
    (DAC, "quantile", [0.1], "give a share of inputs from 0.5 to 1"),
    (ADC, "bits", [0, 17], "give 2 to 16 bits, or adc=None for an ideal ADC"),
    (ADC, "range", ["widest"], "choose calibrated, max, granular or given"),
    (ADC, "convert", ["bit"], "choose slice or sum"),
    (ADC, "quantile", [0.3], "give a share of conversions from 0.5 to 1"),
    (ADC, "gain_error", [-0.1], "give a standard deviation of at least 0"),
    (ADC, "offset_error", [-1.0], "give a standard deviation of at least 0"),
    (ADC, "noise", [np.float32(-1), NAN], "give a standard deviation of at least 0"),
    (Tile, "rows", [0], "give a positive number, or None for no limit"),
    (Tile, "cols", [-4], "give a positive number, or None for no limit"),
    (Tile, "partition", ["half"], "choose equal or full"),
    (Tile, "current_limit", [0.0, np.int32(0)], "give a positive current, or None"),
    (Mapping, "weight_bits", [1, 0], "give 2 to 16 bits, or None for real weights"),
    (Mapping, "scale", ["row"], "choose matrix, tile or column"),
    (Mapping, "quantile", [0.0, 1.5], r"give a share of weights in \(0, 1\]"),
    (
        crossbar.Independent,
        "sigma",
        [-0.1, NAN, INF, np.float16(-0.5)],
        "give a number at least 0 and finite",
    ),
    (crossbar.Proportional, "sigma", [-1], "give a number at least 0"),
    (crossbar.ReadNoise, "sigma", [-0.1], "give a number at least 0"),
    (crossbar.ReadNoise, "kind", ["white"], "choose independent or proportional"),
    (crossbar.StuckAt, "low", [1.5], "give a number at least 0 and at most 1"),
    (crossbar.StuckAt, "high", [-0.1], "give a number at least 0 and at most 1"),
    (crossbar.WriteVerify, "tolerance", [0.0], "give a number above 0"),
    (
        crossbar.WriteVerify,
        "pulses",
        [0],
        "give the most pulses of a cell, 1 to 1,000,000",
    ),
    (crossbar.PowerLaw, "exponent", [-0.1], "give a number at least 0"),
    (crossbar.PowerLaw, "start", [0.0], "give a number above 0"),
    (crossbar.Flicker, "magnitude", [-1.0], "give a number at least 0"),
    (crossbar.Relaxation, "spread", [-0.1], "give a number at least 0"),
    (crossbar.Sinh, "scale", [0.0], "give a number above 0"),
    (Device, "time", [-1.0], "give a number at least 0"),
    (Device, "clip", ["none"], "choose positive or range"),
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
    own = part in (Cell, Encoding, DAC, ADC, Tile, Mapping) or field in ("kind", "clip")
    name = part.__name__.lower() if own else part.__name__
    for value in values:
        with pytest.raises(ValueError, match=rf"{name}\.{field} = .*: {advice}"):
            untyped(part, **{field: value})


_OF_PARTS = [
    (lambda: DAC(bits=0, signed=False), "give 1 to 16 bits"),
    (lambda: Encoding(unit_column=True), "need kind='offset': set it"),
    (
        lambda: Encoding(kind="offset", two_sided=True),
        "two_sided needs kind='differential': set it",
    ),
    (lambda: Encoding(kind="offset", flip=True), "set unit_column=True"),
    (lambda: ADC(range="given"), "adc.limits go with adc.range='given'"),
    (lambda: ADC(limits=FOUR), "adc.limits go with adc.range='given'"),
    (
        lambda: untyped(ADC, architecture=["sar"]),
        r"adc.architecture = \['sar'\]: choose sar, ramp",
    ),
    (
        lambda: crossbar.StuckAt(low=0.7, high=0.7),
        r"StuckAt: low \+ high = 1.4: expected a sum of at most 1",
    ),
    (
        lambda: Device(write_verify=crossbar.WriteVerify(0.1)),
        "Device.write_verify .* give programming too",
    ),
    (
        lambda: crossbar.LogLinear(0.1, 0.0, 0.2, 0.1),
        "LogLinear: low = 0.2 is above high = 0.1",
    ),
    (
        lambda: crossbar.Polynomial(((0.1,), (0.2,))),
        r"Polynomial.deviation = .* for each of seconds = \(1.0,\)",
    ),
    (
        lambda: crossbar.Polynomial(((0.1,),), shift=((0.1,), (0.2,))),
        "Polynomial.shift = ",
    ),
    (
        lambda: crossbar.Polynomial(((),)),
        r"Polynomial.deviation = \(\(\),\): give one tuple of numbers",
    ),
    (
        lambda: crossbar.Polynomial(((0.1,),), extrapolate=True),
        r"extrapolate needs two times, got .* \(1.0,\)",
    ),
    (
        lambda: crossbar.Table((0.5, 0.1), ((0.1, 0.2),)),
        r"Table.targets = \(0.5, 0.1\): give rising shares of Gmax",
    ),
    (
        lambda: crossbar.Table((0.1, 0.5), ((0.1, 0.2),)),
        "rising shares of Gmax that end in 1",
    ),
    (
        lambda: crossbar.Table((0.1, 1.0), ((0.1,),)),
        r"\(0.1,\) at 2 targets: give one number for each target",
    ),
    (
        lambda: crossbar.Polynomial(((0.1,), (0.2,)), seconds=(5.0, 1.0)),
        "Polynomial.seconds = .*: give rising positive",
    ),
]
# Parts that do not fit together.
_OF_CONFIGS = [
    (
        {"cell": Cell(bits=None)},
        r"cell.bits = None, mapping.weight_bits = 8: both or neither must be None",
    ),
    ({"mapping": Mapping(weight_bits=None)}, r"both or neither must be None"),
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
    (
        {"device": Device(programming=crossbar.Table((0.1, 1.0), ((0.1, 0.2),)))},
        r"measured from 0.1 of Gmax on, but the cells' Gmin is 0: .* give cell.on_off_ratio = 10",
    ),
    (
        {"encoding": OFFSET, "device": Device(compensate=True)},
        r"device.compensate .* needs kind='differential'",
    ),
    (
        {"encoding": OFFSET, "adc": ADC(separate=True)},
        r"adc.separate .* needs kind='differential'",
    ),
    (
        {"dac": None, "adc": ADC(range="granular")},
        r"adc.range='granular' .* give dac and cell.bits",
    ),
    (
        {"adc": given(*FOUR[:3])},
        r"ADC limits of shape \(3, 2\): give \[lowest, highest\] for each of 4 slices",
    ),
    ({"adc": given((-1.0, INF), *FOUR[:3])}, r"ADC limits .* are not finite"),
    ({"adc": given((-1.0, NAN), *FOUR[:3])}, r"ADC limits .* are not finite"),
    (
        {"adc": given((1.0, 1.0), *FOUR[:3])},
        r"ADC range .* is empty: the lowest current must be below the highest",
    ),
    ({"adc": given((1.0, -1.0), *FOUR[:3])}, r"ADC range .* is empty"),
    (
        {"adc": given((0.0, 1.0), *FOUR[:3])},
        r"one-sided, but these sums are signed: give \[-a, a\]",
    ),
    (
        {"adc": given(*FOUR), "dac": DAC(signed=False), "encoding": OFFSET},
        r"never negative: give \[0, a\]",
    ),
    (
        {"adc": given(*FOUR, separate=True), "dac": DAC(signed=False)},
        r"never negative: give \[0, a\]",
    ),
    ({"adc": given(*((0.0, 0.0),) * 4)}, r"ADC range .* is empty"),
]
LIMITS = np.tile(np.asarray([-3.0, 3.0]), (2, 4, 1))  # of two row tiles
_NO_KEY = r"random .*: give the chip's key, as in jax.random.key\(0\)"
_AGELESS = r"device.time = 10.0 changes nothing without device.drift: give one"
_OF_CHIPS = [
    (
        lambda: chip(weights=jnp.ones(5)),
        r"weights of shape \(5,\): give a matrix \[d_in, d_out\]",
    ),
    (
        lambda: chip(weights=jnp.ones((2, 6, 5))),
        r"weights of shape \(2, 6, 5\): .* use jax.vmap for stacks",
    ),
    (lambda: chip(weights=jnp.ones((0, 5))), r"weights of shape \(0, 5\)"),
    (
        lambda: chip(weights=jnp.ones((6, 5), jnp.int32)),
        r"weights of dtype int32: give floating point numbers",
    ),
    (lambda: chip(weights=BAD), r"1 of 30 weights are NaN or infinite"),
    (lambda: chip(weights=W.at[0].set(-INF)), r"5 of 30 weights are NaN or infinite"),
    (lambda: jax.jit(lambda: chip(weights=BAD).codes)(), r"1 of 30 weights are NaN"),
    (lambda: made_of(), _AGELESS),
    (lambda: made_of(crossbar.Independent(0.1)), _AGELESS),
    (lambda: made_of(crossbar.PCM_JOSHI_2020), _AGELESS),
    (lambda: chip(device=RANDOM), _NO_KEY),
    (lambda: chip(device=Device(stuck=crossbar.StuckAt(low=0.1))), _NO_KEY),
    (lambda: chip(device=Device(drift=crossbar.PCM_DRIFT, time=10.0)), _NO_KEY),
    (lambda: chip(adc=ADC(range="max", gain_error=0.1)), _NO_KEY),
    (lambda: chip(adc=ADC(range="max", offset_error=0.1)), _NO_KEY),
    (
        lambda: chip(tile=Tile(rows=2), adc=ADC(range="given", limits=LIMITS)),
        r"ADC limits of 2 row tiles, but .* 3",
    ),
    (
        lambda: chip(path="product", adc=ADC(bits=4, range="max")),
        "not exact here: the ADC loses bits",
    ),
    (lambda: chip(path="product", tile=Tile(wire=Wire())), "not exact here: IR drop"),
    (lambda: chip(path="loop"), "path='loop' cannot compute this without an ADC"),
    (
        lambda: chip(path="loop", tile=Tile(current_limit=1.0), adc=AT_MAX),
        "column currents are limited",
    ),
    (
        lambda: chip(path="loop", encoding=FLIP, adc=AT_MAX),
        "columns that are stored inverted",
    ),
    (
        lambda: chip(conductances=measured()[:, :1]),
        r"\(4, 1, 1, 1, 6, 5\): expected \(4, 2, 1, 1, 6, 5\)",
    ),
    (
        lambda: chip(conductances=measured(40.0)),
        r"from 0.5 to 40: .* microsiemens by the Gmax",
    ),
    (
        lambda: chip(conductances=measured(-0.1)),
        r"from -0.1 to 0.5: give fractions of Gmax",
    ),
    (
        lambda: chip(conductances=measured(NAN)),
        r"from nan to nan: give fractions of Gmax, finite",
    ),
    (lambda: chip(conductances=measured(INF)), r"conductances from 0.5 to inf"),
    (
        lambda: chip(conductances=measured(), adc=ADC(range="max", gain_error=0.1)),
        "give the chip's key",
    ),
    (
        lambda: chip(
            KEY,
            conductances=measured(),
            device=Device(drift=crossbar.PCM_DRIFT, time=1e6),
        ),
        r"device.time = 1000000.0 would add drift: set device.time=None",
    ),
]
_AGAIN = "again for every read: give it a key"
_OF_READS = [
    (
        lambda: matmul(X[:, :4], chip()),
        r"x of shape \(3, 4\) meets arrays of \(6, 5\): its last axis must be 6",
    ),
    (lambda: jax.jit(matmul)(X[:, :4], chip()), r"its last axis must be 6"),
    (
        lambda: inspect.unwrap(matmul)(jnp.float32(1), chip()),
        r"x of shape \(\) meets arrays of \(6, 5\)",
    ),
    (
        lambda: inspect.unwrap(matmul)(X.astype(jnp.int32), chip()),
        "x of dtype int32: give floating point numbers",
    ),
    (
        lambda: inspect.unwrap(probe)(X.astype(jnp.int32), chip()),
        "x of dtype int32: give floating point numbers",
    ),
    (lambda: matmul(X, chip(device=RANDOM_READS)), _AGAIN),
    (lambda: matmul(X, chip(adc=ADC(bits=10, range="granular", noise=0.1))), _AGAIN),
    (
        lambda: matmul(
            X,
            dataclasses.replace(
                chip(tile=Tile(rows=2), adc=AT_MAX), limits=jnp.asarray(LIMITS, "f4")
            ),
        ),
        r"chip.limits of shape \(2, 4, 2\): give .* or \(3, 4, 2\)",
    ),
    (
        lambda: crossbar.with_read_key(
            chip(device=RANDOM_READS), jax.random.split(KEY, 2)
        ),
        r"keys of shape \(2,\) for arrays of \(6, 5\): give one key",
    ),
]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *_OF_PARTS,
        *(
            (lambda parts=parts: CrossbarConfig(**parts), message)
            for parts, message in _OF_CONFIGS
        ),
        *_OF_CHIPS,
        *_OF_READS,
    ],
)
def test_what_cannot_be_built_programmed_or_read_is_refused_with_advice(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("wrong", [lambda G: G[:1], lambda G: G.mean()])
@pytest.mark.parametrize("field", ["programming", "drift", "iv"])
def test_functions_of_a_device_return_a_value_for_each_cell(field, wrong):
    of_cells = {
        field: (lambda v, G: wrong(G))
        if field == "iv"
        else (lambda G, key, time: wrong(G))
    }
    with pytest.raises(
        ValueError,
        match=rf"Device.{field} returned values of shape .* for cells of shape .*, 6, 5\)",
    ):
        matmul(X, made_of(**of_cells | ({} if field == "drift" else {"time": None})))


@pytest.mark.parametrize("path", [None, "definition"])
def test_an_adc_is_read_only_once_it_is_calibrated(path):
    state = chip(path=path, adc=ADC(bits=4))
    with pytest.raises(
        ValueError,
        match=r"has an ADC whose range comes from data: chip = calibrated\(chip, ",
    ):
        matmul(X, state)
    _, statistics = probe(X, state)
    matmul(X, crossbar.calibrated(state, statistics))
    nothing = jax.tree.map(jnp.zeros_like, statistics)
    with pytest.raises(
        ValueError,
        match="calibration saw no conversion: probe the arrays with some inputs first",
    ):
        crossbar.calibrated(state, nothing)


def test_swept_values_and_placeholders_pass():
    """Arrays, tracers and a pytree's placeholders are no plain numbers: they are not refused."""
    config = CrossbarConfig(
        cell=Cell(on_off_ratio=10.0),
        adc=given(*FOUR),
        device=RANDOM,
        tile=Tile(current_limit=2.0),
    )
    leaves, structure = jax.tree.flatten(config)
    assert jax.tree.unflatten(structure, [object()] * len(leaves)).adc.bits == 8
    assert jax.tree.unflatten(structure, [None] * len(leaves)).cell.bits == (2, 2, 2, 2)
    jax.eval_shape(
        lambda config: jax.tree.leaves(jax.tree.map(lambda v: v * 2, config)), config
    )
    assert hash(structure) == hash(jax.tree.structure(config))
