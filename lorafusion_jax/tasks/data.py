"""Tasks: pairs of texts to train on and to test on."""

import dataclasses
import hashlib
import json
import math
import random
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from ..support.reading import decode_as
from ..support.text import some
from .protocol import REFERENCE_SEED, shuffled
from .readers import Row, read_rows, task_name

# The plain names, LoraHub's, and those of function-vector data sets.
_KEYS = (("input", "target"), ("context", "completion"), ("input", "output"))
_LAYOUT = (
    "input and target (or output), or context and completion, with an instruction or without. Name other columns with "
    "--input and --target"
)
# A column in a template, or in double braces the same text without a meaning.
_FIELD = re.compile(r"\{\{([^\W\d]\w*)\}\}|\{([^\W\d]\w*)\}")
BETWEEN_EXAMPLES = "\n\n"  # in a few-shot prompt
# Roles of ShareGPT's conversations.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclasses.dataclass(frozen=True)
class Example:
    """A text and the text that should follow it.

    Attributes:
      input: the text; in a conversation, the user's last message.
      target: the text that follows; in a conversation, the assistant's answer.
      history: role and content of the messages before, if any.
      row: SHA-256 of the row that it was made of, with all columns.
    """

    input: str
    target: str
    history: tuple[tuple[str, str], ...] = ()
    row: str = dataclasses.field(default="", compare=False)

    @property
    def input_sha256(self) -> str:
        """SHA-256 of the input and the messages before it."""
        return hashlib.sha256(
            json.dumps([self.input, *self.history]).encode()
        ).hexdigest()


