"""The experiments on chips: what is computed once, which points there are, and the sums of their tables."""

import dataclasses
from pathlib import Path

import basis_on_chips
import hardware
import hardware_sweeps
import jax.numpy as jnp
import pytest
from lab.common import write_csv
from lab.hardware import Store, as_lines, matches

from lorafusion_jax.crossbar import load_config, save_config

_CHIP_FILE = Path(__file__).resolve().parents[2] / "examples" / "chip.yaml"
_CHIP = load_config(_CHIP_FILE)


def test_results_are_computed_once_and_settings_are_kept_apart(tmp_path):
    store, calls = Store(tmp_path / "out"), []

    def compute():
        calls.append(1)
        return [{"chip": 0, "seed": 1, "exact_match": 50.0, "loss": 0.5}]

    store.claim({"chips": 8, "seeds": (1, 2)})
    assert store.rows("a", compute) == store.rows("a", compute) and len(calls) == 1
    numbers = store.numbers("b", lambda: {"coefficients": jnp.ones((2, 3))})
    again = store.numbers("b", lambda: pytest.fail("was computed already"))
    assert jnp.array_equal(numbers["coefficients"], again["coefficients"])
    store.claim({"chips": 8, "seeds": (1, 2)})
    with pytest.raises(ValueError, match="holds other results \\(chips was 8, is 4\\): give another --out"):
        store.claim({"chips": 4, "seeds": (1, 2)})


def _rows(case, values, *, age=None, compensate=None):
    """Exact match of (chip, seed)."""
    same = {"task": "t", "case": case, "age": age, "compensate": compensate, "loss": 1.0}
    return [
        same | {"chip": c, "seed": s, "exact_match": m}
        for c, of_chip in enumerate(values)
        for s, m in enumerate(of_chip)
    ]


def test_shares_won_back_by_hand():
    untouched = _rows("untouched", [[40, 40], [30, 50]])
    rows = _rows("digital", [[70, 50]]) + untouched + _rows("its chip", [[60, 40], [55, 45]])
    assert list(matches(rows, task="t", case="untouched", age=None, compensate=None)) == [40, 40]
    # Digital 60, untouched 40, trained 50.
    assert hardware.won_back(rows, ["t"], "its chip", "untouched", "digital", None, None) == 50
    # The chips took nothing.
    same = _rows("digital", [[40]]) + _rows("untouched", [[40]]) + _rows("its chip", [[50]])
    assert hardware.won_back(same, ["t"], "its chip", "untouched", "digital", None, None) is None


def test_a_basis_on_chips_is_next_to_whole_modules_of_the_same_chips_and_seeds(tmp_path):
    file, script = tmp_path / "rows.csv", basis_on_chips
    of_whole = _rows("digital", [[60, 40, 0]]) + _rows("untouched", [[40, 40, 0], [30, 30, 0], [0, 0, 0]])
    for compensate, match in ((False, 0), (True, 20)):
        of_whole += _rows("untouched", [[match] * 3] * 3, age="1month", compensate=compensate)
    write_csv(file, as_lines(of_whole))
    options = script.Options(tasks=("t",), seeds=(0, 1), chips=2, cases=("digital", "untouched"), earlier=(file,))
    rows = script.earlier_rows(options)
    assert len(rows) == 2 + 2 * 2 * 2
    # Rows with a missing chip, seed or age do not count.
    assert script.earlier_rows(dataclasses.replace(options, seeds=(0, 1, 3))) == []
    for other in ({"chips": 4}, {"age": "1year"}):
        assert {row["case"] for row in script.earlier_rows(dataclasses.replace(options, **other))} == {"digital"}
    inside = _rows("digital", [[50, 48]]) + _rows("untouched", [[45, 45], [45, 45]])
    inside += _rows("untouched", [[30, 32], [30, 32]], age="1month")
    rows += [{"fusion": "k = 16"} | {n: v for n, v in row.items() if n != "compensate"} for row in inside]
    # What was written is read again, and no row counts twice.
    written = tmp_path / "written.csv"
    write_csv(written, as_lines(rows))
    assert script.earlier_rows(dataclasses.replace(options, earlier=(file, written))) == rows
    assert script.table(rows, options)[1:] == [
        ["whole modules", "50.0", "35.0 ± 7.1", "20.0 ± 0.0", "15.0", "30.0"],
        ["k = 16", "49.0", "45.0 ± 0.0", "31.0 ± 0.0", "4.0", "18.0"],
    ]
    # Numbers that were prepared for an age are read at that age alone; here whole modules have none.
    options = dataclasses.replace(options, cases=("digital", "prepared"))
    rows += [{"fusion": "k = 16", **row} for row in _rows("prepared", [[40, 42], [40, 42]], age="1month")]
    assert script.table(rows, options)[1:] == [
        ["whole modules", "50.0", "", ""],
        ["k = 16", "49.0", "41.0 ± 0.0", "8.0"],
    ]


