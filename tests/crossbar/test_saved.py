"""Chips on disk: what is read back reads the same; another configuration is refused."""

import dataclasses
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import ADC, DAC, Cell, CrossbarConfig, load_chip, matmul, program, save_chip, with_read_key

_KEY = jax.random.key(0)
_MAX = ADC(bits=5, range="max")
_CONFIGS = {
    "packed": CrossbarConfig(adc=ADC(bits=6, range="max")),
    "noisy": CrossbarConfig(
        adc=ADC(bits=6, range="max"),
        device=crossbar.Device(programming=crossbar.Independent(0.02), read_noise=crossbar.ReadNoise(0.01)),
    ),
}


def test_a_chip_of_float64_is_not_read_as_float32(tmp_path):
    path = tmp_path / "chip.npz"
    with jax.enable_x64(True):
        chip = program(jnp.ones((4, 2), jnp.float64), CrossbarConfig())
        save_chip(chip, path)
        assert load_chip(path).codes.dtype == jnp.float64
    with pytest.raises(ValueError, match=r"holds float64, which JAX would make float32: set jax_enable_x64"):
        load_chip(path)


def _changed(path, change):
    """Change what a file of a chip tells of it."""
    with np.load(path) as file:
        stored = dict(file)
    meta = json.loads(str(stored["meta_json"]))
    change(meta)
    np.savez(path, **stored | {"meta_json": json.dumps(meta)})


def test_a_file_with_values_that_no_chip_has_is_refused(tmp_path):
    path, chip = tmp_path / "chip.npz", program(jnp.ones((4, 2)), CrossbarConfig(), _KEY)
    for part, name, value, message in (
        (None, "name", 3, "its name is .* and its first layer .*"),
        (None, "first", "1", "its name is .* and its first layer .*"),
        ("plan", "path", "other", "path of its plan is 'other', not one of .*"),
        ("plan", "integers", "", "integers of its plan is '', not one of .*"),
        ("plan", "ties", "round", "ties of its plan is 'round', not one of .*"),
    ):
        save_chip(chip, path)
        _changed(path, lambda meta: (meta[part] if part else meta).update({name: value}))  # noqa: B023
        with pytest.raises(ValueError, match=f"{message}program the weights again"):
            load_chip(path)


def test_another_configuration_is_refused(tmp_path):
    config = _CONFIGS["packed"]
    save_chip(program(jnp.ones((4, 3)), config), tmp_path / "chip.npz")
    other = dataclasses.replace(config, adc=ADC(bits=7, range="max"))
    with pytest.raises(ValueError, match="programmed with another configuration .*: load it with its own"):
        load_chip(tmp_path / "chip.npz", other)
    with pytest.raises(ValueError, match="programmed with another configuration: adc.bits = 7, not 6"):
        save_chip(crossbar.with_config(program(jnp.ones((4, 3)), config), other), tmp_path / "other.npz")
    assert not (tmp_path / "other.npz").exists()


def test_a_file_without_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "else.npz", a=np.zeros(2))
    with pytest.raises(ValueError, match="does not hold programmed arrays: give a file that save_chip wrote"):
        load_chip(tmp_path / "else.npz", CrossbarConfig())


def test_a_file_holds_its_configuration_unless_that_has_arrays_or_functions(tmp_path):
    x = jax.random.normal(jax.random.key(1), (3, 6))
    chip = program(jnp.ones((6, 5)), _CONFIGS["noisy"], _KEY)
    save_chip(chip, tmp_path / "chip.npz")
    loaded = load_chip(tmp_path / "chip.npz")
    assert loaded.config == chip.config
    np.testing.assert_array_equal(matmul(x, with_read_key(loaded, _KEY)), matmul(x, with_read_key(chip, _KEY)))

    def cells(G, key, time):
        return 0.9 * G

    with_array = CrossbarConfig(cell=Cell(on_off_ratio=jnp.float32(20)), adc=_MAX)
    for config in (with_array, CrossbarConfig(device=crossbar.Device(programming=cells))):
        chip = program(jnp.ones((6, 5)), config, _KEY)
        save_chip(chip, tmp_path / "chip.npz")
        with pytest.raises(ValueError, match="does not hold its configuration: give the one"):
            load_chip(tmp_path / "chip.npz")
        np.testing.assert_array_equal(matmul(x, load_chip(tmp_path / "chip.npz", config)), matmul(x, chip))


def test_values_that_differ_within_a_stack_are_saved_with_it(tmp_path):
    def programmed(ratio):
        config = CrossbarConfig(tile=crossbar.Tile(rows=8), adc=_MAX, cell=Cell(on_off_ratio=ratio))
        return program(jnp.ones((6, 5)), config)

    chips = jax.vmap(programmed)(jnp.array([10.0, 20.0]))
    save_chip(chips, tmp_path / "chip.npz")
    np.testing.assert_array_equal(load_chip(tmp_path / "chip.npz", chips.config).values, chips.values)


def test_settings_that_only_warn_do_not_refuse_a_saved_chip(tmp_path):
    config = CrossbarConfig(adc=dataclasses.replace(_MAX, clip_share=0.5))
    quieter = dataclasses.replace(config, adc=_MAX, dac=DAC(clip_share=0.3))
    assert crossbar.config_hash(quieter) == crossbar.config_hash(config)
    save_chip(program(jnp.ones((6, 5)), config, _KEY), tmp_path / "chip.npz")
    assert load_chip(tmp_path / "chip.npz", quieter).config == quieter


@pytest.mark.filterwarnings("ignore:Overlapped entries")  # as newer versions of Python say it
def test_arrays_are_as_large_as_their_bytes(tmp_path):
    path = tmp_path / "chip.npz"
    np.savez_compressed(path, codes=np.zeros(10**6))
    with pytest.raises(ValueError, match=rf"^{path}: codes is compressed"):
        load_chip(path)
    with zipfile.ZipFile(path, "w") as archive:  # sixteen names for the same bytes
        with archive.open("x.npy", "w") as file:
            np.save(file, np.zeros(1000))
        archive.filelist *= 16
    with pytest.raises(ValueError, match=f"^{path}: x is compressed"):
        load_chip(path)
    np.savez(path, meta_json='{"config": "", "fields": "{\\"cell\\": 0}"}')
    with pytest.raises(ValueError, match=f"^{path}: cell is 0"):
        load_chip(path)
    np.savez(path, meta_json="{")
    with pytest.raises(ValueError, match=f"^{path} is damaged .*JSON"):
        load_chip(path)
    np.savez(path, codes=np.zeros(8))
    path.write_bytes(path.read_bytes().replace(b"(8,), }  ", b"(8888,),}"))
    with pytest.raises(ValueError, match=f"^{path} is damaged .*CRC"):
        load_chip(path)
    np.savez(path, codes=np.array([None]))
    with pytest.raises(ValueError, match=rf"^{path}: codes is not object\[1\]"):
        load_chip(path)
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=f"^{path} is damaged"):
        load_chip(path)