@dataclasses.dataclass(frozen=True)
class Task:
    """Training rows and test rows, read from `source`; `one_list` if the source does not divide them."""

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    source: str
    one_list: bool = False

    @property
    def sha256(self) -> str:
        """Fingerprint of all rows in their order, prompts included."""
        parts = (self.train, self.test)
        rows = [
            [(example.input, example.target, *example.history) for example in part]
            for part in parts
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def load_task(
    source: str | Path,
    *,
    name: str | None = None,
    prompt: str | None = None,
    input: str | None = None,
    target: str | None = None,
    chat: bool = False,
    train_rows: int | None = 100,
    need: Collection[Literal["train", "test"]] = ("train", "test"),
) -> Task:
    r"""Read a task.

    Sources:

    * a folder with `train.jsonl` and `test.jsonl`, or LoraHub's `example.jsonl` and `zero_shot.jsonl`, or only the
      needed one; a row holds input and target, or context and completion, and may hold an instruction (Alpaca), which
      stands in the line before the input or alone;
    * one such file; a JSONL, CSV or Parquet file of any other name;
    * a BIG-Bench Hard file, `{"examples": [{"input": ..., "target": ...}]}`;
    * a JSON list, `[{"input": ..., "output": ...}]`, as the function-vector data sets are (Todd et al., ICLR 2024);
    * a `datasets` folder (`save_to_disk`) or hub id, `owner/name`, `owner/name@revision`, `owner/name:config` or
      `owner/name@revision:config`, with those columns and the splits train and test (or validation).

    With `chat`, rows may also be conversations, `{"messages": [{"role": ..., "content": ...}, ...]}` or ShareGPT's
    `{"conversations": [{"from": ..., "value": ...}, ...]}`, which end with the user's message and the assistant's
    answer.

    A file of another name, and a data set of one split, are one list. Of rows that give equal inputs only the first is
    used. The list is shuffled by `random.Random(42)`; then the first `train_rows` are used for training and the others
    for testing, whatever `need` is. If that would leave none to test, four fifths are used for training.

    Args:
      source: path or hub id.
      name: name of the task; by default the last part of `source`.
      prompt: template of the model's input, such as `"Sort a list of words.\n\nQ: {input}\nA:"`. It may name any column
        of the rows: `"{question}\n{choices}"`. `{{name}}` is the text `{name}`.
      input: column of the input, if it is none of the above.
      target: column of the answer, if it is none of the above.
      chat: the model's chat template will be used, so rows may be conversations.
      train_rows: number of training rows of one list; None for all.
      need: parts that must have rows.

    Raises:
      ValueError: on a source that does not exist or has another layout, a row without its keys or without text (naming
        file and line), a file without rows, a needed part that is missing.
    """
    if prompt is not None and not columns(prompt):
        raise ValueError(
            f"the prompt {prompt!r} has no {{input}} or other column: write it where its text belongs"
        )
    parts = {
        part: [
            dataclasses.replace(
                as_example(row, where, prompt, input=input, target=target, chat=chat),
                row=hashlib.sha256(
                    json.dumps(row, sort_keys=True, default=repr).encode()
                ).hexdigest(),
            )
            for where, row in rows
        ]
        for part, rows in read_rows(source).items()
    }
    one_list = "all" in parts
    if one_list:
        parts = _divide(parts["all"], train_rows, source)
    for part in need:
        if not parts.get(part):
            raise ValueError(
                f"{source} has no {part} rows: give a folder or data set that has both parts"
            )
    return Task(
        name=name or task_name(source),
        train=tuple(parts.get("train", ())),
        test=tuple(parts.get("test", ())),
        source=str(source),
        one_list=one_list,
    )


def few_shot(task: Task, shots: int, seed: int) -> Task:
    r"""Put `shots` training examples, the same for all, before every test input.

    The prompt is `input target\n\n` for each example and then the row's own input. With a chat template the examples
    stand as text in the user's message. Of a conversation only the last message and its answer are shown as an example;
    the messages before a row's own input stay where they are. `random.Random("few-shot, seed N")` draws the examples
    and their order.

    `encode` cuts separate texts at the end, which is the question: keep its `max_length` above the longest prompt.
    """
    if not 1 <= shots <= len(task.train):
        raise ValueError(
            f"{shots} examples in a prompt: use 1 to {len(task.train)}, the training rows of {task.name}"
        )
    shown_examples = random.Random(f"few-shot, seed {seed}").sample(task.train, shots)
    examples_text = "".join(
        f"{example.input} {example.target}{BETWEEN_EXAMPLES}"
        for example in shown_examples
    )
    test = tuple(
        dataclasses.replace(example, input=examples_text + example.input)
        for example in task.test
    )
    return dataclasses.replace(task, test=test)


def columns(prompt: str | None) -> set[str]:
    """Return the columns that a template names."""
    return {name for _, name in _FIELD.findall(prompt or "{input}") if name}


def fill(prompt: str | None, row: Mapping[str, Any], where: str) -> str:
    """Return a template of the model's input with the texts and numbers of a row's columns, by default its input."""

    def column(field: re.Match[str]) -> str:
        literal, name = field.groups()
        if literal is not None:
            return f"{{{literal}}}"
        if not _is_text(row.get(name), named=name != "input"):
            if name in row:
                got = f"has {name} {row[name]!r}"
            else:
                got = f"has no column {name} (it has {some([*row])})"
            raise ValueError(
                f"{where} {got}, which the prompt names; write {{{{{name}}}}} for the text {{{name}}}"
            )
        return str(row[name])

    return _FIELD.sub(column, prompt or "{input}")


def as_example(
    row: Row,
    where: str,
    prompt: str | None = None,
    *,
    input: str | None = None,
    target: str | None = None,
    chat: bool = False,
) -> Example:
    """Check one row that was read, and put the prompt around its input; `where` is for messages."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {row!r}: expected an object with {_LAYOUT}")
    for option, name in (("--input", input), ("--target", target)):
        if name is not None and name not in row:
            raise ValueError(
                f"{where} has {some([*row]) or 'no columns'}: expected {name} ({option})"
            )
    prompt_columns = columns(prompt) - {"input"}
    pairs = [(input or key, target or answer) for key, answer in _KEYS]
    keys = next((keys for keys in pairs if row.keys() >= set(keys)), None)
    if keys is None and (
        prompt_columns
        or (
            row.get("instruction") is not None and not row.keys() & {"input", "context"}
        )
    ):
        keys = next((keys for keys in pairs if keys[1] in row), None)
    conversation = row.get("messages", row.get("conversations"))
    if keys is None and conversation is not None:
        if not chat:
            raise ValueError(
                f"{where} is a conversation, which needs the model's chat template: give --chat"
            )
        *history, (_, question), (_, answer) = _conversation(conversation, where)
        return Example(
            fill(prompt, row | {"input": question}, where), answer, tuple(history)
        )
    if keys is None:
        raise ValueError(f"{where} has {some([*row]) or 'no keys'}: expected {_LAYOUT}")
    filled = _filled(row, where, prompt, keys[0], named=input is not None)
    answer = row[keys[1]]
    if not _is_text(answer, named=target is not None) or not str(answer).strip():
        raise ValueError(
            f"{where}: its {keys[1]} is {answer!r}: give it a text, or take the row out"
        )
    return Example(filled, str(answer))


def as_input(
    row: Row | str, where: str, prompt: str | None = None, *, input: str | None = None
) -> str:
    """Return the model's input for a row without its answer, or for a text, where the prompt names no other column."""
    if not isinstance(row, str):
        key = next(
            (
                key
                for key in (input, "input", "context")
                if key is not None and key in row
            ),
            input or "input",
        )
        return _filled(row, where, prompt, key, named=input is not None)
    if columns(prompt) - {"input"}:
        raise ValueError(
            f"{where} is a text: the prompt needs a row such as {row_example(prompt)}"
        )
    return fill(prompt, {"input": row}, where)


def row_example(prompt: str | None) -> str:
    """Return JSON of a row with the columns that a template names, for messages."""
    return json.dumps(dict.fromkeys(sorted(columns(prompt)), "some text"))


def _filled(row: Row, where: str, prompt: str | None, key: str, *, named: bool) -> str:
    """Return the prompt around a row's column `key`; `named` if the user named it."""
    question = row.get(key)
    if not columns(prompt) - {"input"}:
        parts = {} if named else {"instruction": row.get("instruction")}
        parts[key] = question
        present = {name: text for name, text in parts.items() if text is not None}
        wrong = {
            name: text
            for name, text in present.items()
            if not _is_text(text, named=named)
        }
        question = "\n".join(
            str(text) for text in present.values() if str(text).strip()
        )
        if wrong or not question:
            texts = (wrong or present or {key: None}).items()
            got = ", and its ".join(f"{name} is {text!r}" for name, text in texts)
            raise ValueError(f"{where}: its {got}: give it a text, or take the row out")
    return fill(prompt, row if question is None else {**row, "input": question}, where)


def _is_text(value: Any, *, named: bool) -> bool:
    """Return whether a value is a text, or a finite number in a column that the user named."""
    number = (
        isinstance(value, int) if not isinstance(value, float) else math.isfinite(value)
    )
    return isinstance(value, str) or (named and number and not isinstance(value, bool))


def _conversation(messages: Row, where: str) -> list[tuple[str, str]]:
    # `datasets` fills up keys with None.
    kind = list[dict[str, str | None]]
    turns = []
    for number, message in enumerate(
        decode_as(messages, kind, where, fix="fix its messages"), start=1
    ):
        entry = {key: text for key, text in message.items() if text is not None}
        if entry.keys() == {"from", "value"}:
            speaker = entry["from"]
            entry = {
                "role": _SPEAKERS.get(speaker, speaker),
                "content": entry["value"],
            }
        if entry.keys() != {"role", "content"}:
            raise ValueError(
                f"{where}: message {number} has {some([*entry]) or 'nothing'}: expected role and content"
            )
        turns.append((entry["role"], entry["content"]))
    if [role for role, _ in turns[-2:]] != ["user", "assistant"] or not all(
        text.strip() for _, text in turns[-2:]
    ):
        roles = some([role for role, _ in turns]) or "nobody"
        raise ValueError(
            f"{where} has messages of {roles}: expected the user's message and then the assistant's answer as the last "
            "two, both with text"
        )
    return turns


def _divide(
    rows: list[Example], train_rows: int | None, source: str | Path
) -> dict[str, list[Example]]:
    different: dict[
        str, Example
    ] = {}  # inputs, because a test row must not be a training row too
    for row in rows:
        different.setdefault(row.input_sha256, row)
    rows = list(different.values())
    if train_rows is None:
        train_rows = len(rows)
    elif len(rows) == 1 and train_rows > 0:
        raise ValueError(
            f"{source} has one row, which cannot be used for training and for testing: give more rows, or train on it "
            "with --test-rows 0"
        )
    elif train_rows >= len(rows):
        train_rows = len(rows) * 4 // 5
    order = [rows[i] for i in shuffled(len(rows), REFERENCE_SEED)]
    return {"train": order[:train_rows], "test": order[train_rows:]}
