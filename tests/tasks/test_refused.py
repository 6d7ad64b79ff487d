"""Files that are no tasks: what is refused, and in which words. Every row is a file, its content and the message."""

import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from refusals import refused

from lorafusion_jax.tasks import load_task

_LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
_LAYOUT = r"input and target \(or output\), or context and completion, with an instruction or without"


def _parquet(names=None, **columns):
    file = io.BytesIO()
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(
        table.rename_columns(names or [*columns]), file, compression="none"
    )
    return file.getvalue()


def _said(*words):
    return [
        {"role": role, "content": content}
        for role, content in zip(words[::2], words[1::2], strict=True)
    ]


_TEXTS = [
    ("test.jsonl", "\n \n", r"test\.jsonl is empty: a task needs at least one row"),
    ("bbh.json", '{"examples": []}', r"bbh\.json is empty"),
    ("list.json", "[]", r"list\.json is empty"),
    (
        "test.jsonl",
        '{"context": "a", "completion": "b"}\n\n{"context": "a", "completion": " "}',
        r"test\.jsonl, line 3: its completion is ' ': give it a text, or take the row out",
    ),
    (
        "test.jsonl",
        '{"input": "", "target": "b"}',
        r"line 1: its input is '': give it a text",
    ),
    (
        "test.jsonl",
        '{"question": "a", "target": "b"}',
        f"line 1 has question, target: expected {_LAYOUT}",
    ),
    (
        "test.jsonl",
        '{"instruction": " ", "input": "", "output": "b"}',
        r"line 1: its instruction is ' ', and its input is '': give it a text, or take the row out",
    ),
    (
        "test.jsonl",
        '{"instruction": 5, "input": "a", "output": "b"}',
        r"line 1: its instruction is 5: give it a",
    ),
    ("test.jsonl", "{}", "line 1 has no keys: expected input and target"),
    (
        "test.jsonl",
        '["a", "b"]',
        rf"line 1 is \['a', 'b'\]: expected an object with {_LAYOUT}",
    ),
    (
        "test.jsonl",
        '{"input": "a", "target": "b"}\n{"input": "a"; "target": "b"}',
        r"test\.jsonl, line 2: not JSON \(Expecting ',' delimiter: line 1 column 14",
    ),
    (
        "bbh.json",
        '{"examples": [\n{"input": }]}',
        r"bbh\.json: not JSON \(Expecting value: line 2",
    ),
    (
        "bbh.json",
        '{"rows": []}',
        r"neither a list.*nor laid out as BIG-Bench Hard.*into a \.jsonl file",
    ),
    (
        "bbh.json",
        '{"examples": [{"input": "a"}]}',
        r"bbh\.json, example 1 has input: expected input and target",
    ),
    (
        "test.jsonl",
        _LFS,
        r"test\.jsonl: this is a Git LFS pointer, not the file itself: fetch .*git lfs pull",
    ),
    (
        "task.txt",
        "input,target",
        r"task\.txt ends in \.txt: expected one of \.jsonl, \.json, \.csv, \.parquet",
    ),
    (
        "test.jsonl",
        '{"input": "à", "target": "b"}'.encode("latin-1"),
        r"jsonl, line 1: not JSON .*position 11",
    ),
]
_TABLES = [
    ("a.csv", b'input,target\n"a,b', "line 2: not CSV"),
    (
        "a.csv",
        b"input,target\na,b,c\n",
        "line 2 has more or fewer columns than the header input, target",
    ),
    ("a.csv", b"input,target\na\n", "line 2 has more or fewer columns"),
    ("a.csv", b"input,target\n\xff,b\n", "UTF-8"),
    (
        "a.csv",
        b"input,target,input\na,b,c\n",
        "a.csv: two columns named input: rename one",
    ),
    ("a.parquet", b"PAR1 and no more", "not Parquet"),
    (
        "a.parquet",
        _parquet(input=["four"]).replace(b"four", b"fou\xff"),
        "a.parquet: not Parquet: 'utf-8'",
    ),
    (
        "a.parquet",
        _parquet(input=["a"], target=["b"], names=["c", "c"]),
        "a.parquet: two columns named c: rename",
    ),
]
_CHATS = [
    ("hello", "Expected `array`, got `str`: fix its messages"),
    ([], "has messages of nobody: expected the user's message and then"),
    ([{"role": "user", "content": "hot"}], "has messages of user: expected"),
    (
        _said("user", "hot", "assistant", " "),
        "messages of user, assistant: .* both with text",
    ),
    (
        _said("assistant", "hot", "user", "cold"),
        "messages of assistant, user: expected",
    ),
    ([{"role": "user"}], "message 1 has role: expected role and content"),
    (
        [{"role": "user", "content": "x", "tool_calls": []}],
        "got `array`.*: fix its messages",
    ),
]
_SPEAKER = {"conversations": [{"from": ["human"], "value": "1 + 1?"}]}
_TALKS = [({"messages": messages}, message) for messages, message in _CHATS]
_TALKS.append((_SPEAKER, "Expected `str.*, got `array`"))
_HAS = "has question, choices, answer: expected"
_COLUMNS = [
    ({}, rf"{_HAS} input and target .* with --input and --target"),
    ({"input": "text", "target": "answer"}, rf"{_HAS} text \(--input\)"),
    (
        {"prompt": "{quest}", "target": "answer"},
        r"no column quest \(it has .*\), which .*; write {{quest}}",
    ),
]
_ROW = json.dumps({"question": "What is 1 + 1?", "choices": "1 or 2", "answer": 2})
_REFUSED = [
    *((file, content, {}, message) for file, content, message in _TEXTS),
    *(
        (file, content, {"need": ("train", "test"), "train_rows": 0}, message)
        for file, content, message in _TABLES
    ),
    *(
        (
            "test.jsonl",
            json.dumps(row),
            {"chat": True},
            f"test.jsonl, line 1.*{message}",
        )
        for row, message in _TALKS
    ),
    *(
        ("test.jsonl", f"{_ROW}\n{_ROW}", options, message)
        for options, message in _COLUMNS
    ),
]


@pytest.mark.parametrize(("file", "content", "options", "message"), _REFUSED)
def test_files_that_are_refused(tmp_path, file, content, options, message):
    (tmp_path / file).write_bytes(
        content.encode() if isinstance(content, str) else content
    )
    with refused(message):
        load_task(tmp_path / file, **{"need": ["test"]} | options)
