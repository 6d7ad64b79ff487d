"""The experiments on chips: what is computed once, the points of sweeps, and the tables of the committed rows."""

from pathlib import Path

import basis_on_chips
import hardware
import jax.numpy as jnp
import pytest
from lab.hardware import Store
from refusals import refused

from lorafusion_jax.crossbar import load_config

_ROOT = Path(__file__).resolve().parents[2]
_CHIP = load_config(_ROOT / "examples" / "chip.yaml")


def test_results_are_computed_once_and_settings_are_kept_apart(tmp_path):
    store = Store(tmp_path / "out", {"chips": 8, "seeds": (1, 2)})
    calls = []

    def compute():
        calls.append(1)
        return [{"chip": 0, "seed": 1, "exact_match": 50.0, "loss": 0.5}]

    assert store.rows("a", compute) == store.rows("a", compute) and len(calls) == 1
    numbers = store.numbers("b", lambda: {"coefficients": jnp.ones((2, 3))})
    again = Store(store.folder, {"chips": 8, "seeds": (1, 2)})
    same = again.numbers("b", lambda: pytest.fail("was computed already"))
    assert jnp.array_equal(numbers["coefficients"], same["coefficients"])
    with refused("holds other rows \\(chips was 8, is 4\\): give another --out"):
        Store(store.folder, {"chips": 4, "seeds": (1, 2)})


def test_a_point_changes_only_what_it_names():
    def values(config):
        return {
            "noise": config.device.programming.sigma,
            "adc": config.adc.bits,
            "cell": config.cell.bits,
            "age": config.device.time,
        }

    for sweep, point, value in (
        ("noise", 0.1, 0.1),
        ("adc", 6, 6),
        ("cell", 2, (2, 2, 2)),
        ("age", "1day", 86_400),
    ):
        expected = values(_CHIP) | {sweep: pytest.approx(value)}
        assert values(hardware.at(_CHIP, sweep, point)) == expected, sweep


@pytest.mark.parametrize(
    ("scripts", "arguments", "message"),
    [
        (
            (hardware, basis_on_chips),
            ["--tasks"],
            "no tasks: give at least one with --tasks",
        ),
        ((hardware, basis_on_chips), ["--chips", "0"], "chips is 0"),
        ((basis_on_chips,), ["--sizes"], "no sizes"),
        (
            (hardware, basis_on_chips),
            ["--crossbar", "raella"],
            "an age of 1month, but these cells have no drift model",
        ),
        (
            (hardware,),
            ["--crossbar", "isaac", "--sweeps", "noise"],
            "no programming error of one sigma",
        ),
        ((hardware,), ["--crossbar", "ideal", "--sweeps", "adc"], "no ADC to sweep"),
    ],
)
def test_bad_options_are_refused_before_anything_is_trained(
    scripts, arguments, message, tmp_path
):
    for script in scripts:
        with refused(message):
            script.main([*arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
