"""Presets have the numbers of their sources; configurations survive YAML and JSON; bad files are refused by name."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    PRESETS,
    Cell,
    CrossbarConfig,
    Device,
    config_hash,
    load_config,
    matmul,
    save_config,
)

FULL = CrossbarConfig(
    cell=Cell(on_off_ratio=50.0),
    tile=crossbar.Tile(
        rows=64,
        wire=crossbar.Wire(row_resistance=1e-5, iterations=50),
        current_limit=30.0,
    ),
    dac=crossbar.DAC(
        scaling="calibrated", limit=2.5, quantile=0.99, rounding="stochastic"
    ),
    adc=crossbar.ADC(
        range="given", limits=((-9.0, 9.0),) * 4, gain_error=0.01, noise=0.1
    ),
    device=Device(
        programming=crossbar.Independent(0.02),
        write_verify=crossbar.WriteVerify(0.03, 8),
        stuck=crossbar.StuckAt(0.001, 0.002),
        drift=crossbar.PCM_DRIFT,
        time=3600,
        read_noise=crossbar.ReadNoise(0.01, "proportional"),
        iv=crossbar.Sinh(),
        clip="range",
    ),
)


def relative_error(name: str) -> float:
    config = PRESETS[name]
    weights = jax.random.normal(jax.random.key(0), (300, 40))
    x = jax.random.normal(jax.random.key(1), (32, 300))
    state = crossbar.program(weights, config, jax.random.key(2))
    state = crossbar.calibrated(state, crossbar.probe(x, state)[1])
    exact = np.asarray(x, float) @ np.asarray(weights, float)
    return float(np.linalg.norm(matmul(x, state) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(
    "name, least, most",
    [
        ("ideal", 0, 1e-6),
        # Weights and inputs are rounded to 2^15 - 1 steps of their largest value, here about 4 standard deviations.
        ("isaac", 0, 3 * 4 / (2**15 - 1) / np.sqrt(12)),
        pytest.param("puma", 1e-6, 1e-2, marks=pytest.mark.long),
        pytest.param("raella", 1e-3, 0.1, marks=pytest.mark.long),
        ("neurram", 0.05, 0.8),
    ],
)
def test_presets_lose_as_much_as_their_converters_do(name, least, most):
    assert least < relative_error(name) < most


ANALOGUE = dataclasses.replace(
    PRESETS["ideal"], encoding=crossbar.Encoding(kind="offset")
)
TABLE = crossbar.Table(
    (0.25, 1.0), ((0.02, 0.05), (0.03, 0.06)), seconds=(1.0, 60.0), extrapolate=True
)
MEASURED = CrossbarConfig(
    cell=Cell(on_off_ratio=4.0), device=Device(programming=TABLE, time=3600.0)
)
NESTED = CrossbarConfig(device=Device(drift=crossbar.PowerLaw(0.05, 0.01), time=10.0))
SAVED = {
    **PRESETS,
    "everything": FULL,
    "analogue": ANALOGUE,
    "nested": NESTED,
    "measured": MEASURED,
}


@pytest.mark.parametrize("config", SAVED.values(), ids=SAVED)
def test_a_configuration_is_loaded_as_it_was_saved(tmp_path, config):
    for suffix in (".yaml", ".json"):
        path = tmp_path / "folder" / f"crossbar{suffix}"
        save_config(config, path)
        assert load_config(path) == config
        assert config_hash(load_config(path)) == config_hash(config)


def test_what_a_file_leaves_out_has_its_default(tmp_path):
    path = tmp_path / "crossbar.yaml"
    path.write_text(
        "device: {programming: PCM_JOSHI_2020, drift: RERAM_CMO_DRIFT, time: 60}\nadc: {bits: 6}\n"
    )
    device = Device(
        programming=crossbar.PCM_JOSHI_2020, drift=crossbar.RERAM_CMO_DRIFT, time=60
    )
    assert load_config(path) == CrossbarConfig(adc=crossbar.ADC(bits=6), device=device)
    path.write_text("")
    assert load_config(path) == CrossbarConfig()


def test_arrays_are_written_as_lists(tmp_path):
    swept = jnp.array([0.125, 0.25])
    config = CrossbarConfig(device=Device(programming=crossbar.Independent(swept)))
    save_config(config, tmp_path / "sweep.yaml")
    np.testing.assert_array_equal(
        load_config(tmp_path / "sweep.yaml").device.programming.sigma, swept
    )
    limits = CrossbarConfig(
        adc=crossbar.ADC(range="given", limits=jnp.array([[[-4.0, 4.0]] * 4] * 2))
    )
    save_config(limits, tmp_path / "limits.json")
    np.testing.assert_array_equal(
        load_config(tmp_path / "limits.json").adc.limits, limits.adc.limits
    )


def my_cells(G, key, time):
    return G


def test_functions_cannot_be_written(tmp_path):
    config = CrossbarConfig(device=Device(programming=my_cells))
    with pytest.raises(
        ValueError,
        match=r"device\.programming is the function my_cells, which a file cannot hold",
    ):
        save_config(config, tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()
    assert config_hash(config) != config_hash(CrossbarConfig())
    assert config_hash(config) == config_hash(
        CrossbarConfig(device=Device(programming=my_cells))
    )


def test_the_hash_tells_configurations_apart():
    hashes = {
        config_hash(config) for config in (*PRESETS.values(), FULL, CrossbarConfig())
    }
    assert len(hashes) == len(PRESETS) + 2
    assert config_hash(CrossbarConfig(cell=Cell(on_off_ratio=10))) == config_hash(
        CrossbarConfig(cell=Cell(on_off_ratio=10.0))
    )
    device = dataclasses.replace(
        FULL.device, programming=crossbar.Independent(0.020001)
    )
    assert config_hash(dataclasses.replace(FULL, device=device)) != config_hash(FULL)
    # The SHA-256 of {"adc": {"bits": 6.0}}: fields at their default do not enter.
    expected = hashlib.sha256(b'{"adc": {"bits": 6.0}}').hexdigest()
    assert config_hash(CrossbarConfig(adc=crossbar.ADC(bits=6))) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "cells: {}",
            r"cells is unknown: choose from cell, encoding, mapping, tile, dac, adc, device",
        ),
        ("cell: {bit: 2}", r"cell\.bit is unknown: choose from bits, on_off_ratio"),
        ("cell: 4", r"cell is 4: give a table with any of bits, on_off_ratio"),
        ("[1, 2]", r"the file is \[1, 2\]: give a table"),
        (
            "cell: {bits: [2, 2, [2]]}",
            r"cell\.bits\[2\] is \[2\]: expected an integer; change it",
        ),
        (
            "device: {programming: {model: Polynomial, deviation: [1, 2]}}",
            r"device\.programming\.deviation\[0\] is 1: expected a list",
        ),
        (
            "adc: {limits: [[low, high]]}",
            r"adc\.limits is .*expected a number, a list of numbers or null",
        ),
        ("cell: {bits: [9]}", r"cell\.bits = \[9\]|cell\.bits = \(9,\)"),
        ("dac: {bits: 7.5}", r"dac\.bits is 7\.5: expected an integer"),
        (
            "adc: {range: widest}",
            r"adc\.range is 'widest': expected 'calibrated' or 'max' or 'granular' or 'given'",
        ),
        ("adc: {separate: 1}", r"adc\.separate is 1: expected true or false"),
        (
            "tile: {wire: {row: 1}}",
            r"tile\.wire\.row is unknown: choose from row_resistance",
        ),
        (
            "encoding: null",
            r"encoding is None: give a table with any of kind, two_sided",
        ),
        (
            "device: {programming: RERAM_WAN_2022, time: 31536000}",
            "last measurement .* at 172800 seconds: give an age",
        ),
        (
            "device: {programming: noisy}",
            r"device\.programming = 'noisy': choose from PCM_JOSHI_2020, .*\{model: ",
        ),
        (
            "device: {programming: {model: Independent}}",
            r"device\.programming lacks sigma",
        ),
        (
            "device: {programming: {model: Independent, sigma: 1e-3}}",
            r"sigma is '1e-3': .*like 1\.0e-3",
        ),
        (
            "device: {programming: {model: Independent, sigma: -1}}",
            r"Independent\.sigma = -1",
        ),
        ("device: {iv: tanh}", r"device\.iv = 'tanh': choose from \{model: Sinh"),
        ("device: {clip: 3}", r"device\.clip is 3: expected 'positive' or 'range'"),
        ("cell: [", r"cannot be read as YAML"),
        (
            "a: &a [1]\n"
            + "".join(
                f"{b}: &{b} [{f'*{a}, ' * 20}]\n" for a, b in ("ab", "bc", "cd", "de")
            ),
            "over 100,000",
        ),
        ("cell: &a [*a]", "tables over 20 deep"),
        ("cell: " + "[" * 400 + "]" * 400, "tables over 20 deep"),
        (
            "a: &a {x: 1}\n"
            + "".join(
                f"{b}: &{b} {{<<: [{f'*{a}, ' * 20}]}}\n"
                for a, b in ("ab", "bc", "cd", "de")
            ),
            "100,000",
        ),
        ("cell: 1" + ":1" * 100_000, "an integer has 200,001 characters"),
        ("cell: {on_off_ratio: 0x" + "f" * 17 + "}", "is an integer of over 64 bits"),
        ("cell: {bits: [4, 4]}\ncell: {bits: [8]}", "'cell' is given twice"),
        (f"cell: {{bits: {[1] * 17}}}", "at most 16 slices"),
        ("device: {drift: {model: [1]}}", "choose from PCM_DRIFT"),
        (
            f"tile: {{wire: {{row_resistance: 0.1, iterations: {2**62}}}}}",
            "1 to 1,000,000",
        ),
        (
            f"device: {{write_verify: {{tolerance: 0.1, pulses: {2**62}}}}}",
            "1 to 1,000,000",
        ),
        ("adc: {range: max, retries: 1}", "adc.retries is unknown"),
        ("x: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
        (
            "#" * (1 << 20) + "\n",
            "has 1,048,577 bytes: give a file of at most 1,048,576",
        ),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, text, message):
    """Tables with other fields and values, and those that take more memory or time than their size."""
    path = tmp_path / "crossbar.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load_config(path)
    assert str(path) in str(raised.value)


def test_bad_names_are_refused(tmp_path):
    assert load_config("puma") is PRESETS["puma"]
    with pytest.raises(
        ValueError, match="no preset 'isac': choose one of ideal, isaac"
    ):
        load_config("isac")
    with pytest.raises(ValueError, match=r"absent\.yaml: no such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match=r"ending in \.yaml, \.yml, \.json"):
        save_config(CrossbarConfig(), tmp_path / "crossbar.toml")
    (tmp_path / "half.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        load_config(tmp_path / "half.json")


# bfloat16 and float16: everything is computed in float32, whose results these are.


@pytest.mark.parametrize(
    ("name", "dtype"), [("isaac", jnp.bfloat16), ("neurram", jnp.float16)]
)
def test_presets_read_weights_and_inputs_of_sixteen_bits(name, dtype):
    config = PRESETS[name]
    weights = jax.random.normal(jax.random.key(0), (40, 12)).astype(dtype)
    x = jax.random.normal(jax.random.key(1), (5, 40)).astype(dtype)
    wide = crossbar.program(weights.astype(jnp.float32), config, jax.random.key(2))
    narrow = crossbar.program(weights, config, jax.random.key(2))
    if config.adc.range == "calibrated":
        seen = crossbar.probe(x.astype(jnp.float32), wide)[1]
        of_narrow = crossbar.probe(x, narrow)[1]
        wide = crossbar.calibrated(wide, seen)
        narrow = crossbar.calibrated(narrow, of_narrow)
    for got, wanted in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)
    y = matmul(x, narrow)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, matmul(x.astype(jnp.float32), wide).astype(dtype))
