"""Outputs of CrossSim, of its loop in NumPy for further configurations, and of aihwkit."""

from typing import Any

import crossbar_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crosssim import Inexpressible, adc_limits, changed, convert, gain, parameters

from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    Cell,
    CrossbarConfig,
    Device,
    Independent,
    Mapping,
    Proportional,
    Tile,
    matmul,
    program,
)
from lorafusion_jax.crossbar.mapping import encoding

NAMES = [
    "c01_bal_w8s4_fpin_noadc",
    "c02_bal_w8s4_in8serial_noadc",
    "c03_bal_w8s4_in8serial_adc8max",
    "c04_bal_w8s4_in8serial_adc6clip",
    "c05_off_w8s4_in8serial_adc8max",
    "c06_off_unitcol_w8s4_adc8gran",
    "c07_bal_w8s8_adc8max",
    "c08_bal_w8s2_adc8max",
    "c11_bal_w4s2_adc8max",
    "c12_bal_w8s4_onoff10_adc8max",
    "c15_bal_singletile_adc8max",
    "c16_bal_310_partmax_adc8max",
]


def product(params: dict[str, Any], W: np.ndarray, x: np.ndarray, dtype: Any, path: Any) -> np.ndarray:
    config, weights = convert(params, W)
    # Compiled together: weights programmed one operation after the other took half of the CPU time more.
    read = jax.jit(lambda weights, x: matmul(x, program(weights, config, path=path)))
    return np.asarray(read(jnp.asarray(weights, dtype), jnp.asarray(x.T, dtype))).T


# Paths of these, other than the definition, compile long.
_LONG = {
    *(
        "c05_off_w8s4_in8serial_adc8max",
        "c06_off_unitcol_w8s4_adc8gran",
        "c07_bal_w8s8_adc8max",
        "c08_bal_w8s2_adc8max",
    ),
    *("c15_bal_singletile_adc8max", "c16_bal_310_partmax_adc8max"),
    *("16-bit ISAAC", "unit column, on/off ratio", "offset, on/off ratio", "separate conversion, on/off ratio"),
    *(
        "unsliced, separate conversion at MAX",
        "unsliced, two-sided",
        "unsliced, offset, unit column",
        "unsliced, offset",
    ),
}
# And the definition of these.
_WIRES = {"IR drop, digital offset", "IR drop, on/off ratio, current limit"}


def _by_path(names, alone=()):
    """The chosen path and the definition; the latter alone where it is what is chosen."""
    both = [(name, path) for name in names for path in (None, "definition") if path or name not in alone]
    return [
        pytest.param(name, path, marks=pytest.mark.long if (path is None and name in _LONG) or name in _WIRES else ())
        for name, path in both
    ]


@pytest.mark.parametrize(("name", "path"), _by_path(NAMES))
def test_products_are_those_of_crosssim(goldens, name, path):
    _, params, z = crossbar_cases.load(goldens / "crossbar", name)
    top = np.abs(z["y"]).max()
    y = product(params, z["W"], z["x"], np.float32, path)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, z["y"], rtol=0, atol=1e-5 * top)
    if path is None:  # in float64 the chosen paths are compared with CrossSim's loop below
        return
    with jax.enable_x64(True):
        y = product(params, z["W"], z["x"], np.float64, path)
        assert y.dtype == np.float64
        np.testing.assert_allclose(y, z["y"], rtol=0, atol=1e-9 * top)


@pytest.mark.parametrize("name", NAMES)
def test_arrays_are_those_of_crosssim(goldens, name):
    case, params, z = crossbar_cases.load(goldens / "crossbar", name)
    with jax.enable_x64(True):
        config, weights = convert(params, z["W"])
        state = program(jnp.asarray(weights), config, path="definition")
        g_min, rows = float(config.g_min), case["tile_input_sizes"][0]
        assert list(state.geometry.rows) == case["tile_input_sizes"]
        for i, top in enumerate(state.geometry.levels):
            G = g_min + np.asarray(state.cells)[i, :, 0, 0, -rows:] / top * (1 - g_min)
            if f"G_s{i}_o" in z:
                theirs = z[f"G_s{i}_o"]  # all stored in float32
                if config.encoding.unit_column:  # CrossSim's comes first
                    theirs = np.roll(theirs, -1, axis=0)
                np.testing.assert_allclose(G[0], theirs.T, rtol=0, atol=1e-7)
            else:
                np.testing.assert_allclose(G[0], z[f"G_s{i}_p"].T, rtol=0, atol=1e-7)
                np.testing.assert_allclose(G[1], z[f"G_s{i}_n"].T, rtol=0, atol=1e-7)
        np.testing.assert_allclose(state.codes * state.scale, z["W_eff"].T, rtol=0, atol=1e-7 * np.abs(z["W"]).max())
        if "x_slices_tile0_col0" in z:
            n = encoding.input_codes(jnp.asarray(z["x"].T), jnp.asarray(1.0), state.geometry, config)
            u = encoding.pulses(n, state.geometry)[:, 0, :rows] / state.geometry.pulse
            np.testing.assert_allclose(u, z["x_slices_tile0_col0"], rtol=0, atol=1e-15)
    if case["adc_limits"] is not None:
        np.testing.assert_allclose(adc_limits(params, rows), case["adc_limits"], rtol=1e-12)


