"""What the benchmarks promise: cases of one contract, a table of them, steps that are what they are compared with."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from lorafusion_jax.models.t5.model import decoder_inputs
from lorafusion_jax.serving.bank import TaskBank
from lorafusion_jax.training.frozen import Frozen
from lorafusion_jax.training.loss import cross_entropy

_ROOT = Path(__file__).resolve().parents[2]
_KEYS = {"name", "ratio", "required", "ambition", "higher_is_better", "computed_from"}


@pytest.fixture(scope="module")
def benchmarks():
    """The benchmarks' modules, imported as their scripts see them."""
    sys.path.insert(0, str(_ROOT / "benchmarks"))
    try:
        import _measure
        import _model
        import fusion_step
        import mixed_batches
        import padding
        import scaling
        import table

        yield {m.__name__: m for m in (_measure, _model, fusion_step, mixed_batches, padding, scaling, table)}
    finally:
        sys.path.remove(str(_ROOT / "benchmarks"))


def _check(cases):
    assert cases
    for case in cases:
        assert case.keys() == _KEYS
        assert np.isfinite(case["ratio"]) and isinstance(case["higher_is_better"], bool)
        assert case["computed_from"]
    assert len({case["name"] for case in cases}) == len(cases)


def test_one_object_of_cases(benchmarks, tmp_path):
    """A task of 90 rows of 3 characters and 10 of 30, that is 2 and 9 tokens, and answers of 2 tokens."""
    task = tmp_path / "lengths"
    task.mkdir()
    rows = [{"input": "x" * (30 if i % 10 == 0 else 3), "target": "yyyy"} for i in range(100)]
    for part in ("train", "test"):
        (task / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, _ROOT / "benchmarks/padding.py", "--json", "--tasks", task]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert said["processor"] and isinstance(said["features"], list)
    assert said["rates"] == {}  # nothing of this is a product
    _check(said["cases"])
    evaluation, shapes = said["cases"][-2:]
    # Two batches of 50 rows, shortest first: widths 4 and 12, answers 4 wide.
    assert evaluation["computed_from"]["real"] == 90 * 2 + 10 * 9 + 100 * 2
    assert evaluation["computed_from"]["computed"] == 50 * (4 + 4) + 50 * (12 + 4)
    assert evaluation["ratio"] == pytest.approx(470 / 1200) and evaluation["higher_is_better"]
    assert shapes["ratio"] == 2 and not shapes["higher_is_better"]


