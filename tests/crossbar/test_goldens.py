"""Outputs of CrossSim, of its loop in NumPy for further configurations, and of aihwkit."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from json_files import read_json
from numpy.testing import assert_allclose

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    Cell,
    CrossbarConfig,
    Encoding,
    Mapping,
    Tile,
    Wire,
    matmul,
    program,
)

_OFFSET = Encoding(kind="offset")
_UNIT = Encoding(kind="offset", unit_column=True)
# CrossSim's slices have equal bits, of which 8-bit weights leave one unused.
_EQUAL = Cell(bits=(2, 2, 2, 2))
_FINITE = Cell(bits=(2, 2, 2, 2), on_off_ratio=7.3)
_REAL = {"cell": Cell(bits=None), "mapping": Mapping(weight_bits=None)}
_REAL_FINITE = _REAL | {"cell": Cell(bits=None, on_off_ratio=7.3)}
_LEVELS = {"cell": Cell(bits=(5,)), "mapping": Mapping(weight_bits=5)}
_WIRE = Wire(
    row_resistance=0.0007,
    column_resistance=0.0013,
    tolerance=1e-13,
    iterations=3000,
    relaxation=0.9,
)
_RANGES = np.array([9.37, 8.11, 9.37, 2.53])  # no sum lies half-way between two codes


def _config(tops, *, adc=None, dac=None, tile=None, **parts):
    """Return CrossSim's defaults with ADCs of 7 bits, whose highest currents are `tops`, [K] or [R, K]."""
    inputs = DAC(scaling="fixed", **dac or {})
    converter = {"bits": 7} | (adc or {})
    subtracted = parts.get(
        "encoding", Encoding()
    ).kind == "differential" and not converter.get("separate")
    tops = np.asarray(tops, float)
    limits = np.stack(
        [-tops if inputs.signed or subtracted else 0 * tops, tops], axis=-1
    )
    outputs = ADC(range="given", limits=limits, **converter)
    return CrossbarConfig(
        dac=inputs,
        adc=outputs,
        tile=Tile(**{"cols": None} | (tile or {})),
        **{"cell": _EQUAL} | parts,
    )


_8_BITS = {"adc": {"bits": 8}}
# By CrossSim itself. Its range MAX is the height of an array; that of offset encoding rounds it to a power of two.
NAMES = {
    "c01_bal_w8s4_fpin_noadc": CrossbarConfig(
        cell=_EQUAL, tile=Tile(cols=None), dac=None
    ),
    "c02_bal_w8s4_in8serial_noadc": CrossbarConfig(
        cell=_EQUAL, tile=Tile(cols=None), dac=DAC(scaling="fixed")
    ),
    "c03_bal_w8s4_in8serial_adc8max": _config([100] * 4, **_8_BITS),
    "c04_bal_w8s4_in8serial_adc6clip": _config([11, 11, 11, 1.375], adc={"bits": 6}),
    "c05_off_w8s4_in8serial_adc8max": _config(
        [512 / 3] * 4, encoding=_OFFSET, **_8_BITS
    ),
    "c06_off_unitcol_w8s4_adc8gran": _config([128 / 3] * 4, encoding=_UNIT, **_8_BITS),
    "c07_bal_w8s8_adc8max": _config([100] * 8, cell=Cell(bits=(1,) * 8), **_8_BITS),
    "c08_bal_w8s2_adc8max": _config([100] * 2, cell=Cell(bits=(4, 4)), **_8_BITS),
    "c11_bal_w4s2_adc8max": _config(
        [100] * 2, cell=Cell(bits=(2, 2)), mapping=Mapping(weight_bits=4), **_8_BITS
    ),
    "c12_bal_w8s4_onoff10_adc8max": _config(
        [100] * 4, cell=Cell(bits=(2, 2, 2, 2), on_off_ratio=10.0), **_8_BITS
    ),
    "c15_bal_singletile_adc8max": _config([300] * 4, tile={"rows": None}, **_8_BITS),
    "c16_bal_310_partmax_adc8max": _config(
        [[128] * 4, [128] * 4, [54] * 4],
        tile={"rows": 128, "partition": "full"},
        **_8_BITS,
    ),
}