SERIAL = {"xbar__adc__mvm__model": "SignMagnitudeADC", "xbar__adc__mvm__bits": 7}
RANGES = [[-9.37, 9.37], [-8.11, 8.11], [-9.37, 9.37], [-2.53, 2.53]]
CLIPPED = {**SERIAL, "xbar__adc__mvm__calibrated_range": RANGES}
UNSLICED = {**SERIAL, "core__style": 1, "xbar__adc__mvm__calibrated_range": [-7.77, 7.77]}
OFFSET = {
    **CLIPPED,
    "core__bit_sliced__style": 3,
    "xbar__adc__mvm__calibrated_range": [[-r[1] * 3, r[1] * 3] for r in RANGES],
}
UNSIGNED = {
    "xbar__dac__mvm__model": "QuantizerDAC",
    "xbar__dac__mvm__signed": False,
    "core__mapping__inputs__mvm__min": 0.0,
}
WHOLE = {"xbar__dac__mvm__input_bitslicing": False, "xbar__adc__mvm__adc_per_ibit": False}
FINITE = {"xbar__device__infinite_on_off_ratio": False, "xbar__device__Rmax": 7300.0}
WIRES = {
    "xbar__array__parasitics__enable": True,
    "xbar__array__parasitics__Rp_row": 0.7,
    "xbar__array__parasitics__Rp_col": 1.3,
    "simulation__Verr_th_mvm": 1e-13,
    "simulation__Niters_max_parasitics": 3000,
    "simulation__relaxation_gamma": 0.9,
}
ISAAC = {
    "core__weight_bits": 16,
    "core__bit_sliced__num_slices": 8,
    "core__bit_sliced__style": 3,
    "core__offset__style": 2,
    "xbar__dac__mvm__bits": 16,
    "xbar__adc__mvm__model": "SignMagnitudeADC",
    "xbar__adc__mvm__bits": 9,
    "xbar__adc__mvm__adc_range_option": 3,
    "xbar__device__infinite_on_off_ratio": False,
    "xbar__device__Rmin": 2e3,
    "xbar__device__Rmax": 2e6,
}
SEPARATE = {"core__balanced__subtract_current_in_xbar": False}

