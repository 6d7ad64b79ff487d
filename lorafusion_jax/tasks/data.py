"""Tasks: pairs of texts to train on and to test on."""

import dataclasses
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from ..files import shown, some
from .protocol import REFERENCE_SEED, shuffled
from .readers import Row, read_rows, without_revision

# The plain names, LoraHub's, and those of function-vector data sets.
_KEYS = (("input", "target"), ("context", "completion"), ("input", "output"))
_LAYOUT = "input and target (or output), or context and completion, with an instruction or without"


@dataclasses.dataclass(frozen=True)
class Example:
    """A text and the text that should follow it.

    Attributes:
      input: the text; in a conversation, the user's last message.
      target: the text that follows; in a conversation, the assistant's answer.
      history: role and content of the messages before, if any.
    """

    input: str
    target: str
    history: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Task:
    """Training rows and test rows, read from `source`."""

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    source: str

    @property
    def sha256(self) -> str:
        """Fingerprint of all rows in their order, prompts included."""
        parts = (self.train, self.test)
        rows = [[(example.input, example.target, *example.history) for example in part] for part in parts]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def load_task(
    source: str | Path,
    *,
    name: str | None = None,
    prompt: str | None = None,
    chat: bool = False,
    train_rows: int = 100,
    need: Collection[Literal["train", "test"]] = ("train", "test"),
) -> Task:
    r"""Read a task.

    Sources:

    * a folder with `train.jsonl` and `test.jsonl`, or LoraHub's `example.jsonl` and `zero_shot.jsonl`, or only the
      needed one; a row holds input and target, or context and completion, and may hold an instruction (Alpaca), which
      stands in the line before the input or alone;
    * one such file; a JSONL file of any other name;
    * a BIG-Bench Hard file, `{"examples": [{"input": ..., "target": ...}]}`;
    * a JSON list, `[{"input": ..., "output": ...}]`, as the function-vector data sets are (Todd et al., ICLR 2024); of
      rows with equal inputs the first;
    * a `datasets` folder (`save_to_disk`) or hub id, `owner/name`, `owner/name@revision`, `owner/name:config` or
      `owner/name@revision:config`, with those columns and the splits train and test (or validation).

    With `chat`, rows may also be conversations, `{"messages": [{"role": ..., "content": ...}, ...]}`, which end with
    the user's message and the assistant's answer.

    A file of another name, and a data set of one split, are one list. It is shuffled by `random.Random(42)`; then the
    first `train_rows` are used for training and the others for testing, whatever `need` is.

    Args:
      source: path or hub id.
      name: name of the task; by default the last part of `source`.
      prompt: template around every input, such as `"Sort a list of words.\n\nQ: {input}\nA:"`.
      chat: the model's chat template will be used, so rows may be conversations.
      train_rows: number of training rows of one list.
      need: parts that must have rows.

    Raises:
      ValueError: on a source that does not exist or has another layout, a row without its keys or without text (naming
        file and line), a file without rows, a needed part that is missing.
    """
    if prompt is not None and "{input}" not in prompt:
        raise ValueError(f"the prompt {prompt!r} has no {{input}}: write it where a row's input belongs")
    parts = {
        part: [as_example(row, where, prompt or "{input}", chat=chat) for where, row in rows]
        for part, rows in read_rows(source).items()
    }
    if "all" in parts:
        parts = _divide(parts["all"], train_rows, source)
    for part in need:
        if not parts.get(part):
            raise ValueError(f"{source} has no {part} rows: give a folder or data set that has both parts")
    path = Path(without_revision(source))
    return Task(
        # A hub id's config stays in the name, without the colon that no folder's name should have.
        name=name or (path.stem if path.is_file() else path.absolute().name.replace(":", "-")),
        train=tuple(parts.get("train", ())),
        test=tuple(parts.get("test", ())),
        source=str(source),
    )


def as_example(row: Row, where: str, prompt: str, *, chat: bool = False) -> Example:
    """Check one row that was read, and put the prompt around its input; `where` is for messages."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {shown(row)}: expected an object with {_LAYOUT}")
    keys = next((keys for keys in _KEYS if row.keys() >= set(keys)), None)
    instruction = row.get("instruction")
    if keys is None and instruction is not None and not row.keys() & {"input", "context"}:
        keys = next((keys for keys in _KEYS if keys[1] in row), None)
    if keys is None and "messages" in row:
        if not chat:
            raise ValueError(f"{where} is a conversation, which needs the model's chat template: give --chat")
        *history, (_, asked), (_, answer) = _conversation(row["messages"], where)
        return Example(prompt.replace("{input}", asked), answer, tuple(history))
    if keys is None:
        raise ValueError(f"{where} has {some([*row]) or 'no keys'}: expected {_LAYOUT}")
    asked, target = row.get(keys[0], ""), row[keys[1]]
    if instruction is not None:
        asked = _instructed(instruction, keys[0], asked, where)
    for key, text in zip(keys, (asked, target), strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: its {key} is {shown(text)}: give it a text, or take the row out")
    return Example(prompt.replace("{input}", asked), target)


def _instructed(instruction: Row, key: str, asked: Row, where: str) -> str:
    asked = "" if asked is None else asked
    for name, text in (("instruction", instruction), (key, asked)):
        if not isinstance(text, str):
            raise ValueError(f"{where}: its {name} is {shown(text)}: give it a text, or take the row out")
    texts = [text for text in (instruction, asked) if text.strip()]
    if not texts:
        raise ValueError(
            f"{where}: its instruction is {shown(instruction)}, and its {key} is {shown(asked)}: give one of them a "
            "text, or take the row out"
        )
    return "\n".join(texts)


def _conversation(messages: Row, where: str) -> list[tuple[str, str]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f'{where}: its messages are not a list of {{"role": ..., "content": ...}}')
    found = []
    for number, message in enumerate(messages, start=1):
        said = {key: value for key, value in message.items() if value is not None}  # `datasets` fills up keys with None
        if said.keys() != {"role", "content"} or not all(isinstance(value, str) for value in said.values()):
            raise ValueError(
                f"{where}: message {number} has {some([*said]) or 'nothing'}: expected role and content, both texts"
            )
        found.append((said["role"], said["content"]))
    if [role for role, _ in found[-2:]] != ["user", "assistant"] or not all(text.strip() for _, text in found[-2:]):
        roles = some([role for role, _ in found]) or "nobody"
        raise ValueError(
            f"{where} has messages of {roles}: expected the user's message and then the assistant's answer as the last "
            "two, both with text"
        )
    return found


def _divide(rows: list[Example], train_rows: int, source: str | Path) -> dict[str, list[Example]]:
    if not 0 <= train_rows < len(rows):
        raise ValueError(
            f"{source} is one list of {len(rows)} rows, and {train_rows} to train would leave none to test: "
            "use fewer (--train-rows), or give a folder with train.jsonl and test.jsonl"
        )
    order = [rows[i] for i in shuffled(len(rows), REFERENCE_SEED)]
    return {"train": order[:train_rows], "test": order[train_rows:]}
