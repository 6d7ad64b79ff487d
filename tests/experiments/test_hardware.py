"""The experiments on chips: what is computed once, and options that are refused."""

import basis_on_chips
import hardware
import jax.numpy as jnp
import pytest
from lab.hardware import Store
from refusals import refused


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
    ],
)
def test_bad_options_are_refused_before_anything_is_trained(
    scripts, arguments, message, tmp_path
):
    for script in scripts:
        with refused(message):
            script.main([*arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