CASES: dict[str, dict[str, Any]] = {
    "two-bit DAC": {**CLIPPED, "xbar__dac__mvm__slice_size": 2},
    "three-bit DAC and a short top slice": {**CLIPPED, "xbar__dac__mvm__bits": 9, "xbar__dac__mvm__slice_size": 3},
    "inputs in one pulse": {**CLIPPED, **WHOLE},
    "analogue shift-and-add": {**CLIPPED, "xbar__adc__mvm__adc_per_ibit": False},
    "other input range": {**CLIPPED, "core__mapping__inputs__mvm__min": -0.6, "core__mapping__inputs__mvm__max": 0.6},
    "current limit": {**CLIPPED, "xbar__array__Icol_max": 3.3},
    "unsigned inputs": {**CLIPPED, **UNSIGNED},
    "unsigned inputs, offset": {
        **OFFSET,
        **UNSIGNED,
        "xbar__adc__mvm__model": "QuantizerADC",
        "xbar__adc__mvm__calibrated_range": [[0.0, 3 * r[1]] for r in RANGES],
    },
    "unsigned inputs, offset at MAX": {
        **OFFSET,
        **UNSIGNED,
        "xbar__adc__mvm__model": "QuantizerADC",
        "xbar__adc__mvm__adc_range_option": 2,
        "core__rows_max": 23,
    },
    "separate conversion": {**CLIPPED, **SEPARATE},
    "separate conversion, on/off ratio": {**CLIPPED, **SEPARATE, **FINITE},
    "separate conversion, unsigned inputs": {**CLIPPED, **SEPARATE, **UNSIGNED},
    "IR drop": {**CLIPPED, **WIRES},
    "IR drop, on/off ratio, current limit": {**CLIPPED, **WIRES, **FINITE, "xbar__array__Icol_max": 3.3},
    "IR drop, digital offset": {**OFFSET, **WIRES, **FINITE},
    "EQUAL partition, last array the largest": {**CLIPPED, "core__rows_max": 19},
    "MAX partition": {
        **SERIAL,
        "xbar__adc__mvm__bits": 8,
        "core__rows_max": 20,
        "core__mapping__weights__col_partition_strategy": 1,
        "xbar__adc__mvm__adc_range_option": 2,
    },
    "MAX partition of columns": {**CLIPPED, "core__cols_max": 5, "core__mapping__weights__row_partition_strategy": 1},
    "GRANULAR": {**SERIAL, "xbar__adc__mvm__adc_range_option": 3},
    "offset at MAX, arrays of their own ranges": {
        **OFFSET,
        "xbar__adc__mvm__adc_range_option": 2,
        "core__rows_max": 24,
    },
    "offset, on/off ratio": {**OFFSET, **FINITE},
    "unit column, on/off ratio": {**OFFSET, **FINITE, "core__offset__style": 2},
    "three slices of 8 bits": {
        **CLIPPED,
        "core__bit_sliced__num_slices": 3,
        "xbar__adc__mvm__calibrated_range": RANGES[1:],
    },
    "16-bit ISAAC": ISAAC,
    "unsliced": UNSLICED,
    "unsliced, separate conversion at MAX": {**UNSLICED, **SEPARATE, "xbar__adc__mvm__adc_range_option": 2},
    "unsliced, GRANULAR": {**UNSLICED, "xbar__adc__mvm__adc_range_option": 3, "core__weight_bits": 3},
    "unsliced, cell levels": {**UNSLICED, **FINITE, "xbar__device__cell_bits": 4},
    "unsliced, two-sided": {**UNSLICED, **FINITE, "core__balanced__style": 2},
    "unsliced, offset": {**UNSLICED, **FINITE, "core__style": 3},
    "unsliced, offset, unit column": {**UNSLICED, **FINITE, "core__style": 3, "core__offset__style": 2},
    "unsliced, offset, cell levels": {**UNSLICED, "core__style": 3, "xbar__device__cell_bits": 5},
    "unsliced, unit column, cell levels": {
        **UNSLICED,
        "core__style": 3,
        "core__offset__style": 2,
        "xbar__device__cell_bits": 5,
    },
    "percentile": {**CLIPPED, "core__mapping__weights__percentile": 0.98},
    "explicit weight range": {
        **CLIPPED,
        "core__mapping__weights__percentile": None,
        "core__mapping__weights__min": -1.5,
        "core__mapping__weights__max": 1.5,
    },
}


_BY_DEFINITION = {"current limit", *(name for name in CASES if name.startswith("IR drop"))}


@pytest.mark.parametrize(("name", "path"), _by_path(CASES, _BY_DEFINITION))
def test_products_of_further_parameters_are_those_of_crosssim(goldens, name, path):
    params = parameters(**CASES[name])
    rng = np.random.default_rng(5)
    W, x = rng.normal(size=(12, 55)), rng.uniform(-1, 1, (55, 4))
    x = np.abs(x) if not params["xbar"]["dac"]["mvm"]["signed"] else x
    with np.load(goldens / "crossbar" / "further.npz") as found:
        theirs = found[name.replace("/", " ")]
    with jax.enable_x64(True):
        ours = product(params, W, x, np.float64, path) * gain(params)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * np.abs(theirs).max())


@pytest.mark.parametrize("bits, expected", [(2, 2 / 3), (4, 14 / 15), (8, 254 / 255)])
def test_unsliced_offset_has_no_gain_error(bits, expected):
    """CrossSim returns `expected` of W @ x: it divides by all levels although it leaves the lowest unused."""
    params = parameters(core__style=3, xbar__device__cell_bits=bits)
    rng = np.random.default_rng(2)
    assert gain(params) == pytest.approx(expected)
    levels = 2 ** (bits - 1) - 1
    W, x = rng.integers(-levels, levels + 1, (6, 30)).astype(float), rng.integers(-127, 128, (30, 5)) / 127
    W[0, 0] = levels  # every weight is a level: the exact product is known
    with jax.enable_x64(True):
        np.testing.assert_allclose(product(params, W, x, np.float64, "definition"), W @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"xbar__device__drift_error": {"enable": True}}, "drift"),
        ({"xbar__array__parasitics__enable": True, "xbar__array__parasitics__Rp_row_terminal": 1.0}, "terminals"),
        ({**UNSLICED, "core__balanced__style": 2, "xbar__device__cell_bits": 4}, "two-sided"),
        ({**SERIAL, "xbar__adc__mvm__model": "RampADC"}, "RampADC"),
        ({**CLIPPED, "xbar__adc__mvm__model": "QuantizerADC"}, "even number of levels"),
        ({"core__mapping__weights__percentile": 1.2}, "beyond the largest weight"),
        ({"xbar__device__programming_error": {"enable": True, "model": "SONOS", "magnitude": 1}}, "SONOS"),
    ],
)
def test_what_crosssim_has_alone_is_refused(changes, what):
    params = parameters(**changes)
    if what == "terminals":
        params = changed(params, xbar__array__parasitics__Rp_row=1.0)
    with pytest.raises(Inexpressible, match=what):
        convert(params, np.random.default_rng(0).normal(size=(5, 9)))