def _load(folder, name):
    """Return what is told of a case of CrossSim, and its arrays with the weights and inputs."""
    case = read_json(folder / "configurations.json")["cases"][name]
    width = case["width"]
    bits = case["changes"].get("core.weight_bits", 8)
    with (
        np.load(folder / "inputs.npz") as inputs,
        np.load(folder / f"{name}.npz") as found,
    ):
        given = {
            "W": inputs[f"W_{width}"],
            "x": inputs[f"x_{width}"],
            "W_eff": inputs[f"W_eff_{width}_{bits}"],
        }
        return case, dict(found) | given


def product(config, W, x, dtype, path):
    # Compiled together: weights programmed one operation after the other took half of the CPU time more.
    read = jax.jit(lambda W, x: matmul(x, program(W, config, path=path)))
    return np.asarray(read(jnp.asarray(W.T, dtype), jnp.asarray(x.T, dtype))).T


@pytest.mark.parametrize("name", NAMES)
def test_products_and_arrays_are_those_of_crosssim(goldens, name):
    case, z = _load(goldens / "crossbar", name)
    config = NAMES[name]

    @jax.jit
    def programmed_and_read(W, x):
        chip = program(W, config, path="definition")
        return chip, matmul(x, chip)

    with jax.enable_x64(True):
        chip, y = programmed_and_read(
            jnp.asarray(z["W"].T, float), jnp.asarray(z["x"].T, float)
        )
    assert_allclose(y.T, z["y"], rtol=0, atol=1e-9 * np.abs(z["y"]).max())
    assert list(chip.geometry.rows) == case["tile_input_sizes"]
    # What was stored in float32.
    assert_allclose(
        chip.codes * chip.scale, z["W_eff"].T, rtol=0, atol=1e-7 * np.abs(z["W"]).max()
    )
    g_min = float(config.g_min)
    rows = case["tile_input_sizes"][0]
    for i, top in enumerate(chip.geometry.levels):
        G = g_min + np.asarray(chip.cells)[i, :, 0, 0, -rows:] / top * (1 - g_min)
        theirs = [z[f"G_s{i}_{kind}"].T for kind in "pno" if f"G_s{i}_{kind}" in z]
        if config.encoding.unit_column:  # CrossSim's comes first
            theirs = [np.roll(each, -1, axis=1) for each in theirs]
        assert_allclose(G, theirs, rtol=0, atol=1e-7)


# By a loop in NumPy that agrees with CrossSim.
CASES = {
    "three-bit DAC and a short top slice": _config(
        _RANGES, dac={"bits": 9, "slice_bits": 3}
    ),
    "analogue shift-and-add": _config(_RANGES, adc={"convert": "sum"}),
    "other input range": _config(_RANGES, dac={"limit": 0.6}),
    "current limit": _config(_RANGES, tile={"current_limit": 3.3}),
    "unsigned inputs, offset": _config(
        3 * _RANGES, dac={"signed": False}, encoding=_OFFSET
    ),
    "unsigned inputs, offset at MAX": _config(
        [[64 / 3 * 127 / 128 * 256 / 255] * 4] * 3,
        dac={"signed": False},
        encoding=_OFFSET,
        tile={"rows": 23},
    ),
    "separate conversion, on/off ratio": _config(
        _RANGES, adc={"separate": True}, cell=_FINITE
    ),
    "separate conversion, unsigned inputs": _config(
        _RANGES, adc={"bits": 6, "separate": True}, dac={"signed": False}
    ),
    "IR drop": _config(_RANGES, tile={"wire": _WIRE}),
    "IR drop, on/off ratio, current limit": _config(
        _RANGES, tile={"wire": _WIRE, "current_limit": 3.3}, cell=_FINITE
    ),
    "IR drop, digital offset": _config(
        3 * _RANGES, tile={"wire": _WIRE}, cell=_FINITE, encoding=_OFFSET
    ),
    "EQUAL partition, last array the largest": _config(_RANGES, tile={"rows": 19}),
    "MAX partition of columns": _config(_RANGES, tile={"cols": 5}),
    "offset at MAX, arrays of their own ranges": _config(
        [[64 / 3 * 126 / 127] * 4] * 3, encoding=_OFFSET, tile={"rows": 24}
    ),
    "offset, on/off ratio": _config(3 * _RANGES, encoding=_OFFSET, cell=_FINITE),
    "unit column, on/off ratio": _config(3 * _RANGES, encoding=_UNIT, cell=_FINITE),
    "three slices of 8 bits": _config(_RANGES[1:], cell=Cell(bits=(3, 3, 3))),
    "16-bit ISAAC": _config(
        [255 / 3 * 32768 / 32767] * 8,
        adc={"bits": 9},
        dac={"bits": 16},
        cell=Cell(bits=(2,) * 8, on_off_ratio=1000.0),
        encoding=_UNIT,
        mapping=Mapping(weight_bits=16),
    ),
    "defaults": crossbar.PRESETS["crosssim"],
    "unsliced": _config([7.77], **_REAL),
    "unsliced, separate conversion at MAX": _config(
        [55], adc={"separate": True}, **_REAL
    ),
    "unsliced, cell levels": _config(
        [7.77], cell=Cell(bits=(4,), on_off_ratio=7.3), mapping=Mapping(weight_bits=5)
    ),
    "unsliced, two-sided": _config(
        [7.77], encoding=Encoding(two_sided=True), **_REAL_FINITE
    ),
    "unsliced, offset, unit column": _config([7.77], encoding=_UNIT, **_REAL_FINITE),
    "unsliced, unit column, cell levels": _config([7.77], encoding=_UNIT, **_LEVELS),
}
# CrossSim divides this one by all levels of a cell, although it leaves the lowest one unused.
_GAINS = {"unsliced, unit column, cell levels": 30 / 31}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.long if name.startswith("IR drop, ") else ()
        )
        for name in CASES
    ],
)
def test_products_of_further_configurations_are_those_of_crosssim(goldens, name):
    rng = np.random.default_rng(5)
    W = rng.normal(size=(12, 55))
    x = rng.uniform(-1, 1, (55, 4))
    x = x if CASES[name].signed_inputs else np.abs(x)
    with np.load(goldens / "crossbar" / "further.npz") as found:
        theirs = found[name.replace("/", " ")]
    with jax.enable_x64(True):
        ours = product(CASES[name], W, x, np.float64, "definition") * _GAINS.get(
            name, 1
        )
    assert_allclose(ours, theirs, rtol=0, atol=1e-9 * np.abs(theirs).max())


