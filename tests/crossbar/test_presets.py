"""Presets have the numbers of their sources, and configurations survive YAML and JSON."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crossbar_strategies import single_slices
from numpy.testing import assert_array_equal

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
    dac=crossbar.DAC(scaling="calibrated", limit=2.5, rounding="stochastic"),
    adc=crossbar.ADC(range="given", limits=((-9.0, 9.0),) * 4, gain_error=0.01),
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
TABLE = crossbar.Table(
    (0.25, 1.0), ((0.02, 0.05), (0.03, 0.06)), seconds=(1.0, 60.0), extrapolate=True
)
SAVED = {
    **PRESETS,
    "everything": FULL,
    "a table": CrossbarConfig(
        cell=Cell(on_off_ratio=4.0), device=Device(programming=TABLE, time=3600.0)
    ),
    "residual writing": CrossbarConfig(
        cell=Cell(residual=True),
        device=Device(
            programming=crossbar.Independent(0.02),
            readback=crossbar.Readback(0.01, 0.002, 0.01, repeats=4, after=2.0),
        ),
    ),
    "a table of bits": CrossbarConfig(
        dac=crossbar.DAC(bits=3),
        adc=crossbar.ADC(bits=((0, 2), (2, 5), (5, 6), (6, 8))),
    ),
    "an ADC from outside": single_slices("truncating"),
}


@pytest.mark.parametrize(
    ("name", "least", "most"),
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
    weights = jax.random.normal(jax.random.key(0), (300, 40))
    x = jax.random.normal(jax.random.key(1), (32, 300))
    chip = crossbar.program(weights, PRESETS[name], jax.random.key(2))
    chip = crossbar.calibrated(chip, crossbar.probe(x, chip)[1])
    exact = np.asarray(x, float) @ np.asarray(weights, float)
    error = np.linalg.norm(matmul(x, chip) - exact) / np.linalg.norm(exact)
    assert least < error < most


@pytest.mark.parametrize("config", SAVED.values(), ids=SAVED)
def test_a_configuration_is_loaded_as_it_was_saved(tmp_path, config):
    for suffix in (".yaml", ".json"):
        path = tmp_path / "folder" / f"crossbar{suffix}"
        save_config(config, path)
        assert load_config(path) == config
        assert config_hash(load_config(path)) == config_hash(config)


def test_names_defaults_and_arrays_of_files(tmp_path):
    assert load_config("puma") is PRESETS["puma"]
    path = tmp_path / "crossbar.yaml"
    path.write_text("device: {drift: RERAM_CMO_DRIFT, time: 60}\nadc: {bits: 6}\n")
    device = Device(drift=crossbar.RERAM_CMO_DRIFT, time=60)
    assert load_config(path) == CrossbarConfig(adc=crossbar.ADC(bits=6), device=device)
    path.write_text("")
    assert load_config(path) == CrossbarConfig()
    swept = crossbar.Independent(jnp.array([0.125, 0.25]))
    limits = jnp.array([[[-4.0, 4.0]] * 4] * 2)
    adc = crossbar.ADC(range="given", limits=limits)
    save_config(CrossbarConfig(adc=adc, device=Device(programming=swept)), path)
    loaded = load_config(path)
    assert_array_equal(loaded.device.programming.sigma, swept.sigma)
    assert_array_equal(loaded.adc.limits, limits)


def my_cells(G, key, time):
    return G


def test_the_hash_tells_configurations_apart():
    mine = CrossbarConfig(device=Device(programming=my_cells))
    ratios = [CrossbarConfig(cell=Cell(on_off_ratio=ratio)) for ratio in (10, 10.0)]
    hashes = {config_hash(config) for config in (*SAVED.values(), mine, *ratios)}
    assert len(hashes) == len(SAVED) + 2
    # The SHA-256 of {"adc": {"bits": 6.0}}: fields at their default do not enter, nor what only warns.
    # Bits of (2, 2, 2, 2) do not either: they were the default.
    expected = hashlib.sha256(b'{"adc": {"bits": 6.0}}').hexdigest()
    cell = Cell(bits=(2, 2, 2, 2))
    for adc in (crossbar.ADC(bits=6), crossbar.ADC(bits=6, clip_share=0.5)):
        assert config_hash(CrossbarConfig(adc=adc, cell=cell)) == expected


def test_weights_of_sixteen_bits_are_programmed_in_float32():
    weights = jax.random.normal(jax.random.key(0), (40, 12)).astype(jnp.bfloat16)
    narrow = crossbar.program(weights, PRESETS["isaac"])
    wide = crossbar.program(weights.astype(jnp.float32), PRESETS["isaac"])
    for ours, theirs in zip(*map(jax.tree.leaves, (narrow, wide)), strict=True):
        assert ours.dtype == theirs.dtype
        assert_array_equal(ours, theirs)