def test_a_point_changes_only_what_it_names():
    def values(config):
        return {
            "noise": config.device.programming.sigma,
            "adc": config.adc.bits,
            "cell": config.cell.bits,
            "age": config.device.time,
        }

    points = (("noise", "0.1", 0.1), ("adc", "6", 6), ("cell", "2", (2, 2, 2)), ("age", "1day", 86_400))
    for sweep, point, value in points:
        expected = values(_CHIP) | {sweep: pytest.approx(value)}
        assert values(hardware_sweeps.at(_CHIP, sweep, point)) == expected, sweep


@pytest.mark.parametrize(
    ("config", "sweep", "point", "message"),
    [
        ("isaac", "noise", "0.1", "no programming error of one sigma"),
        ("ideal", "adc", "4", "no ADC to sweep"),
        ("isaac", "age", "1h", "no drift model"),
        ("isaac", "cell", "4", "do not make up the 6 of a 7-bit weight"),
        (_CHIP_FILE, "cell", "0", "cells of 0 bits do not make up the 6"),
        *(
            (_CHIP_FILE, sweep, point, f"--points {point} is not a point of the sweep {sweep}: give such as ")
            for sweep, point in (("noise", "x"), ("noise", "-0.1"), ("adc", "6.5"), ("cell", "many"))
        ),
    ],
)
def test_points_that_cannot_be_swept_are_refused(config, sweep, point, message):
    with pytest.raises(ValueError, match=message):
        hardware_sweeps.at(load_config(config), sweep, point)


def test_results_of_other_settings_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="not of --epochs 3: .*--earlier"):
        basis_on_chips.main(["--out", str(tmp_path / "out"), "--epochs", "3"])
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(basis_on_chips, "task_rows", lambda *given: iter(_rows("digital", [[50]])))
    (config := tmp_path / "chip.yaml").write_text(_CHIP_FILE.read_text())
    given = ["--out", str(tmp_path / "out"), "--crossbar", str(config), "--tasks", "t", "--sizes", "16", "--earlier"]
    basis_on_chips.main(given)
    basis_on_chips.main(given)
    save_config(dataclasses.replace(_CHIP, adc=dataclasses.replace(_CHIP.adc, bits=5)), config)
    with pytest.raises(ValueError, match="holds other results \\(config was"):
        basis_on_chips.main(given)


@pytest.mark.parametrize(
    ("scripts", "arguments", "message"),
    [
        *(
            ((hardware, hardware_sweeps, basis_on_chips), given, message)
            for given, message in (
                (["--tasks"], "no tasks: give at least one with --tasks"),
                (["--seeds"], "no seeds: give at least one with --seeds"),
                (["--chips", "0"], "chips is 0"),
            )
        ),
        ((hardware_sweeps,), ["--sweeps"], "no sweeps"),
        ((basis_on_chips,), ["--cases"], "no cases"),
        ((basis_on_chips,), ["--sizes"], "no sizes"),
        ((hardware,), ["--age", "1 moon"], "an age of '1 moon'"),
        ((hardware,), ["--crossbar", "raella"], "an age of 1month, but these cells have no drift model"),
        ((basis_on_chips,), ["--crossbar", "raella", "--earlier"], "no drift model"),
    ],
)
def test_bad_options_are_refused_before_anything_is_trained(scripts, arguments, message, tmp_path):
    for script in scripts:
        with pytest.raises(ValueError, match=message):
            script.main([*arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
