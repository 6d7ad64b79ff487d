"""Chips on disk: what is read back reads the same; another configuration is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_array_equal
from refusals import refused
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lorafusion_jax import crossbar
from lorafusion_jax.crossbar import (
    ADC,
    DAC,
    Cell,
    CrossbarConfig,
    Device,
    load_chip,
    matmul,
    program,
    save_chip,
    with_read_key,
)

_KEY = jax.random.key(0)
_MAX = ADC(bits=5, range="max")
_NOISY = CrossbarConfig(
    adc=_MAX,
    device=Device(
        programming=crossbar.Independent(0.02), read_noise=crossbar.ReadNoise(0.01)
    ),
)


def _cells(G, key, time):
    return 0.9 * G


@pytest.mark.parametrize(
    ("config", "is_text"),
    [
        (_NOISY, True),
        (CrossbarConfig(cell=Cell(on_off_ratio=jnp.float32(20)), adc=_MAX), False),
        (CrossbarConfig(device=Device(programming=_cells)), False),
    ],
    ids=["numbers", "an array", "a function"],
)
def test_a_file_holds_its_configuration_unless_that_has_arrays_or_functions(
    config, is_text, tmp_path
):
    path = tmp_path / "chip.safetensors"
    chip = program(jnp.ones((6, 5)), config, _KEY)
    save_chip(chip, path)
    if is_text:
        loaded = load_chip(path)
        assert loaded.config == config
    else:
        with refused("does not hold its configuration: give"):
            load_chip(path)
        loaded = load_chip(path, config)
    x = jax.random.normal(jax.random.key(1), (3, 6))
    keyed = [with_read_key(each, _KEY) for each in (loaded, chip)]
    assert_array_equal(*(matmul(x, each) for each in keyed))


def test_values_that_differ_within_a_stack_are_saved_with_it(tmp_path):
    def programmed(ratio):
        config = CrossbarConfig(adc=_MAX, cell=Cell(on_off_ratio=ratio))
        return program(jnp.ones((6, 5)), config)

    chips = jax.vmap(programmed)(jnp.array([10.0, 20.0]))
    save_chip(chips, tmp_path / "chip.safetensors")
    loaded = load_chip(tmp_path / "chip.safetensors", chips.config)
    assert_array_equal(loaded.values, chips.values)


def test_another_configuration_is_refused_unless_it_only_warns_otherwise(tmp_path):
    path = tmp_path / "chip.safetensors"
    save_chip(program(jnp.ones((4, 3)), CrossbarConfig(adc=_MAX)), path)
    adc = dataclasses.replace(_MAX, clip_share=0.5)
    quieter = CrossbarConfig(adc=adc, dac=DAC(clip_share=0.3))
    assert load_chip(path, quieter).config == quieter
    with refused("another configuration .*: load it with its"):
        load_chip(path, CrossbarConfig(adc=ADC(bits=7, range="max")))


def test_a_chip_of_float64_is_not_read_as_float32(tmp_path):
    path = tmp_path / "chip.safetensors"
    with jax.enable_x64(True):
        save_chip(program(jnp.ones((4, 2), jnp.float64), CrossbarConfig()), path)
        assert load_chip(path).codes.dtype == jnp.float64
    with refused("float64, .*: set jax_enable_x64 first"):
        load_chip(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plan": {"path": "other"}}, "its path is 'other', not one of product, "),
        (
            {
                "plan": {"path": "lookup"},
                "fields": '{"device": {"read_noise": {"sigma": 0.01}}}',
            },
            "its path 'lookup' draws no noise: program the weights again",
        ),
        ({"plan": None}, "an earlier version wrote it: program the weights again"),
        ({"fields": '{"cell": 0}'}, "cell is 0"),
        ({"shape": "}"}, "damaged .*JSON"),
        (None, "does not hold programmed arrays: give a file that save_chip wrote"),
    ],
)
def test_a_file_with_values_that_no_chip_has_is_refused(changes, words, tmp_path):
    path = tmp_path / "chip.safetensors"
    save_chip(program(jnp.ones((4, 2)), CrossbarConfig(), _KEY), path)
    with safe_open(path, framework="np") as file:
        meta = json.loads(file.metadata()["chip"])
    text = None
    if changes is not None:
        plan = meta["plan"] | (changes.get("plan") or {})
        if changes == {"plan": None}:
            del plan["bit_fields"]
        text = json.dumps(meta | changes | {"plan": plan})
    if changes == {"shape": "}"}:
        text = text[:-1]
    save_file(load_file(path), path, None if text is None else {"chip": text})
    with refused(f"^{path}.*{words}"):
        load_chip(path)


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    path = tmp_path / "chip.safetensors"
    save_chip(program(jnp.ones((4, 2)), CrossbarConfig(), _KEY), path)
    path.write_bytes(path.read_bytes()[:-8])
    with refused(f"^{path} is damaged"):
        load_chip(path)