@pytest.mark.parametrize(
    "name, model",
    [
        ("s01_prog_indep5_noadc", crossbar.Independent),
        pytest.param(
            "s03_prog_prop5_noadc", crossbar.Proportional, marks=pytest.mark.long
        ),
    ],
)
def test_programming_errors_are_those_of_crosssim(goldens, name, model):
    """200 chips: RMS of the error within 3 %, means of single outputs by z-score with both samples' errors."""
    case, z = _load(goldens / "crossbar", name)
    _, quiet = _load(goldens / "crossbar", "c02_bal_w8s4_in8serial_noadc")
    sigma = case["changes"]["xbar.device.programming_error.magnitude"]
    config = CrossbarConfig(
        cell=_EQUAL,
        tile=Tile(cols=None),
        dac=DAC(scaling="fixed"),
        device=crossbar.Device(programming=model(sigma)),
    )
    W = jnp.asarray(z["W"].T, jnp.float32)
    x = jnp.asarray(z["x"].T, jnp.float32)
    draws = case["draws"]

    @jax.jit
    def read(keys):
        return jax.vmap(lambda key: matmul(x, program(W, config, key)).T)(keys)

    error = (
        np.asarray(read(jax.random.split(jax.random.key(3), draws)), float) - quiet["y"]
    )
    rms = np.sqrt(np.mean(error**2))
    theirs = np.sqrt(np.mean(z["err_mean"] ** 2 + z["err_std"] ** 2))
    assert_allclose(rms / theirs, 1, atol=0.03)
    score = (error.mean(0) - z["err_mean"]) / np.sqrt(
        (error.var(0) + z["err_std"] ** 2) / draws
    )
    # Of 1024 normal scores the largest is above 4.9 once in a thousand seeds; outputs of one chip add correlation.
    assert np.abs(score).max() < 4.9
    assert abs(np.sqrt(np.mean(score**2)) - 1) < 0.15
    assert_allclose(np.mean(error.std(0) / z["err_std"]), 1, atol=0.02)


_PAIRS = {
    "cell": Cell(bits=None),
    "mapping": Mapping(weight_bits=None),
    "tile": Tile(rows=512, cols=512),
    "dac": None,
}
_CMO = {
    "programming": crossbar.RERAM_CMO_2025,
    "drift": crossbar.RERAM_CMO_DRIFT,
    "clip": "range",
}
_TECHNOLOGIES = {
    "pcm": (
        None,
        {"programming": crossbar.PCM_JOSHI_2020, "drift": crossbar.PCM_DRIFT},
    ),
    "reram": (None, {"programming": crossbar.RERAM_WAN_2022}),
    "cmo": (88.19 / 9, _CMO),
}


