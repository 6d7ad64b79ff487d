"""The benchmarks: cases of one form, a table of them, and programs that compute what they are compared with."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import _measure
import _model
import jax
import numpy as np
import padding
import pytest
import table
import tiny
from flax import nnx

from lorafusion_jax import Frozen, TaskBank
from lorafusion_jax.models import decoder_inputs
from lorafusion_jax.training import cross_entropy

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
        (task / f"{part}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
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


def test_ten_thousand_tasks_fit_into_40_megabytes():
    config = _model.config_of("flan-t5-large")
    found = []

    def trace():
        bank = TaskBank.empty(
            _model.graph_of(config), _model.frozen(config, "float32", 20), 10_000
        )
        found.extend((a.shape, a.dtype.itemsize) for a in jax.tree.leaves(bank.tasks))

    jax.eval_shape(trace)
    assert found == [((10_001, 20, 48), 4), ((10_001,), 1)]
    assert sum(np.prod(shape) * size for shape, size in found) <= 40e6


def test_the_table_shows_which_bars_are_met():
    case = _measure.case
    lines = table.table(
        [
            case("low", 1.1, 1.15, 1.08, seconds=1.0),
            case("high", 1.1, 1.15, higher_is_better=True, seconds=1.0),
            case("without a bar", 1.2345, None, seconds=1.0),
        ]
    )
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["what", "ratio", "required", "ambition", "verdict"]
    assert cells[2:] == [
        ["low", "1.1", "≤ 1.15", "≤ 1.08", "met"],
        ["high", "1.1", "≥ 1.15", "", "missed"],
        ["without a bar", "1.23", "", "", ""],
    ]


def test_the_committed_table_can_be_made_again():
    """From its cases, also those in an older form."""
    folder = _ROOT / "results/speed"
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    assert table.csv_of(cases) == (folder / "table.csv").read_text()


def test_the_floor_is_the_base_alone(monkeypatch):
    """Gradients of activations, added up by token, are that of the embedding, which nothing else reads."""
    config = dataclasses.replace(tiny.CONFIG, num_layers=1, num_decoder_layers=1)
    batch = tiny.batch(config, rows=2, source=6, target=4)
    for name, size in (("BATCH", 2), ("SOURCE", 6), ("TARGET", 4)):
        monkeypatch.setattr(_model, name, size)
    monkeypatch.setattr(
        _model, "batch_of", lambda config: jax.tree.map(lambda a: a[None], batch)
    )
    graph, base = nnx.split(tiny.t5(config))
    loss, of_activations = _model.Floor(config, Frozen(base))()
    start = decoder_inputs(batch.labels, start_id=config.start_id, pad_id=config.pad_id)

    @jax.jit
    @jax.value_and_grad
    def plain(base):
        logits = nnx.merge(graph, base)(batch.input_ids, batch.input_mask, start)
        return cross_entropy(logits, batch.labels) / 2

    wanted, of_weights = plain(base)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    found = np.zeros((config.vocab_size, config.d_model), np.float32)
    np.add.at(found, np.asarray(batch.input_ids), np.asarray(of_activations[6]))
    np.add.at(found, np.asarray(start), np.asarray(of_activations[4]))
    assert np.abs(found).max() > 1e-3
    np.testing.assert_allclose(found, of_weights["embedding"].get_value(), atol=1e-6)


@pytest.mark.nightly
def test_measurements_of_a_device_run_on_a_cpu_too(tmp_path):
    small = [
        "--shape",
        "small-pool",
        "--no-tests",
        "--seeds",
        "2",
        "--rounds",
        "1",
        "--product",
        "256",
    ]
    command = [
        sys.executable,
        _ROOT / "benchmarks/on_device.py",
        *small,
        "--out",
        tmp_path,
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "these are a CPU's figures" in ran.stderr
    found = json.loads((tmp_path / "cpu-small-pool.json").read_text())
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
    small = [
        "--shape",
        "small-pool",
        "--candidates",
        "ours",
        "eager",
        "--batches",
        "2",
        "--rounds",
        "1",
    ]
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
    (turn,) = json.loads((tmp_path / "small-pool.json").read_text())["turns"]
    losses = [
        turn[name][form]["losses"]
        for name, form in (("ours", "packed"), ("eager", "in file order"))
    ]
    assert len(losses[0]) == 2
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.peft
@pytest.mark.nightly
def test_a_whole_task_trains_and_answers_alike_in_peft():
    small = ["--shape", "small-pool", "--peers", "eager", "--rows", "10", "--json"]
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


# The model of a step's time against sums by hand.
