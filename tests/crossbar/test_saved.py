"""Chips on disk: what is read back reads the same; another configuration is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    Cell,
    CrossbarConfig,
    Device,
    Encoding,
    Independent,
    ReadNoise,
    calibrated,
    load_chip,
    matmul,
    probe,
    program,
    save_chip,
    with_config,
    with_read_key,
)

_KEY = jax.random.key(0)
_CONFIGS = {
    "packed": CrossbarConfig(adc=ADC(bits=6, range="max")),
    "noisy": CrossbarConfig(
        adc=ADC(bits=6, range="max"), device=Device(programming=Independent(0.02), read_noise=ReadNoise(0.01))
    ),
    "product": CrossbarConfig(),
}


@pytest.mark.parametrize("name", _CONFIGS)
def test_a_saved_chip_reads_the_same(name, tmp_path):
    config = _CONFIGS[name]
    weights, x = jax.random.normal(_KEY, (150, 20)), jax.random.normal(jax.random.key(1), (3, 150))
    state = program(weights, config, _KEY)
    save_chip(state, tmp_path / "chip.npz")
    loaded = load_chip(tmp_path / "chip.npz", config)
    assert loaded.plan == state.plan and jax.tree.structure(loaded) == jax.tree.structure(state)
    np.testing.assert_array_equal(matmul(x, with_read_key(loaded, _KEY)), matmul(x, with_read_key(state, _KEY)))
    assert [file.name for file in tmp_path.iterdir()] == ["chip.npz"]


def _saved_without_ties(state, folder):
    save_chip(state, folder / "chip.npz")
    with np.load(folder / "chip.npz") as file:
        stored = dict(file)
    meta = json.loads(str(stored["meta_json"]))
    del meta["plan"]["ties"]
    np.savez(folder / "old.npz", **stored | {"meta_json": json.dumps(meta)})
    return folder / "old.npz"


_FLIP = Encoding(kind="offset", unit_column=True, flip=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CrossbarConfig(encoding=_FLIP, adc=ADC(bits=6, range="max")), "left out the unit column of flipped arrays"),
        (CrossbarConfig(encoding=_FLIP, adc=ADC(bits=6, range="granular")), None),
        (
            CrossbarConfig(
                cell=Cell(on_off_ratio=10.0),
                encoding=Encoding(kind="offset"),
                adc=ADC(bits=6, range="max", gain_error=0.05),
            ),
            "gain errors left Gmin out",
        ),
        (CrossbarConfig(cell=Cell(on_off_ratio=10.0), adc=ADC(bits=6, range="max", gain_error=0.05)), None),
    ],
)
def test_what_an_earlier_version_wrote_wrongly_is_refused(config, message, tmp_path):
    path = _saved_without_ties(program(jnp.ones((4, 3)), config, _KEY), tmp_path)
    if message is None:
        assert load_chip(path, config).shape == (4, 3)
        return
    with pytest.raises(ValueError, match=f"written by an earlier version, .*{message}: program the weights again"):
        load_chip(path, config)


def test_noise_that_an_earlier_version_packed_is_refused(tmp_path):
    """Packed variances of cells with Gmin, which are not packed any more: put into the plan of a chip of today."""
    config = CrossbarConfig(cell=Cell(on_off_ratio=10.0), adc=ADC(bits=6, range="max"))
    state = program(jnp.ones((4, 3)), config, path="packed")
    packing = dataclasses.replace(state.plan.packing, variances=state.plan.packing.fields)
    state = dataclasses.replace(state, plan=dataclasses.replace(state.plan, packing=packing))
    with pytest.raises(ValueError, match="read noise of packed cells was too small"):
        load_chip(_saved_without_ties(state, tmp_path), config)


def test_a_chip_saved_before_plans_had_ties_keeps_them_exact(tmp_path):
    """Steps of two levels, so that every odd sum lies half-way between two codes."""
    config = CrossbarConfig(cell=Cell(bits=(4, 4)), dac=DAC(signed=False), adc=ADC(bits=7))
    weights, x = jax.random.normal(_KEY, (64, 8)), jax.random.uniform(jax.random.key(1), (16, 64))
    state = program(weights, config)
    state = calibrated(state, probe(x, state)[1])
    loaded = load_chip(_saved_without_ties(state, tmp_path), config)
    assert loaded.plan == state.plan
    np.testing.assert_array_equal(matmul(x, loaded), matmul(x, state))


def test_another_configuration_is_refused(tmp_path):
    config = _CONFIGS["packed"]
    save_chip(program(jnp.ones((4, 3)), config), tmp_path / "chip.npz")
    other = dataclasses.replace(config, adc=ADC(bits=7, range="max"))
    with pytest.raises(ValueError, match="programmed under another configuration .* load it with its own"):
        load_chip(tmp_path / "chip.npz", other)
    with pytest.raises(ValueError, match="programmed with another configuration: adc.bits = 7, not 6"):
        save_chip(with_config(program(jnp.ones((4, 3)), config), other), tmp_path / "other.npz")
    assert not (tmp_path / "other.npz").exists()


def test_a_file_without_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "else.npz", a=np.zeros(2))
    with pytest.raises(ValueError, match="holds no programmed arrays: give a file that save_chip wrote"):
        load_chip(tmp_path / "else.npz", CrossbarConfig())