@pytest.mark.parametrize("name, sigma", [("NormalIndependentDevice", 0.05), ("PCMJoshi", None), ("RRAMWan", None)])
def test_programming_models_have_the_spread_of_crosssims(name, sigma):
    """The spread of many cells against CrossSim's formula in uS."""
    error = {"enable": True, "model": name, "magnitude": 0.05}
    params = parameters(xbar__device__programming_error=error, xbar__device__Rmin=1e6 / 20, xbar__device__Rmax=1e6)
    config, _ = convert(params, np.eye(2))
    fits = {"PCMJoshi": (0.28638599, 0.07585724, -0.00178767), "RRAMWan": (1.053, 2.374e-1, -1.167e-2, 1.536e-4)}
    for g in (0.3, 0.6, 0.9):
        drawn = config.device.programming(jnp.full(40_000, g, jnp.float32), jax.random.key(1), None)
        wanted = sigma or sum(c * (20 * g) ** k for k, c in enumerate(fits[name])) / 20
        assert abs(float(jnp.std(drawn)) / wanted - 1) < 5 / np.sqrt(2 * 40_000)


@pytest.mark.parametrize(
    "name, model",
    [
        ("s01_prog_indep5_noadc", Independent),
        pytest.param("s03_prog_prop5_noadc", Proportional, marks=pytest.mark.long),
    ],
)
def test_programming_errors_are_those_of_crosssim(goldens, name, model):
    """200 chips: RMS of the error within 3 %, means of single outputs by z-score with both samples' errors."""
    case, params, z = crossbar_cases.load(goldens / "crossbar", name)
    _, _, quiet = crossbar_cases.load(goldens / "crossbar", "c02_bal_w8s4_in8serial_noadc")
    sigma = params["xbar"]["device"]["programming_error"]["magnitude"]
    config = CrossbarConfig(tile=Tile(cols=None), dac=DAC(scaling="fixed"), device=Device(programming=model(sigma)))
    W, x = jnp.asarray(z["W"].T, jnp.float32), jnp.asarray(z["x"].T, jnp.float32)
    draws = case["draws"]

    @jax.jit
    def read(keys):
        return jax.vmap(lambda key: matmul(x, program(W, config, key)).T)(keys)

    error = np.asarray(read(jax.random.split(jax.random.key(3), draws)), float) - quiet["y"]
    rms = np.sqrt(np.mean(error**2))
    theirs = np.sqrt(np.mean(z["err_mean"] ** 2 + z["err_std"] ** 2))
    np.testing.assert_allclose(rms / theirs, 1, atol=0.03)
    score = (error.mean(0) - z["err_mean"]) / np.sqrt((error.var(0) + z["err_std"] ** 2) / draws)
    # Of 1024 normal scores the largest is above 4.9 once in a thousand seeds; outputs of one chip add correlation.
    assert np.abs(score).max() < 4.9
    assert abs(np.sqrt(np.mean(score**2)) - 1) < 0.15
    np.testing.assert_allclose(np.mean(error.std(0) / z["err_std"]), 1, atol=0.02)


@pytest.mark.parametrize("path", [None, "definition"])
def test_a_tile_is_that_of_aihwkit(goldens, path):
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
        state = program(jnp.asarray(z["W"].T, float), config, path=path)
        y = np.asarray(matmul(jnp.asarray(z["x"], float), state))
        np.testing.assert_allclose(state.scale, np.broadcast_to(z["scale"][:, None], (3, 64)), rtol=1e-6)
    np.testing.assert_allclose(y, z["y"], rtol=0, atol=1e-5 * np.abs(z["y"]).max())