@pytest.mark.parametrize("name", _TECHNOLOGIES)
def test_drift_and_its_compensation_are_those_of_aihwkit(goldens, name):
    """Factor of the compensation, and error of the weights without and with it, at three ages."""
    theirs = read_json(goldens / "aihwkit" / "drift.json")[name]
    with np.load(goldens / "aihwkit" / "torch_inference_8b.npz") as z:
        W = jnp.asarray(z["W"].T)
    ratio, effects = _TECHNOLOGIES[name]

    @jax.jit
    @jax.vmap
    def errors(key, time):
        device = crossbar.Device(**effects, time=time, compensate=True)
        config = CrossbarConfig(
            **_PAIRS | {"cell": Cell(bits=None, on_off_ratio=ratio)}, device=device
        )
        chip = program(W, config, key)
        factor = chip.scale[0, 0] / jnp.max(jnp.abs(W))
        held = crossbar.programmed_weights(chip)
        return factor, *(
            jnp.linalg.norm(each - W) / jnp.linalg.norm(W)
            for each in (held / factor, held)
        )

    ages = jnp.asarray([float(age) for age in theirs])
    chips = 8
    found = errors(
        jax.random.split(jax.random.key(0), len(ages) * chips), jnp.repeat(ages, chips)
    )
    factors, plain, compensated = (
        np.asarray(found).reshape(3, len(ages), chips).mean(axis=2)
    )
    assert_allclose(factors, [row["factor"] for row in theirs.values()], rtol=0.004)
    assert_allclose(plain, [row["error"] for row in theirs.values()], rtol=0.02)
    assert_allclose(
        compensated, [row["compensated"] for row in theirs.values()], rtol=0.02
    )


def test_the_preset_aihwkit_is_its_default_configuration(goldens):
    """Products without output noise, and the noise of an input that is read 200 times."""
    with np.load(goldens / "aihwkit" / "torch_inference_8b.npz") as z:
        W = z["W"].T / np.abs(z["W"]).max()
        x = z["x"]
    with np.load(goldens / "aihwkit" / "default.npz") as z:
        y = z["y"]
        spread = z["spread"]
    noisy = replace(crossbar.PRESETS["aihwkit"], device=crossbar.Device())
    quiet = replace(noisy, adc=replace(noisy.adc, noise=None))
    assert_allclose(
        product(quiet, W.T, x.T, np.float32, None).T, y, atol=1e-5 * np.abs(y).max()
    )
    chip = program(jnp.asarray(W), noisy)
    read = jax.jit(
        jax.vmap(
            lambda key: matmul(jnp.asarray(x[0]), crossbar.with_read_key(chip, key))
        )
    )
    ours = np.asarray(read(jax.random.split(jax.random.key(0), 200))) - y[0]
    assert_allclose(ours.std(axis=0).mean(), spread.mean(), rtol=0.03)


def test_a_tile_is_that_of_aihwkit(goldens):
    """A tile of aihwkit: real-valued weights scaled per tile, one pulse, and a converter of absolute range."""
    z = dict(np.load(goldens / "aihwkit" / "torch_inference_8b.npz"))
    # Its DAC rounds to 2 / (2^8 - 2) and its ADC to 20 / (2^8 - 2): 254 steps from -b to b are our signed 8 bits.
    with jax.enable_x64(True):
        config = CrossbarConfig(
            cell=Cell(bits=None),
            mapping=Mapping(weight_bits=None, scale="tile"),
            tile=Tile(rows=128, cols=128),
            dac=DAC(bits=8, slice_bits=None, scaling="fixed", limit=1.0),
            adc=ADC(bits=8, range="given", limits=((-10.0, 10.0),)),
        )
        for path in (None, "definition"):
            state = program(jnp.asarray(z["W"].T, float), config, path=path)
            y = np.asarray(matmul(jnp.asarray(z["x"], float), state))
            assert_allclose(
                state.scale, np.broadcast_to(z["scale"][:, None], (3, 64)), rtol=1e-6
            )
            assert_allclose(y, z["y"], rtol=0, atol=1e-5 * np.abs(z["y"]).max())
