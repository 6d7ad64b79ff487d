"""Use of several fused runs at once: `lorafusion evaluate --runs`, `lorafusion generate --runs`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import msgspec
import numpy as np
from jaxtyping import Int

from ..checks import at_least
from ..files import decode as decode_json
from ..files import utf8
from ..models.generate import GREEDY, Sampling
from ..runs.evaluate import Evaluation, likeliest_correct, seed_rows, with_options
from ..tasks import Encoded, Task, answer_options, decode, exact_match, load_task
from .service import FusedRun, Service

_EXAMPLE = '{"run": "a-run", "input": "some text"}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateRunsOptions:
    """Let several fused runs answer new text in batches of mixed tasks.

    Attributes:
      runs: folders of runs on one base and pool.
      file: JSONL file with a row for each answer, {"run": NAME, "input": TEXT}, where NAME is a folder of `runs` or its
        last part; a row without a run asks the base model. By default standard input.
      seed: seed of the runs that answers; by default the first of each.
      max_new_tokens: most tokens of an answer; by default as in each run.
      eval_batch: number of rows in a batch of generation.
      sampling: how the next token is chosen.
      sampling_seed: seed of the draws; each row's draws also depend on its number, and on nothing else.
    """

    runs: tuple[Path, ...]
    file: Path | None = None
    seed: int | None = None
    max_new_tokens: int | None = None
    eval_batch: int = 64
    sampling: Sampling = GREEDY
    sampling_seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateRunsOptions:
    """Evaluate several fused runs in batches of mixed tasks.

    Attributes:
      runs: folders of runs on one base and pool.
      task: task to evaluate all of them on; by default each on its own.
      train_rows: as in `EvaluateOptions`.
      test_rows: evaluate on the first rows of each test set only.
      eval_batch: number of rows in a batch of generation.
    """

    runs: tuple[Path, ...]
    task: str | None = None
    train_rows: int | None = None
    test_rows: int | None = None
    eval_batch: int = 64


def generate_rows(options: GenerateRunsOptions) -> list[str]:
    """Return the answers to the rows of a file or of standard input.

    Raises:
      ValueError: a row is not as it should be, or names another run; runs that cannot be served together.
    """
    at_least(1, max_new_tokens=options.max_new_tokens, eval_batch=options.eval_batch)
    runs = _read(options.runs)
    names = {spelling: name for name in runs for spelling in (name, str(runs[name].folder))}
    where = options.file or "standard input"
    with utf8(where):
        text = sys.stdin.read() if options.file is None else options.file.read_text(encoding="utf-8")
        # A text of JSON may hold U+2028 and its like, which end no line here.
        lines = [(f"{where}:{i}", line.encode()) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows = [_row(line, place, names) for place, line in lines]
    if not rows:
        raise ValueError(f"{where} holds no rows: give a line for each answer, such as {_EXAMPLE}")
    service = Service(list(runs.values()), capacity=len(runs))
    for name, run in runs.items():
        service.add(name, run, options.seed)
    texts, asked = zip(*rows, strict=True)
    how = ("max_new_tokens", "eval_batch", "sampling", "sampling_seed")
    return service.generate(texts, asked, **{name: getattr(options, name) for name in how})


def _row(line: bytes, where: str, names: dict[str, str]) -> tuple[str, str | None]:
    """Return the text of a row and the name of the run that answers it."""
    row = decode_json(line, _Row, where, own=False, fix=f"wanted a row such as {_EXAMPLE}")
    run = row.get("run")
    if run is not None and run not in names:
        raise ValueError(f"{where} names the run {run!r}: there are {', '.join(dict.fromkeys(names.values()))}")
    return row["input"], run and names[run]


class _Row(TypedDict):
    input: Annotated[str, msgspec.Meta(pattern=r"\S", description="a text")]
    run: NotRequired[str | None]


class _Asked(NamedTuple):
    """The test rows of a run, for every seed one after the other.

    Attributes:
      run: the run.
      numbers: number of each seed's task in the bank.
      task: the texts.
      test: tokens of the rows.
      options: answers that each row could have; None for an open task.
    """

    run: FusedRun
    numbers: list[int]
    task: Task
    test: Encoded
    options: Sequence[Sequence[str]] | None


def evaluate_runs(options: EvaluateRunsOptions) -> list[dict[str, Any]]:
    """Return the scores of every seed of every run (see `seed_rows`), with the names of the run and the task.

    Raises:
      ValueError: runs that cannot be served together, or a task that cannot be used.
    """
    at_least(1, test_rows=options.test_rows, eval_batch=options.eval_batch)
    runs = _read(options.runs)
    service = Service(list(runs.values()), capacity=sum(len(run.options.seeds) for run in runs.values()))
    asked = {}
    for name, run in runs.items():
        of_seeds = {f"{name}, seed {seed}": seed for seed in run.options.seeds}
        for task, seed in of_seeds.items():
            service.add(task, run, seed)
        asked[name] = _asked(service, run, [service.tasks[task].number for task in of_seeds], options)
    found = _evaluated(service, list(asked.values()), options.eval_batch)
    return [
        {"run": name, "task": one.task.name, **row}
        for (name, one), evaluation in zip(asked.items(), found, strict=True)
        for row in seed_rows(one.run.options.seeds, evaluation)
    ]


def _asked(service: Service, run: FusedRun, numbers: list[int], options: EvaluateRunsOptions) -> _Asked:
    fused = run.options
    train_rows = fused.train_rows if options.train_rows is None else options.train_rows
    where = options.task or fused.task
    task = load_task(where, prompt=fused.prompt, chat=fused.chat, train_rows=train_rows, need=("test",))
    test = service.encode(task.test[: options.test_rows or fused.test_rows], run, run.max_new_tokens)
    closed = answer_options(task)
    return _Asked(run, numbers, task, test, closed and closed[: len(test)])


def _evaluated(service: Service, asked: Sequence[_Asked], eval_batch: int) -> list[Evaluation]:
    """Return the evaluation of every run: its rows and seeds share their batches with all others."""
    blocks = [(one.test, one.numbers) for one in asked]
    rows, numbers = _for_seeds(blocks)
    limits = [one.run.max_new_tokens for one in asked for _ in range(len(one.test) * len(one.numbers))]
    said = decode(service.tokenizer, service.tokens(rows, numbers, limits, eval_batch=eval_batch), service.text_format)
    likelihoods = service.log_likelihoods(rows, numbers, eval_batch=eval_batch)
    closed = [
        (with_options(service.tokenizer, one.task, one.test, one.options, service.format_of(one.run)), one.numbers)
        for one in asked
        if one.options is not None
    ]
    of_options = service.log_likelihoods(*_for_seeds(closed), eval_batch=eval_batch)
    scores = iter(_apart(of_options, closed))
    found = []
    for one, texts, of_rows in zip(
        asked, _apart(np.array(said, object), blocks), _apart(likelihoods, blocks), strict=True
    ):
        wanted = [example.target for example in one.task.test[: len(one.test)]]
        found.append(
            Evaluation(
                predictions=texts.tolist(),
                correct=np.stack([exact_match(of_seed, wanted).correct for of_seed in texts.tolist()]),
                loss=-of_rows.sum(axis=1) / sum(map(len, one.test.labels)),
                option_correct=likeliest_correct(next(scores), one.options, one.task) if one.options else None,
            )
        )
    return found


_Block = tuple[Encoded, list[int]]


def _for_seeds(blocks: Sequence[_Block]) -> tuple[Encoded, Int[np.ndarray, " rows"]]:
    """Return the rows of all blocks, each once for every number, and the numbers of all rows."""
    inputs = [row for rows, numbers in blocks for _ in numbers for row in rows.inputs]
    labels = [row for rows, numbers in blocks for _ in numbers for row in rows.labels]
    of_rows = [number for rows, numbers in blocks for number in numbers for _ in rows.inputs]
    return Encoded(tuple(inputs), tuple(labels)), np.array(of_rows, np.int32)


def _apart(values: np.ndarray, blocks: Sequence[_Block]) -> list[np.ndarray]:
    """Return what belongs to the rows of each block: [seeds, rows, ...]."""
    ends = np.cumsum([len(rows) * len(numbers) for rows, numbers in blocks])
    parts = zip(np.split(values, ends), blocks, strict=False)  # the last part, behind all blocks, is empty
    return [part.reshape(len(n), len(rows), *part.shape[1:]) for part, (rows, n) in parts]


def _read(folders: Sequence[Path]) -> dict[str, FusedRun]:
    """Return the runs by name: the last part of the folder, or all of it where two runs have the same last part."""
    last = [folder.name for folder in folders]
    names = [str(folder) if last.count(folder.name) > 1 else folder.name for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"a run is given twice in {', '.join(map(str, folders))}: name each one once")
    return {name: FusedRun.read(folder) for name, folder in zip(names, folders, strict=True)}
