"""Chips on disk: what is read back reads the same; another configuration is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.crossbar import ADC, CrossbarConfig, Device, Independent, ReadNoise, mvm, program
from lorafusion_jax.crossbar.saved import load_state, save_state

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
    save_state(state, config, tmp_path / "chip.npz")
    loaded = load_state(tmp_path / "chip.npz", config)
    assert loaded.plan == state.plan and jax.tree.structure(loaded) == jax.tree.structure(state)
    np.testing.assert_array_equal(mvm(x, loaded, config, _KEY), mvm(x, state, config, _KEY))
    assert [file.name for file in tmp_path.iterdir()] == ["chip.npz"]


def test_another_configuration_is_refused(tmp_path):
    config = _CONFIGS["packed"]
    save_state(program(jnp.ones((4, 3)), config), config, tmp_path / "chip.npz")
    other = dataclasses.replace(config, adc=ADC(bits=7, range="max"))
    with pytest.raises(ValueError, match="programmed under another configuration .* load it with its own"):
        load_state(tmp_path / "chip.npz", other)


def test_a_file_without_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "else.npz", a=np.zeros(2))
    with pytest.raises(ValueError, match="holds no programmed arrays: give a file that save_state wrote"):
        load_state(tmp_path / "else.npz", CrossbarConfig())