def test_a_step_is_measured_against_its_floor(benchmarks, capsys, monkeypatch):
    """Every run is called as often as every other, and their seconds end in ratios with their bars."""
    fusion_step, common = benchmarks["fusion_step"], benchmarks["_measure"]
    calls, seconds = {}, {"floor": 1.0, "unrolled": 1.1, "scanned": 1.3, "peer": 1.65}

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()

    def stand_in(name):
        def run():
            calls[name] = calls.get(name, 0) + 1
            clock.now += seconds[name]

        run.losses = [1.0]
        return run

    monkeypatch.setattr(common, "time", clock)
    monkeypatch.setattr(common, "launch", lambda cores: None)
    monkeypatch.setattr(fusion_step, "has_peft", lambda: True)
    monkeypatch.setattr(fusion_step, "product_rates", lambda dtypes: dict.fromkeys(dtypes, 100.0))
    monkeypatch.setattr(fusion_step, "_weights", lambda options, dtype: None)
    monkeypatch.setattr(fusion_step, "floor", lambda config, weights: stand_in("floor"))
    monkeypatch.setattr(fusion_step, "_peer", lambda config, weights, dtype: stand_in("peer"))
    monkeypatch.setattr(
        fusion_step,
        "Step",
        lambda config, weights, composition: stand_in("unrolled" if config.unroll else "scanned"),
    )
    monkeypatch.setattr(sys, "argv", ["fusion_step.py", "--shape", "flan-t5-large", "--rounds", "3", "--json"])
    fusion_step.main()
    said = json.loads(capsys.readouterr().out)
    cases = said["cases"]
    _check(cases)
    assert said["rates"] == {"float32": 100.0}
    found = {case["name"].partition(", 1 core, ")[2]: case for case in cases}
    for structure, ratio, bar in (("unrolled", 1.1, 1.15), ("scanned", 1.3, 1.22)):
        mix, of_sum = (found[f"float32 step / floor: {c}, {structure}"] for c in ("mix", "sum"))
        assert mix["ratio"] == pytest.approx(ratio) == of_sum["ratio"]
        assert (mix["required"], mix["ambition"], of_sum["required"]) == (bar, 1.08, 1.20)
        assert 1 < mix["computed_from"]["operations"] < of_sum["computed_from"]["operations"] < 2
        peer = found[f"float32 peer / our float32 step: mix, {structure}"]
        assert peer["ratio"] == pytest.approx(1.65 / ratio) and peer["required"] == 1.05 and peer["higher_is_better"]
    # Two calls in each of three rounds, one of them timed; mix and sum share their stand-ins.
    assert calls == {"floor": 6, "unrolled": 12, "scanned": 12, "peer": 6}
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--dtype", "float32", "bfloat16", "--bars"])
    fusion_step.main()
    barred = {case["name"].partition(", 1 core, ")[2]: case for case in json.loads(capsys.readouterr().out)["cases"]}
    assert barred.keys() == found.keys() | {
        f"float32 peer / our bfloat16 step: mix, {structure}" for structure in ("unrolled", "scanned")
    }
    assert all(case["required"] is not None for case in barred.values())


@pytest.mark.long
def test_many_tasks_are_measured_against_one(benchmarks, monkeypatch):
    mixed, turns = benchmarks["mixed_batches"], {"2 one": 0.9, "2 mixed": 1.0, "alone": 0.5}
    settings = {"_BATCHES": (2,), "_SOURCE": 4, "_NEW": 2, "_COMPARED": 2, "MODULES": 2, "has_peft": lambda: False}
    settings["config_of"] = lambda shape: dataclasses.replace(tiny.CONFIG, num_layers=1, num_decoder_layers=1)
    for name, value in settings.items():
        monkeypatch.setattr(mixed, name, value)
    monkeypatch.setattr(mixed, "in_turns", lambda runs, rounds: {n: np.full(rounds, turns[n]) for n in runs})
    options = SimpleNamespace(shape="tiny", cores=1, rounds=3)
    cases = mixed._cases(options, "magnitudes", mixed._METHODS["magnitudes"])
    _check(cases)
    over_one, over_alone = cases
    assert over_one["ratio"] == pytest.approx(0.9) == over_one["required"] and over_one["higher_is_better"]
    assert over_one["computed_from"]["same_tokens_as_alone"] == 1
    assert over_alone["ratio"] == pytest.approx(0.5) and over_alone["required"] is None


def test_ten_thousand_tasks_fit_into_40_megabytes(benchmarks):
    model, found = benchmarks["_model"], []
    config = model.config_of("flan-t5-large")

    def trace():
        bank = TaskBank.empty(model.graph_of(config), model.frozen(config, "float32", 20), 10_000)
        found.extend((a.shape, a.dtype.itemsize) for a in jax.tree.leaves(bank.tasks))

    jax.eval_shape(trace)
    assert found == [((10_001, 20, 48), 4), ((10_001,), 1)]
    assert sum(np.prod(shape) * size for shape, size in found) <= 40e6


