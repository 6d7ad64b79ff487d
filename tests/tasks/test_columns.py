"""Rows of other layouts: named columns, templates, CSV, Parquet, and conversations of ShareGPT."""

import pyarrow
import pyarrow.parquet
import pytest
from json_files import write_json, write_rows
from refusals import refused

from lorafusion_jax.tasks import load_task

_ROWS = [
    {"question": f"What is {i} + 1?", "choices": f"{i} or {i + 1}", "answer": i + 1}
    for i in range(4)
]

_TYPES = ["json", "jsonl", "csv", "parquet"]


def _file(tmp_path, suffix, rows=_ROWS):
    file = tmp_path / f"sums.{suffix}"
    if suffix == "json":
        write_json(file, rows)
    elif suffix == "jsonl":
        write_rows(file, rows)
    elif suffix == "csv":
        cells = [[*rows[0]], *([f'"{cell}"' for cell in row.values()] for row in rows)]
        file.write_text("\n".join(map(",".join, cells)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize("suffix", _TYPES)
def test_named_columns_and_templates_are_read_from_every_type_of_file(tmp_path, suffix):
    file = _file(tmp_path, suffix)
    task = load_task(file, input="question", target="answer", train_rows=2)
    expected = {(row["question"], str(row["answer"])) for row in _ROWS}
    assert {(row.input, row.target) for row in (*task.train, *task.test)} == expected
    prompt = "{question} ({choices}) {{choices}} \\d{2} {"
    task = load_task(file, prompt=prompt, target="answer", train_rows=2)
    assert {row.input for row in (*task.train, *task.test)} == {
        f"{row['question']} ({row['choices']}) {{choices}} \\d{{2}} {{" for row in _ROWS
    }


@pytest.mark.parametrize(
    "options", [{"input": "question"}, {"prompt": "{question} {choices}"}]
)
def test_every_type_of_file_gives_the_same_task_of_the_first_rows_of_each_input(
    tmp_path, options
):
    """Rows with one `input` and different questions all count; equal questions are never trained and tested."""
    rows = [{"input": "x"} | _ROWS[n % 4] | {"answer": str(n)} for n in range(12)]
    tasks = [
        load_task(
            _file(tmp_path, suffix, rows), target="answer", train_rows=2, **options
        )
        for suffix in _TYPES
    ]
    assert len({task.sha256 for task in tasks}) == 1
    assert sorted(row.target for row in (*tasks[0].train, *tasks[0].test)) == [
        "0",
        "1",
        "2",
        "3",
    ]


@pytest.mark.parametrize("suffix", _TYPES)
@pytest.mark.parametrize(
    ("number", "column"), [(float("nan"), "question"), (-float("inf"), "answer")]
)
def test_numbers_that_are_not_finite_are_refused_by_row_and_column(
    tmp_path, suffix, number, column
):
    rows = [{"question": 0.5 + n, "answer": 1.5 + n} for n in range(2)]
    rows[1][column] = number
    file = _file(tmp_path, suffix, rows)
    place = {"json": "row 2", "parquet": "row 1"}.get(
        suffix, "line 3" if suffix == "csv" else "line 2"
    )
    with refused(f"{place}.* {column} (is )?{number}[,:]"):
        load_task(
            file, prompt="{question}", target="answer", train_rows=0, need=("test",)
        )
    with refused(f"{place}: its {column} is {number}: give it a text"):
        load_task(file, input="question", target="answer", train_rows=0, need=("test",))


def test_a_template_replaces_the_line_of_the_instruction(tmp_path):
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    file = _file(tmp_path, "jsonl", [row, row | {"input": ""}])
    plain = load_task(file, prompt=None, train_rows=0, need=("test",)).test
    templated = load_task(
        file, prompt="{input}: {instruction}", train_rows=0, need=("test",)
    ).test
    assert {example.input for example in plain} == {"Add.\n1 and 2", "Add."}
    assert {example.input for example in templated} == {"1 and 2: Add.", ": Add."}


def test_conversations_of_sharegpt_are_chats(tmp_path):
    said = [
        ("system", "Be brief."),
        ("human", "1 + 1?"),
        ("gpt", "2"),
        ("human", "2 + 2?"),
        ("gpt", "4"),
    ]
    file = _file(
        tmp_path,
        "jsonl",
        [{"conversations": [{"from": who, "value": text} for who, text in said]}],
    )
    (example,) = load_task(file, chat=True, train_rows=0, need=("test",)).test
    assert (example.input, example.target) == ("2 + 2?", "4")
    assert example.history == (
        ("system", "Be brief."),
        ("user", "1 + 1?"),
        ("assistant", "2"),
    )
