"""Chips on disk: what is read back reads the same; another configuration is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    Cell,
    CrossbarConfig,
    load_chip,
    matmul,
    program,
    save_chip,
    with_read_key,
)

_KEY = jax.random.key(0)
_MAX = ADC(bits=5, range="max")
_CONFIGS = {
    "packed": CrossbarConfig(adc=ADC(bits=6, range="max")),
    "noisy": CrossbarConfig(
        adc=ADC(bits=6, range="max"),
        device=crossbar.Device(
            programming=crossbar.Independent(0.02), read_noise=crossbar.ReadNoise(0.01)
        ),
    ),
}


def test_a_chip_of_float64_is_not_read_as_float32(tmp_path):
    path = tmp_path / "chip.safetensors"
    with jax.enable_x64(True):
        chip = program(jnp.ones((4, 2), jnp.float64), CrossbarConfig())
        save_chip(chip, path)
        assert load_chip(path).codes.dtype == jnp.float64
    with pytest.raises(
        ValueError,
        match=r"holds float64, which JAX would make float32: set jax_enable_x64",
    ):
        load_chip(path)


def _described(path, change):
    """Change the text that describes the chip in a file."""
    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get("chip", "")
    save_file(load_file(path), path, {"chip": change(text)})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"name": ""', '"name": 3', "its name is 3: program the weights again"),
        ('"name"', '"name": 1, "name"', "'name' is given twice: keep one"),
        (
            '"product"',
            '"other"',
            "path of its plan is 'other', not one of .*: program the weights again",
        ),
        (
            '"integers": true',
            '"integers": ""',
            "integers of its plan is '', not one of .*: program the weights again",
        ),
        (
            '"ties": null',
            '"ties": "round"',
            "ties of its plan is 'round', not one of .*: program the weights again",
        ),
        ("}", "", "is damaged .*JSON"),
    ],
)
def test_a_file_with_values_that_no_chip_has_is_refused(old, new, message, tmp_path):
    path = tmp_path / "chip.safetensors"
    save_chip(program(jnp.ones((4, 2)), CrossbarConfig(), _KEY), path)

    def change(text):
        assert old in text
        return text.replace(old, new, 1)

    _described(path, change)
    with pytest.raises(ValueError, match=f"^{path}.*{message}"):
        load_chip(path)


def test_a_chip_of_bit_planes_is_read_from_its_codes(tmp_path):
    """As earlier versions stored perfect cells on some processors."""
    path = tmp_path / "chip.safetensors"
    weights = jax.random.normal(_KEY, (2, 6, 4))
    chips = crossbar.program_tree({"": weights}, {"*": _CONFIGS["packed"]}, _KEY)[""]
    save_chip(chips, path)
    arrays = {
        name: array
        for name, array in load_file(path).items()
        if not name.startswith("columns.")
    }
    with safe_open(path, framework="np") as file:
        meta = json.loads((file.metadata() or {})["chip"])
    meta["plan"] |= {"path": "planes", "packing": None}
    save_file(
        arrays | {"columns": np.zeros((2, 4, 2, 2, 1, 1, 4), np.uint32)},
        path,
        {"chip": json.dumps(meta)},
    )
    x = jax.random.normal(jax.random.key(1), (3, 6))
    np.testing.assert_array_equal(
        *(jax.vmap(matmul, (None, 0))(x, each) for each in (load_chip(path), chips))
    )


def test_another_configuration_is_refused(tmp_path):
    config = _CONFIGS["packed"]
    save_chip(program(jnp.ones((4, 3)), config), tmp_path / "chip.safetensors")
    other = dataclasses.replace(config, adc=ADC(bits=7, range="max"))
    with pytest.raises(
        ValueError,
        match="programmed with another configuration .*: load it with its own",
    ):
        load_chip(tmp_path / "chip.safetensors", other)


def test_a_file_holds_its_configuration_unless_that_has_arrays_or_functions(tmp_path):
    x = jax.random.normal(jax.random.key(1), (3, 6))
    chip = program(jnp.ones((6, 5)), _CONFIGS["noisy"], _KEY)
    save_chip(chip, tmp_path / "chip.safetensors")
    loaded = load_chip(tmp_path / "chip.safetensors")
    assert loaded.config == chip.config
    np.testing.assert_array_equal(
        matmul(x, with_read_key(loaded, _KEY)), matmul(x, with_read_key(chip, _KEY))
    )

    def cells(G, key, time):
        return 0.9 * G

    with_array = CrossbarConfig(cell=Cell(on_off_ratio=jnp.float32(20)), adc=_MAX)
    for config in (
        with_array,
        CrossbarConfig(device=crossbar.Device(programming=cells)),
    ):
        chip = program(jnp.ones((6, 5)), config, _KEY)
        save_chip(chip, tmp_path / "chip.safetensors")
        with pytest.raises(
            ValueError, match="does not hold its configuration: give the one"
        ):
            load_chip(tmp_path / "chip.safetensors")
        np.testing.assert_array_equal(
            matmul(x, load_chip(tmp_path / "chip.safetensors", config)), matmul(x, chip)
        )


def test_values_that_differ_within_a_stack_are_saved_with_it(tmp_path):
    def programmed(ratio):
        config = CrossbarConfig(
            tile=crossbar.Tile(rows=8), adc=_MAX, cell=Cell(on_off_ratio=ratio)
        )
        return program(jnp.ones((6, 5)), config)

    chips = jax.vmap(programmed)(jnp.array([10.0, 20.0]))
    save_chip(chips, tmp_path / "chip.safetensors")
    np.testing.assert_array_equal(
        load_chip(tmp_path / "chip.safetensors", chips.config).values, chips.values
    )


def test_settings_that_only_warn_do_not_refuse_a_saved_chip(tmp_path):
    config = CrossbarConfig(adc=dataclasses.replace(_MAX, clip_share=0.5))
    quieter = dataclasses.replace(config, adc=_MAX, dac=DAC(clip_share=0.3))
    assert crossbar.config_hash(quieter) == crossbar.config_hash(config)
    save_chip(program(jnp.ones((6, 5)), config, _KEY), tmp_path / "chip.safetensors")
    assert load_chip(tmp_path / "chip.safetensors", quieter).config == quieter


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "chip.safetensors"
    save_file({"a": np.zeros(2)}, path)
    with pytest.raises(
        ValueError,
        match="does not hold programmed arrays: give a file that save_chip wrote",
    ):
        load_chip(path, CrossbarConfig())
    _described(path, lambda text: '{"config": "", "fields": "{\\"cell\\": 0}"}')
    with pytest.raises(ValueError, match=f"^{path}: cell is 0"):
        load_chip(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"^{path} is damaged"):
        load_chip(path)
