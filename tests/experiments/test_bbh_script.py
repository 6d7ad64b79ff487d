"""experiments/bbh.py on tasks in the form of BIG-Bench Hard's: the whole path, with a random base that reads bytes."""

import sys
from pathlib import Path

import bbh_rows
import byte_base
import one_block
import pytest

from lorafusion_jax.report import read_rows
from lorafusion_jax.tasks import write_lorahub_split

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bbh():
    sys.path.insert(0, str(_ROOT / "experiments"))
    try:
        import bbh

        yield bbh
    finally:
        sys.path.remove(str(_ROOT / "experiments"))


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bbh")
    like, pool = one_block.cut(folder / "small")
    base = byte_base.make(folder / "base", like)
    rows, index = bbh_rows.write(folder / "rows")
    write_lorahub_split(rows, folder / "data_bbh", index=index)
    tasks = ["--data", str(folder / "data_bbh")]
    sizes = ["--modules", "2", "--epochs", "1", "--test-rows", "4", "--seeds", "1", "2"]
    where = ["--base", str(base), "--pool", str(pool), "--out", str(folder / "out")]
    return folder / "out", [*where, *tasks, *sizes, "--tasks", "boolean_expressions", "object_counting"]


@pytest.mark.nightly
def test_tasks_with_and_without_options(bbh, arguments, capsys):
    out, given = arguments
    bbh.main([*given, "--methods", "zero-shot", "LoRAFusion"])
    rows = read_rows(out / "results.jsonl")
    assert {(row["task"], row["method"], row["seed"]) for row in rows} == {
        (task, method, seed)
        for task in ("boolean_expressions", "object_counting")
        for method, seed in (("zero-shot", 1), ("LoRAFusion", 1), ("LoRAFusion", 2))
    }
    assert all(len(row["correct"]) == 4 for row in rows)
    assert {row["task"] for row in rows if row["option_accuracy"] is not None} == {"boolean_expressions"}
    assert "boolean_expressions" in (out / "report" / "report.html").read_text()
    before = (out / "results.jsonl").read_bytes()
    bbh.main([*given, "--methods", "zero-shot", "LoRAFusion"])
    assert (out / "results.jsonl").read_bytes() == before


def test_a_plan_for_flan_t5_large_needs_no_weights(bbh, arguments, capsys):
    _, given = arguments
    given = [*given]
    given[given.index("--pool") + 1], given[given.index("--base") + 1] = "none", "flan-t5-large"
    bbh.main([*given, "--methods", "LoRAFusion", "LoRA", "full fine-tuning", "--modules", "20", "--plan"])
    said = capsys.readouterr().out
    for count in ("148,416", "4,718,592", "783,150,080"):
        assert count in said


def test_full_fine_tuning_runs_only_where_it_is_named(bbh, arguments, capsys):
    given = [*arguments[1]]
    given[given.index("--pool") + 1], given[given.index("--base") + 1] = "none", "flan-t5-large"
    bbh.main([*given, "--plan", "--for", "h100"])
    said = capsys.readouterr().out
    assert "| LoRA " in said and "full fine-tuning" not in said and "The device has 74.51 GiB" in said
    with pytest.raises(SystemExit):
        bbh.main([*given, "--for", "h100"])
    assert "names the machine of a plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"--data": None},
            r"say where the tasks are: --bbh with .*BIG-Bench-Hard, or --data with .*0\.1/data_bbh\.zip",
        ),
        ({"--data": ["data_bbh"]}, r"data_bbh does not exist: .*/releases/download/0\.1/data_bbh\.zip"),
        ({"--tasks": ["no_such_task"]}, "no_such_task"),
        ({"--methods": ["LoRAFuson"]}, r"no method LoRAFuson: choose of zero-shot; "),
        ({"--modules": ["5"], "--methods": ["LoRAFusion"]}, r"holds 4 modules, and 5 are to be drawn"),
    ],
)
def test_bad_input(bbh, arguments, change, message):
    words: dict[str, list[str]] = {}
    for word in arguments[1]:
        if word.startswith("--"):
            words[word] = []
        else:
            words[list(words)[-1]].append(word)
    words |= change
    given = [word for name, values in words.items() if values is not None for word in (name, *values)]
    with pytest.raises(ValueError, match=message):
        bbh.main(given)
