"""Rows of other layouts: named columns, templates, CSV, Parquet, and conversations of ShareGPT."""

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lorafusion_jax.tasks import load_task

_ROWS = [{"question": f"What is {i} + 1?", "choices": f"{i} or {i + 1}", "answer": i + 1} for i in range(4)]

_TYPES = ["json", "jsonl", "csv", "parquet"]


def _file(tmp_path, suffix, rows=_ROWS):
    file = tmp_path / f"sums.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps(rows))
    elif suffix == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    elif suffix == "csv":
        cells = [[*rows[0]], *([f'"{cell}"' for cell in row.values()] for row in rows)]
        file.write_text("\n".join(map(",".join, cells)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def _with_a_small_number_in_the_footer(length):
    """A file whose footer names a small size, and the header of a page a large one, whose text is damaged."""
    content = _parquet(compression="zstd", input=["x" * length], target=["y"])
    column = pyarrow.parquet.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(0)
    large, small = (
        bytes([n & 127 | 128, n >> 7 & 127 | 128, n >> 14 & 127 | 128, n >> 21])
        for n in (2 * column.total_uncompressed_size, 2)
    )
    assert content.count(large) == 1
    middle = len(content) // 2
    return content[:middle] + bytes(8) + content[middle + 8 :].replace(large, small)


def _repeated(text, rows):
    """Return a column that a file holds as one text and its number of rows."""
    return pyarrow.DictionaryArray.from_arrays(np.zeros(rows, np.int32), pyarrow.array([text]))


def _parquet(names=None, compression="none", **columns):
    file = io.BytesIO()
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table.rename_columns(names or [*columns]), file, compression=compression)
    return file.getvalue()


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


@pytest.mark.parametrize("options", [{"input": "question"}, {"prompt": "{question} {choices}"}])
def test_every_type_of_file_gives_the_same_task_of_the_first_rows_of_each_input(tmp_path, options):
    """Rows with one `input` and different questions all count; equal questions are never trained and tested."""
    rows = [{"input": "x"} | _ROWS[n % 4] | {"answer": str(n)} for n in range(12)]
    tasks = [load_task(_file(tmp_path, suffix, rows), target="answer", train_rows=2, **options) for suffix in _TYPES]
    assert len({task.sha256 for task in tasks}) == 1
    assert sorted(row.target for row in (*tasks[0].train, *tasks[0].test)) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("suffix", _TYPES)
@pytest.mark.parametrize(("number", "column"), [(float("nan"), "question"), (-float("inf"), "answer")])
def test_numbers_that_are_not_finite_are_refused_by_row_and_column(tmp_path, suffix, number, column):
    rows = [{"question": 0.5 + n, "answer": 1.5 + n} for n in range(2)]
    rows[1][column] = number
    file = _file(tmp_path, suffix, rows)
    place = {"json": "row 2", "parquet": "row 1"}.get(suffix, "line 3" if suffix == "csv" else "line 2")
    with pytest.raises(ValueError, match=f"{place}.* {column} (is )?{number}[,:]"):
        load_task(file, prompt="{question}", target="answer", train_rows=0, need=("test",))
    with pytest.raises(ValueError, match=f"{place}: its {column} is {number}: give it a text"):
        load_task(file, input="question", target="answer", train_rows=0, need=("test",))


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


def test_a_speaker_that_is_no_text_is_refused(tmp_path):
    file = _file(tmp_path, "jsonl", [{"conversations": [{"from": ["human"], "value": "1 + 1?"}]}])
    with pytest.raises(ValueError, match="line 1: message 1 has role, content: expected role and content, both texts"):
        load_task(file, chat=True, train_rows=0, need=("test",))


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
        ("a.csv", b"input,target,input\na,b,c\n", "a.csv: two columns named input: rename one"),
        ("a.parquet", b"PAR1 and no more", "not Parquet"),
        ("a.parquet", _parquet(input=["four"]).replace(b"four", b"fou\xff"), "a.parquet: not Parquet: 'utf-8'"),
        ("a.parquet", _parquet(input=["a"], target=["b"], names=["c", "c"]), "a.parquet: two columns named c: rename"),
        (
            "a.parquet",
            _parquet(input=pyarrow.array([0], pyarrow.timestamp("s", "No/Where"))),
            "a.parquet: not Parquet: .*No/Where",
        ),
        ("a.parquet", _parquet(input=pyarrow.nulls(300_000)), "rows of over 76,.* bytes: expected at most 67,108,864"),
        (
            "a.parquet",
            _parquet(input=_repeated("x" * 1_000_000, 3000), target=_repeated("y", 3000)),
            "rows of over .*, 64 times its size or 64 MiB",
        ),
        ("a.parquet", _with_a_small_number_in_the_footer(70_000_000), "rows of over 70,.* bytes: expected at most 67,"),
    ],
)
def test_damaged_tables_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_task(tmp_path / name, train_rows=0)
