"""experiments/bbh.py on tasks in the form of BIG-Bench Hard's: the whole path, with a random base that reads bytes."""

import bbh
import bbh_rows
import byte_base
import pytest
from refusals import refused

from lorafusion_jax.tasks import write_lorahub_split
from lorafusion_jax.trials import read_rows


@pytest.fixture(scope="module")
def arguments(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bbh")
    base, pool = small
    rows, index = bbh_rows.write(folder / "rows")
    tasks = ["boolean_expressions", "object_counting"]
    for task in write_lorahub_split(rows, folder / "data_bbh", tasks, index=index):
        with (task / "example.jsonl").open(
            "a"
        ) as file:  # a few-shot prompt has five examples
            file.write("\n" + bbh_rows.lines(task.name, [5])[0])
    return {
        "--base": [str(base)],
        "--pool": [str(pool)],
        "--out": [str(folder / "out")],
        "--data": [str(folder / "data_bbh")],
        "--modules": ["2"],
        "--epochs": ["1"],
        "--test-rows": ["4"],
        "--seeds": ["1", "2"],
        "--tasks": tasks,
    }


def _run(arguments, **changes):
    given = arguments | {
        f"--{name.replace('_', '-')}": values for name, values in changes.items()
    }
    bbh.main(
        [
            word
            for name, values in given.items()
            if values is not None
            for word in (name, *values)
        ]
    )


@pytest.mark.nightly
def test_tasks_with_and_without_options(arguments, small, tmp_path):
    base = byte_base.make(tmp_path / "base", small[0])
    out = tmp_path / "out"
    for _ in range(2):  # the second run finds every row
        _run(
            arguments,
            base=[str(base)],
            out=[str(out)],
            methods=["zero-shot", "LoRAFusion"],
        )
    rows = read_rows(out / "results.jsonl")
    assert sorted((row["task"], row["method"], row["seed"]) for row in rows) == [
        (task, method, seed)
        for task in ("boolean_expressions", "object_counting")
        for method, seed in (("LoRAFusion", 1), ("LoRAFusion", 2), ("zero-shot", 1))
    ]
    assert all(len(row["correct"]) == 4 for row in rows)
    assert {row["task"] for row in rows if row["option_accuracy"] is not None} == {
        "boolean_expressions"
    }
    assert "boolean_expressions" in (out / "report" / "table.csv").read_text()


def test_a_plan_of_a_shape_needs_no_weights(arguments, capsys):
    arguments = arguments | {"--base": ["t5-small"], "--pool": ["none"]}
    arguments["--tasks"] = arguments["--tasks"][:1]
    machine = {"for": ["h100"]}
    _run(arguments | {"--plan": []}, methods=["LoRA"], **machine)
    printed = capsys.readouterr().out
    assert "| LoRA " in printed and "The machine has 74.51 GiB" in printed
    with pytest.raises(SystemExit):
        _run(arguments, **machine)
    error = " ".join(capsys.readouterr().err.split())
    assert "--for h100 is an option of a plan" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data": None},
            r"--bbh with .*BIG-Bench-Hard, or --data with .*0\.1/data_bbh\.zip",
        ),
        (
            {"data": ["data_bbh"]},
            r"data_bbh does not exist: .*/releases/download/0\.1/data_bbh\.zip",
        ),
        ({"tasks": ["no_such_task"]}, "no_such_task"),
        ({"methods": ["LoRAFuson"]}, r"no method LoRAFuson: choose of zero-shot; "),
        (
            {"modules": ["5"], "methods": ["LoRAFusion"]},
            r"holds 4 modules, and 5 are to be drawn",
        ),
    ],
)
def test_bad_input_is_refused(arguments, change, message):
    with refused(message):
        _run(arguments, **change)
