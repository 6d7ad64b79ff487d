"""The benchmarks: cases of one form, their table, and measurements of a small shape."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import padding
import pytest
import table
from json_files import read_json, write_rows
from numpy.testing import assert_allclose

_ROOT = Path(__file__).resolve().parents[2]
_KEYS = {"name", "ratio", "required", "ambition", "higher_is_better", "computed_from"}


def _check(cases):
    assert cases
    for case in cases:
        assert case.keys() == _KEYS
        assert np.isfinite(case["ratio"]) and isinstance(case["higher_is_better"], bool)
        assert case["computed_from"]
    assert len({case["name"] for case in cases}) == len(cases)


def test_padding_is_counted_in_tokens(tmp_path, monkeypatch, capsys):
    """A task of 45 rows of 3 characters and 5 of 30, that is 2 and 9 tokens, and answers of 2 tokens."""
    task = tmp_path / "lengths"
    task.mkdir()
    rows = [
        {"input": "x" * (30 if i % 10 == 0 else 3), "target": "yyyy"} for i in range(50)
    ]
    for part in ("train", "test"):
        write_rows(task / f"{part}.jsonl", rows)
    monkeypatch.setattr(sys, "argv", ["padding.py", "--json", "--tasks", str(task)])
    padding.main()
    printed = json.loads(capsys.readouterr().out)
    assert printed["processor"] and isinstance(printed["features"], list)
    assert printed["rates"] == {}  # it computes no products
    _check(printed["cases"])
    evaluation, shapes = printed["cases"][-2:]
    # One batch of prompts of the longest's width, as two would save less than their compilation costs.
    assert evaluation["computed_from"]["real"] == 45 * 2 + 5 * 9
    assert evaluation["computed_from"]["computed"] == 50 * 12
    assert (
        evaluation["ratio"] == pytest.approx(135 / 600)
        and evaluation["higher_is_better"]
    )
    assert shapes["ratio"] == 1 and not shapes["higher_is_better"]


def test_the_committed_table_can_be_made_again():
    """From its cases, also those in an older form."""
    folder = _ROOT / "results/speed"
    cases = read_json(folder / "cases.json")["cases"]
    assert table.csv_of(cases) == (folder / "table.csv").read_text()


@pytest.mark.nightly
def test_measurements_of_a_device_run_on_a_cpu_too(tmp_path):
    small = "--shape small-pool --no-tests --seeds 2 --rounds 1 --product 256".split()
    command = [
        sys.executable,
        _ROOT / "benchmarks/on_device.py",
        *small,
        "--out",
        tmp_path,
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "these are a CPU's figures" in ran.stderr
    found = read_json(tmp_path / "cpu-small-pool.json")
    _check(
        [
            of
            | {
                "computed_from": of["computed_from"]
                or {"rate": found["product_tflops"]}
            }
            for of in found["cases"]
        ]
    )
    names = [of["name"] for of in found["cases"]]
    assert "2 seeds in one program / 2 single steps" in names and any(
        name.startswith("generation") for name in names
    )
    assert all(name in ran.stdout for name in names)


@pytest.mark.peft
@pytest.mark.nightly
def test_the_peer_trains_alike_and_kept_results_are_not_measured_again(tmp_path):
    """The script compares losses of packed rows with those of the peer's padded ones, and ends if they differ."""
    small = "--shape small-pool --candidates ours eager --batches 2 --rounds 1".split()
    command = [
        sys.executable,
        _ROOT / "benchmarks/peer.py",
        *small,
        "--out",
        tmp_path,
        "--json",
    ]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert first == again
    _check(json.loads(first)["cases"])
    (turn,) = read_json(tmp_path / "small-pool.json")["turns"]
    losses = [
        turn[name][form]["losses"]
        for name, form in (("ours", "packed"), ("eager", "in file order"))
    ]
    assert len(losses[0]) == 2
    assert_allclose(*losses, rtol=1e-5)


@pytest.mark.peft
@pytest.mark.nightly
def test_a_whole_task_trains_and_answers_alike_in_peft():
    small = "--shape small-pool --peers eager --rows 10 --json".split()
    ran = subprocess.run(
        [sys.executable, _ROOT / "benchmarks/whole_task.py", *small],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    cases = json.loads(ran.stdout)["cases"]
    _check(cases)
    assert [case["required"] for case in cases] == [1.2, 1.5]
    for case in cases:  # one batch an epoch, whose order is no matter
        found = case["computed_from"]
        assert (
            found["loss"] == pytest.approx(found["peer_loss"], rel=1e-4)
            and found["same_answers"] >= 0.99
        )
