"""The demo on a real language model: its tasks, its adapters, and what it writes; the model itself is stood in for."""

import json
from pathlib import Path

import demo
import demo_llm
import inflections
import pytest

from lorafusion_jax.runs import RunFolder

_SMOLLM2 = Path(__file__).resolve().parents[2] / "examples" / "smollm2"


def _rows(task, part):
    lines = (_SMOLLM2 / "tasks" / task / f"{part}.jsonl").read_text().splitlines()
    return {row["input"]: row["target"] for row in map(json.loads, lines)}


def test_the_tasks_are_what_their_script_writes(tmp_path):
    inflections.main(tmp_path)
    for file in sorted(tmp_path.rglob("*.jsonl")):
        assert (
            file.read_bytes()
            == (_SMOLLM2 / "tasks" / file.relative_to(tmp_path)).read_bytes()
        )
    # No adapter saw a verb of the new task's test.
    assert _rows("ing", "test").keys().isdisjoint(_rows("past", "train"))


@pytest.mark.parametrize("script", [demo, demo_llm])
def test_a_demo_explains_itself_and_takes_no_options(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "fresh_folder", lambda folder: pytest.fail("it starts"))
    for arguments, code in ((["--help"], 0), (["--seeds", "3"], 2)):
        with pytest.raises(SystemExit) as stopped:
            script.main(arguments)
        assert stopped.value.code == code
    printed = capsys.readouterr()
    assert (
        "Written to runs/demo" in printed.out
        and "unrecognized arguments: --seeds 3" in printed.err
    )


def test_the_demo_compares_the_base_with_the_fusion(tmp_path, monkeypatch, capsys):
    asked = []
    rows = []

    def run_jobs(jobs, file, run):
        for task, method, *_, options, _ in jobs:
            asked.append(options)
            fuses = options.method == "fusion"
            row = {"seed": 1, "row": 0, "input": "Q: reply\nA:", "target": "replying"}
            row["prediction"] = " replying" if fuses else "\nreply"
            folder = options.out / options.name
            folder.mkdir(parents=True)
            predictions = [row | {"correct": fuses, "option_correct": None}]
            RunFolder(folder).write_predictions(predictions)
            scores = {"exact_match": 75.0 * fuses, "trainable": 7, "seconds": 1.0}
            rows.append({"task": task, "method": method, "seed": 1} | scores)

    monkeypatch.setattr(demo_llm, "FOLDER", tmp_path / "demo")
    monkeypatch.setattr(demo_llm, "base", lambda: Path("base.gguf"))
    monkeypatch.setattr(demo_llm, "run_jobs", run_jobs)
    monkeypatch.setattr(demo_llm, "read_rows", lambda file: rows)
    monkeypatch.setattr(demo_llm, "convert", lambda *given: None)
    demo_llm.main()
    printed = capsys.readouterr().out
    methods = [options.method for options in asked]
    assert methods == ["zero-shot", "few-shot", "mean", "fusion"]
    assert {options.prompt for options in asked} == {"Q: {input}\nA:"}
    assert {options.recipe.modules for options in asked if options.pool} == {24}
    assert all(f"\n{method} " in printed for method in demo_llm.METHODS)
    assert "reply         reply                           replying" in printed
    assert "75.0" in printed
    written = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"table.md", "accuracy.png"} <= written