def test_short_functions_take_turns_of_many_calls(benchmarks):
    calls = []
    found = benchmarks["_measure"].in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert all(len(seconds) == 2 and (seconds > 0).all() for seconds in found.values())
    turns = [name for i, name in enumerate(calls) if i == 0 or name != calls[i - 1]]
    assert turns[:4] == ["a", "b", "a", "b"] and turns == turns[:2] * (len(turns) // 2)
    assert len(calls) > 100


def test_the_table_says_which_bars_are_met(benchmarks):
    case, table = benchmarks["_measure"].case, benchmarks["table"].table
    lines = table(
        [
            case("low", 1.1, 1.15, 1.08, seconds=1.0),
            case("high", 1.1, 1.15, higher_is_better=True, seconds=1.0),
            case("beside", 1.2345, None, seconds=1.0),
        ]
    )
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["what", "ratio", "required", "ambition", "verdict"]
    assert cells[2:] == [
        ["low", "1.1", "≤ 1.15", "≤ 1.08", "met"],
        ["high", "1.1", "≥ 1.15", "", "missed"],
        ["beside", "1.23", "", "", ""],
    ]


def test_a_table_is_kept_with_what_it_was_computed_from(benchmarks, tmp_path, monkeypatch, capsys):
    table, cases = benchmarks["table"], [benchmarks["_measure"].case("one", 2.0, 1.0, seconds=3.0)]
    ran = {"processor": "Some CPU, 1 core", "rates": {"XLA float32": 115.2, "NumPy float32": 132.0}, "cases": cases}
    monkeypatch.setattr(table, "_run", lambda command: None if command == "padding.py" else ran)
    monkeypatch.setattr(sys, "argv", ["table.py", "fast", "--out", str(tmp_path / "speed")])
    with pytest.raises(SystemExit, match="^failed: padding.py$"):
        table.main()  # what ran is printed and written all the same
    said = capsys.readouterr().out
    assert "| one  |     2 |      ≤ 1 |          | missed  |" in said
    assert (tmp_path / "speed/table.csv").read_text().splitlines()[1] == "one,2,≤ 1,,missed"
    kept = json.loads((tmp_path / "speed/cases.json").read_text())
    assert kept["cases"][0]["computed_from"] == {"seconds": 3.0}
    # Data about the processor and its speed are kept next to it.
    assert all(feature in said for feature in (*kept["features"], kept["processor"]))
    (rates,) = kept["rates"]
    assert (rates["processor"], rates["gflops"]) == (ran["processor"], ran["rates"])
    assert "| XLA float32 | NumPy float32 |" in said and "| Some CPU, 1 core |         115 |           132 |" in said
    assert {path.name for path in (tmp_path / "speed").iterdir()} == {"table.csv", "cases.json"}


def test_scripts_that_compare_with_peft_alone_are_left_out_without_it(benchmarks, monkeypatch):
    table = benchmarks["table"]
    monkeypatch.setattr(table, "has_peft", lambda: False)
    monkeypatch.setattr(table.subprocess, "run", lambda *_, **__: pytest.fail("was run"))
    for command in table._FULL:
        if command.startswith(("generation.py", "convert.py")):
            assert table._run(command) == {"cases": [], "rates": {}}


def test_the_table_that_is_kept_can_be_made_again(benchmarks):
    """From its cases, whatever else a file of an earlier form lacks."""
    folder = _ROOT / "docs/results/speed"
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    assert benchmarks["table"].csv_of(cases) == (folder / "table.csv").read_text()


def test_features_are_those_that_decide_about_speed(benchmarks, monkeypatch):
    fields = {"flags": "fpu sse2 avx2 avx512f amx_bf16 amx_tile avx512_vpopcntdq", "model name": "Some CPU"}
    monkeypatch.setattr(benchmarks["_measure"], "_cpuinfo", fields.get)
    assert benchmarks["_measure"].features() == ["avx2", "avx512f", "avx512_vpopcntdq", "amx_bf16"]
    assert benchmarks["_measure"].processor().startswith("Some CPU, ")


@pytest.mark.parametrize("torch", [False, pytest.param(True, marks=pytest.mark.peft)])
def test_rates_are_of_one_product_in_every_library(benchmarks, monkeypatch, torch):
    common, products = benchmarks["_measure"], {}

    def in_turns(runs, rounds):
        products.update({name: np.asarray(run(), np.float32) for name, run in runs.items() if "PyTorch b" not in name})
        return {name: np.array([0.5, 0.25, 1.0]) for name in runs}

    monkeypatch.setattr(common, "PRODUCT", 64)
    monkeypatch.setattr(common, "in_turns", in_turns)
    if not torch:
        monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    rates = common.product_rates(["bfloat16", "float32", "nf4"])
    others = ["PyTorch bfloat16", "PyTorch float32"] if torch else []
    assert rates.keys() == {"XLA bfloat16", "XLA float32", "NumPy float32", *others}
    # The fastest turn counts: 2 n^3 operations in a quarter of a second.
    assert set(rates.values()) == {2 * 64**3 / 0.25 / 1e9}
    for name, product in products.items():
        tolerance = 0.1 if "bfloat16" in name else 1e-4
        np.testing.assert_allclose(product, products["NumPy float32"], atol=tolerance * np.abs(product).max())


def test_every_command_of_the_table_is_a_script(benchmarks):
    for commands in benchmarks["table"]._LEVELS.values():
        assert len(set(commands)) == len(commands)
        for command in commands:
            assert (_ROOT / "benchmarks" / command.split()[0]).is_file()


def test_the_floor_is_the_base_alone(benchmarks, monkeypatch):
    """Gradients of activations, added up by token, are that of the embedding, which nothing else reads."""
    model = benchmarks["_model"]
    config = dataclasses.replace(tiny.CONFIG, num_layers=1, num_decoder_layers=1)
    batch = tiny.batch(config, rows=2, source=6, target=4)
    for name, size in (("BATCH", 2), ("SOURCE", 6), ("TARGET", 4)):
        monkeypatch.setattr(model, name, size)
    monkeypatch.setattr(model, "batch_of", lambda config: jax.tree.map(lambda a: a[None], batch))
    graph, base = nnx.split(tiny.t5(config))
    loss, of_activations = model.floor(config, Frozen(base))()
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
def test_what_a_device_does_is_tried_on_a_cpu(tmp_path):
    small = ["--shape", "small-pool", "--no-tests", "--seeds", "2", "--rounds", "1", "--product", "256"]
    command = [sys.executable, _ROOT / "benchmarks/on_device.py", *small, "--out", tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "these are a CPU's figures" in ran.stderr
    found = json.loads((tmp_path / "cpu-small-pool.json").read_text())
    _check([of | {"computed_from": of["computed_from"] or {"rate": found["product_tflops"]}} for of in found["cases"]])
    names = [of["name"] for of in found["cases"]]
    assert "2 seeds in one program / 2 single steps" in names and any(name.startswith("generation") for name in names)
    assert all(name in (tmp_path / "cpu-small-pool.md").read_text() for name in names)


@pytest.mark.parametrize("mesh", ["seed=1", "seed=2", "model=2"])
def test_a_step_is_placed_on_its_mesh(benchmarks, monkeypatch, mesh):
    scaling, placed = benchmarks["scaling"], []

    def in_turns(runs, rounds):
        if "step" in runs:
            placed.append(runs["step"])
        return {name: np.full(rounds, 2.0) for name in runs}

    monkeypatch.setattr(scaling, "in_turns", in_turns)
    monkeypatch.setattr(scaling, "config_of", lambda shape: dataclasses.replace(tiny.CONFIG, num_heads=2))
    found = scaling._point("tiny", 2, 1, mesh)
    assert found["seconds"] == 2.0 and ("latency" in found) == (mesh == "model=2")
    (step,) = placed
    devices = 1 if mesh == "seed=1" else 2
    for part in (step.state, step.batches, step.rates, step.problem):
        arrays = [leaf for leaf in jax.tree.leaves(part) if isinstance(leaf, jax.Array)]
        assert {len(array.sharding.device_set) for array in arrays} == {devices}
