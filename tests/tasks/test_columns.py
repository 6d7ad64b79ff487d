"""Rows of other layouts: named columns, templates, CSV, Parquet, and conversations of ShareGPT."""

import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from lorafusion_jax.tasks import load_task

_ROWS = [{"question": f"What is {i} + 1?", "choices": f"{i} or {i + 1}", "answer": i + 1} for i in range(4)]


def _file(tmp_path, suffix, rows=_ROWS):
    file = tmp_path / f"sums.{suffix}"
    if suffix == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == "csv":
        cells = [[*rows[0]], *([f'"{cell}"' for cell in row.values()] for row in rows)]
        file.write_text("\n".join(map(",".join, cells)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def _not_utf8():
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist([{"input": "four", "target": "4"}])
    pyarrow.parquet.write_table(table, file, compression="none")
    return file.getvalue().replace(b"four", b"fou\xff")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
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


def test_a_template_replaces_the_line_of_the_instruction(tmp_path):
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    file = _file(tmp_path, "jsonl", [row, row | {"input": ""}])
    plain, templated = (
        load_task(file, prompt=prompt, train_rows=0, need=("test",)).test for prompt in (None, "{input}: {instruction}")
    )
    assert {example.input for example in plain} == {"Add.\n1 and 2", "Add."}
    assert {example.input for example in templated} == {"1 and 2: Add.", ": Add."}


def test_conversations_of_sharegpt_are_chats(tmp_path):
    said = [("system", "Be brief."), ("human", "1 + 1?"), ("gpt", "2"), ("human", "2 + 2?"), ("gpt", "4")]
    file = _file(tmp_path, "jsonl", [{"conversations": [{"from": who, "value": text} for who, text in said]}])
    (example,) = load_task(file, chat=True, train_rows=0, need=("test",)).test
    assert (example.input, example.target) == ("2 + 2?", "4")
    assert example.history == (("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"has question, choices, answer: expected input and target .* with --input and --target"),
        ({"input": "text", "target": "answer"}, r"has question, choices, answer: expected text \(--input\)"),
        ({"prompt": "{quest}", "target": "answer"}, r"no column quest \(it has .*\), which .*; write {{quest}}"),
    ],
)
def test_columns_that_rows_lack_are_refused_with_those_that_they_have(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load_task(_file(tmp_path, "jsonl"), train_rows=2, **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b'input,target\n"a,b', "line 2: not CSV"),
        ("a.csv", b"input,target\na,b,c\n", "line 2 has more or fewer columns than the header input, target"),
        ("a.csv", b"input,target\na\n", "line 2 has more or fewer columns"),
        ("a.csv", b"input,target\n\xff,b\n", "UTF-8"),
        ("a.parquet", b"PAR1 and no more", "not Parquet"),
        ("a.parquet", _not_utf8(), "a.parquet: .*not Parquet: 'utf-8'"),
    ],
)
def test_damaged_tables_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path / name, train_rows=0)
